"""The run's own dispatcher on made-up tokens, whose every row is known beforehand: who sends or returns wrong ones."""

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config import RunConfig
from launcher.preflight.team import Team
from launcher.preflight.verdict import Row
from model.dispatch import TokenDispatcher
from parallel.expert.dispatchers import Tokens, build_dispatcher
from parallel.mesh import Groups, Mesh

NUM_TOKENS = 64  # of a rank
# Largest error of an element over the largest element of its row: of a row that was rounded to the type on the way,
# and of a sum of such rows. E4M3 has 3 bits of mantissa, BF16 has 7.
TOLERANCE = {"fp8": 2**-4, "bf16": 2**-8, "same": 0.0}
SUM_TOLERANCE = {"fp8": 2**-3, "bf16": 2**-5, "same": 2**-18}


@dataclass(frozen=True)
class Sent:
    """Tokens of one rank: rows x_TD, expert ids and weights [T, K]."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


def made_up(config: RunConfig, rank: int, dtype: torch.dtype) -> Sent:
    """The tokens of a rank, the same wherever they are made: routed as the gate would, to the best of a few groups."""
    model, draw = config.model, torch.Generator().manual_seed(1000 + rank)
    x_TD = torch.randn(NUM_TOKENS, model.hidden_size, generator=draw).to(dtype)
    scores = torch.rand(NUM_TOKENS, model.n_group, model.n_routed_experts // model.n_group, generator=draw)
    best = scores.max(2).values.topk(model.topk_group, 1).indices
    allowed = torch.zeros(scores.shape[:2], dtype=torch.bool).scatter_(1, best, True)
    masked = scores.masked_fill(~allowed[..., None], -1.0).flatten(1)
    chosen = masked.topk(model.num_experts_per_tok, 1)
    return Sent(x_TD, chosen.indices, chosen.values.contiguous())


@dataclass(frozen=True)
class Tried:
    """What one rank saw. wrong: by rank, what of its rows was wrong here."""

    ranks: tuple[int, ...]
    dispatch_seconds: float
    combine_seconds: float
    wrong: dict[int, str]


def rounding(config: RunConfig) -> tuple[str, str]:
    """Names in the tolerances of what tokens suffer on their way out, and sums back."""
    parallel, wide = config.parallel, config.train.precision == "fp32"
    out = "fp8" if parallel.dispatch_wire == "fp8" else "bf16" if parallel.dispatch_wire == "bf16" else "same"
    narrow = not wide or parallel.combine_wire == "bf16" or parallel.dispatcher.startswith("native")
    return out, out if out == "fp8" else "bf16" if narrow else "same"


def try_dispatch(team: Team, config: RunConfig, dispatcher: TokenDispatcher, ranks: tuple[int, ...]) -> Tried:
    """One dispatch and one combine without anything computed between, each row compared with what it must be."""
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    device, me = team.process.device, ranks.index(team.rank)
    all_sent = [made_up(config, rank, dtype) for rank in ranks]
    mine = all_sent[me]
    x_TD, ids_TK, weights_TK = mine.x_TD.to(device), mine.ids_TK.to(device), mine.weights_TK.to(device)
    arrived = dispatcher.dispatch(x_TD, ids_TK, weights_TK).wait()
    out, back = rounding(config)
    held = config.model.n_routed_experts // len(ranks)
    wrong = wrong_arrivals(arrived.rows_RD.cpu(), all_sent, range(me * held, (me + 1) * held), TOLERANCE[out])
    summed = dispatcher.combine(arrived.rows_RD, arrived.handle).wait().sum_TD.cpu()
    returned = wrong_returns(summed, mine, held, SUM_TOLERANCE[back])
    dispatch_seconds = team.best_seconds(lambda: dispatcher.dispatch(x_TD, handle=arrived.handle).wait())
    combine_seconds = team.best_seconds(lambda: dispatcher.combine(arrived.rows_RD, arrived.handle).wait())
    named = {ranks[i]: what for i, what in {**wrong, **returned}.items()}
    return Tried(ranks, dispatch_seconds, combine_seconds, named)


def wrong_arrivals(rows_RD: Tensor, all_sent: list[Sent], experts: range, tolerance: float) -> dict[int, str]:
    """Senders of which a row is not what they sent; rows stand by expert, then sender, then token."""
    sources, expected = [], []
    for expert in experts:
        for sender, sent in enumerate(all_sent):
            tokens = (sent.ids_TK == expert).any(1).nonzero().flatten()
            sources += [sender] * len(tokens)
            expected.append(sent.x_TD[tokens])
    want = torch.cat(expected) if expected else rows_RD[:0]
    if len(want) != len(rows_RD):
        return {sender: f"{len(rows_RD)} rows arrived instead of {len(want)}" for sender in range(len(all_sent))}
    bad = _differ(rows_RD, want, tolerance)
    return {
        sender: f"{count} of its rows arrive wrong" for sender, count in Counter(
            sources[row] for row in bad.nonzero().flatten().tolist()
        ).items()
    }  # fmt: skip


def wrong_returns(sum_TD: Tensor, sent: Sent, held: int, tolerance: float) -> dict[int, str]:
    """Ranks to blame for wrong sums: every token that was there came back wrong."""
    copies = sent.ids_TK.shape[1]
    bad = _differ(sum_TD, sent.x_TD.float() * copies, tolerance)
    owners_TK = sent.ids_TK // held
    found = {}
    for owner in owners_TK.unique().tolist() if bad.any() else ():
        there = (owners_TK == owner).any(1)
        if bool(bad[there].all()):
            found[int(owner)] = f"all {int(there.sum())} tokens it returns are wrong"
    if bad.any() and not found:
        found = {int(owner): "some tokens it returns are wrong" for owner in owners_TK[bad].unique().tolist()}
    return found


def _differ(got: Tensor, want: Tensor, tolerance: float) -> Tensor:
    """[rows] whether an element is further off than the tolerance allows, over the row's largest element."""
    error = (got.float() - want.float()).abs().amax(1)
    return ~(error <= tolerance * want.float().abs().amax(1))  # NaN differs


def check_experts(team: Team, config: RunConfig, mesh: Mesh, groups: Groups, timeout: timedelta) -> Row:
    """One row: right rows both ways with the dispatcher of the run, and its times."""
    model, name = config.model, f"dispatch and combine: {config.parallel.dispatcher}"
    ranks = tuple(dist.get_process_group_ranks(groups.expert))
    tokens = Tokens(model.n_routed_experts, model.num_experts_per_tok, model.hidden_size, NUM_TOKENS)
    dispatcher = build_dispatcher(mesh.config, groups.expert, tokens, timeout=timeout)
    mine = team.phase(name, lambda: try_dispatch(team, config, dispatcher, ranks))
    found = team.everyone(mine)
    blamed: dict[int, list[str]] = {}
    for tried in found:
        for rank, what in tried.wrong.items():
            blamed.setdefault(rank, []).append(what)
    # A rank whose rows are wrong everywhere is to blame; one that a single other accuses may be the victim of that one.
    most = max(map(len, blamed.values()), default=0)
    bad = [
        f"{team.nodes.name(rank)}: {said[0]} ({len(said)} of {len(ranks)} ranks say so)"
        for rank, said in sorted(blamed.items())
        if len(said) == most
    ]
    slowest = max(tried.dispatch_seconds for tried in found), max(tried.combine_seconds for tried in found)
    words = f"{len(found) // len(ranks)} of {len(ranks)} ranks, {NUM_TOKENS} tokens each: "
    return Row(name, words + f"{1e3 * slowest[0]:.3g} and {1e3 * slowest[1]:.3g} ms", tuple(bad))
