"""Read any image file as an upright RGB image, and write image files."""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageCms, ImagePalette, UnidentifiedImageError

from src.utils.errors import print_message
from src.utils.files import write_atomic

# Version of the pixels of load_image. 2: ICC profiles, color-key transparency, small GIF frames.
# 3: ICC profiles of BMP, palettes of JPEG 2000.
DECODER = 3
MAX_PIXELS = 100_000_000  # what the largest cameras take; 2 GB of memory during conversion
LARGE_PIXELS = 2**24
LARGE = threading.Lock()  # large images are decoded one at a time, however many threads decode
Image.MAX_IMAGE_PIXELS = None  # load_image checks after draft(), which may shrink a JPEG eightfold
# Pillow warns of corrupt EXIF and the like, which does not matter for the pixels. Not with
# catch_warnings: the decoding threads would race for the filters of the process.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs errors that it also raises
TRANSPOSE = {  # EXIF orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}
JPEG_END = b"\xff\xd9"
STDERR = threading.Lock()
LIBTIFF_MESSAGE = re.compile(r"(\w+|tempfile\.tif)?: [^%]+\.")
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
UNSUPPORTED = {b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"FUJIFILMCCD-RAW": "RAW",
               b"IIU\0": "RAW", b"IIRO": "RAW", b"IIRS": "RAW", b"\0\0\0\x18ftypcrx ": "RAW"}


class ReadError(ValueError):
    """The disk or the memory failed, not the image: another try may succeed."""


def load_image(
    path: Path, longest: int | None = None, notes: list[str] | None = None
) -> Image.Image:
    """Decode an image as sRGB, upright by its EXIF orientation, transparency over white.

    Args:
        path: any format that Pillow reads, whatever the extension; of an animation the first frame
            is taken. HEIC needs the package pillow-heif.
        longest: shrink so that no side is longer than this many pixels.
        notes: if given, a damaged image is decoded as far as possible, and what is wrong with it
            is appended here. Otherwise a truncated image raises ValueError.

    Raises:
        ValueError: the file is not a readable image; the message gives the reason. It is a
            ReadError if another try may succeed.
    """
    messages: list[str] = []
    try:
        try:
            image = _decode(path, longest, messages)
        except OSError as error:
            if notes is None or error.errno is not None or "truncated" not in str(error):
                raise
            image = _decode_truncated(path, longest, messages, error)
    except UnidentifiedImageError as error:
        reason = _unidentified(path)
        if not reason:  # the reader of this format is registered now
            return load_image(path, longest, notes)
        raise ValueError(reason) from error
    except MemoryError as error:
        raise ReadError("not enough memory") from error
    except Exception as error:  # Pillow's readers raise exceptions of any type on broken files
        if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have no number
            raise ReadError(error.strerror or str(error)) from error
        raise ValueError("; ".join(messages[:1]) or str(error) or type(error).__name__) from error
    if messages and notes is None:
        print_message(f"{path}: {messages[0]}")
    elif messages:
        notes.append(messages[0])
    return image


def _decode(
    file: Path | io.BytesIO, longest: int | None, messages: list[str]
) -> Image.Image:
    """Decode an image file; append what libtiff prints about damaged data to `messages`."""
    with Image.open(file) as image:
        # Lets the JPEG decoder skip detail that would be thrown away. A progressive JPEG is held
        # in memory as a whole all the same, so its full size counts below.
        if longest and not image.info.get("progressive"):
            image.draft("RGB", (longest, longest))
        n_pixels = image.width * image.height
        if n_pixels > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too many")
        if image.format == "EPS":  # Pillow would run Ghostscript on it
            raise ValueError("PostScript is a program, not an image")
        with suppress(KeyError, IndexError, ValueError, struct.error):  # a damaged header
            _complete_colors(image)
        tiles = image.tile  # loading the image clears it
        with LARGE if n_pixels > LARGE_PIXELS else nullcontext(), \
                _collect_stderr(messages) if image.format == "TIFF" else nullcontext():
            image.load()
        with LARGE if n_pixels > LARGE_PIXELS else nullcontext():
            method = _transpose_method(image)
            frame = tiles[0][1] if image.format == "GIF" and tiles else (0, 0, *image.size)
            rgb = _to_rgb(image, _color_key_alpha(image, tiles, file))
            if frame != (0, 0, *image.size):  # a first frame that is smaller than the canvas
                canvas = Image.new("RGB", image.size, "white")
                canvas.paste(rgb.crop(frame), frame)
                rgb = canvas
            if method is not None:
                rgb = rgb.transpose(method)
            if longest:
                rgb.thumbnail((longest, longest), Image.Resampling.BILINEAR)
            return rgb


def _decode_truncated(
    path: Path, longest: int | None, messages: list[str], error: OSError
) -> Image.Image:
    """Decode the first part of a truncated JPEG; raise `error` if that is too little."""
    image = _decode(io.BytesIO(path.read_bytes() + JPEG_END), longest, messages)
    pixels = np.asarray(image).astype(np.int16)
    # The decoder fills the missing part with one color.
    if (abs(pixels - pixels[-1, -1]) > 8).any(-1).mean() < 0.1:
        raise error
    messages.append("truncated; only the first part can be decoded")
    return image


def _unidentified(path: Path) -> str:
    """Return why Pillow does not know a file, or "" if its reader has been registered now."""
    with open(path, "rb") as file:
        head = file.read(32)
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        if _register_heif():
            return ""
        return "HEIC images need another package: pip install pillow-heif"
    return next((f"{name} images are not supported" for start, name in UNSUPPORTED.items()
                 if head.startswith(start)), "not an image in a known format")


@cache
def _register_heif() -> bool:
    """Register the reader of HEIC images; return whether it was registered by this call."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    _register_heif.cache_clear()
    return True


@contextmanager
def _collect_stderr(messages: list[str]) -> Iterator[None]:
    """Append what libtiff writes to file descriptor 2 to `messages`; pass everything else on.

    The descriptor belongs to the process, so TIFF files are decoded one at a time.
    """
    with STDERR, tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            for line in file.read().decode("utf-8", "replace").splitlines(keepends=True):
                if LIBTIFF_MESSAGE.fullmatch(line.rstrip("\n")):
                    messages.append(line.strip())
                else:  # written by another thread
                    sys.stderr.write(line)


def _transpose_method(image: Image.Image) -> Image.Transpose | None:
    """Return what turns the image upright by its EXIF orientation, if that can be read.

    ImageOps.exif_transpose also writes new EXIF data, which fails on odd tags of intact images.
    """
    try:
        return TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # corrupt EXIF does not affect the pixels
        return None


def _complete_colors(image: Image.Image) -> None:
    """Set the ICC profile of a BMP and the palette of a JPEG 2000 image before it is decoded.

    Pillow does not read the profile. It removes repeated colors from the palette, which shifts the
    following ones, and ignores the boxes that assign its columns to channels.
    """
    if image.format == "BMP":
        image.fp.seek(14)  # after the file header
        header = image.fp.read(124)
        if header[:4] == b"\x7c\0\0\0" and header[56:60] == b"DEBM":  # version 5, embedded profile
            start, size = struct.unpack_from("<II", header, 112)
            image.fp.seek(14 + start)
            image.info["icc_profile"] = image.fp.read(min(size, 2**24))
    elif image.format == "JPEG2000" and image.mode == "P":
        image.fp.seek(0)
        boxes = _split_boxes(_split_boxes(image.fp.read(2**20))[b"jp2h"])
        n_colors, n_columns = struct.unpack_from(">HB", boxes[b"pclr"])
        table = np.frombuffer(boxes[b"pclr"], np.uint8, n_colors * n_columns, 3 + n_columns)
        columns = list(boxes[b"cmap"][3::4])  # channel -> column
        order = list(range(3))  # red, green, blue -> channel
        for channel, kind, color in struct.iter_unpack(">3H", boxes.get(b"cdef", b"")[2:]):
            if kind == 0 and color > 0:
                order[color - 1] = channel
        if n_columns == 3 and max(boxes[b"pclr"][3:6]) == 7:  # 8 bits each
            table = table.reshape(-1, 3)[:, [columns[channel] for channel in order]]
            image.palette = ImagePalette.ImagePalette("RGB", table.tobytes())
            image.palette.dirty = 1  # load() applies it


def _split_boxes(content: bytes) -> dict[bytes, bytes]:
    """Return the content of the boxes of a JPEG 2000 file by their types, up to the codestream."""
    boxes, start = {}, 0
    while start + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, start)
        if size < 8:  # the box extends to the end, or its size has 64 bits
            break
        boxes[kind] = content[start + 8 : start + size]
        start += size
    return boxes


def _color_key_alpha(
    image: Image.Image, tiles: list, file: Path | io.BytesIO
) -> Image.Image | None:
    """Return the alpha of a PNG whose tRNS chunk names one transparent color, at its bit depth.

    Pillow compares the key with pixels that it has scaled to 8 bits, so only keys of 8-bit images
    match. None: there is no key, or Pillow handles it.
    """
    key = image.info.get("transparency")
    raw_mode = tiles[0][3] if image.format == "PNG" and tiles else None
    if key is None or raw_mode not in ("1", "L;2", "L;4", "I;16B", "RGB;16B"):
        return None
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    if raw_mode == "RGB;16B":  # decode again: Pillow keeps the high bytes only
        with Image.open(file) as second:
            second.tile = [(*tile[:3], "RGB;16L") for tile in second.tile]
            low = np.asarray(second)
        opaque = ((pixels.astype(np.uint16) << 8 | low) != key).any(-1)
    else:
        max_value = {"1": 1, "L;2": 3, "L;4": 15, "I;16B": 255}[raw_mode]
        opaque = pixels != key * 255 // max_value
    del image.info["transparency"]
    return Image.fromarray(opaque.astype(np.uint8) * 255)


def _to_rgb(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """Return sRGB from any mode; convert() alone clips 16-bit gray and shows hidden colors.

    Args:
        image: a decoded image.
        alpha: its opacity, if its mode cannot hold it.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        gray = np.nan_to_num(np.asarray(image, dtype=np.float32))
        scale = 65535 if image.mode.startswith("I") else max(1.0, float(gray.max()))
        image = Image.fromarray((gray.clip(0, scale) * (255 / scale)).round().astype(np.uint8))
    if profile or image.mode == "LAB":
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
        image = _to_srgb(image, profile or b"")
    if alpha is not None or image.has_transparency_data:
        image = image.convert("RGBA")
        if alpha is not None:
            image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from an ICC profile to sRGB; an unusable profile is ignored, as browsers do."""
    mode = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}.get(profile[16:20], "LAB")
    gray = image.mode in ("1", "L", "LA", "La")
    if mode in ("CMYK", "LAB") or image.mode in ("CMYK", "LAB"):
        fits = image.mode == mode
    else:
        fits = mode == "RGB" or gray
    transform = _srgb_transform(profile, mode) if fits else None
    if transform is None:
        return image
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns about other conversions of transparent colors
    return transform.apply(image if image.mode == mode else image.convert(mode))


@lru_cache(maxsize=64)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of pixels of `mode` to sRGB; None if it cannot be used or is identity.

    Args:
        profile: an ICC profile; b"" for CIE Lab.
        mode: of the pixels.
    """
    try:
        source = (ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile
                  else ImageCms.createProfile("LAB"))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # a broken profile; an image without one is taken for sRGB
        return None
    if mode in ("RGB", "L"):  # most profiles are sRGB: skip the work, and keep the pixels
        levels = np.linspace(0, 255, 18).astype(np.uint8)
        grid = np.stack(np.meshgrid(*[levels] * 3, indexing="ij"), -1).reshape(18, -1, 3)
        colors = Image.fromarray(grid if mode == "RGB" else np.arange(256, dtype=np.uint8)[None])
        change = np.asarray(transform.apply(colors)).astype(int) - np.asarray(colors.convert("RGB"))
        if abs(change).max() <= 2:
            return None
    return transform


def is_decoded_as_before(path: Path) -> bool:
    """Return whether version 1 of the decoder, without color management, gave the same pixels.

    Only the header of the file is read, to spare data that version 1 has computed.
    """
    try:
        with Image.open(path) as image:
            return image.mode != "LAB" and "icc_profile" not in image.info and not (
                image.format in ("GIF", "BMP") or image.format == "JPEG2000" and image.mode == "P"
                or image.format == "PNG" and "transparency" in image.info)
    except Exception:  # unreadable files are tried again
        return False


def reader_version() -> str:
    """Return the versions of all that decides which files can be read."""
    try:
        heif = metadata.version("pillow-heif")
    except metadata.PackageNotFoundError:
        heif = "none"
    return f"decoder {DECODER}, Pillow {PIL.__version__}, pillow-heif {heif}"


def find_escaping_links(folder: Path, names: list[str]) -> set[str]:
    """Return those of `names` that are outside `folder`: links, or files in linked folders.

    A dataset from an untrusted source could otherwise show private images, or publish them on a
    web page.
    """
    root, real_folder = os.path.realpath(folder), cache(os.path.realpath)

    def escapes(name: str) -> bool:
        path = os.path.join(root, name)
        real = os.path.realpath(path) if os.path.islink(path) else real_folder(
            os.path.dirname(path))
        return os.path.commonpath([root, real]) != root

    return {name for name in names if escapes(name)}


def load_resized(path: Path | io.BytesIO, size: int, notes: list[str] | None = None) -> np.ndarray:
    """Return the whole image as a square, (size, size, 3) uint8; raise ValueError like load_image.

    The aspect ratio is not kept: captions also describe what a center crop would cut off.

    Args:
        path: the image file.
        size: side of the square.
        notes: see `load_image`.
    """
    image = load_image(path, None if size > 512 else 4 * size, notes)
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def tiny_thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) uint8 averaged to 4x4 pixels: (48,) uint8."""
    return np.asarray(Image.fromarray(pixels).resize((4, 4), Image.Resampling.BOX)).ravel()


def encode_image_file(image: np.ndarray | Image.Image) -> bytes:
    """Return an image, PIL or a uint8 array of (H, W), (H, W, 3) or (H, W, 4), as a PNG file.

    A color profile and an EXIF orientation are kept.

    Raises:
        ValueError: it is neither, or an array of another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (3,), (4,)):
            raise ValueError(f"an array of {image.dtype} of shape {image.shape}, not of uint8 and "
                             "(H, W, 3)")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError("neither a path, an image nor an array")
    exif, profile = image.getexif(), image.info.get("icc_profile")
    if image.mode not in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"):  # what PNG stores
        image, profile = _to_rgb(image, None), None
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif, icc_profile=profile, compress_level=1)
    return buffer.getvalue()


def write_image(path: Path, image: np.ndarray | Image.Image) -> None:
    """Write an image, (H, W, 3) uint8 or PIL, atomically, in the format of the path's suffix."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=Image.registered_extensions()[path.suffix.lower()], quality=90)
    write_atomic(path, buffer.getvalue())
