/* The analytic check: on a mixture of Gaussians in the plane the velocity field is known in closed
 * form. A small network learns it by regression, then SCFM (the same sc_scfm_target as FLUX's)
 * straightens it; its 3 Euler steps must land clearly nearer to where the exact flow goes than 3
 * Euler steps along the exact field itself. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "test.h"

enum { MODES = 5, WIDTH = 128, EMBED = 64, LAYERS = 4, BATCH = 256 };
static const float spread = 0.15f;

static void mode_centre(int k, float centre[2]) {
    centre[0] = 1.5f * cosf(6.2831853f * (float)k / MODES);
    centre[1] = 1.5f * sinf(6.2831853f * (float)k / MODES);
}

/* E[eps - x0 | x_t = x]: per mode both are linear in x; modes are weighted by their posterior. */
static void exact_velocity(const float x[2], float t, float v[2]) {
    float variance = (1 - t) * (1 - t) * spread * spread + t * t, top = -INFINITY, sum = 0,
          w[MODES], d[MODES][2], c[2];
    for (int k = 0; k < MODES; k++) {
        mode_centre(k, c);
        for (int i = 0; i < 2; i++) d[k][i] = x[i] - (1 - t) * c[i];
        w[k] = -(d[k][0] * d[k][0] + d[k][1] * d[k][1]) / (2 * variance);
        top = fmaxf(top, w[k]);
    }
    for (int k = 0; k < MODES; k++) sum += w[k] = expf(w[k] - top);
    v[0] = v[1] = 0;
    for (int k = 0; k < MODES; k++) {
        mode_centre(k, c);
        for (int i = 0; i < 2; i++)
            v[i] +=
                w[k] / sum *
                (t / variance * d[k][i] - (c[i] + (1 - t) * spread * spread / variance * d[k][i]));
    }
}

/* ---- The network: [x, embedding of t] -> WIDTH -> ... -> 2, in four sets of weights ---- */

typedef struct network {
    int64_t count;
    float *set[SC_SETS], *grad, *m, *v;
    sc_tensor weight[SC_SETS][LAYERS], bias[SC_SETS][LAYERS];
    sc_adamw adamw;
} network;

static int64_t inputs(int layer) { return layer ? WIDTH : 2 + EMBED; }
static int64_t outputs(int layer) { return layer == LAYERS - 1 ? 2 : WIDTH; }

static void network_init(network *n, uint64_t seed) {
    sc_rng rng = {seed};
    memset(n, 0, sizeof *n);
    for (int l = 0; l < LAYERS; l++) n->count += outputs(l) * (inputs(l) + 1);
    float **all[] = {&n->set[0], &n->set[1], &n->set[2], &n->set[3], &n->grad, &n->m, &n->v};
    for (int i = 0; i < 7; i++) *all[i] = calloc((size_t)n->count, sizeof(float));
    for (int s = 0; s < SC_SETS; s++) {
        int64_t at = 0;
        for (int l = 0; l < LAYERS; l++) {
            bool train = s == SC_STUDENT;
            n->weight[s][l] = (sc_tensor){.data = n->set[s] + at,
                                          .grad = train ? n->grad + at : NULL,
                                          .needs_grad = train,
                                          .ndim = 2,
                                          .shape = {outputs(l), inputs(l)}};
            at += outputs(l) * inputs(l);
            n->bias[s][l] = (sc_tensor){.data = n->set[s] + at,
                                        .grad = train ? n->grad + at : NULL,
                                        .needs_grad = train,
                                        .ndim = 1,
                                        .shape = {outputs(l)}};
            at += outputs(l);
        }
    }
    for (int l = 0; l < LAYERS; l++) {
        float *w = n->weight[SC_STUDENT][l].data;
        sc_normal(&rng, w, outputs(l) * inputs(l));
        for (int64_t i = 0; i < outputs(l) * inputs(l); i++) w[i] /= sqrtf((float)inputs(l));
    }
    n->adamw = (sc_adamw){.beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f};
}

static void network_free(network *n) {
    for (int s = 0; s < SC_SETS; s++) free(n->set[s]);
    free(n->grad), free(n->m), free(n->v);
}

static sc_tensor *network_velocity(network *n, sc_set set, sc_tape *t, sc_tensor *x,
                                   const float *time) {
    int64_t batch = x->shape[0];
    sc_tensor *embedding = sc_timestep_embedding(t, time, batch, EMBED);
    sc_tensor *h =
        sc_concat_channels(t, x, sc_reshape(t, embedding, 3, (const int64_t[]){batch, 1, EMBED}));
    for (int l = 0; l < LAYERS; l++) {
        sc_linear_layer layer = {.weight = &n->weight[set][l], .bias = &n->bias[set][l]};
        h = sc_linear(t, h, &layer);
        if (l < LAYERS - 1) h = sc_activate(t, SC_SILU, h);
    }
    return h;
}

/* The network as an sc_model; the teacher is the exact field. All samples of a call share their set
 * or are of two kinds: both are computed and each sample takes its own. */
static sc_tensor *model_velocity(void *self, sc_tape *t, sc_tensor *x, int64_t first,
                                 const uint8_t *sets, const float *time, const float *guidance) {
    (void)first, (void)guidance;
    sc_set own = SC_TEACHER;
    for (int64_t i = 0; i < x->shape[0]; i++)
        if (sets[i] != SC_TEACHER) own = (sc_set)sets[i];
    sc_tensor *v = network_velocity(self, own == SC_TEACHER ? SC_STUDENT : own, t, x, time);
    for (int64_t i = 0; v && i < x->shape[0]; i++)
        if (sets[i] == SC_TEACHER)
            exact_velocity((float *)x->data + 2 * i, time[i], (float *)v->data + 2 * i);
    return v;
}

static void network_step(network *n, float lr, float fast, float slow) {
    const sc_trained x = {
        n->count, n->set[SC_STUDENT], n->grad, n->m, n->v, {n->set[SC_FAST], n->set[SC_SLOW]}};
    n->adamw.lr = lr;
    n->adamw.clip = 1;
    double norm;
    sc_cpu()->update(&x, &n->adamw, (const float[2]){fast, slow}, &norm);
    n->adamw.step++;
}

/* ---- Training ---- */

static void draw_data(sc_rng *rng, float *x0, float *noise) {
    sc_normal(rng, x0, 2 * BATCH);
    sc_normal(rng, noise, 2 * BATCH);
    for (int b = 0; b < BATCH; b++) {
        float centre[2];
        mode_centre(sc_uniform_int(rng, MODES), centre);
        for (int i = 0; i < 2; i++) x0[2 * b + i] = centre[i] + spread * x0[2 * b + i];
    }
}

/* One step: regression onto the exact field (scfm false) or SCFM. Returns the loss. */
static double train_step(network *n, sc_tape *t, const sc_recipe *r, sc_rng *rng, bool scfm,
                         float lr) {
    static float x0[2 * BATCH], noise[2 * BATCH], time[BATCH], exact[2 * BATCH];
    sc_draw draws[BATCH];
    const int64_t shape[] = {BATCH, 1, 2};
    double loss = NAN;
    draw_data(rng, x0, noise);
    sc_tape_reset(t);
    sc_tensor *px0 = sc_from(t, 3, shape, x0), *pn = sc_from(t, 3, shape, noise);
    for (int b = 0; b < BATCH; b++)
        sc_draw_sample(r, rng, 1, !scfm, &draws[b]), time[b] = draws[b].t[0];
    sc_model model = {model_velocity, n};
    sc_tensor *x = sc_noisy(t, draws, px0, pn);
    for (int b = 0; b < BATCH; b++)
        exact_velocity((float *)x->data + 2 * b, time[b], exact + 2 * b);
    sc_tensor *target = sc_from(t, 3, shape, exact);
    if (scfm && !sc_scfm_target(&model, t, draws, 0, x, target)) return NAN;
    sc_tape_record(t, true);
    sc_mse(t, network_velocity(n, SC_STUDENT, t, x, time), target, &loss);
    sc_backward(t);
    sc_tape_record(t, false);
    network_step(n, lr, 0.98f, scfm ? 0.99f : 0.99f);
    return loss;
}

/* Euler from `x`, along the exact field (n NULL) or the slow average of the network. */
static void euler(network *n, sc_tape *t, float *x, int count, int steps, float shift) {
    float *times = malloc((size_t)(steps + 1) * 4), *time = malloc((size_t)count * 4);
    sc_schedule(times, steps, shift);
    for (int i = 0; i < steps; i++) {
        float *v = malloc((size_t)count * 8);
        for (int b = 0; b < count; b++)
            time[b] = times[i], exact_velocity(x + 2 * b, times[i], v + 2 * b);
        if (n) {
            sc_tape_reset(t);
            sc_tensor *px = sc_from(t, 3, (const int64_t[]){count, 1, 2}, x);
            sc_read(t, network_velocity(n, SC_SLOW, t, px, time), v);
        }
        for (int j = 0; j < 2 * count; j++) x[j] -= (times[i] - times[i + 1]) * v[j];
        free(v);
    }
    free(times), free(time);
}

int main(void) {
    enum { COUNT = 2000 };
    static float noise[2 * COUNT], exact[2 * COUNT], teacher[2 * COUNT], student[2 * COUNT];
    sc_tape *t = sc_tape_new(sc_cpu());
    sc_rng rng = {5};
    sc_recipe r = {
        .teacher_ratio = 0.4f, .teacher_steps = 32, .self_steps = {4, 8, 16}, .shift = {1, 2}};
    network n;
    network_init(&n, 3);
    int regression = 1500, distillation = 3000;
    double loss = 0;
    for (int i = 0; i < regression; i++)
        loss =
            train_step(&n, t, &r, &rng, false, 2e-3f * (1 - (float)i / (float)regression) + 1e-5f);
    for (int s = SC_FAST; s <= SC_SLOW; s++)
        memcpy(n.set[s], n.set[SC_STUDENT], (size_t)n.count * 4);
    memset(n.m, 0, (size_t)n.count * 4), memset(n.v, 0, (size_t)n.count * 4), n.adamw.step = 0;
    printf("regression: loss %.4f\n", loss);
    for (int i = 0; i < distillation; i++)
        loss = train_step(&n, t, &r, &rng, true, 5e-4f * (1 - (float)i / (float)distillation));
    printf("SCFM: loss %.4f\n", loss);
    sc_normal(&rng, noise, 2 * COUNT);
    memcpy(exact, noise, sizeof noise), memcpy(teacher, noise, sizeof noise),
        memcpy(student, noise, sizeof noise);
    euler(NULL, t, exact, COUNT, 512, 1.5f);
    euler(NULL, t, teacher, COUNT, 3, 1.5f);
    euler(&n, t, student, COUNT, 3, 1.5f);
    double teacher_error = 0, student_error = 0;
    for (int i = 0; i < 2 * COUNT; i++) {
        teacher_error += (teacher[i] - exact[i]) * (teacher[i] - exact[i]);
        student_error += (student[i] - exact[i]) * (student[i] - exact[i]);
    }
    teacher_error = sqrt(teacher_error / COUNT), student_error = sqrt(student_error / COUNT);
    printf("3 Euler steps, distance from the exact flow's end: teacher %.4f, SCFM %.4f\n",
           teacher_error, student_error);
    CHECK(student_error < 0.7 * teacher_error);
    network_free(&n);
    sc_tape_free(t);
    return test_report();
}
