// Paged attention on the CPU: writes a step's KV and attends over ragged block tables, one call a layer.
//
// Decodes: a task is one sequence and one run of RUN keys, all heads, so that memory is read in the order in which it
// lies. Partial results are merged by a log-sum-exp pass (flash-decoding). Runs begin at multiples of RUN, so a sequence's
// bits depend neither on the batch nor on the number of threads.
// Chunks: a task is one KV head and a tile of its query rows (tokens x heads of the group). Rows lie in vector lanes, keys
// are broadcast, softmax never reduces across lanes (online softmax as in FlashAttention).
// What a layer's tokens do not see before them is not read. A sink is where the softmax of its head begins.
//
// Built by native.py with -fopenmp but linked to no OpenMP library: the symbols resolve to the one torch has loaded.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

struct Geometry {  // mirrored by native.py, field by field
    int64_t threads, heads, kv_heads, head_dim, block_size, block_stride, max_blocks;
    int64_t tokens, decodes, by_sequence, decode_tasks, chunk_tasks;
    const int32_t *block_tables;   // [sequences, max_blocks]
    const int32_t *context_lens;   // [sequences]
    const int32_t *query_starts;   // [sequences + 1]
    const int32_t *task_starts;    // [decodes + 1], the first decode task of each sequence
    const int32_t *task_sequence;  // [decode_tasks]
    const int32_t *tiles;          // [chunk_tasks, 2], sequence and first token of each tile
    const int64_t *slots;          // [tokens]
    void *partials;                // [decode_tasks, heads, head_dim + 2]: weighted sum, its maximum score, its weight
};

struct Form {  // of one layer, mirrored by native.py
    double scale, softcap;  // softcap: 0 for none
    int64_t window, chunk;  // 0: all that came before
    const void *sinks;      // [heads] of the accumulator's type, or null

    int64_t lowest(int64_t position) const {  // the first position that a token sees
        int64_t first = window ? std::max<int64_t>(0, position - window + 1) : 0;
        return chunk ? std::max(first, position / chunk * chunk) : first;
    }
};

constexpr int64_t RUN = 64;       // keys of a decode task and of a chunk's inner block; native.py knows it too
constexpr int64_t WIDTH = 4;      // vectors in a chunk tile's row dimension
constexpr int64_t MAX_DIM = 256;  // as in native.py

struct bf16 { uint16_t bits; };
struct fp8 { uint8_t bits; };  // float8_e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinity

template <class A> struct Lanes;  // vectors of the accumulator type, 64 bytes
template <> struct Lanes<float> {
    typedef float vec __attribute__((vector_size(64)));
    typedef int32_t ints __attribute__((vector_size(64)));
};
template <> struct Lanes<double> {
    typedef double vec __attribute__((vector_size(64)));
    typedef int64_t ints __attribute__((vector_size(64)));
};
template <class A> using Vec = typename Lanes<A>::vec;
template <class A> constexpr int64_t N = 64 / sizeof(A);
template <class A> constexpr int64_t ROWS = WIDTH * N<A>;  // query rows of a chunk tile

template <class A> inline Vec<A> load(const A *p) { Vec<A> v; std::memcpy(&v, p, sizeof v); return v; }
template <class A> inline void store(A *p, Vec<A> v) { std::memcpy(p, &v, sizeof v); }
inline Vec<float> load(const bf16 *p) {
#ifdef __AVX512F__  // what gcc 12 makes of the other form is three times as long
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
#else
    typedef uint16_t half __attribute__((vector_size(32)));
    typedef uint32_t full __attribute__((vector_size(64)));
    half h;
    std::memcpy(&h, p, sizeof h);
    return (Vec<float>)(__builtin_convertvector(h, full) << 16);
#endif
}
typedef uint8_t Codes __attribute__((vector_size(16)));
inline Vec<float> decode_fp8(Codes codes) {
    typedef uint32_t full __attribute__((vector_size(64)));
    const full code = __builtin_convertvector(codes, full), size = code & 0x7f;
    Vec<float> x = (Vec<float>)((size << 20) + (120u << 23));  // exponent and mantissa in their places, bias 127 in place of 7
    x = size < 8 ? (x - 0x1p-7f) * 2.0f : x;                   // a subnormal has no leading one
    x = size == 0x7f ? x * std::numeric_limits<float>::quiet_NaN() : x;
    return (Vec<float>)((full)x | (code & 0x80) << 24);
}
template <class A, class K> inline Vec<A> widen(const K *p) { return load(p); }
template <> inline Vec<float> widen<float>(const fp8 *p) {
    Codes codes;
    std::memcpy(&codes, p, sizeof codes);
    return decode_fp8(codes);
}
template <> inline Vec<double> widen<double>(const fp8 *p) {
    typedef float half __attribute__((vector_size(32)));
    Codes codes = {};
    std::memcpy(&codes, p, N<double>);
    const Vec<float> both = decode_fp8(codes);
    half first;
    std::memcpy(&first, &both, sizeof first);
    return __builtin_convertvector(first, Vec<double>);
}
template <class A> inline void narrow(A *to, A x) { *to = x; }
inline void narrow(bf16 *to, float x) {  // round to nearest even
    uint32_t u;
    std::memcpy(&u, &x, 4);
    to->bits = std::isnan(x) ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

template <class A, int64_t n> struct Sum {  // halves added to halves: shuffles, where a loop over lanes would be scalar
    typedef A whole __attribute__((vector_size(n * sizeof(A)))), half __attribute__((vector_size(n / 2 * sizeof(A))));
    static A of(whole v) { half h[2]; std::memcpy(h, &v, sizeof v); return Sum<A, n / 2>::of(h[0] + h[1]); }
};
template <class A> struct Sum<A, 2> {
    typedef A pair __attribute__((vector_size(2 * sizeof(A))));
    static A of(pair v) { return v[0] + v[1]; }
};
template <class A> inline A sum(Vec<A> v) { return Sum<A, N<A>>::of(v); }

template <class A> A *workspace(int64_t size) {  // this thread's scratch memory, kept from call to call
    thread_local std::vector<A> memory;
    if (int64_t(memory.size()) < size + N<A>) memory.resize(size + N<A>);
    return (A *)((uintptr_t(memory.data()) + 63) & ~uintptr_t(63));
}

inline Vec<double> exp(Vec<double> x) { for (int i = 0; i < 8; i++) x[i] = std::exp(x[i]); return x; }
inline Vec<float> exp(Vec<float> x) {  // for x <= 0, exactly 0 below -87; Cephes' polynomial, relative error about 1e-7
    typedef Lanes<float>::ints ints;
    ints dead = x < -87.0f;
    x = dead ? (Vec<float>){} : x;
    Vec<float> n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // round to an integer
    Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec<float> y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    y = (Vec<float>)((ints)y + (__builtin_convertvector(n, ints) << 23));
    return dead ? (Vec<float>){} : y;
}

template <class A> inline Vec<A> capped(Vec<A> score, A cap) {  // cap * tanh(score / cap)
    const Vec<A> size = score < A(0) ? -score : score, left = exp(A(-2) / cap * size);
    const Vec<A> part = cap * (A(1) - left) / (A(1) + left);
    return score < A(0) ? -part : part;
}

// ---- decode: one query token against one run of keys ---------------------------------------------------------------

template <int G> struct Heads {};  // so many heads that share a KV head

// scores[head][key] of four keys, heads RUN apart.
template <int G, class K, class A> inline void dot(Heads<G>, const A *q, const K *const k[4], int64_t dim, A *scores) {
    Vec<A> acc[G][4] = {};
    for (int64_t d = 0; d < dim; d += N<A>)
        for (int i = 0; i < 4; i++) {
            const Vec<A> key = widen<A>(k[i] + d);
            for (int h = 0; h < G; h++) acc[h][i] += load(q + h * dim + d) * key;
        }
    for (int h = 0; h < G; h++)
        for (int i = 0; i < 4; i++) scores[h * RUN + i] = sum<A>(acc[h][i]);
}

// out[head] += the four keys' values, each times p[head][key]; heads of `out` lie dim + 2 apart.
template <int G, class K, class A> inline void add(Heads<G>, const A *p, const K *const v[4], int64_t dim, A *out) {
    for (int64_t d = 0; d < dim; d += N<A>) {
        const Vec<A> v0 = widen<A>(v[0] + d), v1 = widen<A>(v[1] + d), v2 = widen<A>(v[2] + d), v3 = widen<A>(v[3] + d);
        for (int h = 0; h < G; h++) {
            A *o = out + h * (dim + 2) + d;
            const A *w = p + h * RUN;
            store(o, load(o) + w[0] * v0 + w[1] * v1 + w[2] * v2 + w[3] * v3);
        }
    }
}

template <class T, class K, class A>
void decode_run(const Geometry &g, const Form &form, int64_t seq, int64_t task, const T *query, const K *keys, const K *values,
                A key_scale, A *out) {
    const int64_t dim = g.head_dim, group = g.heads / g.kv_heads, row = g.kv_heads * dim;
    const int64_t lowest = form.lowest(g.context_lens[seq] - 1), begin = (lowest / RUN + task - g.task_starts[seq]) * RUN;
    const int64_t first = std::max(begin, lowest), count = std::min<int64_t>(begin + RUN, g.context_lens[seq]) - first;
    const int32_t *table = g.block_tables + seq * g.max_blocks;
    A *p = workspace<A>(g.heads * (RUN + dim)), *q = p + g.heads * RUN;

    // step(heads, first of them, key j, rows of keys j to j + 3) in the order of memory, and four keys ahead are fetched,
    // since hardware prefetchers stop at every 4 KiB. Past the end the last row is repeated.
    auto for_all = [&](const K *cache, auto step) {
        auto at = [&](int64_t j) {
            const int64_t key = first + std::min(j, count - 1);
            return cache + table[key / g.block_size] * g.block_stride + key % g.block_size * row;
        };
        const K *rows[4] = {at(0), at(1), at(2), at(3)};
        for (int64_t j = 0; j < count; j += 4) {
            const K *next[4] = {at(j + 4), at(j + 5), at(j + 6), at(j + 7)};
            for (int64_t kv = 0; kv < g.kv_heads; kv++) {
                const K *now[4];
                for (int i = 0; i < 4; i++) {
                    now[i] = rows[i] + kv * dim;
                    for (int64_t d = 0; d < dim; d += 64 / sizeof(K)) __builtin_prefetch(next[i] + kv * dim + d);
                }
                int64_t h = kv * group, end = h + group;
                for (; h + 4 <= end; h += 4) step(Heads<4>{}, h, j, now);
                if (h + 3 == end) step(Heads<3>{}, h, j, now);
                if (h + 2 == end) step(Heads<2>{}, h, j, now);
                if (h + 1 == end) step(Heads<1>{}, h, j, now);
            }
            std::copy(next, next + 4, rows);
        }
    };
    const A scale = A(form.scale) * key_scale, cap = form.softcap, infinity = std::numeric_limits<A>::infinity();
    for (int64_t i = 0; i < g.heads * dim; i += N<A>) store(q + i, load(query + i) * scale);
    for_all(keys, [&](auto heads, int64_t h, int64_t j, auto rows) {
        dot(heads, q + h * dim, rows, dim, p + h * RUN + j);
    });
    for (int64_t h = 0; h < g.heads; h++) {  // weights in place of scores
        A *s = p + h * RUN, *o = out + h * (dim + 2);
        if (cap > 0) for (int64_t j = 0; j < RUN; j += N<A>) store(s + j, capped(load(s + j), cap));
        std::fill(s + count, s + RUN, -infinity);
        Vec<A> peaks = load(s), total = {};
        for (int64_t j = N<A>; j < RUN; j += N<A>) peaks = load(s + j) > peaks ? load(s + j) : peaks;
        A top = peaks[0];
        for (int64_t i = 1; i < N<A>; i++) top = std::max(top, A(peaks[i]));
        for (int64_t j = 0; j < RUN; j += N<A>) {
            const Vec<A> weight = exp(load(s + j) - top);
            store(s + j, weight);
            total += weight;
        }
        std::fill(o, o + dim, A(0));
        o[dim] = top;
        o[dim + 1] = sum<A>(total);
    }
    for_all(values, [&](auto heads, int64_t h, int64_t j, auto rows) {
        add(heads, p + h * RUN + j, rows, dim, out + h * (dim + 2));
    });
}

template <class T, class A>
void merge_runs(const Geometry &g, const Form &form, int64_t seq, A value_scale, T *out) {
    const int64_t dim = g.head_dim, size = g.heads * (dim + 2);
    for (int64_t h = 0; h < g.heads; h++, out += dim) {
        const A *runs = (const A *)g.partials + g.task_starts[seq] * size + h * (dim + 2);
        const int64_t count = g.task_starts[seq + 1] - g.task_starts[seq];
        A top = runs[dim], weight = 0, acc[MAX_DIM] = {};
        for (int64_t r = 1; r < count; r++) top = std::max(top, runs[r * size + dim]);
        if (form.sinks) {
            const A sink = ((const A *)form.sinks)[h];
            top = std::max(top, sink);
            weight = std::exp(sink - top);
        }
        for (int64_t r = 0; r < count; r++) {
            const A *run = runs + r * size, factor = std::exp(run[dim] - top);
            weight += factor * run[dim + 1];
            for (int64_t d = 0; d < dim; d++) acc[d] += factor * run[d];
        }
        for (int64_t d = 0; d < dim; d++) narrow(out + d, acc[d] / weight * value_scale);
    }
}

// ---- chunk: a tile of query rows in lanes against all keys that they see -------------------------------------------

// c[m][ROWS] += a(m, k) * b[k][ROWS] for four m, where a(m, k) = a[m * step_m + k * step_k]
template <class A> inline void multiply(A *c, const A *a, int64_t step_m, int64_t step_k, const A *b, int64_t depth) {
    Vec<A> acc[4][WIDTH];
    for (int m = 0; m < 4; m++) for (int w = 0; w < WIDTH; w++) acc[m][w] = load(c + m * ROWS<A> + w * N<A>);
    for (int64_t k = 0; k < depth; k++) {
        Vec<A> row[WIDTH];
        for (int w = 0; w < WIDTH; w++) row[w] = load(b + k * ROWS<A> + w * N<A>);
        for (int m = 0; m < 4; m++)
            for (int w = 0; w < WIDTH; w++) acc[m][w] += a[m * step_m + k * step_k] * row[w];
    }
    for (int m = 0; m < 4; m++) for (int w = 0; w < WIDTH; w++) store(c + m * ROWS<A> + w * N<A>, acc[m][w]);
}

template <class T, class K, class A>
void chunk_tile(const Geometry &g, const Form &form, const int32_t *tile, int64_t kv, const T *query, int64_t query_stride,
                const K *keys, const K *values, A key_scale, A value_scale, T *out) {
    constexpr int64_t R = ROWS<A>;
    const int64_t dim = g.head_dim, group = g.heads / g.kv_heads, row = g.kv_heads * dim, seq = tile[0];
    const int64_t first = g.query_starts[seq] + tile[1], tokens = std::min(R / group, g.query_starts[seq + 1] - first);
    const int64_t seen = g.context_lens[seq] - (g.query_starts[seq + 1] - first) + 1;  // keys that the first token sees
    const int64_t context = seen + tokens - 1;                                         // and the last one
    const int64_t lowest = form.lowest(seen - 1);  // the first key that any of them sees
    const int32_t *table = g.block_tables + seq * g.max_blocks;
    const A scale = A(form.scale) * key_scale, cap = form.softcap, infinity = std::numeric_limits<A>::infinity();
    A *q = workspace<A>(2 * dim * R + RUN * (R + dim)), *acc = q + dim * R, *p = acc + dim * R, *kv_block = p + RUN * R;
    A top[R], weight[R] = {}, least[R], limit[R];

    std::fill(q, q + dim * R, A(0));
    std::fill(acc, acc + dim * R, A(0));
    std::fill(top, top + R, A(-1e30));  // finite: a row may see nothing of a run, before its window
    std::fill(least, least + R, A(lowest));
    std::fill(limit, limit + R, A(context));
    for (int64_t r = 0; r < tokens * group; r++) {
        const T *from = query + (first + r / group) * query_stride + (kv * group + r % group) * dim;
        for (int64_t d = 0; d < dim; d += N<A>) {
            Vec<A> x = load(from + d) * scale;
            for (int64_t i = 0; i < N<A>; i++) q[(d + i) * R + r] = x[i];
        }
        least[r] = A(form.lowest(seen - 1 + r / group));
        limit[r] = A(seen + r / group);
        if (form.sinks) {
            top[r] = ((const A *)form.sinks)[kv * group + r % group];
            weight[r] = 1;
        }
    }
    auto gather = [&](const K *cache, int64_t block, int64_t count) {  // keys or values of one block, the rest zero
        for (int64_t j = 0; j < RUN; j++) {
            const int64_t at = std::clamp(block + j, lowest, block + count - 1);
            const K *from = cache + table[at / g.block_size] * g.block_stride + at % g.block_size * row + kv * dim;
            const bool there = at == block + j;
            for (int64_t d = 0; d < dim; d += N<A>) store(kv_block + j * dim + d, there ? widen<A>(from + d) : Vec<A>{});
        }
    };
    for (int64_t block = lowest / RUN * RUN; block < context; block += RUN) {
        const int64_t count = std::min(RUN, context - block);
        gather(keys, block, count);
        std::fill(p, p + RUN * R, A(0));
        for (int64_t j = 0; j < count; j += 4) multiply<A>(p + j * R, kv_block + j * dim, dim, 1, q, dim);
        gather(values, block, count);
        for (int64_t r = 0; r < R; r += N<A>) {
            const Vec<A> old = load(top + r), from = load(least + r), bound = load(limit + r);
            Vec<A> peak = old, total = {};
            for (int64_t j = 0; j < RUN; j++) {
                Vec<A> s = load(p + j * R + r), position = A(block + j) + Vec<A>{};
                if (cap > 0) s = capped(s, cap);
                s = (position >= from) & (position < bound) ? s : -infinity + Vec<A>{};
                store(p + j * R + r, s);
                peak = s > peak ? s : peak;
            }
            for (int64_t j = 0; j < RUN; j++) {
                Vec<A> e = exp(load(p + j * R + r) - peak);
                store(p + j * R + r, e);
                total += e;
            }
            const Vec<A> factor = exp(old - peak);  // 0 at first, when `old` is far below
            store(top + r, peak);
            store(weight + r, load(weight + r) * factor + total);
            for (int64_t d = 0; d < dim; d++) store(acc + d * R + r, load(acc + d * R + r) * factor);
        }
        for (int64_t d = 0; d < dim; d += 4) multiply<A>(acc + d * R, kv_block + d, 1, dim, p, count);
    }
    for (int64_t r = 0; r < tokens * group; r++) {
        T *to = out + ((first + r / group) * g.heads + kv * group + r % group) * dim;
        for (int64_t d = 0; d < dim; d++) narrow(to + d, acc[d * R + r] / weight[r] * value_scale);
    }
}

// ---- one layer of one step -----------------------------------------------------------------------------------------

template <class T, class K, class A>
void attend(const Geometry &g, const Form &form, const T *query, int64_t query_stride, const K *key, int64_t key_stride,
            const K *value, int64_t value_stride, K *keys, K *values, A key_scale, A value_scale, T *out) {
    const int64_t row = g.kv_heads * g.head_dim, partial = g.heads * (g.head_dim + 2);
    auto write = [&](int64_t t) {
        const int64_t at = g.slots[t] / g.block_size * g.block_stride + g.slots[t] % g.block_size * row;
        std::memcpy(keys + at, key + t * key_stride, row * sizeof(K));
        std::memcpy(values + at, value + t * value_stride, row * sizeof(K));
    };
    auto decode = [&](int64_t seq, int64_t task) {
        decode_run<T, K, A>(g, form, seq, task, query + seq * query_stride, keys, values, key_scale,
                            (A *)g.partials + task * partial);
    };
    auto merge = [&](int64_t seq) { merge_runs<T, A>(g, form, seq, value_scale, out + seq * g.heads * g.head_dim); };
    const int64_t shared = g.by_sequence ? g.decodes : 0;  // tokens from here on may be read by any thread
#pragma omp parallel num_threads(g.threads) if (g.decode_tasks + g.chunk_tasks > 1)
    {
        if (shared < g.tokens) {
#pragma omp for schedule(static)
            for (int64_t t = shared; t < g.tokens; t++) write(t);
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < g.chunk_tasks * g.kv_heads; i++)
            chunk_tile<T, K, A>(g, form, g.tiles + i / g.kv_heads * 2, i % g.kv_heads, query, query_stride, keys, values,
                                key_scale, value_scale, out);
        if (g.by_sequence) {  // the same arithmetic, without a barrier
#pragma omp for schedule(dynamic) nowait
            for (int64_t seq = 0; seq < g.decodes; seq++) {
                write(seq);
                for (int64_t task = g.task_starts[seq]; task < g.task_starts[seq + 1]; task++) decode(seq, task);
                merge(seq);
            }
        } else if (g.decodes) {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < g.decode_tasks; task++) decode(g.task_sequence[task], task);
#pragma omp for schedule(static) nowait
            for (int64_t seq = 0; seq < g.decodes; seq++) merge(seq);
        }
    }
}

// T: of queries and outputs. K: of the pool, and of keys and values as they come. A: of sums.
#define EXPORT(NAME, T, K, A)                                                                                        \
    extern "C" void NAME(const Geometry *g, const Form *form, const T *query, int64_t query_stride, const K *key,    \
                         int64_t key_stride, const K *value, int64_t value_stride, K *keys, K *values,               \
                         double key_scale, double value_scale, T *out) {                                             \
        attend<T, K, A>(*g, *form, query, query_stride, key, key_stride, value, value_stride, keys, values,          \
                        A(key_scale), A(value_scale), out);                                                          \
    }
EXPORT(attend_bfloat16, bf16, bf16, float)
EXPORT(attend_float32, float, float, float)
EXPORT(attend_float64, double, double, double)
EXPORT(attend_bfloat16_fp8, bf16, fp8, float)
EXPORT(attend_float32_fp8, float, fp8, float)
EXPORT(attend_float64_fp8, double, fp8, double)
