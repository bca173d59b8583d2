"""An exported file that does not compute what the model does is an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.pixel_store import PixelStore
from src.evaluation import export_check
from src.evaluation.embed import evaluate_retrieval
from src.evaluation.export_check import (
    Comparison,
    export_image_encoder,
    export_text_encoder,
    spread,
)
from src.models import export, onnx_graph
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.export import image_card, load_image_encoder, load_text_encoder, text_card
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError

SIZE, RESIZE, N = 32, 34, 12
CAPTIONS = [f"caption {i} of a {color} image" for i in range(2)
            for color in ("red", "green", "blue", "dark", "bright", "gray")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Return the vocabulary of CAPTIONS."""
    return Tokenizer.from_captions(CAPTIONS, 1, 8)


@pytest.fixture(scope="module")
def images(tokenizer) -> Flickr30kDataset:
    """Return images of noise around a color, with two captions each."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-60, 60, (N, RESIZE, RESIZE, 3)) + rng.integers(0, 256, (N, 1, 1, 3))
    records = [ImageRecord(f"{i}.jpg", (CAPTIONS[i], CAPTIONS[i - 1])) for i in range(N)]
    store = PixelStore(noise.clip(0, 255).astype(np.uint8),
                       {f"{i}.jpg": i for i in range(N)}, {})
    return Flickr30kDataset(records, store, tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer, images) -> DualEncoder:
    """Return a Lite network with the BatchNorm statistics of the images."""
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(len(tokenizer), "efficientnet-lite0", image_size=SIZE,
                                    context_length=8, token_dim=8, embed_dim=16,
                                    drop_connect=0.0, flip_tta=True))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    pixels = images.take_images(np.arange(N))
    with torch.no_grad():
        model.train().encode_image(export_check.eval_transform(pixels, SIZE))
    return model.eval()


def write(path, model, images, format="onnx", precision="float32", **options):
    """Export the image encoder."""
    card = image_card(model, resize=RESIZE, precision=precision)
    return export_image_encoder(path, model, images, card, format=format, **options)


@pytest.mark.parametrize("format, precision", [
    ("torch", "float32"), ("torch", "float16"), ("onnx", "float32"), ("onnx", "int8")])
def test_recall_of_model_and_file(model, images, tmp_path, monkeypatch, format, precision):
    """Both are what evaluate.py's function gives; that of the file is in its card."""
    # Random weights lose more than trained ones.
    monkeypatch.setitem(export_check.MIN_MEAN_COSINE, "int8", 0.5)
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / "new" / "file"
    report = write(path, model, images, format, precision, with_recall=True)
    assert report.model_recall == evaluate_retrieval(model, images)
    function, card = load_image_encoder(path, format)
    embeddings = function(images.take_images(np.arange(N)).numpy())
    np.testing.assert_allclose(report.comparison.actual, embeddings, atol=1e-6)
    assert card["recall"] == report.recall and card["precision"] == precision
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    if precision == "float32":
        weak_scores = report.recall.pop("weak_score"), report.model_recall.pop("weak_score")
        assert weak_scores[0] == pytest.approx(weak_scores[1], abs=1e-4)
        assert report.recall == report.model_recall
        assert report.comparison.difference < 5e-5
    else:
        assert report.comparison.difference > 5e-5


def break_crop(monkeypatch):
    """Crop from the corner instead of the center."""
    original = onnx_graph._crop_and_normalize
    monkeypatch.setattr(onnx_graph, "_crop_and_normalize",
                        lambda graph, pixels, resize, *rest: original(graph, pixels, SIZE, *rest))


def break_normalization(monkeypatch):
    """Take ImageNet's statistics for a Lite network."""
    original = onnx_graph._crop_and_normalize
    monkeypatch.setattr(
        onnx_graph, "_crop_and_normalize", lambda graph, pixels, resize, size, *_: original(
            graph, pixels, resize, size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def break_flip(monkeypatch):
    """Give the image itself instead of its flip."""
    original = onnx_graph._Graph.slice

    def keep(graph, data, **indices):
        return data if indices["axes"] == [3] else original(graph, data, **indices)

    monkeypatch.setattr(onnx_graph._Graph, "slice", keep)


def break_padding(monkeypatch):
    """Pad evenly."""
    monkeypatch.setattr(onnx_graph, "_padding", lambda conv: [conv.kernel_size[0] // 2] * 4)


def break_card(name, value):
    """Return a mutant whose card, which the readers of tensors follow, has another value."""
    def mutate(monkeypatch):
        original = export.ImageExport.write
        monkeypatch.setattr(export.ImageExport, "write", lambda self, path, card: original(
            self, path, {**card, name: value}))

    return mutate


@pytest.mark.parametrize("format, precision, mutate", [
    ("onnx", "float32", break_crop), ("onnx", "float16", break_crop),
    ("onnx", "int8", break_crop), ("onnx", "float32", break_normalization),
    ("onnx", "int8", break_normalization), ("onnx", "float32", break_flip),
    ("onnx", "float32", break_padding),
    ("torch", "float32", break_card("mean", [0.485, 0.456, 0.406])),
    ("torch", "float16", break_card("std", [0.5, 0.5, 0.51])),
    ("torch", "float32", break_card("resize", RESIZE - 2)),
    ("torch", "float32", break_card("flip_tta", False)),
    ("safetensors", "float32", break_card("mean", [0.5, 0.5, 0.49])),
    ("safetensors", "float16", break_card("resize", RESIZE + 2)),
])
def test_a_mismatch_is_an_error(
    model, images, tmp_path, monkeypatch, format, precision, mutate
):
    """A wrong crop, normalization, flip or padding is found."""
    for package in {"onnx": ("onnxruntime",), "torch": ()}.get(format, (format,)):
        pytest.importorskip(package)
    mutate(monkeypatch)
    with pytest.raises(UserError, match=r"does not agree with the model: on images .* by up to "):
        write(tmp_path / "file", model, images, format, precision)


def test_int8_that_differs_too_much_is_an_error(model, images, tmp_path, monkeypatch):
    """The message names float16, which has no such loss."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export.onnx_runtime, "quantize", lambda graph, batches: graph)
    monkeypatch.setitem(export_check.MIN_MEAN_COSINE, "int8", 1.1)
    with pytest.raises(UserError, match="nothing was written; choose --precision float16"):
        write(tmp_path / "file", model, images, "onnx", "int8")


@pytest.mark.parametrize("format", ["npz", "onnx"])
def test_text_encoder(model, tokenizer, images, tmp_path, monkeypatch, format):
    """It is compared with the model on captions, or without any on words; a mismatch is an error.
    """
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    path, card = tmp_path / "file", text_card(model)
    for captions in (images.captions, []):
        comparison = export_text_encoder(path, model, tokenizer, captions, card, format=format)
        assert comparison.difference < 1e-6 and len(comparison.expected) >= 5
        assert np.linalg.norm(comparison.expected, axis=1).min() > 0.99
    function, _ = load_text_encoder(path, format)
    np.testing.assert_allclose(function(CAPTIONS[:1]), model.encode_text(
        tokenizer.encode(CAPTIONS[:1])).detach().numpy(), atol=1e-6)
    monkeypatch.setattr(export, "split_words", str.split)  # a tokenizer that keeps capitals
    with pytest.raises(UserError, match="does not agree with the model: on texts"):
        export_text_encoder(path, model, tokenizer, ["A Red image"], card, format=format)


def test_comparison():
    """Largest difference and cosines of known vectors; NaN never agrees."""
    a, b = np.eye(2, dtype=np.float32), np.array([[1, 0], [0.6, 0.8]], np.float32)
    comparison = Comparison(a, b)
    assert comparison.difference == pytest.approx(0.6)
    assert comparison.cosines.tolist() == pytest.approx([1, 0.8])
    assert str(comparison) == "largest difference 6.0e-01, smallest cosine 0.8000"
    comparison.check("int8", "images")
    for precision in ("float32", "float16", "int8"):
        Comparison(a, a).check(precision, "images")
        with pytest.raises(UserError):
            Comparison(a, np.full_like(a, np.nan)).check(precision, "images")


@pytest.mark.parametrize("count, most", [(1, 5), (5, 5), (100, 7), (8, 7), (1000, 128)])
def test_spread(count, most):
    """Different rows, the first and the last among them, with nearly equal steps."""
    rows = spread(count, most)
    assert len(rows) == min(count, most) and (rows[0], rows[-1]) == (0, count - 1)
    steps = np.diff(rows)
    assert (steps > 0).all() and steps.max(initial=1) - steps.min(initial=1000) <= 1
