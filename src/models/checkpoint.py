"""Save and load trained models. A checkpoint holds only tensors and plain values."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from src.models.bert import SubwordTokenizer, check_config
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError, print_message
from src.utils.files import sync_folder
from src.utils.tensors import load_tensors, save_tensors

DUAL_ENCODER = "dual encoder"
# Config fields of earlier versions -> their names today.
RENAMED_FIELDS = {"mirror_mean": "flip_tta"}


class Checkpoint(NamedTuple):
    """A loaded checkpoint: the model in eval mode, its tokenizer, and the content of the file."""

    model: DualEncoder
    tokenizer: Tokenizer
    content: dict[str, Any]


def save_checkpoint(
    path: Path, model: DualEncoder, tokenizer: Tokenizer, **extra: Any
) -> None:
    """Write `model_state`, `vocab`, the model's config, and `extra` plain values or states.

    `vocab` maps words to ids; of BERT it is the content of tokenizer.json.

    Raises:
        UserError: the file cannot be written; an earlier file of that name is intact.
    """
    save_tensors(path, {
        "kind": DUAL_ENCODER,
        "model_state": model.state_dict(),
        "vocab": tokenizer.vocab,
        "config": asdict(model.config),
        **extra,
    })


def _check_shapes(config: ModelConfig, state: dict[str, torch.Tensor]) -> None:
    """Raise ValueError if the weights do not fit the config, before memory is allocated for it.

    The config of an untrusted file may ask for a vocabulary of 10^12 words.
    """
    if config.text_encoder == "bert":
        check_config(config.text_config, len(state))
    with torch.device("meta"):
        expected = DualEncoder(config).state_dict()
    for name, tensor in expected.items():
        if getattr(state.get(name), "shape", None) != tensor.shape:
            raise ValueError(f"{name} is not of shape {tuple(tensor.shape)}")


def rotate_checkpoint(
    path: Path, previous: Path, model: DualEncoder, tokenizer: Tokenizer, **extra: Any
) -> None:
    """Write a checkpoint to `path` as `save_checkpoint` does; rename the one before to `previous`.

    One of the two is complete at any time, because the new file is written before the old one is
    renamed.

    Raises:
        UserError: the file cannot be written; both earlier files are intact.
    """
    new = path.with_name(f".{path.name}.new")
    save_checkpoint(new, model, tokenizer, **extra)
    if path.exists():
        path.replace(previous)
    new.replace(path)
    sync_folder(path.parent)


def load_newest_checkpoint(path: Path, previous: Path) -> Checkpoint:
    """Load `path`, or `previous` with a note if `path` is damaged or missing.

    Raises:
        UserError: neither can be read.
    """
    try:
        return load_checkpoint(path)
    except UserError as error:
        if not previous.exists():
            raise
        loaded = load_checkpoint(previous)
        print_message(f"note: {error}; the checkpoint before it is used: {previous}")
        return loaded


def load_checkpoint(path: Path) -> Checkpoint:
    """Load the model, in eval mode on the CPU, and its tokenizer.

    Raises:
        UserError: no such file, not a checkpoint of the dual encoder, or a damaged one.
    """
    content = load_tensors(path)
    if content.get("kind") != DUAL_ENCODER:
        kind = content.get("kind", "no checkpoint of this project")
        raise UserError(f"{path} holds {kind}; a checkpoint written by train.py is needed")
    try:
        config = ModelConfig(**{RENAMED_FIELDS.get(name, name): value
                                for name, value in content["config"].items()})
        _check_shapes(config, content["model_state"])
        model = DualEncoder(config)
        model.load_state_dict(content["model_state"])
        kind = SubwordTokenizer if config.text_encoder == "bert" else Tokenizer
        tokenizer = kind(content["vocab"], config.context_length)
        if not isinstance(content.get("args", {}), dict):
            raise TypeError("args is not a dictionary")
        if len(tokenizer) != config.vocab_size:
            raise ValueError(f"{len(tokenizer)} words for {config.vocab_size} embeddings")
        if config.text_encoder == "bert":
            model.text_encoder.check_tokenizer(tokenizer)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or of another version: {error}") from error
    return Checkpoint(model.eval(), tokenizer, content)


def save_compact(
    path: Path, model: DualEncoder, tokenizer: Tokenizer, **extra: Any
) -> None:
    """Write a checkpoint of a bag of words in half precision, with its words in the shared space.

    The text projection is folded into the words and becomes the identity, which changes embeddings
    only by the rounding to half precision. The file is a checkpoint like any other.

    Raises:
        UserError: the file cannot be written.
    """
    dim = model.config.embed_dim
    state = model.state_dict() | {
        "text_encoder.embedding.weight": model.word_embeddings(),  # (V, D)
        "text_projection.linear.weight": torch.eye(dim)}
    save_tensors(path, {
        "kind": DUAL_ENCODER,
        # BatchNorm's statistics and logit_scale are small and stay in float32.
        "model_state": {name: tensor.half() if tensor.ndim > 1 else tensor
                        for name, tensor in state.items()},
        "vocab": tokenizer.vocab,
        "config": asdict(replace(model.config, token_dim=dim)),
        **extra,
    })
