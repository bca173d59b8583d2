"""Crop, flip and normalize, against a loop over the pixels of each image."""

from __future__ import annotations

import pytest
import torch

from src.data import transforms
from src.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    eval_transform,
    sample_crops,
    train_transform,
)


def random_pixels(batch_size: int = 6, size: int = 11) -> torch.Tensor:
    """Return noise, (B, S, S, 3) uint8."""
    return torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8)


def crop_by_pixel(
    image: torch.Tensor, top: int, left: int, flip: bool, size: int
) -> torch.Tensor:
    """Return (3, size, size) of an image (S, S, 3), pixel by pixel."""
    output = torch.empty(3, size, size)
    for y in range(size):
        for x in range(size):
            source = image[top + y, left + (size - 1 - x if flip else x)]
            for channel in range(3):
                output[channel, y, x] = (
                    source[channel] / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
    return output


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("image_size", [8, 11])
def test_train_transform_equals_a_loop_over_pixels(flip: bool, image_size: int) -> None:
    """Each image is cropped, flipped and normalized; the output is in channels_last memory."""
    pixels = random_pixels()
    crops = sample_crops(6, 11 - image_size, flip)
    images = train_transform(pixels, image_size, crops)
    assert images.shape == (6, 3, image_size, image_size) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    for image, source, (top, left, flipped) in zip(images, pixels, crops.tolist(), strict=True):
        expected = crop_by_pixel(source, top, left, flipped, image_size)
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("image_size", [1, 8, 11])
def test_slices_equal_the_gather(image_size: int) -> None:
    """The crops of the CPU and those of the GPU are the same bytes."""
    pixels, crops = random_pixels(64), sample_crops(64, 11 - image_size, flip=True)
    slices = transforms._crop_by_slices(pixels, image_size, crops)
    gather = transforms._crop_by_gather(pixels, image_size, crops)
    assert slices.shape == (64, image_size, image_size, 3) and torch.equal(slices, gather)


def test_crops_are_uniform() -> None:
    """Top and left take every value from 0 to the slack, independently; half of the images flip."""
    torch.manual_seed(0)
    top, left, flipped = sample_crops(2000, 3, flip=True).unbind(1)
    for corner in (top, left):
        counts = corner.bincount()
        assert len(counts) == 4 and counts.min() > 400
    assert (top == left).float().mean() < 0.35
    assert 0.45 < flipped.float().mean() < 0.55
    assert not sample_crops(2000, 3, flip=False)[:, 2].any()


@pytest.mark.parametrize("image_size", [8, 9, 11])
def test_eval_transform_is_the_center_crop(image_size: int) -> None:
    """The center of each image is normalized; no random number is drawn."""
    pixels = random_pixels()
    state = torch.random.get_rng_state()
    images = eval_transform(pixels, image_size)
    assert torch.equal(state, torch.random.get_rng_state())
    start = (11 - image_size) // 2
    for image, source in zip(images, pixels, strict=True):
        expected = crop_by_pixel(source, start, start, False, image_size)
        torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)
    assert images.is_contiguous(memory_format=torch.channels_last)
