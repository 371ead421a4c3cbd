"""The sources in Transformer Engine's wheel, and whether calls of ours fit functions of theirs; nothing is imported."""

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

VERSION = "2.20.2"


def published_versions() -> list[str]:
    """Versions of Transformer Engine that the package index has; skips where it cannot be asked."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", "transformer_engine"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    _, told, versions = found.stdout.partition("Available versions:")
    if found.returncode or not told:
        pytest.skip(f"no list of versions: {(found.stderr.strip() or found.stdout.strip()).splitlines()[-1]}")
    return [version.strip() for version in versions.partition("\n")[0].split(",")]


def transformer_engine_wheel(folder: Path) -> Iterator[zipfile.ZipFile]:
    """The opened wheel, fetched to `folder` (1.2 MB); skips where it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    found = subprocess.run([*command, f"transformer_engine=={VERSION}"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"no wheel of transformer_engine {VERSION}: {found.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as opened:
        yield opened


def parsed(wheel: zipfile.ZipFile, path: str) -> ast.Module:
    """One of its files."""
    return ast.parse(wheel.read(f"transformer_engine/{path}"))


def function_of(tree: ast.Module, owner: str | None, name: str) -> ast.FunctionDef:
    """A function, or a method of the class `owner`."""
    scopes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner] if owner else [tree]
    return next(n for scope in scopes for n in scope.body if isinstance(n, ast.FunctionDef) and n.name == name)


def class_of(tree: ast.Module, name: str) -> ast.ClassDef:
    """A class of the file."""
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)


def parameters(function: ast.FunctionDef) -> list[str]:
    """Their names without self."""
    return [a.arg for a in (*function.args.args, *function.args.kwonlyargs) if a.arg != "self"]


def calls_of(path: Path, name: str) -> list[ast.Call]:
    """Calls in a file of ours whose target reads `name`."""
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]


def call_of(path: Path, name: str) -> ast.Call:
    """The only one."""
    (call,) = calls_of(path, name)
    return call


def fits(call: ast.Call, function: ast.FunctionDef, extra: frozenset[str] | set[str] = frozenset()) -> bool:
    """Whether the function takes the call's arguments, and those named in `extra`."""
    names = parameters(function)
    given = {k.arg for k in call.keywords if k.arg} | extra
    return given <= set(names[len(call.args) :]) and len(call.args) <= len(names)
