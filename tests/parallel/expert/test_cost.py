"""The model of cost: its expectations against the real router's choices, its times against published ones."""

import subprocess
import sys
from dataclasses import replace
from math import ceil, comb
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import ModelConfig
from model.router import Router
from parallel.expert import cost
from parallel.expert.cost import WAYS, Links, SmCopy, Workload, num_sms, savings, seconds, traffic
from parallel.expert.placement import Placement, PlacementError
from parallel.expert.reach import Gate, expected_blocks

V3 = Gate(num_experts=256, top_k=8, n_group=8, topk_group=4)
EP64 = Workload(V3, num_ranks=64, ranks_per_node=8, num_tokens=4096, hidden=7168)
H800 = Links(ib_bytes_per_second=50e9, nvlink_bytes_per_second=160e9)  # nominal, one direction


def router_choice(gate: Gate, num_tokens: int, seed: int = 0) -> Tensor:
    """Expert ids [T, K] that the model's own router chooses for independent scores."""
    config = ModelConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=1, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        n_routed_experts=gate.num_experts, num_experts_per_tok=gate.top_k, n_group=gate.n_group,
        topk_group=gate.topk_group,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, gate.num_experts, generator=generator, dtype=torch.float64) * gate.logit_std
    return Router(config).choose(logits_TE.sigmoid())


def max_choice(gate: Gate, num_tokens: int, seed: int = 0) -> Tensor:
    """The same with groups ranked by their best expert."""
    generator = torch.Generator().manual_seed(seed)
    scores_TGE = torch.rand(num_tokens, gate.n_group, gate.group_size, generator=generator, dtype=torch.float64)
    groups = scores_TGE.amax(2).topk(gate.topk_group, dim=1).indices
    chosen = torch.zeros(num_tokens, gate.n_group, dtype=torch.bool).scatter_(1, groups, True)
    return scores_TGE.masked_fill(~chosen.unsqueeze(2), -1).flatten(1).topk(gate.top_k, dim=1).indices


def hit_blocks(ids_TK: Tensor, num_experts: int, num_blocks: int) -> Tensor:
    """[T, blocks]: whether each block holds any of the token's experts."""
    hit = torch.zeros(len(ids_TK), num_blocks, dtype=torch.bool)
    return hit.scatter_(1, ids_TK // (num_experts // num_blocks), True)


def assert_within_error(samples_T: Tensor, expected: float) -> None:
    """The mean of independent samples within 4.5 standard errors (and 1e-4 for the numerical integrals)."""
    samples_T = samples_T.double()
    error = samples_T.std() / len(samples_T) ** 0.5
    assert abs(samples_T.mean() - expected) <= 4.5 * error + 1e-4, (samples_T.mean(), expected, error)


GATES = [
    V3, replace(V3, logit_std=3.0), Gate(256, 8), Gate(64, 6, 8, 2), Gate(16, 4, 4, 2), Gate(32, 8, 4, 1),
    Gate(24, 5, 6, 5), Gate(8, 2, 4, 2), Gate(16, 8, 4, 2),
]  # fmt: skip


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_reach_of_the_real_router(gate: Gate) -> None:
    ids_TK = router_choice(gate, 60_000)
    for num_blocks in (b for b in (2, 4, 8, 16, 32, 64) if gate.num_experts % b == 0):
        block = gate.num_experts // num_blocks
        if gate.limited and gate.group_size % block and block % gate.group_size:
            continue
        assert_within_error(hit_blocks(ids_TK, gate.num_experts, num_blocks).sum(1), expected_blocks(gate, num_blocks))


@pytest.mark.parametrize("gate", [replace(gate, group_score="max") for gate in GATES], ids=str)
def test_reach_with_groups_by_their_best_expert(gate: Gate) -> None:
    ids_TK = max_choice(gate, 60_000)
    for num_blocks in (b for b in (2, 4, 8, 16, 32, 64) if gate.num_experts % b == 0):
        block = gate.num_experts // num_blocks
        if gate.limited and gate.group_size % block and block % gate.group_size:
            continue
        assert_within_error(hit_blocks(ids_TK, gate.num_experts, num_blocks).sum(1), expected_blocks(gate, num_blocks))


def test_the_error_bar_tells_the_shortcut_apart() -> None:
    # top_k experts uniformly from topk_group random groups: what the real gate does not do
    shortcut = 4 * (1 - comb(96, 8) / comb(128, 8))
    assert shortcut == pytest.approx(3.629, abs=1e-3)
    assert expected_blocks(V3, 8) == pytest.approx(3.968, abs=2e-3)
    with pytest.raises(AssertionError):
        assert_within_error(hit_blocks(router_choice(V3, 20_000), 256, 8).sum(1), shortcut)


@given(st.sampled_from(["top2", "max"]), st.integers(2, 6), st.integers(2, 5), st.data())
@settings(max_examples=40, deadline=None)
def test_single_experts_are_hit_top_k_times(score: str, groups: int, size: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, chosen * size))
    gate = Gate(groups * size, top_k, groups, chosen, group_score=score)
    assert expected_blocks(gate, gate.num_experts) == pytest.approx(top_k, rel=2e-3)
    assert expected_blocks(gate, 1) == pytest.approx(1)
    assert expected_blocks(gate, groups) <= min(chosen, top_k) * (1 + 2e-3)  # the integration's accuracy, as above


def test_best_expert_gate_in_closed_form() -> None:
    # The first groups to appear are the chosen ones, so a token is in min(topk_group, groups among any top_k) groups.
    gate = replace(V3, group_score="max")
    total = 0.0
    ways = comb(256, 8)
    for groups in range(1, 9):  # surjections by inclusion and exclusion
        exactly = comb(8, groups) * sum(
            (-1) ** (groups - j) * comb(groups, j) * comb(32 * j, 8) for j in range(groups + 1)
        )
        total += min(4, groups) * exactly / ways
    assert expected_blocks(gate, 8) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_rows_on_links_of_the_real_router(way: str) -> None:
    gate, placement = Gate(64, 6, 8, 3), Placement(64, 16, 4)
    workload = Workload(gate, 16, 4, num_tokens=1, hidden=128)
    ids_TK = router_choice(gate, 60_000)
    home = torch.randint(16, (len(ids_TK), 1), generator=torch.Generator().manual_seed(1))
    node, rank = home // 4, home
    ranks_TR = hit_blocks(ids_TK, 64, 16)
    nodes_TN = hit_blocks(ids_TK, 64, 4)
    every_rank, every_node = torch.arange(16), torch.arange(4)
    if way == "node":
        ib = (nodes_TN & (every_node != node)).sum(1)
        nvlink = (ranks_TR & (every_rank % 4 != rank % 4)).sum(1)  # a row enters a node at the sender's index
    elif way == "rank":
        ib = (ranks_TR & (every_rank // 4 != node)).sum(1)
        nvlink = (ranks_TR & (every_rank // 4 == node) & (every_rank != rank)).sum(1)
    else:
        to_TK = ids_TK // placement.experts_per_rank
        ib, nvlink = (to_TK // 4 != node).sum(1), ((to_TK // 4 == node) & (to_TK != rank)).sum(1)
    found = traffic(workload, way=way)
    assert_within_error(ib, found.ib_rows)
    assert_within_error(nvlink, found.nvlink_rows)


def published(ranks: int) -> Workload:
    """DeepEP V1's benchmark: groups are nodes, at most four of them, ranked by their best expert; FP32 scales."""
    nodes = ranks // 8
    limit = {"n_group": nodes, "topk_group": min(nodes, 4)} if nodes > 1 else {}
    gate = Gate(256, 8, group_score="max", **limit)
    return Workload(gate, ranks, 8, num_tokens=4096, hidden=7168, scale_bytes=4)


@pytest.mark.parametrize(
    ("ranks", "dispatch_gbs", "combine_gbs", "bound"),
    [(8, 153, 158, "nvlink"), (16, 43, 43, "nvlink"), (32, 58, 57, "ib"), (64, 51, 50, "ib")],
)
def test_published_table(ranks: int, dispatch_gbs: float, combine_gbs: float, bound: str) -> None:
    # The table's GB/s: bytes of all node copies (EP8: of all rank copies), a token's own among them, over the time.
    workload = published(ranks)
    t, time = traffic(workload), seconds(workload, H800)
    copies = t.nodes if ranks > 8 else t.ranks
    for row_bytes, predicted, measured in [
        (workload.dispatch_row_bytes, time.dispatch, dispatch_gbs),
        (workload.combine_row_bytes, time.combine, combine_gbs),
    ]:
        efficiency = measured * 1e9 / (copies * 4096 * row_bytes / predicted)
        assert 0.75 < efficiency < 0.91  # of the links' nominal rate, in all four geometries
    assert time.bound == bound
    if ranks > 8:  # as logical bytes the table exceeds the 50 GB/s of the link; on the link there is less
        assert t.ib_rows == pytest.approx(t.nodes * 4096 * (1 - 8 / ranks))


@pytest.mark.parametrize(("nodes", "published_sms"), [(2, 12), (4, 6)])
def test_published_sm_counts(nodes: int, published_sms: int) -> None:
    # DeepEP V2 on H100 (0.9 of 450 GB/s NVLink, 50 GB/s network), no group limit
    workload = Workload(Gate(256, 8), 8 * nodes, 8, num_tokens=8192, hidden=7168)
    links = Links(ib_bytes_per_second=50e9, nvlink_bytes_per_second=405e9)
    copy = SmCopy(read_bytes_per_second=200e9, write_bytes_per_second=50e9, receives=False)
    assert num_sms(workload, links, copy).dispatch == published_sms


def test_sms_grow_with_the_links_and_with_slower_copies() -> None:
    copy = SmCopy(read_bytes_per_second=200e9, write_bytes_per_second=50e9)
    base = num_sms(EP64, H800, copy)
    assert 4 <= base.dispatch <= 10 and base.dispatch % 2 == base.combine % 2 == 0
    fast = Links(ib_bytes_per_second=100e9, nvlink_bytes_per_second=320e9)
    assert num_sms(EP64, fast, copy).dispatch > base.dispatch
    slow = replace(copy, write_bytes_per_second=12.5e9)
    assert num_sms(EP64, H800, slow).dispatch >= 4 * (base.dispatch - 2)
    alone = Workload(Gate(256, 8), 1, 1, num_tokens=4096, hidden=7168)
    assert num_sms(alone, H800, copy) == cost.NumSms(0, 0)
    assert seconds(alone, H800).dispatch == 0


def test_row_bytes() -> None:
    assert EP64.dispatch_row_bytes == 7168 + 56
    assert replace(EP64, scale_bytes=4).dispatch_row_bytes == 7168 * (1 + 4 / 128)  # DeepEP's factor
    assert replace(EP64, dtype="bf16").dispatch_row_bytes == EP64.combine_row_bytes == 14336


def test_what_deduplication_saves() -> None:
    flat, rank, node = savings(EP64, H800)
    assert (flat.way, rank.way, node.way) == ("expert", "rank", "node")
    assert flat.speedup_over_flat == 1
    assert flat.ib_bytes > rank.ib_bytes > node.ib_bytes
    assert node.ib_bytes / flat.ib_bytes == pytest.approx(expected_blocks(V3, 8) / 8)
    assert node.speedup_over_flat == pytest.approx(8 / expected_blocks(V3, 8), rel=1e-6)  # InfiniBand bounds both
    total = {s.way: s.ib_bytes + s.nvlink_bytes for s in (flat, rank)}
    assert total["rank"] < total["expert"]


def test_the_node_limit_is_what_keeps_nvlink_and_infiniband_even() -> None:
    free = replace(EP64, gate=Gate(256, 8))
    assert traffic(free).nodes > 1.3 * traffic(EP64).nodes
    assert seconds(free, H800).dispatch > 1.3 * seconds(EP64, H800).dispatch


def test_latency_counts_once_and_times_scale() -> None:
    slow = Links(H800.ib_bytes_per_second / 2, H800.nvlink_bytes_per_second / 2, latency_seconds=1e-4)
    base, late = seconds(EP64, H800), seconds(EP64, slow)
    assert late.dispatch == pytest.approx(2 * base.dispatch + 1e-4)
    assert late.combine == pytest.approx(2 * base.combine + 1e-4)
    assert ceil(base.combine / base.dispatch) == 2


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Gate(256, 8, 7, 4), "n_group=7 does not divide num_experts=256"),
        (lambda: Gate(256, 8, 8, 9), "topk_group=9 must be from 1 to n_group=8"),
        (lambda: Gate(16, 5, 8, 2), "num_experts_per_tok=5 must be from 1 to 4"),
        (lambda: Gate(8, 2, 8, 4), "groups of one expert"),
        (lambda: Gate(256, 8, 8, 4, group_score="mean"), "group_score=mean: use top2 or max"),
        (lambda: expected_blocks(Gate(24, 2, 4, 2), 6), None),
        (lambda: expected_blocks(Gate(24, 2, 3, 2), 2), "blocks of 12 experts cut across groups of 8"),
        (lambda: replace(EP64, hidden=100), "hidden=100 is not a multiple of 128"),
        (lambda: replace(EP64, dtype="fp4"), "dtype=fp4: use fp8 or bf16"),
        (lambda: replace(EP64, num_ranks=48), "num_ranks=48 does not divide"),
        (lambda: traffic(EP64, way="pigeon"), "way=pigeon: use node, rank, expert"),
        (lambda: Links(0, 1), "bandwidths must be above 0"),
        (lambda: SmCopy(1, 1, margin=0.5), "margin at least 1"),
    ],
)
def test_bad_input(build: Any, words: str | None) -> None:
    if words is None:  # blocks of 4 in groups of 6: neither divides the other
        words = "blocks of 4 experts cut across groups of 6"
    with pytest.raises(PlacementError, match=words):
        build()


def test_no_torch_is_needed() -> None:
    modules = "parallel.expert.cost, parallel.expert.reach, parallel.expert.placement, parallel.expert.balance"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0
