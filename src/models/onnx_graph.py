"""The image encoder and the text encoder as ONNX graphs.

The graphs are written node by node instead of being traced by torch.onnx. The network is known, so
this takes a tenth of a second and no package but onnx, gives the same file with every version of
torch, and leaves out what only training needs: BatchNorm is folded into the convolutions, and
uneven padding is an attribute of a convolution. (torch's older exporter is deprecated; the newer
one needs onnxscript, is called differently in torch 2.6, and takes tens of seconds.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from src.models.dual_encoder import DualEncoder
from src.utils.errors import import_optional

if TYPE_CHECKING:
    from onnx import ModelProto

NEEDS_PACKAGES = "--format onnx needs other packages: pip install onnx onnxruntime"
OPSET, IR_VERSION = 17, 8  # read by onnxruntime since version 1.12 of 2022
CARD = "card"  # name of the model card in the file's metadata


def image_graph(
    model: DualEncoder, *, resize: int, float_input: bool = False, half: bool = False
) -> ModelProto:
    """Return the image encoder of a model as an ONNX graph.

    Input `images`: (B, resize, resize, 3) uint8, of which the center is cropped and normalized
    inside; or with `float_input` (B, 3, image_size, image_size) float32, cropped and normalized by
    the caller. Output `embeddings`: (B, D) float32 of unit length. B is dynamic. With flip TTA the
    graph averages the features of each image and its horizontal flip.

    Args:
        model: in eval mode.
        resize: side in pixels of the uint8 input.
        float_input: leave crop and normalization to the caller.
        half: store the weights in float16. They are cast when the file is loaded, and computing
            stays in float32.

    Raises:
        UserError: onnx is not installed.
    """
    encoder, size = model.image_encoder, model.config.image_size
    graph = _Graph(half)
    images = "images"
    if float_input:
        shape, dtype = ("batch", 3, size, size), np.float32
    else:
        shape, dtype = ("batch", resize, resize, 3), np.uint8
        images = _crop_and_normalize(graph, images, resize, size, *encoder.input_statistics)
    if encoder.flip_tta:
        # One pass over both, so that the file holds the network once.
        flipped = graph.slice(images, axes=[3], starts=[-1], ends=[-size - 1], steps=[-1])
        images = graph.add("Concat", images, flipped, axis=0)  # (2 B, 3, H, W)
    features = _backbone(graph, encoder.backbone, images)  # (B or 2 B, F)
    if encoder.flip_tta:
        halves = graph.constant(np.array([2, -1, encoder.feature_dim]), "halves")
        features = graph.add("Reshape", features, halves)  # (2, B, F)
        features = graph.add("ReduceMean", features, axes=[0], keepdims=0)  # (B, F)
    linear = _numpy(model.image_projection.linear.weight).T  # (F, D)
    embeddings = graph.add("MatMul", features, graph.weights(linear, "projection"))  # (B, D)
    _unit_length(graph, embeddings, "embeddings")
    return graph.build("image_encoder", ("images", dtype, shape),
                       ("embeddings", np.float32, ("batch", model.config.embed_dim)))


def text_graph(vectors: np.ndarray) -> ModelProto:
    """Return a bag of words as an ONNX graph.

    Input `tokens`: (M, L) int64 ids, padded with 0; M and L are dynamic. Output `embeddings`:
    (M, D) float32 of unit length, or 0 for a text without words.

    Args:
        vectors: (V, D) float32 or float16, each word in the shared space; row 0 is zero.

    Raises:
        UserError: onnx is not installed.
    """
    graph = _Graph(half=vectors.dtype == np.float16)
    words = graph.add("Gather", graph.weights(vectors, "vectors"), "tokens")  # (M, L, D)
    total = graph.add("ReduceSum", words, graph.constant(np.array([1]), "words_axis"), keepdims=0)
    _unit_length(graph, total, "embeddings")
    return graph.build("text_encoder", ("tokens", np.int64, ("batch", "length")),
                       ("embeddings", np.float32, ("batch", vectors.shape[1])))


def set_metadata(graph: ModelProto, **values: Any) -> bytes:
    """Set the metadata of a graph to plain values as JSON texts, and return the file's content."""
    del graph.metadata_props[:]
    for key, value in values.items():
        graph.metadata_props.add(key=key, value=json.dumps(value))
    return graph.SerializeToString()


def import_onnx() -> ModuleType:
    """Return the package onnx; a UserError if it is not installed."""
    return import_optional("onnx", NEEDS_PACKAGES)


class _Graph:
    """An ONNX graph that is built node by node; values are known by their names."""

    def __init__(self, half: bool) -> None:
        self.onnx, self.half = import_onnx(), half
        self.nodes: list = []
        self.initializers: list = []

    def add(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output, and return the name of that."""
        name = name or f"{op}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, values: np.ndarray, name: str) -> str:
        """Add a constant, and return its name."""
        self.initializers.append(self.onnx.numpy_helper.from_array(values, name))
        return name

    def weights(self, values: np.ndarray, name: str, scale: np.ndarray | None = None) -> str:
        """Add `values`, or `values * scale`, as a float32 constant.

        In half precision the values are stored as they are in the checkpoint, and scaled when the
        file is loaded: a scale can move them out of the range of float16.
        """
        if not self.half:
            values = values if scale is None else values.astype(np.float64) * scale
            return self.constant(np.ascontiguousarray(values, np.float32), name)
        stored = self.constant(np.ascontiguousarray(values, np.float16), f"{name}_half")
        single = self.add("Cast", stored, to=self.onnx.TensorProto.FLOAT)
        if scale is None:
            return single
        return self.add("Mul", single, self.constant(scale.astype(np.float32), f"{name}_scale"))

    def slice(self, data: str, **indices: Iterable[int]) -> str:
        """Add a Slice node; the order of its inputs is starts, ends, axes, steps."""
        name = f"Slice_{len(self.nodes)}"
        inputs = [self.constant(np.array(indices[each], np.int64), f"{name}_{each}")
                  for each in ("starts", "ends", "axes", "steps")]
        return self.add("Slice", data, *inputs, name=name)

    def build(self, name: str, source: tuple, result: tuple) -> ModelProto:
        """Return the model with one input and one output, each (name, dtype, shape)."""
        helper = self.onnx.helper
        values = [helper.make_tensor_value_info(
            each, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
            for each, dtype, shape in (source, result)]
        graph = helper.make_graph(self.nodes, name, values[:1], values[1:], self.initializers)
        model = helper.make_model(graph, ir_version=IR_VERSION,
                                  opset_imports=[helper.make_opsetid("", OPSET)])
        self.onnx.checker.check_model(model, full_check=True)
        return model


def _crop_and_normalize(
    graph: _Graph, pixels: str, resize: int, size: int, mean: tuple[float, ...],
    std: tuple[float, ...],
) -> str:
    """Add what `eval_transform` does: (B, S, S, 3) uint8 -> (B, 3, H, W) float32."""
    start = (resize - size) // 2
    end = start + size
    pixels = graph.slice(pixels, axes=[1, 2], starts=[start] * 2, ends=[end] * 2, steps=[1, 1])
    images = graph.add("Transpose", pixels, perm=[0, 3, 1, 2])
    images = graph.add("Cast", images, to=graph.onnx.TensorProto.FLOAT)
    for op, values in (("Sub", mean), ("Div", std)):
        scaled = np.array(values, np.float32)[:, None, None] * np.float32(255)  # (3, 1, 1)
        images = graph.add(op, images, graph.constant(scaled, f"pixel_{op.lower()}"))
    return images


def _unit_length(graph: _Graph, rows: str, name: str) -> None:
    """Add what `ProjectionHead` does after its linear map: rows of unit length, or 0 for zeros."""
    length = graph.add("ReduceL2", rows, axes=[-1], keepdims=1)
    zero, one = (graph.constant(np.array(value, np.float32), each)
                 for value, each in ((0, "zero"), (1, "one")))
    length = graph.add("Where", graph.add("Equal", length, zero), one, length)
    graph.add("Div", rows, length, name=name)


def _backbone(graph: _Graph, backbone: nn.Module, images: str) -> str:
    """Add an EfficientNet up to its pooled features: (B, 3, H, W) -> (B, F)."""
    def activate(x: str, activation: nn.Module) -> str:
        if isinstance(activation, nn.ReLU6):
            limits = (graph.constant(np.array(limit, np.float32), f"{x}_{limit}")
                      for limit in (0, 6))
            return graph.add("Clip", x, *limits)
        return graph.add("Mul", x, graph.add("Sigmoid", x))  # SiLU

    def convolve(x: str, name: str, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> str:
        scale, bias = _fold_batchnorm(conv, norm)
        return graph.add(
            "Conv", x, graph.weights(_numpy(conv.weight), f"{name}.weight", scale),
            graph.constant(bias.astype(np.float32), f"{name}.bias"), name=name,
            strides=list(conv.stride), pads=_padding(conv), group=conv.groups)

    x = activate(convolve(images, "stem", backbone._conv_stem, backbone._bn0), backbone._swish)
    for i, block in enumerate(backbone._blocks):
        skipped, name = x, f"block{i}"
        if hasattr(block, "_expand_conv"):
            x = convolve(x, f"{name}.expand", block._expand_conv, block._bn0)
            x = activate(x, block._swish)
        x = convolve(x, f"{name}.depthwise", block._depthwise_conv, block._bn1)
        x = activate(x, block._swish)
        if block.has_se:
            gate = graph.add("GlobalAveragePool", x)
            gate = activate(convolve(gate, f"{name}.reduce", block._se_reduce), block._swish)
            gate = graph.add("Sigmoid", convolve(gate, f"{name}.gate", block._se_expand))
            x = graph.add("Mul", x, gate)
        x = convolve(x, f"{name}.project", block._project_conv, block._bn2)
        args = block._block_args
        stride = args.stride[0] if isinstance(args.stride, list | tuple) else args.stride
        if block.id_skip and stride == 1 and args.input_filters == args.output_filters:
            x = graph.add("Add", x, skipped)
    x = activate(convolve(x, "head", backbone._conv_head, backbone._bn1), backbone._swish)
    return graph.add("Flatten", graph.add("GlobalAveragePool", x), axis=1)


def _fold_batchnorm(
    conv: nn.Conv2d, norm: nn.BatchNorm2d | None
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return by what a convolution's weight is multiplied, and its bias, with BatchNorm after it.

    Returns:
        (C, 1, 1, 1) float64, None without BatchNorm; and (C,) float64.
    """
    bias = np.zeros(len(conv.weight)) if conv.bias is None else _numpy(conv.bias)
    if norm is None:
        return None, bias
    gain, shift, mean, variance = (_numpy(values).astype(np.float64) for values in (
        norm.weight, norm.bias, norm.running_mean, norm.running_var))
    scale = gain / np.sqrt(variance + norm.eps)
    return scale[:, None, None, None], (bias - mean) * scale + shift


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return the values of a parameter."""
    return tensor.detach().cpu().numpy()


def _padding(conv: nn.Conv2d) -> list[int]:
    """Return top, left, bottom and right padding, of which the last two may be larger by 1."""
    top, left = conv.padding
    pads = [top, left, top, left]
    outside = getattr(conv, "static_padding", None)  # of efficientnet_pytorch
    if isinstance(outside, nn.ZeroPad2d):
        left, right, top, bottom = outside.padding
        pads = [own + more for own, more in zip(pads, (top, left, bottom, right), strict=True)]
    return pads
