"""Batches made ready ahead: the same ones, in the same order, without a rest left behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_dataset import UNEVEN, dataset

from src.data.loader import Prefetcher, cache_on_device, sample_batches

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_feed_gives_what_the_dataset_gives(count: int) -> None:
    """Each batch once, in order, equal to the one made on the spot."""
    data = dataset(UNEVEN)
    batches = [items for epoch in (1, 2, 3) for items in sample_batches(data, 4, 3, 0, epoch)][:count]
    assert len(batches) == count
    fed = list(Prefetcher(data, batches, CPU))
    assert len(fed) == count
    for batch, items in zip(fed, batches, strict=True):
        expected = data.batch(items)
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.tokens, expected.tokens)
        assert torch.equal(batch.image_index, expected.image_index)
        assert (batch.counts, batch.local) == (expected.counts, expected.local)


def test_a_feed_may_be_left_early() -> None:
    """Whoever stops in the middle of an epoch leaves no thread that goes on reading."""
    data = dataset(UNEVEN)
    made = []
    original = data.batch
    data.batch = lambda *args: made.append(1) or original(*args)
    for _ in Prefetcher(data, sample_batches(data, 2, 1, 0, 1), CPU):
        break
    assert 1 <= len(made) <= 2


def test_a_mistake_while_reading_is_not_swallowed() -> None:
    """What goes wrong in the thread ends the loop that waits for its batch."""
    data = dataset(UNEVEN)
    data.store_rows = data.store_rows + 10**6
    with pytest.raises(IndexError):
        list(Prefetcher(data, sample_batches(data, 2, 1, 0, 1), CPU))


def test_on_the_cpu_pixels_stay_on_the_disk() -> None:
    """The page cache holds them already."""
    data = dataset(UNEVEN)
    assert cache_on_device(data, CPU) is data
    assert isinstance(data.images, np.ndarray)
