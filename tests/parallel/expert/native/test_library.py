"""The host library: built once by ranks that start together, again when its source changes, not without g++."""

import multiprocessing as mp
import shutil
from pathlib import Path

import pytest

from parallel.expert.native import library
from parallel.expert.native.failure import NativeError


def build(folder: Path, sources: Path) -> float:
    library.SOURCES = sources
    return library.host_library(folder).stat().st_mtime_ns


def small_source(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "abi_host.cpp").write_text(text)
    return folder


def test_ranks_build_once_and_a_change_builds_again(tmp_path: Path) -> None:
    sources, cache = small_source(tmp_path / "csrc", "int one() { return 1; }"), tmp_path / "cache"
    with mp.get_context("fork").Pool(4) as pool:
        times = pool.starmap(build, [(cache, sources)] * 8)
    assert len(set(times)) == 1
    small_source(sources, "int one() { return 2; }")
    with mp.get_context("fork").Pool(1) as pool:
        assert pool.apply(build, (cache, sources)) not in times
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".so", ".so"]  # no half-built file


def test_compiler_errors_and_a_missing_compiler_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "SOURCES", small_source(tmp_path / "csrc", "int one( {"))
    with pytest.raises(NativeError, match=r"g\+\+ failed on the native_host library: .*error") as caught:
        library.host_library(tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NativeError, match=r"needs g\+\+"):
        library.host_library(tmp_path)
