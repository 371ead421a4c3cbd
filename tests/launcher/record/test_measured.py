"""Measurements: what is written is read, what cannot be used is named with its line, and the medians make the plan."""

import json
from pathlib import Path

import pytest

from launcher.record.measured import MeasuredCosts, MeasuredError, line, of_step, read
from parallel.pipeline.actions import Action, Pair, Schedule, parts
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate import Costs, simulate


def write(path: Path, schedule: Schedule, costs: Costs, *, steps: int = 1, ranks: int | None = None) -> None:
    """A run that goes exactly as planned, in microseconds, a file for each rank."""
    path.mkdir(exist_ok=True)
    for rank, row in enumerate(simulate(schedule, costs).ranks[:ranks]):
        lines = [
            line(
                rank=rank, step=step, actions=parts(timed.step),
                start_us=1e6 * step + 1000 * timed.start, end_us=1e6 * step + 1000 * timed.end,
            )
            for step in range(steps) for timed in row
        ]  # fmt: skip
        (path / f"actions-{rank}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipe"])
def test_a_run_comes_back_as_it_was_and_suggests_its_own_plan(name: str, tmp_path: Path) -> None:
    schedule = build(name, num_ranks=4, num_microbatches=9)
    costs = Costs(3.0, 2.0, 1.0)
    write(tmp_path, schedule, costs, steps=3)
    rows = of_step(read(tmp_path), schedule)
    plan = simulate(schedule, costs)
    for found, planned in zip(rows, plan.ranks, strict=True):
        assert [timed.step for timed in found] == [timed.step for timed in planned]
        assert [timed.start for timed in found] == pytest.approx([timed.start for timed in planned])
    assert simulate(schedule, MeasuredCosts.of_rows(rows)).makespan == pytest.approx(plan.makespan)
    assert of_step(read(tmp_path), schedule, step=1)[0][0].start == 0


def test_the_last_whole_step_is_taken(tmp_path: Path) -> None:
    schedule = build("1f1b", num_ranks=2, num_microbatches=3)
    write(tmp_path, schedule, Costs(), steps=2)
    path = tmp_path / "actions-1.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))  # the run was cut off in its last step
    assert of_step(read(tmp_path), schedule)
    with pytest.raises(MeasuredError, match=r"step 1 has exactly the actions of 1f1b .* the schedule that ran\?"):
        of_step(read(tmp_path), schedule, step=1)
    with pytest.raises(MeasuredError, match="no step has exactly the actions of zb1p"):
        of_step(read(tmp_path), build("zb1p", num_ranks=2, num_microbatches=3))


def test_work_of_several_steps_is_divided(tmp_path: Path) -> None:
    text = line(rank=0, step=0, actions=[Action("I", 0, 0), Action("W", 0, 0)], start_us=0, end_us=10)
    assert json.loads(text)["action"] == "0I0+0W0"
    pair = line(rank=0, step=0, actions=[Action("B", 0, 1), Action("F", 0, 2)], start_us=0, end_us=10)
    assert json.loads(pair)["action"] == "(0F2;0B1)OVERLAP_F_B"
    path = tmp_path / "run.jsonl"
    forward = line(rank=0, step=0, actions=[Action("F", 0, 0)], start_us=-5, end_us=0)
    path.write_text(f"{forward}\n{text}\n")
    schedule = Schedule("x", 1, 1, 1, ((0,),), ((Action("F", 0, 0), Action("I", 0, 0), Action("W", 0, 0)),))
    (row,) = of_step(read(path), schedule)
    assert [timed.start for timed in row] == pytest.approx([0, 0.005, 0.01])
    assert [timed.end for timed in row] == pytest.approx([0.005, 0.01, 0.015])


def test_what_was_never_measured_is_put_together_or_named() -> None:
    schedule = build("zb1p", num_ranks=2, num_microbatches=4)
    costs = MeasuredCosts.of_rows(simulate(schedule, Costs(1.0, 2.0, 4.0)).ranks)
    assert costs.of_step(Action("B", 1, 0)) == 6
    assert costs.of_step(Pair(Action("F", 0, 0), Action("B", 1, 0))) == 7
    with pytest.raises(MeasuredError, match="F of stage 7 was never measured alone"):
        costs.of_step(Action("F", 7, 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 2: .*: a line has rank, step, action, start_us and end_us"),
        ('{"rank": 0, "step": 0, "action": "0F0", "start_us": 1}', "line 2: 'end_us' is missing"),
        (
            '{"rank": 0, "step": 0, "action": "0Q0", "start_us": 1, "end_us": 2}',
            "line 2: action '0Q0' is not",
        ),
        (
            '{"rank": 0, "step": 0, "action": "0F0", "start_us": 3, "end_us": 2}',
            "line 2: rank 0, start_us 3, end_us 2",
        ),
        ('{"rank": 0, "step": 0, "action": 7, "start_us": 1, "end_us": 2}', "line 2: "),
    ],
)
def test_bad_lines_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(line(rank=0, step=0, actions=[Action("F", 0, 0)], start_us=0, end_us=1) + "\n" + text + "\n")
    with pytest.raises(MeasuredError, match=message):
        read(path)


def test_folders_and_files_without_measurements_are_named(tmp_path: Path) -> None:
    with pytest.raises(MeasuredError, match=r"no file actions\*\.jsonl in it"):
        read(tmp_path)
    (tmp_path / "actions.jsonl").touch()
    with pytest.raises(MeasuredError, match="nothing was measured"):
        read(tmp_path)


def test_a_rank_that_the_schedule_has_not_is_named(tmp_path: Path) -> None:
    schedule = build("1f1b", num_ranks=1, num_microbatches=1)
    rows = [line(rank=3, step=0, actions=[Action(kind, 0, 0)], start_us=0, end_us=1) for kind in "FB"]
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(MeasuredError, match="rank 3 was measured, the schedule has 1 ranks"):
        of_step(read(path), schedule)
