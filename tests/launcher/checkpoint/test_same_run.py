"""On a start: another tokenizer, data set or cut is refused unless its key accepts it; other changes are said."""

from dataclasses import replace
from pathlib import Path

from data.config import DataPhase
from data.corpus import Document
from data.prepare import prepare
from launcher.build import build
from launcher.checkpoint.state import CheckpointError, load
from launcher.config import RunConfig
from launcher.continuation import begin_with
from launcher.runtime import process_group
from launcher.safety.same_run import differences, flat
from tests.launcher.checkpoint.states import VOCAB, Straight, whole_config

SEEN = 3 * 8 * 32  # tokens of the checkpoint that is read: steps, sequences, their length


def alone(straight: Straight, folder: Path, **data: object) -> RunConfig:
    """The straight run's configuration on one rank; it was DualPipe on four."""
    theirs, found = straight.config, whole_config(VOCAB, folder)
    return replace(
        found, optim=theirs.optim, train=theirs.train, data=replace(theirs.data, **data)  # type: ignore[arg-type]
    )  # fmt: skip


def read(run_config: RunConfig, path: Path, **train: object) -> str:
    """Load it; what was said of it, or why it was refused."""
    said: list[str] = []
    run_config = replace(run_config, train=replace(run_config.train, **train))  # type: ignore[arg-type]
    with process_group(run_config.train) as process:
        run = build(run_config, process)
        try:
            load(run, path, say=said.append)
        except CheckpointError as error:
            return f"refused: {error}"
        assert run.progress.step == 3
    return "\n".join(said)


def test_another_layout_is_read_and_said(straight: Straight, tmp_path: Path) -> None:
    assert read(alone(straight, tmp_path), straight.step(3)) == (
        "step-00000003 was written by another layout (pipeline 2 dualpipe x data 2, expert 2): "
        "read for pipeline 1 1f1b x data 1, expert 1"
    )


def test_another_order_of_the_data_is_refused_unless_accepted(straight: Straight, tmp_path: Path) -> None:
    other = alone(straight, tmp_path, seed=straight.config.data.seed + 1)
    said = read(other, straight.step(3))
    assert said.startswith(f"refused: {straight.step(3)} was trained with another data set (digest ")
    assert said.endswith(": take the same, or set train.accept_other_data=true") and "\n" not in said
    assert read(other, straight.step(3), accept_other_data=True).startswith("step-00000003 was written by another")


def test_another_tokenizer_is_refused_unless_accepted(straight: Straight, tmp_path: Path) -> None:
    documents = [Document("made up", f"{i}", f"quite other words {i} of another corpus " * 20) for i in range(50)]
    prefix = prepare(corpus=documents, out_dir=tmp_path / "data", vocab_size=300, heldout_fraction=0.2).train_prefix
    other = alone(straight, tmp_path / "run", prefix=prefix)
    said = read(other, straight.step(3))
    assert said.startswith("refused: ") and "was trained with another tokenizer (digest " in said
    assert said.endswith("or set train.accept_other_tokenizer=true")
    assert "with another data set (" in read(other, straight.step(3), accept_other_tokenizer=True)
    both = read(other, straight.step(3), accept_other_tokenizer=True, accept_other_data=True)
    assert both.startswith("step-00000003 was written by another layout")


def test_another_length_of_the_samples_is_refused_unless_accepted(straight: Straight, tmp_path: Path) -> None:
    other = alone(straight, tmp_path, sequence_length=16)
    assert read(other, straight.step(3)) == (
        f"refused: {straight.step(3)} was trained on samples that were cut otherwise: data.sequence_length=16 "
        "(there: 32): take the same, or set train.accept_other_data=true"
    )
    assert "data.sequence_length=16 (then: 32)" in read(other, straight.step(3), accept_other_data=True)


def test_phases_may_change_until_they_begin(straight: Straight, tmp_path: Path) -> None:
    ahead = alone(straight, tmp_path, phases=(DataPhase(SEEN, 16),))
    said = read(ahead, straight.step(3))
    assert "data.phases.0.from_tokens=768 (then: none)" in said and not said.startswith("refused"), said
    begun = read(alone(straight, tmp_path, phases=(DataPhase(SEEN - 256, 16),)), straight.step(3))
    assert begun.startswith("refused: ") and "data.phases.0.from_tokens=512 (there: none)" in begun


def test_another_configuration_is_said_in_one_line(straight: Straight, tmp_path: Path) -> None:
    (line,) = read(alone(straight, tmp_path), straight.step(3), spike_window=50, seed=1).splitlines()[1:]
    assert line == (
        "step-00000003 was written with another configuration: train.seed=1 (then: 0), "
        "train.spike_window=50 (then: 100)"
    )


def test_a_run_that_begins_with_the_weights_may_cut_otherwise(straight: Straight, tmp_path: Path) -> None:
    """As a context extension does: experiment=deepseek_v3_32k after deepseek_v3."""
    config = alone(straight, tmp_path, sequence_length=16, phases=(DataPhase(256, 8),))
    with process_group(config.train) as process:
        run = build(config, process)
        begin_with(run, straight.step(3))
        assert (run.progress.step, run.progress.tokens, run.optimizer.steps) == (0, 0, 3)


def test_differences_name_elements_as_overrides_do_and_count_the_rest() -> None:
    mine = flat({"a": {"b": [{"c": 1}, {"c": 2}], "d": True}, "e": None, "f": []})
    theirs = flat({"a": {"b": [{"c": 1}], "d": False}, "e": 3})
    assert differences(mine, mine, whose="then", most=9) == ""
    assert (
        differences(mine, theirs, whose="then", most=9)
        == "a.d=true (then: false), e=none (then: 3), a.b.1.c=2 (then: none)"
    )
    assert differences(mine, theirs, whose="then", most=1) == "a.d=true (then: false) and 2 more"
