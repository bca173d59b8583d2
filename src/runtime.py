"""Device, precision and randomness: what depends on the machine, decided once."""

from __future__ import annotations

import hashlib

import torch

from src.errors import UserError


def pick_device(name: str) -> torch.device:
    """'auto' takes CUDA, then Apple's MPS, then the CPU; any other name is taken at its word.

    Raises:
        UserError: this machine or this build of torch has no such device.
    """
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # 'meta' has no numbers, others no module at all
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} is not available here; try auto or cpu") from error
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type that matrix products and convolutions run in while training.

    bfloat16 on GPUs that have it (Ampere and later), float16 on older ones, float32 elsewhere.
    """
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def autocast(device: torch.device) -> torch.autocast:
    """Mixed precision for `device`; a context that does nothing where it computes in float32."""
    dtype = compute_dtype(device)
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)


def grad_scaler(device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling, which only float16's narrow range needs; it passes everything on elsewhere."""
    return torch.amp.GradScaler(device.type, enabled=compute_dtype(device) == torch.float16)


def seed_all(*key: int | str) -> None:
    """Seed torch on every device as a function of `key`, e.g. (seed, epoch, step).

    Called before each step, it leaves no generator state that a resumed run would have to restore.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
