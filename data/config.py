"""Where the tokens are and how they are cut and mixed, as numbers and paths."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceConfig:
    """One more corpus of a blend. weight: its share of the samples, relative to the others'."""

    prefix: str
    weight: float = 1.0


@dataclass(frozen=True)
class DataPhase:
    """What changes once `from_tokens` tokens have been seen; what is left out stays as it was.

    sequence_length: of samples from here on, 0: as before. weights: of `prefix` and of every source of `blend`, in
    that order; empty: as before.
    """

    from_tokens: int
    sequence_length: int = 0
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """One tokenised corpus or a blend of several: PREFIX.bin, PREFIX.idx (Megatron's format), PREFIX.json (manifest).

    prefix: the first corpus; its tokenizer is every other's. weight: its share beside `blend`'s.
    document_mask: attention stays inside documents; false: it crosses their ends, as in the report.
    """

    prefix: str
    sequence_length: int = 4096
    seed: int = 0
    weight: float = 1.0
    blend: tuple[SourceConfig, ...] = ()
    phases: tuple[DataPhase, ...] = ()
    document_mask: bool = False

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Every corpus, in the order in which weights are given."""
        return (self.prefix, *(source.prefix for source in self.blend))

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights before the first phase that changes them."""
        return (self.weight, *(source.weight for source in self.blend))
