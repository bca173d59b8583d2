"""Retrieval quality on frozen image features: one row for each way to train heads and words.

    python -m benchmarks.quality --images DIR --annotations FILE --image-encoder efficientnet-lite0
    python -m benchmarks.quality --list
    python -m benchmarks.quality … --rows baseline strong-lr-1e-3 --seeds 3 --runs runs.jsonl

The image features are computed once and cached next to the decoded images. Every row is evaluated
after its last epoch on all validation images. --runs appends each run to a file and does not train
the runs in it again; --seeds 0 prints the table of that file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.quality_data import Data, add_data_arguments
from benchmarks.quality_model import build_model, row_loss, row_optimizer
from benchmarks.quality_rows import ROWS, Row
from benchmarks.timing import machine
from src.data.loader import sample_batches
from src.evaluation.embed import evaluate_retrieval
from src.training.optim import build_schedule
from src.utils.errors import UserError
from src.utils.runtime import seed_all, tune_malloc
from src.utils.script import run_script

COLUMNS = ("rsum", "text_to_image_R@1", "text_to_image_R@10", "image_to_text_R@1",
           "image_to_text_R@10", "seconds")
HEAD = """| row | what | rsum ± deviation (seeds) | text to image R@1 / R@10 \
| image to text R@1 / R@10 | seconds | verdict |
|---|---|---|---|---|---|---|"""


def train_row(row: Row, data: Data, seed: int) -> dict[str, float]:
    """Train with the settings of `row`; return validation metrics and seconds of training."""
    train_set, val_set, vocab_size = data.datasets(row)
    model = build_model(row, train_set, vocab_size, seed).train()
    names = ("center", "flip") if row.flip else ("mean" if row.flip_tta else "center",)
    views = torch.stack([data.features("train", name) for name in names])  # (V, N, F)
    start = time.perf_counter()
    optimizer = row_optimizer(row, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    averages = [p.detach().clone() for p in parameters]
    epochs = [sample_batches(train_set, row.batch_size, row.captions_per_image, seed, epoch)
              for epoch in range(1, row.epochs + 1)]
    scheduler = build_schedule(optimizer, row.warmup_steps, row.epochs * len(epochs[0]),
                               row.schedule)
    done = 0
    for epoch, batches in enumerate(epochs, 1):
        for step, batch in enumerate(map(train_set.batch, batches)):
            seed_all(seed, epoch, step)
            view = torch.randint(len(views), (len(batch.images),))
            seed_all(seed, epoch, step, 0, 0)  # the dropout masks of train.py
            images, texts = model(views[view, batch.images], batch.tokens)
            row_loss(row, model, images, texts, batch.image_index).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            model.clamp_logit_scale()
            if row.ema_decay:
                decay = min(row.ema_decay, done / (done + 4))  # as in train.py
                for average, parameter in zip(averages, parameters, strict=True):
                    average.lerp_(parameter.detach(), 1 - decay)
            done += 1
    if row.ema_decay:
        for average, parameter in zip(averages, parameters, strict=True):
            parameter.data.copy_(average)
    seconds = time.perf_counter() - start
    val_view = "mean" if row.flip_tta else "center"
    metrics = evaluate_retrieval(model, val_set.with_images(data.features("val", val_view)))
    return metrics | {"seconds": seconds}


def table_line(row: Row, runs: list[dict[str, float]]) -> str:
    """Return a line of the table: means over seeds, and the sample standard deviation of rsum."""
    mean = {column: statistics.mean(run[column] for run in runs) for column in COLUMNS}
    spread = f"{statistics.stdev(run['rsum'] for run in runs):.1f}" if runs[1:] else "?"
    return (f"| `{row.name}` | {row.what} | {mean['rsum']:.1f} ± {spread} ({len(runs)}) "
            f"| {mean[COLUMNS[1]]:.1f} / {mean[COLUMNS[2]]:.1f} "
            f"| {mean[COLUMNS[3]]:.1f} / {mean[COLUMNS[4]]:.1f} "
            f"| {mean['seconds']:.0f} | {row.verdict} |")


def settings(row: Row) -> dict:
    """Return what `row` changes in training, in JSON's types; the key of its runs in the file."""
    texts = ("name", "section", "what", "verdict")
    return json.loads(json.dumps({k: v for k, v in asdict(row).items() if k not in texts}))


def main(argv: list[str] | None = None) -> int:
    """Train the chosen rows and print their lines of the table. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="NAME",
                        help="(default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="append a line of JSON per run; "
                        "one file for each choice of features")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    args = parser.parse_args(argv)
    rows = [row for row in ROWS if row.name in (args.rows or [row.name])]
    if args.list:
        print("\n".join(f"{row.name:24} {row.what}" for row in rows))
        return 0
    if args.seeds and not (args.images and args.annotations):
        parser.error("--images and --annotations are required")
    tune_malloc()
    lines = args.runs.read_text().splitlines() if args.runs and args.runs.exists() else []
    known = [json.loads(line) for line in lines]
    features = {name: getattr(args, name) for name in ("image_encoder", "weights", "image_size")}
    if args.seeds and any(run.get("features") != features for run in known):
        raise UserError(f"{args.runs} holds runs on other features ({known[0]['features']}): "
                        "choose another file")
    data = Data.from_args(args) if args.seeds else None
    print(machine())
    section = ""
    for row in rows:
        runs = {run["seed"]: run["metrics"] for run in known if run["settings"] == settings(row)}
        for seed in sorted(set(range(args.seeds)) - runs.keys()):
            runs[seed] = train_row(row, data, seed)
            if args.runs:
                with open(args.runs, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": row.name, "seed": seed, "metrics": runs[seed],
                                           "settings": settings(row), "features": features}) + "\n")
        if runs and row.section != section:
            section = row.section
            print(f"\n### {section}\n\n{HEAD}")
        if runs:
            print(table_line(row, list(runs.values())), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
