"""What a model gets wrong: the captions that rank their own photo worst, with what came first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from src.data.dataset import Flickr30kDataset
from src.evaluation.embed import embed_images, embed_tokens
from src.evaluation.metrics import text_to_image_ranks
from src.models.dual_encoder import DualEncoder
from src.models.tokenizer import split_words
from src.utils.plots import SheetRow, plot_contact_sheet


@dataclass(frozen=True)
class Mistake:
    """A caption whose photo is not the first.

    Attributes:
        caption: its row in the dataset.
        rank: of its photo among all photos, from 2.
        first: the photos at the head of the ranking, by number.
        same_words: whether the captions of the first other photo have every word of this one, so
            that only the words' order and number could tell the two photos apart.
    """

    caption: int
    rank: int
    first: list[int]
    same_words: bool


def find_mistakes(model: DualEncoder, dataset: Flickr30kDataset, top: int = 4) -> list[Mistake]:
    """All mistakes of a split, the worst first; of equal ranks the earlier caption.

    Args:
        model: on any device; left in eval mode.
        top: photos of the head of each ranking to name.
    """
    images = embed_images(model, dataset)
    words = [{word for caption in record.captions for word in split_words(caption)}
             for record in dataset.records]
    found = []
    for rows in torch.arange(len(dataset)).split(1024):
        similarity = embed_tokens(model, dataset.tokens[rows]) @ images.T  # (1024, N)
        ranks = text_to_image_ranks(similarity, dataset.image_index[rows])
        first = similarity.topk(min(top, len(images))).indices.tolist()
        own = dataset.image_index[rows].tolist()
        found += [
            Mistake(row, rank, photos,
                    words[next(photo for photo in photos if photo != right)].issuperset(
                        split_words(dataset.captions[row])))
            for row, rank, photos, right in zip(rows.tolist(), ranks.tolist(), first, own,
                                                strict=True) if rank > 1
        ]
    return sorted(found, key=lambda mistake: (-mistake.rank, mistake.caption))


def plot_mistakes(
    path: Path, dataset: Flickr30kDataset, mistakes: list[Mistake], count: int = 8
) -> None:
    """Draw the first `count` mistakes, one a photo: its rank, its photo (framed), what came first.

    Raises:
        UserError: the file cannot be written.
    """
    rows: dict[int, SheetRow] = {}
    for mistake in mistakes:
        own = int(dataset.image_index[mistake.caption])
        if len(rows) < count and own not in rows:
            others = {place: photo for place, photo in enumerate(mistake.first, start=1)
                      if photo != own}
            rows[own] = SheetRow(
                dataset.captions[mistake.caption],
                list(dataset.pixels(np.array([own, *others.values()])).numpy()),
                [f"its photo, rank {mistake.rank:,}",
                 *(f"rank {place}" for place in others)],
                right=0,
            )
    plot_contact_sheet(path, list(rows.values()))


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
