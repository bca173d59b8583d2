"""What lies on the disk, and the batches made of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.loader import sample_batches
from src.data.pixel_store import PixelStore
from src.data.source import scan_dataset
from src.models.tokenizer import Tokenizer, split_words
from src.utils.errors import UserError


def dataset(counts: list[int]) -> Flickr30kDataset:
    """Photos with that many captions each; photo i's pixels are all i, its captions name it."""
    records = [ImageRecord(f"{i}.jpg", tuple(f"photo{i} caption{j}" for j in range(count)))
               for i, count in enumerate(counts)]
    pixels = np.broadcast_to(np.arange(len(counts), dtype=np.uint8)[::-1, None, None, None],
                             (len(counts), 4, 4, 3)).copy()
    rows = {record.name: len(counts) - 1 - i for i, record in enumerate(records)}
    captions = [caption for record in records for caption in record.captions]
    return Flickr30kDataset(records, PixelStore(pixels, rows, {}),
                            Tokenizer.from_captions(captions, 1, 4))


UNEVEN = [5, 1, 50, 2, 5, 5, 3, 5, 1, 7]


@pytest.mark.parametrize("captions_per_image", [1, 2, 5, 60])
@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
@pytest.mark.parametrize("counts", [[5] * 12, UNEVEN, [1, 1], [4]])
def test_batches_are_full_and_hold_each_photo_once(
    counts: list[int], batch_size: int, captions_per_image: int
) -> None:
    """No caption twice in an epoch, no photo twice in a batch, captions of the right photo, at most
    captions_per_image of them."""
    data = dataset(counts)
    batches = sample_batches(data, batch_size, captions_per_image, seed=0, epoch=1)
    assert batches
    seen: Counter = Counter()
    for items in batches:
        photos = [photo for photo, _ in items]
        assert len(items) == len(set(photos)) == min(batch_size, len(counts))
        for photo, captions in items:
            assert 1 <= len(captions) <= captions_per_image
            assert (data.image_index[captions] == photo).all()
            seen.update(captions.tolist())
    assert max(seen.values()) == 1


@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=20), batch_size=st.integers(1, 25),
       captions_per_image=st.integers(1, 6), seed=st.integers(0, 99))
def test_what_an_epoch_leaves_out_fills_no_batch(
    counts: list[int], batch_size: int, captions_per_image: int, seed: int
) -> None:
    """Captions that stay behind belong to fewer photos than a batch has; and where all photos have
    as many captions, less than a batch stays behind."""
    data = dataset(counts)
    batch_size = min(batch_size, len(counts))
    groups = [(photo, captions) for items in sample_batches(data, batch_size, captions_per_image, seed, 1)
              for photo, captions in items]
    seen = {caption for _, captions in groups for caption in captions.tolist()}
    assert len(seen) == sum(len(captions) for _, captions in groups)
    left = [photo for caption, photo in enumerate(data.image_index.tolist()) if caption not in seen]
    assert len(set(left)) < batch_size
    if len(set(counts)) == 1:
        assert len(counts) * -(-counts[0] // captions_per_image) - len(groups) < batch_size


def test_captions_come_in_groups_of_their_photo() -> None:
    """Seven captions, three at a time, are groups of 3, 3 and 1; another epoch groups others."""
    data = dataset([7])

    def groups(epoch: int) -> list[list[int]]:
        return [captions.tolist() for ((_, captions),) in sample_batches(data, 1, 3, 0, epoch)]

    assert [len(group) for group in groups(1)] == [3, 3, 1]
    assert sorted(sum(groups(1), [])) == list(range(7))
    assert sorted(map(sorted, groups(1))) != sorted(map(sorted, groups(2)))


def test_the_order_depends_on_seed_and_epoch() -> None:
    """The same key gives the same batches; another epoch or seed others."""
    data = dataset(UNEVEN)

    def order(seed: int, epoch: int) -> list:
        return [[(photo, captions.tolist()) for photo, captions in items]
                for items in sample_batches(data, 4, 1, seed, epoch)]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)


def test_photos_meet_others_each_time_within_an_epoch() -> None:
    """The five batches that a photo comes in do not hold the same companions."""
    batches = sample_batches(dataset([5] * 12), 4, 1, seed=0, epoch=1)
    assert len(batches) == 15
    assert len({frozenset(photo for photo, _ in items) for items in batches}) > 10


def test_a_batch_holds_what_its_items_say() -> None:
    """Pixels, tokens and image_index belong together, row by row."""
    data = dataset(UNEVEN)
    for items in sample_batches(data, 4, 3, seed=0, epoch=1):
        batch = data.batch(items)
        assert batch.images.shape == (4, 4, 4, 3) and batch.images.dtype == torch.uint8
        row = 0
        for place, (photo, captions) in enumerate(items):
            assert (batch.images[place] == photo).all()
            for caption in captions:
                assert batch.image_index[row] == place
                assert torch.equal(batch.tokens[row], data.tokens[caption])
                assert data.captions[caption].startswith(f"photo{photo} ")
                row += 1
        assert row == len(batch.tokens) == len(batch.image_index)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shares_of_a_batch_make_it_whole(world: int) -> None:
    """What several processes hold of a batch is the batch, and all know where each caption goes."""
    data = dataset(UNEVEN)
    items = sample_batches(data, 4, 3, seed=0, epoch=1)[0]
    whole = data.batch(items)
    parts = [data.batch(items, range(4 * i // world, 4 * (i + 1) // world)) for i in range(world)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    for part in parts:
        assert torch.equal(part.image_index, whole.image_index)
        assert len(part.tokens) == part.count_captions(part.local)


@pytest.mark.parametrize("rows", [range(0, 4), range(1, 4), range(3, 4)])
@pytest.mark.parametrize("size", [None, 1, 2, 3, 4, 9])
def test_pieces_of_a_batch_follow_each_other(rows: range, size: int | None) -> None:
    """Pieces of at most `size` photos, each with its own captions, cover a share once, in order."""
    data = dataset(UNEVEN)
    batch = data.batch(sample_batches(data, 4, 3, seed=0, epoch=1)[0], rows)
    pieces = batch.chunks(size)
    assert torch.equal(torch.cat([batch.images[photos] for photos, _ in pieces]), batch.images)
    assert torch.equal(torch.cat([batch.tokens[captions] for _, captions in pieces]), batch.tokens)
    index = batch.image_index[(batch.image_index >= rows.start)] - rows.start
    for photos, captions in pieces:
        assert size is None or photos.stop - photos.start <= size
        assert set(index[captions].tolist()) == set(range(photos.start, photos.stop))


def test_a_dataset_may_hold_something_else_than_pixels() -> None:
    """Row i of what it holds comes with photo i's captions, from numpy and from torch."""
    data = dataset(UNEVEN)
    features = np.arange(len(data.records), dtype=np.float32)[:, None].repeat(3, 1)
    for held in (features, torch.from_numpy(features)):
        other = data.with_images(held)
        items = sample_batches(other, 4, 3, seed=0, epoch=1)[0]
        batch = other.batch(items)
        assert batch.images[:, 0].tolist() == [photo for photo, _ in items]
        assert torch.equal(batch.tokens, data.batch(items).tokens)
    assert data.batch(items).images.shape[1:] == (4, 4, 3)  # the data set itself is as it was


def test_the_digest_notices_other_data() -> None:
    """Other names or captions have another digest; the same ones the same."""
    assert dataset(UNEVEN).digest() == dataset(UNEVEN).digest()
    assert dataset(UNEVEN).digest() != dataset([*UNEVEN[:-1], UNEVEN[-1] + 1]).digest()


def test_photos_that_could_not_be_decoded_are_left_out() -> None:
    """A record without a row in the store is no part of the data set."""
    records = [ImageRecord("a.jpg", ("one", "two")), ImageRecord("b.jpg", ("three",))]
    store = PixelStore(np.zeros((1, 4, 4, 3), np.uint8), {"b.jpg": 0}, {"a.jpg": "broken"})
    data = Flickr30kDataset(records, store, Tokenizer.from_captions(["three"], 1, 4))
    assert [r.name for r in data.records] == ["b.jpg"] and data.captions == ["three"]
    assert data.image_index.tolist() == [0] and len(data) == 1


# What lies on the disk


def test_source_matches_photos_and_captions(tiny_data: tuple[Path, Path]) -> None:
    """Missing and unused files are named, and the rest is split."""
    images, annotations = tiny_data
    (images / "1000.png").unlink()
    (images / "extra.jpg").write_bytes(b"")
    (images / "folder.jpg").mkdir()
    source = scan_dataset(images, annotations, 0.25, seed=0)
    assert [remark.name for remark in source.missing] == ["1000.png"]
    assert source.unused == ["extra.jpg"]
    assert sum(len(records) for records in source.splits.values()) == 11


def test_a_lost_photo_moves_no_other_to_another_split(tiny_data: tuple[Path, Path]) -> None:
    """Validation photos never become train photos because a file is gone."""
    images, annotations = tiny_data
    before = scan_dataset(images, annotations, 0.25, seed=0).splits
    lost = before["val"][0].name
    (images / lost).unlink()
    after = scan_dataset(images, annotations, 0.25, seed=0).splits
    assert after["train"] == before["train"]
    assert [r.name for r in after["val"]] == [r.name for r in before["val"] if r.name != lost]


def test_photos_in_subfolders_are_found(tiny_data: tuple[Path, Path]) -> None:
    """A caption file may name folder/photo.jpg."""
    images, annotations = tiny_data
    (images / "sub").mkdir()
    (images / "1000.png").rename(images / "sub" / "1000.png")
    annotations.write_text(annotations.read_text().replace("1000.png", "sub/1000.png"))
    assert scan_dataset(images, annotations, 0.25, seed=0).missing == []


def test_the_vocabulary_never_sees_validation_words(tiny_data: tuple[Path, Path]) -> None:
    """A word of validation captions alone has no id, however often it comes."""
    images, annotations = tiny_data
    splits = scan_dataset(images, annotations, 0.25, seed=0).splits
    lines = annotations.read_text().split("\n")
    for record in splits["val"]:
        lines = [line + f" only{record.name[:4]}" if record.name in line else line
                 for line in lines]
    annotations.write_text("\n".join(lines))
    splits = scan_dataset(images, annotations, 0.25, seed=0).splits
    train, val = ([c for r in splits[split] for c in r.captions] for split in ("train", "val"))
    tokenizer = Tokenizer.from_captions(train, 1, 16)
    assert {w for c in train for w in split_words(c)} == set(tokenizer.words[2:])
    assert len(val) == 15 and all(tokenizer.decode(row).endswith("things <unk>")
                                  for row in tokenizer.encode(val))


@pytest.mark.parametrize("name", [
    "x" * 300 + ".jpg", "sub/" + "x" * 300 + ".jpg", "sub/" * 2000 + "x.jpg", "sub", "sub/.",
    "1000.png/x.jpg",
])
def test_names_that_no_file_can_have_are_missing_photos(
    tiny_data: tuple[Path, Path], name: str
) -> None:
    """Names too long for the file system, of folders, or below a file: counted, no traceback."""
    images, annotations = tiny_data
    (images / "sub").mkdir()
    with open(annotations, "a", encoding="utf-8") as file:
        file.write(f"{name}| 0| A dog .\n")
    source = scan_dataset(images, annotations, 0.25, seed=0)
    assert len(source.missing) == 1 and len(source.unused) == 0
    assert sum(len(records) for records in source.splits.values()) == 12


@pytest.mark.parametrize("name", ["a b.jpg", "it's \"one\".jpg", "фото.jpg", "照片.png", "x" * 240])
def test_names_of_every_kind_are_found(tiny_data: tuple[Path, Path], name: str) -> None:
    """Spaces, quotes, other scripts, very long names."""
    images, annotations = tiny_data
    (images / "1000.png").rename(images / name)
    text = annotations.read_text().replace("1000.png", name)
    annotations.write_text(text, encoding="utf-8")
    source = scan_dataset(images, annotations, 0.25, seed=0)
    assert source.missing == [] and source.unused == []


def test_max_images_takes_a_part(tiny_data: tuple[Path, Path]) -> None:
    """The limit counts photos over all splits."""
    source = scan_dataset(*tiny_data, 0.25, seed=0, max_images=4)
    assert {split: len(records) for split, records in source.splits.items()} == {
        "train": 3, "val": 1, "test": 0}


@pytest.mark.parametrize("broken", ["images", "annotations", "file for folder", "other photos"])
def test_missing_data_are_told_with_the_cure(tiny_data: tuple[Path, Path], broken: str) -> None:
    """The message says where to put what, and names --demo."""
    images, annotations = tiny_data
    cure = "--demo"
    if broken == "images":
        images = images / "nowhere"
    elif broken == "annotations":
        annotations = annotations.with_name("nowhere.csv")
    elif broken == "file for folder":
        images, cure = annotations, "not an image folder"
    else:
        annotations.write_text("another.jpg| 0| a dog .\n")
        cure = "none of them, such as another.jpg,"
    with pytest.raises(UserError, match=cure):
        scan_dataset(images, annotations, 0.25, seed=0)
