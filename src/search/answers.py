"""The answers of search.py as plain values, and as text."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote_from_bytes

import numpy as np

from src.search.index import ImageIndex
from src.search.query import TextQuery
from src.utils.errors import UserError, printable
from src.utils.files import content_digest

if TYPE_CHECKING:  # a text query needs no model, and no torch
    from src.models.dual_encoder import DualEncoder
    from src.models.tokenizer import Tokenizer


@dataclass
class Library:
    """The images of one or more folders.

    Attributes:
        index: of all N images.
        paths: of the N files.
        names: N paths relative to the folder of the image.
    """

    index: ImageIndex
    paths: list[str]
    names: list[str]

    @classmethod
    def join(cls, folders: Sequence[Path], indexes: Sequence[ImageIndex]) -> Library:
        """Return the library of some folders and their indexes."""
        names = [name for index in indexes for name in index.names]
        paths = [f"{folder}{os.sep}{name}" for folder, index in
                 zip(map(str, folders), indexes, strict=True) for name in index.names]
        if len(indexes) == 1:
            return cls(indexes[0], paths, names)
        return cls(ImageIndex(
            indexes[0].checkpoint, paths, [pair for index in indexes for pair in index.signatures],
            np.concatenate([index.embeddings for index in indexes]), {},
            [digest for index in indexes for digest in index.digests],
            np.concatenate([index.thumbnails for index in indexes])), paths, names)


@dataclass
class Filter:
    """Which hits of a query are shown.

    Attributes:
        top: number of results.
        offset: number of better results to skip.
        min_score: lowest score of a result.
        duplicates: show near duplicates as results of their own.
    """

    top: int = 10
    offset: int = 0
    min_score: float = -np.inf
    duplicates: bool = False


def find_results(
    library: Library, embedding: np.ndarray, chosen: Filter, skip: Collection[int] = ()
) -> tuple[list[dict], list[int]]:
    """Return the results of a query as plain values, and their rows in the index.

    Near duplicates are one result: the best of them, with the paths of the others.

    Args:
        library: the images.
        embedding: (D,) float32 unit vector.
        chosen: which hits are shown.
        skip: rows that are not results.
    """
    index, wanted = library.index, chosen.offset + chosen.top
    n_hits = wanted + len(skip)
    while True:
        scores, rows = index.search(embedding[None], n_hits)
        hits, used = [], set(skip)
        for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True):
            if row in used or score < chosen.min_score:
                continue
            similar = [] if chosen.duplicates else index.near_duplicates(row).tolist()
            others = [other for other in similar if other != row and other not in used]
            used |= {row, *others}
            hits.append((row, score, others))
            if len(hits) == wanted:
                break
        # With many duplicates the first hits give too few results: look for more.
        if len(hits) == wanted or n_hits >= len(index.names) or scores[0, -1] < chosen.min_score:
            break
        n_hits *= 4
    results = [
        {"rank": rank, "score": score, "path": library.paths[row],
         "uri": file_uri(library.paths[row]),
         "duplicates": [library.paths[other] for other in others]}
        for rank, (row, score, others) in enumerate(hits, start=1) if rank > chosen.offset
    ]
    return results, [row for row, _, _ in hits[chosen.offset :]]


def file_uri(path: str) -> str:
    """Return the file: URI of a path, which is ASCII even if its name is not UTF-8."""
    return "file://" + quote_from_bytes(os.fsencode(os.path.abspath(path)))


def answer_text(
    query: TextQuery, library: Library, chosen: Filter, weak_score: float | None = None
) -> dict:
    """Return the best images of a text, with the contributions of its words.

    Results below `weak_score` are marked as weak; None marks none.
    """
    results, rows = find_results(library, query.embedding, chosen)
    contributions = query.word_contributions(library.index.embeddings[rows])  # (K, W)
    for result, values in zip(results, contributions.tolist(), strict=True):
        result["word_contributions"] = list(zip(query.words, values, strict=True))
        result["weak"] = weak_score is not None and result["score"] < weak_score
    return {"query": query.text, "unknown": query.unknown, "results": results}


def answer_image(
    path: Path, load: Callable[[], tuple[DualEncoder, Tokenizer]], library: Library,
    captions: list[str], chosen: Filter,
) -> dict:
    """Return the images most similar to an image, without itself, and its best captions.

    Args:
        path: of the image, in the library or not.
        load: returns the model and its tokenizer. It is not called if the image is in the library
            and `captions` is empty.
        library: the images.
        captions: from which the best five are chosen.
        chosen: which hits are shown.

    Raises:
        UserError: the image cannot be read.
    """
    own = []
    if path.is_file():  # a pipe can be read only once
        try:
            digest = content_digest(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        own = [i for i, other in enumerate(library.index.digests) if other == digest]
    embedding = library.index.embeddings[own[0]] if own else _embed_file(path, load()[0])
    results, _ = find_results(library, embedding, chosen, own)
    best = _best_captions(embedding, captions, *load()) if captions else []
    return {"image": str(path), "results": results, "captions": best}


def _embed_file(path: Path, model: DualEncoder) -> np.ndarray:
    """Return the embedding of an image file: (D,) float32; a UserError if it cannot be read."""
    import torch

    from src.data.images import load_resized
    from src.data.pixel_store import store_size
    from src.evaluation.embed import embed_pixels

    try:
        pixels = torch.from_numpy(load_resized(path, store_size(model.config.image_size), []))
    except (ValueError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return embed_pixels(model, pixels[None])[0].numpy()


def _best_captions(
    embedding: np.ndarray, captions: list[str], model: DualEncoder, tokenizer: Tokenizer
) -> list[dict]:
    """Return the five captions that fit an embedding (D,) best, with their scores."""
    from src.evaluation.embed import embed_tokens

    scores = embed_tokens(model, tokenizer.encode(captions)).numpy() @ embedding  # (M,)
    return [{"score": scores[i].item(), "caption": captions[i]}
            for i in np.argsort(-scores, kind="stable")[:5]]


def _join_lines(parts: list[str], indent: int, width: int = 80) -> list[str]:
    """Join parts to indented lines of at most `width` columns, as far as each part is shorter."""
    lines = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"{'':{indent}}{part}")
    return lines


def format_answer(answer: dict, explain: bool) -> str:
    """Return an answer as text: rank, score, path, and the contributions of the words."""
    lines = [printable(answer.get("query") or f"photos like {answer['image']}")]
    if not answer["results"]:
        lines.append("      no photo")
    for result in answer["results"]:
        path = printable(result["path"]).replace("\n", "\\n")
        count = len(result["duplicates"])
        more = f"  (+{count} near duplicate{'s' if count > 1 else ''})" if count else ""
        lines.append(f"{result['rank']:4}  {result['score']:6.3f}  {path}{more}")
        if explain and "word_contributions" in result:
            lines += _join_lines(
                [f"{word}{'?' if word.removeprefix('-') in answer['unknown'] else ''} {value:+.3f}"
                 for word, value in result["word_contributions"]], indent=14)
    weak = [result["rank"] for result in answer["results"] if result.get("weak")]
    if weak:
        lines.append(f"      weak matches from number {weak[0]} on: nine in ten correct ones score "
                     "higher")
    if answer.get("captions"):
        lines.append("captions that fit it best")
        lines += [f"      {fit['score']:6.3f}  {printable(fit['caption'])}"
                  for fit in answer["captions"]]
    return "\n".join(lines)
