#!/bin/sh
# The official trainers keep LoRA factors, Adam's moments and both averages in bf16, ours are f32: what
# does that change? Trains the small model with the paper's settings in both ways, and measures several
# LoRA scales: sh test/bf16_state.sh [STEPS], in the programs' folder after make; ./train with every stored
# number rounded is made from a copy of the header.
set -e
steps=${1:-4000} to=build/bf16
mkdir -p $to
round='sc__bf16_to_f32(sc__f32_to_bf16('
sed -e "s/^\( *m\[i\] = \)\(b1 .*\);\$/\1$round\2));/" -e "s/^\( *v\[i\] = \)\(b2 .*\);\$/\1$round\2));/" \
    -e "s/^\( *w\[i\] = \)\(w\[i\] \* keep .*\);\$/\1$round\2));/" \
    -e "s/^\( *\)SC_SIMD for (\(.*\)) average\[i\] +=\$/\1for (\2) average[i] = ${round}average[i] +/" \
    -e "s/^\( *move \* (w\[i\] - average\[i\])\);\$/\1));/" shortcut.h >$to/shortcut.h
[ "$(grep -c "sc__bf16_to_f32(sc__f32_to_bf16(" $to/shortcut.h)" = 4 ] || { echo "the header's update has changed" >&2; exit 1; }
flags="-std=c99 -O3 -march=native -fno-math-errno -ffp-contract=fast -fopenmp -DSHORTCUT_OPENBLAS"
cc $flags -DSHORTCUT_IMPLEMENTATION -x c -c $to/shortcut.h -o $to/shortcut.o
cc $flags train.c $to/shortcut.o -o $to/train -lopenblas -lm
for kind in f32 bf16; do
    train=./train
    [ $kind = f32 ] || train=$to/train
    $train data/10pairs --rank 64 --lr 2e-5 --final-lr 1 --batch 8 --self-steps 2,4,8,16 --shift 2.5,4.5 \
        --dynamic-shift 0.1 --guidance 0,7.5 --caption-dropout 0 --fast 0.99 --slow 0.999 --steps "$steps" \
        --scales 3:1 --preview 0 --run $to/run-$kind --out $to/$kind.safetensors
    set --
    for scale in 0.5 0.75 1 1.25 1.5 2 3 4; do set -- "$@" --lora $to/$kind.safetensors:$scale; done
    ./shortcut --count 270 --steps 3 --out $to/$kind.png "$@"
done
