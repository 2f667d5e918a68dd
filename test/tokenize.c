/* tokenize FOLDER LENGTH < TEXTS: ids of the texts, each of which ends in NUL, one line for each.
 */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"

int main(int argc, char **argv) {
    char *text = NULL;
    size_t room = 0;
    int length = argc == 3 ? atoi(argv[2]) : 0;
    sc_tokenizer *t = length > 0 ? sc_tokenizer_open(argv[1]) : NULL;
    int32_t *ids = (int32_t *)sc__alloc((size_t)(length > 0 ? length : 1), sizeof *ids);
    if (!t || !ids) return fprintf(stderr, "%s\n", sc_error()), 1;
    while (getdelim(&text, &room, 0, stdin) > 0) {
        if (sc_tokenize(t, text, length, ids) < 0)
            return fprintf(stderr, "%s\n", sc_error()), 1;
        for (int i = 0; i < length; i++) printf("%d%c", ids[i], i + 1 < length ? ' ' : '\n');
    }
    sc_tokenizer_close(t);
    free(text);
    free(ids);
    return 0;
}
