"""Depthwise convolutions on a CPU in bfloat16: the same sums, by kernels that exist.

oneDNN has fast bfloat16 kernels for EfficientNet's depthwise convolutions forward, and forward
only. Backward, 5x5 kernels and strides of 2 fall to its reference loops, 8 to 80 times as slow,
which would make bfloat16 training slower than float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def depthwise(
    images: torch.Tensor, weight: torch.Tensor, stride: int, padding: int
) -> torch.Tensor:
    """F.conv2d with one filter a channel: (B, C, H, W), (C, 1, K, K) -> (B, C, H', W')."""
    if images.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return _Depthwise.apply(images.to(torch.get_autocast_dtype("cpu")), weight, stride, padding)
    return F.conv2d(images, weight, None, stride, padding, 1, len(weight))


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, stride, padding):  # noqa: ANN001, ANN205
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight.to(images.dtype), None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205
        images, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        # A stride of 2 goes by float32, which has a kernel for it.
        dtype = images.dtype if stride == 1 else torch.float32
        (of_images, _) = _gradients(gradient.to(dtype), images.to(dtype), weight.to(dtype),
                                    stride, padding, (True, False))
        if weight.shape[-1] <= 3:
            (_, of_weight) = _gradients(gradient, images, weight.to(images.dtype), stride, padding,
                                        (False, True))
        else:
            of_weight = _weight_gradient(gradient, images, weight.shape[-1], stride, padding)
        return of_images.to(images.dtype), of_weight.to(weight.dtype), None, None


def _gradients(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, stride: int, padding: int,
    wanted: tuple[bool, bool],
) -> list[torch.Tensor]:
    """PyTorch's own gradients of F.conv2d by its images and its weight."""
    return torch.ops.aten.convolution_backward(
        gradient, images, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0],
        len(weight), [*wanted, False],
    )[:2]


def _weight_gradient(
    gradient: torch.Tensor, images: torch.Tensor, size: int, stride: int, padding: int
) -> torch.Tensor:
    """The gradient of a kernel of up to 6x6 taps, as four of 3x3 over shifted images: (C, 1, K, K).

    A tap's gradient is the sum over all places of the gradient there times the input that the tap
    saw, so it does not matter in whose company it is computed.
    """
    channels = images.shape[1]
    height, width = ((side - 1) * stride + 6 for side in gradient.shape[2:])
    padded = F.pad(images, (padding, width - images.shape[3] - padding,
                            padding, height - images.shape[2] - padding))
    taps = images.new_empty(channels, 1, 6, 6)
    block = images.new_empty(channels, 1, 3, 3)
    for top in (0, 3):
        for left in (0, 3):
            shifted = padded[:, :, top : top + height - 3, left : left + width - 3]
            shifted = shifted.contiguous(memory_format=torch.channels_last)
            taps[:, :, top : top + 3, left : left + 3] = _gradients(
                gradient, shifted, block, stride, 0, (False, True)
            )[1]
    return taps[:, :, :size, :size]
