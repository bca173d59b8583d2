"""Embedding images: the naive script and this project.

    python -m benchmarks.embed [--photos FOLDER] [--weights FILE]

Each runs in a new process, in turn. `ours` reads the pixel store; `ours, from
files` also decodes, as a search over a new folder does. The store has no margin
for random crops here, so that all have the same pixels; `from files` takes the
center of a slightly larger image.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks import naive
from benchmarks.photos import write_dataset
from benchmarks.timing import machine, one_process_each, print_report, ratio, spread
from src.data.dataset import Flickr30kDataset
from src.data.pixel_store import PixelStore
from src.evaluation.embed import embed_images
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.search.update_index import update_index
from src.utils.runtime import pick_device, seed_all, tune_malloc

SIZE = 224
CONTENDERS = ("naive", "ours", "ours, from files")


def main() -> int:
    """Print the tables; with --one, measure one contender and print a report in JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of JPEGs (default: generated)")
    parser.add_argument("--weights", default="none", help="of the image encoder (default: random, "
                        "with the BatchNorm statistics of some images)")
    parser.add_argument("--count", type=int, default=256,
                        help="number of images (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print_report(lambda folder: measure(args, folder))
        return 0
    print(machine())
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        table(args, device)
    if "cuda" not in devices:
        print("\non a GPU\n  not measured: no GPU")
    return 0


def table(args: argparse.Namespace, device: str) -> None:
    """Measure all contenders on one device, and print a line for each."""
    flags = ["--weights", args.weights, "--count", str(args.count), "--device", device]
    flags += ["--photos", str(args.photos)] if args.photos else []
    reports = one_process_each("benchmarks.embed", list(CONTENDERS), args.repeats, flags)
    print(f"\non {device}: {args.count} images at {SIZE} pixels, "
          f"{'real' if args.photos else 'generated'}, {args.repeats} runs")
    naively = np.array(reports["naive"][0]["embeddings"])
    seconds = {name: [report["seconds"] for report in own] for name, own in reports.items()}
    for name, own in reports.items():
        cosine = (naively * np.array(own[0]["embeddings"])).sum(1).min()
        speed = args.count / sorted(seconds[name])[len(seconds[name]) // 2]
        print(f"  {name:17} {spread(seconds[name], 1, 's'):26} {speed:8,.1f} images/s   "
              f"naive / this {ratio(seconds['naive'], seconds[name])}   "
              f"minimum cosine to naive {cosine:.5f}")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Return the seconds of one contender, and the embeddings of the first images."""
    if args.one != "naive":
        tune_malloc()  # as evaluate.py and search.py do
    device = pick_device(args.device)
    records = write_dataset(folder, args.count, args.photos).splits["train"]
    names = [record.name for record in records]
    tokenizer = Tokenizer.from_captions([c for r in records for c in r.captions], 1, 32)
    pairs = [(folder / "images" / record.name, record.captions[0]) for record in records]
    loader = naive.naive_loader(pairs, tokenizer.encode, SIZE, batch_size=64)
    model = make_model(len(tokenizer), args.weights, loader).to(device)
    if args.one == "naive":
        other = naive.NaiveModel(len(tokenizer), SIZE, 0.0, 0.0)
        other.load_state_dict(model.state_dict())
        other.to(device)
        naive.embed(other, [next(iter(loader))], device)  # warms up
        start = time.perf_counter()
        embeddings = naive.embed(other, loader, device)
    elif args.one == "ours":
        store = PixelStore.build(folder, folder / "images", names, SIZE)
        dataset = Flickr30kDataset(records, store, tokenizer)
        embed_images(model, Flickr30kDataset(records[:64], store, tokenizer))
        start = time.perf_counter()
        embeddings = embed_images(model, dataset)
    else:
        start = time.perf_counter()
        index = update_index(folder / "index", folder / "images", "", model.config.embed_dim,
                             lambda: model)
        rows = {name: row for row, name in enumerate(index.names)}
        embeddings = np.asarray(index.embeddings)[[rows[name] for name in names]]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "embeddings": embeddings[:48].tolist()}


def make_model(vocab_size: int, weights: str, loader: DataLoader) -> DualEncoder:
    """Return the same model in every process.

    With random weights the BatchNorm statistics are those of some images; otherwise all images
    would have nearly the same embedding, and every cosine would be 1.
    """
    seed_all(0, "weights")
    model = DualEncoder(ModelConfig(vocab_size, image_size=SIZE, drop_connect=0.0))
    model.image_encoder.load_weights(weights)
    if weights == "none":
        images, _ = next(iter(loader))
        with torch.no_grad():
            for _ in range(20):
                model.train().encode_image(images[:16])
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
