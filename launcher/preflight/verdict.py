"""Who is to blame: from measurements of pairs, groups and ranks to the rank, node or pair that is bad. No torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low


@dataclass(frozen=True)
class Row:
    """One line of the table. bad: what is wrong, each naming a node, pair or rank; empty where all is well."""

    check: str
    measured: str
    bad: tuple[str, ...] = ()


@dataclass(frozen=True)
class Nodes:
    """The host of every rank, by rank."""

    hosts: tuple[str, ...]

    def name(self, rank: int) -> str:
        """A rank as messages call it."""
        return f"rank {rank} on {self.hosts[rank]}"

    @property
    def by_host(self) -> dict[str, tuple[int, ...]]:
        """Ranks of each node, nodes in the order of their first rank."""
        found: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            found.setdefault(host, []).append(rank)
        return {host: tuple(ranks) for host, ranks in found.items()}

    def group(self, ranks: Sequence[int]) -> str:
        """Some ranks as messages call them, with their nodes."""
        hosts = ", ".join(dict.fromkeys(self.hosts[rank] for rank in ranks))
        return f"ranks {', '.join(map(str, ranks))} on {hosts}"


@dataclass(frozen=True)
class Blame:
    """One culprit in words, and the bad pairs that it explains."""

    words: str
    pairs: frozenset[tuple[int, int]]


def blame(bad_pairs: Mapping[tuple[int, int], str], tested: Sequence[tuple[int, int]], nodes: Nodes) -> list[Blame]:
    """What explains every bad pair: a rank, or its whole node, if most of what it was tested with is bad.

    bad_pairs: what is wrong, by pair (lower rank first). tested: all pairs. Greedy: the rank with the largest share of
    bad pairs is named first and its pairs are explained by it.
    """
    of_rank = Counter(rank for pair in tested for rank in pair)
    left, culprits = dict(bad_pairs), dict[int, dict[tuple[int, int], str]]()
    while left:
        count = Counter(rank for pair in left for rank in pair)
        rank, number = max(count.items(), key=lambda item: (item[1] / of_rank[item[0]], item[1], -item[0]))
        if number < 2 or number * 2 <= of_rank[rank]:
            break
        culprits[rank] = {pair: what for pair, what in left.items() if rank in pair}
        left = {pair: what for pair, what in left.items() if rank not in pair}
    return [*_of_ranks(culprits, of_rank, nodes), *_of_pairs(left, nodes)]


def _of_ranks(
    culprits: Mapping[int, Mapping[tuple[int, int], str]], of_rank: Mapping[int, int], nodes: Nodes
) -> list[Blame]:
    found = []
    for host, ranks in nodes.by_host.items():
        mine = {rank: culprits[rank] for rank in ranks if rank in culprits}
        if len(ranks) > 1 and len(mine) == len(ranks):
            what = next(iter(mine[ranks[0]].values()))
            words = f"node {host}: all its ranks ({', '.join(map(str, ranks))}): {what}"
            found.append(Blame(words, frozenset(pair for pairs in mine.values() for pair in pairs)))
            continue
        for rank, pairs in mine.items():
            what = next(iter(pairs.values()))
            words = f"{nodes.name(rank)}: {len(pairs)} of its {of_rank[rank]} pairs: {what}"
            found.append(Blame(words, frozenset(pairs)))
    return found


def _of_pairs(left: Mapping[tuple[int, int], str], nodes: Nodes) -> list[Blame]:
    """Pairs that no single rank explains; those between the same two nodes as one."""
    by_hosts: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for a, b in left:
        by_hosts.setdefault((nodes.hosts[a], nodes.hosts[b]), []).append((a, b))
    found = []
    for pairs in by_hosts.values():
        names = [f"{nodes.name(a)} and {nodes.name(b)}" for a, b in pairs[:4]]
        more = f" and {len(pairs) - 4} more" if len(pairs) > 4 else ""
        found.append(Blame(f"between {'; '.join(names)}{more}: {left[pairs[0]]}", frozenset(pairs)))
    return found


def slow(seconds: Mapping[tuple[int, int], float], share: float) -> dict[tuple[int, int], str]:
    """The pairs that have less than `share` of the median pair's speed, and how much of it they have.

    Of an even number the faster of the middle two counts: of two pairs, the fast one shows what is possible.
    """
    middle = median_low(seconds.values())
    return {pair: f"{middle / took:.2g} of the median speed" for pair, took in seconds.items() if took * share > middle}


def rounds(number: int) -> list[list[tuple[int, int]]]:
    """All pairs of 0..number-1 in rounds in which each meets one other at most (the circle method)."""
    places: list[int | None] = [*range(number), *([None] if number % 2 else [])]
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        met = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in met if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return found


def differing(facts: Sequence[Mapping[str, object]], nodes: Nodes) -> list[str]:
    """Ranks whose facts differ from what most ranks have, key by key."""
    found = []
    for key in dict.fromkeys(key for mine in facts for key in mine):
        values = Counter(str(mine.get(key)) for mine in facts)
        usual = values.most_common(1)[0][0]
        for other in values:
            ranks = [rank for rank, mine in enumerate(facts) if str(mine.get(key)) == other]
            if other != usual:
                found.append(f"{nodes.group(ranks)}: {key} {other}, most have {usual}")
    return found


def table(title: str, rows: Sequence[Row]) -> str:
    """The table, one line a check, and below it everything that is bad."""
    width = max(len(row.check) for row in rows)
    lines = [title, *(f"  {row.check:<{width}}  {'BAD' if row.bad else 'ok ':<3}  {row.measured}" for row in rows)]
    return "\n".join(lines)
