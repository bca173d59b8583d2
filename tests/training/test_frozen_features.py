"""Features of a frozen image encoder: computed once, and never used for another encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from src.data.captions import ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.pixel_store import PixelStore
from src.data.transforms import eval_transform
from src.models.image_encoder import ImageEncoder
from src.models.tokenizer import Tokenizer
from src.training import frozen_features as features
from src.training.frozen_features import frozen_features
from src.utils.errors import UserError
from src.utils.runtime import seed_all


def make_dataset(seed: int = 0, count: int = 7) -> Flickr30kDataset:
    """Return images of noise, in another order than the rows of the store."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count + 2, 34, 34, 3), np.uint8)
    records = [ImageRecord(f"{i}.jpg", (f"image {i}",)) for i in range(count)]
    store = PixelStore(pixels, {r.name: count - i for i, r in enumerate(records)}, {})
    return Flickr30kDataset(records, store, Tokenizer.from_captions(["image"], 1, 4))


def make_encoder(seed: int = 0, flip_tta: bool = False) -> ImageEncoder:
    """Return an encoder with the weights of `seed`."""
    seed_all(seed, "weights")
    return ImageEncoder("efficientnet-b0", 32, flip_tta=flip_tta)


@pytest.fixture
def count_passes(monkeypatch):
    """The sizes of the batches that any encoder has computed so far."""
    seen = []
    original = ImageEncoder.forward

    def forward(self, images):
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(ImageEncoder, "forward", forward)
    monkeypatch.setattr(features, "BATCH_SIZE", 3)
    return seen


def test_features_are_the_encoders(tmp_path, count_passes):
    """Each row is what the encoder in eval mode returns for that image alone."""
    dataset, encoder = make_dataset(), make_encoder().train()
    found = frozen_features(tmp_path, encoder, dataset)
    assert found.shape == (7, encoder.feature_dim) and found.dtype == torch.float32
    with torch.no_grad():
        for i in range(7):
            own = encoder.eval()(eval_transform(dataset.take_images(np.array([i])), 32))
            torch.testing.assert_close(found[i], own[0], rtol=1e-4, atol=1e-6)


def test_features_are_computed_once(tmp_path, count_passes):
    """A second call reads them; other weights, other pixels, fewer images or flip_tta compute
    others."""
    first = frozen_features(tmp_path, make_encoder(), make_dataset())
    assert sum(count_passes) == 7
    assert torch.equal(frozen_features(tmp_path, make_encoder(), make_dataset()), first)
    assert sum(count_passes) == 7
    for encoder, dataset in ((make_encoder(1), make_dataset()), (make_encoder(), make_dataset(1)),
                             (make_encoder(), make_dataset(count=6)),
                             (make_encoder(flip_tta=True), make_dataset())):
        before = sum(count_passes)
        other = frozen_features(tmp_path, encoder, dataset)
        assert sum(count_passes) == before + len(dataset.records)
        assert not torch.equal(other, first[: len(other)])


def test_an_interrupted_call_is_continued(tmp_path, count_passes, monkeypatch):
    """Features saved before Ctrl-C are not computed again, and the result is the same."""
    expected = frozen_features(tmp_path / "whole", make_encoder(), make_dataset())
    monkeypatch.setattr(features, "SAVE_BATCHES", 1)
    original = features._save

    def save(path: Path, rows: np.ndarray) -> None:
        original(path, rows)
        if len(rows) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features, "_save", save)
        frozen_features(tmp_path / "cut", make_encoder(), make_dataset())
    before = sum(count_passes)
    found = frozen_features(tmp_path / "cut", make_encoder(), make_dataset())
    assert sum(count_passes) == before + 1
    torch.testing.assert_close(found, expected)


def test_a_damaged_part_is_computed_again(tmp_path, count_passes):
    """A partial file that is not an array is ignored."""
    expected = frozen_features(tmp_path, make_encoder(), make_dataset())
    (path,) = tmp_path.glob("features_*.npy")
    path.rename(path.with_suffix(".part.npy"))
    path.with_suffix(".part.npy").write_bytes(b"no array")
    assert torch.equal(frozen_features(tmp_path, make_encoder(), make_dataset()), expected)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    """A file in place of the folder is a UserError."""
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UserError, match="cannot"):
        frozen_features(tmp_path / "cache", make_encoder(), make_dataset())
