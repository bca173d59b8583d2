"""Fine-tuning with the same number of image passes: naive baseline, baseline and strong recipes.

    python -m benchmarks.finetune --images DIR --annotations FILE \\
        --runs FOLDER [--rows naive baseline strong] [--seeds 0 1 2] [--tuned-epochs 10]

All rows are trained by train.py; the naive baseline differs in the model alone. `strong` trains its
heads on frozen features and then, for `--tuned-epochs`, the whole model, with all five captions of
an image in a step. The others take one caption per step, so that a fifth of the epochs is the same
number of image passes. The metrics are those of the last epoch. Runs that are finished in FOLDER
are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from unittest import mock

import train
from benchmarks.quality_data import add_data_arguments
from benchmarks.quality_model import change_heads
from benchmarks.quality_rows import NAIVE
from benchmarks.timing import machine
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.training.recipes import RECIPES
from src.utils.runtime import seed_all
from src.utils.script import run_script

CAPTIONS = 5  # per image
COLUMNS = ("image_to_text_R@1", "image_to_text_R@10", "text_to_image_R@1", "text_to_image_R@10")
ROWS = {"naive": [], "baseline": [], "strong": ["--recipe", "strong"]}


def main(argv: list[str] | None = None) -> int:
    """Train the chosen rows and print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED",
                        help="(default: %(default)s)")
    parser.add_argument("--tuned-epochs", type=int, default=10, metavar="N",
                        help="passes over all images (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.images and args.annotations):
        parser.error("--images and --annotations are required")
    if args.tuned_epochs % CAPTIONS:
        parser.error(f"--tuned-epochs must be a multiple of {CAPTIONS}")
    print(f"{machine()}\n\n| row | rsum ± deviation (seeds) | image to text R@1 / R@10 "
          "| text to image R@1 / R@10 | seconds |\n|---|---|---|---|---|")
    for row in args.rows:
        logs = [train_row(row, seed, args) for seed in args.seeds]
        print(table_line(row, logs), flush=True)
    return 0


def train_row(row: str, seed: int, args: argparse.Namespace) -> list[dict]:
    """Return the log of a run; train it if it is not finished, from the start."""
    results = args.runs / f"{row}-{args.tuned_epochs}-{seed}"
    log = results / "log.jsonl"
    epochs = args.tuned_epochs // CAPTIONS
    if row == "strong":
        epochs = args.tuned_epochs + RECIPES["strong"]["head_epochs"]
    if not log.exists() or len(log.read_text().splitlines()) < epochs:
        flags = ["--images", str(args.images), "--annotations", str(args.annotations),
                 "--cache-dir", str(args.cache_dir or args.images.parent),
                 "--image-encoder", args.image_encoder, "--weights", args.weights,
                 "--image-size", str(args.image_size), "--results-dir", str(results),
                 "--seed", str(seed), "--epochs", str(epochs), *ROWS[row]]
        build = naive_model if row == "naive" else train.build_model
        # The examples are drawn from a checkpoint, which holds no naive model.
        with mock.patch.multiple(train, build_model=build, report_best=lambda *_: None):
            train.main(flags)
    return [json.loads(line) for line in log.read_text().splitlines()]


def naive_model(
    args: argparse.Namespace, tokenizer: Tokenizer, text_config: str = ""
) -> DualEncoder:
    """Return the naive baseline as a DualEncoder; it has no BERT to configure."""
    seed_all(args.seed, "weights")
    model = DualEncoder(ModelConfig(
        vocab_size=len(tokenizer), image_encoder=args.image_encoder, image_size=args.image_size,
        token_dim=NAIVE.token_dim, dropout=NAIVE.dropout, drop_connect=args.drop_connect))
    change_heads(model, NAIVE)
    model.image_encoder.load_weights(args.weights)
    return model


def table_line(row: str, logs: list[list[dict]]) -> str:
    """Return a line of the table: means over seeds, the sample standard deviation of rsum."""
    last = [log[-1]["metrics"] for log in logs]
    rsums = [metrics["rsum"] for metrics in last]
    deviation = f"{statistics.stdev(rsums):.1f}" if rsums[1:] else "?"
    mean = {name: statistics.mean(metrics[name] for metrics in last) for name in COLUMNS}
    seconds = statistics.mean(sum(line["time"]["seconds"] for line in log) for log in logs)
    return (f"| `{row}` | {statistics.mean(rsums):.1f} ± {deviation} ({len(rsums)}) "
            f"| {mean[COLUMNS[0]]:.1f} / {mean[COLUMNS[1]]:.1f} "
            f"| {mean[COLUMNS[2]]:.1f} / {mean[COLUMNS[3]]:.1f} | {seconds:,.0f} |")


if __name__ == "__main__":
    run_script(main)
