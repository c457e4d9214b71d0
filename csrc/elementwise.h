// The small operations between the matrix products: norms, rotary embedding, gated activations.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace quire::QUIRE_ISA {

// Waking the other threads costs a few microseconds; below this many elements one thread is done sooner.
constexpr int64_t kParallelElements = 1 << 15;

// out = x / rms(x) * weight; out may be x.
QUIRE_INLINE void normalise(const float* x, const float* weight, float eps, float* out, int64_t n) {
    Vec squares{};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Vec v = load(x + i);
        squares += v * v;
    }
    if (i < n) {
        const Vec v = load_first(x + i, n - i);
        squares += v * v;
    }
    const float inverse = 1.0f / sqrtf(sum(squares) / float(n) + eps);
    for (i = 0; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) * inverse * load(weight + i));
    for (; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

QUIRE_INLINE void add_row(float* to, const float* x, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + load(x + i));
    for (; i < n; ++i) to[i] += x[i];
}

// The norm of x, or with a residual of the residual after adding x to it.
QUIRE_INLINE void rms_norm_row(const float* x, float* residual, const float* weight, float eps, float* out, int64_t n) {
    if (residual) add_row(residual, x, n);
    normalise(residual ? residual : x, weight, eps, out, n);
}

// out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, if there is one.
static void layer_norm_row(const float* x, const float* weight, const float* bias, float eps, float* out, int64_t n) {
    Vec sums{}, squares{};
    for (int64_t i = 0; i < n; i += kLanes) sums += n - i >= kLanes ? load(x + i) : load_first(x + i, n - i);
    const float mean = sum(sums) / float(n);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Vec v = load(x + i) - mean;
        squares += v * v;
    }
    float rest = 0;
    for (int64_t j = i; j < n; ++j) rest += (x[j] - mean) * (x[j] - mean);
    const float inverse = 1.0f / sqrtf((sum(squares) + rest) / float(n) + eps);
    for (i = 0; i + kLanes <= n; i += kLanes) {
        const Vec v = (load(x + i) - mean) * inverse * load(weight + i);
        store(out + i, bias ? v + load(bias + i) : v);
    }
    for (; i < n; ++i) out[i] = (x[i] - mean) * inverse * weight[i] + (bias ? bias[i] : 0.0f);
}

// The norm of x, or with a residual of the residual after adding x to it.
static void layer_norm(Rows x, float* residual, const float* weight, const float* bias, float eps, float* out, int64_t rows,
                       int64_t columns) {
    share_tasks(rows * columns >= kParallelElements, rows, [&](int64_t row, int64_t) {
        const float* given = x.data + row * x.stride;
        if (residual) {
            add_row(residual + row * columns, given, columns);
            given = residual + row * columns;
        }
        layer_norm_row(given, weight, bias, eps, out + row * columns, columns);
    });
}

static void rms_norm(Rows x, float* residual, const float* weight, float eps, float* out, int64_t rows,
                     int64_t columns) {
    share_tasks(rows * columns >= kParallelElements, rows, [&](int64_t row, int64_t) {
        rms_norm_row(x.data + row * x.stride, residual ? residual + row * columns : nullptr, weight, eps,
                     out + row * columns, columns);
    });
}

static void rms_norm_heads(Rows x, const float* weight, float eps, int64_t tokens, int64_t heads, int64_t head_dim) {
    share_tasks(tokens * heads * head_dim >= kParallelElements, tokens, [&](int64_t token, int64_t) {
        for (int64_t head = 0; head < heads; ++head) {
            float* row = x.data + token * x.stride + head * head_dim;
            normalise(row, weight, eps, row, head_dim);
        }
    });
}

// Dimension i of the first half is rotated against dimension i of the second.
static void rotary(Rows x, const int32_t* positions, const float* cos_sin, int64_t rotary_dim, int64_t tokens,
                   int64_t heads, int64_t head_dim) {
    const int64_t half = rotary_dim / 2;
    share_tasks(tokens * heads * head_dim >= kParallelElements, tokens, [&](int64_t token, int64_t) {
        const float* cos = cos_sin + positions[token] * rotary_dim;
        const float* sin = cos + half;
        for (int64_t head = 0; head < heads; ++head) {
            float* first = x.data + token * x.stride + head * head_dim;
            float* second = first + half;
            int64_t i = 0;
            for (; i + kLanes <= half; i += kLanes) {
                const Vec a = load(first + i), b = load(second + i), c = load(cos + i), s = load(sin + i);
                store(first + i, a * c - b * s);
                store(second + i, b * c + a * s);
            }
            for (; i < half; ++i) {
                const float a = first[i], b = second[i];
                first[i] = a * cos[i] - b * sin[i];
                second[i] = b * cos[i] + a * sin[i];
            }
        }
    });
}

// Only ever raises 2 to a negative power, so that nothing overflows.
QUIRE_INLINE Vec sigmoid(Vec x) {
    const Vec e = exp2((x < 0.0f ? x : -x) * kLog2E);
    return (x < 0.0f ? e : broadcast(1.0f)) / (1.0f + e);
}

struct Silu {
    static QUIRE_INLINE Vec of(Vec x) { return x * sigmoid(x); }
};

struct GeluTanh {
    // 0.5 x (1 + tanh(u)) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    static QUIRE_INLINE Vec of(Vec x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }
};

struct Gelu {
    // x Phi(x) with Phi from erf by Abramowitz and Stegun 7.1.26, whose absolute error is below 1.5e-7. Computing the
    // smaller tail first keeps it small where x is far below zero.
    static QUIRE_INLINE Vec of(Vec x) {
        const Vec magnitude = x < 0.0f ? -x : x;
        const Vec t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * magnitude);
        Vec p = broadcast(1.061405429f);
        p = p * t - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = p * t + 0.254829592f;
        const Vec tail = 0.5f * p * t * exp2(x * x * (-0.5f * kLog2E));
        return x * (x < 0.0f ? tail : 1.0f - tail);
    }
};

struct Relu {
    static QUIRE_INLINE Vec of(Vec x) { return x > 0.0f ? x : x != x ? x : Vec{}; }
};

struct SquaredRelu {
    static QUIRE_INLINE Vec of(Vec x) { return Relu::of(x) * Relu::of(x); }
};

// What a gate makes of its input and what it lets through.
template <class Activation>
struct Times {
    static QUIRE_INLINE Vec of(Vec gate, Vec up) { return Activation::of(gate) * up; }
};

// A gate of its own: clamped from above, what it multiplies from both sides.
struct ClampedSwiglu {
    float alpha, limit;
    QUIRE_INLINE Vec of(Vec gate, Vec up) const {
        const Vec most = broadcast(limit), clamped = gate > most ? most : gate, below = up > most ? most : up;
        return clamped * sigmoid(alpha * clamped) * ((below < -most ? -most : below) + 1.0f);
    }
};

// x [2 columns] -> out [columns]: what the gate makes of the first half and the second. `out` may be x.
template <class Gate>
QUIRE_INLINE void gate_row(const float* x, float* out, int64_t columns, Gate gate = {}) {
    const float* up = x + columns;
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) store(out + i, gate.of(load(x + i), load(up + i)));
    if (i < columns) {
        const int64_t rest = columns - i;
        store_first(out + i, gate.of(load_first(x + i, rest), load_first(up + i, rest)), rest);
    }
}

// x [columns] -> out [columns]. `out` may be x.
template <class Activation>
QUIRE_INLINE void activate_row(const float* x, float* out, int64_t columns) {
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) store(out + i, Activation::of(load(x + i)));
    if (i < columns) store_first(out + i, Activation::of(load_first(x + i, columns - i)), columns - i);
}

template <class Activation>
static void activate_and_mul(Rows x, float* out, int64_t rows, int64_t columns) {
    share_tasks(rows * columns >= kParallelElements, rows, [&](int64_t row, int64_t) {
        gate_row<Times<Activation>>(x.data + row * x.stride, out + row * columns, columns);
    });
}

}  // namespace quire::QUIRE_ISA
