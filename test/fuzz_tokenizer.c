/* Fuzzes the tokenizers: no files and no text may crash them, every refusal is one line, and ids
 * are ones that the vocabulary has. An input is a tokenizer's files and a text, with the byte 1
 * between them:
 *   TEXT                                      for both tokenizers of data/tiny-flux
 *   tokenizer_config.json 1 tokenizer.json 1 TEXT                   T5
 *   tokenizer_config.json 1 vocab.json 1 merges.txt 1 TEXT          CLIP
 *
 *   make fuzz
 *
 * test_pipeline.c includes this file to replay the corpus. */
#include "fuzz.h"

enum { FUZZ_PARTS = 4, FUZZ_IDS = 40 };
static char fuzz_folder[64]; /* the files of the tokenizer being read, in memory where possible */

static void fuzz_clean_up(void) {
    static const char *const names[] = {"tokenizer_config.json", "tokenizer.json", "vocab.json",
                                        "merges.txt"};
    char path[128];
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/%s", fuzz_folder, names[i]);
        unlink(path);
    }
}

static void fuzz_remove_folder(void) { fuzz_clean_up(), rmdir(fuzz_folder); }

static void fuzz_write(const char *name, const char *text, size_t size) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", fuzz_folder, name);
    FILE *f = fopen(path, "wb");
    MUST(f && fwrite(text, 1, size, f) == size);
    MUST(!fclose(f));
}

/* At several lengths; a shorter result is the beginning of a longer one, but for its end. */
static void fuzz_text(const sc_tokenizer *t, const char *text) {
    static const int lengths[] = {2, 7, FUZZ_IDS};
    int32_t ids[FUZZ_IDS], before[FUZZ_IDS];
    int count = 0;
    for (int i = 0; i < 3; i++) {
        int n = sc_tokenize(t, text, lengths[i], ids);
        MUST(n >= count && n <= lengths[i]);
        for (int k = 0; k < lengths[i]; k++) MUST(ids[k] >= 0 && ids[k] <= t->largest);
        MUST(count < 2 || !memcmp(ids, before, (size_t)(count - 1) * sizeof *ids));
        memcpy(before, ids, sizeof ids);
        count = n;
    }
}

static void fuzz_shipped(const char *text) {
    static sc_tokenizer *shipped[2];
    for (int i = 0; i < 2; i++) {
        if (!shipped[i])
            shipped[i] =
                sc_tokenizer_open(i ? "data/tiny-flux/tokenizer_2" : "data/tiny-flux/tokenizer");
        if (shipped[i]) fuzz_text(shipped[i], text);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const names[2][3] = {{"tokenizer_config.json", "tokenizer.json", ""},
                                            {"tokenizer_config.json", "vocab.json", "merges.txt"}};
    char *text = (char *)calloc(size + 1, 1), *part[FUZZ_PARTS] = {text};
    size_t length[FUZZ_PARTS] = {0};
    int parts = 0;
    MUST(text);
    for (size_t i = 0; i < size; i++) {
        if (data[i] == 1 && parts + 1 < FUZZ_PARTS) part[++parts] = text + i + 1;
        else text[i] = (char)data[i], length[parts]++;
    }
    if (!*fuzz_folder) {
        strcpy(fuzz_folder, access("/dev/shm", W_OK) ? "/tmp/fuzz_XXXXXX" : "/dev/shm/fuzz_XXXXXX");
        MUST(mkdtemp(fuzz_folder));
        atexit(fuzz_remove_folder);
    }
    for (int i = 0; i < parts && parts > 1; i++)
        fuzz_write(names[parts == 3][i], part[i], length[i]);
    sc_tokenizer *t = parts > 1 ? sc_tokenizer_open(fuzz_folder) : NULL;
    if (t) fuzz_text(t, part[parts]);
    else if (parts > 1) MUST(strcmp(sc_error(), "no error") && !strpbrk(sc_error(), "\r\n"));
    else fuzz_shipped(text);
    sc_tokenizer_close(t);
    if (parts > 1) fuzz_clean_up();
    free(text);
    return 0;
}
