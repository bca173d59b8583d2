"""The image encoder in PyTorch and as exported files: size, speed, cosine, recall.

    python -m benchmarks.export [--images FOLDER --annotations FILE] [--checkpoint FILE]

All take stored uint8 images and return embeddings, in turn, on all cores. The
cosines are to PyTorch in float32. Recall is that of the validation images; without
captions it is not measured, and the images are generated.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import installed, interleaved, machine, ratio
from src.data.dataset import Flickr30kDataset
from src.data.pixel_store import store_size
from src.data.prepare import prepare_datasets, prepare_images
from src.data.source import scan_dataset
from src.data.synthetic import make_demo_dataset
from src.data.transforms import eval_transform
from src.evaluation.export_check import CALIBRATED, batches, measure_recall, spread
from src.models.checkpoint import load_checkpoint
from src.models.dual_encoder import DualEncoder
from src.models.export import image_card, load_image_encoder, prepare_image_encoder
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError
from src.utils.paths import PRETRAINED
from src.utils.runtime import tune_malloc

REFERENCE = "PyTorch float32"


def main() -> int:
    """Print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=PRETRAINED,
                        help="(default: the model that comes with the repository)")
    parser.add_argument("--images", type=Path, help="image folder (default: generated images)")
    parser.add_argument("--annotations", type=Path, help="caption file with validation images")
    parser.add_argument("--count", type=int, default=64,
                        help="images of a timing (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    args = parser.parse_args()
    tune_malloc()
    model, tokenizer, _ = load_checkpoint(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(sys.stderr):
            images = open_images(args, Path(folder), model, tokenizer)
        try:
            contenders = make_contenders(Path(folder), model, images)
        except UserError as error:
            print(f"  not measured: {error}")
            return 0
        print_table(args, model, images, contenders)
    return 0


def open_images(
    args: argparse.Namespace, folder: Path, model: DualEncoder, tokenizer: Tokenizer
) -> Flickr30kDataset:
    """Return the validation images of a caption file, or generated images without captions."""
    size = model.config.image_size
    if not args.annotations:
        if not args.images:
            make_demo_dataset(folder / "demo", args.count)
        paths = sorted((args.images or folder / "demo" / "images").iterdir())
        return prepare_images([paths[i] for i in spread(len(paths), args.count)], tokenizer, size)
    source = scan_dataset(args.images, args.annotations)
    [dataset] = prepare_datasets(source, [source.splits["val"]], tokenizer, size, cache=folder,
                                 rejected=folder / "rejected.csv", strict=False)
    return dataset


def make_contenders(
    folder: Path, model: DualEncoder, images: Flickr30kDataset
) -> dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]]:
    """Return for each row of the table its function and the size of its file in bytes."""
    size, resize = model.config.image_size, store_size(model.config.image_size)

    def pytorch(dtype: torch.dtype) -> Callable[[np.ndarray], np.ndarray]:
        @torch.inference_mode()
        def embed(pixels: np.ndarray) -> np.ndarray:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return model.encode_image(eval_transform(torch.from_numpy(pixels), size)).numpy()

        return embed

    contenders = {REFERENCE: (pytorch(torch.float32), 0.0),
                  "PyTorch bfloat16": (pytorch(torch.bfloat16), 0.0)}
    for format, precision in (("torch", "float32"), ("onnx", "float32"), ("onnx", "float16"),
                              ("onnx", "int8")):
        path = folder / f"{format}_{precision}"
        rows = spread(len(images.records), CALIBRATED)
        export = prepare_image_encoder(model, format, resize=resize, precision=precision,
                                       calibration=batches(images, rows))
        export.write(path, image_card(model, resize=resize, precision=precision))
        if format == "torch":  # its speed is that of PyTorch
            contenders = {name: (own, path.stat().st_size) for name, (own, _) in contenders.items()}
        else:
            contenders[f"onnxruntime {precision}"] = (load_image_encoder(path, format)[0],
                                                      path.stat().st_size)
    return contenders


def print_table(
    args: argparse.Namespace, model: DualEncoder, images: Flickr30kDataset, contenders: dict
) -> None:
    """Measure the contenders and print a line for each."""
    some = [batch for batch in batches(images, spread(len(images.records), args.count))]
    count = sum(map(len, some))

    def run(embed: Callable[[np.ndarray], np.ndarray]) -> Callable[[], None]:
        return lambda: [embed(batch) for batch in some]

    times = dict(zip(contenders, interleaved([run(embed) for embed, _ in contenders.values()],
                                             args.repeats), strict=True))
    rows = np.arange(len(images.records)) if images.captions else spread(
        len(images.records), args.count)
    embeddings = {name: np.concatenate([embed(batch) for batch in batches(images, rows)])
                  for name, (embed, _) in contenders.items()}
    print(f"{machine()}, onnxruntime {installed('onnxruntime')}")
    print(f"{model.config.image_encoder} at {model.config.image_size} pixels"
          f"{', flip TTA' if model.config.flip_tta else ''}; {count} images in batches of "
          f"{len(some[0])}, {args.repeats} runs; cosine and recall on {len(rows):,} images")
    for name, (_, size) in contenders.items():
        speeds = [count / seconds for seconds in times[name]]
        cosines = (embeddings[name] * embeddings[REFERENCE]).sum(1)
        recall = (f"rsum {measure_recall(model, embeddings[name], images)['rsum']:.1f}"
                  if images.captions else "")
        print(f"  {name:20} {size / 1e6:5.1f} MB  {np.median(speeds):6.1f} images/s "
              f"({min(speeds):.1f} to {max(speeds):.1f})  "
              f"time of PyTorch bfloat16 / this {ratio(times['PyTorch bfloat16'], times[name])}  "
              f"cosine mean {cosines.mean():.5f}, min {cosines.min():.4f}  {recall}")


if __name__ == "__main__":
    sys.exit(main())
