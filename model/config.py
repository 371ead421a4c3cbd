"""The architecture as numbers: the keys of the published config.json, without torch, so that planners can read it.

Source of names and of the 671B values: the config.json published with DeepSeek-V3, and the technical report
(arXiv 2412.19437) where the two differ (`aux_loss_alpha`, `initializer_range`: the report's).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """YaRN on the decoupled key and query (report section 4.3); used from the context extension on."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    type: str = "yarn"


@dataclass(frozen=True)
class ModelConfig:
    """One DeepSeek-V3-class model. Keys as in the published config.json; the last two are ours."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None  # None: the query is projected from the hidden state at once
    first_k_dense_replace: int = 3
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 1
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    aux_loss_alpha: float = 1e-4
    # Which main-model state the first MTP module reads; unpublished. Serving engines: after the final norm.
    mtp_hidden: str = "after_norm"

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without and the part with rotary position."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers of the main model, MTP modules not counted."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def num_blocks(self) -> int:
        """Transformer blocks in all: the main model's and one for each MTP depth."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` (0-based, MTP blocks last) holds routed experts."""
        return layer >= self.first_k_dense_replace
