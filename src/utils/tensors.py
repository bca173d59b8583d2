"""The door to files of tensors: whole-or-nothing writes, and loading that runs no code."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from src.utils.errors import UserError
from src.utils.files import write_atomic


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values with torch.save; whole or not at all, as `write_atomic`."""
    buffer = io.BytesIO()
    if any(tensor.device.type != "cpu" for tensor in _tensors_of(content)):
        content = _to_cpu(content)  # so that torch.load works on a machine without that device
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())


def _to_cpu(value: Any) -> Any:
    """Return a tree of plain values with its tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(each) for key, each in value.items()}
    return type(value)(map(_to_cpu, value)) if isinstance(value, list | tuple) else value


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
    size = path.stat().st_size
    for tensor in _tensors_of(content):  # views that repeat one number cost a file nothing
        if tensor.numel() * tensor.element_size() > size:
            raise UserError(f"{path} has {size:,} bytes and holds a tensor of {tensor.numel():,} "
                            "numbers: it is not a file that this project wrote")
    return content


def _tensors_of(content: dict[str, Any]) -> Iterator[torch.Tensor]:
    """All tensors in a tree of plain values, which may be deep, or hold itself."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


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
