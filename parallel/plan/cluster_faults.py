"""What is wrong with a cluster's records: each rank's against those of the ranks that must do the same.

Whose record is wrong is settled by number: the reference is what most of the ranks concerned have, so that the first
rank is named where it is the first that errs.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from parallel.mesh import Mesh
from parallel.pipeline.actions import Message, Schedule
from parallel.pipeline.order import walk
from parallel.plan.cluster import Bucket, Cluster, Hop, RankRecord, Ranks

T = TypeVar("T")

MOST_FAULTS = 12


def faults(cluster: Cluster) -> list[str]:
    """Everything that would hang the run or compute the wrong thing, one line each; none for a sound run.

    A dozen at most, and then how many more there are.
    """
    rules = (_stages, _groups, _hops, _unmatched, _stuck, _transfers, _gradients, _sizes)
    found = [message for rule in rules for message in rule(cluster)]
    more = len(found) - MOST_FAULTS
    return found if more <= 0 else [*found[:MOST_FAULTS], f"and {more} more"]


def name(cluster: Cluster, rank: int) -> str:
    """A rank in words."""
    mesh = Mesh(cluster.job.parallel, rank)
    return f"rank {rank} (pipeline {mesh.pipeline_rank}, data {mesh.data_rank})"


def _usual(values: Iterable[T]) -> T:
    """The most common of them; equal ones are mostly one object."""
    objects: dict[int, tuple[T, int]] = {}
    for value in values:
        objects[id(value)] = value, objects.get(id(value), (value, 0))[1] + 1
    kinds: list[tuple[T, int]] = []
    for value, number in sorted(objects.values(), key=lambda found: -found[1]):
        at = next((i for i, (kind, _) in enumerate(kinds) if kind == value), None)
        if at is None:
            kinds.append((value, number))
        else:
            kinds[at] = kinds[at][0], kinds[at][1] + number
    return max(kinds, key=lambda kind: kind[1])[0]


def _differ(mine: Sequence[object], theirs: Sequence[object]) -> int:
    """The first place where two sequences differ."""
    pairs = enumerate(zip(mine, theirs, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(mine), len(theirs)))


def _at(sequence: Sequence[T], place: int) -> T | None:
    return sequence[place] if place < len(sequence) else None


def _place(cluster: Cluster, pipeline: int) -> range:
    """The ranks at a place in the pipeline."""
    width = cluster.job.parallel.data
    return range(pipeline * width, (pipeline + 1) * width)


# --- stages and groups -------------------------------------------------------------------------------------------


def _stages(cluster: Cluster) -> Iterator[str]:
    need, has = cluster.schedule.num_stages, len(cluster.stages)
    if need != has:
        yield f"the schedule has {need} stages, the layers are split over {has}: one list of layers for each stage"
    layers = [layer for stage in cluster.stages for layer in stage]
    missing = sorted(set(range(cluster.job.model.num_hidden_layers)) - set(layers))
    if missing:
        yield f"no stage holds layer {missing[0]}"


def _groups(cluster: Cluster) -> Iterator[str]:
    usual = _usual(record.groups for record in cluster.records)
    for rank, record in enumerate(cluster.records):
        if record.groups is usual or record.groups == usual:
            continue
        at = _differ(record.groups, usual)
        yield (
            f"{name(cluster, rank)} creates {_short(_at(record.groups, at))} as group {at}, where the others create "
            f"{_short(_at(usual, at))}: all ranks must create groups in one order"
        )


def _short(ranks: Ranks | None) -> str:
    return "none" if ranks is None else f"[{ranks[0]}..{ranks[-1]}] of {len(ranks)} ranks"


def _hops(cluster: Cluster) -> Iterator[str]:
    """Members of a group of the dispatcher's create it at the same place among theirs, for the same stage."""
    records, named = cluster.records, set[int]()
    for at in range(max(len(record.hops) for record in records)):
        votes: dict[int, Counter[Hop]] = {}
        for rank, record in enumerate(records):
            for claimed in record.hops[at : at + 1]:
                for member in claimed.ranks:
                    votes.setdefault(member, Counter())[claimed] += member != rank
        for rank in sorted(set(votes) - named):
            mine = _at(records[rank].hops, at)
            (theirs, number), *_ = votes[rank].most_common(1)
            if mine != theirs and number > (votes[rank][mine] if mine else 0):
                named.add(rank)
                said = f"{mine.name} {_short(mine.ranks)}" if mine else "none"
                yield (
                    f"{name(cluster, rank)} creates {said} as group {at} of its dispatcher, {number} of its peers "
                    f"create {theirs.name} {_short(theirs.ranks)}: all members create a group at the same place"
                )


# --- the pipeline ------------------------------------------------------------------------------------------------


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
    """Messages of two ranks match by order alone. The receiver is named unless only the sender differs from others."""
    width = cluster.job.parallel.data
    for data, records in _pipelines(cluster):
        for key in dict.fromkeys(k for r in records for k in (*r.sends, *r.receives)):
            source, target = key
            sent, posted = records[source].sends.get(key, ()), records[target].receives.get(key, ())
            if sent == posted:
                continue
            sends = _usual(cluster.records[rank].sends.get(key, ()) for rank in _place(cluster, source))
            receives = _usual(cluster.records[rank].receives.get(key, ()) for rank in _place(cluster, target))
            at, receiver, sender = _differ(sent, posted), target * width + data, source * width + data
            if sent != sends and posted == receives:
                who, other = name(cluster, sender), f"rank {receiver}, which posts"
                said = (f"sends {_say(_at(sent, at))} as message {at} to", _say(_at(posted, at)))
            else:
                who, other = name(cluster, receiver), f"rank {sender}, which sends"
                said = (f"posts {_say(_at(posted, at))} as receive {at} from", _say(_at(sent, at)))
            yield f"{who} {said[0]} {other} {said[1]} there: messages of two ranks match by order alone"


def _say(message: Message | None) -> str:
    if message is None:
        return "nothing"
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


# --- collectives -------------------------------------------------------------------------------------------------


def _transfers(cluster: Cluster) -> Iterator[str]:
    """Members of an expert group start the same transfers in the same order, each over the same hops.

    With `_hops`, by which a hop is one group for all its members, the collectives of every group are in one order.
    Where a group is of two minds, ranks elsewhere in the same place of the pipeline decide.
    """
    size, records = cluster.job.parallel.expert, cluster.records
    for start in range(0, len(records), size):
        members = range(start, start + size)
        found = [records[rank].transfers for rank in members]
        if all(one is found[0] for one in found):
            continue
        usual = _usual(found)
        if 2 * sum(one == usual for one in found) <= size:
            place = _place(cluster, Mesh(cluster.job.parallel, start).pipeline_rank)
            usual = _usual(records[rank].transfers for rank in place)
        for rank, mine in zip(members, found, strict=True):
            if mine is usual or mine == usual:
                continue
            at = _differ(mine, usual)
            said = [_at(mine, at) or "nothing", _at(usual, at) or "nothing"]
            yield (
                f"{name(cluster, rank)} has {said[0]} as transfer {at} of its expert group, the others have "
                f"{said[1]}: all ranks of a group start transfers in one order"
            )


def _gradients(cluster: Cluster) -> Iterator[str]:
    """Ranks at one place of the pipeline reduce the same buckets in one order; else, where they wait for each other."""
    found = list(_reduced(cluster))
    yield from found or _waiting(cluster)
    created = set(_usual(record.groups for record in cluster.records))
    for ranks in dict.fromkeys(bucket.ranks for record in cluster.records for bucket in record.buckets):
        if ranks not in created:
            yield f"no rank creates the group of {len(ranks)} ranks from {ranks[0]} in which gradients are summed"


def _reduced(cluster: Cluster) -> Iterator[str]:
    roles: dict[tuple[int, int], tuple[bool, Ranks]] = {}

    def sequence(rank: int) -> tuple[object, ...]:
        """Buckets with their groups as seen from the rank: the same for all ranks at its place."""
        expert = Mesh(cluster.job.parallel, rank).expert_rank
        for ranks in {id(b.ranks): b.ranks for b in cluster.records[rank].buckets}.values():
            if (id(ranks), expert) not in roles:
                roles[id(ranks), expert] = _role(cluster, ranks, expert)
        return tuple((roles[id(b.ranks), expert], b.elements) for b in cluster.records[rank].buckets)

    for pipeline in range(cluster.job.parallel.pipeline):
        place = _place(cluster, pipeline)
        sequences = [sequence(rank) for rank in place]
        usual = _usual(sequences)
        for rank, mine in zip(place, sequences, strict=True):
            if mine != usual:
                at, like = _differ(mine, usual), cluster.records[place[sequences.index(usual)]].buckets
                yield (
                    f"{name(cluster, rank)} reduces {_bucket(_at(cluster.records[rank].buckets, at))} as bucket {at} "
                    f"of gradients, the others at its place {_bucket(_at(like, at))}: all ranks of a group reduce "
                    "in one order"
                )


def _role(cluster: Cluster, ranks: Ranks, expert: int) -> tuple[bool, Ranks]:
    """Whether a group is of ranks with the same experts as a rank; those ranks, counted from their expert group's."""
    same = all(Mesh(cluster.job.parallel, rank).expert_rank == expert for rank in ranks)
    return same, tuple(rank - expert for rank in ranks) if same else ranks


def _bucket(bucket: Bucket | None) -> str:
    return "none" if bucket is None else f"{bucket.elements} elements in {_short(bucket.ranks)}"


def _waiting(cluster: Cluster) -> Iterator[str]:
    """One line if the reductions cannot all take place when each rank starts one after the other."""
    queues = [record.buckets for record in cluster.records]
    at, arrived = [0] * len(queues), dict[Bucket, list[int]]()
    looking = list(range(len(queues)))
    while looking:
        rank = looking.pop()
        if at[rank] == len(queues[rank]):
            continue
        bucket = queues[rank][at[rank]]
        here = arrived.setdefault(bucket, [])
        here.append(rank)
        if len(here) == len(bucket.ranks):
            looking += arrived.pop(bucket)
            for member in here:
                at[member] += 1
    for bucket, here in arrived.items():
        other = next(rank for rank in bucket.ranks if rank not in here)
        yield (
            f"deadlock: {name(cluster, here[0])} reduces {_bucket(bucket)} as bucket {at[here[0]]} of gradients and "
            f"waits for rank {other}, which is at {_bucket(_at(queues[other], at[other]))}"
        )
        return


def _sizes(cluster: Cluster) -> Iterator[str]:
    """The modules hold what the buckets of gradients hold."""
    for rank, record in enumerate(cluster.records):
        reduced = sum(bucket.elements for bucket in record.buckets)
        if reduced != record.parameters:
            yield f"{name(cluster, rank)} holds {record.parameters} parameters and reduces gradients of {reduced}"
