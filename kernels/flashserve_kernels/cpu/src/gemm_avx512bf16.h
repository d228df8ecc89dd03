// Micro-kernels of AVX-512-BF16 and VNNI: up to 14 rows by 32 columns in registers. Included by gemm.h.
#pragma once
#include <immintrin.h>

// acc += the dot products of 4 unsigned and 4 signed bytes. gcc 12 spills accumulators around the intrinsic (2.3 times
// slower), so the instruction is spelled out.
FS_INLINE void dot(vi& acc, __m512i a, __m512i b) { asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
FS_INLINE void dot(vf& acc, __m512i a, __m512i b) { acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b); }

template <class T>
struct DotMicro {
    static constexpr int ROWS = 14;  // 28 accumulators, two of the panel, one of A
    static int rows(int left) {      // equal parts: 16 rows are 8 and 8
        const int parts = (left + ROWS - 1) / ROWS;
        return (left + parts - 1) / parts;
    }
    template <class RowWork>
    static void run(const Block<T>& block, RowWork&) {
        static constexpr auto table = []<int... N>(std::integer_sequence<int, N...>) {
            return std::array<void (*)(const Block<T>&), ROWS>{tile<N + 1>...};
        }(std::make_integer_sequence<int, ROWS>());
        table[block.rows - 1](block);
    }

   private:
    using V = typename Lanes<T>::V;

    template <int R>
    static void tile(const Block<T>& block) {
        // A dot product has a latency of 4-6 cycles: few rows take several accumulators each.
        constexpr int UNROLL = R == 1 ? 4 : R <= 3 ? 2 : 1;
        V acc[UNROLL][R][2] = {};
        const T* a = block.a;
        const char* panel = (const char*)block.panel;
        const char* ahead = block.ahead.at;
        const int lines = block.ahead.lines / 4;
        for (int64_t s = 0; s < block.steps * 4; s++) {
            for (int l = 0; l < lines; l++, ahead += 64) prefetch_l2(ahead);
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++, panel += 128, a += K_GROUP<T>) {
                const __m512i left = _mm512_loadu_si512(panel), right = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 14
                for (int r = 0; r < R; r++) {
                    const __m512i x = _mm512_set1_epi32(load_as<int32_t>(a + r * block.lda));
                    dot(acc[q % UNROLL][r][0], x, left);
                    dot(acc[q % UNROLL][r][1], x, right);
                }
            }
        }
#pragma GCC unroll 14
        for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                V sum = acc[0][r][h];
#pragma GCC unroll 4
                for (int u = 1; u < UNROLL; u++) sum += acc[u][r][h];
                auto* c = block.c + r * block.ldc + h * 16;
                if (block.accumulate) sum += load_as<V>(c);
                store_as(c, sum);
            }
        }
    }
};
