/* shortcut.h: FLUX.1, SD3.5 and SCFM (few-step distillation of flow models) in one C99 header.
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
 *         sc_pipeline *p = sc_pipeline_open(sc_cpu(), "data/tiny-flux", NULL, NULL);
 *         if (!p) return puts(sc_error()), 1;
 *         int h = p->resolution / p->token_pixels;                      // a grid of h x h tokens
 *         float *rgb = malloc(sizeof(float) * 3 * p->resolution * p->resolution);
 *         sc_sampling s = {.steps = 3, .guidance = 1.5f, .h = h, .w = h,
 *                          .shift = sc_pipeline_shift(p, h * h)};
 *         sc_text text = sc_pipeline_text(p, "a red apple");
 *         if (!text.context ||
 *             !sc_lora_load(p->dit, "lora.safetensors", 1, &(sc_lora_report){0}) ||
 *             !sc_pipeline_draw(p, &s, 1, &text, 1, rgb))               // seed 1; [3, 128, 128]
 *             return puts(sc_error()), 1;
 *         free(text.context);
 *         sc_pipeline_close(p);
 *     }
 * The paper's training, with its settings for FLUX.1-dev (train.c adds data, progress, files):
 *
 *     sc_params *lora = sc_params_lora(p->dit, 64, 64, 1);              // rank, alpha, seed
 *     sc_recipe recipe = {.teacher_ratio = 0.4f, .teacher_steps = 32,
 *                         .self_steps = {2, 4, 8, 16}, .shift = {2.5f, 4.5f},
 *                         .dynamic_shift_ratio = 0.1f, .mu = p->mu, .guidance = {0, 7.5f}};
 *     sc_adamw adamw = {.lr = 2e-5f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f,
 *                       .weight_decay = 1e-4f, .clip = 10};
 *     for (int step = 0; step < 10000; step++) {                        // next_batch: yours
 *         sc_batch batch = next_batch();                                // latents, noise, text
 *         sc_train_gradient(p->dit, lora, p->tape, &recipe, &batch, &rng);
 *         sc_params_step(lora, &adamw, 0.99f, 0.999f);                  // student, fast, slow
 *         sc_params_report(lora, &loss, &norm);                         // of this step
 *     }
 *     sc_lora_save(lora, SC_STUDENT, "lora.safetensors", NULL);
 *
 * CONTENTS. Search for a tag; each section opens with what it does and why. To understand the
 * paper read >>flow, >>scfm and >>step, for the model >>flux and >>lora between them; what they use
 * is in >>api: sc_tensor, the tape's operations, sc_query, sc_model, sc_recipe, sc_draw.
 *     >>api         declarations of all that is public, the table of a backend last (>>backend)
 *   Part I, the paper and the model
 *     >>flow        flow matching: times, and the sampler
 *     >>scfm        SCFM: what the student is asked, and what it should answer
 *     >>flux        the FLUX transformer, forward; >>sd3: SD3.5's
 *     >>lora        LoRA: which numbers are trained, in four sets
 *     >>step        a training step, and the sampler of a whole model
 *   Part II, the machine
 *     >>base        errors, memory, random numbers, data types
 *     >>cpu         operations on the CPU, forward and backward side by side under one formula;
 *                   >>gemm, >>attention, >>conv, >>adamw
 *     >>tape        operations recorded for the way back; >>linear, where LoRA enters a layer;
 *                   >>checkpoint
 *     >>params      the arrays of trained numbers
 *     >>plan        memory of a training step
 *   Part III, files and formats
 *     >>files       whole files, JSON, safetensors       >>names     what weights are called where
 *     >>weights     of a network, from its file          >>open      FLUX: opened and saved
 *     >>lorafiles   LoRAs of all dialects                >>state     a run's, to go on later
 *     >>parts       where a model's parts are            >>vae       pictures <-> latents
 *     >>unicode     what the tokenizers ask of characters
 *     >>tokens      prompts -> ids                       >>text      ids -> vectors: CLIP and T5
 *     >>pictures    and data sets                        >>pipeline  a whole model folder
 *   Part IV, tables of >>unicode
 *
 * DOES NOT
 *   - read or write picture files (stb does, in tools.h), download anything, print, or exit
 *   - run other models than FLUX.1 and SD3.5: no FLUX.2, no SD3 of before
 *   - train text encoders or the VAE; read LoRAs for them, DoRA, LoKr or LoHa (it says so)
 *   - mix picture sizes in one batch, or split one step's model over several GPUs
 *   - swap weights to disk: a model fits in memory, its frozen matrices mapped, or it does not run
 *
 * NOTATION
 *     B batch   T tokens   C channels   H heads   D head size   c caption   h, w grid of tokens
 *     x_t = (1 - t) x0 + t eps   x0 data, eps noise; t = 1 is noise
 *     v   velocity, eps - x0     g  guidance scale     s  time shift     N  steps of a grid
 *     t0, t1, t2  in SCFM: where a step begins, its middle, its end; d1, d2 its halves
 *     [B,T,C]  shape, row-major  A, B  LoRA factors: W + scale * B A
 *
 * EASY TO GET WRONG (more stands beside the code: search for "Easy to get wrong")
 *   - t = 1 is noise, t = 0 is data, and an Euler step goes down: x - (t - t') v.
 *   - The first time is 1 - 1e-5, not 1 (which is what bf16 makes of it).
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

#if defined(__GNUC__)
#define SC_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define SC_PRINTF(text, first)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ==== Errors ==================================================================== >>api =======
 * In all that follows false, NULL or -1 means failure, and sc_error() says what was attempted,
 * expected and found. What _open, _new, _parse and _load return is yours, to be given to _close or
 * _free; const pointers live as long as what they were asked of. Host arrays are yours. A tape, and
 * a model that computes on it, belong to one thread at a time, and all that is on a GPU to one. */
const char *sc_error(void); /* the last failure on this thread, one line; valid until the next */
/* Sets it, as printf formats it, and returns false, so that `return sc_fail(...)` reads well: for
 * what is built on this header. Control characters become ?, which a terminal does not obey. */
bool sc_fail(const char *format, ...) SC_PRINTF(1, 2);

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
    bool shared, stale;         /* its memory serves all blocks by turns; overwritten */
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

/* ==== What computes ====
 * A backend is a table of operations (its declaration stands at the end: >>backend). */
typedef struct sc_backend sc_backend;
const sc_backend *sc_cpu(void);     /* OpenMP's threads call OpenBLAS, which gets one each */
void sc_set_threads(int n);         /* CPU threads that this one may use; 0: no change */
const sc_backend *sc_cuda(void);    /* shortcut_cuda.cu; NULL with the error set: no usable GPU */

/* ==== Tape: eager operations, recorded when a gradient is wanted ====
 * Every operation returns a new tensor in the tape's arena (valid until sc_tape_reset), or NULL
 * with the error set; an operation given NULL returns NULL, so a model is written without checks
 * and tests its last result only. Shapes: B batch, T tokens, C channels, H heads. */
typedef struct sc_tape sc_tape;
typedef enum { SC_SILU, SC_GELU_TANH, SC_GELU, SC_QUICK_GELU } sc_activation;

/* Four versions of the trained numbers (LoRA factors, or all weights): the frozen teacher's, the
 * student's, its fast and its slow average (>>scfm). A model that only samples is the teacher, with
 * the LoRAs that were loaded. */
typedef enum { SC_TEACHER, SC_STUDENT, SC_FAST, SC_SLOW, SC_SETS } sc_set;

typedef struct sc_adapter {     /* LoRA on one linear layer: W + scale * B A */
    int rank;
    float scale;
    sc_tensor a[SC_SETS];       /* [rank, in]; without data this set adds nothing */
    sc_tensor b[SC_SETS];       /* [out, rank] */
    bool loaded;                /* from a file, for sampling; freed by sc_lora_unload */
    struct sc_adapter *next;    /* another LoRA on the same layer */
} sc_adapter;

typedef struct sc_linear_layer {
    sc_tensor *weight;          /* [out, in]; of a norm [C], of a convolution [out, in, k, k] */
    sc_tensor *bias;            /* [out], or NULL */
    sc_adapter *adapters;
} sc_linear_layer;

sc_tape *sc_tape_new(const sc_backend *backend);
void sc_tape_free(sc_tape *tape);       /* and this thread's working memory; NULL: that alone */
void sc_tape_reset(sc_tape *tape);                       /* forget all tensors, keep the memory */
bool sc_tape_record(sc_tape *tape, bool recording);      /* returns how it was before */
void sc_tape_use(sc_tape *tape, const uint8_t *set_of_sample); /* [B] sc_set; NULL: all teacher */
/* Host memory that lives as long as tensors do: for coefficients, times, sets. */
void *sc_tape_host(sc_tape *tape, size_t bytes);
/* What is made after sc_tape_mark, and not recorded, is given back by sc_tape_rewind. */
typedef struct sc_place { int chunk; size_t used, taken; } sc_place; /* bytes: of it, of all */
typedef struct sc_mark { sc_place host, device; } sc_mark;
sc_mark sc_tape_mark(const sc_tape *tape);
void sc_tape_rewind(sc_tape *tape, sc_mark mark);
size_t sc_tape_bytes(const sc_tape *tape);               /* memory held */
bool sc_tape_reserve(sc_tape *tape, size_t bytes);       /* forget all tensors, hold exactly this */
bool sc_backward(sc_tape *tape);                         /* from the recorded loss to every leaf */

/* An activation, not initialised; and one from f32 values. */
sc_tensor *sc_new(sc_tape *t, int ndim, const int64_t *shape);
sc_tensor *sc_from(sc_tape *t, int ndim, const int64_t *shape, const float *values);
bool sc_read(sc_tape *t, const sc_tensor *x, float *values);            /* download as f32 */

/* [..., in] -> [..., out]; and gelu of it, tanh form. */
sc_tensor *sc_linear(sc_tape *t, const sc_tensor *x, const sc_linear_layer *layer);
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
/* [B,Ta,C], [B,Tb,C] -> [B,Ta+Tb,C]; and back, [B,T,C] -> [B,count,C]. */
sc_tensor *sc_concat_tokens(sc_tape *t, sc_tensor *a, sc_tensor *b);
sc_tensor *sc_slice_tokens(sc_tape *t, sc_tensor *x, int64_t from, int64_t count);
sc_tensor *sc_swap_axes(sc_tape *t, sc_tensor *x);      /* [B,M,N] -> [B,N,M] */
/* a [B,T,Ca] and gelu(linear(x)) [B,T,Cb] -> [B,T,Ca+Cb]. */
sc_tensor *sc_concat_gelu(sc_tape *t, sc_tensor *a, const sc_tensor *x,
                          const sc_linear_layer *layer);
/* softmax(scale q k^T + bias) v, head by head; q [B,Tq,C], k, v [B,T,C]; bias [H,Tq,T] or NULL.
 * Not recorded if it has a bias or is causal. */
sc_tensor *sc_attention(sc_tape *t, sc_tensor *q, sc_tensor *k, sc_tensor *v, int heads,
                        float scale, const sc_tensor *bias, bool causal);
/* times, or guidance, [batch] on the host -> sinusoids of 1000 times it, [batch, channels] */
sc_tensor *sc_timestep_embedding(sc_tape *t, const float *times, int64_t batch, int64_t channels);
/* p[b] u[b] + q[b] v[b]; p and q [B] on the host, as long as tensors live */
sc_tensor *sc_blend(sc_tape *t, const float *p, sc_tensor *u, const float *q, sc_tensor *v);
/* Mean square error times `part`, into *loss, which is the backend's memory. */
bool sc_mse(sc_tape *t, sc_tensor *x, const sc_tensor *target, double part, double *loss);

/* Operations of the frozen networks (text encoders, VAE, evaluator); not recorded. Norms are over
 * the last dimension, w and b [C], or without b RMS norms; ids [batch, tokens] on the host, table
 * [vocabulary, C]. */
sc_tensor *sc_layer_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                         float eps);
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
/* Samples [first, first + count) of x, the same memory, of the gradient too. */
sc_tensor *sc_samples(sc_tape *t, const sc_tensor *x, int64_t first, int64_t count);
/* Copies x over y, as many numbers; not recorded. False: one of them is NULL. */
bool sc_copy(sc_tape *t, sc_tensor *y, const sc_tensor *x);
/* same memory, of the gradient too; new shape */
sc_tensor *sc_reshape(sc_tape *t, const sc_tensor *x, int ndim, const int64_t *shape);

/* A block reads in[] (2 to 5) and makes out[0] and perhaps out[1], no larger than in[0] and in[1].
 * For the backward pass its activations are kept, or only its inputs, and it runs again
 * (checkpointing); gradients inside it live no longer than its part of that pass. */
typedef bool (*sc_block)(sc_tape *t, sc_tensor **in, sc_tensor **out, const void *context);
bool sc_run_block(sc_tape *t, sc_block block, const void *context, sc_tensor **in, int inputs,
                  sc_tensor **out, bool keep);

/* ==== Weights of a network ==== */
typedef struct sc_file sc_file;  /* one or several mapped safetensors files */
#define SC_MAX_NAME 128         /* of a module */

typedef struct sc_weight {
    char name[2 * SC_MAX_NAME];
    sc_tensor tensor;
    sc_tensor source;           /* as its file has it (mapped); data is NULL where it was drawn */
    bool swapped;               /* the halves of the source's rows are exchanged */
    float *scales;              /* of a source of 8 bits, [rows], until they are loaded, or NULL */
    bool owned;                 /* its memory is the backend's, not the mapped file's */
    bool waiting;               /* in the file: sc_net_load will copy it to the backend */
    bool missing;               /* of a plan: the file has no such weight, or of another shape */
    bool fixed;                 /* a table that is never trained */
    float *before;              /* of a vector that loaded LoRAs changed: as it was, on the host */
} sc_weight;
typedef struct sc_net {
    const sc_backend *backend;  /* NULL: a plan; weights have names and shapes, but no data */
    sc_file *file;              /* NULL: all weights are drawn at random */
    sc_rng rng;                 /* for random weights */
    bool widen;           /* all weights become f32 (to train them, or for a small model's speed) */
    bool fp8;             /* matrices become e4m3 with a scale for each row, when they are loaded */
    bool streamed;        /* matrices stay in host memory, and come when they are needed */
    int levels;                 /* of a VAE, whose files may count them backwards; or blocks */
    const char *const *prefixes;    /* what may stand before the names in its file */
    sc_weight **weights;        /* in the order they were asked for */
    int64_t count;
} sc_net;
/* path: a safetensors file, an index of shards, or a folder with either; NULL: random weights. */
sc_net *sc_net_open(const sc_backend *backend, const char *path, bool widen);
void sc_net_close(sc_net *net);
/* Copies what waits in the file to a backend with memory of its own (or, with fp8, to any): at once
 * after opening, or when the network is first used, so that others may use the memory before. */
bool sc_net_load(sc_net *net);
/* The weight `name` with exactly this shape, under whatever name the file has it (matrices keep
 * their type on disk unless widened, vectors become f32). NULL with the error set, which names the
 * file, what was expected and what found. */
sc_tensor *sc_net_weight(sc_net *net, const char *name, int ndim, const int64_t *shape);
/* How many tensors in the files of these nets (or NULL) none of them asked for, but for some that
 * are known to change nothing; the first names, up to `size` bytes, separated by spaces. */
int64_t sc_net_unread(const sc_net *const *nets, int count, char *names, size_t size);
/* "name.weight" [out, in] and, with `bias`, "name.bias" [out]. */
bool sc_net_linear(sc_net *net, sc_linear_layer *layer, const char *name, int64_t out, int64_t in,
                   bool bias);

/* ==== The transformer: FLUX.1 or SD3.5 ==== */
typedef enum { SC_FLUX, SC_SD3 } sc_architecture;

typedef struct sc_dit_config {      /* transformer/config.json, of FLUX.1-dev; SD3.5-Large */
    sc_architecture kind;
    int in_channels;                /* of a packed latent token: 64; 64 */
    int out_channels;
    int layers, single_layers;      /* double and single blocks: 19, 38; 38, 0 */
    int heads, head_size;           /* 24, 128; 38, 64 */
    int text_channels;              /* joint_attention_dim: 4096 */
    int pooled_channels;            /* pooled_projection_dim: 768; 2048 */
    int rope_axes[3];               /* 16, 56, 56: their sum is head_size; SD3.5 has no RoPE */
    bool guidance;                  /* guidance-distilled (FLUX.1-dev), or not */
    int position_side;              /* SD3.5: sides of its table of positions: 192 */
    int dual_layers;                /* SD3.5-Medium: first blocks with two attentions: 13 */
} sc_dit_config;

typedef struct sc_dit sc_dit;

typedef struct sc_dit_options {
    bool widen;                 /* all weights in f32: to train or merge them */
    bool fp8;                   /* matrices as e4m3, half of bf16's memory; not with `widen` */
    bool streamed;              /* matrices in host memory, for GPUs that are too small */
    bool random;                /* weights drawn from `seed`: widened to train them, else to */
    uint64_t seed;              /* measure speed */
} sc_dit_options;

/* Opens a folder (config.json and weights) or a single file, whose shapes then say the config.
 * options NULL: none. backend NULL: a plan, without data. */
sc_dit *sc_dit_open(const sc_backend *backend, const char *path, const sc_dit_options *options);
void sc_dit_close(sc_dit *dit);
const sc_dit_config *sc_dit_config_of(const sc_dit *dit);
void sc_dit_checkpointing(sc_dit *dit, bool on);  /* recompute each block in the backward pass */
/* Writes config.json and diffusion_pytorch_model.safetensors (weights as `dtype`: f32, bf16 or f16)
 * into `folder`, with W + scale B A where LoRAs are loaded; one weight at a time is in memory. Not
 * beside an index of shards, which readers prefer. */
bool sc_dit_save(const sc_dit *dit, const char *folder, sc_dtype dtype,
                  const char *const *metadata);
const char *sc_dit_config_text(const sc_dit *dit); /* the config.json that it writes */
bool sc_dit_fits(const sc_dit *dit, int h, int w);  /* false: it has no places for h x w tokens */

typedef struct sc_dit_input {
    sc_tensor *x;               /* [B, h*w, in_channels] noisy packed latents */
    sc_tensor *context;         /* [B, T, text_channels] T5 output */
    sc_tensor *pooled;          /* [B, pooled_channels] CLIP output */
    const float *time;          /* [B] in [0, 1]: 1 is noise */
    const float *guidance;      /* [B]; ignored where the model takes none */
    int h, w;                   /* the grid of tokens: latent sides / 2 */
} sc_dit_input;

/* The velocity v(x, t, c, g), [B, h*w, out_channels]; recorded if the tape records: then call
 * sc_backward before asking for another size. */
sc_tensor *sc_dit_velocity(sc_dit *dit, sc_tape *tape, const sc_dit_input *in);

/* ==== Flow matching ====
 * t = 1 is noise, t = 0 is data: x_t = (1 - t) x0 + t eps; the velocity is eps - x0. */
float sc_shift_time(float u, float shift);                      /* s u / (1 + (s - 1) u) */
enum { SC_MAX_SHIFT = 1000 };   /* with a larger one the first time, 1 - 1e-5, is not the largest */
typedef struct sc_mu {          /* of a scheduler: mu, linear in the number of image tokens */
    float base, max;            /* mu at base_tokens and at max_tokens */
    int base_tokens, max_tokens; /* the latter 0: FLUX.1's mu, 0.5 at 256 and 1.15 at 4096 */
} sc_mu;
float sc_dynamic_shift(const sc_mu *mu, int64_t tokens);        /* exp(mu(tokens)) */
/* steps + 1 times, from 1 - 1e-5 down to 0 (the paper's sampler; diffusers' starts at 1). */
void sc_schedule(float *times, int steps, float shift);

/* A velocity model in four versions: what the sampler and SCFM ask for, and no more. FLUX with a
 * batch's text is one, a toy network another. */
typedef struct sc_query {       /* arrays [B], of the samples that x holds: */
    int64_t first;              /* x's first sample's place in the batch, whose texts `self` has */
    const uint8_t *sets;        /* sc_set; NULL: all teacher */
    const float *time, *guidance;
    const float *cfg;           /* true classifier-free guidance (CFG): v_u + cfg (v_c - v_u), v_u
                                 * without caption; two evaluations where not 1; NULL: none */
} sc_query;
typedef struct sc_model {
    sc_tensor *(*velocity)(void *self, sc_tape *t, sc_tensor *x, const sc_query *query);
    void *self;
} sc_model;

typedef struct sc_text {        /* a prompt as FLUX takes it, host f32 */
    float *context, *pooled;    /* [T, text_channels], [pooled_channels] */
    int cut, pooled_cut;        /* the tokens that T5, CLIP read of a longer prompt; 0: all */
} sc_text;

typedef struct sc_sampling {
    int steps;
    float shift;                /* of the times, positive */
    float guidance;             /* the model's input, where it has one */
    int h, w;                   /* sc_sample: grid of tokens */
    float cfg;                  /* true CFG, in two evaluations a step; 0 or 1: none */
    sc_text no_text;            /* for cfg: the negative, or empty, prompt */
    const uint8_t *sets;        /* [B] LoRA set of each sample; NULL: the loaded LoRAs, if any */
    /* After each step; false stops. NULL: none. */
    bool (*progress)(void *user, int step, int steps);
    void *user;
} sc_sampling;

/* Euler steps from noise to data: x, host f32 of `shape`, shape[0] = B samples, holds noise before,
 * the samples after. */
bool sc_euler(const sc_model *model, sc_tape *tape, const sc_sampling *s, int ndim,
              const int64_t *shape, float *x);
/* The same with a transformer: latents [B, h*w, in_channels], texts [B] of text_tokens. Resets the
 * tape. */
bool sc_sample(sc_dit *dit, sc_tape *tape, const sc_sampling *s, int batch, int text_tokens,
               const sc_text *texts, float *latents);

/* ==== What is trained ====
 * All trained numbers lie in one f32 array, in up to four copies (sets), so that a set is chosen by
 * a pointer and one call updates everything. They are either the LoRA factors or all weights. */
typedef struct sc_adamw {        /* one step of AdamW */
    float lr, beta1, beta2, eps, weight_decay;
    float clip;                 /* a longer gradient is shortened to this norm first; 0: never */
    int64_t step;               /* steps done before */
} sc_adamw;

typedef struct sc_params {
    const sc_backend *backend;
    int64_t count;
    float *set[SC_SETS];        /* NULL: not there (the teacher of a LoRA is the bare base) */
    float *grad, *m, *v;        /* gradients and Adam's moments; all arrays are f32, [count] */
    double *results;            /* the backend's: loss and gradient's norm of a step */
    void (*sum)(float *grad, int64_t count); /* over all processes, where it lies; NULL: one */
    int waiting;                /* steps that were not asked about */
    sc_dit *dit;
    /* one for each of the model's linear layers (empty: not trained); NULL: all weights are */
    sc_adapter *adapters;
    int rank;
} sc_params;

/* A new LoRA: A gaussian (std 1/rank), B zero; attached until it is freed. On every layer; SD3.5's
 * leaves alone the text's modulation and MLP, and the second attention. */
sc_params *sc_params_lora(sc_dit *dit, int rank, float alpha, uint64_t seed);
/* All weights (opened with `widen`); teacher: keep a frozen copy of them. From then on the model's
 * weights are these: it computes nothing after sc_params_free. */
sc_params *sc_params_full(sc_dit *dit, bool teacher);
void sc_params_free(sc_params *params);               /* before the model is closed */
void sc_params_use(sc_params *params, sc_set set);    /* all weights only: compute with this one */
void sc_params_copy(sc_params *params, sc_set to, sc_set from); /* sets that are there */
/* One step of the student and both averages (see sc_backend.update), counted in adamw->step. */
void sc_params_step(sc_params *params, sc_adamw *adamw, float fast_decay, float slow_decay);
/* The loss, and the gradient's norm before clipping, of the oldest step not yet reported. Asked one
 * step late, it keeps a GPU busy: this waits for that step only. A thread keeps its last 4 steps,
 * of whichever params: report on that thread, before other params step or these are freed. A norm
 * that is not finite: the step changed nothing. */
bool sc_params_report(sc_params *params, double *loss, double *norm);
/* A run's state in one file, to go on from bit for bit: the student, both averages, Adam's moments,
 * and the teacher where all weights are trained. The metadata (as in sc_file_save) is yours: step
 * and random state. Loading fails, and may have changed some, where the file is of another run. */
bool sc_params_save(const sc_params *params, const char *path, const char *const *metadata);
bool sc_params_load(sc_params *params, const sc_file *file);

/* ==== SCFM, flow matching, guidance distillation ====
 * They differ in what the student is asked (noisy input, time, guidance) and what it should answer
 * (target); all share one batch and one student pass. */
typedef struct sc_recipe {
    float teacher_ratio;        /* SCFM: how often the first half-step is the teacher's */
    int teacher_steps;          /* N of the teacher case, even */
    int self_steps[8];          /* N of the self case: one of these even numbers, ended by 0 */
    float shift[2];             /* the random time shift: uniform between these */
    float dynamic_shift_ratio;  /* how often the dynamic shift of `mu` is used instead */
    sc_mu mu;
    float guidance[2];          /* uniform between these */
    float fm_ratio;             /* part of the batch with the plain flow-matching target; 1: all */
    float caption_dropout;      /* how often the caption is left empty */
    float cfg;                  /* true CFG of the teacher; 0 or 1: none */
    bool cfg_student;           /* of student and averages, too; else the student learns it */
    bool distil_guidance;       /* instead: the teacher's velocity, with true CFG of `guidance` */
} sc_recipe;

typedef struct sc_batch {       /* host f32; one text-picture pair per sample */
    int size, h, w, text_tokens;
    int first, count;           /* samples that give their part of loss and gradient; 0: all */
    const float *x0, *noise;    /* [B, h*w, in_channels] packed latents; N(0, 1) */
    const sc_text *texts;       /* [B] */
    sc_text no_text;            /* the empty caption; for dropout, cfg */
} sc_batch;

typedef struct sc_draw {        /* what chance decides for one sample */
    bool teacher;               /* the first half-step is the teacher's, else the fast average's */
    bool no_caption;
    int steps, j;               /* N, and t0's index in its grid, even */
    float shift, guidance;
    float cfg[2];               /* the teacher's; the student's and its averages' */
    float t[3];                 /* t0, t1, t2: times j, j + 1, j + 2 of the grid */
} sc_draw;

/* tokens: of the picture; flow_matching: t[0] is any in (0, 1), t[1], t[2] mean nothing, cfg 1. */
void sc_draw_sample(const sc_recipe *recipe, sc_rng *rng, int64_t tokens, bool flow_matching,
                    sc_draw *draw);

/* The noisy input x = (1 - t) x0 + t eps, each sample at the first time of its draw. */
sc_tensor *sc_noisy(sc_tape *t, const sc_draw *draws, sc_tensor *x0, sc_tensor *noise);
/* What SCFM wants the student to say of x: fills the samples [from, B) of target, which has x's
 * shape. */
bool sc_scfm_target(const sc_model *model, sc_tape *t, const sc_draw *draws, int64_t from,
                    const sc_tensor *x, sc_tensor *target);

/* One training step's gradient: draws, target, student pass, backward. Resets the tape. On a GPU it
 * may still run on return: sc_params_report has the loss after sc_params_step. False: it added
 * nothing to the gradient, and may have cleared it. */
bool sc_train_gradient(sc_dit *dit, sc_params *params, sc_tape *t, const sc_recipe *recipe,
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
bool sc_plan_memory(sc_dit *dit, sc_params *params, sc_tape *t, const sc_recipe *recipe,
                    const sc_batch *batch, sc_memory_plan *plan);

/* ==== LoRA files ====
 * Written: safetensors, PEFT names, transformer.<module>.lora_A.weight [rank, in] and
 * .lora_B.weight [out, rank], bf16, the scale alpha / rank multiplied into B. Read: those, with any
 * rank and alpha (tensors, diffusers' metadata, or PEFT's adapter_config.json beside its
 * adapter_model.safetensors), the names of diffusers, kohya, OneTrainer, BFL, ComfyUI, LyCORIS and
 * XLabs, changes of biases and norms; what else changes weights (LoKr, DoRA, ...) is refused. */
bool sc_lora_save(const sc_params *params, sc_set set, const char *path,
                  const char *const *metadata);
/* The loaded LoRAs, with their scales, as one file in kohya's names (lora_unet_..., bf16): the
 * parts of a fused layer become one of their ranks' sum, exactly. False where biases changed. */
bool sc_lora_save_kohya(const sc_dit *dit, const char *path, const char *const *metadata);
typedef struct sc_lora_report {
    int applied, total;         /* pairs of A and B, and changed vectors; total: strays too */
    char missed[2048];          /* names that fit no layer, separated by spaces, cut with ... */
} sc_lora_report;
/* Adds a LoRA file to a model, under the teacher set (what sampling uses), on top of those that are
 * loaded; biases and norms change for all sets. False if nothing applies, an adapter has the wrong
 * shape or holds NaN, or the file has more than LoRA; then none is loaded any more. Stays until
 * sc_lora_unload. */
bool sc_lora_load(sc_dit *dit, const char *path, float scale, sc_lora_report *report);
/* What a list such as "3:1@1.5 8:0.6" recommends for a number of steps, that of the nearest: the
 * scale, and the guidance behind the @, NAN where there is none. False: it is no such list. */
bool sc_scale_for(const char *list, int steps, double *scale, double *guidance);
void sc_lora_unload(sc_dit *dit); /* takes all loaded LoRAs off again */
/* Copies a LoRA file, times `scale`, into the sets of `params` (the same layers, the same rank).
 * False: of another model or rank; some may be copied. */
bool sc_lora_start(sc_params *params, const char *path, float scale);

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
    bool assumed;               /* these two are FLUX's, since there is no config.json */
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
 * [B,C,H/f,W/f], not normalised; posterior [B,2C,H/f,W/f]: their mean, then their log variance,
 * clamped to [-30,20]. Activations take `memory` bytes at most (0: no limit): what would take more
 * is computed strip by strip, which takes longer and gives the same but for rounding. Least: the
 * activations of the middle, and a few rows. */
bool sc_vae_encode(sc_vae *vae, int64_t batch, int64_t height, int64_t width, const float *pictures,
                   float *posterior, size_t memory);
/* height and width: of the latents. The pictures may go a little beyond [-1,1]. */
bool sc_vae_decode(sc_vae *vae, int64_t batch, int64_t height, int64_t width,
                   const float *latents, float *pictures, size_t memory);

/* ==== Text encoders: CLIP (pooled vector) and T5 (a vector for each token) ====
 * SD3.5 has two CLIPs, and takes their tokens' vectors, too. */
typedef struct sc_text_encoders sc_text_encoders;
/* From a pipeline: text_encoder, tokenizer, text_encoder_2, tokenizer_2, ..., or single files.
 * backend NULL: a plan, without data and tokenizers. */
sc_text_encoders *sc_text_encoders_open(const sc_backend *backend, const char *model,
                                        sc_architecture kind);
void sc_text_encoders_close(sc_text_encoders *t);
/* context [tokens, T5's width], pooled [CLIP's width], host f32; any UTF-8, empty too. SD3.5:
 * CLIP's tokens first, both CLIPs' channels side by side; pooled: one behind the other. */
bool sc_text_encode(sc_text_encoders *t, const char *prompt, int tokens, float *context,
                    float *pooled);

/* ==== Tokenizers ==== */
typedef struct sc_tokenizer sc_tokenizer;
/* From a folder: tokenizer.json with a Unigram model (T5), or vocab.json and merges.txt (CLIP). */
sc_tokenizer *sc_tokenizer_open(const char *folder);
void sc_tokenizer_close(sc_tokenizer *t);
int sc_tokenizer_length(const sc_tokenizer *t);  /* model_max_length; 0: not said */
/* Exactly `length` ids, cut or padded; the tokens at begin and end are kept, so that CLIP's needs 2
 * at least, T5's 1. Bytes that are not UTF-8 become U+FFFD. Returns how many ids are not padding;
 * -1: error. */
int sc_tokenize(const sc_tokenizer *t, const char *text, int length, int32_t *ids);

/* ==== Pictures and data sets ==== */
typedef struct sc_picture {
    int width, height;
    float *rgb;                 /* [3, height, width] in [-1, 1]; freed by sc_picture_free */
} sc_picture;

/* From decoded pixels, row by row: 1 to 4 channels (grey, grey + alpha, RGB, RGBA) of 16 bits.
 * Alpha is composited on white; `orientation` is EXIF's, 1 to 8. */
bool sc_picture_from_pixels(sc_picture *p, const uint16_t *pixels, int width, int height,
                            int channels, int orientation);
/* To 8-bit pixels [height, width, 3]. */
void sc_picture_to_pixels(const sc_picture *p, uint8_t *pixels);
void sc_picture_free(sc_picture *p);
/* Scales `p` to cover width x height (bicubic, antialiased), cuts what sticks out on both sides. */
bool sc_picture_fit(sc_picture *out, const sc_picture *p, int width, int height);
/* The sides of the aspect bucket for a picture: multiples of `multiple`, no side above twice the
 * resolution, the area up to resolution^2. Of the widest for each height and the tallest for each
 * width, the one whose ratio is nearest to the picture's. */
void sc_bucket(int width, int height, int resolution, int multiple, int *bucket_width,
               int *bucket_height);
/* The orientation, 1 to 8, in an EXIF block (with or without its "Exif\0\0"), else in the text of
 * an XMP packet; 1 where neither has one. Either may be NULL. */
int sc_orientation(const uint8_t *exif, size_t size, const char *xmp);

/* A file of UTF-8, or of UTF-16 with a byte order mark, as UTF-8 without a mark; yours to free.
 * NULL with the error set, which names the byte that is neither. */
char *sc_text_load(const char *path);

typedef struct sc_pair { char *path, *caption; } sc_pair; /* caption: UTF-8, perhaps empty */
typedef struct sc_dataset {
    sc_pair *pairs;             /* in the order of their paths */
    int64_t count;
    char *unused;               /* a line: which pictures and captions are left out; NULL: none */
} sc_dataset;
/* A folder with metadata.jsonl (file_name, and prompt, text or caption), or with name.txt beside
 * every PNG or JPEG. Opens no picture. NULL with the error set, as when nothing is left, or when
 * most of the pictures that are left out have captions. */
sc_dataset *sc_dataset_open(const char *folder);
void sc_dataset_close(sc_dataset *data);

/* ==== Pipeline: a whole model ====
 * A folder in diffusers' layout; a folder with single files (flux1-dev.safetensors, ae.safetensors,
 * clip_l.safetensors, t5xxl_*.safetensors, of any names), tokenizer, tokenizer_2 ...; or one that
 * holds all or some of the parts, the rest being beside it. */

/* SC_T5: FLUX's, whose folder is another than SD3.5's. */
typedef enum { SC_TRANSFORMER, SC_VAE, SC_CLIP, SC_T5, SC_SD3_CLIP_G, SC_SD3_T5, SC_PARTS } sc_part;
/* Where a part is: its folder in diffusers' layout, the model itself, or a file in its folder;
 * yours. NULL: it is not there (the error says what to put where), or cannot be told. */
char *sc_part_path(const char *model, sc_part part);
int sc_part_in_file(const char *path, sc_part part); /* 1 or 0; -1: the file cannot be read */
char *sc_model_folder(const char *model);   /* itself, or that of its single file; yours */
/* A part's network, to look at; NULL: it is not there. */
const sc_net *sc_dit_net(const sc_dit *dit);
const sc_net *sc_vae_net(const sc_vae *vae);
const sc_net *sc_text_net(const sc_text_encoders *text, sc_part part);

typedef struct sc_pipeline {
    const sc_backend *backend;
    char *folder;
    sc_dit *dit;
    sc_vae *vae;                /* NULL until it is needed, as `text` */
    sc_text_encoders *text;     /* CLIP and T5 with their tokenizers */
    sc_tape *tape;
    int text_tokens;            /* of a prompt: T5's, behind */
    int clip_tokens;            /* CLIP's: 77 in SD3.5, else 0 */
    int token_pixels;           /* sides of a picture are multiples of this: 16 */
    int resolution;             /* usual side of a picture, in pixels */
    float shift;                /* of the scheduler; 0: the dynamic one of `mu` */
    sc_mu mu;
} sc_pipeline;

/* transformer: another one's folder or file; NULL: the model's own. options: as in sc_dit_open. */
sc_pipeline *sc_pipeline_open(const sc_backend *backend, const char *model,
                              const char *transformer, const sc_dit_options *options);
void sc_pipeline_close(sc_pipeline *p);
float sc_pipeline_shift(const sc_pipeline *p, int64_t tokens); /* of a picture's times */
void sc_pipeline_release(sc_pipeline *p); /* text encoders and VAE go until they are needed again */

/* A prompt of text_tokens; context is yours, pooled a part of it. NULL with the error set. */
sc_text sc_pipeline_text(sc_pipeline *p, const char *prompt);
/* Pictures of n prompts from the noise of `seed` and those that follow: rgb [n, 3, H, W]. */
bool sc_pipeline_draw(sc_pipeline *p, const sc_sampling *s, int n, const sc_text *texts,
                      uint64_t seed, float *rgb);
/* rgb [3, height, width] in [-1, 1] -> the normalised posterior, packed: mean and std [tokens,
 * in_channels]. */
bool sc_pipeline_encode(sc_pipeline *p, const float *rgb, int width, int height, float *mean,
                        float *std);
/* Packed normalised latents [B, h*w, in_channels] -> rgb [B, 3, H, W] in [-1, 1]. */
bool sc_pipeline_decode(sc_pipeline *p, const float *latents, int batch, int h, int w, float *rgb);

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

/* A .safetensors, an index of shards (.json), or a folder with either. While it is open it may be
 * replaced, as sc_file_save does, but not cut short: reading what is gone ends the program. */
sc_file *sc_file_open(const char *path);
void sc_file_close(sc_file *file);
const char *sc_file_path(const sc_file *file);
/* The path of the index-th mapped file, a shard or the only one. NULL: there are no more. */
const char *sc_file_part(const sc_file *file, int64_t index);
int64_t sc_file_count(const sc_file *file);
const char *sc_file_name(const sc_file *file, int64_t index);
/* The format aligns no data: read it with sc_to_f32, or memcpy. */
const sc_tensor *sc_file_tensor(const sc_file *file, int64_t index);
const sc_tensor *sc_file_find(const sc_file *file, const char *name);    /* NULL: absent */
const char *sc_file_metadata(const sc_file *file, const char *key);      /* NULL: absent */

/* A host tensor and its type in the file: its own, or f32 rounded to bf16 or f16. metadata: key,
 * value, ..., NULL; or NULL. The file appears under `path` when all of it is on disk. */
typedef struct sc_named { const char *name; sc_tensor tensor; sc_dtype dtype; } sc_named;
bool sc_file_save(const char *path, const sc_named *tensors, int64_t count,
                  const char *const *metadata);

/* The bytes of a file of at most 1 GiB, with a NUL behind them; yours. And a file that appears
 * when all of it is on disk: links are followed, what may not be written is not replaced. */
char *sc_read_file(const char *path, size_t *length);
bool sc_write_file(const char *path, const void *data, size_t length);
bool sc_can_write(const char *path); /* would that work? Tried, without a trace */

/* ==== Backend: the operations, behind one table =============================== >>backend ====
 * For whoever writes one.
 * What each computes, forward and backward, and on which shapes, stands over its CPU version. Every
 * pointer inside a tensor that a backend is given is memory of that backend. Activations have the
 * type `activation`; LoRA factors and optimiser state are f32, losses f64; frozen weights keep the
 * type they have on disk. `_backward` functions add into the gradients of inputs that need them,
 * or, where `new_grad` says so, store (of x, h, q, k and v, of which they write all). */
typedef struct sc_matrix {      /* row-major; `transposed`: used as its transpose */
    const void *data;
    sc_dtype dtype;
    int64_t ld;                 /* elements from one stored row to the next */
    bool transposed;
    const float *scale;         /* of each stored row, with SC_F8_E4M3 only; NULL: 1 */
    uint64_t content;           /* of a layer's input: same id, same values; 0: not known */
} sc_matrix;

enum { SC_POSTS = 4, SC_POST_SIZE = 4 };

struct sc_backend {
    const char *name;
    sc_dtype activation;
    bool on_host;               /* its memory is the host's: mapped files are used where they are */
    /* Memory: NULL with the error set when there is not enough. */
    void *(*alloc)(size_t bytes);
    void (*release)(void *p);
    size_t (*memory_left)(void); /* bytes that alloc can still give, about */
    /* Host memory for a matrix that only products read, copied to the device ahead of each use:
     * allocated in the order of a forward pass, but for a few; given back by `release`. NULL:
     * memory is the host's anyway. */
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
    /* b NULL: RMS norm, the mean is taken as 0. */
    void (*layer_norm)(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                       float eps);
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
    /* *loss and *norm are the backend's memory. */
    void (*mse)(double *loss, const sc_tensor *x, const sc_tensor *target, double part);
    void (*mse_backward)(sc_tensor *x, const sc_tensor *target, double part);
    /* One step of the student, w: clips, AdamW, moves the averages that are not NULL (average =
     * decay average + (1 - decay) w), clears the gradient. Of p it reads these arrays and their
     * count. *norm: the gradient's before clipping; not finite: w did not change. */
    void (*update)(const sc_params *p, const sc_adamw *o, const float decay[2], double *norm);
};

#ifdef __cplusplus
}
#endif
#endif /* SHORTCUT_H */

#ifdef SHORTCUT_IMPLEMENTATION
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <locale.h>
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
#define SC_THREAD_LOCAL __thread
#else
#define SC_THREAD_LOCAL
#endif
#ifdef _OPENMP
#include <omp.h>
#define SC_PRAGMA(x) _Pragma(#x)
#define SC_OMP(call, without) (call)
#else
#define SC_PRAGMA(x)
#define SC_OMP(call, without) (without)
#endif
#define SC_PARALLEL_FOR SC_PRAGMA(omp parallel for schedule(static))
#define SC_SIMD SC_PRAGMA(omp simd)
#define SC_SIMD_SUM(s) SC_PRAGMA(omp simd reduction(+ : s))

static inline int64_t sc__min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t sc__max(int64_t a, int64_t b) { return a > b ? a : b; }

/* #############################################################################################
 * PART I: THE PAPER AND THE MODEL                                                       >>part1
 *
 * All of SCFM, FLUX.1 and SD3.5, in the order of a training step's ideas: how a picture is drawn,
 * what is learned, what computes the velocity, which numbers are trained, and the step that puts
 * all of it together. It uses what the API above declares, and three functions from below: */
static void *sc__alloc(size_t count, size_t size); /* zeroed host memory */
static sc_params *sc__params_new(sc_dit *dit, int64_t count, bool teacher); /* arrays, all 0 */
static void sc__params_start(sc_params *p, const float *values); /* every set becomes these */

/* ==== Flow matching: times and sampler ========================================= >>flow =======
 *
 * A model learns the velocity v = eps - x0 of the straight path x_t = (1 - t) x0 + t eps from data
 * (t = 0) to noise (t = 1). A sample is drawn by following it back from noise with Euler steps,
 * x_t' = x_t - (t - t') v(x_t, t, c); a time shift s > 1 puts more of them near the noise, where
 * the picture's structure is decided (FLUX's dynamic shift: the more, the larger the picture; mu is
 * its logarithm). The learned velocity of a trained model is an average over
 * pictures, so its paths are curved, and few large steps leave them: SCFM, below, straightens them.
 */

float sc_shift_time(float u, float shift) { return shift * u / (1.f + (shift - 1.f) * u); }

float sc_dynamic_shift(const sc_mu *mu, int64_t tokens) {
    const sc_mu m = mu->max_tokens ? *mu : (sc_mu){0.5f, 1.15f, 256, 4096};
    float part = (float)(tokens - m.base_tokens) / (float)(m.max_tokens - m.base_tokens);
    return expf(m.base + (m.max - m.base) * part);
}

void sc_schedule(float *times, int steps, float shift) {
    for (int i = 0; i <= steps; i++) times[i] = sc_shift_time(1.f - (float)i / (float)steps, shift);
    times[0] = 1.f - 1e-5f; /* the paper's first time */
}

/* `n` host numbers on the tape, all `value` at first: times, guidances, sc_blend's coefficients. Of
 * 3 n numbers x, three arrays are x, x + n and x + 2 n. */
static float *sc__floats(sc_tape *t, int64_t n, float value) {
    float *x = (float *)sc_tape_host(t, (size_t)n * sizeof *x);
    for (int64_t i = 0; x && i < n; i++) x[i] = value;
    return x;
}

bool sc_euler(const sc_model *model, sc_tape *t, const sc_sampling *s, int ndim,
              const int64_t *shape, float *x) {
    int64_t batch = shape[0];
    if (s->steps < 1 || batch < 1)
        return sc_fail("a sample of %d steps, %lld at once: both must be positive", s->steps,
                       (long long)batch);
    if (!(s->shift > 0 && s->shift <= SC_MAX_SHIFT))
        return sc_fail("a time shift of %g: it must lie between 0 and %d", (double)s->shift,
                       SC_MAX_SHIFT);
    float *times = sc__floats(t, s->steps + 1, 0), *guidance = sc__floats(t, batch, s->guidance);
    float *cfg = sc__floats(t, batch, s->cfg), *one = sc__floats(t, 3 * batch, 1);
    float *time = one + batch, *delta = time + batch;
    if (!times || !guidance || !cfg || !one) return false;
    const sc_query query = {0, s->sets, time, guidance, s->cfg ? cfg : NULL};
    sc_schedule(times, s->steps, s->shift);
    sc_mark mark = sc_tape_mark(t); /* each step's tensors are given back after it */
    bool recorded = sc_tape_record(t, false), ok = true;
    for (int i = 0; ok && i < s->steps; i++) {
        for (int64_t b = 0; b < batch; b++) time[b] = times[i], delta[b] = times[i + 1] - times[i];
        sc_tensor *now = sc_from(t, ndim, shape, x);
        sc_tensor *v = now ? model->velocity(model->self, t, now, &query) : NULL;
        ok = sc_read(t, sc_blend(t, one, now, delta, v), x); /* x + (t' - t) v */
        for (int64_t j = 0; ok && j < sc_count(now); j++)
            if (!isfinite(x[j]))
                ok = sc_fail("step %d gave NaN or infinity: are the weights damaged?", i + 1);
        if (ok && s->progress && !s->progress(s->user, i + 1, s->steps)) ok = sc_fail("stopped");
        sc_tape_rewind(t, mark);
    }
    sc_tape_record(t, recorded);
    return ok;
}

/* ==== SCFM: shortcutting a flow-matching model ================================= >>scfm =======
 *
 * Cai et al., "Shortcutting Pre-trained Flow Matching Diffusion Models is Almost Free Lunch"
 * (NeurIPS 2025). One Euler step over an interval should equal two steps over its halves, at every
 * scale at once. A step of training, for each sample:
 *
 *  1. x0, c: a picture's latents and its caption; eps ~ N(0, I). These are the caller's.
 *  2. With probability 0.4 the teacher case, N = 32; else the self case, N of {2, 4, 8, 16}.
 *  3. The grid's times, shift(1 - i / N) for i = 0 ... N, the first 1 - 1e-5; shift ~ U(2.5, 4.5),
 *     or the dynamic one. Guidance g ~ U(0, 7.5): how strongly the caption is followed.
 *  4. j even, below N: the step from t0 over t1 down to t2, the grid's times j, j + 1 and j + 2.
 *     Its halves, unequal because of the shift, are d1 = t0 - t1 and d2 = t1 - t2.
 *  5. x = (1 - t0) x0 + t0 eps
 *  6. v1 = first(x, t0, c, g);  x' = x - d1 v1;  v2 = slow(x', t1, c, g);
 *     target = (d1 v1 + d2 v2) / (d1 + d2), through which no gradient goes
 *  7. loss = mean((student(x, t0, c, g) - target)^2), over the batch. Then AdamW.
 *
 * `slow` and `fast` are exponential moving averages (EMA) of the student, of decay 0.999 and 0.99,
 * at first equal to it: they move less from step to step than it does, and so does the target.
 * `first` is the teacher in its case, which anchors the student to the model it came from, or
 * `fast` in the self case. So two steps of the grid of 32 teach one of 16, two of 16 one of 8, and
 * two of 2 the way as a whole. The network is never told the step size, so the only velocity that
 * satisfies all of them is constant along its trajectory: the flow becomes straight, and few steps
 * follow it.
 *
 * A model without a guidance input is guided by two evaluations (true CFG), v_u + cfg (v_c - v_u),
 * v_u without the caption. Either only the teacher is guided, and then answers both halves of its
 * case, since `slow` is not; the student learns the guidance with the flow, and sampling takes one
 * evaluation a step. Or, as in the official SD3.5 trainer, all four are guided, the gradient goes
 * through both evaluations of the student, and sampling takes two.
 */

/* ---- Steps 2 to 4: chance ---- */

static float sc__between(sc_rng *rng, const float range[2]) {
    return range[0] + (range[1] - range[0]) * sc_uniform(rng);
}

/* All is drawn, wanted or not: each sample takes as much of the random stream. */
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
    d->shift = dynamic ? sc_dynamic_shift(&r->mu, tokens) : shift;
    d->guidance = sc__between(rng, r->guidance);
    d->cfg[0] = r->cfg > 0 && !flow_matching ? r->cfg : 1;
    d->cfg[1] = r->cfg_student ? d->cfg[0] : 1;
    d->j = 2 * sc_uniform_int(rng, d->steps / 2);
    for (int i = 0; i < 3; i++)
        d->t[i] = sc_shift_time(1.f - (float)(d->j + i) / (float)d->steps, d->shift);
    if (flow_matching) d->t[0] = sc_shift_time(unit, d->shift);
    d->t[0] = fminf(d->t[0], 1.f - 1e-5f);
}

/* ---- Step 5: noisy input ---- */

sc_tensor *sc_noisy(sc_tape *t, const sc_draw *draws, sc_tensor *x0, sc_tensor *noise) {
    if (!x0 || !noise) return NULL;
    int64_t n = x0->shape[0];
    float *time = sc__floats(t, n, 0), *rest = sc__floats(t, n, 1);
    if (!time || !rest) return NULL;
    for (int64_t i = 0; i < n; i++) time[i] = draws[i].t[0], rest[i] -= time[i];
    return sc_blend(t, rest, x0, time, noise); /* (1 - t) x0 + t eps */
}

/* ---- Step 6: the target ---- */

bool sc_scfm_target(const sc_model *model, sc_tape *t, const sc_draw *draws, int64_t from,
                    const sc_tensor *x_of_all, sc_tensor *target_of_all) {
    int64_t n = x_of_all->shape[0] - from;
    sc_mark mark = sc_tape_mark(t);
    sc_tensor *x = sc_samples(t, x_of_all, from, n);
    sc_tensor *target = sc_samples(t, target_of_all, from, n);
    float *one = sc__floats(t, 9 * n, 1), *t0 = one + n, *t1 = t0 + n, *g = t1 + n, *cfg1 = g + n;
    float *cfg2 = cfg1 + n, *minus_d1 = cfg2 + n, *part1 = minus_d1 + n, *part2 = part1 + n;
    uint8_t *set1 = (uint8_t *)sc_tape_host(t, (size_t)(2 * n)), *set2 = set1 + n;
    if (!x || !target || !one || !set1) return false;
    for (int64_t i = 0; i < n; i++) {
        const sc_draw *d = &draws[from + i];
        float d1 = d->t[0] - d->t[1], d2 = d->t[1] - d->t[2];
        t0[i] = d->t[0], t1[i] = d->t[1], g[i] = d->guidance;
        minus_d1[i] = -d1, part1[i] = d1 / (d1 + d2), part2[i] = d2 / (d1 + d2);
        bool folded = d->teacher && d->cfg[0] != d->cfg[1]; /* only the teacher is guided */
        set1[i] = d->teacher ? SC_TEACHER : SC_FAST, cfg1[i] = d->cfg[!d->teacher];
        set2[i] = folded ? SC_TEACHER : SC_SLOW, cfg2[i] = d->cfg[!folded];
    }
    const sc_query query1 = {from, set1, t0, g, cfg1}, query2 = {from, set2, t1, g, cfg2};
    bool recorded = sc_tape_record(t, false); /* no gradient */
    sc_tensor *v1 = model->velocity(model->self, t, x, &query1);
    sc_tensor *halfway = sc_blend(t, one, x, minus_d1, v1); /* x - d1 v1 */
    sc_tensor *v2 = halfway ? model->velocity(model->self, t, halfway, &query2) : NULL;
    bool ok = sc_copy(t, target, sc_blend(t, part1, v1, part2, v2));
    sc_tape_record(t, recorded);
    sc_tape_rewind(t, mark);
    return ok;
}

/* ==== FLUX: the velocity of a noisy picture ==================================== >>flux =======
 *
 * Peebles & Xie's diffusion transformer in its multimodal form (Esser et al. 2024), as released in
 * FLUX.1: `layers` double blocks, in which text and image keep their own weights and meet in one
 * attention, then `single_layers` blocks on the joined sequence, attention and MLP side by side.
 * Time, guidance and pooled text become one vector, which modulates every norm (adaLN). Names are
 * diffusers' FluxTransformer2DModel's; how the weights get here is told at >>open.
 *
 * Easy to get wrong: text comes first in every joined sequence. A block's modulation is cut into
 * (shift, scale, gate) for attention, then the same for the MLP; norm_out has (scale, shift).
 * RoPE (rotary positions) turns channels (0,1), (2,3)...; text tokens are at (0,0,0), image tokens
 * at (0,row,column). There is no final norm on the text stream. C: heads times head size.
 */

typedef struct sc__stream {         /* one stream of a double block, or a single block's only one */
    sc_linear_layer mod;            /* [6C, C]; single: [3C, C]; SD3.5: [9C, C] or [2C, C], too */
    sc_linear_layer q, k, v, out;   /* [C, C]; single: no out */
    sc_linear_layer norm_q, norm_k; /* [D], without bias */
    sc_linear_layer up, down;       /* [4C, C], [C, 4C]; single: down [C, 5C], of both */
} sc__stream;

typedef struct sc__block {
    const sc_dit *dit;
    sc__stream stream[2];           /* 0 image, 1 text; single: 0 both, joined */
    sc__stream image_only;          /* SD3.5-Medium's second attention; no weights: none */
    bool last;                      /* SD3.5: nobody reads the text after this block */
} sc__block;

typedef struct sc__module {
    char name[SC_MAX_NAME];
    sc_linear_layer *layer;
    bool untrained;                 /* a new LoRA leaves it as it is */
} sc__module;

struct sc_dit {
    sc_dit_config config;
    sc_net *net;                    /* its weights */
    sc_linear_layer x_embedder, context_embedder; /* SD3.5's first is a convolution on disk */
    sc_tensor *positions;           /* SD3.5: [side^2, C] */
    sc_linear_layer time[2], guidance[2], pooled[2]; /* an MLP of two layers for each */
    sc__block *blocks;              /* the double ones, then the single ones */
    sc_linear_layer norm_out, proj_out;
    sc__module *modules;            /* every linear layer by name: what LoRA can adapt */
    int module_count;
    sc_tensor rope;                 /* [T, D/2, 2], made for: */
    int rope_text, rope_h, rope_w;
    char *config_text;              /* config.json, as it was read */
    int checkpointed;   /* the first so many blocks keep only their inputs for the way back */
};

/* RoPE's (cos, sin) for each token and channel pair, f->rope, kept until the sizes change: pair i
 * of an axis of d channels turns by position * 10000^(-2i/d). SD3.5's stay: (1, 0). */
static bool sc__rope(sc_dit *f, int text, int h, int w) {
    if (f->rope.data && f->rope_text == text && f->rope_h == h && f->rope_w == w) return true;
    const sc_dit_config *c = &f->config;
    const sc_backend *be = f->net->backend;
    int64_t tokens = text + (int64_t)h * w, size = c->head_size;
    float *table = (float *)sc__alloc((size_t)(tokens * size), sizeof *table), *turn = table;
    if (!table) return false;
    for (int64_t token = -text; token < (int64_t)h * w; token++) {
        for (int i = 0; c->kind == SC_SD3 && i < size; i++) *turn++ = i % 2 ? 0 : 1;
        double position[3] = {0, token < 0 ? 0 : (double)(token / w),
                              token < 0 ? 0 : (double)(token % w)};
        for (int axis = 0; axis < 3; axis++)
            for (int i = 0; i < c->rope_axes[axis]; i += 2) {
                double angle = position[axis] * pow(10000.0, -(double)i / c->rope_axes[axis]);
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
    return f->rope.data != NULL;
}

/* Attention among the tokens of one stream, n[0] [B,T,C], or of two, n[0] the image's and n[1] the
 * text's, joined with the text first; without the output layers. */
static sc_tensor *sc__attend(sc_tape *t, const sc__block *block, const sc__stream *s,
                             sc_tensor **n, int streams) {
    const sc_dit_config *c = &block->dit->config;
    const sc_tensor *rope = &block->dit->rope;
    const sc__stream none = {0}, *text = streams > 1 ? &s[1] : &none;
    sc_tensor *q[2] = {NULL}, *k[2] = {NULL}, *v[2] = {NULL};
    for (int i = 0; i < streams; i++) {
        q[i] = sc_linear(t, n[i], &s[i].q);
        k[i] = sc_linear(t, n[i], &s[i].k);
        v[i] = sc_linear(t, n[i], &s[i].v);
    }
    sc_tensor *query = sc_norm_rope(t, q[1], q[0], text->norm_q.weight, s->norm_q.weight, rope);
    sc_tensor *key = sc_norm_rope(t, k[1], k[0], text->norm_k.weight, s->norm_k.weight, rope);
    sc_tensor *value = streams > 1 ? sc_concat_tokens(t, v[1], v[0]) : v[0];
    float scale = 1.f / sqrtf((float)c->head_size);
    return sc_attention(t, query, key, value, c->heads, scale, NULL, false);
}

/* in: image [B,Ti,C], text [B,Tt,C], the modulation vector [B,C]; out: image, text. Of the vectors
 * in mod, 0, 1, 2 are attention's shift, scale and gate, 3, 4, 5 the MLP's. */
static bool sc__double_forward(sc_tape *t, sc_tensor **in, sc_tensor **out, const void *context) {
    const sc__block *block = (const sc__block *)context;
    const sc__stream *stream = block->stream;
    sc_tensor *mod[2], *n[2];
    for (int i = 0; i < 2; i++) { /* 0 image, 1 text */
        mod[i] = sc_linear(t, in[2], &stream[i].mod);
        bool ends = i == 1 && block->last; /* SD3.5: (scale, shift) is all there is */
        n[i] = sc_ln_modulate(t, in[i], mod[i], ends ? 1 : 0, ends ? 0 : 1);
    }
    sc_tensor *o = sc__attend(t, block, stream, n, 2);
    int64_t from[2] = {in[1]->shape[1], 0};
    for (int i = 0; i < (block->last ? 1 : 2); i++) {
        sc_tensor *own = sc_slice_tokens(t, o, from[i], in[i]->shape[1]);
        own = sc_linear(t, own, &stream[i].out);
        sc_tensor *x = sc_gated_residual(t, in[i], own, mod[i], 2);
        if (i == 0 && block->image_only.q.weight) { /* SD3.5-Medium: vectors 6 to 8 */
            n[0] = sc_ln_modulate(t, in[0], mod[0], 6, 7);
            own = sc__attend(t, block, &block->image_only, n, 1);
            x = sc_gated_residual(t, x, sc_linear(t, own, &block->image_only.out), mod[0], 8);
        }
        sc_tensor *h = sc_linear_gelu(t, sc_ln_modulate(t, x, mod[i], 3, 4), &stream[i].up);
        h = sc_linear(t, h, &stream[i].down);
        out[i] = sc_gated_residual(t, x, h, mod[i], 5);
    }
    return out[0] && (block->last || out[1]);
}

/* in: joined tokens [B,T,C], the modulation vector [B,C]; out: joined tokens. One layer, `down`,
 * takes attention's result and the MLP's side by side. */
static bool sc__single_forward(sc_tape *t, sc_tensor **in, sc_tensor **out, const void *context) {
    const sc__block *block = (const sc__block *)context;
    const sc__stream *stream = block->stream;
    sc_tensor *mod = sc_linear(t, in[1], &stream->mod);
    sc_tensor *n = sc_ln_modulate(t, in[0], mod, 0, 1);
    sc_tensor *o = sc__attend(t, block, stream, &n, 1);
    sc_tensor *both = sc_concat_gelu(t, o, n, &stream->up);
    out[0] = sc_gated_residual(t, in[0], sc_linear(t, both, &stream->down), mod, 2);
    return out[0] != NULL;
}

/* An MLP of two layers: linear, SiLU, linear. */
static sc_tensor *sc__embed(sc_tape *t, const sc_linear_layer mlp[2], sc_tensor *x) {
    return sc_linear(t, sc_activate(t, SC_SILU, sc_linear(t, x, &mlp[0])), &mlp[1]);
}

/* The vector that modulates every block: silu(time (+ guidance) + pooled text), [B,C]. */
static sc_tensor *sc__dit_modulation(sc_dit *f, sc_tape *t, const sc_dit_input *in) {
    int64_t batch = in->x->shape[0];
    sc_tensor *sum = sc__embed(t, f->time, sc_timestep_embedding(t, in->time, batch, 256));
    if (f->config.guidance) {
        sc_tensor *guidance = sc_timestep_embedding(t, in->guidance, batch, 256);
        sum = sc_add(t, sum, sc__embed(t, f->guidance, guidance));
    }
    return sc_activate(t, SC_SILU, sc_add(t, sum, sc__embed(t, f->pooled, in->pooled)));
}

/* Replaces the first one or two of x by the block's outputs. */
static bool sc__dit_block(const sc_dit *f, int index, sc_tape *t, sc_block forward,
                           sc_tensor **x, int inputs) {
    sc_tensor *out[2] = {NULL, NULL};
    bool keep = index >= f->checkpointed; /* its activations; or it runs again for the way back */
    bool ok = sc_run_block(t, forward, &f->blocks[index], x, inputs, out, keep);
    x[0] = out[0];
    if (out[1]) x[1] = out[1];
    return ok;
}

/* ---- SD3.5: what differs ---- >>sd3
 * Stable Diffusion 3.5 (diffusers' SD3Transformer2DModel) has double blocks only, without RoPE: a
 * learned vector for each place is added to the picture's tokens once. Its table is square, and
 * its middle is used. In the last block the text is only attended to, its modulation is (scale,
 * shift); in Medium's first blocks the picture's tokens attend to each other once more. There is
 * no guidance input (true CFG, see >>scfm). The text is CLIP's tokens, then T5's. A token's
 * channels go in as FLUX's, channel, row, column, and come out as row, column, channel. */

bool sc_dit_fits(const sc_dit *f, int h, int w) {
    int side = f->config.position_side;
    return f->config.kind != SC_SD3 || (h <= side && w <= side) ||
           sc_fail("%d x %d tokens: this model has places for %d x %d only", w, h, side, side);
}

/* x + the positions of h x w tokens in the middle of the table. */
static sc_tensor *sc__add_positions(const sc_dit *f, sc_tape *t, sc_tensor *x, int h, int w) {
    int side = f->config.position_side, top = (side - h) / 2, left = (side - w) / 2;
    if (!x || !sc_dit_fits(f, h, w)) return NULL;
    int64_t batch = x->shape[0], tokens = (int64_t)h * w;
    int32_t *places = (int32_t *)sc_tape_host(t, (size_t)(batch * tokens) * sizeof *places);
    for (int64_t i = 0; places && i < batch * tokens; i++)
        places[i] = (int32_t)((top + i % tokens / w) * side + left + i % w);
    return places ? sc_add(t, x, sc_embed_tokens(t, f->positions, places, batch, tokens)) : NULL;
}

/* [B,T,4c], channels last -> channels first. */
static sc_tensor *sc__channels_first(sc_tape *t, sc_tensor *x) {
    if (!x) return NULL;
    const int64_t batch = x->shape[0], tokens = x->shape[1], c = x->shape[2];
    x = sc_reshape(t, x, 3, (const int64_t[]){batch * tokens, 4, c / 4});
    return sc_reshape(t, sc_swap_axes(t, x), 3, (const int64_t[]){batch, tokens, c});
}

/* ---- FLUX and SD3.5 ---- */
sc_tensor *sc_dit_velocity(sc_dit *f, sc_tape *t, const sc_dit_input *in) {
    if (!in->x || !in->context || !in->pooled) return NULL;
    bool sd3 = f->config.kind == SC_SD3;
    int64_t text_tokens = in->context->shape[1], image_tokens = (int64_t)in->h * in->w;
    if (in->x->shape[1] != image_tokens)
        return sc_fail("latent has %lld tokens, the grid is %d x %d", (long long)in->x->shape[1],
                       in->h, in->w), NULL;
    int64_t batch = in->x->shape[0];
    if (in->context->shape[0] != batch || in->pooled->shape[0] != batch || !in->time ||
        (f->config.guidance && !in->guidance))
        return sc_fail("%lld latents: as many contexts, pooled texts, times, and guidance scales "
                       "if the model takes them", (long long)batch), NULL;
    if (!sc_net_load(f->net) || !sc__rope(f, (int)text_tokens, in->h, in->w)) return NULL;
    sc_tensor *mod = sc__dit_modulation(f, t, in);
    sc_tensor *x[3] = {sc_linear(t, in->x, &f->x_embedder),
                       sc_linear(t, in->context, &f->context_embedder), mod};
    if (sd3) x[0] = sc__add_positions(f, t, x[0], in->h, in->w);
    if (!x[0] || !x[1] || !mod) return NULL;
    for (int i = 0; i < f->config.layers; i++)
        if (!sc__dit_block(f, i, t, sc__double_forward, x, 3)) return NULL;
    sc_tensor *image = x[0], *joined[2] = {sd3 ? image : sc_concat_tokens(t, x[1], image), mod};
    if (!joined[0]) return NULL;
    for (int i = 0; i < f->config.single_layers; i++)
        if (!sc__dit_block(f, f->config.layers + i, t, sc__single_forward, joined, 2)) return NULL;
    if (!sd3) image = sc_slice_tokens(t, joined[0], text_tokens, image_tokens);
    sc_tensor *n =
        sc_ln_modulate(t, image, sc_linear(t, mod, &f->norm_out), 1, 0); /* scale comes first */
    sc_tensor *v = sc_linear(t, n, &f->proj_out);
    return sd3 ? sc__channels_first(t, v) : v;
}

/* ==== What is trained: LoRA, or all weights ==================================== >>lora =======
 *
 * A LoRA (Hu et al. 2021) adapts a frozen linear layer by two thin matrices, A [r, in] and B
 * [out, r]: y = x W^T + b becomes y = x W^T + b + scale (x A^T) B^T, where scale = alpha / r. A
 * starts gaussian, B zero, so that the first step's student is the teacher. sc_linear (>>linear)
 * does this for all layers, and is the only place that does.
 *
 * SCFM needs four networks: the student, its fast and slow averages, and the teacher. They share
 * everything but the trained numbers, so the numbers of each lie in one array, and a network is an
 * index, its set: nothing is copied or swapped. The teacher of a LoRA has no array: it is the base.
 */

/* An A or B whose numbers lie at `data`. */
static sc_tensor sc__factor(float *data, int64_t rows, int64_t columns) {
    return (sc_tensor){.data = data, .dtype = SC_F32, .ndim = 2, .shape = {rows, columns}};
}

/* Points the adapters of every module at their parts of the arrays, and draws A's in `start`. */
static void sc__attach(sc_params *p, float scale, sc_rng rng, float *start) {
    int64_t at = 0;
    for (int i = 0; i < p->dit->module_count; i++) {
        sc_linear_layer *layer = p->dit->modules[i].layer;
        if (p->dit->modules[i].untrained) continue;
        int64_t out = layer->weight->shape[0], in = layer->weight->shape[1], n = p->rank * in;
        sc_adapter *lora = &p->adapters[i];
        *lora = (sc_adapter){.rank = p->rank, .scale = scale, .next = layer->adapters};
        layer->adapters = lora;
        for (int s = 0; s < SC_SETS; s++) {
            if (!p->set[s]) continue;
            lora->a[s] = sc__factor(p->set[s] + at, p->rank, in);
            lora->b[s] = sc__factor(p->set[s] + at + n, out, p->rank);
        }
        sc_tensor *a = &lora->a[SC_STUDENT], *b = &lora->b[SC_STUDENT];
        a->needs_grad = b->needs_grad = true;
        a->grad = p->grad + at;
        b->grad = p->grad + at + n;
        sc_normal(&rng, start + at, n);
        for (int64_t j = at; j < at + n; j++) start[j] /= (float)p->rank;
        at += n + p->rank * out;
    }
}

sc_params *sc_params_lora(sc_dit *dit, int rank, float alpha, uint64_t seed) {
    if (rank < 1) return sc_fail("a LoRA of rank %d: it must be positive", rank), NULL;
    int64_t count = 0;
    for (int i = 0; i < dit->module_count; i++) {
        const sc_tensor *w = dit->modules[i].layer->weight;
        if (!dit->modules[i].untrained) count += rank * (w->shape[0] + w->shape[1]);
    }
    sc_params *p = sc__params_new(dit, count, false);
    float *start = p ? (float *)sc__alloc((size_t)count, sizeof *start) : NULL;
    size_t modules = (size_t)dit->module_count;
    if (start) p->adapters = (sc_adapter *)sc__alloc(modules, sizeof *p->adapters);
    if (p) p->rank = rank;
    sc_rng own = {sc_random_bits(&(sc_rng){seed})}; /* not the stream that training draws from */
    bool ok = start && p->adapters;
    if (ok) sc__attach(p, alpha / (float)rank, own, start), sc__params_start(p, start);
    SC_FREE(start);
    if (ok) return p;
    return sc_params_free(p), NULL;
}

/* ==== A training step ========================================================== >>step =======
 *
 * A step draws, asks for the target, lets the student answer, and goes back from the loss to the
 * gradients of all trained numbers (>>tape). sc_params_step then moves the numbers w and both
 * averages (>>adamw), with the gradient g clipped to the norm `clip`:
 *   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
 *   w -= lr (m' / (sqrt(v') + eps) + weight_decay w), m' = m / (1 - b1^step), v' likewise;
 *   fast = 0.99 fast + 0.01 w;  slow = 0.999 slow + 0.001 w.
 */

typedef struct sc__dit_model {  /* FLUX with a batch's text, as an sc_model */
    sc_dit *dit;
    sc_params *params;          /* NULL: sampling, with the loaded LoRAs */
    int h, w;
    sc_tensor *context, *pooled;        /* of the batch */
    sc_tensor *no_context, *no_pooled;  /* of one sample without a caption; NULL: no true CFG */
} sc__dit_model;

/* Of the query's samples those from `skip` on, which x holds. */
static sc_tensor *sc__dit_samples(const sc__dit_model *m, sc_tape *t, sc_tensor *x,
                                   const sc_query *q, int64_t skip) {
    int64_t n = x ? x->shape[0] : 0, from = q->first + skip;
    sc_dit_input in = {.x = x, .time = q->time + skip, .guidance = q->guidance + skip, .h = m->h,
                        .w = m->w, .context = sc_samples(t, m->context, from, n),
                        .pooled = sc_samples(t, m->pooled, from, n)};
    return sc_dit_velocity(m->dit, t, &in);
}

/* Without true CFG. With LoRA each sample brings its own set into one pass; with whole weights each
 * run of samples that share a set is a pass. */
static sc_tensor *sc__dit_sets(const sc__dit_model *m, sc_tape *t, sc_tensor *x,
                                const sc_query *q) {
    const uint8_t *sets = q->sets;
    int64_t batch = x ? x->shape[0] : 0, count;
    sc_tensor *all = NULL;
    sc_tape_use(t, sets);
    if (!m->params || m->params->adapters) return sc__dit_samples(m, t, x, q, 0);
    for (int64_t i = 0; i < batch; i += count) {
        for (count = 1; i + count < batch && sets[i + count] == sets[i];) count++;
        if (!m->params->set[sets[i]])
            return sc_fail("the recipe asks a teacher; these weights were given none"), NULL;
        sc_params_use(m->params, (sc_set)sets[i]);
        sc_tensor *v = sc__dit_samples(m, t, sc_samples(t, x, i, count), q, i);
        if (!v || count == batch) return v;
        if (!all) all = sc_new(t, 3, (const int64_t[]){batch, v->shape[1], v->shape[2]});
        if (!sc_copy(t, sc_samples(t, all, i, count), v)) return NULL;
    }
    return all;
}

/* x [n,...], and behind it the first `more` samples of y, or its only one so many times. */
static sc_tensor *sc__extended(sc_tape *t, sc_tensor *x, sc_tensor *y, int64_t more) {
    if (!x || !y) return NULL;
    int64_t n = x->shape[0], shape[SC_MAX_DIMS];
    memcpy(shape, x->shape, sizeof shape);
    shape[0] += more;
    sc_tensor *both = sc_new(t, x->ndim, shape);
    bool ok = sc_copy(t, sc_samples(t, both, 0, n), x);
    for (int64_t i = 0; ok && i < more; i++)
        ok = sc_copy(t, sc_samples(t, both, n + i, 1),
                     sc_samples(t, y, y->shape[0] == 1 ? 0 : i, 1));
    return ok ? both : NULL;
}

/* sc_model.velocity. True CFG's two evaluations are one pass: all samples with their captions, then
 * the first `guided` again without, up to the last whose cfg is not 1. While recording these are
 * all, since sc_copy, which would append the others' v, is not recorded. rest: 1 - cfg. */
static sc_tensor *sc__dit_model_velocity(void *self, sc_tape *t, sc_tensor *x, const sc_query *q) {
    sc__dit_model m = *(sc__dit_model *)self;
    int64_t n = x->shape[0], guided = 0;
    for (int64_t i = 0; q->cfg && i < n; i++)
        if (q->cfg[i] != 1) guided = i + 1;
    if (!guided) return sc__dit_sets(&m, t, x, q);
    if (!m.no_context) return sc_fail("true CFG without an empty or negative prompt"), NULL;
    bool recording = sc_tape_record(t, false);
    if (recording) guided = n;
    float *rest = sc__floats(t, guided + 2 * (n + guided), 1), *time = rest + guided;
    float *guidance = time + n + guided;
    uint8_t *sets = (uint8_t *)sc_tape_host(t, (size_t)(n + guided));
    if (!rest || !sets) return NULL;
    for (int64_t i = 0; i < n + guided; i++) {
        int64_t j = i < n ? i : i - n;
        time[i] = q->time[j], guidance[i] = q->guidance[j], sets[i] = q->sets ? q->sets[j] : 0;
        if (i >= n) rest[j] -= q->cfg[j];
    }
    m.context = sc__extended(t, sc_samples(t, m.context, q->first, n), m.no_context, guided);
    m.pooled = sc__extended(t, sc_samples(t, m.pooled, q->first, n), m.no_pooled, guided);
    sc_tensor *twice = sc__extended(t, x, x, guided);
    sc_tape_record(t, recording);
    const sc_query query = {0, q->sets ? sets : NULL, time, guidance, NULL};
    sc_tensor *v = sc__dit_sets(&m, t, twice, &query);
    sc_tensor *with = sc_samples(t, v, 0, guided), *without = sc_samples(t, v, n, guided);
    sc_tensor *y = sc_blend(t, q->cfg, with, rest, without); /* v_u + cfg (v_c - v_u) */
    return guided < n ? sc__extended(t, y, sc_samples(t, v, guided, n - guided), n - guided) : y;
}

/* Uploads the texts of a batch and the one without a caption, if any; false where there is no
 * memory. */
static bool sc__dit_text(sc__dit_model *m, sc_tape *t, int batch, int text_tokens,
                          const sc_text *texts, sc_text none) {
    const sc_dit_config *c = &m->dit->config;
    int64_t text[] = {batch, text_tokens, c->text_channels}, vector[] = {batch, c->pooled_channels};
    m->context = sc_new(t, 3, text);
    m->pooled = sc_new(t, 2, vector);
    text[0] = vector[0] = 1;
    bool ok = !none.context || !none.pooled ||
              ((m->no_context = sc_from(t, 3, text, none.context)) &&
               (m->no_pooled = sc_from(t, 2, vector, none.pooled)));
    sc_mark mark = sc_tape_mark(t);
    for (int i = 0; ok && i < batch; i++) {
        ok = sc_copy(t, sc_samples(t, m->context, i, 1), sc_from(t, 3, text, texts[i].context)) &&
             sc_copy(t, sc_samples(t, m->pooled, i, 1), sc_from(t, 2, vector, texts[i].pooled));
        sc_tape_rewind(t, mark);
    }
    return ok;
}

/* part * n, rounded at random: 2.3 is 3 with probability 0.3, else 2. */
static int64_t sc__part_of(int64_t n, float part, sc_rng *rng) {
    float exact = part * (float)n, whole = floorf(exact);
    return (int64_t)whole + (exact > whole && sc_uniform(rng) < exact - whole);
}

bool sc_train_gradient(sc_dit *dit, sc_params *params, sc_tape *t, const sc_recipe *r,
                       const sc_batch *b, sc_rng *rng) {
    int64_t n = b->size, own = b->count ? b->count : n, first = b->first;
    int64_t tokens = (int64_t)b->h * b->w, channels = dit->config.in_channels;
    const int64_t shape[] = {own, tokens, channels};
    bool grids = r->teacher_steps >= 2 && r->teacher_steps % 2 == 0, sound = true;
    for (const int *N = r->self_steps; *N; N++) grids = grids && *N >= 2 && *N % 2 == 0;
    for (int i = 0; i < 2; i++) sound = sound && r->shift[i] > 0 && r->shift[i] <= SC_MAX_SHIFT;
    if (!sound || (r->fm_ratio < 1 && !r->distil_guidance && !grids))
        return sc_fail("a recipe: shift up to %d, teacher_steps and self_steps even", SC_MAX_SHIFT);
    if (n < 1 || first < 0 || own < 1 || own > n - first || !b->texts)
        return sc_fail("samples %lld to %lld of a batch of %lld, or no texts", (long long)first,
                       (long long)(first + own), (long long)n);
    sc_tape_reset(t);
    sc_tape_record(t, false);
    sc_text *texts = (sc_text *)sc_tape_host(t, (size_t)n * sizeof *texts);
    sc_draw *draws = (sc_draw *)sc_tape_host(t, (size_t)n * sizeof *draws);
    float *one = sc__floats(t, 5 * n, 1), *time = one + n, *cfg = time + n, *guidance = cfg + n;
    float *minus = guidance + n;
    uint8_t *student = (uint8_t *)sc_tape_host(t, (size_t)(2 * n)), *teacher = student + n;
    if (!texts || !draws || !one || !student) return false;
    /* Steps 2 to 4: chance. Flow matching comes first, then the teacher's case, then the student's
     * own: neighbours with the same set share their matrix products, and true CFG repeats the first
     * only. Only the draws are sorted, not the pictures, on which they do not depend. */
    int64_t plain = r->distil_guidance ? n : sc__part_of(n, r->fm_ratio, rng);
    for (int64_t i = 0, low = plain, high = n; i < n; i++) {
        sc_draw d;
        sc_draw_sample(r, rng, tokens, i < plain, &d);
        int64_t at = i < plain ? i : d.teacher ? low++ : --high;
        draws[at] = d, time[at] = d.t[0], guidance[at] = d.guidance, cfg[at] = d.cfg[1];
        minus[i] = -1, student[at] = SC_STUDENT, teacher[at] = SC_TEACHER;
        texts[at] = d.no_caption ? b->no_text : b->texts[at];
    }
    /* From here on, of all samples those of this process; the first `plain` by flow matching. */
    draws += first, time += first, cfg += first, guidance += first, texts += first;
    plain = sc__max(0, sc__min(plain - first, own));
    /* Step 5: noisy input. */
    sc__dit_model self = {.dit = dit, .params = params, .h = b->h, .w = b->w};
    sc_model model = {sc__dit_model_velocity, &self};
    sc_tensor *x0 = sc_from(t, 3, shape, b->x0 + first * tokens * channels);
    sc_tensor *noise = sc_from(t, 3, shape, b->noise + first * tokens * channels);
    sc_tensor *x = sc_noisy(t, draws, x0, noise), *target = sc_new(t, 3, shape);
    if (!x || !target || !sc__dit_text(&self, t, (int)own, b->text_tokens, texts, b->no_text))
        return false;
    /* Step 6: target. Guidance distillation: the teacher's velocity at guidance 1, with true CFG
     * of the drawn guidance. */
    bool ok = true;
    if (r->distil_guidance) {
        const sc_query query = {0, teacher, time, one, guidance};
        ok = sc_copy(t, target, sc__dit_model_velocity(&self, t, x, &query));
    } else if (plain) /* eps - x0 for all; SCFM then overwrites its samples */
        ok = sc_copy(t, target, sc_blend(t, one, noise, minus, x0));
    if (ok && plain < own) ok = sc_scfm_target(&model, t, draws, plain, x, target);
    /* Step 7: the student's answer, and the way back. */
    sc_tape_record(t, true);
    const sc_query query = {0, student, time, guidance, cfg};
    sc_tensor *v = ok ? sc__dit_model_velocity(&self, t, x, &query) : NULL;
    ok = sc_mse(t, v, target, (double)own / (double)n, &params->results[0]) && sc_backward(t);
    const sc_backend *be = params->backend;
    double loss; /* on the host: did an operation fail? A GPU is not waited for. */
    ok = ok && (!be->on_host || be->download(&loss, params->results, sizeof loss));
    sc_tape_record(t, false);
    sc_tape_use(t, NULL);
    if (!params->adapters) sc_params_use(params, SC_STUDENT);
    if (!ok) be->zero(params->grad, (size_t)params->count * sizeof(float));
    return ok;
}

bool sc_sample(sc_dit *f, sc_tape *t, const sc_sampling *s, int batch, int text_tokens,
               const sc_text *texts, float *latents) {
    const int64_t shape[] = {batch, (int64_t)s->h * s->w, f->config.in_channels};
    sc__dit_model self = {.dit = f, .h = s->h, .w = s->w};
    sc_tape_reset(t);
    bool ok = (batch < 1 || sc__dit_text(&self, t, batch, text_tokens, texts, s->no_text)) &&
              sc_euler(&(sc_model){sc__dit_model_velocity, &self}, t, s, 3, shape, latents);
    sc_tape_use(t, NULL);
    return ok;
}

/* ##############################################################################################
 * PART II: THE MACHINE                                                                   >>part2
 *
 * What Part I stands on: numbers and memory, the operations on the CPU, the tape that
 * differentiates them, and the arrays that training moves.
 */

/* ==== Errors, memory, random numbers, data types =============================== >>base =======
 *
 * A failure is told once, where it is found (>>api): callers that only pass it on say nothing.
 */

static SC_THREAD_LOCAL char sc__message[1024];

const char *sc_error(void) { return sc__message[0] ? sc__message : "no error"; }

/* Text of files and options may hold control characters; those from 0x80 up begin with 0xc2. */
bool sc_fail(const char *format, ...) {
    char text[sizeof sc__message]; /* of which the message until now may become a part */
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    strcpy(sc__message, text);
    for (unsigned char *c = (unsigned char *)sc__message; *c; c++)
        if (*c < ' ' || *c == 127 || (*c == 0xc2 && c[1] < 0xa0)) *c = '?';
    return false;
}

/* Zeroed memory for `count` items of `size` bytes; NULL with the error set. */
static void *sc__alloc(size_t count, size_t size) {
    void *p = count <= SIZE_MAX / 2 / size ? SC_CALLOC(count ? count : 1, size) : NULL;
    if (!p) sc_fail("out of memory (%zu items of %zu bytes)", count, size);
    return p;
}

/* Makes room for one more in a list of `count` items, whose pointer is at `list`: it doubles at
 * powers of two. False with the error set; the list is then as it was. */
static bool sc__grow(void *list, int64_t count, size_t size) {
    if (count & (count - 1)) return true;
    size_t room = count ? 2 * (size_t)count : 1;
    void *items;
    memcpy(&items, list, sizeof items); /* a pointer to any type */
    items = SC_REALLOC(items, room * size);
    if (!items) return sc_fail("out of memory (a list of %zu items)", room);
    memcpy(list, &items, sizeof items);
    return true;
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

int sc_uniform_int(sc_rng *rng, int n) {
    return (int)((sc_random_bits(rng) >> 32) * (uint64_t)n >> 32);
}

/* Two values from each Box-Muller draw. */
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
static size_t sc__size(const sc_tensor *x) { /* bytes */
    return (size_t)(sc_count(x) * sc_dtype_size(x->dtype));
}

static inline int64_t sc__ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline float sc__from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t sc__to_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

/* The number in `count` bytes, up to 4. */
static uint32_t sc__bytes(const void *bytes, int count, bool big_endian) {
    const uint8_t *p = (const uint8_t *)bytes;
    uint32_t value = 0;
    for (int i = 0; i < count; i++) value |= (uint32_t)p[i] << 8 * (big_endian ? count - 1 - i : i);
    return value;
}

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

/* Element by element through memcpy: files may have them at an odd address. */
#define SC__EACH(type, to_f32) \
    for (int64_t i = 0; i < n; i++) { \
        type value; \
        memcpy(&value, (const char *)src + i * (int64_t)sizeof value, sizeof value); \
        dst[i] = to_f32(value); \
    }
void sc_to_f32(float *restrict dst, const void *restrict src, sc_dtype dtype, int64_t n) {
    switch (dtype) {
    case SC_F32: memcpy(dst, src, (size_t)n * 4); break;
    case SC_BF16: SC__EACH(uint16_t, sc__bf16_to_f32) break;
    case SC_F16: SC__EACH(uint16_t, sc__f16_to_f32) break;
    case SC_F8_E4M3: SC__EACH(uint8_t, sc__f8_to_f32) break;
    case SC_F64: SC__EACH(double, (float)) break;
    case SC_I64: SC__EACH(int64_t, (float)) break;
    case SC_I32: SC__EACH(int32_t, (float)) break;
    case SC_U8: SC__EACH(uint8_t, (float)) break;
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
/* Least 1e-26: with less, gradients become denormal, and CPUs multiply those very slowly. */
static inline float sc__sigmoid(float x) { return 1.f / (1.f + sc__exp(x < -60 ? 60 : -x)); }

/* ==== CPU operations ============================================================ >>cpu =======
 *
 * The specification of every operation: plain loops over rows, forward and backward side by side
 * under one formula. Activations and gradients are f32. Large products go to OpenBLAS where it was
 * found (SHORTCUT_OPENBLAS), one single-threaded call per OpenMP thread, so that a program has one
 * pool of threads and not two that fight.
 */

static int sc__threads(void) { return SC_OMP(omp_get_max_threads(), 1); }
static int sc__thread(void) { return SC_OMP(omp_get_thread_num(), 0); }
void sc_set_threads(int n) {
    if (n > 0) SC_OMP(omp_set_num_threads(n), (void)n);
}

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

/* ---- Products ---- >>gemm */

#ifdef SHORTCUT_OPENBLAS
#include <cblas.h>
#endif

/* C = alpha op(A) op(B) + beta C on this thread; row-major, op(A) [m,k], op(B) [k,n]. */
static void sc__sgemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, float alpha,
                      const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                      float *c, int64_t ldc) {
#ifdef SHORTCUT_OPENBLAS
    cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans,
                (int)m, (int)n, (int)k, alpha, a, (int)lda, b, (int)ldb, beta, c, (int)ldc);
#else
    int64_t along = ta ? lda : 1; /* from one element of a row of op(A) to the next */
    for (int64_t i = 0; i < m; i++) {
        float *row = c + i * ldc;
        const float *ai = a + (ta ? i : i * lda), *bp = b;
        for (int64_t j = 0; j < n; j++) row[j] = beta == 0 ? 0 : beta * row[j];
        for (int64_t j = 0; tb && j < n; j++, bp += ldb) {
            float sum = 0;
            SC_SIMD_SUM(sum) for (int64_t p = 0; p < k; p++) sum += ai[p * along] * bp[p];
            row[j] += alpha * sum;
        }
        for (int64_t p = 0; !tb && p < k; p++, bp += ldb) {
            float s = alpha * ai[p * along];
            SC_SIMD for (int64_t j = 0; j < n; j++) row[j] += s * bp[j];
        }
    }
#endif
}

/* A stored [rows, columns] matrix in f32: itself, or widened into *buffer, which then moves on. */
static sc_matrix sc__widen(sc_matrix a, int64_t rows, int64_t columns, float **buffer) {
    if (a.dtype == SC_F32) return a;
    int64_t size = sc_dtype_size(a.dtype);
    float *wide = *buffer;
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        float *to = wide + r * columns;
        sc_to_f32(to, (const char *)a.data + r * a.ld * size, a.dtype, columns);
        if (a.scale) SC_SIMD for (int64_t c = 0; c < columns; c++) to[c] *= a.scale[r];
    }
    *buffer += rows * columns;
    return (sc_matrix){wide, SC_F32, columns, a.transposed, NULL, 0};
}

static void sc__cpu_gemm(int64_t m, int64_t n, int64_t k, float alpha, sc_matrix a, sc_matrix b,
                         float beta, sc_matrix c, const sc_tensor *bias) {
    int64_t wide = (a.dtype != SC_F32 ? m * k : 0) + (b.dtype != SC_F32 ? n * k : 0);
    float *buffer = sc__scratch(wide);
    if (wide && !buffer) return;
    a = sc__widen(a, a.transposed ? k : m, a.transposed ? m : k, &buffer);
    b = sc__widen(b, b.transposed ? n : k, b.transposed ? k : n, &buffer);
    const float *pa = (const float *)a.data, *pb = (const float *)b.data;
    float *pc = (float *)c.data;
    const float *add = bias ? sc__f(bias) : NULL;
    /* Cut the longer side of C into one slice per thread, in multiples of 16. */
    bool by_rows = m >= n;
    int64_t length = by_rows ? m : n, threads = sc__threads();
    int64_t slice = m * n * k < 100000 ? length : sc__ceil_div(length, 16 * threads) * 16;
    SC_PARALLEL_FOR
    for (int64_t start = 0; start < length; start += slice) {
        int64_t size = sc__min(slice, length - start);
        int64_t i0 = by_rows ? start : 0, rows = by_rows ? size : m;
        int64_t j0 = by_rows ? 0 : start, columns = by_rows ? n : size;
        for (int64_t i = i0; add && i < i0 + rows; i++) { /* C = beta C + bias */
            float *row = pc + i * c.ld + j0;
            if (beta == 0) memcpy(row, add + j0, (size_t)columns * 4);
            else SC_SIMD for (int64_t j = 0; j < columns; j++) row[j] = beta * row[j] + add[j0 + j];
        }
        sc__sgemm(a.transposed, b.transposed, rows, columns, k, alpha,
                  pa + (a.transposed ? i0 : i0 * a.ld), a.ld, pb + (b.transposed ? j0 * b.ld : j0),
                  b.ld, add ? 1.f : beta, pc + i0 * c.ld + j0, c.ld);
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
    if (posix_memalign(&p, 64, bytes ? bytes : 64))
        return sc_fail("out of memory: %zu bytes", bytes), NULL;
    return p;
}
static void sc__cpu_release(void *p) { free(p); }
static size_t sc__cpu_memory_left(void) { return SIZE_MAX; } /* the system's swap decides */
static void sc__cpu_upload(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static bool sc__cpu_report(void) {
    bool failed = sc__cpu_failed;
    sc__cpu_failed = false;
    return !failed || sc_fail("out of memory for an operation to work in");
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
    int64_t slice = sc__ceil_div(columns, sc__threads());
    SC_PARALLEL_FOR
    for (int64_t start = 0; start < columns; start += slice) {
        int64_t end = sc__min(start + slice, columns);
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
 * f_i = 10000^(-i/half). (diffusers: Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0))
 * Easy to get wrong: each step is rounded to f32 as there; at t = 1 the last bit of f_i already
 * turns the result by 1e-4. */
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
 * silu(x) = x s(x);  gelu_tanh(x) = x s(k (x + 0.044715 x^3)), k = 2 sqrt(2/pi);
 * quick_gelu(x) = x s(1.702 x);  s is the logistic function: all are x s(u(x)), and
 * (x s(u))' = s(u) + x s(u) (1 - s(u)) u'(x). gelu is exact, x Phi(x). */
static inline float sc__activated(sc_activation kind, float x, float *slope) {
    const float k = 1.5957691216057308f; /* see above */
    if (kind == SC_GELU) {
        float phi = 0.5f * (1 + erff(x * 0.70710678f));
        *slope = phi + x * 0.39894228f * expf(-0.5f * x * x);
        return x * phi;
    }
    float u = x, u1 = 1; /* and its derivative */
    if (kind == SC_QUICK_GELU) u = 1.702f * x, u1 = 1.702f;
    if (kind == SC_GELU_TANH)
        u = k * (x + 0.044715f * x * x * x), u1 = k * (1 + 3 * 0.044715f * x * x);
    float s = sc__sigmoid(u);
    *slope = s + x * s * (1 - s) * u1;
    return x * s;
}

/* y[n] = f(x), or, where there is dx, dx += f'(x) y. */
static inline void sc__activate_row(sc_activation kind, float *y, const float *x, float *dx,
                                    int64_t n) {
    SC_SIMD for (int64_t i = 0; i < n; i++) {
        float slope, value = sc__activated(kind, x[i], &slope);
        if (dx) dx[i] += y[i] * slope;
        else y[i] = value;
    }
}

#define SC__SLICE 4096 /* elements that are worked on at a time */

/* Where no library has the product and its GELU in one, they follow each other. */
static void sc__cpu_gemm_gelu(int64_t m, int64_t n, int64_t k, sc_matrix a, sc_matrix b, float beta,
                              sc_matrix c, const sc_tensor *bias, sc_tensor *before) {
    sc__cpu_gemm(m, n, k, 1, a, b, beta, c, bias);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < m; r++) {
        float *row = (float *)c.data + r * c.ld;
        if (before) memcpy(sc__f(before) + r * n, row, (size_t)n * 4);
        sc__activate_row(SC_GELU_TANH, row, row, NULL, n);
    }
}

static void sc__activate_rows(sc_activation kind, float *y, int64_t width, const sc_tensor *x,
                              float *dx) {
    int64_t n = sc__last(x), rows = sc__rows(x);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        float *py = y + r * width, *px = sc__f(x) + r * n, *pdx = dx ? dx + r * n : NULL;
        switch (kind) { /* constant kinds, so that each loop vectorises */
        case SC_SILU: sc__activate_row(SC_SILU, py, px, pdx, n); break;
        case SC_GELU_TANH: sc__activate_row(SC_GELU_TANH, py, px, pdx, n); break;
        case SC_QUICK_GELU: sc__activate_row(SC_QUICK_GELU, py, px, pdx, n); break;
        case SC_GELU: sc__activate_row(SC_GELU, py, px, pdx, n); break;
        }
    }
}
static void sc__cpu_activate(sc_activation kind, sc_tensor *y, int64_t at, const sc_tensor *x) {
    sc__activate_rows(kind, sc__f(y) + at, sc__last(y), x, NULL);
}
static void sc__cpu_activate_backward(sc_activation kind, const sc_tensor *y, int64_t at,
                                      sc_tensor *x) {
    sc__activate_rows(kind, sc__g(y) + at, sc__last(y), x, sc__sum(x));
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
        for (int64_t i = 0; i < tokens * channels; i += size) { /* a head of a token */
            const float *px = sc__f(x) + b * tokens * channels + i;
            const float *dy = sc__g(y) + (b * y->shape[1] + offset) * channels + i;
            const float *turn = sc__f(rope) + (offset + i / channels) * size;
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
            float *dx = sum + b * tokens * channels + i;
            dot /= (float)size;
            SC_SIMD for (int64_t d = 0; d < size; d++)
                dx[d] += (w[d] * g[d] - px[d] * inverse * dot) * inverse;
        }
    for (int64_t b = 0; partial && b < batch; b++)
        for (int64_t d = 0; d < size; d++) sc__g(weight)[d] += partial[b * size + d];
}

/* ---- Attention, per sample and head: P = softmax(scale Q K^T + bias), O = P V ---- >>attention
 * Rows of queries in blocks, so that the scores need rows * T floats and no more.
 * dV = P^T dO;  dS = P (dO V^T - rowsum(dO O));  dQ = scale dS K;  dK = scale dS^T Q. */

static int64_t sc__attention_rows(int64_t tokens) { /* rows of a block of scores */
    return sc__max(16, sc__min(256, 65536 / tokens));
}

/* Scores of `rows` queries from `first` on, into p[rows, tokens], and their softmax. lse (or NULL)
 * receives the logarithm of each row's sum. */
static void sc__softmax_scores(float *p, float *lse, const float *q, const float *k, int64_t rows,
                               int64_t tokens, int64_t size, int64_t ld, float scale,
                               const float *bias, bool causal, int64_t first) {
    sc__sgemm(false, true, rows, tokens, size, scale, q, ld, k, ld, 0, p, tokens);
    for (int64_t r = 0; r < rows; r++) {
        float *row = p + r * tokens, top = -INFINITY;
        double sum = 0; /* in one float many equal values, as padding's, would all round one way */
        int64_t n = causal ? first + r + 1 : tokens;
        if (bias) SC_SIMD for (int64_t c = 0; c < n; c++) row[c] += bias[r * tokens + c];
        SC_PRAGMA(omp simd reduction(max : top))
        for (int64_t c = 0; c < n; c++) top = row[c] > top ? row[c] : top;
        for (int64_t start = 0; start < n; start += 64) {
            int64_t end = sc__min(start + 64, n);
            float part = 0;
            SC_SIMD_SUM(part)
            for (int64_t c = start; c < end; c++) part += row[c] = sc__exp(row[c] - top);
            sum += part;
        }
        float inverse = (float)(1 / sum);
        if (lse) lse[r] = top + (float)log(sum);
        SC_SIMD for (int64_t c = 0; c < n; c++) row[c] *= inverse;
        for (int64_t c = n; c < tokens; c++) row[c] = 0;
    }
}

static void sc__cpu_attention(sc_tensor *o, float *lse, const sc_tensor *q, const sc_tensor *k,
                              const sc_tensor *v, int heads, float scale, const sc_tensor *bias,
                              bool causal) {
    int64_t ld = q->shape[2], d = ld / heads, nq = q->shape[1], nk = k->shape[1];
    int64_t block = sc__attention_rows(nk), blocks = sc__ceil_div(nq, block);
    float *scratch = sc__scratch(sc__threads() * block * nk);
    if (!scratch) return;
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < q->shape[0] * heads * blocks; task++) {
        int64_t b = task / (heads * blocks), h = task / blocks % heads,
                first = task % blocks * block;
        int64_t rows = sc__min(block, nq - first);
        float *p = scratch + sc__thread() * block * nk;
        int64_t query = (b * nq + first) * ld + h * d, key = b * nk * ld + h * d;
        float *sums = lse ? lse + (b * heads + h) * nq + first : NULL;
        sc__softmax_scores(p, sums, sc__f(q) + query, sc__f(k) + key, rows, nk, d, ld, scale,
                           bias ? sc__f(bias) + (h * nq + first) * nk : NULL, causal, first);
        sc__sgemm(false, false, rows, d, nk, 1, p, nk, sc__f(v) + key, ld, 0, sc__f(o) + query, ld);
    }
}

/* The scores' softmax is made again, so `lse` is not needed here. */
static void sc__cpu_attention_backward(const sc_tensor *o, const float *lse, sc_tensor *q,
                                       sc_tensor *k, sc_tensor *v, int heads, float scale) {
    (void)lse;
    int64_t ld = q->shape[2], d = ld / heads, nq = q->shape[1], n = k->shape[1];
    int64_t block = sc__attention_rows(n);
    float *scratch = sc__scratch(2 * sc__threads() * block * n);
    if (!scratch) return;
    float *dq = sc__sum(q), *dk = sc__sum(k), *dv = sc__sum(v);
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < q->shape[0] * heads; task++) { /* a head owns its dK and dV */
        int64_t b = task / heads, h = task % heads, key = b * n * ld + h * d;
        const float *pk = sc__f(k) + key, *pv = sc__f(v) + key;
        float *p = scratch + 2 * sc__thread() * block * n, *dp = p + block * n;
        for (int64_t first = 0; first < nq; first += block) {
            int64_t rows = sc__min(block, nq - first);
            int64_t query = (b * nq + first) * ld + h * d;
            const float *pq = sc__f(q) + query, *out = sc__f(o) + query, *dout = sc__g(o) + query;
            sc__softmax_scores(p, NULL, pq, pk, rows, n, d, ld, scale, NULL, false, first);
            sc__sgemm(true, false, n, d, rows, 1, p, n, dout, ld, 1, dv + key, ld);
            sc__sgemm(false, true, rows, n, d, 1, dout, ld, pv, ld, 0, dp, n);
            for (int64_t r = 0; r < rows; r++) {
                float dot = 0;
                SC_SIMD_SUM(dot)
                for (int64_t c = 0; c < d; c++) dot += out[r * ld + c] * dout[r * ld + c];
                SC_SIMD for (int64_t c = r * n; c < (r + 1) * n; c++) dp[c] = p[c] * (dp[c] - dot);
            }
            sc__sgemm(false, false, rows, d, n, scale, dp, n, pk, ld, 1, dq + query, ld);
            sc__sgemm(true, false, n, d, rows, scale, dp, n, pq, ld, 1, dk + key, ld);
        }
    }
}

/* ---- Norms and embeddings of the text encoders ---- */

static void sc__cpu_layer_norm(sc_tensor *y, const sc_tensor *x, const sc_tensor *w,
                               const sc_tensor *b, float eps) {
    int64_t n = sc__last(x), rows = sc__rows(x);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *px = sc__f(x) + r * n, *pw = sc__f(w), *pb = b ? sc__f(b) : NULL;
        float *py = sc__f(y) + r * n, mean = 0, inverse;
        if (b) sc__moments(px, n, eps, &mean, &inverse);
        else inverse = sc__inverse_rms(px, n, eps);
        SC_SIMD for (int64_t c = 0; c < n; c++) py[c] =
            (px[c] - mean) * inverse * pw[c] + (pb ? pb[c] : 0);
    }
}

static void sc__cpu_embed_tokens(sc_tensor *y, const sc_tensor *table, const int32_t *ids) {
    int64_t n = table->shape[1], size = sc_dtype_size(table->dtype);
    for (int64_t r = 0; r < sc__rows(y); r++)
        sc_to_f32(sc__f(y) + r * n, (const char *)table->data + ids[r] * n * size, table->dtype, n);
}

/* ---- Loss and optimiser ---- >>adamw */

/* Sums in slices, in double, added in order: the number of threads does not change the result. */
static double sc__sum_of_squares(const float *x, const float *minus, int64_t n) {
    double total = 0;
    for (int64_t start = 0; start < n; start += SC__SLICE) {
        int64_t end = sc__min(start + SC__SLICE, n);
        float sum = 0;
        SC_SIMD_SUM(sum) for (int64_t i = start; i < end; i++) {
            float difference = minus ? x[i] - minus[i] : x[i];
            sum += difference * difference;
        }
        total += sum;
    }
    return total;
}

/* loss = part * mean((x - target)^2);  dx += part * 2 (x - target) / n */
static void sc__cpu_mse(double *loss, const sc_tensor *x, const sc_tensor *target, double part) {
    int64_t n = sc_count(x);
    *loss = part * sc__sum_of_squares(sc__f(x), sc__f(target), n) / (double)n;
}

static void sc__cpu_mse_backward(sc_tensor *x, const sc_tensor *target, double part) {
    int64_t n = sc_count(x);
    const float *px = sc__f(x), *t = sc__f(target), s = (float)(2 * part / (double)n);
    float *dx = sc__g(x);
    SC_SIMD for (int64_t i = 0; i < n; i++) dx[i] += s * (px[i] - t[i]);
}

/* AdamW (Loshchilov & Hutter 2019; torch.optim.AdamW): decoupled weight decay, bias-corrected
 * moments. */
static void sc__cpu_update(const sc_params *x, const sc_adamw *o, const float decay[2],
                           double *result) {
    double norm = sqrt(sc__sum_of_squares(x->grad, NULL, x->count)), step = (double)(o->step + 1);
    double correction1 = 1 - pow(o->beta1, step), correction2 = 1 - pow(o->beta2, step);
    float b1 = o->beta1, b2 = o->beta2, keep = 1 - o->lr * o->weight_decay, eps = o->eps;
    float rate = (float)(o->lr / correction1), root = (float)(1 / sqrt(correction2));
    float clip = o->clip > 0 && norm > o->clip ? (float)(o->clip / norm) : 1.f;
    SC_PARALLEL_FOR
    for (int64_t start = 0; start < x->count; start += SC__SLICE) {
        int64_t end = sc__min(start + SC__SLICE, x->count);
        float *w = x->set[SC_STUDENT], *m = x->m, *v = x->v;
        if (isfinite(norm)) {
            SC_SIMD for (int64_t i = start; i < end; i++) {
                float g = x->grad[i] * clip;
                m[i] = b1 * m[i] + (1 - b1) * g;
                v[i] = b2 * v[i] + (1 - b2) * g * g;
                w[i] = w[i] * keep - rate * m[i] / (sqrtf(v[i]) * root + eps);
            }
            for (int k = 0; k < 2; k++) {
                float *average = x->set[SC_FAST + k], move = 1 - decay[k];
                if (average)
                    SC_SIMD for (int64_t i = start; i < end; i++) average[i] +=
                        move * (w[i] - average[i]);
            }
        }
        memset(x->grad + start, 0, (size_t)(end - start) * sizeof(float));
    }
    *result = norm;
}

/* ---- Pictures [B,C,H,W]: convolution ---- >>conv
 * y[o,i,j] = bias[o] + sum over c, u, v of w[o,c,u,v] x[c, s i + u - pad, s j + v - pad].
 * A strip of rows of all input channels is copied once, zero padded; a stride s splits it into
 * s * s planes, one for each phase (u mod s, v mod s). Then every tap (u, v) reads its plane at a
 * fixed distance from the output pixel, whatever row that pixel is in, and a tile of 4 or 8 output
 * channels by 3 vectors of pixels stays in registers while all channels and taps are added. Where
 * the strip is wider than the picture, the tile computes a few pixels that nobody reads. */

#if defined(__GNUC__)
#if defined(__AVX512F__)
#define SC__LANES 16
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
#define SC__TILE_O (SC__LANES < 16 ? 4 : 8) /* AVX-512 has 32 registers */
#define SC__TILE_V 3
#define SC__TILE (SC__TILE_V * SC__LANES) /* pixels */
#define SC__STRIP 98304                   /* floats of a strip, about: it stays in the L2 cache */

typedef struct sc__conv {
    int64_t in, out, kernel, stride, pad;
    int64_t in_height, in_width, height, width;
    int64_t pitch, plane;       /* floats of a row and of a plane of a strip */
    int64_t taps, offset[25];   /* of each tap (5 x 5 at most) from the output pixel */
} sc__conv;

/* Weights [out, in, taps] as [out / SC__TILE_O, in, taps, SC__TILE_O], f32; channels that are not
 * there are zeros. rows: room for SC__TILE_O of w's rows for each thread. */
static void sc__conv_pack(const sc__conv *g, float *packed, const sc_tensor *w, float *rows) {
    int64_t n = g->in * g->taps, size = n * sc_dtype_size(w->dtype);
    SC_PARALLEL_FOR
    for (int64_t o = 0; o < g->out; o += SC__TILE_O) {
        int64_t count = sc__min(SC__TILE_O, g->out - o);
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
        int64_t u = plane / s % s - g->pad, v = plane % s - g->pad; /* where this phase begins */
        int64_t begin = (s - 1 - v) / s, end = sc__min(g->pitch, (g->in_width + s - 1 - v) / s);
        for (int64_t r = 0; r < height; r++) {
            float *to = strip + plane * g->plane + r * g->pitch;
            int64_t row = (first + r) * s + u;
            const float *from = channel + row * g->in_width + v;
            memset(to, 0, (size_t)g->pitch * 4);
            if (row < 0 || row >= g->in_height) continue;
            if (s == 1) memcpy(to + begin, from + begin, (size_t)(end - begin) * 4);
            else for (int64_t j = begin; j < end; j++) to[j] = from[j * s];
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
    int64_t end = sc__min(p0 + SC__TILE, rows * g->pitch), r = p0 / g->pitch;
    int64_t outputs = sc__min(SC__TILE_O, g->out - o0);
    for (int64_t p = p0; p < end; p = ++r * g->pitch) { /* row by row */
        int64_t column = p - r * g->pitch, n = sc__min(end - p, g->width - column);
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
    int64_t some = 8 * SC__TILE / g.pitch + 1; /* so that unfinished tiles are rare */
    int64_t strip_rows = sc__max(some, SC__STRIP / (g.in * stride * stride * g.pitch) - reach);
    int64_t strips = sc__ceil_div(g.height, strip_rows); /* of a picture; as many for each thread */
    while (strips < g.height && batch * strips % threads) strips++;
    strip_rows = sc__ceil_div(g.height, strips);
    strips = sc__ceil_div(g.height, strip_rows);
    g.plane = (strip_rows + reach) * g.pitch;
    for (int64_t t = 0; t < g.taps; t++) {
        int64_t u = t / g.kernel, v = t % g.kernel;
        int64_t phase = u % stride * stride + v % stride;
        g.offset[t] = phase * g.plane + u / stride * g.pitch + v / stride;
    }
    int64_t channels = sc__ceil_div(g.out, SC__TILE_O) * SC__TILE_O, n = g.in * g.taps;
    int64_t strip_size = g.in * stride * stride * g.plane + 2 * SC__TILE;
    int64_t buffer = sc__max(SC__TILE_O * n, strip_size); /* a thread's */
    float *packed = sc__scratch(channels * n + threads * buffer);
    if (!packed) return;
    float *buffers = packed + channels * n;
    sc__conv_pack(&g, packed, w, buffers);
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < batch * strips; task++) {
        int64_t sample = task / strips, first = task % strips * strip_rows;
        int64_t rows = sc__min(strip_rows, g.height - first);
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
                int64_t n = sc__min(SC__SLICE, size - i);
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
        SC_SIMD for (int64_t i = 0; i < pixels; i++) {
            float n = (px[i] - m) * scale + shift;
            py[i] = silu ? n * sc__sigmoid(n) : n;
        }
    }
}

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
    int64_t m = x->shape[1], n = x->shape[2], strips = sc__ceil_div(m, 16);
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < x->shape[0] * strips; task++) {
        int64_t i0 = task % strips * 16, i1 = sc__min(i0 + 16, m);
        const float *from = sc__f(x) + task / strips * m * n;
        float *to = sc__f(y) + task / strips * m * n;
        for (int64_t j0 = 0; j0 < n; j0 += 16)
            for (int64_t j = j0; j < n && j < j0 + 16; j++)
                for (int64_t i = i0; i < i1; i++) to[j * m + i] = from[i * n + j];
    }
}

#define SC__CPU(operation) .operation = sc__cpu_##operation
static const sc_backend sc__cpu_backend = {
    .name = "cpu", .activation = SC_F32, .on_host = true,
    SC__CPU(alloc), SC__CPU(release), SC__CPU(memory_left), SC__CPU(upload), SC__CPU(download),
    SC__CPU(post), SC__CPU(collect), SC__CPU(zero), SC__CPU(gemm), SC__CPU(gemm_gelu),
    SC__CPU(quantize), SC__CPU(copy_block), SC__CPU(column_sum), SC__CPU(blend),
    SC__CPU(embed_timestep), SC__CPU(activate), SC__CPU(activate_backward), SC__CPU(multiply),
    SC__CPU(ln_modulate), SC__CPU(ln_modulate_backward), SC__CPU(gated_residual),
    SC__CPU(gated_residual_backward), SC__CPU(norm_rope), SC__CPU(norm_rope_backward),
    SC__CPU(attention), SC__CPU(attention_backward), SC__CPU(layer_norm), SC__CPU(embed_tokens),
    SC__CPU(group_sums), SC__CPU(group_norm), SC__CPU(conv2d), SC__CPU(upsample),
    SC__CPU(swap_axes), SC__CPU(mse), SC__CPU(mse_backward), SC__CPU(update),
};

const sc_backend *sc_cpu(void) {
#ifdef SHORTCUT_OPENBLAS
    openblas_set_num_threads(1); /* our own threads each call it */
#endif
    return &sc__cpu_backend;
}

/* ==== Tape ===================================================================== >>tape =======
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
    const sc_backend *backend;  /* whose memory it is */
    struct { char *base; size_t size; } chunks[64];
    int count;
    sc_place at;                /* where the next tensor goes */
    size_t held, peak;          /* of all chunks; by all tensors at most */
} sc__arena;

typedef struct sc__block_bytes { size_t own, shared; } sc__block_bytes;
typedef struct sc__op sc__op;
struct sc__op {
    void (*backward)(sc_tape *t, sc__op *op);
    void (*forward)(sc_tape *t, sc__op *op); /* NULL: never made again */
    sc_tensor *in[5], *out[2];  /* what each slot means is the operation's business */
    int64_t n[3];
    double scale;
    const void *extra;
    sc_block block;             /* of a block that was run: the context is `extra` */
    const uint8_t *sets;
};

struct sc_tape {
    const sc_backend *be;
    sc__arena host, device;     /* tensor structs; their data and gradients */
    sc__arena shared;           /* data of cheap operations, if `sharing`: of one block at a time */
    bool recording, failed, sharing, in_block;
    const uint8_t *sets;        /* LoRA set of each sample, or NULL */
    const sc_tensor *input;     /* of the last linear layer, until its memory is given back; */
    uint64_t content;           /* an id of its values */
    sc__block_bytes *sizes;     /* where each block that is run again notes its own, or NULL */
    sc__op *ops;
    int64_t count;
};

static bool sc__arena_add(sc__arena *a, size_t size) {
    if (a->count == (int)(sizeof a->chunks / sizeof *a->chunks))
        return sc_fail("out of memory: the arena has %d chunks", a->count);
    char *base = (char *)a->backend->alloc(size);
    if (!base) return false;
    a->chunks[a->count].base = base;
    a->chunks[a->count++].size = size;
    a->held += size;
    return true;
}

static void *sc__arena_take(sc__arena *a, size_t bytes) {
    if (bytes > SIZE_MAX / 8)
        return sc_fail("out of memory: %zu bytes for one tensor", bytes), NULL;
    bytes = (bytes + 255) & ~(size_t)255;
    while (a->at.chunk < a->count && a->at.used + bytes > a->chunks[a->at.chunk].size) {
        a->at.chunk++;
        a->at.used = 0;
    }
    if (a->at.chunk == a->count) { /* no chunk has room: add one */
        size_t size = (size_t)1 << 20;
        while (size < a->held / 8) size *= 2; /* few chunks, little waste */
        if (!sc__arena_add(a, size < bytes ? bytes : size)) return NULL;
    }
    void *p = a->chunks[a->at.chunk].base + a->at.used;
    a->at.used += bytes;
    a->at.taken += bytes;
    if (a->at.taken > a->peak) a->peak = a->at.taken;
    return p;
}

static void sc__arena_free(sc__arena *a) {
    for (int i = 0; i < a->count; i++) a->backend->release(a->chunks[i].base);
    *a = (sc__arena){.backend = a->backend, .peak = a->peak};
}

sc_tape *sc_tape_new(const sc_backend *backend) {
    sc_tape *t = (sc_tape *)sc__alloc(1, sizeof *t);
    if (!t) return NULL;
    t->be = t->device.backend = t->shared.backend = backend;
    t->host.backend = sc_cpu();
    return t;
}

void sc_tape_free(sc_tape *t) {
    sc__scratch_free(); /* other tapes of this thread make it anew */
    if (!t) return;
    sc__arena_free(&t->host);
    sc__arena_free(&t->device);
    sc__arena_free(&t->shared);
    SC_FREE(t->ops);
    SC_FREE(t);
}

void sc_tape_reset(sc_tape *t) {
    t->input = NULL;
    t->host.at = t->device.at = (sc_place){0};
    t->count = 0;
    t->failed = false;
}

bool sc_tape_record(sc_tape *t, bool recording) {
    bool before = t->recording;
    t->recording = recording;
    return before;
}
void sc_tape_use(sc_tape *t, const uint8_t *set_of_sample) { t->sets = set_of_sample; }

size_t sc_tape_bytes(const sc_tape *t) { return t->device.held + t->shared.held; }

bool sc_tape_reserve(sc_tape *t, size_t bytes) {
    size_t shared = t->sharing && t->shared.peak < bytes ? t->shared.peak : 0;
    sc_tape_reset(t);
    sc__arena_free(&t->device);
    sc__arena_free(&t->shared);
    return (bytes == 0 || sc__arena_add(&t->device, bytes - shared)) &&
           (shared == 0 || sc__arena_add(&t->shared, shared));
}

/* ---- Tensors of the tape ---- */

void *sc_tape_host(sc_tape *t, size_t bytes) { return sc__arena_take(&t->host, bytes); }

static sc_tensor *sc__struct(sc_tape *t, int ndim, const int64_t *shape, sc_dtype dtype) {
    sc_tensor *x = (sc_tensor *)sc__arena_take(&t->host, sizeof *x);
    if (!x) return NULL;
    *x = (sc_tensor){.dtype = dtype, .ndim = ndim};
    for (int i = 0; i < ndim; i++) x->shape[i] = shape[i];
    return x;
}

/* cheap: the result of an operation of one pass (see above), which sc__run_op must make. */
static sc_tensor *sc__new(sc_tape *t, bool cheap, int ndim, const int64_t *shape) {
    sc_tensor *x = sc__struct(t, ndim, shape, t->be->activation);
    if (!x) return NULL;
    x->shared = cheap && t->sharing && t->in_block && t->recording;
    x->data = sc__arena_take(x->shared ? &t->shared : &t->device, sc__size(x));
    return x->data ? x : NULL;
}

sc_tensor *sc_new(sc_tape *t, int ndim, const int64_t *shape) {
    return sc__new(t, false, ndim, shape);
}
static sc_tensor *sc__new_like(sc_tape *t, const sc_tensor *x) { /* NULL: of what failed */
    return x ? sc_new(t, x->ndim, x->shape) : NULL;
}

sc_tensor *sc_from(sc_tape *t, int ndim, const int64_t *shape, const float *values) {
    sc_tensor *x = sc_new(t, ndim, shape);
    if (!x || !values) return x ? (sc_fail("a tensor from nothing: no prompt?"), NULL) : NULL;
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

/* Its values without the scales of rows. */
static bool sc__download(const sc_backend *be, const sc_tensor *x, float *values) {
    if (x->dtype == SC_F32) return be->download(values, x->data, sc__size(x));
    void *raw = sc__alloc(sc__size(x), 1);
    bool ok = raw && be->download(raw, x->data, sc__size(x));
    if (ok) sc_to_f32(values, raw, x->dtype, sc_count(x));
    SC_FREE(raw);
    return ok;
}
bool sc_read(sc_tape *t, const sc_tensor *x, float *values) {
    return x && sc__download(t->be, x, values);
}

/* The gradient of x, made when first asked for; NULL when nothing below x wants one. All of a new
 * one is written next, or it is zeroed first. */
static void *sc__whole_grad(sc_tape *t, sc_tensor *x) {
    if (!x || !x->needs_grad || x->grad) return x ? x->grad : NULL;
    x->grad = sc__arena_take(&t->device, sc__size(x));
    if (x->grad) x->new_grad = true;
    else t->failed = true;
    return x->grad;
}
static void *sc__grad(sc_tape *t, sc_tensor *x) {
    if (!sc__whole_grad(t, x)) return NULL;
    if (x->new_grad) t->be->zero(x->grad, sc__size(x));
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

sc_tensor *sc_reshape(sc_tape *t, const sc_tensor *x, int ndim, const int64_t *shape) {
    if (!x) return NULL;
    sc_tensor *y = sc__struct(t, ndim, shape, x->dtype);
    if (!y) return NULL;
    y->data = x->data;
    y->needs_grad = t->recording && sc__grad(t, (sc_tensor *)x);
    if (y->needs_grad) y->grad = x->grad;
    return y;
}

/* Records an operation if any of its inputs needs a gradient, or its result may be wanted again. */
static sc__op *sc__record(sc_tape *t, sc__op op) {
    bool needed = false;
    for (int i = 0; i < 3; i++) needed = needed || (op.in[i] && op.in[i]->needs_grad);
    if (!t->recording || !(needed || op.out[0]->shared)) return NULL;
    t->failed = t->failed || !sc__grow(&t->ops, t->count, sizeof op);
    if (t->failed) return NULL;
    if (needed) op.out[0]->needs_grad = true;
    t->ops[t->count] = op;
    return &t->ops[t->count++];
}
/* Runs an operation, records it, returns its result. Those that make parts of one tensor follow
 * each other. */
static sc_tensor *sc__run_op(sc_tape *t, sc__op op) {
    if (!op.out[0]) return NULL;
    op.forward(t, &op);
    sc__record(t, op);
    return op.out[0];
}

sc_mark sc_tape_mark(const sc_tape *t) { return (sc_mark){t->host.at, t->device.at}; }
void sc_tape_rewind(sc_tape *t, sc_mark m) {
    t->input = NULL;
    t->host.at = m.host;
    t->device.at = m.device;
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
bool sc_backward(sc_tape *t) { return sc__backward_from(t, 0); }

/* ---- Linear layers, and LoRA: y = x W^T + bias + scale (x A^T) B^T ---- >>linear
 * The only place where LoRA exists. The thin products come first: samples next to each other with
 * the same set share one, and one product for all samples then adds x W^T + bias, and may apply a
 * GELU to the sum. For the backward pass these are three products y += s x W^T: x by W, x by A,
 * which gives u, and u by B. For each dx += s dy W;  dW += s dy^T x. */

static sc_matrix sc__matrix(const void *data, sc_dtype dtype, int64_t ld, bool transposed) {
    return (sc_matrix){data, dtype, ld, transposed, NULL, 0};
}
static sc_matrix sc__whole(const sc_tensor *x, bool transposed) {
    return (sc_matrix){x->data, x->dtype, sc__last(x), transposed, x->scale, 0};
}
/* The rows of x, or of its gradient, from `first` on, in its columns from `at` on. */
static sc_matrix sc__part(const sc_tensor *x, const void *values, int64_t first, int64_t at,
                          bool transposed) {
    int64_t ld = sc__last(x), skip = (first * ld + at) * sc_dtype_size(x->dtype);
    return sc__matrix((const char *)values + skip, x->dtype, ld, transposed);
}

static sc_set sc__set_of(const sc_tape *t, int64_t sample) {
    return t->sets ? (sc_set)t->sets[sample] : SC_TEACHER;
}

/* Of n[2] rows: those of x from n[0] on, those of y from n[1] on. LoRA's products may have
 * only some of x's: backward they come after W's, which has stored all of dx. */
static void sc__linear_backward(sc_tape *t, sc__op *op) {
    sc_tensor *x = op->in[0], *w = op->in[1], *bias = op->in[2], *y = op->out[0];
    int64_t rows = op->n[2], out = w->shape[0], in = w->shape[1];
    float s = (float)op->scale, beta;
    if (sc__grad_beta(t, x, &beta))
        t->be->gemm(rows, in, out, s, sc__part(y, y->grad, op->n[1], 0, false), sc__whole(w, false),
                    beta, sc__part(x, x->grad, op->n[0], 0, false), NULL);
    if (w->grad)
        t->be->gemm(out, in, rows, s, sc__part(y, y->grad, op->n[1], 0, true),
                    sc__part(x, x->data, op->n[0], 0, false), 1,
                    sc__part(w, w->grad, 0, 0, false), NULL);
    if (bias && bias->grad) t->be->column_sum((float *)bias->grad, y->grad, rows, out);
}

/* Writes LoRA's term, of a run of samples that share a set, into y's columns from `at` on, and
 * records it as a part of `sum`, whose gradient is that of the layer's output. */
static bool sc__linear_lora(sc_tape *t, sc_tensor *x, const sc_linear_layer *l, sc_tensor *y,
                            int64_t at, sc_tensor *sum, sc_set set, int64_t first, int64_t rows) {
    int64_t in = sc__last(x), out = l->weight->shape[0];
    float beta = 0;
    for (sc_adapter *lora = l->adapters; lora; lora = lora->next) {
        sc_tensor *a = &lora->a[set], *b = &lora->b[set];
        if (!a->data) continue;
        sc_tensor *u = sc_new(t, 2, (const int64_t[]){rows, lora->rank});
        if (!u) return false;
        t->be->gemm(rows, lora->rank, in, 1, sc__part(x, x->data, first, 0, false),
                    sc__whole(a, true), 0, sc__whole(u, false), NULL);
        t->be->gemm(rows, out, lora->rank, lora->scale, sc__whole(u, false), sc__whole(b, true),
                    beta, sc__part(y, y->data, first, at, false), NULL);
        beta = 1;
        sc__record(t, (sc__op){.backward = sc__linear_backward, .in = {x, a}, .out = {u},
                               .n = {first, 0, rows}, .scale = 1});
        sc__record(t, (sc__op){.backward = sc__linear_backward, .in = {u, b}, .out = {sum},
                               .n = {0, first, rows}, .scale = lora->scale});
    }
    if (beta == 0) { /* this set adds nothing; the other columns are not written yet */
        int64_t size = sc__last(y) * sc_dtype_size(y->dtype);
        t->be->zero((char *)y->data + first * size, (size_t)(rows * size));
    }
    return true;
}

static void sc__activate_forward(sc_tape *t, sc__op *op) {
    t->be->activate((sc_activation)op->n[0], op->out[0], op->n[1], op->in[0]);
}
static void sc__activate_backward(sc_tape *t, sc__op *op) {
    if (sc__whole_grad(t, op->in[0]))
        t->be->activate_backward((sc_activation)op->n[0], op->out[0], op->n[1], op->in[0]);
}
static sc__op sc__activation(sc_activation kind, sc_tensor *y, int64_t at, sc_tensor *x) {
    return (sc__op){.backward = sc__activate_backward, .forward = sc__activate_forward,
                    .in = {x}, .out = {y}, .n = {kind, at}};
}

/* A new y with y[:, at ...] = linear(x), or gelu(linear(x)); what goes into the GELU (sum) is kept
 * only while recording. */
static sc_tensor *sc__linear(sc_tape *t, const sc_tensor *input, const sc_linear_layer *l,
                             int64_t at, bool gelu) {
    if (!input) return NULL;
    sc_tensor *x = (sc_tensor *)input;
    int64_t in = sc__last(x), out = l->weight->shape[0], rows = sc__rows(x), batch = x->shape[0];
    if (in != l->weight->shape[1])
        return sc_fail("linear layer takes %lld channels, was given %lld",
                       (long long)l->weight->shape[1], (long long)in), NULL;
    int64_t shape[SC_MAX_DIMS];
    memcpy(shape, x->shape, sizeof shape);
    shape[x->ndim - 1] = out + at;
    sc_tensor *y = sc__new(t, gelu, x->ndim, shape), *sum = y;
    shape[x->ndim - 1] = out;
    if (y && gelu) sum = t->recording ? sc_new(t, x->ndim, shape) : NULL;
    if (!y || (t->recording && !sum)) return NULL;
    bool adapted = false;
    for (int64_t i = 0; i < batch; i++)
        for (const sc_adapter *a = l->adapters; a; a = a->next)
            adapted = adapted || a->a[sc__set_of(t, i)].data;
    for (int64_t i = 0, end; adapted && i < batch; i = end) {
        int64_t each = rows / batch;
        sc_set set = sc__set_of(t, i);
        for (end = i + 1; end < batch && sc__set_of(t, end) == set; end++) {}
        if (!sc__linear_lora(t, x, l, y, at, sum, set, i * each, (end - i) * each)) return NULL;
    }
    float beta = adapted ? 1.f : 0.f;
    sc_matrix left = sc__whole(x, false), right = sc__whole(l->weight, true);
    sc_matrix to = sc__part(y, y->data, 0, at, false);
    static SC_THREAD_LOCAL uint64_t contents;
    if (t->input != x) t->input = x, t->content = ++contents; /* none but sc_copy writes twice */
    left.content = t->content;
    if (gelu) t->be->gemm_gelu(rows, out, in, left, right, beta, to, l->bias, sum);
    else t->be->gemm(rows, out, in, 1, left, right, beta, to, l->bias);
    sc__record(t, (sc__op){.backward = sc__linear_backward, .in = {x, l->weight, l->bias},
                           .out = {sum}, .n = {0, 0, rows}, .scale = 1});
    if (gelu) sc__record(t, sc__activation(SC_GELU_TANH, y, at, sum));
    return y;
}

sc_tensor *sc_linear(sc_tape *t, const sc_tensor *x, const sc_linear_layer *l) {
    return sc__linear(t, x, l, 0, false);
}
sc_tensor *sc_linear_gelu(sc_tape *t, const sc_tensor *x, const sc_linear_layer *l) {
    return sc__linear(t, x, l, 0, true);
}

/* ---- The other operations: allocate, call the backend, record ---- */

sc_tensor *sc_activate(sc_tape *t, sc_activation kind, sc_tensor *x) {
    sc_tensor *y = x ? sc__new(t, true, x->ndim, x->shape) : NULL;
    return sc__run_op(t, sc__activation(kind, y, 0, x));
}

/* `rows` rows of x and of y, of which one may be wider: its part begins at column `at`. */
static void sc__copy_rows(sc_tape *t, const sc__op *op, bool back, bool add) {
    const sc_tensor *x = op->in[0], *y = op->out[0];
    int64_t rows = op->n[0], wx = sc_count(x) / rows, wy = sc_count(y) / rows;
    int64_t skip = op->n[1] * sc_dtype_size(x->dtype), width = sc__min(wx, wy);
    char *px = (char *)(back ? x->grad : x->data) + (wx > wy ? skip : 0);
    char *py = (char *)(back ? y->grad : y->data) + (wx > wy ? 0 : skip);
    if (back) t->be->copy_block(px, wx, py, wy, rows, width, x->dtype, add);
    else t->be->copy_block(py, wy, px, wx, rows, width, x->dtype, add);
}
static void sc__copy_forward(sc_tape *t, sc__op *op) { sc__copy_rows(t, op, false, op->n[2]); }
static void sc__copy_backward(sc_tape *t, sc__op *op) {
    sc_tensor *x = op->in[0];
    float beta;
    if (sc_count(x) > sc_count(op->out[0])) sc__grad(t, x); /* zeros around the part */
    if (sc__grad_beta(t, x, &beta)) sc__copy_rows(t, op, true, beta != 0);
}
static sc_tensor *sc__copy(sc_tape *t, sc_tensor *x, sc_tensor *y, int64_t rows, int64_t at,
                           bool add) {
    return sc__run_op(t, (sc__op){.backward = sc__copy_backward, .forward = sc__copy_forward,
                                  .in = {x}, .out = {y}, .n = {rows, at, add}});
}

sc_tensor *sc_add(sc_tape *t, sc_tensor *a, sc_tensor *b) { /* not made again: its order matters */
    sc_tensor *y = b ? sc__new_like(t, a) : NULL;
    return sc__copy(t, b, sc__copy(t, a, y, 1, 0, false), 1, 0, true);
}

sc_tensor *sc_multiply(sc_tape *t, sc_tensor *a, sc_tensor *b) {
    sc_tensor *y = b ? sc__new_like(t, a) : NULL;
    if (y) t->be->multiply(y, a, b);
    return y;
}

sc_tensor *sc_concat_tokens(sc_tape *t, sc_tensor *a, sc_tensor *b) {
    if (!a || !b) return NULL;
    const int64_t batch = a->shape[0], n = a->shape[1], c = a->shape[2];
    sc_tensor *y = sc__new(t, true, 3, (const int64_t[]){batch, n + b->shape[1], c});
    return sc__copy(t, b, sc__copy(t, a, y, batch, 0, false), batch, n * c, false);
}

sc_tensor *sc_concat_gelu(sc_tape *t, sc_tensor *a, const sc_tensor *x, const sc_linear_layer *l) {
    return a ? sc__copy(t, a, sc__linear(t, x, l, sc__last(a), true), sc__rows(a), 0, false) : NULL;
}

sc_tensor *sc_slice_tokens(sc_tape *t, sc_tensor *x, int64_t from, int64_t count) {
    if (!x) return NULL;
    const int64_t batch = x->shape[0], c = x->shape[2];
    sc_tensor *y = sc__new(t, true, 3, (const int64_t[]){batch, count, c});
    return sc__copy(t, x, y, batch, from * c, false);
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
    sc_tensor *y = x && mod ? sc__new(t, true, x->ndim, x->shape) : NULL;
    return sc__run_op(t, (sc__op){.backward = sc__ln_modulate_backward,
                                  .forward = sc__ln_modulate_forward, .in = {x, mod}, .out = {y},
                                  .n = {shift, scale}});
}

static void sc__gated_residual_backward(sc_tape *t, sc__op *op) {
    for (int i = 0; i < 2; i++) sc__whole_grad(t, op->in[i]);
    sc__grad(t, op->in[2]);
    if (!t->failed)
        t->be->gated_residual_backward(op->out[0], op->in[0], op->in[1], op->in[2], (int)op->n[0]);
}

sc_tensor *sc_gated_residual(sc_tape *t, sc_tensor *x, sc_tensor *h, sc_tensor *mod, int gate) {
    sc_tensor *y = h && mod ? sc__new_like(t, x) : NULL;
    if (!y) return NULL;
    t->be->gated_residual(y, x, h, mod, gate);
    sc__record(t, (sc__op){.backward = sc__gated_residual_backward, .in = {x, h, mod}, .out = {y},
                           .n = {gate}});
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

sc_tensor *sc_norm_rope(sc_tape *t, sc_tensor *text, sc_tensor *image, sc_tensor *text_weight,
                        sc_tensor *image_weight, const sc_tensor *rope) {
    if (!image || (!text && text_weight)) return NULL;
    if (image_weight->shape[0] > 256) return sc_fail("a head has more than 256 channels"), NULL;
    int64_t text_tokens = text ? text->shape[1] : 0, tokens = text_tokens + image->shape[1];
    sc_tensor *y =
        sc__new(t, true, 3, (const int64_t[]){image->shape[0], tokens, image->shape[2]});
    sc__op op = {.backward = sc__norm_rope_backward, .forward = sc__norm_rope_forward,
                 .in = {text, text_weight}, .out = {y}, .extra = rope};
    if (text) sc__run_op(t, op);
    op.in[0] = image, op.in[1] = image_weight, op.n[0] = text_tokens;
    return sc__run_op(t, op);
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
                                  op->in[2], (int)op->n[0], (float)op->scale);
    for (int i = 0; i < 3; i++)
        if (!wanted[i]) op->in[i]->needs_grad = false, op->in[i]->grad = NULL;
}

sc_tensor *sc_attention(sc_tape *t, sc_tensor *q, sc_tensor *k, sc_tensor *v, int heads,
                        float scale, const sc_tensor *bias, bool causal) {
    sc_tensor *o = k && v ? sc__new_like(t, q) : NULL;
    if (!o) return NULL;
    sc__op *op = NULL;
    if (!bias && !causal)
        op = sc__record(t, (sc__op){.backward = sc__attention_backward, .in = {q, k, v},
                                    .out = {o}, .n = {heads}, .scale = scale});
    size_t sums = (size_t)(q->shape[0] * heads * q->shape[1]) * sizeof(float);
    float *lse = op ? (float *)sc__arena_take(&t->device, sums) : NULL;
    if (op && !(op->extra = lse)) return NULL;
    t->be->attention(o, lse, q, k, v, heads, scale, bias, causal);
    return o;
}

sc_tensor *sc_timestep_embedding(sc_tape *t, const float *times, int64_t batch, int64_t channels) {
    sc_tensor *y = sc_new(t, 2, (const int64_t[]){batch, channels});
    if (y) t->be->embed_timestep(y, times);
    return y;
}

static void sc__blend_backward(sc_tape *t, sc__op *op) { /* of one of the two: dx += p dy */
    sc_tensor *x = op->in[0], dx = *x, dy = *op->out[0];
    const float *one = sc__floats(t, x->shape[0], 1);
    t->failed = t->failed || !one;
    dx.data = one ? sc__grad(t, x) : NULL, dy.data = dy.grad;
    if (dx.data) t->be->blend(&dx, one, &dx, (const float *)op->extra, &dy);
}

sc_tensor *sc_blend(sc_tape *t, const float *p, sc_tensor *u, const float *q, sc_tensor *v) {
    sc_tensor *y = v ? sc__new_like(t, u) : NULL;
    if (!y) return NULL;
    t->be->blend(y, p, u, q, v);
    sc__record(t, (sc__op){.backward = sc__blend_backward, .in = {u}, .out = {y}, .extra = p});
    sc__record(t, (sc__op){.backward = sc__blend_backward, .in = {v}, .out = {y}, .extra = q});
    return y;
}

static void sc__mse_backward(sc_tape *t, sc__op *op) {
    if (sc__grad(t, op->in[0])) t->be->mse_backward(op->in[0], op->in[1], op->scale);
}

bool sc_mse(sc_tape *t, sc_tensor *x, const sc_tensor *target, double part, double *loss) {
    if (!x || !target) return false;
    t->be->mse(loss, x, target, part);
    if (sc__record(t, (sc__op){.backward = sc__mse_backward, .out = {x}, .scale = part,
                               .in = {x, (sc_tensor *)target}}))
        sc__grad(t, x); /* it exists: the walk back starts here */
    return !t->failed;
}

sc_tensor *sc_layer_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                         float eps) {
    sc_tensor *y = sc__new_like(t, x);
    if (y) t->be->layer_norm(y, x, w, b, eps);
    return y;
}

sc_tensor *sc_embed_tokens(sc_tape *t, const sc_tensor *table, const int32_t *ids, int64_t batch,
                           int64_t tokens) {
    sc_tensor *y = sc_new(t, 3, (const int64_t[]){batch, tokens, table->shape[1]});
    for (int64_t i = 0; i < batch * tokens; i++)
        if (ids[i] < 0 || ids[i] >= table->shape[0])
            return sc_fail("token id %d is outside the table of %lld embeddings", (int)ids[i],
                           (long long)table->shape[0]), NULL;
    if (y) t->be->embed_tokens(y, table, ids);
    return y;
}

sc_tensor *sc_conv2d(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                     int stride, int pad_before) {
    if (!x) return NULL;
    const int64_t shape[] = {x->shape[0], w->shape[0], x->shape[2] / stride, x->shape[3] / stride};
    if (w->shape[1] != x->shape[1] || w->shape[2] > 5 || shape[2] < 1 || shape[3] < 1)
        return sc_fail("convolution: %lld channels of %lld x %lld pixels, a kernel of %lld "
                       "channels, %lld x %lld", (long long)x->shape[1], (long long)x->shape[2],
                       (long long)x->shape[3], (long long)w->shape[1], (long long)w->shape[2],
                       (long long)w->shape[3]), NULL;
    sc_tensor *y = sc_new(t, 4, shape);
    if (y) t->be->conv2d(y, x, w, b, stride, pad_before);
    return y;
}

sc_tensor *sc_group_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                         int groups, float eps, bool silu) {
    sc_tensor *y = sc__new_like(t, x);
    size_t bytes = y ? (size_t)(2 * x->shape[0] * groups) * sizeof(double) : 0;
    double *sums = y ? (double *)sc__arena_take(&t->device, bytes) : NULL;
    if (!sums) return NULL;
    t->be->zero(sums, bytes);
    t->be->group_sums(sums, x, 0, x->shape[2], groups);
    t->be->group_norm(y, x, sums, sc_count(x) / (x->shape[0] * groups), w, b, groups, eps, silu);
    return y;
}

sc_tensor *sc_upsample(sc_tape *t, const sc_tensor *x) {
    if (!x) return NULL;
    const int64_t *n = x->shape;
    sc_tensor *y = sc_new(t, 4, (const int64_t[]){n[0], n[1], 2 * n[2], 2 * n[3]});
    if (y) t->be->upsample(y, x);
    return y;
}

sc_tensor *sc_samples(sc_tape *t, const sc_tensor *x, int64_t first, int64_t count) {
    sc_tensor *y = x ? sc_reshape(t, x, x->ndim, x->shape) : NULL;
    if (!y) return NULL;
    int64_t skip = first * (sc_count(x) / x->shape[0]) * sc_dtype_size(x->dtype);
    y->data = (char *)y->data + skip;
    y->shape[0] = count;
    if (y->needs_grad) y->grad = (char *)y->grad + skip;
    return y;
}

bool sc_copy(sc_tape *t, sc_tensor *y, const sc_tensor *x) {
    int64_t n = x ? sc_count(x) : 0;
    t->input = NULL; /* it may be y */
    if (x && y) t->be->copy_block(y->data, n, x->data, n, 1, n, x->dtype, false);
    return x && y;
}

static void sc__swap_axes_backward(sc_tape *t, sc__op *op) {
    sc_tensor *x = op->in[0], *dx = sc__new_like(t, x), dy = *op->out[0];
    int64_t n = sc_count(x);
    dy.data = dy.grad;
    t->failed = t->failed || !dx;
    if (!sc__grad(t, x) || t->failed) return;
    t->be->swap_axes(dx, &dy);
    t->be->copy_block(x->grad, n, dx->data, n, 1, n, x->dtype, true);
}

sc_tensor *sc_swap_axes(sc_tape *t, sc_tensor *x) {
    if (!x) return NULL;
    sc_tensor *y = sc_new(t, 3, (const int64_t[]){x->shape[0], x->shape[2], x->shape[1]});
    if (!y) return NULL;
    t->be->swap_axes(y, x);
    sc__record(t, (sc__op){.backward = sc__swap_axes_backward, .in = {x}, .out = {y}});
    return y;
}

/* ---- Blocks ---- >>checkpoint */

/* Runs a block without recording and gives back all that it made but copies of its outputs. */
static bool sc__run_lean(sc_tape *t, sc_block block, const void *context, sc_tensor **in,
                         sc_tensor **out) {
    sc_tensor *kept[2] = {sc__new_like(t, in[0]), sc__new_like(t, in[1])};
    sc_mark mark = sc_tape_mark(t);
    bool recording = sc_tape_record(t, false), ok = kept[0] && block(t, in, out, context);
    for (int i = 0; ok && i < 2 && out[i]; i++) {
        ok = (kept[i] && sc_count(out[i]) <= sc_count(kept[i])) ||
             sc_fail("a block makes more than it reads");
        if (!ok) break;
        sc_tensor copy = *out[i];
        copy.data = kept[i]->data;
        sc_copy(t, &copy, out[i]);
        *(out[i] = kept[i]) = copy;
    }
    sc_tape_record(t, recording);
    sc_tape_rewind(t, mark);
    return ok;
}

/* Runs a block whose operations are recorded. What is cheap may lie where other blocks' is. */
static bool sc__run_recorded(sc_tape *t, sc_block block, const void *context, sc_tensor **in,
                             sc_tensor **out) {
    t->shared.at = (sc_place){0};
    t->in_block = true;
    bool ok = block(t, in, out, context);
    t->in_block = false;
    for (int i = 0; ok && i < 2 && out[i]; i++) /* what leaves the block needs its own */
        if (out[i]->shared) return sc_fail("a block must not end with an operation of one pass");
    return ok;
}

/* Runs the block's operations backwards, those on the tape from n[1] on or, where that is -1,
 * recorded again now; then gives their memory back. */
static void sc__block_backward(sc_tape *t, sc__op *op) {
    for (int i = 0; i < op->n[0]; i++) sc__grad(t, op->in[i]);
    sc_mark mark = sc_tape_mark(t);
    int64_t first = op->n[1];
    if (first < 0) {
        const uint8_t *sets = t->sets;
        bool recording = sc_tape_record(t, true);
        sc_tensor *out[2] = {NULL, NULL};
        first = t->count;
        sc_tape_use(t, op->sets);
        if (!sc__run_recorded(t, op->block, op->extra, op->in, out)) t->failed = true;
        sc_tape_use(t, sets);
        sc_tape_record(t, recording);
        if (t->sizes)
            *t->sizes++ = (sc__block_bytes){t->device.at.taken - mark.device.taken,
                                           t->shared.at.taken};
        for (int i = 0; i < 2 && out[i]; i++) out[i]->grad = op->out[i]->grad;
    }
    sc__backward_from(t, first);
    sc_tape_rewind(t, mark);
}

bool sc_run_block(sc_tape *t, sc_block block, const void *context, sc_tensor **in, int inputs,
                  sc_tensor **out, bool keep) {
    int64_t first = keep ? t->count : -1;
    if (!(t->recording && keep ? sc__run_recorded : sc__run_lean)(t, block, context, in, out))
        return false;
    if (!t->recording) return true;
    for (int64_t i = first; keep && i < t->count; i++)
        t->ops[i].out[0]->stale = t->ops[i].out[0]->shared;
    /* weights inside may need a gradient where no input does */
    sc_tensor yes = {.needs_grad = true};
    sc__op *op = sc__record(t, (sc__op){.backward = sc__block_backward, .in = {&yes},
                                        .out = {out[0], out[1]}, .n = {inputs, first},
                                        .extra = context, .block = block, .sets = t->sets});
    if (!op) return false;
    for (int i = 0; i < inputs; i++) op->in[i] = in[i];
    if (out[1]) out[1]->needs_grad = true;
    return true;
}

/* ==== Trained numbers ======================================================== >>params =======
 *
 * The arrays of sc_params. Of a LoRA they are the factors of all its layers (>>lora), or else they
 * are all weights of the model, which sc_params_use points into one of the arrays.
 */

/* All arrays, zero, one behind the other; with `teacher`, one for the frozen copy too. */
static sc_params *sc__params_new(sc_dit *dit, int64_t count, bool teacher) {
    const sc_backend *be = dit->net->backend;
    sc_params *p = (sc_params *)sc__alloc(1, sizeof *p);
    if (!p) return NULL;
    *p = (sc_params){.backend = be, .dit = dit, .count = count};
    float **arrays[] = {&p->grad, &p->m, &p->v, &p->set[SC_STUDENT], &p->set[SC_FAST],
                        &p->set[SC_SLOW], &p->set[SC_TEACHER]};
    int n = teacher ? 7 : 6;
    int64_t stride = (count + 63) & ~(int64_t)63; /* aligned as one by itself */
    size_t bytes = (size_t)n * (size_t)stride * sizeof(float);
    float *memory = (float *)be->alloc(bytes);
    for (int i = 0; memory && i < n; i++) *arrays[i] = memory + i * stride;
    p->results = (double *)be->alloc(2 * sizeof *p->results);
    if (memory && p->results) return be->zero(memory, bytes), p;
    return sc_params_free(p), NULL;
}

void sc_params_copy(sc_params *p, sc_set to, sc_set from) {
    p->backend->copy_block(p->set[to], p->count, p->set[from], p->count, 1, p->count, SC_F32,
                           false);
}

/* All sets become these host values, or, NULL, the student's. */
static void sc__params_start(sc_params *p, const float *values) {
    if (values) p->backend->upload(p->set[SC_STUDENT], values, (size_t)p->count * 4);
    for (int s = 0; s < SC_SETS; s++)
        if (p->set[s] && s != SC_STUDENT) sc_params_copy(p, (sc_set)s, SC_STUDENT);
}

sc_params *sc_params_full(sc_dit *dit, bool teacher) {
    if (!dit->net->widen)
        return sc_fail("to train all weights the model must be opened with `widen`"), NULL;
    int64_t count = 0, n;
    bool plain = true;
    for (int i = 0; i < dit->module_count; i++) plain = plain && !dit->modules[i].layer->adapters;
    for (int64_t i = 0; i < dit->net->count; i++) {
        const sc_weight *w = dit->net->weights[i];
        plain = plain && (w->fixed || (w->owned && !w->before));
        if (!w->fixed) count += sc_count(&w->tensor);
    }
    if (!plain) return sc_fail("all weights: a LoRA is on them, or they are trained already"), NULL;
    sc_params *p = sc__params_new(dit, count, teacher);
    float *to = p ? p->set[SC_STUDENT] : NULL;
    for (int64_t i = 0; p && i < dit->net->count; i++, to += n) {
        sc_weight *w = dit->net->weights[i];
        n = w->fixed ? 0 : sc_count(&w->tensor);
        if (!n) continue;
        p->backend->copy_block(to, n, w->tensor.data, n, 1, n, SC_F32, false);
        p->backend->release(w->tensor.data); /* sc_params_use points it into a set */
        w->owned = false;
    }
    if (p) sc__params_start(p, NULL), sc_params_use(p, SC_STUDENT);
    return p;
}

void sc_params_use(sc_params *p, sc_set set) {
    int64_t offset = 0;
    for (int64_t i = 0; i < p->dit->net->count; i++) {
        sc_tensor *w = &p->dit->net->weights[i]->tensor;
        if (p->dit->net->weights[i]->fixed) continue;
        w->data = p->set[set] + offset;
        w->grad = set == SC_STUDENT ? p->grad + offset : NULL;
        w->needs_grad = set == SC_STUDENT;
        offset += sc_count(w);
    }
}

void sc_params_free(sc_params *p) {
    if (!p) return;
    for (double unread[2]; p->waiting > 0; p->waiting--) p->backend->collect(unread, 2);
    for (int i = 0; p->adapters && i < p->dit->module_count; i++) {
        sc_adapter **link = &p->dit->modules[i].layer->adapters;
        while (*link && *link != &p->adapters[i]) link = &(*link)->next;
        if (*link) *link = p->adapters[i].next;
    }
    SC_FREE(p->adapters);
    if (p->grad) p->backend->release(p->grad); /* the first of all arrays */
    if (p->results) p->backend->release(p->results);
    SC_FREE(p);
}

void sc_params_step(sc_params *p, sc_adamw *o, float fast_decay, float slow_decay) {
    if (p->sum) p->sum(p->grad, p->count);
    p->backend->update(p, o, (const float[2]){fast_decay, slow_decay}, &p->results[1]);
    double oldest[2]; /* forgotten, where nobody asks */
    if (p->waiting == SC_POSTS) p->backend->collect(oldest, 2), p->waiting--;
    p->backend->post(p->results, 2);
    p->waiting++;
    o->step++;
}

bool sc_params_report(sc_params *p, double *loss, double *norm) {
    double results[2] = {NAN, NAN};
    bool ok = p->waiting > 0 || sc_fail("there is no step to report");
    if (ok) p->waiting--, ok = p->backend->collect(results, 2);
    *loss = results[0], *norm = results[1];
    return ok;
}

/* ==== Memory of a training step ================================================ >>plan =======
 *
 * A block of the transformer keeps its activations for the backward pass; or all but those that are
 * cheap to make again; or only its inputs, and runs again (Chen et al. 2016). How many can keep
 * theirs is measured: one step with all blocks run again says what it takes, and what each adds.
 */

bool sc_plan_memory(sc_dit *dit, sc_params *params, sc_tape *t, const sc_recipe *recipe,
                    const sc_batch *batch, sc_memory_plan *plan) {
    const size_t spare = (size_t)512 << 20; /* for the backend's own scratch memory to grow */
    sc_rng rng = {1};
    sc_recipe most = *recipe;
    if (most.cfg > 0) most.teacher_ratio = 1; /* chance may let all samples be asked twice */
    *plan = (sc_memory_plan){.blocks = dit->config.layers + dit->config.single_layers};
    sc__block_bytes *size = (sc__block_bytes *)sc__alloc((size_t)plan->blocks, sizeof *size);
    if (!size) return false;
    dit->checkpointed = plan->blocks;
    t->device.peak = t->shared.peak = 0;
    t->sharing = true;
    t->sizes = size; /* the last block's first */
    double loss; /* read so that the step is over, and to learn whether it failed */
    bool ok = sc_train_gradient(dit, params, t, &most, batch, &rng) &&
              t->be->download(&loss, params->results, sizeof loss);
    t->sizes = NULL;
    t->be->zero(params->grad, (size_t)params->count * 4);
    sc_tape_reset(t);
    size_t left = t->be->memory_left(), held = sc_tape_bytes(t), all = 0;
    plan->left = left > SIZE_MAX - held ? SIZE_MAX : left + held;
    plan->step = t->device.peak + t->shared.peak;
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
    dit->checkpointed = plan->blocks - plan->kept;
    return ok && sc_tape_reserve(t, plan->step + plan->kept_bytes);
}

/* ##############################################################################################
 * PART III: FILES AND FORMATS                                                            >>part3
 *
 * From bytes to names and numbers, and back: everybody's files of FLUX.1 and its LoRAs, the
 * networks around the transformer, texts, pictures, and whole models.
 */

/* ==== Files =================================================================== >>files =======
 *
 * Whole files in and out, JSON (RFC 8259) and safetensors. A safetensors file is an 8-byte
 * little-endian length, a JSON header of that length that gives each tensor's type, shape and
 * place, then the data without gaps. It is mapped, not read: opening 24 GB touches the header only.
 * Nothing that comes from a file is trusted: every length, offset and shape is checked first.
 */

enum { SC__PATH = PATH_MAX + 1 }; /* bytes: a path that was cut is too long for the system, too */

static char *sc__join(char path[SC__PATH], const char *folder, const char *name) {
    return snprintf(path, SC__PATH, "%s/%s", folder, name) < 0 ? NULL : path;
}

/* What is there, as stat says it; 0: nothing. */
static mode_t sc__mode(const char *path) {
    struct stat s;
    return stat(path, &s) ? 0 : s.st_mode;
}
static bool sc__exists(const char *path) { return sc__mode(path) != 0; }
static bool sc__is_file(const char *path) { return S_ISREG(sc__mode(path)); }
static bool sc__is_folder(const char *path) { return S_ISDIR(sc__mode(path)); }

static char *sc__model_folder(char folder[SC__PATH], const char *model) {
    snprintf(folder, SC__PATH, "%s", model);
    char *slash = strrchr(folder, '/');
    if (!sc__exists(model) || sc__is_folder(model)) return folder;
    if (slash) slash[slash == folder] = 0; /* "/" stays */
    return slash ? folder : strcpy(folder, ".");
}

/* The size of a regular file that can be read; -1 with the error set. Asking before opening keeps
 * a pipe from blocking. */
static int64_t sc__file_size(const char *path) {
    struct stat s;
    if (stat(path, &s)) sc_fail("%s: %s", path, strerror(errno));
    else if (S_ISDIR(s.st_mode)) sc_fail("%s: is a folder; a file was expected", path);
    else if (!S_ISREG(s.st_mode)) sc_fail("%s: not a regular file", path);
    else return (int64_t)s.st_size;
    return -1;
}

/* What people have where a file of another kind should be, told by its first bytes; NULL: none of
 * these. The first stands for any file, the others may be the beginning of one. */
static const char *sc__foreign(const char *bytes, size_t size) {
    static const struct { const char *start; size_t size; const char *what; } kinds[] = {
        {"version https://git-lfs", 23, "a Git LFS pointer, not the file: run git lfs pull there"},
        {"<", 1, "an HTML page, as of a download that failed: download the file again"},
        {"GGUF", 4, "a GGUF file: get the weights as safetensors"},
        {"PK\3\4", 4, "a zip archive, as PyTorch's .bin, .ckpt and .pt: convert it to safetensors"},
        {"\x80", 1, "a Python pickle (.bin, .ckpt, .pt): convert it to safetensors"},
        {"\x1f\x8b", 2, "a gzip archive: unpack it"},
        {"\x89HDF", 4, "an HDF5 file: get the weights as safetensors"},
        {"\0\0\0\0\0\0\0\0", 8, "a file of zeros: the download is not complete"}};
    if (!size) return "an empty file";
    while (size > 1 && isspace((unsigned char)*bytes)) bytes++, size--;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (size >= kinds[i].size && !memcmp(bytes, kinds[i].start, kinds[i].size))
            return kinds[i].what;
    return NULL;
}

char *sc_read_file(const char *path, size_t *length) {
    int64_t size = sc__file_size(path);
    if (size < 0) return NULL;
    if (size > (int64_t)1 << 30) return sc_fail("%s: larger than 1 GiB", path), NULL;
    char *data = (char *)sc__alloc((size_t)size + 1, 1);
    FILE *f = data ? fopen(path, "rb") : NULL;
    if (f) *length = fread(data, 1, (size_t)size, f);
    bool ok = f && !ferror(f);
    if (data && !ok) sc_fail("%s: %s", path, strerror(errno));
    if (ok && !strncmp(data, "version https://git-lfs", 23))
        ok = sc_fail("%s: %s", path, sc__foreign(data, *length));
    if (f) fclose(f);
    if (ok) return data;
    return SC_FREE(data), NULL;
}

/* Writing: beside `path`, or beside what that links to, into a file that takes its place and its
 * mode when all of it is on disk, and is locked until then: one that is not locked was left by a
 * process that was killed. A device or a pipe is written as it is. */
typedef struct sc__writer { FILE *file; const char *path; char target[2 * PATH_MAX],
                            temporary[2 * PATH_MAX + 16]; } sc__writer; /* "": none */

static bool sc__write_fail(const char *path) {
    return sc_fail("%s: cannot write: %s", path, strerror(errno));
}

static bool sc__write_begin(sc__writer *w, const char *path) {
    struct stat there, mine;
    char link[PATH_MAX];
    bool old = !stat(path, &there), direct = old && !S_ISREG(there.st_mode);
    *w = (sc__writer){.path = path};
    if (old && !(there.st_mode & 0222)) return sc_fail("%s: cannot write: read-only", path);
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
    return fclose(w->file), sc_fail("%s: cannot write: another process is writing it", path);
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

bool sc_write_file(const char *path, const void *data, size_t n) {
    sc__writer w;
    return sc__write_begin(&w, path) && sc__write_end(&w, sc__write_bytes(&w, data, n));
}

bool sc_can_write(const char *path) {
    sc__writer w;
    if (!*path) return sc_fail("cannot write to a file without a name");
    if (sc__is_folder(path)) return sc_fail("%s: cannot write: this is a folder", path);
    if (sc__exists(path) && !sc__is_file(path)) return true; /* a pipe: its reader would notice */
    return sc__write_begin(&w, path) && (sc__write_end(&w, false), true);
}

/* ---- UTF-8 ---- */

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

/* Bytes of the character at s, 1 to 4; 0: not UTF-8 (cut off, overlong, a surrogate, too large).
 * The text ends in NUL, which is no continuation byte, so this never looks behind it. */
static int sc__utf8_size(const char *s) {
    const char *end = s;
    bool lost = sc__utf8_decode(&end) == 0xfffd && strncmp(s, "\xef\xbf\xbd", 3);
    return lost ? 0 : (int)(end - s);
}

static int sc__utf8_encode(uint32_t c, char *out) {
    int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 63));
    out[0] = (char)((n > 1 ? 0xf00 >> n & 0xff : 0) | c);
    return n;
}

/* ---- JSON ----
 * A parse works on its own copy of the text, which lies behind the root: strings are unescaped in
 * place (they never grow). Items of a container are one array of values. */

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
    return sc_fail("%s:%lld: %s", p->name, (long long)p->line, what);
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
    char text[5] = "";
    for (int i = 0; i < 4 && isxdigit((unsigned char)digits[i]); i++) text[i] = digits[i];
    *value = (uint32_t)strtoul(text, NULL, 16);
    return text[3];
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

static bool sc__json_number(sc__json_parser *p, double *value) {
    char text[512], *end;
    size_t n = strspn(p->at, "+-.0123456789eE");
    const char *first = p->at + (*p->at == '-'), *dot = (const char *)memchr(p->at, '.', n);
    if (n >= sizeof text) return sc__json_fail(p, "number with too many digits");
    snprintf(text, sizeof text, "%.*s", (int)n, p->at);
    if (dot) text[dot - p->at] = *localeconv()->decimal_point; /* what strtod reads */
    *value = strtod(text, &end);
    if (*end || !isdigit((unsigned char)*first) || (dot && !isdigit((unsigned char)dot[1])) ||
        (*first == '0' && isdigit((unsigned char)first[1])))
        return sc__json_fail(p, "malformed number");
    p->at += n;
    return isfinite(*value) || sc__json_fail(p, "number out of range");
}

static bool sc__json_read(sc__json_parser *p, sc_json *v);

/* Keys and values of an object, or the values of an array. */
static bool sc__json_items(sc__json_parser *p, sc_json *v) {
    bool object = *p->at++ == '{';
    char close = object ? '}' : ']';
    v->type = object ? SC__OBJECT : SC__ARRAY;
    if (++p->depth > 64) return sc__json_fail(p, "nested deeper than 64");
    while (!sc__json_take(p, close)) {
        if (v->count && !sc__json_take(p, ','))
            return sc__json_fail(p, object ? "expected ',' or '}'" : "expected ',' or ']'");
        if (!sc__grow(&v->u.items, v->count, sizeof *v)) return false;
        sc_json *item = &v->u.items[v->count++];
        *item = (sc_json){0};
        if (object && sc__json_peek(p) != '"') return sc__json_fail(p, "expected a key in quotes");
        if (object && !sc__json_string(p, &item->key)) return false;
        if (object && !sc__json_take(p, ':')) return sc__json_fail(p, "expected ':' behind a key");
        if (!sc__json_read(p, item)) return false;
    }
    p->depth--;
    return true;
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
    if (length > (size_t)1 << 30) return sc_fail("%s: more than 1 GiB of JSON", name), NULL;
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
    return sc_json_free(root), NULL;
}

/* A server's answer may have been saved in the file's place. */
sc_json *sc_json_load(const char *path) {
    size_t length = 0;
    char *text = sc_read_file(path, &length);
    sc_json *root = text ? sc_json_parse(text, length, path) : NULL;
    const char *what = text && !root ? sc__foreign(text, length) : NULL;
    const char *answer = sc_json_string(sc_json_get(root, "error"), NULL);
    SC_FREE(text);
    if (what) sc_fail("%s: %s", path, what);
    if (!answer) return root;
    sc_fail("%s: a server's answer, '%s': download the file again", path, answer);
    return sc_json_free(root), NULL;
}

static bool sc__json_is(const sc_json *v, sc__json_type type) { return v && v->type == type; }

/* The last of equal keys counts. */
const sc_json *sc_json_get(const sc_json *object, const char *key) {
    int32_t i = sc__json_is(object, SC__OBJECT) ? object->count : 0;
    while (i > 0 && strcmp(object->u.items[i - 1].key, key)) i--;
    return i > 0 ? &object->u.items[i - 1] : NULL;
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
    char *path;
    const char *shard;          /* its name in the index */
    void *data;
    size_t size;
    sc_json *header;
} sc__mapping;
typedef struct sc__entry {
    const char *name;
    sc_tensor tensor;
    int64_t begin, end;
    bool used;                  /* something asked for it */
} sc__entry;

struct sc_file {
    char path[SC__PATH];
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
        SC_FREE(f->parts[i].path);
    }
    sc_json_free(f->index);
    SC_FREE(f->parts);
    SC_FREE(f->entries);
    SC_FREE(f);
}

/* A whole number from 0 up to `most`, or -1. */
static int64_t sc__json_whole(const sc_json *v, double most) {
    double x = sc_json_number(v, -1);
    return x >= 0 && x <= most && x == floor(x) ? (int64_t)x : -1;
}

/* "[3,64,64]", for messages and headers. */
static const char *sc__shape_text(const sc_tensor *x, char text[96]) {
    int n = snprintf(text, 96, "[");
    for (int i = 0; i < x->ndim; i++)
        n += snprintf(text + n, (size_t)(96 - n), "%s%lld", i ? "," : "", (long long)x->shape[i]);
    snprintf(text + n, (size_t)(96 - n), "]");
    return text;
}

/* shape -> tensor, and the bytes it takes; -1: impossible, as a side of 0 beside absurd ones. */
static int64_t sc__read_shape(sc_tensor *x, const sc_json *shape) {
    int64_t product = sc_dtype_size(x->dtype); /* of the sides that are not 0 */
    if (!sc__json_is(shape, SC__ARRAY) || shape->count > SC_MAX_DIMS) return -1;
    for (x->ndim = 0; x->ndim < shape->count; x->ndim++) {
        int64_t side = sc__json_whole(&shape->u.items[x->ndim], 0x1p53);
        if (side < 0 || (side && product > ((int64_t)1 << 62) / side)) return -1;
        x->shape[x->ndim] = side;
        product *= side ? side : 1;
    }
    return sc_count(x) * sc_dtype_size(x->dtype);
}

/* One tensor of a header: type, shape and place in the `size` bytes of data. */
static bool sc__read_entry(sc__entry *e, const char *path, const sc_json *v, char *data,
                           int64_t size) {
    const char *dtype = sc_json_string(sc_json_get(v, "dtype"), "?");
    const sc_json *offsets = sc_json_get(v, "data_offsets");
    int type = SC_U8;
    while (type >= 0 && strcmp(dtype, sc__dtypes[type].name)) type--;
    if (type < 0)
        return sc_fail("%s: tensor '%s' has type '%s'; only F32, BF16, F16, F8_E4M3, F64, "
                       "I64, I32 and U8 can be read", path, v->key, dtype);
    *e = (sc__entry){.name = v->key, .tensor = {.dtype = (sc_dtype)type}};
    int64_t bytes = sc__read_shape(&e->tensor, sc_json_get(v, "shape"));
    e->begin = sc__json_whole(sc_json_at(offsets, 0), 0x1p53);
    e->end = sc__json_whole(sc_json_at(offsets, 1), 0x1p53);
    if (bytes < 0)
        return sc_fail("%s: the shape of tensor '%s' must be at most %d whole numbers of a "
                       "possible size", path, v->key, SC_MAX_DIMS);
    if (sc_json_length(offsets) != 2 || e->begin < 0 || e->begin > e->end)
        return sc_fail("%s: data_offsets of tensor '%s' must be [begin, end]", path, v->key);
    if (e->end > size)
        return sc_fail("%s: tensor '%s' ends at byte %lld of the data, the file at %lld: is it "
                       "truncated?", path, v->key, (long long)e->end, (long long)size);
    if (e->end - e->begin != bytes)
        return sc_fail("%s: tensor '%s' has %lld bytes; its type and shape need %lld", path, v->key,
                       (long long)(e->end - e->begin), (long long)bytes);
    e->tensor.data = data + e->begin;
    return true;
}

/* The format has each byte of the data belong to exactly one tensor. */
static bool sc__check_places(const char *path, sc__entry *e, int64_t count, int64_t size) {
    int64_t at = 0;
    if (count) qsort(e, (size_t)count, sizeof *e, sc__by_place);
    for (int64_t i = 0; i < count; at = e[i++].end)
        if (e[i].begin != at)
            return sc_fail("%s: tensor '%s' %s", path, e[i].name,
                           e[i].begin < at ? "overlaps another" : "leaves a hole before it");
    return at == size || sc_fail("%s: %lld bytes behind the last tensor belong to none", path,
                                 (long long)(size - at));
}

/* No safetensors: says what it is, of text how it begins. No number in it means anything. */
static bool sc__no_safetensors(const char *path, const char *bytes, size_t size) {
    const char *what = sc__foreign(bytes, size);
    int n = 0;
    while (!what && n < 60 && (size_t)n < size && (isprint((unsigned char)bytes[n]) ||
                                                   isspace((unsigned char)bytes[n]))) n++;
    if (!what && n > 7 && (n == 60 || (size_t)n == size))
        return sc_fail("%s: not a safetensors file but text, '%.*s'", path, n, bytes);
    return sc_fail("%s: not a safetensors file%s%s", path, what ? " but " : "", what ? what : "");
}

/* Parses the header of a part, a JSON object, and appends its tensors: all, or those that the index
 * (its weight_map) places there. */
static bool sc__read_part(sc_file *f, sc__mapping *part, const sc_json *map) {
    char *bytes = (char *)part->data, *path = part->path;
    uint64_t length = 0;
    size_t at = 8;
    for (int i = 7; part->size > 8 && i >= 0; i--) length = length << 8 | (unsigned char)bytes[i];
    while (at < part->size && isspace((unsigned char)bytes[at])) at++;
    if (at >= part->size || bytes[at] != '{' || length > 100000000)
        return sc__no_safetensors(path, bytes, part->size);
    int64_t size = (int64_t)(part->size - 8 - length);
    if (size < 0) return sc_fail("%s: ends within its header: is it truncated?", path);
    if (!(part->header = sc_json_parse(bytes + 8, (size_t)length, path))) return false;
    size_t room = (size_t)f->count + (size_t)part->header->count + 1;
    sc__entry *e = (sc__entry *)SC_REALLOC(f->entries, room * sizeof *e);
    if (!e) return sc_fail("%s: out of memory for %zu tensors", path, room);
    f->entries = e;
    int64_t first = f->count, end = first;
    for (int32_t i = 0; i < part->header->count; i++) {
        const sc_json *item = &part->header->u.items[i];
        if (!strcmp(item->key, "__metadata__")) continue;
        if (!sc__read_entry(&e[end++], path, item, bytes + 8 + length, size)) return false;
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
    if (size == 0) return sc__no_safetensors(path, "", 0); /* and could not be mapped */
    if (!sc__grow(&f->parts, f->part_count, sizeof *f->parts)) return false;
    int descriptor = open(path, O_RDONLY);
    if (descriptor < 0) return sc_fail("%s: %s", path, strerror(errno));
    void *data = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, descriptor, 0);
    close(descriptor);
    if (data == MAP_FAILED) return sc_fail("%s: cannot map: %s", path, strerror(errno));
    sc__mapping *part = &f->parts[f->part_count++];
    *part = (sc__mapping){sc__strdup(path), shard, data, (size_t)size, NULL};
    return part->path && sc__read_part(f, part, map);
}

/* NAME.safetensors.index.json, or of a variant .index.fp16.json: {"weight_map": {tensor: shard}};
 * the shards lie beside it. */
static bool sc__map_shards(sc_file *f, const char *path) {
    f->index = sc_json_load(path);
    const sc_json *map = sc_json_get(f->index, "weight_map");
    if (!f->index) return false;
    if (!sc__json_is(map, SC__OBJECT)) return sc_fail("%s: no weight_map", path);
    char folder[SC__PATH], full[SC__PATH];
    sc__model_folder(folder, path);
    for (int32_t i = 0; i < map->count; i++) {
        const char *shard = sc_json_string(&map->u.items[i], "");
        int64_t known = 0;
        while (known < f->part_count && strcmp(f->parts[known].shard, shard)) known++;
        if (known < f->part_count) continue;
        if (!*shard || strchr(shard, '/')) /* never a file outside the folder */
            return sc_fail("%s: shard '%s' is not a plain file name", path, shard);
        if (!sc__map_part(f, sc__join(full, folder, shard), map, shard)) return false;
    }
    return true;
}

/* Sorts by name; no name may stand twice, and none of the index be missing. */
static bool sc__sort_entries(sc_file *f) {
    const sc_json *map = sc_json_get(f->index, "weight_map");
    if (f->count) qsort(f->entries, (size_t)f->count, sizeof *f->entries, sc__by_name);
    for (int64_t i = 1; i < f->count; i++)
        if (!sc__by_name(&f->entries[i - 1], &f->entries[i]))
            return sc_fail("%s: tensor '%s' stands there twice", f->path, f->entries[i].name);
    for (int64_t i = 0; i < sc_json_length(map); i++)
        if (!sc_file_find(f, sc_json_key(map, i)))
            return sc_fail("%s: tensor '%s' is not in its shard '%s'", f->path,
                            sc_json_key(map, i), sc_json_string(sc_json_value(map, i), "?"));
    return true;
}

/* The path of a folder's weights: what diffusers or transformers take, a variant's (fp16), else the
 * only file; where there is only one of another kind, that, so that opening it says so. */
static bool sc__weights_in(char found[SC__PATH], const char *folder) {
    enum { READ = 8, PATTERNS = READ + 4 };
    static const char *const patterns[PATTERNS] = {
        "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
        "model.safetensors", "model.safetensors.index.json", "*.safetensors.index.json",
        "*.safetensors.index.*.json", "*.safetensors", "*.sft", "*.gguf", "*.bin", "*.ckpt",
        "*.pt*"};
    DIR *list = opendir(folder);
    int best = PATTERNS;
    bool several = false;
    if (!list) return sc_fail("%s: %s", folder, strerror(errno));
    for (struct dirent *entry; (entry = readdir(list));) {
        const char *name = entry->d_name;
        int rank = 0;
        while (rank < PATTERNS && fnmatch(patterns[rank], name, 0)) rank++;
        if (rank == PATTERNS || rank > best || *name == '.') continue;
        several = rank == best && rank < READ;
        best = rank;
        sc__join(found, folder, name);
    }
    closedir(list);
    if (best == PATTERNS)
        return sc_fail("%s: no weights here; expected diffusion_pytorch_model.safetensors, "
                       "model.safetensors, or an .index.json of shards", folder);
    return !several || sc_fail("%s: several %s here and no .index.json of shards: give the path "
                               "of one", folder, patterns[best]);
}

sc_file *sc_file_open(const char *path) {
    sc_file *f = (sc_file *)sc__alloc(1, sizeof *f);
    if (!f) return NULL;
    snprintf(f->path, sizeof f->path, "%s", path);
    bool ok = (!sc__is_folder(path) || sc__weights_in(f->path, path)) &&
              (!fnmatch("*.json", f->path, 0) ? sc__map_shards(f, f->path)
                                              : sc__map_part(f, f->path, NULL, NULL));
    if (ok && sc__sort_entries(f)) return f;
    return sc_file_close(f), NULL;
}

const char *sc_file_path(const sc_file *f) { return f->path; }
const char *sc_file_part(const sc_file *f, int64_t i) {
    return i < f->part_count ? f->parts[i].path : NULL;
}
int64_t sc_file_count(const sc_file *f) { return f->count; }
const char *sc_file_name(const sc_file *f, int64_t i) { return f->entries[i].name; }
const sc_tensor *sc_file_tensor(const sc_file *f, int64_t i) { return &f->entries[i].tensor; }

static sc__entry *sc__find_entry(const sc_file *f, const char *name) {
    sc__entry key = {.name = name};
    if (!f->count) return NULL;
    return (sc__entry *)bsearch(&key, f->entries, (size_t)f->count, sizeof key, sc__by_name);
}

/* The tensor whose name is the first n characters of this one, and `end`. */
static sc__entry *sc__find_beside(const sc_file *f, const char *name, size_t n, const char *end) {
    char full[512];
    snprintf(full, sizeof full, "%.*s%s", (int)n, name, end);
    return sc__find_entry(f, full);
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

/* `s` as a JSON string; bytes that are not UTF-8 become U+FFFD. */
static void sc__write_quoted(FILE *f, const char *s) {
    fputc('"', f);
    for (int size; *s; s += size ? size : 1) {
        size = sc__utf8_size(s);
        if (*s == '"' || *s == '\\') fputc('\\', f);
        if (size && (unsigned char)*s >= 0x20) fwrite(s, 1, (size_t)size, f);
        else fprintf(f, "\\u%04x", size ? (unsigned)*s : 0xfffdu);
    }
    fputc('"', f);
}

static void sc__write_header(FILE *f, const sc_named *x, int64_t count,
                             const char *const *metadata) {
    char shape[96];
    uint64_t at = 0, end;
    fputs("{\"__metadata__\":{", f);
    for (int i = 0; metadata && metadata[i]; i += 2) {
        if (i) fputc(',', f);
        sc__write_quoted(f, metadata[i]);
        fputc(':', f);
        sc__write_quoted(f, metadata[i + 1]);
    }
    fputc('}', f);
    for (int64_t i = 0; i < count; i++, at = end) {
        end = at + (uint64_t)sc_count(&x[i].tensor) * (uint64_t)sc_dtype_size(x[i].dtype);
        fputc(',', f);
        sc__write_quoted(f, x[i].name);
        fprintf(f, ":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%llu,%llu]}",
                sc_dtype_name(x[i].dtype), sc__shape_text(&x[i].tensor, shape),
                (unsigned long long)at, (unsigned long long)end);
    }
    fputc('}', f);
    fprintf(f, "%*s", (int)(56 - ftell(f)) & 63, ""); /* data at n * 64, behind 8 of length */
}

/* The data of one tensor as its `dtype`; f32 is rounded to bf16 or f16 in slices. What would become
 * NaN or infinity is refused and, of f32 that is `checked`, what is. */
static bool sc__write_tensor(sc__writer *w, const sc_named *x, bool checked) {
    uint16_t half[SC__SLICE];
    const float *values = (const float *)x->tensor.data;
    int64_t n = sc_count(&x->tensor);
    bool finite = true, same = x->dtype == x->tensor.dtype;
    if (!same && (x->tensor.dtype != SC_F32 || (x->dtype != SC_BF16 && x->dtype != SC_F16)))
        return sc_fail("%s: cannot write '%s' of type %s as %s", w->path, x->name,
                        sc_dtype_name(x->tensor.dtype), sc_dtype_name(x->dtype));
    for (int64_t i = 0; checked && i < n; i++) finite = finite && isfinite(values[i]);
    if (finite && same)
        return sc__write_bytes(w, values, (size_t)n * (size_t)sc_dtype_size(x->dtype));
    const int exponent = x->dtype == SC_BF16 ? 0x7f80 : 0x7c00; /* all set: NaN or infinity */
    for (int64_t i = 0, size; finite && i < n; i += size) {
        size = sc__min(SC__SLICE, n - i);
        for (int64_t j = 0; j < size; j++) {
            half[j] = (x->dtype == SC_BF16 ? sc__f32_to_bf16 : sc__f32_to_f16)(values[i + j]);
            finite = finite && (half[j] & exponent) != exponent;
        }
        if (!sc__write_bytes(w, half, (size_t)size * 2)) return false;
    }
    return finite || sc_fail("%s: not written: '%s' would hold NaN or infinity", w->path, x->name);
}

static float *sc__merged_values(const sc_dit *f, const sc_tensor *w); /* >>open */

/* Wider types go first, so that each tensor is aligned to its type; else the given order stays. dit
 * NULL: the values are on the host, else where it computes, from where they come one tensor at a
 * time: the host never holds more. */
static bool sc__save(const char *path, const sc_named *tensors, int64_t count,
                     const char *const *metadata, const sc_dit *dit) {
    sc_named *sorted = (sc_named *)sc__alloc((size_t)count, sizeof *sorted);
    char *header = NULL, length[8];
    size_t size;
    FILE *text = sorted ? open_memstream(&header, &size) : NULL;
    sc__writer w;
    int64_t n = 0;
    for (int bytes = 8; sorted && bytes > 0; bytes /= 2)
        for (int64_t i = 0; i < count; i++)
            if (sc_dtype_size(tensors[i].dtype) == bytes) sorted[n++] = tensors[i];
    if (text) sc__write_header(text, sorted, count, metadata);
    bool ok = (text && !fclose(text)) || sc_fail("%s: out of memory", path);
    ok = ok && sc__write_begin(&w, path);
    if (ok) {
        for (int i = 0; i < 8; i++) length[i] = (char)(size >> (8 * i));
        ok = sc__write_bytes(&w, length, 8) && sc__write_bytes(&w, header, size);
        for (int64_t i = 0; ok && i < count; i++) {
            sc_tensor *x = &sorted[i].tensor;
            if (dit) x->data = sc__merged_values(dit, x), x->dtype = SC_F32;
            ok = (!dit || x->data) && sc__write_tensor(&w, &sorted[i], dit != NULL);
            if (dit) SC_FREE(x->data);
        }
        ok = sc__write_end(&w, ok);
    }
    free(header); /* the C library's */
    SC_FREE(sorted);
    return ok;
}

bool sc_file_save(const char *path, const sc_named *tensors, int64_t count,
                  const char *const *metadata) {
    return sc__save(path, tensors, count, metadata, NULL);
}

/* ==== Names =================================================================== >>names =======
 *
 * In this header a weight has the name that diffusers (transformer, VAE) or transformers (text
 * encoders) gives it. Black Forest Labs' own files, ComfyUI's and the LoRA trainers' hold the same
 * numbers under other names, some of them as rows of a larger matrix. This table says which and
 * where; weights and LoRA factors alike are found through it, so a layout is data here, not code.
 *
 * Easy to get wrong: BFL's last modulation has (shift, scale), norm_out (scale, shift): its rows
 * swap halves; of a LoRA these are B's rows, never A's. The VAE's decoder counts levels backwards.
 */

/* A weight is `parts` of the `whole` equal parts that the rows of another fall into, from part
 * `first` on; whole 0: it is the other. */
typedef struct sc__slice {
    int first, parts, whole;
    bool swapped;               /* the two halves of the rows are exchanged */
} sc__slice;

/* `name` is in `other`. In both, * stands for one word between dots, or the rest of it; ? for q, k
 * or v, which in `other` is 0, 1 or 2, or as $ query or key, or the part of the rows; ~ for a level
 * of the VAE, counted from the other end in `other`; ! for the last block. What follows is kept. */
typedef struct sc__alias {
    const char *name, *other;
    sc__slice rows;
    sc_architecture kind;
} sc__alias;

#define SC__SAME(name, other) {name, other, {0, 0, 0, false}, SC_FLUX}
#define SC__THIRD(name, other) {name, other, {0, 1, 3, false}, SC_FLUX}
#define SC__DOUBLE(name, other) SC__SAME("transformer_blocks.*." name, "double_blocks.*." other)
#define SC__SINGLE(name, other) \
    SC__SAME("single_transformer_blocks.*." name, "single_blocks.*." other)
#define SC__SD3(name, other) {name, other, {0, 0, 0, false}, SC_SD3}
#define SC__JOINT(name, other) SC__SD3("transformer_blocks.*." name, "joint_blocks.*." other)
#define SC__JOINT_THIRD(name, other) \
    {"transformer_blocks.*." name, "joint_blocks.*." other, {0, 1, 3, false}, SC_SD3}

static const sc__alias sc__aliases[] = {
    SC__SAME("", ""),
    /* The transformer: flux1-dev.safetensors. */
    SC__SAME("x_embedder", "img_in"),
    SC__SAME("context_embedder", "txt_in"),
    SC__SAME("time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    SC__SAME("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    SC__SAME("time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    SC__SAME("time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
    SC__SAME("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    SC__SAME("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    SC__DOUBLE("norm1.linear", "img_mod.lin"),
    SC__THIRD("transformer_blocks.*.attn.to_?", "double_blocks.*.img_attn.qkv"),
    SC__DOUBLE("attn.norm_?.weight", "img_attn.norm.$_norm.scale"),
    SC__DOUBLE("attn.to_out.0", "img_attn.proj"),
    SC__DOUBLE("ff.net.0.proj", "img_mlp.0"),
    SC__DOUBLE("ff.net.2", "img_mlp.2"),
    SC__DOUBLE("norm1_context.linear", "txt_mod.lin"),
    SC__THIRD("transformer_blocks.*.attn.add_?_proj", "double_blocks.*.txt_attn.qkv"),
    SC__DOUBLE("attn.norm_added_?.weight", "txt_attn.norm.$_norm.scale"),
    SC__DOUBLE("attn.to_add_out", "txt_attn.proj"),
    SC__DOUBLE("ff_context.net.0.proj", "txt_mlp.0"),
    SC__DOUBLE("ff_context.net.2", "txt_mlp.2"),
    SC__SINGLE("norm.linear", "modulation.lin"),
    {"single_transformer_blocks.*.attn.to_?", "single_blocks.*.linear1", {0, 1, 7, false}, SC_FLUX},
    {"single_transformer_blocks.*.proj_mlp", "single_blocks.*.linear1", {3, 4, 7, false}, SC_FLUX},
    SC__SINGLE("proj_out", "linear2"),
    SC__SINGLE("attn.norm_?.weight", "norm.$_norm.scale"),
    {"norm_out.linear", "final_layer.adaLN_modulation.1", {0, 0, 0, true}, SC_FLUX},
    SC__SAME("proj_out", "final_layer.linear"),
    /* ComfyUI's own name for the weight of these norms. */
    SC__DOUBLE("attn.norm_?", "img_attn.norm.$_norm"),
    SC__DOUBLE("attn.norm_added_?", "txt_attn.norm.$_norm"),
    SC__SINGLE("attn.norm_?", "norm.$_norm"),
    /* LoRA files in the OMI format, OneTrainer's. */
    SC__SAME("x_embedder", "img_in.proj"),
    SC__DOUBLE("attn.to_?", "img_attn.qkv.?"),
    SC__DOUBLE("attn.add_?_proj", "txt_attn.qkv.?"),
    SC__SINGLE("attn.to_?", "linear1.?"),
    SC__SINGLE("proj_mlp", "linear1.3"),
    /* LoRA files of XLabs: 1 is the picture's stream, 2 the text's. */
    SC__THIRD("transformer_blocks.*.attn.to_?", "double_blocks.*.processor.qkv_lora1"),
    SC__DOUBLE("attn.to_out.0", "processor.proj_lora1"),
    SC__THIRD("transformer_blocks.*.attn.add_?_proj", "double_blocks.*.processor.qkv_lora2"),
    SC__DOUBLE("attn.to_add_out", "processor.proj_lora2"),
    SC__THIRD("single_transformer_blocks.*.attn.to_?", "single_blocks.*.processor.qkv_lora"),
    SC__SINGLE("proj_out", "processor.proj_lora"),
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
    SC__SAME("*.mid_block.attentions.0.to_out.0", "*.mid.attn_1.proj_out"),
    SC__SAME("*.mid_block.attentions.0.to_*", "*.mid.attn_1.*"),
    SC__SAME("*.conv_norm_out", "*.norm_out"),
    /* T5: some files name its table by its place in the encoder. */
    SC__SAME("shared", "encoder.embed_tokens"),
    /* SD3.5's transformer: sd3.5_large.safetensors. */
    SC__SD3("pos_embed.proj", "x_embedder.proj"),
    SC__SD3("pos_embed.pos_embed", "pos_embed"),
    SC__SD3("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    SC__SD3("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    SC__SD3("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
    SC__SD3("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
    SC__JOINT("norm1.linear", "x_block.adaLN_modulation.1"),
    /* attn and attn2. */
    SC__JOINT_THIRD("attn*.to_?", "x_block.attn*.qkv"),
    SC__JOINT("attn*.norm_*", "x_block.attn*.ln_*"),
    SC__JOINT("attn*.to_out.0", "x_block.attn*.proj"),
    SC__JOINT("ff.net.0.proj", "x_block.mlp.fc1"),
    SC__JOINT("ff.net.2", "x_block.mlp.fc2"),
    {"transformer_blocks.!.norm1_context.linear", "joint_blocks.!.context_block.adaLN_modulation.1",
     {0, 0, 0, true}, SC_SD3},
    SC__JOINT("norm1_context.linear", "context_block.adaLN_modulation.1"),
    SC__JOINT_THIRD("attn.add_?_proj", "context_block.attn.qkv"),
    SC__JOINT("attn.norm_added_*", "context_block.attn.ln_*"),
    SC__JOINT("attn.to_add_out", "context_block.attn.proj"),
    SC__JOINT("ff_context.net.0.proj", "context_block.mlp.fc1"),
    SC__JOINT("ff_context.net.2", "context_block.mlp.fc2"),
    {"norm_out.linear", "final_layer.adaLN_modulation.1", {0, 0, 0, true}, SC_SD3},
    SC__SD3("proj_out", "final_layer.linear"),
};
enum { SC__ALIASES = (int)(sizeof sc__aliases / sizeof *sc__aliases) };

/* What stands before the names of weights in single files, and in files that hold all parts. */
static const char *const sc__weight_prefixes[] = {"", "model.diffusion_model.", "diffusion_model.",
    "vae.", "first_stage_model.", "text_encoders.clip_l.transformer.",
    "text_encoders.t5xxl.transformer.", "transformer.", NULL};
static const char *const sc__clip_g_prefixes[] = {"", "text_encoders.clip_g.transformer.", NULL};

/* `name` translated by `alias`, and which rows of that it is; false if it is not about this name.
 * levels: of the VAE, or double blocks. */
static bool sc__translate(const sc__alias *alias, const char *name, int levels, char other[256],
                          sc__slice *rows) {
    const char *word[4], *p;
    int length[4], words = 0, next = 0, n = 0, part = 0, size;
    for (p = alias->name; *p; p++, name += size) {
        bool wild = *p == '*' || *p == '~' || *p == '!';
        if (*p == '!' && atoi(name) != levels - 1) return false;
        size = wild ? (int)strcspn(name, ".") : 1;
        if (wild) word[words] = name, length[words++] = size;
        if (*p == '?') part = *name == 'q' ? 0 : *name == 'k' ? 1 : *name == 'v' ? 2 : -1;
        if (part < 0 || (!wild && *p != '?' && *p != *name)) return false;
    }
    if (alias->name[0] && *name && *name != '.') return false;
    *rows = alias->rows;
    rows->first += rows->whole ? part : 0;
    for (p = alias->other; *p && n < 200; p++) {
        if (*p == '*' || *p == '!')
            n += snprintf(other + n, (size_t)(256 - n), "%.*s", length[next], word[next]);
        else if (*p == '~') n += snprintf(other + n, 32, "%d", levels - 1 - atoi(word[next]));
        else if (*p == '$') n += snprintf(other + n, 8, part ? "key" : "query");
        else other[n++] = *p == '?' ? (char)('0' + part) : *p;
        next += *p == '*' || *p == '~' || *p == '!';
    }
    return n < 200 && n + snprintf(other + n, (size_t)(256 - n), "%s", name) < 256;
}

/* The tensor of `f` that holds `name` followed by `end`: under its own name or another, behind any
 * of `prefixes` (one that ends in _ makes every dot of the name a _, as kohya's do). NULL: none. */
static sc__entry *sc__find_as(const sc_file *f, const char *const *prefixes, const char *name,
                              const char *end, int levels, sc__slice *rows) {
    char other[256], full[512];
    for (int i = 0; i < SC__ALIASES; i++) {
        if (!sc__translate(&sc__aliases[i], name, levels, other, rows)) continue;
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

/* x [rows, ...] becomes those `rows` of it. False: it does not divide. */
static bool sc__take_rows(sc_tensor *x, const sc__slice *rows) {
    if (!rows->whole) return true;
    if (x->ndim < 1 || x->shape[0] % rows->whole) return false;
    x->data = (char *)x->data + sc_count(x) / rows->whole * rows->first * sc_dtype_size(x->dtype);
    x->shape[0] = x->shape[0] / rows->whole * rows->parts;
    return true;
}

/* The length of `name` without `end`; 0 if it does not end so. */
static size_t sc__stem(const char *name, const char *end) {
    size_t n = strlen(name), m = strlen(end);
    return n > m && !strcmp(name + n - m, end) ? n - m : 0;
}

/* Whether `a` has the sides that are wanted, but for sides of 1 at the end. A matrix may be stored
 * as a convolution of 2x2 patches, a table with a 1 before it. */
static bool sc__same_shape(const sc_tensor *a, const sc_tensor *want) {
    const int64_t *side = a->shape, *wanted = want->shape;
    if (want->ndim == 2 && a->ndim == 4 && side[2] == 2 && side[3] == 2)
        return side[0] == wanted[0] && 4 * side[1] == wanted[1];
    if (want->ndim == 2 && a->ndim == 3 && side[0] == 1)
        return side[1] == wanted[0] && side[2] == wanted[1];
    for (int i = 0; i < a->ndim || i < want->ndim; i++)
        if ((i < a->ndim ? a->shape[i] : 1) != (i < want->ndim ? want->shape[i] : 1)) return false;
    return true;
}

/* ==== Weights of a network ================================================== >>weights =======
 *
 * A network asks for its weights by their names on disk and states the shape it needs, so opening
 * a model is at the same time the check that the file fits. Frozen matrices stay there, mapped.
 */

sc_net *sc_net_open(const sc_backend *backend, const char *path, bool widen) {
    sc_net *net = (sc_net *)sc__alloc(1, sizeof *net);
    if (!net) return NULL;
    net->backend = backend;
    net->widen = widen;
    net->prefixes = sc__weight_prefixes;
    if (path && !(net->file = sc_file_open(path))) return SC_FREE(net), NULL;
    return net;
}

void sc_net_close(sc_net *net) {
    if (!net) return;
    for (int64_t i = 0; i < net->count; i++) {
        sc_tensor *x = &net->weights[i]->tensor;
        if (net->weights[i]->owned && x->data) net->backend->release(x->data);
        if (x->scale) net->backend->release(x->scale);
        SC_FREE(net->weights[i]);
    }
    SC_FREE(net->weights);
    sc_file_close(net->file);
    SC_FREE(net);
}

/* Bytes that sc_net_load will take. */
static size_t sc__net_waiting(const sc_net *net) {
    size_t bytes = 0;
    for (int64_t i = 0; i < net->count; i++)
        if (net->weights[i]->waiting && !net->streamed)
            bytes += (size_t)sc_count(&net->weights[i]->tensor) *
                     (net->fp8 || sc_dtype_size(net->weights[i]->source.dtype) == 1 ? 1 : 2);
    return bytes;
}

/* The scales of these rows of an 8-bit weight, which has one or one a row. Files without any are
 * plain casts; one that announces scales (ComfyUI's mark `scaled_fp8`) must have them. */
static bool sc__read_scale(const sc_file *f, const sc__entry *weight, const sc__slice *rows,
                           sc_weight *w) {
    size_t stem = sc__stem(weight->name, "weight");
    sc__entry *found = sc__find_beside(f, weight->name, stem, "weight_scale"), *mark = NULL;
    if (!found) found = sc__find_beside(f, weight->name, stem, "scale_weight");
    for (int i = 0; !mark && sc__weight_prefixes[i]; i++) {
        size_t n = strlen(sc__weight_prefixes[i]);
        if (!strncmp(weight->name, sc__weight_prefixes[i], n)) /* not the mark of another part */
            mark = sc__find_beside(f, weight->name, n, "scaled_fp8");
    }
    if (mark) mark->used = true;
    if (!found) return !mark || sc_fail("%s: '%s' is an 8-bit weight without its '.scale_weight'; "
                                         "the file says that it has them", f->path, weight->name);
    found->used = true;
    sc_tensor x = found->tensor;
    int64_t n = sc_count(&x), count = w->source.shape[0], i = 0;
    bool vector = true; /* [rows, 1] and [1, rows] are seen */
    for (int k = 0; k < x.ndim; k++) vector = vector && (x.shape[k] == 1 || x.shape[k] == n);
    if (!vector || (n != 1 && n != weight->tensor.shape[0]) || x.dtype > SC_F64)
        return sc_fail("%s: '%s' must be one number, or one a row", f->path, found->name);
    x.ndim = 1;
    x.shape[0] = n;
    if (n > 1) sc__take_rows(&x, rows); /* as many as the weight */
    float *scales = (float *)sc__alloc((size_t)count, sizeof *scales);
    if (!scales) return false;
    sc_to_f32(scales, x.data, x.dtype, x.shape[0]);
    for (int64_t k = x.shape[0]; k < count; k++) scales[k] = scales[0];
    while (i < count && isfinite(scales[i]) && scales[i] > 0) i++;
    if (i == count) return w->scales = scales, true;
    SC_FREE(scales);
    return sc_fail("%s: the scale '%s' is not a positive number", f->path, found->name);
}

/* Finds the source of a weight, by its name, and of its shape. */
static bool sc__find_weight(const sc_net *net, sc_weight *w) {
    char expected[96], actual[96];
    const char *path = net->file->path, *name = w->name;
    const sc_tensor *want = &w->tensor;
    sc__slice rows;
    sc__entry *e = sc__find_as(net->file, net->prefixes, name, "", net->levels, &rows);
    if (!e) return sc_fail("%s: tensor '%s' is missing", path, name);
    e->used = true;
    sc_tensor x = e->tensor;
    if (e->tensor.dtype > SC_F64)
        return sc_fail("%s: tensor '%s' has type %s; weights must be floating point", path,
                        e->name, sc_dtype_name(e->tensor.dtype));
    if (!sc__take_rows(&x, &rows) || !sc__same_shape(&x, want))
        return sc_fail("%s: tensor '%s' has shape %s; '%s' must be %s here", path, e->name,
                        sc__shape_text(&e->tensor, actual), name, sc__shape_text(want, expected));
    w->source = *want; /* without further sides of 1 */
    w->source.data = x.data, w->source.dtype = x.dtype;
    w->swapped = rows.swapped;
    return x.dtype != SC_F8_E4M3 || sc__read_scale(net->file, e, &rows, w);
}

/* Values of w's rows [first, first + rows) as f32, scaled; where it has no source, random ones:
 * Xavier for matrices, 0 for biases, 1 for the weights of norms. */
static bool sc__weight_rows(sc_net *net, const sc_weight *w, int64_t first, int64_t rows,
                            float *to) {
    const sc_tensor *x = &w->tensor, *from = &w->source;
    int64_t all = x->shape[0], columns = sc_count(x) / all, n = rows * columns;
    if (!from->data) {
        float std = sqrtf(2.f / (float)(all + columns)), one = sc__stem(w->name, ".bias") ? 0 : 1;
        if (x->ndim > 1) sc_normal(&net->rng, to, n);
        for (int64_t i = 0; i < n; i++) to[i] = x->ndim > 1 ? to[i] * std : one;
        return true;
    }
    if (w->swapped) first = (first + all / 2) % all;
    sc_to_f32(to, (const char *)from->data + first * columns * sc_dtype_size(from->dtype),
              from->dtype, n);
    for (int64_t i = 0; w->scales && i < n; i++) to[i] *= w->scales[first + i / columns];
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(to[i])) return sc_fail("'%s' holds a value that is %g", w->name, to[i]);
    return true;
}

/* Brings a weight to the backend in the type that its tensor has, some rows at a time. Random
 * matrices that are not widened are for measuring speed: their first rows, repeated. */
static bool sc__load_weight(sc_net *net, sc_weight *w) {
    const sc_backend *be = net->backend;
    sc_tensor *x = &w->tensor;
    int64_t rows = x->shape[0], columns = sc_count(x) / rows, size = sc_dtype_size(x->dtype);
    bool raw = w->waiting && w->source.dtype == x->dtype, narrow = x->dtype == SC_F8_E4M3 && !raw;
    bool streamed = w->waiting && net->streamed && x->ndim == 2 && be->alloc_streamed;
    bool repeated = !w->source.data && !net->widen;
    int64_t slice = (repeated ? 1 << 20 : 1 << 22) / columns, limit = w->swapped ? rows / 2 : rows;
    int64_t uploaded = narrow ? sc_dtype_size(be->activation) : size; /* bytes of a value */
    slice = sc__max(1, sc__min(slice, limit));
    float *wide = (float *)sc__alloc((size_t)(slice * columns), sizeof *wide);
    void *staged = narrow ? be->alloc((size_t)(slice * columns * uploaded)) : NULL;
    if (narrow && !x->scale) x->scale = (float *)be->alloc((size_t)rows * 4);
    bool ok = wide && (!narrow || (staged && x->scale));
    if (ok) x->data = (streamed ? be->alloc_streamed : be->alloc)((size_t)(rows * columns * size));
    ok = ok && x->data;
    for (int64_t r = 0, count; ok && r < rows; r += count) {
        count = sc__min(slice, (r < limit ? limit : rows) - r); /* not across the halves */
        int64_t n = count * columns;
        char *to = (char *)x->data + r * columns * size;
        if (!raw && (r == 0 || !repeated)) {
            ok = sc__weight_rows(net, w, r, count, wide);
            for (int64_t i = 0; uploaded == 2 && i < n; i++) { /* in place */
                uint16_t half = sc__f32_to_bf16(wide[i]);
                memcpy((char *)wide + 2 * i, &half, 2);
            }
        }
        const char *from = raw ? (char *)w->source.data + r * columns * size : (char *)wide;
        be->upload(narrow ? staged : to, from, (size_t)(n * uploaded));
        if (narrow) be->quantize((uint8_t *)to, x->scale + r, staged, count, columns);
    }
    if (!ok && x->data) be->release(x->data), x->data = NULL;
    if (staged) be->release(staged);
    SC_FREE(wide);
    w->waiting = w->waiting && !ok;
    return ok;
}

bool sc_net_load(sc_net *net) {
    bool ok = true;
    for (int64_t i = 0; ok && i < net->count; i++)
        if (net->weights[i]->waiting) ok = sc__load_weight(net, net->weights[i]);
    return ok;
}

/* product: only products read the weight, so it may stay in 8 bits with scales beside it. */
static sc_tensor *sc__net_weight(sc_net *net, const char *name, int ndim, const int64_t *shape,
                                 bool product) {
    bool room = sc__grow(&net->weights, net->count, sizeof *net->weights);
    sc_weight *w = room ? (sc_weight *)sc__alloc(1, sizeof *w) : NULL;
    if (!w) return NULL;
    net->weights[net->count++] = w;
    snprintf(w->name, sizeof w->name, "%s", name);
    sc_tensor *x = &w->tensor;
    *x = (sc_tensor){.ndim = ndim, .dtype = SC_F32};
    for (int i = 0; i < ndim; i++) x->shape[i] = shape[i];
    bool found = net->file && sc__find_weight(net, w);
    w->missing = net->file && !found;
    const sc_backend *be = net->backend;
    if (be && w->missing) return NULL;
    sc_dtype stored = w->source.dtype;
    bool wide = ndim == 1 || net->widen || w->swapped || (w->scales && !product) ||
                (found && stored == SC_F64);
    bool narrow = net->fp8 && product && (!found || sc_dtype_size(stored) > 1);
    bool aligned = (uintptr_t)w->source.data % (uintptr_t)sc_dtype_size(stored) == 0;
    bool mapped = found && !wide && !narrow && aligned && be && be->on_host;
    bool as_stored = mapped || (found && sc_dtype_size(stored) == 1 && !wide);
    w->waiting = be && found && !wide && !mapped;
    w->owned = be && !mapped;
    if (mapped) x->data = w->source.data;
    if (be) x->dtype = as_stored ? stored : wide ? SC_F32 : narrow ? SC_F8_E4M3 : be->activation;
    bool loaded = !w->owned || w->waiting || sc__load_weight(net, w);
    if (loaded && be && !wide && w->scales) { /* they go beside the bits */
        size_t bytes = (size_t)shape[0] * sizeof(float);
        loaded = (x->scale = (float *)be->alloc(bytes)) != NULL;
        if (loaded) be->upload(x->scale, w->scales, bytes);
    }
    SC_FREE(w->scales);
    w->scales = NULL;
    return loaded ? x : NULL;
}

sc_tensor *sc_net_weight(sc_net *net, const char *name, int ndim, const int64_t *shape) {
    return sc__net_weight(net, name, ndim, shape, false);
}

/* The weight of prefix + name, and perhaps its bias, [shape[0]]. Only products read matrices. */
static bool sc__net_layer(sc_net *net, sc_linear_layer *layer, const char *prefix,
                          const char *name, int ndim, const int64_t *shape, bool bias) {
    char full[2 * SC_MAX_NAME];
    snprintf(full, sizeof full, "%s%s.weight", prefix, name);
    layer->weight = sc__net_weight(net, full, ndim, shape, ndim == 2);
    if (!layer->weight || !bias) return layer->weight != NULL;
    snprintf(full, sizeof full, "%s%s.bias", prefix, name);
    return (layer->bias = sc_net_weight(net, full, 1, shape)) != NULL;
}

bool sc_net_linear(sc_net *net, sc_linear_layer *layer, const char *name, int64_t out, int64_t in,
                   bool bias) {
    return sc__net_layer(net, layer, "", name, 2, (const int64_t[]){out, in}, bias);
}

/* ---- What nobody asked for ---- */

/* Whether a name is like one of these, of which the last is NULL. */
static bool sc__any(const char *const *patterns, const char *name) {
    while (*patterns && fnmatch(*patterns, name, 0)) patterns++;
    return *patterns;
}

/* Appends a name to a list for messages, which ends in ... where it is full. */
static void sc__list_name(char *list, size_t size, const char *name) {
    size_t used = strlen(list), room = size - used;
    bool full = used > 3 && !strcmp(list + used - 3, "...");
    if (!full && strlen(name) + 8 < room)
        snprintf(list + used, room, "%s%s", used ? " " : "", name);
    else if (!full) snprintf(list + used, room, " ...");
}

/* Whether a tensor was asked for whose name begins with these n characters. */
static bool sc__used_below(const sc_file *f, const char *name, size_t n) {
    int64_t i = 0;
    while (i < f->count && (!f->entries[i].used || strncmp(f->entries[i].name, name, n))) i++;
    return i < f->count;
}

/* Called when a net has asked for all of its weights: of what else the file has, it must not be
 * blocks beside those that are used, nor, beside an 8-bit weight, what may be its scale. */
static bool sc__net_complete(const sc_net *net) {
    const sc_file *f = net->backend ? net->file : NULL;
    for (int64_t i = 0; f && i < f->count; i++) {
        const char *name = f->entries[i].name, *dot = strrchr(name, '.');
        if (f->entries[i].used) continue;
        for (const char *at = name; (at = strchr(at, '.')); at++) {
            size_t n = (size_t)(at + 1 - name), digits = strspn(at + 1, "0123456789");
            if (digits && at[1 + digits] == '.' && sc__used_below(f, name, n) &&
                !sc__used_below(f, name, n + digits + 1))
                return sc_fail("%s: '%s' is of a block that the model does not have: is "
                                "config.json that of another one?", f->path, name);
            const sc__entry *e = sc__find_beside(f, name, n, "weight");
            if (e && e->used && e->tensor.dtype == SC_F8_E4M3 && !strstr(at, "input") &&
                strcmp(dot, ".comfy_quant") && strcmp(dot, ".bias"))
                return sc_fail("%s: '%s' is not understood beside the 8-bit '%s': scales are read "
                                "as .weight_scale or .scale_weight, one number or one a row",
                                f->path, name, e->name);
        }
    }
    return true;
}

/* Extras that change nothing: marks, scales of activations, second copies, other halves of CLIP. */
static const char *const sc__harmless[] = {"*scaled_fp8", "*.comfy_quant", "*input_scale",
    "*scale_input", "*position_ids", "*embed_tokens.weight", "*logit_scale", "*text_projection*",
    "*visual_projection*", "*vision_model.*", "*spiece_model", NULL};

int64_t sc_net_unread(const sc_net *const *nets, int count, char *names, size_t size) {
    int64_t unread = 0;
    *names = 0;
    for (int i = 0; i < count; i++) {
        const sc_file *f = nets[i] ? nets[i]->file : NULL, *other;
        for (int64_t k = 0; f && k < f->count; k++) {
            bool used = sc__any(sc__harmless, f->entries[k].name);
            for (int j = 0; j < count; j++) { /* the same file's, counted already or used there */
                if (!nets[j] || !(other = nets[j]->file) || strcmp(other->path, f->path)) continue;
                used = used || j < i || other->entries[k].used;
            }
            unread += !used;
            if (!used) sc__list_name(names, size, f->entries[k].name);
        }
    }
    return unread;
}

/* ---- What a file without config.json says by its shapes ---- */

/* Side `dim` of a weight in the net's file; `fallback` where there is none. */
static int sc__side(const sc_net *net, const char *name, int dim, int fallback) {
    sc__slice rows;
    sc__entry *e = net->file ? sc__find_as(net->file, net->prefixes, name, "", net->levels,
                                           &rows) : NULL;
    sc_tensor x = e ? e->tensor : (sc_tensor){0};
    if (!e || dim >= x.ndim || !sc__take_rows(&x, &rows) || x.shape[dim] > 1 << 24) return fallback;
    return (int)x.shape[dim];
}

/* How many weights there are with names of this format, which has one %d, counted from 0. */
static int sc__count_layers(const sc_net *net, const char *format, int fallback) {
    char name[SC_MAX_NAME];
    for (int n = 0;; n++) {
        snprintf(name, sizeof name, format, n);
        if (!sc__side(net, name, 0, 0)) return n ? n : fallback;
    }
}

/* A file of settings, which may not be there: json is then NULL. */
typedef struct sc__config {
    char path[SC__PATH];
    sc_json *json;
    bool wrong;                 /* a setting is; the error of the first is set */
} sc__config;

/* folder/name; false if it is broken. */
static bool sc__config_open(sc__config *c, const char *folder, const char *name) {
    return !sc__exists(sc__join(c->path, folder, name)) || (c->json = sc_json_load(c->path));
}

/* The config.json of a part's folder, or beside the file in it; other single files have none. */
static bool sc__read_config(sc__config *c, const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    char folder[SC__PATH];
    snprintf(c->path, sizeof c->path, "%s", path);
    if (!sc__is_folder(path) && strncmp(name, "diffusion_pytorch_model.", 24) &&
        strncmp(name, "model.", 6)) return true;
    if (!sc__config_open(c, sc__model_folder(folder, path), "config.json")) return false;
    if (!c->json) return true;
    if (sc_json_get(c->json, "text_config"))
        return sc_fail("%s: this is a whole CLIP's, not the text encoder's alone", c->path);
    return c->json->type == SC__OBJECT || sc_fail("%s: not a JSON object", c->path);
}

/* A number, or a truth value as 1 or 0; absent, null or wrong: the fallback. */
static double sc__config_number(sc__config *c, const char *key, double fallback) {
    const sc_json *v = sc_json_get(c->json, key);
    if (!v || v->type == SC__NULL) return fallback;
    if (v->type == SC__BOOL || v->type == SC__NUMBER) return v->u.number;
    c->wrong = c->wrong || !sc_fail("%s: '%s' must be a number", c->path, key);
    return fallback;
}

/* Whether the config says `wanted` under `key`, maybe several times in a list, or nothing there;
 * false with the error set. */
static bool sc__config_is(const sc__config *c, const char *key, const char *wanted) {
    const sc_json *said = sc_json_get(c->json, key);
    for (int64_t i = 0; i == 0 || i < sc_json_length(said); i++) {
        const sc_json *item = sc_json_at(said, i);
        const char *found = sc_json_string(item ? item : said, wanted);
        if (strcmp(found, wanted))
            return sc_fail("%s: %s must be %s, not '%s'", c->path, key, wanted, found);
    }
    return true;
}

/* An integer >= least; wrong: the fallback. */
static int sc__config_int(sc__config *c, int least, const char *key, int fallback) {
    double number = sc__config_number(c, key, fallback);
    if (number >= least && number <= 1 << 24 && number == floor(number)) return (int)number;
    c->wrong = c->wrong || !sc_fail("%s: '%s' must be a whole number from %d up", c->path, key,
                                    least);
    return fallback;
}

/* ==== Opening and saving FLUX ================================================== >>open =======
 *
 * The configuration, the weights by their names (diffusers' FluxTransformer2DModel), the list of
 * linear layers that LoRA can adapt, and a copy of all of it on disk, with LoRAs folded in.
 */

const sc_dit_config *sc_dit_config_of(const sc_dit *dit) { return &dit->config; }
const sc_net *sc_dit_net(const sc_dit *dit) { return dit ? dit->net : NULL; }
const char *sc_dit_config_text(const sc_dit *dit) { return dit->config_text; }

void sc_dit_checkpointing(sc_dit *f, bool on) {
    f->checkpointed = on ? f->config.layers + f->config.single_layers : 0;
}

/* ---- Opening ---- */

/* What only FLUX has. */
static bool sc__flux_read_config(sc_dit_config *c, sc__config *from, const sc_net *net) {
    static const char guidance[] = "time_text_embed.guidance_embedder.linear_1.weight";
    const sc_json *axes = sc_json_get(from->json, "axes_dims_rope");
    int sum = 0;
    for (int i = 0; i < 3; i++) {
        int usual = i ? c->head_size * 7 / 16 : c->head_size / 8;
        double axis = sc_json_number(sc_json_at(axes, i), usual);
        if (!(axis >= 2 && axis <= 256 && axis == 2 * floor(axis / 2)))
            return sc_fail("%s: axes_dims_rope must be even numbers up to 256", from->path);
        sum += c->rope_axes[i] = (int)axis;
    }
    bool has_guidance = sc__side(net, guidance, 0, 0) > 0;
    c->guidance = sc__config_number(from, "guidance_embeds", has_guidance) != 0;
    if (from->wrong) return false;
    return (sum == c->head_size && sum <= 256) ||
           sc_fail("%s: axes_dims_rope sum to %d; attention_head_dim is %d (at most 256)",
                   from->path, sum, c->head_size);
}

/* What only SD3.5 has. */
static bool sc__sd3_read_config(sc_dit_config *c, sc__config *from, const sc_net *net) {
    const sc_json *dual = sc_json_get(from->json, "dual_attention_layers");
    bool normed = sc__side(net, "transformer_blocks.0.attn.norm_q.weight", 0, 0) > 0;
    const char *norm = sc_json_string(sc_json_get(from->json, "qk_norm"), normed ? "rms_norm" : "");
    int patch = sc__config_int(from, 1, "patch_size", 2), width = c->heads * c->head_size;
    int places = sc__side(net, "pos_embed.pos_embed", 1, 192 * 192);
    int projected = sc__side(net, "pos_embed.proj.weight", 0, width);
    c->position_side = sc__config_int(from, 1, "pos_embed_max_size", (int)(sqrt(places) + 0.5));
    c->dual_layers = dual ? (int)sc_json_length(dual)
                          : sc__count_layers(net, "transformer_blocks.%d.attn2.to_q.weight", 0);
    if (from->wrong) return false;
    if (strcmp(norm, "rms_norm"))
        return sc_fail("%s: 'qk_norm' is not rms_norm: SD3 of before 3.5 is not supported",
                       from->path);
    for (int i = 0; i < c->dual_layers; i++)
        if (sc_json_number(sc_json_at(dual, i), dual ? -1 : i) != i || i >= c->layers)
            return sc_fail("%s: dual_attention_layers must be the first ones", from->path);
    if (patch != 2 || c->head_size % 2 || c->head_size > 256 || c->position_side > 1 << 12)
        return sc_fail("%s: patch_size must be 2, attention_head_dim even and at most 256, "
                       "pos_embed_max_size at most 4096", from->path);
    return sc__config_number(from, "caption_projection_dim", projected) == width ||
           sc_fail("%s: caption_projection_dim must be %d x %d, the heads' width", from->path,
                   c->heads, c->head_size);
}

/* What config.json lacks is as in FLUX.1-dev or SD3.5-Large; where there is none, the weights'
 * shapes say it. */
static bool sc__dit_read_config(sc_dit_config *c, sc__config *from, const sc_net *weights) {
    static const char flux[] = "FluxTransformer2DModel", sd3[] = "SD3Transformer2DModel";
    const sc_net none = {0}, *net = from->json ? &none : weights;
    const char *likely = sc__side(net, "pos_embed.proj.weight", 0, 0) ? sd3 : flux;
    const char *class_name = sc_json_string(sc_json_get(from->json, "_class_name"), likely);
    bool is_sd3 = !strcmp(class_name, sd3);
    if (!is_sd3 && strcmp(class_name, flux))
        return sc_fail("%s: this is a %s; only FLUX.1 (%s) and SD3.5 (%s) are supported",
                       from->path, class_name, flux, sd3);
    const char *x_embedder = is_sd3 ? "pos_embed.proj.weight" : "x_embedder.weight";
    int in = sc__side(net, x_embedder, 1, is_sd3 ? 16 : 64), patch = is_sd3 ? 4 : 1;
    in = patch * sc__config_int(from, 1, "in_channels", in);
    int out = sc__side(net, "proj_out.weight", 0, in) / patch;
    int layers = sc__count_layers(net, "transformer_blocks.%d.attn.to_q.weight", is_sd3 ? 38 : 19);
    int singles = sc__count_layers(net, "single_transformer_blocks.%d.attn.to_q.weight", 38);
    int size = sc__side(net, "transformer_blocks.0.attn.norm_q.weight", 0, is_sd3 ? 64 : 128);
    int text = sc__side(net, "context_embedder.weight", 1, 4096);
    int pooled = sc__side(net, "time_text_embed.text_embedder.linear_1.weight", 1,
                          is_sd3 ? 2048 : 768);
    c->kind = is_sd3 ? SC_SD3 : SC_FLUX;
    c->in_channels = in;
    c->out_channels = patch * sc__config_int(from, 1, "out_channels", out);
    c->layers = sc__config_int(from, is_sd3 ? 1 : 0, "num_layers", layers);
    c->single_layers = is_sd3 ? 0 : sc__config_int(from, 0, "num_single_layers", singles);
    c->head_size = size = sc__config_int(from, 1, "attention_head_dim", size);
    int width = sc__side(net, x_embedder, 0, is_sd3 ? 38 * size : 3072);
    c->heads = sc__config_int(from, 1, "num_attention_heads", width / (size ? size : 1));
    c->text_channels = sc__config_int(from, 1, "joint_attention_dim", text);
    c->pooled_channels = sc__config_int(from, 1, "pooled_projection_dim", pooled);
    if (from->wrong) return false;
    if ((int64_t)c->heads * c->head_size > 1 << 20)
        return sc_fail("%s: %d heads of %d is too wide", from->path, c->heads, c->head_size);
    if (c->layers + c->single_layers > 1024)
        return sc_fail("%s: more than 1024 blocks", from->path);
    return is_sd3 ? sc__sd3_read_config(c, from, net) : sc__flux_read_config(c, from, net);
}

/* The config.json of weights that came without one. */
static char *sc__dit_config_text(const sc_dit_config *c) {
    const int *axes = c->rope_axes;
    char text[8192], dual[6144] = ""; /* up to 1024 blocks */
    for (int i = 0, n = 0; i < c->dual_layers; i++)
        n += snprintf(dual + n, sizeof dual - (size_t)n, "%s%d", i ? ", " : "", i);
    if (c->kind == SC_SD3)
        snprintf(text, sizeof text,
                 "{\n  \"_class_name\": \"SD3Transformer2DModel\",\n  \"attention_head_dim\": %d,\n"
                 "  \"caption_projection_dim\": %d,\n  \"dual_attention_layers\": [%s],\n"
                 "  \"in_channels\": %d,\n  \"joint_attention_dim\": %d,\n"
                 "  \"num_attention_heads\": %d,\n  \"num_layers\": %d,\n  \"out_channels\": %d,\n"
                 "  \"patch_size\": 2,\n  \"pooled_projection_dim\": %d,\n"
                 "  \"pos_embed_max_size\": %d,\n  \"qk_norm\": \"rms_norm\",\n"
                 "  \"sample_size\": 128\n}\n",
                 c->head_size, c->heads * c->head_size, dual, c->in_channels / 4, c->text_channels,
                 c->heads, c->layers, c->out_channels / 4, c->pooled_channels, c->position_side);
    else
        snprintf(text, sizeof text,
                 "{\n  \"_class_name\": \"FluxTransformer2DModel\",\n"
                 "  \"attention_head_dim\": %d,\n  \"axes_dims_rope\": [%d, %d, %d],\n"
                 "  \"guidance_embeds\": %s,\n  \"in_channels\": %d,\n"
                 "  \"joint_attention_dim\": %d,\n  \"num_attention_heads\": %d,\n"
                 "  \"num_layers\": %d,\n  \"num_single_layers\": %d,\n  \"out_channels\": %d,\n"
                 "  \"patch_size\": 1,\n  \"pooled_projection_dim\": %d\n}\n",
                 c->head_size, axes[0], axes[1], axes[2], c->guidance ? "true" : "false",
                 c->in_channels, c->text_channels, c->heads, c->layers, c->single_layers,
                 c->out_channels, c->pooled_channels);
    return sc__strdup(text);
}

/* No name: there is no such layer. SD3.5's LoRA leaves alone what its authors' does. */
static bool sc__dit_linear(sc_dit *f, sc_linear_layer *layer, const char *prefix,
                           const char *name, int64_t out, int64_t in) {
    if (!name) return true;
    sc__module *m = &f->modules[f->module_count++];
    snprintf(m->name, sizeof m->name, "%.60s%.60s", prefix, name);
    m->layer = layer;
    m->untrained = f->config.kind == SC_SD3 && (strstr(name, "_context") || strstr(name, "attn2"));
    return sc_net_linear(f->net, layer, m->name, out, in, true);
}

/* What a stream calls its layers, and its norms. */
typedef struct sc__stream_names {
    const char *mod, *q, *k, *v, *out, *up, *down, *norm_q, *norm_k;
} sc__stream_names;
static const sc__stream_names sc__image_names = {
    "norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj",
    "ff.net.2", "attn.norm_q", "attn.norm_k"};
static const sc__stream_names sc__text_names = {
    "norm1_context.linear", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2", "attn.norm_added_q",
    "attn.norm_added_k"};
static const sc__stream_names sc__image_only_names = {
    NULL, "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", NULL, NULL, "attn2.norm_q",
    "attn2.norm_k"};
static const sc__stream_names sc__single_names = {
    "norm.linear", "attn.to_q", "attn.to_k", "attn.to_v", NULL, "proj_mlp", "proj_out",
    "attn.norm_q", "attn.norm_k"};

/* mods: vectors of its modulation. */
static bool sc__dit_stream(sc_dit *f, sc__stream *s, const char *p, const sc__stream_names *n,
                           int64_t c, int mods) {
    const int64_t size[] = {f->config.head_size};
    return sc__dit_linear(f, &s->mod, p, n->mod, mods * c, c) &&
           sc__dit_linear(f, &s->q, p, n->q, c, c) &&
           sc__dit_linear(f, &s->k, p, n->k, c, c) &&
           sc__dit_linear(f, &s->v, p, n->v, c, c) &&
           sc__dit_linear(f, &s->out, p, n->out, c, c) &&
           sc__dit_linear(f, &s->up, p, n->up, 4 * c, c) &&
           sc__dit_linear(f, &s->down, p, n->down, c, n->out ? 4 * c : 5 * c) &&
           sc__net_layer(f->net, &s->norm_q, p, n->norm_q, 1, size, false) &&
           sc__net_layer(f->net, &s->norm_k, p, n->norm_k, 1, size, false);
}

static bool sc__dit_double(sc_dit *f, int index, int64_t c) {
    sc__block *block = &f->blocks[index];
    bool twice = index < f->config.dual_layers;
    sc__stream_names text = sc__text_names;
    char p[SC_MAX_NAME];
    snprintf(p, sizeof p, "transformer_blocks.%d.", index);
    block->last = f->config.kind == SC_SD3 && index == f->config.layers - 1;
    if (block->last) text.out = text.up = text.down = NULL;
    return sc__dit_stream(f, &block->stream[0], p, &sc__image_names, c, twice ? 9 : 6) &&
           sc__dit_stream(f, &block->stream[1], p, &text, c, block->last ? 2 : 6) &&
           (!twice || sc__dit_stream(f, &block->image_only, p, &sc__image_only_names, c, 0));
}

static bool sc__dit_embedder(sc_dit *f, sc_linear_layer mlp[2], const char *prefix, int64_t c,
                             int64_t in) {
    return sc__dit_linear(f, &mlp[0], prefix, "linear_1", c, in) &&
           sc__dit_linear(f, &mlp[1], prefix, "linear_2", c, c);
}

/* All of it, in an order that decides what a seed draws. c: the width. */
static bool sc__dit_weights(sc_dit *f) {
    const sc_dit_config *o = &f->config;
    int64_t c = (int64_t)o->heads * o->head_size, places = (int64_t)o->position_side;
    const char *x_embedder = o->kind == SC_SD3 ? "pos_embed.proj" : "x_embedder";
    char p[SC_MAX_NAME];
    bool ok =
        sc__dit_linear(f, &f->x_embedder, "", x_embedder, c, o->in_channels) &&
        sc__dit_linear(f, &f->context_embedder, "", "context_embedder", c, o->text_channels) &&
        sc__dit_embedder(f, f->time, "time_text_embed.timestep_embedder.", c, 256) &&
        (!o->guidance ||
         sc__dit_embedder(f, f->guidance, "time_text_embed.guidance_embedder.", c, 256)) &&
        sc__dit_embedder(f, f->pooled, "time_text_embed.text_embedder.", c, o->pooled_channels);
    if (ok && o->kind == SC_SD3) {
        f->positions = sc_net_weight(f->net, "pos_embed.pos_embed", 2,
                                     (const int64_t[]){places * places, c});
        ok = f->positions != NULL;
        if (ok) f->net->weights[f->net->count - 1]->fixed = true;
    }
    for (int i = 0; ok && i < o->layers; i++) ok = sc__dit_double(f, i, c);
    for (int i = 0; ok && i < o->single_layers; i++) {
        snprintf(p, sizeof p, "single_transformer_blocks.%d.", i);
        ok = sc__dit_stream(f, f->blocks[o->layers + i].stream, p, &sc__single_names, c, 3);
    }
    return ok && sc__dit_linear(f, &f->norm_out, "", "norm_out.linear", 2 * c, c) &&
           sc__dit_linear(f, &f->proj_out, "", "proj_out", o->out_channels, c);
}

/* A new model starts as the identity: modulations and the last layer are zero (adaLN-Zero). */
static void sc__dit_zero(sc_dit *f) {
    for (int i = 0; i < f->module_count; i++) {
        const char *name = f->modules[i].name;
        sc_tensor *w = f->modules[i].layer->weight;
        if (strstr(name, "norm") || !strcmp(name, "proj_out"))
            f->net->backend->zero(w->data, (size_t)sc_count(w) * 4);
    }
}

sc_dit *sc_dit_open(const sc_backend *backend, const char *path, const sc_dit_options *options) {
    const sc_dit_options o = options ? *options : (sc_dit_options){0};
    sc__config c = {0};
    sc_dit *f = (sc_dit *)sc__alloc(1, sizeof *f);
    if (!f) return NULL;
    bool ok = (!o.fp8 || !o.widen || sc_fail("weights that are f32 cannot become fp8")) &&
              sc__read_config(&c, path);
    size_t length;
    if (ok && o.random && !c.json) ok = sc_fail("%s: No such file", c.path);
    ok = ok && (f->net = sc_net_open(backend, o.random ? NULL : path, o.widen)) &&
         sc__dit_read_config(&f->config, &c, f->net) &&
         (f->config_text = c.json ? sc_read_file(c.path, &length)
                                  : sc__dit_config_text(&f->config));
    sc_json_free(c.json);
    if (ok) {
        size_t doubles = (size_t)f->config.layers, singles = (size_t)f->config.single_layers;
        f->blocks = (sc__block *)sc__alloc(doubles + singles, sizeof *f->blocks);
        f->modules = (sc__module *)sc__alloc(10 + 18 * doubles + 6 * singles, sizeof *f->modules);
        f->net->rng.state = o.seed, f->net->fp8 = o.fp8, f->net->streamed = o.streamed;
        for (size_t i = 0; f->blocks && i < doubles + singles; i++) f->blocks[i].dit = f;
        f->net->levels = f->config.layers;
        ok = f->blocks && f->modules && sc__dit_weights(f) && sc__net_complete(f->net);
    }
    if (ok && o.random && o.widen && backend) sc__dit_zero(f);
    if (ok) return f;
    return sc_dit_close(f), NULL;
}

void sc_dit_close(sc_dit *f) {
    if (!f) return;
    if (f->rope.data) f->net->backend->release(f->rope.data);
    if (f->net && f->net->backend) sc_lora_unload(f);
    sc_net_close(f->net);
    SC_FREE(f->config_text);
    SC_FREE(f->blocks);
    SC_FREE(f->modules);
    SC_FREE(f);
}

/* n numbers of the backend's on the host; yours. */
static float *sc__fetch(const sc_backend *be, const void *from, int64_t n) {
    float *values = (float *)sc__alloc((size_t)n, sizeof *values);
    if (values && be->download(values, from, (size_t)n * sizeof *values)) return values;
    return SC_FREE(values), NULL;
}

/* The factors of a LoRA, [rank, in] and behind it [out, rank]; yours. */
static float *sc__lora_values(const sc_backend *be, const sc_adapter *l, sc_set set) {
    return sc__fetch(be, l->a[set].data, sc_count(&l->a[set]) + sc_count(&l->b[set]));
}

/* A weight on the host as f32, with its scale and the loaded LoRAs: W + sum scale B A; yours. */
static float *sc__merged_values(const sc_dit *f, const sc_tensor *w) {
    const sc_backend *be = f->net->backend;
    const sc_linear_layer *layer = NULL;
    int64_t n = sc_count(w), columns = n / w->shape[0];
    for (int i = 0; i < f->module_count; i++)
        if (f->modules[i].layer->weight->data == w->data) layer = f->modules[i].layer;
    float *values = (float *)sc__alloc((size_t)n, sizeof *values);
    bool ok = values && sc__download(be, w, values);
    float *scales = ok && w->scale ? sc__fetch(be, w->scale, w->shape[0]) : NULL;
    ok = ok && (scales || !w->scale);
    for (int64_t i = 0; ok && scales && i < n; i++) values[i] *= scales[i / columns];
    SC_FREE(scales);
    for (const sc_adapter *l = layer ? layer->adapters : NULL; ok && l; l = l->next) {
        float *a = l->loaded ? sc__lora_values(be, l, SC_TEACHER) : NULL;
        if (a)
            sc__cpu_gemm(w->shape[0], columns, l->rank, l->scale,
                         sc__matrix(a + l->rank * columns, SC_F32, l->rank, false),
                         sc__matrix(a, SC_F32, columns, false), 1,
                         sc__matrix(values, SC_F32, columns, false), NULL);
        ok = a || !l->loaded;
        SC_FREE(a);
    }
    if (ok) return values;
    return SC_FREE(values), NULL;
}

/* A matrix [rows, side side c] as disks have it where it is a convolution, as is its LoRA. */
static void sc__as_convolution(sc_tensor *x, int side) {
    x->ndim = 4;
    x->shape[1] /= side * side;
    x->shape[2] = x->shape[3] = side;
}

bool sc_dit_save(const sc_dit *f, const char *folder, sc_dtype dtype, const char *const *metadata) {
    sc_net *net = f->net;
    char path[SC__PATH];
    sc_named *named = (sc_named *)sc__alloc((size_t)net->count, sizeof *named);
    bool ok = named && sc_net_load(net), made = ok && !mkdir(folder, 0777);
    if (ok && !made && errno != EEXIST) ok = sc_fail("%s: %s", folder, strerror(errno));
    if (ok && !made && sc__weights_in(path, folder) && !fnmatch("*.json", path, 0))
        ok = sc_fail("%s: these shards would be read instead: write to another folder", path);
    for (int64_t i = 0; ok && i < net->count; i++) {
        named[i] = (sc_named){net->weights[i]->name, net->weights[i]->tensor, dtype};
        sc_tensor *x = &named[i].tensor;
        if (f->positions && x->data == f->x_embedder.weight->data) sc__as_convolution(x, 2);
        if (f->positions && x->data == f->positions->data)
            x->ndim = 3, x->shape[2] = x->shape[1], x->shape[1] = x->shape[0], x->shape[0] = 1;
    }
    sc__join(path, folder, "diffusion_pytorch_model.safetensors");
    ok = ok && sc__save(path, named, net->count, metadata, f) &&
         sc_write_file(sc__join(path, folder, "config.json"), f->config_text,
                       strlen(f->config_text));
    if (!ok && made) rmdir(folder); /* if it is empty */
    SC_FREE(named);
    return ok;
}

/* ==== LoRA files ========================================================== >>lorafiles =======
 *
 * We write PEFT's names, which diffusers reads. Others name layers as BFL does, where q, k and v
 * (and a single block's MLP) are one fused layer: its A serves all parts, its B is cut by rows.
 * A file that fits no layer is an error, since a model that ignores its LoRA looks healthy.
 */

/* What stands before a module's name in LoRA files, and behind it for A and B: PEFT and diffusers,
 * BFL and ComfyUI, kohya, OneTrainer, LyCORIS; diffusers of before PEFT, XLabs. B's bias ends in
 * "bias" in place of "weight". */
static const char *const sc__lora_prefixes[] = {"transformer.", "", "base_model.model.",
    "base_model.model.transformer.", "diffusion_model.", "model.diffusion_model.", "lora_unet_",
    "lora_transformer_", "lycoris_", NULL};
static const char *const sc__lora_ends[][2] = {
    {".lora_A.weight", ".lora_B.weight"}, {".lora_down.weight", ".lora_up.weight"},
    {".lora.down.weight", ".lora.up.weight"}, {".down.weight", ".up.weight"},
    {".lora_A.default.weight", ".lora_B.default.weight"}};
enum { SC__LORA_ENDS = (int)(sizeof sc__lora_ends / sizeof *sc__lora_ends) };

typedef struct sc__factors {    /* of one LoRA on one layer, on the host */
    int64_t rank, count;
    float *values;              /* A [rank, in], B [out, rank] with the file's own scale in it; */
    float *bias;                /* and perhaps B's bias [out], likewise, or NULL */
} sc__factors;

/* A LoRA file, and the config of PEFT that goes with it, or NULL: diffusers writes it into the
 * file's metadata, PEFT beside adapter_model.safetensors. */
typedef struct sc__lora {
    sc_file *file;
    sc_json *config;
    int blocks;                 /* double ones of the model */
} sc__lora;

static void sc__lora_close(sc__lora *l) {
    sc_json_free(l->config);
    sc_file_close(l->file);
}

/* diffusers puts the name of the model before each key. */
static const sc_json *sc__lora_setting(const sc__lora *l, const char *key) {
    char full[64];
    snprintf(full, sizeof full, "transformer.%s", key);
    const sc_json *value = sc_json_get(l->config, full);
    return value ? value : sc_json_get(l->config, key);
}

/* Whether a LoRA's config is one of W + B A, with W as the model has it. */
static bool sc__lora_plain(const sc__lora *l) {
    static const char *const changed[] = {"pissa*", "olora*", "corda*", "loftq*", NULL};
    const char *type = sc_json_string(sc__lora_setting(l, "peft_type"), "LORA");
    const char *start = sc_json_string(sc__lora_setting(l, "init_lora_weights"), "");
    if (strcmp(type, "LORA"))
        return sc_fail("%s: its config says %s, not LORA: only LoRA is read here", l->file->path,
                        type);
    return !sc__any(changed, start) ||
           sc_fail("%s: goes with weights that '%s' changed: save it again as a LoRA of the "
                   "model's own (path_initial_model_for_weight_conversion in PEFT)",
                   l->file->path, start);
}

static bool sc__lora_open(sc__lora *l, const sc_dit *f, const char *path) {
    *l = (sc__lora){.file = sc_file_open(path), .blocks = f->config.layers};
    if (!l->file) return false;
    const char *own = l->file->path, *text = sc_file_metadata(l->file, "lora_adapter_metadata");
    char beside[PATH_MAX] = ""; /* path of adapter_config.json */
    if (!text && !fnmatch("*adapter_model.safetensors", own, 0))
        snprintf(beside, sizeof beside, "%.*sconfig.json", (int)sc__stem(own, "model.safetensors"),
                 own);
    bool there = text || sc__exists(beside);
    if (text) l->config = sc_json_parse(text, strlen(text), own);
    else if (there) l->config = sc_json_load(beside);
    return (!there || l->config) && sc__lora_plain(l);
}

/* The config's alpha for a module; left alone where there is none. The first of PEFT's patterns
 * that fits counts: the end of a name from a dot on or, behind a ^, the whole of it. `names`: the
 * module's here and in the file. */
static bool sc__lora_config_alpha(const sc__lora *l, const char *const names[2], float *alpha) {
    const sc_json *patterns = sc__lora_setting(l, "alpha_pattern");
    bool found = false;
    const sc_json *usual = sc__lora_setting(l, "lora_alpha");
    if (usual) *alpha = (float)sc_json_number(usual, NAN);
    for (int64_t i = 0; !found && i < sc_json_length(patterns) && sc_json_key(patterns, i); i++) {
        const char *pattern = sc_json_key(patterns, i), *name = pattern + (*pattern == '^');
        size_t m = strlen(name);
        if (strpbrk(name, "*+?()[]{}|^$\\"))
            return sc_fail("%s: the alpha_pattern '%s' is a regular expression; only names are "
                            "read here", l->file->path, pattern);
        for (int k = 0; k < 2; k++) {
            const char *own = names[k];
            size_t n = strlen(own);
            found = found || (m <= n && !strcmp(own + n - m, name) &&
                              (m == n || (name == pattern && own[n - m - 1] == '.')));
        }
        if (found) *alpha = (float)sc_json_number(sc_json_value(patterns, i), NAN);
    }
    return isfinite(*alpha) || sc_fail("%s: alpha is no number", l->file->path);
}

/* What B A is multiplied by: alpha / rank, with rsLoRA alpha / sqrt(rank). alpha is a tensor
 * (kohya) or in the config; without either it is the rank. */
static bool sc__lora_own_scale(const sc__lora *l, const char *module, const char *a, size_t stem,
                               int64_t rank, float *scale) {
    static const char peft[] = "base_model.model.";
    char name[512];
    float alpha = (float)rank;
    snprintf(name, sizeof name, "%.*s", (int)stem, a);
    const char *own = name + (strncmp(name, peft, sizeof peft - 1) ? 0 : sizeof peft - 1);
    if (!sc__lora_config_alpha(l, (const char *[]){module, own}, &alpha)) return false;
    sc__entry *e = sc__find_beside(l->file, a, stem, ".alpha");
    if (e) e->used = true, alpha = NAN;
    if (e && sc_count(&e->tensor) == 1) sc_to_f32(&alpha, e->tensor.data, e->tensor.dtype, 1);
    const sc_json *set = sc__lora_setting(l, "use_rslora");
    bool root = sc_json_bool(set, false);
    *scale = alpha / (root ? sqrtf((float)rank) : (float)rank);
    if (set && !sc__json_is(set, SC__BOOL))
        return sc_fail("%s: use_rslora is neither true nor false", l->file->path);
    return isfinite(alpha) || sc_fail("%s: '%s' is not a number", l->file->path, e->name);
}

/* Appends a tensor's part for `module`, [rows, columns], times `scale`. */
static bool sc__lora_take(const sc__lora *l, sc__entry *e, const sc__slice *part,
                          const char *module, int64_t rows, int64_t columns, float scale,
                          sc__factors *f) {
    sc_tensor x = e->tensor, want = {.ndim = 2, .shape = {rows, columns}};
    char shape[96];
    e->used = true;
    if (!sc__take_rows(&x, part) || !sc__same_shape(&x, &want) || rows < 1 || x.dtype > SC_F64)
        return sc_fail("%s: '%s' of shape %s does not fit '%s', where it must be %lld x %lld: is "
                       "this LoRA for another model?", l->file->path, e->name,
                       sc__shape_text(&e->tensor, shape), module,
                       (long long)(part->whole ? rows * part->whole / part->parts : rows),
                       (long long)columns);
    int64_t n = rows * columns, from = part->swapped ? n / 2 : 0, i = 0; /* the second half first */
    float *values = (float *)SC_REALLOC(f->values, (size_t)(f->count + n) * sizeof *values);
    if (!values) return sc_fail("%s: out of memory", l->file->path);
    float *to = values + f->count;
    f->values = values;
    f->count += n;
    sc_to_f32(to, (char *)x.data + from * sc_dtype_size(x.dtype), x.dtype, n - from);
    sc_to_f32(to + n - from, x.data, x.dtype, from);
    while (i < n && isfinite(to[i])) to[i++] *= scale;
    return i == n || sc_fail("%s: '%s' holds NaN or infinity", l->file->path, e->name);
}

/* The length of the stem of a name that is an A (side 0) or a B (side 1) of any dialect, and its
 * partner's name; 0: it is none. */
static size_t sc__lora_side(const char *name, int side, char partner[512]) {
    size_t end = 0, stem = 0;
    while (end < SC__LORA_ENDS && !(stem = sc__stem(name, sc__lora_ends[end][side]))) end++;
    if (stem) snprintf(partner, 512, "%.*s%s", (int)stem, name, sc__lora_ends[end][!side]);
    return stem;
}

/* The factors of `module`, whose weight is w [out, in], if the file has any; x is empty before, its
 * values are yours in any case. */
static bool sc__lora_read(const sc__lora *l, const char *module, const sc_tensor *w,
                          sc__factors *x) {
    const sc_file *file = l->file;
    sc__slice part, whole = {0, 0, 0, false};
    sc__entry *a = NULL;
    char other[512];
    float scale;
    for (int i = 0; !a && i < SC__LORA_ENDS; i++)
        a = sc__find_as(file, sc__lora_prefixes, module, sc__lora_ends[i][0], l->blocks, &part);
    if (!a) return true;
    size_t stem = sc__lora_side(a->name, 0, other);
    sc__entry *b = sc__find_entry(file, other);
    if (!b) return sc_fail("%s: '%s' has no partner '%s'", file->path, a->name, other);
    sc__entry *c = sc__find_beside(file, other, sc__stem(other, "weight"), "bias");
    int64_t out = w->shape[0], in = w->shape[1], rank = x->rank = a->tensor.shape[0];
    bool ok = sc__lora_take(l, a, &whole, module, rank, in, 1, x) &&
              sc__lora_own_scale(l, module, a->name, stem, rank, &scale) &&
              sc__lora_take(l, b, &part, module, out, rank, scale, x) &&
              (!c || sc__lora_take(l, c, &part, module, out, 1, scale, x));
    if (ok && c) x->bias = x->values + rank * (in + out);
    return ok;
}

/* What changes one of the text encoders, which take no LoRA here. */
static const char *const sc__lora_of_text[] = {"lora_te*", "text_encoder*", "clip_l.*", "t5*",
    "bundle_emb*", "base_model.model.text_model*", "lycoris_text*", NULL};

/* Names what is not LoRA in a file. */
static bool sc__lora_refuse(const sc_file *file, const char *names) {
    static const char *const kinds[][2] = {{"lokr_", "LoKr"}, {"hada_", "LoHa"}, {"dora_", "DoRA"},
        {"magnitude", "DoRA"}, {"boft", "BOFT"}, {"oft_", "OFT"}, {".a1.", "GLoRA"},
        {".b1.", "GLoRA"}, {"vera_", "VeRA"}, {"ia3_", "IA3"}, {"hra_", "HRA"},
        {"lora_mid", "LoCon with a middle factor"}, {".diff", "differences of whole weights"},
        {"w_norm", "differences of whole weights"}, {".lora", "LoRA for something else"},
        {".weight", "whole weights"}};
    size_t i = 0, n = sizeof kinds / sizeof *kinds;
    while (i < n && !strstr(names, kinds[i][0])) i++;
    return sc_fail("%s: holds %s, which is not read here, only LoRA's pairs of A and B and "
                    "changes of biases and norms; not understood: %s", file->path,
                    i < n ? kinds[i][1] : "a kind of tensors", names);
}

/* Counts the adapters in the file by their A, and those that no layer took. Anything else that is
 * left over, but for the text encoders', would have changed the picture. */
static bool sc__lora_count(const sc_file *file, sc_lora_report *report) {
    char strange[256] = "", other[512];
    for (int64_t i = 0; i < file->count; i++) {
        const char *name = file->entries[i].name;
        bool adapter = sc__lora_side(name, 0, other), used = file->entries[i].used;
        bool b = !adapter && sc__lora_side(name, 1, other) && sc__find_entry(file, other);
        bool missed = !used && !b && !sc__stem(name, ".alpha");
        bool text = missed && sc__any(sc__lora_of_text, name);
        report->total += adapter || text;
        report->applied += adapter && used;
        if (text || (adapter && missed)) sc__list_name(report->missed, sizeof report->missed, name);
        else if (missed) sc__list_name(strange, sizeof strange, name);
    }
    return !*strange || sc__lora_refuse(file, strange);
}

/* x + scale (values - x), or x + scale values; what x was is kept for sc_lora_unload. */
static bool sc__lora_shift(sc_dit *f, const sc_tensor *x, const float *values, float scale,
                           bool instead) {
    int64_t i = 0, n = sc_count(x);
    while (&f->net->weights[i]->tensor != x) i++;
    sc_weight *w = f->net->weights[i];
    float *now = sc__merged_values(f, x);
    if (!w->before) w->before = sc__merged_values(f, x);
    bool ok = now && w->before;
    for (int64_t j = 0; ok && j < n; j++)
        now[j] = (instead ? (1 - scale) * now[j] : now[j]) + scale * values[j];
    if (ok) f->net->backend->upload(x->data, now, (size_t)n * 4);
    SC_FREE(now);
    return ok;
}

/* Biases and norms: a new value under the vector's own name (BFL's control LoRAs, PEFT's biases),
 * or a difference, .diff or a bias' .diff_b (ComfyUI). */
static bool sc__lora_vector(sc_dit *f, const sc__lora *l, const sc_weight *w, float scale,
                            sc_lora_report *report) {
    char stem[SC_MAX_NAME + 8];
    bool bias = sc__stem(w->name, ".bias") > 0, ok = true;
    int length = (int)sc__stem(w->name, bias ? ".bias" : ".weight");
    snprintf(stem, sizeof stem, "%.*s", length, w->name);
    const char *const forms[][2] = {
        {w->name, ""}, {w->name, ".diff"}, {stem, bias ? ".diff_b" : ".diff"}};
    for (int i = 0; ok && i < 3; i++) {
        sc__slice part;
        sc__entry *e = sc__find_as(l->file, sc__lora_prefixes, forms[i][0], forms[i][1], l->blocks,
                                   &part);
        if (!e) continue;
        sc__factors x = {0};
        ok = sc__lora_take(l, e, &part, w->name, sc_count(&w->tensor), 1, 1, &x) &&
             sc__lora_shift(f, &w->tensor, x.values, scale, i == 0);
        SC_FREE(x.values);
        report->applied++, report->total++;
    }
    return ok;
}

void sc_lora_unload(sc_dit *f) {
    for (int64_t i = 0; i < f->net->count; i++) {
        sc_weight *w = f->net->weights[i];
        size_t bytes = (size_t)sc_count(&w->tensor) * 4;
        if (w->before) f->net->backend->upload(w->tensor.data, w->before, bytes);
        SC_FREE(w->before);
        w->before = NULL;
    }
    for (int i = 0; i < f->module_count; i++)
        for (sc_adapter **link = &f->modules[i].layer->adapters; *link;) {
            sc_adapter *lora = *link;
            if (!lora->loaded) { link = &lora->next; continue; }
            *link = lora->next;
            f->net->backend->release(lora->a[SC_TEACHER].data); /* and B's, behind it */
            SC_FREE(lora);
        }
}

static bool sc__lora_add(const sc_backend *be, sc_linear_layer *layer, const sc__factors *x,
                         float scale) {
    int64_t out = layer->weight->shape[0], in = layer->weight->shape[1];
    size_t bytes = (size_t)(x->rank * (in + out)) * sizeof *x->values;
    sc_adapter *lora = (sc_adapter *)sc__alloc(1, sizeof *lora);
    float *a = lora ? (float *)be->alloc(bytes) : NULL;
    if (!a) return SC_FREE(lora), false;
    *lora = (sc_adapter){.rank = (int)x->rank, .scale = scale, .loaded = true};
    lora->a[SC_TEACHER] = sc__factor(a, x->rank, in);
    lora->b[SC_TEACHER] = sc__factor(a + x->rank * in, out, x->rank);
    be->upload(a, x->values, bytes);
    lora->next = layer->adapters;
    layer->adapters = lora;
    return true;
}

bool sc_lora_load(sc_dit *f, const char *path, float scale, sc_lora_report *report) {
    *report = (sc_lora_report){0};
    sc__lora file;
    bool ok = sc__lora_open(&file, f, path);
    for (int i = 0; ok && i < f->module_count; i++) {
        sc__factors x = {0};
        sc_linear_layer *layer = f->modules[i].layer;
        ok = sc__lora_read(&file, f->modules[i].name, layer->weight, &x) &&
             (!x.values || sc__lora_add(f->net->backend, layer, &x, scale)) &&
             (!x.bias || sc__lora_shift(f, layer->bias, x.bias, scale, false));
        SC_FREE(x.values);
    }
    for (int64_t i = 0; ok && i < f->net->count; i++)
        if (f->net->weights[i]->tensor.ndim == 1)
            ok = sc__lora_vector(f, &file, f->net->weights[i], scale, report);
    ok = ok && sc__lora_count(file.file, report);
    if (ok && !report->applied)
        ok = sc_fail("%s: 0 of %d LoRA layers fit this model: is it a LoRA for another one?", path,
                      report->total);
    sc__lora_close(&file);
    if (!ok) sc_lora_unload(f); /* no half of it, under the others */
    return ok;
}

/* ---- Writing: PEFT's names, or kohya's ---- */

/* A module's name in its authors' own files, and its rows there. */
static void sc__authors_name(const sc_dit *f, const char *module, char other[256],
                             sc__slice *rows) {
    for (int i = 1; i < SC__ALIASES; i++)
        if (sc__aliases[i].kind == f->config.kind &&
            sc__translate(&sc__aliases[i], module, f->config.layers, other, rows)) return;
    snprintf(other, 256, "%s", module); /* the same */
}

/* Modules [first, first + count) are the parts of one layer of BFL's, or one module. As a file has
 * it: the adapters of all parts (p's or, p NULL, the loaded ones), one below the other in A, and B
 * with each part's factors, times their scale, in its own rows and columns; no data without any. */
static bool sc__fuse(const sc_dit *f, const sc_params *p, sc_set set, int first, int count,
                     bool swapped, sc_tensor *a_of, sc_tensor *b_of) {
    int64_t rank = 0, rows = 0, r = 0, in = f->modules[first].layer->weight->shape[1];
    for (int i = first; i < first + count; i++) {
        rows += f->modules[i].layer->weight->shape[0];
        for (const sc_adapter *l = f->modules[i].layer->adapters; l; l = l->next)
            if (p ? l == &p->adapters[i] : l->loaded) rank += l->rank;
    }
    *a_of = sc__factor(NULL, rank, in);
    *b_of = sc__factor(NULL, rows, rank);
    if (!rank) return true;
    float *a = (float *)sc__alloc((size_t)(rank * in), sizeof *a), *b, *own;
    a_of->data = a;
    b_of->data = b = (float *)sc__alloc((size_t)(rows * rank), sizeof *b);
    bool ok = a && b;
    int64_t row = swapped ? rows / 2 : 0; /* of B: of a part's first */
    for (int i = first; i < first + count; i++) {
        int64_t height = f->modules[i].layer->weight->shape[0];
        for (const sc_adapter *l = f->modules[i].layer->adapters; ok && l; l = l->next) {
            if (p ? l != &p->adapters[i] : !l->loaded) continue;
            ok = (own = sc__lora_values(f->net->backend, l, set)) != NULL;
            if (ok) memcpy(a + r * in, own, (size_t)(l->rank * in) * 4);
            for (int64_t j = 0; ok && j < height * l->rank; j++)
                b[(row + j / l->rank) % rows * rank + r + j % l->rank] =
                    l->scale * own[l->rank * in + j];
            SC_FREE(own);
            r += l->rank;
        }
        row += height;
    }
    return ok;
}

/* No alpha: it is then the rank, so the scale is 1; diffusers refuses some layers' alphas. */
static bool sc__lora_write(const sc_dit *f, const sc_params *p, sc_set set, const char *path,
                           const char *const *metadata) {
    int n = f->module_count, written = 0, count;
    sc_named *named = (sc_named *)sc__alloc((size_t)n * 2, sizeof *named);
    char(*names)[320] = (char(*)[320])sc__alloc((size_t)n * 2, sizeof *names);
    bool ok = named && names;
    for (int i = 0; ok && i < n; i += count) {
        char other[256], next[256];
        sc__slice rows = {0, 0, 0, false}, next_rows;
        snprintf(other, sizeof other, "%s", f->modules[i].name);
        if (!p) sc__authors_name(f, f->modules[i].name, other, &rows);
        for (count = 1; !p && i + count < n; count++) {
            sc__authors_name(f, f->modules[i + count].name, next, &next_rows);
            if (strcmp(other, next)) break;
        }
        sc_named *to = &named[written];
        ok = sc__fuse(f, p, set, i, count, rows.swapped, &to[0].tensor, &to[1].tensor);
        if (!ok || !to->tensor.data) continue;
        for (int k = 0; k < 2 && f->positions && f->modules[i].layer == &f->x_embedder; k++)
            sc__as_convolution(&to[k].tensor, 2 - k);
        for (char *c = other; !p && *c; c++) *c = *c == '.' ? '_' : *c;
        for (int k = 0; k < 2; k++, written++) {
            snprintf(names[written], sizeof *names, "%s%s%s", p ? "transformer." : "lora_unet_",
                     other, sc__lora_ends[p ? 0 : 1][k]);
            to[k].name = names[written], to[k].dtype = SC_BF16;
        }
    }
    if (ok && !written) ok = sc_fail("%s: there is no LoRA to write", path);
    ok = ok && sc_file_save(path, named, written, metadata);
    for (int i = 0; named && i < 2 * n; i++) SC_FREE(named[i].tensor.data);
    SC_FREE(named);
    SC_FREE(names);
    return ok;
}

bool sc_lora_save(const sc_params *p, sc_set set, const char *path, const char *const *metadata) {
    if (!p->set[set]) return sc_fail("%s: the teacher of a LoRA has none", path);
    return sc__lora_write(p->dit, p, set, path, metadata);
}

bool sc_lora_save_kohya(const sc_dit *f, const char *path, const char *const *metadata) {
    for (int64_t i = 0; i < f->net->count; i++)
        if (f->net->weights[i]->before)
            return sc_fail("'%s' is changed, which kohya's names cannot say: merge into a model",
                           f->net->weights[i]->name);
    return sc__lora_write(f, NULL, SC_TEACHER, path, metadata);
}

/* Numbers are written as in JSON. Of a wrong list, what stands before the wrong place counts. */
bool sc_scale_for(const char *table, int steps, double *scale, double *guidance) {
    sc__json_parser p = {.name = table, .at = (char *)table};
    double count, value, guided, nearest = INFINITY;
    while (sc__json_peek(&p)) {
        guided = NAN;
        if (!sc__json_number(&p, &count) || !sc__json_take(&p, ':') || !sc__json_peek(&p) ||
            !sc__json_number(&p, &value) ||
            (sc__json_take(&p, '@') && (!sc__json_peek(&p) || !sc__json_number(&p, &guided))))
            return false;
        if (fabs(count - steps) < nearest)
            nearest = fabs(count - steps), *scale = value, *guidance = guided;
        sc__json_take(&p, ','); /* or a space */
    }
    return nearest < INFINITY;
}

bool sc_lora_start(sc_params *p, const char *path, float scale) {
    sc__lora file;
    bool ok = sc__lora_open(&file, p->dit, path);
    for (int i = 0; ok && i < p->dit->module_count; i++) {
        const sc__module *m = &p->dit->modules[i];
        const sc_tensor *w = m->layer->weight;
        sc__factors x = {0};
        ok = sc__lora_read(&file, m->name, w, &x);
        if (ok && !x.values != m->untrained)
            ok = sc_fail(m->untrained ? "%s: has factors for '%s', which are not trained here"
                                      : "%s: no factors for '%s'", path, m->name);
        if (ok && x.bias)
            ok = sc_fail("%s: changes the bias of '%s'; only A and B are trained", path, m->name);
        if (ok && !m->untrained && x.rank != p->rank)
            ok = sc_fail("%s: rank %lld; this run has rank %d", path, (long long)x.rank, p->rank);
        for (int64_t j = p->rank * w->shape[1]; ok && j < x.count; j++) /* B */
            x.values[j] *= scale / p->adapters[i].scale;
        for (int s = SC_STUDENT; ok && !m->untrained && s < SC_SETS; s++)
            p->backend->upload(p->adapters[i].a[s].data, x.values, (size_t)x.count * 4);
        SC_FREE(x.values);
    }
    ok = ok && sc__lora_count(file.file, &(sc_lora_report){0});
    sc__lora_close(&file);
    return ok;
}

/* ==== A run's state =========================================================== >>state =======
 *
 * The arrays of trained numbers by name, the teacher's only where it is a copy of all weights.
 */
static int sc__state_arrays(const sc_params *p, sc_named named[6]) {
    static const char *const names[] = {"student", "fast", "slow", "m", "v", "teacher"};
    float *arrays[] = {p->set[SC_STUDENT], p->set[SC_FAST], p->set[SC_SLOW], p->m, p->v,
                       p->set[SC_TEACHER]};
    int n = p->set[SC_TEACHER] ? 6 : 5;
    for (int i = 0; i < n; i++)
        named[i] = (sc_named){names[i], {arrays[i], .ndim = 1, .shape = {p->count}}, SC_F32};
    return n;
}

bool sc_params_save(const sc_params *p, const char *path, const char *const *metadata) {
    sc_named named[6];
    return sc__save(path, named, sc__state_arrays(p, named), metadata, p->dit);
}

bool sc_params_load(sc_params *p, const sc_file *file) {
    sc_named named[6];
    int n = sc__state_arrays(p, named);
    for (int i = 0; i < n; i++) {
        const sc_tensor *x = sc_file_find(file, named[i].name);
        if (!x || x->dtype != SC_F32 || sc_count(x) != p->count)
            return sc_fail("%s: '%s' does not fit: resume with the model, rank and mode the run "
                            "had", file->path, named[i].name);
        p->backend->upload(named[i].tensor.data, x->data, (size_t)p->count * 4);
    }
    return true;
}

/* ==== The parts of a model, wherever they are ================================= >>parts =======
 *
 * A part is a folder of diffusers' layout, or any file with a weight that no other part has, the
 * probe, under any prefix. Names of files mean nothing; `file` is for messages on what is missing.
 */
static const struct { const char *folder, *probe, *file; } sc__parts[SC_PARTS] = {
    {"transformer", "context_embedder.weight", "flux1-dev.safetensors"},
    {"vae", "decoder.conv_in.weight", "ae.safetensors"},
    {"text_encoder", "text_model.embeddings.token_embedding.weight", "clip_l.safetensors"},
    {"text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight", "t5xxl_fp16.safetensors"},
    {"text_encoder_2", "text_model.encoder.layers.12.layer_norm1.weight", "clip_g.safetensors"},
    {"text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q.weight", "t5xxl_fp16.safetensors"}};

char *sc_model_folder(const char *model) {
    char folder[SC__PATH];
    return sc__strdup(sc__model_folder(folder, model));
}

int sc_part_in_file(const char *path, sc_part part) {
    sc__slice rows;
    if (!sc__is_file(path)) return 0;
    sc_file *file = sc_file_open(path);
    if (!file) return -1;
    const char *deep = sc__parts[SC_SD3_CLIP_G].probe; /* CLIP-L has 12 layers only */
    const char *const *prefixes = part == SC_SD3_CLIP_G ? sc__clip_g_prefixes : sc__weight_prefixes;
    bool has = sc__find_as(file, prefixes, sc__parts[part].probe, "", 1, &rows) &&
               (part != SC_CLIP || !sc__find_as(file, prefixes, deep, "", 1, &rows));
    sc_file_close(file);
    return has;
}

/* The only file in `folder` that has this part. Where none has it, one that cannot be read, as if
 * its download had stopped, may be what is missing. */
static bool sc__part_file(char found[SC__PATH], const char *folder, sc_part part) {
    const char *kind = sc__parts[part].folder;
    char path[SC__PATH], second[SC__PATH] = "", broken[sizeof sc__message] = "";
    DIR *list = opendir(folder);
    if (!list) return sc_fail("%s: %s", folder, strerror(errno));
    *found = 0;
    for (struct dirent *entry; !*second && (entry = readdir(list));) {
        bool named = *entry->d_name != '.' && (!fnmatch("*.safetensors", entry->d_name, 0) ||
                                               !fnmatch("*.sft", entry->d_name, 0));
        int has = named ? sc_part_in_file(sc__join(path, folder, entry->d_name), part) : 0;
        if (has < 0) snprintf(broken, sizeof broken, "%s", sc_error());
        if (has > 0) strcpy(*found ? second : found, path);
    }
    closedir(list);
    if (*second)
        return sc_fail("%s and %s both hold a %s: leave one of them in this folder", found, second,
                       kind);
    if (*found) return true;
    if (*broken) return sc_fail("%s (and no other file there holds a %s)", broken, kind);
    return sc_fail("%s: no %s here: neither a folder of that name with weights nor a file such as "
                   "%s", folder, kind, sc__parts[part].file);
}

static bool sc__part_path(char path[SC__PATH], const char *model, sc_part part) {
    char base[SC__PATH], folder[SC__PATH];
    if (!sc__exists(model)) return sc_fail("%s: No such file or directory", model);
    int has = sc_part_in_file(model, part);
    snprintf(path, SC__PATH, "%s", model);
    if (has) return has > 0;
    sc__join(folder, sc__model_folder(base, model), sc__parts[part].folder);
    bool there = sc__exists(folder);
    if (there && sc__weights_in(path, folder)) return strcpy(path, folder), true;
    if (!there && sc__weights_in(path, base) && !fnmatch("*.json", path, 0) &&
        sc_part_in_file(path, part) > 0) return true; /* of shards, the whole */
    if (sc__part_file(path, base, part)) return true;
    return there && sc__weights_in(path, folder); /* says what is wrong */
}

char *sc_part_path(const char *model, sc_part part) {
    char path[SC__PATH];
    return sc__part_path(path, model, part) ? sc__strdup(path) : NULL;
}

/* Weights of up to 512 MiB that a CPU will use: worth widening to f32 once, since then no product
 * has to. */
static bool sc__small_file(const sc_backend *backend, const char *path) {
    sc_file *file = backend && backend->on_host ? sc_file_open(path) : NULL;
    bool small = file && !file->index && file->parts[0].size <= (size_t)512 << 20;
    sc_file_close(file);
    return small;
}

/* ==== VAE ======================================================================= >>vae =======
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

typedef enum { SC__CONV, SC__DOWN, SC__UP, SC__OUT, SC__RESNET, SC__ATTENTION } sc__vae_kind;

typedef struct sc__vae_step {
    sc__vae_kind kind;
    int64_t in, out;                /* channels */
    int64_t in_side, out_side;      /* of a latent pixel's square: 1 to f */
    sc_linear_layer conv1, norm1;   /* all but an attention have conv1; OUT is norm, SiLU, conv */
    sc_linear_layer norm2, conv2;   /* of a residual block */
    sc_linear_layer shortcut;       /* 1x1, where a residual block changes the channels */
    sc_linear_layer linear[4];      /* of an attention, [C, C]: q, k, v, and out */
} sc__vae_step;

typedef struct sc__vae_half {       /* the encoder or the decoder */
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

const sc_net *sc_vae_net(const sc_vae *v) { return v ? v->net : NULL; }
const sc_vae_config *sc_vae_config_of(const sc_vae *v) { return &v->config; }
int sc_vae_factor(const sc_vae *v) { return 1 << (v->config.levels - 1); }

/* ---- Opening ---- */

/* Without a config.json by the shapes of net's weights. */
static bool sc__vae_read_config(sc_vae_config *c, const sc_net *net, sc__config *from) {
    static const char first_convs[] = "encoder.down_blocks.%d.resnets.0.conv1.weight";
    const sc_json *json = from->json, *channels = sc_json_get(json, "block_out_channels");
    const char *path = from->path;
    int layers = sc__count_layers(net, "encoder.down_blocks.0.resnets.%d.conv1.weight", 1);
    if (!sc__config_is(from, "_class_name", "AutoencoderKL") ||
        !sc__config_is(from, "act_fn", "silu") ||
        !sc__config_is(from, "down_block_types", "DownEncoderBlock2D") ||
        !sc__config_is(from, "up_block_types", "UpDecoderBlock2D")) return false;
    int pixels_in = sc__config_int(from, 1, "in_channels", 3);
    int pixels_out = sc__config_int(from, 1, "out_channels", 3);
    int latents = sc__side(net, "decoder.conv_in.weight", 1, 4);
    c->latent_channels = sc__config_int(from, 1, "latent_channels", latents);
    c->layers = sc__config_int(from, 1, "layers_per_block", layers);
    c->resolution = sc__config_int(from, 1, "sample_size", 1024);
    c->groups = sc__config_int(from, 1, "norm_num_groups", 32);
    if (from->wrong) return false;
    if (pixels_in != 3 || pixels_out != 3)
        return sc_fail("%s: pictures must have 3 channels", path);
    int64_t levels = json ? sc_json_length(channels) : sc__count_layers(net, first_convs, 0);
    if (levels < 1 || levels > SC_VAE_LEVELS)
        return sc_fail("%s: block_out_channels must list 1 to %d levels", path, SC_VAE_LEVELS);
    if (c->layers >= SC_VAE_LAYERS || c->latent_channels > 1024)
        return sc_fail("%s: layers_per_block may be up to %d, latent_channels up to 1024", path,
                        SC_VAE_LAYERS - 1);
    c->levels = (int)levels;
    for (int i = 0; i < c->levels; i++) {
        char name[SC_MAX_NAME];
        snprintf(name, sizeof name, first_convs, i);
        double n = json ? sc_json_number(sc_json_at(channels, i), 0) : sc__side(net, name, 0, 0);
        if (!(n >= 1 && n <= 16384 && n == floor(n)) || (int)n % c->groups)
            return sc_fail("%s: block_out_channels must be multiples of norm_num_groups (%d)",
                            path, c->groups);
        c->channels[i] = (int)n;
    }
    bool quant = json || sc__side(net, "quant_conv.weight", 0, 0);
    bool post_quant = json || sc__side(net, "post_quant_conv.weight", 0, 0);
    c->attention = sc__config_number(from, "mid_block_add_attention", true) != 0;
    c->quant = sc__config_number(from, "use_quant_conv", quant) != 0;
    c->post_quant = sc__config_number(from, "use_post_quant_conv", post_quant) != 0;
    c->scale = (float)sc__config_number(from, "scaling_factor", json ? 0.18215 : 0.3611);
    c->shift = (float)sc__config_number(from, "shift_factor", json ? 0 : 0.1159);
    c->assumed = !json;
    if (from->wrong) return false;
    return (c->scale > 0 && isfinite(c->scale) && isfinite(c->shift)) ||
           sc_fail("%s: scaling_factor must be positive", path);
}

/* Adds a step, whose weights are at the path. */
static bool sc__vae_add(sc_vae *v, sc__vae_half *h, sc__vae_kind kind, int64_t in, int64_t out,
                        int64_t kernel, const char *format, ...) {
    sc__vae_step *s = &h->steps[h->count++];
    int64_t side = h->count > 1 ? s[-1].out_side : s->in_side;
    int64_t out_side = kind == SC__UP ? 2 * side : kind == SC__DOWN ? side / 2 : side;
    bool resnet = kind == SC__RESNET, attention = kind == SC__ATTENTION;
    const char *conv = resnet ? ".conv1" : kind == SC__OUT ? "_out" : "";
    const char *norm = resnet ? ".norm1" : attention ? ".group_norm" : "_norm_out";
    char path[SC_MAX_NAME];
    va_list args;
    va_start(args, format);
    vsnprintf(path, sizeof path, format, args);
    va_end(args);
    *s = (sc__vae_step){.kind = kind, .in = in, .out = out, .in_side = side, .out_side = out_side};
    const struct {
        bool there; sc_linear_layer *layer; const char *name; int ndim; int64_t shape[4];
    } of[] = {{attention, &s->linear[0], ".to_q", 2, {out, in}},
              {attention, &s->linear[1], ".to_k", 2, {out, in}},
              {attention, &s->linear[2], ".to_v", 2, {out, in}},
              {attention, &s->linear[3], ".to_out.0", 2, {out, in}},
              {!attention, &s->conv1, conv, 4, {out, in, kernel, kernel}},
              {resnet || attention || kind == SC__OUT, &s->norm1, norm, 1, {in}},
              {resnet, &s->norm2, ".norm2", 1, {out}},
              {resnet, &s->conv2, ".conv2", 4, {out, out, 3, 3}},
              {resnet && in != out, &s->shortcut, ".conv_shortcut", 4, {out, in, 1, 1}}};
    for (size_t i = 0; i < sizeof of / sizeof *of; i++)
        if (of[i].there && !sc__net_layer(v->net, of[i].layer, path, of[i].name, of[i].ndim,
                                          of[i].shape, true)) return false;
    return true;
}

static bool sc__vae_middle(sc_vae *v, sc__vae_half *h, const char *half) {
    int64_t c = v->config.channels[v->config.levels - 1];
    return sc__vae_add(v, h, SC__RESNET, c, c, 3, "%s.mid_block.resnets.0", half) &&
           (!v->config.attention ||
            sc__vae_add(v, h, SC__ATTENTION, c, c, 0, "%s.mid_block.attentions.0", half)) &&
           sc__vae_add(v, h, SC__RESNET, c, c, 3, "%s.mid_block.resnets.1", half);
}

static bool sc__vae_steps(sc_vae *v, sc__vae_half *h, bool encoder) {
    const sc_vae_config *c = &v->config;
    const char *half = encoder ? "encoder" : "decoder", *way = encoder ? "down" : "up";
    int64_t latents = c->latent_channels * (encoder ? 2 : 1);
    int64_t width = c->channels[encoder ? 0 : c->levels - 1];
    h->steps[0].in_side = encoder ? sc_vae_factor(v) : 1;
    bool ok = (encoder || !c->post_quant ||
               sc__vae_add(v, h, SC__CONV, latents, latents, 1, "post_quant_conv")) &&
              sc__vae_add(v, h, SC__CONV, encoder ? 3 : latents, width, 3, "%s.conv_in", half) &&
              (encoder || sc__vae_middle(v, h, half));
    for (int i = 0; ok && i < c->levels; i++) {
        int64_t out = c->channels[encoder ? i : c->levels - 1 - i];
        for (int j = 0; ok && j < c->layers + !encoder; j++, width = out)
            ok = sc__vae_add(v, h, SC__RESNET, width, out, 3, "%s.%s_blocks.%d.resnets.%d", half,
                             way, i, j);
        if (ok && i + 1 < c->levels)
            ok = sc__vae_add(v, h, encoder ? SC__DOWN : SC__UP, out, out, 3,
                             "%s.%s_blocks.%d.%ssamplers.0.conv", half, way, i, way);
    }
    return ok && (!encoder || sc__vae_middle(v, h, half)) &&
           sc__vae_add(v, h, SC__OUT, width, encoder ? latents : 3, 3, "%s.conv", half) &&
           (!encoder || !c->quant ||
            sc__vae_add(v, h, SC__CONV, latents, latents, 1, "quant_conv"));
}

sc_vae *sc_vae_open(const sc_backend *backend, const char *path, bool widen) {
    sc__config c = {0};
    sc_vae *v = (sc_vae *)sc__alloc(1, sizeof *v);
    bool ok = v && sc__read_config(&c, path) &&
              (!c.json || sc__vae_read_config(&v->config, &(sc_net){0}, &c)) &&
              (v->net = sc_net_open(backend, path, widen)) &&
              (c.json || sc__vae_read_config(&v->config, v->net, &c));
    sc_json_free(c.json);
    if (ok) v->net->levels = v->config.levels;
    for (int i = 0; ok && backend && i < 5; i++) ok = (v->tapes[i] = sc_tape_new(backend)) != NULL;
    ok = ok && sc__vae_steps(v, &v->encoder, true) && sc__vae_steps(v, &v->decoder, false) &&
         sc__net_complete(v->net) && sc_net_load(v->net);
    if (ok) return v;
    return sc_vae_close(v), NULL;
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
    r.side = sc__min(s->in_side, last->out_side);
    r.height = h * r.side;
    r.kept = unit * (size_t)(s->in * s->in_side * s->in_side +
                             last->out * last->out_side * last->out_side);
    int64_t largest = 0, wrong = 0; /* in units; rows after each step */
    for (int i = 0; i < count; i++) {
        sc__vae_kind kind = s[i].kind;
        int64_t side = sc__max(s[i].in_side, s[i].out_side);
        int64_t n = sc__max(s[i].in, s[i].out) * side * side;
        if (kind == SC__ATTENTION && count > 1) n *= 5; /* sc__vae_do knows better if alone */
        largest = sc__max(largest, n);
        r.norms += kind == SC__RESNET ? 2 : kind == SC__OUT || kind == SC__ATTENTION;
        if (kind == SC__UP) wrong *= 2;
        wrong += kind == SC__RESNET ? 2 : 1;
        if (kind == SC__DOWN) wrong = (wrong + 1) / 2;
    }
    r.strip = unit * (size_t)largest;
    size_t row = r.strip / (size_t)r.height, left = memory > r.kept ? (memory - r.kept) / 3 : 0;
    r.whole = r.strip <= left || (count == 1 && s->kind == SC__ATTENTION);
    r.halo = sc__ceil_div(wrong * r.side, last->out_side);
    r.rows = sc__max(r.halo, r.whole ? r.height : (int64_t)(left / row) - 2 * r.halo);
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
                               const sc_linear_layer *a, bool silu) {
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
static sc_tensor *sc__vae_same(sc_tape *t, const sc_tensor *x, const sc_linear_layer *a) {
    return sc_conv2d(t, x, a->weight, a->bias, 1, (int)a->weight->shape[2] / 2);
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
    return h ? sc__copy(t, h, x, h->shape[0] * h->shape[1], 0, true) : NULL; /* x += h */
}

/* x + attention(norm(x)), every pixel a token, one head. */
static sc_tensor *sc__vae_attention_forward(sc_vae *v, sc__vae_run *r, sc_tensor *x,
                                            const sc__vae_step *s) {
    sc_tape *t = v->tapes[!v->turn], *once = v->tapes[2];
    const int64_t *size = x->shape, shape[3] = {size[0], size[1], size[2] * size[3]};
    float scale = 1.f / sqrtf((float)shape[1]);
    sc_tensor *n = sc__vae_norm(v, r, once, x, &s->norm1, false);
    n = sc_swap_axes(t, sc_reshape(once, n, 3, shape));
    sc_tensor *q = sc_linear(t, n, &s->linear[0]), *k = sc_linear(t, n, &s->linear[1]);
    n = sc_linear(t, n, &s->linear[2]);
    sc_tape_reset(once);
    n = sc_linear(t, sc_attention(once, q, k, n, 1, scale, NULL, false), &s->linear[3]);
    sc_tape_reset(once);
    n = sc_swap_axes(once, n);
    return n ? sc__copy(t, n, x, shape[0] * shape[1], 0, true) : NULL; /* x += n */
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
    int64_t w = x->shape[3], size = w * sc_dtype_size(x->dtype);
    char *to = (char *)y->data + at * size, *from = (char *)x->data + first * size;
    v->net->backend->copy_block(to, y->shape[2] * w, from, x->shape[2] * w,
                                x->shape[0] * x->shape[1], rows * w, x->dtype, false);
}

/* One strip of this sweep: from the input to a norm's sums, or to its rows of the result. */
static bool sc__vae_strip(sc_vae *v, sc__vae_run *r, const sc_tensor *input, sc_tensor *result) {
    int64_t above = sc__min(r->halo, r->own[0]);
    r->cut[0] = r->own[0] - above;
    r->cut[1] = sc__min(r->own[1] + r->halo, r->height);
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

/* The result of a run on x, which is on tape 3 or 4; it is on the other of these. */
static sc_tensor *sc__vae_do(sc_vae *v, sc__vae_run *r, const sc_tensor *x, int from) {
    const size_t room = 4096, groups = (size_t)(x->shape[0] * v->config.groups);
    const sc__vae_step *last = r->steps + r->count - 1;
    const int64_t shape[] = {x->shape[0], last->out, r->height / r->side * last->out_side,
                             x->shape[3] / r->steps->in_side * last->out_side};
    size_t sums = 2 * groups * (size_t)r->norms * sizeof *r->sums, held = 0;
    size_t result = (size_t)(shape[0] * shape[1] * shape[2] * shape[3] * sc_dtype_size(x->dtype));
    for (int i = 0; i < 5; i++)
        if (i != from) sc_tape_reserve(v->tapes[i], 0);
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
            r->own[1] = sc__min(r->own[0] + r->rows, r->height);
            if (!sc__vae_strip(v, r, x, y)) return NULL;
        }
    return y;
}

/* in: pictures or latents, out: mean and logvar of latents [B,2C,h,w] or pictures. */
static bool sc__vae_apply(sc_vae *v, const sc__vae_half *half, int64_t batch, int64_t h, int64_t w,
                          const float *in, float *out, size_t memory) {
    if (h < 1 || w < 1) return sc_fail("VAE: %lld x %lld latents", (long long)w, (long long)h);
    const size_t room = 4096, slack = 1 << 16; /* for sums, and to round up */
    const sc__vae_step *s = half->steps, *last = s + half->count - 1;
    int64_t f = sc_vae_factor(v), count = 65536 / (h * w * f * f); /* small pictures: several */
    int64_t in_size = s->in * s->in_side * s->in_side * h * w,
            out_size = last->out * last->out_side * last->out_side * h * w;
    bool ok = true;
    memory = !memory ? SIZE_MAX : memory > slack ? memory - slack : 0;
    for (int64_t first = 0; ok && first < batch; first += count) {
        count = sc__max(1, sc__min(count, batch - first));
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
        for (int i = 0; i < 5; i++) sc_tape_reserve(v->tapes[i], 0);
    }
    return ok;
}

bool sc_vae_encode(sc_vae *v, int64_t batch, int64_t height, int64_t width, const float *pictures,
                   float *posterior, size_t memory) {
    int64_t f = sc_vae_factor(v), h = height / f, w = width / f;
    int64_t n = v->config.latent_channels * h * w;
    if (height < f || width < f || height % f || width % f)
        return sc_fail("VAE: sides of a picture must be multiples of %lld, not %lld x %lld",
                        (long long)f, (long long)width, (long long)height);
    if (!sc__vae_apply(v, &v->encoder, batch, h, w, pictures, posterior, memory)) return false;
    for (int64_t i = 0; i < batch * n; i++) {
        float *logvar = posterior + (i / n * 2 + 1) * n + i % n;
        *logvar = *logvar < -30 ? -30 : *logvar > 20 ? 20 : *logvar;
    }
    return true;
}

bool sc_vae_decode(sc_vae *v, int64_t batch, int64_t h, int64_t w, const float *latents,
                   float *pictures, size_t memory) {
    return sc__vae_apply(v, &v->decoder, batch, h, w, latents, pictures, memory);
}

/* ---- Latents ---- */

/* In place: mean becomes (mean - shift) * scale, logvar its std deviation * scale. */
static void sc__vae_normalise(const sc_vae *v, int64_t n, float *mean, float *logvar) {
    float scale = v->config.scale, shift = v->config.shift;
    for (int64_t i = 0; i < n; i++) {
        mean[i] = (mean[i] - shift) * scale;
        logvar[i] = expf(0.5f * logvar[i]) * scale;
    }
}

static void sc__vae_unnormalise(const sc_vae *v, int64_t n, float *latents) {
    for (int64_t i = 0; i < n; i++) latents[i] = latents[i] / v->config.scale + v->config.shift;
}

/* Latents [B,C,h,w], h and w even <-> FLUX's tokens [B, h/2 * w/2, 4C], 2x2 squares, channel by
 * channel: tokens[b, i/2, j/2, (c, i%2, j%2)] (diffusers: FluxPipeline._pack_latents). */
static void sc__pack(int64_t batch, int64_t channels, int64_t h, int64_t w, float *tokens,
                     float *latents, bool pack) {
    for (int64_t at = 0; at < batch * channels * h * w; at++) {
        int64_t plane = at / (h * w), i = at / w % h, j = at % w;
        int64_t token = (plane / channels * (h / 2) + i / 2) * (w / 2) + j / 2;
        float *packed = tokens + (token * channels + plane % channels) * 4 + i % 2 * 2 + j % 2;
        if (pack) *packed = latents[at];
        else latents[at] = *packed;
    }
}

/* ==== Unicode =============================================================== >>unicode =======
 *
 * What the tokenizers ask of characters: which are letters or numbers, their lower case, canonical
 * composition (NFC) and graphemes (what a reader takes for one character). The tables (>>part4)
 * were read off the library whose token ids ours have to equal, and packed by arithmetic coding.
 */

/* ---- Text as code points ---- */

/* Code points; running out of memory is noticed once, at the end. */
typedef struct sc__codes { uint32_t *code; size_t count; bool failed; } sc__codes;

static void sc__codes_add(sc__codes *s, uint32_t c) {
    s->failed = s->failed || !sc__grow(&s->code, (int64_t)s->count, sizeof c);
    if (!s->failed) s->code[s->count++] = c;
}

static void sc__codes_add_text(sc__codes *codes, const char *text) {
    while (*text) sc__codes_add(codes, sc__utf8_decode(&text));
}

static bool sc__is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

/* ---- What the tables know of them ---- */

enum { SC__LETTER = 1, SC__DIGIT = 2, SC__EXTEND = 4, SC__SPACING = 8, SC__CONTROL = 16,
       SC__PREPEND = 32, SC__PICTURE = 64, SC__CONSONANT = 128, SC__LINKER = 256 };

/* Of Hangul: the first syllable; how many initial jamo, vowels, final ones, of which one none */
enum { SC__HANGUL = 0xac00, SC__SYLLABLES = 19 * 21 * 28, SC__CODES = 0x110000 };

typedef struct sc__pair {
    uint32_t whole, first, second; /* second 0: one for another */
    int next;                   /* pair with the same first, if NFC composes this one again; or 0 */
} sc__pair;

enum { SC__KIND, SC__CLASS, SC__LOWER }; /* flags; combining class; how far lower case is away */

typedef struct sc__unicode {
    int32_t facts[4096][3];     /* these of a run of code points, */
    uint16_t run[SC__CODES];    /* which is the number of the one that a code point is in */
    uint16_t split[SC__CODES];  /* the number of its decomposition among pairs; 0: none */
    uint16_t joined[SC__CODES]; /* the first of the pairs that begin with it and compose; 0: none */
    sc__pair pairs[SC__SYLLABLES + 4096]; /* from 1 on */
    int count;
} sc__unicode;

static const int32_t *sc__facts(const sc__unicode *u, uint32_t c) { return u->facts[u->run[c]]; }
static int sc__class(const sc__unicode *u, uint32_t c) { return sc__facts(u, c)[SC__CLASS]; }
static int sc__word_kind(const sc__unicode *u, uint32_t c) {
    return sc__facts(u, c)[SC__KIND] & (SC__LETTER | SC__DIGIT);
}

/* ---- Unpacking ---- */

/* The text is the digits, of base 92, of a fraction. Each bit divides the range that it is known to
 * lie in, as often as 0 and 1 were seen in the bit's context: which part it is in is the bit. */
typedef struct sc__packed {
    const char *text;
    uint32_t code, range;       /* the fraction above the range's beginning */
    unsigned char seen[1 << 18][2];
} sc__packed;

static bool sc__unpack_bit(sc__packed *p, uint32_t context) {
    unsigned char *seen = p->seen[context * 0x9e3779b1u >> 14];
    for (; p->range < 1 << 25; p->text++) { /* printed from ' ' on without '"', '?' and '\' */
        char c = *p->text;
        p->range *= 92;
        p->code = p->code * 92 + (uint32_t)(c - ' ' - (c > '"') - (c > '?') - (c > '\\'));
    }
    uint32_t zeros = p->range / (2u * (seen[0] + seen[1]) + 2) * (2u * seen[0] + 1);
    bool bit = p->code >= zeros;
    p->code -= bit ? zeros : 0;
    p->range = bit ? p->range - zeros : zeros;
    if (++seen[bit] == 24) {
        seen[0] /= 2;
        seen[1] /= 2;
    }
    return bit;
}

/* A number in Elias' gamma code: how many bits are below the first, and these; the lowest: sign. */
static int32_t sc__unpack(sc__packed *p, uint32_t context) {
    uint32_t n = 1, bits = 0;
    context *= 0x85ebca6b;
    while (sc__unpack_bit(p, context + bits)) bits++;
    for (; bits; bits--) n = 2 * n + sc__unpack_bit(p, context + 32 * n + bits);
    return n & 1 ? (int32_t)(n / 2) : -(int32_t)(n / 2);
}

/* Runs: the facts, each in the context of those before it and of the run before; length - 1. */
static void sc__unpack_facts(sc__unicode *u, sc__packed *p) {
    int32_t now[3] = {0};
    for (uint32_t code = 0, run = 0; code < SC__CODES; run++) {
        uint32_t context = 0;
        for (uint32_t i = 0; i < 3; i++) {
            now[i] = sc__unpack(p, 4 * (context + (uint32_t)now[i]) + i);
            u->facts[run][i] = now[i];
            context = 1009 * (context + (uint32_t)now[i]);
        }
        for (int32_t n = sc__unpack(p, 4 * context + 3); n >= 0; n--)
            u->run[code++] = (uint16_t)run;
    }
}

static void sc__add_pair(sc__unicode *u, uint32_t whole, uint32_t first, uint32_t second,
                         bool composed) {
    u->pairs[++u->count] = (sc__pair){whole, first, second, u->joined[first]};
    u->split[whole] = (uint16_t)u->count;
    if (composed) u->joined[first] = (uint16_t)u->count;
}

/* Decompositions into one code point (kind 0), or two (1), or two that NFC composes again (2), all
 * code points as distances: from the one before, but the first from that of the same kind. */
static void sc__unpack_pairs(sc__unicode *u, sc__packed *p) {
    uint32_t whole = 0, kind = 0, first[3] = {0}, second = 0;
    while ((whole += (uint32_t)sc__unpack(p, kind)) < SC__CODES) {
        kind = (uint32_t)sc__unpack(p, 3 + kind);
        uint32_t step = (uint32_t)sc__unpack(p, 6 + kind);
        first[kind] += step;
        if (kind) second += (uint32_t)sc__unpack(p, 9 + kind + 100 * step);
        sc__add_pair(u, whole, first[kind], kind ? second : 0, kind == 2);
    }
}

static const char *sc__packed_text(bool pairs); /* or facts: see >>part4 */

static sc__unicode *sc__unicode_open(void) {
    sc__unicode *u = (sc__unicode *)sc__alloc(1, sizeof *u);
    sc__packed *p = (sc__packed *)sc__alloc(2, sizeof *p);
    if (!u || !p) return SC_FREE(u), SC_FREE(p), NULL;
    p[0].text = sc__packed_text(false);
    p[1].text = sc__packed_text(true);
    p[0].range = p[1].range = 1;
    sc__unpack_facts(u, &p[0]);
    sc__unpack_pairs(u, &p[1]);
    SC_FREE(p);
    for (uint32_t i = 0; i < SC__SYLLABLES; i++) {
        uint32_t c = SC__HANGUL + i, final = i % 28;
        uint32_t first = final ? c - final : 0x1100 + i / 588;
        sc__add_pair(u, c, first, final ? 0x11a7 + final : 0x1161 + i % 588 / 28, true);
    }
    return u;
}

/* ---- Normalisation (UAX 15) ---- */

/* Appends the canonical decomposition of c. */
static void sc__decompose(const sc__unicode *u, uint32_t c, sc__codes *out) {
    const sc__pair *p = &u->pairs[u->split[c]];
    if (!u->split[c]) sc__codes_add(out, c);
    else sc__decompose(u, p->first, out);
    if (p->second) sc__decompose(u, p->second, out);
}

/* Appends NFC of s[n], then lower case: of U+0130 two code points, of all others one. NFC: all is
 * decomposed, marks that follow each other are sorted by their classes, and a mark joins the last
 * starter (class 0) unless one in between has the same class or a higher. */
static void sc__fold(const sc__unicode *u, const uint32_t *s, size_t n, sc__codes *out) {
    sc__codes x = {0};
    for (size_t i = 0; i < n; i++) sc__decompose(u, s[i], &x);
    for (size_t i = 0; i < x.count; i++) {
        uint32_t c = x.code[i];
        size_t at = i;
        for (; sc__class(u, c) && at && sc__class(u, x.code[at - 1]) > sc__class(u, c); at--)
            x.code[at] = x.code[at - 1];
        x.code[at] = c;
    }
    size_t starter = SIZE_MAX, count = 0;
    int last = 0; /* class of the last mark behind the starter */
    for (size_t i = 0; i < x.count; i++) {
        uint32_t c = x.code[i], whole = 0;
        int class_ = sc__class(u, c);
        bool joins = starter < count && (count == starter + 1 || last < class_);
        for (int k = joins ? u->joined[x.code[starter]] : 0; k && !whole; k = u->pairs[k].next)
            if (u->pairs[k].second == c) whole = u->pairs[k].whole;
        if (whole) {
            x.code[starter] = whole;
            continue;
        }
        if (class_ == 0) starter = count;
        last = class_;
        x.code[count++] = c;
    }
    for (size_t i = 0; i < count; i++) {
        uint32_t c = x.code[i];
        if (c == 0x130) sc__codes_add_text(out, "i\xcc\x87");
        else sc__codes_add(out, c + (uint32_t)sc__facts(u, c)[SC__LOWER]);
    }
    out->failed = out->failed || x.failed;
    SC_FREE(x.code);
}

/* ---- Graphemes (UAX 29) ----
 * But those of jamo, or of a flag's two letters, count as several: they have 6 bytes or more, so
 * that no charsmap replaces them whole, and T5's has nothing for their parts. */

static size_t sc__grapheme(const sc__unicode *u, const uint32_t *s, size_t n) {
    enum { JOINER = 0x200d, NON_JOINER = 0x200c };
    int kind = sc__facts(u, *s)[SC__KIND];
    bool picture = kind & SC__PICTURE, consonant = kind & SC__CONSONANT;
    bool glued = false, linked = false;
    size_t i = 1;
    for (; i < n; i++) {
        uint32_t a = s[i - 1], b = s[i];
        int before = kind;
        if (a == '\r' && b == '\n') continue;
        if (a < 0x80 && b < 0x80) break;
        kind = sc__facts(u, b)[SC__KIND];
        bool joins = (kind & (SC__EXTEND | SC__SPACING)) || (before & SC__PREPEND) ||
                     (glued && (kind & SC__PICTURE)) || (linked && (kind & SC__CONSONANT));
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

/* ==== Tokenizers ============================================================= >>tokens =======
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

/* ---- The tokenizer ---- */

typedef struct sc__word { const char *text; int32_t id; double score; } sc__word;
typedef struct sc__special { /* left, right: white space there goes with it */
    sc__codes text; int32_t id; bool normalized, left, right;
} sc__special;
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
    sc__unicode *unicode;
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

/* From 0 to 2^24 - 1, or -1. */
static int32_t sc__json_id(const sc_json *v) { return (int32_t)sc__json_whole(v, (1 << 24) - 1); }

typedef struct sc__ids { int32_t *ids; int limit, count; } sc__ids;

static void sc__emit(sc__ids *out, int32_t id) {
    if (out->count < out->limit) out->ids[out->count++] = id;
}

/* ---- BPE ---- */

/* A token of a word, and its merge with the next one; NULL: there is none. */
typedef struct sc__symbol { int32_t id; const sc__merge *merge; } sc__symbol;

static int sc__by_sides(const void *a, const void *b) {
    const sc__merge *x = (const sc__merge *)a, *y = (const sc__merge *)b;
    int order = (x->left > y->left) - (x->left < y->left);
    return order ? order : (x->right > y->right) - (x->right < y->right);
}

static void sc__find_merge(const sc_tokenizer *t, sc__symbol *left, const sc__symbol *right) {
    const sc__merge key = {left->id, right->id, 0, 0};
    left->merge = (const sc__merge *)bsearch(&key, t->merges, t->merge_count, sizeof key,
                                             sc__by_sides);
}

/* The tokens of the word s[n]: of all possible merges always the one of the lowest rank, and of
 * these the first from the left. So a round makes this merge wherever it is possible, from the left
 * on, until one of a lower rank becomes possible. */
static bool sc__bpe_word(const sc_tokenizer *t, const char *s, size_t n, sc__ids *out) {
    sc__symbol *x = (sc__symbol *)sc__alloc(n, sizeof *x);
    if (!x) return false;
    for (size_t i = 0; i < n; i++) {
        int32_t id = t->letter[i + 1 == n][(unsigned char)s[i]];
        x[i].id = id < 0 ? t->unknown : id;
        if (i) sc__find_merge(t, &x[i - 1], &x[i]);
    }
    for (const sc__merge *m = NULL;; m = NULL) {
        size_t to = 0;
        for (size_t i = 0; i < n; i++)
            if (x[i].merge && (!m || x[i].merge->rank < m->rank)) m = x[i].merge;
        if (!m) break;
        const sc__merge *next = m; /* whose turn it is */
        for (size_t i = 0; i < n; i++, to++) {
            x[to] = x[i];
            if (x[i].merge != m || next != m) continue;
            x[to] = (sc__symbol){m->id, NULL};
            if (++i + 1 < n) sc__find_merge(t, &x[to], &x[i + 1]);
            if (to) sc__find_merge(t, &x[to - 1], &x[to]);
            for (size_t k = to - (to > 0); k <= to; k++)
                if (x[k].merge && x[k].merge->rank < next->rank) next = x[k].merge;
        }
        n = to;
    }
    for (size_t i = 0; i < n; i++) sc__emit(out, x[i].id);
    SC_FREE(x);
    return true;
}

/* ---- Unigram ---- */

/* The best cut up to a place in a word: its score, and the last token's start and id. */
typedef struct sc__cut { double score; size_t start; int32_t id; } sc__cut;

/* The tokens of the word s[n] by Viterbi's algorithm. A character that is no token of its own may
 * be the unknown token, 10 below the worst score; neighbours of that kind are one token. */
static bool sc__unigram_word(const sc_tokenizer *t, const char *s, size_t n, sc__ids *out) {
    sc__cut *best = (sc__cut *)sc__alloc(n + 1, sizeof *best);
    for (size_t i = 1; best && i <= n; i++) best[i].score = -INFINITY;
    for (size_t i = 0, size; best && i < n; i += size) {
        size_t low = 0, high = t->count;
        bool known = false;
        for (size = 1; i + size < n && ((unsigned char)s[i + size] & 0xc0) == 0x80;) size++;
        for (size_t k = 0; i + k < n && low < high; k++) {
            sc__narrow(t, &low, &high, k, (unsigned char)s[i + k]);
            if (low == high || t->words[low].text[k + 1]) continue; /* no word ends here */
            double score = best[i].score + t->words[low].score;
            if (score > best[i + k + 1].score)
                best[i + k + 1] = (sc__cut){score, i, t->words[low].id};
            known = known || k + 1 == size;
        }
        double score = best[i].score + t->worst - 10;
        if (!known && score > best[i + size].score)
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

/* The index-th 32-bit number of a charsmap; 0 behind its end. */
static uint32_t sc__unit(const sc__charsmap *map, size_t index) {
    return index < map->size / 4 ? sc__bytes(map->data + 4 * index, 4, false) : 0;
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
    size_t apart = 0; /* up to here each code point is for itself */
    for (size_t i = 0, size; i < n; i += size) {
        char bytes[12];
        size_t length = 0;
        size = i < apart ? 1 : sc__grapheme(t->unicode, s + i, n - i);
        for (size_t k = 0; k < size && length < 6; k++)
            length += (size_t)sc__utf8_encode(s[i + k], bytes + length);
        const char *found = length < 6 ? sc__charsmap_find(map, bytes, length) : NULL;
        if (found) sc__codes_add_text(out, found);
        else if (size == 1) sc__codes_add(out, s[i]);
        else apart = i + size, size = 0;
    }
}

static void sc__normalise(const sc_tokenizer *t, sc__codes *text) {
    const sc__step *step = t->steps;
    for (; step < t->steps + t->step_count && !text->failed; step++) {
        uint32_t *before = text->code, *s = before;
        size_t n = text->count;
        bool mapped = step->fold || step->charsmap.data;
        *text = (sc__codes){0};
        if (step->fold) sc__fold(t->unicode, s, n, text);
        if (step->charsmap.data) sc__charsmap_apply(t, &step->charsmap, s, n, text);
        while (step->right && n && sc__is_space(s[n - 1])) n--;
        for (; step->left && n && sc__is_space(*s); n--) s++;
        for (size_t i = 0, end; !mapped && i < n; i = end) {
            for (end = i + 1; step->spaces && s[i] == ' ' && end < n && s[end] == ' ';) end++;
            if (end > i + 1) sc__codes_add_text(text, step->spaces);
            else sc__codes_add(text, s[i]);
        }
        SC_FREE(before);
    }
}

/* ---- Text ---- */

/* The longest special token at the beginning of s[n], or NULL. */
static const sc__special *sc__special_at(const sc_tokenizer *t, const uint32_t *s, size_t n,
                                         bool normalized) {
    const sc__special *best = NULL;
    for (size_t i = 0; i < t->special_count; i++) {
        const sc__special *x = &t->special[i];
        size_t length = x->text.count;
        if (x->normalized == normalized && length <= n && (!best || length > best->text.count) &&
            *s == *x->text.code && !memcmp(s, x->text.code, length * sizeof *s)) best = x;
    }
    return best;
}

/* How many of the n code points at s are a word. Unigram: those before the next space. BPE: 's 't
 * 're 've 'm 'll 'd, letters, one number, or other signs; a space is for itself. */
static size_t sc__word_length(const sc_tokenizer *t, const uint32_t *s, size_t n) {
    size_t i = 1;
    while (t->unigram && i < n && s[i] != ' ' && s[i] != t->space) i++;
    if (t->unigram) return i;
    if (*s == '\'' && n > 1) {
        uint32_t a = s[1], b = n > 2 ? s[2] : 0;
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
        if ((b == 'e' && (a == 'r' || a == 'v')) || (b == 'l' && a == 'l')) return 3;
    }
    int kind = sc__word_kind(t->unicode, *s);
    if (kind == SC__DIGIT || sc__is_space(*s)) return 1;
    while (i < n && !sc__is_space(s[i]) && sc__word_kind(t->unicode, s[i]) == kind) i++;
    return i;
}

/* Emits the words of s[n], which is normalised. Those of a Unigram model begin with `space`, which
 * stands for spaces; a whole text gets one more at its front. Those of BPE have none. */
static bool sc__emit_words(const sc_tokenizer *t, const uint32_t *s, size_t n, bool first,
                           sc__ids *out) {
    bool prepend = t->prepend == SC__ALWAYS || (t->prepend == SC__FIRST && first);
    char *word = (char *)sc__alloc(n + 1, 4);
    bool ok = word != NULL;
    for (size_t i = 0, size; ok && i < n && out->count < out->limit; i += size) {
        size_t length = 0;
        size = sc__word_length(t, s + i, n - i);
        if (!t->unigram && sc__is_space(s[i])) continue;
        if (i == 0 && prepend && *s != ' ' && *s != t->space)
            length = (size_t)sc__utf8_encode(t->space, word);
        for (size_t k = i; k < i + size; k++)
            length += (size_t)sc__utf8_encode(s[k] == ' ' ? t->space : s[k], word + length);
        ok = (t->unigram ? sc__unigram_word : sc__bpe_word)(t, word, length, out);
    }
    SC_FREE(word);
    return ok;
}

/* Emits s[n]: the special tokens in it, and what lies between them: as words or, where s is not
 * `clean`, normalised, when others may be found in it. `first`: the text begins here. */
static bool sc__emit_text(const sc_tokenizer *t, const uint32_t *s, size_t n, bool clean,
                          bool first, sc__ids *out) {
    bool ok = true;
    size_t from = 0;
    for (size_t i = 0; ok && i <= n && out->count < out->limit; i++) {
        const sc__special *special = i < n ? sc__special_at(t, s + i, n - i, clean) : NULL;
        sc__codes normal = {0};
        bool at_start = first && !from;
        size_t end = i;
        if (i < n && !special) continue;
        while (special && special->left && end > from && sc__is_space(s[end - 1])) end--;
        if (end > from && clean) ok = sc__emit_words(t, s + from, end - from, at_start, out);
        else if (end > from) {
            while (from < end) sc__codes_add(&normal, s[from++]);
            sc__normalise(t, &normal);
            ok = !normal.failed && sc__emit_text(t, normal.code, normal.count, true, at_start, out);
            SC_FREE(normal.code);
        }
        if (!special) break;
        sc__emit(out, special->id);
        from = i + special->text.count;
        while (special->right && from < n && sc__is_space(s[from])) from++;
        i = from - 1;
    }
    return ok;
}

int sc_tokenize(const sc_tokenizer *t, const char *text, int length, int32_t *ids) {
    sc__codes codes = {0};
    sc__ids out = {ids, length - (t->end >= 0), 0}; /* the last place is the end token's */
    int least = t->begin >= 0 && t->end >= 0 ? 2 : 1;
    if (length < least) return sc_fail("this tokenizer needs room for %d tokens", least), -1;
    if (strlen(text) > (size_t)1 << 28) return sc_fail("a text of more than 256 MiB"), -1;
    sc__codes_add_text(&codes, text);
    if (t->begin >= 0) sc__emit(&out, t->begin);
    bool ok = !codes.failed && sc__emit_text(t, codes.code, codes.count, false, true, &out);
    SC_FREE(codes.code);
    if (!ok) return sc_fail("out of memory for a text of %zu bytes", strlen(text)), -1;
    if (t->end >= 0) ids[out.count++] = t->end;
    for (int i = out.count; i < length; i++) ids[i] = t->pad;
    return out.count;
}

/* ---- Opening: both ---- */

void sc_tokenizer_close(sc_tokenizer *t) {
    if (!t) return;
    for (size_t i = 0; i < t->special_count; i++) SC_FREE(t->special[i].text.code);
    for (size_t i = 0; i < t->step_count; i++) SC_FREE(t->steps[i].charsmap.data);
    SC_FREE(t->unicode);
    sc_json_free(t->json);
    SC_FREE(t->words);
    SC_FREE(t->special);
    SC_FREE(t->merges);
    SC_FREE(t);
}

int sc_tokenizer_length(const sc_tokenizer *t) { return t->length; }

/* The token that the config names under `key`, as a string or an object with `content`, and its id;
 * NULL with the error set. */
static const char *sc__token(const sc_tokenizer *t, const sc_json *config, const char *path,
                             const char *key, const char *fallback, int32_t *id) {
    const sc_json *token = sc_json_get(config, key), *content = sc_json_get(token, "content");
    const char *text = sc_json_string(content ? content : token, fallback);
    *id = sc__word_id(t, text, strlen(text));
    if (*id < 0) return sc_fail("%s: %s '%s' is not in the vocabulary", path, key, text), NULL;
    return text;
}

static bool sc__add_special(sc_tokenizer *t, const char *text, int32_t id, const sc_json *flags,
                            const char *path) {
    if (!sc__grow(&t->special, (int64_t)t->special_count, sizeof *t->special)) return false;
    sc__special *x = &t->special[t->special_count++];
    *x = (sc__special){.id = id, .normalized = sc_json_bool(sc_json_get(flags, "normalized"), true),
                       .left = sc_json_bool(sc_json_get(flags, "lstrip"), false),
                       .right = sc_json_bool(sc_json_get(flags, "rstrip"), false)};
    if (!*text || id < 0) return sc_fail("%s: an added token without content or id", path);
    if (sc_json_bool(sc_json_get(flags, "single_word"), false))
        return sc_fail("%s: added token '%s': single_word is not supported", path, text);
    t->largest = id > t->largest ? id : t->largest;
    sc__codes_add_text(&x->text, text);
    if (x->normalized) sc__normalise(t, &x->text);
    if (x->text.failed) return sc_fail("out of memory for special tokens");
    return x->text.count || sc_fail("%s: added token '%s' is empty when normalised", path, text);
}

/* Adds the special tokens of a list, or of an object whose keys are ids. */
static bool sc__read_special(sc_tokenizer *t, const sc_json *list, const char *path) {
    for (int64_t i = 0; i < sc_json_length(list); i++) {
        char *rest = NULL;
        const char *key = sc_json_key(list, i);
        const sc_json *token = key ? sc_json_value(list, i) : sc_json_at(list, i);
        long named = key ? strtol(key, &rest, 10) : 0;
        int32_t id = !key ? sc__json_id(sc_json_get(token, "id"))
                     : named >> 24 || *rest ? -1 : (int32_t)named;
        const char *text = sc_json_string(sc_json_get(token, "content"), "");
        if (!sc__add_special(t, text, id, token, path)) return false;
    }
    return true;
}

/* Of BPE an object of tokens and ids, of Unigram a list of tokens and scores. */
static bool sc__read_words(sc_tokenizer *t, const sc_json *list, const char *path) {
    int64_t n = sc_json_length(list);
    t->words = (sc__word *)sc__alloc((size_t)n, sizeof *t->words);
    for (int64_t i = 0; t->words && i < n; i++) {
        const sc_json *word = sc_json_at(list, i);
        const char *text = t->unigram ? sc_json_string(sc_json_at(word, 0), NULL)
                                      : sc_json_key(list, i);
        double score = t->unigram ? sc_json_number(sc_json_at(word, 1), NAN) : 0;
        int32_t id = t->unigram ? (int32_t)i : sc__json_id(sc_json_value(list, i));
        if (!text || id < 0 || isnan(score))
            return sc_fail("%s: the vocabulary must be %s", path,
                            t->unigram ? "a list of [token, score]" : "an object of token: id");
        t->words[i] = (sc__word){text, id, score};
        t->worst = i && t->worst < score ? t->worst : score;
        t->largest = id > t->largest ? id : t->largest;
    }
    if (!t->words) return false;
    qsort(t->words, (size_t)n, sizeof *t->words, sc__by_text);
    for (int64_t i = 0; i < n; i++) { /* of equal ones the last counts */
        t->count -= t->count && !strcmp(t->words[t->count - 1].text, t->words[i].text);
        t->words[t->count++] = t->words[i];
    }
    return true;
}

/* ---- Opening: CLIP ---- */

/* merges.txt: one line of version, then two tokens a line in the order of their ranks. As in the
 * original, merges above the size of CLIP's vocabulary do not count. */
static bool sc__bpe_read_merges(sc_tokenizer *t, char *text, const char *path) {
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
            return sc_fail("%s:%zu: expected two tokens that vocab.json has, as it has the token "
                            "of both together", path, t->merge_count + 2);
        if (!sc__grow(&t->merges, (int64_t)t->merge_count, sizeof m)) return false;
        t->merges[t->merge_count++] = m;
    }
    if (!t->merge_count) return sc_fail("%s: no merges", path);
    qsort(t->merges, t->merge_count, sizeof *t->merges, sc__by_sides);
    return true;
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

static bool sc__bpe_open(sc_tokenizer *t, const char *folder, const char *vocab,
                         const sc_json *config) {
    static const char end[] = "<|endoftext|>";
    char path[SC__PATH];
    size_t length = 0;
    t->space = ' ';
    t->steps[t->step_count++].fold = true;
    char *merges = sc_read_file(sc__join(path, folder, "merges.txt"), &length);
    bool ok = merges && (t->json = sc_json_load(vocab)) && sc__read_words(t, t->json, vocab) &&
              sc__bpe_read_merges(t, merges, path);
    SC_FREE(merges);
    if (!ok) return false;
    sc__bpe_letters(t);
    const char *first = sc__token(t, config, folder, "bos_token", "<|startoftext|>", &t->begin);
    const char *last = first ? sc__token(t, config, folder, "eos_token", end, &t->end) : NULL;
    const char *pad = last ? sc__token(t, config, folder, "pad_token", end, &t->pad) : NULL;
    sc__join(path, folder, "added_tokens.json");
    if (pad && !sc_json_get(config, "added_tokens_decoder") && sc__exists(path))
        return sc_fail("%s: its tokens must be in tokenizer_config.json", path);
    return pad && sc__token(t, config, folder, "unk_token", end, &t->unknown) &&
           sc__read_special(t, sc_json_get(config, "added_tokens_decoder"), folder) &&
           (t->special_count || /* an older tokenizer_config.json, or none: those with a name */
            (sc__add_special(t, first, t->begin, NULL, folder) &&
             sc__add_special(t, last, t->end, NULL, folder) &&
             (t->pad == t->end || sc__add_special(t, pad, t->pad, NULL, folder))));
}

/* ---- Opening: T5 ---- */

static bool sc__base64(const char *text, sc__charsmap *out) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint32_t bits = 0;
    int count = 0;
    out->data = (unsigned char *)sc__alloc(strlen(text) + 1, 1); /* ends in NUL */
    for (; out->data && *text && *text != '='; text++) {
        const char *digit = strchr(digits, *text);
        if (!digit) return false;
        bits = bits << 6 | (uint32_t)(digit - digits);
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
        return sc_fail("%s: a normalizer of more than %zu steps", path, t->step_count);
    sc__step *step = &t->steps[t->step_count++];
    if (!strcmp(type, "Precompiled")) {
        sc__charsmap *map = &step->charsmap;
        bool ok = sc__base64(sc_json_string(sc_json_get(json, "precompiled_charsmap"), ""), map) &&
                  map->size >= 8 && sc__unit(map, 0) % 4 == 0 && sc__unit(map, 0) <= map->size - 4;
        return ok || sc_fail("%s: the precompiled_charsmap is broken", path);
    }
    if (!strcmp(type, "Strip")) {
        step->left = sc_json_bool(sc_json_get(json, "strip_left"), false);
        step->right = sc_json_bool(sc_json_get(json, "strip_right"), false);
        return true;
    }
    const char *pattern = sc_json_string(sc_json_get(sc_json_get(json, "pattern"), "Regex"), "");
    step->spaces = sc_json_string(sc_json_get(json, "content"), "");
    if (!strcmp(type, "Replace") && !strcmp(pattern, " {2,}")) return true;
    return sc_fail("%s: a normalizer '%s' is not supported; Precompiled, Strip, and Replace of the "
                   "Regex ' {2,}' are", path, type);
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
        return sc_fail("%s: the pre_tokenizer must be a Metaspace that splits", path);
    if (!single) return sc_fail("%s: the post_processor must be a TemplateProcessing", path);
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
            return sc_fail("%s: the post_processor may add one token on each side", path);
    }
    return true;
}

static bool sc__unigram_open(sc_tokenizer *t, const char *path, const sc_json *config) {
    t->json = sc_json_load(path);
    const sc_json *model = sc_json_get(t->json, "model"), *words = sc_json_get(model, "vocab");
    if (!t->json) return false;
    t->unigram = true;
    if (strcmp(sc_json_string(sc_json_get(model, "type"), ""), "Unigram") ||
        sc_json_bool(sc_json_get(model, "byte_fallback"), false))
        return sc_fail("%s: the model must be a Unigram without byte_fallback (CLIP's is read from "
                        "vocab.json and merges.txt)", path);
    if (!sc__read_words(t, words, path)) return false;
    t->unknown = sc__json_id(sc_json_get(model, "unk_id"));
    if (t->unknown < 0 || t->unknown >= sc_json_length(words))
        return sc_fail("%s: unk_id is not in the vocab", path);
    return sc__token(t, config, path, "pad_token", "<pad>", &t->pad) &&
           sc__unigram_read_steps(t, sc_json_get(t->json, "normalizer"), path) &&
           sc__unigram_read_frame(t, path) &&
           sc__read_special(t, sc_json_get(t->json, "added_tokens"), path);
}

sc_tokenizer *sc_tokenizer_open(const char *folder) {
    sc_tokenizer *t = (sc_tokenizer *)sc__alloc(1, sizeof *t);
    char path[SC__PATH];
    sc__config c = {0};
    bool ok = t && (t->unicode = sc__unicode_open()) &&
              sc__config_open(&c, folder, "tokenizer_config.json");
    if (ok && sc__exists(sc__join(path, folder, "vocab.json")))
        ok = sc__bpe_open(t, folder, path, c.json);
    else if (ok && sc__exists(sc__join(path, folder, "tokenizer.json")))
        ok = sc__unigram_open(t, path, c.json);
    else if (ok)
        ok = sc_fail("%s: no tokenizer here; copy CLIP's vocab.json and merges.txt, or T5's "
                      "tokenizer.json, into this folder", folder);
    double length = sc_json_number(sc_json_get(c.json, "model_max_length"), 0);
    if (ok) t->length = length >= 1 && length <= 1 << 20 ? (int)length : 0;
    sc_json_free(c.json);
    if (ok) return t;
    return sc_tokenizer_close(t), NULL;
}

/* ==== Text encoders ============================================================ >>text =======
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

/* What each of them calls the same: keys of config.json, and weights. */
typedef struct sc__encoder_names {
    const char *width, *heads, *layers, *hidden, *rows, *eps;
    const char *tokens, *position, *last; /* last: the norm behind the layers */
    const char *layer, *inside;           /* what stands before and behind a layer's number */
    const char *norm[2], *attention[4], *plain, *gate, *up, *down; /* plain: a gate without up */
    int usual_layers, usual_rows, usual_words, columns; /* columns of `position` for a head */
    float usual_eps;
} sc__encoder_names;

static const sc__encoder_names sc__clip_names = {
    "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size",
    "max_position_embeddings", "layer_norm_eps",
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight", "text_model.final_layer_norm",
    "text_model.encoder.layers.", ".", {"layer_norm1", "layer_norm2"},
    {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"},
    "mlp.fc1", NULL, NULL, "mlp.fc2", 12, 77, 49408, 64, 1e-5f};

static const sc__encoder_names sc__t5_names = {
    "d_model", "num_heads", "num_layers", "d_ff", "relative_attention_num_buckets",
    "layer_norm_epsilon", "shared.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.final_layer_norm", "encoder.block.", ".layer.", {"0.layer_norm", "1.layer_norm"},
    {"0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v", "0.SelfAttention.o"},
    "1.DenseReluDense.wi", "1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1",
    "1.DenseReluDense.wo", 6, 32, 32128, 1, 1e-6f};

typedef struct sc__text_layer { /* y = down(f(gate x) * up x), or without up */
    sc_linear_layer norm[2];    /* before attention, before the MLP */
    sc_linear_layer q, k, v, out, gate, up, down;
} sc__text_layer;

typedef struct sc__encoder {
    const sc__encoder_names *names;
    sc_tokenizer *tokenizer;
    sc_net *net;
    int width, heads, size, layers, hidden, vocabulary, rows;
    bool gated, biased;         /* the MLPs have their `up`; layers and norms have biases */
    float eps;
    sc_activation activation;
    int length, end;            /* CLIP: tokens of a text; eos_token_id */
    int pooled;                 /* channels of the vector for the whole text */
    sc_linear_layer projection; /* of that vector, [pooled, width]; no weight: none */
    sc_tensor *tokens;          /* [vocabulary, width] */
    sc_tensor *position;        /* CLIP: [rows, width] for each place; T5: [rows, heads] */
    sc_linear_layer last;
    sc__text_layer *layer;
} sc__encoder;

struct sc_text_encoders {
    const sc_backend *backend;
    sc_architecture kind;
    sc_tape *tape;
    sc__encoder clip, clip_g, t5;   /* clip_g: SD3.5's second */
    int t5_distance;            /* the largest that has a bucket of its own */
};

static void sc__encoder_close(sc__encoder *e) {
    sc_tokenizer_close(e->tokenizer);
    sc_net_close(e->net);
    SC_FREE(e->layer);
}

void sc_text_encoders_close(sc_text_encoders *t) {
    if (!t) return;
    sc__encoder_close(&t->clip);
    sc__encoder_close(&t->clip_g);
    sc__encoder_close(&t->t5);
    sc_tape_free(t->tape);
    SC_FREE(t);
}

/* ---- Opening ---- */

static bool sc__activation_named(const char *name, const char *path, sc_activation *kind) {
    static const struct { const char *name; sc_activation kind; } known[] = {
        {"quick_gelu", SC_QUICK_GELU}, {"gelu", SC_GELU}, {"gelu_new", SC_GELU_TANH},
        {"gelu_pytorch_tanh", SC_GELU_TANH}, {"silu", SC_SILU}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) return *kind = known[i].kind, true;
    return sc_fail("%s: activation '%s' is not supported", path, name);
}

/* The rows of a matrix of the first layer. */
static int sc__layer_rows(const sc__encoder *e, const char *name, int fallback) {
    char full[SC_MAX_NAME];
    snprintf(full, sizeof full, "%s0%s%s.weight", e->names->layer, e->names->inside, name);
    return sc__side(e->net, full, 0, fallback);
}

static bool sc__encoder_config(sc__encoder *e, sc__config *c) {
    const sc__encoder_names *n = e->names;
    char layers[SC_MAX_NAME];
    snprintf(layers, sizeof layers, "%s%%d%s%s.weight", n->layer, n->inside, n->attention[0]);
    int gate = n->gate ? sc__layer_rows(e, n->gate, 0) : 0;
    int hidden = gate ? gate : sc__layer_rows(e, n->plain, 2048);
    int heads = c->json ? 8 : sc__side(e->net, n->position, 1, 512) / n->columns;
    int words = sc__side(e->net, n->tokens, 0, n->usual_words);
    e->width = sc__config_int(c, 1, n->width, sc__side(e->net, n->tokens, 1, 512));
    e->heads = sc__config_int(c, 1, n->heads, heads);
    e->layers = sc__config_int(c, 1, n->layers, sc__count_layers(e->net, layers, n->usual_layers));
    e->hidden = sc__config_int(c, 1, n->hidden, hidden);
    e->vocabulary = sc__config_int(c, 1, "vocab_size", words);
    e->rows = sc__config_int(c, 1, n->rows, sc__side(e->net, n->position, 0, n->usual_rows));
    e->eps = (float)sc__config_number(c, n->eps, n->usual_eps);
    return !c->wrong && (e->layers <= 1024 || sc_fail("%s: more than 1024 layers", c->path));
}

/* FLUX takes the pooled vector as it is, SD3.5 projected, but for CLIP-L's of a single file. */
static bool sc__clip_config(sc_text_encoders *t, sc__encoder *e, sc__config *c) {
    bool big = e == &t->clip_g;
    const sc_json *end = sc_json_get(c->json, "eos_token_id");
    const char *usual = big && !c->json ? "gelu" : "quick_gelu";
    const char *activation = sc_json_string(sc_json_get(c->json, "hidden_act"), usual);
    int length = e->tokenizer ? e->tokenizer->length : 0;
    bool projected = t->kind == SC_SD3 && (big || c->json);
    int channels = sc__side(e->net, "text_projection.weight", 0, 512);
    e->pooled = projected ? sc__config_int(c, 1, "projection_dim", channels) : e->width;
    if (c->wrong || (projected &&
        !sc_net_linear(e->net, &e->projection, "text_projection", e->pooled, e->width, false)))
        return false;
    e->end = end ? sc__json_id(end) : c->json ? 49407 : 2;
    e->length = length && length < e->rows ? length : e->rows;
    e->size = e->width / e->heads;
    if (e->width % e->heads)
        return sc_fail("%s: hidden_size must be a multiple of num_attention_heads", c->path);
    if (e->rows < 2 || e->rows > SC__MAX_TOKENS)
        return sc_fail("%s: max_position_embeddings must be from 2 to %d", c->path, SC__MAX_TOKENS);
    return sc__activation_named(activation, c->path, &e->activation);
}

/* Configs have `dense_act_fn` and `is_gated_act`, or `feed_forward_proj`, which means both. */
static bool sc__t5_config(sc_text_encoders *t, sc__config *c) {
    sc__encoder *e = &t->t5;
    const sc_json *json = c->json;
    bool gate = !json && sc__layer_rows(e, e->names->gate, 0);
    int inner = sc__layer_rows(e, e->names->attention[0], 512);
    const char *both = sc_json_string(sc_json_get(json, "feed_forward_proj"),
                                      gate ? "gated-gelu" : "relu");
    bool gated = strstr(both, "gated-") == both;
    const char *activation = !strcmp(both, "gated-gelu") ? "gelu_new" : gated ? both + 6 : both;
    activation = sc_json_string(sc_json_get(json, "dense_act_fn"), activation);
    e->gated = sc_json_bool(sc_json_get(json, "is_gated_act"), gated);
    e->size = sc__config_int(c, 1, "d_kv", json ? 64 : inner / e->heads);
    t->t5_distance = sc__config_int(c, 1, "relative_attention_max_distance", 128);
    if (c->wrong) return false;
    if (e->rows < 4 || t->t5_distance <= e->rows / 4)
        return sc_fail("%s: relative_attention_num_buckets must be 4 or more, and less than four "
                        "times relative_attention_max_distance", c->path);
    return sc__activation_named(activation, c->path, &e->activation);
}

static bool sc__open_layer(sc__encoder *e, int index) {
    const sc__encoder_names *n = e->names;
    sc__text_layer *l = &e->layer[index];
    char prefix[64];
    int64_t c = e->width, inner = (int64_t)e->heads * e->size, hidden = e->hidden;
    const struct { sc_linear_layer *layer; const char *name; int ndim; int64_t shape[2]; } of[] = {
        {&l->norm[0], n->norm[0], 1, {c}}, {&l->norm[1], n->norm[1], 1, {c}},
        {&l->q, n->attention[0], 2, {inner, c}}, {&l->k, n->attention[1], 2, {inner, c}},
        {&l->v, n->attention[2], 2, {inner, c}}, {&l->out, n->attention[3], 2, {c, inner}},
        {&l->gate, e->gated ? n->gate : n->plain, 2, {hidden, c}},
        {&l->down, n->down, 2, {c, hidden}}, {&l->up, n->up, 2, {hidden, c}}};
    snprintf(prefix, sizeof prefix, "%s%d%s", n->layer, index, n->inside);
    for (int i = 0; i < (e->gated ? 9 : 8); i++)
        if (!sc__net_layer(e->net, of[i].layer, prefix, of[i].name, of[i].ndim, of[i].shape,
                           e->biased)) return false;
    return true;
}

static bool sc__encoder_weights(sc__encoder *e) {
    const int64_t tokens[] = {e->vocabulary, e->width};
    const int64_t position[] = {e->rows, e->names->columns == 1 ? e->heads : e->width};
    bool ok = (e->layer = (sc__text_layer *)sc__alloc((size_t)e->layers, sizeof *e->layer)) &&
              (e->tokens = sc_net_weight(e->net, e->names->tokens, 2, tokens)) &&
              (e->position = sc_net_weight(e->net, e->names->position, 2, position)) &&
              sc__net_layer(e->net, &e->last, "", e->names->last, 1, &tokens[1], e->biased);
    for (int i = 0; ok && i < e->layers; i++) ok = sc__open_layer(e, i);
    return ok && sc__net_complete(e->net) && sc_net_load(e->net);
}

/* A tokenizer's folder beside the models; what single files never carry. */
static sc_tokenizer *sc__open_tokenizer(const char *model, const char *name, bool clip) {
    char base[SC__PATH], path[SC__PATH];
    if (!sc__exists(sc__join(path, sc__model_folder(base, model), name)))
        return sc_fail("%s: no tokenizer here; single-file models carry none: copy the folder %s "
                       "of this kind of model in diffusers' layout to %s", path, name, base), NULL;
    sc_tokenizer *t = sc_tokenizer_open(path);
    if (!t || t->unigram != clip) return t;
    sc_tokenizer_close(t);
    return sc_fail("%s: this is %s's tokenizer", path, clip ? "T5" : "CLIP"), NULL;
}

/* Opens the weights at `path` and checks the tokenizer, which a plan has not, against them: tokens
 * outside of the embedding table would read past its end. */
static bool sc__encoder_open(sc_text_encoders *t, sc__encoder *e, const char *model, sc_part part,
                             const char *tokenizer) {
    bool clip = e != &t->t5;
    char path[SC__PATH];
    sc__config c = {0};
    e->names = clip ? &sc__clip_names : &sc__t5_names;
    e->biased = clip;
    bool ok = sc__part_path(path, model, part) &&
              (!t->backend || (e->tokenizer = sc__open_tokenizer(model, tokenizer, clip))) &&
              sc__read_config(&c, path) &&
              (e->net = sc_net_open(t->backend, path, sc__small_file(t->backend, path)));
    if (ok && part == SC_SD3_CLIP_G) e->net->prefixes = sc__clip_g_prefixes;
    if (ok && part == SC_SD3_CLIP_G && e->tokenizer) e->tokenizer->pad = 0; /* not CLIP-L's */
    ok = ok && sc__encoder_config(e, &c) &&
         (clip ? sc__clip_config(t, e, &c) : sc__t5_config(t, &c)) && sc__encoder_weights(e);
    if (ok && e->tokenizer && e->tokenizer->largest >= e->vocabulary)
        ok = sc_fail("%s: vocab_size is %d, but the tokenizer has the id %d", path, e->vocabulary,
                      (int)e->tokenizer->largest);
    sc_json_free(c.json);
    return ok;
}

sc_text_encoders *sc_text_encoders_open(const sc_backend *backend, const char *model,
                                        sc_architecture kind) {
    sc_text_encoders *t = (sc_text_encoders *)sc__alloc(1, sizeof *t);
    bool sd3 = kind == SC_SD3;
    if (!t) return NULL;
    t->backend = backend;
    t->kind = kind;
    bool ok = (!backend || (t->tape = sc_tape_new(backend))) &&
              sc__encoder_open(t, &t->clip, model, SC_CLIP, "tokenizer") &&
              (!sd3 || sc__encoder_open(t, &t->clip_g, model, SC_SD3_CLIP_G, "tokenizer_2")) &&
              sc__encoder_open(t, &t->t5, model, sd3 ? SC_SD3_T5 : SC_T5,
                               sd3 ? "tokenizer_3" : "tokenizer_2");
    if (ok && sd3 && (t->clip.length != t->clip_g.length ||
                      t->clip.width + t->clip_g.width > t->t5.width))
        ok = sc_fail("%s: two CLIPs of %d and %d tokens, %d and %d channels do not fit beside "
                     "T5's %d", model, t->clip.length, t->clip_g.length, t->clip.width,
                     t->clip_g.width, t->t5.width);
    if (ok) return t;
    return sc_text_encoders_close(t), NULL;
}

/* ---- Forward ---- */

/* x [1, T, C] through the layers, in place, and of the last norm of it `count` tokens from `first`
 * on, projected where there is a projection; hidden [T, C] (or NULL): before the last layer. CLIP's
 * attention is causal, T5's has a bias [H, T, T]. What a layer made goes before the next. */
static bool sc__encoder_run(sc_tape *t, const sc__encoder *e, sc_tensor *x, const sc_tensor *bias,
                            int64_t first, int64_t count, float *out, float *hidden) {
    float scale = bias ? 1 : 1.f / sqrtf((float)e->size);
    sc_mark mark = sc_tape_mark(t);
    for (int i = 0; i < e->layers; i++) {
        const sc__text_layer *l = &e->layer[i];
        if (hidden && i == e->layers - 1 && !sc_read(t, x, hidden)) return false;
        sc_tensor *n = sc_layer_norm(t, x, l->norm[0].weight, l->norm[0].bias, e->eps);
        sc_tensor *o = sc_attention(t, sc_linear(t, n, &l->q), sc_linear(t, n, &l->k),
                                    sc_linear(t, n, &l->v), e->heads, scale, bias, !bias);
        sc_tensor *y = sc_add(t, x, sc_linear(t, o, &l->out));
        n = sc_layer_norm(t, y, l->norm[1].weight, l->norm[1].bias, e->eps);
        sc_tensor *h = sc_activate(t, e->activation, sc_linear(t, n, &l->gate));
        if (e->gated) h = sc_multiply(t, h, sc_linear(t, n, &l->up));
        y = sc_add(t, y, sc_linear(t, h, &l->down));
        if (!sc_copy(t, x, y)) return false;
        sc_tape_rewind(t, mark);
    }
    x = sc_slice_tokens(t, x, first, count);
    x = sc_layer_norm(t, x, e->last.weight, e->last.bias, e->eps);
    return sc_read(t, e->projection.weight ? sc_linear(t, x, &e->projection) : x, out);
}

/* pooled [e->pooled]; hidden [length, width], or NULL: all tokens before the last layer. */
static bool sc__clip_encode(sc_text_encoders *s, const sc__encoder *e, const char *prompt,
                            float *pooled, float *hidden) {
    sc_tape *t = s->tape;
    int32_t ids[SC__MAX_TOKENS], places[SC__MAX_TOKENS];
    int length = e->length, end = 0;
    if (sc_tokenize(e->tokenizer, prompt, length, ids) < 0) return false;
    for (int i = length - 1; i >= 0; i--) {
        places[i] = i;
        if (e->end == 2 ? ids[i] >= ids[end] : ids[i] == e->end) end = i; /* the first */
    }
    sc_tape_reset(t);
    sc_tensor *x = sc_add(t, sc_embed_tokens(t, e->tokens, ids, 1, length),
                          sc_embed_tokens(t, e->position, places, 1, length));
    return sc__encoder_run(t, e, x, NULL, end, 1, pooled, hidden);
}

/* SD3.5: both CLIPs, their tokens side by side in the first channels of rows [length, width]. */
static bool sc__clips_encode(sc_text_encoders *s, const char *prompt, float *rows, float *pooled) {
    int length = s->clip.length, width = s->clip.width, width_g = s->clip_g.width;
    float *hidden = (float *)sc__alloc((size_t)(length * (width + width_g)), sizeof *hidden);
    float *hidden_g = hidden + length * width;
    bool ok = hidden && sc__clip_encode(s, &s->clip, prompt, pooled, hidden) &&
              sc__clip_encode(s, &s->clip_g, prompt, pooled + s->clip.pooled, hidden_g);
    for (int i = 0; ok && i < length; i++, rows += s->t5.width) {
        memset(rows, 0, (size_t)s->t5.width * sizeof *rows);
        memcpy(rows, hidden + i * width, (size_t)width * sizeof *rows);
        memcpy(rows + width, hidden_g + i * width_g, (size_t)width_g * sizeof *rows);
    }
    SC_FREE(hidden);
    return ok;
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

/* context [tokens, width]. The bias of a head for two tokens, [H, T, T], is a learned number
 * for the bucket of their distance: a query's row is a part of those for all distances. */
static bool sc__t5_encode(sc_text_encoders *s, const char *prompt, int tokens, float *context) {
    const sc__encoder *e = &s->t5;
    sc_tape *t = s->tape;
    int32_t ids[SC__MAX_TOKENS], buckets[2 * SC__MAX_TOKENS];
    int64_t n = tokens, all = 2 * n - 1, size = sc_dtype_size(t->be->activation);
    if (sc_tokenize(e->tokenizer, prompt, tokens, ids) < 0) return false;
    for (int i = 0; i < all; i++)
        buckets[i] = sc__t5_bucket(i + 1 - tokens, e->rows, s->t5_distance);
    sc_tape_reset(t);
    sc_tensor *x = sc_embed_tokens(t, e->tokens, ids, 1, n);
    sc_tensor *bias = sc_new(t, 3, (const int64_t[]){e->heads, n, n});
    sc_tensor *row = sc_swap_axes(t, sc_embed_tokens(t, e->position, buckets, 1, all));
    for (int64_t q = 0; bias && row && q < n; q++)
        t->be->copy_block((char *)bias->data + q * n * size, n * n,
                          (char *)row->data + (n - 1 - q) * size, all, e->heads, n, row->dtype,
                          false);
    return bias && row && sc__encoder_run(t, e, x, bias, 0, n, context, NULL);
}

const sc_net *sc_text_net(const sc_text_encoders *t, sc_part part) {
    return !t ? NULL : part == SC_CLIP ? t->clip.net : part == SC_SD3_CLIP_G ? t->clip_g.net
                                                                             : t->t5.net;
}

bool sc_text_encode(sc_text_encoders *t, const char *prompt, int tokens, float *context,
                    float *pooled) {
    int clip = t->kind == SC_SD3 ? t->clip.length : 0, least = clip + 1;
    if (tokens < least || tokens > SC__MAX_TOKENS)
        return sc_fail("a prompt takes from %d to %d text tokens, not %d", least, SC__MAX_TOKENS,
                       tokens);
    return (clip ? sc__clips_encode(t, prompt, context, pooled)
                 : sc__clip_encode(t, &t->clip, prompt, pooled, NULL)) &&
           sc__t5_encode(t, prompt, tokens - clip, context + (int64_t)clip * t->t5.width);
}

/* ==== Pictures and data sets =============================================== >>pictures =======
 *
 * Decoding and encoding belong to the programs (see tools.h); here is what a decoder leaves to do:
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
        return sc_fail("a picture of %lld x %lld pixels is beyond the limits", (long long)width,
                        (long long)height);
    p->rgb = (float *)sc__alloc((size_t)(3 * width * height), sizeof *p->rgb);
    return p->rgb != NULL;
}

/* EXIF orientations: 5 to 8 swap the axes; some axes of the stored picture run backwards. */
bool sc_picture_from_pixels(sc_picture *p, const uint16_t *pixels, int width, int height,
                            int channels, int orientation) {
    bool swap = orientation > 4;
    bool flip_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    bool flip_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    *p = (sc_picture){0};
    if (channels < 1 || channels > 4) return sc_fail("%d channels of pixels, not 1 to 4", channels);
    if (!sc__picture_new(p, swap ? height : width, swap ? width : height)) return false;
    int64_t area = (int64_t)width * height;
    for (int64_t i = 0; i < area; i++) {
        int64_t x = i % p->width, y = i / p->width, sx = swap ? y : x, sy = swap ? x : y;
        if (flip_x) sx = width - 1 - sx;
        if (flip_y) sy = height - 1 - sy;
        float value[4];
        for (int c = 0; c < channels; c++)
            value[c] = (float)pixels[(sy * width + sx) * channels + c] / 65535;
        float alpha = channels % 2 == 0 ? value[channels - 1] : 1;
        for (int c = 0; c < 3; c++)
            p->rgb[c * area + i] = 2 * (value[channels > 2 ? c : 0] * alpha + 1 - alpha) - 1;
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
        int64_t first = sc__max(0, (int64_t)floor(centre - 2 * widen + 0.5));
        int64_t last = sc__min(n, (int64_t)(centre + 2 * widen + 0.5));
        float *w = weights + i * taps;
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
    double scale = fmax((double)width / p->width, (double)height / p->height);
    double box_width = width / scale, box_height = height / scale; /* of p; the part that is kept */
    bool ok = sc__picture_new(out, width, height);
    float *half = ok ? (float *)sc__alloc((size_t)p->height, (size_t)width * sizeof *half) : NULL;
    ok = half != NULL;
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
    int64_t area = (int64_t)resolution * resolution / multiple / multiple;
    double nearest = INFINITY;
    *bucket_width = *bucket_height = multiple;
    for (int i = 2; i < 4 * side + 2; i++) { /* the tallest for a width, the widest for a height */
        int64_t one = i / 2, other = area / one, w = i % 2 ? other : one, h = i % 2 ? one : other;
        double distance = fabs(log((double)w / (double)h * height / width));
        if (other < 1 || other > 2 * side || distance >= nearest) continue;
        nearest = distance;
        *bucket_width = (int)w * multiple;
        *bucket_height = (int)h * multiple;
    }
}

/* ---- Orientation: tag 0x0112 of the first directory of a TIFF block; XMP's text ---- */

/* 0: the tag is not there. It should be a SHORT; any integer or fraction is taken. */
static int sc__tiff_orientation(const uint8_t *tiff, size_t size) {
    static const uint8_t sizes[] = {0, 0, 0, 2, 4, 8, 1, 0, 2, 4, 8, 0, 0, 4}; /* by type */
    for (int i = 0; i < 2 && size >= 6 && !memcmp(tiff, "Exif\0", 6); i++) tiff += 6, size -= 6;
    if (size < 8 || (memcmp(tiff, "II*", 4) && memcmp(tiff, "MM\0*", 4))) return 0;
    bool big = *tiff == 'M';
    size_t at = sc__bytes(tiff + 4, 4, big);
    uint32_t entries = at <= size - 2 ? sc__bytes(tiff + at, 2, big) : 0;
    for (at += 2; entries > 0 && at <= size && size - at >= 12; entries--, at += 12) {
        uint32_t type = sc__bytes(tiff + at + 2, 2, big), count = sc__bytes(tiff + at + 4, 4, big);
        size_t n = type < sizeof sizes ? sizes[type] : 0, place = at + 8;
        if (sc__bytes(tiff + at, 2, big) != 0x0112) continue;
        if (n && count > 4 / n) place = sc__bytes(tiff + place, 4, big);
        if (count == 0 || place > size - n) continue;
        uint32_t value = sc__bytes(tiff + place, n < 4 ? (int)n : 4, big);
        uint32_t parts = n < 8 ? 1 : sc__bytes(tiff + place + 4, 4, big);
        return value && parts && value % parts == 0 ? (int)(value / parts) : 1;
    }
    return 0;
}

int sc_orientation(const uint8_t *exif, size_t size, const char *xmp) {
    int value = exif ? sc__tiff_orientation(exif, size) : 0;
    for (; !value && xmp && (xmp = strstr(xmp, "tiff:Orientation")); xmp++)
        sscanf(xmp, "tiff:Orientation%*[=\">]%1d", &value);
    return value >= 1 && value <= 8 ? value : 1;
}

/* ---- Text files ---- */

/* UTF-16 with its mark as UTF-8, other text as it is; what is no character becomes no UTF-8. */
static char *sc__to_utf8(char *file, size_t *n) {
    bool big = file && !strncmp(file, "\xfe\xff", 2);
    if (!file || (!big && strncmp(file, "\xff\xfe", 2))) return file;
    char *text = (char *)sc__alloc(*n / 2 * 3 + 4, 1), *to = text;
    for (size_t at = 0; text && at < *n; at += 2) {
        uint32_t c = *n - at < 2 ? 0 : sc__bytes(file + at, 2, big);
        uint32_t low = *n - at < 4 ? 0 : sc__bytes(file + at + 2, 2, big);
        bool pair = c >> 10 == 0xd800 >> 10 && low >> 10 == 0xdc00 >> 10;
        if (pair) c = 0x10000 + ((c & 0x3ff) << 10 | (low & 0x3ff)), at += 2;
        to += sc__utf8_encode(c ? c : 0xd800, to);
    }
    *n = (size_t)(to - text);
    SC_FREE(file);
    return text;
}

char *sc_text_load(const char *path) {
    size_t n = 0, line = 1;
    char *text = sc__to_utf8(sc_read_file(path, &n), &n), *at = text;
    if (!text) return NULL;
    if (!strncmp(text, "\xef\xbb\xbf", 3)) memmove(text, text + 3, (n -= 3) + 1);
    for (int size; *at && (size = sc__utf8_size(at)); at += size) line += *at == '\n';
    if (at == text + n) return text;
    sc_fail("%s:%zu: byte %zu (0x%02x) is no UTF-8 text: save the file as UTF-8, or as UTF-16 with "
            "a byte order mark", path, line, (size_t)(at - text), *at & 0xffu);
    return SC_FREE(text), NULL;
}

/* ---- Folders of pictures with captions ---- */

typedef enum { SC__NO_DATA, SC__CAPTION_FILE, SC__PICTURE_FILE, SC__OTHER_FILE } sc__kind;

/* What is below a folder; a picture and its caption differ in the ending. */
typedef struct sc__item {
    char *path;
    size_t stem;                /* length of the path without the ending */
    sc__kind kind;
    const struct sc__item *other; /* of a picture, its caption; of a caption, a picture */
} sc__item;

typedef struct sc__folder { const char *path; sc__item *items; int64_t count; } sc__folder;

static void sc__classify(sc__item *item) {
    static const char *const endings[] = {
        "", ".txt.", ".png.jpg.jpeg.jpe.jfif.",
        (".webp.bmp.tif.tiff.gif.heic.heif.avif.jxl.jp2.apng.tga.ppm.pgm.psd.exr.qoi.svg.dng.cr2"
         ".cr3.nef.arw.raw.")};
    const char *name = strrchr(item->path, '/') + 1, *dot = strrchr(name, '.');
    char ending[8] = "";
    size_t n = 0;
    for (; dot && n < 6 && dot[n]; n++) ending[n] = (char)tolower((unsigned char)dot[n]);
    ending[n] = '.';
    for (int kind = 1; dot && kind < 4; kind++)
        if (strstr(endings[kind], ending)) item->kind = (sc__kind)kind;
    if (item->kind == SC__CAPTION_FILE && !strncasecmp(name, "readme", 6)) item->kind = SC__NO_DATA;
    if (sc__is_folder(item->path)) item->kind = SC__OTHER_FILE;
    item->stem = dot ? (size_t)(dot - item->path) : strlen(item->path);
}

static bool sc__list_add(sc__folder *f, const char *path) {
    if (!sc__grow(&f->items, f->count, sizeof *f->items)) return false;
    f->items[f->count] = (sc__item){.path = sc__strdup(path)};
    return f->items[f->count++].path != NULL;
}

/* Lists the folder, and all below it but hidden names. Folders that cannot be read, and links to
 * folders, as they may lead in circles, are files of another kind: they may hold pictures. */
static bool sc__list(sc__folder *f) {
    bool ok = sc__list_add(f, f->path);
    for (int64_t i = 0; ok && i < f->count; i++) {
        struct stat s;
        char *path = f->items[i].path, item[SC__PATH];
        DIR *folder = i == 0 || (!lstat(path, &s) && S_ISDIR(s.st_mode)) ? opendir(path) : NULL;
        if (i == 0 && !folder) return sc_fail("%s: %s", path, strerror(errno));
        if (!folder) sc__classify(&f->items[i]);
        for (struct dirent *e; ok && folder && (e = readdir(folder));)
            ok = *e->d_name == '.' || sc__list_add(f, sc__join(item, path, e->d_name));
        if (folder) closedir(folder);
    }
    return ok;
}

/* Those of one stem side by side, its captions first. */
static int sc__by_stem(const void *a, const void *b) {
    const sc__item *x = (const sc__item *)a, *y = (const sc__item *)b;
    int order = strncmp(x->path, y->path, x->stem < y->stem ? x->stem : y->stem);
    if (!order) order = (x->stem > y->stem) - (x->stem < y->stem);
    if (!order) order = (int)x->kind - (int)y->kind;
    return order ? order : strcmp(x->path, y->path);
}

static void sc__find_captions(sc__folder *f) {
    sc__item *caption = NULL;
    qsort(f->items, (size_t)f->count, sizeof *f->items, sc__by_stem);
    for (sc__item *e = f->items; e < f->items + f->count; e++) {
        if (e->kind == SC__CAPTION_FILE) caption = e;
        if (e->kind <= SC__CAPTION_FILE || !caption || caption->stem != e->stem ||
            memcmp(caption->path, e->path, e->stem)) continue;
        e->other = caption;
        caption->other = e;
    }
}

/* Takes the caption, without white space at its ends. NULL: error already set. */
static bool sc__dataset_add(sc_dataset *d, const char *path, char *caption) {
    static const char space[] = " \t\n\v\f\r"; /* isspace would ask the locale */
    if (!caption || !sc__grow(&d->pairs, d->count, sizeof *d->pairs))
        return SC_FREE(caption), false;
    size_t start = strspn(caption, space), n = strlen(caption + start);
    while (n && strchr(space, caption[start + n - 1])) n--;
    memmove(caption, caption + start, n);
    caption[n] = 0;
    d->pairs[d->count] = (sc_pair){sc__strdup(path), caption};
    return d->pairs[d->count++].path != NULL;
}

static bool sc__dataset_line(sc_dataset *d, const char *folder, const char *where,
                             const char *line) {
    static const char *const keys[] = {"prompt", "text", "caption"}, lost[] = "\xef\xbf\xbd";
    sc_json *json = sc_json_parse(line, strlen(line), where);
    if (!json) return false;
    const char *name = sc_json_string(sc_json_get(json, "file_name"), NULL), *caption = NULL;
    const char *wrong = NULL;
    bool ok = false;
    for (int i = 0; i < 3; i++) {
        const sc_json *value = sc_json_get(json, keys[i]);
        const char *text = sc_json_string(value, caption);
        if (value && value->type != SC__STRING && value->type != SC__NULL) wrong = "are no text";
        if (caption && *caption && *text && strcmp(caption, text)) wrong = "differ: keep one";
        if (!caption || !*caption) caption = text;
    }
    while (name && !strncmp(name, "./", 2)) name += 2;
    char path[SC__PATH];
    if (!name || !*name) sc_fail("%s: no 'file_name'", where);
    else if (wrong) sc_fail("%s: 'prompt', 'text', 'caption' of %s %s", where, name, wrong);
    else if (!caption) sc_fail("%s: no 'prompt', 'text' or 'caption' for %s", where, name);
    else if (*name == '/' || !strncmp(name, "../", 3) || strstr(name, "/../") ||
             strstr(name, "/./") || strstr(name, "//"))
        sc_fail("%s: file_name '%s' is no plain path in the folder", where, name);
    else if (strstr(caption, lost) && !strstr(line, lost))
        sc_fail("%s: a \\u in the caption of %s is no character", where, name);
    else ok = sc__dataset_add(d, sc__join(path, folder, name), sc__strdup(caption));
    sc_json_free(json);
    return ok;
}

static bool sc__dataset_metadata(sc_dataset *d, const char *folder, const char *path) {
    char *text = sc_text_load(path), *next = text, where[PATH_MAX + 32];
    bool ok = text != NULL;
    for (int64_t number = 1; ok && *next; number++) {
        char *line = next;
        next += strcspn(line, "\n");
        if (*next) *next++ = 0;
        snprintf(where, sizeof where, "%s:%lld", path, (long long)number);
        if (line[strspn(line, " \t\r")]) ok = sc__dataset_line(d, folder, where, line);
    }
    SC_FREE(text);
    return ok;
}

/* Without metadata.jsonl: the pictures in the folder itself. */
static bool sc__dataset_captions(sc_dataset *d, const sc__folder *f) {
    const char *first = NULL;
    int64_t lacking = 0;
    bool ok = true;
    for (sc__item *e = f->items; ok && e < f->items + f->count; e++) {
        if (e->kind != SC__PICTURE_FILE || strchr(e->path + strlen(f->path) + 1, '/')) continue;
        if (e->other) ok = sc__dataset_add(d, e->path, sc_text_load(e->other->path));
        else if (!lacking++) first = e->path;
    }
    return ok && (!lacking || sc_fail("%s: no caption for %lld of the pictures, as %s: write one "
                                      "into name.txt beside each (it may be empty)", f->path,
                                      (long long)lacking, first));
}

/* Of the same path by caption; a path that is looked for has none. */
static int sc__by_picture(const void *a, const void *b) {
    const sc_pair *p = (const sc_pair *)a, *q = (const sc_pair *)b;
    int order = strcmp(p->path, q->path);
    return order || !p->caption ? order : strcmp(p->caption, q->caption);
}

/* Says what is left out in d->unused; false where it may not be. */
static bool sc__dataset_unused(sc_dataset *d, const sc__folder *f, bool metadata) {
    enum { NAMES = 5 };
    char names[NAMES * 1000] = "";
    int64_t unused = 0, pictures = 0, captioned = 0;
    for (sc__item *e = f->items; e < f->items + f->count; e++) {
        sc_pair key = {.path = e->path};
        bool picture = e->kind > SC__CAPTION_FILE;
        if (e->kind == SC__NO_DATA || (!picture && (metadata || e->other)) ||
            (d->count && bsearch(&key, d->pairs, (size_t)d->count, sizeof key, sc__by_picture)))
            continue;
        pictures += picture;
        captioned += picture && e->other;
        if (++unused <= NAMES) sc__list_name(names, sizeof names, e->path + strlen(f->path) + 1);
    }
    if (d->count == 0)
        return sc_fail("%s: no pictures: put in metadata.jsonl, or name.txt beside name.png or "
                       ".jpg%s%s", f->path, unused ? "; not used: " : "", names);
    if (!unused) return true;
    char line[PATH_MAX + sizeof names + 128];
    snprintf(line, sizeof line, "%s: %lld file%s not used: %s%s (used are %s)", f->path,
             (long long)unused, unused == 1 ? " is" : "s are", names, unused > NAMES ? " ..." : "",
             metadata ? "those that metadata.jsonl names"
                      : "PNG and JPEG, in the folder itself, with name.txt beside each");
    d->unused = sc__strdup(line);
    return d->unused && (2 * captioned <= pictures ||
                         sc_fail("%s; most have captions: convert, move or rename them, or take "
                                 "them away", line));
}

sc_dataset *sc_dataset_open(const char *folder) {
    sc_dataset *d = (sc_dataset *)sc__alloc(1, sizeof *d);
    sc__folder f = {.path = folder};
    char path[SC__PATH];
    sc__join(path, folder, "metadata.jsonl");
    bool ok = d && sc__list(&f), metadata = ok && sc__exists(path);
    if (ok) sc__find_captions(&f);
    if (ok) ok = metadata ? sc__dataset_metadata(d, folder, path) : sc__dataset_captions(d, &f);
    if (ok && d->count) qsort(d->pairs, (size_t)d->count, sizeof *d->pairs, sc__by_picture);
    ok = ok && sc__dataset_unused(d, &f, metadata);
    for (int64_t i = 0; i < f.count; i++) SC_FREE(f.items[i].path);
    SC_FREE(f.items);
    if (ok) return d;
    return sc_dataset_close(d), NULL;
}

void sc_dataset_close(sc_dataset *d) {
    if (!d) return;
    for (int64_t i = 0; i < d->count; i++) {
        SC_FREE(d->pairs[i].path);
        SC_FREE(d->pairs[i].caption);
    }
    SC_FREE(d->unused);
    SC_FREE(d->pairs);
    SC_FREE(d);
}

/* ==== Pipeline: a whole model, diffusers' folder or single files =========== >>pipeline =======
 *
 * The parts of a FLUX folder that a picture needs: prompt -> text encoders -> transformer -> VAE.
 * The text encoders and the VAE are opened when they are first used, so that a training run whose
 * data is cached never loads them, and can be let go again.
 */

static bool sc__is_sd3(const sc_pipeline *p) { return p->dit->config.kind == SC_SD3; }

/* The scheduler's time shift. Single files come without a scheduler: then it is FLUX.1-dev's,
 * schnell's or SD3.5's. What would give other times, or other steps than Euler's, is refused. */
static bool sc__read_scheduler(sc_pipeline *p, sc__config *c) {
    static const char *const refused[] = {"shift_terminal", "use_karras_sigmas", "use_beta_sigmas",
                                          "use_exponential_sigmas", "invert_sigmas",
                                          "stochastic_sampling"};
    if (!sc__config_is(c, "_class_name", "FlowMatchEulerDiscreteScheduler") ||
        !sc__config_is(c, "time_shift_type", "exponential")) return false;
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (sc__config_number(c, refused[i], 0) && !c->wrong)
            return sc_fail("%s: '%s' is not supported", c->path, refused[i]);
    bool guided = !c->json && p->dit->config.guidance;
    bool dynamic = sc__config_number(c, "use_dynamic_shifting", guided) != 0;
    double shift = sc__config_number(c, "shift", sc__is_sd3(p) && !c->json ? 3 : 1);
    p->mu.base = (float)sc__config_number(c, "base_shift", 0.5);
    p->mu.max = (float)sc__config_number(c, "max_shift", 1.15);
    p->mu.base_tokens = sc__config_int(c, 1, "base_image_seq_len", 256);
    p->mu.max_tokens = sc__config_int(c, 1, "max_image_seq_len", 4096);
    p->shift = dynamic ? 0 : (float)shift;
    if (c->wrong) return false;
    if (p->mu.base_tokens == p->mu.max_tokens)
        return sc_fail("%s: base_image_seq_len and max_image_seq_len must differ", c->path);
    return dynamic || shift > 0 || sc_fail("%s: 'shift' must be positive", c->path);
}

/* What the VAE's config decides: the sides of pictures, and whether the transformer is its own. */
static bool sc__read_sizes(sc_pipeline *p, const sc_vae *plan, const char *path) {
    const sc_dit_config *c = &p->dit->config;
    int channels = 4 * plan->config.latent_channels; /* of a token */
    p->resolution = plan->config.resolution;
    p->token_pixels = 2 * sc_vae_factor(plan); /* 2x2 latents of f x f pixels */
    if (c->in_channels != channels || c->out_channels != channels)
        return sc_fail("%s: the transformer takes tokens of %d channels and makes some of %d, "
                        "the VAE's have %d: this is no plain text-to-image model",
                        p->folder, c->in_channels, c->out_channels, channels);
    return (p->resolution >= p->token_pixels && p->resolution <= 1 << 14) ||
           sc_fail("%s: a wrong sample_size", path);
}

/* What decides how the model is used. */
static bool sc__pipeline_settings(sc_pipeline *p) {
    char folder[SC__PATH], vae[SC__PATH];
    sc__model_folder(folder, p->folder);
    sc_vae *plan = sc__part_path(vae, p->folder, SC_VAE) ? sc_vae_open(NULL, vae, false) : NULL;
    sc__config scheduler = {0}, t5 = {0}, clip = {0};
    int most = p->dit->config.guidance ? 512 : 256; /* of T5's tokens, in diffusers */
    bool ok = plan && sc__read_sizes(p, plan, vae) &&
              sc__config_open(&scheduler, folder, "scheduler/scheduler_config.json") &&
              sc__read_scheduler(p, &scheduler) &&
              sc__config_open(&t5, folder, sc__is_sd3(p) ? "tokenizer_3/tokenizer_config.json"
                                                         : "tokenizer_2/tokenizer_config.json") &&
              sc__config_open(&clip, folder, "tokenizer/tokenizer_config.json");
    double length = sc__config_number(&t5, "model_max_length", most);
    if (sc__is_sd3(p) && length > most) length = most;
    p->text_tokens = length >= 1 && length <= 512 ? (int)length : 512;
    length = sc__config_number(&clip, "model_max_length", 77);
    if (sc__is_sd3(p)) p->clip_tokens = length >= 1 && length <= 77 ? (int)length : 77;
    p->text_tokens += p->clip_tokens;
    ok = ok && !t5.wrong && !clip.wrong;
    sc_json_free(clip.json);
    sc_json_free(t5.json);
    sc_json_free(scheduler.json);
    sc_vae_close(plan);
    return ok;
}

float sc_pipeline_shift(const sc_pipeline *p, int64_t tokens) {
    return p->shift > 0 ? p->shift : sc_dynamic_shift(&p->mu, tokens);
}

sc_pipeline *sc_pipeline_open(const sc_backend *backend, const char *model,
                              const char *transformer, const sc_dit_options *options) {
    sc_dit_options how = options ? *options : (sc_dit_options){0};
    sc_pipeline *p = backend ? (sc_pipeline *)sc__alloc(1, sizeof *p) : NULL;
    if (!p) return NULL; /* sc_cuda has said why */
    p->backend = backend;
    p->folder = sc__strdup(model);
    char path[SC__PATH];
    if (transformer) snprintf(path, sizeof path, "%s", transformer);
    else sc__join(path, model, "transformer");
    bool ok = p->folder &&
              (transformer || how.random || sc__part_path(path, model, SC_TRANSFORMER));
    how.widen = how.widen || (ok && !how.random && !how.fp8 && sc__small_file(backend, path));
    if (ok) p->dit = sc_dit_open(backend, path, &how);
    if (p->dit && sc__pipeline_settings(p) && (p->tape = sc_tape_new(backend))) return p;
    return sc_pipeline_close(p), NULL;
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
    sc_dit_close(p->dit);
    sc_tape_free(p->tape);
    SC_FREE(p->folder);
    SC_FREE(p);
}

/* Where the transformer and 8 GiB to work with would not fit beside them, the encoders go again. */
sc_text sc_pipeline_text(sc_pipeline *p, const char *prompt) {
    const char *bad = prompt;
    const sc_text none = {0};
    int32_t ids[SC__MAX_TOKENS + 1]; /* one more than it has to be */
    while (*bad && sc__utf8_size(bad)) bad += sc__utf8_size(bad);
    if (*bad)
        return sc_fail("the prompt is not UTF-8: byte %d is 0x%02x", (int)(bad - prompt),
                        (unsigned char)*bad), none;
    const sc_dit_config *c = &p->dit->config;
    if (!p->text) p->text = sc_text_encoders_open(p->backend, p->folder, c->kind);
    if (!p->text) return none;
    const sc__encoder *clip = &p->text->clip, *t5 = &p->text->t5;
    int pooled = clip->pooled + p->text->clip_g.pooled, most = p->text_tokens - p->clip_tokens;
    if (p->clip_tokens && p->clip_tokens != clip->length)
        return sc_fail("%s: CLIP reads %d tokens, not %d", p->folder, clip->length,
                       p->clip_tokens), none;
    if (t5->width != c->text_channels || pooled != c->pooled_channels)
        return sc_fail("%s: T5 and CLIP give %d and %d channels, the transformer takes %d and %d",
                       p->folder, t5->width, pooled, c->text_channels, c->pooled_channels), none;
    size_t n = (size_t)p->text_tokens * (size_t)c->text_channels;
    sc_text x = {.context = (float *)sc__alloc(n + (size_t)c->pooled_channels, sizeof(float))};
    if (x.context) x.pooled = x.context + n;
    bool ok = x.context && sc_text_encode(p->text, prompt, p->text_tokens, x.context, x.pooled);
    x.cut = ok && sc_tokenize(t5->tokenizer, prompt, most + 1, ids) > most ? most : 0;
    x.pooled_cut = ok && sc_tokenize(clip->tokenizer, prompt, clip->length + 1, ids) > clip->length
                       ? clip->length : 0;
    if (p->backend->memory_left() < sc__net_waiting(p->dit->net) + ((size_t)8 << 30))
        sc_pipeline_release(p);
    if (ok) return x;
    SC_FREE(x.context);
    return none;
}

static bool sc__pipeline_vae(sc_pipeline *p) {
    char path[SC__PATH];
    if (!p->vae && sc__part_path(path, p->folder, SC_VAE))
        p->vae = sc_vae_open(p->backend, path, sc__small_file(p->backend, path));
    if (p->vae && sc__is_sd3(p) && p->vae->config.assumed)
        p->vae->config.scale = 1.5305f, p->vae->config.shift = 0.0609f;
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
    int64_t channels = p->vae->config.latent_channels, f = sc_vae_factor(p->vae);
    int64_t h = height / f, w = width / f, n = channels * h * w;
    if (width % p->token_pixels || height % p->token_pixels)
        return sc_fail("encode: sides of a picture must be multiples of %d, not %d x %d",
                        p->token_pixels, width, height);
    float *latents = (float *)sc__alloc((size_t)(2 * n), sizeof *latents);
    bool ok = latents && sc_vae_encode(p->vae, 1, height, width, rgb, latents, sc__vae_memory(p));
    if (ok) {
        sc__vae_normalise(p->vae, n, latents, latents + n);
        sc__pack(1, channels, h, w, mean, latents, true);
        sc__pack(1, channels, h, w, std, latents + n, true);
    }
    SC_FREE(latents);
    return ok;
}

bool sc_pipeline_decode(sc_pipeline *p, const float *tokens, int batch, int h, int w, float *rgb) {
    if (batch < 1 || h < 1 || w < 1)
        return sc_fail("decode: %d pictures of %dx%d tokens", batch, w, h);
    if (!sc__pipeline_vae(p)) return false;
    int64_t channels = p->vae->config.latent_channels, n = batch * channels * 4 * h * w;
    float *latents = (float *)sc__alloc((size_t)n, sizeof *latents);
    if (!latents) return false;
    if (!p->backend->on_host) sc_tape_reserve(p->tape, 0); /* its memory is the VAE's now */
    sc__pack(batch, channels, 2 * h, 2 * w, (float *)tokens, latents, false);
    sc__vae_unnormalise(p->vae, n, latents);
    bool ok = sc_vae_decode(p->vae, batch, 2 * h, 2 * w, latents, rgb, sc__vae_memory(p));
    SC_FREE(latents);
    return ok;
}

bool sc_pipeline_draw(sc_pipeline *p, const sc_sampling *s, int n, const sc_text *texts,
                      uint64_t seed, float *rgb) {
    int64_t size = (int64_t)s->h * s->w * p->dit->config.in_channels;
    float *latents = (float *)sc__alloc((size_t)(n * size), sizeof *latents);
    for (int i = 0; latents && i < n; i++)
        sc_normal(&(sc_rng){seed + (uint64_t)i}, latents + i * size, size);
    bool ok = latents && sc_sample(p->dit, p->tape, s, n, p->text_tokens, texts, latents) &&
              sc_pipeline_decode(p, latents, n, s->h, s->w, rgb);
    SC_FREE(latents);
    return ok;
}

/* ##############################################################################################
 * PART IV: TABLES                                                                        >>part4
 */

/* Packed by test/make_unicode_tables.py, as tokenizers 0.22.2 has them. */
static const char sc__facts_text[] =
    "&_uCRTNE|<VL6=57A8BvARz0@`F)J.)bBsNxIB|9{HvWTbqpnkrj34s5=x/<D#+`k2[M05R%UlC}m #g_FD,/a'E+}6WBy"
    "]gCNXA]9~EG'(6of)OZN5-t5(=b!pLo*m4 mtwJFdFj}xBRP'MrYBf68#kW5XT+nm;$q)(B{^tE1BQocN{K|`/EOQhIqlr"
    "x+OM^kVH91Oqln`M)BID{$-#v<0G+vRbmIrrVb'M!SHO!c]n ~F7zPJ[!E;z<>&'Mc%,JKTx>~eKf[xZsY8XAQo'iyVWBV"
    "qaR{_]4p.`pWD*u+zsSOOei(mN9,Z|AcCdcp4&#DLjk>*x%McMIj6#1`tlr%r~e},4]BU{p@#_U4:)|lETA8MNDg5]b(W-"
    "vYU;x$<C&'mFi%gd)=8r,/%ly& `aWi03N`h;#X$OW<e^BV!5cv/s;qD )9>pgOLltbhmqb-fgOqO(#-7CQu0&sh7&/a:b"
    "z@A`M@tlaE!KaGW+b0dC-@B0%Q<_$Km%!E]<_[}$jVhjM7BU2kMKq}LwSB4;2P|'(G8jf)wV:WVJhi/:=I2#fWc+{#(IB@"
    "}fqk%D,'o*AQj.m%Zm m;/D[+D38a(@/Rn+Bd2dXwOW/+uXv,FX>,ZIuX@7UZH/TyIWsW_E[d;xIV<*YX;%k2u&w]3&u&u"
    "9Nv*u%Ko!r]RX}'p>a^4SZ4t3t-tRV8y4#{OC. [jupZTdMphM_sf=_&Gg6|B=wvJ&7H]~J^y-(m ZhDsk9[AjE4$_vaC;"
    " + _]r~,wpkw`D.(#TMLB-P'fZ[T}3QD2NSLuEcr_#u>G[T''MmLP#$Z!iH.|hslX9*/t5GDXH9cI=tKW7#P]H,xd7u/8["
    "IbF:XpyqG!r,pM=R:[cIH77;xk>$*};@0W_+`MwS6k~ jwj6C>N<Vd8hVLmqz55pYpxs;@;U 9rAvf4mO<a[(!0L'0i.V]"
    "w,9:]1bDATAjZh6l8I6>ww-9}Id5VzUIXDaIZ#4FF1[,EZ7kL@qCjP9X/:;E||ctxX3jZ{AXgOb}8lnt}/0z;G*z[wGqVG"
    "(5X<M|fbQ7cDw6cB_L{pZ D=U Vkn@ 9Eu1W6sW0`pJxKE:k=x_T4u0Xl6n &oo`yHBm+4xQ:O@/w$Z#t4p[1QOK`l_&dI"
    "vZ{nu[+C+au1^g&7V.ydp1vF-*YvY7SCJ)Vu/3-bBOpn95.8n7+:2aGa6.!~fvD@1T}h){S!7{;t>#K_sw:4)2{F]OaZ`q"
    "LCCD @JE,CjxYSs_bEC2j:kp3#O|sD[|RN!ndmtL}5vIeZBE:Bxlvu2{S)ERxay$eT$t]/GYU_ElXqUW2eJOxT&#<Zf<R,"
    "uyMkYbJ]M074+eOg8p-HY^QP'dH*M0o0BWV.7o+01Jh;w>o1RGSbH$JBefQ%Q'Cn$YX-k`xnJJfZY>t1c0pJJ|M`)iCS%R"
    ".lGT25]OJYb53ftL4]sktkv&86!N)eajsHak{RB7%cz8GzmIN9vatlp[ur4ao]X1UI9'a Y7 -y(s({vuGVUA:83<XSg+]"
    "|@cUaF_;aQ5NGWEy%5'NI3Ux{Oa`CaX**<{T14e~94BMKs</ D ~L@IOPf~rScS6,i!eO/x-,0+u$nPcEX<){Jvr9)yB6{"
    "S'#BKbv354LIgqt1Z^ROdV&]FGb 5lt<qpf9S6{;{a:$>PDm*O`6!/U03Li/>%vLAyUOqqiE7-@rNSCb^ZVXP#g&t{TKel"
    "Kyx6'dio.%qq|<A6]fTsyhJpMsWFzecu0y>OvZnm89kv^! X%{5rTjv31,|SdO_sK^XP_57 k'`7%&3jn>;rNDAW5vm;#J"
    "5:XjFZ>.-RQ5m5Y>'Z= WEEK@6o]1`8bd87b^$V>Q|CPUh;5giMLcp)Pi=,Q(iq133us3eP(NkK(nFnqz9>Td,Fl6_L$TK"
    "+l9uF_NO:GkUIVoQp3hj$n-6_`7=6.'.eVRh#Y7=n~.&R)}OWJ*~/D]]9yQ5XDw.],jisOQ]*pO>.YB`x T2X5:Q/m-v|}"
    "pH'sWW#=i H{MuRX;N>ow-6#-XGv<yM}GD q&EJjwEjPMK}cdRM-(rT]6dhj[}6>VHY!OoG3adXYdqbIWdL&I9jv7$~Ni@"
    "Jt&dMw+l/yygS}SQ;*@i2t+4]nbRA8k,[//_7t'Qy]gIF{@p7>DY3t4F+S9B'Y4bS3/WC@,@Zp*3'(L/a$rWa{$uFrMw+6"
    "wtq>ULM7,UYO2XO_u21Jo$iHoYDbr9]#0rFO,+U9EN^.;]C%E^7$Fk}D/r2ZlvWg]1YK}r2:,5~lVg`fk}/'(XsJAa`e:y"
    "AbZ<YwOTj98=RyxtAiUU3lzy}+Ok:E-kY0UpNzSsogyji'*Z_LOP8ER0^zQ*kww(3=^Jc-LTohsoTi`.UM:*n]]]xdeIEb"
    "&6@@7[KABk)kwj]da|w}nyQARy1C`I|&:P49 vN*2S`!;9gKZPW,'E0ZO1!9+4v}Ax}rPjb3X%gkE{[pWyq$q1~kdk6Z+c"
    "{A,rP)#wO1WE+L67z<VT/(]L]E2KE9|3Bf4Bu8c|1SbhN6Vyp/7=N*CKcX^rV3wZ<=l5GZZc`Qe%SJ(r4mhkL~chy;ojJ/"
    "8xJ)g`@RHJ2HOmcMGY+J5qt.E;07CU]dq,L:z&w/h'46GwX/VLxlo3m:*Ag[Pv,[H#DdtvKK#GB7@eBgPjR|H]n._e8d #"
    "K9o8EQZIS/Ayl:d)L270Fgo`<qwhRyHtG0LU/#(G.De]Zb`Jj+o1)SpA!o<`hP&haHWzQF&B/W7w0+3]F;n'i}f%7DhBjP"
    "g,P2zK%S4vi>ebE#^_yvwQ-@^/26h_{S`1(Xw*Wgs8WO=75l2f@JHdSP|T$!M$!{p_R8xhF%kitL5%WdR4'sBL&*_eAqO4"
    "* S<GoUW2HI2$r[3:I5:@VQnQ%F%m]2(G5{%FFDI^ftYW_{ehZbxU @Z#FK*<`Q$%E f4u|+Bjg:iP]qy:44W6O&UT%$97"
    "Es`1:)fS'[WVge@*<%9v0c'l3:Xr;7RPsG4Z9qhgM[A9HG}@DZ8B3HhF0t[%R^B>_'(H1I/uz_d!GnnU=T4Wg{4!9KLZ!4"
    ":V4&vZBrGf9|][MT,c{XG46Rs,dq~x,Al>0j^:QEbv~p8{7Ws<Iu^;UB10gI'Pz]<G9AIrhA5+_V/Q@c'N!Y9nw0u*Z%0/"
    "Ax|$h'X3:[`g5U}kT1$XA%TX z^eDNKQA/oeBP-G>RICHT@Y{opPO[H:H18;:.@CN&iGA~Qa%y#kSC5dAlolymLj]OJ!e)"
    "9n2vw4%G{:O=0CB|v2Zhuunp.KZo^mj~f/Gd}M7-WaT@$g5O+v}=GDG_Nk}l:8:=(!LG.Hfq!}AzpHoP7RF%~&sH.;qLL`"
    "zzsrM Y&MdoH1RYgFwFK4;>+*h&$RJcHvt3wL]^x;JsV.*sbNWOHx<S9jVH.R3)]Se;Eti>'XcTUeNf-x^shm&DG4KzF-B"
    "7w|#7Z7R1!&Ay4^U[@-}htkO;,H^[ PkcGo`lQaD^H:.d5{*O2)]^lGejI#Jv/VLm]8qHfD^P3}u3-.*OH)SbKJ'L_o>)g"
    "AV=Jt<0{[OwuZy`5=)<-l*G<A5a*^R{jc}faO-wwD8O1Ut>4lo44Dnjt0J8%&ZnJkEh";
static const char sc__pairs_text[] =
    "~f>KiSI5R^%RyK:8+TtE>:hNAO3ZCK*QJ)'>9{RlK&mI =_ZjoVB2~,rvXL,%WVNcy(n4^k+Ghc>b=:{/@EC_DTThqKFK0"
    "AcNI8]`9.ijQYBXm[w956D#gN]'X'6k.Hh0gJf|4&y:]'6IJ#yB2{f*S)m=}h-}gXNEVz>8@)St4d)j_Gw G6&&z<&zySG"
    ".5y1^IJ&b]A--+R2kfoG!2]q6a8`r)S.'B#DH=:^s54_`)/OeDOWqj'Xpnpu9JKqU#;l3dL>.^W7lhb[FsSD:.},gD)`EH"
    "EmqV-<8Q_oP V-#u~pff,j[KDN:hWsNix]64HvJ>0GvXcBFm32Whdg#.}y@jQjBgL4G Z')fG>:K'[QS}VyM>sS$0=n$|A"
    "V:PocQd-pxkHen^+UGy%6E@lk~bHQn9>2AFDrQq2NYFf$^UT,y_=.*7EB6O.I2>^~^cTy>Y>1V3]~JRmZ:{aTFOjb6PSh="
    ":fQdD')wj!O!XqFwFFapF&w#SF3=vfgM(Vu>g(&(p ao,]m6)qc#f/0kvjJ~>Fh)X>Q/Ci85vQd09V^Wa[#Kq$6W1'*TIB"
    "3R78]f1.YY|$nXn#9p!pV+t26js9<)K|[[_7NZ%c)dP06!4VSa(*S%}h&H0VIAQ4Y>Is}IyVs@}TaU=P&9_Z/7l`*xYRa8"
    "M~< 1x$]b o6hKIIPF}B/P{P&9nj'NI1Qx0eoIA2oP&W{wXlHclBSDxF&+Sff}<LW.7ln(2R{)D<Ah`.o5V3qy~91*B^{O"
    "TUtBQ{/;<%sB8+rl{[)]jDj3b2tfl(D%T7g(,VPi$*{$7]DA';Sg-zCCQMfi/,_RQ_IfRK8XvubM.Z-YNo~IN'O'3RX4$~"
    "PI|.d|m$u:r=Y9ye#Wb$vSNoBT=(4B%vSBN{2c(-5`@#`#_4Xz3j]{SsS: 'M0%VLEf;C%ezazFGtKS'zZ2Gs~^6:A<LcR"
    "PF!DkzKfz}M/8t9@%y']I#sYCJIy5SyNI^g%keuWQ-}YDM{Rl$TVhN],ZCH$=GuN,^31px9fvI%@l&L%[N>uMP7X^#avti"
    "vz)4{,yuNQ}jE}sgU{|*0=m',;kAQtqGo(od<,p;<V'h!Z[=T0hP2+aSHS8%3xA6^)H09.#XK*-5}3LATC8aH[oXsUUC3E"
    "~GRtTOV5=A^+X2UrsT~)0+]1_]s^8w'Q5'HE!_mI}UM8K=BF0@)izk5ejyxxR4zY54mZ&=G>1~JB:^A*4L69k`t8)@)!`^"
    "x=Vtz.2({Y^x$DDR={)2Gwxy6>v-b2b4ds-RNELf{38ElS-L<$%  eBcd:`6]U._g0p5 -FsUi-R3&x&MLDdBJ@<zpEw/c"
    "Xf6zB.~@Qz%p*,`!fk!3- pbr3J_>Fy[sS:xe_nEk v^sOjQsMn8SVToI|UV}[Uu4n)K]I.u<OFt<uH[kP$aD-ZcXYkIh1"
    "BMgJKdm%ew Ukf]e(1aN8T:4X-)RYx<s%(@^b1;>E1TrQ3Ck1d`=Qe&3T+3(zaw,pwbJOt:&f*rQl19db0icf+Xjz:{_FT"
    "t#cz1^'[]J>bAG(J<+6&P;@l1= 'fqBf{&Ib!Bzzt(p]!MbVgSFD5D)xal$UNsucQ6>7_,^8`f`fY6h]Bg$;,o>D1:'>H)"
    "3j[BWnT@B7'OXHLe`Jgi~KG ky`F5=U;<ZJ!m*rQm0HO-^m-8l(-e[}eS/wP[S3_w:*_+O}[Wlc/ke%JhS~apvf-V:zWxu"
    "KnU|M+3>Q1],rp_CK'hM49e!7:GW)5a/RF=~sGlZ1C`#fD)VJ5Eg8j^)jl^rm5s6}@szvMq.F9iCDG5YtTF&$)d1N(_I^`"
    "B8j5Utz}9<M/_)Qb$.EMF'B1Qf!lV*F+@];==Z-vPaSl2U01dlHN2#lS1(w6^.[c`v<=VR:hIi|~hCQwhqXAkD'#:ovQt#"
    "]urQjr}:P8QdC#RecR;LMEN_+OCdwh':xpG'm|Ld&H0[}*4[)AKHAajj#j0de'*jvHvHAqiE$2'1Uw& ond>$_Cu=(L];k"
    "d5 p5N61.yu~+},}}*fg6VF$a |y:DU`fC=|xm=Ku!$7l9sPP/hKr2JR!;LrW1pr`{6-:3/aB6!&)uFD:,]#'L|KQU*R3#"
    "il`13i]ZH@FboYrZ$a4m91DC,E7X-K(UTi5ApMxIf2|JdWhdi(i!JH>$CG`09!cuOwOR4T}+iND0K3+]klLJg6bPI695rz"
    "ey7oi*T~ M]v*P))6p=HSwc]RXm]E7$h</vh.jjb&f>mn);0HURu5~.:;'myKD`v {<*8;B }$V5Jc5dFd2+BaQF-kFqvx"
    "g$<#:%[0T&aH*}uu1C*u2II&I(O&M2H)_7]%.h1Ab=hjIS~J+$&{Q F3E.7=Rh^ICE7LKa,~d]~Dq2yarPGJ)Y[`Qv*iC["
    "4WPGH39Hd!*zBeJJY~J.VZ'`sKXE,<51D,Y%tAdQ[sZ^o#4eHWVtlqF9^qOI(1W!%+]psA}BBzMv}.!{D^$5>erO~tZYt!"
    "i!6+S'<f09j%HSu=Y%-)~|N1[;~Hq/Yw2A3qR=) F(@]EW%@I>j0jd)/Bl=c5.kiW`7lI;>xm)0h]kC'ph,VfV<&U;3)YB"
    "L+=BdN-,YyRasy{(FAuV;hf|@<SecMb/}DT,}MGQrmfQi5fqYj,'EG|aY<fk64P0rX<}5h@m]+|Z`A@4e'.ik5HiGr0+.3"
    "<!GXg%:M2Q:LfRt:T=bBlcwlt7uY9;kH=BxC,1OqD(d~-+FQ1,)sg[f~BIfYzm91M)o_jB%mzKB1f9EME'1<)Ly=zqG/'L"
    "K!#{|ySK 8Y{^pE$|2CMD3Xr2 zk}9F1D_)_)Or{=:gazE}71{],C=QLf$PIO__{--TrgG@aKKFfI}%]_HAYj@]DH<L.aD"
    "52w7NnAt51!t&|Qz.uYX$gRZu8$vBf|.iU4ZqQ1]>T61Y0.LkQdBb[#b6n)~fLs cNbwn1`2JlS<`SK<:jIb=w:+oGz9aJ"
    "UwkXzHCKa@Bs^MGv/KHpK7p(TlRh[KVbP2<5Pn;8_5,%8YyMeMmPh*ZTO)@@)zX|!xq}<zGZAm<:aeA0B^viBhsw>j}*[%"
    "J-*v+|Iref%W1FqyN$dI5U7,_ pR#AnH;Pc,ppyMiaXu-B}TdB3%-;G:Yhy&uOLaWRIaav9'029)4.u4N9UYq+pJg8Zrd'"
    "unvcBu(3wk5<Dx)au4s{h`iY_/R4&vPj2J*cF8,noBhq,dQLE$:l<'s[u]w!2yc%Qz:zn&%QTIG9$ii5NQK8!dCc}_Pzy/"
    "7+A1tV.un3h!u`8#PM|ew-HLR7i.9uh>KUaLlm'<hczB+whX1ao.1e)A|VubB87hY4nWB#yGhLMp9cHu3z]3(a~<%=9PS}"
    "ENd^asA8-;}GDb%H.H2iXXbHE7G04{Z*+!3znq1[mCRyWoN,WgahfS=r.KEP[<H&bX@<clOT<'uVOePD:[w iHm!{CZTyx"
    "caXM$]%Z$Fjt5pdVL#4l mdkZ;Y_/8u2TjV3zA<Y&ZRIYWm$$k(7DUpd;M:S'$)`:LFaBaO)0x(9Us7R{'{<J72J=[M3|$"
    "QoL8^n=%ok|6ZbsX|JlinD@Xmvj7R^Cernu;e0[u#6xg@<LCa[;GTUh2M>UXg+m/CJI#dPdo*~_Ow/65[R3%Z5{5$4Cg'c"
    "25O8j>JfPH_]r4:v~@3{!y-9VNZv7:wu28' JLINj8+Tl>/ 6)l$`uBKFcW}D!Zk#FAW$L03.xo_Ex8Oz:|_>C~5sosKl,"
    "fW%:{9tu.|0{(FZM{VZsKp,+K^Sb^H<]nE,h].03:DBK 1LHj,`8OVR(-Vj35{1s[4!^n%.qRY'MVw!D@82-6(Yq-KzU/."
    "*g[M96+qj!}#MY^x9 @#Q6Zd.x)C{u}<I*vMTS<>`hdA@=E(jg`<Uf^Ox{+k7_NXg`j=U@rt6^K1z`UJ/hh7a<eN#^B=.J"
    "HkNoFL35'80ahIbd1#`11)G<@S6sjGO>Mpa-B#7E|[{@T$[LTIDc_OC.1'.HY8z5{oYGH-0A0+k9O@2 kK/5fZ!aQe]o=V"
    "v4*0.NUgtX45|vu.DhQ1]ln$bULHdq1!c&/ADpRFVFj#hIxE7eM{O7=R0L!;X;uYn(T340j/hcim+E'Rn ";

static const char *sc__packed_text(bool pairs) { return pairs ? sc__pairs_text : sc__facts_text; }

#endif /* SHORTCUT_IMPLEMENTATION */
