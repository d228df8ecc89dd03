// Threads that run a list of operations without barriers: chunks are claimed, so a thread that a busy neighbour process
// keeps from running delays only the chunk it holds. With static shares and barriers a 16 ms step took 24-29 ms beside a
// busy process, and its 95th percentile 92-102 ms; with claims 16 and 20 ms.
#include <pthread.h>
#include <errno.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "gemm.h"
#include "ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define FS_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define FS_PAUSE() asm volatile("yield")
#else
#define FS_PAUSE() ((void)0)
#endif

namespace {

const Kernel* const kernels[FS_NUM_KINDS] = {&embedding_kernel, &add_embedding_kernel, &norm_kernel,
                                             &linear_kernel,    &activation_kernel,    &rope_cache_kernel,
                                             &attention_kernel, &sample_kernel,
                                             &gather_tokens_kernel, &scatter_tokens_kernel,
                                             &pack_linear_kernel,   &quantize_kernel,
                                             &pack_grouped_kernel,  &quantize_groups_kernel,
                                             &embedding_grouped_kernel, &linear_grouped_kernel,
                                             &mask_logits_kernel};

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

constexpr int MAX_THREADS = 256;
// Rounds of PAUSE (20-40 ns each) before giving the core away. Between the steps of an engine lie 0.2-0.5 ms, in which
// the stub and tritonserver want the cores, so a thread sleeps soon; a wake-up costs it about 50 µs.
constexpr int SPIN_IN_STEP = 2000;
constexpr int SPIN_BETWEEN_STEPS = 1000;

struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
};

// How far an operation is. Each thread has a share of the chunks, claims from its own first and then from the others'.
struct Phase {
    int64_t num_chunks = 0;
    Reads reads;
    Counter done;
    std::unique_ptr<Counter[]> claimed;
};

// One call of fs_run. A thread that wakes late, or stops while it waits, reads nothing but this (the operations may be
// gone), so the call returns without waiting for it; before a Run is used again its threads must have left.
struct Run {
    const fs_op* ops = nullptr;
    int64_t num_ops = 0;
    std::vector<int64_t> dims;
    std::vector<Phase> phases;
    std::atomic<int> inside{0};
};
constexpr int NUM_RUNS = 4;

}  // namespace

struct fs_pool {
    int num_threads;
    std::vector<int32_t> cpus;
    std::vector<std::thread> threads;
    std::vector<Scratch> scratch;
    Run runs[NUM_RUNS];
    // Number of the current run. Threads sleep on it.
    std::atomic<uint32_t> generation{0};
    std::atomic<bool> ending{false};
};

namespace {

// Fetches into the second-level cache what a thread will read first of the next operations, while it waits for the others:
// a step of few tokens waits for memory, and its threads for each other at the end of each of its 150-300 operations.
// A decode of one takes 2-4% less, 16 served requests 2%.
class Fetch {
    static constexpr int64_t MOST_BYTES = 512 << 10;
    static constexpr int64_t MOST_OPS = 4;  // to look ahead

    const Run& run;
    const int thread, num_threads;
    int64_t op = 0;  // that it fetches for
    const char *at = nullptr, *end = nullptr;

   public:
    Fetch(const Run& run, int thread, int num_threads) : run(run), thread(thread), num_threads(num_threads) {}

    // The thread waits at the end of operation `current`.
    void look_ahead(int64_t current) {
        if (op > current) return;  // it goes on with that one
        at = end;
        for (int64_t next = current + 1; next < std::min(current + 1 + MOST_OPS, run.num_ops); next++) {
            const int64_t num_chunks = run.phases[next].num_chunks;
            const Reads& reads = run.phases[next].reads;
            if (num_chunks < num_threads || !reads.at) continue;
            const Range share = part(num_chunks, thread, num_threads);
            // The items of the share's chunks up to the last of its first row of groups.
            const int64_t first = share.begin % reads.groups;
            const int64_t last = std::min(first + share.end - share.begin, reads.groups) - 1;
            at = reads.at + part(reads.items, first, reads.groups).begin * reads.item_bytes;
            end = std::min(at + MOST_BYTES, reads.at + part(reads.items, last, reads.groups).end * reads.item_bytes);
            op = next;
            return;
        }
    }
    // Fetches four lines; false if there is nothing left. A prefetch of weights that are gone by now does nothing.
    bool fetch_some() {
        if (at >= end) return false;
        for (int line = 0; line < 4; line++, at += 64) prefetch_l2(at);
        return true;
    }
};

void work(fs_pool& pool, Run& run, int thread, double* seconds) {
    const int n = pool.num_threads;
    Fetch fetch(run, thread, n);
    for (int64_t index = 0; index < run.num_ops; index++) {
        Phase& phase = run.phases[index];
        const double start = seconds ? now() : 0;
        int64_t did = 0;
        for (int offset = 0; offset < n; offset++) {
            const int owner = (thread + offset) % n;
            const Range share = part(phase.num_chunks, owner, n);
            std::atomic<int64_t>& next = phase.claimed[owner].value;
            while (next.load(std::memory_order_relaxed) < share.end - share.begin) {
                const int64_t claim = share.begin + next.fetch_add(1, std::memory_order_relaxed);
                if (claim >= share.end) break;
                const fs_op& op = run.ops[index];
                kernels[op.kind]->run(op, Dims{run.dims.data()}, claim, phase.num_chunks, pool.scratch[thread]);
                did++;
            }
        }
        if (did) phase.done.value.fetch_add(did, std::memory_order_release);
        const auto is_done = [&] { return phase.done.value.load(std::memory_order_acquire) >= phase.num_chunks; };
        if (!is_done()) fetch.look_ahead(index);
        for (int spins = 0; !is_done();) {
            if (fetch.fetch_some()) continue;
            if (spins++ < SPIN_IN_STEP)
                FS_PAUSE();
            else
                sched_yield();
        }
        if (seconds) seconds[index] += now() - start;
    }
}

void pin(const fs_pool& pool, int thread) {
    if (pool.cpus.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(pool.cpus[thread], &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

void thread_main(fs_pool* pool, int thread) {
    pin(*pool, thread);
    uint32_t seen = 0;
    while (true) {
        uint32_t generation = pool->generation.load(std::memory_order_acquire);
        for (int spins = 0; generation == seen && spins < SPIN_BETWEEN_STEPS; spins++) {
            FS_PAUSE();
            generation = pool->generation.load(std::memory_order_acquire);
        }
        if (generation == seen) {
            pool->generation.wait(seen, std::memory_order_acquire);
            continue;
        }
        if (pool->ending.load(std::memory_order_acquire)) return;
        seen = generation;
        Run& run = pool->runs[generation % NUM_RUNS];
        // Entering comes before the check that this is still the current run; fs_run checks in the opposite order.
        run.inside.fetch_add(1, std::memory_order_seq_cst);
        if (pool->generation.load(std::memory_order_seq_cst) == generation) work(*pool, run, thread, nullptr);
        run.inside.fetch_sub(1, std::memory_order_release);
    }
}

void prepare(fs_pool& pool, Run& run, const fs_op* ops, int64_t num_ops, const int64_t* dims, int64_t num_dims) {
    run.ops = ops;
    run.num_ops = num_ops;
    run.dims.assign(dims, dims + num_dims);
    if ((int64_t)run.phases.size() < num_ops) run.phases = std::vector<Phase>(num_ops);
    for (int64_t index = 0; index < num_ops; index++) {
        Phase& phase = run.phases[index];
        if (!phase.claimed) phase.claimed.reset(new Counter[pool.num_threads]);
        const Kernel& kernel = *kernels[ops[index].kind];
        const Dims sizes{run.dims.data()};
        phase.num_chunks = kernel.num_chunks(ops[index], sizes, pool.num_threads);
        phase.reads = kernel.reads ? kernel.reads(ops[index], sizes, phase.num_chunks) : Reads{};
        phase.done.value.store(0, std::memory_order_relaxed);
        for (int t = 0; t < pool.num_threads; t++) phase.claimed[t].value.store(0, std::memory_order_relaxed);
    }
}

}  // namespace

extern "C" {

int32_t fs_request_instructions() {
#if defined(__AMX_TILE__)
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return errno;
#endif
    return 0;
}

fs_pool* fs_pool_new(int32_t num_threads, const int32_t* cpus) {
    if (num_threads < 1 || num_threads > MAX_THREADS) return nullptr;
    fs_pool* pool = new (std::nothrow) fs_pool;
    if (!pool) return nullptr;
    pool->num_threads = num_threads;
    if (cpus) pool->cpus.assign(cpus, cpus + num_threads);
    pool->scratch = std::vector<Scratch>(num_threads);
    pin(*pool, 0);
    try {
        for (int t = 1; t < num_threads; t++) pool->threads.emplace_back(thread_main, pool, t);
    } catch (const std::system_error&) {
        fs_pool_free(pool);
        return nullptr;
    }
    return pool;
}

void fs_pool_free(fs_pool* pool) {
    if (!pool) return;
    pool->ending.store(true, std::memory_order_release);
    pool->generation.fetch_add(1, std::memory_order_seq_cst);
    pool->generation.notify_all();
    for (std::thread& thread : pool->threads) thread.join();
    delete pool;
}

void fs_run(fs_pool* pool, const fs_op* ops, int64_t num_ops, const int64_t* dims, int64_t num_dims, double* seconds) {
    const uint32_t generation = pool->generation.load(std::memory_order_relaxed) + 1;
    Run& run = pool->runs[generation % NUM_RUNS];
    while (run.inside.load(std::memory_order_seq_cst)) sched_yield();  // a thread that slept through three runs
    prepare(*pool, run, ops, num_ops, dims, num_dims);
    pool->generation.store(generation, std::memory_order_seq_cst);
    if (pool->num_threads > 1) pool->generation.notify_all();
    forget_tiles();
    work(*pool, run, 0, seconds);
}

int64_t fs_op_size() { return sizeof(fs_op); }

const char* fs_isa() {
#if defined(__AMX_BF16__)
    return "amx";
#elif defined(__AVX512BF16__)
    return "avx512bf16";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "baseline";
#endif
}
}
