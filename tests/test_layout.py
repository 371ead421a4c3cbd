"""The rules of the repository itself: where packages come from, how long files and functions are, who imports whom."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("launcher", "parallel", "model", "optim", "data")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Path, or path:function, and why it is longer.
LONGER: dict[str, str] = {}


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", [*PACKAGES, "configs"])
def test_packages_come_from_this_repository(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / package


def test_every_test_folder_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    parents = {
        parent for folder in folders for parent in folder.parents if (ROOT / "tests") in (parent, *parent.parents)
    }
    missing = [str(folder.relative_to(ROOT)) for folder in folders | parents if not (folder / "__init__.py").exists()]
    assert not missing, f"no __init__.py in {missing}: tests/model would shadow model"


def test_packages_are_typed() -> None:
    assert not [package for package in PACKAGES if not (ROOT / package / "py.typed").exists()]


def test_files_are_short() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in sources()}
    long = {name: count for name, count in lengths.items() if count > MAX_FILE_LINES and name not in LONGER}
    assert not long


def test_functions_are_short() -> None:
    long = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(ROOT).as_posix()}:{node.name}"
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > MAX_FUNCTION_LINES and name not in LONGER:
                    long.append(f"{name} {count} lines")
    assert not long


def test_the_list_of_exceptions_is_not_stale() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert all(name.split(":")[0] in names for name in LONGER)


def test_module_level_globals_stay_out() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Global)
    ]
    assert not found


def test_the_model_knows_nothing_of_distribution() -> None:
    found = []
    for path in sorted((ROOT / "model").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [f"{node.value.id}.{node.attr}"]
            found += [f"{path.name}:{name}" for name in names if name.startswith("torch.distributed")]
    assert not found


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([str(linter), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
