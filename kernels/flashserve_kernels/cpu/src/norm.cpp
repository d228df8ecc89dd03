// RMSNorm and LayerNorm, alone or after the residual add. The sum and the statistics are float32.
#include <cmath>

#include "elementwise.h"
#include "simd.h"

namespace {

// FS_NORM. p: x, weight, bias (null: RMSNorm), out, residual (null: none), total (with a residual: x + residual, float32,
// may be the residual itself).
// i: columns, heads (vectors that are normed separately in each row), then elements from row to row and from head to
// head: of x, of out; from row to row of the residual, of total; dtype of the residual, of weight and bias. f: eps.
struct Norm {
    int64_t columns, heads, x_row, x_head, out_row, out_head, residual_row, total_row;
    int32_t residual_dtype, weight_dtype;
    float eps;
    explicit Norm(const fs_op& op)
        : columns(op.i[0]), heads(op.i[1]), x_row(op.i[2]), x_head(op.i[3]), out_row(op.i[4]), out_head(op.i[5]),
          residual_row(op.i[6]), total_row(op.i[7]), residual_dtype((int32_t)op.i[8]), weight_dtype((int32_t)op.i[9]),
          eps((float)op.f[0]) {}
};

int64_t norm_chunks(const fs_op& op, const Dims& dims, int) {
    return row_chunks(dims.rows(op), op.i[0] * op.i[1] * (op.p[4] ? 12 : 2 * size_of(op.dtype)));
}

template <class X, class R>
void add_row(const X* x, const R* residual, float* total, int64_t n) {
    int64_t c = 0;
    for (; c + VL <= n; c += VL) store(total + c, load(x + c) + load(residual + c));
    for (; c < n; c++) total[c] = to_f32(x[c]) + to_f32(residual[c]);
}

// Sum of (x - mean)^2 over a row.
template <class X>
float square_sum(const X* x, float mean, int64_t n) {
    vf sums[4] = {};
    int64_t c = 0;
    for (; c + 4 * VL <= n; c += 4 * VL)
        for (int u = 0; u < 4; u++) {
            const vf v = load(x + c + u * VL) - mean;
            sums[u] += v * v;
        }
    float rest = 0;
    for (; c < n; c++) rest += (to_f32(x[c]) - mean) * (to_f32(x[c]) - mean);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <class X>
float plain_sum(const X* x, int64_t n) {
    vf sums[2] = {};
    int64_t c = 0;
    for (; c + 2 * VL <= n; c += 2 * VL) {
        sums[0] += load(x + c);
        sums[1] += load(x + c + VL);
    }
    float rest = 0;
    for (; c < n; c++) rest += to_f32(x[c]);
    return sum(sums[0] + sums[1]) + rest;
}

// bias is null for RMSNorm.
template <class X, class W, class O>
void norm_row(const X* x, const W* weight, const W* bias, O* out, int64_t n, float eps) {
    const float mean = bias ? plain_sum(x, n) / n : 0.0f;
    const float scale = 1.0f / std::sqrt(square_sum(x, mean, n) / n + eps);
    int64_t c = 0;
    for (; c + VL <= n; c += VL) {
        vf v = (load(x + c) - mean) * scale * load(weight + c);
        if (bias) v += load(bias + c);
        store(out + c, v);
    }
    for (; c < n; c++) {
        float v = (to_f32(x[c]) - mean) * scale * to_f32(weight[c]);
        if (bias) v += to_f32(bias[c]);
        out[c] = from_f32<O>(v);
    }
}

template <class T, class W>
void norm_rows(const fs_op& op, Range rows) {
    const Norm norm(op);
    const W *weight = (const W*)op.p[1], *bias = (const W*)op.p[2];
    for (int64_t row = rows.begin; row < rows.end; row++) {
        const T* x = (const T*)op.p[0] + row * norm.x_row;
        T* out = (T*)op.p[3] + row * norm.out_row;
        if (op.p[4]) {
            float* total = (float*)op.p[5] + row * norm.total_row;
            if (norm.residual_dtype == FS_F32)
                add_row(x, (const float*)op.p[4] + row * norm.residual_row, total, norm.columns);
            else
                add_row(x, (const T*)op.p[4] + row * norm.residual_row, total, norm.columns);
            norm_row(total, weight, bias, out, norm.columns, norm.eps);
        } else {
            for (int64_t head = 0; head < norm.heads; head++)
                norm_row(x + head * norm.x_head, weight, bias, out + head * norm.out_head, norm.columns, norm.eps);
        }
    }
}

template <class T>
void norm_any_weight(const fs_op& op, Range rows) {
    if (op.i[9] == FS_F32) return norm_rows<T, float>(op, rows);
    return norm_rows<T, T>(op, rows);
}

void norm_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const Range rows = part(dims.rows(op), chunk, num_chunks);
    if (op.dtype == FS_F32) return norm_rows<float, float>(op, rows);
    if (op.dtype == FS_BF16) return norm_any_weight<bf16>(op, rows);
    return norm_any_weight<f16>(op, rows);
}

}  // namespace

extern const Kernel norm_kernel = {norm_chunks, norm_run};
