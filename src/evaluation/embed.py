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
from src.utils.distributed import all_gather_with_grad, broadcast_object, rank, split_evenly
from src.utils.runtime import autocast, compute_dtype, copy_to_device

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
    return _embed_pixels(model, pixels).cpu()


def embed_tokens(model: DualEncoder, tokens: torch.Tensor, batch_size: int = 4096) -> torch.Tensor:
    """Embed captions with a model in eval mode: (M, L) token ids -> (M, D) float32 on the CPU.

    Instead of token ids, (M, E) features of a frozen text encoder.
    """
    return _embed_tokens(model, tokens, batch_size).cpu()


def embed_images(model: DualEncoder, dataset: Flickr30kDataset) -> torch.Tensor:
    """Embed each image of a split: (N, D) float32 on the CPU, the same on every rank."""
    return _embed_images(model, dataset).cpu()


def evaluate_retrieval(model: DualEncoder, dataset: Flickr30kDataset) -> dict[str, float]:
    """Return the retrieval metrics of a split: all its images against all their captions.

    All ranks embed; rank 0 computes the metrics, on the device of the model.
    """
    images = _embed_images(model, dataset)
    parts = split_evenly(len(dataset))
    own = _embed_tokens(model, dataset.tokens[parts[rank()].start : parts[rank()].stop])
    texts = all_gather_with_grad(own, [len(part) for part in parts])
    metrics = None
    if rank() == 0:
        metrics = retrieval_metrics(images, texts, dataset.image_index)
    return broadcast_object(metrics)


def _embed_images(model: DualEncoder, dataset: Flickr30kDataset) -> torch.Tensor:
    """Embed the images of a split on the device of the model, without waiting for it."""
    model.eval()
    parts = split_evenly(len(dataset.records))
    own = parts[rank()]
    embeddings = [torch.empty(0, model.config.embed_dim, device=model.logit_scale.device)]
    for start in tqdm(range(own.start, own.stop, BATCH_SIZE), desc="embedding", unit="batch",
                      leave=False, disable=None if rank() == 0 else True, file=sys.stderr):
        indices = np.arange(start, min(start + BATCH_SIZE, own.stop))
        embeddings.append(_embed_pixels(model, dataset.take_images(indices)))
    return all_gather_with_grad(torch.cat(embeddings), [len(part) for part in parts])


@torch.inference_mode()
def _embed_pixels(model: DualEncoder, pixels: torch.Tensor) -> torch.Tensor:
    device = model.logit_scale.device
    images = copy_to_device(pixels, device)
    if images.ndim == 4:
        images = eval_transform(images, model.config.image_size)
    with autocast(device, compute_dtype(device)):
        return model.encode_image(images)


@torch.inference_mode()
def _embed_tokens(
    model: DualEncoder, tokens: torch.Tensor, batch_size: int = 4096
) -> torch.Tensor:
    device = model.logit_scale.device
    # A bag of words takes no time, and keeps all its digits.
    is_bert = model.config.text_encoder == "bert"
    dtype = compute_dtype(device) if is_bert else torch.float32
    parts = copy_to_device(tokens, device).split(batch_size // 4 if is_bert else batch_size)
    with autocast(device, dtype):
        return torch.cat([model.encode_text(part) for part in tqdm(
            parts, desc="embedding texts", unit="batch", leave=False, delay=2, file=sys.stderr,
            disable=None if is_bert and rank() == 0 else True)])
