"""The flags of training, and the recipes: named sets of defaults for them.

A flag given by hand beats the recipe.
"""

from __future__ import annotations

import argparse

from src.cli import (
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from src.image_encoder import IMAGE_ENCODERS
from src.runtime import PRECISIONS

RECIPES = {
    # The stated one: fine-tune everything at one small rate.
    "seed": dict(
        weights="imagenet", image_size=224, min_freq=2, token_dim=512, dropout=0.1,
        drop_connect=0.2, word_dropout=0.0, epochs=5, batch_size=64, captions_per_image=1, lr=2e-5,
        image_encoder_lr=None, weight_decay=0.01, schedule="constant", warmup_steps=0, flip=True,
        head_epochs=0, freeze_batchnorm=False, mirror_mean=False,
        ema_decay=0.0,
    ),
}
# Heads first, on frozen features, then everything, at rates of their own; what is kept is the mean
# of the weights over some hundred steps. benchmarks/quality.md holds what was tried, and what paid.
RECIPES["strong"] = RECIPES["seed"] | dict(
    word_dropout=0.3, drop_connect=0.1, epochs=18, batch_size=128, captions_per_image=5, lr=1e-4,
    image_encoder_lr=3e-4, schedule="cosine", warmup_steps=20, head_epochs=8, mirror_mean=True,
    ema_decay=0.99,
)
# From random weights, on pictures of 64 pixels: another task than fine-tuning.
RECIPES["demo"] = RECIPES["seed"] | dict(
    weights="none", image_size=64, epochs=10, lr=3e-3, schedule="cosine", warmup_steps=20,
    captions_per_image=5, flip=False, min_freq=1, drop_connect=0.0, word_dropout=0.1,
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes of the model, where its weights come from, what is dropped in training."""
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
    group.add_argument("--mirror-mean", action=argparse.BooleanOptionalAction,
                       help="wherever it is not trained on, describe a photo by the mean of its "
                       "own and its mirror image's features, for a second image pass a photo "
                       "(default: %(default)s)")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe and all that it says, what is frozen, and what the machine can bear."""
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=RECIPES,
                       help="defaults for the flags here; a flag given by hand beats it "
                       "(default: seed; with --demo: demo)")
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
                       help="normalise with the statistics that the weights came with "
                       "(default: %(default)s)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps "
                         "(default: %(default)s)")
    machine.add_argument("--precision", choices=PRECISIONS, default="auto",
                         help="of products and convolutions in training; auto: bfloat16 where the "
                         "device has it (default: %(default)s)")
    machine.add_argument("--compile", action=argparse.BooleanOptionalAction,
                         help="fuse the image encoder's kernels with torch.compile, for a minute "
                         "or more at the first step (default: on a GPU, in a run that is long "
                         "enough)")
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
    machine.add_argument("--resume", action="store_true",
                         help="go on where the run in --results-dir was left, with its flags")


def apply_recipe(parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
    """Make the recipe that `argv` chooses the parser's defaults; --demo chooses 'demo'."""
    chooser = argparse.ArgumentParser(add_help=False)
    chooser.add_argument("--demo", action="store_true")
    chooser.add_argument("--recipe")
    chosen = chooser.parse_known_args(argv)[0]
    recipe = chosen.recipe or ("demo" if chosen.demo else "seed")
    # One that there is not is refused when the parser sees it.
    parser.set_defaults(recipe=recipe, **RECIPES.get(recipe, RECIPES["seed"]))
