/* Fuzzes the safetensors reader: no input may crash it, and the data of every tensor it accepts can
 * be read as the type it has. An input is read twice: as a whole file, and as a header alone, to
 * which its length and the data that it claims are added (a mutated header hardly ever fits both).
 *
 *   make fuzz
 *
 * test_files.c includes this file to replay the corpus. */
#include "fuzz.h"

/* Touches every value of a tensor, as its type. */
static double tensor_sum(const sc_tensor *x) {
    double sum = 0;
    int64_t n = sc_count(x);
    for (int64_t i = 0; i < n; i++) {
        float value = 0;
        const char *at = (const char *)x->data + i * sc_dtype_size(x->dtype);
        sc_to_f32(&value, at, x->dtype, 1);
        sum += (double)value;
    }
    return sum;
}

static volatile double fuzz_sink; /* or the sums would be optimised away */

/* Reads `size` bytes as sc_file_open reads the mapping of a file. */
static bool read_safetensors(const void *bytes, size_t size) {
    sc_file f = {.path = "fuzz.safetensors"};
    sc__mapping part = {.path = f.path, .data = malloc(size ? size : 1), .size = size};
    MUST(part.data);
    if (size) memcpy(part.data, bytes, size);
    f.parts = &part, f.part_count = 1;
    bool ok = sc__read_part(&f, &part, NULL) && sc__sort_entries(&f);
    if (!ok) MUST(!strncmp(sc_error(), "fuzz.safetensors", 16));
    double sum = 0;
    for (int64_t i = 0; ok && i < sc_file_count(&f); i++) {
        const sc_tensor *x = sc_file_tensor(&f, i);
        const char *metadata = sc_file_metadata(&f, sc_file_name(&f, i));
        MUST(sc_file_find(&f, sc_file_name(&f, i)) == x);
        sum += tensor_sum(x) + (metadata ? (double)strlen(metadata) : 0);
    }
    sc_json_free(part.header);
    fuzz_sink = sum;
    SC_FREE(f.entries);
    free(part.data);
    return ok;
}

/* The end of the last tensor, if a header says so and it is small; else 0. */
static size_t claimed_size(const void *header, size_t size) {
    sc_json *json = sc_json_parse((const char *)header, size, "fuzz.json");
    double end = 0;
    for (int64_t i = 0; i < sc_json_length(json); i++) {
        const sc_json *offsets = sc_json_get(sc_json_value(json, i), "data_offsets");
        end = fmax(end, sc_json_number(sc_json_at(offsets, 1), 0));
    }
    sc_json_free(json);
    return end <= 65536 ? (size_t)end : 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    size_t padded = (size + 7) / 8 * 8, whole = 8 + padded + claimed_size(data, size);
    uint8_t *file = (uint8_t *)calloc(1, whole);
    MUST(file);
    for (int i = 0; i < 8; i++) file[i] = (uint8_t)((uint64_t)padded >> (8 * i));
    if (size) memcpy(file + 8, data, size);
    memset(file + 8 + size, ' ', padded - size);
    read_safetensors(data, size);
    read_safetensors(file, whole);
    free(file);
    return 0;
}
