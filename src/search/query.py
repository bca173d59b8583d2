"""A text as a query: its words, which of them are known, and each one's share of a score.

A text is the mean of its words' vectors, brought to unit length. A checkpoint's word vectors are
kept beside the index, so that a text is embedded without its model, and without torch, whose
import alone takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.models.tokenizer import PAD, UNK, Tokenizer, split_words
from src.search.matrix import load_matrix, save_matrix
from src.utils.errors import UserError, printable
from src.utils.files import exclusive_lock, fingerprint

if TYPE_CHECKING:
    from src.models.dual_encoder import DualEncoder

NEAR_WORDS = 4


@dataclass
class WordTable:
    """What a text query needs of a checkpoint.

    Attributes:
        checkpoint: fingerprint of the file.
        words: V words in the order of their ids, <pad> and <unk> first.
        context_length: how many words of a text count.
        args: the training run's arguments, which say where its photos are.
        vectors: (V, D) float32, each word on its own in the shared space, not normalized.
    """

    checkpoint: str
    words: list[str]
    context_length: int
    args: dict
    vectors: np.ndarray

    def __post_init__(self) -> None:
        """Raises ValueError where the parts are not what they should be or do not fit."""
        if not (isinstance(self.words, list) and all(isinstance(w, str) for w in self.words)
                and isinstance(self.args, dict) and isinstance(self.context_length, int)):
            raise ValueError("values of another type")
        if len(self.words) != len(self.vectors) or self.words[:2] != [PAD, UNK]:
            raise ValueError(f"{len(self.vectors)} vectors for {len(self.words)} words")
        self.ids = {word: i for i, word in enumerate(self.words) if i > Tokenizer.unk_id}

    @property
    def dim(self) -> int:
        """D, the size of an embedding."""
        return self.vectors.shape[1]


def load_words(
    folder: Path, checkpoint: Path, load: Callable[[], tuple[DualEncoder, Tokenizer, dict]]
) -> WordTable:
    """The word table of a checkpoint: kept in `folder` since an earlier call, or made now.

    Args:
        folder: where the table lies, of one checkpoint at a time.
        checkpoint: the file of weights.
        load: what `load_checkpoint` gives of that file; called only if need be.

    Raises:
        UserError: the checkpoint cannot be read or the table not be written.
    """
    key = fingerprint(checkpoint)
    try:
        with exclusive_lock(folder / "words.lock"):
            try:
                content, vectors = load_matrix(folder, "words")
                if content["checkpoint"] == key:
                    return WordTable(key, content["words"], content["context_length"],
                                     content["args"], vectors)
            except FileNotFoundError:
                pass
            except (ValueError, KeyError) as error:
                print(f"the word vectors in {folder} are damaged and are made anew "
                      f"({printable(str(error))})", file=sys.stderr)
            model, tokenizer, content = load()
            args = {name: value for name, value in content.get("args", {}).items()
                    if isinstance(value, str | int | float | None)}  # what JSON holds
            table = WordTable(key, tokenizer.words, tokenizer.context_length, args,
                              model.word_embeddings().cpu().numpy())
            save_matrix(folder, "words", {
                "checkpoint": key, "words": table.words, "args": table.args,
                "context_length": table.context_length,
            }, table.vectors)
            return table
    except OSError as error:
        raise UserError(f"cannot keep word vectors in {folder}: {error.strerror or error}; choose "
                        "another place with --index-dir") from error


@dataclass
class TextQuery:
    """An embedded text.

    Attributes:
        text: as it was typed.
        words: its W words, in order, as far as the context length reaches.
        unknown: the words outside the vocabulary, each once; all of them count as <unk>.
        embedding: (D,) float32 of unit length.
        word_parts: (W, D) float32; their sum is the embedding.
    """

    text: str
    words: list[str]
    unknown: list[str]
    embedding: np.ndarray
    word_parts: np.ndarray

    def shares(self, image_embeddings: np.ndarray) -> np.ndarray:
        """Each word's share of the scores of K photos: (K, D) -> (K, W); a row sums to the score.

        Exact, not an approximation: a text is the mean of its words' vectors brought to unit
        length, so its dot product with a photo is a sum over the words.
        """
        return image_embeddings @ self.word_parts.T


def embed_queries(table: WordTable, texts: list[str]) -> list[TextQuery]:
    """Embed texts.

    Raises:
        UserError: a text has no word that the model knows; the message names near spellings.
    """
    queries = []
    for text in texts:
        words = split_words(text)[: table.context_length]
        unknown = list(dict.fromkeys(word for word in words if word not in table.ids))
        if len(unknown) == len(set(words)):
            raise UserError(f"no word of {text!r} is known to the model"
                            + "".join(f"; {hint}" for hint in spelling_hints(unknown, table)))
        parts = table.vectors[[table.ids.get(word, Tokenizer.unk_id) for word in words]]  # (W, D)
        parts = parts / (np.linalg.norm(parts.sum(0)) or 1)
        queries.append(TextQuery(text, words, unknown, parts.sum(0), parts))
    return queries


def spelling_hints(unknown: list[str], table: WordTable) -> list[str]:
    """For each unknown word what the vocabulary has that is spelt nearly so."""
    hints = []
    for word in unknown:
        near = near_words(word, table.words[2:])
        hints.append(f"{word!r} is not in the vocabulary"
                     + (f", near it: {', '.join(near)}" if near else ""))
    return hints


def near_words(word: str, known: list[str]) -> list[str]:
    """Up to four known words that an unknown one may have meant; the page's rule, too.

    First those that it begins, then those one or two mistakes away (one for a word of fewer than
    five letters, none for a single letter); of each the first in the vocabulary, which is ordered
    by frequency.
    """
    limit = 0 if len(word) < 2 else 1 if len(word) < 5 else 2
    letters = set(word)
    found = []
    for place, other in enumerate(known):
        if other.startswith(word):
            found.append((0, place))
        # A mistake changes the length by one at most, and the letters that occur by two.
        elif (abs(len(other) - len(word)) <= limit
                and len(letters.symmetric_difference(other)) <= 2 * limit):
            distance = edit_distance(word, other)
            if distance <= limit:
                found.append((distance, place))
    return [known[place] for _, place in sorted(found)[:NEAR_WORDS]]


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours that make a of b.

    Damerau and Levenshtein's distance where no part is edited twice ("optimal string alignment").
    """
    before, row = [], list(range(len(b) + 1))
    for i in range(1, len(a) + 1):
        following = [i]
        for j in range(1, len(b) + 1):
            cost = min(row[j] + 1, following[j - 1] + 1, row[j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                cost = min(cost, before[j - 2] + 1)
            following.append(cost)
        before, row = row, following
    return row[len(b)]
