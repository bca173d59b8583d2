"""The door to the disk: whole-or-nothing writes, one writer at a time, safe loading of tensors."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from src.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader, or a power cut, finds the old file or the new one.

    A temporary file in the same folder is written, flushed to the disk and renamed; the folder is
    flushed too, since the new name lives there. Parent folders are made.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({len(data):,} bytes): {error.strerror or error}"
        ) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` while the block runs; a second process waits here for the first.

    The kernel lets go of the lock when the process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Raises UserError where there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values with torch.save; whole or not at all, as `write_atomic`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain values onto the CPU. Code in the file is never run.

    Raises:
        UserError: no such file, cut short, not such a file, or one that asks to run code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles; they are refused below, or harmless
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a file") from error
    except Exception as error:  # torch raises anything at all on bytes that it did not write
        raise UserError(
            f"{path} cannot be read as a file of tensors: cut short, of another kind, or made to "
            "run code on loading"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not a dictionary of tensors")
    return content
