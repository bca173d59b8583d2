"""Check the data and the model before training.

    python main.py                     # Flickr30k in data/flickr30k, in seconds
    python main.py --strict            # decode every image too
    python main.py --demo              # the dataset of train.py --demo

Reads the captions, looks for the image files, splits, tokenizes, and encodes
one batch with an untrained model. The exit status is 1 if something is wrong.
"""

from __future__ import annotations

from src.utils.script import run_script, start_script

if __name__ == "__main__":
    start_script("PyTorch")  # before the imports, which take seconds

import contextlib
import math
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from src import cli
from src.data.captions import ImageRecord
from src.data.images import find_escaping_links, load_resized
from src.data.pixel_store import store_size
from src.data.prepare import collect_issues, find_warnings
from src.data.source import DataSource, scan_dataset
from src.data.transforms import eval_transform
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.image_encoder import IMAGE_ENCODERS
from src.models.loss import contrastive_loss
from src.models.tokenizer import Tokenizer
from src.utils.errors import MAX_LINES, counted, printable, shorten, shorten_lines
from src.utils.runtime import pick_device, seed_all


def main(argv: list[str] | None = None) -> int:
    """Run every check and print what it finds. Returns 1 if something is wrong, otherwise 0."""
    parser = cli.Parser(description=__doc__)
    cli.add_results_arguments(parser)
    cli.add_data_arguments(parser)
    cli.add_split_arguments(parser)
    parser.add_argument("--image-encoder", choices=IMAGE_ENCODERS, default="efficientnet-b0",
                        metavar="NAME",
                        help="image encoder, as for train.py (default: %(default)s)")
    parser.add_argument("--image-size", type=cli.positive_int, metavar="PIXELS",
                        help="height and width of the input images (default: 224, with --demo 64)")
    parser.add_argument("--batch-size", type=cli.positive_int, default=16, metavar="N",
                        help="images in the batch (default: %(default)s)")
    parser.add_argument("--context-length", type=cli.positive_int, default=32, metavar="WORDS",
                        help="words that are kept of a caption (default: %(default)s)")
    parser.add_argument("--min-freq", type=cli.positive_int, default=2, metavar="N",
                        help="the vocabulary has the words that occur N times in the training "
                        "captions (default: %(default)s)")
    args = parser.parse_args(argv)
    image_size = args.image_size or (64 if args.demo else 224)

    cli.prepare_demo(args, cli.resolve_data(args))
    source = scan_dataset(**cli.scan_arguments(args))
    problems = check_data(source)
    if args.val_fraction != 0 and (reason := source.explain_no_validation()):
        problems.append(reason)
    problems += [reason for split in ("train", "val")
                 if (reason := source.explain_small_split(split, len(source.splits[split])))]
    if args.strict:
        problems += check_images(source, store_size(image_size))
    train_captions = captions_of(source.splits["train"])
    tokenizer = Tokenizer.from_captions(train_captions, args.min_freq, args.context_length)
    problems += check_tokens(source, tokenizer)
    problems += check_model(
        source, tokenizer, args.image_encoder, image_size, args.batch_size, args.seed)

    warnings = find_warnings(source, [source.splits["train"], source.splits["val"]], tokenizer)
    found = list(dict.fromkeys(problems))  # an image of the batch may be reported twice
    for title, messages in (("wrong:", found), ("warnings:", warnings)):
        if messages:
            print(f"\n{title}", *shorten_lines(list(map(printable, messages))), sep="\n  ")
            if len(messages) > MAX_LINES:
                print("  train.py writes all of them to rejected.csv")
    if not found:
        print("\nall is well" if not warnings else "\nnothing is wrong; train.py can start")
    return 1 if problems else 0


def captions_of(records: list[ImageRecord]) -> list[str]:
    """Return all captions of some images."""
    return [caption for record in records for caption in record.captions]


def check_data(source: DataSource) -> list[str]:
    """Print the numbers of rows, images, splits and duplicates. Returns what is wrong."""
    read = source.annotations
    print(f"captions   {counted(read.rows, 'rows')}, {printable(read.format)}\n"
          f"           {counted(len(read.fixed), 'caption rows repaired')}, "
          f"{len(read.rejected):,} rejected, "
          f"{len(read.repeated):,} repeated")
    per_image = Counter(len(record.captions) for record in read.records)
    print(f"images     {len(read.records):,} with captions ("
          + ", ".join(f"{n:,} with {k}" for k, n in per_image.most_common(4))
          + f"); {len(source.missing):,} missing, {counted(len(source.unused), 'files unused')}")
    for kind, issues in collect_issues(source).items():
        for issue in issues[:3]:
            print(printable(f"           {kind}: {issue.where} {issue.name}: {issue.reason}"))
    origin = "of the caption files" if read.has_split else "by image, from seed and file names"
    print(f"split      {origin}: " + ", ".join(
        f"{split} {len(records):,}" for split, records in source.splits.items() if records))
    train, val = (set(captions_of(source.splits[split])) for split in ("train", "val"))
    groups = identical_images(source)
    same = "1 caption occurs" if len(train & val) == 1 else f"{len(train & val):,} captions occur"
    print(f"           {same} in both train and val\n"
          f"           {counted(len(groups), 'groups of byte-identical images')} in train and "
          "elsewhere" + (f", such as {shorten(groups[0], ' = ')}" if groups else ""))
    problems = []
    if outside := find_outside(source):
        problems.append(f"links to files outside the image folder: "
                        f"{counted(len(outside), 'images')}, such as {outside[0]}; --follow-links "
                        "reads them")
    if read.rejected:
        problems.append(counted(len(read.rejected), "caption rows rejected"))
    if source.missing:
        problems.append(counted(len(source.missing), f"images missing from {source.images}"))
    if not source.splits["train"]:
        problems.append("there are no training images")
    return problems


def identical_images(source: DataSource) -> list[list[str]]:
    """Return the names of images with the same bytes, in groups that are in train and elsewhere.

    Only files whose sizes are equal are read.
    """
    by_size = defaultdict(list)
    for split, records in source.splits.items():
        for record in records:
            path = source.images / record.name
            with contextlib.suppress(OSError):  # reported where images are decoded
                by_size[path.stat().st_size].append((split == "train", path))
    groups = []
    for same_size in tqdm(by_size.values(), desc="comparing files", unit="size", delay=1,
                          leave=False, disable=None):
        if len({is_train for is_train, _ in same_size}) == 2:
            by_content = defaultdict(set)
            for is_train, path in same_size:
                with contextlib.suppress(OSError):
                    by_content[path.read_bytes()].add((is_train, path.name))
            groups += [sorted(name for _, name in files) for files in by_content.values()
                       if len({is_train for is_train, _ in files}) == 2]
    return groups


def find_outside(source: DataSource) -> list[str]:
    """Return the images that are links to files outside the folder, unless links are followed."""
    names = [record.name for records in source.splits.values() for record in records]
    return [] if source.follow_links else sorted(find_escaping_links(source.images, names))


def check_images(source: DataSource, size: int) -> list[str]:
    """Decode every image, which takes about as long as the first start of train.py."""
    names = [record.name for records in source.splits.values() for record in records]
    outside = set(find_outside(source))

    def problem_of(name: str) -> str:
        try:
            if name in outside:
                return "a link to a file outside the image folder (--follow-links)"
            load_resized(source.images / name, size)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(problem_of, names), desc="decoding", total=len(names), unit="image",
                     leave=False, disable=None)
        problems = [f"{name} cannot be read: {problem}" for name, problem
                    in zip(names, found, strict=True) if problem]
    print(f"pixels     {len(names) - len(problems):,} of {counted(len(names), 'images')} can be "
          "read")
    return problems


def check_tokens(source: DataSource, tokenizer: Tokenizer) -> list[str]:
    """Print caption lengths, the vocabulary, unknown words, and one caption encoded and decoded."""
    statistics = {split: tokenizer.word_statistics(captions_of(source.splits[split]))
                  for split in ("train", "val")}
    lengths = np.concatenate([words.lengths for words in statistics.values()])
    if not len(lengths):
        return ["there are no captions to tokenize"]
    print(f"lengths    {lengths.min()} to {lengths.max()} words, median {np.median(lengths):.0f}; "
          f"{100 * (lengths > tokenizer.context_length).mean():.2f} % are cut to "
          f"{tokenizer.context_length}")
    print(f"vocabulary {len(tokenizer):,} words of the training captions\n           unknown: "
          + ", ".join(f"{100 * words.unknown_share:.2f} % of the words of {split}"
                      for split, words in statistics.items()))
    example = captions_of(source.splits["train"] or source.splits["val"])[0]
    ids = tokenizer.encode([example])[0]
    print(f"tokens     {example!r}\n           {ids[ids != tokenizer.pad_id].tolist()}\n"
          f"           {tokenizer.decode(ids)!r}")
    return [] if len(tokenizer) > 2 else ["the vocabulary has no words"]


def check_model(
    source: DataSource, tokenizer: Tokenizer, image_encoder: str, image_size: int, batch_size: int,
    seed: int,
) -> list[str]:
    """Encode one batch with an untrained model; its loss is near ln(batch size)."""
    seed_all(seed, "weights")
    model = DualEncoder(ModelConfig(
        vocab_size=len(tokenizer), image_encoder=image_encoder, image_size=image_size,
        context_length=tokenizer.context_length,
    )).eval()
    pixels, captions, problems = read_batch(source, batch_size, store_size(image_size))
    if len(pixels) < 2:  # a loss needs negatives
        return problems
    device = pick_device("auto")  # the device of train.py
    model.to(device)
    with torch.inference_mode():
        images = eval_transform(torch.from_numpy(pixels).to(device), image_size)  # (B, 3, S, S)
        tokens = tokenizer.encode(captions).to(device)  # (B, L)
        image_embeddings, text_embeddings = model(images, tokens)  # (B, D) each
        loss = contrastive_loss(image_embeddings, text_embeddings,
                                torch.arange(len(pixels), device=device), model.logit_scale).item()
    expected = math.log(len(pixels))
    print(f"batch      images {tuple(images.shape)}, tokens {tuple(tokens.shape)} on {device}\n"
          f"           -> embeddings {tuple(image_embeddings.shape)}, "
          f"{tuple(text_embeddings.shape)}")
    print(f"loss       {loss:.3f} before training (guessing: about ln {len(pixels)} = "
          f"{expected:.2f})")
    if not abs(loss - expected) < 1:
        problems.append(f"the untrained loss {loss:.3f} is far from ln(batch) = {expected:.3f}")
    return problems


def read_batch(
    source: DataSource, batch_size: int, size: int
) -> tuple[np.ndarray, list[str], list[str]]:
    """Return the first images (B, size, size, 3) uint8, a caption of each, and what failed."""
    pixels, captions, problems = [], [], []
    for record in islice(source.splits["train"], batch_size):
        try:
            pixels.append(load_resized(Path(source.images, record.name), size))
            captions.append(record.captions[0])
        except ValueError as error:
            problems.append(f"{record.name} cannot be read: {error}")
    return np.stack(pixels) if pixels else np.empty(0), captions, problems


if __name__ == "__main__":
    run_script(main)
