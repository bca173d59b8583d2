"""Sanity check: is my data right, and does the model run?

    python main.py                     # Flickr30k in data/flickr30k; seconds, even for all of it
    python main.py --strict            # decode every photo too
    python main.py --demo              # the drawn world of train.py --demo

Reads the captions, looks for the photos, splits, tokenises, and puts one batch through an untrained
model. Exit status 1 where something is wrong.
"""

from __future__ import annotations

import argparse

from src.cli import (
    add_data_arguments,
    add_results_arguments,
    add_split_arguments,
    positive_int,
    prepare_demo,
    resolve_data,
)
from src.dataset import open_source
from src.errors import printable, run_script
from src.image_encoder import IMAGE_ENCODERS
from src.pixels import store_size
from src.sanity import captions_of, check_data, check_model, check_photos, check_tokens
from src.tokenizer import Tokenizer

SHOWN = 30  # lines of what is wrong


def main(argv: list[str] | None = None) -> int:
    """Run every check and print what it saw. Returns 1 where something is wrong, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_results_arguments(parser)
    add_data_arguments(parser)
    add_split_arguments(parser)
    parser.add_argument("--image-encoder", choices=IMAGE_ENCODERS, default="efficientnet-b0",
                        help="(default: %(default)s)")
    parser.add_argument("--image-size", type=positive_int, metavar="PIXELS",
                        help="side of the input pictures (default: 224, with --demo 64)")
    parser.add_argument("--batch-size", type=positive_int, default=16, metavar="PHOTOS",
                        help="of the one batch (default: %(default)s)")
    parser.add_argument("--context-length", type=positive_int, default=32, metavar="WORDS",
                        help="words kept of a caption (default: %(default)s)")
    parser.add_argument("--min-freq", type=positive_int, default=2, metavar="N",
                        help="a word must come N times in the train captions "
                        "(default: %(default)s)")
    args = parser.parse_args(argv)
    data = resolve_data(args)
    image_size = args.image_size or (64 if args.demo else 224)
    prepare_demo(args, data)
    source = open_source(
        data.images, data.annotations, args.val_fraction, args.seed, args.max_images
    )
    problems = check_data(source)
    if args.strict:
        problems += check_photos(source, store_size(image_size))
    tokenizer = Tokenizer.from_captions(
        captions_of(source.splits["train"]), args.min_freq, args.context_length
    )
    problems += check_tokens(source, tokenizer)
    problems += check_model(
        source, tokenizer, args.image_encoder, image_size, args.batch_size, args.seed
    )
    found = list(dict.fromkeys(problems))  # the batch's photos are among all photos
    print("\nwrong:" if found else "\nall is well", *map(printable, found[:SHOWN]), sep="\n  ")
    if len(found) > SHOWN:
        print(f"  … and {len(found) - SHOWN:,} more")
    return 1 if problems else 0


if __name__ == "__main__":
    run_script(main)
