"""`expertpipe prepare`: text to token files, with a progress bar on a terminal and a line a stage elsewhere."""

import json
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from launcher.show.display import MAX_COLUMNS, duration, with_suffix

if TYPE_CHECKING:
    from data.ingest import Ingested, Report

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
    if args.verify is not None:
        return _verify(args.verify)
    if not args.inputs:
        from data.prepare import prepare

        out = args.out or Path("runs/data") / args.corpus
        prepare(corpus=args.corpus, out_dir=out, vocab_size=args.vocab_size, progress=print)
        return 0
    from data.encode import Recipe
    from data.ingest import ingest
    from data.tokenizer_file import TokenizerError, find_tokenizer

    missing = [f"--{name}" for name in ("out", "tokenizer") if getattr(args, name) is None]
    if missing:
        raise TokenizerError(
            f"{' and '.join(missing)}: needed with INPUT; --tokenizer takes a tokenizer.json or `deepseek`"
        )
    recipe = Recipe(
        tokenizer=str(find_tokenizer(args.tokenizer)),
        text_key=args.text_key,
        heldout_fraction=args.heldout_fraction,
        fim_rate=args.fim_rate,
        split_rate=args.split_rate,
        seed=args.seed,
    )
    workers = args.workers if args.workers is not None else len(os.sched_getaffinity(0))
    with PrepareDisplay(sys.stderr if args.json else None) as display:
        done = ingest(
            args.inputs, args.out, recipe, workers=workers, licence=args.licence, shard_tokens=args.shard_tokens,
            on_progress=display.report,
        )  # fmt: skip
    _tell(done, args)
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
    parser.add_argument("--text-key", default="text", help="JSON key or parquet column of the text (default text)")
    parser.add_argument(
        "--heldout-fraction", type=float, default=0.01, help="chance of a document, by its hash (default 0.01)"
    )
    parser.add_argument("--fim-rate", type=float, default=0.0, help="documents turned to fill in the middle")
    parser.add_argument("--split-rate", type=float, default=0.0, help="tokens of punctuation and line breaks split")
    parser.add_argument("--seed", type=int, default=0, help="of turning and splitting")
    parser.add_argument("--workers", type=int, help="processes (default: the cores this process may use)")
    parser.add_argument("--shard-tokens", type=int, default=8_000_000_000, help="tokens a file (default 8e9)")
    parser.add_argument("--licence", default="not stated", help="terms of the inputs, for the manifest")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object on stdout")
    parser.add_argument("--verify", metavar="PREFIX", help="read every byte of PREFIX's files against its manifest")
    parser.add_argument("--corpus", choices=("stdlib", "full"), default="stdlib", help="stdlib: Python's own library")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer made without INPUT")
    return parser.parse_intermixed_args(argv)


def _verify(prefix: str) -> int:
    from data.tokens import TokenFileError, accept

    problems = accept(prefix)
    if problems:
        error = TokenFileError("\n".join(problems))
        error.errors = problems  # type: ignore[attr-defined]
        raise error
    print(f"{prefix}: every file is as its manifest says")
    return 0


def _tell(done: "Ingested", args: Namespace) -> None:
    rejected = {
        key.removeprefix("rejected: "): value
        for key, value in done.train.counts.items()
        if key.startswith("rejected: ")
    }
    if args.json:
        result = {
            "train": str(args.out / "train"),
            "heldout": str(args.out / "heldout") if done.heldout else None,
            "tokens": done.train.num_tokens,
            "documents": done.train.num_documents,
            "heldout_documents": done.heldout.num_documents if done.heldout else 0,
            "duplicates": done.train.counts["duplicates"],
            "rejected": rejected,
            "rejects_file": str(done.rejects_path),
            "rebuilt": done.rebuilt,
        }
        print(json.dumps(result))
        return
    if not done.rebuilt:
        print(f"{args.out}: complete, made from the same inputs and arguments; nothing to do")
    counts = done.train.counts
    bytes_per_token = done.train.text_bytes / done.train.num_tokens
    print(
        f"{args.out / 'train'}: {done.train.num_documents:,} documents, {done.train.num_tokens:,} tokens, "
        f"{bytes_per_token:.2f} bytes a token"
    )
    print(f"  {counts['duplicates']:,} exact duplicates left out, {counts['turned']:,} documents turned")
    if done.heldout:
        print(f"{args.out / 'heldout'}: {done.heldout.num_documents:,} documents, {done.heldout.num_tokens:,} tokens")
    if rejected:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
        print(f"{done.rejects_path}: {sum(rejected.values()):,} set aside: {reasons}")
