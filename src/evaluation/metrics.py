"""Retrieval metrics, computed from embeddings.

The protocol of the Flickr30k papers: each image once, against all captions. A caption finds its
image if that is among the K most similar images; an image finds a caption if any of its own
captions is among the K most similar captions. Ties count against the model, and so does NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from tqdm import tqdm

RECALL_AT = (1, 5, 10)
WEAK_QUANTILE = 0.1
CACHED_ELEMENTS = 2**26  # similarities in memory at a time: 256 MB


def text_to_image_ranks(similarity: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
    """Return the rank of each caption's image among all images: (M,) int64, from 1.

    Args:
        similarity: (M, N), captions by images.
        image_index: (M,) int64, the column of each caption's image.
    """
    own = similarity.gather(1, image_index[:, None])  # (M, 1)
    # Not `similarity >= own`: that is False for NaN, and a broken model would have perfect recall.
    return (~(similarity < own)).sum(1)


def retrieval_ranks(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, image_index: torch.Tensor,
    tile_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ranks of both directions, computed in float32 on the device of the embeddings.

    The rank of a caption's image is among all images. The rank of an image's best caption is among
    the captions of all other images. The similarities are computed once, in tiles of bounded size,
    and each tile is compared with the two limits: the similarity of each caption and its image, and
    the highest similarity of each image and its captions.

    Args:
        image_embeddings: (N, D).
        text_embeddings: (M, D).
        image_index: (M,) int64, the row of each caption's image, on any device.
        tile_size: rows and columns of a tile; does not change the result. By default a tile fits
            into a CPU's cache, or is large enough for a GPU.

    Returns:
        image_to_text (N',) for the N' images that have captions, text_to_image (M,); int64, from 1,
        on the CPU.
    """
    images, device = image_embeddings.float(), image_embeddings.device
    # Captions of an image next to each other: few tiles hold similarities of own captions.
    owner, order = image_index.cpu().sort(stable=True)
    texts = text_embeddings.float()[order.to(device)]
    size = tile_size or (1024 if device.type == "cpu" else 8192)

    @lru_cache(max(1, CACHED_ELEMENTS // size**2))
    def similarity(row: int, column: int) -> torch.Tensor:
        return texts[row : row + size] @ images[column : column + size].T

    own = torch.empty(len(texts))  # (M,)
    for row in range(0, len(texts), size):
        owners = owner[row : row + size]
        for column in range(int(owners[0]) // size * size, int(owners[-1]) + 1, size):
            inside = ((owners >= column) & (owners < column + size)).nonzero().flatten()
            position = inside.to(device), (owners[inside] - column).to(device)
            own[row + inside] = similarity(row, column)[position].cpu()
    best = torch.full((len(images),), -torch.inf).scatter_reduce(0, owner, own, "amax")  # (N,)

    row_limits, column_limits = own.to(device)[:, None], best.to(device)
    lower_images = torch.zeros(len(texts), dtype=torch.int64, device=device)
    lower_texts = torch.zeros(len(images), dtype=torch.int64, device=device)
    # Results of comparisons as floats: sums of booleans are four times as slow on a CPU.
    buffer = torch.empty(min(size, len(texts)) * min(size, len(images)), device=device)
    for row in tqdm(range(0, len(texts), size), desc="ranking", unit="block", delay=1, leave=False,
                    disable=None):
        for column in range(0, len(images), size):
            rows, columns = slice(row, row + size), slice(column, column + size)
            tile = similarity(row, column)
            lower = buffer[: tile.numel()].view_as(tile)
            # Not `>=`, which is false for NaN, and would give a broken model perfect recall.
            lower_images[rows] += torch.lt(tile, row_limits[rows], out=lower).sum(1).long()
            lower_texts[columns] += torch.lt(tile, column_limits[columns], out=lower).sum(0).long()

    text_to_image = torch.empty_like(owner)
    text_to_image[order] = len(images) - lower_images.cpu()
    counts = torch.bincount(owner, minlength=len(images))
    # An image's own captions do not count.
    own_lower = torch.bincount(owner[own < best[owner]], minlength=len(images))
    image_to_text = 1 + len(texts) - counts - (lower_texts.cpu() - own_lower)
    return image_to_text[counts > 0], text_to_image


def summarize_ranks(
    image_to_text: torch.Tensor, text_to_image: torch.Tensor
) -> dict[str, float]:
    """Return R@1, R@5, R@10 in percent, median and mean rank of both directions, and rsum.

    rsum is the sum of the six recalls.
    """
    metrics: dict[str, float] = {}
    for direction, ranks in (("image_to_text", image_to_text), ("text_to_image", text_to_image)):
        ranks = ranks.double()
        for k in RECALL_AT:
            metrics[f"{direction}_R@{k}"] = 100 * (ranks <= k).double().mean().item()
        metrics[f"{direction}_median_rank"] = ranks.quantile(0.5).item()
        metrics[f"{direction}_mean_rank"] = ranks.mean().item()
    metrics["rsum"] = sum(value for name, value in metrics.items() if "R@" in name)
    return metrics


def retrieval_metrics(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, image_index: torch.Tensor
) -> dict[str, float]:
    """Return the metrics of `summarize_ranks` for (N, D), (M, D) embeddings and (M,) indices.

    They also hold `weak_score`, see there.
    """
    ranks = retrieval_ranks(image_embeddings, text_embeddings, image_index)
    return summarize_ranks(*ranks) | {
        "weak_score": weak_score(image_embeddings, text_embeddings, image_index)}


def weak_score(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, image_index: torch.Tensor
) -> float:
    """Return the score that nine in ten captions exceed with their own image.

    A search calls results below it weak matches. Arguments are those of `retrieval_ranks`.
    """
    own = []
    for rows, owners in zip(text_embeddings.split(8192), image_index.split(8192), strict=True):
        images = image_embeddings[owners.to(image_embeddings.device)]
        own.append((rows.float() * images.float()).sum(1).cpu())
    # NaN counts against the model.
    return torch.cat(own).nan_to_num(nan=-1.0).quantile(WEAK_QUANTILE).item()


EPOCH_HEADER = """\
                  text to image         image to text
epoch    loss    R@1   R@5  R@10       R@1   R@5  R@10     rsum     time    left"""


def format_epoch(line: dict, is_best: bool, epochs: int, frozen_epochs: int = 0) -> str:
    """Return one epoch of a run's log as a row below EPOCH_HEADER; `*` marks the best so far.

    Args:
        line: of the log; without validation its metrics are empty, and shown as `-`.
        is_best: whether its rsum is the highest so far.
        epochs: of the whole run, to estimate the time that is left.
        frozen_epochs: of them on features that are computed once. How long the others take is not
            known before the first of them, so there is no estimate.
    """
    metrics, seconds = line["metrics"], line["time"]["seconds"] + line["time"]["validation_seconds"]

    def cell(name: str, width: int) -> str:
        # A run without validation has no metrics.
        return f"{metrics[name]:{width}.1f}" if metrics else f"{'-':>{width}}"

    text_to_image, image_to_text = (
        "".join(cell(f"{direction}_R@{k}", 6) for k in RECALL_AT)
        for direction in ("text_to_image", "image_to_text"))
    known = line["epoch"] > frozen_epochs or epochs == frozen_epochs
    remaining = epochs - line["epoch"]
    left = format_seconds(remaining * seconds) if remaining and known else ""
    best = "*" if is_best and metrics else " "
    return (f"{line['epoch']:5}{line['loss']:8.3f} {text_to_image}    {image_to_text} "
            f"{cell('rsum', 8)}{best}{format_seconds(seconds):>8}{left:>8}").rstrip()


def format_seconds(seconds: float) -> str:
    """Return a time as '45 s', '12 min' or '3.4 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_table(metrics: dict[str, float]) -> str:
    """Return retrieval metrics as a table of two rows, and the rsum."""
    lines = [f"{'':16}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median rank':>13}{'mean rank':>11}"]
    for direction in ("image_to_text", "text_to_image"):
        recalls = "".join(f"{metrics[f'{direction}_R@{k}']:7.1f}" for k in (1, 5, 10))
        lines.append(f"{direction.replace('_', ' '):16}{recalls}"
                     f"{metrics[f'{direction}_median_rank']:13.1f}"
                     f"{metrics[f'{direction}_mean_rank']:11.1f}")
    return "\n".join([*lines, f"rsum {metrics['rsum']:.1f}"])
