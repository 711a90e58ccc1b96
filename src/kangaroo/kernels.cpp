// Linears and whole layers of Llama's kind for CPUs, in one order of additions whatever else is computed with a row.
//
// Weights are read once, from start to end, in panels: for one panel of results, all terms, a vector of results at a
// time. Every result is one chain of fused multiply-adds over the terms, in their order, in single precision; a
// processor with instructions for pairs of bfloat16 (AVX512-BF16) takes a pair of terms at a time, and its inputs
// rounded to bfloat16. Neither the number of rows, nor the place of a row among them, nor the number of threads is part
// of that, so a token gets the same bits in every pass. Attention goes through what a token sees in the order of
// positions, and through nothing else, so that the extent of a cache and the shape of a draft are no part of it either.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 8;  // TILE rows of two vectors of results fit the registers
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE = 8;
#else
constexpr int LANES = 8, TILE = 4;
#endif
constexpr int PANEL = 2 * LANES;

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint16_t Bfloat;
#if defined(__AVX512BF16__)
template <class T> using Input = T;  // what a product takes, for weights of type T
#else
template <class T> using Input = float;
#endif

inline Floats spread(float x) { return x - Floats{}; }
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }  // contracted: see the compiler's options

inline float widen(float x) { return x; }
inline float widen(Bfloat x) {
    uint32_t word = uint32_t(x) << 16;
    float wide;
    memcpy(&wide, &word, 4);
    return wide;
}
inline void narrow(float x, float *to) { *to = x; }
inline void narrow(float x, Bfloat *to) {
    uint32_t word;
    memcpy(&word, &x, 4);
    *to = x != x ? 0x7fc0 : (word + 0x7fff + ((word >> 16) & 1)) >> 16;  // to the nearest, ties to even
}
inline Floats load(const float *from) { return *(const Floats *)from; }
inline Floats load(const Bfloat *from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#else
    return (Floats)(__builtin_convertvector(*(const Halves *)from, Words) << 16);
#endif
}
inline void store(Floats x, float *to) { *(Floats *)to = x; }

inline float total(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sums[LANES];
    store(x, sums);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
#endif
}

template <class T> inline float dot(const T *a, const float *b, long size) {
    Floats sum = {};
    for (long d = 0; d < size; d += LANES) sum = fma(load(a + d), load(b + d), sum);
    return total(sum);
}
#if defined(__AVX512BF16__)
inline float dot(const Bfloat *a, const Bfloat *b, long size) {
    Floats sum = {};
    for (long d = 0; d < size; d += 2 * LANES) {
        __mmask32 there = size - d < 2 * LANES ? 0xffffu : 0xffffffffu;
        __m512i left = _mm512_maskz_loadu_epi16(there, a + d), right = _mm512_maskz_loadu_epi16(there, b + d);
        sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
    }
    return total(sum);
}
#endif

// e^x after Cephes' expf: 2^n e^r with |r| <= ln 2 / 2; what underflows is zero.
inline Floats exponential(Floats x) {
    const Floats low = spread(-87.3f), high = spread(88.3f);
    Ints underflow = x < low;
    x = x < low ? low : x;
    x = x > high ? high : x;
    Floats scaled = fma(x, spread(1.44269504f), spread(12582912.0f));  // rounds to an integer in the last bits
    Floats whole = scaled - 12582912.0f;
    Floats rest = fma(whole, spread(-0.693359375f), x);
    rest = fma(whole, spread(2.12194440e-4f), rest);
    Floats series = spread(1.9875691500e-4f);
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        series = fma(series, rest, spread(next));
    series = fma(series, rest * rest, rest + 1.0f);
    Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
    Floats made = series * (Floats)power;
    return underflow ? Floats{} : made;
}

// Asks for the weights of a step to come. One or two rows only wait for memory, of which a processor asks best by itself
// (Zen 4 does). Many rows keep it so busy that it asks too late, and a far look into the second-level cache evens that
// out; where memory is the bound, such requests reach two thirds of its speed only.
template <int ROWS, class T> inline void foresee(const T *w) {
    constexpr int STEP = PANEL * sizeof(float) / sizeof(T), FEW = 2, MANY = 6;
    if constexpr (ROWS >= MANY) {
        __builtin_prefetch(w + 128 * STEP, 0, 2);
        __builtin_prefetch(w + 128 * STEP + STEP / 2, 0, 2);
    } else if constexpr (ROWS > FEW) {
        __builtin_prefetch(w + 64 * STEP);
        __builtin_prefetch(w + 64 * STEP + STEP / 2);
    }
}

// Two vectors of weights of one term (float32), or four of two terms (bfloat16, whose pairs lie side by side).
template <int ROWS> inline void panel(const float *x, long inner, const float *w, Floats (*sums)[2]) {
    for (long k = 0; k < inner; k++, w += PANEL) {
        foresee<ROWS>(w);
        Floats first = load(w), second = load(w + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            Floats term = spread(x[r * inner + k]);
            sums[r][0] = fma(first, term, sums[r][0]);
            sums[r][1] = fma(second, term, sums[r][1]);
        }
    }
}
#if defined(__AVX512BF16__)
template <int ROWS> inline void panel(const Bfloat *x, long inner, const Bfloat *w, Floats (*sums)[2]) {
    for (long k = 0; k < inner; k += 2, w += 2 * PANEL) {
        foresee<ROWS>(w);
        __m512bh first = (__m512bh)_mm512_loadu_si512(w), second = (__m512bh)_mm512_loadu_si512(w + PANEL);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t both;
            memcpy(&both, x + r * inner + k, sizeof both);
            __m512bh pair = (__m512bh)_mm512_set1_epi32(both);
            sums[r][0] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][0], first, pair);
            sums[r][1] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][1], second, pair);
        }
    }
}
#else
template <int ROWS> inline void panel(const float *x, long inner, const Bfloat *w, Floats (*sums)[2]) {
    for (long k = 0; k < inner; k += 2, w += 2 * PANEL) {
        foresee<ROWS>(w);
        Words left = *(const Words *)w, right = *(const Words *)(w + PANEL);
        Floats weights[2][2] = {{(Floats)(left << 16), (Floats)(right << 16)},
                                {(Floats)(left & 0xffff0000u), (Floats)(right & 0xffff0000u)}};
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                Floats term = spread(x[r * inner + k + half]);
                sums[r][0] = fma(weights[half][0], term, sums[r][0]);
                sums[r][1] = fma(weights[half][1], term, sums[r][1]);
            }
    }
}
#endif

struct Linear {
    const void *weight, *bias;
    int64_t inner, outer;  // inner as stored: even for bfloat16
};

// Rows of x [ROWS, inner] times one panel of weights -> results from column `at` on of y [ROWS, outer].
template <int ROWS, class T, class Y>
inline void tile(const Input<T> *x, long inner, const T *w, const T *bias, long at, long outer, Y *y) {
    Floats sums[ROWS][2] = {};
    panel<ROWS>(x, inner, w, sums);
    long count = outer - at < PANEL ? outer - at : PANEL;
    for (int r = 0; r < ROWS; r++) {
        float row[PANEL];
        store(sums[r][0], row);
        store(sums[r][1], row + LANES);
        for (long i = 0; bias && i < count; i++) row[i] += widen(bias[at + i]);
        Y whole[PANEL], *to = y + r * outer + at;
        for (int i = 0; i < PANEL; i++) narrow(row[i], whole + i);
        count == PANEL ? memcpy(to, whole, sizeof whole) : memcpy(to, whole, count * sizeof *to);
    }
}

// The first ROWS of the rows, or all if there are fewer.
template <int ROWS, class T, class Y>
inline void tiles(long rows, const Input<T> *x, long inner, const T *w, const T *bias, long at, long outer, Y *y) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return tiles<ROWS - 1>(rows, x, inner, w, bias, at, outer, y);
    tile<ROWS>(x, inner, w, bias, at, outer, y);
}

// x [rows, inner] times weights [outer, inner] in panels -> y [rows, outer]; an odd `inner` is filled up in bfloat16.
template <class T, class Y> void multiply(const Input<T> *x, const Linear &by, long rows, Y *y, int threads) {
    const long inner = by.inner, outer = by.outer, panels = (outer + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long p = 0; p < panels; p++) {
        const T *part = (const T *)by.weight + p * PANEL * inner;
        for (long r = 0; r < rows; r += TILE)
            tiles<TILE>(rows - r, x + r * inner, inner, part, (const T *)by.bias, p * PANEL, outer, y + r * outer);
    }
}

struct Layer {
    const void *norm_in, *norm_mid;
    double epsilon, scale;
    int64_t width, heads, stores, dim;  // heads of queries, heads of keys and values, and the size of each
    Linear read, write, widen, narrow;  // queries, keys and values; output; gate and up; down (no inner: none)
};

struct View {
    int64_t batch, nodes, extent, threads;
    const int64_t *slots, *rows;    // [B, N]; [B], or null: row b is the b-th
    const void *cos, *sin, *mask;   // [B, N, dim] twice; [B, N, extent], zero where a node sees a slot
    const int64_t *paths;           // [B, N, extent] slots by position, for trees; or null
    int64_t row, head, slot;        // strides of keys and values, in elements
};

template <class T>
void normalise(const float *x, const T *weight, float epsilon, long rows, long width, float *y) {
    for (long r = 0; r < rows; r++, x += width, y += width) {
        double squares = 0;
        for (long i = 0; i < width; i++) squares += double(x[i]) * x[i];
        float factor = float(1.0 / std::sqrt(squares / width + epsilon));
        for (long i = 0; i < width; i++) y[i] = x[i] * factor * widen(weight[i]);
    }
}

template <class T> void rotate(float *x, const T *cos, const T *sin, long dim) {
    for (long i = 0; i < dim / 2; i++) {
        float left = x[i], right = x[i + dim / 2];
        x[i] = left * widen(cos[i]) - right * widen(sin[i]);
        x[i + dim / 2] = right * widen(cos[i + dim / 2]) + left * widen(sin[i + dim / 2]);
    }
}

// So many vectors of the values that a node sees, each times its weight, summed in the order of positions.
template <int VECTORS, class T>
inline void mix(const T *values, long stride, const std::vector<int64_t> &seen, const float *weights, float *out) {
    Floats sums[VECTORS] = {};
    for (size_t i = 0; i < seen.size(); i++) {
        const T *value = values + seen[i] * stride;
        Floats weight = spread(weights[i]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[v] = fma(load(value + v * LANES), weight, sums[v]);
    }
    for (int v = 0; v < VECTORS; v++) store(sums[v], out + v * LANES);
}

// One node, one head of keys and values, and the `group` heads of queries that share it.
template <class T>
void attend(const float *queries, const T *keys, const T *values, const std::vector<int64_t> &seen, long stride,
            long group, long dim, float scale, float *out) {
    static thread_local std::vector<float> room;
    static thread_local std::vector<Input<T>> rounded;
    long count = seen.size(), padded = (count + LANES - 1) / LANES * LANES;
    room.assign(group * padded, -INFINITY);
    rounded.resize(group * dim);
    float *scores = room.data();
    Input<T> *asked = rounded.data();
    for (long d = 0; d < group * dim; d++) narrow(queries[d], asked + d);
    for (long i = 0; i < count; i++)
        for (long g = 0; g < group; g++)
            scores[g * padded + i] = dot(keys + seen[i] * stride, asked + g * dim, dim) * scale;
    for (long g = 0; g < group; g++) {
        float *weights = scores + g * padded, best = -INFINITY;
        for (long i = 0; i < count; i++) best = weights[i] > best ? weights[i] : best;
        Floats sums = {};
        for (long i = 0; i < padded; i += LANES) {
            Floats weight = exponential(load(weights + i) - best);
            store(weight, weights + i);
            sums += weight;
        }
        float share = 1.0f / total(sums);
        for (long i = 0; i < count; i++) weights[i] *= share;
        long d = 0;
        for (; d + 4 * LANES <= dim; d += 4 * LANES) mix<4>(values + d, stride, seen, weights, out + g * dim + d);
        for (; d < dim; d += LANES) mix<1>(values + d, stride, seen, weights, out + g * dim + d);
    }
}

template <class T> std::vector<int64_t> visible(const View &view, long row) {
    const T *mask = (const T *)view.mask + row * view.extent;
    const int64_t *path = view.paths ? view.paths + row * view.extent : nullptr;
    std::vector<int64_t> seen;
    for (long s = 0; s < view.extent; s++)
        if (widen(mask[s]) == 0.0f) seen.push_back(path ? path[s] : s);
    return seen;
}

template <class T> void apply(const Linear &linear, const float *x, long rows, float *y, int threads) {
    if constexpr (std::is_same_v<Input<T>, float>) {
        multiply<T>(x, linear, rows, y, threads);
    } else {
        std::vector<Input<T>> taken(rows * linear.inner);
        for (long i = 0; i < rows * linear.inner; i++) narrow(x[i], &taken[i]);
        multiply<T>(taken.data(), linear, rows, y, threads);
    }
}

template <class T> void layer(const Layer &one, const View &view, const T *x, T *y, T *keys, T *values) {
    const long rows = view.batch * view.nodes, width = one.width, dim = one.dim;
    const long group = one.heads / one.stores, heads = one.heads + 2 * one.stores;
    const int threads = view.threads;
    std::vector<float> state(rows * width), normed(rows * width), turned(rows * heads * dim), taken(rows * one.heads * dim);
    for (long i = 0; i < rows * width; i++) state[i] = widen(x[i]);
    normalise(state.data(), (const T *)one.norm_in, one.epsilon, rows, width, normed.data());
    apply<T>(one.read, normed.data(), rows, turned.data(), threads);
    for (long r = 0; r < rows; r++) {
        float *own = &turned[r * heads * dim];
        for (long h = 0; h < one.heads + one.stores; h++)
            rotate(own + h * dim, (const T *)view.cos + r * dim, (const T *)view.sin + r * dim, dim);
        long row = view.rows ? view.rows[r / view.nodes] : r / view.nodes;
        for (long h = 0; h < one.stores; h++) {
            long to = row * view.row + h * view.head + view.slots[r] * view.slot;
            for (long d = 0; d < dim; d++) {
                narrow(own[(one.heads + h) * dim + d], keys + to + d);
                narrow(own[(one.heads + one.stores + h) * dim + d], values + to + d);
            }
        }
    }
    std::vector<std::vector<int64_t>> seen(rows);
    for (long r = 0; r < rows; r++) seen[r] = visible<T>(view, r);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long task = 0; task < rows * one.stores; task++) {
        long r = task / one.stores, h = task % one.stores;
        long row = view.rows ? view.rows[r / view.nodes] : r / view.nodes, from = row * view.row + h * view.head;
        attend(&turned[(r * heads + h * group) * dim], keys + from, values + from, seen[r], view.slot, group, dim,
               float(one.scale), &taken[(r * one.heads + h * group) * dim]);
    }
    apply<T>(one.write, taken.data(), rows, normed.data(), threads);
    for (long i = 0; i < rows * width; i++) state[i] += normed[i];
    if (one.narrow.inner) {
        const long inner = one.narrow.inner;
        std::vector<float> wide(rows * 2 * inner), held(rows * inner);
        normalise(state.data(), (const T *)one.norm_mid, one.epsilon, rows, width, normed.data());
        apply<T>(one.widen, normed.data(), rows, wide.data(), threads);
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < inner; i += LANES) {
                const float *gate = &wide[r * 2 * inner + i];
                Floats open = load(gate) / (1.0f + exponential(-load(gate)));
                store(open * load(gate + inner), &held[r * inner + i]);
            }
        apply<T>(one.narrow, held.data(), rows, normed.data(), threads);
        for (long i = 0; i < rows * width; i++) state[i] += normed[i];
    }
    for (long i = 0; i < rows * width; i++) narrow(state[i], y + i);
}

template <class T> void product(const Linear &linear, const T *x, T *y, long rows, long inner, int threads) {
    std::vector<Input<T>> taken(rows * linear.inner);
    for (long r = 0; r < rows; r++)
        for (long k = 0; k < inner; k++) narrow(widen(x[r * inner + k]), &taken[r * linear.inner + k]);
    multiply<T>(taken.data(), linear, rows, y, threads);
}

}  // namespace

extern "C" {
int panel_width() { return PANEL; }
int lanes() { return LANES; }
void product_float32(const Linear *l, const float *x, float *y, int64_t rows, int64_t inner, int threads) {
    product(*l, x, y, rows, inner, threads);
}
void product_bfloat16(const Linear *l, const Bfloat *x, Bfloat *y, int64_t rows, int64_t inner, int threads) {
    product(*l, x, y, rows, inner, threads);
}
void layer_float32(const Layer *l, const View *v, const float *x, float *y, float *keys, float *values) {
    layer(*l, *v, x, y, keys, values);
}
void layer_bfloat16(const Layer *l, const View *v, const Bfloat *x, Bfloat *y, Bfloat *keys, Bfloat *values) {
    layer(*l, *v, x, y, keys, values);
}
}
