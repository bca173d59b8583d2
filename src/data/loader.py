"""The batches of an epoch: how they are drawn, and how they reach the device in time.

There is no torch DataLoader: a batch is a copy from the page cache, so one thread prepares
thousands of images a second, and worker processes would only add a copy and a start-up time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from src.data.dataset import Batch, Flickr30kDataset, Item
from src.utils.distributed import rank, split_evenly

BLOCK = 1024  # images copied to a GPU at a time: about 180 MB of host memory at 240 pixels


def sample_batches(
    dataset: Flickr30kDataset, batch_size: int, captions_per_image: int, seed: int, epoch: int
) -> list[list[Item]]:
    """Draw the batches of an epoch, as a function of (seed, epoch).

    Every caption is used once, in groups of `captions_per_image` of one image. No batch holds an
    image twice, since two captions of one image would be false negatives of each other: that would
    happen in 5 % of random batches of 64 and in 97 % of batches of 512. All batches are full; the
    few items that are left over are not used in this epoch.

    Args:
        batch_size: images in a batch; at most the number of images in the dataset.
    """
    rng = np.random.default_rng([seed, epoch])
    # Round r holds the r-th group of captions of every image.
    rounds: list[list[Item]] = []
    for image in rng.permutation(len(dataset.records)):
        first, count = int(dataset.first_caption[image]), len(dataset.records[image].captions)
        shuffled = first + rng.permutation(count)
        for turn, start in enumerate(range(0, count, captions_per_image)):
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append((int(image), shuffled[start : start + captions_per_image]))
    shuffled_items = (items[i] for items in rounds for i in rng.permutation(len(items)))
    return list(_distinct_batches(shuffled_items, min(batch_size, len(dataset.records))))


def count_batches(dataset: Flickr30kDataset, batch_size: int, captions_per_image: int) -> int:
    """Return the maximum number of full batches of distinct images in an epoch.

    `sample_batches` draws this many if all images have equally many captions. If a few images have
    most of the captions it can draw fewer; a learning rate schedule then misses its last steps.
    """
    batch_size = min(batch_size, len(dataset.records))
    groups = np.array([-(-len(record.captions) // captions_per_image)
                       for record in dataset.records], np.int64)
    count = int(groups.sum()) // max(1, batch_size)
    # An image with g groups can be in g batches, and in each of them once.
    while np.minimum(groups, count).sum() < count * batch_size:
        count = int(np.minimum(groups, count).sum()) // batch_size
    return count


def _distinct_batches(items: Iterator[Item], batch_size: int) -> Iterator[list[Item]]:
    """Yield full batches in the order of `items`; an image that is already in a batch is deferred.

    A round holds each image at most once, so only items where two rounds meet are deferred.
    """
    deferred: deque[Item] = deque()
    exhausted = False
    while not exhausted:
        batch: dict[int, Item] = {}
        still_deferred: deque[Item] = deque()
        while len(batch) < batch_size:
            item = deferred.popleft() if deferred else next(items, None)
            if item is None:
                exhausted = True
                break
            if item[0] in batch:
                still_deferred.append(item)
            else:
                batch[item[0]] = item
        deferred = still_deferred + deferred
        if len(batch) == batch_size:
            yield list(batch.values())


class Prefetcher:
    """Iterate over this rank's part of each batch on `device`; a thread prepares the next one.

    Attributes:
        wait_seconds: how long the consumer has waited for batches.
    """

    def __init__(
        self, dataset: Flickr30kDataset, batches: list[list[Item]], device: torch.device
    ) -> None:
        self.dataset, self.batches, self.device = dataset, batches, device
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            ahead = None
            for items in [*self.batches, None]:
                current, ahead = ahead, pool.submit(self._prepare, items) if items else None
                if current:
                    start = time.perf_counter()
                    batch = current.result()
                    self.wait_seconds += time.perf_counter() - start
                    yield batch

    def _prepare(self, items: list[Item]) -> Batch:
        return self.dataset.batch(items, split_evenly(len(items))[rank()]).to(self.device)


def cache_on_device(dataset: Flickr30kDataset, device: torch.device) -> Flickr30kDataset:
    """Return the dataset with its pixels on a GPU, if they take less than half of its free memory.

    A batch is then one gather on the device. On other devices the dataset is returned as it is.
    """
    if device.type != "cuda" or not len(dataset.records):
        return dataset
    one = dataset.take_images(np.zeros(1, np.int64))
    if len(dataset.records) * one.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return dataset
    cached = torch.empty(len(dataset.records), *one.shape[1:], dtype=one.dtype, device=device)
    for start in range(0, len(cached), BLOCK):
        indices = np.arange(start, min(start + BLOCK, len(cached)))
        cached[start : start + BLOCK] = dataset.take_images(indices).to(device)
    return dataset.with_images(cached)
