"""Read a caption file as a table: which image, which caption, which split, row by row.

A caption file is a table with named columns: delimited text, JSON, JSON lines or parquet, also
compressed with gzip. The layout is found from the content, never from the file's name, and the
columns from their names, in any order. docs/captions.md shows every layout with an example.

This module reads from top to bottom in the order of the work: bytes -> text -> rows of the file ->
columns -> one row for each caption.
"""

from __future__ import annotations

import ast
import codecs
import csv
import gzip
import io
import json
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

LAYOUTS = {  # shown where a file is none of them
    "image_name| comment_number| comment": "Kaggle's Flickr30k, results.csv",
    "image,caption": "CSV with a header, such as Kaggle's Flickr8k",
    "image.jpg#0<tab>caption": "Flickr8k and Flickr30k as published, .token",
    "raw,sentids,split,filename,img_id": "Hugging Face, captions as a list",
    '{"images": [{"filename", "split", "sentences"}]}': "Karpathy",
    '{"images": [...], "annotations": [{"image_id", "caption"}]}': "COCO",
    '[{"image", "caption"}]': "JSON, or an object a line",
}
# As `_key` returns them; of several the first is taken.
IMAGE_COLUMNS = (
    "imagename", "filename", "image", "imagepath", "imagefile", "imagefilename", "imgname",
    "imgpath", "img", "imgfile", "filepath", "path", "photo", "photoname", "file", "name",
    "imageid", "imgid")
# Also as plurals and with numbers: captions, caption_0 ... caption_4.
CAPTION_COLUMNS = ("caption", "comment", "raw", "sentence", "text", "description", "title")
DELIMITERS = "\t|,;"
MAX_BYTES = 4 << 30  # of a decompressed file
MAX_CELL_LINES = 100  # a quote that is not closed within this many lines is a stray one
IMAGE_SUFFIX = r"\.(?:jpe?g|png|gif|bmp|webp|tiff?|avif|heic)"
# A cell that is an image name: with a suffix, a caption number as in .token, or an id of digits.
IMAGE_NAME = re.compile(rf"\S.*{IMAGE_SUFFIX}(?:#.*)?|\S*#\d+|\w*\d{{3,}}\w*", re.IGNORECASE)
# Flickr30k's broken row, `2199200615.jpg| 4   A dog runs across the grass .`: one cell for two.
NUMBER_AND_CAPTION = re.compile(r"\s*\d+\s+(\S.*)", re.DOTALL)
STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
STRING_LIST = re.compile(rf"\[[\s,]*(?:(?:{STRING})[\s,]*)+\]", re.DOTALL)
csv.field_size_limit(2**31 - 1)  # five captions of 10,000 words exceed the default, 131,072


class Columns(NamedTuple):
    """Positions of the columns that are read; `folder` is Karpathy's `filepath`, for COCO."""

    image: int
    captions: list[int]
    split: int | None
    folder: int | None = None


class FileRow(NamedTuple):
    """A row of the file: its place, its cells, and how it was fixed or why it cannot be read."""

    where: str
    cells: Sequence[Any]
    fixed: str = ""
    error: str = ""
    text: str = ""


class CaptionRow(NamedTuple):
    """One caption, or with an `error` a row that holds none."""

    where: str
    image: str
    caption: str
    split: str = ""
    fixed: str = ""
    error: str = ""


Choose = Callable[[list[str]], "Columns | None"]


def read_table(
    path: Path, image_column: str | None = None, caption_columns: Sequence[str] = (),
    split_column: str | None = None,
) -> tuple[pd.DataFrame, str]:
    """Read a caption file.

    Args:
        path: the file.
        image_column: name of the column of image names; None to find it by its name. The columns
            of a table without a header are called 1, 2, 3, ....
        caption_columns: names of the columns of captions.
        split_column: name of the column of splits.

    Returns:
        A table with the columns of CaptionRow, as text as it is in the file; and a description of
        the layout for users.

    Raises:
        ValueError: the file is not a caption file; the message continues "FILE ...".
        OSError: the file cannot be read.
    """
    choose = partial(choose_columns, image_column=image_column, caption_columns=caption_columns,
                     split_column=split_column)
    with open(path, "rb") as file:
        magic = file.read(4)
    try:
        if magic == b"PAR1":
            layout, names, columns, rows = _read_parquet(path, choose)
        else:
            text = decode(path.read_bytes())
            if not text.strip():
                raise ValueError("is empty")
            read = _read_json if text.lstrip()[0] in "{[" else _read_delimited
            layout, names, columns, rows = read(text, choose)
    except ValueError as error:
        given = [repr(name) for name in (image_column, *caption_columns, split_column) if name]
        if given:
            raise ValueError(f"has no columns {', '.join(given)}: {error}") from error
        raise
    sample = list(islice(rows, 100))
    lists = [i for i in columns.captions
             if _is_list_column(row.cells[i] for row in sample if not row.error)]
    used = [names[i] for i in (columns.image, *columns.captions)]
    if columns.split is not None:
        used.append(names[columns.split])
    unused = [name or "(no name)" for i, name in enumerate(names)
              if i not in (columns.image, *columns.captions, columns.split, columns.folder)]
    description = f"{layout}: {', '.join(used)}" + (
        f"; not used: {', '.join(unused)}" if unused else "")
    # Plain tuples: a collection of garbage visits each named one, which doubles the time.
    captions = [tuple(caption) for row in chain(sample, rows)
                for caption in _caption_rows(row, columns, lists)]
    # As Python's strings: the string type of pandas depends on its version and has no surrogates.
    return pd.DataFrame(captions, columns=CaptionRow._fields, dtype=object), description


# --- bytes -> text ---------------------------------------------------------------------------


def decode(content: bytes) -> str:
    """Return the text of a file, with line ends as LF; bytes that are not UTF-8 become U+FFFD."""
    if content.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(MAX_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"cannot be decompressed: {error}") from error
        if len(content) > MAX_BYTES:
            raise ValueError(f"has more than {MAX_BYTES:,} bytes when decompressed")
    if content.startswith(b"PK\x03\x04"):
        raise ValueError("is a zip archive or an Excel table: unpack it, or save it as CSV")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError("is a Git LFS pointer instead of the file: run git lfs pull")
    encoding = "utf-8-sig"
    zeros = [content[start:1000:2].count(0) * 2000 // min(len(content) + 1, 1000)
             for start in (0, 1)]  # in 1,000 bytes of ASCII as UTF-16, every second one is 0
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-32" if content.startswith(codecs.BOM_UTF32_LE) else "utf-16"
    elif max(zeros) > 600 and min(zeros) < 100:
        encoding = "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    text = content.decode(encoding, errors="replace")
    # Not str.splitlines later on: it also splits at characters that occur within captions.
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- delimited text --------------------------------------------------------------------------


def _read_delimited(
    text: str, choose: Choose
) -> tuple[str, list[str], Columns, Iterator[FileRow]]:
    """Return the layout, the column names, the chosen columns and the rows of delimited text."""
    lines = text.split("\n")
    delimiter, names, columns, has_header = _find_columns(lines, choose)
    layout = {"\t": "table with tabs", " ": "list"}.get(delimiter, f"table with {delimiter}")
    rows = _delimited_rows(lines, delimiter, names, columns, has_header)
    return layout, names, columns, rows


def _find_columns(lines: list[str], choose: Choose) -> tuple[str, list[str], Columns, bool]:
    """Return the delimiter, the names and choice of the columns, and whether there is a header.

    Raises:
        ValueError: no delimiter makes a table of images and captions of the first lines, or the
            names of its columns say nothing.
    """
    sample = [line for line in lines[:500] if line.strip()][:100]
    for delimiter in sorted(DELIMITERS, key=sample[0].count, reverse=True):
        names = _distinct([cell.strip() for cell in _split(sample[0], delimiter)])
        columns = choose(names)
        if columns and len(names) > 1:
            counts = {len(_split(line, delimiter)) for line in sample[1:]}
            # Delimiters within captions would give rows of different lengths.
            if len(sample) > 2 and len(counts) == 1 and max(counts) > len(names):
                raise ValueError(f"has {max(counts)} cells in every row below a header of "
                                 f"{len(names)}: add the names that are missing")
            return delimiter, names, columns, True

    for delimiter in DELIMITERS:
        names = _split(sample[0], delimiter)
        if len(names) > 1 and not _image_cells(names, delimiter) and any(
                _key(name) in IMAGE_COLUMNS or _is_caption(_key(name)) for name in names):
            raise ValueError(_ask_for_columns("has a header that leaves a choice", names,
                                              _split((sample + [""])[1], delimiter)))

    # No known header. Which delimiter separates image names from other cells?
    tables = {}
    for delimiter in DELIMITERS + " ":
        tables[delimiter] = [cells for cells in (_split(line, delimiter) for line in sample)
                             if len(cells) > 1 and _image_cells(cells, delimiter)]
    delimiter = max(tables, key=lambda delimiter: len(tables[delimiter]))
    table = tables[delimiter]
    if 2 * len(table) < len(sample):
        known = "\n".join(f"  {form}   ({of})" for form, of in LAYOUTS.items())
        raise ValueError(f"is in no known caption layout. These are known:\n{known}\n"
                         "  name the columns of a table with --image-column and --caption-column")
    (count, frequency), = Counter(map(len, table)).most_common(1)
    first = _split(sample[0], delimiter)
    if not _image_cells(first, delimiter) and len(first) == count and table:
        raise ValueError(_ask_for_columns("has a header of unknown names", first, table[0]))
    numbered = sum(len(cells) > 2 and cells[1].strip().isdecimal() for cells in table)
    names = [str(i + 1) for i in range(count)]
    columns = choose(names)
    if columns is None and all(_image_cells(cells[:1], delimiter) for cells in table):
        if 2 * numbered >= len(table):
            names, columns = ["image_name", "comment_number", "comment"], Columns(0, [2], None)
        # Where rows have different numbers of cells, the captions contain the delimiter.
        elif count == 2 or frequency < 0.8 * len(table):
            names, columns = ["image", "caption"], Columns(0, [1], None)
    if columns is None:
        raise ValueError(_ask_for_columns("has no header", names, table[0]))
    return delimiter, names, columns, False


def _image_cells(cells: list[str], delimiter: str) -> bool:
    """Return whether a row has a cell like an image name; in a list with blanks the first one."""
    return any(IMAGE_NAME.fullmatch(cell.strip())
               for cell in (cells[:1] if delimiter == " " else cells))


def _ask_for_columns(reason: str, names: list[str], cells: list[Any]) -> str:
    """Return a message that shows the columns with a row of each and the flags to choose them."""
    names, texts = [name.strip() for name in names], [str(cell).strip() for cell in cells]
    columns = list(zip(names, texts, strict=False))
    keys = [_key(name) for name in names]
    image = next((name for name, key in zip(names, keys, strict=True) if key in IMAGE_COLUMNS),
                 next((name for name, text in columns if IMAGE_NAME.fullmatch(text)), names[0]))
    others = [(_is_caption(_key(name)), len(text), name) for name, text in columns if name != image]
    caption = max(others)[2] if others else "NAME"
    shown = "\n".join(f"  {name or '(no name)'}: {text[:60]!r}" for name, text in columns)
    return (f"{reason}: which columns are the image names and the captions?\n{shown}\n"
            f"  name them, as in --image-column {image!r} --caption-column {caption!r}")


def _split(line: str, delimiter: str) -> list[str]:
    """Return the cells of a row, with stray quotes as text."""
    return _parse(line, delimiter) or line.split(delimiter)


def _parse(line: str, delimiter: str, quoted: bool = True) -> list[str] | None:
    """Return the cells of a row; None where its quotes do not match."""
    if delimiter == " ":
        return line.split(None, 1)
    if not quoted or '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line.replace("\0", "\1")], delimiter=delimiter, strict=True,
                               skipinitialspace=delimiter in ",;"))
    except csv.Error:
        return None


def _logical_rows(
    lines: list[str], delimiter: str, columns: Columns, n_columns: int, quoted: bool
) -> Iterator[tuple[int, str, list[str] | None]]:
    """Yield the line number, the text and the cells of each row, None where quotes do not match.

    Rows are parsed one by one, since a CSV reader, that of pandas too, lets a stray quote take the
    following rows into one cell. Here a cell continues on the next line only if that is not a row.
    """
    def is_row(line: str) -> bool:
        if line.count('"') % 2 and columns.image > min(columns.captions):
            return False  # the end of a caption, followed by its image name
        cells = _split(line, delimiter)
        return len(cells) >= n_columns and bool(IMAGE_NAME.fullmatch(cells[columns.image].strip()))

    following = 0
    while following < len(lines):
        number, line = following + 1, lines[following]
        following += 1
        if not line.strip():
            continue
        cells = _parse(line, delimiter, quoted)
        if cells is None and line.count('"') % 2:
            for end in range(following, min(len(lines), following + MAX_CELL_LINES)):
                if is_row(lines[end]):
                    break
                if lines[end].count('"') % 2:  # the quote may be closed here
                    joined = "\n".join(lines[number - 1 : end + 1])
                    cells = _parse(joined, delimiter)
                    if cells is not None:
                        line, following = joined, end + 1
                    break
        yield number, line, cells


def _uses_quotes(lines: list[str], delimiter: str, columns: Columns, n_columns: int) -> bool:
    """Return whether quotes enclose cells; in Flickr30k's own files they are part of captions.

    In tables with tabs or pipes they enclose cells if each of them can be read so, and one cell
    needs them, for it contains a delimiter, a quote or a line end.
    """
    if delimiter in " ,;" or not any('"' in line for line in lines):
        return delimiter in ",;"
    cell = rf'(?:"[^"]*(?:""[^"]*)*"|[^"{re.escape(delimiter)}]*)'
    proper = re.compile(rf"{cell}(?:{re.escape(delimiter)}{cell})*")
    needed = False
    for _, line, cells in _logical_rows(lines, delimiter, columns, n_columns, quoted=True):
        if '"' in line:
            if cells is None or not proper.fullmatch(line):
                return False
            needed |= (any(c in cell for cell in cells for c in (delimiter, '"', "\n"))
                       or line.count('"') == 2 * len(cells))
    return needed


def _delimited_rows(
    lines: list[str], delimiter: str, names: list[str], columns: Columns, has_header: bool
) -> Iterator[FileRow]:
    """Yield the rows after the header, each with a cell for each column or with an error."""
    n = len(names)
    needed = 1 + max(columns.image, *columns.captions, columns.split or 0)
    caption_is_last = columns.captions == [n - 1]
    quoted = _uses_quotes(lines, delimiter, columns, n)
    rows = _logical_rows(lines, delimiter, columns, n, quoted)
    if has_header:
        next(rows)
    for number, line, cells in rows:
        fixed = error = ""
        if caption_is_last and (cells is None or len(cells) > n):
            # A caption in the last column extends to the end of the line, whatever it contains.
            rest = line.split(delimiter, n - 1)
            if len(rest) == n and '"' not in "".join(rest[:-1]):
                if quoted:
                    fixed = ("quotes that do not match" if cells is None
                             else f"a caption with {delimiter} but without quotes")
                cells = [*rest[:-1], _unquote(rest[-1]) if quoted else rest[-1]]
        elif caption_is_last and n > 2 and (len(cells) == n - 1 or not cells[-1].strip()):
            if len(cells) >= n - 1 and (found := NUMBER_AND_CAPTION.fullmatch(cells[n - 2])):
                cells = [*cells[: n - 1], found[1]]
                fixed = "the delimiter before the caption was missing"
        if cells is None:
            error = "quotes that do not match"
        elif len(cells) > n or len(cells) < needed:
            error = f"{len(cells)} cells in a table of {n} columns"
        elif (cells[columns.image].strip() == names[columns.image]
                and [cell.strip() for cell in cells] == names):
            error = "the header again"
        else:
            cells += [""] * (n - len(cells))
        yield FileRow(f"line {number}", cells or (), fixed, error, line if error else "")


def _unquote(cell: str) -> str:
    """Return a cell without the quotes around it."""
    cell = cell.strip()
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _distinct(names: list[str]) -> list[str]:
    """Return column names that differ, as pandas names them: caption, caption.1, caption.2."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        distinct.append(f"{name}.{seen[name]}" if name and seen[name] else name)
        seen[name] += 1
    return distinct


# --- JSON and parquet ------------------------------------------------------------------------


def _read_json(text: str, choose: Choose) -> tuple[str, list[str], Columns, Iterator[FileRow]]:
    """Return the layout, the field names, the chosen fields and the items of JSON."""
    try:
        layout, items = _json_items(json.loads(text, strict=False))
    except (ValueError, RecursionError) as error:
        lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1)
                 if line.strip()]
        if text.lstrip()[0] != "{" or _parse_json(lines[0][1]) is None:
            raise ValueError(f"is not JSON with captions: {error}") from error
        layout, items = "JSON lines", [(where, _parse_json(line) or line) for where, line in lines]
    return (layout, *_item_rows(items, choose))


def _parse_json(text: str) -> Any:
    """Return the value of JSON text, also with line ends in strings; None where it is not JSON."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _json_items(data: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Return the name of a layout of JSON and its items, each with its place.

    Raises:
        ValueError: it is none of the known layouts.
    """
    def places(kind: str, values: list) -> list[tuple[str, Any]]:
        return [(f"{kind} {number}", value) for number, value in enumerate(values, 1)]

    if isinstance(data, list):
        return "JSON list", places("item", data)
    keys = [_key(name) for name in data] if isinstance(data, dict) else []
    if any(key in IMAGE_COLUMNS for key in keys) and any(map(_is_caption, keys)):
        return "JSON object", places("item", [data])  # JSON lines of one line
    images, annotations = (data.get(key) if isinstance(data, dict) else None
                           for key in ("images", "annotations"))
    if isinstance(images, list) and isinstance(annotations, list):
        if annotations and not any(isinstance(item, dict) and "caption" in item
                                   for item in annotations):
            raise ValueError("annotations without captions; COCO has them in captions_*.json")
        names = {str(image["id"]): image.get("file_name") for image in images
                 if isinstance(image, dict) and "id" in image}
        return "COCO", places("annotation", [
            {"file_name": names.get(str(item.get("image_id"))), "caption": item.get("caption")}
            if isinstance(item, dict) else item for item in annotations])
    if isinstance(images, list):
        return "Karpathy's JSON", places("image", images)
    if isinstance(data, dict) and data:
        lists = {key: value for key, value in data.items() if isinstance(value, list)}
        items = {key: value for key, value in lists.items()
                 if any(isinstance(item, dict) for item in value)}
        if len(items) == len(data) and all(split_of(key) for key in data):
            return "JSON lists by split", [
                (f"{split} {number}", {**item, "split": split} if isinstance(item, dict) else item)
                for split, values in items.items() for number, item in enumerate(values, 1)]
        if len(items) == 1:
            (key, value), = items.items()
            return f"JSON list {key!r}", places("item", value)
        if all(isinstance(value, dict) for value in data.values()):
            return "JSON by image", [(f"key {key!r}", {"image": key, **value})
                                     for key, value in data.items()]
        if all(isinstance(value, str | list) for value in data.values()):
            return "JSON by image", [(f"key {key!r}", {"image": key, "captions": value})
                                     for key, value in data.items()]
    raise ValueError("no list of images or captions in it")


def _item_rows(
    items: list[tuple[str, Any]], choose: Choose
) -> tuple[list[str], Columns, Iterator[FileRow]]:
    """Return the field names of items, the chosen ones, and a row for each item.

    Raises:
        ValueError: the items have no fields of image names and captions.
    """
    fields = dict.fromkeys(str(name) for _, item in items[:1000] if isinstance(item, dict)
                           for name in item)
    names = list(fields)
    columns = choose(names)
    if columns is None:
        example = next((item for _, item in items if isinstance(item, dict) and item), None)
        raise ValueError(_ask_for_columns("has fields of unknown names", list(example),
                                          list(example.values()))
                         if example else "has no list of objects with captions in it")
    return names, columns, (
        FileRow(where, [item.get(name) for name in names]) if isinstance(item, dict)
        else FileRow(where, (), error="not an object", text=str(item)[:200])
        for where, item in items)


def _read_parquet(path: Path, choose: Choose) -> tuple[str, list[str], Columns, Iterator[FileRow]]:
    """Return the layout, the column names, the chosen columns and the rows of a parquet file.

    Only the chosen columns are read: the files of Hugging Face contain the images too.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError("is a parquet file, which is read with pyarrow: pip install pyarrow"
                         ) from error
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns = choose(names)
        if columns is None:
            raise ValueError(_ask_for_columns("has columns of unknown names", names,
                                              list(map(str, file.schema_arrow.types))))
        used = [names[i] for i in (columns.image, *columns.captions, columns.split, columns.folder)
                if i is not None]
        has_bytes = str(file.schema_arrow.field(columns.image).type).startswith("struct")
        items = file.read([f"{name}.path" if has_bytes and name == names[columns.image] else name
                           for name in used]).to_pylist()
    except ArrowException as error:
        raise ValueError(f"is a damaged parquet file: {error}") from error
    rows = (FileRow(f"row {number}", [item.get(name) for name in names])
            for number, item in enumerate(items, 1))
    return "parquet", names, columns, rows


# --- columns ---------------------------------------------------------------------------------


def choose_columns(
    names: list[str], image_column: str | None = None, caption_columns: Sequence[str] = (),
    split_column: str | None = None,
) -> Columns | None:
    """Find the columns of image names, captions and splits; see `read_table` for the arguments.

    Returns:
        None where a column that is asked for is missing, or no name is that of an image or a
        caption column.
    """
    keys = [_key(name) for name in names]

    def given(name: str) -> int | None:
        return next((i for i, other in enumerate(names) if other.strip() == name.strip()), None)

    if image_column:
        image = given(image_column)
    else:
        image = next((keys.index(key) for key in IMAGE_COLUMNS if key in keys), None)
    captions: list[int | None] = [given(name) for name in caption_columns]
    for stem in CAPTION_COLUMNS if not caption_columns else ():
        captions = [i for i, key in enumerate(keys) if _is_caption(key, stem) and i != image]
        if captions:
            break
    split = given(split_column or "split")
    if split is None and not split_column:
        split = keys.index("split") if "split" in keys else None
    if image is None or not captions or None in captions or (split_column and split is None):
        return None
    folder = keys.index("filepath") if keys[image] == "filename" and "filepath" in keys else None
    return Columns(image, captions, split, folder)


def _key(name: str) -> str:
    """Return a column name in lower case without blanks and underscores."""
    return re.sub(r"[\W_]", "", name).casefold()


def _is_caption(key: str, stems: str = "|".join(CAPTION_COLUMNS)) -> bool:
    """Return whether `key` is one of the known names of captions, maybe with an s or a number."""
    return bool(re.fullmatch(rf"(?:{stems})s?\d*", key))


# --- captions --------------------------------------------------------------------------------


def _caption_rows(row: FileRow, columns: Columns, lists: list[int]) -> Iterator[CaptionRow]:
    """Yield the captions of a row of the file, or one row with its error.

    Args:
        row: the row.
        columns: the columns that are read.
        lists: those of the caption columns whose cells are lists.
    """
    if row.error:
        yield CaptionRow(row.where, "", row.text, error=row.error)
        return
    image = row.cells[columns.image]
    if isinstance(image, dict):  # as the datasets library stores it
        image = image.get("path")
    name = "" if image is None else str(image)
    folder = row.cells[columns.folder] if columns.folder is not None else ""
    if folder and isinstance(folder, str) and not folder.endswith(name):
        name = f"{folder}/{name}"
    split = row.cells[columns.split] if columns.split is not None else ""
    split = "" if split is None else str(split)
    if not isinstance(image, str | int):
        yield CaptionRow(row.where, name, _shorten(row.cells), split, error="no image name")
        return
    found = False
    for i in columns.captions:
        cell = row.cells[i]
        if cell is None or cell == "":  # of several columns some may be empty
            continue
        found = True
        captions = _parse_list(cell) if i in lists and isinstance(cell, str) else cell
        if isinstance(captions, str | dict):
            captions = [captions]
        if not isinstance(captions, list) or not captions:
            yield CaptionRow(row.where, name, _shorten(cell), split,
                             error="not a list of captions")
            continue
        for caption in captions:
            if isinstance(caption, dict):  # a sentence with its tokens
                fields = {key.casefold(): value for key, value in caption.items()}
                caption = next((fields[key] for key in CAPTION_COLUMNS if key in fields), None)
            if isinstance(caption, str):
                yield CaptionRow(row.where, name, caption, split, row.fixed)
            else:
                yield CaptionRow(row.where, name, _shorten(caption), split,
                                 error="a caption that is not text")
    if not found:
        yield CaptionRow(row.where, name, "", split, error="empty caption")


def _shorten(value: Any) -> str:
    """Return a value of any type as text of at most 200 characters."""
    return str(value)[:200]


def _is_list_column(cells: Iterable[Any]) -> bool:
    """Return whether most cells of text are lists of captions, as JSON or as Python prints it."""
    texts = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    return 2 * sum(_parse_list(text) is not None for text in texts) > len(texts)


def _parse_list(text: str) -> list | None:
    """Return the list that a cell contains; None where it is not a list, or an empty one.

    JSON, a list of Python, and an array of NumPy, whose strings are not separated by commas.
    """
    text = text.strip()
    if text[:1] != "[" or text[-1:] != "]":
        return None
    values = _parse_json(text)
    if values is None and STRING_LIST.fullmatch(text):
        strings = [string.replace("\n", "\\n") for string in re.findall(STRING, text, re.DOTALL)]
        with warnings.catch_warnings():  # of escapes such as \d, which are read as they are
            warnings.simplefilter("ignore")
            try:
                values = list(map(ast.literal_eval, strings))
            except (SyntaxError, ValueError):  # an incomplete escape such as \x
                return None
    return values if isinstance(values, list) and values else None


SPLITS = {"train": "train", "val": "val", "valid": "val", "dev": "val", "test": "test"}
SPLITS |= {"training": "train", "validation": "val", "development": "val", "testing": "test",
           # Karpathy's restval images are in no one's test; everyone trains on them.
           "restval": "train"}


def split_of(text: str) -> str | None:
    """Return 'train', 'val' or 'test' for one of its names; '' for no text, None for another."""
    text = text.strip().casefold()
    return SPLITS.get(text) if text else ""


def split_of_file(path: Path) -> str:
    """Return the split in a file's name, such as captions_val2017.json; '' for none or several."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", path.name)  # trainImages are two words
    found = {split_of(word) for word in words} - {None}
    return found.pop() if len(found) == 1 else ""
