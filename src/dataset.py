"""Records, pixels and tokens -> batches of photos with their captions."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from src.annotations import Annotations, ImageRecord, Remark, read_annotations
from src.errors import UserError
from src.pixels import PixelStore
from src.splits import limit_images, split_by_image
from src.tokenizer import Tokenizer


@dataclass
class Source:
    """What lies on the disk: the caption file, matched with the photos and split.

    Attributes:
        splits: 'train', 'val', 'test' -> the records whose photo is there.
        missing: photos that have captions but no file.
        unused: files that no caption names.
    """

    images: Path
    annotations: Annotations
    splits: dict[str, list[ImageRecord]]
    missing: list[Remark]
    unused: list[str]


def open_source(
    images: Path, annotations: Path, val_fraction: float, seed: int, max_images: int | None = None
) -> Source:
    """Read the captions, look which photos are there, and split by image.

    The split is made over all photos that the caption file names, so that a photo lost from the
    disk moves no other one to the other side.

    Raises:
        UserError: nothing at one of the paths, or no photo of the caption file among `images`.
    """
    for path, what in ((annotations, "caption file"), (images, "folder of photos")):
        if not path.exists():
            raise UserError(
                f"there is no {what} at {path}\n"
                "  Flickr30k goes here:  data/flickr30k/images/*.jpg\n"
                "                        data/flickr30k/annotations/annotations.csv\n"
                "  other places:         --data-dir DIR, or --images DIR --annotations FILE\n"
                "  no data at hand:      --demo draws a small world of its own"
            )
    if not images.is_dir():
        raise UserError(f"{images} is not a folder of photos")
    read = read_annotations(annotations)
    names = {record.name for record in read.records}
    present = _present(images, names)
    missing = [Remark(str(images), record.name, "no such photo")
               for record in read.records if record.name not in present]
    if not names & present:
        example = f", such as {read.records[0].name}," if read.records else ""
        raise UserError(
            f"{annotations} names {len(names):,} photos, and none of them{example} is in {images}"
        )
    splits = {
        split: [record for record in records if record.name in present]
        for split, records in split_by_image(read.records, val_fraction, seed).items()
    }
    if max_images is not None:
        splits = limit_images(splits, max_images, seed)
    return Source(images, read, splits, missing, sorted(present - names))


def _present(images: Path, names: set[str]) -> set[str]:
    """The files in the folder, and those of `names` that lie in folders below it."""
    present = {path.name for path in images.iterdir() if path.is_file()}
    # os.path: pathlib's is_file raises on a name that is too long for the file system.
    return present | {name for name in names if "/" in name and os.path.isfile(images / name)}


@dataclass
class Batch:
    """B distinct photos with M >= B of their captions.

    Attributes:
        pixels: (B, S, S, 3) uint8.
        tokens: (M, L) int64.
        image_index: (M,) int64, the row of each caption's photo.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    image_index: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=True)
                       for tensor in (self.pixels, self.tokens, self.image_index)))


class Flickr30kDataset:
    """The photos of one split with all their captions.

    Attributes:
        records: N image records whose photo could be decoded.
        captions: M captions, photo after photo.
        image_index: (M,) int64, the row in `records` of each caption's photo.
        tokens: (M, L) int64, made once.
    """

    def __init__(
        self, records: list[ImageRecord], store: PixelStore, tokenizer: Tokenizer
    ) -> None:
        self.records = [record for record in records if record.name in store.rows]
        self.store = store
        self.rows = np.array([store.rows[record.name] for record in self.records], np.int64)
        self.captions = [caption for record in self.records for caption in record.captions]
        counts = torch.tensor([len(record.captions) for record in self.records], dtype=torch.int64)
        self.image_index = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (M,)
        self.first_caption = torch.cumsum(counts, 0) - counts  # (N,)
        self.tokens = tokenizer.encode(self.captions)  # (M, L)

    def __len__(self) -> int:
        """Pairs of a photo and a caption."""
        return len(self.captions)

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """The stored squares of photos `images` (B,): (B, S, S, 3) uint8."""
        return torch.from_numpy(self.store.pixels[self.rows[images]])

    def batch(self, items: list[tuple[int, np.ndarray]]) -> Batch:
        """The batch of `items`: (photo, which captions of all M) each."""
        captions = torch.from_numpy(np.concatenate([captions for _, captions in items]))
        image_index = torch.tensor([row for row, (_, chosen) in enumerate(items) for _ in chosen])
        photos = np.array([photo for photo, _ in items])
        return Batch(self.pixels(photos), self.tokens[captions], image_index)

    def epoch(
        self, batch_size: int, captions_per_image: int, seed: int, epoch: int
    ) -> list[list[tuple[int, np.ndarray]]]:
        """The items of an epoch's batches, in the order of a shuffle drawn from (seed, epoch).

        Every caption comes once, in groups of `captions_per_image` of its photo, and no batch
        holds a photo twice: two captions of one photo would be each other's false negatives.
        Batches are full; the few items left over at the end wait for another epoch's shuffle.
        """
        rng = np.random.default_rng([seed, epoch])
        rounds: list[list[tuple[int, np.ndarray]]] = []
        for photo in rng.permutation(len(self.records)):
            first, count = int(self.first_caption[photo]), len(self.records[photo].captions)
            shuffled = first + rng.permutation(count)
            for turn, start in enumerate(range(0, count, captions_per_image)):
                if turn == len(rounds):
                    rounds.append([])
                chosen = shuffled[start : start + captions_per_image]
                rounds[turn].append((int(photo), chosen))
        waiting = (items[i] for items in rounds for i in rng.permutation(len(items)))
        batches = list(_distinct_batches(waiting, min(batch_size, len(self.records))))
        return batches


def _distinct_batches(
    items: Iterator[tuple[int, np.ndarray]], batch_size: int
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Full batches in the order of `items`; an item whose photo is in the batch waits for the next.

    Items come in rounds that hold each photo at most once, so only the few at the seam of two
    rounds ever wait.
    """
    held: deque[tuple[int, np.ndarray]] = deque()
    exhausted = False
    while not exhausted:
        batch: dict[int, tuple[int, np.ndarray]] = {}
        still_held: deque[tuple[int, np.ndarray]] = deque()
        while len(batch) < batch_size:
            item = held.popleft() if held else next(items, None)
            if item is None:
                exhausted = True
                break
            if item[0] in batch:
                still_held.append(item)
            else:
                batch[item[0]] = item
        held = still_held + held
        if len(batch) == batch_size:
            yield list(batch.values())
