/* ./train DATA: turn a flow-matching model into a few-step one (SCFM), or train one from nothing.
 *
 * This file is the driver: options, data, progress, files. The method itself is in shortcut.h. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "shortcut.h"
#include "tools.h"

static const char usage[] =
    "usage: ./train DATA [options]\n"
    "\n"
    "Distils the model into a few-step sampler by SCFM, with a LoRA, from the text-picture\n"
    "pairs in DATA (pictures and metadata.jsonl, or name.png + name.txt), and writes\n"
    "lora.safetensors.\n"
    "\n"
    "  ./train data/10pairs                         the shipped small model, minutes on a CPU\n"
    "  ./train my-pictures --model FLUX.1-dev --resolution 512\n"
    "  ./train pictures --pretrain --out tiny/transformer       all weights, from random ones\n"
    "\n"
    "The defaults in [] are those of --model: its recipe.json's, else the paper's for FLUX.1.";

/* Every hyper-parameter; the comments give the paper's values for FLUX.1-dev. */
typedef struct options {
    const char *data, *model, *out, *run, *device, *start, *transformer;
    bool full, pretrain, distill_guidance; /* default: SCFM with a LoRA */
    bool resume, dry_run, no_cache;
    int rank;                 /* 64 */
    float alpha;              /* as the rank: scale 1 */
    int steps, batch, warmup; /* 10000, 8, 0 */
    float lr, final_lr; /* 2e-5; the rate goes to this fraction of it along a cosine: 1, constant */
    float weight_decay, clip; /* 1e-4, 10 */
    float beta2;              /* 0.999 */
    float fast, slow;         /* EMA decays: 0.99, 0.999 */
    int ema_restart; /* copy the student into both every so many steps: 0, never (SD3.5: 2000) */
    float teacher_ratio; /* 0.4 */
    int teacher_steps;   /* 32 */
    int self_steps[8];   /* 2,4,8,16 */
    float shift[2];      /* 2.5 to 4.5 */
    float dynamic_shift; /* 0.1 */
    float guidance[2];   /* 0 to 7.5 */
    float fm_ratio;      /* 0; above it, part of the batch is plain flow matching. --pretrain: 1 */
    float caption_dropout;       /* 0; --pretrain: 0.1 */
    int resolution, text_tokens; /* 512, 256 */
    int threads;
    uint64_t seed;
    int preview, save;  /* every so many steps; 0: at the end only */
    int stop_after;     /* save and stop there, to go on with --resume */
    const char *scales; /* "3:1@1.5 8:0.5": for a number of steps the LoRA scale that suits, and the
                         * guidance after @ */
    bool checkpointing;
    const char *weights;    /* auto or fp8 */
    const char *weights_on; /* device or host */
} options;

static bool all_weights(const options *o) { return o->full || o->pretrain || o->distill_guidance; }

static options defaults(void) {
    return (options){.model = "data/tiny-flux",
                     .run = "run",
                     .device = "auto",
                     .weights = "auto",
                     .weights_on = "device",
                     .rank = 64,
                     .steps = 10000,
                     .batch = 8,
                     .lr = 2e-5f,
                     .final_lr = 1,
                     .weight_decay = 1e-4f,
                     .clip = 10,
                     .beta2 = 0.999f,
                     .fast = 0.99f,
                     .slow = 0.999f,
                     .teacher_ratio = 0.4f,
                     .teacher_steps = 32,
                     .self_steps = {2, 4, 8, 16},
                     .shift = {2.5f, 4.5f},
                     .dynamic_shift = 0.1f,
                     .guidance = {0, 7.5f},
                     .seed = 1,
                     .preview = 500,
                     .save = 500};
}

/* The command line as a table; recipe.json of the model folder uses the same names. Each function
 * returns how many options it put there: first what is learned, and how. */
static int learning_options(options *o, sc_option *table) {
    const sc_option all[] = {
        {NULL, SC_FLAG, NULL, NULL, "What to train:"},
        {"--model", SC_STRING, &o->model, "DIR", "FLUX pipeline folder"},
        {"--full", SC_FLAG, &o->full, NULL, "all weights instead of a LoRA"},
        {"--pretrain", SC_FLAG, &o->pretrain, NULL,
         "all weights, from random ones, by flow matching"},
        {"--distill-guidance", SC_FLAG, &o->distill_guidance, NULL,
         "all weights: learn guidance as an input"},
        {"--transformer", SC_STRING, &o->transformer, "DIR",
         "take the transformer from this folder"},
        {"--start", SC_STRING, &o->start, "FILE", "start from this LoRA"},
        {"--rank", SC_INT, &o->rank, "N", "LoRA rank"},
        {"--alpha", SC_FLOAT, &o->alpha, "X", "LoRA alpha (0: the rank)"},
        {NULL, SC_FLAG, NULL, NULL, "How long and how fast:"},
        {"--steps", SC_INT, &o->steps, "N", "training steps"},
        {"--batch", SC_INT, &o->batch, "N", "pairs in a step"},
        {"--lr", SC_FLOAT, &o->lr, "X", "learning rate"},
        {"--warmup", SC_INT, &o->warmup, "N", "steps of linear warm-up"},
        {"--final-lr", SC_FLOAT, &o->final_lr, "X",
         "the rate ends, on a cosine, at this part of --lr"},
        {"--weight-decay", SC_FLOAT, &o->weight_decay, "X", "AdamW weight decay"},
        {"--beta2", SC_FLOAT, &o->beta2, "X", "AdamW's second beta"},
        {"--clip", SC_FLOAT, &o->clip, "X", "gradient norm at most this"},
        {"--fast", SC_FLOAT, &o->fast, "X", "decay of the fast average"},
        {"--slow", SC_FLOAT, &o->slow, "X", "decay of the slow average"},
        {"--ema-restart", SC_INT, &o->ema_restart, "N",
         "restart both averages every N steps (0: never)"},
        {NULL, SC_FLAG, NULL, NULL, "The SCFM recipe:"},
        {"--teacher-ratio", SC_FLOAT, &o->teacher_ratio, "X",
         "part of the samples whose first half-step is the teacher's"},
        {"--teacher-steps", SC_INT, &o->teacher_steps, "N", "grid of the teacher's half-steps"},
        {"--self-steps", SC_INTS, &o->self_steps, "N,N", "grids of the student's own"},
        {"--shift", SC_RANGE, &o->shift, "A,B", "time shift, uniform between these"},
        {"--dynamic-shift", SC_FLOAT, &o->dynamic_shift, "X",
         "part of the samples with FLUX's dynamic shift"},
        {"--guidance", SC_RANGE, &o->guidance, "A,B", "guidance, uniform between these"},
        {"--fm-ratio", SC_FLOAT, &o->fm_ratio, "X",
         "part of the batch with the flow-matching target (--pretrain: 1)"},
        {"--caption-dropout", SC_FLOAT, &o->caption_dropout, "X",
         "part of the captions left empty (--pretrain: 0.1)"},
        {"--scales", SC_STRING, &o->scales, "LIST",
         "what suits numbers of steps, kept in the file: \"3:1@1.5 8:0.5\" is scale 1 and guidance "
         "1.5 for 3 steps"},
    };
    memcpy(table, all, sizeof all);
    return (int)(sizeof all / sizeof *all);
}

/* Then what that takes, and where it goes. */
static int running_options(options *o, sc_option *table) {
    const sc_option all[] = {
        {NULL, SC_FLAG, NULL, NULL, "Data and memory:"},
        {"--resolution", SC_INT, &o->resolution, "N",
         "pictures up to NxN pixels, in aspect buckets (0: the model's)"},
        {"--text-tokens", SC_INT, &o->text_tokens, "N", "T5 tokens of a caption (0: the model's)"},
        {"--checkpointing", SC_FLAG, &o->checkpointing, NULL,
         "recompute all blocks in the backward pass: less memory (on a GPU: as many as needed)"},
        {"--weights", SC_CHOICE, &o->weights, "auto|fp8",
         "frozen matrices: as in the file, or fp8, half of bf16"},
        {"--weights-on", SC_CHOICE, &o->weights_on, "device|host",
         "frozen matrices: in host memory they are streamed, for GPUs that are too small"},
        {"--no-cache", SC_FLAG, &o->no_cache, NULL, "do not keep latents and embeddings in DATA"},
        {NULL, SC_FLAG, NULL, NULL, "Running:"},
        {"--out", SC_STRING, &o->out, "PATH",
         "result (LoRA: lora.safetensors; all weights: a folder)"},
        {"--run", SC_STRING, &o->run, "DIR", "folder for loss.csv, preview.png and the state"},
        {"--resume", SC_FLAG, &o->resume, NULL, "go on from the state in the run folder"},
        {"--dry-run", SC_FLAG, &o->dry_run, NULL,
         "print the plan, the memory and the time, and stop"},
        {"--preview", SC_INT, &o->preview, "N", "a preview picture every N steps (0: none)"},
        {"--save", SC_INT, &o->save, "N", "save result and state every N steps (0: at the end)"},
        {"--stop-after", SC_INT, &o->stop_after, "N", "save and stop after step N (0: go through)"},
        {"--device", SC_CHOICE, &o->device, SC_DEVICES, "what computes"},
        {"--threads", SC_INT, &o->threads, "N", "CPU threads (0: OMP_NUM_THREADS, or all cores)"},
        {"--seed", SC_SEED, &o->seed, "N", "of everything random"},
    };
    memcpy(table, all, sizeof all);
    return (int)(sizeof all / sizeof *all);
}

static int option_table(options *o, sc_option *table) {
    int count = learning_options(o, table);
    return count + running_options(o, table + count);
}

#define MAX_OPTIONS 64

/* ---- Data: latents and text embeddings of every pair, computed once ---- */

typedef struct pair {
    int h, w, text;    /* grid of tokens; index of the caption's embedding */
    float *mean, *std; /* [h*w, in_channels] the normalised posterior, packed */
} pair;

typedef struct training {
    options o;
    sc_pipeline *pipeline;
    sc_params *params;
    sc_recipe recipe;
    sc_adamw adamw;
    sc_rng rng;
    pair *pairs;
    int pair_count;
    float *context,
        *pooled; /* [texts, T, text_channels], [texts, pooled_channels]; text 0 is empty */
    int text_count;
    sc_batch batch;
    float *batch_memory;
    int64_t step;
    bool saved; /* the run folder has a state of this run */
    char *command;
    char *state, *losses, *picture, *cache; /* paths */
} training;

/* 1. A batch: pairs of one size, drawn with replacement; latents sampled from the posterior. */
static void draw_batch(training *t) {
    const sc_flux_config *c = sc_flux_config_of(t->pipeline->flux);
    int64_t text_size = (int64_t)t->pipeline->text_tokens * c->text_channels;
    const pair *first = &t->pairs[sc_uniform_int(&t->rng, t->pair_count)];
    int64_t n = (int64_t)first->h * first->w * c->in_channels;
    float *x0 = t->batch_memory, *noise = x0 + t->o.batch * n;
    for (int b = 0; b < t->o.batch; b++) {
        const pair *p = first;
        if (b) do
                p = &t->pairs[sc_uniform_int(&t->rng, t->pair_count)];
            while (p->h != first->h || p->w != first->w);
        sc_sample_posterior(&t->rng, n, p->mean, p->std, x0 + b * n);
        memcpy(t->batch.context + b * text_size, t->context + p->text * text_size,
               (size_t)text_size * 4);
        memcpy(t->batch.pooled + b * c->pooled_channels, t->pooled + p->text * c->pooled_channels,
               (size_t)c->pooled_channels * 4);
    }
    sc_normal(&t->rng, noise, t->o.batch * n);
    t->batch.x0 = x0;
    t->batch.noise = noise;
    t->batch.h = first->h;
    t->batch.w = first->w;
}

/* ---- The state: enough to go on bit for bit ---- */

/* The arrays of the state, by name; the teacher's only where it is a copy of all weights. */
static int state_arrays(const training *t, sc_named *named, sc_tensor *tensors) {
    sc_params *p = t->params;
    float *arrays[] = {p->set[SC_STUDENT], p->set[SC_FAST], p->set[SC_SLOW], p->m, p->v,
                       p->set[SC_TEACHER]};
    static const char *const names[] = {"student", "fast", "slow", "m", "v", "teacher"};
    int n = p->set[SC_TEACHER] ? 6 : 5;
    for (int i = 0; i < n; i++) {
        tensors[i] =
            (sc_tensor){.data = arrays[i], .dtype = SC_F32, .ndim = 1, .shape = {p->count}};
        named[i] = (sc_named){names[i], &tensors[i], SC_F32};
    }
    return n;
}

/* One array at a time: the host never holds more. */
static bool fill_state(const void *user, const sc_named *x, sc_tensor *host) {
    const training *t = (const training *)user;
    size_t count = (size_t)sc_count(x->tensor);
    host->data = sc__alloc(count, sizeof(float));
    return host->data &&
           t->pipeline->backend->download(host->data, x->tensor->data, count * sizeof(float));
}

static bool save_state(const training *t) {
    char step[32], steps[32], rng[32];
    sc_named named[6];
    sc_tensor tensors[6];
    int n = state_arrays(t, named, tensors);
    snprintf(step, sizeof step, "%lld", (long long)t->step);
    snprintf(rng, sizeof rng, "%llu", (unsigned long long)t->rng.state);
    snprintf(steps, sizeof steps, "%d", t->o.steps);
    const char *metadata[] = {"step", step,      "steps",    steps, "rng",
                              rng,    "command", t->command, NULL};
    return sc__save(t->state, named, n, metadata, fill_state, t);
}

static bool load_state(training *t) {
    const char *path = t->state;
    sc_named named[6];
    sc_tensor tensors[6];
    int n = state_arrays(t, named, tensors);
    if (access(path, F_OK) != 0)
        return sc_fail("%s: %s: nothing to resume; leave out --resume to start", path,
                        strerror(errno));
    sc_file *file = sc_file_open(path);
    if (!file) return false;
    const char *step = sc_file_metadata(file, "step"), *rng = sc_file_metadata(file, "rng");
    const char *command = sc_file_metadata(file, "command");
    bool ok = (step && rng) || sc_fail("%s: not a training state", path);
    for (int i = 0; ok && i < n; i++) {
        const sc_tensor *x = sc_file_find(file, named[i].name);
        if (!x || x->dtype != SC_F32 || sc_count(x) != t->params->count)
            ok = sc_fail("%s: '%s' does not fit: resume with the model, rank and mode the run had",
                          path, named[i].name);
        else t->pipeline->backend->upload(tensors[i].data, x->data, (size_t)t->params->count * 4);
    }
    if (ok) {
        t->saved = true;
        t->step = t->adamw.step = strtoll(step, NULL, 10);
        t->rng.state = strtoull(rng, NULL, 10);
        if (t->step > t->o.steps)
            ok = sc_fail("%s is at step %lld already, beyond --steps %d", path, (long long)t->step,
                          t->o.steps);
    }
    if (ok && command) { /* with other options it would be another run */
        sc_print_text(stderr, "resumed; this run was saved by: ", command);
        char *both = sc_command(3, (char *[]){(char *)command, "&&", t->command});
        if ((ok = both != NULL)) free(t->command), t->command = both;
    }
    sc_file_close(file);
    return ok;
}

/* A new run does not overwrite one that was stopped: that may be days of work. */
static bool check_unfinished(const training *t) {
    sc_file *file = sc__exists(t->state) ? sc_file_open(t->state) : NULL;
    const char *step = file ? sc_file_metadata(file, "step") : NULL;
    const char *steps = file ? sc_file_metadata(file, "steps") : NULL;
    bool ok = !step || !steps || atoll(step) >= atoll(steps) ||
              sc_fail("%s is a run that was stopped at step %s of %s: go on with --resume, put a "
                       "new one elsewhere with --run DIR, or delete it",
                       t->state, step, steps);
    sc_file_close(file);
    return ok;
}

/* The slow average of all weights, or the student's LoRA: what the run is for. */
static bool save_result(const training *t) {
    char steps[32], rank[32], seed[32];
    snprintf(steps, sizeof steps, "%lld", (long long)t->step);
    snprintf(rank, sizeof rank, "%d", t->o.rank);
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)t->o.seed);
    const char *metadata[] = {"base_model",
                              t->o.transformer ? t->o.transformer : t->o.model,
                              "method",
                              "SCFM",
                              "rank",
                              rank,
                              "alpha",
                              rank,
                              /* what a whole model keeps: */ "steps",
                              steps,
                              "seed",
                              seed,
                              "command",
                              t->command,
                              "format",
                              "pt",
                              t->o.scales ? "scales" : NULL,
                              t->o.scales,
                              NULL};
    if (t->params->adapters) return sc_lora_save(t->params, SC_STUDENT, t->o.out, metadata);
    sc_params_use(t->params, SC_SLOW);
    bool ok = sc_flux_save(t->pipeline->flux, t->o.out, SC_BF16, metadata + 8);
    sc_params_use(t->params, SC_STUDENT);
    return ok;
}

/* ---- Preview: base 32 steps | base 3 | student 3, of the first pair, from the same noise ---- */

static bool preview_panel(training *t, int steps, sc_set set, const float *noise, float *latents,
                          float *rgb) {
    sc_pipeline *p = t->pipeline;
    const sc_flux_config *c = sc_flux_config_of(p->flux);
    const pair *first = &t->pairs[0];
    const float *context = t->context + (int64_t)first->text * p->text_tokens * c->text_channels,
                *pooled = t->pooled + (int64_t)first->text * c->pooled_channels;
    int64_t tokens = (int64_t)first->h * first->w;
    const uint8_t sets[1] = {(uint8_t)set};
    sc_sampling s = {.steps = steps,
                     .shift = sc_pipeline_shift(p, tokens),
                     .guidance = 0.5f * (t->o.guidance[0] + t->o.guidance[1]),
                     .h = first->h,
                     .w = first->w,
                     .progress = sc_not_interrupted,
                     .sets = sets};
    if (!t->params->adapters) sc_params_use(t->params, set);
    memcpy(latents, noise, (size_t)(tokens * c->in_channels) * 4);
    bool ok = sc_sample(p->flux, p->tape, &s, 1, p->text_tokens, context, pooled, latents) &&
              sc_pipeline_decode(p, latents, 1, first->h, first->w, rgb);
    if (!t->params->adapters) sc_params_use(t->params, SC_STUDENT);
    return ok;
}

static bool preview(training *t) {
    sc_pipeline *p = t->pipeline;
    const pair *first = &t->pairs[0];
    int height = first->h * p->token_pixels, width = first->w * p->token_pixels;
    int64_t n = (int64_t)first->h * first->w * sc_flux_config_of(p->flux)->in_channels,
            pixels = (int64_t)3 * height * width;
    if (!sc_may_replace(t->picture)) return false;
    float *memory = (float *)sc__alloc((size_t)(2 * n + 4 * pixels), sizeof *memory);
    if (!memory) return false;
    float *noise = memory, *latents = noise + n, *panel = latents + n, *sheet = panel + pixels;
    sc_rng rng = {t->o.seed};
    sc_normal(&rng, noise, n);
    bool has_teacher = t->params->set[SC_TEACHER] || t->params->adapters, ok = true;
    size_t held = sc_tape_bytes(p->tape); /* given back while the VAE works */
    for (int i = has_teacher ? 0 : 1; ok && i < 3; i++) {
        int steps = i == 0 || (!has_teacher && i == 1) ? 32 : 3;
        sc_set set = i < 2 && has_teacher ? SC_TEACHER : t->params->adapters ? SC_STUDENT : SC_SLOW;
        ok = preview_panel(t, steps, set, noise, latents, panel);
        for (int y = 0; ok && y < 3 * height; y++)
            memcpy(sheet + ((int64_t)y * 3 + i) * width, panel + (int64_t)y * width,
                   (size_t)width * 4);
    }
    sc_pipeline_release(p);
    ok = sc_tape_reserve(p->tape, held) && ok;
    char *made_by = sc_command(2, (char *[]){SC_MADE_BY, t->command});
    ok = ok && made_by &&
         sc_picture_save(&(sc_picture){3 * width, height, sheet}, t->picture, made_by);
    free(made_by);
    free(memory);
    return ok;
}

/* ---- The loop ---- */

static float learning_rate(const options *o, int64_t step) {
    float rate = o->lr, done = (float)step / (float)o->steps;
    if (step < o->warmup) return rate * (float)(step + 1) / (float)o->warmup;
    return rate * (o->final_lr + (1 - o->final_lr) * 0.5f * (1 + cosf(3.14159265f * done)));
}

/* One of the two may fail, as where --out cannot be written; the other keeps what was learned. */
static bool save_all(training *t) {
    bool state = save_state(t), result = save_result(t);
    t->saved = t->saved || state;
    return state && result;
}

/* One that fails, or for which there is no time, is no reason to stop. True: it was drawn. */
static bool try_preview(training *t) {
    if (!t->o.preview || sc_interrupted) return false;
    if (preview(t)) return true;
    sc_end_line();
    if (!sc_interrupted) fprintf(stderr, "warning: no preview: %s\n", sc_error());
    return false;
}

/* A GPU may still be busy with it afterwards; what it found is for report_step. */
static bool train_step(training *t) {
    draw_batch(t);
    if (!sc_train_gradient(t->pipeline->flux, t->params, t->pipeline->tape, &t->recipe, &t->batch,
                           &t->rng))
        return false;
    t->adamw.lr = learning_rate(&t->o, t->step);
    sc_params_step(t->params, &t->adamw, t->o.fast, t->o.slow);
    t->step++;
    if (t->o.ema_restart && t->step % t->o.ema_restart == 0) {
        sc_params_copy(t->params, SC_FAST, SC_STUDENT);
        sc_params_copy(t->params, SC_SLOW, SC_STUDENT);
    }
    return true;
}

/* Of the `step`-th step, counted from 1. */
static bool report_step(training *t, int64_t step, double *loss, double *norm) {
    if (!sc_params_report(t->params, loss, norm)) return false;
    if (isfinite(*loss) && isfinite(*norm)) return true;
    return sc_fail("step %lld: the loss is %g, the gradient's norm %g: lower --lr%s%s",
                    (long long)step, *loss, *norm, t->saved ? "; the last saved state is in " : "",
                    t->saved ? t->o.run : "");
}

/* Progress on the terminal and in loss.csv; the loss is smoothed for the eye. */
typedef struct progress {
    FILE *csv;
    double started, smooth;
    int64_t first, told; /* steps done before this run; steps reported */
} progress;

static bool tell_step(training *t, progress *p) {
    char extra[128];
    double loss, norm;
    int64_t step = ++p->told;
    if (!report_step(t, step, &loss, &norm)) return false;
    p->smooth = step - p->first == 1 ? loss : 0.98 * p->smooth + 0.02 * loss;
    fprintf(p->csv, "%lld,%.6g,%.6g,%.6g\n", (long long)step, loss, norm,
            learning_rate(&t->o, step - 1));
    snprintf(extra, sizeof extra, "loss %.4f, %.1f pictures/s", p->smooth,
             (double)(step - p->first) * t->o.batch / (sc_seconds() - p->started));
    sc_progress("step", p->first, step, t->o.steps, p->started, extra);
    return true;
}

/* loss.csv: a new one, or, of a resumed run, that one as it was when the state was saved. */
static FILE *open_csv(const char *path, int64_t done) {
    FILE *csv = done ? fopen(path, "r+") : NULL;
    if (!csv) {
        if ((csv = fopen(path, "w"))) fputs(SC_LOSS_COLUMNS, csv);
        return csv;
    }
    for (int64_t line = 0; line <= done; line++) /* the heading, and a line for each step */
        for (int c = 0; c != '\n' && c != EOF;) c = fgetc(csv);
    if (fseek(csv, 0, SEEK_CUR) || ftruncate(fileno(csv), ftell(csv))) fclose(csv), csv = NULL;
    return csv;
}

static bool train(training *t) {
    progress p = {.started = sc_seconds(), .first = t->step, .told = t->step};
    if (sc_interrupted) return sc_fail("stopped before the first step: nothing was written");
    FILE *csv = p.csv = open_csv(t->losses, p.first);
    if (!csv) return sc_fail("%s: %s", t->losses, strerror(errno));
    bool ok = true;
    int64_t last = t->o.stop_after && t->o.stop_after < t->o.steps ? t->o.stop_after : t->o.steps;
    while (ok && t->step < last && !sc_interrupted) {
        ok = train_step(t);
        bool save = t->o.save && t->step % t->o.save == 0 && t->step < last;
        bool look = t->o.preview && t->step % t->o.preview == 0 && t->step < last;
        /* A GPU gets the next step before it is asked about this one. */
        int late = save || look || t->pipeline->backend->on_host ? 0 : 1;
        while (ok && p.told + late < t->step) ok = tell_step(t, &p);
        if (ok && save) fflush(csv), ok = save_all(t);
        if (ok && look) try_preview(t);
    }
    while (ok && p.told < t->step) ok = tell_step(t, &p);
    bool told = !ferror(csv); /* said at the end: what was learned comes first */
    told = fclose(csv) == 0 && told;
    if (!ok || !save_all(t)) return false;
    sc_end_line();
    if (t->step < t->o.steps)
        fprintf(stderr, "stopped at step %lld of %d; go on with --resume\n", (long long)t->step,
                t->o.steps);
    bool drawn = try_preview(t);
    printf("wrote %s and %s/{loss.csv,state.safetensors%s}\n", t->o.out, t->o.run,
           drawn ? ",preview.png" : "");
    return told || sc_fail("%s: it was not written to its end: is the disk full?", t->losses);
}

/* ---- The cache: DATA/.shortcut-cache.safetensors ----
 * latents.<i> [2, h, w, in_channels]: mean and std of pair i; caption [pairs]: its text; context,
 * pooled. The metadata's fingerprint says what they were made from. */

static bool alloc_texts(training *t, int count) {
    const sc_flux_config *c = sc_flux_config_of(t->pipeline->flux);
    t->text_count = count;
    t->context = (float *)sc__alloc(
        (size_t)count * (size_t)t->pipeline->text_tokens * (size_t)c->text_channels, 4);
    t->pooled = (float *)sc__alloc((size_t)count * (size_t)c->pooled_channels, 4);
    return t->context && t->pooled;
}

static bool alloc_pair(training *t, int index, int h, int w) {
    pair *p = &t->pairs[index];
    int64_t n = (int64_t)h * w * sc_flux_config_of(t->pipeline->flux)->in_channels;
    p->h = h, p->w = w;
    p->mean = (float *)sc__alloc((size_t)(2 * n), sizeof *p->mean);
    if (p->mean) p->std = p->mean + n;
    return p->mean != NULL;
}

static void free_data(training *t) {
    for (int i = 0; t->pairs && i < t->pair_count; i++) free(t->pairs[i].mean);
    free(t->pairs), free(t->context), free(t->pooled);
    t->pairs = NULL, t->context = t->pooled = NULL;
}

/* True if the cache is there, whole and made from the same things; false says nothing. */
static bool load_cache(training *t, const char *fingerprint) {
    char name[32];
    const sc_flux_config *c = sc_flux_config_of(t->pipeline->flux);
    sc_file *file = sc__exists(t->cache) ? sc_file_open(t->cache) : NULL;
    if (!file) return false;
    const char *made_from = sc_file_metadata(file, "fingerprint");
    const sc_tensor *context = sc_file_find(file, "context"),
                    *pooled = sc_file_find(file, "pooled"),
                    *caption = sc_file_find(file, "caption");
    bool ok = made_from && !strcmp(made_from, fingerprint) && context && pooled && caption &&
              caption->dtype == SC_I32 && context->ndim == 3 &&
              context->shape[1] == t->pipeline->text_tokens &&
              context->shape[2] == c->text_channels && pooled->ndim == 2 &&
              pooled->shape[0] == context->shape[0] && pooled->shape[1] == c->pooled_channels;
    if (ok) {
        t->pair_count = (int)sc_count(caption);
        t->pairs = (pair *)sc__alloc((size_t)t->pair_count, sizeof *t->pairs);
        ok = t->pairs && alloc_texts(t, (int)context->shape[0]);
    }
    if (ok) {
        sc_to_f32(t->context, context->data, context->dtype, sc_count(context));
        sc_to_f32(t->pooled, pooled->data, pooled->dtype, sc_count(pooled));
    }
    for (int i = 0; ok && i < t->pair_count; i++) {
        snprintf(name, sizeof name, "latents.%d", i);
        const sc_tensor *x = sc_file_find(file, name);
        int text = ((const int32_t *)caption->data)[i];
        ok = x && x->ndim == 4 && x->shape[0] == 2 && x->shape[3] == c->in_channels && text >= 0 &&
             text < t->text_count && alloc_pair(t, i, (int)x->shape[1], (int)x->shape[2]);
        if (ok)
            sc_to_f32(t->pairs[i].mean, x->data, x->dtype, sc_count(x)), t->pairs[i].text = text;
    }
    sc_file_close(file);
    return ok;
}

static bool save_cache(const training *t, const char *fingerprint) {
    const sc_flux_config *c = sc_flux_config_of(t->pipeline->flux);
    int n = t->pair_count;
    sc_named *named = (sc_named *)sc__alloc((size_t)n + 3, sizeof *named);
    sc_tensor *x = (sc_tensor *)sc__alloc((size_t)n + 3, sizeof *x);
    char(*names)[32] = (char(*)[32])sc__alloc((size_t)n, sizeof *names);
    int32_t *caption = (int32_t *)sc__alloc((size_t)n, sizeof *caption);
    bool ok = named && x && names && caption;
    for (int i = 0; ok && i < n; i++) {
        const pair *p = &t->pairs[i];
        snprintf(names[i], sizeof names[i], "latents.%d", i);
        x[i] = (sc_tensor){
            .data = p->mean, .dtype = SC_F32, .ndim = 4, .shape = {2, p->h, p->w, c->in_channels}};
        named[i] =
            (sc_named){names[i], &x[i], SC_F32}; /* a cached run equals the first bit for bit */
        caption[i] = p->text;
    }
    if (ok) {
        x[n] = (sc_tensor){.data = t->context,
                           .dtype = SC_F32,
                           .ndim = 3,
                           .shape = {t->text_count, t->pipeline->text_tokens, c->text_channels}};
        x[n + 1] = (sc_tensor){.data = t->pooled,
                               .dtype = SC_F32,
                               .ndim = 2,
                               .shape = {t->text_count, c->pooled_channels}};
        x[n + 2] = (sc_tensor){.data = caption, .dtype = SC_I32, .ndim = 1, .shape = {n}};
        named[n] = (sc_named){"context", &x[n], SC_F32};
        named[n + 1] = (sc_named){"pooled", &x[n + 1], SC_F32};
        named[n + 2] = (sc_named){"caption", &x[n + 2], SC_I32};
        ok = sc_file_save(t->cache, named, n + 3,
                          (const char *[]){"fingerprint", fingerprint, NULL});
    }
    free(named), free(x), free(names), free(caption);
    return ok;
}

/* ---- Data from the folder ---- */

static uint64_t mix(uint64_t hash, const void *data, size_t n) { /* FNV-1a */
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
    return hash;
}

static uint64_t mix_file(uint64_t hash, const char *path) {
    struct stat s = {0};
    if (stat(path, &s)) return hash;
    int64_t facts[3] = {(int64_t)s.st_size, (int64_t)s.st_mtim.tv_sec, (int64_t)s.st_mtim.tv_nsec};
    return mix(hash, facts, sizeof facts);
}

/* The files of a part's weights: all shards, wherever they are. */
static uint64_t mix_part(uint64_t hash, const char *model, sc_part part) {
    char *path = sc_part_path(model, part);
    sc_file *file = path ? sc_file_open(path) : NULL;
    for (int64_t i = 0; file && i < file->part_count; i++) {
        char *shard = sc__shard_path(file, i);
        if (shard) hash = mix_file(hash, shard);
        free(shard);
    }
    sc_file_close(file);
    free(path);
    return hash;
}

/* What the cache depends on: pictures, captions, sizes, and the networks that encode them. */
static void fingerprint_of(const training *t, const sc_dataset *data, char text[32]) {
    static const char *const files[] = {
        "vae/config.json",           "text_encoder/config.json", "text_encoder_2/config.json",
        "tokenizer/vocab.json",      "tokenizer/merges.txt",     "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer.json"};
    uint64_t hash = 0xcbf29ce484222325u;
    for (int64_t i = 0; i < data->count; i++) {
        hash = mix(hash, data->pairs[i].path, strlen(data->pairs[i].path) + 1);
        hash = mix(hash, data->pairs[i].caption, strlen(data->pairs[i].caption) + 1);
        hash = mix_file(hash, data->pairs[i].path);
    }
    char *folder = sc_model_folder(t->o.model);
    for (size_t i = 0; folder && i < sizeof files / sizeof *files; i++) {
        char *path = sc__join(folder, files[i]);
        if (path) hash = mix_file(hash, path);
        free(path);
    }
    free(folder);
    for (int part = SC_VAE; part < SC_PARTS; part++)
        hash = mix_part(hash, t->o.model, (sc_part)part);
    int sizes[2] = {t->pipeline->resolution, t->pipeline->text_tokens};
    hash = mix(hash, sizes, sizeof sizes);
    snprintf(text, 32, "%016llx", (unsigned long long)hash);
}

static bool encode_texts(training *t, const sc_dataset *data) {
    const sc_flux_config *c = sc_flux_config_of(t->pipeline->flux);
    int64_t size = (int64_t)t->pipeline->text_tokens * c->text_channels;
    const char **texts = (const char **)sc__alloc((size_t)data->count + 1, sizeof *texts);
    if (!texts || !alloc_texts(t, (int)data->count + 1)) {
        free(texts);
        return false;
    }
    int known = 1;
    texts[0] = "";
    for (int64_t i = 0; i < data->count; i++) {
        int j = 0;
        while (j < known && strcmp(texts[j], data->pairs[i].caption)) j++;
        if (j == known) texts[known++] = data->pairs[i].caption;
        t->pairs[i].text = j;
    }
    t->text_count = known;
    double started = sc_seconds();
    bool ok = true;
    int cut = 0;
    for (int i = 0; ok && i < known; i++) {
        ok = sc_pipeline_text(t->pipeline, texts[i], t->context + i * size,
                              t->pooled + (int64_t)i * c->pooled_channels) &&
             (!sc_interrupted || sc_fail("stopped"));
        cut += t->pipeline->cut;
        sc_progress("caption", 0, i + 1, known, started, NULL);
    }
    if (ok && cut)
        fprintf(stderr, "warning: %d captions have more than %d tokens: their ends are left out\n",
                cut, t->pipeline->text_tokens);
    free(texts);
    return ok;
}

static bool encode_picture(training *t, const sc_pair *source, int index) {
    sc_pipeline *p = t->pipeline;
    sc_picture picture = {0}, fitted = {0};
    int width = 0, height = 0;
    bool ok = sc_picture_load(&picture, source->path);
    if (ok) {
        int multiple = p->token_pixels * 2 <= p->resolution ? p->token_pixels * 2 : p->token_pixels;
        sc_bucket(picture.width, picture.height, p->resolution, multiple, &width, &height);
        ok = sc_picture_fit(&fitted, &picture, width, height) &&
             alloc_pair(t, index, height / p->token_pixels, width / p->token_pixels) &&
             sc_pipeline_encode(p, fitted.rgb, width, height, t->pairs[index].mean,
                                t->pairs[index].std);
    }
    sc_picture_free(&picture);
    sc_picture_free(&fitted);
    return ok;
}

static bool load_data(training *t) {
    char fingerprint[32];
    sc_dataset *data = sc_dataset_open(t->o.data);
    if (!data) return false;
    if (data->unused) sc_print_text(stderr, "warning: ", data->unused);
    fingerprint_of(t, data, fingerprint);
    bool ok = true, cached = !t->o.no_cache && load_cache(t, fingerprint);
    for (int64_t i = 0; ok && i < data->count; i++) ok = sc_apart(t->o.out, data->pairs[i].path);
    if (ok && !cached) {
        free_data(t);
        t->pair_count = (int)data->count;
        t->pairs = (pair *)sc__alloc((size_t)data->count, sizeof *t->pairs);
        ok = t->pairs && encode_texts(t, data);
        double started = sc_seconds();
        for (int64_t i = 0; ok && i < data->count; i++) {
            ok = encode_picture(t, &data->pairs[i], (int)i) &&
                 (!sc_interrupted || sc_fail("stopped"));
            sc_progress("picture", 0, i + 1, data->count, started, NULL);
        }
        if (ok && !t->o.no_cache && !save_cache(t, fingerprint)) /* a folder to be read only */
            fprintf(stderr, "warning: not kept for the next run: %s\n", sc_error());
    }
    sc_dataset_close(data);
    sc_pipeline_release(t->pipeline); /* training needs the transformer alone */
    return ok;
}

/* ---- Setting up ---- */

static void set_recipe(training *t) {
    const options *o = &t->o;
    t->recipe = (sc_recipe){.distil_guidance = o->distill_guidance,
                            .teacher_ratio = o->teacher_ratio,
                            .teacher_steps = o->teacher_steps,
                            .shift = {o->shift[0], o->shift[1]},
                            .dynamic_shift_ratio = o->dynamic_shift,
                            .mu = t->pipeline->mu,
                            .guidance = {o->guidance[0], o->guidance[1]},
                            .fm_ratio = o->fm_ratio,
                            .caption_dropout = o->distill_guidance ? 0 : o->caption_dropout};
    memcpy(t->recipe.self_steps, o->self_steps, sizeof o->self_steps);
    t->adamw = (sc_adamw){.beta1 = 0.9f,
                          .beta2 = o->beta2,
                          .eps = 1e-8f,
                          .weight_decay = o->weight_decay,
                          .clip = o->clip};
    t->rng.state = o->seed;
}

/* Refuses what cannot be meant. */
static bool check_options(const options *o) {
    double scale, guidance;
    if (o->steps < 1) return sc_fail("--steps is a number from 1 up");
    if (o->batch < 1 || o->batch > 4096) return sc_fail("--batch is a number from 1 up to 4096");
    if (o->rank < 1 || o->rank > 1024) return sc_fail("--rank is a number from 1 to 1024");
    if (o->teacher_steps < 2 || o->teacher_steps % 2)
        return sc_fail("--teacher-steps is an even number");
    for (int i = 0; o->self_steps[i]; i++)
        if (o->self_steps[i] < 2 || o->self_steps[i] % 2)
            return sc_fail("--self-steps are even numbers");
    if (!(o->shift[0] > 0 && o->shift[1] > 0))
        return sc_fail("--shift is a positive number, or two");
    if (!(o->teacher_ratio >= 0 && o->teacher_ratio <= 1 && o->fm_ratio >= 0 && o->fm_ratio <= 1 &&
          o->caption_dropout >= 0 && o->caption_dropout <= 1))
        return sc_fail("--teacher-ratio, --fm-ratio and --caption-dropout lie between 0 and 1");
    if (!(o->lr > 0) || !isfinite(o->lr)) return sc_fail("--lr is a positive number");
    if (!(o->fast >= 0 && o->fast < 1 && o->slow >= 0 && o->slow < 1))
        return sc_fail("--fast and --slow lie from 0 to below 1");
    if (o->full + o->pretrain + o->distill_guidance > 1)
        return sc_fail("--full, --pretrain and --distill-guidance exclude each other");
    if (o->pretrain && o->teacher_ratio > 0)
        return sc_fail("--pretrain has no teacher: --teacher-ratio is 0 there");
    if (o->scales && !sc_scale_for(o->scales, 1, &scale, &guidance))
        return sc_fail("--scales is a list as \"3:1@1.5 8:0.5\", not '%s'", o->scales);
    if (o->start && all_weights(o)) return sc_fail("--start is for a LoRA, not for all weights");
    if (o->resolution < 0 || o->text_tokens < 0 || o->warmup < 0 || o->ema_restart < 0 ||
        o->preview < 0 || o->save < 0 || o->stop_after < 0)
        return sc_fail("a number of pixels, tokens or steps cannot be negative");
    if (!(o->beta2 >= 0 && o->beta2 < 1 && o->dynamic_shift >= 0 && o->dynamic_shift <= 1))
        return sc_fail("--beta2 lies from 0 to below 1, --dynamic-shift from 0 to 1");
    return true;
}

static bool open_model(training *t) {
    options *o = &t->o;
    const sc_backend *be = sc_device(o->device);
    sc_pipeline_options how = {.widen = all_weights(o),
                               .fp8 = !strcmp(o->weights, "fp8"),
                               .streamed = !strcmp(o->weights_on, "host"),
                               .random = o->pretrain && !o->transformer,
                               .seed = o->seed,
                               .transformer = o->transformer};
    if (!be || !(t->pipeline = sc_open_model(be, o->model, &how))) return false;
    if (o->text_tokens) t->pipeline->text_tokens = o->text_tokens;
    if (o->resolution) t->pipeline->resolution = o->resolution;
    sc_flux_checkpointing(t->pipeline->flux, o->checkpointing);
    return true;
}

static bool open_params(training *t) {
    options *o = &t->o;
    sc_flux *flux = t->pipeline->flux;
    t->params = all_weights(o) ? sc_params_full(flux, !o->pretrain)
                               : sc_params_lora(flux, o->rank,
                                                o->alpha > 0 ? o->alpha : (float)o->rank, o->seed);
    if (!t->params || (o->start && !sc_lora_start(t->params, o->start))) return false;
    const sc_flux_config *c = sc_flux_config_of(flux);
    int64_t largest = 0;
    for (int i = 0; i < t->pair_count; i++) {
        int64_t n = (int64_t)t->pairs[i].h * t->pairs[i].w * c->in_channels;
        largest = n > largest ? n : largest;
    }
    int64_t text = (int64_t)t->pipeline->text_tokens * c->text_channels, b = o->batch;
    t->batch_memory =
        (float *)sc__alloc((size_t)(b * (2 * largest + text + c->pooled_channels)), sizeof(float));
    if (!t->batch_memory) return false;
    t->batch = (sc_batch){.size = o->batch,
                          .text_tokens = t->pipeline->text_tokens,
                          .no_context = t->context,
                          .no_pooled = t->pooled,
                          .context = t->batch_memory + 2 * b * largest};
    t->batch.pooled = t->batch.context + b * text;
    return true;
}

/* On a GPU: how many blocks keep their activations, tried with the largest pictures there are. */
static bool plan_memory(training *t) {
    sc_pipeline *p = t->pipeline;
    if (p->backend->on_host || t->o.checkpointing) return true;
    const double gib = 1 << 30;
    for (int i = 0; i < t->pair_count; i++)
        if (!i || t->pairs[i].h * t->pairs[i].w > t->batch.h * t->batch.w)
            t->batch.h = t->pairs[i].h, t->batch.w = t->pairs[i].w;
    t->batch.x0 = t->batch_memory; /* zeros will do */
    t->batch.noise = t->batch_memory + (int64_t)t->o.batch * t->batch.h * t->batch.w *
                                           sc_flux_config_of(p->flux)->in_channels;
    sc_memory_plan plan;
    if (!sc_plan_memory(p->flux, t->params, p->tape, &t->recipe, &t->batch, &plan)) return false;
    printf("memory of %s: a step of %d pictures of %dx%d takes %.1f GiB, and %.1f GiB more for %d "
           "of %d blocks that are not run twice%s; %.1f GiB were left\n",
           p->backend->name, t->o.batch, t->batch.w * p->token_pixels, t->batch.h * p->token_pixels,
           (double)plan.step / gib, (double)plan.kept_bytes / gib, plan.kept, plan.blocks,
           plan.remade ? " (their cheap operations are)" : "", (double)plan.left / gib);
    fflush(stdout);
    return true;
}

static void print_plan(const training *t, const sc_option *table, int count) {
    const options *o = &t->o;
    printf("%s: %d pairs, %d captions; %lld of %lld parameters trained\n", o->data, t->pair_count,
           t->text_count - 1, (long long)t->params->count,
           (long long)sc_flux_parameters(t->pipeline->flux));
    printf("options:");
    sc_print_options(table, count);
    fflush(stdout);
}

/* --dry-run: a few real steps tell the memory and the time. */
static bool dry_run(training *t) {
    enum { TIMED = 5 };
    double loss, norm, started = 0;
    bool ok = true;
    for (int i = 0; ok && i <= TIMED; i++) { /* the first warms up */
        if (i == 1) started = sc_seconds();
        ok = train_step(t) && report_step(t, i + 1, &loss, &norm);
    }
    double seconds = (sc_seconds() - started) / TIMED;
    if (ok)
        printf("one step: %.4f s, so %d steps take about %.1f minutes; activations %zu MiB, "
               "trained numbers %lld MiB\n",
               seconds, t->o.steps, seconds * t->o.steps / 60,
               sc_tape_bytes(t->pipeline->tape) >> 20,
               (long long)(t->params->count * 4 * (t->params->set[SC_TEACHER] ? 7 : 6)) >> 20);
    return ok;
}

/* A LoRA is a file that is none of those that are read or written beside it; of all weights the
 * folder is looked at when the model is open. */
static bool check_out(const training *t, bool named) {
    const options *o = &t->o;
    const char *const start[] = {o->start, NULL};
    const char *const others[] = {o->transformer, t->state, t->losses, t->picture, t->cache};
    bool ok = sc_check_out(o->out, SC_WEIGHTS, named, o->model, start);
    for (size_t i = 0; ok && i < sizeof others / sizeof *others; i++)
        ok = sc_apart(o->out, others[i]);
    return ok;
}

/* Before hours of work: the run folder is ours alone, and what will be written can be. */
static bool check_places(const training *t, bool named, bool *made) {
    const options *o = &t->o;
    return sc__make_folder(o->run, made) && sc_lock(o->run, t->command) &&
           (o->resume || (check_unfinished(t) && sc_may_replace(t->state))) &&
           sc_can_write(t->state) && sc_may_replace(t->losses) && sc_can_write(t->losses) &&
           (all_weights(o) || check_out(t, named));
}

static bool set_paths(training *t, int argc, char **argv) {
    t->command = sc_command(argc, argv);
    t->state = sc__join(t->o.run, "state.safetensors");
    t->losses = sc__join(t->o.run, "loss.csv");
    t->picture = sc__join(t->o.run, "preview.png");
    t->cache = sc__join(t->o.data, ".shortcut-cache.safetensors");
    return t->command && t->state && t->losses && t->picture && t->cache;
}

static void close_training(training *t) {
    free_data(t);
    free(t->batch_memory);
    sc_params_free(t->params);
    sc_pipeline_close(t->pipeline);
    free(t->command), free(t->state), free(t->losses), free(t->picture), free(t->cache);
    sc_unlock();
}

int main(int argc, char **argv) {
    sc_start(argv);
    training t = {.o = defaults()};
    sc_option table[MAX_OPTIONS];
    const char *words[1] = {NULL};
    int count = option_table(&t.o, table);
    bool pretrain = sc_given(argc, argv, "--pretrain");
    bool whole =
        pretrain || sc_given(argc, argv, "--full") || sc_given(argc, argv, "--distill-guidance");
    const char *model = sc_given(argc, argv, "--model");
    if (!whole && !sc_parse_recipe(table, count, model ? model : t.o.model, "train"))
        return sc_die();
    if (pretrain) /* there is no teacher */
        t.o.fm_ratio = 1, t.o.teacher_ratio = 0, t.o.caption_dropout = 0.1f;
    sc_parse(usage, table, count, argc, argv, words, 1);
    if (!words[0]) {
        fprintf(stderr, "%s\n\nerror: which folder of pictures? (see %s --help)\n", usage, argv[0]);
        return 2;
    }
    t.o.data = words[0];
    bool named = t.o.out != NULL;
    if (!t.o.out) t.o.out = whole ? "transformer" : "lora.safetensors";
    if (!check_options(&t.o)) return sc_die(), 2;
    sc_set_threads(t.o.threads);
    sc_catch_interrupt();
    bool made = false, ok = set_paths(&t, argc, argv);
    ok = ok && (t.o.dry_run || check_places(&t, named, &made));
    ok = ok && open_model(&t);
    ok = ok && (t.o.dry_run || !whole || sc_can_write_model(t.pipeline->flux, t.o.out));
    ok = ok && load_data(&t) && open_params(&t);
    if (ok) {
        set_recipe(&t);
        print_plan(&t, table, count);
    }
    ok = ok && plan_memory(&t);
    if (ok && t.o.resume) ok = load_state(&t);
    if (ok) ok = t.o.dry_run ? dry_run(&t) : train(&t);
    close_training(&t);
    if (!ok && made) rmdir(t.o.run); /* if nothing was put there */
    return ok ? 0 : sc_die();
}
