"""The rows of the study of retrieval quality: what each changes, and whether it was kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Row:
    """One way to train heads and words on frozen features. The defaults are the seed recipe's.

    Attributes:
        name, about, what, verdict: how the table calls it, what was decided.
        words_lr, image_head_lr: rates of their own; None for `lr`.
        hidden: both towers as a student writes them: PyTorch's own linear layers with biases, a
            hidden ReLU layer on the text's side, and <unk> started like any word.
        text_dropout: of the text features; None for `dropout`, which is of both.
        word_weights: '' for the mean of the words, 'idf' for rare words weighing more, 'learned'
            for a weight a word.
        stems: 'rare' lends a rare word the vector of the commonest word of its stem, 'all' knows
            stems only.
        hard_negatives: how strongly the likeliest wrong answers weigh more in the softmax.
        hinge: weight of VSE++'s hinge on the hardest negative (margin 0.2), added to the loss.
        average: how much of the weights' moving average a step keeps; 0 for no averaging.
        views: the photo's views, one of which is drawn each time it is trained on.
        keep_sides: photos whose captions say left or right are never mirrored.
        mean_views: the mean of `views` in place of one, for training and evaluation.
        eval_views: the views whose embeddings' mean is evaluated.
    """

    name: str
    about: str
    what: str
    verdict: str = ""
    lr: float = 2e-5
    words_lr: float | None = None
    image_head_lr: float | None = None
    epochs: int = 5
    batch_size: int = 64
    captions_per_image: int = 1
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    token_dim: int = 512
    embed_dim: int = 256
    word_std: float = 0.002
    hidden: bool = False
    logit_scale: float = math.log(1 / 0.07)
    fixed_scale: bool = False
    dropout: float = 0.1
    text_dropout: float | None = None
    word_dropout: float = 0.0
    min_freq: int = 2
    word_weights: str = ""
    stems: str = ""
    label_smoothing: float = 0.0
    hard_negatives: float = 0.0
    hinge: float = 0.0
    average: float = 0.0
    views: tuple[str, ...] = ("centre",)
    keep_sides: bool = False
    mean_views: bool = False
    eval_views: tuple[str, ...] = ("centre",)


SEED = Row("seed", "The plain script and the recipes", "the seed recipe: the product's defaults",
           "kept")
PLAIN = replace(
    SEED, name="plain", what="the plain script: N(0, 1) words of 256, hidden ReLU layer, biases, "
    "scale e; lr, batch and epochs of the seed recipe", verdict="the baseline",
    hidden=True, word_std=1.0, token_dim=256, logit_scale=1.0, dropout=0.0)
STRONG = replace(
    SEED, name="strong", what="strong on frozen features: lr 1e-3, batch 256, 5 captions a photo "
    "and step, 10 epochs, warm-up 20 and cosine, word dropout 0.3",
    verdict="what the rows below vary; kept as `strong-heads`",
    lr=1e-3, batch_size=256, captions_per_image=5, epochs=10, schedule="cosine", warmup_steps=20,
    word_dropout=0.3)
MIRROR, CROPS = ("centre", "mirror"), ("centre", "mirror", "top left", "bottom right")


def _seed(name: str, what: str, verdict: str = "", **changes: object) -> Row:
    """The seed recipe but for `changes`."""
    return replace(SEED, name=f"seed-{name}", about="The seed recipe but for one thing",
                   what=what, verdict=verdict, **changes)


def _strong(name: str, what: str, verdict: str = "", **changes: object) -> Row:
    """Strong but for `changes`."""
    return replace(STRONG, name=f"strong-{name}", about="Strong but for one thing",
                   what=what, verdict=verdict, **changes)


ROWS = [
    PLAIN, SEED, STRONG,
    _seed("std-0.02", "words started at N(0, 0.02)", "not kept: 0.002", word_std=0.02),
    _seed("words-n01", "words started at N(0, 1)", "not kept: 0.002", word_std=1.0),
    _seed("scale-e", "logit_scale starts at 1", "not kept: ln(1/0.07)", logit_scale=1.0),
    _seed("hidden", "the plain script's hidden layer and biases", "one linear map kept",
          hidden=True),
    _seed("lr-1e-3", "lr 1e-3 for all that is new, constant",
          "not kept: a higher rate alone overfits", lr=1e-3),
    _seed("lr-2e-4", "lr 2e-4 for all that is new, constant", "not kept: overfits", lr=2e-4),
    _seed("token-dim-256", "words of 256", "not kept: 512", token_dim=256),
    _seed("token-dim-1024", "words of 1,024", "not kept: 512", token_dim=1024),
    _seed("cosine", "warm-up 100 and cosine", "not kept: no difference seen", schedule="cosine",
          warmup_steps=100),
    _seed("word-dropout", "word dropout 0.2", "not kept: no difference seen", word_dropout=0.2),
    _seed("five-captions", "5 captions a photo and step, 5 epochs",
          "not kept: a fifth of the steps", captions_per_image=5),
    _strong("batch-128", "batch 128", "not kept: 256, at this rate", batch_size=128),
    _strong("batch-64", "batch 64", "not kept: 256, at this rate", batch_size=64),
    _strong("no-word-dropout", "no word dropout", "not kept: 0.3", word_dropout=0.0),
    _strong("scale-10", "logit_scale starts at ln 10", "not kept: no difference seen",
            logit_scale=math.log(10)),
    _strong("one-dropout", "word dropout in place of dropout of text features",
            "no difference seen; one flag for both", text_dropout=0.0),
    _strong("eval-mirror", "evaluation: mean of the photo's and its mirror's embedding",
            "pays: kept as --flip-tta, of features in place of embeddings", eval_views=MIRROR),
    _strong("lr-3e-4", "lr 3e-4", "not kept: a point, at the edge of the spread", lr=3e-4),
    _strong("heads", "batch 128, lr 1e-4, 8 epochs, features: mean of centre and mirror",
            "kept: the first phase of --recipe strong", batch_size=128, lr=1e-4, epochs=8,
            views=MIRROR, mean_views=True),
    _strong("heads-lr-3e-4", "the same at lr 3e-4",
            "pays; not in the recipe: fine-tuned at this rate no better",
            batch_size=128, lr=3e-4, epochs=8, views=MIRROR, mean_views=True),
    _strong("batch-128-lr-5e-4", "batch 128, lr 5e-4, 5 epochs",
            "not kept: fine-tuning wants a gentler rate for the heads", batch_size=128, lr=5e-4,
            epochs=5),
    _strong("weight-decay-0.1", "weight decay 0.1", "not kept: no difference seen",
            weight_decay=0.1),
    _strong("weight-decay-1", "weight decay 1", "not kept: no difference seen", weight_decay=1.0),
    _strong("no-weight-decay", "no weight decay", "not kept: no difference seen",
            weight_decay=0.0),
    _strong("constant", "constant rate after the warm-up", "not kept: cosine",
            schedule="constant"),
    _strong("no-warm-up", "no warm-up", "no difference; kept for the fine-tuning that follows",
            warmup_steps=0),
    _strong("token-dim-256", "words of 256", "not kept: 512", token_dim=256),
    _strong("token-dim-1024", "words of 1,024", "not kept: 512", token_dim=1024),
    _strong("one-caption", "1 caption a photo and step, 2 epochs: as many image passes",
            "5 kept: no difference seen", captions_per_image=1, epochs=2),
    _strong("epochs-5", "5 epochs", "as good in half the time: see the row above", epochs=5),
    _strong("epochs-20", "20 epochs", "not kept: overfits", epochs=20),
    _strong("batch-512", "batch 512, 20 epochs: as many steps", "not kept", batch_size=512,
            epochs=20),
    _strong("label-smoothing", "label smoothing 0.1", "not kept", label_smoothing=0.1),
    _strong("hard-negatives", "likelier negatives weigh more (0.5)", "not kept",
            hard_negatives=0.5),
    _strong("hinge", "hinge on the hardest negative, as in VSE++, added", "not kept", hinge=1.0),
    _strong("average", "moving average of the weights, 0.98 a step", "not kept", average=0.98),
    _strong("idf", "words weighted by idf", "not kept", word_weights="idf"),
    _strong("word-weights", "a learned weight a word", "not kept", word_weights="learned"),
    _strong("rare-stems", "rare and unknown words take the vector of their stem's commonest word",
            "not kept: no difference seen", stems="rare"),
    _strong("stems", "stems in place of words", "not kept: no difference seen", stems="all"),
    _strong("min-freq-1", "every train word in the vocabulary", "not kept: 2", min_freq=1),
    _strong("min-freq-5", "words seen 5 times", "not kept: 2", min_freq=5),
    _strong("words-lr", "words at a third of the rate", "not kept: one rate for all",
            words_lr=3e-4),
    _strong("image-head-lr", "image head at a third of the rate", "not kept: one rate for all",
            image_head_lr=3e-4),
    _strong("mirror", "half of the photos mirrored in training", "no difference seen",
            views=MIRROR),
    _strong("mirror-sides", "the same, but for photos whose captions say left or right",
            "no difference seen", views=MIRROR, keep_sides=True),
    _strong("dropout-0", "no dropout of features", "not kept: 0.1", dropout=0.0),
    _strong("dropout-0.5", "dropout of both features 0.5", "not kept: 0.1", dropout=0.5),
    _strong("word-dropout-0.5", "word dropout 0.5", "not kept: no difference seen",
            word_dropout=0.5),
    _strong("embed-dim-1024", "shared space of 1,024", "not kept: 256", embed_dim=1024),
    _strong("scale-10-fixed", "logit_scale kept at ln 10", "not kept: no difference seen",
            logit_scale=math.log(10), fixed_scale=True),
    _strong("crops", "training on four views: centre, mirror, two corners", "no difference seen",
            views=CROPS, keep_sides=True),
    _strong("mean-views", "features: mean of the four views, training and evaluation",
            "pays no more than two: --flip-tta", views=CROPS, mean_views=True),
]
