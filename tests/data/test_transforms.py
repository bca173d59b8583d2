"""Views of stored pixels: against a loop over the photos with the same draws."""

from __future__ import annotations

import pytest
import torch

from src.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    eval_transform,
    sample_crops,
    train_transform,
)


def pixels(batch: int = 6, size: int = 11) -> torch.Tensor:
    """(B, S, S, 3) uint8 noise."""
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)


def normalized(photo: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W), one channel at a time."""
    return torch.stack([(photo[:, :, c] / 255 - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
                        for c in range(3)])


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("image_size", [8, 11])
def test_train_view_is_a_crop_and_a_mirror(flip: bool, image_size: int) -> None:
    """Each photo is some window of itself, mirrored if drawn so, normalized by channel."""
    stored = pixels()
    places = sample_crops(6, 11 - image_size, flip)
    view = train_transform(stored, image_size, places)
    assert view.shape == (6, 3, image_size, image_size) and view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)
    for i, (top, left, mirrored) in enumerate(places.tolist()):
        window = stored[i, top:top + image_size, left:left + image_size]
        expected = normalized(window.flip(1) if mirrored else window)
        torch.testing.assert_close(view[i], expected, atol=1e-5, rtol=1e-5)


def test_all_places_and_both_mirrors_come() -> None:
    """Over many draws every offset comes, and about half of the photos are mirrored."""
    stored = torch.zeros(1, 6, 6, 3, dtype=torch.uint8)
    stored[0, :, :, 0] = torch.arange(6)[:, None] * 10
    stored[0, :, :, 1] = torch.arange(6) * 10
    torch.manual_seed(0)
    view = train_transform(stored.expand(2000, 6, 6, 3), 4, sample_crops(2000, 2, flip=True))
    rows = view[:, 0, 0, 0].unique()
    assert len(rows) == 3
    share = (view[:, 1, 0, 0] > view[:, 1, 0, 1]).float().mean()
    assert 0.45 < share < 0.55


def test_places_reach_from_edge_to_edge() -> None:
    """Crops start anywhere from 0 to the slack, and nothing is mirrored without `flip`."""
    torch.manual_seed(0)
    top, left, mirrored = sample_crops(1000, 3, flip=False).unbind(1)
    assert set(top.tolist()) == set(left.tolist()) == {0, 1, 2, 3}
    assert not mirrored.any()
    assert not torch.equal(top, left)


@pytest.mark.parametrize("image_size", [8, 9, 11])
def test_eval_view_is_the_centre(image_size: int) -> None:
    """The middle window, without any draw."""
    stored = pixels()
    state = torch.random.get_rng_state()
    view = eval_transform(stored, image_size)
    assert torch.equal(state, torch.random.get_rng_state())
    start = (11 - image_size) // 2
    for i in range(6):
        window = stored[i, start:start + image_size, start:start + image_size]
        torch.testing.assert_close(view[i], normalized(window), atol=1e-5, rtol=1e-5)
    assert view.is_contiguous(memory_format=torch.channels_last)
