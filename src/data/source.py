"""Captions matched with the image files on disk, and split by image.

A split by caption would put 99.99 % of Flickr30k's validation captions next to a training caption
of the same image, and the recall would measure memory.
"""

from __future__ import annotations

import hashlib
import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

from src.data.caption_files import decode, split_of_file
from src.data.captions import Annotations, DataIssue, ImageRecord, read_annotations
from src.utils.errors import UserError, counted
from src.utils.script import status


@dataclass
class DataSource:
    """Caption files matched with the image files, and split.

    Attributes:
        images: the image folder.
        annotations: what the caption files hold.
        splits: 'train', 'val' and 'test' -> the records whose image file exists.
        missing: images that have captions but no file.
        unused: image files without a caption.
        unlisted: images that are in none of the split files, and so in no split.
        follow_links: whether images may be links to files outside the folder.
    """

    images: Path
    annotations: Annotations
    splits: dict[str, list[ImageRecord]]
    missing: list[DataIssue]
    unused: list[str]
    unlisted: list[DataIssue] = field(default_factory=list)
    follow_links: bool = False

    def explain_no_validation(self) -> str:
        """Return why no image validates, and what to do; '' if one does."""
        if self.splits["val"]:
            return ""
        counts = ", ".join(f"{split} {len(records):,}" for split, records in self.splits.items())
        if self.missing:
            counts += f", missing {len(self.missing):,}"
        origin = "the split of the caption file" if self.annotations.has_split else "the split"
        return (f"{origin} has no validation images ({counts}): --val-fraction 0.1 takes a tenth "
                "of the training images, --val-fraction 0 trains without validation")

    def explain_small_split(self, split: str, n_images: int) -> str:
        """Return why `n_images` images are too few for a split, and what to do; '' if enough.

        With one validation image every recall would be 100 %, and one training image has no
        negatives.

        Args:
            split: 'train' or 'val'.
            n_images: the images of the split that can be used.
        """
        if n_images >= 2 or (split == "val" and not self.splits["val"]):
            return ""
        if self.missing:
            cure = f"{counted(len(self.missing), 'images')} are missing in {self.images}"
        elif self.annotations.has_split:
            cure = "change the split of the caption files"
        elif split == "val" and len(self.splits["train"]) > 2:
            share = 2 / (len(self.splits["train"]) + len(self.splits["val"]))
            cure = f"choose --val-fraction {math.ceil(100 * share) / 100:g} or more"
        else:
            cure = "add images"
        name = {"train": "training", "val": "validation"}[split]
        return f"{name} needs at least 2 images and has {n_images}: {cure}"


def scan_dataset(
    images: Path, annotations: Path | Sequence[Path], val_fraction: float | None = None,
    seed: int = 0, max_images: int | None = None, *, image_column: str | None = None,
    caption_columns: Sequence[str] = (), split_column: str | None = None,
    split_files: Sequence[Path] = (), follow_links: bool = False,
) -> DataSource:
    """Read the captions, look up the image files, and split by image.

    The split is made over all images that the caption files name, so an image file that is missing
    moves no other image to another split.

    Args:
        images: the image folder.
        annotations: the caption files.
        val_fraction: see `split_by_image`.
        seed: see `split_by_image`.
        max_images: see `limit_images`; None for all images.
        image_column, caption_columns, split_column: see `read_annotations`.
        split_files: see `apply_split_files`; they replace the split of the caption files.
        follow_links: see `PixelStore.build`.

    Raises:
        UserError: one of the paths does not exist, or no image of the caption files is in `images`.
    """
    paths = [annotations] if isinstance(annotations, str | Path) else list(annotations)
    for path, what in (*((path, "caption file") for path in paths), (images, "image folder")):
        if not os.path.exists(path):  # Path.exists raises in a folder that may not be read
            raise UserError(
                f"there is no {what} at {path}\n"
                "    Flickr30k goes here:  data/flickr30k/images/*.jpg\n"
                "                          data/flickr30k/annotations/annotations.csv\n"
                "    other places:         --data-dir DIR, or --images DIR --annotations FILE\n"
                "    no data at hand:      --demo draws a small dataset of its own"
            )
    if not images.is_dir():
        raise UserError(f"{images} is not an image folder")
    try:
        with status("reading the captions"):
            read = read_annotations(paths, image_column, caption_columns, split_column,
                                    match_image_names=partial(match_image_names, images))
        names = {record.name for record in read.records}
        present = _find_files(images, names)
    except OSError as error:
        raise UserError(f"cannot list {images}: {error.strerror}") from error
    if not names & present:
        raise UserError(_explain_no_images(paths, images, read, present))
    unlisted = apply_split_files(read, split_files) if split_files else []
    missing = [DataIssue(str(images), record.name, "no such image")
               for record in read.records if record.name not in present]
    dropped = {issue.name for issue in unlisted}
    records = [record for record in read.records if record.name not in dropped]
    splits = {
        split: [record for record in of_split if record.name in present]
        for split, of_split in split_by_image(records, val_fraction, seed).items()
    }
    if max_images is not None:
        splits = limit_images(splits, max_images, seed)
    return DataSource(images, read, splits, missing, sorted(present - names), unlisted,
                      follow_links)


def _find_files(images: Path, names: Iterable[str]) -> set[str]:
    """Return the files of a folder, and those of `names` that exist in its subfolders."""
    present = {path.name for path in images.iterdir() if path.is_file()}
    # os.path: pathlib's is_file raises for a name that is too long for the file system.
    return present | {name for name in names if "/" in name and os.path.isfile(images / name)}


def match_image_names(images: Path, names: list[str]) -> dict[str, str]:
    """Find the files of image names that are not names of files below the image folder.

    A name may be a longer path, also an absolute one or one with backslashes, lack the suffix, and
    differ in case or in its Unicode form, as names from macOS do. Exactly one file must fit the
    name, and no other name the file.

    Returns:
        Those names, and the names of their files relative to the folder.
    """
    present = _find_files(images, names)
    missing = [name for name in names if name not in present or PurePosixPath(name).is_absolute()]
    if not missing:
        return {}
    files: defaultdict[str, list[str]] = defaultdict(list)
    depth = 0  # of the deepest file
    for folder, _, in_folder in os.walk(images):
        parents = Path(folder).relative_to(images).parts
        for file in in_folder:
            path = "/".join((*parents, file))
            files[_fold(path)].append(path)
            if (stem := _fold(os.path.splitext(path)[0])) != _fold(path):
                files[stem].append(path)
        depth = max(depth, len(parents) + 1)
    found = {}
    for name in missing:
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if ".." in parts:
            continue
        for start in range(max(0, len(parts) - depth), len(parts)):
            path = "/".join(parts[start:])
            if fitting := files.get(_fold(path)):
                exact = [path] if path in fitting else fitting
                if len(exact) == 1 and os.path.isfile(images / exact[0]):
                    found[name] = exact[0]
                break
    uses = Counter([*found.values(), *(name for name in names if name not in found)])
    return {name: file for name, file in found.items() if uses[file] == 1}


def _fold(name: str) -> str:
    """Return a name without differences of case and of Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _explain_no_images(
    paths: list[Path], images: Path, read: Annotations, present: set[str]
) -> str:
    """Return why no image of the caption files can be used."""
    files = ", ".join(map(str, paths))
    if not read.records:
        reasons = Counter(issue.reason for issue in read.rejected).most_common(3)
        first = read.rejected[0] if read.rejected else DataIssue("", "", "")
        return (f"{files} has no usable caption ({read.format}): "
                + ("; ".join(f"{count:,} x {reason}" for reason, count in reasons) or "no rows")
                + (f". The first, {first.where}: {first.name!r} {first.text[:60]!r}"
                   if read.rejected else ""))
    example = min(present, default="")
    return (f"{files} names {counted(len(read.records), 'images')}, and none of them, such as "
            f"{read.records[0].name}, is in {images}, which has "
            + (f"{counted(len(present), 'files')}, such as {example}" if present else "no files")
            + (f"; {counted(len(read.rejected), 'rows rejected')}, the first: "
               f"{read.rejected[0].reason}" if read.rejected else ""))


def apply_split_files(read: Annotations, paths: Sequence[Path]) -> list[DataIssue]:
    """Split records by lists of image names, a file for each split, such as trainImages.txt.

    Args:
        read: its records are replaced by those with the new split.
        paths: text files with an image name a line, with or without its suffix. The name of the
            file says the split.

    Returns:
        The images that are in no list; they keep the split ''.

    Raises:
        UserError: a list cannot be read or names no image, its name says no split, or an image is
            in two lists.
    """
    by_name: dict[str, str] = {}
    for record in read.records:
        for name in (record.name, os.path.basename(record.name)):
            by_name.setdefault(name, record.name)
            by_name.setdefault(os.path.splitext(name)[0], record.name)
    splits: dict[str, tuple[str, Path]] = {}
    for path in paths:
        split = split_of_file(path)
        if not split:
            raise UserError(f"cannot tell the split of {path}: its name must contain train, val or "
                            "test")
        try:
            lines = decode(path.read_bytes()).split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the split file {path}: {error}") from error
        listed = [by_name[name] for line in lines if (name := line.strip()) in by_name]
        if not listed:
            raise UserError(f"no line of {path} is the name of an image with captions")
        for name in listed:
            other, other_path = splits.setdefault(name, (split, path))
            if other != split:
                raise UserError(f"{name} is in {other_path} and in {path}")
    read.records = [replace(record, split=splits.get(record.name, ("", None))[0])
                    for record in read.records]
    return [DataIssue("the split files", record.name, "in none of them")
            for record in read.records if not record.split]


def split_by_image(
    records: list[ImageRecord], val_fraction: float | None, seed: int
) -> dict[str, list[ImageRecord]]:
    """Split records into train, val and test; an image is in one split with all its captions.

    The split of the records is used where they have one, and an image without a split is trained
    on. Otherwise, or where no record is for validation, a share of the training images is
    validated on, chosen by a hash of the seed and the file name.

    Args:
        records: one for each image.
        val_fraction: share of the images in the validation split, at least one image; 0 for none.
            None for a tenth, or for the split of the records even without validation.
        seed: of the hash.
    """
    splits: dict[str, list[ImageRecord]] = {"train": [], "val": [], "test": []}
    for record in records:
        splits[record.split or "train"].append(record)
    train = splits["train"]
    if val_fraction is None:
        val_fraction = 0 if any(record.split for record in records) else 0.1
    if val_fraction and not splits["val"]:
        n_val = min(max(1, round(len(train) * val_fraction)), len(train) - 1)
        order = _hash_order(train, f"split {seed}")
        chosen = {record.name for record in order[: max(0, n_val)]}
        splits["val"] = [record for record in train if record.name in chosen]
        splits["train"] = [record for record in train if record.name not in chosen]
    return splits


def limit_images(
    splits: dict[str, list[ImageRecord]], max_images: int, seed: int
) -> dict[str, list[ImageRecord]]:
    """Keep about `max_images` images: each split keeps its rounded share, and at least one."""
    total = sum(len(records) for records in splits.values())
    limited = {}
    for split, records in splits.items():
        count = max(1, round(max_images * len(records) / max(1, total)))
        chosen = {record.name for record in _hash_order(records, f"limit {seed}")[:count]}
        limited[split] = [record for record in records if record.name in chosen]
    return limited


def _hash_order(records: list[ImageRecord], key: str) -> list[ImageRecord]:
    """Shuffle records by a hash of `key` and their names, independent of the order of the file."""
    return sorted(records, key=lambda record: hashlib.sha256(
        f"{key}:{record.name}".encode("utf-8", "surrogatepass")).digest())
