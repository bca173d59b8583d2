"""Bring the index of a folder up to date: embed new and changed images, remove missing ones.

With several processes rank 0 finds the new images, writes the index and answers; all ranks embed.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.search.index import ImageIndex
from src.utils.errors import UserError, printable
from src.utils.files import exclusive_lock

if TYPE_CHECKING:  # with an index that is up to date no model is needed, and no torch
    from src.models.dual_encoder import DualEncoder

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
BATCH_SIZE = 64
SAVE_SECONDS = 30.0  # seconds between saves while embedding
PAGE_MARK = b"// Photo search"  # how the search.js of a page starts


def holds_page(folder: Path) -> bool:
    """Return whether a folder is a page of `src/search/page.py`, which holds copies of images."""
    try:
        with open(folder / "search.js", "rb") as script:
            return script.read(len(PAGE_MARK)) == PAGE_MARK
    except OSError:
        return False


def find_images(images: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return the image files below a folder.

    Hidden files and folders and search pages are skipped. Links to folders are not followed, so a
    cycle of links cannot occur.

    Returns:
        the images: relative path -> [size in bytes, modification time in ns]; and the files that
        cannot be used: relative path -> reason.

    Raises:
        UserError: there is no such folder.
    """
    if not images.is_dir():
        raise UserError(f"there is no folder of photos {images}; give one with --images")
    found, unusable, links = {}, {}, []

    def skip_folder(error: OSError) -> None:
        unusable[os.path.relpath(error.filename, images)] = error.strerror or str(error)

    for folder, subfolders, files in os.walk(images, onerror=skip_folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")
                         and not holds_page(Path(folder, name))]
        below = os.path.relpath(folder, images)
        for file in files:
            if os.path.splitext(file)[1].lower() not in SUFFIXES or file.startswith("."):
                continue
            name = file if below == "." else os.path.join(below, file)
            try:
                status = os.stat(os.path.join(folder, file))
            except OSError as error:  # such as a broken link
                unusable[name] = error.strerror or str(error)
                continue
            if not stat.S_ISREG(status.st_mode):
                unusable[name] = "not a regular file"  # reading a pipe would block
                continue
            found[name] = [status.st_size, status.st_mtime_ns]
            if os.path.islink(os.path.join(folder, file)):
                links.append(name)
    if links:
        from src.data.images import find_escaping_links

        for name in find_escaping_links(images, links):
            del found[name]
            unusable[name] = "a link to a file outside the folder"
    return found, unusable


def update_index(
    folder: Path, images: Path, checkpoint: str, dim: int, load_model: Callable[[], DualEncoder]
) -> ImageIndex:
    """Bring the index in `folder` up to date with the images below `images`, and return it.

    New and changed images are embedded, missing ones are removed, unreadable ones are named and
    skipped until they change. Ctrl-C keeps what is done.

    Args:
        folder: where the index is stored, created if missing.
        images: the image folder, searched recursively.
        checkpoint: fingerprint of the weights.
        dim: D of their embeddings.
        load_model: returns the model of those weights in eval mode; called only if an image has
            to be embedded.

    Raises:
        UserError: there is no such folder or no image in it, or the index cannot be written.
    """
    try:
        with exclusive_lock(folder / "index.lock",
                            f"another search is updating the index in {folder}; waiting"):
            return _update_locked(folder, images, checkpoint, dim, load_model)
    except OSError as error:
        raise UserError(f"cannot keep the index in {folder}: {error.strerror or error}; choose "
                        "another place with --index-dir") from error


def help_update(load_model: Callable[[], DualEncoder]) -> None:
    """Embed the part of this rank of the images that `update_index` on rank 0 finds to be new."""
    from src.utils.distributed import broadcast_object

    images, new = broadcast_object(None)
    for _ in _embedded(images, new, load_model):
        pass


def _update_locked(
    folder: Path, images: Path, checkpoint: str, dim: int, load_model: Callable[[], DualEncoder]
) -> ImageIndex:
    found, unusable = find_images(images)
    index = ImageIndex.load(folder, checkpoint, dim)
    current = dict(zip(index.names, index.signatures, strict=True))
    failed = {name: entry for name, entry in index.failed.items() if found.get(name) == entry[1]}
    new = [name for name in sorted(found)
           if current.get(name) != found[name] and name not in failed]
    if "RANK" in os.environ:  # the other ranks wait for the list, even if it is empty
        from src.utils.distributed import broadcast_object

        broadcast_object((images, new))
    keep = [row for row, name in enumerate(index.names)
            if name in found and current[name] == found[name]]
    if new or len(keep) < len(index.names) or failed != index.failed:
        index.failed = failed
        index.embeddings = index.embeddings[keep]
        index.names = [index.names[row] for row in keep]
        index.signatures = [index.signatures[row] for row in keep]
        _embed_new(index, folder, images, {name: found[name] for name in new}, load_model)
    unusable |= {name: reason for name, (reason, _) in index.failed.items()}
    if unusable:
        print(f"{len(unusable):,} files could not be read and are left out:", file=sys.stderr)
        for name, reason in sorted(unusable.items()):
            print(printable(f"  {name}: {reason}".replace("\n", " ")), file=sys.stderr)
    if not index.names:
        raise UserError(f"there is no readable image in {images}")
    return index


def _embed_new(
    index: ImageIndex, folder: Path, images: Path, new: dict[str, list[int]],
    load_model: Callable[[], DualEncoder],
) -> None:
    """Embed the images of `new` into the index, and save it regularly and at the end."""
    names, parts = [], []

    def merge_and_save() -> None:
        if parts:
            old = [index.embeddings] if len(index.embeddings) else []
            matrix = np.concatenate([*old, *parts])
            all_names = index.names + names
            order = sorted(range(len(all_names)), key=all_names.__getitem__)
            all_signatures = index.signatures + [new[name] for name in names]
            index.embeddings = matrix[order]
            index.names = [all_names[row] for row in order]
            index.signatures = [all_signatures[row] for row in order]
            names.clear()
            parts.clear()
        index.save(folder)

    try:
        saved = time.monotonic()
        for batch, embeddings, errors in _embedded(images, list(new), load_model):
            names.extend(batch)
            parts.append(embeddings)
            for name, (reason, may_succeed) in errors.items():
                # Without a signature the file is tried again next time.
                index.failed[name] = [reason, None if may_succeed else new[name]]
            if time.monotonic() - saved > SAVE_SECONDS:
                merge_and_save()
                saved = time.monotonic()
    finally:
        merge_and_save()


def _embedded(
    images: Path, names: list[str], load_model: Callable[[], DualEncoder]
) -> Iterator[tuple[list[str], np.ndarray, dict[str, tuple[str, bool]]]]:
    """Yield batches of embedded images; the next batch is decoded meanwhile.

    Each rank embeds its part of a batch, and yields the parts of all ranks: the names, their
    (B, D) embeddings, and for unreadable images the reason and whether another try may succeed.
    """
    if not names:
        return
    import torch
    from tqdm import tqdm

    from src.data.images import ReadError, load_resized
    from src.data.pixel_store import store_size
    from src.evaluation.embed import embed_pixels
    from src.utils.distributed import all_gather_object, rank, split_evenly, world_size

    model = load_model()
    size = store_size(model.config.image_size)

    def decode(name: str) -> np.ndarray | tuple[str, bool]:
        try:
            return load_resized(images / name, size)
        except ValueError as error:
            return str(error), isinstance(error, ReadError)

    step = BATCH_SIZE * world_size()
    batches = [names[i : i + step] for i in range(0, len(names), step)]
    own = [[batch[i] for i in split_evenly(len(batch))[rank()]] for batch in batches]
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(
            total=len(names), desc="indexing", unit="photo",
            disable=None if rank() == 0 else True) as bar:
        ahead = pool.map(decode, own[0])
        for batch, following in zip(own, [*own[1:], []], strict=True):
            results = dict(zip(batch, ahead, strict=True))
            ahead = pool.map(decode, following)
            good = [name for name in batch if isinstance(results[name], np.ndarray)]
            errors = {name: result for name, result in results.items()
                      if not isinstance(result, np.ndarray)}
            embeddings = np.zeros((0, model.config.embed_dim), np.float32)
            if good:
                pixels = torch.from_numpy(np.stack([results[name] for name in good]))
                embeddings = embed_pixels(model, pixels).numpy()
            for part in all_gather_object((good, embeddings, errors)):
                yield part
                bar.update(len(part[0]) + len(part[2]))
