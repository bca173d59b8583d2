"""Curves, contact sheets, and the report on rejected input."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data.captions import Annotations, DataIssue, ImageRecord
from src.data.dataset import Flickr30kDataset
from src.data.images import load_image
from src.data.pixel_store import PixelStore
from src.data.prepare import write_rejected
from src.data.source import DataSource
from src.evaluation.examples import plot_examples
from src.evaluation.metrics import EPOCH_HEADER, format_epoch, format_seconds, format_table
from src.models.dual_encoder import DualEncoder, ModelConfig
from src.models.tokenizer import Tokenizer
from src.utils.plots import SheetRow, plot_contact_sheet, plot_curves

GREEN = (42, 157, 98)


def metrics(epoch: int, **changes: float) -> dict:
    """The retrieval metrics of an epoch, every recall of its own size."""
    line = {"rsum": 123.4}
    for i, direction in enumerate(("image_to_text", "text_to_image")):
        for k in (1, 5, 10):
            line[f"{direction}_R@{k}"] = k + 20.0 * i + epoch
        line[f"{direction}_median_rank"] = 30.5 + i
        line[f"{direction}_mean_rank"] = 60.25 + i
    return {**line, **changes}


def line(epoch: int, **changes: float) -> dict:
    """An epoch of a run's log."""
    return {"epoch": epoch, "loss": 4.0 / epoch, "metrics": metrics(epoch),
            "time": {"seconds": 12.3, "validation_seconds": 0.4, "wait_share": 0.0123}, **changes}


def pictures(count: int) -> list[np.ndarray]:
    """Grey pictures of several shapes."""
    return [np.full((8 + i, 12, 3), 40 * i + 40, np.uint8) for i in range(count)]


def decode(path: Path) -> np.ndarray:
    """The pixels of a written PNG (H, W, 3)."""
    assert path.read_bytes().startswith(b"\x89PNG")
    return np.asarray(load_image(path))


def share_of(picture: np.ndarray, color: tuple[int, int, int]) -> float:
    """The share of pixels of exactly this color."""
    return (picture == np.array(color, np.uint8)).all(-1).mean()


@pytest.mark.parametrize("log", [
    [line(1)], [line(epoch) for epoch in range(1, 40)],
    [line(1, loss=math.nan), line(2)], [line(1, loss=0.0, metrics=metrics(1, rsum=0.0))],
], ids=["one epoch", "many", "nan", "zero"])
def test_curves_are_a_wide_picture(tmp_path, log):
    """Two plots side by side, whatever the log holds; both curves' colors are there."""
    plot_curves(tmp_path / "new" / "curves.png", log)
    picture = decode(tmp_path / "new" / "curves.png")
    height, width, _ = picture.shape
    assert width / height == pytest.approx(10 / 3.8, rel=0.02)
    assert share_of(picture, (47, 111, 222)) > 0 and share_of(picture, (232, 116, 59)) > 0


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 5), (6, 5), (3, 2)])
def test_contact_sheet_grows_with_its_cells(tmp_path, rows, columns):
    """A row a query and a column a photo: the sheet's sides follow their numbers."""
    labels = [str(i) for i in range(columns)]
    sheet = [SheetRow(f"query {i}", pictures(columns), labels) for i in range(rows)]
    plot_contact_sheet(tmp_path / "sheet.png", sheet)
    height, width, _ = decode(tmp_path / "sheet.png").shape
    assert width / height == pytest.approx((3.0 + 1.75 * columns) / (2.05 * rows + 0.1), rel=0.02)


def test_the_right_photo_is_framed(tmp_path):
    """A green frame stands around the right photo, at its place, and nowhere without one."""
    shares, centres = {}, {}
    for right in (None, 0, 3):
        path = tmp_path / f"{right}.png"
        plot_contact_sheet(path, [SheetRow("a dog", pictures(4), list("abcd"), right)])
        green = (decode(path) == np.array(GREEN, np.uint8)).all(-1)
        shares[right] = green.mean()
        if green.any():
            centres[right] = np.nonzero(green)[1].mean() / green.shape[1]
    assert shares[None] == 0
    assert shares[0] > 0.001 and shares[3] > 0.001
    assert centres[0] < 0.5 < 0.8 < centres[3]


def test_rows_of_different_length_and_a_picture_as_query(tmp_path):
    """A query may be a photo, and may have found fewer photos than another."""
    plot_contact_sheet(tmp_path / "sheet.png", [
        SheetRow(np.full((20, 10, 3), (255, 0, 0), np.uint8), pictures(1), ["1.00"]),
        SheetRow("text", pictures(3), ["a", "b", "c"], 2),
    ], title="two queries")
    assert share_of(decode(tmp_path / "sheet.png"), (255, 0, 0)) > 0.01


ODD_TEXTS = {
    "empty": "", "dollars": "$5 or $x$ or \\frac{", "no formula": "$\\bad$",
    "long word": "x" * 3000,
    "long": "many words " * 500, "lines": "a\nb\tc", "quotes": "\" ' ` \\ % # & _ ^ { }",
    "chinese": "狗在草地上", "emoji": "dog 🐶", "hebrew, arabic": "כלב كلب", "hindi": "कुत्ता",
    "combining": "e\u0301\u200b\u202e", "NUL": "a\x00b", "not UTF-8": "caf\udce9.jpg",
}


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_odd_text_neither_breaks_nor_warns(tmp_path, text):
    """Queries, labels (file names) and titles of any kind give a picture, without a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plot_contact_sheet(tmp_path / "sheet.png",
                           [SheetRow(text, pictures(2), [text, "b"], 1)], title=text)
    assert [str(warning.message) for warning in caught] == []
    assert decode(tmp_path / "sheet.png").std() > 0


def test_plain_text_is_drawn_as_it_stands(tmp_path):
    """Dollars are no formula: "$x$" is drawn otherwise than "x"."""
    sheets = []
    for text in ("x", "$x$"):
        plot_contact_sheet(tmp_path / "sheet.png", [SheetRow(text, pictures(1), ["a"])])
        sheets.append(decode(tmp_path / "sheet.png"))
    dark = [(sheet < 100).all(-1).sum() for sheet in sheets]
    assert dark[1] > dark[0]


# Report


def source_with_remarks() -> DataSource:
    """Input in which all kinds of things were wrong."""
    recovered = [DataIssue("line 4", "a.jpg", "the second | was missing", "a.jpg| 4   A dog")]
    rejected = [DataIssue("line 7", "b.jpg", "empty caption"),
                DataIssue("line 9", "", "not a row", 'quote " comma , caf\udce9 狗\nline')]
    read = Annotations("results.csv", [], 1234, recovered, rejected)
    missing = [DataIssue("images", "gone.jpg", "no such photo")]
    return DataSource(Path("images"), read, {}, missing, [])


def test_rejected_csv_holds_every_remark(tmp_path):
    """One CSV row a remark, in columns that read back, and a summary that counts each kind."""
    store = PixelStore(np.zeros((0, 2, 2, 3), np.uint8), {}, {"bad.jpg": "truncated"})
    path = tmp_path / "rejected.csv"
    summary = write_rejected(path, source_with_remarks(), store)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["kind", "where", "name", "reason", "text"],
        ["caption rows fixed", "line 4", "a.jpg", "the second | was missing",
         "a.jpg| 4   A dog"],
        ["caption rows rejected", "line 7", "b.jpg", "empty caption", ""],
        ["caption rows rejected", "line 9", "", "not a row",
         'quote " comma , caf\\udce9 狗\nline'],
        ["images missing", "images", "gone.jpg", "no such photo", ""],
        ["images unreadable", "images", "bad.jpg", "truncated", ""],
    ]
    for part in ("1,234 captions", "1 caption rows fixed", "2 caption rows rejected",
                 "1 images missing", "1 images unreadable", str(path)):
        assert part in summary


def test_clean_input_is_said_to_be_clean(tmp_path):
    """Where nothing was wrong the file has its header alone, and the summary says so."""
    source = DataSource(Path("images"), Annotations("results.csv", [], 5), {}, [], [])
    summary = write_rejected(tmp_path / "rejected.csv", source)
    assert summary == "input: 5 captions; nothing rejected"
    assert (tmp_path / "rejected.csv").read_text().splitlines() == ["kind,where,name,reason,text"]


@pytest.mark.parametrize(("is_best", "epochs"), [(False, 2), (True, 9), (True, 10_000)])
def test_an_epoch_is_one_row_of_a_table(is_best, epochs):
    """The row has the numbers of both directions below the header's columns, marks the best, and
    estimates the time that is left; nothing is wider than a terminal of 80 columns."""
    row = format_epoch(line(2), is_best, epochs)
    assert row.split()[:8] == ["2", "2.000", "23.0", "27.0", "32.0", "3.0", "7.0", "12.0"]
    assert row.split()[8] == "123.4" + "*" * is_best
    assert len(row) <= 80 and max(map(len, EPOCH_HEADER.splitlines())) <= 80
    seconds = line(2)["time"]["seconds"] + line(2)["time"]["validation_seconds"]
    times = [format_seconds(seconds)] + [format_seconds((epochs - 2) * seconds)] * (epochs > 2)
    assert " ".join(row.split()[9:]) == " ".join(times)
    for name, value in (("loss", "2.000"), ("rsum", "123.4"), ("R@10", "32.0")):
        end = EPOCH_HEADER.splitlines()[1].index(name) + len(name)
        assert row[:end].endswith(value)


def test_times_have_a_unit_that_fits():
    """Seconds, minutes or hours."""
    assert [format_seconds(s) for s in (0, 89, 90, 5399, 5400, 360_000)] == [
        "0 s", "89 s", "2 min", "90 min", "1.5 h", "100.0 h"]


def test_table_has_every_number():
    """Both directions' recalls and ranks stand below their headings, in line, with the rsum."""
    lines = format_table(metrics(1)).splitlines()
    assert lines[0].split() == ["R@1", "R@5", "R@10", "median", "rank", "mean", "rank"]
    assert lines[1].split() == ["image", "to", "text", "2.0", "6.0", "11.0", "30.5", "60.2"]
    assert lines[2].split() == ["text", "to", "image", "22.0", "26.0", "31.0", "31.5", "61.2"]
    assert lines[3] == "rsum 123.4"
    assert len({len(line) for line in lines[:3]}) == 1


@pytest.mark.parametrize("photos", [2, 7])
def test_examples_of_a_split(tmp_path, photos):
    """A contact sheet of a split is written, even of one with fewer photos than its columns."""
    torch.manual_seed(0)
    model = DualEncoder(ModelConfig(vocab_size=20, image_size=32, token_dim=8, embed_dim=4))
    records = [ImageRecord(f"{i}.jpg", (f"photo {i}",)) for i in range(photos)]
    pixels = np.random.default_rng(0).integers(0, 256, (photos, 34, 34, 3), np.uint8)
    store = PixelStore(pixels, {record.name: i for i, record in enumerate(records)}, {})
    dataset = Flickr30kDataset(records, store, Tokenizer.from_captions(
        [f"photo {i}" for i in range(photos)], 1, 4))
    plot_examples(tmp_path / "examples.png", model, dataset)
    height, width, _ = decode(tmp_path / "examples.png").shape
    columns = min(5, photos)
    assert width / height == pytest.approx((3.0 + 1.75 * columns) / (2.05 * 6 + 0.1), rel=0.02)
