"""Loss curves: PNGs of the right size, whatever is missing in the events."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.show.pictures import loss_curve
from tests.launcher.record.test_events import event
from tests.launcher.show.test_timeline import png_size

ROOT = Path(__file__).parents[3]


def test_loss_curve(tmp_path):
    run = [
        event(step, loss=3 + 6 / step, mtp_loss=None if step < 3 else 4.0, grad_norm=math.nan if step == 5 else 1.0)
        for step in range(1, 120)
    ]
    loss_curve(run, tmp_path / "a.png", unigram_nats=6.0, heldout_nats=3.1, title="demo")
    assert png_size(tmp_path / "a.png") == (1600, 1024)


@pytest.mark.parametrize(
    "changes", [{}, {"mtp_loss": None, "expert_load": ()}, {"loss": math.nan, "lr": 0.0, "tokens": 0}]
)
def test_loss_curve_of_one_step(tmp_path, changes):
    loss_curve([event(1, **changes)], tmp_path / "a.png", unigram_nats=6.0)
    png_size(tmp_path / "a.png")


def test_loss_curve_needs_events(tmp_path):
    with pytest.raises(ValueError, match="at least one step"):
        loss_curve([], tmp_path / "a.png", unigram_nats=6.0)


def test_import_is_light():
    """Neither matplotlib nor torch may be paid for by a program that draws nothing."""
    program = (
        "import sys, launcher.show.pictures, launcher.show.timeline, launcher.show.timeline_html, launcher.local\n"
        "import launcher.record.events, launcher.record.recorder, launcher.show.display\n"
        "print([name for name in ('matplotlib', 'torch', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
