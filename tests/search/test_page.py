"""The search page: its files, its server, and the page in Chromium."""

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
DIM = 64
COLORS = {"red": "#e03632", "orange": "#f68a1e", "yellow": "#fad632", "green": "#42ac4c",
           "blue": "#3068de", "purple": "#8e4ccc"}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
WORDS = ["<pad>", "<unk>", "a", "on", "the", *SHAPES, *COLORS, "left", "right", "beach", "bench",
         "running", "runner", "constructor", "__proto__", "чайка", "犬"]

RUN = "window.ran=1"  # what hostile text tries to run
ELSEWHERE = "http://127.0.0.1:9/"  # nothing listens there; a request is an error
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
    # Attempts to leave a string, an attribute, a comment, a template, a style.
    f"\"'`);{RUN};//.jpg", f"\\\";{RUN};//", f"*/{RUN}/*", f"${{{RUN}}}", f"`${{{RUN}}}`",
    f"' onerror='{RUN}", f"\" onload=\"{RUN}", f"x\" autofocus onfocus=\"{RUN}",
    f"\\u003cscript\\u003e{RUN}", f"&lt;script&gt;{RUN}&lt;/script&gt;", "&#60;b&#62;", "%3Cb%3E",
    f"\");background:url({ELSEWHERE})", f"}}body{{background:url({ELSEWHERE})}}",
    "{{title}}.jpg", "{{scripts}}", "line\u2028separator\u2029.jpg",
    # URLs.
    f"javascript:{RUN}", f"JaVaScRiPt:{RUN}", f"java\nscript:{RUN}", f"\x01javascript:{RUN}",
    f"data:text/html,<script>{RUN}</script>", f"data:text/javascript,{RUN}", f"vbscript:{RUN}",
    f"blob:{ELSEWHERE}", f"{ELSEWHERE}x.jpg", "//127.0.0.1:9/x.jpg", "\\\\127.0.0.1\\x.jpg",
    "file:///etc/passwd", "/etc/passwd", "../../../etc/passwd", "..\\..\\x.jpg", "..", ".",
    "#&q=other&photo=x%00.jpg", "?q=red#q=blue", "&photo=&n=96", "%", "%u003c", "+", "%2e%2e%2f",
    # Characters that reverse, hide or break text.
    "turned\u202egpj.exe", "isolated\u2067name\u2066.jpg", "\u202d\u202c\u202a\u202b",
    "marks\u200e\u200f\u061c", "zero\u200bwidth\u200d\ufeff", "nul\x00 and bell\x07.jpg",
    "\x1b[2J\x9b31m", "tab\tand\r\nline", "   ", "not text \udcff.jpg", "\ud83d", "\ufffe\uffff",
    "e" + "\u0301" * 300, "\U0001f469\u200d\U0001f680", "日本語 фото שלום.jpg", "x" * 5000,
    # Properties of every JavaScript object.
    "__proto__", "constructor", "toString", "hasOwnProperty", "length", "null", "undefined", "NaN",
]


def rows_like(captions: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return word vectors, and unit vectors of images near the mean of their caption's words."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(len(WORDS), DIM)).astype(np.float32)
    rows = np.stack([encode(vectors, caption) for caption in captions])
    rows += 0.03 * rng.normal(size=rows.shape).astype(np.float32)
    return vectors, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def encode(vectors: np.ndarray, text: str) -> np.ndarray:
    """Return the embedding (D,) of a text; the reference implementation."""
    ids = [WORDS.index(word) if word in WORDS else 1 for word in split_words(text)]
    mean = vectors[ids].mean(0)
    return mean / np.linalg.norm(mean)


def make_arguments(folder: Path, names: list[str] | None = None) -> dict[str, Any]:
    """Return the arguments of write_page for 36 images, one colored rectangle each."""
    captions = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    photos = []
    for i, color in enumerate(COLORS.values()):
        for j in range(len(SHAPES)):
            photos.append(folder / "private" / f"{i}{j}.png")
            photos[-1].parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30 + j, 24 + i), color).save(photos[-1])
    vectors, rows = rows_like(captions, seed=0)
    return {
        "words": WORDS, "word_embeddings": vectors,
        "names": names or [f"some folder/{caption}.png" for caption in captions],
        "image_embeddings": rows, "captions": [[c, f"another of {c} ."] for c in captions],
        "paths": photos, "progress": False,
    }


def tiled(arguments: dict[str, Any], count: int) -> dict[str, Any]:
    """Repeat the images of the arguments until there are `count`."""
    order = [i % 36 for i in range(count)]
    lists = {key: [arguments[key][i] for i in order] for key in ("names", "captions", "paths")}
    return arguments | lists | {"image_embeddings": arguments["image_embeddings"][order]}


def read_data(folder: Path) -> tuple[dict, dict]:
    """Return the contents of words.js and of all image files, with vectors as floats."""
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


def test_the_files_hold_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files hold names, captions and images in order, and vectors up to int8 rounding."""
    monkeypatch.setattr(page, "IMAGES_PER_FILE", 10)
    arguments = make_arguments(tmp_path)
    counts = write_page(tmp_path / "album", **arguments)
    words, photos = read_data(tmp_path / "album")
    assert words["words"] == WORDS and words["photos"] == 36 and words["dim"] == DIM
    assert len(list((tmp_path / "album" / "data").iterdir())) == 1 + 4
    assert photos["names"] == arguments["names"] and photos["captions"] == arguments["captions"]
    for rows, exact in [(words["vectors"], arguments["word_embeddings"]),
                        (photos["vectors"], arguments["image_embeddings"])]:
        step = np.abs(exact).max(1, keepdims=True) / 127
        assert (np.abs(rows - exact) <= step / 2 * 1.001).all()
    for name, photo in zip(photos["pictures"], arguments["paths"], strict=True):
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


def test_large_images_are_written_in_two_sizes(tmp_path: Path) -> None:
    """The longest side is 256 in t/ and 1024 in f/."""
    arguments = tiled(make_arguments(tmp_path), 1)
    Image.new("RGB", (1500, 750), "teal").save(arguments["paths"][0])
    write_page(tmp_path / "album", **arguments)
    sizes = [load_image(next((tmp_path / "album" / size).iterdir())).size for size in ("t", "f")]
    assert sizes == [(256, 128), (1024, 512)]


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
    assert len(files) == 5 + 2 + 2 * 36  # parts, data, two sizes of each picture
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
    assert index.count("<script") == 4 and "<script>" not in index and "{{scripts}}" in index


def test_an_empty_page(tmp_path: Path) -> None:
    """A page without images can be written."""
    arguments = make_arguments(tmp_path)
    for key in ("names", "image_embeddings", "captions", "paths"):
        arguments[key] = arguments[key][:0]
    assert write_page(tmp_path / "album", **arguments)["photos"] == 0
    assert read_data(tmp_path / "album")[1]["vectors"].shape == (0, DIM)


def test_example_queries() -> None:
    """Examples are short captions of known words, or else words of the vocabulary."""
    words = ["<pad>", "<unk>", "a", "red", "ring", "star"]
    captions = [["A red ring .", "a much longer caption of it"], ["a red zebra"], [], ["a star"],
                ["a red star!"], ["A RED RING"]]
    assert sorted(example_queries(words, captions)) == ["a red ring", "a red star"]
    assert example_queries(words, [[]]) == ["ring", "star"]
    assert example_queries(words[:2], []) == []


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


@pytest.fixture()
def served(album: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """Return a process that serves the page, and its port."""
    # A shell that runs the tests in the background ignores SIGINT for them.
    code = ("import signal, sys; from pathlib import Path; "
            "from src.search.page_server import serve_page; "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "
            "serve_page(Path(sys.argv[1]), 0)")
    with subprocess.Popen([sys.executable, "-c", code, album], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process, int(re.search(r"127\.0\.0\.1:(\d+)/", process.stderr.readline())[1])
        finally:
            process.kill()


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


# ---- The page in a browser -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the arguments that the album is written with."""
    return make_arguments(tmp_path_factory.mktemp("arguments"))


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory, arguments: dict[str, Any]) -> Path:
    """Return a written page with two files of images."""
    folder = tmp_path_factory.mktemp("pages") / "album"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "IMAGES_PER_FILE", 20)
        write_page(folder, **arguments)
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a headless Chromium with its own profile; skip if there is none."""
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


class Browser:
    """Acts on the page and reads what it shows."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.url = ""

    def open(self, url: str, fragment: str = "") -> None:
        """Load a page and wait until all images are loaded and drawn."""
        self.url = url
        self.browser.get("about:blank")
        for kind in ("browser", "performance"):
            self.browser.get_log(kind)  # clear the log
        self.browser.get(url + fragment)
        self.until(lambda: self.js("return dim > 0 && photos.count === photos.total && drawn !== ''"
                                   " && !waiting"))

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page."""
        return self.browser.execute_script(script, *arguments)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until a condition is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 10, 0.02).until(lambda _: condition())

    def find(self, selector: str) -> list[Any]:
        """Return the elements of a CSS selector."""
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        """Return the text of the first such element; '' without one."""
        return self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def keys(self, *keys: str) -> None:
        """Press keys at the current focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def type(self, text: str) -> None:
        """Type a query and wait for its results."""
        box = self.find("#query")[0]
        box.clear()
        box.send_keys(text)
        self.until(lambda: self.settled(text))

    def settled(self, text: str) -> bool:
        """Return whether the results of a text are shown."""
        return self.js("return !waiting && JSON.parse(drawn)[0] === arguments[0]"
                       " && box.value === arguments[0]", text)

    def captions(self) -> list[str]:
        """Return the captions of the results in order."""
        return self.js("return [...document.querySelectorAll('#results .caption')]"
                       ".map((node) => node.textContent)")

    def focus(self) -> str:
        """Return the focused element as tag#id and text."""
        return self.js("const e = document.activeElement; return e.tagName.toLowerCase() + "
                       "(e.id && '#' + e.id) + ' ' + (e.querySelector('img')?.alt ?? '')")

    def fragment(self) -> str:
        """Return the URL after #."""
        return self.js("return decodeURIComponent(location.hash.replaceAll('+', ' '))")

    def opened(self) -> bool:
        """Return whether an image is open."""
        return self.js("return dialog.open")

    def errors(self) -> list[str]:
        """Return errors of the browser's log, and requests to anything but the page's folder."""
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
def browser(chromium: Any, album: Path) -> Iterator[Browser]:
    """Open the album from disk; check at the end that nothing ran and nothing was fetched."""
    someone = Browser(chromium)
    someone.open(album.joinpath("index.html").as_uri())
    yield someone
    assert someone.js("return window.ran") is None
    assert someone.errors() == []


def test_typing_finds_the_right_image(browser: Browser, album: Path, arguments: dict) -> None:
    """The image of the caption is first, with score, rank and contributions."""
    for number in (0, 17, 35):
        caption = arguments["captions"][number][0]
        browser.type(caption)
        assert browser.captions()[0] == caption
    assert len(browser.find("#results .card")) == 24
    assert browser.text("#notes") == "The 24 best of 36 photos"
    card = browser.find("#results .card")[0]
    assert card.find_element("css selector", ".rank").text == "1"
    assert float(card.find_element("css selector", ".score").text) > 0.9
    words = card.find_elements("css selector", ".contributions li")
    assert [node.text.split()[0] for node in words] == ["a", "purple", "ring"]
    image = card.find_element("css selector", "img")
    browser.until(lambda: browser.js("return arguments[0].naturalWidth", image) == 35)
    assert image.get_attribute("alt") == caption and image.get_attribute("loading") == "lazy"
    assert (image.get_dom_attribute("width"), image.get_dom_attribute("height")) == ("35", "29")


def test_ranking_equals_numpy(browser: Browser, album: Path, arguments: dict) -> None:
    """Order and scores equal those of numpy on the rounded vectors."""
    words, photos = read_data(album)
    for text in ("a red circle", "star", "blue blue triangle unheardof", "the " * 20 + "ring"):
        query = encode(words["vectors"], text)
        scores = photos["vectors"] @ query
        found = browser.js("return bestPhotos(encode(arguments[0]).vector, 24)", text)
        assert [result["photo"] for result in found] == np.argsort(-scores)[:24].tolist()
        ranked = [result["score"] for result in found]
        assert np.allclose(ranked, np.sort(scores)[::-1][:24], atol=2e-6)
        exact = arguments["image_embeddings"] @ encode(arguments["word_embeddings"], text)
        assert np.allclose(ranked, exact[[result["photo"] for result in found]], atol=0.01)


def test_sums_stay_in_32_bits(browser: Browser, tmp_path: Path, arguments: dict) -> None:
    """The largest possible sums do not overflow: all codes 127 and a parallel text give 1."""
    equal = np.full((36, DIM), DIM**-0.5, np.float32)
    equal[::2] *= -1
    vectors = np.ones((len(WORDS), DIM), np.float32)
    write_page(tmp_path / "album",
               **{**arguments, "image_embeddings": equal, "word_embeddings": vectors})
    browser.open((tmp_path / "album" / "index.html").as_uri(), "#q=red")
    found = browser.js("return bestPhotos(encode('red').vector, 36)")
    assert np.allclose([result["score"] for result in found], [1] * 18 + [-1] * 18, atol=1e-5)
    # Equal scores are in the order of the images.
    assert [result["photo"] for result in found] == [*range(1, 36, 2), *range(0, 36, 2)]


def test_contributions_sum_to_the_score(browser: Browser) -> None:
    """For every image and query the contributions of the words sum to the score."""
    worst = browser.js("""
        let worst = 0;
        for (const text of arguments[0]) {
          const query = encode(text);
          for (const { photo, score } of bestPhotos(query.vector, 36)) {
            const sum = contributionsOf(query, photo).reduce((a, b) => a + b, 0);
            worst = Math.max(worst, Math.abs(sum - score));
          }
        }
        return worst;""", ["red", "a red circle on the beach", "red nosuchword", "ring ring ring a",
                           "the purple heart left of a green star right on the beach"])
    assert worst < 2e-6


def test_tokenizer_equals_python(browser: Browser) -> None:
    """JavaScript and Python split every character and many texts in the same way."""
    texts = ["", "  ", "A man's T-shirt .", "snake_case __proto__", "ΟΔΥΣΣΕΥΣ ΣΑΣ Σ", "İstanbul",
             "ﬁne ① ½ ² Ⅻ", "naïve e\u0301", "犬と猫", "שלום, עולם!", "हिन्दी", "एक लड़का और लड़की",
             "מְנַקֵּד", "السَّلَام", "একটি মেয়ে", "ஒரு சிறுவன்", "ไก่ย่าง",
             "カ\u3099コーヒー・犬が々〇𠮷", "한국어 개", "क्\u200dष", "3\ufe0f\u20e3",
             "葛\U000e0100", "a犬\u0301b\u0301", "a\u200db", "👩‍👩‍👧",
             "x\x00y", "Straße ẞ", "ǅ Ǆ", "１２３ ４.５", "don’t", "a\u00ada", "\u202eabc", "ﷺ"]
    # Only characters that the Unicode version of this Python has assigned.
    assigned = [chr(code) for code in range(sys.maxunicode + 1)
                if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    texts += [f"x{character}Y {character}" for character in assigned]
    for start in range(0, len(texts), 50_000):
        part = texts[start:start + 50_000]
        words = browser.js("return arguments[0].map((text) => splitWords(text).join(' '))", part)
        different = [(text, found) for text, found in zip(part, words, strict=True)
                     if found != " ".join(split_words(text))]
        assert different == []


def test_an_image_opens_and_back_closes_it(browser: Browser, arguments: dict) -> None:
    """A click opens an image with its details; the back button closes it."""
    browser.type("green star")
    first = browser.captions()[0]
    browser.find("#results .card a")[0].click()
    browser.until(browser.opened)
    assert first == "a green star" and browser.text("#photo h2") == first
    assert browser.text("#photo .captions") == "another of a green star."
    assert browser.text("#photo .name") == "some folder/a green star.png"
    assert "/f/" in browser.find("#photo .frame img")[0].get_attribute("src")
    rows = [row.text.split() for row in browser.find("#photo .bars li")]
    score = float(browser.text("#photo h3 .score"))
    assert [row[0] for row in rows] == ["green", "star"]
    assert abs(sum(float(row[1]) for row in rows) - score) < 0.002
    assert browser.fragment() == "#q=green star&photo=some folder/a green star.png"

    vectors = arguments["image_embeddings"]
    number = arguments["names"].index("some folder/a green star.png")
    near = np.argsort(-(vectors @ vectors[number]))[1:9]
    alike = [node.get_attribute("alt") for node in browser.find("#photo .alike img")]
    assert len(alike) == 8 and alike[0] == arguments["captions"][near[0]][0]
    browser.find("#photo .alike a")[0].click()
    browser.until(lambda: browser.text("#photo h2") == alike[0])

    browser.browser.back()
    browser.until(lambda: browser.text("#photo h2") == first)
    browser.browser.back()
    browser.until(lambda: not browser.opened())
    assert browser.fragment() == "#q=green star" and browser.captions()[0] == first
    browser.browser.forward()
    browser.until(browser.opened)


def test_keys(browser: Browser) -> None:
    """The keys /, arrows, Enter and Esc move, open and close."""
    from selenium.webdriver.common.keys import Keys

    browser.keys("/")
    assert browser.focus() == "input#query "
    browser.keys("red ring")
    browser.until(lambda: browser.settled("red ring"))
    captions = browser.captions()
    columns = browser.js("return getComputedStyle(list).gridTemplateColumns.split(' ').length")
    browser.keys(Keys.ARROW_DOWN)
    assert browser.focus() == f"a {captions[0]}"
    browser.keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert browser.focus() == f"a {captions[1 + columns]}"
    browser.keys(Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert browser.focus() == f"a {captions[0]}"
    browser.keys(Keys.ENTER)
    browser.until(browser.opened)
    assert browser.focus() == "h2#photo-title " and browser.text("#photo h2") == captions[0]
    browser.keys(Keys.ARROW_RIGHT)
    browser.until(lambda: browser.text("#photo h2") == captions[1])
    browser.keys(Keys.ARROW_RIGHT)
    browser.until(lambda: browser.text("#photo h2") == captions[2])
    browser.keys(Keys.ESCAPE)
    browser.until(lambda: not browser.opened() and browser.fragment() == "#q=red ring")
    assert browser.focus() == f"a {captions[2]}"  # the image shown last
    browser.keys("/")
    assert browser.focus() == "input#query "
    browser.keys("heart")  # the old text is selected, and replaced
    browser.until(lambda: browser.settled("heart"))
    browser.keys(Keys.ARROW_DOWN, Keys.ARROW_UP)
    assert browser.focus() == "input#query "


def test_other_ways_to_close(browser: Browser) -> None:
    """The close button and a click beside the dialog close it."""
    browser.type("blue heart")
    for close in ("return document.querySelector('[data-close]').click()",
                  "return dialog.dispatchEvent(new MouseEvent('click', { bubbles: true }))"):
        browser.find("#results .card a")[0].click()
        browser.until(browser.opened)
        browser.js(close)
        browser.until(lambda: not browser.opened() and browser.fragment() == "#q=blue heart")


def test_the_url_restores_the_state(browser: Browser, album: Path) -> None:
    """A URL restores query, number of results and open image."""
    from selenium.webdriver.common.keys import Keys

    browser.open(browser.url, "#q=yellow+square&n=12&photo=some+folder%2Fa+red+star.png")
    assert browser.find("#query")[0].get_attribute("value") == "yellow square"
    assert browser.find("#count")[0].get_attribute("value") == "12"
    assert len(browser.captions()) == 12 and browser.captions()[0] == "a yellow square"
    assert browser.opened() and browser.text("#photo h2") == "a red star"
    browser.keys(Keys.ESCAPE)
    browser.until(lambda: not browser.opened())
    browser.until(lambda: browser.fragment() == "#q=yellow square&n=12")  # after the close event
    assert browser.browser.title.startswith("yellow square")


def test_a_query_is_one_step_back(browser: Browser) -> None:
    """The letters of a query are one history entry; back goes to the query before."""
    browser.type("green ring")
    browser.keys("\ue007")  # Enter ends the query
    browser.type("blue star")
    browser.browser.back()
    browser.until(lambda: browser.settled("green ring"))
    browser.browser.back()
    browser.until(lambda: browser.settled(""))
    browser.browser.forward()
    browser.browser.forward()
    browser.until(lambda: browser.settled("blue star"))


def test_number_of_results(browser: Browser) -> None:
    """12 to 96 results can be shown, and the number is kept in the URL."""
    browser.type("heart")
    for number, shown in ((12, 12), (96, 36), (48, 36)):
        browser.js("countBox.value = arguments[0];"
                   "countBox.dispatchEvent(new Event('change'))", number)
        browser.until(lambda n=number: f"&n={n}" in browser.fragment()
                      and browser.js("return JSON.parse(drawn)[1]") == n)
        assert len(browser.captions()) == shown


def test_unknown_words_and_suggestions(browser: Browser) -> None:
    """An unknown word is marked and similar words are offered; a click replaces it."""
    browser.type("red bench, on the baech")
    assert browser.captions()
    assert browser.text("#results .unknown .word") == "baech"
    note = browser.find("#notes p")[1]
    assert note.text.startswith("baech is not in the vocabulary") and "beach" in note.text
    browser.find("#notes a")[0].click()
    browser.until(lambda: browser.settled("red bench on the beach"))
    assert not browser.find("#results .unknown") and browser.focus() == "input#query "
    # Prefixes, one or two edits, swaps, JavaScript properties, and words without a suggestion.
    near = {word: browser.js("return nearWords(arguments[0])", word)
            for word in ("runn", "purpel", "crcle", "сhайка", "constructo", "zzzzzzzz", "x" * 5000)}
    assert near["runn"] == ["running", "runner"] and near["purpel"][0] == "purple"
    assert near["crcle"] == ["circle"] and near["constructo"] == ["constructor"]
    assert near["zzzzzzzz"] == near["x" * 5000] == []


def test_near_words_equal_python(browser: Browser, tmp_path: Path, arguments: dict) -> None:
    """The page and search.py suggest the same words in the same order."""
    rng = np.random.default_rng(0)

    def words(count: int) -> list[str]:
        return ["".join(rng.choice(list("abcdé犬\U00010330"), rng.integers(1, 9)))
                for _ in range(count)]

    known = list(dict.fromkeys([*WORDS[2:], *words(600)]))
    write_page(tmp_path / "album", **{
        **arguments, "words": WORDS[:2] + known,
        "word_embeddings": np.ones((2 + len(known), DIM), np.float32)})
    browser.open((tmp_path / "album" / "index.html").as_uri())
    asked = [*words(600), "runn", "purpel", "crcle", "сhайка", "constructo", "zzzzzzzz", "x" * 5000,
             *(word[:i] + word[i + 1:] for word in known[:30] for i in range(len(word)))]
    found = browser.js("return arguments[0].map((word) => nearWords(word))", asked)
    assert found == [near_words(word, known) for word in asked]
    assert sum(map(bool, found)) > 500 and sum(map(len, found)) > 1500
    pairs = [(a, b) for a, b in zip(asked, reversed(asked), strict=True) if len(a + b) < 50]
    assert browser.js("return arguments[0].map(([a, b]) => editDistance([...a], [...b]))", pairs) \
        == [edit_distance(a, b) for a, b in pairs]


def test_only_unknown_words_rank_nothing(browser: Browser) -> None:
    """Without a known word nothing is ranked, and the words are named."""
    browser.type("hart")
    assert browser.captions() == []
    assert "This word is not in the vocabulary" in browser.text("#notes")
    assert [link.text for link in browser.find("#notes a")] == ["heart"]
    browser.type("qqq www xyz vvv kkk jjj")
    assert browser.captions() == [] and "None of these words" in browser.text("#notes")
    assert "2 more words" in browser.text("#notes")
    browser.type("?!… 👍")
    assert "The query has no words" in browser.text("#notes") and len(browser.captions()) == 24
    for word in ("toString", "hasOwnProperty", "proto"):  # properties of objects are not words
        browser.type(word)
        assert browser.captions() == []


def test_a_very_long_query(browser: Browser) -> None:
    """All of its words are used, as far as the text field takes them."""
    browser.type("red circle " * 16 + "green star " * 40)
    assert len(browser.find("#results .card:first-child .contributions li")) == 112
    assert browser.captions()[0].startswith("a green star")
    browser.open(browser.url, "#q=" + "red+star+" * 100_000)
    assert len(browser.find("#query")[0].get_attribute("value")) == 2000
    assert len(browser.captions()) == 24


def test_an_empty_query(browser: Browser) -> None:
    """Without a query the page shows an introduction, examples and some images."""
    assert "36 photos" in browser.text("#intro") and len(browser.captions()) == 24
    assert not browser.find("#results .score") and not browser.find("#results .contributions li")
    examples = browser.find(".examples a")
    assert len(examples) == 6
    text = examples[2].text
    examples[2].click()
    browser.until(lambda: browser.settled(text))
    assert browser.captions()[0] == text and not browser.find("#intro")[0].is_displayed()
    browser.find("h1 a")[0].click()
    browser.until(lambda: browser.settled("") and browser.find("#intro")[0].is_displayed())


def test_negative_words(browser: Browser, album: Path) -> None:
    """Ranking and contributions are those of the difference of word vectors, as in search.py."""
    words, images = read_data(album)
    vector = words["vectors"][WORDS.index("circle")] - words["vectors"][WORDS.index("red")]
    scores = images["vectors"] @ vector / np.linalg.norm(vector)
    browser.type("circle -red -nosuchword")
    found = browser.js("return results")
    assert [result["photo"] for result in found] == np.argsort(-scores, kind="stable")[:24].tolist()
    assert np.allclose([result["score"] for result in found], np.sort(scores)[::-1][:24], atol=2e-6)
    values = browser.js("return contributionsOf(encode('circle -red -nosuchword'), 0)")
    assert np.isclose(sum(values), scores[0], atol=2e-6) and values[2] == 0
    parts = browser.js("return [...document.querySelectorAll('#results .card:first-child .word')]"
                       ".map((node) => node.textContent)")
    assert parts == ["circle", "-red", "-nosuchword"]
    assert "nosuchword is not in the vocabulary" in browser.text("#notes")
    browser.type("-red")
    assert browser.captions() == [] and "not in the vocabulary" not in browser.text("#notes p + p")
    browser.type("t-shirt star")
    assert browser.js("return encode(box.value).labels") == ["t", "shirt", "star"]


def test_near_duplicates_are_one_result(browser: Browser, tmp_path: Path, arguments: dict) -> None:
    """Images of a group are one result with their number; a link shows all of them."""
    tripled = tiled(arguments, 108) | {"groups": [i % 36 for i in range(108)]}
    write_page(tmp_path / "album", **tripled)
    browser.open((tmp_path / "album" / "index.html").as_uri())
    browser.type("red ring")
    assert len(set(browser.captions())) == 24
    assert browser.text("#results .copies") == "+2"
    assert "48 near duplicates are hidden" in browser.text("#notes")
    browser.find("#notes a")[0].click()
    browser.until(lambda: browser.js("return !waiting && JSON.parse(drawn)[3]"))
    assert browser.fragment() == "#q=red ring&d=1" and browser.captions()[:3] == ["a red ring"] * 3
    assert not browser.find("#results .copies")
    browser.open(browser.url, "#q=red ring&d=1")  # from the URL, and back
    assert browser.captions()[:3] == ["a red ring"] * 3
    browser.find("#notes a")[0].click()
    browser.until(lambda: browser.fragment() == "#q=red ring")
    browser.until(lambda: len(set(browser.captions())) == 24)


def test_more_results(browser: Browser, tmp_path: Path, arguments: dict) -> None:
    """Scrolling to the end, or the button, appends the next results; a new query starts again."""
    write_page(tmp_path / "album", **tiled(arguments, 100))
    browser.open((tmp_path / "album" / "index.html").as_uri(), "#n=12&d=1")
    browser.type("green star")
    first = browser.js("return results")
    assert len(first) == 12
    browser.js("scrollTo(0, document.documentElement.scrollHeight)")
    browser.until(lambda: len(browser.captions()) > 12)
    browser.js("get('more').click()")
    count = len(browser.captions())
    browser.until(lambda: len(browser.captions()) >= count)
    for _ in range(9):
        browser.js("get('more').click()")
        browser.until(lambda: browser.js("return !waiting"))
    assert len(browser.captions()) == 100 and not browser.find("#more")[0].is_displayed()
    assert browser.js("return results.slice(0, 12)") == first
    assert browser.js("return results") == browser.js("return bestPhotos("
                                                      "encode('green star').vector, 100)")
    browser.type("red ring")
    assert len(browser.captions()) == 12


def test_each_card_opens_its_own_image(browser: Browser, tmp_path: Path, arguments: dict) -> None:
    """Names that differ only in bytes that are not UTF-8, and equal names, are different images."""
    names = ["caf\udce9.jpg", "caf\udce8.jpg", "same.jpg", "same.jpg", "same.jpg (2)", "\ufffd"]
    write_page(tmp_path / "album", **{**tiled(arguments, 6), "names": names})
    browser.open((tmp_path / "album" / "index.html").as_uri(), "#q=a")
    shown = browser.js("return photos.names")
    assert len(set(shown)) == 6 and shown[:3] == ["caf\\xe9.jpg", "caf\\xe8.jpg", "same.jpg"]
    for i in range(6):
        links = browser.find("#results .card > a")
        place = [result["photo"] for result in browser.js("return results")].index(i)
        links[place].click()
        browser.until(lambda i=i: browser.opened() and browser.js("return lastPhoto") == i)
        browser.browser.back()
        browser.until(lambda: not browser.opened())


def display_name(name: str) -> str:
    """Return a name as the page has it; the reference implementation."""
    name = re.sub("[\udc80-\udcff]", lambda m: f"\\x{ord(m[0]) - 0xDC00:02x}", name)
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def tame(text: str) -> str:
    """Return the text as the page shows it; the reference implementation."""
    text = re.sub(r"[\s\ufeff]+", " ", re.sub("[\ud800-\udfff]", "\ufffd", text)).strip()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


def test_hostile_names_and_captions_are_text(
    browser: Browser, tmp_path: Path, arguments: dict
) -> None:
    """Hostile names and captions are shown as text; nothing runs, nothing is fetched."""
    captions = [[name, name] for name in HOSTILE]
    write_page(tmp_path / "album", **tiled(arguments, len(HOSTILE)) | {
        "names": HOSTILE, "captions": captions, "title": "<b>{{data}}</b>"})
    browser.open((tmp_path / "album" / "index.html").as_uri(), "#n=96")
    assert browser.text("h1") == "<b>{{data}}</b>"
    browser.type("red circle")
    shown = browser.captions()
    tokens = [re.sub(r" +([.,;:!?])(?=\s|$)", r"\1", tame(name)) for name in HOSTILE]
    assert len(shown) == len(HOSTILE) and set(shown) == {
        caption or tame(name) for caption, name in zip(tokens, HOSTILE, strict=True)}
    for i, name in enumerate(HOSTILE):  # open each one
        browser.js("go({ photo: photos.names[arguments[0]] })", i)
        browser.until(lambda i=i: browser.js("return !waiting && lastPhoto === arguments[0]", i))
        shown = browser.js("return dialog.querySelector('.name').textContent")
        assert shown == tame(display_name(name))
        assert browser.js("return readAddress().photo === photos.names[arguments[0]]", i)
    check_harmless(browser)


def check_harmless(browser: Browser) -> None:
    """Check that no markup was created, and that every link leads to the page itself."""
    assert browser.find("script:not([src]), style, iframe, object, base, form[action], #results svg"
                       ) == []
    assert browser.js("""
        return [...document.querySelectorAll('*')].flatMap((node) => [...node.attributes])
          .filter(({ name }) => name.startsWith('on') || name === 'srcdoc').length""") == 0
    links = browser.js("return [...document.querySelectorAll('a')].map((a) => a.href)")
    assert links and all(link.startswith(browser.url + "#") for link in links)
    images = browser.js("return [...document.images].map((image) => image.getAttribute('src'))")
    assert all(re.fullmatch(r"[tf]/[0-9a-f]{20}_\d+x\d+\.jpg", source) for source in images)


def test_hostile_urls_and_queries(browser: Browser) -> None:
    """Any URL fragment is a query or the name of an image."""
    for text in (re.sub("[\ud800-\udfff]", "\ufffd", text) for text in HOSTILE):
        for fragment in ("#q=" + quote(text), f"#q={text}", f"#{text}", "#photo=" + quote(text)):
            browser.js("location.hash = arguments[0]", fragment)
            browser.until(lambda: browser.js("return !waiting && !state.photo"
                                             " && state.text === readAddress().text"))
        check_harmless(browser)
    base = browser.url
    for text in (f"<img src=x onerror={RUN}>", f"javascript:{RUN}", f"</script><script>{RUN}"):
        for address in (f"?q={text}#q={text}", f"?{text}", f"#q={quote(text)}&photo={quote(text)}"):
            browser.open(base, address)
            assert browser.js("return window.ran") is None


@pytest.fixture()
def other_server() -> Iterator[tuple[str, list[str]]]:
    """Return another server: its URL, and the list of its requests."""
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


def test_the_content_security_policy(browser: Browser, other_server: tuple[str, list[str]]) -> None:
    """The content security policy blocks inline scripts and foreign requests."""
    address, asked = other_server
    browser.js("""
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
    browser.until(lambda: sorted(set(browser.js("return refused"))) == expected)
    assert asked == [] and browser.js("return window.ran") is None
    browser.open(browser.url)  # clears the log of the refusals


def test_over_http(browser: Browser, served: tuple[subprocess.Popen, int]) -> None:
    """The same page works over HTTP, under the same policy."""
    browser.open(f"http://127.0.0.1:{served[1]}/", "#q=orange+heart")
    assert browser.captions()[0] == "a orange heart"
    image = browser.find("#results img")[0]
    browser.until(lambda: browser.js("return arguments[0].naturalWidth", image) > 0)


def test_a_missing_file_is_named(browser: Browser, album: Path, tmp_path: Path) -> None:
    """Without one data file the page searches the rest and names the missing file."""
    shutil.copytree(album, tmp_path / "copy")
    (tmp_path / "copy" / "data" / "photos-001.js").unlink()
    browser.browser.get((tmp_path / "copy" / "index.html").as_uri() + "#q=red+ring")
    browser.until(lambda: browser.captions() and browser.text("#missing"))
    assert "data/photos-001.js" in browser.text("#missing")
    assert browser.captions()[0] == "a red ring" and "first 20 of 36" in browser.text("#notes")
    browser.open(album.joinpath("index.html").as_uri())


def test_narrow_and_dark(browser: Browser) -> None:
    """Nothing overflows 320 pixels; colors follow the color scheme."""
    send = browser.browser.execute_cdp_cmd
    send("Emulation.setDeviceMetricsOverride",
         {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True})
    try:
        for fragment in ("", "#q=red+ring+on+the+baech", "#q=ring&photo=some+folder/a+red+ring.png",
                         "#q=" + "x" * 300):
            browser.open(browser.url, fragment)
            assert browser.js("return document.documentElement.scrollWidth") <= 320
            assert browser.js("return dialog.scrollWidth <= dialog.clientWidth")
        ground = browser.js("return getComputedStyle(document.body).backgroundColor")
        send("Emulation.setEmulatedMedia",
             {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
        assert browser.js("return getComputedStyle(document.body).backgroundColor") != ground
    finally:
        send("Emulation.setEmulatedMedia", {"features": []})
        send("Emulation.clearDeviceMetricsOverride", {})


def test_for_screen_readers(browser: Browser) -> None:
    """Every control and image has a name, and results are announced."""
    browser.type("red ring")
    browser.find("#results .card a")[1].click()
    browser.until(browser.opened)
    tree = browser.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"link", "button", "searchbox", "combobox", "image", "dialog", "list"}
    nodes = [(node["role"]["value"], node.get("name", {}).get("value", ""))
             for node in tree if not node["ignored"] and node.get("role")]
    named = [role for role, name in nodes if name]
    assert ("dialog", browser.text("#photo h2")) in nodes
    assert {"link", "button", "image", "list"} <= set(named)
    browser.browser.back()
    browser.until(lambda: not browser.opened())
    tree = browser.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes += [(node["role"]["value"], node.get("name", {}).get("value", ""))
              for node in tree if not node["ignored"] and node.get("role")]
    assert ("searchbox", "Describe a photo") in nodes and ("search", "") in nodes
    assert "status" in {role for role, _ in nodes}
    assert [role for role, name in nodes if role in roles - {"list"} and not name] == []
