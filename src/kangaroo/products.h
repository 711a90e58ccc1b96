// Matrix products for CPUs, in one order of additions whatever else is computed with a row.
//
// Weights are read once, from start to end, in panels: for one panel of results, all terms, a vector of results at a
// time. Every result is one chain of fused multiply-adds over the terms, in their order, in single precision; a
// processor with instructions for pairs of bfloat16 (AVX512-BF16) takes a pair of terms at a time, and its inputs
// rounded to bfloat16, and one with matrix units (AMX) does so for up to 32 rows at once. Neither the number of rows,
// nor the place of a row among them, nor the number of threads is part of that, so a token gets the same bits in every
// pass.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define MATRIX_UNITS
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
constexpr long AT_ONCE = 256;  // more rows would not stay in a core's cache while panels pass by

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

// Calls work(i) for i < count, by several threads if there is much to do.
template <class Work> inline void each(long count, int threads, Work work) {
    constexpr long MUCH = 16;
#pragma omp parallel for num_threads(threads) if (threads > 1 && count >= MUCH) schedule(static)
    for (long i = 0; i < count; i++) work(i);
}

struct Linear {
    const void *weight, *bias;
    int64_t inner, outer;  // inner as stored: even for bfloat16
};

// A panel of one row's sums -> its results from column `at` on.
template <class T, class Y> inline void finish(float *sums, const T *bias, long at, long outer, Y *row) {
    long count = outer - at < PANEL ? outer - at : PANEL;
    for (long i = 0; bias && i < count; i++) sums[i] += widen(bias[at + i]);
    Y whole[PANEL];
    for (int i = 0; i < PANEL; i++) narrow(sums[i], whole + i);
    count == PANEL ? memcpy(row + at, whole, sizeof whole) : memcpy(row + at, whole, count * sizeof(Y));
}

// Rows of x [ROWS, inner] times one panel of weights -> results from column `at` on of y [ROWS, outer].
template <int ROWS, class T, class Y>
inline void tile(const Input<T> *x, long inner, const T *w, const T *bias, long at, long outer, Y *y) {
    Floats sums[ROWS][2] = {};
    panel<ROWS>(x, inner, w, sums);
    for (int r = 0; r < ROWS; r++) {
        float row[PANEL];
        store(sums[r][0], row);
        store(sums[r][1], row + LANES);
        finish(row, bias, at, outer, y + r * outer);
    }
}

// The first ROWS of the rows, or all if there are fewer.
template <int ROWS, class T, class Y>
inline void tiles(long rows, const Input<T> *x, long inner, const T *w, const T *bias, long at, long outer, Y *y) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return tiles<ROWS - 1>(rows, x, inner, w, bias, at, outer, y);
    tile<ROWS>(x, inner, w, bias, at, outer, y);
}

#if defined(MATRIX_UNITS)
constexpr long BLOCK = 16, TERMS = 32;  // rows of a tile, and terms of each, in pairs if they stand in columns

// Linux lends a process the tiles when it asks.
bool has_matrix_units() {
    static const bool lent = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return lent;
}

struct Shape {
    long rows, bytes;
};

// A thread's tiles, of the shapes that are needed. Other libraries of this process find theirs as they left them.
class Tiles {
    struct alignas(64) Config {
        uint8_t palette, reserved[15];
        uint16_t bytes[16];
        uint8_t rows[16];
    } before;

  public:
    explicit Tiles(std::initializer_list<Shape> shapes) {
        Config ours = {};
        ours.palette = 1;
        int i = 0;
        for (const Shape &shape : shapes) ours.bytes[i] = shape.bytes, ours.rows[i++] = shape.rows;
        _tile_storeconfig(&before);
        _tile_loadconfig(&ours);
    }
    ~Tiles() { _tile_loadconfig(&before); }
};

// `rows` of x, or twice as many, times one panel of weights -> sums [2, BLOCK, PANEL].
template <bool TWICE> inline void matrix_panel(const Bfloat *x, long rows, long inner, const Bfloat *w, float *sums) {
    const long row = inner * sizeof *x, terms = 2 * PANEL * sizeof *w, sum = PANEL * sizeof *sums;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (TWICE) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long k = 0; k < inner; k += TERMS, w += TERMS * PANEL) {
        _tile_loadd(6, w, terms);
        _tile_loadd(7, w + PANEL, terms);
        _tile_loadd(4, x + k, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (TWICE) {
            _tile_loadd(5, x + rows * inner + k, row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, sum);
    _tile_stored(1, sums + LANES, sum);
    if constexpr (TWICE) {
        _tile_stored(2, sums + BLOCK * PANEL, sum);
        _tile_stored(3, sums + BLOCK * PANEL + LANES, sum);
    }
}

// `multiply` where a processor has matrix units: a tile's sums are chains over the pairs of terms as well.
template <class Y> void multiply_matrices(const Bfloat *x, const Linear &by, long rows, Y *y, int threads) {
    if (rows > AT_ONCE) {
        multiply_matrices(x, by, AT_ONCE, y, threads);
        return multiply_matrices(x + AT_ONCE * by.inner, by, rows - AT_ONCE, y + AT_ONCE * by.outer, threads);
    }
    const long inner = by.inner, outer = by.outer, panels = (outer + PANEL - 1) / PANEL;
    const long blocks = (rows + BLOCK - 1) / BLOCK, block = (rows + blocks - 1) / blocks;
    std::vector<Bfloat> filled;  // blocks are of one size, the last too
    if (rows % block) {
        filled.resize(blocks * block * inner);
        memcpy(filled.data(), x, rows * inner * sizeof *x);
        x = filled.data();
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Shape some = {block, 64}, full = {BLOCK, 64};
        Tiles tiles({some, some, some, some, some, some, full, full});
        float sums[2][BLOCK][PANEL];
#pragma omp for schedule(static)
        for (long p = 0; p < panels; p++) {
            const Bfloat *part = (const Bfloat *)by.weight + p * PANEL * inner;
            for (long b = 0; b < blocks; b += 2) {
                const Bfloat *from = x + b * block * inner;
                if (b + 1 < blocks) matrix_panel<true>(from, block, inner, part, sums[0][0]);
                else matrix_panel<false>(from, block, inner, part, sums[0][0]);
                for (long i = 0; i < 2 * block && b * block + i < rows; i++)
                    finish(sums[i / block][i % block], (const Bfloat *)by.bias, p * PANEL, outer, y + (b * block + i) * outer);
            }
        }
    }
}
#endif

// x [rows, inner] times weights [outer, inner] in panels -> y [rows, outer]; an odd `inner` is filled up in bfloat16.
template <class T, class Y> void multiply(const Input<T> *x, const Linear &by, long rows, Y *y, int threads) {
    const long inner = by.inner, outer = by.outer, panels = (outer + PANEL - 1) / PANEL;
#if defined(MATRIX_UNITS)
    if constexpr (std::is_same_v<Input<T>, Bfloat>)
        if (rows && inner % TERMS == 0 && has_matrix_units()) return multiply_matrices(x, by, rows, y, threads);
#endif
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long p = 0; p < panels; p++) {
        const T *part = (const T *)by.weight + p * PANEL * inner;
        for (long r = 0; r < rows; r += TILE)
            tiles<TILE>(rows - r, x + r * inner, inner, part, (const T *)by.bias, p * PANEL, outer, y + r * outer);
    }
}

}  // namespace
