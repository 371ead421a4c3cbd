"""What happened, step by step, as JSON lines: the one source for the display, the pictures and the summary.

The first line is a header (schema, version, facts of the run), each further line one `StepEvent`. A run that was killed
leaves at most one torn line, at the end; resuming cuts it off together with the steps that will be done again.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SCHEMA = "expertpipe-events"
VERSION = 1


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step, over all ranks. Losses are means in nats per token."""

    step: int  # counted from 1
    tokens: int  # seen since the start of training, this step included
    loss: float
    mtp_loss: float | None  # mean over the depths of multi-token prediction; None without it
    lr: float
    grad_norm: float  # before clipping
    tokens_per_second: float
    step_seconds: float
    expert_load_max_over_mean: float  # the worst layer of expert_load; 1 is perfect balance
    expert_load: tuple[float, ...] = ()  # per MoE layer: tokens of the busiest expert over the mean
    router_bias_range: float = 0.0  # largest max - min of a layer's router bias
    dropped_tokens: int = 0  # always 0 by design; written so that a reader can check it
    # per MoE layer: tokens of every expert in this step; empty but every train.expert_counts_every steps
    expert_counts: tuple[tuple[int, ...], ...] = ()
    # per FP8 tensor: layer, which tensor, amax, saturated, underflow, relative error (`model.fp8.watch.TensorStats`);
    # empty but every fp8.watch_every steps
    fp8: tuple[tuple[str | float, ...], ...] = ()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity; as strings they survive every JSON reader, and float() takes them back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(record), allow_nan=False).encode() + b"\n"


def _event(record: Mapping[str, Any]) -> StepEvent:
    """A StepEvent from a parsed line; keys of a later version are passed over, a missing key raises KeyError."""
    values: dict[str, Any] = {}
    for field in fields(StepEvent):
        if field.name == "expert_counts":  # logs of earlier versions have none
            values[field.name] = tuple(tuple(map(int, row)) for row in record.get(field.name, ()))
            continue
        if field.name == "fp8":
            rows = record.get(field.name, ())
            values[field.name] = tuple((str(row[0]), str(row[1]), *map(float, row[2:])) for row in rows)
            continue
        value = record[field.name]
        if field.name == "expert_load":
            value = tuple(float(item) for item in value)
        elif field.type is int:
            value = int(value)
        elif value is not None:
            value = float(value)
        values[field.name] = value
    return StepEvent(**values)


def _check_header(record: Any, path: Path) -> dict[str, Any]:
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: line 1 is not the header of an event log")
    if record.get("version") != VERSION:
        raise ValueError(f"{path}: event log of version {record.get('version')}, this program reads {VERSION}")
    return record


def _whole_lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line number, offset of the line's end in bytes, record) of each line up to a torn one at the end.

    Raises ValueError for a broken line that is not the last, which no kill can leave behind.
    """
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            end += len(line)
            try:
                record = json.loads(line)
                whole = line.endswith(b"\n") and isinstance(record, dict)
            except ValueError:
                record, whole = {}, False
            if not whole:
                if file.read(1):
                    raise ValueError(f"{path}: line {number} is not a JSON object")
                return
            yield number, end, record


def read_header(path: Path | str) -> dict[str, Any]:
    """The header of an event log: schema, version and the run's facts. ValueError when there is none."""
    path = Path(path)
    for _, _, record in _whole_lines(path):
        return _check_header(record, path)
    raise ValueError(f"{path}: line 1 is not the header of an event log")


def _numbered_events(path: Path) -> Iterator[tuple[int, StepEvent]]:
    """(offset of the end, event) for each whole line after the header."""
    for number, end, record in _whole_lines(path):
        if number == 1:
            _check_header(record, path)
            continue
        try:
            event = _event(record)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: line {number} is not a step event: {error!r}") from error
        yield end, event


def read(path: Path | str) -> list[StepEvent]:
    """All events of a log, oldest first; a torn last line is passed over.

    FileNotFoundError without a file; ValueError for another kind of file, another version, or damage before the end.
    """
    return [event for _, event in _numbered_events(Path(path))]


class EventLog:
    """Appends one line per step to `path`, handed to the kernel at once, so that a killed process loses none.

    Without `resume_step` a new log begins, and an older one stays beside it as `<name>.previous`. With `resume_step`
    (the last step that counts, that of the checkpoint) the log goes on: later events and a torn line are cut off.
    `facts` go into the header of a new log. ValueError when the log to resume is damaged or of another version.
    """

    def __init__(self, path: Path | str, *, facts: Mapping[str, Any] | None = None, resume_step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep_bytes = 0
        if self.path.exists():
            if resume_step is None:
                os.replace(self.path, self.path.with_name(self.path.name + ".previous"))
            else:
                keep_bytes = _bytes_up_to(self.path, resume_step)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held until close)
        self._file.truncate(keep_bytes)
        if keep_bytes == 0:
            self._file.write(_line({**(facts or {}), "schema": SCHEMA, "version": VERSION}))

    def append(self, event: StepEvent) -> None:
        """Write one event."""
        self._file.write(_line(asdict(event)))

    def close(self) -> None:
        """Close the file; nothing is pending."""
        self._file.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _bytes_up_to(path: Path, last_step: int) -> int:
    """Length of the part of a log that ends with `last_step`; 0 when not even the header is whole."""
    keep = next((end for _, end, _ in _whole_lines(path)), 0)  # the header's end
    for end, event in _numbered_events(path):
        if event.step > last_step:
            break
        keep = end
    return keep
