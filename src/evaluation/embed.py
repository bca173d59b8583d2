"""Embed images and captions with a trained model, and score them against each other."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from src.data.transforms import eval_transform
from src.evaluation.metrics import retrieval_metrics
from src.models.dual_encoder import DualEncoder
from src.utils.distributed import all_gather_with_grad, rank, split_evenly
from src.utils.runtime import autocast, compute_dtype

if TYPE_CHECKING:  # a search, which embeds one query, does not import the training data
    from src.data.dataset import Flickr30kDataset

BATCH_SIZE = 128


@torch.inference_mode()
def embed_pixels(model: DualEncoder, pixels: torch.Tensor) -> torch.Tensor:
    """Embed a batch of stored images: (B, S, S, 3) uint8 -> (B, D) float32 on the CPU.

    Args:
        model: in eval mode.
        pixels: with S >= the model's image size, or (B, F) features of a frozen image encoder.
    """
    device = model.logit_scale.device
    images = pixels.to(device, non_blocking=True)
    if images.ndim == 4:
        images = eval_transform(images, model.config.image_size)
    with autocast(device, compute_dtype(device)):
        return model.encode_image(images).cpu()


@torch.inference_mode()
def embed_tokens(model: DualEncoder, tokens: torch.Tensor, batch_size: int = 4096) -> torch.Tensor:
    """Embed captions with a model in eval mode: (M, L) token ids -> (M, D) float32 on the CPU."""
    device = model.logit_scale.device
    parts = [model.encode_text(part.to(device)).cpu() for part in tokens.split(batch_size)]
    return torch.cat(parts)


def embed_images(model: DualEncoder, dataset: Flickr30kDataset) -> torch.Tensor:
    """Embed each image of a split: (N, D) float32 on the CPU, the same on every rank."""
    model.eval()
    parts = split_evenly(len(dataset.records))
    own = parts[rank()]
    embeddings = [torch.empty(0, model.config.embed_dim)]
    for start in tqdm(range(own.start, own.stop, BATCH_SIZE), desc="embedding", unit="batch",
                      leave=False, disable=None if rank() == 0 else True, file=sys.stderr):
        indices = np.arange(start, min(start + BATCH_SIZE, own.stop))
        embeddings.append(embed_pixels(model, dataset.pixels(indices)))
    return all_gather_with_grad(torch.cat(embeddings), [len(part) for part in parts])


def evaluate_retrieval(model: DualEncoder, dataset: Flickr30kDataset) -> dict[str, float]:
    """Return the retrieval metrics of a split: all its images against all their captions."""
    image_embeddings = embed_images(model, dataset)
    text_embeddings = embed_tokens(model, dataset.tokens)
    return retrieval_metrics(image_embeddings, text_embeddings, dataset.image_index)
