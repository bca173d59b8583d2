"""What a run tells its user of its model: metrics, example queries."""

from __future__ import annotations

from pathlib import Path

import torch

from src.dataset import Flickr30kDataset
from src.model import DualEncoder
from src.plots import SheetRow, plot_contact_sheet
from src.retrieval import embed_images, embed_tokens


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
