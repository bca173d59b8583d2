"""Symmetric InfoNCE equals a double loop over captions and images."""

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
    """Return six images and some captions as random unit vectors, and a logit scale."""
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(6, 8, generator=generator, dtype=dtype), dim=-1)
    texts = F.normalize(torch.randn(n_texts, 8, generator=generator, dtype=dtype), dim=-1)
    return images, texts, torch.tensor(math.log(10.0), dtype=dtype)


def oracle(images, texts, owner, logit_scale) -> torch.Tensor:
    """Return the loss from sums over single pairs."""
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
    """The loss and its gradients for images, captions and scale equal a loop in float64."""
    inputs = embeddings(len(owner))
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    narrow = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = oracle(wide[0], wide[1], owner, wide[2])
    loss = contrastive_loss(narrow[0], narrow[1], torch.tensor(owner), narrow[2])
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    loss.backward()
    for actual, reference in zip(narrow, wide, strict=True):
        torch.testing.assert_close(actual.grad.double(), reference.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [2, 7, 64])
@pytest.mark.parametrize("captions", [1, 5])
def test_uniform_logits(batch, captions):
    """With equal similarities the loss is (ln B + ln M) / 2, and ln B with one caption each."""
    owner = torch.arange(batch).repeat_interleave(captions)
    images, texts = torch.ones(batch, 4) / 2, torch.ones(len(owner), 4) / 2
    loss = contrastive_loss(images, texts, owner, torch.tensor(2.0)).item()
    assert loss == pytest.approx((math.log(batch) + math.log(batch * captions)) / 2, abs=1e-5)


def test_one_caption_per_image_is_clip():
    """With one caption per image the loss is CLIP's, and symmetric in images and captions."""
    images, texts, scale = embeddings(6)
    logits = scale.exp() * images @ texts.T
    labels = torch.arange(6)
    clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, labels, scale), clip)
    torch.testing.assert_close(contrastive_loss(texts, images, labels, scale), clip)


@OWNERS
def test_order_of_images_and_captions_does_not_matter(owner):
    """Shuffled images and captions, with image_index permuted alike, have the same loss."""
    images, texts, scale = embeddings(len(owner))
    generator = torch.Generator().manual_seed(3)
    permutation = torch.randperm(6, generator=generator)
    captions = torch.randperm(len(owner), generator=generator)
    position = torch.argsort(permutation)  # of image n
    owner = torch.tensor(owner)
    torch.testing.assert_close(
        contrastive_loss(images[permutation], texts[captions], position[owner[captions]], scale),
        contrastive_loss(images, texts, owner, scale),
    )


def test_matching_pairs_have_a_lower_loss():
    """At a high scale matching pairs have almost no loss, and exchanged pairs a high one."""
    scale = torch.tensor(math.log(100.0))
    labels = torch.arange(4)
    assert contrastive_loss(torch.eye(4), torch.eye(4), labels, scale).item() < 1e-6
    assert contrastive_loss(torch.eye(4), torch.eye(4), labels.flip(0), scale).item() > 99


def test_float32_under_autocast():
    """The loss is bit-identical under bfloat16 autocast."""
    images, texts, scale = embeddings(6)
    labels = torch.arange(6)
    plain = contrastive_loss(images, texts, labels, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert (texts @ images.T).dtype == torch.bfloat16  # autocast is enabled
        mixed = contrastive_loss(images, texts, labels, scale)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, plain)


def test_half_precision_embeddings_give_a_float32_loss():
    """The loss of bfloat16 embeddings is that of their float32 copies."""
    images, texts, scale = embeddings(6)
    images, texts = images.bfloat16(), texts.bfloat16()
    labels = torch.arange(6)
    loss = contrastive_loss(images, texts, labels, scale)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(images.float(), texts.float(), labels, scale))
