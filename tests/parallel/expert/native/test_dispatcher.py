"""native_host against plain loops: what arrives and what comes back, bitwise, at every geometry and odd size."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel.expert.native.dispatcher import NativeConfig
from tests.parallel.expert.native.reference import Routing, minimum, routing, run_ranks

SMALL, FP8 = NativeConfig(timeout_seconds=60), NativeConfig(timeout_seconds=60, dispatch_wire="fp8", seed=2)
# (nodes, ranks of a node)
GEOMETRIES = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 2), (2, 4)]


def routings(ranks: int, *, tokens: tuple[int, ...] = (33, 20), hidden: int = 64, **options) -> list[Routing]:
    options = {"experts": 2 * ranks, "top_k": min(4, 2 * ranks), "dtype": torch.bfloat16} | options
    return [routing(r, tokens=tokens[r % len(tokens)], hidden=hidden, **options) for r in range(ranks)]


def check_minimum(counters: dict[str, int], all_routings: list[Routing], *, nodes: int, experts: int) -> None:
    places = {"ranks": len(all_routings), "nodes": nodes, "experts": experts}
    least = sum(minimum(own, me=rank, **places) for rank, own in enumerate(all_routings))
    assert counters["dispatch_rail_tokens"] == 2 * least  # and once more along the cached routing
    assert counters["combine_rail_tokens"] == least


@pytest.mark.parametrize(("nodes", "local"), GEOMETRIES)
@pytest.mark.parametrize("seed", [0, 5])
def test_equals_the_definition(nodes: int, local: int, seed: int) -> None:
    ranks = nodes * local
    sent = routings(ranks)
    config = NativeConfig(timeout_seconds=60, seed=seed)
    check_minimum(run_ranks(sent, nodes=nodes, experts=2 * ranks, config=config), sent, nodes=nodes, experts=2 * ranks)


@pytest.mark.parametrize("how", ["random", "unused", "first", "last"])
@pytest.mark.parametrize("tokens", [(0, 0), (1, 0), (1, 1), (13, 0, 2, 7)])
@pytest.mark.parametrize("config", [SMALL, FP8], ids=["bf16", "fp8"])
def test_odd_sizes(how: str, tokens: tuple[int, ...], config: NativeConfig) -> None:
    sent = routings(4, tokens=tokens, how=how)
    check_minimum(run_ranks(sent, nodes=2, experts=8, config=config), sent, nodes=2, experts=8)


@pytest.mark.parametrize("config", [
    NativeConfig(ring=1, chunk=1, channels=1, timeout_seconds=60),
    NativeConfig(ring=1, chunk=4, channels=3, timeout_seconds=60, seed=3),
    NativeConfig(ring=2, chunk=1, channels=7, timeout_seconds=60, seed=4),
    NativeConfig(ring=5, chunk=9, channels=2, timeout_seconds=60, combine_wire="fp32"),
], ids=lambda c: f"ring{c.ring}-chunk{c.chunk}-channels{c.channels}-{c.combine_wire}")  # fmt: skip
def test_rings_channels_and_wires(config: NativeConfig) -> None:
    run_ranks(routings(6, tokens=(31, 17)), nodes=3, experts=12, config=config)


@pytest.mark.parametrize("hidden", [8, 5, 136])
def test_fp32_rows_of_any_width(hidden: int) -> None:
    run_ranks(routings(4, hidden=hidden, dtype=torch.float32), nodes=2, experts=8, config=SMALL)


def test_several_copies_on_one_rank() -> None:
    """All experts of a token on few ranks: rows of one GPU are summed before they travel."""
    run_ranks(routings(4, experts=32, top_k=12), nodes=2, experts=32, config=SMALL)


@pytest.mark.parametrize("wire", ["bf16", "fp32"])
def test_order_of_sums(wire: str) -> None:
    """Three and more terms at each level, FP32, where the order shows in the last bits."""
    sent = routings(9, experts=36, top_k=20, dtype=torch.float32)
    run_ranks(sent, nodes=3, experts=36, config=NativeConfig(timeout_seconds=60, combine_wire=wire))


@pytest.mark.parametrize("wire", ["same", "fp8"])
def test_64_ranks_on_8_nodes(wire: str) -> None:
    sent = routings(64, tokens=(9, 4, 0, 1), hidden=32, experts=128, top_k=8)
    config = NativeConfig(timeout_seconds=120, seed=1, dispatch_wire=wire)
    check_minimum(run_ranks(sent, nodes=8, experts=128, config=config), sent, nodes=8, experts=128)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_random_routings(data: st.DataObject) -> None:
    check_random(data)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_200_random_routings(data: st.DataObject) -> None:
    check_random(data)


def check_random(data: st.DataObject) -> None:
    nodes, local = data.draw(st.sampled_from(GEOMETRIES))
    per_rank, top_k = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    ranks, experts = nodes * local, nodes * local * per_rank
    ids = st.integers(-1, experts - 1)
    sent = []
    for rank in range(ranks):
        chosen = data.draw(st.lists(st.lists(ids, min_size=top_k, max_size=top_k), max_size=5))
        ids_TK = torch.tensor(chosen, dtype=torch.int64).view(-1, top_k)
        generator = torch.Generator().manual_seed(rank)
        x_TD = torch.randn(len(ids_TK), 8, generator=generator).bfloat16()
        sent.append(Routing(x_TD, ids_TK, torch.rand(ids_TK.shape, generator=generator)))
    ring, chunk, channels, seed = data.draw(st.tuples(*[st.integers(1, 4)] * 4))
    wire = data.draw(st.sampled_from(["same", "fp8"]))
    limits = {"ring": ring, "chunk": chunk, "channels": channels, "timeout_seconds": 60.0}
    config = NativeConfig(**limits, seed=seed - 1, dispatch_wire=wire)  # type: ignore[arg-type]
    check_minimum(run_ranks(sent, nodes=nodes, experts=experts, config=config), sent, nodes=nodes, experts=experts)
