"""Every pair of ranks that a run's traffic can meet exchanges a message: right bytes, and how fast."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.preflight.team import Team, pattern
from launcher.preflight.verdict import Nodes, Row, blame, rounds, slow


@dataclass(frozen=True)
class Meeting:
    """One exchange as one rank saw it."""

    kind: str
    pair: tuple[int, int]
    seconds: float
    is_right: bool


def schedule(nodes: Nodes) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Rounds of pairs: all inside each node; between nodes the ranks of one local index (a rail), all rails at once.

    Nodes of different sizes: all pairs of ranks, as one kind.
    """
    members = list(nodes.by_host.values())
    size = len(members[0])
    if any(len(ranks) != size for ranks in members):
        yield from (("all pairs", met) for met in rounds(len(nodes.hosts)))
        return
    for met in rounds(size):
        yield "pairs in nodes", [(ranks[a], ranks[b]) for ranks in members for a, b in met]
    for met in rounds(len(members)):
        pairs = [(members[a][rail], members[b][rail]) for a, b in met for rail in range(size)]
        yield "pairs between nodes", [(min(pair), max(pair)) for pair in pairs]


def swap(sent: Tensor, received: Tensor, peer: int) -> None:
    """Send and receive at once; returns when both are done on the host's side."""
    operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def check_pairs(team: Team) -> list[Row]:
    """One row for each kind of pair; slow ones and those with wrong bytes, blamed on a rank where one explains them."""
    length = max(1, team.payload_bytes // 4)
    received = torch.empty(length, device=team.process.device)
    mine: list[Meeting] = []
    for kind, pairs in schedule(team.nodes):
        pair = next((pair for pair in pairs if team.rank in pair), None)
        if pair is not None:
            peer = pair[0] if pair[1] == team.rank else pair[1]
            sent = pattern(team.rank, peer, length, team.process.device)
            seconds = team.best_seconds(lambda sent=sent, peer=peer: swap(sent, received, peer))
            is_right = torch.equal(received, pattern(peer, team.rank, length, team.process.device))
            mine.append(Meeting(kind, pair, seconds, is_right))
    return judge([meeting for said in team.everyone(mine) for meeting in said], team)


def judge(meetings: list[Meeting], team: Team) -> list[Row]:
    """Rows from what all ranks saw; a pair is as slow as the slower of its two ends says.

    Who is to blame is judged over all kinds together, so that a rank with one pair of each is seen to be in both.
    """
    seconds: dict[str, dict[tuple[int, int], float]] = {}
    bad: dict[tuple[int, int], str] = {}
    for meeting in meetings:
        of_kind = seconds.setdefault(meeting.kind, {})
        of_kind[meeting.pair] = max(of_kind.get(meeting.pair, 0.0), meeting.seconds)
    for of_kind in seconds.values():
        bad |= slow(of_kind, team.slow_share)
    bad |= {meeting.pair: "wrong bytes arrive" for meeting in meetings if not meeting.is_right}
    blamed = blame(bad, [pair for of_kind in seconds.values() for pair in of_kind], team.nodes)
    rows = []
    for kind, of_kind in seconds.items():
        speeds = sorted(team.payload_bytes / took / 1e9 for took in of_kind.values())
        words = f"{len(speeds)}, median {speeds[len(speeds) // 2]:.3g} GB/s each way, slowest {speeds[0]:.3g}"
        rows.append(Row(kind, words, tuple(one.words for one in blamed if one.pairs & of_kind.keys())))
    return rows
