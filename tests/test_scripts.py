"""The scripts from end to end: main.py, train.py and train_image_only.py on tiny data."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_data

import main as main_script
import train
import train_image_only
from src.checkpoint import load_checkpoint
from src.errors import UserError, run_script
from src.image_file import load_image

TIMINGS = {"seconds", "pairs_per_second", "wait_share", "validation_seconds"}
BEST, LAST = "models/flickr30k_clip_best.pth", "models/flickr30k_clip_last.pth"
EXPORT = "models/image_encoder_from_clip.pth"
MODEL = ["--image-size", "32", "--embed-dim", "16", "--token-dim", "24", "--context-length", "8"]


class Run:
    """train.py on tiny data, each call with a results folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images, self.annotations = make_tiny_data(folder / "data")
        self.data = ["--images", str(self.images), "--annotations", str(self.annotations)]

    def __call__(self, results: str, *flags: str, epochs: int = 1) -> Path:
        """Train with small settings and `flags`; returns the results folder."""
        status = train.main([
            *self.data, *MODEL, "--cache-dir", str(self.folder / "cache"),
            "--results-dir", str(self.folder / results), "--val-fraction", "0.25",
            "--weights", "none", "--batch-size", "4", "--device", "cpu", "--lr", "1e-3",
            "--captions-per-image", "2", "--epochs", str(epochs), *flags,
        ])
        assert status == 0
        return self.folder / results

    def copy(self, source: str, target: str) -> None:
        """Copy a results folder."""
        shutil.copytree(self.folder / source, self.folder / target)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tiny data with one decoded store for all runs of this file."""
    return Run(tmp_path_factory.mktemp("scripts"))


@pytest.fixture(scope="module")
def trained(run: Run) -> Path:
    """The results of one epoch."""
    return run("one")


@pytest.fixture
def stubs(monkeypatch):
    """Epochs that cost nothing and score as they are told.

    Attributes: `rsums`, what the coming evaluations give; `seen`, the optimiser's (lr, decay) of
    each epoch that was run.
    """
    class Stubs:
        rsums: list[float] = []
        seen: list[tuple[float, float]] = []

    Stubs.seen = []

    def epoch(model, dataset, optimizer, scheduler, scaler, **options):
        group = optimizer.param_groups[0]
        Stubs.seen.append((group["lr"], group["weight_decay"]))
        return {"loss": 1.0, "pairs_per_second": 1.0, "seconds": 1.0, "wait_share": 0.0}

    def evaluate(model, dataset):
        names = [f"{d}_{m}" for d in ("image_to_text", "text_to_image")
                 for m in ("R@1", "R@5", "R@10", "median_rank", "mean_rank")]
        return {**dict.fromkeys(names, 1.0), "rsum": Stubs.rsums.pop(0)}

    monkeypatch.setattr(train, "train_one_epoch", epoch)
    monkeypatch.setattr(train, "evaluate_retrieval", evaluate)
    monkeypatch.setattr(train, "plot_curves", lambda *_: None)
    monkeypatch.setattr(train, "plot_examples", lambda *_: None)
    return Stubs


def read_log(results: Path) -> list[dict]:
    """The epochs of log.jsonl without what the clock says."""
    lines = [json.loads(line) for line in (results / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def load(path: Path) -> dict:
    """A file of tensors and plain values."""
    return torch.load(path, weights_only=True)


def differing(a: object, b: object, where: str = "") -> list[str]:
    """The places where two nests of plain values and tensors differ in any bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{where}/{key}" for key in a.keys() ^ b.keys()]
        return missing + [place for key in a.keys() & b.keys()
                          for place in differing(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for i, pair in enumerate(zip(a, b, strict=True))
                for place in differing(*pair, f"{where}/{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


# train.py


def test_train_writes_all_that_it_promises(run, trained):
    """Two checkpoints, the log, the arguments, two pictures and the list of rejected input."""
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert files == {BEST, LAST, "log.jsonl", "args.json", "curves.png", "examples.png",
                     "rejected.csv"}
    best = load(trained / BEST)
    assert {"model_state", "vocab", "config", "metrics", "epoch", "args"} <= best.keys()
    assert best["vocab"]["<pad>"] == 0 and best["vocab"]["<unk>"] == 1
    arguments = json.loads((trained / "args.json").read_text())
    assert arguments == best["args"]
    assert (arguments["lr"], arguments["images"]) == (1e-3, str(run.images))
    (line,) = read_log(trained)
    assert line["epoch"] == 1 and line["lr"] == 1e-3 and line["loss"] > 0
    assert line["steps"] == 9 * 3 // 4  # 9 photos train, each three times: 2 + 2 + 1 captions
    assert best["metrics"] == {name: line[name] for name in best["metrics"]}
    for name in ("curves.png", "examples.png"):
        assert load_image(trained / name).width > 500
    assert (trained / "rejected.csv").read_text() == "kind,where,name,reason,text\n"


def test_resumed_equals_uninterrupted(run, trained):
    """One epoch and another after --resume end in the same bits as two in one go."""
    run.copy("one", "resumed")
    resumed, straight = run("resumed", "--resume", epochs=2), run("straight", epochs=2)
    assert read_log(resumed) == read_log(straight)
    a, b = load(resumed / LAST), load(straight / LAST)
    for part in ("model_state", "optimizer_state", "scaler_state", "vocab", "config", "metrics"):
        assert differing(a[part], b[part], part) == []
    bests = [load(results / BEST)["model_state"] for results in (resumed, straight)]
    assert differing(*bests) == []
    assert differing(a["model_state"], load(trained / LAST)["model_state"]) != []  # it went on


def test_a_run_stopped_in_mid_epoch_goes_on_as_if_it_had_not(run, monkeypatch):
    """Ctrl-C in the second epoch, --resume, a schedule of the whole run: the same bits again."""
    recipe = ("--captions-per-image", "5", "--schedule", "cosine", "--warmup-steps", "3")
    straight = run("whole", *recipe, epochs=2)
    original = train.train_one_epoch

    def stop(*args, epoch: int, **options):
        if epoch == 2:
            raise KeyboardInterrupt
        return original(*args, epoch=epoch, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_one_epoch", stop)
        run("stopped", *recipe, epochs=2)
    assert len(read_log(run.folder / "stopped")) == 1
    resumed = run("stopped", *recipe, "--resume", epochs=2)
    assert read_log(resumed) == read_log(straight)
    a, b = load(resumed / LAST), load(straight / LAST)
    assert differing(a["model_state"], b["model_state"]) == []
    assert differing(a["optimizer_state"], b["optimizer_state"]) == []


def test_the_best_epoch_is_by_rsum_and_not_forgotten(run, stubs):
    """Only a higher rsum replaces the best file: not a later, an equal, or a resumed epoch."""
    stubs.rsums = [100.0, 300.0, 300.0]
    results = run("best", epochs=3)
    assert load(results / BEST)["epoch"] == 2
    stubs.rsums = [299.0]
    run("best", "--resume", epochs=4)
    assert (load(results / BEST)["epoch"], load(results / LAST)["epoch"]) == (2, 4)
    stubs.rsums = [301.0]
    run("best", "--resume", epochs=5)
    assert load(results / BEST)["epoch"] == 5
    assert load(results / BEST)["metrics"]["rsum"] == 301
    assert [line["rsum"] for line in read_log(results)] == [100, 300, 300, 299, 301]


def test_a_worthless_first_epoch_is_kept_all_the_same(run, stubs):
    """An rsum of 0 is the best so far: there is always a best file."""
    stubs.rsums = [0.0, 0.0]
    assert load(run("worthless", epochs=2) / BEST)["epoch"] == 1


def test_resume_takes_the_rate_and_decay_that_it_is_given(run, stubs):
    """--resume --lr goes on with that rate, as the message of a run that diverged advises."""
    stubs.rsums = [1.0, 2.0]
    run("rate", "--lr", "1e-3", "--weight-decay", "0.1", epochs=1)
    results = run("rate", "--resume", "--lr", "1e-5", "--weight-decay", "0.2", epochs=2)
    assert stubs.seen == [(1e-3, 0.1), (1e-5, 0.2)]
    assert [line["lr"] for line in read_log(results)] == [1e-3, 1e-5]


def test_resuming_a_finished_run_changes_nothing(run, trained, stubs):
    """Where no epoch is left the log and both checkpoints stay byte for byte."""
    run.copy("one", "finished")
    results = run("finished", "--resume", epochs=1)
    assert stubs.seen == []
    for name in (BEST, LAST, "log.jsonl"):
        assert (results / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("flags", [
    ("--min-freq", "30"), ("--embed-dim", "8"), ("--seed", "1"), ("--max-images", "8"),
], ids=" ".join)
def test_resume_refuses_another_model_or_vocabulary(run, trained, stubs, flags):
    """Other sizes or other train captions are another run: refused, and nothing is overwritten."""
    before = {path: path.read_bytes() for path in (trained / "models").iterdir()}
    with pytest.raises(UserError, match="another (model or vocabulary|split)"):
        run("one", "--resume", *flags, epochs=2)
    assert stubs.seen == []
    assert {path: path.read_bytes() for path in (trained / "models").iterdir()} == before


def test_resume_of_nothing_is_refused(run, stubs):
    """--resume never starts from scratch in silence."""
    with pytest.raises(UserError, match="flickr30k_clip_last.pth, and there is none"):
        run("nothing", "--resume")
    assert stubs.seen == []


def test_max_images(run, stubs, capsys):
    """--max-images takes that many photos, of both splits."""
    stubs.rsums = [1.0]
    run("few", "--max-images", "8")
    out = capsys.readouterr().out
    assert "train: 6 photos, 30 captions" in out and "validation: 2 photos, 10 captions" in out


def test_results_that_cannot_be_written_are_told_before_any_work(run, tmp_path):
    """A file where the results should go is told at once: nothing is decoded, nothing trained."""
    (tmp_path / "results").write_text("in the way")
    with pytest.raises(UserError, match="cannot write results.*--results-dir"):
        train.main([*run.data, *MODEL, "--cache-dir", str(tmp_path / "cache"),
                    "--results-dir", str(tmp_path / "results"), "--weights", "none"])
    assert not (tmp_path / "cache").exists()


def test_too_few_photos_to_validate(run):
    """With one validation photo every recall would be 100 %: refused."""
    with pytest.raises(UserError, match="1 photos are too few for validation"):
        run("lonely", "--val-fraction", "0.05")


def test_weights_that_are_not_there(run):
    """--weights with a path of nothing names it."""
    with pytest.raises(UserError, match="there is no file nowhere.pth"):
        run("weightless", "--weights", "nowhere.pth")


def test_the_defaults_are_the_stated_recipe():
    """AdamW at 2e-5, batches of 64, 5 epochs, 90/10, ImageNet's B0, 256 dimensions."""
    args = vars(train.parse_args([]))
    assert {name: args[name] for name in (
        "lr", "batch_size", "epochs", "val_fraction", "weights", "image_encoder", "embed_dim",
        "context_length", "min_freq", "image_size", "schedule", "warmup_steps", "flip",
        "captions_per_image", "max_images", "resume", "demo", "seed", "drop_connect",
    )} == {
        "lr": 2e-5, "batch_size": 64, "epochs": 5, "val_fraction": 0.1, "weights": "imagenet",
        "image_encoder": "efficientnet-b0", "embed_dim": 256, "context_length": 32, "min_freq": 2,
        "image_size": 224, "schedule": "constant", "warmup_steps": 0, "flip": True,
        "captions_per_image": 1, "max_images": None, "resume": False, "demo": False, "seed": 0,
        "drop_connect": 0.2,
    }
    assert args["weight_decay"] > 0 and args["dropout"] > 0


@pytest.mark.parametrize("argv", [
    ["--demo", "--epochs", "1", "--lr", "2e-5", "--flip"],
    ["--lr", "2e-5", "--epochs", "1", "--flip", "--demo"],
])
def test_a_flag_beats_the_demo(argv):
    """--demo brings its own defaults; what is given counts, even where it is the usual default."""
    args = vars(train.parse_args(argv))
    assert (args["epochs"], args["lr"], args["flip"]) == (1, 2e-5, True)
    others = train.DEMO.keys() - {"epochs", "lr", "flip"}
    assert {name: args[name] for name in others} == {name: train.DEMO[name] for name in others}
    assert vars(train.parse_args(["--demo"])).items() >= train.DEMO.items()


@pytest.mark.parametrize("argv", [
    ["--epochs", "0"], ["--batch-size", "-1"], ["--lr", "0"], ["--lr", "nan"], ["--lr", "inf"],
    ["--val-fraction", "1"], ["--dropout", "1.5"], ["--max-images", "0"], ["--schedule", "linear"],
    ["--image-encoder", "resnet50"], ["--weight-decay", "-0.1"], ["--weight-decay", "nan"],
    ["--warmup-steps", "-1"],
], ids=" ".join)
def test_values_without_sense_are_refused(argv, capsys):
    """A value that cannot be meant ends in argparse's message, which names its flag."""
    with pytest.raises(SystemExit) as caught:
        train.parse_args(argv)
    assert caught.value.code == 2
    assert argv[0] in capsys.readouterr().err


# main.py


@pytest.fixture
def check(tiny_data):
    """main.py on tiny data of this test's own: a function of further flags, giving its status."""
    images, annotations = tiny_data

    def run_main(*flags: str) -> int:
        return main_script.main(["--images", str(images), "--annotations", str(annotations),
                                 "--val-fraction", "0.25", "--image-size", "32",
                                 "--batch-size", "8", *flags])
    return run_main


def test_sanity_check_of_good_data(check, capsys):
    """Status 0, and every question has its answer."""
    assert check() == 0
    out = capsys.readouterr().out
    for part in ("60 rows in the format of results.csv: 0 recovered, 0 rejected",
                 "12 with captions (12 with 5); 0 missing, 0 files unused",
                 "by image, from seed and file names: train 9, val 3",
                 "0 byte-identical photos", "% are cut to 32", "words from train captions",
                 "images (8, 3, 32, 32), tokens (8, 32) -> embeddings (8, 256), (8, 256)",
                 "ln(8) = 2.079", "all is well"):
        assert part in out


@pytest.mark.parametrize("seed", range(3))
def test_untrained_loss_is_near_ln_batch(check, capsys, seed):
    """Whatever the seed, an untrained model's loss is near ln(8), and not exactly there."""
    assert check("--seed", str(seed)) == 0
    loss = float(capsys.readouterr().out.split("loss ")[1].split()[0])
    assert 0 < abs(loss - 2.079) < 1


def break_data(kind: str, images: Path, annotations: Path) -> str:
    """Do some harm to good data; returns what main.py is to say."""
    names = sorted(path.name for path in images.iterdir())
    if kind == "photo missing":
        (images / names[3]).unlink()
        return "1 photos are missing from"
    if kind == "row rejected":
        with open(annotations, "a") as file:
            file.write("this is no row\n")
        return "1 caption rows were rejected"
    if kind == "photo unreadable":
        for name in names:
            (images / name).write_bytes(b"not a photo")
        return "1000.png cannot be read"
    rows = annotations.read_text().splitlines()[1:]
    if kind == "no words":
        annotations.write_text("".join(f"{row.rsplit('|', 1)[0]}| ...\n" for row in rows))
        return "the vocabulary has no words"
    split = {"only train": "train", "only test": "test"}[kind]
    photos = [{"filename": name, "split": split, "sentences": [{"raw": "A dog runs ."}]}
              for name in names]
    annotations.write_text(json.dumps({"images": photos}))
    return "there are no val photos"


@pytest.mark.parametrize("kind", ["photo missing", "row rejected", "photo unreadable", "no words",
                                  "only train", "only test"])
def test_sanity_check_of_bad_data(check, tiny_data, capsys, kind):
    """Status 1, and what is wrong stands at the end, after a run that goes through to there."""
    complaint = break_data(kind, *tiny_data)
    assert check() == 1
    out = capsys.readouterr().out
    assert "all is well" not in out
    assert complaint in out.split("\nwrong:\n")[1]


def test_photos_on_both_sides_are_counted(check, tiny_data, capsys):
    """A validation photo whose very bytes are trained on is named; one of equal size is not."""
    photos = sorted(tiny_data[0].glob("*.png"))
    longest = max(path.stat().st_size for path in photos)
    for path in photos:
        path.write_bytes(path.read_bytes().ljust(longest, b"\0"))
    check()
    assert "0 byte-identical photos" in capsys.readouterr().out
    for path in photos:
        path.write_bytes(photos[0].read_bytes())
    check()
    assert "1 byte-identical photos stand on both sides: 1000.png = 1002.png" in \
        capsys.readouterr().out


# train_image_only.py


def test_export_of_the_best_epoch(trained, capsys):
    """The exported encoder lies beside the checkpoint and holds its very weights."""
    assert train_image_only.main(["--results-dir", str(trained)]) == 0
    exported = load(trained / EXPORT)
    (trained / EXPORT).unlink()  # other tests compare this folder
    assert "exported efficientnet-b0 of epoch 1" in capsys.readouterr().out
    model, _, _ = load_checkpoint(trained / BEST)
    assert differing(exported["backbone_state"],
                     dict(model.image_encoder.backbone.state_dict())) == []
    assert torch.equal(exported["projection"], model.image_projection.linear.weight)


def test_export_elsewhere(trained, tmp_path):
    """--checkpoint and --output name other files."""
    output = tmp_path / "new" / "encoder.pth"
    assert train_image_only.main(["--checkpoint", str(trained / LAST), "--output",
                                  str(output)]) == 0
    assert load(output)["kind"] == "image encoder"
    with pytest.raises(UserError, match="encoder.pth holds image encoder"):
        train_image_only.main(["--checkpoint", str(output), "--output", str(tmp_path / "x.pth")])


# As programs


def run_program(monkeypatch, capsys, script: str, *argv: str) -> tuple[int, str]:
    """A script as `python script.py argv` runs it: its exit status and standard error."""
    monkeypatch.setattr("sys.argv", [script, *argv])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(Path(train.__file__).with_name(script)), run_name="__main__")
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize("script", ["main.py", "train.py"])
def test_missing_data_is_one_message(monkeypatch, capsys, tmp_path, script):
    """Without data: status 2, and a message that says where to put what and names --demo."""
    monkeypatch.chdir(tmp_path)
    status, error = run_program(monkeypatch, capsys, script)
    assert status == 2
    assert error.startswith("error: there is no caption file at data/flickr30k/annotations")
    assert error.count("error") == 1 and "Traceback" not in error
    for part in ("data/flickr30k/images/*.jpg", "--data-dir", "--annotations FILE", "--demo"):
        assert part in error


def test_missing_checkpoint_is_one_message(monkeypatch, capsys, tmp_path):
    """Nothing trained yet: status 2 and the path that was looked for."""
    monkeypatch.chdir(tmp_path)
    status, error = run_program(monkeypatch, capsys, "train_image_only.py")
    assert status == 2
    assert error == f"error: there is no file {Path('results') / BEST}\n"


@pytest.mark.parametrize("script", ["main.py", "train.py", "train_image_only.py"])
def test_help_can_be_printed(monkeypatch, capsys, script):
    """--help shows the file's own text; no percent sign of a help text trips argparse."""
    status, error = run_program(monkeypatch, capsys, script, "--help")
    assert (status, error) == (0, "")


def test_exit_status_of_a_program(capsys):
    """0 or main's own, 2 for a user's mistake, 130 for Ctrl-C; our own bugs keep a traceback."""
    def fail(error: BaseException):
        raise error

    for main, status in ((lambda: 0, 0), (lambda: 1, 1), (lambda: fail(UserError("mend it")), 2),
                         (lambda: fail(KeyboardInterrupt()), 130)):
        with pytest.raises(SystemExit) as caught:
            run_script(main)
        assert caught.value.code == status
    assert capsys.readouterr().err == "error: mend it\n\nstopped\n"
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 // 0)
