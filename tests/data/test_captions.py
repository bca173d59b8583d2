"""Caption files: every format gives the same records, and the collector balance."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.data.captions import FORMATS, Annotations, ImageRecord, read_annotations
from src.utils.errors import UserError
from tests.stress.fuzz_captions import check_file

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "annotation_samples"
World = list[tuple[str, list[str]]]  # photos with their captions
WORLD: World = [
    ("10.jpg", ["A dog , brown , runs .", 'A " big " dog', "Dogs", "NA", "It 's | piped , too ."]),
    ("2.jpg", ["null", "Un été à l' ombre", "a", "two  spaces", "Ends with a quote \""]),
    ("x y.png", ["one", "two", "three", "four", "five"]),
]
SPLITS = {"10.jpg": "train", "2.jpg": "val", "x y.png": "test"}


def pipes(world: World = WORLD, sep: str = "| ", header: bool = True) -> str:
    """Kaggle's Flickr30k."""
    lines = [f"image_name{sep}comment_number{sep}comment"] if header else []
    return "\n".join(lines + [f"{name}{sep}{i}{sep}{caption}" for name, captions in world
                              for i, caption in enumerate(captions)])


def token(world: World = WORLD) -> str:
    """The original Flickr8k and Flickr30k."""
    return "\n".join(f"{name}#{i}\t{caption}" for name, captions in world
                     for i, caption in enumerate(captions))


def commas(world: World = WORLD, header: bool = True) -> str:
    """Kaggle's Flickr8k."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    rows = [(name, caption) for name, captions in world for caption in captions]
    table.writerows([("image", "caption")] * header + rows)
    return text.getvalue()


def hugging_face(world: World = WORLD, split: bool = True) -> str:
    """One photo a row, captions as JSON."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    table.writerow(["raw", "sentids", "split", "filename", "img_id"])
    for i, (name, captions) in enumerate(world):
        table.writerow([json.dumps(captions), "[]", SPLITS[name] if split else "", name, i])
    return text.getvalue()


def karpathy(world: World = WORLD, split: bool = True) -> str:
    """Karpathy's JSON."""
    return json.dumps({"dataset": "flickr30k", "images": [
        {"filename": name, "sentences": [{"raw": caption} for caption in captions]}
        | ({"split": SPLITS[name]} if split else {}) for name, captions in world]})


LAYOUTS = {
    "results.csv": pipes(), "no header": pipes(header=False), "no spaces": pipes(sep="|"),
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
    assert (read_.rows, read_.rejected, read_.fixed) == (15, [], [])
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
    assert [(r.where, r.name) for r in read_.fixed] == [("line 3", "2199200615.jpg")]
    assert (read_.rows, read_.rejected) == (2, [])


CAPTION = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=' ,|"#',
                                exclude_characters="\ufffd"),
                  min_size=1).map(str.strip).filter(bool)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(added=st.lists(st.lists(CAPTION, min_size=1, max_size=3), max_size=2))
def test_any_captions_come_back_from_every_format(tmp_path: Path, added: list[list[str]]) -> None:
    """Whatever captions hold - quotes, pipes, commas, other scripts - each format returns them."""
    world = WORLD + [(f"new {i}.jpg", captions) for i, captions in enumerate(added)]
    for content in (pipes(world), token(world), commas(world), hugging_face(world, split=False),
                    karpathy(world, split=False)):
        read_ = read(tmp_path, content)
        assert [(r.name, list(r.captions)) for r in read_.records] == world
        assert not read_.rejected and not read_.fixed


@pytest.mark.parametrize("caption", ["NA", "null", "nan", "None", "0", "-", "TRUE", "1e5", "#"])
@pytest.mark.parametrize("write", [pipes, token, commas, hugging_face, karpathy])
def test_words_that_mean_nothing_to_a_table_are_captions(
    tmp_path: Path, write: Callable[[World], str], caption: str
) -> None:
    """No caption is taken for a missing value or a number."""
    world = [("2.jpg", [caption, "A dog ."])]
    assert read(tmp_path, write(world)).records[0].captions == (caption, "A dog .")


def test_a_tab_in_a_caption_is_text(tmp_path: Path) -> None:
    """The first tab of a .token row ends its key; a later one is a control character like others"""
    read_ = read(tmp_path, "a.jpg#0\tone\ttwo\nb.jpg#0\tthree")
    assert [r.captions for r in read_.records] == [("one two",), ("three",)]
    assert [r.name for r in read_.fixed] == ["a.jpg"]


@pytest.mark.skipif(not SAMPLES.exists(), reason="the samples are not here")
@pytest.mark.parametrize(("names", "rows", "recovered"), [
    (("results.csv", "results_no_header.csv", "results_crlf_no_spaces.csv"), 15,
     ["2199200615.jpg"]),
    (("results_20130124.token", "results_crlf.token", "flickr8k_captions.txt"), 40, []),
    (("flickr_annotations_30k.csv", "dataset_flickr30k.json"), 45, []),
])
def test_real_samples_of_one_data_set_agree(
    names: tuple[str, ...], rows: int, recovered: list[str]
) -> None:
    """Cuts of the real files: every caption is read, from each arrangement of it the same."""
    found = [read_annotations(SAMPLES / name) for name in names]
    for read_ in found:
        assert read_.records == found[0].records and read_.rejected == []
        assert read_.rows == sum(len(r.captions) for r in read_.records) == rows
        assert [remark.name for remark in read_.fixed] == recovered


@pytest.mark.parametrize(("row", "reason"), [
    ("../../etc/passwd| 0| out", "leads out"), ("/etc/passwd| 0| out", "leads out"),
    ("C:/x.jpg| 0| out", "leads out"), ("a\\b.jpg| 0| out", "backslash"),
    (" | 0| nobody", "no photo name"), ("./| 0| the folder", "no photo name"),
    ("a\x00.jpg| 0| NUL", "control"), ("\x1b[2J.jpg| 0| clears a screen", "control"),
    ("caf\udce9.jpg| 0| Latin-1", "not UTF-8"), ("a.jpg| 0|   ", "empty caption"),
    ("a.jpg| 0| \x00\x01", "empty caption"), ("no pipes at all", "not a row"),
    ("a.jpg| five| words", "not a row"),
])
def test_bad_rows_are_rejected_with_a_reason(tmp_path: Path, row: str, reason: str) -> None:
    """What cannot be a caption of a photo in the folder is named and counted, and the rest read."""
    read_ = read(tmp_path, f"b.jpg| 0| A cat .\n{row}\nb.jpg| 1| A dog .")
    assert read_.records == [ImageRecord("b.jpg", ("A cat .", "A dog ."))]
    assert read_.rows == 3 and len(read_.rejected) == 1
    assert reason in read_.rejected[0].reason and read_.rejected[0].where == "line 2"


@pytest.mark.parametrize("write", [pipes, token, commas, hugging_face, karpathy])
def test_repeated_captions_are_kept_and_named(
    tmp_path: Path, write: Callable[[World], str]
) -> None:
    """A photo that says the same twice keeps both, in order; other photos may say it too."""
    world = [("2.jpg", ["A dog .", "A cat .", "A dog .", "a dog ."]), ("10.jpg", ["A dog ."])]
    read_ = read(tmp_path, write(world))
    assert [(r.name, list(r.captions)) for r in read_.records] == world and read_.rejected == []
    assert [(r.name, r.text) for r in read_.repeated] == [("2.jpg", "A dog .")]


@pytest.mark.parametrize("write", [pipes, token, commas, hugging_face, karpathy])
def test_scripts_signs_and_numbers_of_captions(
    tmp_path: Path, write: Callable[[World], str]
) -> None:
    """Emoji, right-to-left text and combining marks come back; so do one caption and fifty."""
    odd = ["\U0001f415 \U0001f3fb\u200d\u2642\ufe0f", "\u202e\u05db\u05dc\u05d1 \u0631\u0643\u0636",
           "e\u0301te\u0301", "\u00a1!"]
    world = [("2.jpg", odd), ("10.jpg", ["one"]), ("x y.png", [f"caption {i}" for i in range(50)])]
    read_ = read(tmp_path, write(world))
    assert [(r.name, list(r.captions)) for r in read_.records] == world
    assert not read_.rejected and not read_.fixed and not read_.repeated


def test_mended_captions_are_listed(tmp_path: Path) -> None:
    """Control characters and bytes that are not UTF-8 are replaced, and that is told."""
    read_ = read(tmp_path, b"a.jpg| 0| A \x00cat\x07 .\na.jpg| 1| A \xff dog .")
    assert read_.records[0].captions == ("A  cat  .", "A \ufffd dog .")
    assert [r.reason for r in read_.fixed] == [
        "control characters removed", "bytes that are not UTF-8 replaced"]


def test_line_separators_of_unicode_do_not_part_rows(tmp_path: Path) -> None:
    """U+2028 and vertical tabs stand inside captions, where str.splitlines would cut."""
    read_ = read(tmp_path, "a.jpg| 0| one\u2028two\x0bthree\x85\na.jpg| 1| four")
    assert read_.records == [ImageRecord("a.jpg", ("one\u2028two three", "four"))]
    assert read_.rows == 2 and not read_.rejected


def test_one_photo_has_one_name(tmp_path: Path) -> None:
    """Spellings of one path are one photo; as two it could train and validate at once."""
    names = ["a/b.jpg", "./a/b.jpg", "a//b.jpg", "a/./b.jpg", "a/b.jpg/"]
    read_ = read(tmp_path, "\n".join(f"{name}| {i}| A dog ." for i, name in enumerate(names)))
    assert read_.records == [ImageRecord("a/b.jpg", ("A dog .",) * 5)]


@pytest.mark.parametrize("row", [
    '"[""x""],"[0]",train,a.jpg,0', '"[""x""],[0],train,a.jpg,0', '"[""x""]","[0]",train,a.jpg,0,',
    "[x],[0],train,a.jpg,0", '"[' + "1" * 5000 + ']",[0],train,a.jpg,0', '"' + "[" * 100_000,
    '"[""x""]"', ",,,,", '"[]",[0],train,a.jpg,0', '"{}",[0],train,a.jpg,0', '"3"', "\x00",
])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_row_of_a_table_is_rejected_alone(tmp_path: Path, row: str, place: int) -> None:
    """Open quotes, missing and surplus cells, no JSON: one rejected row, its neighbours whole."""
    rows = [f'"[""caption {name}""]",[0],train,{name}.jpg,0' for name in "bc"]
    rows.insert(place, row)
    read_ = read(tmp_path, "\n".join(["raw,sentids,split,filename,img_id", *rows]))
    assert [r.name for r in read_.records] == ["b.jpg", "c.jpg"]
    assert [remark.where for remark in read_.rejected] == [f"line {place + 2}"]
    assert read_.rows == 3


@pytest.mark.parametrize("write", [pipes, token, commas, hugging_face, karpathy])
def test_very_long_captions_are_read(tmp_path: Path, write: Callable[[World], str]) -> None:
    """Ten thousand words a caption are more than a CSV reader takes by default."""
    world = [("2.jpg", ["word " * 9_999 + "end"] * 5)]
    assert list(read(tmp_path, write(world)).records[0].captions) == world[0][1]


def test_a_row_of_blanks_takes_no_time(tmp_path: Path) -> None:
    """A row that almost looks like the broken one is refused without trying every way to part its
    blanks: that would take hours here."""
    read_ = read(tmp_path, "a.jpg| 4" + " " * 300_000 + "x|\nb.jpg| 0| A dog .")
    assert [remark.where for remark in read_.rejected] == ["line 1"]


@pytest.mark.parametrize("write", [hugging_face, karpathy])
def test_halves_of_surrogate_pairs_are_replaced(
    tmp_path: Path, write: Callable[[World], str]
) -> None:
    """JSON can spell characters that no file and no screen takes; they are replaced, and told."""
    read_ = read(tmp_path, write([("2.jpg", ["A \ud83d dog"])]))
    assert read_.records[0].captions == ("A \ufffd dog",) and len(read_.fixed) == 1
    read_ = read(tmp_path, '{"images": [{"filename": "\\ud800", "sentences": [{"raw": "x"}]}]}')
    assert read_.records == [] and "not UTF-8" in read_.rejected[0].reason


def test_a_photo_of_unknown_split_loses_all_its_captions(tmp_path: Path) -> None:
    """Each of them is counted, since each is a row that no record holds."""
    photo = {"filename": "a.jpg", "split": "?", "sentences": [{"raw": "x"}] * 5}
    read_ = read(tmp_path, json.dumps({"images": [photo]}))
    assert (read_.records, read_.rows, len(read_.rejected)) == ([], 5, 5)


def test_a_folder_in_karpathys_file_is_part_of_the_name(tmp_path: Path) -> None:
    """COCO's photos lie in folders, which it names apart."""
    photo = {"filepath": "val2014", "filename": "a.jpg", "sentences": [{"raw": "x"}]}
    assert read(tmp_path, json.dumps({"images": [photo]})).records[0].name == "val2014/a.jpg"
    photo["filepath"] = ".."
    assert "leads out" in read(tmp_path, json.dumps({"images": [photo]})).rejected[0].reason


@pytest.mark.parametrize("before", ["", "{header}"])
@pytest.mark.parametrize(("header", "row"), [
    ("image_name| comment_number| comment", "a.jpg| 0| A dog ."),
    ("image,caption", "a.jpg,A dog ."),
])
def test_a_header_comes_once_and_first(
    tmp_path: Path, header: str, row: str, before: str
) -> None:
    """Blank lines may stand before it; the same line further down is a row, and a bad one."""
    read_ = read(tmp_path, f"\n{before.format(header=header)}\n{row}\n{header}\n{row}")
    assert read_.records == [ImageRecord("a.jpg", ("A dog .", "A dog ."))] and read_.rows == 3
    assert [remark.where for remark in read_.rejected] == ["line 4"]


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
    b"one line of prose", b"\x00\x01\x02", b"a,b,c\n1,2,3", b"%PDF-1.7\n\xff\xfe\x00",
    b"\xff\xd8\xff\xe0\x00\x10JFIF", "image_name| comment_number| comment\n".encode("utf-16"),
])
def test_files_of_other_kinds_are_refused(tmp_path: Path, content: bytes) -> None:
    """Not a caption file: one error that names the file and every format that is known."""
    with pytest.raises(UserError, match=str(tmp_path)) as raised:
        read(tmp_path, content)
    assert all(layout in str(raised.value) for layout in FORMATS.values())


@pytest.mark.parametrize(("content", "reason"), [
    ("", "is empty"), ("  \n ", "is empty"), ("\ufeff", "is empty"), ("{", "is not JSON"),
    ("[]", "is not JSON"), ("{}", "is not JSON"), ('[{"images": []}]', "is not JSON"),
    ('{"images": []} x', "is not JSON"), ('{"images": [' + "1" * 5000 + "]}", "is not JSON"),
    ("[" * 100_000, "is not JSON"), ('{"images": 3}', "not a list"),
    ('{"images": {"a": 1}}', "not a list"),
])
def test_empty_and_broken_files_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    """Nothing in it, or JSON of another form: one error that names the file and says so."""
    with pytest.raises(UserError, match=f"{tmp_path}.*{reason}"):
        read(tmp_path, content)


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    """Neither a missing file nor a folder gives a traceback."""
    for path in (tmp_path, tmp_path / "nowhere.csv"):
        with pytest.raises(UserError, match=str(path)):
            read_annotations(path)


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
DAMAGE = st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(["insert", "delete", "byte"]),
                            ALPHABET, st.integers(0, 255)), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(["", *LAYOUTS.values()]), damage=DAMAGE)
def test_books_balance_for_any_file(
    tmp_path: Path, start: str, damage: list[tuple[int, str, str, int]]
) -> None:
    """However a file is damaged: a UserError, or every line of it is in a record or rejected."""
    content = bytearray(start.encode())
    for place, what, text, byte in damage:
        place %= len(content) + 1
        if what == "insert":
            content[place:place] = text.encode()
        else:
            content[place : place + len(text)] = bytes([byte]) if what == "byte" else b""
    (tmp_path / "captions").write_bytes(content)
    check_file(tmp_path / "captions")
