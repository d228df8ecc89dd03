// From logits to tokens: greedy, or a sample after temperature, min-p, top-k and top-p (sampling.py says in which order);
// penalties on logits; log-probabilities. A row is one chunk.
#include <functional>

#include "elementwise.h"
#include "sample_cut.h"
#include "sample_noise.h"

namespace {

// FS_SAMPLE. i: which of these, columns of the logits, elements from row to row.
enum Which : int64_t {
    TOKENS = 0,         // p: logits, out (int64), then by slot: temperature (float32; null: greedy), min_p (float32), top_k
                        // (int64), top_p (float32; null: these three are off), seeds (int64); then by row, int64:
                        // positions, slots (null: a row is its own slot). i[3] to i[7]: elements from slot to slot.
    PENALTIES,          // p: logits (written), slots (int64), counts (int32 [slots, V]), in_prompt (1 byte [slots, V]), then
                        // per row float32: repetition, presence, frequency. i[3], i[4]: elements from slot to slot of both.
    COUNT_TOKENS,       // p: counts (int32 [slots, V], added to), slots (int64), tokens (int64). i[2]: from slot to slot.
    LOG_PROBABILITIES   // p: logits, chosen (int64), out (float32 [rows]), rank (int64 [rows]), top (float32 [rows, n]), top
                        // tokens (int64 [rows, n]). i[3]: n.
};

int64_t sample_chunks(const fs_op& op, const Dims& dims, int) {
    // Rows may count the same token.
    return op.i[0] == COUNT_TOKENS ? std::min<int64_t>(dims.rows(op), 1) : dims.rows(op);
}

template <class T>
float largest_of(const T* x, int64_t n) {
    vf most[4];
    for (vf& v : most) v = splat(-INFINITY);
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        for (int u = 0; u < 4; u++) most[u] = vmax(load(x + i + u * VL), most[u]);  // drops NaN
    float top = largest(vmax(vmax(most[0], most[1]), vmax(most[2], most[3])));
    for (; i < n; i++) top = std::max(top, to_f32(x[i]));
    return top;
}

// The first of the largest, as torch.argmax.
template <class T>
int64_t greedy(const T* x, int64_t n) {
    const float top = largest_of(x, n);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        const vi equal = load(x + i) == splat(top);
        if (!any(equal)) continue;
        for (int l = 0; l < VL; l++)
            if (equal[l]) return i + l;
    }
    for (; i < n; i++)
        if (to_f32(x[i]) == top) return i;
    return 0;  // all are NaN
}

constexpr int BLOCK = 64;

// A row of scores in float32, padded to whole blocks with -infinity, and the largest of each block: few blocks hold
// anything that truncation keeps.
struct Scores {
    float *values, *block_largest;
    int64_t count, blocks;
    float top;

    // Bytes that a row of n takes.
    static int64_t bytes(int64_t n) { return (blocks_of(n) * (BLOCK + 1) + BLOCK) * (int64_t)sizeof(float); }
    static int64_t blocks_of(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

    template <class T>
    Scores(const T* logits, int64_t n, float temperature, char* memory)
        : values((float*)memory), block_largest(values + blocks_of(n) * BLOCK), count(n), blocks(blocks_of(n)) {
        int64_t i = 0;
        for (; i + VL <= n; i += VL) store(values + i, load(logits + i) / temperature);
        for (; i < n; i++) values[i] = to_f32(logits[i]) / temperature;
        for (; i < blocks * BLOCK; i++) values[i] = -INFINITY;
        top = -INFINITY;
        for (int64_t b = 0; b < blocks; b++) {
            vf most = splat(-INFINITY);
            for (int l = 0; l < BLOCK; l += VL) most = vmax(load(values + b * BLOCK + l), most);  // drops NaN
            block_largest[b] = largest(most);
            top = std::max(top, block_largest[b]);
        }
    }

    // At least k scores are as large as this. scratch: [blocks].
    float bound(int64_t k, float* scratch) const {
        if (k > blocks) return -INFINITY;
        std::copy(block_largest, block_largest + blocks, scratch);
        std::nth_element(scratch, scratch + k - 1, scratch + blocks, std::greater<float>());
        return scratch[k - 1];
    }
};

// Scores that may still be drawn.
struct Candidates {
    float *values, *weights;
    int32_t* tokens;
    int64_t count = 0;

    static int64_t bytes(int64_t n) { return 3 * (n + 2 * VL) * (int64_t)sizeof(float); }
    Candidates(char* memory, int64_t n)
        : values((float*)memory), weights(values + n + 2 * VL), tokens((int32_t*)(weights + n + 2 * VL)) {}

    void collect(const Scores& scores, float floor) {
        count = 0;
        for (int64_t b = 0; b < scores.blocks; b++) {
            if (!(scores.block_largest[b] >= floor)) continue;
            const int64_t end = std::min(scores.count, (b + 1) * BLOCK);
            for (int64_t i = b * BLOCK; i < end; i++) {
                values[count] = scores.values[i];
                tokens[count] = (int32_t)i;
                count += scores.values[i] >= floor;
            }
        }
        pad();
    }
    void keep(float floor) {
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++) {
            values[kept] = values[i];
            tokens[kept] = tokens[i];
            kept += values[i] >= floor;
        }
        count = kept;
        pad();
    }
    int64_t padded() const { return (count + VL - 1) / VL * VL; }
    // Weights e^(value - top). Returns their sum.
    float weigh(float top) {
        vf total = {};
        for (int64_t i = 0; i < padded(); i += VL) {
            const vf value = load(values + i);
            const vf weight = select(value > splat(-INFINITY), vexp(value - top), vf{});
            store(weights + i, weight);
            total += weight;
        }
        return sum(total);
    }

   private:
    void pad() {
        for (int64_t i = count; i < padded(); i++) values[i] = -INFINITY;
    }
};

float sum_of_exp(const Scores& scores, float floor) {
    vf total = {};
    for (int64_t i = 0; i < scores.blocks * BLOCK; i += VL) {
        const vf value = load(scores.values + i);
        total += select((value >= splat(floor)) & (value > splat(-INFINITY)), vexp(value - scores.top), vf{});
    }
    return sum(total);
}

constexpr int64_t HEAD = 256;  // candidates for top-p's cut, at least; it lies beyond them in flat distributions only

// Leaves in `candidates` what min-p, top-k and top-p keep. Returns whether any of them is on.
bool truncate(const Scores& scores, Candidates& candidates, float min_p, int64_t top_k, float top_p) {
    const bool has_top_k = top_k > 0 && top_k < scores.count, has_top_p = top_p < 1.0f;
    if (min_p <= 0.0f && !has_top_k && !has_top_p) return false;
    const float floor = min_p > 0.0f ? scores.top + std::log(min_p) : -INFINITY;
    float* scratch = candidates.weights;
    const float lowest = -3.4e38f;
    if (has_top_k) {
        candidates.collect(scores, std::max(floor, scores.bound(top_k, scratch)));
        if (candidates.count > top_k)
            candidates.keep(smallest_kept(candidates.values, nullptr, candidates.padded(), (float)top_k, lowest, scores.top));
    }
    if (!has_top_p) {
        if (!has_top_k) candidates.collect(scores, floor);
        return true;
    }
    float total, collected;
    if (has_top_k || min_p > 0.0f) {
        if (!has_top_k) candidates.collect(scores, floor);
        total = collected = candidates.weigh(scores.top);
    } else {
        total = sum_of_exp(scores, floor);
        candidates.collect(scores, scores.bound(HEAD, scratch));
        collected = candidates.weigh(scores.top);
    }
    if (collected < top_p * total && collected < total) {
        candidates.collect(scores, floor);
        total = candidates.weigh(scores.top);
    }
    candidates.keep(smallest_kept(candidates.values, candidates.weights, candidates.padded(), top_p * total, lowest,
                                  scores.top));
    return true;
}

// The largest of value + noise; the first of equals.
struct Winner {
    float score = -INFINITY;
    int64_t token = 0;
    void offer(vf noisy, const int32_t* tokens) {
        for (int l = 0; l < VL; l++)
            if (noisy[l] > score) {  // tokens come in order
                score = noisy[l];
                token = tokens[l];
            }
    }
};

vi token_numbers(int64_t first) {
    vi tokens;
    for (int l = 0; l < VL; l++) tokens[l] = (int32_t)first + l;
    return tokens;
}

// Noise above x needs u < 1 - exp(-exp(-x)) < exp(-x): most tokens are ruled out by their bits, without a logarithm.
// Returns what the bits, shifted as in gumbel_noise, must not exceed; a little more than that, for rounding.
uint32_t bits_limit(float exp_minus_x) {
    return exp_minus_x < 0.999f ? (uint32_t)(exp_minus_x * 1.0001f * 0x1p31f) + 2 : 0x7fffffff;
}

// block_weights: room for a number per block.
int64_t draw(const Scores& scores, uint64_t key, float* block_weights) {
    for (int64_t b = 0; b < scores.blocks; b += VL) {
        const int count = (int)std::min<int64_t>(VL, scores.blocks - b);
        store_n(block_weights + b, vexp(load_n(scores.block_largest + b, count) - scores.top), count);
    }
    Winner winner;
    for (int64_t b = 0; b < scores.blocks; b++) {
        if (scores.block_largest[b] + MOST_NOISE < winner.score) continue;
        const vi limit = splat_i((int32_t)bits_limit(block_weights[b] * std::exp(scores.top - winner.score)));
        for (int64_t i = b * BLOCK; i < (b + 1) * BLOCK; i += VL) {
            const vi tokens = token_numbers(i);
            if (!any((vi)(noise_bits(key, (vu)tokens) >> 1) <= limit)) continue;
            const vf noisy = load(scores.values + i) + gumbel_noise(key, (vu)tokens);
            if (!any(noisy > splat(winner.score))) continue;
            int32_t numbers[VL];
            store_as(numbers, tokens);
            winner.offer(noisy, numbers);
        }
    }
    return winner.token;
}

int64_t draw(const Candidates& candidates, uint64_t key) {
    Winner winner;
    for (int64_t i = 0; i < candidates.padded(); i += VL) {
        const vf noisy = load(candidates.values + i) + gumbel_noise(key, load_as<vu>(candidates.tokens + i));
        if (any(noisy > splat(winner.score))) winner.offer(noisy, candidates.tokens + i);
    }
    return winner.token;
}

// A slot's number in one of an operation's columns; `off` where there is no such column.
template <class T>
T number_of(const fs_op& op, int column, int64_t slot, T off) {
    return op.p[2 + column] ? ((const T*)op.p[2 + column])[slot * op.i[3 + column]] : off;
}

template <class T>
void sample_row(const fs_op& op, int64_t row, Scratch& scratch) {
    const int64_t n = op.i[1];
    const T* logits = (const T*)op.p[0] + row * op.i[2];
    int64_t& out = ((int64_t*)op.p[1])[row];
    const int64_t slot = op.p[8] ? ((const int64_t*)op.p[8])[row] : row;
    const float temperature = number_of(op, 0, slot, 0.0f);
    if (!(temperature > 0.0f)) {
        out = greedy(logits, n);
        return;
    }
    char* memory = (char*)scratch.get(Scores::bytes(n) + Candidates::bytes(n));
    const Scores scores(logits, n, temperature, memory);
    Candidates candidates(memory + Scores::bytes(n), n);
    const float min_p = number_of(op, 1, slot, 0.0f), top_p = number_of(op, 3, slot, 1.0f);
    const int64_t top_k = number_of<int64_t>(op, 2, slot, 0), seed = number_of<int64_t>(op, 4, slot, 0);
    const uint64_t key = noise_key(seed, ((const int64_t*)op.p[7])[row]);
    const bool truncated = truncate(scores, candidates, min_p, top_k, top_p);
    out = truncated ? draw(candidates, key) : draw(scores, key, candidates.weights);
}

// Repetition (Keskar et al., 2019) divides what is positive and multiplies the rest, for tokens of the prompt and of the
// output; presence and frequency are OpenAI's, for tokens of the output.
template <class T>
void penalize_row(const fs_op& op, int64_t row) {
    const int64_t n = op.i[1], slot = ((const int64_t*)op.p[1])[row];
    const float repetition = ((const float*)op.p[4])[row], presence = ((const float*)op.p[5])[row],
                frequency = ((const float*)op.p[6])[row];
    if (slot < 0 || (repetition == 1.0f && presence == 0.0f && frequency == 0.0f)) return;
    T* logits = (T*)op.p[0] + row * op.i[2];
    const int32_t* counts = (const int32_t*)op.p[2] + slot * op.i[3];
    const uint8_t* in_prompt = (const uint8_t*)op.p[3] + slot * op.i[4];
    for (int64_t i = 0; i < n; i++) {
        if (!counts[i] && !in_prompt[i]) continue;
        float x = to_f32(logits[i]);
        x = x > 0 ? x / repetition : x * repetition;
        x -= frequency * (float)counts[i] + (counts[i] > 0 ? presence : 0.0f);
        logits[i] = from_f32<T>(x);
    }
}

void count_tokens(const fs_op& op, int64_t num_rows) {
    const int64_t *slots = (const int64_t*)op.p[1], *tokens = (const int64_t*)op.p[2];
    for (int64_t row = 0; row < num_rows; row++)
        if (slots[row] >= 0) ((int32_t*)op.p[0])[slots[row] * op.i[2] + tokens[row]]++;
}

template <class T>
void log_probability_row(const fs_op& op, int64_t row, Scratch& scratch) {
    const int64_t n = op.i[1], wanted = op.i[3];
    const T* logits = (const T*)op.p[0] + row * op.i[2];
    char* memory = (char*)scratch.get(Scores::bytes(n) + Candidates::bytes(n));
    const Scores scores(logits, n, 1.0f, memory);
    const float log_total = scores.top + std::log(sum_of_exp(scores, -INFINITY));
    const float chosen = to_f32(logits[((const int64_t*)op.p[1])[row]]);
    ((float*)op.p[2])[row] = chosen - log_total;
    ((int64_t*)op.p[3])[row] = 1 + (int64_t)weight_above(scores.values, nullptr, scores.blocks * BLOCK, chosen);
    if (!wanted) return;
    Candidates candidates(memory + Scores::bytes(n), n);
    candidates.collect(scores, scores.bound(wanted, candidates.weights));
    const float* values = scores.values;
    // NaN is no candidate, so there may be too few.
    const int64_t found = std::min(wanted, candidates.count);
    std::partial_sort(candidates.tokens, candidates.tokens + found, candidates.tokens + candidates.count,
                      [&](int32_t a, int32_t b) { return values[a] > values[b] || (values[a] == values[b] && a < b); });
    for (int64_t i = 0; i < wanted; i++) {
        ((float*)op.p[4])[row * wanted + i] = i < found ? values[candidates.tokens[i]] - log_total : NAN;
        ((int64_t*)op.p[5])[row * wanted + i] = i < found ? candidates.tokens[i] : 0;
    }
}

template <class T>
void run_row(const fs_op& op, int64_t row, Scratch& scratch) {
    if (op.i[0] == TOKENS) return sample_row<T>(op, row, scratch);
    if (op.i[0] == PENALTIES) return penalize_row<T>(op, row);
    log_probability_row<T>(op, row, scratch);
}

void sample_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t, Scratch& scratch) {
    if (op.i[0] == COUNT_TOKENS) return count_tokens(op, dims.rows(op));
    if (op.dtype == FS_F32) return run_row<float>(op, chunk, scratch);
    if (op.dtype == FS_BF16) return run_row<bf16>(op, chunk, scratch);
    run_row<f16>(op, chunk, scratch);
}

}  // namespace

extern const Kernel sample_kernel = {sample_chunks, sample_run};
