/* Stable Diffusion 3.5's transformer against diffusers' (test/reference/make_sd3.py): velocities,
 * gradients of all weights and of LoRAs, LoRA files, the SCFM target, a sample; and what does not
 * fit. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "dit.h"

/* ---- LoRA files ---- */

/* The official recipe leaves these layers alone: no LoRA of ours has them. */
static void test_untrained(const char *name) {
    fixture f = open_fixture(name);
    const char *path = "build/test-sd3-lora.safetensors";
    char other[128];
    sc_params *p = sc_params_lora(f.dit, f.rank, 1, 1);
    CHECK(sc_lora_save(p, SC_STUDENT, path, NULL));
    sc_file *file = sc_file_open(path);
    int untrained = 0;
    for (int64_t i = 0; i < sc_file_count(file); i++) {
        const char *key = sc_file_name(file, i);
        untrained += strstr(key, "attn2") || strstr(key, "ff_context") ||
                     strstr(key, "norm1_context");
    }
    CHECK(sc_file_count(file) == f.factors);
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
    snprintf(path, sizeof path, "test/reference/%s/lora.safetensors", name);
    if (!CHECKED(sc_lora_load(f.dit, path, 1, &report))) printf("%s\n", sc_error());
    CHECK(report.applied == f.dit->module_count && report.total == report.applied);
    double error = rel_error(run(&f, NULL, NULL), velocity, f.n);
    printf("%s: error of the velocity with a LoRA on all of %d layers %.1e\n", name,
           f.dit->module_count, error);
    CHECK(error < 1e-5);
    if (!CHECKED(sc_dit_save(f.dit, merged, SC_F32, NULL))) printf("%s\n", sc_error());
    sc_lora_unload(f.dit);
    CHECK(rel_error(run(&f, NULL, NULL), base, f.n) < 1e-5);
    sc_dit_close(f.dit);
    f.dit = sc_dit_open(sc_cpu(), merged, NULL);
    if (!CHECKED(f.dit != NULL)) printf("%s\n", sc_error()), exit(1);
    CHECK(rel_error(run(&f, NULL, NULL), velocity, f.n) < 1e-5);
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
    size_t size = 0;
    char *text = sc_read_file("test/reference/sd3_a/config.json", &size);
    char *at = text ? strstr(text, from) : NULL, *other = malloc(size + strlen(to) + 1);
    if (!at) printf("config.json has no '%s'\n", from), exit(1);
    sprintf(other, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    sc_dit *dit = open_with_config("sd3_a", other);
    if (!CHECKED(!dit && strstr(sc_error(), said)))
        printf("%s for %s: %s\n", to, from, dit ? "is opened" : sc_error());
    else printf("%s\n", sc_error());
    sc_dit_close(dit);
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
        test_full(names[i], SC_SD3);
        test_lora(names[i]);
        test_untrained(names[i]);
        test_lora_file(names[i]);
        test_target(names[i], "target", false, false, NULL);
        test_target(names[i], "cfg_target", true, true, NULL);
        test_cfg_sample(names[i], 5e-5);
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
