// Embedding rows, and the activations of the feed-forward layers.
#include "elementwise.h"

#include "activation.h"

namespace {

// FS_EMBEDDING. p: table, ids (int64), out. i: bytes of a row, bytes from row to row of the table, of out. f: what rows are
// multiplied with; where that is 1, they are of any type.
int64_t embedding_chunks(const fs_op& op, const Dims& dims, int) { return row_chunks(dims.rows(op), 2 * op.i[0]); }

template <class T>
void scale_row(T* x, int64_t columns, float scale) {
    int64_t c = 0;
    for (; c + VL <= columns; c += VL) store(x + c, load(x + c) * scale);
    for (; c < columns; c++) x[c] = from_f32<T>(to_f32(x[c]) * scale);
}

void embedding_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const auto [begin, end] = part(dims.rows(op), chunk, num_chunks);
    const int64_t* ids = (const int64_t*)op.p[1];
    const float scale = (float)op.f[0];
    for (int64_t row = begin; row < end; row++) {
        char* out = (char*)op.p[2] + row * op.i[2];
        memcpy(out, (const char*)op.p[0] + ids[row] * op.i[1], op.i[0]);
        if (scale == 1.0f) continue;
        const int64_t columns = op.i[0] / size_of(op.dtype);
        if (op.dtype == FS_F32)
            scale_row((float*)out, columns, scale);
        else if (op.dtype == FS_BF16)
            scale_row((bf16*)out, columns, scale);
        else
            scale_row((f16*)out, columns, scale);
    }
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

// FS_ACTIVATION. p: x, out (may be x). i: which (activation.h), columns, elements from row to row of x, of out. f: the cap
// of a soft cap.
int64_t activation_chunks(const fs_op& op, const Dims& dims, int) {
    return row_chunks(dims.rows(op), 2 * op.i[1] * size_of(op.dtype));
}

template <class T, class F>
void map_rows(const fs_op& op, Range rows, const F& f) {
    const int64_t columns = op.i[1];
    for (int64_t row = rows.begin; row < rows.end; row++) {
        const T* x = (const T*)op.p[0] + row * op.i[2];
        T* out = (T*)op.p[1] + row * op.i[3];
        int64_t c = 0;
        for (; c + VL <= columns; c += VL) store(out + c, f(load(x + c)));
        if (const int rest = columns - c; rest > 0) store_n(out + c, f(load_n(x + c, rest)), rest);
    }
}

template <class T>
void activate(const fs_op& op, Range rows) {
    if (op.i[0] == SOFT_CAP) return map_rows<T>(op, rows, [&](vf x) { return soft_cap(x, (float)op.f[0]); });
    if (op.i[0] == GELU) return map_rows<T>(op, rows, Gelu());
    map_rows<T>(op, rows, SigmoidForm::of(op.i[0]));
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
