"""Device, precision and randomness: what depends on the machine, decided once."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from src.utils.distributed import world_size
from src.utils.errors import UserError


def pick_device(name: str) -> torch.device:
    """'auto' takes CUDA, then Apple's MPS, then the CPU; any other name is taken at its word.

    Raises:
        UserError: this machine or this build of torch has no such device.
    """
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available()
                else "mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cuda":  # of several processes on this machine each takes a GPU of its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # 'meta' has no numbers, others no module at all
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} is not available here; try auto or cpu") from error
    return device


PRECISIONS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The type that matrix products and convolutions run in; weights and sums are float32.

    Args:
        precision: one of PRECISIONS; 'auto' is bfloat16 on GPUs and x86 CPUs that have instructions
            for it, float16 on older CUDA GPUs, float32 elsewhere.
    """
    if PRECISIONS[precision]:
        return PRECISIONS[precision]
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def should_compile(device: torch.device, steps: int, batchnorm_frozen: bool) -> bool:
    """Return whether torch.compile saves more time in `steps` steps than it takes.

    On a CPU it does not (measured, benchmarks/README.md). On a GPU a minute of compiling is
    compared with about 10 ms a step, which starting EfficientNet's thousand kernels takes longer
    than computing them. That is an estimate, not a measurement.
    """
    # SyncBatchNorm communicates between the kernels that compiling would fuse.
    synchronized = world_size() > 1 and not batchnorm_frozen
    return device.type == "cuda" and steps >= 6000 and not synchronized


@cache
def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; others imitate it, slowly."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def tune_malloc() -> None:
    """Let the C library keep what tensors free, for the next step's tensors of the same sizes.

    glibc maps each large block anew and gives it back at once, so that in every step the kernel
    clears gigabytes of pages: a third to a half of the time of a training step on a CPU. No value
    changes. Elsewhere than with glibc nothing happens.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap …
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: … and never give its end back …
        mallopt(-2, 64 << 20)  # M_TOP_PAD: … which grows by 64 MB


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision in `dtype`; a context that does nothing where that is float32."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)


def grad_scaler(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.amp.GradScaler:
    """Loss scaling, which only float16's narrow range needs; it passes everything on elsewhere."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def seed_all(*key: int | str) -> None:
    """Seed torch on every device as a function of `key`, e.g. (seed, epoch, step).

    Called before each step, it leaves no generator state that a resumed run would have to restore.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def enable_determinism() -> None:
    """Have torch choose, on GPUs, only kernels that give the same bits each time.

    To be called before the first matrix product. Where an operation has none, torch raises.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


class StopRequest:
    """Whether somebody asked this run to end.

    Attributes:
        signal: SIGINT (Ctrl-C) or SIGTERM (a cluster that takes the machine back); None so far.
    """

    signal: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_request() -> Iterator[StopRequest]:
    """While the block runs the first SIGINT or SIGTERM is noted, and the second ends at once."""
    request = StopRequest()
    earlier = {}

    def note(number: int, frame: object) -> None:
        request.signal = signal.Signals(number)
        for each, handler in earlier.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT, signal.SIGTERM):
        earlier[each] = signal.signal(each, note)
    try:
        yield request
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def explain_oom() -> Iterator[None]:
    """Turn what torch raises where memory ends into a message that names the flags to lower.

    Raises:
        UserError: the block ran out of memory, on a GPU or on the host.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) \
                and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"out of memory ({str(error).splitlines()[0] if str(error) else 'on the host'}):\n"
            "train with --chunk-size 16, the same gradient (but for BatchNorm, which sees a chunk) "
            "for a second pass forward, or lower --batch-size or --image-size"
        ) from error
