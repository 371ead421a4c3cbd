"""All ranks of a run in one process: the groups, messages and collectives of each, to be held against one another.

What a rank does comes from the code that runs: `parallel.mesh` and `parallel.expert.hops` name the groups, the
schedule's actions give messages, `parallel.pipeline.overlap` the transfers to and from experts, ZeRO-1's buckets the
collectives of gradients, and the stages are built as modules on the meta device. Ranks that do the same share one
record, so 2,048 ranks take seconds. `cluster_faults` compares the records.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from model.counts import parameter_shapes
from model.transformer import Transformer
from parallel.apply import Layout
from parallel.expert import hops
from parallel.expert.dispatchers import ranks_per_node
from parallel.mesh import Mesh, memberships
from parallel.pipeline import overlap
from parallel.pipeline.actions import Action, Message, Schedule, Step, parts
from parallel.pipeline.phases import Phase
from parallel.plan.job import Job
from parallel.plan.memory import in_blocks

BUCKET_BYTES = 1 << 30  # parallel.zero1

Ranks = tuple[int, ...]
Messages = Mapping[tuple[int, int], tuple[Message, ...]]  # (from, to) pipeline ranks -> in order


@dataclass(frozen=True)
class Bucket:
    """One collective of the end of a step: the ranks in it and the elements of its bucket."""

    ranks: Ranks
    elements: int


class Hop(NamedTuple):
    """A group of the dispatcher's own: the stage of transfers that it is for, and its ranks."""

    name: str
    ranks: Ranks


class Transfer(NamedTuple):
    """A transfer of an expert group: what of which action, and the hops on which it has collectives, in order."""

    action: Action
    phase: Phase
    hops: tuple[str, ...]

    def __str__(self) -> str:
        over = f" over {' and '.join(self.hops)}" if self.hops else ""
        return f"{self.action} {self.phase.kind} {self.phase.link}.{self.phase.half}{over}"


@dataclass(frozen=True)
class RankRecord:
    """What one rank would do.

    groups: process groups that all ranks create, in order. hops: those that its dispatcher creates after them. steps:
    its actions. sends, receives: messages by peer. transfers: of its expert group, in order. buckets: reduce-scatters
    in order. parameters: elements that its modules hold.
    """

    groups: tuple[Ranks, ...]
    hops: tuple[Hop, ...]
    steps: tuple[Step, ...]
    sends: Messages
    receives: Messages
    transfers: tuple[Transfer, ...]
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
    """Every rank's record."""
    schedule = job.schedule()
    stages = job.stages(schedule)
    layout = Layout(schedule, stages, job.model.num_nextn_predict_layers > 0)
    parallel = job.parallel
    created = tuple(one.ranks for one in memberships(parallel, layout.holder_sets()))
    own = _hops(job)
    held = _parameters(job, layout)
    level = parallel.overlap if parallel.expert > 1 else "off"
    messages = [_messages(schedule, rank, level) for rank in range(parallel.pipeline)]
    transfers = [_transfers(job, schedule, stages, rank, level) for rank in range(parallel.pipeline)]
    sizes = [_buckets(job, layout, rank) for rank in range(parallel.pipeline)]
    shared: dict[Ranks, Ranks] = {}  # one object for each group, whoever names it
    records = []
    for rank in range(parallel.world_size):
        mesh = Mesh(parallel, rank)
        at = mesh.pipeline_rank
        ranks_of = {}
        for key in dict.fromkeys(key for key, _ in sizes[at]):
            ranks = mesh.gradient_ranks(key[0], expert=key[1])
            ranks_of[key] = shared.setdefault(ranks, ranks)
        buckets = tuple(Bucket(ranks_of[key], elements) for key, elements in sizes[at])
        record = RankRecord(
            created, own[rank], schedule.ranks[at], *messages[at], transfers[at], buckets, held[at]
        )  # fmt: skip
        records.append(record)
    return Cluster(job, schedule, stages, tuple(records))


def _hops(job: Job) -> list[tuple[Hop, ...]]:
    """Groups that each rank's dispatcher creates, in order; a group of one is none."""
    parallel = job.parallel
    if parallel.dispatcher != "collective" or parallel.expert == 1:
        return [()] * parallel.world_size
    placed = replace(parallel, ranks_per_node=parallel.ranks_per_node or job.hardware.gpus_per_node)
    per_node = ranks_per_node(placed, parallel.expert)
    found = []
    for start in range(0, parallel.world_size, parallel.expert):
        for groups in hops.memberships(Mesh(parallel, start).expert_ranks(), per_node):
            found.append(tuple(Hop(*group) for group in groups.items() if len(group[1]) > 1))
    return found


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


def _transfers(job: Job, schedule: Schedule, stages: tuple[range, ...], rank: int, level: str) -> tuple[Transfer, ...]:
    if job.parallel.expert == 1:
        return ()

    def links(stage: int) -> int:
        mtp = job.model.num_nextn_predict_layers if stage == len(stages) - 1 else 0
        return 1 + mtp + sum(job.model.is_moe(layer) for layer in stages[stage])

    return tuple(
        Transfer(placed.action, placed.phase, hops.stages(job.parallel.dispatcher, placed.phase.kind))
        for work in overlap.plan(schedule, rank, num_links=links, level=level)
        for placed in work.phases
        if placed.phase.is_transfer
    )


Key = tuple[Ranks, bool]  # holders, and whether only ranks with the same experts


def _buckets(job: Job, layout: Layout, rank: int) -> tuple[tuple[Key, int], ...]:
    """Holders and elements of each bucket, in the order of ZeRO-1: parameters in the order of the model, by kind."""
    kinds: dict[tuple[Key, bool, bool], list[int]] = {}
    for name, shape in parameter_shapes(job.model):
        holders = layout.holders(name)
        if rank not in holders:
            continue
        expert = ".mlp.experts." in name and job.parallel.expert > 1
        size = math.prod(shape) // (job.parallel.expert if expert else 1)
        alone = job.fp8_alone and in_blocks(name, shape)
        open_buckets = kinds.setdefault(((holders, expert), len(shape) > 1, alone), [0])
        if open_buckets[-1] and 4 * (open_buckets[-1] + size) > BUCKET_BYTES:
            open_buckets.append(0)
        open_buckets[-1] += size
    return tuple((key, size) for (key, _, _), found in kinds.items() for size in found)


def summary(cluster: Cluster) -> dict[str, Any]:
    """Numbers of what was looked at; collectives are counted once on each of their ranks."""
    records = cluster.records
    counted: dict[tuple[int, tuple[str, ...]], int] = {}  # once for ranks that do the same
    collectives = 0
    for record in records:
        key = id(record.transfers), tuple(hop.name for hop in record.hops)
        if key not in counted:
            counted[key] = sum(name in (hops.ALL, *key[1]) for t in record.transfers for name in t.hops)
        collectives += counted[key]
    return {
        "ranks": len(records),
        "groups": len(records[0].groups),
        "dispatcher_groups": len({hop for record in records for hop in record.hops}),
        "messages": sum(len(sent) for record in records for sent in record.sends.values()),
        "transfers": sum(len(record.transfers) for record in records),
        "transfer_collectives": collectives,
        "gradient_collectives": sum(len(bucket.ranks) > 1 for record in records for bucket in record.buckets),
        "parameters_of_fullest_rank": max(record.parameters for record in records),
    }
