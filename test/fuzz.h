/* What the fuzzers share. The tests include them, after test.h, to replay what was found. */
#ifndef FUZZ_H
#define FUZZ_H
#ifndef SHORTCUT_H
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#endif

/* What must hold, sanitizers or not. */
#define MUST(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), abort(); \
    } while (0)

#ifdef TEST_H
#include <dirent.h>

/* Every file of the corpus, which must be there. */
static void replay(const char *corpus, int (*entry)(const uint8_t *, size_t)) {
    DIR *list = opendir(corpus);
    int files = 0;
    for (struct dirent *e; list && (e = readdir(list));) {
        char path[512];
        size_t size = 0;
        if (*e->d_name == '.') continue;
        snprintf(path, sizeof path, "%s/%s", corpus, e->d_name);
        char *data = sc_read_file(path, &size);
        if (data) files += entry((const uint8_t *)data, size) == 0;
        SC_FREE(data);
    }
    if (list) closedir(list);
    CHECK(files > 10);
    printf("%s: %d inputs\n", corpus, files);
}
#endif
#endif
