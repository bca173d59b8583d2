"""The study of quality: its rows train, its switches do what they say, the seed row is ours."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from benchmarks import finetune, quality
from benchmarks.quality_data import Data, read_features
from benchmarks.quality_model import WeighedWords, build_model, row_loss
from benchmarks.quality_rows import CROPS, PLAIN, ROWS, SEED, STRONG, Row
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
from src.utils.errors import UserError
from src.utils.runtime import grad_scaler, seed_all
from tests.tiny_data import make_tiny_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Nine photos to train on and three to validate, with features drawn at random."""
    folder = tmp_path_factory.mktemp("quality")
    images, annotations = make_tiny_data(folder / "data")
    records = read_annotations(annotations).records
    store = PixelStore.build(folder, images, [record.name for record in records], 34)
    seed_all(0, "weights")
    data = Data({"train": records[:9], "val": records[9:]}, store,
                ImageEncoder("efficientnet-b0", 32), folder)
    data.known = {(split, view): torch.randn(len(data.records[split]), 1280)
                  for split in data.records for view in CROPS}
    return data


def tiny(row: Row) -> Row:
    """The same row, short."""
    return replace(row, epochs=1, batch_size=4)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_trains(row: Row, data: Data) -> None:
    """An epoch of it gives finite metrics, all that the table shows among them."""
    metrics = quality.train_row(tiny(row), data, seed=0)
    assert all(math.isfinite(metrics[column]) for column in quality.COLUMNS)
    assert 0 <= metrics["rsum"] <= 600


def test_rows_differ() -> None:
    """No two have one name or one setting, and all but the two bases change something."""
    assert len({row.name for row in ROWS}) == len(ROWS)
    settings = [quality.settings(row) for row in ROWS]
    assert all(settings.count(each) == 1 for each in settings)


def test_a_seed_gives_the_same_run(data: Data) -> None:
    """The same seed the same metrics; another seed other weights."""
    row = tiny(STRONG)
    one, two = (quality.train_row(row, data, seed=1) for _ in range(2))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    train_set, _, n_words = data.sets(row)
    first, second = (build_model(row, train_set, n_words, seed) for seed in (1, 2))
    assert not torch.equal(first.image_projection.linear.weight,
                           second.image_projection.linear.weight)


@pytest.mark.parametrize("base", [SEED, STRONG], ids=lambda row: row.name)
def test_the_bases_are_the_products(base: Row, data: Data,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's own engine, optimizer and schedule end at the same weights."""
    row = tiny(base)
    trained = []
    monkeypatch.setattr(quality, "evaluate", lambda row, model, *_: trained.append(model) or {})
    quality.train_row(row, data, seed=3)
    train_set, _, n_words = data.sets(row)
    train_set = train_set.with_images(data.features("train", "centre"))
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


def test_the_plain_row_is_what_a_student_writes(data: Data) -> None:
    """N(0, 1) words of 256, a hidden ReLU layer, biases, scale e, nothing dropped, no recipe."""
    train_set, _, n_words = data.sets(PLAIN)
    model = build_model(PLAIN, train_set, n_words, seed=0)
    words = model.text_encoder.embedding.weight
    assert words.shape == (n_words, 256) and words[0].eq(0).all()
    assert words[1:].std().item() == pytest.approx(1, abs=0.05) and words[1].ne(0).all()
    spread = build_model(replace(SEED, word_std=0.02), train_set, n_words, seed=0)
    assert spread.text_encoder.embedding.weight[:2].eq(0).all()  # as in the product
    first, relu, last = model.text_projection.linear
    assert isinstance(relu, torch.nn.ReLU)
    for layer in (first, last, model.image_projection.linear):
        assert layer.bias is not None and layer.weight.abs().max() <= layer.in_features**-0.5
    assert model.logit_scale.exp().item() == pytest.approx(math.e)
    assert model.text_projection.dropout.p == model.image_projection.dropout.p == 0
    assert PLAIN.lr == 2e-5 and PLAIN.batch_size == 64 and PLAIN.epochs == 5
    assert PLAIN.captions_per_image == 1 and PLAIN.schedule == "constant" and not PLAIN.word_dropout


def test_losses_meet_where_their_switch_is_off() -> None:
    """Nearly no smoothing, hinge or weight is the product's loss; equal negatives weigh 1."""
    seed_all(0, "weights")
    images, texts = (torch.nn.functional.normalize(torch.randn(n, 8)) for n in (4, 8))
    index = torch.arange(4).repeat_interleave(2)
    model = torch.nn.Module()
    model.logit_scale = torch.tensor(2.0)
    expected = contrastive_loss(images, texts, index, model.logit_scale)
    for switch in ("label_smoothing", "hinge", "hard_negatives"):
        found = row_loss(replace(SEED, **{switch: 1e-7}), model, images, texts, index)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        changed = row_loss(replace(SEED, **{switch: 0.5}), model, images, texts, index)
        assert abs(changed - expected) > 1e-3
    same = images[:1].expand(4, 8), images[:1].expand(8, 8), index
    torch.testing.assert_close(row_loss(replace(SEED, hard_negatives=0.5), model, *same),
                               contrastive_loss(*same, model.logit_scale))


def test_weights_of_one_are_the_mean() -> None:
    """With every weight 1 the weighed bag is the product's."""
    config = ModelConfig(20, token_dim=6)
    weighed, plain = WeighedWords(config, torch.ones(20), learned=True), TextEncoder(20, 6)
    plain.load_state_dict({"embedding.weight": weighed.embedding.weight})
    tokens = torch.randint(2, 20, (5, 7))
    tokens[:, 4:] = 0
    tokens[0] = 0
    torch.testing.assert_close(weighed(tokens), plain(tokens))


def test_rare_words_take_their_stems_place(data: Data) -> None:
    """A rare word is known as the commonest word of its stem, any other stays as it is."""
    captions = ("dogs run", "dogs run", "a dog running", "a zebra")
    few = replace(data, records={split: [replace(data.records["train"][0], captions=captions)] * 2
                                 for split in ("train", "val")}, known={})
    tokens = few.sets(replace(SEED, stems="rare", min_freq=3))[1].tokens
    dogs, run, a = (int(tokens[row, place]) for row, place in ((0, 0), (0, 1), (2, 0)))
    assert tokens[2, :3].tolist() == [a, dogs, run] and len({dogs, run, a}) == 3
    every = few.sets(replace(SEED, stems="all", min_freq=3))[1].tokens
    assert every[2, 1] == every[0, 0] and every[2, 2] == every[0, 1]


def test_sides_stay_where_captions_name_them() -> None:
    """With keep_sides such photos show their centre; without, any view."""
    sided = torch.tensor([True, False] * 200)
    kept = quality.draw_views(replace(SEED, keep_sides=True), 2, sided)
    assert kept[sided].eq(0).all() and kept[~sided].float().mean() == pytest.approx(0.5, abs=0.15)
    assert quality.draw_views(SEED, 2, sided)[sided].float().mean() > 0.3


def test_a_view_is_that_of_changed_pixels(data: Data) -> None:
    """The mirror's features are those of a store of mirrored photos; corners differ."""
    fresh, mirrored = (replace(data, known={}) for _ in range(2))
    mirrored.store = PixelStore(data.store.pixels[:, :, ::-1].copy(), data.store.rows, {})
    torch.testing.assert_close(fresh.features("val", "mirror"), mirrored.features("val", "centre"))
    centre, *others = (fresh.features("val", view) for view in CROPS)
    assert not any(torch.equal(centre, other) for other in others)


def test_features_of_another_network(
    tmp_path: Path, data: Data, tiny_data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each photo gets the row of its name, in whatever order the file has them."""
    images, annotations = tiny_data
    names = sorted(path.name for path in images.iterdir())
    order = np.random.default_rng(0).permutation(len(names))
    centre = np.random.default_rng(1).normal(size=(len(names), 1280)).astype(np.float32)
    file = tmp_path / "features.npz"
    np.savez(file, names=np.array(names)[order], centre=centre[order])
    known = read_features(file, data.records)
    for split in data.records:
        for record, row in zip(data.records[split], known[split, "centre"], strict=True):
            assert np.array_equal(row, centre[names.index(record.name)])
    flags = ["--features", str(file), "--images", str(images), "--annotations", str(annotations),
             "--image-size", "32", "--seeds", "1", "--rows"]
    assert quality.main([*flags, "seed"]) == 0
    assert "| `seed` |" in capsys.readouterr().out
    with pytest.raises(UserError, match="view 'mirror'"):
        quality.main([*flags, "strong-heads"])


def test_features_that_do_not_fit(tmp_path: Path, data: Data) -> None:
    """No file, no names, a photo that is not in it, numbers of another network: one message."""
    names = [record.name for split in data.records.values() for record in split]
    file = tmp_path / "features.npz"
    for arrays in (None, {"centre": np.zeros((len(names), 1280))},
                   {"names": names[1:], "centre": np.zeros((len(names) - 1, 1280))},
                   {"names": names, "centre": np.zeros((3, 1280))},
                   {"names": names, "centre": np.zeros((len(names), 512))}):
        if arrays:
            np.savez(file, **arrays)
        with pytest.raises(UserError, match="features.npz"):
            read_features(file, data.records)
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"no zip file"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="features.npz"):
            read_features(file, data.records)
    with open(file, "wb") as lone:
        np.save(lone, np.zeros((len(names), 1280)))
    with pytest.raises(UserError, match="features.npz"):
        read_features(file, data.records)


def test_kept_runs_are_not_trained_again(
    tmp_path: Path, tiny_data: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second call prints the first one's line from the file alone."""
    images, annotations = tiny_data
    flags = ["--rows", "seed", "--keep", str(tmp_path / "runs.jsonl"), "--weights", "none",
             "--image-size", "32", "--images", str(images), "--annotations", str(annotations)]
    assert quality.main([*flags, "--seeds", "2"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| `seed` |") and "(2)" in line
    assert quality.main([*flags, "--seeds", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match="runs.jsonl holds runs on other features"):
        quality.main([*flags, "--features", str(tmp_path / "features.npz")])


def test_fine_tuning_in_as_many_image_passes(tmp_path: Path, capsys: pytest.CaptureFixture,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain script, the seed recipe and the strong one see as many photos, heads aside; a
    second call prints the same table and trains nothing."""
    images, annotations = make_tiny_data(tmp_path / "data", n_images=40)
    passes = []
    original = train.train_one_epoch

    def count(model: DualEncoder, dataset: Flickr30kDataset, *args: object,
              **flags: object) -> Progress:
        progress = original(model, dataset, *args, **flags)
        frozen = dataset.pixels(np.zeros(1, np.int64)).ndim == 2
        passes.append((frozen, progress.pairs // flags["captions_per_image"]))
        return progress

    monkeypatch.setattr(train, "train_one_epoch", count)
    flags = ["--images", str(images), "--annotations", str(annotations), "--weights", "none",
             "--image-size", "32", "--keep", str(tmp_path / "runs"), "--seeds", "0",
             "--tuned-epochs", "5", "--rows"]
    tables = []
    for row in ("plain", "seed", "strong"):
        passes.clear()
        for _ in range(2):
            finetune.main([*flags, row])
            tables.append(capsys.readouterr().out.splitlines()[-1])
        assert tables[-1] == tables[-2] and tables[-1].startswith(f"| `{row}` | ")
        assert sum(number for frozen, number in passes if not frozen) == 5 * 36
        log = tmp_path / "runs" / f"{row}-5-0" / "log.jsonl"
        assert len(log.read_text().splitlines()) == len(passes)  # the second call added none
    plain = torch.load(tmp_path / "runs" / "plain-5-0" / "models" / "flickr30k_clip_best.pth",
                       weights_only=True)["model_state"]
    assert plain["text_encoder.embedding.weight"].std() == pytest.approx(1, abs=0.1)
