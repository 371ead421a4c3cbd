"""The walk puts every step after what it needs, and says truly who waits for whom where it ends early."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Pair, Step, parts
from parallel.pipeline.order import Progress, walk
from parallel.pipeline.schedules import SCHEDULES, build
from parallel.pipeline.schedules.prune import keep


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_comes_once_and_after_what_it_needs(name: str) -> None:
    schedule = build(name, num_ranks=4, num_microbatches=11)
    found = walk(schedule)
    assert not found.waits
    assert sorted(found.steps) == [(rank, at) for rank in range(4) for at in range(len(schedule.ranks[rank]))]
    done: set[Action] = set()
    for rank, at in found.steps:
        step = schedule.ranks[rank][at]
        for action in parts(step):
            s, m = action.stage, action.microbatch
            if action.kind == "F":
                assert s == 0 or Action("F", s - 1, m) in done
            elif action.kind == "W":
                assert Action("I", s, m) in done
            else:
                assert Action("F", s, m) in done
                assert s == schedule.num_stages - 1 or {Action("B", s + 1, m), Action("I", s + 1, m)} & done
        done.update(parts(step))


def test_a_cycle_of_three_ranks_is_found_whole() -> None:
    """Each rank wants what the next one does later: 0 waits for 1, 1 for 2, 2 for 0."""
    schedule = build("interleaved", num_ranks=3, num_microbatches=3, stages_per_rank=2)
    ranks = [list(steps) for steps in schedule.ranks]
    for rank, first in enumerate((Action("F", 3, 0), Action("F", 1, 0), Action("F", 2, 0))):
        ranks[rank].remove(first)
        ranks[rank].insert(0, first)
    found = walk(replace(schedule, ranks=tuple(map(tuple, ranks))))
    cycle = found.cycle()
    assert {(wait.rank, wait.other) for wait in cycle} == {(0, 2), (2, 1), (1, 0)}
    assert str(cycle[0]).startswith(f"rank {cycle[0].rank} at F stage")


def test_both_halves_of_a_pair_must_be_ready() -> None:
    schedule = build("1f1b", num_ranks=2, num_microbatches=2)
    progress = Progress(schedule)
    pair = Pair(Action("F", 1, 1), Action("B", 1, 0))
    for step in (Action("F", 0, 0), Action("F", 1, 0)):
        assert progress.missing(step) is None
        progress.done(step)
    wait = progress.missing(pair)
    assert wait is not None and (wait.what, wait.other) == ("an activation", 0)
    progress.done(Action("F", 0, 1))
    assert progress.missing(pair) is None


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(SCHEDULES), st.integers(1, 8), st.integers(1, 20), st.data())
def test_any_choice_of_micro_batches_is_sound(name: str, ranks: int, total: int, data: st.DataObject) -> None:
    """With two directions as many as keep each in its half."""
    ranks += name == "dualpipe" and ranks % 2
    schedule = build(name, num_ranks=ranks, num_microbatches=total)
    chosen = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1)))
    if schedule.bidirectional:
        down = [m for m in chosen if not schedule.direction(m)]
        up = [m for m in chosen if schedule.direction(m)]
        up = up[: len(down)]
        chosen = down[: len(up) + 1] + up
        if not chosen:
            return
    kept = keep(schedule, chosen)
    assert not walk(kept).waits
    steps: list[Step] = [step for rank in kept.ranks for step in rank]
    assert {a.microbatch for step in steps for a in parts(step)} == set(range(len(chosen)))


def test_a_pair_that_loses_a_half_becomes_the_other() -> None:
    schedule = build("dualpipe", num_ranks=2, num_microbatches=6)
    kept = keep(schedule, [0, 1, 2, 3, 4])
    pairs = [step for step in schedule.ranks[0] if isinstance(step, Pair)]
    broken = [pair for pair in pairs if 5 in (pair.forward.microbatch, pair.backward.microbatch)]
    assert broken
    for pair in broken:
        left = pair.backward if pair.forward.microbatch == 5 else pair.forward
        assert left in kept.ranks[0]
