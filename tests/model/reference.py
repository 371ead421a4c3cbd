"""The published architecture's implementation in transformers with our weights in it: what parity is measured on."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.convert import published_config, published_tensors
from model.init import initialise
from model.transformer import Transformer

TINY = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_hidden_layers=4,
    num_attention_heads=4, n_routed_experts=8, num_experts_per_tok=3, kv_lora_rank=32, q_lora_rank=48,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, first_k_dense_replace=1, n_group=4, topk_group=2,
    routed_scaling_factor=2.5, max_position_embeddings=256, aux_loss_alpha=1e-3,
)  # fmt: skip
YARN = replace(
    TINY, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)
)


def build(config: ModelConfig, *, seed: int = 0, std: float = 0.05) -> Transformer:
    """A whole FP32 model with norms and router biases off their trivial values."""
    model = Transformer(config)
    initialise(model, std=std, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.empty_like(weight).normal_(0, 0.1, generator=generator))
            assert torch.isfinite(weight).all(), name
        for router in model.routers().values():
            router.e_score_correction_bias.normal_(0, 0.02, generator=generator)
    return model


def tensors(model: Transformer) -> dict[str, Tensor]:
    """Parameters and router biases by our name."""
    return dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")
    }


def reference_model(model: Transformer, **overrides: Any) -> Any:
    """DeepseekV3ForCausalLM with the same weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    settings = published_config(model.config, "float32") | overrides
    if settings["rope_scaling"] is None:
        settings.pop("rope_scaling")
    reference = DeepseekV3ForCausalLM(DeepseekV3Config(**settings)).float()
    mapped = reference_parameters(reference, model.config)
    ours = tensors(model)
    with torch.no_grad():
        for published in published_tensors(model.config):
            if published.name in mapped:
                flat = ours[published.ours].flatten()
                size = mapped[published.name].numel()
                mapped[published.name].copy_(flat[published.offset : published.offset + size].view(published.shape))
    return reference


def reference_parameters(reference: Any, config: ModelConfig, *, grads: bool = False) -> dict[str, Tensor]:
    """The reference's parameters (or gradients) by published name; its fused expert stacks taken apart."""
    found: dict[str, Tensor] = {}
    for name, weight in [*reference.named_parameters(), *reference.named_buffers()]:
        value = weight.grad if grads else weight
        if value is None:
            continue
        if name.endswith("experts.gate_up_proj"):
            for expert in range(config.n_routed_experts):
                gate, up = value[expert].chunk(2)
                stem = name.removesuffix("gate_up_proj")
                found[f"{stem}{expert}.gate_proj.weight"], found[f"{stem}{expert}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for expert in range(config.n_routed_experts):
                found[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = value[expert]
        else:
            found[name] = value
    return found
