"""House rules that a machine can check: who imports whom, how long things are, what is documented."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from tests.support.paths import ROOT

CODE = sorted(path for folder in ("models", "data", "pipeline") for path in (ROOT / folder).rglob("*.py"))
TEXTS = sorted([*CODE, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
NAMES = {path: path.relative_to(ROOT).as_posix() for path in TEXTS}

# A library, and the only places that may import it.
ONLY_IN = {
    "mlflow": ["pipeline/tracking/"],
    "nvidia": ["data/loading/"],
    "webdataset": ["data/shards/pack.py"],
    "obstore": ["data/storage/"],
    "hydra": ["pipeline/cli/", "pipeline/build/", "VERBS"],
    "omegaconf": ["pipeline/cli/", "pipeline/build/", "VERBS"],
    "matplotlib": ["pipeline/pages/"],
    "jinja2": ["pipeline/pages/"],
    "pytorch_lightning": ["models/learning/", "data/loading/datamodule.py", "pipeline/"],
    "lightning_fabric": ["pipeline/"],
    "torchvision": [],
    "timm": [],
    "lightning": [],  # the same library under another name, with other classes
}
MAY_IMPORT = {"models": {"models"}, "data": {"data"}, "pipeline": {"models", "data", "pipeline"}}
# The rooms of `pipeline`; each may import those before it. Everything else in `pipeline` is a verb.
ROOMS = ("cli", "build", "runs", "tracking", "pages")


@lru_cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@lru_cache
def imported_modules(path: Path) -> frozenset[str]:
    """The dotted names of everything that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def packages(path: Path) -> set[str]:
    """The top-level names that a file imports."""
    return {name.partition(".")[0] for name in imported_modules(path)}


def imported_files(path: Path) -> set[Path]:
    """The files of this project that a file imports."""
    files = set()
    for name in imported_modules(path):
        parts = name.split(".")
        for candidate in (ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1])):
            if candidate.with_suffix(".py").is_file():
                files.add(candidate.with_suffix(".py"))
                break
    return files


def definitions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in definitions(path) if not isinstance(node, ast.ClassDef)]


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - body[0].lineno + 1 if body and function.end_lineno else 0


def room(name: str) -> str | None:
    """The room of `pipeline` in which a file lies, None for a verb's or another package's."""
    parts = name.split("/")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 2 and parts[1] in ROOMS else None


def is_verb(name: str) -> bool:
    return name.startswith("pipeline/") and room(name) is None


def cycles(graph: dict[Path, set[Path]]) -> Iterator[list[Path]]:
    """Yield the paths through a graph that end where they began."""
    done: set[Path] = set()

    def visit(node: Path, trail: list[Path]) -> Iterator[list[Path]]:
        if node in trail:
            yield [*trail[trail.index(node) :], node]
        elif node not in done:
            for other in sorted(graph[node]):
                yield from visit(other, [*trail, node])
            done.add(node)

    for start in graph:
        yield from visit(start, [])


def test_there_is_code_to_check() -> None:
    assert len(CODE) > 60
    assert len(TEXTS) > len(CODE) + 40
    assert sum(len(functions(path)) for path in CODE) > 400
    assert sum(function.name == "forward" for path in CODE for function in functions(path)) >= 10
    assert sum(len(imported_files(path)) for path in CODE) > 150
    assert {room(NAMES[path]) for path in CODE} == {*ROOMS, None}


@pytest.mark.parametrize("path", CODE, ids=NAMES.get)
def test_libraries_and_packages_are_imported_where_they_belong(path: Path) -> None:
    used, name = packages(path), NAMES[path]
    package = name.partition("/")[0]
    assert used & MAY_IMPORT.keys() <= MAY_IMPORT[package]
    for library, places in ONLY_IN.items():
        if library in used:
            allowed = any(is_verb(name) if place == "VERBS" else name.startswith(place) for place in places)
            assert allowed, f"{name} imports {library}"


@pytest.mark.parametrize("path", CODE, ids=NAMES.get)
def test_configs_end_in_build(path: Path) -> None:
    name = NAMES[path]
    if not (name.startswith(("pipeline/cli/", "pipeline/build/")) or is_verb(name)):
        assert "DictConfig" not in path.read_text()


@pytest.mark.parametrize("path", CODE, ids=NAMES.get)
def test_rooms_import_only_the_rooms_below_them(path: Path) -> None:
    own = room(NAMES[path])
    if own is None:
        return
    for other in imported_files(path):
        if NAMES[other].startswith("pipeline/"):
            theirs = room(NAMES[other])
            assert theirs is not None, f"{NAMES[path]} imports the verb {NAMES[other]}"
            assert ROOMS.index(theirs) <= ROOMS.index(own), f"{NAMES[path]} imports {NAMES[other]}"


def test_imports_have_no_cycle() -> None:
    graph = {path: imported_files(path) & set(CODE) for path in CODE}
    assert [[NAMES[path] for path in cycle] for cycle in cycles(graph)] == []
    one, other = CODE[:2]
    assert list(cycles({one: {other}, other: {one}})), "a cycle must be noticed"


def test_data_rooms_point_one_way() -> None:
    shards = [path for path in CODE if NAMES[path].startswith("data/shards/")]
    assert len(shards) > 5
    for path in shards:
        assert not [other for other in imported_files(path) if NAMES[other].startswith("data/loading/")], NAMES[path]


def test_tests_import_no_tests() -> None:
    tests = [path for path in TEXTS if NAMES[path].startswith("tests/")]
    for path in tests:
        for name in imported_modules(path):
            assert not name.startswith("tests.") or name.startswith("tests.support"), f"{NAMES[path]} imports {name}"


def test_no_folder_holds_too_many_files() -> None:
    counts: dict[Path, int] = {}
    for path in CODE:
        if path.name != "__init__.py" and path.parent != ROOT / "pipeline":
            counts[path.parent] = counts.get(path.parent, 0) + 1
    assert len(counts) >= 12
    assert {folder: count for folder, count in counts.items() if count > 12} == {}


def test_files_are_short() -> None:
    lengths = {NAMES[path]: path.read_text().count("\n") for path in TEXTS}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    code = [lengths[NAMES[path]] for path in CODE if path.name != "__init__.py"]
    assert statistics.median(code) < 150


@pytest.mark.parametrize("path", [path for path in TEXTS if not NAMES[path].startswith("tests/")], ids=NAMES.get)
def test_functions_are_short(path: Path) -> None:
    for function in functions(path):
        assert body_length(function) <= 40, f"{function.name} has {body_length(function)} lines"


def test_the_main_of_train_reads_as_a_list() -> None:
    (main,) = [one for one in functions(ROOT / "pipeline" / "train" / "__main__.py") if one.name == "main"]
    assert body_length(main) <= 20


@pytest.mark.parametrize("path", CODE, ids=NAMES.get)
def test_functions_take_few_arguments(path: Path) -> None:
    for function in functions(path):
        positional = [one.arg for one in function.args.args if one.arg not in ("self", "cls")]
        is_hook = function.name.startswith("on_") or function.name in ("save_checkpoint", "__torch_dispatch__")
        assert len(positional) + len(function.args.kwonlyargs) <= 6, f"{function.name} takes more than six"
        assert len(positional) <= 2 or is_hook, f"{function.name} takes {positional} by position"


@pytest.mark.parametrize("path", CODE, ids=NAMES.get)
def test_everything_public_is_documented(path: Path) -> None:
    assert ast.get_docstring(tree(path))
    for node in definitions(path):
        if not node.name.startswith("_") and not _is_nested(path, node):
            is_documented_by_its_class = node.name == "forward"
            assert ast.get_docstring(node) or is_documented_by_its_class, f"{node.name} has no docstring"


@pytest.mark.parametrize("path", [path for path in CODE if NAMES[path].startswith("models/")], ids=NAMES.get)
def test_every_public_forward_states_its_shapes(path: Path) -> None:
    for node in definitions(path):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "forward":
                    text = (ast.get_docstring(node) or "") + (ast.get_docstring(method) or "")
                    assert re.search(r"Shapes: .*->", text, re.DOTALL), f"{node.name} does not state its shapes"


def test_the_lock_file_names_no_host() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert len(re.findall(r"^[a-z0-9.-]+==", lock, re.MULTILINE)) > 100
    assert "://" not in lock
    assert lock.count("--hash=sha256:") > 1000


def _is_nested(path: Path, node: ast.AST) -> bool:
    return any(node in ast.walk(outer) and node is not outer for outer in functions(path))
