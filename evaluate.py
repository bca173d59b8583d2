"""Evaluate a checkpoint on image-text retrieval, in both directions.

    python evaluate.py                            # best checkpoint, validation
    python evaluate.py --split test --checkpoint my_checkpoint.pth
    python evaluate.py --mistakes mistakes.png    # draw the worst mistakes
    python evaluate.py --demo
    python evaluate.py --pretrained               # the repository's model
    torchrun --nproc-per-node 2 evaluate.py

Recall@K, median rank and mean rank, over the unique images of a split and all
of their captions. In image-to-text retrieval the best caption of an image
counts. Ties count against the model; similarities are float32. The data and
the split are by default those of the training run.
"""

from __future__ import annotations

from src.utils.script import run_script, start_script, status

if __name__ == "__main__":
    start_script("PyTorch")  # before the imports, which take seconds

import argparse
import json
import time
from pathlib import Path

from src.cli import (
    Parser,
    add_checkpoint_arguments,
    add_data_arguments,
    add_results_arguments,
    add_split_arguments,
    defaults_from_checkpoint,
    find_checkpoint,
    png_file,
    resolve_data,
    resolve_results,
    scan_arguments,
)
from src.data.dataset import Flickr30kDataset
from src.data.prepare import prepare_datasets
from src.data.source import scan_dataset
from src.evaluation.embed import evaluate_retrieval
from src.evaluation.examples import find_mistakes, plot_mistakes
from src.evaluation.metrics import format_table
from src.models.checkpoint import load_checkpoint
from src.models.dual_encoder import DualEncoder
from src.models.tokenizer import Tokenizer
from src.utils.distributed import process_group, rank
from src.utils.errors import UserError, counted
from src.utils.files import write_atomic
from src.utils.paths import ResultPaths
from src.utils.runtime import pick_device, tune_malloc


def main(argv: list[str] | None = None) -> int:
    """Evaluate a split, print a table and write a JSON file. Returns the exit status."""
    parser = Parser(description=__doc__)
    add_results_arguments(parser)
    add_data_arguments(parser)
    add_split_arguments(parser)
    add_checkpoint_arguments(parser)
    parser.add_argument("--split", choices=("train", "val", "test", "all"), default="val",
                        help="images to evaluate on (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="JSON file of the metrics "
                        "(default: RESULTS_DIR/evaluation_SPLIT.json)")
    parser.add_argument("--mistakes", type=png_file, metavar="FILE.png",
                        help="draw the captions that rank their own image worst")
    parser.add_argument("--device", default="auto",
                        help="device to use, such as cpu, cuda, cuda:1 or mps (default: "
                        "%(default)s)")
    args = parser.parse_args(argv)
    results = resolve_results(args)
    checkpoint = find_checkpoint(args, results)
    with status("loading the model"):
        model, tokenizer, content = load_checkpoint(checkpoint)
    args = defaults_from_checkpoint(parser, argv, content)
    tune_malloc()
    with process_group():
        model.to(pick_device(args.device))
        dataset = open_split(args, results, model, tokenizer)
        start = time.perf_counter()
        metrics = evaluate_retrieval(model, dataset)
        seconds = time.perf_counter() - start
        is_first = rank() == 0
    if is_first:
        report = {
            "checkpoint": str(checkpoint), "epoch": content.get("epoch"), "split": args.split,
            "images": len(dataset.records), "captions": len(dataset), **metrics,
            "seconds": seconds,
        }
        output = args.output or results.folder / f"evaluation_{args.split}.json"
        write_atomic(output, (json.dumps(report, indent=2) + "\n").encode())
        print(f"{args.split}: {counted(len(dataset.records), 'images')}, "
              f"{counted(len(dataset), 'captions')}, "
              f"{checkpoint} (epoch {content.get('epoch')})\n")
        print(format_table(metrics))
        print(f"\nwritten: {output}")
        if args.mistakes:
            report_mistakes(args.mistakes, model, dataset)
    return 0


def open_split(
    args: argparse.Namespace, results: ResultPaths, model: DualEncoder, tokenizer: Tokenizer
) -> Flickr30kDataset:
    """Return the dataset of the split that --split names.

    Raises:
        UserError: the split has no images, or none of them can be decoded.
    """
    data = resolve_data(args)
    source = scan_dataset(**scan_arguments(args))
    records = [record for split, records in source.splits.items() for record in records
               if args.split in (split, "all")]
    if not records:
        found = ", ".join(split for split, records in source.splits.items() if records)
        raise UserError(f"the caption files have no {args.split} images, only: {found}")
    [dataset] = prepare_datasets(
        source, [records], tokenizer, model.config.image_size, cache=data.cache,
        rejected=results.folder / f"rejected_{args.split}.csv", strict=args.strict,
    )
    if not dataset.records:
        raise UserError(f"no {args.split} image can be decoded; they are listed in "
                        f"{results.folder / f'rejected_{args.split}.csv'}")
    return dataset


def report_mistakes(path: Path, model: DualEncoder, dataset: Flickr30kDataset) -> None:
    """Draw the worst mistakes; print how many confuse images whose captions have the same words."""
    mistakes = find_mistakes(model, dataset)
    if not mistakes:
        print("every caption ranks its own image first: there are no mistakes to draw")
        return
    plot_mistakes(path, dataset, mistakes)
    same = sum(mistake.same_words for mistake in mistakes)
    # A BERT may distinguish them, by the order of the words.
    consequence = ("" if model.config.text_encoder == "bert" else
                   ", so that a bag of words cannot distinguish the two")
    print(f"{len(mistakes):,} of {len(dataset):,} captions do not rank their own image first; "
          f"for {same:,} of them the best other image\nhas all of their words in its captions"
          f"{consequence}\nthe worst mistakes: {path}")


if __name__ == "__main__":
    run_script(main)
