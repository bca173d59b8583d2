"""The worst queries of a split, against a loop over the captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.images import load_image
from src.data.pixel_store import PixelStore
from src.evaluation.embed import embed_images, embed_tokens
from src.evaluation.examples import find_mistakes, plot_mistakes
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer, split_words
from src.utils.runtime import seed_all

CAPTIONS = [("a dog bites a man", "the dog"), ("a man bites a dog", "two men"), ("a cat",),
            ("three cats", "cats and a dog"), ("the sea", "a man")]


@pytest.fixture(scope="module")
def dataset() -> Flickr30kDataset:
    """Five photos of noise, of which two are captioned with the same words."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 34, 34, 3), np.uint8)
    records = [ImageRecord(f"{i}.jpg", captions) for i, captions in enumerate(CAPTIONS)]
    store = PixelStore(pixels, {record.name: i for i, record in enumerate(records)}, {})
    return Flickr30kDataset(records, store, Tokenizer.from_captions(sum(CAPTIONS, ()), 1, 6))


@pytest.fixture(scope="module")
def model(dataset) -> DualEncoder:
    """An untrained model, which is wrong most of the time."""
    seed_all(0, "weights")
    return DualEncoder(ModelConfig(vocab_size=20, image_size=32, token_dim=12, embed_dim=8)).eval()


def test_mistakes_are_those_of_a_loop(model, dataset):
    """Every caption whose photo is beaten is there, worst first, with what beat it."""
    images, texts = embed_images(model, dataset), embed_tokens(model, dataset.tokens)
    expected = []
    for row, text in enumerate(texts):
        scores = (images @ text).tolist()
        own = int(dataset.image_index[row])
        rank = sum(score >= scores[own] for score in scores)
        first = max(range(5), key=lambda photo: scores[photo])
        other = max((i for i in range(5) if i != own), key=lambda photo: scores[photo])
        theirs = {word for caption in CAPTIONS[other] for word in split_words(caption)}
        if rank > 1:
            expected.append((-rank, row, first, set(split_words(dataset.captions[row])) <= theirs))
    found = find_mistakes(model, dataset)
    assert [(-m.rank, m.caption, m.first[0], m.same_words) for m in found] == sorted(expected)
    assert len(found) > 3 and {m.same_words for m in found} == {True, False}


def test_a_model_without_mistakes_has_none(model, dataset):
    """Where each photo is alone there is nothing that could beat it."""
    alone = Flickr30kDataset(dataset.records[:1], PixelStore(
        np.zeros((1, 34, 34, 3), np.uint8), {"0.jpg": 0}, {}),
        Tokenizer({"<pad>": 0, "<unk>": 1}, 4))
    assert find_mistakes(model, alone) == []


def test_the_sheet_has_a_row_for_each_of_the_worst(model, dataset, tmp_path):
    """One row a photo, at most as many as asked for; the green frame marks the right one."""
    heights = []
    for count in (1, 3):
        plot_mistakes(tmp_path / "sheet.png", dataset, find_mistakes(model, dataset), count)
        picture = np.asarray(load_image(tmp_path / "sheet.png"))
        heights.append(len(picture))
        assert (picture == np.array((42, 157, 98), np.uint8)).all(-1).any()
    assert heights[1] > 2 * heights[0]


def test_mistakes_are_the_same_in_blocks(model, dataset, monkeypatch):
    """More captions than a block change nothing."""
    whole = find_mistakes(model, dataset)
    original = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, size, *rest: original(
        self, 2 if size == 1024 else size, *rest))
    assert find_mistakes(model, dataset) == whole
