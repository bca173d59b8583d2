"""Settings and fixtures of all tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.tiny_data import make_tiny_data

torch.set_num_threads(1)  # small models are slower with several threads

# The default profile has the same examples in every run. A thorough run with new examples each
# time: python -m pytest --hypothesis-profile nightly
settings.register_profile("suite", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=10_000, deadline=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="session")
def float32() -> Iterator[None]:
    """Compute in float32 on every CPU, so that the tests see the same numbers everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.utils.runtime.cpu_has_bfloat16", lambda: False)
        yield


@pytest.fixture()
def tiny_data(tmp_path: Path) -> tuple[Path, Path]:
    """12 images of 20x24 pixels, JPEG and PNG, with five captions each: (images, annotations)."""
    return make_tiny_data(tmp_path / "data")


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte; skips where it cannot be mounted, which needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not sys.platform.startswith("linux") or subprocess.run(
            command, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
