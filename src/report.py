"""What a run tells its user: rejected input, metrics, example queries."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch

from src.annotations import Remark
from src.dataset import Flickr30kDataset, Source
from src.errors import UserError
from src.files import write_atomic
from src.model import DualEncoder
from src.pixels import PixelStore
from src.plots import SheetRow, plot_contact_sheet
from src.retrieval import embed_images, embed_tokens
from src.tokenizer import Tokenizer

HARMLESS = {"caption rows recovered", "captions repeated", "captions without a known word"}


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


def print_metrics(line: dict, is_best: bool = False) -> None:
    """One epoch of a run's log on one line."""
    metrics, times = line["metrics"], line["time"]
    recalls = "   ".join(
        f"{label} R@1/5/10 "
        + " / ".join(f"{metrics[f'{direction}_R@{k}']:.1f}" for k in (1, 5, 10))
        + f", median rank {metrics[f'{direction}_median_rank']:.0f}"
        for label, direction in (("text->image", "text_to_image"), ("image->text", "image_to_text"))
    )
    print(f"epoch {line['epoch']}: loss {line['loss']:.3f}   {recalls}   rsum {metrics['rsum']:.1f}"
          f"   {times['seconds']:.0f} s ({times['wait_share']:.1%} waiting for data)"
          + ("   (best)" if is_best else ""))


def plot_examples(
    path: Path, model: DualEncoder, dataset: Flickr30kDataset, count: int = 6, top: int = 5
) -> None:
    """A contact sheet: captions spread over a split, with the top photos of that split.

    The photo that a caption was written for is framed where it is among the top.
    """
    queries = torch.linspace(0, len(dataset) - 1, count).long()
    text_embeddings = embed_tokens(model.eval(), dataset.tokens[queries])
    similarity = text_embeddings @ embed_images(model, dataset).T
    scores, best = similarity.topk(min(top, len(dataset.records)))
    rows = []
    for query, its_scores, photos in zip(queries.tolist(), scores, best, strict=True):
        right = (photos == dataset.image_index[query]).nonzero().flatten().tolist()
        rows.append(SheetRow(
            dataset.captions[query],
            list(dataset.pixels(photos.numpy()).numpy()),
            [f"{score:.2f}" for score in its_scores.tolist()],
            right[0] if right else None,
        ))
    plot_contact_sheet(path, rows)


def format_table(metrics: dict[str, float]) -> str:
    """The retrieval metrics as a table of two rows and their rsum."""
    lines = [f"{'':16}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median rank':>13}{'mean rank':>11}"]
    for direction in ("image_to_text", "text_to_image"):
        recalls = "".join(f"{metrics[f'{direction}_R@{k}']:7.1f}" for k in (1, 5, 10))
        lines.append(f"{direction.replace('_', ' '):16}{recalls}"
                     f"{metrics[f'{direction}_median_rank']:13.1f}"
                     f"{metrics[f'{direction}_mean_rank']:11.1f}")
    return "\n".join([*lines, f"rsum {metrics['rsum']:.1f}"])
