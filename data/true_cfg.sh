#!/bin/sh
# True CFG folded into the student: the README's table. sh data/true_cfg.sh, in the programs' folder;
# an hour and a half on two cores. The guided base draws what is trained on, of all 64 captions;
# settings were chosen on the odd lines of data/prompts.txt and seeds up to 1000, and the even lines
# are measured, from seed 1001.
set -e
mkdir -p run
model="--transformer data/pretrained"
base="$model --guidance 1"
sed 's/.*"prompt": *"\([^"]*\)".*/\1/' data/10pairs/metadata.jsonl | cat - data/prompts.txt >run/captions.txt
awk 'NR % 2 == 0' data/prompts.txt >run/measured.txt
draw() { # folder, pictures of each caption
    ./sample --prompts run/captions.txt 32 --count "$2" --seed 7000 $base --cfg 2 --no-lora --out-dir "$1"
}
draw run/guided 16
draw run/guided-6 6

distil() { # pictures, name, options...
    pictures=$1 name=$2
    shift 2
    ./train "$pictures" $base --rank 64 --caption-dropout 0 --scales "3:1 4:1 8:1" --preview 0 \
        --run "run/$name" --out "run/$name.safetensors" "$@"
}
mix() { # name, seed, parts of the two LoRAs
    ./shortcut merge --kohya $model --lora "run/guidance$2.safetensors:$3" \
        --lora "run/shortcut$2.safetensors:$4" --out "run/$1$2.safetensors"
}
for seed in 1 2 3; do
    # First a LoRA of guidance, by the teacher's case alone; then SCFM with that as the teacher, whom
    # the student starts from: for more steps, more of the teacher.
    distil run/guided guidance$seed --cfg 2 --teacher-ratio 1 --batch 8 --steps 2400 --lr 2e-3 --shift 2,6 --seed $seed
    distil run/guided shortcut$seed --teacher run/guidance$seed.safetensors --seed $seed
    mix three $seed 0.2 0.8
    mix four $seed 0.25 0.75
    mix eight $seed 0.7 0.3
done
distil run/guided-6 official --cfg 2 --cfg-student --teacher-ratio 0.7 --batch 8 --steps 1500 --lr 2e-4
measure() { # steps, options...
    steps=$1
    shift
    ./shortcut $base --cfg 2 --prompts run/measured.txt --count 540 --seed 1001 --steps "$steps" \
        --out run/sheet.png "$@"
}
measure 3 --lora run/three1.safetensors --lora run/three2.safetensors --lora run/three3.safetensors
measure 4 --lora run/four1.safetensors --lora run/four2.safetensors --lora run/four3.safetensors
measure 8 --lora run/eight1.safetensors --lora run/eight2.safetensors --lora run/eight3.safetensors
measure 3,4,8 --cfg-loras --lora run/official.safetensors
