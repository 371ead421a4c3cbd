"""`expertpipe schedule`: a pipeline schedule checked, simulated and drawn; or what `auto` would take, and why."""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.show.schedule_picture import Rows, spans, ways
from launcher.show.timeline import Ways, timeline, timeline_text
from parallel.pipeline.actions import Schedule
from parallel.pipeline.auto import Choice, Fits, Phases, choose
from parallel.pipeline.check import Peaks, check
from parallel.pipeline.csv_format import write
from parallel.pipeline.phase_costs import PhaseCosts
from parallel.pipeline.placement import shape
from parallel.pipeline.schedules import SCHEDULES, build
from parallel.pipeline.simulate import Costs, StepCosts, Timed, Timeline, simulate
from parallel.pipeline.simulate_phases import simulate_phases

COST_KEYS = {
    "F": "forward", "I": "input_grad", "W": "weight_grad", "message": "message", "F_comm": "forward_comm",
    "I_comm": "input_grad_comm", "hidden": "hidden", "pair_hidden": "pair_hidden", "overlap": "overlap",
}  # fmt: skip
BY_STAGE = ("F", "I", "W", "F_comm", "I_comm")
_MOST_TEXT_RANKS = 64


class RequestError(ValueError):
    """An option that means nothing; the message names it and what would."""

    user_error = True


@dataclass(frozen=True)
class Picture:
    """What is drawn: planned rows, measured ones below them where there was a run, and how to call it all.

    measured: the same ranks in the same unit. us_per_unit: of the times.
    """

    planned: Rows
    measured: Rows | None
    ways: Ways
    title: str
    subtitle: str
    time_label: str
    us_per_unit: float

    def rows(self) -> Rows:
        """All rows, each rank's plan above its run."""
        if self.measured is None:
            return self.planned
        return [row for pair in zip(self.planned, self.measured, strict=True) for row in pair]

    def labels(self) -> list[str]:
        """Names of the rows."""
        if self.measured is None:
            return [f"rank {rank}" for rank in range(len(self.planned))]
        return [f"{rank} {what}" for rank in range(len(self.planned)) for what in ("plan", "run")]


def schedule_command(argv: list[str]) -> int:
    """Runs the command; the exit code."""
    args = _parser().parse_intermixed_args(argv)
    config = _config(args)
    _complete(args, config)
    costs_of = _costs_of(args, config)
    phases = _phases(args, config, costs_of)
    if args.name == "auto":
        choice = _choice(args, config, costs_of, phases)
        print("\n".join(choice.why()), end="\n\n")
        args.name = choice.best.name
        args.stages_per_rank = choice.best.stages_per_rank if choice.best.name == "interleaved" else None
    schedule = build(
        args.name,
        num_ranks=args.pipeline,
        num_microbatches=args.microbatches,
        stages_per_rank=args.stages_per_rank,
    )
    peaks = check(schedule)
    measured = _measured(args, schedule)
    costs = _plan_costs(args, costs_of(schedule), measured)
    if phases is None or (measured is not None and args.overlap is None):
        found = simulate(schedule, costs)
    elif measured is not None:  # phases of a run's own medians
        found = simulate_phases(schedule, _split_up(costs, args.overlap), level=phases.level)
    else:
        found = simulate_phases(schedule, phases.costs_of(schedule), level=phases.level)
    for text in _summary(schedule, found, peaks, measured):
        print(text)
    picture = _picture(schedule, found, measured)
    drawn = _write_files(args, schedule, picture)
    if not drawn:
        _print_text(picture)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="expertpipe schedule",
        description="Checks, simulates and draws a pipeline schedule, as text where no file is asked for.",
        epilog="Costs: F, I and W of a stage, F_comm and I_comm of its all-to-all, message; hidden (0 to 1): share of "
        "the all-to-all that a chunk without a partner hides, pair_hidden: that a pair hides, overlap: share of the "
        "shorter chunk of a pair. A stage is a rank's layers, or a share of them where a rank has several stages; "
        "F=1/1/2/1 gives each stage its own. With OVERRIDES, such as experiment=tiny, the shape and the costs are "
        "those of that run.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(SCHEDULES)}, auto, or a .csv file")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="the run to take shape and costs from")
    parser.add_argument("--pipeline", type=int, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, metavar="M", help="micro-batches of a step, both directions")
    parser.add_argument("--stages-per-rank", type=int, metavar="V", help="of interleaved (default 2)")
    parser.add_argument("--costs", metavar="KEY=VALUE,...", help="such as F=1,I=1,W=0.5,message=0.1 (default 1, 1, 1)")
    parser.add_argument(
        "--overlap",
        choices=("off", "pairs", "all"),
        help="simulate phase by phase, as parallel.overlap would run it; with --costs one layer a stage, half of its "
        "computation attention and a tenth the shared expert (default for a run: its own overlap)",
    )
    parser.add_argument("--cluster", metavar="NAME", help="price a run in the planner's seconds on h800, h100, ...")
    parser.add_argument("--layers", type=int, metavar="L", help="of the model: auto gives each stage at least one")
    parser.add_argument("--png", type=Path, metavar="FILE", help="a picture")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page: hover shows an action, the wheel zooms")
    parser.add_argument("--perfetto", type=Path, metavar="FILE", help="a trace for ui.perfetto.dev or chrome://tracing")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the notation of torch.distributed.pipelining")
    parser.add_argument("--measured", type=Path, metavar="RUN", help="folder or file of a run, drawn below its plan")
    parser.add_argument("--step", type=int, metavar="N", help="step of the measured run (default: the last whole one)")
    return parser


def _config(args: Namespace) -> RunConfig | None:
    if not args.overrides:
        return None
    from launcher.check.run import checked

    with_schedule = [*args.overrides]
    if not any(text.startswith("parallel.schedule=") for text in args.overrides):
        with_schedule.append(f"parallel.schedule={args.name}")
    config = checked(with_schedule, with_data=False, here=False)
    return replace(config, parallel=replace(config.parallel, schedule=args.name))


def _complete(args: Namespace, config: RunConfig | None) -> None:
    """Shape from the run or from the file, where it was not given."""
    from parallel.pipeline.schedules import is_file, load

    if config is not None:
        for name, value in (("pipeline", config.parallel.pipeline), ("microbatches", config.num_microbatches)):
            if getattr(args, name) not in (None, value):
                raise RequestError(
                    f"--{name}={getattr(args, name)}, but the run that was given has {value}: leave it out"
                )
            setattr(args, name, value)
        if args.stages_per_rank is None and args.name == "interleaved":
            args.stages_per_rank = config.parallel.stages_per_rank
    elif is_file(args.name):
        schedule = load(args.name)
        args.pipeline = args.pipeline or schedule.num_ranks
        args.microbatches = args.microbatches or schedule.num_microbatches
    for name in ("pipeline", "microbatches"):
        if getattr(args, name) is None:
            raise RequestError(f"--{name} is missing: give both numbers, or a run such as experiment=tiny")


def _costs_of(args: Namespace, config: RunConfig | None) -> Callable[[Schedule], StepCosts]:
    """Costs for the stages of a schedule: given ones are those of all of a rank's layers."""
    if config is not None and args.costs is None:
        from launcher.schedule_choice import costs_of

        return lambda schedule: costs_of(config, schedule)
    costs = parse_costs(args.costs or "")

    def scaled(schedule: Schedule) -> Costs:
        per_rank = schedule.stages_per_rank
        changes: dict[str, Any] = {}
        for key in BY_STAGE:
            value: float | tuple[float, ...] = getattr(costs, COST_KEYS[key])
            if isinstance(value, tuple) and len(value) != schedule.num_stages:
                raise RequestError(
                    f"--costs {key} has {len(value)} numbers, {schedule.name} on {schedule.num_ranks} ranks has "
                    f"{schedule.num_stages} stages: give one number, or {schedule.num_stages}"
                )
            changes[COST_KEYS[key]] = value if isinstance(value, tuple) else value / per_rank
        return replace(costs, **changes)

    return scaled


def parse_costs(text: str) -> Costs:
    """`F=1,I=1,W=0.5,message=0.1`; values with slashes are one for each stage. RequestError names what is wrong."""
    given: dict[str, float | tuple[float, ...]] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key.strip() not in COST_KEYS or not equals:
            raise RequestError(f"--costs {item}: use {', '.join(COST_KEYS)}, each as KEY=NUMBER")
        try:
            numbers = [float(number) for number in value.split("/")]
        except ValueError:
            raise RequestError(f"--costs {item}: {value!r} is not a number, or numbers with / between them") from None
        single = key.strip() not in BY_STAGE
        most = 1.0 if key.strip() in ("hidden", "pair_hidden", "overlap") else math.inf
        if (single and len(numbers) > 1) or not all(0 <= number <= most for number in numbers):
            to = "" if most == math.inf else " to 1"
            raise RequestError(f"--costs {item}: use {'one number' if single else 'numbers'} from 0{to}")
        given[COST_KEYS[key.strip()]] = tuple(numbers) if len(numbers) > 1 else numbers[0]
    return replace(Costs(), **given)  # type: ignore[arg-type]


def _phases(args: Namespace, config: RunConfig | None, costs_of: Callable[[Schedule], StepCosts]) -> Phases | None:
    """The phases to simulate: a run's, under its own overlap; of --costs only where --overlap asks for it."""
    if config is not None and args.costs is None:
        from launcher import schedule_choice

        level = args.overlap or schedule_choice.level_of(config)
        if args.cluster:
            return Phases(schedule_choice.on_cluster(config, args.cluster), level)
        return Phases(lambda schedule: schedule_choice.phase_costs_of(config, schedule), level)
    if args.cluster:
        raise RequestError(f"--cluster={args.cluster} prices a run: name one, such as experiment=tiny, and no --costs")
    if args.overlap is None:
        return None
    return Phases(lambda schedule: _split_up(costs_of(schedule), args.overlap), args.overlap)


def _choice(
    args: Namespace, config: RunConfig | None, costs_of: Callable[[Schedule], StepCosts], phases: Phases | None
) -> Choice:
    if config is not None and args.costs is None:
        from launcher.schedule_choice import choice

        return choice(config, phases=phases)
    layers = args.layers or 8 * args.pipeline
    if layers < args.pipeline:
        raise RequestError(f"--layers={layers} is fewer than --pipeline={args.pipeline}: each rank needs a layer")
    return choose(
        num_ranks=args.pipeline,
        num_microbatches=args.microbatches,
        fits=Fits(num_layers=layers),
        costs_of=costs_of,
        phases=phases,
    )


Measured = list[list[Timed]]


def _measured(args: Namespace, schedule: Schedule) -> Measured | None:
    if args.measured is None:
        return None
    from launcher.record.measured import of_step, read

    return of_step(read(args.measured), schedule, step=args.step)


def _plan_costs(args: Namespace, costs: StepCosts, measured: Measured | None) -> StepCosts:
    """Beside a run the plan has the medians of that run, unless costs were given."""
    if measured is None or args.costs is not None:
        return costs
    from launcher.record.measured import MeasuredCosts

    return MeasuredCosts.of_rows(measured)


def _split_up(costs: StepCosts, level: str) -> PhaseCosts:
    """The phases of stages of which only the whole is known."""
    shares = isinstance(costs, Costs) and (costs.hidden, costs.pair_hidden, costs.overlap) == (0.0, 1.0, 0.0)
    if not isinstance(costs, Costs) or not shares:
        raise RequestError(
            "--overlap finds what is hidden by itself: leave hidden, pair_hidden and overlap out of --costs"
        )
    try:
        return PhaseCosts.of_stage_costs(costs)
    except ValueError as error:
        raise RequestError(f"--overlap={level}: {error}") from error


def _summary(schedule: Schedule, found: Timeline, peaks: Peaks, measured: Measured | None) -> list[str]:
    """At most 80 columns."""
    per_rank = schedule.stages_per_rank
    stages = f", {schedule.num_stages} stages" if per_rank > 1 else ""
    name = schedule.name if len(schedule.name) < 30 else "..." + schedule.name[-26:]
    live, deferred = str(max(peaks.live_activations)), max(peaks.deferred_weight_grads)
    if per_rank > 1:
        live += f" (of 1/{per_rank} rank)"
    lines = [
        f"{name}: {schedule.num_ranks} ranks ({shape(schedule.placement)}{stages}), "
        f"{schedule.num_microbatches} micro-batches",
        f"makespan {found.makespan:.5g}  bubble {found.bubble:.1%}  live activations {live}  deferred W {deferred}",
    ]
    if measured is not None:
        end = max(timed.end for row in measured for timed in row)
        lines.append(f"measured {end:.5g} ms, {end / found.makespan:.3f} of the plan")
    return lines


def _picture(schedule: Schedule, found: Timeline, measured: Measured | None) -> Picture:
    unit = "ms" if measured is not None else "units of the costs"
    subtitle = f"simulated from the action lists that run; idle {found.bubble:.1%} of {found.makespan:.5g}"
    if measured is not None:
        end = max(timed.end for row in measured for timed in row)
        subtitle = f"plan {found.makespan:.5g} ms above run {end:.5g} ms, {end / found.makespan:.3f} of it"
    return Picture(
        planned=spans(schedule, found.ranks),
        measured=None if measured is None else spans(schedule, measured),
        ways=ways(schedule),
        title=f"{schedule.name}: {schedule.num_ranks} pipeline ranks, {schedule.num_microbatches} micro-batches",
        subtitle=subtitle,
        time_label=f"time, {unit}",
        us_per_unit=1000.0,
    )


def _write_files(args: Namespace, schedule: Schedule, picture: Picture) -> bool:
    """Every file that was asked for; whether any was."""
    rows, labels = picture.rows(), picture.labels()
    common: Any = {"title": picture.title, "subtitle": picture.subtitle, "time_label": picture.time_label}
    if args.png:
        timeline(rows, args.png, labels=labels, ways=picture.ways, **common)
    if args.html:
        from launcher.show.timeline_html import timeline_html

        timeline_html(rows, args.html, labels=labels, ways=picture.ways, **common)
    if args.perfetto:
        from launcher.show.timeline_trace import write_trace

        groups = [("plan", picture.planned)] + ([("run", picture.measured)] if picture.measured is not None else [])
        write_trace(groups, args.perfetto, us_per_unit=picture.us_per_unit)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        args.csv.write_text(write(schedule))
        if schedule.bidirectional:
            print("torch has no placement for two directions: only expertpipe reads this CSV back")
    files = [file for file in (args.png, args.html, args.perfetto, args.csv) if file]
    for file in files:
        print(f"wrote {file}")
    return bool(files)


def _print_text(picture: Picture) -> None:
    if len(picture.planned) > _MOST_TEXT_RANKS:
        print(f"{len(picture.planned)} ranks are too many for text: use --png or --html")
        return
    print()
    print(timeline_text(picture.rows(), labels=picture.labels(), ways=picture.ways))
