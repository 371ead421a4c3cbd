"""What `expertpipe bench alltoall` measures of a back end, and how DeepEP's tables show it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What is measured of a back end; bytes of one dispatch and one combine, all nodes together.

    link_bytes: sent over the links as the kernel counts, headers and counts included; None without an interface to
    read. minimum_bytes: each token once for every other node it goes to, there and back, nothing else. *_ms: medians of
    the slowest rank. *_rdma_gbps, *_nvl_gbps: bytes that a rank sends to other nodes, and receives in all, a second
    (mean over ranks). speedup_over_flat: of dispatch and combine together, over flat BF16 in the same run.
    node_over_link: bytes a second of plain all-to-alls within the nodes over those between them, as measured here; None
    without an interface (the report: NVLink 160 GB/s over InfiniBand 50 is 3.2).
    """

    backend: str
    dtype: str
    ranks: int
    nodes: int
    link_bytes: int | None
    minimum_bytes: int
    dispatch_ms: float
    combine_ms: float
    speedup_over_flat: float | None
    dispatch_rdma_gbps: float
    dispatch_nvl_gbps: float
    combine_rdma_gbps: float
    combine_nvl_gbps: float
    node_over_link: float | None
    num_tokens: int
    hidden: int
    repetitions: int


# Columns and their least widths: rows are printed one by one, before the widest is known.
_COLUMNS = (
    ("Backend", 16), ("Dispatch #EP", 13), ("us", 8), ("GB/s (RDMA)", 0), ("GB/s (NVL)", 0), ("Combine #EP", 13),
    ("us", 8), ("GB/s (RDMA)", 0), ("GB/s (NVL)", 0), ("vs flat", 0), ("link MB", 8), ("minimum MB", 0),
)  # fmt: skip


def head_lines() -> list[str]:
    """The two lines above the rows."""
    names = _line([name for name, _ in _COLUMNS])
    return [names, "|" + "|".join("-" * (len(cell) + 2) for cell in names[2:-2].split(" | ")) + "|"]


def row_line(row: Row) -> str:
    """Microseconds, GB/s over RDMA and NVLink of a rank; then the links' bytes."""
    ep, link = f"{row.ranks} ({row.nodes} nodes)", "-" if row.link_bytes is None else f"{row.link_bytes / 1e6:.2f}"
    faster = "-" if row.speedup_over_flat is None else f"{row.speedup_over_flat:.2f}x"
    return _line([
        f"{row.backend} {row.dtype.upper()}", ep, f"{1e3 * row.dispatch_ms:.0f}", f"{row.dispatch_rdma_gbps:.3g}",
        f"{row.dispatch_nvl_gbps:.3g}", ep, f"{1e3 * row.combine_ms:.0f}", f"{row.combine_rdma_gbps:.3g}",
        f"{row.combine_nvl_gbps:.3g}", faster, link, f"{row.minimum_bytes / 1e6:.2f}",
    ])  # fmt: skip


def closing_line(rows: Sequence[Row]) -> str | None:
    """How much slower than the nodes their links were, where that was measured."""
    ratio = rows[0].node_over_link if rows else None
    return None if ratio is None else f"Within a node, plain all-to-alls moved {ratio:.1f} times the bytes a second."


def _line(cells: Sequence[str]) -> str:
    widths = [max(len(name), least) for name, least in _COLUMNS]
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
