"""Constructs the dispatcher that the configuration names: the one place that knows all back ends."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from model.dispatch import LocalDispatcher, TokenDispatcher
from model.fp8.quantise import Quantiser
from parallel.config import DISPATCHERS, ParallelConfig, sms_problems, wire_problems
from parallel.expert.placement import PlacementError
from parallel.expert.wire import QUANTISER


class DispatcherError(ValueError):
    """A back end that cannot be constructed as configured."""

    user_error = True


@dataclass(frozen=True)
class Tokens:
    """What is dispatched: experts of a layer, how many a token chooses, and the size of a token's vector.

    max_tokens: most tokens of a rank in one dispatch, which only DeepEP's buffers need.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    max_tokens: int | None = None


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
    config: ParallelConfig,
    group: dist.ProcessGroup,
    tokens: Tokens,
    *,
    timeout: timedelta,
    quantiser: Quantiser = QUANTISER,
) -> TokenDispatcher:
    """The dispatcher of `config.dispatcher` over an expert group; all its ranks construct it together.

    quantiser: of the fp8 wire of `collective`. Raises PlacementError where the layout does not fit the dispatcher,
    DispatcherError for a name that is none here or a wire that it does not have.
    """
    unfit = wire_problems(config) + sms_problems(config)
    if unfit:
        raise DispatcherError(unfit[0])
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
        return CollectiveDispatcher(
            group, tokens.num_experts, ranks_per_node=per_node, wires=wires, quantiser=quantiser, timeout=timeout
        )
    if config.dispatcher in ("native_host", "native"):
        return _native(config, group, tokens, per_node, timeout)
    if config.dispatcher == "deepep":
        from parallel.expert.deepep import DeepEPDispatcher

        if tokens.max_tokens is None:
            raise DispatcherError("parallel.dispatcher=deepep needs the most tokens of a rank (Tokens.max_tokens)")
        wires = ["fp8" if wire == "fp8" else "bf16" for wire in (config.dispatch_wire, config.dispatch_grad_wire)]
        return DeepEPDispatcher(
            group, tokens.num_experts, hidden=tokens.hidden_size, max_tokens=tokens.max_tokens, top_k=tokens.top_k,
            num_sms=config.num_sms, wire=wires[0], gradient_wire=wires[1],
        )  # fmt: skip
    raise DispatcherError(f"parallel.dispatcher={config.dispatcher}: use {', '.join(DISPATCHERS)}")


def _native(
    config: ParallelConfig, group: dist.ProcessGroup, tokens: Tokens, per_node: int, timeout: timedelta
) -> TokenDispatcher:
    from parallel.expert.native.dispatcher import NativeConfig
    from parallel.expert.native.gpu import NativeGpuDispatcher
    from parallel.expert.native.host import NativeHostDispatcher

    sizes: dict[str, Any] = {
        "num_nodes": dist.get_world_size(group) // per_node, "num_experts": tokens.num_experts,
        "hidden_size": tokens.hidden_size, "top_k": tokens.top_k,
        "config": NativeConfig(
            timeout_seconds=timeout.total_seconds(),
            dispatch_wire="fp8" if config.dispatch_wire == "fp8" else "same",
            combine_wire="fp32" if config.combine_wire == "fp32" else "bf16",
        ),
    }  # fmt: skip
    if config.dispatcher == "native":
        return NativeGpuDispatcher(group, num_sms=config.num_sms, **sizes)
    return NativeHostDispatcher.over_group(group, **sizes)
