"""Captions matched with image files, and the split by image."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from src.data.captions import ImageRecord
from src.data.source import limit_images, scan_dataset, split_by_image
from src.models.tokenizer import Tokenizer, split_words
from src.utils.errors import UserError


def make_records(count: int, splits: tuple[str, ...] = ("",)) -> list[ImageRecord]:
    """Return records that have the given splits in turn."""
    return [ImageRecord(f"{i}.jpg", ("a caption",), splits[i % len(splits)]) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_every_image_is_in_one_split(count: int, fraction: float) -> None:
    """Each image is in train or val, val has its rounded fraction, and both have at least one image
    if there are two."""
    splits = split_by_image(make_records(count), fraction, seed=1)
    names = [record.name for records in splits.values() for record in records]
    assert sorted(names) == sorted(record.name for record in make_records(count))
    expected = min(max(1, round(count * fraction)), count - 1)
    assert len(splits["val"]) == max(0, expected) and splits["test"] == []


def test_the_split_is_a_function_of_seed_and_names() -> None:
    """The order of the records does not matter; another seed gives another split."""
    records = make_records(200)
    shuffled = random.Random(0).sample(records, len(records))

    def val(records: list[ImageRecord], seed: int) -> set[str]:
        return {record.name for record in split_by_image(records, 0.1, seed)["val"]}

    assert val(records, 5) == val(shuffled, 5) != val(records, 6)


def test_the_split_of_the_file_has_priority() -> None:
    """If the caption file has splits they are used; an image without one is in train."""
    splits = split_by_image(make_records(8, ("train", "val", "test", "")), 0.5, seed=0)
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 4, "val": 2, "test": 2}


def test_limit_images_keeps_proportions() -> None:
    """Each split keeps its share, at least one image, and no image of another split; the choice is
    a function of the seed."""
    splits = split_by_image(make_records(1000), 0.1, seed=0)
    limited = limit_images(splits, 100, seed=0)
    assert (len(limited["train"]), len(limited["val"])) == (90, 10)
    assert set(limited["val"]) <= set(splits["val"])
    assert limited == limit_images(splits, 100, seed=0) != limit_images(splits, 100, seed=1)
    assert len(limit_images(splits, 2, seed=0)["val"]) == 1


def test_captions_are_matched_with_files(tiny_data: tuple[Path, Path]) -> None:
    """Missing and unused files are listed, and the other images are split."""
    images, annotations = tiny_data
    (images / "1000.png").unlink()
    (images / "extra.jpg").write_bytes(b"")
    (images / "folder.jpg").mkdir()
    source = scan_dataset(images, annotations, 0.25, seed=0)
    assert [issue.name for issue in source.missing] == ["1000.png"]
    assert source.unused == ["extra.jpg"]
    assert sum(len(records) for records in source.splits.values()) == 11


def test_a_missing_file_moves_no_other_image(tiny_data: tuple[Path, Path]) -> None:
    """If a file is deleted, all other images stay in their split."""
    images, annotations = tiny_data
    before = scan_dataset(images, annotations, 0.25, seed=0).splits
    deleted = before["val"][0].name
    (images / deleted).unlink()
    after = scan_dataset(images, annotations, 0.25, seed=0).splits
    assert after["train"] == before["train"]
    assert after["val"] == [record for record in before["val"] if record.name != deleted]


def test_images_in_subfolders_are_found(tiny_data: tuple[Path, Path]) -> None:
    """A caption file may name folder/image.jpg."""
    images, annotations = tiny_data
    (images / "sub").mkdir()
    (images / "1000.png").rename(images / "sub" / "1000.png")
    annotations.write_text(annotations.read_text().replace("1000.png", "sub/1000.png"))
    assert scan_dataset(images, annotations, 0.25, seed=0).missing == []


def test_validation_words_are_not_in_the_vocabulary(tiny_data: tuple[Path, Path]) -> None:
    """A word that only validation captions have is unknown, even if it is frequent."""
    images, annotations = tiny_data
    splits = scan_dataset(images, annotations, 0.25, seed=0).splits
    lines = annotations.read_text().split("\n")
    for record in splits["val"]:
        lines = [line + f" only{record.name[:4]}" if record.name in line else line
                 for line in lines]
    annotations.write_text("\n".join(lines))
    splits = scan_dataset(images, annotations, 0.25, seed=0).splits
    train, val = ([caption for record in splits[split] for caption in record.captions]
                  for split in ("train", "val"))
    tokenizer = Tokenizer.from_captions(train, 1, 16)
    assert {word for caption in train for word in split_words(caption)} == set(tokenizer.words[2:])
    assert len(val) == 15 and all(tokenizer.decode(row).endswith("things <unk>")
                                  for row in tokenizer.encode(val))


@pytest.mark.parametrize("name", [
    "x" * 300 + ".jpg", "sub/" + "x" * 300 + ".jpg", "sub/" * 2000 + "x.jpg", "sub", "sub/.",
    "1000.png/x.jpg",
])
def test_names_that_no_file_can_have_are_missing(tiny_data: tuple[Path, Path], name: str) -> None:
    """A name that is too long, of a folder, or below a file is listed as missing."""
    images, annotations = tiny_data
    (images / "sub").mkdir()
    with open(annotations, "a", encoding="utf-8") as file:
        file.write(f"{name}| 0| A dog .\n")
    source = scan_dataset(images, annotations, 0.25, seed=0)
    assert len(source.missing) == 1 and len(source.unused) == 0
    assert sum(len(records) for records in source.splits.values()) == 12


@pytest.mark.parametrize("name", ["a b.jpg", "it's \"one\".jpg", "фото.jpg", "照片.png", "x" * 240])
def test_names_with_any_characters_are_found(tiny_data: tuple[Path, Path], name: str) -> None:
    """Names may have spaces, quotes and any script, and be long."""
    images, annotations = tiny_data
    (images / "1000.png").rename(images / name)
    text = annotations.read_text().replace("1000.png", name)
    annotations.write_text(text, encoding="utf-8")
    source = scan_dataset(images, annotations, 0.25, seed=0)
    assert source.missing == [] and source.unused == []


def test_max_images_limits_all_splits_together(tiny_data: tuple[Path, Path]) -> None:
    """Of 12 images, max_images=4 keeps 3 for training and 1 for validation."""
    source = scan_dataset(*tiny_data, 0.25, seed=0, max_images=4)
    assert {split: len(records) for split, records in source.splits.items()} == {
        "train": 3, "val": 1, "test": 0}


@pytest.mark.parametrize("fault", ["no images", "no captions", "not a folder", "other images"])
def test_missing_data_are_an_error_with_the_cure(tiny_data: tuple[Path, Path], fault: str) -> None:
    """The message says where the data belong and names --demo, or names what does not match."""
    images, annotations = tiny_data
    cure = "--demo"
    if fault == "no images":
        images = images / "missing"
    elif fault == "no captions":
        annotations = annotations.with_name("missing.csv")
    elif fault == "not a folder":
        images, cure = annotations, "not an image folder"
    else:
        annotations.write_text("another.jpg| 0| a dog .\n")
        cure = "none of them, such as another.jpg,"
    with pytest.raises(UserError, match=cure):
        scan_dataset(images, annotations, 0.25, seed=0)
