/* decode PICTURE...: each as the programs read it: "WIDTH HEIGHT\n" and its pixels, 3 bytes each;
 * or "refused: why\n". */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "../tools.h"

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        sc_picture p;
        if (!sc_picture_load(&p, argv[i])) {
            printf("refused: %s\n", sc_error());
            continue;
        }
        size_t n = (size_t)p.width * (size_t)p.height;
        uint8_t *pixels = (uint8_t *)sc__alloc(n, 3);
        if (!pixels) return sc_die();
        sc_picture_to_pixels(&p, pixels);
        printf("%d %d\n", p.width, p.height);
        fwrite(pixels, 3, n, stdout);
        sc_picture_free(&p);
        free(pixels);
    }
    return 0;
}
