/* vae_at_size VAE SIDE MIB OUT: encodes a picture of SIDE x SIDE pixels drawn from a seed, and
 * decodes latents drawn from another, with at most MIB of activations (0: no limit). Writes
 * `picture`, `mean`, `latents` and `decoded` to OUT; prints the seconds and the memory of both. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include <time.h>

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* The most memory that this process had in use, in MiB. */
static long peak_memory(void) {
    FILE *status = fopen("/proc/self/status", "r");
    char line[256];
    long kib = 0;
    while (status && fgets(line, sizeof line, status)) sscanf(line, "VmHWM: %ld", &kib);
    if (status) fclose(status);
    return kib >> 10;
}

int main(int argc, char **argv) {
    int64_t side = argc == 5 ? atoi(argv[2]) : 0;
    size_t memory = argc == 5 ? (size_t)atoi(argv[3]) << 20 : 0;
    sc_vae *v = side > 0 ? sc_vae_open(sc_cpu(), argv[1], true) : NULL;
    if (!v) return fprintf(stderr, "usage: vae_at_size VAE SIDE MIB OUT; %s\n", sc_error()), 1;
    int64_t f = sc_vae_factor(v), c = sc_vae_config_of(v)->latent_channels, h = side / f;
    int64_t pixels = 3 * side * side, n = c * h * h;
    float *picture = (float *)sc__alloc((size_t)(2 * pixels + 3 * n), sizeof *picture);
    if (!picture) return fprintf(stderr, "%s\n", sc_error()), 1;
    float *decoded = picture + pixels, *latents = decoded + pixels, *mean = latents + n;
    for (int64_t i = 0; i < pixels; i++) /* something smooth */
        picture[i] = sinf((float)(i % side) * 0.021f) * cosf((float)(i / side % side) * 0.013f);
    sc_normal(&(sc_rng){1}, latents, n);
    double start = seconds();
    bool ok = sc_vae_encode(v, 1, side, side, picture, mean, memory);
    double middle = seconds();
    size_t peak = v->peak;
    v->peak = 0;
    ok = ok && sc_vae_decode(v, 1, h, h, latents, decoded, memory);
    double end = seconds();
    printf("%lld pixels, limit %zu MiB: encode %.1f s, %zu MiB; decode %.1f s, %zu MiB; "
           "peak of the process %ld MiB\n",
           (long long)side, memory >> 20, middle - start, peak >> 20, end - middle, v->peak >> 20,
           peak_memory());
    sc_tensor x[] = {{.data = picture, .ndim = 4, .shape = {1, 3, side, side}},
                     {.data = mean, .ndim = 4, .shape = {1, c, h, h}},
                     {.data = latents, .ndim = 4, .shape = {1, c, h, h}},
                     {.data = decoded, .ndim = 4, .shape = {1, 3, side, side}}};
    const sc_named named[] = {{"picture", x[0], SC_F32},
                              {"mean", x[1], SC_F32},
                              {"latents", x[2], SC_F32},
                              {"decoded", x[3], SC_F32}};
    ok = ok && sc_file_save(argv[4], named, 4, NULL);
    sc_vae_close(v);
    free(picture);
    return ok ? 0 : (fprintf(stderr, "%s\n", sc_error()), 1);
}
