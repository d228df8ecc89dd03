// Vectors of float in the compiler's portable extension: AVX-512, AVX2, SSE2 and NEON from one source.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

// Wider vectors than the machine's would live in memory (gcc 12), so the length follows the instruction set.
typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef int8_t vb __attribute__((vector_size(VL)));
typedef uint8_t vub __attribute__((vector_size(VL)));
typedef _Float16 vf16 __attribute__((vector_size(VL * 2)));

struct bf16 {
    uint16_t bits;
};
typedef _Float16 f16;

#define FS_INLINE static inline __attribute__((always_inline))

template <class V>
FS_INLINE V load_as(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
FS_INLINE void store_as(void* p, V v) {
    memcpy(p, &v, sizeof v);
}

FS_INLINE vf splat(float x) { return x - vf{}; }
FS_INLINE vi splat_i(int32_t x) { return x - vi{}; }
FS_INLINE vf as_f(vi x) { return (vf)x; }
FS_INLINE vi as_i(vf x) { return (vi)x; }
FS_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }  // mask lanes are 0 or -1
// a > b ? a : b, so b if either is NaN. gcc 12 makes two instructions of a select.
#if defined(__AVX512F__)
FS_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
FS_INLINE vf vmin(vf a, vf b) { return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif defined(__AVX__)
FS_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
FS_INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
FS_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
FS_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
#endif

// --- one float -----------------------------------------------------------------------------------------------
FS_INLINE float to_f32(float x) { return x; }
FS_INLINE float to_f32(bf16 x) {
    uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
FS_INLINE float to_f32(f16 x) { return (float)x; }
template <class T>
inline T from_f32(float x);
template <>
inline __attribute__((always_inline)) float from_f32<float>(float x) { return x; }
template <>
inline __attribute__((always_inline)) bf16 from_f32<bf16>(float x) {  // round to nearest even; NaN stays NaN
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return bf16{(uint16_t)((u >> 16) | 0x40)};
    return bf16{(uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
inline __attribute__((always_inline)) f16 from_f32<f16>(float x) { return (f16)x; }

// --- VL elements, any alignment ------------------------------------------------------------------------------
FS_INLINE vf load(const float* p) { return load_as<vf>(p); }
FS_INLINE vf load(const bf16* p) { return as_f((vi)(__builtin_convertvector(load_as<vh>(p), vu) << 16)); }
// gcc 12 converts vectors of halves one by one, which makes a product five times slower.
#if defined(__AVX512F__)
FS_INLINE vf load(const f16* p) { return (vf)_mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(p)); }
FS_INLINE void store(f16* p, vf v) { store_as(p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__F16C__)
FS_INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(load_as<__m128i>(p)); }
FS_INLINE void store(f16* p, vf v) { store_as(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
FS_INLINE vf load(const f16* p) { return __builtin_convertvector(load_as<vf16>(p), vf); }
FS_INLINE void store(f16* p, vf v) { store_as(p, __builtin_convertvector(v, vf16)); }
#endif
FS_INLINE void store(float* p, vf v) { store_as(p, v); }
FS_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    store_as(p, (vh)__builtin_ia32_cvtneps2bf16_v16sf(v));
#else
    vu u = (vu)v;
    vu rounded = u + 0x7fff + ((u >> 16) & 1);
    vu quiet = u | 0x400000;  // NaN: adding could turn it into infinity
    vu bits = ((u & 0x7fffffff) > 0x7f800000) ? quiet : rounded;
    store_as(p, __builtin_convertvector(bits >> 16, vh));
#endif
}

// Two vectors, one behind the other.
template <class T>
FS_INLINE void store_pair(T* p, vf first, vf second) {
    store(p, first);
    store(p + VL, second);
}
#if defined(__AVX512BF16__) && defined(__AVX512F__)
FS_INLINE void store_pair(bf16* p, vf first, vf second) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
#endif

// The first n < VL elements; the others read as 0 and are not written.
#if defined(__AVX512F__)
FS_INLINE __mmask16 first_lanes(int n) { return (1u << n) - 1; }
FS_INLINE vf load_n(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps(first_lanes(n), p); }
FS_INLINE vf load_n(const bf16* p, int n) {
    const __m256i v = _mm256_maskz_loadu_epi16(first_lanes(n), p);
    return load((const bf16*)&v);
}
FS_INLINE vf load_n(const f16* p, int n) {
    return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(first_lanes(n), p));
}
FS_INLINE void store_n(float* p, vf v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v); }
template <class T>
FS_INLINE void store_n(T* p, vf v, int n) {
    static_assert(sizeof(T) == 2);
    alignas(32) T part[VL];
    store(part, v);
    _mm256_mask_storeu_epi16(p, first_lanes(n), load_as<__m256i>(part));
}
#else
template <class T>
FS_INLINE vf load_n(const T* p, int n) {
    T part[VL] = {};
    memcpy(part, p, n * sizeof(T));
    return load(part);
}
template <class T>
FS_INLINE void store_n(T* p, vf v, int n) {
    T part[VL];
    store(part, v);
    memcpy(p, part, n * sizeof(T));
}
#endif

#if defined(__AVX512F__)
// The maskz forms: gcc 12 warns of its own header in the others.
FS_INLINE vf swap_halves(vf v) { return (vf)_mm512_maskz_shuffle_f64x2(0xff, (__m512d)v, (__m512d)v, 0x4e); }
FS_INLINE vf swap_quarters(vf v) { return (vf)_mm512_maskz_shuffle_f64x2(0xff, (__m512d)v, (__m512d)v, 0xb1); }
FS_INLINE vf swap_pairs(vf v) { return (vf)_mm512_maskz_permute_ps(0xffff, (__m512)v, 0x4e); }
FS_INLINE float sum(vf v) {
    v += swap_halves(v);
    v += swap_quarters(v);
    v += swap_pairs(v);
    return v[0] + v[1];
}
FS_INLINE float largest(vf v) {
    v = vmax(v, swap_halves(v));
    v = vmax(v, swap_quarters(v));
    v = vmax(v, swap_pairs(v));
    return v[0] > v[1] ? v[0] : v[1];
}
FS_INLINE bool any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
#else
FS_INLINE float sum(vf v) {
    float s = 0;
    for (int l = 0; l < VL; l++) s += v[l];
    return s;
}
FS_INLINE float largest(vf v) {
    float m = v[0];
    for (int l = 1; l < VL; l++) m = m > v[l] ? m : v[l];
    return m;
}
FS_INLINE bool any(vi mask) {
    int32_t lanes = 0;
    for (int l = 0; l < VL; l++) lanes |= mask[l];
    return lanes != 0;
}
#endif

// e^x for x <= 88, relative error below 3e-7; x below -87 gives about 1e-38, never a denormal, and -inf too.
// 2^n * 2^f with f in [-0.5, 0.5]; the polynomial's coefficients are the Taylor series of 2^f in Horner form.
FS_INLINE vf vexp(vf x) {
    x = vmax(x, splat(-87.0f));
    vf t = x * 1.44269504088896f;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    vf shifted = t + magic;
    vf f = t - (shifted - magic);
    vi n = as_i(shifted) << 23;
    vf p = splat(1.535336188e-4f);
    p = p * f + 1.339887440e-3f;
    p = p * f + 9.618437357e-3f;
    p = p * f + 5.550332548e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472028e-1f;
    p = p * f + 1.0f;
    return as_f(as_i(p) + n);
}

FS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
FS_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
