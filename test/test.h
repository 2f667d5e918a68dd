/* A test program: CHECKs, then `return test_report();`. */
#ifndef TEST_H
#define TEST_H
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef TEST_DIR
#define TEST_DIR "test"
#endif

static int test_passed, test_failed, test_skipped;

/* The condition, counted; CHECKED inside another one. */
#define CHECKED(condition)                                                                         \
    ((condition)                                                                                   \
         ? (test_passed++, true)                                                                   \
         : (test_failed++, printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition), false))
#define CHECK(condition) ((void)CHECKED(condition))

#define CHECK_CLOSE(a, b, limit)                                                                   \
    do {                                                                                           \
        double a_ = (a), b_ = (b);                                                                 \
        if (fabs(a_ - b_) <= (limit)) test_passed++;                                               \
        else                                                                                       \
            test_failed++,                                                                         \
                printf("%s:%d: %s = %g, should be %g\n", __FILE__, __LINE__, #a, a_, b_);          \
    } while (0)

#define SKIP(reason) (test_skipped++, printf("%s:%d: skipped: %s\n", __FILE__, __LINE__, reason))

/* ||a - b|| / ||b||; NaN never passes a comparison. */
static inline double rel_error(const float *a, const float *b, long n) {
    double difference = 0, norm = 0;
    for (long i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return sqrt(difference) / (sqrt(norm) + 1e-30);
}

static inline int test_report(void) {
    printf("%d passed, %d failed", test_passed, test_failed);
    if (test_skipped) printf(", %d skipped", test_skipped);
    printf("\n");
    return test_failed > 0 || test_passed + test_skipped == 0;
}
#endif
