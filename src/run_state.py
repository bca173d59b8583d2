"""What a run needs to go on as if it had never stopped: written, read back, held against flags."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from src.checkpoint import load_newest_checkpoint, rotate_checkpoint, save_checkpoint
from src.cli import Results
from src.engine import Progress
from src.errors import UserError
from src.model import DualEncoder
from src.tensor_file import load_tensors
from src.tokenizer import Tokenizer

# What a resumed run may be given anew: where things are and what the machine can bear …
PLACES = ("data_dir", "images", "annotations", "cache_dir", "results_dir", "device", "save_every",
          "resume", "strict")
# … how long it goes on, and what may mend a run in trouble. These are told, all others refused.
CHANGEABLE = ("epochs", "lr", "image_encoder_lr", "weight_decay", "chunk_size", "compile")


class RunState:
    """The parts of a run that its checkpoints hold, together.

    Attributes:
        log: a dict of plain values for each finished epoch.
        progress: of the epoch that is being trained, if one has begun.
    """

    def __init__(
        self, model: DualEncoder, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler, flags: dict[str, Any], data: dict[str, str],
        ema_decay: float = 0.0,
    ) -> None:
        """A run at its start.

        Args:
            flags: what it was told, as plain values.
            data: what it trains and validates on, as digests.
            ema_decay: what a step keeps of the moving average of the weights once there are many
                steps, 0 for no average.
        """
        self.model, self.tokenizer = model, tokenizer
        self.optimizer, self.scaler = optimizer, scaler
        self.flags, self.data = flags, data
        self.log: list[dict] = []
        self.progress: Progress | None = None
        self._ema_decay = ema_decay
        self._average = AveragedModel(
            model, multi_avg_fn=self._average_with, use_buffers=True,
        ) if ema_decay else None

    @property
    def evaluated(self) -> DualEncoder:
        """The model to evaluate and keep: with the weights' moving average, if there is one."""
        return self._average.module if self._average else self.model

    def advance(self, progress: Progress) -> None:
        """Note a step that was done, and take its weights into their average."""
        self.progress = progress
        if self._average:
            self._average.update_parameters(self.model)

    def _average_with(
        self, averages: list[torch.Tensor], weights: list[torch.Tensor], n_averaged: torch.Tensor
    ) -> None:
        # While there are few steps the average forgets sooner, or the random start would weigh for
        # hundreds of steps: Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth
        # Optimization", ICML 2013, with eta 3, where a step weighs about as its number cubed.
        kept = min(self._ema_decay, (self.steps - 1) / (self.steps + 3))
        get_ema_multi_avg_fn(kept)(averages, weights, n_averaged)

    @property
    def steps(self) -> int:
        """Steps done since the run began."""
        finished = self.log[-1]["steps"] if self.log else 0
        return finished + (self.progress.step if self.progress else 0)

    def finish_epoch(self, metrics: dict[str, float], validation_seconds: float) -> bool:
        """Enter the epoch in progress into the log; returns whether its rsum is the best so far."""
        best_before = max((line["metrics"]["rsum"] for line in self.log), default=-1.0)
        trained, times = self.progress.summary()
        self.log.append({
            "epoch": len(self.log) + 1, "steps": self.steps, **trained,
            "logit_scale": self.model.logit_scale.item(), "metrics": metrics,
            "time": {**times, "validation_seconds": validation_seconds},
        })
        self.progress = None
        return metrics["rsum"] > best_before

    def save(self, results: Results) -> None:
        """Write the newest checkpoint; the one before it is kept beside it.

        Raises:
            UserError: the weights are no longer finite, or the file cannot be written; what was
                saved before is intact.
        """
        rotate_checkpoint(
            results.last, results.previous, self.model, self.tokenizer, **self._content(),
            log=self.log, progress=asdict(self.progress) if self.progress else None,
            data=self.data, optimizer_state=self.optimizer.state_dict(),
            scaler_state=self.scaler.state_dict(),
            average_state=self._average.state_dict() if self._average else {},
        )

    def save_best(self, results: Results) -> None:
        """Write the best checkpoint; the first of a new run puts an earlier run's aside.

        Raises UserError as `save`.
        """
        content = self._content()
        if len(self.log) == 1 and results.best.exists() and not _is_of(results.best, content):
            results.best.replace(results.earlier)
        save_checkpoint(results.best, self.evaluated, self.tokenizer, **content)

    def _content(self) -> dict[str, Any]:
        weights = [p.isfinite().all() for p in self.model.parameters()]
        if not torch.stack(weights).all():
            raise UserError(
                f"the weights are no longer finite after step {self.steps}, so they are not saved. "
                "The last good checkpoint is kept: go on from it with --resume and a smaller --lr")
        metrics = self.log[-1]["metrics"] if self.log else {}
        return {"epoch": len(self.log), "metrics": metrics, "args": self.flags}

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Take the state of a checkpoint written by `save`; the model has its weights already.

        The optimiser gets its moments back, and keeps the rate and decay that it was given.

        Raises:
            UserError: the captions, the photos or the vocabulary are not those of the checkpoint.
        """
        if content["data"] != self.data or content["vocab"] != self.tokenizer.vocab:
            changed = [name for name, digest in self.data.items()
                       if content["data"].get(name) != digest]
            raise UserError(
                f"the {' and '.join(changed) or 'words of the'} photos or captions are not those "
                f"that {path} was trained with: bring the earlier data back, or start anew with "
                "another --results-dir")
        own_groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**content["optimizer_state"], "param_groups": own_groups})
        if content["scaler_state"]:  # none was needed where it was saved
            self.scaler.load_state_dict(content["scaler_state"])
        if self._average and content.get("average_state"):  # earlier versions kept none
            self._average.load_state_dict(content["average_state"])
        self.log = content["log"]
        self.progress = Progress(**content["progress"]) if content["progress"] else None


def _is_of(best: Path, content: dict[str, Any]) -> bool:
    """Whether a best checkpoint is of this very epoch: a run was killed just after writing it."""
    try:
        earlier = load_tensors(best)
    except UserError:
        return False
    return all(earlier.get(part) == content[part] for part in ("epoch", "metrics"))


def load_run(results: Results) -> tuple[DualEncoder, Tokenizer, dict[str, Any]]:
    """The run that was left in `results`: its model, tokenizer and newest whole checkpoint.

    Raises:
        UserError: there is none.
    """
    if not results.last.exists() and not results.previous.exists():
        raise UserError(f"--resume needs {results.last}, and there is none: start without --resume")
    loaded = load_newest_checkpoint(results.last, results.previous)
    if "optimizer_state" not in loaded[2]:
        raise UserError(f"{results.last} holds no run to go on with, only a model: start without "
                        "--resume")
    return loaded


def compare_flags(flags: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Say which flags a resumed run changes.

    Raises:
        UserError: one of them would make it another run.
    """
    # What a run of an earlier version does not name, it did not have.
    changed = {name: f"--{name.replace('_', '-')} was {earlier.get(name)}, is {value}"
               for name, value in flags.items()
               if name not in PLACES and value != earlier.get(name, value)}
    refused = [text for name, text in changed.items() if name not in CHANGEABLE]
    if refused:
        raise UserError(f"--resume goes on with another run: {'; '.join(refused)}. Leave that out, "
                        "or start anew with another --results-dir")
    for text in changed.values():
        print(f"note: {text}", file=sys.stderr)
