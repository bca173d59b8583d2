"""The depthwise convolution in bfloat16 on a CPU equals PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from src.models.depthwise_bf16 import depthwise


def gradients(images, weight, output_grad, stride, padding):
    """Return PyTorch's output and gradients."""
    images, weight = images.detach().requires_grad_(), weight.detach().requires_grad_()
    output = F.conv2d(images, weight, None, stride, padding, 1, len(weight))
    return output, *torch.autograd.grad(output, (images, weight), output_grad)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride,padding", [(1, 0), (1, 1), (1, 2), (2, 0), (2, 2)])
@pytest.mark.parametrize("height,width", [(11, 8), (7, 12)])
def test_equals_convolution(size, stride, padding, height, width):
    """Output and both gradients are equal for any kernel, stride, padding and odd or even sides.

    Small integers are exact in bfloat16, and so are their products in float32 sums; only the
    results are rounded to bfloat16's 8 bits.
    """
    torch.manual_seed(0)
    images = torch.randint(-2, 3, (3, 8, height, width)).float().requires_grad_()
    weight = torch.randint(-2, 3, (8, 1, size, size)).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = depthwise(images, weight, stride, padding)
    assert output.dtype == torch.bfloat16
    output_grad = torch.randint(-2, 3, output.shape).float()
    output.backward(output_grad.to(output.dtype))
    expected = gradients(images.double(), weight.double(), output_grad.double(), stride, padding)
    for own, theirs in zip((output, images.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(own.double(), theirs, rtol=2**-8, atol=0)
    assert images.grad.dtype == weight.grad.dtype == torch.float32


def test_float32_is_unchanged():
    """Without autocast the output is bit-identical to PyTorch's."""
    torch.manual_seed(0)
    images, weight = torch.randn(2, 4, 9, 9), torch.randn(4, 1, 5, 5)
    assert torch.equal(depthwise(images, weight, 1, 2), F.conv2d(images, weight, None, 1, 2, 1, 4))
