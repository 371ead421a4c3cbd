"""`expertpipe preflight`: are these nodes fit for this run? One table; bad nodes, pairs and ranks by name."""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config import RunConfig

if TYPE_CHECKING:  # the command answers mistakes without torch
    from launcher.preflight.verdict import Row
    from launcher.runtime import Process


class PreflightError(ValueError):
    """Something is bad; one line each in `errors`, naming node, pair or rank."""

    user_error = True

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


def preflight_command(argv: list[str]) -> int:
    """Runs the command on the ranks that srun or torchrun has started, or on local processes; 0 if all is well.

    PreflightError, so exit code 2, with what is bad.
    """
    args = _parser().parse_intermixed_args(argv)
    from launcher.check.run import checked
    from launcher.start import outer_world_size, slurm_environment

    os.environ.update(slurm_environment(os.environ))
    world_size = outer_world_size(os.environ)
    config = checked(args.overrides, world_size=world_size, with_data=False)
    if world_size is None and config.parallel.world_size > 1:
        from launcher.local import run_local

        threads = config.train.threads or 1
        run_dir = Path(config.run_dir)
        return run_local(["preflight", *argv], world_size=config.parallel.world_size, run_dir=run_dir, threads=threads)
    return _on_ranks(config, args)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="expertpipe preflight",
        description="Tests nodes and links with a run's own layout: libraries, clocks, storage, all pairs, the "
        "collectives of every axis, dispatch and combine. Under srun or torchrun, else on local processes.",
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="the run, as for train")
    parser.add_argument("--mebibytes", type=float, default=16.0, help="of a test message or file (default 16)")
    parser.add_argument("--slow", type=float, default=0.5, help="share of the median speed that is too little (0.5)")
    parser.add_argument("--timeout", type=int, default=60, help="seconds until a silent rank is named (60)")
    parser.add_argument("--json", action="store_true", help="the table as one JSON object")
    return parser


def _on_ranks(config: RunConfig, args: Namespace) -> int:
    from launcher.preflight.verdict import table
    from launcher.runtime import process_group

    with process_group(replace(config.train, timeout_seconds=args.timeout)) as process:
        rows = examine(config, process, payload_bytes=int(args.mebibytes * 2**20), slow=args.slow, seconds=args.timeout)
        if process.rank == 0 and args.json:
            print(json.dumps({"ok": not any(row.bad for row in rows), "rows": [asdict(row) for row in rows]}))
        elif process.rank == 0:
            print(table(f"{config.name}: {process.world_size} ranks", rows))
        sys.stdout.flush()
    checks: dict[str, str] = {}  # what is bad in several kinds of pairs is said once
    for row in rows:
        for what in row.bad:
            checks.setdefault(what, row.check)
    if checks:
        raise PreflightError([f"{check}: {what}" for what, check in checks.items()])
    return 0


def examine(config: RunConfig, process: "Process", *, payload_bytes: int, slow: float, seconds: int) -> "list[Row]":
    """Every check, in the order in which one relies on another; all ranks together, the same rows on all.

    slow: share of the median speed below which a pair or group is bad. seconds: a
    collective that takes longer is answered with the ranks that give no sign of life (ExpertError).
    """
    import torch.distributed as dist

    from launcher.build import plan_layout
    from launcher.preflight.axes import axes_of, check_axes
    from launcher.preflight.experts import check_experts
    from launcher.preflight.host import check_clocks, check_libraries, check_storage
    from launcher.preflight.pairs import check_pairs
    from launcher.preflight.team import Team
    from launcher.preflight.verdict import Nodes
    from parallel.mesh import Groups, Mesh

    hosts: list[str] = [""] * process.world_size
    dist.all_gather_object(hosts, host_name(process.rank, process.local_size, config))
    team = Team(process, Nodes(tuple(hosts)), payload_bytes, slow)
    timeout = timedelta(seconds=seconds)
    rows = [
        team.phase("libraries", lambda: check_libraries(team, config)),
        team.phase("clocks", lambda: check_clocks(team)),
        team.phase("storage", lambda: check_storage(team, Path(config.run_dir))),
        *team.phase("pairs", lambda: check_pairs(team)),
    ]
    per_node = config.parallel.ranks_per_node or process.local_size
    mesh = Mesh(replace(config.parallel, ranks_per_node=per_node), process.rank)
    holders = plan_layout(config).holder_sets()
    groups = team.phase("process groups", lambda: Groups(mesh, holders, timeout=timeout))
    rows += check_axes(team, axes_of(groups, mesh, holders))
    if config.parallel.expert > 1:
        rows.append(check_experts(team, config, mesh, groups, timeout))
    return rows


def host_name(rank: int, local_size: int, config: RunConfig) -> str:
    """The node of a rank: its host's name; where a run says that nodes are parts of this machine, the part too."""
    host = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    per_node = config.parallel.ranks_per_node
    return f"{host}/{rank % local_size // per_node}" if per_node and per_node < local_size else host
