"""src/search/page.py and src/search/page_server.py: the folder, the server, and the page in a real Chromium."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from src.data.images import load_image
from src.models.tokenizer import split_words
from src.search import page
from src.search.page import example_queries, write_page
from src.search.page_server import serve_page
from src.search.query import edit_distance, near_words
from src.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DIM, CONTEXT_LENGTH = 64, 8
COLORS = {"red": "#e03632", "orange": "#f68a1e", "yellow": "#fad632", "green": "#42ac4c",
           "blue": "#3068de", "purple": "#8e4ccc"}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
WORDS = ["<pad>", "<unk>", "a", "on", "the", *SHAPES, *COLORS, "left", "right", "beach", "bench",
         "running", "runner", "constructor", "__proto__", "чайка", "犬"]

RUN = "window.ran=1"  # what hostile text tries to do
ELSEWHERE = "http://127.0.0.1:9/"  # nobody listens there; asking would be a complaint
HOSTILE = [
    # Markup that would run, load or swallow what follows.
    f"<img src=x onerror={RUN}>.jpg", f"<script>{RUN}</script>.jpg",
    f"</script><script>{RUN}</script>.jpg", f"--></style></title></textarea><script>{RUN}</script>",
    f"<svg onload={RUN}>", f"<svg><script>{RUN}</script></svg>", f"<body onload={RUN}>",
    f"<iframe srcdoc='<script>parent.{RUN}</script>'>", f"<iframe src=javascript:parent.{RUN}>",
    f"<details open ontoggle={RUN}>", f"<input autofocus onfocus={RUN}>",
    f"<a href=javascript:{RUN}>x</a>", f"<form action=javascript:{RUN}><button>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}>",
    f"<noscript><p title='</noscript><img src=x onerror={RUN}>'>", "<plaintext>", "<!--",
    "<![CDATA[", f"<base href={ELSEWHERE}>", f"<link rel=stylesheet href={ELSEWHERE}>",
    f"<meta http-equiv=refresh content='0;url={ELSEWHERE}'>", f"<img src={ELSEWHERE}x.jpg>",
    f"<object data={ELSEWHERE}>", f"<style>@import '{ELSEWHERE}'</style>",
    # Out of a string, an attribute, a comment, a template, a style.
    f"\"'`);{RUN};//.jpg", f"\\\";{RUN};//", f"*/{RUN}/*", f"${{{RUN}}}", f"`${{{RUN}}}`",
    f"' onerror='{RUN}", f"\" onload=\"{RUN}", f"x\" autofocus onfocus=\"{RUN}",
    f"\\u003cscript\\u003e{RUN}", f"&lt;script&gt;{RUN}&lt;/script&gt;", "&#60;b&#62;", "%3Cb%3E",
    f"\");background:url({ELSEWHERE})", f"}}body{{background:url({ELSEWHERE})}}",
    "{{title}}.jpg", "{{scripts}}", "line\u2028separator\u2029.jpg",
    # Addresses.
    f"javascript:{RUN}", f"JaVaScRiPt:{RUN}", f"java\nscript:{RUN}", f"\x01javascript:{RUN}",
    f"data:text/html,<script>{RUN}</script>", f"data:text/javascript,{RUN}", f"vbscript:{RUN}",
    f"blob:{ELSEWHERE}", f"{ELSEWHERE}x.jpg", "//127.0.0.1:9/x.jpg", "\\\\127.0.0.1\\x.jpg",
    "file:///etc/passwd", "/etc/passwd", "../../../etc/passwd", "..\\..\\x.jpg", "..", ".",
    "#&q=other&photo=x%00.jpg", "?q=red#q=blue", "&photo=&n=96", "%", "%u003c", "+", "%2e%2e%2f",
    # Characters that turn, hide or break text.
    "turned\u202egpj.exe", "isolated\u2067name\u2066.jpg", "\u202d\u202c\u202a\u202b",
    "marks\u200e\u200f\u061c", "zero\u200bwidth\u200d\ufeff", "nul\x00 and bell\x07.jpg",
    "\x1b[2J\x9b31m", "tab\tand\r\nline", "   ", "not text \udcff.jpg", "\ud83d", "\ufffe\uffff",
    "e" + "\u0301" * 300, "\U0001f469\u200d\U0001f680", "日本語 фото שלום.jpg", "x" * 5000,
    # Names that every object has.
    "__proto__", "constructor", "toString", "hasOwnProperty", "length", "null", "undefined", "NaN",
]


def rows_like(captions: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Word vectors, and unit vectors of photos near the mean of their caption's words."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(len(WORDS), DIM)).astype(np.float32)
    rows = np.stack([encode(vectors, caption) for caption in captions])
    rows += 0.03 * rng.normal(size=rows.shape).astype(np.float32)
    return vectors, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def encode(vectors: np.ndarray, text: str) -> np.ndarray:
    """The oracle: a text's embedding (D,)."""
    ids = [WORDS.index(word) if word in WORDS else 1 for word in split_words(text)]
    mean = vectors[ids[:CONTEXT_LENGTH]].mean(0)
    return mean / np.linalg.norm(mean)


def make_world(folder: Path, names: list[str] | None = None) -> dict[str, Any]:
    """The arguments of write_page for 36 photos, a colored shape each, drawn below `folder`."""
    captions = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    photos = []
    for i, color in enumerate(COLORS.values()):
        for j in range(len(SHAPES)):
            photos.append(folder / "private" / f"{i}{j}.png")
            photos[-1].parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30 + j, 24 + i), color).save(photos[-1])
    vectors, rows = rows_like(captions, seed=0)
    return {
        "words": WORDS, "word_embeddings": vectors, "context_length": CONTEXT_LENGTH,
        "names": names or [f"some folder/{caption}.png" for caption in captions],
        "image_embeddings": rows, "captions": [[c, f"another of {c} ."] for c in captions],
        "photos": photos, "progress": False,
    }


def tiled(world: dict[str, Any], count: int) -> dict[str, Any]:
    """The same world with its photos over and over, `count` in all."""
    order = [i % 36 for i in range(count)]
    return world | {key: [world[key][i] for i in order] for key in ("names", "captions", "photos")
                    } | {"image_embeddings": world["image_embeddings"][order]}


def read_data(folder: Path) -> tuple[dict, dict]:
    """What words.js and all photo files hand over, vectors as floats, photos' files joined."""
    parts = []
    for path in [folder / "data" / "words.js", *sorted((folder / "data").glob("photos-*.js"))]:
        data = json.loads(re.fullmatch(r"\w+\((.*)\);\n", path.read_text("ascii"))[1])
        scales = np.frombuffer(base64.b64decode(data.pop("scales")), "<f4")
        codes = np.frombuffer(base64.b64decode(data.pop("codes")), np.int8)
        data["vectors"] = codes.reshape(len(scales), -1).astype(np.float64) * scales[:, None]
        parts.append(data)
    words, *photos = parts
    joined = {key: sum((part[key] for part in photos), [])
              for key in ("names", "captions", "pictures")}
    joined["vectors"] = np.concatenate([np.zeros((0, words["dim"])),
                                        *(part["vectors"] for part in photos)])
    return words, joined


# ---- The folder ----------------------------------------------------------------------------------


def test_folder_holds_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, captions, pictures in order, vectors within half a step of int8, over many files."""
    monkeypatch.setattr(page, "PHOTOS_PER_FILE", 10)
    world = make_world(tmp_path)
    counts = write_page(tmp_path / "album", **world)
    words, photos = read_data(tmp_path / "album")
    assert words["words"] == WORDS and words["photos"] == 36 and words["dim"] == DIM
    assert len(list((tmp_path / "album" / "data").iterdir())) == 1 + 4
    assert photos["names"] == world["names"] and photos["captions"] == world["captions"]
    for rows, exact in [(words["vectors"], world["word_embeddings"]),
                        (photos["vectors"], world["image_embeddings"])]:
        step = np.abs(exact).max(1, keepdims=True) / 127
        assert (np.abs(rows - exact) <= step / 2 * 1.001).all()
    for name, photo in zip(photos["pictures"], world["photos"], strict=True):
        color = load_image(photo).getpixel((0, 0))
        for size in ("t", "f"):
            copy = load_image(tmp_path / "album" / size / f"{name}.jpg")
            assert name.endswith(f"_{copy.width}x{copy.height}")
            assert np.allclose(copy.getpixel((5, 5)), color, atol=6)
    assert counts == {
        "photos": 36, "words": len(WORDS), "skipped": [], "pictures_made": 36,
        "photo_vector_bytes": 36 * (DIM + 4), "word_vector_bytes": len(WORDS) * (DIM + 4),
        "data_bytes": sum(p.stat().st_size for p in (tmp_path / "album" / "data").iterdir()),
    }


def test_large_photos_come_in_two_sizes(tmp_path: Path) -> None:
    """The longest side is 256 in t/ and 1024 in f/."""
    world = {key: value[:1] if isinstance(value, list | np.ndarray) and len(value) == 36 else value
             for key, value in make_world(tmp_path).items()}
    Image.new("RGB", (1500, 750), "teal").save(world["photos"][0])
    write_page(tmp_path / "album", **world)
    sizes = [load_image(next((tmp_path / "album" / size).iterdir())).size for size in ("t", "f")]
    assert sizes == [(256, 128), (1024, 512)]


def test_no_trace_of_paths_or_camera(tmp_path: Path) -> None:
    """Of where the photos lie and who took them where, nothing is in any file."""
    world = make_world(tmp_path / "SECRETPLACE")
    exif = Image.Exif()
    exif[0x013B] = "SECRETARTIST"
    with Image.open(world["photos"][0]) as image:
        image.convert("RGB").save(world["photos"][0].with_suffix(".jpg"), exif=exif,
                                  comment="SECRETCOMMENT")
    world["photos"][0] = world["photos"][0].with_suffix(".jpg")
    assert b"SECRETARTIST" in world["photos"][0].read_bytes()
    write_page(tmp_path / "album", **world)
    files = [path for path in (tmp_path / "album").rglob("*") if path.is_file()]
    assert len(files) == 5 + 2 + 2 * 36  # parts, data, two sizes of each picture
    for path in files:
        text = path.read_bytes()
        assert b"SECRET" not in text and str(tmp_path).encode() not in text
        assert not any(photo.name in str(path) for photo in world["photos"])


def test_unreadable_photos_are_named_and_left_out(tmp_path: Path) -> None:
    """Text called .jpg, a truncated JPEG, a folder and nothing at all: each with its reason."""
    world = make_world(tmp_path)
    broken = tmp_path / "broken"
    (broken / "folder.jpg").mkdir(parents=True)
    (broken / "text.jpg").write_text("no picture")
    Image.new("RGB", (99, 99), "red").save(broken / "cut.jpg")
    (broken / "cut.jpg").write_bytes((broken / "cut.jpg").read_bytes()[:300])
    for i, name in zip((0, 7, 20, 35), ("folder.jpg", "text.jpg", "cut.jpg", "none.jpg"),
                       strict=True):
        world["photos"][i] = broken / name
    counts = write_page(tmp_path / "album", **world)
    kept = [i for i in range(36) if i not in (0, 7, 20, 35)]
    assert [name for name, _ in counts["skipped"]] == [world["names"][i] for i in (0, 7, 20, 35)]
    assert all(reason for _, reason in counts["skipped"]) and counts["photos"] == 32
    _, photos = read_data(tmp_path / "album")
    assert photos["names"] == [world["names"][i] for i in kept]
    assert np.abs(photos["vectors"] - world["image_embeddings"][kept]).max() < 0.01


def test_a_second_call_makes_only_what_is_new(tmp_path: Path) -> None:
    """Unchanged pictures are kept, changed ones made, those of photos gone removed."""
    world, album = make_world(tmp_path), tmp_path / "album"
    write_page(album, **world)
    before = {path: path.stat().st_mtime_ns for path in (album / "f").iterdir()}
    Image.new("RGB", (50, 50), "black").save(world["photos"][3])
    for key in ("names", "image_embeddings", "captions", "photos"):
        world[key] = world[key][:30]
    assert write_page(album, **world)["pictures_made"] == 1
    after = {path: path.stat().st_mtime_ns for path in (album / "f").iterdir()}
    assert len(after) == 30 and len(after.items() & before.items()) == 29
    assert {path.name for path in (album / "t").iterdir()} == {path.name for path in after}


def test_identical_photos_share_a_picture(tmp_path: Path) -> None:
    """Two names, two rows, one file."""
    world = make_world(tmp_path)
    shutil.copy(world["photos"][0], world["photos"][9])
    assert write_page(tmp_path / "album", **world)["pictures_made"] == 35
    _, photos = read_data(tmp_path / "album")
    assert photos["pictures"][0] == photos["pictures"][9] and len(photos["names"]) == 36


def test_interrupted_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle leaves no index.html, and loses no picture that was made."""
    world, album = make_world(tmp_path), tmp_path / "album"
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
            write_page(album, **world)
    assert not (album / "index.html").exists()
    killed = album / "t" / f".{'0' * 20}_9x9.jpg.tmp"  # what a kill would leave
    killed.touch()
    assert write_page(album, **world)["pictures_made"] == 36 - 10
    assert not killed.exists()


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    """Somebody's web site is not overwritten; an empty folder and a killed first write are fine."""
    world, album = make_world(tmp_path), tmp_path / "album"
    album.mkdir()
    (album / "index.html").write_text("my own page")
    with pytest.raises(UserError, match="no earlier page"):
        write_page(album, **world)
    assert [path.name for path in album.iterdir()] == ["index.html"]
    (album / "index.html").rename(album / ".search.js.1234.tmp")
    write_page(album, **world)
    with pytest.raises(UserError, match="is a file"):
        write_page(album / "index.html", **world)


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A wrong number of names, vectors of two sizes, numbers that are none."""
    world = make_world(tmp_path)
    for wrong in ({"names": ["one"]}, {"words": WORDS[1:]}, {"words": WORDS[:-1]},
                  {"word_embeddings": world["word_embeddings"][:, :8]},
                  {"image_embeddings": np.full((36, DIM), np.nan, np.float32)}):
        with pytest.raises(ValueError):
            write_page(tmp_path / "album", **{**world, **wrong})


def test_data_files_are_plain(tmp_path: Path) -> None:
    """Whatever the names hold: ASCII, one line, no <; and every name is in it, as text."""
    names = HOSTILE
    world = tiled(make_world(tmp_path), len(names))
    world |= {"names": names, "captions": [[name, name] for name in names]}
    write_page(tmp_path / "album", **world, title="</title><script>alert(1)</script>{{scripts}}")
    for path in (tmp_path / "album" / "data").iterdir():
        text = path.read_bytes().decode("ascii")
        assert text.count("\n") == 1 and "<" not in text
    _, photos = read_data(tmp_path / "album")
    assert photos["names"] == [re.sub("[\ud800-\udfff]", "\ufffd", name) for name in names]
    index = (tmp_path / "album" / "index.html").read_text()
    assert index.count("<script") == 4 and "<script>" not in index and "{{scripts}}" in index


def test_an_empty_page(tmp_path: Path) -> None:
    """No photo at all is a page without photos."""
    world = make_world(tmp_path)
    for key in ("names", "image_embeddings", "captions", "photos"):
        world[key] = world[key][:0]
    assert write_page(tmp_path / "album", **world)["photos"] == 0
    assert read_data(tmp_path / "album")[1]["vectors"].shape == (0, DIM)


def test_example_queries() -> None:
    """Short captions of known words, of different photos; else words of the vocabulary."""
    words = ["<pad>", "<unk>", "a", "red", "ring", "star"]
    captions = [["A red ring .", "a much longer caption of it"], ["a red zebra"], [], ["a star"],
                ["a red star!"], ["A RED RING"]]
    assert sorted(example_queries(words, captions)) == ["a red ring", "a red star"]
    assert example_queries(words, [[]]) == ["ring", "star"]
    assert example_queries(words[:2], []) == []


# ---- The server ----------------------------------------------------------------------------------


OUTSIDE = [  # paths to what is not in the folder, or no file in it
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


@pytest.fixture()
def served(album: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process that serves the album, and its port."""
    # Ctrl-C ends it also where a shell runs the tests in the background, and ignores it for them.
    code = ("import signal, sys; from pathlib import Path; from src.search.page_server import serve_page; "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "
            "serve_page(Path(sys.argv[1]), 0)")
    with subprocess.Popen([sys.executable, "-c", code, album], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process, int(re.search(r"127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
        finally:
            process.kill()


def test_server_serves_the_folder_and_nothing_else(
    album: Path, served: tuple[subprocess.Popen, int]
) -> None:
    """Files of the page are had; parents, links that lead out and listings are not."""
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
            connection.putrequest(method, path, skip_host=True)  # sent as it is, dots and all
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
    assert process.wait(10) == 0 and process.stderr.read() == ""


def test_server_says_why_it_cannot(album: Path, tmp_path: Path) -> None:
    """No page, a port in use, a port that is none."""
    with pytest.raises(UserError, match="no page in"):
        serve_page(tmp_path, 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as taken:
        with pytest.raises(UserError, match=f"port {taken.server_port}"):
            serve_page(album, taken.server_port)
    with pytest.raises(UserError, match="port 99999"):
        serve_page(album, 99999)


# ---- The page in a browser -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the album was made of."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory, world: dict[str, Any]) -> Path:
    """A written page, in two files of photos."""
    folder = tmp_path_factory.mktemp("pages") / "album"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "PHOTOS_PER_FILE", 20)
        write_page(folder, **world)
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium with a profile of its own; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                  "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium with chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "window-size=1200,900",
                 "force-prefers-reduced-motion",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_script_timeout(30)
    yield browser
    browser.quit()


class Visitor:
    """Somebody at the page: what they do and see."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.url = ""

    def open(self, url: str, fragment: str = "") -> None:
        """Load a page afresh and wait until all its photos have come and it is drawn."""
        self.url = url
        self.browser.get("about:blank")
        for kind in ("browser", "performance"):
            self.browser.get_log(kind)  # what was before
        self.browser.get(url + fragment)
        self.until(lambda: self.js("return dim > 0 && photos.count === photos.total && drawn !== ''"
                                   " && !waiting"))

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page."""
        return self.browser.execute_script(script, *arguments)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until something is so."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 10, 0.02).until(lambda _: condition())

    def see(self, selector: str) -> list[Any]:
        """The elements of a CSS selector."""
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        """The text of the first such element; '' where there is none (yet)."""
        return self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def keys(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def type(self, text: str) -> None:
        """Put a text in the box, key by key, and wait for what it finds."""
        box = self.see("#query")[0]
        box.clear()
        box.send_keys(text)
        self.until(lambda: self.settled(text))

    def settled(self, text: str) -> bool:
        """Whether the page shows what a text finds."""
        return self.js("return !waiting && JSON.parse(drawn)[0] === arguments[0]"
                       " && box.value === arguments[0]", text)

    def captions(self) -> list[str]:
        """The captions of the results, in order."""
        return self.js("return [...document.querySelectorAll('#results .caption')]"
                       ".map((node) => node.textContent)")

    def focus(self) -> str:
        """What has the focus, as tag#id.class and text."""
        return self.js("const e = document.activeElement; return e.tagName.toLowerCase() + "
                       "(e.id && '#' + e.id) + ' ' + (e.querySelector('img')?.alt ?? '')")

    def fragment(self) -> str:
        """The address after #."""
        return self.js("return decodeURIComponent(location.hash.replaceAll('+', ' '))")

    def opened(self) -> bool:
        """Whether a photo's dialog is open."""
        return self.js("return dialog.open")

    def complaints(self) -> list[str]:
        """Errors in the browser's log, and requests for anything but the page's own folder."""
        base = self.url.rsplit("/", 1)[0]
        found = [entry["message"] for entry in self.browser.get_log("browser")
                 if entry["level"] == "SEVERE"]
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                found += [] if url.startswith(base) else [url]
        return found


@pytest.fixture()
def visitor(chromium: Any, album: Path) -> Iterator[Visitor]:
    """A visitor on the album, opened from disk; in the end nothing may have gone wrong."""
    someone = Visitor(chromium)
    someone.open(album.joinpath("index.html").as_uri())
    yield someone
    assert someone.js("return window.ran") is None
    assert someone.complaints() == []


def test_typing_finds_the_right_picture(visitor: Visitor, album: Path, world: dict) -> None:
    """The photo of the caption comes first, with its picture, score, rank and shares."""
    for number in (0, 17, 35):
        caption = world["captions"][number][0]
        visitor.type(caption)
        assert visitor.captions()[0] == caption
    assert len(visitor.see("#results .card")) == 24
    assert visitor.text("#notes") == "The 24 best of 36 photos"
    card = visitor.see("#results .card")[0]
    assert card.find_element("css selector", ".rank").text == "1"
    assert float(card.find_element("css selector", ".score").text) > 0.9
    assert [node.text.split()[0] for node in card.find_elements("css selector", ".shares li")] \
        == ["a", "purple", "ring"]
    image = card.find_element("css selector", "img")
    visitor.until(lambda: visitor.js("return arguments[0].naturalWidth", image) == 35)
    assert image.get_attribute("alt") == caption and image.get_attribute("loading") == "lazy"
    assert (image.get_dom_attribute("width"), image.get_dom_attribute("height")) == ("35", "29")


def test_ranking_and_scores_are_numpys(visitor: Visitor, album: Path, world: dict) -> None:
    """The same order and scores as numpy on the same rounded vectors; near the exact scores."""
    words, photos = read_data(album)
    for text in ("a red circle", "star", "blue blue triangle unheardof", "the " * 20 + "ring"):
        query = encode(words["vectors"], text)
        scores = photos["vectors"] @ query
        found = visitor.js("return bestPhotos(encode(arguments[0]).vector, 24)", text)
        assert [result["photo"] for result in found] == np.argsort(-scores)[:24].tolist()
        ranked = [result["score"] for result in found]
        assert np.allclose(ranked, np.sort(scores)[::-1][:24], atol=2e-6)
        exact = world["image_embeddings"] @ encode(world["word_embeddings"], text)
        assert np.allclose(ranked, exact[[result["photo"] for result in found]], atol=0.01)


def test_sums_stay_in_32_bits(visitor: Visitor, tmp_path: Path, world: dict) -> None:
    """The largest possible sums, all codes 127 and a text in the same direction, come out as 1."""
    equal = np.full((36, DIM), DIM**-0.5, np.float32)
    equal[::2] *= -1
    vectors = np.ones((len(WORDS), DIM), np.float32)
    write_page(tmp_path / "album",
               **{**world, "image_embeddings": equal, "word_embeddings": vectors})
    visitor.open((tmp_path / "album" / "index.html").as_uri(), "#q=red")
    found = visitor.js("return bestPhotos(encode('red').vector, 36)")
    assert np.allclose([result["score"] for result in found], [1] * 18 + [-1] * 18, atol=1e-5)
    # Equal scores stay in the photos' order, as in a stable sort.
    assert [result["photo"] for result in found] == [*range(1, 36, 2), *range(0, 36, 2)]


def test_shares_sum_to_the_score(visitor: Visitor) -> None:
    """For every photo and many queries, words known, unknown and repeated."""
    worst = visitor.js("""
        let worst = 0;
        for (const text of arguments[0]) {
          const query = encode(text);
          for (const { photo, score } of bestPhotos(query.vector, 36)) {
            const sum = sharesOf(query, photo).reduce((a, b) => a + b, 0);
            worst = Math.max(worst, Math.abs(sum - score));
          }
        }
        return worst;""", ["red", "a red circle on the beach", "red nosuchword", "ring ring ring a",
                           "the purple heart left of a green star right on the beach"])
    assert worst < 2e-6


def test_tokenizer_is_pythons(visitor: Visitor) -> None:
    """The same words from every character that this Python knows, and from tricky texts."""
    texts = ["", "  ", "A man's T-shirt .", "snake_case __proto__", "ΟΔΥΣΣΕΥΣ ΣΑΣ Σ", "İstanbul",
             "ﬁne ① ½ ² Ⅻ", "naïve e\u0301", "犬と猫", "שלום, עולם!", "हिन्दी", "a\u200db", "👩‍👩‍👧",
             "x\x00y", "Straße ẞ", "ǅ Ǆ", "１２３ ４.５", "don’t", "a\u00ada", "\u202eabc", "ﷺ"]
    # By scripts changed since this Python's Unicode: only characters that it has assigned.
    assigned = [chr(code) for code in range(sys.maxunicode + 1)
                if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    texts += [f"x{character}Y {character}" for character in assigned]
    for start in range(0, len(texts), 50_000):
        part = texts[start:start + 50_000]
        words = visitor.js("return arguments[0].map((text) => splitWords(text).join(' '))", part)
        different = [(text, found) for text, found in zip(part, words, strict=True)
                     if found != " ".join(split_words(text))]
        assert different == []


def test_a_photo_opens_and_back_closes_it(visitor: Visitor, world: dict) -> None:
    """A click shows its full size, captions and shares, then those like it; back walks back."""
    visitor.type("green star")
    first = visitor.captions()[0]
    visitor.see("#results .card a")[0].click()
    visitor.until(visitor.opened)
    assert first == "a green star" and visitor.text("#photo h2") == first
    assert visitor.text("#photo .captions") == "another of a green star."
    assert visitor.text("#photo .name") == "some folder/a green star.png"
    assert "/f/" in visitor.see("#photo .frame img")[0].get_attribute("src")
    rows = [row.text.split() for row in visitor.see("#photo .bars li")]
    score = float(visitor.text("#photo h3 .score"))
    assert [row[0] for row in rows] == ["green", "star"]
    assert abs(sum(float(row[1]) for row in rows) - score) < 0.002
    assert visitor.fragment() == "#q=green star&photo=some folder/a green star.png"

    vectors = world["image_embeddings"]
    number = world["names"].index("some folder/a green star.png")
    near = np.argsort(-(vectors @ vectors[number]))[1:9]
    alike = [node.get_attribute("alt") for node in visitor.see("#photo .alike img")]
    assert len(alike) == 8 and alike[0] == world["captions"][near[0]][0]
    visitor.see("#photo .alike a")[0].click()
    visitor.until(lambda: visitor.text("#photo h2") == alike[0])

    visitor.browser.back()
    visitor.until(lambda: visitor.text("#photo h2") == first)
    visitor.browser.back()
    visitor.until(lambda: not visitor.opened())
    assert visitor.fragment() == "#q=green star" and visitor.captions()[0] == first
    visitor.browser.forward()
    visitor.until(visitor.opened)


def test_keys(visitor: Visitor) -> None:
    """/ goes to the box, arrows through the results, Enter opens, arrows leaf, Esc gives back."""
    from selenium.webdriver.common.keys import Keys

    visitor.keys("/")
    assert visitor.focus() == "input#query "
    visitor.keys("red ring")
    visitor.until(lambda: visitor.settled("red ring"))
    captions = visitor.captions()
    columns = visitor.js("return getComputedStyle(list).gridTemplateColumns.split(' ').length")
    visitor.keys(Keys.ARROW_DOWN)
    assert visitor.focus() == f"a {captions[0]}"
    visitor.keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert visitor.focus() == f"a {captions[1 + columns]}"
    visitor.keys(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert visitor.focus() == f"a {captions[0]}"
    visitor.keys(Keys.ENTER)
    visitor.until(visitor.opened)
    assert visitor.focus() == "h2#photo-title " and visitor.text("#photo h2") == captions[0]
    visitor.keys(Keys.ARROW_RIGHT)
    visitor.until(lambda: visitor.text("#photo h2") == captions[1])
    visitor.keys(Keys.ARROW_RIGHT)
    visitor.until(lambda: visitor.text("#photo h2") == captions[2])
    visitor.keys(Keys.ESCAPE)
    visitor.until(lambda: not visitor.opened() and visitor.fragment() == "#q=red ring")
    assert visitor.focus() == f"a {captions[2]}"  # where one was last
    visitor.keys("/")
    assert visitor.focus() == "input#query "
    visitor.keys("heart")  # what was there is selected, and replaced
    visitor.until(lambda: visitor.settled("heart"))
    visitor.keys(Keys.ARROW_DOWN, Keys.ARROW_UP)
    assert visitor.focus() == "input#query "


def test_other_ways_to_close(visitor: Visitor) -> None:
    """The button, and a click beside the dialog."""
    visitor.type("blue heart")
    for close in ("return document.querySelector('[data-close]').click()",
                  "return dialog.dispatchEvent(new MouseEvent('click', { bubbles: true }))"):
        visitor.see("#results .card a")[0].click()
        visitor.until(visitor.opened)
        visitor.js(close)
        visitor.until(lambda: not visitor.opened() and visitor.fragment() == "#q=blue heart")


def test_the_address_restores_everything(visitor: Visitor, album: Path) -> None:
    """A shared address shows the same query, number and photo; closing it stays on the page."""
    from selenium.webdriver.common.keys import Keys

    visitor.open(visitor.url, "#q=yellow+square&n=12&photo=some+folder%2Fa+red+star.png")
    assert visitor.see("#query")[0].get_attribute("value") == "yellow square"
    assert visitor.see("#count")[0].get_attribute("value") == "12"
    assert len(visitor.captions()) == 12 and visitor.captions()[0] == "a yellow square"
    assert visitor.opened() and visitor.text("#photo h2") == "a red star"
    visitor.keys(Keys.ESCAPE)
    visitor.until(lambda: not visitor.opened())
    visitor.until(lambda: visitor.fragment() == "#q=yellow square&n=12")  # after the close event
    assert visitor.browser.title.startswith("yellow square")


def test_a_query_is_one_step_back(visitor: Visitor) -> None:
    """Letters of one query are one entry of the history; the query before is one step back."""
    visitor.type("green ring")
    visitor.keys("\ue007")  # Enter: this query is done
    visitor.type("blue star")
    visitor.browser.back()
    visitor.until(lambda: visitor.settled("green ring"))
    visitor.browser.back()
    visitor.until(lambda: visitor.settled(""))
    visitor.browser.forward()
    visitor.browser.forward()
    visitor.until(lambda: visitor.settled("blue star"))


def test_number_of_results(visitor: Visitor) -> None:
    """12 to 96, kept in the address; never more than there are photos."""
    visitor.type("heart")
    for number, shown in ((12, 12), (96, 36), (48, 36)):
        visitor.js("countBox.value = arguments[0];"
                   "countBox.dispatchEvent(new Event('change'))", number)
        visitor.until(lambda n=number: f"&n={n}" in visitor.fragment()
                      and visitor.js("return JSON.parse(drawn)[1]") == n)
        assert len(visitor.captions()) == shown


def test_an_unknown_word_and_what_is_near(visitor: Visitor) -> None:
    """It is marked on each result and named with near spellings; a click replaces it."""
    visitor.type("red bench, on the baech")
    assert visitor.captions()
    assert visitor.text("#results .unknown .word") == "baech"
    note = visitor.see("#notes p")[1]
    assert note.text.startswith("baech is unknown") and "beach" in note.text
    visitor.see("#notes a")[0].click()
    visitor.until(lambda: visitor.settled("red bench on the beach"))
    assert not visitor.see("#results .unknown") and visitor.focus() == "input#query "
    # Begun, misspelt by one or two, swapped; words of the language itself; no near word at all.
    near = {word: visitor.js("return nearWords(arguments[0])", word)
            for word in ("runn", "purpel", "crcle", "сhайка", "constructo", "zzzzzzzz", "x" * 5000)}
    assert near["runn"] == ["running", "runner"] and near["purpel"][0] == "purple"
    assert near["crcle"] == ["circle"] and near["constructo"] == ["constructor"]
    assert near["zzzzzzzz"] == near["x" * 5000] == []


def test_near_words_are_pythons(visitor: Visitor, tmp_path: Path, world: dict) -> None:
    """search.py and the page have one rule: the same words, in the same order."""
    rng = np.random.default_rng(0)

    def words(count: int) -> list[str]:
        return ["".join(rng.choice(list("abcdé犬\U00010330"), rng.integers(1, 9)))
                for _ in range(count)]

    known = list(dict.fromkeys([*WORDS[2:], *words(600)]))
    write_page(tmp_path / "album", **{
        **world, "words": WORDS[:2] + known,
        "word_embeddings": np.ones((2 + len(known), DIM), np.float32)})
    visitor.open((tmp_path / "album" / "index.html").as_uri())
    asked = [*words(600), "runn", "purpel", "crcle", "сhайка", "constructo", "zzzzzzzz", "x" * 5000,
             *(word[:i] + word[i + 1:] for word in known[:30] for i in range(len(word)))]
    found = visitor.js("return arguments[0].map((word) => nearWords(word))", asked)
    assert found == [near_words(word, known) for word in asked]
    assert sum(map(bool, found)) > 500 and sum(map(len, found)) > 1500
    pairs = [(a, b) for a, b in zip(asked, reversed(asked), strict=True) if len(a + b) < 50]
    assert visitor.js("return arguments[0].map(([a, b]) => editDistance([...a], [...b]))", pairs) \
        == [edit_distance(a, b) for a, b in pairs]


def test_only_unknown_words_rank_nothing(visitor: Visitor) -> None:
    """No random ranking: the words are named instead."""
    visitor.type("hart")
    assert visitor.captions() == [] and "has not learned this word" in visitor.text("#notes")
    assert [link.text for link in visitor.see("#notes a")] == ["heart"]
    visitor.type("qqq www xyz vvv kkk jjj")
    assert visitor.captions() == [] and "none of these words" in visitor.text("#notes")
    assert "2 more unknown" in visitor.text("#notes")
    visitor.type("?!… 👍")
    assert "There is no word in this" in visitor.text("#notes") and len(visitor.captions()) == 24
    for word in ("toString", "hasOwnProperty", "proto"):  # no words just because objects have them
        visitor.type(word)
        assert visitor.captions() == []


def test_an_absurdly_long_query(visitor: Visitor) -> None:
    """Only the first words count, as in training, and the page says so; a megabyte does no harm."""
    visitor.type("red star " + "blue " * 10)
    assert f"first {CONTEXT_LENGTH} words count, 4 left out" in visitor.text("#notes")
    assert len(visitor.see("#results .card:first-child .shares li")) == CONTEXT_LENGTH
    visitor.open(visitor.url, "#q=" + "red+star+" * 100_000)
    assert len(visitor.see("#query")[0].get_attribute("value")) == 2000
    assert len(visitor.captions()) == 24


def test_nothing_typed_yet(visitor: Visitor) -> None:
    """An empty query says what this is, offers examples that work, and shows some photos."""
    assert "36 photos" in visitor.text("#intro") and len(visitor.captions()) == 24
    assert not visitor.see("#results .score") and not visitor.see("#results .shares li")
    examples = visitor.see(".examples a")
    assert len(examples) == 6
    text = examples[2].text
    examples[2].click()
    visitor.until(lambda: visitor.settled(text))
    assert visitor.captions()[0] == text and not visitor.see("#intro")[0].is_displayed()
    visitor.see("h1 a")[0].click()
    visitor.until(lambda: visitor.settled("") and visitor.see("#intro")[0].is_displayed())


def tame(text: str) -> str:
    """The oracle: text as the page shows it."""
    text = re.sub(r"[\s\ufeff]+", " ", re.sub("[\ud800-\udfff]", "\ufffd", text)).strip()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


def test_hostile_names_and_captions_are_text(
    visitor: Visitor, tmp_path: Path, world: dict
) -> None:
    """Shown as they are, but for what turns or hides text; nothing runs, nothing is fetched."""
    captions = [[name, name] for name in HOSTILE]
    write_page(tmp_path / "album", **tiled(world, len(HOSTILE)) | {
        "names": HOSTILE, "captions": captions, "title": "<b>{{data}}</b>"})
    visitor.open((tmp_path / "album" / "index.html").as_uri(), "#n=96")
    assert visitor.text("h1") == "<b>{{data}}</b>"
    visitor.type("red circle")
    shown = visitor.captions()
    tokens = [re.sub(r" +([.,;:!?])(?=\s|$)", r"\1", tame(name)) for name in HOSTILE]
    assert len(shown) == len(HOSTILE) and set(shown) == {
        caption or tame(name) for caption, name in zip(tokens, HOSTILE, strict=True)}
    for i, name in enumerate(HOSTILE):  # each opened, by its address, and those like it drawn
        visitor.js("go({ photo: photos.names[arguments[0]] })", i)
        visitor.until(lambda i=i: visitor.js("return !waiting && lastPhoto === arguments[0]", i))
        assert visitor.js("return dialog.querySelector('.name').textContent") == tame(name)
        assert visitor.js("return readAddress().photo === photos.names[arguments[0]]", i)
    harmless(visitor)


def harmless(visitor: Visitor) -> None:
    """Nothing on the page came of markup, and every link leads to the page itself."""
    assert visitor.see("script:not([src]), style, iframe, object, base, form[action], #results svg"
                       ) == []
    assert visitor.js("""
        return [...document.querySelectorAll('*')].flatMap((node) => [...node.attributes])
          .filter(({ name }) => name.startsWith('on') || name === 'srcdoc').length""") == 0
    links = visitor.js("return [...document.querySelectorAll('a')].map((a) => a.href)")
    assert links and all(link.startswith(visitor.url + "#") for link in links)
    images = visitor.js("return [...document.images].map((image) => image.getAttribute('src'))")
    assert all(re.fullmatch(r"[tf]/[0-9a-f]{20}_\d+x\d+\.jpg", source) for source in images)


def test_hostile_addresses_and_queries(visitor: Visitor) -> None:
    """Whatever stands after the page's address is a text to search for, or a photo not there."""
    for text in (re.sub("[\ud800-\udfff]", "\ufffd", text) for text in HOSTILE):
        for fragment in ("#q=" + quote(text), f"#q={text}", f"#{text}", "#photo=" + quote(text)):
            visitor.js("location.hash = arguments[0]", fragment)
            visitor.until(lambda: visitor.js("return !waiting && !state.photo"
                                             " && state.text === readAddress().text"))
        harmless(visitor)
    base = visitor.url
    for text in (f"<img src=x onerror={RUN}>", f"javascript:{RUN}", f"</script><script>{RUN}"):
        for address in (f"?q={text}#q={text}", f"?{text}", f"#q={quote(text)}&photo={quote(text)}"):
            visitor.open(base, address)
            assert visitor.js("return window.ran") is None


@pytest.fixture()
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """A server that the page has nothing to do with: its address, and what it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_the_policy_holds(visitor: Visitor, elsewhere: tuple[str, list[str]]) -> None:
    """Were markup to slip in, the browser would refuse inline script and what is elsewhere."""
    address, asked = elsewhere
    visitor.js("""
        const [address, run] = arguments;
        window.refused = [];
        addEventListener("securitypolicyviolation", (event) =>
          refused.push(event.effectiveDirective));
        const add = (tag, attributes, text = "") => {
          const node = Object.assign(document.createElement(tag), attributes);
          node.append(text);
          document.body.append(node);
          return node;
        };
        add("img", { src: address + "/image" });
        add("iframe", { src: address + "/frame" });
        add("style", {}, "body { display: none }");
        fetch(address + "/fetch").catch(() => 0);
        for (const markup of [
          () => (document.body.innerHTML = `<img src=x onerror=${run}>`),
          () => document.body.setAttribute("onclick", run),
          () => add("script", { src: address + "/script" }),
          () => add("script", {}, run),
        ]) {
          try { markup(); } catch { refused.push("threw"); }
        }
        document.body.click();
        """, address, RUN)
    expected = ["connect-src", "frame-src", "img-src", "require-trusted-types-for",
                "style-src-elem", "threw"]
    visitor.until(lambda: sorted(set(visitor.js("return refused"))) == expected)
    assert asked == [] and visitor.js("return window.ran") is None
    visitor.open(visitor.url)  # the refusals are in the log of the page before


def test_over_http(visitor: Visitor, served: tuple[subprocess.Popen, int]) -> None:
    """The same page works from a server, under the same policy."""
    visitor.open(f"http://127.0.0.1:{served[1]}/", "#q=orange+heart")
    assert visitor.captions()[0] == "a orange heart"
    image = visitor.see("#results img")[0]
    visitor.until(lambda: visitor.js("return arguments[0].naturalWidth", image) > 0)


def test_a_missing_part_is_told(visitor: Visitor, album: Path, tmp_path: Path) -> None:
    """A copy without one data file still searches the rest, and says what is missing."""
    shutil.copytree(album, tmp_path / "copy")
    (tmp_path / "copy" / "data" / "photos-001.js").unlink()
    visitor.browser.get((tmp_path / "copy" / "index.html").as_uri() + "#q=red+ring")
    visitor.until(lambda: visitor.captions() and visitor.text("#missing"))
    assert "data/photos-001.js" in visitor.text("#missing")
    assert visitor.captions()[0] == "a red ring" and "first 20 of 36" in visitor.text("#notes")
    visitor.open(album.joinpath("index.html").as_uri())


def test_narrow_and_dark(visitor: Visitor) -> None:
    """Nothing overflows a screen of 320 pixels; colors follow the reader's wish."""
    send = visitor.browser.execute_cdp_cmd
    send("Emulation.setDeviceMetricsOverride",
         {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True})
    try:
        for fragment in ("", "#q=red+ring+on+the+baech", "#q=ring&photo=some+folder/a+red+ring.png",
                         "#q=" + "x" * 300):
            visitor.open(visitor.url, fragment)
            assert visitor.js("return document.documentElement.scrollWidth") <= 320
            assert visitor.js("return dialog.scrollWidth <= dialog.clientWidth")
        ground = visitor.js("return getComputedStyle(document.body).backgroundColor")
        send("Emulation.setEmulatedMedia",
             {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
        assert visitor.js("return getComputedStyle(document.body).backgroundColor") != ground
    finally:
        send("Emulation.setEmulatedMedia", {"features": []})
        send("Emulation.clearDeviceMetricsOverride", {})


def test_for_screen_readers(visitor: Visitor) -> None:
    """Every control and picture has a name, and what is found is announced."""
    visitor.type("red ring")
    visitor.see("#results .card a")[1].click()
    visitor.until(visitor.opened)
    tree = visitor.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"link", "button", "searchbox", "combobox", "image", "dialog", "list"}
    nodes = [(node["role"]["value"], node.get("name", {}).get("value", ""))
             for node in tree if not node["ignored"] and node.get("role")]
    named = [role for role, name in nodes if name]
    assert ("dialog", visitor.text("#photo h2")) in nodes
    assert {"link", "button", "image", "list"} <= set(named)
    visitor.browser.back()
    visitor.until(lambda: not visitor.opened())
    tree = visitor.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes += [(node["role"]["value"], node.get("name", {}).get("value", ""))
              for node in tree if not node["ignored"] and node.get("role")]
    assert ("searchbox", "Describe a picture") in nodes and ("search", "") in nodes
    assert "status" in {role for role, _ in nodes}
    assert [role for role, name in nodes if role in roles - {"list"} and not name] == []
