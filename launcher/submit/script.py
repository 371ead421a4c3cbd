"""The job script of a run: slurm/train.sbatch with the run's own numbers and overrides in it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path


def folder() -> Path:
    """slurm/ beside configs/. FileNotFoundError where only the packages were installed."""
    import configs

    found = Path(next(iter(configs.__path__))).resolve().parent / "slurm"
    if not (found / "train.sbatch").exists():
        raise FileNotFoundError(2, "the job scripts are part of the repository, not of the installed packages", found)
    return found


def job_script(
    template: str, *, directives: Mapping[str, str | None], overrides: Sequence[str], exports: Mapping[str, str]
) -> str:
    """`template` with its #SBATCH lines replaced and the run's words in place of the command line's.

    directives: by long name; None takes a line out, "" is an option without a value. exports: environment variables
    that the job sets before anything else.
    """
    lines = template.splitlines()
    given = {}
    for line in lines:
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            given[name] = value
    wanted = {name: value for name, value in {**given, **directives}.items() if value is not None}
    first = next(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    head = [lines[0], "# Written by `expertpipe submit`; slurm/ has the file that it was made from.", *lines[1:first]]
    body = [line for line in lines[first:] if not line.startswith("#SBATCH")]
    own = [f"#SBATCH --{name}{'=' if value else ''}{_quoted(value)}" for name, value in wanted.items()]
    words = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    words.append("set -- " + " ".join(shlex.quote(override) for override in overrides))
    return "\n".join([*head, *own, "", *words, *body]) + "\n"


def _quoted(value: str) -> str:
    return f'"{value}"' if any(letter in value for letter in " #'") else value
