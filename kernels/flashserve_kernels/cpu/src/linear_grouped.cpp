// Weights in groups (grouped.h): packed, looked up, and products of them with activations in int8.
#include "elementwise.h"
#include "epilogue.h"
#include "gemm_grouped.h"
#include "quantize.h"

namespace {

// The last integers of each operation here.
const GroupedFormat& format_of(const fs_op& op) { return *(const GroupedFormat*)(op.i + 8); }

// --- FS_PACK_GROUPED. rows: panels. ----------------------------------------------------------------------------
// p: codes [n, k] (uint8), scales and minimums [n, groups] (float32), packed memory. i: k, n, gated, unused, format.
int64_t pack_chunks(const fs_op& op, const Dims& dims, int num_threads) {
    return std::min<int64_t>(dims.rows(op), 8 * num_threads);
}

void store_scale(int64_t scales, char* at, int column, float value) {
    if (scales == FS_SCALES_F16) {
        ((f16*)at)[column] = (f16)value;
    } else if (scales == FS_SCALES_F32) {
        ((float*)at)[column] = value;
    } else {
        ((uint16_t*)at)[column] = float24(value) >> 8;
        ((uint8_t*)at)[2 * PANEL + column] = float24(value);
    }
}

void pack_column(const fs_op& op, const GroupedFormat& format, int64_t row, char* panel, int column) {
    const int64_t k = op.i[0], groups = format.groups(k);
    const uint8_t* codes = (const uint8_t*)op.p[0] + row * k;
    for (int64_t g = 0; g < groups; g++, panel += format.block_bytes()) {
        for (int64_t quad = 0; quad < format.group / 4; quad++) {
            const int64_t first = g * format.group + quad * 4;
            uint8_t four[4] = {};
            if (first < k) memcpy(four, codes + first, std::min<int64_t>(4, k - first));
            uint8_t* to = (uint8_t*)panel + ((format.bits == 8 ? quad : quad / 2) * PANEL + column) * 4;
            for (int i = 0; i < 4; i++) {
                if (format.bits == 8 || quad % 2 == 0)
                    to[i] = four[i];
                else
                    to[i] |= four[i] << 4;
            }
        }
        char* scales = panel + format.code_bytes();
        store_scale(format.scales, scales, column, ((const float*)op.p[1])[row * groups + g]);
        if (format.zero < 0)
            store_scale(format.scales, scales + format.scale_bytes(), column, ((const float*)op.p[2])[row * groups + g]);
    }
}

void pack_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const GroupedFormat& format = format_of(op);
    const Range panels = part(dims.rows(op), chunk, num_chunks);
    for (int64_t panel = panels.begin; panel < panels.end; panel++) {
        char* to = (char*)op.p[3] + panel * format.panel_bytes(op.i[0]);
        memset(to, 0, format.panel_bytes(op.i[0]));
        for (int c = 0; c < PANEL; c++) {
            const int64_t row = weight_row(panel, c, op.i[1], op.i[2]);
            if (row >= 0) pack_column(op, format, row, to, c);
        }
    }
}

// --- FS_QUANTIZE_GROUPS. dtype: of x. p: x, rows in int8 (grouped.h). ------------------------------------------
// i: columns, elements from row to row of x, bytes from row to row of the result, group.
int64_t quantize_chunks(const fs_op& op, const Dims& dims, int) {
    const int64_t rows_of_a_chunk = std::max<int64_t>(1, 32768 / op.i[0]);
    return (dims.rows(op) + rows_of_a_chunk - 1) / rows_of_a_chunk;
}

template <class T>
void quantize_groups(const T* x, int64_t k, int64_t group, char* to) {
    const int64_t groups = (k + group - 1) / group;
    const GroupedRow row(to, group, groups);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * group, count = std::min(group, k - first);
        int8_t* values = (int8_t*)row.values + first;
        const float scale = magnitude(x + first, count) / 127.0f;
        quantize_row(x + first, count, group, inverse_of(scale), 0, values);
        int32_t total = 0;
        for (int64_t i = 0; i < group; i++) total += values[i];
        ((float*)row.scales)[g] = scale;
        ((float*)row.sums)[g] = scale * (float)total;
    }
}

void quantize_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const Range rows = part(dims.rows(op), chunk, num_chunks);
    with_type(op.dtype, [&]<class T>(T) {
        for (int64_t row = rows.begin; row < rows.end; row++)
            quantize_groups((const T*)op.p[0] + row * op.i[1], op.i[0], op.i[3], (char*)op.p[1] + row * op.i[2]);
    });
}

// --- FS_EMBEDDING_GROUPED. dtype: of out. p: packed memory, ids (int64), out. ----------------------------------
// i: k, elements from row to row of out; format. f: what rows are multiplied with.
int64_t embedding_chunks(const fs_op& op, const Dims& dims, int) { return row_chunks(dims.rows(op), 16 * op.i[0]); }

template <class T>
void look_up(const char* panel, int column, int64_t k, const GroupedFormat& format, float times, T* out) {
    for (int64_t g = 0; g < format.groups(k); g++, panel += format.block_bytes()) {
        alignas(64) float scales[PANEL], minimums[PANEL];
        const char* scale_at = panel + format.code_bytes();
        const int first = column / VL * VL;
        store(scales, load_scales(format.scales, scale_at, first));
        if (format.zero < 0) store(minimums, load_scales(format.scales, scale_at + format.scale_bytes(), first));
        const float scale = scales[column - first];
        const float minimum = format.zero < 0 ? minimums[column - first] : scale * (float)-format.zero;
        for (int64_t i = 0; i < std::min(format.group, k - g * format.group); i++) {
            const int64_t quad = i / 4, place = format.bits == 8 ? quad : quad / 2;
            const uint8_t byte = ((const uint8_t*)panel)[(place * PANEL + column) * 4 + i % 4];
            const int code = format.bits == 8 ? byte : quad % 2 ? byte >> 4 : byte & 15;
            out[g * format.group + i] = from_f32<T>((scale * (float)code + minimum) * times);
        }
    }
}

void embedding_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const GroupedFormat& format = format_of(op);
    const Range rows = part(dims.rows(op), chunk, num_chunks);
    with_type(op.dtype, [&]<class T>(T) {
        for (int64_t row = rows.begin; row < rows.end; row++) {
            const int64_t id = ((const int64_t*)op.p[1])[row];
            const char* panel = (const char*)op.p[0] + id / PANEL * format.panel_bytes(op.i[0]);
            look_up(panel, id % PANEL, op.i[0], format, (float)op.f[0], (T*)op.p[2] + row * op.i[1]);
        }
    });
}

// --- FS_LINEAR_GROUPED. dtype: of the bias. p and i: as FS_LINEAR, x as FS_QUANTIZE_GROUPS makes it, x_stride in bytes;
// then the format. -------------------------------------------------------------------------------------------
constexpr double CHUNK_SECONDS = 25e-6;
constexpr double BYTES_PER_SECOND = 15e9;
// Of one thread, roughly: only the number of chunks follows from it.
#if defined(__AVX512VNNI__)
constexpr double FLOP_PER_SECOND = 6e11;
#else
constexpr double FLOP_PER_SECOND = 1e11;
#endif
// Rows of a chunk, which stay in the second-level cache while panels pass.
constexpr int64_t MOST_ROWS = 256;

int64_t row_blocks(int64_t rows) { return (rows + MOST_ROWS - 1) / MOST_ROWS; }

int64_t linear_chunks(const fs_op& op, const Dims& dims, int num_threads) {
    const LinearArguments& a = linear_arguments(op);
    const int64_t rows = dims.rows(op);
    if (rows == 0) return 0;
    const int64_t panels = num_panels(a.n, a.gated), blocks = row_blocks(rows);
    const double bytes = (double)format_of(op).panel_bytes(a.k) * panels;
    const double flop = 2.0 * a.k * PANEL * panels * ((double)rows / blocks);
    const int64_t wanted = std::max(bytes / BYTES_PER_SECOND, flop / FLOP_PER_SECOND) / CHUNK_SECONDS;
    const int64_t needed = (4 * num_threads - 1) / blocks + 1;  // or the last one keeps the others waiting
    return blocks * std::min(panels, std::max(wanted, needed));
}

template <class X, class O, class Gate>
void run_chunk(const fs_op& op, Range rows, Range panels) {
    const LinearArguments& a = linear_arguments(op);
    const GroupedFormat& format = format_of(op);
    alignas(64) float sums[GroupedMicro::ROWS * PANEL];
    for (int64_t panel = panels.begin; panel < panels.end; panel++) {
        const char* at = (const char*)op.p[1] + panel * format.panel_bytes(a.k);
        for (int64_t row = rows.begin; row < rows.end;) {
            const int count = GroupedMicro::rows(rows.end - row);
            const char* x = (const char*)op.p[0] + row * a.x_stride;
            GroupedMicro::run({x, a.x_stride, count, at, format, format.groups(a.k), sums, row == rows.begin});
            Epilogue<float, X, O, Gate>(op, a, panel, sums, row, count).finish();
            row += count;
        }
    }
}

void linear_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch&) {
    const LinearArguments& a = linear_arguments(op);
    const int64_t blocks = row_blocks(dims.rows(op)), ranges = num_chunks / blocks;
    const Range rows = part(dims.rows(op), chunk / ranges, blocks);
    const Range panels = part(num_panels(a.n, a.gated), chunk % ranges, ranges);
    with_type(op.dtype, [&]<class X>(X) {
        if (a.gated && a.activation == GELU)
            run_chunk<X, X, Gelu>(op, rows, panels);
        else if (a.gated)
            run_chunk<X, X, SigmoidForm>(op, rows, panels);
        else if (a.out_dtype == FS_F32)
            run_chunk<X, float, Nothing>(op, rows, panels);
        else
            run_chunk<X, X, Nothing>(op, rows, panels);
    });
}

Reads linear_reads(const fs_op& op, const Dims& dims, int64_t num_chunks) {
    const LinearArguments& a = linear_arguments(op);
    const int64_t ranges = num_chunks / std::max<int64_t>(1, row_blocks(dims.rows(op)));
    return {(const char*)op.p[1], num_panels(a.n, a.gated), format_of(op).panel_bytes(a.k), ranges};
}

}  // namespace

extern const Kernel pack_grouped_kernel = {pack_chunks, pack_run};
extern const Kernel quantize_groups_kernel = {quantize_chunks, quantize_run};
extern const Kernel embedding_grouped_kernel = {embedding_chunks, embedding_run};
extern const Kernel linear_grouped_kernel = {linear_chunks, linear_run, linear_reads};
