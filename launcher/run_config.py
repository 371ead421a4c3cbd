"""The whole run as one frozen dataclass."""

from dataclasses import dataclass

from data.config import DataConfig
from model.config import ModelConfig
from model.fp8.config import DEFAULT_FP8, FP8Config
from optim.config import OptimConfig, Segment
from optim.ramp import Level, levels
from parallel.config import ParallelConfig


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how much, in what pieces, with what arithmetic, and what is written when."""

    steps: int
    global_batch_size: int | tuple[Segment, ...]  # sequences a step, over all ranks and micro-batches, by tokens seen
    micro_batch_size: int = 1  # sequences a micro-batch
    batch_multiple: int = 0  # of which a growing batch is a multiple; 0: micro_batch_size * parallel.data
    # bf16 | fp32: weights and activations; masters and gradients are always FP32. fp8: bf16, linears in FP8
    precision: str = "bf16"
    # norms, SwiGLU, cross entropy: torch | native (compiled by g++, a CPU) | apex, transformer_engine (norms, a GPU)
    rowwise: str = "torch"
    weight_grad: str = "torch"  # torch | apex | transformer_engine (a GPU): one kernel that adds in FP32
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # CPU threads a rank; 0: cores / local ranks, at least 1
    checkpoint_every: int = 0  # steps between checkpoints; 0: only at the end
    keep_checkpoints: int = 2
    keep_every: int = 0  # steps; checkpoints at multiples of it are never deleted; 0: none of them is special
    checkpoint_async: bool = True  # steps go on while a checkpoint is written from a copy in host memory
    accept_other_tokenizer: bool = False  # go on from a checkpoint of another tokenizer
    accept_other_data: bool = False  # go on from a checkpoint of another data set
    spike_policy: str = "warn"  # warn | skip (the batch) | rollback (to the newest checkpoint, with other data)
    spike_loss: float = 1.0  # nats above the median of the last spike_window steps that make a spike
    spike_grad_norm: float = 20.0  # times their median norm that make a spike
    spike_window: int = 100  # steps
    max_epochs: int = 0  # passes over a source after which the run saves and ends; 0: no limit
    silent_rank_seconds: int = 12  # without a sign of life from a rank until the others end the run
    stuck_seconds: int = 300  # without an action in a step until the run is ended
    expert_counts_every: int = 0  # steps between rows of every expert's tokens in the event log; 0: never
    record_actions_every: int = 0  # steps between those whose pipeline actions go to actions_rank<k>.jsonl; 0: never
    norms_every: int = 1  # steps between norms by group in the event log; 0: never
    rank_events_every: int = 1  # steps between lines of ranks/rank<k>.events.jsonl; 0: none
    mfu_against: str = "auto"  # auto | measured | a cluster of configs/cluster | a YAML file of one: whose BF16 peak
    collapse_steps: int = 20  # in a row of an expert without a token, or of collapse_load, until it is said; 0: never
    collapse_load: float = 0.9  # share of a step's tokens in one expert that counts as collapse
    wandb: str = "off"  # off | offline | online: also tell Weights & Biases
    wandb_project: str = "expertpipe"
    init_from: str = ""  # checkpoint or run whose weights, moments and biases this run begins with; empty: none
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
    fp8: FP8Config = DEFAULT_FP8

    @property
    def _samples(self) -> int:
        return self.train.micro_batch_size * self.parallel.data

    @property
    def batch_levels(self) -> tuple[Level, ...]:
        """Global batch sizes by tokens seen."""
        return levels(self.train.global_batch_size, multiple=self.train.batch_multiple or self._samples)

    @property
    def microbatch_counts(self) -> tuple[int, ...]:
        """Micro-batches of one pipeline and step, both directions together: every number of the run, ascending."""
        return tuple(sorted({level.batch // self._samples for level in self.batch_levels}))

    @property
    def num_microbatches(self) -> int:
        """The largest of `microbatch_counts`."""
        return self.microbatch_counts[-1]
