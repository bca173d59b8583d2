"""Words and ids: the vocabulary, its order, encoding and decoding."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.data.captions import read_annotations
from src.models.tokenizer import Tokenizer, split_words, word_pattern

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
CAPTIONS = ["A dog runs .", "a dog , a cat", "The cat 's hat", "dog"]


@pytest.mark.parametrize(("text", "words"), [
    ("A man's T-shirt .", ["a", "man", "s", "t", "shirt"]),
    ('" P.I.N.K. "', ["p", "i", "n", "k"]),
    ("snake_case 3 dogs", ["snake", "case", "3", "dogs"]),
    ("Café ÜBER 犬 и", ["café", "über", "犬", "и"]),
    ("ﬁne Ⅳ", ["fine", "iv"]),
    ("", []), (" .,!? ", []), ("\x00\x1f\u2028", []),
    ("एक लड़का मैदान में", ["एक", "लड़का", "मैदान", "में"]), ("लड़की है।", ["लड़की", "है"]),
    ("একটি মেয়ে", ["একটি", "মেয়ে"]), ("ஒரு சிறுவன்", ["ஒரு", "சிறுவன்"]),
    ("ไก่ ย่าง", ["ไก่", "ย่าง"]), ("السَّلَام عَلَيْكُم", ["السَّلَام", "عَلَيْكُم"]),
    ("שָׁלוֹם יֶלֶד", ["שָׁלוֹם", "יֶלֶד"]), ("x\u0304 \u0301", ["x\u0304"]),
    ("一个男人走路。", list("一个男人走路")), ("ｶﾞ", ["ガ"]),
    ("2只狗 dogs在玩", ["2", "只", "狗", "dogs", "在", "玩"]),
    ("いぬがコーヒー・飲む", list("いぬがコーヒー飲む")), ("두 마리의 개", ["두", "마리의", "개"]),
    ("3\ufe0f\u20e3 dogs \u2764\ufe0f", ["3", "dogs"]), ("क्\u200dष", ["क्ष"]),
])
def test_words(text: str, words: list[str]) -> None:
    """Words are runs of letters, digits and their marks; a Han or kana character is a word."""
    assert split_words(text) == [unicodedata.normalize("NFKC", word) for word in words]


@pytest.mark.parametrize(("folder", "n_words"), [("train-07", 9), ("train-08", 13)])
def test_words_of_reported_captions(folder: str, n_words: int) -> None:
    """Captions in Hindi and Chinese have different ids, and no word is unknown."""
    [path] = [*(CASES / folder).glob("*.csv"), *(CASES / folder).glob("*.token")] \
        if CASES.exists() else pytest.skip("the cases are not here")
    captions = [caption for record in read_annotations(path).records for caption in record.captions]
    tokenizer = Tokenizer.from_captions(captions, 1, 32)
    assert len(tokenizer) - 2 == len({w for caption in captions for w in split_words(caption)})
    assert len(tokenizer) - 2 >= n_words
    assert len(set(map(tuple, tokenizer.encode(captions).tolist()))) == len(captions)


@given(st.text(st.sampled_from("aé\u0301\u093e犬かカー_.,\u200d\ufe0f ा1 "), max_size=12))
def test_words_are_found_character_by_character(text: str) -> None:
    """The pattern gives what a loop over characters and their categories gives."""
    words, open_word = [], ""  # the kind of the word that a mark or a letter continues
    for char in unicodedata.normalize("NFKC", text).lower().replace("\u200d", ""):
        is_mark = unicodedata.category(char) in ("Mn", "Mc") and char != "\ufe0f"
        is_cjk = char in "犬かカー"
        if is_mark and open_word:
            words[-1] += char
        elif char.isalnum():
            if open_word == "letters" and not is_cjk:
                words[-1] += char
            else:
                words.append(char)
            open_word = "cjk" if is_cjk else "letters"
        else:
            open_word = ""
    assert split_words(text) == words


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_ascii_path_equals_the_general_one(text: str) -> None:
    """The fast path for ASCII gives what the pattern gives."""
    assert split_words(text) == word_pattern().findall(text.lower())


@pytest.mark.parametrize("min_freq", [1, 2, 3, 9])
def test_vocabulary_holds_the_frequent_words(min_freq: int) -> None:
    """Exactly the frequent words, in descending frequency, after <pad> and <unk>."""
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
    """Each row is what looking up the words one by one gives; decoding returns the known ones."""
    tokenizer = Tokenizer.from_captions(captions[::2], 1, length)
    expected = [[0] * length for _ in captions]
    for row, caption in zip(expected, captions, strict=True):
        for place, word in enumerate(split_words(caption)[:length]):
            row[place] = tokenizer.vocab.get(word, 1)
    tokens = tokenizer.encode(captions)
    assert tokens.tolist() == expected and tokens.shape == (len(captions), length)
    for caption, row in zip(captions[::2], tokens[::2], strict=True):
        assert tokenizer.decode(row) == " ".join(split_words(caption)[:length])


@given(captions=st.lists(st.text(st.sampled_from("ab ."), max_size=12), max_size=6))
def test_word_statistics_are_counts(captions: list[str]) -> None:
    """Lengths, the share of unknown words, and the share of captions that are cut."""
    tokenizer = Tokenizer.from_captions(["a a", "ab ab"], 2, 2)
    words = [split_words(caption) for caption in captions]
    unknown = [word for of_caption in words for word in of_caption if word not in ("a", "ab")]
    found = tokenizer.word_statistics(captions)
    assert found.lengths.tolist() == [len(of_caption) for of_caption in words]
    assert found.unknown_share == pytest.approx(len(unknown) / max(1, sum(map(len, words))))
    assert found.cut_share == pytest.approx(
        sum(len(of_caption) > 2 for of_caption in words) / max(1, len(words)))


@pytest.mark.parametrize("vocab", [
    {}, {"<pad>": 0}, {"<pad>": 1, "<unk>": 0}, {"<pad>": 0, "<unk>": 1, "a": 3},
    {"<pad>": 0, "<unk>": 1, "a": 2, "b": 2}, {"a": 0, "b": 1},
])
def test_a_wrong_vocabulary_is_refused(vocab: dict[str, int]) -> None:
    """Ids that are not 0, 1, 2, ... from <pad> and <unk> would shift every word."""
    with pytest.raises(ValueError, match="vocabulary"):
        Tokenizer(vocab, 8)
