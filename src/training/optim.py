"""AdamW's parameter groups, and the learning rate over the steps of a run."""

from __future__ import annotations

import math

import torch

from src.models.dual_encoder import DualEncoder


def build_optimizer(
    model: DualEncoder, lr: float, weight_decay: float, image_encoder_lr: float | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) that decays matrices only.

    Biases, BatchNorm's scales and logit_scale have fewer than two dimensions: pulling those to
    zero regularizes nothing.

    Args:
        lr: of everything, or of all but the image encoder.
        image_encoder_lr: of the image encoder, which may come with weights worth keeping; None for
            `lr`.
    """
    groups = []
    of_images = {id(p) for p in model.image_encoder.parameters()}
    for is_image, rate in ((False, lr), (True, image_encoder_lr or lr)):
        own = [p for p in model.parameters() if (id(p) in of_images) == is_image]
        groups += [
            {"params": [p for p in own if p.ndim >= 2], "lr": rate, "weight_decay": weight_decay},
            {"params": [p for p in own if p.ndim < 2], "lr": rate, "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=lr)


def build_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, schedule: str,
    done_steps: int = 0, restart_at: int = 0,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup_steps`, then 'constant', or 'cosine' to zero at `total_steps`.

    A function of the optimizer's own rate and the step: a run that goes on after `done_steps`
    needs no saved state, and takes a new --lr at its word. A run of two phases has the whole
    schedule in each: it begins anew at step `restart_at`.
    """

    def factor(step: int) -> float:
        start, end = (0, restart_at) if step < restart_at else (restart_at, total_steps)
        done, phase_steps = step - start, end - start
        if done < warmup_steps:
            return (done + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        share = (done - warmup_steps) / max(1, phase_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # LambdaLR asks for it where it does not start at 0
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=done_steps - 1)
