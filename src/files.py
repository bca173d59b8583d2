"""The door to the disk: whole-or-nothing writes, one writer at a time, safe loading of tensors."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from src.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader, or a power cut, finds the old file or the new one.

    A temporary file in the same folder is written, flushed to the disk and renamed; the folder is
    flushed too, since the new name lives there. Parent folders are made.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_alone(temporary) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({len(data):,} bytes): {error.strerror or error}"
        ) from error


def _open_alone(path: Path) -> BinaryIO:
    """Open `path`, empty, for this writer alone; a second one waits until the first is done.

    The name is always the same, so what a killed writer left is written over, not left for ever.
    """
    while True:
        # Not "wb", which would cut what another writer is at.
        file = open(path, "ab", opener=open_no_link)
        with contextlib.suppress(FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                return file
        file.close()  # the other writer has renamed it meanwhile: it is in use under its name


def open_no_link(path: Path | str, flags: int) -> int:
    """os.open, but not through a link: a stranger's data folder may hold one to a file of the user.

    Raises OSError where `path` is a link.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries (new names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive_lock(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold the lock file `path` while the block runs; a second process waits here for the first.

    The kernel lets go of the lock when the process ends, however it ends.

    Args:
        waiting: what to say on standard error before waiting for another process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", opener=open_no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the one process that writes to `folder` while the block runs.

    Raises:
        UserError: another process is at it, which is let be; or the folder cannot be written.
    """
    try:
        file = open(folder / ".lock", "ab", opener=open_no_link)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {folder}: wait for it, or choose another "
                            "place with --results-dir") from error
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
        UserError: no such file, cut short, not such a file, or one that asks to run code or for
            more memory than the file is long.
    """
    _refuse_packed(path)
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


def _refuse_packed(path: Path) -> None:
    """Refuse an archive that unpacks to more than its own size: torch writes none, bombs are such.

    Raises:
        UserError: `path` is one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # no archive, or a broken one, of which zipfile says anything at all
        return
    size = path.stat().st_size
    if unpacked > size:
        raise UserError(f"{path} has {size:,} bytes and unpacks to {unpacked:,}: "
                        "it is not a file that this project wrote")
