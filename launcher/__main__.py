"""The program `expertpipe`, also `python -m launcher`: one table of commands, each of which reads its own arguments.

Nothing heavy is imported before a command needs it: help and mistakes answer at once, without torch.
"""

import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

USER_ERROR, INTERRUPTED = 2, 130  # exit codes
# Slurm numbers the steps it makes by itself (interactive, batch, extern) from here up: no `srun` of the user's.
_SLURM_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Command:
    """One word after `expertpipe`: a line of help, and what runs the rest of the line and returns the exit code."""

    summary: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 2 for the user's mistakes, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else USER_ERROR
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"expertpipe {version('expertpipe')}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _complain([f"{name}: no such command; use {', '.join(COMMANDS)}"])
    try:
        return COMMANDS[name].run(rest)
    except SystemExit as stop:  # argparse, after it has said why
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not is_user_error(error):
            raise
        return _complain(getattr(error, "errors", None) or [_one_line(error)])


def is_user_error(error: Exception) -> bool:
    """Whether the message alone tells the user what to change: a missing file, or an error that says so itself.

    Errors say so with a class attribute `user_error = True`; the token files' error belongs to a package that knows
    nothing of command lines.
    """
    tokens = sys.modules.get("data.tokens")
    token_errors = (tokens.TokenFileError,) if tokens else ()
    return getattr(type(error), "user_error", False) or isinstance(error, (FileNotFoundError, *token_errors))


def _one_line(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: no such file or directory"
    return " ".join(str(error).split()) or type(error).__name__


def _complain(messages: Sequence[str]) -> int:
    """One line each on stderr, from rank 0 only: all ranks of a run find the same mistakes."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if not rank.isdecimal() or int(rank) == 0:
        for message in messages:
            print(f"expertpipe: {message}", file=sys.stderr)
    return USER_ERROR


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: expertpipe COMMAND ...",
            "",
            "Pretrains DeepSeek-V3-class mixture-of-experts models.",
            "",
            *lines,
            "",
            "`expertpipe COMMAND --help` tells more. OVERRIDES are Hydra's: experiment=tiny parallel.pipeline=4",
        ]
    )


# --- train -------------------------------------------------------------------------------------------------------


def _train(argv: list[str]) -> int:
    parser = _parser(
        "train", "Trains what configs/train.yaml and the overrides describe, on as many processes as it says."
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="such as experiment=tiny parallel.pipeline=4")
    parser.add_argument("--print-config", "--cfg", action="store_true", help="print the composed run as YAML and stop")
    parser.add_argument("--check", action="store_true", help="report what is wrong with the run and stop")
    args = parser.parse_intermixed_args(argv)
    if args.print_config:
        from launcher.config import compose, to_yaml

        print(to_yaml(compose(args.overrides)), end="")
        return 0
    os.environ.update(slurm_environment(os.environ))
    return _checked_train(args, argv)


def _checked_train(args: Namespace, argv: list[str]) -> int:
    from launcher.check import checked

    world_size = outer_world_size(os.environ)
    config = checked(args.overrides, world_size=world_size)
    if args.check:
        print(f"{config.name}: nothing wrong; needs {config.parallel.world_size} processes")
        return 0
    if world_size is not None or config.parallel.world_size == 1:
        from launcher.train import train

        return train(config)
    from launcher.local import run_local

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = config.train.threads or max(1, cores // config.parallel.world_size)
    return run_local(
        ["train", *argv], world_size=config.parallel.world_size, run_dir=Path(config.run_dir), threads=threads
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


# --- the other commands ------------------------------------------------------------------------------------------


def _demo(argv: list[str]) -> int:
    from launcher.demo import demo

    return demo(argv)


def _bench(argv: list[str]) -> int:
    from launcher.bench import bench

    return bench(argv)


def _prepare(argv: list[str]) -> int:
    parser = _parser("prepare", "Collects text that is on this machine, builds a tokenizer and writes token files.")
    parser.add_argument("--corpus", choices=("stdlib", "full"), default="stdlib", help="stdlib: Python's own library")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the vocabulary (default 4096)")
    parser.add_argument("--out", type=Path, help="folder to write to (default runs/data/CORPUS)")
    args = parser.parse_args(argv)
    from data.prepare import prepare

    prepare(
        corpus=args.corpus,
        out_dir=args.out or Path("runs/data") / args.corpus,
        vocab_size=args.vocab_size,
        progress=print,
    )
    return 0


def _score(argv: list[str]) -> int:
    parser = _parser("score", "Loss in nats per token of each given sequence.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy of token ids [num_sequences, S]")
    parser.add_argument("--logits", type=Path, help="write the logits there, .npy float32 [num_sequences, S, vocab]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    from launcher.score import score

    return score(checkpoint=args.checkpoint, tokens=args.tokens, logits=args.logits, as_json=args.json)


def _generate(argv: list[str]) -> int:
    parser = _parser("generate", "Continues a prompt.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from launcher.generate import generate

    return generate(
        checkpoint=args.checkpoint,
        prompt=args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
    )


def _doctor(argv: list[str]) -> int:
    parser = _parser(
        "doctor", "What this machine has, and what is missing for each back end. Exit 0: the run could start."
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="the run to judge by (default experiment=tiny)"
    )
    parser.add_argument("--json", action="store_true", help="the rows as one JSON object")
    args = parser.parse_intermixed_args(argv)
    from launcher.doctor import doctor

    return doctor(args.overrides, as_json=args.json)


def _checkpoint(argv: list[str]) -> int:
    parser = _parser("checkpoint", "Converts between our checkpoints and published ones (config.json and safetensors).")
    parser.add_argument("action", choices=("import-hf", "export-hf"))
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("destination", type=Path, metavar="DST")
    args = parser.parse_args(argv)
    from launcher.checkpoint_commands import export_hf, import_hf

    return (import_hf if args.action == "import-hf" else export_hf)(args.source, args.destination)


def _parser(name: str, description: str) -> ArgumentParser:
    return ArgumentParser(prog=f"expertpipe {name}", description=description, allow_abbrev=False)


COMMANDS: dict[str, Command] = {
    "train": Command("train a model; starts its own local processes unless torchrun or srun has", _train),
    "demo": Command("prepare data, train experiment=tiny, score it, draw its curve", _demo),
    "prepare": Command("turn text on this machine into token files", _prepare),
    "score": Command("loss of given token sequences under a checkpoint", _score),
    "generate": Command("continue a prompt", _generate),
    "bench": Command("measure speed: bench step --json [OVERRIDES]", _bench),
    "doctor": Command("what this machine has, what is missing, what to do", _doctor),
    "checkpoint": Command("import-hf SRC DST | export-hf SRC DST: published names and layout", _checkpoint),
}


if __name__ == "__main__":
    sys.exit(main())
