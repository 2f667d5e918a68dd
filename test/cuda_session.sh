#!/bin/sh
# What a GPU has to show, each step under its own limit. A step that fails is counted, and the next
# begins; one that hangs, or that leaves the GPU broken, ends all. From a checkout, after make && make
# build/test_cuda build/bench_cuda, or from a copy (cp -rL) of build/kit (make cuda-kit).
#
#   sh test/cuda_session.sh            ten minutes, on one page: look small operations profile whole
#                                      bf16 fp8 memcheck, the last with the time that is left
#   sh test/cuda_session.sh NAME...    these alone; there are also
#       warps                 1 min    operations with attention by mma, beside "operations" by wgmma
#       synccheck             4 min
#       racecheck initcheck  10 min
#       tiny                  4 min    ./train data/10pairs: time, bits, losses, pictures (into build)
#       eager compiled       10 min    the same work in PyTorch, where it, diffusers and peft are
#
# Whole outputs go to $OUT (build/session). What to expect stands in test/cuda-log.md. $TOTAL: all
# steps' seconds (585 without names).
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-build/session}
end=$(($(date +%s) + ${TOTAL:-$([ $# -eq 0 ] && echo 585 || echo 36000)}))
failed=0
mkdir -p "$out"

stop() {
    echo "== stopped: $1; whole outputs: $out"
    exit 1
}

# Prints what of the output matches $show; the output must match $must.
run() { # name, seconds, command...
    name=$1 limit=$2 start=$(date +%s)
    shift 2
    [ "$limit" -lt $((end - start)) ] || limit=$((end - start))
    [ "$limit" -gt 0 ] || { echo "== $name: skipped: no time left"; return; }
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1
    status=$?
    if [ $status -eq 0 ] && ! grep -qE "$must" "$out/$name.txt"; then status="0, without '$must'"; fi
    echo "== $name: exit $status after $(($(date +%s) - start)) of $limit s: $*"
    if [ "$status" = 0 ]; then grep -E "$show" "$out/$name.txt" | tail -n "$lines" | cut -c1-130
    else
        tail -n 20 "$out/$name.txt" | cut -c1-200
        failed=$((failed + 1))
        [ "$status" != 124 ] || [ "$may_hang" ] || stop "$name hangs"
        grep -E "illegal|misaligned|launch failure|hardware" "$out/$name.txt" && stop "$name"
    fi
}
with() { # how many lines to show, which, what must be there
    lines=$1 show=$2 must=$3 may_hang=
}

# Leaves in LD_LIBRARY_PATH where the cuBLASLt is that these programs were made for.
look() {
    echo "== look"
    timeout 10 nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,clocks.max.sm \
        --format=csv,noheader || stop "nvidia-smi"
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
    for program in build/test_cuda build/bench_cuda train sample shortcut; do
        missing=$(ldd $program | grep "not found") && stop "$program lacks $missing"
    done
    library=$(grep -aoE "libcublasLt\.so\.[0-9]+" build/test_cuda | head -n 1)
    folders="$(echo "$LD_LIBRARY_PATH" | tr : ' ') /usr/local /usr/lib /usr/lib64 /opt $HOME"
    found=$(timeout 20 find $folders -name "$library" 2>/dev/null | head -n 1)
    [ "$found" ] || stop "no $library"
    export LD_LIBRARY_PATH="$(dirname "$found"):$LD_LIBRARY_PATH"
    echo "$found"
}

sanitize() { # tool, seconds
    with 5 "ERROR SUMMARY|RACECHECK|failed" "passed, 0 failed"
    if command -v compute-sanitizer >/dev/null; then
        run "$1" "$2" compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 9 \
            build/test_cuda small # one test runs out of memory on purpose
    else echo "== $1: skipped: no compute-sanitizer"; fi
}

profile() {
    with 40 "_kernel|Duration|Throughput|Registers Per|Achieved Occ" .
    may_hang=1 # it takes rights that a container may lack
    if command -v ncu >/dev/null; then # with what the choice of attention tries, of few blocks
        run profile 60 ncu -k regex:attention --clock-control none --section SpeedOfLight \
            --section LaunchStats --section Occupancy build/bench_cuda attention
    else echo "== profile: skipped: no ncu"; fi
}

tiny() {
    with 12 . .
    made=build/session/tiny # not brought back
    mkdir -p "$made"
    for device in cuda cpu; do
        run "curve_$device" 240 ./train data/10pairs --device $device --stop-after 20 --preview 0 \
            --out "$made/$device.safetensors" --run "$made/run_$device"
    done
    run losses 5 paste -d ' ' "$made/run_cuda/loss.csv" "$made/run_cpu/loss.csv"
    run streamed 120 ./train data/10pairs --device cuda --weights-on host --preview 0 \
        --out "$made/streamed.safetensors" --run "$made/run_streamed"
    run fp8 120 ./train data/10pairs --device cuda --weights fp8 --preview 0 \
        --out "$made/fp8.safetensors" --run "$made/run_fp8"
    run lora 120 ./train data/10pairs --device cuda --preview 0 --out "$made/lora.safetensors" \
        --run "$made/run"
    lines=30
    run table 200 ./shortcut --device cuda --count 270 --lora "$made/lora.safetensors" \
        --out "$made/sheet.png"
    run repeated 120 python3 test/bench_cuda.py tiny-flux
}

export SHORTCUT_CUDA_VERBOSE=1
look
[ $# -gt 0 ] || set -- small operations profile whole bf16 fp8 memcheck
case $capability in
9.0) way=wgmma ;;
*) way=mma ;;
esac
for part in "$@"; do
    case $part in
    look) ;;
    small | whole)
        with 14 "attention by|wgmma, mma|cuBLASLt:|error|failed" "attention by $way"
        if [ $part = small ]; then run small 90 build/test_cuda small
        else run whole 120 build/test_cuda; fi
        ;;
    operations)
        with 50 "TFLOP|GB/s" "attention by $way"
        run operations 90 build/bench_cuda operations
        ;;
    warps)
        with 12 "attention" "attention by mma"
        run warps 60 env SHORTCUT_CUDA_WGMMA=0 build/bench_cuda operations
        ;;
    profile) profile ;;
    bf16 | fp8)
        with 8 "TFLOP|steps|blocks|of C" "useful TFLOP"
        run $part 90 build/bench_cuda $part
        ;;
    memcheck) sanitize memcheck 200 ;;
    synccheck | racecheck | initcheck) sanitize $part 290 ;;
    tiny) tiny ;;
    eager | compiled) with 8 . . && run $part 580 python3 test/bench_cuda.py $part ;;
    *) echo "error: '$part' is no step of this session" >&2; exit 2 ;;
    esac
done
echo "== done, $failed failed; whole outputs: $out"
[ $failed -eq 0 ]
