/* shortcut.h: FLUX.1 and SCFM (few-step distillation of flow-matching models) in one C99 header.
 *
 * Cai et al., "Shortcutting Pre-trained Flow Matching Diffusion Models is Almost Free Lunch",
 * NeurIPS 2025, arXiv 2510.17858. MIT licence, see LICENSE.
 *
 * USE. In one .c file, before including it, #define SHORTCUT_IMPLEMENTATION; include it anywhere
 * for the declarations (C99 and C++). It needs libc, libm and POSIX. With -DSHORTCUT_OPENBLAS
 * -lopenblas products go to OpenBLAS, with -fopenmp it uses all cores. Pictures are float arrays,
 * planar RGB in [-1, 1]. Nothing prints or exits: where a result is NULL or false, sc_error() says
 * why. A picture in three steps:
 *
 *     #define SHORTCUT_IMPLEMENTATION
 *     #include "shortcut.h"
 *     int main(void) {
 *         sc_pipeline *p = sc_pipeline_open(sc_cpu(), "data/tiny-flux", &(sc_pipeline_options){0});
 *         if (!p) return puts(sc_error()), 1;
 *         const sc_flux_config *c = sc_flux_config_of(p->flux);
 *         int h = p->resolution / p->token_pixels;                      // a grid of h x h tokens
 *         float *context = malloc(sizeof(float) * p->text_tokens * c->text_channels);
 *         float *pooled = malloc(sizeof(float) * c->pooled_channels);
 *         float *latents = malloc(sizeof(float) * h * h * c->in_channels);
 *         float *rgb = malloc(sizeof(float) * 3 * p->resolution * p->resolution);
 *         sc_rng rng = {1};                                             // the seed
 *         sc_normal(&rng, latents, h * h * c->in_channels);
 *         sc_sampling s = {.steps = 3, .shift = p->shift, .guidance = 1.2f, .h = h, .w = h};
 *         if (!sc_lora_load(p->flux, "lora.safetensors", 1, &(sc_lora_report){0}) ||
 *             !sc_pipeline_text(p, "a red apple", context, pooled) ||
 *             !sc_sample(p->flux, p->tape, &s, 1, p->text_tokens, context, pooled, latents) ||
 *             !sc_pipeline_decode(p, latents, 1, h, h, rgb))            // [3, 128, 128]
 *             return puts(sc_error()), 1;
 *         sc_pipeline_close(p);
 *     }
 *
 * The paper's training, with its settings for FLUX.1-dev (train.c adds data, progress, files):
 *
 *     sc_params *lora = sc_params_lora(p->flux, 64, 64, 1);             // rank, alpha, seed
 *     sc_recipe recipe = {.teacher_ratio = 0.4f, .teacher_steps = 32,
 *                         .self_steps = {2, 4, 8, 16}, .shift = {2.5f, 4.5f},
 *                         .dynamic_shift_ratio = 0.1f, .guidance = {0, 7.5f}};
 *     sc_adamw adamw = {.lr = 2e-5f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f,
 *                       .weight_decay = 1e-4f, .clip = 10};
 *     for (int step = 0; step < 10000; step++) {                        // next_batch: yours
 *         sc_batch batch = next_batch();                                // latents, noise, text
 *         sc_train_gradient(p->flux, lora, p->tape, &recipe, &batch, &rng);
 *         sc_params_step(lora, &adamw, 0.99f, 0.999f);                  // student, fast, slow
 *         sc_params_report(lora, &loss, &norm);                         // of this step
 *     }
 *     sc_lora_save(lora, SC_STUDENT, "lora.safetensors", NULL);
 *
 * CONTENTS, each section opened by what it does and why:
 *     declarations of all that is public
 *     errors, memory, random numbers, data types
 *     CPU operations              forward and backward side by side under one formula
 *     tape                        eager operations, recorded for the way back
 *     flow matching, SCFM         the paper: start reading there
 *     files, names                JSON, safetensors; what weights are called in whose files
 *     weights, FLUX transformer   the model, written once, forward
 *     what is trained, LoRA files, memory of a training step
 *     parts of a model, VAE       where they are; pictures <-> latents
 *     Unicode, tokenizers, text encoders      prompts -> ids -> vectors
 *     pictures and data sets, pipeline        a whole model folder
 *
 * NOTATION
 *     B batch   T tokens   C channels   H heads   D head size   L layers   h, w grid of tokens
 *     x_t = (1 - t) x0 + t eps   x0 data, eps noise; t = 1 is noise
 *     v   velocity, eps - x0     g  guidance scale     s  time shift     N  steps of a grid
 *     [B,T,C]  shape, row-major  A, B  LoRA factors: W + scale * B A
 *
 * EASY TO GET WRONG
 *   - t = 1 is noise, t = 0 is data, and an Euler step goes down: x - (t - t') v.
 *   - Time and guidance enter their sinusoids times 1000, in f32, cosines first.
 *   - The first time is 1 - 1e-5, not 1 (which is what bf16 makes of it).
 *   - Text tokens come before image tokens in attention; RoPE turns pairs (2i, 2i + 1).
 *   - A block's modulation is (shift, scale, gate) twice; norm_out's is (scale, shift), and BFL's
 *     files have those two swapped: rows of W, and of a LoRA's B, never of A.
 *   - In SCFM the second half-step always uses the slow average, and no gradient enters the target.
 *   - CLIP's pooled vector is taken where the highest id first stands (the eos_token_id in its
 *     config.json is wrong); T5's padding is not masked.
 *   - Latents are (z - shift_factor) * scaling_factor, then packed 2x2: channel, row, column.
 */
#ifndef SHORTCUT_H
#define SHORTCUT_H

/* POSIX under -std=c99; no effect where the program included a system header before this one, which
 * then must have asked for it itself. */
#if defined(SHORTCUT_IMPLEMENTATION) && defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ==== Errors ====
 * In all that follows false, NULL or -1 means failure, and sc_error() says what was attempted,
 * expected and found. What _open, _new, _parse and _load return is yours, to be given to _close or
 * _free; const pointers live as long as what they were asked of. Host arrays are yours. A tape, and
 * a model that computes on it, belong to one thread at a time, and all that is on a GPU to one. */
const char *sc_error(void); /* the last failure on this thread, one line; valid until the next */
bool sc_set_error(const char *line); /* for backends in other files; returns false */

/* ==== Random numbers ==== */
typedef struct sc_rng { uint64_t state; } sc_rng; /* the seed is the first state */
uint64_t sc_random_bits(sc_rng *rng);
float sc_uniform(sc_rng *rng);                          /* in [0, 1) */
int sc_uniform_int(sc_rng *rng, int n);                 /* in {0, ..., n-1} */
void sc_normal(sc_rng *rng, float *x, int64_t n);       /* x[n] ~ N(0, 1) */

/* ==== Tensors ==== */
typedef enum { SC_F32, SC_BF16, SC_F16, SC_F8_E4M3, SC_F64, SC_I64, SC_I32, SC_U8 } sc_dtype;
#define SC_MAX_DIMS 5

typedef struct sc_tensor {
    void *data;                 /* contiguous, row-major */
    void *grad;                 /* d loss / d data, same shape; NULL until something asks for it */
    bool needs_grad;            /* backward passes reach this tensor */
    bool new_grad;              /* nothing is in grad yet: the first to give a part stores it */
    bool shared, stale;         /* in memory that blocks share; another block's by now */
    sc_dtype dtype;
    int ndim;
    int64_t shape[SC_MAX_DIMS];
    float *scale;              /* matrices of SC_F8_E4M3: what each row is multiplied by; NULL: 1 */
} sc_tensor;

int64_t sc_count(const sc_tensor *x);                   /* of its elements */
int sc_dtype_size(sc_dtype dtype);                      /* bytes of an element */
const char *sc_dtype_name(sc_dtype dtype);              /* "BF16", as in safetensors */
/* n elements of host memory; of SC_F8_E4M3 without the scales. */
void sc_to_f32(float *dst, const void *src, sc_dtype dtype, int64_t n);

/* ==== JSON and safetensors ====
 * Readers of a JSON value take NULL for "absent" and then give the fallback, so that a path into a
 * document needs no checks. `name` stands before messages, with the line. */
typedef struct sc_json sc_json;
sc_json *sc_json_parse(const char *text, size_t length, const char *name);
sc_json *sc_json_load(const char *path);
void sc_json_free(sc_json *root);
const sc_json *sc_json_get(const sc_json *object, const char *key);      /* NULL: absent */
const sc_json *sc_json_at(const sc_json *array, int64_t index);          /* NULL: past the end */
int64_t sc_json_length(const sc_json *value);                            /* of an array or object */
const char *sc_json_key(const sc_json *object, int64_t index);           /* index-th key */
const sc_json *sc_json_value(const sc_json *object, int64_t index);      /* and its value */
const char *sc_json_string(const sc_json *value, const char *fallback);  /* UTF-8, NUL-terminated */
double sc_json_number(const sc_json *value, double fallback);
bool sc_json_bool(const sc_json *value, bool fallback);

typedef struct sc_file sc_file;                     /* one or several mapped safetensors files */
/* A .safetensors, an .index.json, or a folder with either. While it is open it may be replaced, as
 * sc_file_save does, but not be cut short: reading what is gone ends the program (SIGBUS). */
sc_file *sc_file_open(const char *path);
void sc_file_close(sc_file *file);
const char *sc_file_path(const sc_file *file);
int64_t sc_file_count(const sc_file *file);
const char *sc_file_name(const sc_file *file, int64_t index);
const sc_tensor *sc_file_tensor(const sc_file *file, int64_t index);
const sc_tensor *sc_file_find(const sc_file *file, const char *name);    /* NULL: absent */
const char *sc_file_metadata(const sc_file *file, const char *key);      /* NULL: absent */

/* A host tensor and its type in the file: its own, or f32 rounded to bf16 or f16. metadata: key,
 * value, ..., NULL; or NULL. The file appears under `path` when all of it is on disk. */
typedef struct sc_named { const char *name; const sc_tensor *tensor; sc_dtype dtype; } sc_named;
bool sc_file_save(const char *path, const sc_named *tensors, int64_t count,
                  const char *const *metadata);

/* ==== Backend: the operations, behind one table ====
 * What each computes, forward and backward, and on which shapes, stands over its CPU version. Every
 * pointer inside a tensor that a backend is given is memory of that backend. Activations have the
 * type `activation`; LoRA factors, optimiser state and losses are f32; frozen weights keep the type
 * they have on disk. `_backward` functions add into the gradients of inputs that need them, or,
 * where `new_grad` says so, store (of x, h, q, k and v, of which they write all). */
typedef struct sc_matrix {      /* row-major; `transposed`: used as its transpose */
    const void *data;
    sc_dtype dtype;
    int64_t ld;                 /* elements from one stored row to the next */
    bool transposed;
    const float *scale;         /* of each stored row, with SC_F8_E4M3 only; NULL: 1 */
    uint64_t content;           /* of a layer's input: same number, same values; 0: not known */
} sc_matrix;

typedef enum { SC_SILU, SC_GELU_TANH, SC_GELU, SC_QUICK_GELU } sc_activation;

typedef struct sc_adamw {        /* one step of AdamW */
    float lr, beta1, beta2, eps, weight_decay;
    float clip;                 /* a longer gradient is shortened to this norm first; 0: never */
    int64_t step;               /* steps done before */
} sc_adamw;

typedef struct sc_trained {     /* trained numbers, all [count], f32 */
    int64_t count;
    float *w, *grad, *m, *v;    /* gradient and Adam's moments */
    float *average[2];          /* exponential averages of w; NULL: none */
} sc_trained;

enum { SC_POSTS = 4, SC_POST_SIZE = 4 };

typedef struct sc_backend {
    const char *name;
    sc_dtype activation;
    bool on_host;               /* its memory is the host's: mapped files are used where they are */
    /* Memory: NULL with the error set when there is not enough. */
    void *(*alloc)(size_t bytes);
    void (*release)(void *p);
    size_t (*memory_left)(void); /* bytes that alloc can still give, about */
    /* Host memory for a matrix that only products read, copied to the device ahead of each use;
     * given back by `release`. NULL: memory is the host's anyway. */
    void *(*alloc_streamed)(size_t bytes);
    void (*upload)(void *device, const void *host, size_t bytes);
    /* Waits for all work. False with the error set if this or any operation before it failed: the
     * others may be asynchronous, and report nothing. */
    bool (*download)(void *host, const void *device, size_t bytes);
    /* A few numbers come to the host without holding up the work: `post` queues their copy, and
     * `collect` waits for the copy that was posted first, but not for what was queued after it. At
     * most SC_POSTS are under way; false as for download. */
    void (*post)(const double *device, int count);
    bool (*collect)(double *host, int count);
    void (*zero)(void *p, size_t bytes);
    /* C[m,n] = alpha op(A) op(B) + beta C + bias; bias [n] or NULL. */
    void (*gemm)(int64_t m, int64_t n, int64_t k, float alpha, sc_matrix a, sc_matrix b, float beta,
                 sc_matrix c, const sc_tensor *bias);
    /* C = gelu(A op(B) + beta C + bias), tanh form, in one pass where a backend can. `before` [m,n]
     * keeps what went into the GELU, for the backward pass; NULL: none follows. */
    void (*gemm_gelu)(int64_t m, int64_t n, int64_t k, sc_matrix a, sc_matrix b, float beta,
                      sc_matrix c, const sc_tensor *bias, sc_tensor *before);
    /* e4m3 with a scale for each row, so that its largest value becomes 448; from: the activations'
     * type. */
    void (*quantize)(uint8_t *to, float *scale, const void *from, int64_t rows, int64_t columns);
    /* dst[r][c] (+)= src[r][c]: concatenation, slices, and their gradients. */
    void (*copy_block)(void *dst, int64_t dst_ld, const void *src, int64_t src_ld, int64_t rows,
                       int64_t columns, sc_dtype dtype, bool accumulate);
    void (*column_sum)(float *sum, const void *x, int64_t rows, int64_t columns); /* sum[c] += */
    /* y[b] = p[b] * u[b] + q[b] * v[b], one pair of host coefficients for each of the B samples. */
    void (*blend)(sc_tensor *y, const float *p, const sc_tensor *u, const float *q,
                  const sc_tensor *v);
    void (*embed_timestep)(sc_tensor *y, const float *t);
    /* y: in its columns from `at` on, and so its gradient. */
    void (*activate)(sc_activation kind, sc_tensor *y, int64_t at, const sc_tensor *x);
    void (*activate_backward)(sc_activation kind, const sc_tensor *y, int64_t at, sc_tensor *x);
    void (*multiply)(sc_tensor *y, const sc_tensor *a, const sc_tensor *b);
    void (*ln_modulate)(sc_tensor *y, const sc_tensor *x, const sc_tensor *mod, int shift,
                        int scale);
    void (*ln_modulate_backward)(const sc_tensor *y, sc_tensor *x, sc_tensor *mod, int shift,
                                 int scale);
    void (*gated_residual)(sc_tensor *y, const sc_tensor *x, const sc_tensor *h,
                           const sc_tensor *mod, int gate);
    void (*gated_residual_backward)(const sc_tensor *y, sc_tensor *x, sc_tensor *h, sc_tensor *mod,
                                    int gate);
    void (*norm_rope)(sc_tensor *y, int64_t offset, const sc_tensor *x, const sc_tensor *weight,
                      const sc_tensor *rope);
    void (*norm_rope_backward)(const sc_tensor *y, int64_t offset, sc_tensor *x, sc_tensor *weight,
                               const sc_tensor *rope);
    /* lse [B,H,Tq], f32, keeps log(sum(exp(scores))) for the backward pass; NULL: none follows. */
    void (*attention)(sc_tensor *o, float *lse, const sc_tensor *q, const sc_tensor *k,
                      const sc_tensor *v, int heads, float scale, const sc_tensor *bias,
                      bool causal);
    void (*attention_backward)(const sc_tensor *o, const float *lse, sc_tensor *q, sc_tensor *k,
                               sc_tensor *v, int heads, float scale);
    void (*layer_norm)(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                       float eps);
    void (*rms_norm)(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, float eps);
    void (*embed_tokens)(sc_tensor *y, const sc_tensor *table, const int32_t *ids);
    /* Group norm in two parts, so that a picture [B,C,H,W] may come in strips: the values and their
     * squares in `rows` rows from `first` on are added to sums [B, groups, 2], f64; then y, which
     * may be x, is normed with the sums over `size` values of each group. */
    void (*group_sums)(double *sums, const sc_tensor *x, int64_t first, int64_t rows, int groups);
    void (*group_norm)(sc_tensor *y, const sc_tensor *x, const double *sums, int64_t size,
                       const sc_tensor *w, const sc_tensor *b, int groups, float eps, bool silu);
    void (*conv2d)(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                   int stride, int pad_before);
    void (*upsample)(sc_tensor *y, const sc_tensor *x);
    void (*swap_axes)(sc_tensor *y, const sc_tensor *x);
    /* Loss and optimiser, all f32. */
    /* *loss and *norm are the backend's memory. */
    void (*mse)(double *loss, const sc_tensor *prediction, const sc_tensor *target);
    void (*mse_backward)(sc_tensor *prediction, const sc_tensor *target, float factor);
    /* One step: clips, AdamW, moves the averages (average = decay average + (1 - decay) w), clears
     * the gradient. *norm: the gradient's before clipping; not finite: w did not change. */
    void (*update)(const sc_trained *x, const sc_adamw *o, const float decay[2], double *norm);
} sc_backend;

const sc_backend *sc_cpu(void);
void sc_set_threads(int n);         /* CPU threads; 0: OMP_NUM_THREADS, else one per core */
const sc_backend *sc_cuda(void);    /* shortcut_cuda.cu; NULL with the error set: no usable GPU */

/* ==== Tape: eager operations, recorded when a gradient is wanted ====
 * Every operation returns a new tensor in the tape's arena (valid until sc_tape_reset), or NULL
 * with the error set; an operation given NULL returns NULL, so a model is written without checks
 * and tests its last result only. Shapes: B batch, T tokens, C channels, H heads. */
typedef struct sc_tape sc_tape;

/* The four sets of LoRA weights that share one frozen base. */
typedef enum { SC_TEACHER, SC_STUDENT, SC_FAST, SC_SLOW, SC_SETS } sc_set;

typedef struct sc_adapter {     /* LoRA on one linear layer: W + scale * B A */
    int rank;
    float scale;
    sc_tensor *a[SC_SETS];      /* [rank, in]; NULL: this set adds nothing */
    sc_tensor *b[SC_SETS];      /* [out, rank] */
    bool loaded;                /* from a file, for sampling; freed by sc_lora_unload */
    struct sc_adapter *next;    /* another LoRA on the same layer */
} sc_adapter;

typedef struct sc_linear_layer {
    sc_tensor *weight;          /* [out, in] */
    sc_tensor *bias;            /* [out], or NULL */
    sc_adapter *adapters;
} sc_linear_layer;

sc_tape *sc_tape_new(const sc_backend *backend);
void sc_tape_free(sc_tape *tape);
void sc_tape_reset(sc_tape *tape);                       /* forget all tensors, keep the memory */
void sc_tape_record(sc_tape *tape, bool recording);
/* [B] sc_set each; NULL: all teacher */
void sc_tape_use(sc_tape *tape, const uint8_t *set_of_sample);
size_t sc_tape_bytes(const sc_tape *tape);               /* memory held */
size_t sc_tape_peak(const sc_tape *tape);                /* most that was in use at once, ever */
bool sc_tape_reserve(sc_tape *tape, size_t bytes);       /* forget all tensors, hold exactly this */
bool sc_backward(sc_tape *tape);                         /* from the recorded loss to every leaf */

sc_tensor *sc_new(sc_tape *t, int ndim, const int64_t *shape);     /* activation, not initialised */
/* upload of f32 */
sc_tensor *sc_from(sc_tape *t, int ndim, const int64_t *shape, const float *values);
bool sc_read(sc_tape *t, const sc_tensor *x, float *values);            /* download as f32 */

/* [..., in] -> [..., out] */
sc_tensor *sc_linear(sc_tape *t, const sc_tensor *x, const sc_linear_layer *layer);
/* gelu(linear(x)), tanh form */
sc_tensor *sc_linear_gelu(sc_tape *t, const sc_tensor *x, const sc_linear_layer *layer);
sc_tensor *sc_activate(sc_tape *t, sc_activation kind, sc_tensor *x);   /* same shape */
sc_tensor *sc_add(sc_tape *t, sc_tensor *a, sc_tensor *b);              /* same shape */
sc_tensor *sc_multiply(sc_tape *t, sc_tensor *a, sc_tensor *b);       /* same shape; not recorded */
/* x, h [B,T,C]; mod [B,K*C] holds K vectors for each sample; shift, scale and gate each name one:
 * norm(x) (1 + mod[scale]) + mod[shift], a layer norm without weights; x + mod[gate] h. */
sc_tensor *sc_ln_modulate(sc_tape *t, sc_tensor *x, sc_tensor *mod, int shift, int scale);
sc_tensor *sc_gated_residual(sc_tape *t, sc_tensor *x, sc_tensor *h, sc_tensor *mod, int gate);
/* text [B,Tt,C] (or NULL) and image [B,Ti,C] -> [B,Tt+Ti,C]: each head's RMS norm, times a weight
 * [D], turned by RoPE's (cos, sin), rope [Tt+Ti,D/2,2]. */
sc_tensor *sc_norm_rope(sc_tape *t, sc_tensor *text, sc_tensor *image, sc_tensor *text_weight,
                        sc_tensor *image_weight, const sc_tensor *rope);
/* [B,Ta,C], [B,Tb,C] -> [B,Ta+Tb,C] */
sc_tensor *sc_concat_tokens(sc_tape *t, sc_tensor *a, sc_tensor *b);
/* [B,T,C] -> [B,count,C] */
sc_tensor *sc_slice_tokens(sc_tape *t, sc_tensor *x, int64_t from, int64_t count);
/* [B,T,Ca], [B,T,Cb] -> [B,T,Ca+Cb] */
sc_tensor *sc_concat_channels(sc_tape *t, sc_tensor *a, sc_tensor *b);
/* The same of a and gelu(linear(x)). */
sc_tensor *sc_concat_gelu(sc_tape *t, sc_tensor *a, const sc_tensor *x,
                          const sc_linear_layer *layer);
/* softmax(scale q k^T + bias) v, head by head; q [B,Tq,C], k, v [B,T,C]; bias [H,Tq,T] or NULL.
 * Not recorded if it has a bias or is causal. */
sc_tensor *sc_attention(sc_tape *t, sc_tensor *q, sc_tensor *k, sc_tensor *v, int heads,
                        float scale, const sc_tensor *bias, bool causal);
/* times [batch] on the host, in [0, 1] -> sinusoids of 1000 t, [batch, channels] */
sc_tensor *sc_timestep_embedding(sc_tape *t, const float *times, int64_t batch, int64_t channels);
/* p[b] u[b] + q[b] v[b]; p and q [B] on the host; not recorded */
sc_tensor *sc_blend(sc_tape *t, const float *p, sc_tensor *u, const float *q, sc_tensor *v);
/* Mean square error, into *loss, which is the backend's memory. */
bool sc_mse(sc_tape *t, sc_tensor *prediction, const sc_tensor *target, float weight, double *loss);

/* Operations of the frozen networks (text encoders, VAE, evaluator); not recorded. Norms are over
 * the last dimension, w and b [C]; ids [batch, tokens] on the host, table [vocabulary, C]. */
sc_tensor *sc_layer_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                         float eps);
sc_tensor *sc_rms_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, float eps);
sc_tensor *sc_embed_tokens(sc_tape *t, const sc_tensor *table, const int32_t *ids, int64_t batch,
                           int64_t tokens);
/* Pictures are [B,C,H,W]. conv2d: w [out,in,k,k], k up to 5, b [out] or NULL; zero padding:
 * pad_before on the top and left, and on the other sides as much as makes H_out = H / stride.
 * upsample: nearest, twice the sides. */
sc_tensor *sc_conv2d(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                     int stride, int pad_before);
sc_tensor *sc_group_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                         int groups, float eps, bool silu);
sc_tensor *sc_upsample(sc_tape *t, const sc_tensor *x);
sc_tensor *sc_swap_axes(sc_tape *t, const sc_tensor *x);  /* [B,M,N] -> [B,N,M] */
/* same data, new shape */
sc_tensor *sc_reshape(sc_tape *t, const sc_tensor *x, int ndim, const int64_t *shape);

/* A block reads in[] (at most 5) and makes out[0] and perhaps out[1]. sc_checkpoint keeps its
 * inputs only, and runs it again in the backward pass. sc_keep keeps all, but the gradients inside
 * it live no longer than its part of the backward pass. */
typedef bool (*sc_block)(sc_tape *t, sc_tensor **in, sc_tensor **out, const void *context);
bool sc_checkpoint(sc_tape *t, sc_block block, const void *context, sc_tensor **in, int inputs,
                   sc_tensor **out);
bool sc_keep(sc_tape *t, sc_block block, const void *context, sc_tensor **in, int inputs,
             sc_tensor **out);

/* ==== Weights of a network ==== */
#define SC_MAX_NAME 128         /* of a module */

typedef struct sc_weight {
    char *name;
    sc_tensor tensor;
    sc_tensor source;           /* as its file has it (mapped); data is NULL where it was drawn */
    bool owned;                 /* its memory is the backend's, not the mapped file's */
    bool waiting;               /* in the file: sc_net_load will copy it to the backend */
    bool missing;               /* of a plan: the file has no such weight, or of another shape */
} sc_weight;
typedef struct sc_net {
    const sc_backend *backend;  /* NULL: a plan; weights have names and shapes, but no data */
    sc_file *file;              /* NULL: all weights are drawn at random */
    sc_rng rng;                 /* for random weights */
    bool widen;           /* all weights become f32 (to train them, or for a small model's speed) */
    bool fp8;             /* matrices become e4m3 with a scale for each row, when they are loaded */
    bool streamed;        /* matrices stay in host memory, and come when they are needed */
    int levels;                 /* of a VAE, whose files may count them backwards */
    sc_weight **weights;        /* in the order they were asked for */
    int64_t count;
} sc_net;
/* path: a safetensors file, an index of shards, or a folder with either; NULL: random weights. */
sc_net *sc_net_open(const sc_backend *backend, const char *path, bool widen);
void sc_net_close(sc_net *net);
/* Copies what waits in the file to a backend with memory of its own (or, with fp8, to any): at once
 * after opening, or when the network is first used, so that others may use the memory before. */
bool sc_net_load(sc_net *net);
size_t sc_net_waiting(const sc_net *net);   /* bytes that sc_net_load will take */
/* The weight `name` with exactly this shape, under whatever name the file has it (matrices keep
 * their type on disk unless widened, vectors become f32). NULL with the error set, which names the
 * file, what was expected and what found. */
sc_tensor *sc_net_weight(sc_net *net, const char *name, int ndim, const int64_t *shape);
/* "name.weight" [out, in] and, with `bias`, "name.bias" [out]. */
bool sc_net_linear(sc_net *net, sc_linear_layer *layer, const char *name, int64_t out, int64_t in,
                   bool bias);

/* ==== FLUX transformer ==== */
typedef struct sc_flux_config {     /* transformer/config.json */
    int in_channels;                /* of a packed latent token: 64 */
    int out_channels;
    int layers, single_layers;      /* double and single blocks: 19, 38 */
    int heads, head_size;           /* 24, 128 */
    int text_channels;              /* joint_attention_dim: 4096 */
    int pooled_channels;            /* pooled_projection_dim: 768 */
    int rope_axes[3];               /* 16, 56, 56: their sum is head_size */
    bool guidance;                  /* guidance-distilled (dev), or not (schnell) */
} sc_flux_config;

typedef struct sc_flux sc_flux;

/* Opens a folder (config.json and weights) or a single file, whose shapes then say the config.
 * random: weights are drawn from `seed` instead of read: with `widen` to train them, without to
 * measure speed. backend NULL: a plan, without data. */
sc_flux *sc_flux_open(const sc_backend *backend, const char *path, bool widen, bool random,
                      uint64_t seed);
void sc_flux_close(sc_flux *flux);
const sc_flux_config *sc_flux_config_of(const sc_flux *flux);
int64_t sc_flux_parameters(const sc_flux *flux);
void sc_flux_checkpointing(sc_flux *flux, bool on);  /* recompute each block in the backward pass */
/* Keep the matrices as e4m3: half of bf16's memory. Before the model is first used; not with
 * `widen`. */
bool sc_flux_fp8(sc_flux *flux);
/* Keep the matrices in host memory, for GPUs that are too small. Before the model is first used. */
void sc_flux_streamed(sc_flux *flux);

/* Writes config.json and diffusion_pytorch_model.safetensors (weights as `dtype`: f32, bf16 or f16)
 * into `folder`, with W + scale B A where LoRAs are loaded; one weight at a time is in memory. Not
 * beside an index of shards, which readers prefer. */
bool sc_flux_save(const sc_flux *flux, const char *folder, sc_dtype dtype,
                  const char *const *metadata);

typedef struct sc_flux_input {
    sc_tensor *x;               /* [B, h*w, in_channels] noisy packed latents */
    sc_tensor *context;         /* [B, T, text_channels] T5 output */
    sc_tensor *pooled;          /* [B, pooled_channels] CLIP output */
    const float *time;          /* [B] in [0, 1]: 1 is noise */
    const float *guidance;      /* [B]; ignored where the model takes none */
    int h, w;                   /* the grid of tokens: latent sides / 2 */
} sc_flux_input;

/* The velocity v(x, t, c, g), [B, h*w, out_channels]; recorded if the tape records. */
sc_tensor *sc_flux_velocity(sc_flux *flux, sc_tape *tape, const sc_flux_input *in);

/* ==== What is trained ====
 * All trained numbers lie in one f32 array, in up to four copies (sets), so that a set is chosen by
 * a pointer and one call updates everything. They are either the LoRA factors or all weights. */
typedef struct sc_params {
    const sc_backend *backend;
    int64_t count;
    float *set[SC_SETS];        /* NULL: not there (the teacher of a LoRA is the bare base) */
    float *grad, *m, *v;        /* gradients and Adam's moments */
    double *results;            /* the backend's: loss and gradient's norm of a step */
    int waiting;                /* steps that were not asked about */
    sc_flux *flux;
    /* one for each of the model's linear layers; NULL: all weights are trained */
    sc_adapter *adapters;
    int rank;
} sc_params;

/* A new LoRA on every linear layer: A gaussian (std 1/rank), B zero; attached to the model until
 * freed. */
sc_params *sc_params_lora(sc_flux *flux, int rank, float alpha, uint64_t seed);
/* All weights (opened with `widen`); teacher: keep a frozen copy of them. From then on the model's
 * weights are these: it computes nothing after sc_params_free. */
sc_params *sc_params_full(sc_flux *flux, bool teacher);
void sc_params_free(sc_params *params);
void sc_params_use(sc_params *params, sc_set set);    /* all weights only: compute with this copy */
void sc_params_copy(sc_params *params, sc_set to, sc_set from);
/* One step of the student and both averages (see sc_backend.update), counted in adamw->step. */
void sc_params_step(sc_params *params, sc_adamw *adamw, float fast_decay, float slow_decay);
/* The loss, and the gradient's norm before clipping, of the first step that was not asked about.
 * Asked one step late, it keeps a GPU busy: this waits for that step only. The last SC_POSTS steps
 * of a thread are kept, whichever params made them: ask one before another steps. A norm that is
 * not finite: the step changed nothing. */
bool sc_params_report(sc_params *params, double *loss, double *norm);

/* ==== LoRA files ====
 * Written: safetensors, PEFT names, transformer.<module>.lora_A.weight [rank, in] and
 * .lora_B.weight [out, rank], bf16, the scale alpha / rank multiplied into B. Read: those, with any
 * rank and alpha (tensors, diffusers' metadata, or PEFT's adapter_config.json beside its
 * adapter_model.safetensors), and the names of diffusers, kohya, OneTrainer, BFL, ComfyUI and
 * XLabs. */
bool sc_lora_save(const sc_params *params, sc_set set, const char *path,
                  const char *const *metadata);
/* The loaded LoRAs, with their scales, as one file in kohya's names (lora_unet_..., bf16): the
 * parts of a fused layer become one of their ranks' sum, exactly. */
bool sc_lora_save_kohya(const sc_flux *flux, const char *path, const char *const *metadata);
typedef struct sc_lora_report {
    int applied, total;         /* adapters: a pair of A and B each; total: strays too */
    char missed[2048];          /* names that fit no layer, separated by spaces, cut with ... */
} sc_lora_report;
/* Adds a LoRA file to a model, under the teacher set (what sampling uses), on top of those that are
 * loaded. False if no adapter applies, or one that names a layer has the wrong shape or holds NaN;
 * those before it may be loaded then. Stays until sc_lora_unload. */
bool sc_lora_load(sc_flux *flux, const char *path, float scale, sc_lora_report *report);
/* What a LoRA file's metadata recommends for a number of steps ("3:1@1.5 8:0.6": that of the
 * nearest): the scale, else 1; *guidance (or NULL) becomes the number behind the @, if there is
 * one. */
float sc_lora_scale(const char *path, int steps, float *guidance);
void sc_lora_unload(sc_flux *flux); /* takes all loaded LoRAs off again */
/* Copies a LoRA file's factors into the sets of `params` (all of its layers, the same rank). */
bool sc_lora_start(sc_params *params, const char *path);

/* ==== Flow matching ====
 * t = 1 is noise, t = 0 is data: x_t = (1 - t) x0 + t eps; the velocity is eps - x0. */
float sc_shift_time(float u, float shift);                      /* s u / (1 + (s - 1) u) */
float sc_dynamic_shift(int64_t tokens);                         /* FLUX: exp(mu(tokens)) */
/* steps + 1 times, from 1 - 1e-5 down to 0 (the paper's sampler; diffusers' starts at 1). */
void sc_schedule(float *times, int steps, float shift);

typedef struct sc_sampling {
    int steps;
    float shift;                /* of the times; 0: FLUX's dynamic shift */
    float guidance;
    int h, w;                   /* grid of tokens */
    const uint8_t *sets;        /* [B] LoRA set of each sample; NULL: the loaded LoRAs, if any */
    /* After each step; false stops. NULL: none. */
    bool (*progress)(void *user, int step, int steps);
    void *user;
} sc_sampling;

/* Euler from noise to data: latents [B, h*w, in_channels] (host f32) holds noise before, the sample
 * after. context [B, T, text_channels] and pooled [B, pooled_channels] are host f32. */
bool sc_sample(sc_flux *flux, sc_tape *tape, const sc_sampling *s, int batch, int text_tokens,
               const float *context, const float *pooled, float *latents);

/* ==== SCFM, flow matching, guidance distillation ====
 * They differ in what the student is asked (noisy input, time, guidance) and what it should answer
 * (target); all share one batch and one student pass. */
typedef struct sc_recipe {
    float teacher_ratio;        /* SCFM: how often the first half-step is the teacher's */
    int teacher_steps;          /* N of the teacher case */
    int self_steps[8];          /* N of the self case: one of these, ended by 0 */
    float shift[2];             /* the random time shift: uniform between these */
    float dynamic_shift_ratio;  /* how often FLUX's dynamic shift is used instead */
    float guidance[2];          /* uniform between these */
    float fm_ratio;             /* SCFM: part of the batch with the plain flow-matching target;
                                 * 1: flow matching alone */
    float caption_dropout;      /* how often the caption is left empty */
    bool distil_guidance;       /* instead of all that, the target is the teacher's velocity, guided
                                 * by its velocity without a caption */
} sc_recipe;

typedef struct sc_batch {       /* host f32; one text-picture pair per sample */
    int size, h, w, text_tokens;
    const float *x0, *noise;    /* [B, h*w, in_channels] packed latents; N(0, 1) */
    /* [B, T, text_channels], [B, pooled_channels]: overwritten where a caption is dropped */
    float *context, *pooled;
    const float *no_context, *no_pooled;    /* the empty caption's, one sample */
} sc_batch;

typedef struct sc_draw {        /* what chance decides for one sample */
    bool teacher;               /* first half-step by the teacher, else by the fast average */
    bool no_caption;
    int steps, j;               /* N, and the even index into its times */
    float shift, guidance;
    float t[3];                 /* t_j, t_j+1, t_j+2 */
} sc_draw;

/* tokens: of the picture; flow_matching: t[0] is any time, not one of a grid's. */
void sc_draw_sample(const sc_recipe *recipe, sc_rng *rng, int64_t tokens, bool flow_matching,
                    sc_draw *draw);

/* A velocity model in four versions (sets), as SCFM sees it; [first, first + x->shape[0])
 * says which samples of the batch x holds. FLUX is one; a toy network may be another. */
typedef struct sc_model {
    sc_tensor *(*velocity)(void *self, sc_tape *t, sc_tensor *x, int64_t first, const uint8_t *sets,
                           const float *time, const float *guidance);
    void *self;
} sc_model;

/* The noisy input x = (1 - t) x0 + t eps, each sample at the first time of its draw. */
sc_tensor *sc_noisy(sc_tape *t, const sc_draw *draws, sc_tensor *x0, sc_tensor *noise);
/* What SCFM wants the student to say of x: fills the samples [first, B) of target, which has x's
 * shape. */
bool sc_scfm_target(const sc_model *model, sc_tape *t, const sc_draw *draws, int64_t first,
                    const sc_tensor *x, sc_tensor *target);

/* One training step's gradient: draws, target, student pass, backward. Resets the tape. It may be
 * under way only: sc_params_report has the loss after sc_params_step. */
bool sc_train_gradient(sc_flux *flux, sc_params *params, sc_tape *t, const sc_recipe *recipe,
                       const sc_batch *batch, sc_rng *rng);

/* Where a device's memory is limited: chooses how many blocks keep their activations for the
 * backward pass, the others being run again. Makes one training step for `batch`, the largest there
 * will be, whose gradient it forgets, and reserves what was found in the tape. */
typedef struct sc_memory_plan {
    size_t left;                /* bytes there are for activations */
    size_t step, kept_bytes;    /* of a step if all blocks run again; more for those that do not */
    int blocks, kept;
    bool remade;                /* of kept ones, too, what is cheap is made again */
} sc_memory_plan;
bool sc_plan_memory(sc_flux *flux, sc_params *params, sc_tape *t, const sc_recipe *recipe,
                    const sc_batch *batch, sc_memory_plan *plan);

/* ==== VAE: pictures <-> latents ==== */
#define SC_VAE_LEVELS 8
#define SC_VAE_LAYERS 8

typedef struct sc_vae_config {  /* vae/config.json */
    int latent_channels;        /* 16 */
    int levels;                 /* 4; sides halve between them, so f = 2^(levels - 1) = 8 */
    int channels[SC_VAE_LEVELS];    /* block_out_channels: 128, 256, 512, 512 */
    int layers;                 /* residual blocks of an encoder level: 2; the decoder has 1 more */
    int groups;                 /* of every group norm: 32 */
    bool attention;             /* in the middle of both halves */
    bool quant, post_quant;     /* 1x1 convolutions around the latents: not in FLUX */
    float scale, shift;         /* normalised: (latents - shift) * scale; 0.3611, 0.1159 */
    int resolution;             /* sample_size: usual side of a picture, 1024 */
} sc_vae_config;

typedef struct sc_vae sc_vae;
/* Opens a folder (config.json and weights) or a single file, whose shapes then say the config;
 * widen: converts the weights to f32 once, now. backend NULL: a plan, without data. */
sc_vae *sc_vae_open(const sc_backend *backend, const char *path, bool widen);
void sc_vae_close(sc_vae *vae);
const sc_vae_config *sc_vae_config_of(const sc_vae *vae);
int sc_vae_factor(const sc_vae *vae);   /* pixels per latent: f */

/* Host f32, batches of any size. Pictures [B,3,H,W] in [-1,1], H and W multiples of f; latents
 * [B,C,H/f,W/f], not normalised; logvar is clamped to [-30,20]. Activations take `memory` bytes at
 * most (0: no limit): what would take more is computed strip by strip, which takes longer and
 * gives the same but for rounding. Least: the activations of the middle, and a few rows. */
bool sc_vae_encode(sc_vae *vae, int64_t batch, int64_t height, int64_t width,
                   const float *pictures, float *mean, float *logvar, size_t memory);
/* height and width: of the latents. The pictures may go a little beyond [-1,1]. */
bool sc_vae_decode(sc_vae *vae, int64_t batch, int64_t height, int64_t width,
                   const float *latents, float *pictures, size_t memory);

/* In place, n values: mean becomes (mean - shift) * scale, logvar its std deviation * scale. */
void sc_vae_normalise(const sc_vae *vae, int64_t n, float *mean, float *logvar);
void sc_vae_unnormalise(const sc_vae *vae, int64_t n, float *latents);
/* z[n] ~ N(mean, std^2), for normalised latents, packed or not. */
void sc_sample_posterior(sc_rng *rng, int64_t n, const float *mean, const float *std, float *z);

/* Latents [B,C,h,w] <-> FLUX's tokens [B, h/2 * w/2, 4C], h and w even: a token is a 2x2 square,
 * channel by channel (diffusers: FluxPipeline._pack_latents). */
void sc_pack_latents(int64_t batch, int64_t channels, int64_t h, int64_t w, const float *latents,
                     float *tokens);
void sc_unpack_latents(int64_t batch, int64_t channels, int64_t h, int64_t w, const float *tokens,
                       float *latents);

/* ==== Tokenizers ==== */
typedef struct sc_tokenizer sc_tokenizer;
/* From a folder: tokenizer.json with a Unigram model (T5), or vocab.json and merges.txt (CLIP). */
sc_tokenizer *sc_tokenizer_open(const char *folder);
void sc_tokenizer_close(sc_tokenizer *t);
int sc_tokenizer_length(const sc_tokenizer *t);  /* model_max_length; 0: not said */
/* Exactly `length` ids, cut or padded, the end token kept. Bytes that are not UTF-8 become U+FFFD.
 * Returns how many ids are not padding; -1: error. */
int sc_tokenize(const sc_tokenizer *t, const char *text, int length, int32_t *ids);

/* ==== Text encoders: CLIP (pooled vector) and T5 (a vector for each token) ==== */
typedef struct sc_text_encoders sc_text_encoders;
/* From a pipeline: text_encoder, tokenizer, text_encoder_2, tokenizer_2, or single files. backend
 * NULL: a plan, without data and tokenizers. */
sc_text_encoders *sc_text_encoders_open(const sc_backend *backend, const char *model);
void sc_text_encoders_close(sc_text_encoders *t);
/* context [tokens, T5's width], pooled [CLIP's width], host f32; any UTF-8, empty too. */
bool sc_text_encode(sc_text_encoders *t, const char *prompt, int tokens, float *context,
                    float *pooled);

/* ==== Pictures and data sets ==== */
typedef struct sc_picture {
    int width, height;
    float *rgb;                 /* [3, height, width] in [-1, 1]; freed by sc_picture_free */
} sc_picture;

/* From decoded pixels, row by row: 1 to 4 channels (grey, grey + alpha, RGB, RGBA) of 8 or 16 bits.
 * Alpha is composited on white; `orientation` is EXIF's, 1 to 8. */
bool sc_picture_from_pixels(sc_picture *p, const void *pixels, int width, int height, int channels,
                            int bits, int orientation);
/* To 8-bit pixels [height, width, 3]. */
void sc_picture_to_pixels(const sc_picture *p, uint8_t *pixels);
void sc_picture_free(sc_picture *p);
/* Scales `p` to cover width x height (bicubic, antialiased), cuts what sticks out on both sides. */
bool sc_picture_fit(sc_picture *out, const sc_picture *p, int width, int height);
/* The sides of the aspect bucket for a picture: multiples of `multiple`, area up to resolution^2,
 * no side above twice the resolution, the ratio as near to the picture's as possible. */
void sc_bucket(int width, int height, int resolution, int multiple, int *bucket_width,
               int *bucket_height);
/* The EXIF orientation in the bytes of a JPEG or PNG file; 1 where there is none. */
int sc_exif_orientation(const uint8_t *bytes, size_t size);

typedef struct sc_pair { char *path, *caption; } sc_pair; /* caption: valid UTF-8, perhaps empty */
typedef struct sc_dataset {
    sc_pair *pairs;             /* in the order of their paths */
    int64_t count;
} sc_dataset;
/* A folder with metadata.jsonl (file_name, and prompt, text or caption), or with name.txt beside
 * every name.png, name.jpg or name.jpeg. Opens no picture. NULL with the error set. */
sc_dataset *sc_dataset_open(const char *folder);
void sc_dataset_close(sc_dataset *data);

/* ==== Pipeline: a whole model ====
 * A folder in diffusers' layout; a folder with single files (flux1-dev.safetensors, ae.safetensors,
 * clip_l.safetensors, t5xxl_*.safetensors, of any names), tokenizer and tokenizer_2; or a file that
 * holds all or some of the parts, the rest being beside it. */

typedef struct sc_pipeline {
    const sc_backend *backend;
    char *folder;
    sc_flux *flux;
    sc_vae *vae;
    sc_text_encoders *text;     /* CLIP and T5 with their tokenizers */
    sc_tape *tape;
    int text_tokens;            /* T5 tokens of a prompt */
    int token_pixels;           /* sides of a picture are multiples of this: 16 for FLUX */
    int resolution;             /* usual side of a picture, in pixels */
    float shift;                /* of the scheduler; 0: FLUX's dynamic shift */
    bool cut;                   /* the last prompt was longer than text_tokens: its end is lost */
} sc_pipeline;

typedef struct sc_pipeline_options {
    bool widen;                 /* all transformer weights in f32: to train or merge them */
    bool fp8;                   /* its matrices as e4m3 */
    bool streamed;              /* its matrices in host memory */
    bool random;                /* transformer weights drawn from `seed` */
    uint64_t seed;
    const char *transformer;    /* another transformer folder; NULL: the pipeline's own */
} sc_pipeline_options;

sc_pipeline *sc_pipeline_open(const sc_backend *backend, const char *model,
                              const sc_pipeline_options *options);
void sc_pipeline_close(sc_pipeline *p);
/* lets the text encoders and the VAE go until they are needed again */
void sc_pipeline_release(sc_pipeline *p);

/* One prompt: context [text_tokens, text_channels], pooled [pooled_channels], host f32. */
bool sc_pipeline_text(sc_pipeline *p, const char *prompt, float *context, float *pooled);
/* rgb [3, height, width] in [-1, 1] -> the normalised posterior, packed: mean and std [tokens,
 * in_channels]. */
bool sc_pipeline_encode(sc_pipeline *p, const float *rgb, int width, int height, float *mean,
                        float *std);
/* Packed normalised latents [B, h*w, in_channels] -> rgb [B, 3, H, W] in [-1, 1]. */
bool sc_pipeline_decode(sc_pipeline *p, const float *latents, int batch, int h, int w, float *rgb);

#ifdef __cplusplus
}
#endif
#endif /* SHORTCUT_H */

#ifdef SHORTCUT_IMPLEMENTATION
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef SC_CALLOC
#define SC_CALLOC calloc
#define SC_REALLOC realloc
#define SC_FREE free
#endif
#if defined(__GNUC__)
#define SC_PRINTF(f, a) __attribute__((format(printf, f, a)))
#define SC_THREAD_LOCAL __thread
#else
#define SC_PRINTF(f, a)
#define SC_THREAD_LOCAL
#endif
#ifdef _OPENMP
#define SC_PRAGMA(x) _Pragma(#x)
#else
#define SC_PRAGMA(x)
#endif
#define SC_PARALLEL_FOR SC_PRAGMA(omp parallel for schedule(static))
#define SC_SIMD SC_PRAGMA(omp simd)
#define SC_SIMD_SUM(s) SC_PRAGMA(omp simd reduction(+ : s))

/* ==== Errors, memory, random numbers, data types ==============================================
 *
 * Nothing here exits or prints. A function that can fail returns false or NULL and leaves one line
 * for sc_error(): what it was doing, what it expected, what it found. Callers that only pass a
 * failure on say nothing ("error already set").
 */

static SC_THREAD_LOCAL char sc__message[1024];

const char *sc_error(void) { return sc__message[0] ? sc__message : "no error"; }

/* Text that comes from files or the command line may hold control characters, which a terminal
 * obeys: they become ?, so that it stays one harmless line. */
static char *sc__plain(char *text) {
    for (char *c = text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?';
    return text;
}

/* Sets the message; returns false, so that `return sc__fail(...)` reads well. */
static SC_PRINTF(1, 2) bool sc__fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(sc__message, sizeof sc__message, format, args);
    va_end(args);
    sc__plain(sc__message);
    return false;
}

bool sc_set_error(const char *line) { return sc__fail("%s", line); }

/* Zeroed memory for `count` items of `size` bytes; NULL with the error set. */
static void *sc__alloc(size_t count, size_t size) {
    void *p = NULL;
    if (size == 0 || count <= SIZE_MAX / 2 / size)
        p = SC_CALLOC(count ? count : 1, size ? size : 1);
    if (!p) sc__fail("out of memory (%zu items of %zu bytes)", count, size);
    return p;
}

/* `list` of `count` items with room for one more: it doubles at powers of two. NULL with the error
 * set; the list is then as it was. */
static void *sc__grow(void *list, int64_t count, size_t size) {
    if (count & (count - 1)) return list;
    size_t room = count ? 2 * (size_t)count : 1;
    void *larger = SC_REALLOC(list, room * size);
    if (!larger) sc__fail("out of memory (a list of %zu items)", room);
    return larger;
}

static char *sc__strdup(const char *s) {
    char *copy = (char *)sc__alloc(strlen(s) + 1, 1);
    if (copy) memcpy(copy, s, strlen(s) + 1);
    return copy;
}

/* splitmix64: one 64-bit word of state, so a training run saves and restores it exactly. */
uint64_t sc_random_bits(sc_rng *rng) {
    uint64_t z = (rng->state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Uniform in [0, 1): 24 bits, so that the float never rounds up to 1. */
float sc_uniform(sc_rng *rng) { return (float)(sc_random_bits(rng) >> 40) * 0x1p-24f; }

/* Uniform in {0, ..., n-1}. */
int sc_uniform_int(sc_rng *rng, int n) {
    return (int)((sc_random_bits(rng) >> 32) * (uint64_t)n >> 32);
}

/* Fills x[n] with N(0, 1), two values from each Box-Muller draw. */
void sc_normal(sc_rng *rng, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 2) {
        double radius = sqrt(-2.0 * log(1.0 - (double)(sc_random_bits(rng) >> 11) * 0x1p-53));
        double angle = 6.283185307179586 * ((double)(sc_random_bits(rng) >> 11) * 0x1p-53);
        x[i] = (float)(radius * cos(angle));
        if (i + 1 < n) x[i + 1] = (float)(radius * sin(angle));
    }
}

static const struct { const char *name; int size; } sc__dtypes[] = {
    [SC_F32] = {"F32", 4}, [SC_BF16] = {"BF16", 2}, [SC_F16] = {"F16", 2},
    [SC_F8_E4M3] = {"F8_E4M3", 1}, [SC_F64] = {"F64", 8}, [SC_I64] = {"I64", 8},
    [SC_I32] = {"I32", 4}, [SC_U8] = {"U8", 1},
};

int sc_dtype_size(sc_dtype dtype) { return sc__dtypes[dtype].size; }
const char *sc_dtype_name(sc_dtype dtype) { return sc__dtypes[dtype].name; }

int64_t sc_count(const sc_tensor *x) {
    int64_t n = 1;
    for (int i = 0; i < x->ndim; i++) n *= x->shape[i];
    return n;
}

static inline float sc__from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t sc__to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

static inline float sc__bf16_to_f32(uint16_t h) { return sc__from_bits((uint32_t)h << 16); }

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t sc__f32_to_bf16(float f) {
    uint32_t bits = sc__to_bits(f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

/* Half floats: exponent bias 15, 10 bits of mantissa; times 2^112 moves the bias to 127. */
static inline float sc__f16_to_f32(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    if ((h & 0x7c00) == 0x7c00) return sc__from_bits(sign | 0x7f800000u | magnitude); /* inf, NaN */
    return sc__from_bits(sign | sc__to_bits(sc__from_bits(magnitude) * 0x1p112f));
}

/* Round to nearest even: the multiplication rounds subnormals, the integer sum all others. */
static inline uint16_t sc__f32_to_f16(float f) {
    uint32_t bits = sc__to_bits(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* rounds to infinity */
    if (magnitude < 0x38800000u)                                    /* subnormal: units of 2^-24 */
        return (uint16_t)(sign | (uint32_t)nearbyintf(sc__from_bits(magnitude) * 0x1p24f));
    return (uint16_t)(sign | (((magnitude + 0xfffu + (magnitude >> 13 & 1)) >> 13) - (112u << 10)));
}

/* 8-bit floats e4m3fn: bias 7, 3 bits of mantissa, no infinity, 0x7f is NaN. */
static inline float sc__f8_to_f32(uint8_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7f) << 20, sign = (uint32_t)(h & 0x80) << 24;
    if ((h & 0x7f) == 0x7f) return sc__from_bits(sign | 0x7fc00000u);
    return sc__from_bits(sign | sc__to_bits(sc__from_bits(magnitude) * 0x1p120f));
}

/* Round to nearest even; beyond 448, the largest number, stays 448. NaN stays NaN. */
static inline uint8_t sc__f32_to_f8(float f) {
    uint32_t bits = sc__to_bits(f), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint8_t)(sign | 0x7f);
    if (magnitude >= 0x43e00000u) return (uint8_t)(sign | 0x7e);
    if (magnitude < 0x3c800000u) /* subnormal: units of 2^-9 */
        return (uint8_t)(sign | (uint32_t)nearbyintf(sc__from_bits(magnitude) * 512.f));
    return (uint8_t)(sign | (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1)) >> 20);
}

/* dst[n] (f32) <- src[n] of any floating type. */
void sc_to_f32(float *dst, const void *src, sc_dtype dtype, int64_t n) {
    const uint16_t *half = (const uint16_t *)src;
    switch (dtype) {
    case SC_F32: memcpy(dst, src, (size_t)n * 4); break;
    case SC_BF16: for (int64_t i = 0; i < n; i++) dst[i] = sc__bf16_to_f32(half[i]); break;
    case SC_F16: for (int64_t i = 0; i < n; i++) dst[i] = sc__f16_to_f32(half[i]); break;
    case SC_F8_E4M3:
        for (int64_t i = 0; i < n; i++) dst[i] = sc__f8_to_f32(((const uint8_t *)src)[i]);
        break;
    case SC_F64: for (int64_t i = 0; i < n; i++) dst[i] = (float)((const double *)src)[i]; break;
    case SC_I64: for (int64_t i = 0; i < n; i++) dst[i] = (float)((const int64_t *)src)[i]; break;
    case SC_I32: for (int64_t i = 0; i < n; i++) dst[i] = (float)((const int32_t *)src)[i]; break;
    case SC_U8: for (int64_t i = 0; i < n; i++) dst[i] = (float)((const uint8_t *)src)[i]; break;
    }
}

/* Vectorisable e^x, within 2 ulp in f32: x = n ln 2 + r, e^x = 2^n * polynomial(r). */
static inline float sc__exp(float x) {
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
    float shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
    /* adding 1.5 * 2^23 rounds to an integer, which then is the low bits of `shifted` */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return p * sc__from_bits((sc__to_bits(shifted) + 127) << 23);
}
static inline float sc__sigmoid(float x) { return 1.f / (1.f + sc__exp(-x)); }

/* ==== CPU operations =========================================================================
 *
 * The specification of every operation: plain loops over rows, forward and backward side by side
 * under one formula. Activations and gradients are f32. Large products go to OpenBLAS where it was
 * found (SHORTCUT_OPENBLAS), one single-threaded call per OpenMP thread, so that a program has one
 * pool of threads and not two that fight.
 */

#ifdef _OPENMP
#include <omp.h>
static int sc__threads(void) { return omp_get_max_threads(); }
static int sc__thread(void) { return omp_get_thread_num(); }
void sc_set_threads(int n) {
    if (n > 0) omp_set_num_threads(n);
}
#else
static int sc__threads(void) { return 1; }
static int sc__thread(void) { return 0; }
void sc_set_threads(int n) { (void)n; }
#endif

static inline float *sc__f(const sc_tensor *x) { return (float *)x->data; }
static inline float *sc__g(const sc_tensor *x) { return (float *)x->grad; }
/* The gradient of a tensor to which parts are only added. */
static float *sc__sum(sc_tensor *x) {
    if (x->new_grad) memset(x->grad, 0, (size_t)sc_count(x) * 4);
    x->new_grad = false;
    return sc__g(x);
}
static inline int64_t sc__last(const sc_tensor *x) { return x->shape[x->ndim - 1]; }
static inline int64_t sc__rows(const sc_tensor *x) { return sc_count(x) / sc__last(x); }

static SC_THREAD_LOCAL bool sc__cpu_failed; /* an operation, since the last download or collect */

/* One growing buffer, for one user at a time; call it outside parallel regions. NULL: there is no
 * memory, and the operation does nothing; the next download or collect says so. */
static SC_THREAD_LOCAL float *sc__buffer;       /* a thread's, until it frees a tape */
static SC_THREAD_LOCAL int64_t sc__capacity;

static void sc__scratch_free(void) {
    SC_FREE(sc__buffer);
    sc__buffer = NULL;
    sc__capacity = 0;
}

static float *sc__scratch(int64_t floats) {
    if (floats <= sc__capacity) return sc__buffer;
    sc__scratch_free();
    sc__buffer = (float *)SC_CALLOC((size_t)floats, sizeof *sc__buffer);
    if (sc__buffer) sc__capacity = floats;
    else sc__cpu_failed = true;
    return sc__buffer;
}

/* ---- Products ---- */

/* C = alpha op(A) op(B) + beta C on this thread; row-major, op(A) [m,k], op(B) [k,n]. */
#ifdef SHORTCUT_OPENBLAS
#include <cblas.h>
static void sc__sgemm(bool ta, bool tb, int m, int n, int k, float alpha, const float *a, int lda,
                      const float *b, int ldb, float beta, float *c, int ldc) {
    cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, m, n,
                k, alpha, a, lda, b, ldb, beta, c, ldc);
}
#else
static void sc__sgemm(bool ta, bool tb, int m, int n, int k, float alpha, const float *a, int lda,
                      const float *b, int ldb, float beta, float *c, int ldc) {
    for (int i = 0; i < m; i++) {
        float *row = c + (int64_t)i * ldc;
        for (int j = 0; j < n; j++) row[j] = beta == 0 ? 0 : beta * row[j];
        if (tb) {
            for (int j = 0; j < n; j++) {
                const float *bj = b + (int64_t)j * ldb;
                float sum = 0;
                if (ta) for (int p = 0; p < k; p++) sum += a[(int64_t)p * lda + i] * bj[p];
                else
                    SC_SIMD_SUM(sum)
                    for (int p = 0; p < k; p++) sum += a[(int64_t)i * lda + p] * bj[p];
                row[j] += alpha * sum;
            }
        } else {
            for (int p = 0; p < k; p++) {
                float s = alpha * (ta ? a[(int64_t)p * lda + i] : a[(int64_t)i * lda + p]);
                const float *bp = b + (int64_t)p * ldb;
                SC_SIMD for (int j = 0; j < n; j++) row[j] += s * bp[j];
            }
        }
    }
}
#endif

/* The f32 values of a stored [rows, cols] matrix: itself, or widened into `buffer`. */
static const float *sc__widen(sc_matrix a, int64_t rows, int64_t columns, float *buffer) {
    if (a.dtype == SC_F32) return (const float *)a.data;
    int64_t size = sc_dtype_size(a.dtype);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        float *to = buffer + r * columns;
        sc_to_f32(to, (const char *)a.data + r * a.ld * size, a.dtype, columns);
        if (a.scale) SC_SIMD for (int64_t c = 0; c < columns; c++) to[c] *= a.scale[r];
    }
    return buffer;
}

static void sc__cpu_gemm(int64_t m, int64_t n, int64_t k, float alpha, sc_matrix a, sc_matrix b,
                         float beta, sc_matrix c, const sc_tensor *bias) {
    int64_t a_rows = a.transposed ? k : m, a_columns = a.transposed ? m : k;
    int64_t b_rows = b.transposed ? n : k, b_columns = b.transposed ? k : n;
    int64_t a_wide = a.dtype != SC_F32 ? a_rows * a_columns : 0,
            b_wide = b.dtype != SC_F32 ? b_rows * b_columns : 0;
    float *buffer = a_wide + b_wide ? sc__scratch(a_wide + b_wide) : NULL;
    if (a_wide + b_wide && !buffer) return;
    const float *pa = sc__widen(a, a_rows, a_columns, buffer);
    const float *pb = sc__widen(b, b_rows, b_columns, buffer ? buffer + a_wide : NULL);
    if (pa != a.data) a.ld = a_columns;
    if (pb != b.data) b.ld = b_columns;
    float *pc = (float *)c.data;
    const float *add = bias ? sc__f(bias) : NULL;
    /* Cut the longer side of C into one slice per thread, in multiples of 16. */
    bool by_rows = m >= n;
    int64_t length = by_rows ? m : n, threads = sc__threads();
    int64_t slice = m * n * k < 100000 ? length : ((length + threads - 1) / threads + 15) / 16 * 16;
    SC_PARALLEL_FOR
    for (int64_t start = 0; start < length; start += slice) {
        int64_t size = length - start < slice ? length - start : slice;
        int64_t i0 = by_rows ? start : 0, rows = by_rows ? size : m;
        int64_t j0 = by_rows ? 0 : start, columns = by_rows ? n : size;
        for (int64_t i = i0; add && i < i0 + rows; i++) { /* C = beta C + bias */
            float *row = pc + i * c.ld + j0;
            if (beta == 0) memcpy(row, add + j0, (size_t)columns * 4);
            else SC_SIMD for (int64_t j = 0; j < columns; j++) row[j] = beta * row[j] + add[j0 + j];
        }
        sc__sgemm(a.transposed, b.transposed, (int)rows, (int)columns, (int)k, alpha,
                  pa + (a.transposed ? i0 : i0 * a.ld), (int)a.ld,
                  pb + (b.transposed ? j0 * b.ld : j0), (int)b.ld, add ? 1.f : beta,
                  pc + i0 * c.ld + j0, (int)c.ld);
    }
}

static void sc__cpu_quantize(uint8_t *to, float *scale, const void *from, int64_t rows,
                             int64_t columns) {
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *x = (const float *)from + r * columns;
        float largest = 0;
        for (int64_t c = 0; c < columns; c++)
            largest = fabsf(x[c]) > largest ? fabsf(x[c]) : largest;
        scale[r] = largest > 0 ? largest / 448.f : 1.f;
        for (int64_t c = 0; c < columns; c++) to[r * columns + c] = sc__f32_to_f8(x[c] / scale[r]);
    }
}

/* ---- Memory, copies, sums ---- */

static void *sc__cpu_alloc(size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? bytes : 64)) {
        sc__fail("out of memory: %zu bytes", bytes);
        return NULL;
    }
    return p;
}
static void sc__cpu_release(void *p) { free(p); }
static size_t sc__cpu_memory_left(void) { return SIZE_MAX; } /* the system's swap decides */
static void sc__cpu_upload(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static bool sc__cpu_report(void) {
    bool failed = sc__cpu_failed;
    sc__cpu_failed = false;
    return !failed || sc__fail("out of memory for an operation to work in");
}
static bool sc__cpu_download(void *to, const void *from, size_t bytes) {
    memcpy(to, from, bytes);
    return sc__cpu_report();
}
static void sc__cpu_zero(void *p, size_t bytes) { memset(p, 0, bytes); }

static SC_THREAD_LOCAL struct {
    double value[SC_POSTS][SC_POST_SIZE];
    int64_t posted, collected;
} sc__posts;
static void sc__cpu_post(const double *x, int count) {
    memcpy(sc__posts.value[sc__posts.posted++ % SC_POSTS], x, (size_t)count * sizeof *x);
}
static bool sc__cpu_collect(double *x, int count) {
    memcpy(x, sc__posts.value[sc__posts.collected++ % SC_POSTS], (size_t)count * sizeof *x);
    return sc__cpu_report();
}

static void sc__cpu_copy_block(void *dst, int64_t dst_ld, const void *src, int64_t src_ld,
                               int64_t rows, int64_t columns, sc_dtype dtype, bool accumulate) {
    int64_t size = sc_dtype_size(dtype);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        char *d = (char *)dst + r * dst_ld * size;
        const char *s = (const char *)src + r * src_ld * size;
        if (accumulate)
            SC_SIMD for (int64_t c = 0; c < columns; c++)((float *)d)[c] += ((const float *)s)[c];
        else memcpy(d, s, (size_t)(columns * size));
    }
}

static void sc__cpu_column_sum(float *sum, const void *x, int64_t rows, int64_t columns) {
    const float *p = (const float *)x;
    int64_t slice = (columns + sc__threads() - 1) / sc__threads();
    SC_PARALLEL_FOR
    for (int64_t start = 0; start < columns; start += slice) {
        int64_t end = start + slice < columns ? start + slice : columns;
        for (int64_t r = 0; r < rows; r++)
            SC_SIMD for (int64_t c = start; c < end; c++) sum[c] += p[r * columns + c];
    }
}

static void sc__cpu_blend(sc_tensor *y, const float *p, const sc_tensor *u, const float *q,
                          const sc_tensor *v) {
    int64_t batch = y->shape[0], n = sc_count(y) / batch;
    for (int64_t b = 0; b < batch; b++) {
        float *out = sc__f(y) + b * n, cp = p[b], cq = q[b];
        const float *pu = sc__f(u) + b * n, *pv = sc__f(v) + b * n;
        SC_SIMD for (int64_t i = 0; i < n; i++) out[i] = cp * pu[i] + cq * pv[i];
    }
}

static void sc__cpu_multiply(sc_tensor *y, const sc_tensor *a, const sc_tensor *b) {
    int64_t n = sc_count(y);
    float *out = sc__f(y), *pa = sc__f(a), *pb = sc__f(b);
    SC_SIMD for (int64_t i = 0; i < n; i++) out[i] = pa[i] * pb[i];
}

/* Sinusoids of 1000 t, cosines first: y[b] = [cos(1000 t f_i), sin(1000 t f_i)],
 * f_i = 10000^(-i/half). Each step is rounded as there: at t = 1 the last bit of f_i already turns
 * the result by 1e-4. (diffusers: Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)) */
static void sc__cpu_embed_timestep(sc_tensor *y, const float *t) {
    int64_t half = y->shape[1] / 2;
    for (int64_t b = 0; b < y->shape[0]; b++) {
        float *row = sc__f(y) + b * 2 * half;
        for (int64_t i = 0; i < half; i++) {
            float angle = 1000.f * t[b] * (float)exp(-9.2103404f * (float)i / (float)half);
            row[i] = (float)cos(angle);
            row[half + i] = (float)sin(angle);
        }
    }
}

/* ---- Activations: y = f(x), dx += f'(x) dy ----
 * silu(x) = x s(x);  gelu_tanh(x) = x s(2 k (x + 0.044715 x^3)), k = sqrt(2/pi);
 * quick_gelu(x) = x s(1.702 x);  s is the logistic function: all are x s(u(x)), and
 * (x s(u))' = s(u) + x s(u) (1 - s(u)) u'(x). gelu is exact, x Phi(x). */
static inline float sc__gate_argument(sc_activation kind, float x, float *slope) {
    const float k = 1.5957691216057308f; /* 2 sqrt(2/pi) */
    switch (kind) {
    case SC_GELU_TANH:
        *slope = k * (1 + 3 * 0.044715f * x * x);
        return k * (x + 0.044715f * x * x * x);
    case SC_QUICK_GELU: *slope = 1.702f; return 1.702f * x;
    default: *slope = 1; return x;
    }
}

static inline void sc__activate_rows(sc_activation kind, float *y, const float *x, int64_t n) {
    SC_SIMD for (int64_t i = 0; i < n; i++) {
        float slope;
        y[i] = x[i] * sc__sigmoid(sc__gate_argument(kind, x[i], &slope));
    }
}

static inline void sc__activate_rows_backward(sc_activation kind, const float *dy, const float *x,
                                              float *dx, int64_t n) {
    SC_SIMD for (int64_t i = 0; i < n; i++) {
        float slope, s = sc__sigmoid(sc__gate_argument(kind, x[i], &slope));
        dx[i] += dy[i] * (s + x[i] * s * (1 - s) * slope);
    }
}

#define SC__SLICE 4096 /* elements of one parallel task */

/* Where no library has the product and its GELU in one, they follow each other. */
static void sc__cpu_gemm_gelu(int64_t m, int64_t n, int64_t k, sc_matrix a, sc_matrix b, float beta,
                              sc_matrix c, const sc_tensor *bias, sc_tensor *before) {
    sc__cpu_gemm(m, n, k, 1, a, b, beta, c, bias);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < m; r++) {
        float *row = (float *)c.data + r * c.ld;
        if (before) memcpy(sc__f(before) + r * n, row, (size_t)n * 4);
        sc__activate_rows(SC_GELU_TANH, row, row, n);
    }
}

static void sc__cpu_activate(sc_activation kind, sc_tensor *y, int64_t at, const sc_tensor *x) {
    int64_t n = sc__last(x), width = sc__last(y), rows = sc__rows(x);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        float *py = sc__f(y) + r * width + at, *px = sc__f(x) + r * n;
        switch (kind) { /* constant kinds, so that each loop vectorises */
        case SC_SILU: sc__activate_rows(SC_SILU, py, px, n); break;
        case SC_GELU_TANH: sc__activate_rows(SC_GELU_TANH, py, px, n); break;
        case SC_QUICK_GELU: sc__activate_rows(SC_QUICK_GELU, py, px, n); break;
        case SC_GELU:
            for (int64_t j = 0; j < n; j++) py[j] = 0.5f * px[j] * (1 + erff(px[j] * 0.70710678f));
            break;
        }
    }
}

static void sc__cpu_activate_backward(sc_activation kind, const sc_tensor *y, int64_t at,
                                      sc_tensor *x) {
    int64_t n = sc__last(x), width = sc__last(y), rows = sc__rows(x);
    float *sum = sc__sum(x);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *dy = sc__g(y) + r * width + at, *px = sc__f(x) + r * n;
        float *dx = sum + r * n;
        switch (kind) {
        case SC_SILU: sc__activate_rows_backward(SC_SILU, dy, px, dx, n); break;
        case SC_GELU_TANH: sc__activate_rows_backward(SC_GELU_TANH, dy, px, dx, n); break;
        case SC_QUICK_GELU: sc__activate_rows_backward(SC_QUICK_GELU, dy, px, dx, n); break;
        case SC_GELU:
            for (int64_t j = 0; j < n; j++) {
                float density = 0.39894228f * expf(-0.5f * px[j] * px[j]);
                dx[j] += dy[j] * (0.5f * (1 + erff(px[j] * 0.70710678f)) + px[j] * density);
            }
            break;
        }
    }
}

/* ---- Modulated layer norm: y = n(x) (1 + scale) + shift ----
 * n(x) = (x - mean) / sqrt(var + 1e-6); x [B,T,C]; mod [B,K*C] holds K vectors of C per sample,
 * `shift` and `scale` say which.
 * dscale = sum_t dy n;  dshift = sum_t dy;  with g = dy (1 + scale):
 * dx = (g - mean(g) - n mean(g n)) / sqrt(var + 1e-6). */

static inline void sc__moments(const float *x, int64_t n, float eps, float *mean, float *inverse) {
    float sum = 0, square = 0;
    SC_SIMD_SUM(sum) for (int64_t c = 0; c < n; c++) sum += x[c];
    float m = sum / (float)n;
    SC_SIMD_SUM(square) for (int64_t c = 0; c < n; c++) square += (x[c] - m) * (x[c] - m);
    *mean = m;
    *inverse = 1.f / sqrtf(square / (float)n + eps);
}

static void sc__cpu_ln_modulate(sc_tensor *y, const sc_tensor *x, const sc_tensor *mod, int shift,
                                int scale) {
    int64_t tokens = x->shape[1], n = x->shape[2], width = mod->shape[1], rows = sc__rows(x);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *px = sc__f(x) + r * n, *m = sc__f(mod) + r / tokens * width;
        const float *a = m + scale * n, *b = m + shift * n;
        float *py = sc__f(y) + r * n, mean, inverse;
        sc__moments(px, n, 1e-6f, &mean, &inverse);
        SC_SIMD for (int64_t c = 0; c < n; c++) py[c] =
            (px[c] - mean) * inverse * (1 + a[c]) + b[c];
    }
}

static void sc__cpu_ln_modulate_backward(const sc_tensor *y, sc_tensor *x, sc_tensor *mod,
                                         int shift, int scale) {
    int64_t tokens = x->shape[1], n = x->shape[2], width = mod->shape[1];
    float *sum = sc__sum(x);
    SC_PARALLEL_FOR
    for (int64_t b = 0; b < x->shape[0]; b++) { /* a sample owns its row of dmod */
        const float *a = sc__f(mod) + b * width + scale * n;
        float *da = mod->grad ? sc__g(mod) + b * width + scale * n : NULL;
        float *db = mod->grad ? sc__g(mod) + b * width + shift * n : NULL;
        for (int64_t r = b * tokens; r < (b + 1) * tokens; r++) {
            const float *px = sc__f(x) + r * n, *dy = sc__g(y) + r * n;
            float mean, inverse, g_sum = 0, gn_sum = 0;
            sc__moments(px, n, 1e-6f, &mean, &inverse);
            if (da)
                SC_SIMD for (int64_t c = 0; c < n; c++) {
                    da[c] += dy[c] * (px[c] - mean) * inverse;
                    db[c] += dy[c];
                }
            if (!sum) continue;
            SC_PRAGMA(omp simd reduction(+ : g_sum, gn_sum))
            for (int64_t c = 0; c < n; c++) {
                float g = dy[c] * (1 + a[c]);
                g_sum += g;
                gn_sum += g * (px[c] - mean) * inverse;
            }
            float *dx = sum + r * n, g_mean = g_sum / (float)n, gn_mean = gn_sum / (float)n;
            SC_SIMD for (int64_t c = 0; c < n; c++) dx[c] +=
                (dy[c] * (1 + a[c]) - g_mean - (px[c] - mean) * inverse * gn_mean) * inverse;
        }
    }
}

/* ---- Gated residual: y = x + gate h;  dx += dy, dh += gate dy, dgate += sum_t h dy ---- */

static void sc__cpu_gated_residual(sc_tensor *y, const sc_tensor *x, const sc_tensor *h,
                                   const sc_tensor *mod, int gate) {
    int64_t tokens = x->shape[1], n = x->shape[2], width = mod->shape[1], rows = sc__rows(x);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *px = sc__f(x) + r * n, *ph = sc__f(h) + r * n;
        const float *g = sc__f(mod) + r / tokens * width + gate * n;
        float *py = sc__f(y) + r * n;
        SC_SIMD for (int64_t c = 0; c < n; c++) py[c] = px[c] + g[c] * ph[c];
    }
}

static void sc__cpu_gated_residual_backward(const sc_tensor *y, sc_tensor *x, sc_tensor *h,
                                            sc_tensor *mod, int gate) {
    int64_t tokens = x->shape[1], n = x->shape[2], width = mod->shape[1];
    float *x_sum = sc__sum(x), *h_sum = sc__sum(h);
    SC_PARALLEL_FOR
    for (int64_t b = 0; b < x->shape[0]; b++) {
        const float *g = sc__f(mod) + b * width + gate * n;
        float *dg = mod->grad ? sc__g(mod) + b * width + gate * n : NULL;
        for (int64_t r = b * tokens; r < (b + 1) * tokens; r++) {
            const float *dy = sc__g(y) + r * n, *ph = sc__f(h) + r * n;
            float *dx = x_sum ? x_sum + r * n : NULL, *dh = h_sum ? h_sum + r * n : NULL;
            if (dx) SC_SIMD for (int64_t c = 0; c < n; c++) dx[c] += dy[c];
            if (dh) SC_SIMD for (int64_t c = 0; c < n; c++) dh[c] += g[c] * dy[c];
            if (dg) SC_SIMD for (int64_t c = 0; c < n; c++) dg[c] += ph[c] * dy[c];
        }
    }
}

/* ---- QK-norm + RoPE, per head of D: n = w x / sqrt(mean(x^2) + 1e-6), then each pair turns:
 * (y0, y1) = (n0 cos - n1 sin, n1 cos + n0 sin).  x [B,Tx,C]; y [B,T,C], written from token
 * `offset` on; weight [D]; rope [T,D/2,2] (cos, sin). Backward turns dy back (g), and with n = w u:
 * dw += g u;  dx += (w g - u mean(w g u)) / sqrt(mean(x^2) + 1e-6). */

static inline float sc__inverse_rms(const float *x, int64_t n, float eps) {
    float sum = 0;
    SC_SIMD_SUM(sum) for (int64_t d = 0; d < n; d++) sum += x[d] * x[d];
    return 1.f / sqrtf(sum / (float)n + eps);
}

static void sc__cpu_norm_rope(sc_tensor *y, int64_t offset, const sc_tensor *x,
                              const sc_tensor *weight, const sc_tensor *rope) {
    int64_t tokens = x->shape[1], channels = x->shape[2], size = weight->shape[0],
            rows = sc__rows(x);
    const float *w = sc__f(weight);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = offset + r % tokens;
        const float *px = sc__f(x) + r * channels, *turn = sc__f(rope) + token * size;
        float *py = sc__f(y) + (r / tokens * y->shape[1] + token) * channels;
        for (int64_t h = 0; h < channels; h += size) {
            float inverse = sc__inverse_rms(px + h, size, 1e-6f);
            SC_SIMD for (int64_t d = 0; d < size; d += 2) {
                float n0 = px[h + d] * inverse * w[d], n1 = px[h + d + 1] * inverse * w[d + 1];
                py[h + d] = n0 * turn[d] - n1 * turn[d + 1];
                py[h + d + 1] = n1 * turn[d] + n0 * turn[d + 1];
            }
        }
    }
}

static void sc__cpu_norm_rope_backward(const sc_tensor *y, int64_t offset, sc_tensor *x,
                                       sc_tensor *weight, const sc_tensor *rope) {
    int64_t batch = x->shape[0], tokens = x->shape[1], channels = x->shape[2],
            size = weight->shape[0];
    const float *w = sc__f(weight);
    /* dw of each sample */
    float *sum = sc__sum(x), *partial = weight->grad ? sc__scratch(batch * size) : NULL;
    if (weight->grad && !partial) return;
    if (partial) memset(partial, 0, (size_t)(batch * size) * 4);
    SC_PARALLEL_FOR
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < tokens * (channels / size); i++) {
            int64_t t = i / (channels / size), h = i % (channels / size) * size;
            const float *px = sc__f(x) + (b * tokens + t) * channels + h;
            const float *dy = sc__g(y) + (b * y->shape[1] + offset + t) * channels + h;
            const float *turn = sc__f(rope) + (offset + t) * size;
            float inverse = sc__inverse_rms(px, size, 1e-6f), g[256], dot = 0;
            SC_SIMD for (int64_t d = 0; d < size; d += 2) {
                g[d] = dy[d] * turn[d] + dy[d + 1] * turn[d + 1];
                g[d + 1] = dy[d + 1] * turn[d] - dy[d] * turn[d + 1];
            }
            if (partial)
                SC_SIMD for (int64_t d = 0; d < size; d++) partial[b * size + d] +=
                    g[d] * px[d] * inverse;
            if (!sum) continue;
            SC_SIMD_SUM(dot)
            for (int64_t d = 0; d < size; d++) dot += w[d] * g[d] * px[d] * inverse;
            float *dx = sum + (b * tokens + t) * channels + h;
            dot /= (float)size;
            SC_SIMD for (int64_t d = 0; d < size; d++)
                dx[d] += (w[d] * g[d] - px[d] * inverse * dot) * inverse;
        }
    for (int64_t b = 0; partial && b < batch; b++)
        for (int64_t d = 0; d < size; d++) sc__g(weight)[d] += partial[b * size + d];
}

/* ---- Attention, per sample and head: P = softmax(scale Q K^T + bias), O = P V ----
 * Rows of queries in blocks, so that the scores need rows * T floats and no more.
 * dV = P^T dO;  dS = P (dO V^T - rowsum(dO O));  dQ = scale dS K;  dK = scale dS^T Q. */

static int64_t sc__attention_rows(int64_t tokens) { /* rows of a block of scores */
    int64_t rows = 65536 / tokens;
    return rows < 16 ? 16 : rows > 256 ? 256 : rows;
}

/* Scores of `rows` queries from `first` on, into p[rows, tokens], and their softmax. lse (or NULL)
 * receives the logarithm of each row's sum. */
static void sc__softmax_scores(float *p, float *lse, const float *q, const float *k, int64_t rows,
                               int64_t tokens, int64_t size, int64_t ld, float scale,
                               const float *bias, bool causal, int64_t first) {
    sc__sgemm(false, true, (int)rows, (int)tokens, (int)size, scale, q, (int)ld, k, (int)ld, 0, p,
              (int)tokens);
    for (int64_t r = 0; r < rows; r++) {
        float *row = p + r * tokens, top = -INFINITY, sum = 0;
        int64_t n = causal ? first + r + 1 : tokens;
        if (bias) SC_SIMD for (int64_t c = 0; c < n; c++) row[c] += bias[r * tokens + c];
        SC_PRAGMA(omp simd reduction(max : top))
        for (int64_t c = 0; c < n; c++) top = row[c] > top ? row[c] : top;
        SC_SIMD_SUM(sum) for (int64_t c = 0; c < n; c++) sum += row[c] = sc__exp(row[c] - top);
        float inverse = 1 / sum;
        if (lse) lse[r] = top + logf(sum);
        SC_SIMD for (int64_t c = 0; c < n; c++) row[c] *= inverse;
        for (int64_t c = n; c < tokens; c++) row[c] = 0;
    }
}

static void sc__cpu_attention(sc_tensor *o, float *lse, const sc_tensor *q, const sc_tensor *k,
                              const sc_tensor *v, int heads, float scale, const sc_tensor *bias,
                              bool causal) {
    int64_t channels = q->shape[2], size = channels / heads, nq = q->shape[1], nk = k->shape[1];
    int64_t block = sc__attention_rows(nk), blocks = (nq + block - 1) / block;
    float *scratch = sc__scratch(sc__threads() * block * nk);
    if (!scratch) return;
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < q->shape[0] * heads * blocks; task++) {
        int64_t b = task / (heads * blocks), h = task / blocks % heads,
                first = task % blocks * block;
        int64_t rows = nq - first < block ? nq - first : block;
        float *p = scratch + sc__thread() * block * nk;
        int64_t query = (b * nq + first) * channels + h * size, key = b * nk * channels + h * size;
        float *sums = lse ? lse + (b * heads + h) * nq + first : NULL;
        sc__softmax_scores(p, sums, sc__f(q) + query, sc__f(k) + key, rows, nk, size, channels,
                           scale, bias ? sc__f(bias) + (h * nq + first) * nk : NULL, causal, first);
        sc__sgemm(false, false, (int)rows, (int)size, (int)nk, 1, p, (int)nk, sc__f(v) + key,
                  (int)channels, 0, sc__f(o) + query, (int)channels);
    }
}

/* The scores' softmax is made again, so `lse` is not needed here. */
static void sc__cpu_attention_backward(const sc_tensor *o, const float *lse, sc_tensor *q,
                                       sc_tensor *k, sc_tensor *v, int heads, float scale) {
    (void)lse;
    int64_t channels = q->shape[2], size = channels / heads, nq = q->shape[1], nk = k->shape[1];
    int64_t block = sc__attention_rows(nk);
    int ld = (int)channels, n = (int)nk, d = (int)size;
    float *scratch = sc__scratch(2 * sc__threads() * block * nk);
    if (!scratch) return;
    float *dq = sc__sum(q), *dk = sc__sum(k), *dv = sc__sum(v);
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < q->shape[0] * heads; task++) { /* a head owns its dK and dV */
        int64_t b = task / heads, h = task % heads, key = b * nk * channels + h * size;
        float *p = scratch + 2 * sc__thread() * block * nk, *dp = p + block * nk;
        for (int64_t first = 0; first < nq; first += block) {
            int rows = (int)(nq - first < block ? nq - first : block);
            int64_t query = (b * nq + first) * channels + h * size;
            const float *out = sc__f(o) + query, *dout = sc__g(o) + query;
            sc__softmax_scores(p, NULL, sc__f(q) + query, sc__f(k) + key, rows, nk, size, channels,
                               scale, NULL, false, first);
            sc__sgemm(true, false, n, d, rows, 1, p, n, dout, ld, 1, dv + key, ld);
            sc__sgemm(false, true, rows, n, d, 1, dout, ld, sc__f(v) + key, ld, 0, dp, n);
            for (int64_t r = 0; r < rows; r++) {
                float dot = 0;
                SC_SIMD_SUM(dot)
                for (int64_t c = 0; c < size; c++) dot += out[r * ld + c] * dout[r * ld + c];
                SC_SIMD for (int64_t c = 0; c < nk; c++) dp[r * nk + c] =
                    p[r * nk + c] * (dp[r * nk + c] - dot);
            }
            sc__sgemm(false, false, rows, d, n, scale, dp, n, sc__f(k) + key, ld, 1,
                      dq + query, ld);
            sc__sgemm(true, false, n, d, rows, scale, dp, n, sc__f(q) + query, ld, 1,
                      dk + key, ld);
        }
    }
}

/* ---- Norms and embeddings of the text encoders ---- */

static void sc__cpu_layer_norm(sc_tensor *y, const sc_tensor *x, const sc_tensor *w,
                               const sc_tensor *b, float eps) {
    int64_t n = sc__last(x), rows = sc__rows(x);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *px = sc__f(x) + r * n, *pw = sc__f(w), *pb = sc__f(b);
        float *py = sc__f(y) + r * n, mean, inverse;
        sc__moments(px, n, eps, &mean, &inverse);
        SC_SIMD for (int64_t c = 0; c < n; c++) py[c] = (px[c] - mean) * inverse * pw[c] + pb[c];
    }
}

static void sc__cpu_rms_norm(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, float eps) {
    int64_t n = sc__last(x), rows = sc__rows(x);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *px = sc__f(x) + r * n, *pw = sc__f(w);
        float *py = sc__f(y) + r * n, inverse = sc__inverse_rms(px, n, eps);
        SC_SIMD for (int64_t c = 0; c < n; c++) py[c] = px[c] * inverse * pw[c];
    }
}

static void sc__cpu_embed_tokens(sc_tensor *y, const sc_tensor *table, const int32_t *ids) {
    int64_t n = table->shape[1], size = sc_dtype_size(table->dtype);
    for (int64_t r = 0; r < sc__rows(y); r++)
        sc_to_f32(sc__f(y) + r * n, (const char *)table->data + ids[r] * n * size, table->dtype, n);
}

/* ---- Loss and optimiser ---- */

/* Sums in slices, in double, added in order: the number of threads does not change the result. */
static double sc__sum_of_squares(const float *x, const float *minus, int64_t n) {
    double total = 0;
    for (int64_t start = 0; start < n; start += SC__SLICE) {
        int64_t end = start + SC__SLICE < n ? start + SC__SLICE : n;
        float sum = 0;
        if (minus)
            SC_SIMD_SUM(sum)
            for (int64_t i = start; i < end; i++) sum += (x[i] - minus[i]) * (x[i] - minus[i]);
        else SC_SIMD_SUM(sum) for (int64_t i = start; i < end; i++) sum += x[i] * x[i];
        total += sum;
    }
    return total;
}

/* loss = mean((prediction - target)^2);  dprediction += factor * 2 (prediction - target) / n */
static void sc__cpu_mse(double *loss, const sc_tensor *prediction, const sc_tensor *target) {
    int64_t n = sc_count(prediction);
    *loss = sc__sum_of_squares(sc__f(prediction), sc__f(target), n) / (double)n;
}

static void sc__cpu_mse_backward(sc_tensor *prediction, const sc_tensor *target, float factor) {
    int64_t n = sc_count(prediction);
    const float *p = sc__f(prediction), *t = sc__f(target), s = 2 * factor / (float)n;
    float *dp = sc__g(prediction);
    SC_SIMD for (int64_t i = 0; i < n; i++) dp[i] += s * (p[i] - t[i]);
}

/* AdamW (Loshchilov & Hutter 2019; torch.optim.AdamW): decoupled weight decay, bias-corrected
 * moments. */
static void sc__cpu_update(const sc_trained *x, const sc_adamw *o, const float decay[2],
                           double *result) {
    double norm = sqrt(sc__sum_of_squares(x->grad, NULL, x->count)), step = (double)(o->step + 1);
    double correction1 = 1 - pow(o->beta1, step), correction2 = 1 - pow(o->beta2, step);
    float b1 = o->beta1, b2 = o->beta2, keep = 1 - o->lr * o->weight_decay, eps = o->eps;
    float rate = (float)(o->lr / correction1), root = (float)(1 / sqrt(correction2));
    float clip = o->clip > 0 && norm > o->clip ? (float)(o->clip / norm) : 1.f;
    SC_PARALLEL_FOR
    for (int64_t start = 0; start < x->count; start += SC__SLICE) {
        int64_t end = start + SC__SLICE < x->count ? start + SC__SLICE : x->count;
        float *w = x->w, *m = x->m, *v = x->v;
        if (isfinite(norm)) {
            SC_SIMD for (int64_t i = start; i < end; i++) {
                float g = x->grad[i] * clip;
                m[i] = b1 * m[i] + (1 - b1) * g;
                v[i] = b2 * v[i] + (1 - b2) * g * g;
                w[i] = w[i] * keep - rate * m[i] / (sqrtf(v[i]) * root + eps);
            }
            for (int k = 0; k < 2; k++) {
                float *average = x->average[k], move = 1 - decay[k];
                if (average)
                    SC_SIMD for (int64_t i = start; i < end; i++) average[i] +=
                        move * (w[i] - average[i]);
            }
        }
        memset(x->grad + start, 0, (size_t)(end - start) * sizeof(float));
    }
    *result = norm;
}

/* ---- Pictures [B,C,H,W]: convolution ----
 * y[o,i,j] = bias[o] + sum over c, u, v of w[o,c,u,v] x[c, s i + u - pad, s j + v - pad].
 * A strip of rows of all input channels is copied once, zero padded; a stride s splits it into
 * s * s planes, one for each phase (u mod s, v mod s). Then every tap (u, v) reads its plane at a
 * fixed distance from the output pixel, whatever row that pixel is in, and a tile of 4 or 8 output
 * channels by 3 vectors of pixels stays in registers while all channels and taps are added. Where
 * the strip is wider than the picture, the tile computes a few pixels that nobody reads.
 */

#if defined(__GNUC__)
#if defined(__AVX512F__) /* 32 registers */
#define SC__LANES 16
#define SC__TILE_O 8
#elif defined(__AVX__)
#define SC__LANES 8
#else
#define SC__LANES 4
#endif
typedef float sc__vec __attribute__((vector_size(4 * SC__LANES), aligned(4), may_alias));
#else
#define SC__LANES 1
typedef float sc__vec;
#endif
#ifndef SC__TILE_O
#define SC__TILE_O 4
#endif
#define SC__TILE_V 3
#define SC__TILE (SC__TILE_V * SC__LANES) /* pixels */
#define SC__STRIP 98304                   /* floats of a strip, about: it stays in the L2 cache */

typedef struct sc__conv {
    int64_t in, out, kernel, stride, pad;
    int64_t in_height, in_width, height, width;
    int64_t rows;               /* output rows of a strip */
    int64_t pitch, plane;       /* floats of a row and of a plane of the strip */
    int64_t taps, offset[25];   /* of each tap (5 x 5 at most) from the output pixel */
} sc__conv;

/* Weights [out, in, taps] as [out / SC__TILE_O, in, taps, SC__TILE_O], f32; channels that are not
 * there are zeros. rows: room for SC__TILE_O of w's rows for each thread. */
static void sc__conv_pack(const sc__conv *g, float *packed, const sc_tensor *w, float *rows) {
    int64_t n = g->in * g->taps, size = n * sc_dtype_size(w->dtype);
    SC_PARALLEL_FOR
    for (int64_t o = 0; o < g->out; o += SC__TILE_O) {
        int64_t count = g->out - o < SC__TILE_O ? g->out - o : SC__TILE_O;
        float *to = packed + o * n, *row = rows + sc__thread() * SC__TILE_O * n;
        sc_to_f32(row, (const char *)w->data + o * size, w->dtype, count * n);
        memset(row + count * n, 0, (size_t)((SC__TILE_O - count) * n) * 4);
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k < SC__TILE_O; k++) to[i * SC__TILE_O + k] = row[k * n + i];
    }
}

/* Copies what output rows [first, first + rows) need of all channels of x into the strip. */
static void sc__conv_gather(const sc__conv *g, float *strip, const float *x, int64_t first,
                            int64_t rows) {
    int64_t s = g->stride, height = rows + (g->kernel - 1) / s;
    for (int64_t plane = 0; plane < g->in * s * s; plane++) {
        const float *channel = x + plane / (s * s) * g->in_height * g->in_width;
        int64_t u = plane / s % s, shift = plane % s - g->pad; /* row and column of this phase */
        int64_t begin = shift < 0 ? (-shift + s - 1) / s : 0;
        int64_t end = (g->in_width - shift + s - 1) / s;
        if (end > g->pitch) end = g->pitch;
        for (int64_t r = 0; r < height; r++) {
            float *to = strip + plane * g->plane + r * g->pitch;
            int64_t row = (first + r) * s + u - g->pad;
            bool inside = row >= 0 && row < g->in_height;
            const float *from = channel + row * g->in_width + shift;
            if (!inside || begin > 0) memset(to, 0, (size_t)(inside ? begin : g->pitch) * 4);
            if (!inside) continue;
            if (s == 1) memcpy(to + begin, from + begin, (size_t)(end - begin) * 4);
            else for (int64_t j = begin; j < end; j++) to[j] = from[j * s];
            if (end < g->pitch) memset(to + end, 0, (size_t)(g->pitch - end) * 4);
        }
    }
}

/* y[SC__TILE_O][SC__TILE] = all channels and taps of one tile whose first pixel is x. */
static void sc__conv_tile(const sc__conv *g, float *y, const float *x, const float *w) {
    sc__vec sum[SC__TILE_O][SC__TILE_V];
    for (int o = 0; o < SC__TILE_O; o++)
        for (int v = 0; v < SC__TILE_V; v++) sum[o][v] = (sc__vec){0};
    for (int64_t c = 0; c < g->in; c++, x += g->stride * g->stride * g->plane)
        for (int64_t t = 0; t < g->taps; t++, w += SC__TILE_O) {
            const sc__vec *p = (const sc__vec *)(x + g->offset[t]);
            for (int o = 0; o < SC__TILE_O; o++)
                for (int v = 0; v < SC__TILE_V; v++) sum[o][v] += w[o] * p[v];
        }
    memcpy(y, sum, sizeof sum);
}

/* Adds the bias to the tile that begins at pixel p0 of the strip; stores what is in the picture. */
static void sc__conv_store(const sc__conv *g, float *y, const float *tile, const float *bias,
                           int64_t o0, int64_t p0, int64_t rows) {
    int64_t end = p0 + SC__TILE < rows * g->pitch ? p0 + SC__TILE : rows * g->pitch;
    int64_t outputs = g->out - o0 < SC__TILE_O ? g->out - o0 : SC__TILE_O, r = p0 / g->pitch;
    for (int64_t p = p0; p < end; p = ++r * g->pitch) { /* row by row */
        int64_t column = p - r * g->pitch, n = end - p;
        if (n > g->width - column) n = g->width - column;
        for (int64_t o = 0; o < outputs; o++) {
            const float *from = tile + o * SC__TILE + p - p0;
            float *to = y + ((o0 + o) * g->height + r) * g->width + column;
            float add = bias ? bias[o0 + o] : 0;
            SC_SIMD for (int64_t j = 0; j < n; j++) to[j] = from[j] + add;
        }
    }
}

static void sc__cpu_conv2d(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                           int stride, int pad_before) {
    sc__conv g = {.in = x->shape[1], .out = y->shape[1], .kernel = w->shape[2], .stride = stride,
                  .pad = pad_before, .in_height = x->shape[2], .in_width = x->shape[3],
                  .height = y->shape[2], .width = y->shape[3]};
    int64_t reach = (g.kernel - 1) / stride, batch = y->shape[0], threads = sc__threads();
    g.taps = g.kernel * g.kernel;
    g.pitch = g.width + reach;
    int64_t rows = SC__STRIP / (g.in * stride * stride * g.pitch) - reach;
    int64_t some = 8 * SC__TILE / g.pitch + 1; /* so that unfinished tiles are rare */
    if (rows < some) rows = some;
    int64_t strips = (g.height + rows - 1) / rows; /* of a picture; as many for each thread */
    while (strips < g.height && batch * strips % threads) strips++;
    g.rows = (g.height + strips - 1) / strips;
    strips = (g.height + g.rows - 1) / g.rows;
    g.plane = (g.rows + reach) * g.pitch;
    for (int64_t t = 0; t < g.taps; t++) {
        int64_t u = t / g.kernel, v = t % g.kernel;
        int64_t phase = u % stride * stride + v % stride;
        g.offset[t] = phase * g.plane + u / stride * g.pitch + v / stride;
    }
    int64_t channels = (g.out + SC__TILE_O - 1) / SC__TILE_O * SC__TILE_O, n = g.in * g.taps;
    int64_t strip_size = g.in * stride * stride * g.plane + 2 * SC__TILE;
    int64_t buffer = SC__TILE_O * n > strip_size ? SC__TILE_O * n : strip_size; /* a thread's */
    float *packed = sc__scratch(channels * n + threads * buffer);
    if (!packed) return;
    float *buffers = packed + channels * n;
    sc__conv_pack(&g, packed, w, buffers);
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < batch * strips; task++) {
        int64_t sample = task / strips, first = task % strips * g.rows;
        int64_t rows = g.height - first < g.rows ? g.height - first : g.rows;
        float *strip = buffers + sc__thread() * buffer, tile[SC__TILE_O * SC__TILE];
        const float *input = sc__f(x) + sample * g.in * g.in_height * g.in_width;
        sc__conv_gather(&g, strip, input, first, rows);
        for (int64_t p = 0; p < rows * g.pitch; p += SC__TILE)
            for (int64_t o = 0; o < g.out; o += SC__TILE_O) {
                sc__conv_tile(&g, tile, strip + p, packed + o * n);
                sc__conv_store(&g, sc__f(y) + (sample * g.out * g.height + first) * g.width, tile,
                               b ? sc__f(b) : NULL, o, p, rows);
            }
    }
}

/* ---- Pictures: group norm, upsampling, transposition ---- */

/* Slices that fit the L1 cache, merged in double: size costs no precision. */
static void sc__cpu_group_sums(double *sums, const sc_tensor *x, int64_t first, int64_t rows,
                               int groups) {
    int64_t planes = x->shape[1] / groups, width = x->shape[3], size = rows * width;
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < x->shape[0] * groups; task++)
        for (int64_t c = task * planes; c < (task + 1) * planes; c++) {
            const float *px = sc__f(x) + (c * x->shape[2] + first) * width;
            for (int64_t i = 0; i < size; i += SC__SLICE) {
                int64_t n = size - i < SC__SLICE ? size - i : SC__SLICE;
                float total = 0, rest = 0, spread = 0;
                SC_SIMD_SUM(total) for (int64_t j = i; j < i + n; j++) total += px[j];
                float about = total / (float)n; /* the slice's mean, but for rounding: */
                SC_PRAGMA(omp simd reduction(+ : rest, spread))
                for (int64_t j = i; j < i + n; j++) {
                    rest += px[j] - about;
                    spread += (px[j] - about) * (px[j] - about);
                }
                double sum = (double)about * (double)n + rest;
                sums[2 * task] += sum;
                sums[2 * task + 1] += spread + (double)about * (sum + rest);
            }
        }
}

/* y = (x - mean) / sqrt(var + eps) w + b over groups of channels, then y s(y) if `silu`. */
static void sc__cpu_group_norm(sc_tensor *y, const sc_tensor *x, const double *sums, int64_t size,
                               const sc_tensor *w, const sc_tensor *b, int groups, float eps,
                               bool silu) {
    int64_t channels = x->shape[1], pixels = x->shape[2] * x->shape[3];
    SC_PARALLEL_FOR
    for (int64_t plane = 0; plane < x->shape[0] * channels; plane++) {
        const double *sum = sums + 2 * (plane / (channels / groups));
        double mean = sum[0] / (double)size, var = sum[1] / (double)size - mean * mean;
        int64_t channel = plane % channels;
        const float *px = sc__f(x) + plane * pixels;
        float *py = sc__f(y) + plane * pixels, m = (float)mean, shift = sc__f(b)[channel];
        float scale = (float)(1 / sqrt(var + (double)eps)) * sc__f(w)[channel];
        if (silu)
            SC_SIMD for (int64_t i = 0; i < pixels; i++) {
                float n = (px[i] - m) * scale + shift;
                py[i] = n * sc__sigmoid(n);
            }
        else SC_SIMD for (int64_t i = 0; i < pixels; i++) py[i] = (px[i] - m) * scale + shift;
    }
}

/* Nearest neighbour, twice the sides. */
static void sc__cpu_upsample(sc_tensor *y, const sc_tensor *x) {
    int64_t width = x->shape[3], rows = sc__rows(x);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *from = sc__f(x) + r * width;
        float *to = sc__f(y) + 4 * r * width;
        SC_SIMD for (int64_t i = 0; i < width; i++) to[2 * i] = to[2 * i + 1] = from[i];
        memcpy(to + 2 * width, to, (size_t)(2 * width) * 4);
    }
}

/* [B,M,N] -> [B,N,M], 16 x 16 values at a time. */
static void sc__cpu_swap_axes(sc_tensor *y, const sc_tensor *x) {
    int64_t m = x->shape[1], n = x->shape[2], strips = (m + 15) / 16;
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < x->shape[0] * strips; task++) {
        int64_t i0 = task % strips * 16, i1 = i0 + 16 < m ? i0 + 16 : m;
        const float *from = sc__f(x) + task / strips * m * n;
        float *to = sc__f(y) + task / strips * m * n;
        for (int64_t j0 = 0; j0 < n; j0 += 16)
            for (int64_t j = j0; j < n && j < j0 + 16; j++)
                for (int64_t i = i0; i < i1; i++) to[j * m + i] = from[i * n + j];
    }
}

static const sc_backend sc__cpu_backend = {
    .name = "cpu", .activation = SC_F32, .on_host = true, .alloc = sc__cpu_alloc,
    .release = sc__cpu_release, .memory_left = sc__cpu_memory_left, .upload = sc__cpu_upload,
    .download = sc__cpu_download, .post = sc__cpu_post, .collect = sc__cpu_collect,
    .zero = sc__cpu_zero, .gemm = sc__cpu_gemm, .gemm_gelu = sc__cpu_gemm_gelu,
    .quantize = sc__cpu_quantize, .copy_block = sc__cpu_copy_block,
    .column_sum = sc__cpu_column_sum, .blend = sc__cpu_blend,
    .embed_timestep = sc__cpu_embed_timestep, .activate = sc__cpu_activate,
    .activate_backward = sc__cpu_activate_backward, .multiply = sc__cpu_multiply,
    .ln_modulate = sc__cpu_ln_modulate, .ln_modulate_backward = sc__cpu_ln_modulate_backward,
    .gated_residual = sc__cpu_gated_residual,
    .gated_residual_backward = sc__cpu_gated_residual_backward, .norm_rope = sc__cpu_norm_rope,
    .norm_rope_backward = sc__cpu_norm_rope_backward, .attention = sc__cpu_attention,
    .attention_backward = sc__cpu_attention_backward, .layer_norm = sc__cpu_layer_norm,
    .rms_norm = sc__cpu_rms_norm, .embed_tokens = sc__cpu_embed_tokens,
    .group_sums = sc__cpu_group_sums, .group_norm = sc__cpu_group_norm, .conv2d = sc__cpu_conv2d,
    .upsample = sc__cpu_upsample, .swap_axes = sc__cpu_swap_axes, .mse = sc__cpu_mse,
    .mse_backward = sc__cpu_mse_backward,
    .update = sc__cpu_update,
};

const sc_backend *sc_cpu(void) {
#ifdef SHORTCUT_OPENBLAS
    openblas_set_num_threads(1); /* our own threads each call it */
#endif
    return &sc__cpu_backend;
}

/* ==== Tape ====================================================================================
 *
 * Operations run at once (eagerly). While recording, each also appends {backward, inputs, output};
 * sc_backward walks that list from its end. Gradients are allocated when first asked for; the first
 * part of one is stored, others are added. Tensors live in an arena: a list of chunks, given back
 * all at once.
 *
 * Where memory is short, the results of cheap operations (one pass over memory, no product) lie in
 * an arena that all blocks share, and are made again when a block's backward pass reads them.
 */

typedef struct sc__arena {
    const sc_backend *backend;  /* NULL: host memory */
    struct { char *base; size_t size; } chunks[64];
    int count, current;
    size_t used;                /* of chunks[current] */
    size_t taken, peak;         /* by all tensors now, and at most */
} sc__arena;

typedef struct sc__block_bytes { size_t own, shared; } sc__block_bytes;
typedef struct sc__op sc__op;
struct sc__op {
    void (*backward)(sc_tape *t, sc__op *op);
    void (*forward)(sc_tape *t, sc__op *op); /* of cheap operations */
    sc_tensor *in[5], *out[2];  /* what each slot means is the operation's business */
    int64_t n[3];
    float scale;
    const void *extra;
};

struct sc_tape {
    const sc_backend *be;
    sc__arena host, device;     /* tensor structs; their data and gradients */
    sc__arena shared;           /* data of cheap operations, if `sharing`: of one block at a time */
    bool recording, failed, sharing, in_block;
    const uint8_t *sets;        /* LoRA set of each sample, or NULL */
    const sc_tensor *input;     /* of the last linear layer, until its memory is given back; */
    uint64_t content;           /* the number of its values */
    sc__block_bytes *sizes;     /* where each block that is run again notes its own, or NULL */
    sc__op *ops;
    int64_t count, capacity;
};

static bool sc__arena_add(sc__arena *a, size_t size) {
    if (a->count == (int)(sizeof a->chunks / sizeof *a->chunks))
        return sc__fail("out of memory: the arena has %d chunks", a->count);
    char *base = a->backend ? (char *)a->backend->alloc(size) : (char *)sc__alloc(size, 1);
    if (!base) return false;
    a->chunks[a->count].base = base;
    a->chunks[a->count++].size = size;
    return true;
}

static void *sc__arena_take(sc__arena *a, size_t bytes) {
    if (bytes > SIZE_MAX / 8) {
        sc__fail("out of memory: %zu bytes for one tensor", bytes);
        return NULL;
    }
    bytes = (bytes + 255) & ~(size_t)255;
    while (a->current < a->count && a->used + bytes > a->chunks[a->current].size) {
        a->current++;
        a->used = 0;
    }
    if (a->current == a->count) { /* no chunk has room: add one */
        size_t size = (size_t)1 << 20, held = 0;
        for (int i = 0; i < a->count; i++) held += a->chunks[i].size;
        while (size < held / 8) size *= 2; /* few chunks, little waste */
        if (!sc__arena_add(a, size < bytes ? bytes : size)) return NULL;
        a->used = 0;
    }
    void *p = a->chunks[a->current].base + a->used;
    a->used += bytes;
    a->taken += bytes;
    if (a->taken > a->peak) a->peak = a->taken;
    return p;
}

static void sc__arena_reset(sc__arena *a) { a->current = 0, a->used = a->taken = 0; }

static void sc__arena_free(sc__arena *a) {
    for (int i = 0; i < a->count; i++) {
        if (a->backend) a->backend->release(a->chunks[i].base);
        else SC_FREE(a->chunks[i].base);
    }
    a->count = 0;
    sc__arena_reset(a);
}

sc_tape *sc_tape_new(const sc_backend *backend) {
    sc_tape *t = (sc_tape *)sc__alloc(1, sizeof *t);
    if (!t) return NULL;
    t->be = t->device.backend = t->shared.backend = backend;
    return t;
}

void sc_tape_free(sc_tape *t) {
    if (!t) return;
    sc__arena_free(&t->host);
    sc__arena_free(&t->device);
    sc__arena_free(&t->shared);
    SC_FREE(t->ops);
    SC_FREE(t);
    sc__scratch_free(); /* other tapes of this thread make it anew */
}

void sc_tape_reset(sc_tape *t) {
    t->input = NULL;
    sc__arena_reset(&t->host);
    sc__arena_reset(&t->device);
    t->count = 0;
    t->failed = false;
}

void sc_tape_record(sc_tape *t, bool recording) { t->recording = recording; }
void sc_tape_use(sc_tape *t, const uint8_t *set_of_sample) { t->sets = set_of_sample; }

size_t sc_tape_bytes(const sc_tape *t) {
    size_t bytes = 0;
    for (int i = 0; i < t->device.count; i++) bytes += t->device.chunks[i].size;
    for (int i = 0; i < t->shared.count; i++) bytes += t->shared.chunks[i].size;
    return bytes;
}

size_t sc_tape_peak(const sc_tape *t) { return t->device.peak + t->shared.peak; }

bool sc_tape_reserve(sc_tape *t, size_t bytes) {
    size_t shared = t->sharing && t->shared.peak < bytes ? t->shared.peak : 0;
    sc_tape_reset(t);
    sc__arena_free(&t->device);
    sc__arena_free(&t->shared);
    return (bytes == 0 || sc__arena_add(&t->device, bytes - shared)) &&
           (shared == 0 || sc__arena_add(&t->shared, shared));
}

/* ---- Tensors of the tape ---- */

static sc_tensor *sc__struct(sc_tape *t, int ndim, const int64_t *shape, sc_dtype dtype) {
    sc_tensor *x = (sc_tensor *)sc__arena_take(&t->host, sizeof *x);
    if (!x) return NULL;
    *x = (sc_tensor){.dtype = dtype, .ndim = ndim};
    for (int i = 0; i < ndim; i++) x->shape[i] = shape[i];
    return x;
}

static sc_tensor *sc__new_in(sc_tape *t, bool shared, int ndim, const int64_t *shape) {
    sc_tensor *x = sc__struct(t, ndim, shape, t->be->activation);
    if (!x) return NULL;
    x->shared = shared;
    x->data = sc__arena_take(shared ? &t->shared : &t->device,
                             (size_t)(sc_count(x) * sc_dtype_size(x->dtype)));
    return x->data ? x : NULL;
}

sc_tensor *sc_new(sc_tape *t, int ndim, const int64_t *shape) {
    return sc__new_in(t, false, ndim, shape);
}
/* For the result of a cheap operation, which sc__run_cheap must then make. */
static sc_tensor *sc__new_cheap(sc_tape *t, int ndim, const int64_t *shape) {
    return sc__new_in(t, t->sharing && t->in_block && t->recording, ndim, shape);
}
static sc_tensor *sc__new3(sc_tape *t, int64_t b, int64_t n, int64_t c) {
    return sc_new(t, 3, (const int64_t[]){b, n, c});
}
static sc_tensor *sc__new_like(sc_tape *t, const sc_tensor *x) {
    return sc_new(t, x->ndim, x->shape);
}

sc_tensor *sc_from(sc_tape *t, int ndim, const int64_t *shape, const float *values) {
    sc_tensor *x = sc_new(t, ndim, shape);
    if (!x) return NULL;
    int64_t n = sc_count(x);
    if (x->dtype == SC_F32) {
        t->be->upload(x->data, values, (size_t)n * 4);
        return x;
    }
    uint16_t *half = (uint16_t *)sc__alloc((size_t)n, 2);
    if (!half) return NULL;
    for (int64_t i = 0; i < n; i++) half[i] = sc__f32_to_bf16(values[i]);
    t->be->upload(x->data, half, (size_t)n * 2);
    SC_FREE(half);
    return x;
}

bool sc_read(sc_tape *t, const sc_tensor *x, float *values) {
    if (!x) return false;
    size_t bytes = (size_t)(sc_count(x) * sc_dtype_size(x->dtype));
    if (x->dtype == SC_F32) return t->be->download(values, x->data, bytes);
    void *raw = sc__alloc(bytes, 1);
    bool ok = raw && t->be->download(raw, x->data, bytes);
    if (ok) sc_to_f32(values, raw, x->dtype, sc_count(x));
    SC_FREE(raw);
    return ok;
}

sc_tensor *sc_reshape(sc_tape *t, const sc_tensor *x, int ndim, const int64_t *shape) {
    if (!x) return NULL;
    sc_tensor *y = sc__struct(t, ndim, shape, x->dtype);
    if (y) y->data = x->data;
    return y;
}

/* The gradient of x, made when first asked for; NULL when nothing below x wants one. All of a new
 * one is written next, or it is zeroed first. */
static void *sc__whole_grad(sc_tape *t, sc_tensor *x) {
    if (!x || !x->needs_grad || x->grad) return x ? x->grad : NULL;
    x->grad = sc__arena_take(&t->device, (size_t)(sc_count(x) * sc_dtype_size(x->dtype)));
    if (x->grad) x->new_grad = true;
    else t->failed = true;
    return x->grad;
}
static void *sc__grad(sc_tape *t, sc_tensor *x) {
    if (!sc__whole_grad(t, x)) return NULL;
    if (x->new_grad) t->be->zero(x->grad, (size_t)(sc_count(x) * sc_dtype_size(x->dtype)));
    x->new_grad = false;
    return x->grad;
}
/* For operations that are told whether to add, as by the beta of C = A B + beta C. */
static void *sc__grad_beta(sc_tape *t, sc_tensor *x, float *beta) {
    void *grad = sc__whole_grad(t, x);
    *beta = x->new_grad ? 0 : 1;
    x->new_grad = false;
    return grad;
}

/* Appends an operation if any of its inputs needs a gradient, or its result may be wanted again. */
static sc__op *sc__append(sc_tape *t, sc__op op) {
    bool needed = false;
    for (int i = 0; i < 3; i++) needed = needed || (op.in[i] && op.in[i]->needs_grad);
    if (!t->recording || !(needed || op.out[0]->shared)) return NULL;
    if (t->count == t->capacity) {
        int64_t capacity = t->capacity ? 2 * t->capacity : 256;
        sc__op *ops = (sc__op *)SC_REALLOC(t->ops, (size_t)capacity * sizeof *ops);
        if (!ops) {
            sc__fail("out of memory: a tape of %lld operations", (long long)capacity);
            t->failed = true;
            return NULL;
        }
        t->ops = ops;
        t->capacity = capacity;
    }
    if (needed) op.out[0]->needs_grad = true;
    t->ops[t->count] = op;
    return &t->ops[t->count++];
}
static sc__op *sc__record(sc_tape *t, void (*backward)(sc_tape *, sc__op *), sc_tensor *out,
                          sc_tensor *a, sc_tensor *b, sc_tensor *c) {
    return sc__append(t, (sc__op){.backward = backward, .in = {a, b, c}, .out = {out}});
}
/* A cheap operation. Operations that make parts of one tensor follow each other. */
static void sc__run_cheap(sc_tape *t, sc__op op) {
    op.forward(t, &op);
    sc__append(t, op);
}

/* Marks: everything taken from the arenas after sc__mark goes back at sc__release. */
typedef struct sc__mark_t {
    int host, device;
    size_t host_used, device_used, device_taken;
} sc__mark_t;
static sc__mark_t sc__mark(const sc_tape *t) {
    return (sc__mark_t){t->host.current, t->device.current, t->host.used, t->device.used,
                        t->device.taken};
}
static void sc__release(sc_tape *t, sc__mark_t m) {
    t->input = NULL;
    t->host.current = m.host, t->host.used = m.host_used;
    t->device.current = m.device, t->device.used = m.device_used, t->device.taken = m.device_taken;
}

/* Makes again what the operation reads and other blocks have overwritten. */
static void sc__refresh(sc_tape *t, const sc__op *op) {
    for (int i = 0; i < 5; i++) {
        sc_tensor *x = op->in[i];
        if (!x || !x->stale) continue;
        int64_t at = t->count - 1;
        while (t->ops[at].out[0] != x) at--;
        for (; at >= 0 && t->ops[at].out[0] == x; at--) {
            sc__refresh(t, &t->ops[at]);
            t->ops[at].forward(t, &t->ops[at]);
        }
        x->stale = false;
    }
}

/* Runs the operations from the last down to `first` backwards and forgets them. */
static bool sc__backward_from(sc_tape *t, int64_t first) {
    while (t->count > first && !t->failed) {
        sc__op op = t->ops[--t->count]; /* a copy: a checkpoint records more */
        if (!op.out[0]->grad && !(op.out[1] && op.out[1]->grad)) continue;
        sc__refresh(t, &op);
        op.backward(t, &op);
    }
    return !t->failed;
}

bool sc_backward(sc_tape *t) {
    bool recording = t->recording;
    t->recording = true; /* for blocks that run again */
    bool ok = sc__backward_from(t, 0);
    t->recording = recording;
    return ok;
}

/* ---- Linear layers, and LoRA: y = x W^T + bias + scale (x A^T) B^T ----
 * The only place where LoRA exists. The thin products come first: samples next to each other with
 * the same set share one, and one product for all samples then adds x W^T + bias, and may apply a
 * GELU to the sum. Backward: dx += dy W;  dW += dy^T x;  with u = x A^T and e = dy B:
 * dB += scale dy^T u;  dA += scale e^T x;  dx += scale e A. */

static sc_matrix sc__matrix(const void *data, sc_dtype dtype, int64_t ld, bool transposed) {
    return (sc_matrix){data, dtype, ld, transposed, NULL, 0};
}
static sc_matrix sc__whole(const sc_tensor *x, bool transposed) {
    return (sc_matrix){x->data, x->dtype, sc__last(x), transposed, x->scale, 0};
}

/* Rows [first, first + count) of x as a matrix; of its gradient. */
static sc_matrix sc__part(const sc_tensor *x, int64_t first, bool transposed) {
    int64_t n = sc__last(x);
    return sc__matrix((char *)x->data + first * n * sc_dtype_size(x->dtype), x->dtype, n,
                      transposed);
}
static sc_matrix sc__grad_part(const sc_tensor *x, int64_t first, bool transposed) {
    int64_t n = sc__last(x);
    return sc__matrix((char *)x->grad + first * n * sc_dtype_size(x->dtype), x->dtype, n,
                      transposed);
}

/* The next run of samples from *sample on that use the same set: its set, its samples. */
static sc_set sc__next_run(const sc_tape *t, int64_t batch, int64_t *sample, int64_t *count) {
    sc_set set = t->sets ? (sc_set)t->sets[*sample] : SC_TEACHER;
    for (*count = 1; *sample + *count < batch; ++*count)
        if (t->sets && t->sets[*sample + *count] != set) break;
    return set;
}

static void sc__lora_backward(sc_tape *t, sc__op *op) {
    sc_tensor *x = op->in[0], *u = op->in[3], *y = op->out[0];
    const sc_adapter *lora = (const sc_adapter *)op->extra;
    sc_tensor *a = lora->a[op->n[1]], *b = lora->b[op->n[1]];
    int64_t first = op->n[0], rows = sc__rows(u), in = sc__last(x), out = sc__last(y),
            r = lora->rank;
    float s = lora->scale;
    sc_tensor *e = sc__new_like(t, u);
    if (!e) { t->failed = true; return; }
    t->be->gemm(rows, r, out, s, sc__grad_part(y, first, false), sc__whole(b, false), 0,
                sc__whole(e, false), NULL);
    if (b->grad)
        t->be->gemm(out, r, rows, s, sc__grad_part(y, first, true), sc__whole(u, false), 1,
                    sc__matrix(b->grad, SC_F32, r, false), NULL);
    if (a->grad)
        t->be->gemm(r, in, rows, 1, sc__whole(e, true), sc__part(x, first, false), 1,
                    sc__matrix(a->grad, SC_F32, in, false), NULL);
    if (sc__grad(t, x))
        t->be->gemm(rows, in, r, 1, sc__whole(e, false), sc__whole(a, false), 1,
                    sc__grad_part(x, first, false), NULL);
}

static void sc__linear_backward(sc_tape *t, sc__op *op) {
    sc_tensor *x = op->in[0], *w = op->in[1], *bias = op->in[2], *y = op->out[0];
    int64_t rows = sc__rows(x), in = sc__last(x), out = sc__last(y);
    float beta;
    if (sc__grad_beta(t, x, &beta))
        t->be->gemm(rows, in, out, 1, sc__grad_part(y, 0, false), sc__whole(w, false), beta,
                    sc__grad_part(x, 0, false), NULL);
    if (w->grad)
        t->be->gemm(out, in, rows, 1, sc__grad_part(y, 0, true), sc__whole(x, false), 1,
                    sc__matrix(w->grad, SC_F32, in, false), NULL);
    if (bias && bias->grad) t->be->column_sum((float *)bias->grad, y->grad, rows, out);
}

/* Rows from `first` on of y, its columns from `at` on. */
static sc_matrix sc__columns(const sc_tensor *y, int64_t first, int64_t at) {
    sc_matrix m = sc__part(y, first, false);
    m.data = (char *)m.data + at * sc_dtype_size(y->dtype);
    return m;
}

/* What a layer computes: y[:, at ...] = sum, or gelu(sum). sum is y itself, or the tensor that the
 * gradient in front of the GELU belongs to, or NULL: a GELU that is not recorded. */
typedef struct sc__linear_output { sc_tensor *y; int64_t at; sc_tensor *sum; } sc__linear_output;

/* Sets the rows of one run of samples with one set to the adapters' part, and records it. */
static bool sc__linear_lora(sc_tape *t, sc_tensor *x, const sc__linear_output *o,
                            const sc_linear_layer *l, sc_set set, int64_t first, int64_t rows) {
    int64_t in = sc__last(x), out = l->weight->shape[0], width = sc__last(o->y);
    float beta = 0;
    for (const sc_adapter *lora = l->adapters; lora; lora = lora->next) {
        if (!lora->a[set]) continue;
        sc_tensor *u = sc_new(t, 2, (const int64_t[]){rows, lora->rank});
        if (!u) return false;
        t->be->gemm(rows, lora->rank, in, 1, sc__part(x, first, false),
                    sc__whole(lora->a[set], true), 0, sc__whole(u, false), NULL);
        t->be->gemm(rows, out, lora->rank, lora->scale, sc__whole(u, false),
                    sc__whole(lora->b[set], true), beta, sc__columns(o->y, first, o->at), NULL);
        beta = 1;
        sc__op *op = sc__record(t, sc__lora_backward, o->sum, x, lora->a[set], lora->b[set]);
        if (op) {
            op->in[3] = u;
            op->n[0] = first;
            op->n[1] = set;
            op->extra = lora;
        }
    }
    if (beta == 0) { /* this set adds nothing; the other columns are not written yet */
        sc_matrix part = sc__part(o->y, first, false);
        t->be->zero((void *)part.data, (size_t)(rows * width * sc_dtype_size(part.dtype)));
    }
    return true;
}

static bool sc__linear(sc_tape *t, sc_tensor *x, const sc_linear_layer *l, sc__linear_output o) {
    int64_t in = sc__last(x), out = l->weight->shape[0], rows = sc__rows(x), batch = x->shape[0];
    bool adapted = false;
    for (int64_t sample = 0, count; sample < batch; sample += count) {
        sc_set set = sc__next_run(t, batch, &sample, &count);
        for (const sc_adapter *a = l->adapters; a; a = a->next) adapted = adapted || a->a[set];
    }
    for (int64_t sample = 0, count; adapted && sample < batch; sample += count) {
        sc_set set = sc__next_run(t, batch, &sample, &count);
        int64_t each = rows / batch;
        if (!sc__linear_lora(t, x, &o, l, set, sample * each, count * each)) return false;
    }
    float beta = adapted ? 1.f : 0.f;
    sc_matrix left = sc__whole(x, false), right = sc__whole(l->weight, true);
    static SC_THREAD_LOCAL uint64_t contents;
    if (t->input != x) t->input = x, t->content = ++contents; /* no tensor is written twice */
    left.content = t->content;
    if (o.sum == o.y)
        t->be->gemm(rows, out, in, 1, left, right, beta, sc__columns(o.y, 0, o.at), l->bias);
    else
        t->be->gemm_gelu(rows, out, in, left, right, beta, sc__columns(o.y, 0, o.at), l->bias,
                         o.sum);
    sc__record(t, sc__linear_backward, o.sum, x, l->weight, l->bias);
    return true;
}

/* A new tensor for the layer's output, `more` columns wider; NULL if x does not fit. cheap: for the
 * activation that follows. */
static sc_tensor *sc__linear_new(sc_tape *t, const sc_tensor *x, const sc_linear_layer *l,
                                 int64_t more, bool cheap) {
    if (!x) return NULL;
    int64_t shape[SC_MAX_DIMS], in = sc__last(x);
    if (in != l->weight->shape[1]) {
        sc__fail("linear layer takes %lld channels, was given %lld", (long long)l->weight->shape[1],
                 (long long)in);
        return NULL;
    }
    memcpy(shape, x->shape, sizeof shape);
    shape[x->ndim - 1] = l->weight->shape[0] + more;
    return (cheap ? sc__new_cheap : sc_new)(t, x->ndim, shape);
}

sc_tensor *sc_linear(sc_tape *t, const sc_tensor *x, const sc_linear_layer *l) {
    sc_tensor *y = sc__linear_new(t, x, l, 0, false);
    return y && sc__linear(t, (sc_tensor *)x, l, (sc__linear_output){y, 0, y}) ? y : NULL;
}

static void sc__activate_forward(sc_tape *t, sc__op *op) {
    t->be->activate((sc_activation)op->n[0], op->out[0], op->n[1], op->in[0]);
}
static void sc__activate_backward(sc_tape *t, sc__op *op) {
    if (sc__whole_grad(t, op->in[0]))
        t->be->activate_backward((sc_activation)op->n[0], op->out[0], op->n[1], op->in[0]);
}
static sc__op sc__activation(sc_activation kind, sc_tensor *y, int64_t at, sc_tensor *x) {
    return (sc__op){sc__activate_backward, sc__activate_forward, {x}, {y}, {kind, at}, 0, NULL};
}

/* y[:, at ...] = gelu(linear(x)); what goes into the GELU is kept only while recording. */
static bool sc__linear_gelu(sc_tape *t, sc_tensor *x, const sc_linear_layer *l, sc_tensor *y,
                            int64_t at) {
    sc_tensor *sum = t->recording ? sc__linear_new(t, x, l, 0, false) : NULL;
    if (t->recording && !sum) return false;
    if (!sc__linear(t, x, l, (sc__linear_output){y, at, sum})) return false;
    if (sum) /* the product has applied the GELU */
        sc__append(t, sc__activation(SC_GELU_TANH, y, at, sum));
    return true;
}

sc_tensor *sc_linear_gelu(sc_tape *t, const sc_tensor *x, const sc_linear_layer *l) {
    sc_tensor *y = sc__linear_new(t, x, l, 0, true);
    return y && sc__linear_gelu(t, (sc_tensor *)x, l, y, 0) ? y : NULL;
}

/* ---- The other operations: allocate, call the backend, record ---- */

sc_tensor *sc_activate(sc_tape *t, sc_activation kind, sc_tensor *x) {
    sc_tensor *y = x ? sc__new_cheap(t, x->ndim, x->shape) : NULL;
    if (y) sc__run_cheap(t, sc__activation(kind, y, 0, x));
    return y;
}

/* A block of `rows` rows: dst[r, dst_at ...] (+)= src[r, src_at ...], in the activations' type. */
static void sc__copy_columns(sc_tape *t, void *dst, int64_t dst_ld, int64_t dst_at, const void *src,
                             int64_t src_ld, int64_t src_at, int64_t rows, int64_t columns,
                             bool add) {
    int64_t size = sc_dtype_size(t->be->activation);
    t->be->copy_block((char *)dst + dst_at * size, dst_ld, (const char *)src + src_at * size,
                      src_ld, rows, columns, t->be->activation, add);
}

static void sc__add_backward(sc_tape *t, sc__op *op) {
    int64_t n = sc_count(op->out[0]);
    float beta;
    for (int i = 0; i < 2; i++)
        if (sc__grad_beta(t, op->in[i], &beta))
            sc__copy_columns(t, op->in[i]->grad, n, 0, op->out[0]->grad, n, 0, 1, n, beta != 0);
}

sc_tensor *sc_add(sc_tape *t, sc_tensor *a, sc_tensor *b) {
    sc_tensor *y = a && b ? sc__new_like(t, a) : NULL;
    if (!y) return NULL;
    int64_t n = sc_count(y);
    sc__copy_columns(t, y->data, n, 0, a->data, n, 0, 1, n, false);
    sc__copy_columns(t, y->data, n, 0, b->data, n, 0, 1, n, true);
    sc__record(t, sc__add_backward, y, a, b, NULL);
    return y;
}

sc_tensor *sc_multiply(sc_tape *t, sc_tensor *a, sc_tensor *b) {
    sc_tensor *y = a && b ? sc__new_like(t, a) : NULL;
    if (y) t->be->multiply(y, a, b);
    return y;
}

/* Concatenation of rows of `wa` and `wb` elements: tokens and channels differ only in what a row
 * is. */
static void sc__concat_forward(sc_tape *t, sc__op *op) {
    int64_t rows = op->n[0], wa = op->n[1], wb = op->n[2];
    void *y = op->out[0]->data;
    sc__copy_columns(t, y, wa + wb, 0, op->in[0]->data, wa, 0, rows, wa, false);
    sc__copy_columns(t, y, wa + wb, wa, op->in[1]->data, wb, 0, rows, wb, false);
}
static void sc__concat_backward(sc_tape *t, sc__op *op) {
    int64_t rows = op->n[0], width[2] = {op->n[1], op->n[2]}, sum = width[0] + width[1];
    float beta;
    for (int i = 0; i < 2; i++)
        if (sc__grad_beta(t, op->in[i], &beta))
            sc__copy_columns(t, op->in[i]->grad, width[i], 0, op->out[0]->grad, sum, i * width[0],
                             rows, width[i], beta != 0);
}

static sc_tensor *sc__concat(sc_tape *t, sc_tensor *a, sc_tensor *b, int64_t rows, sc_tensor *y) {
    if (y)
        sc__run_cheap(t, (sc__op){sc__concat_backward, sc__concat_forward, {a, b}, {y},
                                  {rows, sc_count(a) / rows, sc_count(b) / rows}, 0, NULL});
    return y;
}

sc_tensor *sc_concat_tokens(sc_tape *t, sc_tensor *a, sc_tensor *b) {
    if (!a || !b) return NULL;
    int64_t batch = a->shape[0], shape[] = {batch, a->shape[1] + b->shape[1], a->shape[2]};
    return sc__concat(t, a, b, batch, sc__new_cheap(t, 3, shape));
}

sc_tensor *sc_concat_channels(sc_tape *t, sc_tensor *a, sc_tensor *b) {
    if (!a || !b) return NULL;
    const int64_t shape[] = {a->shape[0], a->shape[1], a->shape[2] + b->shape[2]};
    return sc__concat(t, a, b, sc__rows(a), sc__new_cheap(t, 3, shape));
}

/* The GELU's part, and its gradient, are its own operation's. */
static void sc__concat_gelu_forward(sc_tape *t, sc__op *op) {
    sc_tensor *a = op->in[0], *y = op->out[0];
    int64_t width = sc__last(a);
    sc__copy_columns(t, y->data, sc__last(y), 0, a->data, width, 0, sc__rows(a), width, false);
}
static void sc__concat_gelu_backward(sc_tape *t, sc__op *op) {
    sc_tensor *a = op->in[0], *y = op->out[0];
    int64_t width = sc__last(a);
    float beta;
    if (sc__grad_beta(t, a, &beta))
        sc__copy_columns(t, a->grad, width, 0, y->grad, sc__last(y), 0, sc__rows(a), width,
                         beta != 0);
}

sc_tensor *sc_concat_gelu(sc_tape *t, sc_tensor *a, const sc_tensor *x, const sc_linear_layer *l) {
    int64_t width = a ? sc__last(a) : 0;
    sc_tensor *y = a ? sc__linear_new(t, x, l, width, true) : NULL;
    if (!y || !sc__linear_gelu(t, (sc_tensor *)x, l, y, width)) return NULL;
    sc__run_cheap(
        t, (sc__op){sc__concat_gelu_backward, sc__concat_gelu_forward, {a}, {y}, {0}, 0, NULL});
    return y;
}

static void sc__slice_forward(sc_tape *t, sc__op *op) {
    sc_tensor *x = op->in[0], *y = op->out[0];
    int64_t c = x->shape[2];
    sc__copy_columns(t, y->data, y->shape[1] * c, 0, x->data, x->shape[1] * c, op->n[0],
                     x->shape[0], y->shape[1] * c, false);
}
static void sc__slice_backward(sc_tape *t, sc__op *op) {
    sc_tensor *x = op->in[0], *y = op->out[0];
    if (sc__grad(t, x))
        sc__copy_columns(t, x->grad, x->shape[1] * x->shape[2], op->n[0], y->grad,
                         y->shape[1] * y->shape[2], 0, x->shape[0], y->shape[1] * y->shape[2],
                         true);
}

sc_tensor *sc_slice_tokens(sc_tape *t, sc_tensor *x, int64_t from, int64_t count) {
    if (!x) return NULL;
    const int64_t shape[] = {x->shape[0], count, x->shape[2]};
    sc_tensor *y = sc__new_cheap(t, 3, shape);
    if (y)
        sc__run_cheap(t, (sc__op){sc__slice_backward, sc__slice_forward, {x}, {y},
                                  {from * x->shape[2]}, 0, NULL});
    return y;
}

static void sc__ln_modulate_forward(sc_tape *t, sc__op *op) {
    t->be->ln_modulate(op->out[0], op->in[0], op->in[1], (int)op->n[0], (int)op->n[1]);
}
static void sc__ln_modulate_backward(sc_tape *t, sc__op *op) {
    sc__whole_grad(t, op->in[0]);
    sc__grad(t, op->in[1]);
    if (!t->failed)
        t->be->ln_modulate_backward(op->out[0], op->in[0], op->in[1], (int)op->n[0], (int)op->n[1]);
}

sc_tensor *sc_ln_modulate(sc_tape *t, sc_tensor *x, sc_tensor *mod, int shift, int scale) {
    sc_tensor *y = x && mod ? sc__new_cheap(t, x->ndim, x->shape) : NULL;
    if (y)
        sc__run_cheap(t, (sc__op){sc__ln_modulate_backward, sc__ln_modulate_forward, {x, mod}, {y},
                                  {shift, scale}, 0, NULL});
    return y;
}

static void sc__gated_residual_backward(sc_tape *t, sc__op *op) {
    for (int i = 0; i < 2; i++) sc__whole_grad(t, op->in[i]);
    sc__grad(t, op->in[2]);
    if (!t->failed)
        t->be->gated_residual_backward(op->out[0], op->in[0], op->in[1], op->in[2], (int)op->n[0]);
}

sc_tensor *sc_gated_residual(sc_tape *t, sc_tensor *x, sc_tensor *h, sc_tensor *mod, int gate) {
    sc_tensor *y = x && h && mod ? sc__new_like(t, x) : NULL;
    if (!y) return NULL;
    t->be->gated_residual(y, x, h, mod, gate);
    sc__op *op = sc__record(t, sc__gated_residual_backward, y, x, h, mod);
    if (op) op->n[0] = gate;
    return y;
}

static void sc__norm_rope_forward(sc_tape *t, sc__op *op) {
    t->be->norm_rope(op->out[0], op->n[0], op->in[0], op->in[1], (const sc_tensor *)op->extra);
}
static void sc__norm_rope_backward(sc_tape *t, sc__op *op) {
    if (sc__whole_grad(t, op->in[0]) || op->in[1]->grad)
        t->be->norm_rope_backward(op->out[0], op->n[0], op->in[0], op->in[1],
                                  (const sc_tensor *)op->extra);
}

/* Queries or keys of both streams, normalised and turned, joined with the text first; text may be
 * NULL. */
sc_tensor *sc_norm_rope(sc_tape *t, sc_tensor *text, sc_tensor *image, sc_tensor *text_weight,
                        sc_tensor *image_weight, const sc_tensor *rope) {
    if (!image || (!text && text_weight)) return NULL;
    if (image_weight->shape[0] > 256) return sc__fail("a head has more than 256 channels"), NULL;
    int64_t text_tokens = text ? text->shape[1] : 0, tokens = text_tokens + image->shape[1];
    const int64_t shape[] = {image->shape[0], tokens, image->shape[2]};
    sc_tensor *y = sc__new_cheap(t, 3, shape);
    if (!y) return NULL;
    sc_tensor *parts[2] = {text, image}, *weights[2] = {text_weight, image_weight};
    for (int i = text ? 0 : 1; i < 2; i++)
        sc__run_cheap(t, (sc__op){sc__norm_rope_backward, sc__norm_rope_forward,
                                  {parts[i], weights[i]}, {y}, {i ? text_tokens : 0}, 0, rope});
    return y;
}

static void sc__attention_backward(sc_tape *t, sc__op *op) {
    bool wanted[3];
    for (int i = 0; i < 3; i++) { /* backends make all three together */
        wanted[i] = op->in[i]->needs_grad;
        op->in[i]->needs_grad = true;
        sc__whole_grad(t, op->in[i]);
    }
    if (!t->failed)
        t->be->attention_backward(op->out[0], (const float *)op->extra, op->in[0], op->in[1],
                                  op->in[2], (int)op->n[0], op->scale);
    for (int i = 0; i < 3; i++)
        if (!wanted[i]) op->in[i]->needs_grad = false, op->in[i]->grad = NULL;
}

sc_tensor *sc_attention(sc_tape *t, sc_tensor *q, sc_tensor *k, sc_tensor *v, int heads,
                        float scale, const sc_tensor *bias, bool causal) {
    sc_tensor *o = q && k && v ? sc__new_like(t, q) : NULL;
    if (!o) return NULL;
    sc__op *op = bias || causal ? NULL : sc__record(t, sc__attention_backward, o, q, k, v);
    size_t sums = (size_t)(q->shape[0] * heads * q->shape[1]) * sizeof(float);
    float *lse = op ? (float *)sc__arena_take(&t->device, sums) : NULL;
    if (op && !lse) return NULL;
    if (op) op->n[0] = heads, op->scale = scale, op->extra = lse;
    t->be->attention(o, lse, q, k, v, heads, scale, bias, causal);
    return o;
}

sc_tensor *sc_timestep_embedding(sc_tape *t, const float *times, int64_t batch, int64_t channels) {
    sc_tensor *y = sc_new(t, 2, (const int64_t[]){batch, channels});
    if (y) t->be->embed_timestep(y, times);
    return y;
}

sc_tensor *sc_blend(sc_tape *t, const float *p, sc_tensor *u, const float *q, sc_tensor *v) {
    sc_tensor *y = u && v ? sc__new_like(t, u) : NULL;
    if (y) t->be->blend(y, p, u, q, v);
    return y;
}

static void sc__mse_backward(sc_tape *t, sc__op *op) {
    if (sc__grad(t, op->in[0])) t->be->mse_backward(op->in[0], op->in[1], op->scale);
}

/* `weight` counts in the backward pass only. */
bool sc_mse(sc_tape *t, sc_tensor *prediction, const sc_tensor *target, float weight,
            double *loss) {
    if (!prediction || !target) return false;
    t->be->mse(loss, prediction, target);
    sc__op *op = sc__record(t, sc__mse_backward, prediction, prediction, NULL, NULL);
    if (!op) return !t->failed;
    op->in[1] = (sc_tensor *)target;
    op->scale = weight;
    return sc__grad(t, prediction) != NULL; /* it exists: the walk back starts here */
}

sc_tensor *sc_layer_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                         float eps) {
    sc_tensor *y = x ? sc__new_like(t, x) : NULL;
    if (y) t->be->layer_norm(y, x, w, b, eps);
    return y;
}

sc_tensor *sc_rms_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, float eps) {
    sc_tensor *y = x ? sc__new_like(t, x) : NULL;
    if (y) t->be->rms_norm(y, x, w, eps);
    return y;
}

sc_tensor *sc_embed_tokens(sc_tape *t, const sc_tensor *table, const int32_t *ids, int64_t batch,
                           int64_t tokens) {
    sc_tensor *y = sc__new3(t, batch, tokens, table->shape[1]);
    for (int64_t i = 0; i < batch * tokens; i++)
        if (ids[i] < 0 || ids[i] >= table->shape[0]) {
            sc__fail("token id %d is outside the table of %lld embeddings", (int)ids[i],
                     (long long)table->shape[0]);
            return NULL;
        }
    if (y) t->be->embed_tokens(y, table, ids);
    return y;
}

sc_tensor *sc_conv2d(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                     int stride, int pad_before) {
    if (!x) return NULL;
    const int64_t shape[] = {x->shape[0], w->shape[0], x->shape[2] / stride, x->shape[3] / stride};
    if (w->shape[1] != x->shape[1] || w->shape[2] > 5 || shape[2] < 1 || shape[3] < 1) {
        sc__fail("convolution: %lld channels of %lld x %lld pixels, a kernel of %lld channels, "
                 "%lld x %lld", (long long)x->shape[1], (long long)x->shape[2],
                 (long long)x->shape[3], (long long)w->shape[1], (long long)w->shape[2],
                 (long long)w->shape[3]);
        return NULL;
    }
    sc_tensor *y = sc_new(t, 4, shape);
    if (y) t->be->conv2d(y, x, w, b, stride, pad_before);
    return y;
}

sc_tensor *sc_group_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                         int groups, float eps, bool silu) {
    sc_tensor *y = x ? sc__new_like(t, x) : NULL;
    size_t bytes = y ? (size_t)(2 * x->shape[0] * groups) * sizeof(double) : 0;
    double *sums = y ? (double *)sc__arena_take(&t->device, bytes) : NULL;
    if (!sums) return NULL;
    t->be->zero(sums, bytes);
    t->be->group_sums(sums, x, 0, x->shape[2], groups);
    t->be->group_norm(y, x, sums, sc_count(x) / (x->shape[0] * groups), w, b, groups, eps, silu);
    return y;
}

sc_tensor *sc_upsample(sc_tape *t, const sc_tensor *x) {
    sc_tensor *y =
        x ? sc_new(t, 4,
                   (const int64_t[]){x->shape[0], x->shape[1], 2 * x->shape[2], 2 * x->shape[3]})
          : NULL;
    if (y) t->be->upsample(y, x);
    return y;
}

sc_tensor *sc_swap_axes(sc_tape *t, const sc_tensor *x) {
    sc_tensor *y = x ? sc__new3(t, x->shape[0], x->shape[2], x->shape[1]) : NULL;
    if (y) t->be->swap_axes(y, x);
    return y;
}

/* ---- Checkpoint: keep a block's inputs only, and run it again in the backward pass ---- */

static bool sc__overlap(const sc_tensor *a, const sc_tensor *b) {
    const char *pa = (const char *)a->data, *pb = (const char *)b->data;
    return pa < pb + sc_count(b) * sc_dtype_size(b->dtype) &&
           pb < pa + sc_count(a) * sc_dtype_size(a->dtype);
}

/* Runs a block without recording and gives back all that it made but its outputs: these are moved
 * to the place where its first tensors were, unless they would be copied onto themselves. */
static bool sc__run_lean(sc_tape *t, sc_block block, const void *context, sc_tensor **in,
                         sc_tensor **out) {
    bool recording = t->recording, overlap = false;
    sc__mark_t start = sc__mark(t);
    t->recording = false;
    bool ok = block(t, in, out, context);
    t->recording = recording;
    if (!ok) return false;
    int count = out[1] ? 2 : 1;
    sc__mark_t end = sc__mark(t);
    sc_tensor old[2];
    for (int i = 0; i < count; i++) old[i] = *out[i];
    sc__release(t, start);
    for (int i = 0; i < count; i++) {
        if (!(out[i] = sc__new_like(t, &old[i]))) return false;
        for (int j = 0; j < count; j++) overlap = overlap || sc__overlap(out[i], &old[j]);
    }
    if (overlap) sc__release(t, end);
    for (int i = 0; i < count; i++) {
        int64_t n = sc_count(&old[i]);
        if (overlap) out[i] = sc_reshape(t, &old[i], old[i].ndim, old[i].shape);
        else t->be->copy_block(out[i]->data, n, old[i].data, n, 1, n, old[i].dtype, false);
        if (!out[i]) return false;
    }
    return true;
}

/* Runs a block whose operations are recorded. What is cheap may lie where other blocks' is. */
static bool sc__run_recorded(sc_tape *t, sc_block block, const void *context, sc_tensor **in,
                             sc_tensor **out) {
    sc__arena_reset(&t->shared);
    t->in_block = true;
    bool ok = block(t, in, out, context);
    t->in_block = false;
    for (int i = 0; ok && i < 2 && out[i]; i++) /* what leaves the block needs its own */
        if (out[i]->shared) return sc__fail("a block must not end with an operation of one pass");
    return ok;
}

typedef struct sc__checkpoint {
    sc_block block;
    const void *context;
    const uint8_t *sets;
    int inputs;
} sc__checkpoint;

static void sc__checkpoint_backward(sc_tape *t, sc__op *op) {
    const sc__checkpoint *c = (const sc__checkpoint *)op->extra;
    for (int i = 0; i < c->inputs; i++) sc__grad(t, op->in[i]);
    sc__mark_t mark = sc__mark(t);
    int64_t first = t->count;
    const uint8_t *sets = t->sets;
    sc_tensor *out[2] = {NULL, NULL};
    t->sets = c->sets;
    if (!sc__run_recorded(t, c->block, c->context, op->in, out)) t->failed = true;
    if (t->sizes)
        *t->sizes++ = (sc__block_bytes){t->device.taken - mark.device_taken, t->shared.taken};
    for (int i = 0; i < 2 && out[i]; i++) out[i]->grad = op->out[i]->grad;
    if (!t->failed) sc__backward_from(t, first);
    t->sets = sets;
    sc__release(t, mark);
}

bool sc_checkpoint(sc_tape *t, sc_block block, const void *context, sc_tensor **in, int inputs,
                   sc_tensor **out) {
    if (!sc__run_lean(t, block, context, in, out)) return false;
    if (!t->recording) return true;
    sc__checkpoint *c = (sc__checkpoint *)sc__arena_take(&t->host, sizeof *c);
    if (!c) return false;
    *c = (sc__checkpoint){block, context, t->sets, inputs};
    /* weights inside may need a gradient where no input does */
    sc_tensor yes = {.needs_grad = true};
    sc__op *op = sc__record(t, sc__checkpoint_backward, out[0], &yes, NULL, NULL);
    if (!op) return false;
    for (int i = 0; i < inputs; i++) op->in[i] = in[i];
    op->out[1] = out[1];
    if (out[1]) out[1]->needs_grad = true;
    op->extra = c;
    return true;
}

/* ---- A kept block: two operations around its own say where its way back begins and ends ---- */

/* Of the way back: the gradients that leave the block come first; `end`, a tensor whose data is a
 * mark, gets a "gradient", so that its own operation is walked too. */
static void sc__keep_begin(sc_tape *t, sc__op *op) {
    sc_tensor *end = (sc_tensor *)op->extra;
    for (int i = 0; i < 5 && op->in[i]; i++) sc__grad(t, op->in[i]);
    *(sc__mark_t *)end->data = sc__mark(t);
    end->grad = end->data;
}
static void sc__keep_end(sc_tape *t, sc__op *op) {
    sc__release(t, *(sc__mark_t *)op->out[0]->data);
}

bool sc_keep(sc_tape *t, sc_block block, const void *context, sc_tensor **in, int inputs,
             sc_tensor **out) {
    if (!t->recording) return sc__run_lean(t, block, context, in, out);
    sc_tensor yes = {.needs_grad = true}, *end = sc__struct(t, 0, NULL, SC_F32);
    if (!end || !(end->data = sc__arena_take(&t->host, sizeof(sc__mark_t)))) return false;
    int64_t first = t->count;
    sc__op *op = sc__record(t, sc__keep_end, end, &yes, NULL, NULL);
    if (!op) return false;
    op->in[0] = NULL;
    if (!sc__run_recorded(t, block, context, in, out)) return false;
    for (int64_t i = first; i < t->count; i++) t->ops[i].out[0]->stale = t->ops[i].out[0]->shared;
    op = sc__record(t, sc__keep_begin, out[0], &yes, NULL, NULL);
    if (!op) return false;
    for (int i = 0; i < 5; i++) op->in[i] = i < inputs ? in[i] : NULL;
    op->out[1] = out[1];
    op->extra = end;
    return true;
}

/* ==== Flow matching: times and sampler ========================================================
 *
 * A model learns the velocity v = eps - x0 of the straight path x_t = (1 - t) x0 + t eps from data
 * (t = 0) to noise (t = 1). A sample is drawn by following it back from noise with Euler steps,
 * x_t' = x_t - (t - t') v(x_t, t, c); a time shift s > 1 puts more of them near the noise, where
 * the picture's structure is decided. The learned velocity of a trained model is an average over
 * pictures, so its paths are curved, and few large steps leave them: SCFM, below, straightens them.
 */

float sc_shift_time(float u, float shift) { return shift * u / (1.f + (shift - 1.f) * u); }

/* FLUX's: mu grows linearly with the number of image tokens, 0.5 at 256, 1.15 at 4096. */
float sc_dynamic_shift(int64_t tokens) {
    return expf(0.5f + (1.15f - 0.5f) * (float)(tokens - 256) / (4096 - 256));
}

void sc_schedule(float *times, int steps, float shift) {
    for (int i = 0; i <= steps; i++) times[i] = sc_shift_time(1.f - (float)i / (float)steps, shift);
    times[0] = 1.f - 1e-5f;
}

bool sc_sample(sc_flux *f, sc_tape *t, const sc_sampling *s, int batch, int text_tokens,
               const float *context, const float *pooled, float *latents) {
    const sc_flux_config *c = sc_flux_config_of(f);
    if (s->steps < 1 || batch < 1)
        return sc__fail("a sample of %d steps, %d at once: both must be positive", s->steps, batch);
    float *host = (float *)sc__alloc((size_t)(s->steps + 1 + 4 * batch), sizeof *host);
    if (!host) return false;
    float *times = host + 4 * batch, *time = host, *guidance = host + batch;
    float *one = host + 2 * batch, *delta = host + 3 * batch;
    sc_schedule(times, s->steps,
                s->shift > 0 ? s->shift : sc_dynamic_shift((int64_t)s->h * s->w));
    for (int b = 0; b < batch; b++) guidance[b] = s->guidance, one[b] = 1;
    sc_tape_record(t, false);
    sc_tape_use(t, s->sets);
    bool ok = true;
    for (int i = 0; ok && i < s->steps; i++) {
        sc_tape_reset(t);
        for (int b = 0; b < batch; b++) time[b] = times[i], delta[b] = times[i + 1] - times[i];
        sc_tensor *x =
            sc_from(t, 3, (const int64_t[]){batch, (int64_t)s->h * s->w, c->in_channels}, latents);
        sc_flux_input in = {
            .x = x, .time = time, .guidance = guidance, .h = s->h, .w = s->w,
            .context =
                sc_from(t, 3, (const int64_t[]){batch, text_tokens, c->text_channels}, context),
            .pooled = sc_from(t, 2, (const int64_t[]){batch, c->pooled_channels}, pooled)};
        sc_tensor *v = sc_flux_velocity(f, t, &in);
        ok = sc_read(t, sc_blend(t, one, x, delta, v), latents);
        for (int64_t j = 0; ok && j < sc_count(x); j++)
            if (!isfinite(latents[j]))
                ok = sc__fail("step %d gave NaN or infinity: are the weights damaged?", i + 1);
        if (ok && s->progress && !s->progress(s->user, i + 1, s->steps)) ok = sc__fail("stopped");
    }
    sc_tape_use(t, NULL);
    SC_FREE(host);
    return ok;
}

/* ==== SCFM: shortcutting a flow-matching model ===============================================
 *
 * Cai et al., "Shortcutting Pre-trained Flow Matching Diffusion Models is Almost Free Lunch"
 * (NeurIPS 2025). One Euler step over an interval should equal two steps over its halves, at every
 * scale at once. A step of training, for each sample:
 *
 *  1. x0, c: a picture's latents and its caption; eps ~ N(0, I). These are the caller's.
 *  2. Teacher's case (0.4 of the samples): N = 32. Else its own case: N from {2, 4, 8, 16}.
 *  3. Times t_i = shift(1 - i / N), the shift drawn, t_0 = 1 - 1e-5; the guidance g is drawn too.
 *  4. j even: the step from t_j down to t_j+2, its halves d1 = t_j - t_j+1, d2 = t_j+1 - t_j+2.
 *  5. x = (1 - t_j) x0 + t_j eps
 *  6. v1 = first(x, t_j, c, g);  x' = x - d1 v1;  v2 = slow(x', t_j+1, c, g);
 *     target = (d1 v1 + d2 v2) / (d1 + d2)
 *  7. loss = mean((student(x, t_j, c, g) - target)^2). Then AdamW, and both averages follow.
 *
 * `first` is the teacher on the fine grid, which anchors the student to the model it came from, or
 * the student's own fast average on a coarse one, which doubles its step. The network is never told
 * the step size, so the only velocity that satisfies all of them is constant along its trajectory:
 * the flow becomes straight, and a few Euler steps follow it.
 *
 * Easy to get wrong: t = 1 is noise; the first time is 1 - 1e-5; j is even; no gradient through
 * the target; the second half-step always uses the slow average.
 */

/* ---- Steps 2 to 4: chance ---- */

static float sc__between(sc_rng *rng, const float range[2]) {
    return range[0] + (range[1] - range[0]) * sc_uniform(rng);
}

void sc_draw_sample(const sc_recipe *r, sc_rng *rng, int64_t tokens, bool flow_matching,
                    sc_draw *d) {
    int choices = 0;
    while (choices < 8 && r->self_steps[choices]) choices++;
    d->no_caption = sc_uniform(rng) < r->caption_dropout;
    d->teacher = sc_uniform(rng) < r->teacher_ratio || !choices;
    int chosen = sc_uniform_int(rng, choices ? choices : 1);
    d->steps = d->teacher ? r->teacher_steps : r->self_steps[chosen];
    bool dynamic = sc_uniform(rng) < r->dynamic_shift_ratio;
    float shift = sc__between(rng, r->shift), unit = sc_uniform(rng);
    d->shift = dynamic ? sc_dynamic_shift(tokens) : shift;
    d->guidance = sc__between(rng, r->guidance);
    d->j = 2 * sc_uniform_int(rng, d->steps / 2);
    for (int i = 0; i < 3; i++)
        d->t[i] = sc_shift_time(1.f - (float)(d->j + i) / (float)d->steps, d->shift);
    if (flow_matching) d->t[0] = sc_shift_time(unit, d->shift);
    d->t[0] = fminf(d->t[0], 1.f - 1e-5f);
}

/* ---- Steps 5 and 6: noisy input and target ---- */

/* `n` times the same number, on the tape: coefficients for sc_blend. */
static float *sc__constant(sc_tape *t, int64_t n, float value) {
    float *x = (float *)sc__arena_take(&t->host, (size_t)n * sizeof *x);
    for (int64_t i = 0; x && i < n; i++) x[i] = value;
    return x;
}

/* Samples [first, first + count) of x, the same memory. */
static sc_tensor *sc__samples(sc_tape *t, const sc_tensor *x, int64_t first, int64_t count) {
    sc_tensor *y = sc_reshape(t, x, x->ndim, x->shape);
    if (!y) return NULL;
    y->data = (char *)y->data + first * (sc_count(x) / x->shape[0]) * sc_dtype_size(x->dtype);
    y->shape[0] = count;
    return y;
}

sc_tensor *sc_noisy(sc_tape *t, const sc_draw *draws, sc_tensor *x0, sc_tensor *noise) {
    if (!x0 || !noise) return NULL;
    int64_t n = x0->shape[0];
    float *time = sc__constant(t, n, 0), *rest = sc__constant(t, n, 1);
    if (!time || !rest) return NULL;
    for (int64_t i = 0; i < n; i++) time[i] = draws[i].t[0], rest[i] -= time[i];
    return sc_blend(t, rest, x0, time, noise);
}

bool sc_scfm_target(const sc_model *model, sc_tape *t, const sc_draw *draws, int64_t first,
                    const sc_tensor *x_of_all, sc_tensor *target_of_all) {
    int64_t n = x_of_all->shape[0] - first;
    bool recording = t->recording;
    sc__mark_t mark = sc__mark(t);
    sc_tensor *x = sc__samples(t, x_of_all, first, n),
              *target = sc__samples(t, target_of_all, first, n), *v1, *halfway, *v2 = NULL;
    float *t0 = sc__constant(t, 7 * n, 1), *t1 = t0 + n, *guidance = t1 + n, *one = guidance + n,
          *minus_d1 = one + n, *part1 = minus_d1 + n, *part2 = part1 + n;
    uint8_t *start = (uint8_t *)sc__arena_take(&t->host, (size_t)n * 2), *slow = start + n;
    if (!x || !target || !t0 || !start) return false;
    for (int64_t i = 0; i < n; i++) {
        const sc_draw *d = &draws[first + i];
        float d1 = d->t[0] - d->t[1], d2 = d->t[1] - d->t[2];
        t0[i] = d->t[0], t1[i] = d->t[1], guidance[i] = d->guidance;
        minus_d1[i] = -d1, part1[i] = d1 / (d1 + d2), part2[i] = d2 / (d1 + d2);
        start[i] = d->teacher ? SC_TEACHER : SC_FAST, slow[i] = SC_SLOW;
    }
    sc_tape_record(t, false); /* no gradient */
    v1 = model->velocity(model->self, t, x, first, start, t0, guidance);
    halfway = sc_blend(t, one, x, minus_d1, v1); /* x - d1 v1 */
    if (halfway) v2 = model->velocity(model->self, t, halfway, first, slow, t1, guidance);
    if (v2) t->be->blend(target, part1, v1, part2, v2); /* (d1 v1 + d2 v2) / (d1 + d2) */
    sc_tape_record(t, recording);
    sc__release(t, mark);
    return v2 != NULL;
}

/* Flow matching, for the samples [0, n): the target eps - x0. */
static bool sc__flow_matching_target(sc_tape *t, const sc_tensor *x0, const sc_tensor *noise,
                                     int64_t n, sc_tensor *target) {
    const float *one = sc__constant(t, n, 1), *minus = sc__constant(t, n, -1);
    sc_tensor *data = sc__samples(t, x0, 0, n), *eps = sc__samples(t, noise, 0, n),
              *part = sc__samples(t, target, 0, n);
    if (!one || !minus || !data || !eps || !part) return false;
    t->be->blend(part, one, eps, minus, data);
    return true;
}

/* ---- FLUX as a model of four sets, and its training step ---- */

typedef struct sc__flux_model {
    sc_flux *flux;
    sc_params *params;
    const sc_batch *batch;
    sc_tensor *context, *pooled;
} sc__flux_model;

/* With LoRA each sample brings its own set into one pass; with whole weights each run of samples
 * that share a set is a pass. */
static sc_tensor *sc__flux_model_velocity(void *self, sc_tape *t, sc_tensor *x, int64_t first,
                                          const uint8_t *sets, const float *time,
                                          const float *guidance) {
    sc__flux_model *m = (sc__flux_model *)self;
    int64_t batch = x->shape[0], count = batch;
    bool whole = m->params->adapters == NULL;
    sc_tensor *y = NULL;
    sc_tape_use(t, sets);
    for (int64_t i = 0; i < batch; i += count) {
        sc_set set = whole ? sc__next_run(t, batch, &i, &count) : SC_TEACHER;
        if (whole && !m->params->set[set])
            return sc__fail("the recipe asks a teacher; these weights were given none"), NULL;
        if (whole) sc_params_use(m->params, set);
        sc_flux_input in = {.x = sc__samples(t, x, i, count),
                            .time = time + i, .guidance = guidance + i,
                            .context = sc__samples(t, m->context, first + i, count),
                            .pooled = sc__samples(t, m->pooled, first + i, count),
                            .h = m->batch->h, .w = m->batch->w};
        sc_tensor *v = sc_flux_velocity(m->flux, t, &in);
        if (!v || count == batch) return v;
        if (!y && !(y = sc__new3(t, batch, v->shape[1], v->shape[2]))) return NULL;
        int64_t n = sc_count(v);
        sc__copy_columns(t, y->data, n, i * (n / count), v->data, n, 0, 1, n, false);
    }
    return y;
}

/* One sample's host values for each of like's samples. */
static sc_tensor *sc__repeated(sc_tape *t, const sc_tensor *like, const float *values) {
    int64_t n = like->shape[0], size = sc_count(like) / n;
    sc_tensor *one = sc_from(t, 1, &size, values), *y = one ? sc__new_like(t, like) : NULL;
    if (y) sc__copy_columns(t, y->data, size, 0, one->data, 0, 0, n, size, false);
    return y;
}

/* Guidance distillation: the target v_u + g (v_c - v_u) of the frozen teacher, itself asked with
 * g = 1; v_u is without a caption. */
static bool sc__guidance_target(sc__flux_model *m, sc_tape *t, const float *time,
                                const float *guidance, sc_tensor *x, sc_tensor *target) {
    int64_t n = x->shape[0];
    sc__mark_t mark = sc__mark(t);
    sc__flux_model uncaptioned = *m;
    uncaptioned.context = sc__repeated(t, m->context, m->batch->no_context);
    uncaptioned.pooled = sc__repeated(t, m->pooled, m->batch->no_pooled);
    float *one = sc__constant(t, n, 1), *rest = sc__constant(t, n, 1);
    uint8_t *teacher = (uint8_t *)sc__arena_take(&t->host, (size_t)n);
    if (!uncaptioned.context || !uncaptioned.pooled || !one || !rest || !teacher) return false;
    for (int64_t i = 0; i < n; i++) rest[i] -= guidance[i], teacher[i] = SC_TEACHER;
    sc_tensor *with = sc__flux_model_velocity(m, t, x, 0, teacher, time, one);
    sc_tensor *without =
        with ? sc__flux_model_velocity(&uncaptioned, t, x, 0, teacher, time, one) : NULL;
    if (without) t->be->blend(target, guidance, with, rest, without);
    sc__release(t, mark);
    return without != NULL;
}

/* Uploads the batch's text; a dropped caption is replaced by the empty one. */
static bool sc__upload_text(sc__flux_model *m, sc_tape *t, const sc_draw *draws) {
    const sc_batch *b = m->batch;
    const sc_flux_config *c = sc_flux_config_of(m->flux);
    int64_t nc = (int64_t)b->text_tokens * c->text_channels, np = c->pooled_channels;
    for (int i = 0; i < b->size; i++) {
        if (!draws[i].no_caption) continue;
        memcpy(b->context + i * nc, b->no_context, (size_t)nc * 4);
        memcpy(b->pooled + i * np, b->no_pooled, (size_t)np * 4);
    }
    m->context =
        sc_from(t, 3, (const int64_t[]){b->size, b->text_tokens, c->text_channels}, b->context);
    m->pooled = sc_from(t, 2, (const int64_t[]){b->size, np}, b->pooled);
    return m->context && m->pooled;
}

/* This part of n samples, in whole ones: what is left over is one with that chance. */
static int64_t sc__part_of(int64_t n, float part, sc_rng *rng) {
    float exact = part * (float)n, whole = floorf(exact);
    return (int64_t)whole + (exact > whole && sc_uniform(rng) < exact - whole);
}

bool sc_train_gradient(sc_flux *flux, sc_params *params, sc_tape *t, const sc_recipe *r,
                       const sc_batch *b, sc_rng *rng) {
    int64_t n = b->size, tokens = (int64_t)b->h * b->w;
    const int64_t shape[] = {n, tokens, sc_flux_config_of(flux)->in_channels};
    sc_tape_reset(t);
    sc_tape_record(t, false);
    sc_draw *draws = (sc_draw *)sc__arena_take(&t->host, (size_t)n * sizeof *draws);
    float *time = sc__constant(t, n, 0), *guidance = sc__constant(t, n, 0);
    uint8_t *student = (uint8_t *)sc__arena_take(&t->host, (size_t)n);
    if (!draws || !time || !guidance || !student) return false;
    /* Steps 2 to 4: chance. Flow matching comes first, then the teacher's case, then the student's
     * own: neighbours with the same set share its products. */
    int64_t plain = r->distil_guidance ? n : sc__part_of(n, r->fm_ratio, rng);
    for (int64_t i = 0, low = plain, high = n; i < n; i++) {
        sc_draw d;
        sc_draw_sample(r, rng, tokens, i < plain, &d);
        int64_t at = i < plain ? i : d.teacher ? low++ : --high;
        draws[at] = d, time[at] = d.t[0], guidance[at] = d.guidance, student[at] = SC_STUDENT;
    }
    /* Step 5: noisy input. */
    sc__flux_model self = {.flux = flux, .params = params, .batch = b};
    sc_model model = {sc__flux_model_velocity, &self};
    sc_tensor *x0 = sc_from(t, 3, shape, b->x0), *noise = sc_from(t, 3, shape, b->noise);
    sc_tensor *x = sc_noisy(t, draws, x0, noise), *target = sc_new(t, 3, shape);
    if (!x || !target || !sc__upload_text(&self, t, draws)) return false;
    /* Step 6: target. */
    bool ok = r->distil_guidance ? sc__guidance_target(&self, t, time, guidance, x, target)
                                 : !plain || sc__flow_matching_target(t, x0, noise, plain, target);
    if (!ok || (plain < n && !sc_scfm_target(&model, t, draws, plain, x, target))) return false;
    /* Step 7: the student's answer, and the way back. */
    sc_tape_record(t, true);
    sc_tensor *v = sc__flux_model_velocity(&self, t, x, 0, student, time, guidance);
    ok = sc_mse(t, v, target, 1.f, &params->results[0]) && sc_backward(t);
    sc_tape_record(t, false);
    sc_tape_use(t, NULL);
    return ok;
}

/* ==== Files ==================================================================================
 *
 * Whole files in and out, JSON (RFC 8259) and safetensors. A safetensors file is an 8-byte
 * little-endian length, a JSON header of that length that gives each tensor's type, shape and
 * place, then the data without gaps. It is mapped, not read: opening 24 GB touches the header only.
 * Nothing that comes from a file is trusted: every length, offset and shape is checked first.
 */

static char *sc__join(const char *folder, const char *name) {
    size_t n = strlen(folder) + strlen(name) + 2;
    char *path = (char *)sc__alloc(n, 1);
    if (path) snprintf(path, n, "%s/%s", folder, name);
    return path;
}

static bool sc__exists(const char *path) {
    struct stat s;
    return stat(path, &s) == 0;
}

static bool sc__is_file(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISREG(s.st_mode);
}

static bool sc__is_folder(const char *path) {
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

/* `made`: it was not there before. */
static bool sc__make_folder(const char *path, bool *made) {
    *made = !mkdir(path, 0777);
    return *made || errno == EEXIST || sc__fail("%s: %s", path, strerror(errno));
}

/* The size of a regular file that can be read; -1 with the error set. Asking before opening keeps
 * a pipe from blocking. */
static int64_t sc__file_size(const char *path) {
    struct stat s;
    if (stat(path, &s)) sc__fail("%s: %s", path, strerror(errno));
    else if (S_ISDIR(s.st_mode)) sc__fail("%s: is a folder; a file was expected", path);
    else if (!S_ISREG(s.st_mode)) sc__fail("%s: not a regular file", path);
    else return (int64_t)s.st_size;
    return -1;
}

/* The bytes of a regular file of at most 1 GiB, with a NUL behind them. */
static char *sc__read_file(const char *path, size_t *length) {
    int64_t size = sc__file_size(path);
    if (size < 0) return NULL;
    if (size > (int64_t)1 << 30) return sc__fail("%s: larger than 1 GiB", path), NULL;
    char *data = (char *)sc__alloc((size_t)size + 1, 1);
    FILE *f = data ? fopen(path, "rb") : NULL;
    if (f) *length = fread(data, 1, (size_t)size, f);
    if (data && (!f || ferror(f))) {
        sc__fail("%s: %s", path, strerror(errno));
        SC_FREE(data);
        data = NULL;
    }
    if (f) fclose(f);
    return data;
}

/* Writing: beside `path`, or beside what that links to, into a file that takes its place and its
 * mode when all of it is on disk, and is locked until then: one that is not locked was left by a
 * process that was killed. A device or a pipe is written as it is. */
typedef struct sc__writer { FILE *file; const char *path; char target[2 * PATH_MAX],
                            temporary[2 * PATH_MAX + 16]; } sc__writer; /* "": none */

static bool sc__write_fail(const char *path) {
    return sc__fail("%s: cannot write: %s", path, strerror(errno));
}

static bool sc__write_begin(sc__writer *w, const char *path) {
    struct stat there, mine;
    char link[PATH_MAX];
    bool old = !stat(path, &there), direct = old && !S_ISREG(there.st_mode);
    *w = (sc__writer){.path = path};
    if (old && !(there.st_mode & 0222)) return sc__fail("%s: cannot write: read-only", path);
    if (old ? access(path, W_OK) : errno != ENOENT) return sc__write_fail(path);
    snprintf(w->target, sizeof w->target, "%s", path);
    for (ssize_t n; (n = readlink(w->target, link, sizeof link - 1)) > 0;) {
        char *slash = *link == '/' ? NULL : strrchr(w->target, '/');
        snprintf(slash ? slash + 1 : w->target, sizeof link, "%.*s", (int)n, link);
    }
    if (!direct) snprintf(w->temporary, sizeof w->temporary, "%s.tmp-shortcut", w->target);
    w->file = fopen(direct ? path : w->temporary, direct ? "wb" : "ab");
    if (!w->file || direct) return w->file || sc__write_fail(path);
    int fd = fileno(w->file);
    if (old) fchmod(fd, there.st_mode & 0777);
    if ((!flock(fd, LOCK_EX | LOCK_NB) || errno != EWOULDBLOCK) && !fstat(fd, &mine) &&
        !lstat(w->temporary, &there) && mine.st_ino == there.st_ino && !ftruncate(fd, 0))
        return true; /* another inode: it was put in place meanwhile */
    return fclose(w->file), sc__fail("%s: cannot write: another process is writing it", path);
}

static bool sc__write_bytes(sc__writer *w, const void *data, size_t n) {
    return n == 0 || fwrite(data, 1, n, w->file) == n || sc__write_fail(w->path);
}

/* Ends what sc__write_begin began; with `ok` false (error already set) nothing remains of it. */
static bool sc__write_end(sc__writer *w, bool ok) {
    if (ok && (fflush(w->file) || (*w->temporary && (fsync(fileno(w->file)) ||
                                                     rename(w->temporary, w->target)))))
        ok = sc__write_fail(w->path);
    if (!ok && *w->temporary) remove(w->temporary); /* before the lock goes */
    return (!fclose(w->file) || !ok || sc__write_fail(w->path)) && ok;
}

static bool sc__write_file(const char *path, const void *data, size_t n) {
    sc__writer w;
    return sc__write_begin(&w, path) && sc__write_end(&w, sc__write_bytes(&w, data, n));
}

/* ---- UTF-8 ---- */

/* Bytes of the character at s, 1 to 4; 0: not UTF-8 (cut off, overlong, a surrogate, too large).
 * The text ends in NUL, which is no continuation byte, so this never looks behind it. */
static int sc__utf8_size(const char *text) {
    const unsigned char *s = (const unsigned char *)text;
    int n = *s < 0x80 ? 1 : *s < 0xc2 ? 0 : *s < 0xe0 ? 2 : *s < 0xf0 ? 3 : *s < 0xf5 ? 4 : 0;
    for (int i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    int two = n > 2 ? s[0] << 8 | s[1] : 0;
    if (n == 3 && (two < 0xe0a0 || (two >= 0xeda0 && two < 0xee00))) return 0;
    if (n == 4 && (two < 0xf090 || two >= 0xf490)) return 0;
    return n;
}

static int sc__utf8_encode(uint32_t c, char *out) {
    int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 63));
    out[0] = (char)((n > 1 ? 0xf00 >> n & 0xff : 0) | c);
    return n;
}

/* ---- JSON ----
 *
 * A parse works on its own copy of the text, which lies behind the root: strings are unescaped in
 * place (they never grow). Items of a container are one array of values; an object's array is
 * followed by pointers to its items in the order of their keys, for binary search.
 */

typedef enum { SC__NULL, SC__BOOL, SC__NUMBER, SC__STRING, SC__ARRAY, SC__OBJECT } sc__json_type;

struct sc_json {
    const char *key;            /* of an object's item */
    sc__json_type type;
    int32_t count;              /* array, object */
    union {
        double number;          /* bool: 0 or 1 */
        const char *string;
        sc_json *items;
    } u;
};

typedef struct sc__json_parser {
    const char *name;
    char *at, *end;             /* *end is NUL */
    int64_t line;
    int depth;
} sc__json_parser;

static bool sc__json_fail(const sc__json_parser *p, const char *what) {
    return sc__fail("%s:%lld: %s", p->name, (long long)p->line, what);
}

/* The next character that is no white space. */
static char sc__json_peek(sc__json_parser *p) {
    for (; *p->at == ' ' || *p->at == '\n' || *p->at == '\t' || *p->at == '\r'; p->at++)
        p->line += *p->at == '\n';
    return *p->at;
}

static bool sc__json_take(sc__json_parser *p, char c) {
    bool there = sc__json_peek(p) == c;
    p->at += there;
    return there;
}

static bool sc__json_hex(const char *digits, uint32_t *value) {
    *value = 0;
    for (int i = 0; i < 4; i++) {
        char c = digits[i];
        if (!isxdigit((unsigned char)c)) return false;
        *value = *value << 4 | (uint32_t)(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    }
    return true;
}

/* One escape. Characters above 0xffff are two \u; a lone half, or NUL, becomes U+FFFD. */
static bool sc__json_escape(sc__json_parser *p, char **to) {
    static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
    const char *kind = p->at[1] ? strchr(from, p->at[1]) : NULL;
    uint32_t c, low;
    if (kind) *(*to)++ = into[kind - from];
    p->at += 2;
    if (kind) return true;
    if (p->at[-1] != 'u') return sc__json_fail(p, "unknown escape in a string");
    if (!sc__json_hex(p->at, &c)) return sc__json_fail(p, "\\u needs four hexadecimal digits");
    p->at += 4;
    if (c >> 10 == 0xd800 >> 10 && p->at[0] == '\\' && p->at[1] == 'u' &&
        sc__json_hex(p->at + 2, &low) && low >> 10 == 0xdc00 >> 10) {
        c = 0x10000 + ((c & 0x3ff) << 10 | (low & 0x3ff));
        p->at += 6;
    }
    *to += sc__utf8_encode(c == 0 || c >> 11 == 0xd800 >> 11 ? 0xfffd : c, *to);
    return true;
}

static bool sc__json_string(sc__json_parser *p, const char **string) {
    char *to = ++p->at;
    *string = to;
    while (*p->at != '"') {
        int size = sc__utf8_size(p->at);
        if (p->at == p->end) return sc__json_fail(p, "string without an end");
        if ((unsigned char)*p->at < 0x20) return sc__json_fail(p, "control character in a string");
        if (!size) return sc__json_fail(p, "string is not UTF-8");
        if (*p->at != '\\') while (size--) *to++ = *p->at++;
        else if (!sc__json_escape(p, &to)) return false;
    }
    *to = 0;
    p->at++;
    return true;
}

/* strtod gets the digits as a whole number and an exponent: its decimal point is the locale's. */
static bool sc__json_number(sc__json_parser *p, double *value) {
    static const char digits[] = "0123456789";
    char text[512];
    const char *sign = *p->at == '-' ? "-" : "", *whole, *fraction, *exponent = "0";
    size_t whole_count, fraction_count = 0, exponent_count = 1;
    p->at += *p->at == '-';
    whole = fraction = p->at;
    p->at += whole_count = strspn(p->at, digits);
    bool ok = whole_count == 1 || (whole_count && *whole != '0');
    if (*p->at == '.') {
        fraction = ++p->at;
        p->at += fraction_count = strspn(p->at, digits);
        ok = ok && fraction_count;
    }
    if (*p->at == 'e' || *p->at == 'E') {
        exponent = ++p->at;
        p->at += *p->at == '-' || *p->at == '+';
        p->at += exponent_count = strspn(p->at, digits);
    }
    if (!ok || !exponent_count) return sc__json_fail(p, "malformed number");
    if (whole_count + fraction_count > 480 || exponent_count > 9)
        return sc__json_fail(p, "number with too many digits");
    snprintf(text, sizeof text, "%s%.*s%.*se%ld", sign, (int)whole_count, whole,
             (int)fraction_count, fraction, strtol(exponent, NULL, 10) - (long)fraction_count);
    *value = strtod(text, NULL);
    return isfinite(*value) || sc__json_fail(p, "number out of range");
}

static bool sc__json_read(sc__json_parser *p, sc_json *v);

static sc_json *sc__json_push(sc_json *v) {
    sc_json *items = (sc_json *)sc__grow(v->u.items, v->count, sizeof *items);
    if (!items) return NULL;
    v->u.items = items;
    v->u.items[v->count] = (sc_json){0};
    return &v->u.items[v->count++];
}

static int sc__json_by_key(const void *a, const void *b) {
    const sc_json *x = *(const sc_json *const *)a, *y = *(const sc_json *const *)b;
    int order = strcmp(x->key, y->key);
    return order ? order : (x > y) - (x < y);
}

static bool sc__json_sort(sc_json *v) {
    size_t n = (size_t)v->count;
    sc_json *items = (sc_json *)SC_REALLOC(v->u.items, n * (sizeof *items + sizeof(sc_json *)));
    if (!items) return sc__fail("out of memory (%zu JSON values)", n);
    const sc_json **sorted = (const sc_json **)(items + n);
    for (size_t i = 0; i < n; i++) sorted[i] = &items[i];
    qsort(sorted, n, sizeof *sorted, sc__json_by_key);
    v->u.items = items;
    return true;
}

/* Key and value of an object's next item, or the value of an array's. */
static bool sc__json_item(sc__json_parser *p, sc_json *v) {
    sc_json *item = sc__json_push(v);
    if (!item) return false;
    if (v->type == SC__OBJECT) {
        if (sc__json_peek(p) != '"') return sc__json_fail(p, "expected a key in quotes");
        if (!sc__json_string(p, &item->key)) return false;
        if (!sc__json_take(p, ':')) return sc__json_fail(p, "expected ':' behind a key");
    }
    return sc__json_read(p, item);
}

static bool sc__json_items(sc__json_parser *p, sc_json *v) {
    bool object = *p->at++ == '{';
    char close = object ? '}' : ']';
    v->type = object ? SC__OBJECT : SC__ARRAY;
    if (++p->depth > 64) return sc__json_fail(p, "nested deeper than 64");
    if (!sc__json_take(p, close)) {
        do if (!sc__json_item(p, v)) return false;
        while (sc__json_take(p, ','));
        if (!sc__json_take(p, close))
            return sc__json_fail(p, object ? "expected ',' or '}'" : "expected ',' or ']'");
    }
    p->depth--;
    return !object || !v->count || sc__json_sort(v);
}

/* What fails stays in the tree, for whoever frees the root. */
static bool sc__json_read(sc__json_parser *p, sc_json *v) {
    static const struct { const char *word; sc__json_type type; double number; } words[] = {
        {"null", SC__NULL, 0}, {"false", SC__BOOL, 0}, {"true", SC__BOOL, 1}};
    char c = sc__json_peek(p);
    if (c == '{' || c == '[') return sc__json_items(p, v);
    if (c == '"') return v->type = SC__STRING, sc__json_string(p, &v->u.string);
    if (c == '-' || isdigit((unsigned char)c))
        return v->type = SC__NUMBER, sc__json_number(p, &v->u.number);
    for (int i = 0; i < 3; i++)
        if (!strncmp(p->at, words[i].word, strlen(words[i].word))) {
            p->at += strlen(words[i].word);
            v->type = words[i].type;
            v->u.number = words[i].number;
            return true;
        }
    return sc__json_fail(p, "expected a value");
}

static void sc__json_clear(sc_json *v) {
    if (v->type < SC__ARRAY) return;
    for (int32_t i = 0; i < v->count; i++) sc__json_clear(&v->u.items[i]);
    SC_FREE(v->u.items);
}

void sc_json_free(sc_json *root) {
    if (root) sc__json_clear(root);
    SC_FREE(root);
}

sc_json *sc_json_parse(const char *text, size_t length, const char *name) {
    if (length > (size_t)1 << 30) return sc__fail("%s: more than 1 GiB of JSON", name), NULL;
    sc_json *root = (sc_json *)sc__alloc(1, sizeof *root + length + 1);
    if (!root) return NULL;
    char *copy = (char *)(root + 1);
    if (length) memcpy(copy, text, length);
    sc__json_parser p = {.name = name, .at = copy, .end = copy + length, .line = 1};
    if (sc__json_read(&p, root)) {
        sc__json_peek(&p);
        if (p.at == p.end) return root;
        sc__json_fail(&p, "unexpected text behind the value");
    }
    sc_json_free(root);
    return NULL;
}

sc_json *sc_json_load(const char *path) {
    size_t length = 0;
    char *text = sc__read_file(path, &length);
    sc_json *root = text ? sc_json_parse(text, length, path) : NULL;
    SC_FREE(text);
    return root;
}

static bool sc__json_is(const sc_json *v, sc__json_type type) { return v && v->type == type; }

/* The last of equal keys counts. */
const sc_json *sc_json_get(const sc_json *object, const char *key) {
    if (!sc__json_is(object, SC__OBJECT) || !object->count) return NULL;
    sc_json *const *sorted = (sc_json *const *)(object->u.items + object->count);
    int32_t low = 0, high = object->count; /* `low` ends at the first key above `key` */
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (strcmp(sorted[middle]->key, key) <= 0) low = middle + 1;
        else high = middle;
    }
    return low && !strcmp(sorted[low - 1]->key, key) ? sorted[low - 1] : NULL;
}

static const sc_json *sc__json_nth(const sc_json *v, sc__json_type type, int64_t i) {
    return sc__json_is(v, type) && i >= 0 && i < v->count ? &v->u.items[i] : NULL;
}

int64_t sc_json_length(const sc_json *v) { return v ? v->count : 0; }
const sc_json *sc_json_at(const sc_json *v, int64_t i) { return sc__json_nth(v, SC__ARRAY, i); }
const sc_json *sc_json_value(const sc_json *v, int64_t i) { return sc__json_nth(v, SC__OBJECT, i); }
const char *sc_json_key(const sc_json *v, int64_t i) {
    const sc_json *item = sc_json_value(v, i);
    return item ? item->key : NULL;
}
const char *sc_json_string(const sc_json *v, const char *fallback) {
    return sc__json_is(v, SC__STRING) ? v->u.string : fallback;
}
double sc_json_number(const sc_json *v, double fallback) {
    return sc__json_is(v, SC__NUMBER) ? v->u.number : fallback;
}
bool sc_json_bool(const sc_json *v, bool fallback) {
    return sc__json_is(v, SC__BOOL) ? v->u.number != 0 : fallback;
}

/* ---- Reading safetensors ---- */

/* One mapped file. Names of tensors point into its header. */
typedef struct sc__mapping {
    const char *shard;
    void *data;
    size_t size;
    sc_json *header;
} sc__mapping;
typedef struct sc__entry {
    const char *name;
    sc_tensor tensor;
    uint64_t begin, end;
    bool used;                  /* something asked for it */
} sc__entry;

struct sc_file {
    char *path;
    sc_json *index;             /* of shards, or NULL */
    sc__mapping *parts;
    int64_t part_count;
    sc__entry *entries;         /* sorted by name */
    int64_t count;
};

static int sc__by_name(const void *a, const void *b) {
    return strcmp(((const sc__entry *)a)->name, ((const sc__entry *)b)->name);
}
static int sc__by_place(const void *a, const void *b) {
    const sc__entry *x = (const sc__entry *)a, *y = (const sc__entry *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end); /* empty ones first */
}

void sc_file_close(sc_file *f) {
    if (!f) return;
    for (int64_t i = 0; i < f->part_count; i++) {
        munmap(f->parts[i].data, f->parts[i].size);
        sc_json_free(f->parts[i].header);
    }
    sc_json_free(f->index);
    SC_FREE(f->parts);
    SC_FREE(f->entries);
    SC_FREE(f->path);
    SC_FREE(f);
}

static bool sc__whole_number(const sc_json *v, uint64_t *n) {
    double x = sc_json_number(v, -1);
    if (!(x >= 0 && x <= 0x1p53 && x == floor(x))) return false;
    *n = (uint64_t)x;
    return true;
}

/* "[3,64,64]", for messages and headers. */
static const char *sc__shape_text(const sc_tensor *x, char text[96]) {
    int n = snprintf(text, 96, "[");
    for (int i = 0; i < x->ndim; i++)
        n += snprintf(text + n, (size_t)(96 - n), "%s%lld", i ? "," : "", (long long)x->shape[i]);
    snprintf(text + n, (size_t)(96 - n), "]");
    return text;
}

/* shape -> tensor, and the bytes it takes. Sides of 0 do not excuse absurd ones beside them. */
static bool sc__read_shape(sc_tensor *x, const sc_json *shape, uint64_t *bytes) {
    uint64_t side, product = (uint64_t)sc_dtype_size(x->dtype);
    bool empty = false;
    if (!sc__json_is(shape, SC__ARRAY) || shape->count > SC_MAX_DIMS) return false;
    for (x->ndim = 0; x->ndim < shape->count; x->ndim++) {
        if (!sc__whole_number(&shape->u.items[x->ndim], &side)) return false;
        x->shape[x->ndim] = (int64_t)side;
        if (side == 0) empty = true;
        else if (product > ((uint64_t)1 << 62) / side) return false;
        else product *= side;
    }
    *bytes = empty ? 0 : product;
    return true;
}

/* One tensor of a header: type, shape and place in the `size` bytes of data. */
static bool sc__read_entry(sc__entry *e, const char *path, const sc_json *v, char *data,
                           uint64_t size) {
    const char *dtype = sc_json_string(sc_json_get(v, "dtype"), "?");
    const sc_json *offsets = sc_json_get(v, "data_offsets");
    uint64_t bytes;
    int type = SC_U8;
    while (type >= 0 && strcmp(dtype, sc__dtypes[type].name)) type--;
    if (type < 0)
        return sc__fail("%s: tensor '%s' has type '%s'; only F32, BF16, F16, F8_E4M3, F64, "
                        "I64, I32 and U8 can be read", path, v->key, dtype);
    *e = (sc__entry){.name = v->key, .tensor = {.dtype = (sc_dtype)type}};
    if (!sc__read_shape(&e->tensor, sc_json_get(v, "shape"), &bytes))
        return sc__fail("%s: the shape of tensor '%s' must be at most %d whole numbers of a "
                        "possible size", path, v->key, SC_MAX_DIMS);
    if (sc_json_length(offsets) != 2 || !sc__whole_number(sc_json_at(offsets, 0), &e->begin) ||
        !sc__whole_number(sc_json_at(offsets, 1), &e->end) || e->begin > e->end)
        return sc__fail("%s: data_offsets of tensor '%s' must be [begin, end]", path, v->key);
    if (e->end > size)
        return sc__fail("%s: tensor '%s' ends at byte %llu of the data, the file at %llu: is it "
                        "truncated?", path, v->key, (unsigned long long)e->end,
                        (unsigned long long)size);
    if (e->end - e->begin != bytes)
        return sc__fail("%s: tensor '%s' has %llu bytes; its type and shape need %llu", path,
                        v->key, (unsigned long long)(e->end - e->begin), (unsigned long long)bytes);
    e->tensor.data = data + e->begin;
    if (bytes && (uintptr_t)e->tensor.data % (uintptr_t)sc_dtype_size(e->tensor.dtype))
        return sc__fail("%s: tensor '%s' is misaligned for its type %s; load and save the file "
                        "again with the safetensors library", path, v->key, dtype);
    return true;
}

/* The format has each byte of the data belong to exactly one tensor. */
static bool sc__check_places(const char *path, sc__entry *e, int64_t count, uint64_t size) {
    uint64_t at = 0;
    if (count) qsort(e, (size_t)count, sizeof *e, sc__by_place);
    for (int64_t i = 0; i < count; at = e[i++].end)
        if (e[i].begin != at)
            return sc__fail("%s: tensor '%s' %s", path, e[i].name,
                            e[i].begin < at ? "overlaps another" : "leaves a hole before it");
    return at == size || sc__fail("%s: %llu bytes behind the last tensor belong to none", path,
                                  (unsigned long long)(size - at));
}

/* Parses the header of a part; its length goes to `length`. */
static bool sc__read_header(sc__mapping *part, const char *path, uint64_t *length) {
    const unsigned char *bytes = (const unsigned char *)part->data;
    if (part->size < 8) return sc__fail("%s: too short for a safetensors file", path);
    *length = 0;
    for (int i = 7; i >= 0; i--) *length = *length << 8 | bytes[i];
    if (*length > 100000000)
        return sc__fail("%s: not a safetensors file (its header would have %llu bytes)", path,
                        (unsigned long long)*length);
    if (*length > part->size - 8)
        return sc__fail("%s: the header has %llu bytes, the file %zu: is it truncated?", path,
                        (unsigned long long)*length, part->size);
    part->header = sc_json_parse((const char *)bytes + 8, (size_t)*length, path);
    if (!part->header) return false;
    if (part->header->type == SC__OBJECT) return true;
    return sc__fail("%s: the header is not a JSON object", path);
}

/* Appends the tensors of one part: all, or those that the index (its weight_map) places there. */
static bool sc__read_part(sc_file *f, sc__mapping *part, const char *path, const sc_json *map) {
    uint64_t length = 0;
    if (!sc__read_header(part, path, &length)) return false;
    char *data = (char *)part->data + 8 + length;
    uint64_t size = part->size - 8 - length;
    size_t room = (size_t)f->count + (size_t)part->header->count + 1;
    sc__entry *e = (sc__entry *)SC_REALLOC(f->entries, room * sizeof *e);
    if (!e) return sc__fail("%s: out of memory for %zu tensors", path, room);
    f->entries = e;
    int64_t first = f->count, end = first;
    for (int32_t i = 0; i < part->header->count; i++) {
        const sc_json *item = &part->header->u.items[i];
        if (!strcmp(item->key, "__metadata__")) continue;
        if (!sc__read_entry(&e[end++], path, item, data, size)) return false;
    }
    if (!sc__check_places(path, e + first, end - first, size)) return false;
    for (int64_t i = first; i < end; i++)
        if (!map || !strcmp(sc_json_string(sc_json_get(map, e[i].name), ""), part->shard))
            e[f->count++] = e[i];
    return true;
}

static bool sc__map_part(sc_file *f, const char *path, const sc_json *map, const char *shard) {
    int64_t size = sc__file_size(path);
    if (size < 0) return false;
    if (size == 0) return sc__fail("%s: the file is empty", path); /* and could not be mapped */
    size_t room = (size_t)f->part_count + 1;
    sc__mapping *parts = (sc__mapping *)SC_REALLOC(f->parts, room * sizeof *parts);
    if (!parts) return sc__fail("%s: out of memory", path);
    f->parts = parts;
    int descriptor = open(path, O_RDONLY);
    if (descriptor < 0) return sc__fail("%s: %s", path, strerror(errno));
    void *data = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    close(descriptor);
    if (data == MAP_FAILED) return sc__fail("%s: cannot map: %s", path, strerror(errno));
    parts[f->part_count] = (sc__mapping){shard, data, (size_t)size, NULL};
    return sc__read_part(f, &parts[f->part_count++], path, map);
}

/* NAME.safetensors.index.json: {"weight_map": {tensor: shard}}; the shards lie beside it. */
static bool sc__map_shards(sc_file *f, const char *path) {
    f->index = sc_json_load(path);
    const sc_json *map = sc_json_get(f->index, "weight_map");
    const char *slash = strrchr(path, '/');
    if (!f->index) return false;
    if (!sc__json_is(map, SC__OBJECT)) return sc__fail("%s: no weight_map", path);
    char *folder = sc__strdup(slash ? path : ".");
    if (!folder) return false;
    if (slash) folder[slash - path] = 0;
    bool ok = true;
    for (int32_t i = 0; ok && i < map->count; i++) {
        const char *shard = sc_json_string(&map->u.items[i], "");
        int64_t known = 0;
        while (known < f->part_count && strcmp(f->parts[known].shard, shard)) known++;
        if (known < f->part_count) continue;
        bool plain = *shard && !strchr(shard, '/'); /* never a file outside the folder */
        char *full = plain ? sc__join(folder, shard) : NULL;
        if (!plain) sc__fail("%s: shard '%s' is not a plain file name", path, shard);
        ok = full && sc__map_part(f, full, map, shard);
        SC_FREE(full);
    }
    SC_FREE(folder);
    return ok;
}

/* Sorts by name; no name may stand twice, and none of the index be missing. */
static bool sc__sort_entries(sc_file *f) {
    const sc_json *map = sc_json_get(f->index, "weight_map");
    if (f->count) qsort(f->entries, (size_t)f->count, sizeof *f->entries, sc__by_name);
    for (int64_t i = 1; i < f->count; i++)
        if (!sc__by_name(&f->entries[i - 1], &f->entries[i]))
            return sc__fail("%s: tensor '%s' stands there twice", f->path, f->entries[i].name);
    for (int64_t i = 0; i < sc_json_length(map); i++) {
        const char *name = sc_json_key(map, i);
        const char *shard = sc_json_string(sc_json_get(map, name), "?");
        if (!sc_file_find(f, name))
            return sc__fail("%s: tensor '%s' is not in its shard '%s'", f->path, name, shard);
    }
    return true;
}

/* `pattern`: a name, or "*" and the end of one. */
static bool sc__matches(const char *name, const char *pattern) {
    size_t n = strlen(name), m = strlen(pattern + 1);
    if (*pattern != '*') return !strcmp(name, pattern);
    return n >= m && !strcmp(name + n - m, pattern + 1);
}

/* The path of a folder's weights: an index of shards, else a usual name, else the only file. */
static char *sc__weights_in(const char *folder) {
    enum { PATTERNS = 5 };
    static const char *const patterns[PATTERNS] = {"*.safetensors.index.json",
        "diffusion_pytorch_model.safetensors", "model.safetensors", "*.safetensors", "*.sft"};
    DIR *list = opendir(folder);
    char *found = NULL;
    int best = PATTERNS;
    bool several = false;
    if (!list) return sc__fail("%s: %s", folder, strerror(errno)), NULL;
    for (struct dirent *entry; (entry = readdir(list));) {
        const char *name = entry->d_name;
        int rank = 0;
        while (rank < PATTERNS && !sc__matches(name, patterns[rank])) rank++;
        if (rank == PATTERNS || rank > best || *name == '.') continue;
        several = rank == best;
        best = rank;
        SC_FREE(found);
        found = sc__join(folder, name);
    }
    closedir(list);
    if (best == PATTERNS)
        sc__fail("%s: no weights here; expected diffusion_pytorch_model.safetensors, "
                 "model.safetensors, or an .index.json of shards", folder);
    if (!several) return found;
    SC_FREE(found);
    return sc__fail("%s: several %s here and no .index.json of shards: give the path of one",
                    folder, patterns[best]), NULL;
}

sc_file *sc_file_open(const char *path) {
    sc_file *f = (sc_file *)sc__alloc(1, sizeof *f);
    if (!f) return NULL;
    f->path = sc__is_folder(path) ? sc__weights_in(path) : sc__strdup(path);
    bool ok = f->path && (sc__matches(f->path, "*.json") ? sc__map_shards(f, f->path)
                                                         : sc__map_part(f, f->path, NULL, NULL));
    if (ok && sc__sort_entries(f)) return f;
    sc_file_close(f);
    return NULL;
}

const char *sc_file_path(const sc_file *f) { return f->path; }
int64_t sc_file_count(const sc_file *f) { return f->count; }
const char *sc_file_name(const sc_file *f, int64_t i) { return f->entries[i].name; }
const sc_tensor *sc_file_tensor(const sc_file *f, int64_t i) { return &f->entries[i].tensor; }

static sc__entry *sc__find_entry(const sc_file *f, const char *name) {
    sc__entry key = {.name = name};
    if (!f->count) return NULL;
    return (sc__entry *)bsearch(&key, f->entries, (size_t)f->count, sizeof key, sc__by_name);
}

const sc_tensor *sc_file_find(const sc_file *f, const char *name) {
    const sc__entry *found = sc__find_entry(f, name);
    return found ? &found->tensor : NULL;
}

/* Of shards, the first that has the key speaks. */
const char *sc_file_metadata(const sc_file *f, const char *key) {
    const char *value = NULL;
    for (int64_t i = 0; !value && i < f->part_count; i++) {
        const sc_json *metadata = sc_json_get(f->parts[i].header, "__metadata__");
        value = sc_json_string(sc_json_get(metadata, key), NULL);
    }
    return value;
}

/* ---- Writing safetensors ---- */

/* Text that grows; running out of memory is noticed once, at its end. */
typedef struct sc__text { char *data; size_t length, capacity; bool failed; } sc__text;

static void sc__text_add(sc__text *t, const char *s, size_t n) {
    if (t->failed) return;
    if (t->length + n >= t->capacity) { /* even for nothing: `data` is never NULL afterwards */
        size_t capacity = 2 * (t->length + n) + 256;
        char *data = (char *)SC_REALLOC(t->data, capacity);
        if (!data) { t->failed = true; return; }
        t->data = data, t->capacity = capacity;
    }
    memcpy(t->data + t->length, s, n);
    t->length += n;
}

/* `s` as a JSON string; bytes that are not UTF-8 become U+FFFD. */
static void sc__text_quote(sc__text *t, const char *s) {
    sc__text_add(t, "\"", 1);
    for (int size; *s; s += size ? size : 1) {
        char code[8];
        size = sc__utf8_size(s);
        if (!size || (unsigned char)*s < 0x20) {
            snprintf(code, sizeof code, "\\u%04x", size ? (unsigned)*s : 0xfffdu);
            sc__text_add(t, code, 6);
            continue;
        }
        if (*s == '"' || *s == '\\') sc__text_add(t, "\\", 1);
        sc__text_add(t, s, (size_t)size);
    }
    sc__text_add(t, "\"", 1);
}

static void sc__header_text(sc__text *t, const sc_named *x, int64_t count,
                            const char *const *metadata) {
    static const char format[] = ":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%llu,%llu]}";
    char shape[96], line[256];
    uint64_t at = 0, end;
    sc__text_add(t, "\0\0\0\0\0\0\0\0{\"__metadata__\":{", 8 + 17); /* first its length */
    for (int i = 0; metadata && metadata[i]; i += 2) {
        if (i) sc__text_add(t, ",", 1);
        sc__text_quote(t, metadata[i]);
        sc__text_add(t, ":", 1);
        sc__text_quote(t, metadata[i + 1]);
    }
    sc__text_add(t, "}", 1);
    for (int64_t i = 0; i < count; i++, at = end) {
        end = at + (uint64_t)sc_count(x[i].tensor) * (uint64_t)sc_dtype_size(x[i].dtype);
        sc__text_add(t, ",", 1);
        sc__text_quote(t, x[i].name);
        int n = snprintf(line, sizeof line, format, sc_dtype_name(x[i].dtype),
                         sc__shape_text(x[i].tensor, shape), (unsigned long long)at,
                         (unsigned long long)end);
        sc__text_add(t, line, (size_t)n);
    }
    sc__text_add(t, "}", 1);
    while (t->length % 64 && !t->failed) sc__text_add(t, " ", 1); /* data at n * 64 */
    for (int i = 0; i < 8 && !t->failed; i++) t->data[i] = (char)((t->length - 8) >> (8 * i));
}

/* The data of one tensor as its `dtype`; f32 is rounded to bf16 or f16 in slices. */
static bool sc__write_tensor(sc__writer *w, const sc_named *x) {
    enum { SLICE = 4096 };
    uint16_t half[SLICE];
    const float *values = (const float *)x->tensor->data;
    int64_t n = sc_count(x->tensor);
    if (x->dtype == x->tensor->dtype)
        return sc__write_bytes(w, values, (size_t)n * (size_t)sc_dtype_size(x->dtype));
    if (x->tensor->dtype != SC_F32 || (x->dtype != SC_BF16 && x->dtype != SC_F16))
        return sc__fail("%s: cannot write '%s' of type %s as %s", w->path, x->name,
                        sc_dtype_name(x->tensor->dtype), sc_dtype_name(x->dtype));
    for (int64_t i = 0, size; i < n; i += size) {
        size = n - i < SLICE ? n - i : SLICE;
        for (int64_t j = 0; j < size; j++)
            half[j] = (x->dtype == SC_BF16 ? sc__f32_to_bf16 : sc__f32_to_f16)(values[i + j]);
        if (!sc__write_bytes(w, half, (size_t)size * 2)) return false;
    }
    return true;
}

/* Makes a tensor's values when their turn has come, in memory that is freed afterwards. */
typedef bool (*sc__fill)(const void *user, const sc_named *x, sc_tensor *host);

/* Wider types go first, so that each tensor is aligned to its type; else the given order stays.
 * metadata: key, value, key, value, ..., NULL; or NULL. fill NULL: the values are on the host. */
static bool sc__save(const char *path, const sc_named *tensors, int64_t count,
                     const char *const *metadata, sc__fill fill, const void *user) {
    sc_named *sorted = (sc_named *)sc__alloc((size_t)count, sizeof *sorted);
    sc__text header = {0};
    sc__writer w;
    int64_t n = 0;
    if (!sorted) return false;
    for (int size = 8; size > 0; size /= 2)
        for (int64_t i = 0; i < count; i++)
            if (sc_dtype_size(tensors[i].dtype) == size) sorted[n++] = tensors[i];
    sc__header_text(&header, sorted, count, metadata);
    bool ok = (!header.failed || sc__fail("%s: out of memory", path)) && sc__write_begin(&w, path);
    if (ok) {
        ok = sc__write_bytes(&w, header.data, header.length);
        for (int64_t i = 0; ok && i < count; i++) {
            sc_tensor host = *sorted[i].tensor;
            sc_named x = {sorted[i].name, &host, sorted[i].dtype};
            ok = (!fill || fill(user, &sorted[i], &host)) && sc__write_tensor(&w, &x);
            if (fill) SC_FREE(host.data);
        }
        ok = sc__write_end(&w, ok);
    }
    SC_FREE(header.data);
    SC_FREE(sorted);
    return ok;
}

bool sc_file_save(const char *path, const sc_named *tensors, int64_t count,
                  const char *const *metadata) {
    return sc__save(path, tensors, count, metadata, NULL, NULL);
}

/* ==== Names ===================================================================================
 *
 * In this header a weight has the name that diffusers (transformer, VAE) or transformers (text
 * encoders) gives it. Black Forest Labs' own files, ComfyUI's and the LoRA trainers' hold the same
 * numbers under other names, some of them as rows of a larger matrix. This table says which and
 * where; weights and LoRA factors alike are found through it, so a layout is data here, not code.
 *
 * Easy to get wrong: BFL's last modulation has (shift, scale), norm_out (scale, shift): its rows
 * swap halves; of a LoRA these are B's rows, never A's. The VAE's decoder counts levels backwards.
 */

/* `name` is `parts` of the `whole` equal parts that the rows of `other` fall into, from part
 * `first` on (whole 0: they are the same). In both, * stands for one word between dots, and ~ for a
 * level of the VAE, counted from the other end in `other`; what follows the name is kept. */
typedef struct sc__alias {
    const char *name, *other;
    int first, parts, whole;
    bool swapped;               /* the two halves of the rows are exchanged */
} sc__alias;

#define SC__SAME(name, other) {name, other, 0, 0, 0, false}
static const sc__alias sc__same_name = SC__SAME("", "");

static const sc__alias sc__aliases[] = {
    /* The transformer: flux1-dev.safetensors. */
    SC__SAME("x_embedder", "img_in"),
    SC__SAME("context_embedder", "txt_in"),
    SC__SAME("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    SC__SAME("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    SC__SAME("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    SC__SAME("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    SC__SAME("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    SC__SAME("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    SC__SAME("transformer_blocks.*.norm1.linear", "double_blocks.*.img_mod.lin"),
    {"transformer_blocks.*.attn.to_q", "double_blocks.*.img_attn.qkv", 0, 1, 3, false},
    {"transformer_blocks.*.attn.to_k", "double_blocks.*.img_attn.qkv", 1, 1, 3, false},
    {"transformer_blocks.*.attn.to_v", "double_blocks.*.img_attn.qkv", 2, 1, 3, false},
    SC__SAME("transformer_blocks.*.attn.norm_q.weight",
             "double_blocks.*.img_attn.norm.query_norm.scale"),
    SC__SAME("transformer_blocks.*.attn.norm_k.weight",
             "double_blocks.*.img_attn.norm.key_norm.scale"),
    SC__SAME("transformer_blocks.*.attn.to_out.0", "double_blocks.*.img_attn.proj"),
    SC__SAME("transformer_blocks.*.ff.net.0.proj", "double_blocks.*.img_mlp.0"),
    SC__SAME("transformer_blocks.*.ff.net.2", "double_blocks.*.img_mlp.2"),
    SC__SAME("transformer_blocks.*.norm1_context.linear", "double_blocks.*.txt_mod.lin"),
    {"transformer_blocks.*.attn.add_q_proj", "double_blocks.*.txt_attn.qkv", 0, 1, 3, false},
    {"transformer_blocks.*.attn.add_k_proj", "double_blocks.*.txt_attn.qkv", 1, 1, 3, false},
    {"transformer_blocks.*.attn.add_v_proj", "double_blocks.*.txt_attn.qkv", 2, 1, 3, false},
    SC__SAME("transformer_blocks.*.attn.norm_added_q.weight",
             "double_blocks.*.txt_attn.norm.query_norm.scale"),
    SC__SAME("transformer_blocks.*.attn.norm_added_k.weight",
             "double_blocks.*.txt_attn.norm.key_norm.scale"),
    SC__SAME("transformer_blocks.*.attn.to_add_out", "double_blocks.*.txt_attn.proj"),
    SC__SAME("transformer_blocks.*.ff_context.net.0.proj", "double_blocks.*.txt_mlp.0"),
    SC__SAME("transformer_blocks.*.ff_context.net.2", "double_blocks.*.txt_mlp.2"),
    SC__SAME("single_transformer_blocks.*.norm.linear", "single_blocks.*.modulation.lin"),
    {"single_transformer_blocks.*.attn.to_q", "single_blocks.*.linear1", 0, 1, 7, false},
    {"single_transformer_blocks.*.attn.to_k", "single_blocks.*.linear1", 1, 1, 7, false},
    {"single_transformer_blocks.*.attn.to_v", "single_blocks.*.linear1", 2, 1, 7, false},
    {"single_transformer_blocks.*.proj_mlp", "single_blocks.*.linear1", 3, 4, 7, false},
    SC__SAME("single_transformer_blocks.*.proj_out", "single_blocks.*.linear2"),
    SC__SAME("single_transformer_blocks.*.attn.norm_q.weight",
             "single_blocks.*.norm.query_norm.scale"),
    SC__SAME("single_transformer_blocks.*.attn.norm_k.weight",
             "single_blocks.*.norm.key_norm.scale"),
    {"norm_out.linear", "final_layer.adaLN_modulation.1", 0, 0, 0, true},
    SC__SAME("proj_out", "final_layer.linear"),
    /* LoRA files of XLabs: 1 is the picture's stream, 2 the text's. */
    {"transformer_blocks.*.attn.to_q", "double_blocks.*.processor.qkv_lora1", 0, 1, 3, false},
    {"transformer_blocks.*.attn.to_k", "double_blocks.*.processor.qkv_lora1", 1, 1, 3, false},
    {"transformer_blocks.*.attn.to_v", "double_blocks.*.processor.qkv_lora1", 2, 1, 3, false},
    SC__SAME("transformer_blocks.*.attn.to_out.0", "double_blocks.*.processor.proj_lora1"),
    {"transformer_blocks.*.attn.add_q_proj", "double_blocks.*.processor.qkv_lora2", 0, 1, 3, false},
    {"transformer_blocks.*.attn.add_k_proj", "double_blocks.*.processor.qkv_lora2", 1, 1, 3, false},
    {"transformer_blocks.*.attn.add_v_proj", "double_blocks.*.processor.qkv_lora2", 2, 1, 3, false},
    SC__SAME("transformer_blocks.*.attn.to_add_out", "double_blocks.*.processor.proj_lora2"),
    {"single_transformer_blocks.*.attn.to_q", "single_blocks.*.processor.qkv_lora", 0, 1, 3, false},
    {"single_transformer_blocks.*.attn.to_k", "single_blocks.*.processor.qkv_lora", 1, 1, 3, false},
    {"single_transformer_blocks.*.attn.to_v", "single_blocks.*.processor.qkv_lora", 2, 1, 3, false},
    SC__SAME("single_transformer_blocks.*.proj_out", "single_blocks.*.processor.proj_lora"),
    /* The VAE: ae.safetensors. */
    SC__SAME("encoder.down_blocks.*.resnets.*.conv_shortcut",
             "encoder.down.*.block.*.nin_shortcut"),
    SC__SAME("encoder.down_blocks.*.resnets.*", "encoder.down.*.block.*"),
    SC__SAME("encoder.down_blocks.*.downsamplers.0.conv", "encoder.down.*.downsample.conv"),
    SC__SAME("decoder.up_blocks.~.resnets.*.conv_shortcut", "decoder.up.~.block.*.nin_shortcut"),
    SC__SAME("decoder.up_blocks.~.resnets.*", "decoder.up.~.block.*"),
    SC__SAME("decoder.up_blocks.~.upsamplers.0.conv", "decoder.up.~.upsample.conv"),
    SC__SAME("*.mid_block.resnets.0", "*.mid.block_1"),
    SC__SAME("*.mid_block.resnets.1", "*.mid.block_2"),
    SC__SAME("*.mid_block.attentions.0.group_norm", "*.mid.attn_1.norm"),
    SC__SAME("*.mid_block.attentions.0.to_q", "*.mid.attn_1.q"),
    SC__SAME("*.mid_block.attentions.0.to_k", "*.mid.attn_1.k"),
    SC__SAME("*.mid_block.attentions.0.to_v", "*.mid.attn_1.v"),
    SC__SAME("*.mid_block.attentions.0.to_out.0", "*.mid.attn_1.proj_out"),
    SC__SAME("*.conv_norm_out", "*.norm_out"),
    /* T5: some files name its table by its place in the encoder. */
    SC__SAME("shared", "encoder.embed_tokens"),
};
enum { SC__ALIASES = (int)(sizeof sc__aliases / sizeof *sc__aliases) };

/* What stands before the names of weights in single files, and in files that hold all parts. */
static const char *const sc__weight_prefixes[] = {"", "model.diffusion_model.", "diffusion_model.",
    "vae.", "first_stage_model.", "text_encoders.clip_l.transformer.",
    "text_encoders.t5xxl.transformer.", "transformer.", NULL};

/* `name` translated by `alias`; false if it is not about this name. levels: of the VAE. */
static bool sc__translate(const sc__alias *alias, const char *name, int levels, char other[256]) {
    const char *word[4], *p;
    int length[4], words = 0, next = 0, n = 0;
    for (p = alias->name; *p; p++) {
        if (*p != '*' && *p != '~') {
            if (*p != *name++) return false;
            continue;
        }
        word[words] = name;
        name += length[words++] = (int)strcspn(name, ".");
    }
    if (alias->name[0] && *name && *name != '.') return false;
    for (p = alias->other; *p && n < 200; p++) {
        if (*p == '*')
            n += snprintf(other + n, (size_t)(256 - n), "%.*s", length[next], word[next]);
        else if (*p == '~') n += snprintf(other + n, 32, "%d", levels - 1 - atoi(word[next]));
        else other[n++] = *p;
        next += *p == '*' || *p == '~';
        if (n > 200) return false;
    }
    return n + snprintf(other + n, (size_t)(256 - n), "%s", name) < 256;
}

/* The tensor of `f` that holds `name` followed by `end`: under its own name or another, behind any
 * of `prefixes` (one that ends in _ makes every dot of the name a _, as kohya's do). NULL: none. */
static sc__entry *sc__find_as(const sc_file *f, const char *const *prefixes, const char *name,
                              const char *end, int levels, const sc__alias **alias) {
    char other[256], full[512];
    for (int i = -1; i < SC__ALIASES; i++) {
        *alias = i < 0 ? &sc__same_name : &sc__aliases[i];
        if (!sc__translate(*alias, name, levels, other)) continue;
        for (int p = 0; prefixes[p]; p++) {
            size_t n = strlen(prefixes[p]);
            snprintf(full, sizeof full, "%s%s%s", prefixes[p], other, end);
            for (size_t c = n; n && prefixes[p][n - 1] == '_' && c < n + strlen(other); c++)
                if (full[c] == '.') full[c] = '_';
            sc__entry *found = sc__find_entry(f, full);
            if (found) return found;
        }
    }
    return NULL;
}

/* Rows of x [rows, ...] that `alias` means; x's shape becomes theirs. False: it does not divide. */
static bool sc__take_rows(sc_tensor *x, const sc__alias *alias) {
    if (!alias->whole) return true;
    if (x->ndim < 1 || x->shape[0] % alias->whole) return false;
    int64_t row = x->shape[0] ? sc_count(x) / x->shape[0] : 0, part = x->shape[0] / alias->whole;
    x->data = (char *)x->data + alias->first * part * row * sc_dtype_size(x->dtype);
    x->shape[0] = alias->parts * part;
    return true;
}

/* Exchanges the first and the second half of `bytes`. */
static void sc__swap_halves(void *data, size_t bytes) {
    char *x = (char *)data, *y = x + bytes / 2;
    for (size_t i = 0; i < bytes / 2; i++) {
        char c = x[i];
        x[i] = y[i], y[i] = c;
    }
}

/* The same sides, but for sides of 1 at the end: a matrix may be stored as a 1x1 convolution. */
static bool sc__same_shape(const sc_tensor *a, const sc_tensor *b) {
    for (int i = 0; i < a->ndim || i < b->ndim; i++)
        if ((i < a->ndim ? a->shape[i] : 1) != (i < b->ndim ? b->shape[i] : 1)) return false;
    return true;
}

/* ==== Weights of a network ====================================================================
 *
 * A network asks for its weights by their names on disk and states the shape it needs, so opening
 * a model is at the same time the check that the file fits. Frozen matrices stay as they are on
 * disk, mapped; vectors (biases, norms) become f32, and so does everything that will be trained.
 */

sc_net *sc_net_open(const sc_backend *backend, const char *path, bool widen) {
    sc_net *net = (sc_net *)sc__alloc(1, sizeof *net);
    if (!net) return NULL;
    net->backend = backend;
    net->widen = widen;
    if (path && !(net->file = sc_file_open(path))) {
        SC_FREE(net);
        return NULL;
    }
    return net;
}

void sc_net_close(sc_net *net) {
    if (!net) return;
    for (int64_t i = 0; i < net->count; i++) {
        sc_tensor *x = &net->weights[i]->tensor;
        if (net->weights[i]->owned && x->data) net->backend->release(x->data);
        if (x->scale) net->backend->release(x->scale);
        SC_FREE(net->weights[i]->name);
        SC_FREE(net->weights[i]);
    }
    SC_FREE(net->weights);
    sc_file_close(net->file);
    SC_FREE(net);
}

/* Xavier for matrices, 0 for biases, 1 for the weights of norms. */
static void sc__random_weight(sc_net *net, const char *name, float *w, const sc_tensor *x) {
    int64_t n = sc_count(x);
    size_t length = strlen(name);
    bool bias = length > 5 && !strcmp(name + length - 5, ".bias");
    if (x->ndim == 1) {
        for (int64_t i = 0; i < n; i++) w[i] = bias ? 0.f : 1.f;
        return;
    }
    float std = sqrtf(2.f / (float)(x->shape[0] + n / x->shape[0]));
    sc_normal(&net->rng, w, n);
    for (int64_t i = 0; i < n; i++) w[i] *= std;
}

/* Copies `count` values of a matrix from `first` on: 8-bit types as they are, others in the type of
 * the activations. `wide`: room for as many floats. */
static void sc__upload_part(const sc_net *net, void *to, const sc_tensor *found, int64_t first,
                            int64_t count, float *wide) {
    const void *from = (const char *)found->data + first * sc_dtype_size(found->dtype);
    int64_t size = sc_dtype_size(net->backend->activation);
    if (sc_dtype_size(found->dtype) == 1 || found->dtype == net->backend->activation) {
        net->backend->upload(to, from, (size_t)(count * sc_dtype_size(found->dtype)));
        return;
    }
    sc_to_f32(wide, from, found->dtype, count);
    for (int64_t j = 0; size == 2 && j < count; j++) { /* in place: none lands after its own */
        uint16_t narrow = sc__f32_to_bf16(wide[j]);
        memcpy((char *)wide + 2 * j, &narrow, 2);
    }
    net->backend->upload(to, wide, (size_t)(count * size));
}

/* Copies a matrix that waits to the backend, some rows at a time. */
static bool sc__load_weight(const sc_net *net, sc_weight *w) {
    const sc_backend *be = net->backend;
    const sc_tensor *found = &w->source;
    sc_tensor *x = &w->tensor;
    int64_t n = sc_count(x), columns = sc__last(x), rows = n / columns;
    int64_t slice = (1 << 22) / columns < 1 ? 1 : (1 << 22) / columns;
    bool narrow = net->fp8 && x->ndim == 2 && sc_dtype_size(found->dtype) > 1;
    x->dtype = narrow                             ? SC_F8_E4M3
               : sc_dtype_size(found->dtype) == 1 ? found->dtype
                                                  : be->activation;
    int64_t size = sc_dtype_size(x->dtype);
    float *wide = (float *)sc__alloc((size_t)(slice * columns), sizeof *wide);
    void *staged =
        narrow ? be->alloc((size_t)(slice * columns * sc_dtype_size(be->activation))) : NULL;
    if (narrow) x->scale = (float *)be->alloc((size_t)rows * 4);
    bool streamed = net->streamed && x->ndim == 2 && be->alloc_streamed;
    if (wide && (!narrow || (staged && x->scale)))
        x->data = (streamed ? be->alloc_streamed : be->alloc)((size_t)(n * size));
    for (int64_t r = 0; x->data && r < rows; r += slice) {
        int64_t count = rows - r < slice ? rows - r : slice;
        char *to = (char *)x->data + r * columns * size;
        sc__upload_part(net, narrow ? staged : to, found, r * columns, count * columns, wide);
        if (narrow) be->quantize((uint8_t *)to, x->scale + r, staged, count, columns);
    }
    SC_FREE(wide);
    if (staged) be->release(staged);
    w->owned = true;
    w->waiting = !x->data;
    return x->data != NULL;
}

bool sc_net_load(sc_net *net) {
    for (int64_t i = 0; i < net->count; i++)
        if (net->weights[i]->waiting && !sc__load_weight(net, net->weights[i])) return false;
    return true;
}

size_t sc_net_waiting(const sc_net *net) {
    size_t bytes = 0;
    for (int64_t i = 0; i < net->count; i++)
        if (net->weights[i]->waiting && !net->streamed)
            bytes += (size_t)sc_count(&net->weights[i]->tensor) *
                     (net->fp8 || sc_dtype_size(net->weights[i]->source.dtype) == 1 ? 1 : 2);
    return bytes;
}

/* Where a weight's values are: x has the rows that are wanted, as they are stored. */
typedef struct sc__source {
    sc_tensor x;
    sc_tensor scales;           /* of 8 bits: one number, or [rows]; else data is NULL */
    bool swapped;               /* the halves of the rows are exchanged */
} sc__source;

/* The scale that an 8-bit weight is stored with. Files without any are plain casts; one that
 * announces scales (ComfyUI's mark `scaled_fp8`) must have them. */
static bool sc__read_scale(const sc_file *f, const sc__entry *weight, const sc__alias *alias,
                           sc__source *s) {
    static const char *const forms[] = {"weight_scale", "scale_weight"};
    char name[512];
    sc__entry *found = NULL, *mark = NULL;
    size_t stem = strlen(weight->name);
    stem -= stem > 6 ? 6 : 0;   /* "weight" */
    for (int i = 0; i < 2 && !found; i++) {
        snprintf(name, sizeof name, "%.*s%s", (int)stem, weight->name, forms[i]);
        found = sc__find_entry(f, name);
    }
    for (int i = 0; !mark && sc__weight_prefixes[i]; i++) {
        const char *prefix = sc__weight_prefixes[i];
        if (strncmp(weight->name, prefix, strlen(prefix))) continue; /* the mark of another part */
        snprintf(name, sizeof name, "%sscaled_fp8", prefix);
        if ((mark = sc__find_entry(f, name))) mark->used = true;
    }
    if (!found) return !mark || sc__fail("%s: '%s' is an 8-bit weight without its '.scale_weight'; "
                                         "the file says that it has them", f->path, weight->name);
    found->used = true;
    int64_t n = sc_count(&found->tensor);
    if ((n != 1 && n != weight->tensor.shape[0]) || found->tensor.dtype > SC_F64)
        return sc__fail("%s: '%s' must be one number, or one a row", f->path, found->name);
    s->scales = found->tensor;
    s->scales.ndim = 1; /* [rows, 1] and [1, rows] are seen */
    s->scales.shape[0] = n;
    return n == 1 || sc__take_rows(&s->scales, alias);
}

/* The scales of a source's rows, [rows]. */
static float *sc__row_scales(const sc__source *s, const char *name) {
    int64_t rows = s->x.shape[0], n = sc_count(&s->scales);
    float *scales = (float *)sc__alloc((size_t)rows, sizeof *scales);
    if (!scales) return NULL;
    sc_to_f32(scales, s->scales.data, s->scales.dtype, n);
    for (int64_t i = n; i < rows; i++) scales[i] = scales[0];
    bool ok = true;
    for (int64_t i = 0; i < rows; i++) ok = ok && isfinite(scales[i]) && scales[i] > 0;
    if (ok) return scales;
    SC_FREE(scales);
    return sc__fail("the scale of '%s' is not a positive number", name), NULL;
}

/* Finds the weight `name` of the shape that `want` has. */
static bool sc__find_weight(const sc_net *net, const char *name, const sc_tensor *want,
                            sc__source *s) {
    char expected[96], actual[96];
    const char *path = sc_file_path(net->file);
    const sc__alias *alias;
    sc__entry *e = sc__find_as(net->file, sc__weight_prefixes, name, "", net->levels, &alias);
    if (!e) return sc__fail("%s: tensor '%s' is missing", path, name);
    e->used = true;
    *s = (sc__source){.x = e->tensor, .swapped = alias->swapped};
    if (e->tensor.dtype > SC_F64)
        return sc__fail("%s: tensor '%s' has type %s; weights must be floating point", path,
                        e->name, sc_dtype_name(e->tensor.dtype));
    if (!sc__take_rows(&s->x, alias) || !sc__same_shape(&s->x, want))
        return sc__fail("%s: tensor '%s' has shape %s; '%s' must be %s here", path, e->name,
                        sc__shape_text(&e->tensor, actual), name, sc__shape_text(want, expected));
    s->x.ndim = want->ndim; /* without further sides of 1 */
    memcpy(s->x.shape, want->shape, sizeof want->shape);
    return e->tensor.dtype != SC_F8_E4M3 || sc__read_scale(net->file, e, alias, s);
}

/* The f32 values of a source, scaled, in their order. */
static bool sc__source_values(const sc__source *s, const char *name, float *values) {
    int64_t n = sc_count(&s->x), rows = s->x.shape[0];
    float *scales = s->scales.data ? sc__row_scales(s, name) : NULL;
    if (s->scales.data && !scales) return false;
    sc_to_f32(values, s->x.data, s->x.dtype, n);
    for (int64_t i = 0; scales && i < n; i++) values[i] *= scales[i / (n / rows)];
    if (s->swapped) sc__swap_halves(values, (size_t)n * sizeof *values);
    SC_FREE(scales);
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(values[i])) return sc__fail("'%s' holds a value that is %g", name, values[i]);
    return true;
}

/* Random matrices that are not widened are for measuring speed: a block of numbers, repeated. */
static bool sc__repeat_weight(sc_net *net, sc_tensor *x) {
    enum { BLOCK = 1 << 20 };
    int64_t n = sc_count(x), size = sc_dtype_size(net->backend->activation);
    sc_tensor block = {.dtype = SC_F32, .ndim = 1, .shape = {BLOCK}};
    float *values = (float *)sc__alloc(BLOCK, sizeof *values),
          *wide = (float *)sc__alloc(BLOCK, sizeof *wide);
    x->dtype = net->backend->activation;
    x->data = values && wide ? net->backend->alloc((size_t)(n * size)) : NULL;
    float std = 1.f / sqrtf((float)sc__last(x));
    if (values) sc_normal(&net->rng, values, BLOCK);
    for (int64_t i = 0; values && i < BLOCK; i++) values[i] *= std;
    block.data = values;
    for (int64_t i = 0; x->data && i < n; i += BLOCK)
        sc__upload_part(net, (char *)x->data + i * size, &block, 0, n - i < BLOCK ? n - i : BLOCK,
                        wide);
    SC_FREE(values);
    SC_FREE(wide);
    return x->data != NULL;
}

/* Fills `x` with the f32 values of a source, or, where that is NULL, with random ones. */
static bool sc__fill_weight(sc_net *net, const char *name, sc_tensor *x, const sc__source *s) {
    int64_t n = sc_count(x);
    float *host = (float *)sc__alloc((size_t)n, sizeof *host);
    if (!host) return false;
    bool ok = !s || sc__source_values(s, name, host);
    if (!s) sc__random_weight(net, name, host, x);
    x->dtype = SC_F32;
    x->data = ok ? net->backend->alloc((size_t)n * 4) : NULL;
    if (x->data) net->backend->upload(x->data, host, (size_t)n * 4);
    SC_FREE(host);
    return x->data != NULL;
}

/* Adds a weight to the net's list; NULL with the error set. */
static sc_tensor *sc__keep_weight(sc_net *net, const char *name, sc_weight weight) {
    sc_weight **list = (sc_weight **)sc__grow(net->weights, net->count, sizeof *list);
    if (!list) return NULL;
    net->weights = list;
    sc_weight *w = (sc_weight *)sc__alloc(1, sizeof *w);
    weight.name = sc__strdup(name);
    if (!w || !weight.name) {
        SC_FREE(w);
        SC_FREE(weight.name);
        return NULL;
    }
    *w = weight;
    net->weights[net->count++] = w;
    return &w->tensor;
}

/* Puts an 8-bit source's scales beside the weight that keeps its bits. */
static bool sc__keep_scales(const sc_net *net, const sc__source *s, const char *name,
                            sc_tensor *x) {
    size_t bytes = (size_t)x->shape[0] * sizeof(float);
    float *scales = sc__row_scales(s, name);
    x->scale = scales ? (float *)net->backend->alloc(bytes) : NULL;
    if (x->scale) net->backend->upload(x->scale, scales, bytes);
    SC_FREE(scales);
    return x->scale != NULL;
}

/* product: only products read the weight, so it may stay in 8 bits with scales beside it. */
static sc_tensor *sc__net_weight(sc_net *net, const char *name, int ndim, const int64_t *shape,
                                 bool product) {
    sc_weight w = {.tensor = {.ndim = ndim, .dtype = SC_F32}};
    sc_tensor *x = &w.tensor;
    sc__source s = {0};
    for (int i = 0; i < ndim; i++) x->shape[i] = shape[i];
    bool found = net->file && sc__find_weight(net, name, x, &s);
    w.source = s.x;
    w.missing = net->file && !found;
    if (!net->backend) return sc__keep_weight(net, name, w);
    if (w.missing) return NULL;
    bool as_on_disk = found && ndim > 1 && !net->widen && s.x.dtype != SC_F64 && !s.swapped &&
                      (product || !s.scales.data);
    if (as_on_disk) {
        bool narrowed = net->fp8 && ndim == 2 && sc_dtype_size(s.x.dtype) > 1;
        w.waiting = !net->backend->on_host || narrowed;
        x->dtype = s.x.dtype;
        x->data = w.waiting ? NULL : s.x.data;
        if (s.scales.data && !sc__keep_scales(net, &s, name, x)) return NULL;
    } else {
        w.owned = true;
        bool repeated = !found && !net->widen && ndim > 1;
        if (!(repeated ? sc__repeat_weight(net, x)
                       : sc__fill_weight(net, name, x, found ? &s : NULL)))
            return NULL;
    }
    return sc__keep_weight(net, name, w);
}

sc_tensor *sc_net_weight(sc_net *net, const char *name, int ndim, const int64_t *shape) {
    return sc__net_weight(net, name, ndim, shape, false);
}

bool sc_net_linear(sc_net *net, sc_linear_layer *layer, const char *name, int64_t out, int64_t in,
                   bool bias) {
    char full[256];
    snprintf(full, sizeof full, "%s.weight", name);
    layer->weight = sc__net_weight(net, full, 2, (const int64_t[]){out, in}, true);
    if (!layer->weight) return false;
    snprintf(full, sizeof full, "%s.bias", name);
    layer->bias = bias ? sc_net_weight(net, full, 1, &out) : NULL;
    return !bias || layer->bias;
}

/* ---- What a file without config.json says by its shapes ---- */

/* Side `dim` of a weight in the net's file; `fallback` where there is none. */
static int sc__side(const sc_net *net, const char *name, int dim, int fallback) {
    const sc__alias *alias;
    sc__entry *e = net->file ? sc__find_as(net->file, sc__weight_prefixes, name, "", net->levels,
                                           &alias) : NULL;
    sc_tensor x = e ? e->tensor : (sc_tensor){0};
    if (!e || dim >= x.ndim || !sc__take_rows(&x, alias) || x.shape[dim] > 1 << 24) return fallback;
    return (int)x.shape[dim];
}

/* How many weights "before%dafter" there are, counted from 0. */
static int sc__count_layers(const sc_net *net, const char *format, int fallback) {
    char name[SC_MAX_NAME];
    for (int n = 0;; n++) {
        const char *at = strstr(format, "%d");
        snprintf(name, sizeof name, "%.*s%d%s", (int)(at - format), format, n, at + 2);
        if (!sc__side(net, name, 0, 0)) return n ? n : fallback;
    }
}

/* The config.json beside a part's weights, parsed, its text and its name; json is NULL where there
 * is none. False if it cannot be read. */
static bool sc__read_config(const char *path, sc_json **json, char **name, char **text) {
    size_t length;
    bool folder = sc__is_folder(path);
    *name = folder ? sc__join(path, "config.json") : sc__strdup(path);
    *json = NULL;
    *text = NULL;
    if (!*name || !folder || !sc__exists(*name)) return *name != NULL;
    *text = sc__read_file(*name, &length);
    *json = *text ? sc_json_parse(*text, length, *name) : NULL;
    return *json != NULL;
}

/* An integer >= 1 from a config; false with the error set. */
static bool sc__config_int(const sc_json *config, const char *path, const char *key, int fallback,
                           int *value) {
    double number = sc_json_number(sc_json_get(config, key), fallback);
    *value = fallback;
    if (!(number >= 1 && number <= 1 << 24 && number == floor(number)))
        return sc__fail("%s: '%s' must be a whole number from 1 up", path, key);
    *value = (int)number;
    return true;
}

/* ==== FLUX transformer ========================================================================
 *
 * Peebles & Xie's diffusion transformer in its multimodal form (Esser et al. 2024), as released in
 * FLUX.1: `layers` double blocks, in which text and image keep their own weights and meet in one
 * attention, then `single_layers` blocks on the joined sequence, attention and MLP side by side.
 * Time, guidance and pooled text become one vector, which modulates every norm. Names are those of
 * diffusers' FluxTransformer2DModel.
 *
 * Easy to get wrong: text comes first in every joined sequence. A block's modulation is cut into
 * (shift, scale, gate) for attention, then the same for the MLP; norm_out alone has (scale, shift).
 * RoPE turns neighbouring channels (0,1), (2,3)...; text tokens sit at position (0,0,0), image
 * tokens at (0,row,column). There is no final norm on the text stream.
 */

typedef struct sc__stream {         /* one stream of a double block: image or text */
    sc_linear_layer mod;            /* [6C, C] */
    sc_linear_layer q, k, v, out;   /* [C, C] */
    sc_linear_layer up, down;       /* [4C, C], [C, 4C] */
    sc_tensor *norm_q, *norm_k;     /* [D] */
} sc__stream;

typedef struct sc__double_block {
    const sc_flux *flux;
    sc__stream image, text;
} sc__double_block;

typedef struct sc__single_block {
    const sc_flux *flux;
    sc_linear_layer mod;            /* [3C, C] */
    sc_linear_layer q, k, v;        /* [C, C] */
    sc_linear_layer up;             /* [4C, C] */
    sc_linear_layer out;            /* [C, 5C], of the attention's and the MLP's output */
    sc_tensor *norm_q, *norm_k;     /* [D] */
} sc__single_block;

typedef struct sc__embedder { sc_linear_layer first, second; } sc__embedder;
typedef struct sc__module { char name[SC_MAX_NAME]; sc_linear_layer *layer; } sc__module;

struct sc_flux {
    sc_flux_config config;
    sc_net *net;
    sc_linear_layer x_embedder, context_embedder;
    sc__embedder time, guidance, pooled;
    sc__double_block *double_blocks;
    sc__single_block *single_blocks;
    sc_linear_layer norm_out, proj_out;
    sc__module *modules;            /* every linear layer by name: what LoRA can adapt */
    int module_count;
    sc_tensor rope;                 /* [T, D/2, 2], made for: */
    int rope_text, rope_h, rope_w;
    char *config_text;              /* config.json, as it was read */
    int checkpointed; /* so many of the blocks keep only their inputs for the backward pass */
};

const sc_flux_config *sc_flux_config_of(const sc_flux *flux) { return &flux->config; }

void sc_flux_checkpointing(sc_flux *f, bool on) {
    f->checkpointed = on ? f->config.layers + f->config.single_layers : 0;
}

void sc_flux_streamed(sc_flux *f) { f->net->streamed = true; }

bool sc_flux_fp8(sc_flux *f) {
    if (f->net->widen || !f->net->file)
        return sc__fail("weights that are f32 or random cannot become fp8");
    f->net->fp8 = true;
    for (int64_t i = 0; i < f->net->count; i++) {
        sc_weight *w = f->net->weights[i];
        if (w->owned || w->tensor.ndim != 2 || sc_dtype_size(w->source.dtype) == 1) continue;
        w->waiting = true;
        w->tensor.data = NULL;
    }
    return true;
}

int64_t sc_flux_parameters(const sc_flux *flux) {
    int64_t n = 0;
    for (int64_t i = 0; i < flux->net->count; i++) n += sc_count(&flux->net->weights[i]->tensor);
    return n;
}

/* ---- Opening ---- */

/* The numbers come from config.json, what it lacks is as in FLUX.1-dev; where there is none they
 * are read off the shapes of the weights, with FLUX.1's proportions of RoPE axes: 1/8, 7/16, 7/16.
 */
static bool sc__flux_read_config(sc_flux_config *c, const sc_net *net, const sc_json *json,
                                 const char *path) {
    const sc_json *axes = sc_json_get(json, "axes_dims_rope");
    const char *class_name =
        sc_json_string(sc_json_get(json, "_class_name"), "FluxTransformer2DModel");
    if (strcmp(class_name, "FluxTransformer2DModel"))
        return sc__fail("%s: this is a %s; only FLUX.1 (FluxTransformer2DModel) is supported", path,
                        class_name);
    int in = sc__side(net, "x_embedder.weight", 1, 64),
        out = sc__side(net, "proj_out.weight", 0, in);
    int width = sc__side(net, "x_embedder.weight", 0, 3072);
    int layers = sc__count_layers(net, "transformer_blocks.%d.attn.to_q.weight", 19);
    int singles = sc__count_layers(net, "single_transformer_blocks.%d.attn.to_q.weight", 38);
    int size = sc__side(net, "transformer_blocks.0.attn.norm_q.weight", 0, 128);
    int text = sc__side(net, "context_embedder.weight", 1, 4096);
    int pooled = sc__side(net, "time_text_embed.text_embedder.linear_1.weight", 1, 768);
    if (!sc__config_int(json, path, "in_channels", in, &c->in_channels) ||
        !sc__config_int(json, path, "out_channels", json ? c->in_channels : out,
                        &c->out_channels) ||
        !sc__config_int(json, path, "num_layers", layers, &c->layers) ||
        !sc__config_int(json, path, "num_single_layers", singles, &c->single_layers) ||
        !sc__config_int(json, path, "attention_head_dim", size, &c->head_size) ||
        !sc__config_int(json, path, "num_attention_heads", width / c->head_size, &c->heads) ||
        !sc__config_int(json, path, "joint_attention_dim", text, &c->text_channels) ||
        !sc__config_int(json, path, "pooled_projection_dim", pooled, &c->pooled_channels))
        return false;
    int sum = 0;
    for (int i = 0; i < 3; i++) {
        int usual = i ? c->head_size * 7 / 16 : c->head_size / 8;
        double axis = sc_json_number(sc_json_at(axes, i), usual);
        if (!(axis >= 2 && axis <= 256 && axis == 2 * floor(axis / 2)))
            return sc__fail("%s: axes_dims_rope must be even numbers up to 256", path);
        sum += c->rope_axes[i] = (int)axis;
    }
    if (sum != c->head_size || sum > 256)
        return sc__fail("%s: axes_dims_rope sum to %d; attention_head_dim is %d (at most 256)",
                        path, sum, c->head_size);
    if ((int64_t)c->heads * c->head_size > 1 << 20)
        return sc__fail("%s: %d heads of %d is too wide", path, c->heads, c->head_size);
    int guided = sc__side(net, "time_text_embed.guidance_embedder.linear_1.weight", 0, 0);
    c->guidance = sc_json_bool(sc_json_get(json, "guidance_embeds"), !json && guided);
    return true;
}

/* config.json for a model that was read without one. */
static char *sc__flux_config_text(const sc_flux_config *c) {
    char text[1024];
    snprintf(text, sizeof text,
             "{\n  \"_class_name\": \"FluxTransformer2DModel\",\n  \"attention_head_dim\": %d,\n"
             "  \"axes_dims_rope\": [%d, %d, %d],\n  \"guidance_embeds\": %s,\n"
             "  \"in_channels\": %d,\n  \"joint_attention_dim\": %d,\n"
             "  \"num_attention_heads\": %d,\n  \"num_layers\": %d,\n  \"num_single_layers\": %d,\n"
             "  \"out_channels\": %d,\n  \"patch_size\": 1,\n  \"pooled_projection_dim\": %d\n}\n",
             c->head_size, c->rope_axes[0], c->rope_axes[1], c->rope_axes[2],
             c->guidance ? "true" : "false", c->in_channels, c->text_channels, c->heads, c->layers,
             c->single_layers, c->out_channels, c->pooled_channels);
    return sc__strdup(text);
}

static bool sc__flux_linear(sc_flux *f, sc_linear_layer *layer, const char *prefix,
                            const char *name, int64_t out, int64_t in) {
    sc__module *m = &f->modules[f->module_count++];
    snprintf(m->name, sizeof m->name, "%.60s%.60s", prefix, name);
    m->layer = layer;
    return sc_net_linear(f->net, layer, m->name, out, in, true);
}

static bool sc__flux_norm(sc_flux *f, sc_tensor **weight, const char *prefix, const char *name) {
    char full[SC_MAX_NAME];
    snprintf(full, sizeof full, "%.60s%.50s.weight", prefix, name);
    return (*weight = sc_net_weight(f->net, full, 1, (const int64_t[]){f->config.head_size})) !=
           NULL;
}

static bool sc__flux_stream(sc_flux *f, sc__stream *s, const char *prefix, bool text) {
    static const char *const names[2][9] = {
        {"norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj",
         "ff.net.2", "attn.norm_q", "attn.norm_k"},
        {"norm1_context.linear", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
         "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2", "attn.norm_added_q",
         "attn.norm_added_k"}};
    const char *const *name = names[text];
    int64_t c = (int64_t)f->config.heads * f->config.head_size;
    return sc__flux_linear(f, &s->mod, prefix, name[0], 6 * c, c) &&
           sc__flux_linear(f, &s->q, prefix, name[1], c, c) &&
           sc__flux_linear(f, &s->k, prefix, name[2], c, c) &&
           sc__flux_linear(f, &s->v, prefix, name[3], c, c) &&
           sc__flux_linear(f, &s->out, prefix, name[4], c, c) &&
           sc__flux_linear(f, &s->up, prefix, name[5], 4 * c, c) &&
           sc__flux_linear(f, &s->down, prefix, name[6], c, 4 * c) &&
           sc__flux_norm(f, &s->norm_q, prefix, name[7]) &&
           sc__flux_norm(f, &s->norm_k, prefix, name[8]);
}

static bool sc__flux_single(sc_flux *f, sc__single_block *s, const char *prefix) {
    int64_t c = (int64_t)f->config.heads * f->config.head_size;
    s->flux = f;
    return sc__flux_linear(f, &s->mod, prefix, "norm.linear", 3 * c, c) &&
           sc__flux_linear(f, &s->q, prefix, "attn.to_q", c, c) &&
           sc__flux_linear(f, &s->k, prefix, "attn.to_k", c, c) &&
           sc__flux_linear(f, &s->v, prefix, "attn.to_v", c, c) &&
           sc__flux_linear(f, &s->up, prefix, "proj_mlp", 4 * c, c) &&
           sc__flux_linear(f, &s->out, prefix, "proj_out", c, 5 * c) &&
           sc__flux_norm(f, &s->norm_q, prefix, "attn.norm_q") &&
           sc__flux_norm(f, &s->norm_k, prefix, "attn.norm_k");
}

static bool sc__flux_embedder(sc_flux *f, sc__embedder *e, const char *name, int64_t in) {
    int64_t c = (int64_t)f->config.heads * f->config.head_size;
    char prefix[SC_MAX_NAME];
    snprintf(prefix, sizeof prefix, "time_text_embed.%s_embedder.", name);
    return sc__flux_linear(f, &e->first, prefix, "linear_1", c, in) &&
           sc__flux_linear(f, &e->second, prefix, "linear_2", c, c);
}

static bool sc__flux_weights(sc_flux *f) {
    const sc_flux_config *c = &f->config;
    int64_t width = (int64_t)c->heads * c->head_size;
    char prefix[SC_MAX_NAME];
    if (!sc__flux_linear(f, &f->x_embedder, "", "x_embedder", width, c->in_channels) ||
        !sc__flux_linear(f, &f->context_embedder, "", "context_embedder", width,
                         c->text_channels) ||
        !sc__flux_embedder(f, &f->time, "timestep", 256) ||
        (c->guidance && !sc__flux_embedder(f, &f->guidance, "guidance", 256)) ||
        !sc__flux_embedder(f, &f->pooled, "text", c->pooled_channels))
        return false;
    for (int i = 0; i < c->layers; i++) {
        snprintf(prefix, sizeof prefix, "transformer_blocks.%d.", i);
        f->double_blocks[i].flux = f;
        if (!sc__flux_stream(f, &f->double_blocks[i].image, prefix, false) ||
            !sc__flux_stream(f, &f->double_blocks[i].text, prefix, true)) return false;
    }
    for (int i = 0; i < c->single_layers; i++) {
        snprintf(prefix, sizeof prefix, "single_transformer_blocks.%d.", i);
        if (!sc__flux_single(f, &f->single_blocks[i], prefix)) return false;
    }
    return sc__flux_linear(f, &f->norm_out, "", "norm_out.linear", 2 * width, width) &&
           sc__flux_linear(f, &f->proj_out, "", "proj_out", c->out_channels, width);
}

/* A new model starts as the identity: modulations and the last layer are zero (adaLN-Zero). */
static void sc__flux_zero(sc_flux *f) {
    for (int i = 0; i < f->module_count; i++) {
        const char *name = f->modules[i].name;
        sc_tensor *w = f->modules[i].layer->weight;
        if (strstr(name, "norm") || !strcmp(name, "proj_out"))
            f->net->backend->zero(w->data, (size_t)sc_count(w) * 4);
    }
}

sc_flux *sc_flux_open(const sc_backend *backend, const char *path, bool widen, bool random,
                      uint64_t seed) {
    char *name = NULL;
    sc_json *json = NULL;
    sc_flux *f = (sc_flux *)sc__alloc(1, sizeof *f);
    if (!f) return NULL;
    bool ok = sc__read_config(path, &json, &name, &f->config_text);
    if (ok && random && !json) ok = sc__fail("%s: No such file", name);
    ok = ok && (!json || sc__flux_read_config(&f->config, &(sc_net){0}, json, name)) &&
         (f->net = sc_net_open(backend, random ? NULL : path, widen)) &&
         (json || sc__flux_read_config(&f->config, f->net, json, name));
    sc_json_free(json);
    SC_FREE(name);
    if (ok && !f->config_text) ok = (f->config_text = sc__flux_config_text(&f->config)) != NULL;
    if (ok) {
        size_t doubles = (size_t)f->config.layers, singles = (size_t)f->config.single_layers;
        f->double_blocks = (sc__double_block *)sc__alloc(doubles, sizeof *f->double_blocks);
        f->single_blocks = (sc__single_block *)sc__alloc(singles, sizeof *f->single_blocks);
        f->modules = (sc__module *)sc__alloc(10 + 14 * doubles + 6 * singles, sizeof *f->modules);
        f->net->rng.state = seed;
        ok = f->double_blocks && f->single_blocks && f->modules && sc__flux_weights(f);
    }
    if (ok && random && widen && backend) sc__flux_zero(f);
    if (ok) return f;
    sc_flux_close(f);
    return NULL;
}

void sc_flux_close(sc_flux *f) {
    if (!f) return;
    if (f->rope.data) f->net->backend->release(f->rope.data);
    if (f->net && f->net->backend) sc_lora_unload(f);
    sc_net_close(f->net);
    SC_FREE(f->config_text);
    SC_FREE(f->double_blocks);
    SC_FREE(f->single_blocks);
    SC_FREE(f->modules);
    SC_FREE(f);
}

/* Downloads a weight as f32, with its scale and with the loaded LoRAs: W + sum scale B A. */
static bool sc__merged_values(const sc_flux *f, const sc_tensor *w, float *values) {
    const sc_backend *be = f->net->backend;
    const sc_linear_layer *layer = NULL;
    int64_t n = sc_count(w);
    for (int i = 0; i < f->module_count; i++)
        if (f->modules[i].layer->weight == w) layer = f->modules[i].layer;
    void *raw = sc__alloc((size_t)n, (size_t)sc_dtype_size(w->dtype));
    bool ok = raw && be->download(raw, w->data, (size_t)(n * sc_dtype_size(w->dtype)));
    if (ok) sc_to_f32(values, raw, w->dtype, n);
    SC_FREE(raw);
    float *scales = ok && w->scale ? (float *)sc__alloc((size_t)w->shape[0], sizeof *scales) : NULL;
    if (w->scale) ok = scales && be->download(scales, w->scale, (size_t)w->shape[0] * 4);
    for (int64_t i = 0; ok && scales && i < n; i++) values[i] *= scales[i / w->shape[1]];
    SC_FREE(scales);
    for (const sc_adapter *l = layer ? layer->adapters : NULL; ok && l; l = l->next) {
        const sc_tensor *a = l->a[SC_TEACHER], *b = l->b[SC_TEACHER];
        if (!l->loaded) continue;
        float *host = (float *)sc__alloc((size_t)(sc_count(a) + sc_count(b)), sizeof *host);
        ok = host && be->download(host, a->data, (size_t)sc_count(a) * 4) &&
             be->download(host + sc_count(a), b->data, (size_t)sc_count(b) * 4);
        if (ok)
            sc__cpu_gemm(w->shape[0], w->shape[1], l->rank, l->scale,
                         sc__matrix(host + sc_count(a), SC_F32, l->rank, false),
                         sc__matrix(host, SC_F32, w->shape[1], false), 1,
                         sc__matrix(values, SC_F32, w->shape[1], false), NULL);
        SC_FREE(host);
    }
    return ok;
}

/* One weight at a time: the host never holds more. */
static bool sc__flux_fill(const void *user, const sc_named *x, sc_tensor *host) {
    *host = *x->tensor;
    host->dtype = SC_F32;
    host->data = sc__alloc((size_t)sc_count(host), sizeof(float));
    return host->data && sc__merged_values((const sc_flux *)user, x->tensor, (float *)host->data);
}

bool sc_flux_save(const sc_flux *f, const char *folder, sc_dtype dtype,
                  const char *const *metadata) {
    sc_net *net = f->net;
    char *config = sc__join(folder, "config.json");
    char *weights = sc__join(folder, "diffusion_pytorch_model.safetensors");
    sc_named *named = (sc_named *)sc__alloc((size_t)net->count, sizeof *named);
    bool ok = config && weights && named && sc_net_load(net), made = false;
    if (ok) ok = sc__make_folder(folder, &made);
    char *there = ok && !made ? sc__weights_in(folder) : NULL;
    if (there && sc__matches(there, "*.index.json"))
        ok = sc__fail("%s: these shards would be read instead: write to another folder", there);
    SC_FREE(there);
    for (int64_t i = 0; ok && i < net->count; i++)
        named[i] = (sc_named){net->weights[i]->name, &net->weights[i]->tensor, dtype};
    ok = ok && sc__save(weights, named, net->count, metadata, sc__flux_fill, f) &&
         sc__write_file(config, f->config_text, strlen(f->config_text));
    if (!ok && made) rmdir(folder); /* if it is empty */
    SC_FREE(named);
    SC_FREE(weights);
    SC_FREE(config);
    return ok;
}

/* ---- Forward ---- */

/* The table of (cos, sin) for each token and channel pair: pair i of an axis of d channels turns by
 * position * 10000^(-2i/d); computed in double, kept until the sizes change. */
static const sc_tensor *sc__flux_rope(sc_flux *f, int text, int h, int w) {
    if (f->rope.data && f->rope_text == text && f->rope_h == h && f->rope_w == w) return &f->rope;
    const sc_backend *be = f->net->backend;
    int64_t tokens = text + (int64_t)h * w, size = f->config.head_size;
    float *table = (float *)sc__alloc((size_t)(tokens * size), sizeof *table), *turn = table;
    if (!table) return NULL;
    for (int64_t token = 0; token < tokens; token++) {
        int64_t pixel = token - text;
        double position[3] = {0, pixel < 0 ? 0 : (double)(pixel / w),
                              pixel < 0 ? 0 : (double)(pixel % w)};
        for (int axis = 0; axis < 3; axis++)
            for (int i = 0; i < f->config.rope_axes[axis]; i += 2) {
                double angle =
                    position[axis] * pow(10000.0, -(double)i / f->config.rope_axes[axis]);
                *turn++ = (float)cos(angle);
                *turn++ = (float)sin(angle);
            }
    }
    if (f->rope.data) be->release(f->rope.data);
    f->rope = (sc_tensor){.dtype = SC_F32, .ndim = 3, .shape = {tokens, size / 2, 2}};
    f->rope.data = be->alloc((size_t)(tokens * size) * 4);
    if (f->rope.data) be->upload(f->rope.data, table, (size_t)(tokens * size) * 4);
    SC_FREE(table);
    f->rope_text = text, f->rope_h = h, f->rope_w = w;
    return f->rope.data ? &f->rope : NULL;
}

static sc_tensor *sc__embed(sc_tape *t, const sc__embedder *e, sc_tensor *x) {
    return sc_linear(t, sc_activate(t, SC_SILU, sc_linear(t, x, &e->first)), &e->second);
}

/* in: image [B,Ti,C], text [B,Tt,C], silu of the modulation vector [B,C]; out: image, text. */
static bool sc__double_forward(sc_tape *t, sc_tensor **in, sc_tensor **out, const void *context) {
    const sc__double_block *block = (const sc__double_block *)context;
    const sc__stream *const stream[2] = {&block->image, &block->text};
    int heads = block->flux->config.heads;
    float scale = 1.f / sqrtf((float)block->flux->config.head_size);
    sc_tensor *mod[2], *q[2], *k[2], *v[2];
    for (int i = 0; i < 2; i++) { /* 0 image, 1 text */
        mod[i] = sc_linear(t, in[2], &stream[i]->mod);
        sc_tensor *n = sc_ln_modulate(t, in[i], mod[i], 0, 1);
        q[i] = sc_linear(t, n, &stream[i]->q);
        k[i] = sc_linear(t, n, &stream[i]->k);
        v[i] = sc_linear(t, n, &stream[i]->v);
    }
    const sc_tensor *rope = &block->flux->rope;
    sc_tensor *query = sc_norm_rope(t, q[1], q[0], block->text.norm_q, block->image.norm_q, rope);
    sc_tensor *key = sc_norm_rope(t, k[1], k[0], block->text.norm_k, block->image.norm_k, rope);
    sc_tensor *o =
        sc_attention(t, query, key, sc_concat_tokens(t, v[1], v[0]), heads, scale, NULL, false);
    int64_t from[2] = {in[1]->shape[1], 0};
    for (int i = 0; i < 2; i++) {
        sc_tensor *own = sc_slice_tokens(t, o, from[i], in[i]->shape[1]);
        sc_tensor *x = sc_gated_residual(t, in[i], sc_linear(t, own, &stream[i]->out), mod[i], 2);
        sc_tensor *h = sc_linear_gelu(t, sc_ln_modulate(t, x, mod[i], 3, 4), &stream[i]->up);
        h = sc_linear(t, h, &stream[i]->down);
        out[i] = sc_gated_residual(t, x, h, mod[i], 5);
    }
    return out[0] && out[1];
}

/* in: joined tokens [B,T,C], silu of the modulation vector [B,C]; out: joined tokens. */
static bool sc__single_forward(sc_tape *t, sc_tensor **in, sc_tensor **out, const void *context) {
    const sc__single_block *block = (const sc__single_block *)context;
    const sc_tensor *rope = &block->flux->rope;
    float scale = 1.f / sqrtf((float)block->flux->config.head_size);
    sc_tensor *mod = sc_linear(t, in[1], &block->mod);
    sc_tensor *n = sc_ln_modulate(t, in[0], mod, 0, 1);
    sc_tensor *q = sc_norm_rope(t, NULL, sc_linear(t, n, &block->q), NULL, block->norm_q, rope);
    sc_tensor *k = sc_norm_rope(t, NULL, sc_linear(t, n, &block->k), NULL, block->norm_k, rope);
    sc_tensor *v = sc_linear(t, n, &block->v);
    sc_tensor *o = sc_attention(t, q, k, v, block->flux->config.heads, scale, NULL, false);
    sc_tensor *both = sc_concat_gelu(t, o, n, &block->up);
    out[0] = sc_gated_residual(t, in[0], sc_linear(t, both, &block->out), mod, 2);
    return out[0] != NULL;
}

/* The vector that modulates every block: silu(time + guidance + pooled text), [B,C]. */
static sc_tensor *sc__flux_modulation(sc_flux *f, sc_tape *t, const sc_flux_input *in) {
    int64_t batch = in->x->shape[0];
    sc_tensor *sum = sc__embed(t, &f->time, sc_timestep_embedding(t, in->time, batch, 256));
    if (f->config.guidance)
        sum = sc_add(
            t, sum, sc__embed(t, &f->guidance, sc_timestep_embedding(t, in->guidance, batch, 256)));
    return sc_activate(t, SC_SILU, sc_add(t, sum, sc__embed(t, &f->pooled, in->pooled)));
}

/* Replaces the first one or two of x by the block's outputs. */
static bool sc__run_block(const sc_flux *f, int index, sc_tape *t, sc_block block,
                          const void *context, sc_tensor **x, int inputs) {
    sc_tensor *out[2] = {NULL, NULL};
    bool ok =
        (index < f->checkpointed ? sc_checkpoint : sc_keep)(t, block, context, x, inputs, out);
    x[0] = out[0];
    if (out[1]) x[1] = out[1];
    return ok;
}

sc_tensor *sc_flux_velocity(sc_flux *f, sc_tape *t, const sc_flux_input *in) {
    if (!in->x || !in->context || !in->pooled) return NULL;
    int64_t text_tokens = in->context->shape[1], image_tokens = (int64_t)in->h * in->w;
    if (in->x->shape[1] != image_tokens) {
        sc__fail("latent has %lld tokens, the grid is %d x %d", (long long)in->x->shape[1], in->h,
                 in->w);
        return NULL;
    }
    if (!sc_net_load(f->net) || !sc__flux_rope(f, (int)text_tokens, in->h, in->w)) return NULL;
    sc_tensor *mod = sc__flux_modulation(f, t, in);
    sc_tensor *x[3] = {sc_linear(t, in->x, &f->x_embedder),
                       sc_linear(t, in->context, &f->context_embedder), mod};
    if (!x[0] || !x[1] || !mod) return NULL;
    for (int i = 0; i < f->config.layers; i++)
        if (!sc__run_block(f, i, t, sc__double_forward, &f->double_blocks[i], x, 3)) return NULL;
    sc_tensor *joined[2] = {sc_concat_tokens(t, x[1], x[0]), mod};
    if (!joined[0]) return NULL;
    for (int i = 0; i < f->config.single_layers; i++)
        if (!sc__run_block(f, f->config.layers + i, t, sc__single_forward, &f->single_blocks[i],
                           joined, 2))
            return NULL;
    sc_tensor *image = sc_slice_tokens(t, joined[0], text_tokens, image_tokens);
    sc_tensor *n =
        sc_ln_modulate(t, image, sc_linear(t, mod, &f->norm_out), 1, 0); /* scale comes first */
    return sc_linear(t, n, &f->proj_out);
}

/* ==== What is trained: LoRA factors, or all weights ==========================================
 *
 * SCFM needs four networks: the student, its fast and slow averages, and the teacher. They share
 * everything but these numbers, so the numbers of each lie in one array, and a set is an index.
 */

static float *sc__params_array(sc_params *p) {
    float *x = (float *)p->backend->alloc((size_t)p->count * 4);
    if (x) p->backend->zero(x, (size_t)p->count * 4);
    return x;
}

static bool sc__params_arrays(sc_params *p, bool teacher) {
    for (int s = teacher ? SC_TEACHER : SC_STUDENT; s < SC_SETS; s++)
        if (!(p->set[s] = sc__params_array(p))) return false;
    return (p->results = (double *)p->backend->alloc(2 * sizeof *p->results)) &&
           (p->grad = sc__params_array(p)) && (p->m = sc__params_array(p)) &&
           (p->v = sc__params_array(p));
}

void sc_params_copy(sc_params *p, sc_set to, sc_set from) {
    p->backend->copy_block(p->set[to], p->count, p->set[from], p->count, 1, p->count, SC_F32,
                           false);
}

/* An A or B whose numbers lie at `data`, which stays with its owner. */
static sc_tensor *sc__factor(float *data, int64_t rows, int64_t columns) {
    sc_tensor *x = (sc_tensor *)sc__alloc(1, sizeof *x);
    if (x) *x = (sc_tensor){.data = data, .dtype = SC_F32, .ndim = 2, .shape = {rows, columns}};
    return x;
}

/* Points the adapters of every module at their parts of the arrays, and draws A's in `start`. */
static bool sc__attach(sc_params *p, float scale, sc_rng rng, float *start) {
    int64_t at = 0;
    for (int i = 0; i < p->flux->module_count; i++) {
        sc_linear_layer *layer = p->flux->modules[i].layer;
        int64_t out = layer->weight->shape[0], in = layer->weight->shape[1], n = p->rank * in;
        sc_adapter *lora = &p->adapters[i];
        *lora = (sc_adapter){.rank = p->rank, .scale = scale, .next = layer->adapters};
        layer->adapters = lora;
        for (int s = 0; s < SC_SETS; s++) {
            if (!p->set[s]) continue;
            lora->a[s] = sc__factor(p->set[s] + at, p->rank, in);
            lora->b[s] = sc__factor(p->set[s] + at + n, out, p->rank);
            if (!lora->a[s] || !lora->b[s]) return false;
        }
        sc_tensor *a = lora->a[SC_STUDENT], *b = lora->b[SC_STUDENT];
        a->needs_grad = b->needs_grad = true;
        a->grad = p->grad + at;
        b->grad = p->grad + at + n;
        sc_normal(&rng, start + at, n);
        for (int64_t j = at; j < at + n; j++) start[j] /= (float)p->rank;
        at += n + p->rank * out;
    }
    return true;
}

sc_params *sc_params_lora(sc_flux *flux, int rank, float alpha, uint64_t seed) {
    if (rank < 1) return sc__fail("a LoRA of rank %d: it must be positive", rank), NULL;
    sc_params *p = (sc_params *)sc__alloc(1, sizeof *p);
    if (!p) return NULL;
    *p = (sc_params){.backend = flux->net->backend, .flux = flux, .rank = rank};
    for (int i = 0; i < flux->module_count; i++) {
        const sc_tensor *w = flux->modules[i].layer->weight;
        p->count += rank * (w->shape[0] + w->shape[1]);
    }
    p->adapters = (sc_adapter *)sc__alloc((size_t)flux->module_count, sizeof *p->adapters);
    float *start = (float *)sc__alloc((size_t)p->count, sizeof *start);
    bool ok = p->adapters && start && sc__params_arrays(p, false) &&
              sc__attach(p, alpha / (float)rank, (sc_rng){seed}, start);
    for (int s = SC_STUDENT; ok && s < SC_SETS; s++)
        p->backend->upload(p->set[s], start, (size_t)p->count * 4);
    SC_FREE(start);
    if (ok) return p;
    sc_params_free(p);
    return NULL;
}

sc_params *sc_params_full(sc_flux *flux, bool teacher) {
    if (!flux->net->widen)
        return sc__fail("to train all weights the model must be opened with `widen`"), NULL;
    sc_params *p = (sc_params *)sc__alloc(1, sizeof *p);
    if (!p) return NULL;
    *p = (sc_params){
        .backend = flux->net->backend, .flux = flux, .count = sc_flux_parameters(flux)};
    float *host = (float *)sc__alloc((size_t)p->count, sizeof *host), *end = host;
    if (!host || !sc__params_arrays(p, teacher)) {
        SC_FREE(host);
        sc_params_free(p);
        return NULL;
    }
    for (int64_t i = 0; i < flux->net->count; i++) {
        sc_weight *w = flux->net->weights[i];
        p->backend->download(end, w->tensor.data, (size_t)sc_count(&w->tensor) * 4);
        p->backend->release(w->tensor.data); /* sc_params_use points it into a set */
        w->owned = false;
        end += sc_count(&w->tensor);
    }
    for (int s = 0; s < SC_SETS; s++)
        if (p->set[s]) p->backend->upload(p->set[s], host, (size_t)p->count * 4);
    SC_FREE(host);
    sc_params_use(p, SC_STUDENT);
    return p;
}

void sc_params_use(sc_params *p, sc_set set) {
    int64_t offset = 0;
    for (int64_t i = 0; i < p->flux->net->count; i++) {
        sc_tensor *w = &p->flux->net->weights[i]->tensor;
        w->data = p->set[set] + offset;
        w->grad = set == SC_STUDENT ? p->grad + offset : NULL;
        w->needs_grad = set == SC_STUDENT;
        offset += sc_count(w);
    }
}

void sc_params_free(sc_params *p) {
    if (!p) return;
    for (double unread[2]; p->waiting > 0; p->waiting--) p->backend->collect(unread, 2);
    for (int i = 0; p->adapters && i < p->flux->module_count; i++) {
        sc_adapter **link = &p->flux->modules[i].layer->adapters;
        while (*link && *link != &p->adapters[i]) link = &(*link)->next;
        if (*link) *link = p->adapters[i].next;
        for (int s = 0; s < SC_SETS; s++) {
            SC_FREE(p->adapters[i].a[s]);
            SC_FREE(p->adapters[i].b[s]);
        }
    }
    SC_FREE(p->adapters);
    for (int s = 0; s < SC_SETS; s++)
        if (p->set[s]) p->backend->release(p->set[s]);
    if (p->grad) p->backend->release(p->grad);
    if (p->m) p->backend->release(p->m);
    if (p->v) p->backend->release(p->v);
    if (p->results) p->backend->release(p->results);
    SC_FREE(p);
}

void sc_params_step(sc_params *p, sc_adamw *o, float fast_decay, float slow_decay) {
    const sc_trained x = {
        p->count, p->set[SC_STUDENT], p->grad, p->m, p->v, {p->set[SC_FAST], p->set[SC_SLOW]}};
    p->backend->update(&x, o, (const float[2]){fast_decay, slow_decay}, &p->results[1]);
    double oldest[2]; /* forgotten, where nobody asks */
    if (p->waiting == SC_POSTS) p->backend->collect(oldest, 2), p->waiting--;
    p->backend->post(p->results, 2);
    p->waiting++;
    o->step++;
}

bool sc_params_report(sc_params *p, double *loss, double *norm) {
    double results[2] = {NAN, NAN};
    bool ok = p->waiting > 0 || sc__fail("there is no step to report");
    if (ok) p->waiting--, ok = p->backend->collect(results, 2);
    *loss = results[0], *norm = results[1];
    return ok;
}

/* ==== LoRA files ==============================================================================
 *
 * A LoRA (Hu et al. 2021) is a pair of thin matrices for each linear layer, W + scale * B A. We
 * write PEFT's names, which diffusers reads. Others name layers as BFL does, where q, k and v (and
 * a single block's MLP) are one fused layer: its A serves all parts, its B is cut by rows.
 * A file that fits no layer is an error, since a model that ignores its LoRA looks healthy.
 */

typedef struct sc__written { char name[512]; sc_tensor tensor; } sc__written;   /* f32, in memory */

static bool sc__lora_write(const char *path, const sc__written *factors, int count,
                           const char *const *metadata) {
    sc_named *named = (sc_named *)sc__alloc((size_t)count, sizeof *named);
    for (int i = 0; named && i < count; i++)
        named[i] = (sc_named){factors[i].name, &factors[i].tensor, SC_BF16};
    bool ok = named && sc_file_save(path, named, count, metadata);
    SC_FREE(named);
    return ok;
}

bool sc_lora_save(const sc_params *p, sc_set set, const char *path, const char *const *metadata) {
    int n = p->flux->module_count;
    sc__written *factors = (sc__written *)sc__alloc((size_t)n * 2, sizeof *factors);
    float *host = (float *)sc__alloc((size_t)p->count, sizeof *host), *data = host;
    bool ok = factors && host && p->backend->download(host, p->set[set], (size_t)p->count * 4);
    for (int i = 0; ok && i < 2 * n; i++) {
        const sc_tensor *x = i % 2 ? p->adapters[i / 2].b[set] : p->adapters[i / 2].a[set];
        snprintf(factors[i].name, sizeof factors[i].name, "transformer.%s.lora_%c.weight",
                 p->flux->modules[i / 2].name, i % 2 ? 'B' : 'A');
        factors[i].tensor = *x;
        factors[i].tensor.data = data;
        if (i % 2) /* the scale alpha / rank is folded into B */
            for (int64_t j = 0; j < sc_count(x); j++) data[j] *= p->adapters[i / 2].scale;
        data += sc_count(x);
    }
    ok = ok && sc__lora_write(path, factors, 2 * n, metadata);
    SC_FREE(factors);
    SC_FREE(host);
    return ok;
}

/* What stands before a module's name in LoRA files, and behind it for A and B: PEFT and diffusers,
 * BFL and ComfyUI, kohya, OneTrainer; diffusers of before PEFT, XLabs. */
static const char *const sc__lora_prefixes[] = {"transformer.", "", "base_model.model.",
    "base_model.model.transformer.", "diffusion_model.", "model.diffusion_model.", "lora_unet_",
    "lora_transformer_", NULL};
static const char *const sc__lora_ends[][2] = {
    {".lora_A.weight", ".lora_B.weight"}, {".lora_down.weight", ".lora_up.weight"},
    {".lora.down.weight", ".lora.up.weight"}, {".down.weight", ".up.weight"},
    {".lora_A.default.weight", ".lora_B.default.weight"}};
enum { SC__LORA_ENDS = (int)(sizeof sc__lora_ends / sizeof *sc__lora_ends) };

/* `name` without `end`; 0 if it does not end so. */
static size_t sc__stem(const char *name, const char *end) {
    size_t n = strlen(name), m = strlen(end);
    return n > m && !strcmp(name + n - m, end) ? n - m : 0;
}

typedef struct sc__factors {    /* of one LoRA on one layer; a NULL: it has none */
    int64_t rank;
    float *a, *b;               /* [rank, in], [out, rank]; b has the file's own scale in it */
} sc__factors;

/* A LoRA file, and the config of PEFT that goes with it, or NULL: diffusers writes it into the
 * file's metadata, PEFT beside adapter_model.safetensors. */
typedef struct sc__lora {
    sc_file *file;
    sc_json *config;
} sc__lora;

static void sc__lora_close(sc__lora *l) {
    sc_json_free(l->config);
    sc_file_close(l->file);
}

static bool sc__lora_open(sc__lora *l, const char *path) {
    static const char weights[] = "adapter_model.safetensors", config[] = "adapter_config.json";
    *l = (sc__lora){.file = sc_file_open(path)};
    if (!l->file) return false;
    const char *own = l->file->path, *text = sc_file_metadata(l->file, "lora_adapter_metadata");
    size_t n = strlen(own), m = sizeof weights - 1;
    if (text) l->config = sc_json_parse(text, strlen(text), own);
    if (text || n < m || strcmp(own + n - m, weights)) return !text || l->config;
    char *beside = (char *)sc__alloc(n, 1);
    if (beside) snprintf(beside, n, "%.*s%s", (int)(n - m), own, config);
    bool there = beside && sc__exists(beside);
    if (there) l->config = sc_json_load(beside);
    SC_FREE(beside);
    return beside && (!there || l->config);
}

/* diffusers puts the name of the model before each key. */
static const sc_json *sc__lora_setting(const sc__lora *l, const char *key) {
    char full[64];
    snprintf(full, sizeof full, "transformer.%s", key);
    const sc_json *value = sc_json_get(l->config, full);
    return value ? value : sc_json_get(l->config, key);
}

/* The config's alpha for a module; left alone where there is none. The first of PEFT's patterns
 * that fits counts: the end of a name from a dot on or, behind a ^, the whole of it. */
static bool sc__lora_config_alpha(const sc__lora *l, const char *module, float *alpha) {
    const sc_json *patterns = sc__lora_setting(l, "alpha_pattern");
    *alpha = (float)sc_json_number(sc__lora_setting(l, "lora_alpha"), *alpha);
    for (int64_t i = 0; i < sc_json_length(patterns); i++) {
        const char *pattern = sc_json_key(patterns, i);
        if (!pattern) break;
        bool whole = *pattern == '^';
        const char *name = pattern + whole;
        size_t n = strlen(module), m = strlen(name);
        if (strpbrk(name, "*+?()[]{}|^$\\"))
            return sc__fail("%s: the alpha_pattern '%s' is a regular expression; only names are "
                            "read here", l->file->path, pattern);
        if (m > n || strcmp(module + n - m, name)) continue;
        if (m < n && (whole || module[n - m - 1] != '.')) continue;
        *alpha = (float)sc_json_number(sc_json_value(patterns, i), *alpha);
        break;
    }
    return true;
}

/* What B A is multiplied by: alpha / rank, with rsLoRA alpha / sqrt(rank). alpha is a tensor
 * (kohya) or in the config; without either it is the rank. */
static bool sc__lora_own_scale(const sc__lora *l, const char *module, const char *stem, int length,
                               int64_t rank, float *scale) {
    char name[512];
    float alpha = (float)rank;
    if (!sc__lora_config_alpha(l, module, &alpha)) return false;
    snprintf(name, sizeof name, "%.*s.alpha", length, stem);
    sc__entry *e = sc__find_entry(l->file, name);
    if (e) e->used = true;
    if (e && sc_count(&e->tensor) == 1) sc_to_f32(&alpha, e->tensor.data, e->tensor.dtype, 1);
    bool root = sc_json_bool(sc__lora_setting(l, "use_rslora"), false);
    *scale = alpha / (root ? sqrtf((float)rank) : (float)rank);
    return isfinite(alpha) || sc__fail("%s: '%s' is %g", l->file->path, name, alpha);
}

/* The factors of `module`, whose weight is w [out, in], if the file has any. */
static bool sc__lora_read(const sc__lora *l, const char *module, const sc_tensor *w,
                          sc__factors *x) {
    const sc_file *file = l->file;
    const sc__alias *alias = NULL;
    sc__entry *a = NULL, *b = NULL;
    char name[512];
    int end = -1, stem;
    *x = (sc__factors){0};
    while (!a && ++end < SC__LORA_ENDS)
        a = sc__find_as(file, sc__lora_prefixes, module, sc__lora_ends[end][0], 0, &alias);
    if (!a) return true;
    stem = (int)sc__stem(a->name, sc__lora_ends[end][0]);
    snprintf(name, sizeof name, "%.*s%s", stem, a->name, sc__lora_ends[end][1]);
    b = sc__find_entry(file, name);
    if (!b) return sc__fail("%s: '%s' has no partner '%s'", file->path, a->name, name);
    a->used = b->used = true;
    x->rank = a->tensor.shape[0];
    sc_tensor rows = b->tensor, want_a = {.ndim = 2, .shape = {x->rank, w->shape[1]}};
    sc_tensor want_b = {.ndim = 2, .shape = {w->shape[0], x->rank}};
    if (!sc__same_shape(&a->tensor, &want_a) || !sc__take_rows(&rows, alias) ||
        !sc__same_shape(&rows, &want_b) || x->rank < 1 || a->tensor.dtype > SC_F64 ||
        rows.dtype > SC_F64)
        return sc__fail("%s: '%.*s' does not fit '%s', a layer of %lld x %lld: is this LoRA for "
                        "another model?", file->path, stem, a->name, module,
                        (long long)w->shape[0], (long long)w->shape[1]);
    int64_t na = sc_count(&a->tensor), nb = sc_count(&rows);
    float scale;
    if (!sc__lora_own_scale(l, module, a->name, stem, x->rank, &scale)) return false;
    x->a = (float *)sc__alloc((size_t)(na + nb), sizeof *x->a);
    if (!x->a) return false;
    x->b = x->a + na;
    sc_to_f32(x->a, a->tensor.data, a->tensor.dtype, na);
    sc_to_f32(x->b, rows.data, rows.dtype, nb);
    if (alias->swapped) sc__swap_halves(x->b, (size_t)nb * sizeof *x->b);
    bool finite = true;
    for (int64_t i = 0; i < na + nb; i++) finite = finite && isfinite(x->a[i]);
    for (int64_t i = 0; i < nb; i++) x->b[i] *= scale;
    if (finite) return true;
    SC_FREE(x->a);
    *x = (sc__factors){0};
    return sc__fail("%s: '%.*s' holds NaN or infinity", file->path, stem, a->name);
}

/* Appends a name to the list of those that fit no layer. */
static void sc__lora_missed(sc_lora_report *report, const char *name) {
    size_t used = strlen(report->missed), room = sizeof report->missed - used;
    bool full = used > 3 && !strcmp(report->missed + used - 3, "...");
    if (!full && strlen(name) + 8 < room)
        snprintf(report->missed + used, room, "%s%s", used ? " " : "", name);
    else if (!full) snprintf(report->missed + used, room, " ...");
}

/* Whether `name` is an A (side 0) or a B (side 1) of any dialect. */
static bool sc__lora_side(const char *name, int side) {
    int end = 0;
    while (end < SC__LORA_ENDS && !sc__stem(name, sc__lora_ends[end][side])) end++;
    return end < SC__LORA_ENDS;
}

/* Counts the adapters in the file, and those that no layer took. In a file that fits, anything else
 * that was left over counts too: it would have changed the picture. */
static void sc__lora_count(const sc_file *file, sc_lora_report *report) {
    for (int64_t i = 0; i < file->count; i++) {
        bool adapter = sc__lora_side(file->entries[i].name, 0);
        report->total += adapter;
        report->applied += adapter && file->entries[i].used;
    }
    for (int64_t i = 0; i < file->count; i++) {
        const char *name = file->entries[i].name;
        bool adapter = sc__lora_side(name, 0);
        bool part = sc__lora_side(name, 1) || sc__stem(name, ".alpha"); /* goes with an A */
        if (file->entries[i].used || (!adapter && (part || !report->applied))) continue;
        report->total += !adapter;
        sc__lora_missed(report, name);
    }
}

/* Both factors lie in one piece of memory, as in sc__factors. */
static void sc__lora_free(const sc_backend *be, sc_adapter *lora) {
    sc_tensor *a = lora->a[SC_TEACHER];
    if (a && a->data) be->release(a->data);
    SC_FREE(a);
    SC_FREE(lora->b[SC_TEACHER]);
    SC_FREE(lora);
}

void sc_lora_unload(sc_flux *f) {
    for (int i = 0; i < f->module_count; i++)
        for (sc_adapter **link = &f->modules[i].layer->adapters; *link;) {
            sc_adapter *lora = *link;
            if (!lora->loaded) { link = &lora->next; continue; }
            *link = lora->next;
            sc__lora_free(f->net->backend, lora);
        }
}

static bool sc__lora_add(const sc_backend *be, sc_linear_layer *layer, const sc__factors *x,
                         float scale) {
    int64_t out = layer->weight->shape[0], in = layer->weight->shape[1];
    size_t bytes = (size_t)(x->rank * (in + out)) * sizeof *x->a;
    sc_adapter *lora = (sc_adapter *)sc__alloc(1, sizeof *lora);
    if (!lora) return false;
    *lora = (sc_adapter){.rank = (int)x->rank, .scale = scale, .loaded = true};
    sc_tensor *a = lora->a[SC_TEACHER] = sc__factor(NULL, x->rank, in);
    sc_tensor *b = lora->b[SC_TEACHER] = sc__factor(NULL, out, x->rank);
    if (!a || !b || !(a->data = be->alloc(bytes))) {
        sc__lora_free(be, lora);
        return false;
    }
    b->data = (float *)a->data + x->rank * in;
    be->upload(a->data, x->a, bytes);
    lora->next = layer->adapters;
    layer->adapters = lora;
    return true;
}

bool sc_lora_load(sc_flux *f, const char *path, float scale, sc_lora_report *report) {
    *report = (sc_lora_report){0};
    sc__lora file;
    bool ok = sc__lora_open(&file, path);
    for (int i = 0; ok && i < f->module_count; i++) {
        sc__factors x;
        sc_linear_layer *layer = f->modules[i].layer;
        ok = sc__lora_read(&file, f->modules[i].name, layer->weight, &x);
        if (!ok || !x.a) continue;
        ok = sc__lora_add(f->net->backend, layer, &x, scale);
        SC_FREE(x.a);
    }
    if (ok) sc__lora_count(file.file, report);
    if (ok && !report->applied)
        ok = sc__fail("%s: 0 of %d LoRA layers fit this model: is it a LoRA for another one?", path,
                      report->total);
    sc__lora_close(&file);
    return ok;
}

/* ---- Writing kohya's names ---- */

/* The alias of a module in BFL's layout. */
static const sc__alias *sc__bfl_alias(const char *module, char other[256]) {
    for (int i = 0; i < SC__ALIASES; i++)
        if (sc__translate(&sc__aliases[i], module, 0, other)) return &sc__aliases[i];
    return NULL;
}

/* Modules [first, first + count) are the parts of one layer of BFL's. As kohya's file has it: the
 * adapters of all parts, one below the other in A, and B with each part's factors in its own rows
 * and columns; their data is NULL without LoRAs. */
static bool sc__fuse(const sc_flux *f, int first, int count, bool swapped, sc_tensor *a_of,
                     sc_tensor *b_of) {
    const sc_backend *be = f->net->backend;
    int64_t rank = 0, rows = 0, row = 0, r = 0, in = f->modules[first].layer->weight->shape[1];
    for (int i = first; i < first + count; i++) {
        rows += f->modules[i].layer->weight->shape[0];
        for (const sc_adapter *l = f->modules[i].layer->adapters; l; l = l->next)
            rank += l->loaded ? l->rank : 0;
    }
    *a_of = (sc_tensor){.dtype = SC_F32, .ndim = 2, .shape = {rank, in}};
    *b_of = (sc_tensor){.dtype = SC_F32, .ndim = 2, .shape = {rows, rank}};
    if (!rank) return true;
    float *a = (float *)sc__alloc((size_t)(rank * in), sizeof *a), *b, *part;
    a_of->data = a;
    b_of->data = b = (float *)sc__alloc((size_t)(rows * rank), sizeof *b);
    bool ok = a && b;
    for (int i = first; i < first + count; i++) {
        int64_t height = f->modules[i].layer->weight->shape[0];
        for (const sc_adapter *l = f->modules[i].layer->adapters; ok && l; l = l->next) {
            if (!l->loaded) continue;
            part = (float *)sc__alloc((size_t)(height * l->rank), sizeof *part);
            ok = part &&
                 be->download(a + r * in, l->a[SC_TEACHER]->data, (size_t)(l->rank * in) * 4) &&
                 be->download(part, l->b[SC_TEACHER]->data, (size_t)(height * l->rank) * 4);
            for (int64_t j = 0; ok && j < height * l->rank; j++)
                b[(row + j / l->rank) * rank + r + j % l->rank] = l->scale * part[j];
            SC_FREE(part);
            r += l->rank;
        }
        row += height;
    }
    if (ok && swapped) sc__swap_halves(b, (size_t)(rows * rank) * sizeof *b);
    return ok;
}

/* No alpha: it is then the rank, so the scale is 1; diffusers refuses some layers' alphas. */
bool sc_lora_save_kohya(const sc_flux *f, const char *path, const char *const *metadata) {
    int n = f->module_count, written = 0, count;
    sc__written *factors = (sc__written *)sc__alloc((size_t)n * 2, sizeof *factors);
    bool ok = factors != NULL;
    for (int i = 0; ok && i < n; i += count) {
        char other[256], next[256];
        const sc__alias *alias = sc__bfl_alias(f->modules[i].name, other);
        sc__written *down = &factors[written], *up = down + 1;
        for (count = 1; i + count < n; count++)
            if (!sc__bfl_alias(f->modules[i + count].name, next) || strcmp(other, next)) break;
        ok = alias && sc__fuse(f, i, count, alias->swapped, &down->tensor, &up->tensor);
        if (!ok || !down->tensor.data) continue;
        for (char *c = other; *c; c++) *c = *c == '.' ? '_' : *c;
        snprintf(down->name, sizeof down->name, "lora_unet_%s.lora_down.weight", other);
        snprintf(up->name, sizeof up->name, "lora_unet_%s.lora_up.weight", other);
        written += 2;
    }
    ok = ok && sc__lora_write(path, factors, written, metadata);
    for (int i = 0; factors && i < 2 * n; i++) SC_FREE(factors[i].tensor.data);
    SC_FREE(factors);
    return ok;
}

/* In a table as "3:1@1.5 8:0.6" (numbers as in JSON) the scale for the nearest number of steps, and
 * the guidance, NAN where there is none. False if it is written wrongly: then the best before that
 * place. */
static bool sc__scale_for(const char *table, int steps, double *scale, double *guidance) {
    sc__json_parser p = {.name = table, .at = (char *)table};
    double count, value, nearest = INFINITY;
    while (sc__json_peek(&p)) {
        double guided = NAN;
        if (!sc__json_number(&p, &count) || !sc__json_take(&p, ':') || !sc__json_peek(&p) ||
            !sc__json_number(&p, &value))
            return false;
        if (sc__json_take(&p, '@') && (!sc__json_peek(&p) || !sc__json_number(&p, &guided)))
            return false;
        if (fabs(count - steps) < nearest)
            nearest = fabs(count - steps), *scale = value, *guidance = guided;
        sc__json_take(&p, ','); /* or a space */
    }
    return true;
}

float sc_lora_scale(const char *path, int steps, float *guidance) {
    sc_file *file = sc_file_open(path);
    const char *table = file ? sc_file_metadata(file, "scales") : NULL;
    double scale = 1, guided = NAN;
    if (table) sc__scale_for(table, steps, &scale, &guided);
    if (guidance && isfinite(guided)) *guidance = (float)guided;
    sc_file_close(file);
    return (float)scale;
}

bool sc_lora_start(sc_params *p, const char *path) {
    sc__lora file;
    bool ok = sc__lora_open(&file, path);
    for (int i = 0; ok && i < p->flux->module_count; i++) {
        const char *module = p->flux->modules[i].name;
        const sc_tensor *w = p->flux->modules[i].layer->weight;
        sc__factors x;
        ok = sc__lora_read(&file, module, w, &x);
        if (ok && !x.a) ok = sc__fail("%s: no factors for '%s'", path, module);
        if (ok && x.rank != p->rank)
            ok = sc__fail("%s: rank %lld; this run has rank %d", path, (long long)x.rank, p->rank);
        size_t na = (size_t)(p->rank * w->shape[1]), nb = (size_t)(p->rank * w->shape[0]);
        for (size_t j = 0; ok && j < nb; j++) x.b[j] /= p->adapters[i].scale;
        for (int s = SC_STUDENT; ok && s < SC_SETS; s++) {
            p->backend->upload(p->adapters[i].a[s]->data, x.a, na * sizeof *x.a);
            p->backend->upload(p->adapters[i].b[s]->data, x.b, nb * sizeof *x.b);
        }
        SC_FREE(x.a);
    }
    sc__lora_close(&file);
    return ok;
}

/* ==== Memory of a training step ===============================================================
 *
 * A block of the transformer keeps its activations for the backward pass; or all but those that are
 * cheap to make again; or only its inputs, and runs again (Chen et al. 2016). How many can keep
 * theirs is measured, not estimated: one step with all blocks run again says how much memory that
 * takes, and how much each block would add.
 */

bool sc_plan_memory(sc_flux *flux, sc_params *params, sc_tape *t, const sc_recipe *recipe,
                    const sc_batch *batch, sc_memory_plan *plan) {
    const size_t spare = (size_t)512 << 20; /* for the backend's own scratch memory to grow */
    sc_rng rng = {1};
    *plan = (sc_memory_plan){.blocks = flux->config.layers + flux->config.single_layers};
    sc__block_bytes *size = (sc__block_bytes *)sc__alloc((size_t)plan->blocks, sizeof *size);
    if (!size) return false;
    flux->checkpointed = plan->blocks;
    t->device.peak = t->shared.peak = 0;
    t->sharing = true;
    t->sizes = size; /* the last block's first */
    double loss; /* read so that the step is over, and to learn whether it failed */
    bool ok = sc_train_gradient(flux, params, t, recipe, batch, &rng) &&
              t->be->download(&loss, params->results, sizeof loss);
    t->sizes = NULL;
    t->be->zero(params->grad, (size_t)params->count * 4);
    sc_tape_reset(t);
    size_t left = t->be->memory_left(), held = sc_tape_bytes(t), all = 0;
    plan->left = left > SIZE_MAX - held ? SIZE_MAX : left + held;
    plan->step = sc_tape_peak(t);
    size_t room = plan->left < plan->step + spare ? 0 : plan->left - plan->step - spare;
    for (int i = 0; i < plan->blocks; i++) all += size[i].own + size[i].shared;
    t->sharing = all > room;
    for (; ok && plan->kept < plan->blocks; plan->kept++) {
        size_t more = size[plan->kept].own + (t->sharing ? 0 : size[plan->kept].shared);
        if (plan->kept_bytes + more > room) break;
        plan->kept_bytes += more;
    }
    plan->remade = t->sharing;
    SC_FREE(size);
    flux->checkpointed = plan->blocks - plan->kept;
    return ok && sc_tape_reserve(t, plan->step + plan->kept_bytes);
}

/* ==== The parts of a model, wherever they are =================================================
 *
 * People keep FLUX.1 as a folder in diffusers' layout, as single files side by side, or all in one
 * file. A part is found by a weight that no other part has, under any prefix: names of files mean
 * nothing. What is missing is named, with a file that would be right.
 */

typedef enum { SC__TRANSFORMER, SC__VAE, SC__CLIP, SC__T5, SC__PARTS } sc__part_kind;

/* Their folders in diffusers' layout, a weight that no other part has, and a single file's name. */
static const struct { const char *folder, *probe, *file; } sc__parts[SC__PARTS] = {
    {"transformer", "x_embedder.weight", "flux1-dev.safetensors"},
    {"vae", "decoder.conv_in.weight", "ae.safetensors"},
    {"text_encoder", "text_model.embeddings.token_embedding.weight", "clip_l.safetensors"},
    {"text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight", "t5xxl_fp16.safetensors"}};

/* The folder that a model is, or that its single file is in. */
static char *sc__model_folder(const char *model) {
    char *folder = sc__strdup(model), *slash = folder ? strrchr(folder, '/') : NULL;
    if (!folder || !sc__exists(model) || sc__is_folder(model)) return folder;
    if (slash) slash[slash == folder] = 0; /* "/" stays */
    else snprintf(folder, strlen(folder) + 1, ".");
    return folder;
}

/* Whether the file at `path` is one of safetensors that has this part; -1 with the error set: it
 * cannot be read. */
static int sc__file_has(const char *path, sc__part_kind part) {
    const sc__alias *alias;
    if (!sc__is_file(path)) return 0;
    sc_file *file = sc_file_open(path);
    if (!file) return -1;
    int has = sc__find_as(file, sc__weight_prefixes, sc__parts[part].probe, "", 1, &alias) != NULL;
    sc_file_close(file);
    return has;
}

/* The only file in `folder` that has this part. Where none has it, one that cannot be read, as if
 * its download had stopped, may be what is missing. */
static char *sc__part_file(const char *folder, sc__part_kind part) {
    const char *kind = sc__parts[part].folder;
    char *found = NULL, broken[sizeof sc__message] = "";
    bool several = false;
    DIR *list = opendir(folder);
    if (!list) return sc__fail("%s: %s", folder, strerror(errno)), NULL;
    for (struct dirent *entry; !several && (entry = readdir(list));) {
        bool named = *entry->d_name != '.' && (sc__matches(entry->d_name, "*.safetensors") ||
                                               sc__matches(entry->d_name, "*.sft"));
        char *path = named ? sc__join(folder, entry->d_name) : NULL;
        int has = path ? sc__file_has(path, part) : 0;
        if (has < 0) snprintf(broken, sizeof broken, "%s", sc_error());
        several = has > 0 && found;
        if (several)
            sc__fail("%s and %s both hold a %s: leave one of them in this folder", found, path,
                     kind);
        if (has > 0 && !found) found = path;
        else SC_FREE(path);
    }
    closedir(list);
    if (found && !several) return found;
    if (!found && *broken) sc__fail("%s (and no other file there holds a %s)", broken, kind);
    else if (!found)
        sc__fail("%s: no %s here: neither a folder of that name with weights nor a file such as %s",
                 folder, kind, sc__parts[part].file);
    SC_FREE(found);
    return NULL;
}

/* Where a part of a model is: its folder in diffusers' layout; the model itself, where that is a
 * file that has the part; or a file in the folder. NULL with an error that says what to put there.
 */
static char *sc__part_path(const char *model, sc__part_kind part) {
    if (!sc__exists(model)) return sc__fail("%s: No such file or directory", model), NULL;
    int has = sc__file_has(model, part);
    if (has) return has > 0 ? sc__strdup(model) : NULL;
    char *base = sc__model_folder(model);
    char *folder = base ? sc__join(base, sc__parts[part].folder) : NULL;
    bool there = folder && sc__exists(folder);
    char *weights = there ? sc__weights_in(folder) : NULL;
    char *found = weights ? sc__strdup(folder) : folder ? sc__part_file(base, part) : NULL;
    if (there && !found && !weights) weights = sc__weights_in(folder); /* says what is wrong */
    SC_FREE(weights);
    SC_FREE(folder);
    SC_FREE(base);
    return found;
}

/* Weights of up to 512 MiB that a CPU will use: worth widening to f32 once, since then no product
 * has to. */
static bool sc__small_file(const sc_backend *backend, const char *folder) {
    struct stat s;
    if (!backend || !backend->on_host) return false;
    char *path = sc__is_file(folder) ? sc__strdup(folder) : sc__weights_in(folder);
    bool small = path && stat(path, &s) == 0 && s.st_size <= (off_t)512 << 20 &&
                 !strstr(path, ".index.json");
    SC_FREE(path);
    return small;
}

/* ==== VAE =====================================================================================
 *
 * diffusers' AutoencoderKL (Rombach et al. 2022), the form FLUX.1 uses. The encoder is a
 * convolution, levels of residual blocks with a stride-2 convolution between levels, a middle of
 * two residual blocks around one attention over all pixels, and a last convolution that gives the
 * mean and log variance of the latents. The decoder is the same backwards, with nearest-neighbour
 * upsampling and one more block a level. Each half is a list of steps. Never trained here, so
 * nothing is recorded; what takes thought is memory (see "Runs").
 *
 * Easy to get wrong: downsampling pads the bottom and right only; every norm has eps 1e-6.
 */

typedef struct sc__affine { sc_tensor *weight, *bias; } sc__affine; /* of a convolution or a norm */

typedef enum { SC__CONV, SC__DOWN, SC__UP, SC__OUT, SC__RESNET, SC__ATTENTION } sc__vae_kind;

typedef struct sc__vae_step {
    sc__vae_kind kind;
    int64_t in, out;                /* channels */
    int64_t in_side, out_side;      /* of a latent pixel's square: 1 to f */
    sc__affine conv1, norm1;        /* all but an attention have conv1; OUT is norm, SiLU, conv */
    sc__affine norm2, conv2;        /* of a residual block */
    sc__affine shortcut;            /* 1x1, where a residual block changes the channels */
    sc_linear_layer q, k, v, o;     /* of an attention, [C, C] */
} sc__vae_step;

typedef struct sc__vae_half {       /* the encoder or the decoder */
    const char *name;               /* "encoder." */
    sc__vae_step steps[SC_VAE_LEVELS * (SC_VAE_LAYERS + 1) + 6];
    int count;
} sc__vae_half;

struct sc_vae {
    sc_vae_config config;
    sc_net *net;
    sc__vae_half encoder, decoder;
    sc_tape *tapes[5];              /* a strip's: two that take turns, and one for one operation;
                                     * two for the input and the result of a run */
    int turn;                       /* the tape that holds the strip's activations */
    size_t peak;                    /* most bytes they ever held */
};

const sc_vae_config *sc_vae_config_of(const sc_vae *v) { return &v->config; }
int sc_vae_factor(const sc_vae *v) { return 1 << (v->config.levels - 1); }

/* ---- Opening ---- */

/* json NULL: by the shapes of net's weights. */
static bool sc__vae_read_config(sc_vae_config *c, const sc_net *net, const sc_json *json,
                                const char *path) {
    const char *class_name = sc_json_string(sc_json_get(json, "_class_name"), "AutoencoderKL");
    const char *activation = sc_json_string(sc_json_get(json, "act_fn"), "silu");
    const sc_json *channels = sc_json_get(json, "block_out_channels");
    static const char first_convs[] = "encoder.down_blocks.%d.resnets.0.conv1.weight";
    int pixels_in, pixels_out, latents = sc__side(net, "decoder.conv_in.weight", 1, 4);
    int layers = sc__count_layers(net, "encoder.down_blocks.0.resnets.%d.conv1.weight", 1);
    if (strcmp(class_name, "AutoencoderKL"))
        return sc__fail("%s: this is a %s, not an AutoencoderKL", path, class_name);
    if (strcmp(activation, "silu"))
        return sc__fail("%s: act_fn must be silu, not '%s'", path, activation);
    if (!sc__config_int(json, path, "in_channels", 3, &pixels_in) ||
        !sc__config_int(json, path, "out_channels", 3, &pixels_out) ||
        !sc__config_int(json, path, "latent_channels", json ? 4 : latents, &c->latent_channels) ||
        !sc__config_int(json, path, "layers_per_block", json ? 1 : layers, &c->layers) ||
        !sc__config_int(json, path, "sample_size", 1024, &c->resolution) ||
        !sc__config_int(json, path, "norm_num_groups", 32, &c->groups)) return false;
    if (pixels_in != 3 || pixels_out != 3)
        return sc__fail("%s: pictures must have 3 channels", path);
    int64_t levels = json ? sc_json_length(channels) : sc__count_layers(net, first_convs, 0);
    if (levels < 1 || levels > SC_VAE_LEVELS)
        return sc__fail("%s: block_out_channels must list 1 to %d levels", path, SC_VAE_LEVELS);
    if (c->layers >= SC_VAE_LAYERS || c->latent_channels > 1024)
        return sc__fail("%s: layers_per_block may be up to %d, latent_channels up to 1024", path,
                        SC_VAE_LAYERS - 1);
    c->levels = (int)levels;
    for (int i = 0; i < c->levels; i++) {
        char name[SC_MAX_NAME];
        snprintf(name, sizeof name, first_convs, i);
        double n = json ? sc_json_number(sc_json_at(channels, i), 0) : sc__side(net, name, 0, 0);
        if (!(n >= 1 && n <= 16384 && n == floor(n)) || (int)n % c->groups)
            return sc__fail("%s: block_out_channels must be multiples of norm_num_groups (%d)",
                            path, c->groups);
        c->channels[i] = (int)n;
    }
    for (int i = 0; i < 2 * c->levels; i++) {
        const char *key = i % 2 ? "up_block_types" : "down_block_types";
        const char *kind = i % 2 ? "UpDecoderBlock2D" : "DownEncoderBlock2D";
        const char *found = sc_json_string(sc_json_at(sc_json_get(json, key), i / 2), kind);
        if (strcmp(found, kind))
            return sc__fail("%s: %s must be %s, not '%s'", path, key, kind, found);
    }
    c->attention = sc_json_bool(sc_json_get(json, "mid_block_add_attention"), true);
    c->quant = sc_json_bool(sc_json_get(json, "use_quant_conv"),
                            json || sc__side(net, "quant_conv.weight", 0, 0));
    c->post_quant = sc_json_bool(sc_json_get(json, "use_post_quant_conv"),
                                 json || sc__side(net, "post_quant_conv.weight", 0, 0));
    c->scale = (float)sc_json_number(sc_json_get(json, "scaling_factor"), json ? 0.18215 : 0.3611);
    c->shift = (float)sc_json_number(sc_json_get(json, "shift_factor"), json ? 0 : 0.1159);
    if (!(c->scale > 0) || !isfinite(c->scale) || !isfinite(c->shift))
        return sc__fail("%s: scaling_factor must be positive", path);
    return true;
}

/* prefix + name: weight [out, in, kernel, kernel] (kernel 0, a norm: [out]) and bias [out]. */
static bool sc__vae_affine(sc_vae *v, sc__affine *a, const char *prefix, const char *name,
                           int64_t out, int64_t in, int64_t kernel) {
    char full[2 * SC_MAX_NAME];
    snprintf(full, sizeof full, "%s%s.weight", prefix, name);
    const int64_t shape[] = {out, in, kernel, kernel};
    a->weight = sc_net_weight(v->net, full, kernel ? 4 : 1, shape);
    snprintf(full, sizeof full, "%s%s.bias", prefix, name);
    a->bias = a->weight ? sc_net_weight(v->net, full, 1, &out) : NULL;
    return a->bias != NULL;
}

static sc__vae_step *sc__vae_add(sc__vae_half *h, sc__vae_kind kind, int64_t in, int64_t out) {
    sc__vae_step *s = &h->steps[h->count++];
    int64_t side = h->count > 1 ? s[-1].out_side : s->in_side;
    *s = (sc__vae_step){.kind = kind, .in = in, .out = out, .in_side = side, .out_side = side};
    if (kind == SC__UP) s->out_side = 2 * side;
    if (kind == SC__DOWN) s->out_side = side / 2;
    return s;
}

static bool sc__vae_conv(sc_vae *v, sc__vae_half *h, sc__vae_kind kind, const char *prefix,
                         const char *name, int64_t out, int64_t in, int64_t kernel) {
    sc__vae_step *s = sc__vae_add(h, kind, in, out);
    return sc__vae_affine(v, &s->conv1, prefix, name, out, in, kernel) &&
           (kind != SC__OUT || sc__vae_affine(v, &s->norm1, prefix, "conv_norm_out", in, 0, 0));
}

static bool sc__vae_resnet(sc_vae *v, sc__vae_half *h, const char *where, int index, int64_t in,
                           int64_t out) {
    sc__vae_step *s = sc__vae_add(h, SC__RESNET, in, out);
    char prefix[SC_MAX_NAME];
    snprintf(prefix, sizeof prefix, "%s%s.resnets.%d.", h->name, where, index);
    return sc__vae_affine(v, &s->norm1, prefix, "norm1", in, 0, 0) &&
           sc__vae_affine(v, &s->conv1, prefix, "conv1", out, in, 3) &&
           sc__vae_affine(v, &s->norm2, prefix, "norm2", out, 0, 0) &&
           sc__vae_affine(v, &s->conv2, prefix, "conv2", out, out, 3) &&
           (in == out || sc__vae_affine(v, &s->shortcut, prefix, "conv_shortcut", out, in, 1));
}

static bool sc__vae_attention(sc_vae *v, sc__vae_half *h, int64_t c) {
    static const char *const names[4] = {"to_q", "to_k", "to_v", "to_out.0"};
    sc__vae_step *s = sc__vae_add(h, SC__ATTENTION, c, c);
    sc_linear_layer *layers[4] = {&s->q, &s->k, &s->v, &s->o};
    char name[SC_MAX_NAME];
    for (int i = 0; i < 4; i++) {
        snprintf(name, sizeof name, "%smid_block.attentions.0.%s", h->name, names[i]);
        if (!sc_net_linear(v->net, layers[i], name, c, c, true)) return false;
    }
    return sc__vae_affine(v, &s->norm1, h->name, "mid_block.attentions.0.group_norm", c, 0, 0);
}

static bool sc__vae_middle(sc_vae *v, sc__vae_half *h) {
    int64_t c = v->config.channels[v->config.levels - 1];
    return sc__vae_resnet(v, h, "mid_block", 0, c, c) &&
           (!v->config.attention || sc__vae_attention(v, h, c)) &&
           sc__vae_resnet(v, h, "mid_block", 1, c, c);
}

static bool sc__vae_steps(sc_vae *v, sc__vae_half *h, bool encoder) {
    const sc_vae_config *c = &v->config;
    int64_t latents = c->latent_channels * (encoder ? 2 : 1);
    int64_t width = c->channels[encoder ? 0 : c->levels - 1];
    h->name = encoder ? "encoder." : "decoder.";
    h->steps[0].in_side = encoder ? sc_vae_factor(v) : 1;
    bool ok = (encoder || !c->post_quant ||
               sc__vae_conv(v, h, SC__CONV, "", "post_quant_conv", latents, latents, 1)) &&
              sc__vae_conv(v, h, SC__CONV, h->name, "conv_in", width, encoder ? 3 : latents, 3) &&
              (encoder || sc__vae_middle(v, h));
    for (int i = 0; ok && i < c->levels; i++) {
        int64_t out = c->channels[encoder ? i : c->levels - 1 - i];
        char where[64], resample[SC_MAX_NAME];
        snprintf(where, sizeof where, "%s_blocks.%d", encoder ? "down" : "up", i);
        for (int j = 0; ok && j < c->layers + !encoder; j++, width = out)
            ok = sc__vae_resnet(v, h, where, j, width, out);
        snprintf(resample, sizeof resample, "%s.%ssamplers.0.conv", where, encoder ? "down" : "up");
        if (ok && i + 1 < c->levels)
            ok = sc__vae_conv(v, h, encoder ? SC__DOWN : SC__UP, h->name, resample, out, out, 3);
    }
    return ok && (!encoder || sc__vae_middle(v, h)) &&
           sc__vae_conv(v, h, SC__OUT, h->name, "conv_out", encoder ? latents : 3, width, 3) &&
           (!encoder || !c->quant ||
            sc__vae_conv(v, h, SC__CONV, "", "quant_conv", latents, latents, 1));
}

sc_vae *sc_vae_open(const sc_backend *backend, const char *path, bool widen) {
    char *name = NULL, *text = NULL;
    sc_json *json = NULL;
    sc_vae *v = (sc_vae *)sc__alloc(1, sizeof *v);
    bool ok = v && sc__read_config(path, &json, &name, &text) &&
              (!json || sc__vae_read_config(&v->config, &(sc_net){0}, json, name)) &&
              (v->net = sc_net_open(backend, path, widen)) &&
              (json || sc__vae_read_config(&v->config, v->net, json, name));
    sc_json_free(json);
    SC_FREE(name);
    SC_FREE(text);
    if (ok) v->net->levels = v->config.levels;
    for (int i = 0; ok && backend && i < 5; i++) ok = (v->tapes[i] = sc_tape_new(backend)) != NULL;
    ok = ok && sc__vae_steps(v, &v->encoder, true) && sc__vae_steps(v, &v->decoder, false) &&
         sc_net_load(v->net);
    if (ok) return v;
    sc_vae_close(v);
    return NULL;
}

void sc_vae_close(sc_vae *v) {
    if (!v) return;
    for (int i = 0; i < 5; i++) sc_tape_free(v->tapes[i]);
    sc_net_close(v->net);
    SC_FREE(v);
}

/* ---- Runs: steps within bounded memory ----
 * A run does some steps on an input that is kept whole, and keeps their result whole. If what lies
 * between does not fit, it works on strips of rows. A strip is cut out with a halo of rows above
 * and below its own: where the picture was cut, convolutions see zeros, each makes one more row
 * wrong from there on inwards, and the halo is as deep as that goes. A group norm needs the mean
 * and variance of the whole picture: so a sweep over all strips only gathers the sums for the first
 * norm; the next one, which has these, those for the second; and so on, until the last makes the
 * result. The more norms, the more is computed again: a run ends at the first result that fits.
 */

typedef struct sc__vae_run {
    const sc__vae_step *steps;
    int count, norms;
    bool whole;                 /* one piece: no sweeps before */
    int64_t side, height;       /* the coarsest side among the steps; rows of the picture there, */
    int64_t rows, halo;         /* in which strips are measured */
    size_t kept, strip;         /* bytes: of input and result, of a strip's largest tensor */
    int64_t own[2], cut[2];     /* the strip's own rows, and those with the halo: [0] to [1] - 1 */
    int norm, gather;           /* next norm; the one whose sums this sweep gathers */
    double *sums;               /* [norms, B, groups, 2] */
} sc__vae_run;

/* The first `count` of the steps as a run; a [B,1,h,w] takes `unit` bytes. At most three tensors as
 * large as the largest are alive at once; attention alone has seven, and sees the whole picture. */
static sc__vae_run sc__vae_plan(const sc__vae_step *s, int count, int64_t h, size_t unit,
                                size_t memory) {
    const sc__vae_step *last = s + count - 1;
    sc__vae_run r = {.steps = s, .count = count};
    r.side = s->in_side < last->out_side ? s->in_side : last->out_side;
    r.height = h * r.side;
    r.kept = unit * (size_t)(s->in * s->in_side * s->in_side +
                             last->out * last->out_side * last->out_side);
    int64_t largest = 0, wrong = 0; /* in units; rows after each step */
    for (int i = 0; i < count; i++) {
        sc__vae_kind kind = s[i].kind;
        int64_t side = s[i].in_side > s[i].out_side ? s[i].in_side : s[i].out_side;
        int64_t n = (s[i].in > s[i].out ? s[i].in : s[i].out) * side * side;
        if (kind == SC__ATTENTION && count > 1) n *= 5; /* sc__vae_do knows better if alone */
        largest = n > largest ? n : largest;
        r.norms += kind == SC__RESNET ? 2 : kind == SC__OUT || kind == SC__ATTENTION;
        if (kind == SC__UP) wrong *= 2;
        wrong += kind == SC__RESNET ? 2 : 1;
        if (kind == SC__DOWN) wrong = (wrong + 1) / 2;
    }
    r.strip = unit * (size_t)largest;
    size_t row = r.strip / (size_t)r.height, left = memory > r.kept ? (memory - r.kept) / 3 : 0;
    r.whole = r.strip <= left || (count == 1 && s->kind == SC__ATTENTION);
    r.halo = (wrong * r.side + last->out_side - 1) / last->out_side;
    r.rows = r.whole ? r.height : (int64_t)(left / row) - 2 * r.halo;
    if (r.rows < r.halo) r.rows = r.halo;
    if (r.rows + 2 * r.halo < r.height) r.strip = row * (size_t)(r.rows + 2 * r.halo);
    return r;
}

/* The next run of the `left` steps from s on: in one piece as many as fit; else in strips, to the
 * first result that leaves a fifth of the memory to them; else whatever takes least. */
static sc__vae_run sc__vae_next(const sc__vae_step *s, int left, int64_t h, size_t unit,
                                size_t memory) {
    for (int n = left; n > 0; n--) {
        sc__vae_run r = sc__vae_plan(s, n, h, unit, memory);
        if (r.whole) return r;
    }
    sc__vae_run best = {.kept = SIZE_MAX};
    for (int n = 1; n <= left && s[n - 1].kind != SC__ATTENTION; n++) {
        sc__vae_run r = sc__vae_plan(s, n, h, unit, memory);
        if (r.kept <= memory / 5 * 4 && r.kept + 3 * r.strip <= memory) return r;
        if (r.kept + 3 * r.strip < best.kept + 3 * best.strip) best = r;
    }
    return best;
}

/* y = norm(x), in x's own place if t is NULL; or NULL, when this sweep ends here. */
static sc_tensor *sc__vae_norm(sc_vae *v, sc__vae_run *r, sc_tape *t, sc_tensor *x,
                               const sc__affine *a, bool silu) {
    sc_tensor *y = x && t ? sc__new_like(t, x) : x;
    if (!y) return NULL;
    const sc_backend *be = v->net->backend;
    int groups = v->config.groups;
    int64_t scale = x->shape[2] / (r->cut[1] - r->cut[0]);
    int64_t size = x->shape[1] / groups * r->height * scale * x->shape[3];
    double *sums = r->sums + 2 * x->shape[0] * groups * r->norm;
    bool gather = r->norm++ == r->gather;
    if (r->whole || gather)
        be->group_sums(sums, x, (r->own[0] - r->cut[0]) * scale, (r->own[1] - r->own[0]) * scale,
                       groups);
    if (gather) return NULL;
    be->group_norm(y, x, sums, size, a->weight, a->bias, groups, 1e-6f, silu);
    return y;
}

/* A convolution that keeps the sides. */
static sc_tensor *sc__vae_same(sc_tape *t, const sc_tensor *x, const sc__affine *a) {
    return sc_conv2d(t, x, a->weight, a->bias, 1, (int)a->weight->shape[2] / 2);
}

/* x += y */
static sc_tensor *sc__vae_sum(sc_vae *v, sc_tensor *x, const sc_tensor *y) {
    if (!x || !y) return NULL;
    int64_t planes = x->shape[0] * x->shape[1], n = sc_count(x) / planes;
    v->net->backend->copy_block(x->data, n, y->data, n, planes, n, x->dtype, true);
    return x;
}

/* x or its 1x1 convolution, plus conv(silu(norm(conv(silu(norm(x)))))); each tape holds only what
 * is still needed. */
static sc_tensor *sc__vae_resnet_forward(sc_vae *v, sc__vae_run *r, sc_tensor *x,
                                         const sc__vae_step *s) {
    sc_tape *t = v->tapes[!v->turn], *once = v->tapes[2];
    sc_tensor *h = sc__vae_norm(v, r, once, x, &s->norm1, true);
    h = sc__vae_norm(v, r, NULL, sc__vae_same(t, h, &s->conv1), &s->norm2, true);
    sc_tape_reset(once);
    h = sc__vae_same(once, h, &s->conv2);
    if (h && s->shortcut.weight) {
        sc_tape_reset(t);
        x = sc__vae_same(t, x, &s->shortcut);
        v->turn = !v->turn;
    }
    return sc__vae_sum(v, x, h);
}

/* x + attention(norm(x)), every pixel a token, one head. */
static sc_tensor *sc__vae_attention_forward(sc_vae *v, sc__vae_run *r, sc_tensor *x,
                                            const sc__vae_step *s) {
    sc_tape *t = v->tapes[!v->turn], *once = v->tapes[2];
    const int64_t *size = x->shape, shape[3] = {size[0], size[1], size[2] * size[3]};
    float scale = 1.f / sqrtf((float)shape[1]);
    sc_tensor *n = sc__vae_norm(v, r, once, x, &s->norm1, false);
    n = sc_swap_axes(t, sc_reshape(once, n, 3, shape));
    sc_tensor *q = sc_linear(t, n, &s->q), *k = sc_linear(t, n, &s->k);
    n = sc_linear(t, n, &s->v);
    sc_tape_reset(once);
    n = sc_linear(t, sc_attention(once, q, k, n, 1, scale, NULL, false), &s->o);
    sc_tape_reset(once);
    return sc__vae_sum(v, x, sc_swap_axes(once, n));
}

static sc_tensor *sc__vae_forward(sc_vae *v, sc__vae_run *r, sc_tensor *x, const sc__vae_step *s) {
    sc_tape *t = v->tapes[!v->turn], *once = v->tapes[2];
    sc_tape_reset(t);
    sc_tape_reset(once);
    if (s->kind == SC__RESNET) return sc__vae_resnet_forward(v, r, x, s);
    if (s->kind == SC__ATTENTION) return sc__vae_attention_forward(v, r, x, s);
    if (s->kind == SC__UP) x = sc_upsample(once, x);
    if (s->kind == SC__OUT) x = sc__vae_norm(v, r, once, x, &s->norm1, true);
    v->turn = !v->turn;
    if (s->kind == SC__DOWN) return sc_conv2d(t, x, s->conv1.weight, s->conv1.bias, 2, 0);
    return sc__vae_same(t, x, &s->conv1);
}

/* Rows [first, first + rows) of x to those from `at` on of y. */
static void sc__vae_rows(sc_vae *v, sc_tensor *y, int64_t at, const sc_tensor *x, int64_t first,
                         int64_t rows) {
    int64_t width = x->shape[3], size = width * sc_dtype_size(x->dtype);
    v->net->backend->copy_block((char *)y->data + at * size, y->shape[2] * width,
                                (char *)x->data + first * size, x->shape[2] * width,
                                x->shape[0] * x->shape[1], rows * width, x->dtype, false);
}

/* One strip of this sweep: from the input to a norm's sums, or to its rows of the result. */
static bool sc__vae_strip(sc_vae *v, sc__vae_run *r, const sc_tensor *input, sc_tensor *result) {
    int64_t above = r->own[0] < r->halo ? r->own[0] : r->halo, end = r->own[1] + r->halo;
    r->cut[0] = r->own[0] - above;
    r->cut[1] = end < r->height ? end : r->height;
    r->norm = 0;
    sc_tape *t = v->tapes[v->turn];
    sc_tape_reset(t);
    int64_t scale = r->steps->in_side / r->side, rows = (r->cut[1] - r->cut[0]) * scale;
    const int64_t shape[] = {input->shape[0], input->shape[1], rows, input->shape[3]};
    sc_tensor *x = sc_new(t, 4, shape);
    if (x) sc__vae_rows(v, x, 0, input, r->cut[0] * scale, rows);
    for (int i = 0; x && i < r->count; i++) x = sc__vae_forward(v, r, x, &r->steps[i]);
    if (r->gather < r->norms) return r->norm > r->gather;
    scale = result->shape[2] / r->height;
    if (x)
        sc__vae_rows(v, result, r->own[0] * scale, x, above * scale,
                     (r->own[1] - r->own[0]) * scale);
    return x != NULL;
}

/* Gives back the memory of all tapes but one. */
static void sc__vae_release(sc_vae *v, int but) {
    for (int i = 0; i < 5; i++)
        if (i != but) sc__arena_free(&v->tapes[i]->device);
}

/* The result of a run on x, which is on tape 3 or 4; it is on the other of these. */
static sc_tensor *sc__vae_do(sc_vae *v, sc__vae_run *r, const sc_tensor *x, int from) {
    const size_t room = 4096, groups = (size_t)(x->shape[0] * v->config.groups);
    const sc__vae_step *last = r->steps + r->count - 1;
    const int64_t shape[] = {x->shape[0], last->out, r->height / r->side * last->out_side,
                             x->shape[3] / r->steps->in_side * last->out_side};
    size_t sums = 2 * groups * (size_t)r->norms * sizeof *r->sums, held = 0;
    size_t result = (size_t)(shape[0] * shape[1] * shape[2] * shape[3] * sc_dtype_size(x->dtype));
    sc__vae_release(v, from);
    for (int i = 0; i < 5; held += sc_tape_bytes(v->tapes[i++])) {
        bool five = i == !v->turn && r->count == 1 && r->steps->kind == SC__ATTENTION;
        size_t bytes = i >= 3 ? result + sums : five ? 5 * r->strip : r->strip;
        if (i != from && !sc_tape_reserve(v->tapes[i], bytes + room)) return NULL;
    }
    v->peak = held > v->peak ? held : v->peak;
    sc_tensor *y = sc_new(v->tapes[7 - from], 4, shape);
    r->sums = (double *)sc__arena_take(&v->tapes[7 - from]->device, sums);
    if (!y || !r->sums) return NULL;
    v->net->backend->zero(r->sums, sums);
    for (r->gather = r->whole ? r->norms : 0; r->gather <= r->norms; r->gather++)
        for (r->own[0] = 0; r->own[0] < r->height; r->own[0] = r->own[1]) {
            r->own[1] = r->own[0] + r->rows < r->height ? r->own[0] + r->rows : r->height;
            if (!sc__vae_strip(v, r, x, y)) return NULL;
        }
    return y;
}

/* in: pictures or latents, out: mean and logvar of latents [B,2C,h,w] or pictures. */
static bool sc__vae_apply(sc_vae *v, const sc__vae_half *half, int64_t batch, int64_t h, int64_t w,
                          const float *in, float *out, size_t memory) {
    if (h < 1 || w < 1)
        return sc__fail("VAE: %lld x %lld latents", (long long)w, (long long)h);
    const size_t room = 4096, slack = 1 << 16; /* for sums, and to round up */
    const sc__vae_step *s = half->steps, *last = s + half->count - 1;
    int64_t f = sc_vae_factor(v), count = 65536 / (h * w * f * f); /* small pictures: several */
    int64_t in_size = s->in * s->in_side * s->in_side * h * w,
            out_size = last->out * last->out_side * last->out_side * h * w;
    bool ok = true;
    memory = !memory ? SIZE_MAX : memory > slack ? memory - slack : 0;
    for (int64_t first = 0; ok && first < batch; first += count) {
        count = count < 1 ? 1 : count > batch - first ? batch - first : count;
        size_t unit = (size_t)(count * h * w * sc_dtype_size(v->net->backend->activation));
        const int64_t shape[] = {count, s->in, h * s->in_side, w * s->in_side};
        sc_tensor *x = NULL;
        if (sc_tape_reserve(v->tapes[3], unit * (size_t)(in_size / (h * w)) + room))
            x = sc_from(v->tapes[3], 4, shape, in + first * in_size);
        for (int i = 0, tape = 3; x && i < half->count; tape = 7 - tape) {
            sc__vae_run r = sc__vae_next(s + i, half->count - i, h, unit, memory);
            x = sc__vae_do(v, &r, x, tape);
            i += r.count;
        }
        ok = sc_read(v->tapes[0], x, out + first * out_size);
        sc__vae_release(v, -1);
    }
    return ok;
}

bool sc_vae_encode(sc_vae *v, int64_t batch, int64_t height, int64_t width, const float *pictures,
                   float *mean, float *logvar, size_t memory) {
    int64_t f = sc_vae_factor(v), n = v->config.latent_channels * (height / f) * (width / f);
    if (height < f || width < f || height % f || width % f)
        return sc__fail("VAE: sides of a picture must be multiples of %lld, not %lld x %lld",
                        (long long)f, (long long)width, (long long)height);
    float *both = (float *)sc__alloc((size_t)(2 * batch * n), sizeof *both);
    bool ok = both && sc__vae_apply(v, &v->encoder, batch, height / f, width / f, pictures, both,
                                    memory);
    for (int64_t i = 0; ok && i < batch * n; i++) {
        const float *sample = both + 2 * n * (i / n);
        float l = sample[n + i % n];
        mean[i] = sample[i % n];
        logvar[i] = l < -30 ? -30 : l > 20 ? 20 : l;
    }
    SC_FREE(both);
    return ok;
}

bool sc_vae_decode(sc_vae *v, int64_t batch, int64_t h, int64_t w, const float *latents,
                   float *pictures, size_t memory) {
    return sc__vae_apply(v, &v->decoder, batch, h, w, latents, pictures, memory);
}

/* ---- Latents ---- */

void sc_vae_normalise(const sc_vae *v, int64_t n, float *mean, float *logvar) {
    float scale = v->config.scale, shift = v->config.shift;
    for (int64_t i = 0; i < n; i++) {
        mean[i] = (mean[i] - shift) * scale;
        logvar[i] = expf(0.5f * logvar[i]) * scale;
    }
}

void sc_vae_unnormalise(const sc_vae *v, int64_t n, float *latents) {
    for (int64_t i = 0; i < n; i++) latents[i] = latents[i] / v->config.scale + v->config.shift;
}

void sc_sample_posterior(sc_rng *rng, int64_t n, const float *mean, const float *std, float *z) {
    sc_normal(rng, z, n);
    for (int64_t i = 0; i < n; i++) z[i] = mean[i] + std[i] * z[i];
}

/* tokens[b, i/2, j/2, (c, i%2, j%2)] <-> latents[b, c, i, j] */
static void sc__pack(int64_t batch, int64_t channels, int64_t h, int64_t w, float *tokens,
                     float *latents, bool pack) {
    for (int64_t plane = 0; plane < batch * channels; plane++) {
        int64_t b = plane / channels, c = plane % channels;
        for (int64_t i = 0; i < h; i++)
            for (int64_t j = 0; j < w; j++) {
                int64_t token = (b * (h / 2) + i / 2) * (w / 2) + j / 2;
                float *packed = tokens + (token * channels + c) * 4 + i % 2 * 2 + j % 2;
                float *latent = latents + (plane * h + i) * w + j;
                if (pack) *packed = *latent;
                else *latent = *packed;
            }
    }
}

void sc_pack_latents(int64_t batch, int64_t channels, int64_t h, int64_t w, const float *latents,
                     float *tokens) {
    sc__pack(batch, channels, h, w, tokens, (float *)latents, true);
}
void sc_unpack_latents(int64_t batch, int64_t channels, int64_t h, int64_t w, const float *tokens,
                       float *latents) {
    sc__pack(batch, channels, h, w, (float *)tokens, latents, false);
}

/* ==== Unicode =================================================================================
 *
 * What the tokenizers ask of characters: which are letters or numbers, their lower case, canonical
 * composition (NFC) and graphemes (what a reader takes for one character). The tables were read off
 * the library whose token ids ours have to equal, and are packed: a number is a few digits of base
 * 21 and a last one of base 70, printed from '#' on without the backslash.
 */

enum { SC__LETTER = 1, SC__DIGIT = 2 };
enum { SC__EXTEND = 4, SC__SPACING = 8, SC__CONTROL = 16, SC__PREPEND = 32, SC__PICTURE = 64,
       SC__CONSONANT = 128, SC__LINKER = 256 };

/* Packed by test/make_unicode_tables.py, as tokenizers 0.22.2 has them. */
static const char sc__word_table[] =
    "S5'+U%*U%S#%+%'%#%'#'$#%%''%O%%`%%w'%(9%2+%+&%k`+%%%%&)%%#%*&%$%%%&%$G%%l;%%mf%,nU%%k'%&#%*k"
    "-%k%W%()%Qk1%95'(%%%l[%%#%3%%+%%$5'$'%&#%4&%$[%AlG%/#%25'$d%-%%(#%)M%(#%-#%'#%;S%+7%)Q%%-%5k"
    "/%_kG%'#%6#%+5%(5'%A%(1%&%%&M%%/%%#%')%'#%4#%1%%%'%(5'$%%&-'&#%,-%(%%&M%%/%%%%%%%%%%C)%%#%+5"
    "'&'%43%%'%%M%%/%%%%%+%'#%6#%3%%(5'-#%/1%&%%&M%%/%%%%%+%'#%B%%%'%(5'%#%$-'/&%$+%''%%)%'%%%&%$"
    "#%'%%''%'9%:#%9;'61%%'%%O%%A%'#%>'%&#%&%%(5',/'%#%(1%%'%%O%%5%%+%'#%C%%%%%(5'%%%53%%'%%k-%&#"
    "%4#%)'%%/'$'%(G'%-%)E%'Q%%3%%#%&/%C5'5k;%%%%0/%-5'K%%%&%$)%%Q%%&%$3%%%%-#%&+%%#%-5'&)%D#%CI'"
    "01%%k#%?+%kQk1%8#%$5'*-%()%'#%'%%+'%(;%0#%%5'*k'%%#%)#%&k1%%sE%%)%&/%%&%$'%&k-%%)%&d%%)%&/%%"
    "&%$'%&?%%kM%%)%&kb%2I''A%4lA%&-%'{S%&C%%U%)l+%'''$1%+E%1G%2E%2;%%'%3kC%G#%(#%'5'*5':5'*lG%++"
    "%&f%%#%)kh%.`%K5'$^%&+%/k3%(U%*7'IO%-kE%O5'*5'1#%k;k9%51%'5'M^%1%%$5'$k3%>k#%@5'''%$5'$k#%&7"
    "%)k1%&'%M)%%-%%%%'#%)oC%eqd%&-%&k'%&-%&1%%*%$^%&kE%%/%%#%''%%/%')%&-%(;%)'%%/%kQ#'$#%&-')#%$"
    "5'*;%kC#%(#%&5%%#%'+%**%$'%%7%&)%)+%(#%%kA'$%%$+'t>kS'k,M's$^'z0pG%*)%'%%-#'&k'%%#%)#%&kK%+#"
    "%4O%-/%%/%%/%%/%%/%%/%%/%%/%k.#%pU%%$#'=3'++%&''$%%(lA%*'%%lI%%)%)k1%%lQ%')'.b%TA%D5'B1'%?'D"
    "5'K?'nLr~9%eksm%%hk7%&qQ%'A%$5'$%%8k9%4`%&kh%$5'K3%&ld%&kb%&%%%&%$/%9A%%'%%)%%O%1-'.kC%2k?%@"
    "5'<-%'&%$#%%5'$Y%.O%=[%+k9%@#%$5'*+%%5%$5'$+%%k-%;'%%1%(5'*O%'#%'k?%%#%'%%&+%&&%<'%&7%+'%0-%"
    "&-%&-%-/%%/%%k1%%=%*m5%15'*yn/%0O%(k=%oyXtA%&m#%J/%0+%)&%$3%%;%%+%%&%$&%$&%$m%%Et;%6k[%&kG%L"
    "9%kR+%%m^%75'+U%*U%/lG%'-%&-%&-%&'%G9%%U%%G%%%%%?%&=%FmE%0k5'0kM'5%'mF[%'k=%4W'(b%$)'-I%$#'$"
    "1%$#')k'%.^%&k#%(1%%+'NnE%&5'*k#%(k#%(k+%,kC%07%%?%%/%%%%%7%%?%%/%%%%'kC%0r`%-M%.1%<-%%k/%%3"
    "%k#-%&&%$k1%%%%'#%&O%&1'$O%&/'$`%,3'TG%%%%)+'$M%$-'(U%k$kK%(%'$%%$A'&k7'$#%3)%%'%%[%.3';[%$%"
    "'%[%$''D1%%Y%*+'4kG%.M%&1'$G%)1'$E%;/'k.l'%[kA%1kA%+-'$k#%05'*5'$Y%-O%m,`'%k/%*%%4'%`[%$5'$#"
    "%,M%/)'?E%RK%$/'8O%0kE%>^'%%%&#%1k5%DS%+5'-k#%35'(#%&#%,h%'#%0k;%2)%/5'$&%(I'/E%%S%7%%d/%%&%"
    "$'%%?%%5%+k9%55'/1%&%%&M%%/%%%%%+%'#%6#%0+%B5%%#%&&%$k%%%#%=&%PkE%6)%)5')'%Bk;%8%%%#%,5'l>k9"
    "%M)%Hk;%8#%/5'Jk1%1#%+5'*I'@W%99'(/%lQk3%kRk[%$G'01%&#%&1%%%%%Q%3&%25'k$1%&k)%4&%@#%.k+%+#%9"
    "#%/k7%7#%6l'%l`d%35'*3%%k%%5#%3[')^%kN/%%%%%k'%9#%-5'*-%%%%%b%2#%+5'nBG%3&%$9%%f%@5'k4#%3K'O"
    "ko9%kDm-'5oK%kzRlW%3ksM%5-%=os+%)zO%nwW^%65'kmZz3%+`%%5'*l3%%5'*^%6k;%4)%05'%/'%K%)G%p0k5%'5"
    "'l_k[%$O'kGl+%)#%g;%e%%%#%@rq7%,kx;%M5%pkQ)%%/%%%%%r7%3#%A'%&#%2)%,u7%kuim%%);%'3%+5%l{X5'kj"
    ",I'0I'kJS'kfl?%%l#%%%%&#%&%%&)%%9%%&%$-%%k^%%)%&1%%/%%Y%%)%%+%%#%'/%%sS%&S%%S%%`%%S%%`%%S%%`"
    "%%S%%`%%S%%1%&k?'knN`%*-%mWkW%l*k5%./%&5'(#%nM^%6k3%(5'pVY%(5'm(^%&#%$5'pf/%%)%%%%%?%%oM%&3'"
    "Tkd%+#%(5'u9kQ'%''%)'k*k5'%?'lZ)%%W%%%%%#%&&%$3%%)%%&%*#%(*%$%%%%%%#%&.%$&%&)%%/%%)%%)%%&%$3"
    "%%C%)'%%+%%C%r8;'k|^5'xVlzlI%DowQ%*p9%&q{M%2tmE%3{W%kx4yC%kjHpy)%)oxW%";
static const char sc__grapheme_table[] =
    "$`Ck=dC-#k^'#C$#k^rEm/+mf/+mYk5+%&+$&+$&+]-r3.7+%#CRK+4#+kC/+$#r3%-+&%+%)+E#r3%#+BW+k97+_3+-"
    "#+<)+%3+%'+%++O'+X%r3)3+NQ+$#r3$b+$#35k%mQ$#+$#3$#+%'3$1+$)3$#qA$%3%/+$1mQ&%+81mQ%#+$%35ImQ%"
    "/mQ%#mQ')mQ&&+$%3$)+&%3&%3$#qA-#+(%mQ%#mQ&%+0%mQ0#+&%+$#3]#+%'3$%+(%+&'+'#+B%+'#+/%+$#35ImQ%"
    "/mQ%%mQ%+mQ&#+%'3$++%%+$&3$#3$#qA8%+9#mQ$-+%#+$%35ImQ%/mQ%%mQ%+mQ&&+$#+$#3$)+&%3&%3$#qA+'+(%"
    "mQ%#mQ&%+1#mQ4#+`#+$#3$#+$%3''3%'3$#+-#+L#+$'3$#+4ImQ%AmQ&&+$%+$)3%'+%'+$#qA+%+%'mQ+%+A#+$%3"
    "]#+%#3$%+$#3$#+$%3%'+%)++%+/%+3#30%+$%35k'mQ$%+%#+$%3$)+%'3%'3$#qA$#r3,#+.%+A#+$%3k$#+(#+$%3"
    "$'+%#+%/3$#+6%3b#+%#3$/+01+k@#+%#3$3+//+k'%+?(+(%3U=+$#3$++%%+)7+%k#+-#+kD)+$#3$-+%%+$%3$%+;"
    "%3$%+('+4)+1#+%#3$%+*#+3#+t''+wH)+@'+A%+B%+e%+$#3$/+$13$#+$%3$7+-#+Q'+$#C$#+kS%+F#+kT'+$)3$%"
    "+$'3(%3$#+$-3$'+m-%+$%3$#+^#3$#+$#3$/+%&+&1+$-3$5+&#+T`+U)+$#3S5+$)3$'+J3+0%+$#3B#3$)+$%3$-+"
    "]#+$#3$%+$'3$#+$#3$++T13$1+$%3$%+l0'+%;+$#3$/+(#+*#+&#3$%+l_k[+qE#C$#+$#3$%C</C1#k^0#k^:ACk>"
    "d+U#k^:#k^k8-k^3%k^o5%k^0#k^k=#k^k$#k^=7k^('k^l`#k^m9%k^.#k^-#k^_)k^%-k^%9k^%m3k^.m;k^&7k^%&"
    "k^*#k^'#k^*#k^.%k^3#k^&#k^(&k^('k^%#k^/+k^Q'k^-#k^2#k^2#k^o:%k^pO'k^7%k^W#k^(#k^o`'+l%#+k>b+"
    "qe-+$#k^0#k^k9%+q6&k^~mO)+%5+D%+k.%+mc#+'#+(#+;%3$%+$#3(#+k1%3VA3$%+>E+1#+J1+=7+$#3$#+P'+$#3"
    "S#+$%3$)+$%3$%+$%3$#+H#+h-+$%3$%+$%3$%+0#+,#+$#3R#+W&+$%+&%+)%+%#+M#3$%+$%3)#3$#+m>%3$#+$%3$"
    "#+$%3%#3$#+wzN#+tIA+4A+lh#Cl6%+k.9Cq;#+m4#+l-++kla'+%%+))+L'+(#+l=%+r1)+f++nI%+k-)+k$7+U)+kX"
    "#3$#+$#3Y?+M#+&%+.'+$#3Q'3$)+$%3$%+&#r3(#+.#r3V'+H++$#3$1+4%3P#+0%+$#3T'3$3+$#3$#+%%r3))+%#3"
    "$#+k:'3$'+$%3$)+*#+&#+l5#+$'3$1+9%+$%3[%+%#+$#3$#+$)3&%3&%3$#+-#+.%3&/+'++h#+$%3$-+%#+&&+$%+"
    "$&3$#3$'+$#r3$#+2%+k0'3$1+$%3$'+$#3$#+;#+k/#+$%3$-+$#3$#+$%3$#+$#3$%+$#3$%+m=#+$%3$)+&)3$%+$"
    "#3$%+?%+k0'3$1+$%3$#+$#3$%+kH#+$#3$#+$%3$1+kC#+$#3$#+&)+$#3$++mR'3$3+$#3$%+mG#+$+3%%3&)+$#r3"
    "$#3$#r3$#3$#+l%'3$)+&%+$)3$#+'#3@5+L-+$#3$#r3$)+,#+--+$%3$'+L-r3$;+$#3$%+o[#3$/+%-+$#3$#+k0M"
    "+%#3$/+$#3$%+$#3$%+kX-+'&+$&+$-+$#r3$#+g+3%%+%%3$#+$#3$#+nh%+$%3-%+$#r3$#3T%3$++'%3$'+;#+mwA"
    "#+*?+qzZ9+$'3$'+kxR++`/+xi#+%kI3+)+k/#+/%+wq?%+mn3k7+&O+qX++'-+,1+&/+B)+l,'+kq7kI+(k?+,#+2#+"
    ":++%?+}B/+%C+&/+%%+%++kB#+l8/+o=#+b)+q6)+mP%+tH/+kK/+kmIq7k^1'k^C#k^a-k^0%k^2#k^&5k^6kMk^?""?k"
    "^.#k^8#k^&3k^%)k^-v=k^$++$s'k^,qKk^TmOk^kR9k^k3k1k^0)k^]1k^.-k^L1k^Bl9k^0k9k^%5k^%vKk^mRkr/k"
    "^kntj4lU+k_p^+";
static const char sc__lower_table[] =
    "eUdkCOd%/dER%'(%&2%&P%%#mB$(%'#p#$&%%#ob$#%%%o`$#%&#l5$#oY$#o[$#%%#o`$#od%#p%$#oh$#%'#p%$#p)"
    "%#p+$(%%#p3$#%%#p3&#%%#p3$#%%%p1$&%%#p5$#%'#%+#'$#%%#'$#%%#'$4%&4%&#'$&%%#lX$#kL$J%%#mT%4%+#"
    "xxA$#%%#nP$#xx;&#%%#oJ$#kh$#l%$,%n-&%'#%,#m9*#k)%'k'%#k^%%k[%Cd%3dG#3,:%)#kT&#%%#0$#%&'mT$Al"
    "7$bdTD%-X%%#A$0%&k<%&k'k=k~7k's|I%#s|I)#s|It:l5lt|?$-3kt=#%*k1nke&'nkenLl,%-#tqJ%k<%-12,-2.1"
    "2,12,-2/*2,12<12,12,12,%2$%l*$#4/)lB$#4/%2$%l_0%2$%m0$#0/%mP$%mL$#4n5#tnX'#urF$#uo&*#[QAC7#%"
    "uTUWko8k;k=T#%%#xve$#omg$#xvD&(%%#xwi$#xw*$#xx($#xx&%#%&#%,%xxi$k@%,&%(#%kjlOP%7>%kf0%'a%.&%"
    "%#lpkD$,%(#%%#lyti&&%'6%%#lyuZ$#lyv*$#lyui$#lyuT$#lyuZ%#lyt<$#lyu&$#lytB$#koG$2%%#k<$#lyuX$#"
    "lplg$&%%#lyvZ$2%%#ly}$<#%ym[Ud{Ck+k-kgk#k-l47k+%?k+%/k+%%k+kn8kAk^l5Mdk~(bdx|TbdeSYkjp1fh";
static const char sc__class_table[] =
    "thKpK$#pO$)p7$#pO$#p/$+p7$%oY$)p7$%oY$7p7$+%$)p7$1pK$#p`$#pK$'p7$'pK$%p7%'pK$)p7$#pK$#pO$%p7"
    "$#pK$#pQ$%pS$#pQ$%pS$#pQ$;pKmf+pKm[#p7$)pK$#p7$'pK$#p;$#p7$-pK$-p7$%pK$#p7$%pK$#p;$#pG$#pK$#"
    "7$#9$#;$#=$#?$#A$#C$#E$#G$%I$#K$#M$#O%#Q%#S$#U%#pK$#p7%#Gk&1pK$#`$#b$#dT#Y$#[$#^$#`$#b$#d$#f"
    "$#h$%pK$%p7$+pK$#p7$%pK$#p74#k#kC/pK&)pK$#p7$#pK&%pK%#p7$%pK$#p7G#k%B#pK$#p7$%pK$#p7$%pK$'p7"
    "$#pK$%p7$#pK$#p7$'pK$#p7$#pK$#p7$#pK$#p7$#pK$#p7$%pKl8/pK$#p7$#pKF)pK%3pK%'pK%+pKO'p7kV=pK%#"
    "p7$%pK$#p7$%pK$#p7$'pK$'p7$#Y$#[$#^$'pK$#p7$%pK$%p7$+pKa#14#5'#pK$#p7$%pKkE#14#5kL#14#5kL#14"
    "#5kL#14#5k^#5k^#5+#l?$#lMkC#14#5k^#5kZ#5kK%lf$#51)m'kJ%m=2)mEk*%p7?&p7%#p/[#mS$#mU%#mY))mU&#"
    "mU%%pK$#5%%pKc#p7kN#1%%5k0#p7t7'pKwJ#5C#5l5#5.#pKld#pGl'#p;$#pK$#p7m-#pK$#p7k%#581pK&#p7T+pK"
    "$-p7$%pK$#p7kT#13#5J#pK$#p7$/pKZ%5_#1/%5h#1l0'pK%#%$+p7$%pK$)p7$#pK%/%(#p7*#pK'%pKl_%pK$#p7$"
    "/pK$#p7$%pK$#pS$#p+$#p7$#oY$k%pK)#pK$#pQ$#p7$#pK$#p7t8%pK$%%$)pK$'%$%pK(#pK'%%$#pK$#p7$#pK$%"
    "%$)p7$#pKlka'pKl%#5k>bpKqe#p3$#pG$#pO$#p;$%p?kG%3~te#pK(5pKD%pKk.%pKmg#5lU#5?EpK^'p7I#5k=#10"
    "#5mA&pK$#pK$#p7&%pK)%pK%#pKX#5mH#5wzN#Wu#/pK$/p7$%pKwd#p7m4#p7l-+pKkm&#p7%#pKL#pK$#%$#p7(#5l"
    "=#pK$#p7}Q#5]#5^#5$#1k#'pKT%5c#1k*#5-#1kH#5$#1lJ#1$#5k/#14#5</pK'+pKlf#5'#1kY#5$#1mM#5$#1k]#"
    "5kT#5$#1kQ#5|K#5wxZ+%`/pKxmU#%mvi%p/$'%'#pC$+p/,1p7&+pK$%p7B)pKl,'pKlr3/pK%CpK&/pK%%pK%+pKkt"
    "O/p7kK-pK$#1";
static const char sc__composed_table[] =
    "oEk`kjf%#%%#%%#%%#-%#'''^%'k*%#%%#%%#/%+2%#%%#%%#/'-,%%(%#%%#%%#%%#-)/2%#%%#%%#/%+0)3$%#%%#%"
    "%#%%#-%#'''^%'k*%#%%#%%#/%+2%#%%#%%#/'-,%%(%#%%#%%#%%#-)/2%#%%#%%#/%+0'#1%kL*%d#%c'%d#%ch%d#"
    "%_k*%d#%c%%d#%c-%d#%c-%d#%a#%d#)a2%d#%c'%d#%c%%d#%cf%d#%cZ%d#%_6%d#%c+%d#%c%%d#%cd%d#%ak&%d#"
    ")a%%d#%c%%d#%c'%d#%ch%d#%ce+%,%d#%ak'%d#'ak(%d#%ck)%d#%cX%d#-_8%d#%ck)%d#%cX%d#+a2%d#%c'%d#%"
    "c-%d#)]6%d#%ck)%d#%cX%d#%a8%d#%c%%d#%ck'%d#%cX%d#%aY%d#%cX%d#)a4%d#%c%%d#%c'%d#%c+%d#%c%%d#%"
    "c^%d#%_k(%d#%_#%d#%c/%%0%d#%c/%d#%c-%d#hk2A%d#?V#%d#^kD@%d#%R#%d#%V#%d#%V#%d#%lf2%d#%c(%d#%c"
    "9%d#%c:%d#'kL+%d#%s1#%%#%t(#%d#)nH3%d#%Z#%d#%Z[%d#%t^k$%%#%kD3%p5#%yX#+i8%d#)T$%d#%lE%%d#%a#"
    "%d#%>#%d#%o2?%d#%c'%d#%Z&%d#%c'%d#%Z&%d#%c'%d#%V&%d#%c'%d#%]&%d#%c'%d#%]&%d#%c'%d#%gM%d#%a#%"
    "d#)k4V%d#1k*,%d#%Zd%d#%m3i%d#%e#%d#%nV)%d#%vY(%%#%w@#%d#sQk;(%kj7#'+#%'#%'#'/#'/#%+#%f#Wk>1%"
    ";#%;0%+#%'#%'#%G#WF1%;#%.0%/#%+#-5#%#1k5kd2%#3'&0+<1-K0%&$%9/98#dd#Q(.%#3'&0+k#1-Z0%&$%9/Sk?"
    "5%%#l+lT4%d#?k(#%d#%c'%d#)X&%d#)nQ'%%#%oJ#%d#%a#%d#)a*%d#%c+%d#%V#%d#)n`#%%#%o<#%d#%k0*%d#%c"
    "+%d#%c)%d#%Z(%d#)Z#%d#rEwMkm)%#%%f#%e%%k#$n?mh#'J#EE#{){)kj533#))#n9n3mU%#Ut`thtf)#R%#Ul'l-m"
    "QkIkET%%#%$UmImQmOmAmCmO11#%#%'#J%+ImOmIm#%%#%$Un'n1m7'#-%),%(MzSz[zbmzImzIm{Q''#''#''#''#++"
    "#k/k/#''#)'#%%#')#~%srFrqi%d#%a_%d#%c[%d#%c?%d#%lbk<%d#%nP/%d#%c[%d#%c?%d#%c6%d#%c/%d#%nhk6%"
    "%#%$%%%#%oak5%d#%c)%d#%vbk0%%#%wZ%%d#%a(%d#%a)%d#%c[%d#%cX%d#%cb%d#%c1%d#%a'%d#%ldk:%d#%nR#%"
    "d#%ch%d#%c?%d#%a>%d#%tqba%%#%tr]k7%d#%c*%d#%ak4%d#%c/%d#%c[%d#%aZ%d#%c[%d#%c?%d#%c*%d#%lfk4%"
    "d#%c1%d#%lE2%%#%$%%%#%q2#%d#%c/%d#%_#%d#%c[%d#%trWa%%#%tsRk7%d#%ak0%d#%c[%d#%pMZ%%#%-#%%#%tl"
    "-#%%#%ts_#%d#%c[%d#%c?%d#%c*%d#%a4%d#%c;%d#%c(%d#%pfk4%%#%%1%%#%qc,%d#%cd%d#%ai%d#%c%%d#%c1%"
    "d#%c$%d#%c[%d#%aZ%d#%c%%d#%a$%d#%a,%d#%cf%d#%c?%d#%F#%;k.%)'%'#'qE(-s([%d#%cV%d#%lY2%d#%c$%d"
    "#%c5%d#%c.%d#%tqI$%%#%tpP$%%#%$$%%#%$5%%#%$.%%#%tpM)%%#%tv&^%d#%cV%d#%c.%d#%lb&%d#%c$%d#%c5%"
    "d#%c.%d#%tr#$%%#%tvN1%d#%cW%d#%V#%d#%cV%d#%lb2%d#%c$%d#%c5%d#%c.%d#%tr7$%%#%tm>$%%#%$$%%#%$5"
    "%%#%$.%%#%$d%%#%sD#%d#%cV%d#%rh2%%#%$$%%#%$5%%#%$.%%#%$d%%#%sZi%d#%ck#%d#%cV%d#%c.%d#1klIC%#"
    "%%stWJ%%#%$%%%#%$k`%%#%suRk:%#%%subJ%%#%$%%%#%$k`%%#%stak:%#%%su)J%%#%$%%%#)sv$G%#%%sv3J%%#%"
    "$%%%#)su6G%#%%suEJ%%#%$%%%#%$k`%%#%sv@k:%#%%svOJ%%#%$%%%#%$k`%%#%suRk:%#%%subJ%%#%$%%%#%$k`%"
    "%#%sv]k:%#%%sw%J%%#%$%%%#%$k`%%#%sugk:%#%%sv/J%%#%$%%%#)sw*G%#%%sw9J%%#%$%%%#)sv4G%#%%svCJ%%"
    "#%$%%%#%$k`%%#'sw>k8'swOJ'#%'#k`%svLk:%#%%sv[J%%#%$%%%#%$k`%%#%swVk:%#%%swfJ%%#%$%%%#%$k`%%#"
    "%swVka'+#''#''#'/#'/#'+#+st'kh%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%E#%%#%%#%%#%%#%%"
    "#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%k?#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%swckZ%#&%sw"
    "fk`%swe#%,#'-(%syf)%sz_kZ%#&%#*'#kh-kj6(%ty5)%swa#%4#'5(%sz3)%s{0kg''#'#kh%szfkg%#%%#k`%sygk"
    "T%#&%E*+Dkb%E#%k>kT%#&%#*)s|S#%#%%#k`%s{@kT%#&%/*'6I%#%%+k9%/#%k(kT%#&%#*'*K%kjVJ-tyEkh%swL#"
    "%-#',(%s{))%s|6kg'7#'#khu^trU<%'#I'#bkU#%+#%&#kGk?#--#))#SS#''#YQ#)1#)'#')#Qu{i#'u|U#9J#%u|."
    "#%'#%u|Y#%%#)=#%%#))#%%#1)#%%#)1#%%#))#%%#k#Y#%/#%%#%'#k?k:#%%#%K#%%#1d#%%#%%#%%#nw[ny=yzd''"
    "#''#''#''#''#''#''#''#''#''#''#))#''#''#11#%#%')$%#%')$%#%')$%#%')$%#%QkF$7lE#?""?#''#''#''#''"
    "#''#''#''#''#''#''#''#))#''#''#11#%#%')$%#%')$%#%')$%#%')$%#%QkF$)l)#%%#%%#%%#+9#mx|Imx|Imyk"
    ";''#A7#mWn#m+%%#yAy3y7%#UtEtKt-%#6'#=q1q7pd%%#";
static const char sc__split_table[] =
    "klbkk/kjhllCll5lmK%%#%%#%-#%-#%%#%5#%+#mKm5mQ%%#'=#l?mWmQ)/#k#g#%%#%-#)A#q5q%q9%%#kqGks/kuY7"
    "7#--#--#--#=X&7k?kc'#'%k`;'%#5ka#GfkK77#--#--#--#=X&ssEstSnq:msu3v|V|/'U)947%#%%nksW$%#%%nkt"
    "B8%#%%#+%%#%%#%%#%%#%%#%%#''#%%#%%#%%#%%#''#''#%%#''#%%#''#%%#%%#%%#%%#%L(%*/%7#%5#muuUqwjIq"
    "wl#%%#%15%#%%#%%#%%#%lElK<%%#%%5%%#%$%%%#";
static const char sc__replaced_table[] =
    "klYkjf%%'Gk?lJ7|25mIsy/kjO'%'%'%'^'%'%kYl&)kC9k>'%313.3k)3g)4%kki7kl1')'~a)t|h%%r=s|<+kmN%mE"
    "xKzsS%%mut'kulU%wj$%w|=%xR%ts.%uqL%k~S%koq[%#%kmt,%}x5%~~g%kpC%mjE%qlK%mmO%lq1%t^%s)%lwG%wrg"
    "%kkQ%kp=%kk)%oxW%nv=%l~=%kooV%ky1%rn9%ls`%p~[%rq+%kkui%pt)%qw'%ko5%ws<%t{/%lmd%xr8%l|U%ln5%k"
    "}W%tr+%kkyD%z%%rA%pnd%ll9%ltf%kx?%mmK%ll%%lC%lw?%mnW%kt#%|M%wjX%pf%ks1%lm'%op?%m~h%p{Z%{rB%l"
    "lf%tnW%ks+%n}0%ln`%p~'%muQ%kjw<%knb%nz-%kpO%r^%n}9%qI%rr+%kltF%y}A%zoB%B%xj`%koK%lm;%psA%m{,"
    "%xmN%ltQ%ut5%kjmD%nz'%ksE%pz9%wh%u~2%wn-%xqL%ou?%plZ%txb%luL%ro)%xrL%kvS%tx)%nw-%lnQ%tz6%vu%"
    "%vo,%mpX%ul;%t|T%pmh%wt.%}h%lW%q}/%ql1%k}C%l};%ls+%kj|T%sG%kzh%k}%%lr)%muY%mn)%s}I%kwQ%ksI%k"
    "K%kou:%qjG%kw9%vtU%{ja%kkW%m1%}%%mx'%yU%klY%k{A%ksC%|-%olO%muV%m|h%kl'%kkxa%n#%y=%sz+%rq=%wf"
    "%yoe%rK%knY%l{h%oz-%mk4%vyB%l{+%ky'%w;%{A%p{5%o3%m|`%nd%po-%kw[%l;%of%knoP%xx1%rqU%kyS%|yZ%p"
    "r4%{%%m|%%l9%mo?%ku5%ly%%kuK%olU%nj+%oo1%}|&%zvG%kluX%qp1%mA%k{[%sd%k|S%sM%kkC%kvh%stU%kmxa%"
    "o{I%|nC%kmt0%ntK%o|#%uv1%zv8%vM%lqd%m~Q%vmh%kl{$%wb%l|h%mq[%s#%sb%kt#%lt-%wM%mq-%mo7%G%ml3%k"
    "z1%kluT%sv#%soP%tq3%~;%pk-%oz`%k~U%zS%}mF%lm=%qj+%lt$%lA%tK%mr]%yV%spO%kjl0%|oU%{k6%kB%nr9%k"
    "sI%sk5%uvR%plU%lnc%xlA%lrT%n|A%ns8%x|B%ny6%kud)}%'n}-)qmJ%uvI%koG%{b%h%1%k1%tq[%soF%kjd'ln9'"
    "kx^)k{?%oO+lz+%=%k5%kv5%nsa%ljY%kmyJ%rf%ld%t`%Y%m+%z[%m#%l[%wE%lh%kp9%7%ks;%p'%k)%l`%kmM%n1%"
    "o#%x7%ky/%nQ%qI%z[%o?%x=%kuA%nf%9%$%3%/%1%k=%%%o)%k`%s+%z+%M%kM%rU%n1%wf%n#%#%wQ%kwI%m^%t=%k"
    "M%uU%kG%}M%mU%lpY%r+%kU%}re%rjjf%qspc)|ke%ko%%l0%we%vf%kS%s;%kC%}7%l&%kf%l)%|'%lI%n-%C%qU%oQ"
    "%ko[%1%n+%kf%rI%m=%ki%m^%k8%n/%kb%uA%lG%kI%qA%r/%nQ%+%kS%ks5%k`%u/%uU%B%lE%q1%sM%lmG%k|]%mE%"
    "mG%s;%n5%kG%pC%'%nb%E%U%lC%6%u9%w`%qW%o;%p?%n=%sA%oS%km-%nE%knb%w%%kh%C%rE%kO%k6%kI%(%D%l/%l"
    "9%td%z#%rh%rA%p9%krA%lf%m7%m[%k%%;%k=%~Y%kv1%ptz/%.%njM%rqvi%kuY%f%rzw%%mx#%u{Y%q~jP%l-rsq)k"
    "qpX%,%5%qns^%qnkN%l3%=%l%%mA%b%l3%R%s{0%qymM%qomZ%1%C%I%qnyA%qxyP%s~Y%k)%qnz-%qny_%=%~Z%kj%%"
    "5%sux3%suv>%?%tm,%tnW%9%k5%-%tnc%tq1%'%Y%O%9%%%E%kA%3%5%U%7%'%#%#%qozM%pzxc%s~H%M%qpkW%qpk>%"
    "/%M%n;%lc%C%d%kQ%l?%W%kd%C%f%#%M%G%3%A%sU%qX%q[%oP%k#%ku<%lrE%r2%k)%U%mT%nY%$%mG%qqy-%qqw,%-"
    "%A%K%3%k^%qrk`%kb%qq~Z%k;%;%l4%n'%vq@%?%vuQ%kI%#%qru+%qrq8%M%A%;%qryI%qry0%1%km-%kl:%vyc%v{S"
    "%?%l;%kB%qstM%qso>%qsoC%qsn2%(%E%lb%%%wlV%wmG%k3%M%k5%wo,%rlqO%rlpa%wpA%)%)%K%swp#%swnF%qttG"
    "%#%p}p@%vm&%#%wqH%rrnM%zrW%rumg%5%wr]%wt/%kC%7%h%mb%wx6%_%wyS%qunG%qum&%mS%+%'%&%k9%K%k%%>%9"
    "%k;%K%+%W%9%kb%l?%k#%mI%quy=%quyc%k_%m)%Y%lY%qu{S%quyc%lP%Z%xs>%xxb%M%b%k(%xwF%x}S%^%qvyC%qv"
    "v&%qd%ni%yja%ylf%ym@%k$%q|b%)%qsQ%l_%skQ%kjmc%voY%+%/%kW%8%qwqY%rqxa%yub%m:%o`%kC%qwmb%qwmN%"
    "m.%q#%y{H%y|`%lY%l%%oA%qwnA%qwlg%zp$%zr%%qwyU%qwx4%zqe%zr[%k7%Y%%%qxn1%to]%trf%qxm*%qxyh%qxv"
    "V%?%lc%o#%k-%kO%kH%k-%A%=%qxsb%qxv0%q/%k[%{m(%{oW%*%qxw+%qx|i%tQ%qxv=%k=%qxu2%m7%X%(%{vF%{w`"
    "%kC%.%kI%px|?%pxx&%qyj#%qx|F%qypb%qyla%=%Y%qy}%%qy{P%M%qznQ%p=%qznD%E%|rT%|sC%|s*%#%|wW%M%M%"
    "K%kh%|xP%|{3%q{kI%q{jZ%q{mA%q{ki%qll`%qk}6%q{}[%Q%n#%ry~i%;%}lU%q|kf%$%k+%W%q|lJ%%%#%k3%}mX%"
    "}oO%}o4%l7%r{lW%q|y0%kY%k^%}se%r{yA%q}kH%q}n`%k3%q}nB%lO%}yg%}|?%7%-%q}|^%rI%#%q~k]%}{:%r}oM"
    "%q~m(%)%~kH%r}tO%q~kF%~oP%~p7%,%^%rjk9%q~}D%~q$%~sb%kS%kd%~v$%sjl9%b%sjl,%sjp9%rjqF%rjt?%rjs"
    "N%lb%9%rj|1%l)%rj{R%rkjE%rkj$%qnt3%rnvF%kjn/%l9%kjne%kjpO%wr_%rx{M%?%|m8%5%qnjF%)%nyE%kon$%k"
    "jwK%.%G%zxB%zy%%'%7%k/%rlk^%rlk_%kM%l#%l+%me%n?%k1%m1%q@%m?%'%C%rlkf%r^%n6%smm$%kknC%'%k#%rn"
    "p?%rnn.%rlv?%sm|T%+%snk?%r5%sns<%kkvQ%;%9%'%k^%e%m^%k4%n9%l8%kd%Y%kk|@%klj%%d%kk~g%kllS%)%rn"
    "k=%rm}&%1%klnJ%klo=%krq0%sv~d%o5%sp~@%5%klw5%l1%nE%o[%rn|5%rnyZ%O%lK%lO%roqC%k~tN%poy@%@%kE%"
    "po~M%pox(%l`%rqk/%Y%rpvi%lQ%d%rp|M%rp|8%r-%nI%%%lN%tb%[%rqtO%rp~e%kosL%kot`%rqsK%sv|*%koz1%}"
    "|>%~j-%rrp#%p)%sxp,%3%ko~3%rr~`%sx|<%syk=%rslN%#%`%rst#%rsnT%kpk0%kpm3%mM%Y%kU%kpna%sz~I%rtq"
    "X%rO%o?%kp}D%b%kqjO%rut[%s|u*%s|vS%qK%mW%ruwg%kqq:%kqs+%-%1%7%1%k'%rvxA";

/* Of the code points first, first + stride, ..., last. */
typedef struct sc__run { uint32_t first, last, stride; int32_t value; } sc__run;
typedef struct sc__runs { sc__run *run; size_t count; } sc__runs;
typedef struct sc__pair { uint32_t whole, first, second; } sc__pair; /* second 0: one for another */

typedef struct sc__unicode {
    sc__runs word, grapheme, lower, class_;
    sc__pair *pairs;            /* decompositions, sorted by `whole` */
    sc__pair *composed;         /* those that NFC makes again, sorted by `first`, `second` */
    size_t pair_count, composed_count;
} sc__unicode;

/* Code points; running out of memory is noticed once, at the end. */
typedef struct sc__codes { uint32_t *code; size_t count, room; bool failed; } sc__codes;

static void sc__codes_add(sc__codes *s, uint32_t c) {
    if (s->count == s->room) {
        size_t room = 2 * s->room + 64;
        uint32_t *code = (uint32_t *)SC_REALLOC(s->code, room * sizeof *code);
        if (!code) { s->failed = true; return; }
        s->code = code;
        s->room = room;
    }
    s->code[s->count++] = c;
}

/* The code point at *text, which moves behind it. What is not UTF-8 becomes U+FFFD, one for each
 * longest beginning of a character, as in Python and in browsers. */
static uint32_t sc__utf8_decode(const char **text) {
    const unsigned char *s = (const unsigned char *)*text;
    int size = *s < 0x80 ? 1 : *s < 0xc2 ? 0 : *s < 0xe0 ? 2 : *s < 0xf0 ? 3 : *s < 0xf5 ? 4 : 0;
    int low = *s == 0xe0 ? 0xa0 : *s == 0xf0 ? 0x90 : 0x80;
    int high = *s == 0xed ? 0x9f : *s == 0xf4 ? 0x8f : 0xbf, i = 1;
    uint32_t c = size == 1 ? *s : *s & (0x7fu >> size);
    for (; i < size && s[i] >= low && s[i] <= high; i++, low = 0x80, high = 0xbf)
        c = c << 6 | (s[i] & 63);
    *text += i;
    return i < size || size == 0 ? 0xfffd : c;
}

/* ---- Tables ---- */

static uint32_t sc__unpack(const char **s) {
    uint32_t n = 0, digit;
    do {
        digit = (uint32_t)(**s - 35 - (**s > '\\'));
        ++*s;
        if (digit >= 70) n = n * 21 + digit - 70;
    } while (digit >= 70);
    return n * 70 + digit;
}

static int32_t sc__unpack_signed(const char **s) {
    uint32_t n = sc__unpack(s);
    return n & 1 ? -(int32_t)(n / 2) - 1 : (int32_t)(n / 2);
}

/* A table of runs: the gap before each, 2 * (count - 1) + (stride - 1), and the value. */
static bool sc__unpack_runs(sc__runs *r, const char *table) {
    uint32_t end = 0;
    r->run = (sc__run *)sc__alloc(strlen(table) / 3, sizeof *r->run);
    while (r->run && *table) {
        sc__run *run = &r->run[r->count++];
        run->first = end + sc__unpack(&table);
        uint32_t span = sc__unpack(&table);
        run->stride = 1 + span % 2;
        run->last = end = run->first + span / 2 * run->stride;
        run->value = sc__unpack_signed(&table);
    }
    return r->run != NULL;
}

/* A table of decompositions into one or two code points, each number less the one above it. */
static void sc__unpack_pairs(sc__pair *pairs, size_t *count, const char *table, bool two) {
    for (sc__pair p = {0, 0, 0}; *table; pairs[(*count)++] = p) {
        p.whole += (uint32_t)sc__unpack_signed(&table);
        p.first += (uint32_t)sc__unpack_signed(&table);
        if (two) p.second += (uint32_t)sc__unpack_signed(&table);
    }
}

static int sc__by_whole(const void *a, const void *b) {
    const sc__pair *x = (const sc__pair *)a, *y = (const sc__pair *)b;
    return (x->whole > y->whole) - (x->whole < y->whole);
}

static int sc__by_parts(const void *a, const void *b) {
    const sc__pair *x = (const sc__pair *)a, *y = (const sc__pair *)b;
    int order = (x->first > y->first) - (x->first < y->first);
    return order ? order : (x->second > y->second) - (x->second < y->second);
}

static void sc__unicode_free(sc__unicode *u) {
    SC_FREE(u->word.run);
    SC_FREE(u->grapheme.run);
    SC_FREE(u->lower.run);
    SC_FREE(u->class_.run);
    SC_FREE(u->pairs);
    SC_FREE(u->composed);
}

static bool sc__unicode_open(sc__unicode *u) {
    size_t most = sizeof sc__composed_table + sizeof sc__split_table + sizeof sc__replaced_table;
    u->pairs = (sc__pair *)sc__alloc(most / 2, sizeof *u->pairs);
    u->composed = (sc__pair *)sc__alloc(sizeof sc__composed_table / 3, sizeof *u->composed);
    if (!u->pairs || !u->composed || !sc__unpack_runs(&u->word, sc__word_table) ||
        !sc__unpack_runs(&u->grapheme, sc__grapheme_table) ||
        !sc__unpack_runs(&u->lower, sc__lower_table) ||
        !sc__unpack_runs(&u->class_, sc__class_table)) return false;
    sc__unpack_pairs(u->composed, &u->composed_count, sc__composed_table, true);
    sc__unpack_pairs(u->pairs, &u->pair_count, sc__composed_table, true);
    sc__unpack_pairs(u->pairs, &u->pair_count, sc__split_table, true);
    sc__unpack_pairs(u->pairs, &u->pair_count, sc__replaced_table, false);
    qsort(u->composed, u->composed_count, sizeof *u->composed, sc__by_parts);
    qsort(u->pairs, u->pair_count, sizeof *u->pairs, sc__by_whole);
    return true;
}

/* The value of the run with c in it, or 0. */
static int32_t sc__run_value(const sc__runs *r, uint32_t c) {
    size_t low = 0, high = r->count; /* `low` ends at the first run that begins above c */
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (r->run[middle].first <= c) low = middle + 1;
        else high = middle;
    }
    if (!low) return 0;
    const sc__run *run = &r->run[low - 1];
    return c <= run->last && (c - run->first) % run->stride == 0 ? run->value : 0;
}

static bool sc__is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

/* ---- Normalisation (UAX 15) ---- */

enum { SC__HANGUL = 0xac00, SC__JAMO_L = 0x1100, SC__JAMO_V = 0x1161, SC__JAMO_T = 0x11a7 };

/* Appends the canonical decomposition of c. Syllables of Hangul are numbered by their jamo: 28
 * final ones (the first is none) inside 21 vowels inside 19 initial ones. */
static void sc__decompose(const sc__unicode *u, uint32_t c, sc__codes *out) {
    sc__pair key = {c, 0, 0}, *pair;
    uint32_t syllable = c - SC__HANGUL;
    if (c < 0xc0) sc__codes_add(out, c);
    else if (syllable < 19 * 21 * 28) {
        sc__codes_add(out, SC__JAMO_L + syllable / 588);
        sc__codes_add(out, SC__JAMO_V + syllable % 588 / 28);
        if (syllable % 28) sc__codes_add(out, SC__JAMO_T + syllable % 28);
    } else {
        pair = (sc__pair *)bsearch(&key, u->pairs, u->pair_count, sizeof key, sc__by_whole);
        if (!pair) sc__codes_add(out, c);
        if (pair) sc__decompose(u, pair->first, out);
        if (pair && pair->second) sc__decompose(u, pair->second, out);
    }
}

/* The code point that a and b compose to, or 0. */
static uint32_t sc__compose(const sc__unicode *u, uint32_t a, uint32_t b) {
    sc__pair key = {0, a, b}, *pair;
    if (a - SC__JAMO_L < 19 && b - SC__JAMO_V < 21)
        return SC__HANGUL + ((a - SC__JAMO_L) * 21 + (b - SC__JAMO_V)) * 28;
    if (a - SC__HANGUL < 19 * 21 * 28 && (a - SC__HANGUL) % 28 == 0 && b - SC__JAMO_T - 1 < 27)
        return a + (b - SC__JAMO_T);
    pair = (sc__pair *)bsearch(&key, u->composed, u->composed_count, sizeof key, sc__by_parts);
    return pair ? pair->whole : 0;
}

static int sc__by_class(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* NFC of s[n]: all is decomposed, marks that follow each other are sorted by their classes, and a
 * mark joins the last starter (class 0) unless one in between has the same class or a higher. */
static void sc__nfc(const sc__unicode *u, const uint32_t *s, size_t n, sc__codes *out) {
    sc__codes parts = {0};
    for (size_t i = 0; i < n; i++) sc__decompose(u, s[i], &parts);
    uint64_t *order = (uint64_t *)sc__alloc(parts.count, sizeof *order);
    n = parts.count;
    for (size_t i = 0, start = 0; order && i <= n; i++) { /* in one number: class, place, code */
        uint32_t c = i < n ? parts.code[i] : 0;
        int class_ = c < 0x300 ? 0 : sc__run_value(&u->class_, c);
        if (i < n) order[i] = (uint64_t)class_ << 56 | (uint64_t)(i & 0xffffffff) << 21 | c;
        if (class_) continue;
        if (i - start > 1) qsort(order + start, i - start, sizeof *order, sc__by_class);
        start = i + 1;
    }
    size_t starter = SIZE_MAX;
    uint32_t last = 0; /* class of the last mark behind the starter */
    for (size_t i = 0; order && i < n; i++) {
        uint32_t c = (uint32_t)order[i] & 0x1fffff, class_ = (uint32_t)(order[i] >> 56), whole = 0;
        if (starter < out->count && (out->count == starter + 1 || last < class_))
            whole = sc__compose(u, out->code[starter], c);
        if (whole) {
            out->code[starter] = whole;
            continue;
        }
        if (class_ == 0) starter = out->count;
        last = class_;
        sc__codes_add(out, c);
    }
    out->failed = out->failed || parts.failed || !order;
    SC_FREE(order);
    SC_FREE(parts.code);
}

/* ---- Graphemes (UAX 29) ---- */

enum { SC__L = 1, SC__V, SC__T, SC__LV, SC__LVT }; /* jamo and syllables */

static int sc__hangul(uint32_t c) {
    if (c - SC__HANGUL < 19 * 21 * 28) return (c - SC__HANGUL) % 28 ? SC__LVT : SC__LV;
    if ((c >= 0x1100 && c < 0x1160) || (c >= 0xa960 && c < 0xa97d)) return SC__L;
    if ((c >= 0x1160 && c < 0x11a8) || (c >= 0xd7b0 && c < 0xd7c7)) return SC__V;
    return (c >= 0x11a8 && c < 0x1200) || (c >= 0xd7cb && c < 0xd7fc) ? SC__T : 0;
}

static bool sc__hangul_joins(int a, int b) {
    if (a == SC__L) return b && b != SC__T;
    return ((a == SC__V || a == SC__LV) && b == SC__V) || (a && b == SC__T);
}

/* How many of the n code points at s are the first grapheme. */
static size_t sc__grapheme(const sc__unicode *u, const uint32_t *s, size_t n) {
    enum { JOINER = 0x200d, NON_JOINER = 0x200c, FLAGS = 0x1f1e6 };
    int kind = sc__run_value(&u->grapheme, *s);
    bool picture = kind & SC__PICTURE, consonant = kind & SC__CONSONANT;
    bool glued = false, linked = false, flag = false;
    size_t i = 1;
    for (; i < n; i++) {
        uint32_t a = s[i - 1], b = s[i];
        int before = kind;
        if (a == '\r' && b == '\n') continue;
        if (a < 0x80 && b < 0x80) break;
        kind = sc__run_value(&u->grapheme, b);
        flag = !flag && a - FLAGS < 26 && b - FLAGS < 26; /* letters of flags go in pairs */
        bool joins = (kind & (SC__EXTEND | SC__SPACING)) || (before & SC__PREPEND) || flag ||
                     (glued && (kind & SC__PICTURE)) || (linked && (kind & SC__CONSONANT)) ||
                     sc__hangul_joins(sc__hangul(a), sc__hangul(b));
        if (((before | kind) & SC__CONTROL) || !joins) break;
        bool extends = kind & SC__EXTEND;
        bool extends_conjunct = extends ? b != NON_JOINER : b == JOINER;
        glued = picture && b == JOINER;
        picture = (kind & SC__PICTURE) || (picture && extends);
        linked = extends_conjunct && (linked || (consonant && (kind & SC__LINKER)));
        consonant = (kind & SC__CONSONANT) || (consonant && extends_conjunct);
    }
    return i;
}

/* ==== Tokenizers ==============================================================================
 *
 * CLIP's is a byte-level BPE (Sennrich et al. 2016): lower-case text is cut into words, each byte
 * of a word is a token, and pairs of tokens merge in the order of merges.txt; "</w>" ends a word.
 * T5's is a Unigram model (Kudo 2018): text is normalised with a table that the file carries,
 * spaces become U+2581, and of all ways to cut a word the one with the highest sum of scores wins.
 * The ids are those of Hugging Face's CLIPTokenizerFast and T5TokenizerFast.
 *
 * Text goes this way: special tokens are found in it, what lies between is normalised, special
 * tokens are found again (each has one of the two ways), and what lies between is cut into words.
 */

typedef struct sc__word { const char *text; int32_t id; double score; } sc__word;
typedef struct sc__special { sc__codes text; int32_t id; bool normalized; } sc__special;
typedef struct sc__merge { int32_t left, right, rank, id; } sc__merge;
typedef struct sc__charsmap { unsigned char *data; size_t size; } sc__charsmap;

/* A step of the normaliser. CLIP's one is `fold`: NFC and lower case; of T5's each is `charsmap`,
 * or stripping, or `spaces` for two or more spaces. */
typedef struct sc__step {
    bool fold, left, right;
    sc__charsmap charsmap;
    const char *spaces;
} sc__step;

struct sc_tokenizer {
    bool unigram;
    int length;                 /* model_max_length; 0: not said */
    int32_t begin, end, pad, unknown; /* begin, end: -1 if there is none */
    int32_t largest;            /* id */
    sc_json *json;              /* owns the words' text */
    sc__unicode unicode;
    sc__word *words;            /* sorted by text */
    size_t count;
    sc__special *special;
    size_t special_count;
    sc__step steps[4];          /* of the normaliser */
    size_t step_count;
    uint32_t space;             /* stands for a space: U+2581; BPE: itself */
    /* BPE */
    sc__merge *merges;          /* sorted by left and right */
    size_t merge_count;
    int32_t letter[2][256];     /* a byte's token inside a word, and at its end; -1: none */
    /* Unigram */
    double worst;               /* the lowest score */
    enum { SC__NEVER, SC__FIRST, SC__ALWAYS } prepend; /* `space` before a stretch of text */
};

/* ---- Words ---- */

static int sc__by_text(const void *a, const void *b) {
    const sc__word *x = (const sc__word *)a, *y = (const sc__word *)b;
    int order = strcmp(x->text, y->text);
    return order ? order : (x->id > y->id) - (x->id < y->id);
}

/* Sorts the words; of equal ones the last counts. */
static void sc__sort_words(sc_tokenizer *t) {
    size_t n = 0;
    if (t->count) qsort(t->words, t->count, sizeof *t->words, sc__by_text);
    for (size_t i = 0; i < t->count; i++) {
        n -= n && !strcmp(t->words[n - 1].text, t->words[i].text);
        t->words[n++] = t->words[i];
        t->largest = t->words[i].id > t->largest ? t->words[i].id : t->largest;
    }
    t->count = n;
}

/* The words that begin with one string are neighbours. Of words[*low, *high), which share their
 * first `depth` bytes, keeps those that have c next. */
static void sc__narrow(const sc_tokenizer *t, size_t *low, size_t *high, size_t depth, int c) {
    for (int side = 0; side < 2; side++) { /* first word above c - 1, first word above c */
        size_t from = *low, to = *high;
        while (from < to) {
            size_t middle = from + (to - from) / 2;
            if ((unsigned char)t->words[middle].text[depth] < c + side) from = middle + 1;
            else to = middle;
        }
        *(side ? high : low) = from;
    }
}

/* The id of s[n], or -1. */
static int32_t sc__word_id(const sc_tokenizer *t, const char *s, size_t n) {
    size_t low = 0, high = t->count;
    for (size_t i = 0; i < n; i++) sc__narrow(t, &low, &high, i, (unsigned char)s[i]);
    return low < high && !t->words[low].text[n] ? t->words[low].id : -1;
}

/* A whole number from 0 to 2^24 - 1, or -1. */
static int32_t sc__json_id(const sc_json *value) {
    double id = sc_json_number(value, -1);
    return id >= 0 && id < 1 << 24 && id == floor(id) ? (int32_t)id : -1;
}

typedef struct sc__ids { int32_t *ids; int limit, count; } sc__ids;

static void sc__emit(sc__ids *out, int32_t id) {
    if (out->count < out->limit) out->ids[out->count++] = id;
}

static void sc__text_add_codes(sc__text *text, const uint32_t *s, size_t n) {
    char bytes[4];
    for (size_t i = 0; i < n; i++)
        sc__text_add(text, bytes, (size_t)sc__utf8_encode(s[i], bytes));
}

static void sc__codes_add_text(sc__codes *codes, const char *text) {
    while (*text) sc__codes_add(codes, sc__utf8_decode(&text));
}

/* ---- BPE ---- */

/* Tokens of a word, linked; a merge removes the right one. */
typedef struct sc__symbol { int32_t id, previous, next; } sc__symbol;
/* A merge that is possible between the part at `at` and the next one. */
typedef struct sc__candidate { const sc__merge *merge; int32_t at; } sc__candidate;
typedef struct sc__symbols {
    sc__symbol *symbol;
    sc__candidate *heap;
    size_t heap_count;
} sc__symbols;

static int sc__by_sides(const void *a, const void *b) {
    const sc__merge *x = (const sc__merge *)a, *y = (const sc__merge *)b;
    int order = (x->left > y->left) - (x->left < y->left);
    return order ? order : (x->right > y->right) - (x->right < y->right);
}

static bool sc__before(sc__candidate a, sc__candidate b) {
    return a.merge->rank != b.merge->rank ? a.merge->rank < b.merge->rank : a.at < b.at;
}

/* Puts the merge of the part `at` and the next one, if there is one, on the heap. */
static void sc__push_candidate(const sc_tokenizer *t, sc__symbols *p, int32_t at) {
    if (at < 0 || p->symbol[at].next < 0) return;
    sc__merge key = {p->symbol[at].id, p->symbol[p->symbol[at].next].id, 0, 0};
    void *found = bsearch(&key, t->merges, t->merge_count, sizeof key, sc__by_sides);
    if (!found) return;
    sc__candidate new_one = {(const sc__merge *)found, at};
    size_t i = p->heap_count++;
    for (; i && sc__before(new_one, p->heap[(i - 1) / 2]); i = (i - 1) / 2)
        p->heap[i] = p->heap[(i - 1) / 2];
    p->heap[i] = new_one;
}

static sc__candidate sc__pop_candidate(sc__symbols *p) {
    sc__candidate top = p->heap[0], last = p->heap[--p->heap_count];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < p->heap_count; i = child) {
        if (child + 1 < p->heap_count && sc__before(p->heap[child + 1], p->heap[child])) child++;
        if (!sc__before(p->heap[child], last)) break;
        p->heap[i] = p->heap[child];
    }
    p->heap[i] = last;
    return top;
}

/* The tokens of the word s[n]: of all possible merges always the one of the lowest rank, and of
 * these the first from the left. */
static bool sc__bpe_word(const sc_tokenizer *t, const char *s, size_t n, sc__ids *out) {
    sc__symbols p = {(sc__symbol *)sc__alloc(n, sizeof *p.symbol),
                   (sc__candidate *)sc__alloc(3 * n, sizeof *p.heap), 0};
    bool ok = p.symbol && p.heap;
    for (size_t i = 0; ok && i < n; i++) {
        int32_t id = t->letter[i + 1 == n][(unsigned char)s[i]];
        p.symbol[i] = (sc__symbol){id < 0 ? t->unknown : id, (int32_t)i - 1,
                               i + 1 < n ? (int32_t)i + 1 : -1};
    }
    for (size_t i = 0; ok && i < n; i++) sc__push_candidate(t, &p, (int32_t)i);
    while (ok && p.heap_count) {
        sc__candidate c = sc__pop_candidate(&p);
        sc__symbol *left = &p.symbol[c.at], *right = left->next < 0 ? NULL : &p.symbol[left->next];
        bool there = right && left->id == c.merge->left && right->id == c.merge->right;
        if (!there) continue; /* another merge took one of them */
        left->id = c.merge->id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) p.symbol[left->next].previous = c.at;
        sc__push_candidate(t, &p, left->previous);
        sc__push_candidate(t, &p, c.at);
    }
    for (int32_t i = 0; ok && i >= 0; i = p.symbol[i].next) sc__emit(out, p.symbol[i].id);
    SC_FREE(p.symbol);
    SC_FREE(p.heap);
    return ok;
}

/* How many of the n code points at s are a word: 's 't 're 've 'm 'll 'd, letters, one number, or
 * other signs. A space is for itself. */
static size_t sc__bpe_cut(const sc_tokenizer *t, const uint32_t *s, size_t n) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    for (size_t i = 0; *s == '\'' && i < sizeof endings / sizeof *endings; i++) {
        size_t length = strlen(endings[i]), same = 0;
        while (same < length && same + 1 < n && s[same + 1] == (uint32_t)endings[i][same]) same++;
        if (same == length) return length + 1;
    }
    int32_t kind = sc__run_value(&t->unicode.word, *s);
    size_t i = 1;
    if (kind == SC__DIGIT || sc__is_space(*s)) return 1;
    while (i < n && !sc__is_space(s[i]) && sc__run_value(&t->unicode.word, s[i]) == kind) i++;
    return i;
}

/* NFC, then lower case: of U+0130 two code points, of all others one. */
static void sc__fold(const sc_tokenizer *t, const uint32_t *s, size_t n, sc__codes *out) {
    sc__codes composed = {0};
    sc__nfc(&t->unicode, s, n, &composed);
    for (size_t i = 0; i < composed.count; i++) {
        uint32_t c = composed.code[i];
        if (c == 0x130) sc__codes_add_text(out, "i\xcc\x87");
        else if (c < 0x80) sc__codes_add(out, c >= 'A' && c <= 'Z' ? c + 32 : c);
        else sc__codes_add(out, c + (uint32_t)sc__run_value(&t->unicode.lower, c));
    }
    out->failed = out->failed || composed.failed;
    SC_FREE(composed.code);
}

/* ---- Unigram ---- */

/* The best cut up to a place in a word: its score, and the last token's start and id. */
typedef struct sc__cut { double score; size_t start; int32_t id; } sc__cut;

/* The tokens of the word s[n] by Viterbi's algorithm. A character that is no token of its own may
 * be the unknown token, 10 below the worst score; neighbours of that kind are one token. */
static bool sc__unigram_word(const sc_tokenizer *t, const char *s, size_t n, sc__ids *out) {
    sc__cut *best = (sc__cut *)sc__alloc(n + 1, sizeof *best);
    for (size_t i = 1; best && i <= n; i++) best[i].start = SIZE_MAX;
    for (size_t i = 0, size; best && i < n; i += size) {
        size_t low = 0, high = t->count;
        bool known = false;
        for (size = 1; i + size < n && ((unsigned char)s[i + size] & 0xc0) == 0x80;) size++;
        for (size_t k = 0; i + k < n && low < high; k++) {
            sc__narrow(t, &low, &high, k, (unsigned char)s[i + k]);
            if (low == high || t->words[low].text[k + 1]) continue; /* no word ends here */
            sc__cut *end = &best[i + k + 1];
            double score = best[i].score + t->words[low].score;
            if (end->start == SIZE_MAX || score > end->score)
                *end = (sc__cut){score, i, t->words[low].id};
            known = known || k + 1 == size;
        }
        double score = best[i].score + t->worst - 10;
        if (!known && (best[i + size].start == SIZE_MAX || score > best[i + size].score))
            best[i + size] = (sc__cut){score, i, t->unknown};
    }
    int32_t *ids = (int32_t *)sc__alloc(n, sizeof *ids);
    size_t count = 0;
    for (size_t at = n; best && ids && at > 0; at = best[at].start) ids[count++] = best[at].id;
    for (size_t i = count; i-- > 0;)
        if (i + 1 == count || ids[i] != t->unknown || ids[i + 1] != t->unknown)
            sc__emit(out, ids[i]);
    bool ok = best && ids;
    SC_FREE(best);
    SC_FREE(ids);
    return ok;
}

/* How many of the n code points at s are a word: those before the next `space`. */
static size_t sc__unigram_cut(const sc_tokenizer *t, const uint32_t *s, size_t n) {
    size_t i = 1;
    while (i < n && s[i] != t->space) i++;
    return i;
}

/* The index-th 32-bit number of a charsmap; 0 behind its end. */
static uint32_t sc__unit(const sc__charsmap *map, size_t index) {
    if (index >= map->size / 4) return 0;
    const unsigned char *p = map->data + 4 * index;
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* The replacement for the shortest beginning of s[n] that the charsmap has, or NULL. A charsmap is
 * the size of a trie, the trie, and the replacements, each ended by NUL. The trie is darts-clone's
 * double array: for byte c, unit `at` goes on to at ^ offset ^ c if the label there is c, and its
 * leaf lies at at ^ offset. Bits 0-7 and 31: label; 8: has a leaf; 9 and 10-30: offset. */
static const char *sc__charsmap_find(const sc__charsmap *map, const char *s, size_t n) {
    size_t units = sc__unit(map, 0) / 4, at = 0;
    for (size_t i = 0; at < units; i++) {
        uint32_t unit = sc__unit(map, 1 + at);
        if (i && (unit & 0x800000ff) != (unsigned char)s[i - 1]) return NULL;
        at ^= (size_t)(unit >> 10) << (unit >> 6 & 8);
        if (i && unit & 0x100) {
            size_t place = 4 * units + 4 + (sc__unit(map, 1 + at) & 0x7fffffff);
            return at < units && place < map->size ? (const char *)map->data + place : NULL;
        }
        if (i == n) return NULL;
        at ^= (unsigned char)s[i];
    }
    return NULL;
}

/* A grapheme of less than 6 bytes is replaced whole if the map has a beginning of it; otherwise
 * each code point for itself. (Odd, but what the ids are defined by.) */
static void sc__charsmap_apply(const sc_tokenizer *t, const sc__charsmap *map, const uint32_t *s,
                               size_t n, sc__codes *out) {
    for (size_t i = 0, size; i < n; i += size) {
        char bytes[12];
        size_t length = 0;
        size = sc__grapheme(&t->unicode, s + i, n - i);
        for (size_t k = 0; k < size && length < 6; k++)
            length += (size_t)sc__utf8_encode(s[i + k], bytes + length);
        const char *found = length < 6 ? sc__charsmap_find(map, bytes, length) : NULL;
        if (found) sc__codes_add_text(out, found);
        for (size_t k = 0; !found && k < size; k++) {
            length = (size_t)sc__utf8_encode(s[i + k], bytes);
            const char *other = sc__charsmap_find(map, bytes, length);
            if (other) sc__codes_add_text(out, other);
            else sc__codes_add(out, s[i + k]);
        }
    }
}

static void sc__step_apply(const sc_tokenizer *t, const sc__step *step, const uint32_t *s,
                           size_t n, sc__codes *out) {
    if (step->fold) sc__fold(t, s, n, out);
    if (step->charsmap.data) sc__charsmap_apply(t, &step->charsmap, s, n, out);
    if (step->fold || step->charsmap.data) return;
    while (step->right && n && sc__is_space(s[n - 1])) n--;
    for (; step->left && n && sc__is_space(*s); n--) s++;
    for (size_t i = 0, end; i < n; i = end) {
        for (end = i; end < n && s[end] == ' ';) end++;
        if (step->spaces && end - i > 1) {
            sc__codes_add_text(out, step->spaces);
            continue;
        }
        end = i + 1;
        sc__codes_add(out, s[i]);
    }
}

static void sc__normalise(const sc_tokenizer *t, const uint32_t *s, size_t n, sc__codes *out) {
    for (size_t i = 0; i < n; i++) sc__codes_add(out, s[i]);
    for (size_t i = 0; i < t->step_count && !out->failed; i++) {
        sc__codes before = *out;
        *out = (sc__codes){0};
        sc__step_apply(t, &t->steps[i], before.code, before.count, out);
        SC_FREE(before.code);
    }
}

/* ---- Text ---- */

/* The longest special token at the beginning of s[n], or NULL. */
static const sc__special *sc__special_at(const sc_tokenizer *t, const uint32_t *s, size_t n,
                                         bool normalized) {
    const sc__special *best = NULL;
    for (size_t i = 0; i < t->special_count; i++) {
        const sc__special *x = &t->special[i];
        size_t same = 0;
        if (x->normalized != normalized || (best && x->text.count <= best->text.count)) continue;
        while (same < x->text.count && same < n && s[same] == x->text.code[same]) same++;
        if (same == x->text.count) best = x;
    }
    return best;
}

/* Emits the words of s[n], which is normalised. Those of a Unigram model begin with `space`, which
 * stands for spaces; a whole text gets one more at its front. Those of BPE have none. */
static bool sc__emit_words(const sc_tokenizer *t, const uint32_t *s, size_t n, bool first,
                           sc__ids *out) {
    sc__codes line = {0};
    sc__text word = {0};
    bool prepend = t->prepend == SC__ALWAYS || (t->prepend == SC__FIRST && first);
    if (prepend && n && *s != ' ' && *s != t->space) sc__codes_add(&line, t->space);
    for (size_t i = 0; i < n; i++) sc__codes_add(&line, s[i] == ' ' ? t->space : s[i]);
    bool ok = !line.failed;
    for (size_t i = 0, size; ok && i < line.count && out->count < out->limit; i += size) {
        size = (t->unigram ? sc__unigram_cut : sc__bpe_cut)(t, line.code + i, line.count - i);
        if (!t->unigram && sc__is_space(line.code[i])) continue;
        word.length = 0;
        sc__text_add_codes(&word, line.code + i, size);
        ok = !word.failed && (t->unigram ? sc__unigram_word : sc__bpe_word)(t, word.data,
                                                                            word.length, out);
    }
    SC_FREE(line.code);
    SC_FREE(word.data);
    return ok;
}

static bool sc__emit_text(const sc_tokenizer *t, const uint32_t *s, size_t n, bool clean,
                          bool first, sc__ids *out);

/* Emits s[n], in which there are no special tokens (of the kind to be found at this time). */
static bool sc__emit_piece(const sc_tokenizer *t, const uint32_t *s, size_t n, bool clean,
                           bool first, sc__ids *out) {
    if (clean) return sc__emit_words(t, s, n, first, out);
    sc__codes normal = {0};
    sc__normalise(t, s, n, &normal);
    bool ok = !normal.failed && sc__emit_text(t, normal.code, normal.count, true, first, out);
    SC_FREE(normal.code);
    return ok;
}

/* Emits s[n]: the special tokens in it, and the pieces between them. `clean`: s is normalised.
 * `first`: the text begins here. */
static bool sc__emit_text(const sc_tokenizer *t, const uint32_t *s, size_t n, bool clean,
                          bool first, sc__ids *out) {
    size_t from = 0;
    for (size_t i = 0; i <= n && out->count < out->limit; i++) {
        const sc__special *special = i < n ? sc__special_at(t, s + i, n - i, clean) : NULL;
        if (i < n && !special) continue;
        if (i > from && !sc__emit_piece(t, s + from, i - from, clean, first && !from, out))
            return false;
        if (!special) break;
        sc__emit(out, special->id);
        from = i + special->text.count;
        i = from - 1;
    }
    return true;
}

int sc_tokenize(const sc_tokenizer *t, const char *text, int length, int32_t *ids) {
    sc__codes codes = {0};
    sc__ids out = {ids, length - (t->end >= 0), 0}; /* the last place is the end token's */
    if (length < 2) return sc__fail("a text needs room for 2 tokens at least"), -1;
    if (strlen(text) > (size_t)1 << 28) return sc__fail("a text of more than 256 MiB"), -1;
    sc__codes_add_text(&codes, text);
    if (t->begin >= 0) sc__emit(&out, t->begin);
    bool ok = !codes.failed && sc__emit_text(t, codes.code, codes.count, false, true, &out);
    SC_FREE(codes.code);
    if (!ok) return sc__fail("out of memory for a text of %zu bytes", strlen(text)), -1;
    if (t->end >= 0) ids[out.count++] = t->end;
    for (int i = out.count; i < length; i++) ids[i] = t->pad;
    return out.count;
}

/* ---- Opening: both ---- */

void sc_tokenizer_close(sc_tokenizer *t) {
    if (!t) return;
    for (size_t i = 0; i < t->special_count; i++) SC_FREE(t->special[i].text.code);
    for (size_t i = 0; i < t->step_count; i++) SC_FREE(t->steps[i].charsmap.data);
    sc__unicode_free(&t->unicode);
    sc_json_free(t->json);
    SC_FREE(t->words);
    SC_FREE(t->special);
    SC_FREE(t->merges);
    SC_FREE(t);
}

int sc_tokenizer_length(const sc_tokenizer *t) { return t->length; }

/* Tokens in configs are strings, or objects with `content`. */
static const char *sc__token_text(const sc_json *config, const char *key, const char *fallback) {
    const sc_json *token = sc_json_get(config, key), *content = sc_json_get(token, "content");
    return sc_json_string(content ? content : token, fallback);
}

/* The token that the config names under `key`; false with the error set. */
static bool sc__token_id(const sc_tokenizer *t, const sc_json *config, const char *path,
                         const char *key, const char *fallback, int32_t *id) {
    const char *text = sc__token_text(config, key, fallback);
    *id = sc__word_id(t, text, strlen(text));
    return *id >= 0 || sc__fail("%s: %s '%s' is not in the vocabulary", path, key, text);
}

/* Appends a special token, for which there is room. */
static bool sc__add_special(sc_tokenizer *t, const char *text, int32_t id, const sc_json *flags,
                            const char *path) {
    static const char *const refused[] = {"lstrip", "rstrip", "single_word"};
    sc__special *x = &t->special[t->special_count++];
    if (!*text || id < 0) return sc__fail("%s: an added token without content or id", path);
    for (int i = 0; i < 3; i++)
        if (sc_json_bool(sc_json_get(flags, refused[i]), false))
            return sc__fail("%s: added token '%s': %s is not supported", path, text, refused[i]);
    x->id = id;
    x->normalized = sc_json_bool(sc_json_get(flags, "normalized"), true);
    t->largest = id > t->largest ? id : t->largest;
    sc__codes_add_text(&x->text, text);
    if (x->normalized) {
        sc__codes plain = x->text;
        x->text = (sc__codes){0};
        sc__normalise(t, plain.code, plain.count, &x->text);
        SC_FREE(plain.code);
    }
    if (x->text.failed) return sc__fail("out of memory for special tokens");
    return x->text.count || sc__fail("%s: added token '%s' is empty when normalised", path, text);
}

/* ---- Opening: CLIP ---- */

static bool sc__bpe_read_words(sc_tokenizer *t, const char *path) {
    t->json = sc_json_load(path);
    if (!t->json) return false;
    t->count = (size_t)sc_json_length(t->json);
    t->words = (sc__word *)sc__alloc(t->count, sizeof *t->words);
    for (size_t i = 0; t->words && i < t->count; i++) {
        const char *text = sc_json_key(t->json, (int64_t)i);
        int32_t id = sc__json_id(sc_json_value(t->json, (int64_t)i));
        if (!text || id < 0) return sc__fail("%s: must be an object of tokens and ids", path);
        t->words[i] = (sc__word){text, id, 0};
    }
    if (t->words) sc__sort_words(t);
    return t->words != NULL;
}

/* merges.txt: one line of version, then two tokens a line in the order of their ranks. As in the
 * original, merges above the size of CLIP's vocabulary do not count. */
static bool sc__bpe_read_merges(sc_tokenizer *t, char *text, const char *path) {
    size_t lines = 1;
    for (const char *s = text; *s; s++) lines += *s == '\n';
    t->merges = (sc__merge *)sc__alloc(lines, sizeof *t->merges);
    if (!t->merges) return false;
    for (char *line = text + strcspn(text, "\n"); *line && t->merge_count < 49152 - 258;) {
        char *left = line + 1, *end = left + strcspn(left, "\r\n");
        char *right = (char *)memchr(left, ' ', (size_t)(end - left));
        sc__merge m = {-1, -1, (int32_t)t->merge_count, -1};
        line = left + strcspn(left, "\n");
        if (!left[strspn(left, " \r\n")]) break; /* nothing but white space up to the end */
        if (right) {
            size_t size = (size_t)(end - right - 1);
            m.left = sc__word_id(t, left, (size_t)(right - left));
            m.right = sc__word_id(t, right + 1, size);
            memmove(right, right + 1, size);
            m.id = sc__word_id(t, left, (size_t)(right - left) + size);
        }
        if (m.left < 0 || m.right < 0 || m.id < 0)
            return sc__fail("%s:%zu: expected two tokens that vocab.json has, as it has the token "
                            "of both together", path, t->merge_count + 2);
        t->merges[t->merge_count++] = m;
    }
    qsort(t->merges, t->merge_count, sizeof *t->merges, sc__by_sides);
    return t->merge_count || sc__fail("%s: no merges", path);
}

/* Bytes that print stand for themselves, others for U+0100 on (the alphabet of GPT-2). */
static void sc__bpe_letters(sc_tokenizer *t) {
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; b++) {
        char text[8];
        bool prints = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        size_t n = (size_t)sc__utf8_encode(prints ? b : next++, text);
        memcpy(text + n, "</w>", 4);
        t->letter[0][b] = sc__word_id(t, text, n);
        t->letter[1][b] = sc__word_id(t, text, n + 4);
    }
}

/* The special tokens are those of tokenizer_config.json, or else the usual two. */
static bool sc__bpe_read_special(sc_tokenizer *t, const sc_json *config, const char *path) {
    static const char start[] = "<|startoftext|>", end[] = "<|endoftext|>";
    const sc_json *added = sc_json_get(config, "added_tokens_decoder");
    int64_t n = sc_json_length(added);
    t->special = (sc__special *)sc__alloc((size_t)n + 2, sizeof *t->special);
    if (!t->special || !sc__token_id(t, config, path, "bos_token", start, &t->begin) ||
        !sc__token_id(t, config, path, "eos_token", end, &t->end) ||
        !sc__token_id(t, config, path, "unk_token", end, &t->unknown) ||
        !sc__token_id(t, config, path, "pad_token", end, &t->pad)) return false;
    for (int64_t i = 0; i < n; i++) {
        const sc_json *token = sc_json_value(added, i);
        const char *key = sc_json_key(added, i);
        char *rest = NULL;
        long id = key ? strtol(key, &rest, 10) : -1;
        if (id < 0 || id >= 1 << 24 || *rest)
            return sc__fail("%s: added_tokens_decoder must map ids to tokens", path);
        const char *text = sc__token_text(added, key, "");
        if (!sc__add_special(t, text, (int32_t)id, token, path)) return false;
    }
    const char *first = sc__token_text(config, "bos_token", start);
    const char *last = sc__token_text(config, "eos_token", end);
    return n || (sc__add_special(t, first, t->begin, NULL, path) &&
                 sc__add_special(t, last, t->end, NULL, path));
}

static bool sc__bpe_open(sc_tokenizer *t, const char *folder, const sc_json *config) {
    char *vocab = sc__join(folder, "vocab.json"), *path = sc__join(folder, "merges.txt");
    size_t length = 0;
    t->space = ' ';
    t->steps[t->step_count++].fold = true;
    char *merges = path ? sc__read_file(path, &length) : NULL;
    bool ok = vocab && merges && sc__bpe_read_words(t, vocab) &&
              sc__bpe_read_merges(t, merges, path) && sc__bpe_read_special(t, config, folder);
    if (ok) sc__bpe_letters(t);
    SC_FREE(vocab);
    SC_FREE(path);
    SC_FREE(merges);
    return ok;
}

/* ---- Opening: T5 ---- */

static bool sc__base64(const char *text, sc__charsmap *out) {
    uint32_t bits = 0;
    int count = 0;
    out->data = (unsigned char *)sc__alloc(strlen(text) + 1, 1); /* ends in NUL */
    for (; out->data && *text && *text != '='; text++) {
        char c = *text;
        int digit = c >= 'A' && c <= 'Z' ? c - 'A' : c >= 'a' && c <= 'z' ? c - 'a' + 26
                  : c >= '0' && c <= '9' ? c - '0' + 52 : c == '+' ? 62 : c == '/' ? 63 : -1;
        if (digit < 0) return false;
        bits = bits << 6 | (uint32_t)digit;
        count += 6;
        if (count >= 8) out->data[out->size++] = (unsigned char)(bits >> (count -= 8));
    }
    return out->data != NULL;
}

/* One step of the normaliser, or a sequence of them. */
static bool sc__unigram_read_steps(sc_tokenizer *t, const sc_json *json, const char *path) {
    const char *type = sc_json_string(sc_json_get(json, "type"), "");
    const sc_json *list = sc_json_get(json, "normalizers");
    for (int64_t i = 0; !strcmp(type, "Sequence") && i < sc_json_length(list); i++)
        if (!sc__unigram_read_steps(t, sc_json_at(list, i), path)) return false;
    if (!json || json->type == SC__NULL || !strcmp(type, "Sequence")) return true;
    if (t->step_count == sizeof t->steps / sizeof *t->steps)
        return sc__fail("%s: a normalizer of more than %zu steps", path, t->step_count);
    sc__step *step = &t->steps[t->step_count++];
    if (!strcmp(type, "Precompiled")) {
        sc__charsmap *map = &step->charsmap;
        bool ok = sc__base64(sc_json_string(sc_json_get(json, "precompiled_charsmap"), ""), map) &&
                  map->size >= 8 && sc__unit(map, 0) % 4 == 0 && sc__unit(map, 0) <= map->size - 4;
        return ok || sc__fail("%s: the precompiled_charsmap is broken", path);
    }
    if (!strcmp(type, "Strip")) {
        step->left = sc_json_bool(sc_json_get(json, "strip_left"), false);
        step->right = sc_json_bool(sc_json_get(json, "strip_right"), false);
        return true;
    }
    const char *pattern = sc_json_string(sc_json_get(sc_json_get(json, "pattern"), "Regex"), "");
    step->spaces = sc_json_string(sc_json_get(json, "content"), "");
    if (!strcmp(type, "Replace") && !strcmp(pattern, " {2,}")) return true;
    return sc__fail(
        "%s: a normalizer '%s' is not supported; Precompiled, Strip, and Replace of the "
        "Regex ' {2,}' are",
        path, type);
}

/* How words begin, and which tokens stand around a text. */
static bool sc__unigram_read_frame(sc_tokenizer *t, const char *path) {
    static const char *const schemes[] = {"never", "first", "always"};
    const sc_json *words = sc_json_get(t->json, "pre_tokenizer");
    const sc_json *frame = sc_json_get(t->json, "post_processor");
    const sc_json *single = sc_json_get(frame, "single");
    const char *space = sc_json_string(sc_json_get(words, "replacement"), "\xe2\x96\x81");
    const char *scheme = sc_json_string(sc_json_get(words, "prepend_scheme"), "always");
    int prepend = 0;
    while (prepend < 3 && strcmp(scheme, schemes[prepend])) prepend++;
    if (strcmp(sc_json_string(sc_json_get(words, "type"), ""), "Metaspace") || prepend == 3 ||
        !sc_json_bool(sc_json_get(words, "split"), true))
        return sc__fail("%s: the pre_tokenizer must be a Metaspace that splits", path);
    if (!single) return sc__fail("%s: the post_processor must be a TemplateProcessing", path);
    t->prepend = prepend;
    t->space = sc__utf8_decode(&space);
    t->begin = t->end = -1;
    bool behind = false;
    for (int64_t i = 0; i < sc_json_length(single); i++) {
        const sc_json *token = sc_json_get(sc_json_at(single, i), "SpecialToken");
        const char *name = sc_json_string(sc_json_get(token, "id"), "");
        int32_t *place = behind ? &t->end : &t->begin;
        if (!token) behind = true;
        else if (*place >= 0 || (*place = sc__word_id(t, name, strlen(name))) < 0)
            return sc__fail("%s: the post_processor may add one token on each side", path);
    }
    return true;
}

static bool sc__unigram_open(sc_tokenizer *t, const char *path, const sc_json *config) {
    t->json = sc_json_load(path);
    const sc_json *model = sc_json_get(t->json, "model"), *words = sc_json_get(model, "vocab");
    const sc_json *added = sc_json_get(t->json, "added_tokens");
    int64_t n = sc_json_length(words), n_added = sc_json_length(added);
    if (!t->json) return false;
    t->unigram = true;
    if (strcmp(sc_json_string(sc_json_get(model, "type"), ""), "Unigram") ||
        sc_json_bool(sc_json_get(model, "byte_fallback"), false))
        return sc__fail("%s: the model must be a Unigram without byte_fallback", path);
    t->words = (sc__word *)sc__alloc((size_t)n, sizeof *t->words);
    t->special = (sc__special *)sc__alloc((size_t)n_added, sizeof *t->special);
    if (!t->words || !t->special) return false;
    for (; t->count < (size_t)n; t->count++) {
        const sc_json *word = sc_json_at(words, (int64_t)t->count);
        const char *text = sc_json_string(sc_json_at(word, 0), NULL);
        double score = sc_json_number(sc_json_at(word, 1), NAN);
        if (!text || isnan(score)) return sc__fail("%s: vocab must list [token, score]", path);
        t->words[t->count] = (sc__word){text, (int32_t)t->count, score};
        t->worst = t->count && t->worst < score ? t->worst : score;
    }
    sc__sort_words(t);
    t->unknown = sc__json_id(sc_json_get(model, "unk_id"));
    if (t->unknown < 0 || t->unknown >= n) return sc__fail("%s: unk_id is not in the vocab", path);
    if (!sc__token_id(t, config, path, "pad_token", "<pad>", &t->pad) ||
        !sc__unigram_read_steps(t, sc_json_get(t->json, "normalizer"), path) ||
        !sc__unigram_read_frame(t, path)) return false;
    for (int64_t i = 0; i < n_added; i++) {
        const sc_json *token = sc_json_at(added, i);
        const char *text = sc_json_string(sc_json_get(token, "content"), "");
        int32_t id = sc__json_id(sc_json_get(token, "id"));
        if (!sc__add_special(t, text, id, token, path)) return false;
    }
    return true;
}

sc_tokenizer *sc_tokenizer_open(const char *folder) {
    sc_tokenizer *t = (sc_tokenizer *)sc__alloc(1, sizeof *t);
    char *vocab = sc__join(folder, "vocab.json"), *unigram = sc__join(folder, "tokenizer.json");
    char *path = sc__join(folder, "tokenizer_config.json");
    bool ok = t && vocab && unigram && path && sc__unicode_open(&t->unicode);
    sc_json *config = ok && sc__exists(path) ? sc_json_load(path) : NULL;
    if (ok && !config && sc__exists(path)) ok = false;
    else if (ok && sc__exists(vocab)) ok = sc__bpe_open(t, folder, config);
    else if (ok && sc__exists(unigram)) ok = sc__unigram_open(t, unigram, config);
    else if (ok)
        ok = sc__fail("%s: no tokenizer here; copy CLIP's vocab.json and merges.txt, or T5's "
                      "tokenizer.json, into this folder", folder);
    double length = sc_json_number(sc_json_get(config, "model_max_length"), 0);
    if (ok) t->length = length >= 2 && length <= 1 << 20 ? (int)length : 0;
    sc_json_free(config);
    SC_FREE(vocab);
    SC_FREE(unigram);
    SC_FREE(path);
    if (ok) return t;
    sc_tokenizer_close(t);
    return NULL;
}

/* ==== Text encoders ===========================================================================
 *
 * CLIP's text half (Radford et al. 2021): causal transformer with pre-norm blocks; FLUX takes its
 * pooled vector, the last layer's output at the end token. T5's encoder (Raffel et al. 2020): RMS
 * norms, no biases, scores without scaling, a learned bias for the distance of two tokens that the
 * first layer owns and all share; FLUX feeds it the pads too, without a mask. The weights have the
 * names that transformers gives them.
 *
 * Easy to get wrong: CLIP's config says eos_token_id 2, but the end token is the highest id, and
 * the vector is taken at its first place (the pads are the same token).
 */

enum { SC__MAX_TOKENS = 4096 };

typedef struct sc__text_layer { /* y = down(f(gate x) * up x), or without up */
    sc_tensor *norm[4];         /* weights of attention's and of the MLP's; CLIP: then the biases */
    sc_linear_layer q, k, v, out, gate, up, down;
} sc__text_layer;

typedef struct sc__encoder {
    sc_tokenizer *tokenizer;
    sc_net *net;
    int width, heads, size, layers, vocabulary;
    bool gated;                 /* the MLPs have their `up` */
    float eps;
    sc_activation activation;
    sc_tensor *tokens, *norm[2]; /* [vocabulary, width]; the last norm's weight; CLIP: and bias */
    sc__text_layer *layer;
} sc__encoder;

struct sc_text_encoders {
    const sc_backend *backend;
    sc_tape *tape;
    sc__encoder clip, t5;
    int clip_length, clip_end;
    sc_tensor *clip_positions;  /* [clip_length, width] */
    int t5_buckets, t5_distance;
    sc_tensor *t5_bias;         /* [buckets, heads] */
};

static void sc__encoder_close(sc__encoder *e) {
    sc_tokenizer_close(e->tokenizer);
    sc_net_close(e->net);
    SC_FREE(e->layer);
}

void sc_text_encoders_close(sc_text_encoders *t) {
    if (!t) return;
    sc__encoder_close(&t->clip);
    sc__encoder_close(&t->t5);
    if (t->tape) sc_tape_free(t->tape);
    SC_FREE(t);
}

static bool sc__activation_named(const char *name, const char *path, sc_activation *kind) {
    static const struct { const char *name; sc_activation kind; } known[] = {
        {"quick_gelu", SC_QUICK_GELU}, {"gelu", SC_GELU}, {"gelu_new", SC_GELU_TANH},
        {"gelu_pytorch_tanh", SC_GELU_TANH}, {"silu", SC_SILU}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) return *kind = known[i].kind, true;
    return sc__fail("%s: activation '%s' is not supported", path, name);
}

typedef struct sc__named_linear {
    sc_linear_layer *layer;
    const char *name;
    int64_t out, in;
} sc__named_linear;

/* Opens `count` vectors and `linears` linear layers, whose names follow `prefix`. */
static bool sc__open_layer(sc_net *net, const char *prefix, sc_tensor **vectors,
                           const char *const *vector_names, int count, int64_t width,
                           const sc__named_linear *linears, int linear_count, bool bias) {
    char name[160];
    for (int i = 0; i < count; i++) {
        snprintf(name, sizeof name, "%s%s", prefix, vector_names[i]);
        if (!(vectors[i] = sc_net_weight(net, name, 1, &width))) return false;
    }
    for (int i = 0; i < linear_count; i++) {
        const sc__named_linear *l = &linears[i];
        snprintf(name, sizeof name, "%s%s", prefix, l->name);
        if (!sc_net_linear(net, l->layer, name, l->out, l->in, bias)) return false;
    }
    return true;
}

/* A layer norm, or without a bias T5's, which only scales. */
static sc_tensor *sc__text_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *weight,
                                const sc_tensor *bias, float eps) {
    return bias ? sc_layer_norm(t, x, weight, bias, eps) : sc_rms_norm(t, x, weight, eps);
}

/* x [1, T, C] through the layers, in place; CLIP's attention is causal, T5's has a bias [H, T, T].
 * What a layer made is given back before the next. */
static bool sc__encoder_layers(sc_tape *t, const sc__encoder *e, sc_tensor *x, float scale,
                               const sc_tensor *bias) {
    sc__mark_t mark = sc__mark(t);
    for (int i = 0; i < e->layers; i++) {
        const sc__text_layer *l = &e->layer[i];
        sc_tensor *n = sc__text_norm(t, x, l->norm[0], l->norm[2], e->eps);
        sc_tensor *o = sc_attention(t, sc_linear(t, n, &l->q), sc_linear(t, n, &l->k),
                                    sc_linear(t, n, &l->v), e->heads, scale, bias, !bias);
        sc_tensor *y = sc_add(t, x, sc_linear(t, o, &l->out));
        n = sc__text_norm(t, y, l->norm[1], l->norm[3], e->eps);
        sc_tensor *h = sc_activate(t, e->activation, sc_linear(t, n, &l->gate));
        if (e->gated) h = sc_multiply(t, h, sc_linear(t, n, &l->up));
        y = sc_add(t, y, sc_linear(t, h, &l->down));
        if (!x || !y) return false;
        int64_t size = sc_count(x);
        t->be->copy_block(x->data, size, y->data, size, 1, size, x->dtype, false);
        sc__release(t, mark);
    }
    return true;
}

/* ---- CLIP ---- */

static bool sc__clip_positions(sc_text_encoders *t) {
    const char *name = "text_model.embeddings.position_embedding.weight";
    const int64_t shape[] = {t->clip_length, t->clip.width};
    return (t->clip_positions = sc_net_weight(t->clip.net, name, 2, shape)) != NULL;
}

static bool sc__clip_layer(sc_text_encoders *t, int index, int64_t hidden) {
    sc__text_layer *l = &t->clip.layer[index];
    static const char *const norms[] = {"layer_norm1.weight", "layer_norm2.weight",
                                        "layer_norm1.bias", "layer_norm2.bias"};
    char prefix[64];
    int64_t c = t->clip.width;
    const sc__named_linear linears[] = {
        {&l->q, "self_attn.q_proj", c, c}, {&l->k, "self_attn.k_proj", c, c},
        {&l->v, "self_attn.v_proj", c, c}, {&l->out, "self_attn.out_proj", c, c},
        {&l->gate, "mlp.fc1", hidden, c}, {&l->down, "mlp.fc2", c, hidden}};
    snprintf(prefix, sizeof prefix, "text_model.encoder.layers.%d.", index);
    return sc__open_layer(t->clip.net, prefix, l->norm, norms, 4, c, linears, 6, true);
}

static bool sc__clip_read_config(sc_text_encoders *t, const sc_json *json, const char *path,
                                 int *hidden) {
    const char *activation = sc_json_string(sc_json_get(json, "hidden_act"), "quick_gelu");
    t->clip.eps = (float)sc_json_number(sc_json_get(json, "layer_norm_eps"), 1e-5);
    const sc_json *end = sc_json_get(json, "eos_token_id");
    t->clip_end = end ? sc__json_id(end) : json ? 49407 : 2;
    const char *layers = "text_model.encoder.layers.%d.mlp.fc1.weight";
    int hidden_side = sc__side(t->clip.net, "text_model.encoder.layers.0.mlp.fc1.weight", 0, 2048);
    int width = sc__side(t->clip.net, "text_model.embeddings.token_embedding.weight", 1, 512);
    int words = sc__side(t->clip.net, "text_model.embeddings.token_embedding.weight", 0, 49408);
    int length = sc__side(t->clip.net, "text_model.embeddings.position_embedding.weight", 0, 77);
    if (!sc__config_int(json, path, "hidden_size", width, &t->clip.width) ||
        !sc__config_int(json, path, "num_attention_heads", json ? 8 : width / 64, &t->clip.heads) ||
        !sc__config_int(json, path, "num_hidden_layers", sc__count_layers(t->clip.net, layers, 12),
                         &t->clip.layers) ||
        !sc__config_int(json, path, "max_position_embeddings", length, &t->clip_length) ||
        !sc__config_int(json, path, "vocab_size", words, &t->clip.vocabulary) ||
        !sc__config_int(json, path, "intermediate_size", hidden_side, hidden) ||
        !sc__activation_named(activation, path, &t->clip.activation)) return false;
    if (t->clip.width % t->clip.heads)
        return sc__fail("%s: hidden_size must be a multiple of num_attention_heads", path);
    return (t->clip_length >= 2 && t->clip_length <= SC__MAX_TOKENS) ||
           sc__fail("%s: max_position_embeddings must be from 2 to %d", path, SC__MAX_TOKENS);
}

/* Where the pooled vector is: at the first end token, which for the config's 2 is the highest id.
 */
static int sc__clip_end(const sc_text_encoders *s, const int32_t *ids) {
    int32_t wanted = s->clip_end;
    int end = 0;
    for (int i = 0; s->clip_end == 2 && i < s->clip_length; i++)
        wanted = i == 0 || ids[i] > wanted ? ids[i] : wanted;
    while (end < s->clip_length && ids[end] != wanted) end++;
    return end < s->clip_length ? end : 0;
}

/* ids [clip_length] -> the pooled vector [clip_width]. */
static bool sc__clip_encode(sc_text_encoders *s, const int32_t *ids, float *pooled) {
    sc_tape *t = s->tape;
    int32_t positions[SC__MAX_TOKENS];
    int length = s->clip_length;
    float scale = 1.f / sqrtf((float)s->clip.width / (float)s->clip.heads);
    for (int i = 0; i < length; i++) positions[i] = i;
    sc_tape_reset(t);
    sc_tensor *x = sc_add(t, sc_embed_tokens(t, s->clip.tokens, ids, 1, length),
                          sc_embed_tokens(t, s->clip_positions, positions, 1, length));
    if (!sc__encoder_layers(t, &s->clip, x, scale, NULL)) return false;
    x = sc_slice_tokens(t, x, sc__clip_end(s, ids), 1);
    return sc_read(t, sc__text_norm(t, x, s->clip.norm[0], s->clip.norm[1], s->clip.eps), pooled);
}

/* ---- T5 ---- */

static bool sc__t5_bias(sc_text_encoders *t) {
    const char *name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
    const int64_t shape[] = {t->t5_buckets, t->t5.heads};
    return (t->t5_bias = sc_net_weight(t->t5.net, name, 2, shape)) != NULL;
}

static bool sc__t5_layer(sc_text_encoders *t, int index, int64_t hidden) {
    sc__text_layer *l = &t->t5.layer[index];
    static const char *const norms[] = {"0.layer_norm.weight", "1.layer_norm.weight"};
    char prefix[64];
    int64_t c = t->t5.width, inner = (int64_t)t->t5.heads * t->t5.size;
    const char *gate = t->t5.gated ? "1.DenseReluDense.wi_0" : "1.DenseReluDense.wi";
    const sc__named_linear linears[] = {
        {&l->q, "0.SelfAttention.q", inner, c}, {&l->k, "0.SelfAttention.k", inner, c},
        {&l->v, "0.SelfAttention.v", inner, c}, {&l->out, "0.SelfAttention.o", c, inner},
        {&l->gate, gate, hidden, c}, {&l->down, "1.DenseReluDense.wo", c, hidden},
        {&l->up, "1.DenseReluDense.wi_1", hidden, c}};
    snprintf(prefix, sizeof prefix, "encoder.block.%d.layer.", index);
    int count = t->t5.gated ? 7 : 6;
    return sc__open_layer(t->t5.net, prefix, l->norm, norms, 2, c, linears, count, false);
}

/* Configs have `dense_act_fn` and `is_gated_act`, or `feed_forward_proj`, which means both. */
static bool sc__t5_read_config(sc_text_encoders *t, const sc_json *json, const char *path,
                               int *hidden) {
    const char *bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
    const char *layers = "encoder.block.%d.layer.0.SelfAttention.q.weight";
    int gate = sc__side(t->t5.net, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0, 0);
    int up = sc__side(t->t5.net, "encoder.block.0.layer.1.DenseReluDense.wi.weight", 0, 2048);
    int inner = sc__side(t->t5.net, "encoder.block.0.layer.0.SelfAttention.q.weight", 0, 512);
    int words = sc__side(t->t5.net, "shared.weight", 0, 32128);
    int heads = sc__side(t->t5.net, bias, 1, 8), buckets = sc__side(t->t5.net, bias, 0, 32);
    const char *both = sc_json_string(sc_json_get(json, "feed_forward_proj"),
                                      !json && gate ? "gated-gelu" : "relu");
    bool gated = strstr(both, "gated-") == both;
    const char *activation = !strcmp(both, "gated-gelu") ? "gelu_new" : gated ? both + 6 : both;
    activation = sc_json_string(sc_json_get(json, "dense_act_fn"), activation);
    t->t5.gated = sc_json_bool(sc_json_get(json, "is_gated_act"), gated);
    t->t5.eps = (float)sc_json_number(sc_json_get(json, "layer_norm_epsilon"), 1e-6);
    if (!sc__config_int(json, path, "d_model", sc__side(t->t5.net, "shared.weight", 1, 512),
                        &t->t5.width) ||
        !sc__config_int(json, path, "num_heads", heads, &t->t5.heads) ||
        !sc__config_int(json, path, "d_kv", json ? 64 : inner / heads, &t->t5.size) ||
        !sc__config_int(json, path, "num_layers", sc__count_layers(t->t5.net, layers, 6),
                        &t->t5.layers) ||
        !sc__config_int(json, path, "d_ff", gate ? gate : up, hidden) ||
        !sc__config_int(json, path, "vocab_size", words, &t->t5.vocabulary) ||
        !sc__config_int(json, path, "relative_attention_num_buckets", buckets, &t->t5_buckets) ||
        !sc__config_int(json, path, "relative_attention_max_distance", 128, &t->t5_distance) ||
        !sc__activation_named(activation, path, &t->t5.activation))
        return false;
    return (t->t5_buckets >= 4 && t->t5_distance > t->t5_buckets / 4) ||
           sc__fail("%s: relative_attention_num_buckets must be 4 or more, and less than four "
                    "times relative_attention_max_distance", path);
}

/* Half of the buckets for keys behind the query; of each half, half for exact distances, the rest
 * for distances that grow logarithmically up to the largest. */
static int sc__t5_bucket(int distance, int buckets, int largest) {
    int half = buckets / 2, exact = half / 2, d = abs(distance), bucket = distance > 0 ? half : 0;
    if (d < exact) return bucket + d;
    float ratio = logf((float)d / (float)exact) / (float)log((double)largest / exact);
    int far = exact + (int)(ratio * (float)(half - exact));
    return bucket + (far < half - 1 ? far : half - 1);
}

/* The bias for each head and pair of tokens, [H, T, T]: a learned number for the bucket of their
 * distance. */
static sc_tensor *sc__t5_position_bias(sc_text_encoders *s, int tokens) {
    int64_t heads = s->t5.heads, n = s->t5_buckets * heads, size = heads * tokens * tokens;
    size_t bytes = (size_t)n * (size_t)sc_dtype_size(s->t5_bias->dtype);
    float *bias = (float *)sc__alloc((size_t)(size + n), sizeof *bias);
    void *raw = sc__alloc(bytes, 1);
    sc_tensor *x = NULL;
    if (bias && raw && s->backend->download(raw, s->t5_bias->data, bytes)) {
        float *table = bias + size; /* [buckets, H] */
        sc_to_f32(table, raw, s->t5_bias->dtype, n);
        for (int distance = 1 - tokens; distance < tokens; distance++) {
            int bucket = sc__t5_bucket(distance, s->t5_buckets, s->t5_distance);
            for (int q = distance < 0 ? -distance : 0; q < tokens && q + distance < tokens; q++)
                for (int64_t h = 0; h < heads; h++)
                    bias[(h * tokens + q) * tokens + q + distance] = table[bucket * heads + h];
        }
        x = sc_from(s->tape, 3, (const int64_t[]){heads, tokens, tokens}, bias);
    }
    SC_FREE(raw);
    SC_FREE(bias);
    return x;
}

/* ids [tokens] -> context [tokens, t5_width]. */
static bool sc__t5_encode(sc_text_encoders *s, const int32_t *ids, int tokens, float *context) {
    sc_tape *t = s->tape;
    sc_tape_reset(t);
    sc_tensor *x = sc_embed_tokens(t, s->t5.tokens, ids, 1, tokens);
    sc_tensor *bias = sc__t5_position_bias(s, tokens);
    if (!bias || !sc__encoder_layers(t, &s->t5, x, 1, bias)) return false;
    return sc_read(t, sc_rms_norm(t, x, s->t5.norm[0], s->t5.eps), context);
}

/* ---- Both ---- */

/* Opens the weights at `path` and checks the tokenizer, which a plan has not, against them: tokens
 * outside of the embedding table would read past its end. */
static bool sc__encoder_open(sc_text_encoders *t, sc__encoder *e, const char *path) {
    static const char *const norms[] = {"weight", "bias"};
    bool clip = e == &t->clip;
    const char *tokens = clip ? "text_model.embeddings.token_embedding.weight" : "shared.weight";
    const char *last = clip ? "text_model.final_layer_norm." : "encoder.final_layer_norm.";
    char *name = NULL, *text = NULL;
    sc_json *json = NULL;
    int hidden = 0;
    bool ok = sc__read_config(path, &json, &name, &text) &&
              (e->net = sc_net_open(t->backend, path, sc__small_file(t->backend, path))) &&
              (clip ? sc__clip_read_config : sc__t5_read_config)(t, json, name, &hidden);
    if (ok) {
        const int64_t shape[] = {e->vocabulary, e->width};
        ok = (e->layer = (sc__text_layer *)sc__alloc((size_t)e->layers, sizeof *e->layer)) &&
             (e->tokens = sc_net_weight(e->net, tokens, 2, shape)) &&
             (clip ? sc__clip_positions : sc__t5_bias)(t) &&
             sc__open_layer(e->net, last, e->norm, norms, clip ? 2 : 1, e->width, NULL, 0, false);
    }
    for (int i = 0; ok && i < e->layers; i++)
        ok = (clip ? sc__clip_layer : sc__t5_layer)(t, i, hidden);
    ok = ok && sc_net_load(e->net);
    if (ok && e->tokenizer && e->tokenizer->largest >= e->vocabulary)
        ok = sc__fail("%s: vocab_size is %d, but the tokenizer has the id %d", path, e->vocabulary,
                      (int)e->tokenizer->largest);
    sc_json_free(json);
    SC_FREE(name);
    SC_FREE(text);
    return ok;
}

/* A tokenizer's folder beside the models; what single files never carry. */
static sc_tokenizer *sc__open_tokenizer(const char *model, const char *name) {
    char *base = sc__model_folder(model), *path = base ? sc__join(base, name) : NULL;
    sc_tokenizer *t = NULL;
    if (path && sc__exists(path)) t = sc_tokenizer_open(path);
    else if (path)
        sc__fail("%s: no tokenizer here; single-file models carry none: copy the folders tokenizer "
                 "and tokenizer_2 of any FLUX.1 in diffusers' layout to %s", path, base);
    SC_FREE(base);
    SC_FREE(path);
    return t;
}

sc_text_encoders *sc_text_encoders_open(const sc_backend *backend, const char *model) {
    sc_text_encoders *t = (sc_text_encoders *)sc__alloc(1, sizeof *t);
    char *clip = sc__part_path(model, SC__CLIP), *t5 = clip ? sc__part_path(model, SC__T5) : NULL;
    bool ok = t && clip && t5;
    if (ok) t->backend = backend;
    if (ok && backend)
        ok = (t->tape = sc_tape_new(backend)) &&
             (t->clip.tokenizer = sc__open_tokenizer(model, "tokenizer")) &&
             (t->t5.tokenizer = sc__open_tokenizer(model, "tokenizer_2"));
    ok = ok && sc__encoder_open(t, &t->clip, clip) && sc__encoder_open(t, &t->t5, t5);
    SC_FREE(clip);
    SC_FREE(t5);
    if (ok) return t;
    sc_text_encoders_close(t);
    return NULL;
}

bool sc_text_encode(sc_text_encoders *t, const char *prompt, int tokens, float *context,
                    float *pooled) {
    int32_t ids[SC__MAX_TOKENS];
    if (tokens < 2 || tokens > SC__MAX_TOKENS)
        return sc__fail("a prompt takes from 2 to %d text tokens, not %d", SC__MAX_TOKENS, tokens);
    return sc_tokenize(t->clip.tokenizer, prompt, t->clip_length, ids) >= 0 &&
           sc__clip_encode(t, ids, pooled) &&
           sc_tokenize(t->t5.tokenizer, prompt, tokens, ids) >= 0 &&
           sc__t5_encode(t, ids, tokens, context);
}

/* ==== Pictures and data sets ==================================================================
 *
 * A picture is [3, height, width] floats in [-1, 1], whatever it was in its file. Decoding and
 * encoding belong to the programs (see tools.h); here is what a decoder leaves to do:
 * grey, alpha, 16 bits, EXIF orientation, scaling and cropping to a bucket, and reading folders of
 * pictures with captions.
 */

void sc_picture_free(sc_picture *p) {
    SC_FREE(p->rgb);
    *p = (sc_picture){0};
}

static bool sc__picture_new(sc_picture *p, int64_t width, int64_t height) {
    *p = (sc_picture){.width = (int)width, .height = (int)height};
    if (width < 1 || height < 1 || width > 1 << 24 || height > (1 << 28) / width)
        return sc__fail("a picture of %lld x %lld pixels is beyond the limits", (long long)width,
                        (long long)height);
    p->rgb = (float *)sc__alloc((size_t)(3 * width * height), sizeof *p->rgb);
    return p->rgb != NULL;
}

/* EXIF orientations: 5 to 8 swap the axes; some axes of the stored picture run backwards. */
bool sc_picture_from_pixels(sc_picture *p, const void *pixels, int width, int height, int channels,
                            int bits, int orientation) {
    bool swap = orientation > 4, wide = bits == 16;
    bool flip_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    bool flip_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    if (channels < 1 || channels > 4 || (bits != 8 && bits != 16))
        return sc__fail("pixels have %d channels of %d bits; 1 to 4 of 8 or 16 are supported",
                        channels, bits);
    if (!sc__picture_new(p, swap ? height : width, swap ? width : height)) return false;
    int64_t area = (int64_t)width * height;
    int colours = channels < 3 ? 1 : 3;
    const uint8_t *bytes = (const uint8_t *)pixels;
    const uint16_t *words = (const uint16_t *)pixels;
    for (int64_t i = 0; i < area; i++) {
        int64_t x = i % p->width, y = i / p->width, sx = swap ? y : x, sy = swap ? x : y;
        if (flip_x) sx = width - 1 - sx;
        if (flip_y) sy = height - 1 - sy;
        float value[4];
        for (int c = 0; c < channels; c++) {
            int64_t at = (sy * width + sx) * channels + c;
            value[c] = wide ? (float)words[at] / 65535 : (float)bytes[at] / 255;
        }
        float alpha = channels % 2 == 0 ? value[channels - 1] : 1;
        for (int c = 0; c < 3; c++)
            p->rgb[c * area + i] = 2 * (value[colours == 3 ? c : 0] * alpha + 1 - alpha) - 1;
    }
    return true;
}

void sc_picture_to_pixels(const sc_picture *p, uint8_t *pixels) {
    int64_t area = (int64_t)p->width * p->height;
    for (int64_t i = 0; i < 3 * area; i++) {
        float v = p->rgb[i % 3 * area + i / 3] * 127.5f + 127.5f;
        pixels[i] = (uint8_t)(v >= 255 ? 255 : v > 0 ? v + 0.5f : 0); /* NaN: 0 */
    }
}

/* ---- Scaling and cropping ---- */

/* Keys' cubic with a = -1/2. */
static double sc__cubic(double x) {
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/* Rows of n values, of which [start, start + length) is scaled to m values; out [m, rows] is
 * transposed, so that doing it twice scales both sides. Shrinking widens the kernel (antialias). */
static bool sc__resample(float *out, int64_t m, const float *in, int64_t rows, int64_t n,
                         double start, double length) {
    double scale = length / (double)m, widen = scale > 1 ? scale : 1;
    int64_t taps = (int64_t)(4 * widen) + 3;
    float *weights = (float *)sc__alloc((size_t)(m * taps), sizeof *weights);
    if (!weights) return false;
    SC_PARALLEL_FOR
    for (int64_t i = 0; i < m; i++) {
        double centre = start + ((double)i + 0.5) * scale, sum = 0;
        int64_t first = (int64_t)floor(centre - 2 * widen + 0.5);
        int64_t last = (int64_t)(centre + 2 * widen + 0.5);
        float *w = weights + i * taps;
        if (first < 0) first = 0;
        if (last > n) last = n;
        for (int64_t j = first; j < last; j++) sum += sc__cubic(((double)j + 0.5 - centre) / widen);
        for (int64_t j = first; j < last; j++)
            w[j - first] = (float)(sc__cubic(((double)j + 0.5 - centre) / widen) / sum);
        for (int64_t r = 0; r < rows; r++) {
            float value = 0;
            SC_SIMD_SUM(value)
            for (int64_t j = first; j < last; j++) value += w[j - first] * in[r * n + j];
            out[i * rows + r] = value;
        }
    }
    SC_FREE(weights);
    return true;
}

bool sc_picture_fit(sc_picture *out, const sc_picture *p, int width, int height) {
    *out = (sc_picture){0};
    double scale_x = (double)width / p->width, scale_y = (double)height / p->height;
    double scale = scale_x > scale_y ? scale_x : scale_y;
    double box_width = width / scale, box_height = height / scale; /* of p; the part that is kept */
    size_t columns = width > 0 ? (size_t)width : 1;
    float *half = (float *)sc__alloc((size_t)p->height, columns * sizeof *half);
    bool ok = half && sc__picture_new(out, width, height);
    for (int64_t c = 0; ok && c < 3; c++)
        ok = sc__resample(half, width, p->rgb + c * p->width * p->height, p->height, p->width,
                          (p->width - box_width) / 2, box_width) &&
             sc__resample(out->rgb + c * width * height, height, half, width, p->height,
                          (p->height - box_height) / 2, box_height);
    for (int64_t i = 0; ok && i < (int64_t)3 * width * height; i++) /* the cubic overshoots */
        out->rgb[i] = out->rgb[i] < -1 ? -1 : out->rgb[i] > 1 ? 1 : out->rgb[i];
    SC_FREE(half);
    if (!ok) sc_picture_free(out);
    return ok;
}

void sc_bucket(int width, int height, int resolution, int multiple, int *bucket_width,
               int *bucket_height) {
    int side = resolution / multiple < 1 ? 1 : resolution / multiple;
    double nearest = INFINITY;
    for (int a = 1; a <= 2 * side; a++) {
        int64_t area = (int64_t)resolution * resolution / multiple / multiple;
        int b = (int)(area / a < 2 * side ? area / a : 2 * side);
        double distance = fabs(log((double)a / b * height / width));
        if (b < 1 || distance >= nearest) continue;
        nearest = distance;
        *bucket_width = a * multiple;
        *bucket_height = b * multiple;
    }
    if (!(nearest < INFINITY)) *bucket_width = *bucket_height = multiple;
}

/* ---- EXIF orientation: tag 0x0112 of the first directory of a TIFF block ---- */

static uint32_t sc__bytes(const uint8_t *p, int count, bool big_endian) {
    uint32_t value = 0;
    for (int i = 0; i < count; i++) value |= (uint32_t)p[i] << 8 * (big_endian ? count - 1 - i : i);
    return value;
}

static int sc__tiff_orientation(const uint8_t *tiff, size_t size) {
    if (size < 8 || (memcmp(tiff, "II*", 4) && memcmp(tiff, "MM\0*", 4))) return 1;
    bool big = *tiff == 'M';
    size_t at = sc__bytes(tiff + 4, 4, big);
    if (at > size - 2) return 1;
    uint32_t entries = sc__bytes(tiff + at, 2, big);
    for (at += 2; entries > 0 && at <= size && size - at >= 12; entries--, at += 12)
        if (sc__bytes(tiff + at, 2, big) == 0x0112) {
            uint32_t value = sc__bytes(tiff + at + 8, 2, big);
            return value >= 1 && value <= 8 ? (int)value : 1;
        }
    return 1;
}

/* Steps through a PNG's chunks or a JPEG's segments up to its picture data: the payload of the next
 * one named `tag` (PNG: "eXIf"; JPEG: the byte of the marker), from *at on; NULL: no more. */
static const uint8_t *sc__chunk(const uint8_t *bytes, size_t size, size_t *at, const char *tag,
                                size_t *length) {
    bool png = size > 8 && !memcmp(bytes, "\x89PNG\r\n\x1a\n", 8);
    if (!png && (size < 4 || bytes[0] != 0xff || bytes[1] != 0xd8)) return NULL;
    if (*at == 0) *at = png ? 8 : 2;
    while (*at < size && size - *at >= (png ? 12u : 4u)) {
        const uint8_t *p = bytes + *at;
        size_t head = png ? 8 : 4, n = png ? sc__bytes(p, 4, true) : sc__bytes(p + 2, 2, true) - 2u;
        if (!png && p[0] != 0xff) return NULL;
        if (!png && p[1] == 0xff) { /* a marker may be padded */
            ++*at;
            continue;
        }
        if (n > size - *at - (png ? 12u : 4u)) return NULL;
        *at += head + n + (png ? 4 : 0);
        *length = n;
        if (png ? !memcmp(p + 4, tag, 4) : p[1] == (uint8_t)*tag) return p + head;
        if (!png && p[1] == 0xda) return NULL;
    }
    return NULL;
}

int sc_exif_orientation(const uint8_t *bytes, size_t size) {
    size_t at = 0, length = 0;
    bool png = size > 0 && bytes[0] == 0x89;
    const uint8_t *p;
    while ((p = sc__chunk(bytes, size, &at, png ? "eXIf" : "\xe1", &length))) {
        if (png) return sc__tiff_orientation(p, length);
        if (length >= 6 && !memcmp(p, "Exif\0", 6)) return sc__tiff_orientation(p + 6, length - 6);
    }
    return 1;
}

/* ---- Folders of pictures with captions ---- */

/* A copy of text[n], behind which there is a NUL, as valid UTF-8: bytes that are not become U+FFFD,
 * NUL a space; without a byte order mark and white space at the ends. */
static char *sc__clean_text(const char *text, size_t n) {
    static const char space[] = " \t\n\v\f\r"; /* and its NUL; isspace would ask the locale */
    char *clean = (char *)sc__alloc(3 * n + 1, 1), *to = clean;
    const char *p = text, *end = text + n;
    if (!clean) return NULL;
    if (n >= 3 && !memcmp(p, "\xef\xbb\xbf", 3)) p += 3;
    while (p < end && memchr(space, *p, sizeof space)) p++;
    while (end > p && memchr(space, end[-1], sizeof space)) end--;
    for (int size; p < end; p += size ? size : 1) {
        size = sc__utf8_size(p);
        if (!size) to += sc__utf8_encode(0xfffd, to);
        for (int i = 0; i < size; i++) *to++ = p[i] ? p[i] : ' ';
    }
    *to = 0;
    return clean;
}

/* Takes `caption`; NULL means that an error is already set. */
static bool sc__dataset_add(sc_dataset *d, const char *folder, const char *name, char *caption) {
    char *path = caption ? sc__join(folder, name) : NULL;
    sc_pair *pairs = path ? (sc_pair *)sc__grow(d->pairs, d->count, sizeof *pairs) : NULL;
    if (pairs) {
        d->pairs = pairs;
        d->pairs[d->count++] = (sc_pair){path, caption};
        return true;
    }
    SC_FREE(path);
    SC_FREE(caption);
    return false;
}

static bool sc__dataset_line(sc_dataset *d, const char *folder, const char *path, int64_t number,
                             const char *line, size_t length) {
    static const char *const keys[] = {"prompt", "text", "caption"};
    char where[1024];
    snprintf(where, sizeof where, "%s:%lld", path, (long long)number);
    sc_json *json = sc_json_parse(line, length, where);
    if (!json) return false;
    const char *name = sc_json_string(sc_json_get(json, "file_name"), NULL), *caption = NULL;
    for (int i = 0; i < 3 && !caption; i++)
        caption = sc_json_string(sc_json_get(json, keys[i]), NULL);
    bool ok = true;
    if (!name || !*name) ok = sc__fail("%s: no 'file_name'", where);
    else if (!caption) ok = sc__fail("%s: no 'prompt', 'text' or 'caption' for %s", where, name);
    else if (*name == '/' || !strncmp(name, "../", 3) || strstr(name, "/../"))
        ok = sc__fail("%s: file_name '%s' is outside the folder", where, name);
    ok = ok && sc__dataset_add(d, folder, name, sc__clean_text(caption, strlen(caption)));
    sc_json_free(json);
    return ok;
}

static bool sc__dataset_metadata(sc_dataset *d, const char *folder, const char *path) {
    size_t length = 0, at = 0;
    char *text = sc__read_file(path, &length);
    bool ok = text != NULL;
    for (int64_t number = 1; ok && at < length; number++) {
        const char *line = text + at, *newline = (const char *)memchr(line, '\n', length - at);
        size_t n = newline ? (size_t)(newline - line) : length - at;
        at += n + 1;
        if (number == 1 && n >= 3 && !memcmp(line, "\xef\xbb\xbf", 3)) line += 3, n -= 3;
        if (strspn(line, " \t\r") < n) ok = sc__dataset_line(d, folder, path, number, line, n);
    }
    SC_FREE(text);
    return ok;
}

/* Pictures without captions: how many, and the first names. */
typedef struct sc__lacking { int64_t count; char names[512]; } sc__lacking;

/* One file of a folder without metadata.jsonl: if it is a picture, its caption is in name.txt. */
static bool sc__dataset_file(sc_dataset *d, const char *folder, const char *name,
                             sc__lacking *lacking) {
    const char *dot = strrchr(name, '.');
    if (*name == '.' || !dot ||
        (strcasecmp(dot, ".png") && strcasecmp(dot, ".jpg") && strcasecmp(dot, ".jpeg")))
        return true;
    size_t length = 0;
    char *path = sc__join(folder, name), *text = NULL;
    if (path) memcpy(strrchr(path, '.'), ".txt", 5); /* no ending of a picture is shorter */
    bool ok = path != NULL;
    if (ok && !sc__exists(path)) {
        size_t used = strlen(lacking->names);
        if (lacking->count++ < 5)
            snprintf(lacking->names + used, sizeof lacking->names - used, " %s", name);
    } else
        ok = ok && (text = sc__read_file(path, &length)) &&
             sc__dataset_add(d, folder, name, sc__clean_text(text, length));
    SC_FREE(text);
    SC_FREE(path);
    return ok;
}

static int sc__compare_pairs(const void *a, const void *b) {
    const sc_pair *p = (const sc_pair *)a, *q = (const sc_pair *)b;
    int order = strcmp(p->path, q->path);
    return order ? order : strcmp(p->caption, q->caption);
}

sc_dataset *sc_dataset_open(const char *folder) {
    sc_dataset *d = (sc_dataset *)sc__alloc(1, sizeof *d);
    char *path = sc__join(folder, "metadata.jsonl");
    bool ok = d && path;
    if (ok && sc__exists(path)) ok = sc__dataset_metadata(d, folder, path);
    else if (ok) {
        sc__lacking lacking = {0};
        DIR *directory = opendir(folder);
        if (!directory) ok = sc__fail("%s: %s", folder, strerror(errno));
        for (struct dirent *e; ok && (e = readdir(directory));)
            ok = sc__dataset_file(d, folder, e->d_name, &lacking);
        if (directory) closedir(directory);
        if (ok && lacking.count)
            ok = sc__fail("%s: no caption for %lld of the pictures:%s%s: write one into name.txt "
                          "beside each (it may be empty)", folder, (long long)lacking.count,
                          lacking.names, lacking.count > 5 ? " ..." : "");
    }
    if (ok && d->count == 0)
        ok = sc__fail("%s: no pictures: put in metadata.jsonl, or name.txt beside name.png or .jpg",
                      folder);
    if (ok) qsort(d->pairs, (size_t)d->count, sizeof *d->pairs, sc__compare_pairs);
    SC_FREE(path);
    if (ok) return d;
    sc_dataset_close(d);
    return NULL;
}

void sc_dataset_close(sc_dataset *d) {
    if (!d) return;
    for (int64_t i = 0; i < d->count; i++) {
        SC_FREE(d->pairs[i].path);
        SC_FREE(d->pairs[i].caption);
    }
    SC_FREE(d->pairs);
    SC_FREE(d);
}

/* ==== Pipeline: a whole model, diffusers' folder or single files ==============================
 *
 * The parts of a FLUX folder that a picture needs: prompt -> text encoders -> transformer -> VAE.
 * The text encoders and the VAE are opened when they are first used, so that a training run whose
 * data is cached never loads them, and can be let go again.
 */

/* A number or a truth value in folder/name under `key`; `fallback` where there is no such file or
 * key. False if the file is broken. */
static bool sc__setting(const char *folder, const char *name, const char *key, double fallback,
                        double *number) {
    char *path = sc__join(folder, name);
    bool there = path && sc__exists(path);
    sc_json *json = there ? sc_json_load(path) : NULL;
    const sc_json *value = sc_json_get(json, key);
    bool absent = !value || value->type == SC__NULL, ok = path && (json || !there);
    *number = absent                     ? fallback
              : sc__json_is(value, SC__BOOL) ? sc_json_bool(value, false)
                                             : sc_json_number(value, NAN);
    if (ok && isnan(*number)) ok = sc__fail("%s: '%s' must be a number", path, key);
    sc_json_free(json);
    SC_FREE(path);
    return ok;
}

/* Numbers of the scheduler, the tokenizer and the VAE that decide how the model is used. Single
 * files come without a scheduler: then it is FLUX.1-dev's or schnell's. */
static bool sc__pipeline_settings(sc_pipeline *p) {
    static const char scheduler[] = "scheduler/scheduler_config.json";
    char *folder = sc__model_folder(p->folder),
         *vae = folder ? sc__part_path(p->folder, SC__VAE) : NULL;
    sc_vae *plan = vae ? sc_vae_open(NULL, vae, false) : NULL;
    const sc_flux_config *c = &p->flux->config;
    bool ok = plan != NULL, guided = c->guidance;
    double dynamic, shift, length;
    ok = ok && sc__setting(folder, scheduler, "use_dynamic_shifting", guided, &dynamic) &&
         sc__setting(folder, scheduler, "shift", 1, &shift) &&
         sc__setting(folder, "tokenizer_2/tokenizer_config.json", "model_max_length",
                     guided ? 512 : 256, &length);
    if (ok) {
        p->shift = dynamic != 0 ? 0 : (float)shift;
        p->text_tokens = length >= 1 && length <= 512 ? (int)length : 512;
        p->resolution = plan->config.resolution;
        p->token_pixels = 2 * sc_vae_factor(plan); /* 2x2 latents of f x f pixels */
        if (p->resolution < p->token_pixels || p->resolution > 1 << 14)
            ok = sc__fail("%s: a wrong sample_size", vae);
        if (!dynamic && !(shift > 0))
            ok = sc__fail("%s/%s: 'shift' must be positive", folder, scheduler);
        int channels = 4 * plan->config.latent_channels; /* of a token */
        if (c->in_channels != channels || c->out_channels != channels)
            ok = sc__fail("%s: the transformer takes tokens of %d channels and makes some of %d, "
                          "the VAE's have %d: this is no plain text-to-image model",
                          p->folder, c->in_channels, c->out_channels, channels);
    }
    sc_vae_close(plan);
    SC_FREE(vae);
    SC_FREE(folder);
    return ok;
}

sc_pipeline *sc_pipeline_open(const sc_backend *backend, const char *model,
                              const sc_pipeline_options *o) {
    sc_pipeline *p = (sc_pipeline *)sc__alloc(1, sizeof *p);
    if (!p) return NULL;
    p->backend = backend;
    p->folder = sc__strdup(model);
    char *path = o->transformer ? sc__strdup(o->transformer)
                 : o->random    ? sc__join(model, "transformer")
                                : sc__part_path(model, SC__TRANSFORMER);
    bool widen = o->widen || (path && !o->random && !o->fp8 && sc__small_file(backend, path));
    if (p->folder && path) p->flux = sc_flux_open(backend, path, widen, o->random, o->seed);
    SC_FREE(path);
    if (p->flux && o->streamed) sc_flux_streamed(p->flux);
    bool ok = p->flux && (!o->fp8 || sc_flux_fp8(p->flux)) &&
              sc__pipeline_settings(p) &&
              (p->tape = sc_tape_new(backend));
    if (ok) return p;
    sc_pipeline_close(p);
    return NULL;
}

void sc_pipeline_release(sc_pipeline *p) {
    sc_text_encoders_close(p->text);
    sc_vae_close(p->vae);
    p->text = NULL;
    p->vae = NULL;
}

void sc_pipeline_close(sc_pipeline *p) {
    if (!p) return;
    sc_pipeline_release(p);
    sc_flux_close(p->flux);
    sc_tape_free(p->tape);
    SC_FREE(p->folder);
    SC_FREE(p);
}

static bool sc__text_is_cut(const sc_text_encoders *t, const char *prompt, int tokens) {
    int32_t ids[SC__MAX_TOKENS + 1];
    return sc_tokenize(t->t5.tokenizer, prompt, tokens + 1, ids) > tokens;
}

/* Where the transformer and 8 GiB to work with would not fit beside them, the encoders go again. */
bool sc_pipeline_text(sc_pipeline *p, const char *prompt, float *context, float *pooled) {
    if (!p->text && !(p->text = sc_text_encoders_open(p->backend, p->folder))) return false;
    const sc_flux_config *c = sc_flux_config_of(p->flux);
    if (p->text->t5.width != c->text_channels || p->text->clip.width != c->pooled_channels)
        return sc__fail("%s: T5 and CLIP give %d and %d channels, the transformer takes %d and %d",
                        p->folder, p->text->t5.width, p->text->clip.width, c->text_channels,
                        c->pooled_channels);
    bool ok = sc_text_encode(p->text, prompt, p->text_tokens, context, pooled);
    p->cut = ok && sc__text_is_cut(p->text, prompt, p->text_tokens);
    if (p->backend->memory_left() < sc_net_waiting(p->flux->net) + ((size_t)8 << 30))
        sc_pipeline_release(p);
    return ok;
}

static bool sc__pipeline_vae(sc_pipeline *p) {
    char *path = p->vae ? NULL : sc__part_path(p->folder, SC__VAE);
    if (path) p->vae = sc_vae_open(p->backend, path, sc__small_file(p->backend, path));
    SC_FREE(path);
    return p->vae != NULL;
}

/* For the VAE's activations: half of what is left, up to 8 GiB. FLUX.1's needs 3 GiB, in bf16 half,
 * to compute nothing twice for 1024 x 1024 pixels. */
static size_t sc__vae_memory(const sc_pipeline *p) {
    size_t half = p->backend->memory_left() / 2, most = (size_t)8 << 30;
    return half < most ? half : most;
}

bool sc_pipeline_encode(sc_pipeline *p, const float *rgb, int width, int height, float *mean,
                        float *std) {
    if (!sc__pipeline_vae(p)) return false;
    int64_t channels = sc_vae_config_of(p->vae)->latent_channels, f = sc_vae_factor(p->vae);
    int64_t h = height / f, w = width / f, n = channels * h * w;
    if (width % p->token_pixels || height % p->token_pixels)
        return sc__fail("encode: sides of a picture must be multiples of %d, not %d x %d",
                        p->token_pixels, width, height);
    float *latents = (float *)sc__alloc((size_t)(2 * n), sizeof *latents);
    bool ok = latents && sc_vae_encode(p->vae, 1, height, width, rgb, latents, latents + n,
                                       sc__vae_memory(p));
    if (ok) {
        sc_vae_normalise(p->vae, n, latents, latents + n);
        sc_pack_latents(1, channels, h, w, latents, mean);
        sc_pack_latents(1, channels, h, w, latents + n, std);
    }
    SC_FREE(latents);
    return ok;
}

bool sc_pipeline_decode(sc_pipeline *p, const float *tokens, int batch, int h, int w, float *rgb) {
    if (batch < 1 || h < 1 || w < 1)
        return sc__fail("decode: %d pictures of %dx%d tokens", batch, w, h);
    if (!sc__pipeline_vae(p)) return false;
    int64_t channels = sc_vae_config_of(p->vae)->latent_channels, n = batch * channels * 4 * h * w;
    float *latents = (float *)sc__alloc((size_t)n, sizeof *latents);
    if (!latents) return false;
    if (!p->backend->on_host) sc_tape_reserve(p->tape, 0); /* its memory is the VAE's now */
    sc_unpack_latents(batch, channels, 2 * h, 2 * w, tokens, latents);
    sc_vae_unnormalise(p->vae, n, latents);
    bool ok = sc_vae_decode(p->vae, batch, 2 * h, 2 * w, latents, rgb, sc__vae_memory(p));
    SC_FREE(latents);
    return ok;
}

#endif /* SHORTCUT_IMPLEMENTATION */
