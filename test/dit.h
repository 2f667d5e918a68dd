/* What the tests of both transformers share: a model of test/reference/, what PyTorch computes with
 * it (test/reference/dit.py), and the tests that are the same. It follows the implementation. */
#ifndef DIT_H
#define DIT_H
#include "test.h"

static const char weights[] = "diffusion_pytorch_model.safetensors";

static const sc_tensor *find(const sc_file *f, const char *name) {
    const sc_tensor *x = sc_file_find(f, name);
    if (!x) printf("reference has no '%s'\n", name), exit(1);
    return x;
}

static float *load(const sc_file *f, const char *name) {
    const sc_tensor *x = find(f, name);
    float *values = malloc((size_t)sc_count(x) * 4 + 4);
    sc_to_f32(values, x->data, x->dtype, sc_count(x));
    return values;
}

typedef struct fixture {
    sc_file *file;
    sc_dit *dit;
    sc_tape *tape;
    int64_t batch, text, n;
    int h, w, rank;
    float scale, cfg; /* of the LoRA; of true CFG */
    float *x, *context, *pooled, *time, *guidance, *goal;
    sc_text texts[8], no_text;
    int factors, *layers; /* A and B of each layer that the reference trains: indices of modules */
} fixture;

/* The layers that the reference names, or all of the model's. */
static void find_layers(fixture *f) {
    const sc_tensor *names = sc_file_find(f->file, "modules");
    const char *at = names ? names->data : NULL, *end = names ? at + sc_count(names) : NULL;
    int all = f->dit->module_count, count = 0;
    f->layers = malloc((size_t)all * sizeof *f->layers);
    for (; !names && count < all; count++) f->layers[count] = count;
    for (; at != end && count < all; at += strlen(at) + 1) {
        int i = 0;
        while (i < all && strcmp(f->dit->modules[i].name, at)) i++;
        if (i == all) printf("the model has no '%s'\n", at), exit(1);
        f->layers[count++] = i;
    }
    CHECK(at == end);
    f->factors = 2 * count;
}

static fixture open_fixture(const char *name) {
    char path[256];
    fixture f = {.rank = 3, .scale = 0.7f, .cfg = 2.5f}; /* where the reference does not say */
    snprintf(path, sizeof path, "test/reference/%s/reference.safetensors", name);
    f.file = sc_file_open(path);
    snprintf(path, sizeof path, "test/reference/%s", name);
    f.dit = f.file ? sc_dit_open(sc_cpu(), path, &(sc_dit_options){.widen = true}) : NULL;
    if (!f.dit) printf("%s (run the tests from the project's folder)\n", sc_error()), exit(1);
    f.tape = sc_tape_new(sc_cpu());
    float *grid = load(f.file, "grid");
    f.h = (int)grid[0], f.w = (int)grid[1], f.text = (int64_t)grid[2];
    if (sc_count(find(f.file, "grid")) == 6)
        f.rank = (int)grid[3], f.scale = grid[4], f.cfg = grid[5];
    free(grid);
    f.batch = find(f.file, "x")->shape[0];
    f.n = sc_count(find(f.file, "x"));
    f.x = load(f.file, "x"), f.context = load(f.file, "context"), f.pooled = load(f.file, "pooled");
    f.time = load(f.file, "time"), f.goal = load(f.file, "goal");
    bool guidance = sc_file_find(f.file, "guidance") != NULL; /* Stable Diffusion takes none */
    f.guidance = guidance ? load(f.file, "guidance") : calloc((size_t)f.batch, 4);
    for (int64_t i = 0; i < 8 && i < f.batch; i++)
        f.texts[i] = (sc_text){.context = f.context + i * f.text * f.dit->config.text_channels,
                               .pooled = f.pooled + i * f.dit->config.pooled_channels};
    f.no_text.context = load(f.file, "no_context");
    f.no_text.pooled = load(f.file, "no_pooled");
    find_layers(&f);
    return f;
}

static void close_fixture(fixture *f) {
    free(f->x), free(f->context), free(f->pooled), free(f->time), free(f->guidance), free(f->goal);
    free(f->no_text.context), free(f->no_text.pooled), free(f->layers);
    sc_tape_free(f->tape);
    sc_dit_close(f->dit);
    sc_file_close(f->file);
}

/* The fixture's weights with another config.json. */
static sc_dit *open_with_config(const char *name, const char *config) {
    char folder[64], link[128], path[128], target[128];
    snprintf(folder, sizeof folder, "build/test-%s", name);
    snprintf(link, sizeof link, "%s/%s", folder, weights);
    snprintf(path, sizeof path, "%s/config.json", folder);
    snprintf(target, sizeof target, "../../test/reference/%s/%s", name, weights);
    CHECK(mkdir(folder, 0777) == 0 || errno == EEXIST);
    CHECK(symlink(target, link) == 0);
    CHECK(sc_write_file(path, config, strlen(config)));
    sc_dit *dit = sc_dit_open(sc_cpu(), folder, &(sc_dit_options){.widen = true});
    remove(link), remove(path), remove(folder);
    return dit;
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

static double backward(fixture *f, sc_tensor *v) {
    double loss = 0;
    CHECK(sc_mse(f->tape, v, tensor(f, f->goal), 1, &loss) && sc_backward(f->tape));
    return loss;
}

/* One forward pass and, for a loss, a backward one; the velocity is valid until the next. */
static const float *run(fixture *f, const uint8_t *sets, double *loss) {
    sc_tape_reset(f->tape);
    sc_tape_record(f->tape, loss != NULL);
    sc_tape_use(f->tape, sets);
    sc_dit_input in = input(f);
    sc_tensor *v = sc_dit_velocity(f->dit, f->tape, &in);
    if (!v) printf("%s\n", sc_error()), exit(1);
    if (loss) *loss = backward(f, v);
    sc_tape_record(f->tape, false);
    return v->data;
}

static const uint8_t students[8] = {SC_STUDENT, SC_STUDENT, SC_STUDENT, SC_STUDENT};

/* ---- Gradients ---- */

/* The reference has a gradient whole, or its norm and its product with cos(0), cos(1), .. */
static double gradient_error(const float *grad, int64_t n, const float *expected, bool whole,
                             double least) {
    double norm = 0, product = 0, difference = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        norm += (double)grad[i] * grad[i], product += grad[i] * cos((double)i);
        if (whole) difference += pow((double)grad[i] - expected[i], 2);
        if (whole) size += (double)expected[i] * expected[i];
    }
    if (whole) return sqrt(difference) / (sqrt(size) + least);
    size = expected[0] + least;
    return fmax(fabs(sqrt(norm) - expected[0]) / size, fabs(product - expected[1]) / size);
}

/* The larger error; NaN is the largest. */
static double worse(double worst, double error, const char *name) {
    if (!(error < 1e-4)) printf("error of the gradient of %s: %.1e\n", name, error);
    return error > worst || isnan(error) ? error : worst;
}

/* What an error is relative to at least: a part of the whole gradient's norm. */
static double floor_of(const sc_params *p) {
    return 1e-6 * sqrt(sc__sum_of_squares(p->grad, NULL, p->count));
}

/* Checkpointing recomputes the same numbers. */
static void check_checkpointing(fixture *f, sc_params *p) {
    double loss;
    float *plain = malloc((size_t)p->count * 4);
    memcpy(plain, p->grad, (size_t)p->count * 4);
    memset(p->grad, 0, (size_t)p->count * 4);
    sc_dit_checkpointing(f->dit, true);
    run(f, students, &loss);
    sc_dit_checkpointing(f->dit, false);
    CHECK(rel_error(p->grad, plain, p->count) < 1e-6);
    free(plain);
}

/* All weights. */
static void test_full(const char *name, sc_architecture kind) {
    fixture f = open_fixture(name);
    float *velocity = load(f.file, "velocity"), *expected = load(f.file, "loss");
    sc_params *p = sc_params_full(f.dit, false);
    double loss = 0, worst = 0, error = rel_error(run(&f, students, &loss), velocity, f.n);
    double least = floor_of(p);
    int count = 0;
    CHECK(f.dit->config.kind == kind);
    CHECK(error < 1e-5);
    CHECK(fabs(loss / expected[0] - 1) < 1e-5);
    for (int64_t i = 0; i < f.dit->net->count; i++) {
        char key[192];
        sc_weight *w = f.dit->net->weights[i];
        int64_t n = sc_count(&w->tensor);
        if (w->fixed) continue; /* the table of positions */
        snprintf(key, sizeof key, "grad.%.128s", w->name);
        float *grad = load(f.file, key);
        bool whole = sc_count(find(f.file, key)) == n;
        worst = worse(worst, gradient_error(w->tensor.grad, n, grad, whole, least), w->name);
        free(grad), count++;
    }
    printf("%s: error of the velocity %.1e, largest of %d weight gradients %.1e\n", name, error,
           count, worst);
    CHECK(worst < 1e-4);
    check_checkpointing(&f, p);
    free(velocity), free(expected);
    sc_params_free(p);
    close_fixture(&f);
}

/* ---- LoRA ---- */

static const char *layer_name(const fixture *f, int i) {
    return f->dit->modules[f->layers[i / 2]].name;
}

static sc_tensor *factor(const fixture *f, const sc_params *p, int i, int set) {
    sc_adapter *l = &p->adapters[f->layers[i / 2]];
    sc_tensor *x = i % 2 ? &l->b[set] : &l->a[set];
    if (!x->data) printf("no LoRA on '%s'\n", layer_name(f, i)), exit(1);
    return x;
}

/* All factors' numbers, one after the other: the reference has them so, or a tensor for each. */
static float *load_factors(const fixture *f, const sc_params *p, const char *key) {
    bool together = sc_file_find(f->file, key) != NULL;
    float *values = malloc((size_t)p->count * 4);
    int64_t n = 0;
    for (int i = 0; i < (together ? 1 : f->factors); i++) {
        char name[192];
        snprintf(name, sizeof name, "%s.%.128s.%c", key, layer_name(f, i), "ab"[i % 2]);
        const sc_tensor *x = find(f->file, together ? key : name);
        if (n + sc_count(x) <= p->count) sc_to_f32(values + n, x->data, x->dtype, sc_count(x));
        n += sc_count(x);
    }
    if (!CHECKED(n == p->count)) printf("%s: %lld numbers\n", key, (long long)n), exit(1);
    return values;
}

static void set_factors(const fixture *f, sc_params *p) {
    for (int s = 0; s < 3; s++) {
        char key[16];
        int64_t at = 0;
        snprintf(key, sizeof key, "lora%d", s);
        float *values = load_factors(f, p, key);
        for (int i = 0; i < f->factors; i++) {
            sc_tensor *x = factor(f, p, i, SC_STUDENT + s);
            memcpy(x->data, values + at, (size_t)sc_count(x) * 4);
            at += sc_count(x);
        }
        CHECK(at == p->count);
        free(values);
    }
}

static void check_gradients(const char *name, const fixture *f, const sc_params *p,
                            const char *key) {
    double worst = 0, least = floor_of(p);
    float *expected = load_factors(f, p, key);
    int64_t at = 0;
    for (int i = 0; i < f->factors; i++) {
        const sc_tensor *x = factor(f, p, i, SC_STUDENT);
        double error = gradient_error(x->grad, sc_count(x), expected + at, true, least);
        worst = worse(worst, error, layer_name(f, i));
        at += sc_count(x);
    }
    printf("%s: largest error of %d gradients %s %.1e\n", name, f->factors, key, worst);
    CHECK(worst < 1e-4);
    free(expected);
}

static void test_lora(const char *name) {
    fixture f = open_fixture(name);
    float *velocity = load(f.file, "lora_velocity"), *base = load(f.file, "velocity");
    sc_params *p = sc_params_lora(f.dit, f.rank, (float)f.rank * f.scale, 1);
    double loss;
    CHECK(rel_error(run(&f, students, NULL), base, f.n) < 1e-5); /* B is zero: nothing changes */
    float first; /* of the seed's own stream, which draws the batches */
    sc_normal(&(sc_rng){1}, &first, 1);
    CHECK(*(float *)factor(&f, p, 0, SC_STUDENT)->data != first / (float)f.rank);
    set_factors(&f, p);
    CHECK(rel_error(run(&f, students, &loss), velocity, f.n) < 1e-5);
    check_gradients(name, &f, p, "lora_grad");
    check_checkpointing(&f, p);
    /* Each sample has its own set: the first is the base's, the others the student's. */
    uint8_t mixed[8] = {SC_TEACHER, SC_STUDENT, SC_STUDENT, SC_STUDENT};
    const float *v = run(&f, mixed, NULL);
    int64_t one = f.n / f.batch;
    CHECK(rel_error(v, base, one) < 1e-5 && rel_error(v + one, velocity + one, f.n - one) < 1e-5);
    free(velocity), free(base);
    sc_params_free(p);
    close_fixture(&f);
}

/* ---- The SCFM target and a sample ---- */

/* With true CFG of the teacher and of the averages, or not; `gradients`, if any, are those of the
 * student with it. */
static void test_target(const char *name, const char *expected_name, bool teacher, bool averages,
                        const char *gradients) {
    fixture f = open_fixture(name);
    sc_params *p = sc_params_lora(f.dit, f.rank, (float)f.rank * f.scale, 1);
    float *x0 = load(f.file, "x0"), *noise = load(f.file, "noise"), *table = load(f.file, "draws");
    float *times = load(f.file, "times"), *noisy = load(f.file, "noisy");
    float *expected = load(f.file, expected_name);
    sc_draw draws[8];
    set_factors(&f, p);
    for (int i = 0; i < f.batch; i++) {
        sc_draw *d = &draws[i];
        *d = (sc_draw){.teacher = table[4 * i] != 0, .steps = (int)table[4 * i + 1],
                       .j = (int)table[4 * i + 2], .shift = table[4 * i + 3],
                       .guidance = f.guidance[i],
                       .cfg = {teacher ? f.cfg : 1, averages ? f.cfg : 1}};
        for (int k = 0; k < 3; k++)
            d->t[k] = sc_shift_time(1 - (float)(d->j + k) / (float)d->steps, d->shift);
        d->t[0] = fminf(d->t[0], 1 - 1e-5f);
        CHECK(rel_error(d->t, times + 3 * i, 3) < 1e-6);
    }
    sc_tape_reset(f.tape);
    sc__dit_model self = {.dit = f.dit, .params = p, .h = f.h, .w = f.w};
    CHECK(sc__dit_text(&self, f.tape, (int)f.batch, (int)f.text, f.texts, f.no_text));
    sc_model model = {sc__dit_model_velocity, &self};
    sc_tensor *x = sc_noisy(f.tape, draws, tensor(&f, x0), tensor(&f, noise)),
              *target = tensor(&f, x0);
    CHECK(sc_scfm_target(&model, f.tape, draws, 0, x, target));
    CHECK(rel_error(x->data, noisy, f.n) < 1e-6);
    CHECK(rel_error(target->data, expected, f.n) < 1e-5);
    printf("%s: error of the SCFM target, %s, %.1e\n", name, expected_name,
           rel_error(target->data, expected, f.n));
    if (gradients) { /* they go through both evaluations */
        const float scales[8] = {f.cfg, f.cfg, f.cfg, f.cfg};
        const sc_query query = {0, students, f.time, f.guidance, scales};
        sc_tape_record(f.tape, true);
        backward(&f, sc__dit_model_velocity(&self, f.tape, tensor(&f, f.x), &query));
        check_gradients(name, &f, p, gradients);
    }
    free(x0), free(noise), free(table), free(times), free(noisy), free(expected);
    sc_params_free(p);
    close_fixture(&f);
}

/* Three steps of true CFG. */
static void test_cfg_sample(const char *name, double limit) {
    fixture f = open_fixture(name);
    float *x = load(f.file, "noise"), *expected = load(f.file, "cfg_sample");
    sc_sampling s = {
        .steps = 3, .shift = 3, .cfg = f.cfg, .h = f.h, .w = f.w, .no_text = f.no_text};
    CHECK(sc_sample(f.dit, f.tape, &s, (int)f.batch, (int)f.text, f.texts, x));
    printf("%s: error of a sample with true CFG %.1e\n", name, rel_error(x, expected, f.n));
    CHECK(rel_error(x, expected, f.n) < limit);
    s.no_text.context = NULL;
    CHECK(!sc_sample(f.dit, f.tape, &s, (int)f.batch, (int)f.text, f.texts, x) &&
          strstr(sc_error(), "negative prompt"));
    free(x), free(expected);
    close_fixture(&f);
}
#endif
