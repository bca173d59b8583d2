"""Symmetric InfoNCE between images and captions.

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
    """Return the symmetric InfoNCE loss of a batch, in float32.

    With one caption per image this is CLIP's loss. With several, each caption is classified as its
    image, and the target of an image is the uniform distribution over its captions.

    Args:
        image_embeddings: (B, D) of unit length.
        text_embeddings: (M, D) of unit length.
        image_index: (M,) int64, the row of each caption's image; every image has a caption.
        logit_scale: scalar, the log of the inverse temperature.

    Returns:
        Scalar: the mean of both directions; (ln B + ln M) / 2 if all similarities are equal.
    """
    # bfloat16 has 8 bits: it would round different similarities to the same logit.
    with torch.autocast(image_embeddings.device.type, enabled=False):
        similarity = text_embeddings.float() @ image_embeddings.float().T  # (M, B)
        logits = logit_scale.float().exp() * similarity
        text_to_image = F.cross_entropy(logits, image_index)
        positives = F.one_hot(image_index, len(image_embeddings)).T.to(logits.dtype)  # (B, M)
        targets = positives / positives.sum(1, keepdim=True)
        image_to_text = F.cross_entropy(logits.T, targets)
        return (text_to_image + image_to_text) / 2
