"""Odd and malicious images, names, captions and files, with the expected outcome of each.

Used by the tests of `src/data` and by `tests/stress/faults.py`.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.tiny_data import noise

READ, UNREADABLE, MISSING, REJECTED = ("read", "images unreadable", "images missing",
                                       "caption rows rejected")

GOOD_NAMES = [
    "with space.png", "it's \"quoted\".png", "фото.png", "写真.png", "صورة.png",
    "e\u0301t\u00e9.png", "🐕.png", "-rf.png", "$(touch ran).png", "; touch ran;.png",
    "<script>alert(1)<|script>.png",
    "%2e%2e.png", "#1?.png", "a,b.png", "a|b.png", "a#0\u2028.png", "{name}.png", "%s%n.png",
    "...png", "CON.png", "\u202egnp.exe.png", "sub/folder/a.png", "./dot.png", "x" * 251 + ".png",
]
BAD_NAMES = {
    "../../etc/passwd": REJECTED, "/etc/passwd": REJECTED, "..": REJECTED, "": REJECTED,
    "sub/../../out.jpg": REJECTED, "C:\\photo.jpg": REJECTED, "C:photo.jpg": REJECTED,
    "a\\b.jpg": REJECTED, ".": REJECTED, "nul\x00.jpg": REJECTED,
    "\x1b[2J\x1b]0;title\x07.jpg": REJECTED, "line\nend.jpg": REJECTED, "half \ud800.jpg": REJECTED,
    "x" * 5000 + ".jpg": MISSING, "a/" * 3000 + "b.jpg": MISSING, "file:///etc/passwd": MISSING,
    "https://example.org/a.jpg": MISSING, "~/photo.jpg": MISSING, "$HOME/a.jpg": MISSING,
}
BAD_CAPTIONS = ["", "   ", "\t\n", "\x00\x07\x1b", None, 3, ["A dog ."], {"raw": "A dog ."}]
GOOD_CAPTIONS = [
    "word " * 9_999 + "end", "a \x00 dog \x1b[2J runs", "\ud83d a dog", "qqqq zzzz",
    "🐕 🐕🏽", "...", "\u202eכלב רץ \u200f على", "<script>alert(1)</script>", "=1+1",
    "{0} %s %n", "A dog .", "A dog .",
]


def plain(seed: int, height: int = 40, width: int = 40) -> Image.Image:
    """Return an ordinary image."""
    return Image.fromarray(noise(seed, height, width))


def make_profile(
    primaries: tuple[tuple[float, float, float], ...], gamma: float = 2.2, space: bytes = b"RGB "
) -> bytes:
    """Return an ICC profile with three XYZ (D50) primaries, or of gray, and one gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(gamma * 256), 0)
    tags = {b"wtpt": (0.9642, 1.0, 0.8249)}
    tags |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=False))
    parts = {name: b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in xyz))
             for name, xyz in tags.items()}
    parts |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC") if primaries else (b"kTRC",), curve)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    parts[b"desc"] = text + bytes(-len(text) % 4)
    parts[b"cprt"] = b"text" + bytes(4) + b"none" + bytes(4)
    table, body, start = struct.pack(">I", len(parts)), b"", 128 + 4 + 12 * len(parts)
    for name, part in parts.items():
        table += name + struct.pack(">II", start + len(body), len(part))
        body += part
    header = (struct.pack(">I", start + len(body)) + b"lcms" + struct.pack(">I", 0x02400000)
              + b"mntr" + space + b"XYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp"
              + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48))
    return header + table + body


RED, GREEN, BLUE = (0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)


def swapped_profile() -> bytes:
    """Return a profile in which red and green of sRGB are exchanged."""
    return make_profile((GREEN, RED, BLUE))


def flat_jpeg(side: int) -> bytes:
    """Return a valid gray JPEG of side x side pixels, side divisible by 16, without decoding it."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 128).save(buffer, "JPEG")
    content = buffer.getvalue()
    size, scan = content.index(b"\xff\xc0") + 5, content.index(b"\xff\xda") + 2
    scan += struct.unpack(">H", content[scan : scan + 2])[0]
    # A block that equals the previous one has the standard JPEG code 001010: three bytes for four.
    return (content[:size] + struct.pack(">HH", side, side) + content[size + 4 : scan]
            + b"\x28\xa2\x8a" * (side // 16) ** 2 + b"\xff\xd9")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side: int = 30_000) -> bytes:
    """Return a PNG file of a few bytes whose header claims side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
            + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b""))


def huge_jpeg(side: int = 30_000) -> bytes:
    """Return a small progressive JPEG that claims side x side pixels: gigabytes to decode."""
    content = bytearray(encoded(plain(0), "JPEG", progressive=True))
    header = content.index(b"\xff\xc2")
    content[header + 5 : header + 9] = struct.pack(">HH", side, side)
    return bytes(content)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_odd_images(folder: Path) -> dict[str, str]:
    """Write odd images below `folder`, and return the expected outcome of each name."""
    clear = plain(1).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((40, 40)))
    exif = Image.Exif()
    exif[274] = 6
    gray16 = Image.fromarray(np.linspace(0, 65_535, 1600).astype(np.uint16).reshape(40, 40))
    whole = encoded(plain(2, 300, 300), "JPEG")
    good = {
        "gray.png": encoded(plain(3).convert("L"), "PNG"), "16 bit.png": encoded(gray16, "PNG"),
        "16 bit.tif": encoded(gray16, "TIFF"), "bits.png": encoded(plain(3).convert("1"), "PNG"),
        "palette.gif": encoded(plain(3).convert("P"), "GIF"), "alpha.png": encoded(clear, "PNG"),
        "palette and alpha.png": encoded(clear.quantize(), "PNG"),
        "cmyk.jpg": encoded(plain(4).convert("CMYK"), "JPEG"),
        "turned.jpg": encoded(plain(5, 40, 80), "JPEG", exif=exif),
        "progressive.jpg": encoded(plain(6), "JPEG", progressive=True),
        "moving.gif": encoded(plain(7), "GIF", save_all=True, append_images=[plain(8)]),
        "moving.webp": encoded(plain(7), "WEBP", save_all=True, append_images=[plain(8)]),
        "one wide.png": encoded(plain(9, 90, 1), "PNG"),
        "one high.png": encoded(plain(9, 1, 90), "PNG"), "one.png": encoded(plain(9, 1, 1), "PNG"),
        "a png.jpg": encoded(plain(10), "PNG"), "no suffix": encoded(plain(10), "PNG"),
        "30000 wide.jpg": flat_jpeg(30_000),
        **{name: encoded(plain(11 + i), "PNG") for i, name in enumerate(GOOD_NAMES)},
    }
    bad = {
        "empty.jpg": b"", "text.jpg": b"not an image\n", "cut.jpg": whole[: len(whole) // 2],
        "bytes.jpg": bytes(range(256)), "start.jpg": whole[:20], "huge.png": huge_png(),
        "huge.jpg": huge_jpeg(), "page.html.jpg": b"<html><img src=x onerror=alert(1)>",
        "vector.jpg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "archive.jpg": packed({"a": "b"}),
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }
    for name, content in {**good, **bad}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    outside = folder.parent / "private.png"
    outside.write_bytes(encoded(plain(99), "PNG"))
    (folder / "link out.png").symlink_to(outside)
    (folder / "link within.png").symlink_to("gray.png")
    (folder / "link to nothing.png").symlink_to(folder / "nothing")
    return {**dict.fromkeys(good, READ), **dict.fromkeys(bad, UNREADABLE), "link within.png": READ,
            "link out.png": UNREADABLE, "folder.jpg": MISSING, "pipe.jpg": MISSING,
            "link to nothing.png": MISSING, "missing.jpg": MISSING}


def write_odd_dataset(
    folder: Path, n_plain: int = 24
) -> tuple[Path, Path, dict[str, str], int]:
    """Write a dataset of ordinary and odd images.

    Returns:
        The image folder, the caption file, the expected outcome of each image name, and the number
        of bad captions, which all belong to an ordinary image and are to be rejected.
    """
    images, annotations = folder / "images", folder / "captions.json"
    images.mkdir(parents=True)
    outcomes = write_odd_images(images) | BAD_NAMES
    for i in range(n_plain):
        outcomes[f"plain {i}.jpg"] = READ
        (images / f"plain {i}.jpg").write_bytes(encoded(plain(1000 + i), "JPEG"))
    counts = {"one.png": 1, "gray.png": 50}
    entries = [{"filename": name, "sentences": [
        {"raw": f"A {'red' if i % 2 else 'blue'} thing number {i} ."}
        for i in range(counts.get(name, 2 if outcomes[name] == READ else 1))]} for name in outcomes]
    entries.append({"filename": "plain 0.jpg",
                    "sentences": [{"raw": caption} for caption in GOOD_CAPTIONS + BAD_CAPTIONS]})
    annotations.write_text(json.dumps({"images": entries}))
    return images, annotations, outcomes, len(BAD_CAPTIONS)


def packed(files: dict[str, str]) -> bytes:
    """Return a zip archive, such as an .xlsx file is."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def other_files() -> dict[str, bytes]:
    """Return the contents of files that are not caption files, by name."""
    return {
        "empty.csv": b"", "blank.csv": b" \n\r\n\t", "mark.csv": b"\xef\xbb\xbf",
        "photo.csv": encoded(plain(0), "JPEG"), "image.csv": encoded(plain(0), "PNG"),
        "table.xlsx": packed({"xl/workbook.xml": "<workbook/>"}), "page.pdf": b"%PDF-1.7\n\xff\xfe",
        "other.csv": b"id;price\n1;2\n", "numbers.csv": b"a,b,c\n1,2,3\n", "prose.txt": b"A dog .",
        "wide.csv": "image_name| comment_number| comment\na.jpg| 0| x\n".encode("utf-16"),
        "cut.json": b'{"images": [{"filename": "a.jpg"', "list.json": b"[1, 2]", "deep.json":
        b"[" * 200_000, "coco.json": b'{"images": [], "annotations": []}', "zeros.bin": bytes(5000),
    }
