"""`expertpipe submit`: a run is composed, checked and planned; then its job script is written and given to Slurm."""

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from launcher.check.run import checked
from launcher.config import ConfigError, RunConfig
from launcher.plan.inputs import hardware_of, job_of
from launcher.plan.inputs import problems as cluster_problems
from launcher.plan.text import text
from launcher.submit.partitions import Demand, Partition, SlurmError, chosen, partitions, problems
from launcher.submit.script import folder, job_script
from parallel.plan.hardware import Hardware, HardwareError
from parallel.plan.recipe import hours
from parallel.plan.step import plan

SBATCH_SECONDS = 60
ACCEPT = "; --accept-memory submits it all the same"


class SubmitError(ValueError):
    """The run was not submitted; one line."""

    user_error = True


@dataclass(frozen=True)
class Order:
    """A run that may be submitted, and where to. partition: None where Slurm was not asked."""

    config: RunConfig
    hardware: Hardware
    overrides: tuple[str, ...]
    partition: Partition | None

    @property
    def tasks_per_node(self) -> int:
        """Ranks of a node."""
        return min(self.config.parallel.world_size, self.hardware.gpus_per_node)

    @property
    def num_nodes(self) -> int:
        """Nodes of the job; the planner refuses a last one that is not full."""
        return -(-self.config.parallel.world_size // self.tasks_per_node)

    @property
    def gpus_per_node(self) -> int:
        """GPUs asked for; none by a run on CPUs."""
        return 0 if self.config.train.device == "cpu" else self.tasks_per_node


def submit_command(argv: list[str]) -> int:
    """Runs the command; 0 when the job is queued, or with --dry-run when it could be.

    ConfigError with everything wrong in the run, on its cluster (memory included) and in its partition; SubmitError
    when sbatch refuses it.
    """
    args = _parser().parse_intermixed_args(argv)
    order = ordered(args)
    found = plan(job_of(_words_of_plan(order.overrides, args.cluster)))
    print(text(found, hours(found, price_per_hour=None), []))
    if not found.fits:
        print("submitted all the same (--accept-memory)", file=sys.stderr)
    script = script_of(order, args)
    if args.dry_run:
        print(f"\n{script}\nnot submitted (--dry-run)")
        return 0
    path = Path(order.config.run_dir).absolute() / f"{'torchrun' if args.torchrun else 'train'}.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    number = _sbatch(path)
    print("\n" + where_to_look(order, path, number))
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="expertpipe submit",
        description="Checks and plans a run, writes its job script into run_dir and submits it to Slurm.",
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="the run, and cluster=h800 (or a YAML file)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and the script, write and submit nothing")
    parser.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    parser.add_argument("--time", metavar="TIME", help="limit, such as 2-00:00:00; then it saves and requeues")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--qos", metavar="NAME")
    parser.add_argument("--sbatch", metavar="OPTION", action="append", default=[], help="more, as --sbatch=--comment=x")
    parser.add_argument("--preflight", action="store_true", help="test the nodes before training, in the same job")
    parser.add_argument("--torchrun", action="store_true", help="one agent a node instead of one task a GPU")
    parser.add_argument("--accept-memory", action="store_true", help="submit although the plan says it does not fit")
    return parser


def ordered(args: Namespace) -> Order:
    """The run and its place, everything wrong with them at once (ConfigError). Takes cluster= out of the overrides."""
    errors: list[str] = []
    overrides = [word for word in args.overrides if not word.startswith("cluster=")]
    names = [word.removeprefix("cluster=") for word in args.overrides if word.startswith("cluster=")]
    args.cluster = names[-1] if names else ""
    config = hardware = None
    try:
        config = checked(overrides, here=False)
    except ConfigError as error:
        errors += error.errors
    try:
        if not names:
            raise HardwareError("--cluster: no value; set cluster=h800, h100, h200 or a YAML file")
        hardware = hardware_of(args.cluster)
    except HardwareError as error:
        errors.append(str(error).replace("--cluster ", "cluster=", 1).replace("--cluster:", "cluster:", 1))
    order = None if config is None or hardware is None else Order(config, hardware, tuple(overrides), None)
    if order is not None:
        errors += _cluster_problems(order, accept=args.accept_memory)
    demand = None if order is None else Demand(order.num_nodes, order.gpus_per_node, args.time)
    there: list[Partition] = []
    try:
        there = partitions()
        errors += problems(args.partition, there, demand)
    except SlurmError as error:
        if not args.dry_run:
            errors.append(str(error))
        else:
            print(f"partitions not checked: {error}", file=sys.stderr)
    if errors or config is None or hardware is None:
        raise ConfigError(errors)
    return Order(config, hardware, tuple(overrides), chosen(args.partition, there))


def _cluster_problems(order: Order, *, accept: bool) -> list[str]:
    """Why the run cannot be on its GPUs, in the words of `plan` and `doctor`; accept: though it does not fit them."""
    found = cluster_problems(order.config, order.hardware, memory=False)
    if found or accept:
        return found
    return [line + ACCEPT for line in cluster_problems(order.config, order.hardware)]


def _words_of_plan(overrides: tuple[str, ...], cluster: str) -> Namespace:
    return Namespace(
        overrides=list(overrides), cluster=cluster, precision=None, as_published=False, trace=None, calibration=None
    )


def script_of(order: Order, args: Namespace) -> str:
    """The job script as Slurm gets it."""
    run_dir, per_node = Path(order.config.run_dir).absolute(), order.tasks_per_node
    cores = order.partition.cpus if order.partition else None
    tasks = 1 if args.torchrun else per_node
    directives: dict[str, str | None] = {
        "job-name": order.config.name,
        "nodes": str(order.num_nodes),
        "ntasks-per-node": str(tasks),
        "gpus-per-node": str(order.gpus_per_node) if order.gpus_per_node else None,
        "chdir": os.getcwd(),
        "output": f"{run_dir}/slurm-%j.log",
    }
    if cores:
        directives["cpus-per-task"] = str(max(1, cores // tasks))
    directives |= {name: getattr(args, name) for name in ("partition", "time", "account", "qos") if getattr(args, name)}
    for option in args.sbatch:
        name, _, value = option.removeprefix("--").partition("=")
        directives[name] = value
    exports = {"EXPERTPIPE_SLURM": str(folder())}
    if args.preflight:
        exports["EXPERTPIPE_PREFLIGHT"] = "1"
    if args.torchrun:
        exports["EXPERTPIPE_PROCESSES_PER_NODE"] = str(per_node)
    template = (folder() / f"{'torchrun' if args.torchrun else 'train'}.sbatch").read_text()
    return job_script(template, directives=directives, overrides=order.overrides, exports=exports)


def _sbatch(path: Path) -> int:
    """Hand the script to Slurm; the job's number. Raises SubmitError with what Slurm says."""
    try:
        done = subprocess.run(["sbatch", "--parsable", path], capture_output=True, text=True, timeout=SBATCH_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SubmitError(f"sbatch does not answer: {error}") from error
    if done.returncode != 0:
        said = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines())
        raise SubmitError(f"sbatch refuses {path}: {said}")
    return int(done.stdout.strip().split(";")[0])


def where_to_look(order: Order, path: Path, number: int) -> str:
    """What was submitted and which files will tell of it."""
    run_dir, config = path.parent, order.config
    gpus = f"{order.gpus_per_node} GPUs" if order.gpus_per_node else f"{order.tasks_per_node} ranks on CPUs"
    where = f", partition {order.partition.name}" if order.partition else ""
    rows = {
        "log": f"{run_dir}/slurm-{number}.log",
        "steps": f"{run_dir}/events.jsonl",
        "faults": f"{run_dir}/faults.jsonl",
        "script": str(path),
        "state": f"squeue --job {number}; scontrol show job {number}",
        "end it": f"scancel {number}",
    }
    head = f"job {number}: {config.name}, {order.num_nodes} x {gpus}{where}"
    return "\n".join([head, *(f"  {name:<8}{value}" for name, value in rows.items())])
