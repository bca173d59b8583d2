"""Training on a folder of links to a blob store, as Hugging Face, DVC and git-annex lay it out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_data import make_tiny_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def flags(tmp_path: Path) -> list[str]:
    """Return the flags of a dataset whose images are all links to files outside their folder."""
    images, annotations = make_tiny_data(tmp_path / "data")
    links = tmp_path / "hub" / "snapshots" / "x" / "images"
    links.mkdir(parents=True)
    blobs = tmp_path / "hub" / "blobs"
    images.rename(blobs)
    for path in blobs.iterdir():
        (links / path.name).symlink_to(f"../../../blobs/{path.name}")
    return ["--images", str(links), "--annotations", str(annotations), "--image-size", "32",
            "--cache-dir", str(tmp_path / "cache")]


def run(*argv: str) -> subprocess.CompletedProcess:
    """Run a script."""
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)


def test_links_are_named_or_followed(tmp_path: Path, flags: list[str]) -> None:
    """Case train-18: main.py and train.py name the links; with --follow-links both accept them."""
    check = ["main.py", *(flag for flag in flags if "cache" not in flag), "--batch-size", "4"]
    train = ["train.py", *flags, "--weights", "none", "--epochs", "1", "--batch-size", "4",
             "--device", "cpu", "--val-fraction", "0.25",
             "--results-dir", str(tmp_path / "results")]
    done = run(*check)
    assert done.returncode == 1
    assert "links to files outside the image folder: 12 images" in done.stdout
    done = run(*train)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: none of the 12 images can be read")
    assert "a link to a file outside" in done.stderr and "--follow-links" in done.stderr
    done = run(*check, "--follow-links")
    assert "links to files outside" not in done.stdout
    done = run(*train, "--follow-links")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "models" / "flickr30k_clip_best.pth").exists()
