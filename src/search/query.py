"""Embed a text query, split its scores over its words, and suggest spellings.

With a bag of words, the embedding of a text is the mean of its word vectors at unit length. The
word vectors of a checkpoint are stored beside the index, so a text is embedded without the model,
and without torch, whose import alone takes seconds. A BERT is loaded for each search.
"""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.models.tokenizer import PAD, UNK, Tokenizer, split_words
from src.models.word_vectors import expand_vocabulary, load_word_vectors
from src.search.matrix import load_matrix, save_matrix
from src.utils.errors import UserError, print_message
from src.utils.files import exclusive_lock, fingerprint

if TYPE_CHECKING:
    from src.models.bert import SubwordTokenizer
    from src.models.dual_encoder import DualEncoder

NEAR_WORDS = 4
NEGATIVE = re.compile(r"(?<!\S)-(?=[^\W_])\S+")  # "-people", but not "t-shirt" or " - "


def describe_model(args: dict, dim: int) -> dict[str, str]:
    """Return the flags of a training run that describe its model, and the size of an embedding."""
    names = ("image_encoder", "image_size", "weights", "recipe", "text_encoder", "text_weights")
    if args.get("text_encoder") != "bert":
        names = names[:4]
    return {"dim": str(dim),
            **{name: str(args[name]) for name in names if args.get(name) is not None}}


@dataclass
class WordTable:
    """The part of a checkpoint that text queries need.

    Attributes:
        checkpoint: fingerprint of the checkpoint file.
        words: V words in the order of their ids, <pad> and <unk> first.
        args: flags of the training run, which name its image folder.
        vectors: (V, D) float32, each word in the shared space, not normalized.
        weak_score: results with a lower score are weak matches, see `weak_score` in
            `src.evaluation.metrics`; None if the checkpoint has no such metric.
    """

    checkpoint: str
    words: list[str]
    args: dict
    vectors: np.ndarray
    weak_score: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if values have the wrong type or do not fit each other."""
        if not (isinstance(self.words, list) and all(isinstance(w, str) for w in self.words)
                and isinstance(self.args, dict)
                and isinstance(self.weak_score, float | None)):
            raise ValueError("values of another type")
        if len(self.words) != len(self.vectors) or self.words[:2] != [PAD, UNK]:
            raise ValueError(f"{len(self.vectors)} vectors for {len(self.words)} words")
        self.ids = {word: i for i, word in enumerate(self.words) if i > Tokenizer.unk_id}

    @property
    def about(self) -> dict[str, str]:
        """Return what the index says about the model, for other programs."""
        return describe_model(self.args, self.dim)

    @property
    def dim(self) -> int:
        """Return D, the size of an embedding."""
        return self.vectors.shape[1]


@dataclass
class TextQuery:
    """An embedded text.

    Attributes:
        text: the text as typed.
        words: its W words in order, and those to avoid as "-word".
        unknown: the distinct words outside the vocabulary; each is embedded as <unk>.
        embedding: (D,) float32 unit vector.
        word_parts: (W, D) float32; their sum is the embedding. Of a BERT: the embedding minus that
            of the text without the word.
    """

    text: str
    words: list[str]
    unknown: list[str]
    embedding: np.ndarray
    word_parts: np.ndarray

    def word_contributions(self, image_embeddings: np.ndarray) -> np.ndarray:
        """Return what each word adds to the scores of K images: (K, D) -> (K, W).

        With a bag of words the contributions to an image sum to its score. This is exact: the
        embedding of a text is a scaled sum of word vectors, so its dot product with an image is a
        sum over the words. With a BERT they are the score minus the score without the word, which
        have no such sum.
        """
        return image_embeddings @ self.word_parts.T


@dataclass
class BertTexts:
    """What text queries need of a checkpoint with BERT: the counterpart of a `WordTable`.

    Attributes:
        checkpoint: fingerprint of the checkpoint file.
        args: flags of the training run, which name its image folder.
        model: in eval mode, on any device.
        tokenizer: of the model.
        weak_score: as in `WordTable`.
    """

    checkpoint: str
    args: dict
    model: DualEncoder
    tokenizer: SubwordTokenizer
    weak_score: float | None = None

    @property
    def about(self) -> dict[str, str]:
        """Return what the index says about the model, for other programs."""
        return describe_model(self.args, self.dim)

    @property
    def dim(self) -> int:
        """Return D, the size of an embedding."""
        return self.model.config.embed_dim

    def embed(self, texts: list[str]) -> np.ndarray:
        """Embed texts: the embedding of "beach -people" is that of beach minus that of people.

        Returns:
            (M, D) float32 of unit length, or 0 for a text without a token of the vocabulary.
        """
        from src.evaluation.embed import embed_tokens

        wanted = [NEGATIVE.sub(" ", text).strip() for text in texts]
        avoided = [[part[1:] for part in NEGATIVE.findall(text)] for text in texts]
        # Each text once: the variants of a query repeat the words to avoid.
        distinct = list(dict.fromkeys([*wanted, *(part for parts in avoided for part in parts)]))
        if not distinct:
            return np.zeros((0, self.dim), np.float32)
        tokens = self.tokenizer.encode(distinct, self.model.text_encoder.max_length)  # (T, L)
        known = self.tokenizer.has_known_word(tokens)[:, None]
        row = dict(zip(distinct, (embed_tokens(self.model, tokens) * known).numpy(), strict=True))
        # Without a text to search for there is nothing to subtract from.
        sums = np.stack([row[text] - sum(row[part] for part in parts) if row[text].any()
                         else row[text]
                         for text, parts in zip(wanted, avoided, strict=True)])  # (M, D)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        return sums / np.where(lengths == 0, 1, lengths)

    def embed_queries(self, texts: list[str]) -> list[TextQuery]:
        """Return the embedded texts; a word's part is what the embedding loses without the word.

        Raises:
            UserError: a text has no token of the vocabulary.
        """
        limit = self.model.text_encoder.max_length
        if (self.tokenizer.word_statistics(texts).lengths > limit).any():
            print_message(f"note: of each text only the first {limit} tokens are used")
        queries = []
        for text in texts:
            words = text.split()
            without = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
            embedding, *others = self.embed([text, *without])
            if not embedding.any():
                raise UserError(f"no word of {text!r} is known to the model"
                                + ("; words to avoid need a word to search for"
                                   if NEGATIVE.search(text) else ""))
            queries.append(TextQuery(text, words, [], embedding, embedding - np.stack(others)))
        return queries


def text_side(
    checkpoint: str, model: DualEncoder, tokenizer: Tokenizer, content: dict
) -> WordTable | BertTexts:
    """Return what embeds the texts of a loaded checkpoint.

    Args:
        checkpoint: fingerprint of the file.
        model, tokenizer, content: of `load_checkpoint`.
    """
    args = {name: value for name, value in content.get("args", {}).items()
            if isinstance(value, str | int | float | list | None)}  # what JSON holds
    if model.config.text_encoder == "bert":
        return BertTexts(checkpoint, args, model, tokenizer, weak_score_of(content))
    return WordTable(checkpoint, tokenizer.words, args, model.word_embeddings().cpu().numpy(),
                     weak_score_of(content))


def weak_score_of(content: dict) -> float | None:
    """Return the `weak_score` among the metrics of a checkpoint; None if it has none."""
    metrics = content.get("metrics")
    score = metrics.get("weak_score") if isinstance(metrics, dict) else None
    return score if isinstance(score, float) and math.isfinite(score) else None


def load_words(
    folder: Path, checkpoint: Path, load: Callable[[], tuple[DualEncoder, Tokenizer, dict]],
    word_vectors: Path | None = None,
) -> WordTable | BertTexts:
    """Return the word table of a checkpoint: the one stored in `folder`, or a new one.

    With a BERT there is no such table: its model embeds the texts, and nothing is stored.

    Args:
        folder: where the table is stored, for one checkpoint at a time.
        checkpoint: the checkpoint file.
        load: returns what `load_checkpoint` does; called only for a new table.
        word_vectors: pretrained vectors that add words, see `src.models.word_vectors`.

    Raises:
        UserError: the checkpoint or the vectors cannot be read, `word_vectors` are given for a
            BERT, or the table cannot be written.
    """
    key = fingerprint(checkpoint)
    vectors_key = ""
    if word_vectors:
        if not word_vectors.is_file():
            raise UserError(f"there is no file {word_vectors}")
        status = word_vectors.stat()  # GloVe has gigabytes: reading it would be slow
        vectors_key = f"{word_vectors.resolve()} {status.st_size} {status.st_mtime_ns}"

    def stored() -> WordTable | None:
        try:
            content, vectors = load_matrix(folder, "words")
            if (content["checkpoint"], content.get("word_vectors", "")) == (key, vectors_key):
                return WordTable(key, content["words"], content["args"], vectors,
                                 content.get("weak_score"))
        except FileNotFoundError:
            pass
        except (ValueError, KeyError) as error:
            print_message(f"the word vectors in {folder} are damaged and are built again ({error})")
        return None

    try:
        with exclusive_lock(folder / "words.lock"):
            table = stored()
            if table is None:
                table = text_side(key, *load())
                if not isinstance(table, WordTable):
                    if word_vectors:
                        raise UserError("--word-vectors adds words to a bag of words; the text "
                                        "encoder of this checkpoint is a BERT")
                    return table
                if word_vectors:
                    words, vectors = expand_vocabulary(
                        table.words, table.vectors,
                        *load_word_vectors(word_vectors, set(table.words)))
                    table = replace(table, words=words, vectors=vectors)
                save_matrix(folder, "words", {
                    "checkpoint": key, "word_vectors": vectors_key, "words": table.words,
                    "args": table.args, "weak_score": table.weak_score}, table.vectors)
            return table
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):  # a read-only disk
            if table := stored():
                return table
            if not word_vectors and not isinstance(table := text_side(key, *load()), WordTable):
                return table
        raise UserError(f"cannot keep word vectors in {folder}: {error.strerror or error}; choose "
                        "another place with --index-dir") from error


def embed_queries(table: WordTable | BertTexts, texts: list[str]) -> list[TextQuery]:
    """Return the embedded texts; "beach -people" subtracts the vector of a word.

    Raises:
        UserError: a text has no known word; the message suggests spellings.
    """
    if not isinstance(table, WordTable):
        return table.embed_queries(texts)
    queries = []
    for text in texts:
        words = split_words(NEGATIVE.sub(" ", text))  # all of them: a mean has no context length
        avoided = [word for part in NEGATIVE.findall(text) for word in split_words(part)]
        unknown = list(dict.fromkeys(
            word for word in [*words, *avoided] if word not in table.ids))
        if not set(words) - set(unknown):
            near = {word: near_words(word, table.words[2:]) for word in unknown}
            raise UserError(f"no word of {text!r} is known to the model"
                            + "".join(f"; near {word!r}: {', '.join(words)}"
                                      for word, words in near.items() if words)
                            + ("; words to avoid need a word to search for" if avoided else ""))
        parts = table.vectors[[table.ids.get(word, Tokenizer.unk_id) for word in words]]  # (W, D)
        if avoided:  # an unknown word to avoid changes nothing
            known = [table.vectors[table.ids[word]] if word in table.ids else 0 * parts[0]
                     for word in avoided]
            parts = np.concatenate([parts, -np.stack(known)])
        parts = parts / (np.linalg.norm(parts.sum(0)) or 1)
        queries.append(TextQuery(
            text, [*words, *(f"-{word}" for word in avoided)], unknown, parts.sum(0), parts))
    return queries


def embed_texts(table: WordTable | BertTexts, texts: list[str]) -> np.ndarray:
    """Return the embeddings of M >= 1 texts, (M, D) float32, as those of `embed_queries`.

    Raises:
        UserError: a text has no known word.
    """
    if isinstance(table, WordTable):
        return np.stack([query.embedding for query in embed_queries(table, texts)])
    embeddings = table.embed(texts)
    for text, embedding in zip(texts, embeddings, strict=True):
        if not embedding.any():
            raise UserError(f"no word of {text!r} is known to the model")
    return embeddings


def spelling_hints(unknown: list[str], table: WordTable) -> list[str]:
    """Return a hint for each unknown word, with similar words of the vocabulary."""
    hints = []
    for word in unknown:
        near = near_words(word, table.words[2:])
        hints.append(f"{word!r} is not in the vocabulary"
                     + (f", near it: {', '.join(near)}" if near else ""))
    return hints


def near_words(word: str, known: list[str]) -> list[str]:
    """Return up to four known words that an unknown word may stand for; the page does the same.

    First the words that start with it, then those within one edit (words of two to four letters)
    or two edits (longer words). Ties are in the order of the vocabulary, the most frequent first.
    """
    limit = 0 if len(word) < 2 else 1 if len(word) < 5 else 2
    letters = set(word)
    found = []
    for position, other in enumerate(known):
        if other.startswith(word):
            found.append((0, position))
        # One edit changes the length by at most one, and the set of letters by at most two.
        elif (abs(len(other) - len(word)) <= limit
                and len(letters.symmetric_difference(other)) <= 2 * limit):
            distance = edit_distance(word, other)
            if distance <= limit:
                found.append((distance, position))
    return [known[position] for _, position in sorted(found)[:NEAR_WORDS]]


def edit_distance(a: str, b: str) -> int:
    """Return the optimal string alignment distance of two words.

    It counts insertions, deletions, replacements and swaps of neighbors; no part is edited twice.
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
