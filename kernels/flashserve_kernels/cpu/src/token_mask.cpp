// Tokens that a row may not choose. Most words of a grammar's bits are all ones (inside a string) or all zeros (between
// two values), so a row costs little more than to read its bits.
#include <cmath>

#include "elementwise.h"
#include "simd.h"

namespace {

constexpr int BITS = 32;
constexpr int64_t WORDS_PER_CHUNK = 512;

// FS_MASK_LOGITS. p: logits (written), bits (uint32 [rows, words]), rows (int64: which of the logits). i: columns of the
// logits, elements from row to row, words of a row of bits.
int64_t chunks_per_row(const fs_op& op) { return (op.i[0] + WORDS_PER_CHUNK * BITS - 1) / (WORDS_PER_CHUNK * BITS); }

int64_t mask_chunks(const fs_op& op, const Dims& dims, int) { return dims.rows(op) * chunks_per_row(op); }

template <class T>
void mask_word(T* x, uint32_t word, int n) {
    const T ruled_out = from_f32<T>(-INFINITY);
    for (int b = 0; b < n; b++)
        if (!(word >> b & 1)) x[b] = ruled_out;
}

template <class T>
void mask(const fs_op& op, int64_t chunk) {
    const int64_t per_row = chunks_per_row(op), masked = chunk / per_row, columns = op.i[0];
    const uint32_t* bits = (const uint32_t*)op.p[1] + masked * op.i[2];
    T* logits = (T*)op.p[0] + ((const int64_t*)op.p[2])[masked] * op.i[1];
    const int64_t begin = chunk % per_row * WORDS_PER_CHUNK * BITS;
    const int64_t end = std::min(columns, begin + WORDS_PER_CHUNK * BITS);
    for (int64_t c = begin; c < end; c += BITS) {
        const uint32_t word = bits[c / BITS];
        if (word == 0xffffffffu) continue;
        if (word == 0 && c + BITS <= end)
            for (int l = 0; l < BITS; l += VL) store(logits + c + l, splat(-INFINITY));
        else
            mask_word(logits + c, word, (int)std::min<int64_t>(BITS, end - c));
    }
}

void mask_run(const fs_op& op, const Dims&, int64_t chunk, int64_t, Scratch&) {
    if (op.dtype == FS_F32) return mask<float>(op, chunk);
    if (op.dtype == FS_BF16) return mask<bf16>(op, chunk);
    mask<f16>(op, chunk);
}

}  // namespace

extern const Kernel mask_logits_kernel = {mask_chunks, mask_run};
