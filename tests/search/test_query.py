"""A text as a query: shares that sum to the score, unknown words named."""

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
def towers() -> tuple[DualEncoder, Tokenizer]:
    """A model with random weights and a small vocabulary."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_captions(["a red circle on a blue square"], 1, 8)
    return DualEncoder(ModelConfig(len(tokenizer), image_size=32, context_length=8)).eval(), \
        tokenizer


@pytest.fixture(scope="module")
def table(towers: tuple[DualEncoder, Tokenizer]) -> WordTable:
    """The word table of that model."""
    model, tokenizer = towers
    return WordTable("x", tokenizer.words, 8, {}, model.word_embeddings().numpy())


def test_shares_sum_to_the_score(table: WordTable) -> None:
    """For every query and photo the words' shares add up to the dot product of the embeddings."""
    photos = np.random.default_rng(0).standard_normal((20, 256), dtype=np.float32)
    photos /= np.linalg.norm(photos, axis=1, keepdims=True)
    for query in embed_queries(table, QUERIES):
        shares = query.shares(photos)
        assert shares.shape == (20, len(query.words))
        np.testing.assert_allclose(shares.sum(1), photos @ query.embedding, atol=2e-6)


def test_embedding_is_the_models(
    towers: tuple[DualEncoder, Tokenizer], table: WordTable
) -> None:
    """A query's embedding is encode_text of its tokens, alone or among others."""
    model, tokenizer = towers
    for query in embed_queries(table, QUERIES):
        with torch.no_grad():
            alone = model.encode_text(tokenizer.encode([query.text]))[0]
        np.testing.assert_allclose(query.embedding, alone, atol=1e-6)


def test_words_past_the_context_length_do_not_count(table: WordTable) -> None:
    """Only as many words as the model reads are listed."""
    (query,) = embed_queries(table, [QUERIES[-1]])
    assert query.words == ["circle"] * 8


def test_unknown_words_are_named_once_in_order(table: WordTable) -> None:
    """Words outside the vocabulary are listed, known ones are not."""
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
    """No random ranking: the message shows the text and, where there are some, near spellings."""
    with pytest.raises(UserError, match="no word of"):
        embed_queries(table, [text])


# ---- Near spellings ------------------------------------------------------------------------------


def fewest_edits(a: str, limit: int = 2) -> dict[str, int]:
    """The oracle: every string over "abc" within `limit` edits of a, by trying them all.

    No part is edited twice: an edit works on what is left of the source, and what is done is done.
    """
    found: dict[str, int] = {}
    states = deque([("", a, 0)])  # what is done, what is left, edits so far
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
    """What one or two edits reach has that distance, in both directions."""
    for other, edits in fewest_edits(word).items():
        assert edit_distance(word, other) == edit_distance(other, word) == edits, other


def test_edit_distance_of_examples() -> None:
    """Known values; a part is not edited twice; letters outside the 16-bit plane are one."""
    for a, b, distance in [("kitten", "sitting", 3), ("ca", "abc", 3), ("baech", "beach", 1),
                           ("", "abc", 3), ("same", "same", 0), ("\U00010330a", "a\U00010330", 1)]:
        assert edit_distance(a, b) == edit_distance(b, a) == distance


KNOWN = ["a", "on", "run", "running", "beach", "runner", "bench", "bleach", "beached", "tree",
         "three", "ring", "rings", "\U00010330\U00010331\U00010332\U00010333\U00010334"]


@pytest.mark.parametrize(("word", "near"), [
    ("runn", ["running", "runner", "run"]),  # begun, then a mistake
    ("baech", ["beach", "bench", "bleach"]),
    ("teh", []), ("tre", ["tree"]), ("o", ["on"]), ("n", []), ("rin", ["ring", "rings", "run"]),
    ("rimg", ["ring"]), ("zzzzzzzz", []), ("x" * 5000, []),
    ("\U00010330\U00010331\U00010332\U00010333", [KNOWN[-1]]),
])
def test_near_words(word: str, near: list[str]) -> None:
    """What the word begins, then mistakes by number, then the vocabulary's order; four at most."""
    assert near_words(word, KNOWN) == near


def test_near_words_leaves_out_nothing() -> None:
    """What is skipped for speed could not have been near: the same as looking at every word."""
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
def checkpoint(tmp_path: Path, towers: tuple[DualEncoder, Tokenizer]) -> Path:
    """A checkpoint of the towers."""
    save_checkpoint(tmp_path / "c.pth", *towers, args={"images": "photos", "seed": 3})
    return tmp_path / "c.pth"


def test_a_word_table_is_made_once(tmp_path: Path, checkpoint: Path, table: WordTable) -> None:
    """The checkpoint is loaded once; later calls give the same; another checkpoint is noticed."""
    loads = []

    def load() -> tuple:
        loads.append(1)
        return load_checkpoint(checkpoint)

    for expected in (1, 1):
        found = load_words(tmp_path / "index", checkpoint, load)
        assert len(loads) == expected
        assert (found.words, found.context_length, found.args) == (
            table.words, 8, {"images": "photos", "seed": 3})
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
    {"args": None}, {"context_length": "8"}, {"context_length": None}, {"embeddings": "c.pth"},
    {"embeddings": "/dev/zero"},
], ids=str)
def test_a_damaged_word_table_is_made_anew(
    tmp_path: Path, checkpoint: Path, change: dict, capsys: pytest.CaptureFixture
) -> None:
    """Whatever stands in it, the table is the checkpoint's, and a line says what happened."""
    whole = load_words(tmp_path / "index", checkpoint, lambda: load_checkpoint(checkpoint))
    file = tmp_path / "index" / "words.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    mended = load_words(tmp_path / "index", checkpoint, lambda: load_checkpoint(checkpoint))
    assert (mended.words, mended.args) == (whole.words, whole.args)
    assert "made anew" in capsys.readouterr().err


def test_a_word_table_that_cannot_be_kept_is_told(tmp_path: Path, checkpoint: Path) -> None:
    """A file in the folder's place: a message with another way."""
    (tmp_path / "index").write_text("a file")
    with pytest.raises(UserError, match="--index-dir"):
        load_words(tmp_path / "index", checkpoint, lambda: load_checkpoint(checkpoint))
