"""Splits by image: whole, reproducible, and in proportion."""

from __future__ import annotations

import random

import pytest

from src.data.captions import ImageRecord
from src.data.source import limit_images, split_by_image


def photos(count: int, splits: tuple[str, ...] = ("",)) -> list[ImageRecord]:
    """Records with names and splits."""
    return [ImageRecord(f"{i}.jpg", ("a caption",), splits[i % len(splits)]) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_every_photo_is_in_one_split(count: int, share: float) -> None:
    """Train and val part the photos, near the share, with one of each where there are two."""
    splits = split_by_image(photos(count), share, seed=1)
    names = [r.name for records in splits.values() for r in records]
    assert sorted(names) == sorted(r.name for r in photos(count))
    expected = min(max(1, round(count * share)), count - 1)
    assert len(splits["val"]) == max(0, expected) and splits["test"] == []


def test_split_depends_on_seed_and_names_alone() -> None:
    """The order of the file does not matter, the seed does."""
    records = photos(200)
    shuffled = random.Random(0).sample(records, len(records))

    def val(records: list[ImageRecord], seed: int) -> set[str]:
        return {r.name for r in split_by_image(records, 0.1, seed)["val"]}

    assert val(records, 5) == val(shuffled, 5) != val(records, 6)


def test_the_files_own_split_wins() -> None:
    """Where the file says it, nothing is drawn; a photo without a split trains."""
    splits = split_by_image(photos(8, ("train", "val", "test", "")), 0.5, seed=0)
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 4, "val": 2, "test": 2}


def test_limit_keeps_shares_and_leaks_nothing() -> None:
    """A part of each split in proportion, at least one photo, the same for the same seed."""
    splits = split_by_image(photos(1000), 0.1, seed=0)
    limited = limit_images(splits, 100, seed=0)
    assert (len(limited["train"]), len(limited["val"])) == (90, 10)
    assert set(limited["val"]) <= set(splits["val"])
    assert limited == limit_images(splits, 100, seed=0) != limit_images(splits, 100, seed=1)
    assert len(limit_images(splits, 2, seed=0)["val"]) == 1
