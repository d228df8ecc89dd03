// The library's plain C interface: a step is a list of operations that one call runs, phase after phase, on all threads.
#pragma once
#include <cstdint>

extern "C" {

// Element types of tensors. Order is known to program.py.
enum fs_dtype : int32_t { FS_F32 = 0, FS_BF16 = 1, FS_F16 = 2, FS_I8 = 3 };

// Kinds of operations; each file of this folder implements some. Order is known to program.py.
enum fs_kind : int32_t {
    FS_EMBEDDING = 0,
    FS_ADD_EMBEDDING,
    FS_NORM,
    FS_LINEAR,
    FS_ACTIVATION,
    FS_ROPE_CACHE,
    FS_ATTENTION,
    FS_SAMPLE,
    FS_GATHER_TOKENS,
    FS_SCATTER_TOKENS,
    FS_PACK_LINEAR,
    FS_QUANTIZE,
    FS_PACK_GROUPED,
    FS_QUANTIZE_GROUPS,
    FS_EMBEDDING_GROUPED,
    FS_LINEAR_GROUPED,
    FS_MASK_LOGITS,
    FS_NUM_KINDS
};

// One operation. Which pointer and number means what is said where the kind is implemented. Sizes that change from step
// to step are not stored here: `rows` and `seqs` are indices into the run's `dims`, so a recorded list serves every step.
struct fs_op {
    int32_t kind;
    int32_t dtype;
    int32_t rows;
    int32_t seqs;
    void* p[12];
    int64_t i[16];
    double f[4];
};

struct fs_pool;

// Asks the operating system for what this library's instructions need (Linux: the state of AMX tiles). Once per process,
// before a pool is made. 0, or errno when it is refused.
int32_t fs_request_instructions();

// Threads in all, the caller's own included. cpus: one CPU number per thread to pin it to, or null. Null if threads
// cannot be made. Free it from the thread that made it.
fs_pool* fs_pool_new(int32_t num_threads, const int32_t* cpus);
void fs_pool_free(fs_pool*);

// Runs ops[0 .. num_ops) in order; the caller is one of the threads. Not reentrant. seconds: null, or num_ops numbers to
// which each operation's wall time is added (for profiles).
void fs_run(fs_pool*, const fs_op* ops, int64_t num_ops, const int64_t* dims, int64_t num_dims, double* seconds);

// Which instructions this library was compiled for: "amx", "avx512bf16", "avx512", "avx2", "baseline", "neon".
const char* fs_isa();

// sizeof(fs_op), for a check of the binding.
int64_t fs_op_size();
}
