// Truncation without a sort: what top-k and top-p keep is {x : weight of all larger than x < limit}, where a token's
// weight is 1 or its probability. The smallest such x is found by bisection over the bits of floats.
#pragma once
#include <algorithm>
#include <cmath>

#include "simd.h"

// Floats in order as integers: -infinity first.
inline int32_t ordered(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits < 0 ? (int32_t)(0x80000000u - (uint32_t)bits) : bits;
}
inline float from_ordered(int32_t order) {
    const int32_t bits = order < 0 ? (int32_t)(0x80000000u - (uint32_t)order) : order;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// The weight of the values above x. n is a multiple of VL; padding has the value -infinity and any weight.
inline float weight_above(const float* values, const float* weights, int64_t n, float x) {
    vf total[2] = {};
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL)
        for (int u = 0; u < 2; u++)
            total[u] += select(load(values + i + u * VL) > splat(x),
                               weights ? load(weights + i + u * VL) : splat(1.0f), vf{});
    for (; i < n; i += VL) total[0] += select(load(values + i) > splat(x), weights ? load(weights + i) : splat(1.0f), vf{});
    return sum(total[0] + total[1]);
}

// The smallest float x such that weight_above(x) < limit, in [low, high]; high satisfies it.
inline float smallest_kept(const float* values, const float* weights, int64_t n, float limit, float low, float high) {
    int64_t below = (int64_t)ordered(low) - 1, kept = ordered(high);
    while (kept - below > 1) {
        const int64_t middle = below + (kept - below) / 2;
        if (weight_above(values, weights, n, from_ordered((int32_t)middle)) < limit)
            kept = middle;
        else
            below = middle;
    }
    return from_ordered((int32_t)kept);
}
