"""What the scripts' command lines share: where the data lie and where the results go."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from src.errors import UserError


@dataclass(frozen=True)
class Data:
    """What a script reads: photos, captions, and the folder that keeps the decoded photos."""

    images: Path
    annotations: Path
    cache: Path


@dataclass(frozen=True)
class Results:
    """What the scripts write, below one folder."""

    folder: Path

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch."""
        return self.folder / "models" / "flickr30k_clip_best.pth"

    @property
    def last(self) -> Path:
        """The newest checkpoint, with all that --resume needs."""
        return self.folder / "models" / "flickr30k_clip_last.pth"

    @property
    def previous(self) -> Path:
        """The one that `last` was before, for the day that `last` is damaged."""
        return self.folder / "models" / "flickr30k_clip_previous.pth"

    @property
    def earlier(self) -> Path:
        """The best checkpoint of the run before this one."""
        return self.folder / "models" / "flickr30k_clip_best_earlier.pth"

    def put_aside(self) -> None:
        """Before a new run: what an earlier one could be resumed from is no longer the newest."""
        if self.last.exists():
            self.last.replace(self.last.with_name("flickr30k_clip_last_earlier.pth"))
        self.previous.unlink(missing_ok=True)

    @property
    def exported(self) -> Path:
        """The exported image encoder."""
        return self.folder / "models" / "image_encoder_from_clip.pth"


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


def resolve_results(args: argparse.Namespace) -> Results:
    """The places that the arguments of `add_results_arguments` mean."""
    return Results(args.results_dir or Path("results/demo" if args.demo else "results"))


def resolve_data(args: argparse.Namespace) -> Data:
    """The places that the arguments of `add_data_arguments` mean."""
    data = args.data_dir or Path("data/demo" if args.demo else "data/flickr30k")
    images = args.images or data / "images"
    return Data(
        images=images,
        annotations=args.annotations or data / "annotations" / "annotations.csv",
        cache=getattr(args, "cache_dir", None) or images.parent,
    )


def prepare_demo(args: argparse.Namespace, data: Data) -> None:
    """With --demo, draw the demo's world where the data are looked for, if it is not there yet.

    Raises:
        UserError: --images or --annotations say that the data are elsewhere.
    """
    if args.demo and (args.images or args.annotations):
        raise UserError("--demo brings its own photos and captions: leave out --images and "
                        "--annotations, or leave out --demo")
    if args.demo:
        from src.demo import draw_demo  # brings Pillow, which no other command line needs

        draw_demo(data.images.parent)


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


def recall_arguments(
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
