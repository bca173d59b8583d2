"""The curves of a run for TensorBoard, where that package is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from src.utils.errors import UserError

if TYPE_CHECKING:  # src/cli.py imports this module, and --help does not need torch
    import torch


def check_tensorboard() -> None:
    """Raise UserError if the package is not installed; the message has the command."""
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package that is not installed: pip install "
                        "tensorboard, or train without it, with --no-tensorboard")


class TensorBoardLog:
    """An event file in `folder`, opened when the first epoch is added; x is the number of steps."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._writer = folder, None

    def add_epoch(self, line: dict, losses: torch.Tensor) -> None:
        """Add an epoch.

        Args:
            line: of the run's log.
            losses: of the steps of the epoch.
        """
        from torch.utils.tensorboard import SummaryWriter

        first = line["steps"] - len(losses) + 1
        if self._writer is None:
            # TensorBoard hides what an interrupted or an earlier run wrote for these steps.
            self._writer = SummaryWriter(str(self._folder), purge_step=first)
        for step, loss in enumerate(losses.tolist(), start=first):
            self._writer.add_scalar("loss/step", loss, step)
        values = {"loss/epoch": line["loss"], "training/lr": line["lr"],
                  "training/logit_scale": line["logit_scale"],
                  **{f"validation/{name}": value for name, value in line["metrics"].items()}}
        for name, value in values.items():
            self._writer.add_scalar(name, value, line["steps"])
        self._writer.flush()
