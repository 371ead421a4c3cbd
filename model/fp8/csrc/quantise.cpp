// Block quantisers of 8 and 12 bit floats, one pass through the cache. The twin in plain torch, which says what each must
// compute to the bit, is quantise.py and e5m6.py. Plain C++ that a compiler vectorises: no intrinsics, no library.

#include "formats.h"

#include <vector>

namespace {

constexpr long TILE = 128;

template <class In>
using Magnitude = decltype(magnitude_of(In()));

template <class In>
inline Magnitude<In> largest_of(const In* __restrict x, long n) {
    Magnitude<In> amax = 0;
    for (long j = 0; j < n; j++) amax = std::max(amax, magnitude_of(x[j]));
    return amax;
}

// The scales of up to 128 neighbouring columns, in the forms that the loops below read.
struct Strip {
    float scale[TILE], inverse[TILE];
    // For power-of-two scales and BF16: magnitudes (as bits, less one) below this are subnormal in E4M3; the BF16
    // exponent bits that stand for E4M3's exponent 0.
    uint16_t subnormal[TILE], base[TILE];
    bool plain;  // the two hold for every column

    inline void set(long from, long to, const Scale& s) {
        for (long j = from; j < to; j++) {
            scale[j] = s.scale, inverse[j] = s.inverse;
            subnormal[j] = uint16_t((s.exponent - 6) * 128 - 1), base[j] = uint16_t((s.exponent - 7) * 128);
        }
        plain = plain && s.exponent > 7 && s.exponent < 247;  // BF16's exponent neither under- nor overflows
    }
};

// One row of at most 128 numbers to E4M3. codes: the bytes; wide: the rounded numbers in BF16, times their scale if the
// scale is a power of two (exact), without it otherwise. Either may be left out.
template <class In, bool POWER, bool CODES, bool WIDE>
inline void encode_any(const In* __restrict x, long n, const Strip& strip, uint8_t* __restrict codes,
                       uint16_t* __restrict wide) {
    for (long j = 0; j < n; j++) {
        float y = POWER ? widen(x[j]) * strip.inverse[j] : widen(x[j]) / strip.scale[j];
        uint32_t u = bits(y), sign = u & SIGN, magnitude = u & ~SIGN;
        bool nan = magnitude > INFINITE;
        if (CODES) {
            uint32_t code = E4M3::encode(magnitude) | (sign >> 24);
            codes[j] = uint8_t(nan ? 0x7f : code);
        }
        if (WIDE) {
            float value = POWER ? E4M3::round(magnitude) * strip.scale[j] : E4M3::round(magnitude);
            uint32_t out = nan ? NAN_BITS : bits(value) | sign;
            wide[j] = uint16_t(out >> 16);
        }
    }
}

// BF16 and a power of two: where nothing is subnormal in E4M3, rounding BF16's own bits is all. Says whether it held.
template <bool CODES, bool WIDE>
inline bool encode_normal(const uint16_t* __restrict x, long n, const Strip& strip, uint8_t* __restrict codes,
                          uint16_t* __restrict wide) {
    uint16_t subnormal = 0;
    for (long j = 0; j < n; j++) {
        uint16_t magnitude = x[j] & 0x7fff, sign = x[j] & 0x8000;
        uint16_t rounded = uint16_t(magnitude + 7 + ((magnitude >> 4) & 1)) & 0xfff0;
        subnormal |= uint16_t(magnitude - 1) < strip.subnormal[j] ? 1 : 0;  // zero is none: less one, it is the largest
        if (CODES) {
            uint16_t above = uint16_t(std::max(rounded, strip.base[j]) - strip.base[j]);
            codes[j] = uint8_t(above >> 4 | sign >> 8);
        }
        if (WIDE) wide[j] = rounded | sign;
    }
    return !subnormal;
}

template <class In, bool POWER, bool CODES, bool WIDE>
inline void encode_row(const In* x, long n, const Strip& strip, uint8_t* codes, uint16_t* wide) {
    if constexpr (POWER && std::is_same_v<In, uint16_t>)
        if (strip.plain && encode_normal<CODES, WIDE>(x, n, strip, codes, wide)) return;
    encode_any<In, POWER, CODES, WIDE>(x, n, strip, codes, wide);
}

struct Job {
    long cols, stride;
    const int64_t* bounds;  // row blocks: block b is rows bounds[b] to bounds[b + 1], at most 128 of them
    long num_blocks;
    float floor;
    uint8_t* codes;
    uint16_t* wide;
    void* scales;
    const int64_t* to;  // block b's first row in `wide`; null: the same as in x
    long transposed;    // if not zero, `wide` is [cols, transposed]: that many numbers from column to column
};

typedef uint16_t Eight __attribute__((vector_size(16)));

// out[j * stride + i] = in[i * TILE + j] for i < num_rows, j < n, in pieces of 8x8.
inline void transpose(const uint16_t* __restrict in, long num_rows, long n, uint16_t* __restrict out, long stride) {
    long i = 0;
    for (; i + 8 <= num_rows; i += 8) {
        long j = 0;
        for (; j + 8 <= n; j += 8) {
            Eight r[8], s[8];
            for (int k = 0; k < 8; k++) std::memcpy(&r[k], in + (i + k) * TILE + j, 16);
            for (int k = 0; k < 4; k++) {  // three rounds of interleaving row k with row k + 4
                s[2 * k] = __builtin_shuffle(r[k], r[k + 4], Eight{0, 8, 1, 9, 2, 10, 3, 11});
                s[2 * k + 1] = __builtin_shuffle(r[k], r[k + 4], Eight{4, 12, 5, 13, 6, 14, 7, 15});
            }
            for (int k = 0; k < 4; k++) {
                r[2 * k] = __builtin_shuffle(s[k], s[k + 4], Eight{0, 8, 1, 9, 2, 10, 3, 11});
                r[2 * k + 1] = __builtin_shuffle(s[k], s[k + 4], Eight{4, 12, 5, 13, 6, 14, 7, 15});
            }
            for (int k = 0; k < 4; k++) {
                s[2 * k] = __builtin_shuffle(r[k], r[k + 4], Eight{0, 8, 1, 9, 2, 10, 3, 11});
                s[2 * k + 1] = __builtin_shuffle(r[k], r[k + 4], Eight{4, 12, 5, 13, 6, 14, 7, 15});
            }
            for (int k = 0; k < 8; k++) std::memcpy(out + (j + k) * stride + i, &s[k], 16);
        }
        for (; j < n; j++)
            for (long k = i; k < i + 8; k++) out[j * stride + k] = in[k * TILE + j];
    }
    for (; i < num_rows; i++)
        for (long j = 0; j < n; j++) out[j * stride + i] = in[i * TILE + j];
}

template <bool POWER>
inline void store_scale(void* scales, long index, const Scale& scale) {
    if (POWER)
        static_cast<uint8_t*>(scales)[index] = scale.exponent;
    else
        static_cast<float*>(scales)[index] = scale.scale;
}

// Rows row to row + num_rows, columns col to col + n: one 128x128 block, or up to 128 tiles of 128x1, or (num_rows 1)
// one tile of 1x128. `index`: where the first scale goes.
template <class In, bool POWER, bool CODES, bool WIDE, bool BY_COLUMN>
void encode_block(const In* x, const Job& job, long row, long num_rows, long col, long n, long index, long to_row) {
    Strip strip;
    strip.plain = true;
    const In* first = x + row * job.stride + col;
    if (BY_COLUMN) {
        Magnitude<In> amax[TILE] = {0};
        for (long i = 0; i < num_rows; i++) {
            const In* __restrict from = first + i * job.stride;
            for (long j = 0; j < n; j++) amax[j] = std::max(amax[j], magnitude_of(from[j]));
        }
        for (long j = 0; j < n; j++) {
            Scale s = scale_of(widen_bits(amax[j]), job.floor, 448.0f, POWER);
            strip.set(j, j + 1, s);
            store_scale<POWER>(job.scales, index + j, s);
        }
    } else {
        Magnitude<In> amax = 0;
        for (long i = 0; i < num_rows; i++) amax = std::max(amax, largest_of(first + i * job.stride, n));
        Scale s = scale_of(widen_bits(amax), job.floor, 448.0f, POWER);
        strip.set(0, n, s);
        store_scale<POWER>(job.scales, index, s);
    }
    uint16_t turned[WIDE && BY_COLUMN ? TILE * TILE : 1];
    bool turn = WIDE && BY_COLUMN && job.transposed;
    for (long i = 0; i < num_rows; i++) {
        uint8_t* codes = CODES ? job.codes + (row + i) * job.cols + col : nullptr;
        uint16_t* wide = turn ? turned + i * TILE : WIDE ? job.wide + (to_row + i) * job.cols + col : nullptr;
        encode_row<In, POWER, CODES, WIDE>(first + i * job.stride, n, strip, codes, wide);
    }
    if (turn) {  // by way of a buffer: whole cache lines go out, since columns may lie a power of two apart
        uint16_t columns[WIDE && BY_COLUMN ? TILE * TILE : 1];
        transpose(turned, num_rows, n, columns, TILE);
        for (long j = 0; j < n; j++)
            std::memcpy(job.wide + (col + j) * job.transposed + to_row, columns + j * TILE, 2 * num_rows);
    }
}

template <class In, bool POWER, bool CODES, bool WIDE>
void encode_all(const In* x, const Job& job, int tile_rows, int tile_cols) {
    long strips = (job.cols + TILE - 1) / TILE;
    for (long b = 0; b < job.num_blocks; b++) {
        long start = job.bounds[b], num_rows = job.bounds[b + 1] - start, to_row = job.to ? job.to[b] : start;
        for (long strip = 0; strip < strips; strip++) {
            long col = strip * TILE, n = std::min(TILE, job.cols - col);
            if (tile_cols == 1)
                encode_block<In, POWER, CODES, WIDE, true>(x, job, start, num_rows, col, n, b * job.cols + col, to_row);
            else if (tile_rows == TILE)
                encode_block<In, POWER, CODES, WIDE, false>(x, job, start, num_rows, col, n, b * strips + strip, to_row);
        }
        if (tile_rows == 1)
            for (long i = start; i < start + num_rows; i++)
                for (long strip = 0; strip < strips; strip++) {
                    long col = strip * TILE, n = std::min(TILE, job.cols - col);
                    encode_block<In, POWER, CODES, WIDE, false>(x, job, i, 1, col, n, i * strips + strip, to_row + i - start);
                }
    }
}

template <class In, bool POWER>
void encode_outputs(const In* x, const Job& job, int tile_rows, int tile_cols) {
    if (job.codes && job.wide)
        encode_all<In, POWER, true, true>(x, job, tile_rows, tile_cols);
    else if (job.codes)
        encode_all<In, POWER, true, false>(x, job, tile_rows, tile_cols);
    else
        encode_all<In, POWER, false, true>(x, job, tile_rows, tile_cols);
}

template <class In>
void encode(const In* x, const Job& job, int tile_rows, int tile_cols, bool power) {
    if (power)
        encode_outputs<In, true>(x, job, tile_rows, tile_cols);
    else
        encode_outputs<In, false>(x, job, tile_rows, tile_cols);
}

template <class Out, bool APPLY>
inline void decode_any(const uint8_t* __restrict codes, long n, const Strip& strip, Out* __restrict out) {
    for (long j = 0; j < n; j++) {
        uint32_t code = codes[j] & 0x7fu, sign = uint32_t(codes[j] & 0x80u) << 24;
        uint32_t magnitude = code == 0x7f ? NAN_BITS : bits(E4M3::decode(code));
        float value = number(magnitude | sign);
        out[j] = narrow<Out>(APPLY ? value * strip.scale[j] : value);
    }
}

// As encode_normal, the other way.
inline bool decode_normal(const uint8_t* __restrict codes, long n, const Strip& strip, uint16_t* __restrict out) {
    uint16_t least = 0xffff, most = 0;  // of the codes less one, where zero is the largest
    for (long j = 0; j < n; j++) {
        uint16_t byte = codes[j], code = byte & 0x7f, before = uint16_t(code - 1);
        least = std::min(least, before), most = std::max(most, code);
        uint16_t magnitude = uint16_t(uint16_t(code << 4) + strip.base[j]);
        uint16_t nonzero = uint16_t(int16_t(uint16_t(0) - code) >> 15);  // all ones, or zero for code 0
        out[j] = uint16_t((magnitude & nonzero) | uint16_t((byte & 0x80) << 8));
    }
    return least >= 7 && most < 0x7f;
}

template <class Out, bool APPLY>
void decode_rows(const uint8_t* codes, const Job& job, const void* scales, int tile_rows, int tile_cols, bool power,
                 Out* out) {
    long strips = (job.cols + TILE - 1) / TILE, per_row = tile_cols == 1 ? job.cols : strips;
    auto scale_at = [&](long index) {
        if (!power) return Scale{static_cast<const float*>(scales)[index], 0, 0};
        uint8_t exponent = static_cast<const uint8_t*>(scales)[index];
        return Scale{power_of_two(exponent), 0, exponent};
    };
    Strip now;
    now.plain = false;
    for (long b = 0; b < job.num_blocks; b++)
        for (long strip = 0; strip < strips; strip++) {
            long col = strip * TILE, n = std::min(TILE, job.cols - col);
            for (long i = job.bounds[b]; i < job.bounds[b + 1]; i++) {
                bool fresh = tile_rows == 1 || i == job.bounds[b];
                if (APPLY && fresh) {
                    long index = (tile_rows == 1 ? i : b) * per_row + (tile_cols == 1 ? col : strip);
                    now.plain = power;
                    if (tile_cols == 1)
                        for (long j = 0; j < n; j++) now.set(j, j + 1, scale_at(index + j));
                    else
                        now.set(0, n, scale_at(index));
                }
                const uint8_t* from = codes + i * job.cols + col;
                Out* to = out + i * job.cols + col;
                if constexpr (APPLY && std::is_same_v<Out, uint16_t>)
                    if (now.plain && decode_normal(from, n, now, to)) continue;
                decode_any<Out, APPLY>(from, n, now, to);
            }
        }
}

// Elements start to start + count of the flat matrix, cut at rows and strips, in the order of blocks: f(block, strip,
// offset, n, fresh) for n neighbours from start + offset on, all of one tile; fresh: the first of that tile.
template <class F>
void for_parts(long start, long count, long cols, const int64_t* bounds, long num_blocks, F f) {
    long stop = start + count, strips = (cols + TILE - 1) / TILE;
    for (long b = std::upper_bound(bounds, bounds + num_blocks + 1, start / cols) - bounds - 1; b < num_blocks; b++) {
        if (bounds[b] * cols >= stop) return;
        long first = std::max<long>(bounds[b], start / cols), last = std::min<long>(bounds[b + 1], (stop + cols - 1) / cols);
        for (long strip = 0; strip < strips; strip++) {
            bool fresh = true;
            for (long i = first; i < last; i++) {
                long from = std::max(start, i * cols + strip * TILE);
                long to = std::min(stop, i * cols + std::min(cols, (strip + 1) * TILE));
                if (from >= to) continue;
                f(b, strip, from - start, to - from, fresh);
                fresh = false;
            }
        }
    }
}

template <bool POWER>
void encode_part(const float* x, long start, long count, long cols, const int64_t* bounds, long num_blocks,
                 const void* scales, uint8_t* codes) {
    long strips = (cols + TILE - 1) / TILE;
    Strip now;
    now.plain = false;
    for_parts(start, count, cols, bounds, num_blocks, [&](long b, long strip, long at, long n, bool fresh) {
        if (fresh) {
            long index = b * strips + strip;
            uint32_t exponent = POWER ? static_cast<const uint8_t*>(scales)[index] : 0;
            Scale s = POWER ? Scale{power_of_two(exponent), inverse_power_of_two(exponent), uint8_t(exponent)}
                            : Scale{static_cast<const float*>(scales)[index], 0, 0};
            now.set(0, TILE, s);
        }
        encode_any<float, POWER, true, false>(x + at, n, now, codes + at, nullptr);
    });
}

template <class In>
void encode_e5m6(const In* x, long rows, long cols, long stride, float floor, uint8_t* high, uint8_t* low, uint8_t* out) {
    long strips = (cols + TILE - 1) / TILE;
    for (long i = 0; i < rows; i++)
        for (long strip = 0; strip < strips; strip++) {
            long col = strip * TILE, n = std::min(TILE, cols - col), half = (n + 1) / 2;
            const In* from = x + i * stride + col;
            Scale s = scale_of(widen_bits(largest_of(from, n)), floor, 65024.0f, true);
            out[i * strips + strip] = s.exponent;
            uint8_t nibble[TILE] = {0};
            uint8_t* to = high + i * cols + col;
            for (long j = 0; j < n; j++) {
                uint32_t u = bits(widen(from[j]) * s.inverse), magnitude = u & ~SIGN;
                uint32_t code = magnitude > INFINITE ? 0 : E5M6::encode(magnitude) | ((u & SIGN) >> 20);
                to[j] = uint8_t(code >> 4);
                nibble[j] = uint8_t(code & 15);
            }
            uint8_t* packed = low + i * ((cols + 1) / 2) + col / 2;
            for (long j = 0; j < half; j++) packed[j] = uint8_t(nibble[j] | (j + half < n ? nibble[j + half] << 4 : 0));
        }
}

void decode_e5m6(const uint8_t* high, const uint8_t* low, const uint8_t* exponents, long rows, long cols, uint16_t* out) {
    long strips = (cols + TILE - 1) / TILE;
    for (long i = 0; i < rows; i++)
        for (long strip = 0; strip < strips; strip++) {
            long col = strip * TILE, n = std::min(TILE, cols - col), half = (n + 1) / 2;
            uint32_t exponent = exponents[i * strips + strip];
            float scale = power_of_two(exponent);
            const uint8_t* packed = low + i * ((cols + 1) / 2) + col / 2;
            uint8_t nibble[2 * TILE];  // half <= 64; the compiler does not see it
            for (long j = 0; j < half; j++) nibble[j] = packed[j] & 15, nibble[j + half] = packed[j] >> 4;
            for (long j = 0; j < n; j++) {
                uint32_t code = uint32_t(high[i * cols + col + j]) << 4 | nibble[j];
                float value = E5M6::decode(code & 0x7ff) * scale;
                out[i * cols + col + j] = narrow<uint16_t>(number(bits(value) | (code >> 11) << 31));
            }
        }
}

}  // namespace

extern "C" {

// x: BF16 or FP32 [rows, cols], rows `stride` numbers apart. codes, wide: [rows, cols], either may be null.
// scales: FP32 or one byte each, [rows or blocks, strips or cols] as the tile says.
void fp8_quantise(const void* x, int is_float, long cols, long stride, const int64_t* bounds, long num_blocks,
                  int tile_rows, int tile_cols, int power_of_two, float floor, uint8_t* codes, uint16_t* wide,
                  void* scales, const int64_t* to, long transposed) {
    Job job{cols, stride, bounds, num_blocks, floor, codes, wide, scales, to, transposed};
    if (is_float)
        encode(static_cast<const float*>(x), job, tile_rows, tile_cols, power_of_two);
    else
        encode(static_cast<const uint16_t*>(x), job, tile_rows, tile_cols, power_of_two);
}

// out: BF16 or FP32 [rows, cols]; scales null: the codes' own values.
void fp8_dequantise(const uint8_t* codes, const void* scales, long cols, const int64_t* bounds, long num_blocks,
                    int tile_rows, int tile_cols, int power_of_two, int is_float, void* out) {
    Job job{cols, cols, bounds, num_blocks, 0, nullptr, nullptr, nullptr, nullptr, 0};
    auto run = [&](auto* to) {
        using Out = std::remove_reference_t<decltype(*to)>;
        if (scales)
            decode_rows<Out, true>(codes, job, scales, tile_rows, tile_cols, power_of_two, to);
        else
            decode_rows<Out, false>(codes, job, scales, tile_rows, tile_cols, power_of_two, to);
    };
    if (is_float)
        run(static_cast<float*>(out));
    else
        run(static_cast<uint16_t*>(out));
}

// x: FP32 elements start to start + count of a flat matrix of `cols` columns. amax [blocks, strips], zeros at first.
void fp8_amax_of_part(const float* x, long start, long count, long cols, const int64_t* bounds, long num_blocks,
                      float* amax) {
    long strips = (cols + TILE - 1) / TILE;
    for_parts(start, count, cols, bounds, num_blocks, [&](long b, long strip, long at, long n, bool) {
        uint32_t found = std::min(largest_of(x + at, n), INFINITE);
        float& most = amax[b * strips + strip];
        most = number(std::max(bits(most), found));
    });
}

// The same elements to E4M3 with the scales [blocks, strips] of the whole matrix, FP32 or one byte each.
void fp8_encode_part(const float* x, long start, long count, long cols, const int64_t* bounds, long num_blocks,
                     const void* scales, int power_of_two, uint8_t* codes) {
    (power_of_two ? encode_part<true> : encode_part<false>)(x, start, count, cols, bounds, num_blocks, scales, codes);
}

// E4M3 in 1x128 tiles with exponents -> BF16 rounded in 128x1 tiles with exponents `scales`, a block of rows at a time.
void fp8_requantise(const uint8_t* codes, const uint8_t* exponents, long cols, const int64_t* bounds, long num_blocks,
                    float floor, uint16_t* wide, uint8_t* scales, const int64_t* to, long transposed) {
    std::vector<uint16_t> scratch(TILE * cols);
    long strips = (cols + TILE - 1) / TILE;
    for (long b = 0; b < num_blocks; b++) {
        int64_t local[2] = {0, bounds[b + 1] - bounds[b]};
        Job in{cols, cols, local, 1, 0, nullptr, nullptr, nullptr, nullptr, 0};
        decode_rows<uint16_t, true>(codes + bounds[b] * cols, in, exponents + bounds[b] * strips, 1, TILE, true,
                                    scratch.data());
        Job out{cols, cols, local, 1, floor, nullptr, wide, scales + b * cols, to + b, transposed};
        encode_all<uint16_t, true, false, true>(scratch.data(), out, TILE, 1);
    }
}

// high [rows, cols], low [rows, (cols + 1) / 2], exponents [rows, strips].
void e5m6_quantise(const void* x, int is_float, long rows, long cols, long stride, float floor, uint8_t* high,
                   uint8_t* low, uint8_t* exponents) {
    if (is_float)
        encode_e5m6(static_cast<const float*>(x), rows, cols, stride, floor, high, low, exponents);
    else
        encode_e5m6(static_cast<const uint16_t*>(x), rows, cols, stride, floor, high, low, exponents);
}

void e5m6_dequantise(const uint8_t* high, const uint8_t* low, const uint8_t* exponents, long rows, long cols,
                     uint16_t* out) {
    decode_e5m6(high, low, exponents, rows, cols, out);
}
}
