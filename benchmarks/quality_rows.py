"""The rows of the quality study: what each changes, and what was decided."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Row:
    """A way to train heads and words on frozen features; the defaults are the baseline recipe's.

    Attributes:
        name, section, what, verdict: text of the table.
        hidden: the naive baseline's heads: PyTorch's default linear layers with biases, a hidden
            ReLU layer for captions, and <unk> initialized like any word.
        idf: weight words by inverse document frequency.
        hard_negatives: exponent of the weight of likely negatives in the softmax.
        hinge: weight of VSE++'s hinge loss on the hardest negative, added to the loss.
        ema_decay: decay of an exponential moving average of the weights, 0 for none.
        flip_tta: use the mean of the features of the image and of its horizontal flip.
        flip: train on the features of either at random, evaluate those of the image.
    """

    name: str
    section: str
    what: str
    verdict: str = ""
    lr: float = 2e-5
    epochs: int = 5
    batch_size: int = 64
    captions_per_image: int = 1
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    token_dim: int = 512
    embed_dim: int = 256
    token_std: float = 0.002
    hidden: bool = False
    logit_scale: float = math.log(1 / 0.07)
    dropout: float = 0.1
    word_dropout: float = 0.0
    min_freq: int = 2
    idf: bool = False
    label_smoothing: float = 0.0
    hard_negatives: float = 0.0
    hinge: float = 0.0
    ema_decay: float = 0.0
    flip_tta: bool = False
    flip: bool = False


BASELINE = Row("baseline", "Recipes", "the baseline recipe: the defaults of train.py", "kept")
NAIVE = replace(
    BASELINE, name="naive", what="naive baseline: N(0, 1) words of 256, hidden ReLU layer, biases, "
    "logit_scale 1, no dropout; learning rate, batch and epochs of the baseline recipe",
    verdict="the reference", hidden=True, token_std=1.0, token_dim=256, logit_scale=1.0,
    dropout=0.0)
STRONG = replace(
    BASELINE, name="strong", what="heads of the strong recipe: batch 256, 5 captions per image and "
    "step, lr 1e-3, 8 epochs, warmup 20 and cosine, dropout 0.3 of features and words, flip TTA",
    verdict="kept", lr=1e-3, batch_size=256, captions_per_image=5, epochs=8,
    schedule="cosine", warmup_steps=20, dropout=0.3, word_dropout=0.3, flip_tta=True)


def _baseline(name: str, what: str, verdict: str = "", **changes: object) -> Row:
    """Return the baseline recipe with `changes`."""
    return replace(BASELINE, name=f"baseline-{name}", section="Changes to the baseline recipe",
                   what=what, verdict=verdict, **changes)


def _strong(name: str, what: str, verdict: str = "", **changes: object) -> Row:
    """Return the heads of the strong recipe with `changes`."""
    return replace(STRONG, name=f"strong-{name}", section="Changes to the strong recipe's heads",
                   what=what, verdict=verdict, **changes)


ROWS = [
    NAIVE, BASELINE, STRONG,
    _baseline("token-std-0.02", "words initialized at N(0, 0.02)", token_std=0.02),
    _baseline("token-std-1", "words initialized at N(0, 1)", token_std=1.0),
    _baseline("scale-1", "logit_scale initialized at 1", logit_scale=1.0),
    _baseline("hidden", "the naive baseline's hidden layer and biases", hidden=True),
    _baseline("lr-2e-4", "lr 2e-4", lr=2e-4),
    _baseline("flip-tta", "flip TTA", flip_tta=True),
    _strong("lr-3e-4", "lr 3e-4", lr=3e-4),
    _strong("lr-6e-4", "lr 6e-4", lr=6e-4),
    _strong("lr-2e-3", "lr 2e-3", lr=2e-3),
    _strong("epochs-20", "20 epochs", epochs=20),
    _strong("constant", "constant learning rate after the warmup", schedule="constant"),
    _strong("batch-64-lr-2.5e-4", "batch 64, lr 2.5e-4", batch_size=64, lr=2.5e-4),
    _strong("batch-128-lr-5e-4", "batch 128, lr 5e-4", batch_size=128, lr=5e-4),
    _strong("batch-512-lr-2e-3", "batch 512, lr 2e-3", batch_size=512, lr=2e-3),
    _strong("one-caption", "1 caption per image and step, 2 epochs: about as many image passes",
            captions_per_image=1, epochs=2),
    _strong("word-dropout-0", "no word dropout", word_dropout=0.0),
    _strong("word-dropout-0.5", "word dropout 0.5", word_dropout=0.5),
    _strong("dropout-0", "no dropout of features", dropout=0.0),
    _strong("dropout-0.1", "dropout of features 0.1", dropout=0.1),
    _strong("dropout-0.5", "dropout of features 0.5", dropout=0.5),
    _strong("weight-decay-1", "weight decay 1", weight_decay=1.0),
    _strong("token-dim-256", "words of 256", token_dim=256),
    _strong("embed-dim-1024", "shared space of 1,024", embed_dim=1024),
    _strong("min-freq-1", "all words of the training captions", min_freq=1),
    _strong("min-freq-5", "words seen 5 times", min_freq=5),
    _strong("label-smoothing", "label smoothing 0.1", label_smoothing=0.1),
    _strong("hard-negatives", "likely negatives weighted by their probability^0.5",
            hard_negatives=0.5),
    _strong("hinge", "VSE++'s hinge loss on the hardest negative, added", hinge=1.0),
    _strong("ema", "moving average of the weights, decay 0.98", ema_decay=0.98),
    _strong("idf", "words weighted by idf", idf=True),
    _strong("no-flip-tta", "no flip TTA", flip_tta=False),
    _strong("flip", "image or its flip at random in training, no flip TTA", flip_tta=False,
            flip=True),
]
