/* JSON and safetensors: what is right, every kind of bad input, writing that fails half way, and
 * the fuzzers' corpus. Files are made here, in a temporary folder. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#define SC_CALLOC some_calloc
#define SC_REALLOC some_realloc
#define SC_FREE free
#include <stdlib.h>
static int allocations_left = -1; /* memory is out at 0, never at -1 */
static int allocate(void) { return allocations_left > 0 ? allocations_left-- : allocations_left; }
static void *some_calloc(size_t n, size_t size) { return allocate() ? calloc(n, size) : NULL; }
static void *some_realloc(void *p, size_t size) { return allocate() ? realloc(p, size) : NULL; }
#include "../shortcut.h"
#include "test.h"
#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

#define LLVMFuzzerTestOneInput fuzz_json
#include "fuzz_json.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_safetensors
#include "fuzz_safetensors.c"
#undef LLVMFuzzerTestOneInput

static char folder[] = "/tmp/test_files_XXXXXX";

/* A path in the temporary folder; valid until the fourth call after this one. */
static const char *in_folder(const char *name) {
    static char paths[4][512];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static void write_raw(const char *path, const void *data, size_t n) {
    FILE *f = fopen(path, "wb");
    MUST(f && fwrite(data, 1, n, f) == n);
    fclose(f);
}

/* Refused with `message` in its one line? */
static void check_message(bool refused, const char *what, const char *message) {
    bool right = refused && strstr(sc_error(), message) && !strchr(sc_error(), '\n');
    CHECK(right);
    if (!right)
        printf("  %s: expected '%s', got '%s'\n", what, message, refused ? sc_error() : "no error");
}

/* ---- JSON ---- */

static void test_json_values(void) {
    static const char *const cases[][2] = {
        {" true\n", "true"},
        {"null", "null"},
        {"[]", "[]"},
        {"{}", "{}"},
        {"-0", "-0"},
        {"0.5", "0.5"},
        {"-12.5e-3", "-0.012500000000000001"},
        {"1E+2", "100"},
        {"5e-324", "4.9406564584124654e-324"},
        {"1e-400", "0"},
        {"123456789012345678901234567890", "1.2345678901234568e+29"},
        {"0.1", "0.10000000000000001"},
        {"1.7976931348623157e308", "1.7976931348623157e+308"},
        {"[1, [2,\t[]], {}, \"x\", false]", "[1,[2,[]],{},\"x\",false]"},
        {"{\"b\": 1, \"a\": {\"c\": [true]}, \"\": 0}", "{\"b\":1,\"a\":{\"c\":[true]},\"\":0}"},
        {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\\"\\\\/\\u0008\\u000c\\u000a\\u000d\\u0009\""},
        {"\"\\u0041\\u00e9\\u20AC\\ud83d\\ude00\"", "\"A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\""},
        {"\"\\ud83d \\ude00 \\ud83d\\u0041 \\u0000\"", /* lone halves, NUL */
         "\"\xef\xbf\xbd \xef\xbf\xbd \xef\xbf\xbd"
         "A \xef\xbf\xbd\""},
        {"\"\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xf0\x90\x80\x80\xf4\x8f\xbf"
         "\xbf\"",
         "\"\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xf0\x90\x80\x80\xf4\x8f\xbf"
         "\xbf\""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t length;
        sc_json *root = sc_json_parse(cases[i][0], strlen(cases[i][0]), "test.json");
        char *text = root ? json_text(root, &length) : NULL;
        if (!CHECKED(text && !strcmp(text, cases[i][1])))
            printf("  %s: %s\n", cases[i][0], text ? text : sc_error());
        free(text);
        sc_json_free(root);
    }
}

static void test_json_refused(void) {
    static const char *const cases[][2] = {
        {"", ":1: expected a value"},
        {"  \n\n ", ":3: expected a value"},
        {"nul", "expected a value"},
        {"+1", "expected a value"},
        {".5", "expected a value"},
        {"NaN", "expected a value"},
        {"Infinity", "expected a value"},
        {"'a'", "expected a value"},
        {"\xef\xbb\xbf{}", "expected a value"},
        {"01", "malformed number"},
        {"-", "malformed number"},
        {"1.", "malformed number"},
        {"1e", "malformed number"},
        {"1e+", "malformed number"},
        {"-.5", "malformed number"},
        {"1e999", "number out of range"},
        {"-1e309", "number out of range"},
        {"0x10", "unexpected text"},
        {"1 2", "unexpected text"},
        {"{}\n\n}", ":3: unexpected text behind the value"},
        {"true false", "unexpected text"},
        {"[1,]", "expected a value"},
        {"[,1]", "expected a value"},
        {"[1\n2]", ":2: expected ',' or ']'"},
        {"[1", "expected ',' or ']'"},
        {"[", "expected a value"},
        {"[}", "expected a value"},
        {"{\"a\":1\n,\n\"b\":2]", ":3: expected ',' or '}'"},
        {"{\"a\":1,}", "expected a key in quotes"},
        {"{a:1}", "expected a key in quotes"},
        {"{1:1}", "expected a key"},
        {"{", "expected a key"},
        {"{\"a\"}", "expected ':'"},
        {"{\"a\" 1}", "expected ':'"},
        {"{\"a\":}", "expected a value"},
        {"\"abc", "string without an end"},
        {"\"abc\\\"", "string without an end"},
        {"\"a\nb\"", "control character"},
        {"\"\x1f\"", "control character"},
        {"\"\\x\"", "unknown escape"},
        {"\"\\", "unknown escape"},
        {"\"\\u12\"", "four hexadecimal"},
        {"\"\\u\"", "four hexadecimal"},
        {"\"\\u00g0\"", "four hexadecimal"},
        {"\"\x80\"", "not UTF-8"},
        {"\"\xc0\x80\"", "not UTF-8"},
        {"\"\xc3\"", "not UTF-8"},
        {"\"\xe0\x9f\xbf\"", "not UTF-8"},
        {"\"\xed\xa0\x80\"", "not UTF-8"},
        {"\"\xe2\x82\"", "not UTF-8"},
        {"\"\xf0\x8f\xbf\xbf\"", "not UTF-8"},
        {"\"\xf4\x90\x80\x80\"", "not UTF-8"},
        {"\"\xf5\"", "not UTF-8"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sc_json *root = sc_json_parse(cases[i][0], strlen(cases[i][0]), "test.json");
        check_message(!root, cases[i][0], cases[i][1]);
        sc_json_free(root);
    }
    sc_json *root = sc_json_parse("[1]\0", 4, "nul.json"),
            *inside = sc_json_parse("\"a\0b\"", 5, "nul.json");
    CHECK(!root && !inside);
    sc_json_free(root);
    sc_json_free(inside);
}

static void test_json_depth(void) {
    static const int depths[] = {64, 65, 1000000};
    char *text = (char *)malloc(2000000);
    for (int i = 0; i < 3; i++) {
        size_t n = (size_t)depths[i];
        memset(text, '[', n);
        memset(text + n, ']', n);
        sc_json *root = sc_json_parse(text, 2 * n, "deep.json");
        if (i == 0) CHECK(root != NULL);
        else check_message(!root, "deep", "deep.json:1: nested deeper than 64");
        sc_json_free(root);
    }
    for (int i = 0; i < 100; i++) memcpy(text + 3 * i, i ? ",[]" : "[[]", 3); /* wide is not deep */
    text[300] = ']';
    sc_json *wide = sc_json_parse(text, 301, "wide.json");
    CHECK(sc_json_length(wide) == 100);
    sc_json_free(wide);
    free(text);
}

/* Any double printed with 17 digits comes back as it was. */
static void test_json_numbers(void) {
    sc_rng rng = {1};
    int wrong = 0;
    for (int i = 0; i < 20000; i++) {
        uint64_t bits = sc_random_bits(&rng);
        double x, y;
        char text[64];
        memcpy(&x, &bits, 8);
        if (!isfinite(x)) continue;
        int n = snprintf(text, sizeof text, i % 2 ? "%.17g" : "%.16e", x);
        sc_json *root = sc_json_parse(text, (size_t)n, "number.json");
        y = sc_json_number(root, NAN);
        wrong += memcmp(&x, &y, 8) != 0;
        sc_json_free(root);
    }
    CHECK(wrong == 0);
    char *digits = (char *)malloc(100000);
    memset(digits, '1', 100000);
    sc_json *root = sc_json_parse(digits, 400, "digits.json");
    check_message(!root, "400 digits", "number out of range");
    sc_json_free(root);
    root = sc_json_parse(digits, 100000, "digits.json");
    check_message(!root, "100000 digits", "too many digits");
    sc_json_free(root);
    free(digits);
}

/* As many keys as a vocabulary has; the last of equal ones counts, in file order for the index. */
static void test_json_lookup(void) {
    enum { KEYS = 50000 };
    char *text, key[32];
    size_t length;
    FILE *f = open_memstream(&text, &length);
    for (int i = 0; i < KEYS; i++)
        fprintf(f, "%c\"key%d\":%d\n", i ? ',' : '{', i * 7919 % KEYS, i);
    fputs(",\"key5\":-1}", f);
    fclose(f);
    sc_json *root = sc_json_parse(text, length, "vocab.json");
    CHECK(root && sc_json_length(root) == KEYS + 1);
    int wrong = 0;
    for (int i = 0; i < KEYS; i++) {
        snprintf(key, sizeof key, "key%d", i * 7919 % KEYS);
        double expected = strcmp(key, "key5") ? i : -1;
        wrong += sc_json_number(sc_json_get(root, key), -2) != expected ||
                 strcmp(sc_json_key(root, i), key) != 0;
    }
    CHECK(wrong == 0 && !sc_json_get(root, "key") && !sc_json_get(root, "") &&
          !sc_json_get(root, "zzz"));
    sc_json_free(root);
    free(text);
}

static void test_json_access(void) {
    static const char text[] =
        "{\"n\": 2.5, \"s\": \"x\", \"b\": true, \"a\": [1, 2], \"o\": {\"k\": null}}";
    sc_json *root = sc_json_parse(text, sizeof text - 1, "access.json");
    const sc_json *n = sc_json_get(root, "n"), *s = sc_json_get(root, "s"),
                  *a = sc_json_get(root, "a");
    CHECK(sc_json_number(n, 0) == 2.5 && !strcmp(sc_json_string(s, ""), "x"));
    CHECK(sc_json_bool(sc_json_get(root, "b"), false) && sc_json_length(a) == 2 &&
          sc_json_length(root) == 5);
    CHECK(sc_json_number(sc_json_at(a, 1), 0) == 2 && !sc_json_at(a, 2) && !sc_json_at(a, -1));
    CHECK(!strcmp(sc_json_key(root, 3), "a") && sc_json_value(root, 3) == a &&
          !sc_json_key(root, 5));
    CHECK(sc_json_get(sc_json_get(root, "o"), "k") && !sc_json_key(a, 0) && !sc_json_value(a, 0) &&
          !sc_json_at(root, 0));
    /* NULL and other types give the fallback */
    CHECK(sc_json_number(s, 7) == 7 && sc_json_number(NULL, 7) == 7 && sc_json_bool(n, true) &&
          !sc_json_bool(NULL, false));
    CHECK(!sc_json_string(n, NULL) && !strcmp(sc_json_string(NULL, "d"), "d") &&
          sc_json_length(n) == 0);
    CHECK(!sc_json_get(NULL, "x") && !sc_json_get(a, "x") && !sc_json_at(NULL, 0) &&
          !sc_json_key(NULL, 0));
    CHECK(!sc_json_value(NULL, 0) && sc_json_length(NULL) == 0 && sc_json_length(s) == 0);
    sc_json_free(root);
    sc_json_free(NULL);
}

static void test_json_files(void) {
    write_raw(in_folder("good.json"), "{\"a\": 1}\n", 9);
    sc_json *root = sc_json_load(in_folder("good.json"));
    CHECK(sc_json_number(sc_json_get(root, "a"), 0) == 1);
    sc_json_free(root);
    write_raw(in_folder("bad.json"), "{\"a\": 1\n\"b\": 2}\n", 16);
    check_message(!sc_json_load(in_folder("bad.json")), "bad.json",
                  "bad.json:2: expected ',' or '}'");
    check_message(!sc_json_load(in_folder("none.json")), "none", "none.json: No such file");
    check_message(!sc_json_load(folder), "a folder", "is a folder");
    CHECK(!mkfifo(in_folder("pipe"), 0600));
    check_message(!sc_json_load(in_folder("pipe")), "a pipe", "not a regular file");
    check_message(!sc_file_open(in_folder("pipe")), "a pipe", "not a regular file");
    write_raw(in_folder("huge.json"), "", 0);
    CHECK(!truncate(in_folder("huge.json"), ((off_t)1 << 30) + 1)); /* sparse */
    check_message(!sc_json_load(in_folder("huge.json")), "huge", "larger than 1 GiB");
    unlink(in_folder("huge.json"));
}

/* ---- Reading safetensors ---- */

/* Writes header (its length before it, padded to 8) and `size` bytes of data. */
static const char *write_safetensors(const char *name, const char *header, size_t size) {
    size_t length = (strlen(header) + 7) / 8 * 8;
    unsigned char *file = (unsigned char *)calloc(1, 8 + length + size);
    for (int i = 0; i < 8; i++) file[i] = (unsigned char)((uint64_t)length >> (8 * i));
    memset(file + 8, ' ', length);
    memcpy(file + 8, header, strlen(header));
    for (size_t i = 0; i < size; i++) file[8 + length + i] = (unsigned char)i;
    write_raw(in_folder(name), file, 8 + length + size);
    free(file);
    return in_folder(name);
}

#define TENSOR(name, dtype, shape, begin, end)                                                     \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end \
    "]}"

static void test_headers(void) {
    static const struct {
        const char *header;
        size_t size;
        const char *message;
    } cases[] = {
        {"{}", 0, NULL},
        {"{\"__metadata__\":{\"a\":\"b\"}}", 0, NULL},
        {"{" TENSOR("a", "F32", "[2]", 0, 8) "," TENSOR("b", "F32", "[]", 8, 12) "}", 12, NULL},
        {"{" TENSOR("b", "U8", "[3]", 8, 11) "," TENSOR("a", "F32", "[2]", 0, 8) "}", 11, NULL},
        {"{" TENSOR("a", "F32", "[0,4]", 0, 0) "," TENSOR(
             "b", "BF16", "[1,1,1,1,2]", 0, 4) "," TENSOR("c", "F64", "[0]", 4, 4) "}",
         4, NULL},
        {"{" TENSOR("a", "F32", "[2]", 0, 8) "," TENSOR("b", "F32", "[2]", 4, 12) "}", 12,
         "'b' overlaps"},
        {"{" TENSOR("a", "F32", "[2]", 0, 8) "," TENSOR("b", "F32", "[2]", 0, 8) "}", 8,
         "overlaps"},
        {"{" TENSOR("a", "F32", "[2]", 0, 8) "," TENSOR("b", "F32", "[2]", 12, 20) "}", 20,
         "'b' leaves a hole"},
        {"{" TENSOR("a", "F32", "[2]", 4, 12) "}", 12, "'a' leaves a hole"},
        {"{" TENSOR("a", "F32", "[2]", 0, 8) "}", 12, "4 bytes behind the last tensor"},
        {"{}", 8, "8 bytes behind the last tensor"},
        {"{" TENSOR("a", "F32", "[2]", 0, 8) "}", 7,
         "ends at byte 8 of the data, the file at 7: is it truncated?"},
        {"{" TENSOR("a", "F32", "[3]", 0, 8) "}", 8, "'a' has 8 bytes; its type and shape need 12"},
        {"{" TENSOR("a", "BF16", "[2,3]", 0, 8) "}", 8,
         "'a' has 8 bytes; its type and shape need 12"},
        {"{" TENSOR("a", "U8", "[3]", 0, 3) "," TENSOR("b", "F32", "[1]", 3, 7) "}", 7,
         NULL},
        {"{" TENSOR("a", "F32", "[1]", 0, 4) "," TENSOR("b", "I64", "[1]", 4, 12) "}", 12,
         NULL},
        {"{" TENSOR("a", "F8_E5M2", "[4]", 0, 4) "}", 4, "'a' has type 'F8_E5M2'"},
        {"{" TENSOR("a", "BOOL", "[4]", 0, 4) "}", 4, "type 'BOOL'"},
        {"{" TENSOR("a", "f32", "[1]", 0, 4) "}", 4, "type 'f32'"},
        {"{" TENSOR("a", "F32", "[1,1,1,1,1,1]", 0, 4) "}", 4, "at most 5"},
        {"{" TENSOR("a", "F32", "[-1]", 0, 4) "}", 4, "shape of tensor 'a'"},
        {"{" TENSOR("a", "F32", "[1.5]", 0, 6) "}", 6, "shape"},
        {"{" TENSOR("a", "F32", "[\"1\"]", 0, 4) "}", 4, "shape"},
        {"{" TENSOR("a", "F32", "4", 0, 4) "}", 4, "shape"},
        {"{" TENSOR("a", "F32", "{\"a\":1}", 0, 4) "}", 4, "shape"},
        {"{" TENSOR("a", "F32", "null", 0, 4) "}", 4, "shape"},
        {"{" TENSOR("a", "U8", "[4294967296,4294967296,4]", 0, 0) "}", 0, "shape"}, /* 2^66 */
        {"{" TENSOR("a", "U8", "[9007199254740992,9007199254740992,0]", 0, 0) "}", 0, "shape"},
        {"{" TENSOR("a", "U8", "[1e300]", 0, 0) "}", 0, "shape"},
        {"{" TENSOR("a", "U8", "[1e18]", 0, 0) "}", 0, "shape"},
        {"{" TENSOR("a", "U8", "[0]", 4, 0) "}", 4, "data_offsets"},
        {"{" TENSOR("a", "U8", "[1]", -1, 0) "}", 4, "data_offsets"},
        {"{" TENSOR("a", "U8", "[1]", 0.5, 1.5) "}", 2, "data_offsets"},
        {"{" TENSOR("a", "U8", "[4]", 0, 1e300) "}", 4, "data_offsets"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, "data_offsets"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":{\"0\":0,\"1\":1}}}", 1,
         "data_offsets"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "data_offsets"},
        {"{\"a\":{\"dtype\":\"U8\"}}", 1, "shape"},
        {"{\"a\":{}}", 0, "type '?'"},
        {"{\"a\":[1]}", 0, "type '?'"},
        {"{\"a\":null}", 0, "type '?'"},
        {"{" TENSOR("a", "U8", "[1]", 0, 1) "," TENSOR("\\u0061", "U8", "[1]", 1, 2) "}", 2,
         "'a' stands there twice"},
        {"[]", 0, "not a safetensors file"},
        {"1", 0, "not a safetensors file"},
        {"", 0, "a file of zeros"},
        {"{", 0, ":1: expected a key"},
        {"{\"a\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", 0,
         "nested deeper than 64"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *path = write_safetensors("case.safetensors", cases[i].header, cases[i].size);
        sc_file *f = sc_file_open(path);
        if (cases[i].message) check_message(!f, cases[i].header, cases[i].message);
        else CHECK(f != NULL);
        if (!f && !cases[i].message) printf("  %s: %s\n", cases[i].header, sc_error());
        if (!f && cases[i].message) CHECK(strstr(sc_error(), "case.safetensors"));
        sc_file_close(f);
    }
}

static void test_lengths(void) {
    static const struct {
        unsigned char bytes[10];
        size_t size;
        const char *message;
    } cases[] = {
        {{0}, 0, "an empty file"},
        {{2, 0, 0}, 3, "not a safetensors file"},
        {{2, 0, 0, 0, 0, 0, 0}, 7, "not a safetensors file"},
        {{2, 0, 0, 0, 0, 0, 0, 0, '{'}, 9, "is it truncated?"},
        {{0, 1, 0, 0, 0, 0, 0, 0, '{', '}'}, 10, "is it truncated?"},
        {{0x01, 0xe1, 0xf5, 0x05, 0, 0, 0, 0, '{'}, 9, "not a safetensors file"}, /* 100000001 */
        {{255, 255, 255, 255, 255, 255, 255, 255, '{', '}'}, 10, "not a safetensors file"},
        {{0x89, 'P', 'N', 'G', 13, 10, 26, 10, 0, 0}, 10, "not a safetensors file"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_raw(in_folder("length.safetensors"), cases[i].bytes, cases[i].size);
        sc_file *f = sc_file_open(in_folder("length.safetensors"));
        check_message(!f, "length", cases[i].message);
        sc_file_close(f);
    }
    check_message(!sc_file_open(in_folder("none.safetensors")), "none",
                  "none.safetensors: No such file");
    check_message(!sc_file_open(in_folder("case.safetensors/below")), "below a file",
                  "Not a directory");
}

/* ---- Data at any address ---- */

/* Headers of every length: the data of all types comes out as it is, at whatever address. */
static void test_odd_addresses(void) {
    static const char header[] = "{" TENSOR("u", "U8", "[1]", 0, 1) "," TENSOR(
        "f", "F32", "[3]", 1, 13) "," TENSOR("h", "BF16", "[600]", 13, 1213) "," TENSOR(
        "d", "F64", "[1]", 1213, 1221) "," TENSOR("i", "I64", "[1]", 1221, 1229) "," TENSOR(
        "j", "I32", "[1]", 1229, 1233) "}";
    float f[3] = {1, -2.5f, 1e-8f}, read[600];
    uint16_t h[600];
    double d = -0.125;
    int64_t i = 1 << 20;
    int32_t j = -7;
    for (int k = 0; k < 600; k++) h[k] = sc__f32_to_bf16((float)k);
    for (size_t pad = 0; pad < 9; pad++) {
        size_t n = sizeof header - 1 + pad;
        unsigned char file[4096] = {0}, *to = file + 8 + n + 1;
        for (int b = 0; b < 8; b++) file[b] = (unsigned char)(n >> (8 * b));
        memset(file + 8, ' ', n);
        memcpy(file + 8 + pad / 2, header, sizeof header - 1); /* blanks before and behind it */
        memcpy(to, f, 12), memcpy(to + 12, h, 1200), memcpy(to + 1212, &d, 8);
        memcpy(to + 1220, &i, 8), memcpy(to + 1228, &j, 4);
        write_raw(in_folder("odd.safetensors"), file, 8 + n + 1233);
        sc_file *o = sc_file_open(in_folder("odd.safetensors"));
        CHECK(o != NULL);
        if (!o) continue;
        const sc_tensor *x = sc_file_find(o, "f");
        sc_to_f32(read, x->data, x->dtype, 3);
        CHECK(!memcmp(read, f, 12));
        x = sc_file_find(o, "h");
        sc_to_f32(read, x->data, x->dtype, 600);
        CHECK(read[0] == 0 && read[511] == 512 && read[599] == sc__bf16_to_f32(h[599]));
        sc_to_f32(read, sc_file_find(o, "d")->data, SC_F64, 1);
        sc_to_f32(read + 1, sc_file_find(o, "i")->data, SC_I64, 1);
        sc_to_f32(read + 2, sc_file_find(o, "j")->data, SC_I32, 1);
        CHECK(read[0] == -0.125f && read[1] == 1 << 20 && read[2] == -7);
        sc_file_close(o);
    }
}

/* ---- Files of another kind ---- */

/* What stands where weights or JSON should is named, with what to do; no number out of it is. */
static void test_other_kinds(void) {
    static const struct { const char *bytes; size_t size; const char *weights, *json; } kinds[] = {
        {"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23802932552\n", 70,
         "Git LFS pointer", "Git LFS pointer"},
        {"<!DOCTYPE html><html>", 21, "HTML page", "HTML page"},
        {"\n  <html lang=\"en\">", 19, "HTML page", "HTML page"},
        {"{\"error\":\"Invalid credentials in Authorization header\"}", 55,
         "but text, '{\"error\":\"Invalid", "server's answer, 'Invalid credentials"},
        {"Entry not found", 15, "but text, 'Entry not found'", "expected a value"},
        {"Access to model black-forest-labs/FLUX.1-dev is restricted. You must have access to it",
         86, "but text, 'Access to model black", "expected a value"},
        {"GGUF\3\0\0\0\1\2\3\4\5\6\7\1", 16, "GGUF", "GGUF"},
        {"PK\3\4\0\0\10\10\0\0\0\0\0\0", 14, "PyTorch's .bin", "zip archive"},
        {"\x80\2\x8a\12l\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", 15, "pickle", "pickle"},
        {"\x1f\x8b\10\0\0\0\0\0\0\3", 10, "gzip", "gzip"},
        {"\0\0\0\0\0\0\0\0\0\0\0\0", 12, "zeros", "zeros"},
        {"", 0, "an empty file", "an empty file"},
        {"\1\2\3\4\5\6\7\10\11\12", 10, "not a safetensors file", "expected a value"}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        for (int json = 0; json < 2; json++) {
            const char *want = json ? kinds[i].json : kinds[i].weights;
            const char *path = in_folder(json ? "kind.json" : "kind.safetensors");
            write_raw(path, kinds[i].bytes, kinds[i].size);
            bool refused = json ? !sc_json_load(path) : !sc_file_open(path);
            check_message(refused, kinds[i].bytes, want);
            const char *said = strstr(sc_error(), path);
            CHECK(said && !strpbrk(said + strlen(path), "23456789"));
        }
    }
    size_t length; /* and where any text is read: captions, prompts, merges.txt */
    write_raw(in_folder("merges.txt"), kinds[0].bytes, kinds[0].size);
    check_message(!sc_read_file(in_folder("merges.txt"), &length), "pointer", "git lfs pull");
}

/* ---- Round trips ---- */

static float some_values[7] = {1, -2.5f, 3.1415927f, 1e-8f, -65504, 0, 0.33333334f};
static int64_t some_integers[2] = {INT64_MIN, 42};
static double some_doubles[2] = {0.1, -1e300};
static uint8_t some_bytes[3] = {0, 127, 255};

/* Writes eight tensors of different types, wider ones not first. */
static bool save_some(const char *path) {
    static const char *const metadata[] = {"format", "pt", "command \"line\"",
                                           "a\\b\n\x01 \xc3\xa9 \xff|", NULL};
    sc_tensor bytes = {.data = some_bytes, .dtype = SC_U8, .ndim = 1, .shape = {3}};
    sc_tensor f8 = {.data = some_bytes, .dtype = SC_F8_E4M3, .ndim = 2, .shape = {1, 2}};
    sc_tensor values = {.data = some_values, .dtype = SC_F32, .ndim = 2, .shape = {7, 1}};
    sc_tensor scalar = {.data = some_doubles, .dtype = SC_F64};
    sc_tensor integers = {.data = some_integers, .dtype = SC_I64, .ndim = 1, .shape = {2}};
    sc_tensor empty = {.data = NULL, .dtype = SC_F32, .ndim = 2, .shape = {0, 4}};
    sc_named all[] = {{"bytes", bytes, SC_U8},        {"as bf16", values, SC_BF16},
                      {"as f16", values, SC_F16},     {"name \"q\" \xe2\x82\xac", values, SC_F32},
                      {"f8", f8, SC_F8_E4M3},         {"scalar", scalar, SC_F64},
                      {"integers", integers, SC_I64}, {"empty", empty, SC_BF16}};
    return sc_file_save(path, all, 8, metadata);
}

static void check_tensor(const sc_file *f, const char *name, sc_dtype dtype, int ndim,
                         const void *data, size_t size) {
    const sc_tensor *x = sc_file_find(f, name);
    CHECK(x && x->dtype == dtype && x->ndim == ndim &&
          sc_count(x) * sc_dtype_size(dtype) == (int64_t)size);
    CHECK(x && (uintptr_t)x->data % (uintptr_t)sc_dtype_size(dtype) == 0 &&
          (!size || !memcmp(x->data, data, size)));
}

static void test_round_trip(void) {
    uint16_t bf16[7], f16[7];
    for (int i = 0; i < 7; i++)
        bf16[i] = sc__f32_to_bf16(some_values[i]), f16[i] = sc__f32_to_f16(some_values[i]);
    CHECK(save_some(in_folder("some.safetensors")));
    sc_file *f = sc_file_open(in_folder("some.safetensors"));
    CHECK(f && sc_file_count(f) == 8 && !strcmp(sc_file_path(f), in_folder("some.safetensors")));
    if (!f) return;
    check_tensor(f, "bytes", SC_U8, 1, some_bytes, 3);
    check_tensor(f, "as bf16", SC_BF16, 2, bf16, 14);
    check_tensor(f, "as f16", SC_F16, 2, f16, 14);
    check_tensor(f, "name \"q\" \xe2\x82\xac", SC_F32, 2, some_values, 28);
    check_tensor(f, "f8", SC_F8_E4M3, 2, some_bytes, 2);
    check_tensor(f, "scalar", SC_F64, 0, some_doubles, 8);
    check_tensor(f, "integers", SC_I64, 1, some_integers, 16);
    check_tensor(f, "empty", SC_BF16, 2, NULL, 0);
    CHECK(!sc_file_find(f, "") && !sc_file_find(f, "scala") && !sc_file_find(f, "zzz"));
    for (int64_t i = 0; i < 8; i++)
        CHECK(sc_file_tensor(f, i) == sc_file_find(f, sc_file_name(f, i)));
    CHECK(!strcmp(sc_file_metadata(f, "format"), "pt") && !sc_file_metadata(f, "none"));
    CHECK(!strcmp(sc_file_metadata(f, "command \"line\""), "a\\b\n\x01 \xc3\xa9 \xef\xbf\xbd|"));

    /* over the very file that is mapped: its old contents stay readable */
    sc_named again = {"values", *sc_file_find(f, "as bf16"), SC_BF16};
    CHECK(sc_file_save(in_folder("some.safetensors"), &again, 1, NULL));
    check_tensor(f, "as bf16", SC_BF16, 2, bf16, 14);
    sc_file_close(f);
    f = sc_file_open(in_folder("some.safetensors"));
    CHECK(f && sc_file_count(f) == 1 && !sc_file_metadata(f, "format"));
    if (f) check_tensor(f, "values", SC_BF16, 2, bf16, 14);
    sc_file_close(f);
    CHECK(sc_file_save(in_folder("none.of.them.safetensors"), NULL, 0, NULL));
    f = sc_file_open(in_folder("none.of.them.safetensors"));
    CHECK(f && sc_file_count(f) == 0 && !sc_file_find(f, "a"));
    sc_file_close(f);
    unlink(in_folder("none.of.them.safetensors"));
    sc_file_close(NULL);
}

/* Every prefix of a good file is refused; no changed byte of its header does harm. */
static void test_damage(void) {
    size_t size = 0;
    save_some(in_folder("some.safetensors"));
    char *bytes = sc_read_file(in_folder("some.safetensors"), &size);
    int accepted = 0;
    CHECK(size > 100 && read_safetensors(bytes, size));
    for (size_t n = 0; n < size; n++) accepted += read_safetensors(bytes, n);
    CHECK(accepted == 0);
    for (size_t i = 0; i < size; i++)
        for (int change = 1; change < 256; change = change * 2 + 1) {
            bytes[i] = (char)(bytes[i] ^ change);
            read_safetensors(bytes, size);
            bytes[i] = (char)(bytes[i] ^ change);
        }
    CHECK(read_safetensors(bytes, size));
    SC_FREE(bytes);
}

/* ---- Shards and folders ---- */

static void check_shards(const char *index, const char *message) {
    write_raw(in_folder("shards/x.safetensors.index.json"), index, strlen(index));
    sc_file *f = sc_file_open(in_folder("shards/x.safetensors.index.json"));
    check_message(!f, index, message);
    sc_file_close(f);
}

static void test_shards(void) {
    static const char index[] =
        "{\"metadata\":{\"total_size\":9},\"weight_map\":{\"c\":\"2.safetensors\","
        "\"a\":\"1.safetensors\",\"b\":\"1.safetensors\"}}";
    CHECK(!mkdir(in_folder("shards"), 0700));
    write_safetensors("shards/1.safetensors", /* this c is not the index's */
                      "{" TENSOR("b", "U8", "[4]", 0, 4) "," TENSOR(
                          "a", "F32", "[1]", 4, 8) "," TENSOR("c", "U8", "[1]", 8, 9) "}",
                      9);
    write_safetensors("shards/2.safetensors",
                      "{\"__metadata__\":{\"k\":\"v\"}," TENSOR("c", "F32", "[2]", 0, 8) "}", 8);
    write_raw(in_folder("shards/x.safetensors.index.json"), index, sizeof index - 1);
    for (int i = 0; i < 2; i++) { /* by its own name; by that of the folder */
        sc_file *f = sc_file_open(in_folder(i ? "shards" : "shards/x.safetensors.index.json"));
        CHECK(f && sc_file_count(f) == 3 && sc_count(sc_file_find(f, "c")) == 2 &&
              sc_file_find(f, "a"));
        CHECK(f && !strcmp(sc_file_name(f, 1), "b") && !strcmp(sc_file_metadata(f, "k"), "v"));
        sc_file_close(f);
    }
    int here = open(".", O_RDONLY);
    CHECK(here >= 0 && !chdir(in_folder("shards")));
    sc_file *f = sc_file_open("x.safetensors.index.json"); /* without a folder */
    CHECK(f && sc_file_count(f) == 3);
    sc_file_close(f);
    CHECK(!fchdir(here));
    close(here);
    check_shards("{\"weight_map\":{\"a\":\"3.safetensors\"}}", "3.safetensors: No such file");
    check_shards("{\"weight_map\":{\"a\":\"1.safetensors\",\"z\":\"2.safetensors\"}}",
                 "'z' is not in its shard '2.safetensors'");
    check_shards("{\"weight_map\":{\"a\":\"2.safetensors\"}}",
                 "'a' is not in its shard '2.safetensors'");
    check_shards("{\"weight_map\":{\"a\":\"../shards/1.safetensors\"}}",
                 "'../shards/1.safetensors' is not a plain file name");
    check_shards("{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "not a plain file name");
    check_shards("{\"weight_map\":{\"a\":\"\"}}", "not a plain file name");
    check_shards("{\"weight_map\":{\"a\":1}}", "not a plain file name");
    check_shards("{\"weight_map\":{\"a\":\"..\"}}", "is a folder");
    check_shards("{\"weight_map\":[]}", "no weight_map");
    check_shards("{}", "no weight_map");
    check_shards("[1,", ":1: expected a value");
    check_shards("{\"weight_map\":{\"a\":\"x.safetensors.index.json\"}}", "not a safetensors file");
    write_raw(in_folder("shards/x.safetensors.index.json"), index, sizeof index - 1);
}

static void test_folders(void) {
    static const char header[] = "{" TENSOR("a", "U8", "[1]", 0, 1) "}";
    static const struct {
        const char *file, *opens;
    } steps[] = {/* one after the other */
                 {"notes.txt", NULL},
                 {".hidden.safetensors", NULL},
                 {"x.safetensors", "x.safetensors"},
                 {"y.safetensors", NULL},
                 {"model.safetensors.index.fp16.json", "model.safetensors.index.fp16.json"},
                 {"model.safetensors.index.json", "model.safetensors.index.json"},
                 {"model.safetensors", "model.safetensors"}, /* before shards, as transformers */
                 {"diffusion_pytorch_model.fp16.safetensors", "model.safetensors"},
                 {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"},
                 {"diffusion_pytorch_model.safetensors.index.json", /* shards first, as diffusers */
                  "diffusion_pytorch_model.safetensors.index.json"}};
    CHECK(!mkdir(in_folder("weights"), 0700));
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        char name[128];
        snprintf(name, sizeof name, "weights/%s", steps[i].file);
        static const char index[] = "{\"weight_map\":{\"a\":\"x.safetensors\"}}";
        if (strstr(name, ".json")) write_raw(in_folder(name), index, sizeof index - 1);
        else write_safetensors(name, header, 1);
        sc_file *f = sc_file_open(in_folder("weights"));
        if (steps[i].opens) CHECK(f && !strcmp(strrchr(sc_file_path(f), '/') + 1, steps[i].opens));
        else check_message(!f, name, i < 2 ? "no weights here" : "several *.safetensors here");
        sc_file_close(f);
    }
}

/* Weights of another kind alone in a folder are named, not called missing. */
static void test_foreign_folders(void) {
    static const char *const names[] = {"pytorch_model.bin", "flux.gguf", "flux.pth"};
    CHECK(!mkdir(in_folder("foreign"), 0700));
    for (int i = 0; i < 3; i++) {
        char name[64];
        snprintf(name, sizeof name, "foreign/%s", names[i]);
        write_raw(in_folder(name), i == 1 ? "GGUF\3\0\0\0\1" : "PK\3\4\0\0\0\0\0", 9);
        check_message(!sc_file_open(in_folder("foreign")), name, i == 1 ? "GGUF" : "zip archive");
        CHECK(strstr(sc_error(), names[i]));
        unlink(in_folder(name));
    }
}

/* ---- Writing that fails ---- */

static int temporaries(void) {
    int n = 0;
    DIR *list = opendir(folder);
    for (struct dirent *entry; (entry = readdir(list));)
        n += strstr(entry->d_name, ".tmp-") != NULL;
    closedir(list);
    return n;
}

static bool save_large(const char *path) {
    static float values[65536];
    sc_tensor x = {.data = values, .dtype = SC_F32, .ndim = 1, .shape = {65536}};
    sc_named named = {"x", x, SC_F32};
    return sc_file_save(path, &named, 1, NULL);
}

static void set_file_limit(rlim_t bytes) {
    struct rlimit limit;
    getrlimit(RLIMIT_FSIZE, &limit);
    limit.rlim_cur = bytes < limit.rlim_max ? bytes : limit.rlim_max;
    setrlimit(RLIMIT_FSIZE, &limit);
}

static void check_old(const char *path) {
    sc_file *f = sc_file_open(path);
    CHECK(f && sc_file_count(f) == 8);
    sc_file_close(f);
}

/* A temporary file that is locked is another writer's; one that is not was left by a dead one. */
static void test_two_writers(void) {
    const char *path = in_folder("both.safetensors");
    sc__writer first;
    CHECK(sc__write_begin(&first, path) && sc__write_bytes(&first, "theirs", 6));
    check_message(!save_large(path), "two writers", "another process is writing it");
    CHECK(sc__write_end(&first, true));
    size_t length = 0;
    char *text = sc_read_file(path, &length);
    CHECK(text && length == 6 && !strcmp(text, "theirs"));
    SC_FREE(text);
    write_raw(in_folder("both.safetensors.tmp-shortcut"), "left", 4);
    CHECK(save_large(path) && temporaries() == 0);
}

static void link_to(const char *target, const char *name) {
    CHECK(!symlink(target, in_folder(name)));
}

/* Through links, also of links, and to what is not there yet; the mode stays; read-only is meant. */
static void test_replaced(void) {
    struct stat there;
    CHECK(!mkdir(in_folder("far"), 0755));
    link_to("far/end", "link");
    link_to("link", "link2");
    CHECK(sc_write_file(in_folder("link2"), "new", 3) && sc__is_file(in_folder("far/end")));
    CHECK(!chmod(in_folder("far/end"), 0640) && sc_write_file(in_folder("link2"), "newer", 5));
    CHECK(!lstat(in_folder("link2"), &there) && S_ISLNK(there.st_mode));
    CHECK(!lstat(in_folder("far/end"), &there) && there.st_size == 5 &&
          (there.st_mode & 0777) == 0640);
    CHECK(!chmod(in_folder("far/end"), 0444));
    check_message(!sc_write_file(in_folder("link"), "x", 1), "read-only", "cannot write");
    CHECK(!lstat(in_folder("far/end"), &there) && there.st_size == 5);
    link_to("round", "round");
    check_message(!sc_write_file(in_folder("round"), "x", 1), "a round", "symbolic links");
    write_raw(in_folder("victim"), "victim", 6);
    link_to("victim", "trap.tmp-shortcut"); /* by someone else: not written through */
    CHECK(!sc_write_file(in_folder("trap"), "x", 1));
    CHECK(!stat(in_folder("victim"), &there) && there.st_size == 6);
    CHECK(!remove(in_folder("trap.tmp-shortcut")) && temporaries() == 0);
}

static void test_unwritable(void) {
    double x = 0;
    sc_tensor doubles = {.data = &x, .dtype = SC_F64};
    sc_named wrong = {"x", doubles, SC_F32};
    CHECK(save_some(in_folder("old.safetensors")));
    check_message(!save_some(in_folder("no/such/folder.safetensors")), "no folder",
                  "cannot write: No such file");
    check_message(!save_some(in_folder("old.safetensors/x")), "below a file",
                  "cannot write: Not a directory");
    check_message(!save_some(in_folder("weights")), "over a folder",
                  "cannot write: Is a directory");
    check_message(!sc_file_save(in_folder("old.safetensors"), &wrong, 1, NULL), "F64",
                  "cannot write 'x' of type F64 as F32");
    check_message(!sc_write_file(in_folder("no/such/text"), "x", 1), "no folder",
                  "no/such/text: cannot write");
    check_message(!sc_can_write(in_folder("weights")), "a folder", "this is a folder");
    check_message(!sc_can_write(in_folder("no/such/text")), "no folder", "cannot write: No such");
    CHECK(sc_can_write(in_folder("old.safetensors")) && sc_can_write(in_folder("not there")));
    CHECK(access(in_folder("not there"), F_OK) && temporaries() == 0);
    check_old(in_folder("old.safetensors"));
}

/* A full disk, as a limit on the size of files; then a process that dies while it writes. */
static void test_interrupted(void) {
    signal(SIGXFSZ, SIG_IGN);
    set_file_limit(100000);
    bool large = save_large(in_folder("old.safetensors"));
    bool text = sc_write_file(in_folder("text"), folder, 0);
    set_file_limit(RLIM_INFINITY);
    char message[1024];
    snprintf(message, sizeof message, "%s", sc_error());
    CHECK(!large && text && strstr(message, "old.safetensors: cannot write: File too large"));
    CHECK(temporaries() == 0);
    check_old(in_folder("old.safetensors"));

    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGXFSZ, SIG_DFL);
        set_file_limit(100000);
        save_large(in_folder("old.safetensors"));
        _exit(0);
    }
    int status = 0;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFSIGNALED(status));
    check_old(in_folder("old.safetensors"));
    CHECK(temporaries() == 1); /* what it left; never under the final name */
    CHECK(save_large(in_folder("old.safetensors")) && temporaries() == 0);
    sc_file *f = sc_file_open(in_folder("old.safetensors"));
    CHECK(f && sc_count(sc_file_find(f, "x")) == 65536);
    sc_file_close(f);
}

/* Reading and writing with memory that runs out after 0, 1, 2, ... allocations. */
static void test_out_of_memory(void) {
    static const char json[] = "{\"a\": [1, \"two\", {\"b\": null}], \"c\": {}}";
    bool all = false;
    int n = 0, silent = 0;
    CHECK(save_some(in_folder("some.safetensors")));
    for (; !all && n < 1000; n++) {
        sc_fail("nothing yet");
        allocations_left = n;
        sc_json *root = sc_json_parse(json, sizeof json - 1, "memory.json");
        sc_file *f = root ? sc_file_open(in_folder("some.safetensors")) : NULL;
        sc_file *shards = f ? sc_file_open(in_folder("shards")) : NULL;
        all = shards && save_some(in_folder("some.safetensors"));
        allocations_left = -1;
        silent += !all && !strstr(sc_error(), "out of memory");
        sc_json_free(root);
        sc_file_close(f);
        sc_file_close(shards);
    }
    CHECK(all && n > 20 && silent == 0);
    sc_picture p = {1, 1, (float[]){0, 0, 0}}, out;
    memset(&out, 1, sizeof out); /* nobody promised that it is empty */
    allocations_left = 0;
    CHECK(!sc_picture_fit(&out, &p, 2, 2) && !out.rgb);
    allocations_left = -1;
}

static void remove_tree(const char *path) {
    DIR *list = opendir(path);
    for (struct dirent *e; list && (e = readdir(list));) {
        char below[1024];
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        snprintf(below, sizeof below, "%s/%s", path, e->d_name);
        if (unlink(below)) remove_tree(below);
    }
    if (list) closedir(list);
    rmdir(path);
}

int main(void) {
    if (!mkdtemp(folder)) return perror(folder), 1;
    test_json_values();
    test_json_refused();
    test_json_depth();
    test_json_numbers();
    test_json_lookup();
    test_json_access();
    test_json_files();
    test_headers();
    test_lengths();
    test_odd_addresses();
    test_other_kinds();
    test_round_trip();
    test_damage();
    test_shards();
    test_folders();
    test_foreign_folders();
    test_two_writers();
    test_replaced();
    test_unwritable();
    test_out_of_memory();
    test_interrupted();
    replay(TEST_DIR "/corpus/json", fuzz_json);
    replay(TEST_DIR "/corpus/safetensors", fuzz_safetensors);
    remove_tree(folder);
    return test_report();
}
