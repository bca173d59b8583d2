"""Features -> unit embeddings in the shared space."""

from __future__ import annotations

import torch
from torch import nn


class ProjectionHead(nn.Module):
    """Dropout, one linear map, unit length.

    No bias, as in CLIP: a text's score is then exactly the sum of its words' shares.
    """

    def __init__(self, feature_dim: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(feature_dim, embed_dim, bias=False)
        nn.init.normal_(self.linear.weight, std=feature_dim**-0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) features -> (B, D) float32 embeddings of length 1 (0 for features of zeros)."""
        embeddings = self.linear(self.dropout(features)).float()
        length = embeddings.norm(dim=-1, keepdim=True)  # (B, 1)
        # Not F.normalize: its gradient at zeros (a caption of no known word) is 1e12, and its
        # smallest length, 1e-12, is more than a deep tower's features have before any training.
        return embeddings / length.masked_fill(length == 0, 1)
