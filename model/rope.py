"""Rotary position embedding on interleaved pairs, as in the published weights, with YaRN (report section 4.3).

Dimensions 2i and 2i+1 form the pair that turns by position * theta^(-2i/P). YaRN (arXiv 2309.00071) slows the pairs
whose wavelength exceeds the original context by `factor` and scales the softmax, see `softmax_scale`.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle a position turns each pair by: [P / 2] in FP32."""
    half = config.qk_rope_head_dim // 2
    freq = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    if config.rope_scaling is None:
        return freq
    low, high = _correction_range(config, config.rope_scaling)
    # 1 keeps the pair's own frequency, 0 divides it by the factor; linear between the two bounds.
    keep = 1 - ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq * keep + freq / config.rope_scaling.factor * (1 - keep)


def _correction_range(config: ModelConfig, scaling: RopeScaling) -> tuple[int, int]:
    """Pair indices that make `beta_fast` and `beta_slow` turns over the original context."""
    size = config.qk_rope_head_dim

    def pair(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(config.rope_theta))

    return max(math.floor(pair(scaling.beta_fast)), 0), min(math.ceil(pair(scaling.beta_slow)), size - 1)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor on q.k before the softmax: qk_head_dim^-1/2, under YaRN times (0.1 mscale_all_dim ln factor + 1)^2."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        scale *= _mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def rotations(config: ModelConfig, num_positions: int) -> Tensor:
    """Complex factor of each position and pair: [num_positions, P / 2] complex64."""
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(config))
    magnitude = 1.0
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        magnitude = _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return torch.polar(torch.full_like(angles, magnitude), angles)


def rotate(x_BSHP: Tensor, rotations_SP: Tensor) -> Tensor:
    """Turn the pairs of x [B, S, H, P] by rotations [S, P / 2]; gives FP32. The inverse takes rotations.conj()."""
    pairs = torch.view_as_complex(x_BSHP.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotations_SP[:, None]).flatten(-2)
