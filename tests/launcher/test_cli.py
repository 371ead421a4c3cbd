"""The command line: mistakes are one line each and exit code 2, nothing heavy is imported, launchers are understood."""

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import __main__ as cli
from launcher.__main__ import COMMANDS, main
from launcher.config import ConfigError
from launcher.start import outer_world_size, slurm_environment

ROOT = Path(__file__).parents[2]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def stub(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    fake = types.ModuleType(module)
    for name, function in functions.items():
        setattr(fake, name, function)
    monkeypatch.setitem(sys.modules, module, fake)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES} | environment
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)


def child_cpu_seconds() -> float:
    """CPU time of the processes that have ended: unlike wall time not a matter of what else the machine does."""
    times = os.times()
    return times.children_user + times.children_system


def test_help_lists_the_commands_at_once() -> None:
    start = child_cpu_seconds()
    result = run("--help")
    assert child_cpu_seconds() - start < 2
    assert result.returncode == 0
    for name in ("train", "demo", "prepare", "score", "generate", "bench", "doctor", "checkpoint"):
        assert f"\n  {name} " in result.stdout


def test_bad_config_is_a_short_list_within_5_seconds_without_traceback() -> None:
    start = child_cpu_seconds()
    result = run("train", "experiment=tiny", "parallel.pipelin=4", "parallel.expert=3", "data.prefix=no/where")
    assert child_cpu_seconds() - start < 5
    assert (result.returncode, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 4 and all(line.startswith("expertpipe: ") for line in lines)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "experiment=tiny", "parallel.expert=3"], ["train", "--cfg"]]
)
def test_no_torch(arguments: list[str]) -> None:
    code = (
        "import contextlib, io, sys\nfrom launcher.__main__ import main\n"
        "with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):\n"
        f"    main({arguments!r})\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: expertpipe" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("expertpipe: trian: no such command; use train")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"usage: expertpipe {name}" in capsys.readouterr().out


def test_argparse_errors_are_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score"]) == 2
    assert main(["train", "--nonsense"]) == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--cfg", "--print-config"])
def test_print_config_between_overrides(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=tiny", flag, "train.steps=7"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["train"]["steps"] == 7 and tree["parallel"]["schedule"] == "dualpipe"


def test_only_rank_0_complains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "experiment=tiny"]) == 2
        assert bool(capsys.readouterr().err) == (rank == "0")


class FakeTrain:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        stub(monkeypatch, "launcher.train", train=lambda config: self.calls.append(config) or 0)
        stub(monkeypatch, "launcher.local", run_local=lambda argv, **rest: self.calls.append((argv, rest)) or 75)
        monkeypatch.setattr("launcher.check.run.check_data", lambda config: [])


def test_train_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTrain(monkeypatch)
    assert main(["train", "experiment=tiny", "train.threads=3"]) == 75
    ((argv, rest),) = fake.calls
    assert argv == ["train", "experiment=tiny", "train.threads=3"]
    assert rest == {"world_size": 4, "run_dir": Path("runs/tiny"), "threads": 3}


def test_train_of_one_process_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTrain(monkeypatch)
    assert main(["train", "experiment=single"]) == 0
    assert fake.calls[0].name == "single"


def test_train_under_torchrun_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTrain(monkeypatch)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "experiment=tiny"]) == 0
    assert fake.calls[0].parallel.world_size == 4


def test_check_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeTrain(monkeypatch)
    assert main(["train", "experiment=tiny", "--check"]) == 0
    assert "needs 4 processes" in capsys.readouterr().out and not fake.calls


class MarkedError(ValueError):
    user_error = True


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file", "a/b"), "expertpipe: a/b: no such file or directory\n"),
        (FileNotFoundError("no checkpoint in x"), "expertpipe: no checkpoint in x\n"),
        (MarkedError("two\nlines"), "expertpipe: two lines\n"),
        (ConfigError(["a", "b"]), "expertpipe: a\nexpertpipe: b\n"),
    ],
)
def test_user_errors_of_any_command(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**arguments: Any) -> int:
        raise error

    stub(monkeypatch, "launcher.commands.generate", generate=fail)
    assert main(["generate", "--checkpoint", "c"]) == 2
    assert capsys.readouterr().err == line


def test_token_file_errors_are_user_errors() -> None:
    from data.tokens import TokenFileError

    assert cli.is_user_error(TokenFileError("x"))
    assert not cli.is_user_error(ValueError("x"))


def test_a_defect_keeps_its_traceback_and_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(argv: list[str]) -> int:
        raise ValueError("defect")

    def interrupt(argv: list[str]) -> int:
        raise KeyboardInterrupt

    stub(monkeypatch, "launcher.bench.step", bench_step_command=defect)
    with pytest.raises(ValueError, match="defect"):
        main(["bench", "step"])
    stub(monkeypatch, "launcher.bench.step", bench_step_command=interrupt)
    assert main(["bench", "step"]) == 130


def test_commands_hand_their_arguments_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda *args, **kwargs: seen.update({name: args or kwargs}) or 0

    stub(monkeypatch, "launcher.commands.demo", demo=note("demo"))
    stub(monkeypatch, "launcher.commands.score", score=note("score"))
    stub(monkeypatch, "launcher.checkpoint.hf_commands", import_hf=note("import"), export_hf=note("export"))
    stub(monkeypatch, "data.prepare", prepare=note("prepare"))
    assert main(["demo", "--corpus", "full"]) == 0
    assert main(["score", "--checkpoint", "c", "--tokens", "t.npy", "--json"]) == 0
    assert main(["checkpoint", "import-hf", "a", "b"]) == main(["checkpoint", "export-hf", "c", "d"]) == 0
    assert main(["prepare", "--corpus", "full", "--vocab-size", "8192"]) == 0
    assert seen["demo"] == (["--corpus", "full"],)
    paths = {"checkpoint": Path("c"), "tokens": Path("t.npy"), "logits": None}
    assert seen["score"] == {**paths, "as_json": True, "ema": False}
    assert (seen["import"], seen["export"]) == ((Path("a"), Path("b")), (Path("c"), Path("d")))
    assert seen["prepare"] == {
        "corpus": "full",
        "out_dir": Path("runs/data/full"),
        "vocab_size": 8192,
        "progress": print,
    }


STEP = {
    "SLURM_STEP_ID": "3", "SLURM_JOB_ID": "1001", "SLURM_NTASKS": "11", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NODELIST": "n1,n2,n3",
}  # fmt: skip


def test_slurm_step_becomes_torchruns_variables() -> None:
    assert slurm_environment(STEP) == {
        "RANK": "9",
        "WORLD_SIZE": "11",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": str(20000 + (1001 * 16 + 3) % 10000),
    }
    kept = slurm_environment({**STEP, "MASTER_ADDR": "ib0", "MASTER_PORT": "5"})
    assert (kept["MASTER_ADDR"], kept["MASTER_PORT"]) == ("ib0", "5")


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": ""},
        {"SLURM_STEP_ID": "4294967291"},  # the batch script itself
        {"SLURM_STEP_ID": "4294967290"},  # an interactive step
        {"SLURM_NTASKS": "1"},
        {"RANK": "0"},  # torchrun inside srun
    ],
)
def test_no_slurm_step_of_several_tasks(change: dict[str, str]) -> None:
    assert slurm_environment({**STEP, **change}) == {}


def test_compressed_node_lists_are_read_by_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {**STEP, "SLURM_STEP_NODELIST": "gpu[07-09]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"SLURM_STEP_NODELIST=gpu\[07-09\].*set MASTER_ADDR"):
        slurm_environment(env)
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames gpu[07-09]" ] && echo gpu07 && echo gpu08\n')
    script.chmod(0o755)
    assert slurm_environment(env)["MASTER_ADDR"] == "gpu07"


def test_outer_world_size() -> None:
    assert outer_world_size({}) is None
    assert outer_world_size({"WORLD_SIZE": "4"}) is None
    assert outer_world_size({"RANK": "1", "WORLD_SIZE": "4"}) == 4
    with pytest.raises(ConfigError, match="RANK=x: expected a whole number"):
        outer_world_size({"RANK": "x", "WORLD_SIZE": "4"})
