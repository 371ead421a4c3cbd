"""A whole run of ours on several processes against the same run through transformers on one: held-out loss at equal
tokens, time, and how evenly the experts are loaded.

    OMP_WAIT_POLICY=PASSIVE python -m tests.bench.peer_run --out runs/peer [--marks 8] [overrides]

trains `experiment=demo` both ways, one after the other, each going on where an earlier call was stopped; prints one
JSON object and draws OUT/peer_run.png. `--side ours` or `--side peer` does one of them, `--side report` none.

Two runs that differ by rounding alone part within fifty steps and end apart: one pair cannot tell a fault from chance.
`--again train.rowwise=native` (any number of times, each with overrides that change nothing but rounding; one that
changes a step's tokens is refused) trains ours once more in OUT/again-1, ...; `--peer-again 4` theirs, in micro-batches
of 4, in OUT/peer-again-1, .... What is compared then are the means, and `ours_apart_at_marks` is the largest distance
between two of ours. `--side again` and `--side peer-again` do these alone.

The same on both sides: initial weights, windows and their order, batch sizes, learning rate, MTP and its weight, the
sequence-wise balance loss, the biases' updates, decayed parameters, clipping, AdamW's betas and epsilon, held-out text.
Not the same, because each side is taken as its users have it: ours keeps BF16 weights beside FP32 masters and BF16
moments, theirs FP32 weights and moments under autocast (torch's fused AdamW); ours computes attention and experts with
its own kernels on `parallel.world_size` processes, theirs with `--experts` (grouped_mm) on all cores of one process and
in larger micro-batches. Time is that of the steps; loading, saving and scoring are left out on both sides.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.loader import Loader
from data.tokens import TokenFile, sibling
from launcher.check.run import checked
from launcher.config import RunConfig
from launcher.inference import heldout_nats, load_model
from launcher.record.events import read
from launcher.step_plan import StepPlan
from model.transformer import Microbatch
from optim.schedule import value_at
from tests.bench.peer_model import Peer
from tests.bench.peer_report import Row, Side, draw, heldout_prefix, report

ROOT = Path(__file__).parents[2]
HELDOUT_BATCH = 16


def marks_of(steps: int, number: int) -> list[int]:
    """Steps after which the held-out text is scored: equal distances, the last step included."""
    every = -(-steps // number)
    return [*range(every, steps, every), steps]


def other_tokens(config: RunConfig, other: RunConfig) -> str | None:
    """Where the two runs part in what their steps are made of, for a message; None if they never do."""
    steps = config.train.steps
    if other.train.steps != steps:
        return f"{other.train.steps} steps, not {steps}"
    first, second = StepPlan(config), StepPlan(other)
    tokens = 0
    for step in range(1, steps + 1):
        here, there = first.at(tokens), second.at(tokens)
        if (here.batch, here.sequence_length) != (there.batch, there.sequence_length):
            found = f"{there.batch} sequences of {there.sequence_length} tokens"
            return f"step {step} has {found}, not {here.batch} of {here.sequence_length}"
        tokens += here.tokens
    return None


# --- ours --------------------------------------------------------------------------------------------------------


def train_ours(overrides: Sequence[str], config: RunConfig, marks: Sequence[int]) -> None:
    """The run as its users start it; CPU seconds of every call add up in a file, start-up included."""
    spent = Path(config.run_dir) / "cpu_seconds.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    every = f"train.checkpoint_every={marks[0]}", f"train.keep_every={marks[0]}"
    command = [sys.executable, "-m", "launcher", "train", *overrides, f"run_dir={config.run_dir}", *every]
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    total = seconds + (json.loads(spent.read_text()) if spent.exists() else 0.0)
    spent.write_text(json.dumps(total))
    if done.returncode:
        raise SystemExit(f"training ended with {done.returncode}; the same command goes on")


def ours(config: RunConfig, marks: Sequence[int]) -> Side:
    """What the run left: its events, and the held-out loss under each kept checkpoint."""
    run_dir, prefix = Path(config.run_dir), heldout_prefix(config)
    rows = [
        Row(event.step, event.tokens, event.loss, event.mtp_loss, event.step_seconds, event.expert_load)
        for event in read(run_dir / "events.jsonl")
    ]
    scores = run_dir / "heldout.json"
    known = json.loads(scores.read_text()) if scores.exists() else {}
    for step in marks:
        if str(step) not in known:
            model = load_model(run_dir / "checkpoints" / f"step-{step:08d}")
            known[str(step)] = heldout_nats(model, prefix, config.data.sequence_length, HELDOUT_BATCH)[0]
            scores.write_text(json.dumps(known))
    return Side(
        rows, list(marks), [known[str(step)] for step in marks], json.loads((run_dir / "cpu_seconds.json").read_text())
    )


# --- transformers ------------------------------------------------------------------------------------------------


class PeerRun:
    """transformers' model through the same steps; its whole state is one file in `folder`, its steps another."""

    def __init__(self, config: RunConfig, folder: Path, *, experts: str, micro_batch: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.train.seed)
        self.config, self.folder, self.micro_batch = config, folder, micro_batch
        self.plan, self.loader = StepPlan(config), Loader(config.data)
        self.peer = Peer(config, implementation=experts, autocast=config.train.precision == "bf16")
        optim, weights = config.optim, list(self.peer.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": optim.weight_decay},
            {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
        self.step = self.tokens = self.samples = 0
        self.cpu_seconds, self.heldout = 0.0, dict[str, float]()
        self._resume()

    def _resume(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.peer.load_state_dict(state["peer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.samples = state["step"], state["tokens"], state["samples"]
        self.cpu_seconds, self.heldout = state["cpu_seconds"], state["heldout"]
        kept = [row for row in self.rows() if row.step <= self.step]
        self._write(kept, "w")

    def save(self) -> None:
        """In one step: what is there is whole."""
        names = ("step", "tokens", "samples", "cpu_seconds", "heldout")
        state = {name: getattr(self, name) for name in names}
        state |= {"peer": self.peer.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.pt")

    def rows(self) -> list[Row]:
        """The steps so far."""
        path = self.folder / "steps.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [Row(**{**value, "load": tuple(value["load"])}) for value in map(json.loads, lines)]

    def _write(self, rows: Sequence[Row], mode: str) -> None:
        with open(self.folder / "steps.jsonl", mode) as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)

    def train_step(self) -> Row:
        """The next step of the plan, with every scheduled value of the token at which it begins."""
        config, optim, planned = self.config, self.config.optim, self.plan.at(self.tokens)
        self.peer.train()
        windows = torch.from_numpy(self.loader.windows(np.arange(self.samples, self.samples + planned.batch)))
        mtp_lambda = value_at(optim.mtp_lambda, self.tokens)
        main, mtp = 0.0, 0.0
        for part in windows.split(self.micro_batch):
            share = len(part) / planned.batch
            found = self.peer.losses(Microbatch(part, share, mtp_lambda))
            found.loss.backward()
            main, mtp = main + found.main * share, mtp + (found.mtp or 0.0) * share
        torch.nn.utils.clip_grad_norm_(self.peer.parameters(), optim.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = value_at(optim.lr, self.tokens + planned.tokens)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loads = self.peer.balance_experts(value_at(optim.bias_update_speed, self.tokens))
        self.step, self.samples = self.step + 1, self.samples + planned.batch
        self.tokens += planned.tokens
        has_mtp = config.model.num_nextn_predict_layers > 0
        return Row(self.step, self.tokens, main, mtp if has_mtp else None, 0.0, tuple(loads))

    def train(self, marks: Sequence[int]) -> None:
        """To the last mark; saves at each of them and every 100 steps."""
        while self.step < marks[-1]:
            cpu, began = time.process_time(), time.perf_counter()
            row = self.train_step()
            seconds = time.perf_counter() - began
            self.cpu_seconds += time.process_time() - cpu
            self._write([Row(**{**asdict(row), "seconds": seconds, "load": row.load})], "a")
            if row.step % 10 == 0 or row.step == marks[-1]:
                print(f"transformers {row.step}/{marks[-1]}  {row.loss:.3f}  {seconds:.2f} s", file=sys.stderr)
            if row.step in marks:
                self.heldout[str(row.step)] = self.score()
            if row.step in marks or row.step % 100 == 0:
                self.save()

    def score(self) -> float:
        """Held-out nats a token, over the same windows as launcher.inference.heldout_nats."""
        self.peer.eval()
        tokens, length = TokenFile(heldout_prefix(self.config)).tokens, self.config.data.sequence_length
        total, predicted = 0.0, len(tokens) - 1
        starts = list(range(0, predicted, length))
        whole = [start for start in starts if start + length <= predicted]
        parts = [whole[i : i + HELDOUT_BATCH] for i in range(0, len(whole), HELDOUT_BATCH)]
        for part in [*parts, *([start] for start in starts if start not in set(whole))]:
            rows = np.stack([tokens[start : start + length + 1].astype(np.int64) for start in part])
            total += self.peer.token_losses(torch.from_numpy(rows)).double().sum().item()
        return total / predicted

    def side(self, marks: Sequence[int]) -> Side:
        """As `ours`."""
        return Side(self.rows(), list(marks), [self.heldout[str(step)] for step in marks], self.cpu_seconds)


def main(argv: Sequence[str]) -> int:
    """Both sides, or what `--side` names; the exit code: 1 where the runs are not equal within 1%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    sides = ("both", "ours", "again", "peer", "peer-again", "report")
    parser.add_argument("--side", choices=sides, default="both")
    parser.add_argument("--again", action="append", default=[], metavar="OVERRIDES", help="ours once more, with these")
    parser.add_argument("--marks", type=int, default=8, help="times that the held-out text is scored")
    parser.add_argument("--experts", default="grouped_mm", help="transformers' experts_implementation")
    parser.add_argument("--peer-micro-batch", type=int, default=8, help="sequences at once on the peer's side")
    parser.add_argument("--peer-again", action="append", type=int, default=[], help="theirs once more, so many at once")
    parser.add_argument("overrides", nargs="*", default=[])
    arguments = parser.parse_intermixed_args(argv)
    chosen = any(override.startswith("experiment=") for override in arguments.overrides)
    overrides = [*([] if chosen else ["experiment=demo"]), *arguments.overrides]

    def named(folder: str, more: Sequence[str] = ()) -> tuple[list[str], RunConfig]:
        words = [*overrides, *more]
        return words, checked([*words, f"run_dir={arguments.out / folder}"])

    words, config = named("ours")
    again = [named(f"again-{number}", more.split()) for number, more in enumerate(arguments.again, start=1)]
    assert sibling(heldout_prefix(config), ".json").exists(), f"{heldout_prefix(config)}: no held-out set there"
    marks = marks_of(config.train.steps, arguments.marks)
    for more, other in again:
        if (problem := other_tokens(config, other)) is not None:
            raise SystemExit(f"--again {' '.join(more[len(overrides) :])!r} changes more than rounding: {problem}")
    if arguments.side in ("both", "ours"):
        train_ours(words, config, marks)
    if arguments.side in ("both", "again"):
        for more, other in again:
            train_ours(more, other, marks)
    if arguments.side in ("ours", "again"):
        return 0
    peers = [
        PeerRun(config, arguments.out / folder, experts=arguments.experts, micro_batch=size)
        for folder, size in (
            ("peer", arguments.peer_micro_batch),
            *((f"peer-again-{number}", size) for number, size in enumerate(arguments.peer_again, start=1)),
        )
    ]
    if arguments.side in ("both", "peer"):
        peers[0].train(marks)
    if arguments.side in ("both", "peer-again"):
        for peer in peers[1:]:
            peer.train(marks)
    if arguments.side in ("peer", "peer-again"):
        return 0
    mine = [ours(each, marks) for each in (config, *(other for _, other in again))]
    theirs = [peer.side(marks) for peer in peers]
    result = report(config, mine, theirs)
    draw(arguments.out / "peer_run.png", f"{config.name}: ours and transformers", mine, theirs)
    (arguments.out / "peer_run.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["equal_at_end"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
