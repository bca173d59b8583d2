"""Words <-> ids. The vocabulary is that of the training captions; validation stays unseen."""

from __future__ import annotations

import functools
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # a text search needs no tensors, and torch takes seconds to import
    import torch

PAD, UNK = "<pad>", "<unk>"
# Han, Hiragana and Katakana, which are written without blanks; search.js has the same ranges.
CJK = "\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf" \
      "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
JOINERS = {0x200C: None, 0x200D: None}  # change how letters are drawn, not the word
ASCII_WORDS = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}


def split_words(text: str) -> list[str]:
    """Return the lower-case words of a text: 'A man\'s T-shirt .' -> a, man, s, t, shirt.

    A word is a run of letters, digits and their combining marks, as the vowels of Hindi are. Each
    Han, Hiragana and Katakana character is a word, as those of Han are in BERT's tokenizer. An
    apostrophe separates words, since Flickr30k writes "man 's".
    """
    if text.isascii():  # the same words at twice the speed
        return text.translate(ASCII_WORDS).split()
    return word_pattern().findall(unicodedata.normalize("NFKC", text).lower().translate(JOINERS))


@functools.cache
def word_pattern() -> re.Pattern[str]:
    """Return the pattern of a word in a text in lower case and NFKC."""
    # Python's patterns have no class of marks. Variation selectors change how emoji are drawn.
    marks = "".join(chr(code) for code in range(0x300, 0x20000) if not 0xFE00 <= code <= 0xFE0F
                    and unicodedata.category(chr(code)) in ("Mn", "Mc"))
    letter = rf"(?![{CJK}])[^\W_]"
    return re.compile(rf"(?=[^\W_])[{CJK}][{marks}]*|{letter}(?:{letter}|[{marks}])*")


class WordStatistics(NamedTuple):
    """The words of M captions.

    Attributes:
        lengths: number of words of each caption, (M,) int64.
        unknown_share: share of the words that are not in the vocabulary.
        cut_share: share of the captions that are longer than the context length.
    """

    lengths: np.ndarray
    unknown_share: float
    cut_share: float


class Tokenizer:
    """Map captions to rows of token ids, padded and cut to `context_length`.

    Attributes:
        vocab: word -> id; '<pad>' is 0, '<unk>' is 1, then the words in descending frequency.
        words: the words in the order of their ids.
        context_length: number of words that are kept of a caption.
        unit: what is counted, for messages.
    """

    pad_id = 0
    unk_id = 1
    unit = "words"

    def __init__(self, vocab: dict[str, int], context_length: int) -> None:
        """Raise ValueError if `vocab` does not number its words 0, 1, 2, ... as above."""
        self.vocab = vocab
        self.words = sorted(vocab, key=vocab.__getitem__)
        self.context_length = context_length
        ids_in_order = [vocab[word] for word in self.words] == list(range(len(vocab)))
        if self.words[:2] != [PAD, UNK] or not ids_in_order:
            raise ValueError("a vocabulary numbers its words 0, 1, 2, ... with <pad> 0 and <unk> 1")

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], min_freq: int, context_length: int
    ) -> Tokenizer:
        """Build the vocabulary of training captions: the words that occur `min_freq` times."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        kept = sorted(
            (word for word, count in counts.items() if count >= min_freq),
            key=lambda word: (-counts[word], word),
        )
        return cls({word: i for i, word in enumerate([PAD, UNK, *kept])}, context_length)

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Return token ids of M captions, (M, L) int64; words after the first L are dropped."""
        import torch

        ids, lengths = array("q"), array("q")  # flat, as a list for each caption is slower
        for caption in captions:
            words = split_words(caption)[: self.context_length]
            ids.extend([self.vocab.get(word, self.unk_id) for word in words])
            lengths.append(len(words))
        tokens = np.full((len(captions), self.context_length), self.pad_id, np.int64)  # (M, L)
        tokens[np.arange(self.context_length) < np.array(lengths)[:, None]] = ids
        return torch.from_numpy(tokens)

    def has_known_word(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return whether each caption has a word of the vocabulary: (M, L) -> (M,) bool."""
        return (tokens > self.unk_id).any(dim=1)

    def word_statistics(self, captions: list[str]) -> WordStatistics:
        """Count the words of captions; of no captions all shares are 0."""
        lengths, unknown = array("q"), 0
        for caption in captions:
            words = split_words(caption)
            lengths.append(len(words))
            unknown += sum(word not in self.vocab for word in words)
        counts = np.array(lengths)
        return WordStatistics(counts, unknown / max(1, counts.sum()),
                              (counts > self.context_length).sum() / max(1, len(counts)))

    def decode(self, tokens: torch.Tensor) -> str:
        """Return the words of one row of ids (L,), without padding."""
        return " ".join(self.words[i] for i in tokens.tolist() if i != self.pad_id)
