#!/bin/sh
# What a GPU has to show, in calls of less than ten minutes each (an 80 GB card, 16 cores):
#
#   sh test/cuda_session.sh parity      4 min   operations against the CPU's; memcheck, synccheck
#   sh test/cuda_session.sh races       8 min   racecheck, initcheck
#   sh test/cuda_session.sh bench       5 min   ceilings, operations, FLUX.1-dev's step and sampling
#   sh test/cuda_session.sh tiny        4 min   ./train data/10pairs: time, bits, losses, pictures
#   sh test/cuda_session.sh eager       4 min   the same work in PyTorch, where it, diffusers and
#   sh test/cuda_session.sh compiled    5 min   peft are installed
#
# Several names in one call are done one after the other. `make` first: make && make
# build/test_cuda build/bench_cuda. Whole outputs go to $OUT (default build/session), the last lines
# of each to the terminal. What is expected stands in test/cuda-log.md.
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-build/session}
failed=0
mkdir -p "$out"

run() { # name, seconds, command...
    name=$1 limit=$2
    shift 2
    echo "== $name: $*"
    start=$(date +%s)
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1
    status=$?
    tail -n "${lines:-12}" "$out/$name.txt" | cut -c1-300
    [ $status -eq 0 ] || failed=1
    echo "== $name: exit $status after $(($(date +%s) - start)) s"
}

sanitize() { # tool, seconds
    if command -v compute-sanitizer >/dev/null; then
        lines=6 run "$1" "$2" compute-sanitizer --tool "$1" --report-api-errors no \
            --error-exitcode 9 build/test_cuda small # one test runs out of memory on purpose
    else echo "$1: skipped: no compute-sanitizer"; fi
}

tiny() {
    for device in cuda cpu; do
        run "curve_$device" 240 ./train data/10pairs --device $device --stop-after 20 --preview 0 \
            --out "$out/$device.safetensors" --run "$out/run_$device"
    done
    run losses 5 paste -d ' ' "$out/run_cuda/loss.csv" "$out/run_cpu/loss.csv"
    run tiny 120 python3 test/bench_cuda.py tiny-flux
    run streamed 120 ./train data/10pairs --device cuda --weights-on host --preview 0 \
        --out "$out/streamed.safetensors" --run "$out/run_streamed"
    run fp8 120 ./train data/10pairs --device cuda --weights fp8 --preview 0 \
        --out "$out/fp8.safetensors" --run "$out/run_fp8"
    run lora 120 ./train data/10pairs --device cuda --preview 0 --out "$out/lora.safetensors" \
        --run "$out/run"
    lines=30 run table 200 ./shortcut --device cuda --count 270 --lora "$out/lora.safetensors"
}

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv 2>&1 | head -3
for part in "$@"; do
    case $part in
    parity)
        lines=40 run parity 180 build/test_cuda
        sanitize memcheck 200
        sanitize synccheck 200
        ;;
    races) sanitize racecheck 290; sanitize initcheck 290 ;;
    bench) lines=60 run bench 560 build/bench_cuda ;;
    tiny) tiny ;;
    eager | compiled) lines=8 run $part 580 python3 test/bench_cuda.py $part ;;
    *) echo "error: '$part' is not parity, races, bench, tiny, eager or compiled" >&2; exit 2 ;;
    esac
done
exit $failed
