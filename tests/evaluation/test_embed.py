"""Embedding and scoring a split, compared with one image and one caption at a time."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.pixel_store import PixelStore
from src.data.transforms import eval_transform
from src.evaluation import embed as retrieval
from src.evaluation.embed import embed_images, embed_pixels, embed_tokens, evaluate_retrieval
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer

COUNTS = (3, 1, 5, 2, 4, 1, 2)  # captions of each image


@pytest.fixture(scope="module")
def dataset() -> Flickr30kDataset:
    """Seven images with different numbers of captions, each noise around a color."""
    rng = np.random.default_rng(0)
    # No two captions of the same words in another order: rounding would decide which is nearer.
    texts = list(combinations(["dog", "man", "sea", "red", "two", "girl", "ball", "snow"], 3))
    chosen = iter(rng.permutation(len(texts)))
    records = [ImageRecord(f"{i}.jpg", tuple(" ".join(texts[next(chosen)]) for _ in range(count)))
               for i, count in enumerate(COUNTS)]
    colors, noise = rng.integers(0, 256, (20, 1, 1, 3)), rng.integers(-60, 60, (20, 34, 34, 3))
    pixels = (colors + noise).clip(0, 255).astype(np.uint8)
    rows = {record.name: row for record, row in zip(records, rng.permutation(20), strict=False)}
    return Flickr30kDataset(records, PixelStore(pixels, rows, {}), Tokenizer.from_captions(
        [caption for record in records for caption in record.captions], 1, 6))


@pytest.fixture
def model() -> DualEncoder:
    """A dual encoder in training mode whose features of the images differ, as after training."""
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(vocab_size=10, image_size=32, token_dim=12, embed_dim=8))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean: evaluation uses the statistics of one batch
    with torch.no_grad():
        model.image_encoder(torch.randn(16, 3, 32, 32) + torch.randn(16, 3, 1, 1))
    return model.train()


def one_by_one(model: DualEncoder, dataset: Flickr30kDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed each image and each caption alone with the model in eval mode."""
    model.eval()
    with torch.no_grad():
        images = [model.encode_image(eval_transform(dataset.take_images(np.array([i])), 32))
                  for i in range(len(dataset.records))]
        texts = [model.encode_text(row[None]) for row in dataset.tokens]
    model.train()
    return torch.cat(images), torch.cat(texts)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 128])
def test_batches_change_no_embedding(model, dataset, monkeypatch, batch_size):
    """Images in batches of any size have the embeddings that they have alone, in order."""
    images, texts = one_by_one(model, dataset)
    monkeypatch.setattr(retrieval, "BATCH_SIZE", batch_size)
    embedded = embed_images(model, dataset)
    assert embedded.dtype == torch.float32 and not embedded.requires_grad
    torch.testing.assert_close(embedded, images, rtol=1e-3, atol=1e-4)
    assert torch.cdist(images, images).fill_diagonal_(9).min() > 0.01  # they do differ
    torch.testing.assert_close(embed_tokens(model, dataset.tokens, batch_size), texts)


def test_bfloat16_embeds_nearly_the_same(model, dataset, monkeypatch):
    """In bfloat16 a random model, whose features are nearly lost in rounding, keeps a cosine of
    0.995; `benchmarks/embed.py` measures trained models, which keep 0.999."""
    exact = embed_images(model, dataset)
    monkeypatch.setattr("src.utils.runtime.cpu_has_bfloat16", lambda: True)
    rounded = embed_images(model, dataset)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert ((rounded * exact).sum(1) > 0.995).all()
    torch.testing.assert_close(rounded.norm(dim=1), torch.ones(len(rounded)))


def test_embed_pixels_takes_the_center(model, dataset):
    """Stored images are a little larger than the input; their borders have no influence."""
    model.eval()
    pixels = dataset.take_images(np.array([2]))
    framed = torch.zeros_like(pixels)
    framed[:, 1:33, 1:33] = pixels[:, 1:33, 1:33]
    assert torch.equal(embed_pixels(model, framed), embed_pixels(model, pixels))


def test_evaluation_equals_brute_force(model, dataset):
    """The metrics of a split are those of ranks counted one by one; the model is left in eval
    mode."""
    images, texts = one_by_one(model, dataset)
    table = (texts.double() @ images.double().T).tolist()
    owner = [i for i, count in enumerate(COUNTS) for _ in range(count)]
    text_ranks = [sum(score >= row[own] for score in row)
                  for row, own in zip(table, owner, strict=True)]
    image_ranks = []
    for i in range(len(COUNTS)):
        best = max(row[i] for row, own in zip(table, owner, strict=True) if own == i)
        image_ranks.append(1 + sum(row[i] >= best for row, own in zip(table, owner, strict=True)
                                   if own != i))
    metrics = evaluate_retrieval(model, dataset)
    assert not model.training
    for direction, ranks in (("text_to_image", text_ranks), ("image_to_text", image_ranks)):
        for k in (1, 5, 10):
            share = 100 * sum(rank <= k for rank in ranks) / len(ranks)
            assert metrics[f"{direction}_R@{k}"] == pytest.approx(share)
        assert metrics[f"{direction}_mean_rank"] == pytest.approx(sum(ranks) / len(ranks))
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


def test_evaluation_is_the_same_twice(model, dataset):
    """Evaluation has no dropout or random crop, and does not change the model."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert evaluate_retrieval(model, dataset) == evaluate_retrieval(model, dataset)
    assert [key for key, value in model.state_dict().items()
            if not torch.equal(value, before[key])] == []
