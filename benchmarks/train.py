"""An epoch of training: this project, the naive script, and two stronger ones.

    python -m benchmarks.train [--photos FOLDER]

From image files to the last step, each script in its usual precision; only the pixel store is built
before (benchmarks.input measures that). Dropout and crops are off and the batches are the same, so
the losses can be compared step by step. With a GPU the same is measured there, and also with
torch.compile. `ours, in place` is the step on one batch that is already on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import naive
from benchmarks.photos import write_dataset
from benchmarks.timing import installed, machine, one_process_each, ratio, spread
from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.loader import cache_on_device, sample_batches
from src.data.pixel_store import PixelStore
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.training.engine import forward_backward, train_one_epoch
from src.training.optim import build_optimizer, build_schedule
from src.utils.runtime import (
    choose_kernels,
    compute_dtype,
    grad_scaler,
    pick_device,
    seed_all,
    tune_malloc,
)

LR = 1e-4  # large enough for the losses of a few steps to show a mistake
# Contender -> packages that it needs.
CONTENDERS = {"naive": [], "timm": ["timm"],
              "open_clip": ["timm", "open_clip_torch", "braceexpand", "webdataset"],
              "ours": [], "ours, in place": [], "ours, compiled": []}


def main() -> int:
    """Print the tables; or, with --one, measure one contender and print its report as JSON."""
    args = parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            report = measure(args, Path(folder))
        print(json.dumps(report))
        return 0
    print(machine())
    print_table(args, "cpu")
    if torch.cuda.is_available():
        print_table(args, "cuda")
    else:
        print("\non a GPU\n  not measured: no GPU")
    return 0


def parse_args() -> argparse.Namespace:
    """Parse the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="JPEGs, repeated to size (default: generated)")
    parser.add_argument("--steps", type=int, default=3, help="an epoch (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--gpu-steps", type=int, default=40, help="(default: %(default)s)")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    return parser.parse_args()


def print_table(args: argparse.Namespace, device: str) -> None:
    """Measure all contenders on one device and print what each took."""
    steps = args.steps if device == "cpu" else args.gpu_steps
    flags = ["--steps", str(steps), "--batch-size", str(args.batch_size), "--device", device,
             "--image-size", str(args.image_size)]
    flags += ["--photos", str(args.photos)] if args.photos else []
    names = [name for name in args.contenders if device != "cpu" or "compiled" not in name]
    missing = {name: [p for p in CONTENDERS[name] if not installed(p)] for name in names}
    reports = one_process_each("benchmarks.train", [name for name in names if not missing[name]],
                               args.repeats, flags)
    count = steps * args.batch_size
    print(f"\non {device}: an epoch of {count} images at {args.image_size}, batches of "
          f"{args.batch_size}, {'real' if args.photos else 'generated'} images, "
          f"{args.repeats} runs")
    seconds = {name: [report["seconds"] for report in own] for name, own in reports.items()}
    for name in names:
        if missing[name]:
            print(f"  {name:15} not measured: {', '.join(missing[name])} is missing")
            continue
        speed = count / sorted(seconds[name])[len(seconds[name]) // 2]
        line = f"  {name:15} {spread(seconds[name], 1, 's'):26} {speed:8,.1f} images/s"
        if "naive" in seconds:
            line += f"   naive / this {ratio(seconds['naive'], seconds[name])}"
        print(line, *(f"  {note}" for note in reports[name][0].get("notes", [])))
    if {"ours", "ours, in place"} <= seconds.keys():
        print(f"  in place / ours {ratio(seconds['ours, in place'], seconds['ours'])}: 1 if an "
              "epoch takes no longer than its steps")
    print("  losses (timm's network starts from other weights)")
    for name in [name for name in seconds if "losses" in reports[name][0]]:
        print(f"    {name:13} "
              + " ".join(f"{loss:.4f}" for loss in reports[name][0]["losses"][:10]))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Return seconds, losses and notes of one contender's epoch, after a step to warm up."""
    if args.one.startswith("ours"):
        tune_malloc()  # as train.py
    device = pick_device(args.device)
    choose_kernels(deterministic=False)
    source = write_dataset(folder, args.steps * args.batch_size, args.photos)
    records = [ImageRecord(r.name, r.captions[:1]) for r in source.splits["train"]]
    tokenizer = Tokenizer.from_captions([r.captions[0] for r in records], 1, 32)
    store = PixelStore.build(folder, source.images, [r.name for r in records], args.image_size)
    dataset = Flickr30kDataset(records, store, tokenizer)
    seed_all(0, "weights")
    model = DualEncoder(ModelConfig(len(tokenizer), image_size=args.image_size, dropout=0.0,
                                    drop_connect=0.0))
    if args.one.startswith("ours"):
        if "compiled" in args.one:
            model.image_encoder.compile_training()
        run = in_place if "place" in args.one else ours
        return run(model.to(device), cache_on_device(dataset, device), args.batch_size)
    order = [image for batch in sample_batches(dataset, args.batch_size, 1, seed=0, epoch=1)
             for image, _ in batch]  # the batches of this project
    pairs = [(source.images / records[i].name, records[i].captions[0]) for i in order]
    return theirs(args.one, model, pairs, tokenizer, args.batch_size, device)


def ours(model: DualEncoder, dataset: Flickr30kDataset, batch_size: int) -> dict:
    """Train an epoch as train.py does."""
    device = model.logit_scale.device
    dtype = compute_dtype(device)
    first_step = warm_up(model, dataset, batch_size)
    optimizer = build_optimizer(model, LR, weight_decay=0.01)
    start = time.perf_counter()
    progress = train_one_epoch(
        model, dataset, optimizer, build_schedule(optimizer, 0, 1, "constant"),
        grad_scaler(device, dtype), batch_size=batch_size, captions_per_image=1, flip=False,
        seed=0, epoch=1, dtype=dtype)
    losses = progress.losses.tolist()  # waits for the device
    seconds = time.perf_counter() - start
    notes = [f"waited for data {progress.wait_seconds / progress.seconds:.1%}",
             f"first step {first_step:.1f} s"]
    if model.image_encoder.compiled:
        notes.append("compiled")
    return {"seconds": seconds, "losses": losses, "notes": notes}


def in_place(model: DualEncoder, dataset: Flickr30kDataset, batch_size: int) -> dict:
    """Repeat the step on one batch on the device: an epoch without its input."""
    device = model.logit_scale.device
    dtype = compute_dtype(device)
    warm_up(model, dataset, batch_size)
    optimizer, scaler = build_optimizer(model, LR, weight_decay=0.01), grad_scaler(device, dtype)
    batches = sample_batches(dataset, batch_size, 1, seed=0, epoch=1)
    batch = dataset.batch(batches[0]).to(device)
    start = time.perf_counter()
    for step in range(len(batches)):
        loss = forward_backward(model, scaler, batch, flip=False, key=(0, 1, step), dtype=dtype)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.clamp_logit_scale()
    loss.item()  # waits for the device
    return {"seconds": time.perf_counter() - start}


def warm_up(model: DualEncoder, dataset: Flickr30kDataset, batch_size: int) -> float:
    """Compute a step and undo it. Returns its seconds, with those of compiling."""
    start = time.perf_counter()
    device = model.logit_scale.device
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = dataset.batch(sample_batches(dataset, batch_size, 1, seed=0, epoch=1)[0]).to(device)
    forward_backward(model.train(), grad_scaler(device), batch, flip=False, key=(0,),
                     dtype=compute_dtype(device)).item()
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    return time.perf_counter() - start


def theirs(
    name: str, model: DualEncoder, pairs: naive.Pairs, tokenizer: Tokenizer, batch_size: int,
    device: torch.device,
) -> dict:
    """Train an epoch with another script, from the weights of `model` where the names agree."""
    make_model, make_loader = {
        "naive": (naive.NaiveModel, naive.naive_loader),
        "timm": (naive.TimmModel, naive.timm_loader),
        "open_clip": (naive.TimmModel, naive.open_clip_loader)}[name]
    size = model.config.image_size
    other = make_model(len(tokenizer), size, dropout=0.0, drop_connect=0.0)
    loss_function = naive.naive_loss
    if name == "open_clip":
        from open_clip.loss import ClipLoss

        loss_function = ClipLoss()
    state = model.state_dict()
    if name != "naive":  # timm has other names for the tensors of the network
        state = {key: value for key, value in state.items() if "image_encoder." not in key}
    other.load_state_dict(state, strict=name == "naive")
    other.to(device)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    flags = dict(lr=LR, device=device, mixed_precision=name != "naive")
    naive.train(other, make_loader(pairs[:batch_size], tokenizer.encode, size, batch_size),
                loss_function, **flags)  # a step to warm up
    other.load_state_dict(before)
    loader = make_loader(pairs, tokenizer.encode, size, batch_size)
    start = time.perf_counter()
    losses = naive.train(other, loader, loss_function, **flags)
    return {"seconds": time.perf_counter() - start, "losses": losses}


if __name__ == "__main__":
    sys.exit(main())
