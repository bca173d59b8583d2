"""A float32 matrix on disk, and a JSON file that describes it.

NAME.json holds plain values and names a .npy file, which numpy, FAISS or a vector database reads as
it is. The files may be untrusted: nothing in them can run code, and no memory is allocated for more
than the files hold.
"""

from __future__ import annotations

import io
import json
import uuid
from pathlib import Path

import numpy as np

from src.utils.files import write_atomic

MAX_JSON_BYTES = 1 << 30  # the names of about ten million images


def save_matrix(folder: Path, name: str, content: dict, matrix: np.ndarray) -> None:
    """Write an (N, D) matrix and the plain values of `content`.

    The matrix gets a new file name each time, so the JSON file never describes another matrix.
    Matrices of earlier or killed calls are removed; there must be only one writer at a time.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(matrix, np.float32))
    file = f"{name}-{uuid.uuid4().hex[:8]}.npy"
    write_atomic(folder / file, buffer.getbuffer())
    text = json.dumps({**content, "embeddings": file})
    write_atomic(folder / f"{name}.json", text.encode("ascii"))
    for old in [*folder.glob(f"{name}-*.npy"), *folder.glob(f".{name}-*.tmp")]:
        if old.name != file:
            old.unlink(missing_ok=True)


def load_matrix(folder: Path, name: str) -> tuple[dict, np.ndarray]:
    """Return the plain values and the (N, D) matrix of `save_matrix`; the matrix is memory-mapped.

    Raises:
        FileNotFoundError: there is no such matrix.
        ValueError: the files are damaged, or hold something else.
    """
    description = folder / f"{name}.json"
    if not description.exists():
        raise FileNotFoundError(description)
    try:
        content = json.loads(_check_file(description, MAX_JSON_BYTES).read_bytes())
        path = _check_file(folder / Path(content["embeddings"]).name)
        with np.errstate(over="raise"):  # the size of an absurd shape overflows
            # Copy-on-write: nothing writes to it, but torch warns about read-only arrays.
            mapped = np.lib.format.open_memmap(path, mode="c")
    except (OSError, KeyError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if mapped.ndim != 2 or mapped.dtype != np.dtype("<f4") or not mapped.flags.c_contiguous \
            or mapped.offset + mapped.nbytes != path.stat().st_size:
        raise ValueError(f"{path.name} holds {mapped.dtype} of shape {mapped.shape}")
    matrix = np.asarray(mapped)
    with np.errstate(all="ignore"):
        if not np.isfinite(matrix.sum()):  # one NaN or infinity makes the sum so
            raise ValueError(f"{path.name} holds numbers that are not finite")
    return content, matrix


def _check_file(path: Path, max_bytes: float = float("inf")) -> Path:
    """Return `path`; raise ValueError if it is not a regular file or too large.

    Reading a pipe would block, and an endless device would fill the memory.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is not a file")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes")
    return path
