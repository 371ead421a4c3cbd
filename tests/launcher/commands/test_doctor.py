"""The table fits a terminal, tells the two projects called apex apart, and its exit code follows the run's needs."""

import importlib
import json
from pathlib import Path

import pytest

from launcher.commands import doctor as module
from launcher.commands.doctor import Row, apex_row, config_rows, disk_row, doctor, examine, print_table, torch_rows
from launcher.config import compose


def test_table_fits_80_columns_and_the_demonstration_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor([])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for name in (
        "torch",
        "CUDA",
        "NCCL",
        "Transf. Engine",
        "NVIDIA apex",
        "megatron-core",
        "deepspeed",
        "DeepEP",
        "Slurm",
    ):
        assert name in text
    for name in ("free port", "disk", "/dev/shm", "cores", "tokenizers", "transformers"):
        assert name in text
    assert lines[-1].startswith("experiment=tiny: all that this run needs is here")


def test_long_words_are_folded(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Row("disk", "FAIL", "q" * 200, "j" * 90), Row("config", "FAIL", "a sentence " * 30 + "x" * 200)]
    print_table(rows, "z" * 100)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert [out.count(letter) for letter in "qjxz"] == [200, 90, 200, 100]
    assert out.count("sentence") == 30


def test_json_and_every_missing_line_has_advice(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor([], as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    for row in report["rows"]:
        assert row["status"] in ("ok", "missing", "note", "FAIL")
        assert row["status"] == "ok" or row["advice"] or row["name"] in ("config", "data"), row


def test_a_wrong_run_exits_1_with_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(["parallel.expert=3", "parallel.pipelin=4"], as_json=True) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    messages = [row["found"] for row in rows if row["name"] == "config" and row["status"] == "FAIL"]
    assert any("parallel.expert=3 does not divide" in message for message in messages)
    assert any("did you mean parallel.pipeline?" in message for message in messages)


def test_an_unreadable_run_still_gets_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(["name=${nothing}", "run_dir=${name}"], as_json=True) == 1
    assert any(row["name"] == "torch" for row in json.loads(capsys.readouterr().out)["rows"])


def test_cuda_is_needed_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    statuses = {needed: {row.name: row.status for row in torch_rows(needed)} for needed in (False, True)}
    assert statuses[False]["CUDA"] == "missing"
    assert statuses[True]["CUDA"] == "FAIL"


def test_missing_data_is_a_note_and_broken_data_a_failure(tmp_path: Path) -> None:
    config = compose(["experiment=tiny", f"data.prefix={tmp_path}/train"])
    rows = {row.name: row for row in config_rows(config)}
    assert rows["config"].status == "ok"
    assert rows["data"].status == "note" and rows["data"].advice.startswith("expertpipe prepare --corpus")
    (tmp_path / "train.json").write_text("{")
    rows = {row.name: row for row in config_rows(config)}
    assert rows["data"].status == "FAIL"


def rows_of_cluster(*words: str) -> list[Row]:
    return list(module.cluster_rows(compose(["experiment=deepseek_v3_2048_h800", *words])))


def test_a_run_that_does_not_fit_its_gpus_is_told_what_would() -> None:
    """The planner's own judgement: all errors, each with a value that works."""
    too_large = rows_of_cluster("train.precision=bf16")
    assert [row.status for row in too_large] == ["FAIL"]
    assert "H800 has 79.1 GiB" in too_large[0].found and "use " in too_large[0].found
    fits = rows_of_cluster("parallel.schedule=1f1b")
    assert [row.status for row in fits] == ["ok"]


def test_several_impossible_things_are_told_at_once() -> None:
    found = rows_of_cluster("parallel.data=127", "parallel.pipeline=15", "parallel.expert=1", "train.precision=fp32")
    said = "\n".join(row.found for row in found)
    assert len(found) == 2 and "one layer takes" in said and "1905 GPUs are not whole nodes" in said


def test_a_run_on_a_cpu_is_not_judged_by_gpus() -> None:
    assert list(module.cluster_rows(compose(["experiment=tiny", "train.device=cpu"]))) == []


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("NVIDIA H200", "fits 2048 H200 by expertpipe plan"),
        ("NVIDIA H100 80GB HBM3", "fits 2048 H100 by expertpipe plan"),
        (
            "NVIDIA GH200 480GB",
            "fits 2048 H800 by expertpipe plan (judged as H800: there is no file for NVIDIA GH200 480GB)",
        ),
        ("", None),
    ],
)
def test_device_auto_is_judged_by_the_gpu_that_it_would_take(
    monkeypatch: pytest.MonkeyPatch, gpu: str, said: str | None
) -> None:
    monkeypatch.setattr(module, "gpu_here", lambda: gpu)
    words = ("train.device=auto", "parallel.schedule=1f1b")
    assert [row.found for row in rows_of_cluster(*words)] == ([said] if said else [])


def test_what_a_run_is_judged_by_where_its_gpu_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpu_here", lambda: "NVIDIA A100-SXM4-80GB")
    (fits,) = rows_of_cluster("parallel.schedule=1f1b")
    assert fits.status == "ok" and "judged as H800" in fits.found and "plan --cluster FILE.yaml" in fits.advice
    (large,) = rows_of_cluster("train.precision=bf16")
    assert large.status == "FAIL" and large.found.endswith(
        "(judged as H800: there is no file for NVIDIA A100-SXM4-80GB)"
    )
    monkeypatch.setattr(module, "gpu_here", lambda: "")
    (fits,) = rows_of_cluster("parallel.schedule=1f1b")
    assert fits.found.endswith("(judged as H800: no GPU is here)")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the head of the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_apex_missing() -> None:
    row = apex_row()
    assert (row.status, "pip install apex` is not it" in row.advice) == ("missing", True)


def test_apex_of_the_registry_is_told_apart(packages: Path) -> None:
    (packages / "apex").mkdir()
    (packages / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    (packages / "apex-0.9.10.dist-info").mkdir()
    (packages / "apex-0.9.10.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
    row = apex_row()
    assert row.status == "note" and "0.9.10 is an unrelated package" in row.found
    assert row.advice.startswith("pip uninstall apex")


def test_apex_of_nvidia_without_and_with_its_extensions(packages: Path) -> None:
    (packages / "apex" / "multi_tensor_apply").mkdir(parents=True)
    (packages / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    assert "without its CUDA extensions" in apex_row().found
    (packages / "amp_C.py").write_text("raise RuntimeError('imported')")
    importlib.invalidate_caches()
    assert apex_row().status == "ok"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert disk_row(tmp_path / "not" / "yet").name == "disk"
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    assert disk_row(tmp_path).status == "FAIL"


def test_examine_without_a_run() -> None:
    names = [row.name for row in examine(None)]
    assert len(names) == len(set(names))
