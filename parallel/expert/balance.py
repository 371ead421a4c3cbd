"""Redundant experts: copies of the busiest ones, placed so that every rank gets the same share of the tokens.

Experts are loaded unevenly, and the rank with the most tokens holds up its whole expert group. A plan gives every rank
the same number of slots, fills the slots beyond one an expert with copies of the busiest, and spreads a copied expert's
tokens evenly over its copies. Idea: report section 3.4; the load comes from the log of a run, a row a layer.

Where the nodes divide the groups of a node-limited gate, whole groups are given to nodes first and copies stay inside
their node (hierarchical), so that a token still reaches no more nodes than it has groups. Otherwise copies go anywhere
(global). Both choices are greedy, then improved by exchanges, and never worse than the placement without a plan.

Letters: L layers, E experts, P slots, R ranks, N nodes.
"""

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallel.expert.placement import PlacementError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CANDIDATES = 4  # experts tried as giver and as taker of a copy, each


@dataclass(frozen=True)
class Balance:
    """Tokens of the busiest rank over the mean, by layer: before a plan and after it; 1 is perfect."""

    before_L: Floats
    after_L: Floats


@dataclass(frozen=True)
class ReplicaPlan:
    """experts_LP: the expert in every slot, slots in the order of ranks; hierarchical: whether groups kept to nodes."""

    experts_LP: Ints
    num_experts: int
    num_ranks: int
    num_nodes: int
    hierarchical: bool

    @property
    def copies(self) -> Ints:
        """How many slots hold each expert: [L, E]."""
        return np.stack([np.bincount(row, minlength=self.num_experts) for row in self.experts_LP])

    def rank_load(self, load_LE: Floats) -> Floats:
        """Load of every rank [L, R] when each expert's is shared evenly by its copies."""
        share_LP = np.take_along_axis(np.asarray(load_LE, np.float64) / self.copies, self.experts_LP, axis=1)
        return share_LP.reshape(len(share_LP), self.num_ranks, -1).sum(2)

    def max_over_mean(self, load_LE: Floats) -> Floats:
        """Load of the busiest rank over the mean, by layer [L]; 1 where a layer has no load at all."""
        loads_LR = self.rank_load(load_LE)
        mean_L = loads_LR.mean(1)
        return np.where(mean_L > 0, loads_LR.max(1) / np.where(mean_L > 0, mean_L, 1), 1.0)


def plan_replicas(
    load_LE: Floats, *, num_slots: int, num_ranks: int, num_nodes: int = 1, num_groups: int = 1
) -> ReplicaPlan:
    """A plan for the load of each layer (any unit, such as tokens), with `num_slots` slots in all a layer.

    Raises PlacementError for loads that are not finite and at least 0, fewer slots than experts, or counts that do not
    divide; the message names what would work.
    """
    load_LE = _checked(load_LE, num_slots=num_slots, num_ranks=num_ranks, num_nodes=num_nodes, num_groups=num_groups)
    shape = _Shape(load_LE.shape[1], num_slots, num_ranks, num_nodes, num_groups)
    rows = [_plan_layer(load_E, shape) for load_E in load_LE]
    return ReplicaPlan(np.stack(rows), shape.num_experts, num_ranks, num_nodes, shape.hierarchical)


def without_plan(
    num_layers: int, *, num_experts: int, num_slots: int, num_ranks: int, num_nodes: int = 1, num_groups: int = 1
) -> ReplicaPlan:
    """What a run does without a plan, in the same slots: experts in order, each rank's spare slots its own experts.

    A rank's load is then that of plain expert parallelism. Where the ranks do not divide the experts there is no such
    placement, and the slots (of each node, if hierarchical) take the experts in turn.
    """
    shape = _Shape(num_experts, num_slots, num_ranks, num_nodes, num_groups)
    row = _in_order(shape)
    return ReplicaPlan(np.tile(row, (num_layers, 1)), num_experts, num_ranks, num_nodes, shape.hierarchical)


def balance(plan: ReplicaPlan, load_LE: Floats, *, num_groups: int = 1) -> Balance:
    """Max over mean of the ranks' loads in each layer, without the plan and with it."""
    unplanned = without_plan(
        len(plan.experts_LP), num_experts=plan.num_experts, num_slots=plan.experts_LP.shape[1],
        num_ranks=plan.num_ranks, num_nodes=plan.num_nodes, num_groups=num_groups,
    )  # fmt: skip
    return Balance(unplanned.max_over_mean(load_LE), plan.max_over_mean(load_LE))


@dataclass(frozen=True)
class _Shape:
    """The numbers of a plan, and what follows from them. A domain is where copies may go: a node, or all ranks."""

    num_experts: int
    num_slots: int
    num_ranks: int
    num_nodes: int
    num_groups: int

    @property
    def hierarchical(self) -> bool:
        return self.num_groups % self.num_nodes == 0 and self.num_experts % self.num_groups == 0

    @property
    def num_domains(self) -> int:
        return self.num_nodes if self.hierarchical else 1


def _plan_layer(load_E: Floats, shape: _Shape) -> Ints:
    domains = shape.num_domains
    slots, ranks = shape.num_slots // domains, shape.num_ranks // domains
    if domains == 1:
        members = [np.arange(shape.num_experts)]
    else:
        ids_GM = np.arange(shape.num_experts).reshape(shape.num_groups, -1)
        members = [ids_GM[groups].ravel() for groups in _pack(load_E[ids_GM].sum(1), domains)]
    rows = []
    for ids in members:
        rows.append(np.sort(ids[_fill(load_E[ids], slots, ranks)], axis=1).ravel())
    planned, unplanned = np.concatenate(rows), _in_order(shape)
    # Greedy choices are good, not optimal: where the order as it was happens to be better, it stays.
    return min(planned, unplanned, key=lambda row: _busiest(row, load_E, shape))


def _busiest(row: Ints, load_E: Floats, shape: _Shape) -> float:
    share_P = (load_E / np.bincount(row, minlength=shape.num_experts))[row]
    return share_P.reshape(shape.num_ranks, -1).sum(1).max()


def _in_order(shape: _Shape) -> Ints:
    ids = np.arange(shape.num_experts)
    per_rank = shape.num_slots // shape.num_ranks
    if shape.num_experts % shape.num_ranks == 0:
        own_RM = ids.reshape(shape.num_ranks, -1)
        turn = np.arange(per_rank) % own_RM.shape[1]
        # Every expert of a rank the same number of copies or one more; the rank's load is the same either way.
        return np.sort(own_RM[:, turn], axis=1).ravel()
    own_NM = ids.reshape(shape.num_domains, -1)
    return own_NM[:, np.arange(shape.num_slots // shape.num_domains) % own_NM.shape[1]].ravel()


def _fill(load_M: Floats, slots: int, ranks: int) -> Ints:
    """Which of M experts lies in every slot of every rank: [ranks, slots per rank].

    Least load a copy does not always mean least load a rank, so a copy then moves to an expert of the busiest rank
    from one that can spare it, as long as that lightens the busiest rank; a few candidates of each are tried.
    """
    copies = _replicate(load_M, slots, ranks)
    placed, busiest = _place(load_M, copies, ranks)
    for _ in range(slots if ranks > 1 else 0):
        loads = (load_M / copies)[placed].sum(1)
        needy = [e for e in np.unique(placed[loads.argmax()]) if copies[e] < ranks]
        spare = np.flatnonzero(copies > 1)
        spare = spare[np.argsort(load_M[spare] / (copies[spare] - 1), kind="stable")][:CANDIDATES]
        tries = []
        for to in sorted(needy, key=lambda e: -load_M[e] / copies[e])[:CANDIDATES]:
            for giver in spare[spare != to]:
                moved = copies.copy()
                moved[to], moved[giver] = moved[to] + 1, moved[giver] - 1
                tries.append((*_place(load_M, moved, ranks), moved))
        best = min(tries, key=lambda found: found[1], default=None)
        if best is None or best[1] >= busiest * (1 - 1e-12):
            break
        placed, busiest, copies = best
    return placed


def _place(load_M: Floats, copies: Ints, ranks: int) -> tuple[Ints, float]:
    """The slots of every rank for given numbers of copies, and the load of the busiest rank."""
    weights = np.repeat(load_M / copies, copies)
    bins = _pack(weights, ranks)
    return np.repeat(np.arange(len(load_M)), copies)[bins], float(weights[bins].sum(1).max())


def _replicate(load_M: Floats, slots: int, ranks: int) -> Ints:
    """Copies of each expert, `slots` in all: the next goes where a copy bears the most, which minimises that most.

    No expert gets more copies than there are ranks while another has fewer: two copies on one rank share nothing.
    """
    copies = np.ones(len(load_M), np.int64)
    heap = [(ranks == 1, -load, expert) for expert, load in enumerate(load_M.tolist())]
    heapq.heapify(heap)
    for _ in range(slots - len(load_M)):
        expert = heap[0][2]
        copies[expert] += 1
        heapq.heapreplace(heap, (bool(copies[expert] >= ranks), -load_M[expert] / copies[expert], expert))
    return copies


def _pack(weights: Floats, num_bins: int) -> Ints:
    """Items in bins of equal number with the heaviest bin as light as can be found: [num_bins, items per bin].

    The heaviest item first, each into the lightest bin with room; then exchanges of two items that lighten the
    heaviest bin, the best one first, until none does.
    """
    room = len(weights) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, number) for number in range(num_bins)]
    for item in np.argsort(-weights, kind="stable").tolist():
        load, number = heapq.heappop(heap)
        bins[number].append(item)
        if len(bins[number]) < room:
            heapq.heappush(heap, (load + float(weights[item]), number))
    packed = np.array(bins, np.int64).reshape(num_bins, room)
    for _ in range(len(weights) if num_bins > 1 else 0):
        if not _exchange(packed, weights):
            break
    return packed


def _exchange(packed: Ints, weights: Floats) -> bool:
    """Swap the two items that lighten the heaviest bin the most without making another as heavy; whether one was."""
    loads = weights[packed].sum(1)
    heaviest = int(loads.argmax())
    gain = weights[packed[heaviest]][:, None, None] - weights[packed][None]  # moved off the heaviest, onto each bin
    worse = np.maximum(loads[heaviest] - gain, loads[None, :, None] + gain)
    worse[:, heaviest] = np.inf
    mine, other, theirs = np.unravel_index(int(worse.argmin()), worse.shape)
    if worse[mine, other, theirs] >= loads[heaviest] * (1 - 1e-12):  # rounding must not keep it going
        return False
    packed[heaviest, mine], packed[other, theirs] = packed[other, theirs], packed[heaviest, mine]
    return True


def _checked(load_LE: Floats, *, num_slots: int, num_ranks: int, num_nodes: int, num_groups: int) -> Floats:
    load_LE = np.asarray(load_LE, np.float64)
    if load_LE.ndim != 2 or 0 in load_LE.shape:
        raise PlacementError(f"load has shape {list(load_LE.shape)}: a plan needs [layers, experts]")
    if not np.isfinite(load_LE).all() or (load_LE < 0).any():
        layer, expert = np.argwhere(~np.isfinite(load_LE) | (load_LE < 0))[0].tolist()
        value = load_LE[layer, expert]
        raise PlacementError(f"load of layer {layer}, expert {expert} is {value}: it must be finite and at least 0")
    num_experts = load_LE.shape[1]
    for name, value in (("ranks", num_ranks), ("nodes", num_nodes), ("groups", num_groups)):
        if value < 1:
            raise PlacementError(f"{name}={value} must be at least 1")
    if num_ranks % num_nodes:
        raise PlacementError(f"nodes={num_nodes} does not divide ranks={num_ranks}: use as many on every node")
    if num_experts % num_groups:
        raise PlacementError(f"groups={num_groups} does not divide the {num_experts} experts of the load")
    if num_slots < num_experts or num_slots % num_ranks:
        most = max(num_experts, num_slots)
        above = -(-most // num_ranks) * num_ranks
        below = num_slots // num_ranks * num_ranks
        fits = f"{below} or {above}" if num_experts <= below < above else str(above)
        raise PlacementError(
            f"replicas={num_slots} must be at least the {num_experts} experts and a multiple of ranks={num_ranks}: "
            f"use {fits}"
        )
    return load_LE
