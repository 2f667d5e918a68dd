/* gradients MODEL IN OUT: the velocity of a transformer with a LoRA of scale 1, and the gradient of
 * its mean squared distance from `goal`. IN: x [B,T,C], context, pooled, time, goal, grid (rows,
 * columns), <layer>.a and <layer>.b of every layer that is trained; OUT: velocity, and gradients
 * under these names. */
#define _POSIX_C_SOURCE 200809L
#define SHORTCUT_IMPLEMENTATION
#include "../shortcut.h"

static void stop(const char *why) {
    fprintf(stderr, "%s\n", why);
    exit(1);
}

static float *load(const sc_file *f, const char *name, int64_t count) {
    const sc_tensor *x = sc_file_find(f, name);
    if (!x || x->dtype != SC_F32 || (count && sc_count(x) != count)) stop(name);
    float *values = malloc((size_t)sc_count(x) * sizeof *values);
    memcpy(values, x->data, (size_t)sc_count(x) * sizeof *values);
    return values;
}

static sc_tensor *input(const sc_file *f, sc_tape *t, const char *name) {
    const sc_tensor *x = sc_file_find(f, name);
    if (!x) stop(name);
    return sc_from(t, x->ndim, x->shape, load(f, name, 0));
}

int main(int argc, char **argv) {
    sc_file *f = argc == 4 ? sc_file_open(argv[2]) : NULL;
    sc_dit *dit = f ? sc_dit_open(sc_cpu(), argv[1], NULL) : NULL;
    if (!dit) stop(sc_error());
    int modules = dit->module_count, count = 0;
    sc_named *named = calloc((size_t)modules * 2 + 1, sizeof *named);
    sc_tape *t = sc_tape_new(sc_cpu());
    sc_params *p = NULL;
    for (int i = 0; i < modules; i++)
        for (int part = 0; part < 2; part++) {
            char *name = malloc(200);
            snprintf(name, 200, "%.190s.%c", dit->modules[i].name, "ab"[part]);
            const sc_tensor *x = sc_file_find(f, name);
            if (!p && x) p = sc_params_lora(dit, (int)x->shape[0], (float)x->shape[0], 1);
            sc_tensor *mine = p ? part ? &p->adapters[i].b[SC_STUDENT]
                                       : &p->adapters[i].a[SC_STUDENT]
                                : NULL;
            if (!mine || !mine->data != !x) stop(name); /* trained here, and there */
            if (!x) continue;
            memcpy(mine->data, load(f, name, sc_count(mine)), (size_t)sc_count(mine) * 4);
            named[count] = (sc_named){name, *mine, SC_F32};
            named[count++].tensor.data = mine->grad;
        }
    float *grid = load(f, "grid", 2);
    sc_tape_record(t, true);
    sc_dit_input in = {.x = input(f, t, "x"), .context = input(f, t, "context"),
                       .pooled = input(f, t, "pooled"), .h = (int)grid[0], .w = (int)grid[1]};
    in.time = in.guidance = load(f, "time", in.x->shape[0]);
    uint8_t *students = malloc((size_t)in.x->shape[0]);
    memset(students, SC_STUDENT, (size_t)in.x->shape[0]);
    sc_tape_use(t, students);
    sc_tensor *v = sc_dit_velocity(dit, t, &in);
    double loss;
    if (!v || !sc_mse(t, v, input(f, t, "goal"), 1, &loss) || !sc_backward(t)) stop(sc_error());
    named[count++] = (sc_named){"velocity", *v, SC_F32};
    if (!sc_file_save(argv[3], named, count, NULL)) stop(sc_error());
    return 0;
}
