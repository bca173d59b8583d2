"""Any caption file of Flickr30k -> image records with captions and a split.

The format is told from the content, never from the file's name. Nothing is lost silently: every
row of the file ends up in a record or in the list of rejected rows, and rows that had to be mended
are listed too.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from src.errors import UserError

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
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
SURROGATES = re.compile("[\ud800-\udfff]")
csv.field_size_limit(2**31 - 1)  # five captions of 10,000 words are longer than its 131,072


@dataclass(frozen=True)
class ImageRecord:
    """One photo: its name below the image folder, its captions, its split ('' = none given)."""

    name: str
    captions: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class Remark:
    """A row, photo or file that was mended or rejected, and why."""

    where: str
    name: str
    reason: str
    text: str = ""


@dataclass
class Annotations:
    """What a caption file held. `rows` counts captions: rows == captions in records + rejected."""

    format: str
    records: list[ImageRecord]
    rows: int
    recovered: list[Remark] = field(default_factory=list)
    rejected: list[Remark] = field(default_factory=list)

    @property
    def has_split(self) -> bool:
        """Whether the file itself says which photos are for training."""
        return any(record.split for record in self.records)


def read_annotations(path: Path) -> Annotations:
    """Read a caption file in any of the `FORMATS`; LF or CRLF, BOM or not; quotes are text.

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
    collector = _Collector()
    layout = _detect_format(text)
    if layout == "dataset_flickr30k.json":
        _read_karpathy(text, collector, path)
    elif layout == "flickr_annotations_30k.csv":
        _read_hugging_face(text, collector)
    elif layout:
        _read_lines(text, layout, collector)
    else:
        known = "\n".join(f"  {layout}" for layout in FORMATS.values())
        raise UserError(f"{path} is in no known caption format. These are known:\n{known}")
    return collector.finish(layout)


class _Collector:
    """Gathers captions by photo, in the file's order, and keeps the books."""

    def __init__(self) -> None:
        self.captions: dict[str, list[str]] = {}
        self.splits: dict[str, str] = {}
        self.rows = 0
        self.recovered: list[Remark] = []
        self.rejected: list[Remark] = []

    def add(self, where: str, name: str, caption: str, split: str = "", mended: str = "") -> None:
        self.rows += 1
        name = name.strip()
        if "/" in name:  # ./a.jpg and a.jpg are one photo: as two it could train and validate
            name = str(PurePosixPath(name))
        caption = caption.strip()
        clean = caption if caption.isprintable() else CONTROL_CHARACTERS.sub(" ", caption).strip()
        if "\ufffd" in caption:
            mended = mended or "bytes that are not UTF-8 replaced"
        elif clean != caption:
            mended = mended or "control characters removed"
        reason = "" if name in self.captions else _bad_name(name)
        if not reason and not clean:
            reason = "empty caption"
        if not reason and self.splits.setdefault(name, split) != split:
            reason = f"photo is already in split {self.splits[name]!r}"
        if reason:
            self.rejected.append(Remark(where, name, reason, caption))
            return
        if mended:
            self.recovered.append(Remark(where, name, mended, caption))
        self.captions.setdefault(name, []).append(clean)

    def reject(self, where: str, name: str, reason: str, text: str = "", rows: int = 1) -> None:
        self.rows += rows
        self.rejected.extend(Remark(where, name, reason, text) for _ in range(rows))

    def finish(self, layout: str) -> Annotations:
        records = [
            ImageRecord(name, tuple(captions), self.splits[name])
            for name, captions in self.captions.items()
        ]
        return Annotations(layout, records, self.rows, self.recovered, self.rejected)


def _bad_name(name: str) -> str:
    """Why `name` cannot be a photo below the image folder; '' if it can."""
    if not name:
        return "no photo name"
    if "\x00" in name or "\\" in name:
        return "photo name with a NUL or a backslash"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in PurePosixPath(name).parts:
        return "photo name that leads out of the image folder"
    return ""


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


def _read_lines(text: str, layout: str, collector: _Collector) -> None:
    """The three formats with one caption a line."""
    header, row = {
        "results.csv": (PIPE_HEADER, PIPE_ROW),
        ".token": (None, TOKEN_ROW),
        "captions.txt": (COMMA_HEADER, COMMA_ROW),
    }[layout]
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
            if layout == "captions.txt":
                caption = _unquote(caption)
            collector.add(where, match[1], caption)
        elif layout == "results.csv" and (match := PIPE_ROW_WITHOUT_SECOND_PIPE.fullmatch(line)):
            # Flickr30k's well-known broken row: `2199200615.jpg| 4   A dog runs across the grass .`
            collector.add(where, match[1], match[3], mended="the second | was missing")
        else:
            collector.reject(where, "", f"not a row of the form {FORMATS[layout].split('   ')[0]}",
                             line)


def _unquote(cell: str) -> str:
    """A CSV cell's text. A row is one line here, so a stray quote cannot swallow its neighbours."""
    cell = cell.strip()
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def _read_hugging_face(text: str, collector: _Collector) -> None:
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
            collector.reject(where, "", "more cells than the header", line)
            continue
        row = {"filename": "", "raw": "", "split": "", **dict(zip(columns, cells, strict=False))}
        try:
            captions = json.loads(row["raw"])
        except (ValueError, RecursionError):
            captions = None
        _add_photo(collector, where, row["filename"], captions, row["split"], row["raw"])


def _read_karpathy(text: str, collector: _Collector, path: Path) -> None:
    """Karpathy's JSON: photos with their sentences and split."""
    try:
        photos = json.loads(text)
        photos = photos["images"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise UserError(f'{path} is not JSON of the form {{"images": [...]}}: {error}') from error
    if not isinstance(photos, list):
        raise UserError(f'{path}: "images" is not a list')
    for number, photo in enumerate(photos, start=1):
        where = f"image {number}"
        if not isinstance(photo, dict) or not isinstance(photo.get("sentences"), list):
            collector.reject(where, "", "not an object with sentences", str(photo)[:200])
            continue
        captions = [sentence.get("raw") if isinstance(sentence, dict) else None
                    for sentence in photo["sentences"]]
        folder, name = photo.get("filepath", ""), photo.get("filename", "")
        if folder and isinstance(folder, str):
            name = f"{folder}/{name}"  # COCO's photos lie in train2014/ and val2014/
        _add_photo(collector, where, name, captions, photo.get("split", ""), str(captions)[:200])


def _add_photo(collector: _Collector, where: str, name: object, captions: object, split: object,
               text: str) -> None:
    """Add all captions of one photo, checking what JSON may hold instead of them."""
    if isinstance(name, str):
        # JSON's escapes can bring halves of surrogate pairs, which no file name and no screen takes
        name = SURROGATES.sub("\ufffd", name)
    if not isinstance(name, str) or not isinstance(captions, list) or not captions:
        collector.reject(where, str(name), "not a photo name with a list of captions", text)
        return
    if split and (not isinstance(split, str) or split.strip() not in SPLITS):
        collector.reject(where, name, f"unknown split {split!r}", text, rows=len(captions))
        return
    split = SPLITS[split.strip()] if split else ""
    for caption in captions:
        if isinstance(caption, str):
            collector.add(where, name, SURROGATES.sub("\ufffd", caption), split)
        else:
            collector.reject(where, name, "a caption that is not text", str(caption))
