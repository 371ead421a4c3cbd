"""`expertpipe plan --simulate-cluster`: what it prints, and that whatever is wrong is exit code 1."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.plan import cluster as command
from launcher.plan.inputs import folder

WORDS = ["plan", "experiment=tiny", "--simulate-cluster", "--cluster"]


def test_a_sound_run_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "h100"]) == 0
    text = capsys.readouterr().out
    assert "waits in a circle, memory fits" in " ".join(text.split()) and max(map(len, text.splitlines())) <= 80
    assert main([*WORDS, "h100", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["faults"] == [] and tree["ranks"] == 4
    assert f"{tree['groups']} process groups" in text and f"{tree['dispatcher_groups']} of the dispatchers" in text


def test_memory_that_does_not_fit_is_a_fault(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gpu = (folder() / "h100.yaml").read_text()
    cluster = tmp_path / "small.yaml"
    cluster.write_text(re.sub(r"memory_bytes: \{value: [^,]+", "memory_bytes: {value: 1.55e9", gpu))
    assert main([*WORDS, str(cluster), "--json"]) == 1
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert "would hold" in fault and "has 1.4 GiB" in fault
    assert main([*WORDS, str(cluster)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert fault in text and "memory fits" not in text and "every send" not in text


def test_another_order_of_groups_is_a_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate = command.simulate_cluster

    def planted(job):
        found = simulate(job)
        first, *others = found.records
        wrong = replace(first, groups=(first.groups[1], first.groups[0], *first.groups[2:]))
        return replace(found, records=(wrong, *others))

    monkeypatch.setattr(command, "simulate_cluster", planted)
    assert main([*WORDS, "h100", "--json"]) == 1
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert fault.startswith("rank 0 (pipeline 0, data 0) creates")
