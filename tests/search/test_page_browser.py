"""The search page in Chromium: queries, results, keys, the URL, untrusted text."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from src.models.tokenizer import split_words
from src.search.page import write_page
from src.search.query import edit_distance, near_words
from tests.search.pages import (
    DIM,
    HOSTILE,
    RUN,
    WORDS,
    Browser,
    display_name,
    encode,
    read_data,
    tame,
    tiled,
)


def test_typing_finds_the_right_image(browser: Browser, album: Path, arguments: dict) -> None:
    """The image of the caption is first, with score, rank and contributions."""
    for number in (0, 17, 35):
        caption = arguments["captions"][number][0]
        browser.type(caption)
        assert browser.captions()[0] == caption
    assert len(browser.find("#results .card")) == 24
    assert browser.text("#notes") == "36 photos, the best first"
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
        exact = dict(zip(arguments["names"], arguments["image_embeddings"] @ encode(
            arguments["word_embeddings"], text), strict=True))
        names = [photos["names"][result["photo"]] for result in found]
        assert np.allclose(ranked, [exact[name] for name in names], atol=0.01)


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
    assert "/f/" in browser.find("#stage img")[0].get_attribute("src")
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
    """The keys /, arrows, Enter and Esc move, open and close; up and down go to the nearest photo
    of the next row."""
    from selenium.webdriver.common.keys import Keys

    browser.keys("/")
    assert browser.focus() == "input#query "
    browser.keys("red ring")
    browser.until(lambda: browser.settled("red ring"))
    captions = browser.captions()
    boxes = browser.js("return [...list.children].map((card) => {"
                       "const box = card.getBoundingClientRect();"
                       "return [box.top, box.left + box.width / 2]; })")
    below = min(top for top, _ in boxes if top > boxes[1][0])
    under = min((i for i in range(24) if boxes[i][0] == below),
                key=lambda i: abs(boxes[i][1] - boxes[1][1]))
    browser.keys(Keys.ARROW_DOWN)
    assert browser.focus() == f"a {captions[0]}"
    browser.keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert browser.focus() == f"a {captions[under]}"
    browser.keys(Keys.ARROW_UP)
    assert browser.focus() == f"a {captions[1]}"
    browser.keys(Keys.ARROW_LEFT)
    assert browser.focus() == f"a {captions[0]}"
    browser.keys(Keys.ENTER)
    browser.until(browser.opened)
    assert browser.focus() == f"dialog#photo {captions[0]}"
    assert browser.text("#photo h2") == captions[0]
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
    """A URL restores query and open image; a parameter of earlier pages is ignored."""
    from selenium.webdriver.common.keys import Keys

    browser.open(browser.url, "#q=yellow+square&n=12&photo=some+folder%2Fa+red+star.png")
    assert browser.find("#query")[0].get_attribute("value") == "yellow square"
    assert browser.captions()[0] == "a yellow square"
    assert browser.opened() and browser.text("#photo h2") == "a red star"
    browser.keys(Keys.ESCAPE)
    browser.until(lambda: not browser.opened())
    browser.until(lambda: browser.fragment() == "#q=yellow square")  # after the close event
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


def test_unknown_words_and_suggestions(browser: Browser) -> None:
    """An unknown word is marked, and the query with a similar word is offered as a link."""
    browser.type("red bench, on the baech")
    assert browser.captions()
    assert browser.text("#results .unknown .word") == "baech"
    assert [note.text for note in browser.find("#notes p")[1:]] == [
        "Not known: baech", "Did you mean red bench on the beach Or bench"]
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
    """Without a known word nothing is ranked, the words are named, and examples and words that the
    model knows are offered."""
    browser.type("hart")
    assert browser.captions() == []
    notes = [note.text for note in browser.find("#notes p")]
    assert notes == ["Nothing found", "Not known: hart", "Did you mean heart"]
    browser.type("qqq www xyz vvv kkk jjj")
    assert browser.captions() == [] and not browser.find("#notes a")
    assert "Not known: qqq, www, xyz, vvv and 2 more" in browser.text("#notes")
    examples, words = ([link.text for link in part.find_elements("css selector", "a")]
                       for part in browser.find("#intro .examples"))
    assert len(examples) == 6 and set(words) < set(WORDS) and {"ring", "purple"} < set(words)
    browser.find("#intro .examples")[1].find_elements("css selector", "a")[3].click()
    browser.until(lambda: browser.settled(words[3]) and browser.captions())
    browser.js("box.value = '?!… 👍'; box.dispatchEvent(new Event('input'))")
    browser.until(lambda: browser.settled("?!… 👍"))
    assert "The query has no words" in browser.text("#notes") and len(browser.captions()) == 24
    for word in ("toString", "hasOwnProperty", "proto"):  # properties of objects are not words
        browser.type(word)
        assert browser.captions() == []


def test_a_very_long_query(browser: Browser) -> None:
    """All of its words are used, as far as the text field takes them, and each is shown once."""
    browser.type("red circle " * 16 + "green star " * 40)
    parts = browser.js("return [...list.firstChild.querySelectorAll('.word')]"
                       ".map((node) => node.textContent)")
    assert parts == ["red ×16", "circle ×16", "green ×40", "star ×40"]
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
    assert "Not known: nosuchword" in browser.text("#notes")
    browser.type("-red")
    assert not browser.find("#results .score") and not browser.find("#results .contributions li")
    assert browser.text("#notes p + p") == "Words to avoid need a word to search for"
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
    browser.until(lambda: browser.js("return !waiting && JSON.parse(drawn)[2]"))
    assert browser.fragment() == "#q=red ring&d=1" and browser.captions()[:3] == ["a red ring"] * 3
    assert not browser.find("#results .copies")
    browser.open(browser.url, "#q=red ring&d=1")  # from the URL, and back
    assert browser.captions()[:3] == ["a red ring"] * 3
    browser.find("#notes a")[0].click()
    browser.until(lambda: browser.fragment() == "#q=red ring")
    browser.until(lambda: len(set(browser.captions())) == 24)


def test_more_results(browser: Browser, tmp_path: Path, arguments: dict) -> None:
    """Scrolling appends the next results, the cards before them stay as they are, and a new query
    starts again at the top; without a query all photos are shown."""
    write_page(tmp_path / "album", **tiled(arguments, 200))
    browser.open((tmp_path / "album" / "index.html").as_uri(), "#d=1")
    browser.type("green star")
    first = browser.js("window.card = list.firstChild; return results.slice(0, 24)")
    assert len(browser.captions()) < 100
    seen = 0
    while browser.find("#more")[0].is_displayed():
        seen = len(browser.captions())
        browser.js("scrollTo(0, document.documentElement.scrollHeight)")
        browser.until(lambda count=seen: len(browser.captions()) > count
                      or not browser.find("#more")[0].is_displayed())
    assert len(browser.captions()) == 200
    ranks = browser.js("return [...list.querySelectorAll('.rank')].map((node) => node.textContent)")
    assert ranks == [f"{i}" for i in range(1, 201)]
    assert browser.js("return window.card === list.firstChild")
    assert browser.js("return results.slice(0, 24)") == first
    assert browser.js("return results") == browser.js("return bestPhotos("
                                                      "encode('green star').vector, 200)")
    browser.type("red ring")
    assert len(browser.captions()) < 100 and browser.js("return scrollY") == 0
    browser.type(" ")
    browser.show_all()
    shown = browser.js("return results.map(({ photo }) => photo)")
    assert sorted(shown) == list(range(200)) and shown[:3] != [0, 1, 2]
    browser.js("scrollTo(0, 0); more = 0; schedule()")
    browser.until(lambda: browser.js("return results.length") < 100)
    browser.js("get('more').click()")
    browser.until(lambda: len(browser.captions()) > 24)
    assert browser.js("return results.map(({ photo }) => photo)") == shown[:len(browser.captions())]


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


def test_hostile_names_and_captions_are_text(
    browser: Browser, tmp_path: Path, arguments: dict
) -> None:
    """Hostile names and captions are shown as text; nothing runs, nothing is fetched."""
    captions = [[name, name] for name in HOSTILE]
    write_page(tmp_path / "album", **tiled(arguments, len(HOSTILE)) | {
        "names": HOSTILE, "captions": captions, "title": "<b>{{data}}</b>"})
    browser.open((tmp_path / "album" / "index.html").as_uri())
    assert browser.text("h1") == "<b>{{data}}</b>"
    browser.type("red circle")
    browser.show_all()
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


def test_over_http(served: tuple[subprocess.Popen, int], browser: Browser) -> None:
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
