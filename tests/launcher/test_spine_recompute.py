"""The level `report` of recomputation on several processes equals one process, under every overlap; in FP8 too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.block import Block
from model.dropping import Dropped
from tests.distributed import run_distributed
from tests.launcher.spine import STEPS, config, parallel_trace, write_tokens
from tests.launcher.test_spine import run_case
from tests.launcher.test_spine_fp8 import in_fp8


@pytest.mark.parametrize(
    ("schedule", "overlap"),
    [
        pytest.param("1f1b", "off", marks=pytest.mark.slow),
        pytest.param("dualpipe", "pairs", marks=pytest.mark.slow),
        ("dualpipe", "all"),
    ],
)
def test_equals_one_process(tmp_path: Path, schedule: str, overlap: str) -> None:
    run_case(tmp_path, (2, 2, 2), schedule, (2, 4), overlap=overlap, recompute="report")


@pytest.mark.slow
def test_zero_bubble_equals_one_process(tmp_path: Path) -> None:
    run_case(tmp_path, (2, 2, 2), "zb1p", (2, 4), overlap="all", recompute="report")


def forget_the_second_norm(run: Any) -> None:
    """What the experts' router and the shared expert read is computed again from the wrong residual."""
    plain = Block._normed

    def wrong(block: Block, norm: Any, h_BSD: torch.Tensor) -> Any:
        out, again = plain(block, norm, h_BSD)
        if again is not None and norm is block.post_attention_layernorm:
            kept = h_BSD.detach()
            again = Dropped(lambda: (norm(1.01 * kept + 0.01),)).part(0)
        return out, again

    Block._normed = wrong  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_wrong_residual_is_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="gradient of"):
        run_case(
            tmp_path, (2, 2, 2), "dualpipe", (2, 4), forget_the_second_norm, overlap="pairs", recompute="report"
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["pairs", "all"])
def test_in_fp8_it_changes_no_bit(tmp_path: Path, overlap: str) -> None:
    """Two runs of four processes with experts spread, cached in FP8, rows sent in FP8: with and without."""
    prefix = write_tokens(str(tmp_path / "tokens"))
    keys: dict[str, Any] = {"pipeline": 2, "expert": 2, "data": 2, "schedule": "dualpipe", "overlap": overlap}
    found = []
    for level in ("none", "report"):
        run = in_fp8(config(prefix, recompute=level, layers=(2, 4), microbatches=4, **keys))
        wires = replace(run.parallel, dispatch_wire="fp8", dispatch_grad_wire="fp8", combine_wire="bf16")
        found.append(run_distributed(4, parallel_trace, replace(run, parallel=wires)))
    for rank, other in zip(*found, strict=True):
        for step in range(STEPS):
            assert rank[step]["result"].loss == other[step]["result"].loss
            for kind in ("grad", "weight"):
                for key, value in rank[step][kind].items():
                    assert torch.equal(value, other[step][kind][key]), (step, kind, key)
