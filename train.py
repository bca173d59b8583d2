"""Train the dual encoder on photos and captions; keep the best epoch.

    python train.py                    # Flickr30k in data/flickr30k, the recipe of the README
    python train.py --recipe strong    # what this architecture can do
    python train.py --demo             # a small drawn world, about a minute on two CPU cores
    python train.py --max-images 2000 --weights none
    python train.py --resume           # go on where the run was left, even within an epoch
    torchrun --nproc-per-node 2 train.py

Writes below results/: models/flickr30k_clip_best.pth (model_state, vocab, config, metrics),
models/flickr30k_clip_last.pth (for --resume), log.jsonl (a line an epoch), args.json, curves.png,
examples.png (validation captions with their top five photos) and rejected.csv.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from signal import Signals

import torch

from src.checkpoint import load_checkpoint
from src.cli import (
    Data,
    Results,
    add_data_arguments,
    add_results_arguments,
    add_split_arguments,
    prepare_demo,
    prepare_results,
    resolve_data,
    resolve_results,
)
from src.dataset import Flickr30kDataset, open_source
from src.distributed import (
    any_process,
    end_processes,
    rank,
    share_batchnorm,
    start_processes,
    wait_for_all,
    world_size,
)
from src.engine import train_one_epoch
from src.errors import UserError, run_script
from src.features import frozen_features
from src.feed import keep_on_device
from src.files import only_writer, write_atomic
from src.inputs import open_datasets
from src.model import DualEncoder, ModelConfig
from src.optim import build_optimizer, build_schedule
from src.plots import plot_curves
from src.recipes import RECIPES, add_model_arguments, add_training_arguments, apply_recipe
from src.report import plot_examples, print_metrics
from src.retrieval import evaluate_retrieval
from src.run_state import RunState, compare_flags, load_run
from src.runtime import (
    compute_deterministically,
    compute_dtype,
    grad_scaler,
    keep_freed_memory,
    out_of_memory_told,
    pays_to_compile,
    pick_device,
    seed_all,
    stop_on_request,
)
from src.tokenizer import Tokenizer


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, tuple | None]:
    """The flags; and with --resume the run to go on with, whose flags are then the defaults.

    Raises:
        UserError: there is no such run, or a flag contradicts it.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_results_arguments(parser)
    add_data_arguments(parser)
    add_split_arguments(parser)
    add_model_arguments(parser)
    add_training_arguments(parser)
    apply_recipe(parser, argv)
    args = parser.parse_args(argv)
    if not args.resume:
        return args, None
    results = resolve_results(args)
    earlier = load_run(results)
    # A run of an earlier version lacks what the seed recipe leaves off.
    flags = {**RECIPES["seed"], **earlier[2]["args"]}
    # The run's flags, but for its place: the folder may have been moved since.
    parser.set_defaults(**{**flags, "results_dir": results.folder})
    args = parser.parse_args(argv)
    compare_flags(plain(args), flags)
    return args, earlier


def plain(args: argparse.Namespace) -> dict:
    """The flags as plain values, for JSON and checkpoints."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()}


def main(argv: list[str] | None = None) -> int:
    """Join the processes, prepare the places, train. Returns the exit status."""
    keep_freed_memory()
    args, earlier = parse_args(argv)
    data, results = resolve_data(args), resolve_results(args)
    start_processes()
    try:
        device = pick_device(args.device)
        if args.deterministic:
            compute_deterministically()
        if rank() == 0:
            prepare_results(results.folder)
            prepare_demo(args, data)
        wait_for_all()
        with only_writer(results.folder) if rank() == 0 else nullcontext(), out_of_memory_told():
            return train(args, data, results, device, earlier)
    finally:
        end_processes()


def train(
    args: argparse.Namespace, data: Data, results: Results, device: torch.device,
    earlier: tuple | None,
) -> int:
    """Wire the rooms, loop over the epochs, keep the best. Returns the exit status."""
    train_set, val_set, tokenizer = open_sets(args, data, results)
    check_batch(args, len(train_set.records), device)
    model = share_batchnorm((earlier[0] if earlier else build_model(args, tokenizer)).to(device))
    optimizer = build_optimizer(model, args.lr, args.weight_decay, args.image_encoder_lr)
    dtype = compute_dtype(device, args.precision)
    run = RunState(model, tokenizer, optimizer, grad_scaler(device, dtype), plain(args),
                   {"train": train_set.digest(), "validation": val_set.digest()}, args.ema_decay)
    if earlier:
        run.restore(earlier[2], results.last)
        step = f" and {run.progress.step} steps" if run.progress else ""
        print(f"resumed after epoch {len(run.log)}{step}")
    # Steps an epoch are all but the same in every epoch, since the batches are full.
    n_steps = len(train_set.epoch(args.batch_size, args.captions_per_image, args.seed, 1))
    frozen_epochs = args.epochs if args.freeze_image_encoder else min(args.head_epochs, args.epochs)
    tuned_steps = (args.epochs - frozen_epochs) * n_steps
    compiled = args.compile
    if compiled is None:  # BatchNorm that several GPUs share has messages in its midst
        compiled = (pays_to_compile(device, tuned_steps)
                    and (world_size() == 1 or args.freeze_batchnorm))
    if compiled:
        model.image_encoder.compile_training()
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {args.image_encoder}, {len(tokenizer):,} words, "
          f"{n_parameters / 1e6:.1f} M parameters, on {device}{', compiled' if compiled else ''}")
    scheduler = build_schedule(optimizer, args.warmup_steps, args.epochs * n_steps, args.schedule,
                               done_steps=run.steps, restart_at=frozen_epochs * n_steps)
    if rank() == 0:
        if not earlier:
            results.put_aside()
        write_atomic(results.folder / "args.json", json.dumps(run.flags, indent=2).encode())

    @cache
    def sets(frozen: bool) -> tuple[Flickr30kDataset, Flickr30kDataset]:
        if frozen:
            return tuple(
                each.holding(frozen_features(data.cache, model.image_encoder, each, dtype))
                for each in (train_set, val_set))
        return keep_on_device(train_set, device), val_set

    with stop_on_request() as request:
        for epoch in range(len(run.log) + 1, args.epochs + 1):
            its_train_set, its_val_set = sets(epoch <= frozen_epochs)
            saved = time.monotonic()
            for progress in train_one_epoch(
                model, its_train_set, optimizer, scheduler, run.scaler, progress=run.progress,
                batch_size=args.batch_size, captions_per_image=args.captions_per_image,
                flip=args.flip, seed=args.seed, epoch=epoch, dtype=dtype,
                chunk_size=args.chunk_size, freeze_batchnorm=args.freeze_batchnorm,
            ):
                run.advance(progress)
                stop = any_process(request.signal is not None)
                if rank() == 0 and (stop or time.monotonic() - saved > 60 * args.save_every):
                    run.save(results)
                    saved = time.monotonic()
                if stop:
                    return stopped(request.signal, epoch, run, args)
            start = time.perf_counter()
            metrics = evaluate_retrieval(run.evaluated, its_val_set)
            is_best = run.finish_epoch(metrics, time.perf_counter() - start)
            if rank() == 0:
                keep(run, results, is_best)
    is_first = rank() == 0
    end_processes()  # what is left is for one
    if is_first:
        show_best(results, val_set, device)
    return 0


def open_sets(
    args: argparse.Namespace, data: Data, results: Results
) -> tuple[Flickr30kDataset, Flickr30kDataset, Tokenizer]:
    """Captions matched with photos and split, every photo decoded once, words from train alone."""
    source = open_source(
        data.images, data.annotations, args.val_fraction, args.seed, args.max_images
    )
    splits = [source.splits["train"], source.splits["val"]]
    captions = [caption for record in splits[0] for caption in record.captions]
    tokenizer = Tokenizer.from_captions(captions, args.min_freq, args.context_length)
    sets = open_datasets(source, splits, tokenizer, args.image_size, cache=data.cache,
                         rejected=results.folder / "rejected.csv", strict=args.strict)
    for split, dataset in zip(("train", "validation"), sets, strict=True):
        print(f"{split}: {len(dataset.records):,} photos, {len(dataset):,} captions")
        if len(dataset.records) < 2:
            raise UserError(f"{len(dataset.records)} photos are too few for {split}; it takes 2: "
                            "bring more, or divide them otherwise with --val-fraction")
    return *sets, tokenizer


def check_batch(args: argparse.Namespace, n_photos: int, device: torch.device) -> None:
    """Raise UserError where the processes cannot share a batch."""
    batch_size = min(args.batch_size, n_photos)
    if batch_size < world_size():
        raise UserError(f"a batch of {batch_size} photos leaves some of {world_size()} processes "
                        "without one: choose a larger --batch-size or fewer processes")
    if args.chunk_size and device.type == "cuda" and batch_size % world_size():
        # Pieces would differ in number, and BatchNorm over the processes would wait for ever.
        raise UserError(f"with --chunk-size a batch of {batch_size} photos must divide by "
                        f"{world_size()} processes: choose another --batch-size")


def build_model(args: argparse.Namespace, tokenizer: Tokenizer) -> DualEncoder:
    """A fresh model; the same seed starts from the same weights."""
    seed_all(args.seed, "weights")
    model = DualEncoder(ModelConfig(
        vocab_size=len(tokenizer), image_encoder=args.image_encoder, image_size=args.image_size,
        context_length=args.context_length, token_dim=args.token_dim, embed_dim=args.embed_dim,
        dropout=args.dropout, drop_connect=args.drop_connect, word_dropout=args.word_dropout,
        mirror_mean=args.mirror_mean,
    ))
    model.image_encoder.load_weights(args.weights)
    return model


def keep(run: RunState, results: Results, is_best: bool) -> None:
    """Write what a finished epoch leaves: checkpoints, log, curves, and a line on the screen."""
    if is_best:
        run.save_best(results)
    write_atomic(results.folder / "log.jsonl",
                 "".join(json.dumps(line) + "\n" for line in run.log).encode())
    plot_curves(results.folder / "curves.png", run.log)
    run.save(results)  # last: a run killed before it goes through all of this again
    print_metrics(run.log[-1], is_best)


def stopped(
    signal: Signals | None, epoch: int, run: RunState, args: argparse.Namespace
) -> int:
    """Say that the run was saved and how it goes on; returns the exit status of a signal."""
    launcher = f"torchrun --nproc-per-node {world_size()}" if world_size() > 1 else "python"
    place = " --demo" if args.demo else ""
    place += f" --results-dir {shlex.quote(str(args.results_dir))}" if args.results_dir else ""
    if rank() == 0:
        print(f"stopped after step {run.progress.step} of epoch {epoch}, and saved; it goes on "
              f"with\n    {launcher} train.py --resume{place}", file=sys.stderr)
    return 128 + (signal or Signals.SIGTERM)


def show_best(results: Results, val_set: Flickr30kDataset, device: torch.device) -> None:
    """Name the best epoch, and draw what it learned."""
    model, _, best = load_checkpoint(results.best)
    plot_examples(results.folder / "examples.png", model.to(device), val_set)
    print(f"best epoch {best['epoch']}, rsum {best['metrics']['rsum']:.1f}: {results.best}")
    print("captions with their top five photos, the right one framed: "
          f"{results.folder / 'examples.png'}")


if __name__ == "__main__":
    run_script(main)
