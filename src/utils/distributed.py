"""Several processes as one run: torchrun starts them, and each takes its part of every batch.

    torchrun --nproc-per-node 2 train.py ...

A single process runs the same code with a world size of 1 and communicates nothing. Every rank
knows the images and captions of the whole batch, so the sizes to gather need no communication.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from src.utils.errors import UserError, print_message


def init_distributed() -> None:
    """Join the process group if torchrun has started this process; do nothing otherwise.

    From then on only rank 0 prints on standard output.

    Raises:
        UserError: only a part of torchrun's environment variables is set, or the processes cannot
            connect to each other.
    """
    if "RANK" in os.environ and not dist.is_initialized():
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
                   if name not in os.environ]
        if missing:
            raise UserError(f"the environment has RANK but no {', '.join(missing)}: start several "
                            "processes with torchrun, or unset RANK")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, own_rank, n_ranks = next(dist.rendezvous("env://"))
            # torchrun keeps its store over restarts, with the addresses of processes that have
            # ended. The count is the same for all processes of one machine only.
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                store = dist.PrefixStore(f"restart {restarts}", store)
            dist.init_process_group(backend, store=store, rank=own_rank, world_size=n_ranks)
        except RuntimeError as error:
            raise UserError(
                "the processes of this run cannot connect to each other ("
                f"{str(error).partition(chr(10))[0]}); restarts of torchrun on several machines "
                "need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment", status=1) from error
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)


def destroy_distributed() -> None:
    """Leave the process group, whose threads can abort Python at its end.

    One of them may still free its last tensors then, so `run_script` does not let Python end.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Be in the process group while the block runs; a UserError of several ranks is printed once.
    """
    init_distributed()
    try:
        yield
    except UserError as error:
        if world_size() > 1:
            # The ranks usually meet the same error. The first one prints it, and does so before it
            # leaves the group: torchrun kills the others when a rank ends.
            if _count_error(str(error)) == 1:
                print_message(f"error: {error}")
            sys.exit(error.status)
        raise
    finally:
        destroy_distributed()


def _count_error(message: str) -> int:
    """Return how many ranks, this one included, have had this error so far."""
    try:
        return dist.distributed_c10d._get_default_store().add(f"error: {message}", 1)
    except RuntimeError:  # the process that holds the store has ended
        return 1


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0. Only rank 0 writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def split_evenly(count: int) -> list[range]:
    """Split range(count) into one range per rank; their lengths differ by at most 1."""
    n_ranks = world_size()
    return [range(count * i // n_ranks, count * (i + 1) // n_ranks) for i in range(n_ranks)]


class _Gather(torch.autograd.Function):
    """Concatenate the rows of all ranks; every rank must compute the same loss of the result."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:  # noqa: ANN001
        ctx.start, ctx.length = sum(sizes[: rank()]), len(rows)
        # Padded, because all_gather needs tensors of equal shapes.
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        _communicate(dist.all_gather, parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN001
        # The sum over the ranks of the gradients of these rows. Every rank has the whole loss and
        # so the same gradient: the sum is a product, and nothing is communicated.
        return gradient[ctx.start : ctx.start + ctx.length] * world_size(), None


def all_gather_with_grad(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Gather the rows of all ranks, with their gradient: (sizes[rank], ...) -> (sum(sizes), ...).

    Args:
        rows: of this rank.
        sizes: number of rows of each rank.
    """
    return rows if len(sizes) == 1 else _Gather.apply(rows.contiguous(), sizes)


def average_gradients(model: nn.Module) -> None:
    """Replace each gradient and each running statistic by its mean over the ranks.

    Together with `all_gather_with_grad` the gradients are those of the whole batch's loss: a
    gathered row has `world_size` times its gradient, a parameter of the loss has its whole gradient
    on every rank, and the mean is right for both. BatchNorm normalizes over a rank's part of the
    batch; the mean keeps its running statistics equal on all ranks. (SyncBatchNorm would make the
    host wait for the GPU three times per layer.)
    """
    if world_size() == 1:
        return
    parameters = [p for p in model.parameters() if p.grad is not None]
    # Only layers that this step has updated: the statistics of the others are equal already.
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)
              and layer.training and layer.weight.grad is not None]
    statistics = [each for layer in layers for each in (layer.running_mean, layer.running_var)]
    sources = [*(p.grad for p in parameters), *statistics]
    if not sources:
        return
    # One message, and few kernels: the tensors are copied into views of one buffer together.
    flat = torch.empty(sum(source.numel() for source in sources), device=sources[0].device)
    parts = flat.split([source.numel() for source in sources])
    views = [part.as_strided(source.shape, source.stride())
             for part, source in zip(parts, sources, strict=True)]
    torch._foreach_copy_(views, sources)
    _communicate(dist.all_reduce, flat)
    flat /= world_size()
    for parameter, view in zip(parameters, views, strict=False):
        parameter.grad = view
    if statistics:
        torch._foreach_copy_(statistics, views[len(parameters):])


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on any rank; the same result on every rank."""
    if world_size() == 1:
        return flag
    result = torch.tensor(int(flag))
    _communicate(dist.all_reduce, result, dist.ReduceOp.MAX)
    return bool(result)


def barrier() -> None:
    """Wait until every rank has called this."""
    any_rank(False)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's `value` on every rank; the others wait for it."""
    values = [value]
    if world_size() > 1:
        _communicate(dist.broadcast_object_list, values, 0)
    return values[0]


def all_gather_object(value: Any) -> list:
    """Return the `value` of each rank, in the order of the ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        _communicate(dist.all_gather_object, values, value)
    return values


def _communicate(collective: Callable, *args: Any) -> None:
    """Call a collective; if another rank has ended, end this process too, without a traceback.

    That rank has printed its error, or torchrun reports that it was killed.

    Raises:
        UserError: on rank 0.
    """
    try:
        collective(*args)
    except RuntimeError as error:
        is_main = rank() == 0
        destroy_distributed()
        if not is_main:
            sys.exit(1)
        raise UserError("another process of this run has ended before its work was done; start "
                        "the run again", status=1) from error
