// Matrix products with a packed panel: rows [rows, k] times one panel [k, 32] into float32 (int32 for int8).
//
// A panel holds 32 columns of B as [padded_k / K_GROUP][32][K_GROUP]: the K_GROUP values of a column that a dot-product
// instruction multiplies lie together, and 16 rows of it are what two AMX tiles hold. The layout is the same on every
// processor; padding up to padded_k is zero.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

constexpr int PANEL = 32;

// Types of A. uint8_t means: values quantised to int8 and moved by +128, with int8 panels.
template <class T>
constexpr int K_GROUP = std::is_same_v<T, uint8_t> ? 4 : std::is_same_v<T, bf16> ? 2 : 1;
template <class T>
using PanelType = std::conditional_t<std::is_same_v<T, uint8_t>, int8_t, T>;
template <class T>
using AccType = std::conditional_t<std::is_same_v<T, uint8_t>, int32_t, float>;
// Rows of a panel in a step: what one AMX tile has.
constexpr int STEP_ROWS = 16;
template <class T>
constexpr int K_STEP = K_GROUP<T> * STEP_ROWS;
template <class T>
constexpr int64_t padded_k(int64_t k) {
    return (k + K_STEP<T> - 1) / K_STEP<T> * K_STEP<T>;
}
template <class T>
constexpr int64_t panel_bytes(int64_t k) {
    return padded_k<T>(k) * PANEL * sizeof(T);
}

// What to prefetch beside the work: `lines` cache lines per step of K_STEP, one after the other from `at` on.
struct Ahead {
    const char* at = nullptr;
    int lines = 0;
};

// RowWork: what is left to do with the rows of an earlier result, row(r) for r from next to end. A micro-kernel may do some
// of it beside its steps, while its loads and dot products are under way, and moves next.
struct NoRowWork {
    int next = 0, end = 0;
    void row(int) const {}
};

// Which operand the following calls use again: it stays in the first-level cache, and the other streams past it.
enum class Hot { PANEL, ROWS };

// One operand block of a micro-kernel: `rows` <= Micro<T>::ROWS, whole steps.
template <class T>
struct Block {
    const T* a;
    int64_t lda;
    int rows;
    const PanelType<T>* panel;
    int64_t steps;
    AccType<T>* c;
    int64_t ldc;
    bool accumulate;
    Ahead ahead;
    Hot hot;
};

// Micro<T>: ROWS, the most rows of a block; rows(left), how many to take of those that are left; run(block, row work).
#include "gemm_portable.h"

template <class T>
struct Micro : PortableMicro<T> {};

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "gemm_avx512bf16.h"
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#include "gemm_amx.h"
template <>
struct Micro<bf16> : AmxMicro<bf16> {};
template <>
struct Micro<uint8_t> : AmxMicro<uint8_t> {};
#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__)
template <>
struct Micro<bf16> : DotMicro<bf16> {};
template <>
struct Micro<uint8_t> : DotMicro<uint8_t> {};
#endif

// The calling thread may have run code of others (oneDNN), which leaves AMX tiles in another shape.
inline void forget_tiles() {
#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
    configured_rows = 0;
#endif
}

// c[rows, 32] (+)= a[rows, k] · panel. Nothing beyond a's rows and columns is read. c need not be aligned.
// beside: some of it is done, or all, or nothing.
template <class T, class RowWork>
void panel_gemm(const T* a, int64_t lda, int rows, const PanelType<T>* panel, int64_t k, AccType<T>* c, int64_t ldc,
                bool accumulate, Ahead ahead, Hot hot, RowWork& beside) {
    const int64_t steps = k / K_STEP<T>, rest = k % K_STEP<T>;
    for (int r = 0; r < rows;) {
        const int n = Micro<T>::rows(rows - r);
        const T* block = a + r * lda;
        AccType<T>* out = c + r * ldc;
        if (steps) Micro<T>::run({block, lda, n, panel, steps, out, ldc, accumulate, ahead, hot}, beside);
        if (rest) {
            NoRowWork none;
            alignas(64) T tail[Micro<T>::ROWS * K_STEP<T>] = {};
            for (int i = 0; i < n; i++)
                memcpy(tail + i * K_STEP<T>, block + i * lda + steps * K_STEP<T>, rest * sizeof(T));
            const PanelType<T>* last = panel + steps * K_STEP<T> * PANEL;
            Micro<T>::run({tail, K_STEP<T>, n, last, 1, out, ldc, accumulate || steps, {}, hot}, none);
        }
        r += n;
    }
}

template <class T>
void panel_gemm(const T* a, int64_t lda, int rows, const PanelType<T>* panel, int64_t k, AccType<T>* c, int64_t ldc,
                bool accumulate = false) {
    NoRowWork none;
    panel_gemm<T>(a, lda, rows, panel, k, c, ldc, accumulate, {}, Hot::PANEL, none);
}
