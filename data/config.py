"""Where the tokens are and how they are cut, as numbers and paths."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """One tokenised corpus: `prefix`.bin, `prefix`.idx (Megatron's format) and `prefix`.json (our manifest)."""

    prefix: str
    sequence_length: int = 4096
    seed: int = 0
