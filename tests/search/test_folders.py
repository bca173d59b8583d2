"""Index folders of many kinds: formats, moved and missing images, links, excludes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

import src.data.images
import src.search.update_index
from src.data.images import load_resized
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.search.index import DECODER, ImageIndex
from src.search.update_index import (
    OTHER_SUFFIXES,
    RAW_SUFFIXES,
    SUFFIXES,
    Scan,
    find_images,
    report,
    update_index,
)
from src.utils.errors import UserError
from tests.stress.bad_input import swapped_profile

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.exists(), reason="the cases are not there")
DIM = 256


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    """Return a model with random weights."""
    torch.manual_seed(0)
    return DualEncoder(ModelConfig(4, image_size=32)).eval()


@pytest.fixture()
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of batch sizes that were embedded."""
    counts: list[int] = []
    embed_pixels = src.evaluation.embed.embed_pixels

    def counted(model: DualEncoder, pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        return embed_pixels(model, pixels)

    monkeypatch.setattr(src.evaluation.embed, "embed_pixels", counted)
    return counts


def image(seed: int) -> Image.Image:
    """Return an image of coarse noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise.repeat(5, 0).repeat(5, 1))


def save(path: Path, seed: int, **options: object) -> Path:
    """Write an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image(seed).save(path, **options)
    return path


@pytest.fixture()
def images(tmp_path: Path) -> Path:
    """Return a folder of eight images in two subfolders."""
    for i in range(8):
        save(tmp_path / "photos" / ("a" if i < 4 else "b") / f"{i}.png", i)
    return tmp_path / "photos"


def update(tmp_path: Path, images: Path, model: DualEncoder, **flags: object) -> ImageIndex:
    """Return the updated index."""
    return update_index(tmp_path / "index", images, "x", DIM, lambda: model, **flags)


def stored(tmp_path: Path) -> dict:
    """Return the content of index.json."""
    return json.loads((tmp_path / "index" / "index.json").read_text())


# ---- Formats -------------------------------------------------------------------------------------


def test_every_extension_of_pillow_is_known() -> None:
    """Each is an image, or is one that Pillow cannot decode."""
    Image.init()
    unknown = set(Image.registered_extensions()) - SUFFIXES - OTHER_SUFFIXES
    assert unknown <= {".emf", ".grib", ".h5", ".hdf", ".bufr", ".iim", ".palm", ".wmf"}
    assert not (SUFFIXES & OTHER_SUFFIXES or SUFFIXES & RAW_SUFFIXES)


@pytest.mark.parametrize(("name", "kind"), [
    ("a.avif", "AVIF"), ("a.jp2", "JPEG2000"), ("a.jpe", "JPEG"), ("a.JFIF", "JPEG"),
    ("a.mpo", "MPO"), ("no extension", "PNG"), ("a.unknown", "WEBP"), ("wrong.heic", "JPEG"),
    ("wrong.png", "TIFF"), ("a.tga", "TGA"), ("a.ppm", "PPM"), ("copy.jpg~", "GIF"), ("b", "BMP"),
])
def test_formats_are_found(tmp_path: Path, model: DualEncoder, name: str, kind: str) -> None:
    """An image of any format is searched, by its extension or its content."""
    save(tmp_path / "photos" / name, 3, format=kind)
    index = update(tmp_path, tmp_path / "photos", model)
    assert index.names == [name] and index.failed == {}


def test_what_is_not_searched_is_named(
    tmp_path: Path, images: Path, model: DualEncoder, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each file that is not searched is counted, with its format or extension."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    src.data.images._register_heif.cache_clear()
    files = {
        "1.heic": b"\0\0\0\x18ftypheic" + bytes(20), "2.jxl": b"\xff\x0a" + bytes(9),
        "3.NEF": b"II*\0", "4.cr3": b"\0\0\0\x18ftypcrx ", "5.mov": b"", "6.MOV": b"",
        "7": b"text", "8.json": b"{}", "9.raf": b"FUJIFILMCCD-RAW",
    }
    for name, content in files.items():
        (images / name).write_bytes(content)
    update(tmp_path, images, model)
    printed = capsys.readouterr().err
    src.data.images._register_heif.cache_clear()
    assert "1.heic: HEIC images need another package: pip install pillow-heif" in printed
    assert "2.jxl: JPEG XL images are not supported" in printed
    assert "not searched: 5 files\n" in printed and "3.NEF: camera RAW files (.nef)" in printed
    assert "not images: 4 files (2 .mov, 1 no extension, 1 .json)" in printed.replace(
        "1 .json, 1 no extension", "1 no extension, 1 .json")


def test_many_failures_take_few_lines(
    tmp_path: Path, images: Path, model: DualEncoder, capsys: pytest.CaptureFixture
) -> None:
    """A reason is printed once, with the first names and the number of the others; of many
    reasons ten are printed, and the number of the others."""
    for i in range(20):
        (images / f"{i:02}.jpg").write_text("text")
    update(tmp_path, images, model)
    assert "  00.jpg, 01.jpg, 02.jpg and 17 more: not an image in a known format\n" in (
        capsys.readouterr().err)
    report(Scan(unusable={f"{i:04}.jpg": f"reason {i}" for i in range(1000)}),
           ImageIndex("", failed={"x": ["reason 0", [0, 0], ""]}), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "not searched: 1,001 files" and lines[1] == "  0000.jpg, x: reason 0"
    assert lines[10] == "  0009.jpg: reason 9" and lines[11] == "  and 990 more"
    assert lines[12:] == [f"  all names are in {tmp_path / 'index.json'}"]


@needs_cases
def test_case_05(tmp_path: Path, model: DualEncoder, capsys: pytest.CaptureFixture) -> None:
    """AVIF and JPEG 2000 are searched; HEIC is searched or named."""
    index = update(tmp_path, CASES / "search-05", model)
    assert {"IMG_0001.avif", "IMG_0002.jpg", "IMG_0003.jp2"} <= set(index.names)
    assert ("IMG_0004.HEIC" in index.names) != ("IMG_0004.HEIC: HEIC" in capsys.readouterr().err)


def test_heic_is_searched_with_its_package(tmp_path: Path, model: DualEncoder) -> None:
    """With pillow-heif HEIC files are searched, whatever their extension."""
    pillow_heif = pytest.importorskip("pillow_heif")
    (tmp_path / "photos").mkdir()
    for name in ("a.HEIC", "b.jpg"):
        pillow_heif.from_pillow(image(1)).save(tmp_path / "photos" / name)
    index = update(tmp_path, tmp_path / "photos", model)
    assert index.names == ["a.HEIC", "b.jpg"]


def test_a_failure_is_forgotten_when_the_reader_changes(
    tmp_path: Path, images: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreadable files are tried again with another version of Pillow or pillow-heif."""
    (images / "bad.jpg").write_text("text")
    tried = []

    def counted(path: Path, size: int, notes: list[str]) -> np.ndarray:
        tried.append(path.name)
        return load_resized(path, size, notes)

    monkeypatch.setattr(src.data.images, "load_resized", counted)
    update(tmp_path, images, model)
    tried.clear()
    update(tmp_path, images, model)
    assert tried == []
    monkeypatch.setattr(src.data.images, "reader_version", lambda: "another")
    for _ in range(2):
        update(tmp_path, images, model)
        assert tried == ["bad.jpg"]


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpegs_are_searched_and_named(
    tmp_path: Path, model: DualEncoder, progressive: bool, capsys: pytest.CaptureFixture
) -> None:
    """The first half of a JPEG is searched and named each time; one without a pixel is not."""
    folder, large = tmp_path / "photos", image(1).resize((240, 180))
    folder.mkdir()
    large.save(folder / "whole.jpg", quality=95)
    large.save(folder / "cut.jpg", quality=95, progressive=progressive)
    content = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) * 2 // 3])
    (folder / "empty.jpg").write_bytes(content[: content.index(b"\xff\xda") + 14])
    for _ in range(2):
        index = update(tmp_path, folder, model)
        assert index.names == ["cut.jpg", "whole.jpg"] and set(index.failed) == {"empty.jpg"}
        assert "cut.jpg: truncated" in capsys.readouterr().err
    pixels = load_resized(folder / "cut.jpg", 34, [])
    whole = load_resized(folder / "whole.jpg", 34)
    assert abs(pixels[:8].astype(int) - whole[:8]).mean() < 25
    with pytest.raises(ValueError, match="truncated"):  # training takes whole images only
        load_resized(folder / "cut.jpg", 34)


def test_messages_of_libtiff_name_their_file(
    tmp_path: Path, images: Path, model: DualEncoder, capfd: pytest.CaptureFixture
) -> None:
    """What libtiff prints about damaged data is the reason of that file, and printed once."""
    buffer = io.BytesIO()
    TiffImagePlugin.WRITE_LIBTIFF = False
    image(1).save(buffer, "TIFF", compression="tiff_lzw")
    content = bytearray(buffer.getvalue())
    start = content.index(b"\x80") if b"\x80" in content else 200
    for i in range(start + 300, start + 500):
        content[i] ^= 0xFF
    (images / "lzw.tif").write_bytes(content)
    image(1).convert("1").save(buffer := io.BytesIO(), "TIFF", compression="group4")
    content = bytearray(buffer.getvalue())
    for i in range(12, 60):
        content[i] ^= 0x5A
    (images / "fax.tif").write_bytes(content)
    index = update(tmp_path, images, model)
    captured = capfd.readouterr()
    messages = {name: entry[0] for name, entry in index.failed.items()} | index.notes
    assert set(messages) <= {"lzw.tif", "fax.tif"} and messages
    for line in captured.err.splitlines():
        if "tempfile" in line or "Decode" in line:
            assert ".tif: " in line
    assert os.fstat(2)  # the descriptor is restored


# ---- Moved, missing and foreign images -----------------------------------------------------------


def test_content_is_recognized(
    tmp_path: Path, images: Path, model: DualEncoder, embedded: list[int]
) -> None:
    """Renamed, moved, copied and touched images keep their embeddings."""
    before = update(tmp_path, images, model)
    rows = {digest: row for digest, row in zip(before.digests, before.embeddings, strict=True)}
    embedded.clear()
    for path in images.rglob("*.png"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    update(tmp_path, images, model)
    (images / "b").rename(images / "c")
    (images / "a" / "0.png").rename(images / "new name.png")
    shutil.copy(images / "a" / "1.png", images / "copy.png")
    after = update(tmp_path, images, model)
    assert embedded == []
    assert after.names == sorted(["copy.png", "new name.png", *(f"a/{i}.png" for i in (1, 2, 3)),
                                  *(f"c/{i}.png" for i in range(4, 8))])
    for name, digest, row in zip(after.names, after.digests, after.embeddings, strict=True):
        np.testing.assert_array_equal(row, rows[digest])
        fresh = load_resized(images / name, 34)
        np.testing.assert_array_equal(
            after.thumbnails[after.names.index(name)], src.data.images.tiny_thumbnail(fresh))
    save(images / "a" / "1.png", 50)  # other content under the same name
    update(tmp_path, images, model)
    assert embedded == [1]


def test_a_copied_folder_is_not_embedded_again(
    tmp_path: Path, images: Path, model: DualEncoder, embedded: list[int]
) -> None:
    """A copy of the images with the same --index-dir, as on another disk, uses the index."""
    update(tmp_path, images, model)
    embedded.clear()
    shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)
    index = update(tmp_path, tmp_path / "copy", model)
    assert embedded == [] and len(index.names) == 8
    assert stored(tmp_path)["about"]["folder"] == str(tmp_path / "copy")


def test_an_emptied_folder_keeps_its_index(
    tmp_path: Path, images: Path, model: DualEncoder, embedded: list[int]
) -> None:
    """A drive that is away is reported and nothing is lost; --prune agrees to the loss."""
    update(tmp_path, images, model)
    embedded.clear()
    images.rename(tmp_path / "drive")
    images.mkdir()
    with pytest.raises(UserError, match="8 of the 8 photos.*is a drive not connected.*--prune"):
        update(tmp_path, images, model)
    assert len(stored(tmp_path)["names"]) == 8
    images.rmdir()
    (tmp_path / "drive").rename(images)
    assert len(update(tmp_path, images, model).names) == 8 and embedded == []
    shutil.rmtree(images / "a")
    (images / "b" / "7.png").unlink()
    save(images / "new.png", 60)
    index = update(tmp_path, images, model)  # more than half are missing: kept, but not shown
    assert index.names == ["b/4.png", "b/5.png", "b/6.png", "new.png"]
    assert len(stored(tmp_path)["names"]) == 9
    update(tmp_path, images, model, prune=True)
    assert stored(tmp_path)["names"] == index.names


def test_a_few_missing_images_are_removed(tmp_path: Path, images: Path, model: DualEncoder) -> None:
    """Up to half of the images may be deleted without a question."""
    update(tmp_path, images, model)
    shutil.rmtree(images / "a")
    assert len(update(tmp_path, images, model).names) == len(stored(tmp_path)["names"]) == 4


def test_an_index_of_another_folder_is_refused(
    tmp_path: Path, images: Path, model: DualEncoder
) -> None:
    """Another folder with the same --index-dir does not replace the index."""
    update(tmp_path, images, model)
    save(tmp_path / "other" / "x.png", 70)
    with pytest.raises(UserError, match="belongs to the folder .*photos, and 8 of its 8"):
        update(tmp_path, tmp_path / "other", model)
    assert len(stored(tmp_path)["names"]) == 8
    assert update(tmp_path, tmp_path / "other", model, prune=True).names == ["x.png"]


def test_an_index_of_the_first_version_is_used(
    tmp_path: Path, images: Path, model: DualEncoder, embedded: list[int]
) -> None:
    """Its embeddings are kept, except for images with a color profile and failures."""
    with Image.open(images / "a" / "1.png") as opened:
        opened.save(images / "a" / "1.png", icc_profile=swapped_profile())
    expected = update(tmp_path, images, model)
    file = tmp_path / "index" / "index.json"
    content = json.loads(file.read_text())
    old = {key: content[key] for key in ("checkpoint", "names", "signatures", "embeddings")}
    file.write_text(json.dumps(old | {"failed": {"x.jpg": ["not a picture", [1, 2]]}}))
    embedded.clear()
    for _ in range(2):
        index = update(tmp_path, images, model)
        assert embedded == [1] and index.decoder == DECODER
        assert index.digests == expected.digests and index.failed == {}
        np.testing.assert_array_equal(index.thumbnails, expected.thumbnails)
        np.testing.assert_allclose(index.embeddings, expected.embeddings, atol=1e-5)


def test_a_read_only_disk_is_searched(
    tmp_path: Path, images: Path, model: DualEncoder, small_disk: Path,
    capsys: pytest.CaptureFixture, embedded: list[int],
) -> None:
    """A finished index answers from a read-only disk; new images are named."""
    index = small_disk / "index"
    update_index(index, images, "x", DIM, lambda: model)
    embedded.clear()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert len(update_index(index, images, "x", DIM, lambda: model).names) == 8
    save(images / "new.png", 80)
    shutil.rmtree(images / "a")
    found = update_index(index, images, "x", DIM, lambda: model)
    assert found.names == [f"b/{i}.png" for i in range(4, 8)] and embedded == []
    assert "cannot be written: new.png" in capsys.readouterr().err
    content = stored(small_disk)
    old = {key: content[key] for key in ("checkpoint", "names", "signatures", "embeddings")}
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    (index / "index.json").write_text(json.dumps(old | {"failed": {}}))  # of the first version
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    found = update_index(index, images, "x", DIM, lambda: model)
    assert found.names == [f"b/{i}.png" for i in range(4, 8)] and embedded == []
    assert found.near_duplicates(0).tolist() == [0]
    with pytest.raises(UserError, match="--index-dir"):
        update_index(small_disk / "none", images, "x", DIM, lambda: model)


# ---- Links and excludes --------------------------------------------------------------------------


def test_linked_folders_are_named_or_followed(
    tmp_path: Path, images: Path, model: DualEncoder, capsys: pytest.CaptureFixture
) -> None:
    """A linked folder is named; --follow-links searches it once, also in a cycle."""
    save(tmp_path / "outside" / "o.png", 90)
    save(tmp_path / "single.png", 91)
    (images / "linked").symlink_to("../outside")
    (images / "file.png").symlink_to(tmp_path / "single.png")
    (images / "cycle").symlink_to(images)
    (tmp_path / "outside" / "back").symlink_to(images)
    assert len(update(tmp_path, images, model).names) == 8
    printed = capsys.readouterr().err
    assert "cycle, linked: a link to a folder" in printed and "file.png: a link" in printed
    index = update(tmp_path, images, model, follow_links=True)
    assert index.names == sorted([*(f"a/{i}.png" for i in range(4)), "linked/o.png", "file.png",
                                  *(f"b/{i}.png" for i in range(4, 8))])


def test_thumbnails_of_other_programs_are_skipped(
    tmp_path: Path, images: Path, model: DualEncoder, capsys: pytest.CaptureFixture
) -> None:
    """The folders of case search-10, hidden files, and --exclude."""
    for name in ("@eaDir/IMG_1.jpg/SYNOPHOTO_THUMB_XL.jpg", "#recycle/x.jpg", ".thumbnails/y.jpg",
                 "node_modules/icon.png", "a/._0.png", "a/raw/z.png", "a/z.gif"):
        save(images / name, 5)
    index = update(tmp_path, images, model, exclude=["*.gif", "a/raw"])
    assert index.names == [*(f"a/{i}.png" for i in range(4)), *(f"b/{i}.png" for i in range(4, 8))]
    assert "excluded: #recycle, @eaDir, a/raw and 2 more" in capsys.readouterr().err
    assert len(update(tmp_path, images, model).names) == 10
    update(tmp_path, images, model, exclude=["a"])
    assert len(stored(tmp_path)["names"]) == 10  # not embedded again without --exclude


@pytest.mark.parametrize(("name", "pattern", "expected"), [
    ("a/b.gif", "*.gif", True), ("a/b.gif", "a", True), ("a/b.gif", "a/*", True),
    ("a/b.gif", "b", False), ("ab/c.gif", "a", False), ("a/b/c.gif", "a/b", False),
    ("A.gif", "a.gif", False),
])
def test_patterns(name: str, pattern: str, expected: bool) -> None:
    """A pattern is compared with the whole path and with each of its parts."""
    assert src.search.update_index.matches(name, [pattern]) == expected


def test_scan_is_complete(images: Path) -> None:
    """Every file is found, unusable, excluded, or counted among the others."""
    for name in ("x.txt", "y.jpg", "@eaDir", "z.nef", "w.unknown"):
        (images / name).write_text("text")
    scan = find_images(images)
    n_files = sum(path.is_file() for path in images.rglob("*"))
    assert n_files == (len(scan.found) + len(scan.unusable) + len(scan.excluded)
                       + sum(scan.others.values()))
