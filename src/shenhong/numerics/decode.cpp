// Generation: whole layers over a flat batch of tokens in one call, attention straight from the paged latent cache.
//
// Every token is computed as a decode step is (absorbed form, DeepSeek-V2 section 2.1.2), prompts too, and every sum
// has one order that depends on nothing but the token's own text: a row of a product adds its columns one after the
// other, attention adds keys from position 0 on, a token adds its experts by number. So a token's result is the same
// to the bit whatever shares the batch, however its prompt was cut, and on any number of threads.
// Weights (packed, see panels.h) and cache are float or bfloat16; sums and the residual stream are float.
//
// With grouped queries (key_heads > 0) a cache row holds every group's key and value, [G, 2d], and nothing is absorbed.
//
// Legend: N tokens, S sequences, D hidden, H heads, R latent rank, n nope dims, r rope dims, v value dims, e = R + r,
// G groups of heads with one key (latent attention: 1), J heads of a group, d width of a query, E experts, K chosen,
// I expert width.
#include <sched.h>

#include <atomic>

#include "paged.h"

extern "C" void shenhong_select(const float*, const float*, int64_t*, int64_t, int64_t, int, int, int, int, int);

// A barrier that spins for a while and then lets others run: this machine may be busy.
class Barrier {
    std::atomic<int> waiting{0}, round{0};

  public:
    int threads = 1;
    void wait() {
        if (threads == 1) return;
        const int now = round.load();
        if (waiting.fetch_add(1) + 1 == threads) {
            waiting.store(0);
            round.store(now + 1);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++)
            if (spins > 20000) sched_yield();
    }
};

static inline void rms(const float* x, const float* weight, float* y, int64_t dim, float eps) {
    vf squares{};
    for (int64_t i = 0; i < dim; i += W) {
        const vf v = load_up_to(x + i, dim - i);
        squares += v * v;
    }
    const float r = 1.f / std::sqrt(sum(squares) / dim + eps);
    for (int64_t i = 0; i < dim; i += W)
        store_up_to(y + i, load_up_to(x + i, dim - i) * r * load_up_to(weight + i, dim - i), dim - i);
}

// Pairs (2i, 2i+1) of x turned by the angle of a position.
template <class T>
static inline void turn(const float* x, T* y, const float* c, const float* s, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        y[2 * i] = from_float<T>(even * c[i] - odd * s[i]);
        y[2 * i + 1] = from_float<T>(odd * c[i] + even * s[i]);
    }
}

template <class T> class Decode {
    const DecodeModel& m;
    const DecodeBatch& b;
    const int64_t N, D, H, R, e, d, q_in, G, J, row;
    int threads;
    Barrier barrier;
    std::vector<float> u, down, queries, latent, mixed, heads, dense, inner, scores, gates;
    std::vector<int64_t> chosen;
    std::vector<int32_t> sequence;   // of each token
    std::vector<int64_t> tiles;      // first attention task of each sequence
    std::atomic<int64_t> next_task{0};

  public:
    Decode(const DecodeModel& m, const DecodeBatch& b)
        : m(m), b(b), N(b.starts[b.sequences]), D(m.hidden), H(m.heads), R(m.rank), e(m.rank + m.rope),
          d(m.nope + m.rope), q_in(m.q_rank ? m.q_rank : H * d), G(std::max<int64_t>(1, m.key_heads)), J(H / G),
          row(m.key_heads ? 2 * G * d : e), threads(1) {
        u.resize(N * D), down.resize(N * (q_in + row)), mixed.resize(N * H * R);
        if (!m.key_heads) latent.resize(N * H * e);
        if (m.q_rank) queries.resize(N * H * d);
        heads.resize(N * H * m.value), scores.resize(N * m.experts), gates.resize(N * m.chosen);
        chosen.resize(N * m.chosen), inner.resize(N * m.chosen * m.inner), sequence.resize(N);
        int64_t widest = 0;
        for (int64_t l = b.first_layer; l < b.last_layer; l++) widest = std::max(widest, m.layers[l].dense_inner);
        dense.resize(N * widest);
        tiles.push_back(0);
        for (int64_t s = 0; s < b.sequences; s++) {
            for (int64_t i = b.starts[s]; i < b.starts[s + 1]; i++) sequence[i] = int32_t(s);
            tiles.push_back(tiles.back() + G * tiles_of(s));
        }
    }

    void run() {
        if (b.threads == 1) {
            work(0);
            return;
        }
#pragma omp parallel num_threads(int(b.threads))
        {
            // There may be fewer than asked for, and the barrier must know.
#pragma omp single
            threads = barrier.threads = omp_get_num_threads();
            work(omp_get_thread_num());
        }
    }

  private:
    // Attention tasks of one sequence and group.
    int64_t tiles_of(int64_t s) const { return ((b.starts[s + 1] - b.starts[s]) * J + W - 1) / W; }

    std::pair<int64_t, int64_t> share(int64_t count, int thread) const {
        return {count * thread / threads, count * (thread + 1) / threads};
    }

    // out [N, rows] (+)= x [N, K] times a packed [rows, K], this thread's panels.
    template <bool ADD>
    void product(int thread, const float* x, int64_t x_stride, int64_t K, const void* packed, int64_t rows, float* out,
                 int64_t out_stride) {
        const auto [begin, end] = share(panels(rows), thread);
        for (int64_t p = begin; p < end; p++)
            meet(N, K, [&](int64_t i) { return x + i * x_stride; }, (const T*)packed + p * depth<T>(K) * NB,
                 [&](int64_t i, const vf* sums) { put<ADD>(out + i * out_stride + p * NB, sums, rows - p * NB); });
    }

    // For every head: out [N, H, rows] = x [N, H, K] times its packed [rows, K]; this thread's heads and panels.
    void per_head(int thread, const float* x, int64_t x_stride, int64_t x_head, int64_t K, const void* packed,
                  int64_t rows, float* out, int64_t out_head) {
        const int64_t each = panels(rows);
        const auto [begin, end] = share(H * each, thread);
        for (int64_t t = begin; t < end; t++) {
            const int64_t h = t / each, p = t % each;
            meet(N, K, [&](int64_t i) { return x + i * x_stride + h * x_head; }, (const T*)packed + t * depth<T>(K) * NB,
                 [&](int64_t i, const vf* sums) {
                     put<false>(out + (i * H + h) * out_head + p * NB, sums, rows - p * NB);
                 });
        }
    }

    void work(int thread) {
        Columns<T> columns(m);
        std::vector<int64_t> begin_of, order;
        const auto [first, last] = share(N, thread);
        for (int64_t i = first; i < last && b.tokens; i++) {
            const T* in = (const T*)b.embedding + b.tokens[i] * D;
            for (int64_t k = 0; k < D; k += W) store_up_to(b.x + i * D + k, load_up_to(in + k, D - k), D - k);
        }
        for (int64_t number = b.first_layer; number < b.last_layer; number++) {
            const DecodeLayer& layer = m.layers[number];
            for (int64_t i = first; i < last; i++) rms(b.x + i * D, layer.norm, &u[i * D], D, m.eps);
            barrier.wait();
            product<false>(thread, u.data(), D, D, layer.down, q_in + row, down.data(), q_in + row);
            if (thread == 0) next_task = 0;
            barrier.wait();
            for (int64_t i = first; i < last; i++) m.key_heads ? remember_groups(layer, i) : remember(layer, i);
            if (!m.key_heads) absorb(thread, layer, first, last);
            barrier.wait();
            for (int64_t task; (task = next_task.fetch_add(1)) < tiles.back();) attend(columns, layer, task);
            barrier.wait();
            if (!m.key_heads) {
                per_head(thread, mixed.data(), H * R, R, R, layer.uv, m.value, heads.data(), m.value);
                barrier.wait();
            }
            product<true>(thread, heads.data(), H * m.value, H * m.value, layer.out, D, b.x, D);
            barrier.wait();
            for (int64_t i = first; i < last; i++) rms(b.x + i * D, layer.mlp_norm, &u[i * D], D, m.eps);
            if (layer.router) route(layer, first, last);
            barrier.wait();
            if (layer.router) plan(begin_of, order);
            if (layer.dense_gate_up)
                gated(thread, layer.dense_gate_up, layer.dense_inner, N, [](int64_t i) { return i; },
                      [](int64_t) { return 1.f; }, dense.data());
            if (layer.router)
                for (int64_t x = 0; x < m.experts; x++) {
                    const int64_t* mine = order.data() + begin_of[x];
                    gated(int((thread + x) % threads), (const T*)layer.gate_up + x * panels(2 * inner_padded()) * depth<T>(D) * NB,
                          m.inner, begin_of[x + 1] - begin_of[x], [&](int64_t i) { return mine[i] / m.chosen; },
                          [&](int64_t i) { return gates[mine[i]]; }, &inner[begin_of[x] * m.inner]);
                }
            barrier.wait();
            finish(thread, layer, begin_of, order);
            barrier.wait();
        }
        for (int64_t i = first; i < last; i++) rms(b.x + i * D, b.last_norm, b.x + i * D, D, m.eps);
    }

    const float* angle(const float* table, int64_t i) const { return table + b.positions[i] * (m.rope / 2); }
    int64_t inner_padded() const { return (m.inner + NB / 2 - 1) / (NB / 2) * (NB / 2); }

    // Queries [N, H, e] that meet the latent itself, from the layer's input or the queries' normed latent.
    void absorb(int thread, const DecodeLayer& layer, int64_t first, int64_t last) {
        if (m.q_rank) {
            barrier.wait();
            product<false>(thread, down.data(), q_in + e, m.q_rank, layer.q_b, H * d, queries.data(), H * d);
        }
        barrier.wait();
        const float* q = m.q_rank ? queries.data() : down.data();
        const int64_t q_stride = m.q_rank ? H * d : q_in + e;
        per_head(thread, q, q_stride, d, m.nope, layer.uk, R, latent.data(), e);
        for (int64_t i = first; i < last; i++)
            for (int64_t h = 0; h < H; h++)
                turn(q + i * q_stride + h * d + m.nope, &latent[(i * H + h) * e + R], angle(m.cosine, i),
                     angle(m.sine, i), m.rope / 2);
    }

    // The token's place in the cache.
    T* place_of(const DecodeLayer& layer, int64_t i) const {
        const int64_t position = b.positions[i];
        const int64_t page = b.tables[sequence[i] * b.table_width + position / m.page];
        return (T*)layer.pool + (page * m.page + position % m.page) * row;
    }

    // Grouped queries: adds biases, norms heads and turns them; queries stay in `down`, keys and values go to the cache.
    void remember_groups(const DecodeLayer& layer, int64_t i) {
        float* q = &down[i * (q_in + row)];
        if (layer.qkv_bias)
            for (int64_t x = 0; x < q_in + row; x++) q[x] += layer.qkv_bias[x];
        float *k = q + H * d, *v = k + G * d;
        const float *c = angle(m.cosine, i), *s = angle(m.sine, i);
        for (int64_t h = 0; h < H; h++) {
            if (layer.q_norm) rms(q + h * d, layer.q_norm, q + h * d, d, m.eps);
            turn(q + h * d, q + h * d, c, s, d / 2);
        }
        T* place = place_of(layer, i);
        for (int64_t g = 0; g < G; g++, place += 2 * d) {
            if (layer.k_norm) rms(k + g * d, layer.k_norm, k + g * d, d, m.eps);
            turn(k + g * d, place, c, s, d / 2);
            for (int64_t x = 0; x < d; x += W) store_up_to(place + d + x, load_up_to(v + g * d + x, d - x), d - x);
        }
    }

    // Norms the queries' latent; writes the normed latent and the rotated key into the token's place in the cache.
    void remember(const DecodeLayer& layer, int64_t i) {
        float* kept = &down[i * (q_in + e)];
        if (m.q_rank) rms(kept, layer.q_norm, kept, q_in, m.latent_eps);
        kept += q_in;
        rms(kept, layer.kv_norm, kept, R, m.latent_eps);
        T* place = place_of(layer, i);
        for (int64_t x = 0; x < R; x += W) store_up_to(place + x, load_up_to(kept + x, R - x), R - x);
        turn(kept + R, place + R, angle(m.cosine, i), angle(m.sine, i), m.rope / 2);
    }

    void attend(Columns<T>& columns, const DecodeLayer& layer, int64_t task) {
        const int64_t s = std::upper_bound(tiles.begin(), tiles.end(), task) - tiles.begin() - 1;
        const int64_t group = (task - tiles[s]) / tiles_of(s), from = (task - tiles[s]) % tiles_of(s) * W;
        const int64_t to = std::min<int64_t>(from + W, (b.starts[s + 1] - b.starts[s]) * J);
        columns.table = b.tables + s * b.table_width;
        columns.pool = (const T*)layer.pool + group * 2 * d;
        int64_t token[W], head[W];
        int32_t length[W];
        for (int64_t c = from; c < to; c++) {
            token[c - from] = b.starts[s] + c / J, head[c - from] = group * J + c % J;
            length[c - from] = b.positions[token[c - from]] + 1;
        }
        if (m.key_heads)
            columns.run(int(to - from), length, [&](int j) { return &down[token[j] * (q_in + row) + head[j] * d]; },
                        [&](int j) { return &heads[(token[j] * H + head[j]) * d]; });
        else
            columns.run(int(to - from), length, [&](int j) { return &latent[(token[j] * H + head[j]) * e]; },
                        [&](int j) { return &mixed[(token[j] * H + head[j]) * R]; });
    }

    void route(const DecodeLayer& layer, int64_t first, int64_t last) {
        const int64_t E = m.experts, K = m.chosen;
        for (int64_t p = 0; p < panels(E); p++)
            meet(last - first, D, [&](int64_t i) { return &u[(first + i) * D]; }, layer.router + p * D * NB,
                 [&](int64_t i, const vf* sums) {
                     vf s[NV];
                     for (int x = 0; x < NV; x++) s[x] = m.softmax ? sums[x] : sigmoid(sums[x]);
                     put<false>(&scores[(first + i) * E + p * NB], s, E - p * NB);
                 });
        for (int64_t i = first; i < last && m.softmax; i++) {
            float *row = &scores[i * E], total = 0;
            const float top = *std::max_element(row, row + E);
            for (int64_t x = 0; x < E; x++) total += row[x] = std::exp(row[x] - top);
            for (int64_t x = 0; x < E; x++) row[x] /= total;
        }
        shenhong_select(&scores[first * E], layer.bias, &chosen[first * K], last - first, E, int(K), int(m.groups),
                        int(m.kept_groups), int(m.softmax), 1);
        for (int64_t i = first; i < last; i++) {
            float total = 0;
            for (int64_t k = 0; k < K; k++) total += gates[i * K + k] = scores[i * E + chosen[i * K + k]];
            const float factor = float(m.scaling) / (m.normalise ? total + 1e-20f : 1.f);
            for (int64_t k = 0; k < K; k++) gates[i * K + k] *= factor;
        }
    }

    // Assignments n K + k sorted by expert, by token within one; every thread makes its own copy.
    void plan(std::vector<int64_t>& begin_of, std::vector<int64_t>& order) const {
        begin_of.assign(m.experts + 1, 0), order.resize(N * m.chosen);
        for (int64_t a = 0; a < N * m.chosen; a++) begin_of[chosen[a] + 1]++;
        for (int64_t x = 0; x < m.experts; x++) begin_of[x + 1] += begin_of[x];
        std::vector<int64_t> next(begin_of);
        for (int64_t a = 0; a < N * m.chosen; a++) order[next[chosen[a]]++] = a;
    }

    // out [rows, width] = gate(i) swiglu(gate_up u[token(i)]); a panel holds NB/2 gates and their NB/2 ups.
    template <class Token, class Gate>
    void gated(int thread, const void* packed, int64_t width, int64_t rows, Token token, Gate gate, float* out) {
        constexpr int half = NV / 2;
        if (!rows) return;
        const auto [begin, end] = share((width + NB / 2 - 1) / (NB / 2), thread);
        for (int64_t p = begin; p < end; p++)
            meet(rows, D, [&](int64_t i) { return &u[token(i) * D]; }, (const T*)packed + p * depth<T>(D) * NB,
                 [&](int64_t i, const vf* sums) {
                     const float factor = gate(i);
                     for (int x = 0; x < half; x++) {
                         const int64_t at = p * (NB / 2) + x * W;
                         if (at >= width) break;
                         const vf g = sums[x];
                         store_up_to(out + i * width + at, g * sigmoid(g) * sums[half + x] * factor, width - at);
                     }
                 });
    }

    // x += dense block, then += the experts by number.
    void finish(int thread, const DecodeLayer& layer, const std::vector<int64_t>& begin_of,
                const std::vector<int64_t>& order) {
        if (layer.dense_gate_up)
            product<true>(thread, dense.data(), layer.dense_inner, layer.dense_inner, layer.dense_down, D, b.x, D);
        if (!layer.router) return;
        const auto [begin, end] = share(panels(D), thread);
        for (int64_t x = 0; x < m.experts; x++)
            for (int64_t p = begin; p < end; p++)
                meet(begin_of[x + 1] - begin_of[x], m.inner, [&](int64_t i) { return &inner[(begin_of[x] + i) * m.inner]; },
                     (const T*)layer.expert_down + (x * panels(D) + p) * depth<T>(m.inner) * NB,
                     [&](int64_t i, const vf* sums) {
                         put<true>(b.x + order[begin_of[x] + i] / m.chosen * D + p * NB, sums, D - p * NB);
                     });
    }
};

EXPORT int shenhong_panel() { return NB; }
EXPORT int shenhong_pair(int dtype) { return dtype == BF16 ? pair<bf16> : pair<float>; }

EXPORT void shenhong_decode(const DecodeModel* model, const DecodeBatch* batch) {
    if (model->dtype == BF16)
        Decode<bf16>(*model, *batch).run();
    else
        Decode<float>(*model, *batch).run();
}

// y [N, rows] = x [N, K] times a packed [rows, K]; x and y float. Rows of y do not depend on each other.
template <class T>
static void project(const float* x, const T* packed, float* y, int64_t N, int64_t K, int64_t rows, int threads) {
    parallel_rows(panels(rows), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t p = begin; p < end; p++)
            meet(N, K, [&](int64_t i) { return x + i * K; }, packed + p * depth<T>(K) * NB,
                 [&](int64_t i, const vf* sums) { put<false>(y + i * rows + p * NB, sums, rows - p * NB); });
    });
}
EXPORT void shenhong_project(int dtype, const float* x, const void* packed, float* y, int64_t N, int64_t K,
                             int64_t rows, int threads) {
    if (dtype == BF16)
        project(x, (const bf16*)packed, y, N, K, rows, threads);
    else
        project(x, (const float*)packed, y, N, K, rows, threads);
}
