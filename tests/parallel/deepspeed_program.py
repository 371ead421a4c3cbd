"""Run by test_deepspeed_zero1.py in an environment with DeepSpeed: `python -m ... CASE FOLDER` prints what it found.

Each case runs the same training with our ZeRO-1 and with DeepSpeed's.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.build import ZERO1
from launcher.config import RunConfig
from model.weight_grad import accumulate
from optim.adamw import AdamW
from optim.config import OptimConfig
from parallel.bucket import LocalParameter
from tests.distributed import run_distributed
from tests.launcher.checkpoint.states import VOCAB, prepared, session, whole
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


def checkpoints(folder: Path) -> dict[str, Any]:
    """What either wrote, read by the other in another layout: BF16 weights and moments."""
    prefix = prepared(folder / "data")
    deep = config(prefix, **LAYOUT, schedule="dualpipe", layers=(1, 3), microbatches=4, model=VOCAB)
    deep = replace(deep, train=replace(deep.train, precision="bf16"))
    plain = replace(deep, parallel=replace(deep.parallel, pipeline=1, data=4, schedule="1f1b", layers_per_stage=None))
    plain = replace(plain, train=replace(plain.train, global_batch_size=16))
    deep, plain = with_optim(deep, moments="bf16", zero1="deepspeed"), with_optim(plain, moments="bf16")
    found: dict[str, Any] = {}
    for name, writer, reader in (
        ("deepspeed_to_plain", deep, plain),
        ("plain_to_deepspeed", plain, with_optim(deep, offload=True)),
    ):
        writer = replace(writer, run_dir=str(folder / name))
        reader = replace(reader, run_dir=str(folder / f"{name}_again"))
        written = whole([states[-1] for states in run_distributed(4, session, writer, 2, None)])
        path = max(Path(writer.run_dir).glob("checkpoints/step-*"))
        ranks = run_distributed(4, session, reader, 1, str(path))
        read, after = (whole([states[at] for states in ranks]) for at in (0, 1))
        equal = all(
            torch.equal(tensor, read.tensors[kind][key])
            for kind, tensors in written.tensors.items() for key, tensor in tensors.items()
        )  # fmt: skip
        found[name] = {
            "equal": equal and written.tensors.keys() == read.tensors.keys() and written.progress == read.progress,
            "steps": [read.optimizer_steps, after.optimizer_steps], "loss": after.loss, "loss_before": written.loss,
            "moved": any(not torch.equal(t, after.tensors["master"][key]) for key, t in read.tensors["master"].items()),
        }  # fmt: skip
    return found


def three_ranks(kind: str, dtype: torch.dtype, offload: bool) -> list[list[torch.Tensor]]:
    """One rank's reduced gradients, weights, masters and moments after each of four steps, the third not taken.

    Buckets over three ranks and over two of them, BF16 moments, masters written from outside at the end.
    """
    dist.init_process_group("gloo")
    rank, draw = dist.get_rank(), torch.Generator().manual_seed(0)
    every, pair = dist.new_group([0, 1, 2]), dist.new_group([0, 1])
    shapes = [("a", (30, 7), every), ("b", (5,), every), ("c", (100, 3), every), ("e", (11, 4), pair)]
    parameters = [
        LocalParameter(name, torch.nn.Parameter(torch.randn(shape, generator=draw)), shape, 0, group, len(shape) > 1)
        for name, shape, group in shapes[: 4 if rank < 2 else 3]
    ]
    zero1 = ZERO1[kind](parameters, dtype=dtype, offload=offload)
    buckets = zero1.buckets
    optimizer = AdamW(
        [b.master for b in buckets], [b.step_grad for b in buckets], [b.decay for b in buckets], OptimConfig()
    )
    found = []
    for step in range(4):
        noise = torch.Generator().manual_seed(step * 10 + rank)
        for p in parameters:
            accumulate(p.weight, partial(torch.Tensor.add_, other=torch.randn(p.shape, generator=noise)))
        zero1.reduce_gradients()
        found.append([bucket.grad.clone() for bucket in buckets])
        if step != 2:
            zero1.update(optimizer, lr=1e-2, grad_scale=0.5)
            zero1.publish_update()
        zero1.zero_gradients()
        found[-1] += [p.weight.detach().float() for p in parameters] + [b.master.clone() for b in buckets]
        found[-1] += [moment.float() for shard in optimizer.shards for moment in (shard.exp_avg, shard.exp_avg_sq)]
    for bucket in buckets:
        bucket.master.add_(1)  # as a checkpoint that is read does
    zero1.publish_weights()
    found.append([p.weight.detach().float() for p in parameters])
    dist.destroy_process_group()
    return found


def buckets(folder: Path) -> dict[str, Any]:
    """Largest difference of anything from our ZeRO-1, by kind."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        expected = run_distributed(3, three_ranks, "plain", dtype, False)
        for kind, offload in (("plain", True), ("deepspeed", False), ("deepspeed", True)):
            ranks = run_distributed(3, three_ranks, kind, dtype, offload)
            pairs = [
                (x, y) for before, after in zip(expected, ranks, strict=True)
                for one, other in zip(before, after, strict=True) for x, y in zip(one, other, strict=True)
            ]  # fmt: skip
            key = f"{kind} {dtype} {'offload' if offload else ''}".strip()
            found[key] = max(float((x - y).abs().max()) for x, y in pairs)
    return found


CASES = {
    "1f1b": lambda folder: equality(folder, "1f1b"),
    "dualpipe": lambda folder: equality(folder, "dualpipe"),
    "offload": lambda folder: equality(folder, "1f1b", offload=True),
    "cpu_adam": lambda folder: equality(folder, "1f1b", offload=True, adamw="deepspeed_cpu"),
    "checkpoints": checkpoints,
    "buckets": buckets,
}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]](Path(sys.argv[2]))))
