"""A dataset of any size in the layout of Flickr30k, to measure on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from benchmarks.captions import write_captions
from src.data.images import write_image
from src.data.source import DataSource, scan_dataset

DISTINCT = 64  # generated images; more take long to write and change no result


def write_dataset(folder: Path, count: int, photos: Path | None = None) -> DataSource:
    """Write `count` images with five captions each below `folder`, and scan them.

    Args:
        folder: of the dataset.
        count: number of images.
        photos: a folder of JPEG files, which are repeated by hard links or copies; None for
            generated images of 500x375 pixels.

    Raises:
        SystemExit: there are no JPEG files in `photos`.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    if photos is None:
        photos = folder / "generated"
        photos.mkdir()
        for i in range(min(count, DISTINCT)):
            write_image(photos / f"{i}.jpg", _generate(i))
    originals = sorted(photos.glob("*.jpg"))
    if not originals:
        raise SystemExit(f"there are no .jpg files in {photos}")
    for i in range(count):
        _link(originals[i % len(originals)], images / f"{1_000_000 + i}.jpg")
    write_captions(folder / "annotations.csv", count)
    return scan_dataset(images, folder / "annotations.csv", val_fraction=0, seed=0)


def _generate(seed: int) -> np.ndarray:
    """Return (375, 500, 3) uint8 whose JPEG file is as large as that of a photo."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 200, (15, 20, 3)).repeat(25, 0).repeat(25, 1)
    light = np.linspace(0, 50, 500)[None, :, None]
    return (blocks + light + rng.integers(-12, 12, blocks.shape)).clip(0, 255).astype(np.uint8)


def _link(original: Path, name: Path) -> None:
    """Link a file under another name, or copy it to another file system."""
    try:
        os.link(original.resolve(), name)
    except OSError:
        shutil.copyfile(original, name)
