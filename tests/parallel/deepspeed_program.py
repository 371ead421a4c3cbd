"""Run by test_deepspeed_zero1.py in an environment with DeepSpeed: `python -m ... CASE FOLDER` prints what it found.

Each case runs the same training with our ZeRO-1 and with DeepSpeed's.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from launcher.config import RunConfig
from tests.distributed import run_distributed
from tests.launcher.spine import config, parallel_trace, write_tokens

LAYOUT: dict[str, Any] = {"pipeline": 2, "expert": 2, "data": 2}


def with_optim(run_config: RunConfig, **options: Any) -> RunConfig:
    return replace(run_config, optim=replace(run_config.optim, **options))


def largest(first: dict[Any, torch.Tensor], second: dict[Any, torch.Tensor]) -> float:
    """Of all tensors: norm of the difference over the norm."""
    assert first.keys() == second.keys() and first
    worst = 0.0
    for key, tensor in first.items():
        assert tensor.shape == second[key].shape and tensor.dtype == second[key].dtype == torch.float32
        worst = max(worst, float((tensor - second[key]).norm() / tensor.norm().clamp(min=1e-30)))
    return worst


def equality(folder: Path, schedule: str, **options: Any) -> dict[str, Any]:
    """Largest relative difference of each thing over three steps and four ranks."""
    prefix = write_tokens(str(folder / "tokens"))
    run_config = config(prefix, **LAYOUT, schedule=schedule, layers=None if schedule == "1f1b" else (2, 4))
    ours, theirs = run_config, with_optim(run_config, zero1="deepspeed", **options)
    found = dict.fromkeys(("loss", "mtp_loss", "grad_norm", "grad", "weight"), 0.0)
    same = True
    sides = [run_distributed(4, parallel_trace, side) for side in (ours, theirs)]
    for plain, deep in zip(*sides, strict=True):
        for before, after in zip(plain, deep, strict=True):
            for name in ("loss", "mtp_loss", "grad_norm"):
                x, y = getattr(before["result"], name), getattr(after["result"], name)
                found[name] = max(found[name], abs(y / x - 1))
            for name in ("grad", "weight"):
                found[name] = max(found[name], largest(before[name], after[name]))
            same &= all(torch.equal(before["bias"][b], after["bias"][b]) for b in before["bias"])
            same &= before["result"].lr == after["result"].lr and before["result"].lr > 0
    return found | {"biases_equal": same}


def _train_and_save(run_config: RunConfig, steps: int, judge: bool) -> dict[str, torch.Tensor]:
    from launcher.build import build
    from launcher.checkpoint.state import rank_tensors, save
    from launcher.runtime import process_group
    from launcher.step import train_step

    with process_group(run_config.train) as process:
        run = build(run_config, process)
        for step in range(steps):
            train_step(run, (lambda loss, norm: True) if judge or step != 1 else (lambda loss, norm: False))
        state = {key: tensor.clone() for key, tensor in rank_tensors(run)}
        save(run)
        return state


def _load(run_config: RunConfig, path: str) -> dict[str, Any]:
    from launcher.build import build
    from launcher.checkpoint.state import load, rank_tensors
    from launcher.runtime import process_group
    from launcher.step import train_step

    with process_group(run_config.train) as process:
        run = build(run_config, process)
        load(run, Path(path))
        state = {key: tensor.clone() for key, tensor in rank_tensors(run)}
        weights = {name: p.weight.detach().clone() for name, p in run.model.parameters.items()}
        return {"state": state, "weights": weights, "loss": train_step(run).loss, "steps": run.optimizer.steps}


def whole(ranks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stretches of all ranks, `kind/name@offset`, joined to one flat tensor for each `kind/name`."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for state in ranks:
        for key, tensor in state.items():
            name, _, offset = key.rpartition("@")
            parts.setdefault(name, {})[int(offset)] = tensor.flatten()
    return {name: torch.cat([stretches[at] for at in sorted(stretches)]) for name, stretches in parts.items()}


def checkpoints(folder: Path) -> dict[str, Any]:
    """What either wrote, read by the other in another layout; BF16, one step not taken."""
    prefix = write_tokens(str(folder / "tokens"))
    base = config(prefix, **LAYOUT, schedule="dualpipe", layers=(2, 4), run_dir=str(folder / "run"))
    base = with_optim(replace(base, train=replace(base.train, precision="bf16")), moments="bf16")
    other = config(prefix, pipeline=1, expert=2, data=4, schedule="1f1b", run_dir=str(folder / "other"))
    other = with_optim(replace(other, train=replace(base.train, global_batch_size=16)), moments="bf16")
    found: dict[str, Any] = {}
    for name, writer, reader in (
        ("deepspeed_to_plain", with_optim(base, zero1="deepspeed"), other),
        ("plain_to_deepspeed", other, with_optim(base, zero1="deepspeed", offload=True)),
    ):
        written = whole(run_distributed(4, _train_and_save, writer, 3, False))
        path = next(Path(writer.run_dir).glob("checkpoints/step-*"))
        read = run_distributed(4, _load, reader, str(path))
        state = whole([rank["state"] for rank in read])
        rounded = all(
            torch.equal(weight.flatten(), state[f"master/{key}"].bfloat16())
            for rank in read
            for key, weight in rank["weights"].items()
            if weight.numel() == len(state[f"master/{key}"])
        )
        found[name] = {
            "keys": len(written), "equal": written.keys() == state.keys() and all(
                torch.equal(written[key], state[key]) for key in written
            ), "weights_rounded": rounded, "losses": sorted({rank["loss"] for rank in read}),
            "steps": sorted({rank["steps"] for rank in read}),
        }  # fmt: skip
    return found


CASES = {
    "1f1b": lambda folder: equality(folder, "1f1b"),
    "dualpipe": lambda folder: equality(folder, "dualpipe"),
    "offload": lambda folder: equality(folder, "1f1b", offload=True),
    "cpu_adam": lambda folder: equality(folder, "1f1b", offload=True, adamw="deepspeed_cpu"),
    "checkpoints": checkpoints,
}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]](Path(sys.argv[2]))))
