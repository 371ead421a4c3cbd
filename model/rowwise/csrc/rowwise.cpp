// RMSNorm, SwiGLU, cross entropy and causal softmax on a CPU, each in one pass through the cache where plain torch makes
// five to ten. All arithmetic in FP32, one rounding at the end. Sums run over sixteen fixed lanes (lanes.h), so that a
// result depends neither on the vector width nor on the number of threads.

#include "lanes.h"

#include <cmath>

namespace {

constexpr long ROWS_A_SUM = 64;

template <class T>
void rms_norm(const T* x, const T* weight, long rows, long size, float eps, T* y, float* inverse_rms) {
    for (long i = 0; i < rows; i++, x += size, y += size) {
        float squares = sum(size, [=](long j, auto count) { return load(x + j, count) * load(x + j, count); });
        float inverse = 1.0f / std::sqrt(squares / size + eps);
        each(size, [=](long j, auto count) {
            store(y + j, load(x + j, count) * inverse * load(weight + j, count), count);
        });
        inverse_rms[i] = inverse;
    }
}

// grad_weight [size] and a scratch row of as many: sums of 64 rows first, so that the error stays that of a short sum.
template <class T>
void rms_norm_backward(const T* x, const T* weight, const T* grad, const float* inverse_rms, long rows, long size,
                       T* grad_x, float* grad_weight, float* scratch) {
    std::memset(grad_weight, 0, size * sizeof(float));
    std::memset(scratch, 0, size * sizeof(float));
    for (long i = 0; i < rows; i++, x += size, grad += size, grad_x += size) {
        float inverse = inverse_rms[i];
        float dot = sum(size, [=](long j, auto count) {
            return load(grad + j, count) * load(weight + j, count) * load(x + j, count);
        });
        float pull = dot / size * inverse * inverse;
        each(size, [=](long j, auto count) {
            Lane wide = load(x + j, count), gradient = load(grad + j, count);
            store(grad_x + j, (gradient * load(weight + j, count) - wide * pull) * inverse, count);
            store(scratch + j, load(scratch + j, count) + gradient * wide * inverse, count);
        });
        if ((i + 1) % ROWS_A_SUM == 0 || i + 1 == rows)
            for (long j = 0; j < size; j++) grad_weight[j] += scratch[j], scratch[j] = 0;
    }
}

template <class T>
void swiglu(const T* gate_up, const float* weights, long rows, long size, T* out) {
    for (long i = 0; i < rows; i++, gate_up += 2 * size, out += size) {
        const T *gate = gate_up, *up = gate_up + size;
        float weight = weights ? weights[i] : 1.0f;
        each(size, [=](long j, auto count) {
            Lane x = load(gate + j, count);
            store(out + j, x * sigmoid(x) * load(up + j, count) * weight, count);
        });
    }
}

template <class T>
void swiglu_backward(const T* gate_up, const float* weights, const T* grad, long rows, long size, T* grad_gate_up,
                     float* grad_weights) {
    for (long i = 0; i < rows; i++, gate_up += 2 * size, grad += size, grad_gate_up += 2 * size) {
        const T *gate = gate_up, *up = gate_up + size;
        T *grad_gate = grad_gate_up, *grad_up = grad_gate_up + size;
        float weight = weights ? weights[i] : 1.0f;
        float dot = sum(size, [=](long j, auto count) {
            Lane x = load(gate + j, count), gradient = load(grad + j, count), s = sigmoid(x), u = load(up + j, count);
            store(grad_up + j, gradient * weight * x * s, count);
            store(grad_gate + j, gradient * weight * u * s * (1.0f + x * (1.0f - s)), count);
            return gradient * x * s * u;
        });
        if (weights) grad_weights[i] = dot;
    }
}

// Loss of each row in nats, 0 where the label is negative; over the logits, softmax minus one-hot (0 there). Rows begin
// `stride` elements apart.
template <class T>
void cross_entropy(T* logits, long stride, const int64_t* labels, long rows, long size, float* loss, float* p) {
    for (long i = 0; i < rows; i++, logits += stride) {
        T* row = logits;
        if (labels[i] < 0) {
            std::memset(row, 0, size * sizeof(T));
            loss[i] = 0;
            continue;
        }
        float largest = largest_of(row, size);
        float whole = sum(size, [=](long j, auto count) {
            Lane e = exponential(load(row + j, count) - largest);
            store(p + j, e, count);
            return only(e, count);
        });
        float label = widen(row[labels[i]]), inverse = 1.0f / whole;
        loss[i] = std::log(whole) + largest - label;
        each(size, [=](long j, auto count) { store(row + j, load(p + j, count) * inverse, count); });
        row[labels[i]] = narrow<T>(p[labels[i]] * inverse - 1.0f);
    }
}

// Whole lanes that hold the first n of size elements, so that rows of every length need no piece of a lane.
inline long in_lanes(long n, long size) {
    long whole = (n + LANES - 1) / LANES * LANES;
    return whole < size ? whole : size;
}

// Softmax of the first first + i + 1 of the size scores of row i, zeros after them, in each of the heads: in place, and
// rounded to p where that is BF16.
void causal_softmax(float* scores, long heads, long rows, long size, long first, uint16_t* p) {
    for (long i = 0; i < heads * rows; i++, scores += size) {
        long seen = first + i % rows + 1, lanes = in_lanes(seen, size);
        float* row = scores;
        for (long j = seen; j < lanes; j++) row[j] = -INFINITY;  // e^-87 in a sum of at least one
        float largest = largest_of(row, lanes);
        float inverse = 1.0f / sum(lanes, [=](long j, auto count) {
            Lane e = exponential(load(row + j, count) - largest);
            store(row + j, e, count);
            return only(e, count);
        });
        each(lanes, [=](long j, auto count) { store(row + j, load(row + j, count) * inverse, count); });
        std::memset(row + seen, 0, (size - seen) * sizeof(float));
        if (p) each(size, [=](long j, auto count) { store(p + i * size + j, load(row + j, count), count); });
    }
}

// Over the gradient of p, that of the scores: p (grad - sum of p grad), zeros after the row's own end.
template <class T>
void causal_softmax_backward(const T* p, long heads, long rows, long size, long first, T* grad) {
    for (long i = 0; i < heads * rows; i++, p += size, grad += size) {
        long seen = first + i % rows + 1, lanes = in_lanes(seen, size);
        std::memset(grad + seen, 0, (size - seen) * sizeof(T));
        float dot = sum(lanes, [=](long j, auto count) { return load(p + j, count) * load(grad + j, count); });
        each(lanes, [=](long j, auto count) {
            store(grad + j, load(p + j, count) * (load(grad + j, count) - dot), count);
        });
    }
}

}  // namespace

// bf16: whether tensors of activations are BF16, else FP32. All are dense, row by row, but logits.
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
                             long size, void* grad_gate_up, float* grad_weights) {
    if (bf16)
        swiglu_backward((const uint16_t*)gate_up, weights, (const uint16_t*)grad, rows, size, (uint16_t*)grad_gate_up,
                        grad_weights);
    else
        swiglu_backward((const float*)gate_up, weights, (const float*)grad, rows, size, (float*)grad_gate_up,
                        grad_weights);
}

void rowwise_cross_entropy(int bf16, void* logits, long stride, const int64_t* labels, long rows, long size,
                           float* loss, float* scratch) {
    if (bf16) cross_entropy((uint16_t*)logits, stride, labels, rows, size, loss, scratch);
    else cross_entropy((float*)logits, stride, labels, rows, size, loss, scratch);
}

// scores are FP32; p is BF16, or null.
void rowwise_causal_softmax(float* scores, long heads, long rows, long size, long first, uint16_t* p) {
    causal_softmax(scores, heads, rows, size, first, p);
}

void rowwise_causal_softmax_backward(int bf16, const void* p, long heads, long rows, long size, long first,
                                     void* grad) {
    if (bf16) causal_softmax_backward((const uint16_t*)p, heads, rows, size, first, (uint16_t*)grad);
    else causal_softmax_backward((const float*)p, heads, rows, size, first, (float*)grad);
}

}  // extern "C"
