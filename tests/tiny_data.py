"""Tiny datasets for the tests and the stress tests, on disk and in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.pixel_store import PixelStore
from src.models.tokenizer import Tokenizer

COLORS = ("red", "green", "blue", "yellow", "black", "white")


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """Return an image of a random color with some noise, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, 3) + rng.integers(-30, 30, (height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def write_captions(path: Path, names: list[str], captions_per_image: int) -> None:
    """Write a results.csv with captions of few words."""
    lines = ["image_name| comment_number| comment"]
    for i, name in enumerate(names):
        color, other = COLORS[i % 6], COLORS[(i // 6 + i + 1) % 6]
        lines += [f"{name}| {number}| A {color} thing number {number} near {other} things ."
                  for number in range(captions_per_image)]
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n")


def make_tiny_data(folder: Path, n_images: int = 12) -> tuple[Path, Path]:
    """Write JPEG and PNG images with five captions each; return (images, annotations)."""
    images, annotations = folder / "images", folder / "annotations" / "annotations.csv"
    images.mkdir(parents=True)
    names = [f"{1000 + i}.{'jpg' if i % 2 else 'png'}" for i in range(n_images)]
    for i, name in enumerate(names):
        Image.fromarray(noise(i, 20, 24)).save(images / name)
    write_captions(annotations, names, 5)
    return images, annotations


def make_dataset(counts: list[int]) -> Flickr30kDataset:
    """Return a dataset in which image i has counts[i] captions that name it, and all pixels i.

    The rows of the pixel store are in the reverse order of the images.
    """
    records = [ImageRecord(f"{i}.jpg", tuple(f"image{i} caption{j}" for j in range(count)))
               for i, count in enumerate(counts)]
    order = np.arange(len(counts), dtype=np.uint8)[::-1]
    pixels = np.broadcast_to(order[:, None, None, None], (len(counts), 4, 4, 3)).copy()
    rows = {record.name: len(counts) - 1 - i for i, record in enumerate(records)}
    captions = [caption for record in records for caption in record.captions]
    return Flickr30kDataset(records, PixelStore(pixels, rows, {}),
                            Tokenizer.from_captions(captions, 1, 4))
