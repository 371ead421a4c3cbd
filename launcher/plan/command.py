"""`expertpipe plan`: what a run will cost, hold and take, without a GPU and without torch."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from launcher.config import ConfigError
from launcher.plan.inputs import PUBLISHED, job_of
from parallel.plan.advice import Change, assumptions, bound_by, changes
from parallel.plan.recipe import Hours, hours
from parallel.plan.step import Plan, plan

_JOB = frozenset({"overrides", "cluster", "precision", "as_published", "json"})
# What each question reads; "": a plan.
TAKES = {
    "": _JOB | {"price", "trace", "calibration", "html", "perfetto"},
    "search": _JOB | {"trace", "calibration"},
    "simulate_cluster": _JOB,
    "validate": frozenset({"trace", "json"}),
    "measured": frozenset({"json"}),
}
NEEDS = {"measured": "validate", "gpus": "search"}
_OPTIONS = ("overrides", *sorted((TAKES[""] | TAKES["search"]) - {"overrides"}))


def plan_command(argv: list[str]) -> int:
    """Runs the command; the exit code."""
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    wrong = misplaced(args)
    if wrong:
        raise ConfigError(wrong)
    if args.measured:
        from launcher.plan.measured.command import measured_command

        return measured_command(as_json=args.json)
    if args.validate:
        from launcher.plan.validate import validate_command

        return validate_command(as_json=args.json, trace=args.trace)
    if not args.overrides:
        raise ConfigError(["name a run, such as experiment=deepseek_v3_2048_h800, or --validate"])
    job = job_of(args)
    if args.search:
        from launcher.plan.search import search_command

        return search_command(job, gpus=args.gpus, precision=args.precision, as_json=args.json)
    if args.simulate_cluster:
        from launcher.plan.cluster import cluster_command

        return cluster_command(job, as_json=args.json)
    found = plan(job)
    cost = hours(found, price_per_hour=args.price)
    helps = changes(found)
    if args.json:
        print(json.dumps(as_tree(found, cost, helps)))
    else:
        from launcher.plan.text import text

        print(text(found, cost, helps))
    if args.html or args.perfetto:
        _pictures(found, cost, helps, args)
    return 0


def misplaced(args: Namespace) -> list[str]:
    """Words that what is asked for does not read, or that say two things at once, a line for each kind."""
    given = {name for name in (*_OPTIONS, *NEEDS) if getattr(args, name) not in (None, False, [])}
    found = [
        f"{_option(name)} goes with {_option(needed)}"
        for name, needed in NEEDS.items()
        if name in given and not getattr(args, needed)
    ]
    asked = [name for name in ("search", "simulate_cluster", "validate") if getattr(args, name)]
    if len(asked) > 1:
        return [*found, f"{' and '.join(map(_option, asked))} are two questions: ask one at a time"]
    mode = "measured" if asked == ["validate"] and args.measured else "".join(asked)
    ignored = [name for name in _OPTIONS if name in given - TAKES[mode]]
    words = [word for name in ignored for word in (args.overrides if name == "overrides" else [_option(name)])]
    if words:
        found.append(f"{_option(mode)} does not take {', '.join(words)}: leave {'them' if words[1:] else 'it'} out")
    if args.trace is not None and args.calibration is not None:
        found.append("--trace and --calibration both give the kernels' factors: use one of them")
    if args.as_published:
        fixed = [word for word in args.overrides if word.lstrip("+").partition("=")[0] in PUBLISHED]
        fixed += [f"--precision {args.precision}"] if args.precision not in (None, "fp8") else []
        found += [f"--as-published plans the report's engine: leave {', '.join(fixed)} out"] if fixed else []
    return found


def _option(name: str) -> str:
    """As it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="expertpipe plan",
        description="Parameters, memory of every pipeline rank, time of a step and cost of a run before it starts.",
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="such as experiment=deepseek_v3_2048_h800")
    parser.add_argument("--cluster", metavar="NAME", help="h800 (the default), h100, h200 or a YAML file")
    parser.add_argument("--precision", choices=("fp8", "bf16", "fp32"), help="in place of train.precision")
    parser.add_argument("--as-published", action="store_true", help="with the engine of the report: FP8, once a node")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of a GPU-hour (default: the cluster's)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="calibrate from a PyTorch profiler trace of a pair")
    parser.add_argument("--calibration", metavar="FILE", help="factors of kernel classes; none: first principles")
    parser.add_argument("--json", action="store_true", help="one JSON object, or one row a line")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the step as a page")
    parser.add_argument("--perfetto", type=Path, metavar="FILE", help="the step as a trace for ui.perfetto.dev")
    parser.add_argument("--validate", action="store_true", help="predictions against published figures")
    parser.add_argument("--measured", action="store_true", help="with --validate: against steps measured on this CPU")
    parser.add_argument("--search", action="store_true", help="legal layouts, the fastest that fits first")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --search: on so many instead of the run's own")
    parser.add_argument("--simulate-cluster", action="store_true", help="all ranks of the run in this process")
    return parser


def as_tree(found: Plan, cost: Hours, helps: list[Change]) -> dict[str, Any]:
    """The plan as JSON has it; seconds, bytes and dollars."""
    numbers, job = found.parameters, found.job
    return {
        "parameters": {"main": numbers.main, "active": numbers.active, "mtp": numbers.mtp},
        "gpus": job.num_gpus,
        "cluster": job.hardware.name,
        "precision": job.precision,
        "schedule": found.schedule.name,
        "layers_per_stage": [len(stage) for stage in found.stages],
        "calibration": job.calibration.source,
        "assumed": [*assumptions(job), *cost.assumed],
        "step_seconds": found.step_seconds,
        "phases_seconds": found.split.rows(),
        "tokens_per_second_per_gpu": found.tokens_per_second_per_gpu,
        "tokens_per_day": found.tokens_per_second_per_gpu * job.num_gpus * 86400,
        "mfu_causal": found.mfu_causal,
        "mfu_full": found.mfu_full,
        "memory_bytes_per_rank": [memory.total for memory in found.memory],
        "memory_by_kind": [memory.rows() for memory in found.memory],
        "host_bytes_per_rank": [memory.host.total for memory in found.memory],
        "host_by_kind": [memory.host.rows() for memory in found.memory],
        "fullest_rank": found.fullest_rank,
        "fits": found.fits,
        "gpu_hours": cost.total,
        "gpu_hours_pretraining": cost.pretraining,
        "gpu_hours_extensions": list(cost.extensions),
        "days": cost.days,
        "dollars": cost.dollars,
        "bound_by": bound_by(found),
        "changes": [
            {"what": c.what, "step_seconds": c.step_seconds, "saved_seconds": c.saved_seconds, "fits": c.fits}
            for c in helps
        ],
    }


def _pictures(found: Plan, cost: Hours, helps: list[Change], args: Namespace) -> None:
    """The files that were asked for."""
    if args.html is not None:
        from launcher.plan.page import write_page

        write_page(found, cost, helps, args.html)
    if args.perfetto is not None:
        from launcher.show.schedule_picture import spans
        from launcher.show.timeline_trace import write_trace

        write_trace([("plan", spans(found.schedule, found.timeline.ranks))], args.perfetto, us_per_unit=1e6)
    if not args.json:
        print("\n".join(f"wrote {file}" for file in (args.html, args.perfetto) if file is not None))
