// Micro-kernels of AMX: 32 rows by 32 columns in four accumulator tiles. Included by gemm.h.
#pragma once
#include <immintrin.h>

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
};

// The rows that the calling thread's tiles have; the operating system keeps tiles per thread. Every block asks: with the
// usual model of a shared library that is a call, with this one it takes 4 bytes of glibc's reserve.
[[gnu::tls_model("initial-exec")]] inline thread_local int configured_rows = 0;

// Tiles 0-3 accumulate (upper rows: 0, 1; lower: 2, 3), 4 and 5 hold rows of A, 6 and 7 the panel's two halves.
inline void configure_tiles(int rows) {
    if (configured_rows == rows) return;
    const uint8_t upper = rows < 16 ? rows : 16, lower = rows - upper;
    TileConfig config;
    const uint8_t tile_rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int t = 0; t < 8; t++) {
        config.rows[t] = tile_rows[t];
        config.bytes_per_row[t] = tile_rows[t] ? 64 : 0;
    }
    _tile_loadconfig(&config);
    configured_rows = rows;
}

// A load that is not hot leaves the first-level cache to the other operand: 2.6 instead of 2.1 TFLOP/s with 512 rows in
// the second-level cache, K = 576.
#define FS_TILE_LOAD(HOT, TILE, AT, STRIDE)       \
    do {                                          \
        if constexpr (HOT)                        \
            _tile_loadd(TILE, AT, STRIDE);        \
        else                                      \
            _tile_stream_loadd(TILE, AT, STRIDE); \
    } while (0)
#define FS_TILE_DOT(C, A, B)                      \
    do {                                          \
        if constexpr (std::is_same_v<T, bf16>)    \
            _tile_dpbf16ps(C, A, B);              \
        else                                      \
            _tile_dpbusd(C, A, B);                \
    } while (0)

template <class T>
struct AmxMicro {
    static constexpr int ROWS = 32;
    static int rows(int left) { return left < ROWS ? left : ROWS; }
    template <class RowWork>
    static void run(const Block<T>& block, RowWork& beside) {
        configure_tiles(block.rows);
        const bool lower = block.rows > 16;
        if (block.hot == Hot::PANEL)
            lower ? tiles<true, true>(block, beside) : tiles<false, true>(block, beside);
        else
            lower ? tiles<true, false>(block, beside) : tiles<false, false>(block, beside);
    }

   private:
    template <bool LOWER, bool PANEL_HOT, class RowWork>
    static void tiles(const Block<T>& block, RowWork& beside) {
        const int64_t a_stride = block.lda * sizeof(T), c_stride = block.ldc * 4;
        auto* c = block.c;
        auto* c_lower = c + 16 * block.ldc;
        if (block.accumulate) {
            _tile_loadd(0, c, c_stride);
            _tile_loadd(1, c + 16, c_stride);
            if (LOWER) {
                _tile_loadd(2, c_lower, c_stride);
                _tile_loadd(3, c_lower + 16, c_stride);
            }
        } else {
            _tile_zero(0);
            _tile_zero(1);
            if (LOWER) {
                _tile_zero(2);
                _tile_zero(3);
            }
        }
        const T* a = block.a;
        const T* a_lower = a + 16 * block.lda;
        const char* panel = (const char*)block.panel;
        const char* ahead = block.ahead.at;
        const int lines = block.ahead.lines;
        const RowWork work = beside;  // a copy that stores cannot alias, so that it stays in registers
        constexpr int PER_STEP = LOWER ? 2 : 1;
        int next = work.next;
        for (int64_t s = 0; s < block.steps; s++, panel += 2048, a += K_STEP<T>, a_lower += K_STEP<T>) {
            FS_TILE_LOAD(PANEL_HOT, 6, panel, 128);
            FS_TILE_LOAD(!PANEL_HOT, 4, a, a_stride);
            for (int l = 0; l < lines; l++, ahead += 64) prefetch_l2(ahead);
            FS_TILE_LOAD(PANEL_HOT, 7, panel + 64, 128);
            FS_TILE_DOT(0, 4, 6);
            if (LOWER) FS_TILE_LOAD(!PANEL_HOT, 5, a_lower, a_stride);
            FS_TILE_DOT(1, 4, 7);
            if (LOWER) {
                FS_TILE_DOT(2, 5, 6);
                FS_TILE_DOT(3, 5, 7);
            }
            // A fixed number: with a loop over some rows a decode of 16 took 4% longer.
            if (next + PER_STEP <= work.end)
                for (int r = 0; r < PER_STEP; r++) work.row(next++);
        }
        beside.next = next;
        _tile_stored(0, c, c_stride);
        _tile_stored(1, c + 16, c_stride);
        if (LOWER) {
            _tile_stored(2, c_lower, c_stride);
            _tile_stored(3, c_lower + 16, c_stride);
        }
    }
};
#undef FS_TILE_DOT
#undef FS_TILE_LOAD
