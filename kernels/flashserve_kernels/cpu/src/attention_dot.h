// How a vector of sums takes a pair of rows of the cache's layout (rope_cache.h): acc[lane] += row0[lane] * c0 + row1[lane] *
// c1. Scores (rows: the head's dimensions, lanes: keys) and outputs (rows: keys, lanes: dimensions) are both such sums.
//
// Elem: what the cache holds. Coef: the other factor's type. E: elements of a lane side by side. ACCUMULATORS: vectors that
// are summed at a time. HEADS: the most query heads that share a pass over the keys. `width`: lanes in a row.
#pragma once
#include <type_traits>

#include "rope_cache.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Any element type in float32 arithmetic; T is the model's dtype.
template <class T>
struct DotFloat {
    using Elem = T;
    using Coef = float;
    using Acc = vf;
    static constexpr int E = std::is_same_v<T, float> ? 1 : 2;
    static constexpr bool SCALED = std::is_same_v<T, int8_t>;
    static constexpr int ACCUMULATORS = VL == 16 ? 16 : 8;
    static constexpr int HEADS = 4;

    FS_INLINE void rows(const T* p, int64_t width, vf& row0, vf& row1) {
        if constexpr (E == 1) {
            row0 = load(p);
            row1 = load(p + width);
        } else if constexpr (std::is_same_v<T, bf16>) {
            const vu pair = load_as<vu>(p);
            row0 = (vf)(pair << 16);
            row1 = (vf)(pair & 0xffff0000u);
        } else if constexpr (std::is_same_v<T, f16>) {
            const vu pair = load_as<vu>(p);
            row0 = __builtin_convertvector((vf16)__builtin_convertvector(pair & 0xffffu, vh), vf);
            row1 = __builtin_convertvector((vf16)__builtin_convertvector(pair >> 16, vh), vf);
        } else {
            const vi pair = (vi)__builtin_convertvector(load_as<vh>(p), vu);
            row0 = __builtin_convertvector((pair << 24) >> 24, vf);
            row1 = __builtin_convertvector((pair << 16) >> 24, vf);
        }
    }
    FS_INLINE void add(Acc& acc, const T* p, int64_t width, const float* c) {
        vf row0, row1;
        rows(p, width, row0, row1);
        acc += row0 * c[0];
        acc += row1 * c[1];
    }
    // Without the second row, which may hold anything.
    FS_INLINE void add_first(Acc& acc, const T* p, int64_t, const float* c) {
        vf row0, row1;
        rows(p, 0, row0, row1);
        acc += row0 * c[0];
    }
    FS_INLINE vf value(Acc acc) { return acc; }
};

#if defined(__AVX512BF16__)
struct DotBf16 {
    using Elem = bf16;
    using Coef = bf16;
    using Acc = vf;
    static constexpr int E = 2;
    static constexpr bool SCALED = false;
    static constexpr int ACCUMULATORS = 16;
    static constexpr int HEADS = 8;

    FS_INLINE void add(Acc& acc, const bf16* p, int64_t, const bf16* c) {
        acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(p),
                                   (__m512bh)_mm512_set1_epi32(load_as<int32_t>(c)));
    }
    FS_INLINE void add_first(Acc& acc, const bf16* p, int64_t, const bf16* c) {
        const __m512i row0 = _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(0xffff));
        acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)row0, (__m512bh)_mm512_set1_epi32(load_as<int32_t>(c)));
    }
    FS_INLINE vf value(Acc acc) { return acc; }
};
#endif

#if defined(__AVX512VNNI__)
// int8 by int16: the other factor keeps 15 bits, and |sum| <= 127 * 32767 * 256 < 2^31.
struct DotInt8 {
    using Elem = int8_t;
    using Coef = int16_t;
    using Acc = vi;
    static constexpr int E = 2;
    static constexpr bool SCALED = true;
    static constexpr int ACCUMULATORS = 16;
    static constexpr int HEADS = 8;

    FS_INLINE void add(Acc& acc, const int8_t* p, int64_t, const int16_t* c) {
        acc = (vi)_mm512_dpwssd_epi32((__m512i)acc, _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)),
                                      _mm512_set1_epi32(load_as<int32_t>(c)));
    }
    FS_INLINE void add_first(Acc& acc, const int8_t* p, int64_t width, const int16_t* c) { add(acc, p, width, c); }
    FS_INLINE vf value(Acc acc) { return __builtin_convertvector(acc, vf); }
};
#endif

// Coefficients of float32 numbers. Returns what a sum over them must be multiplied with.
FS_INLINE float to_coefs(const float* x, float* out, int64_t n) {
    memcpy(out, x, n * sizeof(float));
    return 1.0f;
}
FS_INLINE float to_coefs(const float* x, bf16* out, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) store(out + i, load(x + i));
    return 1.0f;
}
FS_INLINE float to_coefs(const float* x, int16_t* out, int64_t n) {
    vf most = {};
    for (int64_t i = 0; i < n; i += VL) most = vmax(most, vmax(load(x + i), -load(x + i)));
    const float scale = largest(most) / 32767.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    const vf round = splat(12582912.0f);  // 1.5 * 2^23
    for (int64_t i = 0; i < n; i += VL) {
        const vi rounded = as_i(load(x + i) * inverse + round) - as_i(round);
        store_as(out + i, __builtin_convertvector(rounded, vh));
    }
    return scale;
}
