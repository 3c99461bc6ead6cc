// Generation in one call: a batch through the layers, and where texts are to be written, head, sampling and layers
// again, until every sequence has met a stop or written what it may write.
//
// A text does not depend on how many tokens a call writes, for each step computes what a call of its own would.
//
// Legend: N tokens, S sequences, D hidden, V vocabulary, B rows sampled from, K most tokens a call writes.
#include <numeric>

#include "layers.h"

template <class T> class Generation {
    DecodeModel m;
    DecodeBatch b;
    Layers<T> layers;
    Flat batch;
    std::vector<int64_t> tokens, sampled;
    std::vector<int32_t> sampling_rows;  // [B] places in the batch of the sequences that write now
    Buffer<float> x, logits;
    Buffer<Left<T>> last;  // [B, D] their last states
    std::vector<Sampling> how;

public:
    void begin(const DecodeModel& model, const DecodeBatch& given) {
        m = model, b = given;
        batch.starts.assign(b.starts, b.starts + b.sequences + 1);
        batch.positions.assign(b.positions, b.positions + batch.size());
        batch.tokens = b.tokens;
        batch.sequences.resize(b.sequences);
        std::iota(batch.sequences.begin(), batch.sequences.end(), 0);
        if (b.head) x.grow(batch.size() * m.hidden), std::fill_n(b.counts, b.sequences, 0);
        layers.begin(m, b);
        layers.x = b.head ? x.data() : b.x;
        prepare();
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
            layers.threads = layers.barrier.threads = omp_get_num_threads();
            work(omp_get_thread_num());
        }
    }

private:
    void prepare() {
        layers.prepare(batch);
        sampling_rows.clear();
        for (size_t i = 0; b.head && i < batch.sequences.size(); i++)
            if (b.max_new_tokens[batch.sequences[i]]) sampling_rows.push_back(int32_t(i));
        const size_t B = sampling_rows.size();
        how.resize(B), sampled.resize(B), layers.left(last, B, m.hidden), logits.grow(B * b.vocab);
        for (size_t i = 0; i < B; i++) {
            const int32_t s = batch.sequences[sampling_rows[i]];
            how[i] = b.samplings[s * b.most + b.counts[s]];
        }
    }

    void work(int thread) {
        const int64_t D = m.hidden;
        for (;;) {
            layers.run(thread);
            if (!b.head) {
                const auto [first, end] = layers.share(batch.size(), thread);
                for (int64_t i = first; i < end; i++) rms(b.x + i * D, b.last_norm, b.x + i * D, D, m.eps);
                return;
            }
            const int64_t B = sampling_rows.size();
            const auto [first, end] = layers.share(B, thread);
            for (int64_t i = first; i < end; i++)
                rms(&x[(batch.starts[sampling_rows[i] + 1] - 1) * D], b.last_norm, &last[i * depth<T>(D)], D, m.eps);
            layers.barrier.wait();
            const auto part = layers.part(false, thread, B, panels(b.vocab));
            layers.template product<false>(part, last.data(), D, b.head, b.vocab, logits.data(), b.vocab);
            layers.barrier.wait();
            shenhong_sample(&logits[first * b.vocab], b.vocab, b.vocab, &how[first], &sampled[first], end - first, 1);
            layers.barrier.wait();
            if (thread == 0) go_on();
            layers.barrier.wait();
            if (sampling_rows.empty()) return;
        }
    }

    // Takes the sampled tokens over; the next batch is one token of every sequence that is not at its end.
    void go_on() {
        Flat next;
        next.starts = {0};
        std::vector<int64_t> fed;
        for (size_t i = 0; i < sampling_rows.size(); i++) {
            const int32_t s = batch.sequences[sampling_rows[i]];
            const int64_t token = sampled[i], *stops = b.stops + b.stop_starts[s],
                          *end = b.stops + b.stop_starts[s + 1];
            b.written[s * b.most + b.counts[s]++] = token;
            if (token < 0 || b.counts[s] == b.max_new_tokens[s] || std::find(stops, end, token) != end) continue;
            next.sequences.push_back(s);
            next.starts.push_back(int64_t(next.sequences.size()));
            next.positions.push_back(batch.positions[batch.starts[sampling_rows[i] + 1] - 1] + 1);
            fed.push_back(token);
        }
        tokens = std::move(fed), batch = std::move(next);
        batch.tokens = tokens.data();
        prepare();
    }
};

EXPORT int shenhong_panel() { return NB; }
EXPORT int shenhong_pair(int dtype) { return dtype == BF16 ? pair<bf16> : pair<float>; }

template <class T> static void decode(const DecodeModel& model, const DecodeBatch& batch) {
    static thread_local Generation<T> generation;
    generation.begin(model, batch);
    generation.run();
}
EXPORT void shenhong_decode(const DecodeModel* model, const DecodeBatch* batch) {
    model->dtype == BF16 ? decode<bf16>(*model, *batch) : decode<float>(*model, *batch);
}

// y [N, columns] = x [N, K] times a packed [columns, K]; x and y float. Rows of y do not depend on each other.
template <class T>
static void project(const float* x, const T* packed, float* y, int64_t N, int64_t K, int64_t columns, int threads) {
    std::vector<Left<T>> left(N * depth<T>(K));
    for (int64_t i = 0; i < N; i++)
        for (int64_t k = 0; k < K; k += W)
            store_up_to(&left[i * depth<T>(K) + k], load_up_to(x + i * K + k, K - k), K - k);
    parallel_rows(panels(columns), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t p = begin; p < end; p++)
            meet(
                N, K, [&](int64_t i) { return &left[i * depth<T>(K)]; }, packed + p * depth<T>(K) * NB,
                columns - p * NB,
                [&](int64_t i, const vf* sums) { put<false>(y + i * columns + p * NB, sums, columns - p * NB); });
    });
}
EXPORT void shenhong_project(int dtype, const float* x, const void* packed, float* y, int64_t N, int64_t K,
                             int64_t columns, int threads) {
    if (dtype == BF16)
        project(x, (const bf16*)packed, y, N, K, columns, threads);
    else
        project(x, (const float*)packed, y, N, K, columns, threads);
}
