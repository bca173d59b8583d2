"""One epoch of training: it learns, and its result is a function of the seed."""

from __future__ import annotations

import gc
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.loader import sample_batches
from src.data.pixel_store import PixelStore
from src.data.transforms import sample_crops, train_transform
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.loss import contrastive_loss
from src.models.tokenizer import Tokenizer
from src.training import engine
from src.training.engine import (
    Progress,
    check_batch_size,
    forward_backward,
    train_one_epoch,
)
from src.training.optim import build_optimizer, build_schedule
from src.utils.distributed import split_evenly
from src.utils.errors import UserError
from src.utils.runtime import grad_scaler, seed_all

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture(scope="module")
def colors() -> Flickr30kDataset:
    """Four images of one color each, with two captions that name it."""
    pixels = np.empty((4, 36, 36, 3), np.uint8)
    pixels[:] = np.array(list(COLORS.values()))[:, None, None]
    records = [ImageRecord(f"{name}.jpg", (f"all {name}", f"{name} and only {name}"))
               for name in COLORS]
    store = PixelStore(pixels, {f"{name}.jpg": row for row, name in enumerate(COLORS)}, {})
    tokenizer = Tokenizer.from_captions([c for r in records for c in r.captions], 1, 8)
    return Flickr30kDataset(records, store, tokenizer)


def make_model(seed: int = 0, **config) -> DualEncoder:
    """A small model with the weights of `seed`."""
    seed_all(seed, "weights")
    return DualEncoder(ModelConfig(**{"vocab_size": 20, "image_size": 32, "token_dim": 32,
                                      "embed_dim": 16, **config}))


def train(dataset: Flickr30kDataset, epochs: int, seed: int = 0, lr: float = 5e-4, drawn: int = 0,
          **options):
    """Train a new model for some epochs; return it, the progress of each epoch, the scheduler.

    `drawn` random numbers are drawn before the first epoch.
    """
    model = make_model()
    optimizer = build_optimizer(model, lr, 0.01)
    scheduler = build_schedule(optimizer, 0, 100, "constant")
    options = {"batch_size": 4, "captions_per_image": 1, "flip": True, **options}
    scaler = grad_scaler(torch.device("cpu"))
    torch.rand(drawn)
    results = [train_one_epoch(model, dataset, optimizer, scheduler, scaler, seed=seed, epoch=epoch,
                               **options) for epoch in range(1, epochs + 1)]
    return model, results, scheduler


def loss_of(progress: Progress) -> float:
    """The mean loss of an epoch."""
    return progress.mean_loss()


@pytest.fixture(scope="module")
def trained(colors):
    """A trained model, the progress of its epochs, and the scheduler."""
    return train(colors, epochs=10)


def test_a_tiny_dataset_is_memorized(trained):
    """On four images of one color each the loss starts above ln 4 and falls far below it."""
    _, results, _ = trained
    assert loss_of(results[0]) > math.log(4)
    assert min(map(loss_of, results[-3:])) < math.log(4) / 4


def test_the_progress_of_an_epoch(trained):
    """Each epoch returns its learning rate, losses, pairs and times."""
    _, results, scheduler = trained
    for result in results:
        assert result.step == len(result.losses) == 2 and result.losses.isfinite().all()
        assert type(result.mean_loss()) is float and type(result.lr) is float
        assert result.pairs == 8  # every caption
        assert 0 <= result.wait_seconds <= result.seconds < math.inf
    assert scheduler.last_epoch == 10 * 2  # 8 captions in batches of 4: the schedule moves by steps


def test_loss_is_the_mean_over_the_steps(colors, monkeypatch):
    """The epoch's loss is the mean of the losses of its steps."""
    seen = []

    def spy(*args):
        seen.append(original(*args))
        return seen[-1]

    original = engine.contrastive_loss
    monkeypatch.setattr(engine, "contrastive_loss", spy)
    _, (result,), _ = train(colors, epochs=1)
    assert len(seen) == 2
    assert loss_of(result) == pytest.approx(sum(loss.item() for loss in seen) / 2, rel=1e-6)


def test_the_same_seed_gives_the_same_weights_to_the_last_bit(colors):
    """Two runs with one seed end with equal weights and losses, whatever random numbers were drawn
    before; a run with another seed does not."""
    states, losses = [], []
    for drawn, seed in enumerate((0, 0, 1)):
        model, results, _ = train(colors, epochs=1, seed=seed, drawn=drawn)
        states.append(model.state_dict())
        losses.append(loss_of(results[0]))
    first, second, other = states
    assert losses[0] == losses[1] != losses[2]
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert [key for key in first if not torch.equal(first[key], other[key])] != []


def test_all_captions_of_an_image_in_one_step(colors):
    """With captions_per_image 2 the same captions take half of the steps, and are learned too."""
    _, results, scheduler = train(colors, epochs=15, captions_per_image=2)
    assert results[0].pairs == 8
    assert scheduler.last_epoch == 15
    # The target of an image is uniform over its two captions, so that half is at least ln 2.
    assert math.log(2) / 2 < min(map(loss_of, results[-3:])) < math.log(2) / 2 + 0.4


def test_logit_scale_is_clamped(colors):
    """Steps that would move the scale far out of its bounds leave it at one of them."""
    model, _, _ = train(colors, epochs=1, lr=10.0)
    assert model.logit_scale.item() in (0, pytest.approx(math.log(100)))


def test_a_loss_that_is_not_finite_stops_the_run(colors):
    """A loss that is not finite ends the epoch; the message names step, images and cure."""
    model = make_model()
    model.text_projection.linear.weight.data.fill_(torch.nan)
    optimizer = build_optimizer(model, 1e-3, 0.0)
    with pytest.raises(UserError, match="epoch 7, step 0") as caught:
        train_one_epoch(
            model, colors, optimizer, build_schedule(optimizer, 0, 9, "constant"),
            grad_scaler(torch.device("cpu")), batch_size=4, captions_per_image=1, flip=True,
            seed=0, epoch=7,
        )
    for part in ("lr 0.001", "--resume", *(f"{c}.jpg" for c in COLORS)):
        assert part in str(caught.value)


def test_the_first_bad_step_is_named(colors, monkeypatch):
    """If the loss is checked only after several steps, the first step that broke it is named."""
    monkeypatch.setattr(engine, "CHECK_SECONDS", math.inf)
    losses = iter([1.0, math.inf, 1.0, math.nan])
    monkeypatch.setattr(engine, "_add_gradients", lambda *_, **__: torch.tensor(next(losses)))
    model = make_model()
    optimizer = build_optimizer(model, 1e-3, 0.0)
    with pytest.raises(UserError, match="epoch 1, step 1 "):
        train_one_epoch(
            model, colors, optimizer, build_schedule(optimizer, 0, 9, "constant"),
            grad_scaler(torch.device("cpu")), batch_size=2, captions_per_image=1, flip=True,
            seed=0, epoch=1,
        )


@pytest.mark.parametrize("left_after", [1, 2, 3])
def test_an_interrupted_epoch_continues_bit_by_bit(colors, left_after):
    """Interrupted after any step and continued with another model object: the same bits."""
    options = dict(batch_size=2, captions_per_image=1, flip=True, seed=0, epoch=1)

    def parts(model):
        optimizer = build_optimizer(model, 1e-2, 0.01)
        return optimizer, build_schedule(optimizer, 3, 100, "cosine")

    whole, cut, other = make_model(), make_model(), make_model(1)
    scaler = grad_scaler(torch.device("cpu"))
    end = train_one_epoch(whole, colors, *parts(whole), scaler, **options)
    optimizer, scheduler = parts(cut)
    progress = train_one_epoch(cut, colors, optimizer, scheduler, scaler, **options,
                               after_step=lambda progress: progress.step == left_after)
    assert progress.step == left_after
    other.load_state_dict(cut.state_dict())
    its_optimizer = build_optimizer(other, 1e-2, 0.01)
    its_groups = its_optimizer.state_dict()["param_groups"]  # with the rate before any schedule
    its_optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": its_groups})
    its_scheduler = build_schedule(its_optimizer, 3, 100, "cosine", done_steps=left_after)
    its_end = train_one_epoch(other, colors, its_optimizer, its_scheduler, scaler,
                              progress=Progress(**asdict(progress)), **options)
    assert torch.equal(end.losses, its_end.losses)
    assert (end.lr, end.step, end.pairs) == (its_end.lr, its_end.step, its_end.pairs)
    assert [name for name, value in whole.state_dict().items()
            if not torch.equal(value, other.state_dict()[name])] == []


@pytest.mark.parametrize("stop_at", [1, 3, 99])
def test_after_step_sees_each_step_and_can_stop(colors, stop_at):
    """One call trains: after_step is called after each update of the weights, and True stops."""
    model = make_model()
    optimizer = build_optimizer(model, 1e-3, 0.0)
    scheduler = build_schedule(optimizer, 0, 9, "constant")
    weights = [model.text_projection.linear.weight.detach().clone()]
    steps = []

    def after_step(progress: Progress) -> bool:
        steps.append(progress.step)
        weights.append(model.text_projection.linear.weight.detach().clone())
        return progress.step == stop_at

    progress = train_one_epoch(
        model, colors, optimizer, scheduler, grad_scaler(torch.device("cpu")), batch_size=2,
        captions_per_image=1, flip=True, seed=0, epoch=1, after_step=after_step)
    assert steps == list(range(1, min(stop_at, 4) + 1))  # 8 captions in batches of 2
    assert progress.step == scheduler.last_epoch == len(steps)
    assert not any(torch.equal(*pair) for pair in zip(weights, weights[1:], strict=False))


# The gradient in chunks


def gradients(dataset: Flickr30kDataset, chunk_size: int | None, **config):
    """Return loss and gradients of one batch with frozen BatchNorm, by `forward_backward`."""
    model = make_model(**config).train()
    model.image_encoder.freeze_batchnorm()
    batch = dataset.batch(sample_batches(dataset, 4, 2, 0, 1)[0])
    loss = forward_backward(model, grad_scaler(torch.device("cpu")), batch, flip=True,
                            key=(0, 1, 0), chunk_size=chunk_size)
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5])
def test_chunks_give_the_gradient_of_the_whole_batch(colors, chunk_size):
    """For any chunk size the loss and every gradient are those of the whole batch."""
    still = dict(dropout=0.0, drop_connect=0.0)
    loss, expected = gradients(colors, None, **still)
    its_loss, found = gradients(colors, chunk_size, **still)
    torch.testing.assert_close(its_loss, loss)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        scale = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * scale)


def test_chunks_repeat_their_dropout_masks(colors):
    """With dropout too the gradient is that of the loss: chunks embedded with a graph each,
    concatenated, and one backward pass through all of them."""
    loss, found = gradients(colors, 2, dropout=0.4, drop_connect=0.4)
    model = make_model(dropout=0.4, drop_connect=0.4).train()
    model.image_encoder.freeze_batchnorm()
    batch = colors.batch(sample_batches(colors, 4, 2, 0, 1)[0])
    seed_all(0, 1, 0)
    places = sample_crops(4, 4, True)
    parts = []
    for number in range(2):
        rows = slice(2 * number, 2 * number + 2)
        seed_all(0, 1, 0, 0, number)
        parts.append(model(train_transform(batch.images[rows], 32, places[rows]),
                           batch.tokens[4 * number : 4 * number + 4]))
    images, texts = map(torch.cat, zip(*parts, strict=True))
    expected = contrastive_loss(images, texts, batch.image_index, model.logit_scale)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item() + 1e-6
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4 * scale)


def test_frozen_batchnorm_keeps_its_statistics(colors):
    """Frozen BatchNorm leaves its running statistics as they are to the bit; otherwise they change.
    Its scales are trained in both cases."""
    fresh = make_model().image_encoder.backbone._bn0
    for frozen in (True, False):
        model, _, _ = train(colors, epochs=1, freeze_batchnorm=frozen)
        norm = model.image_encoder.backbone._bn0
        assert torch.equal(norm.running_mean, fresh.running_mean) == frozen
        assert not torch.equal(norm.weight, fresh.weight)


def test_training_on_features_does_not_change_the_image_encoder(colors):
    """With features instead of pixels the heads learn; the image encoder does not change."""
    torch.manual_seed(0)
    features = torch.randn(len(colors.records), 1280)
    model, results, _ = train(colors.with_images(features), epochs=15, lr=5e-3)
    assert loss_of(results[-1]) < math.log(4) / 2 < loss_of(results[0])
    before = make_model().state_dict()
    moved = {name for name, value in model.state_dict().items()
             if not torch.equal(value, before[name])}
    assert moved == {"logit_scale", "text_encoder.embedding.weight",
                     "text_projection.linear.weight", "image_projection.linear.weight"}


def test_the_model_after_training(trained):
    """Training ends in training mode with finite weights; the running means have changed."""
    model, _, _ = trained
    assert model.training
    state = model.state_dict()
    assert [name for name, value in state.items() if not value.isfinite().all()] == []
    assert state["image_encoder.backbone._bn0.running_mean"].any()
    assert not state["text_encoder.embedding.weight"][Tokenizer.pad_id].any()


# Batches that cannot be trained on


@pytest.mark.parametrize(("batch_size", "chunk_size", "image_size", "n_ranks", "part"), [
    (1, None, 224, 1, "no negatives"), (2, None, 224, 3, "without one"),
    (9, 8, 32, 1, "single image"), (3, None, 32, 2, "single image"), (5, 2, 32, 2, "single image"),
    (2, 1, 16, 1, "single image"),
])
def test_batches_that_are_too_small_are_refused(
    monkeypatch, batch_size, chunk_size, image_size, n_ranks, part
):
    """A batch without negatives, a rank without an image, and a single image for BatchNorm are one
    message that names the flag to change."""
    monkeypatch.setattr("src.utils.distributed.world_size", lambda: n_ranks)
    with pytest.raises(UserError, match=f"(?s){part}.*--batch-size"):
        check_batch_size(batch_size, chunk_size, image_size, batchnorm_trained=True)


@pytest.mark.parametrize(("batch_size", "chunk_size", "image_size", "n_ranks", "trained"), [
    (2, None, 32, 1, True), (9, 8, 33, 1, True), (9, 8, 32, 1, False), (3, None, 32, 2, False),
    (8, 8, 32, 1, True), (10, 8, 32, 1, True), (5, 3, 32, 1, True), (7, 100, 32, 3, True),
])
def test_other_batches_are_trained_on(batch_size, chunk_size, image_size, n_ranks, trained,
                                      monkeypatch, colors):
    """Batches that are not refused do not raise in a step: chunks and ranks of other sizes, and a
    single image where BatchNorm is frozen or has more than one value per channel."""
    monkeypatch.setattr("src.utils.distributed.world_size", lambda: n_ranks)
    check_batch_size(batch_size, chunk_size, image_size, trained)
    encoder = make_model(image_size=image_size).image_encoder.train(trained)
    for part in split_evenly(batch_size):
        for start in range(0, len(part), chunk_size or len(part)):
            size = len(part[start : start + (chunk_size or len(part))])
            assert encoder(torch.randn(size, 3, image_size, image_size)).isfinite().all()


def small_model(image_size: int) -> DualEncoder:
    """Return a model of three words."""
    return DualEncoder(ModelConfig(3, image_size=image_size))


def test_activation_bytes_are_those_of_the_outputs():
    """They are proportional to the area, and between one and four times the convolutions' outputs.

    Weights and statistics are as before, and no tensor of the forward pass stays in memory: its
    AccumulateGrad nodes would belong to another stream than those of a CUDA graph.
    """
    model = small_model(64)
    outputs = []
    for module in model.image_encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *call: outputs.append(call[2].nbytes / 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gc.collect()
    tensors = sum(type(item) is torch.Tensor for item in gc.get_objects())
    found = engine.activation_bytes(model, torch.float32)
    assert sum(outputs) < found < 4 * sum(outputs)
    gc.collect()
    assert sum(type(item) is torch.Tensor for item in gc.get_objects()) == tensors
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    larger = engine.activation_bytes(small_model(128), torch.float32)
    assert larger / found == pytest.approx(4, rel=0.15)
    assert engine.activation_bytes(small_model(128), torch.bfloat16) < 0.7 * larger


def test_memory_that_does_not_suffice_is_explained(monkeypatch):
    """The warning names a chunk size with which there is none; enough memory gives no warning."""
    model = small_model(64)
    one = engine.activation_bytes(model, torch.float32)
    monkeypatch.setattr(engine, "free_memory", lambda device: int(200 * one))
    assert engine.explain_memory(model, 100, None, torch.float32) is None
    note = engine.explain_memory(model, 200, None, torch.float32)
    chunk_size = int(note.split("--chunk-size ")[1].split()[0])
    assert engine.explain_memory(model, 200, chunk_size, torch.float32) is None
    assert chunk_size >= 32
    monkeypatch.setattr(engine, "split_evenly", lambda count: [range(count // 2)] * 2)
    assert engine.explain_memory(model, 200, None, torch.float32) is None  # two processes
    monkeypatch.setattr(engine, "free_memory", lambda device: None)
    assert engine.explain_memory(model, 10**9, None, torch.float32) is None
