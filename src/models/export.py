"""Export a trained model for other programs, and read the files back.

The image encoder is written in one of FORMATS, the text encoder as a table of words and as ONNX.
Every file holds a model card: plain values that say what the model is and how its input is made.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.models import onnx_graph, onnx_runtime
from src.models.dual_encoder import DualEncoder
from src.models.image_encoder import ImageEncoder
from src.models.text_encoder import TextEncoder
from src.models.tokenizer import Tokenizer, split_words
from src.utils.errors import UserError
from src.utils.files import write_atomic
from src.utils.tensors import (
    import_safetensors,
    load_safetensors,
    load_tensors,
    save_safetensors,
    save_tensors,
)

FORMATS = {"torch": ".pth", "onnx": ".onnx", "safetensors": ".safetensors"}
PRECISIONS = ("float32", "float16", "int8")
IMAGE_ENCODER = "image encoder"
BACKBONE = "backbone."  # prefix of the tensor names of the EfficientNet in a safetensors file

# (B, resize, resize, 3) uint8 -> (B, D) float32
ImageFunction = Callable[[np.ndarray], np.ndarray]
TextFunction = Callable[[Sequence[str]], np.ndarray]  # M texts -> (M, D) float32


def check_packages(format: str) -> None:
    """Raise a UserError with the pip command if a package of a format is not installed."""
    if format == "onnx":
        onnx_graph.import_onnx()
        onnx_runtime.import_onnxruntime()
    elif format == "safetensors":
        import_safetensors()


def image_card(
    model: DualEncoder, *, resize: int, precision: str = "float32", float_input: bool = False
) -> dict[str, Any]:
    """Return what a program needs to know about the image encoder, as plain values.

    Args:
        model: the trained model.
        resize: side in pixels to which images are resized before the center crop.
        precision: of the stored weights; one of PRECISIONS.
        float_input: whether crop and normalization are left to the caller.
    """
    config = model.config
    mean, std = model.image_encoder.input_statistics
    size = config.image_size
    return {
        "kind": IMAGE_ENCODER,
        "name": config.image_encoder,
        "embed_dim": config.embed_dim,
        "image_size": size,
        "resize": resize,
        "flip_tta": config.flip_tta,
        "mean": list(mean),
        "std": list(std),
        "precision": precision,
        "input": (f"float32 (B, 3, {size}, {size}), RGB, (values / 255 - mean) / std"
                  if float_input else f"uint8 (B, {resize}, {resize}, 3), RGB"),
        "output": f"float32 (B, {config.embed_dim}), unit length",
    }


@dataclass
class ImageExport:
    """The content of a file of the image encoder, to be written with a card.

    Attributes:
        format: one of FORMATS.
        content: an ONNX graph, or the backbone's and the projection's tensors.
    """

    format: str
    content: Any

    def write(self, path: Path, card: dict[str, Any]) -> None:
        """Write the file.

        torch: `backbone_state` loads into `EfficientNet.from_name(name, image_size=image_size)` of
        the package efficientnet_pytorch, or efficientnet_lite_pytorch for the Lite networks,
        without its classifier `_fc`. The embedding of an image is `projection @ features`,
        normalized to unit length; with `flip_tta` the features are the mean over the image and its
        horizontal flip. safetensors: the same tensors with the prefix BACKBONE.

        Raises:
            UserError: the file cannot be written, or safetensors is not installed.
        """
        if self.format == "onnx":
            write_atomic(path, onnx_graph.set_metadata(self.content, card=card))
            return
        backbone, projection = self.content
        if self.format == "safetensors":
            named = {f"{BACKBONE}{name}": tensor for name, tensor in backbone.items()}
            save_safetensors(path, {**named, "projection": projection}, card=json.dumps(card))
            return
        needed = ("kind", "name", "image_size", "resize", "flip_tta", "mean", "std")
        save_tensors(path, {**{name: card[name] for name in needed}, "card": card,
                            "backbone_state": backbone, "projection": projection})


def prepare_image_encoder(
    model: DualEncoder, format: str, *, resize: int, precision: str = "float32",
    float_input: bool = False, calibration: Iterable[np.ndarray] = (),
) -> ImageExport:
    """Return the image encoder in a format and a precision.

    float16 rounds the weights (not biases and BatchNorm's statistics) to half precision; they are
    read into float32. int8 quantizes weights and activations, for onnxruntime.

    Args:
        model: in eval mode.
        format: one of FORMATS.
        resize: side in pixels of the images that the encoder is given.
        precision: one of PRECISIONS; int8 with the format onnx only.
        float_input: onnx: take cropped and normalized images.
        calibration: int8: batches of (B, resize, resize, 3) uint8 images.

    Raises:
        UserError: a package is not installed.
    """
    half = precision == "float16"
    if format == "onnx":
        graph = onnx_graph.image_graph(model, resize=resize, float_input=float_input, half=half)
        if precision == "int8":
            card = image_card(model, resize=resize)
            batches = (_normalize(batch, card) if float_input else batch for batch in calibration)
            graph = onnx_runtime.quantize(graph, batches)
        return ImageExport(format, graph)
    state = {name: _rounded(tensor, half)
             for name, tensor in model.image_encoder.backbone.state_dict().items()}
    return ImageExport(format, (state, _rounded(model.image_projection.linear.weight, half)))


def load_image_encoder(path: Path, format: str) -> tuple[ImageFunction, dict[str, Any]]:
    """Return a function that embeds images with an exported file, and the file's card.

    The model is rebuilt from what the file holds. The function takes (B, resize, resize, 3) uint8
    and returns (B, D) float32 of unit length.

    Raises:
        UserError: a package is not installed.
    """
    if format == "onnx":
        run, metadata = onnx_runtime.load_graph(path)
        card = json.loads(metadata[onnx_graph.CARD])
        if card["input"].startswith("uint8"):
            return run, card
        return lambda pixels: run(_normalize(pixels, card)), card
    if format == "safetensors":
        tensors, metadata = load_safetensors(path)
        card, projection = json.loads(metadata["card"]), tensors["projection"]
        backbone = {name.removeprefix(BACKBONE): tensor for name, tensor in tensors.items()
                    if name.startswith(BACKBONE)}
    else:
        content = load_tensors(path)
        # As a reader of the file would, from its keys and not from the card.
        card, projection, backbone = {**content["card"], **{
            name: value for name, value in content.items() if name in content["card"]
        }}, content["projection"], content["backbone_state"]
    return _rebuild(card, backbone, projection.float()), card


def _rebuild(
    card: dict[str, Any], backbone: dict[str, torch.Tensor], projection: torch.Tensor
) -> ImageFunction:
    """Return the function of an image encoder that is given as tensors."""
    encoder = ImageEncoder(card["name"], card["image_size"]).eval()
    encoder.backbone.load_state_dict(backbone)

    @torch.inference_mode()
    def embed(pixels: np.ndarray) -> np.ndarray:
        images = torch.from_numpy(_normalize(pixels, card))
        # The backbone itself: the encoder would convert from ImageNet's normalization.
        features = encoder.backbone(images).flatten(1)  # (B, F)
        if card["flip_tta"]:
            features = (features + encoder.backbone(images.flip(3)).flatten(1)) / 2
        return torch.nn.functional.normalize(features @ projection.T, eps=0).nan_to_num().numpy()

    return embed


def _normalize(pixels: np.ndarray, card: dict[str, Any]) -> np.ndarray:
    """Crop and normalize as a card says: (B, S, S, 3) uint8 -> (B, 3, H, W) float32."""
    start = (card["resize"] - card["image_size"]) // 2
    end = start + card["image_size"]
    values = pixels[:, start:end, start:end].astype(np.float32) / np.float32(255)
    values = (values - np.float32(card["mean"])) / np.float32(card["std"])
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def _rounded(tensor: torch.Tensor, half: bool) -> torch.Tensor:
    """Return a tensor of weights in half precision if the file is."""
    return tensor.detach().half() if half and tensor.ndim > 1 else tensor.detach()


@dataclass
class TextExport:
    """A bag of words as a table.

    The embedding of a text is the sum of the rows of its words, normalized to unit length. Unknown
    words take row 1, <unk>.

    Attributes:
        words: V words in the order of their ids, <pad> and <unk> first.
        vectors: (V, D) float32 or float16, each word in the shared space; row 0, <pad>, is zero.
    """

    words: list[str]
    vectors: np.ndarray

    def write_npz(self, path: Path, card: dict[str, Any]) -> None:
        """Write `words` (V,), `vectors` (V, D) and `card`, a JSON text, for numpy.load.

        Raises:
            UserError: the file cannot be written.
        """
        buffer = io.BytesIO()
        np.savez_compressed(buffer, words=np.array(self.words), vectors=self.vectors,
                            card=np.array(json.dumps(card)))
        write_atomic(path, buffer.getvalue())

    def write_onnx(self, path: Path, card: dict[str, Any]) -> None:
        """Write the graph of `text_graph`, with `words` and `card` as JSON in its metadata.

        Raises:
            UserError: the file cannot be written, or onnx is not installed.
        """
        graph = onnx_graph.text_graph(self.vectors)
        write_atomic(path, onnx_graph.set_metadata(graph, card=card, words=self.words))


def prepare_text_encoder(
    model: DualEncoder, tokenizer: Tokenizer, *, precision: str = "float32"
) -> TextExport:
    """Return the table of a model's words.

    Args:
        model: with a bag of words as text encoder.
        tokenizer: of the model.
        precision: of the vectors; float32 or float16.

    Raises:
        UserError: the text encoder is not a bag of words.
    """
    check_text_encoder(model)
    vectors = model.word_embeddings().cpu().numpy()
    vectors[Tokenizer.pad_id] = 0
    return TextExport(tokenizer.words, vectors.astype(precision))


def check_text_encoder(model: DualEncoder) -> None:
    """Raise a UserError if the text encoder of a model cannot be exported."""
    if not isinstance(model.text_encoder, TextEncoder):
        raise UserError("--text exports a bag of words, and the text encoder of this checkpoint is "
                        "a BERT: leave out --text")


def text_card(model: DualEncoder, *, precision: str = "float32") -> dict[str, Any]:
    """Return what a program needs to know about the text encoder, as plain values.

    Args:
        model: the trained model.
        precision: of the stored vectors.
    """
    config = model.config
    return {
        "kind": "text encoder",
        "name": "bag of words",
        "embed_dim": config.embed_dim,
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "precision": precision,
        "output": f"float32 (M, {config.embed_dim}), unit length",
    }


def load_text_encoder(path: Path, format: str) -> tuple[TextFunction, dict[str, Any]]:
    """Return a function that embeds texts with an exported file, and the file's card.

    Args:
        path: the file.
        format: npz or onnx.

    Raises:
        UserError: a package is not installed.
    """
    if format == "onnx":
        run, metadata = onnx_runtime.load_graph(path)
        card, words = json.loads(metadata[onnx_graph.CARD]), json.loads(metadata["words"])
    else:
        with open(path, "rb") as stream, np.load(stream) as file:
            card, words = json.loads(str(file["card"])), file["words"].tolist()
            vectors = file["vectors"].astype(np.float32)
    ids = {word: i for i, word in enumerate(words)}

    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = [[ids.get(word, Tokenizer.unk_id) for word in split_words(text)] for text in texts]
        if format == "onnx":
            longest = max(map(len, rows), default=0)
            padded = [row + [Tokenizer.pad_id] * (longest - len(row)) for row in rows]
            return run(np.array(padded, np.int64))
        sums = np.stack([vectors[row].sum(0) for row in rows])  # (M, D)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        return sums / np.where(lengths > 0, lengths, 1)

    return embed, card
