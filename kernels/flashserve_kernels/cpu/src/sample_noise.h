// noise.py's counter-based noise: equal bits, and the Gumbel noise made of them.
#pragma once
#include <cmath>

#include "simd.h"

// The 64 bits of a (seed, position).
inline uint64_t noise_key(int64_t seed, int64_t position) {
    constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;
    const auto mix = [](uint64_t x) {
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
        x = (x ^ x >> 27) * 0x94D049BB133111EB;
        return x ^ x >> 31;
    };
    return mix(mix((uint64_t)seed + GOLDEN) ^ ((uint64_t)position + 1) * GOLDEN);
}

FS_INLINE vu mix32(vu x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

FS_INLINE vu noise_bits(uint64_t key, vu tokens) {
    const vu x = (tokens * 0x9E3779B9u) ^ (uint32_t)key;
    return mix32(mix32(x) ^ (uint32_t)(key >> 32));
}

// Natural logarithm of x >= 2^-126, relative error of a few 1e-7 (Cephes' logf).
FS_INLINE vf vlog(vf x) {
    const vi bits = as_i(x) - 0x3f3504f3;  // mantissa in [sqrt(1/2), sqrt(2))
    const vf exponent = __builtin_convertvector(bits >> 23, vf);
    const vf f = as_f((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    vf p = splat(7.0376836292e-2f);
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const vf square = f * f;
    vf rest = f * square * p - 2.12194440e-4f * exponent - 0.5f * square;
    return f + rest + 0.693359375f * exponent;
}

// Larger than any noise: -log(-log1p(-2^-32)) = 22.18.
constexpr float MOST_NOISE = 22.2f;

// -log(-log1p(-u)), within 2e-6 of the exact value of u; -infinity for u = 1, as there.
FS_INLINE vf gumbel_noise(uint64_t key, vu tokens) {
    const vi bits = (vi)(noise_bits(key, tokens) >> 1);
    const vf u = __builtin_convertvector(bits, vf) * 0x1p-31f + 0x1p-32f;
    // log1p(-u) = log(w) * -u / (w - 1) for the rounded w = 1 - u (Kahan), which is exact where u is small.
    const vf w = 1.0f - u, difference = 1.0f - w;
    const vf quotient = select(difference > vf{}, u / select(difference > vf{}, difference, splat(1.0f)), splat(1.0f));
    const vf minus_log1p = select(difference > vf{}, -vlog(vmax(w, splat(1e-30f))) * quotient, u);
    return select(u < splat(1.0f), -vlog(minus_log1p), splat(-INFINITY));
}
