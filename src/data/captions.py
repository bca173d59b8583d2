"""Any caption file of Flickr30k -> image records with captions and a split.

Nothing is lost silently: every row of the file ends up in a record or in the list of rejected rows,
and rows that had to be fixed are listed too. The format is told from the content, never from the
file's name.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from src.utils.errors import UserError

FORMATS = {
    "results.csv": "image_name| comment_number| comment   (Kaggle's Flickr30k)",
    ".token": "image.jpg#0<tab>caption   (the original Flickr8k and Flickr30k)",
    "captions.txt": "image,caption   (Kaggle's Flickr8k)",
    "flickr_annotations_30k.csv": "raw,sentids,split,filename,img_id   (Hugging Face)",
    "dataset_flickr30k.json": '{"images": [{"filename", "split", "sentences"}]}   (Karpathy)',
}
# Karpathy's "restval" photos belong to nobody's test: everyone trains on them.
SPLITS = {"train": "train", "restval": "train", "val": "val", "dev": "val",
          "validation": "val", "test": "test"}
PIPE_ROW = re.compile(r"([^|]*)\|\s*(\d+)\s*\|(.*)", re.DOTALL)
PIPE_ROW_WITHOUT_SECOND_PIPE = re.compile(r"([^|]*)\|\s*(\d+)\s([^|]*)", re.DOTALL)
PIPE_HEADER = re.compile(r"\s*image_name\s*\|\s*comment_number\s*\|\s*comment\s*")
TOKEN_ROW = re.compile(r"([^\t]*)#(\d+)\t(.*)", re.DOTALL)
COMMA_ROW = re.compile(r'([^,|\t"]*\.\w+)\s*,(.*)', re.DOTALL)
COMMA_HEADER = re.compile(r"\s*image(_name)?\s*,\s*caption\s*", re.IGNORECASE)
SURROGATES = re.compile("[\ud800-\udfff]")
csv.field_size_limit(2**31 - 1)  # five captions of 10,000 words are longer than its 131,072
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True)
class ImageRecord:
    """One photo: its name below the image folder, its captions, its split ('' = none given)."""

    name: str
    captions: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class DataIssue:
    """A row, photo or file that was fixed or rejected, and why."""

    where: str
    name: str
    reason: str
    text: str = ""


@dataclass
class Annotations:
    """What a caption file held. `rows` counts captions: rows == captions in records + rejected.

    Recovered and repeated captions are in the records. A photo that says the same twice keeps both:
    two people may have written it, and published recall counts every caption.
    """

    format: str
    records: list[ImageRecord]
    rows: int
    fixed: list[DataIssue] = field(default_factory=list)
    rejected: list[DataIssue] = field(default_factory=list)
    repeated: list[DataIssue] = field(default_factory=list)

    @property
    def has_split(self) -> bool:
        """Whether the file itself says which photos are for training."""
        return any(record.split for record in self.records)


def read_annotations(path: Path) -> Annotations:
    """Read a caption file in any known format; LF or CRLF, BOM or not; quotes are text.

    Raises:
        UserError: no such file, an empty one, or one in no known format.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no caption file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read the caption file {path}: {error.strerror}") from error
    text = content.decode("utf-8-sig", errors="replace")
    # Not str.splitlines later on: it would also cut at characters that stand inside captions.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"the caption file {path} is empty")
    try:
        layout, rows = read_rows(text)
    except ValueError as error:
        raise UserError(f"{path} {error}") from error
    collector = _Collector()
    for row in rows:
        collector.add(row)
    return collector.finish(layout)


class _Collector:
    """Gathers captions by photo, in the file's order, and accounts for every row."""

    def __init__(self) -> None:
        self.captions: dict[str, list[str]] = {}
        self.seen: dict[str, set[str]] = {}
        self.splits: dict[str, str] = {}
        self.rows = 0
        self.fixed: list[DataIssue] = []
        self.rejected: list[DataIssue] = []
        self.repeated: list[DataIssue] = []

    def add(self, row: Row) -> None:
        """Put one row's caption with its photo's, or the row with the rejected ones."""
        self.rows += 1
        if row.error:
            self.rejected.append(DataIssue(row.where, row.name, row.error, row.caption))
            return
        name, caption, fixed = row.name.strip(), row.caption.strip(), row.fixed
        if "/" in name:  # ./a.jpg and a.jpg are one photo: as two it could train and validate
            name = str(PurePosixPath(name))
        clean = caption if caption.isprintable() else CONTROL_CHARACTERS.sub(" ", caption).strip()
        if "\ufffd" in caption:
            fixed = fixed or "bytes that are not UTF-8 replaced"
        elif clean != caption:
            fixed = fixed or "control characters removed"
        reason = "" if name in self.captions else _bad_name(name)
        if not reason and not clean:
            reason = "empty caption"
        if not reason and self.splits.setdefault(name, row.split) != row.split:
            reason = f"photo is already in split {self.splits[name]!r}"
        if reason:
            self.rejected.append(DataIssue(row.where, name, reason, caption))
            return
        if fixed:
            self.fixed.append(DataIssue(row.where, name, fixed, caption))
        seen = self.seen.setdefault(name, set())
        if clean in seen:
            self.repeated.append(DataIssue(row.where, name, "the photo has this caption twice", clean))
        seen.add(clean)
        self.captions.setdefault(name, []).append(clean)

    def finish(self, layout: str) -> Annotations:
        """The records, and what the rows came to."""
        records = [
            ImageRecord(name, tuple(captions), self.splits[name])
            for name, captions in self.captions.items()
        ]
        return Annotations(
            layout, records, self.rows, self.fixed, self.rejected, self.repeated)


def _bad_name(name: str) -> str:
    """Why `name` cannot be a photo below the image folder; '' if it can."""
    if name in ("", "."):
        return "no photo name"
    if "\ufffd" in name:
        return "photo name that is not UTF-8"
    if "\\" in name or CONTROL_CHARACTERS.search(name):
        return "photo name with a backslash or a control character"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in PurePosixPath(name).parts:
        return "photo name that leads out of the image folder"
    return ""


class Row(NamedTuple):
    """One caption as it stands in the file; with a `error` it is none."""

    where: str
    name: str
    caption: str
    split: str = ""
    fixed: str = ""
    error: str = ""


def read_rows(text: str) -> tuple[str, Iterator[Row]]:
    """The format of `text`, a key of FORMATS, and its rows in order; lines end in LF.

    Raises:
        ValueError: not in a known format, or JSON of another form.
    """
    layout = _detect_format(text)
    if layout == "dataset_flickr30k.json":
        return layout, _karpathy_rows(_karpathy_photos(text))
    if layout == "flickr_annotations_30k.csv":
        return layout, _hugging_face_rows(text)
    if layout:
        return layout, _line_rows(text, layout)
    known = "\n".join(f"  {layout}" for layout in FORMATS.values())
    raise ValueError(f"is in no known caption format. These are known:\n{known}")


def _detect_format(text: str) -> str:
    """The key of FORMATS that `text` looks like, or '' for none."""
    start = text.lstrip()
    if start[0] in "{[":
        return "dataset_flickr30k.json"
    lines = [line for line in text[:100_000].split("\n") if line.strip()][:50]
    header = {column.strip().strip('"') for column in lines[0].split(",")}
    if {"raw", "filename"} <= header:
        return "flickr_annotations_30k.csv"
    patterns = {
        "results.csv": (PIPE_HEADER, PIPE_ROW, PIPE_ROW_WITHOUT_SECOND_PIPE),
        ".token": (TOKEN_ROW,),
        "captions.txt": (COMMA_HEADER, COMMA_ROW),
    }
    votes = Counter(
        layout
        for line in lines
        for layout, shapes in patterns.items()
        if any(shape.fullmatch(line) for shape in shapes)
    )
    return votes.most_common(1)[0][0] if votes else ""


def _line_rows(text: str, layout: str) -> Iterator[Row]:
    """The three formats with one caption a line."""
    header, row = {
        "results.csv": (PIPE_HEADER, PIPE_ROW),
        ".token": (None, TOKEN_ROW),
        "captions.txt": (COMMA_HEADER, COMMA_ROW),
    }[layout]
    form = FORMATS[layout].split("   ")[0]
    header_may_come = header is not None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if header_may_come and header.fullmatch(line):
            header_may_come = False
            continue
        header_may_come = False
        where = f"line {number}"
        match = row.fullmatch(line)
        if match:
            caption = match[match.lastindex]
            yield Row(where, match[1], _unquote(caption) if layout == "captions.txt" else caption)
        elif layout == "results.csv" and (match := PIPE_ROW_WITHOUT_SECOND_PIPE.fullmatch(line)):
            # Flickr30k's well-known broken row: `2199200615.jpg| 4   A dog runs across the grass .`
            yield Row(where, match[1], match[3], fixed="the second | was missing")
        else:
            yield Row(where, "", line, error=f"not a row of the form {form}")


def _unquote(cell: str) -> str:
    """A CSV cell's text. A row is one line here, so a stray quote cannot swallow its neighbours."""
    cell = cell.strip()
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def _hugging_face_rows(text: str) -> Iterator[Row]:
    """CSV with one photo a row and its captions as a JSON list.

    A row is one line, as JSON escapes line ends; so a stray quote spoils its own row alone. (pandas
    drops rows with such quotes without telling.)
    """
    columns: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        cells = next(csv.reader([line.replace("\x00", " ")], skipinitialspace=True))
        if not columns:
            columns = [cell.strip() for cell in cells]
            continue
        if len(cells) > len(columns):
            yield Row(where, "", line, error="more cells than the header")
            continue
        row = {"filename": "", "raw": "", "split": "", **dict(zip(columns, cells, strict=False))}
        try:
            captions = json.loads(row["raw"])
        except (ValueError, RecursionError):
            captions = None
        yield from _photo_rows(where, row["filename"], captions, row["split"], row["raw"])


def _karpathy_photos(text: str) -> list:
    """The list of photos in Karpathy's JSON. Raises ValueError where there is none."""
    try:
        photos = json.loads(text)["images"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise ValueError(f'is not JSON of the form {{"images": [...]}}: {error}') from error
    if not isinstance(photos, list):
        raise ValueError('is not a caption file: its "images" is not a list')
    return photos


def _karpathy_rows(photos: list) -> Iterator[Row]:
    """Karpathy's photos with their sentences and split."""
    for number, photo in enumerate(photos, start=1):
        where = f"image {number}"
        if not isinstance(photo, dict) or not isinstance(photo.get("sentences"), list):
            yield Row(where, "", str(photo)[:200], error="not an object with sentences")
            continue
        captions = [sentence.get("raw") if isinstance(sentence, dict) else None
                    for sentence in photo["sentences"]]
        folder, name = photo.get("filepath", ""), photo.get("filename", "")
        if folder and isinstance(folder, str):
            name = f"{folder}/{name}"  # COCO's photos lie in train2014/ and val2014/
        yield from _photo_rows(where, name, captions, photo.get("split", ""), str(captions)[:200])


def _photo_rows(
    where: str, name: object, captions: object, split: object, text: str
) -> Iterator[Row]:
    """All captions of one photo, checking what JSON may hold instead of them."""
    if isinstance(name, str):
        # JSON's escapes can bring halves of surrogate pairs, which no file name and no screen takes
        name = SURROGATES.sub("\ufffd", name)
    if not isinstance(name, str) or not isinstance(captions, list) or not captions:
        yield Row(where, str(name), text, error="not a photo name with a list of captions")
        return
    if split and (not isinstance(split, str) or split.strip() not in SPLITS):
        for _ in captions:
            yield Row(where, name, text, error=f"unknown split {split!r}")
        return
    split = SPLITS[split.strip()] if split else ""
    for caption in captions:
        if isinstance(caption, str):
            yield Row(where, name, SURROGATES.sub("\ufffd", caption), split)
        else:
            yield Row(where, name, str(caption), error="a caption that is not text")
