"""The state of a run, to and from checkpoints. Without pickle: shards are safetensors, a JSON manifest says the rest.

A tensor in a file is a flat stretch of one global tensor, under the key `kind/name@offset` (kind: master, exp_avg,
exp_avg_sq, router_bias; offset: its first element in the flattened global tensor). So a reader with any other layout
takes the stretches it needs, and nothing has to hold the whole model.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.tokens import Manifest, sibling
from launcher.build import Progress, Run
from launcher.checkpoint.files import (
    CONFIG,
    LATEST,
    MANIFEST,
    TEMPORARY,
    TOKENIZER,
    CheckpointError,
    checkpoints_in,
    commit,
    digest_of,
    find,
    flush,
    latest,
    signed,
    step_name,
    write_tensors,
)
from launcher.checkpoint.host_copy import HostCopy
from launcher.checkpoint.reader import Reader, verify
from launcher.checkpoint.tensor_file import file_record
from launcher.config import RunConfig, to_dict
from launcher.safety.agreement import highest, messages, require_agreed
from launcher.safety.same_run import differences, flat
from model.counts import parameter_shapes
from model.fp8.linear import weights_changed
from parallel.bucket import Bucket

__all__ = [
    "CONFIG", "LATEST", "MANIFEST", "TOKENIZER", "CheckpointError", "Reader", "Snapshot", "checkpoints_dir", "commit",
    "discard_temporary", "find", "latest", "load", "newest_valid", "save", "signed", "verify", "write_tensors",
]  # fmt: skip

OPTIMIZER_KINDS = ("exp_avg", "exp_avg_sq")
PLACE = ("name", "run_dir", "parallel.")  # where a run lies, and its layout, which is said by itself
NUM_LISTED = 12


def checkpoints_dir(config: RunConfig) -> Path:
    """Folder of a run's checkpoints."""
    return Path(config.run_dir) / "checkpoints"


@dataclass(frozen=True)
class Flat:
    """One contiguous tensor of a rank's state, where it lies (training changes it), and the keys of its stretches:
    key, first element, one past the last.
    """

    tensor: Tensor
    stretches: tuple[tuple[str, int, int], ...]


def rank_state(run: Run) -> list[Flat]:
    """This rank's part of the state; the same tensors in the same order at every call."""

    def flat(kind: str, bucket: Bucket, tensor: Tensor) -> Flat:
        pieces = [(f"{kind}/{piece.name}@{piece.offset}", piece.start, piece.stop) for piece in bucket.pieces()]
        return Flat(tensor.detach(), tuple(pieces))

    found = [
        flat(kind, bucket, getattr(shard, kind))
        for bucket, shard in zip(run.zero1.buckets, run.optimizer.shards, strict=True)
        for kind in ("master", *OPTIMIZER_KINDS)
    ]
    if run.ema is not None:
        found += [flat("ema", *pair) for pair in zip(run.zero1.buckets, run.ema.averages(), strict=True)]
    for block, shared in run.model.routers.items():
        # A router is the same on all its holders: the first one writes it.
        if run.mesh.data_rank == 0 and run.mesh.pipeline_rank == shared.holders[0]:
            bias = shared.router.e_score_correction_bias.detach()
            found.append(Flat(bias, ((f"router_bias/{block}@0", 0, bias.numel()),)))
    return found


def identity(config: RunConfig) -> dict[str, str]:
    """Digests of what a run must not change in silence: its configuration, its data, its tokenizer."""
    prefixes = config.data.prefixes
    manifests = [file_record(sibling(prefix, ".json")).xxh3_128 for prefix in prefixes]
    return {
        "config": digest_of(to_dict(config)),
        "data": digest_of([manifests, list(config.data.weights), config.data.seed]),
        "tokenizer": Manifest.read(prefixes[0]).tokenizer_sha256,
    }


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes into a checkpoint, and (facts) what changes from step to step of what the manifest says;
    independent of the run that goes on, once it is copied, if it was taken with a host copy.
    """

    step: int
    rank: int
    flats: tuple[Flat, ...]
    facts: dict[str, Any]

    @staticmethod
    def take(run: Run, copy: HostCopy | None = None, *, extra: Mapping[str, Any] | None = None) -> "Snapshot":
        """The state after `run.progress.step` steps. copy: host memory, which is being filled when this returns; None:
        the tensors themselves, for a caller that waits. extra: more facts. Reads no file and talks to no other rank:
        the step waits for it.
        """
        flats = rank_state(run)
        if copy is not None:
            copy.begin([flat.tensor for flat in flats])
            flats = [replace(flat, tensor=tensor) for flat, tensor in zip(flats, copy.tensors, strict=True)]
        facts = {
            "step": run.progress.step,
            "tokens": run.progress.tokens,
            "progress": asdict(run.progress),
            "optimizer_steps": run.optimizer.steps,
            **(extra or {}),
        }
        return Snapshot(run.progress.step, run.process.rank, tuple(flats), facts)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stretches by key."""
        return {key: flat.tensor[start:stop] for flat in self.flats for key, start, stop in flat.stretches}

    def manifest(self, config: RunConfig) -> dict[str, Any]:
        """What the manifest says; reads the data's own manifests."""
        return {**self.facts, "layout": _as_json(config), "config": to_dict(config), "identity": identity(config)}

    def write(self, temporary: Path) -> None:
        """This rank's shard into an existing temporary folder. CheckpointError that names the file and the reason."""
        path = temporary / f"rank-{self.rank:05d}.safetensors"
        try:
            write_tensors(path, self.tensors, step=self.step)
        except OSError as error:
            needed = sum(flat.tensor.nbytes for flat in self.flats)
            free = shutil.disk_usage(temporary).free if temporary.exists() else 0
            raise CheckpointError(f"{path}: {error.strerror} ({needed:,} bytes to write, {free:,} free)") from None


def temporary_of(config: RunConfig, step: int) -> Path:
    """Where a checkpoint is written before it is one."""
    return checkpoints_dir(config) / f"{TEMPORARY}{step_name(step)}"


def prepare_temporary(config: RunConfig, step: int) -> None:
    """An empty folder to write to; what a save that was cut off left there goes."""
    temporary = temporary_of(config, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # a checkpoint generates text wherever it is taken
    prefix = Path(config.data.prefix)
    shutil.copyfile(prefix.parent / Manifest.read(prefix).tokenizer_file, temporary / TOKENIZER)
    flush(temporary / TOKENIZER)


def discard_temporary(config: RunConfig) -> list[str]:
    """Remove what saves that were cut off left behind; their names. For the holder of the run's lock."""
    found = sorted(checkpoints_dir(config).glob(f"{TEMPORARY}*"))
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found]


def save(run: Run) -> Path:
    """Write the state after `run.progress.step` steps and wait; all ranks call it together. The checkpoint's folder.

    AgreedError on all ranks where any of them failed; nothing is left behind then. Old ones go as configured.
    """
    from launcher.checkpoint.saver import Saver

    return Saver(run, asynchronous=False).save()


def newest_valid(run: Run, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of the run that verifies, all ranks reading a share of every file; None if there is none.

    Damaged ones are passed over, which is told, and stay where they are. CheckpointError on all ranks when there are
    some and none is whole. All ranks call it together.
    """
    root = checkpoints_dir(run.config)
    group, device = run.groups.world, run.process.device
    damaged = []
    for path in [root / step_name(step) for step in _steps_seen_by_rank_0(run, root)]:
        error: Exception | None = None
        try:
            verify(path, share=run.process.rank, shares=run.process.world_size)
        except CheckpointError as found:
            error = found
        (bad,) = highest(group, device, int(error is not None))
        if not bad:
            return path
        said = messages(group, device, "" if error is None else str(error))
        damaged.append(next(iter(said.values())))
        say(f"{path.name} is passed over: {damaged[-1]}")
    if damaged:
        raise CheckpointError(
            f"{root}: none of {len(damaged)} checkpoints is whole ({damaged[0]}); "
            "move them away to start from the beginning"
        )
    return None


def _steps_seen_by_rank_0(run: Run, root: Path) -> list[int]:
    """Steps of the checkpoints there, newest first, on every rank: all ranks must walk the same list."""
    found = [item.step for item in checkpoints_in(root)] if run.process.rank == 0 else []
    (count,) = highest(run.groups.world, run.process.device, len(found))
    table = torch.tensor(found or [0] * count, dtype=torch.int64, device=run.process.device)
    if count:
        dist.broadcast(table, src=0, group=run.groups.world)
    return table.tolist()


def load(
    run: Run,
    path: Path,
    *,
    say: Callable[[str], None] = lambda text: None,
    verified: bool = False,
    same_run: bool = True,
) -> None:
    """Continue `run` from a checkpoint of any layout of the same model, data and tokenizer; all ranks call it together.

    verified: whether its checksums have been read already, else every rank reads its share of them. same_run: False for
    a run that begins with the weights of another, whose shapes alone must fit. CheckpointError for another model, and
    for another data set, cut or tokenizer unless the configuration accepts them by key. What else of the configuration
    has changed is said.
    """
    reader = Reader(path, verify=False)
    if same_run:
        _require_same_run(run.config, reader)
    elif dict(parameter_shapes(reader.config.model)) != dict(parameter_shapes(run.config.model)):
        raise CheckpointError(f"{path} has weights of other shapes: compare its {MANIFEST} with the model section")
    if not verified:
        process = run.process
        agreed(run, lambda: verify(path, share=process.rank, shares=process.world_size))
    if reader.manifest.get("layout") not in (None, _as_json(run.config)):
        say(f"{path.name} was written by another layout ({_layout(reader.config)}): read for {_layout(run.config)}")
    if same_run and (changed := _changed(run.config, reader)):
        say(f"{path.name} was written with another configuration: {changed}")
    for bucket, shard in zip(run.zero1.buckets, run.optimizer.shards, strict=True):
        for piece in bucket.pieces():
            part = slice(piece.start, piece.stop)
            reader.read("master", piece.name, shard.master[part], offset=piece.offset)
            for kind in OPTIMIZER_KINDS:
                if "optimizer_steps" in reader.manifest:
                    reader.read(kind, piece.name, getattr(shard, kind)[part], offset=piece.offset)
    _read_ema(run, reader)
    for block, shared in run.model.routers.items():
        reader.read("router_bias", str(block), shared.router.e_score_correction_bias)
    run.optimizer.steps = reader.manifest.get("optimizer_steps", 0)
    for field in fields(Progress):
        setattr(run.progress, field.name, getattr(reader.progress, field.name))
    run.zero1.publish_weights()
    for stage in run.model.stages.values():
        weights_changed(stage)  # a run that goes back to a checkpoint has the later weights rounded to FP8


def _read_ema(run: Run, reader: Reader) -> None:
    """The average of the weights, which begins with the weights where the checkpoint has none."""
    if run.ema is None:
        return
    run.ema.restart()
    for bucket, average in zip(run.zero1.buckets, run.ema.averages(), strict=True):
        for piece in bucket.pieces():
            if reader.has("ema", piece.name):
                reader.read("ema", piece.name, average[piece.start : piece.stop], offset=piece.offset)


def _as_json(config: RunConfig) -> Any:
    return to_dict(config)["parallel"]


def _layout(config: RunConfig) -> str:
    p = config.parallel
    return f"pipeline {p.pipeline} {p.schedule} x data {p.data}, expert {p.expert}"


def _require_same_run(config: RunConfig, reader: Reader) -> None:
    path = reader.path
    if reader.config.model != config.model:
        raise CheckpointError(f"{path} is of another model: compare its {MANIFEST} with the model section")
    theirs = reader.manifest.get("identity")
    if theirs is None:  # an imported one: its weights were trained elsewhere
        return
    ours = identity(config)
    for what, key, accepted in (
        ("tokenizer", "tokenizer", config.train.accept_other_tokenizer),
        ("data set", "data", config.train.accept_other_data),
    ):
        if theirs.get(key) != ours[key] and not accepted:
            raise CheckpointError(
                f"{path} was trained with another {what} (digest {theirs.get(key)}, data.prefix={config.data.prefix} "
                f"has {ours[key]}): take the same, or set train.accept_other_{key}=true"
            )
    before, now = (_cut(each, reader.progress.tokens) for each in (reader.config, config))
    if before != now and not config.train.accept_other_data:
        raise CheckpointError(
            f"{path} was trained on samples that were cut otherwise: "
            f"{differences(now, before, whose='there', most=NUM_LISTED)}: take the same, or set "
            "train.accept_other_data=true"
        )


def _cut(config: RunConfig, tokens: int) -> dict[str, object]:
    """What decides, with the data set, which samples the first `tokens` tokens were: their length, and the phases that
    had begun. Phases that lie ahead may change.
    """
    data = to_dict(config)["data"]
    begun = [phase for phase in data["phases"] if phase["from_tokens"] < tokens]
    return flat({"data": {"sequence_length": data["sequence_length"], "phases": begun}})


def _changed(config: RunConfig, reader: Reader) -> str:
    """Keys whose values are not the checkpoint's, in a line; empty for an imported one, which no configuration made."""
    if "identity" not in reader.manifest:
        return ""
    now, then = (
        {key: value for key, value in flat(to_dict(each)).items() if not key.startswith(PLACE)}
        for each in (config, reader.config)
    )
    return differences(now, then, whose="then", most=NUM_LISTED)


def agreed(run: Run, work: Callable[[], object]) -> None:
    """Do something on this rank; AgreedError on every rank where it failed on any."""
    error: BaseException | None = None
    try:
        work()
    except Exception as failure:
        error = failure
    require_agreed(run.groups.world, run.process.device, error)
