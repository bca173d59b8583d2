"""Bring the index of a folder up to date: embed new and changed images, remove missing ones.

Images are known by their content: one that was renamed, moved, copied or touched keeps its
embedding. With several processes rank 0 finds the new images, writes the index and answers; all
ranks embed.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.search.index import DECODER, THUMBNAIL_BYTES, ImageIndex
from src.utils.errors import (
    MAX_LINES,
    SHOWN_NAMES,
    UserError,
    counted,
    print_message,
    printable,
    shorten,
    shorten_lines,
)
from src.utils.files import content_digest, exclusive_lock
from src.utils.script import status

if TYPE_CHECKING:  # with an index that is up to date no model is needed, and no torch
    from src.models.dual_encoder import DualEncoder

BATCH_SIZE = 64
SAVE_SECONDS = 30.0  # seconds between saves while embedding
PAGE_MARK = b"// Photo search"  # how the search.js of a page starts

# The extensions of Pillow's readers, and of formats that are named if they cannot be read. Listed
# here because importing Pillow takes longer than a search.
SUFFIXES = frozenset(
    ".apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .fit .fits .flc .fli .ftc .ftu .gbr .gif "
    ".heic .heics .heif .heifs .hif .icb .icns .ico .im .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf "
    ".jpg .jpx .jxl .mpo .msp .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd .pxr .qoi .ras .rgb "
    ".rgba .sgi .tga .tif .tiff .vda .vst .webp .xbm .xpm".split())
RAW_SUFFIXES = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf "
    ".raw .rw2 .rwl .sr2 .srf .srw .x3f".split())
# Not looked into, since there are many of them beside images. Other files are tried by content.
OTHER_SUFFIXES = frozenset(
    ".aae .avi .css .csv .db .doc .docx .eps .gz .htm .html .ini .js .json .jsonl .log .lrv .m4a "
    ".m4v .md .mkv .mov .mp3 .mp4 .mpeg .mpg .npy .pdf .pp3 .ps .pth .py .svg .tar .thm .txt .wav "
    ".webm .xls .xlsx .xml .xmp .yaml .zip".split())
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"8BPS", b"qoif",
              b"DDS ", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
# Thumbnails and deleted files of other programs.
DEFAULT_EXCLUDES = ("@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found", "node_modules")


@dataclass
class Scan:
    """The files of a folder.

    Attributes:
        found: images: relative path -> [size in bytes, modification time in ns].
        unusable: files and folders that cannot be read: relative path -> reason.
        excluded: relative paths that match a pattern.
        others: number of files that are not images, by extension.
    """

    found: dict[str, list[int]] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    excluded: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def holds_page(folder: Path) -> bool:
    """Return whether a folder is a page of `src/search/page.py`, which holds copies of images."""
    try:
        with open(folder / "search.js", "rb") as script:
            return script.read(len(PAGE_MARK)) == PAGE_MARK
    except OSError:
        return False


def looks_like_image(path: str) -> bool:
    """Return whether a file starts like an image, whatever its extension."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return (head.startswith(SIGNATURES) or head[:4] + head[8:12] == b"RIFFWEBP"
            or head[4:8] == b"ftyp" and head[8:12] in BRANDS
            or head[:2] == b"BM" and head[6:10] == bytes(4))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a path, or one of its parts, matches a pattern such as '*.gif' or 'raw'."""
    match = _compile(tuple(patterns)).match
    return any(map(match, [name, *name.split(os.sep)]))


@lru_cache
def _compile(patterns: tuple[str, ...]) -> re.Pattern:
    """Return a regular expression for any of some shell patterns."""
    return re.compile("|".join(map(fnmatch.translate, patterns)) or "(?!)")


def find_images(images: Path, exclude: Iterable[str] = (), follow_links: bool = False) -> Scan:
    """Return the image files below a folder.

    Hidden files and folders, search pages, and what matches DEFAULT_EXCLUDES are skipped.

    Args:
        images: the folder.
        exclude: patterns of names and relative paths to skip.
        follow_links: also search linked folders, and files outside the folder.

    Raises:
        UserError: there is no such folder.
    """
    if not images.is_dir():
        raise UserError(f"there is no folder of photos {images}; give one with --images DIR")
    scan, links, visited = Scan(), [], set()
    skipped = _compile((*DEFAULT_EXCLUDES, *exclude)).match
    folders = [""]
    while folders:
        below = folders.pop()
        try:
            with os.scandir(os.path.join(images, below)) as listed:
                entries = list(listed)
            status = os.stat(os.path.join(images, below))
        except OSError as error:
            scan.unusable[below.rstrip(os.sep) or "."] = error.strerror or str(error)
            continue
        is_page = any(entry.name == "search.js" for entry in entries)
        if (status.st_dev, status.st_ino) in visited or (
                below and is_page and holds_page(images / below)):
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            name, (stem, _, suffix) = below + entry.name, entry.name.rpartition(".")
            suffix = f".{suffix.lower()}" if stem else ""
            if entry.name.startswith("."):
                continue
            if skipped(entry.name) or exclude and skipped(name):
                scan.excluded.append(name)
            elif _is_folder(entry):
                if entry.is_symlink() and not follow_links:
                    scan.unusable[name] = "a link to a folder: --follow-links searches it"
                else:
                    folders.append(name + os.sep)
            elif suffix in RAW_SUFFIXES:
                scan.unusable[name] = f"camera RAW files ({suffix}) are not supported: export JPEG"
            elif suffix in OTHER_SUFFIXES or (
                    suffix not in SUFFIXES and not looks_like_image(entry.path)):
                scan.others[suffix or "no extension"] += 1
            else:
                try:
                    status = entry.stat()
                except OSError as error:  # such as a broken link
                    scan.unusable[name] = error.strerror or str(error)
                    continue
                if not stat.S_ISREG(status.st_mode):
                    scan.unusable[name] = "not a regular file"  # reading a pipe would block
                    continue
                scan.found[name] = [status.st_size, status.st_mtime_ns]
                if entry.is_symlink():
                    links.append(name)
    if links and not follow_links:
        from src.data.images import find_escaping_links

        for name in find_escaping_links(images, links):
            del scan.found[name]
            scan.unusable[name] = "a link to a file outside the folder: --follow-links searches it"
    return scan


def _is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder or a link to one; False for a cycle of links."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def update_index(
    folder: Path, images: Path, checkpoint: str, dim: int, load_model: Callable[[], DualEncoder],
    *, exclude: Iterable[str] = (), follow_links: bool = False, prune: bool = False,
    about: dict[str, str] | None = None,
) -> ImageIndex:
    """Bring the index in `folder` up to date with the images below `images`, and return it.

    New and changed images are embedded, missing ones are removed, unreadable ones are named and
    skipped until they change. Ctrl-C keeps what is done. If more than half of the images are
    missing, they stay in the index, but not in what is returned.

    Args:
        folder: where the index is stored, created if missing.
        images: the image folder, searched recursively.
        checkpoint: fingerprint of the weights.
        dim: D of their embeddings.
        load_model: returns the model of those weights in eval mode; called only if an image has
            to be embedded.
        exclude: see `find_images`. Excluded images stay in the index, too.
        follow_links: see `find_images`.
        prune: remove missing images even if they are more than half.
        about: stored in index.json for other programs.

    Raises:
        UserError: there is no such folder or no image in it, the index belongs to another folder,
            or it cannot be written.
    """
    try:
        with _lock(folder) as writable:
            with status(f"looking for photos in {printable(str(images))}"):
                scan = find_images(images, exclude, follow_links)
            index = ImageIndex.load(folder, checkpoint, dim)
            if not writable and not index.names:
                raise UserError(f"cannot keep the index in {folder}: it is read-only; choose "
                                "another place with --index-dir")
            index = _update(index, scan, folder, images, load_model, exclude, prune, about or {},
                            writable)
    except OSError as error:
        raise UserError(f"cannot keep the index in {folder}: {error.strerror or error}; choose "
                        "another place with --index-dir") from error
    report(scan, index, folder)
    shown = [i for i, name in enumerate(index.names) if name in scan.found]
    if not shown:
        raise UserError(f"there is no readable image in {images}")
    return index if len(shown) == len(index.names) else index.take(shown)


def help_update(load_model: Callable[[], DualEncoder]) -> None:
    """Embed the part of this rank of the images that `update_index` on rank 0 finds to be new."""
    from src.utils.distributed import broadcast_object

    while task := broadcast_object(None):
        for _ in _embedded(*task, load_model):
            pass


def end_updates() -> None:
    """Let `help_update` return on the other ranks."""
    from src.utils.distributed import broadcast_object

    broadcast_object(None)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of an index; yield False without a lock if the folder is read-only."""
    lock = exclusive_lock(folder / "index.lock",
                          f"another search is updating the index in {folder}; waiting")
    try:
        lock.__enter__()
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.__exit__(None, None, None)


def _update(
    index: ImageIndex, scan: Scan, folder: Path, images: Path,
    load_model: Callable[[], DualEncoder], exclude: Iterable[str], prune: bool,
    about: dict[str, str], writable: bool,
) -> ImageIndex:
    """Return the updated index, which may hold images that are not in `scan`; save it."""
    found, current = scan.found, dict(zip(index.names, index.signatures, strict=True))
    kept = {name for name, digest in zip(index.names, index.digests, strict=True)
            if found.get(name) == current[name] and (digest or index.decoder != DECODER)}
    reusable = {}  # embeddings that are right if the decoder gives the same pixels as before
    if index.decoder != DECODER and writable:
        print_message(f"the index in {folder} was written by an earlier version: its photos are "
                      "read again")
        reusable = {name: index.embeddings[i] for i, name in enumerate(index.names) if name in kept}
        kept = set()
    failed = _known_failures(index, found)
    new = [name for name in sorted(found) if name not in kept and name not in failed]
    moved = {} if reusable else _find_content(index, images, {name: found[name] for name in new})
    gone = _check_missing(index, scan, folder, images, set(moved.values()), exclude, prune)
    new = [name for name in new if name not in moved]
    if new and not writable:
        print_message(f"the index in {folder} cannot be written: {shorten(new)} new or changed, "
                      "and not searched")
        new = []
    if "RANK" in os.environ:  # the other ranks wait for the list, even if it is empty
        from src.utils.distributed import broadcast_object

        broadcast_object((images, {name: found[name] for name in new}, reusable))
    about = {**about, "folder": str(images.resolve())}
    remaining = kept | gone  # once: a set of 50,000 names takes milliseconds to make
    if not (new or moved or not remaining.issuperset(index.names)
            or failed != index.failed or writable and about != index.about):
        return index
    updated = _carry_over(index, remaining, moved, found)
    updated.failed = failed
    if not writable:
        return updated
    updated.about, updated.decoder = about, DECODER
    n_new = _embed_new(updated, folder, images, {name: found[name] for name in new}, reusable,
                       load_model)
    n_removed = len(set(index.names) - found.keys() - gone
                    - {index.names[i] for i in moved.values()})
    counts = {"read again" if reusable else "embedded": n_new,
              "known by their content": len(moved), "removed": n_removed}
    if any(counts.values()):
        print_message("index: " + ", ".join(
            counted(n, f"photos {what}") for what, n in counts.items() if n))
    return updated


def _carry_over(
    index: ImageIndex, kept: set[str], moved: dict[str, int], found: dict[str, list[int]]
) -> ImageIndex:
    """Return the kept images of an index, and the moved ones under their new names."""
    copies = index.take(list(moved.values()))
    copies.names, copies.signatures = list(moved), [found[name] for name in moved]
    copies.notes = {name: index.notes[index.names[i]] for name, i in moved.items()
                    if index.names[i] in index.notes}
    carried = index.take([i for i, name in enumerate(index.names) if name in kept])
    carried.merge([copies])
    return carried


def _known_failures(index: ImageIndex, found: dict[str, list[int]]) -> dict[str, list]:
    """Return the failures of files that have not changed, and that the same reader tried."""
    if not index.failed:
        return {}
    from src.data.images import reader_version

    return {name: entry for name, entry in index.failed.items()
            if name in found and found[name] == entry[1] and entry[2] == reader_version()}


def _find_content(
    index: ImageIndex, images: Path, new: dict[str, list[int]]
) -> dict[str, int]:
    """Return which of the new files have the content of an indexed image: name -> its row."""
    sizes = {signature[0] for signature in index.signatures}
    names = [name for name, (size, _) in new.items() if size in sizes]
    if not names:
        return {}
    rows = {digest: i for i, digest in enumerate(index.digests)}

    def digest(name: str) -> str:
        try:
            return content_digest(images / name)
        except OSError:  # reported when it is decoded
            return ""

    from tqdm import tqdm

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = zip(names, tqdm(pool.map(digest, names), desc="comparing", total=len(names),
                                  unit="photo", delay=1, leave=False, disable=None), strict=True)
        return {name: rows[digest] for name, digest in digests if digest in rows}


def _check_missing(
    index: ImageIndex, scan: Scan, folder: Path, images: Path, moved: set[int],
    exclude: Iterable[str], prune: bool,
) -> set[str]:
    """Return the names of missing images that stay in the index: excluded ones, or too many.

    Raises:
        UserError: the folder is empty, or the index belongs to another folder.
    """
    hidden = {name for name in index.names if name not in scan.found and matches(name, exclude)}
    gone = {name for i, name in enumerate(index.names)
            if name not in scan.found and name not in hidden and i not in moved
            and not matches(name, DEFAULT_EXCLUDES)}
    if prune or 2 * len(gone) <= len(index.names):
        return hidden
    owner = index.about.get("folder", str(images.resolve()))
    if owner != str(images.resolve()):
        raise UserError(
            f"the index in {folder} belongs to the folder {owner}, and {len(gone):,} of its "
            f"{len(index.names):,} photos are not in {images}: choose another folder with "
            "--index-dir, or replace them with --prune")
    missing = (f"{len(gone):,} of the {len(index.names):,} photos of the index are missing in "
               f"{images}: is a drive not connected? The index keeps them; --prune removes them")
    if not scan.found and not scan.excluded:
        raise UserError(missing)
    print_message(missing)
    return hidden | gone


def report(scan: Scan, index: ImageIndex, folder: Path) -> None:
    """Print which files are not searched, or only in part, by reason."""
    def print_reasons(title: str, reasons: dict[str, str]) -> None:
        by_reason = defaultdict(list)
        for name, reason in sorted(reasons.items()):
            by_reason[reason].append(name)
        if not reasons:
            return
        lines = [f"{shorten(names)}: {reason}".replace("\n", " ")
                 for reason, names in by_reason.items()]
        print_message("\n  ".join(
            [f"{title}: {counted(len(reasons), 'files')}", *shorten_lines(lines)]))
        is_short = len(lines) <= MAX_LINES and max(map(len, by_reason.values())) <= SHOWN_NAMES
        if not is_short and index.failed:
            print_message(f"  all names are in {folder / 'index.json'}")

    failed = {name: entry[0] for name, entry in index.failed.items()}
    print_reasons("not searched", scan.unusable | failed)
    print_reasons("damaged, and searched in part", index.notes)
    if scan.excluded:
        print_message(f"excluded: {shorten(sorted(scan.excluded))}")
    if scan.others:
        counts = ", ".join(f"{n:,} {suffix}" for suffix, n in scan.others.most_common(6))
        more = ", …" if len(scan.others) > 6 else ""
        print_message(f"not images: {counted(scan.others.total(), 'files')} ({counts}{more})")


def _embed_new(
    index: ImageIndex, folder: Path, images: Path, new: dict[str, list[int]],
    reusable: dict[str, np.ndarray], load_model: Callable[[], DualEncoder],
) -> int:
    """Embed the images of `new` into the index, and save it regularly and at the end.

    Returns:
        the number of images embedded.
    """
    parts: list[ImageIndex] = []
    count, saved, done = 0, time.monotonic(), False

    def merge_and_save() -> None:
        index.merge(parts)
        parts.clear()
        index.save(folder)

    try:
        for part in _embedded(images, new, reusable, load_model):
            parts.append(part)
            count += len(part.names)
            # Embeddings of an earlier version are replaced at the end, when none is missing.
            if time.monotonic() - saved > SAVE_SECONDS and not reusable:
                merge_and_save()
                saved = time.monotonic()
        done = True
    finally:
        if done or not reusable:
            merge_and_save()
    return count


def _embedded(
    images: Path, new: dict[str, list[int]], reusable: dict[str, np.ndarray],
    load_model: Callable[[], DualEncoder],
) -> Iterator[ImageIndex]:
    """Yield batches of embedded images; the next batch is decoded meanwhile.

    Each rank embeds its part of a batch, and yields the parts of all ranks.

    Args:
        images: the image folder.
        new: relative paths and signatures of the images to embed.
        reusable: embeddings that are used if the decoder has not changed the image.
        load_model: see `update_index`.
    """
    if not new:
        return
    import torch
    from tqdm import tqdm

    from src.data.images import (
        ReadError,
        is_decoded_as_before,
        load_resized,
        reader_version,
        tiny_thumbnail,
    )
    from src.data.pixel_store import store_size
    from src.evaluation.embed import embed_pixels
    from src.utils.distributed import all_gather_object, rank, split_evenly, world_size

    model = load_model()
    size, dim = store_size(model.config.image_size), model.config.embed_dim

    def decode(name: str) -> tuple[str, np.ndarray, str] | list:
        """Return digest, pixels and note; or the reason of a failure and its signature."""
        notes: list[str] = []
        try:
            pixels = load_resized(images / name, size, notes)
            return content_digest(images / name), pixels, "; ".join(notes)
        except ReadError as error:
            return [str(error), None, ""]  # without a signature it is tried again next time
        except (OSError, ValueError) as error:
            return [str(error), new[name], reader_version()]

    names, step = list(new), BATCH_SIZE * world_size()
    batches = [names[i : i + step] for i in range(0, len(names), step)]
    own = [[batch[i] for i in split_evenly(len(batch))[rank()]] for batch in batches]
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(
            total=len(names), desc="indexing", unit="photo", leave=False,
            disable=None if rank() == 0 else True) as bar:
        ahead = pool.map(decode, own[0])
        for batch, following in zip(own, [*own[1:], []], strict=True):
            results = dict(zip(batch, ahead, strict=True))
            ahead = pool.map(decode, following)
            good = {name: result for name, result in results.items() if isinstance(result, tuple)}
            embeddings = np.zeros((len(good), dim), np.float32)
            same = [name in reusable and is_decoded_as_before(images / name) for name in good]
            for i, name in enumerate(good):
                if same[i]:
                    embeddings[i] = reusable[name]
            fresh = [i for i, is_same in enumerate(same) if not is_same]
            if fresh:
                pixels = np.stack([pixels for _, pixels, _ in good.values()])[fresh]
                embeddings[fresh] = embed_pixels(model, torch.from_numpy(pixels)).numpy()
            part = ImageIndex(
                "", list(good), [new[name] for name in good], embeddings,
                {name: result for name, result in results.items() if isinstance(result, list)},
                [digest for digest, _, _ in good.values()],
                np.array([tiny_thumbnail(pixels) for _, pixels, _ in good.values()],
                         np.uint8).reshape(len(good), THUMBNAIL_BYTES),
                {name: note for name, (_, _, note) in good.items() if note})
            for gathered in all_gather_object(part):
                yield gathered
                bar.update(len(gathered.names) + len(gathered.failed))
