"""Bring the index of a folder up to date: embed what is new or changed, drop what is gone.

Of several processes, process 0 alone decides what is new, writes and answers; all of them embed.
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

if TYPE_CHECKING:  # a search over an index that is up to date needs no model, and no torch
    from src.models.dual_encoder import DualEncoder

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
BATCH_SIZE = 64
SAVE_SECONDS = 30.0  # at most this much work is lost to a power cut
PAGE_MARK = b"// Photo search"  # a page's search.js begins so


def holds_page(folder: Path) -> bool:
    """Whether a folder is a page of `src/search/page.py`, whose pictures are copies of others."""
    try:
        with open(folder / "search.js", "rb") as script:
            return script.read(len(PAGE_MARK)) == PAGE_MARK
    except OSError:
        return False


def find_photos(images: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Every picture file below a folder: relative path -> [bytes, time of change in ns].

    Hidden files and folders and this project's pages are left out, and links to folders are not
    followed, so that the walk ends.

    Returns:
        the photos, and those that cannot be had: relative path -> reason.

    Raises:
        UserError: there is no such folder.
    """
    if not images.is_dir():
        raise UserError(f"there is no folder of photos {images}; give one with --images")
    found, unusable, links = {}, {}, []

    def closed(error: OSError) -> None:
        unusable[os.path.relpath(error.filename, images)] = error.strerror or str(error)

    for folder, subfolders, files in os.walk(images, onerror=closed):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")
                         and not holds_page(Path(folder, name))]
        below = os.path.relpath(folder, images)
        for file in files:
            if os.path.splitext(file)[1].lower() not in SUFFIXES or file.startswith("."):
                continue
            name = file if below == "." else os.path.join(below, file)
            try:
                status = os.stat(os.path.join(folder, file))
            except OSError as error:  # a link to nowhere, for one
                unusable[name] = error.strerror or str(error)
                continue
            if not stat.S_ISREG(status.st_mode):
                unusable[name] = "not a regular file"  # reading a pipe would never end
                continue
            found[name] = [status.st_size, status.st_mtime_ns]
            if os.path.islink(os.path.join(folder, file)):
                links.append(name)
    if links:
        from src.data.images import find_escaping_links

        for name in find_escaping_links(images, links):
            del found[name]
            unusable[name] = "a link that leads out of the folder"
    return found, unusable


def update_index(
    folder: Path, images: Path, checkpoint: str, dim: int, load_model: Callable[[], DualEncoder]
) -> ImageIndex:
    """Bring the index in `folder` up to date with the photos below `images`, and return it.

    Photos that are new or have changed are embedded, those that are gone are dropped, unreadable
    ones are named and skipped until they change. Ctrl-C loses nothing that is done.

    Args:
        folder: where the index lies, made if need be.
        images: folder of photos, searched recursively.
        checkpoint: fingerprint of the weights.
        dim: D of their embeddings.
        load_model: gives the model of those weights, in eval mode; called only if a photo is to
            be embedded.

    Raises:
        UserError: no such folder of photos, none in it, or the index cannot be written.
    """
    try:
        with exclusive_lock(folder / "index.lock", f"another search is at the index in {folder}: "
                            "waiting for it"):
            return _update_locked(folder, images, checkpoint, dim, load_model)
    except OSError as error:
        raise UserError(f"cannot keep the index in {folder}: {error.strerror or error}; choose "
                        "another place with --index-dir") from error


def help_update(load_model: Callable[[], DualEncoder]) -> None:
    """Embed this process's share of what process 0, which calls `update_index`, finds to be new."""
    from src.utils.distributed import broadcast_object

    images, new = broadcast_object(None)
    for _ in _embedded(images, new, load_model):
        pass


def _update_locked(
    folder: Path, images: Path, checkpoint: str, dim: int, load_model: Callable[[], DualEncoder]
) -> ImageIndex:
    found, unusable = find_photos(images)
    index = ImageIndex.load(folder, checkpoint, dim)
    current = dict(zip(index.names, index.signatures, strict=True))
    failed = {name: entry for name, entry in index.failed.items() if found.get(name) == entry[1]}
    new = [name for name in sorted(found)
           if current.get(name) != found[name] and name not in failed]
    if "RANK" in os.environ:  # the other processes wait for their work, also where there is none
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
        raise UserError(f"there is no readable picture in {images}")
    return index


def _embed_new(
    index: ImageIndex, folder: Path, images: Path, new: dict[str, list[int]],
    load_model: Callable[[], DualEncoder],
) -> None:
    """Embed the photos of `new` into the index and save it, now and then and whatever happens."""
    names, parts = [], []

    def settle() -> None:
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
            for name, (reason, may_pass) in errors.items():
                # Without a signature it is tried again: the disk may have had a bad moment.
                index.failed[name] = [reason, None if may_pass else new[name]]
            if time.monotonic() - saved > SAVE_SECONDS:
                settle()
                saved = time.monotonic()
    finally:
        settle()


def _embedded(
    images: Path, names: list[str], load_model: Callable[[], DualEncoder]
) -> Iterator[tuple[list[str], np.ndarray, dict[str, tuple[str, bool]]]]:
    """Batches of embedded photos, the next decoding while one is embedded.

    Of each batch every process embeds a share, and has in turn what each of them made: names,
    (B, D), and of unreadable ones the reason and whether it may pass.
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
