"""Depthwise convolutions in bfloat16 on CPUs, computed by kernels that oneDNN has.

oneDNN has fast bfloat16 kernels for the forward pass of EfficientNet's depthwise convolutions. In
the backward pass 5x5 kernels and strides of 2 use its reference loops, which are 8 to 80 times as
slow and make training in bfloat16 slower than in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def depthwise(
    images: torch.Tensor, weight: torch.Tensor, stride: int, padding: int
) -> torch.Tensor:
    """Convolve each channel with its own filter: (B, C, H, W), (C, 1, K, K) -> (B, C, H', W')."""
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
        # Only float32 has a kernel for a stride of 2.
        dtype = images.dtype if stride == 1 else torch.float32
        images_grad, _ = _gradients(gradient.to(dtype), images.to(dtype), weight.to(dtype),
                                    stride, padding, (True, False))
        if weight.shape[-1] <= 3:
            _, weight_grad = _gradients(gradient, images, weight.to(images.dtype), stride, padding,
                                        (False, True))
        else:
            weight_grad = _weight_gradient(gradient, images, weight.shape[-1], stride, padding)
        return images_grad.to(images.dtype), weight_grad.to(weight.dtype), None, None


def _gradients(
    gradient: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, stride: int, padding: int,
    output_mask: tuple[bool, bool],
) -> list[torch.Tensor]:
    """Return PyTorch's gradients of F.conv2d with respect to its images and its weight."""
    return torch.ops.aten.convolution_backward(
        gradient, images, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0],
        len(weight), [*output_mask, False],
    )[:2]


def _weight_gradient(
    gradient: torch.Tensor, images: torch.Tensor, size: int, stride: int, padding: int
) -> torch.Tensor:
    """Return the gradient of a kernel of up to 6x6 taps from four of 3x3: (C, 1, K, K).

    The gradient of a tap is a sum over the output positions and does not depend on the other taps,
    so a kernel can be split into blocks, each computed on a shifted image.
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
