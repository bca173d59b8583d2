"""Bag of words against BERT on the same frozen image features: retrieval, and word order.

    python -m benchmarks.text_encoders --features features.npz --images DIR --annotations FILE \
        --image-encoder efficientnet-lite0 --text-weights FOLDER
    python -m benchmarks.text_encoders --features features.npz --text-weights FOLDER --device cuda

The first command computes the image features and writes them with the captions to --features; if
the file is there, neither images nor the weights of the image encoder are needed. Every row has
the same batches and passes. Metrics are those after the last epoch on all validation images.

Word order: in validation captions two people or animals, or two colors, are swapped ("A dog chases
a man": "A man chases a dog"). A model wins a pair if the image is closer to its own caption; a tie
counts half. Both captions of a pair have the same words, so a bag of words always ties. How often
it wins with another image shows how much of that the sentences alone decide.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality_data import Data, add_data_arguments
from benchmarks.timing import installed, machine
from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.loader import count_batches
from src.data.pixel_store import PixelStore
from src.evaluation.embed import embed_tokens, evaluate_retrieval
from src.models.bert import SubwordTokenizer, load_pretrained
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.training.engine import train_one_epoch
from src.training.frozen_features import freeze_texts
from src.training.optim import build_optimizer, build_schedule
from src.utils.errors import UserError
from src.utils.files import write_atomic
from src.utils.runtime import compute_dtype, grad_scaler, pick_device, seed_all, tune_malloc
from src.utils.script import run_script

CONTEXT_LENGTH, MIN_FREQ = 32, 2
CAPTIONS, DROPOUT, WEIGHT_DECAY, WARMUP_STEPS = 5, 0.3, 0.01, 20  # as in the recipe strong
PAIRS = 200
# Scores that differ by less are ties: sums of the same numbers in another order differ by rounding.
TIE = 1e-6
# Words that are swapped, in groups that fit the same places of a sentence: no "a dogs", "an red".
WORDS = {
    "people": (("man", "woman", "boy", "girl", "child", "baby", "lady", "guy", "dog", "cat",
                "horse"), ("men", "women", "boys", "girls", "children", "dogs", "horses")),
    "colors": (("black", "white", "red", "blue", "green", "yellow", "pink", "purple", "brown",
                "gray", "grey", "tan"),),
}
# Between two words of a pair, these make both orders right: "a boy and a girl", "black and white".
SYMMETRIC = re.compile(r"(, )?(and|or|&|,|with|next to|beside)( (a|an|the|another))?( \w+)?")
COLUMNS = ("rsum", "text_to_image_R@1", "text_to_image_R@10", "image_to_text_R@1",
           "image_to_text_R@10")
HEAD = """| text encoder | rsum ± deviation (seeds) | text to image R@1 / R@10 \
| image to text R@1 / R@10 | word order: people | colors | with another image | ties | seconds |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Row:
    """A text encoder and how it is trained.

    Attributes:
        name: of the row.
        what: its description.
        encoder: 'words', 'frozen' (BERT), 'tuned' (BERT) or 'scratch' (BERT from random weights).
        text_encoder_lr: learning rate of a BERT.
        pooling: of a BERT.
        lr: learning rate of the heads, and of words.
        epochs, batch_size: passes over the captions, and images in a batch.
    """

    name: str
    what: str
    encoder: str
    text_encoder_lr: float | None = None
    pooling: str = "mean"
    lr: float = 2e-3  # 5e-4 is too low for projections on a BERT
    epochs: int = 8
    batch_size: int = 128


ROWS = [
    Row("words", "bag of words", "words"),
    Row("frozen", "BERT frozen", "frozen"),
    Row("tuned", "BERT tuned", "tuned", 2e-4),
    Row("words-5e-4", "bag of words, lr 5e-4", "words", lr=5e-4),
    Row("frozen-5e-4", "BERT frozen, heads at lr 5e-4", "frozen", lr=5e-4),
    Row("scratch", "the same network from random weights", "scratch", 5e-4),
    *(Row(f"tuned-{rate:.0e}".replace("e-0", "e-"), f"BERT tuned at lr {rate:g}", "tuned", rate)
      for rate in (2e-5, 5e-5, 1e-4)),
]


@dataclass
class Features:
    """Image features and captions of both splits, as --features holds them.

    Attributes:
        records: of the images, by split.
        images: (N, F) float32, by split.
        about: the image encoder and its weights.
    """

    records: dict[str, list[ImageRecord]]
    images: dict[str, torch.Tensor]
    about: dict[str, str]

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read a file that `save` wrote."""
        with np.load(path) as file:
            texts = json.loads(file["texts"].tobytes())
            images = {split: torch.from_numpy(file[split].astype(np.float32))
                      for split in ("train", "val")}
        records = {split: [ImageRecord(name, tuple(captions)) for name, captions in rows]
                   for split, rows in texts["records"].items()}
        return cls(records, images, texts["about"])

    def save(self, path: Path) -> None:
        """Write the features as float16, and the captions as JSON."""
        texts = {"about": self.about, "records": {
            split: [[r.name, list(r.captions)] for r in rows]
            for split, rows in self.records.items()}}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, texts=np.frombuffer(json.dumps(texts).encode(), np.uint8),
            **{split: features.numpy().astype(np.float16)
               for split, features in self.images.items()})
        write_atomic(path, buffer.getvalue())

    def dataset(self, split: str, tokenizer: Tokenizer) -> Flickr30kDataset:
        """Return a split with features in place of pixels."""
        rows = {record.name: i for i, record in enumerate(self.records[split])}
        store = PixelStore(np.empty((len(rows), 0, 0, 3), np.uint8), rows, {})
        return Flickr30kDataset(self.records[split], store, tokenizer).with_images(
            self.images[split])


def load_features(args: argparse.Namespace) -> Features:
    """Return the features of --features; compute and write them if there is no such file."""
    if not args.features.exists():
        if not (args.images and args.annotations):
            raise UserError(f"there is no file {args.features}: --images and --annotations are "
                            "needed to compute it")
        data = Data.from_args(args)
        Features(data.records, {split: data.features(split, "center") for split in data.records},
                 {name: str(getattr(args, name)) for name in ("image_encoder", "weights",
                                                              "image_size")}).save(args.features)
    return Features.load(args.features)  # also right after writing: rounded to float16


@dataclass(frozen=True)
class OrderPair:
    """A caption, the same with two words swapped, and the image that the caption describes."""

    caption: str
    swapped: str
    image: int
    kind: str


def order_pairs(records: list[ImageRecord], count: int = PAIRS) -> list[OrderPair]:
    """Return pairs of captions that differ in word order only, half of each kind if there are.

    A caption is used if exactly two of its words are of a kind, and they are different words of a
    group, and what is between them does not make both orders right; at most one caption of each
    kind for an image.
    """
    found: dict[str, list[OrderPair]] = {kind: [] for kind in WORDS}
    for kind, groups in WORDS.items():
        for image, record in enumerate(records):
            swaps = (OrderPair(caption, swapped, image, kind) for caption in record.captions
                     if (swapped := _swap(caption, groups)))
            found[kind] += [first] if (first := next(swaps, None)) else []
    people, colors = found["people"], found["colors"]
    n_people = max(min(len(people), count // 2), min(len(people), count - len(colors)))
    return _spread(people, n_people) + _spread(colors, min(len(colors), count - n_people))


def _swap(caption: str, groups: tuple[tuple[str, ...], ...]) -> str | None:
    """Return the caption with its two words of a kind swapped, None if it has no such two."""
    words = "|".join(word for group in groups for word in group)
    matches = list(re.finditer(rf"\b({words})\b", caption, re.IGNORECASE))
    pair = {match[0].lower() for match in matches}
    if len(matches) != 2 or len(pair) != 2 or not any(pair.issubset(group) for group in groups):
        return None
    a, b = matches
    between = caption[a.end() : b.start()]
    if SYMMETRIC.fullmatch(between.strip()) or not between.strip():
        return None
    first = b[0].capitalize() if a[0][0].isupper() else b[0].lower()
    return caption[: a.start()] + first + between + a[0].lower() + caption[b.end() :]


def _spread(pairs: list[OrderPair], count: int) -> list[OrderPair]:
    """Return `count` pairs, evenly spaced."""
    return [pairs[i * len(pairs) // count] for i in range(count)]


def word_order(
    model: DualEncoder, tokenizer: Tokenizer, images: torch.Tensor, pairs: list[OrderPair]
) -> dict[str, float]:
    """Return the share of pairs that the right caption wins, of each kind, and of ties.

    `order_other` is the share of right captions that win with the image of the next pair. It should
    be 50: what exceeds it comes from sentences that are unlikely in any image ("a green dog").

    Args:
        model: in eval mode.
        tokenizer: of the model.
        images: (N, D) embeddings.
        pairs: with indices into them.
    """
    right, wrong = (embed_tokens(model, tokenizer.encode(texts)) for texts in
                    ([pair.caption for pair in pairs], [pair.swapped for pair in pairs]))
    difference = right - wrong  # (P, D)
    own = images[[pair.image for pair in pairs]]  # (P, D)

    def count_wins(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        margins = (difference * images).sum(1)  # (P,)
        ties = margins.abs() < TIE
        return torch.where(ties, 0.5, (margins > 0).double()), ties.double()

    wins, ties = count_wins(own)
    kinds = np.array([pair.kind for pair in pairs])
    shares = {f"order_{kind}": 100 * wins[torch.from_numpy(kinds == kind)].mean().item()
              for kind in sorted(set(kinds.tolist()))}
    return shares | {"ties": 100 * ties.mean().item(),
                     "order_other": 100 * count_wins(own.roll(1, 0))[0].mean().item()}


def build_model(
    row: Row, tokenizer: Tokenizer, text_config: str, weights: str, seed: int, feature_dim: int
) -> DualEncoder:
    """Return a new model; its image encoder is not used."""
    seed_all(seed, "weights")
    model = DualEncoder(ModelConfig(
        len(tokenizer), image_size=32, context_length=CONTEXT_LENGTH,
        dropout=DROPOUT, word_dropout=DROPOUT,
        text_encoder="words" if row.encoder == "words" else "bert", text_config=text_config,
        text_pooling=row.pooling))
    if model.image_encoder.feature_dim != feature_dim:
        raise UserError(f"features of {feature_dim} numbers: choose a B0 or a Lite network")
    if row.encoder in ("frozen", "tuned"):
        model.text_encoder.load_weights(weights)
    return model


def train_row(
    row: Row, data: Features, seed: int, args: argparse.Namespace, pairs: list[OrderPair]
) -> dict[str, float]:
    """Train with the settings of `row`; return metrics, and the seconds of training."""
    device = pick_device(args.device)
    dtype = compute_dtype(device)
    tokenizer, text_config = make_tokenizer(row, data, args.text_weights)
    splits = [data.dataset(split, tokenizer) for split in ("train", "val")]
    model = build_model(row, tokenizer, text_config, args.text_weights, seed,
                        data.images["train"].shape[1]).to(device)
    if row.encoder == "frozen":  # cached beside --features
        splits = freeze_texts(args.features.absolute().parent, model.text_encoder, splits, dtype)
    train_set, val_set = splits
    optimizer = build_optimizer(model, row.lr, WEIGHT_DECAY,
                                text_encoder_lr=row.text_encoder_lr)
    steps = row.epochs * count_batches(train_set, row.batch_size, CAPTIONS)
    scheduler = build_schedule(optimizer, WARMUP_STEPS, steps, "cosine")
    seconds = 0.0
    for epoch in range(1, row.epochs + 1):
        seconds += train_one_epoch(
            model, train_set, optimizer, scheduler, grad_scaler(device, dtype),
            batch_size=row.batch_size, captions_per_image=CAPTIONS, flip=False, seed=seed,
            epoch=epoch, dtype=dtype).seconds
    metrics = evaluate_retrieval(model.eval(), val_set)
    with torch.inference_mode():
        images = model.encode_image(data.images["val"].to(device)).cpu()
    return metrics | word_order(model, tokenizer, images, pairs) | {"seconds": seconds}


def make_tokenizer(
    row: Row, data: Features, weights: str
) -> tuple[Tokenizer | SubwordTokenizer, str]:
    """Return the tokenizer of `row`, and the configuration of its BERT."""
    if row.encoder != "words":
        return load_pretrained(weights, CONTEXT_LENGTH)
    captions = [caption for record in data.records["train"] for caption in record.captions]
    return Tokenizer.from_captions(captions, MIN_FREQ, CONTEXT_LENGTH), ""


def table_line(row: Row, runs: list[dict[str, float]]) -> str:
    """Return a line of the table: means over seeds, and the sample standard deviation of rsum."""
    mean = {column: statistics.mean(run[column] for run in runs)
            for column in (*COLUMNS, "order_people", "order_colors", "order_other", "ties",
                           "seconds")}
    spread = f"{statistics.stdev(run['rsum'] for run in runs):.1f}" if runs[1:] else "?"
    return (f"| {row.what} | {mean['rsum']:.1f} ± {spread} ({len(runs)}) "
            f"| {mean[COLUMNS[1]]:.1f} / {mean[COLUMNS[2]]:.1f} "
            f"| {mean[COLUMNS[3]]:.1f} / {mean[COLUMNS[4]]:.1f} "
            f"| {mean['order_people']:.1f} | {mean['order_colors']:.1f} "
            f"| {mean['order_other']:.1f} | {mean['ties']:.1f} | {mean['seconds']:.0f} |")


def settings(row: Row, args: argparse.Namespace) -> dict:
    """Return what a run depends on, in JSON's types; the key of its runs in the file."""
    texts = ("name", "what")
    return {**{key: value for key, value in asdict(row).items() if key not in texts},
            "text_weights": "" if row.encoder == "words" else Path(args.text_weights).name,
            "device": pick_device(args.device).type}


def runs_of(path: Path | None) -> Iterator[dict]:
    """Yield the runs of a file of JSON lines."""
    if path and path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def main(argv: list[str] | None = None) -> int:
    """Train the chosen rows and print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--features", type=Path, required=True, metavar="FILE.npz",
                        help="image features and captions; written if there is no such file")
    parser.add_argument("--text-weights", default="bert-base-uncased", metavar="NAME_OR_FOLDER",
                        help="(default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="NAME",
                        default=["words", "frozen", "tuned"],
                        help=f"{', '.join(row.name for row in ROWS)} (default: words frozen tuned)")
    parser.add_argument("--epochs", type=int, default=ROWS[0].epochs, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="(default: %(default)s)")
    parser.add_argument("--runs", type=Path, metavar="FILE",
                        help="append a line of JSON for each run, and do not repeat those in it")
    args = parser.parse_args(argv)
    tune_malloc()
    data = load_features(args)
    pairs = order_pairs(data.records["val"])
    kinds = ", ".join(f"{sum(pair.kind == kind for pair in pairs)} of {kind}"
                      for kind in ("people", "colors"))
    print(f"{machine()}, transformers {installed('transformers')}, {pick_device(args.device)}\n"
          f"{len(data.records['train']):,} training and {len(data.records['val']):,} validation "
          f"images, {data.about}; {kinds}\n\n{HEAD}", flush=True)
    for row in ROWS:
        if row.name not in args.rows:
            continue
        row = replace(row, epochs=args.epochs)
        runs = {run["seed"]: run["metrics"] for run in runs_of(args.runs)
                if run["settings"] == settings(row, args)}
        for seed in sorted(set(range(args.seeds)) - runs.keys()):
            runs[seed] = train_row(row, data, seed, args, pairs)
            if args.runs:
                with open(args.runs, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": row.name, "seed": seed, "metrics": runs[seed],
                                           "settings": settings(row, args)}) + "\n")
        print(table_line(row, [runs[seed] for seed in sorted(runs)]), flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
