"""Export the image encoder of a trained checkpoint. Trains nothing.

    python train_image_only.py
    python train_image_only.py --checkpoint other.pth --output encoder.pth
    python train_image_only.py --format onnx --text    # to run without PyTorch
    python train_image_only.py --format onnx --precision int8
    python train_image_only.py --pretrained --images ~/Pictures

The file holds the weights of the EfficientNet and of its projection, and a
model card: name, image size, mean, standard deviation, recall. Each file is
read back and compared with the model, on validation images of the training
run, on those of --images, or else on generated images. Files get their names
only if all of them agree with the model.
docs/export.md has examples that use the files without this project.
"""

from __future__ import annotations

from src.utils.script import run_script, start_script

if __name__ == "__main__":
    start_script("PyTorch")  # before the imports, which take seconds

import argparse
import contextlib
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from src.cli import (
    Parser,
    add_checkpoint_arguments,
    add_data_arguments,
    add_results_arguments,
    add_split_arguments,
    defaults_from_checkpoint,
    find_checkpoint,
    resolve_data,
    resolve_results,
    scan_arguments,
)
from src.data.dataset import Flickr30kDataset
from src.data.pixel_store import store_size
from src.data.prepare import prepare_datasets, prepare_images
from src.data.source import scan_dataset
from src.data.synthetic import make_demo_dataset
from src.evaluation.export_check import (
    CALIBRATED,
    COMPARED,
    ImageReport,
    export_image_encoder,
    export_text_encoder,
    spread,
)
from src.evaluation.metrics import RECALL_AT
from src.models.checkpoint import Checkpoint, load_checkpoint
from src.models.export import (
    FORMATS,
    PRECISIONS,
    check_packages,
    check_text_encoder,
    image_card,
    text_card,
)
from src.search.update_index import find_images
from src.utils.errors import UserError, print_message
from src.utils.files import fingerprint, replace_on_success
from src.utils.paths import PRETRAINED
from src.utils.runtime import tune_malloc


def main(argv: list[str] | None = None) -> int:
    """Load a checkpoint, write and compare its encoders. Returns the exit status."""
    parser = Parser(description=__doc__)
    add_results_arguments(parser)
    add_checkpoint_arguments(parser)
    add_export_arguments(parser)
    add_data_arguments(parser)
    add_split_arguments(parser)
    given = parser.parse_args(argv)
    if given.format != "onnx" and (given.precision == "int8" or given.float_input):
        flag = "--float-input" if given.float_input else "--precision int8"
        raise UserError(f"{flag} is for --format onnx")
    check_packages(given.format)
    results = resolve_results(given)
    path = find_checkpoint(given, results)
    checkpoint = load_checkpoint(path)
    args = defaults_from_checkpoint(parser, argv, checkpoint.content)
    if args.text:
        check_text_encoder(checkpoint.model)
    tune_malloc()
    images, what = open_images(given, args, checkpoint)
    name = f"{'pretrained_' if path == PRETRAINED else ''}{results.exported.stem}"
    output = args.output or results.exported.with_name(f"{name}{FORMATS[args.format]}")
    text_output = results.exported_text
    if path == PRETRAINED:  # an export of the user's own model stays
        text_output = text_output.with_stem(f"pretrained_{text_output.stem}")
    if args.output:
        text_output = output.with_name(f"{output.stem}_text.npz")
    text_formats = ("npz", "onnx") if args.format == "onnx" else ("npz",)
    outputs = [output, *(text_output.with_suffix(f".{each}") for each in text_formats if args.text)]
    about = describe(path, checkpoint.content)
    with contextlib.ExitStack() as files:  # if one file is not right, none gets its name
        new, *new_texts = [files.enter_context(replace_on_success(each)) for each in outputs]
        contents = [export_images(new, args, checkpoint, images, what, about)]
        for each, format in zip(new_texts, text_formats, strict=False):
            contents.append(export_text(each, format, args, checkpoint, images, about))
    for content, each in zip(contents, outputs, strict=True):
        print(f"exported {content}: {each}")
    return 0


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what is written."""
    group = parser.add_argument_group("export")
    group.add_argument("--format", choices=FORMATS, default="torch",
                       help="torch, onnx or safetensors (default: %(default)s)")
    group.add_argument("--precision", choices=PRECISIONS, default="float32",
                       help="float16 stores the weights in half precision; int8 also quantizes "
                       "the activations, for --format onnx (default: %(default)s)")
    group.add_argument("--float-input", action="store_true",
                       help="onnx: take float32 (B, 3, H, W) that the caller has cropped and "
                       "normalized (default: uint8 (B, H, W, 3))")
    group.add_argument("--text", action="store_true",
                       help="also write the text encoder, as .npz, and with --format onnx as .onnx")
    group.add_argument("--output", type=Path, metavar="FILE",
                       help="file to write; --text adds FILE_text.npz (default: "
                       "RESULTS_DIR/models/image_encoder_from_clip.pth, .onnx or .safetensors; "
                       "with --pretrained pretrained_image_encoder_from_clip)")


def open_images(
    given: argparse.Namespace, args: argparse.Namespace, checkpoint: Checkpoint
) -> tuple[Flickr30kDataset, str]:
    """Return the images to compare on, and what they are.

    Args:
        given: the flags of the command line.
        args: the same with the data of the training run as defaults.
        checkpoint: the model.

    Raises:
        UserError: flags name images or captions that cannot be used, or there are no images for
            the calibration of int8.
    """
    model, tokenizer, content = checkpoint
    size = model.config.image_size
    names_captions = bool(given.annotations or given.data_dir)
    if given.images and not names_captions:
        names = sorted(find_images(given.images, follow_links=given.follow_links).found)
        if not names:
            raise UserError(f"there are no images in {given.images}")
        chosen = [given.images / names[i] for i in spread(len(names), CALIBRATED)]
        return prepare_images(chosen, tokenizer, size), f"images of {given.images}"
    if names_captions or content.get("args"):
        try:
            return open_validation(args, checkpoint), "validation images"
        except UserError as error:
            if names_captions:
                raise
            reason = str(error).partition("\n")[0]
            print_message(f"note: no validation images of the training run: {reason}")
    if args.precision == "int8":
        raise UserError("int8 is calibrated on images: give some with --images DIR, or validation "
                        "images with --images DIR --annotations FILE")
    with tempfile.TemporaryDirectory() as folder:
        make_demo_dataset(Path(folder), COMPARED)
        return (prepare_images(sorted(Path(folder).rglob("*.png")), tokenizer, size),
                "generated images (--images DIR takes yours)")


def open_validation(args: argparse.Namespace, checkpoint: Checkpoint) -> Flickr30kDataset:
    """Return the validation images, or a few of them if no recall is to be measured.

    Raises:
        UserError: there are none, or none can be decoded.
    """
    model, tokenizer, content = checkpoint
    data = resolve_data(args)
    source = scan_dataset(**scan_arguments(args))
    records = source.splits["val"]
    if not records:
        raise UserError(source.explain_no_validation())
    if not needs_recall(args, content):
        records = [records[i] for i in spread(len(records), COMPARED)]
    [dataset] = prepare_datasets(
        source, [records], tokenizer, model.config.image_size, cache=data.cache,
        rejected=resolve_results(args).folder / "rejected_export.csv", strict=args.strict)
    if not dataset.records:
        raise UserError("no validation image can be decoded")
    return dataset


def needs_recall(args: argparse.Namespace, content: dict) -> bool:
    """Return whether recall is to be measured: it may have changed, or is not known."""
    return args.precision != "float32" or not stored_recall(content)


def stored_recall(content: dict) -> dict[str, float] | None:
    """Return the metrics of a checkpoint, if they are of its weights.

    Those of a last checkpoint may be of the moving average, or of the epoch before.
    """
    if content.get("average_state") or content.get("progress"):
        return None
    return content.get("metrics") or None


def describe(path: Path, content: dict) -> dict[str, Any]:
    """Return the part of the model card that says where the model comes from."""
    data = "described in src/models/pretrained/README.md" if path == PRETRAINED else None
    if trained := content.get("args"):
        folder = trained.get("images") or trained.get("data_dir") or (
            "demo" if trained.get("demo") else "flickr30k")
        files = trained.get("annotations") or []
        # Names only: the files are passed on, and paths say where a user keeps them.
        data = ", ".join(Path(name).name for name in (
            folder, *([files] if isinstance(files, str) else files)))
    return {"recall": stored_recall(content), "data": data, "epoch": content.get("epoch"),
            "checkpoint": fingerprint(path), "date": str(date.today())}


def export_images(
    path: Path, args: argparse.Namespace, checkpoint: Checkpoint,
    images: Flickr30kDataset, what: str, about: dict[str, Any],
) -> str:
    """Write the image encoder, and print how it compares with the model. Returns what it is."""
    model, _, content = checkpoint
    card = image_card(model, resize=store_size(model.config.image_size), precision=args.precision,
                      float_input=args.float_input) | about
    report = export_image_encoder(
        path, model, images, card, format=args.format, float_input=args.float_input,
        with_recall=bool(images.captions) and needs_recall(args, content), what=what)
    print(f"compared on {len(report.comparison.expected):,} {what}: {report.comparison}")
    if report.recall:
        print(format_recall(report))
    elif args.precision != "float32":
        print(f"recall not measured: the {what.split(' (')[0]} have no captions")
    tta = ", with flip TTA" if model.config.flip_tta else ""
    return (f"{model.config.image_encoder} of epoch {content.get('epoch')}{tta} "
            f"({path.stat().st_size / 1e6:.1f} MB)")


def format_recall(report: ImageReport) -> str:
    """Return the recall of the model and of the file as text, below each other."""
    lines = [f"{'':8} image to text R@1/5/10   text to image R@1/5/10    rsum"]
    for name, metrics in (("model", report.model_recall), ("exported", report.recall)):
        values = ["".join(f"{metrics[f'{direction}_R@{k}']:7.1f}" for k in RECALL_AT)
                  for direction in ("image_to_text", "text_to_image")]
        lines.append(f"{name:8} {values[0]:>22}   {values[1]:>22} {metrics['rsum']:7.1f}")
    loss = report.recall["rsum"] - report.model_recall["rsum"]
    return "\n".join([*lines, f"rsum changes by {loss:+.1f}"])


def export_text(
    path: Path, format: str, args: argparse.Namespace, checkpoint: Checkpoint,
    images: Flickr30kDataset, about: dict[str, Any],
) -> str:
    """Write the text encoder as npz or onnx. Returns what it is, and how it compares."""
    model, tokenizer, _ = checkpoint
    # A table of words in half precision is small, and nothing is gained by computing in int8.
    precision = "float32" if args.precision == "float32" else "float16"
    card = text_card(model, precision=precision) | about
    comparison = export_text_encoder(path, model, tokenizer, images.captions, card, format=format)
    return f"{len(tokenizer):,} words ({path.stat().st_size / 1e6:.1f} MB, {comparison})"


if __name__ == "__main__":
    run_script(main)
