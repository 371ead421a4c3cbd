"""Packages that are not here, are another project of that name, or lack a module: one line each."""

from typing import Any

import pytest

from model import backends
from model.backends import MissingBackend, apex_problem, load_apex, numbers, version_problem


@pytest.mark.parametrize(("text", "expected"), [("2.20.2", (2, 20, 2)), ("2.6.1+c0ffee", (2, 6, 1)), ("2", (2,))])
def test_versions(text: str, expected: tuple[int, ...]) -> None:
    assert numbers(text) == expected


def test_a_version_in_the_range_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "installed", lambda package: "2.20.2")
    assert version_problem("X", "x", "2.20", "2.21") is None
    assert version_problem("X", "x", "2.20.3", "2.21") == (
        "X 2.20.2 is installed, 2.20.3 or newer, below 2.21 is needed"
    )


def modules(monkeypatch: pytest.MonkeyPatch, version: str | None, *present: str) -> None:
    def find(name: str) -> str | None:
        if "." in name and name.partition(".")[0] not in present:
            raise ModuleNotFoundError(name)  # as importlib's does
        return name if name in present else None

    monkeypatch.setattr(backends, "installed", lambda package: version)
    monkeypatch.setattr(backends, "find_spec", find)


@pytest.mark.parametrize(
    ("version", "present", "words"),
    [
        (None, (), "it is not installed"),
        ("0.9.10.dev0", ("apex",), "the apex 0.9.10.dev0 installed here is another project"),
        ("0.9.10.dev0", (), "the apex 0.9.10.dev0 installed here is another project"),
        ("0.1", ("apex", "apex.multi_tensor_apply", "amp_C"), "the apex 0.1 installed here was built without fused_x"),
        ("0.1", ("apex", "fused_x"), None),
    ],
)
def test_nvidias_apex_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, version: str | None, present: tuple[str, ...], words: str | None
) -> None:
    modules(monkeypatch, version, *present)
    assert apex_problem("fused_x") == words
    if words:
        with pytest.raises(MissingBackend) as caught:
            load_apex("a.key=apex", "use a.key=torch", "fused_x")
        text = str(caught.value)
        assert text.startswith("a.key=apex needs NVIDIA's apex") and words in text and text.endswith("use a.key=torch")
        assert "`pip install apex` is another project" in text and "\n" not in text


def test_a_module_that_does_not_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file\nmore")

    modules(monkeypatch, "0.1", "apex", "fused_x")
    monkeypatch.setattr(backends.importlib, "import_module", broken)
    with pytest.raises(MissingBackend, match=r"its fused_x cannot be imported \(libcudart.so.13: .* file\): use a"):
        load_apex("a.key=apex", "use a.key=torch", "fused_x")
