"""Model, loss and optimizer of train.py with the changes of a row of the quality study."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.quality_rows import Row
from src.data.dataset import Flickr30kDataset
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.loss import contrastive_loss
from src.models.text_encoder import TextEncoder
from src.models.tokenizer import Tokenizer
from src.training.optim import build_optimizer
from src.utils.runtime import seed_all

MARGIN = 0.2  # of the hinge loss in VSE++ (Faghri et al., 2018)


class WeightedTextEncoder(TextEncoder):
    """The bag of words with a fixed weight per word."""

    def __init__(self, config: ModelConfig, weights: torch.Tensor) -> None:
        super().__init__(config.vocab_size, config.token_dim, config.word_dropout)
        self.register_buffer("weights", weights)  # (V,)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map (B, L) token ids to (B, E) features, the weighted sum divided by the word count."""
        if self.training and self.word_dropout:
            tokens = tokens.masked_fill(torch.rand(tokens.shape) < self.word_dropout, 0)
        n_words = (tokens != 0).sum(1, keepdim=True).clamp(min=1)
        return F.embedding_bag(tokens, self.embedding.weight, mode="sum", padding_idx=0,
                               per_sample_weights=self.weights[tokens]) / n_words


def build_model(row: Row, train_set: Flickr30kDataset, vocab_size: int, seed: int) -> DualEncoder:
    """Return a new model with the changes of `row` and a frozen image encoder."""
    seed_all(seed, "weights")
    # The image encoder is not used: its features are cached. All Lite and B0 have 1,280.
    model = DualEncoder(ModelConfig(
        vocab_size, image_size=32, token_dim=row.token_dim, embed_dim=row.embed_dim,
        dropout=row.dropout, word_dropout=row.word_dropout))
    model.image_encoder.requires_grad_(False)
    if row.idf:
        counts = torch.bincount(train_set.tokens.flatten(), minlength=vocab_size).clamp(min=1)
        idf = (len(train_set) / counts).log().clamp(min=0.02)
        model.text_encoder = WeightedTextEncoder(model.config, idf / idf.mean())
    change_heads(model, row)
    return model


def change_heads(model: DualEncoder, row: Row) -> None:
    """Give a new model the words, the layers and the scale that `row` starts with."""
    if row.token_std != 0.002 or row.hidden:
        words = model.text_encoder.embedding.weight.data.normal_(std=row.token_std)
        words[[Tokenizer.pad_id] if row.hidden else [Tokenizer.pad_id, Tokenizer.unk_id]] = 0
    if row.hidden:
        model.image_projection.linear = torch.nn.Linear(
            model.image_encoder.feature_dim, row.embed_dim)
        model.text_projection.linear = torch.nn.Sequential(
            torch.nn.Linear(row.token_dim, row.token_dim), torch.nn.ReLU(),
            torch.nn.Linear(row.token_dim, row.embed_dim))
    model.logit_scale.data.fill_(row.logit_scale)


def row_loss(row: Row, model: DualEncoder, images: torch.Tensor, texts: torch.Tensor,
             image_index: torch.Tensor) -> torch.Tensor:
    """Return InfoNCE, with the label smoothing, hard negatives or hinge loss of `row`."""
    if not (row.label_smoothing or row.hard_negatives or row.hinge):
        return contrastive_loss(images, texts, image_index, model.logit_scale)
    positive = F.one_hot(image_index, len(images)).bool()  # (M, B)
    similarity = texts @ images.T
    logits = model.logit_scale.exp() * similarity

    def reweight(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
        likely = (row.hard_negatives * logits.detach()).masked_fill(positive, -torch.inf)
        # The mean weight of the negatives stays 1.
        weights = likely.log_softmax(1) + (~positive).sum(1, keepdim=True).log()
        return logits + weights.masked_fill(positive, 0).clamp(min=-20)

    text_logits, image_logits = logits, logits.T
    if row.hard_negatives:
        text_logits, image_logits = reweight(logits, positive), reweight(logits.T, positive.T)
    targets = positive.T / positive.T.sum(1, keepdim=True)
    loss = (F.cross_entropy(text_logits, image_index, label_smoothing=row.label_smoothing)
            + F.cross_entropy(image_logits, targets, label_smoothing=row.label_smoothing)) / 2
    if row.hinge:
        right = similarity.gather(1, image_index[:, None])[:, 0]
        wrong = similarity.masked_fill(positive, -1)
        loss = loss + row.hinge * ((MARGIN + wrong.amax(1) - right).relu().mean()
                                   + (MARGIN + wrong.amax(0)[image_index] - right).relu().mean())
    return loss


def row_optimizer(row: Row, model: DualEncoder) -> torch.optim.AdamW:
    """Return train.py's optimizer for the heads and words, in one kernel per step."""
    groups = [group | {"params": [p for p in group["params"] if p.requires_grad]}
              for group in build_optimizer(model, row.lr, row.weight_decay).param_groups]
    return torch.optim.AdamW([group | {"fused": True} for group in groups if group["params"]])
