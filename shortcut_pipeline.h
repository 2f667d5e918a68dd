/* shortcut_pipeline.h: from prompts and picture files to the arrays shortcut.h works on, and back.
 *
 * shortcut.h is the transformer, its training and its sampler; it sees latents and text vectors as
 * floats. Here is what surrounds it in a FLUX.1 model folder: the VAE (pictures <-> latents),
 * CLIP's and T5's tokenizers (prompts -> ids) and encoders (ids -> vectors), pictures and data
 * sets, and the pipeline that opens all of it. Include this instead of shortcut.h, in the same
 * manner: in one .c file #define SHORTCUT_IMPLEMENTATION first. It needs nothing more. A picture in
 * three steps (where a result is NULL or false, sc_error() says why):
 *
 *     sc_pipeline *p = sc_pipeline_open(sc_cpu(), "data/tiny-flux", &(sc_pipeline_options){0});
 *     const sc_flux_config *c = sc_flux_config_of(p->flux);
 *     sc_lora_load(p->flux, "lora.safetensors", 1, &(sc_lora_report){0});
 *     int h = p->resolution / p->token_pixels;                          // a grid of h x h tokens
 *     float *context = malloc(sizeof(float) * p->text_tokens * c->text_channels);
 *     float *pooled = malloc(sizeof(float) * c->pooled_channels);
 *     float *latents = malloc(sizeof(float) * h * h * c->in_channels);
 *     float *rgb = malloc(sizeof(float) * 3 * p->resolution * p->resolution);
 *     sc_rng rng = {1};                                                 // the seed
 *     sc_normal(&rng, latents, h * h * c->in_channels);
 *     sc_pipeline_text(p, "a red apple", context, pooled);
 *     sc_sampling s = {.steps = 3, .shift = p->shift, .guidance = 2, .h = h, .w = h};
 *     sc_sample(p->flux, p->tape, &s, 1, p->text_tokens, context, pooled, latents);
 *     sc_pipeline_decode(p, latents, 1, h, h, rgb);                     // [3, 128, 128] in [-1, 1]
 *     sc_pipeline_close(p);
 *
 * CONTENTS: VAE; Unicode; tokenizers; text encoders; pictures and data sets; pipeline.
 *
 * EASY TO GET WRONG
 *   - CLIP's pooled vector is taken where the highest id first stands (the eos_token_id in its
 *     config.json is wrong); T5's padding is not masked.
 *   - Latents are (z - shift_factor) * scaling_factor, then packed 2x2: channel, row, column.
 */
#ifndef SHORTCUT_PIPELINE_H
#define SHORTCUT_PIPELINE_H
#include "shortcut.h"

#ifdef __cplusplus
extern "C" {
#endif

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
#endif /* SHORTCUT_PIPELINE_H */

#ifdef SHORTCUT_IMPLEMENTATION

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
    struct stat s;
    char *folder = sc__strdup(model), *slash = folder ? strrchr(folder, '/') : NULL;
    if (!folder || stat(model, &s) || S_ISDIR(s.st_mode)) return folder;
    if (slash) *slash = 0;
    else snprintf(folder, strlen(folder) + 1, ".");
    return folder;
}

/* Whether the safetensors file at `path` has this part; no matter if it cannot be read. */
static bool sc__file_has(const char *path, sc__part_kind part) {
    struct stat s;
    const sc__alias *alias;
    if (stat(path, &s) || !S_ISREG(s.st_mode)) return false;
    sc_file *file = sc_file_open(path);
    const char *probe = sc__parts[part].probe;
    bool has = file && sc__find_as(file, sc__weight_prefixes, probe, "", 1, &alias);
    sc_file_close(file);
    return has;
}

/* The only file in `folder` that has this part. */
static char *sc__part_file(const char *folder, sc__part_kind part) {
    char *found = NULL;
    bool several = false;
    DIR *list = opendir(folder);
    if (!list) return sc__fail("%s: %s", folder, strerror(errno)), NULL;
    for (struct dirent *entry; !several && (entry = readdir(list));) {
        char *path =
            sc__matches(entry->d_name, "*.safetensors") ? sc__join(folder, entry->d_name) : NULL;
        bool has = path && sc__file_has(path, part);
        several = has && found;
        if (several)
            sc__fail("%s and %s both hold a %s: leave one of them in this folder", found, path,
                     sc__parts[part].folder);
        if (has && !found) found = path;
        else SC_FREE(path);
    }
    closedir(list);
    if (!found)
        sc__fail("%s: no %s here: neither a folder of that name with weights nor a file such as %s",
                 folder, sc__parts[part].folder, sc__parts[part].file);
    if (found && !several) return found;
    SC_FREE(found);
    return NULL;
}

/* Where a part of a model is: its folder in diffusers' layout; the model itself, where that is a
 * file that has the part; or a file in the folder. NULL with an error that says what to put there.
 */
static char *sc__part_path(const char *model, sc__part_kind part) {
    if (!sc__exists(model)) return sc__fail("%s: No such file or directory", model), NULL;
    if (sc__file_has(model, part)) return sc__strdup(model);
    char *base = sc__model_folder(model);
    char *folder = base ? sc__join(base, sc__parts[part].folder) : NULL;
    char *weights = folder && sc__exists(folder) ? sc__weights_in(folder) : NULL;
    char *found = weights ? sc__strdup(folder) : folder ? sc__part_file(base, part) : NULL;
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
    bool is_file = stat(folder, &s) == 0 && S_ISREG(s.st_mode);
    char *path = is_file ? sc__strdup(folder) : sc__weights_in(folder);
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
    sc_tape *tapes[3];              /* two take turns; the third is for what a step needs once */
    int turn;                       /* the tape that holds the current activations */
};

const sc_vae_config *sc_vae_config_of(const sc_vae *v) { return &v->config; }
int sc_vae_factor(const sc_vae *v) { return 1 << (v->config.levels - 1); }

/* ---- Opening ---- */

/* Levels of a file without config.json, by their widths; other fields, in sc__vae_read_config. */
static void sc__vae_read_levels(sc_vae_config *c, const sc_net *net) {
    char name[SC_MAX_NAME];
    for (c->levels = 0; c->levels < SC_VAE_LEVELS; c->levels++) {
        snprintf(name, sizeof name, "encoder.down_blocks.%d.resnets.0.conv1.weight", c->levels);
        if (!(c->channels[c->levels] = sc__side(net, name, 0, 0))) break;
    }
}

static bool sc__vae_read_config(sc_vae_config *c, const sc_net *net, const sc_json *json,
                                const char *path) {
    const char *class_name = sc_json_string(sc_json_get(json, "_class_name"), "AutoencoderKL");
    const char *activation = sc_json_string(sc_json_get(json, "act_fn"), "silu");
    const sc_json *channels = sc_json_get(json, "block_out_channels");
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
    if (json)
        c->levels = sc_json_length(channels) > SC_VAE_LEVELS ? 0 : (int)sc_json_length(channels);
    else sc__vae_read_levels(c, net);
    if (c->levels < 1)
        return sc__fail("%s: block_out_channels must list 1 to %d levels", path, SC_VAE_LEVELS);
    if (c->layers >= SC_VAE_LAYERS || c->latent_channels > 1024)
        return sc__fail("%s: layers_per_block may be up to %d, latent_channels up to 1024", path,
                        SC_VAE_LAYERS - 1);
    for (int i = 0; i < c->levels; i++) {
        double n = sc_json_number(sc_json_at(channels, i), json ? 0 : c->channels[i]);
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
    for (int i = 0; ok && backend && i < 3; i++) ok = (v->tapes[i] = sc_tape_new(backend)) != NULL;
    ok = ok && sc__vae_weights(v, &v->encoder, true) && sc__vae_weights(v, &v->decoder, false) &&
         sc_net_load(v->net);
    if (ok) return v;
    sc_vae_close(v);
    return NULL;
}

void sc_vae_close(sc_vae *v) {
    if (!v) return;
    for (int i = 0; i < 3; i++)
        if (v->tapes[i]) sc_tape_free(v->tapes[i]);
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

/* The tape for a tensor that only the next operation reads: large pictures are bound by memory. */
static sc_tape *sc__vae_scratch(sc_vae *v) {
    sc_tape_reset(v->tapes[2]);
    return v->tapes[2];
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
    sc_tensor *n = sc__vae_norm(v, sc__vae_scratch(v), x, &r->norm1, true);
    sc_tensor *h = sc__vae_conv(t, n, &r->conv1);
    n = sc__vae_norm(v, sc__vae_scratch(v), h, &r->norm2, true);
    h = sc__vae_conv(t, n, &r->conv2);
    if (r->shortcut.weight) x = sc__vae_conv(sc__vae_scratch(v), x, &r->shortcut);
    if (!x || !h) return NULL;
    int64_t count = sc_count(h);
    t->be->copy_block(h->data, count, x->data, count, 1, count, h->dtype, true); /* h += x */
    return h;
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
        else x = sc__vae_conv(t, sc_upsample(sc__vae_scratch(v), x), resample);
    }
    if (encoder) x = sc__vae_middle(v, x, half);
    t = sc__vae_tape(v);
    x = sc__vae_norm(v, sc__vae_scratch(v), x, &half->norm_out, true);
    x = sc__vae_conv(t, x, &half->conv_out);
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

/* ==== Unicode =================================================================================
 *
 * What the tokenizers ask of characters: which are letters or numbers, their lower case, canonical
 * composition (NFC) and graphemes (what a reader takes for one character). The tables were read off
 * the library whose token ids ours have to equal, and are packed: a number is a few digits of base
 * 31 and a last one of base 60, printed from '#' on without the backslash.
 */

enum { SC__LETTER = 1, SC__DIGIT = 2 };
enum { SC__EXTEND = 4, SC__SPACING = 8, SC__CONTROL = 16, SC__PREPEND = 32, SC__PICTURE = 64,
       SC__CONSONANT = 128, SC__LINKER = 256 };

/* Packed by test/make_unicode_tables.py, as tokenizers 0.22.2 has them. */
static const char sc__word_table[] =
    "S5'+U%*U%S#%+%'%#%'#'$#%%''%O%%a#%%o1%(9%2+%+&%b-+%%%%&)%%#%*&%$%%%&%$G%%bO%%dG%,eA%%a1%&#%*"
    "a7%a/W%()%Qa;%95'(%%%c3%%#%3%%+%%$5'$'%&#%4&%$[%Ab[%/#%25'$a'%-%%(#%)M%(#%-#%'#%;S%+7%)Q%%-%"
    "5a9%_aQ%'#%6#%+5%(5'%A%(1%&%%&M%%/%%#%')%'#%4#%1%%%'%(5'$%%&-'&#%,-%(%%&M%%/%%%%%%%%%%C)%%#%"
    "+5'&'%43%%'%%M%%/%%%%%+%'#%6#%3%%(5'-#%/1%&%%&M%%/%%%%%+%'#%B%%%'%(5'%#%$-'/&%$+%''%%)%'%%%&"
    "%$#%'%%''%'9%:#%9;'61%%'%%O%%A%'#%>'%&#%&%%(5',/'%#%(1%%'%%O%%5%%+%'#%C%%%%%(5'%%%53%%'%%a7%"
    "&#%4#%)'%%/'$'%(G'%-%)E%'Q%%3%%#%&/%C5'5aE%%%%0/%-5'K%%%&%$)%%Q%%&%$3%%%%-#%&+%%#%-5'&)%D#%C"
    "I'01%%a-%?+%a[a;%8#%$5'*-%()%'#%'%%+'%(;%0#%%5'*a1%%#%)#%&a;%%k'%%)%&/%%&%$'%&a7%%)%&a'%%)%&"
    "/%%&%$'%&?%%aW%%)%&b/%2I''A%4bU%&-%'tI%&C%%U%)b?%'''$1%+E%1G%2E%2;%%'%3aM%G#%(#%'5'*5':5'*b["
    "%++%&a)%%#%)b5%.a#%K5'$^%&+%/a=%(U%*7'IO%-aO%O5'*5'1#%aEaC%51%'5'M^%1%%$5'$a=%>a-%@5'''%$5'$"
    "a-%&7%)a;%&'%M)%%-%%%%'#%)f9%a(i1%&-%&a1%&-%&1%%*%$^%&aO%%/%%#%''%%/%')%&-%(;%)'%%/%a[#'$#%&"
    "-')#%$5'*;%aM#%(#%&5%%#%'+%**%$'%%7%&)%)+%(#%%aK'$%%$+'l*a^'a6M'jB^'rXgG%*)%'%%-#'&a1%%#%)#%"
    "&aU%+#%4O%-/%%/%%/%%/%%/%%/%%/%%/%a8#%gU%%$#'=3'++%&''$%%(bU%*'%%b^%%)%)a;%%c)%')'.a%%TA%D5'"
    "B1'%?'D5'K?'e8gbM%a(wyC%a+aA%&h[%'A%$5'$%%8aC%4a#%&b5%$5'K3%&c;%&b/%&%%%&%$/%9A%%'%%)%%O%1-'"
    ".aM%2aI%@5'<-%'&%$#%%5'$Y%.O%=[%+aC%@#%$5'*+%%5%$5'$+%%a7%;'%%1%(5'*O%'#%'aI%%#%'%%&+%&&%<'%"
    "&7%+'%0-%&-%&-%-/%%/%%a;%%=%*cS%15'*l`9%0O%(aG%dpXl-%&cA%J/%0+%)&%$3%%;%%+%%&%$&%$&%$cC%El'%"
    "6b)%&aQ%L9%a]+%%d?%75'+U%*U%/b[%'-%&-%&-%&'%G9%%U%%G%%%%%?%&=%Fd'%0a?'0aW'5%'d([%'aG%4W'(a%%"
    "$)'-I%$#'$1%$#')a1%.^%&a-%(1%%+'Ne1%&5'*a-%(a-%(a5%,aM%07%%?%%/%%%%%7%%?%%/%%%%'aM%0j7%-M%.1"
    "%<-%%a9%%3%a--%&&%$a;%%%%'#%&O%&1'$O%&/'$a#%,3'TG%%%%)+'$M%$-'(U%a.aU%(%'$%%$A'&aA'$#%3)%%'%"
    "%[%.3';[%$%'%[%$''D1%%Y%*+'4aQ%.M%&1'$G%)1'$E%;/'a8b;%[aK%1aK%+-'$a-%05'*5'$Y%-O%cJa#'%a9%*%"
    "%4'%a#[%$5'$#%,M%/)'?E%RK%$/'8O%0aO%>^'%%%&#%1a?%DS%+5'-a-%35'(#%&#%,a+%'#%0aE%2)%/5'$&%(I'/"
    "E%%S%7%%a'/%%&%$'%%?%%5%+aC%55'/1%&%%&M%%/%%%%%+%'#%6#%0+%B5%%#%&&%$a/%%#%=&%PaO%6)%)5')'%Ba"
    "E%8%%%#%,5'bRaC%M)%HaE%8#%/5'Ja;%1#%+5'*I'@W%99'(/%c)a=%a]b)%$G'01%&#%&1%%%%%Q%3&%25'a.1%&a3"
    "%4&%@#%.a5%+#%9#%/aA%7#%6b;%c7a'%35'*3%%a/%5#%3[')^%aX/%%%%%a1%9#%-5'*-%%%%%a%%2#%+5'e.G%3&%"
    "$9%%a)%@5'a>#%3K'O~M%aNcK'5fA%al]c/%3adM%5-%=di+%)s;%cu%^%65'|Zr[%+a#%%5'*bG%%5'*^%6aE%4)%05"
    "'%/'%K%)G%g0a?%'5'c6b)%$O'aQb?%)#%a*;%a(%%%#%@frA%,aj1%M5%dx[)%%/%%%%%iK%3#%A'%&#%2)%,m-%ag@"
    "cC%);%'3%+5%bgN5'xJI'0I'aTS'b3bS%%b7%%%%&#%&%%&)%%9%%&%$-%%b+%%)%&1%%/%%Y%%)%%+%%#%'/%%k5%&S"
    "%%S%%a#%%S%%a#%%S%%a#%%S%%a#%%S%%1%&aI'}Xa#%*-%d9b%%b>a?%./%&5'(#%e9^%6a=%(5'gVY%(5'cF^%&#%$"
    "5'h)/%%)%%%%%?%%fC%&3'Tb1%+#%(5'm/a['%''%)'a4a?'%?'c2)%%W%%%%%#%&&%$3%%)%%&%*#%(*%$%%%%%%#%&"
    ".%$&%&)%%/%%)%%)%%&%$3%%C%)'%%+%%C%iL;'ao?5'q.an|^%Ddn=%*g9%&ff%%2ha'%3tM%aj*r%%y*eiG%)doM%";
static const char sc__grapheme_table[] =
    "$a#CaGa'C-#b+'#C$#b+iYcM+dG/+d;a?+%&+$&+$&+]-iG.7+%#CRK+4#+aM/+$#iG%-+&%+%)+E#iG%#+BW+aC7+_3"
    "+-#+<)+%3+%'+%++O'+X%iG)3+NQ+$#iG$a%+$#35a/d3$#+$#3$#+%'3$1+$)3$#hK$%3%/+$1d3&%+81d3%#+$%35I"
    "d3%/d3%#d3')d3&&+$%3$)+&%3&%3$#hK-#+(%d3%#d3&%+0%d30#+&%+$#3]#+%'3$%+(%+&'+'#+B%+'#+/%+$#35I"
    "d3%/d3%%d3%+d3&#+%'3$++%%+$&3$#3$#hK8%+9#d3$-+%#+$%35Id3%/d3%%d3%+d3&&+$#+$#3$)+&%3&%3$#hK+'"
    "+(%d3%#d3&%+1#d34#+a##+$#3$#+$%3''3%'3$#+-#+L#+$'3$#+4Id3%Ad3&&+$%+$)3%'+%'+$#hK+%+%'d3+%+A#"
    "+$%3]#+%#3$%+$#3$#+$%3%'+%)++%+/%+3#30%+$%35a1d3$%+%#+$%3$)+%'3%'3$#hK$#iG,#+.%+A#+$%3a.#+(#"
    "+$%3$'+%#+%/3$#+6%3a%#+%#3$/+01+aJ#+%#3$3+//+a1%+?(+(%3U=+$#3$++%%+)7+%a-+-#+aN)+$#3$-+%%+$%"
    "3$%+;%3$%+('+4)+1#+%#3$%+*#+3#+kO'+oR)+@'+A%+B%+a(%+$#3$/+$13$#+$%3$7+-#+Q'+$#C$#+a^%+F#+a_'"
    "+$)3$%+$'3(%3$#+$-3$'+cK%+$%3$#+^#3$#+$#3$/+%&+&1+$-3$5+&#+Ta#+U)+$#3S5+$)3$'+J3+0%+$#3B#3$)"
    "+$%3$-+]#+$#3$%+$'3$#+$#3$++T13$1+$%3$%+bD'+%;+$#3$/+(#+*#+&#3$%+c6b)+hO#C$#+$#3$%C</C1#b+0#"
    "b+:ACaHa'+U#b+:#b+aB-b+3%b+f+%b+0#b+aG#b+a.#b+=7b+('b+c7#b+cW%b+.#b+-#b+_)b+%-b+%9b+%cQb+.cY"
    "b+&7b+%&b+*#b+'#b+*#b+.%b+3#b+&#b+(&b+('b+%#b+/+b+Q'b+-#b+2#b+2#b+f0%b+gO'b+7%b+W#b+(#b+fU'+"
    "b9#+aHa%+i2-+$#b+0#b+aC%+h@&b+o}1)+%5+D%+a8%+dD#+'#+(#+;%3$%+$#3(#+a;%3VA3$%+>E+1#+J1+=7+$#3"
    "$#+P'+$#3S#+$%3$)+$%3$%+$%3$#+H#+a+-+$%3$%+$%3$%+0#+,#+$#3R#+W&+$%+&%+)%+%#+M#3$%+$%3)#3$#+c"
    "]%3$#+$%3$#+$%3%#3$#+j{X#+l5A+4A+c?#CbJ%+a89ChE#+cR#+bA++{V'+%%+))+L'+(#+bQ%+iE)+a)++e5%+a7)"
    "+a.7+U)+b&#3$#+$#3Y?+M#+&%+.'+$#3Q'3$)+$%3$%+&#iG(#+.#iGV'+H++$#3$1+4%3P#+0%+$#3T'3$3+$#3$#+"
    "%%iG))+%#3$#+aD'3$'+$%3$)+*#+&#+bI#+$'3$1+9%+$%3[%+%#+$#3$#+$)3&%3&%3$#+-#+.%3&/+'++a+#+$%3$"
    "-+%#+&&+$%+$&3$#3$'+$#iG$#+2%+a:'3$1+$%3$'+$#3$#+;#+a9#+$%3$-+$#3$#+$%3$#+$#3$%+$#3$%+c[#+$%"
    "3$)+&)3$%+$#3$%+?%+a:'3$1+$%3$#+$#3$%+aR#+$#3$#+$%3$1+aM#+$#3$#+&)+$#3$++d4'3$3+$#3$%+d)#+$+"
    "3%%3&)+$#iG$#3$#iG$#3$#+b9'3$)+&%+$)3$#+'#3@5+L-+$#3$#iG$)+,#+--+$%3$'+L-iG$;+$#3$%+fQ#3$/+%"
    "-+$#3$#+a:M+%#3$/+$#3$%+$#3$%+b&-+'&+$&+$-+$#iG$#+a*+3%%+%%3$#+$#3$#+eS%+$%3-%+$#iG$#3T%3$++"
    "'%3$'+;#+b{-#+*?+fe(9+$'3$'+ajH++a#/+q@#+%aS3+)+a9#+/%+jq+%+bp=aA+&O+i&++'-+,1+&/+B)+b@'+ab#"
    "aS+(aI+,#+2#+:++%?+vL/+%C+&/+%%+%++aL#+bL/+f3#+a%)+h@)+d2%+l4/+aU/+|IhAb+1'b+C#b+a$-b+0%b+2#"
    "b+&5b+6aWb+?""?b+.#b+8#b+&3b+%)b+-n=b+$++$jEb+,hUb+Td1b+a]9b+a=a;b+0)b+]1b+.-b+L1b+BbMb+0aCb+%"
    "5b+%nKb+d4ac%b+msyRc-+b,g^+";
static const char sc__lower_table[] =
    "a(Ua'aMOa'%/a'ER%'(%&2%&P%%#d$$(%'#g#$&%%#fW$#%%%fU$#%&#bI$#fO$#fQ$#%%#fU$#fY%#g%$#f^$#%'#g%"
    "$#g)%#g+$(%%#g3$#%%#g3&#%%#g3$#%%%g1$&%%#g5$#%'#%+#'$#%%#'$#%%#'$4%&4%&#'$&%%#c0$#aV$J%%#d6%"
    "4%+#krU$#%%#e<$#krO&#%%#f@$#b5$#b9$,%dU&%'#%,#cW*#a3%'a1%#b+%%b)%Ca'%3a'G#3,:%)#a_&#%%#0$#%&"
    "'d6$AbK$a%a'TD%-X%%#A$0%&aF%&a1aGaq-a1gy+%#gy+)#gy+l&bIajx?$-3aeG#%*a;cg2&'cg2e8b@%-#heT%aF%"
    "-12,-2.12,12,-2/*2,12<12,12,12,%2$%b>$#4/)bV$#4/%2$%c60%2$%cN$#0/%d2$%d.$#4d^#hbD'#i`<$#h{:*"
    "#[QAC7#%mJUW~LaEaGT#%%#kq($#dc*$#kpD&(%%#kr6$#kq4$#kr<$#kr:%#%&#%,%ks@$aJ%,&%(#%puEP%7>%b30%"
    "'a$%.&%%#af~N$,%(#%%#ann6&&%'6%%#ano2$#anoH$#ano@$#ano,$#ano2%#anmF$#ann:$#anmL$#~[$2%%#aF$#"
    "ano0$#aga>$&%%#anp<$2%%#anwL<#%k~[Ua't9a5a7b4a-a7bH7a5%?a5%/a5%%a5}BaKb+bIMa'apZa%a'kwTa%a'a"
    "(SYpyOa)a+";
static const char sc__class_table[] =
    "lSKgK$#gO$)g7$#gO$#g/$+g7$%fO$)g7$%fO$7g7$+%$)g7$1gK$#h#$#gK$'g7$'gK$%g7%'gK$)g7$#gK$#gO$%g7"
    "$#gK$#gQ$%gS$#gQ$%gS$#gQ$;gKdG+gKd=#g7$)gK$#g7$'gK$#g;$#g7$-gK$-g7$%gK$#g7$%gK$#g;$#gG$#gK$#"
    "7$#9$#;$#=$#?$#A$#C$#E$#G$%I$#K$#M$#O%#Q%#S$#U%#gK$#g7%#Ga01gK$#a#$#a%$#a'T#Y$#[$#^$#a#$#a%$"
    "#a'$#a)$#a+$%gK$%g7$+gK$#g7$%gK$#g74#a-aM/gK&)gK$#g7$#gK&%gK%#g7$%gK$#g7G#a/B#gK$#g7$%gK$#g7"
    "$%gK$'g7$#gK$%g7$#gK$#g7$'gK$#g7$#gK$#g7$#gK$#g7$#gK$#g7$%gKbL/gK$#g7$#gKF)gK%3gK%'gK%+gKO'g"
    "7b$=gK%#g7$%gK$#g7$%gK$#g7$'gK$'g7$#Y$#[$#^$'gK$#g7$%gK$%g7$+gKa$#14#5'#gK$#g7$%gKaO#14#5aV#"
    "14#5aV#14#5aV#14#5b+#5b+#5+#bS$#c%aM#14#5b+#5b(#5aU%c=$#51)cEaT%c[2)d'a4%g7?&g7%#g/[#d5$#d7%"
    "#d;))d7&#d7%%gK$#5%%gKa&#g7aX#1%%5a:#g7l#'gKoT#5C#5bI#5.#gKc;#gGb;#g;$#gK$#g7cK#gK$#g7a/#581"
    "gK&#g7T+gK$-g7$%gK$#g7a_#13#5J#gK$#g7$/gKZ%5_#1/%5a+#1bD'gK%#%$+g7$%gK$)g7$#gK%/%(#g7*#gK'%g"
    "Kc6%gK$#g7$/gK$#g7$%gK$#gS$#g+$#g7$#fO$a/gK)#gK$#gQ$#g7$#gK$#g7l$%gK$%%$)gK$'%$%gK(#gK'%%$#g"
    "K$#g7$#gK$%%$)g7$#gKat.'gKb9#5aHa%gKi2#g3$#gG$#gO$#g;$%g?aQ%3pfP#gK(5gKD%gKa8%gKdH#5c-#5?EgK"
    "^'g7I#5aG#10#5d#&gK$#gK$#g7&%gK)%gK%#gKX#5d*#5j{X#WlU/gK$/g7$%gKp1#g7cR#g7bA+gK|&#g7%#gKL#gK"
    "$#%$#g7(#5bQ#gK$#g7v[#5]#5^#5$#1a-'gKT%5a&#1a4#5-#1aR#5$#1b_#1$#5a9#14#5</gK'+gKc=#5'#1b'#5$"
    "#1d/#5$#1b*#5a_#5$#1a[#5uK#5jyP+%a#/gKkf7#%bzJ%g/$'%'#gC$+g/,1g7&+gK$%g7B)gKb@'gKa{G/gK%CgK&"
    "/gK%%gK%+gKaeY/g7aU-gK$#1";
static const char sc__composed_table[] =
    "f;b-yG%#%%#%%#%%#-%#'''^%'a4%#%%#%%#/%+2%#%%#%%#/'-,%%(%#%%#%%#%%#-)/2%#%%#%%#/%+0)3$%#%%#%%"
    "#%%#-%#'''^%'a4%#%%#%%#/%+2%#%%#%%#/'-,%%(%#%%#%%#%%#-)/2%#%%#%%#/%+0'#1%aV*%a'#%a&'%a'#%a&a"
    "+%a'#%_a4%a'#%a&%%a'#%a&-%a'#%a&-%a'#%a$#%a'#)a$2%a'#%a&'%a'#%a&%%a'#%a&a)%a'#%a&Z%a'#%_6%a'"
    "#%a&+%a'#%a&%%a'#%a&a'%a'#%a$a0%a'#)a$%%a'#%a&%%a'#%a&'%a'#%a&a+%a'#%a&a(+%,%a'#%a$a1%a'#'a$"
    "a2%a'#%a&a3%a'#%a&X%a'#-_8%a'#%a&a3%a'#%a&X%a'#+a$2%a'#%a&'%a'#%a&-%a'#)]6%a'#%a&a3%a'#%a&X%"
    "a'#%a$8%a'#%a&%%a'#%a&a1%a'#%a&X%a'#%a$Y%a'#%a&X%a'#)a$4%a'#%a&%%a'#%a&'%a'#%a&+%a'#%a&%%a'#"
    "%a&^%a'#%_a2%a'#%_#%a'#%a&/%%0%a'#%a&/%a'#%a&-%a'#a+a<A%a'#?V#%a'#^aN@%a'#%R#%a'#%V#%a'#%V#%"
    "a'#%c=2%a'#%a&(%a'#%a&9%a'#%a&:%a'#'aV+%a'#%jO#%%#%kP#%a'#)e43%a'#%Z#%a'#%Z[%a'#%lIa.%%#%aN3"
    "%g5#%r:#+a,8%a'#)T$%a'#%bY%%a'#%a$#%a'#%>#%a'#%f(?%a'#%a&'%a'#%Z&%a'#%a&'%a'#%Z&%a'#%a&'%a'#"
    "%V&%a'#%a&'%a'#%]&%a'#%a&'%a'#%]&%a'#%a&'%a'#%a*M%a'#%a$#%a'#)a>V%a'#1a4,%a'#%Za'%a'#%cQa,%a"
    "'#%a(#%a'#%eB)%a'#%nY(%%#%oJ#%a'#k3aE(%xU#'+#%'#%'#'/#'/#%+#%a)#WaH1%;#%;0%+#%'#%'#%G#WF1%;#"
    "%.0%/#%+#-5#%#1a?b12%#3'&0+<1-K0%&$%9/98#a'a'#Q(.%#3'&0+a-1-Z0%&$%9/SaI5%%#b?c,4%a'#?a2#%a'#"
    "%a&'%a'#)X&%a'#)e='%%#%f@#%a'#%a$#%a'#)a$*%a'#%a&+%a'#%V#%a'#)eK#%%#%f2#%a'#%a:*%a'#%a&+%a'#"
    "%a&)%a'#%Z(%a'#)Z#%a'#iYoW|)%#%%a)#%a(%%a-$e+dI#'J#EE#s[s[xS33#))#e%d[d7%#UlKlSlQ)#R%#Ub;bAd"
    "3aSaOT%%#%$Ud+d3d1d#d%d111#%#%'#J%+Id1d+cA%%#%$UdOdYcU'#-%),%(Ms?sGsMb~Sb~Sca)''#''#''#''#++"
    "#a9a9#''#)'#%%#')#w9gm<fs6%a'#%a$_%a'#%a&[%a'#%a&?%a'#%c9aF%a'#%e</%a'#%a&[%a'#%a&?%a'#%a&6%"
    "a'#%a&/%a'#%eSa@%%#%$%%%#%fVa?%a'#%a&)%a'#%o%a:%%#%p(%%a'#%a$(%a'#%a$)%a'#%a&[%a'#%a&X%a'#%a"
    "&a%%a'#%a&1%a'#%a$'%a'#%c;aD%a'#%e>#%a'#%a&a+%a'#%a&?%a'#%a$>%a'#%hf/a$%%#%hg4aA%a'#%a&*%a'#"
    "%a$a>%a'#%a&/%a'#%a&[%a'#%a$Z%a'#%a&[%a'#%a&?%a'#%a&*%a'#%c=a>%a'#%a&1%a'#%bY2%%#%$%%%#%h<#%"
    "a'#%a&/%a'#%_#%a'#%a&[%a'#%hg/a$%%#%hh4aA%a'#%a$a:%a'#%a&[%a'#%gMZ%%#%-#%%#%g~A#%%#%hh@#%a'#"
    "%a&[%a'#%a&?%a'#%a&*%a'#%a$4%a'#%a&;%a'#%a&(%a'#%h)a>%%#%%1%%#%i0,%a'#%a&a'%a'#%a$a,%a'#%a&%"
    "%a'#%a&1%a'#%a&$%a'#%a&[%a'#%a$Z%a'#%a&%%a'#%a$$%a'#%a$,%a'#%a&a)%a'#%a&?%a'#%F#%;a8%)'%'#'h"
    "O(-jF[%a'#%a&V%a'#%c12%a'#%a&$%a'#%a&5%a'#%a&.%a'#%heS$%%#%hdP$%%#%$$%%#%$5%%#%$.%%#%hdM)%%#"
    "%hk&^%a'#%a&V%a'#%a&.%a'#%c9&%a'#%a&$%a'#%a&5%a'#%a&.%a'#%hf7$%%#%hkN1%a'#%a&W%a'#%V#%a'#%a&"
    "V%a'#%c92%a'#%a&$%a'#%a&5%a'#%a&.%a'#%hfK$%%#%h`]$%%#%$$%%#%$5%%#%$.%%#%$a'%%#%k&#%a'#%a&V%a"
    "'#%j?2%%#%$$%%#%$5%%#%$.%%#%$a'%%#%k<a,%a'#%a&a-%a'#%a&V%a'#%a&.%a'#1{?C%#%%gp%J%%#%$%%%#%$b"
    "-%%#%gq*aD%#%%gq9J%%#%$%%%#%$b-%%#%gp.aD%#%%gp=J%%#%$%%%#)gqBG%#%%gqQJ%%#%$%%%#)gpJG%#%%gpYJ"
    "%%#%$%%%#%$b-%%#%gq_aD%#%%gr1J%%#%$%%%#%$b-%%#%gq*aD%#%%gq9J%%#%$%%%#%$b-%%#%gr>aD%#%%grMJ%%"
    "#%$%%%#%$b-%%#%gq>aD%#%%gqMJ%%#%$%%%#)grRG%#%%gs%J%%#%$%%%#)gqRG%#%%gr%J%%#%$%%%#%$b-%%#'gs*"
    "aB'gs;J'#%'#b-%gr.aD%#%%gr=J%%#%$%%%#%$b-%%#%gsBaD%#%%gsQJ%%#%$%%%#%$b-%%#%gsBb.'+#''#''#'/#"
    "'/#'+#+go1b5%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%E#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%"
    "#%%#%%#%%#%%#%aI#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%%#%gsNb(%#&%gsQb-%gsP#%,#'-(%gv)"
    ")%gw,b(%#&%#*'#b5-xT(%hnS)%gsL#%4#'5(%gv=)%gwDb4''#'#b5%gw3b4%#%%#b-%gv*a_%#&%E*+Db/%E#%aHa_"
    "%#&%#*)gy5#%#%%#b-%gwTa_%#&%/*'6I%#%%+aC%/#%a2a_%#&%#*'*K%y8J-ho'b5%gs8#%-#',(%gw=)%gxTb4'7#"
    "'#b5mShg-<%'#I'#a%b##%+#%&#aQaI#--#))#SS#''#YQ#)1#)'#')#Qik@#'il7#9J#%ikL#%'#%il;#%%#)=#%%#)"
    ")#%%#1)#%%#)1#%%#))#%%#a-Y#%/#%%#%'#aIaD#%%#%K#%%#1a'#%%#%%#%%#cu)cv[lo1''#''#''#''#''#''#''"
    "#''#''#''#''#))#''#''#11#%#%')$%#%')$%#%')$%#%')$%#%QaP$7bY#?""?#''#''#''#''#''#''#''#''#''#''"
    "#''#))#''#''#11#%#%')$%#%')$%#%')$%#%')$%#%QaP$)b=#%%#%%#%%#+9#a~q+a~q+a~uE''#A7#d9dKcI%%#r#"
    "qQqU%#Ul1l7kU%#6'#=h;hAh'%%#";
static const char sc__split_table[] =
    "{WyWyIatWatIav-%%#%%#%-#%-#%%#%5#%+#d-cSd3%%#'=#bSd9d3)/#a-a*#%%#%-#)A#h?h/hC%%#ab3ad/ag177#"
    "--#--#--#=X&7aIb0'#'%b-;'%#5b.#Ga)aU77#--#--#--#=X&gnEgo^cmDazj)jeVu/'U)947%#%%bepW$%#%%beqL"
    "8%#%%#+%%#%%#%%#%%#%%#%%#''#%%#%%#%%#%%#''#''#%%#''#%%#''#%%#%%#%%#%%#%L(%*/%7#%5#a{|KdbnIdb"
    "p7%%#%15%#%%#%%#%%#%bYc#<%%#%%5%%#%$%%%#";
static const char sc__replaced_table[] =
    "{OyG%%'GaIb_7u25d+gu/y1'%'%'%'^'%'%b'b:)aM9aH'%313.3a33a*)4%zT7{'')'x8)hs+%%iQgxZ+|N%d'q#m`5"
    "%%a{zOyl-%jhB%j}[%q*%hgL%h~8%aqI%tz)%#%sjT%oq+%pr>%aa%%bl'%esA%boO%az;%lI%jG%bbQ%jr]%z=%a`[%"
    "yQ%doM%cs=%bjQ%twL%ak1%fo%%a}A%ep3%fr5%qy_%ecQ%f`O%~I%js<%hq%%avE%kkL%bhU%av^%apC%hf?%q~&%rM"
    "%iU%d|O%atM%a~Q%aj5%boK%at9%bW%bbI%bq%%ae-%uM%ji:%h)%ad1%auE%de^%cd^%elP%mw8%au=%hbC%ad+%c{:"
    "%awK%eo;%by)%qc(%~/%cwU%aa1%j5%c{C%hS%fs?%rqP%lr-%lz8%B%kc#%a`#%auY%ec#%c`@%kf0%a~=%ib?%pvD%"
    "cwO%adE%ek%%p5%in(%jm7%kjV%dkS%dz2%hn9%b`B%fo[%kl$%ah5%hm=%ct7%aw=%ho_%i{W%it_%bs:%hx1%hrT%d"
    "{I%jt8%w5%c/%fgW%es'%ap/%biE%a|I%qi6%k)%am5%aoM%a{=%by1%bp3%gz5%ai=%adI%aU%t~0%eq)%ai%%i{A%m"
    "nB%zC%cO%v/%b{Y%r7%{O%amU%adC%u-%daE%by.%cbI%zY%q}8%dK%q[%gv5%frG%p3%lb<%j#%~'%bg^%dq7%bl]%j"
    "b$%bf^%ak'%oE%t7%el+%f)%cbA%eO%d}#%aiG%bO%f[%s~(%krE%fs#%akS%ny<%eaH%sW%caC%bM%bqS%afI%bdC%a"
    "g#%daK%ce+%ddE%ouD%mcG%rs0%ewO%d#%an3%kE%ao5%k/%z/%ahI%gp#%sp8%dr^%nl/%sjX%cq7%dsA%idO%mc8%n"
    "M%a{1%cdG%isI%ry8%p/%bi+%btG%jA%kC%ae-%a}U%oW%bsU%bqK%G%bn)%al;%rs,%gqA%gj(%he=%wO%dx7%dr-%a"
    "qK%s?%odF%au[%epI%a}L%bU%l7%buR%r8%gk1%pu&%nmK%mn_%aL%cnM%adI%gd^%ie4%dz-%awN%kdU%a|,%czA%co"
    "V%kwB%cvT%ag;)v/'c{7)etJ%ie+%~[%tW%a+%1%a;%hf)%giZ%yE'aw%'ajS)amS%fE+beS%=%a?%agS%cpB%arY%sq"
    ",%j=%c;%lK%Y%cI%sG%cA%c3%oO%c?%a`W%7%ad;%g'%a3%c7%|M%dY%eU%pK%ak/%e=%hS%sG%f5%pQ%afU%eQ%9%$%"
    "3%/%1%aG%%%e[%b-%jI%rS%M%aW%j-%dY%p3%dK%#%o[%ai5%d?%l)%aW%mK%aQ%vW%d7%ayY%i?%b#%ojZ%dhy)%c~q"
    "&)ni2%~9%bD%p2%o)%a^%jY%aM%vA%b:%b3%b=%u'%b^%dU%C%i#%fG%a`3%1%dS%b3%i^%c[%b6%d?%aB%dW%b/%m7%"
    "b[%aS%hK%iC%e=%+%a^%ad5%b-%m%%mK%B%bY%h;%k/%av)%ao>%d'%d)%jY%d^%aQ%gC%'%eM%E%U%bW%6%m/%p-%i%"
    "%f1%g?%e)%k#%fI%|-%e1%~/%o/%b5%C%iY%aY%a@%aS%(%D%bC%bM%lO%rK%j?%iU%g9%ac7%c=%cU%d=%a/%;%aG%x"
    "1%agO%cobW%.%ceM%dnxJ%ag1%a)%du|/%b{U%ik1%dh`2%bAdpdQvkX%,%5%czu^%czl:%bG%=%b9%d#%a%%bG%R%gw"
    "D%dde/%c{h<%1%C%I%cz|A%dcyP%g{O%a3%cz}7%cz|_%=%x2%xC%5%ecrG%ecp>%?%h`J%hbC%9%a?%-%hbN%he;%'%"
    "Y%O%9%%%E%aK%3%5%U%7%'%#%#%c{w9%csx:%g{>%M%c{~C%c{~*%/%M%e'%c:%C%a'%a[%bS%W%b1%C%a)%#%M%G%3%"
    "A%k7%i&%i)%fF%a-%afP%a{Y%iF%a3%U%d6%eE%$%d)%c}hK%c}f6%-%A%K%3%b+%c}qK%b/%c}o2%aE%;%bH%dO%iwJ"
    "%?%i|G%aS%#%c}|?%c}x$%M%A%;%c~bI%c~b0%1%|-%{0%jbD%jdI%?%bO%aL%c~u9%c~o4%c~o9%c~mZ%(%E%c9%%%j"
    "kL%jlG%a=%M%a?%jn@%djsY%djs$%jp#%)%)%K%ed{#%edy2%d`nQ%#%cuy_%irD%#%jq4%doh9%l~/%dqs*%5%jrR%j"
    "t9%aM%7%a+%dC%jy,%_%jzS%daa3%d`~D%d5%+%'%&%aC%K%a/%>%9%aE%K%+%W%9%b/%bS%a-%d+%dam[%danD%b,%c"
    "G%Y%c1%dapI%danD%c(%Z%kl]%ks9%M%a%%a2%kqP%kx^%^%dbgC%dbcD%i1%eT%k{B%k}[%k~@%a.%fgC%)%e{Q%c6%"
    "ge=%pw&%iuO%+%/%b%%8%dbw'%dnzV%li9%cX%fU%aM%dbrC%dbr0%cL%h-%lo]%lqA%c1%b9%f7%dbs-%dbq>%l{$%l"
    "}9%dca7%db~H%l}2%l~3%aA%Y%%%dcl;%hcR%hg=%dck*%dcz+%dcv8%?%c:%eU%a7%aY%aR%a7%A%=%dcs%%dcuN%h9"
    "%b)%mq(%mt/%*%dcvS%dc}J%l=%dcu[%aG%dctF%cU%X%(%m|(%m}K%aM%.%aS%crj?%cre:%dda#%dc}(%ddi%%ddd8"
    "%=%Y%ddw/%dduF%M%dd~[%g=%dd~N%E%nq,%nr%%nqH%#%nw%%M%M%K%b5%nx(%n{)%detS%desZ%dew#%deu6%cxzU%"
    "cxu@%dfk)%Q%dK%dul_%;%ocK%dfnQ%$%a5%W%dfo@%%%#%a=%odX%og'%ofH%bK%dviM%df~0%b'%b+%ol(%dvxA%dg"
    "gR%dgkK%a=%dgk.%c'%os*%ou^%7%-%dg{^%i^%#%dhaH%otN%dx`%%dhc(%)%ozR%dxeY%dha2%p`F%pa7%,%^%dhyC"
    "%dhv0%pb.%peC%a^%b1%ph$%dyn/%a%%dym_%dyrW%diaP%die+%did0%c9%9%din1%b=%dimH%dir'%diqB%czv=%dl"
    "lF%pw9%bM%px2%pz1%jrT%dtoC%?%njV%5%czk(%)%cw'%tuL%qc7%.%G%meV%mfC%'%7%a9%djm+%djm,%aW%b7%b?%"
    "dF%e+%a;%cO%hJ%c^%'%C%djm3%j5%d_%d{zB%qq/%'%a-%dle?%dlbV%djy?%d|mT%+%d|r+%iI%d|{<%qzQ%;%9%'%"
    "b+%a(%d?%a>%e%%bL%b1%Y%rb@%reC%a'%re>%rhI%)%dk~G%dkzN%1%rjT%rkQ%weX%edsY%f+%d~{6%5%rt^%bE%e1"
    "%fQ%dls5%dlp<%O%c#%c'%dm`/%aaxX%ckc@%@%aO%ckiC%ckaZ%c7%dnjW%Y%dn`,%c)%a'%dnfM%dnf8%iA%e5%%%c"
    "&%lM%[%dnuY%dni<%t|.%t}K%dntK%edpH%udY%ou]%oy-%doj#%g)%eetJ%3%uiG%do{7%efcZ%efhG%do~D%#%a#%d"
    "ph-%dpa_%ukX%un3%d/%Y%b#%up.%egx?%dp~&%j'%f5%vb0%a%%vdO%dq{)%ei`>%eib5%hU%d9%dq~R%vlD%vnI%-%"
    "1%7%1%a1%drxU";

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
        if (digit >= 60) n = n * 31 + digit - 60;
    } while (digit >= 60);
    return n * 60 + digit;
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

/* A step of T5's normaliser: `charsmap` where that is given, else stripping, else `spaces` for two
 * or more spaces. */
typedef struct sc__step { sc__charsmap charsmap; bool left, right; const char *spaces; } sc__step;

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
    /* BPE */
    sc__merge *merges;          /* sorted by left and right */
    size_t merge_count;
    int32_t letter[2][256];     /* a byte's token inside a word, and at its end; -1: none */
    /* Unigram */
    double worst;               /* the lowest score */
    sc__step steps[4];
    size_t step_count;
    uint32_t space;             /* stands for a space: U+2581 */
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
 * other signs. The first is no space. */
static size_t sc__bpe_cut(const sc_tokenizer *t, const uint32_t *s, size_t n) {
    static const char *const endings[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    for (size_t i = 0; *s == '\'' && i < sizeof endings / sizeof *endings; i++) {
        size_t length = strlen(endings[i]), same = 0;
        while (same < length && same + 1 < n && s[same + 1] == (uint32_t)endings[i][same]) same++;
        if (same == length) return length + 1;
    }
    int32_t kind = sc__run_value(&t->unicode.word, *s);
    size_t i = 1;
    if (kind == SC__DIGIT) return 1;
    while (i < n && !sc__is_space(s[i]) && sc__run_value(&t->unicode.word, s[i]) == kind) i++;
    return i;
}

static bool sc__bpe_words(const sc_tokenizer *t, const uint32_t *s, size_t n, sc__ids *out) {
    sc__text word = {0};
    bool ok = true;
    for (size_t i = 0, size; ok && i < n && out->count < out->limit; i += size) {
        size = sc__is_space(s[i]) ? 1 : sc__bpe_cut(t, s + i, n - i);
        if (sc__is_space(s[i])) continue;
        word.length = 0;
        sc__text_add_codes(&word, s + i, size);
        ok = !word.failed && sc__bpe_word(t, word.data, word.length, out);
    }
    SC_FREE(word.data);
    return ok;
}

/* NFC, then lower case: of U+0130 two code points, of all others one. */
static void sc__bpe_normalise(const sc_tokenizer *t, const uint32_t *s, size_t n, sc__codes *out) {
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

/* Words begin with `space`, which stands for spaces; a whole text gets one more at its front. */
static bool sc__unigram_words(const sc_tokenizer *t, const uint32_t *s, size_t n, bool first,
                              sc__ids *out) {
    sc__codes line = {0};
    sc__text word = {0};
    bool prepend = t->prepend == SC__ALWAYS || (t->prepend == SC__FIRST && first);
    if (prepend && n && *s != ' ' && *s != t->space) sc__codes_add(&line, t->space);
    for (size_t i = 0; i < n; i++) sc__codes_add(&line, s[i] == ' ' ? t->space : s[i]);
    bool ok = !line.failed;
    for (size_t i = 0, end; ok && i < line.count && out->count < out->limit; i = end) {
        for (end = i + 1; end < line.count && line.code[end] != t->space;) end++;
        word.length = 0;
        sc__text_add_codes(&word, line.code + i, end - i);
        ok = !word.failed && sc__unigram_word(t, word.data, word.length, out);
    }
    SC_FREE(line.code);
    SC_FREE(word.data);
    return ok;
}

/* The index-th 32-bit number of a charsmap; 0 behind its end. */
static uint32_t sc__unit(const sc__charsmap *map, size_t index) {
    const unsigned char *p = map->data + 4 * index;
    if (index >= map->size / 4) return 0;
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
    if (step->charsmap.data) {
        sc__charsmap_apply(t, &step->charsmap, s, n, out);
        return;
    }
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

static void sc__unigram_normalise(const sc_tokenizer *t, const uint32_t *s, size_t n,
                                  sc__codes *out) {
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

static void sc__normalise(const sc_tokenizer *t, const uint32_t *s, size_t n, sc__codes *out) {
    if (t->unigram) sc__unigram_normalise(t, s, n, out);
    else sc__bpe_normalise(t, s, n, out);
}

static bool sc__emit_text(const sc_tokenizer *t, const uint32_t *s, size_t n, bool clean,
                          bool first, sc__ids *out);

/* Emits s[n], in which there are no special tokens (of the kind to be found at this time). */
static bool sc__emit_piece(const sc_tokenizer *t, const uint32_t *s, size_t n, bool clean,
                           bool first, sc__ids *out) {
    if (clean && t->unigram) return sc__unigram_words(t, s, n, first, out);
    if (clean) return sc__bpe_words(t, s, n, out);
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

typedef struct sc__clip_layer {
    sc_tensor *norm[4];         /* weight and bias of the first, of the second */
    sc_linear_layer q, k, v, out, up, down;
} sc__clip_layer;

typedef struct sc__t5_layer {
    sc_tensor *norm[2];
    sc_linear_layer q, k, v, o, gate, up, down;
} sc__t5_layer;

struct sc_text_encoders {
    const sc_backend *backend;
    sc_tokenizer *clip_tokenizer, *t5_tokenizer;
    sc_net *clip, *t5;
    sc_tape *tape;
    int clip_width, clip_heads, clip_layers, clip_vocabulary, clip_length, clip_end;
    float clip_eps;
    sc_activation clip_activation, t5_activation;
    sc_tensor *clip_tokens, *clip_positions, *clip_norm[2];
    sc__clip_layer *clip_layer;
    int t5_width, t5_heads, t5_size, t5_layers, t5_vocabulary, t5_buckets, t5_distance;
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
    if (t->tape) sc_tape_free(t->tape);
    SC_FREE(t->clip_layer);
    SC_FREE(t->t5_layer);
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

/* x = y; gives back everything that was made since the mark. */
static bool sc__keep(sc_tape *t, sc_tensor *x, const sc_tensor *y, sc__mark_t mark) {
    if (!x || !y) return false;
    int64_t n = sc_count(x);
    t->be->copy_block(x->data, n, y->data, n, 1, n, x->dtype, false);
    sc__release(t, mark);
    return true;
}

/* Tokens outside of the embedding table would read past its end. */
static bool sc__check_vocabulary(const sc_tokenizer *t, int vocabulary, const char *folder) {
    return t->largest < vocabulary ||
           sc__fail("%s: vocab_size is %d, but the tokenizer has the id %d", folder, vocabulary,
                    (int)t->largest);
}

/* ---- CLIP ---- */

static bool sc__clip_layer_open(sc_text_encoders *t, sc__clip_layer *l, int index,
                                int64_t hidden) {
    static const char *const norms[] = {"layer_norm1.weight", "layer_norm1.bias",
                                        "layer_norm2.weight", "layer_norm2.bias"};
    char prefix[64];
    int64_t c = t->clip_width;
    const sc__named_linear linears[] = {
        {&l->q, "self_attn.q_proj", c, c}, {&l->k, "self_attn.k_proj", c, c},
        {&l->v, "self_attn.v_proj", c, c}, {&l->out, "self_attn.out_proj", c, c},
        {&l->up, "mlp.fc1", hidden, c}, {&l->down, "mlp.fc2", c, hidden}};
    snprintf(prefix, sizeof prefix, "text_model.encoder.layers.%d.", index);
    return sc__open_layer(t->clip, prefix, l->norm, norms, 4, c, linears, 6, true);
}

static bool sc__clip_read_config(sc_text_encoders *t, const sc_json *json, const char *path,
                                 int *hidden) {
    const char *activation = sc_json_string(sc_json_get(json, "hidden_act"), "quick_gelu");
    t->clip_eps = (float)sc_json_number(sc_json_get(json, "layer_norm_eps"), 1e-5);
    const sc_json *end = sc_json_get(json, "eos_token_id");
    t->clip_end = end ? sc__json_id(end) : json ? 49407 : 2;
    const char *layers = "text_model.encoder.layers.%d.mlp.fc1.weight";
    int hidden_side = sc__side(t->clip, "text_model.encoder.layers.0.mlp.fc1.weight", 0, 2048);
    int width = sc__side(t->clip, "text_model.embeddings.token_embedding.weight", 1, 512);
    int words = sc__side(t->clip, "text_model.embeddings.token_embedding.weight", 0, 49408);
    int length = sc__side(t->clip, "text_model.embeddings.position_embedding.weight", 0, 77);
    if (!sc__config_int(json, path, "hidden_size", width, &t->clip_width) ||
        !sc__config_int(json, path, "num_attention_heads", json ? 8 : width / 64, &t->clip_heads) ||
        !sc__config_int(json, path, "num_hidden_layers", sc__count_layers(t->clip, layers, 12),
                         &t->clip_layers) ||
        !sc__config_int(json, path, "max_position_embeddings", length, &t->clip_length) ||
        !sc__config_int(json, path, "vocab_size", words, &t->clip_vocabulary) ||
        !sc__config_int(json, path, "intermediate_size", hidden_side, hidden) ||
        !sc__activation_named(activation, path, &t->clip_activation)) return false;
    if (t->clip_width % t->clip_heads)
        return sc__fail("%s: hidden_size must be a multiple of num_attention_heads", path);
    return (t->clip_length >= 2 && t->clip_length <= SC__MAX_TOKENS) ||
           sc__fail("%s: max_position_embeddings must be from 2 to %d", path, SC__MAX_TOKENS);
}

/* Opens the weights at `path` and its config; `json` and `name` as sc__read_config gives them. */
static sc_net *sc__text_net(const sc_backend *backend, const char *path, sc_json **json,
                            char **name) {
    char *text = NULL;
    bool ok = sc__read_config(path, json, name, &text);
    SC_FREE(text);
    return ok ? sc_net_open(backend, path, sc__small_file(backend, path)) : NULL;
}

static bool sc__clip_open(sc_text_encoders *t, const char *path) {
    static const char *const norms[] = {"weight", "bias"};
    char *name = NULL;
    sc_json *json = NULL;
    int hidden = 0;
    bool ok = (t->clip = sc__text_net(t->backend, path, &json, &name)) &&
              sc__clip_read_config(t, json, name, &hidden);
    if (ok) {
        const char *tokens = "text_model.embeddings.token_embedding.weight";
        const char *positions = "text_model.embeddings.position_embedding.weight";
        const int64_t tokens_shape[] = {t->clip_vocabulary, t->clip_width};
        const int64_t positions_shape[] = {t->clip_length, t->clip_width};
        size_t n = (size_t)t->clip_layers;
        ok = (t->clip_layer = (sc__clip_layer *)sc__alloc(n, sizeof *t->clip_layer)) &&
             (t->clip_tokens = sc_net_weight(t->clip, tokens, 2, tokens_shape)) &&
             (t->clip_positions = sc_net_weight(t->clip, positions, 2, positions_shape)) &&
             sc__open_layer(t->clip, "text_model.final_layer_norm.", t->clip_norm, norms, 2,
                            t->clip_width, NULL, 0, false);
    }
    for (int i = 0; ok && i < t->clip_layers; i++)
        ok = sc__clip_layer_open(t, &t->clip_layer[i], i, hidden);
    ok = ok && sc_net_load(t->clip);
    sc_json_free(json);
    SC_FREE(name);
    return ok;
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
    float scale = 1.f / sqrtf((float)s->clip_width / (float)s->clip_heads);
    for (int i = 0; i < length; i++) positions[i] = i;
    sc_tape_reset(t);
    sc_tensor *x = sc_add(t, sc_embed_tokens(t, s->clip_tokens, ids, 1, length),
                          sc_embed_tokens(t, s->clip_positions, positions, 1, length));
    sc__mark_t mark = sc__mark(t);
    for (int i = 0; i < s->clip_layers; i++) {
        const sc__clip_layer *l = &s->clip_layer[i];
        sc_tensor *n = sc_layer_norm(t, x, l->norm[0], l->norm[1], s->clip_eps);
        sc_tensor *o = sc_attention(t, sc_linear(t, n, &l->q), sc_linear(t, n, &l->k),
                                    sc_linear(t, n, &l->v), s->clip_heads, scale, NULL, true);
        sc_tensor *y = sc_add(t, x, sc_linear(t, o, &l->out));
        n = sc_layer_norm(t, y, l->norm[2], l->norm[3], s->clip_eps);
        n = sc_activate(t, s->clip_activation, sc_linear(t, n, &l->up));
        if (!sc__keep(t, x, sc_add(t, y, sc_linear(t, n, &l->down)), mark)) return false;
    }
    x = sc_slice_tokens(t, x, sc__clip_end(s, ids), 1);
    return sc_read(t, sc_layer_norm(t, x, s->clip_norm[0], s->clip_norm[1], s->clip_eps), pooled);
}

/* ---- T5 ---- */

static bool sc__t5_layer_open(sc_text_encoders *t, sc__t5_layer *l, int index, int64_t hidden) {
    static const char *const norms[] = {"0.layer_norm.weight", "1.layer_norm.weight"};
    char prefix[64];
    int64_t c = t->t5_width, inner = (int64_t)t->t5_heads * t->t5_size;
    const char *gate = t->t5_gated ? "1.DenseReluDense.wi_0" : "1.DenseReluDense.wi";
    const sc__named_linear linears[] = {
        {&l->q, "0.SelfAttention.q", inner, c}, {&l->k, "0.SelfAttention.k", inner, c},
        {&l->v, "0.SelfAttention.v", inner, c}, {&l->o, "0.SelfAttention.o", c, inner},
        {&l->gate, gate, hidden, c}, {&l->down, "1.DenseReluDense.wo", c, hidden},
        {&l->up, "1.DenseReluDense.wi_1", hidden, c}};
    snprintf(prefix, sizeof prefix, "encoder.block.%d.layer.", index);
    int count = t->t5_gated ? 7 : 6;
    return sc__open_layer(t->t5, prefix, l->norm, norms, 2, c, linears, count, false);
}

/* Configs have `dense_act_fn` and `is_gated_act`, or `feed_forward_proj`, which means both. */
static bool sc__t5_read_config(sc_text_encoders *t, const sc_json *json, const char *path,
                               int *hidden) {
    const char *bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
    const char *layers = "encoder.block.%d.layer.0.SelfAttention.q.weight";
    int gate = sc__side(t->t5, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0, 0);
    int up = sc__side(t->t5, "encoder.block.0.layer.1.DenseReluDense.wi.weight", 0, 2048);
    int inner = sc__side(t->t5, "encoder.block.0.layer.0.SelfAttention.q.weight", 0, 512);
    int words = sc__side(t->t5, "shared.weight", 0, 32128), heads = sc__side(t->t5, bias, 1, 8);
    const char *both = sc_json_string(sc_json_get(json, "feed_forward_proj"),
                                      !json && gate ? "gated-gelu" : "relu");
    bool gated = strstr(both, "gated-") == both;
    const char *activation = !strcmp(both, "gated-gelu") ? "gelu_new" : gated ? both + 6 : both;
    activation = sc_json_string(sc_json_get(json, "dense_act_fn"), activation);
    t->t5_gated = sc_json_bool(sc_json_get(json, "is_gated_act"), gated);
    t->t5_eps = (float)sc_json_number(sc_json_get(json, "layer_norm_epsilon"), 1e-6);
    if (!sc__config_int(json, path, "d_model", sc__side(t->t5, "shared.weight", 1, 512),
                        &t->t5_width) ||
        !sc__config_int(json, path, "num_heads", heads, &t->t5_heads) ||
        !sc__config_int(json, path, "d_kv", json ? 64 : inner / heads, &t->t5_size) ||
        !sc__config_int(json, path, "num_layers", sc__count_layers(t->t5, layers, 6),
                        &t->t5_layers) ||
        !sc__config_int(json, path, "d_ff", gate ? gate : up, hidden) ||
        !sc__config_int(json, path, "vocab_size", words, &t->t5_vocabulary) ||
        !sc__config_int(json, path, "relative_attention_num_buckets", sc__side(t->t5, bias, 0, 32),
                        &t->t5_buckets) ||
        !sc__config_int(json, path, "relative_attention_max_distance", 128, &t->t5_distance) ||
        !sc__activation_named(activation, path, &t->t5_activation))
        return false;
    return (t->t5_buckets >= 4 && t->t5_distance > t->t5_buckets / 4) ||
           sc__fail("%s: relative_attention_num_buckets must be 4 or more, and less than four "
                    "times relative_attention_max_distance", path);
}

static bool sc__t5_open(sc_text_encoders *t, const char *path) {
    static const char *const norms[] = {"weight"};
    char *name = NULL;
    sc_json *json = NULL;
    int hidden = 0;
    bool ok = (t->t5 = sc__text_net(t->backend, path, &json, &name)) &&
              sc__t5_read_config(t, json, name, &hidden);
    if (ok) {
        const char *table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
        const char *tokens = "shared.weight";
        const int64_t tokens_shape[] = {t->t5_vocabulary, t->t5_width};
        const int64_t table_shape[] = {t->t5_buckets, t->t5_heads};
        t->t5_layer = (sc__t5_layer *)sc__alloc((size_t)t->t5_layers, sizeof *t->t5_layer);
        ok = t->t5_layer && (t->t5_tokens = sc_net_weight(t->t5, tokens, 2, tokens_shape)) &&
             (t->t5_bias = sc_net_weight(t->t5, table, 2, table_shape)) &&
             sc__open_layer(t->t5, "encoder.final_layer_norm.", &t->t5_norm, norms, 1, t->t5_width,
                            NULL, 0, false);
    }
    for (int i = 0; ok && i < t->t5_layers; i++)
        ok = sc__t5_layer_open(t, &t->t5_layer[i], i, hidden);
    ok = ok && sc_net_load(t->t5);
    sc_json_free(json);
    SC_FREE(name);
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

/* The bias for each head and pair of tokens, [H, T, T]: a learned number for the bucket of their
 * distance. */
static sc_tensor *sc__t5_position_bias(sc_text_encoders *s, int tokens) {
    int64_t heads = s->t5_heads, n = s->t5_buckets * heads, size = heads * tokens * tokens;
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
    sc_tensor *x = sc_embed_tokens(t, s->t5_tokens, ids, 1, tokens);
    sc_tensor *bias = sc__t5_position_bias(s, tokens);
    if (!bias) return false;
    sc__mark_t mark = sc__mark(t);
    for (int i = 0; i < s->t5_layers; i++) {
        const sc__t5_layer *l = &s->t5_layer[i];
        sc_tensor *n = sc_rms_norm(t, x, l->norm[0], s->t5_eps);
        sc_tensor *o = sc_attention(t, sc_linear(t, n, &l->q), sc_linear(t, n, &l->k),
                                    sc_linear(t, n, &l->v), s->t5_heads, 1, bias, false);
        sc_tensor *y = sc_add(t, x, sc_linear(t, o, &l->o));
        n = sc_rms_norm(t, y, l->norm[1], s->t5_eps);
        sc_tensor *h = sc_activate(t, s->t5_activation, sc_linear(t, n, &l->gate));
        if (s->t5_gated) h = sc_multiply(t, h, sc_linear(t, n, &l->up));
        if (!sc__keep(t, x, sc_add(t, y, sc_linear(t, h, &l->down)), mark)) return false;
    }
    return sc_read(t, sc_rms_norm(t, x, s->t5_norm, s->t5_eps), context);
}

/* ---- Both ---- */

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
    if (ok && backend) ok = (t->tape = sc_tape_new(backend)) != NULL;
    if (ok && !backend) ok = sc__clip_open(t, clip) && sc__t5_open(t, t5);
    else
        ok = ok && (t->clip_tokenizer = sc__open_tokenizer(model, "tokenizer")) &&
             sc__clip_open(t, clip) &&
             sc__check_vocabulary(t->clip_tokenizer, t->clip_vocabulary, clip) &&
             (t->t5_tokenizer = sc__open_tokenizer(model, "tokenizer_2")) && sc__t5_open(t, t5) &&
             sc__check_vocabulary(t->t5_tokenizer, t->t5_vocabulary, t5);
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
    return sc_tokenize(t->clip_tokenizer, prompt, t->clip_length, ids) >= 0 &&
           sc__clip_encode(t, ids, pooled) &&
           sc_tokenize(t->t5_tokenizer, prompt, tokens, ids) >= 0 &&
           sc__t5_encode(t, ids, tokens, context);
}

/* ==== Pictures and data sets ==================================================================
 *
 * A picture is [3, height, width] floats in [-1, 1], whatever it was in its file. Decoding and
 * encoding belong to the programs (see tools.h); here is what a decoder leaves to do:
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

/* A number or a truth value in folder/name under `key`; `fallback` where there is no such file or
 * key. False if the file is broken. */
static bool sc__setting(const char *folder, const char *name, const char *key, double fallback,
                        double *number) {
    char *path = sc__join(folder, name);
    bool there = path && sc__exists(path);
    sc_json *json = there ? sc_json_load(path) : NULL;
    const sc_json *value = sc_json_get(json, key);
    bool yes = sc_json_bool(value, false), no = !sc_json_bool(value, true);
    bool absent = !value || value->type == SC__NULL;
    *number = absent ? fallback : yes ? 1 : no ? 0 : sc_json_number(value, NAN);
    bool ok = path && (json || !there);
    if (ok && isnan(*number)) ok = sc__fail("%s: '%s' must be a number", path, key);
    sc_json_free(json);
    SC_FREE(path);
    return ok;
}

/* Numbers of the scheduler, the tokenizer and the VAE that decide how the model is used. Single
 * files come without a scheduler: then it is FLUX.1-dev's or schnell's. */
static bool sc__pipeline_settings(sc_pipeline *p, bool guided) {
    static const char scheduler[] = "scheduler/scheduler_config.json";
    char *folder = sc__model_folder(p->folder),
         *vae = folder ? sc__part_path(p->folder, SC__VAE) : NULL;
    sc_vae *plan = vae ? sc_vae_open(NULL, vae, false) : NULL;
    bool ok = plan != NULL;
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
              sc__pipeline_settings(p, p->flux->config.guidance) &&
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
    if (p->tape) sc_tape_free(p->tape);
    SC_FREE(p->folder);
    SC_FREE(p);
}

/* Where the transformer and 8 GiB to work with would not fit beside them, the encoders go again. */
bool sc_pipeline_text(sc_pipeline *p, const char *prompt, float *context, float *pooled) {
    if (!p->text && !(p->text = sc_text_encoders_open(p->backend, p->folder))) return false;
    bool ok = sc_text_encode(p->text, prompt, p->text_tokens, context, pooled);
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

enum { SC__VAE_TILE = 1024 }; /* pixels: 3 GiB with FLUX.1's VAE in f32 */

/* The side of tiles: a picture goes through the VAE whole (0) if that takes no more than 8 GiB and
 * half of the memory that is left, since a tile's norms do not see the rest of the picture. At full
 * resolution three tensors as wide as the second level are alive at once. */
static int64_t sc__pipeline_tile(const sc_pipeline *p, int64_t height, int64_t width) {
    const sc_vae_config *c = sc_vae_config_of(p->vae);
    int64_t bytes = 3 * c->channels[c->levels > 1] * sc_dtype_size(p->backend->activation);
    double limit = fmin(8.0 * (1 << 30), 0.5 * (double)p->backend->memory_left());
    return (double)bytes * (double)height * (double)width <= limit ? 0 : SC__VAE_TILE;
}

bool sc_pipeline_encode(sc_pipeline *p, const float *rgb, int width, int height, float *mean,
                        float *std) {
    if (!sc__pipeline_vae(p)) return false;
    int64_t channels = sc_vae_config_of(p->vae)->latent_channels, f = sc_vae_factor(p->vae);
    int64_t h = height / f, w = width / f, n = channels * h * w;
    float *latents = (float *)sc__alloc((size_t)(2 * n), sizeof *latents), *deviation = latents + n;
    bool ok =
        latents && sc_vae_encode(p->vae, 1, height, width, rgb, latents, deviation,
                                 sc__pipeline_tile(p, height, width));
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
        return sc__fail("%s: the VAE has %lld channels, the transformer makes tokens of %d",
                        p->folder, (long long)channels, p->flux->config.out_channels);
    float *latents = (float *)sc__alloc((size_t)n, sizeof *latents);
    if (!latents) return false;
    if (!p->backend->on_host) sc_tape_reserve(p->tape, 0); /* its memory is the VAE's now */
    sc_unpack_latents(batch, channels, 2 * h, 2 * w, tokens, latents);
    sc_vae_unnormalise(p->vae, n, latents);
    int64_t f = sc_vae_factor(p->vae), tile = sc__pipeline_tile(p, 2 * h * f, 2 * w * f);
    bool ok = sc_vae_decode(p->vae, batch, 2 * h, 2 * w, latents, rgb, tile);
    SC_FREE(latents);
    return ok;
}

#endif /* SHORTCUT_IMPLEMENTATION */
