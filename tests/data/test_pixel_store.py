"""The pixel store: every image decoded once, also after interruptions and damage."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import src.data.pixel_store
from src.data.images import load_resized, write_image
from src.data.pixel_store import PixelStore, store_size
from src.utils.errors import UserError
from src.utils.files import exclusive_lock
from tests.stress.bad_input import swapped_profile


def noise(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """Return (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture()
def images(tmp_path: Path) -> Path:
    """Return a folder of ten images and a file that is not an image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        write_image(folder / f"{i}.png", noise(seed=i))
    (folder / "bad.png").write_text("not a picture")
    return folder


NAMES = [f"{i}.png" for i in range(10)] + ["bad.png"]


@pytest.fixture()
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of decoded files, in order."""
    names: list[str] = []

    def counted(path: Path, size: int) -> np.ndarray:
        names.append(path.name)
        return load_resized(path, size)

    monkeypatch.setattr(src.data.pixel_store, "load_resized", counted)
    return names


def check(store: PixelStore, images: Path, names: list[str], size: int = 9) -> None:
    """Check that every readable image has its decoded pixels, and that the other is in failed."""
    good = [name for name in names if name != "bad.png"]
    assert sorted(store.rows) == sorted(good) and len(set(store.rows.values())) == len(good)
    assert list(store.failed) == [name for name in names if name == "bad.png"]
    for name in good:
        np.testing.assert_array_equal(store.pixels[store.rows[name]],
                                      load_resized(images / name, size))


def test_every_image_is_decoded_once(
    tmp_path: Path, images: Path, decoded: list[str]
) -> None:
    """Rows are the decoded squares; a second build decodes nothing."""
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)
    assert sorted(decoded) == sorted(NAMES)
    check(PixelStore.build(tmp_path / "s", images, NAMES[::-1], 9), images, NAMES[::-1])
    check(PixelStore.build(tmp_path / "s", images, NAMES[:3], 9), images, NAMES[:3])
    assert len(decoded) == len(NAMES)


def test_changed_and_new_images_are_decoded(
    tmp_path: Path, images: Path, decoded: list[str]
) -> None:
    """Only new and changed images are decoded, also a repaired one."""
    PixelStore.build(tmp_path / "s", images, NAMES[:9], 9)
    decoded.clear()
    write_image(images / "3.png", noise(20, 20, seed=99))
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)
    assert sorted(decoded) == ["3.png", "9.png", "bad.png"]
    decoded.clear()
    write_image(images / "bad.png", noise(seed=5))
    assert PixelStore.build(tmp_path / "s", images, NAMES, 9).failed == {}
    assert decoded == ["bad.png"]


def test_an_interrupted_build_is_continued(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption the next build decodes only the rest."""
    monkeypatch.setattr(src.data.pixel_store, "CHUNK", 3)
    names: list[str] = []

    def stops(path: Path, size: int) -> np.ndarray:
        names.append(path.name)
        if path.name == "7.png" and names.count("7.png") == 1:
            raise KeyboardInterrupt
        return load_resized(path, size)

    monkeypatch.setattr(src.data.pixel_store, "load_resized", stops)
    with pytest.raises(KeyboardInterrupt):
        PixelStore.build(tmp_path / "s", images, NAMES, 9, workers=1)
    names.clear()
    names.append("7.png")
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9, workers=1), images, NAMES)
    assert set(names) == set(NAMES[6:])


@pytest.mark.parametrize("lost", [0, 9 * 9 * 3 * 2])
def test_a_truncated_data_file_gives_no_wrong_pixels(
    tmp_path: Path, images: Path, lost: int
) -> None:
    """After the data file was cut, old journal lines do not claim new rows."""
    PixelStore.build(tmp_path / "s", images, NAMES, 9)
    os.truncate(tmp_path / "s" / "pixels_9.uint8", lost)
    check(PixelStore.build(tmp_path / "s", images, NAMES[5:], 9), images, NAMES[5:])
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)


def test_pixels_without_a_journal_line_are_decoded_again(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between pixels and journal line, the image is decoded again."""
    path, store = images / "3.png", tmp_path / "s"
    PixelStore.build(store, images, NAMES, 9)
    old, times = path.read_bytes(), path.stat()
    write_image(path, noise(seed=99))
    write, written = os.pwrite, []

    def stop_after_pixels(_: int) -> None:
        if written:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(src.data.pixel_store.os, "pwrite",
                      lambda *args: written.append(1) or write(*args))
        patch.setattr(src.data.pixel_store.os, "fsync", stop_after_pixels)
        PixelStore.build(store, images, NAMES, 9)
    path.write_bytes(old)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    check(PixelStore.build(store, images, NAMES, 9), images, NAMES)


def test_pixels_are_flushed_before_the_journal(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No journal line is written before its pixels are flushed."""
    data, journal = tmp_path / "s" / "pixels_9.uint8", tmp_path / "s" / "pixels_9.jsonl"
    write, fsync, written, flushed = os.pwrite, os.fsync, [], [0]

    def counting_write(file: int, pixels: memoryview, offset: int) -> int:
        written.append(offset)
        return write(file, pixels, offset)

    def checking_fsync(file: int) -> None:
        if data.exists() and os.fstat(file).st_ino == data.stat().st_ino:
            flushed.append(len(written))
        if journal.exists():
            assert len(journal.read_text().splitlines()) <= flushed[-1]
        fsync(file)

    monkeypatch.setattr(src.data.pixel_store, "CHUNK", 3)
    monkeypatch.setattr(src.data.pixel_store.os, "pwrite", counting_write)
    monkeypatch.setattr(src.data.pixel_store.os, "fsync", checking_fsync)
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)
    assert flushed[0] == 0 and flushed[-1] == 11 and len(flushed) == 5


@pytest.mark.parametrize("line", [
    "", "null", "3", "[]", "{}", '{"name": "0.png"}', '{"name": "0.png", "row": 1}',
    '{"name": "0.png", "row": "1", "signature": [], "error": ""}', '{"name": "0.png", "row": 0, "s',
    '{"name": "0.png", "row": -1, "signature": [0, 0], "error": ""}', "\x00\x00", "\ufffd",
    '{"name": ["0.png"], "row": 1, "signature": [], "error": ""}',
    '{"name": "0.png", "row": 99, "signature": [], "error": ""}',
])
def test_a_damaged_journal_line_does_no_harm(tmp_path: Path, images: Path, line: str) -> None:
    """Whatever a damaged journal line holds, the store is correct."""
    PixelStore.build(tmp_path / "s", images, NAMES, 9)
    with open(tmp_path / "s" / "pixels_9.jsonl", "a", encoding="utf-8") as file:
        file.write(line)
    for names in (NAMES[:4], NAMES):
        check(PixelStore.build(tmp_path / "s", images, names, 9), images, names)


@pytest.mark.parametrize("cut", [2, 40, 200])
def test_a_truncated_journal_loses_only_its_last_lines(
    tmp_path: Path, images: Path, decoded: list[str], cut: int
) -> None:
    """Only images of lost journal lines are decoded again."""
    PixelStore.build(tmp_path / "s", images, NAMES, 9)
    journal = tmp_path / "s" / "pixels_9.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    decoded.clear()
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)
    assert 1 <= len(decoded) <= 4
    for line in filter(None, journal.read_text().split("\n")[-len(decoded) - 1:]):
        json.loads(line)


def test_lost_rows_are_decoded_again(
    tmp_path: Path, images: Path, decoded: list[str]
) -> None:
    """If the data file is shorter than the journal says, lost rows are decoded again."""
    PixelStore.build(tmp_path / "s", images, NAMES, 9)
    data = tmp_path / "s" / "pixels_9.uint8"
    data.write_bytes(data.read_bytes()[: 9 * 9 * 3 * 4 + 10])
    decoded.clear()
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)
    assert len(decoded) == len(NAMES) - 4


def test_disk_use_is_printed_and_checked(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The size is printed first; without enough space nothing is written."""
    monkeypatch.setattr(src.data.pixel_store.shutil, "disk_usage",
                        lambda _: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="--cache-dir"):
        PixelStore.build(tmp_path / "s", images, NAMES, 9)
    assert "11 images" in capsys.readouterr().out
    assert not (tmp_path / "s" / "pixels_9.uint8").exists()


def test_a_failed_write_is_continued(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed write the next build continues."""
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    PixelStore.build(tmp_path / "s", images, NAMES[:4], 9)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(src.data.pixel_store.os, "pwrite", full)
        PixelStore.build(tmp_path / "s", images, NAMES, 9)
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)


def test_a_full_disk_keeps_finished_rows(
    tmp_path: Path, images: Path, small_disk: Path, decoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a disk that is really full, finished rows are kept, and a later build continues."""
    PixelStore.build(small_disk / "s", images, NAMES[:4], 200)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="1,320,000 b.*No space"):
        patch.setattr(src.data.pixel_store.shutil, "disk_usage",
                      lambda _: SimpleNamespace(free=10**9))
        PixelStore.build(small_disk / "s", images, NAMES, 200)
    with pytest.raises(UserError, match=r"need [\d,]+ more bytes"):  # before anything is written
        PixelStore.build(small_disk / "s", images, NAMES, 200)
    decoded.clear()
    check(PixelStore.build(small_disk / "s", images, NAMES[:4], 200), images, NAMES[:4], 200)
    assert decoded == []
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    check(PixelStore.build(small_disk / "s", images, NAMES, 200), images, NAMES, 200)


def test_a_read_only_folder_is_an_error(images: Path, small_disk: Path) -> None:
    """The message names the flag for another folder."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="Read-only.*--cache-dir"):
        PixelStore.build(small_disk / "s", images, NAMES, 9)


def test_read_errors_are_tried_again(
    tmp_path: Path, images: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read error is tried again next time; a broken image is not."""
    opens = Image.open

    def fails(path: Path, *args: object) -> Image.Image:
        if path.name in ("2.png", "9.png"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opens(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fails)
        for _ in range(2):
            store = PixelStore.build(tmp_path / "s", images, NAMES, 9)
            assert list(store.failed) == ["2.png", "9.png", "bad.png"]
            assert store.failed["9.png"] == os.strerror(errno.EIO)
            good = [name for name in NAMES[:10] if name not in store.failed]
            assert sorted(store.rows) == good
    decoded.clear()
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)
    assert sorted(decoded) == ["2.png", "9.png"]


def test_a_folder_named_like_an_image_fails(tmp_path: Path, images: Path) -> None:
    """It fails with a reason, and the other images are decoded."""
    (images / "folder.png").mkdir()
    store = PixelStore.build(tmp_path / "s", images, [*NAMES, "folder.png"], 9)
    assert store.failed["folder.png"] == os.strerror(errno.EISDIR) and len(store.rows) == 10


def test_links_to_outside_fail(
    tmp_path: Path, images: Path, decoded: list[str]
) -> None:
    """Links to outside fail and have no pixels; links within the folder are images."""
    (tmp_path / "private.png").write_bytes((images / "1.png").read_bytes())
    (images / "0.png").unlink()
    (images / "0.png").symlink_to(tmp_path / "private.png")
    (images / "2.png").unlink()
    (images / "2.png").symlink_to("3.png")
    for _ in range(2):
        store = PixelStore.build(tmp_path / "s", images, NAMES[:10], 9)
        assert list(store.failed) == ["0.png"] and "link" in store.failed["0.png"]
        assert "0.png" not in decoded and sorted(store.rows) == NAMES[1:10]
        for name in store.rows:
            np.testing.assert_array_equal(store.pixels[store.rows[name]],
                                          load_resized(images / name, 9))
    (images / "0.png").unlink()
    write_image(images / "0.png", noise(seed=7))
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)


@pytest.mark.parametrize("name", ["pixels_9.uint8", "pixels_9.lock", ".pixels_9.jsonl.tmp"])
def test_nothing_is_written_through_a_link(tmp_path: Path, images: Path, name: str) -> None:
    """A dataset may bring links in the place of our files: they are not followed."""
    (tmp_path / "private").write_text("mine")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).symlink_to(tmp_path / "private")
    with pytest.raises(UserError):
        PixelStore.build(tmp_path / "s", images, NAMES, 9)
    assert (tmp_path / "private").read_text() == "mine"


def test_a_second_build_waits(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second build waits for the first one, and then decodes nothing."""
    waiting = threading.Event()
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(
        write=lambda text: waiting.set() if "waiting for another process" in text else None,
        flush=lambda: None, isatty=lambda: False))
    with ThreadPoolExecutor(1) as pool:
        with exclusive_lock(tmp_path / "s" / "pixels_9.lock"):
            second = pool.submit(PixelStore.build, tmp_path / "s", images, NAMES, 9)
            assert waiting.wait(60) and not second.done()
            assert not (tmp_path / "s" / "pixels_9.uint8").exists()
        check(second.result(60), images, NAMES)


# Run in a separate process, which forks: the k-th child continues a copy of the store and kills
# itself at its k-th system call, until one child finishes.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import src.data.pixel_store
src.data.pixel_store.CHUNK = 3
start, images, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]

def build(store, last_call):
    calls = [0]
    def counted(function):
        def call(*args):
            calls[0] += 1
            if calls[0] == last_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return call
    for name in ("pwrite", "fsync", "replace", "open"):
        setattr(os, name, counted(getattr(os, name)))
    src.data.pixel_store.PixelStore.build(store, images, names, 9)
    os._exit(0)

for last_call in range(1, 1000):
    store = start.with_name(f"killed-{last_call}")
    shutil.copytree(start, store)
    child = os.fork() or build(store, last_call)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
"""


@pytest.mark.parametrize("before", [0, 5])
def test_a_store_survives_a_kill_at_every_call(tmp_path: Path, images: Path, before: int) -> None:
    """Killed at any system call, the next build ends with the same store."""
    PixelStore.build(tmp_path / "s", images, NAMES[:before], 9)
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "s", images, *NAMES],
                         capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    stores = list(tmp_path.glob("killed-*"))
    assert len(stores) > 15
    for store in stores:
        check(PixelStore.build(store, images, NAMES, 9), images, NAMES)
        assert {path.name for path in store.iterdir()} == {
            "pixels_9.lock", "pixels_9.uint8", "pixels_9.jsonl"}


def test_short_writes_are_continued(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short writes are continued."""
    write = os.pwrite
    monkeypatch.setattr(src.data.pixel_store.os, "pwrite",
                        lambda file, data, offset: write(file, data[:50], offset))
    check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)


@pytest.mark.parametrize("name", [
    "a b.png", "it's \"one\".png", "фото.png", "line\nend.png", "u2028 \u2028.png", "x" * 240,
    "sub/folder/a.png",
])
def test_names_of_every_kind_are_kept(
    tmp_path: Path, images: Path, decoded: list[str], name: str
) -> None:
    """The journal distinguishes and finds any file name."""
    (images / name).parent.mkdir(parents=True, exist_ok=True)
    (images / "0.png").rename(images / name)
    for _ in range(2):
        check(PixelStore.build(tmp_path / "s", images, [name, "1.png"], 9), images, [name, "1.png"])
    assert len(decoded) == 2


def test_a_deleted_image_fails_and_others_stay(
    tmp_path: Path, images: Path, decoded: list[str]
) -> None:
    """A deleted file fails as missing; nothing else is decoded."""
    PixelStore.build(tmp_path / "s", images, NAMES[:9], 9)
    decoded.clear()
    (images / "3.png").unlink()
    store = PixelStore.build(tmp_path / "s", images, NAMES[:9], 9)
    assert decoded == ["3.png"] and list(store.failed) == ["3.png"]
    assert "No such file" in store.failed["3.png"]
    kept = [name for name in NAMES[:9] if name != "3.png"]
    check(PixelStore.build(tmp_path / "s", images, kept, 9), images, kept)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path, images: Path) -> None:
    """A file in the place of the folder is a user error."""
    (tmp_path / "s").write_text("in the way")
    with pytest.raises(UserError, match="cannot keep decoded pixels"):
        PixelStore.build(tmp_path / "s", images, NAMES, 9)


def test_the_store_is_a_little_larger_than_the_input() -> None:
    """The store has a margin for random crops of at most a tenth."""
    for size in (32, 64, 128, 224, 600):
        assert size < store_size(size) <= 1.1 * size


def test_images_that_the_decoder_changes_are_decoded_again(
    tmp_path: Path, images: Path, decoded: list[str]
) -> None:
    """In a store of the first version only failures and images with a profile are decoded."""
    write_image(images / "0.png", noise(seed=0))
    with Image.open(images / "1.png") as image:
        image.save(images / "1.png", icc_profile=swapped_profile())
    PixelStore.build(tmp_path / "s", images, NAMES, 9)
    journal = tmp_path / "s" / "pixels_9.jsonl"
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    for entry in entries:
        del entry["decoder"]  # as the first version wrote it
    journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    decoded.clear()
    for _ in range(2):
        check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)
        assert sorted(decoded) == ["1.png", "bad.png"]


def test_a_failure_is_forgotten_when_the_reader_changes(
    tmp_path: Path, images: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of Pillow tries unreadable images once more, and no others."""
    PixelStore.build(tmp_path / "s", images, NAMES, 9)
    monkeypatch.setattr(src.data.pixel_store, "reader_version", lambda: "another")
    decoded.clear()
    for _ in range(2):
        check(PixelStore.build(tmp_path / "s", images, NAMES, 9), images, NAMES)
        assert decoded == ["bad.png"]


def test_links_to_outside_are_followed_if_asked(tmp_path: Path, images: Path) -> None:
    """With follow_links a folder of links to a blob store has the pixels of the blobs."""
    links = tmp_path / "links"
    links.mkdir()
    for name in NAMES:
        (links / name).symlink_to(images / name)
    assert PixelStore.build(tmp_path / "s", links, NAMES, 9).rows == {}
    check(PixelStore.build(tmp_path / "s", links, NAMES, 9, follow_links=True), images, NAMES)
