"""The store that keeps each decoded photo: once, whole, and whatever happens to the machine."""

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


def noise(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture()
def photos(tmp_path: Path) -> Path:
    """Ten photos and one file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        write_image(folder / f"{i}.png", noise(seed=i))
    (folder / "bad.png").write_text("not a picture")
    return folder


NAMES = [f"{i}.png" for i in range(10)] + ["bad.png"]


@pytest.fixture()
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded, in order."""
    names: list[str] = []

    def counted(path: Path, size: int) -> np.ndarray:
        names.append(path.name)
        return load_resized(path, size)

    monkeypatch.setattr(src.data.pixel_store, "load_resized", counted)
    return names


def check(store: PixelStore, photos: Path, names: list[str], size: int = 9) -> None:
    """Every readable photo's row is what decoding it gives; every other one is in failed."""
    good = [name for name in names if name != "bad.png"]
    assert sorted(store.rows) == sorted(good) and len(set(store.rows.values())) == len(good)
    assert list(store.failed) == [name for name in names if name == "bad.png"]
    for name in good:
        np.testing.assert_array_equal(store.pixels[store.rows[name]],
                                      load_resized(photos / name, size))


def test_store_holds_every_photo_decoded_once(
    tmp_path: Path, photos: Path, decoded: list[str]
) -> None:
    """Rows are the decoded squares; a second build, and one of a part, decode nothing."""
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9), photos, NAMES)
    assert sorted(decoded) == sorted(NAMES)
    check(PixelStore.build(tmp_path / "s", photos, NAMES[::-1], 9), photos, NAMES[::-1])
    check(PixelStore.build(tmp_path / "s", photos, NAMES[:3], 9), photos, NAMES[:3])
    assert len(decoded) == len(NAMES)


def test_changed_and_new_photos_are_decoded(
    tmp_path: Path, photos: Path, decoded: list[str]
) -> None:
    """Only what is new or has changed is read again, a mended file among it."""
    PixelStore.build(tmp_path / "s", photos, NAMES[:9], 9)
    decoded.clear()
    write_image(photos / "3.png", noise(20, 20, seed=99))
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9), photos, NAMES)
    assert sorted(decoded) == ["3.png", "9.png", "bad.png"]
    decoded.clear()
    write_image(photos / "bad.png", noise(seed=5))
    assert PixelStore.build(tmp_path / "s", photos, NAMES, 9).failed == {}
    assert decoded == ["bad.png"]


def test_an_interrupted_build_goes_on(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after some chunks, the next build decodes the rest and ends with the same rows."""
    monkeypatch.setattr(src.data.pixel_store, "CHUNK", 3)
    names: list[str] = []

    def stops(path: Path, size: int) -> np.ndarray:
        names.append(path.name)
        if path.name == "7.png" and names.count("7.png") == 1:
            raise KeyboardInterrupt
        return load_resized(path, size)

    monkeypatch.setattr(src.data.pixel_store, "load_resized", stops)
    with pytest.raises(KeyboardInterrupt):
        PixelStore.build(tmp_path / "s", photos, NAMES, 9, workers=1)
    names.clear()
    names.append("7.png")
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9, workers=1), photos, NAMES)
    assert set(names) == set(NAMES[6:])


@pytest.mark.parametrize("lost", [0, 9 * 9 * 3 * 2])
def test_a_store_that_lost_its_pixels_gives_no_wrong_ones(
    tmp_path: Path, photos: Path, lost: int
) -> None:
    """The data file deleted or cut, then filled again by a part of the photos: old lines of the
    journal must not take the new rows for theirs."""
    PixelStore.build(tmp_path / "s", photos, NAMES, 9)
    os.truncate(tmp_path / "s" / "pixels_9.uint8", lost)
    check(PixelStore.build(tmp_path / "s", photos, NAMES[5:], 9), photos, NAMES[5:])
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9), photos, NAMES)


def test_a_photo_that_changed_is_not_believed_half_decoded(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between the new pixels and their journal line, and the old photo put back: its row
    holds the other pixels, and is decoded again."""
    path, store = photos / "3.png", tmp_path / "s"
    PixelStore.build(store, photos, NAMES, 9)
    old, times = path.read_bytes(), path.stat()
    write_image(path, noise(seed=99))
    write, written = os.pwrite, []

    def stop_after_pixels(_: int) -> None:
        if written:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(src.data.pixel_store.os, "pwrite", lambda *args: written.append(1) or write(*args))
        patch.setattr(src.data.pixel_store.os, "fsync", stop_after_pixels)
        PixelStore.build(store, photos, NAMES, 9)
    path.write_bytes(old)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    check(PixelStore.build(store, photos, NAMES, 9), photos, NAMES)


def test_the_journal_vouches_only_for_pixels_on_the_disk(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power may go at any moment: no line is in the journal before its pixels are flushed."""
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
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9), photos, NAMES)
    assert flushed[0] == 0 and flushed[-1] == 11 and len(flushed) == 5


@pytest.mark.parametrize("line", [
    "", "null", "3", "[]", "{}", '{"name": "0.png"}', '{"name": "0.png", "row": 1}',
    '{"name": "0.png", "row": "1", "signature": [], "error": ""}', '{"name": "0.png", "row": 0, "s',
    '{"name": "0.png", "row": -1, "signature": [0, 0], "error": ""}', "\x00\x00", "\ufffd",
    '{"name": ["0.png"], "row": 1, "signature": [], "error": ""}',
    '{"name": "0.png", "row": 99, "signature": [], "error": ""}',
])
def test_a_damaged_journal_line_does_no_harm(tmp_path: Path, photos: Path, line: str) -> None:
    """Whatever a power cut left in the journal, the store is whole."""
    PixelStore.build(tmp_path / "s", photos, NAMES, 9)
    with open(tmp_path / "s" / "pixels_9.jsonl", "a", encoding="utf-8") as file:
        file.write(line)
    for names in (NAMES[:4], NAMES):
        check(PixelStore.build(tmp_path / "s", photos, names, 9), photos, names)


@pytest.mark.parametrize("cut", [2, 40, 200])
def test_a_half_written_journal_costs_only_its_last_lines(
    tmp_path: Path, photos: Path, decoded: list[str], cut: int
) -> None:
    """Lines that were cut off are decoded again and the store is whole."""
    PixelStore.build(tmp_path / "s", photos, NAMES, 9)
    journal = tmp_path / "s" / "pixels_9.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    decoded.clear()
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9), photos, NAMES)
    assert 1 <= len(decoded) <= 4
    for line in filter(None, journal.read_text().split("\n")[-len(decoded) - 1:]):
        json.loads(line)


def test_rows_that_the_data_file_lost_are_decoded_again(
    tmp_path: Path, photos: Path, decoded: list[str]
) -> None:
    """A data file shorter than the journal says is not believed."""
    PixelStore.build(tmp_path / "s", photos, NAMES, 9)
    data = tmp_path / "s" / "pixels_9.uint8"
    data.write_bytes(data.read_bytes()[: 9 * 9 * 3 * 4 + 10])
    decoded.clear()
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9), photos, NAMES)
    assert len(decoded) == len(NAMES) - 4


def test_disk_use_is_told_and_too_little_refused(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The size stands on the screen beforehand; without the room nothing is written."""
    monkeypatch.setattr(src.data.pixel_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="--cache-dir"):
        PixelStore.build(tmp_path / "s", photos, NAMES, 9)
    assert "11 photos" in capsys.readouterr().out
    assert not (tmp_path / "s" / "pixels_9.uint8").exists()


def test_a_disk_that_fills_up_costs_nothing_that_was_done(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails is the user's to mend, and the next build goes on to the same end."""
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    PixelStore.build(tmp_path / "s", photos, NAMES[:4], 9)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(src.data.pixel_store.os, "pwrite", full)
        PixelStore.build(tmp_path / "s", photos, NAMES, 9)
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9), photos, NAMES)


def test_a_full_disk_costs_nothing_that_was_done(
    tmp_path: Path, photos: Path, small_disk: Path, decoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same on a real disk that is full: the bytes needed are told, earlier rows are whole, and
    with the room the next build goes on to the end."""
    PixelStore.build(small_disk / "s", photos, NAMES[:4], 200)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="1,320,000 b.*No space"):
        patch.setattr(src.data.pixel_store.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
        PixelStore.build(small_disk / "s", photos, NAMES, 200)
    with pytest.raises(UserError, match=r"need [\d,]+ bytes more"):  # told beforehand
        PixelStore.build(small_disk / "s", photos, NAMES, 200)
    decoded.clear()
    check(PixelStore.build(small_disk / "s", photos, NAMES[:4], 200), photos, NAMES[:4], 200)
    assert decoded == []
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    check(PixelStore.build(small_disk / "s", photos, NAMES, 200), photos, NAMES, 200)


def test_a_read_only_folder_is_told(photos: Path, small_disk: Path) -> None:
    """Where nothing can be written, the message says how to choose another place."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="Read-only.*--cache-dir"):
        PixelStore.build(small_disk / "s", photos, NAMES, 9)


def test_a_failing_disk_is_not_remembered(
    tmp_path: Path, photos: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A photo that the disk did not give is failed this time and tried again the next; what is no
    picture is not tried again until it changes."""
    opens = Image.open

    def fails(path: Path, *args: object) -> Image.Image:
        if path.name in ("2.png", "9.png"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opens(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fails)
        for _ in range(2):
            store = PixelStore.build(tmp_path / "s", photos, NAMES, 9)
            assert list(store.failed) == ["2.png", "9.png", "bad.png"]
            assert store.failed["9.png"] == os.strerror(errno.EIO)
            good = [name for name in NAMES[:10] if name not in store.failed]
            assert sorted(store.rows) == good
    decoded.clear()
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9), photos, NAMES)
    assert sorted(decoded) == ["2.png", "9.png"]


def test_a_folder_named_as_a_photo_is_failed(tmp_path: Path, photos: Path) -> None:
    """It is named with a reason, and the rest is whole."""
    (photos / "folder.png").mkdir()
    store = PixelStore.build(tmp_path / "s", photos, [*NAMES, "folder.png"], 9)
    assert store.failed["folder.png"] == os.strerror(errno.EISDIR) and len(store.rows) == 10


def test_links_out_of_the_folder_are_failed(
    tmp_path: Path, photos: Path, decoded: list[str]
) -> None:
    """They are named, and hold no other file's pixels; a link within the folder is a photo."""
    (tmp_path / "private.png").write_bytes((photos / "1.png").read_bytes())
    (photos / "0.png").unlink()
    (photos / "0.png").symlink_to(tmp_path / "private.png")
    (photos / "2.png").unlink()
    (photos / "2.png").symlink_to("3.png")
    for _ in range(2):
        store = PixelStore.build(tmp_path / "s", photos, NAMES[:10], 9)
        assert list(store.failed) == ["0.png"] and "link" in store.failed["0.png"]
        assert "0.png" not in decoded and sorted(store.rows) == NAMES[1:10]
        for name in store.rows:
            np.testing.assert_array_equal(store.pixels[store.rows[name]],
                                          load_resized(photos / name, 9))
    (photos / "0.png").unlink()
    write_image(photos / "0.png", noise(seed=7))
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9), photos, NAMES)


@pytest.mark.parametrize("name", ["pixels_9.uint8", "pixels_9.lock", ".pixels_9.jsonl.tmp"])
def test_nothing_is_written_through_a_link(tmp_path: Path, photos: Path, name: str) -> None:
    """The store lies beside the photos, so a stranger's archive may bring such a link along."""
    (tmp_path / "private").write_text("mine")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / name).symlink_to(tmp_path / "private")
    with pytest.raises(UserError):
        PixelStore.build(tmp_path / "s", photos, NAMES, 9)
    assert (tmp_path / "private").read_text() == "mine"


def test_a_second_build_waits_and_says_so(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one run decodes, another waits for it, tells, and then has nothing left to do."""
    waiting = threading.Event()
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(
        write=lambda text: waiting.set() if "another run is decoding" in text else None,
        flush=lambda: None))
    with ThreadPoolExecutor(1) as pool:
        with exclusive_lock(tmp_path / "s" / "pixels_9.lock"):
            second = pool.submit(PixelStore.build, tmp_path / "s", photos, NAMES, 9)
            assert waiting.wait(60) and not second.done()
            assert not (tmp_path / "s" / "pixels_9.uint8").exists()
        check(second.result(60), photos, NAMES)


# Run by a process of its own, which forks: the k-th child goes on with a copy of the store and ends
# itself by SIGKILL at its k-th call of the system, until one gets to the end.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import src.data.pixel_store
src.data.pixel_store.CHUNK = 3
start, photos, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]

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
    src.data.pixel_store.PixelStore.build(store, photos, names, 9)
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
def test_a_store_survives_a_kill_at_every_call(tmp_path: Path, photos: Path, before: int) -> None:
    """Killed at the first, the second, ... call of the system, a new store and one with photos in
    it go on to the same end, and nothing else is left in the folder."""
    PixelStore.build(tmp_path / "s", photos, NAMES[:before], 9)
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "s", photos, *NAMES],
                         capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    stores = list(tmp_path.glob("killed-*"))
    assert len(stores) > 15
    for store in stores:
        check(PixelStore.build(store, photos, NAMES, 9), photos, NAMES)
        assert {path.name for path in store.iterdir()} == {
            "pixels_9.lock", "pixels_9.uint8", "pixels_9.jsonl"}


def test_rows_written_in_pieces_are_whole(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may take fewer bytes at once than it is given."""
    write = os.pwrite
    monkeypatch.setattr(src.data.pixel_store.os, "pwrite",
                        lambda file, data, offset: write(file, data[:50], offset))
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9), photos, NAMES)


@pytest.mark.parametrize("name", [
    "a b.png", "it's \"one\".png", "фото.png", "line\nend.png", "u2028 \u2028.png", "x" * 240,
    "sub/folder/a.png",
])
def test_names_of_every_kind_are_kept(
    tmp_path: Path, photos: Path, decoded: list[str], name: str
) -> None:
    """The journal tells apart and finds again whatever a file may be called."""
    (photos / name).parent.mkdir(parents=True, exist_ok=True)
    (photos / "0.png").rename(photos / name)
    for _ in range(2):
        check(PixelStore.build(tmp_path / "s", photos, [name, "1.png"], 9), photos, [name, "1.png"])
    assert len(decoded) == 2


def test_a_lost_photo_is_failed_and_others_stay(
    tmp_path: Path, photos: Path, decoded: list[str]
) -> None:
    """A file deleted after a build is told as missing; nothing else is decoded."""
    PixelStore.build(tmp_path / "s", photos, NAMES[:9], 9)
    decoded.clear()
    (photos / "3.png").unlink()
    store = PixelStore.build(tmp_path / "s", photos, NAMES[:9], 9)
    assert decoded == ["3.png"] and list(store.failed) == ["3.png"]
    assert "No such file" in store.failed["3.png"]
    kept = [name for name in NAMES[:9] if name != "3.png"]
    check(PixelStore.build(tmp_path / "s", photos, kept, 9), photos, kept)


def test_a_folder_that_cannot_be_is_told(tmp_path: Path, photos: Path) -> None:
    """A file where the store should lie is the user's to mend."""
    (tmp_path / "s").write_text("in the way")
    with pytest.raises(UserError, match="cannot keep decoded pixels"):
        PixelStore.build(tmp_path / "s", photos, NAMES, 9)


def test_the_store_is_a_little_larger_than_the_input() -> None:
    """There is room for a random crop, at most a tenth."""
    for size in (32, 64, 128, 224, 600):
        assert size < store_size(size) <= 1.1 * size
