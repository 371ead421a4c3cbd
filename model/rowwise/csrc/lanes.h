// Sixteen numbers as one value, in the vector types of GCC and clang: registers of any width serve them, and a sum over
// a row adds up in the same order everywhere. Rows need not be multiples of sixteen: what is missing is read as zero.

#pragma once

#include "bf16.h"

#include <type_traits>

namespace {

constexpr long LANES = 16;
typedef float Lane __attribute__((vector_size(64)));
typedef uint32_t LaneBits __attribute__((vector_size(64)));
typedef int32_t LaneInts __attribute__((vector_size(64)));
typedef uint16_t LaneHalves __attribute__((vector_size(32)));

// How many of the lanes are there: a constant in all but the last piece of a row.
typedef std::integral_constant<long, LANES> All;

template <class To, class From>
inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits of another size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline Lane filled(float x) { return Lane{} + x; }

inline Lane widened(Lane x) { return x; }
inline Lane widened(LaneHalves x) { return same_bits<Lane>(__builtin_convertvector(x, LaneBits) << 16); }

inline void narrowed(Lane x, Lane* out) { *out = x; }
inline void narrowed(Lane x, LaneHalves* out) {  // to BF16, nearest even; NaN stays NaN
    LaneBits u = same_bits<LaneBits>(x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    *out = __builtin_convertvector((u & ~SIGN) > INFINITE ? LaneBits{} + 0x7fc0u : rounded, LaneHalves);
}

template <class T>
using Stored = typename std::conditional<std::is_same<T, float>::value, Lane, LaneHalves>::type;

template <class T, class Count>
inline Lane load(const T* from, Count count) {
    Stored<T> x = {};
    std::memcpy(&x, from, count * sizeof(T));
    return widened(x);
}

template <class T, class Count>
inline void store(T* to, Lane x, Count count) {
    Stored<T> out;
    narrowed(x, &out);
    std::memcpy(to, &out, count * sizeof(T));
}

// The lanes that are there, zeros for the rest.
inline Lane only(Lane x, All) { return x; }
inline Lane only(Lane x, long count) {
    for (long l = count; l < LANES; l++) x[l] = 0;
    return x;
}

// f(j, count) for the pieces of n numbers.
template <class F>
inline void each(long n, F f) {
    long j = 0;
    for (; j + LANES <= n; j += LANES) f(j, All());
    if (j < n) f(j, n - j);
}

// The lanes folded to one by op: l with l + 8, then with l + 4, l + 2 and l + 1.
template <class Op>
inline float folded(Lane x, Op op) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float Four __attribute__((vector_size(16)));
    Eight eight[2];
    std::memcpy(eight, &x, sizeof x);
    Eight half = op(eight[0], eight[1]);
    Four four[2];
    std::memcpy(four, &half, sizeof half);
    Four quarter = op(four[0], four[1]);
    return op(op(quarter[0], quarter[2]), op(quarter[1], quarter[3]));
}

inline float total(Lane x) {
    return folded(x, [](auto a, auto b) { return a + b; });
}

// Sum of term(j, count), whose missing lanes must be zero, over the pieces of n numbers.
template <class Term>
inline float sum(long n, Term term) {
    Lane lanes = {};
    each(n, [&](long j, auto count) { lanes += term(j, count); });
    return total(lanes);
}

// The largest of n numbers, at least one. A NaN may be lost: it comes back with the sum.
template <class T>
inline float largest_of(const T* x, long n) {
    float first = widen(x[0]);
    Lane top = filled(first);
    each(n, [&](long j, auto count) {
        Lane value = load(x + j, count);
        for (long l = count; l < LANES; l++) value[l] = first;
        top = value > top ? value : top;
    });
    return folded(top, [](auto a, auto b) { return a > b ? a : b; });
}

inline Lane fused(Lane a, Lane b, Lane c) {
    Lane out;
    for (long l = 0; l < LANES; l++) out[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return out;
}

// e^x to 1.5 units in the last place: x = n ln 2 + r, a polynomial for e^r, n into the exponent. NaN stays NaN.
inline Lane exponential(Lane x) {
    x = x < -87.0f ? filled(-87.0f) : x;
    x = x > 88.0f ? filled(88.0f) : x;
    Lane n = fused(x, filled(1.44269504f), filled(12582912.0f)) - 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    Lane r = fused(n, filled(-0.693145752f), x);
    r = fused(n, filled(-1.42860677e-6f), r);
    Lane p = filled(1.98756915e-4f);
    p = fused(p, r, filled(1.39819995e-3f));
    p = fused(p, r, filled(8.33345205e-3f));
    p = fused(p, r, filled(4.16657962e-2f));
    p = fused(p, r, filled(1.66666657e-1f));
    p = fused(p, r, filled(0.5f));
    p = fused(p * r, r, r) + 1.0f;
    return p * same_bits<Lane>((__builtin_convertvector(n, LaneInts) + 127) << 23);
}

inline Lane sigmoid(Lane x) { return 1.0f / (1.0f + exponential(-x)); }

}  // namespace
