"""`expertpipe recipe`: the report's values at its boundaries, the runs that follow, text of 80 columns, a picture."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.__main__ import main
from launcher.config import compose
from launcher.recipe import boundary_tokens, phase_of, phases, values_at


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["recipe", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    from launcher.commands.recipe import as_dict

    return {phase.name: as_dict(phase) for phase in phases(compose(["experiment=deepseek_v3"]))}


def test_the_report_has_three_phases_one_after_the_other(report: dict[str, Any]) -> None:
    assert list(report) == ["deepseek_v3", "deepseek_v3_32k", "deepseek_v3_128k"]
    first, second, third = report.values()
    assert second["first_tokens"] == first["tokens"] and third["first_tokens"] == first["tokens"] + second["tokens"]
    assert (second["tokens"], third["tokens"]) == (1000 * 1920 * 32768, 1000 * 480 * 131072)
    assert second["init_from"] == "runs/deepseek_v3" and first["init_from"] is None


def test_hours_of_pretraining_are_the_reports(report: dict[str, Any]) -> None:
    assert report["deepseek_v3"]["h800_hours"] == pytest.approx(2664e3, rel=1e-5)
    # equal tokens, longer attention
    assert report["deepseek_v3_128k"]["h800_hours"] > report["deepseek_v3_32k"]["h800_hours"] > 0.0629 * 180e3


def test_hours_count_every_phase_at_its_own_length() -> None:
    """Half of the tokens at 4K, half at 32K: as much as the two halves alone."""
    step = 3072 * 4096
    words = ["experiment=deepseek_v3", "model.max_position_embeddings=32768", "train.global_batch_size=3072"]

    def hours(*more: str) -> float:
        return phase_of(compose([*words, *more])).h800_hours

    phases = f"data.phases=[{{from_tokens: {800 * step}, sequence_length: 32768}}]"
    short, long = hours("train.steps=800"), hours("train.steps=100", "data.sequence_length=32768")
    assert hours("train.steps=900", phases) == pytest.approx(short + long, rel=1e-12)
    assert long > 1.2 * short


def test_every_value_of_the_report_at_its_boundary(report: dict[str, Any]) -> None:
    keys = ("tokens", "lr", "batch", "mtp_lambda", "bias_update_speed", "fim_rate")
    rows = [tuple(values[key] for key in keys) for values in report["deepseek_v3"]["boundaries"]]
    assert rows == [
        (0, 0.0, 3072, 0.3, 1e-3, 0.1),
        (25_165_824_000, 2.2e-4, 3072, 0.3, 1e-3, 0.1),
        (469_000_000_000, 2.2e-4, 15360, 0.3, 1e-3, 0.1),
        (10_000_000_000_000, 2.2e-4, 15360, 0.1, 1e-3, 0.1),
        (14_300_000_000_000, 2.2e-5, 15360, 0.1, 0.0, 0.1),
        (14_633_000_000_000, 7.3e-6, 15360, 0.1, 0.0, 0.1),
        (14_800_000_000_000, 7.3e-6, 15360, 0.1, 0.0, 0.1),
        (report["deepseek_v3"]["tokens"], 7.3e-6, 15360, 0.1, 0.0, 0.1),
    ]


def test_a_token_before_a_boundary_the_old_values_hold() -> None:
    config = compose(["experiment=deepseek_v3"])
    before = [values_at(config, tokens - 1) for tokens in boundary_tokens(config, 14_700 * 10**9)[1:-1]]
    assert [values.batch for values in before] == [3072, 15360 - 512, 15360, 15360, 15360]
    assert [values.mtp_lambda for values in before] == [0.3, 0.3, 0.3, 0.1, 0.1]
    assert [values.bias_update_speed for values in before] == [1e-3, 1e-3, 1e-3, 1e-3, 0.0]
    assert before[0].lr < 2.2e-4 and before[4].lr == 2.2e-5


def test_the_step_of_a_boundary_is_the_first_that_begins_there_or_later() -> None:
    config = compose(["experiment=demo"])
    assert values_at(config, 0).step == 1
    assert values_at(config, 393_216).step == 97  # 96 steps of 16 x 256
    assert values_at(config, 393_217).step == 98
    assert phase_of(config).boundaries[-1].step == config.train.steps + 1


def test_text_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "experiment=deepseek_v3")
    assert max(map(len, text.splitlines())) <= 80
    assert "deepseek_v3: 14,800,021,094,400 tokens, 244,586 steps, 2,664K H800-hours" in text
    assert "\n    469,000,000,000    16,802  2.20e-04  15,360    4,096   0.3   0.001    0.1\n" in text
    assert "begins with the newest checkpoint of runs/deepseek_v3_32k" in text


def test_json_holds_every_level_of_the_ramp(capsys: pytest.CaptureFixture[str]) -> None:
    (phase,) = json.loads(run(capsys, "experiment=demo", "--json"))["phases"]
    assert [level["batch"] for level in phase["batch_levels"]] == [16, 20, 24, 28, 32]
    assert phase["boundaries"][0]["fim_rate"] is None  # as the data was prepared


def test_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(capsys, "experiment=demo", "--png", str(tmp_path / "new" / "recipe.png"))
    assert (tmp_path / "new" / "recipe.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_without_a_name_lies_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "experiment=demo", "--png").endswith("\nrecipe.png\n")
    assert (tmp_path / "recipe.png").read_bytes()[:4] == b"\x89PNG"


def test_an_override_is_no_name_of_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--png", "experiment=demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--png experiment=demo: an override, not a file: write --png recipe.png experiment=demo")


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "experiment=deepseek_v3", "train.batch_multiple=100"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.batch_multiple=100 is not divisible by" in line and "use 128" in line
