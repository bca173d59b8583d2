"""Retrieval metrics, computed from embeddings.

The protocol of the Flickr30k papers: each image once, against all captions. A caption finds its
image if that is among the K most similar images; an image finds a caption if any of its own
captions is among the K most similar captions. Ties count against the model, and so does NaN.
"""

from __future__ import annotations

import torch

RECALL_AT = (1, 5, 10)


def text_to_image_ranks(similarity: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
    """Return the rank of each caption's image among all images: (M,) int64, from 1.

    Args:
        similarity: (M, N), captions by images.
        image_index: (M,) int64, the column of each caption's image.
    """
    own = similarity.gather(1, image_index[:, None])  # (M, 1)
    # Not `similarity >= own`: that is False for NaN, and a broken model would have perfect recall.
    return (~(similarity < own)).sum(1)


def image_to_text_ranks(similarity: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
    """Return the rank of the best of each image's captions among all captions, from 1.

    Only captions of other images count as ranked before it.

    Args:
        similarity: (M, B), all captions by some images.
        image_index: (M,) int64, the column of each caption's image; -1 for images not among these.

    Returns:
        (B,) int64; 0 for an image without captions.
    """
    own = image_index[:, None] == torch.arange(similarity.shape[1], device=similarity.device)
    best = similarity.masked_fill(~own, -torch.inf).amax(0)  # (B,); NaN if one of its own is
    ranks = 1 + (~(similarity < best) & ~own).sum(0)
    return torch.where(own.any(0), ranks, 0)


def retrieval_ranks(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    image_index: torch.Tensor,
    max_elements: int = 2**26,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ranks of both directions, computed block by block in float32.

    Args:
        image_embeddings: (N, D).
        text_embeddings: (M, D).
        image_index: (M,) int64, the row of each caption's image.
        max_elements: similarities in memory at a time; does not change the result.

    Returns:
        image_to_text (N',) for the N' images that have captions, text_to_image (M,); int64, from 1.
    """
    images, texts = image_embeddings.float(), text_embeddings.float()
    step = max(1, max_elements // max(1, len(images)))
    text_to_image = [
        text_to_image_ranks(texts[i : i + step] @ images.T, image_index[i : i + step])
        for i in range(0, len(texts), step)
    ]
    step = max(1, max_elements // max(1, len(texts)))
    image_to_text = []
    for i in range(0, len(images), step):
        block = images[i : i + step]
        local = image_index - i
        local = torch.where((local >= 0) & (local < len(block)), local, -1)
        image_to_text.append(image_to_text_ranks(texts @ block.T, local))
    ranks = torch.cat(image_to_text)
    return ranks[ranks > 0], torch.cat(text_to_image)


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
    """Return the metrics of `summarize_ranks` for (N, D), (M, D) embeddings and (M,) indices."""
    return summarize_ranks(*retrieval_ranks(image_embeddings, text_embeddings, image_index))


EPOCH_HEADER = """\
                  text to image         image to text
epoch    loss    R@1   R@5  R@10       R@1   R@5  R@10     rsum     time    left"""


def format_epoch(line: dict, is_best: bool, epochs: int) -> str:
    """Return one epoch of a run's log as a row below EPOCH_HEADER; `*` marks the best so far.

    Args:
        line: of the log.
        is_best: whether its rsum is the highest so far.
        epochs: of the whole run, to estimate the time that is left.
    """
    metrics, seconds = line["metrics"], line["time"]["seconds"] + line["time"]["validation_seconds"]
    text_to_image, image_to_text = (
        "".join(f"{metrics[f'{direction}_R@{k}']:6.1f}" for k in RECALL_AT)
        for direction in ("text_to_image", "image_to_text"))
    left = format_seconds((epochs - line["epoch"]) * seconds) if line["epoch"] < epochs else ""
    return (f"{line['epoch']:5}{line['loss']:8.3f} {text_to_image}    {image_to_text} "
            f"{metrics['rsum']:8.1f}{'*' if is_best else ' '}{format_seconds(seconds):>8}{left:>8}"
            ).rstrip()


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
