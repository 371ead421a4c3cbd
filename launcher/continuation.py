"""Beginning a run with what another has learnt: the context extension after pretraining (report section 4.3).

An extension is a run of its own: another layout, batch, sequence length and learning rate, YaRN, its own checkpoints
and its own count of tokens, from 0. What it takes over are weights, moments and router biases.
"""

from pathlib import Path

from launcher.build import Run
from launcher.checkpoint.state import find, load


def begin_with(run: Run, path: Path) -> None:
    """Fill a new run from a checkpoint, or the newest one of a run's folder, and leave it at step 0.

    The number of AdamW updates goes on, as the moments do. Raises CheckpointError where there is no such checkpoint or
    its weights are of other shapes.
    """
    load(run, find(path), same_run=False)
    run.progress.step = run.progress.tokens = run.progress.samples = 0
