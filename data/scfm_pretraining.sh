#!/bin/sh
# SCFM inside pre-training: the README's table. sh data/scfm_pretraining.sh, in the programs' folder;
# two hours on one core. Python with the packages of data/README.md draws the pictures. Settings
# were chosen on the odd lines of data/prompts.txt and seeds up to 1000; the even lines are measured,
# from seed 1001, against real pictures of the same captions.
set -e
mkdir -p run
awk 'NR % 2 == 0' data/prompts.txt >run/measured.txt
[ -d data/emoji-301 ] || python3 data/make_emoji.py data/emoji-301 --per-concept 64 --seed 301
[ -d data/emoji-test ] || python3 data/make_emoji.py data/emoji-test --split test --per-concept 16 \
    --coarse 0 --concepts "$(paste -sd, run/measured.txt)"

measure() { # a transformer's folder
    ./shortcut --transformer "$1" --guidance 1 --prompts run/measured.txt --count 270 --seed 1001 \
        --steps 2,3,4,8 --real data/emoji-test --out run/sheet.png
}

measure data/pretrained
for part in 1 0.75 0.5; do # of the batch with flow matching's target
    for seed in 1 2 3; do
        ./train data/emoji-301 --pretrain --transformer data/pretrained --fm-ratio $part \
            --steps 400 --batch 32 --lr 5e-4 --warmup 20 --final-lr 0.02 --beta2 0.99 --clip 1 \
            --fast 0.95 --slow 0.99 --shift 1,2 --dynamic-shift 0 --guidance 1,1 \
            --self-steps 4,8,16 --preview 0 --seed $seed --run run/fm$part-$seed \
            --out run/fm$part-$seed/transformer
        measure run/fm$part-$seed/transformer
    done
done
