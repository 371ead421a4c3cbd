import json
from pathlib import Path
from typing import Any

import pytest

from launcher.__main__ import main
from launcher.bench.command import SUBJECTS
from launcher.plan.inputs import CALIBRATION, folder
from parallel.plan.calibration import read
from parallel.plan.hardware import HardwareError
from parallel.plan.hardware import read as read_hardware
from parallel.plan.kernels import CLASSES


def test_a_cpu_writes_a_cluster_and_a_calibration_that_plan_takes(tmp_path, capsys):
    out = tmp_path / "k.json"
    assert main(["bench", "kernels", "--device", "cpu", "--repeats", "1", "--out", str(out), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = {row["kind"] for row in rows}
    assert kinds == set(CLASSES) - {"dispatch", "combine"}  # which need other ranks
    tree = json.loads(out.read_text())
    for kind in kinds:
        mine = [row for row in rows if row["kind"] == kind]
        ratio = sum(row["seconds"] for row in mine) / sum(row["predicted"] for row in mine)
        assert tree["factors"][kind] == pytest.approx(ratio, abs=1e-4)
    hardware = read_hardware(tmp_path / "k.cluster.yaml")
    assert hardware.name == "CPU" and hardware.bf16_flops > 1e9
    tree["factors"] = dict.fromkeys(kinds, 2.0)  # a busy machine's may be refused
    out.write_text(json.dumps(tree))
    words = ["experiment=tiny", "--precision", "fp32", "--cluster", str(tmp_path / "k.cluster.yaml")]
    seconds = []
    for calibration in ("none", str(out)):
        assert main(["plan", *words, "--calibration", calibration, "--json"]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["step_seconds"])
    assert seconds[1] > 1.2 * seconds[0]


def test_a_trace_gives_the_committed_calibration(tmp_path, capsys):
    committed = folder() / "calibration" / CALIBRATION
    trace = Path(__file__).parents[4] / "shared" / "data" / CALIBRATION
    if not trace.exists():
        pytest.skip(f"{trace} is not here: the committed calibration was not made again")
    out, source = tmp_path / "k.json", json.loads(committed.read_text())["source"]
    words = ["bench", "kernels", "--trace", str(trace), "--cluster", "h800", "--out", str(out)]
    assert main([*words, "--source", source, "--json"]) == 0
    assert out.read_text() == committed.read_text()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["kind"] for row in rows} == set(CLASSES)
    assert main([*words, "experiment=tiny"]) == 2
    assert "not a trace of one overlapped pair" in capsys.readouterr().err


def test_a_run_without_a_trace_is_a_mistake(capsys):
    assert main(["bench", "kernels", "experiment=tiny"]) == 2
    assert capsys.readouterr().err == "expertpipe: experiment=tiny: a run goes with --trace, whose layers it has\n"


def test_under_torchrun_every_rank_times_its_own_gpu(monkeypatch):
    """The device is the current one before anything is timed, as events and random numbers go by that."""
    import torch

    from launcher.bench.kernels import _device

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert _device("cpu") == torch.device("cpu") and chosen == []
    assert _device("auto") == torch.device("cuda", 3) and chosen == [torch.device("cuda", 3)]


def test_the_timed_quantisation_gives_the_bits_of_the_definition():
    import torch

    from launcher.bench.kernels import _quantising
    from parallel.expert.wire import QUANTISER

    x = torch.randn(8, 256)
    found: Any = _quantising(x)()
    wanted = QUANTISER.quantise(x)
    assert torch.equal(found.values.view(torch.uint8), wanted.values.view(torch.uint8))
    assert torch.equal(found.scales, wanted.scales)


def test_help_names_every_subject(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(subject in said for subject in SUBJECTS)


def test_factors_of_another_machine_are_refused(tmp_path):
    path = tmp_path / "k.json"
    path.write_text(json.dumps({"factors": {"norm": 200.0}}))
    with pytest.raises(HardwareError, match=r"norm 200 times the prediction: measured on another machine"):
        read(path)


def test_a_gpu_that_is_not_there(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "kernels", "--device", "cuda"]) == 2
    assert "no usable GPU here" in capsys.readouterr().out
