"""Exported encoders compute what the model does, also without this project or without torch."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from efficientnet_pytorch import EfficientNet

from src.data.transforms import eval_transform
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.export import (
    check_packages,
    image_card,
    load_image_encoder,
    load_text_encoder,
    prepare_image_encoder,
    prepare_text_encoder,
    text_card,
)
from src.models.image_encoder import IMAGENET_MEAN, IMAGENET_STD
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError

RESIZE = 50
PLAIN = (torch.Tensor, dict, list, str, int, float, bool, type(None))
TEXTS = ["a dog", "the red sea", "Dog, DOG and a dog!", "a zebra", "", "日本"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return a small vocabulary."""
    return Tokenizer.from_captions(["a dog runs", "a man 's red dog", "the sea", "日本 été"], 1, 6)


def make_model(name: str = "efficientnet-b0", vocab_size: int = 10, **config) -> DualEncoder:
    """Return a model of unusual sizes with BatchNorm statistics as after training.

    At 46 pixels some strided convolutions have inputs of odd size, whose padding is different.
    """
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(vocab_size, name, image_size=46, token_dim=10, embed_dim=7,
                                    drop_connect=0.0, **config))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # cumulative average: the statistics of one batch
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        model.train().image_encoder(torch.randn(16, 3, 46, 46) + torch.randn(16, 3, 1, 1))
        model.text_encoder.embedding.weight[1] = 0.001  # <unk> that has been trained
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer) -> DualEncoder:
    """Return a model of EfficientNet-B0."""
    return make_model(vocab_size=len(tokenizer))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Return resized images, each noise around a color: (5, RESIZE, RESIZE, 3) uint8."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-60, 60, (5, RESIZE, RESIZE, 3)) + rng.integers(0, 256, (5, 1, 1, 3))
    return noise.clip(0, 255).astype(np.uint8)


@torch.no_grad()
def embed(model: DualEncoder, pixels: np.ndarray) -> np.ndarray:
    """Return the embeddings of the model."""
    images = eval_transform(torch.from_numpy(pixels), model.config.image_size)
    embeddings = model.encode_image(images).numpy()
    assert (embeddings @ embeddings.T - np.eye(len(pixels))).max() < 0.999  # the images differ
    return embeddings


def export(path, model: DualEncoder, format: str = "torch", calibration=(), **options):
    """Write the image encoder of a model, and return the path."""
    card = image_card(model, resize=RESIZE, **options)
    prepare_image_encoder(model, format, resize=RESIZE, calibration=calibration,
                          **options).write(path, card)
    return path


def skip_without(format: str) -> None:
    """Skip a test if the packages of a format are not installed."""
    for package in {"onnx": ("onnx", "onnxruntime"), "safetensors": ("safetensors",)}.get(
            format, ()):
        pytest.importorskip(package)


@pytest.mark.parametrize("format, float_input", [
    ("torch", False), ("safetensors", False), ("onnx", False), ("onnx", True)])
@pytest.mark.parametrize("flip_tta", [False, True])
def test_a_file_computes_the_embeddings_of_the_model(
    model, pixels, tmp_path, format, float_input, flip_tta
):
    """In every format, with flip TTA and without, for one image and for several."""
    skip_without(format)
    other = DualEncoder(replace(model.config, flip_tta=flip_tta)).eval()
    other.load_state_dict(model.state_dict())
    path = export(tmp_path / "file", other, format, float_input=float_input)
    function, card = load_image_encoder(path, format)
    assert card == image_card(other, resize=RESIZE, float_input=float_input)
    for count in (1, 2, 5):
        expected = embed(other, pixels[:count])
        np.testing.assert_allclose(function(pixels[:count]), expected, atol=2e-5)
    assert abs(embed(other, pixels) - embed(model, pixels)).max() > 1e-3 or not flip_tta


@pytest.mark.parametrize("name, format", [
    ("efficientnet-lite1", "torch"), ("efficientnet-lite1", "safetensors"),
    ("efficientnet-lite1", "onnx"), ("efficientnet-b2", "onnx")])
def test_other_networks(pixels, tmp_path, name, format):
    """Lite networks have ReLU6 and statistics of their own; B2 is wider and deeper than B0."""
    skip_without(format)
    model = make_model(name, flip_tta=True)
    function, card = load_image_encoder(export(tmp_path / "file", model, format), format)
    assert card["name"] == name
    np.testing.assert_allclose(function(pixels), embed(model, pixels), atol=2e-5)


@pytest.mark.parametrize("format", ["torch", "safetensors", "onnx"])
def test_half_precision_rounds_the_weights_and_nothing_else(model, pixels, tmp_path, format):
    """The file has half the size and is the model with rounded weights, computed in float32."""
    skip_without(format)
    rounded = make_model(vocab_size=model.config.vocab_size)
    rounded.load_state_dict({
        name: tensor.half().float() if tensor.ndim > 1 else tensor
        for name, tensor in model.state_dict().items()})
    full = export(tmp_path / "full", model, format).stat().st_size
    path = export(tmp_path / "half", model, format, precision="float16")
    assert path.stat().st_size < 0.56 * full
    embeddings = load_image_encoder(path, format)[0](pixels)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, embed(rounded, pixels), atol=2e-5)
    assert abs(embeddings - embed(model, pixels)).max() > 5e-5


def test_int8_is_small_and_close(pixels, tmp_path):
    """int8 has less than a third of the size; embeddings are similar, and hold int8 weights."""
    onnx = pytest.importorskip("onnx")
    model = make_model("efficientnet-lite0", flip_tta=True)
    full = export(tmp_path / "full", model, "onnx").stat().st_size
    path = export(tmp_path / "int8", model, "onnx", calibration=[pixels[:3], pixels[3:]],
                  precision="int8", float_input=True)
    assert path.stat().st_size < 0.32 * full
    function, card = load_image_encoder(path, "onnx")
    assert card["precision"] == "int8"
    cosines = (function(pixels) * embed(model, pixels)).sum(1)
    assert 0.95 < cosines.min() < cosines.max() < 0.999999
    file = onnx.load(path)
    check_version(file)
    convolutions = [node for node in file.graph.node if node.op_type == "Conv"]
    dequantized = {node.output[0] for node in file.graph.node if node.op_type == "DequantizeLinear"}
    assert len(convolutions) > 40
    assert all({*node.input[:2]} <= dequantized for node in convolutions)


def check_version(file) -> None:
    """Check that onnxruntime 1.12 of July 2022 reads a file: IR version 8 and opset 17."""
    import onnx

    opsets = {opset.domain or "ai.onnx": opset.version for opset in file.opset_import}
    assert file.ir_version <= 8 and opsets["ai.onnx"] <= 17
    assert {node.domain for node in file.graph.node} <= {"", "ai.onnx"}
    onnx.checker.check_model(file, full_check=True)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_onnx_has_one_input_with_a_dynamic_batch(model, tmp_path, precision):
    """The batch is dynamic, the size is fixed, and earlier versions of onnxruntime read it."""
    onnx = pytest.importorskip("onnx")
    file = onnx.load(export(tmp_path / "file", model, "onnx", precision=precision))
    check_version(file)
    [source], [result] = file.graph.input, file.graph.output
    shapes = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
              for value in (source, result)]
    assert (source.name, result.name) == ("images", "embeddings")
    assert shapes == [["batch", RESIZE, RESIZE, 3], ["batch", 7]]


def test_onnx_refuses_images_of_another_size(model, pixels, tmp_path):
    """A photo that was not resized is an error, not a crop of its center."""
    skip_without("onnx")
    function, _ = load_image_encoder(export(tmp_path / "file", model, "onnx"), "onnx")
    with pytest.raises(Exception, match="(?i)invalid dimensions"):
        function(np.zeros((1, 60, 60, 3), np.uint8))


@pytest.mark.parametrize("flip_tta", [False, True])
def test_torch_file_rebuilds_without_this_project(model, pixels, tmp_path, flip_tta):
    """torch and efficientnet_pytorch alone compute the embeddings of encode_image from the file."""
    averaging = DualEncoder(replace(model.config, flip_tta=flip_tta)).eval()
    averaging.load_state_dict(model.state_dict())
    exported = torch.load(export(tmp_path / "image.pth", averaging), weights_only=True)
    net = EfficientNet.from_name(
        exported["name"], include_top=False, image_size=exported["image_size"])
    net.load_state_dict(exported["backbone_state"])
    images = eval_transform(torch.from_numpy(pixels), 46)
    with torch.no_grad():
        features = net.eval()(images).flatten(1)
        if exported["flip_tta"]:
            features = (features + net(images.flip(3)).flatten(1)) / 2
        embeddings = torch.nn.functional.normalize(features @ exported["projection"].T)
    np.testing.assert_allclose(embeddings.numpy(), embed(averaging, pixels), atol=1e-4)


def test_torch_file_of_a_lite_network_rebuilds_with_its_package(pixels, tmp_path):
    """efficientnet_lite_pytorch computes the embeddings of encode_image from the file."""
    reference = pytest.importorskip("efficientnet_lite_pytorch")
    model = make_model("efficientnet-lite1")
    exported = torch.load(export(tmp_path / "image.pth", model), weights_only=True)
    net = reference.EfficientNet.from_name(exported["name"], image_size=exported["image_size"])
    result = net.load_state_dict(exported["backbone_state"], strict=False)
    assert result.missing_keys == ["_fc.weight", "_fc.bias"] and not result.unexpected_keys
    mean, std, own_mean, own_std = (torch.tensor(values)[:, None, None] for values in (
        exported["mean"], exported["std"], IMAGENET_MEAN, IMAGENET_STD))
    images = eval_transform(torch.from_numpy(pixels), 46)
    with torch.no_grad():
        features = net.eval().extract_features((images * own_std + own_mean - mean) / std)
    embeddings = torch.nn.functional.normalize(features.mean((2, 3)) @ exported["projection"].T)
    np.testing.assert_allclose(embeddings.numpy(), embed(model, pixels), atol=1e-4)


def kinds_in(value: object) -> set[type]:
    """Return the types of a value and of all values in it."""
    if isinstance(value, dict):
        parts = [*value, *value.values()]
    else:
        parts = value if isinstance(value, list | tuple | set) else []
    return {type(value)}.union(*map(kinds_in, parts))


def test_torch_file_describes_its_input(model, tmp_path):
    """The keys of earlier versions are there; everything is of plain types, the card is JSON."""
    exported = torch.load(export(tmp_path / "image.pth", model), weights_only=True)
    assert exported.keys() == {"kind", "name", "image_size", "resize", "flip_tta", "mean", "std",
                               "backbone_state", "projection", "card"}
    assert (exported["kind"], exported["name"]) == ("image encoder", "efficientnet-b0")
    assert (exported["image_size"], exported["resize"], exported["flip_tta"]) == (46, RESIZE, False)
    assert exported["mean"] == [0.485, 0.456, 0.406]
    assert exported["std"] == [0.229, 0.224, 0.225]
    assert {kind for kind in kinds_in(exported) if not issubclass(kind, PLAIN)} == set()
    assert json.loads(json.dumps(exported["card"])) == exported["card"]


def test_the_card_is_in_every_file(model, tmp_path):
    """Other readers than ours find the card as JSON in the metadata."""
    onnx, safetensors = (pytest.importorskip(name) for name in ("onnx", "safetensors"))
    card = image_card(model, resize=RESIZE) | {"recall": {"rsum": 1.5}, "data": "ü"}
    for format in ("onnx", "safetensors"):
        prepare_image_encoder(model, format, resize=RESIZE).write(tmp_path / format, card)
    stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "onnx").metadata_props}
    with safetensors.safe_open(tmp_path / "safetensors", "np") as file:
        assert json.loads(stored["card"]) == json.loads(file.metadata()["card"]) == card
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("format", ["npz", "onnx"])
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-6), ("float16", 2e-3)])
def test_text_file_computes_the_embeddings_of_the_model(
    model, tokenizer, tmp_path, format, precision, tolerance
):
    """Sums of words at unit length: also unknown words, other scripts, and no word at all."""
    skip_without(format)
    table = prepare_text_encoder(model, tokenizer, precision=precision)
    assert table.vectors.dtype == precision and not table.vectors[0].any()
    write = table.write_npz if format == "npz" else table.write_onnx
    write(tmp_path / "file", text_card(model, precision=precision))
    function, card = load_text_encoder(tmp_path / "file", format)
    assert card == text_card(model, precision=precision)
    with torch.no_grad():
        expected = model.encode_text(tokenizer.encode(TEXTS)).numpy()
    embeddings = function(TEXTS)
    assert not expected[4].any() and abs(expected[:4] - expected[1]).max() > 0.1
    np.testing.assert_allclose(embeddings, expected, atol=tolerance)
    np.testing.assert_allclose(function(TEXTS[:1]), expected[:1], atol=tolerance)


def test_other_text_encoders_are_refused(tokenizer):
    """The text encoder of a BERT is no table of words."""
    model = make_model(vocab_size=len(tokenizer))
    model.text_encoder = torch.nn.Identity()
    with pytest.raises(UserError, match="a BERT: leave out --text"):
        prepare_text_encoder(model, tokenizer)


@pytest.mark.parametrize("missing, format, precision, install", [
    ("onnx", "onnx", "float32", "pip install onnx onnxruntime"),
    ("onnxruntime", "onnx", "int8", "pip install onnx onnxruntime"),
    ("onnxruntime", "read", "float32", "pip install onnx onnxruntime"),
    ("safetensors", "safetensors", "float32", "pip install safetensors")])
def test_a_missing_package_is_named(
    model, pixels, tmp_path, monkeypatch, missing, format, precision, install
):
    """The message is the command that installs it, and no file is written."""
    if missing == "onnxruntime":
        pytest.importorskip("onnx")
    # None stands for a module that cannot be imported.
    loaded = [name for name in sys.modules if name.split(".")[0] == missing]
    for name in {missing, *loaded}:
        monkeypatch.setitem(sys.modules, name, None)
    if format != "read":
        with pytest.raises(UserError, match=install):
            check_packages(format)
    with pytest.raises(UserError, match=install):
        if format == "read":
            load_image_encoder(tmp_path / "file", "onnx")
        export(tmp_path / "file", model, format, calibration=[pixels], precision=precision)
    assert list(tmp_path.iterdir()) == []
