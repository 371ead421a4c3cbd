"""`expertpipe bench alltoall`: dispatch and combine of expert parallelism, back ends in turns, as DeepEP's tables do.

Under torchrun or srun it uses the ranks it is given; otherwise it starts --ranks processes here, with --namespaces in
network namespaces joined by shaped links (`launcher.network`), whose bytes the kernel counts.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config import ConfigError, TrainConfig
from launcher.local import free_port
from launcher.network import LINK, Node, network, sent_bytes
from launcher.runtime import Process, process_group
from model.fp8.formats import Tile
from model.fp8.native import NativeKernels
from model.fp8.quantise import Quantiser
from parallel.config import ParallelConfig
from parallel.expert.dispatchers import Tokens, build_dispatcher
from parallel.expert.wire import QUANTISER, row_bytes

BACKENDS = ("collective", "native", "native_host", "deepep", "flat")
SECONDS = 600
PROBE_BYTES = 4 << 20  # that each rank sends to find out how fast nodes and links are


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


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(prog="expertpipe bench alltoall")
    made.add_argument("--backend", nargs="+", choices=BACKENDS, default=["collective", "flat"])
    made.add_argument("--dtype", nargs="+", choices=("fp8", "bf16"), default=["fp8", "bf16"])
    for name, default, words in (
        ("num-tokens", 256, "a rank"), ("hidden", 7168, ""), ("experts", 256, "of a layer"), ("topk", 8, "a token"),
        ("groups", 8, "of experts"), ("topk-groups", 4, "that a token may use"), ("nodes", 2, "the ranks form"),
        ("ranks", 4, "in all, unless started by torchrun or srun"), ("repetitions", 5, "of each back end, in turns"),
    ):  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=default, help=f"{words} (default {default})".strip())
    made.add_argument("--namespaces", action="store_true", help="each node in a network namespace (needs root)")
    made.add_argument("--link-mbit", type=float, default=1000.0, help="rate of a node's link in --namespaces")
    made.add_argument("--link", help="network interface whose sent bytes are read, such as eth0")
    made.add_argument("--json", action="store_true", help="one JSON line a row")
    return made


def random_ids(arguments: Namespace, rank: int) -> Tensor:
    """Node-limited routing of random scores, as the report's gate: best groups by their two best, then the best."""
    generator = torch.Generator().manual_seed(rank)
    scores_TE = torch.rand(arguments.num_tokens, arguments.experts, generator=generator)
    by_group = scores_TE.view(len(scores_TE), arguments.groups, -1)
    best = by_group.topk(min(2, by_group.shape[2]), 2).values.sum(2).topk(arguments.topk_groups, 1).indices
    allowed = torch.zeros(by_group.shape[:2], dtype=torch.bool).scatter_(1, best, True)
    return by_group.masked_fill(~allowed[..., None], -1.0).flatten(1).topk(arguments.topk, 1).indices


@dataclass(frozen=True)
class Copies:
    """Tokens of a rank by way. away: once for each other node; arriving: once at each rank, over all senders' mean."""

    away: int
    arriving: float


def count_copies(arguments: Namespace, rank: int, num_ranks: int) -> Copies:
    """From the ids alone."""
    ids, per_node = random_ids(arguments, rank), num_ranks // arguments.nodes
    marks = torch.zeros(len(ids), num_ranks, dtype=torch.bool).scatter_(1, ids * num_ranks // arguments.experts, True)
    nodes = marks.view(len(ids), arguments.nodes, per_node).any(2)
    return Copies(int(nodes.sum() - nodes[:, rank // per_node].sum()), float(marks.sum()))


def check(arguments: Namespace, num_ranks: int) -> None:
    """Raise ConfigError for sizes that do not go together."""
    a, found = arguments, []
    for name in ("num_tokens", "hidden", "experts", "topk", "groups", "topk_groups", "nodes", "ranks", "repetitions"):
        if getattr(a, name) < 1:
            found.append(f"--{name.replace('_', '-')} {getattr(a, name)}: use 1 or more")
    if found:
        raise ConfigError(found)
    rules = (
        (num_ranks % a.nodes, f"--nodes {a.nodes} does not divide {num_ranks} ranks"),
        (a.experts % num_ranks, f"--experts {a.experts} is no multiple of {num_ranks} ranks"),
        (a.experts % a.groups, f"--groups {a.groups} does not divide --experts {a.experts}"),
        (a.topk_groups > a.groups, f"--topk-groups {a.topk_groups} is more than --groups {a.groups}"),
        (a.topk > a.topk_groups * a.experts // a.groups,
         f"--topk {a.topk} is more than the experts of --topk-groups {a.topk_groups} groups"),
        (a.namespaces and a.nodes > 200, f"--nodes {a.nodes}: at most 200 namespaces"),
        (a.namespaces and not a.link_mbit > 0, f"--link-mbit {a.link_mbit:g}: use a rate above 0"),
        (a.namespaces and "native_host" in a.backend, "native_host crosses no network: leave out --namespaces"),
        (not torch.cuda.is_available() and {"native", "deepep"} & {*a.backend},
         "native and deepep need GPUs, and there are none: use collective, native_host or flat"),
        (not _pairs(a), "flat does not send fp8: add --dtype bf16"),
    )  # fmt: skip
    found = [message for wrong, message in rules if wrong]
    if found:
        raise ConfigError(found)


def _pairs(arguments: Namespace) -> list[tuple[str, str]]:
    return [(b, d) for b in arguments.backend for d in arguments.dtype if (b, d) != ("flat", "fp8")]


# --- the parent --------------------------------------------------------------------------------------------------


def start(arguments: Namespace, argv: Sequence[str]) -> int:
    """Start the ranks on this machine and wait for them; the first exit code that is not 0."""
    per_node = arguments.ranks // arguments.nodes
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with ExitStack() as stack:
        nodes: list[Node | None] = [None] * arguments.nodes
        if arguments.namespaces:
            nodes = list(stack.enter_context(network(arguments.nodes, megabits=arguments.link_mbit)))
        first, running = nodes[0], []
        stack.callback(lambda: [process.kill() for process in running])
        port = free_port()
        for rank in range(arguments.ranks):
            node, local = nodes[rank // per_node], rank % per_node
            own = {"RANK": rank, "WORLD_SIZE": arguments.ranks, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": per_node}
            own |= {"MASTER_ADDR": first.address if first else "127.0.0.1", "MASTER_PORT": port}
            own |= {"GLOO_SOCKET_IFNAME": LINK if node else "lo"}
            command = [sys.executable, "-m", "launcher", "bench", "alltoall", *argv]
            command += ["--link", LINK] if node else []
            environment = os.environ | threads | {key: str(value) for key, value in own.items()}
            running.append(subprocess.Popen(node.command(command) if node else command, env=environment))
        while any(process.poll() is None for process in running):
            failed = [process for process in running if process.poll()]
            if failed:
                return failed[0].returncode
            time.sleep(0.2)
        return next((process.returncode for process in running if process.returncode), 0)


# --- a rank ------------------------------------------------------------------------------------------------------


@dataclass
class _Measured:
    """Of one back end and type: seconds of the slowest rank, each repetition, and bytes over this node's link."""

    dispatcher: Any
    dispatch: list[float]
    combine: list[float]
    link: list[int]


def measure(arguments: Namespace, process: Process) -> list[Row]:
    """Every back end in turns, `repetitions` times after one to warm up; rows on all ranks."""
    size, world = process.world_size, dist.group.WORLD
    assert world is not None
    tokens = Tokens(arguments.experts, arguments.topk, arguments.hidden, max_tokens=arguments.num_tokens)
    made = {}
    for backend, dtype in _pairs(arguments):
        config = ParallelConfig(
            data=size, expert=size, dispatcher=backend, ranks_per_node=size // arguments.nodes,
            dispatch_wire="fp8" if dtype == "fp8" else "model",
            dispatch_grad_wire="fp8" if dtype == "fp8" else "model",
        )  # fmt: skip
        timeout = timedelta(seconds=SECONDS)
        built = build_dispatcher(config, world, tokens, timeout=timeout, quantiser=_quantiser(process, dtype))
        made[backend, dtype] = _Measured(built, [], [], [])
    ids = random_ids(arguments, process.rank).to(process.device)
    x = torch.randn(len(ids), arguments.hidden, dtype=torch.bfloat16, device=process.device)
    weights = torch.rand(ids.shape, device=process.device)
    ratio = _node_over_link(process, size // arguments.nodes) if arguments.link and arguments.nodes > 1 else None
    reads = arguments.link is not None and process.rank % (size // arguments.nodes) == 0
    for repetition in range(arguments.repetitions + 1):
        for measured in made.values():
            before = _settled(arguments.link if reads else None, process)
            seconds = _once(measured.dispatcher, x, ids, weights, process)
            after = _settled(arguments.link if reads else None, process)
            if repetition:
                total = torch.tensor([after - before], device=process.device)
                dist.all_reduce(total)
                measured.link.append(int(total))
                measured.dispatch.append(seconds[0])
                measured.combine.append(seconds[1])
    flat = made.get(("flat", "bf16"))
    return [replace(_row(arguments, size, key, m, flat), node_over_link=ratio) for key, m in made.items()]


def _node_over_link(process: Process, per_node: int) -> float | None:
    """Speed of an all-to-all in which bytes go to ranks of the own node, over one to the other nodes; by all ranks."""
    if per_node == 1:
        return None
    size = process.world_size
    home, seconds = process.rank // per_node, []
    for inside in (True, False):
        number = PROBE_BYTES // (per_node - 1 if inside else size - per_node)
        to = [number * ((r // per_node == home) == inside and r != process.rank) for r in range(size)]
        data = torch.zeros(sum(to), dtype=torch.uint8, device=process.device)
        arriving = torch.empty_like(data)
        best = float("inf")
        for _ in range(3):
            _barrier(process)
            started = time.perf_counter()
            dist.all_to_all_single(arriving, data, to, to)
            _barrier(process)
            best = min(best, time.perf_counter() - started)
        seconds.append(best)
    slowest = torch.tensor(seconds, device=process.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest[1] / slowest[0])


def _quantiser(process: Process, dtype: str) -> Quantiser:
    """Compiled kernels on a CPU: in plain torch quantising would take longer than what it saves on the way."""
    return Quantiser(Tile.ROW, kernels=NativeKernels()) if (process.device.type, dtype) == ("cpu", "fp8") else QUANTISER


def _settled(link: str | None, process: Process) -> int:
    """Bytes sent so far over the link, read between two barriers: nobody sends meanwhile."""
    _barrier(process)
    count = sent_bytes(link) if link is not None else 0
    _barrier(process)
    return count


def _barrier(process: Process) -> None:
    if process.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def _once(dispatcher: Any, x: Tensor, ids: Tensor, weights: Tensor, process: Process) -> tuple[float, float]:
    """Seconds of a dispatch, and of a combine, until the slowest rank has its result."""
    seconds = torch.zeros(2, dtype=torch.float64)
    started = time.perf_counter()
    sent = dispatcher.dispatch(x, ids, weights).wait()
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds[0] = time.perf_counter() - started
    _barrier(process)
    started = time.perf_counter()
    dispatcher.combine(sent.rows_RD, sent.handle).wait()
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds[1] = time.perf_counter() - started
    seconds = seconds.to(x.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds[0]), float(seconds[1])


def _row(arguments: Namespace, size: int, key: tuple[str, str], measured: _Measured, flat: _Measured | None) -> Row:
    backend, dtype = key
    copies = [count_copies(arguments, rank, size) for rank in range(size)]
    away, arriving = sum(c.away for c in copies), sum(c.arriving for c in copies)
    there = row_bytes(arguments.hidden, wire="fp8" if dtype == "fp8" else "model", dtype=torch.bfloat16)
    back = row_bytes(arguments.hidden, wire="model", dtype=torch.bfloat16)
    dispatch, combine = statistics.median(measured.dispatch), statistics.median(measured.combine)
    speedup = None
    if flat is not None:
        both = [sum(pair) for pair in zip(flat.dispatch, flat.combine, strict=True)]
        speedup = statistics.median(both) / statistics.median(
            map(sum, zip(measured.dispatch, measured.combine, strict=True))
        )
    per_rank = 1e-9 / size
    return Row(
        backend, dtype, size, arguments.nodes,
        link_bytes=int(statistics.median(measured.link)) if arguments.link else None,
        minimum_bytes=away * (there + back), dispatch_ms=1e3 * dispatch, combine_ms=1e3 * combine,
        speedup_over_flat=speedup,
        dispatch_rdma_gbps=away * there * per_rank / dispatch, dispatch_nvl_gbps=arriving * there * per_rank / dispatch,
        combine_rdma_gbps=away * back * per_rank / combine, combine_nvl_gbps=arriving * back * per_rank / combine,
        node_over_link=None, num_tokens=arguments.num_tokens, hidden=arguments.hidden,
        repetitions=arguments.repetitions,
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Rows as DeepEP prints them: microseconds, GB/s over RDMA and NVLink of a rank; then the links' bytes."""
    head = (
        "Backend",
        "Dispatch #EP",
        "us",
        "GB/s (RDMA)",
        "GB/s (NVL)",
        "Combine #EP",
        "us",
        "GB/s (RDMA)",
        "GB/s (NVL)",
    )
    lines: list[tuple[str, ...]] = [(*head, "vs flat", "link MB", "minimum MB")]
    for row in rows:
        ep, link = f"{row.ranks} ({row.nodes} nodes)", "-" if row.link_bytes is None else f"{row.link_bytes / 1e6:.2f}"
        faster = "-" if row.speedup_over_flat is None else f"{row.speedup_over_flat:.2f}x"
        lines.append((
            f"{row.backend} {row.dtype.upper()}", ep, f"{1e3 * row.dispatch_ms:.0f}", f"{row.dispatch_rdma_gbps:.3g}",
            f"{row.dispatch_nvl_gbps:.3g}", ep, f"{1e3 * row.combine_ms:.0f}", f"{row.combine_rdma_gbps:.3g}",
            f"{row.combine_nvl_gbps:.3g}", faster, link, f"{row.minimum_bytes / 1e6:.2f}",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    if rows and rows[0].node_over_link is not None:
        text.append(f"Within a node, plain all-to-alls moved {rows[0].node_over_link:.1f} times the bytes a second.")
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def bench_alltoall(argv: Sequence[str]) -> int:
    """`expertpipe bench alltoall [flags]`; see `--help`."""
    arguments = parser().parse_args(argv)
    if "RANK" not in os.environ:
        check(arguments, arguments.ranks)
        return start(arguments, argv)
    check(arguments, int(os.environ["WORLD_SIZE"]))
    with process_group(TrainConfig(steps=1, global_batch_size=1, timeout_seconds=SECONDS)) as process:
        rows = measure(arguments, process)
        if process.rank == 0:
            print("\n".join(json.dumps(asdict(row)) for row in rows) if arguments.json else table(rows), flush=True)
        dist.barrier()
    return 0
