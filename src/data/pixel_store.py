"""Photos on disk -> one memory-mapped uint8 file: each is decoded once, ever.

Decoding a JPEG costs some 3 ms, copying its pixels from the map some 10 us; training on five
captions a photo for five epochs would otherwise decode every photo 25 times.
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

from src.data.images import ReadError, find_escaping_links, load_resized
from src.utils.errors import UserError
from src.utils.files import exclusive_lock, open_no_link, sync_folder, write_atomic

CHUNK = 512  # photos between two journal writes: an interruption may cost two such


def store_size(image_size: int) -> int:
    """Side of the stored squares: a little larger than the input, for the random crop."""
    return image_size * 15 // 14


class PixelStore:
    """Photos as rows of one memory-mapped file.

    Attributes:
        pixels: (rows, size, size, 3) uint8, read-only.
        rows: photo name -> its row.
        failed: photo name -> why it could not be decoded.

    On disk lie `pixels_<size>.uint8`, the rows one after another, and `pixels_<size>.jsonl`, one
    line for each decoded photo with its row and the file's size and time. A line is written only
    after its pixels, so an interrupted build goes on where it stopped, and a photo that changed
    is decoded again. What is wrong with a picture is remembered, a failure of the disk is not.
    """

    def __init__(self, pixels: np.ndarray, rows: dict[str, int], failed: dict[str, str]) -> None:
        self.pixels = pixels
        self.rows = rows
        self.failed = failed

    @classmethod
    def build(
        cls, folder: Path, images: Path, names: list[str], size: int, workers: int | None = None
    ) -> PixelStore:
        """Open the store in `folder`, decoding first what of `names` is new or has changed.

        Args:
            folder: where the store lies, made if need be.
            images: the photos' folder; `names` are relative to it.
            size: side of the stored squares in pixels.
            workers: decoding threads; None for one a core (Pillow decodes outside Python's lock).

        Raises:
            UserError: not enough disk, or the folder cannot be written.
        """
        try:
            with exclusive_lock(folder / f"pixels_{size}.lock",
                                "waiting for another process to decode the images"):
                return cls._build_locked(folder, images, names, size, workers)
        except OSError as error:
            raise UserError(f"cannot keep decoded pixels in {folder}: {error.strerror or error}; "
                            "choose another place with --cache-dir") from error

    @classmethod
    def _build_locked(
        cls, folder: Path, images: Path, names: list[str], size: int, workers: int | None
    ) -> PixelStore:
        data, journal = folder / f"pixels_{size}.uint8", folder / f"pixels_{size}.jsonl"
        row_bytes = size * size * 3
        entries = _read_journal(journal, data, row_bytes)
        outside = find_escaping_links(images, names)
        signatures = {name: _signature(images / name) for name in names if name not in outside}
        stale = [name for name, signature in signatures.items()
                 if name not in entries or entries[name]["signature"] != signature]
        if stale:
            next_row = 1 + max((entry["row"] for entry in entries.values()), default=-1)
            rows = {}
            for name in stale:
                rows[name] = entries[name]["row"] if name in entries else next_row
                next_row = max(next_row, rows[name] + 1)
            needed = next_row * row_bytes
            _check_disk(folder, data, needed, len(stale), size)
            try:
                _decode_into(data, journal, images, rows, signatures, entries, size, workers)
            except OSError as error:
                raise UserError(
                    f"{data} cannot grow to the {needed:,} bytes that the photos need: "
                    f"{error.strerror or error}. What is decoded is kept: make room, or choose "
                    "another place with --cache-dir, and start again") from error
        for name in outside:
            entries[name] = {"error": "a link that leads out of the folder of photos: "
                                      "put the photo itself there"}
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
    """Size and time of a file, to notice a change; [-1, -1] where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return [-1, -1]
    return [status.st_size, status.st_mtime_ns]


def _read_journal(journal: Path, data: Path, row_bytes: int) -> dict[str, dict]:
    """Photo name -> its last journal entry. Lines half written or without pixels do not count."""
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


def _check_disk(folder: Path, data: Path, needed: int, n_photos: int, size: int) -> None:
    """Say what the store takes, and refuse where the disk does not have it."""
    extra = max(0, needed - (data.stat().st_size if data.exists() else 0))
    free = shutil.disk_usage(folder).free
    print(f"decoding {n_photos:,} photos once to {size}x{size}: {needed / 1e9:.2f} GB in {data} "
          f"({extra / 1e9:.2f} GB more, {free / 1e9:.1f} GB free)")
    if extra > free:
        raise UserError(
            f"the decoded photos need {extra:,} bytes more in {folder}, where {free:,} are free: "
            "make room, choose another place with --cache-dir, or take fewer photos with "
            "--max-images or smaller ones with --image-size"
        )


def _decode_into(
    data: Path, journal: Path, images: Path, rows: dict[str, int],
    signatures: dict[str, list[int]], entries: dict[str, dict], size: int, workers: int | None,
) -> None:
    """Decode the photos of `rows` into their rows of the data file and note them in the journal."""
    # First the journal without the photos to come, and without rows that the data file has lost:
    # such a line would come true again, for another photo's pixels, once the file has grown.
    kept = [entry for name, entry in entries.items() if name not in rows]
    write_atomic(journal, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
    # Rows are written, not mapped: a full disk is then an error that can be told, not a SIGBUS.
    descriptor = open_no_link(data, os.O_RDWR | os.O_CREAT)

    def decode(name: str) -> bool:
        """Whether the outcome, now among `entries`, will be the same another time."""
        entry = entries[name] = {
            "name": name, "row": rows[name], "signature": signatures[name], "error": ""}
        pixels = np.zeros((size, size, 3), np.uint8)
        try:
            pixels = load_resized(images / name, size)
        except ReadError as error:
            entry["error"] = str(error)
            return False
        except ValueError as error:
            entry["error"] = str(error)
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
              tqdm(total=len(rows), desc="decoding", unit="photo") as bar):
            for chunk in [*chunks, []]:  # one chunk ahead, so that no core idles during a flush
                waiting.append((chunk, [pool.submit(decode, name) for name in chunk]))
                if len(waiting) < 2:
                    continue
                lines = []
                for name, future in zip(*waiting.popleft(), strict=True):
                    if future.result():
                        lines.append(json.dumps(entries[name]) + "\n")
                    bar.update()
                os.fsync(descriptor)  # pixels first, then the lines that vouch for them
                log.writelines(lines)
                log.flush()
                os.fsync(log.fileno())
        sync_folder(data.parent)
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(descriptor)
