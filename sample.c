/* ./sample "PROMPT" [STEPS]: pictures from a FLUX model folder, with LoRAs. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
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

typedef struct options {
    const char *model, *lora[8], *size, *shift, *out, *out_dir, *prompts, *noise, *latents, *device,
        *weights, *weights_on;
    bool no_lora;
    float guidance;
    bool guided; /* by --guidance: then a LoRA has no say in it */
    int seed, count, threads;
    int steps, width, height;
} options;

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
    else if (file) sc__fail("%s: needs a tensor 'noise' of %lld numbers", path, (long long)n);
    sc_file_close(file);
    return ok;
}

static bool save_latents(const char *path, float *latents, int64_t tokens, int64_t channels) {
    sc_tensor x = {.data = latents, .dtype = SC_F32, .ndim = 3, .shape = {1, tokens, channels}};
    sc_named named = {"latents", &x, SC_F32};
    return sc_file_save(path, &named, 1, NULL);
}

static float time_shift(const sc_pipeline *p, const options *o, int64_t tokens) {
    if (!o->shift) return sc_pipeline_shift(p, tokens);
    float shift = strtof(o->shift, NULL); /* 0: auto */
    return shift > 0 ? shift : sc_dynamic_shift(&p->mu, tokens);
}

/* The settings as the usual picture tools read them: the prompt, then "Key: value, ..."; malloced.
 */
static char *parameters_of(const options *o, const char *prompt, uint64_t seed, float shift) {
    sc__text t = {0};
    char line[512];
    int n = snprintf(line, sizeof line,
                     "\nSteps: %d, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: %g, Seed: "
                     "%llu, Size: %dx%d, Shift: %g, Model: ",
                     o->steps, o->guidance, (unsigned long long)seed, o->width, o->height, shift);
    sc__text_add(&t, prompt, strlen(prompt));
    sc__text_add(&t, line, (size_t)n);
    sc__text_add(&t, o->model, strlen(o->model));
    for (int i = 0; !o->no_lora && i < 8 && o->lora[i]; i++) {
        char path[1024], scale_text[32];
        float scale;
        sc_lora_argument(o->lora[i], o->steps, path, &scale, NULL);
        sc__text_add(&t, i ? " " : ", Lora: ", i ? 1 : 8);
        sc__text_add(&t, path, strlen(path));
        sc__text_add(&t, scale_text, (size_t)snprintf(scale_text, sizeof scale_text, ":%g", scale));
    }
    if (!strcmp(o->weights, "fp8")) sc__text_add(&t, ", Weights: fp8", 14);
    if (o->noise) {
        sc__text_add(&t, ", Noise: ", 9);
        sc__text_add(&t, o->noise, strlen(o->noise));
    }
    sc__text_add(&t, "", 1);
    if (!t.failed) return t.data;
    free(t.data);
    return sc__fail("out of memory"), NULL;
}

/* Whether a LoRA was written after the file at `path`. */
static bool lora_is_newer(const options *o, const char *path) {
    struct stat picture, lora;
    char file[1024];
    float scale;
    bool newer = false;
    for (int i = 0; !o->no_lora && i < 8 && o->lora[i]; i++) {
        sc_lora_argument(o->lora[i], o->steps, file, &scale, NULL);
        newer =
            newer || stat(path, &picture) || stat(file, &lora) || lora.st_mtime > picture.st_mtime;
    }
    return newer;
}

/* Whether the PNG at `path` was drawn with just these parameters: the text in its chunk. */
static bool drawn(const char *path, const char *parameters) {
    size_t size = 0, at = 0, length = 0, n = strlen(parameters);
    char *file = sc__exists(path) ? sc__read_file(path, &size) : NULL;
    const uint8_t *text = NULL;
    for (int utf8 = 0; file && !text && utf8 < 2; utf8++, at = 0)
        text = sc__chunk((uint8_t *)file, size, &at, utf8 ? "iTXt" : "tEXt", &length);
    bool same = text && length >= 11 + n && !memcmp(text, "parameters", 11) &&
                !memcmp(text + length - n, parameters, n) && !text[length - n - 1];
    free(file);
    return same;
}

/* Draws one picture and prints how long its parts took. */
static bool draw(sc_pipeline *p, const options *o, const char *prompt, uint64_t seed,
                 const char *path) {
    const sc_flux_config *c = sc_flux_config_of(p->flux);
    int h = o->height / p->token_pixels, w = o->width / p->token_pixels;
    int64_t tokens = (int64_t)h * w, n = tokens * c->in_channels;
    int64_t pixels = (int64_t)3 * o->width * o->height;
    int64_t context_size = (int64_t)p->text_tokens * c->text_channels;
    float shift = time_shift(p, o, tokens);
    char shown[201];
    char *parameters = parameters_of(o, prompt, seed, shift);
    if (!parameters) return false;
    if (o->prompts && !lora_is_newer(o, path) && drawn(path, parameters))
        return free(parameters), true;
    float *memory = (float *)sc__alloc((size_t)(n + pixels + context_size + c->pooled_channels),
                                       sizeof *memory);
    float *latents = memory, *rgb = latents + n, *context = rgb + pixels;
    float *pooled = context + context_size;
    sc_rng rng = {seed};
    double times[4] = {sc_seconds()};
    sc_sampling s = {.steps = o->steps,
                     .shift = shift,
                     .guidance = o->guidance,
                     .h = h,
                     .w = w,
                     .progress = progress,
                     .user = &times[1]};
    bool ok = memory != NULL;
    if (ok) sc_normal(&rng, latents, n);
    ok = ok && (!o->noise || load_noise(o->noise, latents, n)) &&
         sc_pipeline_text(p, prompt, context, pooled);
    if (ok && p->cut)
        fprintf(stderr, "warning: the prompt has more than %d tokens: its end is left out\n",
                p->text_tokens);
    times[1] = sc_seconds();
    ok = ok && sc_sample(p->flux, p->tape, &s, 1, p->text_tokens, context, pooled, latents) &&
         (!o->latents || save_latents(o->latents, latents, tokens, c->in_channels));
    times[2] = sc_seconds();
    ok = ok && sc_pipeline_decode(p, latents, 1, h, w, rgb);
    times[3] = sc_seconds();
    ok = ok && sc_picture_save(&(sc_picture){o->width, o->height, rgb}, path, parameters);
    snprintf(shown, sizeof shown, "%s", prompt);
    if (ok)
        printf("%s: \"%s\", %d step%s, seed %llu (text %.1f s, steps %.1f s, VAE %.1f s)\n", path,
               sc__plain(shown), o->steps, o->steps == 1 ? "" : "s", (unsigned long long)seed,
               times[1] - times[0], times[2] - times[1], times[3] - times[2]);
    free(parameters);
    free(memory);
    return ok;
}

/* "name.png" for the first of several, then "name-2.png" ... */
static void numbered(const char *out, int index, char path[1024]) {
    const char *slash = strrchr(out, '/'), *dot = strrchr(slash ? slash : out, '.');
    int stem = dot ? (int)(dot - out) : (int)strlen(out);
    if (index == 0) snprintf(path, 1024, "%s", out);
    else snprintf(path, 1024, "%.*s-%d%s", stem, out, index + 1, dot ? dot : "");
}

/* ---- A training set from the model itself ---- */

/* Pictures that are there with the same settings are not drawn again, so a run that was stopped
 * goes on where it was. */
static bool draw_list(sc_pipeline *p, const options *o) {
    char *text = sc_text_load(o->prompts), *rest = text, *line, path[1024];
    bool made = false, ok = text && sc__make_folder(o->out_dir, &made);
    sc__text metadata = {0};
    int index = 0;
    while (ok && !sc_interrupted && (line = sc_next_line(&rest)))
        for (int i = 0; ok && i < o->count && !sc_interrupted; i++, index++) {
            char name[64];
            snprintf(name, sizeof name, "%06d.png", index);
            snprintf(path, sizeof path, "%s/%s", o->out_dir, name);
            if (!(ok = draw(p, o, line, (uint64_t)o->seed + (uint64_t)index, path))) break;
            sc__text_add(&metadata, "{\"file_name\": ", 14);
            sc__text_quote(&metadata, name);
            sc__text_add(&metadata, ", \"prompt\": ", 12);
            sc__text_quote(&metadata, line);
            sc__text_add(&metadata, "}\n", 2);
        }
    snprintf(path, sizeof path, "%s/metadata.jsonl", o->out_dir);
    if (index) ok = sc__write_file(path, metadata.data, metadata.length) && ok; /* also of a part */
    if (text && sc_interrupted)
        ok = sc__fail("stopped after %d pictures; the same command goes on from there", index);
    else if (ok && !index) ok = sc__fail("%s: no prompts", o->prompts);
    if (made && !index) rmdir(o->out_dir);
    if (ok) printf("%s: %d pictures and metadata.jsonl\n", o->out_dir, index);
    free(metadata.data);
    free(text);
    return ok;
}

/* ---- The command line ---- */

static int read_options(options *o, int argc, char **argv, const char **words) {
    const sc_option table[] = {
        {NULL, SC_FLAG, NULL, NULL, "Options:"},
        {"--model", SC_STRING, &o->model, "DIR", "FLUX pipeline folder"},
        {"--lora", SC_STRINGS, o->lora, "FILE[:SCALE]",
         "LoRA, repeatable; without SCALE, the scale and guidance it recommends for STEPS "
         "[lora.safetensors, if it is there and of this model]"},
        {"--no-lora", SC_FLAG, &o->no_lora, NULL, "the bare model"},
        {"--guidance", SC_FLOAT, &o->guidance, "G",
         "guidance scale (default: what the LoRA recommends for STEPS, else the model's)"},
        {"--shift", SC_STRING, &o->shift, "S", "time shift, or auto (default: the model's)"},
        {"--size", SC_STRING, &o->size, "WxH", "pixels (default: the model's)"},
        {"--seed", SC_INT, &o->seed, "N", "of the noise; the next pictures count on from it"},
        {"--count", SC_INT, &o->count, "N", "pictures of a prompt"},
        {"--out", SC_STRING, &o->out, "FILE", "PNG to write"},
        {"--prompts", SC_STRING, &o->prompts, "FILE", "one prompt a line"},
        {"--out-dir", SC_STRING, &o->out_dir, "DIR",
         "folder for --prompts' pictures and metadata.jsonl"},
        {"--noise", SC_STRING, &o->noise, "FILE",
         "start from the tensor 'noise' in this safetensors file"},
        {"--latents", SC_STRING, &o->latents, "FILE", "also write the final packed latents"},
        {"--weights", SC_CHOICE, &o->weights, "auto|fp8",
         "matrices: as in the file, or fp8, half of bf16"},
        {"--weights-on", SC_CHOICE, &o->weights_on, "device|host",
         "matrices: in host memory they are streamed, for GPUs that are too small"},
        {"--device", SC_CHOICE, &o->device, SC_DEVICES, "what computes"},
        {"--threads", SC_INT, &o->threads, "N", "CPU threads (0: OMP_NUM_THREADS, or all cores)"},
    };
    const int count = sizeof table / sizeof *table;
    const char *model = sc_given(argc, argv, "--model");
    if (!sc_parse_recipe(table, count, model ? model : o->model, "sample")) return -1;
    o->guided = sc_given(argc, argv, "--guidance") != NULL;
    return sc_parse(usage, table, count, argc, argv, words, 2);
}

/* False with the error set where a value makes no sense; `steps` may be NULL. */
static bool check_options(options *o, const char *steps) {
    char *end = NULL, more;
    o->steps = steps ? (int)strtol(steps, &end, 10) : 3;
    if (o->steps < 1 || o->steps > 1000 || (end && *end))
        return sc__fail("STEPS is a number from 1 to 1000, not '%s'", steps);
    if (o->count < 1) return sc__fail("--count is a number from 1 up, not %d", o->count);
    const char *dot = strrchr(o->out, '.');
    if (dot && (!strcmp(dot, ".jpg") || !strcmp(dot, ".jpeg")))
        return sc__fail("--out is a PNG, not '%s'", o->out);
    float shift = o->shift && strcmp(o->shift, "auto") ? strtof(o->shift, &end) : 1;
    if (!(shift > 0 && isfinite(shift)) || (end && *end))
        return sc__fail("--shift is a positive number or auto, not '%s'", o->shift);
    if (o->size && (sscanf(o->size, "%dx%d%c", &o->width, &o->height, &more) != 2 || o->width < 1 ||
                    o->height < 1 || o->width > 1 << 14 || o->height > 1 << 14))
        return sc__fail("--size is WxH, sides up to %d pixels, not '%s'", 1 << 14, o->size);
    return true;
}

static sc_pipeline *open_model(const options *o) {
    const sc_backend *be = sc_device(o->device);
    const sc_pipeline_options how = {.fp8 = !strcmp(o->weights, "fp8"),
                                     .streamed = !strcmp(o->weights_on, "host")};
    return be ? sc_open_model(be, o->model, &how) : NULL;
}

/* The size that is given must suit the model, or it is the model's. */
static bool take_size(const sc_pipeline *p, options *o) {
    int side = p->token_pixels;
    if (!o->size) o->width = o->height = p->resolution;
    return (o->width % side == 0 && o->height % side == 0) ||
           sc__fail("--size is WxH in multiples of %d pixels, not '%s'", side, o->size);
}

static bool load_loras(sc_pipeline *p, options *o) {
    float guidance = o->guidance;
    if (!o->lora[0] && !o->no_lora) o->lora[0] = sc_own_lora(o->model);
    for (int i = 0; !o->no_lora && i < 8 && o->lora[i]; i++)
        if (!sc_load_lora_argument(p->flux, o->lora[i], o->steps, o->guided ? NULL : &guidance))
            return false;
    if (guidance == o->guidance) return true;
    o->guidance = guidance;
    fprintf(stderr, "guidance %g, the LoRA's for %d step%s (--guidance to change)\n", guidance,
            o->steps, o->steps == 1 ? "" : "s");
    return true;
}

int main(int argc, char **argv) {
    sc_start(argv);
    options o = {.model = "data/tiny-flux",
                 .out = "out.png",
                 .device = "auto",
                 .weights = "auto",
                 .weights_on = "device",
                 .guidance = 3.5f,
                 .count = 1,
                 .seed = 1};
    const char *words[2] = {NULL, NULL};
    int count = read_options(&o, argc, argv, words);
    if (count < 0) return sc_die();
    const char *prompt = o.prompts ? NULL : words[0], *steps = o.prompts ? words[0] : words[1];
    if ((!prompt && !o.prompts) || (o.prompts && (!o.out_dir || count > 1))) {
        fprintf(stderr, "%s\n\nerror: %s (see %s --help)\n", usage,
                !o.prompts  ? "which prompt?"
                : o.out_dir ? "PROMPT and --prompts exclude each other"
                            : "--prompts needs --out-dir DIR",
                argv[0]);
        return 2;
    }
    if (!check_options(&o, steps)) return sc_die(), 2;
    sc_set_threads(o.threads);
    sc_catch_interrupt();
    sc_pipeline *p = open_model(&o);
    bool usage_ok = !p || take_size(p, &o);
    bool ok = p && usage_ok && (o.prompts || sc_can_write(o.out)) && load_loras(p, &o);
    if (ok && o.prompts) ok = draw_list(p, &o);
    for (int i = 0; ok && prompt && i < o.count; i++) {
        char path[1024];
        numbered(o.out, i, path);
        ok = draw(p, &o, prompt, (uint64_t)o.seed + (uint64_t)i, path);
    }
    sc_pipeline_close(p);
    if (!ok) sc_die();
    return ok ? 0 : usage_ok ? 1 : 2;
}
