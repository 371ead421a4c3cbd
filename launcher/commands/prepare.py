"""`expertpipe prepare`: text to token files, with a progress bar on a terminal and a line a stage elsewhere."""

import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from launcher.config import ConfigError
from launcher.show.display import MAX_COLUMNS, duration, with_suffix

if TYPE_CHECKING:
    from data.ingest import Ingested, Report
    from data.prepare import Prepared

VOCAB_SIZE = 4096  # of a tokenizer that is made here, unless --vocab-size says another
_RECIPE = ("heldout_fraction", "fim_rate", "split_rate", "seed")  # what is done to documents, wherever they come from
_TAKEN: Mapping[str, tuple[str, ...]] = {
    "inputs": ("inputs", "out", "tokenizer", "text_key", *_RECIPE, "workers", "shard_tokens", "licence", "json"),
    "corpus": ("out", "corpus", "vocab_size", *_RECIPE, "json"),
    "verify": ("verify",),
    "adopt": ("adopt", "tokenizer", "licence", "json"),
}
_NEEDED: Mapping[str, tuple[str, ...]] = {"inputs": ("out", "tokenizer"), "adopt": ("tokenizer",)}
_WHERE_ELSE = {
    "inputs": "only without INPUT",
    "corpus": "only with INPUT",
    "verify": "not with --verify",
    "adopt": "not with --adopt",
}
_STAGES = {"encode": "tokenising", "deduplicate": "looking for duplicates", "write": "writing"}
_LINE_EVERY_SECONDS = 10.0  # between lines of one stage where there is no terminal


class PrepareDisplay:
    """Shows `Report`s on `stream` (stdout when None): a bar on a terminal (`live`), else lines. A context manager."""

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None) -> None:
        out = sys.stdout if stream is None else stream
        self._live = out.isatty() if live is None else live
        self._console = Console(file=out, highlight=False, force_terminal=self._live, soft_wrap=not self._live)
        if self._console.width > MAX_COLUMNS:
            self._console.width = MAX_COLUMNS
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._stage = ""
        self._started = self._shown = time.monotonic()
        self._done_before = 0  # by an earlier call, so that the speed is this call's

    def __enter__(self) -> "PrepareDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def report(self, report: "Report") -> None:
        """Show how far it is."""
        now = time.monotonic()
        begins = report.stage != self._stage
        if begins:
            self._close()
            self._stage, self._started, self._done_before = report.stage, now, report.done
            if self._live:
                self._open(report)
        elapsed = max(now - self._started, 1e-9)
        rate = (report.done - self._done_before) / elapsed
        left = duration((report.total - report.done) / rate) if rate else "-"
        if self._progress is not None:
            text = f"{with_suffix(report.documents)} docs {with_suffix(report.tokens)} tokens"
            self._progress.update(self._task, completed=report.done, counts=text, eta=f"ETA {left}")
            self._progress.refresh()
        elif begins or report.done >= report.total or now - self._shown > _LINE_EVERY_SECONDS:
            self._shown = now
            share = 100 * report.done / max(1, report.total)
            self.note(
                f"{_STAGES[report.stage]:<23}{share:4.0f}%  {with_suffix(report.documents)} documents  "
                f"{with_suffix(report.tokens)} tokens  ETA {left}"
            )

    def note(self, text: str) -> None:
        """Show a line of text."""
        self._console.print(text, markup=False)
        self._console.file.flush()

    def _open(self, report: "Report") -> None:
        self._progress = Progress(
            TextColumn(_STAGES[report.stage]),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[counts]}"),
            TextColumn("{task.fields[eta]}", style="cyan"),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._progress.add_task("", total=report.total, counts="", eta="")
        self._progress.start()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def prepare_command(argv: Sequence[str]) -> int:
    """Runs `expertpipe prepare` with its arguments; the exit code."""
    args = _parse(argv)
    way = next((way for way in ("verify", "adopt", "inputs") if _is_given(getattr(args, way))), "corpus")
    errors = [*_misplaced(args, way), *_missing(args, way)]
    if errors:
        raise ConfigError(errors)
    return {"verify": _verify, "adopt": _adopt, "inputs": _from_inputs, "corpus": _from_corpus}[way](args)


def _misplaced(args: Namespace, way: str) -> list[str]:
    """What was given and would not be read: one message that names all of it."""
    known = dict.fromkeys(name for names in _TAKEN.values() for name in names)
    wrong = [name for name in known if name not in _TAKEN[way] and _is_given(getattr(args, name))]
    return [f"{_and(wrong)}: {_WHERE_ELSE[way]}"] if wrong else []


def _is_given(value: object) -> bool:
    return not (value is None or value is False or value == [])  # a 0 was given


def _missing(args: Namespace, way: str) -> list[str]:
    missing = [name for name in _NEEDED.get(way, ()) if getattr(args, name) is None]
    hint = f"needed with {_and([way])}; --tokenizer takes a tokenizer.json or `deepseek`"
    return [f"{_and(missing)}: {hint}"] if missing else []


def _and(names: Sequence[str]) -> str:
    return " and ".join("INPUT" if name == "inputs" else f"--{name.replace('_', '-')}" for name in names)


def _given(args: Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those that were given; the others keep the default of whoever is called."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _from_corpus(args: Namespace) -> int:
    from data.prepare import prepare

    corpus = args.corpus or "stdlib"
    done = prepare(
        corpus=corpus,
        out_dir=args.out or Path("runs/data") / corpus,
        vocab_size=VOCAB_SIZE if args.vocab_size is None else args.vocab_size,
        progress=_to_stderr if args.json else print,
        **_given(args, _RECIPE),
    )
    if args.json:
        print(_as_json(done, Path(done.train_prefix).parent))
    return 0


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _from_inputs(args: Namespace) -> int:
    from data.encode import Recipe
    from data.ingest import ingest
    from data.tokenizer_file import find_tokenizer

    recipe = Recipe(tokenizer=str(find_tokenizer(args.tokenizer)), **_given(args, ("text_key", *_RECIPE)))
    workers = args.workers if args.workers is not None else len(os.sched_getaffinity(0))
    with PrepareDisplay(sys.stderr if args.json else None) as display:
        done = ingest(
            args.inputs, args.out, recipe, workers=workers, on_progress=display.report,
            **_given(args, ("licence", "shard_tokens")),
        )  # fmt: skip
    if args.json:
        print(_as_json(done, args.out))
    else:
        _tell(done, args.out)
    return 0


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(
        prog="expertpipe prepare", allow_abbrev=False,
        description="Turns JSON lines (.jsonl, .jsonl.gz), parquet and folders of text into token files. A killed call "
        "is continued by the same call. Without INPUT: text that is on this machine, with a tokenizer of its own.",
    )  # fmt: skip
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files and folders, in this order")
    parser.add_argument("--out", type=Path, help="folder to write to (without INPUT: runs/data/CORPUS)")
    parser.add_argument("--tokenizer", help="a tokenizers file (tokenizer.json), or `deepseek` for DeepSeek-V3's")
    parser.add_argument("--text-key", help="JSON key or parquet column of the text (default text)")
    parser.add_argument(
        "--heldout-fraction", type=float,
        help="chance of a document, by its hash (default 0.01; without INPUT 0.02)",
    )  # fmt: skip
    parser.add_argument("--fim-rate", type=float, help="documents turned to fill in the middle (default 0)")
    parser.add_argument("--split-rate", type=float, help="tokens of punctuation and line breaks split (default 0)")
    parser.add_argument("--seed", type=int, help="of turning and splitting (default 0)")
    parser.add_argument("--workers", type=int, help="processes (default: the cores this process may use)")
    parser.add_argument("--shard-tokens", type=int, help="tokens a file (default 8e9)")
    parser.add_argument("--licence", help="terms of the inputs, for the manifest")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    parser.add_argument("--verify", metavar="PREFIX", help="read every byte of PREFIX's files against its manifest")
    parser.add_argument(
        "--corpus", choices=("stdlib", "full"), help="without INPUT; stdlib (default): Python's own library"
    )
    parser.add_argument("--vocab-size", type=int, help=f"of the tokenizer made without INPUT (default {VOCAB_SIZE})")
    parser.add_argument(
        "--adopt", metavar="PREFIX",
        help="check token files of another program, such as Megatron's, and write the manifest that they lack",
    )  # fmt: skip
    return parser.parse_intermixed_args(argv)


def _verify(args: Namespace) -> int:
    from data.tokens import TokenFileError, accept

    problems = accept(args.verify)
    if problems:
        error = TokenFileError("\n".join(problems))
        error.errors = problems  # type: ignore[attr-defined]
        raise error
    print(f"{args.verify}: every file is as its manifest says")
    return 0


def _adopt(args: Namespace) -> int:
    from data.adopt import adopt

    done = adopt(args.adopt, args.tokenizer, **_given(args, ("licence",)))
    manifest = done.manifest
    if args.json:
        result = {"train": args.adopt, "heldout": None, "tokens": manifest.num_tokens}
        result |= {"documents": manifest.num_documents, "documents_ended": done.num_ended}
        print(json.dumps(result | {"tokenizer": manifest.tokenizer_file}))
        return 0
    print(
        f"{args.adopt}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, largest id "
        f"{manifest.max_token_id:,} of {manifest.vocab_size:,}; {args.adopt}.json written, tokenizer in "
        f"{manifest.tokenizer_file}"
    )
    if done.num_ended is None:
        print("  the tokenizer names no end of sentence")
    else:
        hint = "" if done.num_ended == manifest.num_documents else " (preprocess_data.py --append-eod writes it)"
        print(f"  {done.num_ended:,} of the documents end with the tokenizer's end of sentence{hint}")
    print("  no held-out set: `train` needs none; for `score` tokenise text kept apart and adopt it too")
    return 0


def _as_json(done: "Ingested | Prepared", out: Path) -> str:
    result = {
        "train": str(out / "train"),
        "heldout": str(out / "heldout") if done.heldout else None,
        "tokens": done.train.num_tokens,
        "documents": done.train.num_documents,
        "heldout_documents": done.heldout.num_documents if done.heldout else 0,
        "duplicates": done.train.counts["duplicates"],
        "rejected": _rejected(done),
        "rejects_file": str(done.rejects_path),
        "rebuilt": done.rebuilt,
    }
    return json.dumps(result)


def _rejected(done: "Ingested | Prepared") -> dict[str, int]:
    """Documents set aside, by reason."""
    mark = "rejected: "
    return {key.removeprefix(mark): value for key, value in done.train.counts.items() if key.startswith(mark)}


def _tell(done: "Ingested", out: Path) -> None:
    if not done.rebuilt:
        print(f"{out}: complete, made from the same inputs and arguments; nothing to do")
    counts, rejected = done.train.counts, _rejected(done)
    bytes_per_token = done.train.text_bytes / done.train.num_tokens
    print(
        f"{out / 'train'}: {done.train.num_documents:,} documents, {done.train.num_tokens:,} tokens, "
        f"{bytes_per_token:.2f} bytes a token"
    )
    print(f"  {counts['duplicates']:,} exact duplicates left out, {counts['turned']:,} documents turned")
    if done.heldout:
        print(f"{out / 'heldout'}: {done.heldout.num_documents:,} documents, {done.heldout.num_tokens:,} tokens")
    if rejected:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
        print(f"{done.rejects_path}: {sum(rejected.values()):,} set aside: {reasons}")
