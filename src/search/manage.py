"""List and remove the indexes of a results folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from src.utils.errors import UserError, counted, printable


def index_folder(indexes: Path, images: Path) -> Path:
    """Return the folder of the index of an image folder, below `indexes`."""
    path = images.resolve()
    key = hashlib.sha256(str(path).encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return indexes / f"{path.name}-{key}"


@contextlib.contextmanager
def remove_if_failed(indexes: Path) -> Iterator[None]:
    """Remove the folders that the block creates in `indexes`, if it raises and they have no photos.

    An index with photos, also an unfinished one, stays, and so do folders that were there before.
    """
    created = [path for path in (indexes, *indexes.parents) if not path.exists()]
    before = set() if created else set(indexes.glob("*"))
    try:
        yield
    except BaseException:
        if created and not any(map(_holds_photos, indexes.rglob("index.json"))):
            shutil.rmtree(indexes, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds other files
                for parent in created[1:]:
                    parent.rmdir()
        for path in set(indexes.glob("*")) - before:
            if path.is_dir() and not _holds_photos(path / "index.json"):
                shutil.rmtree(path, ignore_errors=True)
        raise


def _holds_photos(file: Path) -> bool:
    """Return whether the index in a file has photos, as far as it can be read."""
    try:
        return bool(json.loads(file.read_bytes())["names"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return True


def list_indexes(*folders: Path) -> str:
    """Return a line for each index below `folders`: image folder, number of images, size."""
    lines = []
    for file in sorted(file for folder in folders for file in folder.glob("*/index.json")):
        try:
            content = json.loads(file.read_bytes())
            about, count = content.get("about", {}), len(content["names"])
            owner = about.get("folder", "folder unknown: written by an earlier version")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            owner, count = "damaged", 0
        size = sum(path.stat().st_size for path in file.parent.iterdir() if path.is_file())
        missing = " (not there now)" if owner.startswith("/") and not Path(owner).is_dir() else ""
        lines.append(f"{file.parent}\n    {owner}{missing}: {counted(count, 'photos')}, "
                     f"{size / 1e6:,.1f} MB")
    return printable("\n".join(lines) or f"there is no index in {folders[0]}")


def remove_index(indexes: Path, target: Path) -> str:
    """Remove an index; no file of another kind is removed.

    Args:
        indexes: the folder of the indexes.
        target: an image folder, or the folder of an index.

    Returns:
        a message.

    Raises:
        UserError: there is no such index, or it cannot be removed.
    """
    choices = [target, indexes / target.name, index_folder(indexes, target)]
    folder = next((path for path in choices if (path / "index.json").is_file()), None)
    if folder is None:
        raise UserError(f"there is no index of {target}; --list-indexes shows all of them")
    try:
        for pattern in ("index.json", "index-*.npy", ".index*.tmp", "index.lock"):
            for path in folder.glob(pattern):
                path.unlink()
        with contextlib.suppress(OSError):  # it holds other files, such as words.json
            folder.rmdir()
    except OSError as error:
        raise UserError(f"cannot remove {folder}: {error.strerror}") from error
    return f"removed the index in {folder}; no photo was touched"
