"""One epoch of training: it learns, and it is a function of its seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from src import engine
from src.annotations import ImageRecord
from src.dataset import Flickr30kDataset
from src.engine import train_one_epoch
from src.errors import UserError
from src.model import DualEncoder, ModelConfig
from src.optim import build_optimizer, build_schedule
from src.pixels import PixelStore
from src.runtime import grad_scaler, seed_all
from src.tokenizer import Tokenizer

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
FIELDS = {"loss", "pairs_per_second", "seconds", "wait_share"}


@pytest.fixture(scope="module")
def colors() -> Flickr30kDataset:
    """Four photos of one colour each, with two captions that name it."""
    pixels = np.empty((4, 36, 36, 3), np.uint8)
    pixels[:] = np.array(list(COLORS.values()))[:, None, None]
    records = [ImageRecord(f"{name}.jpg", (f"all {name}", f"{name} and only {name}"))
               for name in COLORS]
    store = PixelStore(pixels, {f"{name}.jpg": row for row, name in enumerate(COLORS)}, {})
    tokenizer = Tokenizer.from_captions([c for r in records for c in r.captions], 1, 8)
    return Flickr30kDataset(records, store, tokenizer)


def train(dataset: Flickr30kDataset, epochs: int, seed: int = 0, lr: float = 5e-4, drawn: int = 0,
          **options):
    """A fresh model trained for some epochs: the model and what each epoch returned.

    Before the first epoch some random numbers were `drawn` elsewhere.
    """
    seed_all(0, "weights")
    model = DualEncoder(ModelConfig(vocab_size=20, image_size=32, token_dim=32, embed_dim=16))
    optimizer = build_optimizer(model, lr, 0.01)
    scheduler = build_schedule(optimizer, 0, 100, "constant")
    options = {"batch_size": 4, "captions_per_image": 1, "flip": True, **options}
    scaler = grad_scaler(torch.device("cpu"))
    torch.rand(drawn)
    results = [train_one_epoch(model, dataset, optimizer, scheduler, scaler, seed=seed,
                               epoch=epoch, **options) for epoch in range(1, epochs + 1)]
    return model, results, scheduler


@pytest.fixture(scope="module")
def trained(colors):
    """The run that the tests below compare with."""
    return train(colors, epochs=10)


def test_a_tiny_set_is_learnt_by_heart(trained):
    """On four photos of one colour each the loss starts above ln 4 and falls far below it."""
    _, results, _ = trained
    assert results[0]["loss"] > math.log(4)
    assert min(result["loss"] for result in results[-3:]) < math.log(4) / 4


def test_returned_fields(trained):
    """Each epoch tells its loss, speed, time and share of waiting, as plain finite numbers."""
    _, results, scheduler = trained
    for result in results:
        assert set(result) == FIELDS
        assert all(type(value) is float and math.isfinite(value) for value in result.values())
        assert result["pairs_per_second"] * result["seconds"] == pytest.approx(8)  # every caption
        assert 0 <= result["wait_share"] <= 1
    assert scheduler.last_epoch == 10 * 2  # 8 captions in batches of 4: the schedule moves by steps


def test_loss_is_the_mean_over_the_steps(colors, monkeypatch):
    """The epoch's loss is the mean of its steps' losses, one step as much as another."""
    seen = []

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    original = engine.contrastive_loss
    monkeypatch.setattr(engine, "contrastive_loss", spy)
    _, (result,), _ = train(colors, epochs=1)
    assert len(seen) == 2
    assert result["loss"] == pytest.approx(sum(loss.item() for loss in seen) / 2, rel=1e-6)


def test_the_same_seed_gives_the_same_weights_to_the_last_bit(colors):
    """Two runs of one seed end with equal weights and losses, whatever was drawn in between;
    another seed ends elsewhere."""
    states, losses = [], []
    for drawn, seed in enumerate((0, 0, 1)):
        model, results, _ = train(colors, epochs=1, seed=seed, drawn=drawn)
        states.append(model.state_dict())
        losses.append(results[0]["loss"])
    first, second, other = states
    assert losses[0] == losses[1] != losses[2]
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert [key for key in first if not torch.equal(first[key], other[key])] != []


def test_all_captions_of_a_photo_in_one_step(colors):
    """With captions_per_image 2 the same captions take half the steps, and are learnt too."""
    _, results, scheduler = train(colors, epochs=15, captions_per_image=2)
    assert results[0]["pairs_per_second"] * results[0]["seconds"] == pytest.approx(8)
    assert scheduler.last_epoch == 15
    # A photo is to spread over its two captions, so its direction cannot fall below ln 2.
    assert math.log(2) / 2 < min(r["loss"] for r in results[-3:]) < math.log(2) / 2 + 0.4


def test_logit_scale_stays_in_its_bounds(colors):
    """Steps that would take the scale far out of its bounds leave it on one of them."""
    model, _, _ = train(colors, epochs=1, lr=10.0)
    assert model.logit_scale.item() in (0, pytest.approx(math.log(100)))


def test_a_loss_that_is_no_number_stops_the_run(colors):
    """A loss that is not finite ends the epoch, and the message says where and what to do."""
    seed_all(0, "weights")
    model = DualEncoder(ModelConfig(vocab_size=20, image_size=32, token_dim=32, embed_dim=16))
    model.text_projection.linear.weight.data.fill_(torch.nan)
    optimizer = build_optimizer(model, 1e-3, 0.0)
    with pytest.raises(UserError, match="loss became nan at epoch 7, step 0.*--resume"):
        train_one_epoch(
            model, colors, optimizer, build_schedule(optimizer, 0, 9, "constant"),
            grad_scaler(torch.device("cpu")), batch_size=4, captions_per_image=1, flip=True,
            seed=0, epoch=7,
        )


def test_the_model_is_left_where_it_was(trained):
    """Training ends in training mode with every weight finite, and the running means have moved."""
    model, _, _ = trained
    assert model.training
    state = model.state_dict()
    assert [name for name, value in state.items() if not value.isfinite().all()] == []
    assert state["image_encoder.backbone._bn0.running_mean"].any()
    assert not state["text_encoder.embedding.weight"][Tokenizer.pad_id].any()
