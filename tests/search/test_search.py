"""search.py and evaluate.py end to end, with random weights."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import search
from src.data.captions import read_annotations
from src.data.images import load_image, load_resized
from src.data.pixel_store import store_size
from src.data.source import split_by_image
from src.evaluation.embed import embed_pixels
from src.models.checkpoint import load_checkpoint, save_checkpoint
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def trained(tmp_path: Path, tiny_data: tuple[Path, Path]) -> list[str]:
    """Write a checkpoint for the tiny data; return the flags that name it."""
    images, annotations = tiny_data
    captions = [c for record in read_annotations(annotations).records for c in record.captions]
    tokenizer = Tokenizer.from_captions(captions, 1, 16)
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(len(tokenizer), image_size=32, context_length=16))
    save_checkpoint(
        tmp_path / "results" / "models" / "flickr30k_clip_best.pth", model, tokenizer, epoch=1,
        args={"images": str(images), "annotations": str(annotations), "seed": 3,
              "val_fraction": 0.25, "cache_dir": str(tmp_path / "cache")},
    )
    return ["--results-dir", str(tmp_path / "results"), "--device", "cpu"]


def results_of(capsys: pytest.CaptureFixture) -> list[dict]:
    """Return the printed JSON lines."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_text_query_ranks_by_the_dot_product(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Images are in the order of their dot product with the text."""
    search.main(["a red thing", "--json", "--top", "99", *trained])
    (answer,) = results_of(capsys)
    model, tokenizer, content = load_checkpoint(
        tmp_path / "results" / "models" / "flickr30k_clip_best.pth")
    with torch.no_grad():
        text = model.encode_text(tokenizer.encode(["a red thing"]))[0]
    scores = {}
    for path in Path(content["args"]["images"]).iterdir():
        pixels = torch.from_numpy(load_resized(path, store_size(32)))
        scores[str(path)] = float(embed_pixels(model, pixels[None])[0] @ text)
    assert [r["rank"] for r in answer["results"]] == list(range(1, 13))
    for result in answer["results"]:
        assert result["score"] == pytest.approx(scores[result["path"]], abs=1e-5)
        assert sum(value for _, value in result["word_contributions"]) == pytest.approx(
            result["score"], abs=1e-6)
    listed = [r["score"] for r in answer["results"]]
    assert listed == sorted(scores.values(), reverse=True) or listed == pytest.approx(
        sorted(scores.values(), reverse=True), abs=1e-5)


def test_queries_come_from_arguments_file_and_standard_input(
    trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every line that is not blank is a query."""
    (tmp_path / "queries.txt").write_text("a blue thing\n\n  green things \n")
    search.main(["red", "--queries", str(tmp_path / "queries.txt"), "--json", *trained])
    together = results_of(capsys)
    assert [a["query"] for a in together] == ["red", "a blue thing", "green things"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a blue thing\n")))
    search.main(["--queries", "-", "--json", *trained])
    (alone,) = results_of(capsys)
    assert [r["path"] for r in alone["results"]] == [r["path"] for r in together[1]["results"]]


def test_image_query_leaves_itself_out(
    trained: list[str], tiny_data: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    """The results for an image of the index are all others, and captions are ranked for it."""
    photo = sorted(tiny_data[0].iterdir())[4]
    search.main(["--image", str(photo), "--json", "--top", "99", "--duplicates", *trained])
    (answer,) = results_of(capsys)
    assert {Path(result["path"]) for result in answer["results"]} == {
        path for path in tiny_data[0].iterdir() if path != photo}
    fits = [fit["score"] for fit in answer["captions"]]
    assert len(fits) == 5 and fits == sorted(fits, reverse=True)


def test_text_output(
    trained: list[str], capsys: pytest.CaptureFixture
) -> None:
    """The text output has rank, score and path, and with --explain the words."""
    search.main(["a red zebra", "--explain", "--top", "2", *trained])
    captured = capsys.readouterr()
    assert captured.out.startswith("a red zebra\n   1  ")
    assert captured.out.count("zebra?") == 2 and captured.out.count(" red ") == 3
    assert "'zebra' is not in the vocabulary" in captured.err


def test_sheet(trained: list[str], tiny_data: tuple[Path, Path],
                            tmp_path: Path) -> None:
    """--sheet draws one row per query."""
    photo = next(tiny_data[0].iterdir())
    search.main(["red", "--image", str(photo), "--sheet", str(tmp_path / "s.png"), "--top", "3",
                 *trained])
    sheet = np.asarray(load_image(tmp_path / "s.png"))
    assert sheet.shape[0] > 300 and sheet.std() > 10


@pytest.mark.parametrize(("argv", "cure"), [
    ([], "--image FILE"),
    (["zzz"], "no word of 'zzz'"),
    (["red", "--checkpoint", "nowhere.pth"], "no file nowhere.pth"),
    (["red", "--images", "nowhere"], "--images"),
    (["--image", "nowhere.jpg"], "cannot read nowhere.jpg"),
    (["--queries", "nowhere.txt"], "cannot read nowhere.txt"),
])
def test_mistakes_name_their_cure(trained: list[str], argv: list[str], cure: str) -> None:
    """User errors say what to do."""
    with pytest.raises(UserError, match=cure):
        search.main([*argv, *trained])


def test_a_second_search_imports_nothing_heavy(
    trained: list[str], capsys: pytest.CaptureFixture
) -> None:
    """With an index that is up to date a text query imports neither torch nor Pillow."""
    search.main(["a red thing", "--json", *trained])
    first = results_of(capsys)
    code = ("import sys, search; search.main(sys.argv[1:]); "
            "print(sorted({'torch', 'PIL', 'efficientnet_pytorch', 'matplotlib', 'pandas', 'tqdm'}"
            " & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code, "a red thing", "--json", *trained], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    answer, heavy = done.stdout.splitlines()
    assert [json.loads(answer)] == first and heavy == "[]"


def test_user_errors_have_status_two(tmp_path: Path) -> None:
    """A user error is one message on standard error and status 2."""
    done = subprocess.run(
        [sys.executable, "search.py", "red", "--results-dir", str(tmp_path)], cwd=ROOT,
        capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no file") and "Traceback" not in done.stderr


def brute_force(similarity: np.ndarray, image_index: list[int]) -> dict[str, float]:
    """Return recall, median and mean rank computed with loops; ties count against the model."""
    n_captions, n_images = similarity.shape
    text_to_image = [
        1 + sum(similarity[c, i] >= similarity[c, image_index[c]]
                for i in range(n_images) if i != image_index[c])
        for c in range(n_captions)]
    image_to_text = []
    for i in range(n_images):
        best = max(similarity[c, i] for c in range(n_captions) if image_index[c] == i)
        image_to_text.append(1 + sum(similarity[c, i] >= best for c in range(n_captions)
                                     if image_index[c] != i))
    metrics = {}
    for name, ranks in (("image_to_text", image_to_text), ("text_to_image", text_to_image)):
        for k in (1, 5, 10):
            metrics[f"{name}_R@{k}"] = 100 * (sum(rank <= k for rank in ranks) / len(ranks))
        metrics[f"{name}_median_rank"] = float(np.median(ranks))
        metrics[f"{name}_mean_rank"] = sum(ranks) / len(ranks)
    return metrics


@pytest.mark.parametrize("split", ["val", "all"])
def test_evaluate_equals_a_brute_force_loop(
    trained: list[str], tiny_data: tuple[Path, Path], tmp_path: Path, split: str,
    capsys: pytest.CaptureFixture,
) -> None:
    """The JSON report equals loops over the same embeddings, for an uneven data set."""
    images, annotations = tiny_data
    kept = [line for n, line in enumerate(annotations.read_text().splitlines()) if n % 4 or n < 2]
    annotations.write_text("\n".join(kept))
    assert evaluate.main(["--split", split, *trained]) == 0
    report = json.loads((tmp_path / "results" / f"evaluation_{split}.json").read_text())
    model, tokenizer, _ = load_checkpoint(Path(report["checkpoint"]))
    records = read_annotations(annotations).records
    if split == "val":
        records = split_by_image(records, 0.25, 3)["val"]
    captions = [caption for record in records for caption in record.captions]
    owners = [i for i, record in enumerate(records) for _ in record.captions]
    assert (report["images"], report["captions"]) == (len(records), len(captions))
    squares = np.stack([load_resized(images / r.name, store_size(32)) for r in records])
    photos = embed_pixels(model, torch.from_numpy(squares))
    with torch.no_grad():
        texts = model.encode_text(tokenizer.encode(captions))
    expected = brute_force((texts @ photos.T).numpy(), owners)
    assert {name: report[name] for name in expected} == expected
    assert report["rsum"] == sum(v for k, v in expected.items() if "R@" in k)
    assert "median rank" in capsys.readouterr().out


def test_evaluate_refuses_a_missing_split(trained: list[str]) -> None:
    """A missing split is reported with the available ones."""
    with pytest.raises(UserError, match="no test images, only: train, val"):
        evaluate.main(["--split", "test", *trained])
