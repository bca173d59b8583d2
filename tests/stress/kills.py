"""Real runs of train.py and search.py, ended by SIGKILL at random moments and gone on with.

Used by `tests/stress/faults.py`. A run of train.py that was killed as often as one likes, and gone on
with by --resume, must leave what an undisturbed one leaves, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from src.utils.tensors import load_tensors

ROOT = Path(__file__).resolve().parents[2]
COLORS = ("red", "green", "blue", "yellow", "black", "white")
IGNORED = {"time", "args"}  # of what a run leaves: how long it took, where it lies


def write_tiny_world(folder: Path, n_photos: int = 24, side: int = 900) -> Path:
    """Photos large enough that a kill may fall into their decoding, with two captions each.

    Returns:
        the folder, as --data-dir takes it.
    """
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    lines = ["image_name| comment_number| comment"]
    for i in range(n_photos):
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((side, side)).save(folder / "images" / f"{i}.png",
                                                          compress_level=1)
        for number in range(2):
            lines.append(f"{i}.png| {number}| A {COLORS[i % 6]} thing number {number} near "
                         f"{COLORS[(i // 6 + i + 1) % 6]} things .")
    (folder / "annotations" / "annotations.csv").write_text("\n".join(lines) + "\n")
    return folder


class Killer:
    """Runs commands to their end, or kills them at a random moment of their work.

    Attributes:
        moments: how many kills fell into each kind of work.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.moments: Counter[str] = Counter()
        # One thread a run: as fast for models this small, and it leaves the machine to others.
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def run(self, *command: object, within: float | None = None) -> tuple[int, str, float]:
        """Run a script of this project, and kill it at most `within` seconds after its first line.

        Returns:
            exit status (-9 where it was killed), what it printed, seconds of work.

        Raises:
            AssertionError: it ended by a traceback.
        """
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   env=self.environment)
        output = process.stdout.readline()  # what comes before is Python's own start
        start = time.perf_counter()
        if within is not None:
            try:
                process.wait(self.random.uniform(0, within))
            except subprocess.TimeoutExpired:
                process.kill()
        output += process.stdout.read()
        status = process.wait()
        assert "Traceback" not in output, output
        return status, output, time.perf_counter() - start


def differences(one: object, other: object, where: str = "") -> list[str]:
    """Where two trees of plain values and tensors differ by a single bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [found for key in one.keys() | other.keys() if key not in IGNORED
                for found in differences(one.get(key), other.get(key), f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [found for i, pair in enumerate(zip(one, other, strict=True))
                for found in differences(*pair, f"{where}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = (one.dtype == other.dtype and one.shape == other.shape
                and one.numpy().tobytes() == other.numpy().tobytes())
        return [] if same else [where]
    return [] if type(one) is type(other) and one == other else [where]


def what_is_left(results: Path) -> dict[str, object]:
    """All that a finished run leaves that must not depend on how often it was ended."""
    log = (results / "log.jsonl").read_text().splitlines()
    return {
        "last": load_tensors(results / "models" / "flickr30k_clip_last.pth"),
        "best": load_tensors(results / "models" / "flickr30k_clip_best.pth"),
        "log.jsonl": [json.loads(line) for line in log],
        "files": {str(path.relative_to(results)): True for path in sorted(results.rglob("*"))},
    }


def temporary_files(results: Path) -> dict[Path, int]:
    """The files that are being written in a folder, with their time of change."""
    return {path: path.stat().st_mtime_ns for pattern in (".*.tmp", ".*.new")
            for path in results.rglob(pattern)}


def train_until_done(
    killer: Killer, command: list, folder: Path, kills: int, longest: float
) -> int:
    """Start a run in `folder`, kill it up to `kills` times, each time go on, and let it end.

    Returns:
        the kills; fewer where the run was faster.

    Raises:
        AssertionError: it could not be gone on with.
    """
    results, journal = folder / "results", folder / "cache" / "pixels_34.jsonl"
    last = results / "models" / "flickr30k_clip_last.pth"
    done = 0
    while True:
        has_saved = last.exists() or last.with_name("flickr30k_clip_previous.pth").exists()
        before = temporary_files(folder)
        status, output, _ = killer.run(
            *command, "--results-dir", results, "--cache-dir", folder / "cache",
            *(["--resume"] if has_saved else []),
            # The first kill falls into the decoding, which takes a second or so.
            within=None if done >= kills else longest if done else 0.6)
        if status == 0:
            return done
        assert status == -9, output
        done += 1
        written = [path.name for path, changed in temporary_files(folder).items()
                   if before.get(path) != changed]
        if not journal.exists() or not journal.stat().st_size:
            moment = "decoding the photos"
        elif any(".pth." in name for name in written):
            moment = "saving a checkpoint"
        else:
            moment = "writing another file" if written else "training and the rest"
        killer.moments[moment] += 1


def search_until_done(
    killer: Killer, command: list, kill_within: float | None = None
) -> tuple[list[dict], float]:
    """Kill a search that builds its index, if it is slower than that, and search again to the end.

    Returns:
        the answers, and the seconds of the last search.
    """
    if kill_within:
        status, output, _ = killer.run(*command, within=kill_within)
        assert status in (0, -9), output
        killer.moments["building the index"] += status == -9
    status, output, seconds = killer.run(*command)
    assert status == 0, output
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], seconds
