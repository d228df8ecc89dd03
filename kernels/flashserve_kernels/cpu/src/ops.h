// What an operation's file gives to the runner, and what the runner gives to it.
#pragma once
#include <cstddef>
#include <cstdlib>

#include "abi.h"

// Memory of one thread that lives as long as its pool. Grows, never shrinks; contents do not survive the next call.
struct Scratch {
    void* memory = nullptr;
    size_t size = 0;
    // 64-byte aligned. Aborts when the machine is out of memory, as every allocation under Linux's overcommit does.
    void* get(size_t bytes) {
        if (bytes > size) {
            free(memory);
            size = (bytes + 4095) / 4096 * 4096;
            memory = aligned_alloc(64, size);
            if (!memory) abort();
        }
        return memory;
    }
    ~Scratch() { free(memory); }
};

// Sizes of this run.
struct Dims {
    const int64_t* values;
    int64_t rows(const fs_op& op) const { return values[op.rows]; }
    int64_t seqs(const fs_op& op) const { return values[op.seqs]; }
};

// What an operation reads from memory, in the order of its chunks: chunk c begins with items part(items, c % groups, groups).
struct Reads {
    const char* at = nullptr;
    int64_t items = 0, item_bytes = 0, groups = 1;
};

// A kind of operation cuts itself into chunks that may run in any order and on any thread. A chunk should take 10-100 µs
// where there is that much to do: claiming one costs about 0.1 µs, and the last one decides how long the others wait.
struct Kernel {
    int64_t (*num_chunks)(const fs_op&, const Dims&, int num_threads);
    void (*run)(const fs_op&, const Dims&, int64_t chunk, int64_t num_chunks, Scratch&);
    // Null where it is not worth fetching early.
    Reads (*reads)(const fs_op&, const Dims&, int64_t num_chunks) = nullptr;
};

// Filled in by each file; looked up by kind.
extern const Kernel embedding_kernel, add_embedding_kernel, norm_kernel, linear_kernel, activation_kernel,
    rope_cache_kernel, attention_kernel, sample_kernel, gather_tokens_kernel, scatter_tokens_kernel,
    pack_linear_kernel, quantize_kernel, pack_grouped_kernel, quantize_groups_kernel, embedding_grouped_kernel,
    linear_grouped_kernel, mask_logits_kernel;

// [begin, end) of chunk c when n items are cut into num_chunks nearly equal parts.
struct Range {
    int64_t begin, end;
};
inline Range part(int64_t n, int64_t c, int64_t num_chunks) { return {n * c / num_chunks, n * (c + 1) / num_chunks}; }
