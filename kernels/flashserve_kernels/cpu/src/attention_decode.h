// Attention of one token for the query heads of one KV head: bound by reading keys and values, so it reads them once, in
// place, and asks for the next ones while it computes. A context is cut into segments at fixed positions, whose results
// are merged in order: the same bits come out whether one thread takes all of them or several share them.
#pragma once
#include <array>
#include <cmath>
#include <utility>

#include "attention.h"

namespace {

constexpr int SEGMENT_GROUPS = 16;  // 256 keys: their scores stay in the first cache, and 1,000 keys occupy four threads
constexpr int SEGMENT = SEGMENT_GROUPS * GROUP;
constexpr int MAX_HEADS = 8;  // that share a pass over the keys; more take several

// Softmax over part of the keys: the largest score, the sum of e^(score - largest), the weighted sum of values [D].
struct Partial {
    float largest, sum;
};

// What a thread asks the memory for while it still computes: the keys of the groups it will need next.
struct KeysAhead {
    int count = 0;
    const char* keys[SEGMENT_GROUPS];
};

struct alignas(64) DecodeScratch {
    alignas(64) float scores[MAX_HEADS][SEGMENT];
    alignas(64) float coefs[MAX_HEADS][SEGMENT];  // of M::Coef
    KeyGroup groups[SEGMENT_GROUPS];
    KeysAhead ahead;
    Partial running[MAX_HEADS], partial[MAX_HEADS];
    float query_scale[MAX_HEADS];
    bf16* last_values;  // room for a group of values
};

}  // namespace

#include "attention_tiles.h"

namespace {

// Raw scores of G heads against one group of keys. values: asked for, as the next pass reads them.
template <class M, int G>
FS_INLINE void score_group(const typename M::Elem* keys, const char* values, const typename M::Coef* q, int64_t dim,
                           float* scores) {
    constexpr int UNROLL = M::ACCUMULATORS / G >= 4 ? 4 : M::ACCUMULATORS / G >= 2 ? 2 : 1;
    constexpr int PAIR_BYTES = 2 * GROUP * sizeof(typename M::Elem);
    for (int part = 0; part < GROUP / VL; part++) {
        typename M::Acc acc[UNROLL][G] = {};
        for (int64_t d = 0; d < dim; d += 2 * UNROLL) {
#pragma GCC unroll 4
            for (int u = 0; u < UNROLL; u++) {
                if (part == 0)
                    for (int line = 0; line < PAIR_BYTES; line += 64) prefetch_l2(values + (d / 2 + u) * PAIR_BYTES + line);
#pragma GCC unroll 8
                for (int g = 0; g < G; g++)
                    M::add(acc[u][g], keys + (d + 2 * u) * GROUP + part * VL * M::E, GROUP, q + g * dim + d + 2 * u);
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
            typename M::Acc total = acc[0][g];
            for (int u = 1; u < UNROLL; u++) total += acc[u][g];
            store(scores + g * SEGMENT + part * VL, M::value(total));
        }
    }
}

// out[g] = sum over the keys [first, end) of coefs[g][key] * value, for J vectors of dimensions from `column` on.
template <class M, int G, int J>
FS_INLINE void weigh_values(const DecodeScratch& s, int num_groups, int64_t first, int64_t end, int64_t column, int64_t dim,
                            const KeysAhead* ahead, float* out) {
    typename M::Acc acc[G][J] = {};
    const int64_t key_bytes = GROUP * dim * sizeof(typename M::Elem);
    for (int i = 0; i < num_groups; i++) {
        const KeyGroup& group = s.groups[i];
        const auto* values = (const typename M::Elem*)group.values + column * M::E;
        const auto* coefs = (const typename M::Coef*)s.coefs + i * GROUP;
        const char* next = ahead && i < ahead->count ? ahead->keys[i] : nullptr;
        const int64_t last = std::min(group.count, end - group.position);
        int64_t lane = std::max<int64_t>(0, first - group.position) & ~int64_t(1);
        if (next)
            for (int64_t line = 0; line < key_bytes; line += 64) prefetch_l2(next + line);
        for (; lane + 2 <= last; lane += 2)
#pragma GCC unroll 4
            for (int j = 0; j < J; j++)
#pragma GCC unroll 8
                for (int g = 0; g < G; g++)
                    M::add(acc[g][j], values + lane * dim + j * VL * M::E, dim, coefs + g * SEGMENT + lane);
        if (lane < last)
#pragma GCC unroll 4
            for (int j = 0; j < J; j++)
#pragma GCC unroll 8
                for (int g = 0; g < G; g++)
                    M::add_first(acc[g][j], values + lane * dim + j * VL * M::E, dim, coefs + g * SEGMENT + lane);
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) store(out + g * dim + column + j * VL, M::value(acc[g][j]));
}

// Raw scores become weights relative to the largest, rounded to M::Coef. Returns what sums over them are multiplied with.
template <class M>
float weigh_scores(const Attention& a, DecodeScratch& s, int g, int num_groups, int64_t first, int64_t end) {
    const vi lanes = lane_numbers();
    const float scale = a.scale * s.query_scale[g];
    float* scores = s.scores[g];
    vf most = splat(MASKED);
    for (int i = 0; i < num_groups; i++) {
        const KeyGroup& group = s.groups[i];
        const int64_t from = first - group.position, to = std::min(group.count, end - group.position);
        const bool whole = from <= 0 && to == GROUP;
        for (int part = 0; part < GROUP; part += VL) {
            vf score = load(scores + i * GROUP + part) * scale;
            if constexpr (M::SCALED) score *= load(group.key_scales + part);
            if (a.softcap != 0.0f) score = soft_cap(score, a.softcap);
            if (!whole) {
                const vi lane = lanes + part;
                score = select((lane >= (int32_t)std::max<int64_t>(from, 0)) & (lane < (int32_t)to), score, splat(MASKED));
            }
            most = vmax(score, most);
            store(scores + i * GROUP + part, score);
        }
    }
    const float top = largest(most);
    vf total = {};
    for (int k = 0; k < num_groups * GROUP; k += VL) {
        const vf score = load(scores + k);
        vf weight = select(score > splat(MASKED), vexp(score - top), vf{});
        total += weight;
        // A lane that is masked may have any scale.
        if constexpr (M::SCALED)
            weight = select(score > splat(MASKED), weight * load(s.groups[k / GROUP].value_scales + k % GROUP), vf{});
        store(scores + k, weight);
    }
    s.partial[g] = {top, sum(total)};
    return to_coefs(scores, (typename M::Coef*)s.coefs + g * SEGMENT, num_groups * GROUP);
}

// The keys of [first, end) that lie in the groups [begin, begin + num_groups). Fills partial[G] and out [G][D].
template <class M, int G>
void attend_segment(const Attention& a, DecodeScratch& s, const int32_t* table, int64_t kv_head, int64_t begin,
                    int num_groups, int64_t first, int64_t end, const typename M::Coef* q, float* out) {
    for (int i = 0; i < num_groups; i++) s.groups[i] = KeyGroup(a, table, kv_head, begin + i);
    constexpr bool HAS_TILES_FOR_IT = HAS_TILES && std::is_same_v<typename M::Coef, bf16> && G > 1;
    // Tiles also multiply the padding of blocks that are not whole groups.
    const bool by_tiles = HAS_TILES_FOR_IT && a.block_size % GROUP == 0;
    if constexpr (HAS_TILES_FOR_IT)
        if (by_tiles) score_by_tiles<G>(s, num_groups, q, a.dim);
    if (!by_tiles)
        for (int i = 0; i < num_groups; i++)
            score_group<M, G>((const typename M::Elem*)s.groups[i].keys, s.groups[i].values, q, a.dim,
                              s.scores[0] + i * GROUP);
    float coef_scale[G];
    for (int g = 0; g < G; g++) coef_scale[g] = weigh_scores<M>(a, s, g, num_groups, first, end);
    if constexpr (HAS_TILES_FOR_IT)
        if (by_tiles) weigh_by_tiles<G>(s, num_groups, end, a.dim, out);
    if (!by_tiles) {
        const KeysAhead* ahead = &s.ahead;
        for (int64_t column = 0; column < a.dim; ahead = nullptr) {
            constexpr int WIDE = M::ACCUMULATORS / G >= 4 ? 4 : M::ACCUMULATORS / G >= 2 ? 2 : 1;
            if (a.dim - column >= WIDE * VL) {
                weigh_values<M, G, WIDE>(s, num_groups, first, end, column, a.dim, ahead, out);
                column += WIDE * VL;
            } else {
                weigh_values<M, G, 1>(s, num_groups, first, end, column, a.dim, ahead, out);
                column += VL;
            }
        }
    }
    if constexpr (M::SCALED)
        for (int g = 0; g < G; g++)
            for (int64_t d = 0; d < a.dim; d += VL) store(out + g * a.dim + d, load(out + g * a.dim + d) * coef_scale[g]);
}

// running, sums [D] += partial, added [D]
FS_INLINE void merge(Partial& running, float* sums, const Partial& partial, const float* added, int64_t dim) {
    const float top = std::max(running.largest, partial.largest);
    const float keep = std::exp(running.largest - top), take = std::exp(partial.largest - top);
    for (int64_t d = 0; d < dim; d += VL) store(sums + d, load(sums + d) * keep + load(added + d) * take);
    running = {top, running.sum * keep + partial.sum * take};
}

template <class T>
FS_INLINE void finish(T* out, const float* sums, float sum, int64_t dim) {
    const float inverse = 1.0f / sum;
    for (int64_t d = 0; d < dim; d += VL) store(out + d, load(sums + d) * inverse);
}

// One token and KV head, or one segment of them.
struct TokenItem {
    int64_t row, token, position, kv_head;
    // Which of the token's segments; -1: all of them.
    int64_t segment = -1;
    // Where the segments of this token and head meet, if they are shared.
    int64_t slot = 0;
};

inline Range segments_of(const Attention& a, int64_t position) {
    return {a.group_of(a.first_visible(position)) / SEGMENT_GROUPS, a.group_of(position) / SEGMENT_GROUPS + 1};
}

// The groups of a segment that a token sees.
inline Range groups_of(const Attention& a, int64_t position, int64_t segment) {
    return {std::max(a.group_of(a.first_visible(position)), segment * SEGMENT_GROUPS),
            std::min(a.group_of(position) + 1, (segment + 1) * SEGMENT_GROUPS)};
}

inline void look_ahead(const Attention& a, KeysAhead& ahead, const TokenItem& item, int64_t segment) {
    const Range groups = groups_of(a, item.position, segment);
    ahead.count = (int)(groups.end - groups.begin);
    for (int i = 0; i < ahead.count; i++)
        ahead.keys[i] = KeyGroup(a, a.table(item.row), item.kv_head, groups.begin + i).keys;
}

// Where shared segments leave their results: a counter per slot, then per slot and segment the partials and sums of all
// query heads of the KV head. attention.py reserves it.
struct Workspace {
    static constexpr int64_t SLOTS_PER_THREAD = 4, COUNTER_BYTES = 64;
    char* memory;
    int64_t slots, segments, heads, dim;
    explicit Workspace(const Attention& a)
        : memory(a.workspace), slots(SLOTS_PER_THREAD * a.threads),
          segments((a.table_columns * a.layout.groups + SEGMENT_GROUPS - 1) / SEGMENT_GROUPS), heads(a.heads_per_kv),
          dim(a.dim) {}
    int64_t& finished(int64_t slot) const { return *(int64_t*)(memory + slot * COUNTER_BYTES); }
    float* at(int64_t slot, int64_t segment) const {
        return (float*)(memory + slots * COUNTER_BYTES) + (slot * segments + segment) * heads * (dim + GROUP);
    }
    Partial* partials(int64_t slot, int64_t segment) const { return (Partial*)(at(slot, segment) + heads * dim); }
};

template <class M, class T, int G>
void attend_heads(const Attention& a, DecodeScratch& s, float* memory, const TokenItem& item, const TokenItem* next,
                  int64_t first_head) {
    using Coef = typename M::Coef;
    float *running = memory, *added = running + G * a.dim, *converted = added + G * a.dim;
    Coef* q = (Coef*)(converted + a.dim);
    const int64_t head = item.kv_head * a.heads_per_kv + first_head;
    for (int g = 0; g < G; g++) {
        const T* x = (const T*)a.q + item.token * a.q_row + (head + g) * a.q_head;
        if constexpr (std::is_same_v<T, Coef>) {
            memcpy(q + g * a.dim, x, a.dim * sizeof(T));
            s.query_scale[g] = 1.0f;
        } else {
            for (int64_t d = 0; d < a.dim; d += VL) store(converted + d, load(x + d));
            s.query_scale[g] = to_coefs(converted, q + g * a.dim, a.dim);
        }
    }
    const int64_t first = a.first_visible(item.position), end = item.position + 1;
    const Range all = segments_of(a, item.position);
    const Range own = item.segment < 0 ? all : Range{item.segment, item.segment + 1};
    for (int64_t segment = own.begin; segment < own.end; segment++) {
        s.ahead.count = 0;
        if (segment + 1 < own.end)
            look_ahead(a, s.ahead, item, segment + 1);
        else if (next)
            look_ahead(a, s.ahead, *next, next->segment < 0 ? segments_of(a, next->position).begin : next->segment);
        const Range groups = groups_of(a, item.position, segment);
        const bool is_first = segment == own.begin;
        attend_segment<M, G>(a, s, a.table(item.row), item.kv_head, groups.begin, (int)(groups.end - groups.begin), first,
                             end, q, is_first ? running : added);
        for (int g = 0; g < G; g++) {
            if (is_first)
                s.running[g] = s.partial[g];
            else
                merge(s.running[g], running + g * a.dim, s.partial[g], added + g * a.dim, a.dim);
        }
    }
    if (item.segment >= 0) {
        const Workspace workspace(a);
        memcpy(workspace.at(item.slot, item.segment - all.begin) + first_head * a.dim, running, G * a.dim * sizeof(float));
        memcpy(workspace.partials(item.slot, item.segment - all.begin) + first_head, s.running, G * sizeof(Partial));
        return;
    }
    T* out = (T*)a.out + item.token * a.out_row + head * a.dim;
    for (int g = 0; g < G; g++) finish(out + g * a.dim, running + g * a.dim, s.running[g].sum, a.dim);
}

// Whoever finishes the last segment of a token and head merges all of them.
template <class T>
void meet(const Attention& a, const TokenItem& item) {
    const Workspace workspace(a);
    const int64_t count = segments_of(a, item.position).end - segments_of(a, item.position).begin;
    int64_t& finished = workspace.finished(item.slot);
    if (__atomic_add_fetch(&finished, 1, __ATOMIC_ACQ_REL) < count) return;
    __atomic_store_n(&finished, 0, __ATOMIC_RELAXED);
    T* out = (T*)a.out + item.token * a.out_row + item.kv_head * a.heads_per_kv * a.dim;
    for (int64_t head = 0; head < a.heads_per_kv; head++) {
        Partial running = workspace.partials(item.slot, 0)[head];
        float* sums = workspace.at(item.slot, 0) + head * a.dim;
        for (int64_t segment = 1; segment < count; segment++)
            merge(running, sums, workspace.partials(item.slot, segment)[head],
                  workspace.at(item.slot, segment) + head * a.dim, a.dim);
        finish(out + head * a.dim, sums, running.sum, a.dim);
    }
}

template <class M, class T>
void attend_token(const Attention& a, Scratch& scratch, const TokenItem& item, const TokenItem* next) {
    const int64_t floats = (3 * MAX_HEADS + 1) * a.dim, group_bytes = GROUP * a.dim * sizeof(bf16);
    char* memory = (char*)scratch.get(sizeof(DecodeScratch) + group_bytes + floats * sizeof(float));
    DecodeScratch& s = *(DecodeScratch*)memory;
    s.last_values = (bf16*)(memory + sizeof(DecodeScratch));
    float* numbers = (float*)(memory + sizeof(DecodeScratch) + group_bytes);
    static constexpr auto with_heads = []<int... N>(std::integer_sequence<int, N...>) {
        return std::array{attend_heads<M, T, N + 1>...};
    }(std::make_integer_sequence<int, M::HEADS>());
    static_assert(M::HEADS <= MAX_HEADS);
    for (int64_t head = 0; head < a.heads_per_kv; head += M::HEADS) {
        const int64_t count = std::min<int64_t>(M::HEADS, a.heads_per_kv - head);
        with_heads[count - 1](a, s, numbers, item, next, head);
    }
    if (item.segment >= 0) meet<T>(a, item);
}

}  // namespace
