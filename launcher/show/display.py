"""What rank 0 shows while training: one line per step, and on a terminal a progress bar below them.

A line is a row of a table, not a list of labels: the eight figures with their labels do not fit 80 columns, and columns
are easier to follow downwards. The heading is repeated now and then.
"""

import math
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from launcher.record.events import StepEvent

MAX_COLUMNS = 80
HEADING_EVERY = 20  # lines
MEDIAN_STEPS = 21  # of the running median of speeds: short enough to follow a change, deaf to one slow step
_COLUMNS = (("loss", 7), ("mtp", 7), ("lr", 8), ("grad", 7), ("load", 6), ("tok/s", 7), ("ETA", 8))
_SUFFIXES = ("", "k", "M", "G", "T", "P")


def compact(value: float | None, width: int = 7) -> str:
    """`value` in at most `width` (at least 6) characters, to about four figures; "-" for None."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if 1e-99 < size < 1e-3 or size >= 10 ** (width - 3):
        return scientific(value, width)
    whole_digits = len(str(int(size))) + (value < 0)
    text = f"{value:.{max(0, min(3, width - whole_digits - 1))}f}"
    return text if len(text) <= width else scientific(value, width)  # 999.9996 grows when it is rounded


def scientific(value: float, width: int = 8) -> str:
    """Like 2.80e-3, with two decimals or as many as `width` leaves; 0 and what is not finite as they are."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = ""
    for digits in (2, 1, 0):
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"  # int: without the padding of e-03
        if len(text) <= width:
            break
    return text


def with_suffix(value: float) -> str:
    """A count or rate in at most 7 characters to three figures: 831, 8.41k, 12.3M, 7.00e19."""
    if not math.isfinite(value):
        return str(value)
    power = 0
    while abs(value) >= 999.5 and power < len(_SUFFIXES) - 1:
        value, power = value / 1000, power + 1
    if abs(value) >= 999.5:
        return scientific(value * 1000.0**power, 7)
    decimals = 0 if abs(value) >= 99.95 or (power == 0 and value == int(value)) else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{decimals}f}{_SUFFIXES[power]}"


def duration(seconds: float) -> str:
    """A time to go in at most 8 characters: 0:07, 2:10, 1:02:10, 3d 04h, 1234d."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days >= 100:
        return f"{days}d" if days < 1_000_000 else "-"
    if days >= 1:
        return f"{days}d {hours % 24:02d}h"
    if hours >= 1:
        return f"{hours}:{minutes % 60:02d}:{whole % 60:02d}"
    return f"{minutes}:{whole % 60:02d}"


def heading(total_steps: int) -> str:
    """The names above the columns of `step_line`."""
    return "step".rjust(_step_width(total_steps)) + "".join(name.rjust(width + 1) for name, width in _COLUMNS)


def step_line(event: StepEvent, *, total_steps: int, eta_seconds: float) -> str:
    """One step as a row of at most 80 columns (steps below ten billion)."""
    cells = (
        compact(event.loss),
        compact(event.mtp_loss),
        scientific(event.lr),
        compact(event.grad_norm),
        compact(event.expert_load_max_over_mean, 6),
        with_suffix(event.tokens_per_second),
        duration(eta_seconds),
    )
    step = f"{event.step}/{total_steps}".rjust(_step_width(total_steps))
    return step + "".join(cell.rjust(width + 1) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def _step_width(total_steps: int) -> int:
    return max(9, 2 * len(str(total_steps)) + 1)


class Display:
    """Shows the steps of a run on `stream` (stdout when None); `live` (None: is it a terminal?) adds the bar.

    Order of calls: start, then step and note as things happen, then close. Also a context manager, which closes.
    """

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None):
        out: TextIO = sys.stdout if stream is None else stream
        self._live = out.isatty() if live is None else live
        self._console = Console(file=out, highlight=False, force_terminal=self._live, soft_wrap=not self._live)
        if self._console.width > MAX_COLUMNS:
            self._console.width = MAX_COLUMNS
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._speeds: deque[float] = deque(maxlen=MEDIAN_STEPS)  # tokens a second
        self._total_steps = 0
        self._lines = 0

    def start(self, total_steps: int, first_step: int = 1, header: Sequence[str] = ()) -> None:
        """Print the header lines and begin; `first_step` is the first to be done now (1 for a run from the start)."""
        self._total_steps = total_steps
        for line in header:
            self.note(line)
        if not self._live:
            return
        self._progress = Progress(
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[eta]}", style="cyan"),
            console=self._console,
            auto_refresh=False,  # no thread beside training; a step redraws it
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=first_step - 1, speed="", eta="")
        self._progress.start()
        self._progress.refresh()

    def step(self, event: StepEvent, *, tokens_left: int) -> None:
        """Show a finished step. tokens_left: of the steps to come, which may be larger than those before."""
        self._speeds.append(event.tokens_per_second)
        speed = statistics.median(self._speeds)
        eta = tokens_left / speed if speed > 0 else math.inf
        if self._lines % HEADING_EVERY == 0:
            self._print(Text(heading(self._total_steps), style="dim"))
        self._lines += 1
        line = step_line(event, total_steps=self._total_steps, eta_seconds=eta)
        self._print(Text(line, style="" if math.isfinite(event.loss) else "bold red"))
        if self._progress is not None:
            speed = f"{with_suffix(event.tokens_per_second)} tok/s"
            self._progress.update(self._task, completed=event.step, speed=speed, eta=f"ETA {duration(eta)}")
            self._progress.refresh()

    def note(self, text: str) -> None:
        """Show a line of text among the steps: a checkpoint, a warning."""
        self._print(Text(text))

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back. May be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, text: Text) -> None:
        self._console.print(text)
        self._console.file.flush()

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
