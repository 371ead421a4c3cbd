"""Our training step against transformers' DeepseekV3ForCausalLM on the same configuration, interleaved in one process.

    OMP_WAIT_POLICY=PASSIVE python -m tests.bench.peer_step [--json] [--repetitions 5] [overrides]

Every expert implementation of transformers that fits in memory is measured, in BF16 both with BF16 weights and under
autocast with FP32 weights; the best of them is the peer, and takes turns of a few steps with ours. Both sides do
forward, backward, clip and AdamW; the figure is tokens per CPU second of the process. Ours alone: `expertpipe bench
step`.
"""

import argparse
import contextlib
import gc
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

from launcher.bench.step import RandomTokens, build_for_bench, timed
from launcher.check.run import checked
from launcher.runtime import process_group
from launcher.step import tokens_per_step, train_step
from model.convert import published_config

# A third one, batched_mm, copies an expert's weights for every token: 13 GB for one layer of this step.
IMPLEMENTATIONS = ("eager", "grouped_mm")
STEPS_A_TURN = 3


def peer_step(config: Any, implementation: str, *, autocast: bool) -> Callable[[], None]:
    """One training step of the published architecture by transformers and torch's fused AdamW."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    settings: dict[str, Any] = published_config(config.model, "float32")
    settings.pop("rope_scaling")
    settings["experts_implementation"] = implementation
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings))
    low = config.train.precision == "bf16"
    if low and not autocast:
        model = model.bfloat16()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = RandomTokens(config.model.vocab_size, config.data.sequence_length)
    context = torch.autocast("cpu", torch.bfloat16) if low and autocast else contextlib.nullcontext()
    count = 0

    def step() -> None:
        nonlocal count
        windows = tokens.microbatch(
            consumed=count, microbatch=0, data_rank=0, data_size=1, micro_batch_size=config.train.micro_batch_size
        )
        count += 1
        ids = torch.from_numpy(windows)
        with context:
            # The library shifts labels itself: all of the window goes in, one position more than ours computes.
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def cpu_seconds(step: Callable[[], object]) -> list[float]:
    """One turn: a step that is not counted, so that memory left alone during the other's turn is mapped again."""
    step()
    return [timed(step).cpu for _ in range(STEPS_A_TURN)]


def best_peer(config: Any) -> tuple[str, dict[str, float]]:
    """The fastest variant and CPU seconds a step of all, each alone in memory."""
    seconds = {}
    for implementation in IMPLEMENTATIONS:
        for autocast in (False, True) if config.train.precision == "bf16" else (False,):
            step = peer_step(config, implementation, autocast=autocast)
            step()
            seconds[f"{implementation}{' autocast' if autocast else ''}"] = statistics.median(cpu_seconds(step))
            del step
            gc.collect()
    return min(seconds, key=seconds.__getitem__), seconds


def compare(overrides: list[str], *, repetitions: int) -> dict[str, Any]:
    """Tokens per CPU second of both sides, turn by turn."""
    config = checked(["experiment=bench85m", *overrides], with_data=False)
    best, alone = best_peer(config)
    implementation, _, mode = best.partition(" ")
    theirs = peer_step(config, implementation, autocast=mode == "autocast")
    with process_group(config.train) as process:
        run = build_for_bench(config, process)
        sides: dict[str, Callable[[], object]] = {"ours": lambda: train_step(run), best: theirs}
        turns: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(-1, repetitions):
            for name, side in sides.items():
                seconds = statistics.median(cpu_seconds(side))
                if turn >= 0:
                    turns[name].append(seconds)
    tokens = tokens_per_step(run)
    ratios = [peer / ours for ours, peer in zip(turns["ours"], turns[best], strict=True)]
    return {
        "bench": "peer_step",
        "dtype": config.train.precision,
        "tokens_per_cpu_second": {name: tokens / statistics.median(times) for name, times in turns.items()},
        "peers_alone": {name: tokens / seconds for name, seconds in alone.items()},
        "best_peer": best,
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "repetitions": repetitions,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    row = compare(arguments.overrides, repetitions=arguments.repetitions)
    if arguments.json:
        print(json.dumps(row))
    else:
        for side, value in row["tokens_per_cpu_second"].items():
            print(f"{side:<28}{value:8.1f} tokens per CPU second")
        low, high = row["ratio_spread"]
        print(f"ours / {row['best_peer']}: {row['ratio']:.2f} ({low:.2f} to {high:.2f}), {row['dtype']}")
