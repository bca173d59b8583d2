"""Bag of words: captions -> features, the masked mean of the token embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from src.models.tokenizer import Tokenizer


class TextEncoder(nn.Module):
    """Average the embeddings of the words of each caption.

    Attributes:
        feature_dim: E, size of the features.
    """

    def __init__(self, vocab_size: int, token_dim: int, word_dropout: float = 0.0) -> None:
        """Initialize the embeddings close to zero.

        Args:
            vocab_size: number of words, including <pad> and <unk>.
            token_dim: E, size of the token embeddings.
            word_dropout: probability with which a word of a caption is left out in training.
        """
        super().__init__()
        self.word_dropout, self.feature_dim = word_dropout, token_dim
        self.embedding = nn.Embedding(vocab_size, token_dim, padding_idx=Tokenizer.pad_id)
        # Not nn.Embedding's N(0, 1): at lr 2e-5 AdamW moves a weight by at most 0.2 in 11,000
        # steps, so such words would keep their random directions. The small scale has no other
        # effect, because embeddings are normalized to unit length.
        nn.init.normal_(self.embedding.weight, std=0.002)
        # Padding stays at zero. <unk> starts there, so that it has no influence on a text as long
        # as no training caption holds an unknown word.
        with torch.no_grad():
            self.embedding.weight[[Tokenizer.pad_id, Tokenizer.unk_id]] = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map (B, L) token ids to (B, E) features; zeros for a caption without words."""
        if self.training and self.word_dropout:
            dropped = torch.rand(tokens.shape, device=tokens.device) < self.word_dropout  # (B, L)
            tokens = tokens.masked_fill(dropped, Tokenizer.pad_id)
        # The masked mean in one kernel, which never stores the (B, L, E) embeddings of all words.
        return F.embedding_bag(tokens, self.embedding.weight, mode="mean",
                               padding_idx=Tokenizer.pad_id)
