"""Text files to token files in parallel, from wherever an earlier call stopped.

    inputs -> units -> workers: ids of every document -> duplicates out -> shards -> OUT/{train,heldout}.*

The result is a pure function of the inputs' content and the recipe: the number of workers, the cut into units and
restarts leave no trace in it. Finished units and shards stay in OUT/.work until the manifests are written.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from data.assemble import Shard, ShardResult, mark_duplicates, plan_shards, write_shard
from data.encode import Encoder, Recipe, UnitResult, encode_unit, finished
from data.index import TokenFileError, sha256_file, sibling
from data.inputs import InputError, Plan, PrepareError, Reject, Source, named_os_errors, plan, reject_json
from data.tokenizer_file import TOKENIZER_FILE, copy_tokenizer
from data.tokens import WORK_FOLDER, FileRecord, Manifest, SourceRecord, accept, file_problems

RECIPE_VERSION = 2  # counts up whenever the same recipe would give other files
REJECTS_FILE = "rejects.jsonl"
TEXT_FOLDER = ".text"  # inside the output folder: what data/prepare.py collects there before it comes here
R = TypeVar("R")


@dataclass(frozen=True)
class Report:
    """How far it is. stage: encode, deduplicate or write; done and total in its unit: bytes, documents, tokens."""

    stage: str
    done: int
    total: int
    documents: int
    tokens: int
    rejects: int


@dataclass(frozen=True)
class Ingested:
    """What came of it; heldout is None if no document was held out, rebuilt False if all was there already."""

    train: Manifest
    heldout: Manifest | None
    rejects_path: Path
    rebuilt: bool


@dataclass(frozen=True)
class _Job:
    """The parts of one call that its stages share."""

    recipe: Recipe
    encoder: Encoder
    plan: Plan
    sources: tuple[Source, ...]
    out: Path
    work: Path
    arguments: dict[str, Any]
    workers: int
    on_progress: Callable[[Report], None]


def _silent(report: Report) -> None:
    del report


def ingest(
    inputs: Sequence[str | Path | Source],
    out_dir: str | Path,
    recipe: Recipe,
    *,
    workers: int,
    licence: str = "not stated",
    rejects: Sequence[Reject] = (),
    shard_tokens: int = 8_000_000_000,
    on_progress: Callable[[Report], None] = _silent,
) -> Ingested:
    """Tokenises files and folders into OUT; a killed call is continued by the same call.

    workers: processes; 0: this one. licence: of the inputs that say nothing of themselves. rejects: what was set aside
    before. Raises InputError, TokenizerError or PrepareError with what cannot work before
    anything is read, and PrepareError if a worker dies, the system refuses a file or nothing is left to train on.
    """
    require_possible(recipe, shard_tokens=shard_tokens, workers=workers)
    out = Path(out_dir)
    sources = tuple(
        found if isinstance(found, Source) else Source(str(found), Path(found).name, licence, str(found))
        for found in inputs
    )
    with named_os_errors(out):
        made = Encoder(recipe)
        planned = plan([source.path for source in sources], text_key=recipe.text_key)
        planned = replace(planned, rejects=(*rejects, *planned.rejects))
        own = (out / TEXT_FOLDER).resolve()
        paths = [Path(state.path).resolve() for state in planned.files]
        if any(path.is_relative_to(out.resolve()) and not path.is_relative_to(own) for path in paths):
            raise PrepareError(f"{out}: the output folder holds inputs; choose another one")
        arguments = _arguments(recipe, made, planned, shard_tokens, sources)
        job = _Job(recipe, made, planned, sources, out, out / WORK_FOLDER, arguments, workers, on_progress)
        return _complete(job) or _make(job)


def _make(job: _Job) -> Ingested:
    """Everything from the plan to the manifests."""
    out, num_units = job.out, len(job.plan.units)
    _open_work(job)
    results = _encode(job)
    reasons = _rejects(job, results)
    num_read = sum(result.documents for result in results)
    if not num_read:
        names = ", ".join(source.path for source in job.sources)
        raise PrepareError(f"no document in {names}: {len(reasons)} rejects, see {out / REJECTS_FILE}")
    duplicates = mark_duplicates(
        job.work, num_units,
        lambda done, total: job.on_progress(Report("deduplicate", done, total, num_read, 0, len(reasons))),
    )  # fmt: skip
    shards = plan_shards(job.work, num_units, job.arguments["shard_tokens"])
    if shards[0].set_name != "train":
        raise PrepareError(f"every document was held out; heldout_fraction is {job.recipe.heldout_fraction}")
    written = _write(job, shards)
    counts = {"documents_read": num_read, "duplicates": duplicates}
    counts |= {f"rejected: {reason}": count for reason, count in sorted(Counter(reasons).items())}
    copy_tokenizer(job.recipe.tokenizer, out / TOKENIZER_FILE)
    manifests = [_manifest(job, name, shards, written, counts) for name in ("train", "heldout")]
    shutil.rmtree(job.work)
    assert manifests[0] is not None
    return Ingested(manifests[0], manifests[1], out / REJECTS_FILE, rebuilt=True)


def require_possible(recipe: Recipe, *, shard_tokens: int = 1, workers: int = 0) -> None:
    """Raises InputError with every number that cannot be."""
    rates = {"heldout_fraction": recipe.heldout_fraction, "fim_rate": recipe.fim_rate, "split_rate": recipe.split_rate}
    errors = [f"{key} is {value}: it must lie in [0, 1]" for key, value in rates.items() if not 0 <= value <= 1]
    errors += [f"shard_tokens is {shard_tokens}: it must be at least 1"] if shard_tokens < 1 else []
    errors += [f"workers is {workers}: it must be at least 0"] if workers < 0 else []
    if errors:
        raise InputError(errors)


def _arguments(
    recipe: Recipe, made: Encoder, planned: Plan, shard_tokens: int, sources: Sequence[Source]
) -> dict[str, Any]:
    """What decides the result, as the manifest records it."""
    fim = asdict(made.special.fim) if made.special.fim and recipe.fim_rate else None
    # inside their inputs, so that a folder may move
    files = [(_inside(state.path, sources), state.bytes) for state in planned.files]
    listing = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {
        "recipe": RECIPE_VERSION,
        **asdict(recipe),
        "tokenizer": sha256_file(recipe.tokenizer),
        "fim_tokens": fim,
        "end_of_sentence": made.special.end_of_sentence,
        "shard_tokens": shard_tokens,
        "inputs": [source.origin for source in sources],
        "input_files": len(planned.files),
        "input_bytes": sum(state.bytes for state in planned.files),
        "input_listing_sha256": listing,
    }


def _inside(path: str, sources: Sequence[Source]) -> str:
    """Where a file lies in its input, after the input's name."""
    for source in sources:
        if Path(path).is_relative_to(source.path):
            return (Path(source.name) / Path(path).relative_to(source.path)).as_posix()
    return path


def _complete(job: _Job) -> Ingested | None:
    """The output of an earlier call with the same arguments on inputs that have not changed since."""
    path = sibling(job.out / "train", ".json")
    if not path.exists() or job.work.exists():
        return None
    newest = max((state.mtime_ns for state in job.plan.files), default=0)
    names = [name for name in ("train", "heldout") if sibling(job.out / name, ".json").exists()]
    try:
        manifests = [Manifest.read(job.out / name) for name in names]
        for name, manifest in zip(names, manifests, strict=True):
            # a copy has new times: reading it costs less than making it again
            if file_problems(job.out / name, manifest) and accept(job.out / name):
                return None
    except TokenFileError:
        return None
    if names[0] != "train" or manifests[0].arguments != job.arguments or newest > path.stat().st_mtime_ns:
        return None
    return Ingested(manifests[0], manifests[1] if len(manifests) > 1 else None, job.out / REJECTS_FILE, rebuilt=False)


def _open_work(job: _Job) -> None:
    """Keeps the work of a killed call with the same arguments and inputs, else begins anew.

    From here on the old output is being replaced, so no manifest may vouch for a mixture.
    """
    job.work.mkdir(parents=True, exist_ok=True)
    key = json.dumps([job.arguments, [asdict(state) for state in job.plan.files]], sort_keys=True)
    marker = job.work / "plan.json"
    if not marker.exists() or marker.read_text(encoding="utf-8") != key:
        shutil.rmtree(job.work)
        job.work.mkdir()
        temporary = marker.with_suffix(".tmp")
        temporary.write_text(key, encoding="utf-8")
        os.replace(temporary, marker)
    for name in ("train", "heldout"):
        (job.out / f"{name}.json").unlink(missing_ok=True)
    for leftover in job.out.glob("*.tmp-*"):  # of a killed writer
        leftover.unlink()


@contextmanager
def _pool(workers: int) -> Iterator[Callable[..., Future]]:
    """Submits calls to `workers` spawned processes, or runs them at once if there are none."""
    if not workers:

        def now(function: Callable[..., R], *arguments: Any) -> Future:
            future: Future = Future()
            future.set_result(function(*arguments))
            return future

        yield now
        return
    # the workers are the parallelism; the tokenizers package would start threads of its own in each
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield pool.submit
    except BrokenProcessPool as error:
        raise PrepareError("a worker process was killed, perhaps for memory; the same command continues") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode(job: _Job) -> list[UnitResult]:
    units = job.plan.units
    results: dict[int, UnitResult] = {}
    todo = []
    for number in range(len(units)):
        done = finished(job.work, number)
        if done is None:
            todo.append(number)
        else:
            results[number] = done
    _encode_report(job, results)
    with _pool(job.workers) as submit:
        # a bounded number in flight: the list of a large corpus' units need not be pickled at once
        pending: dict[Future, int] = {}
        queue = iter(todo)
        for number in _take(queue, 4 * max(1, job.workers)):
            pending[submit(encode_unit, units[number], number, job.recipe, job.work)] = number
        while pending:
            future = next(as_completed(pending))
            results[pending.pop(future)] = future.result()
            _encode_report(job, results)
            for number in _take(queue, 1):
                pending[submit(encode_unit, units[number], number, job.recipe, job.work)] = number
    return [results[number] for number in range(len(units))]


def _take(queue: Iterator[int], count: int) -> Iterable[int]:
    return [number for _, number in zip(range(count), queue, strict=False)]


def _encode_report(job: _Job, results: dict[int, UnitResult]) -> None:
    done = sum(job.plan.units[number].size_bytes for number in results)
    values = results.values()
    documents, tokens = sum(r.documents for r in values), sum(r.tokens for r in values)
    rejects = sum(len(r.rejects) for r in values) + len(job.plan.rejects)
    job.on_progress(Report("encode", done, job.plan.total_bytes, documents, tokens, rejects))


def _rejects(job: _Job, results: Sequence[UnitResult]) -> list[str]:
    """Writes the rejects file, lines numbered within their files; returns the reasons."""
    reasons = [reject.reason for reject in job.plan.rejects]
    temporary = job.out / f"{REJECTS_FILE}.tmp-{os.getpid()}"
    with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(reject_json(reject) for reject in job.plan.rejects)
        before: Counter[str] = Counter()
        for unit, result in zip(job.plan.units, results, strict=True):
            base = before[unit.paths[0]] if unit.kind == "jsonl" else 0
            for reject in result.rejects:
                reasons.append(reject.reason)
                stream.write(reject_json(replace(reject, line=reject.line + base) if reject.line else reject))
            before[unit.paths[0]] += result.lines
    os.replace(temporary, job.out / REJECTS_FILE)
    return reasons


def _write(job: _Job, shards: Sequence[Shard]) -> list[ShardResult]:
    total = sum(shard.num_tokens for shard in shards)
    sources = [unit.source for unit in job.plan.units]
    results: dict[int, ShardResult] = {}
    with _pool(job.workers) as submit:
        futures = {
            submit(write_shard, shard, job.out, job.work, job.encoder.dtype.name, sources): number
            for number, shard in enumerate(shards)
        }
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            done = sum(result.num_tokens for result in results.values())
            documents = sum(result.num_documents for result in results.values())
            job.on_progress(Report("write", done, total, documents, done, 0))
    return [results[number] for number in range(len(shards))]


def _manifest(
    job: _Job, set_name: str, shards: Sequence[Shard], results: Sequence[ShardResult], counts: dict[str, int]
) -> Manifest | None:
    mine = [(shard, result) for shard, result in zip(shards, results, strict=True) if shard.set_name == set_name]
    if not mine:
        return None
    own = [result for _, result in mine]
    tokenizer = job.out / TOKENIZER_FILE
    files = {name: record for result in own for name, record in result.files.items()}
    files[TOKENIZER_FILE] = FileRecord(tokenizer.stat().st_size, sha256_file(tokenizer))
    content = hashlib.sha256("".join(result.content for result in own).encode()).hexdigest()
    turned, split = sum(result.num_turned for result in own), sum(result.num_split for result in own)
    heldout = {"fim_rate": 0.0, "split_rate": 0.0} if set_name == "heldout" else {}
    manifest = Manifest(
        tokenizer_file=TOKENIZER_FILE,
        tokenizer_sha256=files[TOKENIZER_FILE].sha256,
        vocab_size=job.encoder.special.vocab_size,
        dtype=job.encoder.dtype.name,
        num_tokens=sum(result.num_tokens for result in own),
        num_documents=sum(result.num_documents for result in own),
        max_token_id=max(result.max_token_id for result in own),
        text_bytes=sum(result.text_bytes for result in own),
        files=files,
        sources=tuple(_sources(job, own)),
        arguments=job.arguments | heldout,
        corpus_sha256=content,
        shards=tuple(shard.name for shard, _ in mine) if len(mine) > 1 else (),
        counts=counts | {"turned": turned, "tokens_split": split},
    )
    manifest.write(job.out / set_name)
    return manifest


def _sources(job: _Job, results: Sequence[ShardResult]) -> Iterator[SourceRecord]:
    for number, source in enumerate(job.sources):
        documents = sum(result.source_documents.get(number, 0) for result in results)
        size = sum(result.source_bytes.get(number, 0) for result in results)
        yield SourceRecord(source.name, documents, size, source.licence, source.origin)
