"""Tiny images with captions, which the tests and the stress tests write to disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = ("red", "green", "blue", "yellow", "black", "white")


def make_tiny_data(folder: Path, n_images: int = 12) -> tuple[Path, Path]:
    """Write images of noise around a color, and a results.csv: (images, annotations)."""
    images, annotations = folder / "images", folder / "annotations" / "annotations.csv"
    images.mkdir(parents=True)
    annotations.parent.mkdir(parents=True)
    lines = ["image_name| comment_number| comment"]
    for i in range(n_images):
        rng = np.random.default_rng(i)
        name = f"{1000 + i}.{'jpg' if i % 2 else 'png'}"
        pixels = rng.integers(0, 256, 3) + rng.integers(-30, 30, (20, 24, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / name)
        color, other = COLORS[i % 6], COLORS[(i // 6 + i + 1) % 6]
        for number in range(5):
            caption = f"A {color} thing number {number} near {other} things ."
            lines.append(f"{name}| {number}| {caption}")
    annotations.write_text("\n".join(lines) + "\n")
    return images, annotations
