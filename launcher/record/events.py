"""What happened, step by step, as JSON lines: the one source for the display, the pictures and the summary.

`events.jsonl` has what all ranks together did, `ranks/rank<k>.events.jsonl` what one rank did. The first line is a
header (schema, version, facts of the run), each further line one `StepEvent` or `RankEvent`; `schema.py` says what a
line may hold. A run that was killed leaves at most one torn line, at the end; resuming cuts it off together with the
steps that will be done again.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

SCHEMA, RANK_SCHEMA = "expertpipe-events", "expertpipe-rank-events"
VERSION = 2
# Version 1 had no norms, MFU, biases by layer, dead experts or warnings: its lines lack them and mean the same else.
READABLE = (1, 2)


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
    dropped_tokens: int = 0  # copies of tokens that routers chose an expert for and no expert got; 0 by design, counted
    # per MoE layer: tokens of every expert in this step; empty but every train.expert_counts_every steps
    expert_counts: tuple[tuple[int, ...], ...] = ()
    # per FP8 tensor: layer, which tensor, amax, saturated, underflow, relative error (`model.fp8.watch.TensorStats`);
    # empty but every fp8.watch_every steps
    fp8: tuple[tuple[str | float, ...], ...] = ()
    balance_loss: float = 0.0  # sum over the MoE layers of the mean sequence-wise balance loss, as it enters the loss
    router_bias_ranges: tuple[float, ...] = ()  # per MoE layer: largest minus smallest bias after the step
    dead_experts: tuple[tuple[int, int], ...] = ()  # (block, expert) of every expert without a token in this step
    mfu_causal: float | None = None  # of the peak in the header; attention over the positions that a token sees
    mfu_full: float | None = None  # the same, attention over the whole sequence; MTP and recomputation in neither
    mtp_lambda: float | None = None  # weight of the MTP loss
    bias_speed: float = 0.0  # update of the router biases in this step
    batch: int = 0  # sequences of this step
    # by group of parameters (launcher/record/norms.py), over all ranks: before clipping, and of the FP32 masters before
    # the update; empty but every train.norms_every steps
    grad_norms: dict[str, float] = field(default_factory=dict)
    weight_norms: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # what was out of the ordinary: spikes, experts that collapse


@dataclass(frozen=True)
class RankEvent:
    """What one rank did since its line before: `steps` steps, the last of them `step`, in `seconds` of wall time.

    phases: seconds of this rank's host by phase (launcher/record/clock.py); they add up to `seconds`.
    """

    step: int
    steps: int
    seconds: float
    phases: dict[str, float]
    rows: int  # rows that arrived at this rank's experts
    peak_bytes: int  # most memory so far: of the GPU's allocator, else of the process


SCHEMAS: dict[type, str] = {StepEvent: SCHEMA, RankEvent: RANK_SCHEMA}


class EventError(ValueError):
    """A file that is no event log, or a damaged one; the message names file and line."""

    user_error = True


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


def _value(kind: Any, value: Any) -> Any:
    """A parsed value as its annotation says; numbers that JSON has not came as text."""
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_value(inner[0], item) for item in value)
        return tuple(_value(item_kind, item) for item_kind, item in zip(inner, value, strict=True))
    if get_origin(kind) is dict:
        return {str(key): _value(get_args(kind)[1], item) for key, item in value.items()}
    if kind in (int, float, str):
        return kind(value)
    if type(None) in get_args(kind):
        return None if value is None else _value(next(arg for arg in get_args(kind) if arg is not type(None)), value)
    return value


def _event(record: Mapping[str, Any], kind: type = StepEvent) -> Any:
    """An event from a parsed line; keys of a later version are passed over, a missing one without default: KeyError."""
    hints, values = get_type_hints(kind), {}
    for item in fields(kind):
        if item.name in record:
            values[item.name] = _value(hints[item.name], record[item.name])
        elif item.default is MISSING and item.default_factory is MISSING:
            raise KeyError(item.name)
    if kind is StepEvent:  # its first two figures are names
        rows = values.get("fp8", ())
        values["fp8"] = tuple((str(row[0]), str(row[1]), *map(float, row[2:])) for row in rows)
    return kind(**values)


def _check_header(record: Any, path: Path, schema: str = SCHEMA) -> dict[str, Any]:
    if not isinstance(record, dict) or record.get("schema") != schema:
        raise EventError(f"{path}: line 1 is not the header of an event log ({schema})")
    if record.get("version") not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise EventError(f"{path}: event log of version {record.get('version')}, this program reads {known}")
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
                    raise EventError(f"{path}: line {number} is not a JSON object")
                return
            yield number, end, record


def read_header(path: Path | str) -> dict[str, Any]:
    """The header of an event log: schema, version and the run's facts. ValueError when there is none."""
    path = Path(path)
    for _, _, record in _whole_lines(path):
        return _check_header(record, path)
    raise EventError(f"{path}: line 1 is not the header of an event log ({SCHEMA})")


def _numbered_events(path: Path, kind: type = StepEvent) -> Iterator[tuple[int, Any]]:
    """(offset of the end, event) for each whole line after the header."""
    for number, end, record in _whole_lines(path):
        if number == 1:
            _check_header(record, path, SCHEMAS[kind])
            continue
        try:
            event = _event(record, kind)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = "a step event" if kind is StepEvent else "an event of a rank"
            raise EventError(f"{path}: line {number} is not {what}: {error!r}") from error
        yield end, event


def read(path: Path | str) -> list[StepEvent]:
    """All events of a log, oldest first; a torn last line is passed over.

    FileNotFoundError without a file; EventError for another kind of file, another version, or damage before the end.
    """
    return [event for _, event in _numbered_events(Path(path))]


def read_rank(path: Path | str) -> list[RankEvent]:
    """All events of one rank's log, as `read`."""
    return [event for _, event in _numbered_events(Path(path), RankEvent)]


def rank_log_path(run_dir: Path | str, rank: int) -> Path:
    """Where the log of one rank lies."""
    return Path(run_dir) / "ranks" / f"rank{rank}.events.jsonl"


class EventLog:
    """Appends one line per step to `path`, handed to the kernel at once, so that a killed process loses none.

    Without `resume_step` a new log begins, and an older one stays beside it as `<name>.previous`. With `resume_step`
    (the last step that counts, that of the checkpoint) the log goes on: later events and a torn line are cut off.
    `facts` go into the header of a new log. kind: of the events. EventError when the log to resume is damaged or of
    another version.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        facts: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        kind: type = StepEvent,
    ):
        self.path, self.kind = Path(path), kind
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep_bytes = 0
        if self.path.exists():
            if resume_step is None:
                os.replace(self.path, self.path.with_name(self.path.name + ".previous"))
            else:
                keep_bytes = _bytes_up_to(self.path, resume_step, kind)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (held until close)
        self._file.truncate(keep_bytes)
        if keep_bytes == 0:
            self._file.write(_line({**(facts or {}), "schema": SCHEMAS[kind], "version": VERSION}))

    def append(self, event: StepEvent | RankEvent) -> None:
        """Write one event."""
        self._file.write(_line(asdict(event)))

    def close(self) -> None:
        """Close the file; nothing is pending."""
        self._file.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _bytes_up_to(path: Path, last_step: int, kind: type) -> int:
    """Length of the part of a log that ends with `last_step`; 0 when not even the header is whole."""
    keep = next((end for _, end, _ in _whole_lines(path)), 0)  # the header's end
    for end, event in _numbered_events(path, kind):
        if event.step > last_step:
            break
        keep = end
    return keep
