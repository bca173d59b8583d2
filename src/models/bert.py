"""BERT as text encoder: captions -> features, the last hidden states under a masked mean.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
2019; the mean as in Reimers and Gurevych, "Sentence-BERT", 2019. Networks, tokenizers and weights
come from the optional package transformers. Configuration and tokenizer are kept as JSON texts,
so that a checkpoint loads without the network and without the folder that it started from.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from src.models.tokenizer import Tokenizer, WordStatistics
from src.utils.errors import UserError, import_optional
from src.utils.script import status

# Bidirectional encoders whose inputs are tokens and a mask.
MODEL_TYPES = ("albert", "bert", "camembert", "distilbert", "electra", "mpnet", "roberta",
               "xlm-roberta")
POOLINGS = ("mean", "cls")
GROUP = 64  # captions of similar length that are encoded together on a CPU
# Fields of a configuration that do not belong to the architecture.
IGNORED_FIELDS = ("architectures", "dtype", "id2label", "label2id", "torch_dtype",
                  "transformers_version")


def import_transformers() -> ModuleType:
    """Return the package transformers; a UserError if it is not installed."""
    return import_optional("transformers", "the text encoder is a BERT, which needs a package that "
                           "is not installed:\n    pip install transformers")


class SubwordTokenizer(Tokenizer):
    """Map captions to rows of subword ids, with the special tokens that BERT was trained with.

    Attributes:
        vocab: the content of tokenizer.json, from which the tokenizer is rebuilt.
        context_length: number of tokens that are kept of a caption, special tokens included.
        pad_id, unk_id: ids of padding and of unknown tokens; None if every text has tokens.
    """

    unit = "tokens"

    def __init__(self, vocab: str, context_length: int) -> None:
        """Build from the content of tokenizer.json; raise ValueError if it is not one."""
        import_transformers()  # it brings tokenizers
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_str(vocab)
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"no tokenizer: {error}") from error
        if backend.padding is None:
            raise ValueError("the tokenizer has no padding token")
        self.vocab, self.context_length = vocab, context_length
        self.pad_id = backend.padding["pad_id"]
        unk_token = json.loads(vocab)["model"].get("unk_token")
        self.unk_id = backend.token_to_id(unk_token) if unk_token else None
        backend.no_padding()  # `encode` pads, in one array
        self._backend = backend
        special = [i for i, token in backend.get_added_tokens_decoder().items() if token.special]
        self._not_words = torch.tensor([self.pad_id, *special], dtype=torch.int64)

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def encode(self, captions: list[str], context_length: int | None = None) -> torch.Tensor:
        """Return token ids of M captions, (M, L) int64, padded to the longest of them.

        Args:
            captions: texts.
            context_length: tokens that are kept of each; None for that of the training captions.
        """
        self._backend.enable_truncation(context_length or self.context_length)
        rows = [encoding.ids for encoding in self._backend.encode_batch(captions)]
        lengths = np.array([len(row) for row in rows], np.int64)
        tokens = np.full((len(rows), lengths.max(initial=1)), self.pad_id, np.int64)  # (M, L)
        tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = [i for row in rows for i in row]
        return torch.from_numpy(tokens)

    def has_known_word(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return whether each caption has a token of the vocabulary: (M, L) -> (M,) bool."""
        return (~torch.isin(tokens, self._not_words)).any(dim=1)

    def word_statistics(self, captions: list[str]) -> WordStatistics:
        """Count the tokens of captions, special tokens included."""
        self._backend.no_truncation()
        rows = [encoding.ids for encoding in self._backend.encode_batch(captions)]
        counts = np.array([len(row) for row in rows], np.int64)
        unknown = sum(row.count(self.unk_id) for row in rows)
        return WordStatistics(counts, unknown / max(1, counts.sum()),
                              (counts > self.context_length).sum() / max(1, len(counts)))

    def decode(self, tokens: torch.Tensor) -> str:
        """Return the text of one row of ids (L,), without special tokens."""
        return self._backend.decode(tokens.tolist())


class BertEncoder(nn.Module):
    """Encode captions with BERT and pool the last hidden states.

    Attributes:
        network: the transformer, without its pooler.
        feature_dim: F, size of the features.
        max_length: number of tokens that the network has positions for.
    """

    def __init__(self, config: str, pooling: str = "mean") -> None:
        """Build with random weights; `load_weights` loads pretrained ones.

        Args:
            config: the configuration, see `load_pretrained`.
            pooling: 'mean' over the tokens of a caption, or 'cls' for the first token.

        Raises:
            UserError: the package transformers is not installed.
            ValueError: the configuration is not that of a BERT.
        """
        super().__init__()
        transformers = import_transformers()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is one of {', '.join(POOLINGS)}, not {pooling!r}")
        self.pooling = pooling
        settings = _build_config(transformers, json.loads(config))
        with _quiet(transformers):
            self.network = transformers.AutoModel.from_config(settings).float()
        if getattr(self.network, "pooler", None) is not None:
            self.network.pooler = None  # not used, so it would have no gradient
        self.pad_id = settings.pad_token_id
        self.feature_dim = settings.hidden_size
        # RoBERTa counts positions from the id of padding on.
        offset = self.pad_id + 1 if "roberta" in settings.model_type \
            or settings.model_type in ("camembert", "mpnet") else 0
        self.max_length = settings.max_position_embeddings - offset
        self.layers = settings.num_hidden_layers

    def load_weights(self, name: str) -> None:
        """Load pretrained weights of any precision as float32.

        Args:
            name: see `load_pretrained`.

        Raises:
            UserError: they cannot be loaded, or do not fit.
        """
        transformers = import_transformers()
        with _explain(name), _quiet(transformers):
            loaded, report = transformers.AutoModel.from_pretrained(name, output_loading_info=True)
        own, state = self.network.state_dict(), loaded.state_dict()
        missing = [key for key in report["missing_keys"] if key in own]
        wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
        if reasons := sorted({*missing, *wrong}):
            raise UserError(f"--text-weights {name}: the weights of {len(reasons)} of {len(own)} "
                            f"tensors are missing, e.g. {reasons[0]}: the files do not belong "
                            "together, or are of another network")
        self.network.load_state_dict({key: state[key] for key in own})

    def check_tokenizer(self, tokenizer: SubwordTokenizer) -> None:
        """Raise ValueError if the network has no embedding or position for some tokens."""
        rows = self.network.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows or tokenizer.pad_id != self.pad_id:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens and padding "
                             f"{tokenizer.pad_id}, the network {rows} and {self.pad_id}")
        if tokenizer.context_length > self.max_length:
            raise ValueError(f"{tokenizer.context_length} tokens are too many for the "
                             f"{self.max_length} positions of the network")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map (B, L) token ids to (B, F) float32 features."""
        if not len(tokens):  # a split has fewer captions than the run has ranks
            return torch.zeros(0, self.feature_dim, device=tokens.device)
        if tokens.device.type != "cpu":
            # All captions at the same length: the host would have to wait for the lengths, and
            # kernels for many shapes would be slower than the padding that they avoid.
            return self._encode(tokens)
        # The captions of a group have about the same length: padded to the longest of a batch, a
        # step takes two to four times as long.
        lengths = (tokens != self.pad_id).sum(1)  # (B,)
        order = lengths.argsort(stable=True)
        features = torch.cat([self._encode(tokens[group, : max(1, int(lengths[group[-1]]))])
                              for group in order.split(GROUP)])
        return features[order.argsort()]

    def _encode(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = tokens != self.pad_id  # (B, L)
        hidden = self.network(input_ids=tokens, attention_mask=mask.long())[0].float()  # (B, L, F)
        if self.pooling == "cls":
            return hidden[:, 0]
        return (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def load_pretrained(name: str, context_length: int) -> tuple[SubwordTokenizer, str]:
    """Return the tokenizer and the configuration of a pretrained BERT.

    Args:
        name: a folder with config.json, tokenizer.json and the weights, or a name on the Hugging
            Face Hub, such as bert-base-uncased, which is downloaded once.
        context_length: number of tokens that are kept of a caption.

    Returns:
        The tokenizer, and the configuration as JSON.

    Raises:
        UserError: they cannot be loaded, are not of a BERT, or have too few positions for
            `context_length`; or transformers is not installed.
    """
    transformers = import_transformers()
    if Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser())
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"--text-weights {name}: there is no such folder")
    with _explain(name), _quiet(transformers), status(f"loading {name}"):
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type not in MODEL_TYPES:
            raise UserError(f"--text-weights {name} is of type {config.model_type}; these are "
                            f"supported: {', '.join(MODEL_TYPES)}")
        loaded = transformers.AutoTokenizer.from_pretrained(name, use_fast=True)
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None or loaded.pad_token_id is None:
            raise UserError(f"--text-weights {name} has no fast tokenizer (tokenizer.json) with a "
                            "padding token")
        backend.no_truncation()
        backend.enable_padding(pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
        tokenizer = SubwordTokenizer(backend.to_str(), context_length)
        settings = {**config.to_dict(), "pad_token_id": tokenizer.pad_id}
        fields = _build_config(transformers, settings).to_dict().keys() - set(IGNORED_FIELDS)
        text = json.dumps({key: settings[key] for key in sorted(fields & settings.keys())
                           if not key.startswith("_")})
    with torch.device("meta"):  # no memory
        encoder = BertEncoder(text)
    try:
        encoder.check_tokenizer(tokenizer)
    except ValueError as error:
        raise UserError(f"--text-weights {name}, --context-length {context_length}: {error}"
                        ) from error
    return tokenizer, text


def check_config(config: str, max_layers: int) -> None:
    """Check an untrusted configuration before a network is built from it.

    Args:
        config: see `load_pretrained`.
        max_layers: a limit, as each layer takes time even without memory.

    Raises:
        ValueError: it is not that of a BERT, or has too many layers.
        UserError: transformers is not installed.
    """
    layers = _build_config(import_transformers(), json.loads(config)).num_hidden_layers
    if layers > max_layers:
        raise ValueError(f"{layers} layers in a file of {max_layers} tensors")


def _build_config(transformers: ModuleType, settings: dict) -> object:
    """Return the configuration object of plain settings, which may be untrusted.

    Only the fields of the architecture are taken: others can name code to load.
    """
    kind = settings.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type is {kind!r}")
    known = transformers.AutoConfig.for_model(kind).to_dict()
    fields = {key: value for key, value in settings.items() if key in known
              and not key.startswith("_") and key not in (*IGNORED_FIELDS, "model_type")}
    fields.update(is_decoder=False, add_cross_attention=False)
    return transformers.AutoConfig.for_model(kind, **fields)


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Let transformers print errors only; downloads still show their progress."""
    from huggingface_hub.utils import enable_progress_bars

    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # of reading weights, which takes a second
    enable_progress_bars()  # of downloads, which it has disabled too
    hub = getLogger("huggingface_hub")
    hub_level = hub.level
    hub.setLevel("ERROR")  # it logs each retry
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _explain(name: str) -> Iterator[None]:
    """Turn the errors of transformers, which have many types, into a message with the cure."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        cure = ("the folder needs config.json, tokenizer.json and model.safetensors, as "
                "save_pretrained of transformers writes them" if Path(name).is_dir() else
                "where there is no network, copy the files of the model (config.json, "
                "tokenizer.json, model.safetensors) into a folder and pass --text-weights FOLDER")
        raise UserError(f"--text-weights {name} cannot be loaded ({reason}): {cure}") from error
