"""Plots: the curves of a training run, and contact sheets of queries with their top images."""

from __future__ import annotations

import io
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from src.utils.files import write_atomic

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN = "#2f6fde", "#e8743b", "#2a9d62"


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # characters that the font lacks are drawn as boxes
        warnings.filterwarnings("ignore", r"(?s)Glyph .* missing from|Matplotlib currently does not"
                                " support .* natively", UserWarning)
        figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    write_atomic(path, buffer.getvalue())


def plot_curves(path: Path, log: list[dict]) -> None:
    """Plot training loss and validation recall over the epochs of a run's log, as a PNG file."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in log]
    left.plot(epochs, [line["loss"] for line in log], "o-", color=INK, markersize=4)
    left.set_title("training loss", loc="left", color=INK, fontsize=11)
    for direction, color in (("text_to_image", BLUE), ("image_to_text", ORANGE)):
        for k, style in ((1, ":"), (5, "--"), (10, "-")):
            name = f"{direction}_R@{k}"
            right.plot(epochs, [line["metrics"][name] for line in log], style, color=color,
                       marker="o", markersize=3, label=f"{direction.replace('_', ' ')} R@{k}")
    right.set_title("validation recall, %", loc="left", color=INK, fontsize=11)
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.set_xlabel("epoch", color=MUTED)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=MUTED)
    _save(figure, path)


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


def plot_contact_sheet(path: Path, rows: list[SheetRow], title: str = "") -> None:
    """Draw each query with its images in a row, the correct one framed, as a PNG file."""
    columns = max(len(row.images) for row in rows)
    figure = Figure(figsize=(3.0 + 1.75 * columns, 2.05 * len(rows) + (0.5 if title else 0.1)),
                    layout="constrained")
    grid = figure.subplots(len(rows), columns + 1, squeeze=False,
                           width_ratios=[1.6] + [1] * columns)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for row, axes in zip(rows, grid, strict=True):
        if isinstance(row.query, str):
            axes[0].text(0.0, 0.5, _wrap(row.query), va="center", ha="left", color=INK,
                         fontsize=11, transform=axes[0].transAxes, parse_math=False)
        else:
            axes[0].imshow(row.query)
        for i, (image, label) in enumerate(zip(row.images, row.labels, strict=True)):
            cell = axes[i + 1]
            cell.imshow(image)
            cell.set_xlabel(_drawable(label), fontsize=7.5, color=MUTED, parse_math=False)
            if i == row.correct:
                cell.spines[:].set(visible=True, color=GREEN, linewidth=4)
    if title:
        figure.suptitle(_drawable(title), x=0.01, ha="left", color=INK, fontsize=12,
                        parse_math=False)
    _save(figure, path)


def _wrap(text: str, width: int = 26, lines: int = 6) -> str:
    """Break a text into lines that fit a cell."""
    return "\n".join(textwrap.wrap(_drawable(text), width, max_lines=lines, placeholder=" …"))


def _drawable(text: str) -> str:
    """Replace what matplotlib refuses: bytes of a file name that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()
