// FP32 and BF16 (as its 16 bits) as one: what kernels that read either are written in.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr uint32_t SIGN = 0x80000000u, INFINITE = 0x7f800000u, NAN_BITS = 0x7fc00000u;

inline uint32_t bits(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}

inline float number(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

inline float widen(uint16_t x) { return number(uint32_t(x) << 16); }
inline float widen(float x) { return x; }

template <class Out>
inline Out narrow(float x);
template <>
inline float narrow<float>(float x) { return x; }
template <>
inline uint16_t narrow<uint16_t>(float x) {  // to BF16, nearest even; NaN stays NaN
    uint32_t u = bits(x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & ~SIGN) > INFINITE ? 0x7fc0 : uint16_t(rounded);
}

}  // namespace
