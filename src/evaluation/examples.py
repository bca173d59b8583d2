"""Examples of retrieval as contact sheets: the top images of captions, and the worst mistakes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from src.data.dataset import Flickr30kDataset
from src.evaluation.embed import embed_images, embed_tokens
from src.evaluation.metrics import text_to_image_ranks
from src.models.checkpoint import load_checkpoint
from src.models.dual_encoder import DualEncoder
from src.models.tokenizer import split_words
from src.utils.paths import ResultPaths
from src.utils.plots import SheetRow, plot_contact_sheet, rank_headings

BLOCK = 1024  # captions that are ranked at a time


@dataclass(frozen=True)
class Mistake:
    """A caption whose own image is not ranked first.

    Attributes:
        caption: index of the caption in the dataset.
        rank: rank of its own image among all images, from 2.
        top: indices of the images with the highest similarity.
        same_words: whether the captions of the best other image have all words of this caption, so
            that a bag of words cannot tell the two images apart.
    """

    caption: int
    rank: int
    top: list[int]
    same_words: bool


def find_mistakes(model: DualEncoder, dataset: Flickr30kDataset, top: int = 4) -> list[Mistake]:
    """Return all mistakes on a split, sorted by rank from the worst, then by caption.

    Args:
        model: on any device; left in eval mode.
        dataset: the split.
        top: number of images to list for each mistake, at least 2.
    """
    images = embed_images(model, dataset)  # (N, D)
    words = [{word for caption in record.captions for word in split_words(caption)}
             for record in dataset.records]
    mistakes = []
    for block in torch.arange(len(dataset)).split(BLOCK):
        similarity = embed_tokens(model, dataset.tokens[block]) @ images.T  # (BLOCK, N)
        own_images = dataset.image_index[block]
        ranks = text_to_image_ranks(similarity, own_images)
        top_images = similarity.topk(min(top, len(images))).indices
        for caption, rank, best, own in zip(block.tolist(), ranks.tolist(), top_images.tolist(),
                                            own_images.tolist(), strict=True):
            if rank > 1:
                other = next(image for image in best if image != own)
                same_words = words[other].issuperset(split_words(dataset.captions[caption]))
                mistakes.append(Mistake(caption, rank, best, same_words))
    return sorted(mistakes, key=lambda mistake: (-mistake.rank, mistake.caption))


def plot_mistakes(
    path: Path, dataset: Flickr30kDataset, mistakes: list[Mistake], count: int = 8
) -> None:
    """Draw the worst mistakes, at most one for each image, as a PNG file.

    A row shows the caption, its own image, framed and with its rank, and the images ranked above.

    Args:
        path: the file.
        dataset: the split.
        mistakes: of `find_mistakes`.
        count: maximum number of rows.

    Raises:
        UserError: the file cannot be written.
    """
    rows: dict[int, SheetRow] = {}
    for mistake in mistakes:
        own = int(dataset.image_index[mistake.caption])
        if len(rows) < count and own not in rows:
            others = {rank: image for rank, image in enumerate(mistake.top, start=1)
                      if image != own}
            rows[own] = SheetRow(
                as_prose(dataset.captions[mistake.caption]),
                list(dataset.take_images(np.array([own, *others.values()])).numpy()),
                [f"rank {mistake.rank:,}", *(f"rank {rank}" for rank in others)],
                correct=0,
            )
    plot_contact_sheet(path, list(rows.values()), headings=["caption", "its image", "ranked above"])


def plot_examples(
    path: Path, model: DualEncoder, dataset: Flickr30kDataset, count: int = 6, top: int = 5
) -> None:
    """Draw `count` captions, evenly spaced over a split, with their top images, as a PNG file.

    The image that a caption belongs to is framed if it is among them.
    """
    captions = torch.linspace(0, len(dataset) - 1, count).long()
    texts = embed_tokens(model.eval(), dataset.tokens[captions])
    similarity = texts @ embed_images(model, dataset).T  # (count, N)
    scores, images = similarity.topk(min(top, len(dataset.records)))
    is_own = images == dataset.image_index[captions, None]
    plot_contact_sheet(path, [
        SheetRow(
            as_prose(dataset.captions[caption]),
            list(dataset.take_images(best.numpy()).numpy()),
            [f"{score:.2f}" for score in its_scores.tolist()],
            correct=int(own.int().argmax()) if own.any() else None,
        )
        for caption, its_scores, best, own in zip(captions.tolist(), scores, images, is_own,
                                                  strict=True)
    ], headings=rank_headings("caption", images.shape[1]))


def report_best(results: ResultPaths, val_set: Flickr30kDataset, device: torch.device) -> None:
    """Print the best epoch, and draw some of its answers; without validation, the last epoch."""
    model, _, best = load_checkpoint(results.best)
    if not len(val_set):
        print(f"last epoch {best['epoch']}, without validation: {results.best}")
        return
    plot_examples(results.folder / "examples.png", model.to(device), val_set)
    print(f"best epoch {best['epoch']}, rsum {best['metrics']['rsum']:.1f}: {results.best}")
    print(f"captions and their top five images: {results.folder / 'examples.png'}")


def as_prose(caption: str) -> str:
    """Return a caption as it is printed: without blanks before its marks, and a capital letter.

    The captions of Flickr30k are tokenized: 'A man 's hat , on a dog .'
    """
    text = re.sub(r"\s+([.,;:!?]|'s\b|n't\b)", r"\1", caption.strip())
    return text[:1].upper() + text[1:]
