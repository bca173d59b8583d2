"""The door to picture files: any picture -> upright RGB, and back into a file."""

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

MAX_PIXELS = 100_000_000  # decoded: what the largest cameras take, 2 GB while it is converted
LARGE_PIXELS = 2**24
LARGE = threading.Lock()  # large pictures come one at a time, however many threads decode
Image.MAX_IMAGE_PIXELS = None  # load_image checks after draft(), which may shrink a JPEG eightfold
# Of corrupt EXIF and the like; the pixels decide. For good, since catch_warnings in the decoding
# threads would race for the process's filters.
warnings.filterwarnings("ignore", module=r"PIL\.")
TURNS = {  # EXIF orientation -> what turns the photo upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}


class ReadError(ValueError):
    """The disk or the memory failed, not the picture: another try may go well."""


def load_image(path: Path, longest: int | None = None) -> Image.Image:
    """Decode one photo: RGB, upright by its EXIF orientation, transparency over white.

    Args:
        path: any format that Pillow reads; of an animation the first frame.
        longest: shrink so that no side is longer than this many pixels.

    Raises:
        ValueError: not a readable picture; the message says why. A ReadError where that may pass.
    """
    try:
        with Image.open(path) as image:
            # Lets the JPEG decoder skip detail that is thrown away anyway. A progressive JPEG is
            # held in memory as a whole all the same, so its full size counts below.
            if longest and not image.info.get("progressive"):
                image.draft("RGB", (longest, longest))
            n_pixels = image.width * image.height
            if n_pixels > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            if image.format == "EPS":  # Pillow would run Ghostscript on the stranger's program
                raise ValueError("PostScript is a program, not a picture")
            with LARGE if n_pixels > LARGE_PIXELS else nullcontext():
                image.load()
                image = _to_rgb(_upright(image))
                if longest:
                    image.thumbnail((longest, longest), Image.Resampling.BILINEAR)
                return image
    except UnidentifiedImageError as error:
        raise ValueError("not a picture in a known format") from error
    except MemoryError as error:
        raise ReadError("not enough memory") from error
    except Exception as error:  # Pillow's readers raise anything at all on broken files
        if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have no number
            raise ReadError(error.strerror or str(error)) from error
        raise ValueError(str(error) or type(error).__name__) from error


def _upright(image: Image.Image) -> Image.Image:
    """The photo turned as its EXIF says, if it says so legibly.

    ImageOps.exif_transpose also writes the EXIF anew, which fails on odd tags of intact photos.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # EXIF as broken as it likes to be: the pixels are there
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode. convert() alone clips 16-bit grey to white and shows what is transparent."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        scale = 65535 if image.mode.startswith("I") else max(1.0, float(grey.max()))
        image = Image.fromarray((grey.clip(0, scale) * (255 / scale)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def find_escaping_links(folder: Path, names: list[str]) -> set[str]:
    """Those of `names` that lie outside `folder` in truth: links, or files in linked folders.

    By such a name a stranger's photos would show the user's own, or put them on a web page.
    """
    root, real_folder = os.path.realpath(folder), cache(os.path.realpath)

    def leads_out(name: str) -> bool:
        path = os.path.join(root, name)
        real = os.path.realpath(path) if os.path.islink(path) else real_folder(
            os.path.dirname(path))
        return os.path.commonpath([root, real]) != root

    return {name for name in names if leads_out(name)}


def load_resized(path: Path, size: int) -> np.ndarray:
    """The whole photo squeezed to a square: (size, size, 3) uint8. Raises ValueError as load_image.

    Squeezing keeps what stands at the borders, which captions speak of and a centre crop loses.
    """
    image = load_image(path, longest=None if size > 512 else 4 * size)
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def write_image(path: Path, image: np.ndarray | Image.Image) -> None:
    """Write a picture, (H, W, 3) uint8 or PIL, in the format of the path's suffix, atomically."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format=Image.registered_extensions()[path.suffix.lower()], quality=90)
    write_atomic(path, buffer.getvalue())
