#!/bin/sh
# The header alone: the implementation as C99 without a warning, with every C compiler there is and
# with and without what is optional; the declarations as C99 and C++17; the
# program at its head.
passed=0 failed=0 skipped=0

compiles() { # language, source, command...
    language=$1 source=$2
    shift 2
    if printf '%s\n' "$source" | "$@" -pedantic -Wall -Wextra -Werror -I. -x "$language" -c -o /dev/null -; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "failed: $*"
    fi
}
there() {
    command -v "$1" >/dev/null && return 0
    skipped=$((skipped + 1))
    echo "skipped: no $1"
    return 1
}

declarations="#include \"shortcut.h\""
implementation="#define SHORTCUT_IMPLEMENTATION
#include \"shortcut.h\""
example=$(sed -n '/^ \*     #define SHORTCUT_IMPLEMENTATION/,/^ \*     }$/s/^ \*     //p' shortcut.h) # of its head
for cc in gcc clang; do
    there $cc || continue
    compiles c "$declarations" $cc -std=c99
    compiles c "$implementation" $cc -std=c99 -O2
    compiles c "$example" $cc -std=c99
    echo 'int main(void) { return 0; }' | $cc -fopenmp -x c -o /dev/null - 2>/dev/null &&
        compiles c "$implementation" $cc -std=c99 -fopenmp
    echo '#include <cblas.h>' | $cc -E -x c -o /dev/null - 2>/dev/null &&
        compiles c "$implementation" $cc -std=c99 -DSHORTCUT_OPENBLAS
done
for cxx in g++ clang++; do
    there $cxx && compiles c++ "$declarations" $cxx -std=c++17
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
