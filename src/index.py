"""An index of a folder of photos: embeddings on disk, brought up to date and searched exactly.

On disk lie `index.json` and the matrix it names, a plain .npy of float32 unit rows that numpy,
FAISS or a vector database reads as it is; row i belongs to the i-th name.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from src.errors import UserError
from src.files import exclusive_lock, write_atomic
from src.image_file import load_square
from src.model import DualEncoder
from src.pixels import store_size
from src.retrieval import embed_pixels

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
BATCH_SIZE = 64
SAVE_SECONDS = 30.0  # at most this much work is lost to a power cut
BLOCK_ROWS = 16_384  # 16 MB of float32: read from memory once, scored and forgotten


@dataclass
class ImageIndex:
    """Embeddings of the photos of one folder, made with one checkpoint.

    Attributes:
        checkpoint: fingerprint of the weights that made the embeddings.
        names: N paths relative to the folder, sorted.
        signatures: N pairs (bytes, time of change in ns), to notice a changed photo.
        embeddings: (N, D) float32 of unit length, often memory-mapped.
        failed: what could not be read: path -> [reason, signature].
    """

    checkpoint: str
    names: list[str] = field(default_factory=list)
    signatures: list[list[int]] = field(default_factory=list)
    embeddings: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    failed: dict[str, list] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, checkpoint: str) -> ImageIndex:
        """The index kept in `folder`; an empty one where there is none that fits `checkpoint`."""
        try:
            content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            # Mapped copy-on-write: nothing writes to it, but torch warns of arrays that forbid it.
            index = cls(content["checkpoint"], content["names"], content["signatures"],
                        np.load(folder / Path(content["embeddings"]).name, mmap_mode="c"),
                        content["failed"])
        except FileNotFoundError:
            return cls(checkpoint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"the index in {folder} is damaged and is built anew ({error})", file=sys.stderr)
            return cls(checkpoint)
        if index.checkpoint != checkpoint:
            print(f"the index in {folder} was made with another checkpoint and is built anew",
                  file=sys.stderr)
            return cls(checkpoint)
        if len(index.names) != len(index.embeddings) or len(index.names) != len(index.signatures):
            print(f"the index in {folder} is damaged and is built anew", file=sys.stderr)
            return cls(checkpoint)
        return index

    def save(self, folder: Path) -> None:
        """Write the index. The matrix gets a new name, so that at no moment names and rows differ.

        Raises:
            UserError: the folder cannot be written or the disk is full.
        """
        matrix = io.BytesIO()
        np.save(matrix, self.embeddings)
        file = f"embeddings-{uuid.uuid4().hex[:8]}.npy"
        write_atomic(folder / file, matrix.getvalue())
        write_atomic(folder / "index.json", json.dumps({
            "checkpoint": self.checkpoint, "embeddings": file, "names": self.names,
            "signatures": self.signatures, "failed": self.failed,
        }).encode("utf-8", "surrogatepass"))
        for old in folder.glob("embeddings-*.npy"):
            if old.name != file:
                old.unlink(missing_ok=True)

    def search(self, queries: np.ndarray | torch.Tensor, top: int) -> tuple[np.ndarray, np.ndarray]:
        """The exact nearest photos of some queries, in one pass over the matrix, block by block.

        Args:
            queries: (Q, D) float32 unit rows.
            top: how many; fewer where there are fewer photos.

        Returns:
            scores (Q, K) float32, falling, and rows (Q, K) int64. Equal scores keep no promised
            order.
        """
        queries = torch.as_tensor(queries)
        top = min(top, len(self.names))
        scores, rows = [torch.empty(len(queries), 0)], [torch.empty(len(queries), 0).long()]
        for start in range(0, len(self.names), BLOCK_ROWS):
            block = torch.from_numpy(self.embeddings[start : start + BLOCK_ROWS])
            best, places = (queries @ block.T).topk(min(top, len(block)), dim=1)
            scores.append(best)
            rows.append(places + start)
        best, places = torch.cat(scores, 1).topk(top, dim=1)
        return best.numpy(), torch.cat(rows, 1).gather(1, places).numpy()


def find_photos(images: Path) -> dict[str, list[int]]:
    """Every picture file below a folder: relative path -> [bytes, time of change in ns].

    Hidden files and folders are left out, and links to folders are not followed, so that the walk
    ends.

    Raises:
        UserError: there is no such folder.
    """
    if not images.is_dir():
        raise UserError(f"there is no folder of photos {images}; give one with --images")
    found = {}
    for folder, subfolders, files in os.walk(images):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for file in files:
            path = os.path.join(folder, file)
            if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith("."):
                with contextlib.suppress(OSError):  # a link to nowhere
                    status = os.stat(path)
                    found[os.path.relpath(path, images)] = [status.st_size, status.st_mtime_ns]
    return found


def update_index(
    folder: Path, images: Path, checkpoint: str, model: DualEncoder
) -> ImageIndex:
    """Bring the index in `folder` up to date with the photos below `images`, and return it.

    Photos that are new or have changed are embedded, those that are gone are dropped, unreadable
    ones are named and skipped until they change. Ctrl-C loses nothing that is done.

    Args:
        folder: where the index lies, made if need be.
        images: folder of photos, searched recursively.
        checkpoint: fingerprint of the weights.
        model: the model of those weights, in eval mode.

    Raises:
        UserError: no such folder of photos, none in it, or the index cannot be written.
    """
    try:
        with exclusive_lock(folder / "index.lock"):
            return _update_locked(folder, images, checkpoint, model)
    except OSError as error:
        raise UserError(f"cannot keep the index in {folder}: {error}") from error


def _update_locked(
    folder: Path, images: Path, checkpoint: str, model: DualEncoder
) -> ImageIndex:
    found = find_photos(images)
    index = ImageIndex.load(folder, checkpoint)
    current = dict(zip(index.names, index.signatures, strict=True))
    failed = {name: entry for name, entry in index.failed.items() if found.get(name) == entry[1]}
    new = [name for name in sorted(found)
           if current.get(name) != found[name] and name not in failed]
    keep = [row for row, name in enumerate(index.names)
            if name in found and current[name] == found[name]]
    if new or len(keep) < len(index.names) or failed != index.failed:
        index.failed = failed
        index.embeddings = index.embeddings[keep]
        index.names = [index.names[row] for row in keep]
        index.signatures = [index.signatures[row] for row in keep]
        _embed_new(index, folder, images, {name: found[name] for name in new}, model)
    if index.failed:
        print(f"{len(index.failed):,} files could not be read and are left out:", file=sys.stderr)
        for name, (reason, _) in index.failed.items():
            print(f"  {name}: {reason}", file=sys.stderr)
    if not index.names:
        raise UserError(f"there is no readable picture in {images}")
    return index


def _embed_new(
    index: ImageIndex, folder: Path, images: Path, new: dict[str, list[int]], model: DualEncoder
) -> None:
    """Embed the photos of `new` into the index and save it, now and then and whatever happens."""
    names, parts = [], []

    def settle() -> None:
        if parts:
            old = [index.embeddings] if len(index.embeddings) else []
            matrix = np.concatenate([*old, *parts])
            all_names = index.names + names
            order = sorted(range(len(all_names)), key=all_names.__getitem__)
            all_signatures = index.signatures + [new[name] for name in names]
            index.embeddings = matrix[order]
            index.names = [all_names[row] for row in order]
            index.signatures = [all_signatures[row] for row in order]
            names.clear()
            parts.clear()
        index.save(folder)

    try:
        saved = time.monotonic()
        if new:
            for batch, pixels in _decoded(images, list(new), model.config.image_size, index, new):
                parts.append(embed_pixels(model, torch.from_numpy(pixels)).numpy())
                names.extend(batch)
                if time.monotonic() - saved > SAVE_SECONDS:
                    settle()
                    saved = time.monotonic()
    finally:
        settle()


def _decoded(
    images: Path, names: list[str], image_size: int, index: ImageIndex, new: dict[str, list[int]]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Batches of decoded photos, (B, S, S, 3) uint8, the next one decoding while this one is used.

    Unreadable ones go to `index.failed`.
    """
    size = store_size(image_size)

    def decode(name: str) -> np.ndarray | str:
        try:
            return load_square(images / name, size)
        except ValueError as error:
            return str(error)

    batches = [names[i : i + BATCH_SIZE] for i in range(0, len(names), BATCH_SIZE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool, \
            tqdm(total=len(names), desc="indexing", unit="photo", disable=None) as bar:
        ahead = pool.map(decode, batches[0])
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            results = list(ahead)
            ahead = pool.map(decode, following)
            good = [(name, pixels) for name, pixels in zip(batch, results, strict=True)
                    if not isinstance(pixels, str)]
            for name, reason in zip(batch, results, strict=True):
                if isinstance(reason, str):
                    index.failed[name] = [reason, new[name]]
            if good:
                yield [name for name, _ in good], np.stack([pixels for _, pixels in good])
            bar.update(len(batch))
