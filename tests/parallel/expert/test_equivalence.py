"""Every back end against `flat`: the same rows bit by bit, sums to their rounding, forward and backward.

`flat` itself equals one process (test_flat). All comparisons happen inside the ranks; many routings share one start.
"""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.dispatch import TokenDispatcher, combine_rows, dispatch_tokens
from model.fp8.quantise import Quantiser
from parallel.config import ParallelConfig
from parallel.expert.collective import Wires
from parallel.expert.dispatchers import Tokens, build_dispatcher
from parallel.expert.flat import FlatDispatcher
from parallel.expert.wire import GRADIENT_QUANTISER, QUANTISER, decode, encode
from tests.distributed import run_distributed
from tests.parallel.expert.routings import EXPERTS, FIXED, Case, Routing, expert, nodes_reached, random_case, routing

BF16_ROUNDING = 2.0**-8  # half the spacing of numbers with 8 significant bits, over the number
FP32_SUM = 2e-6  # of a dozen terms, relative to the sum of their absolute values
TIMEOUT = timedelta(seconds=100)


def run(dispatcher: TokenDispatcher, given: Routing, first_expert: int) -> dict[str, Any]:
    """Forward and backward through one layer of experts."""
    x, weights = given.x.clone().requires_grad_(), given.weights.clone().requires_grad_()
    sent = dispatch_tokens(dispatcher, x, given.ids, weights)
    owners = torch.arange(len(sent.counts)).repeat_interleave(torch.tensor(sent.counts)) + first_expert
    results = expert(sent.rows_RD, sent.weights_R, owners)
    results.retain_grad()
    out = combine_rows(dispatcher, results, sent.handle)
    out.backward(given.grad)
    return {
        "rows": sent.rows_RD.detach(), "weights": sent.weights_R.detach(), "counts": sent.counts,
        "grad_results": results.grad, "grad_weights": weights.grad, "out": out.detach(), "grad_x": x.grad,
    }  # fmt: skip


def grad_of_copies(given: Routing) -> Tensor:
    """What each expert gives back for its copy of a token: [T, K, D], zero where a slot is unused."""
    k = given.ids.shape[1]
    x = given.x[:, None].expand(-1, k, -1).clone().requires_grad_()
    expert(x, given.weights, given.ids).backward(given.grad[:, None].expand(-1, k, -1))
    assert x.grad is not None
    return x.grad * (given.ids >= 0)[..., None]


def bound(copies_TKD: Tensor, ids: Tensor, *, nodes: int, ranks: int, wire: str) -> tuple[Tensor, Tensor]:
    """The exact sum of a token's copies [T, D] and how far from it rounding may take the result."""
    copies = copies_TKD.double() * (ids >= 0)[..., None]
    exact, size = copies.sum(1), copies.abs().sum(1)
    error = FP32_SUM * size
    if copies_TKD.dtype == torch.bfloat16:
        error = error + BF16_ROUNDING * exact.abs()
    if wire == "bf16" or (
        copies_TKD.dtype == torch.bfloat16 and wire == "model"
    ):  # each partial sum is rounded where it travels
        for parts in (nodes, ranks):
            part_TK = torch.where(ids >= 0, ids * parts // EXPERTS, -1)
            for part in range(parts):
                partial = (copies * (part_TK == part)[..., None]).sum(1)
                error = error + 1.02 * BF16_ROUNDING * partial.abs()
    return exact, error


@dataclass(frozen=True)
class Plan:
    """A node shape, forms on the wire, and what to send; backend: as the configuration names it."""

    ranks_per_node: int
    wires: Wires
    cases: tuple[Case, ...]
    backend: str = "collective"


def through(x: Tensor, wire: str, quantiser: Quantiser = QUANTISER) -> Tensor:
    """What the wire makes of a row."""
    return decode(encode(x, wire, quantiser), wire, x.dtype)


def compare(dispatcher: Any, flat: Any, case: Case, *, nodes: int, wires: Wires) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    given, first = routing(case, rank), rank * EXPERTS // size
    rounded = replace(
        given, x=through(given.x, wires.dispatch), grad=through(given.grad, wires.gradient, GRADIENT_QUANTISER)
    )
    got, expected = run(dispatcher, given, first), run(flat, rounded, first)
    assert got["counts"] == expected["counts"], (case, got["counts"], expected["counts"])
    for key in ("rows", "weights", "grad_results", "grad_weights"):
        assert got[key].dtype == expected[key].dtype
        assert torch.equal(got[key], expected[key]), (case, key)
    copies = expert(rounded.x[:, None], given.weights, given.ids).detach()
    for key, terms in (("out", copies), ("grad_x", grad_of_copies(rounded))):
        exact, error = bound(terms, given.ids, nodes=nodes, ranks=size, wire=wires.combine)
        assert got[key].dtype == case.dtype
        assert ((got[key].double() - exact).abs() <= error).all(), (case, key)
    again = run(dispatcher, given, first)
    assert all(torch.equal(again[key], got[key]) for key in ("rows", "out", "grad_x")), (case, "not deterministic")


def minimum(cases: tuple[Case, ...], *, rank: int, size: int, nodes: int) -> int:
    """Tokens that a rank must send to other nodes: one for every node that a token reaches."""
    mine = rank * nodes // size
    reached = [nodes_reached(routing(case, rank).ids, nodes) for case in cases]
    return sum(int(marks.sum() - marks[:, mine].sum()) for marks in reached)


def build(plan: Plan, case: Case, world: Any) -> TokenDispatcher:
    config = ParallelConfig(
        dispatcher=plan.backend, ranks_per_node=plan.ranks_per_node, dispatch_wire=plan.wires.dispatch,
        dispatch_grad_wire=plan.wires.gradient, combine_wire=plan.wires.combine,
    )  # fmt: skip
    return build_dispatcher(config, world, Tokens(EXPERTS, case.top_k, case.hidden), timeout=TIMEOUT)


def one_rank(plans: list[Plan]) -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    world = dist.group.WORLD
    assert world is not None
    rank, size = dist.get_rank(), dist.get_world_size()
    flat = FlatDispatcher(world, EXPERTS)
    for plan in plans:
        nodes = size // plan.ranks_per_node
        tested: Any = None
        for case in plan.cases:
            if tested is None or plan.backend != "collective":  # the others are made for one hidden size and top-k
                tested = build(plan, case, world)
            compare(tested, flat, case, nodes=nodes, wires=plan.wires)
        if plan.backend != "collective":
            continue
        least = minimum(plan.cases, rank=rank, size=size, nodes=nodes)
        # Each case runs twice, forward and backward: two dispatches and two combines a run.
        assert tested.traffic.dispatch_rail.tokens == 4 * least
        sums = torch.tensor([tested.traffic.combine_rail.tokens, 4 * least])
        dist.all_reduce(sums)
        assert sums[0] == sums[1]  # what came back is what had gone out
    dist.barrier()
    dist.destroy_process_group()


FIXED_CASES = tuple(FIXED.values())
BF16_CASES = (
    *(case for case in FIXED_CASES if case.dtype == torch.bfloat16),
    Case((33, 20), dtype=torch.bfloat16, top_k=8, hidden=300),
    Case((33, 20), "few_groups", dtype=torch.bfloat16, top_k=8),
    Case((9, 14), dtype=torch.bfloat16, grad_scale=1e-8),  # far below the amax floor of activations
)


def test_two_processes() -> None:
    run_distributed(2, one_rank, [Plan(1, Wires(), FIXED_CASES), Plan(2, Wires("fp8", "fp8"), FIXED_CASES)])


def test_four_processes_every_node_shape_and_wire() -> None:
    shapes = [Plan(per_node, Wires(), FIXED_CASES) for per_node in (1, 2, 4)]
    chosen = [Wires("fp8", "fp8"), Wires("fp8", "bf16", "bf16"), Wires("bf16", "fp8", "fp32")]
    wires = [Plan(2, wire, (*BF16_CASES, FIXED["uneven"])) for wire in chosen]
    run_distributed(4, one_rank, [*shapes, *wires])


def test_200_random_routings() -> None:
    run_distributed(4, one_rank, [Plan(2, Wires(), tuple(random_case(seed) for seed in range(200)))])


@pytest.mark.parametrize("size", [2, 4])
def test_native_host(size: int) -> None:
    plans = [Plan(n, Wires(), FIXED_CASES, "native_host") for n in (1, 2) if size // n > 1 or n > 1]
    run_distributed(size, one_rank, [*plans, Plan(1, Wires("fp8", "fp8"), BF16_CASES, "native_host")])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "per_node"), [(8, [1, 2, 4, 8]), (16, [2, 4, 8])])
def test_many_processes(size: int, per_node: list[int]) -> None:
    cases = (*FIXED_CASES, *map(random_case, range(30)))
    plans = [Plan(ranks, Wires(), cases) for ranks in per_node]
    run_distributed(size, one_rank, [*plans, Plan(per_node[1], Wires("fp8", "fp8"), BF16_CASES)])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "per_node"), [(8, 2), (8, 4), (16, 4)])
def test_native_host_in_many_processes(size: int, per_node: int) -> None:
    plain = Plan(per_node, Wires(), FIXED_CASES, "native_host")
    run_distributed(size, one_rank, [plain, Plan(per_node, Wires("fp8", "fp8"), BF16_CASES, "native_host")])
