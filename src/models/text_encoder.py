"""Token embeddings and their masked mean: captions -> features. A bag of words, and no more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from src.models.tokenizer import Tokenizer


class TextEncoder(nn.Module):
    """The mean of the embeddings of a caption's words."""

    def __init__(self, vocab_size: int, token_dim: int, word_dropout: float = 0.0) -> None:
        """Start all words close together.

        Args:
            vocab_size: words, <pad> and <unk> among them.
            token_dim: E, size of the word embeddings.
            word_dropout: share of the words that a caption does without in training.
        """
        super().__init__()
        self.word_dropout = word_dropout
        self.embedding = nn.Embedding(vocab_size, token_dim, padding_idx=Tokenizer.pad_id)
        # Not nn.Embedding's N(0, 1): at lr 2e-5 AdamW moves a weight by 0.2 at most in 11,000
        # steps, so words started that far apart would stay where chance put them. The embeddings
        # are brought to unit length later, so a small start loses nothing.
        nn.init.normal_(self.embedding.weight, std=0.002)
        # Padding stays at zero; <unk> starts there, so a model whose train captions had no unknown
        # word gives none a say later.
        with torch.no_grad():
            self.embedding.weight[[Tokenizer.pad_id, Tokenizer.unk_id]] = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) token ids -> (B, E) features; zeros for a caption without words."""
        if self.training and self.word_dropout:
            dropped = torch.rand(tokens.shape, device=tokens.device) < self.word_dropout
            tokens = tokens.masked_fill(dropped, Tokenizer.pad_id)
        # The masked mean in one kernel, which never holds the (B, L, E) embeddings of all words.
        return F.embedding_bag(tokens, self.embedding.weight, mode="mean",
                               padding_idx=Tokenizer.pad_id)
