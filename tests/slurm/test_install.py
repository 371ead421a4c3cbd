"""slurm/install.sh: what it asks for, in which order, and what it says is missing; pip and nvcc are stand-ins here."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ("torch", "hydra", "deepspeed", "megatron.core", "transformer_engine_torch", "wandb", "amp_C")
# Writes its words and two variables; says torch's CUDA version; `broken` holds words of calls that fail.
PYTHON = """#!/bin/bash
here="$(dirname "$(dirname "$0")")"
case "$*" in *torch.version.cuda*) [ -f "$here/cuda" ] || exit 1; cat "$here/cuda"; exit;; esac
echo "$* APEX_CUDA_EXT=$APEX_CUDA_EXT ARCH=$TORCH_CUDA_ARCH_LIST CPATH=$CPATH" >> "$here/calls"
while read -r word; do case "$*" in *"$word"*) exit 1;; esac; done < "$here/broken"
exit 0
"""
NVCC = "#!/bin/bash\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n"


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@dataclass(frozen=True)
class Machine:
    """A checkout with an environment, and a CUDA toolkit, that only look like ones."""

    folder: Path

    def calls(self) -> list[str]:
        path = self.folder / ".venv" / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def install(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if key not in ("APEX", "VENV", "TORCH_INDEX", "CPATH")}
        environment = kept | {"CUDA_HOME": str(self.folder / "cuda")} | variables
        command = [str(self.folder / "slurm" / "install.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "slurm").mkdir()
    shutil.copy(ROOT / "slurm" / "install.sh", tmp_path / "slurm")
    executable(tmp_path / ".venv" / "bin" / "python", PYTHON)
    (tmp_path / ".venv" / "broken").write_text("")
    (tmp_path / ".venv" / "cuda").write_text("13.0\n")
    executable(tmp_path / "cuda" / "bin" / "nvcc", NVCC)
    return Machine(tmp_path)


def test_torch_comes_first_and_apex_last(machine: Machine) -> None:
    done = machine.install()
    assert done.returncode == 0, done.stderr
    pip, looked = machine.calls()[:3], machine.calls()[3:]
    pins = "-c constraints.txt -c slurm/constraints.txt"
    assert all(call.startswith("-m pip install") and pins in call for call in pip)
    assert "torch==2.13.0" in pip[0]
    assert "--no-build-isolation -e .[cluster]" in pip[1]
    assert "apex @ git+https://github.com/NVIDIA/apex@" in pip[2] and "--no-build-isolation" in pip[2]
    assert ["APEX_CUDA_EXT=1" in call for call in pip] == [False, False, True]
    assert all("ARCH=9.0 " in call for call in pip) and "nvidia/cudnn/include" in pip[1]
    assert [name for name in MODULES for call in looked if f"'{name}'" in call] == list(MODULES)
    assert "all seven are there" in done.stdout


def test_a_dry_run_says_the_same_and_does_nothing(machine: Machine) -> None:
    done = machine.install("--dry-run")
    assert done.returncode == 0 and machine.calls() == []
    said = [line for line in done.stdout.splitlines() if " pip install " in line]
    assert all(word in line for word, line in zip(("torch==", ".[cluster]", "NVIDIA/apex"), said, strict=True))


def test_everything_missing_is_said_before_anything_is_done(machine: Machine, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / ".venv")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink", "sed"):
        (tools / name).symlink_to(shutil.which(name) or name)
    executable(tools / "python3", "#!/bin/bash\nexit 1\n")
    done = machine.install(PATH=str(tools), CUDA_HOME=str(tmp_path / "none"))
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 4 and not (tmp_path / ".venv").exists()
    words = (f"no nvcc in {tmp_path}/none/bin: load", "no git", "no g++", "python3 is not there, or older than 3.11")
    assert all(word in line for word, line in zip(words, lines, strict=True))


@pytest.mark.parametrize(
    ("cuda", "said"),
    [
        ("13.2\n", "torch is built for CUDA 13.2, nvcc is of 13.0: load CUDA 13.2, or set TORCH_INDEX"),
        ("\n", "torch in .venv is a CPU build"),
    ],
)
def test_a_torch_of_another_cuda_stops_it_before_anything_is_compiled(machine: Machine, cuda: str, said: str) -> None:
    (machine.folder / ".venv" / "cuda").write_text(cuda)
    done = machine.install()
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert len(machine.calls()) == 1 and "torch==2.13.0" in machine.calls()[0]


def test_a_torch_that_does_not_import(machine: Machine) -> None:
    (machine.folder / ".venv" / "cuda").unlink()
    done = machine.install()
    assert done.returncode == 2 and "torch in .venv does not import" in done.stderr and len(machine.calls()) == 1
    assert machine.install("--dry-run").returncode == 0  # not there yet


def test_a_pip_that_fails_ends_it(machine: Machine) -> None:
    (machine.folder / ".venv" / "broken").write_text(".[cluster]\n")
    assert machine.install().returncode != 0 and len(machine.calls()) == 2


def test_what_is_not_there_in_the_end_is_named(machine: Machine) -> None:
    (machine.folder / ".venv" / "broken").write_text("find_spec('amp_C')\n")
    done = machine.install()
    assert done.returncode == 2 and "amp_C is not there after all" in done.stderr and "all seven" not in done.stdout


def test_a_checkout_in_place_of_the_network(machine: Machine) -> None:
    machine.install(APEX="/images/apex", TORCH_INDEX="https://example.org/cu130", TORCH_CUDA_ARCH_LIST="9.0;10.0")
    pip = machine.calls()[:3]
    assert all("--extra-index-url https://example.org/cu130" in call and "ARCH=9.0;10.0" in call for call in pip)
    assert "--no-deps /images/apex" in pip[2]


def test_a_word_that_is_no_option(machine: Machine) -> None:
    done = machine.install("--dry")
    assert done.returncode == 2 and "--dry: no such option" in done.stderr and machine.calls() == []
