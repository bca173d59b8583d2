"""From image files to batches: the naive script and this project.

    python -m benchmarks.input [--photos FOLDER]

Batches are made on one core. The pixel store is built on all cores, and
compared with as many threads that only decode.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import naive
from benchmarks.photos import write_dataset
from benchmarks.timing import interleaved, machine, ratio
from src.data.dataset import Flickr30kDataset
from src.data.images import load_resized
from src.data.loader import sample_batches
from src.data.pixel_store import PixelStore, store_size
from src.data.source import DataSource
from src.data.transforms import sample_crops, train_transform
from src.models.tokenizer import Tokenizer

BATCH_SIZE, SIZE = 64, 224
N_BATCHED, N_STORED = 4 * BATCH_SIZE, 384


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of JPEGs (default: generated)")
    args = parser.parse_args()
    print(f"{machine()}; {'real' if args.photos else 'generated'} photos")
    with tempfile.TemporaryDirectory() as folder:
        source = write_dataset(Path(folder), max(N_BATCHED, N_STORED), args.photos)
        time_batches(Path(folder), source)
        time_store(Path(folder), source)
    return 0


def time_batches(folder: Path, source: DataSource) -> None:
    """Print the images per second of one core, from disk to a batch."""
    records = source.splits["train"][:N_BATCHED]
    tokenizer = Tokenizer.from_captions([c for r in records for c in r.captions], 1, 32)
    with quiet():
        store = PixelStore.build(folder, source.images, [r.name for r in records],
                                 store_size(SIZE))
    dataset = Flickr30kDataset(records, store, tokenizer)
    pairs = [(source.images / r.name, r.captions[0]) for r in records]
    batches = sample_batches(dataset, BATCH_SIZE, captions_per_image=1, seed=0, epoch=1)
    batches = batches[: N_BATCHED // BATCH_SIZE]

    def naively() -> None:
        for _ in naive.naive_loader(pairs, tokenizer.encode, SIZE, BATCH_SIZE):
            pass

    def ours() -> None:
        for batch in batches:
            dataset.batch(batch)

    def ours_as_floats() -> None:
        for batch in batches:
            pixels = dataset.batch(batch).images
            crops = sample_crops(len(pixels), pixels.shape[1] - SIZE, flip=True)
            train_transform(pixels, SIZE, crops)

    torch.set_num_threads(1)
    times = interleaved([naively, ours, ours_as_floats])
    print("\nbatches, one core: images per second, and the ratio to the naive script")
    rows = ("naive: decode, resize, normalize, tokenize", "ours: pixels of the store, tokens",
            "ours, with crop, flip and normalize on the CPU")
    show(rows, times, N_BATCHED)


def time_store(folder: Path, source: DataSource) -> None:
    """Print the images per second of all cores that build the pixel store, or only decode."""
    names = [record.name for record in source.splits["train"][:N_STORED]]

    def in_threads(function: Callable) -> Callable:
        def run() -> None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for _ in pool.map(function, names):
                    pass
        return run

    def decode(name: str) -> None:
        with Image.open(source.images / name) as image:
            image.convert("RGB")

    def build() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as empty, quiet():
            PixelStore.build(Path(empty), source.images, names, store_size(SIZE))

    times = interleaved([
        in_threads(decode), in_threads(lambda name: load_resized(source.images / name,
                                                                store_size(SIZE))), build], 3)
    print(f"\nbuilding the store, {os.cpu_count()} cores: images per second, and the ratio to "
          "decoding alone")
    show(("decode", "decode and resize", "store: decode, resize, write, sync"), times, N_STORED)
    print(f"  store / decode and resize {ratio(times[1], times[2])}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of the block."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, \
            contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def show(rows: tuple[str, ...], times: list[list[float]], count: int) -> None:
    """Print a line for each of `times`, with its ratio to the first."""
    for name, own in zip(rows, times, strict=True):
        speeds = count / np.array(own)
        print(f"  {name:47} {np.median(speeds):8,.0f} ({speeds.min():,.0f} to {speeds.max():,.0f})"
              f"   {ratio(times[0], own)}")


if __name__ == "__main__":
    sys.exit(main())
