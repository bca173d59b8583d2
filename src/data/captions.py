"""Captions of a dataset: one record per image, and everything that was fixed or rejected.

Each row of a caption file ends as a caption of a record or as a rejected row with its reason.
src/data/caption_files.py reads the layouts of the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pandas as pd

from src.data.caption_files import IMAGE_SUFFIX, read_table, split_of, split_of_file
from src.utils.errors import UserError

# A caption number at the end of an image name: 1000092795.jpg#0, or 1000092795.jpg#zhb#0.
CAPTION_NUMBER = re.compile(r"(.+?)(?:#[A-Za-z]\w*)?#\d+")
SURROGATES = re.compile("[\ud800-\udfff]")
NOT_A_CAPTION = re.compile(rf"\S*{IMAGE_SUFFIX}|[\d.,:\s-]+", re.IGNORECASE)
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True)
class ImageRecord:
    """One image: its path below the image folder, its captions, its split ('' where none is given).
    """

    name: str
    captions: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class DataIssue:
    """A row, image or file that was fixed or rejected, and why."""

    where: str
    name: str
    reason: str
    text: str = ""


@dataclass
class Annotations:
    """The captions of one or several files.

    Attributes:
        format: layout and columns of the files, for users.
        records: one for each image, in the order of the files.
        rows: number of captions in the files: those of all records, and the rejected ones.
        fixed: captions of records that had to be repaired.
        rejected: rows that are not in a record.
        repeated: captions that their image has already. They are kept, as two people may have
            written them, and published recall counts every caption.
        renamed: images that were found by another name than that of the caption file.
        warnings: what is likely a mistake of the whole file.
    """

    format: str
    records: list[ImageRecord]
    rows: int
    fixed: list[DataIssue] = field(default_factory=list)
    rejected: list[DataIssue] = field(default_factory=list)
    repeated: list[DataIssue] = field(default_factory=list)
    renamed: list[DataIssue] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def has_split(self) -> bool:
        """Whether the files say which images are for training."""
        return any(record.split for record in self.records)


def read_annotations(
    paths: Path | Sequence[Path], image_column: str | None = None,
    caption_columns: Sequence[str] = (), split_column: str | None = None,
    match_image_names: Callable[[list[str]], dict[str, str]] | None = None,
) -> Annotations:
    """Read caption files of any known layout.

    With several files, one without a column of splits takes its split from the file's name.

    Args:
        paths: one file or several.
        image_column, caption_columns, split_column: see `read_table`; None or empty to find the
            columns by their names.
        match_image_names: from image names of the files to names below the image folder, for those
            where they differ.

    Raises:
        UserError: a file does not exist, cannot be read, or is in no known layout.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    tables, layouts = [], []
    for path in map(Path, paths):
        try:
            table, layout = read_table(path, image_column, caption_columns, split_column)
        except FileNotFoundError as error:
            raise UserError(f"there is no caption file {path}") from error
        except OSError as error:
            raise UserError(f"cannot read the caption file {path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path} {error}") from error
        names = _clean_names(table["image"].unique())
        table["image"] = [names[text] for text in table["image"]]
        if len(paths) > 1:
            table["where"] = f"{path.name} " + table["where"]
            if not table["split"].any():
                table["split"] = split_of_file(path)
        tables.append(table)
        layouts.append(layout)
    has_split = [bool(table["split"].any()) for table in tables]
    if any(has_split) and not all(has_split):
        raise UserError(f"cannot tell the split of {paths[has_split.index(False)]}: the names of "
                        "all caption files must contain train, val or test, or those of none")
    table = pd.concat(tables, ignore_index=True)
    found = match_image_names(table["image"].unique().tolist()) if match_image_names else {}
    return _collect(table, "; ".join(dict.fromkeys(layouts)), found)


def _clean_names(texts: Iterable[str]) -> dict[str, str]:
    """Return the image name of each text in a column of image names."""
    names = {text: SURROGATES.sub("\ufffd", text.strip()) for text in texts}
    numbered = {text: match[1] for text, name in names.items()
                if (match := CAPTION_NUMBER.fullmatch(name))}
    if 2 * len(numbered) > len(names):
        names |= numbered
    # ./a.jpg and a.jpg are one image; as two it could be in training and validation.
    return {text: str(PurePosixPath(name)) if "/" in name else name for text, name in names.items()}


def _name_error(name: str) -> str:
    """Return why `name` cannot be an image below the image folder; '' if it can."""
    if name in ("", "."):
        return "no image name"
    if "\ufffd" in name:
        return "image name that is not UTF-8"
    if "\\" in name or CONTROL_CHARACTERS.search(name):
        return "image name with a backslash or a control character"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in PurePosixPath(name).parts:
        return "image name that leads out of the image folder"
    return ""


def _collect(table: pd.DataFrame, layout: str, found: dict[str, str]) -> Annotations:
    """Put each row of a table into a record or into the rejected rows.

    Args:
        table: with the columns of CaptionRow.
        layout: for users.
        found: the images whose name on disk is another one, with that name.
    """
    result = Annotations(layout, [], len(table))
    errors = {name: "" if name in found else _name_error(name)
              for name in table["image"].unique()}
    splits = {text: split_of(text) for text in table["split"].unique()}
    records: dict[str, tuple[list[str], str]] = {}  # name -> captions, split
    seen: set[tuple[str, str]] = set()
    for where, name, caption, split, fixed, error in table.itertuples(index=False, name=None):
        caption = clean = caption.strip()
        if not caption.isprintable():
            clean = SURROGATES.sub("\ufffd", caption)
            clean = CONTROL_CHARACTERS.sub(" ", clean).strip()
        if "\ufffd" in clean:
            fixed = fixed or "characters that are not UTF-8 replaced"
        elif clean != caption:
            fixed = fixed or "control characters removed"
        error = error or errors[name]
        if not error and not clean:
            error = "empty caption"
        if not error and splits[split] is None:
            error = f"unknown split {split!r}"
        captions, known_split = records.get(found.get(name, name), ([], splits[split]))
        if not error and known_split != splits[split]:
            error = f"image is already in split {known_split!r}"
        if error:
            result.rejected.append(DataIssue(where, name, error, caption))
            continue
        if fixed:
            result.fixed.append(DataIssue(where, name, fixed, caption))
        if not captions:
            records[found.get(name, name)] = captions, known_split
            if name in found:
                result.renamed.append(DataIssue(where, name, f"found as {found[name]}"))
        if (name, clean) in seen:
            result.repeated.append(
                DataIssue(where, name, "the image has this caption twice", clean))
        seen.add((name, clean))
        captions.append(clean)
    result.records = [ImageRecord(name, tuple(captions), split)
                      for name, (captions, split) in records.items()]
    result.warnings = _warn_about_captions(result.records[:1000])
    return result


def _warn_about_captions(records: list[ImageRecord]) -> list[str]:
    """Return a warning where most captions are file names or numbers."""
    captions = [caption for record in records for caption in record.captions]
    odd = [caption for caption in captions if NOT_A_CAPTION.fullmatch(caption)]
    return [f"most captions look like file names or numbers, such as {odd[0]!r}; "
            "--caption-column chooses another column"] if 2 * len(odd) > len(captions) else []
