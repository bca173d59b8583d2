"""The datasets of a run, and the report of everything in its input that was fixed or left out."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.data.captions import DataIssue, ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.images import load_resized
from src.data.pixel_store import PixelStore, store_size
from src.data.source import DataSource
from src.utils.distributed import rank
from src.utils.errors import UserError, counted, print_message
from src.utils.files import write_atomic

if TYPE_CHECKING:  # src/data does not depend on src/models
    from src.models.tokenizer import Tokenizer

# Kinds of issues whose captions are used all the same: --strict accepts them.
HARMLESS = {"caption rows repaired", "captions repeated", "captions without a known word",
            "images found by another name", "images in no split file"}
MAX_UNKNOWN, MAX_CUT = 0.2, 0.01  # shares of words and of captions without a warning
MIN_IMAGES = 50  # that recall is measured on, without a warning


def prepare_datasets(
    source: DataSource, splits: list[list[ImageRecord]], tokenizer: Tokenizer, image_size: int, *,
    cache: Path, rejected: Path, strict: bool,
) -> list[Flickr30kDataset]:
    """Return a dataset for each split; decode each image once, and report the issues.

    Rank 0 prints a line of counts and the warnings, and writes the issues to a CSV file.

    Args:
        source: the captions and image files.
        splits: the records of each dataset.
        tokenizer: of the model.
        image_size: input size of the model in pixels.
        cache: folder of the decoded pixels.
        rejected: the CSV file of all issues.
        strict: raise if something had to be left out.

    Raises:
        UserError: `strict` and something was left out, no image can be read, or the pixels cannot
            be written.
    """
    names = [record.name for records in splits for record in records]
    store = PixelStore.build(cache, source.images, names, store_size(image_size),
                             follow_links=source.follow_links)
    if store.failed and not store.rows:
        name, reason = next(iter(store.failed.items()))
        raise UserError(
            f"none of the {len(store.failed):,} images can be read; the first, {name}: {reason}")
    datasets = [Flickr30kDataset(records, store, tokenizer) for records in splits]
    if rank() == 0:
        print(write_rejected(rejected, source, store, *datasets))
        for warning in find_warnings(source, [dataset.records for dataset in datasets], tokenizer):
            print_message(f"warning: {warning}")
    if strict:
        check_strict(collect_issues(source, store))
    return datasets


def check_splits(source: DataSource, rejected: Path, *, strict: bool) -> None:
    """Refuse too few training or validation images before any is decoded; report the input then.

    Args:
        source: the captions and image files.
        rejected: the CSV file of all issues.
        strict: name what had to be left out, if that is the reason.

    Raises:
        UserError: a split has fewer than two images.
    """
    for split in ("train", "val"):
        if reason := source.explain_small_split(split, len(source.splits[split])):
            if rank() == 0:
                print(write_rejected(rejected, source))
            if strict:
                check_strict(collect_issues(source))
            raise UserError(reason)


def prepare_images(
    paths: Sequence[Path], tokenizer: Tokenizer, image_size: int
) -> Flickr30kDataset:
    """Return images without captions as a dataset in memory; those that cannot be read are counted.

    Args:
        paths: image files.
        tokenizer: of the model.
        image_size: input size of the model in pixels.

    Raises:
        UserError: none can be read.
    """
    def load(path: Path) -> np.ndarray | str:
        try:
            return load_resized(path, store_size(image_size))
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = dict(zip(map(str, paths), pool.map(load, paths), strict=True))
    pixels = {name: value for name, value in loaded.items() if not isinstance(value, str)}
    failed = {name: value for name, value in loaded.items() if isinstance(value, str)}
    if failed:
        name, reason = next(iter(failed.items()))
        message = (f"{len(failed):,} of {len(paths):,} images cannot be read; the first, "
                   f"{name}: {reason}")
        if not pixels:
            raise UserError(message)
        print_message(f"note: {message}")
    store = PixelStore(np.stack(list(pixels.values())),
                       {name: row for row, name in enumerate(pixels)}, failed)
    return Flickr30kDataset([ImageRecord(name, ()) for name in pixels], store, tokenizer)


def find_warnings(
    source: DataSource, splits: list[list[ImageRecord]], tokenizer: Tokenizer
) -> list[str]:
    """Return what is likely a mistake of the whole caption file or of the flags.

    Args:
        source: the captions and image files.
        splits: the records of each split that is used; recall is measured on the last one.
        tokenizer: of the model.
    """
    statistics = [tokenizer.word_statistics([caption for record in records
                                             for caption in record.captions])
                  for records in splits]
    warnings = list(source.annotations.warnings)
    unknown = max(words.unknown_share for words in statistics)
    if unknown > MAX_UNKNOWN:
        warnings.append(f"{unknown:.0%} of the {tokenizer.unit} are unknown to the vocabulary "
                        f"of {len(tokenizer):,} {tokenizer.unit}"
                        + (" (--min-freq 1 keeps rare ones)" if tokenizer.unit == "words" else ""))
    cut = max(words.cut_share for words in statistics)
    if cut > MAX_CUT:
        longest = max(words.lengths.max(initial=0) for words in statistics)
        warnings.append(f"{cut:.0%} of the captions are cut to {tokenizer.context_length} "
                        f"{tokenizer.unit}, the longest has {longest}: --context-length {longest} "
                        f"keeps all {tokenizer.unit}")
    if 0 < len(splits[-1]) < MIN_IMAGES:
        warnings.append(f"recall over only {counted(len(splits[-1]), 'images')} moves in steps of "
                        f"{100 / len(splits[-1]):.0f} points: use more images")
    return warnings


def collect_issues(
    source: DataSource, store: PixelStore | None = None, *datasets: Flickr30kDataset
) -> dict[str, list[DataIssue]]:
    """Return all issues of the input by kind; those of the HARMLESS kinds are used all the same.

    Args:
        source: with the issues of caption rows and missing images.
        store: adds the images that could not be decoded.
        datasets: add the captions without a word of the vocabulary.
    """
    failed = store.failed if store else {}
    wordless = [(dataset, row) for dataset in datasets
                for row in (~dataset.has_known_word).nonzero().flatten().tolist()]
    return {
        "caption rows repaired": source.annotations.fixed,
        "captions repeated": source.annotations.repeated,
        "captions without a known word": [
            DataIssue(str(source.images), dataset.records[dataset.image_index[row]].name,
                      "no word of it is in the vocabulary", dataset.captions[row])
            for dataset, row in wordless],
        "images found by another name": source.annotations.renamed,
        "images in no split file": source.unlisted,
        "caption rows rejected": source.annotations.rejected,
        "images missing": source.missing,
        "images unreadable": [DataIssue(str(source.images), name, reason)
                              for name, reason in failed.items()],
    }


def write_rejected(
    path: Path, source: DataSource, store: PixelStore | None = None, *datasets: Flickr30kDataset
) -> str:
    """Write every issue of the input to a CSV file and return a summary of one line."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["kind", "where", "name", "reason", "text"])
    issues = collect_issues(source, store, *datasets)
    for kind, found in issues.items():
        table.writerows([kind, issue.where, issue.name, issue.reason, issue.text]
                        for issue in found)
    write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"))
    counts = ", ".join(counted(len(found), kind) for kind, found in issues.items() if found)
    return (f"input: {counted(source.annotations.rows, 'captions')}; "
            + (f"{counts}: {path}" if counts else "nothing rejected"))


def check_strict(issues: dict[str, list[DataIssue]]) -> None:
    """Raise if a caption row or an image had to be left out, for --strict.

    Raises:
        UserError: with exit status 1; the message names the first issue.
    """
    wrong = {kind: found for kind, found in issues.items() if found and kind not in HARMLESS}
    if wrong:
        counts = ", ".join(counted(len(found), kind) for kind, found in wrong.items())
        first = next(iter(wrong.values()))[0]
        raise UserError(f"{counts}, and --strict allows none. The first: {first.where} "
                        f"{first.name}: {first.reason}", status=1)
