"""Samples travel from the FP8 layers of all ranks into the event log and from there into the report and its picture."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.__main__ import main
from launcher.check.run import problems
from launcher.commands.fp8_report import Sample
from launcher.config import compose, to_yaml
from launcher.record.events import EventLog, StepEvent, read
from launcher.report.sections import fp8 as fp8_section
from launcher.step import NonFiniteError
from model.fp8.apply import fp8_linears
from model.fp8.config import FP8Config
from model.transformer import Transformer
from tests.distributed import run_distributed
from tests.launcher.spine import MODEL, config, write_tokens

ROWS = (
    ("layers.0.self_attn.o_proj", "input", 2.0, 0.0, 0.0, 0.027),
    ("layers.3.mlp.experts.down_proj", "gradient", 1e-3, 0.0, 0.25, 0.31),
    ("mtp.0.eh_proj", "weight", 0.1, 0.0, 0.0, 0.026),
)


def event(step: int, **keys: Any) -> StepEvent:
    return StepEvent(
        step=step, tokens=step, loss=1.0, mtp_loss=None, lr=0.1, grad_norm=1.0, tokens_per_second=1.0,
        step_seconds=1.0, expert_load_max_over_mean=1.0, **keys,
    )  # fmt: skip


def log_of(folder: Path, *events: StepEvent) -> Path:
    with EventLog(folder / "events.jsonl") as log:
        for one in events:
            log.append(one)
    return folder


def test_worst_tensor_comes_first_and_nothing_is_wider_than_a_terminal(tmp_path: Path, capsys: Any) -> None:
    run = log_of(tmp_path, event(1), event(2, fp8=ROWS), event(3))
    assert read(run / "events.jsonl")[1].fp8 == ROWS
    assert main(["fp8-report", str(run), "--png"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    worst = out[out.index("worst     ") :].splitlines()[1]
    assert "layers.3.mlp.experts.down_proj" in worst and "3.1e-01" in worst and "2.5e-01" in worst
    assert (run / "fp8.png").read_bytes().startswith(b"\x89PNG")


def test_json_and_a_tensor_that_is_not_finite(tmp_path: Path, capsys: Any) -> None:
    bad = ("layers.1.self_attn.kv_b_proj", "input", math.inf, 0.0, 0.0, math.nan)
    run = log_of(tmp_path, event(2, fp8=(*ROWS, bad)))
    assert main(["fp8-report", str(run), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 4
    assert main(["fp8-report", str(run)]) == 0
    assert "not finite first: input of layers.1.self_attn.kv_b_proj in step 2" in capsys.readouterr().out


def test_a_tensor_that_was_not_in_the_first_sample(tmp_path: Path, capsys: Any) -> None:
    run = log_of(tmp_path, event(1, fp8=ROWS[:1]), event(2, fp8=ROWS), event(3, fp8=ROWS[:1]))
    assert main(["fp8-report", str(run), "--png"]) == 0
    run = log_of(tmp_path / "more", event(1, fp8=ROWS[:1]), event(2, fp8=ROWS))
    assert main(["fp8-report", str(run), "--png"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gradient  ")]
    assert line.split()[1:4] == ["3.10e-01", "3.1e-01", "3.1e-01"]  # its first is that of step 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_sum_over_layers_keeps_what_is_not_finite(order: tuple[int, ...], tmp_path: Path, capsys: Any) -> None:
    rows = [(f"layers.{i}.self_attn.o_proj", "input", amax, 0.0, 0.0, error)
            for i, (amax, error) in enumerate([(math.nan, math.nan), (2.0, 0.027), (3.0, 0.026)])]  # fmt: skip
    run = log_of(tmp_path, event(1, fp8=tuple(rows[i] for i in order)))
    assert main(["fp8-report", str(run)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("input  ")]
    assert line.split()[2] == line.split()[-1] == "inf"


def colours(picture: Path) -> set[tuple[int, int, int]]:
    from matplotlib.image import imread

    return {(int(r * 255), int(g * 255), int(b * 255)) for r, g, b, *_ in imread(picture).reshape(-1, 4)}


def test_what_is_not_finite_has_a_colour_of_its_own(tmp_path: Path) -> None:
    red, first = (255, 0, 0), ROWS[0]
    fine, bad = log_of(tmp_path / "fine", event(1, fp8=ROWS)), (*first[:-1], math.nan)
    broken = log_of(tmp_path / "broken", event(1, fp8=(bad, *ROWS[1:])))
    for run in (fine, broken):
        assert main(["fp8-report", str(run), "--png"]) == 0
    assert red not in colours(fine / "fp8.png") and red in colours(broken / "fp8.png")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_page_lists_what_is_not_finite_first(order: tuple[int, ...]) -> None:
    errors = [math.nan, 0.3, 0.02]
    samples = [Sample(1, f"layers.{i}.self_attn.o_proj", "input", 1.0, 0.0, 0.0, errors[i]) for i in order]
    page = fp8_section(samples)
    places = [page.index(f"<td>layers.{i}.self_attn.o_proj</td>") for i in (0, 1, 2)]
    assert places == sorted(places)


def advice(folder: Path, capsys: Any, *overrides: str) -> str:
    """What the report says of a run of this configuration that has no sample."""
    run = log_of(folder, event(1))
    if overrides:
        (run / "config.yaml").write_text(to_yaml(compose(["experiment=tiny", *overrides])))
    assert main(["fp8-report", str(run)]) == 2
    return capsys.readouterr().err


ENGINE = ("fp8.backend=transformer_engine", "fp8.input_cache=wide", "fp8.attention_cache=wide")
CHOSEN = {
    "unknown": (),
    "bf16": ("train.precision=bf16",),
    "oracle": ("train.precision=fp8",),
    "transformer_engine": ("train.precision=fp8", *ENGINE, "fp8.recompute_swiglu=false"),
    "deep_gemm": ("train.precision=fp8", "fp8.grouped=deep_gemm", "fp8.recompute_swiglu=false"),
}


@pytest.mark.parametrize("chosen", CHOSEN)
def test_without_samples_it_says_what_the_back_end_takes(chosen: str, tmp_path: Path, capsys: Any) -> None:
    line = advice(tmp_path, capsys, *CHOSEN[chosen])
    keys = [word for word in line.split() if re.fullmatch(r"\w+\.\w+=\w+", word)]
    assert {"train.precision=fp8", "fp8.watch_every=10"} <= {*keys}
    assert problems(compose(["experiment=tiny", *CHOSEN[chosen], *keys]), None, with_data=False) == []


def test_a_sample_that_is_not_due_yet(tmp_path: Path, capsys: Any) -> None:
    assert "no FP8 samples yet" in advice(tmp_path, capsys, "train.precision=fp8", "fp8.watch_every=50")


def steps(run_config: Any) -> list[Any]:
    """One rank: samples of two steps, then the message of a step whose third layer has an infinite weight."""
    from launcher.build import build
    from launcher.runtime import process_group
    from launcher.step import train_step

    with process_group(run_config.train) as process:
        run = build(run_config, process)
        found: list[Any] = [train_step(run).fp8, train_step(run).fp8]
        for stage in run.model.stages.values():
            for name, weight in stage.named_parameters():
                if name == "layers.2.self_attn.q_a_layernorm.weight":
                    weight.data[3] = math.inf
        before = [bucket.master.clone() for bucket in run.zero1.buckets]
        with pytest.raises(NonFiniteError) as caught:
            train_step(run)
        same = all(torch.equal(b.master, old) for b, old in zip(run.zero1.buckets, before, strict=True))
        return [*found, str(caught.value), same]


def test_every_rank_has_every_tensor_and_a_bad_step_changes_nothing(tmp_path: Path) -> None:
    base = config(
        write_tokens(str(tmp_path / "tokens")), pipeline=2, expert=1, data=1, schedule="1f1b", layers=(3, 3),
        microbatches=2,
    )  # fmt: skip
    fp8 = FP8Config(native=False, watch_every=2)
    ranks = run_distributed(2, steps, replace(base, train=replace(base.train, precision="fp8"), fp8=fp8))
    names = set(fp8_linears(Transformer(MODEL)))
    for first, second, _, same in ranks:
        assert first is None
        assert {row.layer for row in second} == names and second == ranks[0][1]
        assert same, "weights moved in a step that is not finite"
    assert all("FP8 read" in rank[2] and "input of layers.2.self_attn.q_b_proj" in rank[2] for rank in ranks)
