"""Apply a layout to the model: which stages a rank builds, who shares which weight. The only place with the order."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.counts import parameter_shapes
from model.fp8.quantise import Quantiser
from model.init import initialise
from model.router import Router
from model.transformer import Transformer
from parallel.bucket import LocalParameter
from parallel.expert.dispatchers import Tokens, build_dispatcher
from parallel.expert.wire import QUANTISER
from parallel.mesh import Groups, Mesh
from parallel.pipeline.actions import Schedule


@dataclass(frozen=True)
class Layout:
    """Layers of each stage and pipeline ranks of each stage: where every weight of the model lives."""

    schedule: Schedule
    stages: tuple[range, ...]
    has_mtp: bool

    def stages_of(self, name: str) -> tuple[int, ...]:
        """Stages that hold a parameter; the embedding is on two when MTP reads it at the end."""
        last = len(self.stages) - 1
        top, _, rest = name.partition(".")
        if top == "layers":
            layer = int(rest.partition(".")[0])
            return tuple(s for s, layers in enumerate(self.stages) if layer in layers)
        if top == "embed_tokens":
            return tuple({0, last}) if self.has_mtp else (0,)
        return (last,)

    def holders(self, name: str) -> tuple[int, ...]:
        """Pipeline ranks that hold a parameter."""
        return tuple(sorted({rank for stage in self.stages_of(name) for rank in self.schedule.holders(stage)}))

    def holder_sets(self) -> set[tuple[int, ...]]:
        """Every distinct set of pipeline ranks that share a parameter."""
        names = ["embed_tokens", "lm_head", *(f"layers.{layers.start}" for layers in self.stages)]
        return {self.holders(name) for name in names}


@dataclass(frozen=True)
class SharedRouter:
    """A router and the pipeline ranks that hold a copy of it."""

    router: Router
    holders: tuple[int, ...]


@dataclass(frozen=True)
class LocalModel:
    """One rank's part of the model: its stages, its parameters by global name, its routers by block number."""

    stages: Mapping[int, Transformer]
    parameters: Mapping[str, LocalParameter]
    routers: Mapping[int, SharedRouter]


def build_local_model(
    config: ModelConfig,
    layout: Layout,
    mesh: Mesh,
    groups: Groups,
    *,
    device: torch.device,
    seed: int,
    max_tokens: int | None = None,
    quantiser: Quantiser = QUANTISER,
) -> LocalModel:
    """Build, initialise in FP32 and describe what this rank holds; the same weights whatever the layout.

    max_tokens: of a micro-batch, for dispatchers whose buffers depend on it. quantiser: of rows sent in FP8.
    """
    expert_ids = mesh.expert_ids(config.n_routed_experts)
    tokens = Tokens(config.n_routed_experts, config.num_experts_per_tok, config.hidden_size, max_tokens)
    dispatcher = build_dispatcher(mesh.config, groups.expert, tokens, timeout=groups.timeout, quantiser=quantiser)
    stages: dict[int, Transformer] = {}
    for number in layout.schedule.stages_of(mesh.pipeline_rank):
        with device:
            stage = Transformer(config, layers=layout.stages[number], expert_ids=expert_ids, dispatcher=dispatcher)
        initialise(stage, std=config.initializer_range, seed=seed)
        stages[number] = stage
    _share_embedding(stages)
    return LocalModel(stages, _describe(config, layout, mesh, groups, stages), _routers(layout, stages))


def _share_embedding(stages: Mapping[int, Transformer]) -> None:
    """First and last stage on one rank (DualPipe's ends) use the same embedding, as the report does."""
    holding = [stage for stage in stages.values() if stage.embed_tokens is not None]
    for stage in holding[1:]:
        stage.embed_tokens = holding[0].embed_tokens


def _describe(
    config: ModelConfig, layout: Layout, mesh: Mesh, groups: Groups, stages: Mapping[int, Transformer]
) -> dict[str, LocalParameter]:
    shapes = dict(parameter_shapes(config))
    found: dict[str, LocalParameter] = {}
    for stage in stages.values():
        for name, weight in stage.named_parameters():
            expert = ".mlp.experts." in name
            offset = mesh.expert_rank * weight.numel() if expert else 0
            group = groups.gradient(layout.holders(name), expert=expert)
            # Norms are the only vectors; the report decays all matrices.
            found[name] = LocalParameter(name, weight, shapes[name], offset, group, decay=weight.ndim > 1)
    # All holders must flatten alike, in whatever order they built their stages.
    return {name: found[name] for name in shapes if name in found}


def _routers(layout: Layout, stages: Mapping[int, Transformer]) -> dict[int, SharedRouter]:
    found: dict[int, SharedRouter] = {}
    for number, stage in stages.items():
        for block, router in stage.routers().items():
            found[block] = SharedRouter(router, layout.schedule.holders(number))
    return dict(sorted(found.items()))
