"""The Triton kernels without a GPU: run in Triton's interpreter, compiled for sm_90a.

Slow, and in processes of their own: Triton is 286 MB to fetch and 1 GB on disk, so it is no part of the tests'
environment, and its interpreter is chosen when the process starts. Where it is not installed it is put into a
temporary folder, on its own, so that it cannot move torch.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TRITON = "triton==3.9.0"
ROOT = Path(__file__).parents[4]
MAX_REGISTERS = 64  # 128 threads a program: eight programs on an SM's 65,536

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    found = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache), "TRITON_HOME": str(cache)}
    if importlib.util.find_spec("triton") is None:
        site = tmp_path_factory.mktemp("triton")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), TRITON]
        result = subprocess.run(install, capture_output=True, text=True, timeout=900)
        if result.returncode:
            pytest.skip(f"{TRITON} cannot be installed: {result.stderr.strip().splitlines()[-1]}")
        found["PYTHONPATH"] = str(site)
    return found


def run(environment: dict[str, str], *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_same_bits_as_the_plain_twins_in_the_interpreter(environment: dict[str, str]) -> None:
    arguments = [
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "tests/parallel/expert/kernels/interpreted.py",
    ]
    summary = run({**environment, "TRITON_INTERPRET": "1"}, *arguments).splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) >= 50
    assert "skipped" not in summary and "failed" not in summary


def test_compiled_for_sm_90a_within_budget(environment: dict[str, str]) -> None:
    kernels = [
        json.loads(line) for line in run(environment, "-m", "tests.parallel.expert.kernels.compiled").splitlines()
    ]
    assert len(kernels) == 7
    for kernel in kernels:
        assert kernel["target"] == "sm_90a", kernel
        assert kernel["STACK"] == kernel["LOCAL"] == 0, kernel  # a spilled register would lie there
        assert kernel["REG"] <= MAX_REGISTERS, kernel
        assert kernel["v4"] >= 1, kernel  # accesses of 16 bytes
        assert kernel["fma"] == 0, kernel  # a product fused into a sum is not rounded as the twin's


def test_cpu_tensors_without_the_interpreter_are_refused(environment: dict[str, str]) -> None:
    code = (
        "import torch; from parallel.expert.kernels import rows\n"
        "try: rows.quantise(torch.zeros(1, 128), backend='triton')\n"
        "except rows.KernelError as error: print(error)"
    )
    assert "tensors are on cpu, its kernels run on cuda; use torch" in run(environment, "-c", code)
