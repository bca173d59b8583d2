"""Atomic writes, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

from src.utils.errors import UserError, print_message

# Errors of file systems without locks: Lustre without -o flock, NFS without its lock daemon.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Errors of file systems that cannot flush a folder: CIFS, vboxsf.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file `path` by `data`: after a crash it is the old file or the new one, complete.

    A temporary file in the same folder is written, flushed to the disk and renamed; then the folder
    is flushed, since it holds the new name. Missing parent folders are created.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _open_locked(temporary) as file:
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


def _open_locked(path: Path) -> BinaryIO:
    """Open `path` empty and locked; a second writer waits until the first is done.

    The name is always the same, so a file left by a killed writer is overwritten.
    """
    while True:
        # Append mode: "wb" would truncate the file that another writer is writing.
        file = open(path, "ab", opener=open_no_link)
        with contextlib.suppress(FileNotFoundError):
            _lock(file)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                return file
        file.close()  # the other writer has renamed it: this is the finished file now


def open_no_link(path: Path | str, flags: int) -> int:
    """Open as os.open does, but raise OSError if `path` is a symbolic link.

    A data folder from someone else may hold a link to a file of the user.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextlib.contextmanager
def replace_on_success(path: Path) -> Iterator[Path]:
    """Yield the name of a new file, which replaces `path` if the block ends without an error.

    Otherwise the new file is removed, and an earlier file `path` is intact.

    Raises:
        UserError: the file cannot be renamed.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
        try:
            new.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, new names and renames, to the disk, if the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive_lock(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold a lock on the file `path` while the block runs; a second process waits for the first.

    The kernel releases the lock when the process ends, even if it is killed.

    Args:
        path: the lock file, created if it is missing.
        waiting: message for standard error if another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", opener=open_no_link) as file:
        try:
            _lock(file, wait=False)
        except BlockingIOError:
            if waiting and _is_main():
                print_message(waiting)
            _lock(file)
        yield


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make this the only process that writes results to `folder` while the block runs.

    Raises:
        UserError: another process is writing there, or the folder cannot be written.
    """
    try:
        file = open(folder / ".lock", "ab", opener=open_no_link)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    with file:
        try:
            _lock(file, wait=False)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {folder}: wait for it, or choose another "
                            "folder with --results-dir") from error
        yield


def _lock(file: BinaryIO, wait: bool = True) -> None:
    """Lock an open file; where the file system has no locks, print a note and continue.

    Raises:
        BlockingIOError: not `wait`, and another process has the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _note_missing_locks()


@cache  # once per process
def _note_missing_locks() -> None:
    if _is_main():
        print_message("note: this file system has no file locks, so a second run that writes to "
                      "the same folder cannot be noticed: give each run its own --results-dir")


def _is_main() -> bool:
    """Return whether this is rank 0, without importing torch."""
    return os.environ.get("RANK", "0") == "0"


def content_digest(path: Path) -> str:
    """Return a BLAKE2b digest of a file's content as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
