"""The README names every field of both logs, and nothing that is none."""

import re
from dataclasses import fields
from pathlib import Path

from launcher.record import events
from launcher.record.clock import PHASES
from launcher.record.norms import GROUPS


def test_the_readme_documents_every_field() -> None:
    text = Path(events.__file__).with_name("README.md").read_text()
    logs = text[text.index("## The logs") : text.index("## How it is measured")]
    step, rank = logs.split("`ranks/rank<k>.events.jsonl`, a line")
    for part, kind in ((step, events.StepEvent), (rank, events.RankEvent)):
        first = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
        named = set(re.findall(r"`(\w+)`", " ".join(first)))
        assert named == {field.name for field in fields(kind)}
    assert ", ".join(PHASES) in rank and ", ".join(GROUPS) in step
    assert f"`{events.SCHEMA}` or `{events.RANK_SCHEMA}`" in logs
    assert f"`version` ({events.VERSION};" in logs
