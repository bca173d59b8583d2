"""Rules of the code base that a machine can check: imports, libraries, docstrings, README."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "src").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
# A folder may import from those of a lower number. src/cli.py belongs to the scripts, and
# src/embedder.py is what other programs import.
LEVELS = {"utils": 0, "data": 1, "models": 1, "training": 2, "evaluation": 2, "search": 3,
          "cli": 4, "embedder": 4}
# Outside libraries that only the named modules may import.
LIBRARIES = {
    "PIL": {"data/images"}, "efficientnet_pytorch": {"models/image_encoder"},
    "matplotlib": {"utils/plots"}, "fcntl": {"utils/files"},
    "http": {"search/page_server", "models/image_encoder"},
    "pandas": {"data/captions", "data/caption_files"}, "safetensors": {"utils/tensors"},
    "onnx": {"models/onnx_graph"}, "onnxruntime": {"models/onnx_runtime"},
    "transformers": {"models/bert"}, "tokenizers": {"models/bert"},
    "huggingface_hub": {"models/bert"},
}


def module_name(path: Path) -> str:
    """src/data/captions.py -> 'data/captions'; train.py -> 'train.py'."""
    path = path.relative_to(ROOT)
    return "/".join(path.with_suffix("").parts[1:]) if path.parts[0] == "src" else path.name


def parse(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> set[str]:
    """All modules that a file imports at any depth, except for type annotations only.

    `from src.utils import distributed` counts as src.utils.distributed.
    """
    skipped = {id(node) for branch in ast.walk(tree) if isinstance(branch, ast.If)
               and getattr(branch.test, "id", "") == "TYPE_CHECKING"
               for statement in branch.body for node in ast.walk(statement)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            folder = ROOT / Path(*node.module.split("."))
            found |= ({f"{node.module}.{alias.name}" for alias in node.names}
                      if node.module.startswith("src") and folder.is_dir() else {node.module})
    return found


def project_imports(tree: ast.Module) -> set[str]:
    """The modules of src that a file imports, such as 'data/captions'."""
    return {"/".join(name.split(".")[1:]) for name in imports(tree) if name.startswith("src.")}


def wrong_imports(name: str, tree: ast.Module) -> list[str]:
    """What the module `name` imports against the rules."""
    scripts = {script.stem for script in SCRIPTS}
    wrong = [f"{name} imports the script {script}" for script in imports(tree) & scripts]
    folder = name.split("/")[0]
    if folder not in LEVELS:  # a script may import every module
        return wrong
    for target in project_imports(tree):
        target_folder = target.split("/")[0]
        if target_folder != folder and LEVELS[target_folder] >= LEVELS[folder]:
            wrong.append(f"{name} imports {target}")
    return wrong


def find_cycle(graph: dict[str, set[str]]) -> set[str]:
    """The modules of an import graph that cannot be put into an order; empty if all can."""
    waiting = dict(graph)
    while waiting:
        ready = {name for name, needs in waiting.items() if not needs & waiting.keys()}
        if not ready:
            return set(waiting)
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}
    return set()


def tensor_files(name: str, tree: ast.Module) -> list[str]:
    """Where a module other than utils/tensors reads or writes pickles or tensor files."""
    wrong = [f"{name} imports {library}" for library in
             imports(tree) & {"pickle", "joblib", "dill", "shelve", "marshal"}]
    if name == "utils/tensors":
        return wrong
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("save", "load") \
                and getattr(node.value, "id", "") == "torch":
            wrong.append(f"{name} uses torch.{node.attr}")
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            wrong += [f"{name} uses torch.{alias.name}" for alias in node.names
                      if alias.name in ("save", "load")]
    return wrong


def test_there_are_modules_and_scripts() -> None:
    """The tests below check something."""
    assert len(MODULES) > 15 and {"main", "train", "evaluate", "search", "train_image_only"} <= {
        path.stem for path in SCRIPTS}
    assert {path.name for path in (ROOT / "src").iterdir() if path.is_dir()
            and path.name != "__pycache__"} == LEVELS.keys() - {"cli", "embedder"}


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    """utils <- data, models <- training, evaluation <- search <- scripts; nobody imports a
    script."""
    assert wrong_imports(module_name(path), parse(path)) == []


def test_there_is_no_import_cycle() -> None:
    """The modules can be read one after another, each after those that it imports."""
    assert find_cycle({module_name(path): project_imports(parse(path)) for path in MODULES}) \
        == set()


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=module_name)
def test_tensors_are_saved_and_loaded_in_one_module(path: Path) -> None:
    """torch.save and torch.load are called in src/utils/tensors.py only, and nobody unpickles."""
    assert tensor_files(module_name(path), parse(path)) == []


@pytest.mark.parametrize("check", [
    lambda: wrong_imports("utils/files", ast.parse("from src.data import captions")),
    lambda: wrong_imports("data/source", ast.parse("def f():\n    import src.models.loss")),
    lambda: wrong_imports("data/source", ast.parse("import train")),
    lambda: wrong_imports("evaluate.py", ast.parse("from search import main")),
    lambda: wrong_imports("training/engine", ast.parse("from src.evaluation.embed import x")),
    lambda: find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}),
    lambda: tensor_files("models/loss", ast.parse("import torch\ntorch.load('x')")),
    lambda: tensor_files("models/loss", ast.parse("from torch import save")),
    lambda: tensor_files("models/loss", ast.parse("import pickle")),
], ids=["upward", "sideways", "script", "script by script", "same level", "cycle", "torch.load",
        "torch.save", "pickle"])
def test_the_rules_can_fail(check) -> None:
    """Each rule finds the violation that it is there for."""
    assert check()


def test_types_may_be_imported_from_anywhere() -> None:
    """An import below TYPE_CHECKING is not one at run time."""
    tree = ast.parse("if TYPE_CHECKING:\n    from src.models.tokenizer import Tokenizer\nimport re")
    assert imports(tree) == {"re"}


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=module_name)
def test_outside_libraries_are_imported_in_one_module(path: Path) -> None:
    """Each of LIBRARIES is used through the module that wraps it."""
    for library in {name.split(".")[0] for name in imports(parse(path))} & LIBRARIES.keys():
        assert module_name(path) in LIBRARIES[library]


def test_only_weights_are_loaded() -> None:
    """Every torch.load has weights_only=True, so that no file can run code."""
    loads = [node for path in MODULES + SCRIPTS for node in ast.walk(parse(path))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert loads
    for call in loads:
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=module_name)
def test_public_names_have_docstrings(path: Path) -> None:
    """Files, public classes, functions and methods have a docstring; __init__.py files are
    empty."""
    if path.stem == "__init__" and path.parent.name != "src":
        assert path.read_text() == ""
        return
    tree = parse(path)
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef)
                          and not node.name.startswith("_"))]:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=module_name)
def test_the_readme_lists_every_file(path: Path) -> None:
    """The file tree of the README is complete."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## The code")[1].split("\n## ")[0]
    assert path.stem == "__init__" or path.name in tree


def test_train_is_short() -> None:
    """train.py has at most 250 lines, and no function of more than 60."""
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 250
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_pytest_does_not_collect_the_stress_tests() -> None:
    """A plain `pytest` finds no test in tests/stress, whose runs take half an hour."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider",
               "tests/stress"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
