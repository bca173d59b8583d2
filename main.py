"""Sanity check: is my data right, and does the model run?

    python main.py                     # Flickr30k in data/flickr30k; seconds, even for all of it
    python main.py --strict            # decode every photo too
    python main.py --demo              # the drawn world of train.py --demo

Reads the captions, looks for the photos, splits, tokenizes, and puts one batch through an untrained
model. Exit status 1 where something is wrong.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from src.cli import (
    Parser,
    add_data_arguments,
    add_results_arguments,
    add_split_arguments,
    positive_int,
    prepare_demo,
    resolve_data,
)
from src.data.captions import ImageRecord
from src.data.images import find_escaping_links, load_resized
from src.data.pixel_store import store_size
from src.data.prepare import collect_issues
from src.data.source import DataSource, scan_dataset
from src.data.transforms import eval_transform
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.image_encoder import IMAGE_ENCODERS
from src.models.loss import contrastive_loss
from src.models.tokenizer import Tokenizer, split_words
from src.utils.errors import printable, run_script
from src.utils.runtime import pick_device, seed_all

SHOWN = 30  # lines of what is wrong


def main(argv: list[str] | None = None) -> int:
    """Run every check and print what it saw. Returns 1 where something is wrong, else 0."""
    parser = Parser(description=__doc__)
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
    source = scan_dataset(
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


def captions_of(records: list[ImageRecord]) -> list[str]:
    """All captions of some photos."""
    return [caption for record in records for caption in record.captions]


def check_data(source: DataSource) -> list[str]:
    """Rows, photos, split and duplicates; returns what is wrong."""
    read = source.annotations
    print(f"captions   {read.rows:,} rows in the format of {read.format}: "
          f"{len(read.fixed):,} fixed, {len(read.rejected):,} rejected"
          + (f", {len(read.repeated):,} repeated" if read.repeated else ""))
    per_photo = Counter(len(record.captions) for record in read.records)
    print(f"photos     {len(read.records):,} with captions ("
          + ", ".join(f"{n:,} with {k}" for k, n in per_photo.most_common(4))
          + f"); {len(source.missing):,} missing, {len(source.unused):,} files unused")
    for kind, remarks in collect_issues(source).items():
        for remark in remarks[:3]:
            print(printable(f"             {kind}: {remark.where} {remark.name}: {remark.reason}"))
    origin = "of the file" if read.has_split else "by image, from seed and file names"
    print(f"split      {origin}: " + ", ".join(
        f"{split} {len(records):,}" for split, records in source.splits.items() if records))
    train, val = source.splits["train"], source.splits["val"]
    shared = set(captions_of(train)) & set(captions_of(val))
    twins = identical_photos(source)
    print(f"           {len(shared):,} captions and {len(twins):,} byte-identical photos stand on "
          "both sides" + (f": {twins[0]}" if twins else ""))
    problems = []
    if read.rejected:
        problems.append(f"{len(read.rejected):,} caption rows were rejected")
    if source.missing:
        problems.append(f"{len(source.missing):,} photos are missing from {source.images}")
    problems += [f"there are no {split} photos" for split in ("train", "val")
                 if not source.splits[split]]
    return problems


def identical_photos(source: DataSource) -> list[str]:
    """Pairs 'a = b' of a train and another photo with the same bytes; only equal sizes are read."""
    by_size = defaultdict(list)
    for split, records in source.splits.items():
        for record in records:
            path = source.images / record.name
            with contextlib.suppress(OSError):  # told where the photos are decoded
                by_size[path.stat().st_size].append((split == "train", path))
    pairs = []
    for same in by_size.values():
        if len({is_train for is_train, _ in same}) == 2:
            contents = defaultdict(set)
            for is_train, path in same:
                with contextlib.suppress(OSError):
                    contents[path.read_bytes()].add((is_train, path.name))
            pairs += [" = ".join(sorted(name for _, name in found))
                      for found in contents.values()
                      if len({is_train for is_train, _ in found}) == 2]
    return pairs


def check_photos(source: DataSource, size: int) -> list[str]:
    """Decode every photo, which takes about as long as the first start of train.py."""
    names = [record.name for records in source.splits.values() for record in records]
    outside = find_escaping_links(source.images, names)

    def problem_of(name: str) -> str:
        try:
            if name in outside:
                return "a link that leads out of the folder"
            load_resized(source.images / name, size)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems = [f"{name} cannot be read: {problem}" for name, problem
                    in zip(names, pool.map(problem_of, names), strict=True) if problem]
    print(f"pictures   {len(names) - len(problems):,} of {len(names):,} can be read")
    return problems


def check_tokens(source: DataSource, tokenizer: Tokenizer) -> list[str]:
    """Caption lengths, vocabulary, unknown words, and one caption there and back."""
    captions = captions_of(source.splits["train"] + source.splits["val"])
    if not captions:
        return ["there are no captions to tokenize"]
    lengths = np.array([len(split_words(caption)) for caption in captions])
    print(f"lengths    {lengths.min()} to {lengths.max()} words, median {np.median(lengths):.0f}; "
          f"{100 * (lengths > tokenizer.context_length).mean():.2f} % are cut to "
          f"{tokenizer.context_length}")
    shares = []
    for split in ("train", "val"):
        words = Counter(w for caption in captions_of(source.splits[split])
                        for w in split_words(caption))
        unknown = sum(count for word, count in words.items() if word not in tokenizer.vocab)
        shares.append(f"{100 * unknown / max(1, words.total()):.2f} % of {split}")
    print(f"vocabulary {len(tokenizer):,} words from train captions; unknown: {', '.join(shares)}")
    ids = tokenizer.encode(captions[:1])[0]
    print(f"tokens     {captions[0]!r}\n           {ids[ids != tokenizer.pad_id].tolist()}\n"
          f"           {tokenizer.decode(ids)!r}")
    return [] if len(tokenizer) > 2 else ["the vocabulary has no words"]


def check_model(
    source: DataSource, tokenizer: Tokenizer, image_encoder: str, image_size: int, batch_size: int,
    seed: int,
) -> list[str]:
    """One batch of real photos through an untrained model; its loss is near ln(batch)."""
    seed_all(seed, "weights")
    model = DualEncoder(ModelConfig(
        vocab_size=len(tokenizer), image_encoder=image_encoder, image_size=image_size,
        context_length=tokenizer.context_length,
    )).eval()
    photos, captions, problems = read_batch(source, batch_size, store_size(image_size))
    if len(photos) < 2:
        return [*problems, "fewer than two photos could be read"]
    device = pick_device("auto")  # as train.py
    model.to(device)
    with torch.inference_mode():
        images = eval_transform(torch.from_numpy(photos).to(device), image_size)
        tokens = tokenizer.encode(captions).to(device)
        image_embeddings, text_embeddings = model(images, tokens)
        loss = contrastive_loss(image_embeddings, text_embeddings,
                                torch.arange(len(photos), device=device), model.logit_scale).item()
    expected = math.log(len(photos))
    print(f"batch      images {tuple(images.shape)}, tokens {tuple(tokens.shape)} -> embeddings "
          f"{tuple(image_embeddings.shape)}, {tuple(text_embeddings.shape)} on {device}")
    print(f"loss       {loss:.3f} untrained; ln({len(photos)}) = {expected:.3f}")
    if not abs(loss - expected) < 1:
        problems.append(f"the untrained loss {loss:.3f} is far from ln(batch) = {expected:.3f}")
    return problems


def read_batch(
    source: DataSource, batch_size: int, size: int
) -> tuple[np.ndarray, list[str], list[str]]:
    """Decode the first photos: (B, size, size, 3) uint8, a caption each, what was unreadable."""
    photos, captions, problems = [], [], []
    for record in islice(source.splits["train"], batch_size):
        try:
            photos.append(load_resized(Path(source.images, record.name), size))
            captions.append(record.captions[0])
        except ValueError as error:
            problems.append(f"{record.name} cannot be read: {error}")
    return np.stack(photos) if photos else np.empty(0), captions, problems



if __name__ == "__main__":
    run_script(main)
