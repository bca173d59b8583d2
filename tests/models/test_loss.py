"""Symmetric InfoNCE against a double loop."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from src.models.loss import contrastive_loss

ONE_CAPTION = [0, 1, 2, 3, 4, 5]
UNEVEN = [0, 0, 1, 2, 2, 2, 3, 4, 4, 5]
SHUFFLED = [3, 0, 2, 5, 2, 4, 0, 1, 4, 2]
OWNERS = pytest.mark.parametrize("owner", [ONE_CAPTION, UNEVEN, SHUFFLED], ids=str)


def embeddings(n_texts: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Six photos and some captions as random unit vectors, and a scale."""
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(6, 8, generator=generator, dtype=dtype), dim=-1)
    texts = F.normalize(torch.randn(n_texts, 8, generator=generator, dtype=dtype), dim=-1)
    return images, texts, torch.tensor(math.log(10.0), dtype=dtype)


def oracle(images, texts, owner, logit_scale) -> torch.Tensor:
    """Each caption finds its photo; each photo spreads evenly over its captions. One by one."""
    logit = [[(text * image).sum() * logit_scale.exp() for image in images] for text in texts]
    n_texts, n_images = len(texts), len(images)
    text_to_image = 0
    for m in range(n_texts):
        total = sum(logit[m][n].exp() for n in range(n_images))
        text_to_image -= torch.log(logit[m][owner[m]].exp() / total) / n_texts
    image_to_text = 0
    for n in range(n_images):
        total = sum(logit[m][n].exp() for m in range(n_texts))
        own = [m for m in range(n_texts) if owner[m] == n]
        for m in own:
            image_to_text -= torch.log(logit[m][n].exp() / total) / len(own) / n_images
    return (text_to_image + image_to_text) / 2


@OWNERS
def test_value_and_gradient_equal_the_double_loop(owner):
    """Loss and its gradient for photos, captions and scale are those of a loop in float64."""
    inputs = embeddings(len(owner))
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    narrow = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = oracle(wide[0], wide[1], owner, wide[2])
    loss = contrastive_loss(narrow[0], narrow[1], torch.tensor(owner), narrow[2])
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    loss.backward()
    for got, wanted in zip(narrow, wide, strict=True):
        torch.testing.assert_close(got.grad.double(), wanted.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [2, 7, 64])
@pytest.mark.parametrize("captions", [1, 5])
def test_uniform_logits(batch, captions):
    """Where all is equally alike the loss is ln B, and (ln B + ln M) / 2 for several captions."""
    owner = torch.arange(batch).repeat_interleave(captions)
    images, texts = torch.ones(batch, 4) / 2, torch.ones(len(owner), 4) / 2
    loss = contrastive_loss(images, texts, owner, torch.tensor(2.0)).item()
    assert loss == pytest.approx((math.log(batch) + math.log(batch * captions)) / 2, abs=1e-5)


def test_one_caption_a_photo_is_clip():
    """With pairs in order it is the mean of CLIP's two cross-entropies, and symmetric in them."""
    images, texts, scale = embeddings(6)
    logits = scale.exp() * images @ texts.T
    labels = torch.arange(6)
    clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, labels, scale), clip)
    torch.testing.assert_close(contrastive_loss(texts, images, labels, scale), clip)


@OWNERS
def test_order_of_photos_and_captions_does_not_matter(owner):
    """Photos and captions shuffled, with image_index after them: the same loss."""
    images, texts, scale = embeddings(len(owner))
    generator = torch.Generator().manual_seed(3)
    photos = torch.randperm(6, generator=generator)
    captions = torch.randperm(len(owner), generator=generator)
    place_of = torch.argsort(photos)  # photo n stands at place_of[n]
    owner = torch.tensor(owner)
    torch.testing.assert_close(
        contrastive_loss(images[photos], texts[captions], place_of[owner[captions]], scale),
        contrastive_loss(images, texts, owner, scale),
    )


def test_right_pairs_cost_less_than_wrong_ones():
    """Pairs that agree have almost no loss at a high scale; the same pairs exchanged a high one."""
    scale = torch.tensor(math.log(100.0))
    labels = torch.arange(4)
    assert contrastive_loss(torch.eye(4), torch.eye(4), labels, scale).item() < 1e-6
    assert contrastive_loss(torch.eye(4), torch.eye(4), labels.flip(0), scale).item() > 99


def test_float32_under_autocast():
    """bfloat16 autocast changes not a bit of the loss; bfloat16 products would."""
    images, texts, scale = embeddings(6)
    labels = torch.arange(6)
    plain = contrastive_loss(images, texts, labels, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert (texts @ images.T).dtype == torch.bfloat16  # autocast is really on
        mixed = contrastive_loss(images, texts, labels, scale)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


def test_half_precision_embeddings_give_a_float32_loss():
    """Embeddings in bfloat16 are widened first: the loss is that of their float32 copies."""
    images, texts, scale = embeddings(6)
    images, texts = images.bfloat16(), texts.bfloat16()
    labels = torch.arange(6)
    loss = contrastive_loss(images, texts, labels, scale)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(images.float(), texts.float(), labels, scale))
