"""Runs of train.py and search.py that are killed at random moments, for `tests/stress/faults.py`.

A training run that was killed any number of times and resumed must leave the same files as an
uninterrupted one, to the last bit.
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
from PIL import Image

from src.utils.tensors import load_tensors
from tests.tiny_data import write_captions

ROOT = Path(__file__).resolve().parents[2]


def write_dataset(folder: Path, n_images: int = 24, side: int = 900) -> None:
    """Write a --data-dir of images so large that a kill can interrupt their decoding."""
    (folder / "images").mkdir(parents=True)
    names = [f"{i}.png" for i in range(n_images)]
    for i, name in enumerate(names):
        blocks = np.random.default_rng(i).integers(0, 256, (9, 9, 3)).astype(np.uint8)
        image = Image.fromarray(blocks).resize((side, side))
        image.save(folder / "images" / name, compress_level=1)
    write_captions(folder / "annotations" / "annotations.csv", names, 2)


class Killer:
    """Runs commands to their end, or kills them at a random moment.

    Attributes:
        moments: number of kills by what the process was doing.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.moments: Counter[str] = Counter()
        # One thread is as fast for models this small, and leaves the other cores free.
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def run(self, *command: object, within: float | None = None) -> tuple[int, str, float]:
        """Run a script of this project; kill it at most `within` seconds after its first output.

        Returns:
            Exit status (-9 if it was killed), output, and seconds after the first output.

        Raises:
            AssertionError: it printed a traceback.
        """
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   env=self.environment)
        output = process.stdout.readline()  # before it, Python imports its modules
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


def read_results(results: Path) -> dict[str, object]:
    """Return everything that a finished run has written, except times and flags."""
    content: dict[str, object] = {
        "files": sorted(str(path.relative_to(results)) for path in results.rglob("*")),
        "log": [json.loads(line) for line in (results / "log.jsonl").read_text().splitlines()],
    }
    for name in ("last", "best"):
        content[name] = load_tensors(results / "models" / f"flickr30k_clip_{name}.pth")
        del content[name]["args"]
    for line in content["log"] + content["last"]["log"]:
        del line["time"]
    return content


def temporary_files(folder: Path) -> dict[Path, int]:
    """Return the unfinished files in a folder, with their modification times."""
    return {path: path.stat().st_mtime_ns for pattern in (".*.tmp", ".*.new")
            for path in folder.rglob(pattern)}


def train_until_done(
    killer: Killer, command: list, folder: Path, kills: int, longest: float
) -> int:
    """Train in `folder`, kill and resume the run up to `kills` times, then let it finish.

    Returns:
        The number of kills, which is smaller if the run finished before.

    Raises:
        AssertionError: the run could not be resumed.
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
            # The first kill interrupts the decoding, which takes about a second.
            within=None if done >= kills else longest if done else 0.6)
        if status == 0:
            return done
        assert status == -9, output
        done += 1
        written = [path.name for path, modified in temporary_files(folder).items()
                   if before.get(path) != modified]
        if not journal.exists() or not journal.stat().st_size:
            moment = "decoding images"
        elif any(".pth." in name for name in written):
            moment = "saving a checkpoint"
        else:
            moment = "writing another file" if written else "training and the rest"
        killer.moments[moment] += 1


def search_until_done(
    killer: Killer, command: list, kill_within: float | None = None
) -> tuple[list[dict], float]:
    """Kill a search while it builds its index, if it is slow enough, and search again.

    Returns:
        The results, and the seconds of the last search.
    """
    if kill_within:
        status, output, _ = killer.run(*command, within=kill_within)
        assert status in (0, -9), output
        killer.moments["building the index"] += status == -9
    status, output, seconds = killer.run(*command)
    assert status == 0, output
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")], seconds
