"""What the scripts' command lines share: where the data lie and where the results go."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from pathlib import Path

from src.training.recipes import RECIPES
from src.utils.errors import UserError
from src.utils.paths import DataPaths, ResultPaths

# Flags and recipes of earlier versions -> their names today.
RENAMED = {"--mirror-mean": "--flip-tta", "--no-mirror-mean": "--no-flip-tta",
           "--recipe seed": "--recipe baseline"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help is the script's docstring, and whose errors are short."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        """Exit with status 2; print the error, the nearest flag, and where help is."""
        for unknown in re.findall(r"--[\w-]+", message.partition("unrecognized arguments")[2]):
            known = [flag for action in self._actions for flag in action.option_strings]
            near = RENAMED.get(unknown) or next(iter(difflib.get_close_matches(unknown, known, 1)),
                                                "")
            message += f"; did you mean {near}?" if near else ""
        if "--recipe" in message and "'seed'" in message:
            message += "; the recipe seed is called baseline now"
        if os.environ.get("LOCAL_RANK", "0") != "0":
            self.exit(2)  # the first process of this machine prints it
        self.exit(2, f"error: {message}\n{self.prog} --help lists all flags\n")


def add_results_arguments(parser: argparse.ArgumentParser) -> None:
    """--demo and --results-dir: what every script knows."""
    group = parser.add_argument_group("place")
    group.add_argument("--demo", action="store_true",
                       help="the small drawn world: data/demo and results/demo")
    group.add_argument("--results-dir", type=Path, metavar="DIR",
                       help="where everything is written (default: results)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """--data-dir, --images, --annotations, --cache-dir: where the photos and captions are."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", type=Path, metavar="DIR",
                       help="holds images/ and annotations/annotations.csv "
                       "(default: data/flickr30k)")
    group.add_argument("--images", type=Path, metavar="DIR",
                       help="folder of photos (default: DATA_DIR/images)")
    group.add_argument("--annotations", type=Path, metavar="FILE",
                       help="caption file in any known format "
                       "(default: DATA_DIR/annotations/annotations.csv)")
    group.add_argument("--cache-dir", type=Path, metavar="DIR",
                       help="where the decoded photos are kept (default: beside the images)")
    group.add_argument("--strict", action="store_true",
                       help="end with status 1 where a caption row or a photo cannot be used")


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """--seed, --val-fraction, --max-images: which photos train and which validate."""
    group = parser.add_argument_group("split")
    group.add_argument("--seed", type=int, default=0,
                       help="of the split and of all that is random (default: %(default)s)")
    group.add_argument("--val-fraction", type=fraction, default=0.1, metavar="X",
                       help="share of the photos that validates, where the caption file has no "
                       "split of its own (default: %(default)s)")
    group.add_argument("--max-images", type=positive_int, metavar="N",
                       help="take only N photos, for a quick try (default: all)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes of the model, where its weights come from, what is dropped in training."""
    from src.models.image_encoder import IMAGE_ENCODERS  # imports torch, which takes seconds

    group = parser.add_argument_group("model")
    group.add_argument("--image-encoder", choices=IMAGE_ENCODERS, default="efficientnet-b0",
                       help="(default: %(default)s)")
    group.add_argument("--weights", metavar="imagenet|none|PATH",
                       help="the image encoder's start (default: %(default)s)")
    group.add_argument("--image-size", type=positive_int, metavar="PIXELS",
                       help="side of the input pictures (default: %(default)s)")
    group.add_argument("--embed-dim", type=positive_int, default=256, metavar="D",
                       help="of the shared space (default: %(default)s)")
    group.add_argument("--token-dim", type=positive_int, metavar="D",
                       help="of the word embeddings (default: %(default)s)")
    group.add_argument("--context-length", type=positive_int, default=32, metavar="WORDS",
                       help="words kept of a caption (default: %(default)s)")
    group.add_argument("--min-freq", type=positive_int, metavar="N",
                       help="a word must come N times in the train captions (default: %(default)s)")
    group.add_argument("--dropout", type=fraction, metavar="P",
                       help="of the features before the projections (default: %(default)s)")
    group.add_argument("--drop-connect", type=fraction, metavar="P",
                       help="of the image encoder's last residual block (default: %(default)s)")
    group.add_argument("--word-dropout", type=fraction, metavar="P",
                       help="share of its words that a caption does without in training "
                       "(default: %(default)s)")
    group.add_argument("--flip-tta", action=argparse.BooleanOptionalAction,
                       help="wherever it is not trained on, describe a photo by the mean of its "
                       "own and its mirror image's features, for a second image pass a photo "
                       "(default: %(default)s)")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe and all that it says, what is frozen, and what the machine can bear."""
    from src.utils.runtime import PRECISIONS  # imports torch

    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=RECIPES,
                       help="defaults for the flags here; a flag given by hand beats it "
                       "(default: baseline; with --demo: demo)")
    group.add_argument("--epochs", type=positive_int, help="(default: %(default)s)")
    group.add_argument("--batch-size", type=positive_int, metavar="PHOTOS",
                       help="of all processes together (default: %(default)s)")
    group.add_argument("--captions-per-image", type=positive_int, metavar="N",
                       help="captions that each photo brings to a batch; with 5 an epoch takes "
                       "a fifth of the image passes (default: %(default)s)")
    group.add_argument("--lr", type=positive_float, help="(default: %(default)s)")
    group.add_argument("--image-encoder-lr", type=positive_float, metavar="LR",
                       help="of the image encoder alone (default: as --lr)")
    group.add_argument("--weight-decay", type=non_negative_float, help="(default: %(default)s)")
    group.add_argument("--schedule", choices=("constant", "cosine"),
                       help="of the learning rate (default: %(default)s)")
    group.add_argument("--warmup-steps", type=non_negative_int, metavar="N",
                       help="steps of linear warm-up (default: %(default)s)")
    group.add_argument("--ema-decay", type=fraction, metavar="SHARE",
                       help="evaluate and keep a moving average of the weights, of which each step "
                       "keeps this share, and less in a run's first steps; 0 for the weights "
                       "themselves (default: %(default)s)")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction,
                       help="mirror half of the photos (default: %(default)s)")
    group.add_argument("--freeze-image-encoder", action="store_true",
                       help="compute the image features once, keep them, and train the rest on "
                       "them: minutes on a laptop")
    group.add_argument("--head-epochs", type=non_negative_int, metavar="N",
                       help="train so for the first N epochs, then everything "
                       "(default: %(default)s)")
    group.add_argument("--freeze-batchnorm", action=argparse.BooleanOptionalAction,
                       help="normalize with the statistics that the weights came with "
                       "(default: %(default)s)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps "
                         "(default: %(default)s)")
    machine.add_argument("--precision", choices=PRECISIONS, default="auto",
                         help="of products and convolutions in training; auto: bfloat16 where the "
                         "device has it (default: %(default)s)")
    machine.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                         help="compile the image encoder with torch.compile, which takes a minute "
                         "or more at the first step (default: %(default)s)")
    machine.add_argument("--chunk-size", type=positive_int, metavar="PHOTOS",
                         help="train each process's batch in pieces of this size: the same "
                         "gradient, but for BatchNorm where it is not frozen, in less memory, for "
                         "a second pass forward (default: off)")
    machine.add_argument("--save-every", type=non_negative_float, default=10.0, metavar="MINUTES",
                         help="save within an epoch too; at most so much is lost to a power cut "
                         "(default: %(default)s)")
    machine.add_argument("--deterministic", action="store_true",
                         help="on a GPU too the same bits in every run, where that is slower; the "
                         "CPU gives them anyway")
    machine.add_argument("--resume", nargs="?", const=True, default=False, choices=("auto",),
                         help="continue the run in --results-dir, with its flags; auto: continue "
                         "it if there is one, and start it otherwise")


def apply_recipe(parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
    """Make the recipe that `argv` chooses the parser's defaults; --demo chooses 'demo'."""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--demo", action="store_true")
    chooser.add_argument("--recipe")
    chosen = chooser.parse_known_args(argv)[0]
    recipe = chosen.recipe or ("demo" if chosen.demo else "baseline")
    # One that there is not is refused when the parser sees it.
    parser.set_defaults(recipe=recipe, **RECIPES.get(recipe, RECIPES["baseline"]))


def resolve_results(args: argparse.Namespace) -> ResultPaths:
    """The places that the arguments of `add_results_arguments` mean."""
    return ResultPaths(args.results_dir or Path("results/demo" if args.demo else "results"))


def resolve_data(args: argparse.Namespace) -> DataPaths:
    """The places that the arguments of `add_data_arguments` mean."""
    data = args.data_dir or Path("data/demo" if args.demo else "data/flickr30k")
    images = args.images or data / "images"
    return DataPaths(
        images=images,
        annotations=args.annotations or data / "annotations" / "annotations.csv",
        cache=getattr(args, "cache_dir", None) or images.parent,
    )


def prepare_demo(args: argparse.Namespace, data: DataPaths) -> None:
    """With --demo, draw the demo's world where the data are looked for, if it is not there yet.

    Raises:
        UserError: --images or --annotations say that the data are elsewhere.
    """
    if args.demo and (args.images or args.annotations):
        raise UserError("--demo brings its own photos and captions: leave out --images and "
                        "--annotations, or leave out --demo")
    if args.demo:
        from src.data.synthetic import (
            make_demo_dataset,  # brings Pillow, which no other command line needs
        )

        make_demo_dataset(data.images.parent)


def prepare_results(folder: Path) -> None:
    """Make the results folder and see that it can be written, before hours of work depend on it.

    Raises:
        UserError: a file stands in its place, or it may not be written.
    """
    try:
        (folder / "models").mkdir(parents=True, exist_ok=True)
        probe = folder / "models" / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write results to {folder}: {error.strerror}; "
                        "choose another place with --results-dir") from error


def positive_int(text: str) -> int:
    """argparse type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def positive_float(text: str) -> float:
    """argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def non_negative_int(text: str) -> int:
    """argparse type: a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def non_negative_float(text: str) -> float:
    """argparse type: a number from 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def fraction(text: str) -> float:
    """argparse type: a number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("must be from 0 to below 1")
    return value


def defaults_from_checkpoint(
    parser: argparse.ArgumentParser, argv: list[str] | None, content: dict
) -> argparse.Namespace:
    """Parse again, with the checkpoint's training run as the defaults of data and split.

    So a split is evaluated as it was trained on, without saying so again. Where a flag says where
    the data are, none of the run's own places count.
    """
    trained = content.get("args", {})
    given = parser.parse_args(argv)
    places = ("data_dir", "images", "annotations", "cache_dir")
    defaults = {name: trained.get(name) for name in ("seed", "val_fraction", "max_images")}
    if not any(getattr(given, name, None) for name in places):
        defaults |= {name: Path(trained[name]) for name in places if trained.get(name)}
        if trained.get("demo"):
            defaults.setdefault("data_dir", Path("data/demo"))
    known = vars(given)
    parser.set_defaults(**{name: value for name, value in defaults.items()
                           if name in known and value is not None})
    return parser.parse_args(argv)


def plain_values(args: argparse.Namespace) -> dict:
    """Return the flags as plain values, for JSON and checkpoints."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()}
