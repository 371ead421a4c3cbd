"""Every experiment by name: composed, checked, planned, its recipe printed; the 671B topology really run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.check.run import problems
from launcher.config import choices, compose
from launcher.recipe import phase_of
from launcher.record.events import read
from optim.schedule import value_at
from tests.launcher.checkpoint.states import prepared

ROOT = Path(__file__).parents[2]
NAMED = {
    "tiny", "demo", "moe_16b_h100x8", "deepseek_v3", "deepseek_v3_32k", "deepseek_v3_128k", "deepseek_v3_2048_h800",
    "deepseek_v3_1024_h100", "smoke_671b_shape",
}  # fmt: skip
SMALL = {"tiny", "demo", "single", "bench85m", "smoke_671b_shape"}
NOT_TO_LEARN = {"bench85m", "smoke_671b_shape"}  # a few steps: a measurement, and whether a shape runs at all
FUSED_ON_A_GPU = {"torch_fused", "apex", "transformer_engine"}
GPU_RUNS = [name for name in choices("experiment") if compose([f"experiment={name}"]).train.device == "cuda"]


def test_the_named_ones_are_there() -> None:
    assert set(choices("experiment")) >= NAMED | SMALL


def test_each_has_a_folder_of_its_own() -> None:
    """A run continues what lies in its folder; init_from names the folder of another."""
    folders = {name: compose([f"experiment={name}"]).run_dir for name in choices("experiment")}
    assert len(set(folders.values())) == len(folders), folders


@pytest.mark.parametrize("name", GPU_RUNS)
def test_a_gpu_updates_the_weights_in_few_kernels(name: str) -> None:
    optim = compose([f"experiment={name}"]).optim
    assert optim.adamw in FUSED_ON_A_GPU or (optim.adamw, optim.offload) == ("deepspeed_cpu", True)


@pytest.mark.parametrize("name", sorted(set(choices("experiment")) - NOT_TO_LEARN))
def test_the_highest_learning_rate_is_reached(name: str) -> None:
    config = compose([f"experiment={name}"])
    highest = max(segment.value for segment in config.optim.lr)
    assert max(value_at(config.optim.lr, values.tokens) for values in phase_of(config).boundaries) == highest


@pytest.mark.parametrize("name", GPU_RUNS)
def test_the_logs_of_a_long_run_stay_small(name: str) -> None:
    """Below a GB of expert counts in events.jsonl, and few appends to the ranks' files, which share a file system."""
    config = compose([f"experiment={name}"])
    train, model = config.train, config.model
    blocks = model.num_moe_layers + model.num_nextn_predict_layers
    assert train.steps / train.expert_counts_every * blocks * model.n_routed_experts * 9 < 1e9  # 9 bytes a number
    assert train.steps / train.rank_events_every * config.parallel.world_size < 1e7


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in choices("experiment")]
)
def test_composed_checked_planned_and_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose([f"experiment={name}"])
    assert problems(config, None, with_data=False, here=False) == []
    assert main(["plan", f"experiment={name}", "--cluster", "h100" if "h100" in name else "h800", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["gpus"] == config.parallel.world_size and len(plan["memory_bytes_per_rank"]) == config.parallel.pipeline
    assert plan["step_seconds"] > 0 and min(plan["memory_bytes_per_rank"]) > 0
    assert plan["fits"] or name not in SMALL
    assert sum(plan["layers_per_stage"]) == config.model.num_hidden_layers
    assert main(["recipe", f"experiment={name}"]) == 0
    assert capsys.readouterr().out.startswith(f"{config.name}: ")


@pytest.mark.slow
def test_the_671b_topology_runs_on_four_processes(tmp_path: Path) -> None:
    """61 layers, 256 experts in 8 groups and MTP, through DualPipe, expert parallelism and ZeRO-1."""
    command = [
        sys.executable, "-m", "launcher", "train", "experiment=smoke_671b_shape", "train.device=cpu",
        f"run_dir={tmp_path}/run", f"data.prefix={prepared(tmp_path / 'data')}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    events = read(tmp_path / "run" / "events.jsonl")
    assert [event.step for event in events] == [1, 2, 3]
    assert all(len(event.expert_load) == 58 + 1 and event.dropped_tokens == 0 for event in events)  # MTP's module too
    assert events[0].loss == pytest.approx(math.log(4096), abs=0.2)
    assert all(math.isfinite(event.loss) and event.grad_norm > 0 for event in events)
