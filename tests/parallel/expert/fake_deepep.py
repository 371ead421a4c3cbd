"""A stand-in for DeepEP over gloo: its signatures (V1 1.2.1, V2 2.1.0) and the meaning its documentation gives them.

A token goes once to each rank that holds one of its experts, with ids made local (-1 for others' experts); combine adds
up what each rank returns. Rows arrive by source rank, then token.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOptionalMemberAccess=false
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class EventOverlap:
    """Completes when the current stream waits for it: results are garbage before."""

    def __init__(self, fill: Callable[[], None] | None) -> None:
        self._fill = fill

    def current_stream_wait(self, release_handle: bool = False) -> None:
        assert self._fill is not None, "waited for twice"
        self._fill()
        self._fill = None


@dataclass
class Routing:
    sent: list[int]
    received: list[int]
    source: Tensor
    num_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    num_topk: int


def exchange(x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    raw = x.contiguous().view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x.contiguous()
    out = raw.new_empty(sum(received), *raw.shape[1:])
    dist.all_to_all_single(out, raw, received, sent, group=group)
    return out.view(x.dtype)


def late(value: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Garbage now, and what puts the value there."""
    out = (
        torch.full_like(value.float(), 99).to(value.dtype) if value.is_floating_point() else torch.full_like(value, 99)
    )
    return out, lambda: (out.copy_(value), None)[1]


def send_first(group: Any, topk_idx: Tensor, num_experts: int) -> tuple[Routing, Tensor]:
    size = dist.get_world_size(group)
    local = num_experts // size
    holds = torch.zeros(len(topk_idx), size + 1, dtype=torch.bool)
    holds.scatter_(1, torch.where(topk_idx < 0, size, topk_idx // local), True)
    rank, source = holds[:, :size].t().nonzero(as_tuple=True)
    sent = torch.bincount(rank, minlength=size)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    routing = Routing(sent.tolist(), received.tolist(), source, len(topk_idx), [], topk_idx.shape[1])
    ids = exchange(topk_idx[source], routing.sent, routing.received, group)
    ids = ids - dist.get_rank(group) * local
    ids = torch.where((ids >= 0) & (ids < local), ids, -1)
    routing.num_recv_tokens_per_expert_list = [int((ids == e).sum()) for e in range(local)]
    return routing, ids


def send(x: Any, routing: Routing, group: Any, event: list[Callable[[], None]]) -> Any:
    def one(part: Tensor) -> Tensor:
        out, fill = late(exchange(part[routing.source], routing.sent, routing.received, group))
        event.append(fill)
        return out

    return tuple(map(one, x)) if isinstance(x, tuple) else one(x)


def add_up(x: Tensor, routing: Routing, group: Any) -> Tensor:
    back = exchange(x, routing.received, routing.sent, group).float()
    return torch.zeros(routing.num_tokens, x.shape[1]).index_add_(0, routing.source, back).to(x.dtype)


def together(fills: list[Callable[[], None]]) -> EventOverlap:
    return EventOverlap(lambda: [fill() for fill in fills] and None)


def combined(
    x: Tensor, weights: Tensor | None, routing: Routing, group: Any
) -> tuple[Tensor, Tensor | None, EventOverlap]:
    out, fill = late(add_up(x, routing, group))
    fills = [fill]
    out_weights = None
    if weights is not None:
        out_weights, fill = late(add_up(weights, routing, group))
        fills.append(fill)
    return out, out_weights, together(fills)


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes


class Buffer:
    num_sms = 20

    def __init__(
        self, group, num_nvl_bytes=0, num_rdma_bytes=0, low_latency_mode=False, num_qps_per_rank=24,
        allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=False, comm=None,
    ) -> None:  # fmt: skip
        assert num_nvl_bytes > 0 and num_rdma_bytes > 0
        self.group, self.explicitly_destroy = group, explicitly_destroy

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config()

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ) -> tuple[Any, ...]:
        return "per rank", "per node", (topk_idx, num_experts), "in rank", None

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
        num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0,
        config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False,
    ) -> tuple[Any, ...]:  # fmt: skip
        fills: list[Callable[[], None]] = []
        assert async_finish
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return send(x, handle, self.group, fills), None, None, None, None, together(fills)
        layout = (num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank)
        assert layout == ("per rank", "per node", "in rank")
        ids, num_experts = num_tokens_per_expert
        assert ids is topk_idx and topk_weights.dtype == torch.float32
        routing, recv_ids = send_first(self.group, topk_idx, num_experts)
        recv_x = send(x, routing, self.group, fills)
        recv_weights = send(topk_weights, routing, self.group, fills)
        recv_ids, fill = late(recv_ids)
        event = together([*fills, fill])
        return recv_x, recv_ids, recv_weights, routing.num_recv_tokens_per_expert_list, routing, event

    def combine(
        self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False,
        allocate_on_comm_stream=False,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert async_finish
        return combined(x, topk_weights, handle, self.group)

    def destroy(self) -> None:
        assert self.explicitly_destroy


class ElasticBuffer:
    def __init__(
        self, group, num_bytes=None, num_cpu_bytes=0, num_max_tokens_per_rank=0, hidden=0, num_topk=0,
        use_fp8_dispatch=False, deterministic=False, allow_hybrid_mode=True, allow_multiple_reduction=True,
        prefer_overlap_with_compute=True, sl_idx=3, num_allocated_qps=0, num_cpu_timeout_secs=300,
        num_gpu_timeout_secs=100, explicitly_destroy=False,
    ) -> None:  # fmt: skip
        assert num_max_tokens_per_rank and hidden and num_topk and deterministic
        self.group, self.explicitly_destroy = group, explicitly_destroy

    def dispatch(
        self, x, topk_idx=None, topk_weights=None, cumulative_local_expert_recv_stats=None, num_experts=None,
        num_max_tokens_per_rank=None, expert_alignment=None, num_sms=0, num_qps=0, previous_event=None,
        previous_event_before_epilogue=None, async_with_compute_stream=False, allocate_on_comm_stream=False,
        handle=None, do_handle_copy=True, do_cpu_sync=None, do_expand=False, do_zero_padding=False,
        use_tma_aligned_col_major_sf=False,
    ) -> tuple[Any, ...]:  # fmt: skip
        fills: list[Callable[[], None]] = []
        assert num_sms > 0 and async_with_compute_stream  # 0 SMs: an estimate that excludes a gate with groups
        if handle is not None:
            assert topk_idx is None and not do_cpu_sync
            return send(x, handle, self.group, fills), None, None, handle, together(fills)
        routing, recv_ids = send_first(self.group, topk_idx, num_experts)
        recv_x, recv_weights = send(x, routing, self.group, fills), send(topk_weights, routing, self.group, fills)
        recv_ids, fill = late(recv_ids)
        return recv_x, recv_ids, recv_weights, routing, together([*fills, fill])

    def combine(
        self, x, handle, topk_weights=None, bias=None, num_sms=0, num_qps=0, previous_event=None,
        previous_event_before_epilogue=None, async_with_compute_stream=False, allocate_on_comm_stream=False,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert num_sms > 0 and async_with_compute_stream
        return combined(x, topk_weights, handle, self.group)

    def destroy(self) -> None:
        assert self.explicitly_destroy


def library(generation: int) -> ModuleType:
    """A module as DeepEP's of that generation."""
    module: Any = ModuleType("deep_ep")
    module.Buffer = Buffer
    if generation == 2:
        module.ElasticBuffer, module.topk_idx_t, module.__version__ = ElasticBuffer, torch.int64, "2.1.0"
    return module
