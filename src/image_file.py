"""The door to picture files: any picture -> upright RGB, and back into a file."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from src.files import write_atomic

MAX_PIXELS = 178_956_970  # decoded; Pillow's own limit against decompression bombs, 0.5 GB as RGB
Image.MAX_IMAGE_PIXELS = None  # load_image checks after draft(), which may shrink a JPEG eightfold
# Of corrupt EXIF and the like; the pixels decide. For good, since catch_warnings in the decoding
# threads would race for the process's filters.
warnings.filterwarnings("ignore", module=r"PIL\.")
TURNS = {  # EXIF orientation -> what turns the photo upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}


def load_image(path: Path, longest: int | None = None) -> Image.Image:
    """Decode one photo: RGB, upright by its EXIF orientation, transparency over white.

    Args:
        path: any format that Pillow reads; of an animation the first frame.
        longest: shrink so that no side is longer than this many pixels.

    Raises:
        ValueError: not a readable picture; the message says why.
    """
    try:
        with Image.open(path) as image:
            # Lets the JPEG decoder skip detail that is thrown away anyway. A progressive JPEG is
            # held in memory as a whole all the same, so its full size counts below.
            if longest and not image.info.get("progressive"):
                image.draft("RGB", (longest, longest))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels are too many")
            image.load()
            image = _to_rgb(_upright(image))
    except UnidentifiedImageError as error:
        raise ValueError("not a picture in a known format") from error
    except Exception as error:  # Pillow's readers raise anything at all on broken files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(reason) from error
    if longest:
        image.thumbnail((longest, longest), Image.Resampling.BILINEAR)
    return image


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


def load_square(path: Path, size: int) -> np.ndarray:
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
