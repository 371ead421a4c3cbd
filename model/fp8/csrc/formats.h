// Small floats by their bits: rounding to nearest even, decoding, and the scale of a tile. Included by quantise.cpp alone.

#pragma once

#include "bf16.h"

#include <algorithm>
#include <type_traits>

namespace {

// A float of EXPONENT and MANTISSA bits with bias 2^(EXPONENT-1)-1, rounded to nearest even, saturating at LARGEST.
template <int EXPONENT, int MANTISSA, uint32_t LARGEST>
struct Format {
    static constexpr int BIAS = (1 << (EXPONENT - 1)) - 1, DROP = 23 - MANTISSA;
    static constexpr uint32_t SMALLEST_NORMAL = uint32_t(127 - BIAS + 1) << 23;
    // Adding this float leaves the subnormals' step as the last bit of the sum.
    static constexpr uint32_t ALIGN = uint32_t(127 + 23 - (BIAS - 1) - MANTISSA) << 23;

    // Code of the magnitude |x|, given as the bits of |x|; not for NaN.
    static inline uint32_t encode(uint32_t magnitude) {
        uint32_t normal = (magnitude + (1u << (DROP - 1)) - 1 + ((magnitude >> DROP) & 1)) >> DROP;
        uint32_t subnormal = bits(number(magnitude) + number(ALIGN)) - ALIGN;
        uint32_t code = magnitude < SMALLEST_NORMAL ? subnormal : normal - (uint32_t(127 - BIAS) << MANTISSA);
        return std::min(code, LARGEST);
    }

    // The same rounding, but to the number itself.
    static inline float round(uint32_t magnitude) {
        uint32_t half = (1u << (DROP - 1)) - 1 + ((magnitude >> DROP) & 1);
        float normal = number((magnitude + half) & ~((1u << DROP) - 1));
        float subnormal = (number(magnitude) + number(ALIGN)) - number(ALIGN);
        float limit = number(((LARGEST & ((1u << MANTISSA) - 1)) << DROP) + (((LARGEST >> MANTISSA) + 127 - BIAS) << 23));
        float rounded = magnitude < SMALLEST_NORMAL ? subnormal : normal;
        return rounded < limit ? rounded : limit;
    }

    static inline float decode(uint32_t code) {
        float subnormal = number(code + ALIGN) - number(ALIGN);
        float normal = number((code << DROP) + (uint32_t(127 - BIAS) << 23));
        return code < (1u << MANTISSA) ? subnormal : normal;
    }
};

using E4M3 = Format<4, 3, 0x7e>;    // largest 448, code 0x7f is NaN
using E5M6 = Format<5, 6, 0x7bf>;   // largest 65024; NaN and infinity have no code

// What an exponent byte stands for: 2^(byte - 127), 255 NaN.
inline float power_of_two(uint32_t exponent) {
    return number(exponent == 255 ? NAN_BITS : exponent == 0 ? 1u << 22 : exponent << 23);
}

// 2^(127 - byte); bytes of scales are 1 to 253, or 255.
inline float inverse_power_of_two(uint32_t exponent) {
    return number(exponent == 255 ? NAN_BITS : (254 - exponent) << 23);
}

// The scale of a tile from its largest magnitude; NaN for a tile with a number that is not finite.
struct Scale {
    float scale, inverse;
    uint8_t exponent;
};

inline Scale scale_of(uint32_t amax_bits, float floor, float largest, bool power) {
    if (amax_bits >= INFINITE) return {number(NAN_BITS), number(NAN_BITS), 255};
    float amax = std::max(number(amax_bits), floor);
    uint32_t s = amax == 0 ? bits(1.0f) : std::max(bits(amax / largest), 1u << 23);
    if (!power) return {number(s), 0, 0};
    uint32_t exponent = (s + 0x7fffff) >> 23;
    return {number(exponent << 23), inverse_power_of_two(exponent), uint8_t(exponent)};
}

inline uint16_t magnitude_of(uint16_t x) { return x & 0x7fff; }
inline uint32_t magnitude_of(float x) { return bits(x) & ~SIGN; }
inline uint32_t widen_bits(uint16_t magnitude) { return uint32_t(magnitude) << 16; }
inline uint32_t widen_bits(uint32_t magnitude) { return magnitude; }

}  // namespace
