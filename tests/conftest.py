"""Tiny data that the tests share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

torch.set_num_threads(1)  # models this small spend their time waiting for each other

# The same examples in every run, and as long as they take. A thorough run, with other examples
# each time: python -m pytest --hypothesis-profile nightly
settings.register_profile("suite", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=10_000, deadline=None)
settings.load_profile("suite")

COLOURS = ("red", "green", "blue", "yellow", "black", "white")


@pytest.fixture(autouse=True, scope="session")
def float32() -> Iterator[None]:
    """Every processor computes in float32, so that the tests see the same numbers everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.runtime.cpu_has_bfloat16", lambda: False)
        yield


@pytest.fixture()
def tiny_data(tmp_path: Path) -> tuple[Path, Path]:
    """12 photos of 20x24 pixels, JPEG and PNG, with five captions each: (images, annotations)."""
    return make_tiny_data(tmp_path / "data")


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte, which only root can mount, and not everywhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(
            command, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def make_tiny_data(folder: Path, n_photos: int = 12) -> tuple[Path, Path]:
    """Write photos of noise around a colour, and a results.csv: (images, annotations)."""
    images, annotations = folder / "images", folder / "annotations" / "annotations.csv"
    images.mkdir(parents=True)
    annotations.parent.mkdir(parents=True)
    lines = ["image_name| comment_number| comment"]
    for i in range(n_photos):
        rng = np.random.default_rng(i)
        name = f"{1000 + i}.{'jpg' if i % 2 else 'png'}"
        pixels = rng.integers(0, 256, 3) + rng.integers(-30, 30, (20, 24, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / name)
        colour, other = COLOURS[i % 6], COLOURS[(i // 6 + i + 1) % 6]
        for number in range(5):
            caption = f"A {colour} thing number {number} near {other} things ."
            lines.append(f"{name}| {number}| {caption}")
    annotations.write_text("\n".join(lines) + "\n")
    return images, annotations
