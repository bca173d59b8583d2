"""Tiny data that the tests share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.tiny_data import make_tiny_data

torch.set_num_threads(1)  # models this small spend their time waiting for each other

# The same examples in every run, and as long as they take. A thorough run, with other examples
# each time: python -m pytest --hypothesis-profile nightly
settings.register_profile("suite", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=10_000, deadline=None)
settings.load_profile("suite")

@pytest.fixture(autouse=True, scope="session")
def float32() -> Iterator[None]:
    """Every processor computes in float32, so that the tests see the same numbers everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.utils.runtime.cpu_has_bfloat16", lambda: False)
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
