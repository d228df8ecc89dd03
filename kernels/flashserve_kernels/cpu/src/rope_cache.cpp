// Rotary position embedding (half-split), and the write of keys and values into the paged cache.
#include "rope_cache.h"

#include <cmath>

namespace {

// FS_ROPE_CACHE. p: q (null: nothing is rotated), k, v, cos_sin (float32, a row's D/2 cosines and then its D/2 sines; null
// with q), slots (int64, -1: not stored), cache. i: query heads, KV heads, D, elements from row to row and from head to
// head of q, k, v (six numbers), elements from row to row of cos_sin, block size, dtype of the cache.
struct Shape {
    int64_t heads, kv_heads, dim, q_row, q_head, k_row, k_head, v_row, v_head, cos_row;
    CacheLayout layout;
    explicit Shape(const fs_op& op)
        : heads(op.i[0]), kv_heads(op.i[1]), dim(op.i[2]), q_row(op.i[3]), q_head(op.i[4]), k_row(op.i[5]), k_head(op.i[6]),
          v_row(op.i[7]), v_head(op.i[8]), cos_row(op.i[9]),
          layout(op.i[1], op.i[2], op.i[10], (int32_t)op.i[11]) {}
};

int64_t rope_cache_chunks(const fs_op& op, const Dims& dims, int) {
    return row_chunks(dims.rows(op), 2 * (op.i[0] + 2 * op.i[1]) * op.i[2] * size_of(op.dtype));
}

template <class T>
FS_INLINE void rotate(T* x, const float* cos_sin, int64_t dim) {
    const int64_t half = dim / 2;
    const float *cosines = cos_sin, *sines = cos_sin + half;
    int64_t c = 0;
    for (; c + VL <= half; c += VL) {
        const vf a = load(x + c), b = load(x + half + c), cosine = load(cosines + c), sine = load(sines + c);
        store(x + c, a * cosine - b * sine);
        store(x + half + c, b * cosine + a * sine);
    }
    for (; c < half; c++) {
        const float a = to_f32(x[c]), b = to_f32(x[half + c]);
        x[c] = from_f32<T>(a * cosines[c] - b * sines[c]);
        x[half + c] = from_f32<T>(b * cosines[c] + a * sines[c]);
    }
}

// One token's key and value of one head into lane `lane` of their group.
FS_INLINE void put(const float* k, const float* v, float* keys, float* values, int64_t lane, int64_t dim) {
    for (int64_t d = 0; d < dim; d++) keys[d * GROUP + lane] = k[d];
    memcpy(values + lane * dim, v, dim * sizeof(float));
}
template <class T>
FS_INLINE void put(const T* k, const T* v, T* keys, T* values, int64_t lane, int64_t dim) {
    static_assert(sizeof(T) == 2);
    for (int64_t d = 0; d < dim; d += 2) memcpy(keys + d * GROUP + lane * 2, k + d, 4);
    T* target = values + lane / 2 * dim * 2 + lane % 2;
    for (int64_t d = 0; d < dim; d++) target[d * 2] = v[d];
}

// Symmetric: the largest magnitude becomes 127. Returns the scale; elements go to out[index(d)].
template <class T, class Index>
FS_INLINE float quantize(const T* x, int8_t* out, int64_t dim, Index index) {
    vf largest_abs = {};
    for (int64_t d = 0; d < dim; d += VL) {
        const vf v = load(x + d);
        largest_abs = vmax(largest_abs, vmax(v, -v));
    }
    const float scale = largest(largest_abs) / 127.0f;
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    for (int64_t d = 0; d < dim; d++) out[index(d)] = (int8_t)std::nearbyintf(to_f32(x[d]) * inverse);
    return scale;
}

template <class T>
void write_token(const Shape& s, const T* k, const T* v, char* cache, int64_t slot, bool int8) {
    const CacheLayout& layout = s.layout;
    const int64_t offset = slot % layout.block_size, group = offset / GROUP, lane = offset % GROUP;
    char* piece = cache + slot / layout.block_size * layout.block_bytes;
    for (int64_t head = 0; head < s.kv_heads; head++, piece += layout.head_bytes, k += s.k_head, v += s.v_head) {
        const int64_t at = group * GROUP * s.dim;
        if (!int8) {
            put(k, v, (T*)piece + at, (T*)(piece + layout.values_at) + at, lane, s.dim);
            continue;
        }
        ((float*)(piece + layout.key_scales_at))[offset] = quantize(
            k, (int8_t*)piece + at, s.dim, [&](int64_t d) { return d / 2 * 2 * GROUP + lane * 2 + d % 2; });
        ((float*)(piece + layout.value_scales_at))[offset] = quantize(
            v, (int8_t*)piece + layout.values_at + at, s.dim,
            [&](int64_t d) { return lane / 2 * 2 * s.dim + d * 2 + lane % 2; });
    }
}

template <class T>
void write_rows(const fs_op& op, Range rows) {
    const Shape s(op);
    for (int64_t row = rows.begin; row < rows.end; row++) {
        T* k = (T*)op.p[1] + row * s.k_row;
        if (T* q = (T*)op.p[0]) {
            const float* cos_sin = (const float*)op.p[3] + row * s.cos_row;
            for (int64_t head = 0; head < s.heads; head++) rotate(q + row * s.q_row + head * s.q_head, cos_sin, s.dim);
            for (int64_t head = 0; head < s.kv_heads; head++) rotate(k + head * s.k_head, cos_sin, s.dim);
        }
        if (const int64_t slot = ((const int64_t*)op.p[4])[row]; slot >= 0)
            write_token<T>(s, k, (const T*)op.p[2] + row * s.v_row, (char*)op.p[5], slot, op.i[11] == FS_I8);
    }
}

void rope_cache_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const Range rows = part(dims.rows(op), chunk, num_chunks);
    if (op.dtype == FS_F32) return write_rows<float>(op, rows);
    if (op.dtype == FS_BF16) return write_rows<bf16>(op, rows);
    return write_rows<f16>(op, rows);
}

}  // namespace

extern const Kernel rope_cache_kernel = {rope_cache_chunks, rope_cache_run};
