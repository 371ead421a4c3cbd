"""Micro-batches straight from the memory map: no worker, no queue, no state but the counts passed in.

A gather of 4096-token windows runs at memory speed, orders of magnitude above what a model consumes, so there is
nothing to hide behind worker processes, and a resumed run needs one integer: the samples consumed so far.
"""

import numpy as np

from data.config import DataConfig
from data.sampler import Sampler, step_sample_ids
from data.tokens import TokenFile


class Loader:
    """Windows of one corpus. Raises TokenFileError for damaged files and SamplerError for too little data."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.token_file = TokenFile(config.prefix)
        self.sampler = Sampler(self.token_file.num_tokens, config.sequence_length, config.seed)
        # one overlapping row per start: picking rows copies whole windows, with no index array of the result's size
        self._rows = np.lib.stride_tricks.sliding_window_view(self.token_file.tokens, config.sequence_length + 1)

    def windows(self, sample_ids: np.ndarray) -> np.ndarray:
        """Tokens int64 [N, S + 1] of sample ids [N]: [:, :-1] are the inputs, [:, 1:] the targets."""
        return self._rows[self.sampler.starts(sample_ids)].astype(np.int64)

    def microbatch(
        self, *, consumed: int, microbatch: int, data_rank: int, data_size: int, micro_batch_size: int
    ) -> np.ndarray:
        """Tokens int64 [B, S + 1] of one data rank's micro-batch; see data.sampler.step_sample_ids."""
        ids = step_sample_ids(
            consumed=consumed,
            microbatch=microbatch,
            data_rank=data_rank,
            data_size=data_size,
            micro_batch_size=micro_batch_size,
        )
        return self.windows(ids)
