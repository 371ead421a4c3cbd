"""How a run ended, as tests compare it: losses, every byte of the shards, what the manifest says of the rest."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTS = ("step", "tokens", "progress", "optimizer_steps", "spikes", "collapse")  # of the manifest: all that is state


@dataclass(frozen=True)
class Outcome:
    """The losses of a run's steps, and its last checkpoint."""

    losses: Mapping[int, float]
    shards: Mapping[str, bytes]
    facts: Mapping[str, Any]


def outcome(checkpoint: Path, losses: Mapping[int, float]) -> Outcome:
    """Of a run that ended with this checkpoint."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    shards = {path.name: path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))}
    return Outcome(losses, shards, {name: manifest.get(name) for name in FACTS})


def differences(ours: Outcome, theirs: Outcome) -> list[str]:
    """What is not the same to the last bit; steps that only one of them counts are no difference."""
    found = [f"loss of step {step}" for step in ours.losses.keys() & theirs.losses.keys()
             if ours.losses[step] != theirs.losses[step]]  # fmt: skip
    found += [name for name in ours.shards.keys() | theirs.shards.keys()
              if ours.shards.get(name) != theirs.shards.get(name)]  # fmt: skip
    return sorted(found + [name for name in FACTS if ours.facts[name] != theirs.facts[name]])
