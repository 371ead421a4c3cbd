"""The layout of a run over ranks, as numbers; no torch."""

from dataclasses import dataclass

DISPATCHERS = ("flat", "collective", "native_host", "native", "deepep")
DISPATCH_WIRES = ("model", "bf16", "fp32", "fp8")
COMBINE_WIRES = ("model", "bf16", "fp32")
# What the kernels send, where that is not all of the above.
KERNEL_WIRES = {
    "native_host": {"dispatch_wire": ("model", "fp8")},
    "native": {"dispatch_wire": ("model", "fp8")},
    "deepep": {
        "dispatch_wire": ("model", "bf16", "fp8"), "dispatch_grad_wire": ("model", "bf16", "fp8"),
        "combine_wire": ("model", "bf16"),
    },
}  # fmt: skip


@dataclass(frozen=True)
class ParallelConfig:
    """How many ranks each axis has and how the pipeline is driven.

    World size = pipeline * data; the expert axis lies inside the data axis. Under a bidirectional schedule every
    stage lives on two pipeline ranks.
    """

    pipeline: int = 1
    data: int = 1
    expert: int = 1
    # gpipe | 1f1b | interleaved | zb1p | zbv | dualpipev | dualpipe, auto: the fastest by simulation, or a CSV file
    schedule: str = "1f1b"
    stages_per_rank: int | None = None  # of schedule=interleaved; None: 2. The other schedules fix their own
    # What schedule=auto reckons with: all-to-all of an MoE layer over its computation where experts are spread (the
    # published trace of 4 layers on H800, EP 64: 114.5 ms over 118), and GiB of a rank for weights and activations.
    all_to_all_over_compute: float = 1.0
    memory_gib: float | None = None  # None: no limit
    # Main-model layers of each stage, first to last; None: balanced by cost, embedding and head counted.
    layers_per_stage: tuple[int, ...] | None = None
    # Transfers to and from experts under computation: off; pairs: of DualPipe's pairs; all: of every chunk.
    overlap: str = "pairs"  # off | pairs | all
    # Computed again in the backward: none; report: norms, attention's up-projections and SwiGLU, as the report does;
    # attend: all of a layer but its experts; layer: the experts too.
    recompute: str = "none"  # none | report | attend | layer
    # flat: one all-to-all, a row for every (token, expert); collective: between nodes, then within the node, each token
    # once over every link; native: the same by a kernel on GPUs, native_host: by its source on the CPUs of one machine;
    # deepep: DeepEP, where it is installed
    dispatcher: str = "collective"
    ranks_per_node: int | None = None  # None: the processes started on each machine
    num_sms: int = 20  # of a GPU, kept for the transfers of native and deepep; the report's number
    # How rows travel (parallel/expert/wire.py): tokens, gradients on the same way, partial sums back.
    dispatch_wire: str = "model"  # model | bf16 | fp32 | fp8
    dispatch_grad_wire: str = "model"  # model | bf16 | fp32 | fp8
    combine_wire: str = "model"  # model | bf16 | fp32

    @property
    def world_size(self) -> int:
        """Ranks the run needs."""
        return self.pipeline * self.data


def wire_problems(config: ParallelConfig) -> list[str]:
    """Wires that the dispatcher does not have, one message each."""
    chosen = {key: getattr(config, key) for key in ("dispatch_wire", "dispatch_grad_wire", "combine_wire")}
    name = config.dispatcher
    if name == "flat":
        return [
            f"parallel.{key}={value} needs parallel.dispatcher=collective, not flat"
            for key, value in chosen.items()
            if value != "model"
        ]
    if name not in KERNEL_WIRES:
        return []
    found = [
        f"parallel.{key}={chosen[key]} with {name}: use {' or '.join(has)}"
        for key, has in KERNEL_WIRES[name].items()
        if chosen[key] not in has
    ]
    if name != "deepep" and chosen["dispatch_grad_wire"] != chosen["dispatch_wire"]:
        found.append(
            f"parallel.dispatch_grad_wire={chosen['dispatch_grad_wire']} with {name}: use "
            f"{chosen['dispatch_wire']}, as parallel.dispatch_wire"
        )
    return found


def sms_problems(config: ParallelConfig) -> list[str]:
    """num_sms that the dispatcher cannot use."""
    if config.dispatcher == "deepep" and config.num_sms % 2:
        return [f"parallel.num_sms={config.num_sms}: deepep takes SMs in pairs, use {config.num_sms + 1}"]
    return []
