"""Everything that is wrong with the data of a run, at once, before it starts."""

from collections.abc import Mapping

from data.config import PACKINGS, DataConfig
from data.cursor import phase_problems
from data.index import TokenFileError
from data.tokens import Manifest, problems


def config_problems(config: DataConfig, vocab_size: int) -> list[str]:
    """Messages about all sources, their tokenizers, weights and phases; empty if a run can start. Sizes and times only.

    vocab_size: the model's. Never raises for bad data.
    """
    found = phase_problems(config)
    if config.packing not in PACKINGS:
        found.append(f"data.packing={config.packing}: use {' or '.join(PACKINGS)}")
    longest = max(config.sequence_length, *(phase.sequence_length for phase in config.phases), 1)
    manifests = {}
    for prefix in dict.fromkeys(config.prefixes):
        found += problems(prefix, vocab_size, longest)
        try:
            manifests[prefix] = Manifest.read(prefix)
        except TokenFileError:
            continue  # `problems` has said so
    return found + tokenizer_problems(manifests)


def tokenizer_problems(manifests: Mapping[str, Manifest]) -> list[str]:
    """Ids of two tokenizers in one batch would mean different texts. manifests: by prefix."""
    known = [(prefix, manifest.tokenizer_sha256) for prefix, manifest in manifests.items()]
    return [
        f"{prefix}.json: tokenizer {sha256[:12]}, {known[0][0]}.json has {known[0][1][:12]}: prepare all sources of a "
        "blend with one tokenizer"
        for prefix, sha256 in known
        if sha256 != known[0][1]
    ]
