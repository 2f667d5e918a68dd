/* Tokenizers, text encoders and whole pipelines against Hugging Face's and diffusers'
 * (test/reference/make_tokens.py, make_pipeline.py), bad tokenizers, and the fuzzer's corpus.
 * SHORTCUT_FLUX_DIR: a FLUX.1 folder, for its tokenizers (no weights needed). */
#define _XOPEN_SOURCE 700 /* POSIX and realpath */
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "test.h"
#include "fuzz_tokenizer.c"

static sc_file *open_reference(const char *name) {
    char path[256];
    snprintf(path, sizeof path, "test/reference/%s.safetensors", name);
    sc_file *f = sc_file_open(path);
    if (!f) printf("%s (run the tests from the project's folder)\n", sc_error()), exit(1);
    return f;
}

static const sc_tensor *find(const sc_file *f, const char *name) {
    const sc_tensor *x = sc_file_find(f, name);
    if (!x) printf("%s has no '%s'\n", sc_file_path(f), name), exit(1);
    return x;
}

/* ---- Tokenizers ---- */

static uint64_t hash_ids(uint64_t hash, const int32_t *ids, int n) { /* FNV-1a */
    for (int i = 0; i < n; i++) hash = (hash ^ (uint64_t)(uint32_t)ids[i]) * 0x100000001b3u;
    return hash;
}

/* All texts, at the tokenizer's own length and at one that holds them whole. */
static void test_tokenizer(const sc_file *f, const char *folder, const char *key,
                           const char *part) {
    enum { LONG = 2048 };
    static int32_t ids[LONG];
    char path[1024], name[64];
    snprintf(path, sizeof path, "%s/%s", folder, part);
    snprintf(name, sizeof name, "%s.%s", key, part);
    sc_tokenizer *t = sc_tokenizer_open(path);
    CHECK(t != NULL);
    if (!t) {
        printf("%s\n", sc_error());
        return;
    }
    const sc_tensor *texts = find(f, "texts"), *expected = find(f, name);
    const char *text = texts->data;
    int own = sc_tokenizer_length(t), wrong = 0;
    CHECK(own > 0 && own <= LONG);
    for (int64_t i = 0; i < sc_count(expected); i++, text += strlen(text) + 1) {
        uint64_t hash = 0xcbf29ce484222325u;
        bool ok = sc_tokenize(t, text, own, ids) >= 0;
        hash = hash_ids(hash, ids, own);
        ok = ok && sc_tokenize(t, text, LONG, ids) >= 0;
        hash = hash_ids(hash, ids, LONG);
        ok = ok && hash == ((const uint64_t *)expected->data)[i];
        if (!ok && wrong++ < 5) printf("%s: text %lld differs: %.80s\n", path, (long long)i, text);
        test_passed += ok, test_failed += !ok;
    }
    printf("%s.%s: %lld texts, %d differ\n", key, part, (long long)sc_count(expected), wrong);
    CHECK(text == (const char *)texts->data + sc_count(texts) && sc_count(expected) >= 1000);
    sc_tokenizer_close(t);
}

static void test_tokenizers(void) {
    sc_file *f = open_reference("tokens");
    const char *flux = getenv("SHORTCUT_FLUX_DIR");
    test_tokenizer(f, "data/tiny-flux", "tiny", "tokenizer");
    test_tokenizer(f, "data/tiny-flux", "tiny", "tokenizer_2");
    if (flux && *flux) {
        test_tokenizer(f, flux, "flux", "tokenizer");
        test_tokenizer(f, flux, "flux", "tokenizer_2");
    } else SKIP("FLUX.1's tokenizers: SHORTCUT_FLUX_DIR is not set");
    sc_file_close(f);
}

/* ---- Text encoders ---- */

/* The encoders of `folder` for all prompts of the reference; their ids as well. */
static void test_encoders(const char *folder, const char *reference) {
    sc_file *f = open_reference(reference);
    sc_text_encoders *t = sc_text_encoders_open(sc_cpu(), folder, SC_FLUX);
    CHECK(t != NULL);
    if (!t) printf("%s\n", sc_error()), exit(1);
    const sc_tensor *contexts = find(f, "context"), *pools = find(f, "pooled"),
                    *ids = find(f, "ids");
    int tokens = (int)contexts->shape[1], clip = (int)ids->shape[1] - tokens;
    int64_t context_size = tokens * contexts->shape[2], pooled_size = pools->shape[1];
    float *context = malloc((size_t)(context_size + pooled_size) * 4),
          *pooled = context + context_size;
    int32_t *mine = malloc((size_t)(clip + tokens) * 4);
    const char *prompt = find(f, "prompts")->data;
    double worst[2] = {0, 0};
    CHECK(contexts->shape[0] > 3);
    for (int64_t i = 0; i < contexts->shape[0]; i++, prompt += strlen(prompt) + 1) {
        const int64_t *theirs = (const int64_t *)ids->data + i * (clip + tokens);
        bool same = sc_tokenize(t->clip.tokenizer, prompt, clip, mine) > 0 &&
                    sc_tokenize(t->t5.tokenizer, prompt, tokens, mine + clip) > 0;
        for (int k = 0; k < clip + tokens; k++) same = same && mine[k] == theirs[k];
        CHECK(same);
        CHECK(sc_text_encode(t, prompt, tokens, context, pooled));
        double a =
            rel_error(context, (const float *)contexts->data + i * context_size, context_size);
        double b = rel_error(pooled, (const float *)pools->data + i * pooled_size, pooled_size);
        CHECK(a < 1e-5 && b < 1e-5);
        worst[0] = fmax(worst[0], a), worst[1] = fmax(worst[1], b);
    }
    printf("%s: largest error of T5 %.1e, of CLIP %.1e\n", folder, worst[0], worst[1]);
    free(context), free(mine);
    sc_text_encoders_close(t);
    sc_file_close(f);
}

/* ---- Pipelines ---- */

static const char *prompt_of(const sc_file *f, int i) {
    const char *prompt = find(f, "prompts")->data;
    while (i-- > 0) prompt += strlen(prompt) + 1;
    return prompt;
}

/* From the reference's noise to latents and a picture; `prefix` "": bare, "lora_": with the LoRA.
 * cfg: with the negative prompt. */
static void test_drawing(sc_pipeline *p, const sc_file *f, const char *prefix, bool cfg) {
    const float *settings = find(f, "settings")->data;
    const sc_tensor *noise = find(f, "noise");
    char name[64];
    int64_t n = sc_count(noise), pixels = sc_count(find(f, "picture"));
    float *latents = malloc((size_t)(n + pixels) * 4), *rgb = latents + n;
    sc_text text = sc_pipeline_text(p, prompt_of(f, 0)), no_text = {0};
    sc_sampling s = {.steps = (int)settings[0], .h = (int)settings[2], .w = (int)settings[3]};
    s.shift = sc_pipeline_shift(p, (int64_t)s.h * s.w);
    if (p->dit->config.kind == SC_SD3) CHECK(s.shift == settings[5]);
    else s.guidance = settings[1];
    if (cfg) {
        no_text = sc_pipeline_text(p, prompt_of(f, (int)settings[6]));
        s.cfg = settings[1], s.no_text = no_text;
    }
    memcpy(latents, noise->data, (size_t)n * 4);
    CHECK(p->shift == settings[5]);
    CHECK(text.context && (no_text.context || !cfg));
    CHECK(sc_sample(p->dit, p->tape, &s, 1, p->text_tokens, &text, latents));
    CHECK(sc_pipeline_decode(p, latents, 1, s.h, s.w, rgb));
    snprintf(name, sizeof name, "%slatents", prefix);
    double a = rel_error(latents, find(f, name)->data, n), b = 0;
    snprintf(name, sizeof name, "%spicture", prefix);
    const float *picture = find(f, name)->data;
    for (int64_t i = 0; i < pixels; i++)
        b = fmax(b, fabs(fmin(fmax(rgb[i], -1), 1) - fmin(fmax(picture[i], -1), 1)));
    printf("%s: error of %slatents %.1e, largest of a pixel %.4f/255\n", sc_file_path(f), prefix, a,
           b * 127.5);
    CHECK(a < 5e-5);
    CHECK(b * 127.5 < 0.1);
    free(latents), free(text.context), free(no_text.context);
}

/* A transformer for other latents than the VAE's would write past the ends of both. */
static void test_mismatch(void) {
    sc_pipeline *p =
        sc_pipeline_open(sc_cpu(), "data/tiny-flux", "test/reference/flux_a", NULL);
    CHECK(!p && strstr(sc_error(), "tokens of 16 channels"));
    sc_pipeline_close(p);
}

static void test_pipeline(const char *name) {
    char folder[128], reference[128], lora[256];
    snprintf(folder, sizeof folder, "test/reference/%s", name);
    snprintf(reference, sizeof reference, "%s/reference", name);
    snprintf(lora, sizeof lora, "%s/lora.safetensors", folder);
    test_encoders(folder, reference);
    sc_file *f = open_reference(reference);
    sc_pipeline *p = sc_pipeline_open(sc_cpu(), folder, NULL, NULL);
    if (!p) printf("%s\n", sc_error()), exit(1);
    test_drawing(p, f, "", false);
    sc_lora_report report;
    CHECK(sc_lora_load(p->dit, lora, 1, &report) && report.applied == report.total);
    test_drawing(p, f, "lora_", false);
    sc_lora_unload(p->dit);
    test_drawing(p, f, "", false);
    sc_pipeline_close(p);
    sc_file_close(f);
}

/* ---- Stable Diffusion 3.5 ---- */

static sc_pipeline *open_sd3(void) {
    sc_pipeline *p = sc_pipeline_open(sc_cpu(), "test/reference/pipeline_sd3", NULL, NULL);
    if (!p) printf("%s\n", sc_error()), exit(1);
    return p;
}

/* CLIP's tokens, then T5's: [16 + 20, 32]; the pooled vectors of both CLIPs. */
static void test_sd3_texts(const sc_file *f) {
    sc_pipeline *p = open_sd3();
    const sc_tensor *contexts = find(f, "context"), *pools = find(f, "pooled");
    int64_t tokens = contexts->shape[1], width = contexts->shape[2], pooled = pools->shape[1],
            clip = tokens - (int64_t)((float *)find(f, "settings")->data)[4];
    double worst[3] = {0, 0, 0}; /* CLIP's part, T5's part, pooled */
    CHECK(p->text_tokens == tokens && contexts->shape[0] > 3);
    CHECK(p->dit->config.text_channels == width && p->dit->config.pooled_channels == pooled);
    for (int i = 0; i < contexts->shape[0]; i++) {
        const float *a = (const float *)contexts->data + i * tokens * width,
                    *b = (const float *)pools->data + i * pooled;
        sc_text text = sc_pipeline_text(p, prompt_of(f, i));
        if (!CHECKED(text.context != NULL)) printf("%s\n", sc_error()), exit(1);
        bool cut = i == 2 || i == 4;
        CHECK(text.cut == (cut ? 20 : 0) && text.pooled_cut == (cut ? 16 : 0));
        double errors[3] = {
            rel_error(text.context, a, clip * width),
            rel_error(text.context + clip * width, a + clip * width, (tokens - clip) * width),
            rel_error(text.pooled, b, pooled)};
        for (int k = 0; k < 3; k++) {
            CHECK(errors[k] < 1e-5);
            worst[k] = fmax(worst[k], errors[k]);
        }
        free(text.context);
    }
    printf("pipeline_sd3: largest error of CLIP's tokens %.1e, of T5's %.1e, of pooled %.1e\n",
           worst[0], worst[1], worst[2]);
    sc_pipeline_close(p);
}

static void test_sd3(void) {
    sc_file *f = open_reference("pipeline_sd3/reference");
    test_sd3_texts(f);
    sc_pipeline *p = open_sd3();
    test_drawing(p, f, "", false);
    test_drawing(p, f, "cfg_", true);
    sc_lora_report report;
    const char *lora = "test/reference/pipeline_sd3/lora.safetensors";
    CHECK(sc_lora_load(p->dit, lora, 1, &report) && report.applied == report.total);
    test_drawing(p, f, "lora_", true);
    sc_pipeline_close(p);
    sc_file_close(f);
}

/* ---- Configs that say something else than FLUX.1's ---- */

static char copy[64]; /* a folder of links to a pipeline's parts, less one that is a folder */

static const char *in_copy(const char *name) {
    static char path[2][200];
    static int turn;
    turn = !turn;
    snprintf(path[turn], sizeof path[turn], "%s/%s", copy, name);
    return path[turn];
}

/* `copy` becomes a pipeline whose `part`/`file` has this text, and all that is in the part's folder
 * but this file. */
static void copy_with(const char *pipeline, const char *part, const char *file, const char *text) {
    static const char *const parts[] = {
        "scheduler",      "text_encoder", "tokenizer",  "text_encoder_2", "tokenizer_2",
        "text_encoder_3", "tokenizer_3",  "transformer", "vae"};
    char from[512], here[200], name[400];
    CHECK(realpath(pipeline, from) && mkdir(copy, 0777) == 0);
    for (int i = 0; i < 9; i++) {
        snprintf(name, sizeof name, "%.300s/%s", from, parts[i]);
        if (strcmp(parts[i], part) && access(name, F_OK) == 0)
            CHECK(symlink(name, in_copy(parts[i])) == 0);
    }
    snprintf(here, sizeof here, "%s/%s", copy, part);
    snprintf(from + strlen(from), sizeof from - strlen(from), "/%s", part);
    CHECK(mkdir(here, 0777) == 0);
    DIR *list = opendir(from);
    for (struct dirent *entry; list && (entry = readdir(list));) {
        if (*entry->d_name == '.' || !strcmp(entry->d_name, file)) continue;
        char there[900];
        snprintf(there, sizeof there, "%s/%s", from, entry->d_name);
        snprintf(name, sizeof name, "%s/%.150s", here, entry->d_name);
        CHECK(symlink(there, name) == 0);
    }
    if (list) closedir(list);
    snprintf(name, sizeof name, "%s/%s", here, file);
    CHECK(sc_write_file(name, text, strlen(text)));
}

/* Links are removed, not what they point to. */
static void remove_copy(const char *path) {
    DIR *list = opendir(path);
    for (struct dirent *entry; list && (entry = readdir(list));) {
        char name[600];
        snprintf(name, sizeof name, "%s/%.250s", path, entry->d_name);
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") && remove(name))
            remove_copy(name);
    }
    if (list) closedir(list);
    remove(path);
}

/* The first latents of pipeline_b's first prompt with this scheduler, in f64: diffusers 0.35.2's
 * FluxPipeline, asked as make_pipeline.py does; exp(mu) as its calculate_shift has it. */
static void test_scheduler(void) {
    static const char config[] = "{\"use_dynamic_shifting\": true, \"base_shift\": 0.2, "
                                 "\"max_shift\": 2.5, \"base_image_seq_len\": 4, "
                                 "\"max_image_seq_len\": 36, \"shift_terminal\": null}";
    static const float expected[] = {20.30923342f, 9.80226171f,   6.58427430f,
                                     11.65657646f, -11.24088919f, -12.22389480f};
    const char *pipeline = "test/reference/pipeline_b";
    copy_with(pipeline, "scheduler", "scheduler_config.json", config);
    sc_file *f = open_reference("pipeline_b/reference");
    sc_pipeline *p = sc_pipeline_open(sc_cpu(), copy, NULL, NULL);
    if (!p) printf("%s\n", sc_error()), exit(1);
    const float *settings = find(f, "settings")->data;
    const sc_text text = {.context = find(f, "context")->data, .pooled = find(f, "pooled")->data};
    sc_sampling s = {.steps = (int)settings[0],
                     .guidance = settings[1],
                     .h = (int)settings[2],
                     .w = (int)settings[3],
                     .shift = sc_pipeline_shift(p, 10)};
    float latents[80];
    CHECK(sc_count(find(f, "noise")) == 80);
    memcpy(latents, find(f, "noise")->data, sizeof latents);
    CHECK_CLOSE(s.shift, 1.8799590599830809, 1e-6);
    CHECK(sc_sample(p->dit, p->tape, &s, 1, p->text_tokens, &text, latents));
    CHECK(rel_error(latents, expected, 6) < 1e-4);
    sc_recipe r = {.teacher_steps = 2, .shift = {9, 9}, .dynamic_shift_ratio = 1, .mu = p->mu};
    sc_rng rng = {1};
    sc_draw d;
    sc_draw_sample(&r, &rng, 10, false, &d);
    CHECK(d.shift == s.shift);
    sc_pipeline_close(p);
    sc_file_close(f);
    remove_copy(copy);
}

/* What would give other times, or is no number, is refused and named. */
static void test_bad_schedulers(void) {
    static const char *const bad[][2] = {
        {"\"shift_terminal\": 0.02", "shift_terminal"},
        {"\"use_karras_sigmas\": true", "use_karras_sigmas"},
        {"\"use_exponential_sigmas\": true", "use_exponential_sigmas"},
        {"\"use_beta_sigmas\": true", "use_beta_sigmas"},
        {"\"invert_sigmas\": true", "invert_sigmas"},
        {"\"stochastic_sampling\": true", "stochastic_sampling"},
        {"\"time_shift_type\": \"linear\"", "time_shift_type"},
        {"\"_class_name\": \"FlowMatchHeunDiscreteScheduler\"", "Heun"},
        {"\"base_shift\": \"0.5\"", "base_shift"},
        {"\"max_image_seq_len\": 256", "max_image_seq_len"},
        {"\"use_dynamic_shifting\": false, \"shift\": 0", "'shift'"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[200];
        snprintf(text, sizeof text, "{%s}", bad[i][0]);
        copy_with("test/reference/pipeline_b", "scheduler", "scheduler_config.json", text);
        sc_pipeline *p = sc_pipeline_open(sc_cpu(), copy, NULL, NULL);
        if (!CHECKED(!p && strstr(sc_error(), bad[i][1]))) printf("%s: %s\n", text, sc_error());
        CHECK(strstr(sc_error(), "scheduler_config.json") != NULL);
        sc_pipeline_close(p);
        remove_copy(copy);
    }
}

/* pipeline_a's encoders, whose CLIP has 16 positions, with a tokenizer that cuts at 9, and T5 asked
 * for one token. From transformers 4.57.1, the prompts padded and cut to these lengths. */
static void test_lengths(void) {
    static const float pooled_9[] = {0.83356899f, -1.56699490f, -0.61655849f, 1.06459606f},
                       context_1[] = {0.05930667f, -0.31571981f, 0.45006207f, 0.09219716f};
    static const char prompt[] = "the apple on the red apple on red, ?";
    copy_with("test/reference/pipeline_a", "tokenizer", "tokenizer_config.json",
              "{\"model_max_length\": 9}");
    sc_text_encoders *t = sc_text_encoders_open(sc_cpu(), copy, SC_FLUX);
    if (!t) printf("%s\n", sc_error()), exit(1);
    float context[20], pooled[24];
    int32_t ids[2];
    CHECK(sc_text_encode(t, prompt, 1, context, pooled));
    CHECK(rel_error(pooled, pooled_9, 4) < 1e-5);
    CHECK(rel_error(context, context_1, 4) < 1e-5);
    CHECK(sc_tokenize(t->t5.tokenizer, prompt, 1, ids) == 1 && ids[0] == 1);
    CHECK(sc_tokenize(t->t5.tokenizer, prompt, 0, ids) == -1);
    CHECK(sc_tokenize(t->clip.tokenizer, prompt, 2, ids) == 2 && ids[0] == 521 && ids[1] == 522);
    CHECK(sc_tokenize(t->clip.tokenizer, prompt, 1, ids) == -1 && strstr(sc_error(), "2 tokens"));
    sc_text_encoders_close(t);
    remove_copy(copy);
}

/* Added tokens that take white space beside them along, as a hundred of SD3.5's tokenizer_3 do. */
static void test_strip(void) {
    enum { LENGTH = 20 };
    static const char spaced[] = " a red \t</s> \n apple </s>", close[] = " a red</s>apple</s>";
    int32_t ids[4][LENGTH];
    size_t size;
    sc_tokenizer *plain = sc_tokenizer_open("data/tiny-flux/tokenizer_2");
    char *json = sc_read_file("data/tiny-flux/tokenizer_2/tokenizer.json", &size);
    if (!plain || !json) printf("%s\n", sc_error()), exit(1);
    for (char *c = json; (c = strstr(c, "strip\": false")); c++) memcpy(c, "strip\": true ", 13);
    copy_with("test/reference/pipeline_a", "tokenizer_2", "tokenizer.json", json);
    sc_tokenizer *t = sc_tokenizer_open(in_copy("tokenizer_2"));
    if (!CHECKED(t != NULL)) printf("%s\n", sc_error()), exit(1);
    CHECK(sc_tokenize(t, spaced, LENGTH, ids[0]) > 4 && sc_tokenize(t, close, LENGTH, ids[1]) > 4);
    CHECK(sc_tokenize(plain, spaced, LENGTH, ids[2]) > 4);
    CHECK(sc_tokenize(plain, close, LENGTH, ids[3]) > 4);
    CHECK(!memcmp(ids[0], ids[3], sizeof *ids) && !memcmp(ids[1], ids[3], sizeof *ids));
    CHECK(memcmp(ids[0], ids[2], sizeof *ids));
    sc_tokenizer_close(plain), sc_tokenizer_close(t);
    free(json);
    remove_copy(copy);
}

/* Of CLIP without added_tokens_decoder the padding is a token of its own, too (SDXL's tokenizer_2);
 * added_tokens.json is not read, and so refused. */
static void test_older_clip(void) {
    static const int32_t padded[] = {521, 0, 0, 522, 0};
    int32_t ids[5];
    copy_with("test/reference/pipeline_a", "tokenizer", "tokenizer_config.json",
              "{\"pad_token\": \"!\", \"model_max_length\": 9}");
    sc_tokenizer *t = sc_tokenizer_open(in_copy("tokenizer"));
    if (!CHECKED(t != NULL)) printf("%s\n", sc_error()), exit(1);
    CHECK(sc_tokenize(t, "!!", 5, ids) == 4 && !memcmp(ids, padded, sizeof ids));
    sc_tokenizer_close(t);
    CHECK(sc_write_file(in_copy("tokenizer/added_tokens.json"), "{\"<sks>\": 523}", 14));
    CHECK(!sc_tokenizer_open(in_copy("tokenizer")) && strstr(sc_error(), "added_tokens.json"));
    remove_copy(copy);
}

/* A Stable Diffusion 3.5 that lacks a part of its three text encoders. */
static void test_bad_sd3(void) {
    static const char *const bad[][3] = {
        {"text_encoder", "config.json", "text_encoder"},
        {"text_encoder_2", "config.json", "text_encoder_2"},
        {"text_encoder_3", "model.safetensors", "text_encoder_3"},
        {"tokenizer_2", "vocab.json", "tokenizer_2"},
        {"tokenizer_3", "tokenizer.json", "tokenizer_3"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        copy_with("test/reference/pipeline_sd3", bad[i][0], bad[i][1], "");
        char name[300];
        snprintf(name, sizeof name, "%s/%s", in_copy(bad[i][0]), bad[i][1]);
        remove(name);
        sc_pipeline *p = sc_pipeline_open(sc_cpu(), copy, NULL, NULL);
        sc_text text = p ? sc_pipeline_text(p, "a") : (sc_text){0};
        if (!CHECKED(!text.context && strstr(sc_error(), bad[i][2])))
            printf("without %s/%s: %s\n", bad[i][0], bad[i][1], sc_error());
        free(text.context);
        sc_pipeline_close(p);
        remove_copy(copy);
    }
}

int main(void) {
    snprintf(copy, sizeof copy, "build/test-copy-%ld", (long)getpid());
    test_tokenizers();
    test_encoders("data/tiny-flux", "text_tiny");
    test_mismatch();
    test_pipeline("pipeline_a"), test_pipeline("pipeline_b");
    test_lengths(), test_strip(), test_older_clip(), test_scheduler(), test_bad_schedulers();
    test_sd3(), test_bad_sd3();
    replay(TEST_DIR "/corpus/tokenizer", LLVMFuzzerTestOneInput);
    return test_report();
}
