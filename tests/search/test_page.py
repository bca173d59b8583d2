"""The files of the search page, and its server."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from src.data.images import load_image
from src.search import page
from src.search.page import suggest_queries, write_page
from src.search.page_server import serve_page
from src.utils.errors import UserError
from tests.search.pages import (
    DIM,
    HOSTILE,
    WORDS,
    display_name,
    make_arguments,
    read_data,
    tiled,
)

# ---- The folder ----------------------------------------------------------------------------------


def test_the_files_hold_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files hold names, captions and images, every fourth one first, and vectors up to int8
    rounding; page.js names the files after the first one."""
    monkeypatch.setattr(page, "FIRST_IMAGES", 9)
    monkeypatch.setattr(page, "IMAGES_PER_FILE", 10)
    arguments = make_arguments(tmp_path)
    counts = write_page(tmp_path / "album", **arguments, weak_score=0.25)
    words, photos = read_data(tmp_path / "album")
    assert words["words"] == WORDS and words["photos"] == 36 and words["dim"] == DIM
    assert words["weakScore"] == 0.25
    assert len(list((tmp_path / "album" / "data").iterdir())) == 2 + 4
    assert [url.partition("?v=")[0] for url in words["files"]] == [
        f"data/photos-00{i}.js" for i in (1, 2, 3)]
    order = [*range(0, 36, 4), *(i for i in range(36) if i % 4)]
    assert photos["names"] == [arguments["names"][i] for i in order]
    assert photos["captions"] == [arguments["captions"][i] for i in order]
    for rows, exact in [(words["vectors"], arguments["word_embeddings"]),
                        (photos["vectors"], arguments["image_embeddings"][order])]:
        step = np.abs(exact).max(1, keepdims=True) / 127
        assert (np.abs(rows - exact) <= step / 2 * 1.001).all()
    for name, i in zip(photos["pictures"], order, strict=True):
        color = load_image(arguments["paths"][i]).getpixel((0, 0))
        for size in ("t", "f"):
            copy = load_image(tmp_path / "album" / size / f"{name}.jpg")
            assert name.endswith(f"_{copy.width}x{copy.height}")
            assert np.allclose(copy.getpixel((5, 5)), color, atol=6)
    assert counts == {
        "photos": 36, "words": len(WORDS), "skipped": [], "pictures_made": 36,
        "photo_vector_bytes": 36 * (DIM + 4), "word_vector_bytes": len(WORDS) * (DIM + 4),
        "data_bytes": sum(p.stat().st_size for p in (tmp_path / "album" / "data").iterdir()),
    }


def test_large_images_are_written_in_two_sizes(tmp_path: Path) -> None:
    """The longest side is 384 in t/ and 1024 in f/."""
    arguments = tiled(make_arguments(tmp_path), 1)
    Image.new("RGB", (1500, 750), "teal").save(arguments["paths"][0])
    write_page(tmp_path / "album", **arguments)
    sizes = [load_image(next((tmp_path / "album" / size).iterdir())).size for size in ("t", "f")]
    assert sizes == [(384, 192), (1024, 512)]


def test_the_page_holds_no_paths_and_no_exif(tmp_path: Path) -> None:
    """No file holds a path or the EXIF data of an image."""
    arguments = make_arguments(tmp_path / "SECRETPLACE")
    exif = Image.Exif()
    exif[0x013B] = "SECRETARTIST"
    with Image.open(arguments["paths"][0]) as image:
        image.convert("RGB").save(arguments["paths"][0].with_suffix(".jpg"), exif=exif,
                                  comment="SECRETCOMMENT")
    arguments["paths"][0] = arguments["paths"][0].with_suffix(".jpg")
    assert b"SECRETARTIST" in arguments["paths"][0].read_bytes()
    write_page(tmp_path / "album", **arguments)
    files = [path for path in (tmp_path / "album").rglob("*") if path.is_file()]
    assert len(files) == 6 + 3 + 2 * 36  # parts, data, two sizes of each picture
    for path in files:
        text = path.read_bytes()
        assert b"SECRET" not in text and str(tmp_path).encode() not in text
        assert not any(photo.name in str(path) for photo in arguments["paths"])


def test_unreadable_images_are_named_and_left_out(tmp_path: Path) -> None:
    """Each unreadable file is left out and reported with a reason."""
    arguments = make_arguments(tmp_path)
    broken = tmp_path / "broken"
    (broken / "folder.jpg").mkdir(parents=True)
    (broken / "text.jpg").write_text("no picture")
    Image.new("RGB", (99, 99), "red").save(broken / "cut.jpg")
    (broken / "cut.jpg").write_bytes((broken / "cut.jpg").read_bytes()[:300])
    for i, name in zip((0, 7, 20, 35), ("folder.jpg", "text.jpg", "cut.jpg", "none.jpg"),
                       strict=True):
        arguments["paths"][i] = broken / name
    counts = write_page(tmp_path / "album", **arguments)
    kept = [i for i in range(36) if i not in (0, 7, 20, 35)]
    skipped = [arguments["names"][i] for i in (0, 7, 20, 35)]
    assert [name for name, _ in counts["skipped"]] == skipped
    assert all(reason for _, reason in counts["skipped"]) and counts["photos"] == 32
    _, photos = read_data(tmp_path / "album")
    assert photos["names"] == [arguments["names"][i] for i in kept]
    assert np.abs(photos["vectors"] - arguments["image_embeddings"][kept]).max() < 0.01


def test_a_second_call_makes_only_new_thumbnails(tmp_path: Path) -> None:
    """Unchanged thumbnails are kept, new ones are made, unused ones are removed."""
    arguments, album = make_arguments(tmp_path), tmp_path / "album"
    write_page(album, **arguments)
    before = {path: path.stat().st_mtime_ns for path in (album / "f").iterdir()}
    Image.new("RGB", (50, 50), "black").save(arguments["paths"][3])
    for key in ("names", "image_embeddings", "captions", "paths"):
        arguments[key] = arguments[key][:30]
    assert write_page(album, **arguments)["pictures_made"] == 1
    after = {path: path.stat().st_mtime_ns for path in (album / "f").iterdir()}
    assert len(after) == 30 and len(after.items() & before.items()) == 29
    assert {path.name for path in (album / "t").iterdir()} == {path.name for path in after}


def test_identical_images_share_a_thumbnail(tmp_path: Path) -> None:
    """Two images with the same bytes share one thumbnail."""
    arguments = make_arguments(tmp_path)
    shutil.copy(arguments["paths"][0], arguments["paths"][9])
    assert write_page(tmp_path / "album", **arguments)["pictures_made"] == 35
    _, photos = read_data(tmp_path / "album")
    assert photos["pictures"][0] == photos["pictures"][9] and len(photos["names"]) == 36


def test_an_interrupted_page_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C there is no index.html, and finished thumbnails are kept."""
    arguments, album = make_arguments(tmp_path), tmp_path / "album"
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    done = []

    def write_until(path: Path, image: Any) -> None:
        if len(done) == 20:
            raise KeyboardInterrupt
        done.append(path)
        page_write_image(path, image)

    page_write_image = page.write_image
    with monkeypatch.context() as context:
        context.setattr(page, "write_image", write_until)
        with pytest.raises(KeyboardInterrupt):
            write_page(album, **arguments)
    assert not (album / "index.html").exists()
    killed = album / "t" / f".{'0' * 20}_9x9.jpg.tmp"  # left by a killed write
    killed.touch()
    assert write_page(album, **arguments)["pictures_made"] == 36 - 10
    assert not killed.exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """Another web site is not overwritten; an empty folder and a killed write are accepted."""
    arguments, album = make_arguments(tmp_path), tmp_path / "album"
    album.mkdir()
    (album / "index.html").write_text("my own page")
    with pytest.raises(UserError, match="no earlier page"):
        write_page(album, **arguments)
    assert [path.name for path in album.iterdir()] == ["index.html"]
    (album / "index.html").rename(album / ".search.js.1234.tmp")
    write_page(album, **arguments)
    with pytest.raises(UserError, match="is a file"):
        write_page(album / "index.html", **arguments)


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Wrong numbers of names, vectors of two sizes and NaNs are refused."""
    arguments = make_arguments(tmp_path)
    for wrong in ({"names": ["one"]}, {"words": WORDS[1:]}, {"words": WORDS[:-1]},
                  {"word_embeddings": arguments["word_embeddings"][:, :8]},
                  {"image_embeddings": np.full((36, DIM), np.nan, np.float32)}):
        with pytest.raises(ValueError):
            write_page(tmp_path / "album", **{**arguments, **wrong})


def test_data_files_are_ascii(tmp_path: Path) -> None:
    """Whatever the names are, data files are one line of ASCII without "<"."""
    names = HOSTILE
    arguments = tiled(make_arguments(tmp_path), len(names))
    arguments |= {"names": names, "captions": [[name, name] for name in names]}
    title = "</title><script>alert(1)</script>{{scripts}}"
    write_page(tmp_path / "album", **arguments, title=title)
    for path in (tmp_path / "album" / "data").iterdir():
        text = path.read_bytes().decode("ascii")
        assert text.count("\n") == 1 and "<" not in text
    _, photos = read_data(tmp_path / "album")
    assert photos["names"] == [display_name(name) for name in names]
    index = (tmp_path / "album" / "index.html").read_text()
    assert index.count("<script") == 6 and "<script>" not in index and "{{scripts}}" in index


def test_an_empty_page(tmp_path: Path) -> None:
    """A page without images can be written."""
    arguments = make_arguments(tmp_path)
    for key in ("names", "image_embeddings", "captions", "paths"):
        arguments[key] = arguments[key][:0]
    assert write_page(tmp_path / "album", **arguments)["photos"] == 0
    assert read_data(tmp_path / "album")[1]["vectors"].shape == (0, DIM)


def test_suggestions_find_something() -> None:
    """Examples are short captions of known words whose image they find; the known words are those
    that fit a few of the images, each meaning once, and without captions they are the examples."""
    words = ["<pad>", "<unk>", "a", "red", "ring", "star", "stars", "gray"]
    vectors = np.float32([[0, 0, 0, 0], [.1, .1, .1, .1], [0, 0, 0, .1], [1, 0, 0, 0], [0, 1, 0, 0],
                          [0, 0, 1, 0], [0, 0, 1, .3], [0, 0, 0, 1]])
    gray = np.float32([0, 0, 0, 1])
    images = np.tile(gray, (96, 1))  # "gray" fits all but five of them
    images[1:6] = [[.6, .8, 0, 0], [.6, .8, 0, 0], [1, 0, 0, 0], [.7, 0, .7, 0], [.5, .8, .3, 0]]
    captions = [["a gray gray ."]] + [["A red ring .", "a much longer caption of it"],
                ["a red zebra"], [], ["a red star!"], ["A RED RING"]] + [[] for _ in range(90)]
    examples, known = suggest_queries(words, vectors, images, captions)
    assert sorted(examples) == ["a gray gray", "a red ring", "a red star"]
    assert set(known) == {"ring", "red", "star", "gray"} and known[-1] == "gray"
    captions[0], captions[1], captions[2] = [], [], ["A red star"]  # three others fit better
    captions[4] = captions[5] = []
    images[6:9] = [.7, 0, .7, 0]
    examples, known = suggest_queries(words, vectors, images, captions)
    assert examples == ["a red star"]  # better than none
    assert suggest_queries(words, vectors, images, [[]] * 96) == (known, known)
    assert suggest_queries(words, vectors, images, [[]] * 96, 2, 3) == (known[:2], known[:3])
    assert suggest_queries(words[:2], vectors[:2], images[:0], []) == ([], [])


# ---- The server ----------------------------------------------------------------------------------


OUTSIDE = [  # paths that are not files of the folder
    "/../secret.txt", "/%2e%2e/secret.txt", "/%2E%2E/secret.txt", "/.%2e/secret.txt",
    "/t/../../secret.txt", "/t/%2e%2e/%2e%2e/secret.txt", "/..%2fsecret.txt", "/..%5csecret.txt",
    "/%252e%252e/secret.txt", "/%252e%252e%252fsecret.txt", "/..%c0%afsecret.txt",
    "/%c0%ae%c0%ae/secret.txt", "/%uff0e%uff0e/secret.txt", "//../secret.txt", "///../secret.txt",
    "/./../secret.txt", "/.../secret.txt", "/..;/secret.txt", "/..\\secret.txt",
    "/t/..//../secret.txt", "../secret.txt", "secret.txt/..", "/link.txt", "/link.txt?x",
    "/link.txt#x", "/up/secret.txt", "/up", "/up/", "/up/album/link.txt", "/t/hidden", "/t/", "/t",
    "/data/", "/f/..", "/none", "/%00", "/%00../secret.txt", "/index.html%00.txt", "/circle",
    "/circle/x", "/index.html/", "/etc/passwd", "//etc/passwd",
    "/proc/self/environ", "file:///etc/passwd", "http://evil.example/secret.txt",
    "http://evil.example/../secret.txt", "//evil.example/%2e%2e", "/%2f%2fevil.example/..",
    "//evil.example/t", "/\\evil.example/t", "/" + "../" * 500 + "etc/passwd", "/" + "x" * 5000,
    "*",
]
FOREIGN = [
    "", "evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example",
    "evil.example@127.0.0.1", "127.0.0.1@evil.example", "127.0.0.2", "0.0.0.0", "[::1]", "::1",
    "2130706433", "0x7f.1", "xn--localhost-", "127.0.0.1,evil.example", "127.0.0.1 evil.example",
]


def test_the_server_serves_only_the_folder(
    album: Path, served: tuple[subprocess.Popen, int]
) -> None:
    """Files of the page are served; parents, links to outside and listings are not."""
    process, port = served
    secret = album.parent / "secret.txt"
    secret.write_text("SECRET")
    (album / "link.txt").symlink_to(secret)
    (album / "up").symlink_to(album.parent)
    (album / "circle").symlink_to(album / "circle")
    (album / "t" / "hidden").symlink_to("../../secret.txt")

    def ask(path: str, host: str = f"127.0.0.1:{port}", method: str = "GET") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.putrequest(method, path, skip_host=True)  # sent unchanged, with dots
            if host:
                connection.putheader("Host", host)
            connection.endheaders()
            answer = connection.getresponse()
            assert answer.getheader("Location") is None
            return answer.status, answer.read()
        finally:
            connection.close()

    try:
        assert ask("/") == (200, (album / "index.html").read_bytes())
        assert ask("/search.js?v=1") == (200, (album / "search.js").read_bytes())
        assert ask("/index.html", host=f"localhost:{port}")[0] == 200
        for path in (*OUTSIDE, str(secret), f"/{secret}", quote(str(secret)), f"/t/..{secret}",
                     f"file://{secret}"):
            status, body = ask(path)
            assert status in (400, 404) and b"SECRET" not in body, path
        for host in FOREIGN:
            assert ask("/", host=host)[0] == 403, host
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"):
            assert ask("/", method=method)[0] == 501
        for raw in (b"GET /../secret.txt\r\n\r\n", b"GET /%00 HTTP/1.0\r\n\r\n", b"\r\n",
                    b"GET\r\n", b"GET / HTTP/9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00",
                    b"GET /\r\n\r\n", b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
                    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda c=connection: c.recv(1 << 16), b""))
                assert b"SECRET" not in answer and b"Photo search" not in answer, raw
    finally:
        for name in ("link.txt", "up", "circle", "t/hidden"):
            (album / name).unlink()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0 and process.stderr.read() == "\n"


def test_the_server_reports_errors(album: Path, tmp_path: Path) -> None:
    """A missing page, a port in use and an invalid port are reported."""
    with pytest.raises(UserError, match="no page in"):
        serve_page(tmp_path, 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as taken:
        with pytest.raises(UserError, match=f"port {taken.server_port}"):
            serve_page(album, taken.server_port)
    with pytest.raises(UserError, match="port 99999"):
        serve_page(album, 99999)
