"""A data set to measure on: as many photos with captions as asked for, laid out as Flickr30k."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from benchmarks.captions import write_captions
from src.data.images import write_image
from src.data.source import DataSource, scan_dataset

DISTINCT = 64  # generated photos; more would take long to write and change no time


def write_data_set(folder: Path, count: int, photos: Path | None = None) -> DataSource:
    """Write `count` photos with five captions each below `folder`, and read them back.

    Args:
        photos: a folder of JPEGs, repeated to size by hard links or copies; None for generated
            ones of 500x375.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    if photos is None:
        photos = folder / "drawn"
        photos.mkdir()
        for i in range(min(count, DISTINCT)):
            write_image(photos / f"{i}.jpg", _picture(i))
    originals = sorted(photos.glob("*.jpg"))
    if not originals:
        raise SystemExit(f"there are no JPEGs in {photos}")
    for i in range(count):
        _link(originals[i % len(originals)], images / f"{1_000_000 + i}.jpg")
    write_captions(folder / "annotations.csv", count)
    return scan_dataset(images, folder / "annotations.csv", val_fraction=0, seed=0)


def _picture(seed: int) -> np.ndarray:
    """(375, 500, 3) uint8 with edges, gradients and a little noise, as dense as a photo's JPEG."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 200, (15, 20, 3)).repeat(25, 0).repeat(25, 1)
    light = np.linspace(0, 50, 500)[None, :, None]
    return (blocks + light + rng.integers(-12, 12, blocks.shape)).clip(0, 255).astype(np.uint8)


def _link(original: Path, name: Path) -> None:
    try:
        os.link(original.resolve(), name)
    except OSError:  # another file system
        shutil.copyfile(original, name)
