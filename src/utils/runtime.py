"""What depends on the machine: device, precision, randomness, memory, signals."""

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

from src.utils.errors import UserError

PRECISIONS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """Return the device `name`; 'auto' is CUDA, else Apple's MPS, else the CPU.

    With several processes 'cuda' is a different GPU for each process of a machine.

    Raises:
        UserError: this machine or this build of torch has no such device, or fewer GPUs than
            processes.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "cuda" and n_processes > torch.cuda.device_count() > 0:
        raise UserError(f"{n_processes} processes, {torch.cuda.device_count()} GPU: start one "
                        "process per GPU, or take --device cpu")
    if name.startswith("cuda:") and n_processes > 1:
        raise UserError(f"--device {name} is one GPU for {n_processes} processes: --device cuda "
                        "gives each its own")
    if name == "mps" and has_mps and torch.__version__ < "2.10":
        raise UserError(f"torch {torch.__version__} has no embedding_bag on MPS: install torch "
                        "2.10 or later, or take --device cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # 'meta' has no values, other names no backend
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} is not available here; try auto or cpu") from error
    return device


def compute_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Return the dtype of matrix products and convolutions; weights and sums stay float32.

    Args:
        device: to compute on.
        precision: one of PRECISIONS; 'auto' is bfloat16 on GPUs and x86 CPUs with instructions
            for it, float16 on older CUDA GPUs, float32 elsewhere.
    """
    if PRECISIONS[precision]:
        return PRECISIONS[precision]
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


@cache
def cpu_has_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 instructions; others emulate them slowly."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def tune_malloc() -> None:
    """Make glibc keep freed memory for the next step's tensors, which have the same sizes.

    By default it maps each large block when it is allocated and unmaps it when it is freed, so the
    kernel clears gigabytes of pages in every step: a third to a half of the time of a training step
    on a CPU. No result changes. Without glibc this does nothing.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap ...
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: ... and never shrink it ...
        mallopt(-2, 64 << 20)  # M_TOP_PAD: ... and let it grow by 64 MB


def free_memory(device: torch.device) -> int | None:
    """Return the bytes of memory that are available on `device`; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None  # not Linux
    return next((1024 * int(line.split()[1]) for line in lines  # "MemAvailable:  1234 kB"
                 if line.startswith("MemAvailable:")), None)


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to `device`; the host does not wait for a copy to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from pageable memory would block the host
    return tensor.to(device, non_blocking=True)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return a context of mixed precision in `dtype`, which does nothing for float32."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype if enabled else None, enabled=enabled)


def grad_scaler(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.amp.GradScaler:
    """Return a gradient scaler, enabled only for float16 with its narrow range."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def seed_all(*key: int | str) -> None:
    """Seed torch on every device as a function of `key`, e.g. (seed, epoch, step).

    Called before each step, so a resumed run does not have to restore generator states.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def choose_kernels(deterministic: bool) -> None:
    """Let cuDNN time its kernels and use the fastest; or use only deterministic ones.

    Call it before the first matrix product.

    Args:
        deterministic: use kernels that give the same bits in every run. Torch raises if an
            operation has none.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it


class StopRequest:
    """Whether the run is asked to stop.

    Attributes:
        signal: SIGINT (Ctrl-C) or SIGTERM (a cluster's preemption); None so far.
    """

    signal: signal.Signals | None = None


@contextlib.contextmanager
def stop_on_request() -> Iterator[StopRequest]:
    """Record the first SIGINT or SIGTERM while the block runs; the second ends the process."""
    request = StopRequest()
    handlers = {}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def record(number: int, frame: object) -> None:
        request.signal = signal.Signals(number)
        restore()
        if os.environ.get("RANK", "0") == "0":  # not print: it may be what was interrupted
            os.write(2, b"\nstopping after this step; a second time stops at once\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, record)
    try:
        yield request
    finally:
        restore()


@contextlib.contextmanager
def explain_oom() -> Iterator[None]:
    """Turn an out-of-memory error into a message that names the flags to lower.

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
            "train with --chunk-size 16, which gives the same gradient (except that BatchNorm "
            "normalizes over a chunk) for a second forward pass, or lower --batch-size or "
            "--image-size"
        ) from error
