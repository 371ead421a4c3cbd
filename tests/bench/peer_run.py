"""A whole run of ours on several processes against the same run through transformers on one: held-out loss at equal
tokens, time, and how evenly the experts are loaded.

    OMP_WAIT_POLICY=PASSIVE python -m tests.bench.peer_run --out runs/peer [--marks 8] [overrides]

trains `experiment=demo` both ways, one after the other, each going on where an earlier call was stopped; prints one
JSON object and draws OUT/peer_run.png. `--side ours` or `--side peer` does one of them, `--side report` none.

Two runs that differ by rounding alone part within fifty steps and end apart: one pair cannot tell a fault from chance.
`--again train.rowwise=native` (any number of times, each with overrides that change nothing but rounding) trains ours
once more in OUT/again-1, ...; what is compared then is the mean of ours, and `ours_apart_at_marks` is the
largest distance between two of them. `--side again` does these alone.

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
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.baselines import bits_per_byte
from data.loader import Loader
from data.tokens import Manifest, TokenFile, sibling
from launcher.check.run import checked
from launcher.config import RunConfig
from launcher.inference import heldout_nats, load_model
from launcher.record.events import read
from launcher.step_plan import StepPlan
from model.transformer import Microbatch
from optim.schedule import value_at
from tests.bench.peer_model import Peer

ROOT = Path(__file__).parents[2]
HELDOUT_BATCH = 16
LAST = 50  # steps at the end over which the experts' load is averaged
BALANCED, EQUAL = 1.5, 0.01
NOT_THE_SAME = "moments and weights in BF16 here, FP32 under autocast there; kernels; size of micro-batches"


@dataclass(frozen=True)
class Row:
    """One step. load: largest over mean load of each MoE layer, the MTP module's last."""

    step: int
    tokens: int
    loss: float
    mtp_loss: float | None
    seconds: float
    load: tuple[float, ...]


@dataclass(frozen=True)
class Side:
    """One side's run: its steps, held-out nats a token after `marks`, seconds of CPU."""

    rows: list[Row]
    marks: list[int]
    heldout: list[float]
    cpu_seconds: float


def marks_of(steps: int, number: int) -> list[int]:
    """Steps after which the held-out text is scored: equal distances, the last step included."""
    every = -(-steps // number)
    return [*range(every, steps, every), steps]


def apart(sides: Sequence[Side]) -> list[float]:
    """At each mark the largest held-out loss over the smallest, less 1."""
    return [max(at) / min(at) - 1 for at in zip(*(side.heldout for side in sides), strict=True)]


def heldout_prefix(config: RunConfig) -> Path:
    """The held-out set beside the training set."""
    return Path(config.data.prefix).with_name("heldout")


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


# --- what came of it ---------------------------------------------------------------------------------------------


def report(config: RunConfig, mine: Side, theirs: Side, again: Sequence[Side] = ()) -> dict[str, Any]:
    """The JSON object: held-out losses at equal tokens, the gap of our mean; times and loads of the first of ours."""
    prefix = heldout_prefix(config)
    predicted = TokenFile(prefix).num_tokens - 1
    text_bytes = Manifest.read(prefix).text_bytes

    def described(side: Side) -> dict[str, Any]:
        seconds = [row.seconds for row in side.rows]
        loads = [statistics.fmean(layer) for layer in zip(*(row.load for row in side.rows[-LAST:]), strict=True)]
        per_byte = [bits_per_byte(nats, num_tokens=predicted, text_bytes=text_bytes) for nats in side.heldout]
        return {
            "heldout_nats_per_token": side.heldout,
            "heldout_bits_per_byte": per_byte,
            "step_seconds_total": sum(seconds),
            "step_seconds_median": statistics.median(seconds),
            "cpu_seconds": side.cpu_seconds,
            "expert_load_max_over_mean_at_end": loads,
            "first_loss": side.rows[0].loss,
            "last_loss": side.rows[-1].loss,
        }

    runs = [mine, *again]
    means = [statistics.fmean(at) for at in zip(*(side.heldout for side in runs), strict=True)]
    gaps = [a / b - 1 for a, b in zip(means, theirs.heldout, strict=True)]
    tokens = {row.step: row.tokens for row in mine.rows}
    for side in (theirs, *again):
        assert tokens == {row.step: row.tokens for row in side.rows}, "the runs have not seen the same tokens"
    found: dict[str, Any] = {"ours": described(mine), "transformers": described(theirs)}
    if again:
        found |= {"ours_again": [described(side) for side in again], "ours_apart_at_marks": apart(runs)}
    loads = found["ours"]["expert_load_max_over_mean_at_end"]
    return {
        "bench": "peer_run",
        "experiment": config.name,
        "steps": mine.rows[-1].step,
        "tokens_at_marks": [tokens[step] for step in mine.marks],
        **found,
        "relative_gap_at_marks": gaps,
        "equal_at_end": abs(gaps[-1]) < EQUAL,
        "time_ratio": found["transformers"]["step_seconds_total"] / found["ours"]["step_seconds_total"],
        "cpu_ratio": found["transformers"]["cpu_seconds"] / found["ours"]["cpu_seconds"],
        "balanced_at_end": max(loads, default=1.0) < BALANCED,
        "not_the_same": NOT_THE_SAME,
    }


def draw(path: Path, title: str, mine: Side, theirs: Side, again: Sequence[Side] = ()) -> None:
    """Held-out loss by tokens and by time of the steps, training loss behind it, expert load below its bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    more = [(side, f"ours, rounded otherwise {number}", f"C{1 + number}") for number, side in enumerate(again, start=1)]
    for side, name, colour in ((mine, "ours", "C0"), (theirs, "transformers", "C1"), *more):
        tokens = np.array([row.tokens for row in side.rows]) / 1e6
        hours = np.cumsum([row.seconds for row in side.rows]) / 3600
        at = [row.step - 1 for row in side.rows if row.step in side.marks]
        axes[0].plot(tokens, [row.loss for row in side.rows], colour, alpha=0.2, linewidth=0.6)
        axes[0].plot(tokens[at], side.heldout, colour, marker="o", label=f"{name}, held out")
        axes[1].plot(hours[at], side.heldout, colour, marker="o", label=name)
        worst = np.array([max(row.load, default=1.0) for row in side.rows])
        width = min(LAST, len(worst))
        even = np.convolve(worst, np.full(width, 1 / width), mode="valid")
        axes[2].plot(tokens, worst, colour, alpha=0.2, linewidth=0.6)
        axes[2].plot(tokens[width - 1 :], even, colour, label=f"{name}, mean of {width} steps")
    axes[2].axhline(BALANCED, color="0.5", linewidth=0.8)
    for axis, x, y in zip(
        axes,
        ("million tokens", "hours of steps", "million tokens"),
        ("nats a token", "held-out nats a token", "busiest expert over mean, worst layer"),
        strict=True,
    ):
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    """Both sides, or what `--side` names; the exit code: 1 where the runs are not equal within 1%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--side", choices=("both", "ours", "again", "peer", "report"), default="both")
    parser.add_argument("--again", action="append", default=[], metavar="OVERRIDES", help="ours once more, with these")
    parser.add_argument("--marks", type=int, default=8, help="times that the held-out text is scored")
    parser.add_argument("--experts", default="grouped_mm", help="transformers' experts_implementation")
    parser.add_argument("--peer-micro-batch", type=int, default=8, help="sequences at once on the peer's side")
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
    if arguments.side in ("both", "ours"):
        train_ours(words, config, marks)
    if arguments.side in ("both", "again"):
        for more, other in again:
            train_ours(more, other, marks)
    if arguments.side in ("ours", "again"):
        return 0
    peer = PeerRun(config, arguments.out / "peer", experts=arguments.experts, micro_batch=arguments.peer_micro_batch)
    if arguments.side in ("both", "peer"):
        peer.train(marks)
    if arguments.side == "peer":
        return 0
    mine, theirs, others = ours(config, marks), peer.side(marks), [ours(other, marks) for _, other in again]
    result = report(config, mine, theirs, others)
    draw(arguments.out / "peer_run.png", f"{config.name}: ours and transformers", mine, theirs, others)
    (arguments.out / "peer_run.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if result["equal_at_end"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
