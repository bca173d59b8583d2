"""A text as a query: its words, which of them are known, and each one's share of a score."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch

from src.errors import UserError
from src.model import DualEncoder
from src.retrieval import embed_tokens
from src.tokenizer import Tokenizer, split_words


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
    embedding: torch.Tensor
    word_parts: torch.Tensor

    def shares(self, image_embeddings: torch.Tensor) -> torch.Tensor:
        """Each word's share of the scores of K photos: (K, D) -> (K, W); a row sums to the score.

        Exact, not an approximation: a text is the mean of its words' vectors, mapped linearly and
        brought to unit length, so its dot product with a photo is a sum over the words.
        """
        return image_embeddings @ self.word_parts.T


def embed_queries(model: DualEncoder, tokenizer: Tokenizer, texts: list[str]) -> list[TextQuery]:
    """Embed texts with a model in eval mode.

    Raises:
        UserError: a text has no word that the model knows; the message names near spellings.
    """
    tokens = tokenizer.encode(texts)
    embeddings = embed_tokens(model, tokens)
    with torch.inference_mode():
        vectors = model.word_embeddings().cpu()  # (V, D)
    queries = []
    for text, ids, embedding in zip(texts, tokens, embeddings, strict=True):
        words = split_words(text)[: tokenizer.context_length]
        unknown = list(dict.fromkeys(word for word in words if word not in tokenizer.vocab))
        if len(unknown) == len(set(words)):
            raise UserError(f"no word of {text!r} is known to the model"
                            + "".join(f"; {hint}" for hint in spelling_hints(unknown, tokenizer)))
        parts = vectors[ids[: len(words)]]  # (W, D)
        parts = parts / parts.sum(0).norm()
        queries.append(TextQuery(text, words, unknown, embedding, parts))
    return queries


def spelling_hints(unknown: list[str], tokenizer: Tokenizer) -> list[str]:
    """For each unknown word what the vocabulary has that is spelt nearly so."""
    hints = []
    for word in unknown:
        near = difflib.get_close_matches(word, tokenizer.words[2:], n=3, cutoff=0.7)
        hints.append(f"{word!r} is not in the vocabulary"
                     + (f", near it: {', '.join(near)}" if near else ""))
    return hints
