"""A dual encoder with BERT from train.py to search.py, on tiny data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import search
import train
import train_image_only
from src.data.dataset import Flickr30kDataset
from src.data.loader import sample_batches
from src.data.pixel_store import PixelStore
from src.data.source import scan_dataset
from src.embedder import Embedder
from src.evaluation.embed import embed_tokens, evaluate_retrieval
from src.models.bert import BertEncoder
from src.models.checkpoint import load_checkpoint
from src.search.query import BertTexts, embed_texts
from src.training import engine
from src.training.engine import forward_backward
from src.training.frozen_features import freeze_texts
from src.training.optim import build_optimizer
from src.utils.errors import UserError
from src.utils.runtime import grad_scaler
from tests.compare import differences
from tests.tiny_bert import make_model, make_tiny_bert
from tests.tiny_data import make_tiny_data

transformers = pytest.importorskip("transformers")

BEST, LAST = "models/flickr30k_clip_best.pth", "models/flickr30k_clip_last.pth"


class Run:
    """Run train.py with a tiny BERT, each time with its own results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bert = make_tiny_bert(folder / "bert")
        self.images, self.annotations = make_tiny_data(folder / "data")
        self.data = ["--images", str(self.images), "--annotations", str(self.annotations)]

    def __call__(self, results: str, *flags: str) -> Path:
        """Train for two epochs with `flags`, and return the results folder."""
        assert train.main([
            *self.data, "--results-dir", str(self.folder / results), "--text-encoder", "bert",
            "--text-weights", str(self.bert), "--context-length", "12", "--image-size", "32",
            "--embed-dim", "16", "--weights", "none", "--val-fraction", "0.25", "--batch-size", "4",
            "--captions-per-image", "2", "--epochs", "2", "--lr", "1e-3", "--device", "cpu",
            *flags]) == 0
        return self.folder / results


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tiny data and a tiny BERT for all runs of this module."""
    return Run(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def trained(run: Run) -> Path:
    """The results folder of a run of two epochs, whose BERT is gone."""
    copy = shutil.copytree(run.bert, run.folder / "deleted")
    results = run("trained", "--text-encoder-lr", "1e-2", "--text-weights", str(copy))
    shutil.rmtree(copy)
    return results


def states(results: Path) -> list[dict]:
    """Return what both checkpoints of a run hold, except times and flags."""
    contents = [torch.load(results / name, weights_only=True) for name in (BEST, LAST)]
    return [{part: value for part, value in content.items() if part not in ("args", "log")}
            for content in contents]


def dataset_of(run: Run, tokenizer) -> Flickr30kDataset:
    """Return all images of the run with random features."""
    records = scan_dataset(run.images, [run.annotations], 0, 0).splits["train"]
    store = PixelStore(np.empty((len(records), 0, 0, 3), np.uint8),
                       {record.name: i for i, record in enumerate(records)}, {})
    features = torch.randn(len(records), 1280, generator=torch.Generator().manual_seed(0))
    return Flickr30kDataset(records, store, tokenizer).with_images(features)


def test_training_changes_the_whole_bert(run, trained):
    """Every tensor of it that captions use is trained."""
    state = torch.load(trained / BEST, weights_only=True)["model_state"]
    model, _ = make_model(run.bert)
    same = {name for name, value in model.state_dict().items()
            if name.startswith("text_encoder.") and torch.equal(value, state[name])}
    # Softmax does not depend on the bias of the keys, and its gradient is rounding.
    assert {name for name in same if "key.bias" not in name} == set()


def test_a_killed_run_resumes_to_the_same_bits_without_the_folder(run, trained, monkeypatch):
    """The checkpoint holds all that a run needs; the run is killed within its first epoch."""
    copy = shutil.copytree(run.bert, run.folder / "deleted too")

    class PowerCut(BaseException):
        """An end of the process without cleaning up."""

    steps = []

    def epoch(*args, after_step, **options):
        def cut(progress):
            steps.append(progress.step)
            if len(steps) == 2:
                raise PowerCut
            return after_step(progress)

        engine.train_one_epoch(*args, after_step=cut, **options)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(train, "train_one_epoch", epoch)
        run("killed", "--text-encoder-lr", "1e-2", "--save-every", "0",
            "--text-weights", str(copy))
    shutil.rmtree(copy)
    results = run.folder / "killed"
    assert train.main(["--resume", "--results-dir", str(results)]) == 0
    assert differences(states(results), states(trained)) == []


def test_a_resumed_run_takes_another_learning_rate_of_its_bert(run, trained, capsys):
    """Its flags are the defaults: those of BERT need no --text-encoder bert."""
    results = shutil.copytree(trained, run.folder / "longer")
    assert train.main(["--resume", "--results-dir", str(results), "--epochs", "3",
                       "--text-encoder-lr", "1e-4"]) == 0
    assert "--text-encoder-lr was 0.01, is 0.0001" in capsys.readouterr().err
    last = torch.load(results / LAST, weights_only=True)
    assert sorted({group["initial_lr"] for group in last["optimizer_state"]["param_groups"]}) \
        == [1e-4, 1e-3]


def test_evaluation_gives_the_metrics_of_training(trained, capsys):
    """evaluate.py computes from the file what training computed."""
    assert evaluate.main(["--results-dir", str(trained), "--device", "cpu",
                          "--mistakes", str(trained / "mistakes.png")]) == 0
    report = json.loads((trained / "evaluation_val.json").read_text())
    metrics = torch.load(trained / BEST, weights_only=True)["metrics"]
    assert {name: report[name] for name in metrics} == pytest.approx(metrics)
    assert "bag of words" not in capsys.readouterr().out


def search_json(capsys, trained: Path, *argv: str) -> list[dict]:
    """Run search.py --json and return its answers."""
    capsys.readouterr()
    assert search.main([*argv, "--json", "--results-dir", str(trained), "--device", "cpu"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_search_has_the_scores_of_the_model(run, trained, capsys):
    """Texts, a photo and a sheet: the scores are those of the model's embeddings."""
    model, tokenizer, _ = load_checkpoint(trained / BEST)
    paths = sorted(run.images.iterdir())
    images = Embedder(trained / BEST, "cpu").images(paths)
    text = "a red thing near a dog"
    [answer] = search_json(capsys, trained, text, "--top", "12", "--duplicates", "--sheet",
                           str(trained / "s.png"))
    scores = embed_tokens(model, tokenizer.encode([text]))[0].numpy() @ images.T
    assert {result["path"]: result["score"] for result in answer["results"]} == pytest.approx(
        {str(path): score for path, score in zip(paths, scores.tolist(), strict=True)}, abs=1e-5)
    assert (trained / "s.png").stat().st_size > 1000
    [similar] = search_json(capsys, trained, "--image", str(paths[0]), "--top", "3")
    assert len(similar["results"]) == 3 and len(similar["captions"]) == 5
    assert not (trained / "index" / "words.json").exists()


def test_a_words_contribution_is_the_score_without_it(run, trained, capsys):
    """Also of a word to avoid; --explain says that there is no sum."""
    embedder = Embedder(trained / BEST, "cpu")
    [answer] = search_json(capsys, trained, "red thing -blue", "--top", "2")
    image = embedder.images([answer["results"][0]["path"]])[0]
    contributions = dict(answer["results"][0]["word_contributions"])
    full, *without = embedder.texts(["red thing -blue", "thing -blue", "red -blue", "red thing"])
    expected = {word: (full - other) @ image
                for word, other in zip(["red", "thing", "-blue"], without, strict=True)}
    assert contributions == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, expected.values())) > 1e-3
    red, blue = embedder.texts(["red thing", "blue"])
    assert full == pytest.approx((red - blue) / np.linalg.norm(red - blue), abs=1e-5)
    [single] = search_json(capsys, trained, "red", "--top", "1")
    assert single["results"][0]["word_contributions"][0][1] == pytest.approx(
        single["results"][0]["score"], abs=1e-5)
    assert search.main(["red", "--explain", "--results-dir", str(trained), "--device", "cpu"]) == 0
    assert "do not sum to the score" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "message"), [
    (["--page", "page"], "bag of words"), (["--serve"], "bag of words"),
    (["red", "--word-vectors", __file__], "bag of words"),
    (["zebra"], "no word of 'zebra' is known"), (["red -"], ""),
    (["zebra -red"], "words to avoid need a word"),
], ids=" ".join)
def test_what_rests_on_a_bag_of_words_is_refused(trained, argv, message):
    """Each is one message with the reason; a lonely minus sign is a character like others."""
    command = ["--results-dir", str(trained), "--device", "cpu", *argv]
    if not message:
        assert search.main(command) == 0
        return
    with pytest.raises(UserError, match=message):
        search.main(command)


def test_texts_from_python(trained, capsys):
    """Embedder.texts embeds what search.py does; texts beyond the positions are cut."""
    embedder = Embedder(trained / BEST, "cpu")
    texts = ["a dog chases a man", "a man chases a dog", "red " * 40, "red " * 50]
    found = embedder.texts(texts)
    assert found.shape == (4, 16) and found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    assert abs(found[0] - found[1]).max() > 1e-3  # a bag of words has the same numbers
    assert found[2] == pytest.approx(found[3], abs=1e-6)
    assert embedder.texts([]).shape == (0, 16)
    with pytest.raises(UserError, match="no word of 'zebra'"):
        embedder.texts(["dog", "zebra"])
    capsys.readouterr()
    assert isinstance(embedder._texts, BertTexts)
    embedder._texts.embed_queries(["red " * 40])
    assert "only the first 24 tokens" in capsys.readouterr().err
    assert embed_texts(embedder._texts, ["dog"]).shape == (1, 16)


def test_the_image_encoder_is_exported(trained):
    """train_image_only.py takes the images' half of the checkpoint."""
    assert train_image_only.main(["--results-dir", str(trained)]) == 0
    saved = torch.load(trained / "models/image_encoder_from_clip.pth", weights_only=True)
    assert saved["projection"].shape == (16, 1280)


def test_frozen_texts(run, monkeypatch):
    """--freeze-text-encoder trains all but BERT, on features that are computed once, and gives the
    same metrics as the encoder itself."""
    computed = []
    encode = BertEncoder.forward

    def forward(self, tokens):
        computed.append(len(tokens))
        return encode(self, tokens)

    monkeypatch.setattr(BertEncoder, "forward", forward)
    flags = ("--freeze-text-encoder", "--freeze-image-encoder", "--cache-dir",
             str(run.folder / "cache"))
    first = run("frozen", *flags)
    captions = sorted(computed)[-2:]
    assert sum(captions) == 60 and sum(n > 6 for n in computed) == 2  # the others: examples.png
    computed.clear()
    second = run("frozen again", *flags)
    assert all(n <= 6 for n in computed)
    assert differences(states(first), states(second)) == []
    fresh, _ = make_model(run.bert)
    state = torch.load(first / LAST, weights_only=True)["model_state"]
    for name, value in fresh.state_dict().items():
        assert not name.startswith("text_encoder.") or torch.equal(value, state[name])
    best = torch.load(first / BEST, weights_only=True)
    model, tokenizer, _ = load_checkpoint(first / BEST)
    del computed[:]
    dataset = dataset_of(run, tokenizer)
    [frozen] = freeze_texts(run.folder / "cache", model.text_encoder, [dataset])
    assert evaluate_retrieval(model, frozen) == pytest.approx(evaluate_retrieval(model, dataset))
    assert best["metrics"]["rsum"] > 0


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_chunks_give_the_gradient_of_the_whole_batch(run, chunk_size):
    """With the images of a batch in chunks, the loss and every gradient are the same."""
    def gradients(size: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model, tokenizer = make_model(run.bert, dropout=0.0)
        model.train()
        for module in model.text_encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        dataset = dataset_of(run, tokenizer)
        batch = dataset.batch(sample_batches(dataset, 5, 2, 0, 1)[0])
        loss = forward_backward(model, grad_scaler(torch.device("cpu")), batch, flip=False,
                                key=(0, 1, 0), chunk_size=size)
        return loss, {name: p.grad for name, p in model.named_parameters()
                      if p.grad is not None}

    loss, expected = gradients(None)
    its_loss, found = gradients(chunk_size)
    torch.testing.assert_close(its_loss, loss)
    assert found.keys() == expected.keys()
    assert sum(name.startswith("text_encoder.") for name in expected) > 20
    for name, gradient in expected.items():
        scale = gradient.abs().max().item() + 1e-3  # that of the keys' biases is rounding
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3 * scale)


def test_bert_has_its_own_learning_rate(run):
    """Each parameter is in one group; biases and LayerNorm do not decay."""
    model, _ = make_model(run.bert)
    optimizer = build_optimizer(model, 1.0, 0.1, 2.0, 3.0)
    rates = {id(p): (group["lr"], group["weight_decay"])
             for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        rate = {"image_encoder": 2.0, "text_encoder": 3.0}.get(name.split(".")[0], 1.0)
        assert rates[id(parameter)] == (rate, 0.1 if parameter.ndim >= 2 else 0.0)
    assert {group["lr"] for group in build_optimizer(model, 1.0, 0.1).param_groups} == {1.0}


@pytest.mark.parametrize(("argv", "flag"), [
    (["--text-weights", "x"], "--text-weights needs --text-encoder bert"),
    (["--text-pooling", "cls"], "--text-pooling"), (["--text-encoder-lr", "1"], "-lr needs"),
    (["--freeze-text-encoder"], "--freeze-text-encoder"),
    (["--text-encoder", "bert", "--min-freq", "7"], "--min-freq needs --text-encoder words"),
    (["--text-encoder", "bert", "--token-dim", "7"], "--token-dim"),
    (["--text-encoder", "bert", "--word-dropout", "0.7", "--recipe", "strong"], "--word-dropout"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_flags_of_the_other_text_encoder_are_refused(argv, flag):
    """No flag is ignored in silence."""
    with pytest.raises(UserError, match=flag):
        train.parse_args(argv)
