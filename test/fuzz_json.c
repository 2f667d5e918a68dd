/* Fuzzes the JSON reader: no input may crash it, every refusal is one line with a line number, and
 * what is accepted, written out and read again is the same.
 *
 *   make fuzz
 *
 * test_files.c includes this file to replay the corpus. */
#include "fuzz.h"

/* `v` as JSON without white space; -0 keeps its sign, %.17g its bits. */
static void json_write(sc__text *t, const sc_json *v) {
    char number[32];
    bool object = v->type == SC__OBJECT;
    switch (v->type) {
    case SC__NULL: sc__text_add(t, "null", 4); break;
    case SC__BOOL:
        sc__text_add(t, sc_json_bool(v, false) ? "true" : "false", sc_json_bool(v, false) ? 4 : 5);
        break;
    case SC__STRING: sc__text_quote(t, sc_json_string(v, NULL)); break;
    case SC__NUMBER:
        sc__text_add(t, number,
                     (size_t)snprintf(number, sizeof number, "%.17g", sc_json_number(v, NAN)));
        break;
    case SC__ARRAY:
    case SC__OBJECT:
        sc__text_add(t, object ? "{" : "[", 1);
        for (int64_t i = 0; i < sc_json_length(v); i++) {
            if (i) sc__text_add(t, ",", 1);
            if (object) {
                sc__text_quote(t, sc_json_key(v, i));
                sc__text_add(t, ":", 1);
            }
            json_write(t, object ? sc_json_value(v, i) : sc_json_at(v, i));
        }
        sc__text_add(t, object ? "}" : "]", 1);
    }
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
    sc__text first = {0}, second = {0};
    char *text = (char *)malloc(size ? size : 1); /* exactly, so that reading on is noticed */
    MUST(text);
    if (size) memcpy(text, data, size);
    sc_json *root = sc_json_parse(text, size, "fuzz.json");
    free(text);
    if (root) {
        json_check_lookup(root);
        json_write(&first, root);
        sc_json_free(root);
        root = sc_json_parse(first.data, first.length, "fuzz.json");
        MUST(root);
        json_write(&second, root);
        MUST(first.length == second.length && !memcmp(first.data, second.data, first.length));
    } else MUST(!strncmp(sc_error(), "fuzz.json:", 10) && !strpbrk(sc_error(), "\r\n"));
    sc_json_free(root);
    SC_FREE(first.data);
    SC_FREE(second.data);
    return 0;
}
