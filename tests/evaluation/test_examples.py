"""The mistakes of a split against a loop over the captions, and the contact sheets."""

from __future__ import annotations

import numpy as np
import pytest

from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.images import load_image
from src.data.pixel_store import PixelStore
from src.evaluation import examples
from src.evaluation.embed import embed_images, embed_tokens
from src.evaluation.examples import as_prose, find_mistakes, plot_examples, plot_mistakes
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer, split_words
from src.utils.runtime import seed_all

CAPTIONS = [("a dog bites a man", "the dog"), ("a man bites a dog", "two men"), ("a cat",),
            ("three cats", "cats and a dog"), ("the sea", "a man")]
GREEN = np.array((42, 157, 98), np.uint8)  # the frame of the correct image


def make_dataset(captions: list[tuple[str, ...]]) -> Flickr30kDataset:
    """Return a dataset of noise images with these captions."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(captions), 34, 34, 3), np.uint8)
    records = [ImageRecord(f"{i}.jpg", texts) for i, texts in enumerate(captions)]
    store = PixelStore(pixels, {record.name: i for i, record in enumerate(records)}, {})
    return Flickr30kDataset(records, store, Tokenizer.from_captions(sum(captions, ()), 1, 6))


@pytest.fixture(scope="module")
def dataset() -> Flickr30kDataset:
    """Five images, of which two have a caption of the same words."""
    return make_dataset(CAPTIONS)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    """An untrained model, which makes many mistakes."""
    seed_all(0, "weights")
    return DualEncoder(ModelConfig(vocab_size=20, image_size=32, token_dim=12, embed_dim=8)).eval()


def test_mistakes_equal_a_loop_over_the_captions(model, dataset):
    """Every caption whose image is not first is a mistake, sorted, with the images that are."""
    images, texts = embed_images(model, dataset), embed_tokens(model, dataset.tokens)
    expected = []
    for caption, text in enumerate(texts):
        scores = (images @ text).tolist()
        own = int(dataset.image_index[caption])
        rank = sum(score >= scores[own] for score in scores)
        order = sorted(range(5), key=lambda image: -scores[image])
        other = next(image for image in order if image != own)
        others_words = {word for text in CAPTIONS[other] for word in split_words(text)}
        same_words = set(split_words(dataset.captions[caption])) <= others_words
        if rank > 1:
            expected.append((-rank, caption, order[:4], same_words))
    mistakes = find_mistakes(model, dataset)
    assert [(-m.rank, m.caption, m.top, m.same_words) for m in mistakes] == sorted(expected)
    assert len(mistakes) > 3 and {m.same_words for m in mistakes} == {True, False}


def test_a_single_image_gives_no_mistakes(model):
    """With one image every caption ranks its own image first."""
    assert find_mistakes(model, make_dataset(CAPTIONS[:1])) == []


def test_mistakes_do_not_depend_on_the_block_size(model, dataset, monkeypatch):
    """Ranking two captions at a time finds the same mistakes."""
    expected = find_mistakes(model, dataset)
    monkeypatch.setattr(examples, "BLOCK", 2)
    assert find_mistakes(model, dataset) == expected


def test_the_sheet_of_mistakes_has_a_row_per_image(model, dataset, tmp_path):
    """The sheet has at most `count` rows, with the correct image of each framed in green."""
    heights = []
    for count in (1, 3):
        plot_mistakes(tmp_path / "sheet.png", dataset, find_mistakes(model, dataset), count)
        sheet = np.asarray(load_image(tmp_path / "sheet.png"))
        heights.append(len(sheet))
        assert (sheet == GREEN).all(-1).any()
    assert heights[1] > 2 * heights[0]


@pytest.mark.parametrize("n_images", [2, 7])
def test_the_sheet_of_examples_fits_a_small_split(model, tmp_path, n_images):
    """Six rows of five images, or of all images if there are fewer; the correct one framed."""
    plot_examples(tmp_path / "examples.png", model,
                  make_dataset([(f"photo {i}",) for i in range(n_images)]))
    sheet = np.asarray(load_image(tmp_path / "examples.png"))
    height, width, _ = sheet.shape
    columns = min(5, n_images)
    assert width / height == pytest.approx((3.0 + 1.75 * columns) / (2.05 * 6 + 0.1), rel=0.02)
    assert (sheet == GREEN).all(-1).any()


@pytest.mark.parametrize(("caption", "prose"), [
    ("a man 's hat , on a dog .", "A man's hat, on a dog."), ("Two dogs", "Two dogs"), ("", ""),
    ("do n't ! ", "Don't!"), ("a 3.5 m wall", "A 3.5 m wall"),
])
def test_captions_are_drawn_as_prose(caption: str, prose: str) -> None:
    """No blanks before punctuation marks, and a capital letter first."""
    assert as_prose(caption) == prose
