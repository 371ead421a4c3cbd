"""DeepEP as a back end: a thin adapter to `ElasticBuffer` (V2, on NCCL's device API) or `Buffer` (V1, on NVSHMEM).

DeepEP sends a token once to each rank and adds up rank by rank; what remains here is local: copying an arrived row to
each of its experts, adding the experts' results per row (FP32, rounded to BF16 once), and names. Which generation is
used is what is installed; a version that cannot work is refused in one line.

Never run on a GPU here: the adapter is held by tests against a stand-in with DeepEP's signatures and documented
meaning, over gloo. The signatures it relies on are those of V1 1.2.1 and V2 2.1.0, and are checked at construction.
"""

import importlib
import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl

from model.dispatch import Combined, Dispatched, Permutation, gather_rows, gather_scalars, return_scalars
from model.fp8.formats import TILE_SIZE, exponents_to_scales
from parallel.expert.kernels import rows
from parallel.expert.wire import GRADIENT_QUANTISER, QUANTISER

T = TypeVar("T")

NCCL_FLOOR = (2, 30, 4)  # V2's own requirement
V1_GROUP_SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)  # those V1 has a configuration for
WIRES = ("bf16", "fp8")

# Arguments that the adapter passes by name, by class and method.
USED_V1 = {
    "__init__": ("group", "num_nvl_bytes", "num_rdma_bytes", "explicitly_destroy"),
    "get_dispatch_config": ("num_ranks",),
    "get_combine_config": ("num_ranks",),
    "set_num_sms": ("new_num_sms",),
    "get_dispatch_layout": ("topk_idx", "num_experts"),
    "dispatch": (
        "x", "handle", "num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank", "num_tokens_per_expert",
        "topk_idx", "topk_weights", "async_finish",
    ),
    "combine": ("x", "handle", "topk_weights", "async_finish"),
    "destroy": (),
}  # fmt: skip
USED_V2 = {
    "__init__": (
        "group", "num_max_tokens_per_rank", "hidden", "num_topk", "use_fp8_dispatch", "deterministic",
        "explicitly_destroy",
    ),
    "dispatch": (
        "x", "topk_idx", "topk_weights", "num_experts", "num_sms", "async_with_compute_stream", "handle", "do_cpu_sync",
    ),
    "combine": ("x", "handle", "topk_weights", "num_sms", "async_with_compute_stream"),
    "destroy": (),
}  # fmt: skip


class DeepEPError(ValueError):
    """DeepEP is missing, too old for this adapter, or asked for what it cannot do; one line."""

    user_error = True


@dataclass(frozen=True)
class Library:
    """DeepEP as found: the module, its generation (1 or 2) and its version."""

    module: ModuleType
    generation: int
    version: str


def find_library() -> Library:
    """The installed DeepEP. Raises DeepEPError when there is none, or when its version or NCCL's cannot work."""
    try:
        module = importlib.import_module("deep_ep")
    except ModuleNotFoundError as error:
        if error.name not in ("deep_ep", "deep_ep._C", "deep_ep_cpp"):
            raise
        raise DeepEPError(
            "dispatcher=deepep: deep_ep is not installed; build it from github.com/deepseek-ai/DeepEP (V2 needs NCCL "
            f"{_dotted(NCCL_FLOOR)} or newer), or use another dispatcher"
        ) from None
    except (ImportError, AssertionError, OSError) as error:  # an NCCL without a symbol, or two NCCLs
        reason = " ".join(str(error).split())
        raise DeepEPError(
            f"dispatcher=deepep: deep_ep does not load ({reason}); V2 needs NCCL {_dotted(NCCL_FLOOR)} or newer as the "
            f"only one, torch has {_dotted(nccl_version())}"
        ) from error
    return checked_library(module, nccl=nccl_version())


def nccl_version() -> tuple[int, ...] | None:
    """NCCL's version as torch has it; None in a torch without NCCL."""
    try:
        return tuple(int(part) for part in nccl.version()[:3])
    except (AttributeError, ImportError, RuntimeError):
        return None


def checked_library(module: ModuleType, *, nccl: tuple[int, ...] | None) -> Library:
    """The module as a library that this adapter can use; DeepEPError when it cannot."""
    version = str(getattr(module, "__version__", "of unknown version"))
    if hasattr(module, "ElasticBuffer"):
        if nccl is None or nccl[:3] < NCCL_FLOOR:
            raise DeepEPError(
                f"dispatcher=deepep: deep_ep {version} needs NCCL {_dotted(NCCL_FLOOR)} or newer, torch has "
                f"{_dotted(nccl)}; pip install 'nvidia-nccl-cu13>=2.30.4' --no-deps"
            )
        library, buffer, used = Library(module, 2, version), module.ElasticBuffer, USED_V2
    elif hasattr(module, "Buffer"):
        library, buffer, used = Library(module, 1, version), module.Buffer, USED_V1
    else:
        raise DeepEPError(
            f"dispatcher=deepep: the installed deep_ep {version} has neither ElasticBuffer nor Buffer, so it is "
            "another project's package; build github.com/deepseek-ai/DeepEP"
        )
    for method, names in used.items():
        function = getattr(buffer, method, None)
        missing = set(names) - set(inspect.signature(function).parameters) if function else {"all of it"}
        if missing:
            name = f"{buffer.__name__}.{method}"
            raise DeepEPError(
                f"dispatcher=deepep: {name} of deep_ep {version} lacks {', '.join(sorted(missing))}; the adapter knows "
                "V1 1.2.1 and V2 2.1.0"
            )
    return library


def _dotted(version: tuple[int, ...] | None) -> str:
    return "none" if version is None else ".".join(map(str, version))


@dataclass(frozen=True)
class _Handle:
    """DeepEP's own handle, and how arrived rows [N, K of local experts] become rows sorted by expert."""

    native: Any
    permutation: Permutation
    weights_R: Tensor
    num_tokens: int


class _Pending(Generic[T]):
    """A transfer on DeepEP's stream; `wait` makes the current stream wait, never the host."""

    def __init__(self, event: Any, finish: Any) -> None:
        self._event, self._finish = event, finish

    def wait(self) -> T:
        self._event.current_stream_wait()
        return self._finish()

    def done(self) -> bool:
        return True


class DeepEPDispatcher:
    """`TokenDispatcher` over DeepEP.

    max_tokens: most tokens of a rank in one dispatch, for which buffers are made. top_k: of the gate. num_sms: for
    communication, even; from `cost.num_sms`, as DeepEP's own estimate excludes a gate with groups. wire, gradient_wire:
    bf16 or fp8, of dispatched activations and gradients (power-of-two scales, as FP32); combine is BF16. kernels: back
    end of the local work, see `kernels.rows`. device: the type of device that tensors must be on.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        *,
        hidden: int,
        max_tokens: int,
        top_k: int,
        num_sms: int,
        wire: str = "bf16",
        gradient_wire: str = "bf16",
        kernels: str = "torch",
        library: Library | None = None,
        device: str = "cuda",
    ) -> None:
        self._library = library or find_library()
        self._group, self._num_experts, self._top_k = group, num_experts, top_k
        self._hidden, self._max_tokens, self._num_sms = hidden, max_tokens, num_sms
        self._wires, self._kernels, self._device = (wire, gradient_wire), kernels, device
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._check()
        self._buffer = self._open_v2() if self._library.generation == 2 else self._open_v1()

    def _check(self) -> None:
        if self._num_experts % self._num_ranks:
            raise self._error(f"{self._num_ranks} ranks do not divide {self._num_experts} experts")
        if self._library.generation == 1 and self._num_ranks not in V1_GROUP_SIZES:
            sizes = ", ".join(map(str, V1_GROUP_SIZES))
            raise self._error(f"V1 has no configuration for {self._num_ranks} ranks; it has for {sizes}")
        if self._num_sms < 2 or self._num_sms % 2:
            raise self._error(f"num_sms={self._num_sms} must be even and at least 2")
        for wire in self._wires:
            if wire not in WIRES:
                raise self._error(f"wire={wire}: use {' or '.join(WIRES)}")
        if "fp8" in self._wires and self._hidden % TILE_SIZE:
            raise self._error(f"wire=fp8 needs a hidden size that {TILE_SIZE} divides, not {self._hidden}")

    def _open_v1(self) -> Any:
        buffer, ranks = self._library.module.Buffer, self._num_ranks
        buffer.set_num_sms(self._num_sms)
        configs = [buffer.get_dispatch_config(ranks), buffer.get_combine_config(ranks)]
        row_bytes = 2 * self._hidden
        return buffer(
            self._group,
            num_nvl_bytes=max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs),
            num_rdma_bytes=max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs),
            explicitly_destroy=True,
        )

    def _open_v2(self) -> Any:
        return self._library.module.ElasticBuffer(
            self._group,
            num_max_tokens_per_rank=self._max_tokens,
            hidden=self._hidden,
            num_topk=self._top_k,
            use_fp8_dispatch=self._wires == ("fp8", "fp8"),
            deterministic=True,  # rows by source rank, then token, as every back end gives them
            explicitly_destroy=True,
        )

    def close(self) -> None:
        """Give the buffers back; every rank must."""
        self._buffer.destroy()

    def dispatch(
        self,
        x_TD: Tensor,
        ids_TK: Tensor | None = None,
        weights_TK: Tensor | None = None,
        *,
        handle: _Handle | None = None,
    ) -> _Pending[Dispatched]:
        """See `TokenDispatcher`. x is BF16, on the device."""
        if handle is None:
            if ids_TK is None or weights_TK is None:
                raise self._error("a first dispatch needs ids_TK and weights_TK")
            self._check_tokens(x_TD, ids_TK, weights_TK)
            return self._first(x_TD, ids_TK, weights_TK)
        self._check_rows("x_TD", x_TD, handle.num_tokens)
        packed = self._pack(x_TD, self._wires[1], amax_floor=GRADIENT_QUANTISER.amax_floor)
        arrived, event = self._again(packed, handle.native)

        def finish() -> Dispatched:
            rows_RD = gather_rows(self._unpack(arrived), handle.permutation)
            return Dispatched(rows_RD, handle.weights_R, handle.permutation.counts, handle)

        return _Pending(event, finish)

    def combine(self, rows_RD: Tensor, handle: _Handle, weights_R: Tensor | None = None) -> _Pending[Combined]:
        """See `TokenDispatcher`. Rows are BF16, sums of a rank in FP32 rounded once; DeepEP adds up the ranks."""
        permutation = handle.permutation
        self._check_rows("rows_RD", rows_RD, len(permutation.order_R))
        row_NK = permutation.inverse_TK
        row_NK = row_NK.masked_fill(row_NK == len(permutation.order_R), -1)
        partial_ND = rows.combine(rows_RD, row_NK, backend=self._kernels)
        weights_NK = None if weights_R is None else _returned(weights_R, permutation)
        arguments: dict[str, Any] = {"handle": handle.native, "topk_weights": weights_NK}
        if self._library.generation == 2:
            arguments |= {"num_sms": self._num_sms, "async_with_compute_stream": True}
        else:
            arguments["async_finish"] = True
        sum_TD, weights_TK, event = self._buffer.combine(partial_ND, **arguments)
        return _Pending(event, lambda: Combined(sum_TD, weights_TK if weights_R is not None else None))

    def _first(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> _Pending[Dispatched]:
        ids_TK = ids_TK.to(getattr(self._library.module, "topk_idx_t", torch.int64))
        packed = self._pack(x_TD, self._wires[0])
        if self._library.generation == 2:
            arrived, ids_NK, weights_NK, native, event = self._buffer.dispatch(
                packed, topk_idx=ids_TK, topk_weights=weights_TK, num_experts=self._num_experts,
                num_sms=self._num_sms, do_cpu_sync=True, async_with_compute_stream=True,
            )  # fmt: skip
            counts = native.num_recv_tokens_per_expert_list
        else:
            per_rank, per_node, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(ids_TK, self._num_experts)
            arrived, ids_NK, weights_NK, counts, native, event = self._buffer.dispatch(
                packed, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert, topk_idx=ids_TK, topk_weights=weights_TK, async_finish=True,
            )  # fmt: skip

        def finish() -> Dispatched:
            permutation = _by_expert(ids_NK, tuple(counts))
            weights_R = gather_scalars(weights_NK, permutation)
            handle = _Handle(native, permutation, weights_R, len(x_TD))
            return Dispatched(gather_rows(self._unpack(arrived), permutation), weights_R, tuple(counts), handle)

        return _Pending(event, finish)

    def _again(self, packed: Tensor | tuple[Tensor, Tensor], native: Any) -> tuple[Any, Any]:
        """What arrives along an earlier routing, and its event."""
        if self._library.generation == 2:
            arguments: dict[str, Any] = {"num_sms": self._num_sms, "async_with_compute_stream": True}
        else:
            arguments = {"async_finish": True}
        result = self._buffer.dispatch(packed, handle=native, **arguments)
        return result[0], result[-1]

    def _pack(
        self, x_TD: Tensor, wire: str, *, amax_floor: float = QUANTISER.amax_floor
    ) -> Tensor | tuple[Tensor, Tensor]:
        if wire == "bf16":
            return x_TD.contiguous()
        quantised = rows.quantise(x_TD, amax_floor=amax_floor, backend=self._kernels)
        return quantised.values_RD, exponents_to_scales(quantised.exponents_RG)

    def _unpack(self, arrived: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if isinstance(arrived, Tensor):
            return arrived
        values_ND, scales_NG = arrived
        exponents_NG = (scales_NG.contiguous().view(torch.int32) >> 23).to(torch.uint8)  # powers of two, or NaN: 255
        return rows.dequantise(rows.QuantisedRows(values_ND, exponents_NG), dtype=torch.bfloat16, backend=self._kernels)

    def _check_tokens(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
        self._check_rows("x_TD", x_TD, len(ids_TK))
        if len(x_TD) > self._max_tokens:
            raise self._error(f"{len(x_TD)} tokens; buffers were made for max_tokens={self._max_tokens}")
        if ids_TK.ndim != 2 or ids_TK.shape[1] != self._top_k or weights_TK.shape != ids_TK.shape:
            shapes = f"ids_TK {list(ids_TK.shape)}, weights_TK {list(weights_TK.shape)}"
            raise self._error(f"{shapes}: needs [{len(x_TD)}, top_k={self._top_k}] each")
        if weights_TK.dtype != torch.float32:
            raise self._error(f"weights_TK is {weights_TK.dtype}: needs torch.float32")
        if ids_TK.numel():
            least, most = ids_TK.amin().item(), ids_TK.amax().item()
            if least < -1 or most >= self._num_experts:
                wrong = least if least < -1 else most
                raise self._error(f"expert id {wrong}: ids go from -1 (unused) to {self._num_experts - 1}")

    def _check_rows(self, name: str, x: Tensor, count: int) -> None:
        if x.device.type != self._device:
            raise self._error(f"{name} is on {x.device}: DeepEP takes tensors on {self._device}")
        if x.dtype != torch.bfloat16 or x.shape != (count, self._hidden):
            found = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            raise self._error(f"{name} is {found}: needs bfloat16 [{count}, {self._hidden}]")

    def _error(self, message: str) -> DeepEPError:
        return DeepEPError(f"deepep, rank {self._rank}: {message}")


def _by_expert(ids_NK: Tensor, counts: tuple[int, ...]) -> Permutation:
    """As `Permutation.by_expert` with counts that the host knows already, so that it need not wait for the device."""
    ids = ids_NK.flatten().long()
    num_rows = sum(counts)
    order_R = ids.argsort(stable=True)[len(ids) - num_rows :]
    inverse = torch.full_like(ids, num_rows)
    inverse[order_R] = torch.arange(num_rows, device=ids.device)
    return Permutation(order_R, inverse.view_as(ids_NK), counts)


def _returned(weights_R: Tensor, permutation: Permutation) -> Tensor:
    return return_scalars(weights_R.float(), permutation).contiguous()
