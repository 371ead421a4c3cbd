"""How many ranks and nodes a token reaches when the gate is balanced: expectations, without drawing a token.

Experts are split into equal blocks of neighbours (a rank's, a node's). By symmetry the expected number of blocks that
a token's `top_k` experts lie in is the number of blocks times the chance that one of them is hit. Scores are taken to
be independent and alike for all experts, as they are for a balanced router. Three gates:

- without a group limit any `top_k` experts are as likely: a ratio of binomial coefficients;
- groups chosen by their best expert: going down the scores, the first `topk_group` groups to appear are the chosen
  ones, so a small Markov chain over (experts taken, groups seen) is exact;
- groups chosen by the sum of their two best experts (the published gate): the chance depends, a little, on the
  distribution of the scores, and is integrated numerically for sigmoids of normal logits.

Drawing `top_k` experts uniformly from `topk_group` random groups would be wrong: a group is chosen because its best
experts are good, so hardly any chosen group goes empty. For V3 (256 experts, 4 of 8 groups, top-8) a token reaches
3.97 nodes, not the 3.63 of that shortcut.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from parallel.expert.placement import PlacementError

Floats = NDArray[np.float64]

SCORE_CELLS, SUM_CELLS = 320, 96  # of the numerical integrals: over scores, over sums of two


@dataclass(frozen=True)
class Gate:
    """A balanced router: `top_k` of `num_experts`, within the best `topk_group` of `n_group` groups.

    group_score: what ranks the groups: top2 (sum of the two best scores, as published) or max (the best score, as in
    DeepEP's benchmark). logit_std: standard deviation of the logits behind the scores; matters to top2 alone, and
    little. Raises PlacementError for numbers that do not fit.
    """

    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2"
    logit_std: float = 0.5

    def __post_init__(self) -> None:
        if self.n_group < 1 or self.num_experts < 1 or self.num_experts % self.n_group:
            raise PlacementError(f"n_group={self.n_group} does not divide num_experts={self.num_experts}")
        if not 1 <= self.topk_group <= self.n_group:
            raise PlacementError(f"topk_group={self.topk_group} must be from 1 to n_group={self.n_group}")
        most = self.topk_group * self.group_size
        if not 1 <= self.top_k <= most:
            raise PlacementError(
                f"num_experts_per_tok={self.top_k} must be from 1 to {most}, the experts of the groups"
            )
        if self.group_score not in ("top2", "max"):
            raise PlacementError(f"group_score={self.group_score}: use top2 or max")
        if self.group_score == "top2" and self.limited and self.group_size < 2:
            raise PlacementError(f"n_group={self.n_group}: groups of one expert have no two best; use group_score=max")
        if self.logit_std <= 0:
            raise PlacementError(f"logit_std={self.logit_std} must be above 0")

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.num_experts // self.n_group

    @property
    def limited(self) -> bool:
        """Whether the groups keep a token from any expert at all."""
        return self.topk_group < self.n_group


def expected_blocks(gate: Gate, num_blocks: int) -> float:
    """Expected number of `num_blocks` equal blocks of neighbouring experts that hold at least one of a token's experts.

    Under a group limit a block must lie within a group or consist of whole groups; PlacementError otherwise.
    """
    if num_blocks < 1 or gate.num_experts % num_blocks:
        raise PlacementError(f"{num_blocks} blocks do not divide num_experts={gate.num_experts}")
    return num_blocks * (1 - _miss(gate, gate.num_experts // num_blocks))


def _miss(gate: Gate, block: int) -> float:
    """Chance that none of a token's experts lies in a given block of `block` experts."""
    if not gate.limited:
        return _without(gate.num_experts, block, gate.top_k)
    if gate.group_size % block and block % gate.group_size:
        raise PlacementError(
            f"blocks of {block} experts cut across groups of {gate.group_size}: use n_group="
            f"{gate.num_experts // block}, or ranks and nodes of which one divides the other's experts"
        )
    return float(_miss_by_max(gate, block)) if gate.group_score == "max" else _miss_by_top2(gate, block)


def _without(total: int, block: int, draws: int) -> float:
    """Chance that `draws` of `total` experts, any equally likely, miss a block."""
    return comb(total - block, draws) / comb(total, draws)


def _miss_by_max(gate: Gate, block: int) -> Fraction:
    """Takes the experts from the best down, skipping those of groups that came too late, while the block is missed.

    State: (groups seen, whether the block's own group is among them). What comes next is any of the remaining
    experts of seen groups, or of unseen ones while fewer than `topk_group` are seen, all equally likely.
    """
    size, groups = gate.group_size, gate.n_group
    marked = max(1, block // size)  # groups that hold experts of the block
    states = {(0, False): Fraction(1)}
    for taken in range(gate.top_k):
        after: dict[tuple[int, bool], Fraction] = {}
        for (seen, inside), chance in states.items():
            is_open = seen < gate.topk_group
            total = seen * size - taken + (groups - seen) * size * is_open
            moves = [((seen, inside), seen * size - taken - inside * block)]
            if is_open and inside:
                moves.append(((seen + 1, True), (groups - seen) * size))
            elif is_open:
                moves.append(((seen + 1, False), (groups - seen - marked) * size))
                moves.append(((seen + 1, True), max(0, size - block)))
            for state, ways in moves:
                if ways:
                    after[state] = after.get(state, Fraction(0)) + chance * Fraction(ways, total)
        states = after
    return sum(states.values(), Fraction(0))


def _miss_by_top2(gate: Gate, block: int) -> float:
    size, groups, chosen = gate.group_size, gate.n_group, gate.topk_group
    if block < size:
        # Within a chosen group the n experts taken are any n of it, equally likely.
        at_most = [_taken_at_most(gate, 1, count) for count in range(gate.top_k)] + [1.0]
        pmf = np.diff([0.0, *at_most])
        inside = sum(p * _without(size, block, n) for n, p in enumerate(pmf) if n <= size)
        return float(1 - chosen / groups * (1 - inside))
    marked = block // size
    total = 0.0
    for hit in range(min(marked, chosen) + 1):
        ways = comb(marked, hit) * comb(groups - marked, chosen - hit) / comb(groups, chosen)
        total += ways * (_taken_at_most(gate, hit, 0) if hit else 1.0)
    return total


def _taken_at_most(gate: Gate, num_groups: int, count: int) -> float:
    """Chance that at most `count` of a token's experts lie in given `num_groups` of the chosen groups.

    That is so when, at the score of the (top_k - count)-th best expert of the other chosen groups, no more than
    `count` experts of the given ones are better.
    """
    others = gate.topk_group - num_groups
    wanted = gate.top_k - count
    if others == 0 or others * gate.group_size < wanted:
        return 0.0
    law = _group_law(gate.group_size, gate.top_k, gate.logit_std)
    mine = _sum_of(law.above_NUT, num_groups, count).sum(0)
    fewer = _sum_of(law.above_NUT, others, wanted - 1).sum(0)
    reached = law.chosen_T**others - fewer  # [U, T], falling in u
    steps = (mine[1:] + mine[:-1]) / 2 * (reached[:-1] - reached[1:])
    rejected = (1 - law.edges_chosen_T) ** (gate.n_group - gate.topk_group)  # the unchosen all below the threshold
    weights = np.diff(rejected)
    return float((steps.sum(0) * weights).sum() / (law.chosen_T**gate.topk_group * weights).sum())


def _sum_of(above_NUT: Floats, num_groups: int, most: int) -> Floats:
    """Joint chance that independent groups have n better experts together, for n up to `most`: [most + 1, U, T]."""
    total = above_NUT[: most + 1]
    for _ in range(num_groups - 1):
        total = np.stack([sum(total[i] * above_NUT[n - i] for i in range(n + 1)) for n in range(most + 1)])
    return total


@dataclass(frozen=True)
class _GroupLaw:
    """One group of experts on a grid: u are scores as quantiles, t thresholds for the sum of the two best.

    above_NUT: chance that n of its experts are above u and its sum is above t. chosen_T: chance of the latter, at the
    middle of each cell of t; edges_chosen_T: at the edges.
    """

    above_NUT: Floats
    chosen_T: Floats
    edges_chosen_T: Floats


@lru_cache(maxsize=8)
def _group_law(size: int, top_k: int, logit_std: float) -> _GroupLaw:
    normal = NormalDist(0, logit_std)
    edges_U = 1 - (1 - np.linspace(0, 1, SCORE_CELLS + 1)) ** 2  # finer towards the best scores
    b, width = (edges_U[1:] + edges_U[:-1]) / 2, np.diff(edges_U)  # the second best score, by cells
    score = np.array([1 / (1 + np.exp(-normal.inv_cdf(quantile))) for quantile in b])

    def least_best(t: Floats) -> Floats:
        """Quantile above which the best score must lie for the sum to exceed t, given the second best: [B, T]."""
        rest = np.clip(t[None] - score[:, None], 1e-300, 1 - 1e-16)
        return np.vectorize(normal.cdf)(np.log(rest / (1 - rest)))

    density = size * (size - 1) * b ** (size - 2) * width  # of the second best, times that of the best: 1

    def chosen(t: Floats) -> Floats:
        """Chance that the sum of the two best is above t: [T]."""
        return density @ (1 - np.maximum(b[:, None], least_best(t)))

    sums = 2 * score
    quantiles = np.linspace(0, 1, 2 * SUM_CELLS + 1)[1:-1]
    t = np.interp(quantiles, 1 - chosen(sums), sums)  # cells as likely as one another
    edges_T, middles_T = np.array([0.0, *t[1::2], 2.0]), t[::2]
    edges_chosen_T = chosen(edges_T)
    least_BT = least_best(middles_T)
    room_BT = 1 - np.maximum(b[:, None], least_BT)
    u = edges_U[:, None]
    over_UB = np.where(b > u, b - u, 0)  # how far the second best is above u
    above = [np.empty((len(edges_U), len(middles_T))) for _ in range(min(top_k, size) + 1)]
    for n in range(2, len(above)):
        inner = np.where(b > u, over_UB ** (n - 2), 0) * width
        above[n] = comb(size, n) * u ** (size - n) * n * (n - 1) * (inner @ room_BT)
    below_UB = np.where(b < u, density, 0)
    for t in range(len(middles_T)):
        least = least_BT[None, :, t]
        above[1][:, t] = (below_UB * (1 - np.maximum(u, least))).sum(1)
        above[0][:, t] = (below_UB * np.clip(u - np.maximum(b, least), 0, None)).sum(1)
    none = np.zeros_like(above[0])
    above_NUT = np.stack([*above, *[none] * (top_k + 1 - len(above))])
    return _GroupLaw(above_NUT, density @ room_BT, edges_chosen_T)
