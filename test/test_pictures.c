/* Pictures and data sets: PNGs and JPEGs against Pillow (test/reference/make_pictures.py),
 * scaling, buckets, EXIF, broken files, the parameters chunk, and folders good and bad. */
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
    CHECK(sc__write_file(temporary(name), text, strlen(text)));
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
        {128, 128, 128, 16, 128, 128},   {300, 200, 128, 16, 160, 96},
        {7, 9, 16, 32, 32, 32},
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
            sc_bucket(width, height, 512, 32, &w, &h);
            if (!CHECKED(w >= 32 && h >= 32 && w % 32 == 0 && h % 32 == 0 && w * h <= 512 * 512 &&
                         w <= 1024 && h <= 1024))
                return;
        }
}

/* ---- Broken files: every prefix, every flipped byte ---- */

static void expect_failure(const void *bytes, size_t size, const char *message) {
    sc_picture p;
    CHECK(sc__write_file(temporary("bad"), bytes, size));
    bool loaded = sc_picture_load(&p, temporary("bad"));
    if (!CHECKED(!loaded && !p.rgb && strstr(sc_error(), message)))
        printf("  %zu bytes: %s\n", size, sc_error());
    sc_picture_free(&p);
}

static void test_broken(const char *name) {
    size_t size = 0;
    char path[300];
    snprintf(path, sizeof path, "%s%s", PICTURES, name);
    char *bytes = sc__read_file(path, &size);
    if (!CHECKED(bytes)) return;
    for (size_t n = 0; n < size; n += n < 64 ? 1 : 13)
        expect_failure(bytes, n, n < 4 ? "not a PNG or JPEG" : ""); /* no prefix may pass */
    bool png = strstr(name, ".png") != NULL;
    for (size_t at = 0; at < size;
         at += 3) { /* a flipped byte: a PNG notices, a JPEG must only survive */
        bytes[at] = (char)(bytes[at] ^ 0x55);
        sc_picture p;
        CHECK(sc__write_file(temporary("bad"), bytes, size));
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
    for (int i = 0; i < 4; i++) png[29 + i] = (uint8_t)(sc__crc(png + 12, 17) >> (24 - 8 * i));
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

static void test_exif(void) {
    static const uint8_t jpeg[] = "\xff\xd8\xff\xe0\0\x04JF\xff\xff\xe1\0\x22"
                                  "Exif\0\0"
                                  "II*\0\x08\0\0\0"
                                  "\x01\0"
                                  "\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0\xff\xda";
    CHECK(sc_exif_orientation(jpeg, sizeof jpeg) == 6);
    for (size_t n = 0; n < 40;
         n++) { /* truncated blocks: read nothing outside (sanitizers watch) */
        uint8_t *copy = malloc(n + 1);
        memcpy(copy, jpeg, n);
        int orientation = sc_exif_orientation(copy, n);
        CHECK(orientation == 1 || orientation == 6);
        free(copy);
    }
    uint8_t wild[sizeof jpeg];
    sc_rng rng = {3};
    for (int i = 0; i < 20000; i++) {
        memcpy(wild, jpeg, sizeof jpeg);
        for (int j = 0; j < 3; j++)
            wild[sc_uniform_int(&rng, sizeof wild)] = (uint8_t)sc_random_bits(&rng);
        int orientation = sc_exif_orientation(wild, sizeof wild);
        if (!CHECKED(orientation >= 1 && orientation <= 8)) return;
    }
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
        size_t size = 0, at = 0, n = 0;
        if (!CHECKED(sc_picture_save(&p, temporary("out.png"), texts[i]))) return;
        if (CHECKED(sc_picture_load(&back, temporary("out.png")))) {
            for (int j = 0; j < 24; j++) {
                float want = isnan(rgb[j]) ? -1 : fmaxf(-1, fminf(1, rgb[j]));
                CHECK(fabsf(back.rgb[j] - want) <= 1.001f / 255);
            }
            sc_picture_free(&back);
        }
        char *file = sc__read_file(temporary("out.png"), &size);
        const char *text =
            (const char *)sc__chunk((uint8_t *)file, size, &at, i == 3 ? "iTXt" : "tEXt", &n);
        size_t head = i == 3 ? 15 : 11;
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

static void expect_pairs(const char *const *names, const char *const *captions, int count) {
    sc_dataset *d = sc_dataset_open(folder);
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

static void test_dataset(void) {
    CHECK(!sc_dataset_open(folder) && strstr(sc_error(), "no pictures"));
    CHECK(!sc_dataset_open(temporary("absent")) && strstr(sc_error(), "No such file"));
    write_text("b.png", "not opened");
    write_text("b.txt", "\xef\xbb\xbf  a bee \r\n");
    write_text("a.JPG", "");
    CHECK(!sc_dataset_open(folder) &&
          strstr(sc_error(), "no caption for 1 of the pictures: a.JPG:"));
    static const char *const more[] = {"1.png", "2.png", "3.png", "4.png", "5.png", "6.png"};
    for (int i = 0; i < 6; i++) write_text(more[i], "");
    CHECK(!sc_dataset_open(folder) && strstr(sc_error(), "no caption for 7 of the pictures: ") &&
          strstr(sc_error(), " ...: write"));
    for (int i = 0; i < 6; i++) remove(temporary(more[i]));
    write_text("a.txt", "");
    write_text("c.jpeg", "");
    write_text("c.txt", "bad \xff\xc3( \xed\xa0\x80 \xc0\x80 \xf4\x90\x80\x80 ok \xe2\x82\xac "
                        "\xf0\x9f\x8d\x8e\xe2\x82");
    write_text("notes.txt", "no picture");
#define BAD "\xef\xbf\xbd"
    expect_pairs((const char *[]){"a.JPG", "b.png", "c.jpeg"},
                 (const char *[]){"", "a bee",
                                  "bad " BAD BAD "( " BAD BAD BAD " " BAD BAD " " BAD BAD BAD BAD
                                  " ok \xe2\x82\xac \xf0\x9f\x8d\x8e" BAD BAD},
                 3);
    write_text(
        "metadata.jsonl",
        "\xef\xbb\xbf{\"file_name\": \"z.png\", \"prompt\": \"last\", \"text\": \"unused\"}\r\n\n"
        "{\"file_name\": \"sub/y.png\", \"text\": \"caf\\u00e9\"}\n   \n"
        "{\"caption\": \"\", \"file_name\": \"y.png\", \"extra\": [1]}");
    expect_pairs((const char *[]){"sub/y.png", "y.png", "z.png"},
                 (const char *[]){"caf\xc3\xa9", "", "last"}, 3);
    expect_bad("", "no pictures");
    expect_bad("{\"file_name\": \"a.png\", \"prompt\": \"x\"}\n{\"file_name\": ",
               "metadata.jsonl:2");
    expect_bad("{\"prompt\": \"x\"}", "no 'file_name'");
    expect_bad("{\"file_name\": 3, \"prompt\": \"x\"}", "no 'file_name'");
    expect_bad("{\"file_name\": \"a.png\"}", "no 'prompt', 'text' or 'caption'");
    expect_bad("[]", "no 'file_name'");
    expect_bad("{\"file_name\": \"../a.png\", \"prompt\": \"x\"}", "outside the folder");
    expect_bad("{\"file_name\": \"/etc/passwd\", \"prompt\": \"x\"}", "outside the folder");
    expect_bad("{\"file_name\": \"a/../../b.png\", \"prompt\": \"x\"}", "outside the folder");
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
    test_exif();
    test_save();
    remove(temporary("bad"));
    test_dataset();
    static const char *const left[] = {"a.JPG",  "a.txt", "b.png",     "b.txt",
                                       "c.jpeg", "c.txt", "notes.txt", "metadata.jsonl"};
    for (size_t i = 0; i < sizeof left / sizeof *left; i++) remove(temporary(left[i]));
    CHECK(rmdir(folder) == 0); /* no temporary file of ours is left */
    return test_report();
}
