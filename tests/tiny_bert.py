"""A BERT of random weights with a tokenizer of a few words, in a folder, for the tests."""

from __future__ import annotations

from pathlib import Path

import torch

from src.models.bert import SubwordTokenizer, load_pretrained
from src.models.dual_encoder import DualEncoder, ModelConfig
from tests.tiny_data import COLORS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "thing", "##s", "number", "near", ".",
         "dog", "man", "chase", *COLORS, *"0123456789"]
POSITIONS = 24
LENGTH = 12


def make_tiny_bert(folder: Path, kind: str = "bert", dtype: torch.dtype = torch.float32) -> Path:
    """Write config, weights and fast tokenizer of a network of two layers; return the folder.

    Args:
        folder: to be written.
        kind: model type of transformers.
        dtype: of the weights.
    """
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(
        {word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.decoder = tokenizers.decoders.WordPiece()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]").save_pretrained(folder)
    sizes = (dict(dim=16, n_layers=2, n_heads=2, hidden_dim=24) if kind == "distilbert" else
             dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24))
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=len(WORDS), max_position_embeddings=POSITIONS, pad_token_id=0,
        initializer_range=0.5, **sizes)
    torch.manual_seed(0)
    bars = transformers.utils.logging
    bars.disable_progress_bar()
    transformers.AutoModel.from_config(config).to(dtype).save_pretrained(folder)
    bars.enable_progress_bar()
    return folder


def make_model(folder: Path, **config) -> tuple[DualEncoder, SubwordTokenizer]:
    """Return a dual encoder with the BERT of a folder, for LENGTH tokens, and its tokenizer."""
    tokenizer, text_config = load_pretrained(str(folder), LENGTH)
    torch.manual_seed(1)
    model = DualEncoder(ModelConfig(
        len(tokenizer), image_size=32, embed_dim=8, context_length=LENGTH, text_encoder="bert",
        text_config=text_config, **config))
    model.text_encoder.load_weights(str(folder))
    return model, tokenizer
