"""One straight run for all tests of this folder that read checkpoints of a run over several ranks."""

from dataclasses import replace

import pytest

from tests.distributed import run_distributed
from tests.launcher.checkpoint.states import VOCAB, Straight, prepared, session, whole
from tests.launcher.spine import config


@pytest.fixture(scope="package")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    folder = tmp_path_factory.mktemp("straight")
    run_config = config(
        prepared(folder / "data"), pipeline=2, expert=2, data=2, schedule="dualpipe", layers=(1, 3), microbatches=4,
        model=VOCAB, run_dir=str(folder / "run"),
    )  # fmt: skip
    train, optim = replace(run_config.train, keep_checkpoints=5), replace(run_config.optim, ema_decay=0.5)
    run_config = replace(run_config, train=train, optim=optim)
    ranks = run_distributed(4, session, run_config, 3, None)
    return Straight(run_config, [whole([rank[i] for rank in ranks]) for i in range(4)])
