"""Compare the pixels of load_image with those of ImageMagick and libvips.

    python -m benchmarks.images FOLDER...     # folders of image files of any kind
    apt-get install imagemagick; pip install "pyvips[binary]"

A file counts as different if the mean of the absolute differences exceeds 4 of 255 from every other
decoder that gives an image of the same size. Files that only one side reads are listed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.timing import installed
from src.data.images import load_image
from src.search.update_index import find_images

LIMIT = 4.0  # of 255


def decode_with_magick(path: Path, profile: Path) -> np.ndarray:
    """Return the (H, W, 3) uint8 pixels of ImageMagick in sRGB, upright, over white."""
    command = ["convert", f"{path}[0]", "-auto-orient", "-background", "white", "-alpha", "remove",
               "-profile", str(profile), "-depth", "8", "-type", "TrueColor", "ppm:-"]
    content = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    magic, size, most, pixels = content.split(b"\n", 3)
    width, height = map(int, size.split())
    if (magic, most) != (b"P6", b"255"):
        raise ValueError("not a PPM of 8 bits")
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def decode_with_vips(path: Path, _: Path) -> np.ndarray:
    """Return the (H, W, 3) uint8 pixels of libvips in sRGB, upright, over white."""
    import pyvips

    image = pyvips.Image.new_from_file(str(path)).autorot()
    if image.get_typeof("icc-profile-data"):
        image = image.icc_transform("srgb", embedded=True, intent="perceptual")
    image = image.colourspace("srgb")
    if image.hasalpha():
        image = image.flatten(background=[255, 255, 255])
    return image.cast("uchar").numpy()[:, :, :3]


def main(folders: list[str]) -> int:
    """Print a table for each folder, and the files that differ."""
    decoders = {}
    if shutil.which("convert"):
        decoders["ImageMagick"] = decode_with_magick
    if installed("pyvips"):
        decoders["libvips"] = decode_with_vips
    for name in {"ImageMagick", "libvips"} - decoders.keys():
        print(f"not compared with {name}: it is not installed")
    if not folders or not decoders:
        print(__doc__)
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        from PIL import ImageCms

        profile = Path(temporary, "srgb.icc")
        profile.write_bytes(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        for folder in folders:
            compare(Path(folder), decoders, profile)
    return 0


def compare(folder: Path, decoders: dict, profile: Path) -> None:
    """Print the numbers and differences of the image files below a folder."""
    scan, counts = find_images(folder), Counter()
    for name in sorted(scan.found):
        others = {}
        for decoder, decode in decoders.items():
            try:
                others[decoder] = decode(folder / name, profile)
            except Exception:  # each decoder has exceptions of its own
                counts[f"not read by {decoder}"] += 1
        try:
            own = np.asarray(load_image(folder / name, notes=[])).astype(np.int16)
        except ValueError as error:
            counts["named as unreadable"] += 1
            if others:
                print(f"    {name}: {error}; read by {', '.join(others)}")
            continue
        counts["read"] += 1
        means = {decoder: abs(own - other).mean() for decoder, other in others.items()
                 if other.shape == own.shape}
        counts["compared with both" if len(means) == 2 else f"compared with {len(means)}"] += 1
        if means and min(means.values()) > LIMIT:
            counts["different"] += 1
            print(f"    {name}: " + ", ".join(f"{mean:.1f} from {decoder}"
                                              for decoder, mean in means.items()))
    counts["named without decoding"] = len(scan.unusable)
    print(f"{folder.name}: {len(scan.found)} files; "
          + ", ".join(f"{count} {what}" for what, count in sorted(counts.items()) if count),
          flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
