"""Captions matched with image files, and the split by image."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from src.data.captions import ImageRecord
from src.data.source import (
    DataSource,
    limit_images,
    match_image_names,
    scan_dataset,
    split_by_image,
)
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
    expected = min(max(1, round(count * fraction)), count - 1) if fraction else 0
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


@pytest.mark.parametrize("val_fraction", [None, 0, 0.1])
def test_a_split_without_validation(val_fraction: float | None) -> None:
    """Only where a share is asked for, it is taken from the training images; test stays."""
    splits = split_by_image(make_records(30, ("train", "train", "test")), val_fraction, seed=0)
    expected = 2 if val_fraction else 0
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 20 - expected, "val": expected, "test": 10}


def write_images(folder: Path, *names: str) -> Path:
    """Write empty files below `folder`/images."""
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).touch()
    return folder / "images"


def scan(folder: Path, text: str, *names: str, **options: object) -> DataSource:
    """Scan a caption file with that text, and images with those names."""
    images = write_images(folder, *names)
    (folder / "captions.csv").write_text(text)
    return scan_dataset(images, folder / "captions.csv", 0.5, seed=0, **options)


@pytest.mark.parametrize("spell", [
    lambda name, images: str(images / name), lambda name, images: f"/data/other/{name}",
    lambda name, images: f"C:\\photos\\{name}", lambda name, images: f"images\\{name}",
    lambda name, images: f"images/{name}", lambda name, images: name.rsplit(".", 1)[0],
    lambda name, images: name.upper(), lambda name, images: unicodedata.normalize("NFD", name),
    lambda name, images: f"/Photos/{unicodedata.normalize('NFD', name)}".upper(),
], ids=["below", "elsewhere", "drive", "backslash", "folder", "no suffix", "case", "NFD", "all"])
def test_names_that_differ_are_found_and_listed(
    tmp_path: Path, spell: Callable[[str, Path], str]
) -> None:
    """Longer paths, backslashes, a missing suffix, case and Unicode form, in any combination."""
    names = ["Käse.jpg", "b.jpg", "sub/c.png"]
    images = tmp_path / "images"
    spelled = [spell(name, images) for name in names]
    rows = [f"{name},a dog number {i}" for i, name in enumerate(spelled)]
    source = scan(tmp_path, "\n".join(["image,caption", *rows]), *names)
    assert [record.name for record in source.annotations.records] == names
    assert sum(map(len, source.splits.values())) == 3 and not source.missing
    changed = [(old, f"found as {new}") for old, new in zip(spelled, names, strict=True)
               if old != new]
    assert [(issue.name, issue.reason) for issue in source.annotations.renamed] == changed


def test_a_name_that_fits_two_files_is_not_found(tmp_path: Path) -> None:
    """Neither is a name whose file another name means too, nor one that leads out of the folder."""
    images = write_images(tmp_path, "a.jpg", "a.png", "B.jpg", "b.jpg", "c.jpg", "train/d.jpg",
                          "val/d.jpg", "e.jpg")
    names = ["a", "x/B.JPG", "c.jpg", "C.jpg", "d.jpg", "/1/e.jpg", "/2/e.jpg", "../e.jpg",
             "photos/../e.jpg", "/etc/passwd", "f.jpg", "", "..", "/"]
    assert match_image_names(images, names) == {}
    assert match_image_names(images, ["photos/b.jpg", "/val/d.jpg"]) == {
        "photos/b.jpg": "b.jpg", "/val/d.jpg": "val/d.jpg"}


def test_finding_images_only_adds(tmp_path: Path) -> None:
    """For any names, files that exist by their name are never replaced by others."""
    rng = random.Random(0)
    parts = ["a", "A", "b.jpg", "B.JPG", "a.png", "x", "..", ""]
    for case in range(60):
        folder = tmp_path / str(case)
        files = {"/".join(filter(None, rng.choices([p for p in parts if p != ".."], k=2)))
                 for _ in range(3)} | {"z.jpg"}
        files = {f for f in files if f and not any(o.startswith(f"{f}/") for o in files)}
        images = write_images(folder, *files)
        names = ["/".join(rng.choices(parts, k=rng.randint(1, 3))) for _ in range(6)] + ["z.jpg"]
        found = match_image_names(images, names)
        assert set(found.values()) <= files and not found.keys() & files
        kept = [name for name in names if name in files]
        assert not set(found.values()) & set(kept)
        assert len(set(found.values())) == len(found)


@pytest.mark.parametrize(("text", "reasons"), [
    ("image,caption\n../a.jpg,a dog\n../b.jpg,a cat", ["2 x", "leads out", "line 2", "'../a.jpg'"]),
    ('raw,split,filename\n"[""a dog""]",holiday,a.jpg', ["unknown split 'holiday'"]),
    ("image,caption\na.jpg,\na.jpg, ", ["2 x empty caption"]),
    ("image,caption\nx.jpg,a dog", ["names 1 image, and", "x.jpg", "1 file, such as a.jpg"]),
    ("image,caption\n", ["no rows"]),
])
def test_no_image_is_explained(tmp_path: Path, text: str, reasons: list[str]) -> None:
    """One message with the reason of the rejected rows, or with a name of each side."""
    with pytest.raises(UserError) as raised:
        scan(tmp_path, text, "a.jpg")
    assert all(reason in str(raised.value) for reason in reasons)


def test_several_files_with_the_split_in_their_names(tmp_path: Path) -> None:
    """Each file is a split; the place of an issue names its file."""
    images = write_images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    paths = [tmp_path / name for name in ("trainCaptions.csv", "dev-2024.csv", "test.json")]
    paths[0].write_text("image,caption\na.jpg,a dog\na.jpg,")
    paths[1].write_text("b.jpg#0\ta cat")
    paths[2].write_text('[{"image": "c.jpg", "caption": "a bird"}, {"image": "a.jpg", "caption": '
                        '"a dog"}]')
    source = scan_dataset(images, paths)
    assert {split: [r.name for r in records] for split, records in source.splits.items()} == {
        "train": ["a.jpg"], "val": ["b.jpg"], "test": ["c.jpg"]}
    assert [(issue.where, issue.reason) for issue in source.annotations.rejected] == [
        ("trainCaptions.csv line 3", "empty caption"),
        ("test.json item 2", "image is already in split 'train'")]
    paths[0] = paths[0].rename(tmp_path / "captions.csv")
    with pytest.raises(UserError, match="the split of .*captions.csv"):
        scan_dataset(images, paths)


def test_split_files(tmp_path: Path) -> None:
    """Lists of names, as of Flickr8k: with or without suffix; others are in no split."""
    names = [f"{i}.jpg" for i in range(6)]
    rows = "".join(f"{name}#0\ta dog\n" for name in names)
    lists = {"Flickr_8k.trainImages.txt": "0.jpg\n1.jpg\n", "Flickr_8k.devImages.txt": "2\nnone\n",
             "Flickr_8k.testImages.txt": "\ufeff3.jpg\r\n4.jpg"}
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
    paths = [tmp_path / name for name in lists]
    source = scan(tmp_path, rows, *names, split_files=paths)
    assert {split: [r.name for r in records] for split, records in source.splits.items()} == {
        "train": ["0.jpg", "1.jpg"], "val": ["2.jpg"], "test": ["3.jpg", "4.jpg"]}
    assert [issue.name for issue in source.unlisted] == ["5.jpg"]
    for name, text, reason in (("val.txt", "0.jpg", "trainImages.txt and in .*val.txt"),
                               ("val.txt", "9.jpg", "no line"), ("a.txt", "0.jpg", "its name")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=reason):
            scan(tmp_path, rows, *names, split_files=[*paths[:1], tmp_path / name])


def test_no_validation_is_explained(tmp_path: Path) -> None:
    """The message has the numbers of the file's split and flags that work."""
    text = "image,caption,split\na.jpg,a dog,train\nb.jpg,a cat,train\nc.jpg,a bird,test"
    images = write_images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "captions.csv").write_text(text)
    message = scan_dataset(images, tmp_path / "captions.csv").explain_no_validation()
    assert "train 2, val 0, test 1" in message and "--val-fraction 0.1" in message
    assert scan_dataset(images, tmp_path / "captions.csv", 0.1).explain_no_validation() == ""
