"""Save and load files of tensors: atomic writes, and loading that runs no code."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from src.utils.errors import UserError, import_optional
from src.utils.files import write_atomic


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values with torch.save, atomically; see `write_atomic`."""
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
    """Load a file of tensors and plain values to the CPU, without running any code in it.

    Raises:
        UserError: the file does not exist, is damaged or of another kind, contains code, or would
            take more memory than its size.
    """
    _refuse_compressed(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd pickles are refused below, or harmless
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder, not a file") from error
    except Exception as error:  # torch raises many types on damaged files
        raise UserError(
            f"{path} cannot be read as a file of tensors: it is incomplete, of another kind, or "
            "would run code on loading"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not a dictionary of tensors")
    size = path.stat().st_size
    for tensor in _tensors_of(content):  # a view that repeats one number is a small file
        if tensor.numel() * tensor.element_size() > size:
            raise UserError(f"{path} has {size:,} bytes but holds a tensor of {tensor.numel():,} "
                            "elements: this project did not write it")
    return content


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """Write named tensors and texts in the format of the package safetensors, atomically.

    Raises:
        UserError: the package is not installed, or the file cannot be written; see `write_atomic`.
    """
    safetensors = import_safetensors()
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.save(dense, {"format": "pt", **metadata}))


def load_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file and its texts.

    Raises:
        UserError: the package is not installed, or the file cannot be read.
    """
    import_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def import_safetensors() -> ModuleType:
    """Return safetensors.torch; a UserError if the package is not installed."""
    return import_optional("safetensors.torch", "the safetensors format needs another package: "
                           "pip install safetensors")


def _tensors_of(content: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield all tensors in nested plain values, which may be deep or contain themselves."""
    pending, seen = [content], set()
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value


def _refuse_compressed(path: Path) -> None:
    """Raise a UserError for a compressed archive: torch writes none, and it could be a zip bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # not an archive, or a damaged one: many exception types
        return
    size = path.stat().st_size
    if unpacked > size:
        raise UserError(f"{path} has {size:,} bytes but unpacks to {unpacked:,}: "
                        "this project did not write it")
