"""The images and captions of a split, and the batches made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.loader import sample_batches
from src.data.pixel_store import PixelStore
from src.models.tokenizer import Tokenizer
from tests.tiny_data import make_dataset

UNEVEN = [5, 1, 50, 2, 5, 5, 3, 5, 1, 7]  # captions of each image


def test_a_batch_holds_the_images_and_captions_of_its_items() -> None:
    """Pixels, tokens and image_index are those of each item, in order."""
    dataset = make_dataset(UNEVEN)
    for items in sample_batches(dataset, 4, 3, seed=0, epoch=1):
        batch = dataset.batch(items)
        assert batch.images.shape == (4, 4, 4, 3) and batch.images.dtype == torch.uint8
        row = 0
        for place, (image, captions) in enumerate(items):
            assert (batch.images[place] == image).all()
            for caption in captions:
                assert batch.image_index[row] == place
                assert torch.equal(batch.tokens[row], dataset.tokens[caption])
                assert dataset.captions[caption].startswith(f"image{image} ")
                row += 1
        assert row == len(batch.tokens) == len(batch.image_index)


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
def test_the_parts_of_all_ranks_are_the_batch(n_ranks: int) -> None:
    """Concatenated, the images and tokens of all ranks are those of the whole batch; image_index
    and counts are the same on every rank."""
    dataset = make_dataset(UNEVEN)
    items = sample_batches(dataset, 4, 3, seed=0, epoch=1)[0]
    whole = dataset.batch(items)
    parts = [dataset.batch(items, range(4 * i // n_ranks, 4 * (i + 1) // n_ranks))
             for i in range(n_ranks)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    for part in parts:
        assert torch.equal(part.image_index, whole.image_index) and part.counts == whole.counts
        assert len(part.tokens) == part.count_captions(part.local)


@pytest.mark.parametrize("local", [range(4), range(1, 4), range(3, 4)])
@pytest.mark.parametrize("size", [None, 1, 2, 3, 4, 9])
def test_chunks_cover_the_local_part(local: range, size: int | None) -> None:
    """Chunks of at most `size` images with their captions cover the local part once, in order."""
    dataset = make_dataset(UNEVEN)
    batch = dataset.batch(sample_batches(dataset, 4, 3, seed=0, epoch=1)[0], local)
    chunks = batch.chunks(size)
    assert torch.equal(torch.cat([batch.images[images] for images, _ in chunks]), batch.images)
    assert torch.equal(torch.cat([batch.tokens[captions] for _, captions in chunks]), batch.tokens)
    index = batch.image_index[batch.image_index >= local.start] - local.start
    for images, captions in chunks:
        assert size is None or images.stop - images.start <= size
        assert set(index[captions].tolist()) == set(range(images.start, images.stop))


def test_with_images_replaces_the_pixels() -> None:
    """Row i of a NumPy array or tensor goes with the captions of image i; the original dataset
    keeps its pixels."""
    dataset = make_dataset(UNEVEN)
    features = np.arange(len(dataset.records), dtype=np.float32)[:, None].repeat(3, 1)
    for images in (features, torch.from_numpy(features)):
        other = dataset.with_images(images)
        items = sample_batches(other, 4, 3, seed=0, epoch=1)[0]
        batch = other.batch(items)
        assert batch.images[:, 0].tolist() == [image for image, _ in items]
        assert torch.equal(batch.tokens, dataset.batch(items).tokens)
    assert dataset.batch(items).images.shape[1:] == (4, 4, 3)


def test_the_digest_depends_on_names_and_captions() -> None:
    """Equal datasets have the same digest, and other captions another one."""
    assert make_dataset(UNEVEN).digest() == make_dataset(UNEVEN).digest()
    assert make_dataset(UNEVEN).digest() != make_dataset([*UNEVEN[:-1], 8]).digest()


def test_images_that_could_not_be_decoded_are_left_out() -> None:
    """A record whose image is not in the pixel store is not in the dataset."""
    records = [ImageRecord("a.jpg", ("one", "two")), ImageRecord("b.jpg", ("three",))]
    store = PixelStore(np.zeros((1, 4, 4, 3), np.uint8), {"b.jpg": 0}, {"a.jpg": "truncated"})
    dataset = Flickr30kDataset(records, store, Tokenizer.from_captions(["three"], 1, 4))
    assert [record.name for record in dataset.records] == ["b.jpg"]
    assert dataset.captions == ["three"]
    assert dataset.image_index.tolist() == [0] and len(dataset) == 1
