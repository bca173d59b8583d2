"""Features of a frozen image or text encoder, computed once and cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from src.data.dataset import Flickr30kDataset
from src.data.transforms import eval_transform
from src.models.bert import BertEncoder
from src.models.image_encoder import ImageEncoder
from src.utils.distributed import rank
from src.utils.errors import UserError
from src.utils.files import exclusive_lock, write_atomic
from src.utils.runtime import autocast

BATCH_SIZE = 128
TEXT_BATCH_SIZE = 1024
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
    return _load_or_compute(folder, encoder, _Inputs(
        len(dataset.records), BATCH_SIZE, dataset.take_images,
        lambda pixels: encoder(eval_transform(pixels, encoder.image_size)),
        f"{encoder.image_size} {encoder.flip_tta}", "image"), dtype)


def frozen_text_features(
    folder: Path, encoder: BertEncoder, dataset: Flickr30kDataset,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the features of each caption, from the cache or computed and cached.

    Arguments and files are those of `frozen_features`, with token ids in place of pixels.

    Returns:
        (M, E) float32 on the CPU.

    Raises:
        UserError: the folder cannot be written.
    """
    return _load_or_compute(folder, encoder, _Inputs(
        len(dataset), TEXT_BATCH_SIZE, lambda indices: dataset.tokens[torch.from_numpy(indices)],
        encoder, encoder.pooling, "caption"), dtype)


def freeze_images(
    folder: Path, encoder: ImageEncoder, splits: list[Flickr30kDataset],
    dtype: torch.dtype = torch.float32,
) -> list[Flickr30kDataset]:
    """Return the splits with `frozen_features` in place of their pixels."""
    return [split.with_images(frozen_features(folder, encoder, split, dtype)) for split in splits]


def freeze_texts(
    folder: Path, encoder: BertEncoder, splits: list[Flickr30kDataset],
    dtype: torch.dtype = torch.float32,
) -> list[Flickr30kDataset]:
    """Return the splits with `frozen_text_features` in place of their tokens."""
    return [split.with_tokens(frozen_text_features(folder, encoder, split, dtype))
            for split in splits]


@dataclass
class _Inputs:
    """The inputs of an encoder.

    Attributes:
        count: number of inputs.
        batch_size: inputs that are encoded at a time.
        take: returns the inputs of some indices.
        encode: maps them to features, on the device of the encoder.
        settings: of the encoder, on which the features depend.
        unit: what an input is, for the progress bar.
    """

    count: int
    batch_size: int
    take: Callable[[np.ndarray], torch.Tensor]
    encode: Callable[[torch.Tensor], torch.Tensor]
    settings: str
    unit: str

    def indices(self, start: int) -> np.ndarray:
        """Return the indices of the batch from `start` on."""
        return np.arange(start, min(start + self.batch_size, self.count))


def _load_or_compute(
    folder: Path, encoder: ImageEncoder | BertEncoder, inputs: _Inputs, dtype: torch.dtype
) -> torch.Tensor:
    """Return the features of all inputs, from the cache or computed and cached."""
    encoder.eval()
    if not inputs.count:  # training without validation
        return torch.zeros(0, encoder.feature_dim)
    path = folder / f"features_{_key(encoder, inputs, dtype)}.npy"
    partial = path.with_suffix(".part.npy")
    try:
        with exclusive_lock(folder / "features.lock"):
            if not path.exists():
                _compute(partial, encoder, inputs, dtype)
                partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write features to {folder}: {error}; choose another folder "
                        "with --cache-dir") from error
    return torch.from_numpy(np.load(path))


def _key(encoder: ImageEncoder | BertEncoder, inputs: _Inputs, dtype: torch.dtype) -> str:
    """Return a hash of the weights, the settings, the inputs and the precision."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    device = next(encoder.parameters()).device.type
    digest.update(f"{inputs.settings} {dtype} {device}".encode())
    for start in range(0, inputs.count, inputs.batch_size):
        digest.update(inputs.take(inputs.indices(start)).numpy())
    return digest.hexdigest()


@torch.inference_mode()
def _compute(
    path: Path, encoder: ImageEncoder | BertEncoder, inputs: _Inputs, dtype: torch.dtype
) -> None:
    """Compute the features that the file `path` does not have yet, and write it."""
    count = inputs.count
    device = next(encoder.parameters()).device
    features = np.empty((count, encoder.feature_dim), np.float32)
    start = 0
    with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # missing or damaged
        done = np.load(path)
        features[: len(done)], start = done, len(done)
    with tqdm(total=count, initial=start, desc="features", unit=inputs.unit, file=sys.stderr,
              leave=False, disable=None if rank() == 0 else True) as bar:
        while start < count:
            indices = inputs.indices(start)
            batch = inputs.take(indices).to(device)
            with autocast(device, dtype):
                features[indices] = inputs.encode(batch).float().cpu().numpy()
            start += len(indices)
            bar.update(len(indices))
            if start == count or start // inputs.batch_size % SAVE_BATCHES == 0:
                _save(path, features[:start])


def _save(path: Path, features: np.ndarray) -> None:
    """Write an array as .npy, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, features)
    write_atomic(path, buffer.getvalue())
