/* flow.c: SCFM in the plane, small enough to be seen. `make flow` runs it and writes flow.png.
 *
 * The data are five clusters of points. The velocity that carries noise (t = 1) to them (t = 0) is
 * a formula, and its paths are curved: three Euler steps along it miss the clusters. A small
 * network learns this velocity, SCFM straightens it, and three steps arrive. The method, its grids,
 * teacher and averages are those for FLUX; only the model is another. Read it in the order of its
 * six sections; in shortcut.h read >>scfm beside it, and >>tape for what the network runs on. */
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "../tools.h"
#include "draw.h"

/* ==== 1. The data and their flow ==============================================================
 *
 * A data point x0 is one of five centres on a circle plus Gaussian noise of a small spread. */

enum { MODES = 5 };
static const float radius = 2, spread = 0.12f, turn = 6.2831853f;

static void mode_centre(int mode, float centre[2]) {
    float angle = turn * ((float)mode / MODES - 0.25f);
    centre[0] = radius * cosf(angle);
    centre[1] = radius * sinf(angle);
}

static void draw_data(sc_rng *rng, int count, float x0[][2]) {
    sc_normal(rng, x0[0], 2 * count);
    for (int i = 0; i < count; i++) {
        float centre[2];
        mode_centre(sc_uniform_int(rng, MODES), centre);
        for (int k = 0; k < 2; k++) x0[i][k] = centre[k] + spread * x0[i][k];
    }
}

/* A point on its way to the noise eps is at x_t = (1 - t) x0 + t eps and has velocity eps - x0.
 * Many pairs (x0, eps) pass through the same x at the same t; the flow has their mean velocity
 * there, v(x, t) = E[eps - x0 | x_t = x], and this is what flow matching teaches a model. For one
 * mode, of centre c, x_t has the mean (1 - t) c and the variance s = (1 - t)^2 spread^2 + t^2, and
 *
 *     E[eps] = t d / s     E[x0] = c + (1 - t) spread^2 d / s     with d = x - (1 - t) c
 *
 * Each mode counts by how probable it is at x: exp(-|d|^2 / (2 s)). Near the noise all count, and
 * v leads to their middle; later one of them wins, and the path bends towards it. */
static void exact_velocity(const float x[2], float t, float v[2]) {
    float s = (1 - t) * (1 - t) * spread * spread + t * t;
    float centre[MODES][2], d[MODES][2], square[MODES], nearest = INFINITY, sum = 0;
    for (int m = 0; m < MODES; m++) {
        mode_centre(m, centre[m]);
        for (int k = 0; k < 2; k++) d[m][k] = x[k] - (1 - t) * centre[m][k];
        square[m] = d[m][0] * d[m][0] + d[m][1] * d[m][1];
        nearest = fminf(nearest, square[m]);
    }
    v[0] = v[1] = 0;
    for (int m = 0; m < MODES; m++) {
        float probable = expf((nearest - square[m]) / (2 * s)); /* at least one is 1 */
        sum += probable;
        for (int k = 0; k < 2; k++) {
            float eps = t * d[m][k] / s;
            float x0 = centre[m][k] + (1 - t) * spread * spread * d[m][k] / s;
            v[k] += probable * (eps - x0);
        }
    }
    for (int k = 0; k < 2; k++) v[k] /= sum;
}

/* ==== 2. The network ==========================================================================
 *
 * (x, y, t) -> 64 -> 64 -> 64 -> velocity, with SiLU between. One array holds all weights of a
 * version, so that the optimiser and the averages take them in one go. */

enum { LAYERS = 4, WIDTH = 64, WEIGHTS = 4 * WIDTH + 2 * (WIDTH + 1) * WIDTH + (WIDTH + 1) * 2 };

typedef struct network {
    float set[SC_SETS][WEIGHTS]; /* student, fast and slow average; the teacher's is not used */
    float grad[WEIGHTS], m[WEIGHTS], v[WEIGHTS]; /* of the student, and Adam's moments */
    sc_tensor weight[SC_SETS][LAYERS], bias[SC_SETS][LAYERS]; /* parts of the arrays above */
    sc_adamw adamw;
} network;

/* The next rows x columns (0: a vector) of a set's weights; the student's have a gradient. */
static sc_tensor next_part(network *n, sc_set set, int *at, int rows, int columns) {
    sc_tensor part = {.data = n->set[set] + *at, .ndim = columns ? 2 : 1, .shape = {rows, columns}};
    part.needs_grad = set == SC_STUDENT;
    part.grad = part.needs_grad ? n->grad + *at : NULL;
    *at += rows * (columns ? columns : 1);
    return part;
}

/* Weights start from a normal with variance 1 / inputs, all else is 0. */
static void network_init(network *n, sc_rng *rng) {
    *n = (network){.adamw = {.beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .clip = 1}};
    for (sc_set set = SC_STUDENT; set <= SC_SLOW; set++) {
        for (int l = 0, at = 0; l < LAYERS; l++) {
            int in = l == 0 ? 3 : WIDTH, out = l == LAYERS - 1 ? 2 : WIDTH;
            float *w = n->set[set] + at;
            sc_normal(rng, w, in * out);
            for (int i = 0; i < in * out; i++) w[i] /= sqrtf((float)in);
            n->weight[set][l] = next_part(n, set, &at, out, in);
            n->bias[set][l] = next_part(n, set, &at, out, 0);
        }
    }
}

/* The answer of one set of weights, or of the teacher: the pre-trained model, frozen. FLUX's is
 * FLUX without the LoRA; ours is the formula. x and the velocity are [B,1,2]: each sample is a
 * "picture" of one token with two channels. */
static sc_tensor *answer(network *n, sc_set set, sc_tape *tape, sc_tensor *x, const float *times) {
    if (set == SC_TEACHER) {
        sc_tensor *v = sc_new(tape, 3, x->shape);
        for (int64_t b = 0; v && b < x->shape[0]; b++)
            exact_velocity((float *)x->data + 2 * b, times[b], (float *)v->data + 2 * b);
        return v;
    }
    sc_tensor *h = sc_new(tape, 3, (const int64_t[]){x->shape[0], 1, 3}); /* x and t */
    float *in = h ? h->data : NULL, *place = x->data;
    for (int64_t b = 0; in && b < x->shape[0]; b++, in += 3, place += 2)
        in[0] = place[0], in[1] = place[1], in[2] = times[b];
    for (int l = 0; l < LAYERS; l++) {
        sc_linear_layer layer = {.weight = &n->weight[set][l], .bias = &n->bias[set][l]};
        h = sc_linear(tape, h, &layer);
        if (l < LAYERS - 1) h = sc_activate(tape, SC_SILU, h);
    }
    return h;
}

/* ==== 3. Euler's method =======================================================================
 *
 * From time t to t' < t, along the velocity at t: x' = x - (t - t') v(x, t). Starts at path[0] and
 * leaves the place after each step, for all walkers at once. */
enum { WALKERS = 2000, FINE = 256, FEW = 3 };

static bool walk(network *n, sc_set set, sc_tape *tape, int steps, float (*path)[WALKERS][2]) {
    float schedule[FINE + 1], times[WALKERS];
    sc_schedule(schedule, steps, 1.5f); /* the middle of the shifts that SCFM draws below */
    for (int i = 0; i < steps; i++) {
        float *here = path[i][0], *next = path[i + 1][0];
        for (int w = 0; w < WALKERS; w++) times[w] = schedule[i];
        sc_tape_reset(tape);
        sc_tensor *x = sc_from(tape, 3, (const int64_t[]){WALKERS, 1, 2}, here);
        if (!x || !sc_read(tape, answer(n, set, tape, x, times), next)) return false;
        for (int k = 0; k < 2 * WALKERS; k++)
            next[k] = here[k] - (schedule[i] - schedule[i + 1]) * next[k];
    }
    return true;
}

/* ==== 4. A step of training ===================================================================
 *
 * Pre-training asks the student for the flow's velocity. (FLUX was taught eps - x0; its mean, known
 * here, saves the student the averaging.) SCFM asks it for
 *
 *     v1 = first(x, t0)      x' = x - d1 v1      v2 = slow(x', t1)
 *     target = (d1 v1 + d2 v2) / (d1 + d2)
 *
 * the mean velocity of two steps, d1 = t0 - t1 and d2 = t1 - t2, so that one step of the student
 * goes as far. On a grid of 32 steps `first` is the teacher; on coarser ones it is the student's
 * own fast average, and a step learned there is half of a longer one. Nothing tells the student
 * how long the step is: only a velocity that stays the same along its path suits them all. */
enum { BATCH = 256, PRETRAINING = 2000, SCFM = 6000 };

/* The model as SCFM asks it: for velocities, with each sample's set. Here the teacher and the one
 * other set that occurs in a call answer for all samples, and each sample takes its own. */
static sc_tensor *velocity(void *n, sc_tape *tape, sc_tensor *x, const sc_query *query) {
    const uint8_t *sets = query->sets;
    const float *times = query->time; /* what else it has is for models with captions */
    float taught[BATCH], rest[BATCH];
    sc_set other = SC_SLOW;
    for (int b = 0; b < BATCH; b++) {
        taught[b] = sets[b] == SC_TEACHER;
        rest[b] = 1 - taught[b];
        if (sets[b] != SC_TEACHER) other = (sc_set)sets[b];
    }
    return sc_blend(tape, taught, answer(n, SC_TEACHER, tape, x, times), rest,
                    answer(n, other, tape, x, times));
}

static bool train_step(network *n, sc_tape *tape, bool scfm, sc_rng *rng, double *loss) {
    const sc_recipe recipe = {
        .teacher_ratio = 0.4f, .teacher_steps = 32, .self_steps = {2, 4, 8, 16}, .shift = {1, 2}};
    const int64_t shape[] = {BATCH, 1, 2};
    float data[BATCH][2], noise[BATCH][2], times[BATCH];
    sc_draw draws[BATCH]; /* grid and times of each sample */
    double norm;
    draw_data(rng, BATCH, data);
    sc_normal(rng, noise[0], 2 * BATCH);
    for (int b = 0; b < BATCH; b++) {
        sc_draw_sample(&recipe, rng, 1, !scfm, &draws[b]);
        times[b] = draws[b].t[0];
    }
    /* The noisy input, x = (1 - t) x0 + t eps, and what the student should say of it. */
    sc_tape_reset(tape);
    sc_tensor *x0 = sc_from(tape, 3, shape, data[0]), *eps = sc_from(tape, 3, shape, noise[0]);
    sc_tensor *x = sc_noisy(tape, draws, x0, eps), *target = sc_new(tape, 3, shape);
    if (!x || !target) return false;
    if (!scfm) target = answer(n, SC_TEACHER, tape, x, times);
    if (scfm && !sc_scfm_target(&(sc_model){velocity, n}, tape, draws, 0, x, target)) return false;
    /* What it does say, recorded for the way back, and how far off that is. */
    sc_tape_record(tape, true);
    sc_tensor *said = answer(n, SC_STUDENT, tape, x, times);
    if (!sc_mse(tape, said, target, 1, loss) || !sc_backward(tape)) return false;
    sc_tape_record(tape, false);
    /* AdamW moves the student, and both averages follow it: the paper's, of 0.99 and 0.999. */
    const sc_params all = {.count = WEIGHTS,
                           .grad = n->grad,
                           .m = n->m,
                           .v = n->v,
                           .set = {NULL, n->set[SC_STUDENT], n->set[SC_FAST], n->set[SC_SLOW]}};
    sc_cpu()->update(&all, &n->adamw, (const float[2]){0.99f, 0.999f}, &norm);
    n->adamw.step++;
    return true;
}

/* `steps` steps with a learning rate that falls to nothing. */
static bool train(network *n, sc_tape *tape, bool scfm, int steps, float lr, sc_rng *rng) {
    double loss = 0;
    for (int i = 0; i < steps; i++) {
        n->adamw.lr = lr * (1 - (float)i / (float)steps);
        if (!train_step(n, tape, scfm, rng, &loss)) return false;
    }
    printf("%d steps of %s, last loss %.3f\n", steps, scfm ? "SCFM" : "pre-training", loss);
    return true;
}

/* ==== 5. The experiment ======================================================================= */
typedef struct experiment {
    float exact[FINE + 1][WALKERS][2]; /* [0]: the noise, the same for all three */
    float few[FEW + 1][WALKERS][2];    /* three steps of the formula */
    float scfm[FEW + 1][WALKERS][2];   /* three steps of the network after SCFM */
} experiment;

/* How far a's places are from b's, on average. */
static double miss(float a[][2], float b[][2]) {
    double sum = 0;
    for (int w = 0; w < WALKERS; w++) sum += hypot(a[w][0] - b[w][0], a[w][1] - b[w][1]);
    return sum / WALKERS;
}

static bool run(experiment *e) {
    static network n;
    sc_rng rng = {1};
    sc_tape *tape = sc_tape_new(sc_cpu());
    network_init(&n, &rng);
    bool ok = tape && train(&n, tape, false, PRETRAINING, 4e-3f, &rng);
    /* The student is now a copy of the teacher, and so must be its averages. */
    for (int i = SC_FAST; i <= SC_SLOW; i++) memcpy(n.set[i], n.set[SC_STUDENT], sizeof n.set[i]);
    ok = ok && train(&n, tape, true, SCFM, 1e-3f, &rng);
    sc_normal(&rng, e->exact[0][0], 2 * WALKERS);
    memcpy(e->few[0], e->exact[0], sizeof e->few[0]);
    memcpy(e->scfm[0], e->exact[0], sizeof e->scfm[0]);
    ok = ok && walk(&n, SC_TEACHER, tape, FINE, e->exact) &&
         walk(&n, SC_TEACHER, tape, FEW, e->few) && walk(&n, SC_STUDENT, tape, FEW, e->scfm);
    sc_tape_free(tape);
    return ok;
}

/* ==== 6. The picture ========================================================================== */
enum { PANEL = 400, TOP = 76, SHOWN = 50 };

/* Some walkers, in the colour of the cluster to which the exact flow takes them. */
static void draw_panel(sc_picture *p, int panel, const char *title, float (*path)[WALKERS][2],
                       int steps, float exact[][2]) {
    draw_view view = {p, PANEL * ((float)panel + 0.5f), TOP + PANEL / 2, PANEL / 5.8f};
    int every = steps > FEW ? 8 : 1; /* places of the fine path are closer than a pixel */
    unsigned colour[SHOWN];
    for (int w = 0; w < SHOWN; w++) {
        float fifth = MODES * (atan2f(exact[w][1], exact[w][0]) / turn + 0.25f + 1);
        colour[w] = draw_palette[(int)(fifth + 0.5f) % MODES];
    }
    char below[32] = "256 STEPS";
    if (steps == FEW) snprintf(below, sizeof below, "MISS BY %.2f", miss(path[FEW], exact));
    draw_text(p, view.x, 20, 18, title, 0x222222);
    draw_text(p, view.x, 52, 13, below, 0x666666);
    for (int m = 0; m < MODES; m++) {
        float centre[2];
        mode_centre(m, centre);
        draw_disc(view, centre, 6 * spread * view.scale, 0xe4e4e4);
    }
    for (int w = 0; w < SHOWN; w++)
        for (int i = 0; i < steps; i += every)
            draw_line(view, path[i][w], path[i + every][w], 1.5f, colour[w]);
    for (int w = 0; w < SHOWN; w++) {
        draw_disc(view, path[0][w], 4, 0x999999);
        draw_disc(view, path[steps][w], 10, 0xffffff);
        draw_disc(view, path[steps][w], 8, colour[w]);
    }
}

int main(int argc, char **argv) {
    static float rgb[3 * (3 * PANEL) * (TOP + PANEL)];
    static experiment e;
    const char *path = argc > 1 ? argv[1] : "flow.png";
    sc_picture p = {3 * PANEL, TOP + PANEL, rgb};
    sc_set_threads(1); /* so small a network gains nothing by more */
    bool ok = run(&e);
    for (int i = 0; i < 3 * p.width * p.height; i++) rgb[i] = 1; /* white */
    draw_panel(&p, 0, "THE EXACT FLOW", e.exact, FINE, e.exact[FINE]);
    draw_panel(&p, 1, "3 STEPS OF THIS FLOW", e.few, FEW, e.exact[FINE]);
    draw_panel(&p, 2, "3 STEPS AFTER SCFM", e.scfm, FEW, e.exact[FINE]);
    if (!ok || !sc_picture_save(&p, path, NULL))
        return fprintf(stderr, "error: %s\n", sc_error()), 1;
    printf("3 Euler steps miss the exact flow's ends by %.2f on average, after SCFM by %.2f\nwrote "
           "%s\n",
           miss(e.few[FEW], e.exact[FINE]), miss(e.scfm[FEW], e.exact[FINE]), path);
    return 0;
}
