"""On a start: another tokenizer or data set is refused unless its key accepts it; another layout is read, and said."""

from dataclasses import replace
from pathlib import Path

from data.corpus import Document
from data.prepare import prepare
from launcher.build import build
from launcher.checkpoint.state import CheckpointError, load
from launcher.config import RunConfig
from launcher.runtime import process_group
from tests.launcher.checkpoint.states import VOCAB, Straight, whole_config


def alone(straight: Straight, folder: Path, **data: object) -> RunConfig:
    """The straight run's model and data on one rank; it was DualPipe on four."""
    found = whole_config(VOCAB, folder)
    return replace(found, data=replace(straight.config.data, **data))  # type: ignore[arg-type]


def read(run_config: RunConfig, path: Path, **train: bool) -> str:
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
