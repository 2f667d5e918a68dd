/* Pictures and data sets: PNGs and JPEGs against Pillow (test/reference/make_pictures.py), scaling,
 * buckets, orientation, colours, broken files, the parameters chunk, texts, folders good and bad.
 */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "../tools.h"
#include "test.h"

#define PICTURES TEST_DIR "/reference/pictures/"

static char folder[] = "/tmp/test_pictures_XXXXXX";

/* A path in the temporary folder; valid until the fourth call after this one. */
static const char *temporary(const char *name) {
    static char paths[4][256];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", folder, name);
    return paths[turn];
}

static void write_text(const char *name, const char *text) {
    CHECK(sc_write_file(temporary(name), text, strlen(text)));
}

static float largest_difference(const float *a, const float *b, int64_t n) {
    float largest = 0;
    for (int64_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(a[i] - b[i]));
    return largest;
}

/* ---- Decoding and scaling against Pillow ---- */

static void test_kinds(const sc_file *reference) {
    float worst_png = 0, worst_jpeg = 0;
    int count = 0;
    for (int64_t i = 0; i < sc_file_count(reference); i++) {
        const char *name = sc_file_name(reference, i), *dot = strrchr(name, '.');
        const sc_tensor *want = sc_file_tensor(reference, i);
        char path[300];
        sc_picture p;
        if (!dot) continue;
        snprintf(path, sizeof path, "%s%s", PICTURES, name);
        if (!CHECKED(sc_picture_load(&p, path))) {
            printf("  %s\n", sc_error());
            continue;
        }
        if (CHECKED(p.height == want->shape[1] && p.width == want->shape[2])) {
            float difference = largest_difference(p.rgb, want->data, sc_count(want));
            bool png = !strcmp(dot, ".png");
            if (!CHECKED(difference < (png ? 1e-6f : 2 * 2.5f / 255)))
                printf("  %s: %g\n", name, difference);
            if (png) worst_png = fmaxf(worst_png, difference);
            else worst_jpeg = fmaxf(worst_jpeg, difference);
        }
        sc_picture_free(&p);
        count++;
    }
    CHECK(count == 22);
    printf("  %d pictures; largest difference to Pillow: PNG %.2g, JPEG %.2g (of 255)\n", count,
           worst_png * 127.5f, worst_jpeg * 127.5f);
}

static void test_fit(const sc_file *reference) {
    const sc_tensor *source = sc_file_find(reference, "source");
    if (!CHECKED(source)) return;
    sc_picture in = {.width = (int)source->shape[2],
                     .height = (int)source->shape[1],
                     .rgb = source->data},
               out;
    for (int64_t i = 0; i < sc_file_count(reference); i++) {
        int width, height;
        if (sscanf(sc_file_name(reference, i), "fit_%dx%d", &width, &height) != 2) continue;
        const sc_tensor *want = sc_file_tensor(reference, i);
        if (!CHECKED(sc_picture_fit(&out, &in, width, height))) continue;
        float difference = largest_difference(out.rgb, want->data, sc_count(want));
        if (!CHECKED(difference < 4e-6f)) printf("  %dx%d: %g\n", width, height, difference);
        sc_picture_free(&out);
    }
    float white[3] = {1, 1, 1};
    sc_picture one = {.width = 1, .height = 1, .rgb = white};
    if (CHECKED(sc_picture_fit(&out, &one, 32, 64))) {
        for (int i = 0; i < 3 * 32 * 64; i++)
            if (!CHECKED(fabsf(out.rgb[i] - 1) < 1e-6f)) break;
        sc_picture_free(&out);
    }
    CHECK(!sc_picture_fit(&out, &one, 0, 16) && !sc_picture_fit(&out, &one, 1 << 20, 1 << 20));
}

static void test_buckets(void) {
    static const int cases[][6] = {
        /* picture, resolution, multiple, bucket */
        {512, 512, 512, 32, 512, 512},   {1, 1, 512, 32, 512, 512},
        {4000, 4000, 512, 32, 512, 512}, {1920, 1080, 512, 32, 672, 384},
        {1080, 1920, 512, 32, 384, 672}, {10000, 10, 512, 32, 1024, 256},
        {10, 10000, 512, 32, 256, 1024}, {128, 128, 128, 16, 128, 128},
        {300, 200, 128, 16, 160, 96},    {7, 9, 16, 32, 32, 32},
        {200, 100, 256, 16, 352, 176},   {100, 200, 256, 16, 176, 352},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int *k = cases[i];
        int w = 0, h = 0;
        sc_bucket(k[0], k[1], k[2], k[3], &w, &h);
        if (!CHECKED(w == k[4] && h == k[5])) printf("  %d x %d: %d x %d\n", k[0], k[1], w, h);
    }
    for (int width = 1; width < 3000; width += 37)
        for (int height = 1; height < 3000; height += 53) {
            int w = 0, h = 0;
            int w2 = 0, h2 = 0;
            sc_bucket(width, height, 512, 32, &w, &h);
            sc_bucket(height, width, 512, 32, &w2,
                      &h2); /* on its side: the same, if but for ties */
            double ratio = (double)width / height;
            if (!CHECKED(w >= 32 && h >= 32 && w % 32 == 0 && h % 32 == 0 && w * h <= 512 * 512 &&
                         w <= 1024 && h <= 1024) ||
                !CHECKED(fabs(fabs(log(ratio * h / w)) - fabs(log(ratio * w2 / h2))) < 1e-12))
                return;
        }
}

/* ---- Broken files: every prefix, every flipped byte ---- */

static void expect_failure(const void *bytes, size_t size, const char *message) {
    sc_picture p;
    CHECK(sc_write_file(temporary("bad"), bytes, size));
    bool loaded = sc_picture_load(&p, temporary("bad"));
    if (!CHECKED(!loaded && !p.rgb && strstr(sc_error(), message)))
        printf("  %zu bytes: %s\n", size, sc_error());
    sc_picture_free(&p);
}

static void test_broken(const char *name) {
    size_t size = 0;
    char path[300];
    snprintf(path, sizeof path, "%s%s", PICTURES, name);
    char *bytes = sc_read_file(path, &size);
    if (!CHECKED(bytes)) return;
    bool png = strstr(name, ".png") != NULL;
    for (size_t n = 0; n < size - (png ? 12 : 0); n += n < 64 ? 1 : 13)
        expect_failure(bytes, n, n < 2 ? "not a PNG or JPEG" : ""); /* no prefix may pass */
    for (size_t at = 0; at < size;
         at += 3) { /* a flipped byte: a PNG notices, a JPEG must only survive */
        bytes[at] = (char)(bytes[at] ^ 0x55);
        sc_picture p;
        CHECK(sc_write_file(temporary("bad"), bytes, size));
        bool loaded = sc_picture_load(&p, temporary("bad"));
        if (!CHECKED(!png || !loaded)) printf("  %s: byte %zu\n", name, at);
        sc_picture_free(&p);
        bytes[at] = (char)(bytes[at] ^ 0x55);
    }
    SC_FREE(bytes);
}

/* The header of a PNG of side x side pixels, with a right checksum and no pixels. */
static void expect_huge(int side, const char *message) {
    uint8_t png[33 + 12] = "\x89PNG\r\n\x1a\n\0\0\0\rIHDR........\x08\x02";
    for (int i = 0; i < 4; i++) png[16 + i] = png[20 + i] = (uint8_t)(side >> (24 - 8 * i));
    for (int i = 0; i < 4; i++) png[29 + i] = (uint8_t)(png_crc(png + 12, 17) >> (24 - 8 * i));
    memcpy(png + 37, "IEND\xae\x42\x60\x82", 8);
    expect_failure(png, sizeof png, message);
}

static void test_huge(void) {
    expect_huge(16000, "16000 x 16000 pixels; at most 64 million");
    expect_huge(100000, "too large");
    expect_huge(0, "cannot decode");
    expect_huge(3, "cannot decode"); /* no pixels at all */
    expect_failure("GIF89a..............", 20, "not a PNG or JPEG");
    sc_picture p;
    CHECK(!sc_picture_load(&p, temporary("absent.png")) &&
          strstr(sc_error(), "absent.png: No such file"));
    CHECK(!sc_picture_load(&p, folder));
}

/* ---- Orientation, in all the places where it may stand ---- */

static void test_orientation(void) {
    static const uint8_t little[] = "Exif\0\0II*\0\x08\0\0\0\x01\0"
                                    "\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    static const uint8_t big[] = "MM\0*\0\0\0\x08\0\x01"
                                 "\x01\x12\0\x04\0\0\0\x01\0\0\0\x05\0\0\0\0"; /* a LONG */
    static const uint8_t many[] = "II*\0\x08\0\0\0\x01\0"
                                  "\x12\x01\x04\0\x02\0\0\0\x1a\0\0\0\0\0\0\0\x07\0\0\0\x03\0\0";
    CHECK(sc_orientation(little, sizeof little, NULL) == 6);
    CHECK(sc_orientation(little + 6, sizeof little - 6, "tiff:Orientation=\"3\"") == 6);
    CHECK(sc_orientation(big, sizeof big, NULL) == 5);
    CHECK(sc_orientation(many, sizeof many, NULL) == 7); /* the first of two */
    CHECK(sc_orientation(NULL, 0, NULL) == 1);
    CHECK(sc_orientation(NULL, 0, "<tiff:Orientation>8</tiff:Orientation>") == 8);
    CHECK(sc_orientation(NULL, 0, "tiff:Orientation='8' tiff:Orientation=\"4\"") == 4);
    CHECK(sc_orientation(NULL, 0, "tiff:Orientation=\"9\" tiff:Orientation") == 1);
    uint8_t other[sizeof little]; /* another tag: then XMP is asked; a wrong value: it is not */
    memcpy(other, little, sizeof other);
    other[16] = 0x11;
    CHECK(sc_orientation(other, sizeof other, "tiff:Orientation=\"3\"") == 3);
    other[16] = 0x12, other[24] = 9;
    CHECK(sc_orientation(other, sizeof other, "tiff:Orientation=\"3\"") == 1);
    for (size_t n = 0; n < sizeof many;
         n++) { /* truncated: read nothing outside (sanitizers watch) */
        uint8_t *copy = malloc(n + 1);
        memcpy(copy, many, n);
        int orientation = sc_orientation(copy, n, NULL);
        CHECK(orientation == 1 || orientation == 7);
        free(copy);
    }
    sc_rng rng = {3};
    for (int i = 0; i < 20000; i++) {
        memcpy(other, little, sizeof other);
        for (int j = 0; j < 3; j++)
            other[sc_uniform_int(&rng, sizeof other)] = (uint8_t)sc_random_bits(&rng);
        int orientation = sc_orientation(other, sizeof other, NULL);
        if (!CHECKED(orientation >= 1 && orientation <= 8)) return;
    }
}

/* rgb.png, 9 x 7, with a chunk before its pixels or, `behind`, before its end. */
static void expect_size(const char *type, const void *data, size_t n, bool behind, int width) {
    size_t size = 0;
    char *file = sc_read_file(PICTURES "rgb.png", &size);
    if (!CHECKED(file)) return;
    size_t at = behind ? size - 12 : 33;
    char *whole;
    size_t length;
    FILE *f = open_memstream(&whole, &length);
    uint8_t *chunk = malloc(n + 12);
    for (int i = 0; i < 4; i++) chunk[i] = (uint8_t)(n >> (24 - 8 * i));
    memcpy(chunk + 4, type, 4);
    memcpy(chunk + 8, data, n);
    for (int i = 0; i < 4; i++)
        chunk[n + 8 + (size_t)i] = (uint8_t)(png_crc(chunk + 4, n + 4) >> (24 - 8 * i));
    fwrite(file, 1, at, f);
    fwrite(chunk, 1, n + 12, f);
    fwrite(file + at, 1, size - at, f);
    fclose(f);
    CHECK(sc_write_file(temporary("bad"), whole, length));
    sc_picture p;
    bool loaded = sc_picture_load(&p, temporary("bad"));
    if (!CHECKED(width ? loaded && p.width == width && p.width + p.height == 16 : !loaded))
        printf("  %.4s: %d x %d, %s\n", type, p.width, p.height, loaded ? "" : sc_error());
    sc_picture_free(&p);
    free(whole), free(chunk), free(file);
}

static void test_png_chunks(void) {
    static const char tiff[] = "MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0";
    static const char xmp[] = "XML:com.adobe.xmp\0\0\0en\0key\0<x tiff:Orientation=\"6\"/>";
    static const char plain[] = "XML:com.adobe.xmp\0<tiff:Orientation>8</tiff:Orientation>";
    static const char raw[] = "Raw profile type exif\0\nexif\n      32\n457869660000"
                              "4d4d002a0000000800010112000300000001\n00060000000000\n";
    expect_size("eXIf", tiff, sizeof tiff, false, 7);
    expect_size("eXIf", tiff, sizeof tiff, true, 7);
    expect_size("iTXt", xmp, sizeof xmp - 1, false, 7);
    expect_size("tEXt", plain, sizeof plain - 1, true, 7);
    expect_size("tEXt", raw, sizeof raw - 1, false, 7);
    expect_size("tEXt", raw + 4, sizeof raw - 5, false, 9); /* another keyword */
    expect_size("CgBI", tiff, 4, false, 0);
    for (size_t n = 0; n < sizeof xmp; n++) expect_size("iTXt", xmp, n, false, n < 49 ? 9 : 7);
    for (int international = 0; international < 2; international++) { /* packed */
        char packed[400];
        const char *keyword = international ? xmp : raw;
        const char *text = strstr(keyword + strlen(keyword) + 1, international ? "<" : "\nexif");
        size_t head = strlen(keyword) + 1;
        int size = 0;
        if (international) text = xmp + sizeof xmp - 1 - strlen("<x tiff:Orientation=\"6\"/>");
        unsigned char *data =
            stbi_zlib_compress((unsigned char *)text, (int)strlen(text), &size, 8);
        memcpy(packed, keyword, head);
        memcpy(packed + head, international ? "\1\0\0\0" : "\0", international ? 4 : 1);
        head += international ? 4 : 1;
        memcpy(packed + head, data, (size_t)size);
        const char *type = international ? "iTXt" : "zTXt";
        expect_size(type, packed, head + (size_t)size, true, 7);
        expect_size(type, packed, head + 4, true, 0); /* cut: it cannot be unpacked */
        free(data);
    }
}

/* A PNG that ends behind its pixels, or in its last chunk. */
static void test_no_end(void) {
    size_t size = 0;
    char *file = sc_read_file(PICTURES "rgb.png", &size);
    sc_picture whole, p;
    if (!CHECKED(file && sc_picture_load(&whole, PICTURES "rgb.png"))) return;
    for (size_t n = size - 12; n < size; n++) {
        CHECK(sc_write_file(temporary("bad"), file, n));
        if (CHECKED(sc_picture_load(&p, temporary("bad")) && p.width == 9))
            CHECK(largest_difference(p.rgb, whole.rgb, 3 * 9 * 7) == 0);
        sc_picture_free(&p);
    }
    sc_picture_free(&whole);
    free(file);
}

/* ---- JPEGs made here: blocks of one value, in two Huffman codes ---- */

static void add_segment(FILE *f, int marker, const void *data, size_t n) {
    const uint8_t head[] = {0xff, (uint8_t)marker, (uint8_t)((n + 2) >> 8), (uint8_t)(n + 2)};
    fwrite(head, 1, 4, f);
    fwrite(data, 1, n, f);
}

/* differences: of each block from the last one of its component, 0 or 64 to 127 in size. `extra`:
 * an APP segment, its marker first. sampling: of the first component, as in its frame. */
static bool load_made(sc_picture *p, int width, int components, int sampling, const char *ids,
                      const int *differences, int blocks, int marker, const void *extra, size_t n) {
    FILE *f = fopen(temporary("bad"), "wb");
    if (!f) return false;
    uint8_t quant[65] = {0}, frame[18] = {8, 0, 8, (uint8_t)(width >> 8), (uint8_t)width}, bits = 0;
    uint8_t scan[16] = {(uint8_t)components};
    static const uint8_t dc[] = "\0\1\1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x07"; /* 0: 7 bits; 10: none */
    static const uint8_t ac[] = "\x10\1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";   /* 0: no more */
    memset(quant + 1, 8, 64); /* the mean of a block counts 8 */
    frame[5] = (uint8_t)components;
    for (int i = 0; i < components; i++) {
        frame[6 + 3 * i] = scan[1 + 2 * i] = (uint8_t)ids[i];
        frame[7 + 3 * i] = (uint8_t)(i ? 0x11 : sampling);
    }
    scan[2 + 2 * components] = 63;
    fputs("\xff\xd8", f);
    if (marker) add_segment(f, marker, extra, n);
    add_segment(f, 0xdb, quant, sizeof quant);
    add_segment(f, 0xc0, frame, (size_t)(6 + 3 * components));
    add_segment(f, 0xc4, dc, sizeof dc);
    add_segment(f, 0xc4, ac, sizeof ac);
    add_segment(f, 0xda, scan, (size_t)(4 + 2 * components));
    int count = 0;
    for (int i = 0; i < blocks; i++) {
        int d = differences[i], length = d ? 9 : 3;
        int code = d ? (d > 0 ? d : d + 127) << 1 : 4;
        for (int bit = length - 1; bit >= 0; bit--) {
            bits = (uint8_t)(bits << 1 | (code >> bit & 1));
            if (++count % 8 == 0) fputc(bits, f);
            if (count % 8 == 0 && bits == 0xff) fputc(0, f);
        }
    }
    for (; count % 8; count++) {
        bits = (uint8_t)(bits << 1 | 1);
        if (count % 8 == 7) fputc(bits, f);
    }
    fputs("\xff\xd9", f);
    CHECK(!fclose(f));
    return sc_picture_load(p, temporary("bad"));
}

static void expect_colour(const sc_picture *p, int x, double r, double g, double b) {
    const double want[3] = {r, g, b};
    int64_t area = (int64_t)p->width * p->height;
    for (int c = 0; c < 3; c++) CHECK_CLOSE(p->rgb[c * area + x] * 127.5 + 127.5, want[c], 2);
}

/* What libjpeg makes of them: CMYK is Adobe's, upside down, whether it says so or not. */
static void test_jpeg_colours(void) {
    static const int cmyk[] = {72, -68, 100, 122}; /* 200, 60, 228, 250 */
    static const char adobe[] = "Adobe\0\x64\0\0\0\0";
    static const char xmp[] = "http://ns.adobe.com/xap/1.0/\0<tiff:Orientation>6<";
    char marker[12];
    sc_picture p;
    for (int transform = -1; transform < 3; transform++) {
        memcpy(marker, adobe, 12);
        marker[11] = (char)(transform < 0 ? 0 : transform);
        if (CHECKED(load_made(&p, 8, 4, 0x11, "\1\2\3\4", cmyk, 4, transform < 0 ? 0 : 0xee, marker,
                              12))) {
            if (transform < 1) expect_colour(&p, 9, 196, 59, 223.5);
            else expect_colour(&p, 9, 0, 101, 172); /* YCCK, which 1 means as well */
        }
        sc_picture_free(&p);
    }
    if (CHECKED(load_made(&p, 8, 3, 0x11, "RGB", cmyk, 3, 0, NULL, 0)))
        expect_colour(&p, 9, 200, 60, 228);
    sc_picture_free(&p);
    CHECK(!load_made(&p, 8, 3, 0x11, "RGB", cmyk, 3, 0xe0, "JFIF\0\1\1\0\0\1\0\1\0\0", 14) &&
          strstr(sc_error(), "convert"));
    if (CHECKED(load_made(&p, 16, 3, 0x11, "\1\2\3", (int[]){0, 0, 0, 0, 0, 0}, 6, 0xe1, xmp,
                          sizeof xmp)))
        CHECK(p.width == 8 && p.height == 16); /* by XMP alone */
    sc_picture_free(&p);
    /* 4:2:2, where the last column has a colour of its own: 128 + 3/4 * 100 before it */
    static const int stripes[] = {0, 0, 0, 0, 0, 0, 0, 100};
    if (CHECKED(load_made(&p, 18, 3, 0x21, "\1\2\3", stripes, 8, 0, NULL, 0))) {
        expect_colour(&p, 15, 163, 110, 128);
        expect_colour(&p, 16, 233, 74, 128);
        expect_colour(&p, 17, 255, 57, 128);
    }
    sc_picture_free(&p);
}

/* What stb does not decode is refused by name. */
static void test_jpeg_kinds(void) {
    static const struct {
        int marker, bits;
        const char *words;
    } cases[] = {{0xc3, 8, "cannot decode"},
                 {0xc9, 8, "cannot decode"},
                 {0xca, 8, "cannot decode"},
                 {0xc1, 12, "cannot decode"}};
    size_t size = 0;
    char *bytes = sc_read_file(PICTURES "exif1.jpg", &size);
    size_t at = 0;
    while (bytes && at + 2 < size && memcmp(bytes + at, "\xff\xc0", 2)) at++;
    for (size_t i = 0; bytes && i < sizeof cases / sizeof *cases; i++) {
        bytes[at + 1] = (char)cases[i].marker;
        bytes[at + 4] = (char)cases[i].bits;
        expect_failure(bytes, size, cases[i].words);
        CHECK(strstr(sc_error(), "convert it"));
    }
    free(bytes);
}

/* ---- Writing ---- */

static void test_save(void) {
    float rgb[3 * 4 * 2];
    for (int i = 0; i < 24; i++) rgb[i] = (float)i / 11.5f - 1;
    rgb[0] = -7, rgb[23] = 7, rgb[5] = NAN;
    sc_picture p = {.width = 4, .height = 2, .rgb = rgb}, back;
    static const char *const texts[] = {NULL, "", "a red apple\nSteps: 3, Seed: 1",
                                        "caf\xc3\xa9 \xf0\x9f\x8d\x8e"};
    for (int i = 0; i < 4; i++) {
        size_t size = 0, n = 0;
        if (!CHECKED(sc_picture_save(&p, temporary("out.png"), texts[i]))) return;
        if (CHECKED(sc_picture_load(&back, temporary("out.png")))) {
            for (int j = 0; j < 24; j++) {
                float want = isnan(rgb[j]) ? -1 : fmaxf(-1, fminf(1, rgb[j]));
                CHECK(fabsf(back.rgb[j] - want) <= 1.001f / 255);
            }
            sc_picture_free(&back);
        }
        char *file = sc_read_file(temporary("out.png"), &size);
        const char *text = !memcmp(file + 37, i == 3 ? "iTXt" : "tEXt", 4) ? file + 41 : NULL;
        size_t head = i == 3 ? 15 : 11;
        if (text) n = big_endian((uint8_t *)file + 33, 4);
        if (texts[i])
            CHECK(text && n == head + strlen(texts[i]) && !memcmp(text, "parameters", 11) &&
                  !memcmp(text + head, texts[i], n - head));
        else CHECK(!text);
        SC_FREE(file);
    }
    CHECK(!sc_picture_save(&p, temporary("no/such/folder.png"), NULL) &&
          strstr(sc_error(), "cannot write"));
    CHECK(!sc_picture_save(&p, folder, NULL)); /* a folder is in the way: nothing is left behind */
    CHECK(rmdir(temporary("out.png")) && remove(temporary("out.png")) == 0);
}

/* ---- Data sets ---- */

/* unused: words about what is left out; NULL: nothing is. */
static void expect_pairs(const char *const *names, const char *const *captions, int count,
                         const char *unused) {
    sc_dataset *d = sc_dataset_open(folder);
    if (d && !CHECKED(unused ? d->unused && strstr(d->unused, unused) : !d->unused))
        printf("  %s\n", d->unused ? d->unused : "none unused");
    if (!CHECKED(d && d->count == count)) {
        printf("  %s\n", d ? "wrong count" : sc_error());
        sc_dataset_close(d);
        return;
    }
    for (int i = 0; i < count; i++)
        if (!CHECKED(!strcmp(d->pairs[i].path, temporary(names[i])) &&
                     !strcmp(d->pairs[i].caption, captions[i])))
            printf("  %d: %s: '%s'\n", i, d->pairs[i].path, d->pairs[i].caption);
    sc_dataset_close(d);
}

static void expect_bad(const char *metadata, const char *message) {
    write_text("metadata.jsonl", metadata);
    sc_dataset *d = sc_dataset_open(folder);
    if (!CHECKED(!d && strstr(sc_error(), message))) printf("  %s: %s\n", message, sc_error());
    sc_dataset_close(d);
}

/* ---- Texts ---- */

static void expect_text(const void *bytes, size_t n, const char *want, const char *error) {
    CHECK(sc_write_file(temporary("bad"), bytes, n));
    char *text = sc_text_load(temporary("bad"));
    if (!CHECKED(want ? text && !strcmp(text, want) : !text && strstr(sc_error(), error)))
        printf("  %s\n", text ? text : sc_error());
    free(text);
}

static void test_texts(void) {
    static const char apple[] = "caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x8d\x8e\r\n";
    static const char little[] = "\xff\xfe"
                                 "c\0a\0f\0\xe9\0 \0\xac\x20 \0\x3c\xd8\x4e\xdf\r\0\n";
    static const char big[] = "\xfe\xff\0c\0a\0f\0\xe9\0 \x20\xac\0 \xd8\x3c\xdf\x4e\0\r\0\n";
    expect_text(apple, strlen(apple), apple, NULL);
    expect_text("\xef\xbb\xbf"
                "a",
                4, "a", NULL);
    expect_text("", 0, "", NULL);
    expect_text("\xef\xbb\xbf", 3, "", NULL);
    expect_text("\xff\xfe", 2, "", NULL);
    expect_text(little, sizeof little, apple, NULL);
    expect_text(big, sizeof big - 1, apple, NULL);
    expect_text(little + 2, sizeof little - 2, NULL, "bad:1: byte 1 (0x00) is no UTF-8 text");
    expect_text(big + 2, sizeof big - 3, NULL, "bad:1: byte 0 (0x00) is no UTF-8 text");
    expect_text(little, sizeof little - 1, NULL, "bad:1: byte 15 (0xed) is no UTF-8 text");
    expect_text("\xff\xfe\x3c\xd8"
                "a",
                6, NULL, "byte 0 (0xed) is no UTF-8 text");
    expect_text("\xff\xfe"
                "a\0\x4e\xdf",
                6, NULL, "byte 1 (0xed) is no UTF-8 text");
    expect_text("\xff\xfe\0\0a\0\0\0", 8, NULL, "byte 0 (0xed) is no UTF-8 text"); /* UTF-32 */
    expect_text("a\ncaf\xe9 au lait", 14, NULL, "bad:2: byte 5 (0xe9) is no UTF-8 text");
    static const char *const bad[] = {
        "\xff", "\xc3(", "\xed\xa0\x80", "\xc0\x80", "\xf4\x90\x80\x80", "\xe2\x82"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        expect_text(bad[i], strlen(bad[i]), NULL, "bad:1: byte 0 (");
}

static void test_dataset(void) {
    CHECK(!sc_dataset_open(folder) && strstr(sc_error(), "no pictures"));
    CHECK(!sc_dataset_open(temporary("absent")) && strstr(sc_error(), "No such file"));
    write_text("b.png", "not opened");
    write_text("b.txt", "\xef\xbb\xbf  a bee \r\n");
    write_text("a.JPG", "");
    CHECK(!sc_dataset_open(folder) &&
          strstr(sc_error(), "no caption for 1 of the pictures, as ") &&
          strstr(sc_error(), "/a.JPG: write"));
    static const char *const more[] = {"1.png", "2.png", "3.png", "4.png", "5.png", "6.png"};
    for (int i = 0; i < 6; i++) write_text(more[i], "");
    CHECK(!sc_dataset_open(folder) && strstr(sc_error(), "no caption for 7 of the pictures, as ") &&
          strstr(sc_error(), "/1.png: write"));
    for (int i = 0; i < 6; i++) remove(temporary(more[i]));
    write_text("a.Txt", "");
    write_text("c.jpeg", "");
    write_text("c.txt", " ok \xe2\x82\xac \xf0\x9f\x8d\x8e ");
    write_text("README.txt", "no caption");
    static const char *const names[] = {"a.JPG", "b.png", "c.jpeg"},
                             *const captions[] = {"", "a bee", "ok \xe2\x82\xac \xf0\x9f\x8d\x8e"};
    expect_pairs(names, captions, 3, NULL);
    write_text(".hidden.png", "");
    write_text("notes.txt", "no picture");
    write_text("d.WebP", "");
    CHECK(mkdir(temporary("sub"), 0777) == 0 && symlink(".", temporary("loop")) == 0);
    write_text("sub/x.png", "");
    write_text("loss.csv", "");
    expect_pairs(names, captions, 3, "4 files are not used: d.WebP loop notes.txt sub/x.png (");
    write_text("d.txt", "");
    expect_pairs(names, captions, 3, "4 files are");
    write_text("sub/x.txt", ""); /* two of three have captions */
    CHECK(!sc_dataset_open(folder) && strstr(sc_error(), "notes.txt sub/x.png (") &&
          strstr(sc_error(), "most have captions"));
    remove(temporary("loop")), remove(temporary("d.WebP")), remove(temporary("d.txt"));
    remove(temporary("sub/x.txt")), remove(temporary(".hidden.png"));
    write_text("c.txt", "caf\xe9");
    CHECK(!sc_dataset_open(folder) && strstr(sc_error(), "c.txt:1: byte 3 (0xe9)"));
    write_text("c.txt", "");
    write_text(
        "metadata.jsonl",
        "\xef\xbb\xbf{\"file_name\": \"z.png\", \"prompt\": \"last\", \"text\": \"last\"}\r\n\n"
        "{\"file_name\": \"./sub/x.png\", \"text\": \"caf\\u00e9\"}\n   \n"
        "{\"caption\": \"\", \"file_name\": \"y.png\", \"extra\": [1]}");
    CHECK(!sc_dataset_open(folder) &&
          strstr(sc_error(), "3 files are not used: "
                             "a.JPG b.png c.jpeg (used are those that"));
    remove(temporary("a.Txt")), remove(temporary("b.txt")), remove(temporary("c.txt"));
    expect_pairs((const char *[]){"sub/x.png", "y.png", "z.png"},
                 (const char *[]){"caf\xc3\xa9", "", "last"}, 3, ": a.JPG b.png c.jpeg (");
    remove(temporary("a.JPG")), remove(temporary("b.png")), remove(temporary("c.jpeg"));
    expect_pairs((const char *[]){"sub/x.png", "y.png", "z.png"},
                 (const char *[]){"caf\xc3\xa9", "", "last"}, 3, NULL);
    CHECK(remove(temporary("sub/x.png")) == 0 && rmdir(temporary("sub")) == 0);
    expect_bad("", "no pictures");
    expect_bad("{\"file_name\": \"a.png\", \"prompt\": \"x\"}\n{\"file_name\": ",
               "metadata.jsonl:2");
    expect_bad("{\"prompt\": \"x\"}", "no 'file_name'");
    expect_bad("{\"file_name\": 3, \"prompt\": \"x\"}", "no 'file_name'");
    expect_bad("{\"file_name\": \"a.png\"}", "no 'prompt', 'text' or 'caption'");
    expect_bad("[]", "no 'file_name'");
    expect_bad("{\"file_name\": \"a.png\", \"prompt\": \"\\udce9\"}", "is no character");
    expect_bad("\n{\"file_name\": \"a.png\", \"prompt\": \"\xe9\"}", "jsonl:2: byte 35 (0xe9)");
    expect_bad("{\"file_name\": \"a.png\", \"prompt\": 5, \"text\": \"x\"}", "are no text");
    expect_bad("{\"file_name\": \"../a.png\", \"prompt\": \"x\"}", "no plain path in");
    expect_bad("{\"file_name\": \"/etc/passwd\", \"prompt\": \"x\"}", "no plain path in");
    expect_bad("{\"file_name\": \"a/../../b.png\", \"prompt\": \"x\"}", "no plain path in");
    expect_bad("{\"file_name\": \"a//b.png\", \"prompt\": \"x\"}", "no plain path in");
    expect_bad("{\"file_name\": \"a.png\", \"prompt\": \"\", \"text\": \"x\", \"caption\": \"y\"}",
               "of a.png differ");
    char *longest = malloc(300000);
    int n = sprintf(longest, "{\"file_name\": \"a.png\", \"prompt\": \"");
    memset(longest + n, 'a', 250000);
    strcpy(longest + n + 250000, "\"}");
    write_text("metadata.jsonl", longest);
    sc_dataset *d = sc_dataset_open(folder);
    CHECK(d && d->count == 1 && strlen(d->pairs[0].caption) == 250000);
    sc_dataset_close(d);
    free(longest);
}

int main(void) {
    sc_file *reference = sc_file_open(PICTURES "reference.safetensors");
    if (!CHECKED(reference && mkdtemp(folder))) return test_report();
    test_kinds(reference);
    test_fit(reference);
    sc_file_close(reference);
    test_buckets();
    test_broken("rgb.png");
    test_broken("deep4.png");
    test_broken("exif6.jpg");
    test_broken("progressive.jpg");
    test_huge();
    test_orientation();
    test_png_chunks();
    test_no_end();
    test_jpeg_colours();
    test_jpeg_kinds();
    test_save();
    test_texts();
    remove(temporary("bad"));
    test_dataset();
    remove(temporary("README.txt")), remove(temporary("notes.txt"));
    remove(temporary("loss.csv")), remove(temporary("metadata.jsonl"));
    CHECK(rmdir(folder) == 0); /* no temporary file of ours is left */
    return test_report();
}
