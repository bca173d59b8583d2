"""uint8 photos on the device -> normalised float batches: crop, flip, scale, in one gather.

Pictures travel to the device as bytes, a quarter of their float size, and are turned to floats
there. A batch comes out in channels_last memory, as the stored pixels lie, without a copy.
"""

from __future__ import annotations

from functools import cache

import torch

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
