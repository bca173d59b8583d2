"""Growth of time and memory: each stage with 1, 3 and 10 times as many images.

    python -m benchmarks.memory     # all stages, and a large batch in chunks

Each stage runs in a new process. The memory is the anonymous memory that the
stage adds to the process; the page cache with the decoded images is not in it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.captions import write_captions
from benchmarks.photos import write_dataset
from benchmarks.timing import PeakMemory, machine, one_process_each, print_report
from src.data.captions import read_annotations
from src.data.dataset import Batch, Flickr30kDataset
from src.data.pixel_store import PixelStore, store_size
from src.evaluation.embed import embed_images, embed_tokens
from src.evaluation.metrics import retrieval_metrics
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.training.engine import forward_backward, train_one_epoch
from src.training.optim import build_optimizer, build_schedule
from src.utils.runtime import compute_dtype, grad_scaler, seed_all, tune_malloc

TIMES = (1, 3, 10)
# Images at 1 times: a tenth of Flickr30k if the stage takes seconds, fewer if it is slow.
STAGES = {"read captions": 3_178, "vocabulary and tokens": 3_178, "score": 500,
          "decode into the store": 200, "train an epoch": 200, "embed images": 200}
SMALL = 64  # image size in the stages that train and embed
N_FLICKR30K = 31_783
CPU = torch.device("cpu")


def main() -> int:
    """Print both tables; with --one, measure one stage and print a report in JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunked-batch", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--chunk-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=96,
                        help="image size of the large batch (default: %(default)s)")
    parser.add_argument("--photos", type=Path, help="folder of JPEGs (default: generated)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print_report(lambda folder: measure(args, folder))
        return 0
    print(machine())
    growth(args)
    chunks(args)
    return 0


def growth(args: argparse.Namespace) -> None:
    """Print each stage at each size, a linear fit, and its prediction for Flickr30k."""
    print("\nstage                   images            seconds              MB"
          "                        constant       KB an image  Flickr30k: s, GB")
    for stage, base in STAGES.items():
        flags = ["--photos", str(args.photos)] if args.photos else []
        reports = [one_process_each("benchmarks.memory", [stage], 1,
                                    ["--times", str(times), *flags])[stage][0] for times in TIMES]
        counts = np.array([base * times for times in TIMES])
        seconds, memory = (np.array([r[key] for r in reports]) for key in ("seconds", "bytes"))
        # Scoring compares each image with each caption; all other stages are linear.
        power = 2 if stage == "score" else 1
        constant, start = np.polyfit(counts**power, seconds, 1)
        bytes_per_image, bytes_at_start = np.polyfit(counts, memory, 1)
        print(f"{stage:23} {' '.join(f'{c:6,}' for c in counts)} "
              f"{' '.join(f'{s:7.2f}' for s in seconds)} "
              f"{' '.join(f'{m / 1e6:7,.0f}' for m in memory)}   "
              f"{1e6 * constant:10,.4g} us{'/images²' if power == 2 else '/image':8} "
              f"{bytes_per_image / 1e3:8.2f}   {start + constant * N_FLICKR30K**power:8,.1f} "
              f"{(bytes_at_start + bytes_per_image * N_FLICKR30K) / 1e9:6.2f}", flush=True)


def chunks(args: argparse.Namespace) -> None:
    """Print the memory of a step: for a batch of the size of a chunk, and a large one in chunks."""
    flags = ["--chunk-size", str(args.chunk_size), "--image-size", str(args.image_size),
             "--chunked-batch", str(args.chunked_batch)]
    reports = one_process_each("benchmarks.memory", ["whole", "chunked"], 1, flags)
    whole, chunked = (reports[name][0] for name in ("whole", "chunked"))
    print(f"\none step at {args.image_size} pixels, memory of the whole process")
    print(f"  batch {args.chunk_size}: {whole['total'] / 1e9:.2f} GB; batch {args.chunked_batch:,} "
          f"with --chunk-size {args.chunk_size}: {chunked['total'] / 1e9:.2f} GB, "
          f"{chunked['total'] / whole['total']:.3f} times")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Return the seconds and the peak memory of one stage, without those of preparing it."""
    tune_malloc()  # as the scripts do
    count = STAGES.get(args.one, 1) * args.times
    stage = prepare(args, count, folder)
    with PeakMemory() as peak:
        before, start = peak.bytes, time.perf_counter()
        stage()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak.bytes - before, "total": peak.bytes}


def prepare(args: argparse.Namespace, count: int, folder: Path) -> Callable[[], object]:
    """Prepare the input of a stage, and return the stage as a function."""
    if args.one in ("whole", "chunked"):
        return one_step(args)
    if args.one == "score":
        rows = torch.nn.functional.normalize(torch.randn(6 * count, 256))
        image_index = torch.arange(count).repeat_interleave(5)
        return lambda: retrieval_metrics(rows[:count], rows[count:], image_index)
    if args.one in ("read captions", "vocabulary and tokens"):
        write_captions(folder / "annotations.csv", count)
        if args.one == "read captions":
            return lambda: read_annotations(folder / "annotations.csv")
        records = read_annotations(folder / "annotations.csv").records
        captions = [caption for record in records for caption in record.captions]
        return lambda: Tokenizer.from_captions(captions, 2, 32).encode(captions)
    source = write_dataset(folder, count, args.photos)
    records = source.splits["train"]
    names = [record.name for record in records]
    if args.one == "decode into the store":
        return lambda: PixelStore.build(folder, source.images, names, store_size(224))
    store = PixelStore.build(folder, source.images, names, store_size(SMALL))
    captions = [caption for record in records for caption in record.captions]
    dataset = Flickr30kDataset(records, store, Tokenizer.from_captions(captions, 2, 32))
    model = DualEncoder(ModelConfig(20_000, image_size=SMALL))
    if args.one == "embed images":
        return lambda: (embed_images(model, dataset), embed_tokens(model, dataset.tokens))
    optimizer = build_optimizer(model, 1e-4, 0.01)
    return lambda: train_one_epoch(
        model, dataset, optimizer, build_schedule(optimizer, 0, 1, "constant"),
        grad_scaler(CPU), batch_size=64, captions_per_image=5, flip=True, seed=0, epoch=1,
        dtype=compute_dtype(CPU))


def one_step(args: argparse.Namespace) -> Callable[[], object]:
    """Return two training steps on random pixels; the first one allocates the optimizer state."""
    count = args.chunk_size if args.one == "whole" else args.chunked_batch
    size = store_size(args.image_size)
    rng = np.random.default_rng(0)

    def step() -> None:
        batch = Batch(
            images=torch.from_numpy(rng.integers(0, 256, (count, size, size, 3), np.uint8)),
            tokens=torch.from_numpy(rng.integers(2, 10_000, (count, 32))),
            image_index=torch.arange(count), counts=[1] * count, local=range(count))
        seed_all(0)
        model = DualEncoder(ModelConfig(10_000, image_size=args.image_size)).train()
        optimizer = build_optimizer(model, 1e-4, 0.01)
        for number in range(2):
            forward_backward(model, grad_scaler(CPU), batch, flip=True, key=(0, number),
                             dtype=compute_dtype(CPU), chunk_size=args.chunk_size)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    sys.exit(main())
