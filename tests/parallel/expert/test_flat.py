"""The flat all-to-all equals the dispatcher of one process on the tokens of all ranks: rows, order, sums, gradients."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.dispatch import LocalDispatcher, combine_rows, dispatch_tokens
from parallel.expert.flat import FlatDispatcher
from tests.distributed import run_distributed

WIDTH, EXPERTS, TOP_K = 5, 8, 3
# Tokens of rank 0, 1, ... (repeated where there are more ranks), and how they choose.
CASES = {
    "uneven": ((7, 4), "random"),
    "none_on_one": ((6, 0), "random"),
    "one_each": ((1, 1), "random"),
    "none_at_all": ((0, 0), "random"),
    "all_to_the_first": ((5, 3), "first"),
    "all_to_the_last": ((5, 3), "last"),
    "unused_slots": ((6, 5), "unused"),
}


def inputs(case: str, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [T, D], ids [T, K], weights [T, K] and the gradient of the output, of one rank."""
    counts, how = CASES[case]
    num_tokens = counts[rank % len(counts)]
    generator = torch.Generator().manual_seed(100 * rank + len(case))
    x = torch.randn(num_tokens, WIDTH, generator=generator)
    ids = torch.rand(num_tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    if how == "unused":
        ids[torch.rand(ids.shape, generator=generator) < 0.4] = -1
        ids[0] = -1
    elif how != "random":  # the same experts for every token, hence rows on one rank only (of four)
        ids = torch.arange(TOP_K).expand(num_tokens, -1) if how == "first" else EXPERTS - 1 - ids * 0
    if how == "last":
        ids = ids[:, :1]
    weights = torch.rand(ids.shape, generator=generator)
    return x, ids, weights, torch.randn(num_tokens, WIDTH, generator=generator)


def expert(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Some function of a row, its weight and its expert."""
    return torch.tanh(rows * (ids[:, None] + 1)) * weights[:, None]


def one_rank() -> dict[int, dict[str, Any]]:
    """Results of four ranks in one group, and in two groups of two; by size of the group."""
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", timeout=timeout)
    pairs = [dist.new_group([first, first + 1], timeout=timeout) for first in (0, 2)]
    results = {4: in_group(dist.group.WORLD), 2: in_group(pairs[dist.get_rank() // 2])}
    dist.destroy_process_group()
    return results


def in_group(group: Any) -> dict[str, Any]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    dispatcher, local = FlatDispatcher(group, EXPERTS), EXPERTS // size
    results = {}
    for case in CASES:
        x, ids, weights, grad = inputs(case, rank)
        x.requires_grad_()
        weights.requires_grad_()
        sent = dispatch_tokens(dispatcher, x, ids, weights)
        owners = torch.arange(rank * local, (rank + 1) * local).repeat_interleave(torch.tensor(sent.counts))
        out = combine_rows(dispatcher, expert(sent.rows_RD, sent.weights_R, owners), sent.handle)
        out.backward(grad)
        results[case] = {
            "rows": sent.rows_RD.detach(), "weights": sent.weights_R.detach(), "counts": sent.counts,
            "out": out.detach(), "grad_x": x.grad, "grad_weights": weights.grad,
        }  # fmt: skip
    return results


def one_process(case: str, num_ranks: int) -> dict[str, Any]:
    """The same with all tokens in one place."""
    parts = [inputs(case, rank) for rank in range(num_ranks)]
    x, ids, weights, grad = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    x.requires_grad_()
    weights.requires_grad_()
    dispatcher = LocalDispatcher(EXPERTS)
    sent = dispatch_tokens(dispatcher, x, ids, weights)
    owners = torch.arange(EXPERTS).repeat_interleave(torch.tensor(sent.counts))
    out = combine_rows(dispatcher, expert(sent.rows_RD, sent.weights_R, owners), sent.handle)
    out.backward(grad)
    return {
        "rows": sent.rows_RD.detach(), "weights": sent.weights_R.detach(), "counts": sent.counts,
        "out": out.detach(), "grad_x": x.grad, "grad_weights": weights.grad,
    }  # fmt: skip


@pytest.fixture(scope="module")
def results() -> list[dict[int, Any]]:
    return run_distributed(4, one_rank)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_flat_equals_one_process_bitwise(results: Any, size: int, case: str) -> None:
    """All ranks' rows one after the other are the rows of one process: by expert, then source rank, then token."""
    expected = one_process(case, size)
    for first in range(0, 4, size):
        ranks = [result[size][case] for result in results[first : first + size]]
        assert tuple(count for rank in ranks for count in rank["counts"]) == expected["counts"]
        for key in ("rows", "weights", "out", "grad_x", "grad_weights"):
            assert torch.equal(torch.cat([rank[key] for rank in ranks]), expected[key]), key
    assert sum(expected["counts"]) == sum(int((inputs(case, rank)[1] >= 0).sum()) for rank in range(size))


def test_the_cases_are_what_they_say(results: Any) -> None:
    """Ranks without rows, without tokens, and with everything are among them."""
    received = {case: [sum(result[4][case]["counts"]) for result in results] for case in CASES}
    assert received["none_at_all"] == [0] * 4
    assert received["all_to_the_last"] == [0, 0, 0, 16]
    assert received["all_to_the_first"][2:] == [0, 0] and received["all_to_the_first"][0] == 32
    assert all(received["uneven"])
