"""Batches on the device: the next one is made ready while this one is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from src.dataset import Batch, Flickr30kDataset
from src.distributed import rank, shares

BLOCK = 1024  # photos sent to a GPU at a time: some 180 MB of host memory


def feed(
    dataset: Flickr30kDataset, batches: list[list[tuple[int, np.ndarray]]], device: torch.device
) -> Iterator[Batch]:
    """This process's share of each of `batches`, on `device`, in order.

    One thread is enough: a batch is a copy from the page cache, thousands of photos a second.
    """

    def prepare(items: list[tuple[int, np.ndarray]]) -> Batch:
        return dataset.batch(items, shares(len(items))[rank()]).to(device)

    with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
        ahead = pool.submit(prepare, batches[0]) if batches else None
        for following in [*batches[1:], None]:
            if ahead is None:
                return
            batch = ahead.result()
            ahead = pool.submit(prepare, following) if following else None
            yield batch


def keep_on_device(dataset: Flickr30kDataset, device: torch.device) -> Flickr30kDataset:
    """The dataset with its pixels on a GPU, where they take less than half of what is free there.

    Then a batch is a gather on the device, and nothing is left to wait for.
    """
    if device.type != "cuda" or not len(dataset.records):
        return dataset
    one = dataset.pixels(np.zeros(1, np.int64))
    if len(dataset.records) * one.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return dataset
    kept = torch.empty(len(dataset.records), *one.shape[1:], dtype=one.dtype, device=device)
    for start in range(0, len(kept), BLOCK):
        photos = np.arange(start, min(start + BLOCK, len(kept)))
        kept[start : start + BLOCK] = dataset.pixels(photos).to(device)
    return dataset.holding(kept)
