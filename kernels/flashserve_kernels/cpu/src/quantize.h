// Numbers to bytes by a scale.
#pragma once
#include "simd.h"

// Largest magnitude; NaN if there is one, or an infinity, so that it reaches the results.
template <class T>
float magnitude(const T* x, int64_t n) {
    vf most{}, poison{};
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        const vf v = load(x + i);
        most = vmax(most, vmax(v, -v));
        poison += v * 0.0f;
    }
    if (i < n) {
        const vf v = load_n(x + i, n - i);
        most = vmax(most, vmax(v, -v));
        poison += v * 0.0f;
    }
    return largest(most) + sum(poison);
}

// To the nearest, halves to even. Adding 1.5 * 2^23 would do, but fused with the product before it, it rounds other
// halves than where there is no fused instruction.
FS_INLINE vi round_to_int(vf v) {
#if defined(__AVX512F__)
    return (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)v);
#elif defined(__AVX__)
    return (vi)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
    return (vi)_mm_cvtps_epi32((__m128)v);
#else
    vi rounded;
    for (int l = 0; l < VL; l++) rounded[l] = (int32_t)__builtin_nearbyintf(v[l]);
    return rounded;
#endif
}

// out = round(x / scale) + shift for n values, to the nearest, halves to even; shift then padding zeros.
template <class T, class O>
void quantize_row(const T* x, int64_t n, int64_t padded, float inverse, int shift, O* out) {
    auto quantized = [&](vf v) { return __builtin_convertvector(round_to_int(v * inverse) + shift, vb); };
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store_as(out + i, quantized(load(x + i)));
    if (i < n) {
        const vb last = quantized(load_n(x + i, n - i));
        memcpy(out + i, &last, n - i);
    }
    memset(out + n, 0, padded - n);
}

inline float inverse_of(float scale) { return scale > 0 ? 1.0f / scale : 0.0f; }
