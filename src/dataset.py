"""Records, pixels and tokens -> batches of photos with their captions."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
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
        if not os.path.exists(path):  # not Path.exists, which raises in a closed folder
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
    try:
        present = _present(images, names)
    except OSError as error:
        raise UserError(f"cannot look into {images}: {error.strerror}") from error
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
    """B distinct photos with M >= B of their captions, in the order of their photos.

    Where several processes share a batch, each holds the photos and captions of its own `rows`, and
    knows of the others' by number.

    Attributes:
        images: (b, S, S, 3) uint8 pixels, or (b, F) float32 features of a frozen image encoder.
        tokens: (m, L) int64.
        image_index: (M,) int64, rising, the row in the whole batch of each caption's photo.
        counts: captions of each of the B photos.
        rows: which b of the B photos are here.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    image_index: torch.Tensor
    counts: list[int]
    rows: range

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; to a GPU it goes while the host works on."""
        return replace(self, **{
            name: tensor.pin_memory().to(device, non_blocking=True)
            if device.type == "cuda" and tensor.device.type == "cpu" else tensor.to(device)
            for name, tensor in (("images", self.images), ("tokens", self.tokens),
                                 ("image_index", self.image_index))
        })

    def captions_of(self, rows: range) -> int:
        """How many captions the photos `rows` of the whole batch have."""
        return sum(self.counts[rows.start : rows.stop])

    def pieces(self, size: int | None) -> list[tuple[slice, slice]]:
        """What is here, cut after every `size` photos: places in `images` and in `tokens`."""
        cuts = []
        for start in range(0, len(self.rows), size or max(1, len(self.rows))):
            stop = min(len(self.rows), start + (size or len(self.rows)))
            first = self.captions_of(self.rows[:start])
            cuts.append((slice(start, stop),
                         slice(first, first + self.captions_of(self.rows[start:stop]))))
        return cuts


class Flickr30kDataset:
    """The photos of one split with all their captions.

    Attributes:
        records: N image records whose photo could be decoded.
        images, rows: photo i is images[rows[i]]: pixels of the store, or features.
        captions: M captions, photo after photo.
        image_index: (M,) int64, the row in `records` of each caption's photo.
        tokens: (M, L) int64, made once.
    """

    def __init__(
        self, records: list[ImageRecord], store: PixelStore, tokenizer: Tokenizer
    ) -> None:
        self.records = [record for record in records if record.name in store.rows]
        self.images: np.ndarray | torch.Tensor = store.pixels
        self.rows = np.array([store.rows[record.name] for record in self.records], np.int64)
        self.captions = [caption for record in self.records for caption in record.captions]
        counts = torch.tensor([len(record.captions) for record in self.records], dtype=torch.int64)
        self.image_index = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (M,)
        self.first_caption = torch.cumsum(counts, 0) - counts  # (N,)
        self.tokens = tokenizer.encode(self.captions)  # (M, L)

    def __len__(self) -> int:
        """Pairs of a photo and a caption."""
        return len(self.captions)

    def digest(self) -> str:
        """A digest of names and captions, to notice that a run goes on with other data."""
        digest = hashlib.blake2b(digest_size=8)
        for record in self.records:
            digest.update(repr((record.name, record.captions)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def holding(self, images: np.ndarray | torch.Tensor) -> Flickr30kDataset:
        """The same photos and captions with something else for pixels: row i for photo i.

        Features of a frozen image encoder, or the pixels themselves on a GPU.
        """
        other = copy(self)
        other.images, other.rows = images, np.arange(len(self.records))
        return other

    def pixels(self, photos: np.ndarray) -> torch.Tensor:
        """The stored squares of `photos` (B,), (B, S, S, 3) uint8, or what stands for them."""
        rows = self.rows[photos]
        if isinstance(self.images, torch.Tensor):
            return self.images[torch.from_numpy(rows).to(self.images.device, non_blocking=True)]
        return torch.from_numpy(self.images[rows])

    def batch(self, items: list[tuple[int, np.ndarray]], rows: range | None = None) -> Batch:
        """The batch of `items`, (photo, which captions of all M) each; of it the photos `rows`."""
        rows = range(len(items)) if rows is None else rows
        mine = items[rows.start : rows.stop]
        captions = np.concatenate([np.empty(0, np.int64), *(chosen for _, chosen in mine)])
        counts = [len(chosen) for _, chosen in items]
        return Batch(
            self.pixels(np.array([photo for photo, _ in mine], np.int64)),
            self.tokens[torch.from_numpy(captions)],
            torch.repeat_interleave(torch.arange(len(items)), torch.tensor(counts)),
            counts, rows,
        )

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
