"""What can be wrong in the recipe of a run: schedules over tokens, phases, data, the run before; no torch.

Rules as in launcher/check/run.py: pure functions from the configuration to messages that name key, value and remedy.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.check.layout import check_batch, either
from launcher.config import RunConfig
from optim.config import Segment

if TYPE_CHECKING:
    from data.tokens import Manifest

SEGMENT_SHAPES = ("constant", "linear", "cosine")
LOCAL_VOCABULARY = 1 << 16  # tokens, at most, of a tokenizer made from a corpus of this machine
SCHEDULED = {"lr": "0 to 1", "mtp_lambda": "0 or more", "bias_update_speed": "0 to 1", "fim_rate": "0 to 1"}


# --- schedules ---------------------------------------------------------------------------------------------------


def check_segments(config: RunConfig) -> list[str]:
    """Each schedule over tokens has pieces of known shape, possible values, and none that can never begin."""
    found = []
    for name, words in SCHEDULED.items():
        segments: tuple[Segment, ...] = getattr(config.optim, name)
        if not segments and name != "fim_rate":  # whose data says the rate
            found.append(f"optim.{name}=[]: use at least one segment, such as [{{shape: constant, value: 1e-3}}]")
        for i, segment in enumerate(segments):
            found.extend(_segment_problems(f"optim.{name}.{i}", segment, words, is_last=i == len(segments) - 1))
    batch = config.train.global_batch_size
    for i, segment in enumerate(() if isinstance(batch, int) else batch):
        last = i == len(batch) - 1  # type: ignore[arg-type]
        found.extend(_segment_problems(f"train.global_batch_size.{i}", segment, "0 or more", is_last=last))
    return found


def _segment_problems(key: str, segment: Segment, words: str, *, is_last: bool) -> list[str]:
    found = []
    if segment.shape not in SEGMENT_SHAPES:
        found.append(f"{key}.shape={segment.shape}: use {either(SEGMENT_SHAPES)}")
    high = 1.0 if words == "0 to 1" else math.inf
    if not 0 <= segment.value <= high or segment.value == math.inf:
        found.append(f"{key}.value={segment.value:g}: use a number from {words}")
    if not segment.tokens > 0:
        found.append(f"{key}.tokens={segment.tokens:g}: use a number of tokens above 0, such as 1e9")
    elif segment.tokens == math.inf and segment.shape in ("linear", "cosine"):
        found.append(f"{key}.tokens=inf: a {segment.shape} segment must end; use a number of tokens such as 1e9")
    elif segment.tokens == math.inf and not is_last:
        found.append(f"{key}.tokens=inf: the segments after it never begin; use a number of tokens such as 1e9")
    return found


# --- phases ------------------------------------------------------------------------------------------------------


def check_positions(config: RunConfig) -> list[str]:
    """Sequences of every phase fit the positions that the model knows, and are long enough to predict from."""
    most, depth = config.model.max_position_embeddings, config.model.num_nextn_predict_layers
    lengths = {"data.sequence_length": config.data.sequence_length}
    for i, phase in enumerate(config.data.phases):
        if phase.sequence_length:
            lengths[f"data.phases.{i}.sequence_length"] = phase.sequence_length
    found = []
    for key, length in lengths.items():
        if length > most >= 1:
            found.append(
                f"{key}={length} is more than model.max_position_embeddings={most}: use {most} or less, or "
                f"model.max_position_embeddings={length}"
            )
        elif 1 <= length <= depth:
            found.append(
                f"{key}={length} has no token left to predict at model.num_nextn_predict_layers={depth}: use "
                f"{depth + 1} or more"
            )
    return found


def check_phases(config: RunConfig) -> list[str]:
    """Phases are reached by whole samples, and by whole steps where the sequence length changes."""
    from data.cursor import phase_problems
    from launcher.step_plan import length_problems

    if not all(prefix.strip() for prefix in config.data.prefixes):
        return []
    found = phase_problems(config.data)
    broken = found or min(config.train.steps, config.train.micro_batch_size, config.parallel.data) < 1
    if broken or check_segments(config) or check_batch(config) or min(config.microbatch_counts) < 1:
        return found  # a rule of its own says so
    return length_problems(config)


def check_continuation(config: RunConfig) -> list[str]:
    """A run does not begin with itself."""
    before = config.train.init_from.strip()
    if not before or Path(before) != Path(config.run_dir):
        return []
    return [
        f"train.init_from={before} is this run's own run_dir, which it continues without being told: use "
        "train.init_from=, or another run_dir"
    ]


def check_predecessor(config: RunConfig) -> list[str]:
    """The checkpoint that a run begins with is there, unless the run has gone on from it already."""
    before = config.train.init_from.strip()
    if not before or (Path(config.run_dir) / "checkpoints" / "latest").exists():
        return []
    path = Path(before)
    places = (path / "manifest.json", path / "latest", path / "checkpoints" / "latest")
    if any(place.exists() for place in places):
        return _same_windows(config, path)
    return [
        f"train.init_from={before}: no checkpoint there: train that run first, or use train.init_from= to begin with "
        "random weights"
    ]


def _same_windows(config: RunConfig, path: Path) -> list[str]:
    """A run counts its samples from 0: what the one before began with must not come again, in the same order."""
    pointer = next((p for p in (path / "latest", path / "checkpoints" / "latest") if p.exists()), None)
    folder = path if pointer is None else pointer.parent / pointer.read_text().strip()
    try:
        data = json.loads((folder / "config.json").read_text())["data"]
        prefixes = [data["prefix"], *(source["prefix"] for source in data["blend"])]
        before = (prefixes, data["sequence_length"], data["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # a checkpoint that cannot be read is told where it is loaded
    mine = config.data
    if before != ([*mine.prefixes], mine.sequence_length, mine.seed):
        return []
    return [
        f"data.seed={mine.seed} and data.sequence_length={mine.sequence_length} are those of {path}, whose first "
        f"samples would come again in the same order: use data.seed={mine.seed + 1}"
    ]


# --- data --------------------------------------------------------------------------------------------------------


def check_data(config: RunConfig) -> list[str]:
    """The token files are there, whole, long enough, of one tokenizer, as large as meant, turned often enough."""
    from data.check import config_problems

    model, data = config.model, config.data
    if not all(prefix.strip() for prefix in data.prefixes):
        return []
    missing = [prefix for prefix in data.prefixes if _is_missing(prefix)]
    if missing:
        key = {prefix: f"data.blend.{i - 1}.prefix" if i else "data.prefix" for i, prefix in enumerate(data.prefixes)}
        return [
            f"{key[prefix]}={prefix}: no {prefix}.json there: prepare the data with `{prepare_command(config, prefix)}`"
            for prefix in missing
        ]
    found = []
    for message in config_problems(data, model.vocab_size):
        if message.startswith("data."):
            found.append(message)
        elif "vocab_size" in message:
            found.append(f"model.vocab_size={model.vocab_size}: {message}")
        elif "sequence_length" in message:
            found.append(f"data.sequence_length={data.sequence_length}: {message}")
        else:
            whose = next((i for i, prefix in enumerate(data.prefixes) if message.startswith(prefix)), 0)
            key = f"data.blend.{whose - 1}.prefix" if whose else "data.prefix"
            found.append(f"{key}={data.prefixes[whose]}: {message}")
    return found or [*check_fim(config), *check_vocabulary(config)]


def check_fim(config: RunConfig) -> list[str]:
    """No FIM rate of the run is above the one that its data was prepared with."""
    from data.tokens import Manifest

    rates = [segment.value for segment in config.optim.fim_rate]
    if not rates:
        return []
    found = []
    for prefix in dict.fromkeys(config.data.prefixes):
        manifest = Manifest.read(prefix)
        prepared, corpus = float(manifest.arguments.get("fim_rate", 0.0)), _corpus_of(manifest)
        if max(rates) > prepared:
            again = prepare_command(config, prefix, corpus) if corpus else f"--fim-rate {max(rates):g}"
            found.append(
                f"optim.fim_rate reaches {max(rates):g}, {prefix}.json was prepared with a FIM rate of {prepared:g}: "
                f"prepare the data with `{again}`, or use optim.fim_rate=[] for the prepared rate"
            )
    return found


def check_vocabulary(config: RunConfig) -> list[str]:
    """No tokenizer made for a model with far fewer tokens: most of this one's vocabulary would never be seen.

    Asked of tokenizers made from a corpus of this machine alone: how many tokens they have is a matter of the command.
    """
    from data.tokens import Manifest

    wanted, found = config.model.vocab_size, []
    for prefix in dict.fromkeys(config.data.prefixes):
        manifest = Manifest.read(prefix)
        corpus = _corpus_of(manifest)
        if corpus and 2 * manifest.vocab_size < wanted:
            found.append(
                f"model.vocab_size={wanted}: the tokenizer of {prefix}.json has {manifest.vocab_size} tokens, less "
                f"than half of that: prepare the data with `{prepare_command(config, prefix, corpus)}`, or use "
                f"model.vocab_size={manifest.vocab_size}"
            )
    return found


def is_data_missing(config: RunConfig) -> bool:
    """Whether nothing was prepared under data.prefix, as against something broken."""
    return _is_missing(config.data.prefix)


def _is_missing(prefix: str) -> bool:
    return not any(Path(prefix + ending).exists() for ending in (".json", ".idx", ".bin"))


def _corpus_of(manifest: "Manifest") -> str | None:
    """Which corpus of this machine the data was made from; None for files of the user's."""
    from data.corpus import corpus_named

    return corpus_named([source.origin for source in manifest.sources])


def prepare_command(config: RunConfig, prefix: str | None = None, corpus: str | None = None) -> str:
    """The command that prepares data where this run looks for it: a corpus of this machine, or files of the user's.

    corpus: None for the one that the folder is named after.
    """
    folder = Path(prefix or config.data.prefix).parent
    highest = max((segment.value for segment in config.optim.fim_rate), default=0.0)
    turned = f" --fim-rate {highest:g}" if highest else ""
    if config.model.vocab_size <= LOCAL_VOCABULARY:
        corpus = corpus or ("full" if folder.name.split("-")[0] == "full" else "stdlib")
        return f"expertpipe prepare --corpus {corpus} --vocab-size {config.model.vocab_size} --out {folder}{turned}"
    return f"expertpipe prepare INPUT... --out {folder} --tokenizer deepseek{turned}"
