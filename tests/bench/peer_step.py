"""Our training step against transformers' DeepseekV3ForCausalLM on the same configuration, each in its own process.

    OMP_WAIT_POLICY=PASSIVE python -m tests.bench.peer_step [--json] [--repetitions 5] [overrides]

Every expert implementation of transformers that fits in memory is measured, in BF16 both with BF16 weights and under
autocast with FP32 weights; the best of them is the peer, and takes turns of a few steps with ours. The side whose turn
it is not sleeps on a pipe. Processes of their own, because what one side sets for a whole process (ours: how glibc
keeps freed memory) would otherwise serve the other too. Both sides do forward, backward, clip and AdamW; the figure is
tokens per CPU second of the process. Ours alone: `expertpipe bench step`.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from launcher.bench.step import RandomTokens, build_for_bench, timed
from launcher.check.run import checked
from launcher.runtime import process_group
from launcher.step import train_step
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


class Side:
    """One of the two in a process of its own, which does a turn of steps for every line that it is sent."""

    def __init__(self, name: str, overrides: Sequence[str]) -> None:
        command = [sys.executable, "-m", "tests.bench.peer_step", "--side", name, *overrides]
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def turn(self) -> float:
        """Median CPU seconds of a step in one turn."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print("turn", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a side of the comparison ended with exit code {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(name: str, overrides: Sequence[str]) -> None:
    """The process of one side: for every line on stdin a turn, its figure on stdout."""
    config = checked(["experiment=bench85m", *overrides], with_data=False)
    if name == "ours":
        with process_group(config.train) as process:
            run = build_for_bench(config, process)
            take_turns(lambda: train_step(run))
    else:
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        implementation, _, mode = name.partition(" ")
        take_turns(peer_step(config, implementation, autocast=mode == "autocast"))


def take_turns(step: Callable[[], object]) -> None:
    """Each turn begins with a step that is not counted: caches and memory went cold during the other's turn."""
    for _ in sys.stdin:
        step()
        print(statistics.median(timed(step).cpu for _ in range(STEPS_A_TURN)), flush=True)


@contextlib.contextmanager
def side(name: str, overrides: Sequence[str]) -> Iterator[Side]:
    """A side that has done one turn, for compilers and caches."""
    started = Side(name, overrides)
    try:
        started.turn()
        yield started
    finally:
        started.close()


def best_peer(low: bool, overrides: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The fastest variant and CPU seconds a step of all, one after the other."""
    seconds = {}
    for implementation in IMPLEMENTATIONS:
        for mode in ("", " autocast") if low else ("",):
            with side(implementation + mode, overrides) as peer:
                seconds[implementation + mode] = peer.turn()
    return min(seconds, key=seconds.__getitem__), seconds


def compare(overrides: Sequence[str], *, repetitions: int) -> dict[str, Any]:
    """Tokens per CPU second of both sides, turn by turn."""
    config = checked(["experiment=bench85m", *overrides], with_data=False)
    best, alone = best_peer(config.train.precision == "bf16", overrides)
    with side("ours", overrides) as ours, side(best, overrides) as theirs:
        turns = [(ours.turn(), theirs.turn()) for _ in range(repetitions)]
    tokens = config.train.micro_batch_size * config.data.sequence_length
    ratios = [peer / own for own, peer in turns]
    return {
        "bench": "peer_step",
        "dtype": config.train.precision,
        "tokens_per_cpu_second": {
            "ours": tokens / statistics.median(own for own, _ in turns),
            best: tokens / statistics.median(peer for _, peer in turns),
        },
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
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    if arguments.side:
        serve(arguments.side, arguments.overrides)
        sys.exit()
    row = compare(arguments.overrides, repetitions=arguments.repetitions)
    if arguments.json:
        print(json.dumps(row))
    else:
        for side, value in row["tokens_per_cpu_second"].items():
            print(f"{side:<28}{value:8.1f} tokens per CPU second")
        low, high = row["ratio_spread"]
        print(f"ours / {row['best_peer']}: {row['ratio']:.2f} ({low:.2f} to {high:.2f}), {row['dtype']}")
