/* CUDA on the CPU, as much of it as shortcut_cuda.cu uses: its kernels run here as plain C++, so
 * that their indexing, barriers and arithmetic are tested on machines without a GPU.
 *
 * It is hostile: of all that CUDA allows, what helps least happens, chosen by EMULATED_SEED in the
 * environment (1 if there is none; with 0 all is done at once and in order).
 * - Streams are lazy: work is queued, and done when the host waits for it, or some at any time
 *   before, in any order that the events allow, one stream far ahead of another.
 * - A few blocks are resident at once, and begin in any order. They go on by turns of any length,
 *   so that one waits for another in the middle of its work.
 * - The threads of a block are fibres: each runs until it waits (at a barrier, a shuffle, a matrix
 *   instruction), then another lane of its warp goes on, and the next warp only when all lanes wait
 *   at the block's barrier: as on a GPU one warp may be far ahead of the others, so a missing
 *   barrier shows, if not at once then as a difference between two orders (emulation_order: warps
 *   rising or falling, lanes by odd steps below 32).
 * - A copy to shared memory (cp.async) takes place when it is waited for, and so does wgmma.
 * - Memory is NaN when it is handed out and after it is given back, to CUDA or to the program's own
 *   list; writes beyond its ends are found when it goes back to CUDA.
 * test/faults.sh plants faults and shows that they are found. */
#ifndef EMULATED_CUDA_RUNTIME_H
#define EMULATED_CUDA_RUNTIME_H
#include <deque>
#include <functional>
#include <malloc.h>
#include <math.h>
#include <numeric>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <type_traits>
#include <ucontext.h>

#define __device__
#define __global__ static
#define __forceinline__ inline
#define __shared__ static thread_local /* each resident block has a thread */
#define __launch_bounds__(...)

struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
static inline uint2 make_uint2(unsigned x, unsigned y) { return uint2{x, y}; }
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
static inline float2 make_float2(float x, float y) { return float2{x, y}; }
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

static dim3 gridDim, blockDim;
static thread_local uint3 blockIdx, threadIdx;
static int emulation_order = 1; /* from one thread to the next that runs */
extern "C" void sc_emulation_order(int order) { emulation_order = order; }

static const char *emulation_kernel; /* the one that runs */

static inline void emulation_die(const char *why) {
    printf("emulated GPU: %s: %s (block %u,%u,%u thread %u)\n", emulation_kernel, why, blockIdx.x,
           blockIdx.y, blockIdx.z, threadIdx.x);
    fflush(stdout);
    abort();
}

/* ---- Chance ---- */

static uint64_t emulation_seed() {
    static const char *text = getenv("EMULATED_SEED");
    return text ? (uint64_t)atoll(text) : 1;
}
/* Below n: 0 if the seed is. */
static uint64_t emulation_draw(uint64_t n) {
    static uint64_t state = emulation_seed() * 0x9e3779b97f4a7c15u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (state >> 11) % n;
}

/* ---- Streams and events ---- */

typedef int cudaError_t;
enum {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100
};
struct emulation_stream;
struct emulation_event { /* has come when the stream has done so many tasks */
    emulation_stream *stream;
    uint64_t tasks;
};
struct emulation_task {
    emulation_event after;
    std::function<void()> run;
};
struct emulation_stream {
    std::deque<emulation_task> queue;
    uint64_t done;
};
typedef emulation_stream *cudaStream_t;
typedef emulation_event *cudaEvent_t;
static emulation_stream *emulation_streams[4];
static size_t emulation_stream_count;

static bool emulation_has_come(emulation_event e) { return !e.stream || e.stream->done >= e.tasks; }
static emulation_event emulation_now(cudaStream_t s) { return {s, s->done + s->queue.size()}; }

/* The next task of a stream whose next task can be done: for a while the same stream's, if so. */
static bool emulation_step() {
    static size_t favourite;
    static uint64_t left;
    if (left-- == 0)
        left = emulation_draw((uint64_t)1 << emulation_draw(14)),
        favourite = emulation_draw(emulation_stream_count);
    for (size_t i = 0; i < emulation_stream_count; i++) {
        cudaStream_t s = emulation_streams[(favourite + i) % emulation_stream_count];
        if (s->queue.empty() || !emulation_has_come(s->queue.front().after)) continue;
        std::function<void()> run = std::move(s->queue.front().run);
        s->queue.pop_front();
        run();
        s->done++;
        return true;
    }
    return false;
}

static void emulation_queue(cudaStream_t s, emulation_event after, std::function<void()> run) {
    s->queue.push_back(emulation_task{after, std::move(run)});
    while ((emulation_seed() == 0 || emulation_draw(8) == 0) && emulation_step()) {}
}

static cudaError_t emulation_wait(emulation_event e) {
    while (!emulation_has_come(e))
        if (!emulation_step()) emulation_die("streams that wait for each other");
    return cudaSuccess;
}

static inline cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    return emulation_wait(emulation_now(s));
}
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    if (emulation_stream_count == 4) emulation_die("too many streams");
    *s = emulation_streams[emulation_stream_count++] = new emulation_stream();
    return cudaSuccess;
}
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    return *e = new emulation_event(), cudaSuccess;
}
static inline cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete e, cudaSuccess; }
static inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    return *e = emulation_now(s), cudaSuccess;
}
static inline cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    return emulation_queue(s, *e, [] {}), cudaSuccess;
}
static inline cudaError_t cudaEventSynchronize(cudaEvent_t e) { return emulation_wait(*e); }

/* ---- Resident blocks and fibres ---- */

enum {
    EMULATION_RESIDENT = 4,
    EMULATION_THREADS = 1024,
    EMULATION_STACK = 256 << 10,
    EMULATION_SHARED = 256 << 10,
    EMULATION_COPIES = 64,
    EMULATION_WGMMAS = 64
};

struct emulation_copy {
    void *to;
    const void *from;
    bool valid;
    int group;
};

struct emulation_wgmma {
    float (*sum)[4];
    int n;
    bool packed, a_m, b_n;
    uint64_t a, b;
    float rows[2][16]; /* of A, if packed */
    int group;
};

/* A resident block. */
struct emulation_block {
    void *launch[5], *place[EMULATION_THREADS][5]; /* where the launch and each fibre go on */
    bool started[EMULATION_THREADS];
    int count, current, running; /* threads of the block; the one that runs; those not finished */
    bool finished[EMULATION_THREADS], blocked[EMULATION_THREADS]; /* blocked: at the barrier */
    int waiting, arrivals; /* at the block's barrier; barriers passed */
    int warp_arrived[32], warp_passed[32];
    uint32_t exchange[2][EMULATION_THREADS][4]; /* what lanes show each other, by turns */
    const void *rows[2][EMULATION_THREADS];
    int turn[EMULATION_THREADS];
    emulation_copy copies[EMULATION_THREADS][EMULATION_COPIES];
    int copy_count[EMULATION_THREADS], group[EMULATION_THREADS];
    emulation_wgmma wgmmas[EMULATION_THREADS][EMULATION_WGMMAS];
    int wgmma_count[EMULATION_THREADS], committed[EMULATION_THREADS]; /* wgmmas; commit groups */
    bool unfenced[EMULATION_THREADS]; /* its copies came after its last fence_proxy_async */
    alignas(1024) char shared[EMULATION_SHARED];
};
static emulation_block emulation_blocks[EMULATION_RESIDENT];
static sem_t emulation_turns[EMULATION_RESIDENT];
static thread_local emulation_block *emulation = emulation_blocks; /* this thread's */

/* What is launched: blocks first, first + step, ..., modulo their number. */
static struct {
    std::function<void()> kernel;
    int threads, order, turn; /* order: from one thread to the next that runs */
    size_t shared;
    uint64_t begun, count, first, step;
    bool resident[EMULATION_RESIDENT];
} launched;

/* A resident block's number; 0: there is none. */
static int emulation_any_block() {
    int first = (int)emulation_draw(EMULATION_RESIDENT), i = 0;
    while (i < EMULATION_RESIDENT && !launched.resident[(first + i) % EMULATION_RESIDENT]) i++;
    return i == EMULATION_RESIDENT ? 0 : (first + i) % EMULATION_RESIDENT;
}
static void emulation_await_turn() {
    while (sem_wait(&emulation_turns[emulation - emulation_blocks])) {}
}
/* One of the resident blocks goes on for some time; true: another one did, and now this. */
static bool emulation_change_block() {
    int next = emulation_any_block();
    launched.turn = 1 + (int)emulation_draw((uint64_t)1 << emulation_draw(16));
    if (emulation_blocks + next == emulation) return false;
    sem_post(&emulation_turns[next]);
    emulation_await_turn();
    return true;
}

static inline void *shared_memory() { return emulation->shared; }

/* A lane of the warp that can go on, from `lane` on; -1: none. */
static inline int emulation_lane(int warp, int lane) {
    for (int k = 1; k <= 32; k++) {
        int i = warp * 32 + (lane + k * (launched.order + 32)) % 32;
        if (i < emulation->count && !emulation->finished[i] && !emulation->blocked[i]) return i;
    }
    return -1;
}

static void emulation_start();

/* To where fibre `next` goes on: without a system call, as a block has thousands of these. */
static __attribute__((noinline)) void emulation_go_on(int next) {
    emulation->current = next;
    threadIdx.x = (unsigned)next;
    if (emulation->started[next]) __builtin_longjmp(emulation->place[next], 1);
    static ucontext_t fibre;
    emulation->started[next] = true;
    getcontext(&fibre);
    fibre.uc_stack.ss_sp = malloc(EMULATION_STACK);
    fibre.uc_stack.ss_size = EMULATION_STACK;
    makecontext(&fibre, emulation_start, 0);
    setcontext(&fibre);
}
static __attribute__((noinline)) void emulation_return() {
    __builtin_longjmp(emulation->launch, 1);
}

/* The next thread that can go on does; back to the launch if all have finished. */
static __attribute__((noinline)) void emulation_yield() {
    int from = emulation->current, warps = (emulation->count + 31) / 32, next = -1;
    if (__builtin_setjmp(emulation->place[from])) return;
    if (emulation->running == 0) emulation_return();
    for (int w = 0; w < warps && next < 0; w++) {
        int ahead = launched.order > 0 ? w : warps - w;
        next = emulation_lane((from / 32 + ahead) % warps, from % 32);
    }
    while (next < 0 || emulation->finished[next]) /* all wait: one of them opens the barrier */
        next = (next < 0 ? from + 1 : next + 1) % emulation->count;
    emulation->current = next;
    if (--launched.turn <= 0) emulation_change_block();
    if (next != from) emulation_go_on(next);
}

/* A fibre: the same thread of one block after the other. */
static void emulation_start() {
    for (;;) {
        int self = emulation->current;
        launched.kernel();
        emulation->finished[self] = true;
        emulation->running--;
        emulation_yield();
    }
}

/* Threads that have returned do not count, as on a GPU since compute capability 7.0. */
static inline void emulation_open() {
    if (emulation->waiting < emulation->running) return;
    emulation->waiting = 0, emulation->arrivals++;
    memset(emulation->blocked, 0, sizeof emulation->blocked);
}

static inline void __syncthreads() {
    int passed = emulation->arrivals, self = emulation->current;
    emulation->waiting++, emulation->blocked[self] = true;
    emulation_open();
    for (int tries = 0; emulation->arrivals == passed; tries++) {
        if (tries > 1 << 20) emulation_die("a barrier that not all threads reach");
        emulation_yield();
        if (emulation->arrivals == passed) emulation_open();
    }
}

/* All 32 lanes of the warp must get here. */
static inline void emulation_warp_barrier() {
    int warp = (int)threadIdx.x / 32, passed = emulation->warp_passed[warp];
    if (++emulation->warp_arrived[warp] == 32)
        emulation->warp_arrived[warp] = 0, emulation->warp_passed[warp]++;
    for (int tries = 0; emulation->warp_passed[warp] == passed; tries++) {
        if (tries > 1 << 20) emulation_die("a warp instruction that not all lanes reach");
        emulation_yield();
    }
}

static void emulation_prepare(int i) {
    emulation->finished[i] = emulation->blocked[i] = false;
    emulation->turn[i] = emulation->copy_count[i] = emulation->group[i] = 0;
    emulation->wgmma_count[i] = emulation->committed[i] = 0, emulation->unfenced[i] = false;
    emulation->warp_arrived[i / 32] = 0;
}

/* One block, from all its threads' first lines to the last one's end. */
static __attribute__((noinline)) void emulation_run_block() {
    memset(emulation->shared, 0xff, launched.shared); /* NaN */
    emulation->count = emulation->running = launched.threads;
    emulation->waiting = 0;
    for (int i = 0; i < launched.threads; i++) emulation_prepare(i);
    if (!__builtin_setjmp(emulation->launch))
        emulation_go_on(launched.order > 0 ? 0 : launched.threads - 1);
}

/* One block after the other, until all have begun. */
static void emulation_run_blocks() {
    while (launched.begun < launched.count) {
        uint64_t i = (launched.first + launched.begun++ * launched.step) % launched.count;
        blockIdx.x = (unsigned)(i % gridDim.x);
        blockIdx.y = (unsigned)(i / gridDim.x % gridDim.y);
        blockIdx.z = (unsigned)(i / gridDim.x / gridDim.y);
        emulation_run_block();
    }
    launched.resident[emulation - emulation_blocks] = false;
}

/* A place for a resident block; the first one's is the thread that launches. */
static void *emulation_place(void *block) {
    for (emulation = (emulation_block *)block;;) {
        emulation_await_turn();
        emulation_run_blocks();
        sem_post(&emulation_turns[emulation_any_block()]);
    }
}

static void emulation_launch(const char *name, dim3 blocks) {
    static bool begun;
    for (int i = 0; !begun && i < EMULATION_RESIDENT; i++) {
        pthread_t thread;
        sem_init(&emulation_turns[i], 0, 0);
        if (i > 0 && pthread_create(&thread, NULL, emulation_place, &emulation_blocks[i]))
            emulation_die("no thread");
    }
    begun = true;
    emulation_kernel = name, gridDim = blocks, blockDim = dim3((unsigned)launched.threads);
    launched.begun = 0, launched.count = (uint64_t)blocks.x * blocks.y * blocks.z;
    launched.first = emulation_draw(launched.count);
    do launched.step = 1 + emulation_draw(launched.count);
    while (std::gcd(launched.step, launched.count) > 1);
    uint64_t places = 1 + emulation_draw(EMULATION_RESIDENT);
    for (uint64_t i = 0; i < places && i < launched.count; i++) launched.resident[i] = true;
    emulation_run_blocks();
    while (emulation_any_block()) emulation_change_block();
}

static inline size_t emulation_shared_limit();

template <class K>
static void emulate_launch(const char *name, dim3 blocks, int threads, size_t shared,
                           cudaStream_t stream, const K &kernel) {
    emulation_kernel = name;
    if (threads > EMULATION_THREADS || shared > emulation_shared_limit() || blocks.y > 65535 ||
        blocks.z > 65535)
        emulation_die("a launch beyond the limits");
    int order = emulation_order;
    emulation_queue(stream, {}, [=] {
        launched.kernel = kernel;
        launched.threads = threads, launched.shared = shared, launched.order = order;
        emulation_launch(name, blocks);
    });
}

/* ---- Warp instructions ---- */

/* Shows x to the warp; which of the two buffers alternates, so that one barrier is enough. */
static inline int emulation_show(const uint32_t *x, int n) {
    int self = (int)threadIdx.x, turn = emulation->turn[self] ^= 1;
    for (int i = 0; i < n; i++) emulation->exchange[turn][self][i] = x[i];
    emulation_warp_barrier();
    return turn;
}

static inline float __shfl_xor_sync(unsigned, float x, int mask) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    int turn = emulation_show(&bits, 1);
    memcpy(&x, emulation->exchange[turn][(int)threadIdx.x ^ mask], 4);
    return x;
}

static inline int __shfl_sync(unsigned, int x, int lane) {
    uint32_t bits = (uint32_t)x;
    int turn = emulation_show(&bits, 1);
    return (int)emulation->exchange[turn][(int)threadIdx.x / 32 * 32 + lane][0];
}

static inline bool __any_sync(unsigned, bool x) {
    uint32_t all = x;
    int turn = emulation_show(&all, 1), warp = (int)threadIdx.x / 32 * 32;
    for (int i = 0; i < 32; i++) all |= emulation->exchange[turn][warp + i][0];
    return all != 0;
}

static inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
#define __expf expf
static inline float exp2_approx(float x) { return exp2f(x); }

template <class T> static inline T __ldcg(const T *p) { return *p; }
static inline int atomicAdd(int *p, int x) { return *p += x, *p - x; }
static int64_t emulation_loads; /* of semaphores since one was released */
/* Other blocks go on soon after, and after a release perhaps at once. */
static inline int semaphore_load(const int *semaphore) {
    if (++emulation_loads > 1 << 24) emulation_die("blocks that wait for each other");
    if (launched.turn > 64) launched.turn = 1 + (int)emulation_draw(64);
    return *semaphore;
}
static inline void semaphore_release(bool predicate, int *semaphore, int next) {
    if (!predicate) return;
    *semaphore = next, emulation_loads = 0;
    launched.turn *= (int)emulation_draw(2);
}

static inline void cp_async16(void *shared, const void *global, bool valid) {
    int self = (int)threadIdx.x, n = emulation->copy_count[self]++;
    if (n >= EMULATION_COPIES) emulation_die("too many copies under way");
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16)
        emulation_die("a copy of 16 bytes that is not aligned");
    if ((char *)shared < emulation->shared ||
        (char *)shared + 16 > emulation->shared + EMULATION_SHARED)
        emulation_die("not shared memory");
    emulation->copies[self][n] = emulation_copy{shared, global, valid, emulation->group[self]};
    memset(shared, 0xff, 16); /* whoever reads it before it has come gets NaN */
}
static inline void cp_async_commit_group() { emulation->group[threadIdx.x]++; }
template <int N> static inline void cp_async_wait_group() {
    int self = (int)threadIdx.x, kept = 0;
    for (int i = 0; i < emulation->copy_count[self]; i++) {
        emulation_copy c = emulation->copies[self][i];
        if (c.group >= emulation->group[self] - N) {
            emulation->copies[self][kept++] = c;
            continue;
        }
        emulation->unfenced[self] = true;
        if (c.valid) memcpy(c.to, c.from, 16);
        else memset(c.to, 0, 16);
    }
    emulation->copy_count[self] = kept;
}

static inline void emulation_matrices(uint32_t x[4], const void *row, bool transposed) {
    int self = (int)threadIdx.x, warp = self / 32 * 32, lane = self % 32,
        turn = emulation->turn[self] ^= 1;
    if ((uintptr_t)row % 16) emulation_die("a matrix row that is not aligned");
    uint16_t copy[8];
    memcpy(copy, row, 16); /* read when the instruction is issued */
    memcpy(emulation->exchange[turn][self], copy, 16);
    emulation_warp_barrier();
    for (int i = 0; i < 4; i++) {
        uint16_t pair[2];
        for (int j = 0; j < 2; j++) {
            int r = transposed ? lane % 4 * 2 + j : lane / 4,
                c = transposed ? lane / 4 : lane % 4 * 2 + j;
            memcpy(&pair[j], (const char *)emulation->exchange[turn][warp + 8 * i + r] + 2 * c, 2);
        }
        memcpy(&x[i], pair, 4);
    }
}
template <class T> static inline void ldmatrix_x4(uint32_t x[4], const T *row) {
    emulation_matrices(x, row, false);
}
template <class T> static inline void ldmatrix_x4_trans(uint32_t x[4], const T *row) {
    emulation_matrices(x, row, true);
}

/* Element (row, column) of A [16,16], (column, row) of B [16,8], from the pairs that lanes hold. */
static inline float emulation_element(uint32_t pair, int odd) {
    return __uint_as_float(odd ? pair & 0xffff0000u : pair << 16);
}

static inline void mma_m16n8k16(float sum[4], const uint32_t a[4], uint32_t b0, uint32_t b1) {
    int self = (int)threadIdx.x, warp = self / 32 * 32, g = self % 32 / 4, t = self % 4;
    int turn = emulation_show(a, 4);
    uint32_t show[2] = {b0, b1}, fa[2][8][2], fb[2][8];
    for (int half = 0; half < 2; half++) /* rows g and g + 8, pairs of k */
        for (int p = 0; p < 8; p++)
            fa[half][p][0] = emulation->exchange[turn][warp + g * 4 + p % 4][half + p / 4 * 2];
    turn = emulation_show(show, 2);
    for (int j = 0; j < 2; j++) /* columns 2t and 2t + 1 */
        for (int p = 0; p < 8; p++)
            fb[j][p] = emulation->exchange[turn][warp + (2 * t + j) * 4 + p % 4][p / 4];
    for (int c = 0; c < 4; c++)
        for (int k = 0; k < 16; k++)
            sum[c] += emulation_element(fa[c / 2][k / 2][0], k % 2) *
                      emulation_element(fb[c % 2][k / 2], k % 2);
}

/* ---- wgmma ----
 * A and B are found as PTX describes matrices in shared memory with a swizzle of 128 bytes: eight
 * rows of 128 bytes follow each other, in which the number of a chunk of 16 bytes is XORed with the
 * row's, as bits of the address say. The contiguous direction goes on in the next panel. */

#define HAS_WGMMA true
static inline uint32_t shared_address(const void *p) {
    return (uint32_t)((const char *)p - emulation->shared);
}

/* Value (outer, inner) of the described matrix; inner lies side by side. */
static inline float emulation_described(uint64_t d, int outer, int inner) {
    if (d >> 62 != 1) emulation_die("not the swizzle of 128 bytes");
    uint32_t start = (uint32_t)(d & 0x3fff) << 4, panels = (uint32_t)(d >> 16 & 0x3fff) << 4,
             rows = (uint32_t)(d >> 32 & 0x3fff) << 4;
    uint32_t at = start + (uint32_t)(inner / 64) * panels + (uint32_t)(inner % 64 * 2) +
                  (uint32_t)(outer / 8) * rows + (uint32_t)(outer % 8) * 128;
    at ^= (at >> 7 & 7) << 4;
    uint16_t bits;
    if (at + 2 > EMULATION_SHARED) emulation_die("wgmma beyond shared memory");
    memcpy(&bits, emulation->shared + at, 2);
    return __uint_as_float((uint32_t)bits << 16);
}

static inline void emulation_queue_wgmma(emulation_wgmma p) {
    int self = (int)threadIdx.x, n = emulation->wgmma_count[self]++;
    if (n >= EMULATION_WGMMAS) emulation_die("too many wgmmas under way");
    for (int i = 0; i < emulation->count; i++)
        if (emulation->unfenced[i]) emulation_die("wgmma reads copies without fence.proxy.async");
    emulation->wgmmas[self][n] = p;
    emulation->wgmmas[self][n].group = emulation->committed[self];
}
template <int N, bool A_M, bool B_N>
static inline void wgmma_ss(float (*sum)[4], uint64_t a, uint64_t b) {
    emulation_queue_wgmma(emulation_wgmma{sum, N, false, A_M, B_N, a, b, {}, 0});
}
static inline void wgmma_rs(float (*sum)[4], const uint32_t a[4], uint64_t b) {
    emulation_wgmma p = {sum, 16, true, false, true, 0, b, {}, 0};
    int warp = (int)threadIdx.x / 32 * 32, g = (int)threadIdx.x % 32 / 4;
    int turn = emulation_show(a, 4);
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 16; k++)
            p.rows[half][k] = emulation_element(
                emulation->exchange[turn][warp + g * 4 + k / 2 % 4][half + k / 8 * 2], k % 2);
    emulation_queue_wgmma(p);
}
template <bool WGMMA> static inline void fence_proxy_async() {
    if (WGMMA) emulation->unfenced[threadIdx.x] = false;
}
template <bool WGMMA, class... T> static inline void wgmma_fence(T &...) {}
template <bool WGMMA> static inline void wgmma_commit_group() {
    emulation->committed[threadIdx.x]++;
}
/* What may be left pending is. */
template <bool WGMMA, int PENDING = 0, class... T> static inline void wgmma_wait_group(T &...) {
    int self = (int)threadIdx.x, row = self / 32 % 4 * 16 + self % 32 / 4, kept = 0;
    for (int i = 0; WGMMA && i < emulation->wgmma_count[self]; i++) {
        const emulation_wgmma *p = &emulation->wgmmas[self][i];
        if (p->group >= emulation->committed[self] - PENDING) {
            emulation->wgmmas[self][kept++] = *p;
            continue;
        }
        float a[2][16];
        for (int c = 0; c < 32; c++) {
            int m = row + c / 16 * 8, k = c % 16;
            a[c / 16][k] = p->packed ? p->rows[c / 16][k]
                                     : emulation_described(p->a, p->a_m ? k : m, p->a_m ? m : k);
        }
        for (int c = 0; c < 2 * p->n; c++) {
            int n = c / 2 * 8 + self % 4 * 2 + c % 2;
            float *upper = &p->sum[c / 2][c % 2], *lower = upper + 2;
            for (int k = 0; k < 16; k++) {
                float b = emulation_described(p->b, p->b_n ? k : n, p->b_n ? n : k);
                *upper += a[0][k] * b, *lower += a[1][k] * b;
            }
        }
    }
    emulation->wgmma_count[self] = kept;
}

/* ---- The runtime ---- */

enum { cudaMemcpyDefault, cudaStreamNonBlocking, cudaEventDisableTiming };
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t sharedMemPerBlockOptin;
};

static size_t emulation_memory_limit = (size_t)4 << 30, emulation_memory;
enum { EMULATION_GUARD = 256 };

static inline const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaErrorMemoryAllocation ? "out of memory" : "no device";
}
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
#define CUDART_VERSION 13000
static inline cudaError_t cudaDriverGetVersion(int *version) {
    return *version = CUDART_VERSION, cudaSuccess;
}
static inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
/* An H100, or, with EMULATED_CHIP=89 in the environment, a chip with less: no wgmma,
 * no scales of rows in cuBLASLt, 99 KiB of shared memory. */
static inline bool emulation_smaller() { return getenv("EMULATED_CHIP") != NULL; }
static inline size_t emulation_shared_limit() {
    return (size_t)(emulation_smaller() ? 99 : 227) << 10;
}
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    bool smaller = emulation_smaller();
    snprintf(p->name, sizeof p->name, "emulated GPU");
    p->major = smaller ? 8 : 9, p->minor = smaller ? 9 : 0, p->multiProcessorCount = 7;
    p->sharedMemPerBlockOptin = emulation_shared_limit();
    return cudaSuccess;
}
/* Guards of known bytes lie around a block; its size is kept in front of it. */
static inline cudaError_t cudaMalloc(void *pp, size_t size) {
    char *p = emulation_memory + size <= emulation_memory_limit
                  ? (char *)aligned_alloc(256, (size + 3 * EMULATION_GUARD - 1) / 256 * 256)
                  : NULL;
    if (!p) return cudaErrorMemoryAllocation;
    memset(p, 0xff, (size + 3 * EMULATION_GUARD - 1) / 256 * 256);
    memcpy(p, &size, sizeof size);
    emulation_memory += size;
    *(char **)pp = p + EMULATION_GUARD;
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void *p) {
    while (emulation_step()) {} /* it waits for all work */
    char *start = (char *)p - EMULATION_GUARD;
    size_t size;
    memcpy(&size, start, sizeof size);
    for (size_t i = sizeof size; i < EMULATION_GUARD; i++)
        if (start[i] != (char)0xff || ((char *)p)[size + i - sizeof size] != (char)0xff)
            emulation_die("a write beyond a block of memory");
    emulation_memory -= size;
    memset(p, 0xff, size);
    free(start);
    return cudaSuccess;
}
static inline cudaError_t cudaMallocHost(void **p, size_t size) {
    if (!(*p = malloc(size))) return cudaErrorMemoryAllocation;
    return memset(*p, 0xff, size), cudaSuccess;
}
static inline cudaError_t cudaFreeHost(void *p) {
    memset(p, 0xff, malloc_usable_size(p));
    return free(p), cudaSuccess;
}
static inline cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *left = emulation_memory_limit - emulation_memory, *total = emulation_memory_limit;
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, int,
                                          cudaStream_t s) {
    return emulation_queue(s, {}, [=] { memcpy(to, from, n); }), cudaSuccess;
}
static inline cudaError_t cudaMemsetAsync(void *p, int byte, size_t n, cudaStream_t s) {
    return emulation_queue(s, {}, [=] { memset(p, byte, n); }), cudaSuccess;
}
#endif
