"""Which rank and which node of an expert group holds which expert: arithmetic alone, no torch.

Experts lie in order: rank i of the group holds [i * E/n, (i+1) * E/n), a node holds its ranks' experts. Under the
node-limited gate (report section 2.1.2) the gate's groups are runs of experts too, so that a token which may go to
`topk_group` groups reaches at most as many nodes, as long as no group lies across two of them.
"""

import math
from dataclasses import dataclass


class PlacementError(ValueError):
    """Experts do not fit the ranks, or a gate's groups do not fit the nodes; the message names what would."""

    user_error = True


@dataclass(frozen=True)
class Placement:
    """`num_experts` experts on `num_ranks` ranks of an expert group, neighbouring `ranks_per_node` of them on a node.

    The last node may not be smaller than the others. Raises PlacementError where something does not divide.
    """

    num_experts: int
    num_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_ranks", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise PlacementError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_experts % self.num_ranks:
            fits = _nearest(self.num_ranks, _divisors(self.num_experts))
            raise PlacementError(
                f"num_ranks={self.num_ranks} does not divide num_experts={self.num_experts}: use {fits} ranks"
            )
        if self.num_ranks % self.ranks_per_node:
            fits = _nearest(self.ranks_per_node, _divisors(self.num_ranks))
            raise PlacementError(
                f"ranks_per_node={self.ranks_per_node} does not divide num_ranks={self.num_ranks}: use {fits} "
                "ranks a node"
            )

    @property
    def num_nodes(self) -> int:
        """Nodes the expert group is spread over."""
        return self.num_ranks // self.ranks_per_node

    @property
    def experts_per_rank(self) -> int:
        """Experts of every MoE layer that one rank holds."""
        return self.num_experts // self.num_ranks

    @property
    def experts_per_node(self) -> int:
        """Experts of every MoE layer that one node holds."""
        return self.num_experts // self.num_nodes

    def rank_of(self, expert: int) -> int:
        """Rank of the expert group that holds a global expert id."""
        return self._known("expert", expert, self.num_experts) // self.experts_per_rank

    def node_of(self, expert: int) -> int:
        """Node that holds a global expert id."""
        return self._known("expert", expert, self.num_experts) // self.experts_per_node

    def node_of_rank(self, rank: int) -> int:
        """Node of a rank of the expert group."""
        return self._known("rank", rank, self.num_ranks) // self.ranks_per_node

    def local_rank(self, rank: int) -> int:
        """Index of a rank within its node; ranks of equal index are joined by one rail of the network."""
        return self._known("rank", rank, self.num_ranks) % self.ranks_per_node

    def rail_rank(self, *, rank: int, node: int) -> int:
        """The rank on `node` with the same local index as `rank`: where a token of `rank` enters that node."""
        return self._known("node", node, self.num_nodes) * self.ranks_per_node + self.local_rank(rank)

    def experts_of(self, rank: int) -> range:
        """Global ids of the experts that a rank holds."""
        first = self._known("rank", rank, self.num_ranks) * self.experts_per_rank
        return range(first, first + self.experts_per_rank)

    def group_nodes(self, group: int, *, n_group: int) -> range:
        """Nodes that hold experts of group `group` of a gate with `n_group` groups."""
        size = self._group_size(n_group)
        first = self._known("group", group, n_group) * size
        return range(self.node_of(first), self.node_of(first + size - 1) + 1)

    def max_nodes(self, *, n_group: int, topk_group: int, top_k: int) -> int:
        """Most nodes one token can reach when its `top_k` experts lie in at most `topk_group` of `n_group` groups."""
        self._group_size(n_group)
        if not 1 <= topk_group <= n_group:
            raise PlacementError(f"topk_group={topk_group} must be from 1 to n_group={n_group}")
        if top_k < 1:
            raise PlacementError(f"num_experts_per_tok={top_k} must be at least 1")
        spans = [self.group_nodes(group, n_group=n_group) for group in range(n_group)]
        # Groups in order cover runs of nodes in order: best[j] is the most nodes that j groups so far cover, by the
        # last node covered; a node shared by neighbouring groups counts once.
        best: list[dict[int, int]] = [{-1: 0}, *({} for _ in range(topk_group))]
        for span in spans:
            for chosen in reversed(range(topk_group)):
                for last, count in best[chosen].items():
                    reached = count + len(span) - (last >= span.start)
                    best[chosen + 1][span.stop - 1] = max(reached, best[chosen + 1].get(span.stop - 1, 0))
        return min(top_k, max(best[topk_group].values()))

    def require_node_limit(self, *, n_group: int, topk_group: int) -> None:
        """Raise PlacementError unless every group lies on one node, so that a token reaches `topk_group` at most."""
        self._group_size(n_group)
        if not 1 <= topk_group <= n_group:
            raise PlacementError(f"topk_group={topk_group} must be from 1 to n_group={n_group}")
        across = [g for g in range(n_group) if len(self.group_nodes(g, n_group=n_group)) > 1]
        if not across:
            return
        nodes = self.group_nodes(across[0], n_group=n_group)
        groups = _nearest(n_group, [n for n in _divisors(self.num_experts) if n % self.num_nodes == 0])
        node_counts = [n for n in _divisors(n_group) if self.num_ranks % n == 0]
        raise PlacementError(
            f"n_group={n_group}: group {across[0]} lies across nodes {nodes.start} to {nodes.stop - 1} of "
            f"{self.num_nodes}, so topk_group={topk_group} does not bound the nodes a token reaches: use n_group "
            f"{groups}, or {self.num_ranks} ranks on {_nearest(self.num_nodes, node_counts)} nodes"
        )

    def _group_size(self, n_group: int) -> int:
        if n_group < 1 or self.num_experts % n_group:
            fits = _nearest(n_group, _divisors(self.num_experts))
            raise PlacementError(f"n_group={n_group} does not divide num_experts={self.num_experts}: use {fits} groups")
        return self.num_experts // n_group

    @staticmethod
    def _known(kind: str, number: int, count: int) -> int:
        if not 0 <= number < count:
            raise PlacementError(f"{kind} {number} does not exist: {kind}s go from 0 to {count - 1}")
        return number


def _divisors(number: int) -> list[int]:
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def _nearest(wanted: int, fitting: list[int]) -> str:
    """The fitting number just below and the one just above, as `4 or 8`."""
    below, above = [n for n in fitting if n < wanted], [n for n in fitting if n > wanted]
    return " or ".join(map(str, [*below[-1:], *above[:1]]))
