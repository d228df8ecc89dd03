// Causal attention over the paged cache for ragged batches, prompt chunks and decodes mixed: the work is cut into items,
// items into chunks of about equal cost.
#include "attention_decode.h"
#include "attention_prompt.h"

namespace {

// Costs are in nanoseconds, roughly: what matters is that the chunks of a step are alike.
constexpr int64_t CHUNK_COST = 15000;
constexpr int64_t ITEM_COST = 200;
#if defined(__AMX_BF16__)
constexpr int64_t PRODUCTS_PER_NS = 100;
#elif defined(__AVX512BF16__)
constexpr int64_t PRODUCTS_PER_NS = 50;
#else
constexpr int64_t PRODUCTS_PER_NS = 10;
#endif
// Rows with fewer tokens are taken token by token: their keys are read so few times that reading is what counts.
constexpr int64_t PROMPT_TOKENS = 4;

int64_t token_cost(const Attention& a, int64_t position) {
    const int64_t keys = position + 1 - a.first_visible(position);
    // Keys and values arrive at about 30 bytes per ns.
    return ITEM_COST + keys * a.dim * 2 * size_of(a.kv_dtype) / 30;
}

int64_t tile_cost(const Attention& a, int64_t position, int64_t count) {
    const int64_t keys = position + count - a.first_visible(position);
    return ITEM_COST + keys * a.dim * 2 * (count * a.heads_per_kv + 8) / PRODUCTS_PER_NS;
}

// A row's tokens of this step: [first, first + length) of the batch, the last at position seq_len - 1.
struct Row {
    int64_t row, first, length, seq_len;
    bool is_prompt() const { return length >= PROMPT_TOKENS && seq_len > 0; }
    int64_t position(int64_t index) const { return seq_len - length + index; }

    // Calls each(index of the first token, tokens, cost) for what one item takes of it, per KV head.
    template <class Each>
    void pieces(const Attention& a, Each each) const {
        const int64_t step = is_prompt() ? tile_queries(a) : 1;
        for (int64_t index = 0; index < length; index += step) {
            const int64_t count = std::min(step, length - index);
            each(index, count, is_prompt() ? tile_cost(a, position(index), count) : token_cost(a, position(index)));
        }
    }
};

// Calls each(Row) for the rows that have tokens.
template <class Each>
void for_rows(const Attention& a, int64_t num_rows, Each each) {
    for (int64_t row = 0; row < num_rows; row++)
        if (const int64_t first = a.query_start_loc[row], length = a.query_start_loc[row + 1] - first; length > 0)
            each(Row{row, first, length, a.seq_lens[row]});
}

// What a step consists of.
struct Plan {
    int64_t cost = 0, items = 0;
    // There are so few tokens that the segments of their contexts are shared out one by one.
    bool shared = false;

    Plan(const Attention& a, int64_t num_rows) {
        int64_t tokens = 0, segments = 0;
        for_rows(a, num_rows, [&](const Row& row) {
            row.pieces(a, [&](int64_t, int64_t, int64_t piece_cost) {
                cost += a.kv_heads * piece_cost;
                items += a.kv_heads;
            });
            if (row.is_prompt() || row.seq_len == 0) return;
            const Range range = segments_of(a, row.seq_len - 1);
            tokens += row.length * a.kv_heads;
            segments = std::max(segments, range.end - range.begin);
        });
        shared = segments > 1 && tokens < Workspace::SLOTS_PER_THREAD * a.threads;
        if (shared) items += tokens * (segments - 1);
    }
};

int64_t attention_chunks(const fs_op& op, const Dims& dims, int num_threads) {
    const Plan plan(Attention(op), dims.seqs(op));
    return std::min(plan.items, std::max<int64_t>(plan.cost / CHUNK_COST, 4 * num_threads));
}

template <class T>
void attend_item(const Attention& a, Scratch& scratch, const TokenItem& item, const TokenItem* next) {
    if (item.position < 0) {
        const int64_t columns = a.heads_per_kv * a.dim;
        memset((T*)a.out + item.token * a.out_row + item.kv_head * columns, 0, columns * sizeof(T));
        return;
    }
    if (a.kv_dtype == FS_I8) {
#if defined(__AVX512VNNI__)
        return attend_token<DotInt8, T>(a, scratch, item, next);
#else
        return attend_token<DotFloat<int8_t>, T>(a, scratch, item, next);
#endif
    }
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) return attend_token<DotBf16, T>(a, scratch, item, next);
#endif
    attend_token<DotFloat<T>, T>(a, scratch, item, next);
}

// The items whose cost, summed up in order, begins in this chunk's share.
template <class T>
void run_chunk(const Attention& a, int64_t num_rows, int64_t chunk, int64_t num_chunks, Scratch& scratch) {
    const Plan plan(a, num_rows);
    const int64_t begin = (plan.cost * chunk + num_chunks - 1) / num_chunks;
    const int64_t end = (plan.cost * (chunk + 1) + num_chunks - 1) / num_chunks;
    int64_t before = 0, slot = 0;
    const auto is_own = [&](int64_t at) { return at >= begin && at < end; };
    // One item late, so that each knows the next.
    TokenItem pending;
    bool is_pending = false;
    const auto take = [&](const TokenItem& item) {
        if (is_pending) attend_item<T>(a, scratch, pending, item.position < 0 ? nullptr : &item);
        pending = item;
        is_pending = true;
    };
    const auto take_segments = [&](const TokenItem& item, int64_t cost) {
        const Range segments = segments_of(a, item.position);
        for (int64_t segment = segments.begin; segment < segments.end; segment++)
            if (is_own(before + part(cost, segment - segments.begin, segments.end - segments.begin).begin))
                take({item.row, item.token, item.position, item.kv_head, segment, slot});
    };
    for_rows(a, num_rows, [&](const Row& row) {
        if (before >= end) return;
        if (row.is_prompt()) {
            // Head by head, so that a thread finds a head's keys where it left them.
            for (int64_t kv_head = 0; kv_head < a.kv_heads; kv_head++)
                row.pieces(a, [&](int64_t index, int64_t count, int64_t cost) {
                    if (is_own(before)) attend_tile<T>(a, scratch, {row.row, row.first + index, row.position(index), count, kv_head});
                    before += cost;
                });
            return;
        }
        row.pieces(a, [&](int64_t index, int64_t, int64_t cost) {
            if (before + a.kv_heads * cost <= begin) {
                before += a.kv_heads * cost;
                slot += a.kv_heads;
                return;
            }
            for (int64_t kv_head = 0; kv_head < a.kv_heads; kv_head++, slot++, before += cost) {
                const TokenItem item{row.row, row.first + index, row.position(index), kv_head};
                if (plan.shared && item.position >= 0)
                    take_segments(item, cost);
                else if (is_own(before))
                    take(item);
            }
        });
    });
    if (is_pending) attend_item<T>(a, scratch, pending, nullptr);
}

void attention_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch& scratch) {
    const Attention a(op);
    if (op.dtype == FS_F32) return run_chunk<float>(a, dims.seqs(op), chunk, num_chunks, scratch);
    if (op.dtype == FS_BF16) return run_chunk<bf16>(a, dims.seqs(op), chunk, num_chunks, scratch);
    return run_chunk<f16>(a, dims.seqs(op), chunk, num_chunks, scratch);
}

}  // namespace

extern const Kernel attention_kernel = {attention_chunks, attention_run};
