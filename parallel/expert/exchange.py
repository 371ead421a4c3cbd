"""What the ranks of an expert group tell each other before tokens move: counts, and whether they mean the same.

One exchange of small integers a dispatch. It carries every rank's header as well, so that a mistake of one rank is
found by all, in the same words and at once, where they would otherwise wait for each other until the timeout.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.expert.roll_call import ExpertError, RollCall

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Header:
    """What a rank is about to send; the fields from `number` on must be the same on all ranks.

    problem: 0, or 1 + index in `PROBLEMS` with its value and limit. lowest, highest: of its expert ids, -1 if it has
    none. number: dispatches so far, which differs where ranks run different programs. dtype: index in `DTYPES`.
    """

    problem: int
    value: int
    limit: int
    lowest: int
    highest: int
    number: int
    hidden: int
    dtype: int
    top_k: int
    wire: int


PROBLEMS = (
    "x_TD has {value} dimensions: it must have 2, [tokens, hidden]",
    "x_TD is of a type that does not travel: use float32, bfloat16, float16 or float64",
    "ids_TK has {value} dimensions: it must have 2, [tokens, top-k]",
    "ids_TK has {value} rows: x_TD has {limit} tokens",
    "ids_TK is not of whole numbers: use torch.int64",
    "weights_TK has {value} elements: ids_TK has {limit}",
    "ids_TK has {value} columns: at most {limit} can be sent",
)
MAX_TOP_K = 256
_SAME = {"number": "is at dispatch", "hidden": "sends hidden size", "top_k": "sends top-k", "wire": "sends wire format"}


@dataclass(frozen=True)
class Exchanged:
    """Tables on the host: own_RC what this rank told each rank, from_RC what each rank told this one."""

    own_RC: Tensor
    from_RC: Tensor


@dataclass(frozen=True)
class Given:
    """The arguments of a dispatch. values_TD: x, or its FP8 values; dtype: of the rows that will arrive."""

    values_TD: Tensor
    dtype: torch.dtype
    ids_TK: Tensor
    weights_TK: Tensor

    def header(self, *, number: int, wire: int) -> Header:
        """With the first thing wrong, if any; no host sync: lowest and highest are 0, the device fills them in."""
        x, ids, weights = self.values_TD, self.ids_TK, self.weights_TK
        checks = (
            (x.ndim != 2, x.ndim, 0),
            (self.dtype not in DTYPES, 0, 0),
            (ids.ndim != 2, ids.ndim, 0),
            (len(ids) != len(x), len(ids), len(x)),
            (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool, 0, 0),
            (weights.shape != ids.shape, weights.numel(), ids.numel()),
            (ids.shape[-1] > MAX_TOP_K, ids.shape[-1], MAX_TOP_K),
        )
        problem, value, limit = next(((i, v, n) for i, (bad, v, n) in enumerate(checks, 1) if bad), (0, 0, 0))
        if problem:
            return Header(problem, value, limit, -1, -1, number, 0, 0, 0, wire)
        return Header(0, 0, 0, 0, 0, number, x.shape[1], DTYPES.index(self.dtype), ids.shape[1], wire)


class ExpertGroup:
    """The ranks that hold all experts between them, and what they agree on before each dispatch.

    timeout: of the group's collectives; a failure is explained within a quarter of it more, 5 s at most.
    """

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int, wire: int, timeout: timedelta) -> None:
        self.group, self.num_experts, self.timeout, self._wire = group, num_experts, timeout, wire
        self.ranks, self.me = tuple(dist.get_process_group_ranks(group)), dist.get_rank(group)
        self.roll_call = RollCall(group, grace_seconds=min(5.0, timeout.total_seconds() / 4))
        self.number = 0

    def exchange(self, given: Given, *, width: int, table: Callable[[Tensor], Tensor]) -> Exchanged:
        """Tell rank r row r of table(ids) [R, width], int64, and hear the same from it; one copy to the host.

        Raises ExpertError, on every rank alike, for the first rank whose header is not as it should be.
        """
        self.number += 1
        header, ids_TK = given.header(number=self.number, wire=self._wire), given.ids_TK
        words = torch.tensor(astuple(header), device=given.values_TD.device)
        if header.problem:
            table_RC = words.new_zeros(len(self.ranks), width)
        else:
            if ids_TK.numel():
                words[3], words[4] = ids_TK.amin(), ids_TK.amax()
            table_RC = table(ids_TK.clamp(-1, self.num_experts - 1))  # wrong ids are found below, by all
        own_RC = torch.cat([words.expand(len(self.ranks), -1), table_RC], 1)
        from_RC = torch.empty_like(own_RC)
        try:
            dist.all_to_all_single(from_RC, own_RC, group=self.group)
        except RuntimeError as error:
            what = f"dispatch {self.number}, exchange of counts"
            raise self.roll_call.failure(what, self.ranks, error) from error
        own_RC, from_RC = torch.stack([own_RC, from_RC]).cpu()  # splits of an all-to-all are host integers
        start = len(fields(Header))
        _check([Header(*row) for row in from_RC[:, :start].tolist()], self.ranks, self.num_experts)
        return Exchanged(own_RC[:, start:], from_RC[:, start:])


def _check(headers: list[Header], ranks: tuple[int, ...], num_experts: int) -> None:
    for rank, header in zip(ranks, headers, strict=True):
        if header.problem:
            text = PROBLEMS[header.problem - 1].format(value=header.value, limit=header.limit)
            raise ExpertError(f"rank {rank}: {text}")
        for value in (header.lowest, header.highest):
            if not -1 <= value < num_experts:
                raise ExpertError(
                    f"rank {rank}: ids_TK holds {value}: experts go from 0 to {num_experts - 1}, -1 is an unused slot"
                )
    first = headers[0]
    for rank, header in zip(ranks, headers, strict=True):
        for name, words in _SAME.items():
            mine, theirs = getattr(header, name), getattr(first, name)
            if mine != theirs:
                raise ExpertError(f"rank {rank} {words} {mine}, rank {ranks[0]} {theirs}: all {len(ranks)} must agree")
        if header.dtype != first.dtype:
            mine, theirs = DTYPES[header.dtype], DTYPES[first.dtype]
            raise ExpertError(f"rank {rank} sends {mine}, rank {ranks[0]} {theirs}: all {len(ranks)} must agree")
