// Attention of a prompt's chunk, tiled as in FlashAttention (Dao et al., 2022): a tile of queries, times all query heads of
// a KV head, meets the keys tile by tile. Keys and values of a tile are copied into panels once; both products are
// gemm.h's, the softmax between them is online.
#pragma once
#include "attention.h"
#include "gemm.h"

namespace {

constexpr int TILE_GROUPS = 16, TILE_KEYS = TILE_GROUPS * GROUP;
constexpr int TILE_ROWS = 192;  // rows of a query tile (a query and a head): what shares one copy of the keys
constexpr int BLOCK_ROWS = 32;  // rows whose scores stay in the first-level cache

// Queries [first, first + count) of a row, for one KV head.
struct TileItem {
    int64_t row, token, position, count, kv_head;  // token and position are the first query's
};

inline int64_t tile_queries(const Attention& a) { return std::max<int64_t>(1, TILE_ROWS / a.heads_per_kv); }

// Two rows of `lanes` elements side by side or one after the other (as E says), into a panel's.
template <class Elem, class C>
FS_INLINE void pair_to_panel(const Elem* from, int64_t width, C* to) {
    if constexpr (std::is_same_v<Elem, C> && sizeof(C) == 2) {
        store_as(to, load_as<vu>(from));
    } else {
        vf row0, row1;
        DotFloat<Elem>::rows(from, width, row0, row1);
        if constexpr (std::is_same_v<C, float>) {
            store(to, row0);
            store(to + PANEL, row1);
        } else {
            // int8 has fewer digits than bfloat16: cutting the lower half off is exact.
            store_as(to, (vu)as_i(row0) >> 16 | ((vu)as_i(row1) & 0xffff0000u));
        }
    }
}

// T: the model's dtype, Elem: the cache's, C: what is multiplied.
template <class T, class Elem>
struct PromptTile {
    using C = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
    static constexpr bool SCALED = std::is_same_v<Elem, int8_t>;
    static constexpr int E = DotFloat<Elem>::E;

    const Attention& a;
    const TileItem& item;
    const int64_t rows, depth, columns;  // depth: D padded to the products' step, columns: to whole panels
    C *queries, *key_panels, *value_panels, *weights;
    float *scores, *sums, *largest_score, *total, *key_scales, *value_scales;
    int32_t* positions;

    PromptTile(const Attention& a, const TileItem& item, Scratch& scratch)
        : a(a), item(item), rows(item.count * a.heads_per_kv), depth(padded_k<C>(a.dim)),
          columns((a.dim + PANEL - 1) / PANEL * PANEL) {
        carve((char*)scratch.get((int64_t)carve(nullptr)));
    }

    void run() {
        load_queries();
        const int64_t last = item.position + item.count - 1, end = a.group_of(last) + 1;
        for (int64_t begin = a.group_of(a.first_visible(item.position)); begin < end; begin += TILE_GROUPS) {
            const int num_groups = (int)std::min<int64_t>(TILE_GROUPS, end - begin);
            const bool has_padding = load_keys(begin, num_groups, last + 1);
            for (int64_t block = 0; block < rows; block += BLOCK_ROWS)
                attend_block(block, (int)std::min<int64_t>(BLOCK_ROWS, rows - block), begin, num_groups, has_padding);
        }
        store_result();
    }

   private:
    // Lays the arrays out from `memory` on. Returns the end.
    char* carve(char* memory) {
        const auto take = [&]<class P>(P*& array, int64_t count) {
            array = (P*)memory;
            memory += (count * (int64_t)sizeof(P) + 63) / 64 * 64;
        };
        take(queries, rows * depth);
        take(key_panels, TILE_KEYS * depth);
        take(value_panels, TILE_KEYS * columns);
        take(weights, BLOCK_ROWS * TILE_KEYS);
        take(scores, BLOCK_ROWS * TILE_KEYS);
        take(sums, rows * columns);
        take(largest_score, rows);
        take(total, rows);
        take(key_scales, TILE_KEYS);
        take(value_scales, TILE_KEYS);
        take(positions, TILE_KEYS);
        return memory;
    }

    int64_t position_of(int64_t row) const { return item.position + row / a.heads_per_kv; }

    void load_queries() {
        memset(queries, 0, rows * depth * sizeof(C));
        memset(sums, 0, rows * columns * sizeof(float));
        for (int64_t row = 0; row < rows; row++) {
            const int64_t head = item.kv_head * a.heads_per_kv + row % a.heads_per_kv;
            const T* q = (const T*)a.q + (item.token + row / a.heads_per_kv) * a.q_row + head * a.q_head;
            for (int64_t d = 0; d < a.dim; d += VL) store(queries + row * depth + d, load(q + d));
            largest_score[row] = MASKED;
            total[row] = 0.0f;
        }
    }

    // Copies groups of keys and values into panels; values from `end` on become 0. Returns whether some lanes are no
    // tokens (blocks that are not whole groups).
    bool load_keys(int64_t begin, int num_groups, int64_t end) {
        bool has_padding = false;
        const int32_t* table = a.table(item.row);
        for (int i = 0; i < (num_groups + 1) / 2 * 2; i++) {
            C* keys = key_panels + i / 2 * depth * PANEL + i % 2 * GROUP * K_GROUP<C>;
            if (i == num_groups) {  // products take groups in pairs
                for (int64_t d = 0; d < depth; d += K_GROUP<C>) memset(keys + d * PANEL, 0, GROUP * K_GROUP<C> * sizeof(C));
                for (int64_t column = 0; column < columns; column += PANEL)
                    memset(values_of(column) + i * GROUP * PANEL, 0, GROUP * PANEL * sizeof(C));
                std::fill(positions + i * GROUP, positions + (i + 1) * GROUP, INT32_MAX);
                std::fill(key_scales + i * GROUP, key_scales + (i + 1) * GROUP, 0.0f);
                std::fill(value_scales + i * GROUP, value_scales + (i + 1) * GROUP, 0.0f);
                continue;
            }
            const KeyGroup group(a, table, item.kv_head, begin + i);
            has_padding |= group.count < GROUP;
            const int count = (int)std::min(group.count, end - group.position);
            for (int lane = 0; lane < GROUP; lane++)
                positions[i * GROUP + lane] = lane < count ? (int32_t)group.position + lane : INT32_MAX;
            if (SCALED) {
                memcpy(key_scales + i * GROUP, group.key_scales, GROUP * sizeof(float));
                memcpy(value_scales + i * GROUP, group.value_scales, GROUP * sizeof(float));
            }
            for (int64_t d = 0; d < a.dim; d += 2)
                for (int lane = 0; lane < GROUP; lane += VL)
                    pair_to_panel((const Elem*)group.keys + d * GROUP + lane * E, GROUP,
                                  keys + d * PANEL + lane * K_GROUP<C>);
            for (int64_t d = a.dim; d < depth; d += K_GROUP<C>)
                memset(keys + d * PANEL, 0, GROUP * K_GROUP<C> * sizeof(C));
            load_values((const Elem*)group.values, i, count);
        }
        return has_padding;
    }

    C* values_of(int64_t column) const { return value_panels + column * TILE_KEYS; }

    void load_values(const Elem* values, int i, int count) {
        for (int64_t column = 0; column < columns; column += PANEL) {
            C* panel = values_of(column) + i * GROUP * PANEL;
            const int width = (int)std::min<int64_t>(PANEL, a.dim - column);
            for (int key = 0; key < GROUP; key += 2)
                for (int d = 0; d < width; d += VL)
                    pair_to_panel(values + key * a.dim + (column + d) * E, a.dim, panel + key * PANEL + d * K_GROUP<C>);
            for (int key = 0; key < GROUP && width < PANEL; key += K_GROUP<C>)
                memset(panel + key * PANEL + width * K_GROUP<C>, 0, (PANEL - width) * K_GROUP<C> * sizeof(C));
            for (int key = count; key < GROUP; key++)
                for (int d = 0; d < PANEL; d++) panel[(key / K_GROUP<C> * PANEL + d) * K_GROUP<C> + key % K_GROUP<C>] = C{};
        }
    }

    void attend_block(int64_t block, int count, int64_t begin, int num_groups, bool has_padding) {
        const int64_t first_position = position_of(block), last_position = position_of(block + count - 1);
        const int groups = (int)std::min<int64_t>(num_groups, a.group_of(last_position) + 1 - begin);
        if (groups <= 0 || begin + groups <= a.group_of(a.first_visible(first_position))) return;
        const int panels = (groups + 1) / 2, keys = panels * PANEL;
        for (int p = 0; p < panels; p++)
            panel_gemm<C>(queries + block * depth, depth, count, key_panels + p * depth * PANEL, depth, scores + p * PANEL,
                          TILE_KEYS);
        for (int r = 0; r < count; r++) weigh_row(block + r, r, keys, has_padding);
        for (int64_t column = 0; column < columns; column += PANEL)
            panel_gemm<C>(weights, TILE_KEYS, count, values_of(column), keys, sums + block * columns + column, columns, true);
    }

    // The row's scores become weights, relative to the largest score so far.
    void weigh_row(int64_t row, int r, int keys, bool has_padding) {
        float* score = scores + r * TILE_KEYS;
        const int64_t position = position_of(row), first = a.first_visible(position);
        const bool masked = has_padding || positions[keys - 1] > position || positions[0] < first;
        float factor = a.scale;
        if (SCALED || a.softcap != 0.0f) {
            for (int k = 0; k < keys; k += VL) {
                vf s = load(score + k) * a.scale;
                if (SCALED) s *= load(key_scales + k);
                if (a.softcap != 0.0f) s = soft_cap(s, a.softcap);
                store(score + k, s);
            }
            factor = 1.0f;
        }
        if (masked)
            for (int k = 0; k < keys; k += VL) {
                const vi at = load_as<vi>(positions + k);
                const vi seen = (at <= (int32_t)position) & (at >= (int32_t)first);
                store(score + k, select(seen, load(score + k), splat(MASKED)));
            }
        vf most[2] = {splat(MASKED), splat(MASKED)};
        for (int k = 0; k < keys; k += 2 * VL) {
            most[0] = vmax(load(score + k), most[0]);
            most[1] = vmax(load(score + k + VL), most[1]);
        }
        const float highest = largest(vmax(most[0], most[1]));
        const float before = largest_score[row], top = std::max(before, highest > MASKED ? highest * factor : MASKED);
        if (top > before) rescale(row, before, top);
        total[row] += masked ? exponentials<true>(score, weights + r * TILE_KEYS, keys, factor, top)
                             : exponentials<false>(score, weights + r * TILE_KEYS, keys, factor, top);
    }

    // weights = e^(score * factor - top). Returns their sum.
    template <bool MASKING>
    float exponentials(const float* score, C* weight, int keys, float factor, float top) const {
        constexpr float LOG2_E = 1.44269504088896f;
        const vf scale = splat(factor * LOG2_E), shift = splat(-top * LOG2_E);
        vf sums_of_weights[2] = {};
        for (int k = 0; k < keys; k += 2 * VL)
            for (int u = 0; u < 2; u++) {
                const vf s = load(score + k + u * VL);
                vf w = power_of_two(s * scale + shift);
                if (MASKING) w = select(s > splat(MASKED), w, vf{});
                sums_of_weights[u] += w;
                if (SCALED) w *= load(value_scales + k + u * VL);
                store(weight + k + u * VL, w);
            }
        return sum(sums_of_weights[0] + sums_of_weights[1]);
    }

    // 2^x for x <= 0. Weights that bfloat16 will round (2^-9) need no more than a relative error of 5e-5.
    FS_INLINE vf power_of_two(vf x) {
        x = vmax(x, splat(-125.0f));
        const float magic = 12582912.0f;  // as in vexp
        const vf shifted = x + magic;
        const vf f = x - (shifted - magic);
        vf p = splat(9.618437357e-3f);
        if constexpr (!std::is_same_v<C, bf16>) {
            p += f * 1.339887440e-3f + f * f * 1.535336188e-4f;
        }
        p = p * f + 5.550332548e-2f;
        p = p * f + 2.402264791e-1f;
        p = p * f + 6.931472028e-1f;
        p = p * f + 1.0f;
        return as_f(as_i(p) + (as_i(shifted) << 23));
    }

    void rescale(int64_t row, float before, float top) {
        const float keep = vexp(splat(before - top))[0];
        largest_score[row] = top;
        total[row] *= keep;
        float* sum_row = sums + row * columns;
        for (int64_t d = 0; d < columns; d += VL) store(sum_row + d, load(sum_row + d) * keep);
    }

    void store_result() const {
        for (int64_t row = 0; row < rows; row++) {
            const int64_t head = item.kv_head * a.heads_per_kv + row % a.heads_per_kv;
            T* out = (T*)a.out + (item.token + row / a.heads_per_kv) * a.out_row + head * a.dim;
            const float inverse = 1.0f / total[row];
            for (int64_t d = 0; d < a.dim; d += VL) store(out + d, load(sums + row * columns + d) * inverse);
        }
    }
};

template <class T>
void attend_tile(const Attention& a, Scratch& scratch, const TileItem& item) {
    if (a.kv_dtype == FS_I8)
        PromptTile<T, int8_t>(a, item, scratch).run();
    else
        PromptTile<T, T>(a, item, scratch).run();
}

}  // namespace
