"""The data of the quality study: captions as datasets, and frozen features of the images."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality_rows import Row
from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.pixel_store import PixelStore, store_size
from src.data.source import scan_dataset
from src.models.image_encoder import IMAGE_ENCODERS, ImageEncoder
from src.models.tokenizer import Tokenizer
from src.training.frozen_features import frozen_features

CONTEXT_LENGTH = 32


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose images, captions and weights."""
    parser.add_argument("--images", type=Path, help="folder of images")
    parser.add_argument("--annotations", type=Path, help="caption file")
    parser.add_argument("--image-encoder", choices=IMAGE_ENCODERS, default="efficientnet-b0",
                        help="(default: %(default)s)")
    parser.add_argument("--weights", default="imagenet", metavar="imagenet|PATH",
                        help="(default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS",
                        help="(default: %(default)s)")
    parser.add_argument("--cache-dir", type=Path, help="(default: next to --images)")


@dataclass
class Data:
    """What all rows share: records of both splits, pixels, the frozen encoder, its features."""

    records: dict[str, list[ImageRecord]]
    store: PixelStore
    encoder: ImageEncoder
    folder: Path
    _features: dict = field(default_factory=dict)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Data:
        """Match captions with images, decode the images once, and load the encoder's weights."""
        source = scan_dataset(args.images, args.annotations, 0.1, 0)
        folder = args.cache_dir or args.images.parent
        names = [record.name for split in ("train", "val") for record in source.splits[split]]
        store = PixelStore.build(folder, args.images, names, store_size(args.image_size))
        records = {split: [r for r in source.splits[split] if r.name in store.rows]
                   for split in ("train", "val")}
        encoder = ImageEncoder(args.image_encoder, args.image_size)
        encoder.load_weights(args.weights)
        return cls(records, store, encoder, folder)

    def features(self, split: str, view: str) -> torch.Tensor:
        """Return the features of the 'center', the 'flip' or the 'mean' of both: (N, F)."""
        if view == "mean":
            return (self.features(split, "center") + self.features(split, "flip")) / 2
        if (split, view) not in self._features:
            dataset = Flickr30kDataset(self.records[split], self.store, Tokenizer.from_captions(
                [], min_freq=1, context_length=1))
            if view == "flip":
                pixels = dataset.take_images(np.arange(len(dataset.records)))  # (N, S, S, 3)
                dataset = dataset.with_images(pixels.flip(2))
            self._features[split, view] = frozen_features(self.folder, self.encoder, dataset)
        return self._features[split, view]

    def datasets(self, row: Row) -> tuple[Flickr30kDataset, Flickr30kDataset, int]:
        """Return training split, validation split and vocabulary size.

        The images of the training split are their numbers, with which features are looked up.
        """
        captions = [c for record in self.records["train"] for c in record.captions]
        tokenizer = Tokenizer.from_captions(captions, row.min_freq, CONTEXT_LENGTH)
        train, val = (Flickr30kDataset(self.records[split], self.store, tokenizer)
                      for split in ("train", "val"))
        return train.with_images(torch.arange(len(train.records))), val, len(tokenizer)
