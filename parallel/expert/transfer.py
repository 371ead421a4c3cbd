"""Transfers of several stages, under way without anybody waiting for them, in the same order on every rank.

On a CPU a stage can be issued only when what it forwards has arrived, at a time that differs from rank to rank, while
collectives of one group match by the order in which they are issued. So each stage of each kind of transfer has a
group of its own, and a `Lane` issues its collectives in the order of the transfers, which is the program's order, the
same on all ranks: a transfer whose turn has not come waits even if it could go on. On a GPU the host issues all stages
at once and a stream keeps them in order.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert.roll_call import RollCall

T = TypeVar("T")


@dataclass(frozen=True)
class Parcel:
    """Rows on their way. rows_ND: their payload. extra_NB: bytes that go with each row (scales, ids, weights)."""

    rows_ND: Tensor
    extra_NB: Tensor | None = None

    def gather(self, source_C: Tensor) -> "Parcel":
        """Copies of rows, by number."""
        extra = None if self.extra_NB is None else self.extra_NB.index_select(0, source_C)
        return Parcel(self.rows_ND.index_select(0, source_C), extra)


@dataclass
class Traffic:
    """What a rank has sent to other ranks over one hop: tokens (rows) and bytes of payload and extras."""

    tokens: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Sent:
    """A parcel under way: what arrives is complete when all works are."""

    arriving: Parcel
    works: tuple[dist.Work, ...]


@dataclass(frozen=True)
class Hop:
    """One stage of a transfer: the process group that it uses; None for a group of one, where nothing travels.

    name: as in messages. ranks: global ranks of the group, this one among them. me: its place.
    """

    name: str
    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    me: int
    traffic: Traffic = field(default_factory=Traffic)

    def start(self, parcel: Parcel, sent: list[int], received: list[int]) -> Sent:
        """Send sent[i] rows to rank i of the group, in order; receive received[i] from it."""
        if self.group is None:
            return Sent(parcel, ())
        rows, work = self._start(parcel.rows_ND, sent, received)
        if parcel.extra_NB is None:
            return Sent(Parcel(rows), (work,))
        extra, extra_work = self._start(parcel.extra_NB, sent, received)
        self.traffic.tokens -= sum(sent) - sent[self.me]  # the same tokens
        return Sent(Parcel(rows, extra), (work, extra_work))

    def _start(self, rows: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, dist.Work]:
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        away, width = sum(sent) - sent[self.me], rows.shape[1] * rows.element_size()
        self.traffic.tokens += away
        self.traffic.bytes += away * width
        work = dist.all_to_all_single(arriving, rows, received, sent, group=self.group, async_op=True)
        assert work is not None
        return arriving, work


class _Broken(Exception):
    """The hop that failed is `hop`, the reason is the cause."""

    def __init__(self, hop: Hop) -> None:
        super().__init__(hop.name)
        self.hop = hop


class Following(Generic[T]):
    """The second stage of a transfer, begun or not."""

    def __init__(self, first: Sent, hop: Hop, begin: Callable[[Parcel], T]) -> None:
        self.hop, self._first, self._begin = hop, first, begin
        self._missing = len(first.works)
        self._begun = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None

    @property
    def begun(self) -> bool:
        """Whether `result` would return without waiting."""
        return self._begun.is_set()

    def begin(self, broken: BaseException | None) -> BaseException | None:
        """Begin it, or fail as an earlier one did; the reason it failed, if it did."""
        try:
            if broken is not None:
                raise broken
            with torch.no_grad():
                self._result = self._begin(self._first.arriving)
        except BaseException as error:
            self._error = error
        self._begun.set()
        return self._error

    def result(self) -> T:
        """What `begin` gave, waiting until the first stage is over; raises what failed."""
        self._begun.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def arrived(self, future: torch.futures.Future) -> None:
        """Note that one work of the first stage is over, as its future says."""
        try:
            future.value()
        except RuntimeError as error:
            broken = _Broken(self.hop)
            broken.__cause__ = error
            self._error = broken
        self._missing -= 1

    @property
    def is_ready(self) -> bool:
        """Whether the first stage is over."""
        return self._missing == 0

    @property
    def error(self) -> BaseException | None:
        """Why the first stage failed, if it did."""
        return self._error


class Lane:
    """Second stages of one kind of transfer, begun in the order of their first ones."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: deque[Following] = deque()
        self._broken: BaseException | None = None

    def follow(self, first: Sent, hop: Hop, begin: Callable[[Parcel], T]) -> Following[T]:
        """Call begin(what arrived) when `first`, over `hop`, is over and all earlier ones have begun."""
        following = Following(first, hop, begin)
        if first.arriving.rows_ND.is_cuda:
            for work in first.works:
                work.wait()  # the stream waits, not the host
            following.begin(None)
            return following
        with self._lock:
            self._waiting.append(following)
        for work in first.works:
            work.get_future().add_done_callback(lambda future: self._over(following, future))
        if not first.works:
            self._advance()
        return following

    def _over(self, following: Following, future: torch.futures.Future) -> None:
        with self._lock:
            following.arrived(future)
            self._advance()

    def _advance(self) -> None:
        with self._lock:
            while self._waiting and self._waiting[0].is_ready:
                following = self._waiting.popleft()
                # After a failure nothing may be issued: it would match another transfer's collective elsewhere.
                self._broken = following.begin(self._broken or following.error)


class Begun(Generic[T]):
    """A last stage that is also the first."""

    begun = True

    def __init__(self, stage: T) -> None:
        self._stage = stage

    def result(self) -> T:
        """See `Following`."""
        return self._stage


@dataclass(frozen=True)
class Transfer(Generic[T]):
    """A transfer of one or two stages under way: see `model.dispatch.Pending`.

    last: the final stage, begun or to begin, and `hop` which it uses. finish: makes the result of what arrived.
    """

    name: str
    last: Following[Sent] | Begun[Sent]
    hop: Hop
    finish: Callable[[Parcel], T]
    roll_call: RollCall
    event: torch.cuda.Event | None = None

    def wait(self) -> T:
        """See `Pending`. Raises ExpertError naming the ranks that did not answer."""
        try:
            sent = self.last.result()
            for work in sent.works:
                try:
                    work.wait()
                except RuntimeError as error:
                    raise _Broken(self.hop) from error
        except _Broken as broken:
            cause = broken.__cause__
            assert cause is not None
            raise self.roll_call.failure(f"{self.name}, {broken.hop.name}", broken.hop.ranks, cause) from cause
        if self.event is not None:
            self.event.wait()
            for tensor in (sent.arriving.rows_ND, sent.arriving.extra_NB):
                if tensor is not None:  # made on the transfer's stream, read on the current one
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return self.finish(sent.arriving)

    def done(self) -> bool:
        """See `Pending`."""
        if not self.last.begun:
            return False
        try:
            works = self.last.result().works
        except Exception:
            return True  # `wait` raises at once
        return all(work.is_completed() for work in works)
