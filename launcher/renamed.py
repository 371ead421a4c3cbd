"""Keys that had another name in an earlier version: what a checkpoint or a run folder of then says is still read.

An entry stays for as long as checkpoints of a format that is read may hold the old name. A stored configuration comes
in under the new name; an override that uses the old one is told the new one and refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """old, new: dotted keys, in one section. values: what each old value is called now; empty: as it was."""

    old: str
    new: str
    values: Mapping[Any, Any]


RENAMED = (Renamed("data.packing", "data.document_mask", {"unmasked": False, "masked": True}),)


def modern(tree: Mapping[str, Any], errors: dict[str, str]) -> Mapping[str, Any]:
    """A stored configuration with today's names, `tree` itself where it has no old one; mistakes go to `errors`."""
    for entry in RENAMED:
        section, _, old = entry.old.rpartition(".")
        new = entry.new.rpartition(".")[2]
        part = tree.get(section)
        if not isinstance(part, Mapping) or old not in part:
            continue
        rest = {key: value for key, value in part.items() if key != old}
        known = {str(value): name for value, name in entry.values.items()}
        if new in rest:
            errors[entry.old] = f"{entry.old}: given beside {entry.new}, its name of today; leave it out"
        elif known and str(part[old]) not in known:
            errors[entry.old] = f"{entry.old}={part[old]}: expected {' or '.join(known)}"
        else:
            rest[new] = known[str(part[old])] if known else part[old]
        tree = {**tree, section: rest}
    return tree


def told(key: str) -> str | None:
    """The line for an override that uses an old name; None for every other key."""
    for entry in RENAMED:
        if key == entry.old:
            said = ", ".join(f"{_text(new)} for {_text(old)}" for old, new in entry.values.items())
            return f"{key}: it is called {entry.new} now" + (f" ({said})" if said else "")
    return None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
