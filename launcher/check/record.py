"""What can be wrong with what a run writes; rules as in launcher/check/run.py, no torch."""

import difflib
import os
from netrc import NetrcParseError, netrc
from pathlib import Path

from launcher.config import RunConfig
from model.backends import version_problem

WANDB_FROM, WANDB_UNTIL = "0.31", "0.32"  # the range of setup.py; the tests read back what it writes
WANDB_HOST = "api.wandb.ai"


def check_record(config: RunConfig) -> list[str]:
    """Words are known ones, the limit of a collapse is a share, a project has a name."""
    train, found = config.train, []
    if train.wandb not in ("off", "offline", "online"):
        found.append(f"train.wandb={train.wandb}: use off, offline or online")
    if not train.wandb_project.strip():
        found.append("train.wandb_project='': use a name such as train.wandb_project=expertpipe")
    if not 0 < train.collapse_load <= 1:
        found.append(f"train.collapse_load={train.collapse_load:g}: use a share above 0, at most 1, such as 0.9")
    return found + _peak(train.mfu_against)


def _peak(against: str) -> list[str]:
    import configs

    known = sorted(path.stem for path in (Path(next(iter(configs.__path__))) / "cluster").glob("*.yaml"))
    if against in ("auto", "measured", *known):
        return []
    if against.endswith((".yaml", ".yml")):
        from parallel.plan.hardware import HardwareError, read

        try:
            read(Path(against))
            return []
        except HardwareError as error:
            return [f"train.mfu_against={against}: {error}"]
    near = difflib.get_close_matches(against, known, n=1, cutoff=0.5)
    meant = f"; did you mean {near[0]}?" if near else ""
    return [f"train.mfu_against={against}: use auto, measured, {', '.join(known)} or a YAML file of your own{meant}"]


def check_wandb(config: RunConfig) -> list[str]:
    """The package is here where it is wanted, in a version that was tested, and a key where it is to send."""
    mode = config.train.wandb
    if mode not in ("offline", "online"):
        return []
    if problem := version_problem("wandb", "wandb", WANDB_FROM, WANDB_UNTIL):
        return [f"train.wandb={mode}: {problem}: pip install -e .[wandb], or use train.wandb=off"]
    if mode == "online" and not _has_key():
        return ["train.wandb=online: no API key; set WANDB_API_KEY, or run `wandb login`, or use train.wandb=offline"]
    return []


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators(WANDB_HOST) is not None
    except (OSError, NetrcParseError):
        return False
