// Products with packed weights.
#include "epilogue.h"

namespace {

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
// How far ahead of the work a panel is fetched from memory when few rows use it.
constexpr int64_t AHEAD_BYTES = 4096;
// Of x, in the first-level cache, for the rows of one micro-kernel.
constexpr int64_t HOT_BYTES = 36 << 10;
// Panels that stream past them from the second-level cache, and the rows of a chunk. With 2048 rows twice as many panels
// took 9% longer; with 512 rows twice as many rows did.
constexpr int64_t MOST_TOGETHER = 16, MOST_ROWS = 256;

// How the work is cut, from the sizes alone: chunks are blocks of rows by ranges of panels. A chunk takes some panels
// together; some of its rows at a time stay in the first-level cache while these panels stream past. If whole rows do not
// fit, K is cut into pieces, and the chunk's sums wait in the second-level cache for the next piece.
template <class T>
struct Cut {
    int64_t row_blocks, pieces, together;

    Cut(const LinearArguments& a, int64_t rows) {
        const int64_t passes = (rows + Micro<T>::ROWS - 1) / Micro<T>::ROWS;
        // Few wait for memory: one panel after the other, read once. More take as many panels together as there are passes,
        // for the next panels come from memory meanwhile.
        const bool few = passes <= 2;
        pieces = few ? 1 : (Micro<T>::ROWS * padded_k<T>(a.k) * sizeof(T) + HOT_BYTES - 1) / HOT_BYTES;
        together = few ? 1 : std::min(passes, MOST_TOGETHER);
        row_blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
    }
};

template <class T>
int64_t num_chunks_of(const LinearArguments& a, int64_t rows, int num_threads) {
    if (rows == 0) return 0;
    const Cut<T> cut(a, rows);
    const int64_t panels = num_panels(a.n, a.gated);
    const double bytes = (double)panel_bytes<T>(a.k) * panels;
    const double flop = 2.0 * a.k * PANEL * panels * ((double)rows / cut.row_blocks);
    const double seconds = std::max(bytes / BYTES_PER_SECOND, flop / FLOP_PER_SECOND);
    const int64_t wanted = std::min<int64_t>(seconds / CHUNK_SECONDS, (panels + cut.together - 1) / cut.together);
    const int64_t needed = (4 * num_threads - 1) / cut.row_blocks + 1;  // or the last one keeps the others waiting
    return cut.row_blocks * std::min(panels, std::max(wanted, needed));
}

// --- chunks --------------------------------------------------------------------------------------------------

template <class T, class X, class O, class Gate>
struct ChunkRun {
    const fs_op& op;
    const LinearArguments& a;
    const Cut<T>& cut;
    Range rows, panels;
    AccType<T>* sums;
    int64_t steps = padded_k<T>(a.k) / K_STEP<T>;
    int64_t num_rows = rows.end - rows.begin;
    int64_t passes = (num_rows + Micro<T>::ROWS - 1) / Micro<T>::ROWS;
    // The epilogue of a block comes beside the steps of the next: with 16 rows and K = 576 it took 14% of the time
    // on its own.
    Epilogue<T, X, O, Gate> pending;

    const PanelType<T>* address(int64_t panel, int64_t step) const {
        return (const PanelType<T>*)((const char*)op.p[1] + panel * panel_bytes<T>(a.k)) + step * K_STEP<T> * PANEL;
    }

    void run() {
        for (int64_t first = panels.begin; first < panels.end; first += cut.together) {
            const Range group{first, std::min(first + cut.together, panels.end)};
            for (int64_t piece = 0; piece < cut.pieces; piece++) run_piece(group, piece);
        }
        pending.finish();
    }

    // Three of them in one function would be more than the compiler inlines: the others took 3% longer.
    [[gnu::noinline]] void run_apart() { run(); }

    // A piece of K of some panels, with all rows.
    void run_piece(Range group, int64_t piece) {
        const Range of_k = part(steps, piece, cut.pieces);
        const bool more = piece + 1 < cut.pieces;
        const int64_t next_panel = more ? group.begin : group.end, next_step = more ? of_k.end : 0;
        // Of one or two passes the first fetches their panel, a little ahead. More fetch what comes next, each of them a
        // part, in fours: most micro-kernels fetch four times in a step.
        constexpr int ALL = 2 * STEP_ROWS;
        const int part_lines = passes <= 2 ? ALL : (ALL / 4 + passes - 1) / passes * 4;
        int fetched = 0;  // lines of each step
        for (int64_t row = rows.begin; row < rows.end;) {
            const int count = Micro<T>::rows(std::min<int64_t>(rows.end - row, 1 << 20));
            const int lines = std::min(part_lines, ALL - fetched);
            for (int64_t place = 0; place < group.end - group.begin; place++) {
                const int64_t panel = group.begin + place;
                const char* at = passes <= 2 ? (const char*)address(panel, of_k.begin) + AHEAD_BYTES
                                             : (const char*)address(next_panel + place, next_step) +
                                                   fetched * 64 * (of_k.end - of_k.begin);
                run_block(row, count, panel, place, of_k, {at, lines});
            }
            fetched += lines;
            row += count;
        }
    }

    void run_block(int64_t row, int count, int64_t panel, int64_t place, Range of_k, Ahead ahead) {
        const bool last = of_k.end == steps;
        const int64_t k_begin = of_k.begin * K_STEP<T>, k_end = last ? a.k : of_k.end * K_STEP<T>;
        const T* x = (const T*)op.p[0] + row * a.x_stride + k_begin;
        // Sums that wait for more pieces, or one of two places that take turns.
        AccType<T>* c = sums + (place * num_rows + row - rows.begin) * PANEL;
        if (cut.pieces == 1) c = pending.reads(sums) ? sums + Micro<T>::ROWS * PANEL : sums;
        panel_gemm<T>(x, a.x_stride, count, address(panel, of_k.begin), k_end - k_begin, c, PANEL, of_k.begin > 0, ahead,
                      passes == 2 ? Hot::PANEL : Hot::ROWS, pending);
        pending.finish();
        if (last) pending = Epilogue<T, X, O, Gate>(op, a, panel, c, row, count);
    }
};

template <class T, class X, class O>
void run_chunk(const fs_op& op, int64_t num_rows, int64_t chunk, int64_t num_chunks, Scratch& scratch) {
    const LinearArguments& a = linear_arguments(op);
    const Cut<T> cut(a, num_rows);
    const int64_t groups = num_chunks / cut.row_blocks;
    const Range rows = part(num_rows, chunk / groups, cut.row_blocks);
    const Range panels = part(num_panels(a.n, a.gated), chunk % groups, groups);
    const int64_t waiting = (rows.end - rows.begin) * cut.together;
    const int64_t num_sums = PANEL * (cut.pieces == 1 ? 2 * Micro<T>::ROWS : waiting);
    auto* sums = (AccType<T>*)scratch.get(num_sums * sizeof(AccType<T>));
    if constexpr (std::is_same_v<X, O>) {  // nobody wants a gated output in another type
        if (a.gated && a.activation == GELU) return ChunkRun<T, X, O, Gelu>{op, a, cut, rows, panels, sums}.run_apart();
        if (a.gated) return ChunkRun<T, X, O, SigmoidForm>{op, a, cut, rows, panels, sums}.run();
    }
    ChunkRun<T, X, O, Nothing>{op, a, cut, rows, panels, sums}.run();
}

template <class T, class X>
void run_for_output(const fs_op& op, int64_t rows, int64_t chunk, int64_t num_chunks, Scratch& scratch) {
    if (linear_arguments(op).out_dtype == FS_F32) return run_chunk<T, X, float>(op, rows, chunk, num_chunks, scratch);
    return run_chunk<T, X, X>(op, rows, chunk, num_chunks, scratch);
}

int64_t linear_chunks(const fs_op& op, const Dims& dims, int num_threads) {
    const LinearArguments& a = linear_arguments(op);
    return with_operand_type(op.dtype, a.weight_dtype, [&]<class T>(T) {
        return num_chunks_of<T>(a, dims.rows(op), num_threads);
    });
}

void linear_run(const fs_op& op, const Dims& dims, int64_t chunk, int64_t num_chunks, Scratch& scratch) {
    with_type(op.dtype, [&]<class X>(X) {
        if (linear_arguments(op).weight_dtype == FS_I8)
            run_for_output<uint8_t, X>(op, dims.rows(op), chunk, num_chunks, scratch);
        else
            run_for_output<X, X>(op, dims.rows(op), chunk, num_chunks, scratch);
    });
}

Reads linear_reads(const fs_op& op, const Dims& dims, int64_t num_chunks) {
    const LinearArguments& a = linear_arguments(op);
    return with_operand_type(op.dtype, a.weight_dtype, [&]<class T>(T) {
        const int64_t groups = num_chunks / std::max<int64_t>(1, Cut<T>(a, dims.rows(op)).row_blocks);
        return Reads{(const char*)op.p[1], num_panels(a.n, a.gated), panel_bytes<T>(a.k), groups};
    });
}

}  // namespace

extern const Kernel linear_kernel = {linear_chunks, linear_run, linear_reads};
