"""Published names and ranges: every tensor of the released checkpoint, every element of ours exactly once."""

import math
from dataclasses import replace

import pytest

from launcher.config import compose
from model.config import ModelConfig, RopeScaling
from model.convert import ConvertError, Published, from_published_config, published_config, published_tensors
from model.counts import parameter_shapes
from tests.model.reference import TINY, YARN

# A sample of the released index: name and shape.
RELEASED: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (129280, 7168),
    "model.layers.0.input_layernorm.weight": (7168,),
    "model.layers.0.mlp.gate_proj.weight": (18432, 7168),
    "model.layers.2.mlp.up_proj.weight": (18432, 7168),
    "model.layers.2.mlp.down_proj.weight": (7168, 18432),
    "model.layers.0.self_attn.q_a_proj.weight": (1536, 7168),
    "model.layers.0.self_attn.q_a_layernorm.weight": (1536,),
    "model.layers.0.self_attn.q_b_proj.weight": (24576, 1536),
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
    "model.layers.60.self_attn.kv_a_layernorm.weight": (512,),
    "model.layers.60.self_attn.kv_b_proj.weight": (32768, 512),
    "model.layers.60.self_attn.o_proj.weight": (7168, 16384),
    "model.layers.3.post_attention_layernorm.weight": (7168,),
    "model.layers.3.mlp.gate.weight": (256, 7168),
    "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
    "model.layers.3.mlp.experts.0.gate_proj.weight": (2048, 7168),
    "model.layers.60.mlp.experts.255.up_proj.weight": (2048, 7168),
    "model.layers.60.mlp.experts.255.down_proj.weight": (7168, 2048),
    "model.layers.60.mlp.shared_experts.gate_proj.weight": (2048, 7168),
    "model.norm.weight": (7168,),
    "lm_head.weight": (129280, 7168),
    "model.layers.61.embed_tokens.weight": (129280, 7168),
    "model.layers.61.enorm.weight": (7168,),
    "model.layers.61.hnorm.weight": (7168,),
    "model.layers.61.eh_proj.weight": (7168, 14336),
    "model.layers.61.self_attn.o_proj.weight": (7168, 16384),
    "model.layers.61.mlp.experts.255.down_proj.weight": (7168, 2048),
    "model.layers.61.shared_head.norm.weight": (7168,),
    "model.layers.61.shared_head.head.weight": (129280, 7168),
}
ABSENT = ("model.layers.0.mlp.gate.weight", "model.layers.3.mlp.gate_proj.weight", "model.layers.62.enorm.weight")


@pytest.fixture(scope="module")
def large() -> dict[str, Published]:
    tensors = list(published_tensors(compose(["model=671b"]).model))
    named = {tensor.name: tensor for tensor in tensors}
    assert len(named) == len(tensors)
    return named


def test_the_671b_checkpoint_has_the_released_tensors(large: dict[str, Published]) -> None:
    """46,183 weights: the released 91,991 tensors less one scale for each of the 45,808 quantised ones."""
    assert len(large) == 46_183
    assert {name: large[name].shape for name in RELEASED} == RELEASED
    assert not [name for name in ABSENT if name in large]


def test_the_671b_checkpoint_has_the_released_number_of_elements(large: dict[str, Published]) -> None:
    """The released F8_E4M3 and BF16 elements and the F32 biases; the other F32 elements there are scales."""
    biases = 59 * 256
    elements = sum(math.prod(tensor.shape) for tensor in large.values())
    assert elements == 680_571_043_840 + 3_918_786_560 + biases


def test_one_released_scale_belongs_to_each_quantised_tensor(large: dict[str, Published]) -> None:
    """Norms, biases, gates, embeddings, heads and eh_proj were released unquantised: that leaves 45,808."""
    plain = ("norm.weight", "bias", "mlp.gate.weight", "embed_tokens.weight", "head.weight", "eh_proj.weight")
    quantised = [name for name in large if not name.endswith(plain)]
    assert len(quantised) == 91_991 - 46_183


CONFIGS = {
    "671b": compose(["model=671b"]).model,
    "16b": compose(["model=16b"]).model,
    "two_depths_two_shared": replace(TINY, num_nextn_predict_layers=2, n_shared_experts=2),
    "no_shared": replace(TINY, n_shared_experts=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_ranges_tile_every_tensor_of_ours_exactly_once(name: str) -> None:
    config = CONFIGS[name]
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config)}
    ranges: dict[str, list[tuple[int, int]]] = {}
    for tensor in published_tensors(config):
        if not tensor.copy:
            ranges.setdefault(tensor.ours, []).append((tensor.offset, math.prod(tensor.shape)))
    biases = [ours for ours in ranges if ours.endswith("e_score_correction_bias")]
    assert len(biases) == config.num_blocks - config.first_k_dense_replace
    assert ranges.keys() - set(biases) == sizes.keys()
    for ours, size in sizes.items():
        end = 0
        for offset, length in sorted(ranges[ours]):
            assert offset == end, f"{ours} at {offset}"
            end += length
        assert end == size, ours


def test_copies_repeat_a_tensor_that_is_published_elsewhere(large: dict[str, Published]) -> None:
    copies = [tensor for tensor in large.values() if tensor.copy]
    assert [tensor.ours for tensor in copies] == ["embed_tokens.weight", "lm_head.weight"]
    originals = {(tensor.ours, tensor.shape) for tensor in large.values() if not tensor.copy}
    assert all((tensor.ours, tensor.shape) in originals for tensor in copies)


@pytest.mark.parametrize("config", [TINY, YARN, CONFIGS["16b"], CONFIGS["671b"]])
def test_a_published_config_reads_back_as_it_was(config: ModelConfig) -> None:
    assert from_published_config(published_config(config, "bfloat16")) == config


def test_newer_rope_keys_are_read_too() -> None:
    published = published_config(YARN, "bfloat16")
    rope = published.pop("rope_scaling")
    theta = published.pop("rope_theta")
    rope["rope_type"] = rope.pop("type")
    assert from_published_config(published | {"rope_parameters": rope | {"rope_theta": theta}}) == YARN
    assert YARN.rope_scaling == RopeScaling(factor=4.0, original_max_position_embeddings=64)


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    published = published_config(TINY, "bfloat16") | {
        "scoring_func": "softmax",
        "tie_word_embeddings": True,
        "quantization_config": {"fmt": "e4m3"},
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    with pytest.raises(ConvertError) as caught:
        from_published_config(published)
    for part in ("scoring_func='softmax'", "tie_word_embeddings=True", "quantization_config", "rope type 'linear'"):
        assert part in str(caught.value)


def test_a_missing_key_is_named() -> None:
    published = published_config(TINY, "bfloat16")
    del published["kv_lora_rank"]
    with pytest.raises(ConvertError, match="kv_lora_rank"):
        from_published_config(published)
