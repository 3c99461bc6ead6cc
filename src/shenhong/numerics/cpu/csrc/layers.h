// A model's layers over a flat batch of tokens, by all threads at once, attention straight from the paged cache.
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
#pragma once
#include <tuple>

#include "experts.h"
#include "paged.h"

template <class T> static inline void rms(const float* x, const float* weight, T* y, int64_t dim, float eps) {
    vf squares{};
    for (int64_t i = 0; i < dim; i += W) {
        const vf v = load_up_to(x + i, dim - i);
        squares += v * v;
    }
    const float r = 1.f / std::sqrt(fold(squares, [](vf a, vf b) { return a + b; }) / dim + eps);
    for (int64_t i = 0; i < dim; i += W)
        store_up_to(y + i, load_up_to(x + i, dim - i) * r * load_up_to(weight + i, dim - i), dim - i);
}

// Pairs (2i, 2i+1) of x rotated by the angle of a position.
template <class S, class T>
static inline void apply_rope(const S* x, T* y, const float* c, const float* s, int64_t half) {
    const vi twice = each_lane([](int i) { return i / 2; }), other = each_lane([](int i) { return i ^ 1; });
    const vf sign = __builtin_convertvector(each_lane([](int i) { return i % 2 ? 1 : -1; }), vf);
    for (int64_t i = 0; i < half; i += W) {
        const vf cosine = load_up_to(c + i, half - i), sine = load_up_to(s + i, half - i);
        for (int64_t at = 2 * i, part = 0; at < 2 * half && part < 2; at += W, part++) {
            const vi angles = twice + int32_t(part * W / 2);
            const vf in = load_up_to(x + at, 2 * half - at);
            store_up_to(y + at,
                        in * __builtin_shuffle(cosine, angles) +
                            __builtin_shuffle(in, other) * (__builtin_shuffle(sine, angles) * sign),
                        2 * half - at);
        }
    }
}

// The tokens of a call, each sequence's consecutive.
struct Flat {
    std::vector<int32_t> sequences;  // their numbers in the DecodeBatch
    std::vector<int64_t> starts;     // [S + 1]
    std::vector<int32_t> positions;  // [N]
    const int64_t* tokens;           // [N] or null: x holds the beginning
    int64_t size() const { return starts.back(); }
};

template <class T> class Layers {
    using L = Left<T>;
    DecodeModel m;
    DecodeBatch b;
    int64_t D, H, R, e, d, q_in, G, J, row, widest, N;
    bool small;
    const Flat* flat;
    // Left sides of products: rows of the layer's normed input, queries' latents, queries, absorbed queries,
    // attention's latents and values, the dense block's inside and the experts'.
    Buffer<L> u, kept, queries, latent, mixed, heads, dense, inner;
    Buffer<float> down, exact, scores, gates;
    std::vector<int64_t> chosen;
    std::vector<int32_t> owner;  // of each token: its sequence's place in the batch
    std::vector<int64_t> tiles;  // first attention task of each sequence
    std::atomic<int64_t> next_task{0};

public:
    float* x;  // [N, D] residual stream
    int threads;
    Barrier barrier;

    void begin(const DecodeModel& model, const DecodeBatch& batch) {
        m = model, b = batch;
        D = m.hidden, H = m.heads, R = m.rank, e = m.rank + m.rope, d = m.nope + m.rope;
        q_in = m.q_rank ? m.q_rank : H * d;
        G = std::max<int64_t>(1, m.key_heads), J = H / G, row = m.key_heads ? 2 * G * d : e;
        widest = 0;
        for (int64_t l = b.first_layer; l < b.last_layer; l++) widest = std::max(widest, m.layers[l].dense_inner);
        const int64_t weights = D * (q_in + row + H * m.value) + m.q_rank * H * d + H * R * (m.nope + m.value);
        small = weights * int64_t(sizeof(T)) <= SMALL;
        threads = barrier.threads = 1;
    }

    // Before the threads come.
    void prepare(const Flat& tokens) {
        flat = &tokens, N = tokens.size();
        down.grow(N * (q_in + row)), exact.grow(N * D), scores.grow(N * m.experts), gates.grow(N * m.chosen);
        left(u, N, D), left(kept, N, q_in), left(queries, 1, N * H * d), left(latent, N * H, e);
        left(mixed, N, H * R, R % pair<T>), left(heads, N, H * m.value);
        dense.grow(N * depth<T>(widest)), inner.grow(N * m.chosen * depth<T>(m.inner));
        chosen.resize(N * m.chosen), owner.resize(N), tiles.assign(1, 0);
        for (size_t s = 0; s < tokens.sequences.size(); s++) {
            for (int64_t i = tokens.starts[s]; i < tokens.starts[s + 1]; i++) owner[i] = int32_t(s);
            tiles.push_back(tiles.back() + G * tiles_of(s));
        }
    }

    // Room for the left side of a product. Behind an odd row stands a zero, whatever was there before.
    static void left(Buffer<L>& buffer, int64_t rows, int64_t K) { left(buffer, rows, K, depth<T>(K) - K); }
    static void left(Buffer<L>& buffer, int64_t rows, int64_t K, int64_t odd) {
        buffer.grow(rows * (K + odd));
        left(buffer.data(), rows, K, odd);
    }
    static void left(L* rows, int64_t count, int64_t K, int64_t odd) {
        for (int64_t i = 0; odd && i < count; i++) rows[i * (K + odd) + K] = L{};
    }

    std::pair<int64_t, int64_t> share(int64_t count, int thread) const {
        return {count * thread / threads, count * (thread + 1) / threads};
    }

    // What of a product is a thread's: rows of the left side and panels of the right one.
    struct Part {
        int64_t first, last, begin, end;
    };
    Part part(bool by_rows, int thread, int64_t rows, int64_t panels) const {
        const auto [begin, end] = share(by_rows ? rows : panels, thread);
        return by_rows ? Part{begin, end, 0, panels} : Part{0, rows, begin, end};
    }

    // out [rows of x, columns] (+)= x [rows, K] times a packed [columns, K], a thread's part of it.
    template <bool ADD, class O>
    void product(const Part& p, const L* x, int64_t K, const void* packed, int64_t columns, O* out,
                 int64_t stride) const {
        for (int64_t n = p.begin; n < p.end; n++)
            meet(
                p.last - p.first, K, [&](int64_t i) { return x + (p.first + i) * depth<T>(K); },
                (const T*)packed + n * depth<T>(K) * NB, columns - n * NB,
                [&](int64_t i, const vf* sums) {
                    put<ADD>(out + (p.first + i) * stride + n * NB, sums, columns - n * NB);
                });
    }

    // x through the layers; all threads of the team come here together.
    void run(int thread) {
        static thread_local Worker w;
        std::tie(w.first, w.last) = share(N, thread);
        w.thread = thread, w.by_rows = small && N >= BY_ROWS * threads, w.alone = w.by_rows && even();
        w.columns.begin(m);
        for (int64_t i = w.first; i < w.last && flat->tokens; i++) {
            const T* in = (const T*)b.embedding + flat->tokens[i] * D;
            for (int64_t k = 0; k < D; k += W) store_up_to(x + i * D + k, load_up_to(in + k, D - k), D - k);
        }
        for (int64_t number = b.first_layer; number < b.last_layer; number++) {
            attention(w, m.layers[number]);
            feed_forward(w, m.layers[number]);
        }
    }

private:
    // A thread. Where tokens are many and matrices small, each takes its own tokens through attention's matrices apart
    // from the others; else all have all tokens and their part of each matrix, and meet after each. Alone: what the
    // matrices stand around is its own matter too.
    struct Worker {
        int thread;
        bool by_rows, alone;
        int64_t first, last;  // its own tokens
        Columns<T> columns;
        std::vector<int64_t> begin_of, next;
        std::vector<std::pair<int64_t, float>> order;
    };
    static constexpr int64_t BY_ROWS = 8, SMALL = 1 << 20;  // tokens of each thread, bytes of a layer's attention

    // What other threads wrote comes at once rather than line by line.
    template <class A> static void prefetch_rows(const A* p, int64_t n) {
        if (n * int64_t(sizeof(A)) <= 1 << 15) prefetch(p, n);
    }

    void wait(const Worker& w) {
        if (!w.by_rows) barrier.wait();
    }
    Part part(const Worker& w, int64_t panels) const { return part(w.by_rows, w.thread, N, panels); }

    // Whether no sequence is shared by two threads and their attention takes about the same time.
    bool even() const {
        int64_t most = 0, all = 0;
        for (int t = 0; t < threads; t++) {
            const auto [first, last] = share(N, t);
            if (flat->starts[owner[first]] != first) return false;
            int64_t keys = 0;
            for (int64_t i = first; i < last; i++) keys += flat->positions[i] + 1;
            most = std::max(most, keys), all += keys;
        }
        return most * threads * 4 <= all * 5;
    }

    // x += attention
    void attention(Worker& w, const DecodeLayer& layer) {
        prefetch_rows(x + w.first * D, (w.last - w.first) * D);
        for (int64_t i = w.first; i < w.last; i++) rms(x + i * D, layer.norm, &u[i * depth<T>(D)], D, m.eps);
        wait(w);
        product<false>(part(w, panels(q_in + row)), u.data(), D, layer.down, q_in + row, down.data(), q_in + row);
        if (w.thread == 0) next_task = 0;
        wait(w);
        for (int64_t i = w.first; i < w.last; i++) m.key_heads ? remember_groups(layer, i) : remember(layer, i);
        if (!m.key_heads) absorb(w, layer);
        if (!w.alone) barrier.wait();
        auto next = [&, mine = w.alone ? tiles[owner[w.first]] : 0]() mutable {
            return w.alone ? mine++ : next_task.fetch_add(1);
        };
        const int64_t end = w.alone ? tiles[owner[w.last - 1] + 1] : tiles.back(), step = w.alone ? 1 : threads;
        for (int64_t t; (t = next()) < end;) {
            if (t + step < end) prefetch_task(layer, t + step);
            attend(w.columns, layer, t);
        }
        if (!w.alone) barrier.wait();
        if (!m.key_heads) {
            per_head(w, mixed.data(), mixed_row(), R, R, layer.uv, m.value, heads.data(), depth<T>(H * m.value),
                     m.value);
            wait(w);
        }
        product<true>(part(w, panels(D)), heads.data(), H * m.value, layer.out, D, x, D);
        wait(w);
    }

    // x += the dense block, then the experts by number.
    void feed_forward(Worker& w, const DecodeLayer& layer) {
        for (int64_t i = w.first; i < w.last; i++) rms(x + i * D, layer.mlp_norm, &u[i * depth<T>(D)], D, m.eps);
        if (layer.router) route(layer, w.first, w.last);
        barrier.wait();
        prefetch_rows(u.data(), N * depth<T>(D));
        if (layer.dense_gate_up) {
            const int64_t halves = (layer.dense_inner + NB / 2 - 1) / (NB / 2);
            gated(
                part(false, w.thread, N, halves), layer.dense_gate_up, layer.dense_inner, [](int64_t i) { return i; },
                [](int64_t) { return 1.f; }, dense.data());
        }
        if (layer.router) experts_up(w, layer);
        barrier.wait();
        if (layer.dense_gate_up) prefetch_rows(dense.data(), N * depth<T>(layer.dense_inner));
        if (layer.router) prefetch_rows(inner.data(), N * m.chosen * depth<T>(m.inner));
        if (layer.dense_gate_up)
            product<true>(part(false, w.thread, N, panels(D)), dense.data(), layer.dense_inner, layer.dense_down, D, x,
                          D);
        if (layer.router) experts_down(w, layer);
        barrier.wait();
    }

    // Attention tasks of one sequence and group.
    int64_t tiles_of(int64_t s) const {
        return ((flat->starts[s + 1] - flat->starts[s]) * J + Columns<T>::MOST - 1) / Columns<T>::MOST;
    }
    // With room behind the last head for what an odd rank is filled up with.
    int64_t mixed_row() const { return H * R + R % pair<T>; }
    const float* angle(const float* table, int64_t i) const { return table + flat->positions[i] * (m.rope / 2); }

    // For every head: out [N, H, columns] = x [N, H, K] times its packed [columns, K].
    void per_head(const Worker& w, const L* x, int64_t x_stride, int64_t x_head, int64_t K, const void* packed,
                  int64_t columns, L* out, int64_t out_stride, int64_t out_head) const {
        const int64_t each = panels(columns);
        const Part p = part(w, H * each);
        for (int64_t t = p.begin; t < p.end; t++) {
            const int64_t h = t / each, n = t % each;
            meet(
                p.last - p.first, K, [&](int64_t i) { return x + (p.first + i) * x_stride + h * x_head; },
                (const T*)packed + t * depth<T>(K) * NB, columns - n * NB,
                [&](int64_t i, const vf* sums) {
                    put<false>(out + (p.first + i) * out_stride + h * out_head + n * NB, sums, columns - n * NB);
                });
        }
    }

    // Queries [N, H, e] that meet the latent itself, from the layer's input or the queries' normed latent.
    void absorb(const Worker& w, const DecodeLayer& layer) {
        if (m.q_rank) {
            wait(w);
            product<false>(part(w, panels(H * d)), kept.data(), m.q_rank, layer.q_b, H * d, queries.data(), H * d);
        }
        wait(w);
        const int64_t each = depth<T>(e);
        per_head(w, queries.data(), H * d, d, m.nope, layer.uk, R, latent.data(), H * each, each);
        for (int64_t i = w.first; i < w.last; i++)
            for (int64_t h = 0; h < H; h++)
                apply_rope(&queries[(i * H + h) * d + m.nope], &latent[(i * H + h) * each + R], angle(m.cosine, i),
                           angle(m.sine, i), m.rope / 2);
    }

    // The token's place in the cache.
    T* place_of(const DecodeLayer& layer, int64_t i) const {
        const int64_t position = flat->positions[i];
        const int64_t page = table_of(owner[i])[position / m.page];
        return (T*)layer.pool + (page * m.page + position % m.page) * row;
    }
    const int32_t* table_of(int64_t s) const { return b.tables + flat->sequences[s] * b.table_width; }

    // Grouped queries: adds biases, norms heads and rotates them; keys and values go to the cache.
    void remember_groups(const DecodeLayer& layer, int64_t i) {
        float* q = &down[i * (q_in + row)];
        if (layer.qkv_bias)
            for (int64_t x = 0; x < q_in + row; x++) q[x] += layer.qkv_bias[x];
        float *k = q + H * d, *v = k + G * d;
        const float *c = angle(m.cosine, i), *s = angle(m.sine, i);
        for (int64_t h = 0; h < H; h++) {
            if (layer.q_norm) rms(q + h * d, layer.q_norm, q + h * d, d, m.eps);
            apply_rope(q + h * d, &latent[(i * H + h) * depth<T>(e)], c, s, d / 2);
        }
        T* place = place_of(layer, i);
        for (int64_t g = 0; g < G; g++, place += 2 * d) {
            if (layer.k_norm) rms(k + g * d, layer.k_norm, k + g * d, d, m.eps);
            apply_rope(k + g * d, place, c, s, d / 2);
            for (int64_t x = 0; x < d; x += W) store_up_to(place + d + x, load_up_to(v + g * d + x, d - x), d - x);
        }
    }

    // Norms the queries' latent; writes the normed latent and the rotated key into the token's place in the cache.
    void remember(const DecodeLayer& layer, int64_t i) {
        float* in = &down[i * (q_in + e)];
        if (m.q_rank)
            rms(in, layer.q_norm, &kept[i * depth<T>(q_in)], q_in, m.latent_eps);
        else
            for (int64_t x = 0; x < q_in; x += W)
                store_up_to(&queries[i * q_in + x], load_up_to(in + x, q_in - x), q_in - x);
        in += q_in;
        T* place = place_of(layer, i);
        rms(in, layer.kv_norm, place, R, m.latent_eps);
        apply_rope(in + R, place + R, angle(m.cosine, i), angle(m.sine, i), m.rope / 2);
    }

    int64_t sequence_of(int64_t task) const {
        return std::upper_bound(tiles.begin(), tiles.end(), task) - tiles.begin() - 1;
    }

    // The first keys of a task that comes soon.
    void prefetch_task(const DecodeLayer& layer, int64_t task) const {
        const int64_t s = sequence_of(task), keys = flat->positions[flat->starts[s + 1] - 1] + 1;
        for (int64_t k = 0; k < std::min<int64_t>(keys, 128); k += m.page)
            prefetch((const T*)layer.pool + table_of(s)[k / m.page] * m.page * row, std::min(m.page, keys - k) * row);
    }

    void attend(Columns<T>& columns, const DecodeLayer& layer, int64_t task) {
        constexpr int MOST = Columns<T>::MOST;
        const int64_t s = sequence_of(task), start = flat->starts[s];
        const int64_t group = (task - tiles[s]) / tiles_of(s), from = (task - tiles[s]) % tiles_of(s) * MOST;
        const int64_t to = std::min<int64_t>(from + MOST, (flat->starts[s + 1] - start) * J);
        int64_t token[MOST], head[MOST];
        int32_t length[MOST];
        for (int64_t c = from; c < to; c++) {
            token[c - from] = start + c / J, head[c - from] = group * J + c % J;
            length[c - from] = flat->positions[token[c - from]] + 1;
        }
        columns.run((const T*)layer.pool + group * 2 * d, table_of(s), int(to - from), length,
                    [&](int j) { return &latent[(token[j] * H + head[j]) * depth<T>(e)]; },
                    [&](int j) {
                        return m.key_heads ? &heads[token[j] * depth<T>(H * d) + head[j] * d]
                                           : &mixed[token[j] * mixed_row() + head[j] * R];
                    });
    }

    // From the normed input in floats, whatever the dtype: a near tie shall not be a matter of rounding.
    void route(const DecodeLayer& layer, int64_t first, int64_t last) {
        const int64_t E = m.experts, K = m.chosen;
        for (int64_t i = first; i < last; i++) rms(x + i * D, layer.mlp_norm, &exact[i * D], D, m.eps);
        for (int64_t p = 0; p < panels(E); p++)
            meet(
                last - first, D, [&](int64_t i) { return &exact[(first + i) * D]; }, layer.router + p * D * NB,
                E - p * NB,
                [&](int64_t i, const vf* sums) {
                    vf s[NV];
                    for (int64_t x = 0; x * W < E - p * NB && x < NV; x++)
                        s[x] = m.softmax ? sums[x] : sigmoid(sums[x]);
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

    // Tokens and gates sorted by expert, by token within one; every thread makes its own copy.
    void plan(Worker& w) const {
        w.begin_of.assign(m.experts + 1, 0), w.order.resize(N * m.chosen);
        for (int64_t a = 0; a < N * m.chosen; a++) w.begin_of[chosen[a] + 1]++;
        for (int64_t x = 0; x < m.experts; x++) w.begin_of[x + 1] += w.begin_of[x];
        w.next = w.begin_of;
        for (int64_t i = 0, a = 0; i < N; i++)
            for (int64_t k = 0; k < m.chosen; k++, a++) w.order[w.next[chosen[a]]++] = {i, gates[a]};
    }

    // out [rows, width] = gate(i) swiglu(gate_up u[token(i)]); a panel holds NB/2 gates and their NB/2 ups.
    template <class Token, class Gate>
    void gated(const Part& p, const void* packed, int64_t width, Token token, Gate gate, L* out) const {
        constexpr int half = NV / 2;
        if (p.begin == 0 && p.end > 0)
            left(out + p.first * depth<T>(width), p.last - p.first, width, depth<T>(width) - width);
        for (int64_t n = p.begin; n < p.end; n++)
            meet(
                p.last - p.first, D, [&](int64_t i) { return &u[token(p.first + i) * depth<T>(D)]; },
                (const T*)packed + n * depth<T>(D) * NB, NB,
                [&](int64_t i, const vf* sums) {
                    const float factor = gate(p.first + i);
                    L* row = out + (p.first + i) * depth<T>(width);
                    for (int x = 0; x < half; x++) {
                        const int64_t at = n * (NB / 2) + x * W;
                        if (at >= width) break;
                        const vf g = sums[x];
                        store_up_to(row + at, g * sigmoid(g) * sums[half + x] * factor, width - at);
                    }
                });
    }

    void experts_up(Worker& w, const DecodeLayer& layer) {
        plan(w);
        const int64_t halves = (m.inner + NB / 2 - 1) / (NB / 2);
        for (int64_t k = 0; k < m.experts; k++) {
            const auto* mine = w.order.data() + w.begin_of[k];
            // Threads begin at another part with every expert, so that an odd panel is not always the same thread's.
            gated(
                part(false, int((w.thread + k) % threads), w.begin_of[k + 1] - w.begin_of[k], halves),
                (const T*)layer.gate_up + k * halves * depth<T>(D) * NB, m.inner,
                [&](int64_t i) { return mine[i].first; }, [&](int64_t i) { return mine[i].second; },
                &inner[w.begin_of[k] * depth<T>(m.inner)]);
        }
    }

    void experts_down(const Worker& w, const DecodeLayer& layer) {
        const auto [begin, end] = share(panels(D), w.thread);
        const int64_t width = depth<T>(m.inner);
        for (int64_t k = 0; k < m.experts; k++)
            for (int64_t n = begin; n < end; n++) {
                const int64_t first = w.begin_of[k];
                meet(
                    w.begin_of[k + 1] - first, m.inner, [&](int64_t i) { return &inner[(first + i) * width]; },
                    (const T*)layer.expert_down + (k * panels(D) + n) * width * NB, D - n * NB,
                    [&](int64_t i, const vf* sums) {
                        put<true>(x + w.order[first + i].first * D + n * NB, sums, D - n * NB);
                    });
            }
    }
};
