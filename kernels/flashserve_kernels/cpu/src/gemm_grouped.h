// Micro-kernels of weights in groups: int8 rows times a panel of codes, sums of a group in int32, of the groups in float32.
#pragma once
#include <array>
#include <utility>

#include "gemm.h"
#include "grouped.h"

// Sums of four products each of unsigned codes and signed bytes. Partial<BITS> is what a group's sums gather in.
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
template <int BITS>
struct Partial {
    vi sum{};
    FS_INLINE void add_to(Partial& p, vi codes, vi x) { dot(p.sum, (__m512i)codes, (__m512i)x); }
    FS_INLINE vi total(const Partial& p) { return p.sum; }
};
#elif defined(__AVX512BW__) || defined(__AVX2__)
#if defined(__AVX512BW__)
FS_INLINE vi dot_bytes(vi u, vi s) { return (vi)_mm512_maddubs_epi16((__m512i)u, (__m512i)s); }
FS_INLINE vi add_halves(vi a, vi b) { return (vi)_mm512_add_epi16((__m512i)a, (__m512i)b); }
#else
FS_INLINE vi dot_bytes(vi u, vi s) { return (vi)_mm256_maddubs_epi16((__m256i)u, (__m256i)s); }
FS_INLINE vi add_halves(vi a, vi b) { return (vi)_mm256_add_epi16((__m256i)a, (__m256i)b); }
#endif
// Two products of a code of 4 bits are at most 2 * 15 * 127, so those of a group of 32, eight such pairs, fit 16 bits:
// 30480. Of 8 bits already the first two would not, so such a code is two of 4 bits.
template <int BITS>
struct Partial;
template <>
struct Partial<4> {
    vi halves{};
    FS_INLINE void add_to(Partial& p, vi codes, vi x) { p.halves = add_halves(p.halves, dot_bytes(codes, x)); }
    FS_INLINE vi total(const Partial& p) { return dot_halves(p.halves, splat_i(0x00010001)); }
};
template <>
struct Partial<8> {
    Partial<4> lower, upper;
    FS_INLINE void add_to(Partial& p, vi codes, vi x) {
        Partial<4>::add_to(p.lower, codes & splat_i(0x0f0f0f0f), x);
        Partial<4>::add_to(p.upper, (codes >> 4) & splat_i(0x0f0f0f0f), x);
    }
    FS_INLINE vi total(const Partial& p) { return Partial<4>::total(p.lower) + (Partial<4>::total(p.upper) << 4); }
};
#else
template <int BITS>
struct Partial {
    vi sum{};
    typedef int16_t vs __attribute__((vector_size(VL * 4)));
    FS_INLINE void add_to(Partial& p, vi codes, vi x) {
        const vs bytes = (vs)x;
        p.sum += dot_halves(codes & splat_i(0x00ff00ff), (vi)((bytes << 8) >> 8)) +
                 dot_halves((codes >> 8) & splat_i(0x00ff00ff), (vi)(bytes >> 8));
    }
    FS_INLINE vi total(const Partial& p) { return p.sum; }
};
#endif

// What a block of rows is multiplied with.
struct GroupedBlock {
    const char* rows;  // GroupedRow's
    int64_t row_bytes;
    int count;
    const char* panel;
    GroupedFormat format;
    int64_t groups;
    float* c;  // [count][32]
    bool fetch;  // whether the panel comes from memory
};

struct GroupedMicro {
#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
    static constexpr int ROWS = 6;
#else
    static constexpr int ROWS = 4;
#endif
    static int rows(int64_t left) {  // equal parts
        const int64_t parts = (left + ROWS - 1) / ROWS;
        return (left + parts - 1) / parts;
    }

    static void run(const GroupedBlock& block) {
        if (block.format.bits == 4)
            run_tile<4>(block);
        else
            run_tile<8>(block);
    }

   private:
    static constexpr int ALL = PANEL / VL;
    // Vectors of columns at a time: where more of them would not fit the registers, the panel's lines are read again.
    template <int BITS, int R>
    static constexpr int WIDTH = VL == 16 || BITS == 4 || R == 1 ? 2 : 1;

    template <int BITS>
    static void run_tile(const GroupedBlock& block) {
        static constexpr auto table = []<int... N>(std::integer_sequence<int, N...>) {
            return std::array<void (*)(const GroupedBlock&), ROWS>{tile<BITS, N + 1>...};
        }(std::make_integer_sequence<int, ROWS>());
        table[block.count - 1](block);
    }

    // How far ahead of the work the panel is fetched.
    static constexpr int64_t AHEAD_BYTES = 4096;

    template <int BITS, int R>
    static void tile(const GroupedBlock& block) {
        const GroupedFormat& format = block.format;
        const int64_t block_bytes = format.block_bytes();
        vf sums[R][ALL] = {};
        for (int64_t g = 0; g < block.groups; g++) {
            const char* at = block.panel + g * block_bytes;
            if (block.fetch)
                for (int64_t line = 0; line < block_bytes; line += 64) prefetch_l2(at + AHEAD_BYTES + line);
#pragma GCC unroll 8
            for (int v = 0; v < ALL; v += WIDTH<BITS, R>) columns<BITS, R>(block, g, at, v, sums);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
            for (int v = 0; v < ALL; v++) store(block.c + r * PANEL + v * VL, sums[r][v]);
        }
    }

    // One group of some columns.
    template <int BITS, int R>
    FS_INLINE void columns(const GroupedBlock& block, int64_t g, const char* at, int first, vf (&sums)[R][ALL]) {
        constexpr int W = WIDTH<BITS, R>;
        const GroupedFormat& format = block.format;
        const GroupedRow row(block.rows, format.group, block.groups);
        const char* x = (const char*)(row.values + g * format.group);
        const char* codes = at + first * VL * 4;
        Partial<BITS> partial[R][W];
        for (int64_t pair = format.group / 8; pair; pair--, x += 8, codes += PANEL * BITS) {
#pragma GCC unroll 2
            for (int q = 0; q < 2; q++) {
                vi quads[W];
#pragma GCC unroll 4
                for (int w = 0; w < W; w++) quads[w] = quad<BITS>(codes + w * VL * 4, q);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const vi four = splat_i(load_as<int32_t>(x + r * block.row_bytes + 4 * q));
#pragma GCC unroll 4
                    for (int w = 0; w < W; w++) Partial<BITS>::add_to(partial[r][w], quads[w], four);
                }
            }
        }
        const char* scale_at = at + format.code_bytes();
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) {
            const int column = (first + w) * VL;
            const vf scale = load_scales(format.scales, scale_at, column);
            const vf minimum = format.zero < 0 ? load_scales(format.scales, scale_at + format.scale_bytes(), column)
                                               : scale * (float)-format.zero;
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const float* scales = (const float*)((const char*)row.scales + r * block.row_bytes);
                const float* of_sums = (const float*)((const char*)row.sums + r * block.row_bytes);
                const vf total = __builtin_convertvector(Partial<BITS>::total(partial[r][w]), vf);
                sums[r][first + w] += total * scale * scales[g] + minimum * of_sums[g];
            }
        }
    }

    // Four codes of each column as bytes; q: which of a pair of quads.
    template <int BITS>
    FS_INLINE vi quad(const char* codes, int q) {
        if constexpr (BITS == 8) return load_as<vi>(codes + q * PANEL * 4);
        const vi both = load_as<vi>(codes);
        return (q ? both >> 4 : both) & splat_i(0x0f0f0f0f);
    }
};
