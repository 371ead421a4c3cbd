"""How a training run begins: in this process if somebody has started its ranks, else as local processes."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

# Slurm numbers the steps it makes by itself (interactive, batch, extern) from here up: no `srun` of the user's.
_SLURM_SPECIAL_STEP = 0xFFFFFFF0


def start(overrides: Sequence[str], *, only_check: bool = False) -> int:
    """Check the run that the overrides describe and train it; the exit code.

    Under torchrun, srun or `run_local` this process is one of its ranks; alone it starts the others. ConfigError lists
    everything wrong. only_check: say that nothing is wrong instead of training.
    """
    from launcher.check.run import checked

    os.environ.update(slurm_environment(os.environ))
    world_size = outer_world_size(os.environ)
    config = checked(overrides, world_size=world_size)
    if only_check:
        print(f"{config.name}: nothing wrong; needs {config.parallel.world_size} processes")
        return 0
    if world_size is not None or config.parallel.world_size == 1:
        from launcher.train import train

        return train(config)
    from launcher.local import run_local

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = config.train.threads or max(1, cores // config.parallel.world_size)
    return run_local(
        ["train", *overrides], world_size=config.parallel.world_size, run_dir=Path(config.run_dir), threads=threads
    )


def outer_world_size(env: Mapping[str, str]) -> int | None:
    """Processes that torchrun, srun or `run_local` have started, of which this is one; None when it stands alone.

    Raises ConfigError when the variables are not numbers.
    """
    from launcher.config import ConfigError

    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    for name in ("RANK", "WORLD_SIZE"):
        if not env[name].isdecimal():
            raise ConfigError(
                [f"{name}={env[name]}: expected a whole number; unset it, or start through torchrun or srun"]
            )
    return int(env["WORLD_SIZE"])


def slurm_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would have set, for a process that `srun` started as one of several; else none.

    The first host of the step is the master; the port follows from the job and step numbers, so that two jobs on one
    node differ. MASTER_ADDR and MASTER_PORT are kept where they are set. Raises ConfigError when the hosts cannot be
    found out.
    """
    step = env.get("SLURM_STEP_ID", "")
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    is_step = step.isdecimal() and int(step) < _SLURM_SPECIAL_STEP
    if "RANK" in env or not is_step or "SLURM_PROCID" not in env or int(tasks) < 2:
        return {}
    job = int(env.get("SLURM_JOB_ID", "0"))
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": _tasks_on_node(env, tasks),
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env),
        "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + (job * 16 + int(step)) % 10000),
    }


def _tasks_on_node(env: Mapping[str, str], tasks: str) -> str:
    """This node's entry of Slurm's compressed list, such as 4(x2),3: two nodes with 4 tasks and one with 3."""
    entries = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or tasks
    counts: list[str] = []
    for entry in entries.split(","):
        count, _, repeat = entry.partition("(x")
        counts += [count] * int(repeat.rstrip(")") or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[min(node, len(counts) - 1)]


def _first_host(env: Mapping[str, str]) -> str:
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURMD_NODENAME", "")
    if hosts and "[" not in hosts:
        return hosts.split(",")[0]
    try:
        output = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True, timeout=20
        ).stdout
        return output.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        from launcher.config import ConfigError

        message = f"the first host of SLURM_STEP_NODELIST={hosts} is not known ({error}); set MASTER_ADDR to it"
        raise ConfigError([message]) from error
