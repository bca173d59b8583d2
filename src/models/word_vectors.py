"""Words that were not in the training captions, from pretrained word vectors such as GloVe.

Kiros et al., "Skip-Thought Vectors", NeurIPS 2015: a linear map from pretrained vectors to the
learned embeddings, fitted on the words that have both, is applied to all other words.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from src.models.tokenizer import split_words
from src.utils.errors import UserError

MAX_NEW_WORDS = 50_000  # the most frequent; 256 floats each are 51 MB
RIDGE = 1.0


def load_word_vectors(path: Path, known: set[str]) -> tuple[list[str], np.ndarray]:
    """Load the vectors of the known words and of the first MAX_NEW_WORDS others.

    Args:
        path: text with a word and its numbers per line, as GloVe and fastText (.vec) have it, most
            frequent words first; or .npz with `words` (N,) and `vectors` (N, G).
        known: words of the vocabulary.

    Returns:
        Words in the order of the file, as `split_words` spells them, and (N, G) float32.

    Raises:
        UserError: the file cannot be read, or is in another format.
    """
    read = _read_npz if path.suffix == ".npz" else _read_text
    chosen: dict[str, object] = {}
    n_new = 0
    try:
        for word, numbers in read(path):
            is_known = word in known
            if word in chosen or not (is_known or n_new < MAX_NEW_WORDS) \
                    or split_words(word) != [word]:
                continue
            chosen[word] = numbers.split() if isinstance(numbers, str) else numbers
            n_new += not is_known
        vectors = np.array(list(chosen.values()), dtype=np.float32)
        if vectors.ndim != 2 or not np.isfinite(vectors).all():
            raise ValueError("every word needs as many numbers, all finite")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} does not hold word vectors ({error}); GloVe's text format, .vec "
                        "and .npz with words and vectors are known") from error
    return list(chosen), vectors


def _read_text(path: Path) -> Iterator[tuple[str, str]]:
    from tqdm import tqdm  # here: a search without new word vectors does not need it

    with open(path, encoding="utf-8", errors="replace") as file, \
            tqdm(desc="word vectors", total=path.stat().st_size, unit="B", unit_scale=True, delay=1,
                 leave=False, disable=None) as bar:
        for number, line in enumerate(file):
            bar.update(len(line))
            word, _, numbers = line.rstrip().partition(" ")
            if number or numbers.count(" "):  # fastText's first line is "N G"
                yield word, numbers


def _read_npz(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with open(path, "rb") as stream, np.load(stream) as file:
        yield from zip(map(str, file["words"]), file["vectors"], strict=True)


def expand_vocabulary(
    words: list[str], embeddings: np.ndarray, vector_words: list[str], vectors: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """Add the words that have only a pretrained vector.

    Args:
        words: V words, the most frequent first after <pad> and <unk>.
        embeddings: (V, D) float32, each word in the shared space.
        vector_words, vectors: N words and their (N, G) pretrained vectors.

    Returns:
        The V words and the new ones, and their (V + new, D) float32 embeddings; the first V are
        unchanged.

    Raises:
        UserError: too few words have both.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    inputs = np.hstack([vectors / np.maximum(lengths, 1e-12), np.ones_like(lengths)])  # (N, G + 1)
    row_of = {word: row for row, word in enumerate(vector_words)}
    shared = [(row_of[word], i) for i, word in enumerate(words) if word in row_of]
    if len(shared) < 2:
        raise UserError("the word vectors hold none of the words that the model knows: they are "
                        "of another language, or not in lower case")
    rows, ids = np.array(shared).T
    # Embeddings of rare words are noisy, and frequency falls about as 1 / rank (Zipf).
    weights = 1 / np.sqrt(np.arange(1, len(ids) + 1))
    weighted = inputs[rows].astype(np.float64) * (weights / weights.mean())[:, None]
    ridge = RIDGE * np.eye(inputs.shape[1])
    linear = np.linalg.solve(weighted.T @ inputs[rows] + ridge, weighted.T @ embeddings[ids])
    known = set(words)
    new = [word for word in vector_words if word not in known]
    new_embeddings = inputs[[row_of[word] for word in new]] @ linear  # (new, D)
    return words + new, np.vstack([embeddings, new_embeddings]).astype(np.float32)
