"""The quality study: all rows train, and the rows of the recipes equal train.py."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from benchmarks import finetune, quality
from benchmarks.quality_data import Data
from benchmarks.quality_model import WeightedTextEncoder, build_model, row_loss
from benchmarks.quality_rows import BASELINE, NAIVE, ROWS, STRONG, Row
from src.data.captions import read_annotations
from src.data.dataset import Flickr30kDataset
from src.data.loader import sample_batches
from src.data.pixel_store import PixelStore
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.image_encoder import ImageEncoder
from src.models.loss import contrastive_loss
from src.models.text_encoder import TextEncoder
from src.training.engine import Progress, train_one_epoch
from src.training.optim import build_optimizer, build_schedule
from src.training.recipes import RECIPES
from src.utils.errors import UserError
from src.utils.runtime import grad_scaler, seed_all
from tests.tiny_data import make_tiny_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Nine images to train on and three to validate, with random features."""
    folder = tmp_path_factory.mktemp("quality")
    images, annotations = make_tiny_data(folder / "data")
    records = read_annotations(annotations).records
    store = PixelStore.build(folder, images, [record.name for record in records], 34)
    seed_all(0, "weights")
    records = {"train": records[:9], "val": records[9:]}
    features = {(split, view): torch.randn(len(records[split]), 1280)
                for split in records for view in ("center", "flip")}
    return Data(records, store, ImageEncoder("efficientnet-b0", 32), folder, features)


def tiny(row: Row) -> Row:
    """Return the row with one short epoch."""
    return replace(row, epochs=1, batch_size=4)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_trains(row: Row, data: Data) -> None:
    """One epoch gives finite metrics, including all columns of the table."""
    metrics = quality.train_row(tiny(row), data, seed=0)
    assert all(math.isfinite(metrics[column]) for column in quality.COLUMNS)
    assert 0 <= metrics["rsum"] <= 600


def test_rows_differ() -> None:
    """All names and all settings are different."""
    assert len({row.name for row in ROWS}) == len(ROWS)
    settings = [quality.settings(row) for row in ROWS]
    assert all(settings.count(each) == 1 for each in settings)


def test_a_seed_gives_the_same_run(data: Data) -> None:
    """The same seed gives the same metrics; another seed gives other weights."""
    row = tiny(STRONG)
    one, two = (quality.train_row(row, data, seed=1) for _ in range(2))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    train_set, _, n_words = data.datasets(row)
    first, second = (build_model(row, train_set, n_words, seed) for seed in (1, 2))
    assert not torch.equal(first.image_projection.linear.weight,
                           second.image_projection.linear.weight)


@pytest.mark.parametrize("row", [BASELINE, STRONG], ids=lambda row: row.name)
def test_recipe_rows_have_the_values_of_the_recipes(row: Row) -> None:
    """All settings that rows and recipes share are equal; a row has the epochs of the heads."""
    recipe = dict(RECIPES[row.name])
    recipe["epochs"] = recipe["head_epochs"] or recipe["epochs"]
    # Frozen features are not flipped, and a moving average of so few steps changes nothing.
    settings = {name: value for name, value in asdict(row).items()
                if name in recipe and name not in ("flip", "ema_decay")}
    assert settings == {name: recipe[name] for name in settings} and len(settings) > 10


@pytest.mark.parametrize("base", [BASELINE, STRONG], ids=lambda row: row.name)
def test_recipe_rows_equal_train(
    base: Row, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine, optimizer and schedule of train.py end at the same weights."""
    row = tiny(base)
    trained = []
    monkeypatch.setattr(quality, "evaluate_retrieval",
                        lambda model, _: trained.append(model) or {})
    quality.train_row(row, data, seed=3)
    train_set, _, n_words = data.datasets(row)
    train_set = train_set.with_images(data.features("train", "mean" if row.flip_tta else "center"))
    model = build_model(row, train_set, n_words, seed=3)
    optimizer = build_optimizer(model, row.lr, row.weight_decay)
    steps = len(sample_batches(train_set, row.batch_size, row.captions_per_image, 3, 1))
    scheduler = build_schedule(optimizer, row.warmup_steps, steps, row.schedule)
    train_one_epoch(model, train_set, optimizer, scheduler, grad_scaler(CPU), flip=False,
                    batch_size=row.batch_size, seed=3, epoch=1,
                    captions_per_image=row.captions_per_image)
    ours = dict(trained[0].named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("image_encoder"):
            torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=row.lr * 1e-2)


def test_the_naive_row(data: Data) -> None:
    """N(0, 1) words of 256, a hidden ReLU layer, biases, logit_scale 1, no dropout."""
    train_set, _, n_words = data.datasets(NAIVE)
    model = build_model(NAIVE, train_set, n_words, seed=0)
    words = model.text_encoder.embedding.weight
    assert words.shape == (n_words, 256) and words[0].eq(0).all()
    assert words[1:].std().item() == pytest.approx(1, abs=0.05) and words[1].ne(0).all()
    spread = build_model(replace(BASELINE, token_std=0.02), train_set, n_words, seed=0)
    assert spread.text_encoder.embedding.weight[:2].eq(0).all()  # as in TextEncoder
    first, relu, last = model.text_projection.linear
    assert isinstance(relu, torch.nn.ReLU)
    for layer in (first, last, model.image_projection.linear):
        assert layer.bias is not None and layer.weight.abs().max() <= layer.in_features**-0.5
    assert model.logit_scale.exp().item() == pytest.approx(math.e)
    assert model.text_projection.dropout.p == model.image_projection.dropout.p == 0
    assert NAIVE.lr == 2e-5 and NAIVE.batch_size == 64 and NAIVE.epochs == 5
    assert NAIVE.captions_per_image == 1 and NAIVE.schedule == "constant" and not NAIVE.word_dropout


def test_losses_are_infonce_without_their_term() -> None:
    """Nearly no smoothing, hinge or weight is InfoNCE; equal negatives have weight 1."""
    seed_all(0, "weights")
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 8)) for n in (4, 8))
    index = torch.arange(4).repeat_interleave(2)
    model = torch.nn.Module()
    model.logit_scale = torch.tensor(2.0)
    expected = contrastive_loss(images, texts, index, model.logit_scale)
    for switch in ("label_smoothing", "hinge", "hard_negatives"):
        found = row_loss(replace(BASELINE, **{switch: 1e-7}), model, images, texts, index)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        changed = row_loss(replace(BASELINE, **{switch: 0.5}), model, images, texts, index)
        assert abs(changed - expected) > 1e-3
    same = images[:1].expand(4, 8), images[:1].expand(8, 8), index
    torch.testing.assert_close(row_loss(replace(BASELINE, hard_negatives=0.5), model, *same),
                               contrastive_loss(*same, model.logit_scale))


def test_weights_of_one_are_the_mean() -> None:
    """With all weights 1 the weighted bag of words equals TextEncoder."""
    config = ModelConfig(20, token_dim=6)
    weighted = WeightedTextEncoder(config, torch.ones(20))
    plain = TextEncoder(20, 6)
    plain.load_state_dict({"embedding.weight": weighted.embedding.weight})
    tokens = torch.randint(2, 20, (5, 7))
    tokens[:, 4:] = 0
    tokens[0] = 0
    torch.testing.assert_close(weighted(tokens), plain(tokens))


def test_flip_features_are_those_of_flipped_images(data: Data) -> None:
    """'flip' is 'center' of a store of flipped images; 'mean' is the mean of both."""
    fresh, flipped = (replace(data, _features={}) for _ in range(2))
    flipped.store = PixelStore(data.store.pixels[:, :, ::-1].copy(), data.store.rows, {})
    center, flip = fresh.features("val", "center"), fresh.features("val", "flip")
    torch.testing.assert_close(flip, flipped.features("val", "center"))
    torch.testing.assert_close(fresh.features("val", "mean"), (center + flip) / 2)
    assert not torch.equal(center, flip)


def test_runs_are_not_trained_again(
    tmp_path: Path, tiny_data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second call prints the line of the first from the file alone."""
    images, annotations = tiny_data
    flags = ["--rows", "baseline", "--runs", str(tmp_path / "runs.jsonl"), "--weights", "none",
             "--image-size", "32", "--images", str(images), "--annotations", str(annotations)]
    assert quality.main([*flags, "--seeds", "2"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| `baseline` |") and "(2)" in line
    assert quality.main([*flags, "--seeds", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match="runs.jsonl holds runs on other features"):
        quality.main([*flags, "--image-encoder", "efficientnet-lite0"])


def test_fine_tuning_with_the_same_number_of_image_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows pass as many images through the image encoder; a second call trains nothing."""
    images, annotations = make_tiny_data(tmp_path / "data", n_images=40)
    passes = []
    original = train.train_one_epoch

    def count(model: DualEncoder, dataset: Flickr30kDataset, *args: object,
              **flags: object) -> Progress:
        progress = original(model, dataset, *args, **flags)
        frozen = dataset.take_images(np.zeros(1, np.int64)).ndim == 2
        passes.append((frozen, progress.pairs // flags["captions_per_image"]))
        return progress

    monkeypatch.setattr(train, "train_one_epoch", count)
    flags = ["--images", str(images), "--annotations", str(annotations), "--weights", "none",
             "--image-size", "32", "--runs", str(tmp_path / "runs"), "--seeds", "0",
             "--tuned-epochs", "5", "--rows"]
    tables = []
    for row in finetune.ROWS:
        passes.clear()
        for _ in range(2):
            finetune.main([*flags, row])
            tables.append(capsys.readouterr().out.splitlines()[-1])
        assert tables[-1] == tables[-2] and tables[-1].startswith(f"| `{row}` | ")
        assert sum(number for frozen, number in passes if not frozen) == 5 * 36
        log = tmp_path / "runs" / f"{row}-5-0" / "log.jsonl"
        assert len(log.read_text().splitlines()) == len(passes)
    naive = torch.load(tmp_path / "runs" / "naive-5-0" / "models" / "flickr30k_clip_best.pth",
                       weights_only=True)["model_state"]
    assert naive["text_encoder.embedding.weight"].std() == pytest.approx(1, abs=0.1)
