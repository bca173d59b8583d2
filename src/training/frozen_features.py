"""Features of a frozen image encoder: computed once, kept on the disk, trained on in seconds."""

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
SAVE_BATCHES = 16  # some minutes of a slow machine: what an interruption costs


def frozen_features(
    folder: Path, encoder: ImageEncoder, dataset: Flickr30kDataset,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The features of each photo's centre, from `folder` or computed and kept there.

    The file is called by what goes into it, the weights, the pixels and the precision, so features
    of other weights or changed photos are never taken for these. An interrupted call goes on where
    it was; several processes on one disk compute them once.

    Args:
        folder: where the files lie.
        encoder: on the device to compute on; left in eval mode.
        dataset: N photos, with their pixels.
        dtype: of products and convolutions, as `compute_dtype` gives it.

    Returns:
        (N, F) float32 on the CPU.

    Raises:
        UserError: the folder cannot be written.
    """
    encoder.eval()
    path = folder / f"features_{_key(encoder, dataset, dtype)}.npy"
    partial = path.with_suffix(".part.npy")
    try:
        with exclusive_lock(folder / "features.lock"):
            if not path.exists():
                _compute(partial, encoder, dataset, dtype)
                partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot keep features in {folder}: {error}; choose another place with "
                        "--cache-dir") from error
    return torch.from_numpy(np.load(path))


def _key(encoder: ImageEncoder, dataset: Flickr30kDataset, dtype: torch.dtype) -> str:
    """A digest of the weights, the input size, the pixels, and how it is computed."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    device = next(encoder.parameters()).device.type
    digest.update(f"{encoder.image_size} {encoder.flip_tta} {dtype} {device}".encode())
    for start in range(0, len(dataset.records), BATCH_SIZE):
        photos = np.arange(start, min(start + BATCH_SIZE, len(dataset.records)))
        digest.update(dataset.pixels(photos).numpy())
    return digest.hexdigest()


@torch.inference_mode()
def _compute(
    path: Path, encoder: ImageEncoder, dataset: Flickr30kDataset, dtype: torch.dtype
) -> None:
    """Write the features that `path` does not hold yet."""
    count = len(dataset.records)
    device = next(encoder.parameters()).device
    features = np.empty((count, encoder.feature_dim), np.float32)
    start = 0
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # none yet, or a damaged one
        done = np.load(path)
        features[: len(done)], start = done, len(done)
    with tqdm(total=count, initial=start, desc="features", unit="photo", file=sys.stderr,
              disable=None if rank() == 0 else True) as bar:
        while start < count:
            photos = np.arange(start, min(start + BATCH_SIZE, count))
            images = eval_transform(dataset.pixels(photos).to(device),
                               encoder.image_size)
            with autocast(device, dtype):
                features[photos] = encoder(images).float().cpu().numpy()
            start += len(photos)
            bar.update(len(photos))
            if start == count or start // BATCH_SIZE % SAVE_BATCHES == 0:
                _save(path, features[:start])


def _save(path: Path, features: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, features)
    write_atomic(path, buffer.getvalue())
