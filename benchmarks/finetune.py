"""Fine-tuning in as many image passes each: the plain script, the seed recipe, the strong one.

    python -m benchmarks.finetune --images DIR --annotations FILE --weights PATH --image-size 128 \\
        --keep FOLDER [--rows plain seed strong] [--seeds 0 1 2] [--tuned-epochs 10]

All go through train.py; the plain script differs in the model alone. `strong` trains its heads on
frozen features and then, for `--tuned-epochs`, everything, with all five captions of a photo in a
step. The others take one caption a step, so a fifth of the epochs is as many image passes. The
metrics are of the last epoch. FOLDER keeps each run, and a second call trains none of them anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from unittest import mock

import train
from benchmarks.quality_data import add_data_arguments
from benchmarks.quality_model import rebuild
from benchmarks.quality_rows import PLAIN
from benchmarks.timing import machine
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.training.recipes import RECIPES
from src.utils.errors import run_script
from src.utils.runtime import seed_all

CAPTIONS = 5  # a photo
COLUMNS = ("image_to_text_R@1", "image_to_text_R@10", "text_to_image_R@1", "text_to_image_R@10")
ROWS = {"plain": [], "plain-mirror-mean": ["--flip-tta"], "seed": [],
        "strong": ["--recipe", "strong"],
        "strong-no-mirror-mean": ["--recipe", "strong", "--no-mirror-mean"]}


def main(argv: list[str] | None = None) -> int:
    """Train what is asked for and not there yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--keep", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["plain", "seed", "strong"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED",
                        help="(default: %(default)s)")
    parser.add_argument("--tuned-epochs", type=int, default=10, metavar="N",
                        help="passes of every photo (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.images and args.annotations):
        parser.error("--images and --annotations say what to train on")
    if args.tuned_epochs % CAPTIONS:
        parser.error(f"--tuned-epochs must divide by {CAPTIONS}")
    print(f"{machine()}\n\n| row | rsum ± deviation (seeds) | image to text R@1 / R@10 "
          "| text to image R@1 / R@10 | seconds |\n|---|---|---|---|---|")
    for row in args.rows:
        logs = [train_row(row, seed, args) for seed in args.seeds]
        print(table_line(row, logs), flush=True)
    return 0


def train_row(row: str, seed: int, args: argparse.Namespace) -> list[dict]:
    """The log of a run, trained now if it was not before; one that was cut off begins anew."""
    results = args.keep / f"{row}-{args.tuned_epochs}-{seed}"
    log = results / "log.jsonl"
    epochs = args.tuned_epochs // CAPTIONS
    if row.startswith("strong"):
        epochs = args.tuned_epochs + RECIPES["strong"]["head_epochs"]
    if not log.exists() or len(log.read_text().splitlines()) < epochs:
        flags = ["--images", str(args.images), "--annotations", str(args.annotations),
                 "--cache-dir", str(args.cache_dir or args.images.parent), "--weights",
                 args.weights, "--image-size", str(args.image_size), "--results-dir", str(results),
                 "--seed", str(seed), "--epochs", str(epochs), *ROWS[row]]
        build = plain_model if row.startswith("plain") else train.build_model
        # Pictures of what it learned are drawn from a checkpoint of the product's model.
        with mock.patch.multiple(train, build_model=build, report_best=lambda *_: None):
            train.main(flags)
    return [json.loads(line) for line in log.read_text().splitlines()]


def plain_model(args: argparse.Namespace, tokenizer: Tokenizer) -> DualEncoder:
    """The model of the plain script, in the product's class."""
    seed_all(args.seed, "weights")
    model = DualEncoder(ModelConfig(
        vocab_size=len(tokenizer), image_size=args.image_size, token_dim=PLAIN.token_dim,
        dropout=PLAIN.dropout, drop_connect=args.drop_connect, flip_tta=args.flip_tta))
    rebuild(model, PLAIN)
    model.image_encoder.load_weights(args.weights)
    return model


def table_line(row: str, logs: list[list[dict]]) -> str:
    """A line of the table: means over the seeds, rsum's sample standard deviation, seconds."""
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
