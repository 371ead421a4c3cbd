"""Small runs, their checkpoints, and the state of all ranks put together: what the tests of checkpoints share."""

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data.corpus import Document
from data.prepare import prepare
from launcher.build import Progress, Run, build
from launcher.checkpoint.state import checkpoints_dir, commit, load, save, write_tensors
from launcher.config import RunConfig, to_dict
from launcher.runtime import process_group
from launcher.step import train_step
from model.config import ModelConfig
from model.counts import parameter_shapes
from model.transformer import Transformer
from tests.launcher.spine import MODEL, assemble, config

VOCAB = replace(MODEL, vocab_size=320, num_hidden_layers=4)
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")  # the last one where the run averages its weights
WORDS = ["the", "router", "picks", "an", "expert", "für", "\n    return", "x_TD", "1024", "=", "(", "):"]


def prepared(folder: Path) -> str:
    """Prefix of a small prepared training set of at most 300 tokens; a tokenizer lies beside it."""
    draw = random.Random(0)
    documents = [Document("made up", f"{i}", " ".join(draw.choices(WORDS, k=draw.randint(30, 60)))) for i in range(99)]
    return prepare(corpus=documents, out_dir=folder, vocab_size=300, heldout_fraction=0.2).train_prefix


def whole_config(model: ModelConfig, run_dir: Path, precision: str = "fp32") -> RunConfig:
    """A run of one process, whose data need not be there."""
    found = config("nowhere/train", pipeline=1, expert=1, data=1, schedule="1f1b", model=model, run_dir=str(run_dir))
    return replace(found, train=replace(found.train, precision=precision))


def write_checkpoint(
    model: Transformer, run_dir: Path, *, precision: str = "fp32", tokenizer: Path | None = None
) -> Path:
    """A checkpoint of a whole model as a run of one process would write it, without moments."""
    run_config = whole_config(model.config, run_dir, precision)
    temporary = checkpoints_dir(run_config) / "temporary"
    temporary.mkdir(parents=True)
    tensors = {f"master/{name}@0": weight.detach().flatten().float() for name, weight in model.named_parameters()}
    tensors |= {f"router_bias/{block}@0": router.e_score_correction_bias for block, router in model.routers().items()}
    write_tensors(temporary / "rank-00000.safetensors", tensors)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, temporary / "tokenizer.json")
    final = temporary.with_name("step-00000007")
    commit(temporary, final, {"progress": vars(Progress(7)), "config": to_dict(run_config)})
    return final


@dataclass(frozen=True)
class State:
    """One rank's part of the training state. tensors: kind -> (name, offset) -> flat values."""

    tensors: dict[str, dict[tuple[str, int], Tensor]]
    biases: dict[int, Tensor]
    progress: Progress
    optimizer_steps: int
    loss: float | None


def state_of(run: Run, loss: float | None) -> State:
    flats = {kind: [getattr(shard, kind) for shard in run.optimizer.shards] for kind in KINDS[:3]}
    if run.ema is not None:
        flats["ema"] = run.ema.averages()
    tensors: dict[str, dict[tuple[str, int], Tensor]] = {kind: {} for kind in flats}
    for kind, found in flats.items():
        for bucket, flat in zip(run.zero1.buckets, found, strict=True):
            for piece in bucket.pieces():
                tensors[kind][piece.name, piece.offset] = flat[piece.start : piece.stop].clone()
    biases = {block: shared.router.e_score_correction_bias.clone() for block, shared in run.model.routers.items()}
    return State(tensors, biases, replace(run.progress), run.optimizer.steps, loss)


def session(run_config: RunConfig, steps: int, start: str | None) -> list[State]:
    """One rank: load `start` if given, then `steps` steps with a checkpoint after each; the state before and after."""
    with process_group(run_config.train) as process:
        run = build(run_config, process)
        if start is not None:
            load(run, Path(start))
        states = [state_of(run, None)]
        for _ in range(steps):
            result = train_step(run)
            save(run)
            states.append(state_of(run, result.loss))
        return states


@dataclass(frozen=True)
class Whole:
    """The training state of all ranks put together."""

    tensors: dict[str, dict[str, Tensor]]
    biases: dict[int, Tensor]
    progress: Progress
    optimizer_steps: int
    loss: float | None


def whole(states: list[State], model: ModelConfig = VOCAB) -> Whole:
    """Puts the ranks' states together; fails unless each element is there once and all ranks agree on the rest."""
    like = {name: torch.empty(shape) for name, shape in parameter_shapes(model)}
    tensors = {kind: assemble([state.tensors[kind] for state in states], like) for kind in states[0].tensors}
    biases: dict[int, Tensor] = {}
    for state in states:
        for block, bias in state.biases.items():
            assert torch.equal(biases.setdefault(block, bias), bias), f"copies of router {block} differ"
    first = states[0]
    assert all(
        (s.progress, s.optimizer_steps, s.loss) == (first.progress, first.optimizer_steps, first.loss) for s in states
    )
    return Whole(tensors, biases, first.progress, first.optimizer_steps, first.loss)


def assert_same(ours: Whole, theirs: Whole) -> None:
    assert ours.tensors.keys() == theirs.tensors.keys()
    for kind in ours.tensors:
        for name, tensor in ours.tensors[kind].items():
            assert torch.equal(tensor, theirs.tensors[kind][name]), f"{kind} of {name}"
    assert ours.biases.keys() == theirs.biases.keys() and len(ours.biases) == VOCAB.num_moe_layers + 1
    for block, bias in ours.biases.items():
        assert torch.equal(bias, theirs.biases[block]), f"bias of block {block}"
    assert (ours.progress, ours.optimizer_steps) == (theirs.progress, theirs.optimizer_steps)


@dataclass(frozen=True)
class Straight:
    """Three steps without a stop on 4 ranks: DualPipe, 2 pipeline x 2 data ranks, experts over both data ranks."""

    config: RunConfig
    states: list[Whole]

    def step(self, number: int) -> Path:
        return checkpoints_dir(self.config) / f"step-{number:08d}"
