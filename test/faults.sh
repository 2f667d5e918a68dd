#!/bin/sh
# Plants faults of order in shortcut_cuda.cu, one at a time, and shows that its test on the emulated
# GPU finds each: sh test/faults.sh [C++ compiler]. They are compiled once, and chosen at run time.
cd "$(dirname "$0")/.." || exit 1
mkdir -p build
sed -e '/^#include "shortcut.h"/a #include <stdlib.h>\
static bool FAULT(int n) { const char *s = getenv("FAULT"); return s && atoi(s) == n; }' \
    -e '/^static bool start_copy/,/^}/ s/check(cudaStreamWaitEvent/FAULT(1) || &/' \
    -e '/^static void drop_copy/,/^}/ s/check(cudaStreamWaitEvent/FAULT(2) || &/' \
    -e 's/semaphore_release(threadIdx.x == 0 && i > 0, &work.semaphore\[i - 1\]/semaphore_release(threadIdx.x == 0 \&\& (FAULT(3) || i > 0), \&work.semaphore[FAULT(3) ? i : i - 1]/' \
    -e '/ attention_kernel(/,/^}/ s/fence_proxy_async<WGMMA>/if (!FAULT(4)) &/' \
    -e 's/if (WGMMA) load(a.k, i + 2/if (WGMMA) load(a.k, i + (FAULT(5) ? 4 : 2)/' \
    -e '/^static const void \*on_device/,/^}/ s/check(cudaStreamWaitEvent/FAULT(6) || &/' \
    -e '/^static void cuda_upload/,/^}/ s/check(cudaEventSynchronize/FAULT(7) || &/' \
    -e '/^static bool cuda_collect/,/^}/ s/check(cudaEventSynchronize/FAULT(8) || &/' \
    -e 's/__syncthreads(); \/\* P, dS and these/if (!FAULT(9)) &/' \
    shortcut_cuda.cu >build/faults.cu
for fault in 1 2 3 4 5 6 7 8 9; do
    grep -q "FAULT($fault)" build/faults.cu || { echo "error: no place for fault $fault"; exit 1; }
done
flags='-Itest/emulation -I. -w' libraries='-lstdc++ -lpthread -lm'
${1:-c++} -std=c++17 -O1 $flags -x c++ -c build/faults.cu -o build/faults.o &&
    ${CC:-cc} -O2 -w -DEMULATED $flags test/test_cuda.c build/faults.o -o build/test_cuda_faults \
        $libraries || exit 1

passed=0 failed=0
find() { # number, what it is
    for seed in 1 2 3 4; do
        shows=$(FAULT=$1 EMULATED_SEED=$seed EMULATED_PART=order build/test_cuda_faults 2>&1) && continue
        passed=$((passed + 1))
        echo "$2: $(printf '%s\n' "$shows" | grep -m 1 -E ', tensor|emulated GPU: |failed:' | cut -c1-90)"
        return
    done
    failed=$((failed + 1))
    echo "$2: not found"
}
if FAULT=0 EMULATED_PART=order build/test_cuda_faults >build/faults.txt; then passed=1
else failed=1 && echo "no fault:" && tail -n 3 build/faults.txt; fi
find 1 "a copy does not wait until its memory is free"
find 2 "a buffer is given back under its copy"
find 3 "a turn is passed too early"
find 4 "no fence between cp.async and wgmma"
find 5 "a wrong phase: a stage that is in use is filled"
find 6 "a product does not wait for its matrix"
find 7 "an upload does not wait for its stage"
find 8 "the host does not wait for a posted number"
find 9 "no barrier before P and dS are overwritten"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
