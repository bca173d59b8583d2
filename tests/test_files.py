"""Whole-or-nothing writes, locks, and loading that runs no code."""

from __future__ import annotations

import errno
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import src.files
from src.errors import UserError
from src.files import exclusive_lock, fingerprint, load_tensors, save_tensors, write_atomic


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    """Parents are made, the old content is gone, nothing else is left behind."""
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"a long first content")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """With a full disk at any step the old file is intact, no temporary stays, the size is told."""
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(src.files.os, step, full)
    with pytest.raises(UserError, match=r"1,000 bytes.*No space"):
        write_atomic(path, b"n" * 1000)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    """Parents that cannot be made are the user's to mend."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "file" / "below", b"")


def test_a_folder_in_place_of_the_file_is_told(tmp_path: Path) -> None:
    """A folder is not replaced, and no temporary file stays beside it."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(tmp_path / "folder", b"x")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


def test_tensors_come_back(tmp_path: Path) -> None:
    """What save_tensors writes load_tensors reads, equal."""
    content = {"a": torch.arange(5), "b": {"c": [1, 2.5, "x", True]}}
    save_tensors(tmp_path / "t.pth", content)
    loaded = load_tensors(tmp_path / "t.pth")
    assert torch.equal(loaded["a"], content["a"]) and loaded["b"] == content["b"]


class Bomb:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_code_in_a_file_never_runs(tmp_path: Path, writer: str) -> None:
    """A pickle made to run code is refused, and its code has not run."""
    target = tmp_path / "ran"
    with open(tmp_path / "evil.pth", "wb") as file:
        (pickle.dump if writer == "pickle" else torch.save)({"model_state": Bomb(target)}, file)
    with pytest.raises(UserError, match="run code"):
        load_tensors(tmp_path / "evil.pth")
    assert not target.exists()


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """Missing, a folder, text, empty, cut short, not a dictionary: one message each."""
    save_tensors(tmp_path / "good.pth", {"a": torch.zeros(1000)})
    whole = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "text.pth").write_text("weights, honestly")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    for name in ("missing.pth", ".", "text.pth", "empty.pth", "cut.pth", "tensor.pth"):
        with pytest.raises(UserError, match=str(tmp_path)):
            load_tensors(tmp_path / name)


CONTENT = {"a": torch.arange(5), "b": {"c": [1, 2.5, "x", True]}}
ZIPPED, LEGACY = io.BytesIO(), io.BytesIO()
torch.save(CONTENT, ZIPPED)
torch.save(CONTENT, LEGACY, _use_new_zipfile_serialization=False)
STARTS = [b"", ZIPPED.getvalue(), LEGACY.getvalue(), pickle.dumps({"a": [1, "x"]}, 2)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(STARTS), cut=st.integers(0, 5000), added=st.binary(max_size=20),
       bytes_=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4))
@example(start=b"", cut=0, added=b".", bytes_=[])  # pops from an empty stack
@example(start=b"", cut=0, added=b"]e.", bytes_=[])  # no mark to pop
@example(start=b"", cut=0, added=b"J\x00", bytes_=[])  # half a number
def test_any_bytes_are_loaded_or_refused(
    tmp_path: Path, start: bytes, cut: int, added: bytes, bytes_: list[tuple[int, int]]
) -> None:
    """However a file is damaged, it gives a dictionary or a UserError, never another exception."""
    content = bytearray(start)
    for place, byte in bytes_ if content else []:
        content[place % len(content)] = byte
    if cut < len(content):
        del content[cut:]
    (tmp_path / "any.pth").write_bytes(content + added)
    try:
        assert isinstance(load_tensors(tmp_path / "any.pth"), dict)
    except UserError as error:
        assert str(tmp_path / "any.pth") in str(error)


def test_the_lock_keeps_another_process_out(tmp_path: Path) -> None:
    """While the block runs a second process cannot take the lock; afterwards it can."""
    script = ("import fcntl, sys\n"
              "fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)")
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    with exclusive_lock(tmp_path / "lock"):
        assert subprocess.run(command, capture_output=True).returncode != 0
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    """Equal bytes, equal fingerprint, under any name; one bit more is another."""
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    with pytest.raises(UserError):
        fingerprint(tmp_path / "missing")
