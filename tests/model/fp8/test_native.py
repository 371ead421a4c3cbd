"""Building the compiled kernels: one library for all processes, and clear words where it cannot be."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from model.compiled import MissingCompiler
from model.fp8 import native
from model.fp8.formats import Tile
from model.fp8.quantise import Quantiser
from tests.model.fp8.data import KERNELS, same_bits, wild


@pytest.mark.slow
def test_processes_race_for_one_library(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(native.build_kernels, [tmp_path, tmp_path])
    assert first == second and [path.name for path in tmp_path.iterdir()] == [first.name]
    changed = first.stat().st_mtime_ns
    assert native.build_kernels(tmp_path).stat().st_mtime_ns == changed
    quantiser = Quantiser(Tile.ROW, kernels=native.NativeKernels(first))
    x = wild((4, 256), seed=0, octaves=1)
    assert torch.equal(quantiser.quantise(x).dequantise(), Quantiser(Tile.ROW).quantise(x).dequantise())


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingCompiler, match=r"need g\+\+.*fp8\.native=false"):
        native.build_kernels(tmp_path / "cache")


def test_a_failing_compilation_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(native, "SOURCE", broken)
    with pytest.raises(MissingCompiler, match="could not compile"):
        native.build_kernels(tmp_path / "cache")


@pytest.mark.slow
def test_a_wrong_constant_in_the_source_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = native.SOURCE.read_text()
    x = wild((64, 256), seed=1, octaves=3)
    for right, wrong in (
        ("magnitude + 7 + ((magnitude >> 4) & 1)", "magnitude + 8"),  # ties away from zero instead of to even
        ("max(rounded, strip.base[j]) - strip.base[j]", "max(rounded, strip.base[j])"),  # the exponent not moved
        ("(s.exponent - 6) * 128 - 1", "(s.exponent - 8) * 128 - 1"),  # subnormals taken for normal
    ):
        assert source.count(right) == 1
        mutant = tmp_path / "mutant.cpp"
        mutant.write_text(source.replace(right, wrong))
        monkeypatch.setattr(native, "SOURCE", mutant)
        kernels = native.NativeKernels(native.build_kernels(tmp_path))
        found, wanted = (Quantiser(Tile.ROW, kernels=k).both(x) for k in (kernels, KERNELS["torch"]))
        assert not (same_bits(found[0].values, wanted[0].values) and same_bits(found[1].values, wanted[1].values))


def test_the_library_needs_nothing_but_the_c_library() -> None:
    needed = subprocess.run(["readelf", "-d", str(native.build_kernels())], capture_output=True, text=True)
    if needed.returncode:
        pytest.skip("no readelf")
    assert "torch" not in needed.stdout


def test_devices_and_dtypes_are_refused_by_name() -> None:
    tensor = Quantiser(Tile.ROW).quantise(torch.zeros(2, 2))
    with pytest.raises(TypeError, match="float16"):
        KERNELS["native"].decode(tensor, torch.float16)
    with pytest.raises(ValueError, match="meta"):
        Quantiser(Tile.ROW, kernels=KERNELS["native"]).quantise(torch.zeros(2, 2, device="meta"))
