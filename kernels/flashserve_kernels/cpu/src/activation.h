// Activations of the feed-forward layers, and the soft cap of scores and logits, in float32.
#pragma once
#include "simd.h"

// Order is known to elementwise.py.
enum Activation : int64_t { SILU = 0, GELU_TANH, GELU, SOFT_CAP };

// 1 / x for positive x below 2^126, relative error below 2^-22. A division of 16 floats occupies AVX-512 for 16 cycles.
FS_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
    const vf r = (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

// SiLU is x σ(x). GELU's tanh form (Hendrycks and Gimpel, 2016) is x σ(2 z), z = sqrt(2 / π) (x + 0.044715 x³), since
// (1 + tanh z) / 2 = σ(2 z). Both are x / (1 + exp(x (linear + cubic x²))), without a branch.
struct SigmoidForm {
    float linear, cubic;

    static SigmoidForm of(int64_t activation) {
        return activation == SILU ? SigmoidForm{-1.0f, 0.0f}
                                  : SigmoidForm{-1.5957691216057308f, -1.5957691216057308f * 0.044715f};
    }
    [[gnu::always_inline]] vf operator()(vf x) const {
        // The cubic comes first: x² alone would overflow, and 0 times infinity is NaN. Above 87 the exponential is cut,
        // where the result is 0 to float32's precision anyway.
        const vf y = x * (x * cubic * x + linear);
        return x * reciprocal(vexp(vmin(y, splat(87.0f))) + 1.0f);
    }
};

// x Φ(x) = max(x, 0) - |x| Φ(-|x|), with Φ(-a) = erfc(a / sqrt 2) / 2 by formula 7.1.26 of Abramowitz and Stegun (1964),
// whose erf is off by less than 1.5e-7.
struct Gelu {
    static Gelu of(int64_t) { return {}; }
    [[gnu::always_inline]] vf operator()(vf x) const {
        const vf a = vmin(splat(100.0f), vmax(x, -x));  // NaN stays
        const vf t = reciprocal(a * (0.3275911f * 0.70710678f) + 1.0f);
        vf p = splat(1.061405429f);
        p = p * t - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = p * t + 0.254829592f;
        return vmax(x, vf{}) - a * (p * t * vexp(a * a * -0.5f) * 0.5f);
    }
};

FS_INLINE vf soft_cap(vf x, float cap) {  // cap * tanh(x / cap)
    const vf twice = vmin(vmax(x * (2.0f / cap), splat(-80.0f)), splat(80.0f));
    return cap - 2.0f * cap / (vexp(twice) + 1.0f);
}
