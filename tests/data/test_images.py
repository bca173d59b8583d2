"""Decode images of every kind, and refuse files that are not images."""

from __future__ import annotations

import errno
import io
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

import src.data.images
from src.data.images import ReadError, find_escaping_links, load_image, load_resized, write_image
from tests.stress.bad_input import (
    BLUE,
    GREEN,
    RED,
    flat_jpeg,
    huge_jpeg,
    huge_png,
    make_profile,
    png_chunk,
    swapped_profile,
)


def noise(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """Return (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    """Write a PIL image and return its path."""
    image.save(path, **options)
    return path


def test_lossless_rgb_is_unchanged(tmp_path: Path) -> None:
    """A lossless RGB file gives its own pixels."""
    path = saved(tmp_path / "a.png", Image.fromarray(noise()))
    np.testing.assert_array_equal(np.asarray(load_image(path)), noise())


def test_gray_has_three_equal_channels(tmp_path: Path) -> None:
    """A gray image has three equal channels."""
    path = saved(tmp_path / "a.png", Image.fromarray(noise()[:, :, 0]))
    np.testing.assert_array_equal(np.asarray(load_image(path)), noise()[:, :, :1].repeat(3, 2))


def test_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    """40,000 of 65,535 is a light gray; Pillow's conversion would make it white."""
    path = saved(tmp_path / "a.png", Image.fromarray(np.full((4, 4), 40_000, np.uint16)))
    assert np.unique(np.asarray(load_image(path))).tolist() == [round(40_000 / 65_535 * 255)]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(tmp_path: Path, mode: str) -> None:
    """A color under full transparency does not show."""
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    path = saved(tmp_path / "a.png", image.convert(mode))
    pixels = np.asarray(load_image(path))
    assert (pixels[:, 3] == 255).all() and (pixels[:, 0] == 0).all()


def test_cmyk_keeps_its_color(tmp_path: Path) -> None:
    """A CMYK JPEG of red is red."""
    red = Image.new("RGB", (16, 16), (220, 20, 20)).convert("CMYK")
    pixels = np.asarray(load_image(saved(tmp_path / "a.jpg", red)))
    assert pixels[:, :, 0].min() > 190 and pixels[:, :, 1:].max() < 60


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    """Orientation 6 (turn right by 90 degrees) puts the left edge on top."""
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 4, 8))
    exif = Image.Exif()
    exif[274] = 6
    pixels = np.asarray(load_image(saved(tmp_path / "a.jpg", image, exif=exif, quality=95)))
    assert pixels.shape[:2] == (16, 8)
    assert pixels[:3].max() < 60 and pixels[6:].min() > 190


def exif_with(orientation: int) -> Image.Exif:
    """Return EXIF data with an orientation among other tags."""
    exif = Image.Exif()
    exif[274], exif[0x010E], exif[0x011A] = orientation, "a description", 72.0
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return exif


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_every_orientation_is_applied(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    """Every orientation, valid or not, gives the result of Pillow's exif_transpose."""
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise()), exif=exif_with(orientation))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(path)), expected)
    assert expected.shape[0] == (16 if orientation in (5, 6, 7, 8) else 12)


@pytest.mark.filterwarnings("ignore")  # Pillow's warnings about the tags
def test_corrupt_exif_is_ignored(tmp_path: Path) -> None:
    """An intact image with corrupt EXIF data is read, in some orientation."""
    whole, chance, path = exif_with(6).tobytes(), random.Random(0), tmp_path / "a.png"
    turned = {np.rot90(m, k).tobytes() for k in range(4) for m in (noise(), noise()[:, ::-1])}
    for _ in range(150):
        exif = bytearray(whole)
        for _ in range(chance.choice([1, 3, 6])):
            exif[chance.randrange(len(exif))] = chance.choice([0, 1, 2, 5, 7, 12, 255])
        saved(path, Image.fromarray(noise()), exif=bytes(exif))
        assert np.asarray(load_image(path)).tobytes() in turned


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_of_every_format(tmp_path: Path, suffix: str) -> None:
    """The full range of 16 bits is the full range of 8."""
    gray = np.linspace(0, 65_535, 48).astype(np.uint16).reshape(6, 8)
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(gray))
    expected = (gray.astype(np.float64) / 257).round()
    np.testing.assert_allclose(np.asarray(load_image(path))[:, :, 0], expected, atol=1)


def test_floats_are_scaled(tmp_path: Path) -> None:
    """A float image spans black to white; NaN, infinity and negative values do not affect it."""
    gray = np.array([[0, 50, 100], [np.nan, -5, 25]], np.float32)
    path = saved(tmp_path / "a.tif", Image.fromarray(gray))
    assert np.asarray(load_image(path))[:, :, 1].tolist() == [[0, 128, 255], [0, 0, 64]]
    saved(path, Image.fromarray(np.full((2, 2), np.inf, np.float32)))
    assert np.asarray(load_image(path)).tolist() == [[[255] * 3] * 2] * 2


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    """Only the first frame is used."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(path))[0, 0].tolist() == [255, 0, 0]


def test_longest_bounds_both_sides(tmp_path: Path) -> None:
    """A large image shrinks to the bound with its aspect ratio; a small one is unchanged."""
    path = saved(tmp_path / "a.jpg", Image.fromarray(noise(300, 600)))
    assert load_image(path, longest=60).size == (60, 30)
    assert load_image(path, longest=6000).size == (600, 300)


# ---- Colors --------------------------------------------------------------------------------------

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"


def expected_srgb(pixels: np.ndarray, primaries: tuple, gamma: float) -> np.ndarray:
    """Convert (..., 3) uint8 by matrices and curves in float64; the reference implementation."""
    xyz = (pixels / 255) ** gamma @ np.array(primaries)
    linear = (xyz @ np.linalg.inv(np.array([RED, GREEN, BLUE]))).clip(0, 1)
    return 255 * np.where(linear < 0.0031308, 12.92 * linear,
                          1.055 * linear ** (1 / 2.4) - 0.055)


ADOBE = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))
PROPHOTO = ((0.7977, 0.2880, 0.0), (0.1352, 0.7119, 0.0), (0.0313, 0.0001, 0.8249))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize(("primaries", "gamma"), [
    ((GREEN, RED, BLUE), 2.2), (ADOBE, 2.2), (PROPHOTO, 1.8), ((RED, GREEN, BLUE), 1.0)])
def test_profiles_are_converted_to_srgb(
    tmp_path: Path, suffix: str, primaries: tuple, gamma: float
) -> None:
    """Pixels with an ICC profile become those of sRGB, in every format that carries profiles."""
    levels = np.array([[0, 90, 180, 255], [30, 60, 120, 240]], np.uint8)
    pixels = np.stack(np.meshgrid(*levels[[0, 1, 0]]), -1).reshape(8, 8, 3).repeat(16, 0)
    pixels = pixels.repeat(16, 1)
    options = {"png": {}, "tif": {}, "webp": {"lossless": True},
               "jpg": {"quality": 100, "subsampling": 0}}[suffix]
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(pixels),
                 icc_profile=make_profile(primaries, gamma), **options)
    found = np.asarray(load_image(path))[8::16, 8::16].astype(float)
    error = abs(found - expected_srgb(pixels[8::16, 8::16], primaries, gamma))
    # A low gamma amplifies JPEG's rounding of dark colors.
    assert error.max() < ((40 if gamma == 1 else 12) if suffix == "jpg" else 3)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA"])
def test_profiles_of_every_mode(tmp_path: Path, mode: str) -> None:
    """Gray, palette and transparent images are converted, too; transparency stays white."""
    image = Image.new("RGBA", (4, 4), (0, 160, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    gray = mode in ("L", "LA", "1")
    profile = make_profile((), 1.0, b"GRAY") if gray else swapped_profile()
    path = saved(tmp_path / "a.png", image.convert(mode), icc_profile=profile)
    value = int(np.asarray(image.convert(mode).convert("L"))[0, 3])
    right = np.asarray(load_image(path))[0, 3].tolist()
    expected = [round(255 * (1.055 * (value / 255) ** (1 / 2.4) - 0.055)) if value else 0] * 3
    assert np.allclose(right, expected if gray else [160, 0, 0], atol=2)
    if mode in ("LA", "RGBA"):
        assert (np.asarray(load_image(path))[:, 0] == 255).all()


@pytest.mark.parametrize("profile", [
    b"", b"not a profile", swapped_profile()[:200], bytes(128) + swapped_profile()[128:],
    make_profile((), 1.0, b"GRAY"), swapped_profile()[:16] + b"CMYK" + swapped_profile()[20:],
    swapped_profile()[:16] + b"Lab " + swapped_profile()[20:],
])
def test_an_unusable_profile_is_ignored(tmp_path: Path, profile: bytes) -> None:
    """A broken profile, and one for other channels, leave the pixels as they are."""
    path = saved(tmp_path / "a.png", Image.fromarray(noise()), icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(load_image(path)), noise())


def test_an_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    """With a profile that is sRGB up to rounding the pixels are those of the file."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path / "a.png", Image.fromarray(noise()), icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(load_image(path)), noise())


def write_png(path: Path, depth: int, pixels: np.ndarray, key: bytes) -> None:
    """Write a gray (H, W) or RGB (H, W, 3) PNG of any bit depth with a tRNS chunk."""
    height, width = pixels.shape[:2]
    if depth == 16:
        rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        bits = np.unpackbits(pixels.astype(np.uint8).reshape(height, -1, 1), axis=2)[..., -depth:]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, depth, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"tRNS", key)
                     + png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b""))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_color_keys_of_every_bit_depth(tmp_path: Path, depth: int, channels: int) -> None:
    """Exactly the pixels of the key's color are white, at the full depth of the file."""
    if channels == 3 and depth < 8:
        pytest.skip("PNG has no such images")
    rng, most = np.random.default_rng(depth), 2**depth - 1
    few = rng.integers(0, most + 1, 5)
    few[1] = few[0] ^ 1  # at 16 bits: the same high byte
    pixels = rng.choice(few, (9, 11, 3) if channels == 3 else (9, 11))
    key = pixels[4, 5]
    write_png(tmp_path / "a.png", depth, pixels, struct.pack(f">{channels}H", *np.atleast_1d(key)))
    found = np.asarray(load_image(tmp_path / "a.png")).astype(float)
    hidden = (pixels == key).reshape(9, 11, -1).all(-1)
    assert hidden.any() and (found[hidden] == 255).all()
    shown = (pixels / most * 255).reshape(9, 11, -1)[~hidden]
    assert abs(found[~hidden] - shown).max() <= 1


def test_a_gif_frame_smaller_than_its_canvas(tmp_path: Path) -> None:
    """What the first frame does not cover is white."""
    buffer = io.BytesIO()
    Image.new("P", (4, 3), 0).save(buffer, "GIF")
    content = bytearray(buffer.getvalue())
    content[6:10] = struct.pack("<HH", 10, 8)  # the canvas
    start = content.index(b"\x2c", 13 + 3 * 2 ** (1 + (content[10] & 7)))
    content[start + 1 : start + 5] = struct.pack("<HH", 5, 2)  # the place of the frame
    (tmp_path / "a.gif").write_bytes(content)
    pixels = np.asarray(load_image(tmp_path / "a.gif"))
    inside = np.zeros((8, 10), bool)
    inside[2:5, 5:9] = True
    assert (pixels[~inside] == 255).all() and (pixels[inside] == 0).all()


def test_the_profile_of_a_bmp_is_converted(tmp_path: Path) -> None:
    """A BMP of version 5 has its ICC profile after the pixels."""
    pixels, profile = noise(), make_profile((GREEN, RED, BLUE), 2.2)
    rows = pixels[::-1, :, ::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 124, 16, 12, 1, 24, 0, len(rows), 0, 0, 0, 0)
    header += bytes(16) + b"DEBM" + bytes(52) + struct.pack("<II", 124 + len(rows), len(profile))
    content = header.ljust(124, b"\0") + rows + profile
    path = tmp_path / "a.bmp"
    path.write_bytes(b"BM" + struct.pack("<IHHI", 14 + len(content), 0, 0, 14 + 124) + content)
    found = np.asarray(load_image(path)).astype(float)
    assert abs(found - expected_srgb(pixels, (GREEN, RED, BLUE), 2.2)).max() < 3
    path.write_bytes(path.read_bytes()[: -len(profile)])  # without its profile
    np.testing.assert_array_equal(np.asarray(load_image(path)), pixels)


@pytest.mark.parametrize("order", [None, (0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("columns", [(0, 1, 2), (1, 2, 0)])
def test_the_palette_of_jpeg_2000(
    tmp_path: Path, columns: tuple[int, ...], order: tuple[int, ...] | None
) -> None:
    """Palettes may repeat colors and give their channels in any order.

    `columns` are those of the palette that make up the channels, `order` is the color of each.
    """
    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    palette = np.random.default_rng(1).integers(0, 256, (256, 3), np.uint8)
    palette[[1, 7, 100]] = palette[0]
    index = np.arange(256, dtype=np.uint8).reshape(16, 16)
    stream = io.BytesIO()
    Image.fromarray(index).save(stream, "JPEG2000", no_jp2=True)
    header = box(b"ihdr", struct.pack(">IIHBBBB", 16, 16, 1, 7, 7, 0, 0))
    header += box(b"colr", struct.pack(">BBBI", 1, 0, 0, 16))
    header += box(b"pclr", struct.pack(">HB3B", 256, 3, 7, 7, 7) + palette.tobytes())
    header += box(b"cmap", b"".join(struct.pack(">HBB", 0, 1, column) for column in columns))
    if order:
        header += box(b"cdef", struct.pack(">H", 3) + b"".join(
            struct.pack(">3H", channel, 0, 1 + color) for channel, color in enumerate(order)))
    path = tmp_path / "a.jp2"
    path.write_bytes(box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
                     + box(b"jp2h", header) + box(b"jp2c", stream.getvalue()))
    expected = np.zeros((256, 3), np.uint8)
    for channel, color in enumerate(order or range(3)):
        expected[:, color] = palette[:, columns[channel]]
    np.testing.assert_array_equal(np.asarray(load_image(path)), expected[index])
    cut = path.read_bytes().replace(b"cmap", b"free")  # a damaged header is not an error
    path.write_bytes(cut)
    assert load_image(path).size == (16, 16)


@pytest.mark.skipif(not CASES.exists(), reason="the cases are not there")
@pytest.mark.parametrize(("name", "place", "color"), [
    ("search-02/red_square_swapped_primaries.png", (32, 32), (255, 0, 0)),
    ("search-02/red_square_swapped_primaries.jpg", (32, 32), (255, 0, 0)),
    ("search-02/red_square_swapped_primaries.png", (0, 0), (255, 255, 255)),
    *((f"search-03/{kind}_trns.png", (0, 0), (255, 255, 255))
      for kind in ("grey2", "grey4", "grey16", "rgb16")),
])
def test_cases_of_colors(name: str, place: tuple[int, int], color: tuple[int, int, int]) -> None:
    """The cases search-02 and search-03 have the colors that browsers show."""
    assert np.allclose(np.asarray(load_image(CASES / name))[place], color, atol=2)


# ---- Files that cannot be read -------------------------------------------------------------------


def unreadable(folder: Path, kind: str) -> Path:
    """Write a file that is not an image."""
    path = folder / "bad.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        buffer = io.BytesIO()
        Image.fromarray(noise(200, 200)).save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue()[:3000])
    elif kind != "missing":
        path.write_bytes({"huge": huge_png(), "empty": b"", "text": b"not an image",
                          "garbage": bytes(range(256)),
                          "jpeg start": b"\xff\xd8\xff\xe0\x00\x10JFIF"}[kind])
    return path


KINDS = ["huge", "folder", "truncated", "missing", "empty", "text", "garbage", "jpeg start"]


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_files_are_a_value_error(tmp_path: Path, kind: str) -> None:
    """Whatever is wrong with a file, it is a ValueError with a reason."""
    with pytest.raises(ValueError, match=r"\w"):
        load_image(unreadable(tmp_path, kind))


@pytest.mark.parametrize("longest", [None, 50])
@pytest.mark.parametrize("huge", [huge_png, huge_jpeg])
def test_huge_images_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, huge: Callable[[], bytes], longest: int | None
) -> None:
    """30,000 x 30,000 pixels are refused before memory is allocated."""
    (tmp_path / "a").write_bytes(huge())
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="30000x30000 pixels are too many"):
        load_image(tmp_path / "a", longest)


def test_a_jpeg_of_30000_pixels_needs_little_memory(tmp_path: Path) -> None:
    """The JPEG decoder skips detail: 0.1 GB instead of 2.7."""
    path = tmp_path / "a.jpg"
    path.write_bytes(flat_jpeg(30_000))
    script = ("import resource, sys; from pathlib import Path\n"
              "from src.data.images import load_resized\n"
              "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
              "assert (load_resized(Path(sys.argv[1]), 240) == 128).all()\n"
              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    run = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True,
                         cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) * (1 if sys.platform == "darwin" else 1024) < 300e6


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one thread holds a large image; small ones are not delayed."""
    monkeypatch.setattr(src.data.images, "LARGE_PIXELS", 100)
    large = saved(tmp_path / "large.png", Image.fromarray(noise(20, 20)))
    small = saved(tmp_path / "small.png", Image.fromarray(noise(5, 5)))
    load, held = ImageFile.ImageFile.load, []

    def watched(image: ImageFile.ImageFile) -> object:
        held.append((image.size, src.data.images.LARGE.locked()))
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    for path in (large, small):
        load_image(path)
    assert (((20, 20), True) in held and ((5, 5), False) in held
            and ((20, 20), False) not in held and ((5, 5), True) not in held)
    assert not src.data.images.LARGE.locked()


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_read_errors_are_distinguished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Errors that may not occur again are a ReadError; broken files are not."""
    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    path = saved(tmp_path / "a.png", Image.fromarray(noise()))
    with monkeypatch.context() as patch, pytest.raises(ReadError, match=os.strerror(code)):
        patch.setattr(src.data.images.Image, "open", fails)
        load_image(path)
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        with pytest.raises(ValueError) as raised:
            load_image(unreadable(tmp_path / kind, kind))
        assert (raised.type is ReadError) == (kind in ("folder", "missing"))


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start Ghostscript for it."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="program"):
        load_image(path)


def test_escaping_links_are_found(tmp_path: Path) -> None:
    """A link to outside, direct or by a folder, is found; links within the folder are not."""
    inside, outside = tmp_path / "images", tmp_path / "images private"
    (inside / "sub").mkdir(parents=True)
    (outside / "sub").mkdir(parents=True)
    for folder in (inside, outside):
        saved(folder / "a.png", Image.fromarray(noise()))
        saved(folder / "sub" / "b.png", Image.fromarray(noise()))
    (inside / "out.png").symlink_to(outside / "a.png")
    (inside / "up.png").symlink_to("../images private/a.png")
    (inside / "twice.png").symlink_to("out.png")
    (inside / "linked").symlink_to(outside / "sub")
    (inside / "gone.png").symlink_to(outside / "nothing.png")
    (inside / "own.png").symlink_to("sub/b.png")
    (inside / "own").symlink_to(inside / "sub")
    (inside / "circle.png").symlink_to("circle.png")
    bad = ["out.png", "up.png", "twice.png", "linked/b.png", "gone.png"]
    good = ["a.png", "sub/b.png", "own.png", "own/b.png", "circle.png", "none.png", "x" * 300]
    assert find_escaping_links(inside, [*bad, *good]) == set(bad)
    (tmp_path / "link").symlink_to(inside)  # the folder itself may be a link
    assert find_escaping_links(tmp_path / "link", [*bad, *good]) == set(bad)


@pytest.mark.filterwarnings("ignore")  # Pillow's warnings about the damage
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "DDS", "ICO"])
def test_damaged_files_are_an_image_or_a_value_error(tmp_path: Path, kind: str) -> None:
    """Random changes never raise another exception."""
    buffer, chance, path = io.BytesIO(), random.Random(0), tmp_path / "a.jpg"
    image = Image.fromarray(noise())
    image.save(buffer, kind, **({"exif": exif_with(6)} if kind in ("JPEG", "PNG", "TIFF") else {}))
    outcomes = set()
    for _ in range(120):
        content = bytearray(buffer.getvalue())
        for _ in range(chance.choice([1, 2, 4])):
            place = chance.randrange(min(len(content), chance.choice([40, 200, 5000])))
            if chance.random() < 0.8:
                content[place] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
            else:
                content[place : place + chance.randrange(9)] = chance.randbytes(chance.randrange(9))
        path.write_bytes(content)
        try:
            outcomes.add(load_resized(path, 8).shape)
        except ValueError as error:
            assert str(error)
            outcomes.add("refused")
    assert outcomes == {(8, 8, 3), "refused"}


@pytest.mark.parametrize(("height", "width"), [(1, 50), (50, 1), (1, 1), (40, 40), (500, 30)])
def test_squares_hold_the_whole_image(tmp_path: Path, height: int, width: int) -> None:
    """Any shape becomes a square whose corners keep their colors."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, :, 0], image[:, : width // 2, 1] = 255, 255
    square = load_resized(saved(tmp_path / "a.png", Image.fromarray(image)), 24)
    assert square.shape == (24, 24, 3) and square.dtype == np.uint8
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        np.testing.assert_array_equal(square[y, x], image[y, x])


def test_write_and_load_are_inverse(tmp_path: Path) -> None:
    """write_image and load_image are inverse for PNG, close for JPEG."""
    write_image(tmp_path / "a.png", noise())
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), noise())
    write_image(tmp_path / "a.jpg", Image.new("RGB", (8, 8), (10, 200, 30)))
    assert np.abs(np.asarray(load_image(tmp_path / "a.jpg")) - [10.0, 200, 30]).max() < 6


def test_decoding_leaves_the_warning_filters_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filters belong to the process: threads that change them would race."""
    path = saved(tmp_path / "a.jpg", Image.fromarray(noise()))
    with monkeypatch.context() as patch:
        patch.setattr(warnings, "catch_warnings", lambda **_: pytest.fail("filters were swapped"))
        load_resized(path, 9)
