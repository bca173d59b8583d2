"""The search page in Chromium: layout, unfinished queries, opened photos, incomplete pages."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.search import page
from src.search.page import write_page
from tests.search.pages import WORDS, Browser, encode, read_data, tiled

TITLE = "Photographs of the extended family and of their friends"
WIDTHS = (320, 768, 960, 1024, 1280)


@contextmanager
def screen(browser: Browser, width: int, height: int, scale: float = 1, scheme: str = "light"
           ) -> Iterator[None]:
    """Show the page on a screen of a size in CSS pixels, with a color scheme."""
    send = browser.browser.execute_cdp_cmd
    send("Emulation.setDeviceMetricsOverride",
         {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False})
    send("Emulation.setEmulatedMedia",
         {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        yield
    finally:
        send("Emulation.setEmulatedMedia", {"features": []})
        send("Emulation.clearDeviceMetricsOverride", {})


def open_photo(browser: Browser, place: int = 0) -> None:
    """Open the photo of a result."""
    browser.js("list.children[arguments[0]].firstChild.click()", place)
    browser.until(lambda: browser.opened() and browser.js("return !waiting"))


def rectangle(browser: Browser, selector: str) -> list[float]:
    """Return left, top, right and bottom of an element on the screen."""
    return browser.js("const box = document.querySelector(arguments[0]).getBoundingClientRect();"
                      "return [box.left, box.top, box.right, box.bottom]", selector)


# ---- Layout --------------------------------------------------------------------------------------


def test_the_bar_is_low(browser: Browser, tmp_path: Path, arguments: dict) -> None:
    """On every width, and zoomed to 200 %, the bar is lower than 130 pixels: a long title stays on
    one line, without its words broken, and nothing overflows."""
    write_page(tmp_path / "album", **arguments, title=TITLE)
    browser.open((tmp_path / "album" / "index.html").as_uri(), "#q=red+ring")
    for width, scale in [*((width, 1) for width in WIDTHS), (1280 / 2, 2), (1024 / 2, 2)]:
        with screen(browser, int(width), 800, scale):
            _, top, _, bottom = rectangle(browser, "header")
            assert (top, bottom < 130) == (0, True), (width, bottom)
            _, top, _, bottom = rectangle(browser, "h1")
            assert bottom - top < 35, width
            assert rectangle(browser, "form")[2] - rectangle(browser, "form")[0] > 250
            assert browser.js("return document.documentElement.scrollWidth") <= width
    assert browser.find("h1 a")[0].get_attribute("title") == TITLE


def test_rows_of_whole_photos(browser: Browser, tmp_path: Path, arguments: dict) -> None:
    """No photo is cut off or distorted, photos of a row have one height, rows fill the width, and
    the last one is not enlarged; very wide and very narrow photos get a frame."""
    sizes = [(300, 200), (200, 300), (256, 256), (320, 180), (240, 320), (900, 90), (40, 400)] * 5
    arguments = tiled(arguments, len(sizes))
    arguments["paths"] = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    for path, size in zip(arguments["paths"], sizes, strict=True):
        Image.new("RGB", size, "teal").save(path)
    write_page(tmp_path / "album", **arguments)
    browser.open((tmp_path / "album" / "index.html").as_uri())
    for width in WIDTHS:
        with screen(browser, width, 900):
            browser.show_all()
            found = browser.js("""
                return [...list.children].map((card) => {
                  const { left, right, top, width, height } = card.getBoundingClientRect();
                  const image = card.querySelector("img");
                  const style = getComputedStyle(image);
                  return [top, left, right, image.clientWidth / image.clientHeight,
                    image.clientHeight, image.getAttribute("width"), image.getAttribute("height"),
                    style.objectFit];
                })""")
            inner = browser.js("const { left, right } = list.getBoundingClientRect();"
                               "return [left, right]")
            least = float(browser.js("return getComputedStyle(document.documentElement)"
                                     ".getPropertyValue('--row')").removesuffix("px"))
            rows: dict[float, list] = {}
            for card in found:
                rows.setdefault(card[0], []).append(card)
                ratio = int(card[5]) / int(card[6])
                assert card[3] == pytest.approx(min(2.6, max(0.7, ratio)), abs=0.03)
                assert card[7] == "contain"
            assert len(rows) > 3
            *full, last = rows.values()
            for row in full:
                assert np.ptp([card[4] for card in row]) <= 1.5
                assert row[0][1] == pytest.approx(inner[0], abs=1)
                assert row[-1][2] == pytest.approx(inner[1], abs=1)
            assert max(card[4] for card in last) <= least + 1
            assert browser.js("return document.documentElement.scrollWidth") <= width


def test_numbers_are_legible(browser: Browser) -> None:
    """The numbers on the words of a card have a contrast of at least 4.5 in both color schemes."""
    browser.type("red ring -blue -purple the nosuchword")
    browser.show_all()
    for scheme in ("light", "dark"):
        with screen(browser, 1280, 900, scheme=scheme):
            pairs = browser.js("""
                return [...document.querySelectorAll(".contributions li")].map((item) =>
                  [getComputedStyle(item.querySelector(".value")).color,
                   getComputedStyle(item).backgroundColor])""")
            assert len(set(map(tuple, pairs))) > 40
            contrasts = [contrast(*map(luminance, pair)) for pair in pairs]
            assert min(contrasts) >= 4.5, (scheme, min(contrasts))


def luminance(color: str) -> float:
    """Return the relative luminance (WCAG 2) of an opaque color as getComputedStyle gives it."""
    numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-\d+)?", color)]
    assert color.startswith(("rgb(", "color(srgb ")) and len(numbers) == 3, color
    channels = [value / 255 if color.startswith("rgb(") else value for value in numbers]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    """Return the contrast ratio of two luminances."""
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_words_are_folded_on_a_phone(browser: Browser) -> None:
    """On a narrow screen the contributions are in the opened photo, not on the cards."""
    browser.type("red ring")
    for width, shown in ((1280, True), (390, False)):
        with screen(browser, width, 800):
            assert browser.find("#results .contributions")[0].is_displayed() == shown
            open_photo(browser)
            bars = browser.find("#photo .bars li")
            assert len(bars) == 2 and all(bar.is_displayed() for bar in bars)
            browser.browser.back()
            browser.until(lambda: not browser.opened())


def test_repeated_words_are_shown_once(browser: Browser) -> None:
    """A repeated word is one item with its number; the items still sum to the score."""
    browser.type("a red ring on a bench a")
    for selector in ("#results .card:first-child .contributions", "#photo .bars"):
        words = [node.get_attribute("textContent")
                 for node in browser.find(f"{selector} .word")]
        if not words:
            open_photo(browser)
            words = [node.text for node in browser.find(f"{selector} .word")]
        assert words == ["a ×3", "red", "ring", "on", "bench"]
    values = [float(node.text.replace("\u2212", "-")) for node in browser.find(".bars .value")]
    assert abs(sum(values) - float(browser.text("#photo h3 .score"))) < 0.003


# ---- Typing --------------------------------------------------------------------------------------


def test_typing_never_blanks_the_page(browser: Browser) -> None:
    """After each letter there are photos: the first completion of an unfinished word counts, and is
    named. A finished word does not count as another one, but Enter writes the completion."""
    text = "a running rin on the beach"
    known = WORDS[2:]
    for i, letter in enumerate(text):
        browser.keys("/" if not i else "", letter)
        typed = text[: i + 1]
        *before, last = typed.split(" ")
        word = next((word for word in known if last and word.startswith(last)), "")
        whole = last if last in known else word
        browser.until(lambda typed=typed: browser.settled(typed))
        assert browser.captions(), typed
        assert browser.js("return drawnText") == " ".join([*before, whole])
        notes = [note.text for note in browser.find("#notes p") if "counts" in note.text]
        assert notes == [f"{last} … counts as {word}"] * (last not in known and last != ""), typed
    browser.type("red ci")
    unfinished = browser.js("return results")
    browser.keys("\ue007")
    browser.until(lambda: browser.fragment() == "#q=red circle")
    browser.until(lambda: browser.find("#query")[0].get_attribute("value") == "red circle")
    assert browser.js("return results") == unfinished
    browser.type("red ci ")
    assert browser.text("#results .unknown .word") == "ci"
    assert "Not known: ci" in browser.text("#notes") and "counts as" not in browser.text("#notes")
    browser.type("ring -pur")
    assert browser.js("return drawnText") == "ring -purple"


def test_leaving_the_box_keeps_the_results(browser: Browser) -> None:
    """A click on a photo of an unfinished query opens it, and the query is the completed one."""
    browser.type("green sta")
    first = browser.captions()[0]
    assert first == "a green star"
    browser.find("#results .card a")[0].click()
    browser.until(browser.opened)
    assert browser.text("#photo h2") == first
    assert browser.fragment() == "#q=green star&photo=some folder/a green star.png"
    browser.browser.back()
    browser.until(lambda: not browser.opened())
    assert browser.captions()[0] == first
    assert browser.find("#query")[0].get_attribute("value") == "green star"


def test_one_suggestion_for_several_words(browser: Browser) -> None:
    """One link corrects all misspelt words; words to avoid stay words to avoid."""
    browser.type("rde cricle on the baech -purpel xqz")
    notes = [note.text for note in browser.find("#notes p")]
    assert notes[1:] == ["Not known: rde, cricle, baech, xqz and 1 more",
                         "Did you mean red circle on the beach xqz -purple"]
    links = browser.find("#notes a")
    assert len(links) == 1
    links[0].click()
    browser.until(lambda: browser.settled("red circle on the beach xqz -purple"))
    assert browser.captions()[0] == "a red circle"


# ---- The opened photo ----------------------------------------------------------------------------


def test_picture_and_buttons_stay_in_sight(
    browser: Browser, tmp_path: Path, arguments: dict
) -> None:
    """On every screen the whole picture and all buttons are in sight, also when the text is
    scrolled to its end."""
    arguments = tiled(arguments, 3)
    Image.new("RGB", (400, 1200), "teal").save(tmp_path / "tall.png")
    Image.new("RGB", (1500, 500), "teal").save(tmp_path / "wide.png")
    arguments |= {"captions": [["a red ring"] + ["a long caption " * 9] * 30] * 3,
                  "paths": [tmp_path / "tall.png", tmp_path / "wide.png", arguments["paths"][0]]}
    write_page(tmp_path / "album", **arguments)
    browser.open((tmp_path / "album" / "index.html").as_uri(), "#q=red+ring")
    parts = ["#stage img", *(f"nav > :nth-child({i})" for i in range(1, 7))]
    for width, height in ((320, 568), (844, 390), (768, 1024), (1024, 768), (1600, 1000)):
        with screen(browser, width, height):
            for place in range(3):
                open_photo(browser, place)
                for _ in range(2):
                    boxes = browser.js("return arguments[0].map((selector) => {"
                                       "const box = document.querySelector(selector)"
                                       ".getBoundingClientRect();"
                                       "return [box.left, box.top, box.right, box.bottom]})", parts)
                    for left, top, right, bottom in boxes:
                        assert 0 <= left < right <= width and 0 <= top < bottom <= height
                    picture, *buttons = boxes
                    assert picture[1] >= max(bottom for *_, bottom in buttons)
                    scrolled = browser.js("const about = get('about'); about.scrollTo(0, 1e6);"
                                          "return about.scrollTop")
                    assert scrolled > 0
                browser.keys("\ue00c")
                browser.until(lambda: not browser.opened() and not browser.js("return state.photo"))


def test_the_focus_stays_on_next(browser: Browser, tmp_path: Path, arguments: dict) -> None:
    """The buttons come first in tab order; pressing Next keeps the focus, and loads more results at
    the end of the list. At the last photo the button stays, without effect."""
    from selenium.webdriver.common.keys import Keys

    write_page(tmp_path / "album", **tiled(arguments, 40))
    browser.open((tmp_path / "album" / "index.html").as_uri(), "#q=red+ring&d=1")

    def focused() -> str:
        return browser.js("return document.activeElement.getAttribute('aria-label')"
                          "|| document.activeElement.innerText")

    with screen(browser, 1280, 300):  # a low screen, on which few results are drawn
        browser.js("more = 0; schedule()")
        browser.until(lambda: browser.js("return !waiting"))
        assert len(browser.captions()) == 24
        open_photo(browser, 19)
        names = []
        for _ in range(7):
            browser.keys(Keys.TAB)
            names.append(focused())
        assert names[:6] == ["Previous photo", "Next photo", "More like this", "Copy link", "Zoom",
                             "Close"]
        browser.js("document.querySelector('[data-step=\"1\"]').focus()")
        seen = []
        for _ in range(20):
            seen.append(browser.js("return lastPhoto"))
            browser.keys(Keys.ENTER)
            browser.until(lambda last=seen[-1]: browser.js(
                "return !waiting && lastPhoto !== arguments[0]", last))
            assert focused() == "Next photo"
        browser.keys(Keys.ENTER)
        browser.until(lambda: browser.js("return !waiting"))
        assert browser.js("return lastPhoto") not in seen and len(set(seen)) == 20
        states = [button.get_attribute("aria-disabled")
                  for button in browser.find("[data-step]")]
        assert states == ["false", "true"] and focused() == "Next photo"
        assert browser.js("return results.map(({ photo }) => photo).slice(19, 39)") == seen


def test_more_like_this(browser: Browser, album: Path) -> None:
    """The photo becomes the query: the photos are ranked by similarity to it, without itself, and
    the query has its own URL. Typing, or ×, ends it; back opens the photo again."""
    _, photos = read_data(album)
    browser.type("green star")
    open_photo(browser)
    name, number = "some folder/a green star.png", photos["names"].index(
        "some folder/a green star.png")
    vectors = photos["vectors"] / np.linalg.norm(photos["vectors"], axis=1, keepdims=True)
    order = [i for i in np.argsort(-(photos["vectors"] @ vectors[number])).tolist() if i != number]
    browser.find("#like")[0].click()
    browser.until(lambda: browser.fragment() == f"#like={name}" and not browser.opened())
    browser.until(lambda: browser.js("return !waiting"))
    browser.show_all()
    assert browser.js("return results.map(({ photo }) => photo)") == order
    assert "like a green star" in " ".join(browser.text("#notes").split())
    assert browser.find("#query")[0].get_attribute("value") == ""
    assert not browser.find("#results .contributions li") and browser.find("#results .score")
    assert browser.browser.title.startswith("Photos like a green star")
    browser.browser.back()
    browser.until(lambda: browser.opened() and browser.text("#photo h2") == "a green star")
    browser.open(browser.url, f"#like={name.replace(' ', '+')}")  # from the URL
    assert browser.js("return results[0].photo") == order[0]
    browser.find("#notes a[aria-label=End]")[0].click()
    browser.until(lambda: browser.fragment() == "" and browser.text("#intro"))
    browser.open(browser.url, "#like=nothing.png")
    assert "There is no photo named nothing.png" in browser.text("#notes")
    browser.type("red ring")
    assert browser.fragment() == "#q=red ring" and browser.captions()[0] == "a red ring"


def test_near_duplicates_of_a_liked_photo(
    browser: Browser, tmp_path: Path, arguments: dict
) -> None:
    """Near duplicates of the photo are not results unless all are shown."""
    tripled = tiled(arguments, 108) | {"groups": [i % 36 for i in range(108)]}
    write_page(tmp_path / "album", **tripled)
    for fragment, copies in (("", 0), ("&d=1", 2)):
        browser.open((tmp_path / "album" / "index.html").as_uri(),
                     f"#like=some+folder/a+red+star.png{fragment}")
        browser.show_all()
        assert browser.captions().count("a red star") == copies
        assert len(browser.captions()) == (107 if copies else 35)


def test_copy_link(browser: Browser) -> None:
    """The address of the photo is copied, and the button says so; also where the browser does not
    offer a clipboard to the page, as without https."""
    browser.type("blue heart")
    open_photo(browser)
    browser.js("""
        window.copied = [];
        document.addEventListener("copy", () => copied.push(document.activeElement.value));
        const writeText = async (text) => { copied.push(text); };
        Object.defineProperty(navigator, "clipboard", { configurable: true, value: { writeText } });
        window.later = [];
        window.setTimeout = (callback) => later.push(callback);""")
    address = browser.js("return location.href")
    assert "photo=some+folder" in address
    for _ in range(2):
        browser.find("#copy")[0].click()
        browser.until(lambda: browser.text("#copy") == "Copied")
        assert browser.js("return copied") == [address]
        assert browser.js("return document.activeElement.id") == "copy"
        browser.js("later.pop()()")
        assert browser.text("#copy") == "Copy link"
        browser.js("window.copied.length = 0;"
                   "Object.defineProperty(navigator, 'clipboard', { value: undefined })")


def swipe(browser: Browser, right: int, down: int = 0) -> None:
    """Move a finger over the picture."""
    left, top, to, bottom = rectangle(browser, "#stage")
    x, y = (left + to) / 2, (top + bottom) / 2
    for kind, points in (("touchStart", [{"x": x, "y": y}]),
                         ("touchMove", [{"x": x + right / 2, "y": y + down / 2}]),
                         ("touchMove", [{"x": x + right, "y": y + down}]), ("touchEnd", [])):
        browser.browser.execute_cdp_cmd("Input.dispatchTouchEvent",
                                        {"type": kind, "touchPoints": points})
    browser.until(lambda: browser.js("return !waiting"))


def test_swipe(browser: Browser) -> None:
    """A swipe to the left shows the next photo, to the right the one before; a short or vertical
    one does nothing, and neither does one on an enlarged picture."""
    browser.type("blue heart")
    with screen(browser, 390, 844):
        open_photo(browser, 3)
        order = browser.js("return results.map(({ photo }) => photo)")
        for right, down, place in ((-120, 5, 4), (-90, -20, 5), (120, 0, 4), (20, 0, 4),
                                   (-60, 110, 4), (70, -60, 4)):
            swipe(browser, right, down)
            assert browser.js("return lastPhoto") == order[place], (right, down)
        assert browser.find("#zoom")[0].get_attribute("aria-pressed") == "false"
        browser.find("#zoom")[0].click()
        swipe(browser, -120)
        assert browser.js("return lastPhoto") == order[4]


def test_zoom(browser: Browser, tmp_path: Path, arguments: dict) -> None:
    """A click on the picture, or the button, enlarges it, and a second one makes it fit again; the
    arrow keys move the enlarged picture instead of opening the next one."""
    from selenium.webdriver.common.keys import Keys

    arguments = tiled(arguments, 2)
    for path in (tmp_path / "0.png", tmp_path / "1.png"):
        Image.new("RGB", (800, 600), "teal" if "0" in path.name else "navy").save(path)
    arguments["paths"] = [tmp_path / "0.png", tmp_path / "1.png"]
    write_page(tmp_path / "album", **arguments)
    browser.open((tmp_path / "album" / "index.html").as_uri(), "#q=red")
    open_photo(browser)

    def size() -> tuple[float, float]:
        left, top, right, bottom = rectangle(browser, "#stage img")
        return right - left, bottom - top

    photo, fit = browser.js("return lastPhoto"), size()
    for toggle in ("#zoom", "#stage img"):
        browser.find(toggle)[0].click()
        width, height = size()
        assert width > 1.9 * fit[0] and width / height == pytest.approx(800 / 600, rel=0.01)
        assert browser.find("#zoom")[0].get_attribute("aria-pressed") == "true"
        center = browser.js("return [stage.scrollLeft / (stage.scrollWidth - stage.clientWidth),"
                            "stage.scrollTop / (stage.scrollHeight - stage.clientHeight)]")
        assert center == pytest.approx([0.5, 0.5], abs=0.02)
        browser.js("stage.focus(); stage.scrollTo(0, 0)")
        browser.keys(Keys.ARROW_RIGHT)
        browser.until(lambda: browser.js("return stage.scrollLeft") > 0)
        assert browser.js("return lastPhoto") == photo
        browser.find(toggle)[0].click()
        assert size() == fit and browser.js("return stage.tabIndex") == -1
    browser.find("#zoom")[0].click()
    browser.find("[data-step='1']")[0].click()
    browser.until(lambda: browser.js("return lastPhoto") != photo)
    assert browser.js("return [isZoomed(), stage.tabIndex]") == [False, -1]
    assert browser.find("#zoom")[0].get_attribute("aria-pressed") == "false"


def test_negative_scores_and_weak_matches(
    browser: Browser, tmp_path: Path, arguments: dict
) -> None:
    """Matches below the given score are called weak, from the first of them on or all; without a
    score none is. The words of a photo with a negative score do not say why it fits."""
    words, images = arguments["word_embeddings"], arguments["image_embeddings"]
    scores = np.sort(images @ encode(words, "red ring"))[::-1]
    assert scores[-1] < -0.05 and scores[4] - scores[5] > 0.01
    for limit, note, count in ((float(scores[4] + scores[5]) / 2,
                                "Weak matches from number 6 on", 31),
                               (2.0, "Weak matches: no photo fits well", 36), (None, None, 0)):
        write_page(tmp_path / "album", **arguments, weak_score=limit)
        browser.open((tmp_path / "album" / "index.html").as_uri(), "#q=red+ring")
        browser.show_all()
        assert [text.text for text in browser.find("#notes p")[1:]] == [note] * (note is not None)
        labels = [label.text for label in browser.find("#results .score")]
        assert [label.startswith("weak ") for label in labels] == [False] * (36 - count) \
            + [True] * count
        open_photo(browser)
        assert browser.text("#photo h3").startswith("Why it fits 0.")
        assert ("a weak match" in browser.text("#photo h3")) == (limit == 2)
        browser.browser.back()
        browser.until(lambda: not browser.opened())
    browser.js("list.lastChild.firstChild.click()")
    browser.until(browser.opened)
    assert browser.text("#photo h3").startswith("How it scores \u22120.")


# ---- Slow lines and incomplete copies ------------------------------------------------------------


class SlowServer(ThreadingHTTPServer):
    """Serves a folder; each data file only after it is released."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.released = {name: threading.Event()
                         for name in ("photos-000", "words", "photos-001", "photos-002")}
        super().__init__(("127.0.0.1", 0), partial(SlowHandler, directory=str(folder)))


class SlowHandler(SimpleHTTPRequestHandler):
    """Waits before it answers."""

    def do_GET(self) -> None:
        name = Path(self.path.partition("?")[0]).stem
        self.server.asked.append(name)
        if name in self.server.released:
            self.server.released[name].wait(30)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


def test_a_slow_line(
    impatient_chromium: object, arguments: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the first photos are there the page says that it is loading; then it shows a sample,
    and with the words it searches the sample. Each other file is asked for after the one before."""
    monkeypatch.setattr(page, "FIRST_IMAGES", 20)
    monkeypatch.setattr(page, "IMAGES_PER_FILE", 9)
    write_page(tmp_path / "album", **arguments)
    browser = Browser(impatient_chromium)
    with SlowServer(tmp_path / "album") as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            impatient_chromium.get(f"http://127.0.0.1:{server.server_port}/#q=red+ring")
            browser.until(lambda: "Loading" in browser.text("main"))
            browser.until(lambda: browser.text("#notes"))  # page.js is there
            assert browser.text("main").strip() == "Loading the photos …"
            server.released["photos-000"].set()
            browser.until(lambda: browser.text("#notes") == "Loading the words …")
            assert not browser.captions()
            browser.js("go({ text: '' })")
            browser.until(lambda: len(browser.captions()) == 20 and browser.text("#intro"))
            browser.js("go({ text: 'red ring' })")
            browser.until(lambda: browser.text("#notes") == "Loading the words …")
            assert "photos-001" not in server.asked
            server.released["words"].set()
            browser.until(lambda: len(browser.captions()) == 20)
            assert "The first 20 of 36 photos" in browser.text("#notes")
            assert "loading" in browser.text("#notes") and not browser.find("#wait")
            browser.until(lambda: "photos-001" in server.asked)
            assert "photos-002" not in server.asked
            server.released["photos-001"].set()
            browser.until(lambda: "The first 29 of 36 photos" in browser.text("#notes"))
            browser.until(lambda: "photos-002" in server.asked)
            server.released["photos-002"].set()
            browser.until(lambda: browser.text("#notes") == "36 photos, the best first")
            assert browser.captions()[0] == "a red ring"
        finally:
            for event in server.released.values():
                event.set()
            server.shutdown()
            thread.join()


def copy_page(album: Path, folder: Path, *parts: str) -> Browser:
    """Copy some parts of a page."""
    folder.mkdir()
    for part in parts:
        copy = shutil.copytree if (album / part).is_dir() else shutil.copy
        copy(album / part, folder / part)


def test_an_incomplete_copy(chromium: object, album: Path, tmp_path: Path) -> None:
    """index.html sent alone, with or without its styles, says what it needs; a copy without one of
    the scripts names it."""
    browser = Browser(chromium)
    for name, parts in (("alone", []), ("styled", ["style.css"])):
        copy_page(album, tmp_path / name, "index.html", *parts)
        chromium.get((tmp_path / name / "index.html").as_uri())
        if parts:  # with styles it is shown after 15 seconds, which a slow line may take
            assert browser.text("#alone") == "" and browser.text("#wait").startswith("Loading")
            browser.js("document.getAnimations().forEach((animation) => animation.finish())")
        for file in ("style.css", "search.js", "view.js", "photo.js", "data", "folder"):
            assert file in browser.text("#alone")
        assert browser.text("h1") == "Photo search"
        for selector in ("form", "footer", "#results", "dialog", "#more"):
            assert not browser.find(selector)[0].is_displayed()
    whole = ["index.html", "style.css", "search.js", "view.js", "photo.js", "data", "t", "f"]
    for missing in ("search.js", "photo.js", "data/page.js", "data/words.js",
                    "data/photos-000.js"):
        folder = tmp_path / missing.replace("/", "-")
        copy_page(album, folder, *whole)
        (folder / missing).unlink()
        chromium.get((folder / "index.html").as_uri())
        browser.until(lambda: browser.text("#missing"))
        assert f"Missing: {missing}" in browser.text("#missing")
        assert not browser.find("#alone") and not browser.find("#wait")
    chromium.get("about:blank")


def test_a_missing_picture_has_a_placeholder(
    chromium: object, album: Path, tmp_path: Path
) -> None:
    """A card and an opened photo whose file is missing have a quiet placeholder of that size."""
    shutil.copytree(album, tmp_path / "copy")
    browser = Browser(chromium)
    browser.open((tmp_path / "copy" / "index.html").as_uri(), "#q=red+ring")
    before = rectangle(browser, "#results .card")
    name = browser.js("return photos.pictures[results[0].photo]")
    for size in ("t", "f"):
        (tmp_path / "copy" / size / f"{name}.jpg").unlink()
    browser.open((tmp_path / "copy" / "index.html").as_uri(), "#q=red+ring")
    browser.until(lambda: browser.find("#results .card:first-child .no-picture"))
    assert len(browser.find("#results .no-picture")) == 1
    assert rectangle(browser, "#results .card") == before
    open_photo(browser)
    browser.until(lambda: browser.find("#stage.no-picture"))
    for selector in ("#results .no-picture", "#stage"):
        assert browser.js("const node = document.querySelector(arguments[0]);"
                          "return [getComputedStyle(node, '::before').content,"
                          "getComputedStyle(node.querySelector('img')).visibility]",
                          selector) == ['"no picture"', "hidden"]
    browser.find("[data-step='1']")[0].click()
    browser.until(lambda: not browser.find("#stage.no-picture"))
    chromium.get("about:blank")
