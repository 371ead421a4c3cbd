"""Errors of the native back end: one line that names the rank, what it waited for or was given, and the limit."""

from collections.abc import Sequence
from dataclasses import dataclass

TIMEOUT, MISMATCH, BAD_ID, STOPPED, DISORDER = range(1, 6)  # ep::Code
ROLES = (  # ep::Role
    "layout", "notify send", "notify forward", "notify receive",
    "dispatch IB send", "dispatch forward", "dispatch NVLink receive",
    "combine NVLink send", "combine forward", "combine IB receive",
)  # fmt: skip
ARGUMENTS = ("", "top-k of ids_TK", "bytes per row", "dtype")  # ep::Argument
FORMATS = ("fp8", "bfloat16", "float32")  # ep::Format


class NativeError(RuntimeError):
    """A transfer that cannot be done, or that ended because a rank did not do its part."""

    user_error = True


@dataclass(frozen=True)
class Failure:
    """What a machine's ep_failure gives. own, theirs: the values compared, known to the failing rank only."""

    code: int
    role: int
    channel: int
    rank: int
    peer: int
    argument: int
    own: int
    theirs: int

    def describe(self, *, me: int, names: Sequence[int], num_experts: int, timeout_seconds: float) -> str:
        """One line for rank `me` of the group; names: what the group's ranks are called."""
        text = self._cause(names, num_experts, timeout_seconds, known=me == self.rank)
        return text if me == self.rank else f"rank {names[me]}: stopped with all others, because {text}"

    def _cause(self, names: Sequence[int], num_experts: int, timeout_seconds: float, *, known: bool) -> str:
        rank, peer = names[self.rank], names[self.peer]
        where = f"rank {rank}: {ROLES[self.role]}, channel {self.channel}"
        if self.code == TIMEOUT:
            counts = f" ({self.theirs} of {self.own} items so far)" if known else ""
            return f"{where}: nothing from rank {peer} in {timeout_seconds:g} s{counts}"
        if self.code == MISMATCH:
            own, theirs = (FORMATS[v] if self.argument == 3 else v for v in (self.own, self.theirs))
            values = f" is {own} here and {theirs} on rank {peer}" if known else f" differs from that of rank {peer}"
            return f"{where}: {ARGUMENTS[self.argument]}{values}: all ranks must agree"
        if self.code == BAD_ID:
            value = f" {self.theirs}" if known else " out of range"
            return f"rank {rank}: ids_TK holds{value}: experts go from 0 to {num_experts - 1}, -1 is an unused slot"
        if self.code == DISORDER:
            return f"{where}: a message of rank {peer} is of token {self.theirs} instead of {self.own}"
        return f"rank {rank}: refused its arguments"
