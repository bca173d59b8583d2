"""What a run survives: kills, bad input, hostile names, damaged caption files.

    python -m tests.stress.faults                   # about half an hour on two cores
    python -m tests.stress.faults kills --kills 5   # one part of it

Real runs of the scripts in temporary folders. Prints what it does and a table at the end; exit
status 1 where anything was lost or corrupted.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path, PurePosixPath

from benchmarks.timing import machine
from tests.stress.bad_input import BAD_NAMES, GOOD_NAMES, READ, REJECTED, other_files, write_world
from tests.stress.kills import (
    ROOT,
    Killer,
    differences,
    search_until_done,
    train_until_done,
    what_is_left,
    write_tiny_world,
)

TRAIN = ["train.py", "--image-size", "32", "--weights", "none", "--epochs", "3", "--batch-size",
         "4", "--save-every", "0.01", "--device", "cpu"]
ROWS = 1_000_000


def main() -> int:
    """Run all of it, or some parts; returns 1 where anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"kills": lambda: check_kills(folder, args.kills, args.seed),
             "input": lambda: check_input(folder), "files": lambda: check_other_files(folder),
             "rows": lambda: check_rows(folder), "generated": check_generated}
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--kills", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.parts) - parts.keys():
        parser.error(f"no such part: {', '.join(unknown)}")
    table: list[tuple[str, str]] = []
    lost: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(temporary)
        for part in args.parts or parts:
            rows, found = parts[part]()
            table += rows
            lost += found
    print(f"\n{machine()}\n")
    width = max(len(name) for name, _ in table)
    for name, value in [*table, ("lost or corrupted", str(len(lost)))]:
        print(f"{name:{width}}  {value}")
    print(*lost, sep="\n")
    return 1 if lost else 0


def say(text: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def check_kills(folder: Path, kills: int, seed: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Runs and searches killed and gone on with, held against undisturbed ones."""
    data = write_tiny_world(folder / "data")
    killer = Killer(seed)
    command = [*TRAIN, "--data-dir", data]
    say("kills: an undisturbed run")
    whole = folder / "whole"
    status, output, seconds = killer.run(*command, "--results-dir", whole / "results",
                                         "--cache-dir", whole / "cache")
    assert status == 0, output
    expected = what_is_left(whole / "results")
    lost, done, runs = [], 0, 0
    search_kills = kills // 5
    while done < kills - search_kills:
        runs += 1
        ended = folder / f"run {runs}"
        done += train_until_done(killer, command, ended, min(5, kills - search_kills - done),
                                 min(0.7 * seconds, 15.0))
        found = differences(what_is_left(ended / "results"), expected)
        lost += [f"run {runs}: {where}" for where in found]
        say(f"kills: {done} of {kills - search_kills} in {runs} runs; "
            f"differences: {', '.join(lost) or 'none'}")
        subprocess.run(["rm", "-r", str(ended)], check=True)
    search = ["search.py", "a red thing", "--json", "--images", data / "images", "--results-dir",
              whole / "results", "--index-dir"]
    right, seconds = search_until_done(killer, [*search, folder / "index"])
    assert right, "a search that finds nothing"
    say(f"kills: {search_kills} of a search that builds its index")
    for attempt in range(search_kills):
        answer, _ = search_until_done(killer, [*search, folder / f"index {attempt}"], 0.6 * seconds)
        lost += [f"search {attempt}: {where}" for where in differences(answer, right)]
    moments = ", ".join(f"{count} {moment}" for moment, count in killer.moments.most_common())
    return [("kills survived", f"{killer.moments.total()}: {moments}"),
            ("killed runs gone on with, held against an undisturbed one", str(runs))], lost


def run_script(*command: object) -> subprocess.CompletedProcess:
    """Run a script; what it printed and its exit status."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True, errors="replace", timeout=900,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def check_input(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Photos, names and captions of every odd kind, in front of main.py and train.py."""
    say("input: photos, names and captions of every odd kind")
    images, annotations, outcomes, bad_captions = write_world(folder / "odd")
    place = ["--images", images, "--annotations", annotations, "--image-size", "32",
             "--results-dir", folder / "odd results"]
    trained = run_script(*TRAIN[:1], *place, "--weights", "none", "--epochs", "1", "--batch-size",
                         "8", "--device", "cpu", "--cache-dir", folder / "odd cache")
    strict = run_script(*TRAIN[:1], *place, "--weights", "none", "--strict", "--device", "cpu",
                        "--cache-dir", folder / "odd cache")
    looked = run_script("main.py", *place)
    lost = [f"{name}: exit status {ran.returncode}, not {status}: {ran.stderr[-500:]}"
            for name, ran, status in (("train.py", trained, 0), ("train.py --strict", strict, 1),
                                      ("main.py", looked, 1)) if ran.returncode != status]
    lost += [f"a traceback: {ran.stderr}" for ran in (trained, strict, looked)
             if "Traceback" in ran.stderr]
    with open(folder / "odd results" / "rejected.csv", encoding="utf-8", newline="") as file:
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
    return [("bad photos and captions tried", str(len(outcomes) - n_names - 24 + bad_captions)),
            ("hostile names tried", str(n_names))], lost


def check_other_files(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """Files that are no caption file: one message, exit status 2, no traceback."""
    lost, files = [], other_files()
    for name, content in files.items():
        say(f"other files: {name}")
        (folder / name).write_bytes(content)
        ran = run_script("main.py", "--images", folder,
                         "--annotations", folder / name)
        if ran.returncode != 2 or "Traceback" in ran.stderr or name not in ran.stderr:
            lost.append(f"{name}: exit status {ran.returncode}: {ran.stderr}")
    return [("other files in place of captions tried", str(len(files)))], lost


def check_rows(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """A caption file of a million rows: its time and memory, and that all are there."""
    say(f"rows: a caption file of {ROWS:,}")
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
    ran = run_script("-c", script, path)
    kept, photos, seconds, memory = ran.stdout.split() if ran.returncode == 0 else "0000"
    lost = [] if (int(kept), int(photos)) == (ROWS, ROWS // 5) else [f"a million rows: {ran}"]
    memory = int(memory) * (1 if sys.platform == "darwin" else 1024)
    return [("a million rows", f"{float(seconds):.1f} s, {memory / 1e9:.2f} GB at most")], lost


def check_generated() -> tuple[list[tuple[str, str]], list[str]]:
    """The tests that generate caption files, with 10,000 examples each."""
    say("generated: caption files, some minutes")
    ran = run_script("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_annotations.py",
                     "-k", "books_balance or any_captions_come_back", "--hypothesis-profile",
                     "nightly", "--hypothesis-show-statistics")
    counts = [int(count) for count in re.findall(r"- (\d+) passing", ran.stdout)]
    lost = [] if ran.returncode == 0 and sum(counts) >= 20_000 else [ran.stdout[-3000:]]
    return [("caption files generated", f"{sum(counts):,}")], lost


if __name__ == "__main__":
    sys.exit(main())
