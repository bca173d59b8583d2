"""Features of a frozen image encoder, computed once and cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from src.data.dataset import Flickr30kDataset
from src.data.transforms import eval_transform
from src.models.image_encoder import ImageEncoder
from src.utils.distributed import rank
from src.utils.errors import UserError
from src.utils.files import exclusive_lock, write_atomic
from src.utils.runtime import autocast

BATCH_SIZE = 128
SAVE_BATCHES = 16  # an interruption costs at most these: minutes on a slow machine


def frozen_features(
    folder: Path, encoder: ImageEncoder, dataset: Flickr30kDataset,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the features of each image's center crop, from the cache or computed and cached.

    The file name is a hash of the weights, the pixels and the precision, so features of other
    weights or images are never used. An interrupted call is continued by the next one. Of several
    processes that share a disk one computes, and the others wait and read.

    Args:
        folder: of the cached files.
        encoder: on the device to compute on; left in eval mode.
        dataset: of N images, with their pixels.
        dtype: of matrix products and convolutions, see `compute_dtype`.

    Returns:
        (N, F) float32 on the CPU.

    Raises:
        UserError: the folder cannot be written.
    """
    encoder.eval()
    if not dataset.records:  # training without validation
        return torch.zeros(0, encoder.feature_dim)
    path = folder / f"features_{_key(encoder, dataset, dtype)}.npy"
    partial = path.with_suffix(".part.npy")
    try:
        with exclusive_lock(folder / "features.lock"):
            if not path.exists():
                _compute(partial, encoder, dataset, dtype)
                partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write features to {folder}: {error}; choose another folder "
                        "with --cache-dir") from error
    return torch.from_numpy(np.load(path))


def _key(encoder: ImageEncoder, dataset: Flickr30kDataset, dtype: torch.dtype) -> str:
    """Return a hash of the weights, the input size, the pixels and the precision."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    device = next(encoder.parameters()).device.type
    digest.update(f"{encoder.image_size} {encoder.flip_tta} {dtype} {device}".encode())
    for start in range(0, len(dataset.records), BATCH_SIZE):
        indices = np.arange(start, min(start + BATCH_SIZE, len(dataset.records)))
        digest.update(dataset.take_images(indices).numpy())
    return digest.hexdigest()


@torch.inference_mode()
def _compute(
    path: Path, encoder: ImageEncoder, dataset: Flickr30kDataset, dtype: torch.dtype
) -> None:
    """Compute the features that the file `path` does not have yet, and write it."""
    count = len(dataset.records)
    device = next(encoder.parameters()).device
    features = np.empty((count, encoder.feature_dim), np.float32)
    start = 0
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # missing or damaged
        done = np.load(path)
        features[: len(done)], start = done, len(done)
    with tqdm(total=count, initial=start, desc="features", unit="image", file=sys.stderr,
              leave=False, disable=None if rank() == 0 else True) as bar:
        while start < count:
            indices = np.arange(start, min(start + BATCH_SIZE, count))
            images = eval_transform(dataset.take_images(indices).to(device), encoder.image_size)
            with autocast(device, dtype):
                features[indices] = encoder(images).float().cpu().numpy()
            start += len(indices)
            bar.update(len(indices))
            if start == count or start // BATCH_SIZE % SAVE_BATCHES == 0:
                _save(path, features[:start])


def _save(path: Path, features: np.ndarray) -> None:
    """Write an array as .npy, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, features)
    write_atomic(path, buffer.getvalue())
