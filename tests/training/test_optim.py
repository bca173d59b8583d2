"""Parameter groups, and the learning rate over a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from src.models.dual_encoder import DualEncoder, ModelConfig
from src.training.optim import MovingAverage, build_optimizer, build_schedule


def rates(steps: int, lr: float, **schedule) -> list[float]:
    """Return the learning rate of each step of a run."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build_schedule(optimizer, **schedule)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_only_matrices_decay():
    """Weights of convolutions, embeddings and linear layers decay; scales, biases and logit_scale
    do not."""
    model = DualEncoder(ModelConfig(vocab_size=5, image_size=32))
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.2)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups
             for p in group["params"]}
    decays = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert decays["logit_scale"] == 0
    assert decays["image_encoder.backbone._bn0.weight"] == 0
    assert decays["image_encoder.backbone._bn0.bias"] == 0
    for name in ("text_encoder.embedding.weight", "image_projection.linear.weight",
                 "text_projection.linear.weight", "image_encoder.backbone._conv_stem.weight"):
        assert decays[name] == 0.2
    assert {name for name, p in model.named_parameters() if p.ndim < 2} == {
        name for name, value in decays.items() if value == 0}


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    """A small dual encoder."""
    return DualEncoder(ModelConfig(vocab_size=5, image_size=32, token_dim=6, embed_dim=4))


def test_every_parameter_is_in_one_group(model):
    """No parameter is missing or in two groups."""
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("image_encoder_lr", [None, 1e-5])
def test_the_image_encoder_can_have_its_own_rate(model, image_encoder_lr):
    """Its parameters, and no others, have that rate; without one all have the same rate."""
    optimizer = build_optimizer(model, 1e-3, 0.1, image_encoder_lr)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_image = name.startswith("image_encoder.")
        assert rate[id(parameter)] == ((image_encoder_lr or 1e-3) if is_image else 1e-3), name


def test_a_step_without_gradient_shrinks_matrices_only():
    """With zero gradients a step multiplies matrices by 1 - lr * decay, and vectors by 1."""
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(vocab_size=5, image_size=32, token_dim=6, embed_dim=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim >= 2 else 1))


def test_parameters_without_gradient_do_not_change(model):
    """A frozen encoder, which gets no gradient, is neither updated nor decayed."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.5)
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_constant_schedule():
    """Without warm-up every step has exactly the given rate."""
    assert rates(7, 2e-5, warmup_steps=0, total_steps=7, schedule="constant") == [2e-5] * 7


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_is_linear(schedule):
    """Step i of a warm-up of n has (i + 1) / n of the rate: never 0, full at its last."""
    used = rates(4, 8.0, warmup_steps=4, total_steps=10, schedule=schedule)
    assert used == [2.0, 4.0, 6.0, 8.0]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_second_phase_has_the_whole_schedule_again(schedule):
    """Restarted at step 30 of 100, a run has the rates of one of 30 steps, then of one of 70."""
    used = rates(100, 1.0, warmup_steps=5, total_steps=100, schedule=schedule, restart_at=30)
    assert used[:30] == rates(30, 1.0, warmup_steps=5, total_steps=30, schedule=schedule)
    assert used[30:] == rates(70, 1.0, warmup_steps=5, total_steps=70, schedule=schedule)


def test_cosine_follows_its_formula_down_to_zero():
    """After the warm-up comes half a cosine, from the full rate down to 0 at the end and after."""
    used = rates(104, 1.0, warmup_steps=20, total_steps=100, schedule="cosine")
    for step in range(20, 104):
        expected = (1 + math.cos(math.pi * min(1, (step - 20) / 80))) / 2
        assert used[step] == pytest.approx(expected, abs=1e-12)
    assert used[20] == 1.0
    assert used[99] < 1e-3
    assert used[100:] == [0.0] * 4
    assert used[19:100] == sorted(used[19:100], reverse=True)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_longer_than_the_run(schedule):
    """A run that ends within its warm-up never reaches the full rate."""
    used = rates(3, 1.0, warmup_steps=10, total_steps=3, schedule=schedule)
    assert used == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("done", [0, 1, 4, 5, 9])
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(schedule, done):
    """A schedule that starts after `done_steps` has exactly the remaining rates."""
    whole = dict(warmup_steps=4, total_steps=10, schedule=schedule)
    assert rates(10 - done, 0.3, **whole, done_steps=done) == rates(10, 0.3, **whole)[done:]


# The moving average of the weights


def change(model: DualEncoder, seed: int) -> None:
    """Change all weights and statistics as a training step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator))
            else:
                value.add_(1)


def test_the_moving_average_is_its_formula():
    """After each step the average is a * average + (1 - a) * weights, and a rises to the decay;
    integers are those of the model."""
    model = DualEncoder(ModelConfig(vocab_size=5, image_size=32, token_dim=6, embed_dim=4))
    average = MovingAverage(model, decay=0.6)
    expected = None
    for step in range(1, 12):
        change(model, step)
        average.update(step)
        state = {name: value.double() for name, value in model.state_dict().items()}
        kept = min(0.6, (step - 1) / (step + 3))
        expected = state if step == 1 else {
            name: kept * expected[name] + (1 - kept) * value for name, value in state.items()}
    average.copy_counts()
    for name, value in average.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-4)
        else:
            assert value == model.state_dict()[name] == 11


def test_the_average_of_an_earlier_version_is_loaded():
    """The state of torch's AveragedModel, which earlier versions saved, continues bit by bit."""
    model = DualEncoder(ModelConfig(vocab_size=5, image_size=32, token_dim=6, embed_dim=4))
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.25), use_buffers=True)
    for step in range(2):
        change(model, step)
        theirs.update_parameters(model)
    ours = MovingAverage(model, decay=0.25)
    ours.load_state_dict(theirs.state_dict())
    change(model, 2)
    theirs.update_parameters(model)
    ours.update(3)  # from the third step on the decay is 0.25 or more
    own, other = ours.model.state_dict(), theirs.module.state_dict()
    assert [name for name, value in own.items() if value.is_floating_point()
            and not torch.equal(value, other[name])] == []
