"""The data of the study of retrieval quality: photos' features, captions as a row spells them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from benchmarks.quality_rows import Row
from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.pixel_store import PixelStore
from src.models.image_encoder import ImageEncoder
from src.models.tokenizer import Tokenizer, split_words
from src.training.frozen_features import frozen_features
from src.utils.errors import UserError

CONTEXT_LENGTH = 32
FEATURE_DIM = 1280  # of EfficientNet-B0
ENDINGS = ("ingly", "ings", "ing", "edly", "ies", "ers", "er", "ed", "es", "s", "ly", "y")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What both studies are told of the photos and the weights."""
    parser.add_argument("--images", type=Path, help="folder of photos")
    parser.add_argument("--annotations", type=Path, help="caption file")
    parser.add_argument("--weights", default="imagenet", metavar="imagenet|PATH",
                        help="(default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS",
                        help="(default: %(default)s)")
    parser.add_argument("--cache-dir", type=Path, help="(default: beside --images)")


@dataclass
class Data:
    """What all rows share: records of both splits, pixels, the frozen encoder, kept features.

    There is no encoder where all features that there will be came from a file.
    """

    records: dict[str, list[ImageRecord]]
    store: PixelStore
    encoder: ImageEncoder | None
    folder: Path
    known: dict = field(default_factory=dict)

    def features(self, split: str, view: str) -> torch.Tensor:
        """(N, F) features of each photo's `view`; they depend on nothing that rows change."""
        if (split, view) not in self.known:
            if self.encoder is None:
                raise UserError(f"a row asks for the view '{view}' of the photos, which --features "
                                "lacks: leave that row out, or bring it")
            dataset = Flickr30kDataset(self.records[split], self.store, Tokenizer.from_captions(
                [], min_freq=1, context_length=1))
            size = self.encoder.image_size
            if view != "centre":
                pixels = dataset.pixels(np.arange(len(dataset.records)))  # (N, S, S, 3)
                dataset = dataset.with_images({
                    "mirror": lambda: pixels.flip(2),
                    "top left": lambda: pixels[:, :size, :size],
                    "bottom right": lambda: pixels[:, -size:, -size:],
                }[view]())
            self.known[split, view] = frozen_features(self.folder, self.encoder, dataset)
        return self.known[split, view]

    def sets(self, row: Row) -> tuple[Flickr30kDataset, Flickr30kDataset, int]:
        """Train set, validation set, size of the vocabulary; for pixels the photos' numbers."""
        captions = [c for record in self.records["train"] for c in record.captions]
        spell = _speller(row, captions)
        tokenizer = Tokenizer.from_captions(map(spell, captions), row.min_freq, CONTEXT_LENGTH)
        train, val = (Flickr30kDataset(
            [replace(r, captions=tuple(map(spell, r.captions))) for r in self.records[split]],
            self.store, tokenizer) for split in ("train", "val"))
        return train.with_images(torch.arange(len(train.records))), val, len(tokenizer)


def read_features(
    path: Path, records: dict[str, list[ImageRecord]]
) -> dict[tuple[str, str], torch.Tensor]:
    """Features that another network gave, for `Data.known`: (split, view) -> (N, F).

    Args:
        path: an .npz file of `names`, and for each view, 'centre' and 'mirror' say, (N, F) numbers.
        records: of each split; every photo must be among the names.

    Raises:
        UserError: no such file, or it does not fit.
    """
    try:
        with open(path, "rb") as stream, np.load(stream) as file:
            arrays = dict(file)
        row_of = {name: row for row, name in enumerate(arrays.pop("names"))}
        rows = {split: np.array([row_of[r.name] for r in own]) for split, own in records.items()}
        found = {(split, view): torch.from_numpy(array[rows[split]]).float()
                 for view, array in arrays.items() for split in records}
    except (OSError, BadZipFile, EOFError, TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} holds no features of these photos: {error}") from error
    for (_, view), features in found.items():
        if features.ndim != 2 or features.shape[1] != FEATURE_DIM:
            raise UserError(f"{path}: {view} has shape {tuple(features.shape)}; a photo's features "
                            f"are to be {FEATURE_DIM} numbers, as EfficientNet-B0's are")
    return found


def _speller(row: Row, captions: list[str]) -> Callable[[str], str]:
    """Writes a caption with the words, or stems, that the vocabulary is to know."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    commonest: dict[str, str] = {}
    for word, count in counts.most_common():
        if count >= row.min_freq:
            commonest.setdefault(_stem(word), word)

    def spell(word: str) -> str:
        if row.stems == "all":
            return _stem(word)
        return commonest.get(_stem(word), word) if counts[word] < row.min_freq else word

    if not row.stems:
        return str
    return lambda caption: " ".join(map(spell, split_words(caption)))


def _stem(word: str) -> str:
    """A crude stem: one ending, a doubled last letter and a last e go."""
    word = next((word[: -len(e)] for e in ENDINGS
                 if word.endswith(e) and len(word) >= len(e) + 3), word)
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word[-1] == "e" else word
