/* cuBLASLt in plain loops, as much of it as shortcut_cuda.cu uses. See cuda_runtime.h beside this.
 */
#ifndef EMULATED_CUBLASLT_H
#define EMULATED_CUBLASLT_H
#include "cuda_bf16.h"
#include <vector>

#define CUBLAS_VER_MAJOR 0
#define CUBLAS_VERSION 130000
enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS,
    CUBLAS_STATUS_NOT_INITIALIZED,
    CUBLAS_STATUS_ALLOC_FAILED,
    CUBLAS_STATUS_INVALID_VALUE,
    CUBLAS_STATUS_ARCH_MISMATCH,
    CUBLAS_STATUS_EXECUTION_FAILED,
    CUBLAS_STATUS_NOT_SUPPORTED
};
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasLtEpilogue_t { /* the real values: their bits are combined */
                          CUBLASLT_EPILOGUE_DEFAULT = 1,
                          CUBLASLT_EPILOGUE_BIAS = 4,
                          CUBLASLT_EPILOGUE_GELU = 32,
                          CUBLASLT_EPILOGUE_GELU_AUX = 32 | 128
};
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F };
enum cudaDataType_t { CUDA_R_32F, CUDA_R_16BF, CUDA_R_8F_E4M3 };
enum cublasLtMatmulMatrixScale_t {
    CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F,
    CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F
};
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA,
    CUBLASLT_MATMUL_DESC_TRANSB,
    CUBLASLT_MATMUL_DESC_EPILOGUE,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD,
    CUBLASLT_MATMUL_DESC_A_SCALE_MODE,
    CUBLASLT_MATMUL_DESC_B_SCALE_MODE,
    CUBLASLT_MATMUL_DESC_A_SCALE_POINTER,
    CUBLASLT_MATMUL_DESC_B_SCALE_POINTER,
    CUBLASLT_MATMUL_DESC_FAST_ACCUM
};
enum cublasLtMatrixLayoutAttribute_t {
    CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES
};
typedef void *cublasLtHandle_t;
struct emulated_product {
    cublasOperation_t ta, tb;
    cublasLtEpilogue_t epilogue;
    const void *bias;
    void *aux;
    int64_t aux_ld;
    const float *scale[2];
    cublasLtMatmulMatrixScale_t mode[2];
};
struct emulated_layout {
    cudaDataType_t type;
    uint64_t rows, columns;
    int64_t ld;
    int32_t batch;
    int64_t stride;
};
struct emulated_preference {
    int32_t align[4];
};
typedef emulated_product *cublasLtMatmulDesc_t;
typedef emulated_layout *cublasLtMatrixLayout_t;
typedef emulated_preference *cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t {
    int32_t align[4];
};
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    cublasStatus_t state; /* the rest is valid if this is a success */
};

static inline const char *cublasLtGetStatusString(cublasStatus_t) { return "an emulated status"; }
static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *) { return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *p, cublasComputeType_t,
                                                      cudaDataType_t) {
    *p = new emulated_product();
    (*p)->epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t p,
                                                            cublasLtMatmulDescAttributes_t name,
                                                            const void *x, size_t n) {
    if (name == CUBLASLT_MATMUL_DESC_TRANSA) memcpy(&p->ta, x, n);
    if (name == CUBLASLT_MATMUL_DESC_TRANSB) memcpy(&p->tb, x, n);
    if (name == CUBLASLT_MATMUL_DESC_EPILOGUE) memcpy(&p->epilogue, x, n);
    if (name == CUBLASLT_MATMUL_DESC_BIAS_POINTER) memcpy(&p->bias, x, n);
    if (name == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER) memcpy(&p->aux, x, n);
    if (name == CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD) memcpy(&p->aux_ld, x, n);
    for (int i = 0; i < 2; i++) {
        if (name == CUBLASLT_MATMUL_DESC_A_SCALE_MODE + i) memcpy(&p->mode[i], x, n);
        if (name == CUBLASLT_MATMUL_DESC_A_SCALE_POINTER + i) memcpy(&p->scale[i], x, n);
    }
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *p,
                                                        cudaDataType_t type, uint64_t rows,
                                                        uint64_t columns, int64_t ld) {
    *p = new emulated_layout{type, rows, columns, ld, 1, 0};
    return ld >= (int64_t)rows ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
static inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t p,
                                                              cublasLtMatrixLayoutAttribute_t name,
                                                              const void *x, size_t n) {
    if (name == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) memcpy(&p->batch, x, n);
    else memcpy(&p->stride, x, n);
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    *p = new emulated_preference{{256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    return delete p, CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t
cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                     cublasLtMatmulPreferenceAttributes_t name, const void *x,
                                     size_t n) {
    if (name >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES)
        memcpy(&p->align[name - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], x, n);
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t
cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t p, cublasLtMatrixLayout_t a,
                               cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                               cublasLtMatrixLayout_t, cublasLtMatmulPreference_t wish, int,
                               cublasLtMatmulHeuristicResult_t *found, int *count) {
    uint64_t m = p->ta ? a->columns : a->rows, n = p->tb ? b->rows : b->columns;
    uint64_t ka = p->ta ? a->rows : a->columns, kb = p->tb ? b->columns : b->rows;
    bool fits = m == c->rows && n == c->columns && ka == kb && a->type == b->type &&
                a->batch == b->batch && a->batch == c->batch;
    if (!fits) return CUBLAS_STATUS_INVALID_VALUE;
    if (a->type == CUDA_R_8F_E4M3 && (!p->ta || p->tb || m % 16 || ka % 16))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (p->mode[0] == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F && emulation_smaller())
        return CUBLAS_STATUS_NOT_SUPPORTED;
    bool gelu = p->epilogue & CUBLASLT_EPILOGUE_GELU, keeps = p->epilogue & 128;
    if (gelu && a->type != CUDA_R_16BF) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (keeps && (p->aux_ld % 8 || p->aux_ld < (int64_t)m || !p->aux || (uintptr_t)p->aux % 16))
        return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(found->algo.align, wish->align, sizeof wish->align);
    found->state = CUBLAS_STATUS_SUCCESS;
    *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}

static inline float emulated_get(const void *p, cudaDataType_t type, int64_t i) {
    if (type == CUDA_R_8F_E4M3) {
        uint8_t x = ((const uint8_t *)p)[i];
        float magnitude =
            x % 128 < 8 ? ldexpf((float)(x % 8), -9) : ldexpf((float)(8 + x % 8), x / 8 % 16 - 10);
        return x & 0x80 ? -magnitude : magnitude;
    }
    return type == CUDA_R_32F ? ((const float *)p)[i]
                              : __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}

static inline void emulated_set(void *p, cudaDataType_t type, int64_t i, float x) {
    if (type == CUDA_R_32F) ((float *)p)[i] = x;
    else ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(x);
}

/* op(X) as f32, row by row. */
static inline std::vector<float> emulated_matrix(const void *x, const emulated_layout &l, int64_t q,
                                                 bool transposed) {
    int64_t rows = (int64_t)(transposed ? l.columns : l.rows),
            columns = (int64_t)(transposed ? l.rows : l.columns);
    std::vector<float> m((size_t)(rows * columns));
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++)
            m[(size_t)(i * columns + j)] =
                emulated_get(x, l.type, q * l.stride + (transposed ? j + i * l.ld : i + j * l.ld));
    return m;
}

/* D = f(alpha op(A) op(B) + beta C + bias), column-major; a bias has an element for each row. */
static inline void emulated_matmul(const emulated_product &p, float s, const void *a,
                                   const emulated_layout &la, const void *b,
                                   const emulated_layout &lb, float t, const void *c,
                                   const emulated_layout &lc, void *d) {
    int64_t inner = (int64_t)(p.ta ? la.rows : la.columns), rows = (int64_t)lc.rows,
            columns = (int64_t)lc.columns;
    std::vector<float> sums((size_t)columns);
    for (int64_t q = 0; q < lc.batch; q++) {
        std::vector<float> ma = emulated_matrix(a, la, q, p.ta),
                           mb = emulated_matrix(b, lb, q, p.tb);
        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = 0; j < columns; j++) sums[(size_t)j] = 0;
            for (int64_t k = 0; k < inner; k++) {
                float x = ma[(size_t)(i * inner + k)];
                const float *row = &mb[(size_t)(k * columns)];
                for (int64_t j = 0; j < columns; j++) sums[(size_t)j] += x * row[j];
            }
            for (int64_t j = 0; j < columns; j++) {
                int64_t at = q * lc.stride + i + j * lc.ld;
                float sum = sums[(size_t)j];
                if (p.mode[0] == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F)
                    sum *= p.scale[0][i] * p.scale[1][j];
                sum = s * sum + (t == 0 ? 0 : t * emulated_get(c, lc.type, at));
                if (p.epilogue & CUBLASLT_EPILOGUE_BIAS) sum += emulated_get(p.bias, lc.type, i);
                if (p.epilogue & 128) emulated_set(p.aux, lc.type, i + j * p.aux_ld, sum);
                if (p.epilogue & CUBLASLT_EPILOGUE_GELU)
                    sum = sum / (1 + expf(-1.5957691f * (sum + 0.044715f * sum * sum * sum)));
                emulated_set(d, lc.type, at, sum);
            }
        }
    }
}

/* Pointers and numbers count as they are now, what is there as it is when the stream gets here. */
static inline cublasStatus_t
cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t p, const void *alpha, const void *a,
               cublasLtMatrixLayout_t la, const void *b, cublasLtMatrixLayout_t lb,
               const void *beta, const void *c, cublasLtMatrixLayout_t lc, void *d,
               cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t *algo, void *, size_t,
               cudaStream_t stream) {
    const void *pointers[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++)
        if ((uintptr_t)pointers[i] % (uintptr_t)algo->align[i]) return CUBLAS_STATUS_INVALID_VALUE;
    bool rare = p->mode[0] == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F ||
                p->epilogue & CUBLASLT_EPILOGUE_GELU;
    if (getenv("EMULATED_LATE") && rare && *(const float *)beta != 0)
        return CUBLAS_STATUS_NOT_SUPPORTED; /* the heuristic was not asked about beta */
    emulation_queue(
        stream, {},
        [=, p = *p, la = *la, lb = *lb, lc = *lc, s = *(const float *)alpha,
         t = *(const float *)beta] { emulated_matmul(p, s, a, la, b, lb, t, c, lc, d); });
    return CUBLAS_STATUS_SUCCESS;
}
#endif
