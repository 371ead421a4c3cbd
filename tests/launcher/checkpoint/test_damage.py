"""Damage of every kind is named and never loaded."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.checkpoint.state import CheckpointError, verify
from launcher.inference import load_model
from tests.launcher.checkpoint.damage import (
    DAMAGES,
    WHEN_READ,
    crafted_pickle,
)
from tests.launcher.checkpoint.states import Straight


def test_the_crafted_pickle_would_run(tmp_path: Path) -> None:
    pickle.loads(crafted_pickle(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named(straight: Straight, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    shutil.copytree(straight.step(2), tmp_path / "step-00000002")
    folder = tmp_path / "step-00000003"
    shutil.copytree(straight.step(3), folder)
    load_model(folder)
    said = damage(folder)
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)
    if damage not in WHEN_READ:
        with pytest.raises(CheckpointError, match=said):
            verify(folder)
    assert not (tmp_path / "canary").exists()
