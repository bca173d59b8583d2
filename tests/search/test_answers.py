"""search.py for people and programs: duplicates, negative words, scope, JSON, broken output."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import search
from src.models.checkpoint import load_checkpoint, save_checkpoint
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.search.answers import Filter, Library, find_results, format_answer
from src.search.index import ImageIndex
from src.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
WORDS = "a red blue beach people circle"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a results folder with a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("results")
    tokenizer = Tokenizer.from_captions([WORDS], 1, 16)
    torch.manual_seed(0)
    save_checkpoint(
        folder / "models" / "flickr30k_clip_best.pth",
        DualEncoder(ModelConfig(len(tokenizer), image_size=32, context_length=16)), tokenizer,
        epoch=1, args={"image_size": 32, "image_encoder": "efficientnet-b0"})
    return folder


def noise(seed: int) -> Image.Image:
    """Return an image of coarse noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels.repeat(20, 0).repeat(20, 1))


@pytest.fixture()
def images(tmp_path: Path) -> Path:
    """Return a folder of six images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        noise(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture()
def flags(tmp_path: Path, results: Path, images: Path) -> list[str]:
    """Return the flags that name the checkpoint, the images, and an index of their own."""
    return ["--results-dir", str(results), "--device", "cpu", "--images", str(images),
            "--index-dir", str(tmp_path / "index")]


def ask(capsys: pytest.CaptureFixture, *argv: str) -> list[dict]:
    """Return the JSON lines of a search."""
    search.main([*argv, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def names(answer: dict) -> list[str]:
    """Return the file names of the results."""
    return [Path(result["path"]).name for result in answer["results"]]


# ---- Near duplicates, score and offset -----------------------------------------------------------


def test_near_duplicates_are_one_result(
    flags: list[str], images: Path, capsys: pytest.CaptureFixture
) -> None:
    """A copy, a smaller one and a recompressed one are one result; --duplicates shows them."""
    shutil.copy(images / "2.png", images / "copy.png")
    noise(2).resize((80, 60)).save(images / "small.png")
    noise(2).save(images / "again.jpg", quality=80)
    copies = {"2.png", "copy.png", "small.png", "again.jpg"}
    (answer,) = ask(capsys, "red", *flags)
    assert len(answer["results"]) == 6
    (result,) = (result for result in answer["results"] if result["duplicates"])
    assert {Path(path).name for path in [result["path"], *result["duplicates"]]} == copies
    (answer,) = ask(capsys, "red", "--duplicates", *flags)
    assert len(answer["results"]) == 9 and not any(r["duplicates"] for r in answer["results"])
    search.main(["red", *flags])
    assert capsys.readouterr().out.count("(+3 near duplicates)") == 1
    (answer,) = ask(capsys, "--image", str(images / "2.png"), *flags)
    assert not {"2.png", "copy.png"} & set(names(answer)) and len(answer["results"]) == 6


def test_an_image_of_the_index_needs_no_model(
    images: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its embedding is in the index: the results are those of a copy that is elsewhere, and the
    model is loaded for others alone."""
    noise(2).convert("RGBA").save(tmp_path / "outside.png")  # the same pixels in another file
    (outside,) = ask(capsys, "--image", str(tmp_path / "outside.png"), *flags)
    assert Path(outside["results"][0]["path"]).name == "2.png"

    def no_model(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(search, "load_model", no_model)
    (inside,) = ask(capsys, "--image", str(images / "2.png"), *flags)
    assert names(inside) == names(outside)[1:] and inside["captions"] == []
    np.testing.assert_allclose([result["score"] for result in inside["results"]],
                               [result["score"] for result in outside["results"][1:]], atol=1e-4)
    with pytest.raises(AssertionError, match="was loaded"):
        search.main(["--image", str(tmp_path / "outside.png"), *flags])


def test_an_image_from_a_pipe(images: Path, flags: list[str]) -> None:
    """It can be read only once."""
    done = subprocess.run(
        [sys.executable, "search.py", "--image", "/dev/stdin", "--json", *flags], cwd=ROOT,
        input=(images / "2.png").read_bytes(), capture_output=True, check=True)
    assert Path(json.loads(done.stdout)["results"][0]["path"]).name == "2.png"


def make_library(n_groups: int, size: int) -> Library:
    """Return a library of groups of near duplicates."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n_groups, 8), dtype=np.float32).repeat(size, 0)
    rows += 0.01 * rng.standard_normal(rows.shape, dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    thumbnails = rng.integers(0, 256, (n_groups, 48)).repeat(size, 0)
    thumbnails = (thumbnails + rng.integers(-2, 3, thumbnails.shape)).clip(0, 255).astype(np.uint8)
    paths = [f"/{i}" for i in range(len(rows))]
    index = ImageIndex("x", paths, [], rows, {}, ["x"] * len(rows), thumbnails)
    return Library(index, paths, paths)


@pytest.mark.parametrize("size", [1, 3, 40])
@pytest.mark.parametrize(("top", "offset"), [(1, 0), (5, 0), (4, 3), (100, 0), (3, 20), (5, 18)])
def test_results_are_the_best_of_each_group(size: int, top: int, offset: int) -> None:
    """Whatever the sizes of the groups, the results are their best images in order."""
    library = make_library(20, size)
    query = library.index.embeddings[0]
    scores = library.index.embeddings @ query
    best = {}
    for row in np.argsort(-scores, kind="stable").tolist():
        best.setdefault(row // size, row)
    expected = list(best.values())[offset : offset + top]
    found, rows = find_results(library, query, Filter(top, offset))
    assert rows == expected
    assert [result["rank"] for result in found] == list(range(offset + 1, offset + 1 + len(rows)))
    for row, result in zip(rows, found, strict=True):
        group = {f"/{i}" for i in range(row // size * size, row // size * size + size)}
        assert {result["path"], *result["duplicates"]} == group


@pytest.mark.parametrize("min_score", [-2, 0, 0.3, 0.9999, 2])
def test_min_score(min_score: float) -> None:
    """No result has a lower score, and none with a higher score is missing."""
    library = make_library(30, 2)
    scores = library.index.embeddings @ library.index.embeddings[4]
    found, _ = find_results(library, library.index.embeddings[4],
                            Filter(100, min_score=min_score, duplicates=True))
    assert len(found) == (scores >= min_score).sum()


def test_no_result_is_said_so(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    """--min-score above all scores gives an empty answer."""
    search.main(["red", "--min-score", "2", *flags])
    assert "no photo" in capsys.readouterr().out


# ---- Negative words ------------------------------------------------------------------------------


def test_negative_words_are_subtracted(
    flags: list[str], results: Path, capsys: pytest.CaptureFixture
) -> None:
    """Scores are those of the difference of word vectors; contributions sum to them."""
    (answer,) = ask(capsys, "beach -people", *flags)
    model, tokenizer, _ = load_checkpoint(results / "models" / "flickr30k_clip_best.pth")
    vectors = model.word_embeddings().numpy()
    vector = vectors[tokenizer.vocab["beach"]] - vectors[tokenizer.vocab["people"]]
    index = json.loads((Path(flags[-1]) / "index.json").read_text())
    matrix = np.load(Path(flags[-1]) / index["embeddings"])
    scores = dict(zip(index["names"], matrix @ vector / np.linalg.norm(vector), strict=True))
    assert names(answer) == sorted(scores, key=scores.get, reverse=True)
    people = matrix @ -vectors[tokenizer.vocab["people"]] / np.linalg.norm(vector)
    for result in answer["results"]:
        parts = dict(result["word_contributions"])
        assert result["score"] == pytest.approx(sum(parts.values()), abs=1e-6)
        row = index["names"].index(Path(result["path"]).name)
        assert list(parts) == ["beach", "-people"]
        assert parts["-people"] == pytest.approx(people[row], abs=1e-6)
    search.main(["beach -people -zebra", "--explain", *flags])
    printed = capsys.readouterr()
    assert " -people " in printed.out and "-zebra? +0.000" in printed.out
    assert "'zebra' is not in the vocabulary" in printed.err


@pytest.mark.parametrize("text", ["-people", "-a -red", "zebra -people"])
def test_only_negative_words_are_an_error(flags: list[str], text: str) -> None:
    """There must be a known word to search for."""
    with pytest.raises(UserError, match="words to avoid need a word"):
        search.main([f" {text}", *flags])


# ---- Scope ---------------------------------------------------------------------------------------


def test_several_folders_are_searched(
    flags: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """--images takes several folders and may be repeated; folders inside others count once."""
    for folder in ("second", "third"):
        (tmp_path / folder).mkdir()
        noise(ord(folder[0])).save(tmp_path / folder / "0.png")
    (answer,) = ask(capsys, "red", *flags, "--images", str(tmp_path / "second"), "--images",
                    str(tmp_path / "third"), str(images), "--top", "99")
    assert sorted(result["path"] for result in answer["results"]) == sorted(
        map(str, [*images.iterdir(), tmp_path / "second" / "0.png", tmp_path / "third" / "0.png"]))
    (answer,) = ask(capsys, "red", *flags, "--images", str(tmp_path), "--top", "99")
    assert len(answer["results"]) == 8


@pytest.mark.parametrize("flag", ["--top", "--checkpoint", "--image", "--index-dir"])
def test_a_repeated_flag_is_an_error(
    flags: list[str], flag: str, capsys: pytest.CaptureFixture
) -> None:
    """The second value does not replace the first one silently."""
    with pytest.raises(SystemExit) as raised:
        search.main(["red", flag, "1", flag, "2", *flags])
    assert raised.value.code == 2 and f"{flag} is given twice" in capsys.readouterr().err


def test_texts_may_follow_flags(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    """All texts are queries, in their order."""
    answers = ask(capsys, "red", "--top", "1", "blue", *flags, "a circle")
    assert [answer["query"] for answer in answers] == ["red", "blue", "a circle"]


def test_a_text_after_images_is_a_query(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What follows the folders of --images and is no folder is a query, unless it looks like a
    path: then the missing folder is an error."""
    start = flags.index("--images")
    others, folder = flags[:start] + flags[start + 2 :], flags[start + 1]
    (tmp_path / "empty").mkdir()
    answers = ask(capsys, *others, "--images", folder, "a red circle", "blue")
    assert [answer["query"] for answer in answers] == ["a red circle", "blue"]
    with pytest.raises(UserError, match="no folder"):
        search.main([*others, "red", "--images", folder, str(tmp_path / "missing")])


def test_words_without_quotes_are_one_query(
    flags: list[str], capsys: pytest.CaptureFixture
) -> None:
    """Texts of one word each are one query; of texts with several words each is a query. A word to
    avoid without quotes looks like a flag, and a minus sign that stands alone is noted."""
    words, text = ask(capsys, "red", "circle", *flags), ask(capsys, "red circle", *flags)
    assert len(words) == 1 and words == text
    both = ask(capsys, "red circle", "blue", *flags)
    assert [answer["query"] for answer in both] == ["red circle", "blue"]
    search.main(["beach - people", *flags])
    assert "-people without a space subtracts" in capsys.readouterr().err
    search.main(["beach -people", *flags])
    assert "subtracts" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        search.main(["beach", "-people", *flags])
    assert 'quote a word to avoid together with the others: "beach -people"' in \
        capsys.readouterr().err


@pytest.mark.parametrize(("argv", "reason"), [
    (["zebra"], "no word of"), (["red", "--images", "missing"], "no folder of photos"),
    (["red", "--images", "empty"], "no readable image"),
    (["red", "--word-vectors", "missing.vec"], "no file"),
])
def test_a_failed_search_leaves_no_folder(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], reason: str
) -> None:
    """What it created is removed, in a results folder and for --index-dir; what was there before
    stays."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("old").mkdir()
    checkpoint = ["--checkpoint", str(results / "models" / "flickr30k_clip_best.pth"),
                  "--device", "cpu"]
    argv = argv if "--images" in argv else [*argv, "--images", "empty"]
    for place in (["--results-dir", "new/results"], ["--index-dir", "new/index"],
                  ["--index-dir", "old/index"]):
        with pytest.raises(UserError, match=reason):
            search.main([*argv, *checkpoint, *place])
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "old"]


def test_a_failed_search_keeps_the_indexes(
    flags: list[str], results: Path, images: Path, tmp_path: Path
) -> None:
    """A later search that fails removes its own folder, and no index of another folder."""
    shutil.copytree(results, tmp_path / "results")
    place = ["--results-dir", str(tmp_path / "results"), "--device", "cpu"]
    search.main(["red", *place, "--images", str(images)])
    before = sorted((tmp_path / "results").rglob("*"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no readable image"):
        search.main(["red", *place, "--images", str(tmp_path / "empty")])
    assert sorted((tmp_path / "results").rglob("*")) == before


def test_a_text_without_a_known_word_is_said_once(flags: list[str]) -> None:
    """The message has the text and, if there are any, similar words."""
    with pytest.raises(UserError) as raised:
        search.main(["peple zebra", *flags])
    assert str(raised.value) == (
        "no word of 'peple zebra' is known to the model; near 'peple': people")


def test_the_page_is_printed_as_an_address(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The address opens the page from disk, also for a folder with a blank in its name."""
    page = tmp_path / "a page"
    search.main(["--page", str(page), *flags])
    assert f"searches 6 photos: {(page / 'index.html').as_uri()}\n" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "opened"), [([], True), (["--no-browser"], False)])
def test_serve_opens_the_browser(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str],
    opened: bool,
) -> None:
    """Once the page is served, the browser of a screen gets its address; --no-browser opens none.
    The message for a port that is in use has a command for another one."""
    addresses = []
    asked = threading.Event()

    def open_address(address: str) -> None:
        addresses.append(address)
        asked.set()

    monkeypatch.setattr("webbrowser.open", open_address)
    monkeypatch.setattr(search, "has_browser", lambda: True)
    monkeypatch.setattr("src.search.page_server.serve_page", lambda folder, port: (
        asked.wait(60) if opened else None))
    argv = ["--page", str(tmp_path / "page"), *flags, *more]
    search.main([*argv, "--serve", "8123"])
    assert addresses == (["http://127.0.0.1:8123/"] if opened else [])
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .*such as --serve {port + 1}"):
            search.main([*argv, "--serve", str(port)])


@pytest.mark.parametrize(("environment", "is_terminal", "expected"), [
    ({"DISPLAY": ":0"}, True, True), ({"WAYLAND_DISPLAY": "w"}, True, True), ({}, True, False),
    ({"DISPLAY": ":0"}, False, False), ({"DISPLAY": ":0", "SSH_CONNECTION": "x"}, True, False),
])
def test_a_browser_needs_a_screen(
    monkeypatch: pytest.MonkeyPatch, environment: dict, is_terminal: bool, expected: bool
) -> None:
    """Not over SSH, not from a script, and not without a display."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert search.has_browser() == expected


# ---- Queries and output --------------------------------------------------------------------------


def run(*argv: str, **options: object) -> subprocess.CompletedProcess:
    """Run search.py."""
    return subprocess.run([sys.executable, "search.py", *argv], cwd=ROOT, text=True,
                          **{"capture_output": "stdout" not in options, **options})


def test_a_bad_query_does_not_stop_the_others(flags: list[str]) -> None:
    """Case search-12: the others are answered, the bad one is an error, and the status is 1."""
    done = run("--queries", "-", "--json", *flags, input="red\nzebra\nblue\n")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["query"] for line in lines] == ["red", "blue", "zebra"]
    assert "no word of 'zebra'" in lines[2]["error"] and "results" not in lines[2]
    assert done.returncode == 1 and "error: no word of 'zebra'" in done.stderr


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_query_files_with_a_byte_order_mark(
    flags: list[str], tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture
) -> None:
    """The mark is not part of the first query."""
    (tmp_path / "q.txt").write_bytes("red\r\nblue\r\n".encode(encoding))
    answers = ask(capsys, "--queries", str(tmp_path / "q.txt"), *flags)
    assert [answer["query"] for answer in answers] == ["red", "blue"]


def test_json_output_is_pure(flags: list[str], images: Path, tmp_path: Path) -> None:
    """Case search-06: whatever else is asked for, standard output holds JSON lines only."""
    (images / "bad.jpg").write_text("text")
    done = run("red", "--json", "--page", str(tmp_path / "page"), "--sheet",
               str(tmp_path / "s.png"), "--image", str(images / "0.png"), *flags)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert all(isinstance(json.loads(line), dict) for line in done.stdout.splitlines())
    assert "a page that searches 6 photos" in done.stderr and "bad.jpg" in done.stderr


def test_weak_matches_are_named(
    flags: list[str], results: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Results below the weak score of the checkpoint are marked, in text, JSON and the page."""
    (answer,) = ask(capsys, "red", *flags)
    assert not any(result["weak"] for result in answer["results"])
    scores = [result["score"] for result in answer["results"]]
    limit = (scores[2] + scores[3]) / 2
    model, tokenizer, content = load_checkpoint(results / "models" / "flickr30k_clip_best.pth")
    checkpoint = tmp_path / "measured.pth"
    save_checkpoint(checkpoint, model, tokenizer, epoch=1, args=content["args"],
                    metrics={"weak_score": limit})
    flags += ["--checkpoint", str(checkpoint), "--page", str(tmp_path / "page"),
              "--page-title", "Ours & theirs"]
    (answer,) = ask(capsys, "red", *flags)
    assert [result["weak"] for result in answer["results"]] == [False] * 3 + [True] * 3
    search.main(["red", *flags])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.strip().startswith("weak matches from number 4 on") and len(last) <= 80
    assert f'"weakScore": {limit}' in (tmp_path / "page" / "data" / "page.js").read_text()
    index = (tmp_path / "page" / "index.html").read_text()
    assert "<title>Ours &amp; theirs</title>" in index


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_message(flags: list[str]) -> None:
    """Case search-07: standard output on a full disk."""
    with open("/dev/full", "w") as full:
        done = run("red", *flags, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "error: cannot write to standard output: No space left on device")


def test_names_that_are_not_utf8(
    flags: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Python opens the path and other programs the URI; on the page each name is distinct."""
    for byte, seed in ((b"\xe9", 20), (b"\xe8", 21)):
        try:
            noise(seed).save(os.fsdecode(os.fsencode(images) + b"/caf" + byte + b".png"))
        except OSError:
            pytest.skip("this file system takes UTF-8 names only")
    done = run("red", "--json", "--top", "9", "--page", str(tmp_path / "page"), *flags)
    answer = json.loads(done.stdout)
    assert len(answer["results"]) == 8 and done.stdout.isascii()
    for result in answer["results"]:
        uri = urllib.parse.unquote_to_bytes(result["uri"].removeprefix("file://"))
        assert os.path.samefile(uri, result["path"])
    if shutil.which("jq"):
        uris = subprocess.run(["jq", "-r", ".results[].uri"], input=done.stdout, text=True,
                              capture_output=True, check=True).stdout.split()
        assert uris == [result["uri"] for result in answer["results"]]


# ---- Indexes -------------------------------------------------------------------------------------


def test_indexes_are_listed_and_removed(
    results: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """--list-indexes names the folders; --remove-index removes one and nothing else."""
    shutil.copytree(results, tmp_path / "results")
    place = ["--results-dir", str(tmp_path / "results")]
    search.main([*place, "--list-indexes"])
    assert "there is no index" in capsys.readouterr().out
    search.main(["red", *place, "--device", "cpu", "--images", str(images)])
    search.main([*place, "--list-indexes"])
    assert f"{images}: 6 photos" in capsys.readouterr().out
    (folder,) = (path for path in (tmp_path / "results" / "index").iterdir() if path.is_dir())
    (folder / "note.txt").write_text("not ours")
    search.main([*place, "--remove-index", str(images)])
    assert [path.name for path in folder.iterdir()] == ["note.txt"]
    assert len(list(images.iterdir())) == 6
    with pytest.raises(UserError, match="no index of"):
        search.main([*place, "--remove-index", str(images)])


def test_the_index_describes_itself(flags: list[str], images: Path) -> None:
    """index.json names folder, checkpoint, model and size of the embeddings."""
    search.main(["red", *flags])
    about = json.loads((Path(flags[-1]) / "index.json").read_text())["about"]
    assert about["folder"] == str(images) and about["dim"] == "256"
    assert about["image_encoder"] == "efficientnet-b0" and about["image_size"] == "32"
    assert about["checkpoint_file"].endswith("flickr30k_clip_best.pth")


def test_a_closed_standard_output_is_one_message(flags: list[str]) -> None:
    """With >&- in a shell nothing can be printed, and there is no traceback."""
    done = subprocess.run(["sh", "-c", '"$0" "$@" >&-', sys.executable, "search.py", "red", *flags],
                          cwd=ROOT, text=True, stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr.startswith("note: standard output is closed\n")


def test_explained_words_fit_the_terminal() -> None:
    """Contributions of words are cut into lines of 80 columns, and none is lost or broken."""
    parts = [f"{'word' * (i % 5)}{i} {i / 7:+.3f}" for i in range(30)] + ["long" * 30 + " +0.100"]
    lines = format_answer({"query": "q", "unknown": [], "results": [
        {"rank": 1, "score": 0.5, "path": "p", "duplicates": [],
         "word_contributions": [(p.split()[0], float(p.split()[1])) for p in parts]}]},
        explain=True).splitlines()[2:]
    assert "  ".join(line.strip() for line in lines) == "  ".join(parts)
    assert max(map(len, lines[:-1])) <= 80 < len(lines[-1])
