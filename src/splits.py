"""Which photos train and which validate: always whole photos, never single captions.

Split by caption, 99.99 % of the validation captions of Flickr30k would have a sibling
caption of the same photo in training, and the recall would measure memory.
"""

from __future__ import annotations

import hashlib

from src.annotations import ImageRecord


def _hash_order(records: list[ImageRecord], key: str) -> list[ImageRecord]:
    """Records shuffled as a pure function of `key` and their names, whatever order they came in."""
    return sorted(records, key=lambda record: hashlib.sha256(
        f"{key}:{record.name}".encode("utf-8", "surrogatepass")).digest())


def split_by_image(
    records: list[ImageRecord], val_fraction: float, seed: int
) -> dict[str, list[ImageRecord]]:
    """Train, val and test records; every photo, with all its captions, lies in exactly one.

    The file's own split where it has one, and a photo without one trains. Otherwise `val_fraction`
    of the photos (at least one, where there are two) validate, chosen by a hash of seed and name.
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
    """About `max_images` photos in all: each split keeps its rounded share, and at least one."""
    total = sum(len(records) for records in splits.values())
    limited = {}
    for split, records in splits.items():
        count = max(1, round(max_images * len(records) / max(1, total)))
        chosen = {record.name for record in _hash_order(records, f"limit {seed}")[:count]}
        limited[split] = [record for record in records if record.name in chosen]
    return limited
