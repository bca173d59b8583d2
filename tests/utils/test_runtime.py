"""Device, precision, randomness, signals and memory."""

from __future__ import annotations

import os
import random
import signal

import pytest
import torch

from src.utils import runtime
from src.utils.errors import UserError
from src.utils.runtime import (
    PRECISIONS,
    autocast,
    compute_dtype,
    cpu_has_bfloat16,
    explain_oom,
    grad_scaler,
    pick_device,
    seed_all,
    stop_on_request,
    tune_malloc,
)

CPU = torch.device("cpu")


def draws(*key: int | str) -> list[float]:
    """Return random numbers drawn after seed_all(*key)."""
    seed_all(*key)
    return torch.rand(4).tolist()


def test_draws_are_a_function_of_the_key():
    """The same key gives the same numbers whatever was drawn before; other keys give others."""
    keys = [(0,), (1,), (0, 1), (1, 0), (0, 0), (0, 1, 2), ("0",), (0, "weights"), (-1,), (2**80,)]
    first = {key: draws(*key) for key in keys}
    random.Random(0).shuffle(keys)
    for key in keys:
        torch.rand(3)
        assert draws(*key) == first[key]
    assert len({tuple(numbers) for numbers in first.values()}) == len(keys)
    assert len({tuple(draws(0, 1, step)) for step in range(1000)}) == 1000


def test_cpu_is_always_available():
    """'cpu' is the CPU; 'auto' is a device that computes."""
    assert pick_device("cpu") == CPU
    assert torch.ones(2, device=pick_device("auto")).sum().item() == 2


@pytest.mark.parametrize("name", ["banana", "", "cuda:99", "meta", "hpu", "cpu:x"])
def test_unavailable_devices_are_refused(name):
    """The message for an unknown device, or one that this machine lacks, names it and a cure."""
    with pytest.raises(UserError, match="try auto or cpu") as caught:
        pick_device(name)
    assert f"--device {name}" in str(caught.value)


def test_fewer_gpus_than_processes_are_refused(monkeypatch):
    """Processes that would share a GPU are an error that names both numbers."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match="2 processes, 1 GPU.*--device cpu"):
            pick_device(name)
    with pytest.raises(UserError, match="cuda:0 is one GPU for 2 processes"):
        pick_device("cuda:0")


def test_mps_without_embedding_bag_is_refused(monkeypatch):
    """The message for a torch that cannot train on MPS names the version that can."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.9.1"))
    with pytest.raises(UserError, match="torch 2.9.1 has no embedding_bag.*2.10.*--device cpu"):
        pick_device("auto")


def test_autocast_does_nothing_in_float32():
    """In float32 a product under autocast is the product without it."""
    assert compute_dtype(CPU, "float32") == torch.float32
    a, b = torch.rand(8, 8), torch.rand(8, 8)
    with autocast(CPU, torch.float32):
        assert not torch.is_autocast_enabled("cpu")
        mixed = a @ b
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, a @ b)


def test_a_disabled_grad_scaler_changes_nothing():
    """A step through the CPU's scaler is the optimizer's own step, bit by bit."""
    results = []
    for scaled in (False, True):
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        loss = weight.square().sum()
        if scaled:
            scaler = grad_scaler(CPU)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_recorded_and_the_second_acts(number):
    """The first signal is a request; after it, and after the block, the old handlers are back."""
    seen = []
    outer = signal.signal(number, lambda *_: seen.append(1))
    try:
        with stop_on_request() as request:
            assert request.signal is None
            os.kill(os.getpid(), number)
            assert (request.signal, seen) == (number, [])
            os.kill(os.getpid(), number)
            assert seen == [1]
        with stop_on_request() as request:
            pass
        os.kill(os.getpid(), number)
        assert seen == [1, 1] and request.signal is None
    finally:
        signal.signal(number, outer)


def test_out_of_memory_names_the_flags():
    """The message for memory that ran out, on the host or a GPU, names the flags to lower."""
    failures = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB\nmore")]
    for failure in failures:
        with pytest.raises(UserError, match="--chunk-size.*--batch-size.*--image-size"), \
                explain_oom():
            raise failure


def test_a_failed_host_allocation_is_out_of_memory():
    """torch's error for an allocation that the host refuses is explained too."""
    with pytest.raises(UserError, match="out of memory"), explain_oom():
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(("flags", "expected"), [
    ("flags : fpu avx512f avx512_bf16 sse", torch.bfloat16), ("flags : amx_bf16", torch.bfloat16),
    ("flags : fpu avx2 avx512f", torch.float32), (None, torch.float32),
])
def test_a_cpu_computes_in_bfloat16_if_it_has_instructions(monkeypatch, flags, expected):
    """The CPU's own list of features decides, float32 without one; --precision overrides it."""
    def read(path, **_):
        if flags is None:
            raise FileNotFoundError(path)
        return flags

    monkeypatch.setattr(runtime.Path, "read_text", read)
    monkeypatch.setattr(runtime, "cpu_has_bfloat16", cpu_has_bfloat16.__wrapped__)
    assert compute_dtype(CPU) == expected
    for precision, dtype in PRECISIONS.items():
        assert compute_dtype(CPU, precision) == (dtype or expected)
    with autocast(CPU, expected):
        assert torch.is_autocast_enabled("cpu") == (expected == torch.bfloat16)


def test_tuned_malloc_changes_no_value():
    """It can be called at any time; results stay the same to the bit."""
    values = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    before = values @ values
    tune_malloc()
    assert torch.equal(values @ values, before)


def test_other_errors_are_not_changed():
    """A RuntimeError that is not about memory is raised as it is."""
    with pytest.raises(RuntimeError, match="shape"), explain_oom():
        torch.zeros(2).reshape(3)
