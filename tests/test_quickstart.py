"""The notebook docs/quickstart.ipynb runs from top to bottom, on a small demo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
# Trains for one epoch on small images: the full demo takes minutes.
SHORTEN = """
import train
main = train.main
train.main = lambda argv: main([*argv, "--epochs", "1", "--image-size", "32", "--max-images", "100",
                                "--device", "cpu"])
"""


def test_the_notebook_is_of_format_4() -> None:
    """The fields that Jupyter requires are there, and the ids of the cells are different."""
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["nbformat_minor"] == 5
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) > 5
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert ({"outputs", "execution_count"} <= cell.keys()) == (cell["cell_type"] == "code")
        assert all(isinstance(line, str) for line in cell["source"])


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its code cells run in order, in one process, and the last result is a table of texts."""
    cells = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    code = "\n".join([SHORTEN, *cells, "print('shape', vectors.shape, len(results), status)"])
    code = code.replace("train.main([", "status = train.main([", 1)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "shape (3, 256) 5 0"
    assert (tmp_path / "results" / "demo" / "curves.png").exists()
