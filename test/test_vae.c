/* The VAE against diffusers (test/reference/make_vae.py), its convolution and norm against plain
 * loops, strips against whole pictures, and bad configs. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "test.h"

#define REFERENCE TEST_DIR "/reference/"
#define TINY TEST_DIR "/../data/tiny-flux/vae"

/* ---- Operations against plain loops in double ---- */

static double conv_error(const sc_tensor *y, const sc_tensor *x, const sc_tensor *w,
                         const float *bias, int stride, int pad) {
    int64_t in = x->shape[1], out = y->shape[1], kernel = w->shape[2];
    float *want = malloc((size_t)sc_count(y) * sizeof *want),
          *wide = malloc((size_t)sc_count(w) * sizeof *wide);
    sc_to_f32(wide, w->data, w->dtype, sc_count(w));
    for (int64_t at = 0; at < sc_count(y); at++) {
        int64_t j = at % y->shape[3], i = at / y->shape[3] % y->shape[2];
        int64_t o = at / (y->shape[2] * y->shape[3]) % out,
                b = at / (y->shape[2] * y->shape[3] * out);
        double sum = bias ? bias[o] : 0;
        for (int64_t c = 0; c < in; c++)
            for (int64_t tap = 0; tap < kernel * kernel; tap++) {
                int64_t row = i * stride + tap / kernel - pad,
                        column = j * stride + tap % kernel - pad;
                if (row < 0 || column < 0 || row >= x->shape[2] || column >= x->shape[3]) continue;
                sum +=
                    (double)wide[(o * in + c) * kernel * kernel + tap] *
                    ((float *)x->data)[((b * in + c) * x->shape[2] + row) * x->shape[3] + column];
            }
        want[at] = (float)sum;
    }
    double error = rel_error(y->data, want, sc_count(y));
    free(want);
    free(wide);
    return error;
}

static sc_tensor *random_tensor(sc_tape *t, sc_rng *rng, int ndim, const int64_t *shape) {
    sc_tensor *x = sc_new(t, ndim, shape);
    sc_normal(rng, x->data, sc_count(x));
    return x;
}

static void test_conv(sc_tape *t, sc_rng *rng) {
    static const int cases[][8] = {
        /* B, in, out, H, W, kernel, stride, pad */
        {1, 1, 1, 1, 1, 1, 1, 0},     {1, 3, 5, 1, 1, 3, 1, 1},   {2, 5, 7, 11, 13, 3, 1, 1},
        {2, 5, 7, 12, 14, 3, 2, 0},   {3, 9, 2, 17, 1, 3, 1, 1},  {1, 4, 4, 1, 50, 3, 1, 1},
        {1, 3, 5, 33, 70, 5, 1, 2},   {5, 8, 16, 9, 49, 1, 1, 0}, {2, 3, 16, 64, 64, 3, 1, 1},
        {1, 300, 6, 10, 40, 3, 1, 1}, {1, 6, 4, 14, 10, 4, 2, 1}, {1, 16, 8, 30, 26, 3, 2, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int half = 0; half < 3; half++) {
            const int *k = cases[i];
            sc_tape_reset(t);
            sc_tensor *x = random_tensor(t, rng, 4, (int64_t[]){k[0], k[1], k[3], k[4]});
            sc_tensor *w = random_tensor(t, rng, 4, (int64_t[]){k[2], k[1], k[5], k[5]});
            sc_tensor *b = random_tensor(t, rng, 1, (int64_t[]){k[2]});
            uint16_t *raw = w->data;
            for (int64_t j = 0; half && j < sc_count(w); j++) {
                uint16_t bits = sc__f32_to_bf16(((float *)w->data)[j]);
                raw[j] = half == 1 ? bits : (uint16_t)(bits & 0xbfff) >> 1; /* some finite f16 */
            }
            w->dtype = (sc_dtype[]){SC_F32, SC_BF16, SC_F16}[half];
            sc_tensor *y = sc_conv2d(t, x, w, i % 3 ? b : NULL, k[6], k[7]);
            CHECK(y && y->shape[2] == k[3] / k[6] && y->shape[3] == k[4] / k[6]);
            double error = conv_error(y, x, w, i % 3 ? b->data : NULL, k[6], k[7]);
            CHECK_CLOSE(error, 0, 2e-6);
        }
}

static void test_norm(sc_tape *t, sc_rng *rng) {
    for (int silu = 0; silu < 2; silu++) {
        sc_tape_reset(t);
        sc_tensor *x = random_tensor(t, rng, 4, (int64_t[]){2, 6, 57, 31});
        sc_tensor *w = random_tensor(t, rng, 1, (int64_t[]){6}),
                  *b = random_tensor(t, rng, 1, (int64_t[]){6});
        float *px = x->data, *pw = w->data, *pb = b->data;
        int64_t pixels = 57 * 31, n = 3 * pixels;
        for (int64_t i = 0; i < sc_count(x); i++) px[i] = 3 * px[i] + 100; /* a mean that hurts */
        float *want = malloc((size_t)sc_count(x) * sizeof *want);
        for (int64_t g = 0; g < 4; g++) {
            double mean = 0, var = 0;
            for (int64_t i = g * n; i < (g + 1) * n; i++) mean += (double)px[i] / (double)n;
            for (int64_t i = g * n; i < (g + 1) * n; i++)
                var += (px[i] - mean) * (px[i] - mean) / (double)n;
            for (int64_t i = g * n; i < (g + 1) * n; i++) {
                int64_t c = i / pixels % 6;
                double v = (px[i] - mean) / sqrt(var + 1e-6) * pw[c] + pb[c];
                want[i] = (float)(silu ? v / (1 + exp(-v)) : v);
            }
        }
        sc_tensor *y = sc_group_norm(t, x, w, b, 2, 1e-6f, silu);
        CHECK_CLOSE(rel_error(y->data, want, sc_count(y)), 0, 5e-6);
        free(want);
    }
}

static void test_moves(sc_tape *t, sc_rng *rng) {
    sc_tape_reset(t);
    sc_tensor *x = random_tensor(t, rng, 4, (int64_t[]){2, 3, 5, 7}), *y = sc_upsample(t, x);
    float *px = x->data, *py = y->data;
    int wrong = 0;
    for (int64_t i = 0; i < sc_count(y); i++)
        wrong += py[i] != px[(i / 14 / 10 * 5 + i / 14 % 10 / 2) * 7 + i % 14 / 2];
    CHECK(y->shape[2] == 10 && y->shape[3] == 14 && !wrong);
    x = random_tensor(t, rng, 3, (int64_t[]){2, 37, 50});
    y = sc_swap_axes(t, x);
    px = x->data, py = y->data;
    for (int64_t i = 0; i < sc_count(y); i++)
        wrong += py[i] != px[i / 1850 * 1850 + i % 37 * 50 + i / 37 % 50];
    CHECK(y->shape[1] == 50 && y->shape[2] == 37 && !wrong);
}

/* ---- The network against diffusers ---- */

static void close_to(const char *what, const float *got, const sc_file *file, const char *name,
                     double tolerance) {
    const sc_tensor *want = sc_file_find(file, name);
    if (!CHECKED(want && want->dtype == SC_F32)) return;
    double error = rel_error(got, want->data, sc_count(want));
    printf("  %s %s: relative error %.2g\n", what, name, error);
    CHECK_CLOSE(error, 0, tolerance);
}

/* The posterior's halves, each of all samples. */
static bool encode(sc_vae *v, int64_t batch, int64_t height, int64_t width, const float *pictures,
                   float *mean, float *logvar, size_t memory) {
    int64_t f = sc_vae_factor(v), n = v->config.latent_channels * (height / f) * (width / f);
    float *posterior = malloc((size_t)(2 * batch * n) * 4);
    bool ok = sc_vae_encode(v, batch, height, width, pictures, posterior, memory);
    for (int64_t i = 0; i < 2 * batch; i++)
        memcpy((i % 2 ? logvar : mean) + i / 2 * n, posterior + i * n, (size_t)n * 4);
    free(posterior);
    return ok;
}

static void test_reference(const char *name, const char *folder, bool widen) {
    char path[300];
    snprintf(path, sizeof path, REFERENCE "%s/reference.safetensors", name);
    sc_file *file = sc_file_open(path);
    sc_vae *vae = sc_vae_open(sc_cpu(), folder, widen);
    if (!CHECKED(file && vae)) {
        printf("  %s\n", sc_error());
        sc_file_close(file);
        sc_vae_close(vae);
        return;
    }
    const sc_tensor *pictures = sc_file_find(file, "pictures"), *z = sc_file_find(file, "latents");
    const sc_tensor *even = sc_file_find(file, "even");
    const int64_t *s = pictures->shape, *l = even->shape;
    size_t n = (size_t)sc_count(z);
    float *mean = malloc(n * 4), *logvar = malloc(n * 4),
          *decoded = malloc((size_t)sc_count(pictures) * 4);
    CHECK(encode(vae, s[0], s[2], s[3], pictures->data, mean, logvar, 0));
    close_to(name, mean, file, "mean", 1e-5);
    close_to(name, logvar, file, "logvar", 1e-5);
    CHECK(sc_vae_decode(vae, z->shape[0], z->shape[2], z->shape[3], z->data, decoded, 0));
    close_to(name, decoded, file, "decoded", 1e-5);
    sc__pack(l[0], l[1], l[2], l[3], decoded, even->data, true);
    close_to(name, decoded, file, "tokens", 0);
    sc__pack(l[0], l[1], l[2], l[3], decoded, mean, false);
    close_to(name, mean, file, "even", 0);
    const sc_vae_config *c = sc_vae_config_of(vae);
    memcpy(mean, z->data, n * 4);
    memset(logvar, 0, n * 4);
    sc__vae_normalise(vae, (int64_t)n, mean, logvar);
    CHECK_CLOSE(mean[1], (((float *)z->data)[1] - c->shift) * c->scale, 1e-6);
    CHECK_CLOSE(logvar[1], c->scale, 1e-6);
    sc__vae_unnormalise(vae, (int64_t)n, mean);
    close_to(name, mean, file, "latents", 1e-6);
    CHECK(c->latent_channels == z->shape[1]);
    CHECK(!sc_vae_encode(vae, 1, s[2] + 1, s[3], pictures->data, decoded, 0));
    CHECK(!sc_vae_decode(vae, 1, 0, 4, z->data, mean, 0));
    free(mean);
    free(logvar);
    free(decoded);
    sc_vae_close(vae);
    sc_file_close(file);
}

/* Strips: whatever the memory, the same but for rounding. From the least, a few rows at a time, to
 * one piece. */
static void test_strips(const char *folder, int64_t batch, int64_t h, int64_t w) {
    sc_vae *vae = sc_vae_open(sc_cpu(), folder, true);
    if (!CHECKED(vae)) return;
    int64_t f = sc_vae_factor(vae), n = batch * vae->config.latent_channels * h * w;
    int64_t p = batch * 3 * f * f * h * w;
    float *memory = malloc((size_t)(5 * n + 2 * p) * 4), *z = memory, *whole = z + 5 * n;
    float *x = whole + p, *mean = z + n, *logvar = mean + 2 * n; /* and those of one piece after */
    sc_rng rng = {5};
    sc_normal(&rng, z, n);
    CHECK(sc_vae_decode(vae, batch, h, w, z, whole, 0));
    CHECK(encode(vae, batch, f * h, f * w, whole, mean + n, logvar + n, 0));
    size_t all = vae->peak, least = all;
    double far = 0;
    for (size_t limit = 1; limit <= all; limit = limit == 1 ? all / 12 : limit + limit / 2) {
        vae->peak = 0;
        memset(x, 0xff, (size_t)p * 4);
        CHECK(sc_vae_decode(vae, batch, h, w, z, x, limit));
        CHECK(encode(vae, batch, f * h, f * w, whole, mean, logvar, limit));
        far = fmax(far, rel_error(x, whole, p));
        far = fmax(far, fmax(rel_error(mean, mean + n, n), rel_error(logvar, logvar + n, n)));
        least = limit == 1 ? vae->peak : least;
        CHECK(vae->peak <= limit || vae->peak <= least + 4096);
        for (int i = 0; i < 5; i++) CHECK(sc_tape_bytes(vae->tapes[i]) == 0);
    }
    printf("  %dx%d pixels, from %d KiB down to %d: error %.2g\n", (int)(f * w), (int)(f * h),
           (int)(all >> 10), (int)(least >> 10), far);
    CHECK_CLOSE(far, 0, 1e-5);
    free(memory);
    sc_vae_close(vae);
}

/* ---- Bad configs: one line, nothing opened ---- */

static void test_bad(void) {
    static const char *const bad[][2] = {
        {"{", "config.json"},
        {"{}", "block_out_channels"},
        {"{\"_class_name\": \"AutoencoderTiny\"}", "AutoencoderTiny"},
        {"{\"block_out_channels\": [8, 12], \"norm_num_groups\": 8}", "multiples"},
        {"{\"block_out_channels\": [8, -8], \"norm_num_groups\": 8}", "multiples"},
        {"{\"block_out_channels\": [8,8,8,8,8,8,8,8,8], \"norm_num_groups\": 8}", "levels"},
        {"{\"block_out_channels\": [32], \"layers_per_block\": 1e9}", "layers_per_block"},
        {"{\"block_out_channels\": [32], \"latent_channels\": 0}", "latent_channels"},
        {"{\"block_out_channels\": [32], \"in_channels\": 4}", "3 channels"},
        {"{\"block_out_channels\": [32], \"act_fn\": \"relu\"}", "silu"},
        {"{\"block_out_channels\": [32], \"down_block_types\": [\"AttnDownEncoderBlock2D\"]}",
         "AttnDown"},
        {"{\"block_out_channels\": [32], \"scaling_factor\": 0}", "scaling_factor"},
        {"{\"block_out_channels\": [32], \"scaling_factor\": \"1\"}", "must be a number"},
        {"{\"block_out_channels\": [32], \"use_quant_conv\": \"false\"}", "must be a number"},
        {"{\"block_out_channels\": [32]}", "no weights"},
    };
    char folder[] = "/tmp/test_vae_XXXXXX", path[64];
    if (!CHECKED(mkdtemp(folder))) return;
    snprintf(path, sizeof path, "%s/config.json", folder);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK(sc_write_file(path, bad[i][0], strlen(bad[i][0])));
        sc_vae *vae = sc_vae_open(sc_cpu(), folder, false);
        if (!CHECKED(!vae && strstr(sc_error(), bad[i][1])))
            printf("  case %d: %s\n", (int)i, sc_error());
        sc_vae_close(vae);
    }
    remove(path);
    CHECK(!sc_vae_open(sc_cpu(), folder, false) && strstr(sc_error(), "no weights here"));
    rmdir(folder);
}

int main(void) {
    sc_tape *t = sc_tape_new(sc_cpu());
    sc_rng rng = {1};
    test_conv(t, &rng);
    test_norm(t, &rng);
    test_moves(t, &rng);
    sc_tape_free(t);
    test_reference("vae_a", REFERENCE "vae_a", false);
    test_reference("vae_b", REFERENCE "vae_b", false);
    test_reference("vae_b", REFERENCE "vae_b", true);
    test_reference("vae_c", REFERENCE "vae_c", false);
    if (sc__exists(TINY)) test_reference("vae_tiny", TINY, true);
    else SKIP("no data/tiny-flux/vae");
    test_strips(REFERENCE "vae_a", 1, 97, 19);
    test_strips(REFERENCE "vae_b", 3, 61, 7);
    test_strips(REFERENCE "vae_c", 1, 67, 9);
    test_bad();
    return test_report();
}
