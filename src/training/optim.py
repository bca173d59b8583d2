"""AdamW's parameter groups, the learning rate over a run, and the moving average of the weights."""

from __future__ import annotations

import math
from copy import deepcopy

import torch

from src.models.dual_encoder import DualEncoder


def build_optimizer(
    model: DualEncoder, lr: float, weight_decay: float, image_encoder_lr: float | None = None,
    text_encoder_lr: float | None = None,
) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019).

    Only tensors of two or more dimensions decay: decay of biases, BatchNorm's scales and
    logit_scale does not regularize.

    Args:
        model: whose parameters are optimized.
        lr: learning rate of all parameters that have no other one.
        weight_decay: of the tensors that decay.
        image_encoder_lr: learning rate of the image encoder, which is usually pretrained; None
            for `lr`.
        text_encoder_lr: the same of a BERT; a bag of words is trained with `lr`.

    Returns:
        The optimizer; on a GPU one kernel updates many tensors (`fused`).
    """
    groups = []
    encoders = {model.image_encoder: image_encoder_lr or lr}
    if model.config.text_encoder == "bert":
        encoders[model.text_encoder] = text_encoder_lr or lr
    of_encoders = {id(p) for encoder in encoders for p in encoder.parameters()}
    heads = [p for p in model.parameters() if id(p) not in of_encoders]
    for own, rate in ((heads, lr), *((list(encoder.parameters()), rate)
                                     for encoder, rate in encoders.items())):
        groups += [
            {"params": [p for p in own if p.ndim >= 2], "lr": rate, "weight_decay": weight_decay},
            {"params": [p for p in own if p.ndim < 2], "lr": rate, "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=lr, fused=model.logit_scale.is_cuda)


def build_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, schedule: str,
    done_steps: int = 0, restart_at: int = 0,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule of linear warm-up, then a constant rate or a cosine down to zero.

    The rate is a function of the optimizer's lr and the number of the step, so a resumed run needs
    no saved state and can have another lr.

    Args:
        optimizer: with the peak learning rate in each parameter group.
        warmup_steps: steps of linear warm-up.
        total_steps: of the run; a cosine reaches zero there.
        schedule: 'constant' or 'cosine'.
        done_steps: steps before the run was resumed.
        restart_at: the step at which the schedule, warm-up included, starts a second time, for
            a run of two phases.
    """

    def factor(step: int) -> float:
        start, end = (0, restart_at) if step < restart_at else (restart_at, total_steps)
        done, phase_steps = step - start, end - start
        if done < warmup_steps:
            return (done + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        fraction = (done - warmup_steps) / max(1, phase_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # LambdaLR requires it when it does not start at 0
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor, last_epoch=done_steps - 1)


class MovingAverage:
    """Exponential moving average of a model's weights and BatchNorm statistics.

    In the first steps the decay is smaller, or the random start would count for hundreds of steps:
    polynomial averaging with eta = 3 of Shamir and Zhang, "Stochastic Gradient Descent for
    Non-smooth Optimization", ICML 2013.

    Attributes:
        model: a copy of the model with the averaged weights.
    """

    def __init__(self, model: DualEncoder, decay: float) -> None:
        """Start with a copy of `model`, whose weights each `update` reads."""
        self.decay = decay
        self.model = deepcopy(model).requires_grad_(False)
        pairs = zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        floats, integers = [], []
        for own, current in pairs:
            (floats if own.is_floating_point() else integers).append((own, current))
        self._averages, self._weights = map(list, zip(*floats, strict=True))
        self._counts, self._current_counts = map(list, zip(*integers, strict=True))

    def update(self, step: int) -> None:
        """Include the weights after step `step` of the run, from 1; the host does not wait."""
        decay = min(self.decay, (step - 1) / (step + 3))
        # One kernel for many tensors: a loop would launch one for each of 400 tensors.
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)

    def copy_counts(self) -> None:
        """Copy BatchNorm's integer counts, which have no average, before evaluating or saving."""
        torch._foreach_copy_(self._counts, self._current_counts)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load the averaged weights; torch's AveragedModel, used earlier, has other names."""
        self.model.load_state_dict({name.removeprefix("module."): value
                                    for name, value in state.items() if name != "n_averaged"})
