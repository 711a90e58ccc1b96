// Whole layers of Llama's kind for CPUs, in one order of additions whatever else is computed with a row.
//
// Attention goes through what a token sees in the order of positions, and through nothing else, so that the extent of a
// cache and the shape of a draft are no part of it.

#include "products.h"

namespace {

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

    // Where a node's keys and values begin.
    long begin(long node) const { return row * (rows ? rows[node / nodes] : node / nodes); }
};

template <class T> void normalise(const float *x, const T *weight, float epsilon, long width, float *y) {
    double squares[8] = {}, sum = 0;  // eight chains of additions, as one would wait for itself
    for (long i = 0; i < width / 8 * 8; i += 8)
        for (int j = 0; j < 8; j++) squares[j] += double(x[i + j]) * x[i + j];
    for (long i = width / 8 * 8; i < width; i++) sum += double(x[i]) * x[i];
    for (double part : squares) sum += part;
    float factor = float(1.0 / std::sqrt(sum / width + epsilon));
    for (long i = 0; i < width; i++) y[i] = x[i] * factor * widen(weight[i]);
}

template <class T> void rotate(float *x, const T *cos, const T *sin, long dim) {
    for (long i = 0; i < dim / 2; i++) {
        float left = x[i], right = x[i + dim / 2];
        x[i] = left * widen(cos[i]) - right * widen(sin[i]);
        x[i + dim / 2] = right * widen(cos[i + dim / 2]) + left * widen(sin[i + dim / 2]);
    }
}

// Slots by the position of the token in them.
typedef std::vector<int64_t> Slots;

// A head of keys and values, and the `group` heads of queries that share it.
template <class T> struct Head {
    const T *keys, *values;
    long slot, group, dim;  // how far slots lie apart; heads of queries, and the size of each
    float scale;
};

// So many vectors of the values that a node sees, each times its weight, summed in the order of positions.
template <int VECTORS, class T>
inline void mix(const T *values, long stride, const Slots &seen, const float *weights, float *out) {
    Floats sums[VECTORS] = {};
    for (size_t i = 0; i < seen.size(); i++) {
        const T *value = values + seen[i] * stride;
        Floats weight = spread(weights[i]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sums[v] = fma(load(value + v * LANES), weight, sums[v]);
    }
    for (int v = 0; v < VECTORS; v++) store(sums[v], out + v * LANES);
}

// The queries of one node [group, dim] -> what they take of the values [group, dim].
template <class T> void attend(const Head<T> &head, const float *queries, const Slots &seen, float *out) {
    static thread_local std::vector<float> room;
    static thread_local std::vector<Input<T>> rounded;
    const long count = seen.size(), padded = (count + LANES - 1) / LANES * LANES, group = head.group, dim = head.dim;
    room.assign(group * padded, -INFINITY);
    rounded.resize(group * dim);
    float *scores = room.data();
    Input<T> *asked = rounded.data();
    for (long d = 0; d < group * dim; d++) narrow(queries[d], asked + d);
    for (long i = 0; i < count; i++)
        for (long g = 0; g < group; g++)
            scores[g * padded + i] = dot(head.keys + seen[i] * head.slot, asked + g * dim, dim) * head.scale;
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
        for (; d + 4 * LANES <= dim; d += 4 * LANES) mix<4>(head.values + d, head.slot, seen, weights, out + g * dim + d);
        for (; d < dim; d += LANES) mix<1>(head.values + d, head.slot, seen, weights, out + g * dim + d);
    }
}

#if defined(MATRIX_UNITS)
bool fits(long group, long dim) { return group <= BLOCK && dim % TERMS == 0 && has_matrix_units(); }

// Queries as columns [dim / 2, width, 2], keys that are seen as rows -> their products [seen, width], BLOCK keys at a time.
void score(const Head<Bfloat> &head, const Bfloat *queries, long width, const Slots &seen, float *products) {
    static thread_local std::vector<Bfloat> gathered;
    const long count = seen.size(), dim = head.dim;
    gathered.resize(BLOCK * dim);
    for (long i = 0; i < count; i += BLOCK) {
        const Bfloat *keys = head.keys + seen[i] * head.slot;
        long apart = head.slot;
        if (i + BLOCK > count || seen[i + BLOCK - 1] - seen[i] != BLOCK - 1) {
            for (long j = 0; j < BLOCK; j++)  // past the last there is nothing to be read
                memcpy(&gathered[j * dim], head.keys + seen[i + j < count ? i + j : i] * head.slot, dim * sizeof *keys);
            keys = gathered.data(), apart = dim;
        }
        _tile_zero(0);
        for (long d = 0; d < dim; d += TERMS) {
            _tile_loadd(1, keys + d, apart * sizeof *keys);
            _tile_loadd(2, queries + d * width, 4 * width);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, products + i * width, 4 * width);
    }
}

// A column of products [count, width] -> weights rounded to bfloat16, zero from `count` on; and the sum of them all.
float weigh(const float *products, long width, long count, long padded, float scale, Bfloat *weights) {
    static thread_local std::vector<float> scores;
    scores.resize(padded);
    const __m512i column = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                              _mm512_set1_epi32(width));
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    __m512 best = nothing;
    for (long i = 0; i < padded; i += LANES) {
        __mmask16 there = count - i >= LANES ? 0xffff : count > i ? (1 << (count - i)) - 1 : 0;
        __m512 some = _mm512_mask_i32gather_ps(nothing, there, column, products + i * width, 4);
        some = _mm512_mul_ps(some, _mm512_set1_ps(scale));
        best = _mm512_max_ps(best, some);
        _mm512_storeu_ps(&scores[i], some);
    }
    const float highest = _mm512_reduce_max_ps(best);
    Floats sums = {};
    for (long i = 0; i < padded; i += LANES) {
        Floats weight = exponential(load(&scores[i]) - highest);
        sums += weight;
        _mm256_storeu_si256((__m256i *)(weights + i), (__m256i)_mm512_cvtneps_pbh((__m512)weight));
    }
    return total(sums);
}

// Of TERMS tokens from the i-th on, TERMS of their values: those of two tokens side by side, in two tiles.
inline void pair(const Bfloat *values, const Slots &seen, long i, long stride, Bfloat *to) {
    const __m512i left = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                          36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i right = _mm512_add_epi16(left, _mm512_set1_epi16(LANES)), none = _mm512_setzero_si512();
    for (long j = 0, count = seen.size() - i; j < TERMS; j += 2) {
        __m512i even = j < count ? _mm512_loadu_si512(values + seen[i + j] * stride) : none;
        __m512i odd = j + 1 < count ? _mm512_loadu_si512(values + seen[i + j + 1] * stride) : none;
        _mm512_storeu_si512(to + j * LANES, _mm512_permutex2var_epi16(even, left, odd));
        _mm512_storeu_si512(to + (TERMS + j) * LANES, _mm512_permutex2var_epi16(even, right, odd));
    }
}

// `attend` for nodes of which each sees what the one before it sees, and more: they share what is read. Weights are
// rounded to bfloat16 before they are divided by their sum. Nodes' queries and results lie so many numbers apart.
void attend_together(const Head<Bfloat> &head, const float *queries, long asked, const Slots *seen, long nodes, float *out,
                     long given) {
    static thread_local std::vector<Bfloat> columns, weights;
    static thread_local std::vector<float> products;
    const long group = head.group, dim = head.dim, width = nodes * group;
    const long count = seen[nodes - 1].size(), padded = (count + TERMS - 1) / TERMS * TERMS;
    columns.resize(width * dim);
    products.resize(padded * width);
    weights.resize(width * padded);
    for (long q = 0; q < width; q++)
        for (long d = 0; d < dim; d++)
            narrow(queries[q / group * asked + q % group * dim + d], &columns[(d / 2 * width + q) * 2 + d % 2]);
    const Shape full = {BLOCK, 64}, thin = {BLOCK, 4 * width}, few = {width, 64};
    Tiles tiles({thin, full, thin, few, full, full, few, few});
    score(head, columns.data(), width, seen[nodes - 1], products.data());
    float shares[BLOCK];
    for (long q = 0; q < width; q++)
        shares[q] = 1 / weigh(&products[q], width, seen[q / group].size(), padded, head.scale, &weights[q * padded]);
    alignas(64) Bfloat pairs[2 * TERMS * LANES];
    alignas(64) float mixed[BLOCK * TERMS];
    for (long d = 0; d < dim; d += TERMS) {
        _tile_zero(6);
        _tile_zero(7);
        for (long i = 0; i < count; i += TERMS) {
            pair(head.values + d, seen[nodes - 1], i, head.slot, pairs);
            _tile_loadd(3, &weights[i], padded * sizeof(Bfloat));
            _tile_loadd(4, pairs, 64);
            _tile_loadd(5, pairs + TERMS * LANES, 64);
            _tile_dpbf16ps(6, 3, 4);
            _tile_dpbf16ps(7, 3, 5);
        }
        _tile_stored(6, mixed, sizeof(float) * TERMS);
        _tile_stored(7, mixed + LANES, sizeof(float) * TERMS);
        for (long q = 0; q < width; q++)
            for (long i = 0; i < TERMS; i++)
                out[q / group * given + q % group * dim + d + i] = mixed[q * TERMS + i] * shares[q];
    }
}
#endif

// How many nodes, from the first of these slots on, are best computed together.
template <class T> long together(const Slots *seen, long nodes, long group, long dim) {
    long count = 1;
#if defined(MATRIX_UNITS)
    const bool can = std::is_same_v<T, Bfloat> && fits(group, dim);
    while (can && count < nodes && (count + 1) * group <= BLOCK && seen[count].size() >= seen[count - 1].size() &&
           std::equal(seen[count - 1].begin(), seen[count - 1].end(), seen[count].begin()))
        count++;
#endif
    return count;
}

template <class T> Slots visible(const View &view, long row) {
    const T *mask = (const T *)view.mask + row * view.extent;
    const int64_t *path = view.paths ? view.paths + row * view.extent : nullptr;
    Slots seen;
    for (long s = 0; s < view.extent; s++)
        if (widen(mask[s]) == 0.0f) seen.push_back(path ? path[s] : s);
    return seen;
}

template <class T> void apply(const Linear &linear, const float *x, long rows, float *y, int threads) {
    if constexpr (std::is_same_v<Input<T>, float>) {
        multiply<T>(x, linear, rows, y, threads);
    } else {
        const long inner = linear.inner;
        std::vector<Input<T>> taken(rows * inner);
        each(rows, threads, [&](long r) {
            for (long i = r * inner; i < (r + 1) * inner; i++) narrow(x[i], &taken[i]);
        });
        multiply<T>(taken.data(), linear, rows, y, threads);
    }
}

// Queries and keys [heads, dim] of a row turned by its position; its keys and values stored.
template <class T> void place(const Layer &one, const View &view, long r, float *own, T *keys, T *values) {
    const long dim = one.dim;
    for (long h = 0; h < one.heads + one.stores; h++)
        rotate(own + h * dim, (const T *)view.cos + r * dim, (const T *)view.sin + r * dim, dim);
    for (long h = 0; h < one.stores; h++) {
        long to = view.begin(r) + h * view.head + view.slots[r] * view.slot;
        for (long d = 0; d < dim; d++) {
            narrow(own[(one.heads + h) * dim + d], keys + to + d);
            narrow(own[(one.heads + one.stores + h) * dim + d], values + to + d);
        }
    }
}

// What all heads take [rows, heads, dim] for queries, keys and values [rows, heads + 2 stores, dim], from a row on.
template <class T>
void attention(const Layer &one, const View &view, long begin, long rows, const float *turned, const T *keys,
               const T *values, float *taken) {
    const long dim = one.dim, group = one.heads / one.stores;
    const long asked = (one.heads + 2 * one.stores) * dim, given = one.heads * dim;
    std::vector<Slots> seen(rows);
    each(rows, view.threads, [&](long r) { seen[r] = visible<T>(view, begin + r); });
    std::vector<long> starts;
    for (long r = 0, left; r < rows; r += together<T>(&seen[r], left, group, dim)) {
        left = std::min(rows - r, view.nodes - (begin + r) % view.nodes);  // of the same sequence
        starts.push_back(r);
    }
    starts.push_back(rows);
    const long tasks = (starts.size() - 1) * one.stores, threads = view.threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long task = 0; task < tasks; task++) {
        long first = starts[task / one.stores], last = starts[task / one.stores + 1], h = task % one.stores;
        long from = view.begin(begin + first) + h * view.head;
        const Head<T> head = {keys + from, values + from, view.slot, group, dim, float(one.scale)};
        const float *queries = turned + first * asked + h * group * dim;
        float *out = taken + first * given + h * group * dim;
#if defined(MATRIX_UNITS)
        if constexpr (std::is_same_v<T, Bfloat>)
            if (fits(group, dim)) {
                attend_together(head, queries, asked, &seen[first], last - first, out, given);
                continue;
            }
#endif
        assert(last - first == 1);
        attend(head, queries, seen[first], out);
    }
}

// A layer on some rows of x, from a row on.
template <class T>
void part(const Layer &one, const View &view, long begin, long rows, const T *x, T *y, T *keys, T *values) {
    const long width = one.width, inner = one.narrow.inner;
    const long asked = (one.heads + 2 * one.stores) * one.dim, given = one.heads * one.dim;
    const int threads = view.threads;
    std::vector<float> state(rows * width), normed(rows * width), turned(rows * asked), taken(rows * given);
    auto normalise_row = [&](long r, const void *by) {
        normalise(&state[r * width], (const T *)by, one.epsilon, width, &normed[r * width]);
    };
    auto add_row = [&](long r) {
        for (long i = r * width; i < (r + 1) * width; i++) state[i] += normed[i];
    };
    each(rows, threads, [&](long r) {
        for (long i = r * width; i < (r + 1) * width; i++) state[i] = widen(x[i]);
        normalise_row(r, one.norm_in);
    });
    apply<T>(one.read, normed.data(), rows, turned.data(), threads);
    each(rows, threads, [&](long r) { place(one, view, begin + r, &turned[r * asked], keys, values); });
    attention(one, view, begin, rows, turned.data(), keys, values, taken.data());
    apply<T>(one.write, taken.data(), rows, normed.data(), threads);
    if (inner) {
        std::vector<float> wide(rows * 2 * inner), held(rows * inner);
        each(rows, threads, [&](long r) {
            add_row(r);
            normalise_row(r, one.norm_mid);
        });
        apply<T>(one.widen, normed.data(), rows, wide.data(), threads);
        each(rows, threads, [&](long r) {
            for (long i = 0; i < inner; i += LANES) {
                const float *gate = &wide[r * 2 * inner + i];
                Floats open = load(gate) / (1.0f + exponential(-load(gate)));
                store(open * load(gate + inner), &held[r * inner + i]);
            }
        });
        apply<T>(one.narrow, held.data(), rows, normed.data(), threads);
    }
    each(rows, threads, [&](long r) {
        add_row(r);
        for (long i = r * width; i < (r + 1) * width; i++) narrow(state[i], y + i);
    });
}

template <class T> void layer(const Layer &one, const View &view, const T *x, T *y, T *keys, T *values) {
    const long rows = view.batch * view.nodes;
    for (long begin = 0; begin < rows; begin += AT_ONCE)  // no row looks at one that comes after it
        part(one, view, begin, std::min(AT_ONCE, rows - begin), x + begin * one.width, y + begin * one.width, keys, values);
}

template <class T> void product(const Linear &linear, const T *x, T *y, long rows, long inner, int threads) {
    std::vector<Input<T>> taken(rows * linear.inner);
    each(rows, threads, [&](long r) {
        for (long k = 0; k < inner; k++) narrow(widen(x[r * inner + k]), &taken[r * linear.inner + k]);
    });
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
