"""Would a schedule run over a transport whose sends block until their receive is posted? No torch.

`Mailbox` never waits in a send before the end of the step, so for it the order of actions decides alone (`order.py`).
A transport of finite depth, or an engine that waits for its sends, can still deadlock where that order does not.
"""

from collections import deque

from parallel.pipeline.actions import Action, Message, Schedule, parts
from parallel.pipeline.order import Progress, Wait, Walk


class _Channel:
    """Messages from one rank to another, in the sender's order; receives are posted in that order too."""

    def __init__(self, messages: list[Message], ahead: int) -> None:
        self.index = {message: number for number, message in enumerate(messages)}
        self.ahead, self.posted, self.sent = ahead, ahead, 0

    def post(self, message: Message) -> bool:
        """The receiver comes to a message: it posts all up to it. Whether anything is new."""
        before, self.posted = self.posted, max(self.posted, self.index[message] + 1)
        return self.posted > before

    def take(self) -> None:
        """The receiver uses a message and posts one more than before, if it looks ahead at all."""
        self.posted += self.ahead > 0


class _Blocking:
    """All ranks and channels of a schedule, moved one event at a time."""

    def __init__(self, schedule: Schedule, ahead: int) -> None:
        self.schedule, self.progress = schedule, Progress(schedule)
        self.channels = {
            (source, other): _Channel(messages, ahead)
            for source in range(schedule.num_ranks)
            for other, messages in schedule.messages_from(source).items()
            if other != source
        }
        self.source = {message: pair for pair, channel in self.channels.items() for message in channel.index}
        self.position = [0] * schedule.num_ranks
        self.outbox: list[deque[tuple[Action, Message]]] = [deque() for _ in range(schedule.num_ranks)]
        self.steps: list[tuple[int, int]] = []

    def ended(self, rank: int) -> bool:
        return self.position[rank] == len(self.schedule.ranks[rank]) and not self.outbox[rank]

    def advance(self, rank: int) -> Wait | None:
        """One event of the rank, or what it waits for. Posting receives alone is an event: a sender may wait for it."""
        if self.outbox[rank]:
            action, message = self.outbox[rank][0]
            other = self.schedule.consumer(message)
            channel = self.channels[rank, other]
            if channel.sent >= channel.posted:
                return Wait(rank, action, "a receive of its result", other)
            channel.sent += 1
            self.outbox[rank].popleft()
            return None
        step = self.schedule.ranks[rank][self.position[rank]]
        needed = [(a, m) for a in parts(step) if (m := self.schedule.inputs(a)) is not None and m in self.source]
        if sum(self.channels[self.source[message]].post(message) for _, message in needed):
            return None
        for action, message in needed:
            pair = self.source[message]
            if self.channels[pair].index[message] >= self.channels[pair].sent:
                return Wait(rank, action, "an activation" if action.kind == "F" else "a gradient", pair[0])
        wait = self.progress.missing(step)
        if wait is not None:
            return wait
        for _, message in needed:
            self.channels[self.source[message]].take()
        self._run(rank)
        return None

    def _run(self, rank: int) -> None:
        for action in parts(self.schedule.ranks[rank][self.position[rank]]):
            self.progress.done(action)
            message = self.schedule.output(action)
            if message is not None and message in self.source:
                self.outbox[rank].append((action, message))
        self.steps.append((rank, self.position[rank]))
        self.position[rank] += 1


def walk_blocking(schedule: Schedule, *, ahead: int) -> Walk:
    """Every rank as far as it gets where a send blocks until its receive is posted.

    The receiver posts `ahead` receives of each sender at the start, in the sender's order, and one more whenever it
    takes a message. 0 is a rendezvous: it posts a receive only when it comes to the action that needs it.
    """
    state, found = _Blocking(schedule, ahead), Walk()
    moved = True
    while moved:
        moved = False
        for rank in range(schedule.num_ranks):
            found.waits.pop(rank, None)
            while not state.ended(rank):
                wait = state.advance(rank)
                if wait is not None:
                    found.waits[rank] = wait
                    break
                moved = True
    found.steps = state.steps
    return found


def least_ahead(schedule: Schedule, *, most: int = 64) -> int | None:
    """Fewest receives to post ahead with which blocking sends do not deadlock; None if `most` are too few."""
    return next((ahead for ahead in range(most + 1) if not walk_blocking(schedule, ahead=ahead).waits), None)
