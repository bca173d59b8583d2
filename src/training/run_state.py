"""A training run's state: saved after steps and epochs, restored bit by bit by --resume."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from src.data.dataset import Flickr30kDataset
from src.models.checkpoint import (
    Checkpoint,
    load_newest_checkpoint,
    rotate_checkpoint,
    save_checkpoint,
)
from src.models.dual_encoder import DualEncoder
from src.models.tokenizer import Tokenizer
from src.training.engine import Progress
from src.training.optim import MovingAverage
from src.training.tensorboard import TensorBoardLog
from src.utils.distributed import any_rank, rank, world_size
from src.utils.errors import UserError, print_message
from src.utils.files import write_atomic
from src.utils.paths import ResultPaths
from src.utils.plots import plot_curves
from src.utils.runtime import StopRequest
from src.utils.tensors import load_tensors

# Flags that a resumed run may change without a note: they do not change what is computed.
UNCOMPARED = ("data_dir", "images", "annotations", "cache_dir", "results_dir", "device",
              "save_every", "resume", "strict", "tensorboard")
# Flags that it may change with a note: the run's length, and what can stop it diverging.
CHANGEABLE = ("epochs", "lr", "image_encoder_lr", "text_encoder_lr", "weight_decay", "chunk_size",
              "compile", "cuda_graph")
# Flags and recipes of earlier versions -> their names today.
RENAMED_FLAGS = {"mirror_mean": "flip_tta"}
RENAMED_RECIPES = {"seed": "baseline"}


class RunState:
    """The objects that a checkpoint of a run saves together.

    Attributes:
        log: a dict of plain values for each finished epoch, as in log.jsonl.
        progress: of the epoch that is being trained, None between epochs.
        stopped: whether the run was asked to stop, and has been saved.
    """

    def __init__(
        self, model: DualEncoder, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler, *, results: ResultPaths, flags: dict[str, Any],
        data: dict[str, str], ema_decay: float = 0.0, save_minutes: float = 10.0,
        stop_request: StopRequest | None = None, tensorboard: bool = False,
    ) -> None:
        """Start a run.

        Args:
            model, tokenizer, optimizer, scaler: as they are trained.
            results: where the run is saved.
            flags: the command line as plain values.
            data: see `data_digests`.
            ema_decay: decay of an exponential moving average of the weights, 0 for none.
            save_minutes: how often to save within an epoch.
            stop_request: set by a signal that asks the run to stop.
            tensorboard: also write the log for TensorBoard.
        """
        self.model, self.tokenizer = model, tokenizer
        self.optimizer, self.scaler = optimizer, scaler
        self.results, self.flags, self.data = results, flags, data
        self.log: list[dict] = []
        self.progress: Progress | None = None
        self.stopped = False
        self._save_seconds, self._saved = 60 * save_minutes, time.monotonic()
        self._stop_request = stop_request or StopRequest()
        self._average = MovingAverage(model, ema_decay) if ema_decay else None
        write_events = tensorboard and rank() == 0
        self._tensorboard = TensorBoardLog(results.folder / "tensorboard") if write_events else None

    @property
    def eval_model(self) -> DualEncoder:
        """The model to evaluate and keep: the average of the weights, if there is one."""
        if not self._average:
            return self.model
        self._average.copy_counts()
        return self._average.model

    @property
    def steps(self) -> int:
        """Steps since the run began."""
        finished = self.log[-1]["steps"] if self.log else 0
        return finished + (self.progress.step if self.progress else 0)

    def start(self, resumed: Checkpoint | None) -> None:
        """Restore a resumed run, or prepare the results folder for a new one.

        Raises:
            UserError: see `restore`.
        """
        if resumed:
            self.restore(resumed.content, self.results.last)
            step = f" and {self.progress.step} steps" if self.progress else ""
            print(f"resumed after epoch {len(self.log)}{step}")
            if len(self.log) >= self.flags["epochs"]:
                print(f"it has all of its {self.flags['epochs']} epochs; train longer with "
                      f"--resume --epochs {len(self.log) + 5}")
        if rank() == 0:
            if not resumed:
                self.results.archive_last_run()
                if self.results.best.exists():
                    print("the best checkpoint of the run before is kept as "
                          f"{self.results.earlier.name}")
            write_atomic(self.results.folder / "args.json",
                         json.dumps(self.flags, indent=2).encode())

    def after_step(self, progress: Progress) -> bool:
        """Update the average of the weights; save if it is time or the run is asked to stop.

        Returns:
            Whether the run is asked to stop; the same on every rank.
        """
        self.progress = progress
        if self._average:
            self._average.update(self.steps)
        self.stopped = any_rank(self._stop_request.signal is not None)
        if self.stopped or time.monotonic() - self._saved > self._save_seconds:
            self.save()
        return self.stopped

    def finish_epoch(self, metrics: dict[str, float], validation_seconds: float) -> bool:
        """Add the epoch to the log, and write log.jsonl, curves.png and the last checkpoint.

        The epoch with the highest rsum so far is also written as the best checkpoint.

        Returns:
            Whether the epoch is the best so far.
        """
        best_before = max((line["metrics"].get("rsum", -1.0) for line in self.log), default=-1.0)
        is_best = not metrics or metrics["rsum"] > best_before  # without validation: the last
        progress = self.progress
        seconds = max(progress.seconds, 1e-9)
        self.log.append({
            "epoch": len(self.log) + 1, "steps": self.steps, "lr": progress.lr,
            "loss": progress.mean_loss(), "logit_scale": self.model.logit_scale.item(),
            "metrics": metrics,
            "time": {"seconds": progress.seconds, "pairs_per_second": progress.pairs / seconds,
                     "wait_share": progress.wait_seconds / seconds,
                     "validation_seconds": validation_seconds},
        })
        if self._tensorboard:
            self._tensorboard.add_epoch(self.log[-1], progress.losses[: progress.step])
        self.progress = None
        if rank() == 0:
            if is_best:
                self._save_best()
            write_atomic(self.results.folder / "log.jsonl",
                         "".join(json.dumps(line) + "\n" for line in self.log).encode())
            plot_curves(self.results.folder / "curves.png", self.log)
        self.save()  # last: a run that is killed before this line repeats the writes above
        return is_best

    def save(self) -> None:
        """Write the last checkpoint on rank 0; the one before it is kept as `results.previous`.

        Raises:
            UserError: the weights are not finite, or the file cannot be written; the earlier files
                are intact.
        """
        if rank() == 0:
            self._check_finite_weights()
            # The epoch's losses may be on a GPU; a checkpoint loads on any machine.
            progress = asdict(self.progress) if self.progress else None
            if progress:
                progress["losses"] = progress["losses"].cpu()
            rotate_checkpoint(
                self.results.last, self.results.previous, self.model, self.tokenizer,
                **self._summary(), log=self.log, progress=progress, data=self.data,
                n_ranks=world_size(),
                optimizer_state=self.optimizer.state_dict(),
                scaler_state=self.scaler.state_dict(),
                average_state=self.eval_model.state_dict() if self._average else {},
            )
        self._saved = time.monotonic()

    def report_stop(self, command: str) -> int:
        """Print that the run was stopped, and the command that continues it.

        Returns:
            The exit status of a process that the signal ended.
        """
        if rank() == 0:
            print_message(f"stopped after step {self.progress.step} of epoch {len(self.log) + 1}, "
                          f"and saved; continue with\n    {command}")
        return 128 + (self._stop_request.signal or Signals.SIGTERM)  # another rank got the signal

    def _save_best(self) -> None:
        """Write the best checkpoint; the first of a new run renames that of an earlier run."""
        self._check_finite_weights()
        summary, best = self._summary(), self.results.best
        if len(self.log) == 1 and best.exists() and not _is_same_epoch(best, summary):
            best.replace(self.results.earlier)
        save_checkpoint(best, self.eval_model, self.tokenizer, **summary)

    def _summary(self) -> dict[str, Any]:
        """Return the plain values that both checkpoints hold."""
        metrics = self.log[-1]["metrics"] if self.log else {}
        return {"epoch": len(self.log), "metrics": metrics, "args": self.flags}

    def _check_finite_weights(self) -> None:
        """Raise UserError if a weight is not finite: it would replace a good checkpoint."""
        finite = [parameter.isfinite().all() for parameter in self.model.parameters()]
        if not torch.stack(finite).all():
            raise UserError(
                f"the weights are no longer finite after step {self.steps}, so they are not saved. "
                "The last good checkpoint is kept: continue from it with --resume and a smaller "
                "--lr")

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Restore the state that `save` wrote; the model has its weights already.

        The optimizer's moments are restored; its learning rates and weight decay stay as given.

        Args:
            content: of the checkpoint.
            path: of the checkpoint, for messages.

        Raises:
            UserError: the captions, the images or the vocabulary are not those of the checkpoint.
        """
        # A digest that an earlier version did not save is not a change.
        changed = [name for name, digest in self.data.items()
                   if content["data"].get(name, digest) != digest]
        pixels = [name for name in changed if name.endswith("pixels")]
        others = [name for name in changed if name not in pixels]
        if others or content["vocab"] != self.tokenizer.vocab:
            raise UserError(
                f"the {' and '.join(others) or 'words of the'} images or captions are not those "
                f"that {path} was trained with: restore the earlier data, or start a new run with "
                "another --results-dir")
        if pixels:  # not an error: other versions of an image decoder differ in the last bit
            _note(f"the {' and '.join(pixels)} have changed since the run was saved: image files "
                  "were replaced, or are decoded by another version of Pillow")
        if content.get("n_ranks", world_size()) != world_size():
            _note(f"the run had {content['n_ranks']} processes, has {world_size()}: BatchNorm "
                  "normalizes over other parts of a batch, so the result is not that of an "
                  "uninterrupted run")
        own_groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**content["optimizer_state"], "param_groups": own_groups})
        if content["scaler_state"]:  # empty where no scaler was needed
            self.scaler.load_state_dict(content["scaler_state"])
        if self._average and content.get("average_state"):
            self._average.load_state_dict(content["average_state"])
        self.log = content["log"]
        self.progress = _restore_progress(content["progress"])


def _restore_progress(saved: dict[str, Any] | None) -> Progress | None:
    if saved is None:
        return None
    if "loss_sum" in saved:  # versions that kept the sum of the losses instead of each
        saved = dict(saved)
        mean, step = saved.pop("loss_sum").item() / max(1, saved["step"]), saved["step"]
        return Progress(torch.full((step,), mean), saved["lr"], step, saved["pairs"],
                        saved["seconds"], saved["waited"])
    return Progress(**saved)


def _is_same_epoch(best: Path, summary: dict[str, Any]) -> bool:
    """Return whether a best checkpoint is of this epoch: the run was killed after writing it."""
    try:
        earlier = load_tensors(best)
    except UserError:
        return False
    return all(earlier.get(part) == summary[part] for part in ("epoch", "metrics"))


def data_digests(**splits: Flickr30kDataset) -> dict[str, str]:
    """Return the digests of a run's data, as `RunState` saves and compares them."""
    return {name: digest for split, dataset in splits.items()
            for name, digest in ((split, dataset.digest()),
                                 (f"{split} pixels", dataset.pixel_digest()))}


def has_run(results: ResultPaths) -> bool:
    """Return whether there is a checkpoint that --resume could continue."""
    return results.last.exists() or results.previous.exists()


def check_no_unfinished_run(results: ResultPaths, flags: dict[str, Any]) -> None:
    """Check that a new run with `flags` does not replace the same run, interrupted earlier.

    Raises:
        UserError: it does; the message says how to continue it.
    """
    if not has_run(results):
        return
    try:
        content = load_run(results).content
    except UserError:
        return  # it cannot be continued
    earlier = rename_flags(content["args"])
    same = all(value == earlier.get(name, value) for name, value in flags.items()
               if name not in UNCOMPARED)
    if same and len(content["log"]) < flags["epochs"]:
        raise UserError(
            f"{results.folder} has an unfinished run with these flags, {len(content['log'])} of "
            f"{flags['epochs']} epochs: continue it with --resume, or start a new one with another "
            "--results-dir (--resume auto continues a run where there is one and starts one where "
            "there is none)")


def load_run(results: ResultPaths) -> Checkpoint:
    """Load the newest intact checkpoint of the run in `results`.

    Raises:
        UserError: there is none.
    """
    if not has_run(results):
        raise UserError(f"--resume needs {results.last}, which does not exist: start without "
                        "--resume, or with --resume auto")
    loaded = load_newest_checkpoint(results.last, results.previous)
    if "optimizer_state" not in loaded.content:
        raise UserError(f"{results.last} holds a model, but no run to continue: start without "
                        "--resume")
    return loaded


def rename_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags of a run with the names that they have in this version."""
    renamed = {RENAMED_FLAGS.get(name, name): value for name, value in flags.items()}
    recipe = renamed.get("recipe")
    return {**renamed, "recipe": RENAMED_RECIPES.get(recipe, recipe)}


def compare_flags(flags: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Print which flags a resumed run changes.

    Raises:
        UserError: a flag that would make it another run.
    """
    # A flag that an earlier version did not have is not a change.
    changed = {name: f"--{name.replace('_', '-')} was {earlier.get(name)}, is {value}"
               for name, value in flags.items()
               if name not in UNCOMPARED and value != earlier.get(name, value)}
    refused = [text for name, text in changed.items() if name not in CHANGEABLE]
    if refused:
        raise UserError(f"--resume continues a run with other flags: {'; '.join(refused)}. Leave "
                        "that out, or start a new run with another --results-dir")
    for text in changed.values():
        _note(text)


def _note(text: str) -> None:
    if rank() == 0:
        print_message(f"note: {text}")
