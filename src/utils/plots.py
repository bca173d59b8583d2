"""Plots: the curves of a training run, and contact sheets of queries with their top images."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.utils.files import write_atomic

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
HAIRLINE = "#c3cad2"
QUERY_WIDTH = 1.6  # of a text in a contact sheet, in widths of an image
BLUE, ORANGE, GREEN = "#2f6fde", "#e8743b", "#2a9d62"


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # characters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", r"(?s)Glyph .* missing from|Matplotlib currently does not"
                                " support .* natively", UserWarning)
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    write_atomic(path, buffer.getvalue())


def plot_curves(path: Path, log: list[dict]) -> None:
    """Plot training loss and validation recall over the epochs of a run's log, as a PNG file.

    A vertical line marks the epoch with the highest rsum, whose model is kept. A run without
    validation has only the loss.
    """
    validated = bool(log[-1]["metrics"])
    figure = Figure(figsize=(10 if validated else 4.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 2 if validated else 1, squeeze=False,
                             width_ratios=[1, 1.35] if validated else [1])[0]
    epochs = [line["epoch"] for line in log]
    panels[0].plot(epochs, [line["loss"] for line in log], "o-", color=INK, markersize=3)
    panels[0].set_title("training loss", loc="left", color=INK, fontsize=11)
    if validated:
        _plot_recall(panels[1], log)
        best = max(log, key=lambda line: line["metrics"]["rsum"])["epoch"]
        panels[0].annotate("kept", (best, 0.97), (-3, 0), xycoords=("data", "axes fraction"),
                           textcoords="offset points", color=GREEN, fontsize=8, va="top",
                           ha="right")
    for axes in panels:
        if validated:
            axes.axvline(best, color=GREEN, linewidth=1, zorder=0)
        if len(log) == 1:
            axes.set_xlim(0, 2)
        axes.set_xlabel("epoch", color=MUTED)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(MUTED)
        axes.tick_params(colors=MUTED)
    _save(figure, path)


def _plot_recall(axes: Axes, log: list[dict]) -> None:
    """Plot Recall@K in both directions, each line labeled at its end."""
    ends = []  # (value, text, color) of the last point of each line
    for direction, color in (("text_to_image", BLUE), ("image_to_text", ORANGE)):
        for k, style in ((1, "-"), (5, "--"), (10, ":")):
            values = [line["metrics"][f"{direction}_R@{k}"] for line in log]
            axes.plot([line["epoch"] for line in log], values, style, color=color, marker="o",
                      linewidth=1.8 if k == 1 else 1.3, markersize=3)
            ends.append((values[-1], f"{direction.replace('_', ' ')} R@{k}", color))
    axes.set_title("validation recall, %", loc="left", color=INK, fontsize=11)
    axes.set_ylim(0, 105)
    ends.sort()
    positions = [value for value, _, _ in ends]
    for i in range(1, len(ends)):  # labels of neighboring lines must not overlap
        positions[i] = max(positions[i], positions[i - 1] + 6)
    for i in reversed(range(len(ends))):  # nor be above the axes
        positions[i] = min(positions[i], 100 - 6 * (len(ends) - 1 - i))
    for position, (_, text, color) in zip(positions, ends, strict=True):
        axes.text(1.02, position / 105, text, color=color, fontsize=8, va="center",
                  transform=axes.transAxes)


@dataclass(frozen=True)
class SheetRow:
    """A query with its top images.

    Attributes:
        query: a text, or an image as below.
        images: (H, W, 3) uint8 each, from the best.
        labels: a line of text below each image.
        correct: index in `images` of the image that the query belongs to; None if there is none.
    """

    query: str | np.ndarray
    images: list[np.ndarray]
    labels: list[str]
    correct: int | None = None


def plot_contact_sheet(
    path: Path, rows: list[SheetRow], title: str = "", headings: Sequence[str] = ()
) -> None:
    """Draw each query with its images in a row, the correct one framed, as a PNG file.

    Args:
        path: the file.
        rows: from the top.
        title: of the sheet.
        headings: of the column of queries and of the columns of images; may be fewer.
    """
    columns = max(len(row.images) for row in rows)
    top = (0.5 if title else 0.1) + (0.25 if headings else 0)
    figure = Figure(figsize=(3.0 + 1.75 * columns, 2.05 * len(rows) + top), layout="constrained")
    grid = figure.subplots(len(rows), columns + 1, squeeze=False,
                           width_ratios=[QUERY_WIDTH] + [1] * columns)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for row, axes in zip(rows, grid, strict=True):
        if isinstance(row.query, str):
            axes[0].text(0.0, 0.5, _wrap(row.query), va="center", ha="left", color=INK,
                         fontsize=11, transform=axes[0].transAxes, parse_math=False)
            axes[0].set_box_aspect(1 / QUERY_WIDTH)  # as high as a square image
        else:
            axes[0].imshow(row.query)
        for i, (image, label) in enumerate(zip(row.images, row.labels, strict=True)):
            cell = axes[i + 1]
            cell.imshow(image)
            cell.set_xlabel(_drawable(label), fontsize=8, color=MUTED, parse_math=False)
            # White images need a frame on the white sheet.
            cell.spines[:].set(visible=True, color=HAIRLINE, linewidth=0.5)
            if i == row.correct:
                cell.spines[:].set(color=GREEN, linewidth=4)
    for axes, heading in zip(grid[0], headings, strict=False):
        axes.set_title(heading, loc="left", fontsize=9, color=MUTED, parse_math=False)
    if title:
        figure.suptitle(_drawable(title), x=0.01, ha="left", color=INK, fontsize=12,
                        parse_math=False)
    _save(figure, path)


def _wrap(text: str, width: int = 26, lines: int = 6) -> str:
    """Break a text into lines that fit a cell."""
    return "\n".join(textwrap.wrap(_drawable(text), width, max_lines=lines, placeholder=" …"))


def rank_headings(first: str, count: int) -> list[str]:
    """Return the headings of a column of queries and of `count` columns of images, by rank."""
    endings = {1: "st", 2: "nd", 3: "rd"}
    return [first, *(f"{i}{'th' if 10 < i % 100 < 14 else endings.get(i % 10, 'th')}"
                     for i in range(1, count + 1))]


def _drawable(text: str) -> str:
    """Replace what matplotlib refuses: bytes of a file name that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()
