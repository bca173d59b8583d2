"""The Python examples of the README run as they are printed there, on a small demo."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import search
import train
import train_image_only
from src.data.synthetic import make_demo_dataset

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
OPTIONAL = ("faiss", "onnxruntime")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/demo and results/demo: a model trained for one epoch, index and export."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_demo_dataset(Path("data/demo"), n_images=24)
        assert train.main(["--demo", "--data-dir", "data/demo", "--epochs", "1", "--image-size",
                           "32", "--batch-size", "8", "--device", "cpu"]) == 0
        assert search.main(["--demo", "a red circle", "--device", "cpu"]) == 0
        assert train_image_only.main(["--demo"]) == 0
    return folder


def test_there_are_examples() -> None:
    """The pattern finds them."""
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[0][:40])
def test_an_example_of_the_readme_runs(
    code: str, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises nothing where its optional packages are installed."""
    for package in OPTIONAL:
        if re.search(rf"\b{package}\b", code) and not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(demo)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})
