"""Everything that is wrong with the data of a run, at once, before it starts."""

from collections.abc import Mapping

from data.config import DataConfig
from data.cursor import phase_problems
from data.index import TokenFileError
from data.tokens import Manifest, problems


def config_problems(config: DataConfig, vocab_size: int) -> list[str]:
    """Messages about all sources, their tokenizers, weights and phases; empty if a run can start. Sizes and times only.

    vocab_size: the model's. Never raises for bad data.
    """
    found = phase_problems(config)
    longest = max(config.sequence_length, *(phase.sequence_length for phase in config.phases), 1)
    manifests = {}
    for prefix in dict.fromkeys(config.prefixes):
        found += problems(prefix, vocab_size, longest)
        try:
            manifests[prefix] = Manifest.read(prefix)
        except TokenFileError:
            continue  # `problems` has said so
    return found + tokenizer_problems(manifests) + mask_problems(config, manifests)


def mask_problems(config: DataConfig, manifests: Mapping[str, Manifest]) -> list[str]:
    """A mask that could mask nothing, or a source whose documents it would not find. manifests: by prefix."""
    return [
        f"data.document_mask=true: {prefix}.json has no more documents than files ({manifest.num_documents}), so no "
        "boundary lies inside them: prepare the data with one document an entry, or use data.document_mask=false"
        for prefix, manifest in manifests.items()
        if config.document_mask and manifest.num_documents <= max(1, len(manifest.shards))
    ]


def tokenizer_problems(manifests: Mapping[str, Manifest]) -> list[str]:
    """Ids of two tokenizers in one batch would mean different texts. manifests: by prefix."""
    known = [(prefix, manifest.tokenizer_sha256) for prefix, manifest in manifests.items()]
    return [
        f"{prefix}.json: tokenizer {sha256[:12]}, {known[0][0]}.json has {known[0][1][:12]}: prepare all sources of a "
        "blend with one tokenizer"
        for prefix, sha256 in known
        if sha256 != known[0][1]
    ]
