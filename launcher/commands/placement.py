"""`expertpipe placement`: where copies of the busiest experts should go, from a run's log or from a file of loads."""

import json
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from launcher.record.events import read
from parallel.expert.balance import Balance, Floats, ReplicaPlan, balance, plan_replicas
from parallel.expert.placement import PlacementError


@dataclass(frozen=True)
class Load:
    """Tokens of every expert by layer, where they come from, and the groups of the gate that chose (1: none known)."""

    tokens_LE: Floats
    source: str
    num_groups: int


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of the command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="RUN_DIR", help="folder of a run that logged its expert counts")
    source.add_argument("--load", type=Path, metavar="FILE", help=".npy of loads [layers, experts]")
    parser.add_argument("--replicas", type=int, required=True, help="slots for experts in a layer, over all ranks")
    parser.add_argument("--ranks", type=int, required=True, help="ranks of the expert group")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the expert group")
    parser.add_argument("--groups", type=int, help="groups of the gate (default: the run's, for a file 1)")
    parser.add_argument("--last", type=int, default=10, help="add up this many of the run's last counts (default 10)")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object on one line")


def placement(argv: list[str]) -> int:
    """Print the balance before and after the plan, or with --json the plan itself; the exit code.

    Raises PlacementError for loads and counts that do not fit, FileNotFoundError without a log or a file.
    """
    description = (
        "Plans copies of the busiest experts: the same number of experts on every rank, as even a load as found."
    )
    parser = ArgumentParser(prog="expertpipe placement", description=description, allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args(argv)
    load = from_run(args.run, last=args.last) if args.run else from_file(args.load)
    groups = load.num_groups if args.groups is None else args.groups
    plan = plan_replicas(
        load.tokens_LE, num_slots=args.replicas, num_ranks=args.ranks, num_nodes=args.nodes, num_groups=groups
    )
    shown = balance(plan, load.tokens_LE, num_groups=groups)
    print(_json(plan, shown, load, groups) if args.json else _table(plan, shown, load, groups))
    return 0


def from_file(path: Path) -> Load:
    """Loads of an .npy file; what is in it is checked by the planner."""
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise PlacementError(f"{path}: not an .npy file of loads ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        held = array.dtype if isinstance(array, np.ndarray) else "several arrays (.npz)"
        raise PlacementError(f"{path}: holds {held}; placement needs one array of numbers [layers, experts]")
    return Load(array.astype(np.float64), str(path), 1)


def from_run(run_dir: Path, *, last: int) -> Load:
    """The last expert counts that a run logged, added up, with the groups of its gate."""
    if last < 1:
        raise PlacementError(f"--last {last} must be at least 1")
    log = run_dir / "events.jsonl"
    logged = [(event.step, event.expert_counts) for event in read(log) if event.expert_counts]
    if not logged:
        raise PlacementError(
            f"{log}: no expert counts were logged; train with train.expert_counts_every=N of at most the run's steps"
        )
    used = logged[-last:]
    tokens_LE = np.array([counts for _, counts in used], np.float64).sum(0)
    num_groups = yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["n_group"]
    steps = f"step {used[0][0]}" if len(used) == 1 else f"{len(used)} counts of steps {used[0][0]} to {used[-1][0]}"
    return Load(tokens_LE, f"{log}, {steps}", int(num_groups))


def _policy(plan: ReplicaPlan, groups: int) -> str:
    if groups == 1 and plan.num_nodes > 1:
        return "global: the gate has no groups, so copies go to any node"
    if not plan.hierarchical:
        return f"global: {plan.num_nodes} nodes do not divide {groups} groups, so copies go to any node"
    if plan.num_nodes == 1:
        return "one node"
    return f"hierarchical: {groups // plan.num_nodes} of {groups} groups to each of {plan.num_nodes} nodes"


def _table(plan: ReplicaPlan, shown: Balance, load: Load, groups: int) -> str:
    num_layers, num_slots = plan.experts_LP.shape
    copies_LE = plan.copies
    head = [
        f"{load.source}: {num_layers} layers of {plan.num_experts} experts",
        f"{num_slots} slots on {plan.num_ranks} ranks, {num_slots // plan.num_ranks} each; {_policy(plan, groups)}",
        "",
        "          busiest rank over mean",
        "   layer    before     after   copied experts   most copies",
    ]
    rows = [
        f"{layer:8d}  {before:8.3f}  {after:8.3f}   {(copies > 1).sum():14d}   {copies.max():11d}"
        for layer, (before, after, copies) in enumerate(zip(shown.before_L, shown.after_L, copies_LE, strict=True))
    ]
    mean = f"    mean  {shown.before_L.mean():8.3f}  {shown.after_L.mean():8.3f}"
    worst = f"   worst  {shown.before_L.max():8.3f}  {shown.after_L.max():8.3f}"
    return "\n".join([*head, *rows, mean, worst])


def _json(plan: ReplicaPlan, shown: Balance, load: Load, groups: int) -> str:
    return json.dumps(
        {
            "source": load.source,
            "replicas": plan.experts_LP.shape[1],
            "ranks": plan.num_ranks,
            "nodes": plan.num_nodes,
            "groups": groups,
            "hierarchical": plan.hierarchical,
            "before": shown.before_L.tolist(),
            "after": shown.after_L.tolist(),
            "experts": plan.experts_LP.tolist(),  # [layers, replicas], slots in the order of ranks
        }
    )
