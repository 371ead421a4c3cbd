"""`expertpipe bench step`: a whole training step (forward, backward, clip, AdamW, router bias) of one process.

On random tokens. The figure to compare on a shared machine is tokens per CPU second: user and system time of the
process, waiting threads passive.
"""

import json
import os
import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from launcher.build import DTYPES, Run, build
from launcher.check.run import checked
from launcher.config import ConfigError, RunConfig
from launcher.runtime import process_group
from launcher.step import tokens_per_step, train_step
from model.counts import counts, flops_per_token

MATMUL_SIZE = 2048  # rows, columns and depth of the product that stands for the machine's peak


@dataclass(frozen=True)
class Timing:
    """Wall and process CPU seconds of one repetition."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Timing:
    """One repetition of `work`."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


class RandomTokens:
    """Stands in for the data: the same shapes, uniformly random ids, no file."""

    def __init__(self, vocab_size: int, sequence_length: int) -> None:
        self._vocab_size, self._sequence_length = vocab_size, sequence_length

    def microbatch(
        self, *, consumed: int, microbatch: int, data_rank: int, data_size: int, micro_batch_size: int
    ) -> np.ndarray:
        """int64 [micro_batch_size, sequence_length + 1]."""
        seed = [consumed, microbatch, data_rank, data_size]
        size = (micro_batch_size, self._sequence_length + 1)
        return np.random.default_rng(seed).integers(self._vocab_size, size=size)


def build_for_bench(config: RunConfig, process: object) -> Run:
    """A run of one process on random tokens."""
    tokens = RandomTokens(config.model.vocab_size, config.data.sequence_length)
    return build(config, process, loader=tokens)  # type: ignore[arg-type]


def matmul(dtype: torch.dtype) -> Callable[[], object]:
    """The product whose speed is the peak, and its 2 * MATMUL_SIZE^3 operations."""
    left, right, out = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(3))
    return lambda: torch.mm(left, right, out=out)


def bench_step(config: RunConfig, *, warmup: int, repetitions: int) -> dict[str, object]:
    """Median over repetitions, the peak measured between them; keys as in the README."""
    with process_group(config.train) as process:
        run = build_for_bench(config, process)
        product = matmul(DTYPES[config.train.precision])
        for _ in range(warmup):
            train_step(run)
            product()
        steps, products = [], []
        for _ in range(repetitions):
            steps.append(timed(lambda: train_step(run)))
            products.append(timed(product))
    tokens = tokens_per_step(run)
    wall = statistics.median(step.wall for step in steps)
    flops = flops_per_token(config.model, config.data.sequence_length, mtp=True).causal * tokens
    peak = 2 * MATMUL_SIZE**3 / statistics.median(p.wall for p in products)
    return {
        "bench": "step",
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / statistics.median(step.cpu for step in steps),
        "spread": (max(s.wall for s in steps) - min(s.wall for s in steps)) / wall,
        "gflops": flops / wall / 1e9,
        "fraction_of_matmul_peak": flops / wall / peak,
        "matmul_peak_gflops": peak / 1e9,
        "dtype": config.train.precision,
        "params": counts(config.model).main + counts(config.model).mtp,
        "tokens_per_step": tokens,
        "threads": torch.get_num_threads(),
        "repetitions": repetitions,
        "torch": torch.__version__,
    }


def bench_step_command(argv: list[str]) -> int:
    """`expertpipe bench step [--json] [overrides]`; without overrides the shape of experiment=bench85m."""
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        # OpenMP reads it when torch is loaded, which has happened: start again with it set.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, "-m", "launcher", "bench", "step", *argv])
    parser = ArgumentParser(prog="expertpipe bench step")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="such as train.precision=bf16")
    arguments = parser.parse_intermixed_args(argv)
    overrides = arguments.overrides
    if not any(o.startswith("experiment=") for o in overrides):
        overrides = ["experiment=bench85m", *overrides]
    config = checked(overrides, world_size=None, with_data=False)
    if config.parallel.world_size != 1:
        world = config.parallel.world_size
        raise ConfigError([f"bench step measures one process, the layout has {world}: use parallel=single"])
    row = bench_step(config, warmup=arguments.warmup, repetitions=arguments.repetitions)
    if arguments.json:
        print(json.dumps(row))
        return 0
    for key, value in row.items():
        print(f"{key:<26}{value:,.4g}" if isinstance(value, float) else f"{key:<26}{value}")
    return 0
