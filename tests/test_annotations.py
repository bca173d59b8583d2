"""Caption files: every format gives the same records, and the books balance."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.annotations import Annotations, ImageRecord, read_annotations
from src.errors import UserError

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "annotation_samples"
WORLD = [
    ("10.jpg", ["A dog , brown , runs .", 'A " big " dog', "Dogs", "NA", "It 's | piped , too ."]),
    ("2.jpg", ["null", "Un été à l' ombre", "a", "two  spaces", "Ends with a quote \""]),
    ("x y.png", ["one", "two", "three", "four", "five"]),
]
SPLITS = {"10.jpg": "train", "2.jpg": "val", "x y.png": "test"}


def pipes(sep: str = "| ", header: bool = True) -> str:
    """Kaggle's Flickr30k."""
    lines = [f"image_name{sep}comment_number{sep}comment"] if header else []
    return "\n".join(lines + [f"{name}{sep}{i}{sep}{caption}" for name, captions in WORLD
                              for i, caption in enumerate(captions)])


def token() -> str:
    """The original Flickr8k and Flickr30k."""
    return "\n".join(f"{name}#{i}\t{caption}" for name, captions in WORLD
                     for i, caption in enumerate(captions))


def commas(header: bool = True) -> str:
    """Kaggle's Flickr8k."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    rows = [(name, caption) for name, captions in WORLD for caption in captions]
    table.writerows([("image", "caption")] * header + rows)
    return text.getvalue()


def hugging_face(split: bool = True) -> str:
    """One photo a row, captions as JSON."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    table.writerow(["raw", "sentids", "split", "filename", "img_id"])
    for i, (name, captions) in enumerate(WORLD):
        table.writerow([json.dumps(captions), "[]", SPLITS[name] if split else "", name, i])
    return text.getvalue()


def karpathy() -> str:
    """Karpathy's JSON."""
    return json.dumps({"dataset": "flickr30k", "images": [
        {"filename": name, "split": SPLITS[name], "sentences": [{"raw": c} for c in captions]}
        for name, captions in WORLD]})


LAYOUTS = {
    "results.csv": pipes(), "no header": pipes(header=False), "no spaces": pipes("|"),
    "token": token(), "captions.txt": commas(), "captions.txt, no header": commas(header=False),
    "hugging face": hugging_face(), "hugging face, no split": hugging_face(split=False),
    "karpathy": karpathy(),
}


def read(tmp_path: Path, content: str | bytes) -> Annotations:
    """Read a caption file with that content, under a name that says nothing."""
    path = tmp_path / "captions"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str)
                     else content)
    return read_annotations(path)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_format_gives_the_same_records(
    tmp_path: Path, layout: str, newline: str, bom: str, end: str
) -> None:
    """Line ends, a BOM, the last newline and the layout change nothing about the captions."""
    content = bom + (LAYOUTS[layout].rstrip("\n") + end).replace("\n", newline)
    read_ = read(tmp_path, content)
    assert [(r.name, list(r.captions)) for r in read_.records] == WORLD
    assert (read_.rows, read_.rejected, read_.recovered) == (15, [], [])
    has_split = layout in ("hugging face", "karpathy")
    assert [r.split for r in read_.records] == [SPLITS[name] if has_split else ""
                                                for name, _ in WORLD]
    assert read_.has_split == has_split


def test_mixed_line_ends(tmp_path: Path) -> None:
    """LF, CRLF and CR in one file still part its rows."""
    ends = ["\n", "\r\n", "\r"]
    mixed = "".join(line + ends[i % 3] for i, line in enumerate(pipes().split("\n")))
    assert [(r.name, list(r.captions)) for r in read(tmp_path, mixed).records] == WORLD


@pytest.mark.parametrize("row", ["2199200615.jpg| 4   A dog runs across the grass .",
                                 "2199200615.jpg|4   A dog runs across the grass ."])
def test_the_broken_row_is_recovered_and_listed(tmp_path: Path, row: str) -> None:
    """Flickr30k's row without its second pipe is read, and reported with its line."""
    read_ = read(tmp_path, f"image_name| comment_number| comment\na.jpg| 0| A cat .\n{row}\n")
    assert read_.records[1] == ImageRecord("2199200615.jpg", ("A dog runs across the grass .",))
    assert [(r.where, r.name) for r in read_.recovered] == [("line 3", "2199200615.jpg")]
    assert (read_.rows, read_.rejected) == (2, [])


@pytest.mark.skipif(not SAMPLES.exists(), reason="the samples are not here")
def test_real_samples_of_one_data_set_agree() -> None:
    """The samples hold what their files show: captions counted, the broken row recovered, and
    the same records from each rearrangement."""
    def records(name: str) -> dict[str, tuple[str, ...]]:
        found = read_annotations(SAMPLES / name)
        assert not found.rejected
        assert len(found.recovered) == (1 if name.startswith("results") and "csv" in name else 0)
        return {record.name: record.captions for record in found.records}

    pipes_ = [records(n) for n in ("results.csv", "results_no_header.csv",
                                   "results_crlf_no_spaces.csv")]
    assert len(pipes_[1]) == 4 and pipes_[1] == pipes_[2]
    # results.csv as cut for the samples lacks the first caption that the others have
    assert sum(map(len, pipes_[0].values())) in (14, 15, 16)
    assert records("results_20130124.token") == records("results_crlf.token") \
        == records("flickr8k_captions.txt")
    assert records("flickr_annotations_30k.csv") == {
        name: captions for name, captions in records("dataset_flickr30k.json").items()
        if name in records("flickr_annotations_30k.csv")}


@pytest.mark.parametrize(("row", "reason"), [
    ("../../etc/passwd| 0| out", "leads out"), ("/etc/passwd| 0| out", "leads out"),
    ("C:/x.jpg| 0| out", "leads out"), ("a\\b.jpg| 0| out", "backslash"),
    (" | 0| nobody", "no photo name"), ("a.jpg| 0|   ", "empty caption"),
    ("a.jpg| 0| \x00\x01", "empty caption"), ("no pipes at all", "not a row"),
    ("a.jpg| five| words", "not a row"),
])
def test_bad_rows_are_rejected_with_a_reason(tmp_path: Path, row: str, reason: str) -> None:
    """What cannot be a caption of a photo in the folder is named and counted, and the rest read."""
    read_ = read(tmp_path, f"b.jpg| 0| A cat .\n{row}\nb.jpg| 1| A dog .")
    assert read_.records == [ImageRecord("b.jpg", ("A cat .", "A dog ."))]
    assert read_.rows == 3 and len(read_.rejected) == 1
    assert reason in read_.rejected[0].reason and read_.rejected[0].where == "line 2"


def test_mended_captions_are_listed(tmp_path: Path) -> None:
    """Control characters and bytes that are not UTF-8 are replaced, and that is told."""
    read_ = read(tmp_path, b"a.jpg| 0| A \x00cat\x07 .\na.jpg| 1| A \xff dog .")
    assert read_.records[0].captions == ("A  cat  .", "A \ufffd dog .")
    assert [r.reason for r in read_.recovered] == [
        "control characters removed", "bytes that are not UTF-8 replaced"]


def test_line_separators_of_unicode_do_not_part_rows(tmp_path: Path) -> None:
    """U+2028 and vertical tabs stand inside captions, where str.splitlines would cut."""
    read_ = read(tmp_path, "a.jpg| 0| one\u2028two\x0bthree\na.jpg| 1| four")
    assert read_.rows == 2 and not read_.rejected


def test_one_photo_has_one_split(tmp_path: Path) -> None:
    """A photo that comes in two splits keeps its first; restval trains; other names are refused."""
    photo = {"filename": "a.jpg", "split": "restval", "sentences": [{"raw": "x"}]}
    content = {"images": [photo, photo | {"split": "test"}, photo | {"split": "train"},
                          photo | {"filename": "b.jpg", "split": "holiday"}]}
    read_ = read(tmp_path, json.dumps(content))
    assert read_.records == [ImageRecord("a.jpg", ("x", "x"), "train")]
    assert [r.reason for r in read_.rejected] == [
        "photo is already in split 'train'", "unknown split 'holiday'"]
    assert read_.rows == 4


@pytest.mark.parametrize("content", [
    "", "  \n ", "one line of prose", "\x00\x01\x02", "{", "[]", '{"images": 3}', "{}",
    '"images"', "a,b,c\n1,2,3",
])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    """Not a caption file: one error that names the file and what would be known."""
    with pytest.raises(UserError, match="captions"):
        read(tmp_path, content)


@pytest.mark.parametrize("photo", [
    3, None, [], {}, {"sentences": 3}, {"sentences": [3], "filename": "a.jpg"},
    {"sentences": [{"raw": None}], "filename": "a.jpg"}, {"sentences": [{"raw": "x"}]},
    {"sentences": [{"raw": "x"}], "filename": ["a"]}, {"sentences": [], "filename": "a.jpg"},
    {"sentences": [{"raw": "x"}], "filename": "a.jpg", "split": {"a": 1}},
])
def test_json_of_other_shapes_is_rejected_not_raised(tmp_path: Path, photo: object) -> None:
    """Whatever stands in the list of images, it is a rejected row."""
    read_ = read(tmp_path, json.dumps({"images": [photo]}))
    assert read_.records == [] and read_.rows == len(read_.rejected) == 1


ALPHABET = st.sampled_from(list('ab1. |,"\t#\n\r\x00{}[]:\u2028é') + ["a.jpg", "| 0| ", "#0\t"])


@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(["", *LAYOUTS.values()]), noise=st.lists(ALPHABET, max_size=40),
       where=st.floats(0, 1), raw=st.binary(max_size=8))
def test_books_balance_for_any_file(
    tmp_path: Path, start: str, noise: list[str], where: float, raw: bytes
) -> None:
    """However a file is damaged: a UserError, or every row is a caption or a rejected row."""
    cut = int(where * len(start))
    content = (start[:cut] + "".join(noise)).encode() + raw + start[cut:].encode()
    try:
        read_ = read(tmp_path, content)
    except UserError:
        return
    assert read_.rows == sum(len(r.captions) for r in read_.records) + len(read_.rejected)
    assert all(r.captions and all(c.strip() for c in r.captions) for r in read_.records)
    assert len({r.name for r in read_.records}) == len(read_.records)
