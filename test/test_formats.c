/* Layouts of the transformer's file and dialects of LoRA files, against the same numbers in
 * diffusers' layout; what is wrong with such files; and the names of the real FLUX.1-dev
 * ($SHORTCUT_FLUX_DIR). */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "test.h"

#define MODEL "test/reference/flux_a" /* 1 double and 2 single blocks, 2 heads of 16 */

/* ---- Files made of tensors ---- */

typedef struct tensors {
    sc_named named[600];
    char name[600][400];
    int count;
} tensors;

static void add(tensors *t, const char *name, sc_dtype type, int64_t rows, int64_t columns,
                void *data) {
    int i = t->count++;
    snprintf(t->name[i], sizeof t->name[i], "%s", name);
    sc_tensor x = {.data = data, .dtype = type, .ndim = (rows > 0) + (columns > 0)};
    x.shape[0] = rows, x.shape[1] = columns;
    t->named[i] = (sc_named){t->name[i], x, type};
}

static tensors *new_tensors(void) { return calloc(1, sizeof(tensors)); }

static void free_tensors(tensors *t) {
    for (int i = 0; i < t->count; i++) free(t->named[i].tensor.data);
    free(t);
}

static char folder[64];

static const char *in_folder(const char *name) {
    static char path[4][300];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static const char *save(const tensors *t, const char *name) {
    const char *path = in_folder(name);
    CHECK(sc_file_save(path, t->named, t->count, NULL));
    return path;
}

/* ---- BFL's layout, spelt out ---- */

typedef struct fused {
    const char *name;
    int parts;
    const char *part[4];
    bool swapped;
} fused;

#define DOUBLE "transformer_blocks.0."
#define SINGLE(i) "single_transformer_blocks." #i "."
static const fused bfl[] = {
    {"img_in", 1, {"x_embedder"}, false},
    {"txt_in", 1, {"context_embedder"}, false},
    {"time_in.in_layer", 1, {"time_text_embed.timestep_embedder.linear_1"}, false},
    {"time_in.out_layer", 1, {"time_text_embed.timestep_embedder.linear_2"}, false},
    {"guidance_in.in_layer", 1, {"time_text_embed.guidance_embedder.linear_1"}, false},
    {"guidance_in.out_layer", 1, {"time_text_embed.guidance_embedder.linear_2"}, false},
    {"vector_in.in_layer", 1, {"time_text_embed.text_embedder.linear_1"}, false},
    {"vector_in.out_layer", 1, {"time_text_embed.text_embedder.linear_2"}, false},
    {"double_blocks.0.img_mod.lin", 1, {DOUBLE "norm1.linear"}, false},
    {"double_blocks.0.txt_mod.lin", 1, {DOUBLE "norm1_context.linear"}, false},
    {"double_blocks.0.img_attn.qkv",
     3,
     {DOUBLE "attn.to_q", DOUBLE "attn.to_k", DOUBLE "attn.to_v"},
     false},
    {"double_blocks.0.txt_attn.qkv",
     3,
     {DOUBLE "attn.add_q_proj", DOUBLE "attn.add_k_proj", DOUBLE "attn.add_v_proj"},
     false},
    {"double_blocks.0.img_attn.proj", 1, {DOUBLE "attn.to_out.0"}, false},
    {"double_blocks.0.txt_attn.proj", 1, {DOUBLE "attn.to_add_out"}, false},
    {"double_blocks.0.img_mlp.0", 1, {DOUBLE "ff.net.0.proj"}, false},
    {"double_blocks.0.img_mlp.2", 1, {DOUBLE "ff.net.2"}, false},
    {"double_blocks.0.txt_mlp.0", 1, {DOUBLE "ff_context.net.0.proj"}, false},
    {"double_blocks.0.txt_mlp.2", 1, {DOUBLE "ff_context.net.2"}, false},
    {"single_blocks.0.modulation.lin", 1, {SINGLE(0) "norm.linear"}, false},
    {"single_blocks.0.linear1",
     4,
     {SINGLE(0) "attn.to_q", SINGLE(0) "attn.to_k", SINGLE(0) "attn.to_v", SINGLE(0) "proj_mlp"},
     false},
    {"single_blocks.0.linear2", 1, {SINGLE(0) "proj_out"}, false},
    {"single_blocks.1.modulation.lin", 1, {SINGLE(1) "norm.linear"}, false},
    {"single_blocks.1.linear1",
     4,
     {SINGLE(1) "attn.to_q", SINGLE(1) "attn.to_k", SINGLE(1) "attn.to_v", SINGLE(1) "proj_mlp"},
     false},
    {"single_blocks.1.linear2", 1, {SINGLE(1) "proj_out"}, false},
    {"final_layer.adaLN_modulation.1", 1, {"norm_out.linear"}, true},
    {"final_layer.linear", 1, {"proj_out"}, false}};
enum { BFL = sizeof bfl / sizeof *bfl };
static const fused xlabs[] = {
    {"double_blocks.0.processor.qkv_lora1",
     3,
     {DOUBLE "attn.to_q", DOUBLE "attn.to_k", DOUBLE "attn.to_v"},
     false},
    {"double_blocks.0.processor.qkv_lora2",
     3,
     {DOUBLE "attn.add_q_proj", DOUBLE "attn.add_k_proj", DOUBLE "attn.add_v_proj"},
     false},
    {"double_blocks.0.processor.proj_lora1", 1, {DOUBLE "attn.to_out.0"}, false},
    {"double_blocks.0.processor.proj_lora2", 1, {DOUBLE "attn.to_add_out"}, false},
    {"single_blocks.1.processor.qkv_lora",
     3,
     {SINGLE(1) "attn.to_q", SINGLE(1) "attn.to_k", SINGLE(1) "attn.to_v"},
     false},
    {"single_blocks.1.processor.proj_lora", 1, {SINGLE(1) "proj_out"}, false}};
enum { XLABS = sizeof xlabs / sizeof *xlabs };
/* OneTrainer's: BFL's names, but with a number for each part of a fused layer. */
static const fused omi[] = {
    {"img_in.proj", 1, {"x_embedder"}, false},
    {"txt_in", 1, {"context_embedder"}, false},
    {"time_in.in_layer", 1, {"time_text_embed.timestep_embedder.linear_1"}, false},
    {"vector_in.out_layer", 1, {"time_text_embed.text_embedder.linear_2"}, false},
    {"guidance_in.in_layer", 1, {"time_text_embed.guidance_embedder.linear_1"}, false},
    {"final_layer.adaLN_modulation.1", 1, {"norm_out.linear"}, true},
    {"final_layer.linear", 1, {"proj_out"}, false},
    {"double_blocks.0.img_attn.qkv.0", 1, {DOUBLE "attn.to_q"}, false},
    {"double_blocks.0.img_attn.qkv.1", 1, {DOUBLE "attn.to_k"}, false},
    {"double_blocks.0.img_attn.qkv.2", 1, {DOUBLE "attn.to_v"}, false},
    {"double_blocks.0.txt_attn.qkv.0", 1, {DOUBLE "attn.add_q_proj"}, false},
    {"double_blocks.0.txt_attn.qkv.1", 1, {DOUBLE "attn.add_k_proj"}, false},
    {"double_blocks.0.txt_attn.qkv.2", 1, {DOUBLE "attn.add_v_proj"}, false},
    {"double_blocks.0.img_attn.proj", 1, {DOUBLE "attn.to_out.0"}, false},
    {"double_blocks.0.txt_mlp.2", 1, {DOUBLE "ff_context.net.2"}, false},
    {"double_blocks.0.img_mod.lin", 1, {DOUBLE "norm1.linear"}, false},
    {"single_blocks.1.linear1.0", 1, {SINGLE(1) "attn.to_q"}, false},
    {"single_blocks.1.linear1.1", 1, {SINGLE(1) "attn.to_k"}, false},
    {"single_blocks.1.linear1.2", 1, {SINGLE(1) "attn.to_v"}, false},
    {"single_blocks.1.linear1.3", 1, {SINGLE(1) "proj_mlp"}, false},
    {"single_blocks.1.linear2", 1, {SINGLE(1) "proj_out"}, false},
    {"single_blocks.1.modulation.lin", 1, {SINGLE(1) "norm.linear"}, false}};
enum { OMI = sizeof omi / sizeof *omi };
static const char *const bfl_norms[][2] = {
    {"double_blocks.0.img_attn.norm.query_norm.scale", DOUBLE "attn.norm_q.weight"},
    {"double_blocks.0.img_attn.norm.key_norm.scale", DOUBLE "attn.norm_k.weight"},
    {"double_blocks.0.txt_attn.norm.query_norm.scale", DOUBLE "attn.norm_added_q.weight"},
    {"double_blocks.0.txt_attn.norm.key_norm.scale", DOUBLE "attn.norm_added_k.weight"},
    {"single_blocks.0.norm.query_norm.scale", SINGLE(0) "attn.norm_q.weight"},
    {"single_blocks.0.norm.key_norm.scale", SINGLE(0) "attn.norm_k.weight"},
    {"single_blocks.1.norm.query_norm.scale", SINGLE(1) "attn.norm_q.weight"},
    {"single_blocks.1.norm.key_norm.scale", SINGLE(1) "attn.norm_k.weight"}};

static float *values(const sc_file *f, const char *name, int64_t *rows, int64_t *columns) {
    const sc_tensor *x = sc_file_find(f, name);
    float *v = x ? malloc((size_t)sc_count(x) * 4) : NULL;
    if (!v) printf("no '%s'\n", name), exit(1);
    sc_to_f32(v, x->data, x->dtype, sc_count(x));
    *rows = x->shape[0], *columns = x->ndim > 1 ? x->shape[1] : 0;
    return v;
}

static void swap_rows(float *x, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows / 2 * columns; i++) {
        float y = x[i];
        x[i] = x[i + rows / 2 * columns], x[i + rows / 2 * columns] = y;
    }
}

/* scaled: matrices as e4m3 with a scale each ("scale_weight"; "weight_scale", one a row). */
static void add_matrix(tensors *t, const char *name, float *v, int64_t rows, int64_t columns,
                       const char *scaled) {
    char full[200];
    if (!scaled) {
        add(t, name, SC_F32, rows, columns, v);
        return;
    }
    bool by_row = !strcmp(scaled, "weight_scale");
    uint8_t *bits = malloc((size_t)(rows * columns));
    float *scale = malloc((size_t)rows * 4);
    for (int64_t r = 0; r < rows; r++) {
        scale[r] = by_row ? 0.001f * (float)(r + 1) : 0.0625f;
        for (int64_t c = 0; c < columns; c++)
            bits[r * columns + c] = sc__f32_to_f8(v[r * columns + c] / scale[r]);
    }
    free(v);
    add(t, name, SC_F8_E4M3, rows, columns, bits);
    snprintf(full, sizeof full, "%.*s%s", (int)strlen(name) - 6, name, scaled);
    add(t, full, SC_F32, by_row ? rows : 0, 0, scale);
}

/* The reference's weights in BFL's layout. */
static tensors *to_bfl(const char *prefix, const char *scaled) {
    tensors *t = new_tensors();
    sc_file *f = sc_file_open(MODEL "/diffusion_pytorch_model.safetensors");
    char name[200];
    int64_t rows, columns;
    for (int i = 0; i < BFL; i++)
        for (int bias = 0; bias < 2; bias++) {
            float *all = NULL;
            int64_t total = 0;
            for (int p = 0; p < bfl[i].parts; p++) {
                snprintf(name, sizeof name, "%s.%s", bfl[i].part[p], bias ? "bias" : "weight");
                float *v = values(f, name, &rows, &columns);
                int64_t width = bias ? 1 : columns;
                all = realloc(all, (size_t)((total + rows) * width) * 4);
                memcpy(all + total * width, v, (size_t)(rows * width) * 4);
                total += rows;
                free(v);
            }
            if (bfl[i].swapped) swap_rows(all, total, bias ? 1 : columns);
            snprintf(name, sizeof name, "%s%s.%s", prefix, bfl[i].name, bias ? "bias" : "weight");
            if (bias) add(t, name, SC_F32, total, 0, all);
            else add_matrix(t, name, all, total, columns, scaled);
        }
    for (size_t i = 0; i < sizeof bfl_norms / sizeof *bfl_norms; i++) {
        float *v = values(f, bfl_norms[i][1], &rows, &columns);
        snprintf(name, sizeof name, "%s%s", prefix, bfl_norms[i][0]);
        add(t, name, SC_F32, rows, 0, v);
    }
    sc_file_close(f);
    return t;
}

/* ---- Weights ---- */

/* A folder with config.json and this file. */
static sc_dit *open_as(const tensors *t, const char *name) {
    size_t length;
    char *config = sc_read_file(MODEL "/config.json", &length), path[200];
    mkdir(in_folder(name), 0777);
    snprintf(path, sizeof path, "%s/config.json", name);
    CHECK(sc_write_file(in_folder(path), config, length));
    snprintf(path, sizeof path, "%s/flux.safetensors", name);
    save(t, path);
    free(config);
    return sc_dit_open(sc_cpu(), in_folder(name), NULL);
}

static float *merged_weight(const sc_dit *f, int i) {
    const sc_tensor *w = &f->net->weights[i]->tensor;
    float *v = sc__merged_values(f, w);
    CHECK(v);
    return v;
}

/* Largest difference of all weights, as a part of the largest value. */
static double difference(const sc_dit *a, const sc_dit *b) {
    double worst = 0, largest = 1e-30;
    CHECK(a && b && a->net->count == b->net->count);
    for (int i = 0; a && b && i < a->net->count; i++) {
        float *x = merged_weight(a, i), *y = merged_weight(b, i);
        for (int64_t j = 0; j < sc_count(&a->net->weights[i]->tensor); j++) {
            worst = fmax(worst, fabs((double)x[j] - y[j]));
            largest = fmax(largest, fabs(y[j]));
        }
        free(x), free(y);
    }
    return worst / largest;
}

static void test_layouts(void) {
    static const char *const prefixes[] = {"", "model.diffusion_model."};
    sc_dit *original = sc_dit_open(sc_cpu(), MODEL, NULL);
    if (!original) printf("%s (run the tests from the project's folder)\n", sc_error()), exit(1);
    for (int i = 0; i < 2; i++) {
        tensors *t = to_bfl(prefixes[i], NULL);
        sc_dit *f = open_as(t, "bfl");
        if (!f) printf("%s\n", sc_error());
        CHECK(f && difference(f, original) == 0);
        sc_dit_close(f);
        free_tensors(t);
    }
    /* 8 bits: products and merging see the same values; they are the originals', rounded. */
    static const char *const scales[] = {"scale_weight", "weight_scale"};
    for (int i = 0; i < 2; i++) {
        tensors *t = to_bfl("", scales[i]);
        sc_dit *f = open_as(t, "fp8"),
                *wide = sc_dit_open(sc_cpu(), in_folder("fp8"), &(sc_dit_options){.widen = true});
        CHECK(f && f->blocks[0].stream[0].q.weight->dtype == SC_F8_E4M3 &&
              f->blocks[0].stream[0].q.weight->scale);
        CHECK(difference(f, wide) == 0);
        CHECK(difference(f, original) < 0.1 && difference(f, original) > 0);
        sc_dit_close(f), sc_dit_close(wide);
        free_tensors(t);
    }
    sc_dit_close(original);
}

/* The scales of 8-bit weights as a row or a column, of parts of a fused layer, of a lone number. */
static void test_scale_shapes(void) {
    for (int column = 0; column < 2; column++) {
        tensors *t = new_tensors();
        uint8_t *bits = malloc(6 * 2);
        float *scales = malloc(6 * 4);
        for (int i = 0; i < 12; i++) bits[i] = sc__f32_to_f8((float)i);
        for (int i = 0; i < 6; i++) scales[i] = (float)(1 << i);
        add(t, "double_blocks.0.img_attn.qkv.weight", SC_F8_E4M3, 6, 2, bits);
        add(t, "double_blocks.0.img_attn.qkv.weight_scale", SC_F32, column ? 6 : 1, column ? 1 : 6,
            scales);
        add(t, "lone.weight", SC_F8_E4M3, 0, 0, calloc(1, 1));
        add(t, "lone.weight_scale", SC_F32, 0, 0, memcpy(malloc(4), scales, 4));
        sc_net *net = sc_net_open(sc_cpu(), save(t, "scales.safetensors"), false);
        const char *name = "transformer_blocks.0.attn.to_k.weight";
        sc_tensor *x = sc_net_weight(net, name, 2, (const int64_t[]){2, 2});
        float *v = x ? x->data : NULL;
        CHECK(v && v[0] == 4 * 4 && v[1] == 5 * 4 && v[2] == 6 * 8 && v[3] == 7 * 8);
        x = sc_net_weight(net, "lone.weight", 1, (const int64_t[]){1});
        CHECK(x && *(float *)x->data == 0);
        sc_net_close(net);
        free_tensors(t);
    }
    CHECK(sc__f32_to_f8(NAN) == 0x7f && sc__f32_to_f8(-INFINITY) == 0xfe);
}

/* Halves that change places, of more values than come to the backend at once; a tensor follows. */
static void test_large_halves(void) {
    enum { ROWS = 6, COLUMNS = 1 << 21 };
    tensors *t = new_tensors();
    uint8_t *bits = malloc(ROWS * COLUMNS);
    for (int i = 0; i < ROWS * COLUMNS; i++) bits[i] = sc__f32_to_f8((float)(i / COLUMNS + 1));
    add(t, "final_layer.adaLN_modulation.1.weight", SC_F8_E4M3, ROWS, COLUMNS, bits);
    add(t, "behind.weight", SC_F8_E4M3, ROWS, COLUMNS, calloc(ROWS, COLUMNS));
    sc_net *net = sc_net_open(sc_cpu(), save(t, "halves.safetensors"), false);
    sc_tensor *x =
        sc_net_weight(net, "norm_out.linear.weight", 2, (const int64_t[]){ROWS, COLUMNS});
    for (int i = 0; CHECKED(x) && i < ROWS; i++)
        CHECK(((float *)x->data)[i * COLUMNS] == (float)((i + ROWS / 2) % ROWS + 1));
    sc_net_close(net);
    free_tensors(t);
}

/* Shapes say the config where there is no config.json; these heads are too small for FLUX's axes.
 */
static void test_shapes(void) {
    tensors *t = to_bfl("", NULL);
    const char *path = save(t, "shapes.safetensors");
    CHECK(!sc_dit_open(sc_cpu(), path, NULL) && strstr(sc_error(), "axes_dims_rope"));
    sc_net *net = sc_net_open(NULL, path, false);
    sc_dit_config c;
    CHECK(!sc__dit_read_config(&c, &(sc__config){0}, net));
    CHECK(c.layers == 1 && c.single_layers == 2 && c.heads == 2 && c.head_size == 16 &&
          c.in_channels == 16 && c.text_channels == 24 && c.pooled_channels == 20);
    sc_net_close(net);
    free_tensors(t);
}

static void refused(sc_dit *f, const char *words) {
    CHECK(!f && strstr(sc_error(), words));
    if (f || !strstr(sc_error(), words)) printf("  not '%s': %s\n", words, sc_error());
    sc_dit_close(f);
}

static void test_bad_weights(void) {
    tensors *t = to_bfl("", "scale_weight");
    add(t, "scaled_fp8", SC_F8_E4M3, 2, 0, calloc(2, 1));
    int mark = t->count - 1;
    sc_dit *f = open_as(t, "bad");
    CHECK(f);
    sc_dit_close(f);
    float *scale = NULL;
    int lost = 0;
    for (int i = 0; i < t->count; i++)
        if (strstr(t->name[i], "img_attn.qkv.scale_weight")) scale = t->named[lost = i].tensor.data;
    *scale = NAN;
    refused(open_as(t, "bad"), "is not a positive number");
    *scale = 1;
    snprintf(t->name[lost], sizeof t->name[lost], "something.else");
    refused(open_as(t, "bad"), "without its '.scale_weight'");
    /* The mark of an all-in-one file's other part says nothing about this one's plain casts. */
    snprintf(t->name[mark], sizeof t->name[mark], "text_encoders.t5xxl.transformer.scaled_fp8");
    CHECK(f = open_as(t, "bad"));
    sc_dit_close(f);
    free_tensors(t);
    t = to_bfl("", NULL);
    float *bias = t->named[1].tensor.data; /* matrices are not read when they are opened */
    bias[3] = NAN;
    refused(open_as(t, "bad"), "holds a value that is nan");
    bias[3] = 0;
    t->named[0].tensor.shape[0]--;
    refused(open_as(t, "bad"), "must be [32,16] here");
    t->named[0].tensor.shape[0]++;
    snprintf(t->name[0], sizeof t->name[0], "img_out.weight");
    refused(open_as(t, "bad"), "'x_embedder.weight' is missing");
    free_tensors(t);
}

/* The reference's weights in diffusers' layout: half of them in one shard, half in another. */
static sc_dit *open_shards(const tensors *t, const char *second) {
    FILE *index = fopen(in_folder("bad/x.safetensors.index.json"), "w");
    fprintf(index, "{\"weight_map\": {");
    for (int i = 0; i < t->count; i++)
        fprintf(index, "%s\"%s\": \"%s\"", i ? ", " : "", t->name[i],
                i < t->count / 2 ? "1.safetensors" : second);
    fprintf(index, "}}");
    fclose(index);
    return sc_dit_open(sc_cpu(), in_folder("bad"), NULL);
}

static void test_model_shards(void) {
    sc_dit *original = sc_dit_open(sc_cpu(), MODEL, NULL);
    sc_file *f = sc_file_open(MODEL "/diffusion_pytorch_model.safetensors");
    tensors *t = new_tensors();
    int64_t rows, columns;
    for (int64_t i = 0; i < sc_file_count(f); i++) {
        float *v = values(f, sc_file_name(f, i), &rows, &columns);
        add(t, sc_file_name(f, i), SC_F32, rows, columns, v);
    }
    int n = t->count, half = n / 2;
    remove(in_folder("bad/flux.safetensors"));
    CHECK(sc_file_save(in_folder("bad/1.safetensors"), t->named, half, NULL));
    CHECK(sc_file_save(in_folder("bad/2.safetensors"), t->named + half, n - half, NULL));
    CHECK(sc_file_save(in_folder("2.safetensors"), t->named + half, n - half, NULL));
    sc_dit *whole = open_shards(t, "2.safetensors");
    CHECK(whole && difference(whole, original) == 0);
    char *path = sc_part_path(in_folder("bad"), SC_TRANSFORMER); /* not one of the shards */
    CHECK(path && strstr(path, "/x.safetensors.index.json"));
    free(path);
    float *matrix = NULL; /* a number that f16 has not, and one that is none */
    for (int i = 0; !matrix; i++)
        if (!strcmp(t->name[i], "x_embedder.weight")) matrix = t->named[i].tensor.data;
    for (int i = 0; i < 2; i++) {
        float before = matrix[1];
        matrix[1] = i ? NAN : 1e6f;
        CHECK(sc_file_save(in_folder("bad/1.safetensors"), t->named, half, NULL));
        CHECK(sc_file_save(in_folder("bad/2.safetensors"), t->named + half, n - half, NULL));
        sc_dit *odd = open_shards(t, "2.safetensors");
        CHECK(odd && !sc_dit_save(odd, in_folder("none"), i ? SC_F32 : SC_F16, NULL) &&
              strstr(sc_error(), "not written: 'x_embedder.weight'"));
        CHECK(access(in_folder("none"), F_OK));
        sc_dit_close(odd);
        matrix[1] = before;
    }
    CHECK(sc_file_save(in_folder("bad/1.safetensors"), t->named, half, NULL));
    CHECK(!sc_dit_save(original, in_folder("bad"), SC_F32, NULL) &&
          strstr(sc_error(), "x.safetensors.index.json: these shards would be read instead"));
    refused(open_shards(t, "3.safetensors"), "3.safetensors: No such file");
    refused(open_shards(t, "../2.safetensors"), "is not a plain file name");
    t->named[n - 1].tensor.shape[0]--; /* a shard of another model: the same names, other sizes */
    CHECK(sc_file_save(in_folder("bad/2.safetensors"), t->named + half, n - half, NULL));
    refused(open_shards(t, "2.safetensors"), "here");
    t->named[n - 1].tensor.shape[0]++;
    CHECK(sc_file_save(in_folder("bad/2.safetensors"), t->named + half, n - half - 1,
                       NULL)); /* or other names */
    refused(open_shards(t, "2.safetensors"), "is not in its shard '2.safetensors'");
    sc_dit_close(whole), sc_dit_close(original);
    sc_file_close(f);
    free_tensors(t);
}

/* ---- Where parts are ---- */

static void test_parts(void) {
    tensors *t = to_bfl("", NULL);
    char *path;
    mkdir(in_folder("parts"), 0777);
    CHECK(!sc_part_path(in_folder("parts"), SC_TRANSFORMER) &&
          strstr(sc_error(), "flux1-dev.safetensors"));
    save(t, "parts/mine.safetensors");
    CHECK((path = sc_part_path(in_folder("parts"), SC_TRANSFORMER)) &&
          strstr(path, "mine.safetensors"));
    free(path);
    CHECK((path = sc_part_path(in_folder("parts/mine.safetensors"), SC_TRANSFORMER)));
    free(path);
    CHECK(!sc_part_path(in_folder("parts/mine.safetensors"), SC_VAE) &&
          strstr(sc_error(), "ae.safetensors"));
    CHECK(!sc_part_path(in_folder("parts"), SC_T5) &&
          strstr(sc_error(), "t5xxl_fp16.safetensors"));
    save(t, "parts/other.safetensors");
    CHECK(!sc_part_path(in_folder("parts"), SC_TRANSFORMER) && strstr(sc_error(), "leave one"));
    CHECK(!sc__open_tokenizer(in_folder("parts"), "tokenizer", true) &&
          strstr(sc_error(), "copy the folder "));
    rename(in_folder("parts/mine.safetensors"), in_folder("parts/mine.sft"));
    remove(in_folder("parts/other.safetensors"));
    CHECK((path = sc_part_path(in_folder("parts"), SC_TRANSFORMER)) && strstr(path, "mine.sft"));
    free(path);
    rename(in_folder("parts/mine.sft"), in_folder("parts/mine.safetensors"));
    /* A download that stopped, and shards without their index, are named. */
    CHECK(!truncate(in_folder("parts/mine.safetensors"), 20000));
    CHECK(!sc_part_path(in_folder("parts/mine.safetensors"), SC_TRANSFORMER) &&
          strstr(sc_error(), "mine.safetensors: ") && strstr(sc_error(), "truncated"));
    mkdir(in_folder("parts/transformer"), 0777);
    save(t, "parts/transformer/1.safetensors");
    save(t, "parts/transformer/2.safetensors");
    CHECK(!sc_part_path(in_folder("parts"), SC_TRANSFORMER) &&
          strstr(sc_error(), "transformer: several *.safetensors here and no .index.json"));
    free_tensors(t);
}

/* ---- LoRA files ---- */

static const struct {
    const char *prefix, *a, *b;
    const fused *names; /* NULL: diffusers' modules */
    int count;
    bool alpha;
} dialects[] = {{"transformer.", ".lora_A.weight", ".lora_B.weight", NULL, 0, false},
                {"base_model.model.", ".lora_A.weight", ".lora_B.weight", NULL, 0, true},
                {"", ".lora_A.weight", ".lora_B.weight", NULL, 0, false},
                {"transformer.", ".lora.down.weight", ".lora.up.weight", NULL, 0, true},
                {"lora_transformer_", ".lora_down.weight", ".lora_up.weight", NULL, 0, true},
                {"lora_unet_", ".lora_down.weight", ".lora_up.weight", bfl, BFL, true},
                {"diffusion_model.", ".lora_A.weight", ".lora_B.weight", bfl, BFL, false},
                {"diffusion_model.", ".lora_down.weight", ".lora_up.weight", bfl, BFL, true},
                {"transformer.", ".lora_down.weight", ".lora_up.weight", omi, OMI, true},
                {"lycoris_", ".lora_down.weight", ".lora_up.weight", NULL, 0, true},
                {"", ".down.weight", ".up.weight", xlabs, XLABS, false}};

/* Random factors on every layer that a dialect names, in its names; w: what they add to each module.
 */
static tensors *random_lora(const sc_dit *f, int dialect, int rank, float alpha, uint64_t seed,
                            float **w) {
    tensors *t = new_tensors();
    sc_rng rng = {seed};
    const fused *fuse = dialects[dialect].names;
    for (int i = 0; i < (fuse ? dialects[dialect].count : f->module_count); i++) {
        const char *one[4] = {f->modules[fuse ? 0 : i].name};
        const char *const *parts = fuse ? fuse[i].part : one;
        int count = fuse ? fuse[i].parts : 1, module[4];
        int64_t out = 0, in = 0;
        for (int p = 0; p < count; p++) {
            for (module[p] = 0; strcmp(f->modules[module[p]].name, parts[p]); module[p]++) {}
            out += f->modules[module[p]].layer->weight->shape[0];
            in = f->modules[module[p]].layer->weight->shape[1];
        }
        float *a = malloc((size_t)(rank * in) * 4), *b = malloc((size_t)(rank * out) * 4),
              *own = malloc(4);
        sc_normal(&rng, a, rank * in), sc_normal(&rng, b, rank * out);
        float *ordered = malloc((size_t)(rank * out) * 4), *rows = ordered;
        memcpy(ordered, b, (size_t)(rank * out) * 4);
        if (fuse && fuse[i].swapped) swap_rows(ordered, out, rank);
        for (int p = 0; w && p < count; p++) {
            int64_t height = f->modules[module[p]].layer->weight->shape[0];
            for (int64_t r = 0; r < height; r++, rows += rank)
                for (int64_t c = 0; c < in; c++)
                    for (int k = 0; k < rank; k++)
                        w[module[p]][r * in + c] += alpha / (float)rank * rows[k] * a[k * in + c];
        }
        free(ordered);
        char name[160];
        snprintf(name, sizeof name, "%s", fuse ? fuse[i].name : parts[0]);
        for (char *c = name; dialects[dialect].prefix[0] == 'l' && *c; c++)
            *c = *c == '.' ? '_' : *c;
        char full[400];
        snprintf(full, sizeof full, "%s%s%s", dialects[dialect].prefix, name, dialects[dialect].a);
        add(t, full, SC_F32, rank, in, a);
        snprintf(full, sizeof full, "%s%s%s", dialects[dialect].prefix, name, dialects[dialect].b);
        add(t, full, SC_F32, out, rank, b);
        *own = alpha;
        snprintf(full, sizeof full, "%s%s.alpha", dialects[dialect].prefix, name);
        if (dialects[dialect].alpha) add(t, full, SC_F32, 0, 0, own);
        else free(own);
    }
    return t;
}

static float **zero_differences(const sc_dit *f) {
    float **w = calloc((size_t)f->module_count, sizeof *w);
    for (int i = 0; i < f->module_count; i++)
        w[i] = calloc((size_t)sc_count(f->modules[i].layer->weight), 4);
    return w;
}

/* Largest error of the merged differences, as a part of the largest value; frees w. */
static double merged_error(const sc_dit *f, const sc_dit *base, float **w) {
    double worst = 0, largest = 1e-30;
    for (int i = 0; i < f->module_count; i++) {
        const sc_tensor *x = f->modules[i].layer->weight, *y = base->modules[i].layer->weight;
        int64_t n = sc_count(x);
        float *a = sc__merged_values(f, x), *b = sc__merged_values(base, y);
        CHECK(a && b);
        for (int64_t j = 0; j < n; j++) {
            worst = fmax(worst, fabs((double)a[j] - b[j] - w[i][j]));
            largest = fmax(largest, fabs(w[i][j]));
        }
        free(a), free(b), free(w[i]);
    }
    free(w);
    return worst / largest;
}

static void test_dialects(void) {
    sc_dit *base = sc_dit_open(sc_cpu(), MODEL, NULL);
    sc_dit *f = sc_dit_open(sc_cpu(), MODEL, NULL);
    sc_lora_report report;
    for (int d = 0; d < (int)(sizeof dialects / sizeof *dialects); d++) {
        float **w = zero_differences(f);
        int rank = 1 + d, n = dialects[d].names ? dialects[d].count : f->module_count;
        tensors *t = random_lora(f, d, rank, dialects[d].alpha ? 2.5f : (float)rank, 5, w);
        CHECK(sc_lora_load(f, save(t, "lora.safetensors"), 1, &report));
        CHECK(report.applied == n && report.total == n && !*report.missed);
        CHECK(merged_error(f, base, w) < 1e-5);
        sc_lora_unload(f);
        free_tensors(t);
    }
    /* An alpha that is a whole number in the file. */
    float **whole = zero_differences(f);
    tensors *integers = random_lora(f, 5, 2, 6, 5, whole);
    for (int i = 0; i < integers->count; i++)
        if (integers->named[i].tensor.ndim == 0) {
            integers->named[i].tensor.data = realloc(integers->named[i].tensor.data, 8);
            *(int64_t *)integers->named[i].tensor.data = 6;
            integers->named[i].tensor.dtype = integers->named[i].dtype = SC_I64;
        }
    CHECK(sc_lora_load(f, save(integers, "lora.safetensors"), 1, &report));
    CHECK(merged_error(f, base, whole) < 1e-5);
    sc_lora_unload(f);
    free_tensors(integers);
    /* A layer whose alpha is missing: it is the rank. */
    float **one = zero_differences(f);
    tensors *lone = random_lora(f, 5, 4, 4, 5, one);
    lone->name[2][0] = 0; /* left out */
    sc_named left = lone->named[2];
    lone->named[2] = lone->named[--lone->count], lone->named[lone->count] = left;
    CHECK(sc_lora_load(f, save(lone, "lora.safetensors"), 1, &report) && !*report.missed);
    lone->count++;
    CHECK(merged_error(f, base, one) < 1e-5);
    sc_lora_unload(f);
    free_tensors(lone);
    /* Two files with scales, one of them negative, on top of each other; then both as kohya's. */
    float **w = zero_differences(f), **again = zero_differences(f);
    tensors *t = random_lora(f, 0, 3, 3 * 0.5f, 6, w), *u = random_lora(f, 5, 2, -2, 7, w);
    for (int i = 0; i < u->count; i++)
        if (u->named[i].tensor.ndim == 0) *(float *)u->named[i].tensor.data = 4;
    CHECK(sc_lora_load(f, save(t, "one.safetensors"), 0.5f, &report));
    CHECK(sc_lora_load(f, save(u, "two.safetensors"), -0.5f, &report));
    for (int i = 0; i < f->module_count; i++)
        memcpy(again[i], w[i], (size_t)sc_count(f->modules[i].layer->weight) * 4);
    CHECK(merged_error(f, base, w) < 1e-5);
    const char *path = in_folder("kohya.safetensors");
    CHECK(sc_lora_save_kohya(f, path, NULL));
    sc_lora_unload(f);
    CHECK(sc_lora_load(f, path, 1, &report) && report.applied == BFL && report.total == BFL);
    CHECK(merged_error(f, base, again) < 1e-2); /* its factors are bf16 */
    free_tensors(t), free_tensors(u);
    sc_dit_close(f), sc_dit_close(base);
}

/* What B A is multiplied by, where no tensor says it: PEFT's config beside its file or, with
 * diffusers, inside of it. The pattern of one name must not fit another that ends alike. */
static void test_lora_configs(void) {
    static const char *const configs[] = {
        "{\"lora_alpha\": 3, \"alpha_pattern\": {\"^proj_out\": 6, \"to_q\": 9, \"attn.to_q\": 1}}",
        "{\"lora_alpha\": 1.5, \"use_rslora\": true, \"alpha_pattern\": {\"^proj_out\": 3, "
        "\"attn.to_q\": 4.5, \"q\": 1}}",
        "{\"transformer.lora_alpha\": 3, \"transformer.use_rslora\": false, "
        "\"transformer.alpha_pattern\": {\"^proj_out\": 6, \"to_q\": 9}}",
        "{\"lora_alpha\": 1, \"alpha_pattern\": {\"attn.*\": 3}}", "{\"lora_alpha\": 1",
        "{\"lora_alpha\": \"3\"}", "{\"lora_alpha\": 3, \"alpha_pattern\": {\"to_q\": null}}",
        "{\"lora_alpha\": 3, \"use_rslora\": \"true\"}"};
    sc_dit *base = sc_dit_open(sc_cpu(), MODEL, NULL);
    sc_dit *f = sc_dit_open(sc_cpu(), MODEL, NULL);
    sc_lora_report report;
    mkdir(in_folder("peft"), 0777);
    for (int inside = 0; inside < 2; inside++)
        for (int i = 0; i < 8; i++) {
            float **w = zero_differences(f);
            tensors *t = random_lora(f, inside ? 0 : 2, 4, 3, 5, w);
            for (int m = 0; m < f->module_count; m++) {
                const char *name = f->modules[m].name, *last = strrchr(name, '.');
                float more = !strcmp(name, "proj_out") ? 2 : last && !strcmp(last, ".to_q") ? 3 : 1;
                for (int64_t j = 0; j < sc_count(f->modules[m].layer->weight); j++) w[m][j] *= more;
            }
            const char *path =
                in_folder(inside ? "inside.safetensors" : "peft/adapter_model.safetensors");
            const char *const metadata[] = {"lora_adapter_metadata", configs[i], NULL};
            CHECK(sc_file_save(path, t->named, t->count, inside ? metadata : NULL));
            CHECK(inside || sc_write_file(in_folder("peft/adapter_config.json"), configs[i],
                                           strlen(configs[i])));
            if (i < 3) CHECK(sc_lora_load(f, path, 1, &report) && merged_error(f, base, w) < 1e-5);
            else {
                CHECK(!sc_lora_load(f, path, 1, &report) &&
                      strstr(sc_error(), i == 7   ? "neither true nor false"
                                         : i > 4  ? "alpha is no number"
                                         : i == 3 ? "regular expression"
                                         : inside ? path
                                                  : "adapter_config"));
                CHECK(merged_error(f, base, zero_differences(f)) == 0);
                for (int m = 0; m < f->module_count; m++) free(w[m]);
                free(w);
            }
            sc_lora_unload(f);
            free_tensors(t);
        }
    sc_dit_close(f), sc_dit_close(base);
}

/* PEFT's patterns are of the names in the file: BFL's, whose layers are several modules here. */
static void test_lora_pattern_of_bfl(void) {
    static const char config[] = "{\"lora_alpha\": 3, \"alpha_pattern\": {\"img_attn.qkv\": 12, "
                                 "\"^double_blocks.0.txt_attn.proj\": 6, \"proj\": 3}}";
    sc_dit *base = sc_dit_open(sc_cpu(), MODEL, NULL);
    sc_dit *f = sc_dit_open(sc_cpu(), MODEL, NULL);
    sc_lora_report report;
    float **w = zero_differences(f);
    tensors *t = random_lora(f, 6, 4, 3, 7, w);
    for (int64_t i = 0; i < t->count; i++) { /* as get_peft_model_state_dict writes it */
        char name[200];
        snprintf(name, sizeof name, "base_model.model.%s", strchr(t->named[i].name, '.') + 1);
        strcpy((char *)t->named[i].name, name);
    }
    for (int m = 0; m < f->module_count; m++) {
        const char *name = f->modules[m].name;
        const char *to = strstr(name, "attn.to_");
        bool qkv = to && strchr("qkv", to[8]);
        float more = !strcmp(name, DOUBLE "attn.to_add_out") ? 2 : 1;
        if (qkv && strncmp(name, "single_", 7)) more = 4;
        for (int64_t j = 0; j < sc_count(f->modules[m].layer->weight); j++) w[m][j] *= more;
    }
    CHECK(sc_file_save(in_folder("peft/adapter_model.safetensors"), t->named, t->count, NULL));
    CHECK(sc_write_file(in_folder("peft/adapter_config.json"), config, strlen(config)));
    CHECK(sc_lora_load(f, in_folder("peft/adapter_model.safetensors"), 1, &report));
    CHECK(report.applied == report.total && merged_error(f, base, w) < 1e-5);
    free_tensors(t);
    sc_dit_close(f), sc_dit_close(base);
}

/* Of each vector that a file changes, in every form: at scale 0.5, twice, and taken off again. */
static void test_lora_vectors(void) {
    static const char *const forms[][3] = {
        {"transformer.x_embedder.lora_B.bias", "x_embedder.bias", "scaled"},
        {"diffusion_model.img_in.diff_b", "x_embedder.bias", ""},
        {"lora_unet_double_blocks_0_txt_attn_qkv.diff_b", DOUBLE "attn.add_k_proj.bias", "1/3"},
        {"final_layer.adaLN_modulation.1.bias", "norm_out.linear.bias", "swapped, instead"},
        {"double_blocks.0.img_attn.norm.key_norm.scale", DOUBLE "attn.norm_k.weight", "instead"},
        {"diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale.diff",
         DOUBLE "attn.norm_k.weight", ""},
        {"diffusion_model.single_blocks.1.norm.query_norm.diff", SINGLE(1) "attn.norm_q.weight",
         ""},
        {"base_model.model.proj_out.bias", "proj_out.bias", "instead"}};
    sc_dit *base = sc_dit_open(sc_cpu(), MODEL, NULL);
    sc_dit *f = sc_dit_open(sc_cpu(), MODEL, NULL);
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        tensors *t = random_lora(f, 0, 2, 2, 4, NULL); /* plain pairs beside it */
        const char *how = forms[i][2];
        int k = 0, part = *how == '1' ? 1 : 0;
        sc_rng rng = {9};
        sc_lora_report report;
        while (strcmp(f->net->weights[k]->name, forms[i][1])) k++;
        int64_t n = sc_count(&f->net->weights[k]->tensor), rows = *how == '1' ? 3 * n : n;
        float *v = malloc((size_t)rows * 4), *own = malloc(4);
        sc_normal(&rng, v, rows);
        *own = 3; /* alpha over rank 2 */
        add(t, forms[i][0], SC_F32, rows, 0, v);
        if (*how == 's' && how[1] == 'c') add(t, "transformer.x_embedder.alpha", SC_F32, 0, 0, own);
        else free(own);
        const char *path = save(t, "vectors.safetensors");
        CHECK(sc_lora_load(f, path, 0.5f, &report) && report.applied == report.total);
        CHECK(sc_lora_load(f, path, 0.5f, &report));
        float *got = merged_weight(f, k), *old = merged_weight(base, k);
        double worst = 0;
        for (int64_t j = 0; j < n; j++) {
            float add_to = v[part * n + (strstr(how, "swapped") ? (j + n / 2) % n : j)];
            float want = strstr(how, "instead") ? 0.25f * old[j] + 0.75f * add_to
                                                : old[j] + (*how == 's' ? 1.5f : 1) * add_to;
            worst = fmax(worst, fabs((double)got[j] - want));
        }
        CHECK(worst < 1e-5);
        if (worst >= 1e-5) printf("  %s: off by %g\n", forms[i][0], worst);
        CHECK(!sc_lora_save_kohya(f, in_folder("none.safetensors"), NULL) &&
              strstr(sc_error(), "is changed, which kohya's names"));
        sc_params *p = sc_params_lora(f, 2, 2, 1); /* training has no such numbers */
        CHECK(!sc_lora_start(p, path, 1) && strstr(sc_error(), i ? "not understood" : "the bias"));
        sc_params_free(p);
        free(got), free(old);
        sc_lora_unload(f);
        CHECK(difference(f, base) == 0);
        free_tensors(t);
    }
    sc_dit_close(f), sc_dit_close(base);
}

/* What is no LoRA is refused by its name, whatever else is in the file; nothing of a text encoder
 * counts so. */
static void test_other_adapters(void) {
    static const char *const kinds[][2] = {
        {"lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "LoKr"},
        {"lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a", "LoHa"},
        {"transformer.x_embedder.dora_scale", "DoRA"},
        {"transformer.x_embedder.lora_magnitude_vector", "DoRA"},
        {"lora_unet_img_in.oft_blocks", "OFT"},
        {"base_model.model.x_embedder.boft_R", "BOFT"},
        {"lora_unet_img_in.a1.weight", "GLoRA"},
        {"lora_unet_img_in.lora_mid.weight", "middle factor"},
        {"diffusion_model.img_in.diff", "differences of whole weights"},
        {"transformer.x_embedder.weight", "whole weights"},
        {"transformer.x_embedder.lora_A.other.weight", "something else"},
        {"lora_unet_img_in.alph", "a kind of tensors"},
        {"diffusion_model.img_in.reshape_weight", "a kind of tensors"}};
    sc_dit *f = sc_dit_open(sc_cpu(), MODEL, NULL);
    sc_lora_report report;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        for (int pairs = 0; pairs < 2; pairs++) {
            tensors *t = pairs ? random_lora(f, 0, 2, 2, 4, NULL) : new_tensors();
            add(t, kinds[i][0], SC_F32, 4, 2, calloc(8, 4));
            CHECK(!sc_lora_load(f, save(t, "other.safetensors"), 1, &report) &&
                  strstr(sc_error(), kinds[i][1]) && strstr(sc_error(), kinds[i][0]));
            if (!strstr(sc_error(), kinds[i][1])) printf("  %s: %s\n", kinds[i][0], sc_error());
            sc_lora_unload(f);
            free_tensors(t);
        }
    tensors *t = random_lora(f, 0, 2, 2, 4, NULL);
    add(t, "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", SC_F32, 4, 2, calloc(8, 4));
    CHECK(sc_lora_load(f, save(t, "other.safetensors"), 1, &report) &&
          strstr(report.missed, "lora_te1") && report.total == report.applied + 1);
    static const char *const configs[][2] = {{"{\"peft_type\": \"LOHA\"}", "LOHA"},
                                             {"{\"init_lora_weights\": \"pissa_niter_4\"}", "pissa"}};
    for (int i = 0; i < 2; i++) {
        const char *const metadata[] = {"lora_adapter_metadata", configs[i][0], NULL};
        CHECK(sc_file_save(in_folder("other.safetensors"), t->named, t->count, metadata));
        CHECK(!sc_lora_load(f, in_folder("other.safetensors"), 1, &report) &&
              strstr(sc_error(), configs[i][1]));
    }
    free_tensors(t);
    sc_dit_close(f);
}

/* Of a model's file: scales and blocks that nobody reads are errors, the rest is listed. */
static void test_unread(void) {
    static const struct { const char *name, *scaled, *message; } cases[] = {
        {"img_in.weight_scale_inv", "scale_weight", "'img_in.weight_scale_inv' is not understood"},
        {"img_in.weight_zero_point", "scale_weight", "not understood beside the 8-bit"},
        {"double_blocks.0.img_attn.qkv.qscale", "weight_scale", "not understood beside the 8-bit"},
        {"double_blocks.0.img_attn.qkv.input_scale", "scale_weight", NULL},
        {"img_in.comfy_quant", "weight_scale", NULL},
        {"double_blocks.1.img_mod.lin.weight", NULL, "of a block that the model does not have"},
        {"single_blocks.2.linear1.weight", "scale_weight", "of a block that"},
        {"single_blocks.17.what.ever", NULL, "of a block that"},
        {"text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.bias", NULL, ""},
        {"img_in.weight_scale_inv", NULL, ""},
        {"guidance_out.weight", NULL, ""},
        {"text_model.embeddings.position_ids", NULL, NULL}};
    char names[64];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tensors *t = to_bfl("", cases[i].scaled);
        add(t, cases[i].name, SC_F32, 1, 1, calloc(1, 4));
        sc_dit *f = open_as(t, "unread");
        if (cases[i].message && *cases[i].message) refused(f, cases[i].message);
        else {
            CHECK(f != NULL);
            const sc_net *nets[3] = {NULL, f ? f->net : NULL, f ? f->net : NULL};
            CHECK(sc_net_unread(nets, 3, names, sizeof names) == (cases[i].message != NULL));
            CHECK(cases[i].message ? strlen(cases[i].name) > 50 || strstr(names, cases[i].name)
                                   : !*names);
            sc_dit_close(f);
        }
        free_tensors(t);
    }
    tensors *t = to_bfl("", "weight_scale"); /* as many scales as rows, but of blocks */
    for (int i = 0; i < t->count; i++)
        if (strstr(t->name[i], "img_in.weight_scale")) {
            sc_tensor *x = &t->named[i].tensor;
            x->ndim = 2, x->shape[0] /= 2, x->shape[1] = 2;
        }
    refused(open_as(t, "unread"), "one number, or one a row");
    free_tensors(t);
}

/* A file whose data starts at an odd address is the same model. */
static void test_misaligned_model(void) {
    sc_dit *original = sc_dit_open(sc_cpu(), MODEL, NULL);
    size_t n, config;
    char *file = sc_read_file(MODEL "/diffusion_pytorch_model.safetensors", &n);
    char *text = sc_read_file(MODEL "/config.json", &config);
    uint64_t length = 0;
    memcpy(&length, file, 8); /* the tests' machines are little-endian */
    char *odd = malloc(n + 3);
    memcpy(odd, file, 8 + length);
    memcpy(odd + 8 + length, "   ", 3);
    memcpy(odd + 8 + length + 3, file + 8 + length, n - 8 - length);
    length += 3;
    memcpy(odd, &length, 8);
    mkdir(in_folder("odd"), 0777);
    CHECK(sc_write_file(in_folder("odd/model.safetensors"), odd, n + 3));
    CHECK(sc_write_file(in_folder("odd/config.json"), text, config));
    for (int widen = 0; widen < 2; widen++) {
        sc_dit *f = sc_dit_open(sc_cpu(), in_folder("odd"), &(sc_dit_options){.widen = widen});
        CHECK(f && sc_net_load(f->net) && difference(f, original) == 0);
        sc_dit_close(f);
    }
    free(odd), free(file), free(text);
    sc_dit_close(original);
}

static void test_bad_loras(void) {
    sc_dit *f = sc_dit_open(sc_cpu(), MODEL, NULL);
    sc_lora_report report;
    tensors *t = random_lora(f, 0, 2, 2, 8, NULL);
    snprintf(t->name[0], sizeof t->name[0], "transformer.y_embedder.lora_A.weight");
    snprintf(t->name[1], sizeof t->name[1], "transformer.y_embedder.lora_B.weight");
    CHECK(sc_lora_load(f, save(t, "lora.safetensors"), 1, &report));
    CHECK(report.applied == f->module_count - 1 && report.total == f->module_count);
    CHECK(strstr(report.missed, "y_embedder") != NULL);
    sc_lora_unload(f);
    add(t, "transformer.x_embedder.dora_scale", SC_F32, 4, 0, calloc(4, 4));
    for (int i = 0; i < t->count; i++)
        snprintf(t->name[i], sizeof t->name[i],
                 "lora_unet_down_blocks_%d_attentions_0_proj_in.lora_%s.weight", i / 2,
                 i % 2 ? "up" : "down");
    t->count--;
    CHECK(!sc_lora_load(f, save(t, "sdxl.safetensors"), 1, &report) && strstr(sc_error(), "0 of "));
    CHECK(strstr(report.missed, "down_blocks_0") && strstr(report.missed, "...") &&
          strlen(report.missed) < sizeof report.missed);
    t->count++;
    free_tensors(t);
    static const char *const words[] = {"has no partner", "another model", "holds NaN",
                                        "another model", ".alpha' is", "not understood: ",
                                        ".alpha' is"};
    for (int i = 0; i < 7; i++) {
        t = random_lora(f, 5, 2, 2, 8, NULL);
        if (i == 0) snprintf(t->name[1], sizeof t->name[1], "nothing");
        if (i == 1) t->named[1].tensor.shape[0]--;
        if (i == 2) ((float *)t->named[1].tensor.data)[3] = NAN;
        if (i == 3) t->named[0].tensor.shape[0]--;
        if (i == 4) *(float *)t->named[2].tensor.data = INFINITY;
        if (i == 5) snprintf(t->name[0], sizeof t->name[0], "other.alpha"); /* B has no A */
        if (i == 6) {
            sc_tensor *alpha = &t->named[2].tensor;
            alpha->data = realloc(alpha->data, 8), alpha->ndim = 1, alpha->shape[0] = 2;
            ((float *)alpha->data)[1] = 1;
        }
        CHECK(!sc_lora_load(f, save(t, "lora.safetensors"), 1, &report) &&
              strstr(sc_error(), words[i]));
        if (!strstr(sc_error(), words[i])) printf("  %s\n", sc_error());
        sc_lora_unload(f);
        sc_params *p = sc_params_lora(f, 2, 2, 1); /* training starts from none of them either */
        CHECK(!sc_lora_start(p, in_folder("lora.safetensors"), 1) &&
              strstr(sc_error(), i == 5 ? "no factors" : words[i]));
        sc_params_free(p);
        free_tensors(t);
    }
    sc_dit_close(f);
}

/* ---- The real names ---- */

static void test_real(void) {
    char path[1024];
    const char *real = getenv("SHORTCUT_FLUX_DIR");
    if (!real) {
        SKIP("SHORTCUT_FLUX_DIR is not set");
        return;
    }
    snprintf(path, sizeof path, "%s/transformer", real);
    sc_dit *f = sc_dit_open(NULL, path, &(sc_dit_options){.random = true});
    snprintf(path, sizeof path, "%s/transformer/diffusion_pytorch_model.safetensors.index.json",
             real);
    sc_json *index = sc_json_load(path);
    const sc_json *map = sc_json_get(index, "weight_map");
    CHECK(f && map);
    if (!f || !map) return;
    CHECK(f->net->count == sc_json_length(map) && f->module_count == 504);
    int64_t parameters = 0;
    for (int64_t i = 0; i < f->net->count; i++) {
        CHECK(sc_json_get(map, f->net->weights[i]->name));
        parameters += sc_count(&f->net->weights[i]->tensor);
    }
    CHECK(parameters == 11901408320);
    f->net->backend = sc_cpu(); /* of a plan: only shapes are needed for a LoRA */
    sc_params *p = sc_params_lora(f, 1, 0.5f, 3);
    CHECK(p && sc_lora_save(p, SC_STUDENT, in_folder("real.safetensors"), NULL));
    sc_params_free(p);
    sc_file *file = sc_file_open(in_folder("real.safetensors"));
    CHECK(file && sc_file_count(file) == 1008);
    for (int i = 0; file && i < f->module_count; i++) {
        snprintf(path, sizeof path, "transformer.%s.lora_A.weight", f->modules[i].name);
        const sc_tensor *a = sc_file_find(file, path);
        snprintf(path, sizeof path, "transformer.%s.lora_B.weight", f->modules[i].name);
        const sc_tensor *b = sc_file_find(file, path), *w = f->modules[i].layer->weight;
        CHECK(a && b && a->dtype == SC_BF16 && a->shape[0] == 1 && a->shape[1] == w->shape[1] &&
              b->dtype == SC_BF16 && b->shape[0] == w->shape[0] && b->shape[1] == 1);
    }
    sc_file_close(file);
    f->net->backend = NULL;
    sc_dit_close(f);
    sc_json_free(index);
}

static void remove_tree(const char *path) {
    DIR *list = opendir(path);
    for (struct dirent *e; list && (e = readdir(list));) {
        char inner[600];
        if (e->d_name[0] == '.') continue;
        snprintf(inner, sizeof inner, "%s/%s", path, e->d_name);
        if (remove(inner)) remove_tree(inner);
    }
    if (list) closedir(list);
    remove(path);
}

int main(void) {
    snprintf(folder, sizeof folder, "/tmp/test_formats_XXXXXX");
    if (!mkdtemp(folder)) return perror(folder), 1;
    test_layouts();
    test_scale_shapes();
    test_large_halves();
    test_shapes();
    test_bad_weights();
    test_unread();
    test_misaligned_model();
    test_model_shards();
    test_parts();
    test_dialects();
    test_lora_configs();
    test_lora_pattern_of_bfl();
    test_bad_loras();
    test_lora_vectors();
    test_other_adapters();
    test_real();
    remove_tree(folder);
    return test_report();
}
