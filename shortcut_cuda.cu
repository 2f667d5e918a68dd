/* shortcut_cuda.cu: the operations of shortcut.h on an NVIDIA GPU (8.0 or up)          >>cuda
 *
 * Activations and their gradients are bf16, sums f32; LoRA factors, optimiser state and averages
 * are f32, losses f64. Matrix products go to cuBLASLt, everything else is a kernel below, in the
 * order of the backend table; shortcut.h's CPU operations are the specification, with the formulas.
 *
 * - Work is queued on one stream, in order. Within a training step the host waits in `download` and
 * `collect` only, so that no step waits for another (`upload` waits where it is steps ahead).
 * Memory given back may be handed out again at once: its next use is queued behind.
 * - The first failure is kept, later calls do nothing, and those two report it.
 * - Every sum has a fixed order (no atomic additions): the same inputs give the same bits.
 * - A matrix is row-major, B batch, T tokens, C channels, H heads, D channels of a head.
 * - Compiled as C++ against test/emulation/ the same file runs on the CPU (test/test_cuda.c).
 * - Environment: SHORTCUT_CUDA_VERBOSE=1 prints what cuBLASLt refuses and how attention is
 * computed; SHORTCUT_CUDA_WGMMA=0 leaves wgmma out.
 */
#include "shortcut.h"

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef SHORTCUT_MPI
#include <nccl.h>
#endif
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef __nv_bfloat16 bf16;

/* ==== Errors and the device ================================================================== */

static struct {
    bool failed;
    char message[512]; /* the first failure's */
    char name[64];
    cudaStream_t stream;
    cublasLtHandle_t lt;
    void *workspace;      /* cuBLASLt's */
    size_t shared_memory; /* a block's limit, bytes */
    int capability;       /* 90: 9.0 */
    int sm_count;
    int number; /* which of the host's GPUs */
} gpu;

static bool fail(const char *what, const char *why) {
    if (gpu.failed) return false;
    gpu.failed = true;
    snprintf(gpu.message, sizeof gpu.message, "GPU: %s: %s", what, why);
    return sc_fail("%s", gpu.message);
}

static bool verbose() { return getenv("SHORTCUT_CUDA_VERBOSE") != NULL; }

static bool check(cudaError_t status, const char *what) {
    return status == cudaSuccess || fail(what, cudaGetErrorString(status));
}

/* Queues kernel(args...). `shared`: bytes of shared_memory() that a block gets. */
template <typename... P, typename... A>
static void launch(const char *name, void (*kernel)(P...), dim3 blocks, int threads, size_t shared,
                   A... args) {
    if (gpu.failed || blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return;
#ifdef __CUDACC__
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (shared > 48 << 10) check(cudaFuncSetAttribute(kernel, limit, (int)shared), name);
    kernel<<<blocks, threads, shared, gpu.stream>>>((P)args...);
    check(cudaGetLastError(), name);
#else
    emulate_launch(name, blocks, threads, shared, gpu.stream, [=] { kernel((P)args...); });
#endif
}

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
/* So many blocks, as CUDA takes them. */
static dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
    return dim3((unsigned)x, (unsigned)y, (unsigned)z);
}

/* ==== Instructions ===========================================================================
 * What C++ has no words for; test/emulation/cuda_runtime.h has the same in plain loops. */
#ifdef __CUDACC__
__device__ __forceinline__ void *shared_memory() {
    extern __shared__ __align__(1024) uint4 block_memory[];
    return block_memory;
}
__device__ __forceinline__ unsigned shared_address(const void *p) {
    return (unsigned)__cvta_generic_to_shared(p);
}

/* 16 bytes to shared memory, asynchronously; zeros where not `valid`. */
__device__ __forceinline__ void cp_async16(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Until at most N of this thread's groups are pending. */
template <int N> __device__ __forceinline__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Four 8 x 8 matrices of bf16: lanes 8i .. 8i+7 point to the rows of matrix i; afterwards a lane
 * holds, of each, the pair (lane % 4) of row lane / 4. `_trans`: of the transposed matrix. */
__device__ __forceinline__ void ldmatrix_x4(uint32_t x[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t x[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/* D[16,8] += A[16,16] B[16,8] on the tensor cores. With g = lane / 4, t = lane % 4 a lane's
 * fragments are D (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); pairs of A (g, 2t), (g+8, 2t),
 * (g, 2t+8), (g+8, 2t+8); pairs of B down its rows (2t, g), (2t+8, g). */
__device__ __forceinline__ void mma_m16n8k16(float sum[4], const uint32_t a[4], uint32_t b0,
                                             uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* wgmma (compute capability 9.0): a warpgroup of four warps adds A B over k = 16 to accumulators
 * D [64, 8 N]. Warp w % 4 has 16 of the rows, its lanes' fragments, for each N, are those of
 * mma_m16n8k16. A and B are read from shared memory through descriptors (see wgmma_descriptor;
 * A_M: stored [k][m], B_N: [k][n]), or, _rs, A from registers. It is asynchronous:
 * - generic writes and cp.async to shared memory become visible to it by fence.proxy.async of the
 *   writers, then a barrier; registers by wgmma.fence;
 * - D and A's registers may not be touched before wgmma.wait_group, which leaves at most PENDING
 *   groups, each closed by wgmma.commit_group, under way. */
#define WGMMA_D_64                                                                                 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"   \
    "%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_D_128                                                                                \
    WGMMA_D_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"         \
               "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define ACC1(x) "+f"((x)[0]), "+f"((x)[1]), "+f"((x)[2]), "+f"((x)[3])
#define ACC4(x, i) ACC1(x[i]), ACC1(x[i + 1]), ACC1(x[i + 2]), ACC1(x[i + 3])
#define ACC8(x, i) ACC4(x, i), ACC4(x, i + 4)

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAS_WGMMA true
#else /* kernels that use it are empty in other GPUs' code, see sc_cuda_wgmma */
#define HAS_WGMMA false
#endif
template <int N, bool A_M, bool B_N>
__device__ __forceinline__ void wgmma_ss(float (*sum)[4], uint64_t a, uint64_t b) {
    if constexpr (N == 8)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_D_64
                     "}, %32, %33, 1, 1, 1, %34, %35;"
                     : ACC8(sum, 0)
                     : "l"(a), "l"(b), "n"((int)A_M), "n"((int)B_N));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_D_128
                     "}, %64, %65, 1, 1, 1, %66, %67;"
                     : ACC8(sum, 0), ACC8(sum, 8)
                     : "l"(a), "l"(b), "n"((int)A_M), "n"((int)B_N));
}
/* N = 16, B stored [k][n]. */
__device__ __forceinline__ void wgmma_rs(float (*sum)[4], const uint32_t a[4], uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_D_128
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : ACC8(sum, 0), ACC8(sum, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <bool WGMMA> __device__ __forceinline__ void fence_proxy_async() {
    if (WGMMA) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/* Keeps the compiler from moving uses of x across this: it does not know that wgmma reads and
 * writes registers until it is waited for (CUTLASS: warpgroup_fence_operand). */
__device__ __forceinline__ void fence_operand(float &x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void fence_operand(uint32_t &x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, int N> __device__ __forceinline__ void fence_operand(T (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) fence_operand(x[i]);
}
/* x...: accumulators, and A's registers. */
template <bool WGMMA, class... T> __device__ __forceinline__ void wgmma_fence(T &...x) {
    if constexpr (WGMMA) {
        (fence_operand(x), ...);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    }
}
template <bool WGMMA> __device__ __forceinline__ void wgmma_commit_group() {
    if constexpr (WGMMA) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <bool WGMMA, int PENDING = 0, class... T>
__device__ __forceinline__ void wgmma_wait_group(T &...x) {
    if constexpr (WGMMA) {
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
        (fence_operand(x), ...);
    }
}

/* A semaphore orders blocks that add to the same memory (CUTLASS's Semaphore): a block waits until
 * it reads its own number, and releases it with the next one's. What the block wrote before the
 * release (and, for other threads, before a barrier) is visible in the L2 cache to whoever has
 * acquired it. The release is predicated: a branch between wgmmas would serialise them (C7520). */
__device__ __forceinline__ int semaphore_load(const int *semaphore) {
    int number;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(number) : "l"(semaphore) : "memory");
    return number;
}
__device__ __forceinline__ void semaphore_release(bool predicate, int *semaphore, int next) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p fence.acq_rel.gpu; "
                 "@p st.relaxed.gpu.global.s32 [%0], %1; }" ::"l"(semaphore),
                 "r"(next), "r"((int)predicate)
                 : "memory");
}

__device__ __forceinline__ uint32_t pack(float low, float high) { /* two bf16, to nearest */
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
/* 2^x within 2 ulp; subnormal results are 0. */
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

/* ==== Memory =================================================================================
 * Blocks that are given back wait in a list for the next request of about their size, so that a
 * step that repeats allocates nothing. */

struct Block {
    void *p;
    size_t size;
    bool used;
    bool scratch; /* an operation's: the next step wants it again */
};
static struct {
    Block *list;
    int count, capacity;
    size_t held;
} blocks;

/* Sizes come in steps of an eighth at most, so that they repeat, and of 2 MiB at most: the planner
 * asks for one block of nearly all that is left. */
static size_t block_size(size_t bytes) {
    size_t step = 512;
    while (step * 16 < bytes && step < (size_t)2 << 20) step *= 2;
    return (bytes + step - 1) / step * step;
}

static void free_unused_blocks() {
    int kept = 0;
    for (int i = 0; i < blocks.count; i++) {
        Block b = blocks.list[i];
        if (b.used) blocks.list[kept++] = b;
        else check(cudaFree(b.p), "cudaFree"), blocks.held -= b.size;
    }
    blocks.count = kept;
}

static void *no_memory(size_t bytes) {
    size_t left = 0, total = 0;
    if (cudaMemGetInfo(&left, &total) != cudaSuccess) cudaGetLastError();
    return sc_fail("not enough GPU memory: %zu MiB are held and %zu MiB more are needed, but "
                   "%zu of %zu MiB are free; fewer or smaller pictures at once, --weights fp8 or "
                   "--weights-on host need less",
                   blocks.held >> 20, bytes >> 20, left >> 20, total >> 20),
           nullptr;
}

/* The smallest unused block of `size` bytes to a quarter more; operations' are at the end. */
static Block *unused_block(size_t size) {
    Block *best = NULL;
    for (int i = blocks.count - 1; i >= 0 && (!best || best->size > size); i--) {
        Block *b = &blocks.list[i];
        if (!b->used && b->size >= size && b->size <= size + size / 4 &&
            (!best || b->size < best->size))
            best = b;
    }
    return best;
}

/* Makes the list longer if it is full. */
template <class T> static bool make_place(T **list, int count, int *capacity) {
    if (count < *capacity) return true;
    T *longer = (T *)realloc(*list, (size_t)(2 * count + 1024) * sizeof *longer);
    if (!longer) return sc_fail("out of memory: list of GPU memory");
    *list = longer, *capacity = 2 * count + 1024;
    return true;
}

static void *cuda_alloc(size_t bytes) {
    size_t size = block_size(bytes ? bytes : 1);
    Block *unused = unused_block(size);
    if (unused) {
        unused->used = true, unused->scratch = false;
        return unused->p;
    }
    if (!make_place(&blocks.list, blocks.count, &blocks.capacity)) return NULL;
    void *p = NULL;
    cudaError_t status = cudaMalloc(&p, size);
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        free_unused_blocks();
        status = cudaMalloc(&p, size);
        if (status == cudaErrorMemoryAllocation) return cudaGetLastError(), no_memory(size);
    }
    if (!check(status, "cudaMalloc")) return NULL; /* perhaps of a kernel that failed before */
    blocks.held += size;
    blocks.list[blocks.count++] = Block{p, size, true, false};
    return p;
}

/* scratch: it will be wanted again, by the next operation. False: this is no block. */
static bool give_back(void *p, bool scratch) {
    for (int i = blocks.count - 1; i >= 0; i--) {
        if (blocks.list[i].p != p) continue;
        blocks.list[i].used = false, blocks.list[i].scratch = scratch;
#ifndef __CUDACC__
        cudaMemsetAsync(p, 0xff, blocks.list[i].size, gpu.stream); /* late readers get NaN */
#endif
        return true;
    }
    return false;
}

static size_t cuda_memory_left() {
    size_t left = 0, total = 0;
    if (cudaMemGetInfo(&left, &total) != cudaSuccess) return cudaGetLastError(), 0;
    for (int i = 0; i < blocks.count; i++)
        if (!blocks.list[i].used && !blocks.list[i].scratch) left += blocks.list[i].size;
    return left;
}

/* Memory for the length of one operation. */
template <typename T> struct Scratch {
    T *p;
    explicit Scratch(int64_t count) : p(NULL) {
        if (count > 0 && !gpu.failed && !(p = (T *)cuda_alloc((size_t)count * sizeof(T))))
            fail("scratch memory", sc_error());
    }
    ~Scratch() {
        if (p) give_back(p, true);
    }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
};

/* Uploads pass through pinned memory in slices, so that the caller may reuse its own at once. */
enum { STAGES = 16, STAGE_SIZE = 8 << 20 }; /* a step of FLUX at batch 8 takes five */
static struct {
    char *p[STAGES];
    cudaEvent_t done[STAGES];
    int current;
    size_t used;
} staging;

static void cuda_upload(void *device, const void *host, size_t bytes) {
    while (bytes > 0 && !gpu.failed) {
        if (staging.used == STAGE_SIZE) { /* full: go on in the next, once its copies are done */
            check(cudaEventRecord(staging.done[staging.current], gpu.stream), "cudaEventRecord");
            staging.current = (staging.current + 1) % STAGES;
            staging.used = 0;
            check(cudaEventSynchronize(staging.done[staging.current]), "upload");
        }
        size_t n = STAGE_SIZE - staging.used < bytes ? STAGE_SIZE - staging.used : bytes;
        char *stage = staging.p[staging.current] + staging.used;
        memcpy(stage, host, n);
        check(cudaMemcpyAsync(device, stage, n, cudaMemcpyDefault, gpu.stream),
              "upload"); /* streamed: host */
        staging.used += (n + 63) / 64 * 64; /* STAGE_SIZE is a multiple, too */
        device = (char *)device + n;
        host = (const char *)host + n;
        bytes -= n;
    }
}

static bool cuda_download(void *host, const void *device, size_t bytes) {
    if (!gpu.failed && bytes > 0)
        check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDefault, gpu.stream), "download");
    if (!gpu.failed) check(cudaStreamSynchronize(gpu.stream), "a kernel");
    return !gpu.failed || sc_fail("%s", gpu.message);
}

/* Numbers on their way to the host: a ring of pinned memory. */
static struct {
    double *value; /* [SC_POSTS][SC_POST_SIZE] */
    cudaEvent_t done[SC_POSTS];
    int64_t posted, collected;
} posts;

static void cuda_post(const double *device, int count) {
    int i = (int)(posts.posted++ % SC_POSTS);
    if (gpu.failed) return;
    check(cudaMemcpyAsync(posts.value + i * SC_POST_SIZE, device, (size_t)count * sizeof *device,
                          cudaMemcpyDefault, gpu.stream),
          "post");
    check(cudaEventRecord(posts.done[i], gpu.stream), "cudaEventRecord");
}

static bool cuda_collect(double *host, int count) {
    int i = (int)(posts.collected++ % SC_POSTS);
    if (!gpu.failed) check(cudaEventSynchronize(posts.done[i]), "a kernel");
    memcpy(host, posts.value + i * SC_POST_SIZE, (size_t)count * sizeof *host);
    return !gpu.failed || sc_fail("%s", gpu.message);
}

static void cuda_zero(void *p, size_t bytes) {
    if (!gpu.failed && bytes > 0)
        check(cudaMemsetAsync(p, 0, bytes, gpu.stream), "cudaMemsetAsync");
}

/* ==== Streamed matrices ======================================================================
 * A model's matrices may stay in pinned host memory. A matmul asks `on_device` for its copy; what
 * comes next is copied meanwhile on a second stream, into a window of device memory from which the
 * copy that was used longest ago goes first. */

struct Streamed {
    char *host;
    void *device; /* its copy, or NULL */
    size_t size;
    int64_t last_use;
    cudaEvent_t free, copied; /* its memory was free on the main stream; its copy had come */
};
static struct {
    Streamed *list; /* about in the order of a forward pass */
    int count, capacity;
    int64_t uses;
    size_t window, held; /* bytes: allowed, and of all copies */
    cudaStream_t stream;
} streamed;

static void *cuda_alloc_streamed(size_t bytes) {
    if (!streamed.stream &&
        !check(cudaStreamCreateWithFlags(&streamed.stream, cudaStreamNonBlocking), "copy stream"))
        return NULL;
    int place = 0;
    while (place < streamed.count && streamed.list[place].host) place++;
    if (!make_place(&streamed.list, place, &streamed.capacity)) return NULL;
    Streamed s = {};
    s.size = bytes;
    if (cudaMallocHost((void **)&s.host, bytes) != cudaSuccess) {
        cudaGetLastError();
        return sc_fail("out of memory: pinned host memory for streamed weights"), nullptr;
    }
    check(cudaEventCreateWithFlags(&s.copied, cudaEventDisableTiming), "cudaEventCreate");
    check(cudaEventCreateWithFlags(&s.free, cudaEventDisableTiming), "cudaEventCreate");
    if (streamed.window < 8 * bytes)
        streamed.window = 8 * bytes; /* a block of FLUX is 6 of its largest */
    streamed.list[place] = s;
    if (place == streamed.count) streamed.count++;
    return s.host;
}

static void drop_copy(Streamed *s) {
    if (!s->device) return;
    /* It may still be on its way, if it was never used; whoever gets the memory comes after it. */
    check(cudaStreamWaitEvent(gpu.stream, s->copied, 0), "cudaStreamWaitEvent");
    give_back(s->device, true);
    streamed.held -= s->size;
    s->device = NULL;
}

static void release_streamed(void *p) {
    for (int i = 0; i < streamed.count; i++) {
        Streamed *s = &streamed.list[i];
        if (s->host != p) continue;
        drop_copy(s); /* makes the stream wait for a copy that nobody used */
        check(cudaStreamSynchronize(gpu.stream), "a kernel");
        check(cudaFreeHost(s->host), "cudaFreeHost");
        check(cudaEventDestroy(s->copied), "cudaEventDestroy");
        check(cudaEventDestroy(s->free), "cudaEventDestroy");
        s->host = NULL; /* others are known by their index: its place is for the next */
    }
}

static void cuda_release(void *p) {
    if (!give_back(p, false)) release_streamed(p);
}

/* Makes room and starts the copy of matrix i; what was used since `keep` stays. False: no room. */
static bool start_copy(int i, int64_t keep) {
    Streamed *s = &streamed.list[i];
    if (s->device || !s->host) return true;
    while (streamed.held + s->size > streamed.window) {
        Streamed *oldest = NULL;
        for (int j = 0; j < streamed.count; j++) {
            Streamed *other = &streamed.list[j];
            if (other->device && other->last_use < keep &&
                (!oldest || other->last_use < oldest->last_use))
                oldest = other;
        }
        if (!oldest) return false;
        drop_copy(oldest);
    }
    if (!(s->device = cuda_alloc(s->size))) return fail("streamed weights", sc_error());
    streamed.held += s->size;
    s->last_use = streamed.uses; /* not to be dropped before it is used */
    /* The memory may have been some other operation's: after all that is queued. */
    check(cudaEventRecord(s->free, gpu.stream), "cudaEventRecord");
    check(cudaStreamWaitEvent(streamed.stream, s->free, 0), "cudaStreamWaitEvent");
    check(cudaMemcpyAsync(s->device, s->host, s->size, cudaMemcpyDefault, streamed.stream),
          "streamed weights");
    check(cudaEventRecord(s->copied, streamed.stream), "cudaEventRecord");
    return true;
}

/* The device's copy of a streamed matrix; any other pointer is returned as it is. A forward pass
 * multiplies by transposed matrices, a backward pass goes the other way. */
static const void *on_device(const sc_matrix &w) {
    int i = 0, n = streamed.count;
    while (i < n && streamed.list[i].host != w.data) i++;
    if (i == n || gpu.failed) return w.data;
    Streamed *s = &streamed.list[i];
    streamed.uses++;
    start_copy(i, streamed.uses);
    s->last_use = streamed.uses;
    check(cudaStreamWaitEvent(gpu.stream, s->copied, 0), "cudaStreamWaitEvent");
    for (int ahead = 1; ahead <= 8; ahead++) {
        int next = w.transposed ? (i + ahead) % n : i - ahead;
        if (next < 0 || !start_copy(next, streamed.uses)) break; /* all copies are for later */
        if (streamed.list[next].device) streamed.list[next].last_use = streamed.uses;
    }
    return s->device ? s->device : w.data;
}

/* ==== Values, vectors, sums ================================================================== */

__device__ __forceinline__ float value(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float value(float x) { return x; }
/* e4m3: the exponent is moved to f32's place, and its bias made good by a factor of 2^(127 - 7). */
__device__ __forceinline__ float value(uint8_t x) {
    return __uint_as_float((uint32_t)(x & 0x80) << 24 | (uint32_t)(x & 0x7f) << 20) *
           1.329227995784916e36f;
}
__device__ __forceinline__ void set(bf16 *p, float x) { *p = __float2bfloat16_rn(x); }
__device__ __forceinline__ void set(float *p, float x) { *p = x; }

__device__ __forceinline__ float low_bf16(uint32_t x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_bf16(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

/* V values from p on: 8, aligned to 16 bytes (e4m3 to 8), a pair of bf16, or one. */
template <int V> __device__ __forceinline__ void load(float x[V], const bf16 *p) {
    if (V == 1) {
        x[0] = value(*p);
        return;
    }
    uint4 raw = V == 2 ? uint4{*(const uint32_t *)p, 0, 0, 0} : *(const uint4 *)p;
    uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < V / 2; i++)
        x[2 * i] = low_bf16(words[i]), x[2 * i + 1] = high_bf16(words[i]);
}
template <int V> __device__ __forceinline__ void load(float x[V], const float *p) {
    if constexpr (V < 4)
        for (int i = 0; i < V; i++) x[i] = p[i];
    else
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            float4 part = *(const float4 *)(p + i);
            x[i] = part.x, x[i + 1] = part.y, x[i + 2] = part.z, x[i + 3] = part.w;
        }
}
template <int V> __device__ __forceinline__ void load(float x[V], const uint8_t *p) {
    if (V == 1) {
        x[0] = value(*p);
        return;
    }
    uint2 raw = *(const uint2 *)p;
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = value((uint8_t)((i < 4 ? raw.x : raw.y) >> 8 * (i % 4)));
}
template <int V> __device__ __forceinline__ void store(bf16 *p, const float x[V]) {
    if (V == 1) {
        set(p, x[0]);
        return;
    }
    if (V == 2) {
        *(uint32_t *)p = pack(x[0], x[1 % V]);
        return;
    }
    uint4 raw = {pack(x[0], x[1 % V]), pack(x[2 % V], x[3 % V]), pack(x[4 % V], x[5 % V]),
                 pack(x[6 % V], x[7 % V])};
    *(uint4 *)p = raw;
}
/* Adds to a gradient, or stores the first part of one. */
template <int V> __device__ __forceinline__ void add(bf16 *p, const float x[V], bool first) {
    float sum[V] = {0};
    if (!first) load<V>(sum, p);
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] += x[i];
    store<V>(p, sum);
}

/* Activations: all but gelu are x s(u(x)); sigmoid s, and the slope of u in *slope. */
__device__ __forceinline__ float gate(sc_activation kind, float x, float *slope) {
    const float k = 1.5957691216057308f; /* 2 sqrt(2/pi) */
    float u = x;
    *slope = 1;
    if (kind == SC_GELU_TANH)
        u = k * (x + 0.044715f * x * x * x), *slope = k * (1 + 3 * 0.044715f * x * x);
    if (kind == SC_QUICK_GELU) u = 1.702f * x, *slope = 1.702f;
    return 1 / (1 + __expf(-u));
}

/* Whether rows of n values can be read 8 at a time. */
static bool wide(int64_t n, const void *a, const void *b = NULL, const void *c = NULL,
                 const void *d = NULL) {
    return n % 8 == 0 && (((uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)d) & 15) == 0;
}
/* Runs the kernel's 8-wide form where `w`, else its plain one. */
#define LAUNCH(w, kernel, blocks, threads, ...)                                                    \
    launch(#kernel, (w) ? kernel<8> : kernel<1>, grid(blocks), threads, 0, __VA_ARGS__)
/* The same for kernels that take n values one after the other, 256 threads a block. */
#define LAUNCH_FLAT(w, kernel, n, ...)                                                             \
    LAUNCH(w, kernel, ceil_div(n, (w) ? 2048 : 256), 256, __VA_ARGS__)
#define FLAT_INDEX(V) (((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * (V))

template <int LANES = 32> __device__ __forceinline__ float warp_sum(float x) {
    for (int i = LANES / 2; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
    return x;
}

/* Over all threads of the block (whole warps), the same for each. */
template <bool MAX> __device__ float block_reduce(float x) {
    __shared__ float parts[32];
    x = MAX ? warp_max(x) : warp_sum(x);
    __syncthreads(); /* the last call's parts have been read */
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int i = 1; i < (int)blockDim.x / 32; i++) x = MAX ? fmaxf(x, parts[i]) : x + parts[i];
    return x;
}
__device__ __forceinline__ float block_sum(float x) { return block_reduce<false>(x); }

static const bf16 *bf16_data(const sc_tensor *x) { return x ? (const bf16 *)x->data : NULL; }
static bf16 *bf16_grad(const sc_tensor *x) { return (bf16 *)x->grad; }
/* Whether the operation, which writes all of x's gradient, stores it. */
static bool first_part(sc_tensor *x) {
    bool first = x->new_grad;
    x->new_grad = false;
    return first;
}
static const float *f32_data(const sc_tensor *x) { return x ? (const float *)x->data : NULL; }
static int64_t last_size(const sc_tensor *x) { return x->shape[x->ndim - 1]; }
static int64_t row_count(const sc_tensor *x) { return sc_count(x) / last_size(x); }

/* ==== Sums over rows =========================================================================
 * Gradients of what a whole sample, or all rows, share: F gives K values for each column of a row,
 * which are summed over slices of rows, and then over the slices, always in the same order. */

/* partial [sample, slice, K, n]; 32 V columns and 8 rows at a time. */
template <int V, int K, class F>
__global__ void column_partials(float *partial, F f, int64_t sample_rows, int64_t slice_rows,
                                int n) {
    __shared__ float parts[8][K][32 * V];
    int column = threadIdx.x % 32 * V, part = threadIdx.x / 32, c0 = blockIdx.x * 32 * V;
    int64_t first = blockIdx.z * sample_rows + blockIdx.y * slice_rows;
    int64_t end = first + slice_rows, last = (blockIdx.z + 1) * sample_rows;
    if (end > last) end = last;
    float sum[K][V] = {}, x[K][V];
    for (int64_t r = first + part; c0 + column < n && r < end; r += 8) {
        f.template columns<V>(x, r, c0 + column);
        for (int i = 0; i < K * V; i++) sum[i / V][i % V] += x[i / V][i % V];
    }
    for (int i = 0; i < K * V; i++) parts[part][i / V][column + i % V] = sum[i / V][i % V];
    __syncthreads();
    for (int i = threadIdx.x; i < K * 32 * V; i += blockDim.x) {
        int k = i / (32 * V), c = i % (32 * V);
        float total = 0;
        for (int j = 0; j < 8; j++) total += parts[j][k][c];
        if (c0 + c < n)
            partial[((int64_t)(blockIdx.z * gridDim.y + blockIdx.y) * K + k) * n + c0 + c] = total;
    }
}

/* to[sample][c] += the sum of its slices; stride: from one sample's row of `to` to the next. */
template <class T>
__global__ void column_totals(T *to, int64_t stride, const float *partial, int slices, int K, int k,
                              int n) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= n) return;
    float total = 0;
    for (int s = 0; s < slices; s++)
        total += partial[((int64_t)(blockIdx.y * slices + s) * K + k) * n + c];
    T *p = to + blockIdx.y * stride + c;
    set(p, value(*p) + total);
}

/* Adds the K sums over each sample's rows to to[0 .. K-1]. */
template <int K, class T, class F>
static void column_sums(F f, int64_t samples, int64_t rows, int64_t n, T *const to[K],
                        int64_t stride) {
    int64_t slice = 64;
    while (slice < rows && samples * ceil_div(rows, slice) > 4096) slice *= 2;
    int64_t slices = ceil_div(rows, slice);
    Scratch<float> partial(samples * slices * K * n);
    bool w = f.wide();
    launch("column_partials", w ? column_partials<8, K, F> : column_partials<1, K, F>,
           grid(ceil_div(n, w ? 256 : 32), slices, samples), 256, 0, partial.p, f, rows, slice,
           (int)n);
    for (int k = 0; k < K; k++)
        launch("column_totals", column_totals<T>, grid(ceil_div(n, 128), samples), 128, 0, to[k],
               stride, (const float *)partial.p, (int)slices, K, k, (int)n);
}

struct PlainColumns {
    const bf16 *x;
    int64_t n;
    bool wide() const { return ::wide(n, x); }
    template <int V> __device__ void columns(float (*sum)[V], int64_t r, int c) const {
        load<V>(sum[0], x + r * n + c);
    }
};
static void cuda_column_sum(float *sum, const void *x, int64_t rows, int64_t columns) {
    float *to[1] = {sum};
    column_sums<1, float>(PlainColumns{(const bf16 *)x, columns}, 1, rows, columns, to, 0);
}

/* ==== Matrix products ========================================================================
 * C = f(alpha op(A) op(B) + beta C + bias) through cuBLASLt, which is column-major: its view of a
 * row-major matrix is the transposed one, so it is asked for C^T = op(B)^T op(A)^T. Inputs are bf16
 * (others are converted first) or, if all three are f32, f32. How to compute a shape is asked once.
 *
 * Epilogues: the bias; LoRA's part, which is in C before (beta 1); a GELU. cuBLASLt has none for
 * FLUX's residuals, whose gates differ by sample and channel: they are a pass of their own. */

#define CUBLASLT_CALLS(X)                                                                          \
    X(Create)                                                                                      \
    X(GetStatusString)                                                                             \
    X(Matmul)                                                                                      \
    X(MatmulDescCreate)                                                                            \
    X(MatmulDescSetAttribute)                                                                      \
    X(MatrixLayoutCreate)                                                                          \
    X(MatrixLayoutSetAttribute)                                                                    \
    X(MatmulPreferenceCreate)                                                                      \
    X(MatmulPreferenceSetAttribute) X(MatmulPreferenceDestroy) X(MatmulAlgoGetHeuristic)

/* Found at run time, so that the program starts where the library is missing. */
static struct {
#define X(name) decltype(&cublasLt##name) name;
    CUBLASLT_CALLS(X)
#undef X
} lt;

static bool open_cublas() {
#ifdef __CUDACC__
#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)
    const char *name = "libcublasLt.so." TEXT(CUBLAS_VER_MAJOR);
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return sc_fail(
            "no GPU: cannot load cuBLASLt " TEXT(CUBLAS_VER_MAJOR) ": install the CUDA libraries");
    bool all = true;
#define X(name) all = (lt.name = (decltype(lt.name))dlsym(library, "cublasLt" #name)) && all;
    CUBLASLT_CALLS(X)
#undef X
    return all || sc_fail("no GPU: this cuBLASLt lacks a function that is needed");
#else
#define X(name) lt.name = cublasLt##name;
    CUBLASLT_CALLS(X)
#undef X
    return true;
#endif
}

static bool check(cublasStatus_t status, const char *what) {
    return status == CUBLAS_STATUS_SUCCESS || fail(what, lt.GetStatusString(status));
}

enum { WORKSPACE = 64 << 20, PLANS = 1024 };

/* The matrices of a batch lie `stride` elements apart. scale: of e4m3, for each row. */
struct Operand {
    const void *data;
    int64_t ld;
    bool transposed = false;
    int64_t stride = 0;
    const float *scale = NULL;
};

/* Each of C's type, or NULL: bias [n]; where the GELU's input is kept [m,n] (cuBLASLt's aux). */
struct Epilogue {
    const void *bias;
    bool gelu;
    void *before;
};

struct Shape { /* all that the choice of an algorithm depends on; compared byte by byte */
    int64_t m, n, k, lda, ldb, ldc, stride_a, stride_b, stride_c;
    int32_t batch, ta, tb, in, f32_out, scaled;
    int32_t epilogue; /* cublasLtEpilogue_t; in: cudaDataType_t */
    int32_t align_a, align_b, align_c, align_bias, align_before;
};
static_assert(sizeof(Shape) == 9 * 8 + 12 * 4, "no bytes but its members'");
struct Plan {
    Plan *next;
    bool impossible;
    Shape shape;
    cublasLtMatmulDesc_t matmul;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algo;
};
static Plan *plans[PLANS]; /* lists, by hash */

static int32_t alignment(const void *p) { /* the largest power of two up to 256 that divides it */
    int32_t a = 256;
    while ((uintptr_t)p % (uintptr_t)a) a /= 2;
    return a;
}

static bool make_layout(cublasLtMatrixLayout_t *layout, int32_t type, uint64_t rows,
                        uint64_t columns, int64_t ld, const Shape *s, int64_t stride) {
    const char *what = "matrix layout";
    auto set = [&](cublasLtMatrixLayoutAttribute_t name, const auto &x) {
        return check(lt.MatrixLayoutSetAttribute(*layout, name, &x, sizeof x), what);
    };
    return check(lt.MatrixLayoutCreate(layout, (cudaDataType_t)type, rows, columns, ld), what) &&
           set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, s->batch) &&
           set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, stride);
}

static bool has_gelu(int32_t epilogue) { return (epilogue & CUBLASLT_EPILOGUE_GELU) != 0; }

/* cuBLASLt has no algorithm: the caller has another way to multiply e4m3 or to apply a
 * GELU, for anything else it is a failure. */
static bool refused(Plan *p, cublasStatus_t status) {
    const Shape *s = &p->shape;
    p->impossible = s->in == CUDA_R_8F_E4M3 || has_gelu(s->epilogue);
    char text[160];
    snprintf(text, sizeof text,
             "no way to multiply [%lld,%lld] by [%lld,%lld] (type %d, epilogue %d, aligned to %d, "
             "%d, %d)",
             (long long)s->m, (long long)s->k, (long long)s->k, (long long)s->n, s->in, s->epilogue,
             s->align_a, s->align_b, s->align_c);
    if (verbose()) fprintf(stderr, "cuBLASLt: %s: %s\n", text, lt.GetStatusString(status));
    return !p->impossible && fail(text, lt.GetStatusString(status));
}

static bool find_algorithm(Plan *p) {
    const Shape *s = &p->shape;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t found;
    int count = 0;
    if (!check(lt.MatmulPreferenceCreate(&preference), "matmul preference")) return false;
    auto set = [&](cublasLtMatmulPreferenceAttributes_t name, const auto &x) {
        check(lt.MatmulPreferenceSetAttribute(preference, name, &x, sizeof x), "matmul preference");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)WORKSPACE);
    /* Slices of k are added in f32, or not cut: in C's own type each would be rounded to bf16. */
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, s->align_b); /* its A is our B */
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, s->align_a);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, s->align_c);
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, s->align_c);
    cublasStatus_t status = lt.MatmulAlgoGetHeuristic(gpu.lt, p->matmul, p->a, p->b, p->c, p->c,
                                                      preference, 1, &found, &count);
    lt.MatmulPreferenceDestroy(preference);
    if (status == CUBLAS_STATUS_SUCCESS && count > 0 && found.state == CUBLAS_STATUS_SUCCESS) {
        p->algo = found.algo;
        return true;
    }
    return refused(p, status);
}

template <class T>
static bool set_attribute(Plan *p, cublasLtMatmulDescAttributes_t name, const T &value) {
    return check(lt.MatmulDescSetAttribute(p->matmul, name, &value, sizeof value), "matmul");
}

/* The pointers count, too: how they are aligned decides which algorithms are found. */
static bool set_pointers(Plan *p, const Epilogue &e, const float *scale_a, const float *scale_b) {
    bool ok = !e.bias || set_attribute(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, e.bias);
    if (e.before) ok = ok && set_attribute(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, e.before);
    if (p->shape.scaled)
        ok = ok && set_attribute(p, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, scale_b) &&
             set_attribute(p, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, scale_a);
    return ok;
}

static bool make_plan(Plan *p, const Epilogue &e, const float *scale_a, const float *scale_b) {
    const Shape *s = &p->shape;
    cublasOperation_t ta = s->ta ? CUBLAS_OP_T : CUBLAS_OP_N,
                      tb = s->tb ? CUBLAS_OP_T : CUBLAS_OP_N;
    bool ok = check(lt.MatmulDescCreate(&p->matmul, CUBLAS_COMPUTE_32F, CUDA_R_32F), "matmul");
#if CUBLAS_VERSION >= 120900
    if (s->scaled) { /* each result is multiplied by the scales of its two rows */
        cublasLtMatmulMatrixScale_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
        const cublasLtMatmulDescAttributes_t modes[] = {CUBLASLT_MATMUL_DESC_A_SCALE_MODE,
                                                        CUBLASLT_MATMUL_DESC_B_SCALE_MODE};
        for (auto name : modes)
            if (ok && lt.MatmulDescSetAttribute(p->matmul, name, &mode, sizeof mode) !=
                          CUBLAS_STATUS_SUCCESS) /* a library older than this program's headers */
                return refused(p, CUBLAS_STATUS_NOT_SUPPORTED);
    }
#else
    if (s->scaled) return refused(p, CUBLAS_STATUS_NOT_SUPPORTED);
#endif
    if (e.before) ok = ok && set_attribute(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, s->n);
    if (s->in == CUDA_R_8F_E4M3) /* sums with fewer bits, but more than their terms have */
        ok = ok && set_attribute(p, CUBLASLT_MATMUL_DESC_FAST_ACCUM, (int8_t)1);
    return ok && set_attribute(p, CUBLASLT_MATMUL_DESC_TRANSA, tb) &&
           set_attribute(p, CUBLASLT_MATMUL_DESC_TRANSB, ta) &&
           set_attribute(p, CUBLASLT_MATMUL_DESC_EPILOGUE, (cublasLtEpilogue_t)s->epilogue) &&
           set_pointers(p, e, scale_a, scale_b) &&
           make_layout(&p->a, s->in, s->tb ? s->k : s->n, s->tb ? s->n : s->k, s->ldb, s,
                       s->stride_b) &&
           make_layout(&p->b, s->in, s->ta ? s->m : s->k, s->ta ? s->k : s->m, s->lda, s,
                       s->stride_a) &&
           make_layout(&p->c, s->f32_out ? CUDA_R_32F : CUDA_R_16BF, s->n, s->m, s->ldc, s,
                       s->stride_c) &&
           find_algorithm(p);
}

/* The plan of a batched product; NULL: none (of e4m3, or with a GELU), or a failure. */
static Plan *plan_for(int64_t m, int64_t n, int64_t k, Operand a, Operand b, cudaDataType_t in,
                      Operand c, bool f32_out, Epilogue e, int64_t batch) {
    Shape s = {};
    s.m = m, s.n = n, s.k = k, s.lda = a.ld, s.ldb = b.ld, s.ldc = c.ld, s.batch = (int32_t)batch;
    s.stride_a = a.stride, s.stride_b = b.stride, s.stride_c = c.stride;
    s.ta = a.transposed, s.tb = b.transposed, s.in = in, s.f32_out = f32_out;
    s.scaled = a.scale != NULL;
    s.epilogue = (e.bias ? CUBLASLT_EPILOGUE_BIAS : 0) | (e.gelu ? CUBLASLT_EPILOGUE_GELU : 0) |
                 (e.before ? CUBLASLT_EPILOGUE_GELU_AUX : 0);
    if (!s.epilogue) s.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    s.align_a = alignment(a.data), s.align_b = alignment(b.data), s.align_c = alignment(c.data);
    s.align_bias = alignment(e.bias), s.align_before = alignment(e.before);
    uint64_t hash = 1469598103934665603u;
    for (size_t i = 0; i < sizeof s; i++) hash = (hash ^ ((uint8_t *)&s)[i]) * 1099511628211u;
    Plan **list = &plans[hash % PLANS], *p = *list;
    while (p && memcmp(&p->shape, &s, sizeof s)) p = p->next;
    if (!p) {
        if (!(p = (Plan *)calloc(1, sizeof *p))) return fail("matmul", "out of memory"), nullptr;
        p->next = *list, p->shape = s, *list = p;
        make_plan(p, e, a.scale, b.scale);
    }
    return p->impossible || gpu.failed ? NULL : p;
}

/* A batched product. False: there is no algorithm, as may be of e4m3 or with a GELU only. */
static bool matmul(int64_t m, int64_t n, int64_t k, float alpha, Operand a, Operand b,
                   cudaDataType_t in, float beta, Operand c, bool f32_out, Epilogue e,
                   int64_t batch) {
    if (gpu.failed || m == 0 || n == 0 || batch == 0) return true;
    Plan *p = plan_for(m, n, k, a, b, in, c, f32_out, e, batch);
    if (!p) return gpu.failed;
    set_pointers(p, e, a.scale, b.scale);
    cublasStatus_t status =
        lt.Matmul(gpu.lt, p->matmul, &alpha, b.data, p->a, a.data, p->b, &beta, c.data, p->c,
                  (void *)c.data, p->c, &p->algo, gpu.workspace, WORKSPACE, gpu.stream);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE)
        return refused(p, status) || gpu.failed; /* the heuristic does not know beta */
    check(status, "matmul");
    return true;
}

/* to [rows, columns], bf16, from rows `ld` apart, each times its scale. */
template <int V, class T>
__global__ void convert_kernel(bf16 *to, const T *from, const float *scale, int64_t columns,
                               int64_t ld) {
    int64_t r = blockIdx.y, c = FLAT_INDEX(V);
    if (c >= columns) return;
    float x[V], s = scale ? scale[r] : 1;
    load<V>(x, from + r * ld + c);
    for (int j = 0; j < V; j++) x[j] *= s;
    store<V>(to + r * columns + c, x);
}

template <class T>
static void convert(bf16 *to, const T *from, const float *scale, int64_t rows, int64_t columns,
                    int64_t ld) {
    if (ld == columns && !scale) columns *= rows, ld = columns, rows = 1;
    bool w = wide(columns | ld, to, from);
    for (int64_t r = 0; r < rows; r += 65535) { /* the grid's limit */
        int64_t some = rows - r < 65535 ? rows - r : 65535;
        launch("convert", w ? convert_kernel<8, T> : convert_kernel<1, T>,
               grid(ceil_div(columns, w ? 2048 : 256), some), 256, 0, to + r * columns,
               from + r * ld, scale ? scale + r : NULL, columns, ld);
    }
}

/* The stored [rows, columns] matrix `a` in bf16: itself, or converted into `buffer`. */
static Operand as_bf16(sc_matrix a, int64_t rows, int64_t columns, bf16 *buffer) {
    if (a.dtype == SC_BF16) return Operand{a.data, a.ld, a.transposed};
    if (a.dtype == SC_F32) convert(buffer, (const float *)a.data, NULL, rows, columns, a.ld);
    else if (a.dtype == SC_F8_E4M3)
        convert(buffer, (const uint8_t *)a.data, a.scale, rows, columns, a.ld);
    else fail("matmul", "matrices must be f32, bf16 or e4m3");
    return Operand{buffer, columns, a.transposed};
}

/* Two values to nearest even, as sc__f32_to_f8 of shortcut.h. */
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
#if __CUDA_ARCH__ >= 890 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    uint32_t pair = 0;
    for (float x : {high, low}) {
        uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
        uint32_t byte = (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1)) >> 20;
        if (magnitude < 0x3c800000u) byte = (uint32_t)rintf(__uint_as_float(magnitude) * 512.f);
        if (magnitude >= 0x43e00000u) byte = magnitude > 0x7f800000u ? 0x7f : 0x7e;
        pair = pair << 8 | (bits >> 24 & 0x80) | byte;
    }
    return pair;
#endif
}

/* The values from[c] factor[c] (factor NULL: 1) of a row, which a block of 128 threads shares. */
template <int V>
__device__ __forceinline__ void scaled(float v[V], const bf16 *from, const float *factor,
                                       int64_t c) {
    float f[V];
    load<V>(v, from + c);
    if (!factor) return;
    load<V>(f, factor + c);
    for (int j = 0; j < V; j++) v[j] *= f[j];
}

template <int V>
__global__ void quantize_kernel(uint8_t *to, float *scale, const bf16 *from, const float *factor,
                                int64_t columns, int64_t ld) {
    float v[V], largest = 0;
    from += blockIdx.x * ld, to += blockIdx.x * columns;
    for (int64_t c = threadIdx.x * V; c < columns; c += blockDim.x * V) {
        scaled<V>(v, from, factor, c);
        for (int j = 0; j < V; j++) largest = fmaxf(largest, fabsf(v[j]));
    }
    largest = block_reduce<true>(largest);
    float s = largest > 1e-35f ? largest / 448.f : 1.f, inverse = 1 / s;
    auto divide = [&](float x) { /* x / s, rounded as on the CPU */
                                 return fmaf(fmaf(-x * inverse, s, x), inverse, x * inverse);
    };
    if (threadIdx.x == 0) scale[blockIdx.x] = s;
    for (int64_t c = threadIdx.x * V; c < columns; c += blockDim.x * V) {
        scaled<V>(v, from, factor, c);
        uint32_t bytes[2] = {0, 0};
        for (int j = 0; j < V; j += 2)
            bytes[j / 4] |= pack_e4m3(divide(v[j]), divide(v[(j + 1) % V])) << 8 * (j % 4);
        if (V == 8) *(uint2 *)(to + c) = make_uint2(bytes[0], bytes[1]);
        else to[c] = (uint8_t)bytes[0];
    }
}

static void quantize(uint8_t *to, float *scale, const bf16 *from, const float *factor, int64_t rows,
                     int64_t columns, int64_t ld) {
    bool w = wide(columns, from, to, factor) && ld % 8 == 0;
    LAUNCH(w, quantize_kernel, rows, 128, to, scale, from, factor, columns, ld);
}
static void cuda_quantize(uint8_t *to, float *scale, const void *from, int64_t rows,
                          int64_t columns) {
    quantize(to, scale, (const bf16 *)from, NULL, rows, columns, columns);
}

/* to [n,k] = the bytes of from [k,n], in tiles of 64 x 64: 4 x 4 a thread. ones [n] = 1. */
__global__ void transpose_bytes_kernel(uint8_t *to, float *ones, const uint8_t *from, int64_t k,
                                       int64_t n, int64_t ld) {
    __shared__ uint32_t tile[64][17];
    int x = threadIdx.x % 16, y = threadIdx.x / 16;
    int64_t row = blockIdx.y * 64 + y * 4, column = blockIdx.x * 64 + x * 4;
    uint32_t in[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4; i++) /* n and k are multiples of 16 */
        if (row < k && column < n) in[i] = *(const uint32_t *)(from + (row + i) * ld + column);
    for (int j = 0; j < 4; j++) {
        uint32_t out = 0;
        for (int i = 0; i < 4; i++) out |= (in[i] >> 8 * j & 0xff) << 8 * i;
        tile[x * 4 + j][y] = out;
    }
    __syncthreads();
    row = blockIdx.x * 64 + y * 4, column = blockIdx.y * 64 + x * 4;
    for (int i = 0; i < 4; i++)
        if (row < n && column < k) *(uint32_t *)(to + (row + i) * k + column) = tile[y * 4 + i][x];
    if (blockIdx.y == 0 && threadIdx.x < 64 && blockIdx.x * 64 + threadIdx.x < n)
        ones[blockIdx.x * 64 + threadIdx.x] = 1;
}

/* Whether y = x w^T, or x w in the backward pass, may go to fp8 tensor cores, x then becoming e4m3
 * with a scale for each row, too. cuBLASLt wants rows aligned to 16 bytes. Few rows, such as the
 * modulation's, would gain little, and are worth more bits: few_rows_kernel, or bf16. */
static bool fits_fp8(int64_t m, int64_t n, int64_t k, sc_matrix x, sc_matrix w, Operand y,
                     bool f32_out) {
    return gpu.capability >= 89 && x.dtype == SC_BF16 && w.dtype == SC_F8_E4M3 && w.scale &&
           !x.transposed && m >= 16 && n % 16 == 0 && k % 16 == 0 && w.ld % 16 == 0 &&
           (uintptr_t)w.data % 16 == 0 && y.ld % 8 == 0 && (uintptr_t)y.data % 16 == 0 && !f32_out;
}

/* to = f(v + beta to + bias), of row r, columns c ...; e.before has rows of n. */
template <int V>
__device__ __forceinline__ void finish(bf16 *to, float v[V], float beta, const Epilogue &e,
                                       int64_t r, int64_t c, int64_t n) {
    float old[V] = {0}, bias[V] = {0}, slope;
    if (beta != 0) load<V>(old, to);
    if (e.bias) load<V>(bias, (const bf16 *)e.bias + c);
    for (int j = 0; j < V; j++) v[j] += beta * old[j] + bias[j];
    if (e.before) store<V>((bf16 *)e.before + r * n + c, v);
    for (int j = 0; e.gelu && j < V; j++) v[j] *= gate(SC_GELU_TANH, v[j], &slope);
    store<V>(to, v);
}

/* y = f(alpha rows[r] columns[c] sum + beta y + bias); `sum` has rows of n. */
template <int V>
__global__ void scale_kernel(bf16 *y, int64_t ld, const bf16 *sum, const float *rows,
                             const float *columns, float alpha, float beta, Epilogue e, int64_t n,
                             int64_t total) {
    int64_t i = FLAT_INDEX(V), r = i / n, c = i % n;
    if (i >= total) return;
    float v[V], s[V];
    load<V>(v, sum + i);
    load<V>(s, columns + c);
    for (int j = 0; j < V; j++) v[j] *= alpha * rows[r] * s[j];
    finish<V>(y + r * ld + c, v, beta, e, r, c, n);
}

/* The same of alpha x w^T for 8 rows of x and e4m3 w [n,k]: a warp to a row of w. */
__global__ void few_rows_kernel(bf16 *y, int64_t ld, const bf16 *x, int64_t x_ld, sc_matrix w,
                                float alpha, float beta, Epilogue e, int m, int n, int k) {
    int lane = threadIdx.x % 32, c = blockIdx.x * 8 + threadIdx.x / 32;
    if (c >= n) return;
    float sum[8] = {}, a[8], b[8];
    y += blockIdx.y * 8 * ld, x += blockIdx.y * 8 * x_ld, m -= blockIdx.y * 8;
    for (int j = lane * 8; j < k; j += 256) {
        load<8>(b, (const uint8_t *)w.data + c * w.ld + j);
#pragma unroll
        for (int r = 0; r < 8; r++) {
            if (r >= m) break;
            load<8>(a, x + r * x_ld + j);
            for (int i = 0; i < 8; i++) sum[r] += a[i] * b[i];
        }
    }
    for (int r = 0; r < 8; r++) {
        float v = alpha * warp_sum(sum[r]) * (w.scale ? w.scale[c] : 1);
        if (lane == r && r < m) finish<1>(y + r * ld + c, &v, beta, e, blockIdx.y * 8 + r, c, n);
    }
}

/* The left matrix of the last e4m3 product: the next layer may have the same. */
static struct {
    uint8_t *data;
    float *scale;
    int64_t size, rows; /* allocated */
    uint64_t content;
} quantized;

static bool reserve_quantized(int64_t m, int64_t k) {
    if (quantized.size >= m * k && quantized.rows >= m) return true;
    if (quantized.data) cuda_release(quantized.data);
    if (quantized.scale) cuda_release(quantized.scale);
    memset(&quantized, 0, sizeof quantized);
    quantized.data = (uint8_t *)cuda_alloc((size_t)(m * k));
    quantized.scale = (float *)cuda_alloc((size_t)m * 4);
    if (!quantized.data || !quantized.scale) return fail("e4m3 matrix", sc_error());
    quantized.size = m * k, quantized.rows = m;
    return true;
}

static void quantize_left(int64_t m, int64_t k, sc_matrix x, const float *factor) {
    if (x.content && x.content == quantized.content) return; /* never with a factor */
    quantize(quantized.data, quantized.scale, (const bf16 *)x.data, factor, m, k, x.ld);
    quantized.content = x.content;
}

/* cuBLASLt wants rows of x and w side by side. In the backward pass, w is transposed for that, and
 * its rows' scales, which then belong to columns, go into x before that is quantised. Scales of
 * rows are cuBLASLt's work where it can (compute capability 9.0), else scale_kernel's. */
static bool fp8_matmul(int64_t m, int64_t n, int64_t k, float alpha, sc_matrix x, sc_matrix w,
                       float beta, Operand y, Epilogue e) {
    bool transpose = !w.transposed;
    Scratch<uint8_t> transposed(transpose ? n * k : 0);
    Scratch<float> ones(transpose ? n : 0);
    if (gpu.failed || !reserve_quantized(m, k)) return true;
    const float *columns = transpose ? ones.p : w.scale;
    Operand px = {quantized.data, k, false, 0, quantized.scale},
            pw = {w.data, w.ld, true, 0, columns};
    if (transpose) pw.data = transposed.p, pw.ld = k;
    Operand qx = px, qw = pw, to = {NULL, n}; /* the second way, without scales */
    qx.scale = qw.scale = NULL;
    if (!plan_for(m, n, k, px, pw, CUDA_R_8F_E4M3, y, false, e, 1) &&
        !plan_for(m, n, k, qx, qw, CUDA_R_8F_E4M3, to, false, Epilogue(), 1))
        return gpu.failed;
    if (transpose)
        launch("transpose_bytes", transpose_bytes_kernel, grid(ceil_div(n, 64), ceil_div(k, 64)),
               256, 0, transposed.p, ones.p, (const uint8_t *)w.data, k, n, w.ld);
    quantize_left(m, k, x, transpose ? w.scale : NULL);
    if (matmul(m, n, k, alpha, px, pw, CUDA_R_8F_E4M3, beta, y, false, e, 1)) return true;
    Scratch<bf16> sum(m * n);
    to.data = sum.p;
    if (!matmul(m, n, k, 1, qx, qw, CUDA_R_8F_E4M3, 0, to, false, Epilogue(), 1)) return false;
    bool wide_rows = wide(n | y.ld, y.data, columns, e.bias, e.before);
    LAUNCH_FLAT(wide_rows, scale_kernel, m * n, (bf16 *)y.data, y.ld, (const bf16 *)sum.p,
                (const float *)quantized.scale, columns, alpha, beta, e, n, m * n);
    return true;
}

/* As gemm, b on the device. False: there is no such product with a GELU, and C is as it was. */
static bool multiply(int64_t m, int64_t n, int64_t k, float alpha, sc_matrix a, sc_matrix b,
                     float beta, sc_matrix c, const sc_tensor *bias, bool gelu, void *before) {
    Operand to = {c.data, c.ld};
    bool f32 = c.dtype == SC_F32;
    if (f32 && a.dtype == SC_F32 && b.dtype == SC_F32) {
        Operand pa = {a.data, a.ld, a.transposed}, pb = {b.data, b.ld, b.transposed};
        return matmul(m, n, k, alpha, pa, pb, CUDA_R_32F, beta, to, true,
                      Epilogue{f32_data(bias), false, NULL}, 1);
    }
    Scratch<bf16> bf16_bias(bias && !f32 ? n : 0);
    if (bf16_bias.p) convert(bf16_bias.p, f32_data(bias), NULL, 1, n, n);
    Epilogue e = {f32 ? (const void *)f32_data(bias) : bf16_bias.p, gelu, before};
    if (m < 16 && !f32 && a.dtype == SC_BF16 && b.dtype == SC_F8_E4M3 && !a.transposed &&
        b.transposed && wide(k | a.ld | b.ld, a.data, b.data)) {
        launch("few_rows", few_rows_kernel, grid(ceil_div(n, 8), ceil_div(m, 8)), 256, 0,
               (bf16 *)c.data, c.ld, (const bf16 *)a.data, a.ld, b, alpha, beta, e, m, n, k);
        return true;
    }
    if (fits_fp8(m, n, k, a, b, to, f32) && fp8_matmul(m, n, k, alpha, a, b, beta, to, e))
        return true;
    Scratch<bf16> wa(a.dtype == SC_BF16 ? 0 : m * k), wb(b.dtype == SC_BF16 ? 0 : k * n);
    Operand pa = as_bf16(a, a.transposed ? k : m, a.transposed ? m : k, wa.p);
    Operand pb = as_bf16(b, b.transposed ? n : k, b.transposed ? k : n, wb.p);
    return matmul(m, n, k, alpha, pa, pb, CUDA_R_16BF, beta, to, f32, e, 1);
}

static void cuda_gemm(int64_t m, int64_t n, int64_t k, float alpha, sc_matrix a, sc_matrix b,
                      float beta, sc_matrix c, const sc_tensor *bias) {
    b.data = on_device(b); /* a layer's weight is always the second matrix */
    multiply(m, n, k, alpha, a, b, beta, c, bias, false, NULL);
}

/* ==== Copies and elementwise operations ====================================================== */

/* Rows of `columns` chunks of `size` bytes (1, 2, 4, 16). */
__global__ void copy_kernel(char *dst, int64_t dst_ld, const char *src, int64_t src_ld,
                            int64_t total, int64_t columns, int size) {
    int64_t i = FLAT_INDEX(1);
    if (i >= total) return;
    dst += (i / columns * dst_ld + i % columns) * size;
    src += (i / columns * src_ld + i % columns) * size;
    if (size == 16) *(uint4 *)dst = *(const uint4 *)src;
    else if (size == 4) *(uint32_t *)dst = *(const uint32_t *)src;
    else if (size == 2) *(uint16_t *)dst = *(const uint16_t *)src;
    else *dst = *src;
}

template <int V>
__global__ void add_block_kernel(bf16 *dst, int64_t dst_ld, const bf16 *src, int64_t src_ld,
                                 int64_t rows, int64_t columns) {
    int64_t i = FLAT_INDEX(V);
    if (i >= rows * columns) return;
    float x[V];
    load<V>(x, src + i / columns * src_ld + i % columns);
    add<V>(dst + i / columns * dst_ld + i % columns, x, false);
}

static void cuda_copy_block(void *dst, int64_t dst_ld, const void *src, int64_t src_ld,
                            int64_t rows, int64_t columns, sc_dtype dtype, bool accumulate) {
    int64_t size = sc_dtype_size(dtype);
    uintptr_t all = (uintptr_t)dst | (uintptr_t)src | (uintptr_t)(dst_ld * size) |
                    (uintptr_t)(src_ld * size) | (uintptr_t)(columns * size);
    if (accumulate && dtype != SC_BF16) fail("copy_block", "only bf16 accumulates");
    else if (accumulate)
        LAUNCH_FLAT(all % 16 == 0, add_block_kernel, rows * columns, (bf16 *)dst, dst_ld,
                    (const bf16 *)src, src_ld, rows, columns);
    else {
        int64_t chunk = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : all % 2 == 0 ? 2 : 1;
        int64_t n = columns * size / chunk;
        launch("copy", copy_kernel, grid(ceil_div(rows * n, 256)), 256, 0, (char *)dst,
               dst_ld * size / chunk, (const char *)src, src_ld * size / chunk, rows * n, n, chunk);
    }
}

/* Host numbers travel as a kernel's argument: up to 32 samples. */
struct Factors {
    float x[64];
};

template <int V>
__global__ void blend_kernel(bf16 *y, Factors f, const bf16 *u, const bf16 *v, int64_t n,
                             int64_t total) {
    int64_t i = FLAT_INDEX(V);
    if (i >= total) return;
    float a[V], b[V], p = f.x[2 * (i / n)], q = f.x[2 * (i / n) + 1];
    load<V>(a, u + i);
    load<V>(b, v + i);
    for (int j = 0; j < V; j++) a[j] = p * a[j] + q * b[j];
    store<V>(y + i, a);
}

static void cuda_blend(sc_tensor *y, const float *p, const sc_tensor *u, const float *q,
                       const sc_tensor *v) {
    int64_t batch = y->shape[0], n = sc_count(y) / batch;
    for (int64_t b = 0; b < batch; b += 32) {
        Factors f = {{0}};
        int64_t count = batch - b < 32 ? batch - b : 32;
        for (int64_t i = 0; i < count; i++) f.x[2 * i] = p[b + i], f.x[2 * i + 1] = q[b + i];
        bf16 *out = (bf16 *)y->data + b * n;
        const bf16 *pu = bf16_data(u) + b * n, *pv = bf16_data(v) + b * n;
        LAUNCH_FLAT(wide(n, out, pu, pv), blend_kernel, count * n, out, f, pu, pv, n, count * n);
    }
}

template <int V> __global__ void multiply_kernel(bf16 *y, const bf16 *a, const bf16 *b, int64_t n) {
    int64_t i = FLAT_INDEX(V);
    if (i >= n) return;
    float x[V], z[V];
    load<V>(x, a + i);
    load<V>(z, b + i);
    for (int j = 0; j < V; j++) x[j] *= z[j];
    store<V>(y + i, x);
}
static void cuda_multiply(sc_tensor *y, const sc_tensor *a, const sc_tensor *b) {
    int64_t n = sc_count(y);
    bool w = wide(n, y->data, a->data, b->data);
    LAUNCH_FLAT(w, multiply_kernel, n, (bf16 *)y->data, bf16_data(a), bf16_data(b), n);
}

/* A few numbers, which are the CPU's. */
static void cuda_embed_timestep(sc_tensor *y, const float *t) {
    sc_tensor host = *y;
    int64_t n = sc_count(y);
    Scratch<float> device(n);
    if (!(host.data = malloc((size_t)n * sizeof(float)))) fail("embed_timestep", "out of memory");
    if (gpu.failed) return free(host.data);
    host.dtype = SC_F32;
    sc_cpu()->embed_timestep(&host, t);
    cuda_upload(device.p, host.data, (size_t)n * sizeof(float));
    convert((bf16 *)y->data, device.p, NULL, 1, n, n);
    free(host.data);
}

/* Rows of n values, x_ld and y_ld apart; y may be x. */
template <int V>
__global__ void activate_kernel(sc_activation kind, bf16 *y, int64_t y_ld, const bf16 *x,
                                int64_t x_ld, int64_t n, int64_t total) {
    int64_t i = FLAT_INDEX(V);
    if (i >= total) return;
    float v[V], slope;
    load<V>(v, x + i / n * x_ld + i % n);
    for (int j = 0; j < V; j++)
        v[j] = kind == SC_GELU ? 0.5f * v[j] * (1 + erff(v[j] * 0.70710678f))
                               : v[j] * gate(kind, v[j], &slope);
    store<V>(y + i / n * y_ld + i % n, v);
}

static void activate_rows(sc_activation kind, bf16 *y, int64_t y_ld, const bf16 *x, int64_t x_ld,
                          int64_t rows, int64_t n) {
    bool w = wide(n | y_ld | x_ld, y, x);
    LAUNCH_FLAT(w, activate_kernel, rows * n, kind, y, y_ld, x, x_ld, n, rows * n);
}
static void cuda_activate(sc_activation kind, sc_tensor *y, int64_t at, const sc_tensor *x) {
    activate_rows(kind, (bf16 *)y->data + at, last_size(y), bf16_data(x), last_size(x),
                  row_count(x), last_size(x));
}

template <int V>
__global__ void activate_backward_kernel(sc_activation kind, bf16 *dx, const bf16 *dy,
                                         int64_t width, const bf16 *x, int64_t n, int64_t total,
                                         bool first) {
    int64_t i = FLAT_INDEX(V);
    if (i >= total) return;
    float v[V], d[V], slope;
    load<V>(v, x + i);
    load<V>(d, dy + i / n * width + i % n);
    for (int j = 0; j < V; j++) {
        if (kind == SC_GELU) {
            float density = 0.39894228f * __expf(-0.5f * v[j] * v[j]);
            d[j] *= 0.5f * (1 + erff(v[j] * 0.70710678f)) + v[j] * density;
        } else {
            float s = gate(kind, v[j], &slope);
            d[j] *= s + v[j] * s * (1 - s) * slope;
        }
    }
    add<V>(dx + i, d, first);
}

static void cuda_activate_backward(sc_activation kind, const sc_tensor *y, int64_t at,
                                   sc_tensor *x) {
    int64_t n = last_size(x), width = last_size(y), total = sc_count(x);
    const bf16 *dy = bf16_grad(y) + at;
    bool w = wide(n | width, dy, x->grad, x->data);
    LAUNCH_FLAT(w, activate_backward_kernel, total, kind, bf16_grad(x), dy, width, bf16_data(x), n,
                total, first_part(x));
}

/* cuBLASLt's GELU is the tanh form, and part of the product on chips of compute capability 9.0 (on
 * others it is slower than a pass of its own). What it keeps for the backward pass has rows of 16
 * bytes; other sizes and chips, and what it refuses, take one pass more. */
static void cuda_gemm_gelu(int64_t m, int64_t n, int64_t k, sc_matrix a, sc_matrix b, float beta,
                           sc_matrix c, const sc_tensor *bias, sc_tensor *before) {
    b.data = on_device(b);
    bf16 *y = (bf16 *)c.data;
    if (gpu.capability == 90 && n % 8 == 0 &&
        multiply(m, n, k, 1, a, b, beta, c, bias, true, before ? before->data : NULL))
        return;
    multiply(m, n, k, 1, a, b, beta, c, bias, false, NULL);
    if (before) cuda_copy_block(before->data, n, y, c.ld, m, n, SC_BF16, false);
    activate_rows(SC_GELU_TANH, y, c.ld, y, c.ld, m, n);
}

/* ==== Modulated layer norm and gated residual ================================================
 * A block of 128 threads to a row. */

/* Mean (0 if not `centred`) and 1 / sqrt(variance + eps) of a row. */
template <int V>
__device__ void moments(const bf16 *x, int n, float eps, bool centred, float *mean,
                        float *inverse) {
    float v[V], sum = 0, square = 0;
    for (int c = threadIdx.x * V; centred && c < n; c += blockDim.x * V) {
        load<V>(v, x + c);
        for (int j = 0; j < V; j++) sum += v[j];
    }
    float m = block_sum(sum) / (float)n;
    for (int c = threadIdx.x * V; c < n; c += blockDim.x * V) {
        load<V>(v, x + c);
        for (int j = 0; j < V; j++) square += (v[j] - m) * (v[j] - m);
    }
    *mean = m;
    *inverse = 1 / sqrtf(block_sum(square) / (float)n + eps);
}

/* What mod [B, width] holds for a row: its sample's shift or scale or gate, at column `at`. */
struct Modulation {
    const bf16 *mod;
    int64_t tokens, width;
    __device__ const bf16 *row(int64_t r, int64_t at) const {
        return mod + r / tokens * width + at;
    }
};

template <int V>
__global__ void ln_modulate_kernel(bf16 *y, const bf16 *x, Modulation mod, int n, int64_t shift,
                                   int64_t scale) {
    int64_t r = blockIdx.x;
    const bf16 *a = mod.row(r, scale), *b = mod.row(r, shift);
    float v[V], s[V], t[V], mean, inverse;
    x += r * n;
    moments<V>(x, n, 1e-6f, true, &mean, &inverse);
    for (int c = threadIdx.x * V; c < n; c += blockDim.x * V) {
        load<V>(v, x + c);
        load<V>(s, a + c);
        load<V>(t, b + c);
        for (int j = 0; j < V; j++) v[j] = (v[j] - mean) * inverse * (1 + s[j]) + t[j];
        store<V>(y + r * n + c, v);
    }
}

/* dx (or NULL), and each row's (mean, inverse) into stats. */
template <int V>
__global__ void ln_modulate_backward_kernel(bf16 *dx, float2 *stats, const bf16 *dy, const bf16 *x,
                                            Modulation mod, int n, int64_t scale, bool first) {
    int64_t r = blockIdx.x;
    const bf16 *a = mod.row(r, scale);
    float v[V], d[V], s[V], mean, inverse, g_sum = 0, gn_sum = 0;
    x += r * n, dy += r * n;
    moments<V>(x, n, 1e-6f, true, &mean, &inverse);
    if (threadIdx.x == 0) stats[r] = make_float2(mean, inverse);
    if (!dx) return;
    for (int pass = 0; pass < 2; pass++) {
        float g_mean = pass ? block_sum(g_sum) / (float)n : 0,
              gn_mean = pass ? block_sum(gn_sum) / (float)n : 0;
        for (int c = threadIdx.x * V; c < n; c += blockDim.x * V) {
            load<V>(v, x + c);
            load<V>(d, dy + c);
            load<V>(s, a + c);
            for (int j = 0; j < V; j++) {
                float g = d[j] * (1 + s[j]), norm = (v[j] - mean) * inverse;
                if (!pass) g_sum += g, gn_sum += g * norm;
                d[j] = (g - g_mean - norm * gn_mean) * inverse;
            }
            if (pass) add<V>(dx + r * n + c, d, first);
        }
    }
}

struct ModulateColumns { /* dscale, dshift */
    const bf16 *x, *dy;
    const float2 *stats;
    int64_t n;
    bool wide() const { return ::wide(n, x, dy); }
    template <int V> __device__ void columns(float (*sum)[V], int64_t r, int c) const {
        float2 s = stats[r];
        load<V>(sum[0], x + r * n + c);
        load<V>(sum[1], dy + r * n + c);
        for (int j = 0; j < V; j++) sum[0][j] = sum[1][j] * (sum[0][j] - s.x) * s.y;
    }
};

static Modulation modulation(const sc_tensor *mod, const sc_tensor *x) {
    return Modulation{bf16_data(mod), x->shape[1], mod->shape[1]};
}

static void cuda_ln_modulate(sc_tensor *y, const sc_tensor *x, const sc_tensor *mod, int shift,
                             int scale) {
    int64_t n = x->shape[2];
    bool w = wide(n, y->data, x->data, mod->data);
    LAUNCH(w, ln_modulate_kernel, row_count(x), 128, (bf16 *)y->data, bf16_data(x),
           modulation(mod, x), (int)n, shift * n, scale * n);
}

static void cuda_ln_modulate_backward(const sc_tensor *y, sc_tensor *x, sc_tensor *mod, int shift,
                                      int scale) {
    int64_t n = x->shape[2], rows = row_count(x);
    Scratch<float2> stats(rows);
    bool w = wide(n, y->grad, x->data, mod->data, x->grad);
    LAUNCH(w, ln_modulate_backward_kernel, rows, 128, bf16_grad(x), stats.p, bf16_grad(y),
           bf16_data(x), modulation(mod, x), (int)n, scale * n, first_part(x));
    if (!mod->grad) return;
    bf16 *to[2] = {bf16_grad(mod) + scale * n, bf16_grad(mod) + shift * n};
    ModulateColumns f = {bf16_data(x), bf16_grad(y), stats.p, n};
    column_sums<2, bf16>(f, x->shape[0], x->shape[1], n, to, mod->shape[1]);
}

template <int V>
__global__ void gated_residual_kernel(bf16 *y, const bf16 *x, const bf16 *h, Modulation mod,
                                      int64_t gate, int64_t n, int64_t total) {
    int64_t i = FLAT_INDEX(V);
    if (i >= total) return;
    float v[V], u[V], g[V];
    load<V>(v, x + i);
    load<V>(u, h + i);
    load<V>(g, mod.row(i / n, gate) + i % n);
    for (int j = 0; j < V; j++) v[j] += g[j] * u[j];
    store<V>(y + i, v);
}

template <int V>
__global__ void gated_residual_backward_kernel(bf16 *dx, bool dx_first, bf16 *dh, bool dh_first,
                                               const bf16 *dy, Modulation mod, int64_t gate,
                                               int64_t n, int64_t total) {
    int64_t i = FLAT_INDEX(V);
    if (i >= total) return;
    float d[V], g[V];
    load<V>(d, dy + i);
    if (dx) add<V>(dx + i, d, dx_first);
    if (!dh) return;
    load<V>(g, mod.row(i / n, gate) + i % n);
    for (int j = 0; j < V; j++) d[j] *= g[j];
    add<V>(dh + i, d, dh_first);
}

struct GateColumns {
    const bf16 *h, *dy;
    int64_t n;
    bool wide() const { return ::wide(n, h, dy); }
    template <int V> __device__ void columns(float (*sum)[V], int64_t r, int c) const {
        float d[V];
        load<V>(sum[0], h + r * n + c);
        load<V>(d, dy + r * n + c);
        for (int j = 0; j < V; j++) sum[0][j] *= d[j];
    }
};

static void cuda_gated_residual(sc_tensor *y, const sc_tensor *x, const sc_tensor *h,
                                const sc_tensor *mod, int gate) {
    int64_t n = x->shape[2], total = sc_count(x);
    bool w = wide(n, y->data, x->data, h->data, mod->data);
    LAUNCH_FLAT(w, gated_residual_kernel, total, (bf16 *)y->data, bf16_data(x), bf16_data(h),
                modulation(mod, x), gate * n, n, total);
}

static void cuda_gated_residual_backward(const sc_tensor *y, sc_tensor *x, sc_tensor *h,
                                         sc_tensor *mod, int gate) {
    int64_t n = x->shape[2], total = sc_count(x);
    bool w = wide(n, y->grad, x->grad, h->grad, mod->data);
    LAUNCH_FLAT(w, gated_residual_backward_kernel, total, bf16_grad(x), first_part(x), bf16_grad(h),
                first_part(h), bf16_grad(y), modulation(mod, x), gate * n, n, total);
    if (!mod->grad) return;
    bf16 *to[1] = {bf16_grad(mod) + gate * n};
    column_sums<1, bf16>(GateColumns{bf16_data(h), bf16_grad(y), n}, x->shape[0], x->shape[1], n,
                         to, mod->shape[1]);
}

/* ==== QK-norm + RoPE =========================================================================
 * V 8: 16 lanes to a head of 128 channels. V 2: a warp to any head, lane l at channels 2l + 64i. */

/* Item i: head i % heads of token (i / heads) % tokens of sample i / heads / tokens. */
struct Heads {
    uint32_t items, tokens, joined, offset; /* tokens of x and of y; where x's lie in y */
    uint32_t heads;
    int size;
    bool first; /* dx is stored, not added to */
    __device__ int64_t in_x(uint32_t i) const { return (int64_t)i * size; }
    __device__ int64_t in_y(uint32_t i) const {
        uint32_t row = i / heads, y_row = row / tokens * joined + offset + row % tokens;
        return ((int64_t)y_row * heads + i % heads) * size;
    }
    __device__ int64_t in_rope(uint32_t i) const {
        return (int64_t)(offset + i / heads % tokens) * size;
    }
};

template <int V> struct Lanes {
    enum { COUNT = V == 8 ? 16 : 32, STEP = V * COUNT };
    static __device__ int first() { return threadIdx.x % COUNT * V; } /* channel */
    static __device__ uint32_t item() { return (blockIdx.x * blockDim.x + threadIdx.x) / COUNT; }
};

/* By (cos, sin) of each pair; sign -1: back. */
template <int V> __device__ __forceinline__ void rotate(float x[V], const float *rope, float sign) {
    float r[V];
    load<V>(r, rope);
    for (int j = 0; j < V; j += 2) {
        float a = x[j], b = x[j + 1], sine = sign * r[j + 1];
        x[j] = a * r[j] - b * sine, x[j + 1] = b * r[j] + a * sine;
    }
}

template <int V> __device__ __forceinline__ float head_inverse_rms(const bf16 *x, int size) {
    float v[V], sum = 0;
    for (int d = Lanes<V>::first(); d < size; d += Lanes<V>::STEP) {
        load<V>(v, x + d);
        for (int j = 0; j < V; j++) sum += v[j] * v[j];
    }
    return 1 / sqrtf(warp_sum<Lanes<V>::COUNT>(sum) / (float)size + 1e-6f);
}

template <int V>
__global__ void norm_rope_kernel(bf16 *y, const bf16 *x, const float *weight, const float *rope,
                                 Heads m) {
    uint32_t item = Lanes<V>::item(), i = item < m.items ? item : 0; /* sums need all lanes */
    int size = V == 8 ? 128 : m.size;
    x += m.in_x(i), y += m.in_y(i), rope += m.in_rope(i);
    float inverse = head_inverse_rms<V>(x, size), v[V], w[V];
    for (int d = Lanes<V>::first(); item == i && d < size; d += Lanes<V>::STEP) {
        load<V>(v, x + d);
        load<V>(w, weight + d);
        for (int j = 0; j < V; j++) v[j] *= inverse * w[j];
        rotate<V>(v, rope + d, 1);
        store<V>(y + d, v);
    }
}

/* dx (or NULL), and each head's 1 / rms. */
template <int V>
__global__ void norm_rope_backward_kernel(bf16 *dx, float *rms, const bf16 *dy, const bf16 *x,
                                          const float *weight, const float *rope, Heads m) {
    uint32_t item = Lanes<V>::item(), i = item < m.items ? item : 0;
    int size = V == 8 ? 128 : m.size;
    x += m.in_x(i), dy += m.in_y(i), rope += m.in_rope(i);
    float inverse = head_inverse_rms<V>(x, size), dot = 0, v[V], g[V], w[V];
    if (item == i && Lanes<V>::first() == 0) rms[i] = inverse;
    for (int pass = 0; dx && pass < 2; pass++) { /* the gradient's part along x; dx */
        for (int d = Lanes<V>::first(); d < size; d += Lanes<V>::STEP) {
            load<V>(v, x + d);
            load<V>(g, dy + d);
            load<V>(w, weight + d);
            rotate<V>(g, rope + d, -1);
            for (int j = 0; j < V; j++) {
                if (!pass) dot += w[j] * g[j] * v[j] * inverse;
                g[j] = (w[j] * g[j] - v[j] * inverse * dot) * inverse;
            }
            if (pass && item == i) add<V>(dx + m.in_x(i) + d, g, m.first);
        }
        dot = warp_sum<Lanes<V>::COUNT>(dot) / (float)size;
    }
}

struct NormRopeColumns { /* dweight */
    const bf16 *x, *dy;
    const float *inverse, *rope;
    Heads m;
    bool wide() const { return ::wide(m.size, x, dy, rope); }
    template <int V> __device__ void columns(float (*sum)[V], int64_t i, int c) const {
        constexpr int PAIRS = V == 1 ? 2 : V;
        float v[V], g[PAIRS];
        load<V>(v, x + m.in_x((uint32_t)i) + c);
        load<PAIRS>(g, dy + m.in_y((uint32_t)i) + c / PAIRS * PAIRS);
        rotate<PAIRS>(g, rope + m.in_rope((uint32_t)i) + c / PAIRS * PAIRS, -1);
        for (int j = 0; j < V; j++) sum[0][j] = g[V == 1 ? c % 2 : j] * v[j] * inverse[i];
    }
};

static Heads head_map(const sc_tensor *y, int64_t offset, const sc_tensor *x, int64_t size) {
    int heads = (int)(x->shape[2] / size);
    return Heads{(uint32_t)(row_count(x) * heads),
                 (uint32_t)x->shape[1],
                 (uint32_t)y->shape[1],
                 (uint32_t)offset,
                 (uint32_t)heads,
                 (int)size,
                 false};
}
#define LAUNCH_HEADS(w, kernel, m, ...)                                                            \
    launch(#kernel, (w) ? kernel<8> : kernel<2>, grid(ceil_div(m.items, (w) ? 16 : 8)), 256, 0,    \
           __VA_ARGS__, m)

static void cuda_norm_rope(sc_tensor *y, int64_t offset, const sc_tensor *x,
                           const sc_tensor *weight, const sc_tensor *rope) {
    Heads m = head_map(y, offset, x, weight->shape[0]);
    bool w = m.size == 128 && wide(0, y->data, x->data, weight->data, rope->data);
    LAUNCH_HEADS(w, norm_rope_kernel, m, (bf16 *)y->data, bf16_data(x), f32_data(weight),
                 f32_data(rope));
}

static void cuda_norm_rope_backward(const sc_tensor *y, int64_t offset, sc_tensor *x,
                                    sc_tensor *weight, const sc_tensor *rope) {
    Heads m = head_map(y, offset, x, weight->shape[0]);
    Scratch<float> rms(m.items);
    bool w = m.size == 128 && wide(0, y->grad, x->data, weight->data, x->grad);
    m.first = first_part(x);
    LAUNCH_HEADS(w, norm_rope_backward_kernel, m, bf16_grad(x), rms.p, bf16_grad(y), bf16_data(x),
                 f32_data(weight), f32_data(rope));
    if (!weight->grad) return;
    float *to[1] = {(float *)weight->grad};
    NormRopeColumns f = {bf16_data(x), bf16_grad(y), rms.p, f32_data(rope), m};
    column_sums<1, float>(f, 1, m.items, m.size, to, 0);
}

/* ==== Attention ==============================================================================
 * Flash attention (Dao 2023) on the tensor cores for heads of 32, 64 and 128 channels: scores exist
 * only tile by tile. Q, K, V, O [B,T,C], head h in columns [h D, (h + 1) D). With the sum of
 * exponentials l and log-sum-exp L of a row of scores:  P = exp(scale Q K^T - L), O = P V;
 * dV = P^T dO;  dS = P (dO V^T - delta), delta = rowsum(dO O);  dQ = scale dS K;
 * dK = scale dS^T Q. */

/* ROWS x W values in shared memory: panels of PANEL columns one after the other, each row-major in
 * chunks of 16 bytes, swizzled: a chunk's number is XORed with its row's, so that 8 rows' chunks of
 * one column lie in different banks. Panels of 64 columns: PTX's 128-byte swizzle, for wgmma. */
template <int ROWS, int W, int PANEL = W> struct Tile {
    enum { CHUNKS = PANEL / 8, SIZE = ROWS * W };
    bf16 *data;
    __device__ __forceinline__ bf16 *chunk(int row, int p) const {
        int swizzle = CHUNKS >= 8 ? row % 8 : row / (8 / CHUNKS) % CHUNKS;
        return data + p / CHUNKS * ROWS * PANEL + row * PANEL + (p % CHUNKS ^ swizzle) * 8;
    }
};

/* cp.async of the tile's rows, of which `rows` exist; the others become zero. A thread copies the
 * same chunk of every STEP-th row: as these are a multiple of 8 apart, the swizzle is the same. */
template <int THREADS, int ROWS, int W, int PANEL>
__device__ __forceinline__ void load_tile(Tile<ROWS, W, PANEL> tile, const bf16 *from, int64_t ld,
                                          int64_t rows) {
    constexpr int STEP = THREADS / (W / 8);
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "every thread copies as much");
    int r = threadIdx.x / (W / 8), p = threadIdx.x % (W / 8);
    bf16 *to = tile.chunk(r, p);
    const bf16 *at = from + r * ld + p * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP, at += STEP * ld)
        cp_async16(to + i * PANEL, r + i < rows ? at : from, r + i < rows);
}

/* sum[M 16-row tiles][N 8-column tiles] += the warp's rows of A, from S::row() on and S::STEP
 * apart, times its columns of B, from S::column() on, over K. A_T: A is stored [k][m]; B_T: B is
 * stored [n][k]. */
template <class S, int K, bool A_T, bool B_T, class A, class B>
__device__ __forceinline__ void mma_tiles(float (*sum)[S::N][4], A a, B b) {
    constexpr int M = S::M, N = S::N;
    int m0 = S::row(), n0 = S::column();
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        uint32_t fa[M][4], fb[4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            int row = m0 + m * S::STEP;
            if (A_T)
                ldmatrix_x4_trans(fa[m],
                                  a.chunk(k + lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2));
            else ldmatrix_x4(fa[m], a.chunk(row + lane % 16, k / 8 + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            if (B_T)
                ldmatrix_x4(fb,
                            b.chunk(n0 + n * 8 + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
            else ldmatrix_x4_trans(fb, b.chunk(k + lane % 16, n0 / 8 + n + lane / 16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_m16n8k16(sum[m][n], fa[m], fb[0], fb[1]);
                mma_m16n8k16(sum[m][n + 1], fa[m], fb[2], fb[3]);
            }
        }
    }
}

/* The matrix descriptor of 16 values of k from `k` on for 64 or more rows from `m` on: start
 * address, leading offset (to the next panel), stride offset (to the next 8 rows), 128-byte
 * swizzle. K_FIRST: the tile's columns are k (K-major), else its rows are (MN-major). A sum, so
 * that the descriptors of a tile are one base and constants. */
template <bool K_FIRST, int ROWS, int W>
__device__ __forceinline__ uint64_t wgmma_descriptor(Tile<ROWS, W, 64> t, int m, int k) {
    int row = K_FIRST ? m : k, column = K_FIRST ? k : m;
    uint32_t offset = (uint32_t)(column / 64 * ROWS * 64 + row * 64 + column % 64) * 2;
    uint32_t low = (shared_address(t.data) >> 4) + (offset >> 4) + (ROWS * 128 / 16 << 16);
    return (uint64_t)(1u << 30 | 1024 / 16) << 32 | low;
}

/* The same by wgmma, a warp having 16 of 64 rows: one commit group for each M, to be waited for.
 * The warpgroup's first warp is broadcast, so that descriptors are in uniform registers. */
template <class S, int K, bool A_T, bool B_T, class A, class B>
__device__ __forceinline__ void wgmma_tiles(float (*sum)[S::N][4], A a, B b) {
    int warp = S::WARPS == 4 ? 0 : __shfl_sync(~0u, (int)threadIdx.x / 128, 0) * 4;
    int m0 = S::row(warp), n0 = S::column(warp);
#pragma unroll
    for (int m = 0; m < S::M; m++) {
#pragma unroll
        for (int k = 0; k < K; k += 16)
            wgmma_ss<S::N, A_T, !B_T>(sum[m], wgmma_descriptor<!A_T>(a, m0 + m * 64, k),
                                      wgmma_descriptor<B_T>(b, n0, k));
        wgmma_commit_group<true>();
    }
}

template <bool WGMMA, class S, int K, bool A_T, bool B_T, class A, class B>
__device__ __forceinline__ void multiply_tiles(float (*sum)[S::N][4], A a, B b) {
    if constexpr (WGMMA) wgmma_tiles<S, K, A_T, B_T>(sum, a, b);
    else mma_tiles<S, K, A_T, B_T>(sum, a, b);
}

__device__ __forceinline__ float
quad_sum(float x) { /* of the four lanes that share rows of a fragment */
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

/* The forward pass's tile: 4 warps, each with 16 rows of both halves of the queries. */
enum { QUERIES = 128, KEYS = 64 };
struct ForwardTiling {
    enum { WARPS = 4, M = 2, STEP = 64, N = KEYS / 8 };
    static __device__ int row(int warp = threadIdx.x / 32) { return warp * 16; }
    static __device__ int column(int = 0) { return 0; }
};

/* Scores s of one tile become exp2(factor (s - row_max)); the output and the row's sum so far
 * are rescaled to the new maximum. `left`: how many of the tile's keys exist. Of rows g and g + 8
 * of 16, for one M. */
template <int D>
__device__ __forceinline__ void online_softmax(float (*s)[4], float (*out)[4], float row_max[2],
                                               float row_sum[2], int left, float factor) {
    int lane = threadIdx.x % 32;
    if (left < KEYS)
#pragma unroll
        for (int i = 0; i < KEYS / 8 * 4; i++)
            if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= left) s[i / 4][i % 4] = -INFINITY;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float old = row_max[half], best = old, total = 0;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            best = fmaxf(best, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        best = quad_max(best);
        float rescale = exp2_approx((old - best) * factor), base = best * factor;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int c = 2 * half; c < 2 * half + 2; c++)
                total += s[n][c] = exp2_approx(s[n][c] * factor - base);
        row_max[half] = best;
        row_sum[half] = row_sum[half] * rescale + total;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            out[n][2 * half] *= rescale, out[n][2 * half + 1] *= rescale;
    }
}

/* The D fragments of P are, pair by pair, the A fragments of the next product. */
__device__ __forceinline__ void pack_scores(uint32_t (*fa)[4], float (*p)[4]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) {
        const float *pair = &p[i / 2][i % 2 * 2];
        fa[i / 4][i % 4] = pack(pair[0], pair[1]);
    }
}

/* out += P V for both halves of the queries, by mma. */
template <int D, class V>
__device__ __forceinline__ void mma_pv(float (*out)[D / 8][4], uint32_t (*p)[KEYS / 16][4], V v) {
    int lane = threadIdx.x % 32;
    uint32_t fb[4];
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            ldmatrix_x4_trans(fb, v.chunk(k * 16 + lane % 16, n + lane / 16));
#pragma unroll
            for (int m = 0; m < 2; m++) {
                mma_m16n8k16(out[m][n], p[m][k], fb[0], fb[1]);
                mma_m16n8k16(out[m][n + 1], p[m][k], fb[2], fb[3]);
            }
        }
}

/* The same for one half by wgmma: a commit group, to be waited for. */
template <int N, class V>
__device__ __forceinline__ void wgmma_pv(float (&out)[N][4], uint32_t (&p)[KEYS / 16][4], V v) {
    wgmma_fence<true>(out, p);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) wgmma_rs(out, p[k], wgmma_descriptor<false>(v, 0, k * 16));
    wgmma_commit_group<true>();
}

/* The kernels' arguments. factor = scale log2(e): exponentials are powers of 2. */
struct Attention {
    const bf16 *q, *k, *v, *dout;
    bf16 *o, *dq, *dk, *dv;
    float *lse, *delta; /* [B,H,Tq] */
    float *dq_accum;    /* [B,Tq,C] */
    int *dq_semaphore;  /* the next ticket; [B,H,tiles of queries]: the tile of keys that may add */
    int nq, nk, heads;
    int all_heads, group; /* of all samples; those that are worked on at once */
    float scale, factor;
    bool first_dq, first_dk, first_dv;
};

/* Epilogue: O = out / row_sum, and log-row_sum-exp, of the queries from `first` on. */
template <int D>
__device__ __forceinline__ void store_outputs(const Attention &a, bf16 *to, float (*out)[D / 8][4],
                                              float (*row_max)[2], float (*row_sum)[2], int first) {
    int lane = threadIdx.x % 32;
    int64_t width = (int64_t)a.heads * D;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int m = i / 2, half = i % 2,
            row = ForwardTiling::row() + m * ForwardTiling::STEP + half * 8 + lane / 4;
        float total = quad_sum(row_sum[m][half]), inverse = 1 / total;
        if (first + row >= a.nq) continue;
        bf16 *o = to + row * width + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *(uint32_t *)(o + n * 8) =
                pack(out[m][n][2 * half] * inverse, out[m][n][2 * half + 1] * inverse);
        if (a.lse && lane % 4 == 0)
            a.lse[((int64_t)blockIdx.z * a.heads + blockIdx.y) * a.nq + first + row] =
                row_max[m][half] * a.scale + logf(total);
    }
}

/* grid (tiles of queries, H, B). By mma, V's tile is loaded under S = Q K^T, the next of K under
 * P V. By wgmma there are two stages of both, and the tensor cores work on one half of the queries
 * under the softmax of the other. */
template <int D, bool WGMMA> __global__ void __launch_bounds__(128) attention_kernel(Attention a) {
    if (WGMMA && !HAS_WGMMA) return;
    constexpr int PANEL = WGMMA ? 64 : D;
    Tile<QUERIES, D, PANEL> q = {(bf16 *)shared_memory()};
    auto stage = [&](int i) {
        return Tile<KEYS, D, PANEL>{q.data + q.SIZE + i % (WGMMA ? 4 : 2) * KEYS * D};
    };
    int first = blockIdx.x * QUERIES;
    int64_t width = (int64_t)a.heads * D,
            queries = ((int64_t)blockIdx.z * a.nq + first) * width + blockIdx.y * D;
    int64_t keys = (int64_t)blockIdx.z * a.nk * width + blockIdx.y * D;
    /* Stages of K have even numbers, of V odd ones. */
    auto load = [&](const bf16 *from, int i, int at) {
        if (at < a.nk) load_tile<128>(stage(i), from + keys + at * width, width, a.nk - at);
    };
    float out[2][D / 8][4] = {}, row_max[2][2], row_sum[2][2] = {};
    for (int i = 0; i < 4; i++) row_max[i / 2][i % 2] = -INFINITY;
    load_tile<128>(q, a.q + queries, width, a.nq - first);
    load(a.k, 0, 0);
    if (WGMMA) load(a.v, 1, 0);
    cp_async_commit_group();
    for (int i = 0, j = 0; j < a.nk; i += 2, j += KEYS) {
        cp_async_wait_group<0>();
        fence_proxy_async<WGMMA>();
        __syncthreads(); /* K (and V) are there, the last ones no longer needed */
        if (WGMMA) load(a.k, i + 2, j + KEYS), load(a.v, i + 3, j + KEYS);
        else load(a.v, i + 1, j);
        cp_async_commit_group();
        float s[2][KEYS / 8][4] = {};
        uint32_t p[2][KEYS / 16][4];
        wgmma_fence<WGMMA>(s);
        multiply_tiles<WGMMA, ForwardTiling, D, false, true>(s, q, stage(i));
        wgmma_wait_group<WGMMA, 1>(s[0]);
        online_softmax<D>(s[0], out[0], row_max[0], row_sum[0], a.nk - j, a.factor);
        pack_scores(p[0], s[0]);
        if constexpr (WGMMA) wgmma_pv(out[0], p[0], stage(i + 1));
        wgmma_wait_group<WGMMA, 1>(s[1]);
        online_softmax<D>(s[1], out[1], row_max[1], row_sum[1], a.nk - j, a.factor);
        pack_scores(p[1], s[1]);
        if constexpr (WGMMA) {
            wgmma_pv(out[1], p[1], stage(i + 1));
            wgmma_wait_group<WGMMA>(out, p);
        } else {
            cp_async_wait_group<0>();
            __syncthreads(); /* V is there, K no longer needed */
            load(a.k, i + 2, j + KEYS);
            cp_async_commit_group();
            mma_pv<D>(out, p, stage(i + 1));
        }
    }
    store_outputs<D>(a, a.o + queries, out, row_max, row_sum, first);
}

/* delta = rowsum(dO O): a warp to a head of a token. */
template <int D> __global__ void attention_delta_kernel(Attention a, int64_t items) {
    int64_t i = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (i >= items) return;
    float sum = 0;
    for (int d = threadIdx.x % 32 * 2; d < D; d += 64) {
        float o[2], g[2];
        load<2>(o, a.o + i * D + d);
        load<2>(g, a.dout + i * D + d);
        sum += o[0] * g[0] + o[1] * g[1];
    }
    sum = warp_sum(sum);
    int64_t row = i / a.heads; /* of B * Tq */
    if (threadIdx.x % 32 == 0)
        a.delta[(row / a.nq * a.heads + i % a.heads) * a.nq + row % a.nq] = sum;
}

/* How 8 warps tile a result [ROWS, COLUMNS]: ACROSS of them next to each other. A warp has M x N
 * fragments of 16 x 8 from (row(), column()) on. */
template <int ROWS, int COLUMNS, int ACROSS> struct WarpTiling {
    enum { WARPS = 8, STEP = 16 };
    enum { DOWN = WARPS / ACROSS, M = ROWS / DOWN / 16, N = COLUMNS / ACROSS / 8 };
    static __device__ int row(int warp = threadIdx.x / 32) { return warp % DOWN * M * 16; }
    static __device__ int column(int warp = threadIdx.x / 32) { return warp / DOWN * N * 8; }
};
/* The backward pass: a tile has BM queries and BN keys. */
enum { BM = 64 };
template <int D, int BN, bool WGMMA> struct Backward {
    using Scores = WarpTiling<BM, BN, WGMMA ? 2 : 4>;
    using Keys = WarpTiling<BN, D, WGMMA ? 1 : 2>;               /* dK and dV */
    using Queries = WarpTiling<BM, D, WGMMA || D == 32 ? 2 : 4>; /* dQ */
    enum { PANEL = WGMMA ? 64 : D, S_PANEL = WGMMA ? 64 : BN };
};

/* A block's work tile: BN keys of one head. */
struct WorkTile {
    int tile, head;        /* the head: of all samples' */
    int64_t queries, keys; /* where the head's queries begin, and the tile's keys */
    float *dq_in, *dq_out; /* dQ over earlier keys, and for later ones; NULL: no such keys */
    int *semaphore;        /* for each tile of queries */
};

/* The tile scheduler. Blocks take tickets, so that whatever a block waits for has begun before it.
 * Tiles of one head add to its dQ in their order, each close behind the one before, whose queries,
 * gradients and dQ it finds in the L2 cache. Some five of a head are under way at once: at first
 * they wait for each other, later each begins when the one before is far ahead. */
template <int D, int BN> __device__ __forceinline__ WorkTile take_work_tile(const Attention &a) {
    __shared__ int ticket;
    if (threadIdx.x == 0) ticket = atomicAdd(a.dq_semaphore, 1);
    __syncthreads();
    int tiles = (a.nk + BN - 1) / BN, first = ticket / (a.group * tiles) * a.group;
    int heads = a.all_heads - first < a.group ? a.all_heads - first : a.group;
    int within = ticket % (a.group * tiles), tile = within / heads, head = first + within % heads;
    int64_t width = (int64_t)a.heads * D, sample = head / a.heads, column = head % a.heads * D;
    int64_t queries = sample * a.nq * width + column;
    int64_t keys = (sample * a.nk + tile * BN) * width + column;
    float *accum = a.dq_accum + queries;
    int *semaphore = a.dq_semaphore + 1 + (int64_t)head * ((a.nq + BM - 1) / BM);
    return {tile,     head, queries, keys, tile > 0 ? accum : NULL, tile < tiles - 1 ? accum : NULL,
            semaphore};
}

/* Log-sum-exp and delta of the queries of a lane's fragments. */
template <class S>
__device__ __forceinline__ void load_softmax_stats(const Attention &a, float2 *stats, int64_t head,
                                                   int first_query) {
#pragma unroll
    for (int i = 0; i < 2 * S::M; i++) {
        int query = first_query + S::row() + i * 8 + threadIdx.x % 32 / 4;
        stats[i] = query < a.nq
                       ? make_float2(a.lse[head * a.nq + query], a.delta[head * a.nq + query])
                       : make_float2(INFINITY, 0); /* makes P zero */
    }
}

/* The scores s of one tile become P. */
template <class S>
__device__ __forceinline__ void backward_softmax(const Attention &a, float (*s)[S::N][4],
                                                 const float2 *stats, int first_key) {
#pragma unroll
    for (int i = 0; i < 2 * S::M * S::N * 2; i++) {
        int row = i / (2 * S::N), m = row / 2, n = i / 2 % S::N, c = row % 2 * 2 + i % 2;
        int key = first_key + S::column() + n * 8 + threadIdx.x % 4 * 2 + i % 2;
        float l = stats[row].x * 1.4426950408889634f;
        s[m][n][c] = key < a.nk ? exp2_approx(s[m][n][c] * a.factor - l) : 0;
    }
}

/* P and dS = P (dP - delta) of one tile, to shared memory. */
template <class S, class T>
__device__ __forceinline__ void store_p_ds(float (*p)[S::N][4], float (*dp)[S::N][4],
                                           const float2 *stats, T to, T ds) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * S::M; i++) {
        int m = i / 2, half = i % 2 * 2, row = S::row() + i * 8 + lane / 4;
        float d = stats[i].y;
#pragma unroll
        for (int n = 0; n < S::N; n++) {
            int column = S::column() + n * 8 + lane % 4 * 2;
            float x = p[m][n][half], y = p[m][n][half + 1];
            *(uint32_t *)(to.chunk(row, column / 8) + column % 8) = pack(x, y);
            *(uint32_t *)(ds.chunk(row, column / 8) + column % 8) =
                pack(x * (dp[m][n][half] - d), y * (dp[m][n][half + 1] - d));
        }
    }
}

/* The same from the tiles of queries, their gradients, keys and values. */
template <class S, int D, bool WGMMA, class Queries, class Keys, class T>
__device__ __forceinline__ void backward_scores(const Attention &a, int head, int first_query,
                                                int first_key, Queries q, Queries dout, Keys k,
                                                Keys v, T p, T ds) {
    float s[S::M][S::N][4] = {}, dp[S::M][S::N][4] = {};
    float2 stats[2 * S::M]; /* loaded under S = Q K^T */
    load_softmax_stats<S>(a, stats, head, first_query);
    wgmma_fence<WGMMA>(s, dp);
    multiply_tiles<WGMMA, S, D, false, true>(s, q, k);
    multiply_tiles<WGMMA, S, D, false, true>(dp, dout, v);
    wgmma_wait_group<WGMMA, 1>(s);
    backward_softmax<S>(a, s, stats, first_key);
    wgmma_wait_group<WGMMA>(dp);
    store_p_ds<S>(s, dp, stats, p, ds);
}

/* Of a lane's fragment m of dQ, row g + 8 half, from the head's first; -1: no such query. */
template <int D, class Q>
__device__ __forceinline__ int64_t dq_offset(const Attention &a, int first_query, int m, int half) {
    int lane = threadIdx.x % 32, query = first_query + Q::row() + m * 16 + half * 8 + lane / 4;
    return query < a.nq ? (int64_t)query * a.heads * D + Q::column() + lane % 4 * 2 : -1;
}

/* dQ's accumulators begin with what the head's earlier keys gave; loaded under other products. Past
 * the L1 cache: other blocks wrote it. */
template <int D, class Q>
__device__ __forceinline__ void load_dq_accum(const Attention &a, float (*dq)[Q::N][4],
                                              const float *accum, int first_query) {
#pragma unroll
    for (int i = 0; i < 2 * Q::M; i++) {
        int64_t at = dq_offset<D, Q>(a, first_query, i / 2, i % 2);
#pragma unroll
        for (int n = 0; n < Q::N; n++) {
            float2 sum =
                accum && at >= 0 ? __ldcg((const float2 *)(accum + at + n * 8)) : make_float2(0, 0);
            dq[i / 2][n][i % 2 * 2] = sum.x, dq[i / 2][n][i % 2 * 2 + 1] = sum.y;
        }
    }
}

/* For the head's next keys, or, after the last (accum NULL), to the gradient. */
template <int D, class Q>
__device__ __forceinline__ void store_dq(const Attention &a, float (*dq)[Q::N][4], float *accum,
                                         bf16 *to, int first_query) {
#pragma unroll
    for (int i = 0; i < 2 * Q::M; i++) {
        int64_t at = dq_offset<D, Q>(a, first_query, i / 2, i % 2);
        if (at < 0) continue;
#pragma unroll
        for (int n = 0; n < Q::N; n++) {
            float x = dq[i / 2][n][i % 2 * 2], y = dq[i / 2][n][i % 2 * 2 + 1];
            if (accum) *(float2 *)(accum + at + n * 8) = make_float2(x, y);
            else {
                float pair[2] = {x * a.scale, y * a.scale};
                add<2>(to + at + n * 8, pair, a.first_dq);
            }
        }
    }
}

/* Epilogue: adds the rows of dK or dV that exist to their gradient. */
template <class K>
__device__ __forceinline__ void add_dkv(bf16 *to, float (*sum)[K::N][4], float scale, int64_t width,
                                        int left, bool first) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * K::M; i++) {
        int m = i / 2, half = i % 2, row = K::row() + m * 16 + half * 8 + lane / 4;
        if (row >= left) continue;
        bf16 *p = to + row * width + K::column() + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < K::N; n++) {
            float pair[2] = {sum[m][n][2 * half] * scale, sum[m][n][2 * half + 1] * scale};
            add<2>(p + n * 8, pair, first);
        }
    }
}

/* A block keeps a tile of keys and walks over all queries. STAGES 2: the next queries are loaded
 * meanwhile, where shared memory allows. */
template <int D, int BN, int STAGES, bool WGMMA>
__global__ void __launch_bounds__(256, 1) attention_backward_kernel(Attention a) {
    using B = Backward<D, BN, WGMMA>;
    using S = typename B::Scores;
    using K = typename B::Keys;
    using Q = typename B::Queries;
    if (WGMMA && !HAS_WGMMA) return;
    WorkTile work = take_work_tile<D, BN>(a);
    int64_t width = (int64_t)a.heads * D, first = work.tile * BN;
    Tile<BN, D, B::PANEL> k = {(bf16 *)shared_memory()}, v = {k.data + k.SIZE};
    Tile<BM, BN, B::S_PANEL> p = {v.data + v.SIZE}, ds = {p.data + p.SIZE};
    bf16 *stages = ds.data + ds.SIZE; /* of Q, and of dO */
    auto stage = [&](int i) { return Tile<BM, D, B::PANEL>{stages + i % (2 * STAGES) * BM * D}; };
    auto load_q_do = [&](int i) {
        int64_t at = work.queries + (int64_t)i * BM * width;
        if (i * BM < a.nq) {
            load_tile<256>(stage(2 * i), a.q + at, width, a.nq - i * BM);
            load_tile<256>(stage(2 * i + 1), a.dout + at, width, a.nq - i * BM);
        }
        cp_async_commit_group();
    };
    load_tile<256>(k, a.k + work.keys, width, a.nk - first);
    load_tile<256>(v, a.v + work.keys, width, a.nk - first);
    load_q_do(0);
    float dk[K::M][K::N][4] = {}, dv[K::M][K::N][4] = {};
    /* By wgmma all warps poll the semaphore under their products, else warp 0 under the others'. */
    bool polls = WGMMA || threadIdx.x < 32;
    int seen = semaphore_load(&work.semaphore[0]);
    auto pass_semaphore = [&](int i) {
        semaphore_release(threadIdx.x == 0 && i > 0, &work.semaphore[i - 1], work.tile + 1);
        seen = semaphore_load(&work.semaphore[i + 1]);
    };
    for (int i = 0; i * BM < a.nq; i++) {
        if (STAGES == 2) load_q_do(i + 1);
        cp_async_wait_group<STAGES - 1>();
        fence_proxy_async<WGMMA>();
        __syncthreads();
        auto q = stage(2 * i), g = stage(2 * i + 1);
        backward_scores<S, D, WGMMA>(a, work.head, i * BM, (int)first, q, g, k, v, p, ds);
        while (polls && __any_sync(~0u, seen != work.tile))
            seen = semaphore_load(&work.semaphore[i]);
        fence_proxy_async<WGMMA>();
        __syncthreads();
        float dq[Q::M][Q::N][4];
        load_dq_accum<D, Q>(a, dq, work.dq_in, i * BM);
        if (!WGMMA && polls) pass_semaphore(i);
        wgmma_fence<WGMMA>(dv, dk);
        multiply_tiles<WGMMA, K, BM, true, false>(dv, p, g);
        multiply_tiles<WGMMA, K, BM, true, false>(dk, ds, q);
        wgmma_fence<WGMMA>(dq); /* by itself: dV and dK need not wait for dq_in */
        multiply_tiles<WGMMA, Q, BN, false, false>(dq, ds, k);
        if (WGMMA) pass_semaphore(i);
        wgmma_wait_group<WGMMA>(dv, dk, dq);
        store_dq<D, Q>(a, dq, work.dq_out, a.dq + work.queries, i * BM);
        __syncthreads(); /* P, dS and these queries are no longer needed, dQ is written */
        if (STAGES == 1) load_q_do(i + 1);
    }
    semaphore_release(threadIdx.x == 0, &work.semaphore[(a.nq - 1) / BM], work.tile + 1);
    add_dkv<K>(a.dk + work.keys, dk, a.scale, width, (int)(a.nk - first), a.first_dk);
    add_dkv<K>(a.dv + work.keys, dv, 1, width, (int)(a.nk - first), a.first_dv);
}

/* The general form, for other head sizes, a bias or a mask: scores of some queries in memory, in
 * rows of ld >= nk. 256 threads to a row: p = softmax(s + bias) of `count`, of fewer if causal. */
__global__ void softmax_kernel(bf16 *p, const float *s, const bf16 *bias, float *lse, int64_t rows,
                               int64_t ld, int64_t nq, int nk, int64_t first, bool causal) {
    int64_t h = blockIdx.y, r = blockIdx.x, at = (h * rows + r) * ld;
    int count = causal && first + r + 1 < nk ? (int)(first + r + 1) : nk;
    const bf16 *add = bias ? bias + (h * nq + first + r) * nk : NULL;
    float top = -INFINITY, sum = 0;
    for (int c = threadIdx.x; c < count; c += blockDim.x)
        top = fmaxf(top, s[at + c] + (add ? value(add[c]) : 0));
    top = block_reduce<true>(top);
    for (int c = threadIdx.x; c < count; c += blockDim.x)
        sum += __expf(s[at + c] + (add ? value(add[c]) : 0) - top);
    sum = block_sum(sum);
    for (int c = threadIdx.x; c < nk; c += blockDim.x)
        set(p + at + c, c < count ? __expf(s[at + c] + (add ? value(add[c]) : 0) - top) / sum : 0);
    if (lse && threadIdx.x == 0) lse[h * nq + first + r] = top + logf(sum);
}

static void attention_by_matmul(const Attention &a, int64_t batch, int64_t size, const bf16 *bias,
                                bool causal) {
    int64_t ld =
        ceil_div(a.nk, 8) * 8; /* CLIP has 77 keys; cuBLASLt wants rows of whole 16 bytes */
    int64_t width = a.heads * size, block = ((int64_t)64 << 20) / 4 / (a.heads * ld);
    block = block < 16 ? 16 : block > a.nq ? a.nq : block;
    Scratch<float> scores(a.heads * block * ld);
    Scratch<bf16> p(a.heads * block * ld);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t first = 0; first < a.nq; first += block) {
            int64_t rows = a.nq - first < block ? a.nq - first : block,
                    query = (b * a.nq + first) * width;
            Operand q = {a.q + query, width, false, size}, o = {a.o + query, width, false, size};
            Operand k = {a.k + b * a.nk * width, width, true, size};
            Operand v = {a.v + b * a.nk * width, width, false, size};
            Operand s = {scores.p, ld, false, rows * ld}, weights = {p.p, ld, false, rows * ld};
            matmul(rows, a.nk, size, a.scale, q, k, CUDA_R_16BF, 0, s, true, Epilogue(), a.heads);
            launch("softmax", softmax_kernel, grid(rows, a.heads), 256, 0, p.p,
                   (const float *)scores.p, bias, a.lse ? a.lse + b * a.heads * a.nq : NULL, rows,
                   ld, (int64_t)a.nq, a.nk, first, causal);
            matmul(rows, size, a.nk, 1, weights, v, CUDA_R_16BF, 0, o, false, Epilogue(), a.heads);
        }
}

static Attention attention_arguments(const sc_tensor *o, const float *lse, const sc_tensor *q,
                                     const sc_tensor *k, const sc_tensor *v, int heads,
                                     float scale) {
    Attention a = {};
    a.q = bf16_data(q), a.k = bf16_data(k), a.v = bf16_data(v), a.o = (bf16 *)o->data;
    a.lse = (float *)lse;
    a.nq = (int)q->shape[1], a.nk = (int)k->shape[1], a.heads = heads;
    a.scale = scale, a.factor = scale * 1.4426950408889634f;
    return a;
}

template <int D, bool WGMMA> static void flash_attention(const Attention &a, int64_t batch) {
    size_t shared = (size_t)(QUERIES + (WGMMA ? 4 : 2) * KEYS) * D * sizeof(bf16);
    launch("attention", attention_kernel<D, WGMMA>, grid(ceil_div(a.nq, QUERIES), a.heads, batch),
           128, shared, a);
}

template <int D, int BN, int STAGES, bool WGMMA>
static void flash_backward(Attention a, int64_t batch) {
    constexpr size_t shared =
        (size_t)(2 * BN * D + STAGES * 2 * BM * D + 2 * BM * BN) * sizeof(bf16);
    int64_t tiles = ceil_div(a.nk, BN), items = batch * a.nq * a.heads,
            count = batch * a.heads * ceil_div(a.nq, BM) + 2; /* a ticket; a look ahead */
    Scratch<float> accum(tiles > 1 ? items * D : 0), delta(items);
    Scratch<int> semaphore(count);
    a.dq_accum = accum.p, a.delta = delta.p, a.dq_semaphore = semaphore.p;
    a.all_heads = (int)batch * a.heads;
    /* Groups of even size, of a fifth as many heads as there are processors: some five blocks
     * follow each other over a head's queries. */
    int64_t groups = (5 * a.all_heads + gpu.sm_count / 2) / gpu.sm_count;
    a.group = (int)ceil_div(a.all_heads, groups < 1 ? 1 : groups);
    cuda_zero(semaphore.p, (size_t)count * sizeof(int));
    launch("attention_delta", attention_delta_kernel<D>, grid(ceil_div(items, 8)), 256, 0, a,
           items);
    launch("attention_backward", attention_backward_kernel<D, BN, STAGES, WGMMA>,
           grid(tiles * a.all_heads), 256, shared, a);
}

/* Whether attention by wgmma agrees with attention by mma. */
static bool wgmma_agrees() {
    enum { T = 150, HEADS = 2, N = T * HEADS * 128 };
    static float values[4 * N];
    static bf16 inputs[4 * N], results[2][4 * N]; /* Q, K, V, dO; O, dQ, dK, dV */
    sc_rng rng = {1};
    sc_normal(&rng, values, 4 * N);
    for (int i = 0; i < 4 * N; i++) inputs[i] = __float2bfloat16_rn(values[i]);
    Scratch<bf16> in(4 * N), out(4 * N);
    Scratch<float> lse(T * HEADS);
    cuda_upload(in.p, inputs, sizeof inputs);
    for (int wgmma = 0; wgmma < 2 && !gpu.failed; wgmma++) {
        Attention a = {};
        a.q = in.p, a.k = in.p + N, a.v = in.p + 2 * N, a.dout = in.p + 3 * N, a.lse = lse.p;
        a.o = out.p, a.dq = out.p + N, a.dk = out.p + 2 * N, a.dv = out.p + 3 * N;
        a.nq = a.nk = T, a.heads = HEADS, a.scale = 0.088f, a.factor = a.scale * 1.442695f;
        a.first_dq = a.first_dk = a.first_dv = true;
        cuda_zero(out.p, sizeof inputs);
        if (wgmma) flash_attention<128, true>(a, 1), flash_backward<128, 128, 2, true>(a, 1);
        else flash_attention<128, false>(a, 1), flash_backward<128, 128, 2, false>(a, 1);
        if (!cuda_download(results[wgmma], out.p, sizeof inputs)) return false;
    }
    for (int part = 0; part < 4; part++) {
        double difference = 0, whole = 0;
        for (int i = part * N; i < (part + 1) * N; i++) {
            double x = __bfloat162float(results[0][i]), y = __bfloat162float(results[1][i]);
            difference += (x - y) * (x - y), whole += x * x;
        }
        if (verbose()) fprintf(stderr, "wgmma, mma: difference %.1e\n", sqrt(difference / whole));
        if (!(difference <= 1e-4 * whole)) return false; /* rounding: 1e-5 */
    }
    return true;
}

/* Whether attention is by wgmma: found out once. */
extern "C" bool sc_cuda_wgmma(void) {
    static int known = -1;
    if (known >= 0 || gpu.failed) return known > 0;
    const char *wish = getenv("SHORTCUT_CUDA_WGMMA");
    known = gpu.capability == 90 && (!wish || strcmp(wish, "0")) && wgmma_agrees();
    if (verbose()) fprintf(stderr, "attention by %s\n", known ? "wgmma" : "mma");
    return known > 0;
}

static void cuda_attention(sc_tensor *o, float *lse, const sc_tensor *q, const sc_tensor *k,
                           const sc_tensor *v, int heads, float scale, const sc_tensor *bias,
                           bool causal) {
    Attention a = attention_arguments(o, lse, q, k, v, heads, scale);
    int64_t batch = q->shape[0], size = q->shape[2] / heads;
    if (bias || causal) attention_by_matmul(a, batch, size, bf16_data(bias), causal);
    else if (size == 128 && sc_cuda_wgmma()) flash_attention<128, true>(a, batch);
    else if (size == 128) flash_attention<128, false>(a, batch);
    else if (size == 64) flash_attention<64, false>(a, batch);
    else if (size == 32) flash_attention<32, false>(a, batch);
    else attention_by_matmul(a, batch, size, NULL, false);
}

static void cuda_attention_backward(const sc_tensor *o, const float *lse, sc_tensor *q,
                                    sc_tensor *k, sc_tensor *v, int heads, float scale) {
    Attention a = attention_arguments(o, lse, q, k, v, heads, scale);
    int64_t batch = q->shape[0], size = q->shape[2] / heads;
    a.dout = bf16_grad(o), a.dq = bf16_grad(q), a.dk = bf16_grad(k), a.dv = bf16_grad(v);
    a.first_dq = first_part(q), a.first_dk = first_part(k), a.first_dv = first_part(v);
    bool roomy = gpu.shared_memory >= 161 << 10;
    if (size == 128 && sc_cuda_wgmma()) flash_backward<128, 128, 2, true>(a, batch);
    else if (size == 128 && roomy) flash_backward<128, 128, 2, false>(a, batch);
    else if (size == 128) flash_backward<128, 64, 1, false>(a, batch);
    else if (size == 64) flash_backward<64, 128, 2, false>(a, batch);
    else if (size == 32) flash_backward<32, 128, 2, false>(a, batch);
    else
        fail("attention_backward", "only heads of 32, 64 and 128 channels can be trained on a GPU");
}

/* ==== Norms and embeddings of the text encoders ============================================== */

/* y = (x - mean) inverse w + b; b NULL: RMS norm, mean 0. */
template <int V>
__global__ void layer_norm_kernel(bf16 *y, const bf16 *x, const float *w, const float *b, int n,
                                  float eps) {
    float v[V], mean, inverse;
    x += (int64_t)blockIdx.x * n, y += (int64_t)blockIdx.x * n;
    moments<V>(x, n, eps, b != NULL, &mean, &inverse);
    for (int c = threadIdx.x * V; c < n; c += blockDim.x * V) {
        load<V>(v, x + c);
        for (int j = 0; j < V; j++) v[j] = (v[j] - mean) * inverse * w[c + j] + (b ? b[c + j] : 0);
        store<V>(y + c, v);
    }
}

static void cuda_layer_norm(sc_tensor *y, const sc_tensor *x, const sc_tensor *w,
                            const sc_tensor *b, float eps) {
    int64_t n = last_size(x);
    LAUNCH(wide(n, y->data, x->data), layer_norm_kernel, row_count(x), 128, (bf16 *)y->data,
           bf16_data(x), f32_data(w), f32_data(b), (int)n, eps);
}

template <class T>
__global__ void embed_kernel(bf16 *y, const T *table, const int32_t *ids, int64_t n) {
    int64_t r = blockIdx.x;
    for (int64_t c = threadIdx.x; c < n; c += blockDim.x)
        set(y + r * n + c, value(table[ids[r] * n + c]));
}
static void cuda_embed_tokens(sc_tensor *y, const sc_tensor *table, const int32_t *ids) {
    int64_t rows = row_count(y), n = table->shape[1];
    Scratch<int32_t> device(rows);
    if (!device.p) return;
    cuda_upload(device.p, ids, (size_t)rows * 4);
    const int32_t *at = device.p;
    bf16 *to = (bf16 *)y->data;
    if (table->dtype == SC_F32)
        launch("embed", embed_kernel<float>, grid(rows), 128, 0, to, f32_data(table), at, n);
    else if (table->dtype == SC_BF16)
        launch("embed", embed_kernel<bf16>, grid(rows), 128, 0, to, bf16_data(table), at, n);
    else if (table->dtype == SC_F8_E4M3)
        launch("embed", embed_kernel<uint8_t>, grid(rows), 128, 0, to,
               (const uint8_t *)table->data, at, n);
    else fail("embed_tokens", "the table must be f32, bf16 or e4m3");
}

/* ==== Pictures [B,C,H,W] ===================================================================== */

struct Picture {
    int channels, height, width, kernel, stride, pad, out_width;
};

/* im2col [channels * kernel^2, count] from output pixel `first` on; V pixels are in one row. */
template <int V>
__global__ void im2col_kernel(bf16 *columns, const bf16 *x, Picture g, int64_t first,
                              int64_t count) {
    int64_t i = FLAT_INDEX(V);
    int tap = blockIdx.y % (g.kernel * g.kernel), channel = blockIdx.y / (g.kernel * g.kernel);
    if (i >= count) return;
    int pixel = (int)(first + i), row = pixel / g.out_width * g.stride + tap / g.kernel - g.pad;
    int column = pixel % g.out_width * g.stride + tap % g.kernel - g.pad;
    const bf16 *from = x + ((int64_t)channel * g.height + row) * g.width;
    float v[V];
    for (int j = 0; j < V; j++, column += g.stride)
        v[j] = (unsigned)row < (unsigned)g.height && (unsigned)column < (unsigned)g.width
                   ? value(from[column])
                   : 0;
    store<V>(columns + blockIdx.y * count + i, v);
}

template <int V>
__global__ void fill_bias_kernel(bf16 *y, const float *bias, int64_t channels, int64_t pixels,
                                 int64_t total) {
    int64_t i = FLAT_INDEX(V);
    if (i >= total) return;
    float v[V];
    for (int j = 0; j < V; j++) v[j] = bias[i / pixels % channels];
    store<V>(y + i, v);
}

/* y [out, pixels] = bias + w [out, in * kernel^2] im2col(x), slab by slab. */
static void cuda_conv2d(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                        int stride, int pad_before) {
    int64_t out = w->shape[0], kernel = w->shape[2], inner = w->shape[1] * kernel * kernel,
            pixels = y->shape[2] * y->shape[3];
    Picture g = {(int)x->shape[1], (int)x->shape[2], (int)x->shape[3], (int)kernel,
                 stride,           pad_before,       (int)y->shape[3]};
    bool direct = kernel == 1 && stride == 1; /* the picture is its own im2col */
    int64_t slab = ((int64_t)128 << 20) / 2 / inner / 8 * 8;
    slab = direct || slab > pixels ? pixels : slab < 8 ? 8 : slab;
    bool w8 = g.out_width % 8 == 0;
    Scratch<bf16> columns(direct ? 0 : inner * slab),
        weights(w->dtype == SC_BF16 ? 0 : out * inner);
    sc_matrix matrix = {w->data, w->dtype, inner, false, NULL, 0};
    Operand pw = as_bf16(matrix, out, inner, weights.p);
    int64_t total = sc_count(y);
    if (b)
        LAUNCH_FLAT(wide(pixels, y->data), fill_bias_kernel, total, (bf16 *)y->data, f32_data(b),
                    out, pixels, total);
    for (int64_t sample = 0; sample < y->shape[0]; sample++)
        for (int64_t first = 0; first < pixels; first += slab) {
            int64_t count = pixels - first < slab ? pixels - first : slab;
            const bf16 *from = bf16_data(x) + sample * (sc_count(x) / x->shape[0]);
            if (!direct)
                launch("im2col", w8 ? im2col_kernel<8> : im2col_kernel<1>,
                       grid(ceil_div(count, w8 ? 2048 : 256), inner), 256, 0, columns.p, from, g,
                       first, count);
            Operand px = {direct ? from : columns.p, count};
            Operand py = {(bf16 *)y->data + sample * out * pixels + first, pixels};
            matmul(out, count, inner, 1, pw, px, CUDA_R_16BF, b ? 1.f : 0.f, py, false, Epilogue(),
                   1);
        }
}

static const int64_t NORM_SLICE = 8192;

/* partial [planes, slices] = (mean, sum of squares about it), of `size` values from `begin` on. */
__global__ void group_moments_kernel(float2 *partial, const bf16 *x, int64_t pixels, int64_t begin,
                                     int64_t size) {
    int64_t first = (int64_t)blockIdx.y * NORM_SLICE,
            end = first + NORM_SLICE < size ? first + NORM_SLICE : size;
    float sum = 0, square = 0;
    x += blockIdx.x * pixels + begin;
    for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) sum += value(x[i]);
    float mean = block_sum(sum) / (float)(end - first);
    for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x)
        square += (value(x[i]) - mean) * (value(x[i]) - mean);
    square = block_sum(square);
    if (threadIdx.x == 0)
        partial[(int64_t)blockIdx.x * gridDim.y + blockIdx.y] = make_float2(mean, square);
}

/* Adds the slices of a group's planes to its sums, in double. One thread to a group. */
__global__ void group_sums_kernel(double *sums, const float2 *partial, int64_t groups,
                                  int64_t planes, int64_t slices, int64_t size) {
    int64_t g = FLAT_INDEX(1);
    if (g >= groups) return;
    for (int64_t i = 0; i < planes * slices; i++) {
        int64_t left = size - i % slices * NORM_SLICE;
        double n = (double)(left < NORM_SLICE ? left : NORM_SLICE);
        float2 slice = partial[g * planes * slices + i];
        sums[2 * g] += (double)slice.x * n;
        sums[2 * g + 1] += (double)slice.y + (double)slice.x * (double)slice.x * n;
    }
}

static void cuda_group_sums(double *sums, const sc_tensor *x, int64_t first, int64_t rows,
                            int groups) {
    int64_t planes = x->shape[0] * x->shape[1], width = x->shape[3], size = rows * width;
    int64_t count = x->shape[0] * groups, slices = ceil_div(size, NORM_SLICE);
    Scratch<float2> partial(planes * slices);
    launch("group_moments", group_moments_kernel, grid(planes, slices), 256, 0, partial.p,
           bf16_data(x), x->shape[2] * width, first * width, size);
    launch("group_sums", group_sums_kernel, grid(ceil_div(count, 32)), 32, 0, sums,
           (const float2 *)partial.p, count, planes / count, slices, size);
}

/* A group's (mean, 1 / sqrt(variance + eps)). */
__global__ void group_merge_kernel(float2 *moments, const double *sums, int64_t groups, double size,
                                   float eps) {
    int64_t g = FLAT_INDEX(1);
    if (g >= groups) return;
    double mean = sums[2 * g] / size, variance = sums[2 * g + 1] / size - mean * mean;
    moments[g] = make_float2((float)mean, (float)(1 / sqrt(variance + (double)eps)));
}

template <int V>
__global__ void group_norm_kernel(bf16 *y, const bf16 *x, const float2 *moments, const float *w,
                                  const float *b, int64_t channels, int64_t pixels,
                                  int64_t per_group, bool silu, int64_t total) {
    int64_t i = FLAT_INDEX(V), plane = i / pixels, channel = plane % channels;
    if (i >= total) return;
    float2 m = moments[plane / per_group];
    float v[V], slope;
    load<V>(v, x + i);
    for (int j = 0; j < V; j++) {
        v[j] = (v[j] - m.x) * m.y * w[channel] + b[channel];
        if (silu) v[j] *= gate(SC_SILU, v[j], &slope);
    }
    store<V>(y + i, v);
}

static void cuda_group_norm(sc_tensor *y, const sc_tensor *x, const double *sums, int64_t size,
                            const sc_tensor *w, const sc_tensor *b, int groups, float eps,
                            bool silu) {
    int64_t channels = x->shape[1], pixels = x->shape[2] * x->shape[3], total = sc_count(x),
            count = x->shape[0] * groups;
    Scratch<float2> moments(count);
    launch("group_merge", group_merge_kernel, grid(ceil_div(count, 32)), 32, 0, moments.p, sums,
           count, (double)size, eps);
    LAUNCH_FLAT(wide(pixels, y->data, x->data), group_norm_kernel, total, (bf16 *)y->data,
                bf16_data(x), (const float2 *)moments.p, f32_data(w), f32_data(b), channels, pixels,
                channels / groups, silu, total);
}

__global__ void upsample_kernel(bf16 *y, const bf16 *x, int64_t width, int64_t total) {
    int64_t i = FLAT_INDEX(1);
    if (i < total) y[i] = x[i / (4 * width) * width + i % (2 * width) / 2];
}
static void cuda_upsample(sc_tensor *y, const sc_tensor *x) {
    int64_t total = sc_count(y);
    launch("upsample", upsample_kernel, grid(ceil_div(total, 256)), 256, 0, (bf16 *)y->data,
           bf16_data(x), x->shape[3], total);
}

/* y[b][j][i] = x[b][i][j], tiles of 32 x 32 transposed in shared memory. */
__global__ void swap_axes_kernel(bf16 *y, const bf16 *x, int64_t m, int64_t n) {
    __shared__ bf16 tile[32][33];
    int64_t i0 = (int64_t)blockIdx.y * 32, j0 = (int64_t)blockIdx.x * 32, at = blockIdx.z * m * n;
    int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < 32; r += blockDim.x / 32)
        if (i0 + r < m && j0 + lane < n) tile[r][lane] = x[at + (i0 + r) * n + j0 + lane];
    __syncthreads();
    for (int r = threadIdx.x / 32; r < 32; r += blockDim.x / 32)
        if (j0 + r < n && i0 + lane < m) y[at + (j0 + r) * m + i0 + lane] = tile[lane][r];
}
static void cuda_swap_axes(sc_tensor *y, const sc_tensor *x) {
    int64_t m = x->shape[1], n = x->shape[2];
    launch("swap_axes", swap_axes_kernel, grid(ceil_div(n, 32), ceil_div(m, 32), x->shape[0]), 256,
           0, (bf16 *)y->data, bf16_data(x), m, n);
}

/* ==== Loss and optimiser ===================================================================== */

static const int64_t SUM_SLICE = 1 << 16;

struct Difference {
    const bf16 *a, *b;
    __device__ float operator()(int64_t i) const { return value(a[i]) - value(b[i]); }
};
struct Plain {
    const float *x;
    __device__ float operator()(int64_t i) const { return x[i]; }
};

/* Sum of f(i)^2 over each slice. */
template <class F> __global__ void square_partials(double *partial, F f, int64_t n) {
    int64_t first = (int64_t)blockIdx.x * SUM_SLICE,
            end = first + SUM_SLICE < n ? first + SUM_SLICE : n;
    float sum = 0;
    for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) {
        float x = f(i);
        sum += x * x;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = (double)sum;
}

/* total = factor * the sum of all partials, or its root. One warp; each lane's share, then the
 * lanes in order. */
__global__ void square_total(double *total, const double *partial, int64_t n, double factor,
                             bool root) {
    __shared__ double parts[32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += 32) sum += partial[i];
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < 32; i++) sum += parts[i];
    *total = root ? sqrt(sum * factor) : sum * factor;
}

template <class F>
static void sum_squares(double *total, F f, int64_t n, double factor, bool root) {
    int64_t slices = ceil_div(n, SUM_SLICE);
    Scratch<double> partial(slices);
    launch("square_partials", square_partials<F>, grid(slices), 256, 0, partial.p, f, n);
    launch("square_total", square_total, grid(1), 32, 0, total, (const double *)partial.p, slices,
           factor, root);
}

static void cuda_mse(double *loss, const sc_tensor *x, const sc_tensor *target, double part) {
    int64_t n = sc_count(x);
    sum_squares(loss, Difference{bf16_data(x), bf16_data(target)}, n, part / (double)n, false);
}

template <int V>
__global__ void mse_backward_kernel(bf16 *dp, const bf16 *p, const bf16 *t, float s, int64_t n) {
    int64_t i = FLAT_INDEX(V);
    if (i >= n) return;
    float a[V], b[V];
    load<V>(a, p + i);
    load<V>(b, t + i);
    for (int j = 0; j < V; j++) a[j] = s * (a[j] - b[j]);
    add<V>(dp + i, a, false);
}
static void cuda_mse_backward(sc_tensor *prediction, const sc_tensor *target, double factor) {
    int64_t n = sc_count(prediction);
    bool w = wide(n, prediction->data, prediction->grad, target->data);
    LAUNCH_FLAT(w, mse_backward_kernel, n, bf16_grad(prediction), bf16_data(prediction),
                bf16_data(target), (float)(2 * factor / (double)n), n);
}

struct Step {
    float beta1, beta2, eps, decay, rate, root, clip, move[2];
};

/* Everything that happens to a trained number in one pass: clipping, Adam, both averages, and its
 * gradient cleared. Nothing moves if the gradient's norm is not finite. */
__global__ void update_kernel(sc_params x, const double *whole_norm, Step s) {
    int64_t i = FLAT_INDEX(1);
    if (i >= x.count) return;
    double norm = *whole_norm;
    float g = x.grad[i] * (s.clip > 0 && norm > s.clip ? s.clip / (float)norm : 1.f);
    x.grad[i] = 0;
    if (!isfinite(norm)) return;
    float m = x.m[i] = s.beta1 * x.m[i] + (1 - s.beta1) * g;
    float v = x.v[i] = s.beta2 * x.v[i] + (1 - s.beta2) * g * g;
    float *student = x.set[SC_STUDENT];
    float w = student[i] = student[i] * s.decay - s.rate * m / (sqrtf(v) * s.root + s.eps);
    for (int k = 0; k < 2; k++) {
        float *average = x.set[SC_FAST + k];
        if (average) average[i] += s.move[k] * (w - average[i]);
    }
}

static void cuda_update(const sc_params *x, const sc_adamw *o, const float decay[2],
                        double *norm) {
    double step = (double)(o->step + 1);
    float rate = (float)(o->lr / (1 - pow(o->beta1, step))),
          root = (float)(1 / sqrt(1 - pow(o->beta2, step)));
    Step s = {o->beta1, o->beta2, o->eps,  1 - o->lr * o->weight_decay,
              rate,     root,     o->clip, {1 - decay[0], 1 - decay[1]}};
    sum_squares(norm, Plain{x->grad}, x->count, 1, true);
    launch("update", update_kernel, grid(ceil_div(x->count, 256)), 256, 0, *x, (const double *)norm,
           s);
}

/* ==== The table ============================================================================== */

#define CUDA(operation) t.operation = cuda_##operation
static sc_backend make_table() {
    sc_backend t = {};
    t.name = gpu.name, t.activation = SC_BF16;
    CUDA(alloc), CUDA(release), CUDA(memory_left), CUDA(alloc_streamed), CUDA(upload),
    CUDA(download), CUDA(post), CUDA(collect), CUDA(zero), CUDA(gemm), CUDA(gemm_gelu),
    CUDA(quantize), CUDA(copy_block), CUDA(column_sum), CUDA(blend), CUDA(embed_timestep),
    CUDA(activate), CUDA(activate_backward), CUDA(multiply), CUDA(ln_modulate),
    CUDA(ln_modulate_backward), CUDA(gated_residual), CUDA(gated_residual_backward),
    CUDA(norm_rope), CUDA(norm_rope_backward), CUDA(attention), CUDA(attention_backward),
    CUDA(layer_norm), CUDA(embed_tokens), CUDA(group_sums), CUDA(group_norm), CUDA(conv2d),
    CUDA(upsample), CUDA(swap_axes), CUDA(mse), CUDA(mse_backward), CUDA(update);
    return t;
}

static bool no_gpu(cudaError_t why) {
    int driver = 0;
    cudaGetLastError();
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return sc_fail("no GPU: no NVIDIA driver is installed");
    if (why == cudaErrorInsufficientDriver)
        return sc_fail("no GPU: the driver is for CUDA %d.%d, this program needs %d.%d or newer",
                       driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                       CUDART_VERSION % 1000 / 10);
    return sc_fail("no GPU: %s", cudaGetErrorString(why));
}

static bool open_device() {
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0)
        return no_gpu(status == cudaSuccess ? cudaErrorNoDevice : status);
    cudaDeviceProp properties;
    gpu.number %= count;
    if ((status = cudaGetDeviceProperties(&properties, gpu.number)) != cudaSuccess)
        return no_gpu(status);
    snprintf(gpu.name, sizeof gpu.name, "%.60s", properties.name);
    if (properties.major < 8)
        return sc_fail("no GPU: %s has compute capability %d.%d; 8.0 or more is needed", gpu.name,
                       properties.major, properties.minor);
    gpu.capability = 10 * properties.major + properties.minor;
    gpu.sm_count = properties.multiProcessorCount;
    gpu.shared_memory = properties.sharedMemPerBlockOptin;
    bool ok =
        open_cublas() && check(cudaSetDevice(gpu.number), "cudaSetDevice") &&
        check(cudaStreamCreateWithFlags(&gpu.stream, cudaStreamNonBlocking), "cudaStreamCreate") &&
        check(cudaMalloc(&gpu.workspace, WORKSPACE), "cuBLASLt's workspace") &&
        check(lt.Create(&gpu.lt), "cuBLASLt");
    size_t posted = SC_POSTS * SC_POST_SIZE * sizeof *posts.value;
    ok = ok && check(cudaMallocHost((void **)&posts.value, posted), "pinned memory");
    for (int i = 0; ok && i < SC_POSTS; i++)
        ok = check(cudaEventCreateWithFlags(&posts.done[i], cudaEventDisableTiming), "post");
    for (int i = 0; ok && i < STAGES; i++)
        ok = check(cudaMallocHost((void **)&staging.p[i], STAGE_SIZE), "pinned memory") &&
             check(cudaEventCreateWithFlags(&staging.done[i], cudaEventDisableTiming),
                   "cudaEventCreate");
    return ok;
}

extern "C" const sc_backend *sc_cuda(void) {
    static sc_backend table;
    static bool tried;
    static char why[256];
    if (!tried && open_device()) table = make_table();
    else if (!tried) snprintf(why, sizeof why, "%s", sc_error());
    tried = true;
    return table.name ? &table : (sc_fail("%s", why), nullptr);
}

#ifdef SHORTCUT_MPI
/* ==== Several processes: a GPU each, sums by NCCL, on the one stream ========================= */

static ncclComm_t processes;

static bool check(ncclResult_t status, const char *what) {
    return status == ncclSuccess || fail(what, ncclGetErrorString(status));
}

/* Before sc_cuda. */
extern "C" void sc_cuda_use(int device) { gpu.number = device; }

/* The first makes an id (ncclUniqueId is so long), which all need to join. */
extern "C" bool sc_cuda_id(char id[128]) {
    return check(ncclGetUniqueId((ncclUniqueId *)id), "NCCL");
}

extern "C" void sc_cuda_sum(float *x, int64_t n) {
    if (!gpu.failed)
        check(ncclAllReduce(x, x, (size_t)n, ncclFloat, ncclSum, processes, gpu.stream), "a sum");
}

extern "C" bool sc_cuda_join(const char id[128], int number, int count) {
    if (!check(ncclCommInitRank(&processes, count, *(const ncclUniqueId *)id, number), "NCCL"))
        return false;
    sc_cuda_sum((float *)gpu.workspace, WORKSPACE / 4); /* takes what memory sums need */
    return check(cudaStreamSynchronize(gpu.stream), "NCCL");
}
#endif
