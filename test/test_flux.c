/* The transformer, its gradients, LoRA, the SCFM target and AdamW against PyTorch
 * (test/reference/make_flux.py) and, against itself, checkpointing and LoRA files. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "dit.h"

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
    char text[400];
    fixture f = open_fixture("flux_a");
    for (int i = 0; i < 2; i++) {
        snprintf(text, sizeof text, config, cases[i].doubles, cases[i].singles);
        sc_dit_close(f.dit);
        f.dit = open_with_config("flux_a", text);
        if (!f.dit) printf("%s\n", sc_error()), exit(1);
        sc_params *p = sc_params_full(f.dit, false);
        for (int checkpointing = 0; checkpointing < 2; checkpointing++) {
            double loss = 0;
            memset(p->grad, 0, (size_t)p->count * 4);
            sc_dit_checkpointing(f.dit, checkpointing);
            CHECK(rel_error(run(&f, students, &loss), cases[i].velocity, 4) < 1e-5);
            CHECK_CLOSE(loss, cases[i].loss, 1e-5);
            CHECK_CLOSE(sqrt(sc__sum_of_squares(p->grad, NULL, p->count)), cases[i].norm, 1e-5);
        }
        sc_params_free(p);
    }
    close_fixture(&f);
}

/* Weights that were not opened to be trained are refused. */
static void test_not_wide(void) {
    sc_dit *f = sc_dit_open(sc_cpu(), "test/reference/flux_a", NULL);
    CHECK(f && !sc_params_full(f, false) && strstr(sc_error(), "`widen`"));
    sc_dit_close(f);
}

/* ---- LoRA ---- */

/* Saved, loaded and merged, a LoRA does what it did in training, up to its bf16. */
static void test_lora_file(void) {
    fixture f = open_fixture("flux_a");
    const char *path = "build/test-lora.safetensors";
    float *velocity = load(f.file, "lora_velocity");
    sc_params *p = sc_params_lora(f.dit, f.rank, (float)f.rank * f.scale, 1);
    sc_lora_report report;
    set_factors(&f, p);
    CHECK(sc_lora_save(p, SC_STUDENT, path, (const char *[]){"scales", "3:1@1.5 8:0.5", NULL}));
    sc_params_free(p);
    CHECK(sc_lora_load(f.dit, path, 1, &report));
    CHECK(report.applied == f.dit->module_count && report.total == report.applied);
    sc_file *file = sc_file_open(path);
    const char *scales = sc_file_metadata(file, "scales");
    double scale, guidance;
    CHECK(sc_scale_for(scales, 9, &scale, &guidance) && scale == 0.5 && isnan(guidance));
    CHECK(sc_scale_for(scales, 4, &scale, &guidance) && scale == 1 && guidance == 1.5);
    sc_file_close(file);
    CHECK(rel_error(run(&f, NULL, NULL), velocity, f.n) < 5e-3);
    float *loaded = malloc((size_t)f.n * 4);
    memcpy(loaded, run(&f, NULL, NULL), (size_t)f.n * 4);
    CHECK(sc_dit_save(f.dit, "build/test-merged", SC_F32, NULL)); /* with the LoRA in it */
    sc_dit_close(f.dit);
    f.dit = sc_dit_open(sc_cpu(), "build/test-merged", &(sc_dit_options){.widen = true});
    CHECK(f.dit && rel_error(run(&f, NULL, NULL), loaded, f.n) < 1e-5);
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

/* ---- Draws, steps and samples ---- */

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

static bool has_memory;
static void *scarce(size_t bytes) {
    return has_memory ? sc_cpu()->alloc(bytes) : (sc_fail("nothing left"), NULL);
}

/* A step for which there is no memory leaves no half of a gradient, and the student in place. */
static void test_out_of_memory(void) {
    fixture f = open_fixture("flux_a");
    sc_backend be = *sc_cpu();
    be.alloc = scarce;
    sc_recipe r = {.teacher_ratio = 0.5f, .teacher_steps = 8, .self_steps = {4}, .shift = {3, 3},
                   .guidance = {2, 2}, .fm_ratio = 0.3f};
    const sc_batch batch = {f.batch, f.h, f.w, f.text, 0, 0, f.x, f.x, f.texts, f.no_text};
    sc_params *p = sc_params_full(f.dit, true);
    const float *weight = f.dit->x_embedder.weight->data;
    bool done = false;
    int failed = 0;
    CHECK(!sc_params_full(f.dit, true) && strstr(sc_error(), "trained already"));
    CHECK(!sc_lora_save(p, SC_STUDENT, "build/none", NULL) && strstr(sc_error(), "no LoRA"));
    for (size_t kib = 4; !done; kib += 1 + kib / 16) {
        sc_tape *t = sc_tape_new(&be);
        has_memory = true;
        CHECK(sc_tape_reserve(t, kib << 10));
        has_memory = false;
        sc_rng rng = {7};
        done = sc_train_gradient(f.dit, p, t, &r, &batch, &rng);
        double sum = sc__sum_of_squares(p->grad, NULL, p->count);
        if (!done && (sum || strcmp(sc_error(), "nothing left"))) CHECK(!"a part is left");
        CHECK(f.dit->x_embedder.weight->data == weight && (!done || sum > 0));
        failed += !done;
        sc_tape_free(t);
    }
    CHECK(failed > 20);
    r.shift[1] = 0;
    CHECK(!sc_train_gradient(f.dit, p, f.tape, &r, &batch, &(sc_rng){1}) &&
          strstr(sc_error(), "shift up to"));
    r.shift[1] = 2000;
    CHECK(!sc_train_gradient(f.dit, p, f.tape, &r, &batch, &(sc_rng){1}));
    r.shift[1] = 3, r.teacher_steps = 7;
    CHECK(!sc_train_gradient(f.dit, p, f.tape, &r, &batch, &(sc_rng){1}));
    r.teacher_steps = 8, r.self_steps[1] = 1;
    CHECK(!sc_train_gradient(f.dit, p, f.tape, &r, &batch, &(sc_rng){1}));
    r.self_steps[1] = 0;
    for (int i = 0; i < 4; i++) {
        sc_batch wrong = batch;
        if (i == 0) wrong.size = 0;
        if (i == 1) wrong.count = f.batch + 1;
        if (i == 2) wrong.first = f.batch, wrong.count = 1;
        if (i == 3) wrong.texts = NULL;
        CHECK(!sc_train_gradient(f.dit, p, f.tape, &r, &wrong, &(sc_rng){1}) &&
              strstr(sc_error(), "of a batch of"));
    }
    sc_params_free(p);
    close_fixture(&f);
}

/* What a program could get wrong is an error, not a crash. */
static void test_misuse(void) {
    fixture f = open_fixture("flux_a");
    double scale, guidance;
    sc_params *p = sc_params_lora(f.dit, 2, 2, 1);
    CHECK(!sc_params_full(f.dit, false) && strstr(sc_error(), "a LoRA is on them"));
    CHECK(!sc_lora_save(p, SC_TEACHER, "build/none", NULL) && strstr(sc_error(), "teacher"));
    CHECK(!sc_lora_save_kohya(f.dit, "build/none", NULL) && strstr(sc_error(), "no LoRA"));
    CHECK(!sc_from(f.tape, 1, (const int64_t[]){3}, NULL) && strstr(sc_error(), "from nothing"));
    CHECK(!sc_pipeline_open(NULL, "data/tiny-flux", NULL, NULL));
    CHECK(!sc_scale_for("", 3, &scale, &guidance));
    const int64_t n = f.dit->config.in_channels, latents[] = {2, f.h * f.w, n};
    const int64_t text[] = {2, f.text, f.dit->config.text_channels};
    const int64_t pooled[] = {2, f.dit->config.pooled_channels};
    const float one[] = {1, 1};
    sc_dit_input in = {sc_new(f.tape, 3, latents), sc_new(f.tape, 3, text),
                       sc_new(f.tape, 2, pooled), one, one, f.h, f.w};
    CHECK(sc_dit_velocity(f.dit, f.tape, &in));
    for (int i = 0; i < 3; i++) {
        sc_dit_input wrong = in;
        if (i == 0) wrong.time = NULL;
        if (i == 1) wrong.guidance = NULL;
        if (i == 2) wrong.pooled = sc_samples(f.tape, in.pooled, 0, 1);
        CHECK(!sc_dit_velocity(f.dit, f.tape, &wrong) && strstr(sc_error(), "as many"));
    }
    sc_fail("first"), sc_fail("%s, then %s", sc_error(), "second");
    CHECK(!strcmp(sc_error(), "first, then second"));
    sc_params_free(p);
    close_fixture(&f);
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
    memcpy(latents, f.x, (size_t)n * 4);
    CHECK(sc_sample(f.dit, f.tape, &s, 1, f.text, f.texts, latents));
    CHECK(memcmp(latents, f.x, (size_t)n * 4));
    CHECK(!sc_sample(f.dit, f.tape, &s, 0, f.text, f.texts, latents));
    s.steps = 0;
    CHECK(!sc_sample(f.dit, f.tape, &s, 1, f.text, f.texts, latents) &&
          strstr(sc_error(), "0 steps"));
    s.steps = 2, s.shift = 0;
    CHECK(!sc_sample(f.dit, f.tape, &s, 1, f.text, f.texts, latents) &&
          strstr(sc_error(), "shift of 0"));
    free(latents);
    close_fixture(&f);
}

int main(void) {
    if (mkdir("build", 0777) && errno != EEXIST) return 1;
    const char *names[] = {"flux_a", "flux_b"};
    for (int i = 0; i < 2; i++) {
        test_full(names[i], SC_FLUX);
        test_lora(names[i]);
        test_target(names[i], "target", false, false, NULL);
        test_target(names[i], "cfg_folded", true, false, NULL);
        test_target(names[i], "cfg_student", true, true, "cfg_grad");
    }
    test_cfg_sample("flux_b", 1e-5); /* without a guidance input */
    test_no_blocks();
    test_not_wide();
    test_sampling();
    test_lora_file();
    test_draws();
    test_part_of_batch();
    test_reports();
    test_out_of_memory();
    test_misuse();
    test_adamw();
    return test_report();
}
