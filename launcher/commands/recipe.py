"""`expertpipe recipe`: what a run does at which token, with the runs that follow it: text, JSON or a picture."""

import json
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.recipe import HOURS_PER_TRILLION, Phase, Values, phases

PICTURE = Path("recipe.png")  # where no file is named
HEADER = f"{'tokens':>19}{'step':>10}{'lr':>10}{'batch':>8}{'length':>9}{'MTP':>6}{'bias':>8}{'FIM':>7}"


def recipe_command(argv: list[str]) -> int:
    """`expertpipe recipe [--json] [--png [FILE]] [OVERRIDES]`; the exit code."""
    parser = ArgumentParser(prog="expertpipe recipe", description="Every scheduled value of a run, by tokens seen.")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="such as experiment=deepseek_v3")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every level of a batch ramp")
    parser.add_argument(
        "--png", nargs="?", const=PICTURE, type=Path, metavar="FILE", help=f"draw the schedules there ({PICTURE})"
    )
    args = parser.parse_intermixed_args(argv)
    from launcher.check.run import checked
    from launcher.config import ConfigError

    if args.png is not None and "=" in str(args.png):
        raise ConfigError([f"--png {args.png}: an override, not a file: write --png {PICTURE} {args.png}"])

    # a recipe can be read where the GPUs are not
    found = phases(checked(args.overrides, with_data=False, here=False))
    if args.json:
        print(json.dumps({"phases": [as_dict(phase) for phase in found]}))
    else:
        print("\n".join(lines(found)))
    if args.png is not None:
        from launcher.show.recipe_picture import draw

        draw(found, args.png)
        if not args.json:
            print(f"\n{args.png}")
    return 0


def as_dict(phase: Phase) -> dict[str, Any]:
    """A phase as JSON holds it."""
    parallel = phase.config.parallel
    return {
        "name": phase.name,
        "init_from": phase.config.train.init_from or None,
        "first_tokens": phase.first_tokens,
        "tokens": phase.tokens,
        "steps": phase.steps,
        "h800_hours": round(phase.h800_hours),
        "ranks": parallel.world_size,
        "layout": {key: getattr(parallel, key) for key in ("pipeline", "data", "expert", "schedule")},
        "microbatches": phase.config.microbatch_counts,
        "batch_levels": [asdict(level) for level in phase.config.batch_levels],
        "boundaries": [asdict(values) for values in phase.boundaries],
    }


def lines(found: list[Phase]) -> list[str]:
    """All phases in text of at most 80 columns."""
    text: list[str] = []
    for phase in found:
        text += [*_heading(phase), HEADER, *map(_row, phase.boundaries), ""]
    tokens, hours = sum(phase.tokens for phase in found), sum(phase.h800_hours for phase in found)
    text.append(f"{tokens:,} tokens, {sum(phase.steps for phase in found):,} steps{_hours(hours)}")
    if hours >= 1:
        text.append(
            f"hours: the report's {HOURS_PER_TRILLION // 1000}K for 1T tokens of its model at 4K, by FLOPs a token."
        )
    return text


def _heading(phase: Phase) -> list[str]:
    p, train = phase.config.parallel, phase.config.train
    counts = phase.config.microbatch_counts
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    begin = [f"  begins with the newest checkpoint of {train.init_from}"] if train.init_from else []
    return [
        f"{phase.name}: {phase.tokens:,} tokens, {phase.steps:,} steps{_hours(phase.h800_hours)}",
        *begin,
        f"  {p.world_size:,} ranks: pipeline {p.pipeline} {p.schedule} x data {p.data}, expert {p.expert}; "
        f"{many} micro-batches",
        "",
    ]


def _hours(hours: float) -> str:
    if hours < 1:
        return ""
    return f", {hours / 1000:,.0f}K H800-hours" if hours >= 10_000 else f", {hours:,.0f} H800-hours"


def _row(values: Values) -> str:
    fim = "data's" if values.fim_rate is None else f"{values.fim_rate:g}"
    return (
        f"{values.tokens:>19,}{values.step:>10,}{values.lr:>10.2e}{values.batch:>8,}{values.sequence_length:>9,}"
        f"{values.mtp_lambda:>6g}{values.bias_update_speed:>8g}{fim:>7}"
    )
