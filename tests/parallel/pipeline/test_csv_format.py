"""The CSV notation: an exact round trip, torch on both sides, and faults with their row and column."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as theirs

from parallel.pipeline.actions import Schedule
from parallel.pipeline.csv_format import ScheduleFileError, read, write
from parallel.pipeline.schedules import SCHEDULES, ScheduleError, build
from tests.parallel.pipeline.schedules.test_torch import torch_schedule


@pytest.mark.parametrize("name", SCHEDULES)
@settings(deadline=None, max_examples=15)
@given(st.integers(2, 9), st.integers(2, 24))
def test_round_trip_is_exact(name: str, ranks: int, microbatches: int) -> None:
    ranks += name == "dualpipe" and ranks % 2
    schedule = build(name, num_ranks=ranks, num_microbatches=microbatches)
    assert read(write(schedule), name=name) == schedule


KINDS: list[Any] = [theirs.ScheduleDualPipeV, theirs.ScheduleZBVZeroBubble, theirs.ScheduleInterleaved1F1B]
OURS = {"ScheduleDualPipeV": "dualpipev", "ScheduleZBVZeroBubble": "zbv", "ScheduleInterleaved1F1B": "interleaved"}


@pytest.mark.parametrize("kind", KINDS)
def test_torch_reads_what_we_write(kind: Any, tmp_path: Path) -> None:
    """Its loader checks the order, finds the placement and adds the communication."""
    path = tmp_path / "schedule.csv"
    path.write_text(write(build(OURS[kind.__name__], num_ranks=4, num_microbatches=12)))
    schedule = torch_schedule(kind, ranks=4, microbatches=12)
    before = {rank: [a for a in order if a is not None] for rank, order in schedule.pipeline_order.items()}
    schedule._load_csv(str(path))
    assert {rank: [a for a in order if a is not None] for rank, order in schedule.pipeline_order.items()} == before
    assert any("SEND_F" in str(action) for action in schedule.pipeline_order_with_comms[0])


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_what_torch_writes(kind: Any, tmp_path: Path) -> None:
    """Its files have empty cells where a rank idles."""
    path = tmp_path / "schedule.csv"
    torch_schedule(kind, ranks=4, microbatches=12)._dump_csv(str(path), format="compute_only")
    expected = build(OURS[kind.__name__], num_ranks=4, num_microbatches=12)
    assert read(path.read_text(), name=expected.name) == expected


def test_torch_has_no_placement_for_two_directions(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(write(build("dualpipe", num_ranks=4, num_microbatches=8)))
    with pytest.raises(Exception, match="is assigned to both rank"):
        torch_schedule(theirs.ScheduleDualPipeV, ranks=4, microbatches=8)._load_csv(str(path))


def cells(schedule: Schedule) -> list[list[str]]:
    return [[str(step) for step in steps] for steps in schedule.ranks]


def text(rows: list[list[str]]) -> str:
    return "\n".join(",".join(row) for row in rows) + "\n"


def fault(rows: list[list[str]]) -> str:
    with pytest.raises(ScheduleFileError) as caught:
        read(text(rows), name="plan.csv")
    assert str(caught.value).startswith("plan.csv: ")
    return str(caught.value)


PLAIN = cells(build("1f1b", num_ranks=3, num_microbatches=4))
SPLIT = cells(build("zb1p", num_ranks=3, num_microbatches=4))


def copy(rows: list[list[str]]) -> list[list[str]]:
    return [list(row) for row in rows]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_missing_action_is_named_with_its_row_and_its_neighbour(data: st.DataObject) -> None:
    rows = copy(data.draw(st.sampled_from([PLAIN, SPLIT])))
    row = data.draw(st.integers(0, 2))
    gone = rows[row].pop(data.draw(st.integers(0, len(rows[row]) - 1)))
    message = fault(rows)
    assert f"row {row + 1}: {gone} is missing ({gone[0]}" in message or f"row {row + 1}: " in message
    stage, microbatch = gone[0], gone[-1]
    left = next(cell for cell in rows[row] if cell[0] == stage and cell[-1] == microbatch)
    assert f"{left} is in row {row + 1} column {rows[row].index(left) + 1}" in message


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_doubled_action_is_named_with_both_places(data: st.DataObject) -> None:
    rows = copy(data.draw(st.sampled_from([PLAIN, SPLIT])))
    row, other = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    twice = data.draw(st.sampled_from(rows[row]))
    rows[other].append(twice)
    places = sorted([(row, rows[row].index(twice)), (other, len(rows[other]) - 1)])
    first, second = (f"row {r + 1} column {c + 1}" for r, c in places)
    assert f"{second}: {twice} again, it is already in {first}" in fault(rows)


def test_a_cycle_is_named_with_its_cells() -> None:
    rows = cells(build("1f1b", num_ranks=2, num_microbatches=2))
    rows[0] = ["0F0", "0B1", "0F1", "0B0"]
    message = fault(rows)
    assert "deadlock: row 1 column 2: 0B1 waits for a gradient from row 2" in message
    assert "row 2 column 3: 1F1 waits for an activation from row 1" in message


def test_an_action_in_another_row_than_its_stage_is_named() -> None:
    rows = copy(PLAIN)
    moved = rows[1].pop(2)
    rows[2].append(moved)
    assert f"row 3 column 9: {moved} belongs in row 2, where the others of stage 1 are" in fault(rows)


@pytest.mark.parametrize("cell", ["0X1", "F1", "0F", "0F1x", "(0F1;1B0)", "(0B1;1F0)OVERLAP_F_B", "-1F0"])
def test_what_is_no_action_is_named(cell: str) -> None:
    rows = copy(PLAIN)
    rows[1][2] = cell
    assert f"row 2 column 3: {cell!r} is not an action such as 0F4" in fault(rows)


def test_torch_files_with_communication_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    torch_schedule(KINDS[0], ranks=4, microbatches=12)._dump_csv(str(path), format="compute_comms")
    with pytest.raises(ScheduleFileError, match=r"row 1 column 1: '0UNSHARD' .* format=\"compute_only\"$"):
        read(path.read_text(), name="theirs")


def test_a_whole_and_a_split_backward_of_one_chunk_are_named() -> None:
    rows = copy(PLAIN)
    rows[0].append("0I0")
    assert "row 1: stage 0 micro-batch 0 has a whole and a split backward: " in fault(rows)


def test_an_empty_file_and_a_rank_and_a_stage_without_actions_are_faults() -> None:
    assert "the file is empty" in fault([])
    assert "row 2 has no action" in fault([PLAIN[0], [], PLAIN[1]])
    assert "no row has an action of stage 1, though there is a stage 2" in fault([PLAIN[0], PLAIN[2]])


def test_idle_cells_mean_nothing() -> None:
    schedule = build("1f1b", num_ranks=3, num_microbatches=4)
    rows = [["", *row, ""] for row in cells(schedule)]
    assert read(text(rows) + "\n\n", name="1f1b") == schedule


def test_build_takes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    schedule = build("dualpipe", num_ranks=4, num_microbatches=9)
    path.write_text(write(schedule))
    assert build(str(path), num_ranks=4, num_microbatches=9) == replace(schedule, name=str(path))
    with pytest.raises(ScheduleError, match="is for 4 ranks and 9 micro-batches, not 2 and 8: use 4 ranks and 9"):
        build(str(path), num_ranks=2, num_microbatches=8)
    with pytest.raises(ScheduleError, match=r"nothing\.csv: No such file"):
        build(str(tmp_path / "nothing.csv"), num_ranks=4, num_microbatches=9)


def test_the_text_is_plain_csv() -> None:
    rows = list(csv.reader(write(build("dualpipe", num_ranks=2, num_microbatches=4)).splitlines()))
    assert rows[0][:2] == ["0F0", "1F2"] and any(cell.endswith("OVERLAP_F_B") for cell in rows[0])
