"""Command-line flags that the scripts share, and the paths that they stand for."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

from src.training.recipes import RECIPES, recipe_defaults
from src.training.tensorboard import check_tensorboard
from src.utils.errors import UserError, print_message
from src.utils.paths import PRETRAINED, DataPaths, ResultPaths

# What flags and recipes are called in earlier versions or in other programs -> their names here.
RENAMED = {"--mirror-mean": "--flip-tta", "--no-mirror-mean": "--no-flip-tta",
           "--recipe seed": "--recipe baseline", "--port": "--serve"}

DEMO_RESULTS = Path("results/demo")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A formatter that does not break the names of models and programs at their hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help is the script's docstring, and whose errors are short."""

    usage = "%(prog)s [flags]"  # a list of all flags would be twenty lines

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, usage=self.usage, allow_abbrev=False,
                         formatter_class=_HelpFormatter)

    def error(self, message: str) -> None:
        """Exit with status 2; print the error, the nearest valid names, and where help is."""
        unknown = re.findall(r"--[\w-]+", message.partition("unrecognized arguments: ")[2])
        valid = {name: name for name in self._option_string_actions}
        if recipe := re.search(r"--recipe: invalid choice: '([^']*)'", message):
            unknown.append(f"--recipe {recipe[1]}")
            valid |= {f"--recipe {name}": f"--recipe {name}" for name in RECIPES}
        nearest = [valid[match] for name in unknown for match in (
            [RENAMED[name]] if RENAMED.get(name) in valid
            else difflib.get_close_matches(name, valid, 1))]
        if nearest:
            message += f"; did you mean {', '.join(nearest)}?"
        if os.environ.get("LOCAL_RANK", "0") != "0":
            self.exit(2)  # the first process of this machine prints it
        print_message(f"error: {message}\n{self.prog} --help lists all flags")
        self.exit(2)


class SearchParser(Parser):
    """A Parser whose texts may also follow flags, and that refuses a repeated flag.

    Flags with the action "extend" may be repeated.
    """

    usage = "%(prog)s [query ...] [flags]"

    def __init__(self, description: str | None) -> None:
        super().__init__(description)
        self.seen: set[str] = set()
        self.register("action", None, _StoreOnce)

    def error(self, message: str) -> None:
        """Exit like `Parser.error`; explain a word to avoid that is not quoted."""
        word = re.search(r"unrecognized arguments:.* (-[^-\s]\S+)", message)
        if word:
            message += f'; quote a word to avoid together with the others: "beach {word[1]}"'
        super().error(message)

    def parse_args(
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse a command line.

        A value after the first folder of --images that is neither a folder nor looks like a path
        is a query, as in `--images photos "a red car"`. Texts of one word each are one query, as
        in `search.py a red car`.
        """
        self.seen.clear()
        parsed = self.parse_intermixed_args(args, namespace)
        if isinstance(parsed.images, list):
            texts = [path for path in parsed.images[1:]
                     if not os.path.exists(path) and len(path.parts) == 1]
            parsed.images = [path for path in parsed.images if path not in texts]
            parsed.query = [*parsed.query, *map(str, texts)]
        if all(len(text.split()) < 2 for text in parsed.query) and parsed.query:
            parsed.query = [" ".join(parsed.query)]
        return parsed


class _StoreOnce(argparse._StoreAction):
    """Store a value; a second value of the same flag is an error."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
        option_string: str | None = None,
    ) -> None:
        if option_string and self.dest in parser.seen:
            parser.error(f"{option_string} is given twice")
        parser.seen.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


class Repeatable(argparse.Action):
    """Collect the values of a flag that may be repeated; they replace the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: list,
        option_string: str | None = None,
    ) -> None:
        """Add `values` to those given before."""
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if given is self.default else given), *values])


def add_results_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --demo and --results-dir, which every script has."""
    group = parser.add_argument_group("paths")
    group.add_argument("--demo", action="store_true",
                       help="use the synthetic dataset: data/demo and results/demo")
    group.add_argument("--results-dir", type=Path, metavar="DIR",
                       help="folder of all results (default: results)")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint and --pretrained, of which one may be given; both set `checkpoint`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--checkpoint", type=Path, metavar="FILE",
                       help="model to use (default: RESULTS_DIR/models/flickr30k_clip_best.pth)")
    group.add_argument("--pretrained", action="store_const", const=PRETRAINED, dest="checkpoint",
                       help="use the model that comes with the repository")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the images and captions, and --strict."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", type=Path, metavar="DIR",
                       help="folder with images/ and annotations/annotations.csv "
                       "(default: data/flickr30k)")
    group.add_argument("--images", type=Path, metavar="DIR",
                       help="folder of images (default: DATA_DIR/images)")
    group.add_argument("--annotations", type=Path, nargs="+", action=Repeatable, metavar="FILE",
                       help="caption files in any layout of docs/captions.md, also one for each "
                       "split (default: DATA_DIR/annotations/annotations.csv)")
    add_column_arguments(group)
    group.add_argument("--cache-dir", type=Path, metavar="DIR",
                       help="folder of the decoded images (default: beside the image folder)")
    group.add_argument("--follow-links", action="store_true",
                       help="also read images outside the folder that a link points to, as in the "
                       "caches of Hugging Face, DVC and git-annex")
    group.add_argument("--strict", action="store_true",
                       help="exit with status 1 if a caption row or an image cannot be used")


def add_column_arguments(group: argparse._ArgumentGroup) -> None:
    """Add --image-column, --caption-column and --split-column."""
    group.add_argument("--image-column", metavar="NAME",
                       help="column of the image names in the caption files; 1, 2, 3, ... in a "
                       "table without a header (default: found by its name)")
    group.add_argument("--caption-column", nargs=1, action=Repeatable, metavar="NAME",
                       help="column of the captions; may be repeated (default: found by its name)")
    group.add_argument("--split-column", metavar="NAME",
                       help="column that says train, val or test (default: split)")


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that determine which images are in which split."""
    group = parser.add_argument_group("split")
    group.add_argument("--seed", type=int, default=0,
                       help="seed of the split and of all random numbers (default: %(default)s)")
    group.add_argument("--val-fraction", type=fraction, metavar="X",
                       help="share of the images for validation, where the caption files have no "
                       "validation images; 0 to train without validation (default: 0.1, where the "
                       "caption files have no split)")
    group.add_argument("--split-files", type=Path, nargs="+", action=Repeatable, metavar="FILE",
                       help="lists of image names, such as Flickr_8k.trainImages.txt, with the "
                       "split in the file's name")
    group.add_argument("--max-images", type=positive_int, metavar="N",
                       help="use only N images, for a quick try (default: all)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model: sizes, initial weights, dropout."""
    from src.models.image_encoder import IMAGE_ENCODERS  # imports torch, which takes seconds

    group = parser.add_argument_group("model")
    group.add_argument("--image-encoder", choices=IMAGE_ENCODERS, default="efficientnet-b0",
                       metavar="NAME",
                       help="efficientnet-b0 to efficientnet-b7, or efficientnet-lite0 to "
                       "efficientnet-lite2 (default: %(default)s)")
    group.add_argument("--weights", metavar="imagenet|none|PATH",
                       help="initial weights of the image encoder (default: %(default)s)")
    group.add_argument("--image-size", type=positive_int, metavar="PIXELS",
                       help="height and width of the input (default: %(default)s)")
    group.add_argument("--embed-dim", type=positive_int, default=256, metavar="D",
                       help="dimensions of the shared embedding space (default: %(default)s)")
    group.add_argument("--text-encoder", choices=("words", "bert"), default="words",
                       help="words: a bag of words, trained from scratch; bert: a pretrained BERT, "
                       "which needs the package transformers (default: %(default)s)")
    group.add_argument("--text-weights", metavar="NAME_OR_FOLDER", default="bert-base-uncased",
                       help="of --text-encoder bert: a BERT, DistilBERT, MiniLM, RoBERTa, ... by "
                       "its name on the Hugging Face Hub, or its folder (default: %(default)s)")
    group.add_argument("--text-pooling", choices=("mean", "cls"), default="mean",
                       help="of --text-encoder bert: the mean of the last hidden states of all "
                       "tokens, or the state of the first (default: %(default)s)")
    group.add_argument("--token-dim", type=positive_int, metavar="D",
                       help="dimensions of the word embeddings of a bag of words "
                       "(default: %(default)s)")
    group.add_argument("--context-length", type=positive_int, default=32, metavar="WORDS",
                       help="words of a caption that are used; of --text-encoder bert, tokens "
                       "(default: %(default)s)")
    group.add_argument("--min-freq", type=positive_int, metavar="N",
                       help="the vocabulary of a bag of words holds the words that occur at least "
                       "N times in the training captions (default: %(default)s)")
    group.add_argument("--dropout", type=fraction, metavar="P",
                       help="dropout rate before the projections (default: %(default)s)")
    group.add_argument("--drop-connect", type=fraction, metavar="P",
                       help="stochastic depth rate of the image encoder's last block "
                       "(default: %(default)s)")
    group.add_argument("--word-dropout", type=fraction, metavar="P",
                       help="share of the words that a bag of words drops from a caption in "
                       "training (default: %(default)s)")
    group.add_argument("--flip-tta", action=argparse.BooleanOptionalAction,
                       help="in evaluation and search, average the features of an image and its "
                       "horizontal flip, for twice the time (default: %(default)s)")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that a recipe sets, and those of the frozen encoders."""
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=RECIPES,
                       help="defaults for the training and model flags; a flag on the command line "
                       "has priority (default: baseline; with --demo: demo)")
    group.add_argument("--epochs", type=positive_int, metavar="N",
                       help="passes over the training captions (default: %(default)s)")
    group.add_argument("--batch-size", type=positive_int, metavar="IMAGES",
                       help="images per step, over all processes (default: %(default)s)")
    group.add_argument("--captions-per-image", type=positive_int, metavar="N",
                       help="captions that each image brings to a batch; with 5 an epoch needs a "
                       "fifth of the image passes (default: %(default)s)")
    group.add_argument("--lr", type=positive_float, help="learning rate (default: %(default)s)")
    group.add_argument("--image-encoder-lr", type=positive_float, metavar="LR",
                       help="learning rate of the image encoder (default: --lr)")
    group.add_argument("--text-encoder-lr", type=positive_float, metavar="LR",
                       help="learning rate of --text-encoder bert; None for --lr (default: "
                       "%(default)s)")
    group.add_argument("--weight-decay", type=non_negative_float, metavar="X",
                       help="weight decay of AdamW (default: %(default)s)")
    group.add_argument("--schedule", choices=("constant", "cosine"),
                       help="learning rate schedule (default: %(default)s)")
    group.add_argument("--warmup-steps", type=non_negative_int, metavar="N",
                       help="steps of linear warm-up (default: %(default)s)")
    group.add_argument("--ema-decay", type=fraction, metavar="DECAY",
                       help="evaluate and save an exponential moving average of the weights; 0 "
                       "for the weights themselves (default: %(default)s)")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction,
                       help="flip half of the images horizontally (default: %(default)s)")
    group.add_argument("--freeze-image-encoder", action="store_true",
                       help="compute the image features once, save them, and train the rest on "
                       "them: minutes on a laptop")
    group.add_argument("--freeze-text-encoder", action="store_true",
                       help="do not train the BERT of --text-encoder bert; compute the features "
                       "of the captions once, and save them")
    group.add_argument("--head-epochs", type=non_negative_int, metavar="N",
                       help="train with a frozen image encoder for the first N epochs, then "
                       "everything (default: %(default)s)")
    group.add_argument("--freeze-batchnorm", action=argparse.BooleanOptionalAction,
                       help="normalize with the running statistics of the initial weights "
                       "(default: %(default)s)")


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the device and of the saved run."""
    from src.utils.runtime import PRECISIONS  # imports torch

    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto",
                       help="device to train on, such as cpu, cuda, cuda:1 or mps (default: "
                       "%(default)s)")
    group.add_argument("--precision", choices=PRECISIONS, default="auto",
                       help="precision of matrix products and convolutions in training; auto is "
                       "bfloat16 if the device supports it (default: %(default)s)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                       help="compile the image encoder with torch.compile, which takes a minute "
                       "or more at the first step (default: %(default)s)")
    group.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=True,
                       help="on one GPU, replay the training step as a CUDA graph, without the "
                       "time that launching its kernels takes; no effect with --chunk-size, with "
                       "BERT or in float16 (default: %(default)s)")
    group.add_argument("--chunk-size", type=positive_int, metavar="IMAGES",
                       help="train the batch of each process in chunks of this size: the same "
                       "gradient in less memory, for a second forward pass; BatchNorm, unless "
                       "frozen, then sees one chunk (default: off)")
    group.add_argument("--save-every", type=non_negative_float, default=10.0, metavar="MINUTES",
                       help="save within an epoch too, so that a power cut costs at most this "
                       "time (default: %(default)s)")
    group.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
                       help="also write the curves for TensorBoard, to RESULTS_DIR/tensorboard "
                       "(default: %(default)s)")
    group.add_argument("--deterministic", action="store_true",
                       help="give the same bits in every run on a GPU too, at some cost in "
                       "speed; a CPU always does")
    group.add_argument("--resume", nargs="?", const=True, default=False, choices=("auto",),
                       help="continue the run in --results-dir with its flags; auto: continue it "
                       "if there is one, and start it otherwise")


def apply_recipe(parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
    """Set the parser's defaults to the recipe that `argv` chooses; --demo chooses 'demo'."""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--demo", action="store_true")
    chooser.add_argument("--recipe")
    chooser.add_argument("--image-encoder")
    chosen = chooser.parse_known_args(argv)[0]
    recipe = chosen.recipe or ("demo" if chosen.demo else "baseline")
    # `parser` itself refuses an unknown recipe.
    known = recipe if recipe in RECIPES else "baseline"
    parser.set_defaults(recipe=recipe, **recipe_defaults(known, chosen.image_encoder))


def check_text_flags(args: argparse.Namespace) -> None:
    """Refuse a flag that the chosen text encoder would ignore.

    Raises:
        UserError: such a flag has another value than its default.
    """
    recipe = RECIPES.get(args.recipe, RECIPES["baseline"])
    of_words = {name: recipe[name] for name in ("min_freq", "token_dim", "word_dropout")}
    of_bert = dict(text_weights="bert-base-uncased", text_pooling="mean",
                   text_encoder_lr=recipe["text_encoder_lr"], freeze_text_encoder=False)
    ignored, needed = (of_words, "words") if args.text_encoder == "bert" else (of_bert, "bert")
    for name, default in ignored.items():
        if getattr(args, name) != default:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} needs --text-encoder {needed}: with {args.text_encoder} it "
                            "has no effect")


def resolve_results(args: argparse.Namespace) -> ResultPaths:
    """Return the result paths for the arguments of `add_results_arguments`."""
    return ResultPaths(args.results_dir or (DEMO_RESULTS if args.demo else Path("results")))


def resolve_data(args: argparse.Namespace) -> DataPaths:
    """Return the data paths for the arguments of `add_data_arguments`."""
    data = args.data_dir or Path("data/demo" if args.demo else "data/flickr30k")
    images = args.images or data / "images"
    annotations = args.annotations or data / "annotations" / "annotations.csv"
    if isinstance(annotations, str | Path):  # the checkpoints of earlier versions have one file
        annotations = [annotations]
    return DataPaths(
        images=images,
        annotations=[Path(path) for path in annotations],
        cache=getattr(args, "cache_dir", None) or images.parent,
        columns=dict(image_column=args.image_column, caption_columns=args.caption_column or (),
                     split_column=args.split_column),
    )


def scan_arguments(args: argparse.Namespace) -> dict:
    """Return the arguments of `scan_dataset` that the data and split flags mean."""
    data = resolve_data(args)
    return dict(
        images=data.images, annotations=data.annotations, val_fraction=args.val_fraction,
        seed=args.seed, max_images=args.max_images, **data.columns,
        split_files=[Path(path) for path in args.split_files or ()],
        follow_links=args.follow_links,
    )


def find_checkpoint(args: argparse.Namespace, results: ResultPaths) -> Path:
    """Return the checkpoint that the arguments of `add_checkpoint_arguments` mean.

    Raises:
        UserError: there is no such file; the message says which models there are.
    """
    checkpoint = args.checkpoint or results.best
    if args.checkpoint and not checkpoint.exists():
        raise UserError(f"there is no file {checkpoint}")
    if not checkpoint.exists():
        has_demo = not (args.demo or args.results_dir) and ResultPaths(DEMO_RESULTS).best.exists()
        raise UserError(
            f"there is no file {checkpoint}: "
            + ("use the model of the demo with --demo, " if has_demo else "")
            + f"train one with python train.py{' --demo' if args.demo else ''}, use the model of "
            "the repository with --pretrained, or name a checkpoint with --checkpoint")
    return checkpoint


def prepare_demo(args: argparse.Namespace, data: DataPaths) -> None:
    """With --demo, draw the synthetic dataset unless it is complete already.

    Raises:
        UserError: --images or --annotations name other data.
    """
    if not args.demo:
        return
    if args.images or args.annotations:
        raise UserError("--demo has its own images and captions: leave out --images and "
                        "--annotations, or leave out --demo")
    from src.data.synthetic import make_demo_dataset  # imports Pillow, which only --demo needs

    make_demo_dataset(data.images.parent)


def prepare_results(folder: Path, tensorboard: bool = False) -> None:
    """Create the results folder and check that it is writable, before hours of work depend on it.

    Raises:
        UserError: a file has that name, the folder is not writable, or `tensorboard` is asked for
            and not installed.
    """
    if tensorboard:
        check_tensorboard()
    try:
        (folder / "models").mkdir(parents=True, exist_ok=True)
        probe = folder / "models" / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write results to {folder}: {error.strerror}; choose another "
                        "folder with --results-dir") from error


def resume_command(args: argparse.Namespace, n_processes: int) -> str:
    """Return the command that continues the run of train.py with `args`."""
    launcher = f"torchrun --nproc-per-node {n_processes}" if n_processes > 1 else "python"
    place = " --demo" if args.demo else ""
    place += f" --results-dir {shlex.quote(str(args.results_dir))}" if args.results_dir else ""
    return f"{launcher} train.py --resume{place}"


def number(
    kind: type[int] | type[float], requirement: str, is_valid: Callable[[float], bool]
) -> Callable[[str], float]:
    """Return an argparse type: a `kind` for which `is_valid` holds, or an error that says which."""
    def parse(text: str) -> float:
        value = kind(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be {requirement}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it for text that is not a number
    return parse


def png_file(text: str) -> Path:
    """Return the path of a picture to write, for argparse."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text} must end in .png: pictures are PNG files")
    return Path(text)


positive_int = number(int, "at least 1", lambda value: value >= 1)
positive_float = number(float, "a finite number above 0", lambda value: 0 < value < math.inf)
non_negative_int = number(int, "at least 0", lambda value: value >= 0)
non_negative_float = number(float, "a finite number from 0", lambda value: 0 <= value < math.inf)
fraction = number(float, "at least 0 and below 1", lambda value: 0 <= value < 1)


def defaults_from_checkpoint(
    parser: argparse.ArgumentParser, argv: list[str] | None, content: dict
) -> argparse.Namespace:
    """Parse `argv` with the data and split of the checkpoint's training run as defaults.

    A split is then evaluated as it was trained on. If a flag names the data, the paths of the
    training run are not used.
    """
    trained = content.get("args", {})
    given = parser.parse_args(argv)
    paths = ("data_dir", "images", "annotations", "cache_dir", "split_files")
    columns = ("image_column", "caption_column", "split_column")
    defaults = {name: trained.get(name) for name in ("seed", "val_fraction", "max_images")}
    if not any(getattr(given, name, None) for name in paths):
        defaults |= {name: trained.get(name) for name in columns}
        defaults |= {
            name: [Path(path) for path in value] if isinstance(value, list) else Path(value)
            for name in paths if (value := trained.get(name))}
        if trained.get("demo"):
            defaults.setdefault("data_dir", Path("data/demo"))
    parser.set_defaults(**{name: value for name, value in defaults.items()
                           if name in given and value is not None})
    return parser.parse_args(argv)


def plain_values(args: argparse.Namespace) -> dict:
    """Return the flags as plain values, for JSON and checkpoints."""
    def plain(value: object) -> object:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(args).items()}
