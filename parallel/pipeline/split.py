"""Which layers each pipeline stage holds. No torch."""

from itertools import pairwise

from model.config import ModelConfig
from model.counts import block_shapes, flops_per_token
from parallel.pipeline.placement import Placement


class SplitError(ValueError):
    """Layers that do not fit the stages; the message names the key and a value that would work."""


def layer_costs(config: ModelConfig) -> list[float]:
    """Relative forward cost of each main layer: weights that one token uses."""

    def active(moe: bool) -> float:
        total = 0.0
        for name, shape in block_shapes(config, moe=moe):
            size = 1.0
            for length in shape:
                size *= length
            used = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else 1.0
            total += size * used
        return total

    return [active(config.is_moe(i)) for i in range(config.num_hidden_layers)]


def end_cost(config: ModelConfig) -> float:
    """Relative forward cost of what follows the last layer: head and MTP modules (each with the head again)."""
    head = config.vocab_size * config.hidden_size
    if not config.num_nextn_predict_layers:
        return head
    with_mtp = flops_per_token(config, 0, mtp=True).linear - flops_per_token(config, 0, mtp=False).linear
    return head + with_mtp / 6


def split_layers(
    config: ModelConfig,
    num_stages: int,
    layers_per_stage: tuple[int, ...] | None = None,
    *,
    placement: Placement | None = None,
) -> tuple[range, ...]:
    """Contiguous layers of each stage, first to last.

    layers_per_stage None: the split whose most expensive stage is cheapest, head and MTP counted on the last one
    (which may then hold few layers, but at least one). Where `placement` puts several stages on a rank, layers are
    moved from there on while that makes the most expensive rank cheaper: rank 0 of a V has the last stage too.
    """
    total = config.num_hidden_layers
    if num_stages > total:
        raise SplitError(
            f"{num_stages} pipeline stages (parallel.pipeline times stages a rank) are more than "
            f"model.num_hidden_layers={total}: use at most {total}"
        )
    if layers_per_stage is None:
        costs, end = layer_costs(config), end_cost(config)
        layers_per_stage = _balanced(costs, end, num_stages)
        if placement is not None and num_stages > 1 + max(placement[0]):
            layers_per_stage = _balanced_ranks(costs, end, layers_per_stage, placement)
    if len(layers_per_stage) != num_stages or sum(layers_per_stage) != total or min(layers_per_stage) < 1:
        example = [total // num_stages + (i < total % num_stages) for i in range(num_stages)]
        raise SplitError(
            f"parallel.layers_per_stage={list(layers_per_stage)} must be {num_stages} positive numbers that sum to "
            f"model.num_hidden_layers={total}: for example {example}"
        )
    bounds = [sum(layers_per_stage[:i]) for i in range(num_stages + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def _balanced(costs: list[float], end: float, num_stages: int) -> tuple[int, ...]:
    """Sizes that minimise the largest stage cost; among prefixes that tie, the one with the smaller sum of squares."""
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    total = len(costs)
    # best[i]: (largest, squares, sizes) over the first i layers in the stages so far
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for stage in range(num_stages):
        extra = end if stage == num_stages - 1 else 0.0
        following: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for done, (largest, squares, sizes) in best.items():
            for size in range(1, total - done - (num_stages - 1 - stage) + 1):
                cost = prefix[done + size] - prefix[done] + extra
                found = (max(largest, cost), squares + cost * cost, (*sizes, size))
                if done + size not in following or found < following[done + size]:
                    following[done + size] = found
        best = following
    return best[total][2]


def stage_costs(costs: list[float], end: float, sizes: tuple[int, ...]) -> list[float]:
    """Cost of each stage, from those of the layers and of what follows the last one."""
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    stages = [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
    stages[-1] += end
    return stages


def _balanced_ranks(costs: list[float], end: float, sizes: tuple[int, ...], placement: Placement) -> tuple[int, ...]:
    """Sizes with a cheaper most expensive rank, then evener ranks, then evener stages, one layer moved at a time."""

    def price(sizes: tuple[int, ...]) -> tuple[float, float, float]:
        stages = stage_costs(costs, end, sizes)
        ranks = [0.0] * (1 + max(placement[0]))
        for cost, rank in zip(stages, placement[0], strict=True):
            ranks[rank] += cost
        return (max(ranks), sum(cost * cost for cost in ranks), sum(cost * cost for cost in stages))

    best = price(sizes)
    while True:
        moves = [
            (price(moved), moved)
            for source, size in enumerate(sizes)
            if size > 1
            for target in range(len(sizes))
            if source != target
            for moved in [_moved(sizes, source, target)]
        ]
        found = min(moves, default=(best, sizes))
        if found[0] >= (best[0], best[1] * (1 - 1e-12), best[2]):  # not for the sake of rounding
            return sizes
        best, sizes = found


def _moved(sizes: tuple[int, ...], source: int, target: int) -> tuple[int, ...]:
    """One layer fewer in one stage and one more in another; those between shift along."""
    return tuple(size - (i == source) + (i == target) for i, size in enumerate(sizes))
