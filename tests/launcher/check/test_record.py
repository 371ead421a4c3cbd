"""Rules of what a run writes: each names key, value and remedy, and the remedy works."""

from pathlib import Path

import pytest

from launcher.check.record import check_record
from launcher.check.run import problems
from launcher.config import compose

CASES = [
    ("train.wandb=on", "train.wandb=on: use off, offline or online", "train.wandb=offline"),
    ("train.wandb_project=' '", "train.wandb_project='': use a name", "train.wandb_project=a"),
    ("train.collapse_load=0", "train.collapse_load=0: use a share above 0, at most 1", "train.collapse_load=0.9"),
    ("train.collapse_load=1.5", "train.collapse_load=1.5: use a share", "train.collapse_load=1"),
    ("train.collapse_steps=-1", "train.collapse_steps=-1: use 0 or more", "train.collapse_steps=0"),
    ("train.norms_every=-1", "train.norms_every=-1: use 0 or more", "train.norms_every=0"),
    ("train.rank_events_every=-1", "train.rank_events_every=-1: use 0 or more", "train.rank_events_every=0"),
    (
        "train.mfu_against=H800",
        "use auto, measured, h100, h200, h800 or a YAML file of your own",
        "train.mfu_against=h800",
    ),
    ("train.mfu_against=h900", "did you mean h800?", "train.mfu_against=measured"),
    ("train.mfu_against=none.yaml", "train.mfu_against=none.yaml: none.yaml: no such file", "train.mfu_against=auto"),
]


@pytest.mark.parametrize(("wrong", "message", "right"), CASES)
def test_every_rule_fires_and_its_remedy_works(wrong: str, message: str, right: str) -> None:
    found = problems(compose(["experiment=tiny", wrong]), None, with_data=False)
    assert len(found) == 1 and message in found[0]
    assert problems(compose(["experiment=tiny", right]), None, with_data=False) == []


def test_a_cluster_file_of_ones_own(tmp_path: Path) -> None:
    from launcher.record.throughput import clusters

    path = tmp_path / "mine.yaml"
    path.write_text(clusters()["h100"].read_text())
    assert check_record(compose([f"train.mfu_against={path}"])) == []
    path.write_text("name: mine\n")
    (message,) = check_record(compose([f"train.mfu_against={path}"]))
    assert message.startswith(f"train.mfu_against={path}: mine.yaml: num_sms: write")
