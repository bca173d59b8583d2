"""Symmetric InfoNCE: of all captions the photo's own, of all photos the caption's own.

van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018;
Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def contrastive_loss(
    image_embeddings: torch.Tensor,
    text_embeddings: torch.Tensor,
    image_index: torch.Tensor,
    logit_scale: torch.Tensor,
) -> torch.Tensor:
    """Temperature-scaled symmetric InfoNCE, in float32.

    With one caption a photo this is CLIP's loss. Where a photo brings several, each of them has
    its photo to find, and the photo's probability is to spread evenly over its captions.

    Args:
        image_embeddings: (B, D) of unit length.
        text_embeddings: (M, D) of unit length.
        image_index: (M,) int64, the row of each caption's photo; every photo has a caption.
        logit_scale: scalar, the log of the inverse temperature.

    Returns:
        Scalar: the mean of both directions; (ln B + ln M) / 2 where all similarities are equal.
    """
    with torch.autocast(image_embeddings.device.type, enabled=False):
        similarity = text_embeddings.float() @ image_embeddings.float().T  # (M, B)
        logits = logit_scale.float().exp() * similarity
        text_to_image = F.cross_entropy(logits, image_index)
        positives = F.one_hot(image_index, len(image_embeddings)).T.to(logits.dtype)  # (B, M)
        targets = positives / positives.sum(1, keepdim=True)
        image_to_text = F.cross_entropy(logits.T, targets)
        return (text_to_image + image_to_text) / 2
