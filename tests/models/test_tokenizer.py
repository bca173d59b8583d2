"""Words and ids: the vocabulary, its order, and the way there and back."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.models.tokenizer import WORD, Tokenizer, split_words

CAPTIONS = ["A dog runs .", "a dog , a cat", "The cat 's hat", "dog"]


@pytest.mark.parametrize(("text", "words"), [
    ("A man's T-shirt .", ["a", "man", "s", "t", "shirt"]),
    ('" P.I.N.K. "', ["p", "i", "n", "k"]),
    ("snake_case 3 dogs", ["snake", "case", "3", "dogs"]),
    ("Café ÜBER 犬 и", ["café", "über", "犬", "и"]),
    ("ﬁne Ⅳ", ["fine", "iv"]),
    ("", []), (" .,!? ", []), ("\x00\x1f\u2028", []),
])
def test_words(text: str, words: list[str]) -> None:
    """Words are lower-case runs of letters and digits."""
    assert split_words(text) == words


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_ascii_path_equals_the_general_one(text: str) -> None:
    """The fast path for ASCII gives what the pattern gives."""
    assert split_words(text) == WORD.findall(text.lower())


@pytest.mark.parametrize("min_freq", [1, 2, 3, 9])
def test_vocabulary_holds_the_frequent_words(min_freq: int) -> None:
    """Exactly the words seen often enough, by falling frequency, behind <pad> and <unk>."""
    tokenizer = Tokenizer.from_captions(CAPTIONS, min_freq, 8)
    counts = Counter(word for caption in CAPTIONS for word in split_words(caption))
    assert set(tokenizer.words[2:]) == {w for w, n in counts.items() if n >= min_freq}
    assert tokenizer.words[:2] == ["<pad>", "<unk>"] and len(tokenizer) == len(tokenizer.words)
    frequencies = [counts[word] for word in tokenizer.words[2:]]
    assert frequencies == sorted(frequencies, reverse=True)
    assert all(tokenizer.words[i] == word for word, i in tokenizer.vocab.items())


def test_ids_do_not_depend_on_the_order_of_captions() -> None:
    """The same captions in any order give the same vocabulary."""
    assert Tokenizer.from_captions(CAPTIONS, 1, 8).vocab == \
        Tokenizer.from_captions(CAPTIONS[::-1], 1, 8).vocab


def test_rows_are_padded_cut_and_read_back() -> None:
    """A row holds the ids of the first words, then zeros; unknown words are 1."""
    tokenizer = Tokenizer.from_captions(CAPTIONS, 1, 4)
    tokens = tokenizer.encode(["dog cat", "", "the zebra runs a dog", "A DOG"])
    of = tokenizer.vocab
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        [of["dog"], of["cat"], 0, 0], [0, 0, 0, 0], [of["the"], 1, of["runs"], of["a"]],
        [of["a"], of["dog"], 0, 0]]
    assert [tokenizer.decode(row) for row in tokens] == [
        "dog cat", "", "the <unk> runs a", "a dog"]
    assert tokenizer.encode([]).shape == (0, 4)


@given(captions=st.lists(st.text(st.sampled_from("ab é.,A\x00\u0301犬"), max_size=30), max_size=6),
       length=st.integers(1, 5))
def test_encoding_is_a_loop_over_words(captions: list[str], length: int) -> None:
    """Each row is what looking up one word after the other gives; decoding says the known ones."""
    tokenizer = Tokenizer.from_captions(captions[::2], 1, length)
    expected = [[0] * length for _ in captions]
    for row, caption in zip(expected, captions, strict=True):
        for place, word in enumerate(split_words(caption)[:length]):
            row[place] = tokenizer.vocab.get(word, 1)
    tokens = tokenizer.encode(captions)
    assert tokens.tolist() == expected and tokens.shape == (len(captions), length)
    for caption, row in zip(captions[::2], tokens[::2], strict=True):
        assert tokenizer.decode(row) == " ".join(split_words(caption)[:length])


@pytest.mark.parametrize("vocab", [
    {}, {"<pad>": 0}, {"<pad>": 1, "<unk>": 0}, {"<pad>": 0, "<unk>": 1, "a": 3},
    {"<pad>": 0, "<unk>": 1, "a": 2, "b": 2}, {"a": 0, "b": 1},
])
def test_a_wrong_vocabulary_is_refused(vocab: dict[str, int]) -> None:
    """Ids that are not 0, 1, 2, … from <pad> and <unk> would silently shift every word."""
    with pytest.raises(ValueError, match="vocabulary"):
        Tokenizer(vocab, 8)
