"""The table of faults at the end of the test run, and no process left behind by any test."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROPERTY = "fault row"
Tell = Callable[[str, str, str], None]


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """tell(fault, expected, seen): a line of the table, which the terminal summary prints."""

    def add(fault: str, expected: str, seen: str) -> None:
        record_property(PROPERTY, [fault, expected, seen])

    return add


def rows_of(stats: dict[str, list[Any]]) -> list[list[str]]:
    """Lines of the table from pytest's reports: those told, and tests of the table that failed or were left out."""
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in stats.get(outcome, []):
            node = getattr(report, "nodeid", "")
            told = [list(value) for name, value in getattr(report, "user_properties", ()) if name == PROPERTY]
            if outcome == "passed":
                rows += told
            elif "test_fault_table" in node:
                rows.append([node.rpartition("::")[2], "", outcome.upper()])
    return rows


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = rows_of(terminalreporter.stats)
    if not rows:
        return
    lines = [["fault", "expected", "seen"], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    terminalreporter.section("faults")
    for fault, expected, seen in lines:
        terminalreporter.write_line(f"{fault:<{widths[0]}}  {expected:<{widths[1]}}  {seen}")


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in words:
                found.append(f"{entry.name}: {words[:200]}")
    return found


@pytest.fixture(autouse=True)
def no_process_is_left(tmp_path: Path) -> Iterator[None]:
    """Every process of a run names its folder; all of them have gone when a test is over, the stopped ones too."""
    yield
    deadline = time.monotonic() + 10
    while (left := processes_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
