"""Export encoders, and compare each file with the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from src.data.dataset import Flickr30kDataset
from src.data.transforms import eval_transform
from src.evaluation.embed import embed_tokens
from src.evaluation.metrics import retrieval_metrics
from src.models.dual_encoder import DualEncoder
from src.models.export import (
    ImageFunction,
    TextFunction,
    load_image_encoder,
    load_text_encoder,
    prepare_image_encoder,
    prepare_text_encoder,
)
from src.models.tokenizer import Tokenizer, split_words
from src.utils.errors import UserError

BATCH_SIZE = 16
COMPARED = 32  # images, where recall is not measured
CALIBRATED = 128  # images from which int8's ranges are taken
COMPARED_TEXTS = 1000
# The largest difference of a coordinate of two unit vectors. Rounding changes at most 1e-6 with
# trained weights; another crop or normalization changes 1e-2 and more.
MAX_DIFFERENCE = {"float32": 1e-4}
# Lower precision moves single images further. (At a mean cosine of 0.89, an int8 model with one
# scale for each tensor instead of each channel had lost 37 points of rsum.)
MIN_MEAN_COSINE = {"float16": 0.99, "int8": 0.9}


class Comparison(NamedTuple):
    """Embeddings of the same images or texts by the model and by an exported file.

    Attributes:
        expected: (N, D) of the model.
        actual: (N, D) of the file.
    """

    expected: np.ndarray
    actual: np.ndarray

    @property
    def difference(self) -> float:
        """The largest difference of two coordinates; NaN if a value is."""
        return float(np.abs(self.expected - self.actual).max(initial=0))

    @property
    def cosines(self) -> np.ndarray:
        """The cosine of each pair: (N,)."""
        return (self.expected * self.actual).sum(1)

    def check(self, precision: str, what: str) -> None:
        """Raise a UserError if the file does not compute what the model does.

        Args:
            precision: of the file.
            what: was compared, for the message.
        """
        fits = (self.difference <= MAX_DIFFERENCE[precision] if precision in MAX_DIFFERENCE
                else self.cosines.mean() >= MIN_MEAN_COSINE[precision])
        if not fits:  # also for NaN
            raise UserError(
                f"the exported file does not agree with the model: on {what} its embeddings differ "
                f"by up to {self.difference:.2g}, mean cosine {self.cosines.mean():.4f}; nothing "
                "was written" + ("; choose --precision float16" if precision == "int8" else ""),
                status=1)

    def __str__(self) -> str:
        """Return the largest difference and the smallest cosine as text."""
        return f"largest difference {self.difference:.1e}, smallest cosine {self.cosines.min():.4f}"


class ImageReport(NamedTuple):
    """What was found out about an exported image encoder.

    Attributes:
        comparison: with the model; of all images if recall was measured.
        model_recall, recall: retrieval metrics of the model and of the file; None without captions.
    """

    comparison: Comparison
    model_recall: dict[str, float] | None
    recall: dict[str, float] | None


def export_image_encoder(
    path: Path, model: DualEncoder, images: Flickr30kDataset, card: dict[str, Any], *,
    format: str, float_input: bool = False, with_recall: bool = False, what: str = "images",
) -> ImageReport:
    """Write an image encoder, read it back, and compare it with the model.

    A file of lower precision is compared within a wide margin, so the same file in float32 is
    compared first: that finds a mistake in the crop or the normalization. int8 is calibrated on
    images that are spread evenly over all.

    Args:
        path: the file to write; temporary, as it is there even if an error is raised.
        model: in eval mode, on the CPU.
        images: to compare on.
        card: of `image_card`; it names the precision. Measured recall is added to it.
        format: one of `export.FORMATS`.
        float_input: see `prepare_image_encoder`.
        with_recall: measure the recall of the file and of the model; `images` have captions.
        what: the images, for messages.

    Raises:
        UserError: the file does not agree with the model, cannot be written, or a package is not
            installed.
    """
    some = spread(len(images.records), COMPARED)
    rows = np.arange(len(images.records)) if with_recall else some
    model_recall = recall = None
    for precision in dict.fromkeys(("float32", card["precision"])):
        export = prepare_image_encoder(
            model, format, resize=card["resize"], precision=precision, float_input=float_input,
            calibration=batches(images, spread(len(images.records), CALIBRATED)))
        export.write(path, {**card, "precision": precision})
        is_last = precision == card["precision"]
        embed, _ = load_image_encoder(path, format)
        comparison = compare_images(model, embed, images, rows if is_last else some)
        comparison.check(precision, what)
    if with_recall:
        model_recall = measure_recall(model, comparison.expected, images)
        recall = measure_recall(model, comparison.actual, images)
        export.write(path, {**card, "recall": recall})
        embed, _ = load_image_encoder(path, format)
        compare_images(model, embed, images, some).check(card["precision"], what)
    return ImageReport(comparison, model_recall, recall)


def export_text_encoder(
    path: Path, model: DualEncoder, tokenizer: Tokenizer, captions: list[str],
    card: dict[str, Any], *, format: str,
) -> Comparison:
    """Write a text encoder, read it back, and compare it with the model.

    Args:
        path: see `export_image_encoder`.
        model: in eval mode, on the CPU.
        tokenizer: of the model.
        captions: see `compare_texts`.
        card: of `text_card`; it names the precision.
        format: npz or onnx.

    Raises:
        UserError: see `export_image_encoder`; or the text encoder is not a bag of words.
    """
    export = prepare_text_encoder(model, tokenizer, precision=card["precision"])
    write = export.write_onnx if format == "onnx" else export.write_npz
    write(path, card)
    embed, _ = load_text_encoder(path, format)
    comparison = compare_texts(model, embed, tokenizer, captions)
    comparison.check(card["precision"], "texts")
    return comparison


def spread(count: int, most: int) -> np.ndarray:
    """Return at most `most` of range(count), evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def batches(images: Flickr30kDataset, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield batches of the pixels of some images."""
    for start in range(0, len(rows), BATCH_SIZE):
        yield images.take_images(rows[start : start + BATCH_SIZE]).numpy()


@torch.inference_mode()
def compare_images(
    model: DualEncoder, embed: ImageFunction, images: Flickr30kDataset, rows: np.ndarray
) -> Comparison:
    """Embed images with the model, in float32 on the CPU, and with an exported file.

    Args:
        model: in eval mode.
        embed: of the file.
        images: a dataset, with or without captions.
        rows: the images of it that are compared.
    """
    expected, actual = [], []
    for start in tqdm(range(0, len(rows), BATCH_SIZE), desc="comparing", unit="batch", delay=2,
                      leave=False, file=sys.stderr):
        pixels = images.take_images(rows[start : start + BATCH_SIZE])
        expected.append(model.encode_image(eval_transform(pixels, model.config.image_size)).numpy())
        actual.append(embed(pixels.numpy()))
    return Comparison(np.concatenate(expected), np.concatenate(actual))


def compare_texts(
    model: DualEncoder, embed: TextFunction, tokenizer: Tokenizer, captions: list[str]
) -> Comparison:
    """Embed texts with the model and with an exported file.

    Args:
        model: in eval mode.
        embed: of the file.
        tokenizer: of the model; it cuts texts to its context length, the file does not.
        captions: texts; without any, groups of words of the vocabulary are taken.
    """
    words, length = tokenizer.words, tokenizer.context_length
    captions = captions or [" ".join(words[i : i + 3]) for i in range(0, len(words), 3)]
    texts = [caption if len(split_words(caption)) <= length
             else " ".join(split_words(caption)[:length]) for caption in captions[:COMPARED_TEXTS]]
    return Comparison(embed_tokens(model, tokenizer.encode(texts)).numpy(), embed(texts))


def measure_recall(
    model: DualEncoder, image_embeddings: np.ndarray, dataset: Flickr30kDataset
) -> dict[str, float]:
    """Return the retrieval metrics of embeddings of all images of a split, with its captions."""
    texts = embed_tokens(model, dataset.tokens)
    return retrieval_metrics(torch.from_numpy(image_embeddings), texts, dataset.image_index)
