"""Messages between pipeline ranks: receives posted early in the sender's order, sends waited late.

Messages of a pair of ranks match by order, so the receiver reads the sender's own schedule and posts its receives in
exactly that order, a few ahead of need, whatever order it consumes them in.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.pipeline.actions import Message, Schedule


class PipelineError(RuntimeError):
    """A peer that did not answer; the message names it, the action and the micro-batch."""


class Lanes(Protocol):
    """Process groups of one pipeline, first rank to last, one for each direction of messages; see `mesh.Groups`."""

    @property
    def down(self) -> dist.ProcessGroup:
        """To higher ranks."""
        ...

    @property
    def up(self) -> dist.ProcessGroup:
        """To lower ranks."""
        ...


@dataclass(frozen=True, slots=True)
class _Pending:
    tensor: Tensor
    work: dist.Work


def incoming_messages(schedule: Schedule, rank: int, *, pairs_joined: bool = False) -> dict[int, tuple[Message, ...]]:
    """What each rank, this one too, sends to this one, in the order of its own list; see `Schedule.messages_from`."""
    found = {
        source: tuple(schedule.messages_from(source, pairs_joined=pairs_joined).get(rank, ()))
        for source in range(schedule.num_ranks)
    }
    return {source: messages for source, messages in found.items() if messages}


class Mailbox:
    """One rank's messages of one step.

    incoming: from each rank, in the order in which it sends them (`incoming_messages`, the same in every step). shape:
    of a message's tensor. ahead: receives posted beyond the one needed, for each source.
    """

    def __init__(
        self,
        schedule: Schedule,
        mesh: Mesh,
        groups: Lanes,
        *,
        incoming: Mapping[int, Sequence[Message]],
        shape: Callable[[Message], tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        ahead: int = 4,
    ) -> None:
        self._schedule, self._mesh, self._groups = schedule, mesh, groups
        self._shape, self._dtype, self._device, self._ahead = shape, dtype, device, ahead
        self._me = mesh.pipeline_rank
        self._expected = {source: deque(messages) for source, messages in incoming.items()}
        self._source = {message: source for source, queue in self._expected.items() for message in queue}
        self._posted: dict[Message, _Pending] = {}
        self._local: dict[Message, Tensor] = {}
        self._sending: deque[tuple[Message, _Pending]] = deque()
        self._taken: list[int] = []  # sources of messages since the last `post_ahead`
        for source in self._expected:
            self._post(source, self._ahead)

    def _group(self, source: int, destination: int) -> dist.ProcessGroup:
        return self._groups.down if source < destination else self._groups.up

    def _post(self, source: int, number: int) -> None:
        me = self._me
        queue = self._expected[source]
        while queue and number > 0 and source != me:
            message = queue.popleft()
            tensor = torch.empty(self._shape(message), dtype=self._dtype, device=self._device)
            try:
                # rank of a pipeline's group is the pipeline rank; dist.irecv would look it up for every message
                work = self._group(source, me).recv([tensor], source, 0)
            except RuntimeError as error:
                raise self._named("asking for", message, "from", source, error) from error
            self._posted[message] = _Pending(tensor, work)
            number -= 1

    def receive(self, message: Message) -> Tensor:
        """The tensor of a message, waiting for it if need be; PipelineError if its sender fails.

        `post_ahead` is to follow, when what waited for the message has begun.
        """
        if message in self._local:
            return self._local.pop(message)
        source = self._source[message]
        while message not in self._posted:
            self._post(source, 1)
        pending = self._posted.pop(message)
        self._taken.append(source)
        try:
            pending.work.wait()
        except RuntimeError as error:
            raise self._named("waiting for", message, "from", source, error) from error
        return pending.tensor

    def post_ahead(self) -> None:
        """Post a receive for each one taken, so that senders never wait for this rank."""
        for source in self._taken:
            self._post(source, 1)
        self._taken.clear()

    def send(self, message: Message, tensor: Tensor) -> None:
        """Start sending; the tensor must not change until `finish`."""
        destination, me = self._schedule.consumer(message), self._me
        tensor = tensor.detach()
        if destination == me:
            self._local[message] = tensor
            return
        tensor = tensor.contiguous()
        try:
            work = self._group(me, destination).send([tensor], destination, 0)
        except RuntimeError as error:
            raise self._named("sending", message, "to", destination, error) from error
        self._sending.append((message, _Pending(tensor, work)))
        while self._sending and self._sending[0][1].work.is_completed():
            self._sending.popleft()

    def finish(self) -> None:
        """Wait for all sends of the step."""
        while self._sending:
            message, pending = self._sending.popleft()
            try:
                pending.work.wait()
            except RuntimeError as error:
                destination = self._schedule.consumer(message)
                raise self._named("sending", message, "to", destination, error) from error

    def _named(self, doing: str, message: Message, way: str, peer: int, error: RuntimeError) -> PipelineError:
        """A failure with what this rank was doing and with whom."""
        rank, reason = self._mesh.rank_at(peer, self._mesh.data_rank), str(error).splitlines()[0]
        what = f"{doing} {_words(message)} {way} pipeline rank {peer} (rank {rank})"
        return PipelineError(f"rank {self._mesh.rank} failed {what}: {reason}")


def _words(message: Message) -> str:
    kind = "activation" if message.kind == "F" else "gradient"
    return f"the {kind} for stage {message.stage} micro-batch {message.microbatch}"
