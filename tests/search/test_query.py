"""Text queries: embeddings, contributions of words, spelling hints, and the word table."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch

from src.models.checkpoint import load_checkpoint, save_checkpoint
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.search.query import (
    WordTable,
    edit_distance,
    embed_queries,
    load_words,
    near_words,
    spelling_hints,
)
from src.utils.errors import UserError

QUERIES = ["a red circle", "red", "red red red circle", "a zebra on a circle", "A RED, circle!",
           " ".join(["circle"] * 50)]


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[DualEncoder, Tokenizer]:
    """Return a model with random weights and a small vocabulary."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_captions(["a red circle on a blue square"], 1, 8)
    return DualEncoder(ModelConfig(len(tokenizer), image_size=32, context_length=8)).eval(), \
        tokenizer


@pytest.fixture(scope="module")
def table(model_and_tokenizer: tuple[DualEncoder, Tokenizer]) -> WordTable:
    """Return the word table of that model."""
    model, tokenizer = model_and_tokenizer
    return WordTable("x", tokenizer.words, {}, model.word_embeddings().numpy())


def test_contributions_sum_to_the_score(table: WordTable) -> None:
    """The contributions of the words sum to the dot product of the embeddings."""
    images = np.random.default_rng(0).standard_normal((20, 256), dtype=np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    for query in embed_queries(table, QUERIES):
        contributions = query.word_contributions(images)
        assert contributions.shape == (20, len(query.words))
        np.testing.assert_allclose(contributions.sum(1), images @ query.embedding, atol=2e-6)


def test_embedding_equals_encode_text(
    model_and_tokenizer: tuple[DualEncoder, Tokenizer], table: WordTable
) -> None:
    """A query has the embedding that encode_text gives its tokens."""
    model, tokenizer = model_and_tokenizer
    for query in embed_queries(table, QUERIES):
        with torch.no_grad():
            alone = model.encode_text(tokenizer.encode([query.text]))[0]
        np.testing.assert_allclose(query.embedding, alone, atol=1e-6)


def test_a_query_has_no_length_limit(table: WordTable) -> None:
    """Words after the context length of training count too: a query is the mean of its words."""
    query, short = embed_queries(table, ["a " * 34 + "circle", "circle"])
    assert query.words == ["a"] * 34 + ["circle"]
    expected = 34 * table.vectors[table.ids["a"]] + table.vectors[table.ids["circle"]]
    np.testing.assert_allclose(query.embedding, expected / np.linalg.norm(expected), atol=1e-6)
    assert not np.allclose(query.embedding, short.embedding)


def test_unknown_words_are_named_once_in_order(table: WordTable) -> None:
    """Words outside the vocabulary are listed once, known words are not."""
    (query,) = embed_queries(table, ["zebra on a cirle zebra"])
    assert query.unknown == ["zebra", "cirle"]
    assert spelling_hints(query.unknown, table) == [
        "'zebra' is not in the vocabulary",
        "'cirle' is not in the vocabulary, near it: circle",
    ]


@pytest.mark.parametrize("text", ["", "   ", "zebra", "?!", "zebra lion", "\u4e00"])
def test_a_query_without_a_known_word_is_an_error(
    table: WordTable, text: str
) -> None:
    """The message shows the text and, if there are any, similar words."""
    with pytest.raises(UserError, match="no word of"):
        embed_queries(table, [text])


# ---- Near spellings ------------------------------------------------------------------------------


def fewest_edits(a: str, limit: int = 2) -> dict[str, int]:
    """Return all strings over "abc" within `limit` edits of a, found by trying every edit.

    No part is edited twice: an edit applies to the rest of the source.
    """
    found: dict[str, int] = {}
    states = deque([("", a, 0)])  # result so far, rest of the source, edits
    while states:
        done, left, edits = states.popleft()
        if not left and edits < found.get(done, limit + 1):
            found[done] = edits
        if left:
            states.append((done + left[0], left[1:], edits))
        if edits < limit:
            if left:
                states.append((done, left[1:], edits + 1))
                states += [(done + c, left[1:], edits + 1) for c in "abc"]
            if len(left) > 1:
                states.append((done + left[1] + left[0], left[2:], edits + 1))
            states += [(done + c, left, edits + 1) for c in "abc"]
    return found


@pytest.mark.parametrize("word", ["", "a", "ab", "ba", "abc", "caba", "aabbc", "abcab"])
def test_edit_distance_is_the_fewest_edits(word: str) -> None:
    """Every string within two edits has that distance, in both directions."""
    for other, edits in fewest_edits(word).items():
        assert edit_distance(word, other) == edit_distance(other, word) == edits, other


def test_edit_distance_of_examples() -> None:
    """Known values, also with letters beyond 16 bits."""
    for a, b, distance in [("kitten", "sitting", 3), ("ca", "abc", 3), ("baech", "beach", 1),
                           ("", "abc", 3), ("same", "same", 0), ("\U00010330a", "a\U00010330", 1)]:
        assert edit_distance(a, b) == edit_distance(b, a) == distance


KNOWN = ["a", "on", "run", "running", "beach", "runner", "bench", "bleach", "beached", "tree",
         "three", "ring", "rings", "\U00010330\U00010331\U00010332\U00010333\U00010334"]


@pytest.mark.parametrize(("word", "near"), [
    ("runn", ["running", "runner", "run"]),  # prefixes, then an edit
    ("baech", ["beach", "bench", "bleach"]),
    ("teh", []), ("tre", ["tree"]), ("o", ["on"]), ("n", []), ("rin", ["ring", "rings", "run"]),
    ("rimg", ["ring"]), ("zzzzzzzz", []), ("x" * 5000, []),
    ("\U00010330\U00010331\U00010332\U00010333", [KNOWN[-1]]),
])
def test_near_words(word: str, near: list[str]) -> None:
    """Prefixes come first, then edits by number, then the order of the vocabulary; at most four."""
    assert near_words(word, KNOWN) == near


def test_near_words_equal_an_exhaustive_search() -> None:
    """The shortcuts for speed give the same words as comparing with every word."""
    rng = np.random.default_rng(0)
    known = list(dict.fromkeys("".join(rng.choice(list("abcd"), rng.integers(1, 8)))
                               for _ in range(300)))
    for _ in range(200):
        word = "".join(rng.choice(list("abcd"), rng.integers(1, 8)))
        limit = (0, 0, 1, 1, 1)[len(word)] if len(word) < 5 else 2
        all_found = [(0 if other.startswith(word) else edit_distance(word, other), place)
                     for place, other in enumerate(known)]
        expected = [known[place] for distance, place in sorted(all_found) if distance <= limit]
        assert near_words(word, known) == expected[:4]


# ---- The word table ------------------------------------------------------------------------------


@pytest.fixture()
def checkpoint(tmp_path: Path, model_and_tokenizer: tuple[DualEncoder, Tokenizer]) -> Path:
    """Return a checkpoint of the model."""
    save_checkpoint(tmp_path / "c.pth", *model_and_tokenizer, args={"images": "photos", "seed": 3})
    return tmp_path / "c.pth"


def test_a_word_table_is_built_once(tmp_path: Path, checkpoint: Path, table: WordTable) -> None:
    """The checkpoint is loaded once; a changed checkpoint is detected."""
    loads = []

    def load() -> tuple:
        loads.append(1)
        return load_checkpoint(checkpoint)

    for expected in (1, 1):
        found = load_words(tmp_path / "index", checkpoint, load)
        assert len(loads) == expected
        assert (found.words, found.args) == (table.words, {"images": "photos", "seed": 3})
        np.testing.assert_array_equal(found.vectors, table.vectors)
    model, tokenizer, _ = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.text_projection.linear.weight.mul_(2)
    save_checkpoint(checkpoint, model, tokenizer, args={})
    found = load_words(tmp_path / "index", checkpoint, load)
    assert len(loads) == 2 and found.args == {}
    np.testing.assert_allclose(found.vectors, 2 * table.vectors, rtol=1e-6)
    assert sorted(p.suffix for p in (tmp_path / "index").iterdir()) == [".json", ".lock", ".npy"]


@pytest.mark.parametrize("change", [
    {"words": ["<pad>"]}, {"words": 5}, {"words": [1] * 8}, {"words": ["a"] * 8}, {"args": []},
    {"args": None}, {"embeddings": "c.pth"}, {"weak_score": "low"},
    {"embeddings": "/dev/zero"},
], ids=str)
def test_a_damaged_word_table_is_built_again(
    tmp_path: Path, checkpoint: Path, change: dict, capsys: pytest.CaptureFixture
) -> None:
    """Whatever a damaged table holds, the result is that of the checkpoint."""
    whole = load_words(tmp_path / "index", checkpoint, lambda: load_checkpoint(checkpoint))
    file = tmp_path / "index" / "words.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    repaired = load_words(tmp_path / "index", checkpoint, lambda: load_checkpoint(checkpoint))
    assert (repaired.words, repaired.args) == (whole.words, whole.args)
    assert "built again" in capsys.readouterr().err


@pytest.mark.parametrize(("metrics", "expected"), [
    ({}, None), ({"metrics": {"rsum": 300.0}}, None), ({"metrics": {"weak_score": 0.25}}, 0.25),
    ({"metrics": {"weak_score": "0.25"}}, None), ({"metrics": {"weak_score": float("nan")}}, None),
    ({"metrics": [0.25]}, None),
], ids=str)
def test_the_weak_score_of_a_checkpoint(
    tmp_path: Path, model_and_tokenizer: tuple[DualEncoder, Tokenizer], metrics: dict,
    expected: float | None,
) -> None:
    """The word table keeps the weak score of the metrics; other checkpoints have none."""
    save_checkpoint(tmp_path / "c.pth", *model_and_tokenizer, args={}, **metrics)
    for _ in range(2):  # from the checkpoint, and from the stored table
        found = load_words(tmp_path / "index", tmp_path / "c.pth",
                           lambda: load_checkpoint(tmp_path / "c.pth"))
        assert found.weak_score == expected


def test_a_word_table_that_cannot_be_written_is_an_error(tmp_path: Path, checkpoint: Path) -> None:
    """A file in the place of the folder is a user error."""
    (tmp_path / "index").write_text("a file")
    with pytest.raises(UserError, match="--index-dir"):
        load_words(tmp_path / "index", checkpoint, lambda: load_checkpoint(checkpoint))


def test_word_vectors_add_words_to_the_table(
    tmp_path: Path, checkpoint: Path, table: WordTable
) -> None:
    """With --word-vectors the table holds new words after its own; without, its own again."""
    rng = np.random.default_rng(0)
    names = [*table.words[2:], "zebra", "unicorn"]
    (tmp_path / "glove.txt").write_text("".join(
        f"{name} {' '.join(map(str, rng.normal(size=3)))}\n" for name in names))
    sizes = []
    for vectors in (None, tmp_path / "glove.txt", tmp_path / "glove.txt", None):
        found = load_words(
            tmp_path / "index", checkpoint, lambda: load_checkpoint(checkpoint), vectors)
        np.testing.assert_array_equal(found.vectors[: len(table.words)], table.vectors)
        sizes.append(len(found.words) - len(table.words))
    assert sizes == [0, 2, 2, 0]
    with pytest.raises(UserError, match="there is no file"):
        load_words(tmp_path / "index", checkpoint, lambda: load_checkpoint(checkpoint),
                   tmp_path / "missing.txt")
