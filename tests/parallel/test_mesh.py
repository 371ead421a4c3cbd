"""Ranks to positions and groups: arithmetic alone, and at the size of the published layout."""

from collections import Counter
from functools import cache

import pytest

from launcher.config import compose
from parallel.apply import Layout
from parallel.config import ParallelConfig
from parallel.mesh import Mesh
from parallel.pipeline.schedules import build
from parallel.pipeline.split import split_layers

PUBLISHED = ParallelConfig(pipeline=16, data=128, expert=64, schedule="dualpipe")


def everyone(config: ParallelConfig) -> list[Mesh]:
    return [Mesh(config, rank) for rank in range(config.world_size)]


@pytest.mark.parametrize("config", [PUBLISHED, ParallelConfig(3, 4, 2), ParallelConfig(1, 6, 3), ParallelConfig(5)])
def test_every_rank_has_a_position_of_its_own(config: ParallelConfig) -> None:
    positions = {(m.pipeline_rank, m.data_rank) for m in everyone(config)}
    assert positions == {(p, d) for p in range(config.pipeline) for d in range(config.data)}
    assert all(m.rank_at(m.pipeline_rank, m.data_rank) == m.rank for m in everyone(config))


def test_gradient_groups_have_the_published_sizes() -> None:
    """2 x DP = 256 ranks for a dense weight and 2 x DP / EP = 4 for an expert's, when every stage lives twice."""
    schedule = build("dualpipe", num_ranks=16, num_microbatches=120)
    for stage in range(16):
        for mesh in everyone(PUBLISHED):
            if mesh.pipeline_rank in schedule.holders(stage):
                assert len(mesh.gradient_ranks(schedule.holders(stage), expert=False)) == 256
                assert len(mesh.gradient_ranks(schedule.holders(stage), expert=True)) == 4


@pytest.mark.parametrize("expert", [False, True])
@pytest.mark.parametrize("config", [PUBLISHED, ParallelConfig(4, 6, 3, "dualpipe"), ParallelConfig(3, 4, 2)])
def test_every_rank_is_in_one_gradient_group_of_each_kind_for_each_of_its_stages(
    config: ParallelConfig, expert: bool
) -> None:
    schedule = build(config.schedule, num_ranks=config.pipeline, num_microbatches=120)
    for stage in range(config.pipeline):
        holders = schedule.holders(stage)
        members = [m for m in everyone(config) if m.pipeline_rank in holders]
        groups = {m.gradient_ranks(holders, expert=expert) for m in members}
        assert all(m.rank in m.gradient_ranks(holders, expert=expert) for m in members)
        assert Counter(rank for group in groups for rank in group) == Counter(m.rank for m in members)
        assert len(groups) == (config.expert if expert else 1)


def test_an_expert_gradient_group_holds_the_same_experts() -> None:
    schedule = build("dualpipe", num_ranks=16, num_microbatches=120)
    for mesh in everyone(PUBLISHED)[::37]:
        ranks = mesh.gradient_ranks(schedule.holders(mesh.pipeline_rank), expert=True)
        assert {Mesh(PUBLISHED, rank).expert_ids(256) for rank in ranks} == {mesh.expert_ids(256)}


def test_an_expert_group_is_a_run_of_neighbours_that_holds_all_experts_once() -> None:
    """64 ranks from a multiple of 64: 8 whole nodes of 8."""
    for start in range(0, 2048, 64):
        group = [Mesh(PUBLISHED, rank) for rank in range(start, start + 64)]
        assert [mesh.expert_rank for mesh in group] == list(range(64))
        assert len({mesh.pipeline_rank for mesh in group}) == 1
        assert [expert for mesh in group for expert in mesh.expert_ids(256)] == list(range(256))


@pytest.mark.parametrize("config", [PUBLISHED, ParallelConfig(3, 4, 2)])
def test_every_rank_is_in_one_pipeline(config: ParallelConfig) -> None:
    pipelines = {mesh.pipeline_ranks() for mesh in everyone(config)}
    assert all(mesh.pipeline_ranks()[mesh.pipeline_rank] == mesh.rank for mesh in everyone(config))
    assert sorted(rank for ranks in pipelines for rank in ranks) == list(range(config.world_size))


@cache
def layout(schedule: str, *, has_mtp: bool) -> Layout:
    config = compose(["model=671b"]).model
    return Layout(build(schedule, num_ranks=16, num_microbatches=120), split_layers(config, 16), has_mtp)


@pytest.mark.parametrize(
    ("schedule", "name", "holders"),
    [
        ("dualpipe", "embed_tokens.weight", (0, 15)), ("dualpipe", "lm_head.weight", (0, 15)),
        ("dualpipe", "mtp.0.eh_proj.weight", (0, 15)), ("dualpipe", "norm.weight", (0, 15)),
        ("dualpipe", "layers.0.mlp.down_proj.weight", (0, 15)), ("dualpipe", "layers.4.mlp.gate.proj.weight", (1, 14)),
        ("dualpipe", "layers.60.input_layernorm.weight", (0, 15)),
        ("dualpipe", "layers.30.input_layernorm.weight", (7, 8)),
        ("1f1b", "embed_tokens.weight", (0, 15)), ("1f1b", "lm_head.weight", (15,)),
        ("1f1b", "layers.0.mlp.down_proj.weight", (0,)), ("1f1b", "mtp.0.norm.weight", (15,)),
    ],
)  # fmt: skip
def test_a_weight_is_on_the_ranks_that_use_it(schedule: str, name: str, holders: tuple[int, ...]) -> None:
    assert layout(schedule, has_mtp=True).holders(name) == holders


def test_without_mtp_the_embedding_is_at_the_front_only() -> None:
    assert layout("1f1b", has_mtp=False).holders("embed_tokens.weight") == (0,)


def test_holder_sets_are_those_of_all_weights() -> None:
    assert layout("dualpipe", has_mtp=True).holder_sets() == {(p, 15 - p) for p in range(8)}
    assert layout("1f1b", has_mtp=True).holder_sets() == {(0, 15), *((p,) for p in range(16))}
