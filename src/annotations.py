"""Any caption file of Flickr30k -> image records with captions and a split.

Nothing is lost silently: every row of the file ends up in a record or in the list of rejected rows,
and rows that had to be mended are listed too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from src.caption_formats import Row, read_rows
from src.errors import UserError

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


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
    """What a caption file held. `rows` counts captions: rows == captions in records + rejected.

    Recovered and repeated captions are in the records. A photo that says the same twice keeps both:
    two people may have written it, and published recall counts every caption.
    """

    format: str
    records: list[ImageRecord]
    rows: int
    recovered: list[Remark] = field(default_factory=list)
    rejected: list[Remark] = field(default_factory=list)
    repeated: list[Remark] = field(default_factory=list)

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
    books = _Books()
    for row in rows:
        books.enter(row)
    return books.close(layout)


class _Books:
    """Gathers captions by photo, in the file's order, and accounts for every row."""

    def __init__(self) -> None:
        self.captions: dict[str, list[str]] = {}
        self.seen: dict[str, set[str]] = {}
        self.splits: dict[str, str] = {}
        self.rows = 0
        self.recovered: list[Remark] = []
        self.rejected: list[Remark] = []
        self.repeated: list[Remark] = []

    def enter(self, row: Row) -> None:
        """Put one row's caption with its photo's, or the row with the rejected ones."""
        self.rows += 1
        if row.bad:
            self.rejected.append(Remark(row.where, row.name, row.bad, row.caption))
            return
        name, caption, mended = row.name.strip(), row.caption.strip(), row.mended
        if "/" in name:  # ./a.jpg and a.jpg are one photo: as two it could train and validate
            name = str(PurePosixPath(name))
        clean = caption if caption.isprintable() else CONTROL_CHARACTERS.sub(" ", caption).strip()
        if "\ufffd" in caption:
            mended = mended or "bytes that are not UTF-8 replaced"
        elif clean != caption:
            mended = mended or "control characters removed"
        reason = "" if name in self.captions else _bad_name(name)
        if not reason and not clean:
            reason = "empty caption"
        if not reason and self.splits.setdefault(name, row.split) != row.split:
            reason = f"photo is already in split {self.splits[name]!r}"
        if reason:
            self.rejected.append(Remark(row.where, name, reason, caption))
            return
        if mended:
            self.recovered.append(Remark(row.where, name, mended, caption))
        seen = self.seen.setdefault(name, set())
        if clean in seen:
            self.repeated.append(Remark(row.where, name, "the photo has this caption twice", clean))
        seen.add(clean)
        self.captions.setdefault(name, []).append(clean)

    def close(self, layout: str) -> Annotations:
        """The records, and what the rows came to."""
        records = [
            ImageRecord(name, tuple(captions), self.splits[name])
            for name, captions in self.captions.items()
        ]
        return Annotations(
            layout, records, self.rows, self.recovered, self.rejected, self.repeated)


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
