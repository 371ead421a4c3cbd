"""What dispatch and combine cost: rows and bytes over InfiniBand and NVLink, time, SMs; no torch, no hardware table.

All figures are expectations for one rank and one MoE layer under a balanced gate (`reach.py`); every rank then sends
what it receives. With n nodes and r ranks reached by a token, N nodes and L ranks a node, a token's row travels

    way of sending          InfiniBand        NVLink              its own rank
    once a node, then rank  n (1 - 1/N)       r (1 - 1/L)         the rest
    once a rank             r (1 - 1/N)       r (L - 1)/(N L)     r/(N L)
    once an expert (flat)   K (1 - 1/N)       K (L - 1)/(N L)     K/(N L)

since a reached node is the token's own with chance 1/N, and a rank reached in any node is the one that the network
delivered to with chance 1/L. Combine takes the same ways back; relays add up, so the counts are the same.

Published bandwidths (DeepEP) are logical: bytes of n r r copies over time, the copy that never leaves its node or rank
included. `Traffic` keeps both, logical copies and rows on links.
"""

from dataclasses import dataclass
from math import ceil

from parallel.expert.placement import Placement, PlacementError
from parallel.expert.reach import Gate, expected_blocks

WAYS = ("node", "rank", "expert")
FP8_TILE = 128  # values that share a scale


@dataclass(frozen=True)
class Workload:
    """One rank's share of an all-to-all: `num_tokens` rows of `hidden` values through `gate` over a placement.

    dtype: of dispatched rows, fp8 (with scale_bytes for every 128 values) or bf16; combined rows are bf16.
    """

    gate: Gate
    num_ranks: int
    ranks_per_node: int
    num_tokens: int
    hidden: int
    dtype: str = "fp8"
    scale_bytes: int = 1  # an exponent; 4 for an FP32 scale

    def __post_init__(self) -> None:
        Placement(self.gate.num_experts, self.num_ranks, self.ranks_per_node)  # raises where something does not divide
        if self.dtype not in ("fp8", "bf16"):
            raise PlacementError(f"dtype={self.dtype}: use fp8 or bf16")
        if self.dtype == "fp8" and self.hidden % FP8_TILE:
            raise PlacementError(f"hidden={self.hidden} is not a multiple of {FP8_TILE}, the values of an fp8 scale")
        if self.num_tokens < 0 or self.hidden < 1 or self.scale_bytes < 0:
            raise PlacementError(
                f"num_tokens={self.num_tokens}, hidden={self.hidden}, scale_bytes={self.scale_bytes}: not negative, "
                "and hidden at least 1"
            )

    @property
    def num_nodes(self) -> int:
        """Nodes of the expert group."""
        return self.num_ranks // self.ranks_per_node

    @property
    def dispatch_row_bytes(self) -> int:
        """Bytes of one dispatched row, scales included; ids and weights, under 1%, are not."""
        return self.hidden + self.hidden // FP8_TILE * self.scale_bytes if self.dtype == "fp8" else 2 * self.hidden

    @property
    def combine_row_bytes(self) -> int:
        """Bytes of one combined row, BF16."""
        return 2 * self.hidden


@dataclass(frozen=True)
class Traffic:
    """Expected copies of one rank's tokens. The first two are logical, per token; the others are rows on links.

    nodes, ranks: nodes and ranks that one token reaches, its own included. ib_rows, nvlink_rows: rows that the rank
    sends over each link, those it relays for others included; dispatch_*, combine_*: their bytes.
    """

    nodes: float
    ranks: float
    ib_rows: float
    nvlink_rows: float
    dispatch_ib_bytes: float
    dispatch_nvlink_bytes: float
    combine_ib_bytes: float
    combine_nvlink_bytes: float


def traffic(workload: Workload, *, way: str = "node") -> Traffic:
    """Expected traffic of one rank when rows travel once a `node` (and then once a rank), once a `rank` or `expert`."""
    w = workload
    nodes, ranks = expected_blocks(w.gate, w.num_nodes), expected_blocks(w.gate, w.num_ranks)
    abroad, inside = 1 - 1 / w.num_nodes, (w.ranks_per_node - 1) / w.num_ranks
    per_token = {
        "node": (nodes * abroad, ranks * (1 - 1 / w.ranks_per_node)),
        "rank": (ranks * abroad, ranks * inside),
        "expert": (w.gate.top_k * abroad, w.gate.top_k * inside),
    }
    if way not in per_token:
        raise PlacementError(f"way={way}: use {', '.join(WAYS)}")
    ib_rows, nvlink_rows = (rows * w.num_tokens for rows in per_token[way])
    out, back = w.dispatch_row_bytes, w.combine_row_bytes
    return Traffic(
        nodes, ranks, ib_rows, nvlink_rows, ib_rows * out, nvlink_rows * out, ib_rows * back, nvlink_rows * back
    )


@dataclass(frozen=True)
class Links:
    """One rank's bandwidth in bytes a second in one direction, as achieved, and the time a transfer takes at least."""

    ib_bytes_per_second: float
    nvlink_bytes_per_second: float
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        if min(self.ib_bytes_per_second, self.nvlink_bytes_per_second) <= 0 or self.latency_seconds < 0:
            raise PlacementError(f"{self}: bandwidths must be above 0 and the latency not below")


@dataclass(frozen=True)
class Seconds:
    """Expected time of each direction, and the link that bounds both: ib or nvlink."""

    dispatch: float
    combine: float
    bound: str


def seconds(workload: Workload, links: Links, *, way: str = "node") -> Seconds:
    """Time of dispatch and of combine when both links are busy at once: the slower link's, plus the latency."""
    t = traffic(workload, way=way)
    ib, nvlink = links.ib_bytes_per_second, links.nvlink_bytes_per_second
    bound = "ib" if t.ib_rows / ib > t.nvlink_rows / nvlink else "nvlink"
    dispatch = max(t.dispatch_ib_bytes / ib, t.dispatch_nvlink_bytes / nvlink)
    combine = max(t.combine_ib_bytes / ib, t.combine_nvlink_bytes / nvlink)
    return Seconds(links.latency_seconds + dispatch, links.latency_seconds + combine, bound)


@dataclass(frozen=True)
class SmCopy:
    """What one SM copies in bytes a second, and how.

    DeepEP V2's own model takes 200e9 read, 50e9 written, a margin of 1.25, and leaves the copy out of the receive
    buffer to another kernel (`receives=False`). The report's kernels have a role for that copy.
    """

    read_bytes_per_second: float
    write_bytes_per_second: float
    margin: float = 1.25
    receives: bool = True

    def __post_init__(self) -> None:
        if min(self.read_bytes_per_second, self.write_bytes_per_second) <= 0 or self.margin < 1:
            raise PlacementError(f"{self}: rates must be above 0 and the margin at least 1")


@dataclass(frozen=True)
class NumSms:
    """SMs with which copying keeps up with the links; even, as a channel takes two."""

    dispatch: int
    combine: int


def num_sms(workload: Workload, links: Links, copy: SmCopy) -> NumSms:
    """SMs needed so that the copies by SMs take no longer than the links.

    Rows read and written by SMs for every token, n nodes and r ranks reached (report section 3.2.2's roles):

        dispatch  send      read 1   write 1 to the network's buffer, and n/N straight to the own node
                  forward   read n   write r
                  receive   read r   write r
        combine   send      read r   write r
                  forward   read r   write n
                  receive   read n   write 1
    """
    t, w = traffic(workload), workload
    if w.num_tokens == 0 or t.ib_rows + t.nvlink_rows == 0:
        return NumSms(0, 0)
    time = seconds(w, Links(links.ib_bytes_per_second, links.nvlink_bytes_per_second))
    several = w.num_nodes > 1
    send = (1 + t.nodes / w.num_nodes) if several else 0.0
    forward_read = t.nodes if several else 0.0
    received = t.ranks if copy.receives else 0.0
    read, written = 1 + forward_read + received, send + t.ranks + received
    out = w.num_tokens * w.dispatch_row_bytes / time.dispatch
    forward_write = t.nodes if several else 0.0
    back_read = t.ranks + (t.ranks if several else 0.0) + (t.nodes if several else t.ranks)
    back_written = t.ranks + forward_write + 1
    back = w.num_tokens * w.combine_row_bytes / time.combine
    return NumSms(_even(read * out, written * out, copy), _even(back_read * back, back_written * back, copy))


def _even(read: float, written: float, copy: SmCopy) -> int:
    exact = copy.margin * max(read / copy.read_bytes_per_second, written / copy.write_bytes_per_second)
    return 2 * ceil(ceil(exact) / 2)


@dataclass(frozen=True)
class Saving:
    """One way of sending against the flat one: bytes of a dispatch by link, and the flat time over its own."""

    way: str
    ib_bytes: float
    nvlink_bytes: float
    speedup_over_flat: float


def savings(workload: Workload, links: Links) -> list[Saving]:
    """What sending a token once a rank or once a node saves, dispatch and combine together in the time."""

    def total(way: str) -> float:
        time = seconds(workload, links, way=way)
        return time.dispatch + time.combine

    flat, found = total("expert"), []
    for way in ("expert", "rank", "node"):
        t = traffic(workload, way=way)
        time = total(way)
        found.append(Saving(way, t.dispatch_ib_bytes, t.dispatch_nvlink_bytes, flat / time if time else 1.0))
    return found
