"""House rules that a machine can check: who imports whom, how long things are, what is written down."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted(path for folder in ("models", "data", "pipeline") for path in (ROOT / folder).rglob("*.py"))
TEXTS = sorted([*CODE, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
NAMES = {path: path.relative_to(ROOT).as_posix() for path in TEXTS}

# A library, and the only files that may import it.
ONLY_IN = {
    "mlflow": {"pipeline/tracking/"},
    "nvidia": {"data/loading/"},
    "webdataset": {"data/shards/pack.py"},
    "hydra": {"pipeline/"},
    "omegaconf": {"pipeline/"},
    "pytorch_lightning": {"models/learning/", "data/loading/datamodule.py", "pipeline/"},
    "lightning_fabric": {"pipeline/"},
    "torchvision": set(),
    "timm": set(),
    "lightning": set(),  # the same library under its other name, and another class for each of its own
}
# A package, and the packages of ours it may import.
MAY_IMPORT = {"models": {"models"}, "data": {"data"}, "pipeline": {"models", "data", "pipeline"}}


@lru_cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """The top-level names that a file imports anywhere."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def definitions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in definitions(path) if not isinstance(node, ast.ClassDef)]


def test_there_is_code_to_check() -> None:
    assert len(CODE) > 20
    assert len(TEXTS) > len(CODE) + 10
    assert sum(len(functions(path)) for path in CODE) > 100
    assert sum(function.name == "forward" for path in CODE for function in functions(path)) >= 4


@pytest.mark.parametrize("path", CODE, ids=NAMES.get)
def test_imports_go_one_way(path: Path) -> None:
    used, name = imports(path), NAMES[path]
    package = name.partition("/")[0]
    assert used & MAY_IMPORT.keys() <= MAY_IMPORT[package]
    for library, places in ONLY_IN.items():
        if library in used:
            assert any(name.startswith(place) for place in places), f"{name} imports {library}"


@pytest.mark.parametrize("path", TEXTS, ids=NAMES.get)
def test_files_and_functions_are_short(path: Path) -> None:
    assert path.read_text().count("\n") <= 400
    for function in functions(path):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        length = function.end_lineno - body[0].lineno + 1 if body and function.end_lineno else 0
        assert length <= 40 or path.is_relative_to(ROOT / "tests"), f"{function.name} has {length} lines"


@pytest.mark.parametrize("path", CODE, ids=NAMES.get)
def test_functions_take_few_arguments(path: Path) -> None:
    for function in functions(path):
        positional = [one.arg for one in function.args.args if one.arg not in ("self", "cls")]
        hook = function.name.startswith("on_") or function.name in ("save_checkpoint", "__torch_dispatch__")
        assert len(positional) + len(function.args.kwonlyargs) <= 6, f"{function.name} takes more than six"
        assert len(positional) <= 2 or hook, f"{function.name} takes {positional} by position"


@pytest.mark.parametrize("path", CODE, ids=NAMES.get)
def test_everything_public_is_documented(path: Path) -> None:
    assert ast.get_docstring(tree(path))
    for node in definitions(path):
        if not node.name.startswith("_") and not _is_inner(path, node):
            inherits_words = node.name == "forward"
            assert ast.get_docstring(node) or inherits_words, f"{node.name} has no docstring"


@pytest.mark.parametrize("path", [path for path in CODE if path.is_relative_to(ROOT / "models")], ids=NAMES.get)
def test_every_public_forward_states_its_shapes(path: Path) -> None:
    for node in definitions(path):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "forward":
                    said = (ast.get_docstring(node) or "") + (ast.get_docstring(method) or "")
                    assert re.search(r"Shapes: .*->", said, re.DOTALL), f"{node.name} does not state its shapes"


def test_a_commit_names_no_host_of_a_registry() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert len(re.findall(r"^[a-z0-9.-]+==", lock, re.MULTILINE)) > 100
    assert "://" not in lock
    assert lock.count("--hash=sha256:") > 1000


def _is_inner(path: Path, node: ast.AST) -> bool:
    return any(node in ast.walk(outer) and node is not outer for outer in functions(path))
