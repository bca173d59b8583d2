"""Device, precision, randomness, and what the machine asks of a run."""

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
    should_compile,
    stop_on_request,
    tune_malloc,
)

CPU = torch.device("cpu")


def draws(*key: int | str) -> list[float]:
    """What torch draws after seed_all(key)."""
    seed_all(*key)
    return torch.rand(4).tolist()


def test_draws_are_a_function_of_the_key():
    """The same key draws the same numbers whatever was drawn before; every other key others."""
    keys = [(0,), (1,), (0, 1), (1, 0), (0, 0), (0, 1, 2), ("0",), (0, "weights"), (-1,), (2**80,)]
    first = {key: draws(*key) for key in keys}
    random.Random(0).shuffle(keys)
    for key in keys:
        torch.rand(3)
        assert draws(*key) == first[key]
    assert len({tuple(numbers) for numbers in first.values()}) == len(keys)
    assert len({tuple(draws(0, 1, step)) for step in range(1000)}) == 1000


def test_cpu_is_always_there():
    """'cpu' is taken at its word; 'auto' finds a device that computes."""
    assert pick_device("cpu") == CPU
    assert torch.ones(2, device=pick_device("auto")).sum().item() == 2


@pytest.mark.parametrize("name", ["banana", "", "cuda:99", "meta", "hpu", "cpu:x"])
def test_devices_that_are_not_here_are_refused(name):
    """A name of no device, or of one that this machine lacks: the message names it and a cure."""
    with pytest.raises(UserError, match="try auto or cpu") as caught:
        pick_device(name)
    assert f"--device {name}" in str(caught.value)


def test_float32_is_left_alone():
    """In float32 autocast and loss scaling are there and do nothing."""
    assert compute_dtype(CPU, "float32") == torch.float32
    a, b = torch.rand(8, 8), torch.rand(8, 8)
    with autocast(CPU, torch.float32):
        assert not torch.is_autocast_enabled("cpu")
        mixed = a @ b
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, a @ b)


def test_grad_scaler_passes_everything_on():
    """Through the CPU's scaler a step is the optimizer's own, to the last bit."""
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
def test_the_first_signal_is_noted_and_the_second_acts(number):
    """One signal is a request; after it, and after the block, signals do what they did before."""
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
    """Where memory ends, on the host or a GPU, the message says what to lower."""
    failures = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 3 GiB\nmore")]
    for failure in failures:
        with pytest.raises(UserError, match="--chunk-size.*--batch-size.*--image-size"), \
                explain_oom():
            raise failure


def test_what_the_host_cannot_give_is_out_of_memory():
    """torch's own error for more memory than any machine has is one of them."""
    with pytest.raises(UserError, match="out of memory"), explain_oom():
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(("flags", "expected"), [
    ("flags : fpu avx512f avx512_bf16 sse", torch.bfloat16), ("flags : amx_bf16", torch.bfloat16),
    ("flags : fpu avx2 avx512f", torch.float32), (None, torch.float32),
])
def test_a_cpu_computes_in_bfloat16_where_it_has_it(monkeypatch, flags, expected):
    """The processor's own list decides, float32 without one; what the user says beats it."""
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


def test_compiling_is_for_long_runs_on_gpus():
    """Never on a CPU; on a GPU from some thousands of steps on."""
    gpu = torch.device("cuda")
    assert not should_compile(CPU, 10**9, False)
    assert not should_compile(gpu, 100, False) and should_compile(gpu, 10**5, False)


def test_kept_memory_changes_no_value():
    """The C library may be told at any time; what is computed stays the same to the bit."""
    values = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    before = values @ values
    tune_malloc()
    assert torch.equal(values @ values, before)


def test_other_mistakes_stay_our_own():
    """A bug that raises RuntimeError keeps its traceback."""
    with pytest.raises(RuntimeError, match="shape"), explain_oom():
        torch.zeros(2).reshape(3)
