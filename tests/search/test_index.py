"""The index of a folder: its content, updates, damaged files, and exact search."""

from __future__ import annotations

import base64
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import src.data.images
import src.evaluation.embed
import src.search.index
import src.search.update_index
from src.data.images import ReadError, load_resized
from src.data.pixel_store import store_size
from src.evaluation.embed import embed_pixels
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.search.index import ImageIndex
from src.search.matrix import MAX_JSON_BYTES, load_matrix, save_matrix
from src.search.update_index import find_images, update_index
from src.utils.errors import UserError
from src.utils.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
DIM = 256


def update(folder: Path, images: Path, checkpoint: str, model: DualEncoder) -> ImageIndex:
    """Return the updated index."""
    return update_index(folder, images, checkpoint, DIM, lambda: model)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    """Return a model with random weights."""
    torch.manual_seed(0)
    return DualEncoder(ModelConfig(4, image_size=32)).eval()


def draw(path: Path, seed: int, mode: str = "RGB") -> Path:
    """Write an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (24, 30, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


@pytest.fixture()
def images(tmp_path: Path) -> Path:
    """Return a folder of images in several formats and subfolders, and of other files."""
    folder = tmp_path / "images"
    for seed, name in enumerate(("b.png", "a.jpg", "sub/deep/c d'.webp", "фото 写真.PNG")):
        draw(folder / name, seed)
    draw(folder / "cmyk.jpg", 7, "CMYK")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "16bit.png")
    (folder / "truncated.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    (folder / "text.jpg").write_text("not an image")
    (folder / "notes.txt").write_text("not for the index")
    (folder / "folder.jpg").mkdir()
    draw(folder / ".hidden" / "h.png", 9)
    return folder


GOOD = sorted(["b.png", "a.jpg", "sub/deep/c d'.webp", "фото 写真.PNG", "cmyk.jpg", "16bit.png"])


class Counter:
    """Counts decoded images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counted(path: Path, size: int, notes: list[str]) -> np.ndarray:
            self.count += 1
            return load_resized(path, size, notes)

        monkeypatch.setattr(src.data.images, "load_resized", counted)


def test_readable_images_are_embedded_and_others_named(
    tmp_path: Path, images: Path, model: DualEncoder, capsys: pytest.CaptureFixture
) -> None:
    """Each embedding is that of the image alone; unreadable files are named."""
    index = update(tmp_path / "index", images, "x", model)
    assert index.names == GOOD
    for name, row in zip(index.names, index.embeddings, strict=True):
        pixels = torch.from_numpy(load_resized(images / name, store_size(32)))
        alone = embed_pixels(model, pixels[None])[0]
        torch.testing.assert_close(torch.from_numpy(row), alone, atol=1e-5, rtol=0)
    printed = capsys.readouterr().err
    assert set(index.failed) == {"truncated.jpg", "text.jpg"}
    assert "truncated.jpg: " in printed and "text.jpg: not an image" in printed


def test_the_matrix_is_a_plain_npy(tmp_path: Path, images: Path, model: DualEncoder) -> None:
    """index.json names a .npy of unit vectors, one per name, that numpy reads."""
    update(tmp_path / "index", images, "x", model)
    content = json.loads((tmp_path / "index" / "index.json").read_text(encoding="utf-8"))
    matrix = np.load(tmp_path / "index" / content["embeddings"])
    assert matrix.shape == (len(content["names"]), 256) and matrix.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)
    assert len(list((tmp_path / "index").glob("*.npy"))) == 1


def test_a_second_call_embeds_only_changes(
    tmp_path: Path, images: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New and changed images are embedded, missing ones removed, as in a new index."""
    counter = Counter(monkeypatch)
    update(tmp_path / "index", images, "x", model)
    counter.count = 0
    update(tmp_path / "index", images, "x", model)
    assert counter.count == 0
    draw(images / "b.png", 100)
    draw(images / "new.png", 101)
    (images / "a.jpg").unlink()
    (images / "text.jpg").unlink()
    updated = update(tmp_path / "index", images, "x", model)
    assert counter.count == 2
    fresh = update(tmp_path / "fresh", images, "x", model)
    assert updated.names == fresh.names and set(updated.failed) == {"truncated.jpg"}
    np.testing.assert_allclose(updated.embeddings, fresh.embeddings, atol=1e-5)


def test_another_checkpoint_builds_the_index_again(
    tmp_path: Path, images: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """An index of another checkpoint is reported and built again."""
    counter = Counter(monkeypatch)
    update(tmp_path / "index", images, "x", model)
    first = counter.count
    update(tmp_path / "index", images, "y", model)
    assert counter.count == 2 * first
    assert "another checkpoint" in capsys.readouterr().err


def test_an_interrupted_build_is_continued(
    tmp_path: Path, images: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C keeps what is embedded; the next call embeds the rest."""
    monkeypatch.setattr(src.search.update_index, "BATCH_SIZE", 2)
    calls = []

    def interrupted(model: DualEncoder, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed_pixels(model, pixels)

    monkeypatch.setattr(src.evaluation.embed, "embed_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update(tmp_path / "index", images, "x", model)
    done = len(ImageIndex.load(tmp_path / "index", "x", DIM).names)
    assert done == sum(calls[:2]) > 0
    index = update(tmp_path / "index", images, "x", model)
    assert index.names == GOOD and sum(calls[3:]) == len(GOOD) - done


def test_an_index_that_is_up_to_date_needs_no_model(
    tmp_path: Path, images: Path, model: DualEncoder
) -> None:
    """The model is loaded at most once, and not at all if nothing is new."""
    calls = []
    for _ in range(2):
        update_index(tmp_path / "index", images, "x", DIM, lambda: calls.append(1) or model)
    assert calls == [1]


def test_a_page_among_the_images_is_skipped(
    tmp_path: Path, images: Path, model: DualEncoder
) -> None:
    """The copies in a search page are skipped; another folder with a search.js is not."""
    before = update(tmp_path / "index", images, "x", model).names
    draw(images / "albums" / "page" / "t" / "thumbnail.jpg", 3)
    (images / "albums" / "page" / "search.js").write_bytes(
        src.search.update_index.PAGE_MARK + b" and more")
    draw(images / "site" / "own.jpg", 4)
    (images / "site" / "search.js").write_text("// my own")
    assert update(tmp_path / "index", images, "x", model).names == sorted([*before, "site/own.jpg"])


def test_read_errors_are_tried_again(
    tmp_path: Path, images: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken image is skipped until it changes; a read error is tried again."""
    def failing(path: Path, size: int, notes: list[str]) -> np.ndarray:
        if path.name == "b.png":
            raise ReadError("Input/output error")
        return load_resized(path, size, notes)

    with monkeypatch.context() as patch:
        patch.setattr(src.data.images, "load_resized", failing)
        index = update(tmp_path / "index", images, "x", model)
    assert "b.png" not in index.names and index.failed["b.png"][0] == "Input/output error"
    index = update(tmp_path / "index", images, "x", model)
    assert index.names == GOOD and "b.png" not in index.failed


# ---- Damaged and untrusted files -----------------------------------------------------------------


def test_a_matrix_round_trip(tmp_path: Path) -> None:
    """save_matrix and load_matrix are inverse, also without rows; old files are removed."""
    rows = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    (tmp_path / ".x-12345678.npy.tmp").write_bytes(b"what a killed writer left")
    for matrix in (rows, rows[:0], rows[::2]):
        save_matrix(tmp_path, "x", {"a": [1, "\udcff"]}, matrix)
        content, back = load_matrix(tmp_path, "x")
        np.testing.assert_array_equal(back, matrix)
        assert content["a"] == [1, "\udcff"] and len(list(tmp_path.iterdir())) == 2


class Bait:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def header(shape: str, dtype: str = "<f4", fortran: bool = False) -> bytes:
    """Return the header of a .npy file with any content."""
    text = f"{{'descr': {dtype}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


HEADERS = [
    header("(4000000000000, 256)", "'<f4'"), header("(9223372036854775807, 9)", "'<f4'"),
    header("(-1, 256)", "'<f4'"), header("(6,)", "'<f4'"), header("6", "'<f4'"),
    header("(6, 256)", "'|O'"), header("(6, 256)", "'<f8'"), header("(6, 256)", "'<i4'"),
    header("(6, 256)", "'>f4'"), header("(6, 256)", "'|V4'"), header("(6, 256)", "[('a', '<f4')]"),
    header("(6, 256)", "'<f4'", True), header("__import__('os')", "'<f4'"), header("()", "'<f4'"),
    header("(6, 1, 256)", "'<f4'"), header("(6, 255)", "'<f4'"), header("(5, 256)", "'<f4'"),
    b"\x93NUMPY\x09\x00", b"\x93NUMPY\x01\x00\xff\xff{", b"PK\x03\x04", b"", b"\x80\x04.",
]


@pytest.mark.parametrize("head", HEADERS, ids=lambda head: repr(head[10:90]))
def test_an_invalid_matrix_is_refused(
    tmp_path: Path, images: Path, model: DualEncoder, head: bytes,
    capsys: pytest.CaptureFixture,
) -> None:
    """Types and sizes are checked before memory is allocated; the index is built again."""
    update(tmp_path / "index", images, "x", model)
    (matrix,) = (tmp_path / "index").glob("*.npy")
    matrix.write_bytes(head + np.ones((6, 256), np.float32).tobytes())
    index = update(tmp_path / "index", images, "x", model)
    assert index.names == GOOD and np.allclose(np.linalg.norm(index.embeddings, axis=1), 1)
    assert capsys.readouterr().err.count("damaged") == 1


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 3e38])
def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, images: Path, model: DualEncoder, number: float,
    capsys: pytest.CaptureFixture,
) -> None:
    """An index with NaN or infinite numbers is built again."""
    index = update(tmp_path / "index", images, "x", model)
    index.embeddings = np.array(index.embeddings)
    index.embeddings[2, 7:9] = number
    index.save(tmp_path / "index")
    assert np.isfinite(update(tmp_path / "index", images, "x", model).embeddings).all()
    assert "damaged" in capsys.readouterr().err


def test_an_index_cannot_run_code(tmp_path: Path, images: Path, model: DualEncoder) -> None:
    """Object arrays, archives and pickles are not unpickled."""
    index, ran = tmp_path / "index", tmp_path / "ran"
    bait = np.array([[Bait(ran)]], object)
    np.save(tmp_path / "bait.npy", bait, allow_pickle=True)
    np.savez(tmp_path / "archive.npz", bait)
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bait(ran)))
    for file in ("bait.npy", "archive.npz", "pickle"):
        np.load(tmp_path / "bait.npy", allow_pickle=True)
        assert ran.exists()  # unpickling would run it
        ran.unlink()
        update(index, images, "x", model)
        (matrix,) = index.glob("*.npy")
        matrix.write_bytes((tmp_path / file).read_bytes())
        assert update(index, images, "x", model).names == GOOD and not ran.exists()


GOOD_INDEX = {
    "checkpoint": "x", "names": GOOD, "signatures": [[1, 2]] * 6, "failed": {}, "decoder": 3,
    "digests": ["00"] * 6, "notes": {}, "about": {},
    "thumbnails": base64.b64encode(bytes(6 * 48)).decode(),
}


@pytest.mark.parametrize("change", [
    {"names": GOOD[:5]}, {"names": ["b.png"] * 6}, {"names": [1, 2, 3, 4, 5, 6]},
    {"names": "abcdef"},
    {"names": [["b.png"]] * 6}, {"names": None}, {"names": {}}, {"signatures": [[1, 2]]},
    {"signatures": 7}, {"signatures": {}}, {"failed": []}, {"failed": {"a": 1}},
    {"failed": {"a": [1, 2, 3]}}, {"failed": {"a": []}}, {"digests": [1] * 6}, {"digests": None},
    {"thumbnails": "A"}, {"thumbnails": "AAAA"}, {"thumbnails": 5}, {"notes": []},
    {"notes": {"a": 1}}, {"about": {"folder": 1}}, {"about": None}, {"decoder": "3"},
    {"decoder": 1}, {"decoder": None}, {"checkpoint": None}, {"checkpoint": ["x"]},
    {"embeddings": 5}, {"embeddings": None}, {"embeddings": ""}, {"embeddings": ".."},
    {"embeddings": "none.npy"}, {"embeddings": "\0"}, {"embeddings": "x" * 5000},
    {"embeddings": "../outside.npy"}, {"embeddings": "/etc/passwd"}, {"embeddings": "pipe.npy"},
    {"names": ["../../etc/passwd", "/etc/passwd", "..", ".", "", "b.png"]},
], ids=str)
def test_an_untrusted_index_is_validated(
    tmp_path: Path, images: Path, model: DualEncoder, change: dict
) -> None:
    """Whatever the values, the result holds the images of the folder and their embeddings."""
    index = tmp_path / "index"
    rows = np.full((6, DIM), 1 / 16, np.float32)
    save_matrix(index, "index", GOOD_INDEX, rows)
    np.save(tmp_path / "outside.npy", rows)
    os.mkfifo(index / "pipe.npy")
    content = json.loads((index / "index.json").read_text()) | change
    write_atomic(index / "index.json", json.dumps(content).encode())
    updated = update(index, images, "x", model)
    fresh = update(tmp_path / "fresh", images, "x", model)
    assert updated.names == fresh.names and set(updated.failed) == set(fresh.failed)
    np.testing.assert_allclose(updated.embeddings, fresh.embeddings, atol=1e-5)


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[]", b'{"checkpoint": "x"}', b"[" * 100_000, b'"' + b"\xff" * 9, b"9" * 5000,
    b'{"embeddings": {}}', b"\x80\x04.", b"NaN",
], ids=lambda damage: repr(damage[:20]))
def test_a_damaged_index_is_built_again(
    tmp_path: Path, images: Path, model: DualEncoder, damage: bytes,
    capsys: pytest.CaptureFixture,
) -> None:
    """Whatever index.json holds, the index is correct and a line reports the damage."""
    update(tmp_path / "index", images, "x", model)
    write_atomic(tmp_path / "index" / "index.json", damage)
    assert update(tmp_path / "index", images, "x", model).names == GOOD
    assert "damaged" in capsys.readouterr().err


def test_a_huge_description_is_not_read(
    tmp_path: Path, images: Path, model: DualEncoder, capsys: pytest.CaptureFixture
) -> None:
    """A huge index.json or a pipe is refused without reading it."""
    index = tmp_path / "index"
    index.mkdir()
    with open(index / "index.json", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    assert update(index, images, "x", model).names == GOOD
    (index / "index.json").unlink()
    os.mkfifo(index / "index.json")
    assert update(index, images, "x", model).names == GOOD
    assert capsys.readouterr().err.count("damaged") == 2


def test_nothing_to_index_is_an_error(tmp_path: Path, model: DualEncoder) -> None:
    """A missing folder and a folder without images are user errors."""
    with pytest.raises(UserError, match="--images"):
        update(tmp_path / "index", tmp_path / "nowhere", "x", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no readable image"):
        update(tmp_path / "index", tmp_path / "empty", "x", model)


def test_unusable_files_are_named(tmp_path: Path, images: Path) -> None:
    """Link cycles, broken links, links to outside and pipes are named."""
    outside = draw(tmp_path / "outside.jpg", 5)
    (images / "loop").symlink_to(images)
    (images / "self.jpg").symlink_to(images / "self.jpg")
    (images / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (images / "out.jpg").symlink_to(outside)
    (images / "inside.jpg").symlink_to(images / "b.png")
    os.mkfifo(images / "pipe.jpg")
    scan = find_images(images)
    assert set(scan.found) == {*GOOD, "truncated.jpg", "text.jpg", "inside.jpg"}
    assert set(scan.unusable) == {"self.jpg", "broken.jpg", "out.jpg", "pipe.jpg", "loop"}
    assert all(scan.unusable.values())


def test_names_cannot_steer_the_terminal(
    tmp_path: Path, images: Path, model: DualEncoder, capsys: pytest.CaptureFixture
) -> None:
    """Control characters in file names are printed as escapes."""
    (images / "evil\x1b[2J\nerror: all lost.jpg").write_text("not an image")
    update(tmp_path / "index", images, "x", model)
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and "\nerror" not in printed
    assert "evil\\x1b[2J error: all" in printed


# ---- Killed --------------------------------------------------------------------------------------

# Run in a separate process, which forks: the k-th child builds an index and kills itself at its
# k-th system call, until one child finishes.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import src.data.images, src.evaluation.embed, src.utils.runtime
from src.search import update_index as indexing
from src.models.dual_encoder import DualEncoder, ModelConfig
indexing.BATCH_SIZE, indexing.SAVE_SECONDS = 2, 0
src.utils.runtime.cpu_has_bfloat16 = lambda: False  # as in all tests
torch.set_num_threads(1)
torch.manual_seed(0)
model = DualEncoder(ModelConfig(4, image_size=32)).eval()
start, images = Path(sys.argv[1]), Path(sys.argv[2])

def build(index, last_call):
    calls = [0]
    def counted(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == last_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    src.evaluation.embed.embed_pixels = counted(src.evaluation.embed.embed_pixels)
    indexing.update_index(index, images, "x", 256, lambda: model)
    os._exit(0)

for last_call in range(1, 1000):
    child = os.fork() or build(start.with_name(f"killed-{last_call}"), last_call)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_an_index_survives_a_kill_at_every_call(tmp_path: Path, model: DualEncoder) -> None:
    """Killed at any system call, the index ends equal to an undisturbed one."""
    images = tmp_path / "images"
    for seed in range(5):
        draw(images / f"{seed}.png", seed)
    (images / "text.jpg").write_text("not an image")
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "index", images],
                         capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    fresh = update(tmp_path / "fresh", images, "x", model)
    indexes = list(tmp_path.glob("killed-*"))
    assert len(indexes) > 15
    for folder in indexes:
        repaired = update(folder, images, "x", model)
        assert (repaired.names, repaired.failed) == (fresh.names, fresh.failed)
        np.testing.assert_allclose(repaired.embeddings, fresh.embeddings, atol=1e-6)
    (images / "text.jpg").unlink()
    for folder in indexes:
        update(folder, images, "x", model)
        assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".lock", ".npy"]


@pytest.mark.parametrize("full", ["rows", "names"])
def test_a_full_disk_loses_nothing(
    tmp_path: Path, images: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """The old index stays intact, the message gives the bytes, and the next call succeeds."""
    before = update(tmp_path / "index", images, "x", model).names
    draw(images / "new.png", 50)
    fsync, calls = os.fsync, []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == {"rows": 1, "names": 3}[full]:  # file, folder, file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(UserError, match=r"bytes\): No space left on device"):
            update(tmp_path / "index", images, "x", model)
    assert ImageIndex.load(tmp_path / "index", "x", DIM).names == before
    assert update(tmp_path / "index", images, "x", model).names == sorted([*before, "new.png"])
    assert sorted(p.suffix for p in (tmp_path / "index").iterdir()) == [".json", ".lock", ".npy"]


def test_a_folder_that_cannot_be_written_is_an_error(
    tmp_path: Path, images: Path, model: DualEncoder
) -> None:
    """A file in the place of the index is a user error."""
    (tmp_path / "index").write_text("a file")
    with pytest.raises(UserError, match="--index-dir"):
        update(tmp_path / "index", images, "x", model)


# ---- Search --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [1, 7, 60, 1 << 20])
@pytest.mark.parametrize("queries", [1, 2, 7, 8, 30])
@pytest.mark.parametrize("count", [1, 9, 50, 401])
def test_search_is_exact(
    scores: int, queries: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any block size the result is that of a full stable sort."""
    monkeypatch.setattr(src.search.index, "BLOCK_SCORES", scores)
    rng = np.random.default_rng(count)
    # Small integers: sums are exact in any order, and many scores are equal.
    rows = rng.integers(-2, 3, (count, 8)).astype(np.float32)
    asked = rng.integers(-2, 3, (queries, 8)).astype(np.float32)
    index = ImageIndex("x", [str(i) for i in range(count)], [], rows)
    similarity = asked @ rows.T
    for top in (1, 3, 10, 1000):
        best, found = index.search(asked, top)
        expected = np.argsort(-similarity, axis=1, kind="stable")[:, :top]
        assert best.dtype == np.float32 and found.dtype == np.int64
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(best, np.take_along_axis(similarity, expected, 1))


@pytest.mark.parametrize("queries", [1, 5, 20])
def test_search_of_real_numbers(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With unit vectors the top ten equal those of sorted float64 scores."""
    monkeypatch.setattr(src.search.index, "BLOCK_SCORES", 3000)
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((2000, 256), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    asked = rows[5 : 5 + queries] + 0.7 * rows[50 : 50 + queries]
    scores, found = ImageIndex("x", [""] * 2000, [], rows).search(asked, 10)
    similarity = asked.astype(np.float64) @ rows.astype(np.float64).T
    np.testing.assert_array_equal(found, np.argsort(-similarity, axis=1)[:, :10])
    np.testing.assert_allclose(scores, -np.sort(-similarity, axis=1)[:, :10], atol=1e-5)


def test_search_of_nothing() -> None:
    """Without images or without queries the result is empty."""
    scores, found = ImageIndex("x").search(np.zeros((3, 4), np.float32), 5)
    assert scores.shape == found.shape == (3, 0)
    index = ImageIndex("x", ["a", "b"], [], np.eye(2, dtype=np.float32))
    assert index.search(np.zeros((0, 2), np.float32), 5)[1].shape == (0, 2)


def test_equal_images_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many equal scores only those of the first block are collected."""
    monkeypatch.setattr(src.search.index, "BLOCK_SCORES", 1000)
    collected = []
    lexsort = np.lexsort
    monkeypatch.setattr(np, "lexsort", lambda keys: collected.append(len(keys[0])) or lexsort(keys))
    index = ImageIndex("x", [""] * 100_000, [], np.ones((100_000, 2), np.float32))
    assert index.search(np.ones((1, 2), np.float32), 5)[1].tolist() == [[0, 1, 2, 3, 4]]
    assert collected == [1000]
