"""Composition: values arrive typed, and every mistake is found in one go."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import configs
from launcher.config import (
    ConfigError,
    RunConfig,
    choices,
    compose,
    convert,
    draft,
    from_dict,
    known_keys,
    to_dict,
    to_yaml,
)
from model.config import RopeScaling


def errors_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(list(overrides))
    return caught.value.errors


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes_and_survives_json_and_yaml(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    assert from_dict(to_dict(config)) == config
    assert from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False))) == config
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("group", ["model", "parallel", "optim", "data"])
def test_every_choice_composes_and_says_every_value(group: str) -> None:
    for choice in choices(group):
        section = getattr(compose([f"{group}={choice}"]), group)
        text = (Path(configs.__file__).parent / group / f"{choice}.yaml").read_text()
        assert set(yaml.safe_load(text)) == {field.name for field in fields(section)}, choice


def test_tiny_is_what_the_demonstration_needs() -> None:
    config = compose(["experiment=tiny"])
    assert (config.parallel.world_size, config.parallel.schedule, config.num_microbatches) == (4, "dualpipe", 8)
    assert config.run_dir == "runs/tiny"
    assert config.optim.lr[0].shape == "linear"


def test_671b_is_the_report() -> None:
    model = compose(["model=671b"]).model
    assert (model.num_hidden_layers, model.hidden_size, model.n_routed_experts, model.vocab_size) == (
        61,
        7168,
        256,
        129280,
    )
    assert (model.aux_loss_alpha, model.initializer_range, model.rope_scaling) == (1e-4, 0.006, None)


def test_deepseek_v3_schedule_ends_at_14_8_trillion_tokens() -> None:
    optim = compose(["experiment=deepseek_v3_2048_h800"]).optim
    ends = [sum(segment.tokens for segment in optim.lr[: i + 1]) for i in range(len(optim.lr))]
    assert ends[1:] == [10e12, 14.3e12, 14.633e12, 14.8e12]
    assert optim.bias_update_speed[0].tokens == 14.3e12


def test_overrides_are_typed() -> None:
    config = compose(
        [
            "train.steps=1e2",
            "optim.lr.0.value=2.2e-4",
            "optim.mtp_lambda=[{shape: constant, value: 1, tokens: '1e12'}]",
            "parallel.layers_per_stage=[6]",
            "model.q_lora_rank=null",
            "model.norm_topk_prob=False",
            "name=123",
            "+train.threads=3",
            "model.rope_scaling.factor=40",
            "model.rope_scaling.original_max_position_embeddings=4096",
            "run_dir='/a b/c=d'",
        ]
    )
    assert config.train.steps == 100 and isinstance(config.train.steps, int)
    assert config.optim.lr[0].value == 2.2e-4
    assert config.optim.mtp_lambda[0].tokens == 1e12
    assert config.parallel.layers_per_stage == (6,)
    assert config.model.q_lora_rank is None
    assert config.model.norm_topk_prob is False
    assert (config.name, config.run_dir, config.train.threads) == ("123", "/a b/c=d", 3)
    assert config.model.rope_scaling == RopeScaling(40.0, 4096)


def test_later_override_and_experiment_win() -> None:
    config = compose(
        ["experiment=tiny", "experiment=single", "train.steps=7", "train.steps=8", "model=16b", "model=tiny"]
    )
    assert (config.name, config.train.steps, config.model.hidden_size) == ("single", 8, 192)


def test_all_mistakes_are_reported_together() -> None:
    errors = errors_of(
        "parallel.pipelin=4", "pipeline=3", "foo=1", "model=17b", "x", "=3", "train.steps=ten", "train.seed=1.5",
        "data.prefix=a=b", "parallel.layers_per_stage=3,3", "optim.lr=[{shap: linear, value: x}]", "~data.seed",
        "~model", "a@b=3", "optim.mtp_lambda.7.value=3", "run_dir=${nothing}", "experiment=tiny,single",
        "model.norm_topk_prob=2",
    )  # fmt: skip
    wanted = [
        "parallel.pipelin: no such key; did you mean parallel.pipeline?",
        "pipeline: no such key; did you mean parallel.pipeline?",
        "foo: no such key; known are name, run_dir,",
        "model=17b: no such choice; use 16b, 671b, 671b_thin, bench85m or tiny",
        "x: not an override; write key=value",
        "=3: not an override",
        "train.steps=ten: expected a whole number",
        "train.seed=1.5: expected a whole number",
        "data.prefix=a=b: cannot be read",
        "a list is written parallel.layers_per_stage=[3,3]",
        "optim.lr.0.shap: no such key; did you mean optim.lr.0.shape?",
        "optim.lr.0.shape: missing",
        "optim.lr.0.value=x: expected a number",
        "~model: model cannot be deleted",
        "a: no such key",
        "optim.mtp_lambda.7.value=3: list index out of range",
        "run_dir=${nothing}: Interpolation key 'nothing' not found",
        "experiment=tiny,single: one run takes one choice; use bench85m,",
        "model.norm_topk_prob=2: expected true or false",
    ]
    for text in wanted:
        assert any(text in error for error in errors), (text, errors)
    assert len(errors) == len(wanted), errors


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.steps=null", "train.steps: no value; set train.steps=1"),
        ("train.steps=", "train.steps=: expected a whole number"),
        ("train.steps=true", "expected a whole number"),
        ("~train.steps", "train.steps: missing; set train.steps=1"),
        ("train=4", "train=4: expected a mapping"),
        ("optim.lr=3", "optim.lr=3: expected a list"),
        ("optim.lr=[3]", "optim.lr.0=3: expected a mapping"),
        ("optim.eps=nan", "expected a number"),
        ("name=[a]", "expected text"),
        ("model.rope_scaling={factor: 40}", "model.rope_scaling.original_max_position_embeddings: missing"),
        ("model.rope_scaling={factr: 40}", "did you mean model.rope_scaling.factor?"),
        ("modle=16b", "modle: no such key; did you mean model?"),
        ("parallel.quux=1", "no such key; known are parallel.all_to_all_over_compute, parallel.combine_wire"),
        ("optim.lr.0.value.x=1", "no such key"),
    ],
)
def test_message(override: str, wanted: str) -> None:
    assert wanted in "\n".join(errors_of(override))


def test_a_draft_leaves_the_bad_override_out() -> None:
    result = draft(["experiment=tiny", "parallel.pipeline=four", "train.steps=5", "foo=1"])
    assert result.config is not None and result.config.parallel.pipeline == 2 and result.config.train.steps == 5
    assert set(result.bad_keys) == {"parallel.pipeline", "foo"} and len(result.errors) == 2


def test_from_dict_reports_unknown_missing_and_wrong() -> None:
    tree = to_dict(compose([]))
    tree["train"]["stepps"] = 3
    del tree["name"]
    tree["model"]["vocab_size"] = "many"
    with pytest.raises(ConfigError) as caught:
        from_dict(tree)
    assert sorted(caught.value.errors) == [
        "model.vocab_size=many: expected a whole number",
        "name: missing; set name=TEXT",
        "train.stepps: no such key; did you mean train.steps?",
    ]


@dataclass(frozen=True)
class Sample:
    number: int
    ratio: float = 0.5
    pair: tuple[int, ...] | None = None


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"number": "1e3"}, Sample(1000)),
        ({"number": 2**63 + 1, "ratio": "inf"}, Sample(2**63 + 1, float("inf"))),
        ({"number": str(2**63 + 1), "ratio": 3}, Sample(2**63 + 1, 3.0)),
        ({"number": -1, "pair": None}, Sample(-1)),
        ({"number": 1, "pair": []}, Sample(1, 0.5, ())),
        ({"number": 1, "pair": [1, "x"]}, None),
        ({"number": None}, None),
    ],
)
def test_convert(value: Any, wanted: Sample | None) -> None:
    errors: dict[str, str] = {}
    assert convert(Sample, value, errors) == wanted
    assert bool(errors) == (wanted is None)


def test_composing_leaves_hydra_as_it_was() -> None:
    from hydra.core.global_hydra import GlobalHydra

    compose([])
    with pytest.raises(ConfigError):
        compose(["name=${nothing}"])
    assert not GlobalHydra.instance().is_initialized()


def test_composing_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys; from launcher.config import compose; compose(['experiment=tiny']); print('torch' in sys.modules)"
    )
    start = time.perf_counter()
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
    assert time.perf_counter() - start < 5  # 0.4 s alone; the tests share their cores


def test_known_keys_name_sections_and_optional_parts() -> None:
    assert {"model", "model.rope_scaling.factor", "train.steps", "name"} <= set(known_keys())
    assert len(known_keys()) == len(set(known_keys()))
    assert all(field.name in known_keys() for field in fields(RunConfig))
