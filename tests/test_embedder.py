"""The Embedder: texts, images and search from Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import search
import train
from src.embedder import Embedder
from src.evaluation.embed import embed_tokens
from src.utils.errors import UserError
from tests.tiny_data import make_tiny_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and a checkpoint."""
    folder = tmp_path_factory.mktemp("embedder")
    images, annotations = make_tiny_data(folder)
    train.main(["--images", str(images), "--annotations", str(annotations), "--image-size", "32",
                "--weights", "none", "--epochs", "1", "--batch-size", "4", "--device", "cpu",
                "--embed-dim", "16", "--token-dim", "24", "--val-fraction", "0.25",
                "--results-dir", str(folder / "results")])
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Embedder:
    """The trained model."""
    return Embedder(folder / "results" / "models" / "flickr30k_clip_best.pth", device="cpu",
                    index_dir=folder / "index")


TEXTS = ["a red thing", "things near a blue thing number 3"]


def test_texts_are_unit_rows_of_the_model(model: Embedder) -> None:
    """Texts are embedded as in evaluation."""
    expected = embed_tokens(model.model, model.tokenizer.encode(TEXTS)).numpy()
    found = model.texts(TEXTS)
    assert found.dtype == np.float32 and found.shape == (2, 16)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_an_image_is_the_same_as_path_pil_image_and_array(model: Embedder, folder: Path) -> None:
    """Paths as strings or Paths, opened images and arrays give the same embeddings, in order, in
    batches of any size."""
    paths = sorted((folder / "images").glob("*.png"))
    expected = model.images(paths)
    assert expected.shape == (len(paths), 16) and expected.dtype == np.float32
    images = [Image.open(path) for path in paths]
    for same in (list(map(str, paths)), images, [np.asarray(image) for image in images]):
        np.testing.assert_allclose(model.images(same), expected, atol=1e-6)
    np.testing.assert_allclose(model.images(iter(paths), batch_size=2), expected, atol=1e-6)
    np.testing.assert_allclose(model.images(paths[0])[0], expected[0], atol=1e-6)


def test_modes_that_png_does_not_store(model: Embedder, folder: Path) -> None:
    """A CMYK image is embedded as its RGB image, and an orientation is applied."""
    image = Image.open(next((folder / "images").glob("*.png"))).convert("CMYK")
    np.testing.assert_allclose(model.images([image]), model.images([image.convert("RGB")]),
                               atol=1e-6)
    turned = image.convert("RGB")
    turned.getexif()[274] = 6
    expected = model.images([image.convert("RGB").transpose(Image.Transpose.ROTATE_270)])
    np.testing.assert_allclose(model.images([turned]), expected, atol=1e-6)


def test_search_equals_brute_force(model: Embedder, folder: Path) -> None:
    """The results of a text and of an image are those of sorting all scores."""
    paths = sorted((folder / "images").iterdir())
    embeddings = model.images(paths)
    for query, own in ((TEXTS[0], model.texts(TEXTS[:1])), (paths[3], embeddings[3:4])):
        scores = dict(zip(paths, (embeddings @ own.T).ravel(), strict=True))
        found = model.search(query, folder / "images", top=5)
        # Of nearly equal scores any order is right.
        np.testing.assert_allclose([score for _, score in found],
                                   sorted(scores.values(), reverse=True)[:5], atol=1e-5)
        for path, score in found:
            assert score == pytest.approx(scores[Path(path)], abs=1e-5)
        assert len({path for path, _ in found}) == 5


def test_no_input_gives_no_rows(model: Embedder) -> None:
    """Empty lists give (0, D) arrays."""
    assert model.texts([]).shape == model.images([]).shape == (0, 16)


def test_mistakes_are_named(model: Embedder, folder: Path, tmp_path: Path) -> None:
    """A string for a list, an unknown text, unreadable images and arrays of another type."""
    with pytest.raises(TypeError, match="list of strings"):
        model.texts("a red thing")
    with pytest.raises(UserError, match="no word of 'xyzzy' is known"):
        model.texts(["a red thing", "xyzzy"])
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match="bad.jpg: not an image"):
        model.images([tmp_path / "bad.jpg"])
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), 7):
        with pytest.raises(UserError, match="cannot read a "):
            model.images([wrong])
    with pytest.raises(UserError, match="no file"):
        Embedder(tmp_path / "missing.pth")


def test_the_device_of_the_model(model: Embedder) -> None:
    """The model is on the device that was asked for, in eval mode."""
    assert model.model.logit_scale.device == torch.device("cpu") and not model.model.training


def test_each_model_has_indexes_of_its_own(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """search.py and Embedder share indexes, and the pretrained model has others.

    So that going from one model to the other embeds nothing again.
    """
    results, images = folder / "results", folder / "images"
    flags = ["red thing", "--images", str(images), "--results-dir", str(results), "--device", "cpu"]

    def embeds() -> bool:
        return "embedded" in capsys.readouterr().err

    capsys.readouterr()
    for pretrained in ([], ["--pretrained"]):
        assert search.main([*flags, *pretrained]) == 0
        assert embeds()
    for pretrained in ([], ["--pretrained"]):
        assert search.main([*flags, *pretrained]) == 0
        assert not embeds()
    Embedder(results / "models" / "flickr30k_clip_best.pth", "cpu").search("red", images)
    assert not embeds()
    assert search.main(["--list-indexes", "--results-dir", str(results)]) == 0
    assert capsys.readouterr().out.count(str(images)) == 2
