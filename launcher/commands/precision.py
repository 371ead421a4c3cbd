"""`expertpipe precision`: every tensor kind of a run, its format, tile and bytes, in forward and backward; no torch."""

import json
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from textwrap import wrap

from launcher.check.run import checked
from launcher.config import RunConfig
from model.fp8.precision_map import AROUND, Precision, Row, precision_map

COLUMNS = 80


def precision_command(argv: list[str]) -> int:
    """Print the map of the run that the overrides describe; the exit code. Mistakes raise ConfigError."""
    parser = ArgumentParser(
        prog="expertpipe precision",
        description="Every tensor kind of a run: format, tile and bytes, in forward and backward.",
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="such as experiment=tiny train.precision=fp8")
    parser.add_argument("--json", action="store_true", help="the rows as one JSON object")
    args = parser.parse_intermixed_args(argv)
    config = checked(args.overrides, with_data=False, here=False)
    rows = precision_map(config.model, chosen(config), config.parallel.recompute)
    if args.json:
        print(json.dumps({"name": config.name, "precision": config.train.precision, "rows": [*map(asdict, rows)]}))
    else:
        print("\n".join(table(config, rows)))
    return 0


def chosen(config: RunConfig) -> Precision:
    """What decides the map of a run."""
    p = config.parallel
    spread = p.expert > 1
    return Precision(
        precision=config.train.precision,
        fp8=config.fp8,
        moments=config.optim.moments,
        dispatch_wire=p.dispatch_wire if spread else "model",
        dispatch_grad_wire=p.dispatch_grad_wire if spread else "model",
        combine_wire=p.combine_wire if spread else "model",
    )


def table(config: RunConfig, rows: Sequence[Row]) -> Iterator[str]:
    """Lines of at most 80 columns: a table for each kind of layer; what is as in a layer above is left out."""
    yield from _wrapped(heading(config))
    yield "bytes: /t a token (routed: of all its experts), /s a sequence, else of the"
    yield "layer's whole stack; 0 for the same storage as another"
    if config.parallel.recompute != "none":
        yield "again: computed once more in the backward, not kept from the forward"
    shown: set[Row] = set()
    notes: dict[str, int] = {}
    for layer, group in groupby(rows, key=lambda row: row.layer):
        every = list(group)
        fresh = [row for row in every if layer == AROUND or replace(row, layer="") not in shown]
        shown |= {replace(row, layer="") for row in every}
        yield ""
        yield f"{layer:<33}{'use':<13}{'format':<7}{'tile':<8}{'scale':<9}{'bytes':>10}"
        new = {_name(row) for row in fresh}
        if above := [name for name in dict.fromkeys(map(_name, every)) if name not in new]:
            yield from _wrapped(f"as above: {', '.join(above)}", "  ")
        for module, members in groupby(fresh, key=lambda row: row.module):
            if module:
                yield f"  {module}"
            for row in members:
                mark = f" [{notes.setdefault(row.note, len(notes) + 1)}]" if row.note else ""
                cells = f"{row.use:<13}{row.format:<7}{row.tile:<8}{row.scale:<9}{_size(row):>10}"
                yield f"{('    ' if module else '  ') + row.tensor + mark:<33}{cells}"
    yield ""
    for note, number in notes.items():
        yield f"[{number}] {note}"


def heading(config: RunConfig) -> str:
    """The run, and what of its configuration decides the map."""
    parts = [f"train.precision={config.train.precision}"]
    if config.train.precision == "fp8":
        parts += [f"fp8.backend={config.fp8.backend}"]
        parts += [f"fp8.grouped={config.fp8.grouped}"] if config.fp8.grouped != "same" else []
    if config.parallel.recompute != "none":
        parts.append(f"parallel.recompute={config.parallel.recompute}")
    return f"{config.name}: {', '.join(parts)}"


def _name(row: Row) -> str:
    return row.module or row.tensor


def _wrapped(text: str, indent: str = "") -> list[str]:
    return wrap(text, COLUMNS, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def _size(row: Row) -> str:
    if row.per != "all":
        unit = row.per[0]
        return f"{row.bytes:,.0f}/{unit}" if row.bytes < 1e6 else f"{row.bytes / 1e3:,.0f}k/{unit}"
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if row.bytes >= factor:
            return f"{row.bytes / factor:.3g}{unit}"
    return f"{row.bytes:g}"
