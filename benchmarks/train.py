"""An epoch of training: ours beside the script that one would write, and two stronger ones.

    python -m benchmarks.train [--photos FOLDER]

From files on the disk to the last step, in float32 or mixed precision as each would have it; only
our store of decoded photos is built before (benchmarks.input measures that). Dropout and crops are
off and the batches are the same, so the losses can be compared step by step. With a GPU the same
rows are measured there; ours is then compiled, as train.py chooses for long runs, and `ours, eager`
is not. `ours, in place` is our step on one batch that is already on the device.
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
from src.data.dataset import Flickr30kDataset
from src.data.loader import cache_on_device
from src.data.pixel_store import PixelStore
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.training.engine import forward_backward, train_one_epoch
from src.training.optim import build_optimizer, build_schedule
from src.utils.runtime import compute_dtype, grad_scaler, pick_device, seed_all, tune_malloc

LR = 1e-4  # large enough for the losses of a few steps to show a mistake
CONTENDERS = {"naive": [], "timm": ["timm"], "open_clip": ["timm", "open_clip_torch"],
              "ours": [], "ours, in place": [], "ours, eager": []}
Pairs = list[tuple[Path, str]]


def main() -> int:
    """Print the table; or, with --one, measure one contender and report it in JSON."""
    args = parse_args()
    if args.one:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            report = measure(args, Path(folder))
        print(json.dumps(report))
        return 0
    print(machine())
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        table(args, device)
    if "cuda" not in devices:
        print("\non a GPU\n  not measured: no GPU")
    return 0


def parse_args() -> argparse.Namespace:
    """The flags."""
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


def table(args: argparse.Namespace, device: str) -> None:
    """Measure all contenders on one device, and print what each took."""
    steps = args.steps if device == "cpu" else args.gpu_steps
    flags = ["--steps", str(steps), "--batch-size", str(args.batch_size), "--device", device,
             "--image-size", str(args.image_size)]
    flags += ["--photos", str(args.photos)] if args.photos else []
    names = [name for name in args.contenders if device != "cpu" or "eager" not in name]
    lacking = {name: [p for p in CONTENDERS[name] if not installed(p)] for name in names}
    reports = one_process_each("benchmarks.train", [name for name in names if not lacking[name]],
                               args.repeats, flags)
    count = steps * args.batch_size
    print(f"\non {device}: an epoch of {count} photos at {args.image_size}, batches of "
          f"{args.batch_size}, {'real' if args.photos else 'generated'} photos, "
          f"{args.repeats} runs")
    seconds = {name: [report["seconds"] for report in own] for name, own in reports.items()}
    for name in names:
        if lacking[name]:
            print(f"  {name:15} not measured: {', '.join(lacking[name])} is missing")
            continue
        speed = count / sorted(seconds[name])[len(seconds[name]) // 2]
        against = f"   naive / this {ratio(seconds['naive'], seconds[name])}" \
            if "naive" in seconds else ""
        waited, warm_up = (reports[name][0].get(key) for key in ("wait_share", "warm_up"))
        print(f"  {name:15} {spread(seconds[name], 1, 's'):26} {speed:8,.1f} photos/s{against}"
              + (f"   waited for data {waited:.1%}" if waited is not None else "")
              + (f"   first step {warm_up:.1f} s" if warm_up is not None else ""))
    if {"ours", "ours, in place"} <= seconds.keys():
        print(f"  in place / ours {ratio(seconds['ours, in place'], seconds['ours'])}: "
              "how near the epoch comes to the bare step")
    print("  losses (timm's network starts from other weights)")
    for name in [name for name in seconds if "losses" in reports[name][0]]:
        shown = reports[name][0]["losses"][:10]
        print(f"    {name:13} " + " ".join(f"{loss:.4f}" for loss in shown))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Seconds and losses of one contender's epoch, after a step of warming up."""
    if args.one.startswith("ours"):
        tune_malloc()  # as train.py does
    device = pick_device(args.device)
    count = args.steps * args.batch_size
    source = write_dataset(folder, count + 1, args.photos)  # one validates
    records = source.splits["train"]
    tokenizer = Tokenizer.from_captions([c for r in records for c in r.captions], 1, 32)
    seed_all(0, "weights")
    model = DualEncoder(ModelConfig(len(tokenizer), image_size=args.image_size, dropout=0.0,
                                    drop_connect=0.0))
    if args.one.startswith("ours"):
        store = PixelStore.build(folder, source.images, [r.name for r in records], args.image_size)
        dataset = cache_on_device(Flickr30kDataset(records, store, tokenizer), device)
        if device.type != "cpu" and "eager" not in args.one:
            model.image_encoder.compile_training()
        run = in_place if "place" in args.one else ours
        return run(model.to(device), dataset, args.steps, args.batch_size)
    pairs = [(source.images / r.name, r.captions[0]) for r in records]
    return theirs(args.one, model, pairs, tokenizer, args.batch_size, device)


def ours(model: DualEncoder, dataset: Flickr30kDataset, steps: int, batch_size: int) -> dict:
    """The loop of train.py, on the photos in their order with the first caption of each."""
    first = [(i, dataset.first_caption[i : i + 1].numpy()) for i in range(steps * batch_size)]
    batches = [first[i : i + batch_size] for i in range(0, len(first), batch_size)]
    dataset.epoch = lambda *_: batches
    optimizer = build_optimizer(model, LR, weight_decay=0.01)
    scheduler = build_schedule(optimizer, 0, steps, "constant")
    device = model.logit_scale.device
    dtype = compute_dtype(device)
    scaler = grad_scaler(device, dtype)
    first_step = warm_up(model, dataset, batches[0])
    sums, progress = [], None
    start = time.perf_counter()
    for progress in train_one_epoch(
        model, dataset, optimizer, scheduler, scaler, batch_size=batch_size, captions_per_image=1,
        flip=False, seed=0, epoch=1, dtype=dtype,
    ):
        sums.append(progress.loss_sum.clone())
    total = torch.stack(sums).cpu()  # waits for the device
    seconds = time.perf_counter() - start
    losses = total.diff(prepend=torch.zeros(1)).tolist()
    return {"seconds": seconds, "losses": losses, "warm_up": first_step,
            "wait_share": progress.waited / progress.seconds}


def in_place(model: DualEncoder, dataset: Flickr30kDataset, steps: int, batch_size: int) -> dict:
    """Our step, again and again on one batch: what is left of an epoch without its input."""
    items = [(i, dataset.first_caption[i : i + 1].numpy()) for i in range(batch_size)]
    optimizer = build_optimizer(model, LR, weight_decay=0.01)
    device = model.logit_scale.device
    dtype = compute_dtype(device)
    scaler = grad_scaler(device, dtype)
    warm_up(model, dataset, items)
    batch = dataset.batch(items).to(device)
    start = time.perf_counter()
    for step in range(steps):
        loss = forward_backward(model, scaler, batch, flip=False, key=(0, 1, step), dtype=dtype)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.clamp_logit_scale()
    loss.item()
    return {"seconds": time.perf_counter() - start}


def warm_up(model: DualEncoder, dataset: Flickr30kDataset, items: list) -> float:
    """Throw away a step's gradients, take back its statistics; the seconds, with any compiling."""
    start = time.perf_counter()
    device = model.logit_scale.device
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward_backward(model.train(), grad_scaler(device), dataset.batch(items).to(device), flip=False,
             key=(0,), dtype=compute_dtype(device))
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def theirs(
    name: str, model: DualEncoder, pairs: Pairs, tokenizer: Tokenizer, batch_size: int,
    device: torch.device,
) -> dict:
    """The other scripts, from the same weights where the network is the same."""
    kinds = {"naive": (naive.NaiveModel, naive.naive_loader),
             "timm": (naive.TimmModel, naive.timm_loader),
             "open_clip": (naive.TimmModel, naive.open_clip_loader)}
    make_model, make_loader = kinds[name]
    size = model.config.image_size
    other = make_model(len(tokenizer), size, dropout=0.0, drop_connect=0.0)
    loss_function = naive.naive_loss
    if name == "open_clip":
        from open_clip.loss import ClipLoss

        loss_function = ClipLoss()
    if name == "naive":
        other.load_state_dict(model.state_dict())
    else:
        # timm names its tensors otherwise; the rest is the same.
        other.load_state_dict({key: value for key, value in model.state_dict().items()
                               if not key.startswith("image_encoder.")}, strict=False)
    other.to(device)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    flags = dict(lr=LR, device=device, mixed_precision=name != "naive")
    # One step to warm up, of which nothing stays.
    naive.train(other, make_loader(pairs[:batch_size], tokenizer.encode, size, batch_size),
                loss_function, **flags)
    other.load_state_dict(before)
    loader = make_loader(pairs, tokenizer.encode, size, batch_size)
    start = time.perf_counter()
    losses = naive.train(other, loader, loss_function, **flags)
    return {"seconds": time.perf_counter() - start, "losses": losses}


if __name__ == "__main__":
    sys.exit(main())
