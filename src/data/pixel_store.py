"""All images of a dataset decoded once into one memory-mapped uint8 file.

Decoding a JPEG takes about 3 ms, copying its pixels from the file about 10 us; training on five
captions per image for five epochs would otherwise decode every image 25 times.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from src.data.images import (
    DECODER,
    ReadError,
    find_escaping_links,
    is_decoded_as_before,
    load_resized,
    reader_version,
)
from src.utils.errors import UserError, counted
from src.utils.files import exclusive_lock, open_no_link, sync_folder, write_atomic

CHUNK = 512  # images between two journal writes; an interruption loses at most two chunks


def store_size(image_size: int) -> int:
    """Return the side of the stored squares: a little larger than the input, for random crops."""
    return image_size * 15 // 14


class PixelStore:
    """Decoded images in one memory-mapped file.

    Attributes:
        pixels: (rows, size, size, 3) uint8, read-only.
        rows: image name -> its row in `pixels`.
        failed: image name -> why it could not be decoded.

    Files: `pixels_<size>.uint8` holds the rows one after another, and `pixels_<size>.jsonl` is a
    journal with a line for each decoded image: its row, and the size and time of its file. A line
    is written only after its pixels, so an interrupted build continues where it stopped, and an
    image that changed is decoded again. A broken image is remembered until it or the version of the
    reader changes, a read error is not.
    """

    def __init__(self, pixels: np.ndarray, rows: dict[str, int], failed: dict[str, str]) -> None:
        self.pixels = pixels
        self.rows = rows
        self.failed = failed

    @classmethod
    def build(
        cls, folder: Path, images: Path, names: list[str], size: int, workers: int | None = None,
        follow_links: bool = False,
    ) -> PixelStore:
        """Decode the images of `names` that are new or have changed, and open the store.

        Args:
            folder: where the store is, created if missing.
            images: the image folder.
            names: paths relative to it.
            size: side of the stored squares in pixels.
            workers: decoding threads; None for one per core (Pillow releases the GIL).
            follow_links: also read files outside `images` that a link points to.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        try:
            with exclusive_lock(folder / f"pixels_{size}.lock",
                                "waiting for another process to decode the images"):
                return cls._build_locked(folder, images, names, size, workers, follow_links)
        except OSError as error:
            raise UserError(f"cannot keep decoded pixels in {folder}: {error.strerror or error}; "
                            "choose another place with --cache-dir") from error

    @classmethod
    def _build_locked(
        cls, folder: Path, images: Path, names: list[str], size: int, workers: int | None,
        follow_links: bool,
    ) -> PixelStore:
        data, journal = folder / f"pixels_{size}.uint8", folder / f"pixels_{size}.jsonl"
        row_bytes = size * size * 3
        entries = _read_journal(journal, data, row_bytes)
        outside = set() if follow_links else find_escaping_links(images, names)
        signatures = {name: _signature(images / name) for name in names if name not in outside}
        _check_decoder(journal, images, signatures, entries)
        stale = [name for name, signature in signatures.items()
                 if name not in entries or entries[name]["signature"] != signature]
        if stale:
            next_row = 1 + max((entry["row"] for entry in entries.values()), default=-1)
            rows = {}
            for name in stale:
                rows[name] = entries[name]["row"] if name in entries else next_row
                next_row = max(next_row, rows[name] + 1)
            needed = next_row * row_bytes
            _check_disk(folder, data, needed, len(stale))
            try:
                _decode_into(data, journal, images, rows, signatures, entries, size, workers)
            except OSError as error:
                raise UserError(
                    f"{data} cannot grow to the {needed:,} bytes that the images need: "
                    f"{error.strerror or error}. What is decoded is kept: free some space, or "
                    "choose another place with --cache-dir, and start again") from error
        for name in outside:
            entries[name] = {"error": "a link to a file outside the image folder: put "
                                      "the image itself there, or use --follow-links"}
        n_rows = data.stat().st_size // row_bytes if data.exists() else 0
        pixels = (np.memmap(data, np.uint8, "r", shape=(n_rows, size, size, 3)) if n_rows
                  else np.zeros((0, size, size, 3), np.uint8))
        wanted = {name: entries[name] for name in names}
        return cls(
            pixels,
            {name: entry["row"] for name, entry in wanted.items() if not entry["error"]},
            {name: entry["error"] for name, entry in wanted.items() if entry["error"]},
        )


def _signature(path: Path) -> list[int]:
    """Return size and modification time of a file, to detect changes; [-1, -1] without a file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _read_journal(journal: Path, data: Path, row_bytes: int) -> dict[str, dict]:
    """Return the last journal entry of each image; incomplete lines and lost rows are skipped."""
    entries: dict[str, dict] = {}
    if not journal.exists():
        return entries
    n_rows = data.stat().st_size // row_bytes if data.exists() else 0
    for line in journal.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if 0 <= entry["row"] < n_rows and {"signature", "error"} <= entry.keys():
                entries[entry["name"]] = entry
    return entries


def _check_decoder(
    journal: Path, images: Path, signatures: dict[str, list[int]], entries: dict[str, dict]
) -> None:
    """Remove entries that the present decoder may change, and mark the others as its own."""
    old = [name for name, entry in entries.items() if name in signatures
           and entry["signature"] == signatures[name]
           and entry.get("decoder") != (reader_version() if entry["error"] else DECODER)]
    if not old:
        return
    print(f"an earlier version decoded {counted(len(old), 'images')}: looking for color profiles "
          "and formats that it did not know")
    for name in old:
        if not entries[name]["error"] and is_decoded_as_before(images / name):
            entries[name]["decoder"] = DECODER
        else:  # keeps the row
            entries[name]["signature"] = None
    write_atomic(journal, "".join(json.dumps(entry) + "\n" for entry in entries.values()).encode())


def _check_disk(folder: Path, data: Path, needed: int, n_images: int) -> None:
    """Print the size of the store; raise UserError if the disk does not have the space."""
    extra = max(0, needed - (data.stat().st_size if data.exists() else 0))
    free = shutil.disk_usage(folder).free
    print(f"decoding {counted(n_images, 'images')} once to {data}: {extra / 1e9:.2f} GB, "
          f"{free / 1e9:.1f} GB free")
    if extra > free:
        raise UserError(
            f"the decoded images need {extra:,} more bytes in {folder}, where {free:,} are free: "
            "free some space, choose another place with --cache-dir, or take fewer images with "
            "--max-images or smaller ones with --image-size"
        )


def _decode_into(
    data: Path, journal: Path, images: Path, rows: dict[str, int],
    signatures: dict[str, list[int]], entries: dict[str, dict], size: int, workers: int | None,
) -> None:
    """Decode the images of `rows` into the data file, and write the journal."""
    # First drop the lines of the images to decode, and of rows that the data file has lost: once
    # the file has grown again, such a line would point to the pixels of another image.
    kept = [entry for name, entry in entries.items() if name not in rows]
    write_atomic(journal, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
    # Rows are written, not mapped: a full disk is then an OSError, not a SIGBUS.
    descriptor = open_no_link(data, os.O_RDWR | os.O_CREAT)

    def decode(name: str) -> bool:
        """Decode an image into `entries`; return False if another try may succeed."""
        entry = entries[name] = {
            "name": name, "row": rows[name], "signature": signatures[name], "error": "",
            "decoder": DECODER}
        pixels = np.zeros((size, size, 3), np.uint8)
        try:
            pixels = load_resized(images / name, size)
        except ReadError as error:
            entry["error"] = str(error)
            return False
        except ValueError as error:
            entry |= {"error": str(error), "decoder": reader_version()}
        view, offset = memoryview(pixels).cast("B"), rows[name] * size * size * 3
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
        return True

    pool = ThreadPoolExecutor(workers or os.cpu_count())
    names = list(rows)
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    waiting: deque[tuple[list[str], list[Future]]] = deque()
    try:
        with (open(journal, "a", encoding="utf-8") as log,
              tqdm(total=len(rows), desc="decoding", unit="image", leave=False,
                   disable=None) as bar):
            for chunk in [*chunks, []]:  # one chunk ahead: no core idles during a flush
                waiting.append((chunk, [pool.submit(decode, name) for name in chunk]))
                if len(waiting) < 2:
                    continue
                lines = []
                for name, future in zip(*waiting.popleft(), strict=True):
                    if future.result():
                        lines.append(json.dumps(entries[name]) + "\n")
                    bar.update()
                os.fsync(descriptor)  # the pixels first, then their journal lines
                log.writelines(lines)
                log.flush()
                os.fsync(log.fileno())
        sync_folder(data.parent)
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(descriptor)
