"""All ranks of a run in one process: the groups, messages and collectives of each, held against one another.

What a rank does comes from the code that runs: `parallel.mesh` makes the groups, the schedule's actions give messages,
`parallel.pipeline.overlap` the transfers to and from experts, ZeRO-1's buckets the collectives of gradients, and the
stages are built as modules on the meta device. Ranks that do the same share one record, and records are compared, so
2,048 ranks take seconds.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch

from model.counts import parameter_shapes
from model.transformer import Transformer
from parallel.apply import Layout
from parallel.mesh import Groups, Mesh
from parallel.pipeline import overlap
from parallel.pipeline.actions import Message, Schedule, Step, parts
from parallel.pipeline.order import walk
from parallel.plan.job import Job

MOST_FAULTS = 12
BUCKET_BYTES = 1 << 30  # parallel.zero1

Ranks = tuple[int, ...]
Messages = Mapping[tuple[int, int], tuple[Message, ...]]  # (from, to) pipeline ranks -> in order


@dataclass(frozen=True)
class Bucket:
    """One collective of the end of a step: the ranks in it and the elements of its bucket."""

    ranks: Ranks
    elements: int


@dataclass(frozen=True)
class RankRecord:
    """What one rank would do.

    groups: process groups it creates, in order. steps: its actions. sends, receives: messages by peer. transfers: of
    its expert group, in order. buckets: reduce-scatters in order. parameters: elements that its modules hold.
    """

    groups: tuple[Ranks, ...]
    steps: tuple[Step, ...]
    sends: Messages
    receives: Messages
    transfers: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    parameters: int


@dataclass(frozen=True)
class Cluster:
    """All ranks of a job. records: by global rank."""

    job: Job
    schedule: Schedule
    stages: tuple[range, ...]
    records: tuple[RankRecord, ...]


def simulate_cluster(job: Job) -> Cluster:
    """Every rank's record. Groups are made by the real constructor on the first, the middle and the last rank."""
    schedule = job.schedule()
    stages = job.stages(schedule)
    layout = Layout(schedule, stages, job.model.num_nextn_predict_layers > 0)
    parallel = job.parallel
    groups = {rank: created_groups(Mesh(parallel, rank), layout) for rank in _samples(parallel.world_size)}
    shared = groups[0]
    held = _parameters(job, layout)
    level = parallel.overlap if parallel.expert > 1 else "off"
    messages = [_messages(schedule, rank, level) for rank in range(parallel.pipeline)]
    transfers = [_transfers(job, schedule, stages, rank, level) for rank in range(parallel.pipeline)]
    sizes = [_buckets(job, layout, rank) for rank in range(parallel.pipeline)]
    records = []
    for rank in range(parallel.world_size):
        mesh = Mesh(parallel, rank)
        at = mesh.pipeline_rank
        mine = groups.get(rank, shared)
        ranks_of = {
            key: mesh.gradient_ranks(key[0], expert=key[1]) for key in dict.fromkeys(key for key, _ in sizes[at])
        }
        buckets = tuple(Bucket(ranks_of[key], elements) for key, elements in sizes[at])
        record = RankRecord(
            shared if mine == shared else mine, schedule.ranks[at], *messages[at], transfers[at], buckets, held[at]
        )
        records.append(record)
    return Cluster(job, schedule, stages, tuple(records))


def _samples(world_size: int) -> tuple[int, ...]:
    return tuple(sorted({0, world_size // 2, world_size - 1}))


def created_groups(mesh: Mesh, layout: Layout) -> tuple[Ranks, ...]:
    """Members of every process group that a rank creates, in order."""
    created: list[Ranks] = []

    def record(ranks: list[int], **_: object) -> Ranks:
        created.append(tuple(ranks))
        return created[-1]

    with patch("parallel.mesh.dist.new_group", record):
        Groups(mesh, layout.holder_sets(), timeout=timedelta(seconds=1))
    return tuple(created)


def _parameters(job: Job, layout: Layout) -> list[int]:
    """Elements that each pipeline rank's stages hold as modules, an embedding that both ends share counted once."""
    sizes: list[int] = []
    local = range(job.model.n_routed_experts // job.parallel.expert)
    built: dict[int, dict[str, int]] = {}
    for number, layers in enumerate(layout.stages):
        with torch.device("meta"):
            stage = Transformer(job.model, layers=layers, expert_ids=local, dispatcher=_NoDispatcher())  # type: ignore[arg-type]
        built[number] = {name: weight.numel() for name, weight in stage.named_parameters()}
    for rank in range(layout.schedule.num_ranks):
        names: dict[str, int] = {}
        for number in layout.schedule.stages_of(rank):
            names |= built[number]
        sizes.append(sum(names.values()))
    return sizes


class _NoDispatcher:
    """In place of a dispatcher, which modules on the meta device never call."""


def _messages(schedule: Schedule, rank: int, level: str) -> tuple[Messages, Messages]:
    """What the executor sends as it goes through its work, and the receives it posts, by the sender's list."""
    sent: dict[tuple[int, int], list[Message]] = {}
    for work in overlap.plan(schedule, rank, num_links=lambda stage: 1, level=level):
        for message in filter(None, map(schedule.output, overlap.sending(work))):
            sent.setdefault((rank, schedule.consumer(message)), []).append(message)
    sends = {pair: tuple(messages) for pair, messages in sent.items() if pair[1] != rank}
    joined, receives = overlap.joins_pairs(level), {}
    needed = {schedule.inputs(action) for step in schedule.ranks[rank] for action in parts(step)}
    for source in range(schedule.num_ranks):
        if source != rank:
            listed = schedule.messages_from(source, pairs_joined=joined).get(rank, ())
            posted = tuple(message for message in listed if message in needed)
            if posted:
                receives[source, rank] = posted
    return sends, receives


def _transfers(job: Job, schedule: Schedule, stages: tuple[range, ...], rank: int, level: str) -> tuple[str, ...]:
    if job.parallel.expert == 1:
        return ()

    def links(stage: int) -> int:
        mtp = job.model.num_nextn_predict_layers if stage == len(stages) - 1 else 0
        return 1 + mtp + sum(job.model.is_moe(layer) for layer in stages[stage])

    return tuple(
        f"{placed.action} {placed.phase.kind} {placed.phase.link}.{placed.phase.half}"
        for work in overlap.plan(schedule, rank, num_links=links, level=level)
        for placed in work.phases
        if placed.phase.is_transfer
    )


Key = tuple[Ranks, bool]  # holders, expert


def _buckets(job: Job, layout: Layout, rank: int) -> tuple[tuple[Key, int], ...]:
    """Holders and elements of each bucket, in the order of ZeRO-1: parameters in the order of the model, by kind."""
    kinds: dict[tuple[Key, bool], list[int]] = {}
    for name, shape in parameter_shapes(job.model):
        holders = layout.holders(name)
        if rank not in holders:
            continue
        expert = ".mlp.experts." in name
        size = math.prod(shape) // (job.parallel.expert if expert else 1)
        open_buckets = kinds.setdefault(((holders, expert), len(shape) > 1), [0])
        if open_buckets[-1] and 4 * (open_buckets[-1] + size) > BUCKET_BYTES:
            open_buckets.append(0)
        open_buckets[-1] += size
    return tuple((key, size) for (key, _), found in kinds.items() for size in found)


# --- what can be wrong -------------------------------------------------------------------------------------------


def faults(cluster: Cluster) -> list[str]:
    """Everything that would hang the run or compute the wrong thing, a dozen lines at most; none for a sound run."""
    found: list[str] = []
    for rule in (_stages, _groups, _unmatched, _stuck, _collectives, _gradients, _sizes):
        for message in rule(cluster):
            found.append(message)
            if len(found) == MOST_FAULTS:
                return found
    return found


def name(cluster: Cluster, rank: int) -> str:
    """A rank in words."""
    mesh = Mesh(cluster.job.parallel, rank)
    return f"rank {rank} (pipeline {mesh.pipeline_rank}, data {mesh.data_rank})"


def _stages(cluster: Cluster) -> Iterator[str]:
    need, has = cluster.schedule.num_stages, len(cluster.stages)
    if need != has:
        yield f"the schedule has {need} stages, the layers are split over {has}: one list of layers for each stage"
    layers = [layer for stage in cluster.stages for layer in stage]
    missing = sorted(set(range(cluster.job.model.num_hidden_layers)) - set(layers))
    if missing:
        yield f"no stage holds layer {missing[0]}"


def _groups(cluster: Cluster) -> Iterator[str]:
    first = cluster.records[0].groups
    for rank, record in enumerate(cluster.records):
        if record.groups is first or record.groups == first:
            continue
        at = next(
            (i for i, pair in enumerate(zip(record.groups, first, strict=False)) if pair[0] != pair[1]),
            min(len(record.groups), len(first)),
        )
        yield (
            f"{name(cluster, rank)} creates {_short(record.groups, at)} as group {at}, where rank 0 creates "
            f"{_short(first, at)}: all ranks must create groups in one order"
        )


def _short(groups: tuple[Ranks, ...], at: int) -> str:
    if at >= len(groups):
        return "none"
    ranks = groups[at]
    return f"[{ranks[0]}..{ranks[-1]}] of {len(ranks)} ranks"


def _pipelines(cluster: Cluster) -> Iterator[tuple[int, list[RankRecord]]]:
    """One pipeline of each kind, by its data rank."""
    parallel, seen = cluster.job.parallel, set()
    for data in range(parallel.data):
        records = [cluster.records[p * parallel.data + data] for p in range(parallel.pipeline)]
        key = tuple((id(r.steps), id(r.sends), id(r.receives)) for r in records)
        if key not in seen:
            seen.add(key)
            yield data, records


def _unmatched(cluster: Cluster) -> Iterator[str]:
    width = cluster.job.parallel.data
    for data, records in _pipelines(cluster):
        for key in dict.fromkeys(k for r in records for k in (*r.sends, *r.receives)):
            source, target = key
            sent, posted = records[source].sends.get(key, ()), records[target].receives.get(key, ())
            if sent == posted:
                continue
            at = next((i for i, pair in enumerate(zip(sent, posted, strict=False)) if pair[0] != pair[1]), None)
            receiver, sender = target * width + data, source * width + data
            who = name(cluster, receiver)
            if at is None:
                yield f"{who} posts {len(posted)} receives from rank {sender}, which sends {len(sent)}"
            else:
                yield (
                    f"{who} posts {_say(posted[at])} as receive {at} from rank {sender}, which sends "
                    f"{_say(sent[at])} there: messages of two ranks match by order alone"
                )


def _say(message: Message) -> str:
    what = "the activation for" if message.kind == "F" else "the gradient for"
    return f"{what} stage {message.stage} micro-batch {message.microbatch}"


def _stuck(cluster: Cluster) -> Iterator[str]:
    width = cluster.job.parallel.data
    for data, records in _pipelines(cluster):
        schedule = Schedule(
            cluster.schedule.name, cluster.schedule.num_ranks, cluster.schedule.num_stages,
            cluster.schedule.num_microbatches, cluster.schedule.placement, tuple(r.steps for r in records),
        )  # fmt: skip
        found = walk(schedule)
        for wait in found.cycle() if found.waits else ():
            rank, other = wait.rank * width + data, wait.other * width + data
            yield f"deadlock: {name(cluster, rank)} at {wait.action.describe()} waits for {wait.what} from rank {other}"


def _collectives(cluster: Cluster) -> Iterator[str]:
    """Members of an expert group start the same transfers in the same order."""
    size = cluster.job.parallel.expert
    for start in range(0, len(cluster.records), size):
        first = cluster.records[start].transfers
        for rank in range(start + 1, start + size):
            mine = cluster.records[rank].transfers
            if mine is first or mine == first:
                continue
            at = next(
                (i for i, p in enumerate(zip(mine, first, strict=False)) if p[0] != p[1]), min(len(mine), len(first))
            )
            said = [seq[at] if at < len(seq) else "nothing" for seq in (mine, first)]
            yield (
                f"{name(cluster, rank)} has {said[0]} as transfer {at} of its expert group, rank {start} has "
                f"{said[1]}: all ranks of a group start transfers in one order"
            )


def _gradients(cluster: Cluster) -> Iterator[str]:
    """Members of a gradient group reduce the same buckets in the same order, and nobody reduces with a stranger."""
    by_group: dict[Ranks, dict[int, tuple[int, ...]]] = {}
    for rank, record in enumerate(cluster.records):
        mine: dict[Ranks, list[int]] = {}
        for bucket in record.buckets:
            mine.setdefault(bucket.ranks, []).append(bucket.elements)
        for ranks, sizes in mine.items():
            by_group.setdefault(ranks, {})[rank] = tuple(sizes)
    known = set(cluster.records[0].groups)
    for ranks, found in by_group.items():
        first = found.get(ranks[0], ())
        wrong = next((rank for rank in ranks if found.get(rank, ()) != first), None)
        if wrong is not None:
            theirs = found.get(wrong, ())
            yield (
                f"{name(cluster, wrong)} reduces {len(theirs)} buckets of {sum(theirs)} elements in the group of rank "
                f"{ranks[0]}, which reduces {len(first)} of {sum(first)}"
            )
        if ranks not in known:
            yield f"no rank creates the group of {len(ranks)} ranks from {ranks[0]} in which gradients are summed"


def _sizes(cluster: Cluster) -> Iterator[str]:
    """The modules hold what the buckets of gradients hold."""
    for rank, record in enumerate(cluster.records):
        reduced = sum(bucket.elements for bucket in record.buckets)
        if reduced != record.parameters:
            yield f"{name(cluster, rank)} holds {record.parameters} parameters and reduces gradients of {reduced}"


def summary(cluster: Cluster) -> dict[str, Any]:
    """Numbers of what was looked at."""
    records: Iterable[RankRecord] = cluster.records
    return {
        "ranks": len(cluster.records),
        "groups": len(cluster.records[0].groups),
        "messages": sum(len(sent) for record in records for sent in record.sends.values()),
        "transfers": sum(len(record.transfers) for record in cluster.records),
        "gradient_collectives": sum(len(record.buckets) for record in cluster.records),
        "parameters_of_fullest_rank": max(record.parameters for record in cluster.records),
    }
