"""What is submitted, and what is refused before Slurm is asked: with stand-ins for Slurm's commands."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.submit.partitions import Demand, Partition, merged, parse, problems, seconds
from launcher.submit.script import folder, job_script
from tests.slurm.jobs import prepared

SINFO = "main*|up|4|gpu:h100:8(S:0-1)|96|infinite\\nshort|up|1|gpu:8|96|5:00\\nold|down|9|(null)|64+|1-00:00:00"
MAIN = Partition("main", True, True, 4, 8, 96, "infinite")
THERE = [
    MAIN,
    Partition("short", False, True, 1, 8, 96, "5:00"),
    Partition("old", False, False, 9, 0, 64, "1-00:00:00"),
]
WORDS = "there are main (4 nodes of 8 GPUs, no time limit), short (1 node of 8 GPUs, at most 5:00), "
WORDS += "old (9 nodes without GPUs, at most 1-00:00:00, down)"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands that stand in for Slurm's; the file in which sbatch writes what it was asked."""
    asked = tmp_path / "asked"
    for name, script in {"sinfo": f"printf '{SINFO}\\n'", "sbatch": f'echo "$@" >>{asked}; echo 17'}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that names a small prepared training set."""
    return f"data.prefix={prepared(tmp_path_factory.mktemp('data'))}"


def test_a_run_is_planned_written_and_submitted(slurm: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=tiny", data, "run_dir=out/ab", "cluster=h100"]
    code = main(["submit", *words, "--time", "60", "--preflight", "--sbatch=--comment=try 1"])
    out, err = capsys.readouterr()
    assert code == 0, err
    path = Path("out/ab/train.sbatch").absolute()
    assert slurm.read_text() == f"--parsable {path}\n"
    assert "memory of pipeline rank 0, the fullest: " in out and ", fits" in out
    tail = out.partition("\njob 17: ")[2]
    for file in ("slurm-17.log", "events.jsonl", "faults.jsonl", "train.sbatch"):
        assert str(path.parent / file) in tail
    text = path.read_text()
    directives = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    for wanted in (
        "nodes=1", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=24", "requeue", "time=60", "exclusive",
        "signal=B:USR1@300", "job-name=tiny", f'output={path.parent}/slurm-%j.log', 'comment="try 1"',
    ):  # fmt: skip
        assert directives.count(wanted) == 1, (wanted, directives)
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    given = next(line for line in text.splitlines() if line.startswith("set -- "))
    assert shlex.split(given)[2:] == words[:3]
    assert f"export EXPERTPIPE_SLURM={folder()}" in text and "export EXPERTPIPE_PREFLIGHT=1" in text


def test_a_dry_run_writes_nothing(slurm: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "experiment=tiny", data, "run_dir=out", "cluster=h100", "--dry-run", "--torchrun"]) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --ntasks-per-node=1\n" in out and "export EXPERTPIPE_PROCESSES_PER_NODE=4" in out
    assert out.endswith("not submitted (--dry-run)\n")
    assert not slurm.exists() and not Path("out").exists()


def test_everything_wrong_is_said_at_once(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=tiny", "train.stepps=3", "parallel.expert=3", "cluster=h10", "--partition", "nope"]
    assert main(["submit", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("expertpipe: train.stepps: no such key; did you mean train.steps?")
    assert any("parallel.expert=3 does not divide" in line for line in lines)
    assert any("cluster=h10: no such GPU; use h100, h200, h800" in line for line in lines)
    assert lines[-1] == f"expertpipe: --partition nope: no such partition; {WORDS}"


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ("1.5e9", "pipeline rank 0 would hold 1.6 GiB, H100 has 1.4 GiB"),
        ("1e5", "H100 has 0.1 MiB"),
    ],
)
def test_memory_that_does_not_fit_is_refused_with_the_rest(
    slurm: Path, data: str, capsys: pytest.CaptureFixture[str], memory: str, words: str
) -> None:
    gpu = (folder().parent / "configs" / "cluster" / "h100.yaml").read_text().replace("84943110144", memory)
    Path("small.yaml").write_text(gpu)
    run = ["submit", "experiment=tiny", data, "run_dir=out", "cluster=small.yaml"]
    assert main(run) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and words in said[0], said
    assert not slurm.exists() and not Path("out").exists()
    assert main([*run, "--partition", "nope"]) == 2
    both = capsys.readouterr().err.splitlines()
    assert both == [*said, f"expertpipe: --partition nope: no such partition; {WORDS}"]
    if "would hold" in words:
        assert "--accept-memory" in said[0] and main([*run, "--accept-memory"]) == 0 and slurm.exists()


def test_without_slurm_it_is_one_line(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["submit", "experiment=tiny", data, f"run_dir={tmp_path}/out", "cluster=h100"]
    assert main(words) == 2
    line = "Slurm's commands (sinfo, sbatch) are not here: submit from a machine of the cluster"
    assert capsys.readouterr().err == f"expertpipe: {line}\n"
    assert main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().err == f"partitions not checked: {line}\n"


def test_what_sbatch_says_is_handed_on(slurm: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    (slurm.parent / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2; exit 1\n")
    assert main(["submit", "experiment=tiny", data, "run_dir=out", "cluster=h100"]) == 2
    assert (
        capsys.readouterr().err
        == f"expertpipe: sbatch refuses {Path('out/train.sbatch').absolute()}: Invalid account\n"
    )


@pytest.mark.parametrize(
    ("name", "demand", "found"),
    [
        (None, Demand(4, 8, "100"), []),
        ("short", Demand(1, 8, "5"), []),
        ("short", Demand(2, 0), [f"the run needs 2 nodes, partition short does not have them; {WORDS}"]),
        (None, Demand(1, 9), [f"the run needs 1 node with 9 GPUs each, partition main does not have them; {WORDS}"]),
        ("short", Demand(1, 8, "6"), ["--time 6 is more than partition short allows: use 5:00 or less"]),
        (None, Demand(1, 1, "soon"), ["--time soon: write minutes, HH:MM:SS or D-HH:MM:SS"]),
        ("old", Demand(1, 0), [f"partition old is down; {WORDS}"]),
        ("nope", None, [f"--partition nope: no such partition; {WORDS}"]),
    ],
)
def test_partitions(name: str | None, demand: Demand | None, found: list[str]) -> None:
    assert problems(name, THERE, demand) == found


def test_lines_of_sinfo() -> None:
    assert [parse(line) for line in SINFO.split("\\n")] == THERE
    kinds = [parse("mixed|up|2|(null)|64|1:00:00"), parse("mixed|up|3|gpu:a100:4|64|1:00:00")]
    assert merged(kinds) == [kinds[1]]
    assert problems(None, [kinds[0]], None)[0].startswith("no default partition: give --partition; there are mixed")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-00:00:00", 172800), ("1-12", 129600), ("1-1:30", 91800),
     ("infinite", float("inf")), ("soon", None), ("", None)],
)  # fmt: skip
def test_times_of_slurm(text: str, expected: float | None) -> None:
    assert seconds(text) == expected


def test_the_script_keeps_what_is_not_replaced() -> None:
    template = '#!/bin/bash\n# Why.\n#SBATCH --a=1\n#SBATCH --b\n#SBATCH --c=3\n\nrun "$@"\n'
    made = job_script(template, directives={"a": "2", "c": None, "d": ""}, overrides=["x='y z'"], exports={"E": "1 2"})
    lines = made.splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")] == ["#SBATCH --a=2", "#SBATCH --b", "#SBATCH --d"]
    assert lines[0] == "#!/bin/bash" and lines[-1] == 'run "$@"'
    assert lines.index("export E='1 2'") < lines.index('run "$@"')
    assert shlex.split(next(line for line in lines if line.startswith("set --")))[2:] == ["x='y z'"]
