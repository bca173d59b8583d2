"""Captions matched with the image files on disk, and split by image.

A split by caption would put 99.99 % of Flickr30k's validation captions next to a training caption
of the same image, and the recall would measure memory.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from src.data.captions import Annotations, DataIssue, ImageRecord, read_annotations
from src.utils.errors import UserError


@dataclass
class DataSource:
    """A caption file matched with the image files, and split.

    Attributes:
        images: the image folder.
        annotations: what the caption file holds.
        splits: 'train', 'val' and 'test' -> the records whose image file exists.
        missing: images that have captions but no file.
        unused: image files without a caption.
    """

    images: Path
    annotations: Annotations
    splits: dict[str, list[ImageRecord]]
    missing: list[DataIssue]
    unused: list[str]


def scan_dataset(
    images: Path, annotations: Path, val_fraction: float, seed: int, max_images: int | None = None
) -> DataSource:
    """Read the captions, look up the image files, and split by image.

    The split is made over all images that the caption file names, so an image file that is missing
    moves no other image to another split.

    Args:
        images: the image folder.
        annotations: the caption file.
        val_fraction: see `split_by_image`.
        seed: see `split_by_image`.
        max_images: see `limit_images`; None for all images.

    Raises:
        UserError: one of the paths does not exist, or no image of the caption file is in `images`.
    """
    for path, what in ((annotations, "caption file"), (images, "image folder")):
        if not os.path.exists(path):  # Path.exists raises in a folder that may not be read
            raise UserError(
                f"there is no {what} at {path}\n"
                "  Flickr30k goes here:  data/flickr30k/images/*.jpg\n"
                "                        data/flickr30k/annotations/annotations.csv\n"
                "  other places:         --data-dir DIR, or --images DIR --annotations FILE\n"
                "  no data at hand:      --demo draws a small dataset of its own"
            )
    if not images.is_dir():
        raise UserError(f"{images} is not an image folder")
    read = read_annotations(annotations)
    names = {record.name for record in read.records}
    try:
        present = _find_files(images, names)
    except OSError as error:
        raise UserError(f"cannot list {images}: {error.strerror}") from error
    missing = [DataIssue(str(images), record.name, "no such image")
               for record in read.records if record.name not in present]
    if not names & present:
        example = f", such as {read.records[0].name}," if read.records else ""
        raise UserError(
            f"{annotations} names {len(names):,} images, and none of them{example} is in {images}"
        )
    splits = {
        split: [record for record in records if record.name in present]
        for split, records in split_by_image(read.records, val_fraction, seed).items()
    }
    if max_images is not None:
        splits = limit_images(splits, max_images, seed)
    return DataSource(images, read, splits, missing, sorted(present - names))


def _find_files(images: Path, names: set[str]) -> set[str]:
    """Return the files of a folder, and those of `names` that exist in its subfolders."""
    present = {path.name for path in images.iterdir() if path.is_file()}
    # os.path: pathlib's is_file raises for a name that is too long for the file system.
    return present | {name for name in names if "/" in name and os.path.isfile(images / name)}


def split_by_image(
    records: list[ImageRecord], val_fraction: float, seed: int
) -> dict[str, list[ImageRecord]]:
    """Split records into train, val and test; an image is in one split with all its captions.

    The file's own split is used where it has one, and an image without a split is trained on.
    Otherwise a share of the images is validated on, chosen by a hash of the seed and the file name.

    Args:
        records: one for each image.
        val_fraction: share of the images in the validation split, at least one image.
        seed: of the hash.
    """
    splits: dict[str, list[ImageRecord]] = {"train": [], "val": [], "test": []}
    if any(record.split for record in records):
        for record in records:
            splits[record.split or "train"].append(record)
        return splits
    n_val = min(max(1, round(len(records) * val_fraction)), len(records) - 1)
    chosen = {record.name for record in _hash_order(records, f"split {seed}")[: max(0, n_val)]}
    for record in records:
        splits["val" if record.name in chosen else "train"].append(record)
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
