"""The index of a folder: what is in it, what is embedded again, and exact search."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import src.index
from src.errors import UserError
from src.files import write_atomic
from src.image_file import load_square
from src.index import ImageIndex, find_photos, update_index
from src.model import DualEncoder, ModelConfig
from src.pixels import store_size
from src.retrieval import embed_pixels


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    """A model with random weights."""
    torch.manual_seed(0)
    return DualEncoder(ModelConfig(4, image_size=32)).eval()


def draw(path: Path, seed: int, mode: str = "RGB") -> Path:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (24, 30, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


@pytest.fixture()
def photos(tmp_path: Path) -> Path:
    """A folder with pictures in several places and formats, and files that are none."""
    folder = tmp_path / "photos"
    for seed, name in enumerate(("b.png", "a.jpg", "sub/deep/c d'.webp", "фото 写真.PNG")):
        draw(folder / name, seed)
    draw(folder / "cmyk.jpg", 7, "CMYK")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "16bit.png")
    (folder / "truncated.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "notes.txt").write_text("not for the index")
    (folder / "folder.jpg").mkdir()
    draw(folder / ".hidden" / "h.png", 9)
    return folder


GOOD = sorted(["b.png", "a.jpg", "sub/deep/c d'.webp", "фото 写真.PNG", "cmyk.jpg", "16bit.png"])


class Counter:
    """Counts how many photos are decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counted(path: Path, size: int) -> np.ndarray:
            self.count += 1
            return load_square(path, size)

        monkeypatch.setattr(src.index, "load_square", counted)


def test_every_readable_photo_is_embedded_and_every_other_named(
    tmp_path: Path, photos: Path, model: DualEncoder, capsys: pytest.CaptureFixture
) -> None:
    """Rows are the embeddings of the photos one by one; a line names each unreadable file."""
    index = update_index(tmp_path / "index", photos, "x", model)
    assert index.names == GOOD
    for name, row in zip(index.names, index.embeddings, strict=True):
        pixels = torch.from_numpy(load_square(photos / name, store_size(32)))
        alone = embed_pixels(model, pixels[None])[0]
        torch.testing.assert_close(torch.from_numpy(row), alone, atol=1e-5, rtol=0)
    told = capsys.readouterr().err
    assert set(index.failed) == {"truncated.jpg", "text.jpg"}
    assert "truncated.jpg: " in told and "text.jpg: not a picture" in told


def test_the_matrix_is_plain(tmp_path: Path, photos: Path, model: DualEncoder) -> None:
    """index.json names a .npy of unit rows, one for each name, that numpy reads by itself."""
    update_index(tmp_path / "index", photos, "x", model)
    content = json.loads((tmp_path / "index" / "index.json").read_text(encoding="utf-8"))
    matrix = np.load(tmp_path / "index" / content["embeddings"])
    assert matrix.shape == (len(content["names"]), 256) and matrix.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)
    assert len(list((tmp_path / "index").glob("*.npy"))) == 1


def test_a_second_call_embeds_only_what_changed(
    tmp_path: Path, photos: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New and changed photos are embedded, gone ones dropped, and the rest is as if built anew."""
    counter = Counter(monkeypatch)
    update_index(tmp_path / "index", photos, "x", model)
    counter.count = 0
    update_index(tmp_path / "index", photos, "x", model)
    assert counter.count == 0
    draw(photos / "b.png", 100)
    draw(photos / "new.png", 101)
    (photos / "a.jpg").unlink()
    (photos / "text.jpg").unlink()
    updated = update_index(tmp_path / "index", photos, "x", model)
    assert counter.count == 2
    fresh = update_index(tmp_path / "fresh", photos, "x", model)
    assert updated.names == fresh.names and set(updated.failed) == {"truncated.jpg"}
    np.testing.assert_allclose(updated.embeddings, fresh.embeddings, atol=1e-5)


def test_another_checkpoint_rebuilds(
    tmp_path: Path, photos: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """An index of other weights is said to be so and made anew."""
    counter = Counter(monkeypatch)
    update_index(tmp_path / "index", photos, "x", model)
    first = counter.count
    update_index(tmp_path / "index", photos, "y", model)
    assert counter.count == 2 * first
    assert "another checkpoint" in capsys.readouterr().err


def test_an_interrupted_build_keeps_what_is_done(
    tmp_path: Path, photos: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle loses nothing that was embedded; the next call does only the rest."""
    monkeypatch.setattr(src.index, "BATCH_SIZE", 2)
    calls = []

    def interrupted(model: DualEncoder, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed_pixels(model, pixels)

    monkeypatch.setattr(src.index, "embed_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update_index(tmp_path / "index", photos, "x", model)
    done = len(ImageIndex.load(tmp_path / "index", "x").names)
    assert done == sum(calls[:2]) > 0
    index = update_index(tmp_path / "index", photos, "x", model)
    assert index.names == GOOD and sum(calls[3:]) == len(GOOD) - done


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"checkpoint": "x"}'])
def test_a_damaged_index_is_built_anew(
    tmp_path: Path, photos: Path, model: DualEncoder, damage: bytes,
    capsys: pytest.CaptureFixture,
) -> None:
    """Whatever stands in index.json, the answer is right and a line says what happened."""
    update_index(tmp_path / "index", photos, "x", model)
    write_atomic(tmp_path / "index" / "index.json", damage)
    assert update_index(tmp_path / "index", photos, "x", model).names == GOOD
    assert "damaged" in capsys.readouterr().err


def test_nothing_to_index_is_told(tmp_path: Path, model: DualEncoder) -> None:
    """No folder, and a folder without pictures, are the user's to mend."""
    with pytest.raises(UserError, match="--images"):
        update_index(tmp_path / "index", tmp_path / "nowhere", "x", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no readable picture"):
        update_index(tmp_path / "index", tmp_path / "empty", "x", model)


def test_links_in_a_circle_end(tmp_path: Path, photos: Path) -> None:
    """A link to its own folder is not followed for ever, and one to nowhere is no photo."""
    (photos / "loop").symlink_to(photos)
    (photos / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert set(GOOD) <= set(find_photos(photos)) and "broken.jpg" not in find_photos(photos)
    assert not any(name.startswith("loop") for name in find_photos(photos))


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_search_is_exact(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block gives the scores and rows of a full sort."""
    monkeypatch.setattr(src.index, "BLOCK_ROWS", block)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 16), dtype=np.float32)
    queries = rng.standard_normal((5, 16), dtype=np.float32)
    index = ImageIndex("x", [str(i) for i in range(50)], [], rows)
    scores, found = index.search(queries, 10)
    similarity = queries @ rows.T
    expected = np.argsort(-similarity, axis=1)[:, :10]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(similarity, expected, 1), rtol=1e-5)
    assert index.search(queries, 99)[1].shape == (5, 50)
