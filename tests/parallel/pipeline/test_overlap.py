"""A rank's work: every phase once, in an order in which nothing waits for itself, pairs as in the report's figure 4."""

from collections import Counter

import pytest

from parallel.pipeline.actions import Action, Message, Pair, parts
from parallel.pipeline.overlap import LEVELS, Work, completes, halves_of, joins_pairs, plan, sending
from parallel.pipeline.phase_costs import LayerCosts, PhaseCosts
from parallel.pipeline.phases import Phase, backward_program, forward_program, turns, waits_for
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate_phases import simulate_phases

SHAPES = {"1f1b": (4, 6), "dualpipe": (4, 10)}


def work_of(name: str, rank: int, level: str, *, links: int = 3) -> list[Work]:
    ranks, microbatches = SHAPES[name]
    schedule = build(name, num_ranks=ranks, num_microbatches=microbatches)
    return plan(schedule, rank, num_links=lambda stage: links, level=level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rank", range(4))
def test_work_covers_the_schedule_in_its_order(name: str, rank: int, level: str) -> None:
    """All actions in their order, and of each chunk all forward and backward phases once."""
    ranks, microbatches = SHAPES[name]
    schedule = build(name, num_ranks=ranks, num_microbatches=microbatches)
    work = work_of(name, rank, level)
    listed = [action for step in schedule.ranks[rank] for action in parts(step)]
    assert [action for w in work for action in w.actions] == listed
    halves = halves_of(schedule, level)
    seen = Counter((p.action.stage, p.action.microbatch, p.phase) for w in work for p in w.phases)
    for stage, microbatch in {(a.stage, a.microbatch) for a in listed}:
        n = halves.get((stage, microbatch), 1)
        for phase in (*forward_program(3, halves=n), *backward_program(3, halves=n, weights=False)):
            assert seen[stage, microbatch, phase] == 1, phase
        assert seen[stage, microbatch, Phase("weights", 0)] >= 1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_transfer_starts_before_it_is_awaited_and_is_awaited_once(name: str, level: str) -> None:
    ranks, microbatches = SHAPES[name]
    schedule = build(name, num_ranks=ranks, num_microbatches=microbatches)
    halves = halves_of(schedule, level)
    for rank in range(ranks):
        started, awaited = set(), Counter()
        for placed in (p for w in work_of(name, rank, level) for p in w.phases):
            key = placed.action.stage, placed.action.microbatch
            for transfer in waits_for(placed.phase, halves=halves.get(key, 1)):
                assert (key, transfer) in started, f"{placed} waits for {transfer}, which has not begun"
                awaited[key, transfer] += 1
            if placed.phase.is_transfer:
                started.add((key, placed.phase))
        assert set(awaited) == started and set(awaited.values()) == {1}


def test_a_pair_is_the_figure() -> None:
    """Report, figure 4: MLP(B) under dispatch(F), MLP(F) under dispatch(B), attention under the combines."""
    work = next(w for w in work_of("dualpipe", 0, "pairs", links=2) if len(w.actions) == 2)
    forward, backward = work.actions
    letters = [("F" if p.action == forward else "B") + ":" + p.phase.kind for p in work.phases]
    assert forward.kind == "F" and backward.kind == "B"
    assert letters == [
        "B:end_grad", "B:combine_grad", "B:shared_grad", "B:weights",
        "F:attend", "F:dispatch", "F:shared",
        "B:experts_grad", "B:dispatch_grad", "B:weights",
        "F:experts", "F:combine",
        "B:attend_grad", "B:weights",
        "F:end",
    ]  # fmt: skip


def test_turns_begin_where_something_is_awaited() -> None:
    program = forward_program(3, halves=2)
    cut = turns(program, halves=2)
    assert tuple(phase for turn in cut for phase in turn) == program
    assert all(waits_for(turn[0], halves=2) for turn in cut[1:])
    assert not any(waits_for(phase, halves=2) for turn in cut for phase in turn[1:] if phase.half == 0)


def test_chunks_without_a_partner_go_in_halves() -> None:
    """Under 1F1B all of them; under DualPipe those whose forward or backward is not in a pair."""
    ranks, microbatches = SHAPES["1f1b"]
    every = halves_of(build("1f1b", num_ranks=ranks, num_microbatches=microbatches), "all")
    assert len(every) == ranks * microbatches
    schedule = build("dualpipe", num_ranks=4, num_microbatches=20)
    halved = halves_of(schedule, "all")
    paired = Counter(
        (a.stage, a.microbatch) for s in schedule.ranks for p in s if isinstance(p, Pair) for a in parts(p)
    )
    assert all((paired[key] == 2) == (key not in halved) for key in paired)
    assert 0 < len(halved) < 4 * 20
    assert halves_of(schedule, "pairs") == halves_of(schedule, "off") == {}


def test_an_input_gradient_with_its_own_weights_next_is_one_backward() -> None:
    work = [w for rank in range(4) for w in work_of("dualpipe", rank, "all")]
    joined = [w for w in work if [a.kind for a in w.actions] == ["I", "W"]]
    assert joined
    for w in joined:
        assert w.actions[1] == Action("W", w.actions[0].stage, w.actions[0].microbatch)
        assert [p.phase for p in w.phases] == list(backward_program(3, halves=2, weights=True))


@pytest.mark.parametrize("links", [1, 3])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", sorted(SHAPES))
def test_messages_leave_in_the_order_in_which_peers_expect_them(name: str, level: str, links: int) -> None:
    """Of a pair both go to one rank, which matches them by order alone."""
    ranks, microbatches = SHAPES[name]
    schedule = build(name, num_ranks=ranks, num_microbatches=microbatches)
    for rank in range(ranks):
        expected = schedule.messages_from(rank, pairs_joined=joins_pairs(level))
        sent: dict[int, list[Message]] = {}
        for w in plan(schedule, rank, num_links=lambda stage: links, level=level):
            for message in filter(None, map(schedule.output, sending(w))):
                sent.setdefault(schedule.consumer(message), []).append(message)
        assert sent == expected


def test_latency_of_messages_is_hidden_where_pairs_follow_each_other() -> None:
    """A message's time counts while the pipeline fills and drains, not once for every micro-batch."""

    def makespan(microbatches: int, message: float) -> float:
        schedule = build("dualpipe", num_ranks=8, num_microbatches=microbatches)
        return simulate_phases(schedule, PhaseCosts(LayerCosts.even(1.0, 1.0), message=message), level="all").makespan

    added = [makespan(microbatches, 0.01) - makespan(microbatches, 0.0) for microbatches in (20, 60)]
    assert added[1] == pytest.approx(added[0]) and added[0] < 0.3


@pytest.mark.parametrize("links", [1, 3])
@pytest.mark.parametrize("level", LEVELS)
def test_every_message_is_ready_once_and_a_gradient_before_its_own_last_weights(level: str, links: int) -> None:
    for rank in range(4):
        for w in work_of("dualpipe", rank, level, links=links):
            ready = [p.action for p in w.phases if completes(p, num_links=links)]
            assert sorted(map(str, ready)) == sorted(str(a) for a in w.actions if a.kind != "W")
            for p in w.phases:
                if p.action.kind == "B" and completes(p, num_links=links):
                    rest = w.phases[w.phases.index(p) + 1 :]
                    assert any(q.action == p.action and q.phase.kind == "weights" for q in rest)
