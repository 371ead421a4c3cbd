"""What a line of an event log may hold, checked: the fields of `StepEvent` and `RankEvent`, their types and ranges."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin, get_type_hints

from launcher.record.clock import PHASES
from launcher.record.events import SCHEMAS, VERSION
from launcher.record.norms import GROUPS

NOT_NUMBERS = ("nan", "inf", "-inf")  # JSON has none, so they are text
HEADER = {"schema": str, "version": int}
KEYS = {"grad_norms": GROUPS, "weight_norms": GROUPS, "phases": PHASES}
# No field may be below 0 but these.
SIGNED = ("fp8",)


def header_problems(record: Mapping[str, Any], kind: type) -> list[str]:
    """What is wrong with the first line of a log of `kind`."""
    found = [f"{name}: missing" for name in HEADER if name not in record]
    if record.get("schema") != SCHEMAS[kind]:
        found.append(f"schema={record.get('schema')}: must be {SCHEMAS[kind]}")
    if record.get("version") != VERSION:
        found.append(f"version={record.get('version')}: must be {VERSION}")
    return found


def problems(record: Mapping[str, Any], kind: type) -> list[str]:
    """What is wrong with a line of a log of `kind`: unknown, missing, of another type, or out of range."""
    hints = get_type_hints(kind)
    found = [f"{key}: no such field" for key in record if key not in hints]
    for field in fields(kind):
        if field.name in record:
            found += _wrong(hints[field.name], record[field.name], field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            found.append(f"{field.name}: missing")
    for name, keys in KEYS.items():
        if isinstance(record.get(name), dict):
            found += [f"{name}.{key}: no such key" for key in record[name] if key not in keys]
    return found


def _wrong(kind: Any, value: Any, where: str) -> Iterator[str]:
    if type(None) in get_args(kind):
        if value is not None:
            yield from _wrong(next(arg for arg in get_args(kind) if arg is not type(None)), value, where)
    elif get_origin(kind) is tuple:
        inner = get_args(kind)
        if not isinstance(value, list):
            yield f"{where}={value!r}: must be a list"
        elif inner[-1] is not Ellipsis and len(value) != len(inner):
            yield f"{where}: {len(value)} items, must be {len(inner)}"
        else:
            for number, item in enumerate(value):
                yield from _wrong(inner[0 if inner[-1] is Ellipsis else number], item, f"{where}.{number}")
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            yield f"{where}={value!r}: must be an object"
        else:
            for key, item in value.items():
                yield from _wrong(get_args(kind)[1], item, f"{where}.{key}")
    elif set(get_args(kind)) == {str, float}:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            yield f"{where}={value!r}: must be text or a number"
    elif kind is str:
        if not isinstance(value, str):
            yield f"{where}={value!r}: must be text"
    else:
        yield from _wrong_number(kind, value, where)


def _wrong_number(kind: type, value: Any, where: str) -> Iterator[str]:
    if kind is float and value in NOT_NUMBERS:
        return
    good = isinstance(value, int) if kind is int else isinstance(value, int | float)
    if isinstance(value, bool) or not good:
        yield f"{where}={value!r}: must be a {'whole ' if kind is int else ''}number"
    elif (value < 0 and where.split(".")[0] not in SIGNED) or not math.isfinite(value):
        yield f"{where}={value!r}: must be 0 or more, and finite or as text"
