"""Names of the published checkpoint and where each of its tensors lies in ours; no tensor is touched here.

The published layout keeps gate and up projections and every expert apart; ours stacks them. Each published tensor is
a contiguous range of one of ours, so a checkpoint can be read and written range by range. Rotary dimensions are
interleaved in both. The published MTP layer N carries copies of embedding and head.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from model.config import ModelConfig, RopeScaling
from model.counts import Shape, block_shapes


@dataclass(frozen=True)
class Published:
    """One published tensor: its name and shape, and its place in ours (flat elements from `offset`).

    copy: a repetition of a tensor that is also published under another name.
    """

    name: str
    shape: Shape
    ours: str
    offset: int = 0
    copy: bool = False


def published_tensors(c: ModelConfig) -> Iterator[Published]:
    """Every tensor of the unquantised published checkpoint of this architecture, layer by layer."""
    table = (c.vocab_size, c.hidden_size)
    yield Published("model.embed_tokens.weight", table, "embed_tokens.weight")
    for i in range(c.num_hidden_layers):
        yield from _block(c, f"model.layers.{i}.", f"layers.{i}.", moe=c.is_moe(i))
    yield Published("model.norm.weight", (c.hidden_size,), "norm.weight")
    yield Published("lm_head.weight", table, "lm_head.weight")
    for k in range(c.num_nextn_predict_layers):
        theirs = f"model.layers.{c.num_hidden_layers + k}."
        yield Published(theirs + "embed_tokens.weight", table, "embed_tokens.weight", copy=True)
        for name in ("enorm", "hnorm"):
            yield Published(f"{theirs}{name}.weight", (c.hidden_size,), f"mtp.{k}.{name}.weight")
        yield Published(theirs + "eh_proj.weight", (c.hidden_size, 2 * c.hidden_size), f"mtp.{k}.eh_proj.weight")
        yield from _block(c, theirs, f"mtp.{k}.block.", moe=True)
        yield Published(theirs + "shared_head.norm.weight", (c.hidden_size,), f"mtp.{k}.norm.weight")
        yield Published(theirs + "shared_head.head.weight", table, "lm_head.weight", copy=True)


def _block(c: ModelConfig, theirs: str, ours: str, *, moe: bool) -> Iterator[Published]:
    for name, shape in block_shapes(c, moe=moe):
        if name.startswith("mlp.experts."):
            for expert in range(c.n_routed_experts):
                stem = f"{theirs}mlp.experts.{expert}."
                size = expert * shape[1] * shape[2]
                yield from _split(stem, name.removeprefix("mlp.experts."), shape[1:], ours + name, size)
        elif name == "mlp.gate.proj.weight":
            yield Published(theirs + "mlp.gate.weight", shape, ours + name)
            bias = "mlp.gate.e_score_correction_bias"
            yield Published(theirs + bias, (c.n_routed_experts,), ours + bias)
        else:
            stem, _, last = name.rpartition("gate_up_proj")
            if last == ".weight" and stem:
                yield from _split(theirs + stem, "gate_up_proj.weight", shape, ours + name, 0)
            else:
                yield Published(theirs + name, shape, ours + name)


def _split(stem: str, name: str, shape: Shape, ours: str, offset: int) -> Iterator[Published]:
    if name != "gate_up_proj.weight":
        yield Published(stem + name, shape, ours, offset)
        return
    half = (shape[0] // 2, shape[1])
    yield Published(stem + "gate_proj.weight", half, ours, offset)
    yield Published(stem + "up_proj.weight", half, ours, offset + half[0] * half[1])


class ConvertError(ValueError):
    """A published config.json describes something this model is not."""


def published_config(c: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json in the published form; dtype: `bfloat16` or `float32`."""
    ours = {key: value for key, value in asdict(c).items() if key != "mtp_hidden"}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **ours,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "num_key_value_heads": c.num_attention_heads,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": dtype,
    }


def from_published_config(published: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a published config.json; ConvertError lists everything in it that this model cannot be."""
    expected = {
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "rope_interleave": True,
    }
    wrong = [
        f"{key}={published[key]!r}, this model has {value!r}"
        for key, value in expected.items()
        if key in published and published[key] != value
    ]
    if published.get("quantization_config"):
        wrong.append("quantization_config: only unquantised weights can be read, dequantise them first")
    known = {field.name: published[field.name] for field in fields(ModelConfig) if field.name in published}
    # transformers 5 writes rope settings as one dictionary `rope_parameters`.
    rope = dict(published.get("rope_parameters") or published.get("rope_scaling") or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    known["rope_theta"] = rope.pop("rope_theta", published.get("rope_theta", 10000.0))
    known["rope_scaling"] = None
    if kind == "yarn":
        scaling = {field.name: rope[field.name] for field in fields(RopeScaling) if field.name in rope}
        known["rope_scaling"] = RopeScaling(**scaling)
    elif kind != "default":
        wrong.append(f"rope type {kind!r}, this model has 'default' and 'yarn'")
    if wrong:
        raise ConvertError("config.json does not describe this architecture: " + "; ".join(wrong))
    try:
        return ModelConfig(**known)
    except TypeError as error:
        raise ConvertError(f"config.json lacks keys: {error}") from None
