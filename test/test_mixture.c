/* The analytic check: flow.c, whose exact flow is known in closed form. Its field must carry noise
 * to the data, and three steps after SCFM must end clearly nearer to where the exact flow does than
 * three steps along the exact field itself. */
#define _POSIX_C_SOURCE 200809L
#define main flow_main
#include "flow.c"
#undef main
#include "test.h"

/* The part of `ends` within three spreads of a centre; *square: mean |x - nearest centre|^2. */
static double arrived(float ends[][2], double *square) {
    int count = 0;
    *square = 0;
    for (int w = 0; w < WALKERS; w++) {
        double least = INFINITY;
        for (int m = 0; m < MODES; m++) {
            float c[2];
            mode_centre(m, c);
            least = fmin(least, hypot(ends[w][0] - c[0], ends[w][1] - c[1]));
        }
        count += least < 3 * spread;
        *square += least * least / WALKERS;
    }
    return (double)count / WALKERS;
}

/* Two coordinates of variance spread^2 each, and nearly all within three spreads. */
static void test_exact_flow(experiment *e) {
    double square, part = arrived(e->exact[FINE], &square);
    CHECK(part > 0.97);
    CHECK_CLOSE(square, 2 * spread * spread, 0.1 * 2 * spread * spread);
}

static void test_scfm(experiment *e) {
    double square, before = miss(e->few[FEW], e->exact[FINE]);
    double after = miss(e->scfm[FEW], e->exact[FINE]);
    printf("3 Euler steps miss the exact flow's ends by %.3f, after SCFM by %.3f\n", before, after);
    printf("arrived: %.3f, after SCFM %.3f\n", arrived(e->few[FEW], &square),
           arrived(e->scfm[FEW], &square));
    CHECK(after < 0.4 * before);
    CHECK(arrived(e->few[FEW], &square) < 0.6);
    CHECK(arrived(e->scfm[FEW], &square) > 0.9);
}

/* What a line and a disc cover is their area: length times width, and round ends. */
static void test_drawing(void) {
    enum { SIDE = 64 };
    static float rgb[3 * SIDE * SIDE];
    sc_picture p = {SIDE, SIDE, rgb};
    for (int i = 0; i < 3 * SIDE * SIDE; i++) rgb[i] = -1;
    draw_line((draw_view){&p, 1, 2, 10}, (float[2]){1, 1}, (float[2]){4, 5}, 5, 0xff0000);
    double area = 0;
    for (int i = 0; i < SIDE * SIDE; i++) area += (rgb[i] + 1) / 2;
    CHECK_CLOSE(area, 50 * 5 + 3.14159265 * 2.5 * 2.5, 1);
    CHECK(rgb[SIDE * SIDE] == -1); /* no green */
}

int main(void) {
    static experiment e;
    sc_set_threads(1);
    if (CHECKED(run(&e))) {
        test_exact_flow(&e);
        test_scfm(&e);
    } else printf("%s\n", sc_error());
    test_drawing();
    return test_report();
}
