// A weight in groups in memory: panels of 32 columns (outputs), each of them its groups of K one after the other; a group is
// its codes, the 32 scales, and, where the format has no zero, the 32 minimums. What a step reads lies in one stream.
//
// Codes are [group / 4][32][4], as in the other panels. Of 4 bits, one byte holds those of two such quads: [group / 8][32][4],
// the first in the lower half.
#pragma once
#include "packed.h"
#include "simd.h"

enum fs_scales : int64_t { FS_SCALES_F16 = 0, FS_SCALES_F24, FS_SCALES_F32 };

struct GroupedFormat {
    int64_t bits;    // of a code: 4 or 8
    int64_t group;   // inputs that share a scale: 16 or 32
    int64_t scales;  // fs_scales
    int64_t zero;    // minimums are -zero * scale; -1: they are kept

    int64_t code_bytes() const { return group * PANEL * bits / 8; }
    int64_t scale_bytes() const { return PANEL * (scales == FS_SCALES_F16 ? 2 : scales == FS_SCALES_F24 ? 3 : 4); }
    int64_t block_bytes() const { return code_bytes() + scale_bytes() * (zero < 0 ? 2 : 1); }
    int64_t groups(int64_t k) const { return (k + group - 1) / group; }
    int64_t panel_bytes(int64_t k) const { return groups(k) * block_bytes(); }
};

// A float24 is a sign, 6 bits of exponent and 17 of fraction: a float32 times 2^-100, without the two bits of its exponent
// that are 0 then, and without its last 6. The 32 of a group are their upper 16 bits each, then their lower 8.
constexpr float F24_UNIT = 0x1p-100f;

inline uint32_t float24(float value) {
    const uint32_t bits = load_as<uint32_t>(&(const float&)(value * F24_UNIT));
    return (bits >> 8 & 0x800000) | (bits >> 6 & 0x7fffff);
}

// VL of a group's 32 numbers, from number `first` on.
FS_INLINE vf load_scales(int64_t scales, const char* at, int first) {
    if (scales == FS_SCALES_F16) return load((const f16*)at + first);
    if (scales == FS_SCALES_F32) return load((const float*)at + first);
    const vu upper = __builtin_convertvector(load_as<vh>(at + 2 * first), vu);
    const vu lower = __builtin_convertvector((vub)load_as<vb>(at + 2 * PANEL + first), vu);
    return as_f((vi)(upper << 16 | lower << 8) >> 2 & 0x9fffffff) * (1 / F24_UNIT);
}

// A row of activations in int8: padded columns, then a scale for each group, then scale * sum of the group's integers.
struct GroupedRow {
    const int8_t* values;
    const float* scales;
    const float* sums;

    GroupedRow(const void* row, int64_t group, int64_t groups)
        : values((const int8_t*)row), scales((const float*)(values + group * groups)), sums(scales + groups) {}
};
