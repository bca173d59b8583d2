"""Comparison of checkpoints and logs, to the last bit."""

from __future__ import annotations

import torch


def differences(one: object, other: object, where: str = "") -> list[str]:
    """Return the paths at which two nested structures of tensors and plain values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [f"{where}/{key}" for key in one.keys() ^ other.keys()] + [
            path for key in one.keys() & other.keys()
            for path in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [path for i, pair in enumerate(zip(one, other, strict=True))
                for path in differences(*pair, f"{where}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = (one.dtype == other.dtype and one.shape == other.shape
                and one.numpy().tobytes() == other.numpy().tobytes())
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [where]
