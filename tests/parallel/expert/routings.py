"""Routings for the tests of expert back ends: how many tokens a rank has and which experts they choose."""

from dataclasses import dataclass

import torch
from torch import Tensor

EXPERTS = 16


@dataclass(frozen=True)
class Routing:
    """x and grad [T, D], ids and weights [T, K] of one rank; dtype of x."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Case:
    """tokens: of rank 0, 1, ..., repeated. how: random | first | last | one | unused | none."""

    tokens: tuple[int, ...]
    how: str = "random"
    hidden: int = 24
    top_k: int = 4
    dtype: torch.dtype = torch.float32
    seed: int = 0
    grad_scale: float = 1.0


FIXED = {
    "uneven": Case((7, 4, 9)),
    "none_on_some": Case((6, 0)),
    "one_each": Case((1,)),
    "none_at_all": Case((0,)),
    "all_to_the_first_rank": Case((5, 3), "first"),
    "all_to_one_expert": Case((5, 3), "one"),
    "all_to_the_last_expert": Case((9, 3), "last"),
    "unused_slots": Case((6, 5), "unused"),
    "only_unused_slots": Case((3, 2), "none"),
    "bf16": Case((11, 8, 1, 5), dtype=torch.bfloat16),
    "bf16_unused_ragged": Case((11, 0, 7), "unused", hidden=131, dtype=torch.bfloat16),
    "top_1": Case((8, 5), top_k=1),
}


def random_case(seed: int) -> Case:
    """Any of everything."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda values: values[int(torch.randint(len(values), (1,), generator=g))]  # noqa: E731
    tokens = tuple(pick((0, 1, 2, 3, 5, 8, 17)) for _ in range(pick((1, 2, 3, 5))))
    how = pick(("random", "random", "random", "unused", "unused", "first", "one", "skewed", "few_groups"))
    dtype = pick((torch.float32, torch.bfloat16))
    return Case(tokens, how, hidden=pick((1, 8, 31, 128, 129)), top_k=pick((1, 2, 3, 8)), dtype=dtype, seed=seed)


def routing(case: Case, rank: int) -> Routing:
    """What `rank` sends."""
    g = torch.Generator().manual_seed(1000 * case.seed + rank)
    num_tokens, k = case.tokens[rank % len(case.tokens)], case.top_k
    scores = torch.rand(num_tokens, EXPERTS, generator=g)
    if case.how == "first":
        scores[:, :k] += 1
    if case.how == "one":
        scores[:, EXPERTS // 2] += 1
        scores[:, EXPERTS // 2 + 1 :] -= 1
    if case.how == "skewed":
        scores += torch.arange(EXPERTS) / EXPERTS
    if case.how == "few_groups":  # at most two of four groups of experts
        groups = torch.rand(num_tokens, 4, generator=g).argsort(1)[:, :2]
        scores += torch.zeros(num_tokens, 4).scatter_(1, groups, 1.0).repeat_interleave(EXPERTS // 4, 1)
    ids = scores.argsort(1, descending=True)[:, :k]
    if case.how == "one":
        ids = torch.where(ids == EXPERTS // 2, ids, -1)
    if case.how == "last":
        ids = torch.full((num_tokens, k), -1)
        ids[:, -1] = EXPERTS - 1
    if case.how == "unused":
        ids = torch.where(torch.rand(ids.shape, generator=g) < 0.4, -1, ids)
    if case.how == "none":
        ids = torch.full_like(ids, -1)
    x, grad = (torch.randn(num_tokens, case.hidden, generator=g).to(case.dtype) for _ in range(2))
    return Routing(x, ids, torch.rand(ids.shape, generator=g), grad * case.grad_scale)


def expert(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Some function of a row, its weight and its expert, element by element, in the type of the rows."""
    return torch.tanh(rows * (ids.unsqueeze(-1) + 1)) * weights.unsqueeze(-1).to(rows.dtype)


def nodes_reached(ids: Tensor, parts: int) -> Tensor:
    """Which of `parts` equal parts of the experts each token reaches, by a plain loop: bool [T, parts]."""
    reached = torch.zeros(len(ids), parts, dtype=torch.bool)
    for token, row in enumerate(ids.tolist()):
        for expert_id in row:
            if expert_id >= 0:
                reached[token, expert_id * parts // EXPERTS] = True
    return reached
