/* Fuzzes the JSON reader: no input may crash it, every refusal is one line with a line number, and
 * what is accepted, written out and read again is the same.
 *
 *   make fuzz
 *
 * test_files.c includes this file to replay the corpus. */
#include "fuzz.h"

/* `v` as JSON without white space; -0 keeps its sign, %.17g its bits. */
static void json_write(FILE *f, const sc_json *v) {
    bool object = v->type == SC__OBJECT;
    switch (v->type) {
    case SC__NULL: fputs("null", f); break;
    case SC__BOOL: fputs(sc_json_bool(v, false) ? "true" : "false", f); break;
    case SC__STRING: sc__write_quoted(f, sc_json_string(v, NULL)); break;
    case SC__NUMBER: fprintf(f, "%.17g", sc_json_number(v, NAN)); break;
    case SC__ARRAY:
    case SC__OBJECT:
        fputc(object ? '{' : '[', f);
        for (int64_t i = 0; i < sc_json_length(v); i++) {
            if (i) fputc(',', f);
            if (object) {
                sc__write_quoted(f, sc_json_key(v, i));
                fputc(':', f);
            }
            json_write(f, object ? sc_json_value(v, i) : sc_json_at(v, i));
        }
        fputc(object ? '}' : ']', f);
    }
}

/* The same in memory; freed by the caller. */
static char *json_text(const sc_json *v, size_t *length) {
    char *text = NULL;
    FILE *f = open_memstream(&text, length);
    MUST(f);
    json_write(f, v);
    MUST(!fclose(f));
    return text;
}

/* Each key is found, and the last of equal ones. */
static void json_check_lookup(const sc_json *v) {
    for (int64_t i = 0; i < sc_json_length(v); i++) {
        const sc_json *item = v->type == SC__OBJECT ? sc_json_value(v, i) : sc_json_at(v, i);
        if (v->type == SC__OBJECT) {
            const sc_json *found = sc_json_get(v, sc_json_key(v, i));
            MUST(found >= item && !strcmp(found->key, item->key));
            if (i == sc_json_length(v) - 1) MUST(found == item);
        }
        json_check_lookup(item);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *first = NULL, *second = NULL;
    size_t first_length, second_length;
    char *text = (char *)malloc(size ? size : 1); /* exactly, so that reading on is noticed */
    MUST(text);
    if (size) memcpy(text, data, size);
    sc_json *root = sc_json_parse(text, size, "fuzz.json");
    free(text);
    if (root) {
        json_check_lookup(root);
        first = json_text(root, &first_length);
        sc_json_free(root);
        root = sc_json_parse(first, first_length, "fuzz.json");
        MUST(root);
        second = json_text(root, &second_length);
        MUST(first_length == second_length && !memcmp(first, second, first_length));
    } else MUST(!strncmp(sc_error(), "fuzz.json:", 10) && !strpbrk(sc_error(), "\r\n"));
    sc_json_free(root);
    free(first);
    free(second);
    return 0;
}
