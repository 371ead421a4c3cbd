"""Ranks agree on what happened to any of them, through the collectives that they are in anyway."""

import torch
import torch.distributed as dist

MESSAGE_BYTES = 512


def highest(group: dist.ProcessGroup, device: torch.device, *values: int) -> tuple[int, ...]:
    """The largest of each value over all ranks; one small all-reduce."""
    table = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    return tuple(table.tolist())


def messages(group: dist.ProcessGroup, device: torch.device, mine: str) -> dict[int, str]:
    """What each rank has to say, by rank; those with an empty message are left out. At most 512 bytes each."""
    data = mine.encode("utf-8", "replace")[:MESSAGE_BYTES]
    table = torch.zeros(dist.get_world_size(group), MESSAGE_BYTES, dtype=torch.uint8)
    table[dist.get_rank(group), : len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    table = table.to(device)
    dist.all_reduce(table, op=dist.ReduceOp.SUM, group=group)
    texts = {rank: bytes(row.tolist()).rstrip(b"\0").decode("utf-8", "ignore") for rank, row in enumerate(table.cpu())}
    return {rank: text for rank, text in texts.items() if text}


def require_agreed(group: dist.ProcessGroup, device: torch.device, error: BaseException | None) -> None:
    """Raise on all ranks what went wrong on any: AgreedError names the ranks and what each of them said."""
    (bad,) = highest(group, device, int(error is not None))
    if not bad:
        return
    said = messages(group, device, "" if error is None else (" ".join(str(error).split()) or repr(error)))
    raise AgreedError(said)


class AgreedError(RuntimeError):
    """Something failed on some ranks, and all of them know; by_rank: what each of these said."""

    def __init__(self, by_rank: dict[int, str]) -> None:
        first = dict.fromkeys(by_rank.values())  # the same words from several ranks count once
        super().__init__(
            "; ".join(f"rank {next(r for r, t in by_rank.items() if t == text)}: {text}" for text in first)
        )
        self.by_rank = by_rank
