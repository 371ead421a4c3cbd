// RMSNorm, SwiGLU and cross entropy on a CPU, each in one pass through the cache where plain torch makes five to ten.
// All arithmetic in FP32, one rounding at the end. Plain C++ that a compiler vectorises: no intrinsics, no library. Sums
// run over 16 fixed lanes, so that a result depends neither on the vector width nor on the number of threads.

#include "bf16.h"

#include <cmath>

namespace {

constexpr long LANES = 16, ROWS_A_SUM = 64;

inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// e^x to 1.5 units in the last place: x = n ln 2 + r, a polynomial for e^r, n into the exponent. NaN stays NaN.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = fused(x, 1.44269504f, 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    float r = fused(n, -0.693145752f, x);
    r = fused(n, -1.42860677e-6f, r);
    float p = 1.98756915e-4f;
    p = fused(p, r, 1.39819995e-3f);
    p = fused(p, r, 8.33345205e-3f);
    p = fused(p, r, 4.16657962e-2f);
    p = fused(p, r, 1.66666657e-1f);
    p = fused(p, r, 0.5f);
    p = fused(p * r, r, r) + 1.0f;
    return p * number(uint32_t(int32_t(n) + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Sum of term(j) for j < n.
template <class Term>
inline float sum(long n, Term term) {
    float lane[LANES] = {};
    long j = 0;
    for (; j + LANES <= n; j += LANES)
        for (long l = 0; l < LANES; l++) lane[l] += term(j + l);
    for (long l = 0; j + l < n; l++) lane[l] += term(j + l);
    for (long width = LANES / 2; width; width /= 2)
        for (long l = 0; l < width; l++) lane[l] += lane[l + width];
    return lane[0];
}

template <class T>
void rms_norm(const T* x, const T* weight, long rows, long size, float eps, T* y, float* inverse_rms) {
    for (long i = 0; i < rows; i++, x += size, y += size) {
        const T* __restrict in = x;
        T* __restrict out = y;
        float inverse = 1.0f / std::sqrt(sum(size, [=](long j) { return widen(in[j]) * widen(in[j]); }) / size + eps);
        for (long j = 0; j < size; j++) out[j] = narrow<T>(widen(in[j]) * inverse * widen(weight[j]));
        inverse_rms[i] = inverse;
    }
}

// grad_weight [size] and a scratch row of as many: sums of 64 rows first, so that the error stays that of a short sum.
template <class T>
void rms_norm_backward(const T* x, const T* weight, const T* grad, const float* inverse_rms, long rows, long size,
                       T* grad_x, float* __restrict grad_weight, float* __restrict scratch) {
    for (long j = 0; j < size; j++) grad_weight[j] = scratch[j] = 0;
    for (long i = 0; i < rows; i++, x += size, grad += size, grad_x += size) {
        const T *__restrict in = x, *__restrict g = grad;
        T* __restrict out = grad_x;
        float inverse = inverse_rms[i];
        float dot = sum(size, [=](long j) { return widen(g[j]) * widen(weight[j]) * widen(in[j]); });
        float pull = dot / size * inverse * inverse;
        for (long j = 0; j < size; j++) {
            float wide = widen(in[j]), gradient = widen(g[j]);
            out[j] = narrow<T>((gradient * widen(weight[j]) - wide * pull) * inverse);
            scratch[j] += gradient * wide * inverse;
        }
        if ((i + 1) % ROWS_A_SUM == 0 || i + 1 == rows)
            for (long j = 0; j < size; j++) grad_weight[j] += scratch[j], scratch[j] = 0;
    }
}

template <class T>
void swiglu(const T* gate_up, const float* weights, long rows, long size, T* out) {
    for (long i = 0; i < rows; i++, gate_up += 2 * size, out += size) {
        const T *__restrict gate = gate_up, *__restrict up = gate_up + size;
        T* __restrict y = out;
        float weight = weights ? weights[i] : 1.0f;
        for (long j = 0; j < size; j++) {
            float x = widen(gate[j]);
            y[j] = narrow<T>(x * sigmoid(x) * widen(up[j]) * weight);
        }
    }
}

template <class T>
void swiglu_backward(const T* gate_up, const float* weights, const T* grad, long rows, long size, T* grad_gate_up,
                     float* grad_weights, float* __restrict scratch) {
    for (long i = 0; i < rows; i++, gate_up += 2 * size, grad += size, grad_gate_up += 2 * size) {
        const T *__restrict gate = gate_up, *__restrict up = gate_up + size, *__restrict g = grad;
        T *__restrict grad_gate = grad_gate_up, *__restrict grad_up = grad_gate_up + size;
        float weight = weights ? weights[i] : 1.0f;
        for (long j = 0; j < size; j++) {
            float x = widen(gate[j]), gradient = widen(g[j]), s = sigmoid(x), u = widen(up[j]);
            scratch[j] = gradient * x * s * u;
            grad_up[j] = narrow<T>(gradient * weight * x * s);
            grad_gate[j] = narrow<T>(gradient * weight * u * s * (1.0f + x * (1.0f - s)));
        }
        if (weights) grad_weights[i] = sum(size, [=](long j) { return scratch[j]; });
    }
}

// Loss of each row in nats, 0 where the label is negative; over the logits, softmax minus one-hot (0 there).
template <class T>
void cross_entropy(T* logits, const int64_t* labels, long rows, long size, float* loss, float* __restrict p) {
    for (long i = 0; i < rows; i++, logits += size) {
        T* __restrict row = logits;
        if (labels[i] < 0) {
            std::memset(row, 0, size * sizeof(T));
            loss[i] = 0;
            continue;
        }
        float top[LANES];
        for (long l = 0; l < LANES; l++) top[l] = widen(row[0]);
        for (long j = 0; j + LANES <= size; j += LANES)
            for (long l = 0; l < LANES; l++) {
                float x = widen(row[j + l]);
                top[l] = x > top[l] ? x : top[l];
            }
        float largest = top[0];
        for (long l = 1; l < LANES; l++) largest = top[l] > largest ? top[l] : largest;
        for (long j = size / LANES * LANES; j < size; j++) {
            float x = widen(row[j]);
            largest = x > largest ? x : largest;
        }
        for (long j = 0; j < size; j++) p[j] = exponential(widen(row[j]) - largest);
        float total = sum(size, [=](long j) { return p[j]; });
        float label = widen(row[labels[i]]), inverse = 1.0f / total;
        loss[i] = std::log(total) + largest - label;
        for (long j = 0; j < size; j++) row[j] = narrow<T>(p[j] * inverse);
        row[labels[i]] = narrow<T>(p[labels[i]] * inverse - 1.0f);
    }
}

}  // namespace

// bf16: whether tensors of activations are BF16, else FP32. All are dense, row by row.
extern "C" {

void rowwise_rms_norm(int bf16, const void* x, const void* weight, long rows, long size, float eps, void* y,
                      float* inverse_rms) {
    if (bf16) rms_norm((const uint16_t*)x, (const uint16_t*)weight, rows, size, eps, (uint16_t*)y, inverse_rms);
    else rms_norm((const float*)x, (const float*)weight, rows, size, eps, (float*)y, inverse_rms);
}

void rowwise_rms_norm_backward(int bf16, const void* x, const void* weight, const void* grad, const float* inverse_rms,
                               long rows, long size, void* grad_x, float* grad_weight, float* scratch) {
    if (bf16)
        rms_norm_backward((const uint16_t*)x, (const uint16_t*)weight, (const uint16_t*)grad, inverse_rms, rows, size,
                          (uint16_t*)grad_x, grad_weight, scratch);
    else
        rms_norm_backward((const float*)x, (const float*)weight, (const float*)grad, inverse_rms, rows, size,
                          (float*)grad_x, grad_weight, scratch);
}

void rowwise_swiglu(int bf16, const void* gate_up, const float* weights, long rows, long size, void* out) {
    if (bf16) swiglu((const uint16_t*)gate_up, weights, rows, size, (uint16_t*)out);
    else swiglu((const float*)gate_up, weights, rows, size, (float*)out);
}

void rowwise_swiglu_backward(int bf16, const void* gate_up, const float* weights, const void* grad, long rows,
                             long size, void* grad_gate_up, float* grad_weights, float* scratch) {
    if (bf16)
        swiglu_backward((const uint16_t*)gate_up, weights, (const uint16_t*)grad, rows, size, (uint16_t*)grad_gate_up,
                        grad_weights, scratch);
    else
        swiglu_backward((const float*)gate_up, weights, (const float*)grad, rows, size, (float*)grad_gate_up,
                        grad_weights, scratch);
}

void rowwise_cross_entropy(int bf16, void* logits, const int64_t* labels, long rows, long size, float* loss,
                           float* scratch) {
    if (bf16) cross_entropy((uint16_t*)logits, labels, rows, size, loss, scratch);
    else cross_entropy((float*)logits, labels, rows, size, loss, scratch);
}

}  // extern "C"
