/* Stable Diffusion 3.5's transformer against diffusers' (test/reference/make_sd3.py): velocities,
 * gradients of all weights and of LoRAs, LoRA files, the SCFM target, a sample; and what does not
 * fit. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "test.h"

static const char weights[] = "diffusion_pytorch_model.safetensors";

static float *load(const sc_file *f, const char *name) {
    const sc_tensor *x = sc_file_find(f, name);
    float *values = x ? malloc((size_t)sc_count(x) * 4 + 4) : NULL;
    if (x) sc_to_f32(values, x->data, x->dtype, sc_count(x));
    else printf("reference has no '%s'\n", name), exit(1);
    return values;
}

typedef struct fixture {
    sc_file *file;
    sc_dit *dit;
    sc_tape *tape;
    int64_t batch, text, n;
    int h, w, rank;
    float scale, cfg; /* of the LoRA; of true CFG */
    float *x, *context, *pooled, *time, *goal, guidance[8];
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
    f.h = (int)grid[0], f.w = (int)grid[1], f.text = (int64_t)grid[2], f.rank = (int)grid[3];
    f.scale = grid[4], f.cfg = grid[5];
    free(grid);
    f.batch = sc_file_find(f.file, "x")->shape[0];
    f.n = sc_count(sc_file_find(f.file, "x"));
    f.x = load(f.file, "x"), f.context = load(f.file, "context"), f.pooled = load(f.file, "pooled");
    f.time = load(f.file, "time"), f.goal = load(f.file, "goal");
    return f;
}

static void close_fixture(fixture *f) {
    free(f->x), free(f->context), free(f->pooled), free(f->time), free(f->goal);
    sc_tape_free(f->tape);
    sc_dit_close(f->dit);
    sc_file_close(f->file);
}

static sc_tensor *tensor(fixture *f, const float *values) {
    return sc_from(f->tape, 3,
                   (const int64_t[]){f->batch, (int64_t)f->h * f->w, f->dit->config.in_channels},
                   values);
}

static sc_dit_input input(fixture *f) {
    const sc_dit_config *c = sc_dit_config_of(f->dit);
    return (sc_dit_input){
        .x = tensor(f, f->x), .time = f->time, .guidance = f->guidance, .h = f->h, .w = f->w,
        .context = sc_from(f->tape, 3, (const int64_t[]){f->batch, f->text, c->text_channels},
                           f->context),
        .pooled = sc_from(f->tape, 2, (const int64_t[]){f->batch, c->pooled_channels}, f->pooled)};
}

/* One forward and backward pass; returns the velocity, valid until the tape is reset. */
static const float *run(fixture *f, const uint8_t *sets, bool backward, double *loss) {
    sc_tape_reset(f->tape);
    sc_tape_record(f->tape, backward);
    sc_tape_use(f->tape, sets);
    sc_dit_input in = input(f);
    sc_tensor *v = sc_dit_velocity(f->dit, f->tape, &in);
    if (!v) printf("%s\n", sc_error()), exit(1);
    if (backward) CHECK(sc_mse(f->tape, v, tensor(f, f->goal), 1, loss) && sc_backward(f->tape));
    sc_tape_record(f->tape, false);
    return v->data;
}

static const uint8_t students[8] = {SC_STUDENT, SC_STUDENT, SC_STUDENT, SC_STUDENT};

/* ---- All weights ---- */

/* The reference has a gradient's norm and its product with cos(0), cos(1), .. */
static double gradient_error(const float *grad, int64_t n, const float *expected, double floor) {
    double norm = 0, product = 0;
    for (int64_t i = 0; i < n; i++)
        norm += (double)grad[i] * grad[i], product += grad[i] * cos((double)i);
    double size = expected[0] + floor;
    return fmax(fabs(sqrt(norm) - expected[0]) / size, fabs(product - expected[1]) / size);
}

static void test_full(const char *name) {
    fixture f = open_fixture(name);
    float *velocity = load(f.file, "velocity"), *expected = load(f.file, "loss");
    sc_params *p = sc_params_full(f.dit, false);
    double loss = 0, worst = 0, error = rel_error(run(&f, students, true, &loss), velocity, f.n);
    CHECK(f.dit->config.kind == SC_SD3);
    CHECK(error < 1e-5);
    CHECK(fabs(loss / expected[0] - 1) < 1e-5);
    double norm = sqrt(sc__sum_of_squares(p->grad, NULL, p->count));
    for (int64_t i = 0; i < f.dit->net->count; i++) {
        char key[192];
        sc_weight *w = f.dit->net->weights[i];
        if (w->fixed) continue; /* the table of positions */
        snprintf(key, sizeof key, "grad.%.128s", w->name);
        float *grad = load(f.file, key);
        double e = gradient_error(w->tensor.grad, sc_count(&w->tensor), grad, 1e-6 * norm);
        if (!(e < 1e-4)) printf("%s: error of the gradient of %s: %.1e\n", name, w->name, e);
        worst = e > worst || isnan(e) ? e : worst;
        free(grad);
    }
    printf("%s: error of the velocity %.1e, largest of %lld weight gradients %.1e\n", name, error,
           (long long)f.dit->net->count, worst);
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

/* ---- LoRA ---- */

/* The reference's layers, which are those that the official recipe trains. */
typedef struct trained {
    const char *at, *end;
    int64_t first; /* of its numbers, A's; B's follow */
    int index;     /* of the model's module */
} trained;

static trained first_trained(const fixture *f) {
    const sc_tensor *names = sc_file_find(f->file, "modules");
    if (!names) printf("reference has no 'modules'\n"), exit(1);
    const char *at = names->data;
    return (trained){at, at + sc_count(names), 0, 0};
}

static bool next_trained(const fixture *f, trained *t) {
    if (t->at == t->end) return false;
    for (t->index = 0; t->index < f->dit->module_count; t->index++)
        if (!strcmp(f->dit->modules[t->index].name, t->at)) break;
    if (t->index == f->dit->module_count) printf("the model has no '%s'\n", t->at), exit(1);
    t->at += strlen(t->at) + 1;
    return true;
}

static void set_factors(fixture *f, sc_params *p) {
    for (int s = 0; s < 3; s++) {
        char key[16];
        snprintf(key, sizeof key, "lora%d", s);
        float *values = load(f->file, key);
        trained t = first_trained(f);
        while (next_trained(f, &t))
            for (int part = 0; part < 2; part++) {
                sc_adapter *l = &p->adapters[t.index];
                sc_tensor *x = part ? &l->b[SC_STUDENT + s] : &l->a[SC_STUDENT + s];
                if (!x->data) printf("no LoRA on layer %d\n", t.index), exit(1);
                memcpy(x->data, values + t.first, (size_t)sc_count(x) * 4);
                t.first += sc_count(x);
            }
        CHECK(t.first == sc_count(sc_file_find(f->file, key)));
        free(values);
    }
}

/* Each against the floor of 1e-6 times the whole gradient's norm. */
static void check_gradients(const char *name, fixture *f, const sc_params *p, const char *key) {
    double worst = 0, norm = sqrt(sc__sum_of_squares(p->grad, NULL, p->count));
    float *expected = load(f->file, key);
    int count = 0;
    trained t = first_trained(f);
    while (next_trained(f, &t))
        for (int part = 0; part < 2; part++) {
            const sc_adapter *l = &p->adapters[t.index];
            const sc_tensor *x = part ? &l->b[SC_STUDENT] : &l->a[SC_STUDENT];
            const float *e = expected + t.first, *grad = x->grad;
            double difference = 0, size = 0;
            for (int64_t i = 0; i < sc_count(x); i++)
                difference += pow((double)grad[i] - e[i], 2), size += (double)e[i] * e[i];
            double error = sqrt(difference) / (sqrt(size) + 1e-6 * norm);
            if (!(error < 1e-4))
                printf("%s: %s of %s's %c: %.1e\n", name, key, f->dit->modules[t.index].name,
                       "AB"[part], error);
            worst = error > worst || isnan(error) ? error : worst;
            t.first += sc_count(x), count++;
        }
    printf("%s: largest error of %d of %s %.1e\n", name, count, key, worst);
    CHECK(worst < 1e-4);
    free(expected);
}

static void test_lora(const char *name) {
    fixture f = open_fixture(name);
    float *velocity = load(f.file, "lora_velocity"), *base = load(f.file, "velocity");
    sc_params *p = sc_params_lora(f.dit, f.rank, (float)f.rank * f.scale, 1);
    double loss;
    CHECK(rel_error(run(&f, students, false, &loss), base, f.n) < 1e-5); /* B is zero */
    set_factors(&f, p);
    CHECK(rel_error(run(&f, students, true, &loss), velocity, f.n) < 1e-5);
    check_gradients(name, &f, p, "lora_grad");
    float *plain = malloc((size_t)p->count * 4);
    memcpy(plain, p->grad, (size_t)p->count * 4);
    memset(p->grad, 0, (size_t)p->count * 4);
    sc_dit_checkpointing(f.dit, true);
    run(&f, students, true, &loss);
    CHECK(rel_error(p->grad, plain, p->count) < 1e-6);
    /* Each sample has its own set: the first is the base's, the others the student's. */
    uint8_t mixed[8] = {SC_TEACHER, SC_STUDENT, SC_STUDENT, SC_STUDENT};
    const float *v = run(&f, mixed, false, &loss);
    int64_t one = f.n / f.batch;
    CHECK(rel_error(v, base, one) < 1e-5 && rel_error(v + one, velocity + one, f.n - one) < 1e-5);
    free(plain), free(velocity), free(base);
    sc_params_free(p);
    close_fixture(&f);
}

/* The official recipe leaves these layers alone: no LoRA of ours has them. */
static void test_untrained(const char *name) {
    fixture f = open_fixture(name);
    const char *path = "build/test-sd3-lora.safetensors";
    char other[128];
    sc_params *p = sc_params_lora(f.dit, f.rank, 1, 1);
    CHECK(sc_lora_save(p, SC_STUDENT, path, NULL));
    sc_file *file = sc_file_open(path);
    trained t = first_trained(&f);
    int64_t count = 0, untrained = 0;
    while (next_trained(&f, &t)) count += 2;
    for (int64_t i = 0; i < sc_file_count(file); i++) {
        const char *key = sc_file_name(file, i);
        untrained += strstr(key, "attn2") || strstr(key, "ff_context") ||
                     strstr(key, "norm1_context");
    }
    CHECK(sc_file_count(file) == count);
    CHECK(untrained == 0);
    /* PEFT's adapter of a convolution is one, and a convolution of 1x1. */
    const sc_tensor *a = sc_file_find(file, "transformer.pos_embed.proj.lora_A.weight"),
                    *b = sc_file_find(file, "transformer.pos_embed.proj.lora_B.weight");
    CHECK(a && a->ndim == 4 && a->shape[0] == f.rank && a->shape[2] == 2 && a->shape[3] == 2);
    CHECK(a && 4 * a->shape[1] == f.dit->config.in_channels);
    CHECK(b && b->ndim == 4 && b->shape[1] == f.rank && b->shape[2] == 1 && b->shape[3] == 1);
    sc_file_close(file);
    CHECK(sc_lora_start(p, path, 1));
    remove(path);
    snprintf(other, sizeof other, "test/reference/%s/lora.safetensors", name); /* of all layers */
    CHECK(!sc_lora_start(p, other, 1) && strstr(sc_error(), "not trained here"));
    sc_params_free(p);
    close_fixture(&f);
}

/* A LoRA on every layer, as others make them; merged and opened again it does the same. */
static void test_lora_file(const char *name) {
    char path[256];
    const char *merged = "build/test-sd3-merged";
    fixture f = open_fixture(name);
    float *velocity = load(f.file, "loaded_velocity"), *base = load(f.file, "velocity");
    sc_lora_report report;
    double loss;
    snprintf(path, sizeof path, "test/reference/%s/lora.safetensors", name);
    if (!CHECKED(sc_lora_load(f.dit, path, 1, &report))) printf("%s\n", sc_error());
    CHECK(report.applied == f.dit->module_count && report.total == report.applied);
    double error = rel_error(run(&f, NULL, false, &loss), velocity, f.n);
    printf("%s: error of the velocity with a LoRA on all of %d layers %.1e\n", name,
           f.dit->module_count, error);
    CHECK(error < 1e-5);
    if (!CHECKED(sc_dit_save(f.dit, merged, SC_F32, NULL))) printf("%s\n", sc_error());
    sc_lora_unload(f.dit);
    CHECK(rel_error(run(&f, NULL, false, &loss), base, f.n) < 1e-5);
    sc_dit_close(f.dit);
    f.dit = sc_dit_open(sc_cpu(), merged, NULL);
    if (!CHECKED(f.dit != NULL)) printf("%s\n", sc_error()), exit(1);
    CHECK(rel_error(run(&f, NULL, false, &loss), velocity, f.n) < 1e-5);
    snprintf(path, sizeof path, "%s/%s", merged, weights);
    sc_file *file = sc_file_open(path); /* shapes are diffusers' */
    const sc_tensor *proj = file ? sc_file_find(file, "pos_embed.proj.weight") : NULL,
                    *table = file ? sc_file_find(file, "pos_embed.pos_embed") : NULL;
    CHECK(proj && proj->ndim == 4 && proj->shape[2] == 2 && proj->shape[3] == 2);
    CHECK(table && table->ndim == 3 && table->shape[0] == 1);
    sc_file_close(file);
    remove(path);
    snprintf(path, sizeof path, "%s/config.json", merged);
    remove(path), remove(merged);
    free(velocity), free(base);
    close_fixture(&f);
}

/* ---- SCFM and sampling ---- */

static void texts_of(const fixture *f, sc_text texts[8]) {
    const sc_dit_config *c = sc_dit_config_of(f->dit);
    for (int64_t i = 0; i < 8 && i < f->batch; i++)
        texts[i] = (sc_text){f->context + i * f->text * c->text_channels,
                             f->pooled + i * c->pooled_channels, false};
}

static void test_target(const char *name, const char *expected_name, bool guided) {
    fixture f = open_fixture(name);
    sc_params *p = sc_params_lora(f.dit, f.rank, (float)f.rank * f.scale, 1);
    float *x0 = load(f.file, "x0"), *noise = load(f.file, "noise"), *table = load(f.file, "draws");
    float *times = load(f.file, "times"), *noisy = load(f.file, "noisy"),
          *expected = load(f.file, expected_name);
    float *no_context = load(f.file, "no_context"), *no_pooled = load(f.file, "no_pooled");
    float cfg = guided ? f.cfg : 1;
    sc_draw draws[8];
    set_factors(&f, p);
    for (int i = 0; i < f.batch; i++) {
        draws[i] = (sc_draw){.teacher = table[4 * i] != 0, .steps = (int)table[4 * i + 1],
                             .j = (int)table[4 * i + 2], .shift = table[4 * i + 3],
                             .cfg = {cfg, cfg}};
        memcpy(draws[i].t, times + 3 * i, sizeof draws[i].t);
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
    printf("%s: error of the SCFM %s %.1e\n", name, expected_name,
           rel_error(target->data, expected, f.n));
    free(x0), free(noise), free(table), free(times), free(noisy), free(expected);
    free(no_context), free(no_pooled);
    sc_params_free(p);
    close_fixture(&f);
}

/* Three steps of true CFG. */
static void test_sample(const char *name) {
    fixture f = open_fixture(name);
    float *x = load(f.file, "noise"), *expected = load(f.file, "cfg_sample");
    float *no_context = load(f.file, "no_context"), *no_pooled = load(f.file, "no_pooled");
    sc_sampling s = {.steps = 3, .shift = 3, .cfg = f.cfg, .h = f.h, .w = f.w,
                     .no_text = {no_context, no_pooled, false}};
    sc_text texts[8];
    texts_of(&f, texts);
    CHECK(sc_sample(f.dit, f.tape, &s, (int)f.batch, (int)f.text, texts, x));
    printf("%s: error of a sample with true CFG %.1e\n", name, rel_error(x, expected, f.n));
    CHECK(rel_error(x, expected, f.n) < 5e-5);
    free(x), free(expected), free(no_context), free(no_pooled);
    close_fixture(&f);
}

/* ---- What does not fit ---- */

/* Medium's LoRA on Large: its layers are there, and of other shapes. */
static void test_other_lora(void) {
    sc_lora_report report;
    fixture f = open_fixture("sd3_a");
    const char *path = "test/reference/sd3_b/lora.safetensors";
    CHECK(!sc_lora_load(f.dit, path, 1, &report) && strstr(sc_error(), "another model"));
    printf("%s\n", sc_error());
    sc_lora_unload(f.dit);
    close_fixture(&f);
    sc_dit *flux = sc_dit_open(sc_cpu(), "test/reference/flux_b", NULL);
    CHECK(flux && !sc_lora_load(flux, path, 1, &report));
    printf("%s\n", sc_error());
    sc_dit_close(flux);
}

/* sd3_a's weights with one word of config.json exchanged. */
static void test_config(const char *from, const char *to, const char *said) {
    const char *folder = "build/test-sd3-config";
    char link[128], path[128];
    size_t size = 0;
    char *text = sc_read_file("test/reference/sd3_a/config.json", &size);
    char *at = text ? strstr(text, from) : NULL, *other = malloc(size + strlen(to) + 1);
    if (!at) printf("config.json has no '%s'\n", from), exit(1);
    int n = sprintf(other, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    CHECK(mkdir(folder, 0777) == 0 || errno == EEXIST);
    snprintf(link, sizeof link, "%s/%s", folder, weights);
    CHECK(symlink("../../test/reference/sd3_a/diffusion_pytorch_model.safetensors", link) == 0);
    snprintf(path, sizeof path, "%s/config.json", folder);
    CHECK(sc_write_file(path, other, (size_t)n));
    sc_dit *dit = sc_dit_open(sc_cpu(), folder, NULL);
    if (!CHECKED(!dit && strstr(sc_error(), said)))
        printf("%s for %s: %s\n", to, from, dit ? "is opened" : sc_error());
    else printf("%s\n", sc_error());
    sc_dit_close(dit);
    remove(link), remove(path), remove(folder);
    free(text), free(other);
}

/* A picture that is larger than the table of positions, by one row or column. */
static void test_large_grid(void) {
    fixture f = open_fixture("sd3_a");
    const int sides[2][2] = {{13, 1}, {1, 13}};
    static const float zeros[2 * 13 * 64];
    CHECK(f.batch * 13 * f.dit->config.in_channels == sizeof zeros / sizeof *zeros);
    for (int i = 0; i < 2; i++) {
        sc_tape_reset(f.tape);
        sc_dit_input in = input(&f);
        in.h = sides[i][0], in.w = sides[i][1];
        in.x = sc_from(f.tape, 3, (const int64_t[]){f.batch, 13, 64}, zeros);
        CHECK(!sc_dit_velocity(f.dit, f.tape, &in) && strstr(sc_error(), "12"));
        printf("%s\n", sc_error());
        in.h = in.h == 13 ? 12 : 1, in.w = in.w == 13 ? 12 : 1;
        in.x = sc_from(f.tape, 3, (const int64_t[]){f.batch, 12, 64}, zeros);
        CHECK(sc_dit_velocity(f.dit, f.tape, &in) != NULL);
    }
    close_fixture(&f);
}

int main(void) {
    if (mkdir("build", 0777) && errno != EEXIST) return 1;
    const char *names[] = {"sd3_a", "sd3_b"};
    for (int i = 0; i < 2; i++) {
        test_full(names[i]);
        test_lora(names[i]);
        test_untrained(names[i]);
        test_lora_file(names[i]);
        test_target(names[i], "target", false);
        test_target(names[i], "cfg_target", true);
        test_sample(names[i]);
    }
    test_other_lora();
    test_config("\"pos_embed_max_size\": 12", "\"pos_embed_max_size\": 11", "pos_embed");
    test_config("\"pos_embed_max_size\": 12", "\"pos_embed_max_size\": 13", "pos_embed");
    test_config("\"pos_embed_max_size\": 12", "\"pos_embed_max_size\": -12", "pos_embed_max_size");
    test_config("\"dual_attention_layers\": []", "\"dual_attention_layers\": [0]", "blocks.0");
    test_config("\"num_layers\": 3", "\"num_layers\": 16777216", "1024 blocks");
    test_config("\"qk_norm\": \"rms_norm\"", "\"qk_norm\": \"layer_norm\"", "qk_norm");
    test_config("\"patch_size\": 2", "\"patch_size\": 4", "patch_size");
    test_large_grid();
    return test_report();
}
