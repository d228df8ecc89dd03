// The tokens that a step reads and writes, by slot. A few hundred numbers: one chunk each.
#include "ops.h"

namespace {

int64_t one_chunk(const fs_op& op, const Dims& dims, int) { return dims.rows(op) > 0; }

// FS_GATHER_TOKENS. p: token ids, last tokens, slots, out; all int64.
void gather_run(const fs_op& op, const Dims& dims, int64_t, int64_t, Scratch&) {
    const int64_t *ids = (const int64_t*)op.p[0], *last = (const int64_t*)op.p[1], *slots = (const int64_t*)op.p[2];
    for (int64_t row = 0; row < dims.rows(op); row++)
        ((int64_t*)op.p[3])[row] = ids[row] < 0 ? last[slots[row]] : ids[row];
}

// FS_SCATTER_TOKENS. p: last tokens, slots, tokens; all int64.
void scatter_run(const fs_op& op, const Dims& dims, int64_t, int64_t, Scratch&) {
    const int64_t *slots = (const int64_t*)op.p[1], *tokens = (const int64_t*)op.p[2];
    for (int64_t row = 0; row < dims.rows(op); row++) ((int64_t*)op.p[0])[slots[row]] = tokens[row];
}

}  // namespace

extern const Kernel gather_tokens_kernel = {one_chunk, gather_run};
extern const Kernel scatter_tokens_kernel = {one_chunk, scatter_run};
