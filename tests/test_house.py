"""The house rules that a machine can keep: who imports whom, one door a library, docstrings."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted((ROOT / "src").glob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
DOORS = {
    "PIL": {"image_file"}, "efficientnet_pytorch": {"image_encoder"},
    "matplotlib": {"plots"}, "fcntl": {"files"}, "http": {"page_server", "image_encoder"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function, but not for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found.add(node.module or "")
    return found


def rooms_of(path: Path) -> set[str]:
    """The rooms of src/ that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("src.")}


def test_there_are_rooms_and_scripts() -> None:
    """The tests below look at something."""
    assert len(ROOMS) > 15 and {"main", "train", "evaluate", "search", "train_image_only"} <= {
        path.stem for path in SCRIPTS}


@pytest.mark.parametrize("path", ROOMS + SCRIPTS, ids=lambda path: path.stem)
def test_nobody_imports_a_script(path: Path) -> None:
    """Scripts import rooms; rooms never import scripts, and scripts never scripts."""
    assert not imports(path) & {script.stem for script in SCRIPTS}


def test_rooms_import_in_no_circle() -> None:
    """The rooms can be read one after the other, each after those it builds on."""
    waiting = {path.stem: rooms_of(path) for path in ROOMS}
    while waiting:
        ready = {room for room, needs in waiting.items() if not needs & waiting.keys()}
        assert ready, f"a circle among {sorted(waiting)}"
        waiting = {room: needs for room, needs in waiting.items() if room not in ready}


@pytest.mark.parametrize("path", ROOMS + SCRIPTS, ids=lambda path: path.stem)
def test_the_reading_order_names_every_file(path: Path) -> None:
    """README's table is a map of the code, and a map leaves no room out."""
    name = path.relative_to(ROOT).as_posix()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## The code, in reading order")[1].split("\n## ")[0]
    assert path.stem == "__init__" or f"`{name}`" in table


@pytest.mark.parametrize("path", ROOMS + SCRIPTS, ids=lambda path: path.stem)
def test_every_library_has_one_door(path: Path) -> None:
    """Outside libraries are used in the one room made for them."""
    for library in {name.split(".")[0] for name in imports(path)} & DOORS.keys():
        assert path.parent.name == "src" and path.stem in DOORS[library], \
            f"{path.name} imports {library}"


@pytest.mark.parametrize("path", ROOMS + SCRIPTS, ids=lambda path: path.stem)
def test_tensors_are_saved_and_loaded_in_one_place(path: Path) -> None:
    """torch.save and torch.load stand in src/tensor_file.py alone; nobody unpickles otherwise."""
    assert not imports(path) & {"pickle", "joblib", "dill", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("save", "load") \
                and getattr(node.value, "id", "") == "torch":
            assert path.stem == "tensor_file"
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert not {alias.name for alias in node.names} & {"save", "load"}


def test_only_weights_are_loaded() -> None:
    """Every torch.load says weights_only=True, so that no file can run code."""
    loads = [node for path in ROOMS + SCRIPTS
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert loads
    for call in loads:
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"


@pytest.mark.parametrize("path", ROOMS + SCRIPTS, ids=lambda path: path.stem)
def test_public_names_have_docstrings(path: Path) -> None:
    """Files, public classes, functions and methods say what they are."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} does not say what it is"
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef)
                          and not node.name.startswith("_"))]:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
