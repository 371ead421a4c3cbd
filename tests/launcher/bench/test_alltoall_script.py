"""slurm/bench_alltoall.sbatch with stand-ins for srun and the measurement: what it asks for, what a failure does."""

import json
import os
import shutil
import subprocess
from pathlib import Path

SLURM = Path(__file__).parents[3] / "slurm"
SRUN = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
PYTHON = """#!/bin/bash
[[ "$*" == *doctor* ]] && exit 0
[[ "$*" == *"--backend flat native "* ]] && { echo "expertpipe: native is not built" >&2; exit 2; }
echo "table of $*"
echo "{\\"command\\": \\"$*\\"}" >>"$(sed "s/.*--rows \\([^ ]*\\).*/\\1/" <<<"$*")"
"""


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for name, text in (("srun", SRUN), ("python", PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "slurm").mkdir(exist_ok=True)
    for name in ("bench_alltoall.sbatch", "env.sh"):
        shutil.copy(SLURM / name, folder / "slurm")
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
    env.pop("SLURM_SUBMIT_DIR", None)
    command = ["bash", "slurm/bench_alltoall.sbatch", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_every_back_end_and_a_failure_in_between(tmp_path: Path) -> None:
    result = run(tmp_path, "--repeats", "3", SLURM_JOB_ID="7", SLURM_NTASKS="64", SLURM_NNODES="8")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line)["command"] for line in (tmp_path / "alltoall-7.jsonl").read_text().splitlines()]
    asked = [row.split("--backend ")[1].split(" --num")[0] for row in rows]
    assert asked == [
        "flat --dtype bf16", "flat collective --dtype fp8", "flat collective --dtype bf16", "flat deepep --dtype fp8",
        "flat deepep --dtype bf16",
    ]  # fmt: skip
    sizes = "--num-tokens 4096 --hidden 7168 --experts 256 --topk 8 --groups 8 --topk-groups 4"
    assert all(row.endswith(f"{sizes} --rows alltoall-7.jsonl --repeats 3") for row in rows)
    assert result.stdout.count("table of") == 5
    assert "== native, fp8: not measured" in result.stdout and "native is not built" in result.stderr
    assert "64 ranks on 8 nodes" in result.stdout


def test_nothing_measured_is_a_failure(tmp_path: Path) -> None:
    result = run(tmp_path, BACKENDS="native", DTYPES="fp8")
    assert result.returncode == 1
    assert "== 0 measured" in result.stdout
