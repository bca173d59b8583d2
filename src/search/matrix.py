"""Rows of float32 on disk, and the JSON beside them that says what they are.

NAME.json holds plain values and names a .npy, which numpy, FAISS or a vector database reads as it
is. Such a folder may come from a stranger: nothing in it can run, and no memory is taken for more
than the files hold.
"""

from __future__ import annotations

import io
import json
import math
import uuid
from pathlib import Path

import numpy as np

from src.utils.files import write_atomic

MAX_JSON_BYTES = 1 << 30  # the names of some ten million photos


def save_matrix(folder: Path, name: str, content: dict, matrix: np.ndarray) -> None:
    """Write (N, D) rows and the plain values of `content`.

    The rows get a file of a new name, so that at no moment the JSON speaks of other rows. One
    writer at a time: what an earlier or a killed one left of its rows is removed.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    rows = io.BytesIO()
    np.save(rows, np.ascontiguousarray(matrix, np.float32))
    file = f"{name}-{uuid.uuid4().hex[:8]}.npy"
    write_atomic(folder / file, rows.getbuffer())
    text = json.dumps({**content, "embeddings": file})
    write_atomic(folder / f"{name}.json", text.encode("ascii"))
    for old in [*folder.glob(f"{name}-*.npy"), *folder.glob(f".{name}-*.tmp")]:
        if old.name != file:
            old.unlink(missing_ok=True)


def load_matrix(folder: Path, name: str) -> tuple[dict, np.ndarray]:
    """What `save_matrix` wrote: the plain values and the rows, memory-mapped.

    Raises:
        FileNotFoundError: nothing was written there.
        ValueError: something else lies there, or a part of it.
    """
    description = folder / f"{name}.json"
    if not description.exists():
        raise FileNotFoundError(description)
    try:
        content = json.loads(_regular(description, MAX_JSON_BYTES).read_bytes())
        path = _regular(folder / Path(content["embeddings"]).name)
        matrix = _map_rows(path)
    except (OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    with np.errstate(all="ignore"):
        if not np.isfinite(matrix.sum()):  # one bad number is in the sum, too
            raise ValueError(f"{path.name} holds what is no number")
    return content, matrix


def _map_rows(path: Path) -> np.ndarray:
    """The (N, D) float32 of a .npy, memory-mapped. Raises ValueError where it holds other things.

    Not numpy's own open_memmap, which multiplies any shape that the file names, and overflows.
    """
    with open(path, "rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path.name} is no .npy of version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    if len(shape) != 2 or min(shape) < 0 or dtype != np.dtype("<f4") or fortran \
            or start + 4 * math.prod(shape) != path.stat().st_size:
        raise ValueError(f"{path.name} holds {dtype} of shape {shape}")
    # Copy-on-write: nothing writes to it, but torch warns of arrays that forbid it.
    return np.asarray(np.memmap(path, dtype, "c", start, shape))


def _regular(path: Path, most: float = float("inf")) -> Path:
    """`path`, if it is a file of at most so many bytes; a pipe would be read for ever."""
    if not path.is_file():
        raise ValueError(f"{path.name} is no file")
    if path.stat().st_size > most:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes")
    return path
