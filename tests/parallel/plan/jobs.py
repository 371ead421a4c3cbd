"""Jobs that the planner's tests share."""

from dataclasses import replace
from pathlib import Path

import configs
from model.config import ModelConfig
from model.fp8.config import FP8Config
from parallel.config import ParallelConfig
from parallel.plan.hardware import Hardware, read
from parallel.plan.job import Job
from parallel.plan.layers import LayerShape

CLUSTERS = Path(next(iter(configs.__path__))) / "cluster"

V3 = ModelConfig(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
    num_attention_heads=128, n_routed_experts=256, num_experts_per_tok=8, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=1536, n_group=8, topk_group=4, routed_scaling_factor=2.5,
)  # fmt: skip
LAYOUT = ParallelConfig(
    pipeline=16, data=128, expert=64, schedule="dualpipe", dispatcher="collective", dispatch_wire="fp8",
    dispatch_grad_wire="fp8", recompute="report",
)  # fmt: skip

ENGINE = FP8Config("transformer_engine", input_cache="wide", attention_cache="wide", recompute_swiglu=False)


def h800() -> Hardware:
    return read(CLUSTERS / "h800.yaml")


def v3(**changes: object) -> Job:
    job = Job(V3, LAYOUT, h800(), 4096, 1, 15360, "fp8", 14.8e12, bare=True, fp8=ENGINE)
    return replace(job, **changes)  # type: ignore[arg-type]


def small(**changes: object) -> Job:
    """Few layers and ranks: milliseconds."""
    model = replace(V3, num_hidden_layers=8, first_k_dense_replace=1)
    layout = replace(LAYOUT, pipeline=2, data=16, expert=8, schedule="1f1b")
    return replace(v3(model=model, parallel=layout, global_batch_size=128), **changes)  # type: ignore[arg-type]


def v3_layer(**changes: object) -> LayerShape:
    return replace(LayerShape(V3, 4096, 4096, 64, recompute="report"), **changes)  # type: ignore[arg-type]
