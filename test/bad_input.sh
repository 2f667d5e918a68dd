#!/bin/sh
# Bad input to the programs: one clear line, exit 1 (usage: 2), no half-written file, nothing lost.
# Single files and pictures are tested in test_files.c, test_formats.c and test_pictures.c.
. test/check.sh

pairs=$dir/pairs model=$dir/model
mkdir "$pairs"
cp data/10pairs/balloon_0000.png "$pairs/a.png"
echo "a balloon" >"$pairs/a.txt"
train() { ./train "$pairs" --no-cache --batch 1 --rank 1 --preview 0 --run "$dir/run" --out "$dir/lora" "$@"; }
all() { ./train "$pairs" --no-cache --batch 1 --preview 0 --run "$dir/run" "$@"; } # weights
sample() { ./sample x 1 --no-lora --out "$dir/out.png" "$@"; }

# ---- Usage ----
fails 2 "which folder" ./train
fails 2 "info of what" ./shortcut info
fails 2 "neither info nor merge" ./shortcut none
fails 2 "from 1 to 1000" ./sample x 0
fails 2 "from 1 to 1000" ./sample x y
fails 2 "from 1 to 1000" ./sample x 4294967299
fails 2 "unexpected" ./sample x 3 y
fails 2 "takes N" ./sample x 1 --seed x
for seed in -1 1.5 1e3 18446744073709551616 ""; do
    fails 2 "from 0 to 18446744073709551615" sample --seed "$seed"
    fails 2 "from 0 to 18446744073709551615" train --seed "$seed"
    fails 2 "from 0 to 18446744073709551615" ./shortcut --seed "$seed"
done
for name in a.JPG a.Jpeg a.webp a.safetensors; do fails 1 "written as .png only" sample --out "$dir/$name"; done
for name in a.ckpt a.PT a.png; do
    fails 1 "written as .safetensors only" train --steps 1 --out "$dir/$name"
    fails 1 "written as .safetensors only" sample --latents "$dir/$name"
done
fails 1 "written as .png only" ./shortcut --out "$dir/a.jpg"
fails 1 "will be a folder" all --full --steps 1 --out "$dir/a.safetensors"
fails 1 "without a name" train --steps 1 --out ""
fails 2 "of one picture" sample --latents "$dir/l" --count 2
fails 2 "of one picture" sample --noise "$dir/l" --count 2
fails 2 "--out-dir for --prompts" sample --out-dir "$dir/set"
fails 2 "--out is for one" ./sample --prompts "$dir/prompts" 1 --out "$dir/a.png" --out-dir "$dir/set"
fails 2 "exclude each other" sample --lora "$dir/l"
fails 2 "from 0 up" train --alpha -4
fails 2 "from 0 up" train --final-lr -3
fails 2 "from 1 to 4096" ./shortcut --batch 1073741824
fails 2 "from 1 up" ./sample x 1 --count 0
fails 2 "from 1 up" train --steps 0
fails 2 "from 1 up" train --batch 0
fails 2 "up to 4096" train --batch 5000
fails 2 "merge takes --lora" ./shortcut merge lora.safetensors
fails 2 "from 1 to" train --rank 0
fails 2 "takes N,..." train --self-steps 4,a
fails 2 "up to 1000" train --shift 2000
fails 2 "up to 1000" train --teacher-steps 2147483646
fails 2 "takes X" train --final-lr 1e39
fails 2 "to 1024" sample --threads 100000
fails 2 "to 1024" train --threads 100000
fails 2 "to 1024" ./shortcut --threads -1
fails 2 "up to 1000000" ./sample x 1 --count 2147483647
fails 2 "at most 16384" train --resolution 100000
fails 2 "even" train --self-steps 3
fails 2 "from 1" train --self-steps 4,0,8
fails 2 "3:1@1.5 8:0.5" train --scales "3:1 8:.5"
fails 2 "3:1@1.5 8:0.5" train --scales "3:1@ 8:0.5"
fails 2 "auto|cpu|cuda" sample --device tpu
fails 2 "auto|cpu|cuda" ./shortcut --device ""
fails 2 "auto|cpu|cuda" sample --device "auto|cpu"
fails 2 "from 0 up" sample --cfg -1
fails 2 "needs --cfg" sample --negative y
fails 2 "needs --cfg" train --cfg-student
fails 2 "not for --pretrain" train --pretrain --cfg 2
fails 2 "auto|fp8" train --weights fp
fails 2 "multiples of 16" sample --size 100x100
fails 2 "WxH" sample --size 128x128x
fails 2 "WxH" sample --size 0x16
fails 2 "WxH" sample --size 4294967424x128
fails 2 "positive number or auto" sample --shift 3x
fails 2 "unknown option '--?.31m?b'" ./sample x 1 "$(printf -- '--\033[31m\nb')"
fails 1 "a?.31m?b: No such file" sample --model "$(printf 'a\033[31m\nb')"

# ---- Captions and pictures ----
check "a caption" quiet train --steps 1
: >"$pairs/a.txt"
check "no text in it" quiet train --steps 1
head -c 100000 /dev/zero | tr '\0' a >"$pairs/a.txt"
check "a long one" quiet train --steps 1
printf 'a\377\376\000\033b' >"$pairs/a.txt"
fails 1 "a.txt:1: byte 1 (0xff) is no UTF-8 text" train
printf 'a\000n\000' >"$pairs/a.txt"
fails 1 "a.txt:1: byte 1 (0x00) is no UTF-8 text" train
printf '\377\376a\000' >"$pairs/a.txt"
check "UTF-16 with its mark" quiet train --steps 1
cp "$pairs/a.png" "$pairs/b.webp"
./train "$pairs" --no-cache --batch 1 --rank 1 --steps 1 --preview 0 --run "$dir/run" --out "$dir/lora" >"$dir/output" 2>&1
check "what is not used is named" grep -q "^warning: .*: 1 file is not used: b.webp (" "$dir/output"
echo b >"$pairs/b.txt"
fails 1 "not used: b.webp (.*most have captions" train
rm "$pairs/b.webp" "$pairs/b.txt"
cp "$pairs/a.png" "$pairs/b.png"
fails 1 "no caption for 1 of the pictures, as .*/b.png:" train
rm "$pairs/a.txt"
fails 1 "no caption for 2 of the pictures, as .*/[ab].png:" train
rm "$pairs/b.png"
while read -r line words; do
    printf '%s\n' "$line" >"$pairs/metadata.jsonl"
    fails 1 "$words" train
done <<'LINES'
{ metadata.jsonl:1
{"file_name":"a.png"} no 'prompt'
{"file_name":"b.png","prompt":"x"} b.png: No such file
{"file_name":"../../a.png","prompt":"x"} no plain path in the folder
{"file_name":3,"prompt":"x"} no 'file_name'
[1] no 'file_name'
LINES
head -c 3000 /dev/zero | tr '\0' '[' >"$pairs/metadata.jsonl"
fails 1 "nested deeper" train
rm "$pairs/metadata.jsonl"
echo x >"$pairs/a.txt"
head -c 300 data/10pairs/balloon_0000.png >"$pairs/a.png"
fails 1 "a.png: truncated PNG" train
: >"$pairs/a.png"
fails 1 "a.png: not a PNG or JPEG" train
for picture in one.png grey.png grey_alpha.png rgba.png exif6.jpg; do
    cp test/reference/pictures/$picture "$pairs/a.${picture#*.}"
    rm -f "$pairs/a.$(echo pngjpg | sed "s/${picture#*.}//")"
    check "$picture" quiet train --steps 1
done
rm "$pairs/a.jpg"
cp data/10pairs/balloon_0000.png "$pairs/a.png"

# ---- Model folders ----
broken() { # file, what to do with it, words
    rm -rf "$model"
    mkdir "$model"
    cp -r data/tiny-flux/. "$model"
    eval "$2" <"data/tiny-flux/$1" >"$model/$1"
    fails 1 "$3" sample --model "$model"
}
for file in transformer/config.json vae/config.json text_encoder/config.json tokenizer/vocab.json \
    text_encoder_2/config.json tokenizer_2/tokenizer.json scheduler/scheduler_config.json recipe.json; do
    broken $file true "$file"
    broken $file "head -c 60" "$file"
done
for file in transformer/diffusion_pytorch_model vae/diffusion_pytorch_model text_encoder/model text_encoder_2/model; do
    broken $file.safetensors "head -c 2000" "$file.safetensors"
    broken $file.safetensors "sed '1s/\"BF16\"/ \"F64\"/'" "$file.safetensors"
done
weights=transformer/diffusion_pytorch_model.safetensors
broken $weights "sed '1s/\"BF16\"/ \"I16\"/'" "has type 'I16'"
broken $weights "sed '1s/\[192,64\]/[64,192]/'" "has shape .64,192."
broken transformer/config.json "sed 's/\(attention_heads\": \)6/\15/'" "must be .160,64. here"
broken transformer/config.json "sed 's/\(num_layers\": \)2/\11e300/'" "whole number"
fails 1 "a part is not whole" ./shortcut info "$model"
broken text_encoder/config.json "sed 's/\(vocab_size\": \)1000/\110/'" "must be .10,64. here"
broken text_encoder/config.json "sed '1s/{/{\"text_config\": {},/'" "a whole CLIP's, not the text encoder's"
broken tokenizer_2/tokenizer.json "sed 's/\"Unigram\"/\"BPE\"/'" "CLIP's is read from vocab.json and merges.txt"
broken vae/config.json "sed 's/\(norm_num_groups\": \)[0-9]*/\10/'" "whole number"
broken tokenizer/merges.txt "head -n 1" "no merges"
broken scheduler/scheduler_config.json "sed 's/\"shift\": [0-9.]*/\"shift\": -1/'" "must be positive"
broken scheduler/scheduler_config.json "sed 's/\"shift\": [0-9.]*/\"shift\": \"x\"/'" "must be a number"
for recipe in '"out": "x"' '"no-lora": 1' '"lora": "x"' '"nonsense": 1'; do
    broken recipe.json "echo '{\"sample\": {$recipe}}'" "is no option that a recipe may set"
done
broken recipe.json "echo '{\"sample\": {\"guidance\": true}}'" "has a wrong value"
cp test/reference/pipeline_a/lora.safetensors "$model"
check "a file beside a model is not the model" test "$(./shortcut info "$model/lora.safetensors" | grep -c transformer:)" -eq 0
rm -rf "$model"

# ---- Other files ----
fails 1 "another model" ./sample x 1 --lora test/reference/pipeline_a/lora.safetensors
fails 1 "not a safetensors" ./sample x 1 --lora README.md
# What a file says does not steer the terminal.
header='{"__metadata__":{"command":"\u001b[31m"},"a\u001b[2J":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} '
while [ $((${#header} % 8)) -ne 0 ]; do header="$header "; done
{
    printf "\\$(printf %o ${#header})\\0\\0\\0\\0\\0\\0\\0"
    printf '%s\0\0\0\0' "$header"
} >"$dir/steering.safetensors"
check "control characters in metadata" test "$(./shortcut info "$dir/steering.safetensors" | grep -a -c "command: ?.31m")" -eq 1
fails 1 "README.md: not a safetensors file" sample --model README.md
fails 1 "needs a tensor 'noise'" sample --noise test/reference/pipeline_a/lora.safetensors
: >"$dir/prompts"
fails 1 "no prompts" ./sample --prompts "$dir/prompts" 1 --no-lora --out-dir "$dir/set"
check "no empty folder is left" test ! -e "$dir/set"
printf 'a\ncaf\351\n' >"$dir/prompts"
fails 1 "prompts:2: byte 5 (0xe9) is no UTF-8 text" ./sample --prompts "$dir/prompts" 1 --no-lora --out-dir "$dir/set"
fails 1 "the prompt is not UTF-8: byte 3 is 0xe9" ./sample "$(printf 'caf\351')" 1 --no-lora --out "$dir/out.png"
printf 'a\033[31m\n' >"$dir/prompts"
./sample --prompts "$dir/prompts" 1 --no-lora --out-dir "$dir/set" >"$dir/output"
check "nor do prompts steer it" grep -q 'a?.31m"' "$dir/output"
printf 'a\302\23331m\302\265\n' >"$dir/prompts"
./sample --prompts "$dir/prompts" 1 --no-lora --out-dir "$dir/set" >"$dir/output"
check "in any of UTF-8's ways" sh -c 'grep -q "$1" "$0"' "$dir/output" "a?$(printf '\23331mµ')"
fails 1 "$(printf 'a?\23331mµ'): No such file" sample --model "$(printf 'a\302\23331mµ')"
fails 1 "No such file" ./sample --prompts "$dir/none" 1 --no-lora --out-dir "$dir/set"
fails 1 "Not a directory" ./sample --prompts README.md 1 --no-lora --out-dir "$dir/prompts/set"
fails 1 "No such file" ./shortcut --lora "$dir/none"
fails 1 "No such file" ./shortcut info "$dir/none"
fails 1 "No such file" ./shortcut merge --lora "$dir/none" --out "$dir/merged"
check "no merged folder is left" test ! -e "$dir/merged"

# ---- Writing ----
fails 1 "cannot write" train --steps 1 --out "$dir/none/lora"
fails 1 "cannot write" train --steps 1 --out "$dir/none/lora" --run "$dir/new"
fails 1 "No such file.*nothing to resume" train --steps 1 --resume --run "$dir/new"
check "no empty run folder is left" test ! -e "$dir/new"
fails 1 "cannot write" train --steps 1 --out "$dir"
check "what was learned is in the state" quiet train --steps 1 --resume
fails 1 "run" train --steps 1 --run "$dir/prompts/run"
rm -f "$dir/lora" "$dir/out.png" "$dir/run/state.safetensors"
( # a full disk: files of at most 10 KiB
    passed=0 failed=0
    trap '' XFSZ
    ulimit -f 20
    fails 1 "cannot write" sample
    fails 1 "cannot write" sample --latents "$dir/latents"
    fails 1 "cannot write" train --steps 2 --rank 16 --save 1
    check "what cannot be saved on the way stops nothing" grep -q "^warning: not saved at step 1: .*cannot write" "$dir/output"
    check "the cache is not needed" quiet ./train "$pairs" --steps 1 --batch 1 --dry-run
    report
) >"$dir/full"
check "a full disk: $(cat "$dir/full")" grep -q "^5 passed, 0 failed" "$dir/full"
check "leaves nothing" test ! -e "$dir/lora" -a ! -e "$dir/out.png" -a ! -e "$dir/latents" -a ! -e "$dir/run/state.safetensors"
check "no temporary file either" test -z "$(find "$dir" -name '*.tmp*' -o -name 'out.png*' -o -name 'lora*')"
if [ -c /dev/full ]; then
    fails 1 "No space left" sample --out /dev/full
    fails 1 "No space left" train --steps 1 --out /dev/full
    mkdir "$dir/losses" && ln -s /dev/full "$dir/losses/loss.csv"
    fails 1 "losses/loss.csv: it was not written to its end" train --steps 1 --run "$dir/losses"
    check "a loss that cannot be written loses nothing else" test -s "$dir/lora" -a -s "$dir/losses/state.safetensors"
fi
mkdir -p "$dir/looked/preview.png"
check "previews that cannot be written" sh -c '"$@" >"$0" 2>&1' "$dir/output" ./train "$pairs" --no-cache --batch 1 \
    --rank 1 --steps 3 --preview 1 --run "$dir/looked" --out "$dir/lora"
check "stop nothing, every time" test "$(grep -c "^warning: no preview: .*preview.png" "$dir/output")" -eq 3
fails 1 "cannot write" ./shortcut --count 2 --out "$dir/none/sheet.png"
fails 1 "cannot write" all --pretrain --steps 1 --out "$dir/none/whole"
mkfifo "$dir/pipe"
cat "$dir/pipe" >"$dir/piped.png" &
check "a picture into a pipe" quiet sample --out "$dir/pipe"
wait
check "which stays one" test -p "$dir/pipe" -a -s "$dir/piped.png"
echo kept >"$dir/lora"
fails 1 "lower --lr" train --steps 20 --lr 1e30
check "a loss that is not a number leaves the old file" grep -q kept "$dir/lora"

# ---- What is there already ----
# A name that the user gave is replaced where it is a plain file; others only where they are ours.
keeps() { # file, then as `fails`
    kept=$1 sum=$(cksum <"$1")
    shift
    fails "$@"
    check "$kept is as it was" test "$sum" = "$(cksum <"$kept")"
}
seed=18446744073709551615 here=$PWD
rm -rf "$dir/set" "$dir/run" "$dir/lora"
mkdir "$dir/set" "$dir/cwd"
printf 'a pig\na lemon\n' >"$dir/prompts"
list() { ./sample --prompts "$dir/prompts" 1 --no-lora --out-dir "$dir/set" "$@"; }
cp data/10pairs/owl_0000.png "$dir/set/000001.png"
keeps "$dir/set/000001.png" 1 "000001.png: this file is there, and not from this program" list
check "nothing was drawn beside it" test ! -e "$dir/set/000000.png" -a ! -e "$dir/set/metadata.jsonl"
rm "$dir/set/000001.png"
echo '{"file_name": "000000.png", "prompt": "by hand"}' >"$dir/set/metadata.jsonl"
keeps "$dir/set/metadata.jsonl" 1 "lines that are not this program's" list
rm "$dir/set/metadata.jsonl"
check "a set" quiet list
cp "$dir/set/metadata.jsonl" "$dir/whole.jsonl"
check "again, from other noise: all is ours" quiet list --seed $seed
check "its lines" same "$dir/set/metadata.jsonl" "$dir/whole.jsonl"
sed 's/a pig/a fat pig/' "$dir/whole.jsonl" >"$dir/set/metadata.jsonl"
keeps "$dir/set/metadata.jsonl" 1 "lines that are not this program's" list
fails 1 "this is .*metadata.jsonl, which is read" ./sample --prompts "$dir/set/metadata.jsonl" 1 --no-lora --out-dir "$dir/set"
rm -rf "$dir/set"
cp data/10pairs/owl_0000.png "$dir/cwd/out.png"
cp data/10pairs/owl_0000.png "$dir/out-2.png"
ln -s "$here/data" "$dir/cwd/data"
keeps "$dir/cwd/out.png" 1 "out.png: this file is there" sh -c 'cd "$0" && "$1/sample" x 1' "$dir/cwd" "$here"
keeps "$dir/out-2.png" 1 "out-2.png: this file is there" sample --count 2
rm "$dir/out-2.png"
check "a name that was given is replaced" quiet sample --out "$dir/cwd/out.png" --seed $seed
check "then it is ours" quiet sh -c 'cd "$0" && "$1/sample" x 1' "$dir/cwd" "$here"
echo mine >"$dir/cwd/lora.safetensors"
keeps "$dir/cwd/lora.safetensors" 1 "lora.safetensors: this file is there" sh -c 'cd "$0" && "$1/train" "$2" --steps 1' "$dir/cwd" "$here" "$pairs"
mkdir "$dir/run"
for file in loss.csv state.safetensors; do
    echo mine >"$dir/run/$file"
    keeps "$dir/run/$file" 1 "$file: this file is there" train --steps 1
    rm "$dir/run/$file"
done
echo mine >"$dir/run/preview.png"
quiet ./train "$pairs" --no-cache --batch 1 --rank 1 --steps 1 --preview 1 --run "$dir/run" --out "$dir/lora"
check "nor is a picture by the name of the preview" grep -q mine "$dir/run/preview.png"
mkdir "$dir/drawn" && quiet ./sample x 1 --no-lora --out "$dir/drawn/preview.png" && echo x >"$dir/drawn/preview.txt"
keeps "$dir/drawn/preview.png" 1 "which is read" ./train "$dir/drawn" --no-cache --batch 1 --steps 1 --preview 1 --run "$dir/drawn" --out "$dir/lora"
# Links are followed, the mode stays, and read-only is meant.
mkdir "$dir/far"
ln -s far/lora "$dir/link"
check "through a link to nothing" quiet train --steps 1 --out "$dir/link"
chmod 640 "$dir/far/lora"
check "and to a file" quiet train --steps 1 --out "$dir/link" --seed $seed
check "its seed is exact" sh -c './shortcut info "$0" | grep -q "seed: 18446744073709551615$"' "$dir/link"
check "the link stays one" test -L "$dir/link" -a "$(stat -c %a "$dir/far/lora")" = 640
chmod 444 "$dir/far/lora"
keeps "$dir/far/lora" 1 "read-only" train --steps 1 --out "$dir/link"
chmod 640 "$dir/far/lora"
# What is read is not written, under whatever name.
ln "$dir/far/lora" "$dir/hard"
keeps "$dir/far/lora" 1 "which is read" train --steps 1 --start "$dir/link" --out "$dir/hard"
keeps "$dir/far/lora" 1 "which is read" ./sample x 1 --lora "$dir/link" --out "$dir/hard"
keeps "$dir/far/lora" 1 "which is read" ./shortcut --lora "$dir/link:2" --out "$dir/hard"
keeps "$dir/far/lora" 1 "which is read" ./shortcut merge --kohya --lora "$dir/link:1" --out "$dir/hard"
keeps "$dir/far/lora" 1 "which is read" sample --noise "$dir/link" --latents "$dir/hard"
fails 1 "which is read or written too" sample --latents "$dir/./out" --out "$dir/out"
fails 1 "which is read or written too" train --steps 1 --out "$dir/run/../run/state.safetensors"
cp -r data/tiny-flux "$model"
for part in transformer vae text_encoder; do
    file=$(echo "$model/$part"/*.safetensors)
    keeps "$file" 1 "which is read" train --steps 1 --model "$model" --out "$file"
done
keeps "$model/$weights" 1 "which is read" train --steps 1 --transformer "$model/transformer" --out "$model/$weights"
keeps "$model/$weights" 1 "which is read" sample --transformer "$model/transformer" --latents "$model/$weights"
keeps "$model/$weights" 1 "which is read" ./shortcut merge --kohya --transformer "$model/transformer" --lora "$dir/link" --out "$model/$weights"
keeps "$model/$weights" 1 "which is read" ./shortcut merge --transformer "$model/transformer" --lora "$dir/link" --out "$model/transformer"
keeps "$model/$weights" 1 "which is read" ./shortcut merge --model "$model" --lora "$dir/link" --out "$model/transformer"
keeps "$model/$weights" 1 "which is read" all --full --steps 1 --model "$model" --out "$model/transformer"
keeps "$model/$weights" 1 "which is read" all --distill-guidance --steps 1 --transformer "$model/transformer" --out "$model/transformer"
mkdir "$dir/theirs"
cp data/tiny-flux/vae/config.json "$dir/theirs"
keeps "$dir/theirs/config.json" 1 "config.json: this file is there" ./shortcut merge --lora "$dir/link" --out "$dir/theirs"
cp data/tiny-flux/vae/*.safetensors "$dir/theirs"
keeps "$dir/theirs/diffusion_pytorch_model.safetensors" 1 "this file is there" ./shortcut merge --lora "$dir/link" --out "$dir/theirs"
check "merge" quiet ./shortcut merge --lora "$dir/link" --out "$dir/merged"
check "merge again: the folder is ours" quiet ./shortcut merge --lora "$dir/link" --out "$dir/merged"
check "and into one whose name ends in a slash" quiet ./shortcut merge --lora "$dir/link" --out "$dir/new/"
mv "$dir/new/diffusion_pytorch_model.safetensors" "$dir/new/a-1.safetensors"
echo '{"weight_map": {"x_embedder.bias": "a-1.safetensors"}}' >"$dir/new/a.safetensors.index.json"
fails 1 "its shards would be read instead" all --full --steps 1 --out "$dir/new"
rm -rf "$model"
# No length is too long that the system takes.
deep=$dir
for c in a b c d e f; do deep=$deep/$(printf "$c%.0s" $(seq 200)); done
mkdir -p "$deep"
cp "$dir/link" "$deep/lora"
check "a long way to a LoRA" quiet ./sample x 1 --lora "$deep/lora" --out "$deep/out.png"
check "and to a run" quiet train --steps 1 --run "$deep/run" --out "$deep/lora"
check "is gone to its end" test -s "$deep/out.png" -a -s "$deep/run/state.safetensors" -a -s "$deep/run/loss.csv"
check "a long command is kept whole" sh -c './shortcut info "$0" | grep -q "command.*/lora$"' "$deep/lora"
fails 1 "File name too long" train --steps 1 --out "$dir/$(printf 'x%.0s' $(seq 255))"

# ---- Stopped, by Ctrl-C or for good, and resumed: bit for bit the same ----
seq 200 >"$dir/prompts"
rm -rf "$dir/set"
./sample --prompts "$dir/prompts" 32 --no-lora --out-dir "$dir/set" >"$dir/log" 2>&1 &
while kill -0 $! 2>/dev/null && [ ! -e "$dir/set/000001.png" ]; do sleep 0.05; done
kill -INT $!
wait $!
check "a stopped list says how to go on" grep -q "^error: stopped after [0-9]* pictures; the same command goes on" "$dir/log"
check "and has a line for each picture" test "$(wc -l <"$dir/set/metadata.jsonl")" -eq "$(ls "$dir/set" | grep -c png)"
mkdir "$dir/many"
for i in $(seq 100); do cp data/10pairs/banana_0000.png "$dir/many/$i.png" && echo "banana $i" >"$dir/many/$i.txt"; done
encode="--steps 1 --batch 1 --rank 1 --preview 0 --threads 1 --run $dir/run --out $dir/lora"
./train "$dir/many" $encode >"$dir/log" 2>&1 &
while kill -0 $! 2>/dev/null && ! grep -q "picture 1/" "$dir/log"; do sleep 0.05; done
kill -TERM $!
wait $!
check "encoding that is stopped keeps what it has" grep -q "^error: stopped: captions and latents of [1-9][0-9]* of 100 pictures are kept" "$dir/log"
cp "$dir/many/.shortcut-cache.safetensors" "$dir/part"
check "the next run goes on" quiet ./train "$dir/many" $encode
mv "$dir/many/.shortcut-cache.safetensors" "$dir/whole"
check "and has more" test "$(wc -c <"$dir/whole")" -gt "$(wc -c <"$dir/part")"
check "one that was not stopped" quiet ./train "$dir/many" $encode
check "has the same bits" same "$dir/many/.shortcut-cache.safetensors" "$dir/whole"
rm -rf "$dir/set" "$dir/run" # a run that is going on has its folder for itself
begin() { # the command, its output into `log`; until it is at work
    rm -rf "$dir/run" "$dir/lora"
    "$@" ./train "$pairs" --no-cache --batch 1 --rank 1 --preview 0 --save 1 --steps 100000 --run "$dir/run" --out "$dir/lora" \
        >"$dir/log" 2>&1 &
    while kill -0 $! 2>/dev/null && [ ! -e "$dir/lora" ]; do sleep 0.05; done
}
begin env
fails 1 "run: process $! (since .*--steps 100000.*) is writing there" train --steps 1
for signal in HUP HUP TERM TERM; do kill -$signal $! 2>/dev/null; sleep 0.02; done
wait $!
check "a closed terminal, told twice, and SIGTERM save" grep -q "^stopped at step .*--resume" "$dir/log"
check "and are no failure" grep -q "^wrote " "$dir/log"
check "nothing else is left" test "$(ls -A "$dir/run" | tr '\n' ' ')" = "loss.csv state.safetensors "
begin nohup
kill -HUP $!
sleep 0.2
check "under nohup it goes on" kill -0 $!
kill -KILL $!
wait $! 2>/dev/null
: >"$dir/run/state.safetensors.tmp-shortcut" # as if it had been saving
check "a run that was killed holds nothing" quiet train --resume --steps 100000 --stop-after 1
check "and what it left is gone" test -z "$(find "$dir" -name '*.tmp*' -o -name '.shortcut-lock')"
rm -rf "$dir/run"
mkfifo "$dir/reader"
(train --steps 300 --save 0; echo "rc $?" >"$dir/rc") >"$dir/reader" 2>&1 &
head -n 1 "$dir/reader" >/dev/null
wait $!
check "a reader that goes away ends no run" grep -q "rc 0" "$dir/rc"
check "which saves" test -s "$dir/run/state.safetensors" -a -s "$dir/lora"
weights_of() { tail -c 100000 "$1"; } # without the header, which has the command line
long() { train --steps 40 --rank 16 "$@"; }
check "40 steps" quiet long
weights_of "$dir/lora" >"$dir/expected"
for signal in INT TERM KILL; do
    rm -rf "$dir/run" "$dir/lora"
    ./train "$pairs" --no-cache --batch 1 --rank 16 --preview 0 --run "$dir/run" --out "$dir/lora" --steps 40 --save 2 \
        >"$dir/log" 2>&1 &
    while kill -0 $! 2>/dev/null && [ "$(cat "$dir/run/loss.csv" 2>/dev/null | wc -l)" -lt 8 ]; do sleep 0.05; done
    kill -$signal $! 2>/dev/null
    wait $! 2>/dev/null
    check "SIG$signal stops it in time" test "$(wc -l <"$dir/run/loss.csv")" -lt 41
    check "and leaves a whole file" quiet ./shortcut info "$dir/lora"
    check "resumed" quiet long --save 2 --resume
    weights_of "$dir/lora" >"$dir/got"
    check "SIG$signal and --resume equal a run that was not stopped" same "$dir/got" "$dir/expected"
done
fails 1 "does not fit" train --steps 40 --rank 2 --resume
fails 1 "beyond --steps" long --steps 1 --resume
head -c 300 "$dir/run/state.safetensors" >"$dir/cut"
cp "$dir/cut" "$dir/run/state.safetensors"
fails 1 "truncated" long --resume
rm "$dir/run/state.safetensors"
fails 1 "No such file" long --resume
report
