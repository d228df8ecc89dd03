// A packed weight in memory: its panels (gemm.h), one after the other; behind them, for int8, a scale (float32) and an
// offset (int32) for each column of each panel.
#pragma once
#include <algorithm>

#include "gemm.h"
#include "ops.h"

// Gated weights have 16 columns of gate and the 16 columns of up that belong to them in a panel.
inline int64_t num_panels(int64_t n, bool gated) {
    return gated ? (n / 2 + PANEL / 2 - 1) / (PANEL / 2) : (n + PANEL - 1) / PANEL;
}

// The weight's row that is column c of a panel; -1 for padding.
inline int64_t weight_row(int64_t panel, int c, int64_t n, bool gated) {
    if (!gated) return panel * PANEL + c < n ? panel * PANEL + c : -1;
    const int64_t output = panel * (PANEL / 2) + c % (PANEL / 2);
    return output >= n / 2 ? -1 : c < PANEL / 2 ? output : n / 2 + output;
}

// x is stored as 128 + round(x / scale), so sum(x w) = (sum(stored w) - offset) * scales, offset = 128 * sum(w).
struct Int8Columns {
    float* scales;
    int32_t* offsets;
};
inline Int8Columns int8_columns(void* memory, int64_t k, int64_t n, bool gated) {
    const int64_t panels = num_panels(n, gated);
    float* scales = (float*)((char*)memory + panels * panel_bytes<uint8_t>(k));
    return {scales, (int32_t*)(scales + panels * PANEL)};
}

// f(T()) with the type that a number of abi.h names.
template <class F>
auto with_type(int64_t dtype, F f) {
    if (dtype == FS_F32) return f(float());
    if (dtype == FS_BF16) return f(bf16());
    return f(f16());
}
template <class F>
auto with_operand_type(int64_t dtype, int64_t weight_dtype, F f) {
    if (weight_dtype == FS_I8) return f(uint8_t());
    return with_type(dtype, f);
}
