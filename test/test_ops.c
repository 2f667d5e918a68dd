/* The backward pass of every recorded operation against central differences, on small odd shapes:
 * each input on its own, in the direction of a random vector, by Richardson's extrapolation of two
 * steps, so that what is left is f32's rounding. And checkpointing against keeping everything. */
#define _POSIX_C_SOURCE 200809L
#include <stdbool.h>
#include <stdlib.h>
static bool no_floats; /* no memory for floats: what operations work in */
static void *test_calloc(size_t n, size_t size) {
    return no_floats && size == sizeof(float) ? NULL : calloc(n, size);
}
#define SC_CALLOC test_calloc
#define SC_REALLOC realloc
#define SC_FREE free
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"
#include "test.h"

enum { MAX_LEAVES = 12, MAX_VALUES = 1024 };

/* What an operation reads: tensors whose gradients are checked. */
typedef struct leaves {
    int count;
    sc_tensor x[MAX_LEAVES];
    float data[MAX_LEAVES][MAX_VALUES], grad[MAX_LEAVES][MAX_VALUES];
} leaves;
typedef sc_tensor *(*operation)(sc_tape *t, leaves *l);

static leaves now; /* of the operation being tested */
static sc_rng rng = {11};
static const uint8_t *sets; /* of the samples */

static sc_tensor *leaf(int ndim, int64_t a, int64_t b, int64_t c) {
    int i = now.count++;
    sc_tensor *x = &now.x[i];
    *x = (sc_tensor){.data = now.data[i],
                     .grad = now.grad[i],
                     .needs_grad = true,
                     .ndim = ndim,
                     .shape = {a, b, c}};
    if (i >= MAX_LEAVES || sc_count(x) > MAX_VALUES) abort();
    sc_normal(&rng, now.data[i], sc_count(x));
    return x;
}

/* Mean square distance of the operation's result to random goals, summed in double. */
static double objective(sc_tape *t, operation op, bool backward) {
    static float goal[4 * MAX_VALUES];
    sc_rng goals = {5};
    double loss = NAN;
    sc_normal(&goals, goal, 4 * MAX_VALUES);
    sc_tape_reset(t);
    sc_tape_record(t, backward);
    sc_tape_use(t, sets);
    sc_tensor *y = op(t, &now);
    if (!y || sc_count(y) > 4 * MAX_VALUES) return NAN;
    sc_tensor target = {.data = goal, .ndim = 1, .shape = {sc_count(y)}};
    bool ok = sc_mse(t, y, &target, 1, &loss) && (!backward || sc_backward(t));
    double sum = 0;
    const float *values = y->data;
    for (int64_t i = 0; i < sc_count(y); i++)
        sum += ((double)values[i] - goal[i]) * ((double)values[i] - goal[i]);
    sum /= (double)sc_count(y);
    sc_tape_record(t, false);
    return ok && fabs(loss - sum) <= 1e-5 * sum ? sum : NAN;
}

static double difference(sc_tape *t, operation op, float *x, const float *direction, int64_t n,
                         float h) {
    double side[2];
    float start[MAX_VALUES];
    memcpy(start, x, (size_t)n * 4);
    for (int s = 0; s < 2; s++) {
        for (int64_t i = 0; i < n; i++) x[i] = start[i] + (s ? -h : h) * direction[i];
        side[s] = objective(t, op, false);
    }
    memcpy(x, start, (size_t)n * 4);
    return (side[0] - side[1]) / (2 * (double)h);
}

/* `now` holds the inputs, made by leaf(). Forgets them. */
static void check(const char *name, operation op) {
    static const float h = 0.03f;
    sc_tape *t = sc_tape_new(sc_cpu());
    memset(now.grad, 0, sizeof now.grad);
    CHECK(isfinite(objective(t, op, true)));
    for (int i = 0; i < now.count; i++) {
        float direction[MAX_VALUES];
        int64_t n = sc_count(&now.x[i]);
        double slope = 0, norm = 0;
        sc_normal(&rng, direction, n);
        for (int64_t j = 0; j < n; j++)
            slope += (double)now.grad[i][j] * direction[j],
                norm += (double)now.grad[i][j] * now.grad[i][j];
        double wide = difference(t, op, now.data[i], direction, n, 2 * h);
        double narrow = difference(t, op, now.data[i], direction, n, h);
        double measured = (4 * narrow - wide) / 3;
        bool ok = fabs(measured - slope) <= 1e-3 * sqrt(norm) + 1e-5 && norm > 0;
        if (!ok)
            printf("%s: input %d: slope %g, measured %g, norm %g\n", name, i, slope, measured,
                   sqrt(norm));
        CHECK(ok);
    }
    now.count = 0;
    sc_tape_free(t);
}

/* ---- Elementwise, and moving data ---- */

static sc_activation kind;
static sc_tensor *op_activate(sc_tape *t, leaves *l) { return sc_activate(t, kind, &l->x[0]); }
static sc_tensor *op_add(sc_tape *t, leaves *l) { return sc_add(t, &l->x[0], &l->x[1]); }
static sc_tensor *op_mse(sc_tape *t, leaves *l) { return (void)t, &l->x[0]; }
static sc_tensor *op_concat(sc_tape *t, leaves *l) {
    return sc_concat_tokens(t, &l->x[0], &l->x[1]);
}
static sc_tensor *op_slice(sc_tape *t, leaves *l) { return sc_slice_tokens(t, &l->x[0], 2, 3); }
/* A tensor that several operations read gets the sum of their gradients. */
static sc_tensor *op_shared(sc_tape *t, leaves *l) {
    sc_tensor *y = sc_activate(t, SC_SILU, &l->x[0]);
    sc_tensor *z = sc_concat_tokens(t, y, sc_slice_tokens(t, &l->x[0], 1, 2));
    return sc_concat_tokens(t, z, sc_add(t, y, sc_add(t, &l->x[0], y)));
}

static void test_elementwise(void) {
    static const char *const names[] = {"silu", "gelu tanh", "gelu", "quick gelu"};
    for (int i = 0; i < 4; i++) {
        kind = (sc_activation)i;
        leaf(3, 2, 5, 7), check(names[i], op_activate);
    }
    leaf(3, 3, 1, 5), leaf(3, 3, 1, 5), check("add", op_add);
    leaf(3, 1, 3, 5), check("mse", op_mse);
    leaf(3, 3, 2, 5), leaf(3, 3, 4, 5), check("concatenated tokens", op_concat);
    leaf(3, 2, 7, 3), check("sliced tokens", op_slice);
    leaf(3, 2, 1, 3), leaf(3, 2, 7, 3), check("concatenated to one token", op_concat);
    leaf(3, 2, 5, 3), check("shared input", op_shared);
}

/* ---- Norms and gates ---- */

static sc_tensor *op_modulate(sc_tape *t, leaves *l) {
    return sc_ln_modulate(t, &l->x[0], &l->x[1], 2, 0);
}
static sc_tensor *op_gate(sc_tape *t, leaves *l) {
    return sc_gated_residual(t, &l->x[0], &l->x[1], &l->x[2], 1);
}

static sc_tensor rope; /* [T, D/2, 2] */
static sc_tensor *op_rope(sc_tape *t, leaves *l) {
    return sc_norm_rope(t, &l->x[0], &l->x[1], &l->x[2], &l->x[3], &rope);
}
static sc_tensor *op_image_rope(sc_tape *t, leaves *l) {
    return sc_norm_rope(t, NULL, &l->x[0], NULL, &l->x[1], &rope);
}

static void test_norms(void) {
    static float turns[9][6];
    for (int i = 0; i < 9 * 3; i++) {
        float angle = 6 * sc_uniform(&rng);
        turns[i / 3][i % 3 * 2] = cosf(angle), turns[i / 3][i % 3 * 2 + 1] = sinf(angle);
    }
    rope = (sc_tensor){.data = turns, .ndim = 3, .shape = {9, 3, 2}};
    leaf(3, 2, 5, 7), leaf(2, 2, 21, 0), check("modulated layer norm", op_modulate);
    leaf(3, 3, 1, 33), leaf(2, 3, 99, 0), check("modulated layer norm of one token", op_modulate);
    leaf(3, 2, 5, 7), leaf(3, 2, 5, 7), leaf(2, 2, 14, 0), check("gated residual", op_gate);
    leaf(3, 2, 4, 18), leaf(3, 2, 5, 18), leaf(1, 6, 0, 0), leaf(1, 6, 0, 0),
        check("norm and rope", op_rope);
    leaf(3, 3, 7, 12), leaf(1, 6, 0, 0), check("norm and rope without text", op_image_rope);
}

/* ---- Attention ---- */

static int heads;
static sc_tensor *op_attention(sc_tape *t, leaves *l) {
    return sc_attention(t, &l->x[0], &l->x[1], &l->x[2], heads, 0.4f, NULL, false);
}
static sc_tensor *op_self_attention(sc_tape *t, leaves *l) {
    return sc_attention(t, &l->x[0], &l->x[0], &l->x[0], heads, 0.4f, NULL, false);
}

/* Queries alone want a gradient: keys and values are constants, and stay so. */
static float numbers[2][24];
static sc_tensor constants[2] = {{.data = numbers[0], .ndim = 3, .shape = {2, 3, 4}},
                                 {.data = numbers[1], .ndim = 3, .shape = {2, 3, 4}}};
static sc_tensor *op_queries(sc_tape *t, leaves *l) {
    return sc_attention(t, &l->x[0], &constants[0], &constants[1], 2, 0.2f, NULL, false);
}

static void test_attention(void) {
    sc_normal(&rng, numbers[0], 48);
    leaf(3, 2, 5, 4), check("attention to constants", op_queries);
    CHECK(!constants[0].needs_grad && !constants[0].grad && !constants[1].grad);
    static const int shapes[][4] = {
        {1, 1, 2, 1}, {2, 5, 6, 3}, {1, 13, 10, 2}, {3, 17, 8, 1}, {1, 67, 8, 2}};
    for (int i = 0; i < 5; i++) { /* B, T, C, H */
        const int *s = shapes[i];
        heads = s[3];
        if (s[1] == 1) { /* one token: its weight is 1 whatever q and k are */
            leaf(3, 1, 1, 2), check("attention to oneself", op_self_attention);
            continue;
        }
        for (int k = 0; k < 3; k++) leaf(3, s[0], s[1], s[2]);
        check("attention", op_attention);
    }
}

/* The softmax's sums for a prompt of 12 tokens padded to 512, against double: the pads' weights are
 * all the same, so that the roundings of one long sum all go one way. */
static void test_padding(void) {
    enum { T = 512, WORDS = 12, D = 64 };
    static float q[T * D], k[T * D], o[T * D], lse[T];
    sc_tensor query = {.data = q, .ndim = 3, .shape = {1, T, D}}, key = query, out = query;
    key.data = k, out.data = o;
    sc_rng random = {7};
    sc_normal(&random, q, T * D), sc_normal(&random, k, T * D);
    for (int i = WORDS * D; i < T * D; i++) k[i] = k[i - D];
    sc_cpu()->attention(&out, lse, &query, &key, &key, 1, 0.3f, NULL, false);
    double far = 0;
    for (int i = 0; i < T; i++) {
        double sum = 0;
        for (int j = 0; j < T; j++) {
            double score = 0;
            for (int d = 0; d < D; d++) score += (double)q[i * D + d] * k[j * D + d];
            sum += exp(score * (double)0.3f);
        }
        far = fmax(far, fabs(lse[i] - log(sum)));
    }
    printf("sums over padding: error %.1e\n", far);
    CHECK(far < 5e-6);
}

/* ---- Linear layers with LoRA ---- */

static sc_linear_layer layer;
static sc_tensor *op_linear(sc_tape *t, leaves *l) { return sc_linear(t, &l->x[0], &layer); }
static sc_tensor *op_gelu(sc_tape *t, leaves *l) { return sc_linear_gelu(t, &l->x[0], &layer); }
static sc_tensor *op_joined(sc_tape *t, leaves *l) { /* a tensor beside gelu(linear(itself)) */
    return sc_concat_gelu(t, &l->x[0], &l->x[0], &layer);
}

/* Three samples, each with the set in of_sample, or all with the teacher's, which has no LoRA. Two
 * LoRAs of different ranks lie on the layer; what sets nobody uses hold gets no gradient, so they
 * are no leaves. */
static void check_layer(const char *name, operation op, const uint8_t *of_sample) {
    static sc_adapter adapters[2];
    bool used[SC_SETS] = {false};
    for (int i = 0; of_sample && i < 3; i++) used[of_sample[i]] = true;
    sc_tensor *x = leaf(3, 3, 2, 5), *weight = leaf(2, 7, 5, 0);
    (void)x;
    layer = (sc_linear_layer){weight, leaf(1, 7, 0, 0), adapters};
    for (int i = 0; i < 2; i++) {
        adapters[i] = (sc_adapter){
            .rank = 1 + 2 * i, .scale = 0.7f - (float)i, .next = i ? NULL : &adapters[1]};
        for (int s = SC_STUDENT; s < SC_SETS; s++)
            if (used[s])
                adapters[i].a[s] = *leaf(2, 1 + 2 * i, 5, 0),
                adapters[i].b[s] = *leaf(2, 7, 1 + 2 * i, 0);
    }
    sets = of_sample;
    check(name, op);
    sets = NULL;
}
static void check_linear(const char *name, const uint8_t *of_sample) {
    check_layer(name, op_linear, of_sample);
    check_layer(name, op_gelu, of_sample);
    check_layer(name, op_joined, of_sample);
}

static void test_linear(void) {
    check_linear("linear", NULL);
    check_linear("linear, student", (const uint8_t[]){SC_STUDENT, SC_STUDENT, SC_STUDENT});
    check_linear("linear, fast", (const uint8_t[]){SC_FAST, SC_FAST, SC_FAST});
    check_linear("linear, slow last", (const uint8_t[]){SC_TEACHER, SC_TEACHER, SC_SLOW});
    check_linear("linear, student first", (const uint8_t[]){SC_STUDENT, SC_TEACHER, SC_TEACHER});
    check_linear("linear, fast, teacher, fast", (const uint8_t[]){SC_FAST, SC_TEACHER, SC_FAST});
    check_linear("linear, teacher, slow, student",
                 (const uint8_t[]){SC_TEACHER, SC_SLOW, SC_STUDENT});
    check_linear("linear, slow, slow, fast", (const uint8_t[]){SC_SLOW, SC_SLOW, SC_FAST});
    layer = (sc_linear_layer){0}; /* no bias, large enough for threads to share the product */
    leaf(3, 1, 50, 20), layer.weight = leaf(2, 40, 20, 0), check("large linear", op_linear);
}

/* ---- Blocks: recomputed, or kept ---- */

typedef struct block {
    sc_linear_layer up, down;
} block;

/* Two outputs, one of which the next block and the end both read. */
static bool run_block(sc_tape *t, sc_tensor **in, sc_tensor **out, const void *context) {
    const block *b = context;
    sc_tensor *n = sc_ln_modulate(t, in[0], in[1], 0, 1);
    sc_tensor *o = sc_attention(t, n, in[0], n, 2, 0.5f, NULL, false);
    sc_tensor *hidden = sc_activate(t, SC_GELU_TANH, sc_linear(t, sc_add(t, o, in[0]), &b->up));
    out[0] = sc_gated_residual(t, in[0], sc_linear(t, hidden, &b->down), in[1], 2);
    out[1] = sc_activate(t, SC_SILU, o);
    return out[0] && out[1];
}

static block blocks[2];
static int how; /* 0: plainly, 1: run again, 2: kept, 3: one each */
static sc_tensor *op_blocks(sc_tape *t, leaves *l) {
    sc_tensor *in[2] = {&l->x[0], &l->x[1]}, *first[2] = {NULL, NULL}, *second[2] = {NULL, NULL};
    for (int i = 0; i < 2; i++) {
        sc_tensor **from = in, **out = i ? second : first, *after[2] = {first[0], &l->x[1]};
        if (i) from = after;
        bool kept = how == 2 || (how == 3 && i == 1);
        bool ok = how ? sc_run_block(t, run_block, &blocks[i], from, 2, out, kept)
                      : run_block(t, from, out, &blocks[i]);
        if (!ok) return NULL;
    }
    return sc_concat_tokens(t, sc_concat_tokens(t, second[0], second[1]),
                            sc_add(t, first[0], first[1]));
}

static void make_blocks(void) {
    leaf(3, 2, 3, 6), leaf(2, 2, 18, 0);
    for (int i = 0; i < 2; i++) {
        blocks[i].up = (sc_linear_layer){leaf(2, 8, 6, 0), leaf(1, 8, 0, 0), NULL};
        blocks[i].down = (sc_linear_layer){leaf(2, 6, 8, 0), leaf(1, 6, 0, 0), NULL};
    }
    for (int i = 1; i < now.count;
         i++) /* weights and modulations small enough that two blocks stay smooth */
        for (int j = 0; j < MAX_VALUES; j++) now.data[i][j] *= 0.3f;
}

/* A kept block whose results nobody reads is not walked, and takes no memory back. */
static void test_unread_block(void) {
    sc_tape *t = sc_tape_new(sc_cpu());
    make_blocks();
    double loss = 0, again = 1;
    static float grad[MAX_VALUES];
    for (int unread = 0; unread < 2; unread++) {
        memset(now.grad, 0, sizeof now.grad);
        sc_tape_reset(t);
        sc_tape_record(t, true);
        sc_tensor *in[2] = {&now.x[0], &now.x[1]}, *out[2] = {NULL, NULL}, *none[2] = {NULL, NULL};
        CHECK(sc_run_block(t, run_block, &blocks[0], in, 2, out, false));
        if (unread) CHECK(sc_run_block(t, run_block, &blocks[1], in, 2, none, true));
        CHECK(sc_mse(t, sc_add(t, out[0], out[1]), in[0], 1, unread ? &again : &loss));
        sc_tape_record(t, false); /* the way back records what it needs by itself */
        CHECK(sc_backward(t));
        if (!unread) memcpy(grad, now.grad[0], sizeof grad);
    }
    CHECK(loss == again && rel_error(now.grad[0], grad, sc_count(&now.x[0])) == 0);
    CHECK(grad[0] != 0);
    now.count = 0;
    sc_tape_free(t);
}

/* ---- Too little memory: an operation cannot say so, the next download does ---- */

static void short_of_memory(sc_tape *t, const sc_tensor *x) {
    float *values = malloc((size_t)sc_count(x) * sizeof *values);
    CHECK(!sc_read(t, x, values) && strstr(sc_error(), "out of memory"));
    no_floats = false;
    CHECK(sc_read(t, x, values));
    no_floats = true;
    free(values);
}

static void test_memory(void) {
    enum { WIDE = 2048 };
    sc_tape *t = sc_tape_new(sc_cpu());
    uint16_t *half = calloc(WIDE * WIDE, sizeof *half);
    sc_tensor weight = {.data = half, .dtype = SC_BF16, .ndim = 2, .shape = {WIDE, WIDE}};
    sc_tensor kernel = {.data = half, .dtype = SC_BF16, .ndim = 4, .shape = {256, 512, 3, 3}};
    sc_linear_layer wide = {.weight = &weight};
    const int64_t shape[] = {1, 2, WIDE}, picture[] = {1, 512, 2, 4};
    sc_tensor *x = sc_new(t, 3, shape), *p = sc_new(t, 4, picture);
    sc_cpu()->zero(x->data, 2 * WIDE * sizeof(float));
    sc_cpu()->zero(p->data, 4096 * sizeof(float));
    no_floats = true;
    short_of_memory(t, sc_linear(t, x, &wide));
    short_of_memory(t, sc_linear_gelu(t, x, &wide));
    short_of_memory(t, sc_attention(t, x, x, x, 4, 1, NULL, false));
    short_of_memory(t, sc_conv2d(t, p, &kernel, NULL, 1, 1));
    x->needs_grad = true;
    sc_tape_record(t, true);
    sc_tensor *o = sc_attention(t, x, x, x, 4, 1, NULL, false);
    double loss;
    CHECK(o && sc_mse(t, o, x, 1, &loss) && sc_backward(t));
    short_of_memory(t, o);
    no_floats = false;
    free(half);
    sc_tape_free(t);
}

/* A convolution that the backends cannot do; a NaN in 8 bits. */
static void test_limits(void) {
    sc_tape *t = sc_tape_new(sc_cpu());
    sc_tensor *x = sc_new(t, 4, (const int64_t[]){1, 2, 8, 8});
    sc_tensor large = {.data = x->data, .ndim = 4, .shape = {1, 2, 7, 7}}, other = large;
    other.shape[1] = 3, other.shape[2] = other.shape[3] = 3;
    CHECK(!sc_conv2d(t, x, &large, NULL, 1, 3) && strstr(sc_error(), "convolution"));
    CHECK(!sc_conv2d(t, x, &other, NULL, 1, 1) && strstr(sc_error(), "convolution"));
    sc_tensor head = {.data = x->data, .ndim = 1, .shape = {258}},
              wide = {.data = x->data, .ndim = 3, .shape = {1, 1, 258}};
    CHECK(!sc_norm_rope(t, NULL, &wide, NULL, &head, x) && strstr(sc_error(), "256"));
    const float row[3] = {1, NAN, -2};
    uint8_t bits[4];
    float scale, back[4];
    sc_cpu()->quantize(bits, &scale, row, 1, 3);
    sc_to_f32(back, bits, SC_F8_E4M3, 3);
    CHECK(back[2] * scale == -2 && isnan(back[1]));
    sc_tape_free(t);
}

static void test_blocks(void) {
    static float plain[MAX_LEAVES][MAX_VALUES];
    sc_tape *t = sc_tape_new(sc_cpu());
    how = 0, make_blocks(), check("two blocks", op_blocks);
    make_blocks();
    int count = now.count;
    double loss = 0;
    for (how = 0; how < 4; how++) {
        memset(now.grad, 0, sizeof now.grad);
        double value = objective(t, op_blocks, true);
        if (how == 0) memcpy(plain, now.grad, sizeof plain), loss = value;
        CHECK(value == loss);
        for (int i = 0; i < count; i++) {
            CHECK(rel_error(now.grad[i], plain[i], sc_count(&now.x[i])) < 1e-6);
        }
    }
    now.count = 0;
    sc_tape_free(t);
}

int main(void) {
    test_elementwise();
    test_norms();
    test_attention();
    test_padding();
    test_linear();
    test_blocks();
    test_unread_block();
    test_memory();
    test_limits();
    return test_report();
}
