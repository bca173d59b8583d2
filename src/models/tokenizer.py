"""Words <-> ids. The vocabulary comes from train captions only, so validation stays unseen."""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # a text search needs no tensors, and torch takes seconds to import
    import torch

PAD, UNK = "<pad>", "<unk>"
WORD = re.compile(r"[^\W_]+")  # runs of letters and digits, of any script
ASCII_WORDS = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}


def split_words(text: str) -> list[str]:
    """Lower-case words of a text: 'A man\\'s T-shirt .' -> ['a', 'man', 's', 't', 'shirt'].

    Flickr30k itself writes "man 's", so an apostrophe parts words here too.
    """
    if text.isascii():  # the same words, at twice the speed
        return text.translate(ASCII_WORDS).split()
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


class Tokenizer:
    """Maps captions to rows of ids, padded and cut to `context_length`.

    Attributes:
        vocab: word -> id; '<pad>' is 0, '<unk>' is 1, then the words by falling frequency.
        words: the words in the order of their ids.
    """

    pad_id = 0
    unk_id = 1

    def __init__(self, vocab: dict[str, int], context_length: int) -> None:
        """Raises ValueError where `vocab` does not number its words 0, 1, 2, … as above."""
        self.vocab = vocab
        self.words = sorted(vocab, key=vocab.__getitem__)
        self.context_length = context_length
        ids_in_order = [vocab[word] for word in self.words] == list(range(len(vocab)))
        if self.words[:2] != [PAD, UNK] or not ids_in_order:
            raise ValueError("a vocabulary numbers its words 0, 1, 2, … with <pad> 0 and <unk> 1")

    @classmethod
    def from_captions(
        cls, captions: Iterable[str], min_freq: int, context_length: int
    ) -> Tokenizer:
        """Build the vocabulary from train captions: the words seen at least `min_freq` times."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        kept = sorted(
            (word for word, count in counts.items() if count >= min_freq),
            key=lambda word: (-counts[word], word),
        )
        return cls({word: i for i, word in enumerate([PAD, UNK, *kept])}, context_length)

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Token ids of M captions: (M, context_length) int64; words past the length are dropped."""
        import torch

        ids, lengths = array("q"), array("q")  # flat: a Python list a caption would be slow
        for caption in captions:
            words = split_words(caption)[: self.context_length]
            ids.extend([self.vocab.get(word, self.unk_id) for word in words])
            lengths.append(len(words))
        tokens = np.full((len(captions), self.context_length), self.pad_id, np.int64)  # (M, L)
        tokens[np.arange(self.context_length) < np.array(lengths)[:, None]] = ids
        return torch.from_numpy(tokens)

    def decode(self, tokens: torch.Tensor) -> str:
        """The words of one row of ids (L,), without padding."""
        return " ".join(self.words[i] for i in tokens.tolist() if i != self.pad_id)
