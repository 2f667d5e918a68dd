/* ./train DATA: turn a flow-matching model into a few-step one (SCFM), or train one from nothing.
 *
 * This file is the driver: options, data, progress, files. The method itself is in shortcut.h,
 * whose implementation make compiles once, into build/shortcut.o. */
#define _POSIX_C_SOURCE 200809L
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
    "  ./train --resume                             goes on where Ctrl-C stopped\n"
    "  ./train pictures --pretrain --out tiny/transformer       all weights, from random ones\n"
    "\n"
    "The defaults in [] are those of --model: its recipe.json's, else the paper's.";

/* Every option; the table below says what it means. The defaults are the paper's for FLUX.1-dev. */
static sc_recipe recipe = {.teacher_ratio = 0.4f, .teacher_steps = 32, .self_steps = {2, 4, 8, 16},
                           .shift = {2.5f, 4.5f}, .dynamic_shift_ratio = 0.1f,
                           .guidance = {0, 7.5f}};
static sc_adamw adamw = {.lr = 2e-5f, .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f,
                         .weight_decay = 1e-4f, .clip = 10};
static struct options {
    const char *data, *model, *out, *run, *device, *weights, *weights_on;
    const char *transformer, *start, *teacher, *scales;
    bool full, pretrain; /* default: SCFM with a LoRA */
    bool ranked;         /* by --rank or --alpha */
    bool resume, dry_run, no_cache, checkpointing;
    int rank, steps, batch, warmup, ema_restart;
    float alpha, final_lr, fast, slow;
    int resolution, text_tokens, threads, preview, save, stop_after;
    uint64_t seed;
} o = {.model = "data/tiny-flux", .run = "run", .device = "auto", .weights = "auto",
       .weights_on = "device", .rank = 64, .steps = 10000, .batch = 8, .final_lr = 1,
       .fast = 0.99f, .slow = 0.999f, .preview = 500, .save = 500, .seed = 1};

static bool all_weights(void) { return o.full || o.pretrain || recipe.distil_guidance; }

/* The command line; recipe.json of the model folder uses the same names. */
static const sc_option table[] = {
    {NULL, SC_FLAG, NULL, NULL, "What to train:"},
    {"--model", SC_STRING, &o.model, "DIR", "FLUX.1's or SD3.5's pipeline folder"},
    {"--full", SC_FLAG, &o.full, NULL, "all weights instead of a LoRA"},
    {"--pretrain", SC_FLAG, &o.pretrain, NULL, "all weights, from random ones, by flow matching"},
    {"--distill-guidance", SC_FLAG, &recipe.distil_guidance, NULL,
     "all weights: guidance as an input"},
    {"--transformer", SC_STRING, &o.transformer, "DIR", "take the transformer from this folder"},
    {"--start", SC_STRING, &o.start, "FILE", "start from this LoRA"},
    {"--teacher", SC_STRING, &o.teacher, "FILE",
     "the teacher's LoRA (FILE:SCALE); without --start the student starts so"},
    {"--rank", SC_INT, &o.rank, "N", "LoRA rank"},
    {"--alpha", SC_FLOAT, &o.alpha, "X", "LoRA alpha (0: the rank)"},
    {NULL, SC_FLAG, NULL, NULL, "How long and how fast:"},
    {"--steps", SC_INT, &o.steps, "N", "training steps"},
    {"--batch", SC_INT, &o.batch, "N", "pairs in a step"},
    {"--lr", SC_FLOAT, &adamw.lr, "X", "learning rate"},
    {"--warmup", SC_INT, &o.warmup, "N", "steps of linear warm-up"},
    {"--final-lr", SC_FLOAT, &o.final_lr, "X", "the rate ends, on a cosine, at this part of --lr"},
    {"--weight-decay", SC_FLOAT, &adamw.weight_decay, "X", "AdamW weight decay"},
    {"--beta2", SC_FLOAT, &adamw.beta2, "X", "AdamW's second beta"},
    {"--clip", SC_FLOAT, &adamw.clip, "X", "gradient norm at most this"},
    {"--fast", SC_FLOAT, &o.fast, "X", "decay of the fast average"},
    {"--slow", SC_FLOAT, &o.slow, "X", "decay of the slow average"},
    {"--ema-restart", SC_INT, &o.ema_restart, "N", "restart both every N steps (0: never)"},
    {NULL, SC_FLAG, NULL, NULL, "The SCFM recipe:"},
    {"--teacher-ratio", SC_FLOAT, &recipe.teacher_ratio, "X",
     "part of the samples in the teacher case"},
    {"--teacher-steps", SC_INT, &recipe.teacher_steps, "N", "N of the teacher case"},
    {"--self-steps", SC_INTS, &recipe.self_steps, "N,...", "N of the self case, up to 7"},
    {"--shift", SC_RANGE, &recipe.shift, "A,B", "time shift, uniform between these"},
    {"--dynamic-shift", SC_FLOAT, &recipe.dynamic_shift_ratio, "X",
     "part of the samples with the dynamic shift"},
    {"--guidance", SC_RANGE, &recipe.guidance, "A,B", "guidance, uniform between these"},
    {"--cfg", SC_FLOAT, &recipe.cfg, "G",
     "true CFG of the teacher, folded into the student (0: none)"},
    {"--cfg-student", SC_FLAG, &recipe.cfg_student, NULL,
     "guide student and averages, too: then sample with --cfg"},
    {"--fm-ratio", SC_FLOAT, &recipe.fm_ratio, "X",
     "part of the samples with plain flow matching (--pretrain: 1)"},
    {"--caption-dropout", SC_FLOAT, &recipe.caption_dropout, "X",
     "part of the captions that is left empty (--pretrain: 0.1)"},
    {"--scales", SC_STRING, &o.scales, "LIST",
     "kept in the file: \"3:1@1.5 8:0.5\" is scale 1 and guidance 1.5 for 3 steps, ..."},
    {NULL, SC_FLAG, NULL, NULL, "Data and memory:"},
    {"--resolution", SC_INT, &o.resolution, "N",
     "of about NxN pixels, in aspect buckets (0: the model's)"},
    {"--text-tokens", SC_INT, &o.text_tokens, "N", "T5 tokens of a caption (0: the model's)"},
    {"--checkpointing", SC_FLAG, &o.checkpointing, NULL,
     "recompute all blocks in the backward pass: less memory (on a GPU: as many as needed)"},
    {"--weights", SC_STRING, &o.weights, "auto|fp8", "frozen matrices: as in the file, or fp8"},
    {"--weights-on", SC_STRING, &o.weights_on, "device|host",
     "frozen matrices: in host memory they are streamed, for GPUs that are too small"},
    {"--no-cache", SC_FLAG, &o.no_cache, NULL, "do not keep latents and embeddings in DATA"},
    {NULL, SC_FLAG, NULL, NULL, "Running:"},
    {"--out", SC_STRING, &o.out, "PATH", "result (LoRA: lora.safetensors; all weights: a folder)"},
    {"--run", SC_STRING, &o.run, "DIR", "folder for loss.csv, preview.png and the state"},
    {"--resume", SC_FLAG, &o.resume, NULL,
     "go on from the state in the run folder, with its DATA and options but for those given"},
    {"--dry-run", SC_FLAG, &o.dry_run, NULL,
     "encode DATA, print the plan, the memory and the time, and stop"},
    {"--preview", SC_INT, &o.preview, "N", "a preview picture every N steps (0: none)"},
    {"--save", SC_INT, &o.save, "N", "save result and state every N steps (0: at the end)"},
    {"--stop-after", SC_INT, &o.stop_after, "N", "save and stop after step N (0: go through)"},
    {"--device", SC_STRING, &o.device, SC_DEVICES, "what computes"},
    {"--threads", SC_INT, &o.threads, "N", "CPU threads (0: OMP_NUM_THREADS, or all cores)"},
    {"--seed", SC_SEED, &o.seed, "N", "of everything random"},
};
enum { OPTIONS = sizeof table / sizeof *table };
/* What --resume does not take from the run. */
static const char of_one_call[] = "--run|--resume|--dry-run|--stop-after";

/* What the encoders make of DATA, once: one tensor for all pairs of each of these, and then each
 * pair's latents [2, h, w, in_channels], mean and std of the posterior. Text 0 is empty. */
enum {
    TEXT,    /* [pairs] i32: the index of the caption */
    CONTEXT, /* [texts, T, text_channels] */
    POOLED,  /* [texts, pooled_channels] */
    LATENTS
};

typedef struct training {
    sc_pipeline *pipeline;
    const sc_dit_config *config;
    sc_params *params;
    sc_adamw adamw;
    sc_rng rng;
    sc_tensor *data; /* [LATENTS + pairs] */
    sc_file *cached; /* where the first ones are mapped, or NULL */
    int mapped;      /* so many; the others' memory is ours */
    int pairs;
    sc_batch batch;
    sc_text *batch_texts;
    float *batch_memory;
    const char *state, *losses, *picture, *cache; /* paths */
    const char *frozen;             /* frozen_weights() at the start */
    int64_t step;
    bool saved; /* the run folder has a state of this run */
    struct stat result; /* the file of the result, as this run found or left it */
} training;

/* A text's rows of CONTEXT and POOLED. */
static sc_text text_row(const training *t, int64_t text) {
    const sc_tensor *x = &t->data[CONTEXT], *y = &t->data[POOLED];
    return (sc_text){.context = (float *)x->data + text * (sc_count(x) / x->shape[0]),
                     .pooled = (float *)y->data + text * (sc_count(y) / y->shape[0])};
}

static int text_of(const training *t, int64_t pair) {
    return ((const int32_t *)t->data[TEXT].data)[pair];
}

/* A batch: pairs of one size, drawn with replacement; latents sampled from the posterior. */
static void draw_batch(training *t) {
    const sc_tensor *latents = t->data + LATENTS;
    const sc_tensor *first = &latents[sc_uniform_int(&t->rng, t->pairs)];
    int64_t n = sc_count(first) / 2;
    float *x0 = t->batch_memory, *noise = x0 + o.batch * n;
    for (int b = 0; b < o.batch; b++) {
        const sc_tensor *x = first;
        if (b) do
                x = &latents[sc_uniform_int(&t->rng, t->pairs)];
            while (x->shape[1] != first->shape[1] || x->shape[2] != first->shape[2]);
        const float *mean = x->data, *std = mean + n;
        float *z = x0 + b * n;
        sc_normal(&t->rng, z, n);
        for (int64_t i = 0; i < n; i++) z[i] = mean[i] + std[i] * z[i];
        t->batch_texts[b] = text_row(t, text_of(t, x - latents));
    }
    sc_normal(&t->rng, noise, o.batch * n);
    t->batch.x0 = x0;
    t->batch.noise = noise;
    t->batch.h = (int)first->shape[1];
    t->batch.w = (int)first->shape[2];
}

/* ---- What a cache or a run depends on, as a number ---- */

static const uint64_t nothing_mixed = 0xcbf29ce484222325u;

static uint64_t mix(uint64_t hash, const void *data, size_t n) { /* FNV-1a */
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ ((const unsigned char *)data)[i]) * 0x100000001b3u;
    return hash;
}

/* Its size and, with `times`, when it was written, which a copy on another host does not keep. */
static uint64_t mix_file(uint64_t hash, const char *path, bool times) {
    struct stat s;
    if (stat(path, &s)) return hash;
    int64_t facts[3] = {s.st_size, s.st_mtim.tv_sec, s.st_mtim.tv_nsec};
    return mix(hash, facts, times ? sizeof facts : sizeof *facts);
}

/* All shards of the weights at `path` (NULL: none), wherever they are. */
static uint64_t mix_weights(uint64_t hash, const char *path, bool times) {
    const char *shard;
    sc_file *file = path ? sc_file_open(path) : NULL;
    for (int64_t i = 0; file && (shard = sc_file_part(file, i)); i++)
        hash = mix_file(hash, shard, times);
    sc_file_close(file);
    return hash;
}

/* ---- The state: enough to go on bit for bit ---- */

static const char *base(void) { return o.transformer ? o.transformer : o.model; }
static float alpha(void) { return o.alpha > 0 ? o.alpha : (float)o.rank; }

/* What the numbers of a state mean. */
static const char *kind_of_run(void) {
    return o.full ? "--full" : o.pretrain ? "--pretrain"
           : recipe.distil_guidance ? "--distill-guidance"
           : formatted("a LoRA of alpha %g%s%s", alpha(), o.teacher ? ", of the teacher " : "",
                       o.teacher ? o.teacher : "");
}

/* The frozen weights that a run stands on. */
static const char *frozen_weights(void) {
    float scale;
    const char *path = o.transformer ? o.transformer
                       : o.pretrain  ? NULL : kept(sc_part_path(o.model, SC_TRANSFORMER));
    uint64_t hash = mix_weights(nothing_mixed, path, true);
    if (o.teacher)
        hash = mix_weights(hash, sc_lora_argument(o.teacher, recipe.teacher_steps, &scale, NULL),
                           true);
    return formatted("%016llx", (unsigned long long)hash);
}

static bool save_state(const training *t) {
    const char *metadata[] = {"step", formatted("%lld", (long long)t->step),
                              "steps", formatted("%d", o.steps),
                              "rng", formatted("%llu", (unsigned long long)t->rng.state),
                              "kind", kind_of_run(),
                              "frozen", t->frozen,
                              "data", o.data,
                              "options", sc_options_text(table, OPTIONS, of_one_call),
                              "command", sc_command, NULL};
    return sc_params_save(t->params, t->state, metadata);
}

/* The data and options of the run in `folder`; false where its state has none, as older ones. */
static bool take_run(const char *folder) {
    const char *state = formatted("%s/state.safetensors", folder);
    sc_file *file = exists(state) ? sc_file_open(state) : NULL;
    const char *data = file ? sc_file_metadata(file, "data") : NULL;
    const char *options = file ? sc_file_metadata(file, "options") : NULL;
    bool there = data && options;
    if (there) o.data = formatted("%s", data);
    if (there && !sc_take_options(table, OPTIONS, options))
        sc_fail("%s: %s", state, sc_error()), exit(sc_die());
    sc_file_close(file);
    return there;
}

static bool load_state(training *t) {
    if (!exists(t->state))
        return sc_fail("%s: %s: nothing to resume; leave out --resume to start", t->state,
                       strerror(errno));
    sc_file *file = sc_file_open(t->state);
    if (!file) return false;
    const char *step = sc_file_metadata(file, "step"), *rng = sc_file_metadata(file, "rng");
    const char *command = sc_file_metadata(file, "command");
    const char *kind = sc_file_metadata(file, "kind"); /* older states have none */
    bool ok = (step && rng) || sc_fail("%s: not a training state", t->state);
    ok = ok && sc_params_load(t->params, file);
    if (ok && kind && strcmp(kind, kind_of_run()))
        ok = sc_fail("%s: this is the run of %s, not of %s", t->state, kind, kind_of_run());
    if (ok) {
        t->saved = true;
        t->step = t->adamw.step = strtoll(step, NULL, 10);
        t->rng.state = strtoull(rng, NULL, 10);
        ok = t->step <= o.steps || sc_fail("%s is at step %lld already, beyond --steps %d",
                                           t->state, (long long)t->step, o.steps);
    }
    const char *frozen = sc_file_metadata(file, "frozen");
    if (ok && frozen && strcmp(frozen, t->frozen))
        fprintf(stderr, "warning: the files of the transformer or the teacher are not those that "
                        "this run was saved with\n");
    if (ok && command) {
        sc_print_text(stderr, "resumed; this run was saved by: ", command);
        sc_command = formatted("%s && %s", command, sc_command);
    }
    sc_file_close(file);
    return ok;
}

/* A new run does not overwrite one that was stopped: that may be days of work. */
static bool check_unfinished(const training *t) {
    sc_file *file = exists(t->state) ? sc_file_open(t->state) : NULL;
    const char *step = file ? sc_file_metadata(file, "step") : NULL;
    const char *steps = file ? sc_file_metadata(file, "steps") : NULL;
    bool ok = !step || !steps || atoll(step) >= atoll(steps) ||
              sc_fail("%s is a run that was stopped at step %s of %s: go on with --resume, put a "
                      "new one elsewhere with --run DIR, or delete it",
                      t->state, step, steps);
    sc_file_close(file);
    return ok;
}

/* What the program named itself does not replace what was made of another model. */
static bool check_base(void) {
    sc_file *file = exists(o.out) ? sc_file_open(o.out) : NULL;
    const char *other = file ? sc_file_metadata(file, "base_model") : NULL;
    bool ok = !other || same_place(other, base()) ||
              sc_fail("%s was made for %s: name another place with --out", o.out, other);
    sc_file_close(file);
    return ok;
}

/* The result's file as it is now; st_ino is 0 where there is none, or no file that stays. */
static struct stat result_now(void) {
    struct stat s;
    bool all = all_weights();
    const char *path = formatted("%s%s", o.out, all ? "/diffusion_pytorch_model.safetensors" : "");
    return stat(path, &s) || !S_ISREG(s.st_mode) ? (struct stat){0} : s;
}

/* The slow average of all weights, or the student's LoRA: what the run is for. */
static bool save_result(training *t) {
    struct stat now = result_now();
    if (now.st_ino && (now.st_ino != t->result.st_ino ||
                       now.st_mtim.tv_sec != t->result.st_mtim.tv_sec ||
                       now.st_mtim.tv_nsec != t->result.st_mtim.tv_nsec))
        return sc_fail("%s: another program wrote it during this run: go on with --resume --out "
                       "FILE", o.out);
    const char *rank = formatted("%d", o.rank), *steps = formatted("%lld", (long long)t->step);
    const char *seed = formatted("%llu", (unsigned long long)o.seed);
    /* alpha is the rank: what --alpha asks for is multiplied into B */
    const char *metadata[] = {"method", "SCFM", "rank", rank, "alpha", rank, "base_model", base(),
                              "steps", steps, "seed", seed, "command", sc_command, "format", "pt",
                              o.scales ? "scales" : NULL, o.scales, NULL};
    bool ok;
    if (t->params->adapters) ok = sc_lora_save(t->params, SC_STUDENT, o.out, metadata);
    else {
        sc_params_use(t->params, SC_SLOW);
        ok = sc_dit_save(t->pipeline->dit, o.out, SC_BF16, metadata + 6); /* from the base on */
        sc_params_use(t->params, SC_STUDENT);
    }
    if (ok) t->result = result_now();
    return ok;
}

/* ---- Preview: base 32 steps | base 3 | student 3, of the first pair, from the same noise ---- */

static bool preview(training *t) {
    sc_pipeline *p = t->pipeline;
    bool has_teacher = t->params->adapters || t->params->set[SC_TEACHER], ok = true;
    uint8_t learned = t->params->adapters ? SC_STUDENT : SC_SLOW;
    uint8_t base = has_teacher ? SC_TEACHER : learned;
    const int steps[] = {32, 3, 3};
    const uint8_t sets[] = {base, base, learned};
    int panels = has_teacher ? 3 : 2;
    int64_t h = t->data[LATENTS].shape[1], w = t->data[LATENTS].shape[2];
    int64_t row = w * p->token_pixels, rows = 3 * h * p->token_pixels; /* of three colours */
    if (!sc_may_replace(t->picture)) return false;
    float *panel = allocate((size_t)((1 + panels) * rows * row), sizeof *panel);
    if (!panel) return false;
    float *sheet = panel + rows * row;
    const sc_text text = text_row(t, text_of(t, 0)), empty = text_row(t, 0);
    sc_sampling s = {.shift = sc_pipeline_shift(p, h * w), .h = (int)h, .w = (int)w,
                     .guidance = 0.5f * (recipe.guidance[0] + recipe.guidance[1]),
                     .progress = sc_not_interrupted, .no_text = empty};
    size_t held = sc_tape_bytes(p->tape); /* given back while the VAE works */
    for (int i = 0; ok && i < panels; i++) {
        s.steps = steps[i];
        s.sets = &sets[i];
        s.cfg = sets[i] == SC_TEACHER || recipe.cfg_student ? recipe.cfg : 0;
        if (!t->params->adapters) sc_params_use(t->params, (sc_set)sets[i]);
        ok = sc_pipeline_draw(p, &s, 1, &text, o.seed, panel);
        for (int64_t y = 0; ok && y < rows; y++)
            memcpy(sheet + (y * panels + i) * row, panel + y * row, (size_t)row * 4);
    }
    if (!t->params->adapters) sc_params_use(t->params, SC_STUDENT);
    sc_pipeline_release(p);
    ok = sc_tape_reserve(p->tape, held) && ok;
    sc_picture picture = {panels * (int)row, (int)rows / 3, sheet};
    ok = ok && sc_picture_save(&picture, t->picture, formatted(SC_MADE_BY " %s", sc_command));
    free(panel);
    return ok;
}

/* ---- The loop ---- */

static float learning_rate(int64_t step) {
    if (step < o.warmup) return adamw.lr * (float)(step + 1) / (float)o.warmup;
    float done = (float)(step - o.warmup) / (float)(o.steps - o.warmup);
    return adamw.lr * (o.final_lr + (1 - o.final_lr) * 0.5f * (1 + cosf(3.14159265f * done)));
}

/* One of the two may fail, as where --out cannot be written; the other keeps what was learned. */
static bool save_all(training *t) {
    if (sc_rank) return true;
    bool state = save_state(t), result = save_result(t);
    t->saved = t->saved || state;
    return state && result;
}

/* On the way: if it fails, there is time to make room for the next. */
static void try_save(training *t, FILE *csv) {
    fflush(csv);
    if (save_all(t)) return;
    sc_end_line();
    fprintf(stderr, "warning: not saved at step %lld: %s\n", (long long)t->step, sc_error());
}

/* One that fails, or for which there is no time, is no reason to stop. True: it was drawn. */
static bool try_preview(training *t) {
    if (!o.preview || sc_interrupted || sc_rank) return false;
    if (preview(t)) return true;
    sc_end_line();
    if (!sc_interrupted) fprintf(stderr, "warning: no preview: %s\n", sc_error());
    return false;
}

/* A GPU may still be busy with it afterwards; what it found is for report_step. */
static bool train_step(training *t) {
    sc_pipeline *p = t->pipeline;
    draw_batch(t);
    if (!sc_agree(sc_train_gradient(p->dit, t->params, p->tape, &recipe, &t->batch, &t->rng)))
        return false;
    t->adamw.lr = learning_rate(t->step);
    sc_params_step(t->params, &t->adamw, o.fast, o.slow);
    t->step++;
    if (o.ema_restart && t->step % o.ema_restart == 0) {
        sc_params_copy(t->params, SC_FAST, SC_STUDENT);
        sc_params_copy(t->params, SC_SLOW, SC_STUDENT);
    }
    return true;
}

/* Of the `step`-th step, counted from 1. */
static bool report_step(training *t, int64_t step, double *loss, double *norm) {
    if (!sc_params_report(t->params, loss, norm)) return sc_end_all();
    if (!sc_meet(true, "", 0, loss)) return false;
    if (isfinite(*loss) && isfinite(*norm)) return true;
    return sc_fail("step %lld: the loss is %g, the gradient's norm %g: lower --lr%s%s",
                   (long long)step, *loss, *norm, t->saved ? "; the last saved state is in " : "",
                   t->saved ? o.run : "");
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
    fprintf(p->csv, "%lld,%.9g,%.6g,%.6g\n", (long long)step, loss, norm, learning_rate(step - 1));
    snprintf(extra, sizeof extra, "loss %.4f, %.1f pictures/s", p->smooth,
             (double)(step - p->first) * o.batch / (sc_seconds() - p->started));
    sc_progress("step", p->first, step, o.steps, p->started, extra);
    return true;
}

/* loss.csv: a new one, or, of a resumed run, that one as it was when the state was saved. */
static FILE *open_csv(const char *path, int64_t done) {
    FILE *csv = done ? fopen(path, "r+") : NULL;
    if (!csv) {
        if ((csv = fopen(path, "w"))) fputs(SC_LOSS_COLUMNS, csv), fflush(csv);
        return csv;
    }
    for (int64_t line = 0; line <= done; line++) /* the heading, and a line for each step */
        for (int c = 0; c != '\n' && c != EOF;) c = fgetc(csv);
    if (fseek(csv, 0, SEEK_CUR) || ftruncate(fileno(csv), ftell(csv))) fclose(csv), csv = NULL;
    return csv;
}

static bool train(training *t) {
    progress p = {.started = sc_seconds(), .first = t->step, .told = t->step};
    if (sc_stop) return sc_fail("stopped before the first step: nothing was written");
    FILE *csv = p.csv = open_csv(t->losses, sc_rank ? 0 : p.first);
    if (!csv) return sc_fail("%s: %s", t->losses, strerror(errno));
    t->result = result_now();
    if (!p.first && !sc_rank) remove(t->state); /* the last run's: nothing to resume any more */
    bool ok = true;
    int64_t last = o.stop_after && o.stop_after < o.steps ? o.stop_after : o.steps;
    while (ok && t->step < last && !sc_stop) {
        ok = train_step(t);
        bool save = o.save && t->step % o.save == 0 && t->step < last;
        bool look = o.preview && t->step % o.preview == 0 && t->step < last;
        /* A GPU gets the next step before it is asked about this one. */
        int late = save || look || t->pipeline->backend->on_host ? 0 : 1;
        while (ok && p.told + late < t->step) ok = tell_step(t, &p);
        if (ok && save) try_save(t, csv);
        if (ok && look) try_preview(t);
    }
    while (ok && p.told < t->step) ok = tell_step(t, &p);
    bool told = !ferror(csv); /* said at the end: what was learned comes first */
    told = fclose(csv) == 0 && told;
    if (!ok || !save_all(t)) return false;
    sc_end_line();
    if (t->step < o.steps)
        fprintf(stderr, "stopped at step %lld of %d; go on with --resume\n", (long long)t->step,
                o.steps);
    bool drawn = try_preview(t);
    printf("wrote %s and %s/{loss.csv,state.safetensors%s}\n", o.out, o.run,
           drawn ? ",preview.png" : "");
    return told || sc_fail("%s: it was not written to its end: is the disk full?", t->losses);
}

/* ---- The cache: DATA/.shortcut-cache.safetensors ----
 * The data's tensors, in f32: a cached run equals the first bit for bit. The metadata's fingerprint
 * says what they were made from. Where encoding was stopped the last pictures are missing. */

static const char *data_name(int i) {
    static const char *const names[] = {"caption", "context", "pooled"};
    return i < LATENTS ? names[i] : formatted("latents.%d", i - LATENTS);
}

static bool new_tensor(sc_tensor *x, sc_dtype dtype, int ndim, const int64_t *shape) {
    *x = (sc_tensor){.dtype = dtype, .ndim = ndim};
    memcpy(x->shape, shape, (size_t)ndim * sizeof *shape);
    x->data = allocate((size_t)sc_count(x), 4);
    return x->data != NULL;
}

/* Has it this shape (0: any size), and where it lies can it be read? */
static bool fits(const sc_tensor *x, sc_dtype dtype, int ndim, const int64_t *shape) {
    bool ok = x->dtype == dtype && x->ndim == ndim && (uintptr_t)x->data % 4 == 0;
    for (int i = 0; ok && i < ndim; i++) ok = shape[i] ? x->shape[i] == shape[i] : x->shape[i] > 0;
    return ok;
}

static void forget_data(training *t) {
    for (int i = 0; t->data && i < LATENTS + t->pairs; i++) {
        if (i >= t->mapped) free(t->data[i].data);
        t->data[i].data = NULL;
    }
    sc_file_close(t->cached);
    t->cached = NULL;
    t->mapped = 0;
}

/* Maps the cache if it is there, sound and made from the same things. */
static void load_cache(training *t, const char *fingerprint) {
    const sc_dit_config *c = t->config;
    const sc_tensor *context = &t->data[CONTEXT], *pooled = &t->data[POOLED], *x;
    forget_data(t);
    t->cached = exists(t->cache) ? sc_file_open(t->cache) : NULL;
    const char *made_from = t->cached ? sc_file_metadata(t->cached, "fingerprint") : NULL;
    bool ok = made_from && !strcmp(made_from, fingerprint);
    while (ok && t->mapped < LATENTS + t->pairs &&
           (x = sc_file_find(t->cached, data_name(t->mapped))))
        t->data[t->mapped++] = *x;
    ok = ok && t->mapped >= LATENTS && fits(&t->data[TEXT], SC_I32, 1, (int64_t[]){t->pairs}) &&
         fits(context, SC_F32, 3, (int64_t[]){0, t->pipeline->text_tokens, c->text_channels}) &&
         fits(pooled, SC_F32, 2, (int64_t[]){context->shape[0], c->pooled_channels});
    for (int i = LATENTS; ok && i < t->mapped; i++)
        ok = fits(&t->data[i], SC_F32, 4, (int64_t[]){2, 0, 0, c->in_channels});
    for (int i = 0; ok && i < t->pairs; i++)
        ok = text_of(t, i) >= 0 && text_of(t, i) < context->shape[0];
    if (!ok) forget_data(t);
}

/* The texts, and the latents of the first `pictures`. */
static bool save_cache(const training *t, const char *fingerprint, int pictures) {
    size_t n = (size_t)(LATENTS + pictures);
    sc_named *named = allocate(n, sizeof *named);
    for (size_t i = 0; named && i < n; i++)
        named[i] = (sc_named){data_name((int)i), t->data[i], t->data[i].dtype};
    bool ok = named && sc_file_save(t->cache, named, (int64_t)n,
                                    (const char *[]){"fingerprint", fingerprint, NULL});
    free(named);
    return ok;
}

/* ---- Data from the folder ---- */

/* What the cache depends on: pictures, captions, sizes, and the networks that encode them. */
static uint64_t fingerprint_of(const training *t, const sc_dataset *data, bool times) {
    uint64_t hash = nothing_mixed;
    size_t folder = strlen(o.data); /* however it was called: paths in it count */
    for (int64_t i = 0; i < data->count; i++) {
        const sc_pair *pair = &data->pairs[i];
        hash = mix(hash, pair->path + folder, strlen(pair->path + folder) + 1);
        hash = mix(hash, pair->caption, strlen(pair->caption) + 1);
        hash = mix_file(hash, pair->path, times);
    }
    const char *model = kept(sc_model_folder(o.model));
    for (size_t i = 0; model && sc_encoder_files[i]; i++)
        hash = mix_file(hash, formatted("%s/%s", model, sc_encoder_files[i]), times);
    for (int part = SC_VAE; part < SC_PARTS; part++)
        hash = mix_weights(hash, kept(sc_part_path(o.model, (sc_part)part)), times);
    int sizes[2] = {t->pipeline->resolution, t->pipeline->text_tokens};
    return mix(hash, sizes, sizeof sizes);
}

/* Each caption once; the pairs' indices into `texts` [pairs + 1]. Returns how many there are. */
static int list_texts(const sc_dataset *data, const char **texts, int32_t *text_of_pair) {
    int known = 1;
    texts[0] = "";
    for (int64_t i = 0; i < data->count; i++) {
        int j = 0;
        while (j < known && strcmp(texts[j], data->pairs[i].caption)) j++;
        if (j == known) texts[known++] = data->pairs[i].caption;
        text_of_pair[i] = j;
    }
    return known;
}

static bool encode_texts(training *t, const sc_dataset *data) {
    sc_pipeline *p = t->pipeline;
    sc_tensor *context = &t->data[CONTEXT], *pooled = &t->data[POOLED];
    const char **texts = allocate((size_t)t->pairs + 1, sizeof *texts);
    bool ok = texts && new_tensor(&t->data[TEXT], SC_I32, 1, (int64_t[]){t->pairs});
    int count = ok ? list_texts(data, texts, t->data[TEXT].data) : 0;
    ok = ok &&
         new_tensor(context, SC_F32, 3,
                    (int64_t[]){count, p->text_tokens, t->config->text_channels}) &&
         new_tensor(pooled, SC_F32, 2, (int64_t[]){count, t->config->pooled_channels});
    double started = sc_seconds();
    for (int i = 0; ok && i < count; i++) {
        sc_text text = sc_pipeline_text(p, texts[i]), row = text_row(t, i);
        ok = text.context && (!sc_interrupted || sc_fail("stopped: no captions are kept"));
        if (ok) memcpy(row.context, text.context, (size_t)(sc_count(context) / count) * 4);
        if (ok) memcpy(row.pooled, text.pooled, (size_t)(sc_count(pooled) / count) * 4);
        free(text.context);
        sc_note_cut(&text);
        sc_progress("caption", 0, i + 1, count, started, NULL);
    }
    sc_warn_cut("caption");
    free(texts);
    return ok;
}

/* Pictures that become something else in their frame: how many, and one of them. */
static struct misfit {
    const char *what, *first;
    int count;
} misfits[] = {{"half or more is cut off (frames go up to 4:1)", NULL, 0},
               {"enlarged more than twofold", NULL, 0}};

static void note_fit(const char *path, const sc_picture *p, int width, int height) {
    double x = (double)width / p->width, y = (double)height / p->height;
    const bool found[] = {fmin(x, y) <= 0.5 * fmax(x, y), fmax(x, y) > 2};
    for (int i = 0; i < 2; i++)
        if (found[i] && !misfits[i].count++) misfits[i].first = formatted("%s", path);
}

static void warn_misfits(int pictures) {
    for (const struct misfit *m = misfits; m < misfits + 2; m++)
        if (m->count)
            sc_print_text(stderr, formatted("warning: %s: %d of %d pictures, such as ", m->what,
                                            m->count, pictures), m->first);
}

static bool encode_picture(training *t, const char *path, sc_tensor *x) {
    sc_pipeline *p = t->pipeline;
    sc_picture picture = {0}, fitted = {0};
    int width = 0, height = 0, side = p->token_pixels;
    bool ok = sc_picture_load(&picture, path);
    if (ok) {
        int multiple = side * 2 <= p->resolution ? side * 2 : side;
        sc_bucket(picture.width, picture.height, p->resolution, multiple, &width, &height);
        int64_t shape[4] = {2, height / side, width / side, t->config->in_channels};
        ok = sc_picture_fit(&fitted, &picture, width, height) && new_tensor(x, SC_F32, 4, shape);
        note_fit(path, &picture, width, height);
    }
    float *mean = x->data;
    ok = ok && sc_pipeline_encode(p, fitted.rgb, width, height, mean, mean + sc_count(x) / 2);
    sc_picture_free(&picture);
    sc_picture_free(&fitted);
    return ok;
}

/* Before hours of work on the others: can all be read? */
static bool check_pictures(const sc_dataset *data, int first) {
    double started = sc_seconds();
    for (int i = first; i < data->count; i++) {
        sc_picture picture;
        if (sc_interrupted) return sc_fail("stopped");
        if (!sc_picture_load(&picture, data->pairs[i].path)) return false;
        sc_picture_free(&picture);
        sc_progress("picture checked", first, i + 1, data->count, started, NULL);
    }
    return true;
}

/* What the cache does not have. */
static bool encode(training *t, const sc_dataset *data, const char *fingerprint) {
    int first = t->mapped ? t->mapped - LATENTS : 0, made = first;
    bool ok = check_pictures(data, first) && (t->mapped || encode_texts(t, data));
    double started = sc_seconds();
    while (ok && made < t->pairs && !sc_interrupted) {
        ok = encode_picture(t, data->pairs[made].path, &t->data[LATENTS + made]);
        made += ok;
        sc_progress("picture", first, made, t->pairs, started, NULL);
    }
    warn_misfits(made - first);
    if (ok && (made > first || !t->mapped) && !o.no_cache && !sc_rank) {
        if (save_cache(t, fingerprint, made)) {
            load_cache(t, fingerprint); /* mapped: the system may take the memory back */
            ok = t->mapped == LATENTS + made || sc_fail("%s: cannot be read back", t->cache);
        } else fprintf(stderr, "warning: not kept for the next run: %s\n", sc_error());
    }
    int kept_pictures = t->mapped ? t->mapped - LATENTS : 0;
    return ok && (made == t->pairs || sc_fail("stopped: captions and latents of %d of %d pictures "
                                              "are kept", kept_pictures, t->pairs));
}

static bool load_data(training *t) {
    sc_dataset *data = sc_dataset_open(o.data);
    if (!data) return false;
    if (data->unused) sc_print_text(stderr, "warning: ", data->unused);
    unsigned long long made_from = fingerprint_of(t, data, true);
    const char *fingerprint = formatted("%016llx", made_from);
    t->pairs = (int)data->count;
    t->data = allocate((size_t)(LATENTS + t->pairs), sizeof *t->data);
    bool ok = t->data != NULL;
    for (int i = 0; ok && i < t->pairs; i++)
        ok = sc_apart(o.out, data->pairs[i].path) &&
             (!o.preview || sc_apart(t->picture, data->pairs[i].path));
    ok = sc_meet(ok, formatted("pictures and captions in %s, or model files,", o.data),
                 ok ? fingerprint_of(t, data, false) : 0, NULL);
    bool wait = sc_rank && !o.no_cache; /* for the first one's cache */
    if (ok && wait) ok = sc_agree(ok);
    if (ok && !o.no_cache) load_cache(t, fingerprint);
    ok = ok && (t->mapped == LATENTS + t->pairs || encode(t, data, fingerprint));
    if (ok && !wait) ok = sc_agree(ok);
    sc_dataset_close(data);
    sc_pipeline_release(t->pipeline); /* training needs the transformer alone */
    return ok;
}

/* ---- Setting up ---- */

static bool is_part(float x) { return x >= 0 && x <= 1; }
static bool is_decay(float x) { return x >= 0 && x < 1; }
static bool is_grid(int steps) { return steps >= 2 && steps <= 1000 && steps % 2 == 0; }

/* Refuses what cannot be meant. */
static bool check_options(void) {
    double scale, guidance;
    bool grids = true;
    for (int i = 0; recipe.self_steps[i]; i++) grids = grids && is_grid(recipe.self_steps[i]);
    const struct {
        bool holds;
        const char *rule;
    } rules[] = {
        {o.steps >= 1, "--steps is a number from 1 up"},
        {o.batch >= 1 && o.batch <= 4096, "--batch is a number from 1 up to 4096"},
        {o.batch >= sc_processes, "--batch is smaller than the number of processes"},
        {o.rank >= 1 && o.rank <= 1024, "--rank is a number from 1 to 1024"},
        {is_grid(recipe.teacher_steps), "--teacher-steps is an even number up to 1000"},
        {grids, "--self-steps are even numbers up to 1000"},
        {recipe.shift[0] > 0 && recipe.shift[1] > 0 && recipe.shift[0] <= SC_MAX_SHIFT &&
             recipe.shift[1] <= SC_MAX_SHIFT, "--shift is a number above 0 and up to 1000, or two"},
        {is_part(recipe.teacher_ratio) && is_part(recipe.fm_ratio) &&
             is_part(recipe.caption_dropout) && is_part(recipe.dynamic_shift_ratio),
         "--teacher-ratio, --fm-ratio, --caption-dropout and --dynamic-shift lie between 0 and 1"},
        {adamw.lr > 0 && isfinite(adamw.lr), "--lr is a positive number"},
        {recipe.cfg >= 0 && isfinite(recipe.cfg), "--cfg is a number from 0 up"},
        {o.alpha >= 0 && o.final_lr >= 0 && adamw.weight_decay >= 0 && adamw.clip >= 0,
         "--alpha, --final-lr, --weight-decay and --clip are numbers from 0 up"},
        {o.threads >= 0 && o.threads <= SC_MAX_THREADS, "--threads is a number from 0 to 1024"},
        {recipe.cfg || !recipe.cfg_student, "--cfg-student needs --cfg G"},
        {!recipe.cfg || !(o.pretrain || recipe.distil_guidance),
         "--cfg is for SCFM, not for --pretrain or --distill-guidance"},
        {is_decay(adamw.beta2) && is_decay(o.fast) && is_decay(o.slow),
         "--beta2, --fast and --slow lie from 0 to below 1"},
        {o.full + o.pretrain + recipe.distil_guidance <= 1,
         "--full, --pretrain and --distill-guidance exclude each other"},
        {!o.pretrain || recipe.teacher_ratio == 0,
         "--pretrain has no teacher: --teacher-ratio is 0 there"},
        {!o.ranked || !all_weights(), "--rank and --alpha are for a LoRA, not for all weights"},
        {!o.start || !all_weights(), "--start is for a LoRA, not for all weights"},
        {!o.teacher || !all_weights(), "--teacher is for a LoRA, not for all weights"},
        {o.resolution <= 1 << 14, "--resolution is at most 16384"},
        {o.resolution >= 0 && o.text_tokens >= 0 && o.warmup >= 0 && o.ema_restart >= 0 &&
             o.preview >= 0 && o.save >= 0 && o.stop_after >= 0,
         "a number of pixels, tokens or steps cannot be negative"},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (!rules[i].holds) return sc_fail("%s", rules[i].rule);
    return !o.scales || sc_scale_for(o.scales, 1, &scale, &guidance) ||
           sc_fail("--scales is a list as \"3:1@1.5 8:0.5\", not '%s'", o.scales);
}

static bool open_model(training *t) {
    sc_dit_options how = {.widen = all_weights(), .fp8 = !strcmp(o.weights, "fp8"),
                          .streamed = !strcmp(o.weights_on, "host"),
                          .random = o.pretrain && !o.transformer, .seed = o.seed};
    t->pipeline = sc_open_model(o.model, o.transformer, o.device, how);
    if (!t->pipeline) return false;
    if (o.text_tokens) t->pipeline->text_tokens = t->pipeline->clip_tokens + o.text_tokens;
    if (o.resolution) t->pipeline->resolution = o.resolution;
    sc_dit_checkpointing(t->pipeline->dit, o.checkpointing);
    t->config = sc_dit_config_of(t->pipeline->dit);
    if (t->config->kind == SC_SD3 && o.pretrain && !o.transformer)
        return sc_fail("SD3.5 does not start from random weights here, which are no table of "
                       "positions: give --transformer DIR");
    return !recipe.distil_guidance || t->config->guidance ||
           sc_fail("%s: this model takes no guidance, so that --distill-guidance has nothing to "
                   "teach: its config.json has no \"guidance_embeds\": true",
                   base());
}

/* A LoRA that starts from --start, from the teacher's, or from nothing. */
static bool start_lora(training *t) {
    sc_dit *dit = t->pipeline->dit;
    const sc_net *net = sc_dit_net(dit);
    float scale;
    t->params = sc_params_lora(dit, o.rank, alpha(), o.seed);
    if (!t->params) return false;
    if (o.teacher && !sc_load_lora_argument(dit, o.teacher, recipe.teacher_steps, NULL))
        return false;
    for (int64_t i = 0; i < net->count; i++)
        if (net->weights[i]->before)
            return sc_fail("%s: changes '%s', which the student's file could not say", o.teacher,
                           net->weights[i]->name);
    if (o.resume) return true; /* the state has the student */
    if (o.start || !o.teacher) return !o.start || sc_lora_start(t->params, o.start, 1);
    const char *path = sc_lora_argument(o.teacher, recipe.teacher_steps, &scale, NULL);
    return sc_lora_start(t->params, path, scale);
}

/* What no option says. */
static void set_recipe(training *t) {
    recipe.mu = t->pipeline->mu;
    if (recipe.distil_guidance) recipe.caption_dropout = 0;
    t->adamw = adamw;
    t->rng.state = o.seed;
}

/* The trained numbers, and memory for a batch of the largest pictures; it is left as such a one. */
static bool open_params(training *t) {
    const sc_tensor *largest = &t->data[LATENTS];
    if (all_weights()) t->params = sc_params_full(t->pipeline->dit, !o.pretrain);
    if (all_weights() ? !t->params : !start_lora(t)) return false;
    for (int i = 0; i < t->pairs; i++) {
        const sc_tensor *x = &t->data[LATENTS + i];
        if (!sc_dit_fits(t->pipeline->dit, (int)x->shape[1], (int)x->shape[2])) return false;
        if (sc_count(x) > sc_count(largest)) largest = x;
    }
    int64_t b = o.batch, n = sc_count(largest) / 2;
    float *x = t->batch_memory = allocate((size_t)(2 * b * n), sizeof *x);
    t->batch_texts = allocate((size_t)b, sizeof *t->batch_texts);
    if (!x || !t->batch_texts) return false;
    int64_t first = b * sc_rank / sc_processes;
    t->batch = (sc_batch){o.batch, (int)largest->shape[1], (int)largest->shape[2],
                          t->pipeline->text_tokens, (int)first,
                          (int)(b * (sc_rank + 1) / sc_processes - first), x, x + b * n,
                          t->batch_texts, text_row(t, 0)};
    for (int i = 0; i < o.batch; i++) t->batch_texts[i] = t->batch.no_text;
    return true;
}

/* On a GPU: how many blocks keep their activations, tried with the largest pictures there are. */
static bool plan_memory(training *t) {
    sc_pipeline *p = t->pipeline;
    if (p->backend->on_host || o.checkpointing) return true;
    const double gib = 1 << 30;
    sc_memory_plan plan;
    if (!sc_plan_memory(p->dit, t->params, p->tape, &recipe, &t->batch, &plan)) return false;
    printf("memory of %s: a step of %d pictures of %dx%d takes %.1f GiB, and %.1f GiB more for %d "
           "of %d blocks that are not run twice%s; %.1f GiB were left\n",
           p->backend->name, o.batch, t->batch.w * p->token_pixels, t->batch.h * p->token_pixels,
           (double)plan.step / gib, (double)plan.kept_bytes / gib, plan.kept, plan.blocks,
           plan.remade ? " (their cheap operations are)" : "", (double)plan.left / gib);
    fflush(stdout);
    return true;
}

/* What else all processes must have alike; from here on they sum their gradients. */
static bool join(training *t) {
    int64_t state[] = {t->step, (int64_t)t->rng.state, t->pipeline->backend->on_host};
    uint64_t hash = mix_weights(mix(1, state, sizeof state),
                                kept(sc_part_path(o.model, SC_TRANSFORMER)), false);
    hash = mix_file(hash, formatted("%s/recipe.json", o.model), false);
    hash = mix(hash, sc_command, strlen(sc_command));
    return sc_meet(true, "options, weights, state or kind of device", hash, NULL) &&
           sc_share(t->params);
}

static void print_plan(const training *t) {
    const sc_net *net = sc_dit_net(t->pipeline->dit);
    long long parameters = 0;
    for (int64_t i = 0; i < net->count; i++) parameters += sc_count(&net->weights[i]->tensor);
    printf("%s: %d pairs, %d captions; training ", o.data, t->pairs,
           (int)t->data[CONTEXT].shape[0] - 1);
    if (t->params->adapters)
        printf("a LoRA of %lld parameters on %lld frozen ones\n", (long long)t->params->count,
               parameters);
    else printf("%lld of %lld parameters\n", (long long)t->params->count, parameters);
    printf("options: ");
    for (const char *c = sc_options_text(table, OPTIONS, ""); *c; c++)
        putchar(*c == '\n' && c[1] ? ' ' : *c);
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
               seconds, o.steps, seconds * o.steps / 60, sc_tape_bytes(t->pipeline->tape) >> 20,
               (long long)(t->params->count * 4 * (t->params->set[SC_TEACHER] ? 7 : 6)) >> 20);
    return ok;
}

/* Before hours of work: the run folder is ours alone, and what will be written can be. A LoRA is a
 * file that is none of those that are read or written beside it; of all weights the folder is
 * looked at when the model is open. */
static bool check_places(const training *t, bool named, bool *made) {
    const char *const loras[] = {o.start ? o.start : o.teacher, o.start ? o.teacher : NULL, NULL};
    const char *const others[] = {t->state, t->losses, t->picture, t->cache};
    bool ok = sc_apart(o.run, o.data) && make_folder(o.run, made) && sc_lock(o.run) &&
              (o.resume || (check_unfinished(t) && sc_may_replace(t->state))) &&
              sc_can_write(t->state) && sc_may_replace(t->losses) && sc_can_write(t->losses) &&
              (named || check_base());
    if (!ok || all_weights()) return ok;
    ok = sc_check_out(o.out, SC_WEIGHTS, named, o.model, o.transformer, loras);
    for (size_t i = 0; ok && i < sizeof others / sizeof *others; i++)
        ok = sc_apart(o.out, others[i]);
    return ok;
}

static void close_training(training *t) {
    forget_data(t);
    free(t->data), free(t->batch_memory), free(t->batch_texts);
    sc_params_free(t->params);
    sc_pipeline_close(t->pipeline);
    sc_unlock();
}

/* The paper's settings for SD3.5, where they are not those for FLUX.1; cfg: of SCFM's teacher. */
static void use_sd3_recipe(const char *transformer, const char *model, float cfg) {
    const char *path = transformer ? transformer : kept(sc_part_path(model, SC_TRANSFORMER));
    sc_dit *plan = path ? sc_dit_open(NULL, path, NULL) : NULL;
    if (plan && sc_dit_config_of(plan)->kind == SC_SD3)
        recipe.cfg = cfg, recipe.dynamic_shift_ratio = 0, adamw.clip = 2, o.ema_restart = 2000;
    sc_dit_close(plan);
}

/* Those of the model and of what is trained. */
static void set_defaults(int argc, char **argv) {
    bool pretrain = sc_given(argc, argv, "--pretrain", NULL) != NULL;
    bool scfm = !pretrain && !sc_given(argc, argv, "--distill-guidance", NULL);
    const char *model = sc_given(argc, argv, "--model", o.model);
    use_sd3_recipe(sc_given(argc, argv, "--transformer", NULL), model, scfm ? 4.5f : 0);
    if (scfm && !sc_given(argc, argv, "--full", NULL))
        sc_parse_recipe(table, OPTIONS, model, "train");
    if (pretrain) { /* there is no teacher */
        recipe.fm_ratio = 1;
        recipe.teacher_ratio = 0;
        recipe.caption_dropout = 0.1f;
    }
}

/* Whether --resume would find the same text: of UTF-8, on one line. */
static bool can_be_kept(const char *text) {
    char *quoted = formatted("\"%s\"", text);
    for (char *c = quoted + 1; c[0] && c[1]; c++)
        if (strchr("\"\\", *c)) *c = '\'';
    sc_json *json = sc_json_parse(quoted, strlen(quoted), "");
    sc_json_free(json);
    return json != NULL;
}

/* Whatever is wrong with them ends the program. */
static void read_options(int argc, char **argv) {
    const char *run = sc_given(argc, argv, "--run", o.run);
    bool resume = sc_given(argc, argv, "--resume", NULL) != NULL;
    bool taken = resume && take_run(run);
    if (!taken) set_defaults(argc, argv);
    uint64_t seed = o.seed;
    sc_parse(usage, table, OPTIONS, argc, argv, &o.data, 1);
    if (taken && o.seed != seed) {
        sc_fail("--seed: a run goes on with its own, %llu", (unsigned long long)seed);
        exit(sc_die());
    }
    if (!o.data) sc_fail("which folder of pictures? (see %s --help)", argv[0]);
    if (!o.data && resume) sc_fail("nothing to resume in %s", run);
    bool plain = !o.data || can_be_kept(o.data);
    for (int i = 0; i < OPTIONS; i++)
        plain = plain && (!table[i].name || can_be_kept(option_text(&table[i])));
    if (!plain) {
        sc_fail("names with control characters, or not UTF-8, cannot be kept for --resume");
        exit(sc_bad_usage(NULL));
    }
    o.ranked = sc_given(argc, argv, "--rank", NULL) || sc_given(argc, argv, "--alpha", NULL);
    if (!o.data || !check_options()) exit(sc_bad_usage(o.data ? NULL : usage));
}

int main(int argc, char **argv) {
    sc_start(argv);
    read_options(argc, argv);
    bool made = false, named = sc_given(argc, argv, "--out", NULL) != NULL;
    if (!o.out) o.out = all_weights() ? "transformer" : "lora.safetensors";
    sc_set_threads(o.threads);
    sc_catch_interrupt();
    training t = {.state = formatted("%s/state.safetensors", o.run),
                  .losses = sc_rank ? "/dev/null" : formatted("%s/loss.csv", o.run),
                  .picture = formatted("%s/preview.png", o.run),
                  .cache = formatted("%s/.shortcut-cache.safetensors", o.data)};
    bool idle = o.dry_run || sc_rank; /* writes nothing */
    t.frozen = frozen_weights();
    bool ok = (idle || check_places(&t, named, &made)) && open_model(&t) &&
              (idle || !all_weights() || sc_can_write_model(t.pipeline->dit, o.out)) &&
              load_data(&t) && open_params(&t);
    if (ok) {
        print_plan(&t);
        set_recipe(&t);
    }
    ok = ok && (!o.resume || load_state(&t)) && join(&t) && plan_memory(&t) &&
         (o.dry_run ? dry_run(&t) && sc_printed() : train(&t));
    close_training(&t);
    if (!ok && made) rmdir(o.run); /* if nothing was put there */
    return sc_end(ok);
}
