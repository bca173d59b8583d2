"""CLIP's architecture with an EfficientNet as image encoder and a bag of words or BERT for texts.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from src.models.bert import BertEncoder
from src.models.image_encoder import ImageEncoder
from src.models.projection import ProjectionHead
from src.models.text_encoder import TextEncoder

MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to rebuild the model; saved in the checkpoint as plain values."""

    vocab_size: int
    image_encoder: str = "efficientnet-b0"
    image_size: int = 224  # side in pixels
    context_length: int = 32  # words or, of BERT, tokens per caption
    token_dim: int = 512
    embed_dim: int = 256
    dropout: float = 0.1
    drop_connect: float = 0.2
    word_dropout: float = 0.0
    flip_tta: bool = False
    text_encoder: str = "words"  # the bag of words, or "bert"
    text_config: str = ""  # of BERT: its configuration as JSON
    text_pooling: str = "mean"  # of BERT: over the tokens, or "cls"


class DualEncoder(nn.Module):
    """Embed images and captions in one space, where the similarity is the dot product."""

    def __init__(self, config: ModelConfig) -> None:
        """Build with random weights; `load_weights` of the encoders loads pretrained ones.

        Raises:
            UserError: the text encoder is a BERT, and transformers is not installed.
        """
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(
            config.image_encoder, config.image_size, config.drop_connect, config.flip_tta
        )
        self.text_encoder = (
            BertEncoder(config.text_config, config.text_pooling) if config.text_encoder == "bert"
            else TextEncoder(config.vocab_size, config.token_dim, config.word_dropout)
        )
        self.image_projection = ProjectionHead(
            self.image_encoder.feature_dim, config.embed_dim, config.dropout
        )
        self.text_projection = ProjectionHead(
            self.text_encoder.feature_dim, config.embed_dim, config.dropout
        )
        # CLIP's initial value. From 0, a learning rate of 2e-5 would leave the softmax too flat to
        # learn from for the whole run.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images.

        Args:
            images: (B, 3, H, W), normalized; or (B, F) features of a frozen image encoder.

        Returns:
            (B, D) float32 of unit length.
        """
        # Features computed once make an epoch of the heads a matter of seconds.
        features = images if images.ndim == 2 else self.image_encoder(images)  # (B, F)
        return self.image_projection(features)  # (B, D)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed captions.

        Args:
            tokens: (B, L) token ids; or (B, E) features of a frozen text encoder.

        Returns:
            (B, D) float32 of unit length, or 0 without words.
        """
        features = tokens if tokens.is_floating_point() else self.text_encoder(tokens)  # (B, E)
        return self.text_projection(features)  # (B, D)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed B images and M captions: (B, 3, H, W) and (M, L) -> (B, D) and (M, D)."""
        return self.encode_image(images), self.encode_text(tokens)

    def summary(self) -> str:
        """Return the encoders and the size of the model as text."""
        parameters = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        compiled = ", compiled" if self.image_encoder.compiled else ""
        texts = (f"BERT of {self.text_encoder.layers} layers" if self.config.text_encoder == "bert"
                 else f"{self.config.vocab_size:,} words")
        return (f"{self.config.image_encoder}, {texts}, {parameters:.1f} M "
                f"parameters{compiled}")

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp the inverse temperature to [1, 100]; to be called after each step."""
        # CLIP's upper bound: larger logits made training unstable.
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    @torch.no_grad()
    def word_embeddings(self) -> torch.Tensor:
        """Return each word of a bag of words in the shared space: (V, D), not normalized.

        The embedding of a text is the normalized mean of the rows of its words, so its similarity
        to an image is a sum over the words.
        """
        # The projection has no bias, so it commutes with the mean over words.
        return self.text_projection.linear(self.text_encoder.embedding.weight)
