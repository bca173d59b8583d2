"""Plots, the report of rejected input, and the lines that show metrics."""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from src.data.captions import Annotations, DataIssue
from src.data.images import load_image
from src.data.pixel_store import PixelStore
from src.data.prepare import write_rejected
from src.data.source import DataSource
from src.evaluation.metrics import EPOCH_HEADER, format_epoch, format_seconds, format_table
from src.utils.plots import SheetRow, plot_contact_sheet, plot_curves

BLUE, ORANGE, GREEN = (47, 111, 222), (232, 116, 59), (42, 157, 98)


def metrics(epoch: int, **changes: float) -> dict:
    """Return the retrieval metrics of an epoch, each of a different value."""
    line = {"rsum": 123.4}
    for i, direction in enumerate(("image_to_text", "text_to_image")):
        for k in (1, 5, 10):
            line[f"{direction}_R@{k}"] = k + 20.0 * i + epoch
        line[f"{direction}_median_rank"] = 30.5 + i
        line[f"{direction}_mean_rank"] = 60.25 + i
    return {**line, **changes}


def line(epoch: int, **changes: float) -> dict:
    """Return an epoch of a run's log."""
    return {"epoch": epoch, "loss": 4.0 / epoch, "metrics": metrics(epoch),
            "time": {"seconds": 12.3, "validation_seconds": 0.4, "wait_share": 0.0123}, **changes}


def images(count: int) -> list[np.ndarray]:
    """Return gray images of different shapes."""
    return [np.full((8 + i, 12, 3), 40 * i + 40, np.uint8) for i in range(count)]


def decode(path: Path) -> np.ndarray:
    """Return the pixels of a PNG file, (H, W, 3)."""
    assert path.read_bytes().startswith(b"\x89PNG")
    return np.asarray(load_image(path))


def mask(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Return which pixels of an image have exactly this color, (H, W)."""
    return (image == np.array(color, np.uint8)).all(-1)


@pytest.mark.parametrize("log", [
    [line(1)], [line(epoch) for epoch in range(1, 40)],
    [line(1, loss=math.nan), line(2)], [line(1, loss=0.0, metrics=metrics(1, rsum=0.0))],
], ids=["one epoch", "many epochs", "nan", "zero"])
def test_curves_show_loss_and_recall(tmp_path, log):
    """Any log gives two plots side by side, with the curves of both directions."""
    plot_curves(tmp_path / "new" / "curves.png", log)
    plot = decode(tmp_path / "new" / "curves.png")
    height, width, _ = plot.shape
    assert width / height == pytest.approx(10 / 3.8, rel=0.02)
    assert mask(plot, BLUE).any() and mask(plot, ORANGE).any()


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 5), (6, 5), (3, 2)])
def test_contact_sheet_has_a_row_per_query(tmp_path, rows, columns):
    """The size of the sheet follows from the number of queries and of images."""
    labels = [str(i) for i in range(columns)]
    sheet = [SheetRow(f"query {i}", images(columns), labels) for i in range(rows)]
    plot_contact_sheet(tmp_path / "sheet.png", sheet)
    height, width, _ = decode(tmp_path / "sheet.png").shape
    assert width / height == pytest.approx((3.0 + 1.75 * columns) / (2.05 * rows + 0.1), rel=0.02)


def test_the_correct_image_has_a_green_frame(tmp_path):
    """The frame is around the image `correct`; without it there is none."""
    shares, centers = {}, {}
    for correct in (None, 0, 3):
        path = tmp_path / f"{correct}.png"
        plot_contact_sheet(path, [SheetRow("a dog", images(4), list("abcd"), correct)])
        green = mask(decode(path), GREEN)
        shares[correct] = green.mean()
        if green.any():
            centers[correct] = np.nonzero(green)[1].mean() / green.shape[1]
    assert shares[None] == 0
    assert shares[0] > 0.001 and shares[3] > 0.001
    assert centers[0] < 0.5 < 0.8 < centers[3]


def test_rows_may_differ_in_length_and_a_query_may_be_an_image(tmp_path):
    """A red query image is drawn, above a text query with more images."""
    plot_contact_sheet(tmp_path / "sheet.png", [
        SheetRow(np.full((20, 10, 3), (255, 0, 0), np.uint8), images(1), ["1.00"]),
        SheetRow("text", images(3), ["a", "b", "c"], 2),
    ], title="two queries")
    assert mask(decode(tmp_path / "sheet.png"), (255, 0, 0)).mean() > 0.01


ODD_TEXTS = {
    "empty": "", "dollars": "$5 or $x$ or \\frac{", "invalid formula": "$\\bad$",
    "long word": "x" * 3000,
    "long": "many words " * 500, "lines": "a\nb\tc", "quotes": "\" ' ` \\ % # & _ ^ { }",
    "chinese": "狗在草地上", "emoji": "dog 🐶", "hebrew, arabic": "כלב كلب", "hindi": "कुत्ता",
    "combining": "e\u0301\u200b\u202e", "NUL": "a\x00b", "not UTF-8": "caf\udce9.jpg",
}


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_any_text_is_drawn_without_a_warning(tmp_path, text):
    """Queries, labels and titles of any characters give a sheet, without an error or a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plot_contact_sheet(tmp_path / "sheet.png",
                           [SheetRow(text, images(2), [text, "b"], 1)], title=text)
    assert [str(warning.message) for warning in caught] == []
    assert decode(tmp_path / "sheet.png").std() > 0


def test_dollar_signs_are_not_parsed_as_a_formula(tmp_path):
    """"$x$" is drawn with its dollar signs, so with more dark pixels than "x"."""
    dark = []
    for text in ("x", "$x$"):
        plot_contact_sheet(tmp_path / "sheet.png", [SheetRow(text, images(1), ["a"])])
        dark.append((decode(tmp_path / "sheet.png") < 100).all(-1).sum())
    assert dark[1] > dark[0]


# Reports


def source_with_issues() -> DataSource:
    """Return a source with an issue of each kind."""
    fixed = [DataIssue("line 4", "a.jpg", "the second | was missing", "a.jpg| 4   A dog")]
    rejected = [DataIssue("line 7", "b.jpg", "empty caption"),
                DataIssue("line 9", "", "not a row", 'quote " comma , caf\udce9 狗\nline')]
    read = Annotations("results.csv", [], 1234, fixed, rejected)
    missing = [DataIssue("images", "gone.jpg", "no such image")]
    return DataSource(Path("images"), read, {}, missing, [])


def test_rejected_csv_has_a_row_per_issue(tmp_path):
    """The CSV file reads back to the issues, and the summary counts each kind."""
    store = PixelStore(np.zeros((0, 2, 2, 3), np.uint8), {}, {"bad.jpg": "truncated"})
    path = tmp_path / "rejected.csv"
    summary = write_rejected(path, source_with_issues(), store)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["kind", "where", "name", "reason", "text"],
        ["caption rows fixed", "line 4", "a.jpg", "the second | was missing",
         "a.jpg| 4   A dog"],
        ["caption rows rejected", "line 7", "b.jpg", "empty caption", ""],
        ["caption rows rejected", "line 9", "", "not a row",
         'quote " comma , caf\\udce9 狗\nline'],
        ["images missing", "images", "gone.jpg", "no such image", ""],
        ["images unreadable", "images", "bad.jpg", "truncated", ""],
    ]
    for part in ("1,234 captions", "1 caption rows fixed", "2 caption rows rejected",
                 "1 images missing", "1 images unreadable", str(path)):
        assert part in summary


def test_input_without_issues_is_reported_so(tmp_path):
    """Without issues the CSV file has only its header, and the summary counts the captions."""
    source = DataSource(Path("images"), Annotations("results.csv", [], 5), {}, [], [])
    summary = write_rejected(tmp_path / "rejected.csv", source)
    assert summary == "input: 5 captions; nothing rejected"
    assert (tmp_path / "rejected.csv").read_text().splitlines() == ["kind,where,name,reason,text"]


@pytest.mark.parametrize(("is_best", "epochs"), [(False, 2), (True, 9), (True, 10_000)])
def test_an_epoch_is_one_row_of_a_table(is_best, epochs):
    """The row has the recalls of both directions in the columns of the header, a mark for the best
    epoch, and an estimate of the remaining time; it fits 80 columns."""
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


def test_times_have_a_unit():
    """A time is in seconds, minutes or hours, by its size."""
    assert [format_seconds(s) for s in (0, 89, 90, 5399, 5400, 360_000)] == [
        "0 s", "89 s", "2 min", "90 min", "1.5 h", "100.0 h"]


def test_table_has_every_metric():
    """The recalls and ranks of both directions are aligned below their headings, then the rsum."""
    lines = format_table(metrics(1)).splitlines()
    assert lines[0].split() == ["R@1", "R@5", "R@10", "median", "rank", "mean", "rank"]
    assert lines[1].split() == ["image", "to", "text", "2.0", "6.0", "11.0", "30.5", "60.2"]
    assert lines[2].split() == ["text", "to", "image", "22.0", "26.0", "31.0", "31.5", "61.2"]
    assert lines[3] == "rsum 123.4"
    assert len({len(line) for line in lines[:3]}) == 1
