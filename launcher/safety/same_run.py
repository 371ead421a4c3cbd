"""Before anything is built: all ranks have the same configuration and the same libraries."""

import json

import torch
import torch.distributed as dist

from launcher.checkpoint.files import digest_of, versions
from launcher.config import ConfigError, RunConfig, to_dict
from launcher.runtime import Process
from launcher.safety.agreement import messages

NUM_LISTED = 4


def _flat(value: object, key: str = "") -> dict[str, object]:
    if isinstance(value, dict):
        return {name: item for k, v in value.items() for name, item in _flat(v, f"{key}.{k}" if key else k).items()}
    return {key: value}


def require_same(config: RunConfig, process: Process) -> None:
    """ConfigError on every rank that names the ranks and keys whose values differ from rank 0's. All call it together.

    A seed or a layout that differs would otherwise train nonsense, or hang.
    """
    mine = _flat({"config": to_dict(config), "version": versions()})
    text = json.dumps(mine).encode() if process.rank == 0 else b""
    size = torch.tensor([len(text)], dtype=torch.int64, device=process.device)
    dist.broadcast(size, src=0)
    table = torch.zeros(int(size), dtype=torch.uint8, device=process.device)
    if process.rank == 0:
        table.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(table, src=0)
    theirs = json.loads(bytes(table.cpu().tolist()))
    mine = json.loads(json.dumps(mine))
    said = ""
    if digest_of(mine) != digest_of(theirs):
        keys = [key for key in {**theirs, **mine} if mine.get(key) != theirs.get(key)]
        said = ", ".join(
            f"{key.removeprefix('config.')}={mine.get(key)} (rank 0: {theirs.get(key)})" for key in keys[:NUM_LISTED]
        ) + (f" and {len(keys) - NUM_LISTED} more" if len(keys) > NUM_LISTED else "")
    assert dist.group.WORLD is not None
    found = messages(dist.group.WORLD, process.device, said)
    if found:
        raise ConfigError([f"rank {rank} was started differently: {what}" for rank, what in found.items()])
