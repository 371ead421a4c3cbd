"""The program `expertpipe`, also `python -m launcher`: one table of commands, each of which reads its own arguments.

Nothing heavy is imported before a command needs it: help and mistakes answer at once, without torch.
"""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

USER_ERROR, INTERRUPTED = 2, 130  # exit codes


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
    from launcher.start import start

    return start(args.overrides, only_check=args.check)


# --- the other commands ------------------------------------------------------------------------------------------


def _score(argv: list[str]) -> int:
    parser = _parser("score", "Loss in nats per token of each given sequence.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument(
        "--tokens", type=Path, required=True, help=".npy of ids [num_sequences, S], or the PREFIX of a prepared set"
    )
    parser.add_argument("--ema", action="store_true", help="under the average of the weights (optim.ema_decay)")
    parser.add_argument("--logits", type=Path, help="write the logits there, .npy float32 [num_sequences, S, vocab]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args(argv)
    from launcher.commands.score import score

    return score(checkpoint=args.checkpoint, tokens=args.tokens, logits=args.logits, as_json=args.json, ema=args.ema)


def _generate(argv: list[str]) -> int:
    parser = _parser("generate", "Continues a prompt.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from launcher.commands.generate import generate

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
    from launcher.commands.doctor import doctor

    return doctor(args.overrides, as_json=args.json)


def _late(path: str) -> Callable[[list[str]], int]:
    """The function `path`, counted from this package; its module is imported when it is called."""
    module, function = path.rsplit(".", 1)
    return lambda argv: getattr(import_module(f"launcher.{module}"), function)(argv)


def _parser(name: str, description: str) -> ArgumentParser:
    return ArgumentParser(prog=f"expertpipe {name}", description=description, allow_abbrev=False)


COMMANDS: dict[str, Command] = {
    "train": Command("train a model; starts its own local processes unless torchrun or srun has", _train),
    "demo": Command("prepare data, train experiment=tiny, score it, draw its curve", _late("commands.demo.demo")),
    "prepare": Command("turn JSON lines, parquet or text into token files", _late("commands.prepare.prepare_command")),
    "score": Command("loss of given token sequences under a checkpoint", _score),
    "generate": Command("continue a prompt", _generate),
    "bench": Command(
        "measure speed: bench step | alltoall | pipeline | checkpoint | data | kernels", _late("bench.command.bench")
    ),
    "schedule": Command(
        "check, simulate and draw a pipeline schedule; schedule auto says why",
        _late("commands.schedule.schedule_command"),
    ),
    "plan": Command(
        "memory, time and cost of a run before it starts; --validate, --search", _late("plan.command.plan_command")
    ),
    "recipe": Command(
        "every scheduled value of a run and those that follow it, by tokens seen",
        _late("commands.recipe.recipe_command"),
    ),
    "preflight": Command(
        "test nodes and links with a run's layout; names what is bad", _late("commands.preflight.preflight_command")
    ),
    "submit": Command("check, plan and submit a run to Slurm; --dry-run", _late("commands.submit.submit_command")),
    "doctor": Command("what this machine has, what is missing, what to do", _doctor),
    "report": Command("a run as one HTML page, finished or not", _late("commands.report.report_command")),
    "precision": Command(
        "format, tile and bytes of every tensor, in forward and backward", _late("commands.precision.precision_command")
    ),
    "fp8-report": Command(
        "where FP8 hurts: a run's logged amax, saturation, underflow and error", _late("commands.fp8_report.fp8_report")
    ),
    "placement": Command(
        "plan copies of the busiest experts from a run's logged load", _late("commands.placement.placement")
    ),
    "checkpoint": Command(
        "list | show | verify | prune | import-hf | export-hf", _late("checkpoint.commands.checkpoint_command")
    ),
}


if __name__ == "__main__":
    sys.exit(main())
