"""data.document_mask through pipelines: every stage keeps the same documents apart, as one process does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataPhase
from data.tokens import TokenWriter
from launcher.build import BuildError, build
from launcher.config import RunConfig
from launcher.runtime import process_group
from launcher.step import microbatch
from tests.distributed import run_distributed
from tests.launcher.spine import config, parallel_trace, plain_trace
from tests.launcher.test_spine import compare

LENGTHS = (3, 11, 40, 1, 25, 7)  # documents shorter and longer than a sequence of 32


def write_documents(prefix: Path) -> str:
    rng = np.random.default_rng(0)
    with TokenWriter(prefix, "uint16") as writer:
        for number in range(1200):
            writer.add((256 * rng.random(LENGTHS[number % len(LENGTHS)]) ** 2).astype(np.uint16))
    return str(prefix)


def masked(prefix: str, **options: Any) -> RunConfig:
    found = config(prefix, **options)
    return replace(found, data=replace(found.data, document_mask=True))


def run_case(folder: Path, pipeline: int, expert: int, schedule: str, mutate: Any = None, **options: Any) -> None:
    prefix = write_documents(folder / "tokens")
    run_config = masked(prefix, pipeline=pipeline, expert=expert, data=expert, schedule=schedule, **options)
    compare(run_config, run_distributed(pipeline * expert, parallel_trace, run_config, mutate), plain_trace(run_config))


def test_halves_of_lone_chunks_and_recomputation(tmp_path: Path) -> None:
    run_case(tmp_path, 2, 2, "dualpipe", overlap="all", recompute="layer")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev"])
def test_every_schedule_equals_one_process(tmp_path: Path, schedule: str) -> None:
    run_case(tmp_path, 2, 1, schedule)


@pytest.mark.slow
def test_middle_stages(tmp_path: Path) -> None:
    run_case(tmp_path, 4, 1, "dualpipe")


def mask_off_on_one_rank(run: Any) -> None:
    """The second pipeline rank forgets the documents."""
    if run.mesh.pipeline_rank == 1:
        from launcher import step

        plain = step.microbatch
        step.microbatch = lambda *args: replace(plain(*args), documents=None)


def one_document_late(run: Any) -> None:
    """The second pipeline rank asks for the documents of other samples."""
    if run.mesh.pipeline_rank == 1:
        from launcher import step

        plain = step.microbatch
        step.microbatch = lambda of, number: replace(plain(of, number), documents=plain(of, number ^ 1).documents)


@pytest.mark.parametrize("mutation", [mask_off_on_one_rank, pytest.param(one_document_late, marks=pytest.mark.slow)])
def test_a_stage_with_other_documents_is_caught(tmp_path: Path, mutation: Any) -> None:
    with pytest.raises(AssertionError, match="gradient of"):
        run_case(tmp_path, 2, 1, "1f1b", mutation)


def test_each_length_of_a_run_has_its_documents(tmp_path: Path) -> None:
    """Phases of another sequence length, on whichever data rank."""
    run_config = masked(write_documents(tmp_path / "tokens"), pipeline=1, expert=1, data=1, schedule="1f1b")
    phases = (DataPhase(8 * 16, sequence_length=32),)
    data = replace(run_config.data, sequence_length=16, phases=phases)
    run_config = replace(run_config, data=data)
    with process_group(run_config.train) as process:
        run = build(run_config, process)
        for samples, length in ((0, 16), (8, 32)):
            run.progress.samples = samples
            run.progress.tokens = samples * 16
            boundaries = 0
            for number in range(8):
                batch = microbatch(run, number)
                assert batch.documents is not None and batch.tokens.shape == (1, length + 1)
                spans = batch.documents[0]
                assert spans[0].start == 0 and spans[-1].stop == length
                boundaries += len(spans) - 1
            assert boundaries >= 4


def test_tokens_without_documents_are_refused(tmp_path: Path) -> None:
    class Tokens:
        def microbatch(self, **where: int) -> np.ndarray:
            return np.zeros((where["micro_batch_size"], 33), dtype=np.int64)

    run_config = masked(write_documents(tmp_path / "tokens"), pipeline=1, expert=1, data=1, schedule="1f1b")
    with process_group(run_config.train) as process, pytest.raises(BuildError, match="document_mask=true: this run"):
        build(run_config, process, loader=Tokens())  # type: ignore[arg-type]
