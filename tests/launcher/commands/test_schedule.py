"""`expertpipe schedule`: text in 80 columns, every file format, plan beside run, and refusals that say what works."""

import json
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.commands.schedule import RequestError, parse_costs
from parallel.pipeline.csv_format import read
from parallel.pipeline.schedules import SCHEDULES, build
from parallel.pipeline.simulate import Costs
from tests.launcher.record.test_measured import write
from tests.launcher.show.test_timeline import png_size

SHAPE = ["--pipeline", "4", "--microbatches", "10"]


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["schedule", *argv]) == 0
    text = capsys.readouterr().out
    # the lines that name a file are as long as its path
    assert max(len(line) for line in text.splitlines() if not line.startswith("wrote ")) <= 80
    return text


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["schedule", *argv]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", SCHEDULES)
def test_text_has_a_line_for_each_rank_and_the_figures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, name, *SHAPE).splitlines()
    assert lines[0].startswith(f"{name}: 4 ranks (")
    assert lines[1].startswith("makespan ") and "bubble" in lines[1] and "live activations" in lines[1]
    assert sum(line.startswith("rank ") for line in lines) == 4


def test_figures_are_those_of_the_closed_forms(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "dualpipe", "--pipeline", "8", "--microbatches", "20")
    assert "makespan 66  bubble 9.1%  live activations 9 " in text
    text = output(capsys, "zbv", "--pipeline", "16", "--microbatches", "32", "--costs", "F=2,I=2,W=2")
    assert "makespan 207 " in text and "live activations 32 (of 1/2 rank)" in text
    a2a = "F=2,I=2,W=2,F_comm=2,I_comm=2"
    text = output(capsys, "dualpipe", "--pipeline", "16", "--microbatches", "32", "--costs", a2a, "--overlap", "all")
    assert "makespan 256.8 " in text
    a2a = "F=2,I=2,W=2,F_comm=2,I_comm=2,hidden=0.5"
    assert "makespan 261 " in output(capsys, "dualpipe", "--pipeline", "16", "--microbatches", "32", "--costs", a2a)


def test_all_files_are_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = {kind: tmp_path / "new" / f"s.{kind}" for kind in ("png", "html", "perfetto", "csv")}
    text = output(
        capsys, "dualpipev", *SHAPE, *(part for kind, path in files.items() for part in (f"--{kind}", str(path)))
    )
    assert text.count("wrote ") == 4
    assert png_size(files["png"])[0] == 1600
    page = files["html"].read_text()
    assert "F stage 0 micro-batch 0" in page and "@" not in page.replace("@media", "")
    assert "http" not in page and "src=" not in page  # nothing is fetched
    schedule = build("dualpipev", num_ranks=4, num_microbatches=10)
    assert read(files["csv"].read_text(), name="dualpipev") == schedule
    events = json.loads(files["perfetto"].read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {
        "plan",
        *(f"rank {r}" for r in range(4)),
    }
    assert [e["name"] for e in events if e["ph"] == "X" and e["tid"] == 2] == [str(step) for step in schedule.ranks[2]]


def test_two_directions_in_csv_are_announced_and_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "dual.csv"
    assert "torch has no placement for two directions" in output(capsys, "dualpipe", *SHAPE, "--csv", str(path))
    assert "(mirror), 10 micro-batches" in output(capsys, str(path))


def test_plan_and_run_are_drawn_above_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path / "run", build("dualpipe", num_ranks=4, num_microbatches=10), Costs(2.0, 2.0, 2.0), steps=2)
    trace = tmp_path / "t.json"
    lines = output(capsys, "dualpipe", *SHAPE, "--measured", str(tmp_path / "run")).splitlines()
    assert lines[2] == "measured 64 ms, 1.000 of the plan"
    labels = [line.split()[:2] for line in lines if line[:1].isdigit()]
    assert labels == [[str(rank), what] for rank in range(4) for what in ("plan", "run")]
    plan, run = (line[7:] for line in lines if line.startswith("2 "))
    assert plan == run
    measured = ["--measured", str(tmp_path / "run"), "--costs", "F=1", "--step", "0", "--perfetto", str(trace)]
    text = output(capsys, "dualpipe", *SHAPE, *measured)
    assert "measured 64 ms" in text and "1.000 of the plan" not in text
    assert {event["pid"] for event in json.loads(trace.read_text())["traceEvents"]} == {0, 1}


def test_auto_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "auto", "--pipeline", "16", "--microbatches", "32", "--layers", "61")
    assert "zbv is the fastest, " in text and "zbv: 16 ranks (v, 32 stages), 32 micro-batches" in text
    text = output(capsys, "auto", *SHAPE, "--layers", "4")
    assert "zbv: 8 stages for 4 layers" in text


def test_shape_and_costs_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "auto", "experiment=tiny", "train.device=cpu")
    assert "2 ranks" in text and "8 micro-batches" in text
    assert "16 ranks (mirror), 120 micro-batches" in output(
        capsys, "dualpipe", "experiment=deepseek_v3_2048_h800", "train.device=auto"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dualpipe", "--pipeline", "7", "--microbatches", "9"], "must be even, not 7: use 6 or 8 ranks, or dualpipev"),
        (["zigzag", *SHAPE], "schedule 'zigzag' does not exist: choose from gpipe"),
        (["dualpipe"], "--pipeline is missing: give both numbers"),
        (["1f1b", *SHAPE, "--stages-per-rank", "2"], "1f1b has 1 stage a rank, not 2: use 1, or interleaved"),
        (["1f1b", *SHAPE, "--costs", "X=1"], "--costs X=1: use F, I, W, message"),
        (["1f1b", *SHAPE, "--costs", "F=a"], "'a' is not a number"),
        (["1f1b", *SHAPE, "--costs", "F=1/2/3"], "--costs F has 3 numbers, 1f1b on 4 ranks has 4 stages: give"),
        (["1f1b", *SHAPE, "--costs", "hidden=2"], "--costs hidden=2: use one number from 0 to 1"),
        (["1f1b", *SHAPE, "--costs", "F=-1"], "--costs F=-1: use numbers from 0"),
        (["nothing.csv"], "nothing.csv: No such file or directory: give the path"),
        (["1f1b", *SHAPE, "--measured", "nowhere"], "nowhere"),
        (["auto", *SHAPE, "--layers", "3"], "--layers=3 is fewer than --pipeline=4"),
        (["1f1b", "experiment=tiny", "train.device=cpu", "--pipeline", "3"], "--pipeline=3, but the run that was"),
        (["1f1b", "experiment=tiny", "parallel.quux=1"], "parallel.quux: no such key"),
        (["1f1b", *SHAPE, "--overlap", "all", "--costs", "F=1/1/1/2"], "--overlap=all: phases need the same costs"),
        (["1f1b", *SHAPE, "--overlap", "all", "--costs", "hidden=0.5"], "leave hidden, pair_hidden and overlap out"),
        (["1f1b", "--pipeline", "0", "--microbatches", "2"], "at least 1 rank and 1 micro-batch"),
    ],
)  # fmt: skip
def test_impossible_requests_say_what_works(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert message in refusal(capsys, *argv)


def test_costs_are_parsed() -> None:
    assert parse_costs("") == Costs()
    assert parse_costs("F=1/2,message=0.5,W=0") == Costs((1.0, 2.0), 1.0, 0.0, 0.5)
    with pytest.raises(RequestError, match="message"):
        parse_costs("message=1/2")


def test_many_ranks_ask_for_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert "65 ranks are too many for text" in output(capsys, "1f1b", "--pipeline", "65", "--microbatches", "2")
