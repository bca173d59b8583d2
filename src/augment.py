"""uint8 photos on the device -> normalised float batches: crop, resize, flip, scale.

Pictures travel to the device as bytes, a quarter of their float size, and are turned to floats
there. A batch comes out in channels_last memory, as the stored pixels lie, without a copy.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def draw_places(batch: int, slack: int, flip: bool) -> torch.Tensor:
    """Where to crop each photo, and whether to mirror it: (B, 3) int64 of top, left, 0 or 1.

    Args:
        batch: B.
        slack: how many pixels a photo is larger than its crop; top and left go from 0 to this.
        flip: mirror each with probability 1/2; off where captions tell left from right.

    The draws come from torch's default CPU generator, so that they are the same on every device.
    """
    places = torch.randint(slack + 1, (batch, 2))
    mirrored = torch.rand(batch, 1) < (0.5 if flip else 0.0)
    return torch.cat([places, mirrored], dim=1)


def train_view(pixels: torch.Tensor, image_size: int, places: torch.Tensor) -> torch.Tensor:
    """Each photo cropped at its own place and mirrored if its place says so.

    Args:
        pixels: (B, S, S, 3) uint8 with S >= image_size.
        image_size: side of the crop.
        places: (B, 3) of `draw_places`, on any device.

    Returns:
        (B, 3, image_size, image_size) float32, ImageNet-normalised, channels_last.
    """
    places = places.to(pixels.device, non_blocking=True)
    top, left, mirrored = places[:, :, None].unbind(1)  # (B, 1) each
    along = torch.arange(image_size, device=pixels.device)
    rows = top + along  # (B, H)
    columns = left + torch.where(mirrored > 0, image_size - 1 - along, along)  # (B, W)
    photo = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return _normalise(pixels[photo, rows[:, :, None], columns[:, None, :]])


def draw_boxes(batch: int, smallest: float, flip: bool) -> torch.Tensor:
    """Which box of each photo to bring to size: (B, 5) float32, as `resized_view` takes it.

    Of random area and shape, after Szegedy et al., "Going Deeper with Convolutions", CVPR 2015: the
    area uniform, width to height from 3:4 to 4:3, no side longer than the photo's.

    Args:
        batch: B.
        smallest: share of the photo's area that a box has at least, above 0.
        flip: mirror each with probability 1/2.

    The draws come from torch's default CPU generator, as those of `draw_places`.
    """
    area = smallest + (1 - smallest) * torch.rand(batch)
    shape = torch.exp(math.log(4 / 3) * (2 * torch.rand(batch) - 1))
    # Where a side would be longer than the photo, the other makes up for it: the area stays.
    height = (area / shape).sqrt().clamp(max=1)
    width = (area / height).clamp(max=1)
    height = area / width
    top, left = torch.rand(batch) * (1 - height), torch.rand(batch) * (1 - width)
    mirrored = torch.rand(batch) < (0.5 if flip else 0.0)
    return torch.stack([top, left, height, width, mirrored], dim=1)


def resized_view(pixels: torch.Tensor, image_size: int, boxes: torch.Tensor) -> torch.Tensor:
    """A box of each photo brought to size, and mirrored if it says so.

    Args:
        pixels: (B, S, S, 3) uint8.
        image_size: side of the result.
        boxes: (B, 5) of `draw_boxes`, on any device: top, left, height, width in shares of the
            photo's side, mirrored 0 or 1.

    Returns:
        (B, 3, image_size, image_size) float32, ImageNet-normalised, channels_last; bilinear.
    """
    top, left, height, width, mirrored = boxes.to(pixels.device, non_blocking=True).unbind(1)
    zero = torch.zeros_like(top)
    # From the result's coordinates to the photo's, both from -1 to 1: grid_sample's.
    rows = torch.stack([zero, height, 2 * top + height - 1], dim=1)  # (B, 3)
    columns = torch.stack([width * (1 - 2 * mirrored), zero, 2 * left + width - 1], dim=1)
    affine = torch.stack([columns, rows], dim=1)  # (B, 2, 3)
    grid = F.affine_grid(affine, [len(pixels), 3, image_size, image_size], align_corners=False)
    view = F.grid_sample(_normalise(pixels), grid, padding_mode="border", align_corners=False)
    return view.contiguous(memory_format=torch.channels_last)


def eval_view(pixels: torch.Tensor, image_size: int) -> torch.Tensor:
    """The centre of each photo: (B, S, S, 3) uint8 -> (B, 3, image_size, image_size) float32."""
    start = (pixels.shape[1] - image_size) // 2
    end = start + image_size
    return _normalise(pixels[:, start:end, start:end])


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 with ImageNet's mean 0 and deviation 1."""
    mean, std = _statistics(pixels.device)
    # Whole rows at a time: broadcasting three numbers over a photo takes twice as long on a CPU.
    width = pixels.shape[2]
    rows = pixels.float().flatten(2).sub_(mean.repeat(width)).div_(std.repeat(width))
    return rows.view(pixels.shape).permute(0, 3, 1, 2)  # (B, 3, H, W), channels_last


@cache  # a GPU would wait, in every step, for numbers that never change
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ImageNet's mean and deviation of each channel, of values from 0 to 255."""
    return (torch.tensor(IMAGENET_MEAN, device=device) * 255,
            torch.tensor(IMAGENET_STD, device=device) * 255)
