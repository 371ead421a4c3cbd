"""`expertpipe bench alltoall`: dispatch and combine of expert parallelism, back ends in turns, as DeepEP's tables do.

Under torchrun or srun it measures over the ranks of the job; otherwise it starts --ranks processes here, with
--namespaces in network namespaces joined by shaped links (`launcher.network`), whose bytes the kernel counts.

The default rate of a link, 300 Mbit/s, makes the link what transfers wait for, as InfiniBand is between real nodes: two
cores that carry four ranks move about ten times as much within a node. At 2,000 Mbit/s they were the limit themselves.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.bench.alltoall_table import Row, closing_line, head_lines, row_line
from launcher.config import ConfigError, TrainConfig
from launcher.local import free_port
from launcher.network import LINK, Node, network, sent_bytes
from launcher.runtime import Process, process_group
from launcher.start import outer_world_size, slurm_environment
from model.fp8.native import NativeKernels
from model.fp8.quantise import Quantiser
from parallel.config import ParallelConfig
from parallel.expert.dispatchers import Tokens, build_dispatcher
from parallel.expert.wire import QUANTISER, row_bytes

BACKENDS = ("flat", "collective", "native", "native_host", "deepep")
SECONDS = 600
LOCAL_NODES, LINK_MBIT = 2, 300.0
PROBE_BYTES = 4 << 20  # that each rank sends to find out how fast nodes and links are


def parser() -> ArgumentParser:
    """The flags."""
    made = ArgumentParser(prog="expertpipe bench alltoall")
    made.add_argument("--backend", nargs="+", choices=BACKENDS, default=["flat", "collective"])
    made.add_argument(
        "--dtype",
        nargs="+",
        choices=("bf16", "fp8"),
        default=["bf16", "fp8"],
        help="of dispatched rows; flat sends bf16 only",
    )
    for name, default, words in (
        ("num-tokens", 256, "a rank"), ("hidden", 7168, ""), ("experts", 256, "of a layer"), ("topk", 8, "a token"),
        ("groups", 8, "of experts"), ("topk-groups", 4, "that a token may use"),
        ("ranks", 4, "in all, unless started by torchrun or srun"), ("repetitions", 5, "of each back end, in turns"),
    ):  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=default, help=f"{words} (default {default})".strip())
    made.add_argument("--nodes", type=int, help=f"the ranks form (default: the job's, on this machine {LOCAL_NODES})")
    made.add_argument("--namespaces", action="store_true", help="each node in a network namespace (needs root)")
    made.add_argument("--link-mbit", type=float, default=LINK_MBIT, help="rate of a node's link in --namespaces")
    made.add_argument("--link", help="network interface whose sent bytes are read, such as eth0")
    made.add_argument("--json", action="store_true", help="one JSON line a row")
    made.add_argument("--rows", type=Path, metavar="FILE", help="append the rows to this file too, as JSON lines")
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
        ({*a.backend} == {"flat"} and "bf16" not in a.dtype, "flat does not send fp8: add --dtype bf16"),
    )  # fmt: skip
    found = [message for wrong, message in rules if wrong]
    if found:
        raise ConfigError(found)


def _pairs(arguments: Namespace) -> list[tuple[str, str]]:
    """What is measured; flat BF16, which the others are compared with, first."""
    others = [(b, d) for b in arguments.backend for d in arguments.dtype if b != "flat"]
    return [("flat", "bf16"), *others] if "flat" in arguments.backend else others


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


def measure(arguments: Namespace, process: Process) -> Iterator[Row]:
    """Every back end in turns, `repetitions` times after one to warm up; a row, on all ranks, after its last turn.

    Rank 0 says on stderr how far it is.
    """
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
    link = arguments.link if process.rank % (size // arguments.nodes) == 0 else None
    for turn in range(arguments.repetitions + 1):
        for key, measured in made.items():
            before = _settled(link, process)
            seconds = _once(measured.dispatcher, x, ids, weights, process)
            after = _settled(link, process)
            if process.rank == 0:
                name = f"turn {turn} of {arguments.repetitions}" if turn else "warm-up"
                print(f"{name}: {' '.join(key)} {1e3 * sum(seconds):.0f} ms", file=sys.stderr, flush=True)
            if turn:
                total = torch.tensor([after - before], device=process.device)
                dist.all_reduce(total)
                measured.link.append(int(total))
                measured.dispatch.append(seconds[0])
                measured.combine.append(seconds[1])
            if turn == arguments.repetitions:
                row = _row(arguments, size, key, measured, made.get(("flat", "bf16")))
                yield replace(row, node_over_link=ratio)


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
    return replace(QUANTISER, kernels=NativeKernels()) if (process.device.type, dtype) == ("cpu", "fp8") else QUANTISER


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


def bench_alltoall(argv: Sequence[str]) -> int:
    """`expertpipe bench alltoall [flags]`; see `--help`. Rows are printed as they come."""
    arguments = parser().parse_args(argv)
    os.environ.update(slurm_environment(os.environ))
    world_size = outer_world_size(os.environ)
    if world_size is None:
        arguments.nodes = arguments.nodes or LOCAL_NODES
        check(arguments, arguments.ranks)
        return start(arguments, argv)
    if arguments.nodes is None:
        arguments.nodes = max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    check(arguments, world_size)
    with process_group(TrainConfig(steps=1, global_batch_size=1, timeout_seconds=SECONDS)) as process:
        rows = []
        for row in measure(arguments, process):
            if process.rank == 0:
                _show(arguments, row, first=not rows)
            rows.append(row)
        if process.rank == 0 and not arguments.json and (last := closing_line(rows)):
            print(last, flush=True)
        dist.barrier()
    return 0


def _show(arguments: Namespace, row: Row, *, first: bool) -> None:
    as_json = json.dumps(asdict(row))
    if arguments.json:
        print(as_json, flush=True)
    else:
        print("\n".join([*(head_lines() if first else []), row_line(row)]), flush=True)
    if arguments.rows is not None:
        with open(arguments.rows, "a", encoding="utf-8") as file:
            file.write(as_json + "\n")
