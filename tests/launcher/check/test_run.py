"""Every rule fires, names key, value and remedy, and its remedy works."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest

import data.check
from launcher.check import run as check
from launcher.check.run import checked, problems
from launcher.config import ConfigError, RunConfig, choices, compose

TINY = ["experiment=tiny", "train.device=cpu"]


def found(*overrides: str, world_size: int | None = None) -> list[str]:
    return problems(compose([*TINY, *overrides]), world_size, with_data=False)


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_is_clean(experiment: str) -> None:
    assert problems(compose([f"experiment={experiment}"]), None, with_data=False, here=False) == []


def test_defaults_are_clean() -> None:
    assert problems(compose([]), None, with_data=False) == []


CASES = [
    ("train.steps=0", "train.steps=0: use 1 or more", "train.steps=1"),
    ("train.keep_checkpoints=1", "train.keep_checkpoints=1: use 2 or more", "train.keep_checkpoints=2"),
    ("train.threads=-1", "train.threads=-1: use 0 or more", "train.threads=0"),
    ("model.vocab_size=-5", "model.vocab_size=-5: use 1 or more", "model.vocab_size=1"),
    ("parallel.expert=0", "parallel.expert=0: use 1 or more", "parallel.expert=1"),
    ("optim.beta1=1.0", "optim.beta1=1: use a number at least 0 and below 1, such as 0.9", "optim.beta1=0.9"),
    ("optim.beta2=-0.1", "optim.beta2=-0.1: use a number at least 0", "optim.beta2=0.95"),
    ("optim.eps=0", "optim.eps=0: use a number between 0 and 1, such as 1e-8", "optim.eps=1e-8"),
    ("optim.weight_decay=-1", "optim.weight_decay=-1: use a number 0 or more", "optim.weight_decay=0"),
    ("optim.clip_norm=0", "optim.clip_norm=0: use a number above 0", "optim.clip_norm=inf"),
    ("model.rope_theta=1", "model.rope_theta=1: use a number above 1", "model.rope_theta=10000"),
    ("parallel.schedule=zigzag", "parallel.schedule=zigzag: use gpipe, 1f1b,", "parallel.schedule=gpipe"),
    ("parallel.dispatcher=x", "parallel.dispatcher=x: use flat", "parallel.dispatcher=flat"),
    ("optim.moments=fp16", "optim.moments=fp16: use bf16 or fp32", "optim.moments=fp32"),
    ("train.precision=fp16", "train.precision=fp16: use bf16, fp32 or fp8", "train.precision=bf16"),
    ("train.device=tpu", "train.device=tpu: use auto, cpu or cuda", "train.device=auto"),
    ("model.mtp_hidden=x", "model.mtp_hidden=x: use after_norm or before_norm", "model.mtp_hidden=before_norm"),
    ("name=' '", "name='': use a name", "name=a"),
    ("optim.lr=[]", "optim.lr=[]: use at least one segment", "optim.lr=[{shape: constant, value: 1e-3}]"),
    ("optim.lr.0.shape=line", "optim.lr.0.shape=line: use constant, linear or cosine", "optim.lr.0.shape=linear"),
    ("optim.lr.0.value=3", "optim.lr.0.value=3: use a number from 0 to 1", "optim.lr.0.value=1"),
    (
        "optim.mtp_lambda.0.value=inf",
        "optim.mtp_lambda.0.value=inf: use a number from 0 or more",
        "optim.mtp_lambda.0.value=3",
    ),
    ("optim.lr.0.tokens=0", "optim.lr.0.tokens=0: use a number of tokens above 0", "optim.lr.0.tokens=1e9"),
    ("optim.lr.1.tokens=inf", "optim.lr.1.tokens=inf: a cosine segment must end", "optim.lr.1.tokens=1e9"),
    ("optim.mtp_lambda.0.tokens=inf", "the segments after it never begin", "optim.mtp_lambda.0.tokens=1e9"),
    (
        "model.n_group=3",
        "model.n_group=3 does not divide model.n_routed_experts=8: use 1, 2, 4 or 8",
        "model.n_group=2",
    ),
    ("model.n_group=8", "leaves one expert a group", "model.n_group=4"),
    ("model.topk_group=5", "model.topk_group=5 is more than model.n_group=4: use 4 or fewer", "model.topk_group=4"),
    (
        "model.num_experts_per_tok=5",
        "model.num_experts_per_tok=5 is more than the 4 experts in model.topk_group=2 groups of 2: use 4 or fewer",
        "model.num_experts_per_tok=4",
    ),
    (
        "model.first_k_dense_replace=7",
        "model.first_k_dense_replace=7 is more than model.num_hidden_layers=6: use 6 or fewer",
        "model.first_k_dense_replace=6",
    ),
    (
        "model.qk_rope_head_dim=15",
        "model.qk_rope_head_dim=15 is odd, rotation takes pairs: use 16",
        "model.qk_rope_head_dim=16",
    ),
    (
        "model.rope_scaling={factor: 4, original_max_position_embeddings: 64, beta_fast: 1}",
        "model.rope_scaling.beta_fast=1 is not above model.rope_scaling.beta_slow=1",
        "model.rope_scaling={factor: 4, original_max_position_embeddings: 64}",
    ),
    (
        "data.sequence_length=512",
        "data.sequence_length=512 is more than model.max_position_embeddings=256: use 256 or less",
        "data.sequence_length=256",
    ),
    ("data.sequence_length=1", "data.sequence_length=1 has no token left to predict", "data.sequence_length=2"),
    (
        "parallel.expert=3",
        "parallel.expert=3 does not divide model.n_routed_experts=8: use 1 or 2",
        "parallel.expert=2",
    ),
    ("parallel.expert=4", "parallel.expert=4 does not divide parallel.data=2: use 1 or 2", "parallel.expert=1"),
    (
        "train.global_batch_size=37",
        "train.global_batch_size=37 is not divisible by train.micro_batch_size=2 * parallel.data=2 = 4: use 36 or 40",
        "train.global_batch_size=40",
    ),
    (
        "parallel.stages_per_rank=2",
        "dualpipe has 1 stage a rank, not 2: use 1, or interleaved",
        "parallel.stages_per_rank=1",
    ),
    ("parallel.schedule=nowhere.csv", "nowhere.csv: No such file", "parallel.schedule=zb1p"),
    ("parallel.pipeline=3", "parallel.schedule=dualpipe with parallel.pipeline=3", "parallel.pipeline=4"),
    (
        "parallel.pipeline=7",
        "parallel.pipeline=7 is more than model.num_hidden_layers=6, and each stage needs a layer: use 6 or fewer",
        "parallel.pipeline=4",
    ),
    (
        "parallel.layers_per_stage=[6]",
        "has 1 numbers for parallel.pipeline=2 stages: use [3,3]",
        "parallel.layers_per_stage=[3,3]",
    ),
    ("parallel.layers_per_stage=[3,4]", "adds up to 7, model.num_hidden_layers=6", "parallel.layers_per_stage=[2,4]"),
    ("parallel.layers_per_stage=[6,0]", "leaves a stage without a layer: use [3,3]", "parallel.layers_per_stage=[5,1]"),
]


@pytest.mark.parametrize(("override", "message", "remedy"), CASES, ids=[case[0].split(":")[0] for case in CASES])
def test_rule_fires_and_its_remedy_works(override: str, message: str, remedy: str) -> None:
    messages = found(override)
    assert any(message in text for text in messages), messages
    assert len(messages) <= 2
    assert found(remedy) == []


@pytest.mark.parametrize(
    ("overrides", "message", "remedies"),
    [
        (
            "parallel.schedule=zbv parallel.pipeline=4",
            "has 2 stages a rank, 8 in all, and each needs one of model.num_hidden_layers=6: "
            "use parallel.pipeline=3 or parallel.schedule=1f1b",
            ["parallel.schedule=zbv parallel.pipeline=3", "parallel.schedule=1f1b parallel.pipeline=4"],
        ),
        (
            "parallel.schedule=interleaved parallel.stages_per_rank=4",
            "use parallel.pipeline=1, parallel.stages_per_rank=3 or parallel.schedule=1f1b",
            ["parallel.schedule=interleaved parallel.stages_per_rank=3"],
        ),
        (
            "parallel.schedule=dualpipev parallel.layers_per_stage=[3,3]",
            "has 2 numbers for the 4 stages of parallel.schedule=dualpipev on 2 ranks: use [2,2,1,1]",
            ["parallel.schedule=dualpipev parallel.layers_per_stage=[2,2,1,1]"],
        ),
    ],
)
def test_schedules_with_several_stages_a_rank_say_what_fits(overrides: str, message: str, remedies: list[str]) -> None:
    (found_message,) = found(*overrides.split())
    assert message in found_message
    for remedy in remedies:
        assert found(*remedy.split()) == []


@pytest.mark.parametrize("batch", [4, 12, 20, 28, 36])
def test_dualpipe_takes_any_number_of_micro_batches(batch: int) -> None:
    assert found(f"train.global_batch_size={batch}") == []


def test_one_group_of_one_expert_is_no_group() -> None:
    assert not found("model.n_group=1", "model.topk_group=1", "model.num_experts_per_tok=8")


def test_world_size_names_both_numbers_and_the_layouts_that_fit() -> None:
    assert found(world_size=4) == []
    (message,) = found(world_size=8)
    assert message.startswith(
        "8 processes were started, parallel.pipeline=2 * parallel.data=2 needs 4: start 4, or set "
    )
    assert "parallel.pipeline=4 parallel.data=2" in message
    assert "parallel.pipeline=8" not in message  # six layers
    for layout in ("parallel.pipeline=4 parallel.data=2", "parallel.pipeline=2 parallel.data=4"):
        assert layout in message and found(*layout.split(), world_size=8) == []
    (message,) = found(world_size=7)
    assert message.endswith("start 4")


def test_cuda_needs_a_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "torch_cuda", lambda: None)
    (message,) = found("train.device=cuda")
    assert message.startswith("train.device=cuda, but") and "train.device=cpu" in message
    monkeypatch.setattr(check, "torch_cuda", lambda: "12.9")
    assert found("train.device=cuda") == []


def test_missing_data_comes_with_the_command(tmp_path: Path) -> None:
    config = compose([*TINY, f"data.prefix={tmp_path}/full/train"])
    (message,) = problems(config, None)
    assert f"data.prefix={tmp_path}/full/train: no " in message
    assert f"expertpipe prepare --corpus full --vocab-size 4096 --out {tmp_path}/full" in message


@pytest.mark.parametrize(
    ("problem", "start"),
    [
        ("x.bin: byte 3: truncated", "data.prefix="),
        ("the model's vocab_size is 4096; set vocab_size to at least 5000", "model.vocab_size=4096: "),
        ("one window needs 257; use a shorter sequence_length", "data.sequence_length=256: "),
    ],
)
def test_data_problems_name_their_key(
    problem: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.idx").touch()
    monkeypatch.setattr(data.check, "problems", lambda *args: [problem])
    (message,) = problems(compose([*TINY, f"data.prefix={tmp_path}/train"]), None)
    assert message.startswith(start) and message.endswith(problem)


def test_checked_reports_composition_and_rules_together() -> None:
    with pytest.raises(ConfigError) as caught:
        checked([*TINY, "parallel.pipelin=3", "train.steps=ten", "parallel.expert=3", "data.prefix=nowhere/train"])
    text = "\n".join(caught.value.errors)
    for part in ("did you mean parallel.pipeline?", "train.steps=ten", "parallel.expert=3 does not", "nowhere/train"):
        assert part in text


def test_checked_says_nothing_on_values_that_were_not_given() -> None:
    with pytest.raises(ConfigError) as caught:
        checked([*TINY, "parallel.pipeline=four", "model.num_hidden_layers=1"], with_data=False)
    assert caught.value.errors == ["parallel.pipeline=four: expected a whole number"]


HUGE: list[dict[str, Any]] = [
    {"parallel": {"pipeline": 10**6, "data": 10**6}},
    {"train": {"global_batch_size": 10**12 + 8}},
    {"train": {"global_batch_size": 10**12 + 1}},
    {"model": {"n_routed_experts": 10**9 + 7}},
]


@pytest.mark.parametrize("change", HUGE, ids=[str(change) for change in HUGE])
def test_huge_numbers_are_judged_quickly(change: dict[str, Any]) -> None:
    config: RunConfig = compose(TINY)
    for section, values in change.items():
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    start = time.perf_counter()
    assert problems(config, 64, with_data=False)
    assert time.perf_counter() - start < 3
