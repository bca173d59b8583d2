"""Caption files: every layout gives the same records, and no row is lost."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.data.caption_files import CAPTION_COLUMNS, IMAGE_COLUMNS
from src.data.captions import Annotations, ImageRecord, read_annotations
from src.utils.errors import UserError
from tests.stress.fuzz_captions import check_file

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT.parent / "shared" / "annotation_samples"
CASES = ROOT.parent / "shared" / "cases"
SUBSET = ROOT.parent / "shared" / "flickr30k_subset" / "annotations" / "annotations.csv"
Captions = list[tuple[str, list[str]]]  # images with their captions
CAPTIONS: Captions = [
    ("10.jpg", ["A dog , brown , runs .", 'A " big " dog', "Dogs", "NA", "It 's | piped , too ."]),
    ("2.jpg", ["null", "Un été à l' ombre", "a", "two  spaces; semicolon", 'Ends with a quote "']),
    ("x y.png", ["one", "two", "three", '"quoted"', "five"]),
]
SPLITS = {"10.jpg": "train", "2.jpg": "val", "x y.png": "test"}


def rows_of(data: Captions) -> list[tuple[str, int, str]]:
    """Image, number and text of each caption."""
    return [(name, i, caption) for name, captions in data for i, caption in enumerate(captions)]


def pipes(data: Captions = CAPTIONS, sep: str = "| ", header: bool = True) -> str:
    """Kaggle's Flickr30k, with quotes as text."""
    lines = [f"image_name{sep}comment_number{sep}comment"] if header else []
    return "\n".join(lines + [f"{name}{sep}{i}{sep}{text}" for name, i, text in rows_of(data)])


def token(data: Captions = CAPTIONS, mark: str = "#", blank: str = "\t") -> str:
    """Flickr8k and Flickr30k as published."""
    return "\n".join(f"{name}{mark}{i}{blank}{text}" for name, i, text in rows_of(data))


def written(rows: list[list], delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> str:
    """A table as a CSV writer writes it."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=quoting).writerows(rows)
    return text.getvalue()


def commas(data: Captions = CAPTIONS, header: bool = True, delimiter: str = ",",
           quoting: int = csv.QUOTE_MINIMAL) -> str:
    """Kaggle's Flickr8k: image,caption."""
    return written([["image", "caption"]] * header
                   + [[name, text] for name, _, text in rows_of(data)], delimiter, quoting)


def with_other_columns(data: Captions = CAPTIONS, delimiter: str = ",") -> str:
    """Columns in another order, with others beside, and an index without a name."""
    return written([["", "Caption", "id", "File Name", "height"]] + [
        [row, text, 7, name, 480] for row, (name, _, text) in enumerate(rows_of(data))], delimiter)


def resaved(data: Captions = CAPTIONS, delimiter: str = ",") -> str:
    """Kaggle's results.csv after pandas has read it with sep='|' and has written it."""
    return written([["image_name", " comment_number", " comment"]] + [
        [name, f" {i}", f" {text}"] for name, i, text in rows_of(data)], delimiter)


def wide(data: Captions = CAPTIONS, split: bool = True, delimiter: str = ",") -> str:
    """One image a row, with a column for each caption."""
    n = max(len(captions) for _, captions in data)
    return written([["file_name", "split", *(f"caption_{i}" for i in range(n))]] + [
        [name, SPLITS.get(name, "train") if split else "", *captions, *[""] * (n - len(captions))]
        for name, captions in data], delimiter)


def hugging_face(data: Captions = CAPTIONS, split: bool = True, delimiter: str = ",",
                 dump: Callable = json.dumps) -> str:
    """One image a row, the captions as a list."""
    return written([["raw", "sentids", "split", "filename", "img_id"]] + [
        [dump(captions), "[]", SPLITS.get(name, "train") if split else "", name, i]
        for i, (name, captions) in enumerate(data)], delimiter, csv.QUOTE_ALL)


def karpathy(data: Captions = CAPTIONS, split: bool = True) -> str:
    """Karpathy's JSON."""
    return json.dumps({"dataset": "flickr30k", "images": [
        {"filename": name, "sentences": [{"raw": caption, "tokens": []} for caption in captions]}
        | ({"split": SPLITS[name]} if split else {}) for name, captions in data]})


def coco(data: Captions = CAPTIONS) -> str:
    """COCO's captions_*.json."""
    return json.dumps({
        "info": {}, "licenses": [],
        "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(data)],
        "annotations": [{"id": i, "image_id": [name for name, _ in data].index(name),
                         "caption": text} for i, (name, _, text) in enumerate(rows_of(data))]})


def json_list(data: Captions = CAPTIONS, image: str = "image", caption: str = "caption") -> str:
    """A list of images with a caption, as BLIP and LAVIS have it."""
    return json.dumps([{image: name, caption: text, "image_id": 3}
                       for name, _, text in rows_of(data)])


def json_captions(data: Captions = CAPTIONS) -> str:
    """A list of images with their captions."""
    return json.dumps([{"image": name, "captions": captions} for name, captions in data])


def json_lines(data: Captions = CAPTIONS) -> str:
    """Hugging Face's metadata.jsonl."""
    return "\n".join(json.dumps({"file_name": name, "text": text})
                     for name, _, text in rows_of(data))


def json_by_image(data: Captions = CAPTIONS) -> str:
    """An object from image names to captions."""
    return json.dumps(dict(data))


def json_by_split(data: Captions = CAPTIONS) -> str:
    """An object from splits to lists."""
    return json.dumps({split: [{"image": name, "caption": text} for name, _, text in rows_of(data)
                               if SPLITS[name] == split] for split in ("train", "val", "test")})


def numpy_list(captions: list[str]) -> str:
    """A list of strings as NumPy prints it."""
    return "[" + "\n ".join(map(repr, captions)) + "]"


LAYOUTS: dict[str, str] = {
    "results.csv": pipes(), "results.csv without header": pipes(header=False),
    "results.csv without blanks": pipes(sep="|"), "token": token(), "zhb": token(mark="#zhb#"),
    "zhb with a blank": token([("10.jpg", CAPTIONS[0][1]), ("2.jpg", CAPTIONS[1][1]),
                               ("xy.png", CAPTIONS[2][1])], "#zhb#", " "),
    "captions.txt": commas(), "captions.txt without header": commas(header=False),
    "hugging face": hugging_face(), "hugging face without split": hugging_face(split=False),
    "python lists": hugging_face(dump=repr), "numpy lists": hugging_face(dump=numpy_list),
    "karpathy": karpathy(), "coco": coco(), "list": json_list(),
    "list of captions": json_captions(),
    "list with other names": json_list(image="img_path", caption="text"),
    "json lines": json_lines(), "json by image": json_by_image(), "json by split": json_by_split(),
    **{f"{name} with {delimiter!r}": write(delimiter=delimiter) for delimiter in ",\t|;"
       for name, write in {"image,caption": commas, "other columns": with_other_columns,
                           "results.csv saved again": resaved, "wide": wide,
                           "hugging face": hugging_face}.items()},
    **{f"all quoted with {delimiter!r}": commas(delimiter=delimiter, quoting=csv.QUOTE_ALL)
       for delimiter in ",\t|;"},
}
WITH_SPLIT = re.compile("hugging face(?! without)|python|numpy|karpathy|wide|by split")
ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": str.encode, "BOM": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16-be": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-16-le without BOM": lambda text: text.encode("utf-16-le"),
    "gzip": lambda text: gzip.compress(text.encode()),
}


def read(tmp_path: Path, content: str | bytes, **columns: object) -> Annotations:
    """Read a caption file with that content, under a name that says nothing."""
    path = tmp_path / "captions"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str)
                     else content)
    return read_annotations(path, **columns)


def captions_in(found: Annotations) -> Captions:
    """The captions of each image."""
    return [(record.name, list(record.captions)) for record in found.records]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_records(
    tmp_path: Path, layout: str, encoding: str, newline: str
) -> None:
    """Layout, delimiter, quoting, encoding and line ends change nothing about the captions."""
    for end in ("", "\n"):
        text = (LAYOUTS[layout].rstrip("\n") + end).replace("\n", newline)
        found = read(tmp_path, ENCODINGS[encoding](text))
        expected = [(name.replace(" ", "") if layout == "zhb with a blank" else name, captions)
                    for name, captions in CAPTIONS]
        assert captions_in(found) == expected
        assert (found.rows, found.rejected, found.fixed) == (15, [], [])
        has_split = bool(WITH_SPLIT.search(layout))
        assert found.has_split == has_split
        assert [r.split for r in found.records] == [SPLITS[name] if has_split else ""
                                                    for name, _ in CAPTIONS]


def test_mixed_line_ends(tmp_path: Path) -> None:
    """LF, CRLF and CR in one file still separate its rows."""
    ends = ["\n", "\r\n", "\r"]
    mixed = "".join(line + ends[i % 3] for i, line in enumerate(pipes().split("\n")))
    assert captions_in(read(tmp_path, mixed)) == CAPTIONS


@pytest.mark.parametrize("row", ["2199200615.jpg| 4   A dog runs across the grass .",
                                 "2199200615.jpg|4   A dog runs across the grass .",
                                 "2199200615.jpg| 4   A dog runs across the grass .|"])
@pytest.mark.parametrize("header", ["image_name| comment_number| comment\n", ""])
def test_the_broken_row_is_fixed_and_listed(tmp_path: Path, row: str, header: str) -> None:
    """Flickr30k's row without its second pipe is read, also after pandas has saved it again."""
    found = read(tmp_path, f"{header}a.jpg| 0| A cat .\na.jpg| 1| A cat .\n{row}\n")
    assert found.records[1] == ImageRecord("2199200615.jpg", ("A dog runs across the grass .",))
    assert [(r.where, r.name) for r in found.fixed] == [
        (f"line {3 + bool(header)}", "2199200615.jpg")]
    assert (found.rows, found.rejected) == (3, [])
    again = read(tmp_path, "image_name, comment_number, comment\na.jpg, 0, A cat .\n"
                           "2199200615.jpg, 4   A dog runs across the grass .,\n")
    assert again.records[1] == found.records[1] and len(again.fixed) == 1


CAPTION = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=' ,|"#;',
                                exclude_characters="\ufffd"),
                  min_size=1).map(str.strip).filter(bool)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(added=st.lists(st.lists(CAPTION, min_size=1, max_size=3), max_size=2))
def test_any_captions_come_back_from_every_layout(tmp_path: Path, added: list[list[str]]) -> None:
    """Whatever captions contain - quotes, delimiters, other scripts - each layout returns them."""
    data = CAPTIONS + [(f"new {i}.jpg", captions) for i, captions in enumerate(added)]
    tables = [write(data, delimiter=delimiter) for delimiter in ",\t|;"
              for write in (commas, resaved, with_other_columns, wide, hugging_face)]
    for content in (pipes(data), token(data), hugging_face(data, dump=repr), coco(data),
                    karpathy(data, split=False), json_list(data), json_lines(data), *tables):
        found = read(tmp_path, content)
        assert captions_in(found) == data
        assert not found.rejected and not found.fixed


@pytest.mark.parametrize("caption", ["NA", "null", "nan", "None", "0", "-", "TRUE", "1e5", "#"])
@pytest.mark.parametrize("write", [pipes, token, commas, hugging_face, karpathy, json_lines])
def test_words_that_mean_nothing_to_a_table_are_captions(
    tmp_path: Path, write: Callable[[Captions], str], caption: str
) -> None:
    """No caption is taken for a missing value or a number."""
    data = [("2.jpg", [caption, "A dog ."])]
    assert read(tmp_path, write(data)).records[0].captions == (caption, "A dog .")


def test_a_tab_in_a_caption_is_text(tmp_path: Path) -> None:
    """The first tab of a .token row ends the name; a later one is a control character."""
    found = read(tmp_path, "a.jpg#0\tone\ttwo\nb.jpg#0\tthree")
    assert [r.captions for r in found.records] == [("one two",), ("three",)]
    assert [r.name for r in found.fixed] == ["a.jpg"]


# --- columns ---------------------------------------------------------------------------------


def test_other_columns_are_named_and_not_read(tmp_path: Path) -> None:
    """A column that is neither image nor caption is in no caption, and in the description."""
    found = read(tmp_path, "image,caption,id\na.jpg,a red dog on grass,0\n"
                           'a.jpg,"a dog, running",0\nb.jpg,two boats,1\n')
    assert captions_in(found) == [("a.jpg", ["a red dog on grass", "a dog, running"]),
                                  ("b.jpg", ["two boats"])]
    assert found.rejected == [] and "not used: id" in found.format


@pytest.mark.parametrize(("header", "image", "caption"), [
    ("filepath\ttitle", 0, 1), ("image_id,img_path,caption", 1, 2), ("Image Name;Comment", 0, 1),
    ("text,file_name", 1, 0), ("photo,height,description", 0, 2), ("IMAGE|TITLE|caption", 0, 2),
    ("raw_id,path,sentence", 1, 2),
])
def test_columns_are_found_by_their_names(
    tmp_path: Path, header: str, image: int, caption: int
) -> None:
    """Whatever their order, the other columns, their case, and their blanks and underscores."""
    cells = [f"cell {i}" for i in range(3)]
    cells[image], cells[caption] = "a.jpg", "A dog ."
    delimiter = next(c for c in "\t;|," if c in header)
    row = delimiter.join(cells[: header.count(delimiter) + 1])
    assert captions_in(read(tmp_path, f"{header}\n{row}")) == [("a.jpg", ["A dog ."])]


@pytest.mark.parametrize("content", [
    "a.jpg,a red dog,0\na.jpg,\"a dog, too\",0\nb.jpg,two boats,1\n",
    "foto,alt,n\na.jpg,a red dog,0\na.jpg,\"a dog, too\",0\nb.jpg,two boats,1\n",
    '[{"foto": "a.jpg", "alt": "a red dog"}]',
    "\ufeffimage_name,english_caption,french_caption\na.jpg,a red dog,un chien\n",
    "id,mood,caption\na.jpg,3,a red dog\nb.jpg,4,two boats\n",
])
def test_columns_of_unknown_names_are_shown(tmp_path: Path, content: str) -> None:
    """The refusal shows each column with a value, and the flags; with these the file is read."""
    with pytest.raises(UserError) as raised:
        read(tmp_path, content)
    message = str(raised.value)
    image, caption = next((pair for pair in (
        ("foto", "alt"), ("image_name", "english_caption"), ("id", "caption"))
        if pair[0] in content), ("1", "2"))
    assert f"{image}: 'a.jpg'" in message and f"{caption}: 'a red dog'" in message
    assert f"--image-column {image!r} --caption-column {caption!r}" in message
    found = read(tmp_path, content, image_column=image, caption_columns=[caption])
    assert found.records[0].captions[0] == "a red dog" and not found.rejected


def test_rows_longer_than_the_header_are_refused(tmp_path: Path) -> None:
    """Where every row has one cell more, it may be a column without a name; no caption gets it."""
    with pytest.raises(UserError, match="3 cells in every row below a header of 2"):
        read(tmp_path, "image,caption\na.jpg,a red dog,0\nb.jpg,two boats,1\n")


def test_flags_choose_the_columns(tmp_path: Path) -> None:
    """Columns that are asked for are read instead of those with known names; a missing one is an
    error."""
    content = "image,caption,subset,wide,narrow\na.jpg,x,valid,A dog .,Dog\nb.jpg,x,train,A cat .,"
    found = read(tmp_path, content, caption_columns=["wide", "narrow"], split_column="subset")
    assert found.records == [ImageRecord("a.jpg", ("A dog .", "Dog"), "val"),
                             ImageRecord("b.jpg", ("A cat .",), "train")]
    with pytest.raises(UserError, match="no columns 'deep'"):
        read(tmp_path, content, caption_columns=["deep"])


def test_a_column_of_file_names_is_not_captions(tmp_path: Path) -> None:
    """A warning shows one of them and the flag for another column."""
    for caption in ("b.png", "17", "0.25"):
        [warning] = read(tmp_path, f"image,text\na.jpg,{caption}\nb.jpg,{caption}").warnings
        assert repr(caption) in warning and "--caption-column" in warning
    assert read(tmp_path, "image,text\na.jpg,A dog .\nb.jpg,17").warnings == []


# --- quotes ----------------------------------------------------------------------------------


def test_a_quoted_cell_may_span_lines(tmp_path: Path) -> None:
    """Line ends within a cell are blanks; the place of a row is its first line."""
    found = read(tmp_path, 'image,caption\na.jpg,"a man takes a picture\n"\nb.jpg,"a dog and\n'
                           'a cat"\nc.jpg,two boats\n,"nothing\nhere"\n')
    assert captions_in(found) == [("a.jpg", ["a man takes a picture"]),
                                  ("b.jpg", ["a dog and a cat"]), ("c.jpg", ["two boats"])]
    assert [issue.where for issue in found.rejected] == ["line 7"]


@pytest.mark.parametrize(("cell", "caption"), [
    ('"A dog', '"A dog'), ('A "big dog', 'A "big dog'),
    ('"A dog said "hi" to me"', 'A dog said "hi" to me'), ('A dog"', 'A dog"'),
    ('"A dog, brown', '"A dog, brown'), ("A dog, brown, runs", "A dog, brown, runs"),
])
def test_stray_quotes_change_no_other_row(tmp_path: Path, cell: str, caption: str) -> None:
    """A quote that is not closed is part of its caption; the rows around it are read."""
    rows = ["image,caption", "a.jpg,A cat", f"b.jpg,{cell}", 'c.jpg,"Two, boats"', "d.jpg,A dog",
            f"e.jpg,{cell}", "f.jpg,A cat"]
    found = read(tmp_path, "\n".join(rows))
    assert [(r.name, *r.captions) for r in found.records] == [
        ("a.jpg", "A cat"), ("b.jpg", caption), ("c.jpg", "Two, boats"), ("d.jpg", "A dog"),
        ("e.jpg", caption), ("f.jpg", "A cat")]
    assert found.rejected == []


@pytest.mark.skipif(not SUBSET.exists(), reason="the subset is not here")
def test_35_000_real_captions_in_20_layouts(tmp_path: Path) -> None:
    """The records are equal, and with them the digest of the dataset, whatever the layout."""
    data = captions_in(read_annotations(SUBSET))
    names = {name: i for i, (name, _) in enumerate(data)}
    texts = [
        pipes(data, header=False), pipes(data, sep="|").replace("\n", "\r\n"), token(data),
        token(data, "#zhb#", " "), commas(data), commas(data, header=False),
        commas(data, delimiter="\t"), commas(data, delimiter=";").encode("utf-16"),
        resaved(data), resaved(data, "|"), with_other_columns(data), wide(data, split=False),
        hugging_face(data, split=False), hugging_face(data, split=False, dump=repr),
        karpathy(data, split=False), json_list(data), json_captions(data), json_lines(data),
        json_by_image(data), gzip.compress(json.dumps({
            "images": [{"id": i, "file_name": name} for name, i in names.items()],
            "annotations": [{"image_id": names[name], "caption": text}
                            for name, _, text in rows_of(data)]}).encode()),
    ]
    assert len(texts) == 20
    for text in texts:
        found = read(tmp_path, text)
        assert captions_in(found) == data and not found.rejected and not found.fixed


@pytest.mark.skipif(not SAMPLES.exists(), reason="the samples are not here")
@pytest.mark.parametrize(("names", "rows", "recovered"), [
    (("results.csv", "results_no_header.csv", "results_crlf_no_spaces.csv"), 15,
     ["2199200615.jpg"]),
    (("results_20130124.token", "results_crlf.token", "flickr8k_captions.txt"), 40, []),
    (("flickr_annotations_30k.csv", "dataset_flickr30k.json"), 45, []),
])
def test_real_samples_of_one_dataset_agree(
    names: tuple[str, ...], rows: int, recovered: list[str]
) -> None:
    """Parts of the real files: every caption is read, the same from each layout."""
    all_found = [read_annotations(SAMPLES / name) for name in names]
    for found in all_found:
        assert found.records == all_found[0].records and found.rejected == []
        assert found.rows == sum(len(r.captions) for r in found.records) == rows
        assert [issue.name for issue in found.fixed] == recovered


@pytest.mark.parametrize(("row", "reason"), [
    ("../../etc/passwd| 0| out", "leads out"), ("/etc/passwd| 0| out", "leads out"),
    ("C:/x.jpg| 0| out", "leads out"), ("a\\b.jpg| 0| out", "backslash"),
    (" | 0| nobody", "no image name"), ("./| 0| the folder", "no image name"),
    ("a\x00.jpg| 0| NUL", "control"), ("\x1b[2J.jpg| 0| clears a screen", "control"),
    ("caf\udce9.jpg| 0| Latin-1", "not UTF-8"), ("a.jpg| 0|   ", "empty caption"),
    ("a.jpg| 0| \x00\x01", "empty caption"), ("no pipes at all", "1 cells"),
    ("a.jpg| five words", "2 cells"),
])
def test_bad_rows_are_rejected_with_a_reason(tmp_path: Path, row: str, reason: str) -> None:
    """What cannot be a caption of an image in the folder is listed, and the rest is read."""
    found = read(tmp_path, f"b.jpg| 0| A cat .\n{row}\nb.jpg| 1| A dog .")
    assert found.records == [ImageRecord("b.jpg", ("A cat .", "A dog ."))]
    assert found.rows == 3 and len(found.rejected) == 1
    assert reason in found.rejected[0].reason and found.rejected[0].where == "line 2"


@pytest.mark.parametrize("write", [pipes, token, commas, hugging_face, karpathy])
def test_repeated_captions_are_kept_and_named(
    tmp_path: Path, write: Callable[[Captions], str]
) -> None:
    """An image with the same caption twice keeps both, in order; others may have it too."""
    data = [("2.jpg", ["A dog .", "A cat .", "A dog .", "a dog ."]), ("10.jpg", ["A dog ."])]
    found = read(tmp_path, write(data))
    assert [(r.name, list(r.captions)) for r in found.records] == data and found.rejected == []
    assert [(r.name, r.text) for r in found.repeated] == [("2.jpg", "A dog .")]


@pytest.mark.parametrize("write", [pipes, token, commas, hugging_face, karpathy])
def test_scripts_signs_and_numbers_of_captions(
    tmp_path: Path, write: Callable[[Captions], str]
) -> None:
    """Emoji, right-to-left text and combining marks come back; so do one caption and fifty."""
    odd = ["\U0001f415 \U0001f3fb\u200d\u2642\ufe0f", "\u202e\u05db\u05dc\u05d1 \u0631\u0643\u0636",
           "e\u0301te\u0301", "\u00a1!"]
    data = [("2.jpg", odd), ("10.jpg", ["one"]), ("x y.png", [f"caption {i}" for i in range(50)])]
    found = read(tmp_path, write(data))
    assert [(r.name, list(r.captions)) for r in found.records] == data
    assert not found.rejected and not found.fixed and not found.repeated


def test_fixed_captions_are_listed(tmp_path: Path) -> None:
    """Control characters and bytes that are not UTF-8 are replaced, and that is reported."""
    found = read(tmp_path, b"a.jpg| 0| A \x00cat\x07 .\na.jpg| 1| A \xff dog .")
    assert found.records[0].captions == ("A  cat  .", "A \ufffd dog .")
    assert [r.reason for r in found.fixed] == [
        "control characters removed", "characters that are not UTF-8 replaced"]


def test_line_separators_of_unicode_do_not_separate_rows(tmp_path: Path) -> None:
    """U+2028 and vertical tabs are within captions, where str.splitlines would split."""
    found = read(tmp_path, "a.jpg| 0| one\u2028two\x0bthree\x85\na.jpg| 1| four")
    assert found.records == [ImageRecord("a.jpg", ("one\u2028two three", "four"))]
    assert found.rows == 2 and not found.rejected


def test_one_image_has_one_name(tmp_path: Path) -> None:
    """Spellings of one path are one image; as two it could be in training and validation."""
    names = ["a/b.jpg", "./a/b.jpg", "a//b.jpg", "a/./b.jpg", "a/b.jpg/"]
    found = read(tmp_path, "\n".join(f"{name}| {i}| A dog ." for i, name in enumerate(names)))
    assert found.records == [ImageRecord("a/b.jpg", ("A dog .",) * 5)]


@pytest.mark.parametrize("row", [
    '"[""x""],"[0]",train,a.jpg,0', '"[""x""],[0],train,a.jpg,0', '"[""x""]","[0]",train,a.jpg,0,',
    "[x],[0],train,a.jpg,0", '"[' + "1" * 5000 + ']",[0],train,a.jpg,0', '"' + "[" * 100_000,
    '"[""x""]"', ",,,,", '"[]",[0],train,a.jpg,0', '"{}",[0],train,a.jpg,0', '"3"', "\x00",
])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_row_of_a_table_is_rejected_alone(tmp_path: Path, row: str, place: int) -> None:
    """Open quotes, missing and surplus cells, no list: one rejected row; the others are read."""
    rows = [f'"[""caption {name}""]",[0],train,{name}.jpg,0' for name in "bc"]
    rows.insert(place, row)
    found = read(tmp_path, "\n".join(["raw,sentids,split,filename,img_id", *rows]))
    assert [r.name for r in found.records] == ["b.jpg", "c.jpg"]
    assert [issue.where for issue in found.rejected] == [f"line {place + 2}"]
    assert found.rows == 3


@pytest.mark.parametrize(("cell", "captions"), [
    ("['a dog', 'a\nb']", ("a dog", "a b")), ('["a dog", "a\nb"]', ("a dog", "a b")),
    ("['a dog'\n 'it''s']", ("a dog", "it", "s")), (r"['\x']", ()), (r"['a \d']", (r"a \d",)),
    ('["a", 3, null, ["b"]]', ("a",)), ("['a', b]", ()), ("[]", ()), ("[1", ()),
])
def test_lists_of_captions(tmp_path: Path, cell: str, captions: tuple[str, ...]) -> None:
    """JSON, Python and NumPy; what is not text, or not a list, is rejected."""
    rows = [["filename", "raw"], *[[f"{i}.jpg", "['a']"] for i in range(4)], ["x.jpg", cell]]
    found = read(tmp_path, written(rows))
    assert [r.captions for r in found.records if r.name == "x.jpg"] == [captions] * bool(captions)
    assert len(found.rejected) == (3 if "null" in cell else not captions)


@pytest.mark.parametrize("write", [pipes, token, commas, hugging_face, karpathy])
def test_very_long_captions_are_read(tmp_path: Path, write: Callable[[Captions], str]) -> None:
    """Ten thousand words a caption are more than a CSV reader takes by default."""
    data = [("2.jpg", ["word " * 9_999 + "end"] * 5)]
    assert list(read(tmp_path, write(data)).records[0].captions) == data[0][1]


def test_a_row_of_blanks_takes_no_time(tmp_path: Path) -> None:
    """A long row like the broken one is read in linear time."""
    found = read(tmp_path, "a.jpg| 4" + " " * 300_000 + "x|\nb.jpg| 0| A dog .")
    assert captions_in(found) == [("a.jpg", ["x"]), ("b.jpg", ["A dog ."])]


@pytest.mark.parametrize("write", [hugging_face, karpathy])
def test_halves_of_surrogate_pairs_are_replaced(
    tmp_path: Path, write: Callable[[Captions], str]
) -> None:
    """JSON can contain characters that cannot be encoded; they are replaced and reported."""
    found = read(tmp_path, write([("2.jpg", ["A \ud83d dog"])]))
    assert found.records[0].captions == ("A \ufffd dog",) and len(found.fixed) == 1
    found = read(tmp_path, '{"images": [{"filename": "\\ud800", "sentences": [{"raw": "x"}]}]}')
    assert found.records == [] and "not UTF-8" in found.rejected[0].reason


def test_an_image_of_unknown_split_loses_all_its_captions(tmp_path: Path) -> None:
    """Each of them is counted as a rejected row."""
    photo = {"filename": "a.jpg", "split": "?", "sentences": [{"raw": "x"}] * 5}
    found = read(tmp_path, json.dumps({"images": [photo]}))
    assert (found.records, found.rows, len(found.rejected)) == ([], 5, 5)


def test_the_folder_in_karpathys_file_is_part_of_the_name(tmp_path: Path) -> None:
    """COCO's images are in two folders, which `filepath` names."""
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
    """Blank lines may come before it; the same line again is a rejected row."""
    found = read(tmp_path, f"\n{before.format(header=header)}\n{row}\n{header}\n{row}")
    assert found.records == [ImageRecord("a.jpg", ("A dog .", "A dog ."))] and found.rows == 3
    assert [issue.where for issue in found.rejected] == ["line 4"]


def test_one_image_has_one_split(tmp_path: Path) -> None:
    """An image in two splits keeps its first; restval is training; other names are rejected."""
    photo = {"filename": "a.jpg", "split": "restval", "sentences": [{"raw": "x"}]}
    content = {"images": [photo, photo | {"split": "test"}, photo | {"split": "train"},
                          photo | {"filename": "b.jpg", "split": "holiday"}]}
    found = read(tmp_path, json.dumps(content))
    assert found.records == [ImageRecord("a.jpg", ("x", "x"), "train")]
    assert [r.reason for r in found.rejected] == [
        "image is already in split 'train'", "unknown split 'holiday'"]
    assert found.rows == 4


@pytest.mark.parametrize("content", [
    b"one line of prose", b"\x00\x01\x02", b"a,b,c\n1,2,3", b"%PDF-1.7\n\xff\xfe\x00",
    b"\xff\xd8\xff\xe0\x00\x10JFIF", b"PK\x03\x04\x00", b"\x1f\x8b\x00",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
])
def test_files_of_other_kinds_are_refused(tmp_path: Path, content: bytes) -> None:
    """Not a caption file: one error that names the file."""
    with pytest.raises(UserError, match=str(tmp_path)):
        read(tmp_path, content)


@pytest.mark.parametrize(("content", "reason"), [
    ("", "is empty"), ("  \n ", "is empty"), ("\ufeff", "is empty"), ("{", "is not JSON"),
    ("[]", "no list of obj"), ("{}", "no list"), ('[{"images": []}]', "unknown names"),
    ('{"images": []} x', "is not JSON"), ('{"images": [' + "1" * 5000 + "]}", "is not JSON"),
    ("[" * 100_000, "is not JSON"), ('{"images": 3}', "unknown names"),
    ('{"images": {"a": 1}}', "unknown names"), ('{"a": 3}', "unknown names"),
])
def test_empty_and_broken_files_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    """Nothing in it, or JSON of another form: one error that names the file and the reason."""
    with pytest.raises(UserError, match=f"{tmp_path}.*{reason}"):
        read(tmp_path, content)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
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
    """Whatever is in the list of images, it is a rejected row."""
    good = {"sentences": [{"raw": "x"}], "filename": "b.jpg", "split": ""}
    found = read(tmp_path, json.dumps({"images": [good, photo]}))
    assert len(found.records) == len(found.rejected) == 1 and found.rows == 2


ALPHABET = st.sampled_from(list('ab1. |,"\t#\n\r\x00{}[]:\u2028é') + ["a.jpg", "| 0| ", "#0\t"])
DAMAGE = st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(["insert", "delete", "byte"]),
                            ALPHABET, st.integers(0, 255)), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(["", *LAYOUTS.values()]), damage=DAMAGE)
def test_no_row_of_any_file_is_lost(
    tmp_path: Path, start: str, damage: list[tuple[int, str, str, int]]
) -> None:
    """However a file is damaged: a UserError, or every row is in a record or rejected."""
    content = bytearray(start.encode())
    for place, what, text, byte in damage:
        place %= len(content) + 1
        if what == "insert":
            content[place:place] = text.encode()
        else:
            content[place : place + len(text)] = bytes([byte]) if what == "byte" else b""
    (tmp_path / "captions").write_bytes(content)
    check_file(tmp_path / "captions")


# --- documentation ---------------------------------------------------------------------------


DOCUMENTED = re.findall(
    r"\n\| (?!layout|-|parquet)([^|]+?) \| (`.*`) \|",
    (ROOT / "docs" / "captions.md").read_text().split("## Columns")[0])


@pytest.mark.parametrize(("layout", "example"), DOCUMENTED, ids=[name for name, _ in DOCUMENTED])
def test_the_documented_layouts_are_read(tmp_path: Path, layout: str, example: str) -> None:
    """Each example of docs/captions.md is the caption that it says, and nothing is rejected."""
    text = example.strip("`").replace("`<br>`", "\n").replace("<tab>", "\t").replace("\\|", "|")
    for content in [text, text.splitlines()[-1]][: 1 + ("also without header" in layout)]:
        found = read(tmp_path, content)
        assert found.records[0].name == "a.jpg" and found.rejected == []
        assert found.records[0].captions[0] == "A dog runs ."


def test_the_documentation_is_complete() -> None:
    """docs/captions.md has every layout, and the names of all columns that are known."""
    text = (ROOT / "docs" / "captions.md").read_text()
    assert len(DOCUMENTED) == 17
    names = {re.sub(r"[\W_]", "", word) for word in re.findall(r"[\w]+", text)}
    assert set(CAPTION_COLUMNS) <= names
    assert set(IMAGE_COLUMNS) - names <= {"imagefilename", "imgfile", "photoname"}


# --- reported files --------------------------------------------------------------------------


@pytest.mark.skipif(not CASES.exists(), reason="the cases are not here")
@pytest.mark.parametrize(("path", "expected"), [
    ("train-01/captions.csv", [("a.jpg", ["a red dog on grass", "a dog, running"]),
                               ("b.jpg", ["two boats"])]),
    ("train-02/captions.csv", [("a.jpg", ["a red dog on grass", "a dog, running"]),
                               ("b.jpg", ["two boats"])]),
    ("train-03/metadata.csv", [("a.jpg", ["a red dog on grass", "a dog, running"]),
                               ("b.jpg", ["two boats", "boats at sea"]),
                               ("c.jpg", ["a cat", "a grey cat"])]),
    ("train-05/multiline.csv", [("a.jpg", ["a man takes a picture"]),
                                ("b.jpg", ["a dog and a cat"]), ("c.jpg", ["two boats"])]),
    ("train-06/captions_val2017.json", [("a.jpg", ["a red dog"])]),
    ("train-06/hash_number.csv", [("a.jpg", ["a red dog", "a dog"])]),
    ("train-06/python_list.csv", [("a.jpg", ["a red dog", "a dog"])]),
    ("train-06/split_training.json", [("a.jpg", ["a red dog"]), ("b.jpg", ["two boats"])]),
    ("train-06/no_extension.csv", [("a", ["a red dog"]), ("b", ["two boats"])]),
])
def test_reported_files_are_read(path: str, expected: Captions) -> None:
    """Files of public reports give their captions, and no row is rejected."""
    found = read_annotations(CASES / path)
    assert captions_in(found) == expected and found.rejected == []
    if path.startswith(("train-03", "train-06/split")):
        assert [r.split for r in found.records] == ["train", "val", "test"][: len(expected)]


@pytest.mark.skipif(not CASES.exists(), reason="the cases are not here")
def test_a_reported_file_without_its_header_is_refused(tmp_path: Path) -> None:
    """A third column in every row could be anything: the columns are shown."""
    text = (CASES / "train-01" / "captions.csv").read_text().split("\n", 1)[1]
    with pytest.raises(UserError, match="--image-column '1' --caption-column '2'"):
        read(tmp_path, text)


def test_parquet(tmp_path: Path) -> None:
    """Text, lists and image structs of the datasets library, without reading the image bytes."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    columns = {
        "image": [{"bytes": b"x" * 100, "path": name} for name, _ in CAPTIONS],
        "caption": [captions for _, captions in CAPTIONS], "split": list(SPLITS.values()),
    }
    pq.write_table(pa.table(columns), tmp_path / "lists")
    assert captions_in(read_annotations(tmp_path / "lists")) == CAPTIONS
    rows = rows_of(CAPTIONS)
    pq.write_table(pa.table({"file_name": [r[0] for r in rows], "id": [r[1] for r in rows],
                             "text": [r[2] for r in rows]}), tmp_path / "rows")
    assert captions_in(read_annotations(tmp_path / "rows")) == CAPTIONS
    pq.write_table(pa.table({"a": ["x"], "b": [3]}), tmp_path / "other")
    with pytest.raises(UserError, match="unknown names"):
        read_annotations(tmp_path / "other")


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the message has the command that installs it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(tmp_path, b"PAR1" + bytes(20) + b"PAR1")
