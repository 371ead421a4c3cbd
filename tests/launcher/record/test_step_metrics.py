"""Metrics of a step on several ranks: equal to one process's, every parameter once, dropped tokens counted."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.record.norms import GROUPS, group_of
from model.counts import parameter_shapes
from tests.distributed import run_distributed
from tests.launcher.spine import MODEL, STEPS, config, parallel_trace, plain_trace, write_tokens


def by_group(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """In its own words: one long vector of each group."""
    return {
        group: torch.cat([t.flatten().double() for name, t in tensors.items() if group_of(name) == group]).norm().item()
        for group in GROUPS
    }


def drop_a_copy(run: Any) -> None:
    """One expert's copy of one token is never sent, in every transfer of rank 1."""
    from model.block import MoE

    if run.process.rank != 1:
        return
    modules = (m for stage in run.model.stages.values() for m in stage.modules())
    timed: Any = next(m for m in modules if isinstance(m, MoE)).dispatcher
    plain = timed.inner.dispatch

    def dispatch(x_TD: Any, ids_TK: Any = None, weights_TK: Any = None, *, handle: Any = None) -> Any:
        if ids_TK is not None:
            ids_TK = ids_TK.clone()
            ids_TK[0, 0] = -1
        return plain(x_TD, ids_TK, weights_TK, handle=handle)

    timed.inner.dispatch = dispatch


def test_norms_by_group_equal_one_process(tmp_path: Path) -> None:
    run_config = config(
        write_tokens(str(tmp_path / "tokens")), pipeline=2, expert=2, data=2, schedule="dualpipe", layers=(2, 4)
    )
    plain = plain_trace(run_config)
    ranks = run_distributed(4, parallel_trace, run_config)
    for step in range(STEPS):
        for rank in ranks:
            result = rank[step]["result"]
            assert result.norms == ranks[0][step]["result"].norms  # all ranks know the same
            assert result.dropped == 0 and result.dead == {}
        norms = ranks[0][step]["result"].norms
        assert norms["grad"] == pytest.approx(by_group(plain.grads[step]), rel=1e-5)
        assert math.hypot(*norms["grad"].values()) == pytest.approx(ranks[0][step]["result"].grad_norm, rel=1e-6)
        if step:  # before the update: what the step before left
            assert norms["weight"] == pytest.approx(by_group(plain.weights[step - 1]), rel=1e-5)
        spans = {block: float(bias.max() - bias.min()) for block, bias in plain.biases[step].items()}
        assert ranks[0][step]["result"].bias_ranges == pytest.approx(spans)
        loads = {block: float(c.max() / c.double().mean()) for block, c in plain.counts[step].items()}
        assert ranks[0][step]["result"].expert_load == pytest.approx(loads)


def test_a_dropped_copy_is_counted(tmp_path: Path) -> None:
    run_config = config(
        write_tokens(str(tmp_path / "tokens")), pipeline=2, expert=1, data=1, schedule="1f1b", layers=(3, 3)
    )
    ranks = run_distributed(2, parallel_trace, run_config, drop_a_copy)
    # rank 1 holds the last 3 of 6 layers and the MTP module: 4 MoE layers, 8 micro-batches
    assert [rank[step]["result"].dropped for rank in ranks for step in range(STEPS)] == 2 * STEPS * [4 * 8]


def test_every_parameter_has_a_group() -> None:
    names = [name for name, _ in parameter_shapes(MODEL)]
    assert {group_of(name) for name in names} == set(GROUPS)
    for name, group in (
        ("embed_tokens.weight", "embedding"), ("norm.weight", "norms"), ("lm_head.weight", "head"),
        ("layers.0.mlp.down_proj.weight", "dense_mlp"), ("layers.1.mlp.gate.proj.weight", "router"),
        ("layers.1.mlp.shared_experts.gate_up_proj.weight", "shared_experts"),
        ("layers.1.mlp.experts.gate_up_proj.weight", "routed_experts"),
        ("layers.1.self_attn.kv_a_layernorm.weight", "norms"), ("layers.1.self_attn.o_proj.weight", "attention"),
        ("mtp.0.block.input_layernorm.weight", "mtp"),
    ):  # fmt: skip
        assert group_of(name) == group
    with pytest.raises(ValueError, match="no known group"):
        group_of("layers.1.adapter.weight")
