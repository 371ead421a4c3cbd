"""The whole run as one frozen dataclass; Hydra composes it, nothing below this file sees a DictConfig."""

from dataclasses import dataclass

from data.config import DataConfig
from model.config import ModelConfig
from optim.config import OptimConfig
from parallel.config import ParallelConfig


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how much, in what pieces, with what arithmetic, and what is written when."""

    steps: int
    global_batch_size: int  # sequences a step, over all data ranks and micro-batches
    micro_batch_size: int = 1  # sequences a micro-batch
    precision: str = "bf16"  # bf16 | fp32: weights and activations; masters and gradients are always FP32
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads a rank; 0: cores / local ranks, at least 1
    checkpoint_every: int = 0  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2
    timeout_seconds: int = 600  # a collective or a message that takes longer ends the run


@dataclass(frozen=True)
class RunConfig:
    """Everything `expertpipe train` needs to know."""

    name: str
    run_dir: str
    model: ModelConfig
    parallel: ParallelConfig
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one pipeline and step, both directions together."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.parallel.data)
