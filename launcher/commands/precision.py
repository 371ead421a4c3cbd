"""`expertpipe precision`: every tensor kind of a run, its format, tile and bytes, in forward and backward; no torch."""

import json
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby

from launcher.check.run import checked
from launcher.config import RunConfig
from model.fp8.precision_map import Precision, Row, precision_map


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
    """Lines of at most 80 columns: a table for each kind of layer; what a layer shares with one above is left out."""
    backend = f", {config.fp8.backend}" if config.train.precision == "fp8" else ""
    again = "" if config.parallel.recompute == "none" else f", parallel.recompute={config.parallel.recompute}"
    yield f"{config.name}: train.precision={config.train.precision}{backend}{again}"
    yield "bytes: /t a token (routed: of all its experts), else of the layer's whole stack"
    if again:
        yield "again: computed once more in the backward, not kept from the forward"
    shown: set[Row] = set()
    for layer, group in groupby(rows, key=lambda row: row.layer):
        every = list(group)
        fresh = [row for row in every if replace(row, layer="") not in shown]
        shown |= {replace(row, layer="") for row in every}
        yield ""
        yield f"{layer:<33}{'use':<13}{'format':<7}{'tile':<8}{'scale':<9}{'bytes':>10}"
        if len(fresh) < len(every):
            yield "  norms and attention as above"
        for module, members in groupby(fresh, key=lambda row: row.module):
            if module:
                yield f"  {module}"
            for row in members:
                indent = "    " if module else "  "
                cells = f"{row.use:<13}{row.format:<7}{row.tile:<8}{row.scale:<9}{_size(row):>10}"
                yield f"{indent + row.tensor:<33}{cells}"
    yield ""
    yield "gradients, masters, moments: bytes a weight; ZeRO-1 shares the last two out"


def _size(row: Row) -> str:
    if row.per == "token":
        return f"{row.bytes:,.0f}/t" if row.bytes < 1e6 else f"{row.bytes / 1e3:,.0f}k/t"
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if row.bytes >= factor:
            return f"{row.bytes / factor:.3g}{unit}"
    return f"{row.bytes:g}"
