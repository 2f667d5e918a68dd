/* tools.h: what train.c, sample.c, main.c and the tests share and a library should not hold: PNG
 * and JPEG files through stb, what may be written, options, progress, Ctrl-C. Include it after
 * shortcut.h, of which it takes the API alone, in one .c file. Its sc_ names are the programs', not
 * the library's: these functions print and may exit, the library's never do. */
#ifndef TOOLS_H
#define TOOLS_H

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef SHORTCUT_OPENBLAS
#include <cblas.h>
#endif
#ifdef SHORTCUT_MPI
#include <mpi.h>
#endif

/* ==== Memory, paths, text ==================================================================== */

/* Zeroed; NULL with the error set. */
void *allocate(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p) sc_fail("out of memory (%zu items of %zu bytes)", count, size);
    return p;
}

int sc_die(void);
const char *sc_command; /* the command line, from sc_start on */

/* Texts such as paths are small, and live as long as the program: nobody frees them. */
void *kept(void *text) {
    static void **all;
    static size_t count;
    all = (void **)realloc(all, (count + 1) * sizeof *all);
    if (!all) sc_fail("out of memory"), exit(sc_die());
    return all[count++] = text;
}

/* As printf's; without memory for it the program ends. */
SC_PRINTF(1, 2) char *formatted(const char *format, ...) {
    char *text = NULL;
    size_t size;
    va_list values;
    FILE *f = open_memstream(&text, &size);
    va_start(values, format);
    if (f) vfprintf(f, format, values);
    va_end(values);
    if (!f || fclose(f)) sc_fail("out of memory"), exit(sc_die());
    return kept(text);
}

bool exists(const char *path) { return !access(path, F_OK); }

bool is_file(const char *path) {
    struct stat s;
    return !stat(path, &s) && S_ISREG(s.st_mode);
}

/* `made`: it was not there before. */
bool make_folder(const char *path, bool *made) {
    *made = !mkdir(path, 0777);
    return *made || errno == EEXIST || sc_fail("%s: %s", path, strerror(errno));
}

/* ==== PNG and JPEG files ======================================================================
 *
 * stb decodes and encodes; around it, size limits, the checks that stb does not make (a truncated
 * JPEG, a PNG's checksums), EXIF orientation, and the `parameters` text chunk that picture tools
 * look for.
 */

#ifdef __has_include
#if !__has_include(<stb/stb_image.h>) || !__has_include(<stb/stb_image_write.h>)
#error "stb_image.h not found: install the package libstb-dev"
#endif
#endif
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_NO_STDIO
/* Doubles a row of a JPEG's colours, with libjpeg's rounding; stb (2.27) has the last but one
 * pixel's weights exchanged. The macro renames stb's where it is defined, not where its address is
 * taken. */
static unsigned char *stbi__resample_row_h_2_of_stb(unsigned char *out, unsigned char *row,
                                                    unsigned char *far, int width, int factor);
static unsigned char *stbi__resample_row_h_2(unsigned char *out, unsigned char *row,
                                             unsigned char *far, int width, int factor) {
    if (width < 2) return stbi__resample_row_h_2_of_stb(out, row, far, width, factor);
    out[0] = row[0], out[2 * width - 1] = row[width - 1];
    for (int i = 1; i < 2 * width - 1; i++)
        out[i] = (unsigned char)((3 * row[i / 2] + row[i / 2 + (i % 2 ? 1 : -1)] + 1 + i % 2) >> 2);
    return out;
}
#define stbi__resample_row_h_2(...) stbi__resample_row_h_2_of_stb(__VA_ARGS__)
#include <stb/stb_image.h>
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STBI_WRITE_NO_STDIO
#include <stb/stb_image_write.h>

#define MAX_PIXELS 64000000
#define CONVERT_IT ": convert it, as by: magick FILE NEW.png"

/* The CRC of PNG chunks is the one that stb writes. */
#define png_crc(bytes, n) stbiw__crc32((unsigned char *)(bytes), (int)(n))

typedef struct bytes_read {
    char *data;
    size_t length;
} bytes_read;

static void append(bytes_read *to, const char *p, size_t n) {
    char *data = (char *)realloc(to->data, to->length + n + 1);
    if (!data) return;
    memcpy(data + to->length, p, n);
    to->data = data;
    to->length += n;
}

static uint32_t big_endian(const uint8_t *p, int count) {
    uint32_t value = 0;
    for (int i = 0; i < count; i++) value = value << 8 | p[i];
    return value;
}

/* What a file says beside its pixels. */
typedef struct about {
    bool pixels;               /* they have begun */
    bytes_read exif, raw, xmp; /* raw: EXIF as hexadecimal text */
    bool jfif, named;          /* JPEG: its components are named R, G and B */
    int components, transform; /* transform: Adobe's; -1: not said */
    size_t at, missing_size;
    const char *missing; /* at `at`: what stb must see there, and other readers do without */
} about;

static bool starts(const uint8_t *p, size_t n, const char *with, size_t length) {
    return n >= length && !memcmp(p, with, length);
}

/* The last one counts. */
static void keep_last(bytes_read *text, const uint8_t *p, size_t n) {
    text->length = 0;
    append(text, (const char *)p, n);
}

/* The text of a PNG's tEXt, zTXt or iTXt chunk if it has this keyword; the last two may be packed.
 * False: it cannot be unpacked. */
static bool png_keyword(const uint8_t *type, size_t n, const char *keyword, bytes_read *text) {
    enum { LIMIT = 1 << 26 };
    const uint8_t *p = type + 4, *end = p + n;
    bool international = !memcmp(type, "iTXt", 4), packed = !memcmp(type, "zTXt", 4);
    if ((!international && !packed && memcmp(type, "tEXt", 4)) ||
        !starts(p, n, keyword, strlen(keyword) + 1))
        return true;
    p += strlen(keyword) + 1;
    if (international) packed = p < end && *p;
    p += international ? 2 : packed;                  /* flag and method; or the method */
    for (int i = 0; international && p && i < 2; i++) /* language, translated keyword */
        p = p < end ? (const uint8_t *)memchr(p, 0, (size_t)(end - p)) : NULL, p = p ? p + 1 : p;
    if (!p || p > end) return true;
    if (!packed) return keep_last(text, p, (size_t)(end - p)), true;
    char *plain = (char *)allocate(LIMIT, 1);
    int size = plain ? stbi_zlib_decode_buffer(plain, LIMIT, (const char *)p, (int)(end - p)) : -1;
    if (size >= 0) keep_last(text, (uint8_t *)plain, (size_t)size);
    free(plain);
    return size >= 0;
}

/* A PNG's chunks: what is wrong or not supported; NULL: nothing. */
static const char *png_about(about *a, const uint8_t *bytes, size_t size) {
    size_t n;
    for (a->at = 8; size - a->at >= 12; a->at += 12 + n) {
        const uint8_t *type = bytes + a->at + 4, *p = type + 4;
        n = big_endian(type - 4, 4);
        if (n > size - a->at - 12) break;
        if (png_crc(type, n + 4) != big_endian(p + n, 4)) return "damaged PNG (wrong checksum)";
        if (!memcmp(type, "IEND", 4)) return NULL;
        if (!memcmp(type, "IDAT", 4)) a->pixels = true;
        if (!memcmp(type, "CgBI", 4)) return "a PNG for iPhones alone (CgBI)" CONVERT_IT;
        if (!memcmp(type, "eXIf", 4)) keep_last(&a->exif, p, n);
        if (!png_keyword(type, n, "Raw profile type exif", &a->raw) ||
            !png_keyword(type, n, "XML:com.adobe.xmp", &a->xmp))
            return "damaged PNG (compressed text)";
    }
    a->missing = "\0\0\0\0IEND\xae\x42\x60\x82";
    a->missing_size = 12;
    return a->pixels && size - a->at < 12 ? NULL : "truncated PNG";
}

/* A segment of a JPEG. Old versions of stb trust Huffman tables to have at most 256 codes. */
static const char *jpeg_segment(about *a, int marker, const uint8_t *p, size_t n) {
    static const char xmp[] = "http://ns.adobe.com/xap/1.0/"; /* and its NUL */
    for (size_t at = 0, codes; marker == 0xc4 && at < n; at += 17 + codes) {
        codes = 0;
        for (size_t i = 1; i <= 16 && at + 17 <= n; i++) codes += p[at + i];
        if (codes > 256 || at + 17 + codes > n) return "damaged JPEG (Huffman table)";
    }
    if (a->pixels) return NULL;
    if (marker == 0xe0) a->jfif = a->jfif || starts(p, n, "JFIF", 5);
    if (marker == 0xee && n >= 12 && starts(p, n, "Adobe", 5)) a->transform = p[11];
    if (marker == 0xe1 && starts(p, n, "Exif\0", 6))
        append(&a->exif, (const char *)p + 6, n - 6); /* several are one */
    if (marker == 0xe1 && starts(p, n, xmp, sizeof xmp))
        keep_last(&a->xmp, p + sizeof xmp, n - sizeof xmp);
    if (marker < 0xc0 || marker > 0xc2 || n < 6) return NULL; /* other frames stb refuses */
    a->components = p[5];
    a->named = n >= 15 && p[6] == 'R' && p[9] == 'G' && p[12] == 'B';
    return NULL;
}

/* A JPEG's segments, in the same way. */
static const char *jpeg_about(about *a, const uint8_t *bytes, size_t size) {
    const char *fault = NULL;
    size_t at = 2, n;
    for (; !fault && size - at >= 2; at++) {
        const uint8_t *p = bytes + at;
        if (p[0] != 0xff || !p[1] || p[1] == 0xff || (p[1] & 0xf8) == 0xd0)
            continue; /* pixels and their restart markers, or padding */
        if (size - at < 4 || p[1] == 0xd9 || (n = big_endian(p + 2, 2) - 2u) > size - at - 4) break;
        if (p[1] == 0xda && !a->pixels) a->pixels = true, a->at = at;
        fault = jpeg_segment(a, p[1], p + 4, n);
        at += 3 + n;
    }
    if (fault) return fault;
    if (size - at < 2 || bytes[at] != 0xff || bytes[at + 1] != 0xd9) return "truncated JPEG";
    if (a->components == 3 && a->named && (a->jfif || a->transform > 0))
        return "a JPEG that says both RGB and YCbCr of its colours" CONVERT_IT;
    if (a->components == 4) { /* libjpeg takes CMYK as if it had Adobe's marker, stb does not */
        a->missing = a->transform > 0 ? "\377\356\0\16Adobe\0\144\0\0\0\0\2"
                                      : "\377\356\0\16Adobe\0\144\0\0\0\0";
        a->missing_size = 16;
    }
    return NULL;
}

/* The orientation by all that is said of it, in the order in which Pillow asks. */
static int orientation_of(about *a) {
    bool text = !a->exif.data; /* behind three lines: its digits become bytes, in place */
    bytes_read *exif = text ? &a->raw : &a->exif;
    size_t lines = 0, digits = 0;
    for (size_t i = 0; text && i < exif->length; i++) {
        int c = (uint8_t)exif->data[i], digit = c <= '9' ? c - '0' : (c | 32) - 'a' + 10;
        char *byte = &exif->data[digits / 2];
        if (lines >= 3 && isxdigit(c)) *byte = (char)(digits++ % 2 ? *byte << 4 | digit : digit);
        lines += c == '\n';
    }
    append(&a->xmp, "", 1);
    return sc_orientation((uint8_t *)exif->data, text ? digits / 2 : exif->length, a->xmp.data);
}

/* A PNG or JPEG file as floats, upright, without alpha. Free it with sc_picture_free. */
bool sc_picture_load(sc_picture *p, const char *path) {
    about a = {.transform = -1};
    size_t size = 0;
    int width, height, channels;
    uint8_t *bytes = (uint8_t *)sc_read_file(path, &size), *more;
    uint16_t *pixels = NULL; /* 8 bits times 257: the same part of the largest number */
    *p = (sc_picture){0};
    if (!bytes) return false;
    const char *fault = "not a PNG or JPEG picture" CONVERT_IT;
    if (starts(bytes, size, "\x89PNG\r\n\x1a\n", 8)) fault = png_about(&a, bytes, size);
    if (starts(bytes, size, "\xff\xd8", 2)) fault = jpeg_about(&a, bytes, size);
    bool ok = !fault || sc_fail("%s: %s", path, fault);
    if (ok && a.missing) {
        ok = (more = (uint8_t *)realloc(bytes, size + a.missing_size)) != NULL;
        if (ok) {
            memmove(more + a.at + a.missing_size, more + a.at, size - a.at);
            memcpy(more + a.at, a.missing, a.missing_size);
            bytes = more;
            size += a.missing_size;
        } else sc_fail("%s: out of memory", path);
    }
    if (ok && stbi_info_from_memory(bytes, (int)size, &width, &height, &channels) &&
        (int64_t)width * height > MAX_PIXELS)
        ok = sc_fail("%s: %d x %d pixels; at most %d million are supported", path, width, height,
                     MAX_PIXELS / 1000000);
    if (ok) pixels = stbi_load_16_from_memory(bytes, (int)size, &width, &height, &channels, 0);
    if (ok && !pixels)
        ok = sc_fail("%s: cannot decode: %s%s", path, stbi_failure_reason(), CONVERT_IT);
    ok = ok && sc_picture_from_pixels(p, pixels, width, height, channels, orientation_of(&a));
    stbi_image_free(pixels);
    free(a.exif.data);
    free(a.raw.data);
    free(a.xmp.data);
    free(bytes);
    return ok;
}

/* ---- Writing ---- */

/* A chunk "parameters": tEXt for ASCII, iTXt (UTF-8, not compressed) for anything else. Returns
 * its size; `chunk` is zeroed. */
static size_t png_text(uint8_t *chunk, const char *text) {
    size_t n = strlen(text), head = 8 + 11;
    bool ascii = true;
    for (size_t i = 0; i < n; i++) ascii = ascii && (uint8_t)text[i] < 0x80;
    memcpy(chunk + 4, ascii ? "tEXtparameters" : "iTXtparameters", 15);
    if (!ascii) head += 4; /* no compression, its method, no language, no translated keyword */
    memcpy(chunk + head, text, n);
    uint32_t length = (uint32_t)(head - 8 + n), crc = png_crc(chunk + 4, head - 4 + n);
    for (int i = 0; i < 4; i++) {
        chunk[i] = (uint8_t)(length >> (24 - 8 * i));
        chunk[head + n + (size_t)i] = (uint8_t)(crc >> (24 - 8 * i));
    }
    return head + n + 4;
}

/* Writes a PNG; parameters (UTF-8, or NULL) go into its text chunk of that name, behind the
 * signature and IHDR (33 bytes). */
bool sc_picture_save(const sc_picture *p, const char *path, const char *parameters) {
    int size = 0;
    uint8_t *pixels = (uint8_t *)calloc((size_t)p->width * (size_t)p->height, 3), *png = NULL;
    if (pixels) sc_picture_to_pixels(p, pixels);
    if (pixels) png = stbi_write_png_to_mem(pixels, 3 * p->width, p->width, p->height, 3, &size);
    size_t room = (size_t)size + (parameters ? strlen(parameters) : 0) + 64;
    uint8_t *file = png ? (uint8_t *)calloc(room, 1) : NULL;
    bool ok = file || sc_fail("%s: out of memory", path);
    if (ok) {
        memcpy(file, png, 33);
        size_t text = parameters ? png_text(file + 33, parameters) : 0;
        memcpy(file + 33 + text, png + 33, (size_t)size - 33);
        ok = sc_write_file(path, file, (size_t)size + text);
    }
    free(pixels);
    free(png);
    free(file);
    return ok;
}

/* The parameters in a PNG that sc_picture_save wrote: they stand behind the signature and IHDR.
 * NULL: there are none. */
char *sc_picture_parameters(const char *path) {
    uint8_t head[41];
    char *text = NULL;
    FILE *f = is_file(path) ? fopen(path, "rb") : NULL;
    bool png = f && fread(head, 1, 41, f) == 41 && !memcmp(head, "\x89PNG\r\n\x1a\n", 8);
    bool utf8 = png && !memcmp(head + 37, "iTXt", 4);
    size_t n = png ? big_endian(head + 33, 4) : 0, start = utf8 ? 15 : 11;
    if ((utf8 || (png && !memcmp(head + 37, "tEXt", 4))) && n >= start && n < 1 << 26)
        text = kept(allocate(n + 1, 1));
    bool found = text && fread(text, 1, n, f) == n && !memcmp(text, "parameters", 11);
    if (f) fclose(f);
    return found ? text + start : NULL;
}

/* ==== Files that are written ==================================================================
 *
 * What the user named is replaced where it is a plain file that may be written; what the program
 * named itself, only where the program wrote it; what is read, never.
 */

static const char *name_in(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* The folder of a file. */
static const char *folder_of(const char *path) {
    int n = (int)(name_in(path) - path);
    return n ? formatted("%.*s", n > 1 ? n - 1 : n, path) : ".";
}

static bool same_file(const char *a, const char *b) {
    struct stat x, y;
    return !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

/* One file or folder under two names; if neither is there yet, one name in one folder. */
static bool same_place(const char *a, const char *b) {
    if (exists(a) || exists(b)) return same_file(a, b);
    return same_file(folder_of(a), folder_of(b)) && !strcmp(name_in(a), name_in(b));
}

/* Not what is read as `input` (a file, its shards, or a folder; NULL: nothing), under any name. */
bool sc_apart(const char *out, const char *input) {
    bool same = input && same_place(out, input);
    sc_file *file = input && !same && exists(out) ? sc_file_open(input) : NULL;
    const char *part = NULL;
    for (int64_t i = 0; file && (part = sc_file_part(file, i)); i++)
        same = same || same_file(out, part);
    sc_file_close(file);
    return !same || sc_fail("%s: this is %s, which is read or written too: choose another place",
                            out, input);
}

#define SC_MADE_BY "made by shortcut:" /* so begin the parameters of other pictures */
#define SC_LOSS_COLUMNS "step,loss,gradient_norm,learning_rate\n"

/* Whether a file is this program's: a PNG says so in its parameters, which are ./sample's or begin
 * with SC_MADE_BY; safetensors say it with the command, loss.csv with its heading. */
static bool wrote(const char *path) {
    const char *text = sc_picture_parameters(path);
    char line[sizeof SC_LOSS_COLUMNS] = "";
    int end = 0;
    for (const char *at = text; at && !end && (at = strstr(at, "\nSteps: ")); at++)
        sscanf(at,
               "\nSteps: %*d, Sampler: Euler, CFG scale: %*f, Distilled CFG Scale: %*f, Seed: %*u, "
               "Size: %*dx%*d, Shift: %*f, Model:%n",
               &end);
    if (end || (text && !strncmp(text, SC_MADE_BY, strlen(SC_MADE_BY)))) return true;
    FILE *f = fopen(path, "rb");
    bool losses = f && fgets(line, sizeof line, f) && !strcmp(line, SC_LOSS_COLUMNS);
    if (f) fclose(f);
    sc_file *file = losses ? NULL : sc_file_open(path);
    bool ours = losses || (file && sc_file_metadata(file, "command"));
    sc_file_close(file);
    return ours;
}

/* For a name that the user did not give. */
bool sc_may_replace(const char *path) {
    struct stat s;
    return stat(path, &s) || !S_ISREG(s.st_mode) || !s.st_size || wrote(path) ||
           sc_fail("%s: this file is there, and not from this program: move it away, or choose "
                   "another place",
                   path);
}

/* The ending of a file's name: a dot and a letter (so not v1.5's), or "". */
const char *sc_ending(const char *path) {
    const char *name = name_in(path), *dot = strrchr(name, '.');
    return dot && dot > name && isalpha((unsigned char)dot[1]) ? dot : name + strlen(name);
}

#define SC_WEIGHTS ".safetensors.sft.st"

/* Whether the name ends in one of those. */
static bool ends_in(const char *path, const char *endings) {
    const char *ending = sc_ending(path);
    size_t n = strlen(ending);
    for (; n && endings; endings = strchr(endings + 1, '.'))
        if (!strncasecmp(endings, ending, n) && (!endings[n] || endings[n] == '.')) return true;
    return false;
}

/* FILE:SCALE, or FILE: then what its metadata recommends for `steps` (./train --scales): the scale,
 * else 1, and, if it does, a guidance (else *guidance stays; it may be NULL). The file's path. */
const char *sc_lora_argument(const char *argument, int steps, float *scale, float *guidance) {
    char *end = NULL, *path = formatted("%s", argument), *colon = strrchr(path, ':');
    *scale = colon ? strtof(colon + 1, &end) : 0;
    if (colon && end != colon + 1 && !*end && isfinite(*scale) && !exists(path))
        return *colon = 0, path;
    sc_file *file = sc_file_open(path);
    const char *list = file ? sc_file_metadata(file, "scales") : NULL;
    double recommended = 1, guided = NAN;
    if (list) sc_scale_for(list, steps, &recommended, &guided);
    if (guidance && isfinite(guided)) *guidance = (float)guided;
    *scale = (float)recommended;
    sc_file_close(file);
    return path;
}

/* A file to write: its name ends in one of `endings` (".png" or SC_WEIGHTS), which is what will be
 * in it, or in nothing; named by the user or not; not of the model or of another transformer (NULL:
 * none), none of the LoRAs (up to 8 arguments FILE[:SCALE], NULL after the last). */
bool sc_check_out(const char *out, const char *endings, bool named, const char *model,
                  const char *transformer, const char *const *loras) {
    bool ok = sc_can_write(out);
    if (ok && *sc_ending(out) && !ends_in(out, endings))
        ok = sc_fail("%s: this is written as %.*s only: let its name end so", out,
                     (int)strcspn(endings + 1, ".") + 1, endings);
    ok = ok && (named || sc_may_replace(out)) && sc_apart(out, transformer);
    for (int part = 0; ok && exists(out) && part < SC_PARTS; part++)
        ok = sc_apart(out, kept(sc_part_path(model, (sc_part)part)));
    float scale;
    for (int i = 0; ok && i < 8 && loras[i]; i++)
        ok = sc_apart(out, sc_lora_argument(loras[i], 1, &scale, NULL));
    return ok;
}

/* The folder of a transformer that sc_dit_save can write: a new one, or with what this program
 * wrote and does not read now; a config.json of its own may be there. */
bool sc_can_write_model(const sc_dit *dit, const char *folder) {
    size_t size;
    const sc_file *file = sc_dit_net(dit)->file;
    const char *input = file ? sc_file_path(file) : NULL;
    if (ends_in(folder, SC_WEIGHTS) && (!exists(folder) || is_file(folder)))
        return sc_fail("%s: this will be a folder: do not let its name end as a file's", folder);
    size = strlen(folder);
    while (size > 1 && folder[size - 1] == '/') size--;
    if (!exists(folder)) return sc_can_write(formatted("%.*s", (int)size, folder));
    sc_file *there = sc_file_open(folder);
    bool shards = there && ends_in(sc_file_path(there), ".json");
    sc_file_close(there);
    if (shards) return sc_fail("%s: its shards would be read instead: write elsewhere", folder);
    const char *weights = formatted("%s/diffusion_pytorch_model.safetensors", folder);
    const char *config = formatted("%s/config.json", folder);
    const char *text = exists(config) ? kept(sc_read_file(config, &size)) : NULL;
    return sc_apart(folder, input ? folder_of(input) : NULL) && sc_apart(weights, input) &&
           sc_may_replace(weights) && sc_can_write(weights) && sc_can_write(config) &&
           (exists(weights) || (text && !strcmp(text, sc_dit_config_text(dit))) ||
            sc_may_replace(config));
}

static const char *lock_path;

/* One process at a time writes into a folder; false says which. The kernel ends the lock with the
 * process, however that ends. */
bool sc_lock(const char *folder) {
    char holder[256] = "", since[32] = "";
    struct stat mine;
    time_t now = time(NULL);
    const char *path = formatted("%s/.shortcut-lock", folder);
    int fd = open(path, O_RDWR | O_CREAT, 0666);
    if (fd < 0) return sc_fail("%s: cannot write: %s", path, strerror(errno));
    bool busy = flock(fd, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK;
    if (busy || fstat(fd, &mine) || !mine.st_nlink || ftruncate(fd, 0)) {
        ssize_t n = read(fd, holder, sizeof holder - 1);
        close(fd);
        return sc_fail("%s: %s is writing there: wait for it, or choose another folder", folder,
                       n > 0 ? holder : "another process");
    }
    strftime(since, sizeof since, "%Y-%m-%d %H:%M", localtime(&now));
    dprintf(fd, "process %ld (since %s: %s)", (long)getpid(), since, sc_command);
    lock_path = path;
    return true;
}

void sc_unlock(void) {
    if (lock_path) remove(lock_path);
}

/* ==== Many processes: make MPI=1, mpirun -n 4 ./train ... =====================================
 *
 * All go the same way through the program, each with its part of the work, and meet: there they
 * learn whether all may go on. Who fails comes to the next meeting at once, by sc_die, and says so;
 * a sum or a copy stands right behind a meeting: so nobody waits for one that went another way.
 * The first process alone prints and writes; an error is printed by whoever has it.
 */

volatile sig_atomic_t sc_interrupted; /* asked to stop: see sc_catch_interrupt */
bool sc_stop;                         /* one of all processes was, at the last meeting */
int sc_rank, sc_processes = 1;        /* which this is, and of how many */
double sc_seconds(void);
bool sc_meet(bool ok, const char *what, uint64_t same, double *sum);
bool sc_agree(bool ok) { return sc_meet(ok, "", 0, NULL); }

#ifdef SHORTCUT_MPI
#ifdef SHORTCUT_CUDA
void sc_cuda_use(int device);
bool sc_cuda_id(char id[128]), sc_cuda_join(const char id[128], int number, int count);
void sc_cuda_sum(float *x, int64_t n);
#endif

static int local_rank, errors = 2; /* its number on its host; where its errors are printed */
static char host[MPI_MAX_PROCESSOR_NAME];
static bool over;      /* one has failed: there are no more meetings */
static double summing; /* seconds */

static void leave_others(void) {
    if (summing > 0) fprintf(stderr, "%d processes: %.1f s in sums\n", sc_processes, summing);
    MPI_Finalize();
}

static void join_others(void) {
    int length;
    MPI_Comm local;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &length);
    atexit(leave_others);
    MPI_Get_processor_name(host, &length);
    MPI_Comm_rank(MPI_COMM_WORLD, &sc_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &sc_processes);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, sc_rank, MPI_INFO_NULL, &local);
    MPI_Comm_rank(local, &local_rank);
    MPI_Comm_free(&local);
    if (sc_rank) errors = dup(2), dup2(open("/dev/null", O_WRONLY), 1), dup2(1, 2);
}

static void print_error(void) {
    dprintf(errors, "error: %s, process %d: %s\n", host, sc_rank, sc_error());
}

/* Are all well, and have the same number `same` (if not, their `what` differ)? *sum (or NULL) is
 * added up in the order of the processes. False in all of them, with the error printed. */
bool sc_meet(bool ok, const char *what, uint64_t same, double *sum) {
    double own[] = {ok, sc_interrupted != 0, (double)(same >> 11), sum ? *sum : 0}, total = 0;
    double all[sc_processes][4];
    int come = 0, wrong = sc_processes;
    MPI_Request request;
    sc_stop = sc_interrupted;
    if (sc_processes == 1 || over) return ok && !over;
    MPI_Iallgather(own, 4, MPI_DOUBLE, all, 4, MPI_DOUBLE, MPI_COMM_WORLD, &request);
    for (int tries = 0; MPI_Test(&request, &come, MPI_STATUS_IGNORE), !come; tries++)
        if (tries > 1000) nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL); /* leaves cores */
    for (int i = 0; i < sc_processes; total += all[i++][3]) {
        if ((!all[i][0] || all[i][2] != all[0][2]) && i < wrong) wrong = i;
        sc_stop = sc_stop || all[i][1];
    }
    if (sum) *sum = total;
    over = wrong < sc_processes;
    if (wrong == sc_rank && ok) sc_fail("its %s differ from those of process 0", what);
    if (wrong == sc_rank) print_error();
    return !over;
}

/* Where the others cannot meet this process, since they wait for it on their GPUs: ends all. */
bool sc_end_all(void) {
    if (sc_processes > 1) print_error(), MPI_Abort(MPI_COMM_WORLD, 1);
    return false;
}

/* x [n], float, of process `from` comes to all. */
#define sc_copy_to_all(x, n, from) MPI_Bcast(x, (int)(n), MPI_FLOAT, from, MPI_COMM_WORLD)

/* Each process adds a part up, in the order of the processes, and gives it to all: the same bits
 * everywhere and in every run with as many processes, and no more traffic than there must be. */
static void sum_on_host(float *x, int64_t n) {
    enum { PART = 1 << 18 };
    static float *sent;
    const int64_t count = sc_processes, most = count * PART;
    double started = sc_seconds();
    if (!sent && !(sent = (float *)allocate((size_t)(2 * most), sizeof *sent))) sc_end_all();
    for (int64_t at = 0; at < n; at += most) {
        int64_t size = n - at < most ? n - at : most, part = (size + count - 1) / count;
        float *got = sent + most;
        memcpy(sent, x + at, (size_t)size * sizeof *x);
        MPI_Alltoall(sent, (int)part, MPI_FLOAT, got, (int)part, MPI_FLOAT, MPI_COMM_WORLD);
        for (int64_t i = 0; i < part; i++) {
            double total = 0;
            for (int64_t p = 0; p < count; p++) total += (double)got[p * part + i];
            got[i] = (float)total;
        }
        MPI_Allgather(got, (int)part, MPI_FLOAT, sent, (int)part, MPI_FLOAT, MPI_COMM_WORLD);
        memcpy(x + at, sent, (size_t)size * sizeof *x);
    }
    summing += sc_seconds() - started;
}

/* The gradients of these are summed from now on, on GPUs by NCCL. */
bool sc_share(sc_params *params) {
    if (sc_processes > 1) params->sum = sum_on_host;
#ifdef SHORTCUT_CUDA
    char id[128];
    if (sc_processes == 1 || params->backend->on_host) return true;
    params->sum = sc_cuda_sum;
    if (!sc_agree(sc_rank || sc_cuda_id(id))) return false;
    MPI_Bcast(id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    return sc_cuda_join(id, sc_rank, sc_processes);
#endif
    return true;
}
#else
bool sc_meet(bool ok, const char *what, uint64_t same, double *sum) {
    (void)what, (void)same, (void)sum;
    sc_stop = sc_interrupted;
    return ok;
}
#define join_others() (void)0
#define sc_end_all() false
#define sc_copy_to_all(x, n, from) (void)0
#define sc_share(params) true
#endif

/* Whether all that was printed went out, or to a reader that went away. */
bool sc_printed(void) {
    return (fflush(stdout) ? errno == EPIPE : !ferror(stdout)) ||
           sc_fail("standard output: not all could be written");
}

/* What main returns. */
int sc_end(bool ok) { return sc_agree(ok) ? 0 : sc_die(); }

/* ==== The program: start, interrupt, clock, device ============================================ */

enum { SC_MAX_THREADS = 1024 };

/* First thing in main: threads that wait spin for some microseconds, the usual time to the next
 * loop, and then sleep. Spinning on costs a program that shares its cores a factor of ten and more;
 * sleeping at once, 1.7. And OpenBLAS takes a CPU that is newer than itself for a Prescott of 2004,
 * a quarter as fast. Both libraries read this when they are loaded: start once again. A reader that
 * went away, and a limit on the size of files, make a write fail; they do not end the program. */
void sc_start(char **argv) {
    int fd = 0; /* what is closed would be the next file that is opened */
    while (fd >= 0 && fd < 3) fd = open("/dev/null", O_RDWR);
    close(fd);
    sc_command = argv[0];
    for (int i = 1; argv[i]; i++) sc_command = formatted("%s %s", sc_command, argv[i]);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    if (!getenv("SHORTCUT_STARTED")) {
        setenv("SHORTCUT_STARTED", "yes", 1);
        if (!getenv("OMP_WAIT_POLICY")) setenv("GOMP_SPINCOUNT", "10000", 0);
        setenv("OMP_WAIT_POLICY", "passive", 0);
#if defined SHORTCUT_OPENBLAS && defined __x86_64__
        if (!strcmp(openblas_get_corename(), "Prescott") && __builtin_cpu_supports("avx2"))
            setenv("OPENBLAS_CORETYPE", __builtin_cpu_supports("avx512vl") ? "SkylakeX" : "Haswell",
                   0);
#endif
        execv("/proc/self/exe", argv); /* where that fails, go on as we are */
    }
    join_others();
}

static void on_interrupt(int sig) { sc_interrupted = sig; }

/* Ctrl-C, SIGTERM and a terminal that closes ask the program to stop; a second Ctrl-C kills. The
 * others often come twice: from a shell and from the system, to a process and to its group. Under
 * nohup SIGHUP stays ignored. SA_RESTART: a file that is being written is written to its end. */
void sc_catch_interrupt(void) {
    struct sigaction stop = {.sa_handler = on_interrupt, .sa_flags = SA_RESTART}, old;
    sigaction(SIGTERM, &stop, NULL);
    if (!sigaction(SIGHUP, NULL, &old) && old.sa_handler != SIG_IGN) sigaction(SIGHUP, &stop, NULL);
    stop.sa_flags |= SA_RESETHAND;
    sigaction(SIGINT, &stop, NULL);
}

/* For sc_sampling.progress. */
bool sc_not_interrupted(void *user, int step, int steps) {
    (void)user, (void)step, (void)steps;
    return !sc_interrupted;
}

double sc_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* A line with text out of a file: control characters, which a terminal obeys, become ?. */
void sc_print_text(FILE *to, const char *heading, const char *text) {
    fputs(heading, to);
    for (const unsigned char *c = (const unsigned char *)text; *c; c++)
        fputc(*c < ' ' || *c == 127 || (*c == 0xc2 && c[1] < 0xa0) ? '?' : *c, to);
    fputc('\n', to);
}

/* Texts of which T5 or CLIP read the beginning only, and how many tokens each reads. */
static struct { const char *encoder; int count, tokens; } cuts[] = {{"T5", 0, 0}, {"CLIP", 0, 0}};

void sc_note_cut(const sc_text *text) {
    const int read[] = {text->cut, text->pooled_cut};
    for (int i = 0; i < 2; i++)
        if (read[i]) cuts[i].count++, cuts[i].tokens = read[i];
}

/* Tells of those that were noted. */
void sc_warn_cut(const char *what) {
    for (int i = 0; i < 2; cuts[i++].count = 0)
        if (cuts[i].count)
            fprintf(stderr, "warning: %s reads the first %d tokens only of %d %s%s\n",
                    cuts[i].encoder, cuts[i].tokens, cuts[i].count, what,
                    cuts[i].count == 1 ? "" : "s");
}

/* Loads a LoRA; prints "applied n/N" and the rest. *guidance as for sc_lora_argument. */
bool sc_load_lora_argument(sc_dit *dit, const char *argument, int steps, float *guidance) {
    float scale;
    const char *path = sc_lora_argument(argument, steps, &scale, guidance);
    sc_lora_report report = {0};
    if (!sc_lora_load(dit, path, scale, &report)) return false;
    fprintf(stderr, "%s: applied %d/%d, scale %g%s\n", path, report.applied, report.total, scale,
            strcmp(path, argument) ? "" : " (FILE:SCALE to change)");
    if (report.applied < report.total)
        sc_print_text(stderr, "warning: these fit no layer: ", report.missed);
    return true;
}

/* What is to be known of a model's guidance, where --guidance or --cfg was given or not. */
void sc_note_guidance(const sc_dit *dit, bool guided, bool cfg) {
    const sc_dit_config *c = sc_dit_config_of(dit);
    if (guided && !c->guidance)
        fprintf(stderr, "note: this model has no input for guidance: --guidance changes nothing, "
                        "--cfg G does\n");
    if (c->kind == SC_SD3 && !cfg)
        fprintf(stderr, "note: without --cfg G (4.5, say) SD3.5 hardly follows the prompt, but for "
                        "LoRAs that guidance is folded into, as ./train does\n");
}

/* lora.safetensors of this folder, where it is there and was made for this model (or the other
 * transformer, if not NULL), which has no LoRA merged into it; else NULL. */
const char *sc_own_lora(const char *model, const char *transformer) {
    static const char path[] = "lora.safetensors";
    sc_file *file = exists(path) ? sc_file_open(path) : NULL;
    const char *weights = transformer ? transformer : kept(sc_part_path(model, SC_TRANSFORMER));
    sc_file *into = file && weights ? sc_file_open(weights) : NULL;
    const char *base = file ? sc_file_metadata(file, "base_model") : NULL;
    const char *merged = into ? sc_file_metadata(into, "merged") : NULL;
    bool same = base && same_place(base, transformer ? transformer : model);
    bool own = file ? same && !merged : exists(path);
    if (same && !own)
        sc_print_text(stderr, formatted("%s is not used, the transformer has merged in: ", path),
                      merged);
    else if (file && !own)
        sc_print_text(stderr, formatted("%s is not used, it was made for ", path),
                      base ? base : "a model that it does not name");
    sc_file_close(into);
    sc_file_close(file);
    return own ? path : NULL; /* where it cannot be read, loading it says why */
}

static bool line_open; /* of progress, on a terminal */

/* Before anything else is printed there: it must not stand behind a line of progress. */
void sc_end_line(void) {
    if (line_open) fputc('\n', stderr);
    line_open = false;
}

/* Prints the last error, if it was not; what main returns then. */
int sc_die(void) {
    fflush(stdout);
    sc_end_line();
    if (sc_processes > 1) sc_agree(false);
    else fprintf(stderr, "error: %s\n", sc_error());
    return 1;
}

/* The same of bad usage, below `usage` where all of it is needed. */
int sc_bad_usage(const char *usage) {
    if (usage) fprintf(stderr, "%s\n\n", usage);
    return sc_die(), 2;
}

#define SC_DEVICES "auto|cpu|cuda"

/* One of SC_DEVICES; NULL with the error set. */
const sc_backend *sc_device(const char *name) {
    if (!strcmp(name, "cpu")) return sc_cpu();
#ifdef SHORTCUT_CUDA
#ifdef SHORTCUT_MPI
    sc_cuda_use(local_rank);
#endif
    const sc_backend *cuda = sc_cuda();
    if (cuda || !strcmp(name, "cuda")) return cuda;
    if (!strstr(sc_error(), "no NVIDIA driver")) /* there seems to be a GPU */
        fprintf(stderr, "note: %s; using the CPU\n", sc_error());
#else
    if (!strcmp(name, "cuda"))
        return sc_fail("this program was built without CUDA: run make where nvcc is installed"),
               NULL;
#endif
    return sc_cpu();
}

static const char *clock_text(double seconds, char text[32]) {
    long s = seconds < 0 ? 0 : (long)(seconds + 0.5);
    if (s < 3600) snprintf(text, 32, "%ld:%02ld", s / 60, s % 60);
    else snprintf(text, 32, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    return text;
}

/* One line of progress, rewritten in place on a terminal: "label 12/300, extra, 0:40, 1:20 left".
 * first: what was done before `started`, by a run that this one goes on from. */
void sc_progress(const char *label, int64_t first, int64_t done, int64_t total, double started,
                 const char *extra) {
    static double last;
    static const char *shown; /* the first of each label is */
    char left[32], spent[32];
    double now = sc_seconds(), elapsed = now - started;
    bool terminal = isatty(2), end = done >= total;
    if (sc_interrupted) return; /* what was done is saved first */
    if (!end && label == shown && now - last < (terminal ? 0.2 : 10)) return;
    if (end && elapsed < 2 && !terminal) return;
    last = now;
    shown = label;
    fprintf(stderr, "%s%s %lld/%lld%s%s, %s", terminal ? "\r" : "", label, (long long)done,
            (long long)total, extra ? ", " : "", extra ? extra : "", clock_text(elapsed, spent));
    if (!end && done > first)
        fprintf(stderr, ", %s left",
                clock_text(elapsed / (double)(done - first) * (double)(total - done), left));
    fprintf(stderr, "%s%s", terminal ? "\033[K" : "", !terminal || end ? "\n" : "");
    line_open = terminal && !end;
}

/* ==== Options ================================================================================ */

/* Their values: bool, char *, char *[8], uint64_t, int, int[8] up to a 0, float, float[2]. */
enum kind { SC_FLAG, SC_STRING, SC_STRINGS, SC_SEED, SC_INT, SC_INTS, SC_FLOAT, SC_RANGE };
typedef struct sc_option {
    const char *name; /* "--steps"; NULL: a heading in the help */
    enum kind kind;
    void *value;
    const char *argument, *help; /* of a string with several as "auto|fp8" one is taken */
} sc_option;

/* Is `text` one of "this|that"? */
static bool is_listed(const char *list, const char *text) {
    return !strchr(text, '|') && strstr(formatted("|%s|", list), formatted("|%s|", text));
}

/* Numbers separated by commas, as many as the option takes at most. */
static bool set_numbers(const sc_option *o, const char *text) {
    bool whole = o->kind == SC_INT || o->kind == SC_INTS;
    int count = 0, most = o->kind == SC_INTS ? 7 : o->kind == SC_RANGE ? 2 : 1;
    char *end = NULL;
    for (const char *at = text; !end || *end; at = end + 1, count++) {
        double x = strtod(at, &end);
        if (end == at || (*end && *end != ',') || !isfinite((float)x) || count == most)
            return sc_fail("%s takes %s, not '%s'", o->name, o->argument, text);
        if (whole && (x != floor(x) || fabs(x) > INT_MAX))
            return sc_fail("%s takes whole numbers, not '%s'", o->name, text);
        if (o->kind == SC_INTS && x < 1) /* 0 ends the list in memory */
            return sc_fail("%s takes numbers from 1 up, not '%s'", o->name, text);
        if (whole) ((int *)o->value)[count] = (int)x;
        else ((float *)o->value)[count] = (float)x;
    }
    if (o->kind == SC_INTS) ((int *)o->value)[count] = 0;
    if (o->kind == SC_RANGE && count == 1) ((float *)o->value)[1] = *(float *)o->value;
    return true;
}

static bool set_option(const sc_option *o, const char *text) {
    const char **strings = (const char **)o->value;
    char *end = NULL;
    int i = 0;
    if (o->kind == SC_FLAG) return *(bool *)o->value = !strcmp(text, "yes"), true;
    if (o->kind > SC_SEED) return set_numbers(o, text);
    if (o->kind == SC_SEED) { /* exactly: no double holds all of them */
        errno = 0;
        uint64_t seed = strtoull(text, &end, 10);
        if (!isdigit((unsigned char)*text) || *end || errno)
            return sc_fail("%s takes %s, a whole number from 0 to 18446744073709551615, not '%s'",
                           o->name, o->argument, text);
        return *(uint64_t *)o->value = seed, true;
    }
    if (strchr(o->argument, '|') && !is_listed(o->argument, text))
        return sc_fail("%s takes %s, not '%s'", o->name, o->argument, text);
    while (o->kind == SC_STRINGS && i < 8 && strings[i]) i++;
    if (i == 8) return sc_fail("%s can be given at most 8 times", o->name);
    return strings[i] = text, true;
}

/* The number, and no more digits than it takes. */
static const char *real_text(float x) {
    const char *text = formatted("%g", x);
    return strtof(text, NULL) == x ? text : formatted("%.9g", x);
}

/* The value; "" where there is none. */
static const char *option_text(const sc_option *o) {
    const float *real = (const float *)o->value;
    const char *text = "";
    switch (o->kind) {
    case SC_FLAG: return *(bool *)o->value ? "yes" : "no";
    case SC_STRING: return *(char **)o->value ? *(char **)o->value : "";
    case SC_STRINGS: return "";
    case SC_SEED: return formatted("%llu", (unsigned long long)*(uint64_t *)o->value);
    case SC_INT: return formatted("%d", *(int *)o->value);
    case SC_INTS:
        for (const int *x = (const int *)o->value; *x; x++)
            text = formatted("%s%s%d", text, *text ? "," : "", *x);
        return text;
    case SC_FLOAT: return real_text(*real);
    case SC_RANGE: return formatted("%s,%s", real_text(real[0]), real_text(real[1]));
    }
    return "";
}

/* All that have a value, but for those in the list `but` ("--this|--that"): lines "NAME VALUE". */
const char *sc_options_text(const sc_option *options, int count, const char *but) {
    const char *text = "", *value;
    for (const sc_option *o = options; o < options + count; o++)
        if (o->name && !is_listed(but, o->name) && *(value = option_text(o)))
            text = formatted("%s%s %s\n", text, o->name, value);
    return text;
}

static void print_help(const char *usage, const sc_option *options, int count) {
    printf("%s\n", usage);
    for (const sc_option *o = options; o < options + count; o++) {
        if (!o->name) {
            printf("\n%s\n", o->help);
            continue;
        }
        const char *value = o->kind == SC_FLAG ? "" : option_text(o);
        printf("  %-26s %s", formatted("%s %s", o->name, o->argument ? o->argument : ""), o->help);
        printf(*value ? " [%s]\n" : "%s\n", value);
    }
}

/* The option of this name, without its "--"; NULL: there is none. */
static const sc_option *find_option(const sc_option *options, int count, const char *name) {
    for (int i = 0; i < count; i++)
        if (options[i].name && !strcmp(options[i].name + 2, name)) return &options[i];
    return NULL;
}

/* Reads argv into the options' values; what is left over goes to `positional` (at most `limit`).
 * --help or -h prints `usage` and the table and exits 0; bad usage prints one line and exits 2. */
int sc_parse(const char *usage, const sc_option *options, int count, int argc, char **argv,
             const char **positional, int limit) {
    int found = 0;
    bool literal = false, ok = true; /* literal: after "--" */
    for (int i = 1; ok && i < argc; i++) {
        const char *word = argv[i];
        const sc_option *o;
        if (!literal && (!strcmp(word, "--help") || !strcmp(word, "-h")))
            print_help(usage, options, count), exit(0);
        if (literal || strncmp(word, "--", 2)) {
            if (found < limit) positional[found++] = word;
            else ok = sc_fail("unexpected argument '%s'", word);
        } else if (!word[2]) literal = true;
        else if (!(o = find_option(options, count, word + 2)))
            ok = sc_fail("unknown option '%s'", word);
        else if (o->kind == SC_FLAG) ok = set_option(o, "yes");
        else if (i + 1 == argc) ok = sc_fail("%s needs a value: %s", o->name, o->argument);
        else ok = set_option(o, argv[++i]);
    }
    if (ok) return found;
    fprintf(stderr, "error: %s (see %s --help)\n", sc_error(), argv[0]);
    exit(2);
}

/* What follows the last argument `name`, else `value` (for what must be known before sc_parse). */
const char *sc_given(int argc, char **argv, const char *name, const char *value) {
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], name)) value = i + 1 < argc ? argv[i + 1] : "";
    return value;
}

/* Takes what sc_options_text wrote. */
bool sc_take_options(const sc_option *options, int count, const char *text) {
    for (const char *end; (end = strchr(text, '\n')); text = end + 1) {
        int name = (int)strcspn(text, " "), value = (int)(end - text) - name - 1;
        const sc_option *o = NULL;
        if (name > 2 && value > 0)
            o = find_option(options, count, formatted("%.*s", name - 2, text + 2));
        if (!o) return sc_fail("'%.*s' is no option", (int)(end - text), text);
        if (!set_option(o, formatted("%.*s", value, text + name + 1))) return false;
    }
    return true;
}

/* Values from the object `section` of MODEL/recipe.json, where there is one: the defaults measured
 * for this model. Its keys are option names without "--". The program ends if it has others, or
 * flags, or paths: a model from elsewhere does not say which files are read and written here. */
void sc_parse_recipe(const sc_option *options, int count, const char *model, const char *section) {
    const char *path = formatted("%s/recipe.json", model);
    if (!exists(path)) return;
    const sc_json *recipe = kept(sc_json_load(path)); /* string options point into it */
    if (!recipe) exit(sc_die());
    const sc_json *values = sc_json_get(recipe, section);
    for (int64_t i = 0; i < sc_json_length(values); i++) {
        const sc_json *value = sc_json_value(values, i);
        const char *key = sc_json_key(values, i), *text = sc_json_string(value, NULL);
        const sc_option *o = key ? find_option(options, count, key) : NULL;
        bool ok = o && o->kind != SC_FLAG && o->kind != SC_STRINGS &&
                  !is_listed("DIR|FILE|PATH", o->argument);
        if (!ok) sc_fail("%s: '%s' is no option that a recipe may set", path, key ? key : section);
        else if ((o->kind == SC_STRING && !text) ||
                 !set_option(o, text ? text : formatted("%.17g", sc_json_number(value, NAN))))
            ok = sc_fail("%s: '%s' has a wrong value", path, key);
        if (!ok) exit(sc_die());
    }
}

/* The lines of a file that are not blank; NULL with the error set. */
char **sc_load_prompts(const char *path, int64_t *count) {
    size_t most = 1;
    char *text = kept(sc_text_load(path));
    for (const char *c = text; c && *c; c++) most += *c == '\n' || *c == '\r';
    char **lines = text ? kept(allocate(most, sizeof *lines)) : NULL;
    *count = 0;
    for (char *line = lines ? strtok(text, "\r\n") : NULL; line; line = strtok(NULL, "\r\n"))
        if (line[strspn(line, " \t")]) lines[(*count)++] = line;
    if (!lines || *count) return lines;
    return sc_fail("%s: no prompts", path), NULL;
}

/* Tells what none of these nets reads of its files. */
void sc_warn_unread(const sc_net *const *nets, int count, const char *model) {
    char names[512];
    long long unread = sc_net_unread(nets, count, names, sizeof names);
    const char *what = formatted("warning: %lld tensors of %s are not used: ", unread, model);
    if (unread) sc_print_text(stderr, what, names);
}

/* Of all parts of a model. A part that cannot be opened says why later. */
static void warn_unread(const sc_pipeline *p) {
    const char *path = kept(sc_part_path(p->folder, SC_VAE));
    sc_vae *vae = path ? sc_vae_open(NULL, path, false) : NULL;
    sc_text_encoders *text =
        sc_text_encoders_open(NULL, p->folder, sc_dit_config_of(p->dit)->kind);
    const sc_net *const nets[] = {sc_dit_net(p->dit), sc_vae_net(vae), sc_text_net(text, SC_CLIP),
                                  sc_text_net(text, SC_SD3_CLIP_G), sc_text_net(text, SC_T5)};
    sc_warn_unread(nets, 5, p->folder);
    sc_text_encoders_close(text);
    sc_vae_close(vae);
}

/* What the encoders of a model's folder read beside their weights. */
const char *const sc_encoder_files[] = {
    "vae/config.json", "text_encoder/config.json", "text_encoder_2/config.json",
    "text_encoder_3/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer.json", "tokenizer_2/vocab.json",
    "tokenizer_2/merges.txt", "tokenizer_2/tokenizer_config.json", "tokenizer_3/tokenizer.json",
    "tokenizer_3/tokenizer_config.json", NULL};

/* sc_pipeline_open on one of SC_DEVICES, with what to do where the folder is not there. */
sc_pipeline *sc_open_model(const char *model, const char *transformer, const char *device,
                           sc_dit_options how) {
    const sc_backend *be = sc_device(device);
    sc_pipeline *p = be && exists(model) ? sc_pipeline_open(be, model, transformer, &how) : NULL;
    if (p) warn_unread(p);
    else if (be && !exists(model))
        sc_fail("%s: No such file or directory: --model takes a model's folder or file "
                "(data/tiny-flux is in the programs' folder)",
                model);
    return p;
}

#endif /* TOOLS_H */
