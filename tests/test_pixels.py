"""Decoding photos of every kind, and the store that keeps each decoded one."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import src.pixels
from src.errors import UserError
from src.pixels import PixelStore, load_image, load_square, store_size, write_image


def noise(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    """Write a PIL image."""
    image.save(path, **options)
    return path


def test_plain_picture_comes_as_it_is(tmp_path: Path) -> None:
    """A lossless RGB file gives its own pixels."""
    path = saved(tmp_path / "a.png", Image.fromarray(noise()))
    np.testing.assert_array_equal(np.asarray(load_image(path)), noise())


def test_grey_is_grey_in_all_channels(tmp_path: Path) -> None:
    """One channel is repeated three times."""
    path = saved(tmp_path / "a.png", Image.fromarray(noise()[:, :, 0]))
    np.testing.assert_array_equal(np.asarray(load_image(path)), noise()[:, :, :1].repeat(3, 2))


def test_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    """40,000 of 65,535 is a light grey; Pillow's own conversion would make it white."""
    path = saved(tmp_path / "a.png", Image.fromarray(np.full((4, 4), 40_000, np.uint16)))
    assert np.unique(np.asarray(load_image(path))).tolist() == [round(40_000 / 65_535 * 255)]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """The colour that hides under full transparency does not show."""
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    path = saved(tmp_path / "a.png", image.convert(mode))
    pixels = np.asarray(load_image(path))
    assert (pixels[:, 3] == 255).all() and (pixels[:, 0] == 0).all()


def test_cmyk_keeps_its_colour(tmp_path: Path) -> None:
    """A CMYK JPEG of red is red."""
    red = Image.new("RGB", (16, 16), (220, 20, 20)).convert("CMYK")
    pixels = np.asarray(load_image(saved(tmp_path / "a.jpg", red)))
    assert pixels[:, :, 0].min() > 190 and pixels[:, :, 1:].max() < 60


def test_rotated_by_exif_is_turned_upright(tmp_path: Path) -> None:
    """Orientation 6 (turn right by 90 degrees) puts the left edge on top."""
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 4, 8))
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.asarray(load_image(saved(tmp_path / "a.jpg", image, exif=exif, quality=95)))
    assert pixels.shape[:2] == (16, 8)
    assert pixels[:3].max() < 60 and pixels[6:].min() > 190


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    """Only what shows first counts."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(path))[0, 0].tolist() == [255, 0, 0]


def test_longest_bounds_both_sides(tmp_path: Path) -> None:
    """A large photo shrinks to the bound in proportion, a small one stays."""
    path = saved(tmp_path / "a.jpg", Image.fromarray(noise(300, 600)))
    assert load_image(path, longest=60).size == (60, 30)
    assert load_image(path, longest=6000).size == (600, 300)


def huge_png(path: Path, side: int = 30_000) -> Path:
    """A file of a few bytes that claims side x side pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    return path


def unreadable(folder: Path, kind: str) -> Path:
    """A file that is no photo."""
    path = folder / "bad.jpg"
    if kind == "huge":
        return huge_png(folder / "bad.png")
    if kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        buffer = io.BytesIO()
        Image.fromarray(noise(200, 200)).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue()[:3000])
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"no picture", "garbage": bytes(range(256)),
                          "jpeg start": b"\xff\xd8\xff\xe0\x00\x10JFIF"}[kind])
    return path


KINDS = ["huge", "folder", "truncated", "missing", "empty", "text", "garbage", "jpeg start"]


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_files_are_a_value_error(tmp_path: Path, kind: str) -> None:
    """Whatever is wrong with a file, it is one kind of error with a reason."""
    with pytest.raises(ValueError, match=r"\w"):
        load_image(unreadable(tmp_path, kind))


@pytest.mark.parametrize(("height", "width"), [(1, 50), (50, 1), (1, 1), (40, 40), (500, 30)])
def test_squares_hold_the_whole_photo(tmp_path: Path, height: int, width: int) -> None:
    """Any shape becomes a square; its four corners keep the photo's corner colours."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, :, 0], image[:, : width // 2, 1] = 255, 255
    square = load_square(saved(tmp_path / "a.png", Image.fromarray(image)), 24)
    assert square.shape == (24, 24, 3) and square.dtype == np.uint8
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        np.testing.assert_array_equal(square[y, x], image[y, x])


def test_written_pictures_come_back(tmp_path: Path) -> None:
    """write_image and load_image are inverse for a lossless format, close for JPEG."""
    write_image(tmp_path / "a.png", noise())
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), noise())
    write_image(tmp_path / "a.jpg", Image.new("RGB", (8, 8), (10, 200, 30)))
    assert np.abs(np.asarray(load_image(tmp_path / "a.jpg")) - [10.0, 200, 30]).max() < 6


# The store


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
        return load_square(path, size)

    monkeypatch.setattr(src.pixels, "load_square", counted)
    return names


def check(store: PixelStore, photos: Path, names: list[str], size: int = 9) -> None:
    """Every readable photo's row is what decoding it gives; every other one is in failed."""
    good = [name for name in names if name != "bad.png"]
    assert sorted(store.rows) == sorted(good) and len(set(store.rows.values())) == len(good)
    assert list(store.failed) == [name for name in names if name == "bad.png"]
    for name in good:
        np.testing.assert_array_equal(store.pixels[store.rows[name]],
                                      load_square(photos / name, size))


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
    monkeypatch.setattr(src.pixels, "CHUNK", 3)
    names: list[str] = []

    def stops(path: Path, size: int) -> np.ndarray:
        names.append(path.name)
        if path.name == "7.png" and names.count("7.png") == 1:
            raise KeyboardInterrupt
        return load_square(path, size)

    monkeypatch.setattr(src.pixels, "load_square", stops)
    with pytest.raises(KeyboardInterrupt):
        PixelStore.build(tmp_path / "s", photos, NAMES, 9, workers=1)
    names.clear()
    names.append("7.png")
    check(PixelStore.build(tmp_path / "s", photos, NAMES, 9, workers=1), photos, NAMES)
    assert set(names) == set(NAMES[6:])


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
    monkeypatch.setattr(src.pixels.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="--cache-dir"):
        PixelStore.build(tmp_path / "s", photos, NAMES, 9)
    assert "11 photos" in capsys.readouterr().out
    assert not (tmp_path / "s" / "pixels_9.uint8").exists()


def test_a_folder_that_cannot_be_is_told(tmp_path: Path, photos: Path) -> None:
    """A file where the store should lie is the user's to mend."""
    (tmp_path / "s").write_text("in the way")
    with pytest.raises(UserError, match="cannot keep decoded pixels"):
        PixelStore.build(tmp_path / "s", photos, NAMES, 9)


def test_the_store_is_a_little_larger_than_the_input() -> None:
    """There is room for a random crop, at most a tenth."""
    for size in (32, 64, 128, 224, 600):
        assert size < store_size(size) <= 1.1 * size
