"""Retrieval quality on frozen image features: one row for each way to train heads and words.

    python -m benchmarks.quality --images DIR --annotations FILE --weights PATH --image-size 128
    python -m benchmarks.quality --list
    python -m benchmarks.quality … --rows seed strong-idf --seeds 3 --keep runs.jsonl

The image features are computed once and kept beside the decoded photos. Every row is scored after
its last epoch, on all validation photos. With --keep each run is noted in a file, and what stands
there is not trained again; --seeds 0 prints the table of what was kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.quality_data import Data, add_data_arguments, read_features
from benchmarks.quality_model import build_model, row_loss, row_optimizer
from benchmarks.quality_rows import ROWS, Row
from benchmarks.timing import machine
from src.data.dataset import Flickr30kDataset
from src.data.loader import sample_batches
from src.data.pixel_store import PixelStore, store_size
from src.data.source import scan_dataset
from src.evaluation.embed import embed_images, embed_tokens
from src.evaluation.metrics import retrieval_metrics
from src.models.dual_encoder import DualEncoder
from src.models.image_encoder import ImageEncoder
from src.models.tokenizer import split_words
from src.training.optim import build_schedule
from src.utils.errors import UserError, run_script
from src.utils.runtime import seed_all, tune_malloc

COLUMNS = ("rsum", "text_to_image_R@1", "text_to_image_R@10", "image_to_text_R@1",
           "image_to_text_R@10", "seconds")
HEAD = """| row | what | rsum ± deviation (seeds) | text to image R@1 / R@10 \
| image to text R@1 / R@10 | seconds | verdict |
|---|---|---|---|---|---|---|"""


def train_row(row: Row, data: Data, seed: int) -> dict[str, float]:
    """Train as `row` says; metrics on the validation photos, and the seconds of training."""
    train_set, val_set, n_words = data.sets(row)
    model = build_model(row, train_set, n_words, seed).train()
    views = torch.stack([data.features("train", view) for view in row.views])  # (V, N, F)
    if row.mean_views:
        views = views.mean(0, keepdim=True)
    sided = torch.tensor([not {"left", "right"}.isdisjoint(split_words(" ".join(r.captions)))
                          for r in train_set.records])
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
            view = draw_views(row, len(views), sided[batch.images])
            seed_all(seed, epoch, step, 0, 0)  # of dropout: the draws of the product's engine
            images, texts = model(views[view, batch.images], batch.tokens)
            row_loss(row, model, images, texts, batch.image_index).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            model.clamp_logit_scale()
            if row.average:
                share = min(row.average, (1 + done) / (10 + done))  # the start is soon forgotten
                for kept, parameter in zip(averages, parameters, strict=True):
                    kept.lerp_(parameter.detach(), 1 - share)
            done += 1
    if row.average:
        for kept, parameter in zip(averages, parameters, strict=True):
            parameter.data.copy_(kept)
    seconds = time.perf_counter() - start
    return evaluate(row, model, data, val_set) | {"seconds": seconds}


def draw_views(row: Row, n_views: int, sided: torch.Tensor) -> torch.Tensor:
    """Which view of each photo (B,) is trained on; the centre where left and right must stay."""
    drawn = torch.randint(n_views, sided.shape)
    return drawn.masked_fill(sided, 0) if row.keep_sides else drawn


def evaluate(
    row: Row, model: DualEncoder, data: Data, val_set: Flickr30kDataset
) -> dict[str, float]:
    """The metrics of all validation photos; of several views their embeddings' mean counts."""
    shown = row.views if row.mean_views else row.eval_views
    features = [data.features("val", view) for view in shown]
    if row.mean_views:
        features = [torch.stack(features).mean(0)]
    images = F.normalize(sum(embed_images(model, val_set.with_images(each)) for each in features))
    return retrieval_metrics(images, embed_tokens(model, val_set.tokens), val_set.image_index)


def table_line(row: Row, runs: list[dict[str, float]]) -> str:
    """A line of the table: means over the seeds, and rsum's sample standard deviation."""
    mean = {column: statistics.mean(run[column] for run in runs) for column in COLUMNS}
    spread = f"{statistics.stdev(run['rsum'] for run in runs):.1f}" if runs[1:] else "?"
    return (f"| `{row.name}` | {row.what} | {mean['rsum']:.1f} ± {spread} ({len(runs)}) "
            f"| {mean[COLUMNS[1]]:.1f} / {mean[COLUMNS[2]]:.1f} "
            f"| {mean[COLUMNS[3]]:.1f} / {mean[COLUMNS[4]]:.1f} "
            f"| {mean['seconds']:.0f} | {row.verdict} |")


def settings(row: Row) -> dict:
    """What `row` changes in training, in JSON's types; the key of its runs in the file."""
    texts = ("name", "about", "what", "verdict")
    return json.loads(json.dumps({k: v for k, v in asdict(row).items() if k not in texts}))


def open_data(args: argparse.Namespace) -> Data:
    """Captions matched with photos, every photo decoded once, the encoder with its weights."""
    source = scan_dataset(args.images, args.annotations, 0.1, 0)
    folder = args.cache_dir or args.images.parent
    names = [record.name for split in ("train", "val") for record in source.splits[split]]
    store = PixelStore.build(folder, args.images, names, store_size(args.image_size))
    records = {split: [r for r in source.splits[split] if r.name in store.rows]
               for split in ("train", "val")}
    if args.features:
        return Data(records, store, None, folder, read_features(args.features, records))
    encoder = ImageEncoder("efficientnet-b0", args.image_size)
    encoder.load_weights(args.weights)
    return Data(records, store, encoder, folder)


def main(argv: list[str] | None = None) -> int:
    """Train what is asked for and print the table's lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="NAME",
                        help="(default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="a file that takes a line of JSON for each run; "
                        "one file for each choice of features")
    parser.add_argument("--features", type=Path, metavar="FILE.npz",
                        help="another network's, in place of EfficientNet's: `names` of the "
                        "photos, and `centre`, `mirror` (photos, 1280) as far as rows ask for them")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    args = parser.parse_args(argv)
    rows = [row for row in ROWS if row.name in (args.rows or [row.name])]
    if args.list:
        print("\n".join(f"{row.name:24} {row.what}" for row in rows))
        return 0
    if args.seeds and not (args.images and args.annotations):
        parser.error("--images and --annotations say what to train on")
    tune_malloc()
    lines = args.keep.read_text().splitlines() if args.keep and args.keep.exists() else []
    known = [json.loads(line) for line in lines]
    shown = {"features": str(args.features or args.weights), "image_size": args.image_size}
    if args.seeds and any(run.get("shown", shown) != shown for run in known):
        raise UserError(f"{args.keep} holds runs on other features or of another --image-size: "
                        "choose another file for these")
    data = open_data(args) if args.seeds else None
    print(machine())
    about = ""
    for row in rows:
        runs = {run["seed"]: run["metrics"] for run in known if run["settings"] == settings(row)}
        for seed in set(range(args.seeds)) - runs.keys():
            runs[seed] = train_row(row, data, seed)
            if args.keep:
                with open(args.keep, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": row.name, "seed": seed, "metrics": runs[seed],
                                           "settings": settings(row), "shown": shown}) + "\n")
        if runs and row.about != about:
            about = row.about
            print(f"\n### {about}\n\n{HEAD}")
        if runs:
            print(table_line(row, list(runs.values())), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
