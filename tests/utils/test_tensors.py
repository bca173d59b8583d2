"""Files of tensors load as they were saved; damaged and malicious files are refused."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from src.utils.errors import UserError
from src.utils.tensors import load_tensors, save_tensors

CONTENT = {"a": torch.arange(5), "b": {"c": [1, 2.5, "x", True]}}


def test_save_and_load_are_inverse(tmp_path: Path) -> None:
    """load_tensors returns what save_tensors was given."""
    save_tensors(tmp_path / "t.pth", CONTENT)
    loaded = load_tensors(tmp_path / "t.pth")
    assert torch.equal(loaded["a"], CONTENT["a"]) and loaded["b"] == CONTENT["b"]


class Malicious:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_code_in_a_file_does_not_run(tmp_path: Path, writer: str) -> None:
    """A pickle that contains code is refused, and the code has not run."""
    target = tmp_path / "ran"
    with open(tmp_path / "evil.pth", "wb") as file:
        (pickle.dump if writer == "pickle" else torch.save)(
            {"model_state": Malicious(target)}, file)
    with pytest.raises(UserError, match="run code"):
        load_tensors(tmp_path / "evil.pth")
    assert not target.exists()


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """A missing, empty, text, incomplete or other file gives a UserError that names it."""
    save_tensors(tmp_path / "good.pth", {"a": torch.zeros(1000)})
    whole = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "text.pth").write_text("no tensors")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    for name in ("missing.pth", ".", "text.pth", "empty.pth", "cut.pth", "tensor.pth"):
        with pytest.raises(UserError, match=str(tmp_path)):
            load_tensors(tmp_path / name)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """A small file that would unpack to gigabytes is refused; torch does not compress."""
    save_tensors(tmp_path / "good.pth", {"a": torch.zeros(10**6)})
    with (zipfile.ZipFile(tmp_path / "good.pth") as good,
          zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb):
        for entry in good.infolist():
            bomb.writestr(entry.filename, good.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 20_000
    with pytest.raises(UserError, match="unpacks to 4,0"):
        load_tensors(tmp_path / "bomb.pth")
    assert torch.equal(load_tensors(tmp_path / "good.pth")["a"], torch.zeros(10**6))


def test_tensors_larger_than_their_file_are_refused(tmp_path: Path) -> None:
    """An expanded view or a sparse tensor, which would take gigabytes when copied, is refused."""
    for name, huge in (("view", torch.zeros(1).expand(10**12)),
                       ("sparse", torch.sparse_coo_tensor(
                           [[], []], [], (10**6, 10**6), check_invariants=True))):
        save_tensors(tmp_path / name, {"a": [{"b": huge}], "c": torch.zeros(3)})
        with pytest.raises(UserError, match="1,000,000,000,000"):
            load_tensors(tmp_path / name)
    loop = [torch.zeros(2)]
    loop.append(loop)
    save_tensors(tmp_path / "loop", {"a": loop})
    assert torch.equal(load_tensors(tmp_path / "loop")["a"][0], torch.zeros(2))


ZIPPED, LEGACY = io.BytesIO(), io.BytesIO()
torch.save(CONTENT, ZIPPED)
torch.save(CONTENT, LEGACY, _use_new_zipfile_serialization=False)
STARTS = [b"", ZIPPED.getvalue(), LEGACY.getvalue(), pickle.dumps({"a": [1, "x"]}, 2)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(STARTS), cut=st.integers(0, 5000), added=st.binary(max_size=20),
       bytes_=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4))
@example(start=b"", cut=0, added=b".", bytes_=[])  # pops from an empty stack
@example(start=b"", cut=0, added=b"]e.", bytes_=[])  # no mark to pop
@example(start=b"", cut=0, added=b"J\x00", bytes_=[])  # an incomplete number
def test_any_file_is_loaded_or_refused(
    tmp_path: Path, start: bytes, cut: int, added: bytes, bytes_: list[tuple[int, int]]
) -> None:
    """A file with any damage gives a dictionary or a UserError, never another exception."""
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
