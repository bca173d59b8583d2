"""Train the dual encoder on photos and captions; keep the best epoch.

    python train.py                    # Flickr30k in data/flickr30k, the recipe of the README
    python train.py --demo             # a small drawn world, about a minute on two CPU cores
    python train.py --max-images 2000 --weights none
    python train.py --resume --epochs 10

Writes below results/: models/flickr30k_clip_best.pth (model_state, vocab, config, metrics),
models/flickr30k_clip_last.pth (for --resume), log.jsonl (a line an epoch), args.json, curves.png,
examples.png (validation captions with their top five photos) and rejected.csv.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from src.checkpoint import load_checkpoint, save_checkpoint
from src.cli import (
    add_data_arguments,
    add_results_arguments,
    add_split_arguments,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    prepare_demo,
    prepare_results,
    resolve_data,
    resolve_results,
)
from src.dataset import Flickr30kDataset, open_source
from src.engine import train_one_epoch
from src.errors import UserError, run_script
from src.files import write_atomic
from src.image_encoder import IMAGE_ENCODERS
from src.model import DualEncoder, ModelConfig
from src.optim import build_optimizer, build_schedule
from src.pixels import PixelStore, store_size
from src.plots import plot_curves
from src.report import plot_examples, print_metrics, write_rejected
from src.retrieval import evaluate_retrieval
from src.runtime import grad_scaler, pick_device, seed_all
from src.tokenizer import Tokenizer

if TYPE_CHECKING:  # src/__init__.py is to come before torch
    import torch

# From random weights, on pictures of 64 pixels: another task than fine-tuning, so another recipe.
DEMO = dict(weights="none", image_size=64, epochs=10, lr=3e-3, schedule="cosine", warmup_steps=20,
            captions_per_image=5, flip=False, min_freq=1, drop_connect=0.0)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Flags with the stated recipe as defaults; --demo puts its own defaults in their place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_results_arguments(parser)
    add_data_arguments(parser)
    add_split_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--image-encoder", choices=IMAGE_ENCODERS, default="efficientnet-b0",
                       help="(default: %(default)s)")
    model.add_argument("--weights", default="imagenet", metavar="imagenet|none|PATH",
                       help="the image encoder's start (default: %(default)s)")
    model.add_argument("--image-size", type=positive_int, default=224, metavar="PIXELS",
                       help="side of the input pictures (default: %(default)s)")
    model.add_argument("--embed-dim", type=positive_int, default=256, metavar="D",
                       help="of the shared space (default: %(default)s)")
    model.add_argument("--token-dim", type=positive_int, default=512, metavar="D",
                       help="of the word embeddings (default: %(default)s)")
    model.add_argument("--context-length", type=positive_int, default=32, metavar="WORDS",
                       help="words kept of a caption (default: %(default)s)")
    model.add_argument("--min-freq", type=positive_int, default=2, metavar="N",
                       help="a word must come N times in the train captions (default: %(default)s)")
    model.add_argument("--dropout", type=fraction, default=0.1, metavar="P",
                       help="of the features before the projections (default: %(default)s)")
    model.add_argument("--drop-connect", type=fraction, default=0.2, metavar="P",
                       help="of the image encoder's last residual block (default: %(default)s)")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, default=5, help="(default: %(default)s)")
    training.add_argument("--batch-size", type=positive_int, default=64, metavar="PHOTOS",
                          help="(default: %(default)s)")
    training.add_argument("--captions-per-image", type=positive_int, default=1, metavar="N",
                          help="captions that each photo brings to a batch; with 5 an epoch takes "
                          "a fifth of the image passes (default: %(default)s)")
    training.add_argument("--lr", type=positive_float, default=2e-5, help="(default: %(default)s)")
    training.add_argument("--weight-decay", type=non_negative_float, default=0.01,
                          help="(default: %(default)s)")
    training.add_argument("--schedule", choices=("constant", "cosine"), default="constant",
                          help="of the learning rate (default: %(default)s)")
    training.add_argument("--warmup-steps", type=non_negative_int, default=0, metavar="N",
                          help="steps of linear warm-up (default: %(default)s)")
    training.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                          help="mirror half of the photos (default: %(default)s)")
    training.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps "
                          "(default: %(default)s)")
    training.add_argument("--resume", action="store_true",
                          help="go on after the last finished epoch of --results-dir")
    if parser.parse_known_args(argv)[0].demo:
        parser.set_defaults(**DEMO)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Wire the rooms, loop over the epochs, keep the best. Returns the exit status."""
    args = parse_args(argv)
    data, results = resolve_data(args), resolve_results(args)
    device = pick_device(args.device)
    prepare_results(results.folder)

    # Data: captions matched with photos and split, every photo decoded once.
    prepare_demo(args, data)
    source = open_source(
        data.images, data.annotations, args.val_fraction, args.seed, args.max_images
    )
    train_records, val_records = source.splits["train"], source.splits["val"]
    names = [record.name for record in train_records + val_records]
    store = PixelStore.build(data.cache, data.images, names, store_size(args.image_size))
    print(write_rejected(results.folder / "rejected.csv", source, store))

    # Vocabulary from the train captions alone.
    captions = [caption for record in train_records for caption in record.captions]
    tokenizer = Tokenizer.from_captions(captions, args.min_freq, args.context_length)
    train_set = Flickr30kDataset(train_records, store, tokenizer)
    val_set = Flickr30kDataset(val_records, store, tokenizer)
    for split, dataset in (("train", train_set), ("validation", val_set)):
        print(f"{split}: {len(dataset.records):,} photos, {len(dataset):,} captions")
        if len(dataset.records) < 2:
            raise UserError(f"{len(dataset.records)} photos are too few for {split}; it takes 2")

    # Model. The seed comes first, so that the same seed starts from the same weights.
    seed_all(args.seed, "weights")
    model = DualEncoder(ModelConfig(
        vocab_size=len(tokenizer), image_encoder=args.image_encoder, image_size=args.image_size,
        context_length=args.context_length, token_dim=args.token_dim, embed_dim=args.embed_dim,
        dropout=args.dropout, drop_connect=args.drop_connect,
    ))
    if not args.resume:
        model.image_encoder.load_weights(args.weights)
    model.to(device)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {args.image_encoder}, {len(tokenizer):,} words, "
          f"{n_parameters / 1e6:.1f} M parameters, on {device}")

    # Optimiser. Steps an epoch are all but the same in every epoch, since the batches are full.
    optimizer = build_optimizer(model, args.lr, args.weight_decay)
    scaler = grad_scaler(device)
    flags = {name: str(value) if isinstance(value, Path) else value
             for name, value in vars(args).items()}
    log: list[dict] = []
    if args.resume:
        log = resume(results.last, model, tokenizer, optimizer, scaler, flags)
        print(f"resumed after epoch {len(log)}")
    n_steps = len(train_set.epoch(args.batch_size, args.captions_per_image, args.seed, 1))
    scheduler = build_schedule(optimizer, args.warmup_steps, args.epochs * n_steps, args.schedule,
                               done_steps=log[-1]["steps"] if log else 0)
    write_atomic(results.folder / "args.json", json.dumps(flags, indent=2).encode())

    # Loop. The best epoch is the one with the highest rsum, over the whole log: a resumed run
    # does not forget the best of the epochs before it.
    for epoch in range(len(log) + 1, args.epochs + 1):
        lr = scheduler.get_last_lr()[0]
        trained = train_one_epoch(
            model, train_set, optimizer, scheduler, scaler, batch_size=args.batch_size,
            captions_per_image=args.captions_per_image, flip=args.flip, seed=args.seed, epoch=epoch,
        )
        start = time.perf_counter()
        metrics = evaluate_retrieval(model, val_set)
        line = {"epoch": epoch, "steps": scheduler.last_epoch, "lr": lr,
                "logit_scale": model.logit_scale.item(), **trained, **metrics,
                "validation_seconds": time.perf_counter() - start}
        best_before = max((earlier["rsum"] for earlier in log), default=-1.0)
        log.append(line)
        content = {"epoch": epoch, "metrics": metrics, "args": flags}
        if metrics["rsum"] > best_before:
            save_checkpoint(results.best, model, tokenizer, **content)
        save_checkpoint(results.last, model, tokenizer, **content, log=log,
                        optimizer_state=optimizer.state_dict(), scaler_state=scaler.state_dict())
        write_atomic(results.folder / "log.jsonl",
                     "".join(json.dumps(line) + "\n" for line in log).encode())
        plot_curves(results.folder / "curves.png", log)
        print_metrics(line, is_best=metrics["rsum"] > best_before)

    # What it learned, in a picture.
    model, _, best = load_checkpoint(results.best)
    plot_examples(results.folder / "examples.png", model.to(device), val_set)
    print(f"best epoch {best['epoch']}, rsum {best['metrics']['rsum']:.1f}: {results.best}")
    print("captions with their top five photos, the right one framed: "
          f"{results.folder / 'examples.png'}")
    return 0


def resume(
    path: Path, model: DualEncoder, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, flags: dict,
) -> list[dict]:
    """Put a run back to where its last finished epoch left it; returns its log.

    The optimiser gets its moments back and keeps the rate and decay that this run was given.

    Raises:
        UserError: there is no such run, or it had another model, vocabulary or split.
    """
    if not path.exists():
        raise UserError(f"--resume needs {path}, and there is none: start without --resume")
    earlier, its_tokenizer, content = load_checkpoint(path)
    if earlier.config != model.config or its_tokenizer.vocab != tokenizer.vocab:
        raise UserError(
            f"{path} was trained with another model or vocabulary ({earlier.config}); give the "
            "flags and the data that it was started with, or another --results-dir"
        )
    # Another split would train on photos that validated so far, and call the recall progress.
    changed = [f"--{name.replace('_', '-')} was {content['args'][name]}, is {flags[name]}"
               for name in ("seed", "val_fraction", "max_images")
               if content["args"][name] != flags[name]]
    if changed:
        raise UserError(f"{path} was trained on another split: {'; '.join(changed)}; give the "
                        "flags that it was started with, or another --results-dir")
    model.load_state_dict(content["model_state"])
    own_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**content["optimizer_state"], "param_groups": own_groups})
    scaler.load_state_dict(content["scaler_state"])
    return content["log"]


if __name__ == "__main__":
    run_script(main)
