/* encode MODEL TOKENS OUT < TEXTS: what the text encoders make of texts, each of which ends in NUL:
 * context.<i> [tokens, channels] and pooled.<i> in OUT. TOKENS 0: as the whole pipeline MODEL. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"

int main(int argc, char **argv) {
    enum { MOST = 256 };
    static sc_named named[2 * MOST];
    static char names[2 * MOST][32];
    char *text = NULL;
    size_t room = 0;
    int length = argc == 4 ? atoi(argv[2]) : -1, count = 0;
    sc_pipeline *p =
        length ? NULL : sc_pipeline_open(sc_cpu(), argv[1], NULL, NULL);
    sc_text_encoders *t = length > 0 ? sc_text_encoders_open(sc_cpu(), argv[1], SC_FLUX) : NULL;
    if (!t && !p) return fprintf(stderr, "%s\n", sc_error()), 1;
    while (count < 2 * MOST && getdelim(&text, &room, 0, stdin) > 0) {
        int64_t widths[2];
        widths[0] = p ? (int64_t)p->text_tokens * sc_dit_config_of(p->dit)->text_channels
                      : (int64_t)length * t->t5.width;
        widths[1] = p ? sc_dit_config_of(p->dit)->pooled_channels : t->clip.width;
        for (int k = 0; k < 2; k++) {
            sc_tensor x = {.ndim = 1, .shape = {widths[k]}};
            x.data = sc__alloc((size_t)widths[k], 4);
            snprintf(names[count + k], sizeof *names, "%s.%d", k ? "pooled" : "context", count / 2);
            named[count + k] = (sc_named){names[count + k], x, SC_F32};
        }
        float *context = named[count].tensor.data, *pooled = named[count + 1].tensor.data;
        sc_text made = p ? sc_pipeline_text(p, text) : (sc_text){0};
        if (made.context) {
            memcpy(context, made.context, (size_t)widths[0] * 4);
            memcpy(pooled, made.pooled, (size_t)widths[1] * 4);
        } else if (p || !sc_text_encode(t, text, length, context, pooled))
            return fprintf(stderr, "%s\n", sc_error()), 1;
        count += 2;
    }
    return sc_file_save(argv[3], named, count, NULL) ? 0 : (fprintf(stderr, "%s\n", sc_error()), 1);
}
