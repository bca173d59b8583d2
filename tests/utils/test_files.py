"""Atomic writes, and locks."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import src.utils.files
from src.utils.errors import UserError
from src.utils.files import (
    exclusive_lock,
    fingerprint,
    only_writer,
    write_atomic,
)


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    """Parent folders are created, the old content is replaced, and no other file remains."""
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"a long first content")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """If the disk is full at any step the old file is intact, no temporary file remains, and the
    message names the size."""
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(src.utils.files.os, step, full)
    with pytest.raises(UserError, match=r"1,000 bytes.*No space"):
        write_atomic(path, b"n" * 1000)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(small_disk: Path) -> None:
    """The same on a real disk of one megabyte; content that fits can be written afterwards."""
    path = small_disk / "file"
    write_atomic(path, b"o" * 300_000)
    with pytest.raises(UserError, match=r"2,000,000 bytes.*No space"):
        write_atomic(path, b"n" * 2_000_000)
    assert path.read_bytes() == b"o" * 300_000 and list(small_disk.iterdir()) == [path]
    write_atomic(path, b"n" * 600_000)
    assert path.read_bytes() == b"n" * 600_000


def test_a_read_only_folder_is_an_error(small_disk: Path) -> None:
    """Nothing is written, and the existing file is intact."""
    write_atomic(small_disk / "file", b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="cannot write .*Read-only"):
        write_atomic(small_disk / "file", b"new")
    assert (small_disk / "file").read_bytes() == b"old"


def test_the_temporary_file_of_a_killed_writer_is_overwritten(tmp_path: Path) -> None:
    """Half-written temporary files do not accumulate."""
    (tmp_path / ".file.tmp").write_bytes(b"half of something longer than the new content")
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


# Run in a process of its own, which forks: the k-th child kills itself by SIGKILL at its k-th
# system call, until one reaches the end.
KILLED = """
import builtins, fcntl, os, signal, sys
from pathlib import Path
import src.utils.files
path = Path(sys.argv[1])

def write(last_call):
    calls = [0]
    def counted(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == last_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for owner, name in ((os, "fsync"), (os, "replace"), (os, "open"), (builtins, "open"),
                        (fcntl, "flock"), (os, "fstat"), (os, "close")):
        setattr(owner, name, counted(getattr(owner, name)))
    src.utils.files.write_atomic(path, b"new" * 100)
    os._exit(0)

outcomes = []
for last_call in range(1, 1000):
    path.write_bytes(b"old")
    child = os.fork() or write(last_call)
    status = os.waitpid(child, 0)[1]
    outcomes.append({b"old": "o", b"new" * 100: "n"}[path.read_bytes()])
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
print("".join(outcomes))
"""


def test_a_writer_killed_at_every_call_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    """The old file before the renaming, the new one after it, and never anything else."""
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "file"], capture_output=True,
                         text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    assert re.fullmatch("o{4,}n{2,}\n", run.stdout)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Where a folder holds symbolic links under the names that are written, the files that they
    point to are not changed."""
    (tmp_path / "private").write_text("mine")
    for name in ("lock", ".lock", "file", ".other.tmp"):
        (tmp_path / name).symlink_to("private")
    write_atomic(tmp_path / "file", b"new")
    assert not (tmp_path / "file").is_symlink()
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "other", b"new")
    with pytest.raises(OSError), exclusive_lock(tmp_path / "lock"):
        pass
    with pytest.raises(UserError, match="cannot write"), only_writer(tmp_path):
        pass
    assert (tmp_path / "private").read_text() == "mine"


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    """With concurrent writers the file is always one of theirs, complete, and no temporary file
    remains."""
    contents = [bytes([i]) * (200_000 + i) for i in range(4)]
    seen = set()

    def write(content: bytes) -> None:
        for _ in range(15):
            write_atomic(tmp_path / "file", content)
            seen.add((tmp_path / "file").read_bytes() in contents)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert seen == {True} and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    """A parent folder that cannot be created is a UserError."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below", b"")


def test_a_folder_in_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    """A folder is not replaced, and no temporary file remains."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "folder", b"x")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_the_lock_keeps_another_process_out(tmp_path: Path) -> None:
    """A second process cannot take the lock while the block runs; afterwards it can."""
    script = ("import fcntl, sys\n"
              "fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)")
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    with exclusive_lock(tmp_path / "lock"):
        assert subprocess.run(command, capture_output=True).returncode != 0
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    """Files with equal bytes have equal fingerprints under any name; others do not."""
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    with pytest.raises(UserError):
        fingerprint(tmp_path / "missing")
