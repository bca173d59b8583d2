"""uint8 photos on the device -> normalised float batches: crop, flip, scale, in one gather.

Pictures travel to the device as bytes, a quarter of their float size, and are turned to floats
there. A batch comes out in channels_last memory, as the stored pixels lie, without a copy.
"""

from __future__ import annotations

import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def train_view(pixels: torch.Tensor, image_size: int, flip: bool) -> torch.Tensor:
    """Each photo cropped at its own random place and, if `flip`, mirrored with probability 1/2.

    Args:
        pixels: (B, S, S, 3) uint8 with S >= image_size.
        image_size: side of the crop.
        flip: off where captions tell left from right.

    Returns:
        (B, 3, image_size, image_size) float32, ImageNet-normalised, channels_last. The draws come
        from torch's default CPU generator, so that they are the same on every device.
    """
    batch, slack = len(pixels), pixels.shape[1] - image_size + 1
    top, left = torch.randint(slack, (2, batch, 1))
    mirrored = torch.rand(batch, 1) < (0.5 if flip else 0.0)
    along = torch.arange(image_size)
    rows = top + along  # (B, H)
    columns = left + torch.where(mirrored, image_size - 1 - along, along)  # (B, W)
    rows, columns = rows.to(pixels.device), columns.to(pixels.device)
    photo = torch.arange(batch, device=pixels.device)[:, None, None]
    return _normalise(pixels[photo, rows[:, :, None], columns[:, None, :]])


def eval_view(pixels: torch.Tensor, image_size: int) -> torch.Tensor:
    """The centre of each photo: (B, S, S, 3) uint8 -> (B, 3, image_size, image_size) float32."""
    start = (pixels.shape[1] - image_size) // 2
    end = start + image_size
    return _normalise(pixels[:, start:end, start:end])


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 with ImageNet's mean 0 and deviation 1."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device) * 255
    std = torch.tensor(IMAGENET_STD, device=pixels.device) * 255
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)  # (B, 3, H, W), channels_last
