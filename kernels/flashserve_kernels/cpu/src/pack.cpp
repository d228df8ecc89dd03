// Packs weights while loading, and quantises: weights once, per output column; activations at each step, per row.
#include "packed.h"
#include "quantize.h"

namespace {

// --- FS_PACK_LINEAR. rows: panels. dtype: of the weight. -------------------------------------------------------
// p: weight [n, k], packed memory (packed.h). i: see Arguments.
struct Arguments {
    int64_t k, n, stride, gated, weight_dtype;
};
const Arguments& arguments(const fs_op& op) { return *(const Arguments*)op.i; }

int64_t pack_chunks(const fs_op& op, const Dims& dims, int num_threads) {
    return std::min<int64_t>(dims.rows(op), 8 * num_threads);
}

// columns[c]: k values of column c, null for padding.
template <class E, int GROUP>
void interleave(const E* const (&columns)[PANEL], int64_t k, E* panel) {
    constexpr int64_t STEP = GROUP * STEP_ROWS;
    for (int64_t begin = 0; begin < k; begin += STEP, panel += STEP * PANEL) {
        for (int c = 0; c < PANEL; c++) {
            E values[STEP] = {};
            if (columns[c]) memcpy(values, columns[c] + begin, std::min(STEP, k - begin) * sizeof(E));
            for (int s = 0; s < STEP_ROWS; s++)
                memcpy(panel + (s * PANEL + c) * GROUP, values + s * GROUP, GROUP * sizeof(E));
        }
    }
}

template <class T>
void pack_panel(const fs_op& op, int64_t panel) {
    const Arguments& a = arguments(op);
    const T* columns[PANEL];
    for (int c = 0; c < PANEL; c++) {
        const int64_t row = weight_row(panel, c, a.n, a.gated);
        columns[c] = row < 0 ? nullptr : (const T*)op.p[0] + row * a.stride;
    }
    interleave<T, K_GROUP<T>>(columns, a.k, (T*)((char*)op.p[1] + panel * panel_bytes<T>(a.k)));
}

template <class T>
void pack_panel_int8(const fs_op& op, int64_t panel, Scratch& scratch) {
    const Arguments& a = arguments(op);
    const Int8Columns packed = int8_columns(op.p[1], a.k, a.n, a.gated);
    int8_t* memory = (int8_t*)scratch.get(a.k * PANEL);
    const int8_t* columns[PANEL];
    for (int c = 0; c < PANEL; c++) {
        const int64_t row = weight_row(panel, c, a.n, a.gated);
        float scale = 0;
        int32_t total = 0;
        columns[c] = nullptr;
        if (row >= 0) {
            const T* weight = (const T*)op.p[0] + row * a.stride;
            int8_t* values = memory + c * a.k;
            scale = magnitude(weight, a.k) / 127.0f;
            quantize_row(weight, a.k, a.k, inverse_of(scale), 0, values);
            for (int64_t i = 0; i < a.k; i++) total += values[i];
            columns[c] = values;
        }
        packed.scales[panel * PANEL + c] = scale;
        packed.offsets[panel * PANEL + c] = 128 * total;
    }
    interleave<int8_t, 4>(columns, a.k, (int8_t*)op.p[1] + panel * panel_bytes<uint8_t>(a.k));
}

void pack_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch& scratch) {
    const Range panels = part(dims.rows(op), chunk, num_chunks);
    for (int64_t panel = panels.begin; panel < panels.end; panel++)
        with_type(op.dtype, [&]<class T>(T) {
            if (arguments(op).weight_dtype == FS_I8)
                pack_panel_int8<T>(op, panel, scratch);
            else
                pack_panel<T>(op, panel);
        });
}

// --- FS_QUANTIZE. dtype: of x. p: x, quantised rows (uint8: 128 + round(x / scale)), scales (float32). ----------
// i: columns, elements from row to row of x, bytes from row to row of the quantised rows.
int64_t quantize_chunks(const fs_op& op, const Dims& dims, int) {
    const int64_t rows_of_a_chunk = std::max<int64_t>(1, 65536 / op.i[0]);
    return (dims.rows(op) + rows_of_a_chunk - 1) / rows_of_a_chunk;
}

void quantize_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const Range rows = part(dims.rows(op), chunk, num_chunks);
    with_type(op.dtype, [&]<class T>(T) {
        for (int64_t row = rows.begin; row < rows.end; row++) {
            const T* x = (const T*)op.p[0] + row * op.i[1];
            const float scale = magnitude(x, op.i[0]) / 127.0f;
            ((float*)op.p[2])[row] = scale;
            quantize_row(x, op.i[0], op.i[2], inverse_of(scale), 128, (uint8_t*)op.p[1] + row * op.i[2]);
        }
    });
}

}  // namespace

extern const Kernel pack_linear_kernel = {pack_chunks, pack_run};
extern const Kernel quantize_kernel = {quantize_chunks, quantize_run};
