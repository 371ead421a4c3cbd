"""Constructs the dispatcher that the configuration names: the one place that knows all back ends."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from model.dispatch import LocalDispatcher, TokenDispatcher
from parallel.config import ParallelConfig
from parallel.expert.placement import PlacementError


@dataclass(frozen=True)
class Tokens:
    """What is dispatched: experts of a layer, how many a token chooses, and the size of a token's vector."""

    num_experts: int
    top_k: int
    hidden_size: int


def ranks_per_node(config: ParallelConfig, num_ranks: int) -> int:
    """Ranks of an expert group of num_ranks that share a node. Raises PlacementError unless nodes and groups nest."""
    host = config.ranks_per_node or num_ranks
    if num_ranks <= host and host % num_ranks == 0:
        return num_ranks
    if num_ranks % host == 0:
        return host
    fits = [n for n in range(1, 2 * num_ranks) if n % host == 0 or host % n == 0]
    raise PlacementError(
        f"parallel.expert={num_ranks} is neither whole nodes nor inside one with parallel.ranks_per_node={host}: "
        f"use parallel.expert={max((n for n in fits if n < num_ranks), default=host)} or "
        f"{min((n for n in fits if n > num_ranks), default=host)}"
    )


def build_dispatcher(
    config: ParallelConfig, group: dist.ProcessGroup, tokens: Tokens, *, timeout: timedelta
) -> TokenDispatcher:
    """The dispatcher of `config.dispatcher` over an expert group; all its ranks construct it together.

    Raises PlacementError where the layout does not fit it, ValueError for a name that is none.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return LocalDispatcher(tokens.num_experts)
    if config.dispatcher == "flat":
        from parallel.expert.flat import FlatDispatcher

        return FlatDispatcher(group, tokens.num_experts, timeout=timeout)
    per_node = ranks_per_node(config, size)
    if config.dispatcher == "collective":
        from parallel.expert.collective import CollectiveDispatcher, Wires

        wires = Wires(config.dispatch_wire, config.dispatch_grad_wire, config.combine_wire)
        return CollectiveDispatcher(group, tokens.num_experts, ranks_per_node=per_node, wires=wires, timeout=timeout)
    if config.dispatcher == "native_host":
        from parallel.expert.native.host import NativeHostDispatcher

        return NativeHostDispatcher.over_group(
            group, num_nodes=size // per_node, num_experts=tokens.num_experts, hidden_size=tokens.hidden_size,
            top_k=tokens.top_k,
        )  # fmt: skip
    raise ValueError(f"parallel.dispatcher={config.dispatcher}: use flat, collective or native_host")
