"""Device, precision and randomness."""

from __future__ import annotations

import random

import pytest
import torch

from src.errors import UserError
from src.runtime import autocast, compute_dtype, grad_scaler, pick_device, seed_all

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


def test_the_cpu_computes_in_float32():
    """On the CPU autocast and loss scaling are there and do nothing."""
    assert compute_dtype(CPU) == torch.float32
    a, b = torch.rand(8, 8), torch.rand(8, 8)
    with autocast(CPU):
        assert not torch.is_autocast_enabled("cpu")
        mixed = a @ b
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, a @ b)


def test_grad_scaler_passes_everything_on():
    """Through the CPU's scaler a step is the optimiser's own, to the last bit."""
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
