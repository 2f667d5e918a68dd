#ifndef SHORTCUT_H
#define SHORTCUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ==== Errors ==== */
const char *sc_error(void); /* the last failure on this thread, one line; valid until the next */

/* ==== Random numbers ==== */
typedef struct sc_rng { uint64_t state; } sc_rng; /* the seed is the first state */
uint64_t sc_random_bits(sc_rng *rng);
float sc_uniform(sc_rng *rng);
int sc_uniform_int(sc_rng *rng, int n);
void sc_normal(sc_rng *rng, float *x, int64_t n);

/* ==== Tensors ==== */
typedef enum { SC_F32, SC_BF16, SC_F16, SC_F8_E4M3, SC_F64, SC_I64, SC_I32, SC_U8 } sc_dtype;
#define SC_MAX_DIMS 5

typedef struct sc_tensor {
    void *data;                 /* contiguous, row-major */
    void *grad;                 /* d loss / d data, same shape; NULL until something asks for it */
    bool needs_grad;            /* backward passes reach this tensor */
    sc_dtype dtype;
    int ndim;
    int64_t shape[SC_MAX_DIMS];
} sc_tensor;

int64_t sc_count(const sc_tensor *x);
int sc_dtype_size(sc_dtype dtype);
const char *sc_dtype_name(sc_dtype dtype);
void sc_to_f32(float *dst, const void *src, sc_dtype dtype, int64_t n);

/* ==== JSON and safetensors ==== */
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
sc_file *sc_file_open(const char *path);            /* a .safetensors, an .index.json, or a folder with either */
void sc_file_close(sc_file *file);
const char *sc_file_path(const sc_file *file);
int64_t sc_file_count(const sc_file *file);
const char *sc_file_name(const sc_file *file, int64_t index);
const sc_tensor *sc_file_tensor(const sc_file *file, int64_t index);
const sc_tensor *sc_file_find(const sc_file *file, const char *name);    /* NULL: absent */
const char *sc_file_metadata(const sc_file *file, const char *key);      /* NULL: absent */

typedef struct sc_named { const char *name; const sc_tensor *tensor; sc_dtype dtype; } sc_named; /* dtype: as written */
bool sc_file_save(const char *path, const sc_named *tensors, int64_t count, const char *const *metadata);

/* ==== Backend: the operations, behind one table ====
 * Every pointer inside a tensor that a backend is given is memory of that backend. Activations have
 * the type `activation`; LoRA factors, optimiser state and losses are f32; frozen weights keep the
 * type they have on disk. `_backward` functions add into the gradients of inputs that need them. */
typedef struct sc_matrix {      /* row-major; `transposed`: used as its transpose */
    const void *data;
    sc_dtype dtype;
    int64_t ld;                 /* elements from one stored row to the next */
    bool transposed;
} sc_matrix;

typedef enum { SC_SILU, SC_GELU_TANH, SC_GELU, SC_QUICK_GELU } sc_activation;

typedef struct sc_adamw {        /* one step of AdamW */
    float lr, beta1, beta2, eps, weight_decay;
    float grad_scale;           /* gradients are multiplied by this first (clipping) */
    int64_t step;               /* 1 for the first */
} sc_adamw;

typedef struct sc_backend {
    const char *name;
    sc_dtype activation;
    /* Memory: NULL with the error set when there is not enough. */
    void *(*alloc)(size_t bytes);
    void (*release)(void *p);
    void (*upload)(void *device, const void *host, size_t bytes);
    void (*download)(void *host, const void *device, size_t bytes);
    void (*zero)(void *p, size_t bytes);
    /* C[m,n] = alpha op(A) op(B) + beta C + bias; bias [n] or NULL. */
    void (*gemm)(int64_t m, int64_t n, int64_t k, float alpha, sc_matrix a, sc_matrix b, float beta,
                 sc_matrix c, const sc_tensor *bias);
    /* dst[r][c] (+)= src[r][c]: concatenation, slices, and their gradients. */
    void (*copy_block)(void *dst, int64_t dst_ld, const void *src, int64_t src_ld, int64_t rows,
                       int64_t columns, sc_dtype dtype, bool accumulate);
    void (*column_sum)(float *sum, const void *x, int64_t rows, int64_t columns); /* sum[c] += */
    /* y[b] = p[b] * u[b] + q[b] * v[b], one pair of host coefficients for each of the B samples. */
    void (*blend)(sc_tensor *y, const float *p, const sc_tensor *u, const float *q, const sc_tensor *v);
    void (*embed_timestep)(sc_tensor *y, const float *t);
    void (*activate)(sc_activation kind, sc_tensor *y, const sc_tensor *x);
    void (*activate_backward)(sc_activation kind, const sc_tensor *y, sc_tensor *x);
    void (*multiply)(sc_tensor *y, const sc_tensor *a, const sc_tensor *b);
    void (*ln_modulate)(sc_tensor *y, const sc_tensor *x, const sc_tensor *mod, int shift, int scale);
    void (*ln_modulate_backward)(const sc_tensor *y, sc_tensor *x, sc_tensor *mod, int shift, int scale);
    void (*gated_residual)(sc_tensor *y, const sc_tensor *x, const sc_tensor *h, const sc_tensor *mod,
                           int gate);
    void (*gated_residual_backward)(const sc_tensor *y, sc_tensor *x, sc_tensor *h, sc_tensor *mod,
                                    int gate);
    void (*norm_rope)(sc_tensor *y, int64_t offset, const sc_tensor *x, const sc_tensor *weight,
                      const sc_tensor *rope);
    void (*norm_rope_backward)(const sc_tensor *y, int64_t offset, sc_tensor *x, sc_tensor *weight,
                               const sc_tensor *rope);
    void (*attention)(sc_tensor *o, const sc_tensor *q, const sc_tensor *k, const sc_tensor *v,
                      int heads, float scale, const sc_tensor *bias, bool causal);
    void (*attention_backward)(const sc_tensor *o, sc_tensor *q, sc_tensor *k, sc_tensor *v,
                               int heads, float scale);
    void (*layer_norm)(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                       float eps);
    void (*rms_norm)(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, float eps);
    void (*embed_tokens)(sc_tensor *y, const sc_tensor *table, const int32_t *ids);
    void (*group_norm)(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                       int groups, float eps, bool silu);
    void (*conv2d)(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b, int stride,
                   int pad_before);
    void (*upsample)(sc_tensor *y, const sc_tensor *x);
    void (*swap_axes)(sc_tensor *y, const sc_tensor *x);
    /* Loss and optimiser, all f32. */
    double (*mse)(const sc_tensor *prediction, const sc_tensor *target);
    void (*mse_backward)(sc_tensor *prediction, const sc_tensor *target, float factor);
    double (*sum_squares)(const float *x, int64_t n);
    void (*adamw)(float *w, const float *grad, float *m, float *v, int64_t n, const sc_adamw *o);
    void (*ema)(float *average, const float *w, int64_t n, float decay);
} sc_backend;

const sc_backend *sc_cpu(void);
void sc_set_threads(int n);         /* CPU threads; 0: one per core */
const sc_backend *sc_cuda(void);    /* shortcut_cuda.cu; NULL with the error set: no usable GPU */

/* ==== Tape: eager operations, recorded when a gradient is wanted ====
 * Every operation returns a new tensor in the tape's arena (valid until sc_tape_reset), or NULL with
 * the error set; an operation given NULL returns NULL, so a model is written without checks and
 * tests its last result only. Shapes: B batch, T tokens, C channels, H heads. */
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
void sc_tape_use(sc_tape *tape, const uint8_t *set_of_sample); /* [B] sc_set each; NULL: all teacher */
size_t sc_tape_bytes(const sc_tape *tape);               /* memory held */
bool sc_backward(sc_tape *tape);                         /* from the recorded loss to every leaf */

sc_tensor *sc_new(sc_tape *t, int ndim, const int64_t *shape);         /* activation, not initialised */
sc_tensor *sc_from(sc_tape *t, int ndim, const int64_t *shape, const float *values); /* upload of f32 */
bool sc_read(sc_tape *t, const sc_tensor *x, float *values);            /* download as f32 */

sc_tensor *sc_linear(sc_tape *t, const sc_tensor *x, const sc_linear_layer *layer); /* [..., in] -> [..., out] */
sc_tensor *sc_activate(sc_tape *t, sc_activation kind, sc_tensor *x);
sc_tensor *sc_add(sc_tape *t, sc_tensor *a, sc_tensor *b);              /* same shape */
sc_tensor *sc_multiply(sc_tape *t, sc_tensor *a, sc_tensor *b);         /* same shape; not recorded */
sc_tensor *sc_ln_modulate(sc_tape *t, sc_tensor *x, sc_tensor *mod, int shift, int scale);
sc_tensor *sc_gated_residual(sc_tape *t, sc_tensor *x, sc_tensor *h, sc_tensor *mod, int gate);
sc_tensor *sc_norm_rope(sc_tape *t, sc_tensor *text, sc_tensor *image, sc_tensor *text_weight,
                        sc_tensor *image_weight, const sc_tensor *rope);
sc_tensor *sc_concat_tokens(sc_tape *t, sc_tensor *a, sc_tensor *b);    /* [B,Ta,C], [B,Tb,C] -> [B,Ta+Tb,C] */
sc_tensor *sc_slice_tokens(sc_tape *t, sc_tensor *x, int64_t from, int64_t count);
sc_tensor *sc_concat_channels(sc_tape *t, sc_tensor *a, sc_tensor *b);  /* [B,T,Ca], [B,T,Cb] -> [B,T,Ca+Cb] */
/* softmax(scale q k^T + bias) v, head by head; q [B,Tq,C], k, v [B,T,C]; bias [H,Tq,T] or NULL. */
sc_tensor *sc_attention(sc_tape *t, sc_tensor *q, sc_tensor *k, sc_tensor *v, int heads, float scale,
                        const sc_tensor *bias, bool causal);
sc_tensor *sc_timestep_embedding(sc_tape *t, const float *times, int64_t batch, int64_t channels);
sc_tensor *sc_blend(sc_tape *t, const float *p, sc_tensor *u, const float *q, sc_tensor *v); /* not recorded */
bool sc_mse(sc_tape *t, sc_tensor *prediction, const sc_tensor *target, float weight, double *loss);

/* Operations of the frozen networks (text encoders, VAE, evaluator); not recorded. */
sc_tensor *sc_layer_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b, float eps);
sc_tensor *sc_rms_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, float eps);
sc_tensor *sc_embed_tokens(sc_tape *t, const sc_tensor *table, const int32_t *ids, int64_t batch, int64_t tokens);
/* Pictures are [B,C,H,W]. conv2d: w [out,in,k,k], b [out]; zero padding: pad_before on the top and left,
 * and on the other sides as much as makes H_out = H / stride. upsample: nearest, twice the sides. */
sc_tensor *sc_conv2d(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b, int stride, int pad_before);
sc_tensor *sc_group_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b, int groups, float eps, bool silu);
sc_tensor *sc_upsample(sc_tape *t, const sc_tensor *x);
sc_tensor *sc_swap_axes(sc_tape *t, const sc_tensor *x);  /* [B,M,N] -> [B,N,M] */
sc_tensor *sc_reshape(sc_tape *t, const sc_tensor *x, int ndim, const int64_t *shape); /* same data, new shape */

/* A block reads in[] and makes out[0] and perhaps out[1]. sc_checkpoint keeps its inputs (at most 5)
 * only, and runs it again in the backward pass. */
typedef bool (*sc_block)(sc_tape *t, sc_tensor **in, sc_tensor **out, const void *context);
bool sc_checkpoint(sc_tape *t, sc_block block, const void *context, sc_tensor **in, int inputs, sc_tensor **out);

/* ==== Weights of a network ==== */
typedef struct sc_weight { char *name; sc_tensor tensor; bool owned; } sc_weight; /* owned: not the mapped file */
typedef struct sc_net {
    const sc_backend *backend;
    sc_file *file;              /* NULL: all weights are drawn at random */
    sc_rng rng;                 /* for random weights */
    bool widen;                 /* all weights become f32 (to train them, or for the speed of a small model) */
    sc_weight **weights;        /* in the order they were asked for */
    int64_t count;
} sc_net;
sc_net *sc_net_open(const sc_backend *backend, const char *path, bool widen);  /* path NULL: random */
void sc_net_close(sc_net *net);
/* The weight `name` with exactly this shape (matrices keep their type on disk unless widened, vectors become f32);
 * NULL with the error set (which names the file, what was expected and what found). */
sc_tensor *sc_net_weight(sc_net *net, const char *name, int ndim, const int64_t *shape);
/* "name.weight" [out, in] and, with `bias`, "name.bias" [out]. */
bool sc_net_linear(sc_net *net, sc_linear_layer *layer, const char *name, int64_t out, int64_t in, bool bias);

/* ==== FLUX transformer ==== */
#define SC_MAX_NAME 128

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

/* Opens `folder` (config.json and weights). random: weights are drawn from `seed` instead of read. */
sc_flux *sc_flux_open(const sc_backend *backend, const char *folder, bool widen, bool random, uint64_t seed);
void sc_flux_close(sc_flux *flux);
const sc_flux_config *sc_flux_config_of(const sc_flux *flux);
int64_t sc_flux_parameters(const sc_flux *flux);
void sc_flux_checkpointing(sc_flux *flux, bool on);     /* recompute each block in the backward pass */

/* Writes config.json and diffusion_pytorch_model.safetensors (weights as `dtype`) into `folder`. */
bool sc_flux_save(const sc_flux *flux, const char *folder, sc_dtype dtype, const char *const *metadata);

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
 * All trained numbers lie in one f32 array, in up to four copies (sets), so that a set is chosen by a
 * pointer and one call updates everything. They are either the LoRA factors or all weights. */
typedef struct sc_params {
    const sc_backend *backend;
    int64_t count;
    float *set[SC_SETS];        /* NULL: not there (the teacher of a LoRA is the bare base) */
    float *grad, *m, *v;        /* gradients and Adam's moments */
    sc_flux *flux;
    sc_adapter *adapters;       /* one for each of the model's linear layers; NULL: all weights are trained */
    int rank;
} sc_params;

/* A new LoRA on every linear layer: A gaussian (std 1/rank), B zero; attached to the model until freed. */
sc_params *sc_params_lora(sc_flux *flux, int rank, float alpha, uint64_t seed);
/* All weights (opened with `widen`); teacher: keep a frozen copy of them. */
sc_params *sc_params_full(sc_flux *flux, bool teacher);
void sc_params_free(sc_params *params);
void sc_params_use(sc_params *params, sc_set set);          /* all weights only: compute with this copy */
void sc_params_copy(sc_params *params, sc_set to, sc_set from);
/* Clips the gradient to `clip` (0: not), steps AdamW, moves both averages, clears the gradient.
 * Returns the norm before clipping; NaN or infinity: nothing was changed. */
double sc_params_step(sc_params *params, sc_adamw *adamw, float clip, float fast_decay, float slow_decay);

/* ==== LoRA files ====
 * safetensors, PEFT names: transformer.<module>.lora_A.weight [rank, in], .lora_B.weight [out, rank]. */
bool sc_lora_save(const sc_params *params, sc_set set, const char *path, const char *const *metadata);
typedef struct sc_lora_report {
    int applied, total;         /* adapters: a pair of A and B each */
    char missed[512];           /* names that fit no layer, separated by spaces, cut with ... */
} sc_lora_report;
/* Adds a LoRA file to a model, under the teacher set (what sampling uses). False if no adapter applies,
 * or one that names a layer has the wrong shape. Stays until sc_lora_unload. */
bool sc_lora_load(sc_flux *flux, const char *path, float scale, sc_lora_report *report);
/* The scale that a LoRA file's metadata recommends for a number of steps ("3:1 8:0.6": the nearest); else 1. */
float sc_lora_scale(const char *path, int steps);
void sc_lora_unload(sc_flux *flux); /* takes all loaded LoRAs off again */
/* Copies a LoRA file's factors into the sets of `params` (all of its layers, the same rank). */
bool sc_lora_start(sc_params *params, const char *path);
/* W += scale * B A for every loaded adapter (the model opened with `widen`), then unloads them. */
bool sc_lora_merge(sc_flux *flux);

/* ==== Flow matching ====
 * t = 1 is noise, t = 0 is data: x_t = (1 - t) x0 + t eps; the velocity is eps - x0. */
float sc_shift_time(float u, float shift);                      /* s u / (1 + (s - 1) u) */
float sc_dynamic_shift(int64_t tokens);                         /* FLUX: exp(mu(tokens)) */
void sc_schedule(float *times, int steps, float shift);         /* steps + 1 times, from 1 - 1e-5 down to 0 */

typedef struct sc_sampling {
    int steps;
    float shift;
    float guidance;
    int h, w;                   /* grid of tokens */
    const uint8_t *sets;        /* [B] LoRA set of each sample; NULL: the loaded LoRAs, if any */
    bool (*progress)(void *user, int step, int steps);  /* after each step; false stops. NULL: none */
    void *user;
} sc_sampling;

/* Euler from noise to data: latents [B, h*w, in_channels] (host f32) holds noise before, the sample after.
 * context [B, T, text_channels] and pooled [B, pooled_channels] are host f32. */
bool sc_sample(sc_flux *flux, sc_tape *tape, const sc_sampling *s, int batch, int text_tokens,
               const float *context, const float *pooled, float *latents);

/* ==== Objectives: flow matching, SCFM, guidance distillation ====
 * An objective decides what the student is asked (noisy input, time, guidance) and what it should
 * answer (target); all share one batch and one student pass. */
typedef enum { SC_SCFM, SC_FLOW_MATCHING, SC_GUIDANCE } sc_objective;

typedef struct sc_recipe {
    sc_objective objective;
    float teacher_ratio;        /* SCFM: how often the first half-step is the teacher's */
    int teacher_steps;          /* N of the teacher case */
    int self_steps[8];          /* N of the self case: one of these, ended by 0 */
    float shift[2];             /* the random time shift: uniform between these */
    float dynamic_shift_ratio;  /* how often FLUX's dynamic shift is used instead */
    float guidance[2];          /* uniform between these */
    float fm_ratio;             /* SCFM: part of the batch with the plain flow-matching target */
    float caption_dropout;      /* flow matching: how often the caption is left empty */
} sc_recipe;

typedef struct sc_batch {       /* host f32; one text-picture pair per sample */
    int size, h, w, text_tokens;
    const float *x0, *noise;    /* [B, h*w, in_channels] packed latents; N(0, 1) */
    float *context, *pooled;    /* [B, T, text_channels], [B, pooled_channels] */
    const float *no_context, *no_pooled;    /* the empty caption's, one sample */
} sc_batch;

typedef struct sc_draw {        /* what chance decides for one sample */
    bool flow_matching;         /* plain target eps - x0 at time t[0] */
    bool teacher;               /* first half-step by the teacher, else by the fast average */
    bool no_caption;
    int steps, j;               /* N, and the even index into its times */
    float shift, guidance;
    float t[3];                 /* t_j, t_j+1, t_j+2 */
} sc_draw;

void sc_draw_sample(const sc_recipe *recipe, sc_rng *rng, int64_t tokens, bool flow_matching, sc_draw *draw);

/* A velocity model in four versions (sets), as an objective sees it; [first, first + x->shape[0]) says
 * which samples of the batch x holds. FLUX is one; a toy network may be another. */
typedef struct sc_model {
    sc_tensor *(*velocity)(void *self, sc_tape *t, sc_tensor *x, int64_t first, const uint8_t *sets,
                           const float *time, const float *guidance);
    void *self;
} sc_model;

/* method.md's steps 5 and 6 for the samples [first, B): noisy input x and target, both [B-first, ...]. */
bool sc_scfm_target(const sc_model *model, sc_tape *t, sc_tensor *x0, sc_tensor *noise, const sc_draw *draws,
                    int64_t first, sc_tensor **x, sc_tensor **target);

/* One training step's gradient: draws, target, student pass, backward. Resets the tape. */
bool sc_train_gradient(sc_flux *flux, sc_params *params, sc_tape *t, const sc_recipe *recipe, const sc_batch *batch,
                       sc_rng *rng, double *loss);

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
} sc_vae_config;

typedef struct sc_vae sc_vae;
/* Opens `folder` (config.json and weights); widen: converts the weights to f32 once, now. */
sc_vae *sc_vae_open(const sc_backend *backend, const char *folder, bool widen);
void sc_vae_close(sc_vae *vae);
const sc_vae_config *sc_vae_config_of(const sc_vae *vae);
int sc_vae_factor(const sc_vae *vae);   /* pixels per latent: f */

/* Host f32, batches of any size. Pictures [B,3,H,W] in [-1,1], H and W multiples of f; latents
 * [B,C,H/f,W/f], not normalised; logvar is clamped to [-30,20]. Where a side is above `tile`,
 * overlapping tiles of that many pixels are worked on one by one and blended: memory is bounded
 * (0: never; a tile's norms and attention do not see the rest of the picture). */
bool sc_vae_encode(sc_vae *vae, int64_t batch, int64_t height, int64_t width,
                   const float *pictures, float *mean, float *logvar, int64_t tile);
/* height and width: of the latents. The pictures may go a little beyond [-1,1]. */
bool sc_vae_decode(sc_vae *vae, int64_t batch, int64_t height, int64_t width,
                   const float *latents, float *pictures, int64_t tile);

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
/* Exactly `length` ids, cut or padded, the end token kept; returns how many are not padding. -1: error. */
int sc_tokenize(const sc_tokenizer *t, const char *text, int length, int32_t *ids);

/* ==== Text encoders: CLIP (pooled vector) and T5 (a vector for each token) ==== */
typedef struct sc_text_encoders sc_text_encoders;
/* From a pipeline folder: text_encoder, tokenizer, text_encoder_2, tokenizer_2. */
sc_text_encoders *sc_text_encoders_open(const sc_backend *backend, const char *folder);
void sc_text_encoders_close(sc_text_encoders *t);
/* context [tokens, T5's width], pooled [CLIP's width], host f32; any UTF-8, empty too. */
bool sc_text_encode(sc_text_encoders *t, const char *prompt, int tokens, float *context, float *pooled);

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

/* ==== Pipeline: a whole model folder in diffusers' layout ==== */

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
} sc_pipeline;

typedef struct sc_pipeline_options {
    bool widen;                 /* all transformer weights in f32: to train or merge them */
    bool random;                /* transformer weights drawn from `seed` */
    uint64_t seed;
    const char *transformer;    /* another transformer folder; NULL: the pipeline's own */
} sc_pipeline_options;

sc_pipeline *sc_pipeline_open(const sc_backend *backend, const char *folder, const sc_pipeline_options *options);
void sc_pipeline_close(sc_pipeline *p);
void sc_pipeline_release(sc_pipeline *p);   /* lets the text encoders and the VAE go until they are needed again */

/* One prompt: context [text_tokens, text_channels], pooled [pooled_channels], host f32. */
bool sc_pipeline_text(sc_pipeline *p, const char *prompt, float *context, float *pooled);
/* rgb [3, height, width] in [-1, 1] -> the normalised posterior, packed: mean and std [tokens, in_channels]. */
bool sc_pipeline_encode(sc_pipeline *p, const float *rgb, int width, int height, float *mean, float *std);
/* Packed normalised latents [B, h*w, in_channels] -> rgb [B, 3, H, W] in [-1, 1]. */
bool sc_pipeline_decode(sc_pipeline *p, const float *latents, int batch, int h, int w, float *rgb);

#ifdef SHORTCUT_STB
/* ==== PNG and JPEG files, through stb_image.h and stb_image_write.h ==== */
bool sc_picture_load(sc_picture *p, const char *path);
/* Writes a PNG; parameters (UTF-8, or NULL) go into its text chunk of that name. */
bool sc_picture_save(const sc_picture *p, const char *path, const char *parameters);
#endif

#ifdef SHORTCUT_TOOLS
/* ==== Tools for command-line programs (not part of the library: these print) ==== */
typedef enum { SC_FLAG, SC_INT, SC_FLOAT, SC_RANGE, SC_STRING, SC_STRINGS, SC_INTS } sc_option_kind;
typedef struct sc_option {
    const char *name;           /* "--steps"; NULL: a heading in the help */
    sc_option_kind kind;
    void *value;                /* bool, int, float, float[2], const char *, const char *[8], int[8] */
    const char *argument, *help;
} sc_option;

/* Reads argv into the options' values; what is left over goes to `positional` (at most `limit`).
 * --help prints `usage` and the table and exits 0; bad usage prints one line and exits 2. */
int sc_parse(const char *usage, const sc_option *options, int count, int argc, char **argv, const char **positional,
             int limit);
/* Values from a JSON object whose keys are option names without "--"; false if it has others. */
bool sc_parse_json(const sc_option *options, int count, const char *path);
void sc_print_options(const sc_option *options, int count);

/* First thing in main: threads that wait sleep instead of spinning, which costs a program that shares
 * its cores a factor of ten and more. libgomp reads this only when it is loaded, so start once again. */
void sc_start(char **argv);
extern volatile int sc_interrupted;             /* Ctrl-C was pressed; a second time kills */
void sc_catch_interrupt(void);
double sc_seconds(void);                        /* since the program started */
/* One line of progress, rewritten in place on a terminal: "label 12/300 ... 1:20 left". */
void sc_progress(const char *label, int64_t done, int64_t total, double started, const char *extra);
const sc_backend *sc_device(const char *name);  /* "auto", "cpu" or "cuda"; NULL with the error set */
int sc_die(void);                               /* prints sc_error() and returns 1 */
#endif

#ifdef __cplusplus
}
#endif
#endif /* SHORTCUT_H */

#ifdef SHORTCUT_IMPLEMENTATION
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

/* Sets the message; returns false, so that `return sc__fail(...)` reads well. */
static SC_PRINTF(1, 2) bool sc__fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(sc__message, sizeof sc__message, format, args);
    va_end(args);
    return false;
}

/* Zeroed memory for `count` items of `size` bytes; NULL with the error set. */
static void *sc__alloc(size_t count, size_t size) {
    void *p = NULL;
    if (size == 0 || count <= SIZE_MAX / 2 / size) p = SC_CALLOC(count ? count : 1, size ? size : 1);
    if (!p) sc__fail("out of memory (%zu items of %zu bytes)", count, size);
    return p;
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
int sc_uniform_int(sc_rng *rng, int n) { return (int)((sc_random_bits(rng) >> 32) * (uint64_t)n >> 32); }

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
    [SC_F32] = {"F32", 4}, [SC_BF16] = {"BF16", 2}, [SC_F16] = {"F16", 2}, [SC_F8_E4M3] = {"F8_E4M3", 1},
    [SC_F64] = {"F64", 8}, [SC_I64] = {"I64", 8},   [SC_I32] = {"I32", 4}, [SC_U8] = {"U8", 1},
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

/* Half floats: exponent bias 15, 10 bits of mantissa; multiplying by 2^112 moves the bias to 127. */
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

/* dst[n] (f32) <- src[n] of any floating type. */
void sc_to_f32(float *dst, const void *src, sc_dtype dtype, int64_t n) {
    const uint16_t *half = (const uint16_t *)src;
    switch (dtype) {
    case SC_F32: memcpy(dst, src, (size_t)n * 4); break;
    case SC_BF16: for (int64_t i = 0; i < n; i++) dst[i] = sc__bf16_to_f32(half[i]); break;
    case SC_F16: for (int64_t i = 0; i < n; i++) dst[i] = sc__f16_to_f32(half[i]); break;
    case SC_F8_E4M3: for (int64_t i = 0; i < n; i++) dst[i] = sc__f8_to_f32(((const uint8_t *)src)[i]); break;
    case SC_F64: for (int64_t i = 0; i < n; i++) dst[i] = (float)((const double *)src)[i]; break;
    default: for (int64_t i = 0; i < n; i++) dst[i] = NAN; break;
    }
}

/* Vectorisable e^x, within 2 ulp in f32: x = n ln 2 + r, e^x = 2^n * polynomial(r). */
static inline float sc__exp(float x) {
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
    float n = x * 1.44269504f + 12582912.f; /* adding 1.5 * 2^23 rounds to an integer */
    n -= 12582912.f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return p * sc__from_bits((uint32_t)((int32_t)n + 127) << 23);
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
void sc_set_threads(int n) { omp_set_num_threads(n > 0 ? n : omp_get_num_procs()); }
#else
static int sc__threads(void) { return 1; }
static int sc__thread(void) { return 0; }
void sc_set_threads(int n) { (void)n; }
#endif

static inline float *sc__f(const sc_tensor *x) { return (float *)x->data; }
static inline float *sc__g(const sc_tensor *x) { return (float *)x->grad; }
static inline int64_t sc__last(const sc_tensor *x) { return x->shape[x->ndim - 1]; }
static inline int64_t sc__rows(const sc_tensor *x) { return sc_count(x) / sc__last(x); }

/* One growing buffer, for one user at a time; call it outside parallel regions. */
static float *sc__scratch(size_t floats) {
    static SC_THREAD_LOCAL float *buffer;
    static SC_THREAD_LOCAL size_t capacity;
    if (floats <= capacity) return buffer;
    SC_FREE(buffer);
    buffer = (float *)SC_CALLOC(floats, sizeof *buffer);
    capacity = buffer ? floats : 0;
    return buffer;
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
                else SC_SIMD_SUM(sum) for (int p = 0; p < k; p++) sum += a[(int64_t)i * lda + p] * bj[p];
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
    for (int64_t r = 0; r < rows; r++)
        sc_to_f32(buffer + r * columns, (const char *)a.data + r * a.ld * size, a.dtype, columns);
    return buffer;
}

static void sc__cpu_gemm(int64_t m, int64_t n, int64_t k, float alpha, sc_matrix a, sc_matrix b,
                         float beta, sc_matrix c, const sc_tensor *bias) {
    int64_t a_rows = a.transposed ? k : m, a_columns = a.transposed ? m : k;
    int64_t b_rows = b.transposed ? n : k, b_columns = b.transposed ? k : n;
    float *buffer = NULL;
    if (a.dtype != SC_F32 || b.dtype != SC_F32)
        buffer = sc__scratch((size_t)(a_rows * a_columns + b_rows * b_columns));
    const float *pa = sc__widen(a, a_rows, a_columns, buffer);
    const float *pb = sc__widen(b, b_rows, b_columns, buffer ? buffer + a_rows * a_columns : NULL);
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
        if (add)
            for (int64_t i = i0; i < i0 + rows; i++)
                memcpy(pc + i * c.ld + j0, add + j0, (size_t)columns * 4);
        sc__sgemm(a.transposed, b.transposed, (int)rows, (int)columns, (int)k, alpha,
                  pa + (a.transposed ? i0 : i0 * a.ld), (int)a.ld,
                  pb + (b.transposed ? j0 * b.ld : j0), (int)b.ld, add ? 1.f : beta,
                  pc + i0 * c.ld + j0, (int)c.ld);
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
static void sc__cpu_copy(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void sc__cpu_zero(void *p, size_t bytes) { memset(p, 0, bytes); }

static void sc__cpu_copy_block(void *dst, int64_t dst_ld, const void *src, int64_t src_ld,
                               int64_t rows, int64_t columns, sc_dtype dtype, bool accumulate) {
    int64_t size = sc_dtype_size(dtype);
    SC_PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        char *d = (char *)dst + r * dst_ld * size;
        const char *s = (const char *)src + r * src_ld * size;
        if (accumulate) SC_SIMD for (int64_t c = 0; c < columns; c++) ((float *)d)[c] += ((const float *)s)[c];
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

/* Sinusoids of 1000 t, cosines first: y[b] = [cos(1000 t f_i), sin(1000 t f_i)], f_i = 10000^(-i/half).
 * Each step is rounded as there: at t = 1 the last bit of f_i already turns the result by 1e-4.
 * (diffusers: Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)) */
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
    case SC_GELU_TANH: *slope = k * (1 + 3 * 0.044715f * x * x); return k * (x + 0.044715f * x * x * x);
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

static void sc__cpu_activate(sc_activation kind, sc_tensor *y, const sc_tensor *x) {
    int64_t total = sc_count(x);
    SC_PARALLEL_FOR
    for (int64_t i = 0; i < total; i += SC__SLICE) {
        int64_t n = total - i < SC__SLICE ? total - i : SC__SLICE;
        float *py = sc__f(y) + i, *px = sc__f(x) + i;
        switch (kind) { /* constant kinds, so that each loop vectorises */
        case SC_SILU: sc__activate_rows(SC_SILU, py, px, n); break;
        case SC_GELU_TANH: sc__activate_rows(SC_GELU_TANH, py, px, n); break;
        case SC_QUICK_GELU: sc__activate_rows(SC_QUICK_GELU, py, px, n); break;
        case SC_GELU: for (int64_t j = 0; j < n; j++) py[j] = 0.5f * px[j] * (1 + erff(px[j] * 0.70710678f)); break;
        }
    }
}

static void sc__cpu_activate_backward(sc_activation kind, const sc_tensor *y, sc_tensor *x) {
    int64_t total = sc_count(x);
    SC_PARALLEL_FOR
    for (int64_t i = 0; i < total; i += SC__SLICE) {
        int64_t n = total - i < SC__SLICE ? total - i : SC__SLICE;
        const float *dy = sc__g(y) + i, *px = sc__f(x) + i;
        float *dx = sc__g(x) + i;
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

/* ---- Modulated layer norm: y = n(x) (1 + scale) + shift, n(x) = (x - mean) / sqrt(var + 1e-6) ----
 * x [B,T,C]; mod [B,K*C] holds K vectors of C per sample, `shift` and `scale` say which.
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
        SC_SIMD for (int64_t c = 0; c < n; c++) py[c] = (px[c] - mean) * inverse * (1 + a[c]) + b[c];
    }
}

static void sc__cpu_ln_modulate_backward(const sc_tensor *y, sc_tensor *x, sc_tensor *mod, int shift,
                                         int scale) {
    int64_t tokens = x->shape[1], n = x->shape[2], width = mod->shape[1];
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
            if (!x->grad) continue;
            SC_PRAGMA(omp simd reduction(+ : g_sum, gn_sum))
            for (int64_t c = 0; c < n; c++) {
                float g = dy[c] * (1 + a[c]);
                g_sum += g;
                gn_sum += g * (px[c] - mean) * inverse;
            }
            float *dx = sc__g(x) + r * n, g_mean = g_sum / (float)n, gn_mean = gn_sum / (float)n;
            SC_SIMD for (int64_t c = 0; c < n; c++)
                dx[c] += (dy[c] * (1 + a[c]) - g_mean - (px[c] - mean) * inverse * gn_mean) * inverse;
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
    SC_PARALLEL_FOR
    for (int64_t b = 0; b < x->shape[0]; b++) {
        const float *g = sc__f(mod) + b * width + gate * n;
        float *dg = mod->grad ? sc__g(mod) + b * width + gate * n : NULL;
        for (int64_t r = b * tokens; r < (b + 1) * tokens; r++) {
            const float *dy = sc__g(y) + r * n, *ph = sc__f(h) + r * n;
            float *dx = x->grad ? sc__g(x) + r * n : NULL, *dh = h->grad ? sc__g(h) + r * n : NULL;
            if (dx) SC_SIMD for (int64_t c = 0; c < n; c++) dx[c] += dy[c];
            if (dh) SC_SIMD for (int64_t c = 0; c < n; c++) dh[c] += g[c] * dy[c];
            if (dg) SC_SIMD for (int64_t c = 0; c < n; c++) dg[c] += ph[c] * dy[c];
        }
    }
}

/* ---- QK-norm + RoPE, per head of D: n = w x / sqrt(mean(x^2) + 1e-6), then each pair turns:
 * (y0, y1) = (n0 cos - n1 sin, n1 cos + n0 sin).  x [B,Tx,C]; y [B,T,C], written from token `offset`
 * on; weight [D]; rope [T,D/2,2] (cos, sin). Backward turns dy back (g), then, with n = w u:
 * dw += g u;  dx += (w g - u mean(w g u)) / sqrt(mean(x^2) + 1e-6). */

static inline float sc__inverse_rms(const float *x, int64_t n, float eps) {
    float sum = 0;
    SC_SIMD_SUM(sum) for (int64_t d = 0; d < n; d++) sum += x[d] * x[d];
    return 1.f / sqrtf(sum / (float)n + eps);
}

static void sc__cpu_norm_rope(sc_tensor *y, int64_t offset, const sc_tensor *x, const sc_tensor *weight,
                              const sc_tensor *rope) {
    int64_t tokens = x->shape[1], channels = x->shape[2], size = weight->shape[0], rows = sc__rows(x);
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
    int64_t batch = x->shape[0], tokens = x->shape[1], channels = x->shape[2], size = weight->shape[0];
    const float *w = sc__f(weight);
    float *partial = weight->grad ? sc__scratch((size_t)(batch * size)) : NULL; /* dw of each sample */
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
                SC_SIMD for (int64_t d = 0; d < size; d++) partial[b * size + d] += g[d] * px[d] * inverse;
            if (!x->grad) continue;
            SC_SIMD_SUM(dot) for (int64_t d = 0; d < size; d++) dot += w[d] * g[d] * px[d] * inverse;
            float *dx = sc__g(x) + (b * tokens + t) * channels + h;
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

/* Scores of `rows` queries from `first` on, into p[rows, tokens], and their softmax. */
static void sc__softmax_scores(float *p, const float *q, const float *k, int64_t rows, int64_t tokens,
                               int64_t size, int64_t ld, float scale, const float *bias, bool causal,
                               int64_t first) {
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
        SC_SIMD for (int64_t c = 0; c < n; c++) row[c] *= inverse;
        for (int64_t c = n; c < tokens; c++) row[c] = 0;
    }
}

static void sc__cpu_attention(sc_tensor *o, const sc_tensor *q, const sc_tensor *k, const sc_tensor *v,
                              int heads, float scale, const sc_tensor *bias, bool causal) {
    int64_t channels = q->shape[2], size = channels / heads, nq = q->shape[1], nk = k->shape[1];
    int64_t block = sc__attention_rows(nk), blocks = (nq + block - 1) / block;
    float *scratch = sc__scratch((size_t)(sc__threads() * block * nk));
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < q->shape[0] * heads * blocks; task++) {
        int64_t b = task / (heads * blocks), h = task / blocks % heads, first = task % blocks * block;
        int64_t rows = nq - first < block ? nq - first : block;
        float *p = scratch + sc__thread() * block * nk;
        int64_t query = (b * nq + first) * channels + h * size, key = b * nk * channels + h * size;
        sc__softmax_scores(p, sc__f(q) + query, sc__f(k) + key, rows, nk, size, channels, scale,
                           bias ? sc__f(bias) + (h * nq + first) * nk : NULL, causal, first);
        sc__sgemm(false, false, (int)rows, (int)size, (int)nk, 1, p, (int)nk, sc__f(v) + key,
                  (int)channels, 0, sc__f(o) + query, (int)channels);
    }
}

static void sc__cpu_attention_backward(const sc_tensor *o, sc_tensor *q, sc_tensor *k, sc_tensor *v,
                                       int heads, float scale) {
    int64_t channels = q->shape[2], size = channels / heads, nq = q->shape[1], nk = k->shape[1];
    int64_t block = sc__attention_rows(nk);
    int ld = (int)channels, n = (int)nk, d = (int)size;
    float *scratch = sc__scratch((size_t)(2 * sc__threads() * block * nk));
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < q->shape[0] * heads; task++) { /* a head owns its dK and dV */
        int64_t b = task / heads, h = task % heads, key = b * nk * channels + h * size;
        float *p = scratch + 2 * sc__thread() * block * nk, *dp = p + block * nk;
        for (int64_t first = 0; first < nq; first += block) {
            int rows = (int)(nq - first < block ? nq - first : block);
            int64_t query = (b * nq + first) * channels + h * size;
            const float *out = sc__f(o) + query, *dout = sc__g(o) + query;
            sc__softmax_scores(p, sc__f(q) + query, sc__f(k) + key, rows, nk, size, channels, scale,
                               NULL, false, first);
            sc__sgemm(true, false, n, d, rows, 1, p, n, dout, ld, 1, sc__g(v) + key, ld);
            sc__sgemm(false, true, rows, n, d, 1, dout, ld, sc__f(v) + key, ld, 0, dp, n);
            for (int64_t r = 0; r < rows; r++) {
                float dot = 0;
                SC_SIMD_SUM(dot)
                for (int64_t c = 0; c < size; c++) dot += out[r * ld + c] * dout[r * ld + c];
                SC_SIMD for (int64_t c = 0; c < nk; c++) dp[r * nk + c] = p[r * nk + c] * (dp[r * nk + c] - dot);
            }
            sc__sgemm(false, false, rows, d, n, scale, dp, n, sc__f(k) + key, ld, 1, sc__g(q) + query, ld);
            sc__sgemm(true, false, n, d, rows, scale, dp, n, sc__f(q) + query, ld, 1, sc__g(k) + key, ld);
        }
    }
}

/* ---- Norms and embeddings of the text encoders ---- */

static void sc__cpu_layer_norm(sc_tensor *y, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b,
                               float eps) {
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

/* Sums in slices, in double, added in order: the result does not depend on the number of threads. */
static double sc__sum_of_squares(const float *x, const float *minus, int64_t n) {
    double total = 0;
    for (int64_t start = 0; start < n; start += SC__SLICE) {
        int64_t end = start + SC__SLICE < n ? start + SC__SLICE : n;
        float sum = 0;
        if (minus) SC_SIMD_SUM(sum) for (int64_t i = start; i < end; i++) sum += (x[i] - minus[i]) * (x[i] - minus[i]);
        else SC_SIMD_SUM(sum) for (int64_t i = start; i < end; i++) sum += x[i] * x[i];
        total += sum;
    }
    return total;
}

static double sc__cpu_sum_squares(const float *x, int64_t n) { return sc__sum_of_squares(x, NULL, n); }

/* loss = mean((prediction - target)^2);  dprediction += factor * 2 (prediction - target) / n */
static double sc__cpu_mse(const sc_tensor *prediction, const sc_tensor *target) {
    int64_t n = sc_count(prediction);
    return sc__sum_of_squares(sc__f(prediction), sc__f(target), n) / (double)n;
}

static void sc__cpu_mse_backward(sc_tensor *prediction, const sc_tensor *target, float factor) {
    int64_t n = sc_count(prediction);
    const float *p = sc__f(prediction), *t = sc__f(target), s = 2 * factor / (float)n;
    float *dp = sc__g(prediction);
    SC_SIMD for (int64_t i = 0; i < n; i++) dp[i] += s * (p[i] - t[i]);
}

/* AdamW (Loshchilov & Hutter 2019; torch.optim.AdamW): decoupled weight decay, bias-corrected moments. */
static void sc__cpu_adamw(float *w, const float *grad, float *m, float *v, int64_t n,
                          const sc_adamw *o) {
    double correction1 = 1 - pow(o->beta1, (double)o->step), correction2 = 1 - pow(o->beta2, (double)o->step);
    float b1 = o->beta1, b2 = o->beta2, decay = 1 - o->lr * o->weight_decay, eps = o->eps;
    float scale = o->grad_scale, rate = (float)(o->lr / correction1), root = (float)(1 / sqrt(correction2));
    SC_PARALLEL_FOR
    for (int64_t start = 0; start < n; start += SC__SLICE) {
        int64_t end = start + SC__SLICE < n ? start + SC__SLICE : n;
        SC_SIMD for (int64_t i = start; i < end; i++) {
            float g = grad[i] * scale;
            m[i] = b1 * m[i] + (1 - b1) * g;
            v[i] = b2 * v[i] + (1 - b2) * g * g;
            w[i] = w[i] * decay - rate * m[i] / (sqrtf(v[i]) * root + eps);
        }
    }
}

static void sc__cpu_ema(float *average, const float *w, int64_t n, float decay) {
    SC_SIMD for (int64_t i = 0; i < n; i++) average[i] += (1 - decay) * (w[i] - average[i]);
}

/* ---- Pictures [B,C,H,W]: convolution ----
 * y[o,i,j] = bias[o] + sum over c, u, v of w[o,c,u,v] x[c, s i + u - pad, s j + v - pad].
 * A strip of rows of all input channels is copied once, zero padded; a stride s splits it into
 * s * s planes, one for each phase (u mod s, v mod s). Then every tap (u, v) reads its plane at a
 * fixed distance from the output pixel, whatever row that pixel is in, and a tile of 4 output
 * channels by 3 vectors of pixels stays in registers while all channels and taps are added. Where
 * the strip is wider than the picture, the tile computes a few pixels that nobody reads.
 */

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
#define SC__TILE_O 4
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

/* Weights [out, in, taps] as [out / 4, in, taps, 4], f32, the last channels padded by zeros. */
static void sc__conv_pack(const sc__conv *g, float *packed, const sc_tensor *w, float *rows) {
    int64_t n = g->in * g->taps, padded = (g->out + SC__TILE_O - 1) / SC__TILE_O * SC__TILE_O;
    SC_PARALLEL_FOR
    for (int64_t o = 0; o < padded; o++) {
        float *to = packed + o / SC__TILE_O * SC__TILE_O * n + o % SC__TILE_O;
        float *row = rows + sc__thread() * n;
        if (o < g->out)
            sc_to_f32(row, (const char *)w->data + o * n * sc_dtype_size(w->dtype), w->dtype, n);
        else memset(row, 0, (size_t)n * 4);
        for (int64_t i = 0; i < n; i++) to[i * SC__TILE_O] = row[i];
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

/* y[4][SC__TILE] = all channels and taps of one tile whose first pixel is x. */
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
    int64_t share = (batch * g.height + threads - 1) / threads, some = 8 * SC__TILE / g.pitch + 1;
    g.rows = SC__STRIP / (g.in * stride * stride * g.pitch) - reach;
    if (g.rows < some) g.rows = some; /* so that unfinished tiles are rare */
    if (g.rows > share) g.rows = share;
    if (g.rows > g.height) g.rows = g.height;
    g.plane = (g.rows + reach) * g.pitch;
    for (int64_t t = 0; t < g.taps; t++) {
        int64_t u = t / g.kernel, v = t % g.kernel;
        int64_t phase = u % stride * stride + v % stride;
        g.offset[t] = phase * g.plane + u / stride * g.pitch + v / stride;
    }
    int64_t channels = (g.out + SC__TILE_O - 1) / SC__TILE_O * SC__TILE_O, n = g.in * g.taps;
    int64_t strips = (g.height + g.rows - 1) / g.rows;
    int64_t strip_size = g.in * stride * stride * g.plane + 2 * SC__TILE;
    int64_t buffer = n > strip_size ? n : strip_size; /* a thread's */
    float *packed = sc__scratch((size_t)(channels * n + threads * buffer));
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

/* y = (x - mean) / sqrt(var + eps) w + b over groups of channels, then y s(y) if `silu`. Means and
 * variances of slices that fit the L1 cache are merged in double: size costs no precision. */
static void sc__cpu_group_norm(sc_tensor *y, const sc_tensor *x, const sc_tensor *w,
                               const sc_tensor *b, int groups, float eps, bool silu) {
    int64_t per_group = x->shape[1] / groups, pixels = x->shape[2] * x->shape[3];
    int64_t size = per_group * pixels;
    SC_PARALLEL_FOR
    for (int64_t task = 0; task < x->shape[0] * groups; task++) {
        const float *px = sc__f(x) + task * size;
        double sum = 0, square = 0;
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
            sum += (double)about * (double)n + rest;
            square += spread + (double)about * (2 * (double)rest + (double)about * (double)n);
        }
        double mean = sum / (double)size;
        double inverse = 1 / sqrt(square / (double)size - mean * mean + (double)eps);
        for (int64_t c = 0; c < per_group; c++) {
            int64_t channel = task % groups * per_group + c;
            float *py = sc__f(y) + task * size + c * pixels;
            const float *pc = px + c * pixels;
            float scale = (float)inverse * sc__f(w)[channel], shift = sc__f(b)[channel];
            float m = (float)mean;
            if (silu)
                SC_SIMD for (int64_t i = 0; i < pixels; i++) {
                    float n = (pc[i] - m) * scale + shift;
                    py[i] = n * sc__sigmoid(n);
                }
            else SC_SIMD for (int64_t i = 0; i < pixels; i++) py[i] = (pc[i] - m) * scale + shift;
        }
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
    .name = "cpu", .activation = SC_F32,
    .alloc = sc__cpu_alloc, .release = sc__cpu_release,
    .upload = sc__cpu_copy, .download = sc__cpu_copy, .zero = sc__cpu_zero,
    .gemm = sc__cpu_gemm, .copy_block = sc__cpu_copy_block, .column_sum = sc__cpu_column_sum,
    .blend = sc__cpu_blend, .embed_timestep = sc__cpu_embed_timestep,
    .activate = sc__cpu_activate, .activate_backward = sc__cpu_activate_backward,
    .multiply = sc__cpu_multiply,
    .ln_modulate = sc__cpu_ln_modulate, .ln_modulate_backward = sc__cpu_ln_modulate_backward,
    .gated_residual = sc__cpu_gated_residual,
    .gated_residual_backward = sc__cpu_gated_residual_backward,
    .norm_rope = sc__cpu_norm_rope, .norm_rope_backward = sc__cpu_norm_rope_backward,
    .attention = sc__cpu_attention, .attention_backward = sc__cpu_attention_backward,
    .layer_norm = sc__cpu_layer_norm, .rms_norm = sc__cpu_rms_norm,
    .embed_tokens = sc__cpu_embed_tokens,
    .group_norm = sc__cpu_group_norm, .conv2d = sc__cpu_conv2d, .upsample = sc__cpu_upsample,
    .swap_axes = sc__cpu_swap_axes,
    .mse = sc__cpu_mse, .mse_backward = sc__cpu_mse_backward, .sum_squares = sc__cpu_sum_squares,
    .adamw = sc__cpu_adamw, .ema = sc__cpu_ema,
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
 * sc_backward walks that list from its end. Gradients are allocated, zeroed, when first asked for,
 * and only ever added to. Tensors live in an arena: a list of chunks, given back all at once.
 */

typedef struct sc__arena {
    const sc_backend *backend;  /* NULL: host memory */
    struct { char *base; size_t size; } chunks[64];
    int count, current;
    size_t used;                /* of chunks[current] */
} sc__arena;

typedef struct sc__op sc__op;
struct sc__op {
    void (*backward)(sc_tape *t, sc__op *op);
    sc_tensor *in[5], *out[2];  /* what each slot means is the operation's business */
    int64_t n[3];
    float scale;
    const void *extra;
};

struct sc_tape {
    const sc_backend *be;
    sc__arena host, device;     /* tensor structs; their data and gradients */
    bool recording, failed;
    const uint8_t *sets;        /* LoRA set of each sample, or NULL */
    sc__op *ops;
    int64_t count, capacity;
};

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
        size_t size = (size_t)1 << 20;
        while (size < bytes || (a->count > 0 && size < 2 * a->chunks[a->count - 1].size &&
                                size < (size_t)256 << 20)) size *= 2;
        if (a->count == (int)(sizeof a->chunks / sizeof *a->chunks)) {
            sc__fail("out of memory: the arena has %d chunks", a->count);
            return NULL;
        }
        char *base = a->backend ? (char *)a->backend->alloc(size) : (char *)sc__alloc(size, 1);
        if (!base) return NULL;
        a->chunks[a->count].base = base;
        a->chunks[a->count++].size = size;
        a->used = 0;
    }
    void *p = a->chunks[a->current].base + a->used;
    a->used += bytes;
    return p;
}

static void sc__arena_free(sc__arena *a) {
    for (int i = 0; i < a->count; i++) {
        if (a->backend) a->backend->release(a->chunks[i].base);
        else SC_FREE(a->chunks[i].base);
    }
}

sc_tape *sc_tape_new(const sc_backend *backend) {
    sc_tape *t = (sc_tape *)sc__alloc(1, sizeof *t);
    if (!t) return NULL;
    t->be = t->device.backend = backend;
    return t;
}

void sc_tape_free(sc_tape *t) {
    if (!t) return;
    sc__arena_free(&t->host);
    sc__arena_free(&t->device);
    SC_FREE(t->ops);
    SC_FREE(t);
}

void sc_tape_reset(sc_tape *t) {
    t->host.current = t->device.current = 0;
    t->host.used = t->device.used = 0;
    t->count = 0;
    t->failed = false;
}

void sc_tape_record(sc_tape *t, bool recording) { t->recording = recording; }
void sc_tape_use(sc_tape *t, const uint8_t *set_of_sample) { t->sets = set_of_sample; }

size_t sc_tape_bytes(const sc_tape *t) {
    size_t bytes = 0;
    for (int i = 0; i < t->device.count; i++) bytes += t->device.chunks[i].size;
    return bytes;
}

/* ---- Tensors of the tape ---- */

static sc_tensor *sc__struct(sc_tape *t, int ndim, const int64_t *shape, sc_dtype dtype) {
    sc_tensor *x = (sc_tensor *)sc__arena_take(&t->host, sizeof *x);
    if (!x) return NULL;
    *x = (sc_tensor){.dtype = dtype, .ndim = ndim};
    for (int i = 0; i < ndim; i++) x->shape[i] = shape[i];
    return x;
}

sc_tensor *sc_new(sc_tape *t, int ndim, const int64_t *shape) {
    sc_tensor *x = sc__struct(t, ndim, shape, t->be->activation);
    if (!x) return NULL;
    x->data = sc__arena_take(&t->device, (size_t)(sc_count(x) * sc_dtype_size(x->dtype)));
    return x->data ? x : NULL;
}

static sc_tensor *sc__new3(sc_tape *t, int64_t b, int64_t n, int64_t c) {
    return sc_new(t, 3, (const int64_t[]){b, n, c});
}
static sc_tensor *sc__new_like(sc_tape *t, const sc_tensor *x) { return sc_new(t, x->ndim, x->shape); }

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
    if (x->dtype == SC_F32) {
        t->be->download(values, x->data, bytes);
        return true;
    }
    void *raw = sc__alloc(bytes, 1);
    if (!raw) return false;
    t->be->download(raw, x->data, bytes);
    sc_to_f32(values, raw, x->dtype, sc_count(x));
    SC_FREE(raw);
    return true;
}

sc_tensor *sc_reshape(sc_tape *t, const sc_tensor *x, int ndim, const int64_t *shape) {
    if (!x) return NULL;
    sc_tensor *y = sc__struct(t, ndim, shape, x->dtype);
    if (y) y->data = x->data;
    return y;
}

/* The gradient of x, zeroed when first asked for; NULL when nothing below x wants one. */
static void *sc__grad(sc_tape *t, sc_tensor *x) {
    if (!x || !x->needs_grad) return NULL;
    if (!x->grad) {
        size_t bytes = (size_t)(sc_count(x) * sc_dtype_size(x->dtype));
        x->grad = sc__arena_take(&t->device, bytes);
        if (x->grad) t->be->zero(x->grad, bytes);
        else t->failed = true;
    }
    return x->grad;
}

/* Appends an operation if any of its inputs needs a gradient. */
static sc__op *sc__record(sc_tape *t, void (*backward)(sc_tape *, sc__op *), sc_tensor *out,
                          sc_tensor *a, sc_tensor *b, sc_tensor *c) {
    bool needed = (a && a->needs_grad) || (b && b->needs_grad) || (c && c->needs_grad);
    if (!t->recording || !needed) return NULL;
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
    sc__op *op = &t->ops[t->count++];
    *op = (sc__op){.backward = backward, .in = {a, b, c}, .out = {out}};
    out->needs_grad = true;
    return op;
}

/* Marks: everything taken from the arenas after sc__mark goes back at sc__release. */
typedef struct sc__mark_t { int host, device; size_t host_used, device_used; } sc__mark_t;
static sc__mark_t sc__mark(const sc_tape *t) {
    return (sc__mark_t){t->host.current, t->device.current, t->host.used, t->device.used};
}
static void sc__release(sc_tape *t, sc__mark_t m) {
    t->host.current = m.host, t->host.used = m.host_used;
    t->device.current = m.device, t->device.used = m.device_used;
}

/* Runs the operations from the last down to `first` backwards and forgets them. */
static bool sc__backward_from(sc_tape *t, int64_t first) {
    while (t->count > first && !t->failed) {
        sc__op op = t->ops[--t->count]; /* a copy: a checkpoint records more */
        if (op.out[0]->grad || (op.out[1] && op.out[1]->grad)) op.backward(t, &op);
    }
    return !t->failed;
}

bool sc_backward(sc_tape *t) { return sc__backward_from(t, 0); }

/* ---- Linear layers, and LoRA: y = x W^T + bias + scale (x A^T) B^T ----
 * The only place where LoRA exists. Samples next to each other with the same set share one thin
 * product. Backward: dx += dy W;  dW += dy^T x;  with u = x A^T and e = dy B:
 * dB += scale dy^T u;  dA += scale e^T x;  dx += scale e A. */

static sc_matrix sc__matrix(const void *data, sc_dtype dtype, int64_t ld, bool transposed) {
    return (sc_matrix){data, dtype, ld, transposed};
}
static sc_matrix sc__whole(const sc_tensor *x, bool transposed) {
    return sc__matrix(x->data, x->dtype, sc__last(x), transposed);
}

/* Rows [first, first + count) of x as a matrix; of its gradient. */
static sc_matrix sc__part(const sc_tensor *x, int64_t first, bool transposed) {
    int64_t n = sc__last(x);
    return sc__matrix((char *)x->data + first * n * sc_dtype_size(x->dtype), x->dtype, n, transposed);
}
static sc_matrix sc__grad_part(const sc_tensor *x, int64_t first, bool transposed) {
    int64_t n = sc__last(x);
    return sc__matrix((char *)x->grad + first * n * sc_dtype_size(x->dtype), x->dtype, n, transposed);
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
    int64_t first = op->n[0], rows = sc__rows(u), in = sc__last(x), out = sc__last(y), r = lora->rank;
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
    if (sc__grad(t, x))
        t->be->gemm(rows, in, out, 1, sc__grad_part(y, 0, false), sc__whole(w, false), 1,
                    sc__grad_part(x, 0, false), NULL);
    if (w->grad)
        t->be->gemm(out, in, rows, 1, sc__grad_part(y, 0, true), sc__whole(x, false), 1,
                    sc__matrix(w->grad, SC_F32, in, false), NULL);
    if (bias && bias->grad) t->be->column_sum((float *)bias->grad, y->grad, rows, out);
}

/* Adds the adapters' part for one run of samples with one set, and records it. */
static bool sc__linear_lora(sc_tape *t, sc_tensor *x, sc_tensor *y, const sc_linear_layer *l, sc_set set,
                            int64_t first, int64_t rows) {
    int64_t in = sc__last(x), out = sc__last(y);
    for (const sc_adapter *lora = l->adapters; lora; lora = lora->next) {
        if (!lora->a[set]) continue;
        sc_tensor *u = sc_new(t, 2, (const int64_t[]){rows, lora->rank});
        if (!u) return false;
        t->be->gemm(rows, lora->rank, in, 1, sc__part(x, first, false), sc__whole(lora->a[set], true),
                    0, sc__whole(u, false), NULL);
        t->be->gemm(rows, out, lora->rank, lora->scale, sc__whole(u, false),
                    sc__whole(lora->b[set], true), 1, sc__part(y, first, false), NULL);
        sc__op *op = sc__record(t, sc__lora_backward, y, x, lora->a[set], lora->b[set]);
        if (op) {
            op->in[3] = u;
            op->n[0] = first;
            op->n[1] = set;
            op->extra = lora;
        }
    }
    return true;
}

sc_tensor *sc_linear(sc_tape *t, const sc_tensor *input, const sc_linear_layer *l) {
    sc_tensor *x = (sc_tensor *)input;
    if (!x) return NULL;
    int64_t shape[SC_MAX_DIMS], in = sc__last(x), out = l->weight->shape[0], rows = sc__rows(x);
    if (in != l->weight->shape[1]) {
        sc__fail("linear layer takes %lld channels, was given %lld", (long long)l->weight->shape[1],
                 (long long)in);
        return NULL;
    }
    memcpy(shape, x->shape, sizeof shape);
    shape[x->ndim - 1] = out;
    sc_tensor *y = sc_new(t, x->ndim, shape);
    if (!y) return NULL;
    t->be->gemm(rows, out, in, 1, sc__whole(x, false), sc__whole(l->weight, true), 0,
                sc__whole(y, false), l->bias);
    sc__record(t, sc__linear_backward, y, x, l->weight, l->bias);
    if (!l->adapters) return y;
    int64_t batch = x->shape[0], per_sample = rows / batch, count;
    for (int64_t sample = 0; sample < batch; sample += count) {
        sc_set set = sc__next_run(t, batch, &sample, &count);
        if (!sc__linear_lora(t, x, y, l, set, sample * per_sample, count * per_sample)) return NULL;
    }
    return y;
}

/* ---- The other operations: allocate, call the backend, record ---- */

static void sc__activate_backward(sc_tape *t, sc__op *op) {
    if (sc__grad(t, op->in[0]))
        t->be->activate_backward((sc_activation)op->n[0], op->out[0], op->in[0]);
}

sc_tensor *sc_activate(sc_tape *t, sc_activation kind, sc_tensor *x) {
    sc_tensor *y = x ? sc__new_like(t, x) : NULL;
    if (!y) return NULL;
    t->be->activate(kind, y, x);
    sc__op *op = sc__record(t, sc__activate_backward, y, x, NULL, NULL);
    if (op) op->n[0] = kind;
    return y;
}

/* A block of `rows` rows: out[r, at_out ...] = in[r, at_in ...]; n = {rows, columns, offset}. */
static void sc__copy_columns(sc_tape *t, void *dst, int64_t dst_ld, int64_t dst_at, const void *src,
                             int64_t src_ld, int64_t src_at, int64_t rows, int64_t columns, bool add) {
    int64_t size = sc_dtype_size(t->be->activation);
    t->be->copy_block((char *)dst + dst_at * size, dst_ld, (const char *)src + src_at * size, src_ld,
                      rows, columns, t->be->activation, add);
}

static void sc__add_backward(sc_tape *t, sc__op *op) {
    for (int i = 0; i < 2; i++) {
        int64_t n = sc_count(op->out[0]);
        if (sc__grad(t, op->in[i])) sc__copy_columns(t, op->in[i]->grad, n, 0, op->out[0]->grad, n, 0, 1, n, true);
    }
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

/* Concatenation of rows of `wa` and `wb` elements: tokens and channels differ only in what a row is. */
static void sc__concat_backward(sc_tape *t, sc__op *op) {
    int64_t rows = op->n[0], width[2] = {op->n[1], op->n[2]}, sum = width[0] + width[1];
    for (int i = 0; i < 2; i++)
        if (sc__grad(t, op->in[i]))
            sc__copy_columns(t, op->in[i]->grad, width[i], 0, op->out[0]->grad, sum, i * width[0], rows,
                             width[i], true);
}

static sc_tensor *sc__concat(sc_tape *t, sc_tensor *a, sc_tensor *b, int64_t rows, sc_tensor *y) {
    if (!y) return NULL;
    int64_t wa = sc_count(a) / rows, wb = sc_count(b) / rows;
    sc__copy_columns(t, y->data, wa + wb, 0, a->data, wa, 0, rows, wa, false);
    sc__copy_columns(t, y->data, wa + wb, wa, b->data, wb, 0, rows, wb, false);
    sc__op *op = sc__record(t, sc__concat_backward, y, a, b, NULL);
    if (op) op->n[0] = rows, op->n[1] = wa, op->n[2] = wb;
    return y;
}

sc_tensor *sc_concat_tokens(sc_tape *t, sc_tensor *a, sc_tensor *b) {
    if (!a || !b) return NULL;
    int64_t batch = a->shape[0];
    return sc__concat(t, a, b, batch, sc__new3(t, batch, a->shape[1] + b->shape[1], a->shape[2]));
}

sc_tensor *sc_concat_channels(sc_tape *t, sc_tensor *a, sc_tensor *b) {
    if (!a || !b) return NULL;
    return sc__concat(t, a, b, sc__rows(a), sc__new3(t, a->shape[0], a->shape[1], a->shape[2] + b->shape[2]));
}

static void sc__slice_backward(sc_tape *t, sc__op *op) {
    sc_tensor *x = op->in[0], *y = op->out[0];
    if (sc__grad(t, x))
        sc__copy_columns(t, x->grad, x->shape[1] * x->shape[2], op->n[0], y->grad, y->shape[1] * y->shape[2], 0,
                         x->shape[0], y->shape[1] * y->shape[2], true);
}

sc_tensor *sc_slice_tokens(sc_tape *t, sc_tensor *x, int64_t from, int64_t count) {
    sc_tensor *y = x ? sc__new3(t, x->shape[0], count, x->shape[2]) : NULL;
    if (!y) return NULL;
    int64_t c = x->shape[2];
    sc__copy_columns(t, y->data, count * c, 0, x->data, x->shape[1] * c, from * c, x->shape[0], count * c, false);
    sc__op *op = sc__record(t, sc__slice_backward, y, x, NULL, NULL);
    if (op) op->n[0] = from * c;
    return y;
}

static void sc__ln_modulate_backward(sc_tape *t, sc__op *op) {
    sc__grad(t, op->in[0]);
    sc__grad(t, op->in[1]);
    if (!t->failed) t->be->ln_modulate_backward(op->out[0], op->in[0], op->in[1], (int)op->n[0], (int)op->n[1]);
}

sc_tensor *sc_ln_modulate(sc_tape *t, sc_tensor *x, sc_tensor *mod, int shift, int scale) {
    sc_tensor *y = x && mod ? sc__new_like(t, x) : NULL;
    if (!y) return NULL;
    t->be->ln_modulate(y, x, mod, shift, scale);
    sc__op *op = sc__record(t, sc__ln_modulate_backward, y, x, mod, NULL);
    if (op) op->n[0] = shift, op->n[1] = scale;
    return y;
}

static void sc__gated_residual_backward(sc_tape *t, sc__op *op) {
    for (int i = 0; i < 3; i++) sc__grad(t, op->in[i]);
    if (!t->failed) t->be->gated_residual_backward(op->out[0], op->in[0], op->in[1], op->in[2], (int)op->n[0]);
}

sc_tensor *sc_gated_residual(sc_tape *t, sc_tensor *x, sc_tensor *h, sc_tensor *mod, int gate) {
    sc_tensor *y = x && h && mod ? sc__new_like(t, x) : NULL;
    if (!y) return NULL;
    t->be->gated_residual(y, x, h, mod, gate);
    sc__op *op = sc__record(t, sc__gated_residual_backward, y, x, h, mod);
    if (op) op->n[0] = gate;
    return y;
}

static void sc__norm_rope_backward(sc_tape *t, sc__op *op) {
    if (sc__grad(t, op->in[0]) || op->in[1]->grad)
        t->be->norm_rope_backward(op->out[0], op->n[0], op->in[0], op->in[1], (const sc_tensor *)op->extra);
}

/* Queries or keys of both streams, normalised and turned, joined with the text first; text may be NULL. */
sc_tensor *sc_norm_rope(sc_tape *t, sc_tensor *text, sc_tensor *image, sc_tensor *text_weight,
                        sc_tensor *image_weight, const sc_tensor *rope) {
    if (!image || (!text && text_weight)) return NULL;
    int64_t text_tokens = text ? text->shape[1] : 0, tokens = text_tokens + image->shape[1];
    sc_tensor *y = sc__new3(t, image->shape[0], tokens, image->shape[2]);
    if (!y) return NULL;
    sc_tensor *parts[2] = {text, image}, *weights[2] = {text_weight, image_weight};
    for (int i = text ? 0 : 1; i < 2; i++) {
        int64_t offset = i ? text_tokens : 0;
        t->be->norm_rope(y, offset, parts[i], weights[i], rope);
        sc__op *op = sc__record(t, sc__norm_rope_backward, y, parts[i], weights[i], NULL);
        if (op) op->n[0] = offset, op->extra = rope;
    }
    return y;
}

static void sc__attention_backward(sc_tape *t, sc__op *op) {
    for (int i = 0; i < 3; i++) sc__grad(t, op->in[i]);
    if (!t->failed)
        t->be->attention_backward(op->out[0], op->in[0], op->in[1], op->in[2], (int)op->n[0], op->scale);
}

sc_tensor *sc_attention(sc_tape *t, sc_tensor *q, sc_tensor *k, sc_tensor *v, int heads, float scale,
                        const sc_tensor *bias, bool causal) {
    sc_tensor *o = q && k && v ? sc__new_like(t, q) : NULL;
    if (!o) return NULL;
    t->be->attention(o, q, k, v, heads, scale, bias, causal);
    sc__op *op = sc__record(t, sc__attention_backward, o, q, k, v);
    if (op) op->n[0] = heads, op->scale = scale;
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

/* The loss mean((prediction - target)^2), times `weight` in the backward pass. */
bool sc_mse(sc_tape *t, sc_tensor *prediction, const sc_tensor *target, float weight, double *loss) {
    if (!prediction || !target) return false;
    *loss = t->be->mse(prediction, target);
    sc__op *op = sc__record(t, sc__mse_backward, prediction, prediction, NULL, NULL);
    if (!op) return !t->failed;
    op->in[1] = (sc_tensor *)target;
    op->scale = weight;
    return sc__grad(t, prediction) != NULL; /* it exists: the walk back starts here */
}

sc_tensor *sc_layer_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b, float eps) {
    sc_tensor *y = x ? sc__new_like(t, x) : NULL;
    if (y) t->be->layer_norm(y, x, w, b, eps);
    return y;
}

sc_tensor *sc_rms_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, float eps) {
    sc_tensor *y = x ? sc__new_like(t, x) : NULL;
    if (y) t->be->rms_norm(y, x, w, eps);
    return y;
}

sc_tensor *sc_embed_tokens(sc_tape *t, const sc_tensor *table, const int32_t *ids, int64_t batch, int64_t tokens) {
    sc_tensor *y = sc__new3(t, batch, tokens, table->shape[1]);
    for (int64_t i = 0; i < batch * tokens; i++)
        if (ids[i] < 0 || ids[i] >= table->shape[0]) {
            sc__fail("token id %d is outside the table of %lld embeddings", (int)ids[i], (long long)table->shape[0]);
            return NULL;
        }
    if (y) t->be->embed_tokens(y, table, ids);
    return y;
}

sc_tensor *sc_conv2d(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b, int stride, int pad_before) {
    if (!x) return NULL;
    sc_tensor *y = sc_new(t, 4, (const int64_t[]){x->shape[0], w->shape[0], x->shape[2] / stride, x->shape[3] / stride});
    if (y) t->be->conv2d(y, x, w, b, stride, pad_before);
    return y;
}

sc_tensor *sc_group_norm(sc_tape *t, const sc_tensor *x, const sc_tensor *w, const sc_tensor *b, int groups, float eps, bool silu) {
    sc_tensor *y = x ? sc__new_like(t, x) : NULL;
    if (y) t->be->group_norm(y, x, w, b, groups, eps, silu);
    return y;
}

sc_tensor *sc_upsample(sc_tape *t, const sc_tensor *x) {
    sc_tensor *y = x ? sc_new(t, 4, (const int64_t[]){x->shape[0], x->shape[1], 2 * x->shape[2], 2 * x->shape[3]}) : NULL;
    if (y) t->be->upsample(y, x);
    return y;
}

sc_tensor *sc_swap_axes(sc_tape *t, const sc_tensor *x) {
    sc_tensor *y = x ? sc__new3(t, x->shape[0], x->shape[2], x->shape[1]) : NULL;
    if (y) t->be->swap_axes(y, x);
    return y;
}

/* ---- Checkpoint: keep a block's inputs only, and run it again in the backward pass ---- */

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
    if (!c->block(t, op->in, out, c->context)) t->failed = true;
    for (int i = 0; i < 2 && out[i]; i++) out[i]->grad = op->out[i]->grad;
    if (!t->failed) sc__backward_from(t, first);
    t->sets = sets;
    sc__release(t, mark);
}

bool sc_checkpoint(sc_tape *t, sc_block block, const void *context, sc_tensor **in, int inputs, sc_tensor **out) {
    bool recording = t->recording;
    t->recording = false;
    bool ok = block(t, in, out, context);
    t->recording = recording;
    if (!ok || !recording) return ok;
    sc__checkpoint *c = (sc__checkpoint *)sc__arena_take(&t->host, sizeof *c);
    if (!c) return false;
    *c = (sc__checkpoint){block, context, t->sets, inputs};
    sc_tensor yes = {.needs_grad = true}; /* weights inside may need a gradient where no input does */
    sc__op *op = sc__record(t, sc__checkpoint_backward, out[0], &yes, NULL, NULL);
    if (!op) return false;
    for (int i = 0; i < inputs; i++) op->in[i] = in[i];
    op->out[1] = out[1];
    if (out[1]) out[1]->needs_grad = true;
    op->extra = c;
    return true;
}

/* ==== Files ==================================================================================
 *
 * Whole files in and out, JSON (RFC 8259) and safetensors. A safetensors file is an 8-byte
 * little-endian length, a JSON header of that length that gives each tensor's type, shape and
 * place, then the data without gaps. It is mapped, not read: opening 24 GB touches the header only.
 * Nothing that comes from a file is trusted: every length, offset and shape is checked first.
 * Files are written under a temporary name, so that a half-written one is never seen.
 */

#include <dirent.h>

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

/* Writing: into `path`.tmp-PID, which takes the place of `path` only when all of it is on disk. */
typedef struct sc__writer { FILE *file; const char *path; char *temporary; } sc__writer;

static bool sc__write_fail(const char *path) {
    return sc__fail("%s: cannot write: %s", path, strerror(errno));
}

static bool sc__write_begin(sc__writer *w, const char *path) {
    size_t n = strlen(path) + 32;
    *w = (sc__writer){.path = path, .temporary = (char *)sc__alloc(n, 1)};
    if (!w->temporary) return false;
    snprintf(w->temporary, n, "%s.tmp-%ld", path, (long)getpid());
    w->file = fopen(w->temporary, "wb");
    if (w->file) return true;
    sc__write_fail(path);
    SC_FREE(w->temporary);
    return false;
}

static bool sc__write_bytes(sc__writer *w, const void *data, size_t n) {
    return n == 0 || fwrite(data, 1, n, w->file) == n || sc__write_fail(w->path);
}

/* Ends what sc__write_begin began; with `ok` false (error already set) nothing remains of it. */
static bool sc__write_end(sc__writer *w, bool ok) {
    if (ok && (fflush(w->file) || fsync(fileno(w->file)))) ok = sc__write_fail(w->path);
    if (fclose(w->file) && ok) ok = sc__write_fail(w->path);
    if (ok && rename(w->temporary, w->path)) ok = sc__write_fail(w->path);
    if (!ok) remove(w->temporary);
    SC_FREE(w->temporary);
    return ok;
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

/* A new item; the array grows at powers of two. */
static sc_json *sc__json_push(sc_json *v) {
    if (!(v->count & (v->count - 1))) {
        size_t capacity = v->count ? 2 * (size_t)v->count : 1;
        sc_json *items = (sc_json *)SC_REALLOC(v->u.items, capacity * sizeof *items);
        if (!items) return sc__fail("out of memory (%zu JSON values)", capacity), NULL;
        v->u.items = items;
    }
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
typedef struct sc__mapping { const char *shard; void *data; size_t size; sc_json *header; } sc__mapping;
typedef struct sc__entry { const char *name; sc_tensor tensor; uint64_t begin, end; } sc__entry;

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
    enum { PATTERNS = 4 };
    static const char *const patterns[PATTERNS] = {"*.safetensors.index.json",
        "diffusion_pytorch_model.safetensors", "model.safetensors", "*.safetensors"};
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
    return sc__fail("%s: several %s here; give the path of one", folder, patterns[best]), NULL;
}

sc_file *sc_file_open(const char *path) {
    struct stat s;
    sc_file *f = (sc_file *)sc__alloc(1, sizeof *f);
    if (!f) return NULL;
    bool folder = stat(path, &s) == 0 && S_ISDIR(s.st_mode), ok;
    f->path = folder ? sc__weights_in(path) : sc__strdup(path);
    if (!f->path) ok = false;
    else if (sc__matches(f->path, "*.json")) ok = sc__map_shards(f, f->path);
    else ok = sc__map_part(f, f->path, NULL, NULL);
    if (ok && sc__sort_entries(f)) return f;
    sc_file_close(f);
    return NULL;
}

const char *sc_file_path(const sc_file *f) { return f->path; }
int64_t sc_file_count(const sc_file *f) { return f->count; }
const char *sc_file_name(const sc_file *f, int64_t i) { return f->entries[i].name; }
const sc_tensor *sc_file_tensor(const sc_file *f, int64_t i) { return &f->entries[i].tensor; }

const sc_tensor *sc_file_find(const sc_file *f, const char *name) {
    sc__entry key = {.name = name};
    if (!f->count) return NULL;
    void *found = bsearch(&key, f->entries, (size_t)f->count, sizeof *f->entries, sc__by_name);
    return found ? &((const sc__entry *)found)->tensor : NULL;
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
    if (t->length + n > t->capacity) {
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
    sc__text_add(t, "{\"__metadata__\":{", 17);
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
    while (t->length % 64 != 56 && !t->failed) sc__text_add(t, " ", 1); /* data at n * 64 */
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

/* Wider types go first, so that each tensor is aligned to its type; else the given order stays.
 * metadata: key, value, key, value, ..., NULL; or NULL. */
bool sc_file_save(const char *path, const sc_named *tensors, int64_t count,
                  const char *const *metadata) {
    sc_named *sorted = (sc_named *)sc__alloc((size_t)count, sizeof *sorted);
    sc__text header = {0};
    sc__writer w;
    unsigned char length[8];
    int64_t n = 0;
    if (!sorted) return false;
    for (int size = 8; size > 0; size /= 2)
        for (int64_t i = 0; i < count; i++)
            if (sc_dtype_size(tensors[i].dtype) == size) sorted[n++] = tensors[i];
    sc__header_text(&header, sorted, count, metadata);
    bool ok = (!header.failed || sc__fail("%s: out of memory", path)) && sc__write_begin(&w, path);
    if (ok) {
        for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header.length >> (8 * i));
        ok = sc__write_bytes(&w, length, 8) && sc__write_bytes(&w, header.data, header.length);
        for (int64_t i = 0; ok && i < count; i++) ok = sc__write_tensor(&w, &sorted[i]);
        ok = sc__write_end(&w, ok);
    }
    SC_FREE(header.data);
    SC_FREE(sorted);
    return ok;
}

/* ==== Weights of a network ====================================================================
 *
 * A network asks for its weights by their names on disk and states the shape it needs, so opening
 * a model is at the same time the check that the file fits. Frozen matrices stay as they are on
 * disk, mapped; vectors (biases, norms) become f32, and so does everything that will be trained.
 */

/* Weights of up to 512 MiB: worth widening to f32 once, since then no product has to. */
static bool sc__small_file(const char *folder) {
    struct stat s;
    char *path = sc__weights_in(folder);
    bool small = path && stat(path, &s) == 0 && s.st_size <= (off_t)512 << 20 && !strstr(path, ".index.json");
    SC_FREE(path);
    return small;
}

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
        if (net->weights[i]->owned) net->backend->release(net->weights[i]->tensor.data);
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

/* Fills `x` with the f32 values of `found`, or with random ones. */
static bool sc__fill_weight(sc_net *net, const char *name, sc_tensor *x, const sc_tensor *found) {
    int64_t n = sc_count(x);
    float *host = (float *)sc__alloc((size_t)n, sizeof *host);
    if (!host) return false;
    if (found) sc_to_f32(host, found->data, found->dtype, n);
    else sc__random_weight(net, name, host, x);
    x->dtype = SC_F32;
    x->data = net->backend->alloc((size_t)n * 4);
    if (x->data) net->backend->upload(x->data, host, (size_t)n * 4);
    SC_FREE(host);
    return x->data != NULL;
}

static bool sc__check_weight(const sc_net *net, const char *name, const sc_tensor *want, const sc_tensor *found) {
    char expected[96], actual[96];
    const char *path = sc_file_path(net->file);
    if (!found) return sc__fail("%s: tensor '%s' is missing", path, name);
    if (found->dtype > SC_F64) return sc__fail("%s: tensor '%s' has type %s; weights must be floating point", path, name, sc_dtype_name(found->dtype));
    bool same = found->ndim == want->ndim;
    for (int i = 0; same && i < want->ndim; i++) same = found->shape[i] == want->shape[i];
    if (same) return true;
    return sc__fail("%s: tensor '%s' has shape %s; config.json asks for %s", path, name,
                    sc__shape_text(found, actual), sc__shape_text(want, expected));
}

sc_tensor *sc_net_weight(sc_net *net, const char *name, int ndim, const int64_t *shape) {
    sc_tensor x = {.ndim = ndim, .dtype = SC_F32};
    for (int i = 0; i < ndim; i++) x.shape[i] = shape[i];
    const sc_tensor *found = net->file ? sc_file_find(net->file, name) : NULL;
    if (net->file && !sc__check_weight(net, name, &x, found)) return NULL;
    bool as_on_disk = found && ndim > 1 && !net->widen && found->dtype != SC_F64;
    if (as_on_disk) {
        x.dtype = found->dtype;
        x.data = found->data;
    } else if (!sc__fill_weight(net, name, &x, found)) return NULL;
    if ((net->count & (net->count - 1)) == 0) { /* at powers of two: double the list */
        size_t capacity = net->count ? 2 * (size_t)net->count : 1;
        void *list = SC_REALLOC(net->weights, capacity * sizeof *net->weights);
        if (list) net->weights = (sc_weight **)list;
        else sc__fail("out of memory: list of %zu weights", capacity);
        if (!list) return NULL;
    }
    sc_weight *w = (sc_weight *)sc__alloc(1, sizeof *w);
    char *copy = sc__strdup(name);
    if (!w || !copy) {
        SC_FREE(w);
        SC_FREE(copy);
        return NULL;
    }
    *w = (sc_weight){.name = copy, .tensor = x, .owned = !as_on_disk};
    net->weights[net->count++] = w;
    return &w->tensor;
}

bool sc_net_linear(sc_net *net, sc_linear_layer *layer, const char *name, int64_t out, int64_t in, bool bias) {
    char full[256];
    snprintf(full, sizeof full, "%s.weight", name);
    layer->weight = sc_net_weight(net, full, 2, (const int64_t[]){out, in});
    if (!layer->weight) return false;
    snprintf(full, sizeof full, "%s.bias", name);
    layer->bias = bias ? sc_net_weight(net, full, 1, &out) : NULL;
    return !bias || layer->bias;
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
    bool checkpoint;                /* keep only the blocks' inputs for the backward pass */
};

const sc_flux_config *sc_flux_config_of(const sc_flux *flux) { return &flux->config; }

void sc_flux_checkpointing(sc_flux *flux, bool on) { flux->checkpoint = on; }

int64_t sc_flux_parameters(const sc_flux *flux) {
    int64_t n = 0;
    for (int64_t i = 0; i < flux->net->count; i++) n += sc_count(&flux->net->weights[i]->tensor);
    return n;
}

/* ---- Opening ---- */

/* An integer >= 1 from a config; false with the error set. */
static bool sc__config_int(const sc_json *config, const char *path, const char *key, int fallback, int *value) {
    double number = sc_json_number(sc_json_get(config, key), fallback);
    *value = fallback;
    if (!(number >= 1 && number <= 1 << 24 && number == floor(number)))
        return sc__fail("%s: '%s' must be a whole number from 1 up", path, key);
    *value = (int)number;
    return true;
}

static bool sc__flux_read_config(sc_flux_config *c, const sc_json *json, const char *path) {
    const sc_json *axes = sc_json_get(json, "axes_dims_rope");
    const char *class_name = sc_json_string(sc_json_get(json, "_class_name"), "FluxTransformer2DModel");
    if (strcmp(class_name, "FluxTransformer2DModel"))
        return sc__fail("%s: this is a %s; only FLUX.1 (FluxTransformer2DModel) is supported", path, class_name);
    if (!sc__config_int(json, path, "in_channels", 64, &c->in_channels) ||
        !sc__config_int(json, path, "out_channels", c->in_channels, &c->out_channels) ||
        !sc__config_int(json, path, "num_layers", 19, &c->layers) ||
        !sc__config_int(json, path, "num_single_layers", 38, &c->single_layers) ||
        !sc__config_int(json, path, "num_attention_heads", 24, &c->heads) ||
        !sc__config_int(json, path, "attention_head_dim", 128, &c->head_size) ||
        !sc__config_int(json, path, "joint_attention_dim", 4096, &c->text_channels) ||
        !sc__config_int(json, path, "pooled_projection_dim", 768, &c->pooled_channels)) return false;
    int sum = 0;
    for (int i = 0; i < 3; i++) {
        c->rope_axes[i] = (int)sc_json_number(sc_json_at(axes, i), (int[]){16, 56, 56}[i]);
        if (c->rope_axes[i] < 2 || c->rope_axes[i] > 256 || c->rope_axes[i] % 2) return sc__fail("%s: axes_dims_rope must be even numbers up to 256", path);
        sum += c->rope_axes[i];
    }
    if (sum != c->head_size || sum > 256)
        return sc__fail("%s: axes_dims_rope sum to %d; attention_head_dim is %d (at most 256)", path, sum, c->head_size);
    if ((int64_t)c->heads * c->head_size > 1 << 20) return sc__fail("%s: %d heads of %d is too wide", path, c->heads, c->head_size);
    c->guidance = sc_json_bool(sc_json_get(json, "guidance_embeds"), false);
    return true;
}

static bool sc__flux_linear(sc_flux *f, sc_linear_layer *layer, const char *prefix, const char *name, int64_t out, int64_t in) {
    sc__module *m = &f->modules[f->module_count++];
    snprintf(m->name, sizeof m->name, "%.60s%.60s", prefix, name);
    m->layer = layer;
    return sc_net_linear(f->net, layer, m->name, out, in, true);
}

static bool sc__flux_norm(sc_flux *f, sc_tensor **weight, const char *prefix, const char *name) {
    char full[SC_MAX_NAME];
    snprintf(full, sizeof full, "%.60s%.50s.weight", prefix, name);
    return (*weight = sc_net_weight(f->net, full, 1, (const int64_t[]){f->config.head_size})) != NULL;
}

static bool sc__flux_stream(sc_flux *f, sc__stream *s, const char *prefix, bool text) {
    static const char *const names[2][9] = {
        {"norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2",
         "attn.norm_q", "attn.norm_k"},
        {"norm1_context.linear", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
         "ff_context.net.0.proj", "ff_context.net.2", "attn.norm_added_q", "attn.norm_added_k"}};
    const char *const *name = names[text];
    int64_t c = (int64_t)f->config.heads * f->config.head_size;
    return sc__flux_linear(f, &s->mod, prefix, name[0], 6 * c, c) &&
           sc__flux_linear(f, &s->q, prefix, name[1], c, c) && sc__flux_linear(f, &s->k, prefix, name[2], c, c) &&
           sc__flux_linear(f, &s->v, prefix, name[3], c, c) && sc__flux_linear(f, &s->out, prefix, name[4], c, c) &&
           sc__flux_linear(f, &s->up, prefix, name[5], 4 * c, c) &&
           sc__flux_linear(f, &s->down, prefix, name[6], c, 4 * c) &&
           sc__flux_norm(f, &s->norm_q, prefix, name[7]) && sc__flux_norm(f, &s->norm_k, prefix, name[8]);
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
        !sc__flux_linear(f, &f->context_embedder, "", "context_embedder", width, c->text_channels) ||
        !sc__flux_embedder(f, &f->time, "timestep", 256) ||
        (c->guidance && !sc__flux_embedder(f, &f->guidance, "guidance", 256)) ||
        !sc__flux_embedder(f, &f->pooled, "text", c->pooled_channels)) return false;
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

sc_flux *sc_flux_open(const sc_backend *backend, const char *folder, bool widen, bool random, uint64_t seed) {
    char *path = sc__join(folder, "config.json");
    sc_flux *f = (sc_flux *)sc__alloc(1, sizeof *f);
    size_t length;
    if (path && f) f->config_text = sc__read_file(path, &length);
    sc_json *json = f && f->config_text ? sc_json_parse(f->config_text, length, path) : NULL;
    bool ok = json && sc__flux_read_config(&f->config, json, path);
    sc_json_free(json);
    SC_FREE(path);
    if (ok) {
        f->double_blocks = (sc__double_block *)sc__alloc((size_t)f->config.layers, sizeof *f->double_blocks);
        f->single_blocks = (sc__single_block *)sc__alloc((size_t)f->config.single_layers, sizeof *f->single_blocks);
        f->modules = (sc__module *)sc__alloc((size_t)(10 + 14 * f->config.layers + 6 * f->config.single_layers), sizeof *f->modules);
        f->net = sc_net_open(backend, random ? NULL : folder, widen || random);
        ok = f->double_blocks && f->single_blocks && f->modules && f->net;
    }
    if (ok) {
        f->net->rng.state = seed;
        ok = sc__flux_weights(f);
    }
    if (ok && random) sc__flux_zero(f);
    if (ok) return f;
    sc_flux_close(f);
    return NULL;
}

void sc_flux_close(sc_flux *f) {
    if (!f) return;
    if (f->rope.data) f->net->backend->release(f->rope.data);
    sc_net_close(f->net);
    SC_FREE(f->config_text);
    SC_FREE(f->double_blocks);
    SC_FREE(f->single_blocks);
    SC_FREE(f->modules);
    SC_FREE(f);
}

bool sc_flux_save(const sc_flux *f, const char *folder, sc_dtype dtype, const char *const *metadata) {
    sc_net *net = f->net;
    char *config = sc__join(folder, "config.json"), *weights = sc__join(folder, "diffusion_pytorch_model.safetensors");
    sc_named *named = (sc_named *)sc__alloc((size_t)net->count, sizeof *named);
    sc_tensor *host = (sc_tensor *)sc__alloc((size_t)net->count, sizeof *host);
    bool ok = config && weights && named && host;
    if (ok && mkdir(folder, 0777) && errno != EEXIST) ok = sc__fail("%s: %s", folder, strerror(errno));
    for (int64_t i = 0; ok && i < net->count; i++) {
        const sc_tensor *x = &net->weights[i]->tensor;
        size_t bytes = (size_t)(sc_count(x) * sc_dtype_size(x->dtype));
        host[i] = *x;
        ok = (host[i].data = sc__alloc(bytes, 1)) != NULL;
        if (ok) net->backend->download(host[i].data, x->data, bytes);
        named[i] = (sc_named){net->weights[i]->name, &host[i], x->dtype == SC_F32 ? dtype : x->dtype};
    }
    ok = ok && sc_file_save(weights, named, net->count, metadata) &&
         sc__write_file(config, f->config_text, strlen(f->config_text));
    for (int64_t i = 0; host && i < net->count; i++) SC_FREE(host[i].data);
    SC_FREE(host);
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
        double position[3] = {0, pixel < 0 ? 0 : (double)(pixel / w), pixel < 0 ? 0 : (double)(pixel % w)};
        for (int axis = 0; axis < 3; axis++)
            for (int i = 0; i < f->config.rope_axes[axis]; i += 2) {
                double angle = position[axis] * pow(10000.0, -(double)i / f->config.rope_axes[axis]);
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

static sc_tensor *sc__mlp(sc_tape *t, sc_tensor *x, const sc_linear_layer *up, const sc_linear_layer *down) {
    return sc_linear(t, sc_activate(t, SC_GELU_TANH, sc_linear(t, x, up)), down);
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
    sc_tensor *o = sc_attention(t, query, key, sc_concat_tokens(t, v[1], v[0]), heads, scale, NULL, false);
    int64_t from[2] = {in[1]->shape[1], 0};
    for (int i = 0; i < 2; i++) {
        sc_tensor *own = sc_slice_tokens(t, o, from[i], in[i]->shape[1]);
        sc_tensor *x = sc_gated_residual(t, in[i], sc_linear(t, own, &stream[i]->out), mod[i], 2);
        sc_tensor *h = sc__mlp(t, sc_ln_modulate(t, x, mod[i], 3, 4), &stream[i]->up, &stream[i]->down);
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
    sc_tensor *h = sc_activate(t, SC_GELU_TANH, sc_linear(t, n, &block->up));
    sc_tensor *both = sc_concat_channels(t, o, h);
    out[0] = sc_gated_residual(t, in[0], sc_linear(t, both, &block->out), mod, 2);
    return out[0] != NULL;
}

/* The vector that modulates every block: silu(time + guidance + pooled text), [B,C]. */
static sc_tensor *sc__flux_modulation(sc_flux *f, sc_tape *t, const sc_flux_input *in) {
    int64_t batch = in->x->shape[0];
    sc_tensor *sum = sc__embed(t, &f->time, sc_timestep_embedding(t, in->time, batch, 256));
    if (f->config.guidance)
        sum = sc_add(t, sum, sc__embed(t, &f->guidance, sc_timestep_embedding(t, in->guidance, batch, 256)));
    return sc_activate(t, SC_SILU, sc_add(t, sum, sc__embed(t, &f->pooled, in->pooled)));
}

/* Replaces the first one or two of x by the block's outputs. */
static bool sc__run_block(const sc_flux *f, sc_tape *t, sc_block block, const void *context, sc_tensor **x, int inputs) {
    sc_tensor *out[2] = {NULL, NULL};
    bool ok = f->checkpoint ? sc_checkpoint(t, block, context, x, inputs, out) : block(t, x, out, context);
    x[0] = out[0];
    if (out[1]) x[1] = out[1];
    return ok;
}

sc_tensor *sc_flux_velocity(sc_flux *f, sc_tape *t, const sc_flux_input *in) {
    if (!in->x || !in->context || !in->pooled) return NULL;
    int64_t text_tokens = in->context->shape[1], image_tokens = (int64_t)in->h * in->w;
    if (in->x->shape[1] != image_tokens) {
        sc__fail("latent has %lld tokens, the grid is %d x %d", (long long)in->x->shape[1], in->h, in->w);
        return NULL;
    }
    if (!sc__flux_rope(f, (int)text_tokens, in->h, in->w)) return NULL;
    sc_tensor *mod = sc__flux_modulation(f, t, in);
    sc_tensor *x[3] = {sc_linear(t, in->x, &f->x_embedder), sc_linear(t, in->context, &f->context_embedder), mod};
    if (!x[0] || !x[1] || !mod) return NULL;
    for (int i = 0; i < f->config.layers; i++)
        if (!sc__run_block(f, t, sc__double_forward, &f->double_blocks[i], x, 3)) return NULL;
    sc_tensor *joined[2] = {sc_concat_tokens(t, x[1], x[0]), mod};
    if (!joined[0]) return NULL;
    for (int i = 0; i < f->config.single_layers; i++)
        if (!sc__run_block(f, t, sc__single_forward, &f->single_blocks[i], joined, 2)) return NULL;
    sc_tensor *image = sc_slice_tokens(t, joined[0], text_tokens, image_tokens);
    sc_tensor *n = sc_ln_modulate(t, image, sc_linear(t, mod, &f->norm_out), 1, 0); /* scale comes first */
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
    return (p->grad = sc__params_array(p)) && (p->m = sc__params_array(p)) && (p->v = sc__params_array(p));
}

void sc_params_copy(sc_params *p, sc_set to, sc_set from) {
    int64_t slice = 1 << 20;
    float *host = (float *)sc__alloc((size_t)slice, sizeof *host);
    for (int64_t i = 0; host && i < p->count; i += slice) {
        size_t bytes = (size_t)(p->count - i < slice ? p->count - i : slice) * 4;
        p->backend->download(host, p->set[from] + i, bytes);
        p->backend->upload(p->set[to] + i, host, bytes);
    }
    SC_FREE(host);
}

static sc_tensor *sc__params_tensor(sc_params *p, float *data, int64_t offset, bool trained, int64_t rows, int64_t columns) {
    sc_tensor *x = (sc_tensor *)sc__alloc(1, sizeof *x);
    if (!x) return NULL;
    *x = (sc_tensor){.data = data + offset, .dtype = SC_F32, .ndim = 2, .shape = {rows, columns}};
    x->needs_grad = trained;
    x->grad = trained ? p->grad + offset : NULL;
    return x;
}

/* Points the adapters of every module at their parts of the arrays. */
static bool sc__attach(sc_params *p, float scale) {
    int64_t offset = 0;
    for (int i = 0; i < p->flux->module_count; i++) {
        sc_linear_layer *layer = p->flux->modules[i].layer;
        int64_t out = layer->weight->shape[0], in = layer->weight->shape[1];
        sc_adapter *lora = &p->adapters[i];
        lora->rank = p->rank;
        lora->scale = scale;
        for (int s = 0; s < SC_SETS; s++) {
            if (!p->set[s]) continue;
            lora->a[s] = sc__params_tensor(p, p->set[s], offset, s == SC_STUDENT, p->rank, in);
            lora->b[s] = sc__params_tensor(p, p->set[s], offset + p->rank * in, s == SC_STUDENT, out, p->rank);
            if (!lora->a[s] || !lora->b[s]) return false;
        }
        offset += p->rank * (in + out);
        lora->next = layer->adapters;
        layer->adapters = lora;
    }
    return true;
}

sc_params *sc_params_lora(sc_flux *flux, int rank, float alpha, uint64_t seed) {
    sc_params *p = (sc_params *)sc__alloc(1, sizeof *p);
    if (!p) return NULL;
    p->backend = flux->net->backend;
    p->flux = flux;
    p->rank = rank;
    for (int i = 0; i < flux->module_count; i++) {
        const sc_tensor *w = flux->modules[i].layer->weight;
        p->count += rank * (w->shape[0] + w->shape[1]);
    }
    p->adapters = (sc_adapter *)sc__alloc((size_t)flux->module_count, sizeof *p->adapters);
    float *start = (float *)sc__alloc((size_t)p->count, sizeof *start), *a = start;
    bool ok = p->adapters && start && sc__params_arrays(p, false) && sc__attach(p, alpha / (float)rank);
    if (ok) {
        sc_rng rng = {seed};
        for (int i = 0; i < flux->module_count; i++) {
            const sc_tensor *w = flux->modules[i].layer->weight;
            int64_t n = rank * w->shape[1];
            sc_normal(&rng, a, n);
            for (int64_t j = 0; j < n; j++) a[j] /= (float)rank;
            a += n + rank * w->shape[0];
        }
        for (int s = SC_STUDENT; s < SC_SETS; s++) p->backend->upload(p->set[s], start, (size_t)p->count * 4);
    }
    SC_FREE(start);
    if (ok) return p;
    sc_params_free(p);
    return NULL;
}

sc_params *sc_params_full(sc_flux *flux, bool teacher) {
    sc_params *p = (sc_params *)sc__alloc(1, sizeof *p);
    if (!p) return NULL;
    p->backend = flux->net->backend;
    p->flux = flux;
    p->count = sc_flux_parameters(flux);
    if (!sc__params_arrays(p, teacher)) {
        sc_params_free(p);
        return NULL;
    }
    float *host = (float *)sc__alloc((size_t)p->count, sizeof *host), *end = host;
    for (int64_t i = 0; host && i < flux->net->count; i++) {
        sc_weight *w = flux->net->weights[i];
        size_t bytes = (size_t)sc_count(&w->tensor) * 4;
        p->backend->download(end, w->tensor.data, bytes);
        p->backend->release(w->tensor.data); /* sc_params_use points it into a set */
        w->owned = false;
        w->tensor.needs_grad = true;
        end += sc_count(&w->tensor);
    }
    for (int s = 0; host && s < SC_SETS; s++)
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
    for (int i = 0; p->adapters && i < p->flux->module_count; i++) {
        sc_linear_layer *layer = p->flux->modules[i].layer;
        for (sc_adapter **link = &layer->adapters; *link; link = &(*link)->next)
            if (*link == &p->adapters[i]) {
                *link = p->adapters[i].next;
                break;
            }
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
    SC_FREE(p);
}

double sc_params_step(sc_params *p, sc_adamw *o, float clip, float fast_decay, float slow_decay) {
    double norm = sqrt(p->backend->sum_squares(p->grad, p->count));
    if (isfinite(norm)) {
        o->grad_scale = clip > 0 && norm > clip ? (float)(clip / norm) : 1.f;
        o->step++;
        p->backend->adamw(p->set[SC_STUDENT], p->grad, p->m, p->v, p->count, o);
        p->backend->ema(p->set[SC_FAST], p->set[SC_STUDENT], p->count, fast_decay);
        p->backend->ema(p->set[SC_SLOW], p->set[SC_STUDENT], p->count, slow_decay);
    }
    p->backend->zero(p->grad, (size_t)p->count * 4);
    return norm;
}

/* ==== LoRA files ============================================================================ */

bool sc_lora_save(const sc_params *p, sc_set set, const char *path, const char *const *metadata) {
    int n = p->flux->module_count;
    sc_named *named = (sc_named *)sc__alloc((size_t)n * 2, sizeof *named);
    sc_tensor *tensors = (sc_tensor *)sc__alloc((size_t)n * 2, sizeof *tensors);
    char(*names)[SC_MAX_NAME + 32] = (char(*)[SC_MAX_NAME + 32])sc__alloc((size_t)n * 2, sizeof *names);
    float *host = (float *)sc__alloc((size_t)p->count, sizeof *host), *data = host;
    bool ok = named && tensors && names && host;
    if (ok) p->backend->download(host, p->set[set], (size_t)p->count * 4);
    for (int i = 0; ok && i < 2 * n; i++) {
        const sc_tensor *x = i % 2 ? p->adapters[i / 2].b[set] : p->adapters[i / 2].a[set];
        snprintf(names[i], sizeof names[i], "transformer.%s.lora_%c.weight", p->flux->modules[i / 2].name, i % 2 ? 'B' : 'A');
        tensors[i] = *x;
        tensors[i].data = data;
        if (i % 2) /* the scale alpha / rank is folded into B */
            for (int64_t j = 0; j < sc_count(x); j++) data[j] *= p->adapters[i / 2].scale;
        data += sc_count(x);
        named[i] = (sc_named){names[i], &tensors[i], SC_BF16};
    }
    ok = ok && sc_file_save(path, named, 2 * n, metadata);
    SC_FREE(named);
    SC_FREE(tensors);
    SC_FREE(names);
    SC_FREE(host);
    return ok;
}

/* The module that a tensor name such as "transformer.x_embedder.lora_A.weight" is about, or NULL. */
static sc__module *sc__lora_module(sc_flux *f, const char *name, const char *suffix) {
    static const char *const prefixes[] = {"transformer.", "base_model.model.", ""};
    size_t length = strlen(name), tail = strlen(suffix);
    if (length <= tail || strcmp(name + length - tail, suffix)) return NULL;
    for (int p = 0; p < 3; p++) {
        size_t skip = strlen(prefixes[p]);
        if (strncmp(name, prefixes[p], skip)) continue;
        for (int i = 0; i < f->module_count; i++)
            if (strlen(f->modules[i].name) == length - tail - skip &&
                !strncmp(f->modules[i].name, name + skip, length - tail - skip)) return &f->modules[i];
    }
    return NULL;
}

/* The B and the scale (alpha / rank; 1 without alpha) that belong to the A called `name`. */
static bool sc__lora_pair(const sc_file *file, const char *name, const sc_tensor *a, const sc_linear_layer *layer,
                          const sc_tensor **b, float *scale) {
    char other[SC_MAX_NAME + 64];
    int stem = (int)(strlen(name) - strlen(".lora_A.weight"));
    snprintf(other, sizeof other, "%.*s.lora_B.weight", stem, name);
    *b = sc_file_find(file, other);
    if (!*b) return sc__fail("%s: '%s' has no partner '%s'", sc_file_path(file), name, other);
    const sc_tensor *w = layer->weight, *parts[2] = {a, *b};
    for (int i = 0; i < 2; i++)
        if (parts[i]->ndim != 2 || parts[i]->shape[i] != a->shape[0] || parts[i]->shape[1 - i] != w->shape[1 - i] ||
            parts[i]->dtype > SC_F64)
            return sc__fail("%s: '%.*s' does not fit a layer of %lld x %lld: is this LoRA for another model?",
                            sc_file_path(file), stem, name, (long long)w->shape[0], (long long)w->shape[1]);
    snprintf(other, sizeof other, "%.*s.alpha", stem, name);
    const sc_tensor *alpha = sc_file_find(file, other);
    *scale = 1;
    if (alpha && sc_count(alpha) == 1) sc_to_f32(scale, alpha->data, alpha->dtype, 1), *scale /= (float)a->shape[0];
    return true;
}

static sc_tensor *sc__lora_factor(const sc_backend *be, const sc_tensor *x) {
    sc_tensor *y = (sc_tensor *)sc__alloc(1, sizeof *y);
    float *host = (float *)sc__alloc((size_t)sc_count(x), sizeof *host);
    if (y && host) {
        *y = (sc_tensor){.dtype = SC_F32, .ndim = 2, .shape = {x->shape[0], x->shape[1]}};
        sc_to_f32(host, x->data, x->dtype, sc_count(x));
        y->data = be->alloc((size_t)sc_count(x) * 4);
        if (y->data) be->upload(y->data, host, (size_t)sc_count(x) * 4);
    }
    SC_FREE(host);
    if (y && y->data) return y;
    SC_FREE(y);
    return NULL;
}

static void sc__lora_free(const sc_backend *be, sc_adapter *lora) {
    sc_tensor *factors[2] = {lora->a[SC_TEACHER], lora->b[SC_TEACHER]};
    for (int i = 0; i < 2; i++) {
        if (factors[i]) be->release(factors[i]->data);
        SC_FREE(factors[i]);
    }
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

static bool sc__lora_add(sc_flux *f, const sc_file *file, sc_linear_layer *layer, const char *name, const sc_tensor *a,
                         float scale) {
    const sc_tensor *b;
    float own;
    if (!sc__lora_pair(file, name, a, layer, &b, &own)) return false;
    sc_adapter *lora = (sc_adapter *)sc__alloc(1, sizeof *lora);
    if (!lora) return false;
    *lora = (sc_adapter){.rank = (int)a->shape[0], .scale = scale * own, .loaded = true};
    lora->a[SC_TEACHER] = sc__lora_factor(f->net->backend, a);
    lora->b[SC_TEACHER] = sc__lora_factor(f->net->backend, b);
    if (!lora->a[SC_TEACHER] || !lora->b[SC_TEACHER]) {
        sc__lora_free(f->net->backend, lora);
        return false;
    }
    lora->next = layer->adapters;
    layer->adapters = lora;
    return true;
}

bool sc_lora_load(sc_flux *f, const char *path, float scale, sc_lora_report *report) {
    *report = (sc_lora_report){0};
    sc_file *file = sc_file_open(path);
    bool ok = file != NULL;
    for (int64_t i = 0; ok && i < sc_file_count(file); i++) {
        const char *name = sc_file_name(file, i);
        size_t length = strlen(name), used = strlen(report->missed);
        if (length < 14 || strcmp(name + length - 14, ".lora_A.weight")) continue;
        report->total++;
        sc__module *module = sc__lora_module(f, name, ".lora_A.weight");
        if (module) ok = sc__lora_add(f, file, module->layer, name, sc_file_tensor(file, i), scale), report->applied += ok;
        else if (used + length + 6 < sizeof report->missed)
            snprintf(report->missed + used, sizeof report->missed - used, "%s%s", used ? " " : "", name);
    }
    if (ok && !report->applied)
        ok = sc__fail("%s: 0 of %d LoRA layers fit this model: is it a LoRA for another one?", path, report->total);
    sc_file_close(file);
    return ok;
}

float sc_lora_scale(const char *path, int steps) {
    sc_file *file = sc_file_open(path);
    const char *table = file ? sc_file_metadata(file, "scales") : NULL;
    float scale = 1;
    long nearest = LONG_MAX;
    while (table && *table) {
        char *end;
        long count = strtol(table, &end, 10);
        if (end == table || *end != ':') break;
        float value = strtof(end + 1, &end);
        if (labs(count - steps) < nearest) nearest = labs(count - steps), scale = value;
        table = *end ? end + 1 : end;
    }
    sc_file_close(file);
    return scale;
}

bool sc_lora_start(sc_params *p, const char *path) {
    sc_file *file = sc_file_open(path);
    bool ok = file != NULL;
    for (int i = 0; ok && i < p->flux->module_count; i++) {
        char name[SC_MAX_NAME + 32];
        const sc_tensor *b = NULL;
        float scale = 1, *values = NULL;
        snprintf(name, sizeof name, "transformer.%s.lora_A.weight", p->flux->modules[i].name);
        const sc_tensor *a = sc_file_find(file, name);
        if (!a) ok = sc__fail("%s: no tensor '%s'", path, name);
        else if (a->shape[0] != p->rank) ok = sc__fail("%s: rank %lld; this run has rank %d", path, (long long)a->shape[0], p->rank);
        ok = ok && sc__lora_pair(file, name, a, p->flux->modules[i].layer, &b, &scale);
        for (int part = 0; ok && part < 2; part++) {
            const sc_tensor *x = part ? b : a;
            values = (float *)sc__alloc((size_t)sc_count(x), sizeof *values);
            ok = values != NULL;
            if (ok) sc_to_f32(values, x->data, x->dtype, sc_count(x));
            for (int64_t j = 0; ok && part && j < sc_count(x); j++) values[j] *= scale / p->adapters[i].scale;
            for (int s = SC_STUDENT; ok && s < SC_SETS; s++)
                p->backend->upload((part ? p->adapters[i].b : p->adapters[i].a)[s]->data, values, (size_t)sc_count(x) * 4);
            SC_FREE(values);
        }
    }
    sc_file_close(file);
    return ok;
}

bool sc_lora_merge(sc_flux *f) {
    for (int i = 0; i < f->module_count; i++) {
        sc_tensor *w = f->modules[i].layer->weight;
        if (w->dtype != SC_F32) return sc__fail("merging needs f32 weights");
        for (const sc_adapter *l = f->modules[i].layer->adapters; l; l = l->next)
            if (l->loaded)
                f->net->backend->gemm(w->shape[0], w->shape[1], l->rank, l->scale, sc__whole(l->b[SC_TEACHER], false),
                                      sc__whole(l->a[SC_TEACHER], false), 1, sc__whole(w, false), NULL);
    }
    sc_lora_unload(f);
    return true;
}

/* ==== Flow matching: times and sampler ======================================================= */

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
    const sc_flux_config *c = &f->config;
    float *host = (float *)sc__alloc((size_t)(s->steps + 1 + 4 * batch), sizeof *host);
    if (!host) return false;
    float *times = host + 4 * batch, *time = host, *guidance = host + batch;
    float *one = host + 2 * batch, *delta = host + 3 * batch;
    sc_schedule(times, s->steps, s->shift);
    for (int b = 0; b < batch; b++) guidance[b] = s->guidance, one[b] = 1;
    sc_tape_record(t, false);
    sc_tape_use(t, s->sets);
    bool ok = true;
    for (int i = 0; ok && i < s->steps; i++) {
        sc_tape_reset(t);
        for (int b = 0; b < batch; b++) time[b] = times[i], delta[b] = times[i + 1] - times[i];
        sc_tensor *x = sc_from(t, 3, (const int64_t[]){batch, (int64_t)s->h * s->w, c->in_channels}, latents);
        sc_flux_input in = {
            .x = x, .time = time, .guidance = guidance, .h = s->h, .w = s->w,
            .context = sc_from(t, 3, (const int64_t[]){batch, text_tokens, c->text_channels}, context),
            .pooled = sc_from(t, 2, (const int64_t[]){batch, c->pooled_channels}, pooled)};
        sc_tensor *v = sc_flux_velocity(f, t, &in);
        ok = sc_read(t, sc_blend(t, one, x, delta, v), latents);
        if (ok && s->progress && !s->progress(s->user, i + 1, s->steps)) ok = sc__fail("stopped");
    }
    SC_FREE(host);
    return ok;
}

/* ==== SCFM: shortcutting a flow-matching model ===============================================
 *
 * Cai et al., "Shortcutting Pre-trained Flow Matching Diffusion Models is Almost Free Lunch"
 * (NeurIPS 2025). One Euler step over an interval [t0, t2] should equal two steps over its halves:
 *
 *     x' = x - d1 v1,  v1 = first(x, t0);    v2 = slow(x', t1);    d1 = t0 - t1, d2 = t1 - t2
 *     target = (d1 v1 + d2 v2) / (d1 + d2);  loss = mean((student(x, t0) - target)^2)
 *
 * `first` is the teacher on a fine grid (N = 32), which anchors the student to the model it came
 * from, or the student's own fast average on a coarse one, which doubles its step. The network is
 * never told the step size, so the only velocity that satisfies all of them is constant along its
 * trajectory: the flow becomes straight, and a few Euler steps follow it.
 *
 * Easy to get wrong: t = 1 is noise; the first time is 1 - 1e-5; j is even; no gradient through
 * the target; the second half-step always uses the slow average.
 */

/* ---- Chance: steps 2 to 4 ---- */

static float sc__between(sc_rng *rng, const float range[2]) { return range[0] + (range[1] - range[0]) * sc_uniform(rng); }

void sc_draw_sample(const sc_recipe *r, sc_rng *rng, int64_t tokens, bool flow_matching, sc_draw *d) {
    int choices = 0;
    while (choices < 8 && r->self_steps[choices]) choices++;
    d->flow_matching = flow_matching;
    d->no_caption = sc_uniform(rng) < r->caption_dropout;
    d->teacher = sc_uniform(rng) < r->teacher_ratio || !choices;
    int chosen = sc_uniform_int(rng, choices ? choices : 1);
    d->steps = d->teacher ? r->teacher_steps : r->self_steps[chosen];
    bool dynamic = sc_uniform(rng) < r->dynamic_shift_ratio;
    float shift = sc__between(rng, r->shift), unit = sc_uniform(rng);
    d->shift = dynamic ? sc_dynamic_shift(tokens) : shift;
    d->guidance = sc__between(rng, r->guidance);
    d->j = 2 * sc_uniform_int(rng, d->steps / 2);
    for (int i = 0; i < 3; i++) d->t[i] = sc_shift_time(1.f - (float)(d->j + i) / (float)d->steps, d->shift);
    if (flow_matching) d->t[0] = sc_shift_time(unit, d->shift); /* any time, not a grid's */
    d->t[0] = fminf(d->t[0], 1.f - 1e-5f);
}

/* ---- Target: steps 5 and 6 ---- */

/* Samples [first, first + count) of x, the same memory. */
static sc_tensor *sc__samples(sc_tape *t, const sc_tensor *x, int64_t first, int64_t count) {
    if (!x) return NULL;
    sc_tensor *y = sc_reshape(t, x, x->ndim, x->shape);
    if (!y) return NULL;
    y->data = (char *)y->data + first * (sc_count(x) / x->shape[0]) * sc_dtype_size(x->dtype);
    y->shape[0] = count;
    return y;
}

bool sc_scfm_target(const sc_model *model, sc_tape *t, sc_tensor *x0, sc_tensor *noise, const sc_draw *draws,
                    int64_t first, sc_tensor **x, sc_tensor **target) {
    int64_t n = x0->shape[0] - first;
    float *host = (float *)sc__arena_take(&t->host, (size_t)n * 9 * sizeof *host);
    uint8_t *sets = (uint8_t *)sc__arena_take(&t->host, (size_t)n * 2), *slow = sets + n;
    if (!host || !sets) return false;
    float *t0 = host, *t1 = host + n, *guidance = host + 2 * n, *keep = host + 3 * n, *one = host + 4 * n;
    float *back = host + 5 * n, *w1 = host + 6 * n, *w2 = host + 7 * n;
    for (int64_t i = 0; i < n; i++) {
        const sc_draw *d = &draws[first + i];
        float d1 = d->t[0] - d->t[1], d2 = d->t[1] - d->t[2];
        t0[i] = d->t[0], t1[i] = d->t[1], guidance[i] = d->guidance;
        keep[i] = 1 - d->t[0], one[i] = 1, back[i] = -d1;
        w1[i] = d1 / (d1 + d2), w2[i] = d2 / (d1 + d2);
        sets[i] = d->teacher ? SC_TEACHER : SC_FAST;
        slow[i] = SC_SLOW;
    }
    /* 5. noisy input */
    *x = sc_blend(t, keep, sc__samples(t, x0, first, n), t0, sc__samples(t, noise, first, n));
    *target = *x ? sc__new_like(t, *x) : NULL;
    if (!*target) return false;
    /* 6. two half-steps, without gradient; their activations are given back */
    sc_tape_record(t, false);
    sc__mark_t mark = sc__mark(t);
    sc_tensor *v1 = model->velocity(model->self, t, *x, first, sets, t0, guidance);
    sc_tensor *halfway = sc_blend(t, one, *x, back, v1);
    sc_tensor *v2 = halfway ? model->velocity(model->self, t, halfway, first, slow, t1, guidance) : NULL;
    if (v2) t->be->blend(*target, w1, v1, w2, v2);
    sc__release(t, mark);
    sc_tape_record(t, true);
    return v2 != NULL;
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
static sc_tensor *sc__flux_model_velocity(void *self, sc_tape *t, sc_tensor *x, int64_t first, const uint8_t *sets,
                                          const float *time, const float *guidance) {
    sc__flux_model *m = (sc__flux_model *)self;
    int64_t batch = x->shape[0], count = batch;
    bool whole = m->params->adapters == NULL;
    sc_tensor *y = NULL;
    sc_tape_use(t, sets);
    for (int64_t i = 0; i < batch; i += count) {
        if (whole) sc_params_use(m->params, sc__next_run(t, batch, &i, &count));
        bool all = count == batch;
        sc_flux_input in = {.x = all ? x : sc__samples(t, x, i, count), .time = time + i, .guidance = guidance + i,
                            .context = sc__samples(t, m->context, first + i, count),
                            .pooled = sc__samples(t, m->pooled, first + i, count),
                            .h = m->batch->h, .w = m->batch->w};
        sc_tensor *v = sc_flux_velocity(m->flux, t, &in);
        if (!v || all) return v;
        if (!y && !(y = sc__new3(t, batch, v->shape[1], v->shape[2]))) return NULL;
        int64_t n = sc_count(v);
        sc__copy_columns(t, y->data, n, i * (n / count), v->data, n, 0, 1, n, false);
    }
    return y;
}

/* Flow matching for the samples [0, n): x_t and the target eps - x0. */
static bool sc__flow_matching_target(sc_tape *t, sc_tensor *x0, sc_tensor *noise, const sc_draw *draws, int64_t n,
                                     sc_tensor *x, sc_tensor *target) {
    float *host = (float *)sc__arena_take(&t->host, (size_t)n * 4 * sizeof *host);
    if (!host) return false;
    for (int64_t i = 0; i < n; i++)
        host[i] = 1 - draws[i].t[0], host[n + i] = draws[i].t[0], host[2 * n + i] = 1, host[3 * n + i] = -1;
    t->be->blend(sc__samples(t, x, 0, n), host, sc__samples(t, x0, 0, n), host + n, sc__samples(t, noise, 0, n));
    t->be->blend(sc__samples(t, target, 0, n), host + 2 * n, sc__samples(t, noise, 0, n), host + 3 * n, sc__samples(t, x0, 0, n));
    return true;
}

/* Guidance distillation: the target v_u + g (v_c - v_u) of the frozen teacher, itself asked with g = 1. */
static bool sc__guidance_target(sc__flux_model *m, sc_tape *t, const float *time, const float *guidance, const float *ones,
                                const uint8_t *teacher, sc_tensor *x, sc_tensor *target) {
    int64_t n = x->shape[0];
    const sc_batch *b = m->batch;
    sc_tensor *context = m->context, *pooled = m->pooled;
    sc__mark_t mark = sc__mark(t);
    sc_tape_record(t, false);
    sc_tensor *with = sc__flux_model_velocity(m, t, x, 0, teacher, time, ones);
    m->context = sc__new_like(t, context);
    m->pooled = sc__new_like(t, pooled);
    int64_t nc = sc_count(context) / n, np = sc_count(pooled) / n;
    sc_tensor *none = sc_from(t, 1, &nc, b->no_context), *none_pooled = sc_from(t, 1, &np, b->no_pooled);
    bool ok = with && m->context && m->pooled && none && none_pooled;
    if (ok) {
        sc__copy_columns(t, m->context->data, nc, 0, none->data, 0, 0, n, nc, false);
        sc__copy_columns(t, m->pooled->data, np, 0, none_pooled->data, 0, 0, n, np, false);
        sc_tensor *without = sc__flux_model_velocity(m, t, x, 0, teacher, time, ones);
        float *rest = (float *)sc__arena_take(&t->host, (size_t)n * sizeof *rest);
        ok = without && rest;
        for (int64_t i = 0; ok && i < n; i++) rest[i] = 1 - guidance[i];
        if (ok) t->be->blend(target, guidance, with, rest, without);
    }
    m->context = context;
    m->pooled = pooled;
    sc_tape_record(t, true);
    sc__release(t, mark);
    return ok;
}

/* Uploads the batch's text; a dropped caption is replaced by the empty one. */
static bool sc__upload_text(sc__flux_model *m, sc_tape *t, const sc_draw *draws) {
    const sc_batch *b = m->batch;
    const sc_flux_config *c = &m->flux->config;
    int64_t nc = (int64_t)b->text_tokens * c->text_channels, np = c->pooled_channels;
    for (int i = 0; i < b->size; i++) {
        if (!draws[i].no_caption) continue;
        memcpy(b->context + i * nc, b->no_context, (size_t)nc * 4);
        memcpy(b->pooled + i * np, b->no_pooled, (size_t)np * 4);
    }
    m->context = sc_from(t, 3, (const int64_t[]){b->size, b->text_tokens, c->text_channels}, b->context);
    m->pooled = sc_from(t, 2, (const int64_t[]){b->size, np}, b->pooled);
    return m->context && m->pooled;
}

bool sc_train_gradient(sc_flux *flux, sc_params *params, sc_tape *t, const sc_recipe *r, const sc_batch *b,
                       sc_rng *rng, double *loss) {
    int64_t n = b->size, tokens = (int64_t)b->h * b->w;
    const int64_t shape[] = {n, tokens, flux->config.in_channels};
    sc_tape_reset(t);
    sc_draw *draws = (sc_draw *)sc__arena_take(&t->host, (size_t)n * sizeof *draws);
    float *time = (float *)sc__arena_take(&t->host, (size_t)n * 3 * sizeof *time), *guidance = time + n, *ones = time + 2 * n;
    uint8_t *student = (uint8_t *)sc__arena_take(&t->host, (size_t)n * 2), *teacher = student + n;
    if (!draws || !time || !student) return false;
    /* 1 to 4. Chance. The flow-matching samples come first. */
    bool scfm = r->objective == SC_SCFM;
    int64_t plain = scfm ? (int64_t)floorf(r->fm_ratio * (float)n + 0.5f) : n;
    for (int64_t i = 0; i < n; i++) {
        sc_draw_sample(r, rng, tokens, i < plain, &draws[i]);
        time[i] = draws[i].t[0], guidance[i] = draws[i].guidance, ones[i] = 1;
        student[i] = SC_STUDENT, teacher[i] = SC_TEACHER;
    }
    /* 5 and 6. Noisy input and target. */
    sc__flux_model flux_model = {.flux = flux, .params = params, .batch = b};
    sc_model model = {sc__flux_model_velocity, &flux_model};
    sc_tensor *x0 = sc_from(t, 3, shape, b->x0), *noise = sc_from(t, 3, shape, b->noise);
    sc_tensor *x = sc_new(t, 3, shape), *target = sc_new(t, 3, shape), *part_x = NULL, *part_target = NULL;
    if (!sc__upload_text(&flux_model, t, draws) || !x0 || !noise || !x || !target) return false;
    if (plain && !sc__flow_matching_target(t, x0, noise, draws, plain, x, target)) return false;
    if (r->objective == SC_GUIDANCE && !sc__guidance_target(&flux_model, t, time, guidance, ones, teacher, x, target)) return false;
    if (plain < n) {
        if (!sc_scfm_target(&model, t, x0, noise, draws, plain, &part_x, &part_target)) return false;
        int64_t count = sc_count(part_x), at = plain * (count / (n - plain));
        sc__copy_columns(t, x->data, count, at, part_x->data, count, 0, 1, count, false);
        sc__copy_columns(t, target->data, count, at, part_target->data, count, 0, 1, count, false);
    }
    /* 7. The student's answer, and the way back. */
    sc_tape_record(t, true);
    sc_tensor *v = sc__flux_model_velocity(&flux_model, t, x, 0, student, time, guidance);
    bool ok = sc_mse(t, v, target, 1.f, loss) && sc_backward(t);
    sc_tape_record(t, false);
    return ok;
}

/* ==== VAE =====================================================================================
 *
 * diffusers' AutoencoderKL (Rombach et al. 2022), the form FLUX.1 uses. The encoder is a
 * convolution, levels of residual blocks with a stride-2 convolution between levels, a middle of
 * two residual blocks around one attention over all pixels, and a last convolution that gives the
 * mean and log variance of the latents. The decoder is the same backwards, with nearest-neighbour
 * upsampling and one more block a level. Never trained here, so nothing is recorded: each block
 * computes on one of two tapes, and the tape of its input is then forgotten.
 *
 * Easy to get wrong: downsampling pads the bottom and right only; every norm has eps 1e-6.
 */

typedef struct sc__affine { sc_tensor *weight, *bias; } sc__affine; /* of a convolution or a norm */

typedef struct sc__resnet {
    sc__affine norm1, conv1, norm2, conv2;
    sc__affine shortcut;            /* 1x1, where the number of channels changes */
} sc__resnet;

typedef struct sc__vae_half {       /* the encoder or the decoder */
    sc__affine conv_in;
    struct { sc__resnet resnets[SC_VAE_LAYERS]; sc__affine resample; } levels[SC_VAE_LEVELS];
    sc__resnet middle[2];
    sc__affine attention_norm;
    sc_linear_layer q, k, v, out;   /* of the attention, [C, C] */
    sc__affine norm_out, conv_out;
    sc__affine quant;               /* after the encoder, before the decoder */
} sc__vae_half;

struct sc_vae {
    sc_vae_config config;
    sc_net *net;
    sc__vae_half encoder, decoder;
    sc_tape *tapes[2];
    int turn;                       /* the tape that holds the current activations */
};

const sc_vae_config *sc_vae_config_of(const sc_vae *v) { return &v->config; }
int sc_vae_factor(const sc_vae *v) { return 1 << (v->config.levels - 1); }

/* ---- Opening ---- */

static bool sc__vae_read_config(sc_vae_config *c, const sc_json *json, const char *path) {
    const char *class_name = sc_json_string(sc_json_get(json, "_class_name"), "AutoencoderKL");
    const char *activation = sc_json_string(sc_json_get(json, "act_fn"), "silu");
    const sc_json *channels = sc_json_get(json, "block_out_channels");
    int pixels_in, pixels_out;
    if (strcmp(class_name, "AutoencoderKL"))
        return sc__fail("%s: this is a %s, not an AutoencoderKL", path, class_name);
    if (strcmp(activation, "silu"))
        return sc__fail("%s: act_fn must be silu, not '%s'", path, activation);
    if (!sc__config_int(json, path, "in_channels", 3, &pixels_in) ||
        !sc__config_int(json, path, "out_channels", 3, &pixels_out) ||
        !sc__config_int(json, path, "latent_channels", 4, &c->latent_channels) ||
        !sc__config_int(json, path, "layers_per_block", 1, &c->layers) ||
        !sc__config_int(json, path, "norm_num_groups", 32, &c->groups)) return false;
    if (pixels_in != 3 || pixels_out != 3)
        return sc__fail("%s: pictures must have 3 channels", path);
    if (sc_json_length(channels) < 1 || sc_json_length(channels) > SC_VAE_LEVELS)
        return sc__fail("%s: block_out_channels must list 1 to %d levels", path, SC_VAE_LEVELS);
    if (c->layers >= SC_VAE_LAYERS || c->latent_channels > 1024)
        return sc__fail("%s: layers_per_block may be up to %d, latent_channels up to 1024", path,
                        SC_VAE_LAYERS - 1);
    c->levels = (int)sc_json_length(channels);
    for (int i = 0; i < c->levels; i++) {
        double n = sc_json_number(sc_json_at(channels, i), 0);
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
    c->quant = sc_json_bool(sc_json_get(json, "use_quant_conv"), true);
    c->post_quant = sc_json_bool(sc_json_get(json, "use_post_quant_conv"), true);
    c->scale = (float)sc_json_number(sc_json_get(json, "scaling_factor"), 0.18215);
    c->shift = (float)sc_json_number(sc_json_get(json, "shift_factor"), 0);
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

static bool sc__vae_resnet(sc_vae *v, sc__resnet *r, const char *half, const char *where, int index,
                           int64_t in, int64_t out) {
    char prefix[SC_MAX_NAME];
    snprintf(prefix, sizeof prefix, "%s%s.resnets.%d.", half, where, index);
    return sc__vae_affine(v, &r->norm1, prefix, "norm1", in, 0, 0) &&
           sc__vae_affine(v, &r->conv1, prefix, "conv1", out, in, 3) &&
           sc__vae_affine(v, &r->norm2, prefix, "norm2", out, 0, 0) &&
           sc__vae_affine(v, &r->conv2, prefix, "conv2", out, out, 3) &&
           (in == out || sc__vae_affine(v, &r->shortcut, prefix, "conv_shortcut", out, in, 1));
}

static bool sc__vae_attention(sc_vae *v, sc__vae_half *h, const char *half, int64_t c) {
    static const char *const names[4] = {"to_q", "to_k", "to_v", "to_out.0"};
    sc_linear_layer *layers[4] = {&h->q, &h->k, &h->v, &h->out};
    char name[SC_MAX_NAME];
    for (int i = 0; i < 4; i++) {
        snprintf(name, sizeof name, "%smid_block.attentions.0.%s", half, names[i]);
        if (!sc_net_linear(v->net, layers[i], name, c, c, true)) return false;
    }
    const char *norm = "mid_block.attentions.0.group_norm";
    return sc__vae_affine(v, &h->attention_norm, half, norm, c, 0, 0);
}

static bool sc__vae_weights(sc_vae *v, sc__vae_half *h, bool encoder) {
    const sc_vae_config *c = &v->config;
    const char *half = encoder ? "encoder." : "decoder.";
    int64_t deep = c->channels[c->levels - 1], latents = c->latent_channels * (encoder ? 2 : 1);
    int64_t width = encoder ? c->channels[0] : deep;
    if (!sc__vae_affine(v, &h->conv_in, half, "conv_in", width, encoder ? 3 : latents, 3))
        return false;
    for (int i = 0; i < c->levels; i++) {
        int64_t out = c->channels[encoder ? i : c->levels - 1 - i];
        char where[64], resample[SC_MAX_NAME];
        snprintf(where, sizeof where, "%s_blocks.%d", encoder ? "down" : "up", i);
        for (int j = 0; j < c->layers + !encoder; j++, width = out)
            if (!sc__vae_resnet(v, &h->levels[i].resnets[j], half, where, j, width, out))
                return false;
        snprintf(resample, sizeof resample, "%s.%ssamplers.0.conv", where, encoder ? "down" : "up");
        if (i + 1 < c->levels &&
            !sc__vae_affine(v, &h->levels[i].resample, half, resample, out, out, 3))
            return false;
    }
    for (int i = 0; i < 2; i++)
        if (!sc__vae_resnet(v, &h->middle[i], half, "mid_block", i, deep, deep)) return false;
    if (c->attention && !sc__vae_attention(v, h, half, deep)) return false;
    if ((encoder ? c->quant : c->post_quant) &&
        !sc__vae_affine(v, &h->quant, encoder ? "" : "post_", "quant_conv", latents, latents, 1))
        return false;
    return sc__vae_affine(v, &h->norm_out, half, "conv_norm_out", width, 0, 0) &&
           sc__vae_affine(v, &h->conv_out, half, "conv_out", encoder ? latents : 3, width, 3);
}

sc_vae *sc_vae_open(const sc_backend *backend, const char *folder, bool widen) {
    sc_vae *v = (sc_vae *)sc__alloc(1, sizeof *v);
    char *path = sc__join(folder, "config.json");
    sc_json *json = v && path ? sc_json_load(path) : NULL;
    bool ok = json && sc__vae_read_config(&v->config, json, path);
    sc_json_free(json);
    SC_FREE(path);
    ok = ok && (v->net = sc_net_open(backend, folder, widen)) &&
         (v->tapes[0] = sc_tape_new(backend)) && (v->tapes[1] = sc_tape_new(backend)) &&
         sc__vae_weights(v, &v->encoder, true) && sc__vae_weights(v, &v->decoder, false);
    if (ok) return v;
    sc_vae_close(v);
    return NULL;
}

void sc_vae_close(sc_vae *v) {
    if (!v) return;
    sc_tape_free(v->tapes[0]);
    sc_tape_free(v->tapes[1]);
    sc_net_close(v->net);
    SC_FREE(v);
}

/* ---- Forward ---- */

/* The tape for the next block: not the one that holds its input. */
static sc_tape *sc__vae_tape(sc_vae *v) {
    v->turn = !v->turn;
    sc_tape_reset(v->tapes[v->turn]);
    return v->tapes[v->turn];
}

static sc_tensor *sc__vae_norm(sc_vae *v, sc_tape *t, const sc_tensor *x, const sc__affine *a,
                               bool silu) {
    return sc_group_norm(t, x, a->weight, a->bias, v->config.groups, 1e-6f, silu);
}

/* A convolution that keeps the sides. */
static sc_tensor *sc__vae_conv(sc_tape *t, const sc_tensor *x, const sc__affine *a) {
    return sc_conv2d(t, x, a->weight, a->bias, 1, (int)a->weight->shape[2] / 2);
}

static sc_tensor *sc__vae_resnet_forward(sc_vae *v, sc_tensor *x, const sc__resnet *r) {
    sc_tape *t = sc__vae_tape(v);
    sc_tensor *h = sc__vae_conv(t, sc__vae_norm(v, t, x, &r->norm1, true), &r->conv1);
    h = sc__vae_conv(t, sc__vae_norm(v, t, h, &r->norm2, true), &r->conv2);
    if (r->shortcut.weight) x = sc__vae_conv(t, x, &r->shortcut);
    return sc_add(t, x, h);
}

/* x + attention(norm(x)), every pixel a token, one head. */
static sc_tensor *sc__vae_attention_forward(sc_vae *v, sc_tensor *x, const sc__vae_half *half) {
    if (!x) return NULL;
    sc_tape *t = sc__vae_tape(v);
    int64_t shape[3] = {x->shape[0], x->shape[1], x->shape[2] * x->shape[3]};
    float scale = 1.f / sqrtf((float)shape[1]);
    sc_tensor *n = sc__vae_norm(v, t, x, &half->attention_norm, false);
    n = sc_swap_axes(t, sc_reshape(t, n, 3, shape));
    sc_tensor *q = sc_linear(t, n, &half->q), *k = sc_linear(t, n, &half->k);
    n = sc_attention(t, q, k, sc_linear(t, n, &half->v), 1, scale, NULL, false);
    n = sc_swap_axes(t, sc_linear(t, n, &half->out));
    return sc_add(t, x, sc_reshape(t, n, 4, x->shape));
}

static sc_tensor *sc__vae_middle(sc_vae *v, sc_tensor *x, const sc__vae_half *half) {
    x = sc__vae_resnet_forward(v, x, &half->middle[0]);
    if (v->config.attention) x = sc__vae_attention_forward(v, x, half);
    return sc__vae_resnet_forward(v, x, &half->middle[1]);
}

/* One half of the network: pictures to mean and logvar [B,2C,h,w], or latents to pictures. */
static sc_tensor *sc__vae_forward(sc_vae *v, int64_t batch, int64_t height, int64_t width,
                                  const float *input, bool encoder) {
    const sc__vae_half *half = encoder ? &v->encoder : &v->decoder;
    const int64_t shape[] = {batch, encoder ? 3 : v->config.latent_channels, height, width};
    sc_tape *t = sc__vae_tape(v);
    sc_tensor *x = sc_from(t, 4, shape, input);
    if (!encoder && half->quant.weight) x = sc__vae_conv(t, x, &half->quant);
    x = sc__vae_conv(t, x, &half->conv_in);
    if (!encoder) x = sc__vae_middle(v, x, half);
    for (int i = 0; i < v->config.levels; i++) {
        const sc__affine *resample = &half->levels[i].resample;
        for (int j = 0; j < v->config.layers + !encoder; j++)
            x = sc__vae_resnet_forward(v, x, &half->levels[i].resnets[j]);
        if (!resample->weight) continue;
        t = sc__vae_tape(v);
        if (encoder) x = sc_conv2d(t, x, resample->weight, resample->bias, 2, 0);
        else x = sc__vae_conv(t, sc_upsample(t, x), resample);
    }
    if (encoder) x = sc__vae_middle(v, x, half);
    t = sc__vae_tape(v);
    x = sc__vae_conv(t, sc__vae_norm(v, t, x, &half->norm_out, true), &half->conv_out);
    return encoder && half->quant.weight ? sc__vae_conv(t, x, &half->quant) : x;
}

/* ---- Batches and tiles ---- */

#define SC__VAE_PIXELS 65536 /* of one pass: small pictures go several at once */

/* The share of position p in a line of `length` that belongs to the tile [begin, begin + size):
 * tiles start every `step`, the last is moved back to end with the line; where they overlap, their
 * shares are ramps that add up to 1. */
static float sc__tile_share(int64_t p, int64_t begin, int64_t size, int64_t step, int64_t length) {
    float own = 0, sum = 0;
    for (int64_t b = 0, last = 0; !last; b += step) {
        last = b + size >= length;
        if (last) b = length - size;
        int64_t share = size - step < 1 ? 1 : size - step;
        if (b > 0 && p - b + 1 < share) share = p - b + 1;
        if (!last && b + size - p < share) share = b + size - p;
        if (p < b || p >= b + size) share = 0;
        sum += (float)share;
        if (b == begin) own = (float)share;
    }
    return own / sum;
}

typedef struct sc__vae_job {
    bool encoder;
    int64_t batch, h, w;        /* latent sides */
    int64_t size_h, size_w;     /* of a tile, in latents */
    int64_t step_h, step_w;     /* from one tile to the next */
    const float *input;
    float *out[2];              /* mean and logvar, or pictures */
} sc__vae_job;

/* One tile of `count` samples from `first` on: cut out, run, add to the output by its shares. */
static bool sc__vae_tile(sc_vae *v, const sc__vae_job *job, int64_t first, int64_t count, int64_t a,
                         int64_t b, float *buffer) {
    int64_t f = sc_vae_factor(v), latents = v->config.latent_channels;
    int64_t in = job->encoder ? f : 1, out = job->encoder ? 1 : f; /* pixels per latent */
    int64_t channels_in = job->encoder ? 3 : latents, channels = job->encoder ? latents : 3;
    int64_t rows = job->size_h * in, columns = job->size_w * in;
    for (int64_t p = 0; p < count * channels_in; p++)
        for (int64_t r = 0; r < rows; r++) {
            int64_t line = ((first * channels_in + p) * job->h + a) * in + r;
            const float *from = job->input + (line * job->w + b) * in;
            memcpy(buffer + (p * rows + r) * columns, from, (size_t)columns * sizeof *buffer);
        }
    sc_tensor *y = sc__vae_forward(v, count, rows, columns, buffer, job->encoder);
    if (!sc_read(v->tapes[v->turn], y, buffer)) return false;
    rows = job->size_h * out, columns = job->size_w * out;
    float *shares = buffer + count * y->shape[1] * rows * columns; /* of the columns */
    for (int64_t j = 0; j < columns; j++)
        shares[j] = sc__tile_share(b * out + j, b * out, columns, job->step_w * out, job->w * out);
    int64_t planes = y->shape[1];
    for (int64_t p = 0; p < count * planes; p++) {
        int64_t c = p % planes, plane = (first + p / planes) * channels + c % channels;
        for (int64_t r = 0; r < rows; r++) {
            int64_t line = (plane * job->h + a) * out + r;
            const float *from = buffer + (p * rows + r) * columns;
            float *to = job->out[c / channels] + (line * job->w + b) * out;
            float share = sc__tile_share(a * out + r, a * out, rows, job->step_h * out,
                                         job->h * out);
            for (int64_t j = 0; j < columns; j++) to[j] += from[j] * share * shares[j];
        }
    }
    return true;
}

static bool sc__vae_run(sc_vae *v, sc__vae_job *job, int64_t tile) {
    int64_t f = sc_vae_factor(v), size = tile / f > 8 ? tile / f : 8;
    job->size_h = tile > 0 && job->h > size ? size : job->h;
    job->size_w = tile > 0 && job->w > size ? size : job->w;
    job->step_h = job->size_h - (job->size_h < job->h ? size / 4 : 0);
    job->step_w = job->size_w - (job->size_w < job->w ? size / 4 : 0);
    int64_t area = job->size_h * job->size_w, count = SC__VAE_PIXELS / (area * f * f);
    count = count < 1 ? 1 : count > job->batch ? job->batch : count;
    int64_t n = 3 * f * f, latents = 2 * v->config.latent_channels; /* values of a latent pixel */
    n = count * area * (n > latents ? n : latents) + job->size_w * f;
    float *buffer = (float *)sc__alloc((size_t)n, sizeof *buffer);
    bool ok = buffer != NULL;
    for (int64_t first = 0; ok && first < job->batch; first += count) {
        if (count > job->batch - first) count = job->batch - first;
        for (int64_t a = 0, end_h = 0; ok && !end_h; a += job->step_h) {
            end_h = a + job->size_h >= job->h;
            if (end_h) a = job->h - job->size_h;
            for (int64_t b = 0, end_w = 0; ok && !end_w; b += job->step_w) {
                end_w = b + job->size_w >= job->w;
                if (end_w) b = job->w - job->size_w;
                ok = sc__vae_tile(v, job, first, count, a, b, buffer);
            }
        }
    }
    SC_FREE(buffer);
    return ok;
}

bool sc_vae_encode(sc_vae *v, int64_t batch, int64_t height, int64_t width, const float *pictures,
                   float *mean, float *logvar, int64_t tile) {
    int64_t f = sc_vae_factor(v);
    if (height < f || width < f || height % f || width % f)
        return sc__fail("VAE: sides of a picture must be multiples of %lld, not %lld x %lld",
                        (long long)f, (long long)width, (long long)height);
    sc__vae_job job = {.encoder = true, .batch = batch, .h = height / f, .w = width / f,
                       .input = pictures, .out = {mean, logvar}};
    int64_t n = batch * v->config.latent_channels * job.h * job.w;
    memset(mean, 0, (size_t)n * sizeof *mean);
    memset(logvar, 0, (size_t)n * sizeof *logvar);
    if (!sc__vae_run(v, &job, tile)) return false;
    for (int64_t i = 0; i < n; i++)
        logvar[i] = logvar[i] < -30 ? -30 : logvar[i] > 20 ? 20 : logvar[i];
    return true;
}

bool sc_vae_decode(sc_vae *v, int64_t batch, int64_t h, int64_t w, const float *latents,
                   float *pictures, int64_t tile) {
    int64_t f = sc_vae_factor(v);
    sc__vae_job job = {.batch = batch, .h = h, .w = w, .input = latents, .out = {pictures, NULL}};
    memset(pictures, 0, (size_t)(batch * 3 * h * w * f * f) * sizeof *pictures);
    return sc__vae_run(v, &job, tile);
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

/* ==== Tokenizers ==============================================================================
 *
 * CLIP's is a byte-level BPE: lower-case text is cut into words, each word's bytes become letters
 * of a printable alphabet, and pairs are merged in the order of merges.txt; "</w>" ends a word.
 * T5's is a Unigram model: text is normalised with a table that the file carries (a double-array
 * trie), spaces become U+2581, and the best cut is the one with the highest sum of scores.
 */

/* Unicode 14.0.0, made by test/make_unicode_tables.py. */
static const uint32_t sc__letters[] = {
    65, 26, 6, 26, 47, 1, 10, 1, 4, 1, 5, 23, 1, 31, 1, 458, 4, 12, 14, 5, 7, 1, 1, 1, 129, 5, 1,
    2, 2, 4, 1, 1, 6, 1, 1, 3, 1, 1, 1, 20, 1, 83, 1, 139, 8, 166, 1, 38, 2, 1, 6, 41, 71, 27, 4,
    4, 45, 43, 35, 2, 1, 99, 1, 1, 15, 2, 7, 2, 10, 3, 2, 1, 16, 1, 1, 30, 29, 89, 11, 1, 24, 33,
    9, 2, 4, 1, 5, 22, 4, 1, 9, 1, 3, 1, 23, 25, 7, 11, 5, 24, 1, 6, 17, 42, 58, 54, 3, 1, 18, 1,
    7, 10, 15, 16, 4, 8, 2, 2, 2, 22, 1, 7, 1, 1, 3, 4, 3, 1, 16, 1, 13, 2, 1, 3, 14, 2, 10, 1, 8,
    6, 4, 2, 2, 22, 1, 7, 1, 2, 1, 2, 1, 2, 31, 4, 1, 1, 19, 3, 16, 9, 1, 3, 1, 22, 1, 7, 1, 2, 1,
    5, 3, 1, 18, 1, 15, 2, 23, 1, 11, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1, 30, 2, 1, 3, 15, 1,
    17, 1, 1, 6, 3, 3, 1, 4, 3, 2, 1, 1, 1, 2, 3, 2, 3, 3, 3, 12, 22, 1, 52, 8, 1, 3, 1, 23, 1, 16,
    3, 1, 26, 3, 2, 1, 2, 2, 30, 1, 4, 8, 1, 3, 1, 23, 1, 10, 1, 5, 3, 1, 31, 2, 1, 2, 15, 2, 17,
    9, 1, 3, 1, 41, 2, 1, 16, 1, 5, 3, 8, 3, 24, 6, 5, 18, 3, 24, 1, 9, 1, 1, 2, 7, 58, 48, 1, 2,
    12, 7, 58, 2, 1, 1, 1, 5, 1, 24, 1, 1, 1, 10, 1, 2, 9, 1, 2, 5, 1, 1, 21, 4, 32, 1, 63, 8, 1,
    36, 27, 5, 115, 43, 20, 1, 16, 6, 4, 4, 3, 1, 3, 2, 7, 3, 4, 13, 12, 1, 17, 38, 1, 1, 5, 1, 2,
    43, 1, 333, 1, 4, 2, 7, 1, 1, 1, 4, 2, 41, 1, 4, 2, 33, 1, 4, 2, 7, 1, 1, 1, 4, 2, 15, 1, 57,
    1, 4, 2, 67, 37, 16, 16, 86, 2, 6, 3, 620, 2, 17, 1, 26, 5, 75, 6, 8, 7, 18, 13, 19, 14, 18,
    14, 13, 1, 3, 15, 52, 35, 1, 4, 1, 67, 89, 7, 5, 2, 34, 1, 1, 5, 70, 10, 31, 49, 30, 2, 5, 11,
    44, 4, 26, 54, 23, 9, 53, 82, 1, 93, 47, 17, 8, 54, 30, 13, 2, 10, 44, 26, 36, 41, 3, 10, 36,
    2, 9, 7, 43, 2, 3, 41, 4, 1, 6, 1, 2, 3, 1, 5, 192, 64, 278, 2, 6, 2, 38, 2, 6, 2, 8, 1, 1, 1,
    1, 1, 1, 1, 31, 2, 53, 1, 7, 1, 1, 3, 3, 1, 7, 3, 4, 2, 6, 4, 13, 5, 3, 1, 7, 116, 1, 13, 1,
    16, 13, 101, 1, 4, 1, 2, 10, 1, 1, 3, 5, 6, 1, 1, 1, 1, 1, 1, 4, 1, 11, 2, 4, 5, 5, 4, 1, 52,
    2, 2683, 229, 6, 4, 3, 2, 12, 38, 1, 1, 5, 1, 2, 56, 7, 1, 16, 23, 9, 7, 1, 7, 1, 7, 1, 7, 1,
    7, 1, 7, 1, 7, 1, 7, 80, 1, 469, 2, 42, 5, 5, 2, 4, 86, 6, 3, 1, 90, 1, 4, 5, 43, 1, 94, 17,
    32, 48, 16, 512, 6592, 64, 22157, 67, 46, 2, 269, 3, 16, 10, 2, 20, 47, 16, 31, 2, 70, 49, 9,
    2, 103, 2, 64, 5, 2, 1, 1, 1, 5, 24, 16, 1, 3, 1, 4, 1, 23, 29, 52, 14, 50, 62, 6, 3, 1, 1, 2,
    11, 28, 10, 23, 25, 29, 7, 47, 28, 1, 16, 5, 1, 10, 10, 5, 1, 41, 23, 3, 1, 8, 20, 23, 3, 1, 3,
    50, 1, 1, 3, 2, 2, 5, 2, 1, 1, 1, 24, 3, 2, 11, 7, 3, 12, 6, 2, 6, 2, 6, 9, 7, 1, 7, 1, 43, 1,
    14, 6, 115, 29, 11172, 12, 23, 4, 49, 8452, 366, 2, 106, 38, 7, 12, 5, 5, 1, 1, 10, 1, 13, 1,
    5, 1, 1, 1, 2, 1, 2, 1, 108, 33, 363, 18, 64, 2, 54, 40, 12, 116, 5, 1, 135, 36, 26, 6, 26, 11,
    89, 3, 6, 2, 6, 2, 6, 2, 3, 35, 12, 1, 26, 1, 19, 1, 2, 1, 15, 2, 14, 34, 123, 389, 29, 3, 49,
    47, 32, 13, 20, 1, 8, 6, 38, 10, 30, 2, 36, 4, 8, 48, 158, 18, 36, 4, 36, 4, 40, 8, 52, 12, 11,
    1, 15, 1, 7, 1, 2, 1, 11, 1, 15, 1, 7, 1, 2, 67, 311, 9, 22, 10, 8, 24, 6, 1, 42, 1, 9, 69, 6,
    2, 1, 1, 44, 1, 2, 3, 1, 2, 23, 10, 23, 9, 31, 65, 19, 1, 2, 10, 22, 10, 26, 70, 56, 6, 2, 64,
    1, 15, 4, 1, 3, 1, 29, 42, 29, 3, 29, 35, 8, 1, 28, 27, 54, 10, 22, 10, 19, 13, 18, 110, 73,
    55, 51, 13, 51, 13, 36, 348, 42, 6, 2, 78, 29, 10, 1, 8, 22, 42, 18, 46, 21, 27, 23, 12, 53,
    57, 2, 2, 1, 13, 45, 32, 25, 26, 36, 29, 1, 2, 1, 8, 35, 3, 1, 12, 48, 14, 4, 21, 1, 1, 1, 35,
    18, 1, 25, 84, 7, 1, 1, 1, 4, 1, 15, 1, 10, 7, 47, 38, 8, 2, 2, 2, 22, 1, 7, 1, 2, 1, 5, 3, 1,
    18, 1, 12, 5, 158, 53, 18, 4, 20, 3, 30, 48, 20, 2, 1, 1, 184, 47, 41, 4, 36, 48, 20, 1, 59,
    43, 13, 1, 71, 27, 37, 7, 185, 44, 116, 64, 31, 8, 2, 1, 2, 8, 1, 2, 1, 24, 15, 1, 1, 1, 94, 8,
    2, 39, 16, 1, 1, 1, 28, 1, 10, 40, 7, 1, 21, 1, 11, 46, 19, 1, 18, 73, 263, 9, 1, 37, 17, 1,
    49, 30, 112, 7, 1, 2, 1, 38, 21, 1, 25, 6, 1, 2, 1, 32, 14, 1, 327, 19, 189, 1, 79, 922, 230,
    196, 2636, 97, 15, 1071, 4049, 583, 8633, 569, 7, 31, 17, 79, 17, 30, 18, 48, 16, 4, 31, 21, 5,
    19, 688, 64, 128, 75, 5, 1, 66, 13, 64, 2, 1, 1, 28, 6136, 8, 1238, 42, 9, 8935, 4, 1, 7, 1, 2,
    1, 291, 45, 3, 17, 4, 8, 396, 2308, 107, 5, 13, 3, 9, 7, 10, 5990, 85, 1, 71, 1, 2, 2, 1, 2, 2,
    2, 4, 1, 12, 1, 1, 1, 7, 1, 65, 1, 4, 2, 8, 1, 7, 1, 28, 1, 4, 1, 5, 1, 1, 3, 7, 1, 340, 2, 25,
    1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 31, 1, 25, 1, 8, 1844, 31, 481, 45, 10, 7,
    16, 1, 321, 30, 18, 44, 1268, 7, 1, 4, 1, 2, 1, 15, 1, 197, 59, 68, 7, 1, 1204, 4, 1, 27, 1, 2,
    1, 1, 2, 1, 1, 10, 1, 4, 1, 1, 1, 1, 6, 1, 4, 1, 1, 1, 1, 1, 1, 3, 1, 2, 1, 1, 2, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 2, 1, 1, 2, 4, 1, 7, 1, 4, 1, 4, 1, 1, 1, 10, 1, 17, 5, 3, 1, 5, 1, 17, 4420,
    42720, 32, 4153, 7, 222, 2, 5762, 14, 7473, 3103, 542, 1506, 4939,
};
static const uint32_t sc__numbers_table[] = {
    48, 10, 120, 2, 5, 1, 2, 3, 1441, 10, 134, 10, 198, 10, 412, 10, 118, 10, 4, 6, 108, 10, 118,
    10, 118, 10, 2, 6, 110, 13, 115, 10, 8, 7, 103, 10, 104, 7, 7, 19, 109, 10, 96, 10, 118, 10,
    70, 20, 268, 10, 70, 10, 719, 20, 881, 3, 239, 10, 6, 10, 22, 10, 300, 10, 128, 11, 165, 10, 6,
    10, 182, 10, 86, 10, 134, 10, 6, 10, 1046, 1, 3, 6, 6, 10, 198, 51, 2, 5, 726, 60, 78, 22, 630,
    30, 1385, 1, 777, 1, 25, 9, 14, 3, 343, 4, 138, 10, 30, 8, 1, 15, 32, 10, 39, 15, 29536, 10,
    188, 10, 320, 6, 154, 10, 38, 10, 198, 10, 22, 10, 86, 10, 406, 10, 21270, 10, 493, 45, 12, 57,
    17, 2, 341, 27, 36, 4, 29, 1, 8, 1, 134, 5, 202, 10, 942, 8, 25, 7, 39, 9, 75, 5, 22, 6, 160,
    2, 2, 16, 2, 46, 64, 9, 52, 2, 30, 3, 75, 5, 104, 8, 24, 8, 41, 7, 330, 6, 48, 10, 294, 31,
    158, 10, 42, 4, 112, 7, 134, 30, 128, 10, 60, 10, 144, 10, 7, 20, 251, 10, 342, 10, 118, 10,
    374, 10, 102, 10, 102, 12, 420, 19, 93, 10, 758, 29, 227, 10, 70, 10, 534, 21, 1067, 111,
    17905, 10, 86, 10, 134, 10, 1, 7, 798, 23, 25673, 20, 108, 25, 1109, 50, 2368, 10, 422, 10,
    1485, 9, 128, 10, 791, 59, 1, 3, 1, 4, 76, 45, 1, 15, 962, 13, 2787, 10,
};
static const int32_t sc__lower[] = {
    192, 23, 1, 32, 24, 7, 1, 32, 40, 24, 2, 1, 50, 3, 2, 1, 7, 8, 2, 1, 17, 23, 2, 1, 46, 1, 1,
    -121, 1, 3, 2, 1, 8, 1, 1, 210, 1, 2, 2, 1, 4, 1, 1, 206, 1, 1, 1, 1, 2, 2, 1, 205, 2, 1, 1, 1,
    3, 1, 1, 79, 1, 1, 1, 202, 1, 1, 1, 203, 1, 1, 1, 1, 2, 1, 1, 205, 1, 1, 1, 207, 2, 1, 1, 211,
    1, 1, 1, 209, 1, 1, 1, 1, 4, 1, 1, 211, 1, 1, 1, 213, 2, 1, 1, 214, 1, 3, 2, 1, 6, 1, 1, 218,
    1, 1, 1, 1, 2, 1, 1, 218, 3, 1, 1, 1, 2, 1, 1, 218, 1, 1, 1, 1, 2, 2, 1, 217, 2, 2, 2, 1, 4, 1,
    1, 219, 1, 1, 1, 1, 4, 1, 1, 1, 8, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 2, 1,
    9, 2, 1, 19, 9, 2, 1, 19, 1, 1, 2, 1, 2, 2, 1, 4, 1, 1, -97, 1, 1, 1, -56, 1, 20, 2, 1, 40, 1,
    1, -130, 2, 9, 2, 1, 24, 1, 1, 10795, 1, 1, 1, 1, 2, 1, 1, -163, 1, 1, 1, 10792, 3, 1, 1, 1, 2,
    1, 1, -195, 1, 1, 1, 69, 1, 1, 1, 71, 1, 5, 2, 1, 298, 2, 2, 1, 6, 1, 1, 1, 9, 1, 1, 116, 7, 1,
    1, 38, 2, 3, 1, 37, 4, 1, 1, 64, 2, 2, 1, 63, 3, 17, 1, 32, 18, 9, 1, 32, 44, 1, 1, 8, 9, 12,
    2, 1, 28, 1, 1, -60, 3, 1, 1, 1, 2, 1, 1, -7, 1, 1, 1, 1, 3, 3, 1, -130, 3, 16, 1, 80, 16, 32,
    1, 32, 80, 17, 2, 1, 42, 27, 2, 1, 54, 1, 1, 15, 1, 7, 2, 1, 15, 48, 2, 1, 97, 38, 1, 48, 2927,
    38, 1, 7264, 39, 1, 1, 7264, 6, 1, 1, 7264, 723, 80, 1, 38864, 80, 6, 1, 8, 2208, 43, 1, -3008,
    45, 3, 1, -3008, 323, 75, 2, 1, 158, 1, 1, -7615, 2, 48, 2, 1, 104, 8, 1, -8, 16, 6, 1, -8, 16,
    8, 1, -8, 16, 8, 1, -8, 16, 6, 1, -8, 17, 4, 2, -8, 15, 8, 1, -8, 32, 8, 1, -8, 16, 8, 1, -8,
    16, 8, 1, -8, 16, 2, 1, -8, 2, 2, 1, -74, 2, 1, 1, -9, 12, 4, 1, -86, 4, 1, 1, -9, 12, 2, 1,
    -8, 2, 2, 1, -100, 14, 2, 1, -8, 2, 2, 1, -112, 2, 1, 1, -7, 12, 2, 1, -128, 2, 2, 1, -126, 2,
    1, 1, -9, 298, 1, 1, -7517, 4, 1, 1, -8383, 1, 1, 1, -8262, 7, 1, 1, 28, 46, 16, 1, 16, 35, 1,
    1, 1, 819, 26, 1, 26, 1866, 48, 1, 48, 96, 1, 1, 1, 2, 1, 1, -10743, 1, 1, 1, -3814, 1, 1, 1,
    -10727, 3, 3, 2, 1, 6, 1, 1, -10780, 1, 1, 1, -10749, 1, 1, 1, -10783, 1, 1, 1, -10782, 2, 1,
    1, 1, 3, 1, 1, 1, 9, 2, 1, -10815, 2, 50, 2, 1, 107, 2, 2, 1, 7, 1, 1, 1, 31054, 23, 2, 1, 64,
    14, 2, 1, 162, 7, 2, 1, 16, 31, 2, 1, 71, 2, 2, 1, 4, 1, 1, -35332, 1, 5, 2, 1, 13, 1, 1, 1, 2,
    1, 1, -42280, 3, 2, 2, 1, 6, 10, 2, 1, 20, 1, 1, -42308, 1, 1, 1, -42319, 1, 1, 1, -42315, 1,
    1, 1, -42305, 1, 1, 1, -42308, 2, 1, 1, -42258, 1, 1, 1, -42282, 1, 1, 1, -42261, 1, 1, 1, 928,
    1, 8, 2, 1, 16, 1, 1, -48, 1, 1, 1, -42307, 1, 1, 1, -35384, 1, 2, 2, 1, 9, 1, 1, 1, 6, 2, 2,
    1, 31, 1, 1, 1, 22316, 26, 1, 32, 1247, 40, 1, 40, 176, 36, 1, 40, 192, 11, 1, 39, 12, 15, 1,
    39, 16, 7, 1, 39, 8, 2, 1, 39, 1772, 51, 1, 64, 3104, 32, 1, 32, 21920, 32, 1, 32, 31424, 34,
    1, 34,
};

static bool sc__in_runs(const uint32_t *runs, size_t count, uint32_t c) {
    uint32_t at = 0;
    for (size_t i = 0; i < count; i += 2) {
        at += runs[i];
        if (c < at) return false;
        at += runs[i + 1];
        if (c < at) return true;
    }
    return false;
}

static bool sc__is_letter(uint32_t c) {
    if (c < 128) return (c | 32) >= 'a' && (c | 32) <= 'z';
    return sc__in_runs(sc__letters, sizeof sc__letters / sizeof *sc__letters, c);
}
static bool sc__is_number(uint32_t c) {
    if (c < 128) return c >= '0' && c <= '9';
    return sc__in_runs(sc__numbers_table, sizeof sc__numbers_table / sizeof *sc__numbers_table, c);
}
static bool sc__is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

static uint32_t sc__to_lower(uint32_t c) {
    if (c < 128) return c >= 'A' && c <= 'Z' ? c + 32 : c;
    int32_t at = 0, code = (int32_t)c;
    for (size_t i = 0; i < sizeof sc__lower / sizeof *sc__lower; i += 4) {
        at += sc__lower[i];
        if (code < at) return c;
        int32_t steps = (code - at) / sc__lower[i + 2];
        if (steps < sc__lower[i + 1] && at + steps * sc__lower[i + 2] == code) return (uint32_t)(code + sc__lower[i + 3]);
    }
    return c;
}

/* The code point at *s, which moves behind it; U+FFFD for a byte that does not belong. */
static uint32_t sc__utf8_decode(const char **s) {
    const unsigned char *p = (const unsigned char *)*s;
    int n = p[0] < 0x80 ? 1 : p[0] < 0xc2 ? 0 : p[0] < 0xe0 ? 2 : p[0] < 0xf0 ? 3 : p[0] < 0xf5 ? 4 : 0;
    uint32_t c = n == 1 ? p[0] : n ? p[0] & (0x7fu >> n) : 0xfffd;
    int i = 1;
    for (; i < n && (p[i] & 0xc0) == 0x80; i++) c = c << 6 | (p[i] & 63);
    bool bad = i < n || (n == 3 && (c < 0x800 || (c >= 0xd800 && c < 0xe000))) || (n == 4 && (c < 0x10000 || c > 0x10ffff));
    *s += n && !bad ? n : 1;
    return bad ? 0xfffd : c;
}

/* ---- Vocabulary: strings to ids, by binary search ---- */

typedef struct sc__word { const char *text; int32_t id; float score; } sc__word;

struct sc_tokenizer {
    bool unigram;
    int length;                 /* model_max_length */
    sc_json *json;              /* owns the strings of the words */
    sc__word *words;            /* sorted by text */
    int64_t count;
    sc__word *special;          /* recognised whole, anywhere in a text */
    int special_count;
    int32_t begin, end, pad, unknown;
    float worst;                /* lowest score, of which an unknown character is 10 below */
    char *merges;               /* BPE: merges.txt; words of "left right" with their rank as id */
    sc__word *ranks;
    int64_t rank_count;
    char bytes[256][4];         /* BPE: each byte's printable letter */
    uint32_t *trie;             /* Unigram: the normaliser's double array */
    size_t trie_count, replacement_size;
    char *replacements;
    size_t longest;             /* bytes of the longest word */
};

static int sc__compare_words(const void *a, const void *b) { return strcmp(((const sc__word *)a)->text, ((const sc__word *)b)->text); }

static const sc__word *sc__lookup(const sc__word *words, int64_t count, const char *text) {
    sc__word key = {.text = text};
    return count ? (const sc__word *)bsearch(&key, words, (size_t)count, sizeof *words, sc__compare_words) : NULL;
}

void sc_tokenizer_close(sc_tokenizer *t) {
    if (!t) return;
    sc_json_free(t->json);
    SC_FREE(t->words);
    SC_FREE(t->special);
    SC_FREE(t->merges);
    SC_FREE(t->ranks);
    SC_FREE(t->trie);
    SC_FREE(t->replacements);
    SC_FREE(t);
}

int sc_tokenizer_length(const sc_tokenizer *t) { return t->length; }

/* ---- Opening CLIP's ---- */

/* Bytes that print stand for themselves, the others for U+0100 on (GPT-2's alphabet). */
static void sc__byte_letters(char letters[256][4]) {
    uint32_t next = 256;
    for (uint32_t b = 0; b < 256; b++) {
        bool prints = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        letters[b][sc__utf8_encode(prints ? b : next++, letters[b])] = 0;
    }
}

static bool sc__bpe_open(sc_tokenizer *t, const char *folder) {
    char *vocab = sc__join(folder, "vocab.json"), *merges = sc__join(folder, "merges.txt");
    size_t length;
    bool ok = vocab && merges && (t->json = sc_json_load(vocab)) && (t->merges = sc__read_file(merges, &length));
    t->count = ok ? sc_json_length(t->json) : 0;
    t->words = ok ? (sc__word *)sc__alloc((size_t)t->count, sizeof *t->words) : NULL;
    ok = ok && t->words;
    for (int64_t i = 0; ok && i < t->count; i++) {
        double id = sc_json_number(sc_json_value(t->json, i), -1);
        if (!sc_json_key(t->json, i) || !(id >= 0 && id < 1 << 24)) ok = sc__fail("%s: must map words to ids", vocab);
        else t->words[i] = (sc__word){.text = sc_json_key(t->json, i), .id = (int32_t)id};
    }
    if (ok) qsort(t->words, (size_t)t->count, sizeof *t->words, sc__compare_words);
    int64_t lines = 1;
    for (size_t i = 0; ok && i < length; i++) lines += t->merges[i] == '\n';
    t->ranks = ok ? (sc__word *)sc__alloc((size_t)lines, sizeof *t->ranks) : NULL;
    ok = ok && t->ranks;
    for (char *line = t->merges; ok && *line;) {
        char *end = line + strcspn(line, "\n"), *next = *end ? end + 1 : end;
        *end = 0;
        if (end > line && end[-1] == '\r') end[-1] = 0;
        if (*line && strncmp(line, "#version", 8)) t->ranks[t->rank_count] = (sc__word){.text = line, .id = (int32_t)t->rank_count}, t->rank_count++;
        line = next;
    }
    if (ok) qsort(t->ranks, (size_t)t->rank_count, sizeof *t->ranks, sc__compare_words);
    const sc__word *begin = ok ? sc__lookup(t->words, t->count, "<|startoftext|>") : NULL, *end = ok ? sc__lookup(t->words, t->count, "<|endoftext|>") : NULL;
    if (ok && (!begin || !end)) ok = sc__fail("%s: no <|startoftext|> or <|endoftext|>", vocab);
    t->special = ok ? (sc__word *)sc__alloc(2, sizeof *t->special) : NULL;
    ok = ok && t->special;
    if (ok) {
        t->special[0] = *begin, t->special[1] = *end, t->special_count = 2;
        t->begin = begin->id, t->end = t->pad = t->unknown = end->id;
        sc__byte_letters(t->bytes);
    }
    SC_FREE(vocab);
    SC_FREE(merges);
    return ok;
}

/* ---- Opening T5's ---- */

static unsigned char *sc__base64(const char *text, size_t *size) {
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    unsigned char *out = (unsigned char *)sc__alloc(strlen(text) + 4, 1);
    uint32_t bits = 0;
    int count = 0;
    *size = 0;
    for (; out && *text && *text != '='; text++) {
        const char *found = strchr(alphabet, *text);
        if (!found) { SC_FREE(out); return NULL; }
        bits = bits << 6 | (uint32_t)(found - alphabet);
        if ((count += 6) >= 8) out[(*size)++] = (unsigned char)(bits >> (count -= 8));
    }
    return out;
}

/* precompiled_charsmap: the trie's size in bytes, the trie, then the replacements, each ended by NUL. */
static bool sc__charsmap(sc_tokenizer *t, const sc_json *normalizer, const char *path) {
    const char *type = sc_json_string(sc_json_get(normalizer, "type"), ""), *text = sc_json_string(sc_json_get(normalizer, "precompiled_charsmap"), NULL);
    const sc_json *list = sc_json_get(normalizer, "normalizers");
    for (int64_t i = 0; !strcmp(type, "Sequence") && i < sc_json_length(list); i++)
        if (!sc__charsmap(t, sc_json_at(list, i), path)) return false;
    if (strcmp(type, "Precompiled") || !text) return true;
    size_t size, trie;
    unsigned char *data = sc__base64(text, &size);
    if (!data || size < 4 || (trie = data[0] | (size_t)data[1] << 8 | (size_t)data[2] << 16 | (size_t)data[3] << 24) > size - 4 || trie % 4) {
        SC_FREE(data);
        return sc__fail("%s: the precompiled_charsmap is broken", path);
    }
    t->trie_count = trie / 4;
    t->replacement_size = size - 4 - trie;
    t->trie = (uint32_t *)sc__alloc(t->trie_count, 4);
    t->replacements = (char *)sc__alloc(t->replacement_size + 1, 1);
    bool ok = t->trie && t->replacements;
    for (size_t i = 0; ok && i < trie; i++) t->trie[i / 4] |= (uint32_t)data[4 + i] << (8 * (i % 4));
    if (ok) memcpy(t->replacements, data + 4 + trie, t->replacement_size);
    SC_FREE(data);
    return ok;
}

static bool sc__unigram_open(sc_tokenizer *t, const char *path) {
    t->unigram = true;
    t->json = sc_json_load(path);
    if (!t->json) return false;
    const sc_json *model = sc_json_get(t->json, "model"), *vocab = sc_json_get(model, "vocab"), *added = sc_json_get(t->json, "added_tokens");
    if (strcmp(sc_json_string(sc_json_get(model, "type"), ""), "Unigram")) return sc__fail("%s: the model must be a Unigram", path);
    t->count = sc_json_length(vocab);
    t->special_count = (int)sc_json_length(added);
    t->words = (sc__word *)sc__alloc((size_t)t->count, sizeof *t->words);
    t->special = (sc__word *)sc__alloc((size_t)t->special_count, sizeof *t->special);
    if (!t->words || !t->special) return false;
    for (int64_t i = 0; i < t->count; i++) {
        const sc_json *entry = sc_json_at(vocab, i);
        const char *text = sc_json_string(sc_json_at(entry, 0), NULL);
        if (!text) return sc__fail("%s: vocab must hold [word, score]", path);
        t->words[i] = (sc__word){text, (int32_t)i, (float)sc_json_number(sc_json_at(entry, 1), 0)};
        t->worst = fminf(t->worst, t->words[i].score);
        t->longest = strlen(text) > t->longest ? strlen(text) : t->longest;
    }
    qsort(t->words, (size_t)t->count, sizeof *t->words, sc__compare_words);
    t->unknown = (int32_t)sc_json_number(sc_json_get(model, "unk_id"), 2);
    t->begin = t->end = -1;
    for (int i = 0; i < t->special_count; i++) {
        const sc_json *entry = sc_json_at(added, i);
        const char *text = sc_json_string(sc_json_get(entry, "content"), "");
        t->special[i] = (sc__word){text, (int32_t)sc_json_number(sc_json_get(entry, "id"), -1), 0};
        if (!*text || t->special[i].id < 0) return sc__fail("%s: added_tokens need content and id", path);
        if (!strcmp(text, "</s>")) t->end = t->special[i].id;
        if (!strcmp(text, "<pad>")) t->pad = t->special[i].id;
    }
    if (t->end < 0) return sc__fail("%s: no </s>", path);
    return sc__charsmap(t, sc_json_get(t->json, "normalizer"), path);
}

sc_tokenizer *sc_tokenizer_open(const char *folder) {
    sc_tokenizer *t = (sc_tokenizer *)sc__alloc(1, sizeof *t);
    char *unigram = sc__join(folder, "tokenizer.json"), *vocab = sc__join(folder, "vocab.json"), *config = sc__join(folder, "tokenizer_config.json");
    bool ok = t && unigram && vocab && config;
    if (ok && sc__exists(vocab)) ok = sc__bpe_open(t, folder);
    else if (ok && sc__exists(unigram)) ok = sc__unigram_open(t, unigram);
    else if (ok) ok = sc__fail("%s: no tokenizer here (vocab.json with merges.txt, or tokenizer.json)", folder);
    if (ok && sc__exists(config)) {
        sc_json *json = sc_json_load(config);
        double length = sc_json_number(sc_json_get(json, "model_max_length"), 0);
        t->length = length >= 2 && length <= 4096 ? (int)length : 0;
        ok = json != NULL;
        sc_json_free(json);
    }
    SC_FREE(unigram);
    SC_FREE(vocab);
    SC_FREE(config);
    if (ok) return t;
    sc_tokenizer_close(t);
    return NULL;
}

/* ---- Tokenizing ---- */

typedef struct sc__ids { int32_t *ids; int limit, count; } sc__ids;
static void sc__emit(sc__ids *out, int32_t id) {
    if (out->count < out->limit) out->ids[out->count] = id;
    out->count++;
}

/* Merges one word, its letters already in the byte alphabet: always the pair of the lowest rank. */
static bool sc__bpe_word(const sc_tokenizer *t, const char *word, size_t length, sc__ids *out) {
    size_t n = 0, *start = (size_t *)sc__alloc(length + 2, sizeof *start);
    char *pair = (char *)sc__alloc(2 * length + 16, 1), *text = (char *)sc__alloc(length + 8, 1);
    bool ok = start && pair && text;
    if (ok) {
        snprintf(text, length + 8, "%.*s</w>", (int)length, word);
        for (size_t i = 0; i < length; i++)
            if (((unsigned char)word[i] & 0xc0) != 0x80) start[n++] = i;
        start[n] = length + 4; /* the last letter carries "</w>" */
    }
    while (ok && n > 1) {
        size_t best = 0;
        int32_t rank = INT32_MAX;
        for (size_t i = 0; i + 1 < n; i++) {
            snprintf(pair, 2 * length + 16, "%.*s %.*s", (int)(start[i + 1] - start[i]), text + start[i],
                     (int)(start[i + 2] - start[i + 1]), text + start[i + 1]);
            const sc__word *found = sc__lookup(t->ranks, t->rank_count, pair);
            if (found && found->id < rank) rank = found->id, best = i;
        }
        if (rank == INT32_MAX) break;
        memmove(start + best + 1, start + best + 2, (n - best - 1) * sizeof *start);
        n--;
    }
    for (size_t i = 0; ok && i < n; i++) {
        snprintf(pair, 2 * length + 16, "%.*s", (int)(start[i + 1] - start[i]), text + start[i]);
        const sc__word *found = sc__lookup(t->words, t->count, pair);
        sc__emit(out, found ? found->id : t->unknown);
    }
    SC_FREE(start);
    SC_FREE(pair);
    SC_FREE(text);
    return ok;
}

/* How many bytes the word at `s` takes: 's 't 're 've 'm 'll 'd, letters, one number, or other signs. */
static size_t sc__bpe_cut(const char *s, const char *end) {
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++)
        if ((size_t)(end - s) >= strlen(endings[i]) && !strncmp(s, endings[i], strlen(endings[i]))) return strlen(endings[i]);
    const char *at = s, *next = s;
    uint32_t c = sc__utf8_decode(&next);
    if (sc__is_number(c)) return (size_t)(next - s);
    bool letters = sc__is_letter(c);
    while (at < end) {
        next = at;
        c = sc__utf8_decode(&next);
        if (sc__is_space(c) || sc__is_letter(c) != letters || (!letters && sc__is_number(c))) break;
        at = next;
    }
    return (size_t)(at - s);
}

static bool sc__bpe_text(const sc_tokenizer *t, const char *text, size_t length, sc__ids *out) {
    char *lower = (char *)sc__alloc(4 * length + 8, 1), *word = (char *)sc__alloc(8 * length + 8, 1), *end = lower;
    bool ok = lower && word;
    for (const char *s = text; ok && s < text + length;) end += sc__utf8_encode(sc__to_lower(sc__utf8_decode(&s)), end);
    for (const char *s = lower; ok && s < end;) {
        const char *next = s;
        if (sc__is_space(sc__utf8_decode(&next))) { s = next; continue; }
        size_t bytes = sc__bpe_cut(s, end), n = 0;
        for (size_t i = 0; i < bytes; i++) {
            const char *letter = t->bytes[(unsigned char)s[i]];
            memcpy(word + n, letter, strlen(letter));
            n += strlen(letter);
        }
        ok = sc__bpe_word(t, word, n, out);
        s += bytes;
    }
    SC_FREE(lower);
    SC_FREE(word);
    return ok;
}

/* The replacement for the shortest prefix of s[n] the trie knows, or NULL. (darts-clone's units.) */
static const char *sc__charsmap_find(const sc_tokenizer *t, const char *s, size_t n) {
    size_t at = 0;
    if (!t->trie_count) return NULL;
#define SC__OFFSET(unit) ((size_t)((unit) >> 10) << (((unit) & (1u << 9)) >> 6))
    at = SC__OFFSET(t->trie[0]);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if ((at ^= c) >= t->trie_count || (t->trie[at] & (1u << 31 | 0xff)) != c) return NULL;
        uint32_t unit = t->trie[at];
        at ^= SC__OFFSET(unit);
        if (unit >> 8 & 1) {
            size_t value = at < t->trie_count ? t->trie[at] & 0x7fffffffu : SIZE_MAX;
            return value < t->replacement_size ? t->replacements + value : NULL;
        }
    }
#undef SC__OFFSET
    return NULL;
}

/* A mark that joins the character before it, roughly Unicode's grapheme extenders. */
static bool sc__joins(uint32_t c) {
    return (c >= 0x300 && c < 0x370) || (c >= 0x483 && c < 0x48a) || (c >= 0x591 && c < 0x5c8 && !sc__is_letter(c)) ||
           (c >= 0x610 && c < 0x61b) || (c >= 0x64b && c < 0x660) || (c >= 0x93a && c < 0x94f && c != 0x93d) ||
           (c >= 0xe31 && c < 0xe4f && !sc__is_letter(c) && c != 0xe3f && c != 0xe46) || c == 0x200d || (c >= 0x20d0 && c < 0x20f1) ||
           (c >= 0x3099 && c < 0x309b) || (c >= 0xfe00 && c < 0xfe10) || (c >= 0xfe20 && c < 0xfe30) || (c >= 0x1f3fb && c < 0x1f400);
}

static void sc__normalise_part(const sc_tokenizer *t, const char *s, const char *end, sc__text *out) {
    const char *replacement = end - s < 6 ? sc__charsmap_find(t, s, (size_t)(end - s)) : NULL;
    if (replacement) {
        sc__text_add(out, replacement, strlen(replacement));
        return;
    }
    while (s < end) {
        const char *next = s;
        char bytes[4];
        uint32_t c = sc__utf8_decode(&next);
        int n = sc__utf8_encode(c, bytes);
        replacement = sc__charsmap_find(t, bytes, (size_t)n);
        if (replacement) sc__text_add(out, replacement, strlen(replacement));
        else sc__text_add(out, bytes, (size_t)n);
        s = next;
    }
}

/* Viterbi over the characters of s[n]; each unknown character costs 10 more than the worst word. */
static bool sc__unigram_word(const sc_tokenizer *t, const char *s, size_t n, sc__ids *out) {
    typedef struct node { float score; size_t from; int32_t id; } node;
    node *best = (node *)sc__alloc(n + 1, sizeof *best);
    char *piece = (char *)sc__alloc(t->longest + 1, 1);
    size_t *path = (size_t *)sc__alloc(n + 1, sizeof *path), steps = 0;
    bool ok = best && piece && path;
    for (size_t i = 1; ok && i <= n; i++) best[i].score = -INFINITY;
    for (size_t i = 0; ok && i < n; i++) {
        if (((unsigned char)s[i] & 0xc0) == 0x80) continue;
        const char *next = s + i;
        size_t one = (sc__utf8_decode(&next), (size_t)(next - s)) - i;
        bool known = false;
        for (size_t length = 1; length <= t->longest && i + length <= n; length++) {
            piece[length - 1] = s[i + length - 1];
            piece[length] = 0;
            const sc__word *w = sc__lookup(t->words, t->count, piece);
            if (!w) continue;
            known = known || length == one;
            float score = best[i].score + w->score;
            if (score > best[i + length].score) best[i + length] = (node){score, i, w->id};
        }
        float score = best[i].score + t->worst - 10;
        if (!known && score > best[i + one].score) best[i + one] = (node){score, i, t->unknown};
    }
    for (size_t at = n; ok && at > 0; at = best[at].from) path[steps++] = at;
    int32_t last = -1;
    while (ok && steps) {
        int32_t id = best[path[--steps]].id;
        if (id != t->unknown || last != t->unknown) sc__emit(out, id); /* unknown neighbours are one */
        last = id;
    }
    SC_FREE(best);
    SC_FREE(piece);
    SC_FREE(path);
    return ok;
}

/* One stretch of text: normalise, strip the right, spaces to U+2581, cut before each of those. */
static bool sc__unigram_text(const sc_tokenizer *t, const char *text, size_t length, bool first, sc__ids *out) {
    static const char space[] = "\xe2\x96\x81";
    sc__text clean = {0}, line = {0};
    for (const char *s = text; s < text + length;) {
        const char *end = s, *next;
        bool carriage = *s == '\r' && s + 1 < text + length && s[1] == '\n';
        sc__utf8_decode(&end);
        if (carriage) end++;
        else
            for (next = end; next < text + length && sc__joins(sc__utf8_decode(&next)); ) end = next;
        sc__normalise_part(t, s, end, &clean);
        s = end;
    }
    size_t n = clean.length, spaces;
    for (bool more = true; more && n;) { /* strip the right */
        size_t at = n - 1;
        while (at > 0 && ((unsigned char)clean.data[at] & 0xc0) == 0x80) at--;
        const char *p = clean.data + at;
        more = sc__is_space(sc__utf8_decode(&p));
        if (more) n = at;
    }
    if (first && n && !(n >= 3 && !memcmp(clean.data, space, 3)) && clean.data[0] != ' ') sc__text_add(&line, space, 3);
    for (size_t i = 0; i < n; i += spaces ? spaces : 1) {
        for (spaces = 0; i + spaces < n && clean.data[i + spaces] == ' '; spaces++) {}
        if (spaces) sc__text_add(&line, space, 3);
        else sc__text_add(&line, clean.data + i, 1);
    }
    bool ok = (!clean.failed && !line.failed) || sc__fail("out of memory in the tokenizer");
    for (size_t i = 0, end; ok && i < line.length; i = end) {
        for (end = i + 1; end < line.length && (line.length - end < 3 || memcmp(line.data + end, space, 3)); end++) {}
        ok = sc__unigram_word(t, line.data + i, end - i, out);
    }
    SC_FREE(clean.data);
    SC_FREE(line.data);
    return ok;
}

int sc_tokenize(const sc_tokenizer *t, const char *text, int length, int32_t *ids) {
    sc__ids out = {ids, length - 1, 0}; /* the last place is the end token's */
    const char *s = text, *start = text;
    bool ok = length >= 2 || sc__fail("a prompt needs at least 2 tokens");
    if (ok && !t->unigram) sc__emit(&out, t->begin);
    while (ok) {
        const sc__word *special = NULL;
        for (int i = 0; *s && i < t->special_count; i++)
            if (!strncmp(s, t->special[i].text, strlen(t->special[i].text))) special = &t->special[i];
        if (!special && *s) { s++; continue; }
        if (s > start) {
            size_t n = (size_t)(s - start);
            ok = t->unigram ? sc__unigram_text(t, start, n, start == text, &out) : sc__bpe_text(t, start, n, &out);
        }
        if (!special) break;
        sc__emit(&out, special->id);
        start = s += strlen(special->text);
    }
    if (!ok) return -1;
    int count = out.count < length - 1 ? out.count : length - 1;
    ids[count++] = t->end;
    for (int i = count; i < length; i++) ids[i] = t->pad;
    return count;
}

/* ==== Text encoders ===========================================================================
 *
 * CLIP's text half (Radford et al. 2021): causal transformer with pre-norm blocks; FLUX takes its
 * pooled vector, the last layer's output at the end token. T5's encoder (Raffel et al. 2020): RMS
 * norms, no biases, scores without scaling, a learned bias for the distance of two tokens that the
 * first layer owns and all share; FLUX feeds the pads too, without a mask. Names are transformers'.
 *
 * Easy to get wrong: CLIP's config says eos_token_id 2, but the end token is the highest id, and the
 * vector is taken at its first place (the pads are the same token).
 */

typedef struct sc__clip_layer { sc_tensor *norm[4]; sc_linear_layer q, k, v, out, up, down; } sc__clip_layer;
typedef struct sc__t5_layer { sc_tensor *norm[2]; sc_linear_layer q, k, v, o, gate, up, down; } sc__t5_layer;

struct sc_text_encoders {
    const sc_backend *backend;
    sc_tokenizer *clip_tokenizer, *t5_tokenizer;
    sc_net *clip, *t5;
    sc_tape *tape;
    int clip_width, clip_heads, clip_layers, clip_length, clip_end;
    float clip_eps;
    sc_activation clip_activation, t5_activation;
    sc_tensor *clip_tokens, *clip_positions, *clip_norm[2];
    sc__clip_layer *clip_layer;
    int t5_width, t5_heads, t5_size, t5_layers, t5_buckets, t5_distance;
    bool t5_gated;
    float t5_eps;
    sc_tensor *t5_tokens, *t5_bias, *t5_norm;
    sc__t5_layer *t5_layer;
};

void sc_text_encoders_close(sc_text_encoders *t) {
    if (!t) return;
    sc_tokenizer_close(t->clip_tokenizer);
    sc_tokenizer_close(t->t5_tokenizer);
    sc_net_close(t->clip);
    sc_net_close(t->t5);
    sc_tape_free(t->tape);
    SC_FREE(t->clip_layer);
    SC_FREE(t->t5_layer);
    SC_FREE(t);
}

static bool sc__activation_named(const char *name, const char *path, sc_activation *kind) {
    static const struct { const char *name; sc_activation kind; } known[] = {
        {"quick_gelu", SC_QUICK_GELU}, {"gelu", SC_GELU}, {"gelu_new", SC_GELU_TANH}, {"gelu_pytorch_tanh", SC_GELU_TANH}, {"silu", SC_SILU}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) return *kind = known[i].kind, true;
    return sc__fail("%s: activation '%s' is not supported", path, name);
}

/* ---- CLIP ---- */

static sc_tensor *sc__vector(sc_net *net, const char *name, int64_t n) { return sc_net_weight(net, name, 1, &n); }

static bool sc__clip_layer_open(sc_text_encoders *t, sc__clip_layer *l, int index, int64_t hidden) {
    static const char *const norms[] = {"layer_norm1.weight", "layer_norm1.bias", "layer_norm2.weight", "layer_norm2.bias"};
    char name[128];
    int n = snprintf(name, sizeof name, "text_model.encoder.layers.%d.", index);
    int64_t c = t->clip_width;
    for (int i = 0; i < 4; i++) {
        snprintf(name + n, sizeof name - (size_t)n, "%s", norms[i]);
        if (!(l->norm[i] = sc__vector(t->clip, name, c))) return false;
    }
    struct { sc_linear_layer *layer; const char *name; int64_t out, in; } linears[] = {
        {&l->q, "self_attn.q_proj", c, c}, {&l->k, "self_attn.k_proj", c, c}, {&l->v, "self_attn.v_proj", c, c},
        {&l->out, "self_attn.out_proj", c, c}, {&l->up, "mlp.fc1", hidden, c}, {&l->down, "mlp.fc2", c, hidden}};
    for (int i = 0; i < 6; i++) {
        snprintf(name + n, sizeof name - (size_t)n, "%s", linears[i].name);
        if (!sc_net_linear(t->clip, linears[i].layer, name, linears[i].out, linears[i].in, true)) return false;
    }
    return true;
}

static bool sc__clip_open(sc_text_encoders *t, const char *folder) {
    char *path = sc__join(folder, "config.json");
    sc_json *json = path ? sc_json_load(path) : NULL;
    int hidden, vocabulary;
    bool ok = json && sc__config_int(json, path, "hidden_size", 512, &t->clip_width) &&
              sc__config_int(json, path, "num_attention_heads", 8, &t->clip_heads) &&
              sc__config_int(json, path, "num_hidden_layers", 12, &t->clip_layers) &&
              sc__config_int(json, path, "max_position_embeddings", 77, &t->clip_length) &&
              sc__config_int(json, path, "vocab_size", 49408, &vocabulary) &&
              sc__config_int(json, path, "intermediate_size", 2048, &hidden) &&
              sc__activation_named(sc_json_string(sc_json_get(json, "hidden_act"), "quick_gelu"), path, &t->clip_activation);
    if (ok && t->clip_width % t->clip_heads) ok = sc__fail("%s: hidden_size is not a multiple of the heads", path);
    if (ok) {
        t->clip_eps = (float)sc_json_number(sc_json_get(json, "layer_norm_eps"), 1e-5);
        t->clip_end = (int)sc_json_number(sc_json_get(json, "eos_token_id"), 2);
        ok = (t->clip = sc_net_open(t->backend, folder, sc__small_file(folder))) &&
             (t->clip_layer = (sc__clip_layer *)sc__alloc((size_t)t->clip_layers, sizeof *t->clip_layer));
    }
    int64_t c = t->clip_width;
    ok = ok && (t->clip_tokens = sc_net_weight(t->clip, "text_model.embeddings.token_embedding.weight", 2, (const int64_t[]){vocabulary, c})) &&
         (t->clip_positions = sc_net_weight(t->clip, "text_model.embeddings.position_embedding.weight", 2, (const int64_t[]){t->clip_length, c})) &&
         (t->clip_norm[0] = sc__vector(t->clip, "text_model.final_layer_norm.weight", c)) &&
         (t->clip_norm[1] = sc__vector(t->clip, "text_model.final_layer_norm.bias", c));
    for (int i = 0; ok && i < t->clip_layers; i++) ok = sc__clip_layer_open(t, &t->clip_layer[i], i, hidden);
    sc_json_free(json);
    SC_FREE(path);
    return ok;
}

/* ids [length] -> the pooled vector [clip_width]. */
static bool sc__clip_encode(sc_text_encoders *s, const int32_t *ids, float *pooled) {
    sc_tape *t = s->tape;
    int32_t positions[4096], top = 0;
    int length = s->clip_length, end = 0;
    for (int i = 0; i < length; i++) positions[i] = i, top = ids[i] > top ? ids[i] : top;
    int32_t wanted = s->clip_end == 2 ? top : s->clip_end;
    while (end < length - 1 && ids[end] != wanted) end++;
    sc_tape_reset(t);
    sc_tensor *x = sc_add(t, sc_embed_tokens(t, s->clip_tokens, ids, 1, length), sc_embed_tokens(t, s->clip_positions, positions, 1, length));
    float scale = 1.f / sqrtf((float)s->clip_width / (float)s->clip_heads);
    for (int i = 0; i < s->clip_layers; i++) {
        const sc__clip_layer *l = &s->clip_layer[i];
        sc_tensor *n = sc_layer_norm(t, x, l->norm[0], l->norm[1], s->clip_eps);
        sc_tensor *o = sc_attention(t, sc_linear(t, n, &l->q), sc_linear(t, n, &l->k), sc_linear(t, n, &l->v), s->clip_heads, scale, NULL, true);
        x = sc_add(t, x, sc_linear(t, o, &l->out));
        n = sc_layer_norm(t, x, l->norm[2], l->norm[3], s->clip_eps);
        x = sc_add(t, x, sc_linear(t, sc_activate(t, s->clip_activation, sc_linear(t, n, &l->up)), &l->down));
    }
    sc_tensor *last = sc_layer_norm(t, sc_slice_tokens(t, x, end, 1), s->clip_norm[0], s->clip_norm[1], s->clip_eps);
    return sc_read(t, last, pooled);
}

/* ---- T5 ---- */

static bool sc__t5_layer_open(sc_text_encoders *t, sc__t5_layer *l, int index, int64_t hidden) {
    char name[128];
    int n = snprintf(name, sizeof name, "encoder.block.%d.layer.", index);
    int64_t c = t->t5_width, inner = (int64_t)t->t5_heads * t->t5_size;
    for (int i = 0; i < 2; i++) {
        snprintf(name + n, sizeof name - (size_t)n, "%d.layer_norm.weight", i);
        if (!(l->norm[i] = sc__vector(t->t5, name, c))) return false;
    }
    struct { sc_linear_layer *layer; const char *name; int64_t out, in; } linears[] = {
        {&l->q, "0.SelfAttention.q", inner, c}, {&l->k, "0.SelfAttention.k", inner, c}, {&l->v, "0.SelfAttention.v", inner, c},
        {&l->o, "0.SelfAttention.o", c, inner}, {&l->gate, t->t5_gated ? "1.DenseReluDense.wi_0" : "1.DenseReluDense.wi", hidden, c},
        {&l->down, "1.DenseReluDense.wo", c, hidden}, {&l->up, "1.DenseReluDense.wi_1", hidden, c}};
    for (int i = 0; i < (t->t5_gated ? 7 : 6); i++) {
        snprintf(name + n, sizeof name - (size_t)n, "%s", linears[i].name);
        if (!sc_net_linear(t->t5, linears[i].layer, name, linears[i].out, linears[i].in, false)) return false;
    }
    return true;
}

static bool sc__t5_open(sc_text_encoders *t, const char *folder) {
    char *path = sc__join(folder, "config.json");
    sc_json *json = path ? sc_json_load(path) : NULL;
    int hidden, vocabulary;
    bool ok = json && sc__config_int(json, path, "d_model", 512, &t->t5_width) && sc__config_int(json, path, "num_heads", 8, &t->t5_heads) &&
              sc__config_int(json, path, "d_kv", 64, &t->t5_size) && sc__config_int(json, path, "num_layers", 6, &t->t5_layers) &&
              sc__config_int(json, path, "d_ff", 2048, &hidden) && sc__config_int(json, path, "vocab_size", 32128, &vocabulary) &&
              sc__config_int(json, path, "relative_attention_num_buckets", 32, &t->t5_buckets) &&
              sc__config_int(json, path, "relative_attention_max_distance", 128, &t->t5_distance) &&
              sc__activation_named(sc_json_string(sc_json_get(json, "dense_act_fn"), "gelu_new"), path, &t->t5_activation);
    if (ok) {
        t->t5_gated = sc_json_bool(sc_json_get(json, "is_gated_act"), false);
        t->t5_eps = (float)sc_json_number(sc_json_get(json, "layer_norm_epsilon"), 1e-6);
        ok = (t->t5 = sc_net_open(t->backend, folder, sc__small_file(folder))) &&
             (t->t5_layer = (sc__t5_layer *)sc__alloc((size_t)t->t5_layers, sizeof *t->t5_layer));
    }
    static const char table[] = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
    bool shared = ok && sc_file_find(t->t5->file, "shared.weight");
    ok = ok && (t->t5_tokens = sc_net_weight(t->t5, shared ? "shared.weight" : "encoder.embed_tokens.weight", 2, (const int64_t[]){vocabulary, t->t5_width})) &&
         (t->t5_bias = sc_net_weight(t->t5, table, 2, (const int64_t[]){t->t5_buckets, t->t5_heads})) &&
         (t->t5_norm = sc__vector(t->t5, "encoder.final_layer_norm.weight", t->t5_width));
    for (int i = 0; ok && i < t->t5_layers; i++) ok = sc__t5_layer_open(t, &t->t5_layer[i], i, hidden);
    sc_json_free(json);
    SC_FREE(path);
    return ok;
}

/* Half of the buckets for keys behind the query; of each half, half for exact distances, the rest
 * for distances that grow logarithmically up to the largest. */
static int sc__t5_bucket(int distance, int buckets, int largest) {
    int half = buckets / 2, exact = half / 2, bucket = distance > 0 ? half : 0, d = abs(distance);
    if (d < exact) return bucket + d;
    int far = exact + (int)(logf((float)d / (float)exact) / logf((float)largest / (float)exact) * (float)(half - exact));
    return bucket + (far < half - 1 ? far : half - 1);
}

/* The bias of each head for each pair of tokens, [H, T, T]. */
static sc_tensor *sc__t5_position_bias(sc_text_encoders *s, int tokens) {
    int64_t heads = s->t5_heads, n = (int64_t)s->t5_buckets * heads;
    float *bias = (float *)sc__alloc((size_t)(heads * tokens * tokens + n), sizeof *bias), *table = bias + heads * tokens * tokens;
    if (!bias) return NULL;
    void *raw = sc__alloc((size_t)(n * sc_dtype_size(s->t5_bias->dtype)), 1);
    if (raw) s->backend->download(raw, s->t5_bias->data, (size_t)(n * sc_dtype_size(s->t5_bias->dtype)));
    if (raw) sc_to_f32(table, raw, s->t5_bias->dtype, n);
    for (int64_t h = 0; h < heads; h++)
        for (int q = 0; q < tokens; q++)
            for (int k = 0; k < tokens; k++)
                bias[(h * tokens + q) * tokens + k] = table[sc__t5_bucket(k - q, s->t5_buckets, s->t5_distance) * heads + h];
    sc_tensor *x = raw ? sc_from(s->tape, 3, (const int64_t[]){heads, tokens, tokens}, bias) : NULL;
    SC_FREE(raw);
    SC_FREE(bias);
    return x;
}

/* ids [tokens] -> context [tokens, t5_width]. */
static bool sc__t5_encode(sc_text_encoders *s, const int32_t *ids, int tokens, float *context) {
    sc_tape *t = s->tape;
    sc_tape_reset(t);
    sc_tensor *x = sc_embed_tokens(t, s->t5_tokens, ids, 1, tokens), *bias = sc__t5_position_bias(s, tokens);
    if (!bias) return false;
    for (int i = 0; i < s->t5_layers; i++) {
        const sc__t5_layer *l = &s->t5_layer[i];
        sc_tensor *n = sc_rms_norm(t, x, l->norm[0], s->t5_eps);
        sc_tensor *o = sc_attention(t, sc_linear(t, n, &l->q), sc_linear(t, n, &l->k), sc_linear(t, n, &l->v), s->t5_heads, 1, bias, false);
        x = sc_add(t, x, sc_linear(t, o, &l->o));
        n = sc_rms_norm(t, x, l->norm[1], s->t5_eps);
        sc_tensor *h = sc_activate(t, s->t5_activation, sc_linear(t, n, &l->gate));
        if (s->t5_gated) h = sc_multiply(t, h, sc_linear(t, n, &l->up));
        x = sc_add(t, x, sc_linear(t, h, &l->down));
    }
    return sc_read(t, sc_rms_norm(t, x, s->t5_norm, s->t5_eps), context);
}

/* ---- Both ---- */

sc_text_encoders *sc_text_encoders_open(const sc_backend *backend, const char *folder) {
    sc_text_encoders *t = (sc_text_encoders *)sc__alloc(1, sizeof *t);
    char *parts[4] = {sc__join(folder, "tokenizer"), sc__join(folder, "text_encoder"), sc__join(folder, "tokenizer_2"), sc__join(folder, "text_encoder_2")};
    bool ok = t && parts[0] && parts[1] && parts[2] && parts[3];
    if (ok) t->backend = backend;
    ok = ok && (t->tape = sc_tape_new(backend)) && (t->clip_tokenizer = sc_tokenizer_open(parts[0])) && sc__clip_open(t, parts[1]) &&
         (t->t5_tokenizer = sc_tokenizer_open(parts[2])) && sc__t5_open(t, parts[3]);
    for (int i = 0; i < 4; i++) SC_FREE(parts[i]);
    if (ok && t->clip_length > 4096) ok = sc__fail("%s: CLIP of more than 4096 tokens", folder);
    if (ok) return t;
    sc_text_encoders_close(t);
    return NULL;
}

bool sc_text_encode(sc_text_encoders *t, const char *prompt, int tokens, float *context, float *pooled) {
    int32_t ids[4096];
    if (tokens < 2 || tokens > 4096) return sc__fail("text tokens must be between 2 and 4096");
    return sc_tokenize(t->clip_tokenizer, prompt, t->clip_length, ids) >= 0 && sc__clip_encode(t, ids, pooled) &&
           sc_tokenize(t->t5_tokenizer, prompt, tokens, ids) >= 0 && sc__t5_encode(t, ids, tokens, context);
}

/* ==== Pictures and data sets ==================================================================
 *
 * A picture is [3, height, width] floats in [-1, 1], whatever it was in its file. Decoding and
 * encoding belong to the programs (see SHORTCUT_STB below); here is what a decoder leaves to do:
 * grey, alpha, 16 bits, EXIF orientation, scaling and cropping to a bucket, and reading folders of
 * pictures with captions.
 */

#include <dirent.h>
#include <strings.h>

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

/* A copy of n bytes of text as valid UTF-8: bytes that are not become U+FFFD, NUL a space; without
 * a byte order mark and white space at the ends. */
static char *sc__clean_text(const char *text, size_t n) {
    char *clean = (char *)sc__alloc(3 * n + 1, 1), *to = clean;
    const uint8_t *p = (const uint8_t *)text, *end = p + n;
    if (!clean) return NULL;
    if (n >= 3 && !memcmp(p, "\xef\xbb\xbf", 3)) p += 3;
    while (p < end && (isspace(*p) || !*p)) p++;
    while (end > p && (isspace(end[-1]) || !end[-1])) end--;
    while (p < end) {
        int more = *p < 0x80 ? 0 : *p < 0xe0 ? 1 : *p < 0xf0 ? 2 : 3; /* bytes that must follow */
        bool valid = end - p > more && (more == 0 || (*p >= 0xc2 && *p < 0xf5));
        for (int i = 1; valid && i <= more; i++) valid = (p[i] & 0xc0) == 0x80;
        if (valid && more >= 2) { /* overlong, a surrogate, or beyond U+10FFFF */
            int two = *p << 8 | p[1];
            valid = two >= (more == 2 ? 0xe0a0 : 0xf090) && two < 0xf490 &&
                    !(two >= 0xeda0 && two < 0xee00);
        }
        if (valid) for (int i = 0; i <= more; i++) *to++ = *p ? (char)*p : ' ', p++;
        else memcpy(to, "\xef\xbf\xbd", 3), to += 3, p++;
    }
    *to = 0;
    return clean;
}

/* Takes ownership of nothing; a NULL caption means that an error is already set. */
static bool sc__dataset_add(sc_dataset *d, const char *folder, const char *name, char *caption) {
    char *path = caption ? sc__join(folder, name) : NULL;
    bool grow = (d->count & (d->count - 1)) == 0; /* at powers of two */
    void *pairs = d->pairs;
    if (path && grow)
        pairs = SC_REALLOC(d->pairs, (size_t)(d->count ? 2 * d->count : 1) * sizeof *d->pairs);
    if (path && pairs) {
        d->pairs = (sc_pair *)pairs;
        d->pairs[d->count++] = (sc_pair){path, caption};
        return true;
    }
    if (path) sc__fail("%s: out of memory: list of %lld pictures", folder, (long long)d->count);
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

/* One file of a folder without metadata.jsonl: if it is a picture, its caption is in name.txt. */
static bool sc__dataset_file(sc_dataset *d, const char *folder, const char *name) {
    const char *dot = strrchr(name, '.');
    if (*name == '.' || !dot ||
        (strcasecmp(dot, ".png") && strcasecmp(dot, ".jpg") && strcasecmp(dot, ".jpeg")))
        return true;
    size_t stem = (size_t)(dot - name), length = 0;
    char *text_name = (char *)sc__alloc(stem + 5, 1), *path = NULL, *text = NULL;
    if (text_name) {
        memcpy(text_name, name, stem);
        memcpy(text_name + stem, ".txt", 5);
        path = sc__join(folder, text_name);
    }
    bool ok = path != NULL;
    if (ok && !sc__exists(path))
        ok = sc__fail("%s/%s has no caption: write one into %s (it may be empty)", folder, name,
                      path);
    ok = ok && (text = sc__read_file(path, &length)) &&
         sc__dataset_add(d, folder, name, sc__clean_text(text, length));
    SC_FREE(text);
    SC_FREE(path);
    SC_FREE(text_name);
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
        DIR *directory = opendir(folder);
        if (!directory) ok = sc__fail("%s: %s", folder, strerror(errno));
        for (struct dirent *e; ok && (e = readdir(directory));)
            ok = sc__dataset_file(d, folder, e->d_name);
        if (directory) closedir(directory);
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

/* ==== Pipeline: a whole model folder in diffusers' layout =====================================
 *
 * The parts of a FLUX folder that a picture needs: prompt -> text encoders -> transformer -> VAE.
 * The text encoders and the VAE are opened when they are first used, so that a training run whose
 * data is cached never loads them, and can be let go again.
 */

/* Numbers of the scheduler and the tokenizer that decide how the model is used. */
static bool sc__pipeline_settings(sc_pipeline *p) {
    char *scheduler = sc__join(p->folder, "scheduler/scheduler_config.json");
    char *tokenizer = sc__join(p->folder, "tokenizer_2/tokenizer_config.json");
    char *vae = sc__join(p->folder, "vae/config.json");
    sc_json *json = scheduler ? sc_json_load(scheduler) : NULL;
    bool dynamic = sc_json_bool(sc_json_get(json, "use_dynamic_shifting"), true), ok = json != NULL;
    p->shift = dynamic ? 0 : (float)sc_json_number(sc_json_get(json, "shift"), 1);
    sc_json_free(json);
    json = ok && tokenizer ? sc_json_load(tokenizer) : NULL;
    ok = ok && json;
    double length = sc_json_number(sc_json_get(json, "model_max_length"), 512);
    p->text_tokens = length >= 1 && length <= 512 ? (int)length : 512;
    sc_json_free(json);
    json = ok && vae ? sc_json_load(vae) : NULL;
    ok = ok && json;
    int64_t levels = sc_json_length(sc_json_get(json, "block_out_channels"));
    p->resolution = (int)sc_json_number(sc_json_get(json, "sample_size"), 1024);
    p->token_pixels = 2 << (levels > 0 && levels <= SC_VAE_LEVELS ? levels - 1 : 3); /* 2x2 latents of f x f pixels */
    sc_json_free(json);
    if (ok && (p->resolution < p->token_pixels || p->resolution > 1 << 14)) ok = sc__fail("%s: a wrong sample_size", vae);
    SC_FREE(scheduler);
    SC_FREE(tokenizer);
    SC_FREE(vae);
    return ok;
}

sc_pipeline *sc_pipeline_open(const sc_backend *backend, const char *folder, const sc_pipeline_options *o) {
    sc_pipeline *p = (sc_pipeline *)sc__alloc(1, sizeof *p);
    if (!p) return NULL;
    p->backend = backend;
    p->folder = sc__strdup(folder);
    char *own = sc__join(folder, "transformer");
    bool ok = p->folder && own && sc__pipeline_settings(p);
    if (ok) p->flux = sc_flux_open(backend, o->transformer ? o->transformer : own, o->widen || sc__small_file(own), o->random, o->seed);
    SC_FREE(own);
    ok = ok && p->flux && (p->tape = sc_tape_new(backend));
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

bool sc_pipeline_text(sc_pipeline *p, const char *prompt, float *context, float *pooled) {
    if (!p->text && !(p->text = sc_text_encoders_open(p->backend, p->folder))) return false;
    return sc_text_encode(p->text, prompt, p->text_tokens, context, pooled);
}

static bool sc__pipeline_vae(sc_pipeline *p) {
    char *folder = p->vae ? NULL : sc__join(p->folder, "vae");
    if (folder) p->vae = sc_vae_open(p->backend, folder, sc__small_file(folder));
    SC_FREE(folder);
    return p->vae != NULL;
}

enum { SC__VAE_TILE = 1024 }; /* pixels; larger pictures go through the VAE in tiles (6 GiB each) */

bool sc_pipeline_encode(sc_pipeline *p, const float *rgb, int width, int height, float *mean, float *std) {
    if (!sc__pipeline_vae(p)) return false;
    int64_t channels = sc_vae_config_of(p->vae)->latent_channels, f = sc_vae_factor(p->vae);
    int64_t h = height / f, w = width / f, n = channels * h * w;
    float *latents = (float *)sc__alloc((size_t)(2 * n), sizeof *latents), *deviation = latents + n;
    bool ok = latents && sc_vae_encode(p->vae, 1, height, width, rgb, latents, deviation, SC__VAE_TILE);
    if (ok) {
        sc_vae_normalise(p->vae, n, latents, deviation);
        sc_pack_latents(1, channels, h, w, latents, mean);
        sc_pack_latents(1, channels, h, w, deviation, std);
    }
    SC_FREE(latents);
    return ok;
}

bool sc_pipeline_decode(sc_pipeline *p, const float *tokens, int batch, int h, int w, float *rgb) {
    if (!sc__pipeline_vae(p)) return false;
    int64_t channels = sc_vae_config_of(p->vae)->latent_channels, n = batch * channels * 4 * h * w;
    if (channels * 4 != p->flux->config.out_channels)
        return sc__fail("%s: the VAE has %lld channels, the transformer makes tokens of %d", p->folder, (long long)channels, p->flux->config.out_channels);
    float *latents = (float *)sc__alloc((size_t)n, sizeof *latents);
    if (!latents) return false;
    sc_unpack_latents(batch, channels, 2 * h, 2 * w, tokens, latents);
    sc_vae_unnormalise(p->vae, n, latents);
    bool ok = sc_vae_decode(p->vae, batch, 2 * h, 2 * w, latents, rgb, SC__VAE_TILE);
    SC_FREE(latents);
    return ok;
}

#ifdef SHORTCUT_STB
/* ==== PNG and JPEG files ======================================================================
 *
 * For programs that define SHORTCUT_STB: stb decodes and encodes; around it, size limits, the
 * checks that stb does not make (a truncated JPEG, a PNG's checksums), EXIF orientation, and the
 * `parameters` text chunk that picture tools look for.
 */

#ifdef __has_include
#if !__has_include(<stb/stb_image.h>) || !__has_include(<stb/stb_image_write.h>)
#error "stb_image.h not found: install the package libstb-dev"
#endif
#endif
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_NO_STDIO
#include <stb/stb_image.h>
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBI_WRITE_NO_STDIO
#include <stb/stb_image_write.h>

#define SC__MAX_PIXELS 64000000

/* The CRC of PNG chunks: polynomial 0xedb88320, bits reflected. */
static uint32_t sc__crc(const uint8_t *p, size_t n) {
    uint32_t table[256], crc = 0xffffffffu;
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++)
            table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320u : 0);
    }
    while (n--) crc = crc >> 8 ^ table[(crc ^ *p++) & 0xff];
    return ~crc;
}

/* JPEG: a walk over its markers to the end marker, and the Huffman tables, which old versions of
 * stb trust to have at most 256 codes. Between markers are 0xff 0 and restarts (0xd0 to 0xd7). */
static const char *sc__jpeg_damage(const uint8_t *bytes, size_t size) {
    size_t at = 2, n;
    while (at + 2 <= size) {
        uint8_t marker = bytes[at] == 0xff ? bytes[at + 1] : 0;
        if (marker == 0xd9) return NULL;
        if (marker == 0 || marker == 0xff || (marker & 0xf8) == 0xd0) {
            at++;
            continue;
        }
        n = size - at < 4 ? 0 : sc__bytes(bytes + at + 2, 2, true);
        if (n < 2 || n > size - at - 2) break;
        size_t end = at + n + 2, codes = 0;
        for (size_t table = at + 4; marker == 0xc4 && table < end; table += 17 + codes) {
            codes = 0;
            for (size_t i = 1; i <= 16 && table + 17 <= end; i++) codes += bytes[table + i];
            if (codes > 256 || table + 17 + codes > end) return "damaged JPEG (Huffman table)";
        }
        at = end;
    }
    return "truncated JPEG";
}

/* What is wrong with the container; NULL: nothing. */
static const char *sc__picture_damage(const uint8_t *bytes, size_t size) {
    if (size > 8 && !memcmp(bytes, "\x89PNG\r\n\x1a\n", 8)) {
        size_t n;
        for (size_t at = 8; size - at >= 12; at += n + 12) {
            n = sc__bytes(bytes + at, 4, true);
            if (n > size - at - 12) break;
            if (sc__crc(bytes + at + 4, n + 4) != sc__bytes(bytes + at + 8 + n, 4, true))
                return "damaged PNG (wrong checksum)";
            if (!memcmp(bytes + at + 4, "IEND", 4)) return NULL;
        }
        return "truncated PNG";
    }
    if (size < 4 || bytes[0] != 0xff || bytes[1] != 0xd8) return "not a PNG or JPEG picture";
    return sc__jpeg_damage(bytes, size);
}

bool sc_picture_load(sc_picture *p, const char *path) {
    size_t size = 0;
    int width, height, channels;
    char *file = sc__read_file(path, &size);
    const uint8_t *bytes = (const uint8_t *)file;
    void *pixels = NULL;
    *p = (sc_picture){0};
    if (!file) return false;
    const char *damage = sc__picture_damage(bytes, size);
    bool ok = !damage || sc__fail("%s: %s", path, damage);
    if (ok && stbi_info_from_memory(bytes, (int)size, &width, &height, &channels) &&
        (int64_t)width * height > SC__MAX_PIXELS)
        ok = sc__fail("%s: %d x %d pixels; at most %d million are supported", path, width, height,
                      SC__MAX_PIXELS / 1000000);
    bool deep = ok && stbi_is_16_bit_from_memory(bytes, (int)size);
    if (ok && deep)
        pixels = stbi_load_16_from_memory(bytes, (int)size, &width, &height, &channels, 0);
    if (ok && !deep)
        pixels = stbi_load_from_memory(bytes, (int)size, &width, &height, &channels, 0);
    if (ok && !pixels) ok = sc__fail("%s: cannot decode: %s", path, stbi_failure_reason());
    ok = ok && sc_picture_from_pixels(p, pixels, width, height, channels, deep ? 16 : 8,
                                      sc_exif_orientation(bytes, size));
    stbi_image_free(pixels);
    SC_FREE(file);
    return ok;
}

/* ---- Writing ---- */

typedef struct sc__png { sc__writer writer; const char *parameters; bool ok; } sc__png;

/* A chunk "parameters": tEXt for ASCII, iTXt (UTF-8, not compressed) for anything else. */
static bool sc__png_text(sc__writer *w, const char *text) {
    size_t n = strlen(text), head = 8 + 11;
    bool ascii = true;
    for (size_t i = 0; i < n; i++) ascii = ascii && (uint8_t)text[i] < 0x80;
    uint8_t *chunk = (uint8_t *)sc__alloc(n + 64, 1);
    if (!chunk) return false;
    memcpy(chunk + 4, ascii ? "tEXtparameters" : "iTXtparameters", 15);
    if (!ascii) head += 4; /* no compression, its method, no language, no translated keyword */
    memcpy(chunk + head, text, n);
    uint32_t length = (uint32_t)(head - 8 + n), crc = sc__crc(chunk + 4, head - 4 + n);
    for (int i = 0; i < 4; i++) {
        chunk[i] = (uint8_t)(length >> (24 - 8 * i));
        chunk[head + n + (size_t)i] = (uint8_t)(crc >> (24 - 8 * i));
    }
    bool ok = sc__write_bytes(w, chunk, head + n + 4);
    SC_FREE(chunk);
    return ok;
}

/* stb hands over the whole file; the text goes behind the signature and IHDR (33 bytes). */
static void sc__png_bytes(void *context, void *data, int size) {
    sc__png *png = (sc__png *)context;
    png->ok = size > 33 && sc__write_bytes(&png->writer, data, 33) &&
              (!png->parameters || sc__png_text(&png->writer, png->parameters)) &&
              sc__write_bytes(&png->writer, (char *)data + 33, (size_t)size - 33);
}

bool sc_picture_save(const sc_picture *p, const char *path, const char *parameters) {
    sc__png png = {.parameters = parameters};
    uint8_t *pixels = (uint8_t *)sc__alloc((size_t)p->width * (size_t)p->height, 3);
    if (!pixels) return false;
    sc_picture_to_pixels(p, pixels);
    bool ok = sc__write_begin(&png.writer, path);
    if (ok) {
        sc__fail("%s: out of memory", path); /* unless something else fails */
        stbi_write_png_to_func(sc__png_bytes, &png, p->width, p->height, 3, pixels, 3 * p->width);
        ok = sc__write_end(&png.writer, png.ok);
    }
    SC_FREE(pixels);
    return ok;
}
#endif /* SHORTCUT_STB */

#ifdef SHORTCUT_TOOLS
/* ==== Tools for command-line programs ======================================================== */

#include <signal.h>
#include <time.h>

void sc_start(char **argv) {
    if (getenv("OMP_WAIT_POLICY")) return;
    setenv("OMP_WAIT_POLICY", "passive", 1);
    execv("/proc/self/exe", argv); /* where that fails, go on as we are */
}

volatile int sc_interrupted;

static void sc__on_interrupt(int sig) {
    sc_interrupted = 1;
    signal(sig, SIG_DFL);
}
void sc_catch_interrupt(void) { signal(SIGINT, sc__on_interrupt); signal(SIGTERM, sc__on_interrupt); }

double sc_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int sc_die(void) {
    fprintf(stderr, "error: %s\n", sc_error());
    return 1;
}

const sc_backend *sc_device(const char *name) {
    if (!strcmp(name, "cpu")) return sc_cpu();
#ifdef SHORTCUT_CUDA
    const sc_backend *cuda = strcmp(name, "auto") && strcmp(name, "cuda") ? NULL : sc_cuda();
    if (cuda) return cuda;
    if (!strcmp(name, "cuda")) return NULL; /* error already set */
#endif
    if (!strcmp(name, "auto")) return sc_cpu();
    if (!strcmp(name, "cuda")) sc__fail("this program was built without CUDA: run make where nvcc is installed");
    else sc__fail("--device must be auto, cpu or cuda, not '%s'", name);
    return NULL;
}

static const char *sc__clock(double seconds, char text[32]) {
    long s = seconds < 0 ? 0 : (long)(seconds + 0.5);
    if (s < 3600) snprintf(text, 32, "%ld:%02ld", s / 60, s % 60);
    else snprintf(text, 32, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    return text;
}

void sc_progress(const char *label, int64_t done, int64_t total, double started, const char *extra) {
    static double last;
    char left[32], spent[32];
    double now = sc_seconds(), elapsed = now - started;
    bool terminal = isatty(2), end = done >= total;
    if (!end && now - last < (terminal ? 0.2 : 10)) return;
    if (end && elapsed < 2 && !terminal) return;
    last = now;
    fprintf(stderr, "%s%s %lld/%lld%s%s, %s", terminal ? "\r" : "", label, (long long)done, (long long)total,
            extra ? ", " : "", extra ? extra : "", sc__clock(elapsed, spent));
    if (!end && done > 0)
        fprintf(stderr, ", %s left", sc__clock(elapsed / (double)done * (double)(total - done), left));
    fprintf(stderr, "%s%s", terminal ? "\033[K" : "", !terminal || end ? "\n" : "");
}

/* ---- Options ---- */

/* Parses up to `limit` numbers separated by commas; false if it is anything else. */
static bool sc__numbers(const char *text, double *values, int limit, int *count) {
    char *end;
    for (*count = 0; *count < limit; text = end + 1) {
        values[*count] = strtod(text, &end);
        if (end == text || !isfinite(values[*count])) return false;
        ++*count;
        if (!*end) return true;
        if (*end != ',') return false;
    }
    return false;
}

static bool sc__set_option(const sc_option *o, const char *text) {
    double v[8];
    int count = 0;
    if (o->kind == SC_STRING) return *(const char **)o->value = text, true;
    if (o->kind == SC_STRINGS) {
        const char **list = (const char **)o->value;
        for (int i = 0; i < 8; i++)
            if (!list[i]) return list[i] = text, true;
        return sc__fail("%s can be given at most 8 times", o->name);
    }
    if (!sc__numbers(text, v, o->kind == SC_INTS ? 7 : o->kind == SC_RANGE ? 2 : 1, &count))
        return sc__fail("%s takes %s, not '%s'", o->name, o->argument, text);
    for (int i = 0; i < count; i++)
        if ((o->kind == SC_INT || o->kind == SC_INTS) && (v[i] != floor(v[i]) || fabs(v[i]) > INT_MAX))
            return sc__fail("%s takes whole numbers, not '%s'", o->name, text);
    switch (o->kind) {
    case SC_INT: *(int *)o->value = (int)v[0]; break;
    case SC_FLOAT: *(float *)o->value = (float)v[0]; break;
    case SC_RANGE: ((float *)o->value)[0] = (float)v[0], ((float *)o->value)[1] = (float)v[count - 1]; break;
    default: for (int i = 0; i < 8; i++) ((int *)o->value)[i] = i < count ? (int)v[i] : 0;
    }
    return true;
}

static void sc__option_text(const sc_option *o, char *text, size_t size) {
    int used = 0;
    text[0] = 0;
    switch (o->kind) {
    case SC_FLAG: snprintf(text, size, "%s", *(bool *)o->value ? "yes" : "no"); break;
    case SC_INT: snprintf(text, size, "%d", *(int *)o->value); break;
    case SC_FLOAT: snprintf(text, size, "%g", *(float *)o->value); break;
    case SC_RANGE: snprintf(text, size, "%g,%g", ((float *)o->value)[0], ((float *)o->value)[1]); break;
    case SC_STRING: snprintf(text, size, "%s", *(const char **)o->value ? *(const char **)o->value : ""); break;
    case SC_INTS:
        for (const int *v = (int *)o->value; *v && used < (int)size; v++)
            used += snprintf(text + used, size - (size_t)used, "%s%d", used ? "," : "", *v);
        break;
    case SC_STRINGS: break;
    }
}

void sc_print_options(const sc_option *options, int count) {
    for (int i = 0; i < count; i++) {
        char text[256];
        if (!options[i].name || options[i].kind == SC_STRINGS) continue;
        sc__option_text(&options[i], text, sizeof text);
        if (text[0]) printf(" %s %s", options[i].name, text);
    }
    printf("\n");
}

static void sc__help(const char *usage, const sc_option *options, int count) {
    printf("%s\n", usage);
    for (int i = 0; i < count; i++) {
        char left[64], value[256];
        if (!options[i].name) {
            printf("\n%s\n", options[i].help);
            continue;
        }
        snprintf(left, sizeof left, "%s %s", options[i].name, options[i].argument ? options[i].argument : "");
        sc__option_text(&options[i], value, sizeof value);
        bool show = options[i].kind != SC_FLAG && value[0];
        printf("  %-26s %s%s%s%s\n", left, options[i].help, show ? " [" : "", show ? value : "", show ? "]" : "");
    }
}

int sc_parse(const char *usage, const sc_option *options, int count, int argc, char **argv, const char **positional,
             int limit) {
    int found = 0;
    bool literal = false; /* after "--" */
    for (int i = 1; i < argc; i++) {
        const sc_option *o = NULL;
        if (!literal && !strcmp(argv[i], "--")) { literal = true; continue; }
        if (literal || strncmp(argv[i], "--", 2)) {
            if (found == limit) {
                fprintf(stderr, "error: unexpected argument '%s' (see %s --help)\n", argv[i], argv[0]);
                exit(2);
            }
            positional[found++] = argv[i];
            continue;
        }
        if (!strcmp(argv[i], "--help")) {
            sc__help(usage, options, count);
            exit(0);
        }
        for (int j = 0; j < count; j++)
            if (options[j].name && !strcmp(options[j].name, argv[i])) o = &options[j];
        bool ok = o != NULL;
        if (!o) sc__fail("unknown option '%s'", argv[i]);
        else if (o->kind == SC_FLAG) *(bool *)o->value = true;
        else if (i + 1 == argc) ok = sc__fail("%s needs a value: %s", o->name, o->argument);
        else ok = sc__set_option(o, argv[++i]);
        if (!ok) {
            fprintf(stderr, "error: %s (see %s --help)\n", sc_error(), argv[0]);
            exit(2);
        }
    }
    return found;
}

bool sc_parse_json(const sc_option *options, int count, const char *path) {
    sc_json *json = sc_json_load(path);
    bool ok = json != NULL;
    for (int64_t i = 0; ok && i < sc_json_length(json); i++) {
        const sc_json *value = sc_json_value(json, i);
        const char *key = sc_json_key(json, i), *string = sc_json_string(value, NULL);
        char text[128];
        const sc_option *o = NULL;
        for (int j = 0; j < count; j++)
            if (options[j].name && !strcmp(options[j].name + 2, key) && options[j].kind != SC_STRING) o = &options[j];
        if (!string) snprintf(text, sizeof text, "%.9g", sc_json_number(value, NAN));
        if (!o) ok = sc__fail("%s: there is no option '%s'", path, key);
        else ok = sc__set_option(o, string ? string : text) || sc__fail("%s: '%s' has a wrong value", path, key);
    }
    sc_json_free(json);
    return ok;
}
#endif

#endif /* SHORTCUT_IMPLEMENTATION */
