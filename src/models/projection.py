"""Projection heads: features -> embeddings of unit length in the shared space."""

from __future__ import annotations

import torch
from torch import nn


class ProjectionHead(nn.Module):
    """Dropout, a linear map, and normalization to unit length.

    The map has no bias, as in CLIP, so the score of a text is exactly the sum of its words' scores.
    """

    def __init__(self, feature_dim: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(feature_dim, embed_dim, bias=False)
        nn.init.normal_(self.linear.weight, std=feature_dim**-0.5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map (B, F) features to (B, D) float32 embeddings of unit length, or 0 for zeros."""
        embeddings = self.linear(self.dropout(features)).float()
        length = embeddings.norm(dim=-1, keepdim=True)  # (B, 1)
        # Not F.normalize: its gradient at zeros (a caption without known words) is 1e12, and its
        # eps of 1e-12 is larger than the features of an untrained deep network.
        return embeddings / length.masked_fill(length == 0, 1)
