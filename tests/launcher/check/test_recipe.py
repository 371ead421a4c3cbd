"""Rules on schedules, phases, data and predecessors: each fires, says what works, and that works."""

import json
from pathlib import Path

import pytest

from data.tokens import Manifest
from launcher.check.run import problems
from launcher.config import compose, to_dict
from tests.data.test_check import source

TINY = ["experiment=tiny", "train.device=cpu"]
RAMP = "train.global_batch_size=[{shape: constant, value: %s, tokens: 8192}, {shape: linear, value: %s, tokens: 8192}]"


def found(*overrides: str) -> list[str]:
    return problems(compose([*TINY, *overrides]), None, with_data=False)


@pytest.mark.parametrize(
    ("override", "message", "remedy"),
    [
        ([RAMP % (6, 32)], "train.global_batch_size.0.value=6: every level is a multiple of 4", [RAMP % (8, 32)]),
        (
            [RAMP % (8, 32), "train.batch_multiple=6"],
            "train.batch_multiple=6 is not divisible by train.micro_batch_size=2 * parallel.data=2 = 4: use 4 or 8",
            [RAMP % (8, 32), "train.batch_multiple=8"],
        ),
        (["train.global_batch_size=[]"], "train.global_batch_size=[]: use a whole", ["train.global_batch_size=8"]),
        (
            ["train.global_batch_size=[{shape: cosine, value: 8}]"],
            "train.global_batch_size.0.shape=cosine",
            ["train.global_batch_size=[{shape: constant, value: 8}]"],
        ),
        (
            ["data.phases=[{from_tokens: 10240, sequence_length: 128}]"],
            "data.phases.0.from_tokens=10240: falls within a step",
            ["data.phases=[{from_tokens: 16384, sequence_length: 128}]"],
        ),
        (
            ["data.phases=[{from_tokens: 1000, sequence_length: 128}]"],
            "data.phases.0.from_tokens=1000: not reached by whole samples of 256 tokens",
            ["data.phases=[{from_tokens: 8192, sequence_length: 128}]"],
        ),
        (
            ["data.phases=[{from_tokens: 8192, sequence_length: 512}]"],
            "data.phases.0.sequence_length=512 is more than model.max_position_embeddings=256",
            ["data.phases=[{from_tokens: 8192, sequence_length: 512}]", "model.max_position_embeddings=512"],
        ),
        (["data.weight=0"], "data: weight 0.0 of runs/data/stdlib/train: must be above 0", ["data.weight=2"]),
        (["train.init_from=runs/tiny"], "train.init_from=runs/tiny is this run's own", ["train.init_from=runs/x"]),
        (
            ["optim.fim_rate=[{shape: constant, value: 2}]"],
            "optim.fim_rate.0.value=2: use a number from 0 to 1",
            ["optim.fim_rate=[{shape: constant, value: 0.1}]"],
        ),
    ],
)  # fmt: skip
def test_rule_fires_and_its_remedy_works(override: list[str], message: str, remedy: list[str]) -> None:
    messages = found(*override)
    assert any(text.startswith(message) for text in messages), messages
    assert found(*remedy) == []


def test_every_number_of_micro_batches_of_a_ramp_is_checked(tmp_path: Path) -> None:
    from parallel.pipeline.csv_format import write
    from parallel.pipeline.schedules import build

    path = tmp_path / "five.csv"
    path.write_text(write(build("1f1b", num_ranks=2, num_microbatches=8)))
    schedule = [f"parallel.schedule={path}"]
    assert found(*schedule) == []  # 8 micro-batches
    (message,) = found(*schedule, RAMP % (24, 32))
    assert "and 6 micro-batches (train.global_batch_size=24 /" in message


def test_a_predecessor_must_have_a_checkpoint(tmp_path: Path) -> None:
    data = [f"data.prefix={source(tmp_path / 'a')}", "data.sequence_length=32"]
    here = [*TINY, *data, f"run_dir={tmp_path}/run", f"train.init_from={tmp_path}/before"]
    (message,) = problems(compose(here), None)
    assert message.startswith(f"train.init_from={tmp_path}/before: no checkpoint there: train that run first")
    (tmp_path / "before" / "checkpoints").mkdir(parents=True)
    (tmp_path / "before" / "checkpoints" / "latest").write_text("step-1\n")
    assert problems(compose(here), None) == []


def test_a_run_does_not_begin_with_its_predecessors_samples(tmp_path: Path) -> None:
    data = [f"data.prefix={source(tmp_path / 'a')}", "data.sequence_length=32"]
    step = tmp_path / "before" / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text("step-1\n")
    (step / "config.json").write_text(json.dumps(to_dict(compose([*TINY, *data]))))
    here = [*TINY, *data, f"run_dir={tmp_path}/run"]
    for before in (tmp_path / "before", step.parent):
        (message,) = problems(compose([*here, f"train.init_from={before}"]), None)
        assert message.startswith("data.seed=0 and data.sequence_length=32 are those of") and "data.seed=1" in message
    for remedy in ("data.seed=1", "data.sequence_length=31"):
        assert problems(compose([*here, f"train.init_from={tmp_path}/before", remedy]), None) == []


def prepared(prefix: Path, **arguments: object) -> str:
    name = source(prefix)
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"arguments": arguments}))
    assert Manifest.read(prefix).arguments == arguments
    return name


def test_data_must_be_turned_as_often_as_the_run_asks(tmp_path: Path) -> None:
    a, b = prepared(tmp_path / "a", fim_rate=0.1), prepared(tmp_path / "b", fim_rate=0.05)
    blend = [f"data.prefix={a}", f"data.blend=[{{prefix: {b}}}]", "data.sequence_length=32"]
    rate = "optim.fim_rate=[{shape: constant, value: %s, tokens: 9}, {shape: constant, value: 0.01}]"
    (message,) = problems(compose([*TINY, *blend, rate % 0.1]), None)
    assert message == (
        f"optim.fim_rate reaches 0.1, {b}.json was prepared with a FIM rate of 0.05: prepare the data with "
        "`--fim-rate 0.1`, or use optim.fim_rate=[] for the prepared rate"
    )
    assert problems(compose([*TINY, *blend, rate % 0.05]), None) == []
    assert problems(compose([*TINY, *blend]), None) == []


def test_every_source_of_a_blend_is_checked(tmp_path: Path) -> None:
    a, c = source(tmp_path / "a"), source(tmp_path / "c", tokenizer="7")
    base = [*TINY, f"data.prefix={a}", "data.sequence_length=32"]
    (message,) = problems(compose([*base, "data.blend=[{prefix: nowhere/b}]"]), None)
    assert message.startswith("data.blend.0.prefix=nowhere/b: no nowhere/b.json there: prepare the data with `expert")
    (message,) = problems(compose([*base, f"data.blend=[{{prefix: {c}}}]"]), None)
    assert message.startswith(f"data.blend.0.prefix={c}: {c}.json: tokenizer 777777777777")
