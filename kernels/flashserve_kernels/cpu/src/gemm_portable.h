// Micro-kernels in the compiler's vector extension. Included by gemm.h.
#pragma once
#include <array>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A row of a panel, VL columns of it, times the same row's values of A.
template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    using V = vf;
    struct B {
        vf value;
    };
    FS_INLINE B panel(const float* p) { return {load(p)}; }
    FS_INLINE B row(const float* a) { return {splat(*a)}; }
    FS_INLINE V dot(V acc, B a, B b) { return acc + a.value * b.value; }
};

template <>
struct Lanes<f16> {
    using V = vf;
    using B = Lanes<float>::B;
    FS_INLINE B panel(const f16* p) { return {load(p)}; }
    FS_INLINE B row(const f16* a) { return {splat(to_f32(*a))}; }
    FS_INLINE V dot(V acc, B a, B b) { return acc + a.value * b.value; }
};

template <>
struct Lanes<bf16> {  // the two values of a group are the halves of 32 bits; the upper one needs no shift to be a float
    using V = vf;
    struct B {
        vf low, high;
    };
    FS_INLINE B split(vi pairs) { return {as_f(pairs << 16), as_f(pairs & splat_i(0xffff0000))}; }
    FS_INLINE B panel(const bf16* p) { return split(load_as<vi>(p)); }
    FS_INLINE B row(const bf16* a) { return split(splat_i(load_as<int32_t>(a))); }
    FS_INLINE V dot(V acc, B a, B b) { return acc + a.low * b.low + a.high * b.high; }
};

// Sums of two products of 16-bit halves.
FS_INLINE vi dot_halves(vi a, vi b) {
#if defined(__AVX512BW__)
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#elif defined(__AVX2__)
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
    return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

template <>
struct Lanes<uint8_t> {  // four bytes as two vectors of two 16-bit values each
    using V = vi;
    struct B {
        vi even, odd;
    };
    typedef int16_t vs __attribute__((vector_size(VL * 4)));
    FS_INLINE B panel(const int8_t* p) {
        const vs bytes = load_as<vs>(p);
        return {(vi)((bytes << 8) >> 8), (vi)(bytes >> 8)};
    }
    FS_INLINE B row(const uint8_t* a) {
        const uint32_t bytes = load_as<uint32_t>(a);
        return {splat_i(bytes & 0x00ff00ff), splat_i((bytes >> 8) & 0x00ff00ff)};
    }
    FS_INLINE V dot(V acc, B a, B b) { return acc + dot_halves(a.even, b.even) + dot_halves(a.odd, b.odd); }
};

// Values of K whose products are summed before the sum joins the others: near sqrt(K) the error is smallest.
constexpr int64_t SUMMED_AT_ONCE = 64;

template <class T>
struct PortableMicro {
    static constexpr int ALL = PANEL / VL;
#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
    static constexpr int ROWS = 10;
#else
    static constexpr int ROWS = 4;
#endif
    static int rows(int left) {
        const int parts = (left + ROWS - 1) / ROWS;
        return (left + parts - 1) / parts;
    }
    template <class RowWork>
    static void run(const Block<T>& block, RowWork&) {
        static constexpr auto table = []<int... N>(std::integer_sequence<int, N...>) {
            return std::array<void (*)(const Block<T>&), ROWS>{columns<N + 1>...};
        }(std::make_integer_sequence<int, ROWS>());
        table[block.rows - 1](block);
    }

   private:
    using V = typename Lanes<T>::V;

    // One or two rows take the panel in one pass, as it may come from memory; more rows go over parts of two vectors.
    template <int R>
    static void columns(const Block<T>& block) {
        constexpr int WIDTH = R == 1 ? ALL : 2;
        Ahead ahead = block.ahead;
        for (int v = 0; v < ALL; v += WIDTH, ahead.lines = 0) tile<R, WIDTH>(block, v * VL, ahead);
    }

    // Of K additions one after the other the error grows with K. In pieces of P it was 0.3 times as large at K = 1000 and 0.2
    // at 4000, for the same time (SSE: 4% more). Pieces begin at multiples of P, so a row's sum does not depend on other rows.
    static constexpr int64_t PIECE_STEPS = std::is_same_v<V, vf> ? SUMMED_AT_ONCE / K_STEP<T> : INT64_MAX;

    template <int R, int WIDTH>
    static void tile(const Block<T>& block, int column, Ahead ahead) {
        const T* a = block.a;
        const PanelType<T>* panel = block.panel + column * K_GROUP<T>;
        bool accumulate = block.accumulate;
        for (int64_t left = block.steps; left; accumulate = true) {
            const int64_t steps = left < PIECE_STEPS ? left : PIECE_STEPS;
            piece<R, WIDTH>(block, a, panel, steps, column, accumulate, ahead);
            left -= steps;
            a += steps * K_STEP<T>;
            panel += steps * K_STEP<T> * PANEL;
        }
    }

    template <int R, int WIDTH>
    FS_INLINE void piece(const Block<T>& block, const T* a, const PanelType<T>* panel, int64_t steps, int column,
                         bool accumulate, Ahead& ahead) {
        V acc[R][WIDTH] = {};
        const int lines = ahead.lines / 4;
        for (int64_t s = 0; s < steps * 4; s++) {
            for (int l = 0; l < lines; l++, ahead.at += 64) prefetch_l2(ahead.at);
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++, panel += PANEL * K_GROUP<T>, a += K_GROUP<T>) {
                typename Lanes<T>::B b[WIDTH];
#pragma GCC unroll 8
                for (int v = 0; v < WIDTH; v++) b[v] = Lanes<T>::panel(panel + v * VL * K_GROUP<T>);
#pragma GCC unroll 10
                for (int r = 0; r < R; r++) {
                    const auto x = Lanes<T>::row(a + r * block.lda);
#pragma GCC unroll 8
                    for (int v = 0; v < WIDTH; v++) acc[r][v] = Lanes<T>::dot(acc[r][v], x, b[v]);
                }
            }
        }
        for (int r = 0; r < R; r++) {
            for (int v = 0; v < WIDTH; v++) {
                auto* c = block.c + r * block.ldc + column + v * VL;
                store_as(c, accumulate ? load_as<V>(c) + acc[r][v] : acc[r][v]);
            }
        }
    }
};
