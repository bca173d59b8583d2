"""Stress tests: killed processes, bad input, hostile names, a million rows, generated captions.

    python -m tests.stress.faults                   # half an hour on two cores
    python -m tests.stress.faults kills --kills 5   # one part

The scripts run in temporary folders. The exit status is 1 if anything was lost
or corrupted. `pytest` does not collect these tests.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path, PurePosixPath

from benchmarks.timing import machine
from tests.compare import differences
from tests.stress.bad_input import (
    BAD_NAMES,
    GOOD_NAMES,
    READ,
    REJECTED,
    other_files,
    write_odd_dataset,
)
from tests.stress.kills import (
    ROOT,
    Killer,
    read_results,
    search_until_done,
    train_until_done,
    write_dataset,
)

TRAIN = ["train.py", "--image-size", "32", "--weights", "none", "--epochs", "3", "--batch-size",
         "4", "--save-every", "0.01", "--device", "cpu"]
ROWS = 1_000_000

# The rows that a part adds to the table, and what was lost or corrupted.
Report = tuple[list[tuple[str, str]], list[str]]


def main() -> int:
    """Run the chosen parts and print a table. Returns 1 if anything was lost or corrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"kills": lambda: check_kills(folder, args.kills, args.seed),
             "input": lambda: check_input(folder), "files": lambda: check_other_files(folder),
             "rows": lambda: check_rows(folder), "generated": check_generated}
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"{', '.join(parts)} (default: all)")
    parser.add_argument("--kills", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the moments of the kills (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.parts) - parts.keys():
        parser.error(f"unknown part: {', '.join(unknown)}")
    table: list[tuple[str, str]] = []
    lost: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(temporary)
        for part in args.parts or parts:
            rows, faults = parts[part]()
            table += rows
            lost += faults
    print(f"\n{machine()}\n")
    width = max(len(name) for name, _ in table)
    for name, value in [*table, ("lost or corrupted", str(len(lost)))]:
        print(f"{name:{width}}  {value}")
    print(*lost, sep="\n")
    return 1 if lost else 0


def log(text: str) -> None:
    """Print a line of progress with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def check_kills(folder: Path, kills: int, seed: int) -> Report:
    """Kill and resume training runs and searches, and compare them with uninterrupted ones."""
    data = folder / "data"
    write_dataset(data)
    killer = Killer(seed)
    command = [*TRAIN, "--data-dir", data]
    log("kills: an uninterrupted run")
    whole = folder / "whole"
    status, output, seconds = killer.run(*command, "--results-dir", whole / "results",
                                         "--cache-dir", whole / "cache")
    assert status == 0, output
    expected = read_results(whole / "results")
    lost, done, runs = [], 0, 0
    search_kills = kills // 5
    while done < kills - search_kills:
        runs += 1
        killed = folder / f"run {runs}"
        done += train_until_done(killer, command, killed, min(5, kills - search_kills - done),
                                 min(0.7 * seconds, 15.0))
        lost += [f"run {runs}: {where}"
                 for where in differences(read_results(killed / "results"), expected)]
        log(f"kills: {done} of {kills - search_kills} in {runs} runs; "
            f"differences: {', '.join(lost) or 'none'}")
        shutil.rmtree(killed)
    search = ["search.py", "a red thing", "--json", "--images", data / "images", "--results-dir",
              whole / "results", "--index-dir"]
    expected_hits, seconds = search_until_done(killer, [*search, folder / "index"])
    assert expected_hits, "the search found nothing"
    log(f"kills: {search_kills} of a search that builds its index")
    for attempt in range(search_kills):
        hits, _ = search_until_done(killer, [*search, folder / f"index {attempt}"], 0.6 * seconds)
        lost += [f"search {attempt}: {where}" for where in differences(hits, expected_hits)]
    moments = ", ".join(f"{count} {moment}" for moment, count in killer.moments.most_common())
    return [("kills survived", f"{killer.moments.total()}: {moments}"),
            ("resumed runs equal to an uninterrupted one", str(runs))], lost


def run_script(*command: object) -> subprocess.CompletedProcess:
    """Run a script of this project."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, errors="replace", timeout=900,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def check_input(folder: Path) -> Report:
    """Run main.py and train.py on images, names and captions of all odd kinds."""
    log("input: images, names and captions of all odd kinds")
    images, annotations, outcomes, bad_captions = write_odd_dataset(folder / "odd")
    results = folder / "odd results"
    data = ["--images", images, "--annotations", annotations, "--image-size", "32",
            "--results-dir", results]
    training = ["--weights", "none", "--epochs", "1", "--batch-size", "8", "--device", "cpu",
                "--cache-dir", folder / "odd cache"]
    runs = {"train.py": (run_script("train.py", *data, *training), 0),
            "train.py --strict": (run_script("train.py", *data, *training, "--strict"), 1),
            "main.py": (run_script("main.py", *data), 1)}
    lost = [f"{name}: exit status {run.returncode}, not {status}: {run.stderr[-3000:]}"
            for name, (run, status) in runs.items()
            if run.returncode != status or "Traceback" in run.stderr]
    with open(results / "rejected.csv", encoding="utf-8", newline="") as file:
        reported = list(csv.DictReader(file))
    kinds = Counter((row["kind"], row["name"]) for row in reported)
    for name, outcome in outcomes.items():
        name = str(PurePosixPath(name)) if "/" in name else name
        seen = {kind for kind, reported_name in kinds if reported_name == name}
        if outcome == READ:
            wrong = seen & {"images missing", "images unreadable"}
        else:
            wrong = set() if outcome in seen or outcome == REJECTED else {"not reported"}
        lost += [f"{name!r}: {', '.join(wrong)}"] if wrong else []
    rejected = sum(row["kind"] == REJECTED for row in reported)
    expected = bad_captions + sum(outcome == REJECTED for outcome in outcomes.values())
    if rejected != expected:
        lost.append(f"{rejected} rows rejected, not {expected}")
    n_names = len(GOOD_NAMES) + len(BAD_NAMES)
    return [("odd images and captions", str(len(outcomes) - n_names - 24 + bad_captions)),
            ("hostile names", str(n_names))], lost


def check_other_files(folder: Path) -> Report:
    """Run main.py on files that are not caption files: one message, exit status 2."""
    lost, files = [], other_files()
    for name, content in files.items():
        log(f"other files: {name}")
        (folder / name).write_bytes(content)
        run = run_script("main.py", "--images", folder, "--annotations", folder / name)
        if run.returncode != 2 or "Traceback" in run.stderr or name not in run.stderr:
            lost.append(f"{name}: exit status {run.returncode}: {run.stderr}")
    return [("files that are not caption files", str(len(files)))], lost


def check_rows(folder: Path) -> Report:
    """Read a caption file of a million rows; measure time and memory, and count the captions."""
    log(f"rows: a caption file of {ROWS:,}")
    path = folder / "many.csv"
    with open(path, "w", encoding="utf-8") as file:
        file.write("image_name| comment_number| comment\n")
        for row in range(ROWS):
            file.write(f"{row // 5}.jpg| {row % 5}| A dog number {row} runs over the grass .\n")
    script = ("import resource, sys, time; from pathlib import Path\n"
              "from src.data.captions import read_annotations\n"
              "start = time.perf_counter(); read = read_annotations(Path(sys.argv[1]))\n"
              "kept = sum(len(r.captions) for r in read.records)\n"
              "print(kept, len(read.records), time.perf_counter() - start,\n"
              "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    run = run_script("-c", script, path)
    kept, images, seconds, memory = run.stdout.split() if run.returncode == 0 else "0000"
    lost = [] if (int(kept), int(images)) == (ROWS, ROWS // 5) else [f"a million rows: {run}"]
    memory = int(memory) * (1 if sys.platform == "darwin" else 1024)
    return [("a million rows", f"{float(seconds):.1f} s, peak memory {memory / 1e9:.2f} GB")], lost


def check_generated() -> Report:
    """Run the property tests of the caption reader with 10,000 examples each."""
    log("generated: caption files, some minutes")
    run = run_script("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/data/test_captions.py",
                     "--hypothesis-profile", "nightly", "--hypothesis-show-statistics")
    counts = [int(count) for count in re.findall(r"- (\d+) passing", run.stdout)]
    lost = [] if run.returncode == 0 and sum(counts) >= 20_000 else [run.stdout[-3000:]]
    return [("generated caption files", f"{sum(counts):,}")], lost


if __name__ == "__main__":
    sys.exit(main())
