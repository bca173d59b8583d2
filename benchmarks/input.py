"""The way from photos on the disk to batches: the naive script's and ours.

    python -m benchmarks.input [--photos FOLDER]

One core feeds; the store is built with all cores, beside the same number of threads that do nothing
but decode.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import naive
from benchmarks.photos import write_data_set
from benchmarks.timing import interleaved, machine, ratio
from src.data.dataset import Flickr30kDataset
from src.data.images import load_resized
from src.data.loader import sample_batches
from src.data.pixel_store import PixelStore, store_size
from src.data.source import DataSource
from src.data.transforms import sample_crops, train_transform
from src.models.tokenizer import Tokenizer

BATCH, SIZE = 64, 224
N_FEED, N_STORE = 4 * BATCH, 384


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="JPEGs, repeated to size (default: generated)")
    args = parser.parse_args()
    print(f"{machine()}; {'real' if args.photos else 'generated'} photos")
    with tempfile.TemporaryDirectory() as folder:
        source = write_data_set(Path(folder), max(N_FEED, N_STORE) + 1, args.photos)
        feeding(Path(folder), source)
        building(Path(folder), source)
    return 0


def feeding(folder: Path, source: DataSource) -> None:
    """Photos a second of one core, from disk to a batch."""
    records = source.splits["train"][:N_FEED]
    tokenizer = Tokenizer.from_captions([c for r in records for c in r.captions], 1, 32)
    with quiet():
        store = PixelStore.build(folder, source.images, [r.name for r in records],
                                 store_size(SIZE))
    dataset = Flickr30kDataset(records, store, tokenizer)
    pairs = [(source.images / r.name, r.captions[0]) for r in records]
    batches = sample_batches(dataset, BATCH, captions_per_image=1, seed=0, epoch=1)[: N_FEED // BATCH]

    def naively() -> None:
        for _ in naive.naive_loader(pairs, tokenizer.encode, SIZE, BATCH):
            pass

    def ours() -> None:
        for batch in batches:
            dataset.batch(batch)

    def ours_as_floats() -> None:
        for batch in batches:
            pixels = dataset.batch(batch).images
            train_transform(pixels, SIZE, sample_crops(BATCH, pixels.shape[1] - SIZE, flip=True))

    torch.set_num_threads(1)
    times = interleaved([naively, ours, ours_as_floats])
    print("\nfeeding, one core: photos a second, and how many times the naive script's")
    rows = ("naive: decode, resize, normalize, tokenize", "ours: bytes from the store, tokens",
            "ours with crop, flip, normalize on the CPU too")
    show(rows, times, N_FEED)


def building(folder: Path, source: DataSource) -> None:
    """The store beside decoding alone, all cores."""
    names = [record.name for record in source.splits["train"][:N_STORE]]

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
    print(f"\nbuilding the store, {os.cpu_count()} cores: photos a second, and the share of "
          "decoding alone")
    show(("decode", "decode and resize", "store: decode, resize, write, sync"), times, N_STORE)
    print(f"  store / decode and resize {ratio(times[1], times[2])}")


@contextlib.contextmanager
def quiet() -> object:
    """Without the progress bar and the line that it starts with."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, \
            contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def show(rows: tuple[str, ...], times: list[list[float]], count: int) -> None:
    """A line for each of `times`, compared with the first."""
    for name, own in zip(rows, times, strict=True):
        speeds = count / np.array(own)
        print(f"  {name:47} {np.median(speeds):8,.0f} ({speeds.min():,.0f} to {speeds.max():,.0f})"
              f"   {ratio(times[0], own)}")


if __name__ == "__main__":
    sys.exit(main())
