// What becomes of a product's sums: bias, gated activations, the scales of int8.
#pragma once
#include "activation.h"
#include "gemm.h"
#include "packed.h"

// FS_LINEAR. out = x W^T + bias, or an activation of half of it times the other half. dtype: of x and the bias.
// p: x (int8 weights: the rows that FS_QUANTIZE made), packed weight (packed.h), bias or null, out, scales of x's rows
// (int8 weights only). i: see LinearArguments.
struct LinearArguments {
    int64_t k;           // columns of x
    int64_t n;           // rows of the weight
    int64_t x_stride;    // elements from row to row
    int64_t out_stride;  // elements from row to row
    int64_t gated;       // 1: gate rows first, then up rows; out has n / 2 columns
    int64_t out_dtype;   // dtype, or FS_F32
    int64_t weight_dtype;  // dtype, or FS_I8
    int64_t activation;    // of the gate (activation.h)
};
inline const LinearArguments& linear_arguments(const fs_op& op) { return *(const LinearArguments*)op.i; }

struct Nothing {};

// One block's sums become rows and columns of the output, beside the next block's work (RowWork of gemm.h). X: type of the
// bias; O: of the output. Gate: SigmoidForm or Gelu; Nothing: the output is not gated.
template <class T, class X, class O, class Gate>
class Epilogue {
    static constexpr bool GATED = !std::is_same_v<Gate, Nothing>;
    static constexpr int VECTORS = PANEL / VL, HALF = VECTORS / 2;
    static constexpr bool INT8 = std::is_same_v<T, uint8_t>;

    struct Int8 {
        vf scales[VECTORS];
        vi offsets[VECTORS];
        const float* row_scales;
    };

    const AccType<T>* sums = nullptr;
    O* out = nullptr;
    int64_t stride = 0;
    int left = 0;  // columns of the output that exist
    // Of the panel's columns. What they add costs nothing beside the loads and stores, so there is no case without a bias.
    vf bias[VECTORS] = {};
    std::conditional_t<INT8, Int8, Nothing> int8 = {};
    Gate gate = {};

   public:
    // Rows that are still to be done.
    int next = 0, end = 0;

    Epilogue() = default;
    Epilogue(const fs_op& op, const LinearArguments& a, int64_t panel, const AccType<T>* sums, int64_t first, int count)
        : sums(sums), stride(a.out_stride), end(count) {
        if constexpr (GATED) gate = Gate::of(a.activation);
        const int64_t width = GATED ? PANEL / 2 : PANEL, outputs = GATED ? a.n / 2 : a.n, column = panel * width;
        out = (O*)op.p[3] + column + first * stride;
        left = std::min(width, outputs - column);
        for (int v = 0; v < VECTORS && op.p[2]; v++) {
            const int place = (GATED ? v % HALF : v) * VL, n = left - place;
            const X* from = (const X*)op.p[2] + (GATED && v >= HALF ? outputs : 0) + column + place;
            if (n > 0) bias[v] = n >= VL ? load(from) : load_n(from, n);
        }
        if constexpr (INT8) {
            const Int8Columns columns = int8_columns(op.p[1], a.k, a.n, GATED);
            for (int v = 0; v < VECTORS; v++) {
                int8.scales[v] = load(columns.scales + panel * PANEL + v * VL);
                int8.offsets[v] = load_as<vi>(columns.offsets + panel * PANEL + v * VL);
            }
            int8.row_scales = (const float*)op.p[4] + first;
        }
    }

    // Whether it still needs the sums that lie there.
    bool reads(const AccType<T>* c) const { return next < end && c == sums; }

    [[gnu::always_inline]] void row(int r) const {
        vf values[VECTORS];
        const AccType<T>* from = sums + r * PANEL;
        O* to = out + r * stride;
        // The next panel's columns: with 512 rows, stores that waited for their lines cost 5-30% of the time.
        prefetch(to + (GATED ? PANEL / 2 : PANEL));
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            if constexpr (INT8) {
                const vf sum = __builtin_convertvector(load_as<vi>(from + v * VL) - int8.offsets[v], vf);
                values[v] = sum * (int8.scales[v] * int8.row_scales[r]) + bias[v];
            } else {
                values[v] = load(from + v * VL) + bias[v];
            }
        }
        if constexpr (!GATED)
            if (left == PANEL) {
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v += 2) store_pair(to + v * VL, values[v], values[v + 1]);
                return;
            }
#pragma GCC unroll 8
        for (int v = 0; v < (GATED ? HALF : VECTORS); v++) {
            vf value = values[v];
            if constexpr (GATED) value = gate(value) * values[v + HALF];
            const int n = left - v * VL;
            if (n >= VL)
                store(to + v * VL, value);
            else if (n > 0)
                store_n(to + v * VL, value, n);
        }
    }
    void finish() {
        const Epilogue e = *this;
        for (int r = next; r < end; r++) e.row(r);
        next = end;
    }
};
