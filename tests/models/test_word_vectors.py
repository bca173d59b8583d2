"""Pretrained word vectors: the file formats, and the words that they add."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from src.models import word_vectors
from src.models.tokenizer import PAD, UNK
from src.models.word_vectors import expand_vocabulary, load_word_vectors
from src.utils.errors import UserError

WORDS = ["the", "dog", "café", "x2"]
VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3) - 5


def write(path: Path, words: list[str] = WORDS, vectors: np.ndarray = VECTORS) -> Path:
    """Write words and vectors in the format of the suffix."""
    if path.suffix == ".npz":
        np.savez(path, words=np.array(words), vectors=vectors)
    else:
        lines = [" ".join([word, *map(str, row)]) for word, row in zip(words, vectors, strict=True)]
        header = [f"{len(words)} {vectors.shape[1]}"] * (path.suffix == ".vec")
        path.write_text("\n".join(header + lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["glove.txt", "fast.vec", "any.npz"])
def test_formats(tmp_path, name):
    """All formats give the same words and vectors."""
    words, vectors = load_word_vectors(write(tmp_path / name), set())
    assert words == WORDS and vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, VECTORS)


def test_only_words_that_the_tokenizer_spells_so(tmp_path):
    """Punctuation, capitals, phrases and repeated words are skipped."""
    words = [",", "Dog", "new-york", "dog", "dog"]
    path = write(tmp_path / "glove.txt", words, np.ones((5, 3), np.float32))
    assert load_word_vectors(path, set())[0] == ["dog"]


def test_known_words_are_read_beyond_the_limit(tmp_path, monkeypatch):
    """Only the first new words are read, and all words of the vocabulary."""
    monkeypatch.setattr(word_vectors, "MAX_NEW_WORDS", 2)
    path = write(tmp_path / "glove.txt", ["a", "b", "c", "d", "e"], np.ones((5, 2), np.float32))
    assert load_word_vectors(path, {"a", "e"})[0] == ["a", "b", "c", "e"]


@pytest.mark.parametrize("content", [
    "", "the 1 2 3\ndog 1 2\n", "the 1 2 x\n", "the 1 2 nan\n", "<html>404</html>\n",
], ids=["empty", "short", "text", "nan", "html"])
def test_other_text_is_refused(tmp_path, content):
    """A file without vectors is refused with its name and the known formats."""
    (tmp_path / "glove.txt").write_text(content)
    with pytest.raises(UserError, match="glove.txt does not hold word vectors"):
        load_word_vectors(tmp_path / "glove.txt", set())


@pytest.mark.parametrize("arrays", [
    None, {"words": ["a"]}, {"words": ["a", "b"], "vectors": np.ones((1, 3))},
    {"words": np.array([{}], dtype=object), "vectors": np.ones((1, 3))},
    {"words": ["a"], "vectors": np.ones(1)},
], ids=["not npz", "no vectors", "lengths", "objects", "1-d"])
def test_other_npz_is_refused(tmp_path, arrays):
    """An archive without the two arrays, or with objects, is refused and runs no code."""
    path = tmp_path / "words.npz"
    path.write_bytes(b"no archive")
    if arrays:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match="words.npz"):
        load_word_vectors(path, set())


def test_new_words_follow_a_linear_map():
    """Where embeddings are linear in the vectors' directions, new words get that map's value."""
    rng = np.random.default_rng(0)
    known = [f"w{i}" for i in range(2000)]
    vectors = rng.normal(size=(2003, 4)).astype(np.float32)
    linear = rng.normal(size=(5, 6)).astype(np.float32)
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = np.hstack([directions, np.ones((2003, 1))]) @ linear
    words = [PAD, UNK, *known]
    embeddings = np.vstack([np.zeros((2, 6)), expected[:2000]]).astype(np.float32)
    all_words, found = expand_vocabulary(words, embeddings, [*known, "a", "b", "c"], vectors)
    assert all_words == [*words, "a", "b", "c"]
    np.testing.assert_array_equal(found[:2002], embeddings)
    np.testing.assert_allclose(found[2002:], expected[2000:], atol=0.02)


def test_vectors_of_another_language_are_refused():
    """Without common words there is no map."""
    with pytest.raises(UserError, match="none of the words"):
        expand_vocabulary([PAD, UNK, "dog"], np.ones((3, 2), np.float32), ["hund", "katze"],
                          np.ones((2, 3), np.float32))
