/* ./sample "PROMPT" [STEPS]: pictures from a FLUX.1 or SD3.5 model folder, with LoRAs. */
#define _POSIX_C_SOURCE 200809L
#include "shortcut.h"
#include "tools.h"

static const char usage[] =
    "usage: ./sample \"PROMPT\" [STEPS] [options]\n"
    "       ./sample --prompts FILE [STEPS] --out-dir DIR [options]\n"
    "\n"
    "Draws pictures with the model in --model and, if it is there, ./lora.safetensors;\n"
    "STEPS is 3 if not given.\n"
    "\n"
    "  ./sample \"a red apple\" 3\n"
    "  ./sample \"a red apple\" 32 --no-lora\n"
    "  ./sample \"a lighthouse\" 4 --model FLUX.1-dev --lora mine.safetensors:1.2\n"
    "  ./sample --prompts prompts.txt 32 --out-dir pictures      a training set, resumable";

static struct options {
    const char *model, *transformer, *lora[8], *size, *shift, *out, *out_dir, *prompts, *noise,
        *latents, *negative, *device, *weights, *weights_on;
    bool no_lora;
    float guidance, cfg;
    uint64_t seed;
    int count, threads, steps, width, height;
    bool guided, named; /* by --guidance: then a LoRA has no say in it; by --out */
} o = {.model = "data/tiny-flux", .out = "out.png", .device = "auto", .weights = "auto",
       .weights_on = "device", .guidance = 3.5f, .count = 1, .seed = 1};

static const sc_option table[] = {
    {NULL, SC_FLAG, NULL, NULL, "Options:"},
    {"--model", SC_STRING, &o.model, "DIR", "FLUX.1's or SD3.5's pipeline folder"},
    {"--transformer", SC_STRING, &o.transformer, "DIR", "take the transformer from this folder"},
    {"--lora", SC_STRINGS, o.lora, "FILE[:SCALE]",
     "LoRA, repeatable; without SCALE, the scale and guidance it recommends for STEPS "
     "[lora.safetensors, if it is there and of this model]"},
    {"--no-lora", SC_FLAG, &o.no_lora, NULL, "the bare model"},
    {"--guidance", SC_FLOAT, &o.guidance, "G",
     "guidance scale (default: what the LoRA recommends for STEPS, else the model's)"},
    {"--cfg", SC_FLOAT, &o.cfg, "G", "true CFG, in two evaluations a step (0: none)"},
    {"--negative", SC_STRING, &o.negative, "TEXT", "what --cfg leads away from [no text]"},
    {"--shift", SC_STRING, &o.shift, "S", "time shift, or auto (default: the model's)"},
    {"--size", SC_STRING, &o.size, "WxH", "pixels (default: the model's)"},
    {"--seed", SC_SEED, &o.seed, "N", "of the noise; the next pictures count on from it"},
    {"--count", SC_INT, &o.count, "N", "pictures of a prompt"},
    {"--out", SC_STRING, &o.out, "FILE", "PNG to write"},
    {"--prompts", SC_STRING, &o.prompts, "FILE", "one prompt a line"},
    {"--out-dir", SC_STRING, &o.out_dir, "DIR",
     "folder for --prompts' pictures and metadata.jsonl"},
    {"--noise", SC_STRING, &o.noise, "FILE",
     "start from the tensor 'noise' in this safetensors file"},
    {"--latents", SC_STRING, &o.latents, "FILE", "also write the final packed latents"},
    {"--weights", SC_STRING, &o.weights, "auto|fp8",
     "matrices: as in the file, or fp8, half of bf16"},
    {"--weights-on", SC_STRING, &o.weights_on, "device|host",
     "matrices: in host memory they are streamed, for GPUs that are too small"},
    {"--device", SC_STRING, &o.device, SC_DEVICES, "what computes"},
    {"--threads", SC_INT, &o.threads, "N", "CPU threads (0: OMP_NUM_THREADS, or all cores)"},
};
enum { OPTIONS = sizeof table / sizeof *table };

static const char *loras = ""; /* of a picture's parameters */
static double newest_input;    /* when the last of the files that it depends on changed */

/* ---- One picture ---- */

static bool progress(void *user, int step, int steps) {
    sc_progress("step", 0, step, steps, *(const double *)user, NULL);
    return !sc_interrupted;
}

static bool load_noise(const char *path, float *latents, int64_t n) {
    sc_file *file = sc_file_open(path);
    const sc_tensor *x = file ? sc_file_find(file, "noise") : NULL;
    bool ok = x && sc_count(x) == n && x->dtype <= SC_F64;
    if (ok) sc_to_f32(latents, x->data, x->dtype, n);
    else if (file) sc_fail("%s: needs a tensor 'noise' of %lld numbers", path, (long long)n);
    sc_file_close(file);
    return ok;
}

static bool save_latents(const char *path, float *latents, int64_t tokens, int64_t channels) {
    sc_tensor x = {.data = latents, .dtype = SC_F32, .ndim = 3, .shape = {1, tokens, channels}};
    sc_named named = {"latents", x, SC_F32};
    return sc_file_save(path, &named, 1, NULL);
}

static float time_shift(const sc_pipeline *p, int64_t tokens) {
    if (!o.shift) return sc_pipeline_shift(p, tokens);
    float shift = strtof(o.shift, NULL); /* 0: auto */
    return shift > 0 ? shift : sc_dynamic_shift(&p->mu, tokens);
}

/* The settings as the usual picture tools read them: the prompt, then "Key: value, ...". */
static const char *parameters_of(const char *prompt, uint64_t seed, float shift) {
    return formatted(
        "%s\n%s%s%sSteps: %d, Sampler: Euler, CFG scale: %g, Distilled CFG Scale: %g, Seed: %llu, "
        "Size: %dx%d, Shift: %g, Model: %s%s%s%s%s%s%s",
        prompt, o.negative ? "Negative prompt: " : "", o.negative ? o.negative : "",
        o.negative ? "\n" : "", o.steps, o.cfg ? o.cfg : 1, o.guidance, (unsigned long long)seed,
        o.width, o.height, shift, o.model, o.transformer ? ", Transformer: " : "",
        o.transformer ? o.transformer : "", loras, strcmp(o.weights, "fp8") ? "" : ", Weights: fp8",
        o.noise ? ", Noise: " : "", o.noise ? o.noise : "");
}

static double seconds_of(struct timespec t) { return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec; }

/* One more of those files (its shards, if it has any), by the time at which it came to its place:
 * an older one that was moved there is new as well. */
static void note_file(const char *path) {
    struct stat s;
    if (!stat(path, &s)) newest_input = fmax(newest_input, seconds_of(s.st_ctim));
}

/* Weights, with all shards, and the config beside them. */
static void note_input(const char *path) {
    sc_file *file = path ? sc_file_open(path) : NULL;
    const char *part, *folder = path ? kept(sc_model_folder(path)) : NULL;
    for (int64_t i = 0; file && (part = sc_file_part(file, i)); i++) note_file(part);
    if (folder) note_file(formatted("%s/config.json", folder));
    sc_file_close(file);
}

/* Whether the PNG at `path` was drawn with just these parameters, after all input was there. */
static bool drawn(const char *path, const char *parameters) {
    struct stat picture;
    char end[8] = "";
    const char *text = sc_picture_parameters(path);
    FILE *f = text ? fopen(path, "rb") : NULL;
    bool whole = f && !fseek(f, -8, SEEK_END) && fread(end, 8, 1, f) && !memcmp(end, "IEND", 4);
    if (f) fclose(f);
    return whole && !strcmp(text, parameters) && !stat(path, &picture) &&
           newest_input <= seconds_of(picture.st_mtim);
}

/* Draws one picture and prints how long its parts took. */
static bool draw(sc_pipeline *p, const char *prompt, uint64_t seed, const char *path) {
    const sc_dit_config *c = sc_dit_config_of(p->dit);
    int h = o.height / p->token_pixels, w = o.width / p->token_pixels;
    int64_t tokens = (int64_t)h * w, n = tokens * c->in_channels;
    int64_t pixels = (int64_t)3 * o.width * o.height;
    float shift = time_shift(p, tokens);
    const char *parameters = parameters_of(prompt, seed, shift);
    if (o.prompts && drawn(path, parameters)) return true;
    float *latents = (float *)allocate((size_t)(n + pixels), sizeof *latents), *rgb = latents + n;
    double times[4] = {sc_seconds()};
    sc_text text = sc_pipeline_text(p, prompt);
    static sc_text negative; /* true CFG's, made once */
    if (o.cfg && text.context && !negative.context) {
        negative = sc_pipeline_text(p, o.negative ? o.negative : "");
        sc_note_cut(&negative), sc_warn_cut("negative prompt");
    }
    sc_sampling s = {.steps = o.steps, .shift = shift, .guidance = o.guidance, .h = h, .w = w,
                     .progress = progress, .user = &times[1], .cfg = o.cfg, .no_text = negative};
    bool ok = latents && text.context && (!o.cfg || negative.context);
    if (ok) sc_normal(&(sc_rng){seed}, latents, n);
    ok = ok && (!o.noise || load_noise(o.noise, latents, n));
    if (ok) sc_note_cut(&text), sc_warn_cut("prompt");
    times[1] = sc_seconds();
    ok = ok && sc_sample(p->dit, p->tape, &s, 1, p->text_tokens, &text, latents) &&
         (!o.latents || save_latents(o.latents, latents, tokens, c->in_channels));
    times[2] = sc_seconds();
    ok = ok && sc_pipeline_decode(p, latents, 1, h, w, rgb);
    times[3] = sc_seconds();
    ok = ok && sc_picture_save(&(sc_picture){o.width, o.height, rgb}, path, parameters);
    const char *done =
        formatted("\"%.200s\", %d step%s, seed %llu (text %.1f s, steps %.1f s, VAE %.1f s)",
                  prompt, o.steps, o.steps == 1 ? "" : "s", (unsigned long long)seed,
                  times[1] - times[0], times[2] - times[1], times[3] - times[2]);
    if (ok) sc_print_text(stdout, formatted("%s: ", path), done);
    free(text.context), free(latents);
    return ok;
}

/* "name.png" for the first of several, then "name-2.png" ... */
static const char *numbered(const char *out, int index) {
    const char *ending = sc_ending(out);
    return index ? formatted("%.*s-%d%s", (int)(ending - out), out, index + 1, ending) : out;
}

/* What --out and --latents name, and the names that follow from --out's. */
static bool check_files(void) {
    bool ok = !o.latents ||
              (sc_check_out(o.latents, SC_WEIGHTS, true, o.model, o.transformer, o.lora) &&
               sc_apart(o.latents, o.noise));
    for (int i = 0; ok && i < o.count; i++) {
        const char *out = numbered(o.out, i);
        ok = sc_check_out(out, ".png", o.named && !i, o.model, o.transformer, o.lora) &&
             sc_apart(out, o.noise) && sc_apart(out, o.latents);
    }
    return ok;
}

static bool draw_all(sc_pipeline *p, const char *prompt) {
    bool ok = sc_agree(sc_rank || check_files());
    for (int i = sc_rank; ok && i < o.count; i += sc_processes)
        ok = draw(p, prompt, o.seed + (uint64_t)i, numbered(o.out, i));
    return ok;
}

/* ---- A training set from the model itself ---- */

static char **prompts;
static int64_t pictures; /* o.count of each prompt */

static const char *prompt_of(int64_t index) { return prompts[index / o.count]; }

static const char *path_of(int64_t index) {
    return formatted("%s/%06lld.png", o.out_dir, (long long)index);
}

/* The picture's line of metadata.jsonl. */
static const char *line_of(int64_t index, const char *prompt) {
    char *quoted = formatted("%*s", 6 * (int)strlen(prompt), ""), *at = quoted; /* room */
    for (; *prompt; prompt++)
        if ((unsigned char)*prompt < ' ') at += sprintf(at, "\\u%04x", (unsigned)*prompt);
        else at += sprintf(at, "%s%c", strchr("\"\\", *prompt) ? "\\" : "", *prompt);
    *at = 0;
    return formatted("{\"file_name\": \"%06lld.png\", \"prompt\": \"%s\"}", (long long)index,
                     quoted);
}

/* Whether nothing is lost with a line of an old metadata.jsonl: its picture says the same, or it
 * will stand there again. *left: those that will not. */
static bool known_line(const char *line, int64_t *left) {
    long long index = -1;
    sscanf(line, "{\"file_name\": \"%lld.png\"", &index);
    size_t length = strlen(line); /* of the last one, perhaps not all */
    if (index < 0) return !strncmp(line, "{\"file_name\": \"", length);
    *left += index >= pictures;
    char *text = sc_picture_parameters(path_of(index));
    if (text) text[strcspn(text, "\n")] = 0;
    return (text && !strncmp(line, line_of(index, text), length)) ||
           (index < pictures && !strncmp(line, line_of(index, prompt_of(index)), length));
}

/* A folder may hold pictures of the user's, under such names too. */
static bool check_folder(const char *metadata) {
    size_t length;
    int64_t left = 0;
    bool ok = sc_apart(metadata, o.prompts), old = exists(metadata);
    for (int64_t i = 0; ok && i < pictures; i++) ok = sc_may_replace(path_of(i));
    char *text = ok && old ? kept(sc_read_file(metadata, &length)) : NULL;
    ok = ok && (text || !old);
    char *line = text ? strtok(text, "\r\n") : NULL;
    for (; ok && line; line = strtok(NULL, "\r\n"))
        ok = known_line(line, &left) ||
             sc_fail("%s has lines that are not this program's: choose another folder: %s",
                     metadata, line);
    if (ok && left)
        fprintf(stderr, "warning: %lld older pictures stay in %s, but not in metadata.jsonl\n",
                (long long)left, o.out_dir);
    return ok && sc_can_write(metadata);
}

/* Writes a picture's line; the first starts metadata.jsonl anew. */
static bool add_line(int64_t index, const char *metadata) {
    FILE *f = fopen(metadata, index ? "a" : "w");
    bool written = f && fprintf(f, "%s\n", line_of(index, prompt_of(index))) > 0;
    if (f && !fclose(f) && written) return true;
    return sc_fail("%s: cannot write: %s", metadata, strerror(errno));
}

/* In rounds: a picture for each process, and then their lines. Pictures that are there with the
 * same settings are not drawn again, so a run that was stopped goes on where it was. */
static bool draw_list(sc_pipeline *p) {
    const char *metadata = formatted("%s/metadata.jsonl", o.out_dir);
    int64_t done = 0;
    prompts = sc_load_prompts(o.prompts, &pictures);
    pictures *= o.count;
    bool made = false, ok = prompts && (sc_rank || (make_folder(o.out_dir, &made) &&
                                                    sc_lock(o.out_dir) && check_folder(metadata)));
    ok = sc_agree(ok);
    while (ok && done < pictures && !sc_stop) {
        int64_t own = done + sc_rank, next = done + sc_processes;
        bool drawn =
            own >= pictures || draw(p, prompt_of(own), o.seed + (uint64_t)own, path_of(own));
        ok = sc_agree(drawn || sc_interrupted);
        if (sc_stop) next = done + drawn;
        for (; ok && done < next && done < pictures; done++)
            ok = sc_rank || add_line(done, metadata);
    }
    sc_unlock();
    if (ok && sc_stop)
        ok = sc_fail("stopped after %lld pictures; the same command goes on from there",
                     (long long)done);
    if (made && !done) rmdir(o.out_dir);
    if (ok) printf("%s: %lld pictures and metadata.jsonl\n", o.out_dir, (long long)done);
    return ok;
}

/* ---- The command line ---- */

/* False with the error set where a value makes no sense; `steps` may be NULL. */
static bool check_options(const char *steps) {
    char *end = NULL, more;
    long number = steps ? strtol(steps, &end, 10) : 3;
    if (number < 1 || number > 1000 || (end && *end))
        return sc_fail("STEPS is a number from 1 to 1000, not '%s'", steps);
    o.steps = (int)number;
    if (o.count < 1 || o.count > 1000000)
        return sc_fail("--count is a number from 1 up to 1000000, not %d", o.count);
    if (o.threads < 0 || o.threads > SC_MAX_THREADS)
        return sc_fail("--threads is a number from 0 to %d", SC_MAX_THREADS);
    if (!(o.cfg >= 0 && isfinite(o.cfg))) return sc_fail("--cfg is a number from 0 up");
    if (o.negative && !o.cfg) return sc_fail("--negative needs --cfg G: without, nothing reads it");
    if ((o.latents || o.noise) && (o.prompts || o.count > 1))
        return sc_fail("--noise and --latents are those of one picture");
    if (o.prompts ? o.named : o.out_dir != NULL)
        return sc_fail("--out is for one prompt, --out-dir for --prompts FILE");
    if (o.no_lora && o.lora[0]) return sc_fail("--lora and --no-lora exclude each other");
    float shift = o.shift && strcmp(o.shift, "auto") ? strtof(o.shift, &end) : 1;
    if (!(shift > 0 && isfinite(shift)) || (end && *end))
        return sc_fail("--shift is a positive number or auto, not '%s'", o.shift);
    if (o.size && (sscanf(o.size, "%6dx%6d%c", &o.width, &o.height, &more) != 2 || o.width < 1 ||
                   o.height < 1 || o.width > 1 << 14 || o.height > 1 << 14))
        return sc_fail("--size is WxH, sides up to %d pixels, not '%s'", 1 << 14, o.size);
    return true;
}

/* The size that is given must suit the model, or it is the model's. */
static bool take_size(const sc_pipeline *p) {
    int side = p->token_pixels;
    if (!o.size) o.width = o.height = p->resolution;
    if (o.width % side || o.height % side)
        return sc_fail("--size is WxH in multiples of %d pixels, not '%dx%d'", side, o.width,
                       o.height);
    return sc_dit_fits(p->dit, o.height / side, o.width / side);
}

static bool load_loras(sc_pipeline *p) {
    float guidance = o.guidance, scale;
    const char *folder = kept(sc_model_folder(o.model));
    for (int i = 0; folder && sc_encoder_files[i]; i++)
        note_file(formatted("%s/%s", folder, sc_encoder_files[i]));
    note_file(formatted("%s/scheduler/scheduler_config.json", folder));
    for (int part = 0; part < SC_PARTS; part++)
        note_input(kept(sc_part_path(o.model, (sc_part)part)));
    note_input(o.transformer);
    note_input(o.noise);
    if (!o.lora[0] && !o.no_lora) o.lora[0] = sc_own_lora(o.model, o.transformer);
    for (int i = 0; !o.no_lora && i < 8 && o.lora[i]; i++) {
        const char *path = sc_lora_argument(o.lora[i], o.steps, &scale, NULL);
        if (!sc_load_lora_argument(p->dit, o.lora[i], o.steps, o.guided ? NULL : &guidance))
            return false;
        loras = formatted("%s%s%s:%g", loras, i ? " " : ", Lora: ", path, scale);
        note_input(path);
    }
    if (guidance == o.guidance) return true;
    o.guidance = guidance;
    fprintf(stderr, "guidance %g, the LoRA's for %d step%s (--guidance to change)\n", guidance,
            o.steps, o.steps == 1 ? "" : "s");
    return true;
}

int main(int argc, char **argv) {
    sc_start(argv);
    const char *words[2] = {NULL, NULL};
    o.guided = sc_given(argc, argv, "--guidance", NULL) != NULL;
    o.named = sc_given(argc, argv, "--out", NULL) != NULL;
    sc_parse_recipe(table, OPTIONS, sc_given(argc, argv, "--model", o.model), "sample");
    int count = sc_parse(usage, table, OPTIONS, argc, argv, words, 2);
    const char *prompt = o.prompts ? NULL : words[0], *steps = o.prompts ? words[0] : words[1];
    const char *wrong = !o.prompts && !prompt     ? "which prompt?"
                        : o.prompts && !o.out_dir ? "--prompts needs --out-dir DIR"
                        : o.prompts && count > 1  ? "PROMPT and --prompts exclude each other"
                                                  : NULL;
    if (wrong) sc_fail("%s (see %s --help)", wrong, argv[0]);
    if (wrong || !check_options(steps)) return sc_bad_usage(wrong ? usage : NULL);
    sc_set_threads(o.threads);
    sc_catch_interrupt();
    sc_dit_options how = {.fp8 = !strcmp(o.weights, "fp8"),
                          .streamed = !strcmp(o.weights_on, "host")};
    sc_pipeline *p = sc_open_model(o.model, o.transformer, o.device, how);
    bool usage_ok = !p || take_size(p);
    if (p) sc_note_guidance(p->dit, o.guided, o.cfg > 0);
    bool ok = p && usage_ok && load_loras(p) && (o.prompts ? draw_list(p) : draw_all(p, prompt));
    sc_pipeline_close(p);
    int status = sc_end(ok);
    return usage_ok ? status : 2;
}
