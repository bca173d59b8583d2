"""The batches of an epoch: how they are drawn, counted and prefetched."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import combinations, count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.data.loader import Prefetcher, cache_on_device, count_batches, sample_batches
from tests.tiny_data import make_dataset

CPU = torch.device("cpu")
UNEVEN = [5, 1, 50, 2, 5, 5, 3, 5, 1, 7]  # captions of each image


@pytest.mark.parametrize("captions_per_image", [1, 2, 5, 60])
@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
@pytest.mark.parametrize("counts", [[5] * 12, UNEVEN, [1, 1], [4]])
def test_batches_are_full_and_hold_each_image_once(
    counts: list[int], batch_size: int, captions_per_image: int
) -> None:
    """No caption occurs twice in an epoch and no image twice in a batch; captions belong to their
    image and are at most captions_per_image."""
    dataset = make_dataset(counts)
    batches = sample_batches(dataset, batch_size, captions_per_image, seed=0, epoch=1)
    assert batches
    seen: Counter = Counter()
    for items in batches:
        images = [image for image, _ in items]
        assert len(items) == len(set(images)) == min(batch_size, len(counts))
        for image, captions in items:
            assert 1 <= len(captions) <= captions_per_image
            assert (dataset.image_index[captions] == image).all()
            seen.update(captions.tolist())
    assert max(seen.values()) == 1


@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=20), batch_size=st.integers(1, 25),
       captions_per_image=st.integers(1, 6), seed=st.integers(0, 99))
def test_unused_captions_do_not_fill_a_batch(
    counts: list[int], batch_size: int, captions_per_image: int, seed: int
) -> None:
    """The captions that an epoch does not use belong to fewer images than a batch has."""
    dataset = make_dataset(counts)
    batches = sample_batches(dataset, batch_size, captions_per_image, seed, epoch=1)
    used = np.concatenate([np.empty(0, int), *(captions for items in batches
                                               for _, captions in items)])
    assert len(used) == len(set(used.tolist()))
    unused = np.setdiff1d(np.arange(len(dataset)), used)
    assert len(set(dataset.image_index[unused].tolist())) < min(batch_size, len(counts))


@cache
def most_batches(groups: tuple[int, ...], batch_size: int) -> int:
    """Return how many batches of distinct images can be made, by trying all of them.

    Args:
        groups: the number of groups of captions of each image, sorted.
        batch_size: images in a batch.
    """
    remaining = [image for image, number in enumerate(groups) if number]
    return max((1 + most_batches(tuple(sorted(number - (image in batch)
                                              for image, number in enumerate(groups))), batch_size)
                for batch in combinations(remaining, batch_size)), default=0)


@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=5), batch_size=st.integers(1, 6),
       captions_per_image=st.integers(1, 3))
def test_count_batches_is_the_maximum(
    counts: list[int], batch_size: int, captions_per_image: int
) -> None:
    """count_batches equals an exhaustive search."""
    groups = tuple(sorted(-(-number // captions_per_image) for number in counts))
    assert count_batches(make_dataset(counts), batch_size, captions_per_image) == \
        most_batches(groups, min(batch_size, len(counts)))


@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=20), batch_size=st.integers(1, 25),
       captions_per_image=st.integers(1, 6), seed=st.integers(0, 99), even=st.booleans())
def test_an_epoch_has_at_most_count_batches(
    counts: list[int], batch_size: int, captions_per_image: int, seed: int, even: bool
) -> None:
    """sample_batches draws at most count_batches batches; exactly as many if all images have
    equally many captions, and at least one otherwise."""
    if even:
        counts = counts[:1] * len(counts)
    dataset = make_dataset(counts)
    number = len(sample_batches(dataset, batch_size, captions_per_image, seed, epoch=1))
    most = count_batches(dataset, batch_size, captions_per_image)
    assert number == most if even else 1 <= number <= most


def test_uneven_images_can_give_fewer_batches() -> None:
    """If few images have most of the captions, an epoch can have fewer than count_batches."""
    dataset = make_dataset(UNEVEN)
    numbers = {len(sample_batches(dataset, 3, 1, seed, epoch=1)) for seed in range(20)}
    assert min(numbers) < count_batches(dataset, 3, 1)


def test_captions_are_grouped_by_image() -> None:
    """Seven captions, three at a time, are groups of 3, 3 and 1, which differ between epochs."""
    dataset = make_dataset([7])

    def groups(epoch: int) -> list[list[int]]:
        return [captions.tolist() for ((_, captions),) in sample_batches(dataset, 1, 3, 0, epoch)]

    assert [len(group) for group in groups(1)] == [3, 3, 1]
    assert sorted(sum(groups(1), [])) == list(range(7))
    assert sorted(map(sorted, groups(1))) != sorted(map(sorted, groups(2)))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    """The same seed and epoch give the same batches; another epoch or seed gives others."""
    dataset = make_dataset(UNEVEN)

    def order(seed: int, epoch: int) -> list:
        return [[(image, captions.tolist()) for image, captions in items]
                for items in sample_batches(dataset, 4, 1, seed, epoch)]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)


def test_the_batches_of_an_image_have_different_companions() -> None:
    """Within an epoch the batches of an image do not repeat the same other images."""
    batches = sample_batches(make_dataset([5] * 12), 4, 1, seed=0, epoch=1)
    assert len(batches) == 15
    assert len({frozenset(image for image, _ in items) for items in batches}) > 10


@pytest.mark.parametrize("number", [0, 1, 2, 9])
def test_prefetched_batches_are_those_of_the_dataset(number: int) -> None:
    """Each batch comes once, in order, equal to that of Flickr30kDataset.batch."""
    dataset = make_dataset(UNEVEN)
    batches = [items for epoch in (1, 2, 3)
               for items in sample_batches(dataset, 4, 3, 0, epoch)][:number]
    loader = Prefetcher(dataset, batches, CPU)
    prefetched = list(loader)
    assert len(loader) == len(batches) == len(prefetched) == number
    for batch, items in zip(prefetched, batches, strict=True):
        expected = dataset.batch(items)
        for field in ("images", "tokens", "image_index"):
            assert torch.equal(getattr(batch, field), getattr(expected, field))
        assert (batch.counts, batch.local) == (expected.counts, expected.local)


def test_wait_seconds_are_the_time_until_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances by one at each reading, each batch adds one second."""
    clock = count()
    monkeypatch.setattr("src.data.loader.time",
                        SimpleNamespace(perf_counter=lambda: float(next(clock))))
    dataset = make_dataset(UNEVEN)
    loader = Prefetcher(dataset, sample_batches(dataset, 4, 3, 0, 1), CPU)
    assert loader.wait_seconds == 0
    seconds = [loader.wait_seconds for _ in loader]
    assert seconds == list(range(1, len(loader) + 1)) and len(loader) > 1


def test_an_iteration_that_is_left_reads_no_further() -> None:
    """After a break at most one batch has been read ahead."""
    dataset = make_dataset(UNEVEN)
    read = []
    original = dataset.batch
    dataset.batch = lambda *args: read.append(1) or original(*args)
    for _ in Prefetcher(dataset, sample_batches(dataset, 2, 1, 0, 1), CPU):
        break
    assert 1 <= len(read) <= 2


def test_an_error_in_the_thread_is_raised() -> None:
    """An exception while a batch is prepared is raised where the batch is awaited."""
    dataset = make_dataset(UNEVEN)
    dataset.store_rows = dataset.store_rows + 10**6
    with pytest.raises(IndexError):
        list(Prefetcher(dataset, sample_batches(dataset, 2, 1, 0, 1), CPU))


def test_pixels_are_not_cached_on_a_cpu() -> None:
    """On a CPU the dataset itself is returned, with its memory-mapped pixels."""
    dataset = make_dataset(UNEVEN)
    assert cache_on_device(dataset, CPU) is dataset
    assert isinstance(dataset.images, np.ndarray)
