// Products with packed weights, and their epilogues: bias, SwiGLU, the scales of int8.
#include "gemm.h"
#include "packed.h"

namespace {

// FS_LINEAR. out = x W^T + bias, or silu of it times the other half of it. dtype: of x and the bias.
// p: x (int8 weights: the rows that FS_QUANTIZE made), packed weight (packed.h), bias or null, out, scales of x's rows
// (int8 weights only). i: see Arguments.
struct Arguments {
    int64_t k;           // columns of x
    int64_t n;           // rows of the weight
    int64_t x_stride;    // elements from row to row
    int64_t out_stride;  // elements from row to row
    int64_t gated;       // 1: gate rows first, then up rows; out has n / 2 columns
    int64_t out_dtype;   // dtype, or FS_F32
    int64_t weight_dtype;  // dtype, or FS_I8
};
const Arguments& arguments(const fs_op& op) { return *(const Arguments*)op.i; }

// How far ahead of the work a panel is fetched from memory when it is used once.
constexpr int64_t AHEAD_BYTES = 4096;
constexpr double CHUNK_SECONDS = 25e-6;
constexpr double BYTES_PER_SECOND = 15e9;
// Of one thread, roughly: only the number of chunks follows from it.
#if defined(__AMX_BF16__)
constexpr double FLOP_PER_SECOND = 2e12;
#elif defined(__AVX512BF16__)
constexpr double FLOP_PER_SECOND = 4e11;
#else
constexpr double FLOP_PER_SECOND = 6e10;
#endif

// How the work is cut, from the sizes alone: chunks are row blocks by groups of panels, and within a chunk K is cut so
// that a piece of a panel stays in the first-level cache while the block's rows, in the second, stream past it.
constexpr int64_t PIECE_BYTES = 32 << 10;
constexpr int64_t ROWS_BYTES = 1 << 20;
// Rows too long for that are cut too: this many rows, and panels whose sums wait for the next piece of K.
constexpr int64_t DEEP_ROWS = 256, DEEP_PANELS = 16;

template <class T>
struct Cut {
    int64_t row_blocks, pieces;
    bool deep;

    Cut(const Arguments& a, int64_t rows) {
        const int64_t row_bytes = padded_k<T>(a.k) * sizeof(T), fit = ROWS_BYTES / row_bytes / 32 * 32;
        const bool one_pass = rows <= 2 * Micro<T>::ROWS;
        deep = rows > fit && fit < DEEP_ROWS;
        const int64_t most = deep ? DEEP_ROWS : fit;
        row_blocks = (rows + most - 1) / most;
        pieces = one_pass ? 1 : (panel_bytes<T>(a.k) + PIECE_BYTES - 1) / PIECE_BYTES;
    }
};

template <class T>
int64_t num_chunks_of(const Arguments& a, int64_t rows, int num_threads) {
    if (rows == 0) return 0;
    const Cut<T> cut(a, rows);
    const int64_t panels = num_panels(a.n, a.gated);
    const double bytes = (double)panel_bytes<T>(a.k) * panels;
    const double flop = 2.0 * a.k * PANEL * panels * ((double)rows / cut.row_blocks);
    const double seconds = std::max(bytes / BYTES_PER_SECOND, flop / FLOP_PER_SECOND);
    int64_t groups = std::max<int64_t>(seconds / CHUNK_SECONDS, (4 * num_threads - 1) / cut.row_blocks + 1);
    if (cut.deep) groups = (panels + DEEP_PANELS - 1) / DEEP_PANELS;
    return cut.row_blocks * std::min(panels, groups);
}

// --- epilogue ------------------------------------------------------------------------------------------------

// 1 / x for positive x below 2^126, relative error below 2^-22. A division of 16 floats occupies AVX-512 for 16 cycles.
FS_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
    const vf r = (vf)_mm512_rcp14_ps((__m512)x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}
FS_INLINE vf silu(vf x) { return x * reciprocal(vexp(vmin(-x, splat(87.0f))) + 1.0f); }

// One panel's sums become columns of the output. X: type of the bias; O: of the output.
template <class T, class X, class O>
class Epilogue {
    static constexpr int VECTORS = PANEL / VL, HALF = VECTORS / 2;
    static constexpr bool INT8 = std::is_same_v<T, uint8_t>;

    O* out;
    int64_t stride;
    const float* row_scales;
    bool gated;
    int left;  // columns of the output that exist
    // Of the panel's columns. What they add costs nothing beside the loads and stores, so there is no case without a bias.
    vf bias[VECTORS] = {}, scales[VECTORS];
    vi offsets[VECTORS];

   public:
    Epilogue(const fs_op& op, const Arguments& a, int64_t panel)
        : stride(a.out_stride), row_scales((const float*)op.p[4]), gated(a.gated) {
        const int64_t width = gated ? PANEL / 2 : PANEL, outputs = gated ? a.n / 2 : a.n, column = panel * width;
        out = (O*)op.p[3] + column;
        left = std::min(width, outputs - column);
        if (op.p[2]) {
            float values[PANEL] = {};
            for (int c = 0; c < PANEL; c++) {
                const int64_t row = weight_row(panel, c, a.n, gated);
                if (row >= 0) values[c] = to_f32(((const X*)op.p[2])[row]);
            }
            for (int v = 0; v < VECTORS; v++) bias[v] = load(values + v * VL);
        }
        if constexpr (INT8) {
            const Int8Columns columns = int8_columns(op.p[1], a.k, a.n, gated);
            for (int v = 0; v < VECTORS; v++) {
                scales[v] = load(columns.scales + panel * PANEL + v * VL);
                offsets[v] = load_as<vi>(columns.offsets + panel * PANEL + v * VL);
            }
        }
    }

    void rows(const AccType<T>* sums, int64_t first, int count) const {
        if (gated)
            left == PANEL / 2 ? write<true, true>(sums, first, count) : write<true, false>(sums, first, count);
        else
            left == PANEL ? write<false, true>(sums, first, count) : write<false, false>(sums, first, count);
    }

   private:
    template <bool GATED, bool WHOLE>
    void write(const AccType<T>* sums, int64_t first, int count) const {
        const Epilogue e = *this;  // a copy that stores cannot alias, so that it stays in registers
        O* row = e.out + first * e.stride;
        for (int r = 0; r < count; r++, sums += PANEL, row += e.stride) {
            vf values[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                if constexpr (INT8) {
                    const vf sum = __builtin_convertvector(load_as<vi>(sums + v * VL) - e.offsets[v], vf);
                    values[v] = sum * (e.scales[v] * e.row_scales[first + r]) + e.bias[v];
                } else {
                    values[v] = load(sums + v * VL) + e.bias[v];
                }
            }
#pragma GCC unroll 8
            for (int v = 0; v < (GATED ? HALF : VECTORS); v++) {
                const vf value = GATED ? silu(values[v]) * values[v + HALF] : values[v];
                const int n = WHOLE ? VL : e.left - v * VL;
                if (n >= VL)
                    store(row + v * VL, value);
                else if (n > 0)
                    store_n(row + v * VL, value, n);
            }
        }
    }
};

// --- chunks --------------------------------------------------------------------------------------------------

// A piece of K of one panel: from step begin to end.
struct Piece {
    int64_t panel, begin, end;
};

template <class T, class X, class O>
struct ChunkRun {
    const fs_op& op;
    const Arguments& a;
    const Cut<T>& cut;
    Range rows, panels;
    AccType<T>* sums;
    int64_t steps = padded_k<T>(a.k) / K_STEP<T>;
    // Panels that go through a piece of K before the next piece begins.
    int64_t together = cut.deep ? panels.end - panels.begin : 1;
    int64_t passes = (rows.end - rows.begin + Micro<T>::ROWS - 1) / Micro<T>::ROWS;

    Piece piece(int64_t panel, int64_t index) const {
        const Range of_k = part(steps, index, cut.pieces);
        return {panel, of_k.begin, of_k.end};
    }
    const PanelType<T>* address(const Piece& p) const {
        return (const PanelType<T>*)((const char*)op.p[1] + p.panel * panel_bytes<T>(a.k)) + p.begin * K_STEP<T> * PANEL;
    }

    void run() const {
        for (int64_t first = panels.begin; first < panels.end; first += together)
            for (int64_t index = 0; index < cut.pieces; index++)
                for (int64_t p = first; p < first + together; p++) {
                    const Piece next = p + 1 < first + together ? piece(p + 1, index)
                                       : index + 1 < cut.pieces ? piece(first, index + 1)
                                                                : piece(p + 1, 0);
                    run_piece(piece(p, index), next, sums + (p - first) * (rows.end - rows.begin) * PANEL);
                }
    }

    // All rows of the block. c: the panel's sums so far, one row after the other; or room for two passes, if K has one piece.
    void run_piece(const Piece& now, const Piece& next, AccType<T>* c) const {
        const Epilogue<T, X, O> epilogue(op, a, now.panel);
        const bool last = now.end == steps;
        const int64_t k_begin = now.begin * K_STEP<T>, k_end = last ? a.k : now.end * K_STEP<T>;
        // One or two passes wait for memory: the first fetches this piece, a little ahead. More passes fetch the next one.
        Ahead ahead{(const char*)address(now) + AHEAD_BYTES, 2 * STEP_ROWS};
        if (passes > 2) ahead = {(const char*)address(next), int((2 * STEP_ROWS + passes - 1) / passes)};
        // The epilogue of a pass comes after the next pass: it does not wait for sums that are still being stored.
        const AccType<T>* done = nullptr;
        int64_t done_row = 0;
        int done_count = 0;
        for (int64_t row = rows.begin, pass = 0; row < rows.end; pass++) {
            const int count = Micro<T>::rows(std::min<int64_t>(rows.end - row, 1 << 20));
            const T* x = (const T*)op.p[0] + row * a.x_stride + k_begin;
            AccType<T>* out = c + (cut.pieces > 1 ? row - rows.begin : pass % 2 * Micro<T>::ROWS) * PANEL;
            panel_gemm<T>(x, a.x_stride, count, address(now), k_end - k_begin, out, PANEL, now.begin > 0, ahead,
                          passes == 1 ? Hot::ROWS : Hot::PANEL);
            if (passes > 2)
                ahead.at += (now.end - now.begin) * ahead.lines * 64;
            else
                ahead.lines = 0;
            if (last && done_count) epilogue.rows(done, done_row, done_count);
            done = out;
            done_row = row;
            done_count = count;
            row += count;
        }
        if (last) epilogue.rows(done, done_row, done_count);
    }
};

template <class T, class X, class O>
void run_chunk(const fs_op& op, int64_t num_rows, int64_t chunk, int64_t num_chunks, Scratch& scratch) {
    const Arguments& a = arguments(op);
    const Cut<T> cut(a, num_rows);
    const int64_t groups = num_chunks / cut.row_blocks;
    const Range rows = part(num_rows, chunk / groups, cut.row_blocks);
    const Range panels = part(num_panels(a.n, a.gated), chunk % groups, groups);
    const int64_t waiting = (rows.end - rows.begin) * (cut.deep ? panels.end - panels.begin : 1);
    const int64_t num_sums = PANEL * (cut.pieces == 1 ? 2 * Micro<T>::ROWS : waiting);
    auto* sums = (AccType<T>*)scratch.get(num_sums * sizeof(AccType<T>));
    ChunkRun<T, X, O>{op, a, cut, rows, panels, sums}.run();
}

template <class T, class X>
void run_for_output(const fs_op& op, int64_t rows, int64_t chunk, int64_t num_chunks, Scratch& scratch) {
    if (arguments(op).out_dtype == FS_F32) return run_chunk<T, X, float>(op, rows, chunk, num_chunks, scratch);
    return run_chunk<T, X, X>(op, rows, chunk, num_chunks, scratch);
}

int64_t linear_chunks(const fs_op& op, const Dims& dims, int num_threads) {
    const Arguments& a = arguments(op);
    return with_operand_type(op.dtype, a.weight_dtype, [&]<class T>(T) {
        return num_chunks_of<T>(a, dims.rows(op), num_threads);
    });
}

void linear_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch& scratch) {
    with_type(op.dtype, [&]<class X>(X) {
        if (arguments(op).weight_dtype == FS_I8)
            run_for_output<uint8_t, X>(op, dims.rows(op), chunk, num_chunks, scratch);
        else
            run_for_output<X, X>(op, dims.rows(op), chunk, num_chunks, scratch);
    });
}

}  // namespace

extern const Kernel linear_kernel = {linear_chunks, linear_run};
