"""All that a run's folder tells, gathered for the report; works while the run goes on and after it was killed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.record.clock import PHASES
from launcher.record.events import RankEvent, StepEvent, read, read_header, read_rank

MAX_RANK_FILES = 64  # of a large run so many ranks, evenly spread, stand for all


class ReportError(ValueError):
    """A folder of which there is nothing to report; the message names it."""

    user_error = True


@dataclass(frozen=True)
class Split:
    """Seconds a step by phase, mean over the ranks that were read, at one step."""

    step: int
    phases: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """config: as config.yaml holds it, {} where there is none. ranks_read: rank logs, of `ranks_found`."""

    folder: Path
    header: Mapping[str, Any]
    events: Sequence[StepEvent]
    splits: Sequence[Split]
    ranks_read: int
    ranks_found: int
    peak_bytes: int
    faults: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    config_text: str
    heldout: float | None
    checkpoints: Sequence[str]

    @property
    def last(self) -> StepEvent:
        """The newest step."""
        return self.events[-1]

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run, where the configuration is there."""
        return self.config.get("train", {}).get("steps")

    def blocks(self) -> list[str]:
        """Names of the MoE layers in the order of the events: `layer 1`, and `MTP 0` after the last."""
        model = self.config.get("model", {})
        number = len(self.last.expert_load)
        first, layers = model.get("first_k_dense_replace"), model.get("num_hidden_layers")
        if first is None or layers is None:
            return [f"MoE {i}" for i in range(number)]
        moe = max(0, layers - first)
        return [f"layer {first + i}" if i < moe else f"MTP {i - moe}" for i in range(number)]


def read_run(run: Path) -> RunRecord:
    """ReportError, EventError or FileNotFoundError with one line for what cannot be reported."""
    if not run.exists():
        raise ReportError(f"{run}: no such run; give the folder that `expertpipe train` wrote (run_dir)")
    log = run / "events.jsonl" if run.is_dir() else run
    if not log.exists():
        raise ReportError(f"{run}: no events.jsonl in it; give the folder that `expertpipe train` wrote (run_dir)")
    folder, events, header = log.parent, read(log), read_header(log)
    if not events:
        raise ReportError(f"{log}: no step yet")
    text, config = _config(folder / "config.yaml")
    logs, found = _rank_logs(folder)
    return RunRecord(
        folder, header, events, _splits(logs), len(logs), found,
        max((event.peak_bytes for log in logs for event in log), default=0),
        _faults(folder / "faults.jsonl"), config, text, _heldout(folder / "summary.json"),
        sorted(path.name for path in folder.glob("checkpoints/step-*")),
    )  # fmt: skip


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    import yaml

    if not path.exists():
        return "", {}
    text = path.read_text()
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ReportError(f"{path}: not readable: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ReportError(f"{path}: not a configuration")
    return text, tree


def _rank_logs(folder: Path) -> tuple[list[list[RankEvent]], int]:
    paths = sorted(folder.glob("ranks/rank*.events.jsonl"), key=lambda path: (len(path.name), path.name))
    every = max(1, -(-len(paths) // MAX_RANK_FILES))
    logs = [read_rank(path) for path in paths[::every] if path.stat().st_size]
    return [log for log in logs if log], len(paths)


def _splits(logs: Sequence[Sequence[RankEvent]]) -> list[Split]:
    """Of the steps that most ranks have: a rank that was killed first leaves fewer lines."""
    at: dict[int, list[RankEvent]] = {}
    for log in logs:
        for event in log:
            at.setdefault(event.step, []).append(event)
    found = []
    for step, events in sorted(at.items()):
        means = {
            phase: sum(event.phases.get(phase, 0.0) / event.steps for event in events) / len(events) for phase in PHASES
        }
        found.append(Split(step, means))
    return found


def _faults(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break  # a run that was killed while it wrote
            raise ReportError(f"{path}: line {number} is not a JSON object") from error
        found.append(record)
    return found


def _heldout(path: Path) -> float | None:
    """What `expertpipe demo` scored at the end, in nats a token."""
    try:
        value = json.loads(path.read_text())["heldout_nats_per_token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None
