"""Several processes as one run: torchrun starts them, each takes its share of every batch.

    torchrun --nproc-per-node 2 train.py …

One process alone runs the same code: a world of one, in which nothing is sent. Every process knows
the whole batch's photos and captions by number, so how much each will send needs no asking.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from src.utils.errors import UserError


def init_distributed() -> None:
    """Join the other processes, if torchrun has started this one; nothing otherwise.

    Process 0 alone speaks on standard output from then on.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def destroy_distributed() -> None:
    """Leave the group, so that the others need not find out by themselves."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0. Process 0 alone writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def split_evenly(count: int) -> list[range]:
    """0 … count - 1 cut into one range a process; their lengths differ by at most one."""
    world = world_size()
    return [range(count * i // world, count * (i + 1) // world) for i in range(world)]


class _Gather(torch.autograd.Function):
    """All processes' rows, one after another; as long as each computes the same loss of them."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:  # noqa: ANN001
        ctx.start, ctx.length = sum(sizes[: rank()]), len(rows)
        # Padded to equal lengths, which is all that gloo can gather.
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        _exchange(dist.all_gather, parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN001
        # Every process has the whole loss, so what the others would send for these rows equals
        # what stands here: their sum is a product, and nothing has to be sent.
        return gradient[ctx.start : ctx.start + ctx.length] * world_size(), None


def all_gather_with_grad(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Rows of all processes, with their gradient: (sizes[rank], …) -> (sum of sizes, …).

    Args:
        rows: this process's.
        sizes: how many rows each process brings; the same list everywhere.
    """
    return rows if len(sizes) == 1 else _Gather.apply(rows.contiguous(), sizes)


def average_gradients(model: nn.Module) -> None:
    """Replace each gradient, and each running statistic, by its mean over the processes.

    With `all_gather_with_grad` this gives every process the gradient of the whole batch's loss: a gathered
    row brings `world_size` times its gradient, a parameter of the loss itself its whole one from
    every process, and the mean makes both right. BatchNorm's statistics, which each process takes
    of its own share, stay the same everywhere, so any process can evaluate, and save for all.
    """
    if world_size() > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        # Statistics in float64: equal ones, of a frozen encoder, are then their own mean exactly.
        for tensors, dtype in ((gradients, torch.float32), (statistics, torch.float64)):
            if not tensors:
                continue
            flat = torch.cat([tensor.flatten().to(dtype) for tensor in tensors])  # one message
            _exchange(dist.all_reduce, flat)
            flat /= world_size()
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """The model with BatchNorm over the whole batch, where several GPUs hold it between them.

    Elsewhere, as it is: torch synchronizes statistics on GPUs alone.
    """
    if world_size() > 1 and next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def check_batch_size(batch_size: int, chunk_size: int | None, device: torch.device) -> None:
    """Raise UserError if a batch of `batch_size` images cannot be divided over the ranks."""
    n_ranks = world_size()
    if batch_size < n_ranks:
        raise UserError(f"a batch of {batch_size} images leaves some of {n_ranks} processes "
                        "without one: choose a larger --batch-size or fewer processes")
    if chunk_size and device.type == "cuda" and batch_size % n_ranks:
        # The ranks would have different numbers of chunks, and SyncBatchNorm would wait forever.
        raise UserError(f"with --chunk-size a batch of {batch_size} images must be divisible by "
                        f"{n_ranks} processes: choose another --batch-size")


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds in any process: the same answer everywhere."""
    if world_size() == 1:
        return flag
    seen = torch.tensor(int(flag))
    _exchange(dist.all_reduce, seen, dist.ReduceOp.MAX)
    return bool(seen)


def barrier() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        any_rank(False)


def broadcast_object(value: Any) -> Any:
    """What process 0 calls this with, in every process; the others wait for it."""
    box = [value]
    if world_size() > 1:
        _exchange(dist.broadcast_object_list, box, 0)
    return box[0]


def all_gather_object(value: Any) -> list:
    """What each process calls this with, in the order of their numbers."""
    found = [value] * world_size()
    if world_size() > 1:
        _exchange(dist.all_gather_object, found, value)
    return found


def _exchange(collective: Callable, *args: Any) -> None:
    """Call a collective; where another process has ended meanwhile, end too, without traceback.

    It has said why, or torchrun says it for one that was killed.

    Raises:
        UserError: in process 0, which speaks for all.
    """
    try:
        collective(*args)
    except RuntimeError as error:
        first = rank() == 0
        destroy_distributed()
        if not first:
            sys.exit(1)
        raise UserError("another process of this run has ended before its work was done; start it "
                        "again", status=1) from error
