"""What the construction order owes to back ends that read the environment when they are imported."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher import build
from model.backends import FP32_SCALES
from model.fp8.config import FP8Config


@pytest.mark.parametrize(
    ("backend", "scales", "expected"),
    [("transformer_engine", "pow2", "0"), ("transformer_engine", "fp32", "1"), ("oracle_fast", "fp32", "unset")],
)
def test_transformer_engine_is_told_the_scales_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, backend: str, scales: str, expected: str
) -> None:
    seen: list[str] = []

    def apply(stage: Any, config: FP8Config, *, device: torch.device) -> None:
        seen.append(os.environ[FP32_SCALES])

    monkeypatch.setenv(FP32_SCALES, "unset")  # put back afterwards
    monkeypatch.setattr(build, "apply_fp8", apply)
    stages: Any = SimpleNamespace(stages={0: None, 1: None})
    build._use_fp8(FP8Config(backend=backend, scales=scales), stages, torch.device("cpu"))
    assert seen == [expected] * 2
