/* ./shortcut: the experiment (base against distilled, numbers and a picture), info, merge. */
#define _POSIX_C_SOURCE 200809L
#include "shortcut.h"
#include "tools.h"

static const char usage[] =
    "usage: ./shortcut [options]            the experiment: few steps, before and after\n"
    "       ./shortcut info PATH            what is in a model folder or safetensors file\n"
    "       ./shortcut merge --lora FILE[:SCALE] --out DIR    LoRAs into a copy of the "
    "transformer\n"
    "\n"
    "The experiment draws the same prompts from the same noise with the base at 32 steps and at\n"
    "--steps (each at its best shift) and with every --lora at --steps (at the scale and the\n"
    "guidance it recommends), measures all against the base's 32 steps, and writes a contact\n"
    "sheet. Measures: paired RMSE; Frechet distance in the evaluator's features; sharpness\n"
    "(gradient energy over the 32-step pictures'); how often the evaluator recognises the prompt;\n"
    "Frechet distance from --real pictures; seconds per picture.";

static struct options {
    const char *model, *transformer, *lora[8], *prompts, *evaluator, *real, *out, *device, *weights,
        *weights_on;
    float guidance, cfg, shift;
    bool full, kohya, cfg_loras, guided, named; /* guided: by --guidance; named: by --out */
    int count, steps[8], threads, batch, resolution;
    uint64_t seed;
} o = {.model = "data/tiny-flux", .prompts = "data/prompts.txt", .evaluator = "data/evaluator",
       .steps = {3, 4, 8}, .device = "auto", .weights = "auto", .weights_on = "device",
       .guidance = 3.5f, .batch = 8, .seed = 1};

static const sc_option table[] = {
    {NULL, SC_FLAG, NULL, NULL, "Options:"},
    {"--model", SC_STRING, &o.model, "DIR", "FLUX.1's or SD3.5's pipeline folder"},
    {"--transformer", SC_STRING, &o.transformer, "DIR", "take the transformer from this folder"},
    {"--lora", SC_STRINGS, o.lora, "FILE[:SCALE]",
     "LoRA to compare, repeatable [lora.safetensors, if it is there and of this model]"},
    {"--prompts", SC_STRING, &o.prompts, "FILE", "one prompt a line"},
    {"--evaluator", SC_STRING, &o.evaluator, "DIR", "the network that judges"},
    {"--real", SC_STRING, &o.real, "DIR",
     "real pictures, as for ./train: the distance from them, too"},
    {"--steps", SC_INTS, o.steps, "N,N", "few steps; merge: the first decides the LoRA's scale"},
    {"--full", SC_FLAG, &o.full, NULL, "1026 pictures a row, as in the README, not 108"},
    {"--count", SC_INT, &o.count, "N", "pictures a row (0: 108, or --full's)"},
    {"--guidance", SC_FLOAT, &o.guidance, "G",
     "guidance scale; given, also of LoRAs that recommend another"},
    {"--cfg", SC_FLOAT, &o.cfg, "G", "true CFG of the base's pictures (0: none)"},
    {"--cfg-loras", SC_FLAG, &o.cfg_loras, NULL, "and of the LoRAs', into which it is not folded"},
    {"--shift", SC_FLOAT, &o.shift, "S", "time shift of the LoRAs' pictures (0: the model's)"},
    {"--resolution", SC_INT, &o.resolution, "N", "side of the pictures (0: the model's)"},
    {"--out", SC_STRING, &o.out, "PATH",
     "contact sheet [sheet.png]; merge: the folder [merged] or file"},
    {"--kohya", SC_FLAG, &o.kohya, NULL, "merge: write one LoRA file in kohya's names instead"},
    {"--batch", SC_INT, &o.batch, "N", "pictures drawn at once"},
    {"--weights", SC_STRING, &o.weights, "auto|fp8",
     "matrices: as in the file, or fp8, half of bf16"},
    {"--weights-on", SC_STRING, &o.weights_on, "device|host",
     "matrices: in host memory they are streamed, for GPUs that are too small"},
    {"--device", SC_STRING, &o.device, SC_DEVICES, "what computes"},
    {"--threads", SC_INT, &o.threads, "N", "CPU threads (0: OMP_NUM_THREADS, or all cores)"},
    {"--seed", SC_SEED, &o.seed, "N", "noise of the first picture"},
};
enum { OPTIONS = sizeof table / sizeof *table };

/* ---- The evaluator: a small convolutional classifier (data/train_evaluator.py) ---- */

enum { MAX_LEVELS = 8, MAX_CHANNELS = 1024 };

typedef struct conv {
    sc_tensor *weights[4]; /* [out, in, 3, 3], bias, and the norm's two [out] */
} conv;

typedef struct evaluator {
    sc_json *json;           /* config.json */
    const sc_json *captions; /* of the classes */
    sc_net *net;
    sc_tape *tape;
    int levels, groups, features, classes, side;
    float eps;
    conv down[MAX_LEVELS], flat[MAX_LEVELS];
    sc_linear_layer to_features, to_logits;
} evaluator;

static void evaluator_close(evaluator *e) {
    sc_net_close(e->net);
    sc_tape_free(e->tape);
    sc_json_free(e->json);
}

static int whole_number(const sc_json *value, int fallback, int most) {
    double number = sc_json_number(value, fallback);
    return number >= 1 && number <= most && number == floor(number) ? (int)number : 0;
}

static bool conv_open(sc_net *net, conv *c, const char *kind, int level, int64_t in, int64_t out) {
    static const char *const what[] = {".weight", ".bias", "_norm.weight", "_norm.bias"};
    const int64_t shape[] = {out, in, 3, 3};
    bool ok = true;
    for (int i = 0; ok && i < 4; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s%d%s", kind, level, what[i]);
        ok = (c->weights[i] = sc_net_weight(net, name, i ? 1 : 4, shape)) != NULL;
    }
    return ok;
}

static bool evaluator_open(evaluator *e, const sc_backend *be, const char *folder) {
    const char *path = formatted("%s/config.json", folder);
    sc_json *json = sc_json_load(path);
    const sc_json *channels = sc_json_get(json, "channels");
    int count[MAX_LEVELS], in = 3;
    *e = (evaluator){.json = json, .captions = sc_json_get(json, "captions")};
    e->levels = (int)sc_json_length(channels);
    e->groups = whole_number(sc_json_get(json, "norm_num_groups"), 8, MAX_CHANNELS);
    e->features = whole_number(sc_json_get(json, "feature_dim"), 64, MAX_CHANNELS);
    e->side = whole_number(sc_json_get(json, "sample_size"), 128, 4096);
    e->classes = whole_number(sc_json_get(json, "num_classes"), 0, 1 << 24);
    e->eps = (float)sc_json_number(sc_json_get(json, "norm_eps"), 1e-5);
    bool ok = json && e->levels >= 1 && e->levels <= MAX_LEVELS && e->groups && e->features &&
              e->side % 2 == 0 && e->side >> (e->levels + 1) > 0 && e->classes &&
              sc_json_length(e->captions) == e->classes;
    for (int i = 0; ok && i < e->levels; i++) {
        count[i] = whole_number(sc_json_at(channels, i), 0, MAX_CHANNELS);
        ok = count[i] && count[i] % e->groups == 0;
    }
    if (!ok && json) sc_fail("%s: not an evaluator's", path);
    ok = ok && (e->net = sc_net_open(be, folder, true)) && (e->tape = sc_tape_new(be));
    for (int i = 0; ok && i < e->levels; in = count[i++])
        ok = conv_open(e->net, &e->down[i], "down", i, in, count[i]) &&
             conv_open(e->net, &e->flat[i], "conv", i, count[i], count[i]);
    return ok && sc_net_linear(e->net, &e->to_features, "features", e->features, in, true) &&
           sc_net_linear(e->net, &e->to_logits, "logits", e->classes, e->features, true);
}

static sc_tensor *convolve(evaluator *e, sc_tensor *x, const conv *c, int stride) {
    sc_tensor *const *w = c->weights;
    return sc_group_norm(e->tape, sc_conv2d(e->tape, x, w[0], w[1], stride, 1), w[2], w[3],
                         e->groups, e->eps, true);
}

/* One picture [3, side, side] -> features, and the class it looks most like. */
static bool evaluate(evaluator *e, const float *rgb, float *features, int *class_of) {
    int side = e->side, half = side / 2;
    sc_tape_reset(e->tape);
    float *small = (float *)allocate((size_t)(3 * half * half), sizeof *small), mean[MAX_CHANNELS];
    if (!small) return false;
    for (int i = 0; i < 3 * half * half; i++) { /* the mean of 2x2 pixels */
        const float *p = rgb + (int64_t)(i / half * 2) * side + i % half * 2;
        small[i] = 0.25f * (p[0] + p[1] + p[side] + p[side + 1]);
    }
    sc_tensor *x = sc_from(e->tape, 4, (const int64_t[]){1, 3, half, half}, small);
    free(small);
    for (int i = 0; i < e->levels; i++)
        x = convolve(e, convolve(e, x, &e->down[i], 2), &e->flat[i], 1);
    int64_t channels = x ? x->shape[1] : 0, pixels = x ? x->shape[2] * x->shape[3] : 0;
    float *values = (float *)allocate((size_t)(channels * pixels + e->classes), sizeof *values),
          *logits = values;
    bool ok = values && sc_read(e->tape, x, values);
    for (int64_t c = 0; ok && c < channels; c++) {
        mean[c] = 0;
        for (int64_t i = 0; i < pixels; i++) mean[c] += values[c * pixels + i] / (float)pixels;
    }
    x = ok ? sc_from(e->tape, 2, (const int64_t[]){1, channels}, mean) : NULL;
    x = sc_activate(e->tape, SC_SILU, sc_linear(e->tape, x, &e->to_features));
    ok = sc_read(e->tape, x, features) &&
         sc_read(e->tape, sc_linear(e->tape, x, &e->to_logits), logits);
    *class_of = 0;
    for (int i = 1; ok && i < e->classes; i++)
        if (logits[i] > logits[*class_of]) *class_of = i;
    free(values);
    return ok;
}

/* -1: none of this caption. */
static int class_named(const evaluator *e, const char *caption) {
    int i = e->classes - 1;
    while (i >= 0 && strcmp(sc_json_string(sc_json_at(e->captions, i), ""), caption)) i--;
    return i;
}

/* ---- Frechet distance of two sets of features, seen as Gaussians ----
 * |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) */

static void moments(const float *x, int64_t n, int d, double *mean, double *covariance) {
    memset(mean, 0, (size_t)d * sizeof *mean);
    memset(covariance, 0, (size_t)(d * d) * sizeof *covariance);
    for (int64_t i = 0; i < n; i++)
        for (int j = 0; j < d; j++) mean[j] += x[i * d + j] / (double)n;
    for (int64_t i = 0; i < n; i++)
        for (int j = 0; j < d; j++)
            for (int k = 0; k < d; k++)
                covariance[j * d + k] +=
                    (x[i * d + j] - mean[j]) * (x[i * d + k] - mean[k]) / (double)(n - 1);
}

/* Jacobi rotations: the symmetric a becomes diagonal, the columns of v its eigenvectors. */
static void eigen(double *a, double *v, int d) {
    for (int i = 0; i < d * d; i++) v[i] = i / d == i % d;
    for (int sweep = 0; sweep < 30; sweep++)
        for (int p = 0; p < d; p++)
            for (int q = p + 1; q < d; q++) {
                if (fabs(a[p * d + q]) < 1e-14 * (fabs(a[p * d + p]) + fabs(a[q * d + q])) + 1e-300)
                    continue;
                double theta = (a[q * d + q] - a[p * d + p]) / (2 * a[p * d + q]);
                double t = (theta >= 0 ? 1 : -1) / (fabs(theta) + sqrt(theta * theta + 1));
                double c = 1 / sqrt(t * t + 1), s = t * c;
                for (int k = 0; k < d; k++) {
                    double x = a[k * d + p], y = a[k * d + q];
                    a[k * d + p] = c * x - s * y, a[k * d + q] = s * x + c * y;
                }
                for (int k = 0; k < d; k++) {
                    double x = a[p * d + k], y = a[q * d + k];
                    a[p * d + k] = c * x - s * y, a[q * d + k] = s * x + c * y;
                    x = v[k * d + p], y = v[k * d + q];
                    v[k * d + p] = c * x - s * y, v[k * d + q] = s * x + c * y;
                }
            }
}

/* c += a b */
static void add_product(const double *a, const double *b, double *c, int d) {
    for (int i = 0; i < d; i++)
        for (int j = 0; j < d; j++)
            for (int k = 0; k < d; k++) c[i * d + j] += a[i * d + k] * b[k * d + j];
}

static double frechet(const float *a, int64_t na, const float *b, int64_t nb, int d) {
    int dd = d * d;
    double *memory = (double *)allocate((size_t)(6 * dd + 2 * d), sizeof *memory);
    if (!memory || na < 2 || nb < 2) {
        free(memory);
        return NAN;
    }
    double *ca = memory, *cb = ca + dd, *v = cb + dd, *root = v + dd, *product = root + dd,
           *middle = product + dd;
    double *ma = middle + dd, *mb = ma + d, distance = 0;
    moments(a, na, d, ma, ca);
    moments(b, nb, d, mb, cb);
    for (int i = 0; i < d; i++)
        distance += (ma[i] - mb[i]) * (ma[i] - mb[i]) + ca[i * d + i] + cb[i * d + i];
    eigen(ca, v, d);
    for (int i = 0; i < d; i++)
        for (int j = 0; j < d; j++)
            for (int k = 0; k < d; k++)
                root[i * d + j] += v[i * d + k] * sqrt(fmax(ca[k * d + k], 0)) * v[j * d + k];
    add_product(root, cb, product, d);
    add_product(product, root, middle, d);
    eigen(middle, v, d);
    for (int i = 0; i < d; i++) distance -= 2 * sqrt(fmax(middle[i * d + i], 0));
    free(memory);
    return distance;
}

/* ---- Pictures of one setting ---- */

typedef struct setting {
    const char *lora; /* its path; NULL: none */
    int steps;
    float shift, guidance, scale;
    const char *label;
} setting;

typedef struct measures {
    double rmse, frechet, real, sharpness, recognition, seconds;
} measures;

typedef struct experiment {
    sc_pipeline *p;
    evaluator judge;
    int count, shown;               /* pictures in all, and those on the sheet */
    int *class_of;                  /* of each one's prompt; -1: none */
    sc_text *texts, no_text;        /* [count]: the list's again and again; and the empty one */
    int loras;
    int64_t pixels;                  /* numbers of a picture */
    float *base;                     /* [count, pixels]: the base's 32-step pictures */
    float *base_features, *features; /* [count, features] */
    float *real;                     /* features of real pictures */
    int64_t real_count;
    double base_sharpness;
    measures few;            /* the base's, at as many steps as the LoRAs' next */
    float *sheet;            /* a strip of titles, then a row for each prompt shown */
    int columns, column;     /* the column that is next: 0, the base's 32 steps */
    int cell, strip, height; /* pixels: a picture's side, of the strip, of the whole */
} experiment;

static double gradient_energy(const float *rgb, int side) {
    double sum = 0;
    for (int c = 0; c < 3; c++)
        for (int y = 0; y + 1 < side; y++)
            for (int x = 0; x + 1 < side; x++) {
                const float *p = rgb + ((int64_t)c * side + y) * side + x;
                sum += (p[1] - p[0]) * (p[1] - p[0]) + (p[side] - p[0]) * (p[side] - p[0]);
            }
    return sum;
}

/* Draws pictures [first, first + n) of the experiment, of noise of seed + i. */
static bool draw_batch(experiment *x, const setting *s, int first, int n, float *rgb) {
    int h = x->p->resolution / x->p->token_pixels;
    sc_sampling sampling = {.steps = s->steps, .shift = s->shift, .guidance = s->guidance,
                            .h = h, .w = h, .progress = sc_not_interrupted,
                            .cfg = !s->lora || o.cfg_loras ? o.cfg : 0,
                            .no_text = x->no_text};
    return sc_pipeline_draw(x->p, &sampling, n, x->texts + first, o.seed + (uint64_t)first, rgb);
}

/* rgb [3, side, side] as a picture of another side: itself, or `scaled`, which is to be freed.
 * NULL: no memory. */
static const float *of_side(const float *rgb, int side, int wanted, sc_picture *scaled) {
    const sc_picture p = {side, side, (float *)rgb};
    *scaled = (sc_picture){0};
    if (side == wanted) return rgb;
    return sc_picture_fit(scaled, &p, wanted, wanted) ? scaled->rgb : NULL;
}

static bool put_on_sheet(experiment *x, int row, const float *rgb) {
    int side = x->cell, width = side * x->columns;
    sc_picture scaled;
    const float *small = of_side(rgb, x->p->resolution, side, &scaled);
    for (int i = 0; small && i < 3 * side; i++) { /* rows of all three colours */
        int64_t line = (int64_t)i / side * x->height + x->strip + row * side + i % side;
        memcpy(x->sheet + line * width + x->column * side, small + (int64_t)i * side,
               (size_t)side * 4);
    }
    sc_picture_free(&scaled);
    return small != NULL;
}

static bool judge(experiment *x, const float *rgb, float *features, int *class_of) {
    sc_picture scaled;
    const float *small = of_side(rgb, x->p->resolution, x->judge.side, &scaled);
    bool ok = small && evaluate(&x->judge, small, features, class_of);
    sc_picture_free(&scaled);
    return ok;
}

/* Draws and measures `count` pictures. `show`: for the sheet; those of its first column are what
 * all others are compared with. */
static bool run_setting(experiment *x, const setting *s, int count, bool show, measures *m) {
    bool base = show && x->column == 0;
    int d = x->judge.features, side = x->p->resolution, right = 0, known = 0;
    float *own = (float *)allocate((size_t)(2 * o.batch * x->pixels), sizeof *own), *rgb = own;
    double started = sc_seconds(), drawing = 0, squares = 0, energy = 0;
    sc_lora_report report;
    sc_lora_unload(x->p->dit);
    bool ok =
        own && (!s->lora || !s->scale || sc_lora_load(x->p->dit, s->lora, s->scale, &report));
    *m = (measures){0};
    for (int first = 0; ok && first < count; first += o.batch) {
        int n = count - first < o.batch ? count - first : o.batch, class_of;
        int from = first / o.batch % sc_processes, mine = first + o.batch * sc_rank;
        double before = sc_seconds();
        int drawn = count - mine < o.batch ? count - mine : o.batch;
        if (from == 0) /* each process draws a batch, then all of them look at all of those */
            ok = sc_agree(drawn <= 0 || draw_batch(x, s, mine, drawn, own));
        drawing += sc_seconds() - before;
        rgb = from == sc_rank ? own : own + o.batch * x->pixels;
        if (ok) sc_copy_to_all(rgb, n * x->pixels, from);
        for (int i = 0; ok && i < n; i++) {
            const float *picture = rgb + i * x->pixels;
            float *reference = x->base + (first + i) * x->pixels;
            if (base) memcpy(reference, picture, (size_t)x->pixels * 4);
            ok = judge(x, picture, x->features + (int64_t)(first + i) * d, &class_of);
            int wanted = x->class_of[first + i];
            known += wanted >= 0, right += wanted >= 0 && class_of == wanted;
            energy += gradient_energy(picture, side);
            for (int64_t j = 0; j < x->pixels; j++)
                squares += (picture[j] - reference[j]) * (picture[j] - reference[j]) / 4;
            if (show && first + i < x->shown) ok = put_on_sheet(x, first + i, picture) && ok;
        }
        sc_progress(s->label, 0, first + n, count, started, NULL);
        if (sc_stop) ok = sc_fail("stopped");
    }
    free(own);
    if (!ok) return false;
    if (base) memcpy(x->base_features, x->features, (size_t)count * (size_t)d * 4);
    if (base) x->base_sharpness = energy;
    m->rmse = sqrt(squares / ((double)count * (double)x->pixels));
    m->frechet = frechet(x->features, count, x->base_features, count, d);
    m->real = x->real ? frechet(x->features, count, x->real, x->real_count, d) : NAN;
    m->sharpness = x->base_sharpness > 0 ? energy / x->base_sharpness * x->count / count : NAN;
    m->recognition = known ? (double)right / known : NAN;
    m->seconds = drawing / count;
    return true;
}

/* ---- The table ---- */

static void print_head(void) {
    printf("%-30s %5s %5s %5s %6s %8s %9s %6s %6s %6s %7s %6s\n", "pictures", "steps", "shift",
           "guid.", "scale", "RMSE", "Frechet", "closed", "sharp", "recog", "real", "s/pic");
}

/* A number of `width` characters and a blank; "-" where there is none. */
static void print_number(int width, int digits, double value, const char *unit) {
    if (isfinite(value)) printf("%*.*f%s ", width - (int)strlen(unit), digits, value, unit);
    else printf("%*s ", width, "-");
}

static void print_row(const experiment *x, const setting *s, const measures *m) {
    printf("%-30.30s %5d %5.2f %5.2f ", s->label, s->steps, s->shift, s->guidance);
    print_number(6, 2, s->lora ? s->scale : NAN, "");
    print_number(8, 4, m->rmse, "");
    print_number(9, 4, m->frechet, "");
    print_number(6, 0, s->lora ? 100 * (1 - m->frechet / x->few.frechet) : NAN, "%");
    print_number(6, 2, m->sharpness, "");
    print_number(6, 1, 100 * m->recognition, "%");
    print_number(7, 3, m->real, "");
    printf("%6.3f\n", m->seconds);
    fflush(stdout);
}

/* 3x5 letters for the sheet, those of its titles: 15 bits from the top left, row by row. */
static void draw_text(experiment *x, const char *text) {
    static const char letters[] = "0123456789ABCEFLMORS";
    static const uint16_t shapes[] = {0x7b6f, 0x2c97, 0x73e7, 0x73cf, 0x5bc9, 0x79cf, 0x79ef,
                                      0x7252, 0x7bef, 0x7bcf, 0x7bed, 0x6bae, 0x7927, 0x79e7,
                                      0x79e4, 0x4927, 0x5fed, 0x7b6f, 0x7bad, 0x79cf};
    int side = x->cell, width = side * x->columns, scale = x->strip / 7;
    for (int i = 0; text[i] && (i + 1) * 4 * scale <= side; i++) {
        const char *found = strchr(letters, text[i]);
        for (int bit = 0; found && bit < 15; bit++) {
            if (!(shapes[found - letters] >> (14 - bit) & 1)) continue;
            for (int p = 0; p < 3 * scale * scale; p++) {
                int px = x->column * side + (i * 4 + bit % 3 + 1) * scale + p / 3 % scale,
                    py = (bit / 3 + 1) * scale + p / 3 / scale;
                if (px < (x->column + 1) * side)
                    x->sheet[((int64_t)(p % 3) * x->height + py) * width + px] = -1;
            }
        }
    }
}

/* Sorts shifts[n]: first that at which the base's pictures come nearest to its 32-step ones. */
static bool sort_shifts(experiment *x, setting *s, float *shifts, int n, int count) {
    double distances[8];
    for (int i = 0, j; i < n; i++) {
        measures m;
        s->shift = shifts[i];
        if (!run_setting(x, s, count, false, &m)) return false;
        for (j = i; j > 0 && m.frechet < distances[j - 1]; j--)
            distances[j] = distances[j - 1], shifts[j] = shifts[j - 1];
        distances[j] = m.frechet, shifts[j] = s->shift;
    }
    s->shift = shifts[0];
    return true;
}

/* The distance depends on the number of pictures: --full compares the two best shifts of a quarter
 * of the pictures again with all of them. */
static bool best_shift(experiment *x, setting *s) {
    float shifts[] = {2, 3, 4, 5, 6, 7, 8};
    int few = x->count / (o.full ? 4 : 2);
    return sort_shifts(x, s, shifts, 7, few < 2 ? 2 : few) && /* one has no distance */
           (!o.full || sort_shifts(x, s, shifts, 2, x->count));
}

/* A row of the table, and the next column of the sheet. */
static bool show_setting(experiment *x, const setting *s) {
    measures m;
    const char *title = !s->lora ? "BASE" : x->loras == 1 ? "SCFM" : "LORA";
    draw_text(x, formatted("%s %d", title, s->steps));
    if (!run_setting(x, s, x->count, true, &m)) return false;
    if (!s->lora) x->few = m;
    print_row(x, s, &m);
    x->column++;
    return true;
}

static bool show_lora(experiment *x, const char *argument, int steps, float shift) {
    setting s = {.steps = steps, .shift = shift, .guidance = o.guidance};
    s.lora = sc_lora_argument(argument, steps, &s.scale, o.guided ? NULL : &s.guidance);
    s.label = formatted("%.60s", s.lora);
    return show_setting(x, &s);
}

static bool new_sheet(experiment *x) {
    int side = x->p->resolution < 256 ? x->p->resolution : 256;
    x->columns = 1;
    for (int i = 0; o.steps[i]; i++) x->columns += 1 + x->loras;
    x->cell = side;
    x->strip = 7 * (side / 64 > 0 ? side / 64 : 1);
    x->height = x->strip + side * x->shown;
    int64_t n = (int64_t)3 * side * x->columns * x->height;
    x->sheet = (float *)allocate((size_t)n, sizeof *x->sheet);
    for (int64_t i = 0; x->sheet && i < n; i++) x->sheet[i] = 1;
    return x->sheet != NULL;
}

static bool run_experiment(experiment *x) {
    int tokens = x->p->resolution / x->p->token_pixels;
    float shift = sc_pipeline_shift(x->p, (int64_t)tokens * tokens);
    setting s = {.steps = 32, .shift = shift, .guidance = o.guidance, .label = "base"};
    if (!new_sheet(x)) return false;
    print_head();
    if (!show_setting(x, &s)) return false;
    s.label = "base, best shift";
    for (int i = 0; o.steps[i]; i++) {
        s.steps = o.steps[i];
        if (!best_shift(x, &s) || !show_setting(x, &s)) return false;
        for (int j = 0; j < x->loras; j++)
            if (!show_lora(x, o.lora[j], s.steps, o.shift > 0 ? o.shift : shift)) return false;
    }
    if (!sc_rank && !sc_picture_save(&(sc_picture){x->cell * x->columns, x->height, x->sheet},
                                     o.out, formatted(SC_MADE_BY " %s", sc_command)))
        return false;
    printf("%d pictures a row of the table, from the same noise (seed %llu); contact sheet: %s\n",
           x->count, (unsigned long long)o.seed, o.out);
    return true;
}

/* ---- Setting the experiment up ---- */

static bool load_prompts(experiment *x) {
    int64_t count;
    char **lines = sc_load_prompts(o.prompts, &count);
    x->count = o.count ? o.count : o.full ? 1026 : 108;
    x->shown = count < 10 ? (int)count : 10;
    if (x->shown > x->count) x->shown = x->count;
    bool ok = lines && (x->class_of = (int *)allocate((size_t)x->count, sizeof *x->class_of)) &&
              (x->texts = (sc_text *)allocate((size_t)x->count, sizeof *x->texts)) &&
              kept((x->no_text = sc_pipeline_text(x->p, "")).context);
    for (int i = 0; ok && i < x->count; i++) {
        x->class_of[i] = class_named(&x->judge, lines[i % count]);
        x->texts[i] = i < count ? sc_pipeline_text(x->p, lines[i]) : x->texts[i - count];
        if (i < count) sc_note_cut(&x->texts[i]);
        ok = kept(x->texts[i].context) && (!sc_interrupted || sc_fail("stopped"));
    }
    sc_warn_cut("prompt");
    return ok;
}

/* Features of the pictures in a folder, cut and scaled to the evaluator's size. */
static bool load_real(experiment *x) {
    sc_dataset *data = sc_dataset_open(o.real);
    bool ok = data && (x->real = (float *)allocate((size_t)(data->count * x->judge.features),
                                                   sizeof *x->real));
    double started = sc_seconds();
    if (ok && data->unused) sc_print_text(stderr, "warning: ", data->unused);
    for (int64_t i = 0; ok && i < data->count; i++, x->real_count++) {
        sc_picture picture = {0}, fitted = {0};
        int class_of;
        ok = sc_apart(o.out, data->pairs[i].path) &&
             sc_picture_load(&picture, data->pairs[i].path) &&
             sc_picture_fit(&fitted, &picture, x->judge.side, x->judge.side) &&
             evaluate(&x->judge, fitted.rgb, x->real + i * x->judge.features, &class_of) &&
             (!sc_interrupted || sc_fail("stopped"));
        sc_picture_free(&picture);
        sc_picture_free(&fitted);
        sc_progress("real picture", 0, i + 1, data->count, started, NULL);
    }
    sc_dataset_close(data);
    return ok;
}

static int experiment_main(void) {
    experiment x = {0};
    if (!o.lora[0]) o.lora[0] = sc_own_lora(o.model, o.transformer);
    const sc_dit_options how = {.fp8 = !strcmp(o.weights, "fp8"),
                                .streamed = !strcmp(o.weights_on, "host")};
    bool ok = (sc_rank || (sc_apart(o.out, o.prompts) &&
                           sc_check_out(o.out, ".png", o.named, o.model, o.transformer,
                                        o.lora))) &&
              (x.p = sc_open_model(o.model, o.transformer, o.device, how)) &&
              evaluator_open(&x.judge, x.p->backend, o.evaluator);
    if (ok) sc_note_guidance(x.p->dit, o.guided, o.cfg > 0);
    if (ok && o.resolution) x.p->resolution = o.resolution;
    if (ok && (x.p->resolution % x.p->token_pixels || x.p->resolution > 1 << 14))
        ok = sc_fail("--resolution is a multiple of %d pixels, not %d", x.p->token_pixels,
                     x.p->resolution);
    for (; ok && x.loras < 8 && o.lora[x.loras]; x.loras++) /* now, not after minutes of drawing */
        ok = sc_load_lora_argument(x.p->dit, o.lora[x.loras], 3, NULL);
    if (ok) sc_lora_unload(x.p->dit);
    ok = ok && load_prompts(&x) && (!o.real || load_real(&x));
    if (ok) {
        x.pixels = (int64_t)3 * x.p->resolution * x.p->resolution;
        int64_t features = (int64_t)x.count * x.judge.features;
        x.base = (float *)allocate((size_t)(x.count * x.pixels + 2 * features), sizeof *x.base);
        x.base_features = x.base + x.count * x.pixels;
        x.features = x.base_features + features;
        ok = x.base && run_experiment(&x);
    }
    free(x.class_of), free(x.texts), free(x.base), free(x.real), free(x.sheet);
    evaluator_close(&x.judge);
    sc_pipeline_close(x.p);
    return sc_end(ok && sc_printed());
}

/* ---- info and merge ---- */

/* As "12 BF16, 3 F32", each after what separates them. */
static void print_types(const int64_t *count, const char *separator) {
    for (int d = 0; d <= SC_U8; d++) {
        if (!count[d]) continue;
        printf("%s%lld %s", separator, (long long)count[d], sc_dtype_name((sc_dtype)d));
        separator = ", ";
    }
}

static bool info_file(const char *path) {
    sc_file *file = sc_file_open(path);
    if (!file) return false;
    int64_t numbers[SC_U8 + 1] = {0}, total = 0;
    for (int64_t i = 0; i < sc_file_count(file); i++) {
        const sc_tensor *x = sc_file_tensor(file, i);
        numbers[x->dtype] += sc_count(x), total += sc_count(x);
    }
    printf("%s: %lld tensors, %lld numbers (", sc_file_path(file), (long long)sc_file_count(file),
           (long long)total);
    print_types(numbers, "");
    printf(")\n");
    static const char *const keys[] = {"base_model", "method", "rank",   "alpha",
                                       "steps",      "seed",   "scales", "command",
                                       "merged"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const char *value = sc_file_metadata(file, keys[i]);
        if (value) sc_print_text(stdout, formatted("  %s: ", keys[i]), value);
    }
    sc_file_close(file);
    return true;
}

/* A part as it was recognised: file, layout, parameters, types, and what does not fit. */
static bool info_net(const char *what, const sc_net *net) {
    int64_t parameters = 0, stored[SC_U8 + 1] = {0};
    int missing = 0;
    for (int64_t i = 0; i < net->count; i++) {
        parameters += sc_count(&net->weights[i]->tensor);
        stored[net->weights[i]->source.dtype] += !net->weights[i]->missing;
    }
    printf("  %s: %lld parameters in %lld tensors", what, (long long)parameters,
           (long long)net->count);
    if (net->file) print_types(stored, ", ");
    printf("\n    %s\n", net->file ? sc_file_path(net->file) : "no weights here");
    for (int64_t i = 0; i < net->count; i++)
        if (net->weights[i]->missing && missing++ < 8)
            sc_print_text(stdout, "    missing: ", net->weights[i]->name);
    if (missing > 8) printf("    ...\n    %d missing in all\n", missing);
    return missing == 0;
}

static bool is_absent(const char *model, sc_part part) { return !kept(sc_part_path(model, part)); }

/* Whether this is a model: diffusers' folder, or something that holds a part. A file beside one is
 * none. */
static bool is_model(const char *path) {
    bool found = exists(formatted("%s/model_index.json", path));
    for (int part = 0; !found && part < SC_PARTS; part++)
        found = is_file(path) ? sc_part_in_file(path, (sc_part)part) > 0
                              : !is_absent(path, (sc_part)part);
    return found;
}

/* The transformer's plan: from its file, or, where that is not there or broken, from config.json.
 */
static sc_dit *info_transformer(const char *model) {
    const char *path = kept(sc_part_path(model, SC_TRANSFORMER));
    sc_dit *dit = path ? sc_dit_open(NULL, path, NULL) : NULL;
    if (dit) return dit;
    printf("  transformer: %s\n", sc_error());
    const sc_dit_options plan = {.random = true};
    return sc_dit_open(NULL, formatted("%s/transformer", model), &plan);
}

static void info_tokenizer(const char *model, const char *name) {
    const char *folder = kept(sc_model_folder(model));
    sc_tokenizer *t = folder ? sc_tokenizer_open(formatted("%s/%s", folder, name)) : NULL;
    if (t) printf("  %s: %d tokens of a prompt\n", name, sc_tokenizer_length(t));
    else printf("  %s: %s\n", name, sc_error());
    sc_tokenizer_close(t);
}

static int info_main(const char *model) {
    if (!is_model(model)) return sc_end(info_file(model) && sc_printed());
    printf("%s:\n", model);
    sc_dit *dit = info_transformer(model);
    bool sd3 = dit && sc_dit_config_of(dit)->kind == SC_SD3;
    sc_text_encoders *text = sc_text_encoders_open(NULL, model, sd3 ? SC_SD3 : SC_FLUX);
    if (!text) printf("  text encoders: %s\n", sc_error());
    const char *path = kept(sc_part_path(model, SC_VAE));
    sc_vae *vae = path ? sc_vae_open(NULL, path, false) : NULL;
    if (!vae) printf("  vae: %s\n", sc_error());
    const char *const names[] = {"transformer", "text_encoder", "text_encoder_2",
                                 sd3 ? "text_encoder_3" : "text_encoder_2", "vae"};
    const sc_net *const nets[] = {sc_dit_net(dit), sc_text_net(text, SC_CLIP),
                                  sc_text_net(text, SC_SD3_CLIP_G), sc_text_net(text, SC_T5),
                                  sc_vae_net(vae)};
    /* a plan that could not be made is only bad where the part is there */
    bool ok = (text || is_absent(model, SC_CLIP) || is_absent(model, sd3 ? SC_SD3_T5 : SC_T5) ||
               (sd3 && is_absent(model, SC_SD3_CLIP_G))) &&
              (vae || !path) && (dit || is_absent(model, SC_TRANSFORMER));
    for (int i = 0; i < 5; i++) {
        if (!nets[i]) continue;
        ok = info_net(names[i], nets[i]) && ok &&
             (nets[i]->file || is_absent(model, SC_TRANSFORMER));
    }
    char list[512];
    long long unread = sc_net_unread(nets, 5, list, sizeof list);
    if (unread) printf("  %lld tensors of no use here", unread), sc_print_text(stdout, ": ", list);
    if (dit) {
        const sc_dit_config *c = sc_dit_config_of(dit);
        printf("  %s: %d double and %d single blocks, %d heads of %d, guidance %s\n",
               sd3 ? "SD3.5" : "FLUX", c->layers, c->single_layers, c->heads, c->head_size,
               c->guidance ? "yes (dev)" : sd3 ? "by two evaluations (--cfg)" : "no (schnell)");
    }
    info_tokenizer(model, "tokenizer");
    info_tokenizer(model, "tokenizer_2");
    if (sd3) info_tokenizer(model, "tokenizer_3");
    sc_dit_close(dit);
    sc_text_encoders_close(text);
    sc_vae_close(vae);
    if (!ok) sc_fail("%s: a part is not whole, or not one that is read here", model);
    return sc_end(ok && sc_printed());
}

/* LoRAs folded into a copy of the transformer, or, with --kohya, into one file of kohya's names. */
static int merge_main(void) {
    const char *path = o.transformer ? o.transformer : kept(sc_part_path(o.model, SC_TRANSFORMER));
    sc_dit *dit = path ? sc_dit_open(sc_cpu(), path, NULL) : NULL;
    float guidance = NAN; /* that of the first of --steps, as the scale: weights cannot keep it */
    float scale;
    bool ok = dit && (o.lora[0] || sc_fail("merge needs --lora FILE[:SCALE]")) &&
              (o.kohya ? sc_check_out(o.out, SC_WEIGHTS, o.named, o.model, o.transformer, o.lora)
                       : sc_can_write_model(dit, o.out));
    const char *weights = formatted("%s/diffusion_pytorch_model.safetensors", o.out);
    const char *merged = "";
    for (int i = 0; ok && i < 8 && o.lora[i]; i++) {
        ok = sc_apart(weights, sc_lora_argument(o.lora[i], o.steps[0], &scale, NULL)) &&
             sc_load_lora_argument(dit, o.lora[i], o.steps[0], &guidance);
        merged = formatted("%s%s%s", merged, i ? " " : "", o.lora[i]);
    }
    const char *vae = ok ? kept(sc_part_path(o.model, SC_VAE)) : NULL; /* perhaps in one file */
    if (ok && (!vae || strcmp(vae, path)))
        sc_warn_unread((const sc_net *[]){sc_dit_net(dit)}, 1, path);
    const char *metadata[] = {"format", "pt", "command", sc_command, "merged", merged, NULL};
    int64_t all = 0, wide = 0, half = 0; /* numbers; the type is that of most, of fp8 bf16 */
    for (int64_t i = 0; ok && i < sc_dit_net(dit)->count; i++) {
        const sc_weight *w = sc_dit_net(dit)->weights[i];
        int64_t n = sc_count(&w->tensor);
        all += n;
        wide += w->source.dtype == SC_F32 ? n : 0;
        half += w->source.dtype == SC_F16 ? n : 0;
    }
    sc_dtype type = 2 * wide > all ? SC_F32 : 2 * half > all ? SC_F16 : SC_BF16;
    if (ok && o.kohya) ok = sc_lora_save_kohya(dit, o.out, metadata);
    else if (ok) ok = sc_dit_save(dit, o.out, type, metadata);
    const char *how = formatted(": take it with --transformer %s", o.out);
    if (ok) printf("wrote %s%s\n", o.out, o.kohya ? "" : how);
    if (ok && isfinite(guidance))
        printf("for %d steps the LoRA asks for guidance %g\n", o.steps[0], guidance);
    sc_dit_close(dit);
    return sc_end(ok);
}

/* Refuses options that nothing would read: those given, but for the ones in the list. */
static bool reads(const char *what, const char *list, int argc, char **argv) {
    for (int i = 0; i < OPTIONS; i++)
        if (table[i].name && sc_given(argc, argv, table[i].name, NULL) &&
            !is_listed(list, table[i].name))
            return sc_fail("%s does not read %s", what, table[i].name);
    return true;
}

static int wrong_words(const char *command, int count, const char *program) {
    if (!strcmp(command, "merge")) sc_fail("merge takes --lora FILE[:SCALE]");
    else if (count == 1 && !strcmp(command, "info"))
        sc_fail("info of what? A model folder or a safetensors file");
    else sc_fail("'%s' is neither info nor merge (see %s --help)", command, program);
    return sc_bad_usage(usage);
}

int main(int argc, char **argv) {
    sc_start(argv);
    const char *words[2] = {NULL, NULL};
    sc_parse_recipe(table, OPTIONS, sc_given(argc, argv, "--model", o.model), "sample");
    int count = sc_parse(usage, table, OPTIONS, argc, argv, words, 2);
    o.guided = sc_given(argc, argv, "--guidance", NULL) != NULL;
    sc_set_threads(o.threads);
    if (!count) sc_catch_interrupt(); /* info and merge have nothing to keep */
    bool info = count == 2 && !strcmp(words[0], "info");
    bool merge = count == 1 && !strcmp(words[0], "merge");
    o.named = o.out != NULL;
    if (!o.out) o.out = !merge ? "sheet.png" : o.kohya ? "lora-kohya.safetensors" : "merged";
    if (o.threads < 0 || o.threads > SC_MAX_THREADS)
        return sc_fail("--threads is a number from 0 to %d", SC_MAX_THREADS), sc_bad_usage(NULL);
    if (o.batch < 1 || o.batch > 4096 || o.count < 0 || o.count == 1 || o.resolution < 0 ||
        !(o.shift >= 0) || !(o.cfg >= 0) || (o.cfg_loras && !o.cfg) || (o.kohya && !merge))
        return sc_fail("--batch from 1 to 4096, --count from 2 up, no negative numbers; "
                       "--cfg-loras needs --cfg, --kohya is for merge"), sc_bad_usage(NULL);
    if (count && !info && !merge) return wrong_words(words[0], count, argv[0]);
    const char *read = "--model|--transformer|--lora|--steps|--out|--kohya|--threads";
    if (count && !reads(words[0], info ? "" : read, argc, argv)) return sc_bad_usage(NULL);
    if (!count) return experiment_main();
    if (sc_rank) return sc_end(true); /* for one process */
    return info ? info_main(words[1]) : merge_main();
}
