"""The Python examples of the README and of docs/export.md run as they are printed, on a small demo.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import search
import train
import train_image_only
from src.data.synthetic import make_demo_dataset
from src.embedder import Embedder
from src.models import tokenizer

ROOT = Path(__file__).resolve().parents[1]


def find_examples(file: str) -> list[str]:
    """Return the Python examples of a document."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


EXAMPLES, EXPORT_EXAMPLES = find_examples("README.md"), find_examples("docs/export.md")
OPTIONAL = ("faiss", "onnxruntime", "safetensors")
# The exported files are used where torch and this project cannot be imported.
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["src"] = None
code = sys.stdin.read()
exec(compile(code, "export.md", "exec"), globals())
if "embeddings" in globals():
    np.save("embeddings.npy", embeddings)
"""


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
        for format, packages in (("torch", ()), ("safetensors", ("safetensors",)),
                                 ("onnx", ("onnx", "onnxruntime"))):
            if all(map(importlib.util.find_spec, packages)):
                assert train_image_only.main(["--demo", "--format", format, "--text"]) == 0
    return folder


def test_there_are_examples() -> None:
    """The pattern finds them."""
    assert len(EXAMPLES) >= 2 and len(EXPORT_EXAMPLES) == 5


def skip_without_packages(code: str) -> None:
    """Skip the test if an optional package that the code names is not installed."""
    for package in OPTIONAL:
        if re.search(rf"\b{package}\b", code) and not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[0][:40])
def test_an_example_of_the_readme_runs(
    code: str, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises nothing where its optional packages are installed."""
    skip_without_packages(code)
    monkeypatch.chdir(demo)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("code", EXPORT_EXAMPLES, ids=lambda code: code.splitlines()[0][:40])
def test_an_example_of_the_export_runs_without_torch(
    code: str, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs neither torch nor this project, and its embeddings are those of the Embedder."""
    skip_without_packages(code)
    monkeypatch.chdir(demo)
    Path("embeddings.npy").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], input=code, text=True,
                          capture_output=True, cwd=demo)
    assert (done.returncode, done.stderr) == (0, "")
    if "embeddings" not in code:
        return
    model = Embedder("results/demo/models/flickr30k_clip_best.pth", "cpu")
    if "photo" in code:
        expected = model.images([f"data/demo/images/000{i}.png" for i in range(4)])
    else:
        expected = model.texts(["a red circle above a blue square", "Three yellow stars"])
    np.testing.assert_allclose(np.load("embeddings.npy"), expected, atol=1e-4)


@given(st.text(st.characters() | st.sampled_from("aB1 '_\u0301\u3099\u200d\ufe0f日カ\U000e0101")))
@example("A man's T-shirt 日本カ\u3099 e\u0301te\u0301 हिन्दी ﬁ _x_ 4²")
def test_the_documented_rule_is_that_of_the_tokenizer(text: str) -> None:
    """split_words of docs/export.md and of src/models/tokenizer.py find the same words."""
    scope: dict = {}
    [code] = [code for code in EXPORT_EXAMPLES if "def split_words" in code]
    exec(code, scope)
    assert scope["split_words"](text) == tokenizer.split_words(text)


@given(st.text(st.characters(max_codepoint=127)))
def test_the_rule_for_ascii(text: str) -> None:
    """The examples split ASCII texts by a regular expression."""
    assert re.findall("[a-z0-9]+", text.lower()) == tokenizer.split_words(text)
