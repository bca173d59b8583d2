"""Data from a stranger, through rooms and scripts: what can be read is, the rest is named."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

import main as main_script
import train
from src.data.dataset import Flickr30kDataset
from src.data.images import load_resized
from src.data.pixel_store import PixelStore
from src.data.prepare import HARMLESS, check_strict, collect_issues, write_rejected
from src.data.source import DataSource, scan_dataset
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError, printable, run_script
from tests.stress.bad_input import (
    BAD_NAMES,
    READ,
    REJECTED,
    UNREADABLE,
    other_files,
    write_odd_dataset,
)

ROOT = Path(__file__).parents[2]


class World:
    """The odd world, read once."""

    def __init__(self, folder: Path) -> None:
        self.images, self.annotations, outcomes, self.bad_captions = write_odd_dataset(folder)
        self.outcomes = {str(PurePosixPath(name)) if "/" in name else name: outcome
                         for name, outcome in outcomes.items()}
        self.source = scan_dataset(self.images, self.annotations, 0.2, seed=0)
        self.names = [record.name for records in self.source.splits.values() for record in records]
        self.store = PixelStore.build(folder / "cache", self.images, self.names, 34)
        captions = [caption for record in self.source.splits["train"]
                    for caption in record.captions]
        tokenizer = Tokenizer.from_captions(captions, min_freq=2, context_length=8)
        self.sets = [Flickr30kDataset(self.source.splits[split], self.store, tokenizer)
                     for split in ("train", "val")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made once; no test changes it."""
    return World(tmp_path_factory.mktemp("world"))


def test_every_photo_and_name_ends_where_it_must(world: World) -> None:
    """Each is read, missing, unreadable or rejected as its maker says, and by one kind alone."""
    found = {kind: Counter(remark.name for remark in remarks)
             for kind, remarks in collect_issues(world.source, world.store).items()}
    for name, outcome in world.outcomes.items():
        assert (name in world.store.rows) == (outcome == READ), name
    for kind in ("images missing", "images unreadable"):
        assert found[kind] == Counter(
            name for name, outcome in world.outcomes.items() if outcome == kind)
    rejected = [name for name, outcome in world.outcomes.items() if outcome == REJECTED]
    assert len(rejected) > 12
    assert found[REJECTED].total() == len(rejected) + world.bad_captions
    assert found[REJECTED]["plain 0.jpg"] == world.bad_captions


def test_no_caption_is_lost(world: World) -> None:
    """Rows of the file = captions of records + rejected ones = sentences of the JSON."""
    read = world.source.annotations
    sentences = sum(len(photo["sentences"])
                    for photo in json.loads(world.annotations.read_text())["images"])
    kept = sum(len(record.captions) for record in read.records)
    assert read.rows == kept + len(read.rejected) == sentences
    assert sum(map(len, world.sets)) == sum(len(r.captions) for r in read.records
                                            if world.outcomes[r.name] == READ)


def test_no_photo_shows_another_file(world: World) -> None:
    """Rows hold their own photo's pixels, and none holds those of the file outside."""
    private = load_resized(world.images.parent / "private.png", 34)
    for name, row in world.store.rows.items():
        if name != "30000 wide.jpg":
            np.testing.assert_array_equal(world.store.pixels[row],
                                          load_resized(world.images / name, 34))
    assert not (world.store.pixels == private).all(axis=(1, 2, 3)).any()
    assert Path(world.images.parent / "ran").exists() is (ROOT / "ran").exists() is False


def test_the_report_names_each(world: World, tmp_path: Path) -> None:
    """A CSV with kind, where, name, reason and text of every remark; its numbers on one line."""
    path = tmp_path / "rejected.csv"
    line = write_rejected(path, world.source, world.store, *world.sets)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    remarks = collect_issues(world.source, world.store, *world.sets)
    assert Counter(row["kind"] for row in rows) == {
        kind: len(found) for kind, found in remarks.items() if found}
    assert all(row["where"] and row["reason"] for row in rows)
    assert [row["name"] for row in rows if row["kind"] == UNREADABLE] == list(world.store.failed)
    assert len(remarks["captions repeated"]) == 1 and remarks["caption rows fixed"]
    assert {r.text for r in remarks["captions without a known word"]} >= {"...", "qqqq zzzz"}
    for kind, found in remarks.items():
        assert f"{len(found):,} {kind}" in line
    assert "\n" not in line and str(path) in line


def source_with(world: World, **changes: list) -> DataSource:
    """The world's source as if nothing were wrong with it but `changes`."""
    clean = {"missing": [], "rejected": []} | changes
    read = world.source.annotations
    return DataSource(world.images, type(read)(read.format, read.records, read.rows, read.fixed,
                                           clean["rejected"], read.repeated),
                  world.source.splits, clean["missing"], [])


def test_strict_allows_what_is_used_all_the_same(world: World) -> None:
    """Mended, repeated and wordless captions are no error; rejected, missing, unreadable are."""
    harmless = collect_issues(source_with(world), None, *world.sets)
    assert {kind for kind, found in harmless.items() if found} == HARMLESS
    check_strict(harmless)
    remark = world.source.missing[0]
    for remarks in (collect_issues(source_with(world, missing=[remark])),
                    collect_issues(source_with(world, rejected=[remark])),
                    collect_issues(source_with(world), world.store)):
        with pytest.raises(UserError, match="--strict") as raised:
            check_strict(remarks)
        assert raised.value.status == 1


def flags(world: World, tmp_path: Path) -> list[str]:
    """Where the world is."""
    return ["--images", str(world.images), "--annotations", str(world.annotations),
            "--results-dir", str(tmp_path / "results"), "--val-fraction", "0.2",
            "--image-size", "32"]


def test_main_names_what_is_wrong(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Exit status 1 and each kind with its count; with --strict every unreadable photo too; and no
    name steers the terminal."""
    assert main_script.main(flags(world, tmp_path)) == 1
    out = capsys.readouterr().out
    read = world.source.annotations
    assert f"{len(read.rejected)} caption rows were rejected" in out
    assert f"{len(world.source.missing)} photos are missing" in out
    assert main_script.main([*flags(world, tmp_path), "--strict"]) == 1
    strict = capsys.readouterr().out
    assert f"{len(world.store.rows)} of {len(world.names)} can be read" in strict
    for name in world.store.failed:
        assert name in strict
    assert all(c.isprintable() or c == "\n" for c in out + strict)


def test_training_goes_on_with_the_rest(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One epoch over all that can be read; with --strict an error with exit status 1 instead."""
    small = ["--cache-dir", str(tmp_path / "cache"), "--weights", "none", "--batch-size", "8",
             "--embed-dim", "16", "--token-dim", "16", "--epochs", "1", "--device", "cpu"]
    assert train.main([*flags(world, tmp_path), *small]) == 0
    assert (tmp_path / "results" / "rejected.csv").stat().st_size > 1000
    assert "images unreadable" in capsys.readouterr().out
    with pytest.raises(UserError, match="--strict") as raised:
        train.main([*flags(world, tmp_path / "strict"), *small, "--strict"])
    assert raised.value.status == 1


@pytest.mark.parametrize("name", other_files())
def test_other_files_are_refused(world: World, tmp_path: Path, name: str) -> None:
    """Not a caption file: one message that names it."""
    (tmp_path / name).write_bytes(other_files()[name])
    with pytest.raises(UserError, match=name):
        scan_dataset(world.images, tmp_path / name, 0.1, seed=0)


@pytest.mark.parametrize("text", [*BAD_NAMES, "фото", "\x1b[2J", "\ud800", "\u202e", "\x9b"])
def test_printable_text_steers_no_terminal(text: str) -> None:
    """No control, no direction mark, nothing that cannot be encoded; other text as it is."""
    shown = printable(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert shown.encode().decode() == shown
    assert shown == text or not text.isprintable()


def run(code: str, *pipe: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script's lines under run_script, its output into `pipe`."""
    script = f"from src.utils.errors import *\ndef main():\n    {code}\nrun_script(main)"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
                          env={**os.environ, **environment}) as process:
        if pipe:
            process.stdout.close()
            process.stdout = None
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_a_script_ends_with_a_message_and_a_status() -> None:
    """0 or its own; a UserError's 2, or what it says; never a traceback for them."""
    assert run("return 0").returncode == 0
    ended = run("return 3")
    assert (ended.returncode, ended.stderr) == (3, b"")
    ended = run("raise UserError('no \\x1b[2J file')")
    assert (ended.returncode, ended.stderr) == (2, b"error: no \\x1b[2J file\n")
    ended = run("raise UserError('strict', status=1)")
    assert (ended.returncode, ended.stderr) == (1, b"error: strict\n")
    assert b"Traceback" in run("return 1 / 0").stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    """`python search.py … | head` ends without a traceback."""
    ended = run("print('x' * 10**6); return 0", "closed")
    assert ended.returncode == 141 and ended.stderr == b""


def test_any_name_is_printed_on_any_screen() -> None:
    """Names that are not UTF-8, and screens that have no such letters, are no error."""
    ended = run("print('\\udcff \\u0444'); return 0", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stdout) == (0, b"\\udcff \\u0444\n")


@pytest.mark.parametrize("status", [0, 1, 2])
def test_run_script_exits(status: int) -> None:
    """The exit status is main's."""
    with pytest.raises(SystemExit) as raised:
        run_script(lambda: status)
    assert raised.value.code == status
