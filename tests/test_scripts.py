"""The scripts from end to end, on tiny data; evaluate.py and search.py also in test_search.py."""

from __future__ import annotations

import errno
import itertools
import json
import os
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import evaluate
import main as main_script
import search
import train
import train_image_only
from src.cli import Parser
from src.data.images import load_image
from src.data.source import scan_dataset
from src.evaluation.embed import evaluate_retrieval
from src.models import onnx_graph
from src.models.checkpoint import load_checkpoint
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.training.engine import Progress, train_one_epoch
from src.training.recipes import RECIPES
from src.training.run_state import RunState
from src.utils import files
from src.utils.errors import UserError
from src.utils.files import only_writer
from src.utils.runtime import seed_all
from src.utils.script import run_script
from tests.compare import differences
from tests.tiny_data import make_tiny_data

BEST, LAST = "models/flickr30k_clip_best.pth", "models/flickr30k_clip_last.pth"
PREVIOUS = "models/flickr30k_clip_previous.pth"
EXPORT = "models/image_encoder_from_clip.pth"
MODEL = ["--image-size", "32", "--embed-dim", "16", "--token-dim", "24", "--context-length", "8"]


class Run:
    """Run train.py on tiny data, each time with its own results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images, self.annotations = make_tiny_data(folder / "data")
        self.data = ["--images", str(self.images), "--annotations", str(self.annotations)]

    def __call__(self, results: str, *flags: str, epochs: int = 1, status: int = 0) -> Path:
        """Train a small model with `flags`, and return the results folder."""
        assert train.main([
            *self.data, *MODEL, "--cache-dir", str(self.folder / "cache"),
            "--results-dir", str(self.folder / results), "--val-fraction", "0.25",
            "--weights", "none", "--batch-size", "4", "--device", "cpu", "--lr", "1e-3",
            "--captions-per-image", "2", "--epochs", str(epochs), *flags,
        ]) == status
        return self.folder / results

    def resume(self, results: str, *flags: str, status: int = 0) -> Path:
        """Resume a run with `flags`, and return its results folder."""
        folder = self.folder / results
        assert train.main(["--resume", "--results-dir", str(folder), *flags]) == status
        return folder

    def copy(self, source: str, target: str) -> None:
        """Copy a results folder."""
        shutil.copytree(self.folder / source, self.folder / target)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tiny data, with one pixel store for all runs of this module."""
    return Run(tmp_path_factory.mktemp("scripts"))


@pytest.fixture(scope="module")
def trained(run: Run) -> Path:
    """The results folder of a run of one epoch."""
    return run("one")


@pytest.fixture
def stubs(monkeypatch):
    """Replace training and evaluation by functions that return at once.

    Attributes: `rsums`, the results of the next evaluations; `seen`, the learning rate and weight
    decay of each epoch so far.
    """
    class Stubs:
        rsums: list[float] = []
        seen: list[tuple[float, float]] = []

    Stubs.seen = []

    def epoch(model, dataset, optimizer, scheduler, scaler, **options):
        group = optimizer.param_groups[0]
        Stubs.seen.append((group["lr"], group["weight_decay"]))
        options["after_step"](Progress(torch.ones(1), lr=group["lr"], step=1))

    def evaluate(model, dataset):
        names = [f"{d}_{m}" for d in ("image_to_text", "text_to_image")
                 for m in ("R@1", "R@5", "R@10", "median_rank", "mean_rank")]
        return {**dict.fromkeys(names, 1.0), "rsum": Stubs.rsums.pop(0)}

    monkeypatch.setattr(train, "train_one_epoch", epoch)
    monkeypatch.setattr(train, "evaluate_retrieval", evaluate)
    monkeypatch.setattr("src.training.run_state.plot_curves", lambda *_: None)
    monkeypatch.setattr(train, "report_best", lambda *_: None)
    return Stubs


def read_log(results: Path) -> list[dict]:
    """Return the epochs of log.jsonl without their times."""
    lines = [json.loads(line) for line in (results / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def load(path: Path) -> dict:
    """Load a file of tensors and plain values."""
    return torch.load(path, weights_only=True)


# train.py


def test_train_writes_the_files_of_its_docstring(run, trained):
    """Two checkpoints, the log, the arguments, two plots and the list of rejected input."""
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert files == {BEST, LAST, PREVIOUS, "log.jsonl", "args.json", "curves.png", "examples.png",
                     "rejected.csv", ".lock"}
    best = load(trained / BEST)
    assert {"model_state", "vocab", "config", "metrics", "epoch", "args"} <= best.keys()
    assert best["vocab"]["<pad>"] == 0 and best["vocab"]["<unk>"] == 1
    arguments = json.loads((trained / "args.json").read_text())
    assert arguments == best["args"]
    assert (arguments["lr"], arguments["images"], arguments["recipe"]) == (
        1e-3, str(run.images), "baseline")
    (line,) = read_log(trained)
    assert line["epoch"] == 1 and line["lr"] == 1e-3 and line["loss"] > 0
    assert line["steps"] == 9 * 3 // 4  # 9 training images, three groups of captions each
    assert best["metrics"] == line["metrics"]
    for name in ("curves.png", "examples.png"):
        assert load_image(trained / name).width > 500
    assert (trained / "rejected.csv").read_text() == "kind,where,name,reason,text\n"


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that two results folders have the same log, except times, and the same bits."""
    assert read_log(a) == read_log(b)
    for name in (BEST, LAST):
        one, other = load(a / name), load(b / name)
        assert one.keys() == other.keys()
        for part in one.keys() - {"args", "log", "progress"}:
            assert differences(one[part], other[part], part) == []


@pytest.fixture(scope="module")
def straight(run) -> Path:
    """The results folder of an uninterrupted run of two epochs."""
    return run("straight", epochs=2)


def test_resumed_equals_uninterrupted(run, trained, straight):
    """One epoch and another after --resume give the same bits as two epochs at once."""
    run.copy("one", "resumed")
    resumed = run.resume("resumed", "--epochs", "2")
    assert_same_run(resumed, straight)
    assert differences(load(resumed / LAST)["model_state"],
                     load(trained / LAST)["model_state"]) != []  # it trained


def interrupt(monkeypatch, after: int, action) -> None:
    """Call `action` after that many steps of training, counted over all epochs."""
    steps = itertools.count(1)

    def epoch(*args, **options):
        after_step = options.pop("after_step")

        def interrupted(progress):
            if next(steps) == after:
                action()
            return after_step(progress)

        train_one_epoch(*args, **options, after_step=interrupted)

    monkeypatch.setattr(train, "train_one_epoch", epoch)


class PowerCut(BaseException):
    """An end of the process without cleaning up."""


def power_cut():
    raise PowerCut


@pytest.mark.parametrize("after", [1, 4, 6, 7, 9, 12])
def test_a_run_killed_at_any_step_resumes_to_the_same_bits(run, straight, monkeypatch, after):
    """A run that saves each step, is killed, and resumes, equals the uninterrupted run."""
    results = f"cut {after}"
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        interrupt(patch, after, power_cut)
        run(results, "--save-every", "0", epochs=2)
    if after == 1:  # nothing was saved yet
        run(results, epochs=2)
    else:
        run.resume(results)
    assert_same_run(run.folder / results, straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_prints_how_to_resume(run, straight, monkeypatch, capsys, number):
    """SIGINT and SIGTERM finish the step, save, and print the command that continues the run; it
    gives the same bits. Nothing was saved before, since --save-every is 10 minutes."""
    results = f"stopped {number}"
    with monkeypatch.context() as patch:
        interrupt(patch, 8, lambda: os.kill(os.getpid(), number))
        run(results, epochs=2, status=128 + number)
    error = capsys.readouterr().err
    assert "stopped after step 2 of epoch 2, and saved; continue with" in error
    assert f"python train.py --resume --results-dir '{run.folder / results}'" in error
    run.resume(results)
    assert_same_run(run.folder / results, straight)


def test_a_second_signal_stops_at_once(run, monkeypatch):
    """A second Ctrl-C does not wait for the end of the step."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores SIGINT

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    interrupt(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        run("twice")


def test_a_resumed_run_continues_its_schedule(run, monkeypatch):
    """A run with warm-up and cosine decay resumes to the same bits, too."""
    recipe = ("--captions-per-image", "5", "--schedule", "cosine", "--warmup-steps", "3")
    whole = run("whole", *recipe, epochs=2)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        interrupt(patch, 3, power_cut)
        run("cut", *recipe, "--save-every", "0", epochs=2)
    assert_same_run(run.resume("cut"), whole)


@pytest.mark.parametrize("damage", ["cut short", "empty", "gone", "other bytes"])
def test_a_damaged_checkpoint_is_replaced_by_the_previous(
    run, straight, monkeypatch, capsys, damage
):
    """If the newest checkpoint is damaged, the one before it is used, with a note."""
    results = f"damaged {damage}"
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        interrupt(patch, 9, power_cut)
        run(results, "--save-every", "0", epochs=2)
    last = run.folder / results / LAST
    content = last.read_bytes()
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes({"cut short": content[: len(content) // 2], "empty": b"",
                          "other bytes": content[:100] + bytes(len(content) - 100)}[damage])
    run.resume(results)
    error = capsys.readouterr().err
    assert "the checkpoint before it is used" in error and str(PREVIOUS) in error
    assert_same_run(run.folder / results, straight)


def test_weights_that_are_not_finite_are_not_saved(run, straight, monkeypatch):
    """A NaN in the weights ends the run, and the last good checkpoint is kept."""
    run.copy("straight", "broken")
    before = (run.folder / "broken" / LAST).read_bytes()

    def epoch(model, *args, **options):
        after_step = options.pop("after_step")

        def broken(progress):
            model.image_projection.linear.weight.data[0, 0] = torch.nan
            return after_step(progress)

        train_one_epoch(model, *args, **options, after_step=broken)

    monkeypatch.setattr(train, "train_one_epoch", epoch)
    with pytest.raises(UserError, match="no longer finite"):
        run.resume("broken", "--epochs", "3", "--save-every", "0")
    assert (run.folder / "broken" / LAST).read_bytes() == before


def test_the_best_epoch_has_the_highest_rsum(run, stubs):
    """Only a higher rsum replaces the best checkpoint, also after --resume."""
    stubs.rsums = [100.0, 300.0, 300.0]
    results = run("best", epochs=3)
    assert load(results / BEST)["epoch"] == 2
    stubs.rsums = [299.0]
    run.resume("best", "--epochs", "4")
    assert (load(results / BEST)["epoch"], load(results / LAST)["epoch"]) == (2, 4)
    stubs.rsums = [301.0]
    run.resume("best", "--epochs", "5")
    assert load(results / BEST)["epoch"] == 5
    assert load(results / BEST)["metrics"]["rsum"] == 301
    assert [line["metrics"]["rsum"] for line in read_log(results)] == [100, 300, 300, 299, 301]


def test_a_first_epoch_without_recall_is_kept(run, stubs):
    """The first epoch is the best so far even with an rsum of 0."""
    stubs.rsums = [0.0, 0.0]
    assert load(run("no recall", epochs=2) / BEST)["epoch"] == 1


def test_a_new_run_renames_the_best_of_the_earlier_run(run, stubs):
    """A new run in the same folder does not overwrite the best checkpoint of the earlier run."""
    stubs.rsums = [300.0]
    results = run("again")
    first = (results / BEST).read_bytes()
    stubs.rsums = [1.0, 2.0]
    run("again", "--lr", "1e-4", epochs=2)
    assert (results / "models/flickr30k_clip_best_earlier.pth").read_bytes() == first
    assert load(results / BEST)["metrics"]["rsum"] == 2


def test_a_run_killed_between_its_two_checkpoints(run, straight, monkeypatch):
    """A run killed after writing the best checkpoint, but before the last, resumes without taking
    its own best checkpoint for that of an earlier run."""
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        original = RunState._save_best

        def save_best(self):
            original(self)
            raise PowerCut

        patch.setattr(RunState, "_save_best", save_best)
        run("between", "--save-every", "0", epochs=2)
    results = run.folder / "between"
    assert (results / BEST).exists() and load(results / LAST)["epoch"] == 0
    (results / "models/flickr30k_clip_best_earlier.pth").write_bytes(b"of the run before")
    run.resume("between")
    assert_same_run(results, straight)
    assert (results / "models/flickr30k_clip_best_earlier.pth").read_bytes() == b"of the run before"


def test_resume_may_change_learning_rate_and_weight_decay(run, stubs, capsys):
    """--resume --lr continues with that rate, as the message of a diverged run advises, and prints
    a note; all other flags are those of the run."""
    stubs.rsums = [1.0, 2.0]
    run("rate", "--lr", "1e-3", "--weight-decay", "0.1", epochs=1)
    results = run.resume("rate", "--lr", "1e-5", "--weight-decay", "0.2", "--epochs", "2")
    assert stubs.seen == [(1e-3, 0.1), (1e-5, 0.2)]
    assert [line["lr"] for line in read_log(results)] == [1e-3, 1e-5]
    error = capsys.readouterr().err
    for note in ("--lr was 0.001, is 1e-05", "--weight-decay was 0.1, is 0.2", "--epochs was 1"):
        assert f"note: {note}" in error


def test_resuming_a_finished_run_changes_nothing(run, trained, stubs, capsys):
    """If all epochs are done, the log and both checkpoints stay byte for byte, and a message says
    how to train longer instead of an empty table."""
    run.copy("one", "finished")
    results = run.resume("finished")
    assert stubs.seen == []
    out = capsys.readouterr().out
    assert "all of its 1 epochs; train longer with --resume --epochs 6" in out
    assert "rsum     time" not in out
    for name in (BEST, LAST, "log.jsonl"):
        assert (results / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("flags", [
    ("--min-freq", "30"), ("--embed-dim", "8"), ("--seed", "1"), ("--max-images", "8"),
    ("--batch-size", "3"), ("--schedule", "cosine"), ("--dropout", "0.5"), ("--no-flip",),
], ids=" ".join)
def test_resume_refuses_flags_of_another_run(run, trained, stubs, flags):
    """A different model, split or recipe is refused with the flag's name; nothing is written."""
    before = {path: path.read_bytes() for path in (trained / "models").iterdir()}
    with pytest.raises(UserError, match=flags[0].replace("no-", "") + " was .*, is "):
        run.resume("one", *flags, "--epochs", "2")
    assert stubs.seen == []
    assert {path: path.read_bytes() for path in (trained / "models").iterdir()} == before


def test_a_run_of_a_version_with_fewer_flags_resumes(run, trained, straight):
    """A checkpoint that lacks newer flags, and has no moving average, resumes to the same bits."""
    run.copy("one", "fewer flags")
    content = load(trained / LAST)
    del content["average_state"], content["config"]["flip_tta"]
    for name in ("ema_decay", "flip_tta", "compile"):
        del content["args"][name]
    torch.save(content, run.folder / "fewer flags" / LAST)
    with pytest.raises(UserError, match="--ema-decay was 0.0, is 0.9"):
        run.resume("fewer flags", "--epochs", "2", "--ema-decay", "0.9")
    last = load(run.resume("fewer flags", "--epochs", "2") / LAST)
    assert differences(last["model_state"], load(straight / LAST)["model_state"]) == []


def use_old_names(path: Path) -> None:
    """Rewrite a checkpoint as versions before the names flip_tta and baseline wrote it."""
    content = load(path)
    for names in (content["config"], content["args"]):
        names["mirror_mean"] = names.pop("flip_tta")
    content["args"]["recipe"] = "seed"
    if average := content.get("average_state"):  # as torch's AveragedModel names it
        content["average_state"] = {
            "n_averaged": torch.tensor(1),
            **{f"module.{name}": value for name, value in average.items()}}
    if progress := content.get("progress"):
        progress["loss_sum"] = progress.pop("losses").sum()
        progress["waited"] = progress.pop("wait_seconds")
    torch.save(content, path)


@pytest.mark.parametrize("after, flags", [(4, ()), (9, ("--ema-decay", "0.5"))], ids=str)
def test_a_run_with_old_names_resumes(run, straight, monkeypatch, after, flags):
    """A run that an earlier version left within an epoch resumes to the same bits and losses."""
    whole = run("new names", *flags, epochs=2) if flags else straight
    results = f"old names {after}"
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        interrupt(patch, after, power_cut)
        run(results, "--save-every", "0", *flags, epochs=2)
    use_old_names(run.folder / results / LAST)
    resumed = run.resume(results)
    for name in (BEST, LAST):
        one, other = load(resumed / name), load(whole / name)
        for part in ("model_state", "optimizer_state", "average_state", "config"):
            assert differences(one.get(part), other.get(part), part) == []
    for one, other in zip(read_log(resumed), read_log(whole), strict=True):
        assert one.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-6)
        assert one == other
    arguments = json.loads((resumed / "args.json").read_text())
    assert (arguments["recipe"], arguments["flip_tta"]) == ("baseline", False)


@pytest.mark.parametrize("flip_tta", [False, True])
def test_a_checkpoint_with_old_names_evaluates_and_searches(trained, tmp_path, capsys, flip_tta):
    """evaluate.py and search.py give the same numbers for a checkpoint of an earlier version."""
    content = load(trained / BEST)
    content["config"]["flip_tta"] = flip_tta
    outputs = []
    for version in ("new", "old"):
        checkpoint = tmp_path / version / BEST
        checkpoint.parent.mkdir(parents=True)
        torch.save(content, checkpoint)
        if version == "old":
            use_old_names(checkpoint)
        assert load_checkpoint(checkpoint).model.image_encoder.flip_tta == flip_tta
        results = ["--results-dir", str(tmp_path / version)]
        assert evaluate.main(results) == 0
        report = json.loads((tmp_path / version / "evaluation_val.json").read_text())
        capsys.readouterr()
        assert search.main(["a red thing", "--json", *results]) == 0
        outputs.append([report["rsum"], report["text_to_image_mean_rank"],
                        capsys.readouterr().out])
    assert outputs[0] == outputs[1]
    if not flip_tta:
        assert outputs[0][0] == content["metrics"]["rsum"]


@pytest.mark.parametrize("change", ["caption", "image missing"])
def test_resume_refuses_other_data(run, trained, stubs, tmp_path, change):
    """A changed caption or a missing image is refused, although all flags are the same."""
    shutil.copytree(run.folder / "data", tmp_path / "data")
    if change == "caption":
        path = tmp_path / "data" / "annotations" / "annotations.csv"
        path.write_text(path.read_text().replace("A red thing number 3", "A red thing number 4"))
    else:
        next((tmp_path / "data" / "images").iterdir()).unlink()
    with pytest.raises(UserError, match="(train|validation).* images or captions are not those"):
        run.resume("one", "--images", str(tmp_path / "data" / "images"), "--annotations",
                   str(tmp_path / "data" / "annotations" / "annotations.csv"), "--epochs", "2")
    assert stubs.seen == []


def test_a_copied_run_resumes_in_its_new_folder(run, trained, straight):
    """A run resumes in the folder that it was copied to, and the original does not change."""
    before = {path: path.read_bytes() for path in (trained / "models").iterdir()}
    run.copy("one", "moved")
    assert_same_run(run.resume("moved", "--epochs", "2"), straight)
    assert {path: path.read_bytes() for path in (trained / "models").iterdir()} == before


def test_resume_does_not_continue_the_run_before(run, monkeypatch):
    """A new run in a used folder that is killed before its first save cannot be resumed; the last
    checkpoint of the earlier run has been renamed."""
    run("used", epochs=1)
    last = (run.folder / "used" / LAST).read_bytes()
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        interrupt(patch, 1, power_cut)
        run("used", "--lr", "1e-4", epochs=1)
    with pytest.raises(UserError, match="does not exist: start without --resume"):
        run.resume("used")
    renamed = run.folder / "used" / "models" / "flickr30k_clip_last_earlier.pth"
    assert renamed.read_bytes() == last


def test_a_best_checkpoint_cannot_be_resumed(run, trained):
    """A best checkpoint that was copied over the last one has no optimizer state."""
    run.copy("one", "best as last")
    shutil.copy(trained / BEST, run.folder / "best as last" / LAST)
    with pytest.raises(UserError, match="no run to continue"):
        run.resume("best as last")


@pytest.mark.parametrize(("flags", "restarts"), [
    (("--head-epochs", "1"), True), (("--head-epochs", "1", "--freeze-image-encoder"), False),
    (("--head-epochs", "9"), False),
], ids=str)
def test_the_schedule_restarts_when_the_image_encoder_is_unfrozen(
    run, stubs, monkeypatch, flags, restarts
):
    """A run has one cosine, or two if it trains the heads first and then everything."""
    seen = []
    original = train.build_schedule
    monkeypatch.setattr(train, "build_schedule", lambda *args, **options: seen.append(
        (args[2], options["restart_at"])) or original(*args, **options))
    stubs.rsums = [1.0, 2.0]
    run(f"phases of {flags}", *flags, epochs=2)
    ((total, restart_at),) = seen
    assert restart_at == (total // 2 if restarts else total)


def test_resume_needs_a_checkpoint(run, stubs):
    """--resume without a checkpoint is refused, instead of starting a new run."""
    with pytest.raises(UserError, match="flickr30k_clip_last.pth, which does not exist"):
        run.resume("nothing")
    assert stubs.seen == []


def test_a_second_run_in_the_same_folder_is_refused(run, stubs):
    """While a run is writing to a results folder, a second one is refused."""
    folder = run.folder / "taken"
    folder.mkdir()
    with only_writer(folder), pytest.raises(UserError, match="another run is writing"):
        run("taken")
    assert stubs.seen == [] and not (folder / LAST).exists()
    stubs.rsums = [1.0]
    run("taken")  # after the first has ended


def test_frozen_image_encoder(run):
    """--freeze-image-encoder trains everything else, on saved features; a second run loads them
    and gives the same bits."""
    first = run("frozen", "--freeze-image-encoder", epochs=2)
    features = sorted((run.folder / "cache").glob("features_*.npy"))
    assert len(features) == 2  # train, val
    written = [path.stat().st_mtime_ns for path in features]
    second = run("frozen again", "--freeze-image-encoder", epochs=2)
    assert [path.stat().st_mtime_ns for path in features] == written
    assert_same_run(first, second)
    seed_all(0, "weights")
    fresh = DualEncoder(ModelConfig(**load(first / LAST)["config"])).state_dict()
    moved = {name for name, value in load(first / LAST)["model_state"].items()
             if not torch.equal(value, fresh[name])}
    assert moved == {"logit_scale", "text_encoder.embedding.weight",
                     "text_projection.linear.weight", "image_projection.linear.weight"}


def test_head_epochs_come_first(run, monkeypatch):
    """With --head-epochs 1 the image encoder is trained from the second epoch on; a run that is
    killed in either epoch resumes to the same bits."""
    flags = ("--head-epochs", "1", "--freeze-batchnorm")
    whole = run("phases", *flags, epochs=2)
    name = "image_encoder.backbone._conv_stem.weight"
    one = load(run("phase one", *flags, epochs=1) / LAST)["model_state"][name]
    seed_all(0, "weights")
    fresh = DualEncoder(ModelConfig(**load(whole / LAST)["config"])).state_dict()[name]
    assert torch.equal(one, fresh)
    assert not torch.equal(load(whole / LAST)["model_state"][name], fresh)
    for after in (3, 9):
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            interrupt(patch, after, power_cut)
            run(f"phases {after}", *flags, "--save-every", "0", epochs=2)
        assert_same_run(run.resume(f"phases {after}"), whole)


def test_the_best_checkpoint_has_the_moving_average(run, monkeypatch):
    """With --ema-decay the best checkpoint has the average of weights and BatchNorm statistics, the
    last one the weights themselves; a run that is killed resumes to the same bits."""
    states, evaluated = [], []

    def copy_of(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    def epoch(model, *args, **options):
        after_step = options.pop("after_step")

        def recorded(progress):
            states.append(copy_of(model))
            return after_step(progress)

        train_one_epoch(model, *args, **options, after_step=recorded)

    def evaluate(model, dataset):
        evaluated.append(copy_of(model))
        return evaluate_retrieval(model, dataset)

    flags = ("--ema-decay", "0.5", "--flip-tta")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_epoch", epoch)
        patch.setattr(train, "evaluate_retrieval", evaluate)
        results = run("average", *flags, epochs=2)
    assert len(states) > 5 and len(evaluated) == 2
    expected = {name: value.double() for name, value in states[0].items()}
    for step, state in enumerate(states[1:], start=1):
        decay = min(0.5, step / (step + 4))  # smaller in the first steps
        for name, value in state.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    best, last = load(results / BEST), load(results / LAST)["model_state"]
    kept = best["model_state"]
    assert differences(kept, evaluated[best["epoch"] - 1]) == []
    for name, value in evaluated[-1].items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert differences(last, states[-1]) == []
    assert differences(last, evaluated[-1]) != [] and differences(last, kept) != []
    assert load_checkpoint(results / BEST)[0].image_encoder.flip_tta
    for after in (2, len(states) - 1):
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            interrupt(patch, after, power_cut)
            run(f"average cut {after}", *flags, "--save-every", "0", epochs=2)
        assert_same_run(run.resume(f"average cut {after}"), results)


def test_without_validation_the_last_epoch_is_kept(run, capsys):
    """--val-fraction 0 trains on all images; there are no metrics to choose an epoch by."""
    results = run("no validation", "--val-fraction", "0", epochs=2)
    assert "train: 12 images" in capsys.readouterr().out
    best, last = load(results / BEST), load(results / LAST)
    assert (best["epoch"], best["metrics"]) == (2, {})
    assert differences(best["model_state"], last["model_state"]) == []
    assert [line["metrics"] for line in read_log(results)] == [{}, {}]
    assert load_image(results / "curves.png").width > 400
    assert not (results / "examples.png").exists()


def test_max_images(run, stubs, capsys):
    """--max-images limits the images of both splits together."""
    stubs.rsums = [1.0]
    run("few", "--max-images", "8")
    out = capsys.readouterr().out
    assert "train: 6 images, 30 captions" in out and "validation: 2 images, 10 captions" in out


def test_a_results_folder_that_cannot_be_written_is_refused_first(run, tmp_path):
    """A file with the name of the results folder is an error before any image is decoded."""
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(UserError, match="cannot write results.*--results-dir"):
        train.main([*run.data, *MODEL, "--cache-dir", str(tmp_path / "cache"),
                    "--results-dir", str(tmp_path / "results"), "--weights", "none"])
    assert not (tmp_path / "cache").exists()


def test_one_validation_image_is_refused(run, tmp_path):
    """With a single validation image every recall would be 100 %. No image is decoded before."""
    with pytest.raises(UserError, match="validation needs at least 2 images and has 1: choose"):
        train.main([*run.data, *MODEL, "--cache-dir", str(tmp_path / "cache"),
                    "--results-dir", str(tmp_path / "results"), "--val-fraction", "0.05",
                    "--weights", "none"])
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "results" / "rejected.csv").read_text().count("\n") == 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_split_is_small_because_images_are_missing(run, tmp_path, strict, capsys):
    """The message says so, and rejected.csv names the images."""
    shutil.copytree(run.folder / "data", tmp_path / "data")
    images = tmp_path / "data" / "images"
    annotations = tmp_path / "data" / "annotations" / "annotations.csv"
    names = [record.name for record in scan_dataset(images, annotations, 0.5).splits["val"]]
    for name in names[1:]:
        (images / name).unlink()
    count = len(names) - 1
    reason = (f"{count} images missing, and --strict allows none" if strict else
              f"validation needs at least 2 images and has 1: {count} images are missing in")
    with pytest.raises(UserError, match=reason) as caught:
        train.main(["--images", str(images), "--annotations", str(annotations), *MODEL,
                    "--results-dir", str(tmp_path / "results"), "--val-fraction", "0.5",
                    "--weights", "none", *["--strict"] * strict])
    assert caught.value.status == 2 - strict
    assert f"{count} images missing: " in capsys.readouterr().out
    rejected = (tmp_path / "results" / "rejected.csv").read_text()
    assert count >= 2 and all(name in rejected for name in names[1:])
    (images / names[0]).unlink()
    source = scan_dataset(images, annotations, 0.5)
    assert f"val 0, test 0, missing {len(names)})" in source.explain_no_validation()


@pytest.mark.parametrize("fault", ["row", "missing", "unreadable"])
def test_strict_refuses_input_that_cannot_be_used(run, stubs, tmp_path, fault):
    """Without --strict a run uses the rest; with it, it ends with status 1 before the first epoch.
    Both list the fault in rejected.csv."""
    shutil.copytree(run.folder / "data", tmp_path / "data")
    images = tmp_path / "data" / "images"
    annotations = tmp_path / "data" / "annotations" / "annotations.csv"
    if fault == "row":
        annotations.write_text(annotations.read_text() + "not a row\n")
    elif fault == "missing":
        (images / "1003.jpg").unlink()
    else:
        (images / "1003.jpg").write_bytes(b"not an image")
    flags = ["--images", str(images), "--annotations", str(annotations), "--cache-dir",
             str(tmp_path)]
    stubs.rsums = [1.0]
    run(f"lenient {fault}", *flags)
    with pytest.raises(UserError, match="--strict") as caught:
        run(f"strict {fault}", *flags, "--strict")
    assert caught.value.status == 1 and len(stubs.seen) == 1
    rejected = (run.folder / f"strict {fault}" / "rejected.csv").read_text()
    assert ("not a row" if fault == "row" else "1003.jpg") in rejected


def test_a_missing_weights_file_is_named(run):
    """--weights with a path that does not exist is an error that names it."""
    with pytest.raises(UserError, match="there is no file missing.pth"):
        run("no weights", "--weights", "missing.pth")


def flags_of(*argv: str) -> dict:
    """Return the flags of train.py for a command line."""
    return vars(train.parse_args(list(argv))[0])


def test_the_defaults_are_the_baseline():
    """Learning rate 2e-5, batches of 64, 5 epochs, ImageNet weights, 256 dimensions."""
    args = flags_of()
    expected = {
        "recipe": "baseline", "lr": 2e-5, "batch_size": 64, "epochs": 5, "val_fraction": None,
        "weights": "imagenet", "image_encoder": "efficientnet-b0", "embed_dim": 256,
        "context_length": 32, "image_size": 224, "captions_per_image": 1, "max_images": None,
        "resume": False, "demo": False, "seed": 0, "freeze_image_encoder": False,
        "head_epochs": 0, "image_encoder_lr": None,
    }
    assert {name: args[name] for name in expected} == expected
    assert args["weight_decay"] > 0 and args["dropout"] > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_set_of_defaults(recipe):
    """All recipes set the same flags, and a flag on the command line has priority."""
    assert RECIPES[recipe].keys() == RECIPES["baseline"].keys()
    assert flags_of("--recipe", recipe).items() >= RECIPES[recipe].items()
    for argv in (["--recipe", recipe, "--epochs", "3", "--lr", "7e-5", "--flip"],
                 ["--lr", "7e-5", "--epochs", "3", "--flip", "--recipe", recipe]):
        expected = {**RECIPES[recipe], "epochs": 3, "lr": 7e-5, "flip": True}
        assert flags_of(*argv).items() >= expected.items()


def test_the_demo_has_its_own_recipe():
    """--demo chooses the recipe demo, unless --recipe chooses another."""
    assert flags_of("--demo").items() >= {**RECIPES["demo"], "recipe": "demo"}.items()
    assert flags_of("--demo", "--recipe", "baseline").items() >= RECIPES["baseline"].items()


@pytest.mark.parametrize("argv", [
    ["--epochs", "0"], ["--batch-size", "-1"], ["--lr", "0"], ["--lr", "nan"], ["--lr", "inf"],
    ["--val-fraction", "1"], ["--dropout", "1.5"], ["--max-images", "0"], ["--schedule", "linear"],
    ["--image-encoder", "resnet50"], ["--weight-decay", "-0.1"], ["--weight-decay", "nan"],
    ["--warmup-steps", "-1"], ["--recipe", "weak"], ["--save-every", "-1"], ["--chunk-size", "0"],
], ids=" ".join)
def test_invalid_values_are_refused(argv, capsys):
    """A value out of range is an error that names its flag."""
    assert f"argument {argv[0]}: " in error_of(capsys, *argv)


def error_of(capsys, *argv: str) -> str:
    """Return the error of train.py for a command line that it refuses with exit status 2."""
    with pytest.raises(SystemExit) as caught:
        train.parse_args(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("argv, nearest", [
    (["--epoch", "3"], "--epochs"), (["--mirror-mean"], "--flip-tta"),
    (["--no-mirror-mean"], "--no-flip-tta"), (["--recipe", "seed"], "--recipe baseline"),
    (["--recipe", "stron"], "--recipe strong"), (["--lrr=1", "--epoch", "3"], "--lr, --epochs"),
    (["--resume", "--mirror-mean"], "--flip-tta"),
], ids=str)
def test_an_unknown_flag_is_an_error_with_the_nearest_one(capsys, argv, nearest):
    """The message has the unknown flags, the nearest valid ones or their new names, and --help."""
    first, second = error_of(capsys, *argv).splitlines()
    assert first.startswith("error: ") and first.endswith(f"; did you mean {nearest}?")
    assert all(argument.split("=")[0] in first for argument in argv if argument != "--resume")
    assert second.endswith("--help lists all flags")


def test_an_unknown_flag_without_a_near_one(capsys):
    """Nothing is suggested if no flag is similar, or if the script lacks the renamed flag."""
    assert "did you mean" not in error_of(capsys, "--xyzzy", "-q", "word")
    assert "did you mean" not in error_of(capsys, "--mirror-men")  # that is no flag's former name
    with pytest.raises(SystemExit):
        Parser("a script without --flip-tta").parse_args(["--mirror-mean"])
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(("script", "flag"), [("search.py", "--sheet"),
                                              ("evaluate.py", "--mistakes")])
def test_a_picture_is_a_png_file(monkeypatch, capsys, script, flag):
    """A name with another extension is refused, since a PNG file would be written."""
    status, error = run_program(monkeypatch, capsys, script, flag, "a.txt")
    assert status == 2 and f"argument {flag}: a.txt must end in .png" in error


def test_tensorboard_that_is_not_installed_is_one_message(run, stubs, monkeypatch):
    """--tensorboard is refused before anything is decoded; the message has the command."""
    monkeypatch.setattr("src.training.tensorboard.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run("no tensorboard", "--tensorboard")
    assert stubs.seen == [] and not (run.folder / "no tensorboard").exists()


def test_tensorboard_gets_each_step_and_epoch(run, straight, monkeypatch):
    """The values of the log and the loss of each step, over the steps of the run; a run that is
    killed and resumes hides what it wrote for the steps that it repeats."""
    writers = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder.endswith("tensorboard")
            self.values, self.purge_step = {}, purge_step
            writers.append(self)

        def add_scalar(self, name, value, step):
            self.values.setdefault(name, {})[step] = value

        def flush(self):
            pass

    package = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setattr("src.training.tensorboard.find_spec", lambda name: package)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        interrupt(patch, 9, power_cut)  # in the second epoch
        run("events", "--tensorboard", "--save-every", "0", epochs=2)
    results = run.resume("events")
    assert_same_run(results, straight)
    log = read_log(results)
    assert [writer.purge_step for writer in writers] == [1, log[0]["steps"] + 1]
    for line, writer in zip(log, writers, strict=True):
        assert writer.values["loss/epoch"] == {line["steps"]: line["loss"]}
        assert writer.values["validation/rsum"] == {line["steps"]: line["metrics"]["rsum"]}
        steps = writer.values["loss/step"]
        assert list(steps) == list(range(line["steps"] - 5, line["steps"] + 1))
        assert sum(steps.values()) / 6 == pytest.approx(line["loss"], rel=1e-6)


# Clusters: restarts, file systems without locks, batches that cannot be trained on


def test_a_run_killed_during_validation_continues_with_it(run, straight, monkeypatch):
    """The epoch is not trained again: the resumed run starts with the validation."""
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(train, "evaluate_retrieval", lambda *_: power_cut())
        run("validating", epochs=2)
    steps = load(run.folder / "validating" / LAST)["progress"]["step"]
    trained_steps = []

    def epoch(*args, **options):
        before = options["progress"].step if options["progress"] else 0
        trained_steps.append(train_one_epoch(*args, **options).step - before)

    monkeypatch.setattr(train, "train_one_epoch", epoch)
    assert_same_run(run.resume("validating"), straight)
    assert trained_steps == [0, steps]


def test_resume_auto_starts_a_run_and_continues_it(run, straight, monkeypatch):
    """The same command starts a run, continues it after each interruption, and leaves a finished
    run as it is."""
    for after in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            interrupt(patch, after, power_cut)
            run("auto", "--resume", "auto", "--save-every", "0", epochs=2)
    results = run("auto", "--resume", "auto", "--save-every", "0", epochs=2)
    assert_same_run(results, straight)
    before = (results / LAST).read_bytes()
    run("auto", "--resume", "auto", "--save-every", "0", epochs=2)
    assert (results / LAST).read_bytes() == before


def test_a_restart_does_not_replace_its_unfinished_run(run, monkeypatch):
    """The same command without --resume is refused while its run is unfinished, with the flags that
    continue it; another run may take the folder, and a finished one may be repeated."""
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        interrupt(patch, 8, power_cut)
        run("restart", epochs=2)
    before = (run.folder / "restart" / LAST).read_bytes()
    with pytest.raises(UserError, match=r"(?s)unfinished run.*1 of 2 epochs.*--resume auto"):
        run("restart", epochs=2)
    assert (run.folder / "restart" / LAST).read_bytes() == before
    run("restart", epochs=1)
    run("restart", epochs=1)


def test_resume_notes_changed_images(run, trained, capsys, monkeypatch, tmp_path):
    """Another image under the same name is noted, and the run continues."""
    shutil.copytree(run.folder / "data", tmp_path / "data")
    images = tmp_path / "data" / "images"
    run.copy("one", "images")
    flags = ["--images", str(images), "--cache-dir", str(tmp_path), "--epochs", "2"]
    run.resume("images", *flags)
    assert "have changed" not in capsys.readouterr().err
    names = sorted(path.name for path in images.iterdir())
    contents = [(images / name).read_bytes() for name in names]
    for name, content in zip(names, contents[2:] + contents[:2], strict=True):
        (images / name).write_bytes(content)
    run.resume("images", *flags, "--epochs", "3")
    error = capsys.readouterr().err
    assert "note: the train pixels and validation pixels have changed" in error


def test_resume_notes_another_number_of_processes(run, trained, capsys):
    """A run of two processes continues in one, with a note."""
    run.copy("one", "processes")
    content = load(trained / LAST)
    torch.save({**content, "n_ranks": 2}, run.folder / "processes" / LAST)
    run.resume("processes", "--epochs", "2")
    assert "note: the run had 2 processes, has 1" in capsys.readouterr().err


def test_file_systems_without_locks_and_folder_sync(run, trained, monkeypatch, capsys):
    """Without flock (Lustre, NFS) and without fsync of folders (CIFS) a run is trained all the
    same, with one note on what cannot be noticed."""
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    files._note_missing_locks.cache_clear()
    monkeypatch.setattr(files.fcntl, "flock", flock)
    monkeypatch.setattr(files.os, "fsync", fsync)
    results = run("no locks")
    error = capsys.readouterr().err
    assert error.count("note: this file system has no file locks") == 1
    monkeypatch.undo()
    files._note_missing_locks.cache_clear()
    assert_same_run(results, trained)


@pytest.mark.parametrize(("flags", "part"), [
    (("--batch-size", "1"), "a batch of 1 image has no negatives"),
    (("--batch-size", "9", "--chunk-size", "8"), "on a single image of 32 pixels"),
], ids=str)
def test_batches_of_one_image_are_refused(run, stubs, flags, part):
    """A loss that is always 0, and BatchNorm on one value, are refused before any step."""
    with pytest.raises(UserError, match=f"(?s){part}.*--batch-size"):
        run("too small", *flags)
    assert stubs.seen == []


def test_weights_are_checked_before_anything_is_decoded(run, tmp_path):
    """A file that does not fit costs no decoding."""
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="does not hold the weights"):
        run("weights", "--weights", str(tmp_path / "weights.pth"), "--cache-dir",
            str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_rank_without_a_launcher_is_one_message(trained, script):
    """RANK alone, as some clusters set it, is refused with the cure."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    done = subprocess.run(  # a process of its own: with RANK a script ends Python at once
        [sys.executable, script, "--results-dir", str(trained)], capture_output=True, text=True,
        cwd=Path(train.__file__).parent, env={**environment, "RANK": "0"})
    assert done.returncode == 2
    assert done.stderr.startswith("error: the environment has RANK but no WORLD_SIZE")
    assert "torchrun" in done.stderr and "Traceback" not in done.stderr


# main.py


@pytest.fixture
def check(tiny_data, monkeypatch):
    """A function that runs main.py with further flags on new tiny data, and returns its status."""
    monkeypatch.setattr("src.data.prepare.MIN_IMAGES", 2)  # no warning of few images
    images, annotations = tiny_data

    def run_main(*flags: str) -> int:
        return main_script.main(["--images", str(images), "--annotations", str(annotations),
                                 "--image-size", "32", "--batch-size", "8", *flags])
    return run_main


def test_sanity_check_of_good_data(check, capsys):
    """The exit status is 0, and the report has a line for each check."""
    assert check("--val-fraction", "0.25") == 0
    out = capsys.readouterr().out
    for part in ("60 rows, table with |", "0 caption rows repaired, 0 rejected",
                 "12 with captions (12 with 5); 0 missing, 0 files unused",
                 "by image, from seed and file names: train 9, val 3",
                 "0 groups of byte-identical images in train", "% are cut to 32",
                 "words of the training captions",
                 "images (8, 3, 32, 32), tokens (8, 32) on ", "-> embeddings (8, 256), (8, 256)",
                 "before training (guessing: about ln 8 = 2.08)", "all is well"):
        assert part in out


@pytest.mark.parametrize("seed", range(3))
def test_untrained_loss_is_near_ln_batch(check, capsys, seed):
    """The loss of an untrained model is near ln(8), but not equal to it, for any seed."""
    assert check("--seed", str(seed), "--val-fraction", "0.25") == 0
    loss = float(capsys.readouterr().out.split("loss ")[1].split()[0])
    assert 0 < abs(loss - 2.079) < 1


def test_sanity_check_of_a_split_of_one_image(check, capsys):
    """main.py reports what train.py refuses: one validation image."""
    assert check("--val-fraction", "0.05") == 1
    assert "validation needs at least 2 images and has 1: choose --val-fraction 0." in \
        capsys.readouterr().out.split("\nwrong:\n")[1]


def break_data(kind: str, images: Path, annotations: Path) -> str:
    """Damage good data, and return the message that main.py should print."""
    names = sorted(path.name for path in images.iterdir())
    if kind == "image missing":
        (images / names[3]).unlink()
        return "1 image missing from"
    if kind == "row rejected":
        with open(annotations, "a") as file:
            file.write("not a row\n")
        return "1 caption row rejected"
    if kind == "image unreadable":
        for name in names:
            (images / name).write_bytes(b"not an image")
        return "1000.png cannot be read"
    rows = annotations.read_text().splitlines()[1:]
    if kind == "no words":
        annotations.write_text("".join(f"{row.rsplit('|', 1)[0]}| ...\n" for row in rows))
        return "the vocabulary has no words"
    split = kind.removeprefix("only ")
    entries = [{"filename": name, "split": split, "sentences": [{"raw": "A dog runs ."}]}
               for name in names]
    annotations.write_text(json.dumps({"images": entries}))
    return ("there are no training images" if split == "test" else
            "the split of the caption file has no validation images (train 12, val 0, test 0)")


@pytest.mark.parametrize("kind", ["image missing", "row rejected", "image unreadable", "no words",
                                  "only train", "only test"])
def test_sanity_check_of_bad_data(check, tiny_data, capsys, kind):
    """The exit status is 1, and the problem is listed at the end of the report."""
    complaint = break_data(kind, *tiny_data)
    assert check() == 1
    out = capsys.readouterr().out
    assert "all is well" not in out
    assert complaint in out.split("\nwrong:\n")[1]


def test_identical_images_in_two_splits_are_counted(check, tiny_data, capsys):
    """A group of images with the same bytes in two splits is shortened to three names; images with
    only the same size are none."""
    images = sorted(tiny_data[0].glob("*.png"))
    longest = max(path.stat().st_size for path in images)
    for path in images:
        path.write_bytes(path.read_bytes().ljust(longest, b"\0"))
    check("--val-fraction", "0.25")
    assert "0 groups of byte-identical images" in capsys.readouterr().out
    for path in images:
        path.write_bytes(images[0].read_bytes())
    check("--val-fraction", "0.25")
    assert "1 group of byte-identical images in train and elsewhere, such as 1000.png = " \
        "1002.png = 1004.png and 3 more\n" in capsys.readouterr().out


# train_image_only.py


def test_export_of_the_best_epoch(trained, capsys):
    """The exported image encoder is beside the checkpoint and has the same weights."""
    assert train_image_only.main(["--results-dir", str(trained)]) == 0
    exported = load(trained / EXPORT)
    for name in (EXPORT, "rejected_export.csv"):  # other tests compare this folder
        (trained / name).unlink()
    out = capsys.readouterr().out
    assert "exported efficientnet-b0 of epoch 1 (" in out
    assert "compared on 3 validation images: largest difference " in out
    model, _, content = load_checkpoint(trained / BEST)
    assert differences(exported["backbone_state"],
                     dict(model.image_encoder.backbone.state_dict())) == []
    assert torch.equal(exported["projection"], model.image_projection.linear.weight)
    card = exported["card"]
    assert card["recall"] == content["metrics"] and card["epoch"] == 1
    assert card["data"] == "images, annotations.csv"  # no path of this machine
    assert card["checkpoint"] == files.fingerprint(trained / BEST)


def export(*flags: object) -> None:
    """Run train_image_only.py."""
    assert train_image_only.main([str(flag) for flag in flags]) == 0


def test_export_of_other_files(trained, tmp_path):
    """--checkpoint and --output choose the files; an exported encoder cannot be exported."""
    output = tmp_path / "new" / "encoder.pth"
    export("--checkpoint", trained / LAST, "--output", output, "--results-dir", tmp_path, "--text")
    assert load(output)["kind"] == "image encoder"
    assert {path.name for path in output.parent.iterdir()} == {"encoder.pth", "encoder_text.npz"}
    with pytest.raises(UserError, match="encoder.pth holds image encoder"):
        train_image_only.main(["--checkpoint", str(output), "--output", str(tmp_path / "x.pth")])


@pytest.mark.parametrize("part", ["image", "text"])
def test_an_export_that_does_not_agree_leaves_nothing(trained, tmp_path, monkeypatch, part):
    """Not of the other encoder either; earlier files are intact."""
    for package in ("onnxruntime", "onnx"):
        pytest.importorskip(package)
    models = tmp_path / "models"
    names = {f"{encoder}_encoder_from_clip{suffix}" for encoder, suffix in (
        ("image", ".onnx"), ("text", ".npz"), ("text", ".onnx"))}
    models.mkdir()
    for name in names:
        (models / name).write_text("earlier")
    graph = getattr(onnx_graph, f"{part}_graph")
    other = DualEncoder(load_checkpoint(trained / BEST).model.config).eval()
    monkeypatch.setattr(onnx_graph, f"{part}_graph", {
        "image": lambda model, **options: graph(other, **options),
        "text": lambda vectors: graph(vectors[::-1])}[part])
    with pytest.raises(UserError, match="does not agree with the model"):
        export("--checkpoint", trained / BEST, "--results-dir", tmp_path, "--format", "onnx",
               "--text")
    assert {path.name for path in models.iterdir()} == names
    assert {path.read_text() for path in models.iterdir()} == {"earlier"}


def test_export_in_all_formats(trained, tmp_path, capsys):
    """The files are named by their format; lower precision prints the recall of model and file."""
    for package in ("onnxruntime", "onnx", "safetensors"):
        pytest.importorskip(package)
    flags = ("--checkpoint", trained / BEST, "--results-dir", tmp_path, "--text")
    export(*flags, "--format", "safetensors", "--precision", "float16")
    lines = capsys.readouterr().out.splitlines()
    model, exported = ([float(value) for value in line.split()[1:]] for line in lines
                       if line.startswith(("model ", "exported  ")))
    metrics = load(trained / BEST)["metrics"]
    assert model == pytest.approx([*(metrics[f"{direction}_R@{k}"] for direction in (
        "image_to_text", "text_to_image") for k in (1, 5, 10)), metrics["rsum"]], abs=0.05)
    assert len(exported) == 7
    [change] = [line for line in lines if line.startswith("rsum changes by")]
    assert float(change.split()[-1]) == pytest.approx(exported[-1] - model[-1], abs=0.11)
    export(*flags, "--format", "onnx", "--float-input")
    assert "rsum" not in capsys.readouterr().out  # nothing was rounded
    assert {path.name for path in (tmp_path / "models").iterdir()} == {
        "image_encoder_from_clip.safetensors", "image_encoder_from_clip.onnx",
        "text_encoder_from_clip.npz", "text_encoder_from_clip.onnx"}


def test_export_without_the_data_of_the_run(trained, tmp_path, capsys):
    """A checkpoint on another machine is compared on generated images, or on a folder's."""
    content = load(trained / BEST)
    content["args"]["images"] = str(tmp_path / "gone")
    torch.save(content, tmp_path / "moved.pth")
    flags = ("--checkpoint", tmp_path / "moved.pth", "--output", tmp_path / "encoder.pth")
    export(*flags)
    captured = capsys.readouterr()
    assert "compared on 32 generated images (--images DIR takes yours): " in captured.out
    assert captured.err.startswith("note: no validation images of the training run: there is no "
                                   f"image folder at {tmp_path / 'gone'}\n")
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    with pytest.raises(UserError, match="there are no images in .*photos"):
        export(*flags, "--images", photos)
    images = Path(content["args"]["annotations"][0]).parents[1] / "images"
    for source, name in (("1000.png", "a.png"), ("1002.png", "sub/b.png")):
        shutil.copy(images / source, photos / name)
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:100])
    export(*flags, "--images", photos, "--precision", "float16")
    captured = capsys.readouterr()
    assert f"compared on 2 images of {photos}: " in captured.out
    assert f"recall not measured: the images of {photos} have no captions\n" in captured.out
    assert f"note: 1 of 3 images cannot be read; the first, {photos / 'broken.png'}: " \
        in captured.err
    with pytest.raises(UserError, match="there is no caption file at"):
        export(*flags, "--annotations", tmp_path / "none.csv")


def test_recall_of_a_last_checkpoint_is_measured(trained, tmp_path, capsys):
    """Its metrics may be of the moving average, or of the epoch before."""
    content = load(trained / LAST)
    metrics = content["metrics"]
    content["average_state"], content["metrics"] = content["model_state"], {"rsum": -1.0}
    torch.save(content, tmp_path / "last.pth")
    export("--checkpoint", tmp_path / "last.pth", "--results-dir", tmp_path)
    # After one epoch the embeddings are nearly equal, and rounding decides ranks.
    recall = load(tmp_path / EXPORT)["card"]["recall"]
    assert recall.keys() == metrics.keys() and recall["rsum"] > 0
    [model] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model")]
    assert float(model.split()[-1]) == pytest.approx(metrics["rsum"], abs=0.05)


@pytest.mark.parametrize("flags, message", [
    (["--precision", "int8"], "--precision int8 is for --format onnx"),
    (["--float-input", "--format", "safetensors"], "--float-input is for --format onnx"),
    (["--pretrained", "--format", "onnx", "--precision", "int8"],
     "int8 is calibrated on images: give some with --images DIR")])
def test_export_flags_that_do_not_fit(flags, message, tmp_path, monkeypatch):
    """They are refused, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        train_image_only.main(flags)
    assert list(tmp_path.iterdir()) == []


# As programs


def run_program(monkeypatch, capsys, script: str, *argv: str) -> tuple[int, str]:
    """Run a script as a program, and return its exit status and standard error."""
    monkeypatch.setattr("sys.argv", [script, *argv])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(Path(train.__file__).with_name(script)), run_name="__main__")
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize("script", ["main.py", "train.py"])
def test_missing_data_is_one_message(monkeypatch, capsys, tmp_path, script):
    """Without data the status is 2, and the message says where the data belong."""
    monkeypatch.chdir(tmp_path)
    status, error = run_program(monkeypatch, capsys, script)
    assert status == 2
    assert error.startswith("error: there is no caption file at data/flickr30k/annotations")
    assert error.count("error") == 1 and "Traceback" not in error
    for part in ("data/flickr30k/images/*.jpg", "--data-dir", "--annotations FILE", "--demo"):
        assert part in error


def test_missing_checkpoint_is_one_message(monkeypatch, capsys, tmp_path):
    """Without a checkpoint the status is 2, and the message names its path and other models: that
    of the repository, and that of the demo if there is one."""
    monkeypatch.chdir(tmp_path)
    for script in ("train_image_only.py", "evaluate.py"):
        status, error = run_program(monkeypatch, capsys, script)
        assert status == 2 and error.count("\n") == 1
        assert error.startswith(f"error: there is no file {Path('results') / BEST}: train one with")
        assert "--pretrained" in error and "--demo" not in error
    status, error = run_program(monkeypatch, capsys, "evaluate.py", "--demo")
    assert "train one with python train.py --demo, " in error
    (tmp_path / "results" / "demo" / "models").mkdir(parents=True)
    (tmp_path / "results" / "demo" / BEST).touch()
    status, error = run_program(monkeypatch, capsys, "search.py", "red")
    assert status == 2 and "use the model of the demo with --demo" in error
    status, error = run_program(monkeypatch, capsys, "search.py", "red", "--results-dir", "other")
    assert status == 2 and "--demo" not in error


@pytest.mark.parametrize("script", ["main.py", "train.py", "evaluate.py", "search.py",
                                    "train_image_only.py"])
def test_help_can_be_printed(monkeypatch, capsys, script):
    """--help prints all help texts, in which argparse formats percent signs, in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(Path(train.__file__).with_name(script)), run_name="__main__")
    out, error = capsys.readouterr()
    assert (caught.value.code, error) == (0, "")
    assert [line for line in out.splitlines() if len(line) > 80] == []


def test_exit_status_of_a_program(capsys):
    """The status is main's, 2 for a UserError, 130 for Ctrl-C; other errors keep a traceback."""
    def fail(error: BaseException):
        raise error

    for main, status in ((lambda: 0, 0), (lambda: 1, 1), (lambda: fail(UserError("fix it")), 2),
                         (lambda: fail(KeyboardInterrupt()), 130)):
        with pytest.raises(SystemExit) as caught:
            run_script(main)
        assert caught.value.code == status
    assert capsys.readouterr().err == "error: fix it\n\nstopped\n"
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)
