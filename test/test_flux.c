/* The transformer, its gradients, LoRA, the SCFM target and AdamW against PyTorch
 * (test/reference/make_flux.py) and, against itself, checkpointing and LoRA files. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "test.h"

static float *load(const sc_file *f, const char *name) {
    const sc_tensor *x = sc_file_find(f, name);
    float *values = x ? malloc((size_t)sc_count(x) * 4 + 4) : NULL;
    if (x) sc_to_f32(values, x->data, x->dtype, sc_count(x));
    else printf("reference has no '%s'\n", name), exit(1);
    return values;
}

/* Differences of all tensors against the floor of 1e-6 times the whole gradient's norm. */
static double worst_error(double worst, const float *a, const float *b, int64_t n, double floor) {
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < n; i++)
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]), norm += (double)b[i] * b[i];
    return fmax(worst, sqrt(difference) / (sqrt(norm) + floor));
}

typedef struct fixture {
    sc_file *file;
    sc_dit *dit;
    sc_tape *tape;
    int64_t batch, text, n;
    int h, w;
    float *x, *context, *pooled, *time, *guidance, *goal;
} fixture;

static fixture open_fixture(const char *name) {
    char path[256];
    fixture f = {0};
    snprintf(path, sizeof path, "test/reference/%s/reference.safetensors", name);
    f.file = sc_file_open(path);
    snprintf(path, sizeof path, "test/reference/%s", name);
    f.dit = f.file ? sc_dit_open(sc_cpu(), path, &(sc_dit_options){.widen = true}) : NULL;
    if (!f.dit) printf("%s (run the tests from the project's folder)\n", sc_error()), exit(1);
    f.tape = sc_tape_new(sc_cpu());
    float *grid = load(f.file, "grid");
    f.h = (int)grid[0], f.w = (int)grid[1], f.text = (int64_t)grid[2];
    free(grid);
    f.batch = sc_file_find(f.file, "x")->shape[0];
    f.n = sc_count(sc_file_find(f.file, "x"));
    f.x = load(f.file, "x"), f.context = load(f.file, "context"), f.pooled = load(f.file, "pooled");
    f.time = load(f.file, "time"), f.guidance = load(f.file, "guidance"),
    f.goal = load(f.file, "goal");
    return f;
}

static void close_fixture(fixture *f) {
    free(f->x), free(f->context), free(f->pooled), free(f->time), free(f->guidance), free(f->goal);
    sc_tape_free(f->tape);
    sc_dit_close(f->dit);
    sc_file_close(f->file);
}

static sc_tensor *tensor(fixture *f, const float *values) {
    return sc_from(f->tape, 3,
                   (const int64_t[]){f->batch, (int64_t)f->h * f->w, f->dit->config.in_channels},
                   values);
}

/* One forward and backward pass; returns the velocity, valid until the tape is reset. */
static const float *run(fixture *f, const uint8_t *sets, bool backward, double *loss) {
    sc_tape_reset(f->tape);
    sc_tape_record(f->tape, backward);
    sc_tape_use(f->tape, sets);
    sc_dit_input in = {
        .x = tensor(f, f->x),
        .time = f->time,
        .guidance = f->guidance,
        .h = f->h,
        .w = f->w,
        .context =
            sc_from(f->tape, 3, (const int64_t[]){f->batch, f->text, f->dit->config.text_channels},
                    f->context),
        .pooled = sc_from(f->tape, 2, (const int64_t[]){f->batch, f->dit->config.pooled_channels},
                          f->pooled)};
    sc_tensor *v = sc_dit_velocity(f->dit, f->tape, &in);
    if (!v) printf("%s\n", sc_error()), exit(1);
    if (backward) CHECK(sc_mse(f->tape, v, tensor(f, f->goal), 1, loss) && sc_backward(f->tape));
    sc_tape_record(f->tape, false);
    return v->data;
}

static const uint8_t students[8] = {SC_STUDENT, SC_STUDENT, SC_STUDENT, SC_STUDENT};

/* ---- All weights ---- */

static void test_full(const char *name) {
    fixture f = open_fixture(name);
    float *velocity = load(f.file, "velocity"), *expected = load(f.file, "loss");
    sc_params *p = sc_params_full(f.dit, false);
    double loss = 0, worst = 0, norm;
    CHECK(rel_error(run(&f, students, true, &loss), velocity, f.n) < 1e-5);
    CHECK(fabs(loss / expected[0] - 1) < 1e-5);
    norm = sqrt(sc__sum_of_squares(p->grad, NULL, p->count));
    for (int64_t i = 0; i < f.dit->net->count; i++) {
        char key[192];
        sc_weight *w = f.dit->net->weights[i];
        snprintf(key, sizeof key, "grad.%.128s", w->name);
        float *grad = load(f.file, key);
        worst = worst_error(worst, w->tensor.grad, grad, sc_count(&w->tensor), 1e-6 * norm);
        free(grad);
    }
    printf("%s: largest error of %lld weight gradients %.1e\n", name, (long long)f.dit->net->count,
           worst);
    CHECK(worst < 1e-4);
    /* Checkpointing recomputes the same numbers. */
    float *plain = malloc((size_t)p->count * 4);
    memcpy(plain, p->grad, (size_t)p->count * 4);
    memset(p->grad, 0, (size_t)p->count * 4);
    sc_dit_checkpointing(f.dit, true);
    run(&f, students, true, &loss);
    CHECK(rel_error(p->grad, plain, p->count) < 1e-6);
    free(plain), free(velocity), free(expected);
    sc_params_free(p);
    close_fixture(&f);
}

/* flux_a's weights without its double block, and without its single ones; the numbers are those of
 * diffusers 0.35.2's FluxTransformer2DModel in f64: velocities, loss and norm of the gradient. */
static void test_no_blocks(void) {
    static const char config[] = "{\"in_channels\": 16, \"attention_head_dim\": 16, "
                                 "\"num_attention_heads\": 2, \"joint_attention_dim\": 24, "
                                 "\"pooled_projection_dim\": 20, \"guidance_embeds\": true, "
                                 "\"axes_dims_rope\": [4, 6, 6], \"num_layers\": %d, "
                                 "\"num_single_layers\": %d}";
    static const struct {
        int doubles, singles;
        float velocity[4];
        double loss, norm;
    } cases[] = {
        {0, 2, {0.82823380f, -0.37091499f, -0.63009407f, 0.60236659f}, 1.32832900, 0.99760497},
        {1, 0, {0.72641421f, -0.08941377f, -0.33292859f, 0.65862532f}, 1.33439386, 1.00940999}};
    const char *name = "diffusion_pytorch_model.safetensors", *none = "build/test-none";
    char text[400], path[128];
    fixture f = open_fixture("flux_a");
    CHECK(mkdir(none, 0777) == 0 || errno == EEXIST);
    snprintf(path, sizeof path, "%s/%s", none, name);
    CHECK(symlink("../../test/reference/flux_a/diffusion_pytorch_model.safetensors", path) == 0);
    snprintf(path, sizeof path, "%s/config.json", none);
    for (int i = 0; i < 2; i++) {
        snprintf(text, sizeof text, config, cases[i].doubles, cases[i].singles);
        CHECK(sc_write_file(path, text, strlen(text)));
        sc_dit_close(f.dit);
        f.dit = sc_dit_open(sc_cpu(), none, &(sc_dit_options){.widen = true});
        if (!f.dit) printf("%s\n", sc_error()), exit(1);
        sc_params *p = sc_params_full(f.dit, false);
        for (int checkpointing = 0; checkpointing < 2; checkpointing++) {
            double loss = 0;
            memset(p->grad, 0, (size_t)p->count * 4);
            sc_dit_checkpointing(f.dit, checkpointing);
            CHECK(rel_error(run(&f, students, true, &loss), cases[i].velocity, 4) < 1e-5);
            CHECK_CLOSE(loss, cases[i].loss, 1e-5);
            CHECK_CLOSE(sqrt(sc__sum_of_squares(p->grad, NULL, p->count)), cases[i].norm, 1e-5);
        }
        sc_params_free(p);
    }
    remove(path);
    snprintf(path, sizeof path, "%s/%s", none, name);
    remove(path), remove(none);
    close_fixture(&f);
}

/* Weights that were not opened to be trained are refused. */
static void test_not_wide(void) {
    sc_dit *f = sc_dit_open(sc_cpu(), "test/reference/flux_a", NULL);
    CHECK(f && !sc_params_full(f, false) && strstr(sc_error(), "`widen`"));
    sc_dit_close(f);
}

/* ---- LoRA ---- */

static void set_factors(fixture *f, sc_params *p) {
    char key[192];
    for (int s = 0; s < 3; s++)
        for (int i = 0; i < f->dit->module_count; i++)
            for (int part = 0; part < 2; part++) {
                sc_tensor *x =
                    part ? &p->adapters[i].b[SC_STUDENT + s] : &p->adapters[i].a[SC_STUDENT + s];
                snprintf(key, sizeof key, "lora%d.%s.%c", s, f->dit->modules[i].name,
                         part ? 'b' : 'a');
                float *values = load(f->file, key);
                memcpy(x->data, values, (size_t)sc_count(x) * 4);
                free(values);
            }
}

static void check_gradients(const char *name, const fixture *f, const sc_params *p,
                            const char *prefix) {
    double worst = 0, norm = sqrt(sc__sum_of_squares(p->grad, NULL, p->count));
    int n = f->dit->module_count;
    for (int i = 0; i < 2 * n; i++) {
        const sc_adapter *l = &p->adapters[i / 2];
        const sc_tensor *x = i % 2 ? &l->b[SC_STUDENT] : &l->a[SC_STUDENT];
        char key[192];
        snprintf(key, sizeof key, "%s.%s.%c", prefix, f->dit->modules[i / 2].name, "ab"[i % 2]);
        float *grad = load(f->file, key);
        worst = worst_error(worst, x->grad, grad, sc_count(x), 1e-6 * norm);
        free(grad);
    }
    printf("%s: largest error of %d gradients %s %.1e\n", name, 2 * n, prefix, worst);
    CHECK(worst < 1e-4);
}

static void test_lora(const char *name) {
    fixture f = open_fixture(name);
    float *velocity = load(f.file, "lora_velocity"), *base = load(f.file, "velocity");
    sc_params *p = sc_params_lora(f.dit, 3, 3 * 0.7f, 1);
    double loss;
    CHECK(rel_error(run(&f, students, false, &loss), base, f.n) <
          1e-5); /* B is zero: nothing changes */
    float first; /* of the seed's own stream, which draws the batches */
    sc_normal(&(sc_rng){1}, &first, 1);
    CHECK(*(float *)p->adapters[0].a[SC_STUDENT].data != first / 3);
    set_factors(&f, p);
    CHECK(rel_error(run(&f, students, true, &loss), velocity, f.n) < 1e-5);
    check_gradients(name, &f, p, "lora_grad");
    /* Each sample has its own set: the first is the base's, the others the student's. */
    uint8_t mixed[8] = {SC_TEACHER, SC_STUDENT, SC_STUDENT, SC_STUDENT};
    const float *v = run(&f, mixed, false, &loss);
    int64_t one = f.n / f.batch;
    CHECK(rel_error(v, base, one) < 1e-5 && rel_error(v + one, velocity + one, f.n - one) < 1e-5);
    free(velocity), free(base);
    sc_params_free(p);
    close_fixture(&f);
}

/* Saved, loaded and merged, a LoRA does what it did in training, up to its bf16. */
static void test_lora_file(void) {
    fixture f = open_fixture("flux_a");
    const char *path = "build/test-lora.safetensors";
    float *velocity = load(f.file, "lora_velocity");
    sc_params *p = sc_params_lora(f.dit, 3, 3 * 0.7f, 1);
    sc_lora_report report;
    double loss;
    set_factors(&f, p);
    CHECK(sc_lora_save(p, SC_STUDENT, path, (const char *[]){"scales", "3:1@1.5 8:0.5", NULL}));
    sc_params_free(p);
    CHECK(sc_lora_load(f.dit, path, 1, &report));
    CHECK(report.applied == f.dit->module_count && report.total == report.applied);
    float guidance = 2; /* which stays where none is recommended */
    CHECK(sc_lora_scale(path, 9, &guidance) == 0.5f && guidance == 2);
    CHECK(sc_lora_scale(path, 4, &guidance) == 1 && guidance == 1.5f);
    CHECK(sc_lora_scale(path, 4, NULL) == 1);
    CHECK(rel_error(run(&f, NULL, false, &loss), velocity, f.n) < 5e-3);
    float *loaded = malloc((size_t)f.n * 4);
    memcpy(loaded, run(&f, NULL, false, &loss), (size_t)f.n * 4);
    CHECK(sc_dit_save(f.dit, "build/test-merged", SC_F32, NULL)); /* with the LoRA in it */
    sc_dit_close(f.dit);
    f.dit = sc_dit_open(sc_cpu(), "build/test-merged", &(sc_dit_options){.widen = true});
    CHECK(f.dit && rel_error(run(&f, NULL, false, &loss), loaded, f.n) < 1e-5);
    remove("build/test-merged/config.json");
    remove("build/test-merged/diffusion_pytorch_model.safetensors");
    remove("build/test-merged");
    fixture other = open_fixture("flux_b");
    CHECK(!sc_lora_load(other.dit, path, 1, &report));
    CHECK(strstr(sc_error(), "another model") != NULL);
    sc_lora_unload(other.dit);
    close_fixture(&other);
    free(velocity), free(loaded);
    close_fixture(&f);
    remove(path);
}

/* ---- The SCFM target ---- */

static void texts_of(const fixture *f, sc_text texts[8]) {
    const sc_dit_config *c = sc_dit_config_of(f->dit);
    for (int64_t i = 0; i < 8 && i < f->batch; i++)
        texts[i] = (sc_text){f->context + i * f->text * c->text_channels,
                             f->pooled + i * c->pooled_channels, false};
}

/* cfg: the teacher's, and the averages'. */
static void check_target(const char *name, const char *expected_name, float cfg, float own) {
    fixture f = open_fixture(name);
    sc_params *p = sc_params_lora(f.dit, 3, 3 * 0.7f, 1);
    float *x0 = load(f.file, "x0"), *noise = load(f.file, "noise"), *table = load(f.file, "draws");
    float *times = load(f.file, "times"), *noisy = load(f.file, "noisy"),
          *expected = load(f.file, expected_name);
    float *no_context = load(f.file, "no_context"), *no_pooled = load(f.file, "no_pooled");
    sc_draw draws[8];
    set_factors(&f, p);
    for (int i = 0; i < f.batch; i++) {
        draws[i] = (sc_draw){.teacher = table[4 * i] != 0, .steps = (int)table[4 * i + 1],
                             .j = (int)table[4 * i + 2], .shift = table[4 * i + 3],
                             .guidance = f.guidance[i], .cfg = {cfg, own}};
        for (int k = 0; k < 3; k++)
            draws[i].t[k] =
                sc_shift_time(1 - (float)(draws[i].j + k) / (float)draws[i].steps, draws[i].shift);
        draws[i].t[0] = fminf(draws[i].t[0], 1 - 1e-5f);
        CHECK(rel_error(draws[i].t, times + 3 * i, 3) < 1e-6);
    }
    sc_tape_reset(f.tape);
    sc__dit_model self = {.dit = f.dit, .params = p, .h = f.h, .w = f.w};
    sc_text texts[8];
    texts_of(&f, texts);
    CHECK(sc__dit_text(&self, f.tape, (int)f.batch, (int)f.text, texts,
                        (sc_text){no_context, no_pooled, false}));
    sc_model model = {sc__dit_model_velocity, &self};
    sc_tensor *x = sc_noisy(f.tape, draws, tensor(&f, x0), tensor(&f, noise)),
              *target = tensor(&f, x0);
    CHECK(sc_scfm_target(&model, f.tape, draws, 0, x, target));
    CHECK(rel_error(x->data, noisy, f.n) < 1e-6);
    CHECK(rel_error(target->data, expected, f.n) < 1e-5);
    printf("%s: error of the SCFM target, %s, %.1e\n", name, expected_name,
           rel_error(target->data, expected, f.n));
    if (cfg != 1 && own == cfg) { /* the student's gradient goes through both evaluations */
        const float scales[8] = {cfg, cfg, cfg, cfg};
        double loss;
        sc_tape_record(f.tape, true);
        const sc_query query = {0, students, f.time, f.guidance, scales};
        sc_tensor *v = sc__dit_model_velocity(&self, f.tape, tensor(&f, f.x), &query);
        CHECK(sc_mse(f.tape, v, tensor(&f, f.goal), 1, &loss) && sc_backward(f.tape));
        check_gradients(name, &f, p, "cfg_grad");
        sc_tape_record(f.tape, false);
    }
    free(x0), free(noise), free(table), free(times), free(noisy), free(expected);
    free(no_context), free(no_pooled);
    sc_params_free(p);
    close_fixture(&f);
}

static void test_scfm(const char *name) {
    check_target(name, "target", 1, 1);
    check_target(name, "cfg_folded", 2.5f, 1);
    check_target(name, "cfg_student", 2.5f, 2.5f);
}

/* Three steps of true CFG. */
static void test_cfg_sample(void) {
    fixture f = open_fixture("flux_b"); /* without a guidance input */
    float *x = load(f.file, "noise"), *expected = load(f.file, "cfg_sample");
    float *no_context = load(f.file, "no_context"), *no_pooled = load(f.file, "no_pooled");
    sc_sampling s = {.steps = 3, .shift = 3, .cfg = 2.5f, .h = f.h, .w = f.w,
                     .no_text = {no_context, no_pooled, false}};
    sc_text texts[8];
    texts_of(&f, texts);
    CHECK(sc_sample(f.dit, f.tape, &s, (int)f.batch, (int)f.text, texts, x));
    CHECK(rel_error(x, expected, f.n) < 1e-5);
    printf("error of a sample with true CFG %.1e\n", rel_error(x, expected, f.n));
    s.no_text.context = NULL;
    CHECK(!sc_sample(f.dit, f.tape, &s, (int)f.batch, (int)f.text, texts, x) &&
          strstr(sc_error(), "negative prompt"));
    free(x), free(expected), free(no_context), free(no_pooled);
    close_fixture(&f);
}

/* What chance decides stays in its bounds, and covers them. */
static void test_draws(void) {
    sc_recipe r = {.teacher_ratio = 0.4f,
                   .teacher_steps = 32,
                   .self_steps = {2, 4, 8, 16},
                   .shift = {2.5f, 4.5f},
                   .dynamic_shift_ratio = 0.1f,
                   .guidance = {0, 7.5f}};
    sc_rng rng = {1};
    int teacher = 0, seen[33] = {0}, bad = 0;
    for (int i = 0; i < 10000; i++) {
        sc_draw d;
        sc_draw_sample(&r, &rng, 1024, false, &d);
        teacher += d.teacher;
        seen[d.steps]++;
        bad += d.j % 2 || d.j < 0 || d.j > d.steps - 2 ||
               !(d.t[0] > d.t[1] && d.t[1] > d.t[2] && d.t[2] >= 0 && d.t[0] < 1);
        bad += d.guidance < 0 || d.guidance > 7.5f;
    }
    CHECK(bad == 0);
    CHECK(abs(teacher - 4000) < 200);
    CHECK(seen[32] == teacher && abs(seen[2] - 1500) < 150 && abs(seen[16] - 1500) < 150);
}

/* Half of 8 samples is 4; a quarter of one sample is one in four times. */
static void test_part_of_batch(void) {
    sc_rng rng = {5}, before = rng;
    CHECK(sc__part_of(8, 0.5f, &rng) == 4 && sc__part_of(8, 0, &rng) == 0);
    CHECK(sc__part_of(8, 1, &rng) == 8 && rng.state == before.state);
    int sum = 0, outside = 0;
    for (int i = 0; i < 10000; i++) {
        int64_t n = sc__part_of(1, 0.25f, &rng);
        sum += (int)n, outside += n < 0 || n > 1;
    }
    CHECK(outside == 0);
    CHECK_CLOSE(sum, 2500, 200);
}

/* Steps that nobody asks about are nobody else's; the last few are kept. */
static void test_reports(void) {
    fixture f = open_fixture("flux_a");
    sc_adamw o = {.lr = 1e-3f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f};
    double loss, norm;
    for (int kept = 0; kept < 2; kept++) {
        sc_params *p = sc_params_lora(f.dit, 2, 2, 1);
        CHECK(!sc_params_report(p, &loss, &norm));
        for (int i = 0; i < 6; i++) p->results[0] = 10 * kept + i, sc_params_step(p, &o, 0, 0);
        for (int i = 2; kept && i < 6; i++)
            CHECK(sc_params_report(p, &loss, &norm) && loss == 10 + i && norm == 0);
        CHECK(!kept || !sc_params_report(p, &loss, &norm));
        sc_params_free(p);
    }
    close_fixture(&f);
}

static void test_adamw(void) {
    sc_file *f = sc_file_open("test/reference/adamw.safetensors");
    float *w = load(f, "start"), *grads = load(f, "grads"), *end = load(f, "end"), m[500] = {0},
          v[500] = {0};
    sc_adamw o = {.lr = 3e-3f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .weight_decay = 0.1f};
    for (; o.step < 10; o.step++) {
        const sc_params x = {.count = 500, .set = {[SC_STUDENT] = w}, .grad = grads + 500 * o.step,
                             .m = m, .v = v};
        double norm;
        sc_cpu()->update(&x, &o, (const float[2]){0, 0}, &norm);
    }
    printf("error after ten AdamW steps %.1e\n", rel_error(w, end, 500));
    CHECK(rel_error(w, end, 500) < 1e-5);
    free(w), free(grads), free(end);
    sc_file_close(f);
}

/* FLUX.1's dynamic shift and another one; no steps, no samples or no shift are refused. */
static void test_sampling(void) {
    fixture f = open_fixture("flux_a");
    int64_t n = f.n / f.batch;
    float *latents = malloc((size_t)n * 4);
    sc_mu flux = {0}, other = {1, 2, 100, 300};
    CHECK_CLOSE(sc_dynamic_shift(&flux, 256), exp(0.5), 1e-6);
    CHECK_CLOSE(sc_dynamic_shift(&flux, 4096), exp(1.15), 1e-6);
    CHECK_CLOSE(sc_dynamic_shift(&other, 200), exp(1.5), 1e-6);
    sc_sampling s = {.steps = 2, .guidance = 2, .h = f.h, .w = f.w, .shift = 3};
    const sc_text text = {f.context, f.pooled, false};
    memcpy(latents, f.x, (size_t)n * 4);
    CHECK(sc_sample(f.dit, f.tape, &s, 1, f.text, &text, latents));
    CHECK(memcmp(latents, f.x, (size_t)n * 4));
    CHECK(!sc_sample(f.dit, f.tape, &s, 0, f.text, &text, latents));
    s.steps = 0;
    CHECK(!sc_sample(f.dit, f.tape, &s, 1, f.text, &text, latents) &&
          strstr(sc_error(), "0 steps"));
    s.steps = 2, s.shift = 0;
    CHECK(!sc_sample(f.dit, f.tape, &s, 1, f.text, &text, latents) &&
          strstr(sc_error(), "shift of 0"));
    free(latents);
    close_fixture(&f);
}

int main(void) {
    if (mkdir("build", 0777) && errno != EEXIST) return 1;
    test_full("flux_a"), test_full("flux_b");
    test_no_blocks();
    test_not_wide();
    test_lora("flux_a"), test_lora("flux_b");
    test_sampling();
    test_lora_file();
    test_scfm("flux_a"), test_scfm("flux_b");
    test_cfg_sample();
    test_draws();
    test_part_of_batch();
    test_reports();
    test_adamw();
    return test_report();
}
