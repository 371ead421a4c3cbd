"""`expertpipe checkpoint list | show | verify | prune`: what a run's folder holds, and whether it is whole."""

import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import LATEST, TEMPORARY, CheckpointError, checkpoints_in, find, latest, to_delete
from launcher.checkpoint.reader import read_manifest, records_of, verify
from launcher.safety.run_lock import LOCK, RunLock, RunLockError


def checkpoint_command(argv: list[str]) -> int:
    """Parses `expertpipe checkpoint ...` and runs it; the exit code, 1 where something is damaged."""
    parser = ArgumentParser(prog="expertpipe checkpoint", description="Looks after checkpoints and converts them.")
    actions = parser.add_subparsers(dest="action", required=True)

    def add(name: str, help: str, where: str = "a run, its checkpoints, or one of them") -> ArgumentParser:
        action = actions.add_parser(name, help=help, description=help, allow_abbrev=False)
        action.add_argument("path", type=Path, metavar="PATH", help=where)
        return action

    add("list", "one line for each checkpoint of a run, and what else lies there")
    add("show", "what a checkpoint says of itself")
    add("verify", "read every file and compare sizes and checksums; exit 1 if one is damaged")
    prune = add("prune", "delete old checkpoints; the newest that verifies always stays")
    prune.add_argument("--keep", type=int, default=2, metavar="K", help="newest ones to keep, 2 or more (default 2)")
    prune.add_argument("--keep-every", type=int, default=0, metavar="N", help="also keep those at multiples of N steps")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    for name, help in (
        ("import-hf", "our checkpoint of a published folder, BF16 or block-FP8"),
        ("export-hf", "the published layout of a checkpoint"),
    ):
        convert = actions.add_parser(name, help=help, description=help, allow_abbrev=False)
        convert.add_argument("source", type=Path, metavar="SRC")
        convert.add_argument("destination", type=Path, metavar="DST")
        if name == "export-hf":
            convert.add_argument("--dtype", choices=("bf16", "fp32", "fp8"), help="default: what the run trained in")
    args = parser.parse_args(argv)
    if args.action in ("import-hf", "export-hf"):
        from launcher.checkpoint.hf_commands import export_hf, import_hf

        if args.action == "import-hf":
            return import_hf(args.source, args.destination)
        more = (args.dtype,) if args.dtype else ()
        return export_hf(args.source, args.destination, *more)
    run: dict[str, Callable[[], int]] = {
        "list": lambda: list_checkpoints(args.path),
        "show": lambda: show(args.path),
        "verify": lambda: verify_all(args.path),
        "prune": lambda: prune_old(args.path, keep=args.keep, keep_every=args.keep_every, dry_run=args.dry_run),
    }
    return run[args.action]()


def _root(path: Path) -> Path:
    """The folder of checkpoints that is meant by it or by its run; CheckpointError where there is none."""
    for root in (path / "checkpoints", path):
        if root.is_dir() and (checkpoints_in(root) or list(root.glob(f"{TEMPORARY}*")) or (root / LATEST).exists()):
            return root
    raise CheckpointError(f"{path}: no checkpoints here")


def _size(path: Path) -> str:
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return human_bytes(total)


def human_bytes(count: float) -> str:
    """12 B, 3.4 MB, 1.2 TB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def list_checkpoints(path: Path) -> int:
    """One line each: name, tokens, bytes, files, layout; then what is no checkpoint and why."""
    root = _root(path)
    try:
        newest = latest(root)
    except CheckpointError as error:
        print(f"expertpipe: {error}", file=sys.stderr)
        newest = None
    for item in checkpoints_in(root):
        try:
            manifest = read_manifest(item.path)
            layout = manifest["config"]["parallel"]
            words = (
                f"{manifest['progress']['tokens']:>16,} tokens  {_size(item.path):>9}  "
                f"pipeline {layout['pipeline']} x data {layout['data']}, expert {layout['expert']}"
            )
        except (CheckpointError, KeyError, TypeError) as error:
            words = f"damaged: {error}"
        print(f"{item.path.name}  {words}{'  <- latest' if item.path == newest else ''}")
    for other in sorted(root.iterdir()):
        if other.name.startswith(TEMPORARY):
            print(f"{other.name}  {_size(other)}, a save that was cut off or is under way; never loaded")
        elif other.name.startswith("aside-"):
            print(f"{other.name}  {_size(other)}, set aside for a newer one of the same step; never loaded")
    return 0


def show(path: Path) -> int:
    """The manifest in words: progress, layout, versions, digests, files."""
    found = find(path)
    manifest = read_manifest(found)
    files = records_of(found, manifest)
    rows: list[tuple[str, Any]] = [("checkpoint", found)]
    rows += [(key, f"{value:,}") for key, value in manifest.get("progress", {}).items()]
    rows.append(("optimizer steps", f"{manifest['optimizer_steps']:,}" if "optimizer_steps" in manifest else "none"))
    rows.append(("layout", ", ".join(f"{k} {v}" for k, v in manifest.get("layout", {}).items() if v is not None)))
    rows += [(f"{key} digest", value) for key, value in manifest.get("identity", {}).items()]
    rows.append(("versions", ", ".join(f"{key} {value}" for key, value in manifest.get("versions", {}).items())))
    for key, value in rows:
        print(f"{key:<18}{value}")
    for name, record in files.items():
        print(f"  {name:<26}{record.bytes:>16,} bytes  xxh3-128 {record.xxh3_128}")
    return 0


def verify_all(path: Path) -> int:
    """Every checkpoint of a run, or the one that is named; a line each."""
    single = (path / "manifest.json").exists()
    paths = [path] if single else [item.path for item in checkpoints_in(_root(path))]
    damaged = 0
    for found in paths:
        try:
            print(f"{found.name}: whole, {human_bytes(verify(found))} read")
        except CheckpointError as error:
            damaged += 1
            print(f"{found.name}: DAMAGED, {error}")
    return 1 if damaged else 0


def prune_old(path: Path, *, keep: int, keep_every: int, dry_run: bool) -> int:
    """Delete what `train` would, and cut-off saves; never without a newer checkpoint that verifies, nor under a run."""
    if keep < 2:
        raise CheckpointError(f"--keep={keep}: keep 2 or more, the newest may be the one that a crash has cut off")
    root = _root(path)
    doomed = to_delete(root, keep=keep, keep_every=keep_every)
    partial = sorted(root.glob(f"{TEMPORARY}*"))
    if dry_run:
        for old in [*doomed, *partial]:
            print(f"would delete {old.name} ({_size(old)})")
        return 0
    lock = RunLock(root.parent)
    try:
        lock.acquire()
    except RunLockError as error:
        raise CheckpointError(f"{error} ({LOCK}); a run prunes its own") from None
    try:
        for item in checkpoints_in(root)[:keep]:
            verify(item.path)  # CheckpointError: nothing older goes while a newer one is damaged
        for old in [*doomed, *partial]:
            size = _size(old)
            (old / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(old)
            print(f"deleted {old.name} ({size})")
    finally:
        lock.release()
    return 0
