import json

import pytest

from launcher.__main__ import main
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
