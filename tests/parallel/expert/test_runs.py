"""The spine's equality (tests/launcher/test_spine.py) with each back end: N ranks against one process, a plain loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.config import ParallelConfig
from tests.distributed import run_distributed
from tests.launcher.spine import config, parallel_trace, plain_trace, write_tokens
from tests.launcher.test_spine import compare

BACKENDS = ("flat", "collective", "native_host")


def run_case(folder: Path, layout: tuple[int, int, int], schedule: str, layers: Any, **chosen: Any) -> None:
    pipeline, expert, data = layout
    prefix = write_tokens(str(folder / "tokens"))
    plain = config(prefix, pipeline=pipeline, expert=expert, data=data, schedule=schedule, layers=layers)
    parallel: ParallelConfig = replace(plain.parallel, **chosen)
    run_config = replace(plain, parallel=parallel)
    ranks = run_distributed(pipeline * data, parallel_trace, run_config)
    compare(run_config, ranks, plain_trace(plain))


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", BACKENDS)
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_dualpipe(tmp_path: Path, dispatcher: str, ranks_per_node: int) -> None:
    run_case(tmp_path, (2, 2, 2), "dualpipe", (2, 4), dispatcher=dispatcher, ranks_per_node=ranks_per_node)


@pytest.mark.parametrize("dispatcher", BACKENDS)
def test_two_nodes_of_two(tmp_path: Path, dispatcher: str) -> None:
    run_case(tmp_path, (1, 4, 4), "1f1b", None, dispatcher=dispatcher, ranks_per_node=2)


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", BACKENDS)
def test_two_nodes_of_two_under_dualpipe(tmp_path: Path, dispatcher: str) -> None:
    run_case(tmp_path, (2, 4, 4), "dualpipe", (2, 4), dispatcher=dispatcher, ranks_per_node=2)
