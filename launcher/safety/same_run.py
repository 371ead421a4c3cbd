"""Before anything is built: all ranks have the same configuration and the same libraries."""

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist

from launcher.checkpoint.files import digest_of, versions
from launcher.config import ConfigError, RunConfig, to_dict
from launcher.runtime import Process
from launcher.safety.agreement import messages

NUM_LISTED = 4


def flat(value: object, key: str = "") -> dict[str, object]:
    """Every value of nested dicts and lists by its dotted key, as an override names it: `optim.lr.0.value`."""
    if isinstance(value, list):
        value = {str(number): item for number, item in enumerate(value)}
    if isinstance(value, dict):
        return {name: item for k, v in value.items() for name, item in flat(v, f"{key}.{k}" if key else k).items()}
    return {key: value}


def differences(mine: Mapping[str, object], theirs: Mapping[str, object], *, whose: str, most: int) -> str:
    """Keys with other values there, `key=mine (whose: theirs)`, `most` of them named and the rest counted; empty where
    all are equal. A key that one side lacks has the value `none` there.
    """
    keys = [key for key in {**theirs, **mine} if mine.get(key) != theirs.get(key)]
    named = [f"{key}={_text(mine.get(key))} ({whose}: {_text(theirs.get(key))})" for key in keys[:most]]
    return ", ".join(named) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _text(value: object) -> str:
    """As an override is written."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def require_same(config: RunConfig, process: Process) -> None:
    """ConfigError on every rank that names the ranks and keys whose values differ from rank 0's. All call it together.

    A seed or a layout that differs would otherwise train nonsense, or hang.
    """
    mine = flat({**to_dict(config), "version": versions()})
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
        said = differences(mine, theirs, whose="rank 0", most=NUM_LISTED)
    assert dist.group.WORLD is not None
    found = messages(dist.group.WORLD, process.device, said)
    if found:
        raise ConfigError([f"rank {rank} was started differently: {what}" for rank, what in found.items()])
