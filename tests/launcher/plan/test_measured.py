"""Predicted against measured steps: the rows, and that a rank's phases add up to the processor time of its step."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher.__main__ import main
from launcher.plan.measured import command as measured
from launcher.plan.measured.command import line
from launcher.plan.measured.model import BAR
from launcher.plan.measured.row import Row
from launcher.plan.measured.slept import Slept, even_pipelines, planned_pipelines, slept_rows
from parallel.pipeline.check import check
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.simulate_phases import simulate_phases
from tests.distributed import run_distributed


@pytest.fixture(scope="module")
def planned() -> list[Slept]:
    return planned_pipelines()


def test_a_row_holds_within_its_bar() -> None:
    row = Row("tiny: dualpipe, overlap=pairs, 2 cores", 2.0, 1.71, BAR, 0.1, (7.0, 6.5))
    assert row.relative_error == pytest.approx(-0.145) and row.holds
    assert not Row("", 2.0, 1.69, BAR, 0.1).holds
    tree = json.loads(json.dumps(row.tree()))
    assert {"check", "predicted", "measured", "relative_error", "bar", "holds", "core_seconds"} <= tree.keys()


def test_the_first_row_of_the_model_calibrates_the_others(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Its factor, not their own; its own figures and the slept ones stay as they are."""

    def ranks(_: Any, *, command: list[str], **others: Any) -> int:
        row = Row(command[-1], 2.0, 1.5, BAR, 0.1)
        if "model" in command:
            parts = {"phases": 1.0, "after the pipeline": 0.3, "messages and data": 0.2}
            factor = 1.2 if command[-2:] == list(measured.MODEL_ROWS[0]) else 9.0
            row = replace(row, core_seconds=(3.0, 2.0), parts=parts, phases_factor=factor)
        Path(command[3]).write_text(json.dumps(row.tree()) + "\n")
        return 0

    monkeypatch.setattr(measured, "run_local", ranks)
    assert measured.measured_command(as_json=True) == 0
    rows = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [row["predicted"] for row in rows] == pytest.approx([1.5, 1.5, 1.5, *[1.7] * (len(measured.MODEL_ROWS) - 1)])
    assert [row["calibrates"] for row in rows] == [False, False, True, *[False] * (len(measured.MODEL_ROWS) - 1)]
    assert measured.measured_command(as_json=False) == 0
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= 80 and sum("phases among all ranks take 1.200 times" in line for line in said) == 1


def test_every_schedule_and_overlap_is_slept_through_and_fits_80_columns(planned: list[Slept]) -> None:
    pipelines = even_pipelines()
    assert {one.schedule.name for one in pipelines} == set(SCHEDULES)
    assert {one.overlap for one in pipelines} == {"off", "pairs", "all"}
    for one in [*pipelines, *planned]:
        check(one.schedule)
        seconds = simulate_phases(one.schedule, one.costs, level=one.overlap).makespan
        assert 0.5 < seconds < 10
        assert len(line(Row(one.check, seconds, seconds, 0.05, 0.0))) <= 80
    names = [f"tiny: {name}, overlap={level}, 16 cores" for name, level in measured.MODEL_ROWS]
    assert all(len(line(Row(name, 10.0, 10.0, 0.15, 0.0))) <= 80 for name in names)


def test_planned_stages_are_uneven(planned: list[Slept]) -> None:
    """The rows of DeepSeek-V3 sleep for the planner's own seconds: of the first stage less, of the last one more."""
    one = next(found for found in planned if found.schedule.name == "1f1b")
    links = {one.costs.num_links(stage) for stage in range(one.schedule.num_stages)}
    assert len(links) > 1


def test_measured_alone_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--measured"]) == 2
    assert capsys.readouterr().err == "expertpipe: --measured goes with --validate\n"


def quick_rows() -> list[Row]:
    """Two pipelines of 0.2 ms a chunk."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    chosen = [one for one in even_pipelines(2e-4) if one.schedule.name == "dualpipe"]
    found = list(slept_rows(chosen, dist.get_rank(), repetitions=1))
    dist.destroy_process_group()
    return found


def test_slept_rows_are_the_same_on_every_rank_and_no_faster_than_predicted() -> None:
    found = run_distributed(4, quick_rows)
    assert all(rows == found[0] for rows in found) and len(found[0]) == 3
    assert all(row.measured >= row.predicted > 0 for row in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("words", [("dualpipe", "pairs"), ("zbv", "all"), ("1f1b", "off")])
def test_phases_add_up_to_the_processor_time_of_the_pipeline(words: tuple[str, str], tmp_path: Path) -> None:
    """Each phase is timed while others wait; together they are what the whole pipeline uses, whatever else runs."""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "launcher.plan.measured.rank", str(out), "3", "model", *words]
    from launcher.local import run_local

    assert run_local([], world_size=4, run_dir=tmp_path, threads=1, command=command) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    used, predicted = row["core_seconds"]
    assert predicted == pytest.approx(used, rel=0.2)
    assert sum(row["parts"].values()) == pytest.approx(row["predicted"]) and len(row["parts"]) == 3
    # four ranks on so many cores can be no faster than all of their work on all of the cores
    assert row["predicted"] > predicted / 4


@pytest.mark.slow
def test_ranks_that_fail_are_an_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.plan.measured.rank", str(tmp_path / "out"), "1", "model", "nope", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "parallel.schedule=nope" in done.stderr
