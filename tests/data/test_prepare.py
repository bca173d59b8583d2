"""Data of every odd kind, through modules and scripts: what can be read is, the rest is listed."""

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

import evaluate
import main as main_script
import train
from src.data.captions import Annotations, DataIssue, ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.images import load_resized
from src.data.pixel_store import PixelStore
from src.data.prepare import (
    HARMLESS,
    check_strict,
    collect_issues,
    find_warnings,
    write_rejected,
)
from src.data.source import DataSource, scan_dataset
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError, counted, printable
from src.utils.script import run_script
from tests.stress.bad_input import (
    BAD_NAMES,
    READ,
    REJECTED,
    UNREADABLE,
    other_files,
    write_odd_dataset,
)
from tests.tiny_data import make_tiny_data

ROOT = Path(__file__).parents[2]
CASES = ROOT.parent / "shared" / "cases"


class OddData:
    """The data of tests/stress/bad_input.py, read once."""

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
def odd(tmp_path_factory: pytest.TempPathFactory) -> OddData:
    """Made once; no test changes it."""
    return OddData(tmp_path_factory.mktemp("odd"))


def test_every_image_and_name_has_the_expected_outcome(odd: OddData) -> None:
    """Each is read, missing, unreadable or rejected as expected, and of one kind only."""
    found = {kind: Counter(issue.name for issue in issues)
             for kind, issues in collect_issues(odd.source, odd.store).items()}
    for name, outcome in odd.outcomes.items():
        assert (name in odd.store.rows) == (outcome == READ), name
    for kind in ("images missing", "images unreadable"):
        assert found[kind] == Counter(
            name for name, outcome in odd.outcomes.items() if outcome == kind)
    rejected = [name for name, outcome in odd.outcomes.items() if outcome == REJECTED]
    assert len(rejected) > 12
    assert found[REJECTED].total() == len(rejected) + odd.bad_captions
    assert found[REJECTED]["plain 0.jpg"] == odd.bad_captions


def test_no_caption_is_lost(odd: OddData) -> None:
    """Rows of the file = captions of records + rejected ones = sentences of the JSON."""
    read = odd.source.annotations
    sentences = sum(len(photo["sentences"])
                    for photo in json.loads(odd.annotations.read_text())["images"])
    kept = sum(len(record.captions) for record in read.records)
    assert read.rows == kept + len(read.rejected) == sentences
    assert sum(map(len, odd.sets)) == sum(len(r.captions) for r in read.records
                                            if odd.outcomes[r.name] == READ)


def test_no_image_has_the_pixels_of_another_file(odd: OddData) -> None:
    """Rows have the pixels of their own image, and none has those of the file outside."""
    private = load_resized(odd.images.parent / "private.png", 34)
    for name, row in odd.store.rows.items():
        if name != "30000 wide.jpg":
            np.testing.assert_array_equal(odd.store.pixels[row],
                                          load_resized(odd.images / name, 34))
    assert not (odd.store.pixels == private).all(axis=(1, 2, 3)).any()
    assert Path(odd.images.parent / "ran").exists() is (ROOT / "ran").exists() is False


def test_the_report_names_each(odd: OddData, tmp_path: Path) -> None:
    """A CSV with kind, where, name, reason and text of every issue; its counts on one line."""
    path = tmp_path / "rejected.csv"
    line = write_rejected(path, odd.source, odd.store, *odd.sets)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    issues = collect_issues(odd.source, odd.store, *odd.sets)
    assert Counter(row["kind"] for row in rows) == {
        kind: len(found) for kind, found in issues.items() if found}
    assert all(row["where"] and row["reason"] for row in rows)
    assert [row["name"] for row in rows if row["kind"] == UNREADABLE] == list(odd.store.failed)
    assert len(issues["captions repeated"]) == 1 and issues["caption rows repaired"]
    assert {r.text for r in issues["captions without a known word"]} >= {"...", "qqqq zzzz"}
    for kind, found in issues.items():
        assert not found or counted(len(found), kind) in line
    assert "\n" not in line and str(path) in line


def source_with(odd: OddData, **changes: list) -> DataSource:
    """The source as if nothing were wrong with it except `changes`."""
    clean = {"missing": [], "rejected": []} | changes
    read = odd.source.annotations
    return DataSource(odd.images, type(read)(read.format, read.records, read.rows, read.fixed,
                                           clean["rejected"], read.repeated),
                  odd.source.splits, clean["missing"], [])


def test_strict_allows_what_is_used_anyway(odd: OddData) -> None:
    """Fixed, repeated and wordless captions are no error; rejected, missing, unreadable are."""
    harmless = collect_issues(source_with(odd), None, *odd.sets)
    assert {kind for kind, found in harmless.items() if found} == HARMLESS - {
        "images found by another name", "images in no split file"}
    check_strict(harmless)
    issue = odd.source.missing[0]
    for issues in (collect_issues(source_with(odd, missing=[issue])),
                    collect_issues(source_with(odd, rejected=[issue])),
                    collect_issues(source_with(odd), odd.store)):
        with pytest.raises(UserError, match="--strict") as raised:
            check_strict(issues)
        assert raised.value.status == 1


def flags(odd: OddData, tmp_path: Path) -> list[str]:
    """Where the data is."""
    return ["--images", str(odd.images), "--annotations", str(odd.annotations),
            "--results-dir", str(tmp_path / "results"), "--val-fraction", "0.2",
            "--image-size", "32"]


def test_main_names_what_is_wrong(
    odd: OddData, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Exit status 1 and each kind with its count; with --strict unreadable images too, ten lines at
    most; and no name controls the terminal."""
    assert main_script.main(flags(odd, tmp_path)) == 1
    out = capsys.readouterr().out
    read = odd.source.annotations
    assert f"{len(read.rejected)} caption rows rejected" in out
    assert f"{len(odd.source.missing)} images missing from" in out
    assert main_script.main([*flags(odd, tmp_path), "--strict"]) == 1
    strict = capsys.readouterr().out
    assert f"{len(odd.store.rows)} of {len(odd.names)} images can be read" in strict
    wrong = strict.split("\nwrong:\n")[1].split("\nwarnings:")[0].splitlines()
    assert len(wrong) == 12 and wrong[10].startswith("  and ") and "rejected.csv" in wrong[11]
    assert any(name in line for name in odd.store.failed for line in wrong[:10])
    assert all(c.isprintable() or c == "\n" for c in out + strict)


def test_training_uses_the_rest(
    odd: OddData, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One epoch over all that can be read; with --strict an error with exit status 1 instead."""
    small = ["--cache-dir", str(tmp_path / "cache"), "--weights", "none", "--batch-size", "8",
             "--embed-dim", "16", "--token-dim", "16", "--epochs", "1", "--device", "cpu"]
    assert train.main([*flags(odd, tmp_path), *small]) == 0
    assert (tmp_path / "results" / "rejected.csv").stat().st_size > 1000
    assert "images unreadable" in capsys.readouterr().out
    with pytest.raises(UserError, match="--strict") as raised:
        train.main([*flags(odd, tmp_path / "strict"), *small, "--strict"])
    assert raised.value.status == 1


SMALL_MODEL = ["--weights", "none", "--batch-size", "4", "--embed-dim", "16", "--token-dim", "16",
               "--epochs", "1", "--device", "cpu", "--image-size", "32"]


def write_dataset(folder: Path, rows: list[str], header: str, n_images: int = 12) -> list[str]:
    """Write images 0.png, 1.png, ... and a caption file. Returns the flags for it."""
    make_tiny_data(folder / "tiny", n_images)
    images = folder / "images"
    images.mkdir(parents=True)
    for i, path in enumerate(sorted((folder / "tiny" / "images").iterdir())):
        path.rename(images / f"{i}.png")
    (folder / "captions.csv").write_text("\n".join([header, *rows]))
    return ["--images", str(images), "--annotations", str(folder / "captions.csv"),
            "--results-dir", str(folder / "results")]


def test_a_file_without_validation_images(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The message names the file's split and two cures, which both work; so does evaluate.py."""
    rows = [f"{i}.png,a dog number {i},{'test' if i > 8 else 'train'}" for i in range(12)]
    data = write_dataset(tmp_path, rows, "image,caption,split")
    with pytest.raises(UserError, match="train 9, val 0, test 3.*--val-fraction 0.1"):
        train.main([*data, *SMALL_MODEL])
    assert main_script.main([*data, "--min-freq", "1", "--image-size", "32"]) == 1
    assert "train 9, val 0, test 3" in capsys.readouterr().out
    assert train.main([*data, *SMALL_MODEL, "--val-fraction", "0.3"]) == 0
    assert evaluate.main([*data, "--device", "cpu"]) == 0
    assert "val: 3 images" in capsys.readouterr().out
    assert train.main([*data, *SMALL_MODEL, "--val-fraction", "0"]) == 0
    assert "last epoch 1, without validation" in capsys.readouterr().out
    assert evaluate.main([*data, "--device", "cpu", "--split", "test"]) == 0
    with pytest.raises(UserError, match="no val images"):
        evaluate.main([*data, "--device", "cpu"])


def test_training_without_validation_resumes(tmp_path: Path) -> None:
    """A run without validation continues as an uninterrupted one, also on frozen features."""
    rows = [f"{i}.png,a dog number {i}" for i in range(12)]
    data = write_dataset(tmp_path, rows, "image,caption")
    flags = [*data, *SMALL_MODEL, "--val-fraction", "0", "--head-epochs", "1"]
    assert train.main(flags) == 0
    again = ["--resume", "--results-dir", str(tmp_path / "results"), "--epochs", "2"]
    assert train.main(again) == 0
    log = (tmp_path / "results" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["metrics"] for line in log] == [{}, {}]


def test_the_data_flags_of_training_are_the_defaults_of_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Several caption files, columns and split files are stored in the checkpoint."""
    rows = [f"{i}.png,x,a dog number {i}" for i in range(12)]
    data = write_dataset(tmp_path, rows[:6], "foto,caption,alt")
    (tmp_path / "more.csv").write_text("\n".join(["foto,caption,alt", *rows[6:]]))
    lists = {"train.txt": range(7), "dev.txt": range(7, 11)}
    for name, numbers in lists.items():
        (tmp_path / name).write_text("\n".join(f"{i}.png" for i in numbers))
    assert train.main([
        *data, "--annotations", str(tmp_path / "more.csv"), *SMALL_MODEL, "--image-column", "foto",
        "--caption-column", "alt", "--split-files", *(str(tmp_path / name) for name in lists)]) == 0
    out = capsys.readouterr().out
    assert "train: 7 images" in out and "validation: 4 images" in out
    assert "1 image in no split file" in out
    results = ["--results-dir", str(tmp_path / "results"), "--device", "cpu"]
    assert evaluate.main(results) == 0
    assert "val: 4 images, 4 captions" in capsys.readouterr().out
    assert train.main(["--resume", *results, "--caption-column", "alt", "--epochs", "2"]) == 0
    with pytest.raises(UserError, match="caption-column was .*alt.* is .*caption"):
        train.main(["--resume", *results, "--caption-column", "caption"])


@pytest.mark.parametrize(("caption", "flags_", "warning"), [
    ("{0}a {0}b {0}c", [], "unknown to the vocabulary"),
    ("a b c d e f g h", ["--context-length", "7"],
     "100% of the captions are cut to 7 words, the longest has 8: --context-length 8"),
    ("{0}.png", [], "look like file names"), ("a dog", [], ""),
])
def test_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, caption: str,
    flags_: list[str], warning: str,
) -> None:
    """main.py and train.py warn of unknown words, cut captions and file names for captions."""
    monkeypatch.setattr("src.data.prepare.MIN_IMAGES", 4)  # no warning of few images
    rows = [f"{i}.png,{caption.format(i)}" for i in range(12)]
    data = [*write_dataset(tmp_path, rows, "image,caption"), "--val-fraction", "0.3"]
    main_script.main([*data, *flags_, "--image-size", "32"])
    out = capsys.readouterr().out
    assert warning in out and ("all is well" in out) == (not warning)
    assert train.main([*data, *flags_, *SMALL_MODEL, "--min-freq", "2"]) == 0
    err = capsys.readouterr().err
    assert (f"warning: {warning}" in err or warning in err) and bool(warning) == ("warning" in err)


@pytest.mark.parametrize(("n_images", "expected"), [
    (0, ""), (4, "only 4 images moves in steps of 25 points"), (1, "only 1 image moves"),
    (49, "only 49 images"), (50, "")])
def test_few_images_are_a_warning(n_images: int, expected: str) -> None:
    """Recall over few images is coarse; without validation images there is no recall."""
    records = [ImageRecord(f"{i}.jpg", ("a dog",)) for i in range(n_images)]
    warnings = find_warnings(source_with_issues(), [records[:2], records],
                             Tokenizer.from_captions(["a dog"], 1, 8))
    assert [expected in warning for warning in warnings] == ([True] if expected else [])


@pytest.mark.skipif(not CASES.exists(), reason="the cases are not here")
@pytest.mark.parametrize(("path", "message"), [
    ("train-12/train_test.csv", "has no validation images (train 2, val 0, test 1)"),
    ("train-17/long.csv", "100% of the captions are cut to 32 words, the longest has 60"),
    ("train-08/chinese.token", "a.jpg"), ("train-07/hindi.csv", "a.jpg"),
])
def test_reported_files_in_main(
    tmp_path: Path, capsys: pytest.CaptureFixture, path: str, message: str
) -> None:
    """main.py says what is wrong with files of public reports, and finds no unknown words."""
    make_tiny_data(tmp_path, 3)
    for name, image in zip("abc", sorted((tmp_path / "images").iterdir()), strict=True):
        image.rename(tmp_path / "images" / f"{name}.jpg")
    main_script.main(["--images", str(tmp_path / "images"), "--annotations", str(CASES / path),
                      "--image-size", "32", "--min-freq", "1", "--val-fraction", "0.1"]
                     if "12" not in path else
                     ["--images", str(tmp_path / "images"), "--annotations", str(CASES / path),
                      "--image-size", "32", "--min-freq", "1"])
    out = capsys.readouterr().out
    assert message in out or message == "a.jpg" and "unknown: 0.00 % of the words of train" in out


@pytest.mark.parametrize("name", other_files())
def test_other_files_are_refused(odd: OddData, tmp_path: Path, name: str) -> None:
    """Not a caption file: one message that names it."""
    (tmp_path / name).write_bytes(other_files()[name])
    with pytest.raises(UserError, match=name):
        scan_dataset(odd.images, tmp_path / name, 0.1, seed=0)


@pytest.mark.parametrize("text", [*BAD_NAMES, "фото", "\x1b[2J", "\ud800", "\u202e", "\x9b"])
def test_printable_text_controls_no_terminal(text: str) -> None:
    """No control or direction mark, nothing that cannot be encoded; other text is unchanged."""
    shown = printable(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert shown.encode().decode() == shown
    assert shown == text or not text.isprintable()


def run(code: str, *pipe: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a line under run_script, with a closed output if `pipe` is given."""
    script = ("from src.utils.errors import *\nfrom src.utils.script import run_script\n"
              f"def main():\n    {code}\nrun_script(main)")
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
                          env={**os.environ, **environment}) as process:
        if pipe:
            process.stdout.close()
            process.stdout = None
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def test_a_script_ends_with_a_message_and_a_status() -> None:
    """0 or its own; 2 or its own status for a UserError; without a traceback."""
    assert run("return 0").returncode == 0
    ended = run("return 3")
    assert (ended.returncode, ended.stderr) == (3, b"")
    ended = run("raise UserError('no \\x1b[2J file')")
    assert (ended.returncode, ended.stderr) == (2, b"error: no \\x1b[2J file\n")
    ended = run("raise UserError('strict', status=1)")
    assert (ended.returncode, ended.stderr) == (1, b"error: strict\n")
    assert b"Traceback" in run("return 1 / 0").stderr


def test_a_closed_pipe_is_no_error() -> None:
    """`python search.py ... | head` ends without a traceback."""
    ended = run("print('x' * 10**6); return 0", "closed")
    assert ended.returncode == 141 and ended.stderr == b""


def test_any_name_is_printed_with_any_encoding() -> None:
    """Names that are not UTF-8, and encodings that lack a letter, are no error."""
    ended = run("print('\\udcff \\u0444'); return 0", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stdout) == (0, b"\\udcff \\u0444\n")


@pytest.mark.parametrize("status", [0, 1, 2])
def test_run_script_exits(status: int) -> None:
    """The exit status is main's."""
    with pytest.raises(SystemExit) as raised:
        run_script(lambda: status)
    assert raised.value.code == status


def source_with_issues() -> DataSource:
    """Return a source with an issue of each kind."""
    fixed = [DataIssue("line 4", "a.jpg", "the second | was missing", "a.jpg| 4   A dog")]
    rejected = [DataIssue("line 7", "b.jpg", "empty caption"),
                DataIssue("line 9", "", "not a row", 'quote " comma , caf\udce9 狗\nline')]
    read = Annotations("results.csv", [], 1234, fixed, rejected)
    missing = [DataIssue("images", "gone.jpg", "no such image")]
    return DataSource(Path("images"), read, {}, missing, [])


def test_rejected_csv_has_a_row_per_issue(tmp_path):
    """The CSV file reads back to the issues, and the summary counts each kind."""
    store = PixelStore(np.zeros((0, 2, 2, 3), np.uint8), {}, {"bad.jpg": "truncated"})
    path = tmp_path / "rejected.csv"
    summary = write_rejected(path, source_with_issues(), store)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["kind", "where", "name", "reason", "text"],
        ["caption rows repaired", "line 4", "a.jpg", "the second | was missing",
         "a.jpg| 4   A dog"],
        ["caption rows rejected", "line 7", "b.jpg", "empty caption", ""],
        ["caption rows rejected", "line 9", "", "not a row",
         'quote " comma , caf\\udce9 狗\nline'],
        ["images missing", "images", "gone.jpg", "no such image", ""],
        ["images unreadable", "images", "bad.jpg", "truncated", ""],
    ]
    for part in ("1,234 captions", "1 caption row repaired", "2 caption rows rejected",
                 "1 image missing", "1 image unreadable", str(path)):
        assert part in summary


def test_input_without_issues_is_reported_so(tmp_path):
    """Without issues the CSV file has only its header, and the summary counts the captions."""
    source = DataSource(Path("images"), Annotations("results.csv", [], 5), {}, [], [])
    summary = write_rejected(tmp_path / "rejected.csv", source)
    assert summary == "input: 5 captions; nothing rejected"
    assert (tmp_path / "rejected.csv").read_text().splitlines() == ["kind,where,name,reason,text"]
