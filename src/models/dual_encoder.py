"""The two towers and the temperature: CLIP's shape with an EfficientNet and a bag of words.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from src.models.image_encoder import ImageEncoder
from src.models.projection import ProjectionHead
from src.models.text_encoder import TextEncoder

MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to rebuild the model; travels in the checkpoint as plain values."""

    vocab_size: int
    image_encoder: str = "efficientnet-b0"
    image_size: int = 224
    context_length: int = 32
    token_dim: int = 512
    embed_dim: int = 256
    dropout: float = 0.1
    drop_connect: float = 0.2
    word_dropout: float = 0.0
    flip_tta: bool = False


class DualEncoder(nn.Module):
    """One embedding space for photos and captions; similarity is the dot product."""

    def __init__(self, config: ModelConfig) -> None:
        """Build with random weights; `image_encoder.load_weights` brings pretrained ones."""
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(
            config.image_encoder, config.image_size, config.drop_connect, config.flip_tta
        )
        self.text_encoder = TextEncoder(
            config.vocab_size, config.token_dim, config.word_dropout
        )
        self.image_projection = ProjectionHead(
            self.image_encoder.feature_dim, config.embed_dim, config.dropout
        )
        self.text_projection = ProjectionHead(config.token_dim, config.embed_dim, config.dropout)
        # CLIP's start. One at 0 would, at lr 2e-5, never leave the range where nothing is learned.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) normalized images -> (B, embed_dim) float32 embeddings of unit length.

        Or from (B, F) features that the image encoder gave earlier, where it is frozen.
        """
        features = images if images.ndim == 2 else self.image_encoder(images)
        return self.image_projection(features)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) token ids -> (B, embed_dim) float32 embeddings, unit length (0 for no words)."""
        return self.text_projection(self.text_encoder(tokens))

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both embeddings: (B, 3, H, W) and (M, L) -> (B, D) and (M, D)."""
        return self.encode_image(images), self.encode_text(tokens)

    def summary(self) -> str:
        """Return the image encoder, the size of the vocabulary and of the model as text."""
        parameters = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        compiled = ", compiled" if self.image_encoder.compiled else ""
        return (f"{self.config.image_encoder}, {self.config.vocab_size:,} words, "
                f"{parameters:.1f} M parameters{compiled}")

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the inverse temperature between 1 and 100, as CLIP does, after each step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    @torch.no_grad()
    def word_embeddings(self) -> torch.Tensor:
        """Each word on its own in the shared space: (V, D), not normalized.

        A text's embedding is the normalized mean of its words' rows, so its score against a photo
        is a sum over the words.
        """
        return self.text_projection.linear(self.text_encoder.embedding.weight)
