"""What can be wrong between the keys that keep a run safe; rules as in launcher/check/run.py, no torch."""

from launcher.config import RunConfig


def check_safety(config: RunConfig) -> list[str]:
    """Rolling back leaves samples out, so the count of samples must not decide anything else."""
    found = []
    train = config.train
    if train.spike_policy == "rollback" and config.data.phases:
        found.append(
            "train.spike_policy=rollback leaves samples out, and data.phases begin at a count of them: use skip or warn"
        )
    if train.spike_policy == "rollback" and not train.checkpoint_every:
        found.append(
            "train.spike_policy=rollback with train.checkpoint_every=0 has nothing to roll back to: "
            "use train.checkpoint_every=100"
        )
    return found
