"""The input of a run: its splits as datasets, and all that was odd or wrong with it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from src.annotations import ImageRecord, Remark
from src.dataset import Flickr30kDataset, Source
from src.distributed import rank
from src.errors import UserError
from src.files import write_atomic
from src.pixels import PixelStore, store_size
from src.tokenizer import Tokenizer

HARMLESS = {"caption rows recovered", "captions repeated", "captions without a known word"}


def open_datasets(
    source: Source, splits: list[list[ImageRecord]], tokenizer: Tokenizer, image_size: int, *,
    cache: Path, rejected: Path, strict: bool,
) -> list[Flickr30kDataset]:
    """A dataset for each split: every photo decoded once, every caption as tokens.

    Prints a line on the input, in the first process.

    Args:
        cache: folder that keeps the decoded photos.
        rejected: the CSV file for every remark on the input.
        strict: bear with nothing that had to be left out.

    Raises:
        UserError: strict, and something was left out; or the photos cannot be kept.
    """
    names = [record.name for records in splits for record in records]
    store = PixelStore.build(cache, source.images, names, store_size(image_size))
    datasets = [Flickr30kDataset(records, store, tokenizer) for records in splits]
    if rank() == 0:
        print(write_rejected(rejected, source, store, *datasets))
    if strict:
        check_strict(remarks_of(source, store))
    return datasets


def remarks_of(
    source: Source, store: PixelStore | None = None, *datasets: Flickr30kDataset
) -> dict[str, list[Remark]]:
    """All that was odd or wrong with the input, by kind; those of HARMLESS are used all the same.

    Args:
        store: where it is given, with the photos that could not be decoded.
        datasets: with the captions that say nothing in the words of the vocabulary.
    """
    failed = store.failed if store else {}
    wordless = [(each, row) for each in datasets for row in
                (each.tokens <= Tokenizer.unk_id).all(dim=1).nonzero().flatten().tolist()]
    return {
        "caption rows recovered": source.annotations.recovered,
        "captions repeated": source.annotations.repeated,
        "captions without a known word": [
            Remark(str(source.images), each.records[each.image_index[row]].name,
                   "no word of it is in the vocabulary", each.captions[row])
            for each, row in wordless],
        "caption rows rejected": source.annotations.rejected,
        "photos missing": source.missing,
        "photos unreadable": [Remark(str(source.images), name, reason)
                              for name, reason in failed.items()],
    }


def write_rejected(
    path: Path, source: Source, store: PixelStore | None = None, *datasets: Flickr30kDataset
) -> str:
    """Write every remark on the input to a CSV file and return a summary of one line."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["kind", "where", "name", "reason", "text"])
    remarks = remarks_of(source, store, *datasets)
    for kind, found in remarks.items():
        table.writerows([kind, r.where, r.name, r.reason, r.text] for r in found)
    write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"))
    counts = ", ".join(f"{len(found):,} {kind}" for kind, found in remarks.items() if found)
    return f"input: {source.annotations.rows:,} captions; " + (f"{counts}: {path}" if counts
                                                                else "nothing rejected")


def check_strict(remarks: dict[str, list[Remark]]) -> None:
    """For --strict: no row, photo or file of the input may have been left out.

    Raises:
        UserError: one was; the script's exit status is then 1.
    """
    wrong = {kind: found for kind, found in remarks.items() if found and kind not in HARMLESS}
    if wrong:
        counts = ", ".join(f"{len(found):,} {kind}" for kind, found in wrong.items())
        first = next(iter(wrong.values()))[0]
        raise UserError(f"{counts}, and --strict allows none. The first: {first.where} "
                        f"{first.name}: {first.reason}", status=1)
