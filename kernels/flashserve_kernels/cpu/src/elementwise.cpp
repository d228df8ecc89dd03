// Embedding rows, and the activations of the feed-forward layers.
#include "elementwise.h"

#include "simd.h"

namespace {

// FS_EMBEDDING. p: table, ids (int64), out. i: bytes of a row, bytes from row to row of the table, of out.
int64_t embedding_chunks(const fs_op& op, const Dims& dims, int) { return row_chunks(dims.rows(op), 2 * op.i[0]); }

void embedding_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const auto [begin, end] = part(dims.rows(op), chunk, num_chunks);
    const int64_t* ids = (const int64_t*)op.p[1];
    for (int64_t row = begin; row < end; row++)
        memcpy((char*)op.p[2] + row * op.i[2], (const char*)op.p[0] + ids[row] * op.i[1], op.i[0]);
}

// FS_ADD_EMBEDDING. p: x, table, ids (int64). i: columns, elements from row to row of x, of the table.
int64_t add_embedding_chunks(const fs_op& op, const Dims& dims, int) {
    return row_chunks(dims.rows(op), 3 * op.i[0] * size_of(op.dtype));
}

template <class T>
void add_rows(const fs_op& op, Range rows) {
    const int64_t columns = op.i[0];
    for (int64_t row = rows.begin; row < rows.end; row++) {
        T* x = (T*)op.p[0] + row * op.i[1];
        const T* added = (const T*)op.p[1] + ((const int64_t*)op.p[2])[row] * op.i[2];
        int64_t c = 0;
        for (; c + VL <= columns; c += VL) store(x + c, load(x + c) + load(added + c));
        for (; c < columns; c++) x[c] = from_f32<T>(to_f32(x[c]) + to_f32(added[c]));
    }
}

void add_embedding_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const Range rows = part(dims.rows(op), chunk, num_chunks);
    if (op.dtype == FS_F32) return add_rows<float>(op, rows);
    if (op.dtype == FS_BF16) return add_rows<bf16>(op, rows);
    return add_rows<f16>(op, rows);
}

// FS_ACTIVATION. p: x, out. i: which (0: silu(gate) * up, 1: GELU in its tanh form), columns of out, elements from row to
// row of x, of out.
enum Activation : int64_t { SILU_AND_MUL = 0, GELU_TANH = 1 };

int64_t activation_chunks(const fs_op& op, const Dims& dims, int) {
    return row_chunks(dims.rows(op), 3 * op.i[1] * size_of(op.dtype));
}

// x / (1 + e^-y). For y below -87 vexp's argument is cut at 87, where the quotient is 0 to float32's precision anyway.
FS_INLINE vf times_sigmoid(vf x, vf y) { return x / (vexp(vmin(-y, splat(87.0f))) + 1.0f); }

FS_INLINE vf gelu_tanh(vf x) {  // 0.5 (1 + tanh z) = sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
    return times_sigmoid(x, x * 1.5957691216057308f * (x * x * 0.044715f + 1.0f));
}

template <class T>
void activate(const fs_op& op, Range rows) {
    const int64_t columns = op.i[1];
    for (int64_t row = rows.begin; row < rows.end; row++) {
        const T* x = (const T*)op.p[0] + row * op.i[2];
        T* out = (T*)op.p[1] + row * op.i[3];
        int64_t c = 0;
        if (op.i[0] == SILU_AND_MUL) {
            const T* up = x + columns;
            for (; c + VL <= columns; c += VL) {
                const vf gate = load(x + c);
                store(out + c, times_sigmoid(gate, gate) * load(up + c));
            }
            if (const int rest = columns - c; rest > 0) {
                const vf gate = load_n(x + c, rest);
                store_n(out + c, times_sigmoid(gate, gate) * load_n(up + c, rest), rest);
            }
        } else {
            for (; c + VL <= columns; c += VL) store(out + c, gelu_tanh(load(x + c)));
            if (const int rest = columns - c; rest > 0) store_n(out + c, gelu_tanh(load_n(x + c, rest)), rest);
        }
    }
}

void activation_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const Range rows = part(dims.rows(op), chunk, num_chunks);
    if (op.dtype == FS_F32) return activate<float>(op, rows);
    if (op.dtype == FS_BF16) return activate<bf16>(op, rows);
    return activate<f16>(op, rows);
}

}  // namespace

extern const Kernel embedding_kernel = {embedding_chunks, embedding_run};
extern const Kernel add_embedding_kernel = {add_embedding_chunks, add_embedding_run};
extern const Kernel activation_kernel = {activation_chunks, activation_run};
