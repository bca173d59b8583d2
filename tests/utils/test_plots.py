"""Curves and contact sheets."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from src.data.images import load_image
from src.utils.plots import SheetRow, plot_contact_sheet, plot_curves, rank_headings
from tests.tiny_data import log_line, make_metrics

BLUE, ORANGE, GREEN = (47, 111, 222), (232, 116, 59), (42, 157, 98)


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
    [log_line(1)], [log_line(epoch) for epoch in range(1, 40)],
    [log_line(1, loss=math.nan), log_line(2)],
    [log_line(1, loss=0.0, metrics=make_metrics(1, rsum=0.0))],
], ids=["one epoch", "many epochs", "nan", "zero"])
def test_curves_show_loss_and_recall(tmp_path, log):
    """Any log gives two plots side by side, with the curves of both directions."""
    plot_curves(tmp_path / "new" / "curves.png", log)
    plot = decode(tmp_path / "new" / "curves.png")
    height, width, _ = plot.shape
    assert width / height == pytest.approx(10 / 3.8, rel=0.02)
    assert mask(plot, BLUE).any() and mask(plot, ORANGE).any()


def test_curves_of_a_run_without_validation(tmp_path):
    """Without metrics there is only the plot of the loss."""
    plot_curves(tmp_path / "curves.png", [log_line(epoch, metrics={}) for epoch in (1, 2)])
    plot = decode(tmp_path / "curves.png")
    height, width, _ = plot.shape
    assert width / height == pytest.approx(4.5 / 3.8, rel=0.02)
    assert not mask(plot, BLUE).any() and not mask(plot, ORANGE).any()


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


def test_headings_are_above_the_first_row(tmp_path):
    """The sheet is higher by a line of headings, and the rest of it is the same."""
    heights = {}
    for headings in ([], rank_headings("query", 2)):
        plot_contact_sheet(tmp_path / "sheet.png", [SheetRow("a", images(2), ["", ""])] * 2,
                           headings=headings)
        heights[len(headings)] = decode(tmp_path / "sheet.png").shape[0]
    assert 20 < heights[3] - heights[0] < 50


def test_ranks_as_headings():
    """1st to 5th, and the endings of larger numbers."""
    assert rank_headings("query", 5) == ["query", "1st", "2nd", "3rd", "4th", "5th"]
    assert [rank_headings("", 122)[i] for i in (11, 12, 13, 21, 22, 23, 101, 111, 122)] == [
        "11th", "12th", "13th", "21st", "22nd", "23rd", "101st", "111th", "122nd"]
