"""Export the image encoder of a trained checkpoint. Trains nothing.

    python train_image_only.py
    python train_image_only.py --checkpoint other.pth --output encoder.pth

The file holds the weights of the EfficientNet and of its projection, and what
is needed to prepare the input: name, image size, mean and standard deviation.
The README has an example that loads it without this project.
"""

from __future__ import annotations

from src.utils.script import run_script, start_script

if __name__ == "__main__":
    start_script("PyTorch")  # before the imports, which take seconds

from pathlib import Path

from src.cli import (
    Parser,
    add_checkpoint_arguments,
    add_results_arguments,
    find_checkpoint,
    resolve_results,
)
from src.data.pixel_store import store_size
from src.models.checkpoint import export_image_encoder, load_checkpoint


def main(argv: list[str] | None = None) -> int:
    """Load a checkpoint and write its image encoder. Returns the exit status."""
    parser = Parser(description=__doc__)
    add_results_arguments(parser)
    add_checkpoint_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="file to write "
                        "(default: RESULTS_DIR/models/image_encoder_from_clip.pth)")
    args = parser.parse_args(argv)
    results = resolve_results(args)
    checkpoint, output = find_checkpoint(args, results), args.output or results.exported
    model, _, content = load_checkpoint(checkpoint)
    export_image_encoder(output, model, resize=store_size(model.config.image_size))
    print(f"exported {model.config.image_encoder} of epoch {content.get('epoch')} "
          f"({output.stat().st_size / 1e6:.1f} MB): {output}")
    return 0


if __name__ == "__main__":
    run_script(main)
