/* make bench-cuda: the GPU against its own ceilings, measured in the same run.
 *
 * C is the rate of an 8192 cubed bf16 product on random data, C8 that of the same with fp8 weights
 * (x rounded in each run), B the rate of a large copy, bytes read and written. An operation's floor
 * is what its arithmetic takes at C, or at C8, or what its bytes take at B, whichever is longer
 * (what only reads, or finds its input in the L2 cache, may take less). A training step's useful
 * work is four forward passes: the student's, its gradient's and two targets'. FLUX.1-dev is run at
 * full size with random weights. Times are medians.
 *
 * build/bench_cuda [operations] [bf16] [fp8] [small]    without a name: all four
 * bf16, fp8: training at batch 8 and sampling; small: training at batch 1 where only 23 GiB are
 * left, as on a card of 24. build/bench_cuda attention: once each way, to be looked at by ncu. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include <time.h>

bool sc_cuda_wgmma(void); /* of shortcut_cuda.cu: whether attention uses it */

static const sc_backend *gpu;
static double ceiling, ceiling8, bandwidth; /* FLOP/s, bytes/s */
static sc_rng rng = {1};

static void stop(void) { printf("error: %s\n", sc_error()), exit(1); }

static void wait(void) {
    static void *word;
    uint32_t x;
    if (!word && !(word = gpu->alloc(4))) stop();
    if (!gpu->download(&x, word, 4)) stop();
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

typedef void (*work)(sc_tensor **x);

/* Seconds of one run: the median of 7 groups, each long enough for the clock. */
static double time_of(work f, sc_tensor **x) {
    double times[7], start = (f(x), wait(), seconds());
    f(x), wait();
    int count = (int)(0.03 / (seconds() - start)) + 1;
    for (int i = 0; i < 7; i++) {
        start = seconds();
        for (int j = 0; j < count; j++) f(x);
        wait();
        times[i] = (seconds() - start) / count;
    }
    qsort(times, 7, sizeof *times, ascending);
    return times[3];
}

static sc_tensor *tensor(sc_dtype dtype, int64_t a, int64_t b, int64_t c, bool grad) {
    sc_tensor *x = calloc(1, sizeof *x);
    *x = (sc_tensor){.dtype = dtype, .ndim = 3, .shape = {a, b, c}};
    int64_t n = sc_count(x), block = 1 << 20, size = sc_dtype_size(dtype);
    static float values[1 << 20];
    static uint16_t half[1 << 20];
    sc_normal(&rng, values, block);
    for (int64_t i = 0; i < block; i++) half[i] = sc__f32_to_bf16(values[i]);
    void **parts[2] = {&x->data, &x->grad};
    for (int k = 0; k < 1 + grad; k++) {
        if (!(*parts[k] = gpu->alloc((size_t)(n * size)))) stop();
        for (int64_t i = 0; i < n; i += block)
            gpu->upload((char *)*parts[k] + i * size, size == 2 ? (void *)half : values,
                        (size_t)((n - i < block ? n - i : block) * size));
    }
    x->needs_grad = grad;
    return x;
}

static void drop(sc_tensor **x, int count) {
    for (int i = 0; i < count; i++) {
        gpu->release(x[i]->data);
        if (x[i]->grad) gpu->release(x[i]->grad);
        free(x[i]);
    }
}

static void report_at(double rate, const char *name, double t, double flops, double bytes) {
    double floor = fmax(flops / rate, bytes / bandwidth);
    printf("%-44s %9.3f ms %8.1f TFLOP/s %7.0f GB/s  floor %8.3f ms, reached %3.0f%%\n", name,
           1e3 * t, flops / t / 1e12, bytes / t / 1e9, 1e3 * floor, 100 * floor / t);
    fflush(stdout);
}
static void report(const char *name, double t, double flops, double bytes) {
    report_at(ceiling, name, t, flops, bytes);
}

/* ---- Ceilings ---- */

static void product(sc_tensor **x) { /* y = x w^T */
    int64_t m = x[0]->shape[1], k = x[0]->shape[2], n = x[1]->shape[1];
    gpu->gemm(m, n, k, 1, sc__whole(x[0], false), sc__whole(x[1], true), 0, sc__whole(x[2], false),
              NULL);
}
static void product_back(sc_tensor **x) { /* x = y w, as for the gradient of x */
    int64_t m = x[0]->shape[1], k = x[0]->shape[2], n = x[1]->shape[1];
    gpu->gemm(m, k, n, 1, sc__whole(x[2], false), sc__whole(x[1], false), 0, sc__whole(x[0], false),
              NULL);
}
static void gelu_into(sc_tensor **x, sc_tensor *before) { /* y = gelu(x w^T + y) */
    int64_t m = x[0]->shape[0] * x[0]->shape[1], k = x[0]->shape[2], n = x[1]->shape[1];
    gpu->gemm_gelu(m, n, k, sc__whole(x[0], false), sc__whole(x[1], true), 1,
                   sc__whole(x[2], false), NULL, before);
}
static void linear_gelu(sc_tensor **x) { gelu_into(x, NULL); }
static void linear_gelu_kept(sc_tensor **x) { gelu_into(x, x[3]); }
static void product_lora(sc_tensor **x) { /* y += x w^T + bias: LoRA's part is in y */
    int64_t m = x[0]->shape[1], k = x[0]->shape[2], n = x[1]->shape[1];
    gpu->gemm(m, n, k, 1, sc__whole(x[0], false), sc__whole(x[1], true), 1, sc__whole(x[2], false),
              x[3]);
}
static void copy(sc_tensor **x) {
    int64_t n = sc_count(x[0]);
    gpu->copy_block(x[1]->data, n, x[0]->data, n, 1, n, SC_BF16, false);
}
static void copy_by_library(sc_tensor **x) {
    gpu->download(x[1]->data, x[0]->data, 2 * (size_t)sc_count(x[0]));
}

/* w [1,n,k] as e4m3. */
static sc_tensor narrowed(const sc_tensor *w) {
    sc_tensor x = *w;
    int64_t n = w->shape[1], k = w->shape[2];
    x.dtype = SC_F8_E4M3;
    if (!(x.data = gpu->alloc((size_t)(n * k))) || !(x.scale = gpu->alloc((size_t)n * 4))) stop();
    gpu->quantize(x.data, x.scale, w->data, n, k);
    return x;
}

static void measure_ceilings(void) {
    int64_t n = 8192;
    double flops = 2.0 * 8192 * 8192 * 8192, bytes = 4.0 * (double)((int64_t)1 << 29);
    sc_tensor *x[3] = {tensor(SC_BF16, 1, n, n, false), tensor(SC_BF16, 1, n, n, false),
                       tensor(SC_BF16, 1, n, n, false)};
    ceiling = flops / time_of(product, x);
    sc_tensor narrow = narrowed(x[1]), *x8[3] = {x[0], &narrow, x[2]};
    ceiling8 = flops / time_of(product, x8);
    gpu->release(narrow.data), gpu->release(narrow.scale);
    drop(x, 3);
    sc_tensor *y[2] = {tensor(SC_BF16, 1, 1, (int64_t)1 << 29, false),
                       tensor(SC_BF16, 1, 1, (int64_t)1 << 29, false)};
    bandwidth = bytes / fmin(time_of(copy, y), time_of(copy_by_library, y));
    drop(y, 2);
    printf("%s: product ceiling C = %.0f TFLOP/s (fp8: %.0f), copy B = %.0f GB/s; attention by %s\n",
           gpu->name, ceiling / 1e12, ceiling8 / 1e12, bandwidth / 1e9,
           sc_cuda_wgmma() ? "wgmma" : "mma");
}

/* ---- Operations at FLUX's sizes: batch 8 of 1024 + 256 tokens, or one of 4096 + 512 ---- */

enum { HEADS = 24, CHANNELS = 3072 };

static void attention(sc_tensor **x) {
    gpu->attention(x[3], x[4]->data, x[0], x[1], x[2], HEADS, 0.088f, NULL, false);
}
static void attention_backward(sc_tensor **x) {
    gpu->attention_backward(x[3], x[4]->data, x[0], x[1], x[2], HEADS, 0.088f);
}
static void ln_modulate(sc_tensor **x) { gpu->ln_modulate(x[2], x[0], x[1], 0, 1); }
static void ln_modulate_backward(sc_tensor **x) {
    gpu->ln_modulate_backward(x[2], x[0], x[1], 0, 1);
}
static void gated_residual(sc_tensor **x) { gpu->gated_residual(x[3], x[0], x[2], x[1], 2); }
static void gated_residual_backward(sc_tensor **x) {
    gpu->gated_residual_backward(x[3], x[0], x[2], x[1], 2);
}
static void activate(sc_tensor **x) { gpu->activate(SC_GELU_TANH, x[1], 0, x[0]); }
static void activate_backward(sc_tensor **x) {
    gpu->activate_backward(SC_GELU_TANH, x[1], 0, x[0]);
}
static void norm_rope(sc_tensor **x) { gpu->norm_rope(x[3], 0, x[0], x[1], x[2]); }
static void norm_rope_backward(sc_tensor **x) {
    gpu->norm_rope_backward(x[3], 0, x[0], x[1], x[2]);
}
static void update(sc_tensor **x) {
    const sc_params all = {.count = sc_count(x[0]),
                           .set = {NULL, x[0]->data, x[4]->data, x[5]->data},
                           .grad = x[1]->data,
                           .m = x[2]->data,
                           .v = x[3]->data};
    const sc_adamw o = {.lr = 1e-6f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-3f, .clip = 10};
    static double *norm;
    if (!norm && !(norm = gpu->alloc(sizeof *norm))) stop();
    gpu->update(&all, &o, (const float[2]){0.99f, 0.999f}, norm);
}

static void attention_tensors(sc_tensor **x, int64_t batch, int64_t tokens) {
    for (int i = 0; i < 4; i++) x[i] = tensor(SC_BF16, batch, tokens, CHANNELS, true);
    x[4] = tensor(SC_F32, batch, HEADS, tokens, false);
}

static void measure_attention(int64_t batch, int64_t tokens) {
    sc_tensor *x[5];
    char name[64];
    attention_tensors(x, batch, tokens);
    double n = (double)batch * (double)tokens, flops = 4 * n * (double)tokens * CHANNELS,
           bytes = n * CHANNELS * 2;
    snprintf(name, sizeof name, "attention %lldx%lld", (long long)batch, (long long)tokens);
    report(name, time_of(attention, x), flops, 4 * bytes);
    snprintf(name, sizeof name, "attention backward %lldx%lld", (long long)batch,
             (long long)tokens);
    report(name, time_of(attention_backward, x), 2.5 * flops, 11 * bytes);
    drop(x, 5);
}

static void measure_products(int64_t rows) {
    static const int64_t shapes[][2] = {{3072, 3072},  {12288, 3072}, {3072, 12288},
                                        {3072, 15360}, {64, 3072},    {12288, 64}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        int64_t n = shapes[i][0], k = shapes[i][1];
        sc_tensor *x[3] = {tensor(SC_BF16, 1, rows, k, false), tensor(SC_BF16, 1, n, k, false),
                           tensor(SC_BF16, 1, rows, n, false)};
        double flops = 2.0 * (double)rows * (double)n * (double)k,
               bytes = 2.0 * (double)(rows * k + n * k + rows * n);
        char name[64];
        snprintf(name, sizeof name, "linear %lld -> %lld, %lld rows", (long long)k, (long long)n,
                 (long long)rows);
        report(name, time_of(product, x), flops, bytes);
        report("  backward", time_of(product_back, x), flops, bytes);
        if (n > 64 && k > 64) {
            double more = 2.0 * (double)(rows * n), less = (double)(n * k);
            sc_tensor *bias = tensor(SC_F32, 1, 1, n, false), *z[4] = {x[0], x[1], x[2], bias};
            report("  with bias and LoRA's part", time_of(product_lora, z), flops, bytes + more);
            sc_tensor narrow = narrowed(x[1]), *y[3] = {x[0], &narrow, x[2]};
            report_at(ceiling8, "  fp8", time_of(product, y), flops, bytes - less);
            report_at(ceiling8, "  fp8, backward", time_of(product_back, y), flops, bytes - less);
            gpu->release(narrow.data), gpu->release(narrow.scale);
            drop(&bias, 1);
        }
        drop(x, 3);
    }
}

static void measure_operations(void) {
    int64_t batch = 8, tokens = 1280;
    double n = (double)(batch * tokens) * CHANNELS * 2; /* bytes of an activation */
    sc_tensor *x[4] = {tensor(SC_BF16, batch, tokens, CHANNELS, true),
                       tensor(SC_BF16, batch, 3 * CHANNELS, 1, true),
                       tensor(SC_BF16, batch, tokens, CHANNELS, true),
                       tensor(SC_BF16, batch, tokens, CHANNELS, true)};
    x[1]->ndim = 2;
    report("modulated layer norm", time_of(ln_modulate, x), 0, 2 * n);
    report("modulated layer norm, backward", time_of(ln_modulate_backward, x), 0, 4 * n);
    report("gated residual", time_of(gated_residual, x), 0, 3 * n);
    report("gated residual, backward", time_of(gated_residual_backward, x), 0, 6 * n);
    drop(x, 4);
    sc_tensor *r[4] = {tensor(SC_BF16, batch, tokens, CHANNELS, true),
                       tensor(SC_F32, 128, 1, 1, false), tensor(SC_F32, tokens, 64, 2, false),
                       tensor(SC_BF16, batch, tokens, CHANNELS, true)};
    report("QK-norm + RoPE", time_of(norm_rope, r), 0, 2 * n);
    report("QK-norm + RoPE, backward", time_of(norm_rope_backward, r), 0, 4 * n);
    drop(r, 4);
    sc_tensor *a[2] = {tensor(SC_BF16, batch, tokens, 4 * CHANNELS, true),
                       tensor(SC_BF16, batch, tokens, 4 * CHANNELS, true)};
    report("GELU", time_of(activate, a), 0, 8 * n);
    report("GELU, backward", time_of(activate_backward, a), 0, 16 * n);
    drop(a, 2);
    sc_tensor *g[4] = {tensor(SC_BF16, batch, tokens, CHANNELS, false),
                       tensor(SC_BF16, 1, 4 * CHANNELS, CHANNELS, false),
                       tensor(SC_BF16, batch, tokens, 4 * CHANNELS, false),
                       tensor(SC_BF16, batch, tokens, 4 * CHANNELS, false)};
    double flops = 2.0 * (double)(batch * tokens) * CHANNELS * 4 * CHANNELS;
    report("linear 3072 -> 12288 and GELU", time_of(linear_gelu, g), flops, 9 * n);
    report("  what went into it kept", time_of(linear_gelu_kept, g), flops, 13 * n);
    drop(g, 4);
    sc_tensor *u[6];
    for (int i = 0; i < 6; i++) u[i] = tensor(SC_F32, 1, 1, (int64_t)1 << 27, false);
    gpu->zero(u[3]->data, (size_t)4 << 27); /* a second moment is not negative */
    report("AdamW and averages, 134 M numbers", time_of(update, u), 0,
           52.0 * (1 << 27)); /* the gradient twice */
    drop(u, 6);
    measure_attention(8, 1280);
    measure_attention(1, 4608);
    measure_attention(1, 8704);
    measure_products(10240);
}

/* ---- FLUX.1-dev ---- */

static const char config[] = "{\"_class_name\": \"FluxTransformer2DModel\", \"in_channels\": 64, "
                             "\"num_layers\": 19, \"num_single_layers\": 38, "
                             "\"attention_head_dim\": 128, \"num_attention_heads\": 24, "
                             "\"joint_attention_dim\": 4096, \"pooled_projection_dim\": 768, "
                             "\"guidance_embeds\": true, \"axes_dims_rope\": [16, 56, 56]}";

/* One pass over one picture: 24 C^2 and 4 T C for each token and block, and the embedders. */
static double forward_flops(double image, double text) {
    double c = CHANNELS, t = image + text;
    return 57 * t * (24 * c * c + 4 * t * c) + 2 * c * (image * 64 * 2 + text * 4096);
}

static sc_dit *open_flux(bool fp8) {
    mkdir("build/bench_flux", 0777);
    if (!sc_write_file("build/bench_flux/config.json", config, strlen(config))) stop();
    const sc_dit_options options = {.random = true, .seed = 1, .fp8 = fp8};
    sc_dit *f = sc_dit_open(gpu, "build/bench_flux", &options);
    if (!f) stop();
    return f;
}

static float *normal(int64_t n) {
    float *x = malloc((size_t)n * 4);
    sc_normal(&rng, x, n);
    return x;
}

/* The official loss at 512 x 512: 1024 + 256 tokens, rank 64. */
static double measure_training(sc_dit *f, int batch, const char *weights) {
    sc_params *p = sc_params_lora(f, 64, 64, 1);
    sc_tape *t = sc_tape_new(gpu);
    if (!p || !t) stop();
    sc_text *texts = malloc((size_t)batch * sizeof *texts);
    for (int i = 0; i < batch; i++)
        texts[i] = (sc_text){.context = normal((int64_t)256 * 4096), .pooled = normal(768)};
    sc_batch b = {.size = batch,
                  .h = 32,
                  .w = 32,
                  .text_tokens = 256,
                  .x0 = normal(batch * 65536),
                  .noise = normal(batch * 65536),
                  .texts = texts};
    sc_recipe recipe = {.teacher_ratio = 0.4f,
                        .teacher_steps = 32,
                        .self_steps = {2, 4, 8, 16},
                        .shift = {2.5f, 4.5f},
                        .guidance = {0, 7.5f}};
    sc_adamw adamw = {.lr = 2e-5f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .clip = 10};
    sc_memory_plan plan;
    if (!sc_plan_memory(f, p, t, &recipe, &b, &plan)) stop();
    double times[7], loss, norm = 0, last = 0;
    for (int i = 0; i < 9;
         i++) { /* as ./train does: a step is asked about when the next is queued */
        if (!sc_train_gradient(f, p, t, &recipe, &b, &rng)) stop();
        sc_params_step(p, &adamw, 0.99f, 0.999f);
        if (i > 0 && !sc_params_report(p, &loss, &norm)) stop();
        if (i > 1) times[i - 2] = seconds() - last;
        last = seconds();
    }
    if (!sc_params_report(p, &loss, &norm)) stop();
    if (!isfinite(loss) || !isfinite(norm)) sc_fail("loss %g, gradient %g", loss, norm), stop();
    qsort(times, 7, sizeof *times, ascending);
    double flops = 4 * batch * forward_flops(1024, 256);
    printf("SCFM step, 512x512, batch %d, rank 64, %s: %.3f s, %.0f useful TFLOP/s, %.0f%% of C; "
           "%d of %d blocks kept%s, %.1f GiB left; "
           "loss %.3f, gradient %.3g\n",
           batch, weights, times[3], flops / times[3] / 1e12, 100 * flops / times[3] / ceiling,
           plan.kept, plan.blocks, plan.remade ? " but what is cheap" : "",
           (double)gpu->memory_left() / (1 << 30), loss, norm);
    fflush(stdout);
    free((void *)b.x0), free((void *)b.noise);
    for (int i = 0; i < batch; i++) free(texts[i].context), free(texts[i].pooled);
    free(texts);
    sc_tape_free(t);
    sc_params_free(p);
    return times[3];
}

static void measure_sampling(sc_dit *f, const char *weights) {
    sc_tape *t = sc_tape_new(gpu);
    float *latents = normal(4096 * 64), *context = normal(512 * 4096), *pooled = normal(768),
          *noise = normal(4096 * 64);
    sc_sampling s = {.steps = 3, .shift = 3.16f, .guidance = 3.5f, .h = 64, .w = 64};
    const sc_text text = {.context = context, .pooled = pooled};
    double times[5];
    for (int i = -1; i < 5; i++) {
        memcpy(latents, noise, 4096 * 64 * 4);
        double start = seconds();
        if (!sc_sample(f, t, &s, 1, 512, &text, latents)) stop();
        if (i >= 0) times[i] = seconds() - start;
    }
    qsort(times, 5, sizeof *times, ascending);
    double flops = 3 * forward_flops(4096, 512);
    printf("3 steps at 1024x1024, %s: %.3f s, %.0f TFLOP/s, %.0f%% of C\n", weights, times[2],
           flops / times[2] / 1e12, 100 * flops / times[2] / ceiling);
    fflush(stdout);
    free(latents), free(context), free(pooled), free(noise);
    sc_tape_free(t);
}

/* Batch 1, fp8, where a ballast leaves 23 GiB for model and training: what a card of 24 has. The
 * model is made first, as a random one is bf16 at the beginning. */
static void measure_small_card(void) {
    size_t all = gpu->memory_left(), wanted = (size_t)23 << 30;
    sc_dit *f = open_flux(true);
    void *ballast = all > wanted ? gpu->alloc(all - wanted) : NULL;
    printf("where 23 GiB were free, %.1f GiB of them behind the model: ",
           (double)gpu->memory_left() / (1 << 30));
    measure_training(f, 1, "fp8 weights");
    sc_dit_close(f);
    if (ballast) gpu->release(ballast);
}

int main(int argc, char **argv) {
    static const char *const names[] = {"operations", "bf16", "fp8", "small", "attention"};
    enum { OPERATIONS, BF16, FP8, SMALL, ATTENTION, PARTS };
    bool chosen[PARTS] = {false};
    for (int i = 1, j; i < argc; i++) {
        for (j = 0; j < PARTS && strcmp(argv[i], names[j]); j++) continue;
        if (j == PARTS)
            return fprintf(stderr, "error: '%s' is not operations, bf16, fp8, small or attention\n",
                           argv[i]),
                   2;
        chosen[j] = true;
    }
    gpu = sc_cuda();
    if (!gpu) return printf("skipped: %s\n", sc_error()), 0;
    if (chosen[ATTENTION]) {
        sc_tensor *x[5];
        attention_tensors(x, 8, 1280);
        attention(x), attention_backward(x), wait();
        return 0;
    }
    measure_ceilings();
    if (argc < 2 || chosen[OPERATIONS]) measure_operations();
    double step[2] = {0, 0};
    for (int i = 0; i < 2; i++) {
        if (argc > 1 && !chosen[i ? FP8 : BF16]) continue;
        const char *weights = i ? "fp8 weights" : "bf16";
        rng.state = 1; /* of both the same data */
        sc_dit *f = open_flux(i);
        step[i] = measure_training(f, 8, weights);
        measure_sampling(f, weights);
        sc_dit_close(f);
    }
    if (step[0] > 0 && step[1] > 0)
        printf("fp8 is %.2f times as fast as bf16\n", step[0] / step[1]);
    if (argc < 2 || chosen[SMALL]) measure_small_card();
    double first = ceiling;
    measure_ceilings();
    printf("C at the end is %.2f of C at the beginning\n", ceiling / first);
    return 0;
}
