"""Read any image file as an upright RGB image, and write image files."""

from __future__ import annotations

import io
import os
import threading
import warnings
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from src.utils.files import write_atomic

MAX_PIXELS = 100_000_000  # what the largest cameras take; 2 GB of memory during conversion
LARGE_PIXELS = 2**24
LARGE = threading.Lock()  # large images are decoded one at a time, however many threads decode
Image.MAX_IMAGE_PIXELS = None  # load_image checks after draft(), which may shrink a JPEG eightfold
# Pillow warns of corrupt EXIF and the like, which does not matter for the pixels. Not with
# catch_warnings: the decoding threads would race for the filters of the process.
warnings.filterwarnings("ignore", module=r"PIL\.")
TRANSPOSE = {  # EXIF orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}


class ReadError(ValueError):
    """The disk or the memory failed, not the image: another try may succeed."""


def load_image(path: Path, longest: int | None = None) -> Image.Image:
    """Decode an image as RGB, upright by its EXIF orientation, transparency over white.

    Args:
        path: any format that Pillow reads; of an animation the first frame is taken.
        longest: shrink so that no side is longer than this many pixels.

    Raises:
        ValueError: the file is not a readable image; the message gives the reason. It is a
            ReadError if another try may succeed.
    """
    try:
        with Image.open(path) as image:
            # Lets the JPEG decoder skip detail that would be thrown away. A progressive JPEG is
            # held in memory as a whole all the same, so its full size counts below.
            if longest and not image.info.get("progressive"):
                image.draft("RGB", (longest, longest))
            n_pixels = image.width * image.height
            if n_pixels > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            if image.format == "EPS":  # Pillow would run Ghostscript on it
                raise ValueError("PostScript is a program, not an image")
            with LARGE if n_pixels > LARGE_PIXELS else nullcontext():
                image.load()
                image = _to_rgb(_upright(image))
                if longest:
                    image.thumbnail((longest, longest), Image.Resampling.BILINEAR)
                return image
    except UnidentifiedImageError as error:
        raise ValueError("not an image in a known format") from error
    except MemoryError as error:
        raise ReadError("not enough memory") from error
    except Exception as error:  # Pillow's readers raise exceptions of any type on broken files
        if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have no number
            raise ReadError(error.strerror or str(error)) from error
        raise ValueError(str(error) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    """Return the image rotated as its EXIF orientation says, if that can be read.

    ImageOps.exif_transpose also writes new EXIF data, which fails on odd tags of intact images.
    """
    try:
        method = TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # corrupt EXIF does not affect the pixels
        method = None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return RGB from any mode; convert() alone clips 16-bit gray and shows hidden colors."""
    if image.mode.startswith("I") or image.mode == "F":
        gray = np.nan_to_num(np.asarray(image, dtype=np.float32))
        scale = 65535 if image.mode.startswith("I") else max(1.0, float(gray.max()))
        image = Image.fromarray((gray.clip(0, scale) * (255 / scale)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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


def load_resized(path: Path, size: int) -> np.ndarray:
    """Return the whole image as a square, (size, size, 3) uint8; raise ValueError like load_image.

    The aspect ratio is not kept: captions also describe what a center crop would cut off.
    """
    image = load_image(path, longest=None if size > 512 else 4 * size)
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def write_image(path: Path, image: np.ndarray | Image.Image) -> None:
    """Write an image, (H, W, 3) uint8 or PIL, atomically, in the format of the path's suffix."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=Image.registered_extensions()[path.suffix.lower()], quality=90)
    write_atomic(path, buffer.getvalue())
