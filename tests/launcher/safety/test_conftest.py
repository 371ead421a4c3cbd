"""The table's own tests: what it prints of failures, and that a process left behind is seen."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.launcher.safety.conftest import PROPERTY, processes_of, rows_of


def test_a_process_that_names_the_folder_is_found(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", str(tmp_path / "run.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        (found,) = processes_of(tmp_path)
        assert found.startswith(f"{process.pid}: ")
    finally:
        process.kill()
        process.communicate()
    assert not processes_of(tmp_path)


def test_the_table_has_what_was_told_and_what_failed() -> None:
    told = SimpleNamespace(nodeid="a::test_x", user_properties=[(PROPERTY, ["kill", "named", "named"]), ("other", 1)])
    plain = SimpleNamespace(nodeid="b::test_y", user_properties=[])
    failed = SimpleNamespace(nodeid="test_fault_table.py::test_z[1]", user_properties=[(PROPERTY, ["z", "", ""])])
    rows = rows_of({"passed": [told, plain], "failed": [failed, plain], "deselected": []})
    assert rows == [["kill", "named", "named"], ["test_z[1]", "", "FAILED"]]
