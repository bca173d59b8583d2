"""Search pages for the tests, and a browser that opens them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from src.models.tokenizer import split_words

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
    """Return the contents of page.js with words.js, and of all image files; vectors as floats."""
    facts = json.loads(re.fullmatch(r"addPage\((.*)\);\n",
                                    (folder / "data" / "page.js").read_text("ascii"))[1])
    parts = []
    for path in [folder / "data" / "words.js", *sorted((folder / "data").glob("photos-*.js"))]:
        data = json.loads(re.fullmatch(r"\w+\((.*)\);\n", path.read_text("ascii"))[1])
        scales = np.frombuffer(base64.b64decode(data.pop("scales")), "<f4")
        codes = np.frombuffer(base64.b64decode(data.pop("codes")), np.int8)
        data["vectors"] = codes.reshape(len(scales), -1).astype(np.float64) * scales[:, None]
        parts.append(data)
    words, *photos = parts
    words = facts | words
    joined = {key: sum((part[key] for part in photos), [])
              for key in ("names", "captions", "pictures")}
    joined["vectors"] = np.concatenate([np.zeros((0, facts["dim"])),
                                        *(part["vectors"] for part in photos)])
    return words, joined


def display_name(name: str) -> str:
    """Return a name as the page has it; the reference implementation."""
    name = re.sub("[\udc80-\udcff]", lambda m: f"\\x{ord(m[0]) - 0xDC00:02x}", name)
    return re.sub("[\ud800-\udfff]", "\ufffd", name)


def tame(text: str) -> str:
    """Return the text as the page shows it; the reference implementation."""
    text = re.sub(r"[\s\ufeff]+", " ", re.sub("[\ud800-\udfff]", "\ufffd", text)).strip()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


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
        self.until(lambda: self.js(  # at first the document may still be the one before
            "return typeof dim === 'number' && dim > 0 && photos.count === photos.total"
            " && vocabulary.codes !== null && drawn !== '' && !waiting"))

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
        return self.js("return !waiting && state.text === arguments[0]"
                       " && box.value === arguments[0]", text)

    def show_all(self) -> None:
        """Show all results, as after scrolling through all of them."""
        self.js("more = photos.total; schedule()")
        self.until(lambda: self.js("return !waiting && get('more').hidden"))

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
