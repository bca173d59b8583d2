"""The door to the disk: whole-or-nothing writes, one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from src.utils.errors import UserError


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


def content_digest(path: Path) -> str:
    """Return a BLAKE2b digest of a file's content as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's content, in hex. Raises UserError where there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
