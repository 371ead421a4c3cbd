"""The native back ends from Python: sizes, checks of arguments, and what the kernels are called with.

`native_host` (host.py) runs the kernels of csrc/ on CPU tensors, `native` (gpu.py) on GPUs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.dispatch import Combined, Dispatched, Pending
from model.fp8.formats import QuantisedTensor
from parallel.expert.native import fp8_rows
from parallel.expert.native.failure import NativeError
from parallel.expert.native.library import BF16, BYTES, FP32, Machine, Shape, Transfer
from parallel.expert.wire import GRADIENT_QUANTISER, QUANTISER

T = TypeVar("T")
FORMATS = {torch.bfloat16: BF16, torch.float32: FP32}
MOST = 32  # nodes, GPUs of a node, copies of a token: one for each lane of a warp


@dataclass(frozen=True)
class NativeConfig:
    """Sizes and limits, equal on all ranks.

    channels: independent parts of each transfer; None: 2 on a CPU (3 threads each), 4 for each SM on a GPU. ring: slots
    of each ring. chunk: tokens between two signals to a node. timeout_seconds: longest wait of a role without progress.
    dispatch_wire: rows as they are (same) or E4M3 with power-of-two tile scales (fp8). combine_wire: a node's sum on
    its way to another node, bf16 or fp32; FP32 rows always fp32. seed: 0 for an orderly network, else the seed of its
    disorder. dead_after: operations after which a rank's network is dead, 0 for never; for tests.
    """

    channels: int | None = None
    ring: int = 8
    chunk: int = 4
    timeout_seconds: float = 300.0
    dispatch_wire: str = "same"
    combine_wire: str = "bf16"
    seed: int = 0
    dead_after: int = 0


@dataclass(frozen=True)
class Geometry:
    """Nodes of a group and its limits: rank = node * (ranks / nodes) + local index."""

    num_ranks: int
    num_nodes: int
    num_experts: int
    hidden_size: int
    top_k: int


@dataclass(frozen=True)
class NativeHandle:
    """A routing. transfer: the C view of `fixed` and `lists`, where its tables are."""

    transfer: Transfer
    fixed: Tensor
    lists: Tensor
    rows: int
    counts: tuple[int, ...]
    weights_R: Tensor


def checked_shape(geometry: Geometry, config: NativeConfig, *, channels: int) -> Shape:
    """The C shape; channels: of this machine, where config leaves it open. Raises NativeError for what does not fit."""
    g, c, channels = geometry, config, channels if config.channels is None else config.channels
    rules = (
        (g.num_nodes < 1 or g.num_ranks % g.num_nodes, f"{g.num_nodes} nodes do not divide {g.num_ranks} ranks"),
        (g.num_experts < 1 or g.num_experts % g.num_ranks, f"{g.num_ranks} ranks do not fit {g.num_experts} experts"),
        (g.num_nodes > MOST or g.num_ranks > MOST * g.num_nodes, f"more than {MOST} nodes, or ranks of a node"),
        (not 1 <= g.top_k <= MOST, f"top_k={g.top_k}: from 1 to {MOST}"),
        (g.hidden_size < 1, f"hidden_size={g.hidden_size}: at least 1"),
        (not 1 <= channels <= 1024, f"channels={channels}: from 1 to 1024"),
        (c.ring < 1 or c.chunk < 1, f"ring={c.ring}, chunk={c.chunk}: at least 1"),
        (c.timeout_seconds <= 0, f"timeout_seconds={c.timeout_seconds}: above 0"),
        (c.dispatch_wire not in ("same", "fp8"), f"dispatch_wire={c.dispatch_wire}: same or fp8"),
        (c.combine_wire not in ("bf16", "fp32"), f"combine_wire={c.combine_wire}: bf16 or fp32"),
    )  # fmt: skip
    for wrong, text in rules:
        if wrong:
            raise NativeError(f"native dispatcher: {text}")
    row_bytes = 4 * padded(g.hidden_size)
    locals_ = g.num_ranks // g.num_nodes
    return Shape(g.num_nodes, locals_, channels, c.ring, c.chunk, g.top_k, g.num_experts, row_bytes)


def agree(group: dist.ProcessGroup, geometry: Geometry, config: NativeConfig) -> list[int]:
    """Names of the group's ranks, after all have told their sizes. Raises NativeError, on all, if they differ."""
    names = dist.get_process_group_ranks(group)
    told: list[tuple[Geometry, NativeConfig]] = [(geometry, config)] * len(names)
    dist.all_gather_object(told, (geometry, config), group=group)
    for name, other in zip(names, told, strict=True):
        for first, theirs in zip(told[0], other, strict=True):
            if first != theirs:
                raise NativeError(f"rank {name} has {theirs}, rank {names[0]} {first}: all ranks must agree")
    return names


def padded(hidden: int) -> int:
    """Values of a row as it travels: a multiple of 8, so that BF16 rows are whole 16-byte words."""
    return -(-hidden // 8) * 8


class KernelDispatcher(ABC):
    """`TokenDispatcher` on an opened machine, whatever it is made of; host.py and gpu.py open one and run the work.

    rows: as `TokenDispatcher` says. combine: copies on one GPU are summed in the order of k, those sums over the ranks
    of a node rising, those over the nodes rising, all in FP32; see NativeConfig.combine_wire for what is rounded.
    """

    name: str
    device_type: str
    machine: Machine

    def __init__(self, *, geometry: Geometry, config: NativeConfig, rank: int, names: list[int] | None = None) -> None:
        """Rank `rank` of the group; names: what messages call its ranks."""
        self.geometry, self.config, self.rank = geometry, config, rank
        self._names = names or list(range(geometry.num_ranks))

    def dispatch(
        self, x_TD: Tensor | QuantisedTensor, ids_TK: Tensor | None = None, weights_TK: Tensor | None = None, *,
        handle: NativeHandle | None = None,
    ) -> Pending[Dispatched]:  # fmt: skip
        """See `TokenDispatcher`. x_TD may be quantised already, where the wire is fp8; its rows arrive in BF16."""
        quantised = isinstance(x_TD, QuantisedTensor)
        if quantised and self.config.dispatch_wire != "fp8":
            self._refuse(f"x_TD is quantised, which dispatch_wire={self.config.dispatch_wire} does not carry: use fp8")
        plain_TD = x_TD.values if isinstance(x_TD, QuantisedTensor) else x_TD
        self._check_rows("x_TD", plain_TD, quantised=quantised)
        inputs = (x_TD.values, x_TD.scales) if isinstance(x_TD, QuantisedTensor) else (x_TD,)
        if handle is not None:
            if len(plain_TD) != handle.transfer.tokens:
                self._refuse(f"x_TD has {len(plain_TD)} rows: the handle is of {handle.transfer.tokens} tokens")
            return self._start(lambda: self._carry(x_TD, None, handle), *inputs)
        if ids_TK is None or weights_TK is None:
            self._refuse("a dispatch without a handle needs ids_TK and weights_TK")
        self._check_routing(plain_TD, ids_TK, weights_TK)
        ids, weights = ids_TK.to(torch.int64).contiguous(), weights_TK.contiguous()

        def first() -> Dispatched:
            return self._carry(x_TD, weights, self._notify(*self._wire_of(plain_TD), ids))

        return self._start(first, *inputs, weights, ids)

    def combine(self, rows_RD: Tensor, handle: NativeHandle, weights_R: Tensor | None = None) -> Pending[Combined]:
        """See `TokenDispatcher`."""
        self._check_rows("rows_RD", rows_RD)
        if len(rows_RD) != handle.rows:
            self._refuse(f"rows_RD has {len(rows_RD)} rows: the handle is of {handle.rows}")
        if weights_R is not None:
            self._check_device("weights_R", weights_R)
        if weights_R is not None and (weights_R.dtype != torch.float32 or weights_R.shape != (handle.rows,)):
            self._refuse(f"weights_R is {weights_R.dtype} {list(weights_R.shape)}: use float32 [{handle.rows}]")
        return self._start(lambda: self._gather(rows_RD, handle, weights_R), rows_RD, weights_R)

    def _wire_of(self, x_TD: Tensor) -> tuple[int, int]:
        """Bytes and format of a row on its way to the experts."""
        if self.config.dispatch_wire == "fp8":
            return fp8_rows.packed_bytes(x_TD.shape[1]), BYTES
        return padded(x_TD.shape[1]) * x_TD.element_size(), FORMATS[x_TD.dtype]

    def _notify(self, row_bytes: int, form: int, ids_TK: Tensor) -> NativeHandle:
        tokens, top_k = ids_TK.shape
        fixed = torch.empty(self.machine.routing_ints(tokens, top_k), dtype=torch.int32, device=ids_TK.device)
        transfer = Transfer(tokens, top_k, 0, fixed.data_ptr(), None)
        library, at = self.machine.library, self.machine.totals_at(tokens, top_k)
        self._done(library.ep_notify(self.machine.handle, transfer, ids_TK.data_ptr(), row_bytes, form))
        rows, forwarded, arrived, *counts = fixed[at : at + 3 + self.geometry.num_experts // len(self._names)].tolist()
        self._verify()
        lists = torch.empty(-(-forwarded // 4) * 4 + arrived * (top_k + 1), dtype=torch.int32, device=ids_TK.device)
        transfer.forwarded, transfer.lists = forwarded, lists.data_ptr()
        return NativeHandle(transfer, fixed, lists, rows, tuple(counts), torch.empty(rows, device=ids_TK.device))

    def _carry(self, x_TD: Tensor | QuantisedTensor, weights_TK: Tensor | None, handle: NativeHandle) -> Dispatched:
        plain_TD = x_TD.values if isinstance(x_TD, QuantisedTensor) else x_TD
        (row_bytes, form), hidden = self._wire_of(plain_TD), plain_TD.shape[1]
        first = weights_TK is not None
        if form == BYTES:
            sent = fp8_rows.pack(x_TD, QUANTISER if first else GRADIENT_QUANTISER)
        else:
            sent = F.pad(plain_TD, (0, padded(hidden) - hidden)).contiguous()
        rows = sent.new_empty(handle.rows, sent.shape[1])
        status = self.machine.library.ep_dispatch(
            self.machine.handle, handle.transfer, sent.data_ptr(), weights_TK.data_ptr() if first else None,
            rows.data_ptr(), handle.weights_R.data_ptr() if first else None, row_bytes, form,
        )  # fmt: skip
        self._done(status)
        if form == BYTES:
            dtype = torch.bfloat16 if isinstance(x_TD, QuantisedTensor) else x_TD.dtype
            rows = fp8_rows.unpack(rows, hidden=hidden, dtype=dtype)
        rows = rows if rows.shape[1] == hidden else rows[:, :hidden].contiguous()
        return Dispatched(rows, handle.weights_R, handle.counts, handle)

    def _gather(self, rows_RD: Tensor, handle: NativeHandle, weights_R: Tensor | None) -> Combined:
        hidden, form = rows_RD.shape[1], FORMATS[rows_RD.dtype]
        rows = F.pad(rows_RD, (0, padded(hidden) - hidden)).contiguous()
        scalars = None if weights_R is None else weights_R.contiguous()
        total = rows.new_empty(handle.transfer.tokens, rows.shape[1])
        back = (
            None
            if weights_R is None
            else torch.empty(handle.transfer.tokens, handle.transfer.top_k, device=rows.device)
        )
        wire = BF16 if form == BF16 and self.config.combine_wire == "bf16" else FP32
        status = self.machine.library.ep_combine(
            self.machine.handle, handle.transfer, rows.data_ptr(), None if scalars is None else scalars.data_ptr(),
            total.data_ptr(), None if back is None else back.data_ptr(), rows.shape[1], form, wire,
        )  # fmt: skip
        self._done(status)
        return Combined(total if total.shape[1] == hidden else total[:, :hidden].contiguous(), back)

    @abstractmethod
    def _start(self, work: Callable[[], T], *inputs: Tensor | None) -> Pending[T]:
        """Begin work that reads the inputs, after all work begun before."""

    def _verify(self) -> None:  # noqa: B027  nothing to do where kernels end before their call does
        """Raise if a kernel failed; called when the results of a notify stage are on the host."""

    def _done(self, status: int) -> None:
        if status:
            limits = {"num_experts": self.geometry.num_experts, "timeout_seconds": self.config.timeout_seconds}
            raise NativeError(self.machine.failure().describe(me=self.rank, names=self._names, **limits))

    def _check_rows(self, name: str, rows: Tensor, *, quantised: bool = False) -> None:
        hidden = self.geometry.hidden_size
        if rows.ndim != 2:
            self._refuse(f"{name} has {rows.ndim} dimensions: it must have 2, [rows, hidden]")
        self._check_device(name, rows)
        if not quantised and rows.dtype not in FORMATS:
            self._refuse(f"{name} is {rows.dtype}: bfloat16 and float32 travel")
        if rows.shape[1] > hidden:
            self._refuse(f"{name} has hidden size {rows.shape[1]}: the buffers hold {hidden}")

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device.type != self.device_type:
            self._refuse(f"{name} is on {tensor.device}: dispatcher {self.name} takes {self.device_type} tensors")

    def _check_routing(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
        self._check_device("ids_TK", ids_TK)
        self._check_device("weights_TK", weights_TK)
        if ids_TK.ndim != 2 or ids_TK.is_floating_point() or len(ids_TK) != len(x_TD):
            shape = list(ids_TK.shape)
            self._refuse(f"ids_TK is {ids_TK.dtype} {shape}: it must be int64 [{len(x_TD)}, top-k]")
        if not 1 <= ids_TK.shape[1] <= self.geometry.top_k:
            self._refuse(f"ids_TK has top-k {ids_TK.shape[1]}: the buffers hold {self.geometry.top_k}")
        if weights_TK.shape != ids_TK.shape or weights_TK.dtype != torch.float32:
            shapes = f"{weights_TK.dtype} {list(weights_TK.shape)}"
            self._refuse(f"weights_TK is {shapes}: it must be float32 {list(ids_TK.shape)}")

    def _refuse(self, text: str) -> NoReturn:
        """Ends all ranks: they would wait for this one."""
        self.machine.library.ep_stop(self.machine.handle)
        raise NativeError(f"rank {self._names[self.rank]}: {text}")
