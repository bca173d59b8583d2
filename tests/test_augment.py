"""Views of stored pixels: against a loop over the photos with the same draws."""

from __future__ import annotations

import pytest
import torch

from src.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    draw_boxes,
    draw_places,
    eval_view,
    resized_view,
    train_view,
)


def pixels(batch: int = 6, size: int = 11) -> torch.Tensor:
    """(B, S, S, 3) uint8 noise."""
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)


def normalised(photo: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W), one channel at a time."""
    return torch.stack([(photo[:, :, c] / 255 - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
                        for c in range(3)])


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("image_size", [8, 11])
def test_train_view_is_a_crop_and_a_mirror(flip: bool, image_size: int) -> None:
    """Each photo is some window of itself, mirrored if drawn so, normalised by channel."""
    stored = pixels()
    places = draw_places(6, 11 - image_size, flip)
    view = train_view(stored, image_size, places)
    assert view.shape == (6, 3, image_size, image_size) and view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)
    for i, (top, left, mirrored) in enumerate(places.tolist()):
        window = stored[i, top:top + image_size, left:left + image_size]
        expected = normalised(window.flip(1) if mirrored else window)
        torch.testing.assert_close(view[i], expected, atol=1e-5, rtol=1e-5)


def test_all_places_and_both_mirrors_come() -> None:
    """Over many draws every offset comes, and about half of the photos are mirrored."""
    stored = torch.zeros(1, 6, 6, 3, dtype=torch.uint8)
    stored[0, :, :, 0] = torch.arange(6)[:, None] * 10
    stored[0, :, :, 1] = torch.arange(6) * 10
    torch.manual_seed(0)
    view = train_view(stored.expand(2000, 6, 6, 3), 4, draw_places(2000, 2, flip=True))
    rows = view[:, 0, 0, 0].unique()
    assert len(rows) == 3
    share = (view[:, 1, 0, 0] > view[:, 1, 0, 1]).float().mean()
    assert 0.45 < share < 0.55


def test_places_reach_from_edge_to_edge() -> None:
    """Crops start anywhere from 0 to the slack, and nothing is mirrored without `flip`."""
    torch.manual_seed(0)
    top, left, mirrored = draw_places(1000, 3, flip=False).unbind(1)
    assert set(top.tolist()) == set(left.tolist()) == {0, 1, 2, 3}
    assert not mirrored.any()
    assert not torch.equal(top, left)


def bilinear(photo: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """The colour (3,) of a photo (S, S, 3) at pixel coordinates, of the four pixels around."""
    size = len(photo)
    y, x = (min(max(place, 0), size - 1) for place in (y, x))
    top, left = min(int(y), size - 2), min(int(x), size - 2)
    down, right = y - top, x - left
    return ((1 - down) * ((1 - right) * photo[top, left] + right * photo[top, left + 1])
            + down * ((1 - right) * photo[top + 1, left] + right * photo[top + 1, left + 1]))


@pytest.mark.parametrize("image_size", [5, 11, 16])
def test_resized_view_is_a_box_brought_to_size(image_size: int) -> None:
    """Pixel by pixel: the colour where the result's pixel lies in its photo's box."""
    torch.manual_seed(0)
    stored = pixels()
    boxes = draw_boxes(6, 0.2, flip=True)
    assert 0 < boxes[:, 4].sum() < 6
    view = resized_view(stored, image_size, boxes)
    assert view.shape == (6, 3, image_size, image_size) and view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)
    for i, (top, left, height, width, mirrored) in enumerate(boxes.tolist()):
        along = [(k + 0.5) / image_size for k in range(image_size)]
        expected = torch.stack([torch.stack([
            bilinear(stored[i].double(), (top + height * v) * 11 - 0.5,
                     (left + width * (1 - u if mirrored else u)) * 11 - 0.5)
            for u in along]) for v in along])
        torch.testing.assert_close(view[i], normalised(expected).float(), atol=1e-4, rtol=1e-4)


def test_the_box_of_the_whole_photo_is_the_photo() -> None:
    """Nothing is resampled where nothing changes size."""
    stored = pixels()
    whole = torch.tensor([0.0, 0, 1, 1, 0]).expand(6, 5)
    torch.testing.assert_close(resized_view(stored, 11, whole), eval_view(stored, 11),
                               atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("smallest", [0.3, 0.9])
def test_boxes_of_all_sizes_shapes_and_places_come(smallest: float) -> None:
    """They lie in the photo, and spread over the areas, the shapes and the places there are."""
    torch.manual_seed(0)
    top, left, height, width, mirrored = draw_boxes(4000, smallest, flip=True).unbind(1)
    assert (torch.stack([top, left]) >= 0).all()
    assert (top + height <= 1 + 1e-6).all() and (left + width <= 1 + 1e-6).all()
    assert 0.45 < mirrored.mean() < 0.55
    assert not draw_boxes(100, smallest, flip=False)[:, 4].any()
    area, shape = height * width, width / height
    assert (area >= smallest - 1e-6).all() and area.min() < smallest + 0.02
    assert area.mean() == pytest.approx((1 + smallest) / 2, abs=0.02)
    assert (shape > 0.74).all() and (shape < 1.34).all()
    assert (shape.log().mean()).abs() < 0.02 and (top.mean() - left.mean()).abs() < 0.01
    free = 1 - height > 0.05
    assert (top[free] / (1 - height[free])).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("image_size", [8, 9, 11])
def test_eval_view_is_the_centre(image_size: int) -> None:
    """The middle window, without any draw."""
    stored = pixels()
    state = torch.random.get_rng_state()
    view = eval_view(stored, image_size)
    assert torch.equal(state, torch.random.get_rng_state())
    start = (11 - image_size) // 2
    for i in range(6):
        window = stored[i, start:start + image_size, start:start + image_size]
        torch.testing.assert_close(view[i], normalised(window), atol=1e-5, rtol=1e-5)
    assert view.is_contiguous(memory_format=torch.channels_last)
