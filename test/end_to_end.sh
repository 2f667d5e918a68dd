#!/bin/sh
# The programs as a user meets them, on the small model: results, exit codes, one-line errors.
. test/check.sh

cp -r data/10pairs "$dir/pairs"
run="--run $dir/run --out $dir/lora.safetensors --preview 0"

check "help" quiet ./train --help
check "help" quiet ./sample -h
check "help" quiet ./shortcut --help
check "sample" quiet ./sample "a red apple" 3 --no-lora --out "$dir/a.png"
check "sample again" quiet ./sample "a red apple" 3 --no-lora --out "$dir/b.png"
check "the same seed gives the same picture" same "$dir/a.png" "$dir/b.png"
check "another seed" quiet ./sample "a red apple" 3 --no-lora --seed 2 --out "$dir/c.png"
check "gives another picture" differ "$dir/a.png" "$dir/c.png"
check "empty, long and broken prompts" quiet ./sample "" 1 --no-lora --out "$dir/d.png"
check "a prompt that is cut is told" sh -c './sample "$(printf "apple %.0s" $(seq 40))" 1 --no-lora --out "$0" 2>&1 |
    grep -q "^warning: T5 reads the first 16 tokens only of 1 prompt"' "$dir/d.png"
check "and so is a negative one" sh -c './sample "apple" 1 --no-lora --cfg 2 --negative "$(printf "apple %.0s" $(seq 40))" --out "$0" 2>&1 |
    grep -q "^warning: T5 reads the first 16 tokens only of 1 negative prompt"' "$dir/d.png"
check "CLIP's end, too" sh -c './sample "$(printf "apple %.0s" $(seq 40))" 1 --no-lora --out "$0" 2>&1 |
    grep -q "^warning: CLIP reads the first 32 tokens only of 1 prompt$"' "$dir/d.png"
printf 'a pig\n%s\n' "$(printf 'apple %.0s' $(seq 40))" >"$dir/prompts"
check "and by ./shortcut" sh -c './shortcut --prompts "$0/prompts" --count 2 --steps 1 --out "$0/sheet.png" 2>&1 |
    grep -q "^warning: T5 reads the first 16 tokens only of 1 prompt$"' "$dir"
check "one that is not, not" sh -c '! ./sample "a red apple" 1 --no-lora --out "$0" 2>&1 | grep warning' "$dir/d.png"
check "long prompt" quiet ./sample "$(printf 'apple %.0s' $(seq 2000))" 1 --no-lora --out "$dir/d.png"
fails 1 "not UTF-8: byte 1 is 0xff" ./sample "$(printf 'a\377\376b')" 1 --no-lora --out "$dir/d.png"

check "a warm-up" quiet ./train "$dir/pairs" --steps 4 --batch 1 --warmup 2 --lr 2e-4 --final-lr 0 $run
check "to the rate that the cosine begins with" test "$(sed 1d "$dir/run/loss.csv" | cut -d, -f4 | tr '\n' ' ')" = \
    "0.0001 0.0002 0.0002 0.0001 "

# Six steps at once, and three, then three more: the same bits.
check "train" quiet ./train "$dir/pairs" --steps 6 --batch 2 $run
mv "$dir/lora.safetensors" "$dir/six.safetensors"
cp "$dir/run/state.safetensors" "$dir/six-state.safetensors"
check "interrupted" quiet ./train "$dir/pairs" --steps 6 --batch 2 --stop-after 3 $run
cp "$dir/run/state.safetensors" "$dir/x"
fails 1 "stopped at step 3 of 6: go on with --resume" ./train "$dir/pairs" --steps 6 --batch 2 $run
check "a new run leaves a stopped one alone" same "$dir/run/state.safetensors" "$dir/x"
sed 's/--clip/--clap/' "$dir/x" >"$dir/run/state.safetensors"
fails 1 "state.safetensors: '--clap 10' is no option" ./train --resume --run "$dir/run"
cp "$dir/x" "$dir/run/state.safetensors"
check "resume, with the data and options of the run" quiet ./train --resume --run "$dir/run"
check "its LoRA says both commands" sh -c './shortcut info "$0" | grep -q "stop-after 3.* && .*--resume"' "$dir/lora.safetensors"
check "resumed LoRA is the same but for its command line" quiet ./shortcut info "$dir/lora.safetensors"
tail -c 100000 "$dir/lora.safetensors" >"$dir/x"
tail -c 100000 "$dir/six.safetensors" >"$dir/y"
check "resumed training equals uninterrupted training bit for bit" same "$dir/x" "$dir/y"
for mode in "--fm-ratio 0.5" "--cfg 2" "--cfg 2 --cfg-student --fm-ratio .5" "--full --ema-restart 2" "--pretrain" "--pretrain --fm-ratio 0.5" "--distill-guidance"; do
    all="$dir/pairs --steps 4 --batch 2 $mode --save 0 --preview 0 --out $dir/whole"
    check "$mode" quiet ./train $all --run "$dir/run1"
    check "$mode, interrupted" quiet ./train $all --run "$dir/run2" --stop-after 2
    echo "3,of a step whose state was not saved" >>"$dir/run2/loss.csv"
    check "$mode, resumed" quiet ./train --run "$dir/run2" --resume
    tail -c 1000000 "$dir/run1/state.safetensors" >"$dir/x"
    tail -c 1000000 "$dir/run2/state.safetensors" >"$dir/y"
    check "$mode: resumed equals uninterrupted bit for bit" same "$dir/x" "$dir/y"
    check "$mode: so does its loss.csv" same "$dir/run1/loss.csv" "$dir/run2/loss.csv"
    rm -rf "$dir/run1" "$dir/run2" "$dir/whole"
done
check "true CFG" quiet ./sample "a red apple" 3 --no-lora --cfg 2 --negative "a banana" --out "$dir/e.png"
check "changes the picture" differ "$dir/a.png" "$dir/e.png"
check "is in it" grep -qa "Negative prompt: a banana" "$dir/e.png"
echo "a red apple" >"$dir/one.txt"
for again in 1 2; do
    check "a list with true CFG, $again" quiet ./sample --prompts "$dir/one.txt" 1 --no-lora --cfg 2 --negative "" --out-dir "$dir/listed"
done
check "with 1" quiet ./sample "a red apple" 3 --no-lora --cfg 1 --latents "$dir/l0" --out "$dir/e.png"
check "without" quiet ./sample "a red apple" 3 --no-lora --latents "$dir/l1" --out "$dir/e.png"
check "are equal" same "$dir/l0" "$dir/l1"
check "LoRA" quiet ./sample "a red apple" 3 --lora "$dir/lora.safetensors" --out "$dir/e.png"
check "changes the picture" differ "$dir/a.png" "$dir/e.png"
check "with scale 0" quiet ./sample "a red apple" 3 --lora "$dir/lora.safetensors:0" --latents "$dir/l0" --out "$dir/f.png"
check "without" quiet ./sample "a red apple" 3 --no-lora --latents "$dir/l1" --out "$dir/g.png"
check "are equal" same "$dir/l0" "$dir/l1"
check "a LoRA that recommends a guidance" quiet ./train "$dir/pairs" --steps 1 --batch 1 --scales "3:1@1.75 8:0.5" --preview 0 --out "$dir/guided.safetensors" --run "$dir/run1"
guided() { ./sample "a red apple" "$@" --out "$dir/f.png" 2>&1 | grep "^guidance 1.75, the LoRA's for 3 steps" >/dev/null; } # not -q: it is to draw to the end
check "is sampled with it" guided 3 --lora "$dir/guided.safetensors" --latents "$dir/l0"
check "which is as if one asked for it" quiet ./sample "a red apple" 3 --lora "$dir/guided.safetensors:1" --guidance 1.75 --latents "$dir/l1" --out "$dir/f.png"
check "the same latents" same "$dir/l0" "$dir/l1"
check "not at other steps" not guided 8 --lora "$dir/guided.safetensors"
check "not where another is asked for" not guided 3 --lora "$dir/guided.safetensors" --guidance 2
check "not where a scale is" not guided 3 --lora "$dir/guided.safetensors:1"
check "merging says it" sh -c './shortcut merge --lora "$0/guided.safetensors" --out "$0/merged" 2>&1 | grep -q "3 steps the LoRA asks for guidance 1.75"' "$dir"
rm -rf "$dir/merged" "$dir/run1"
cache="$dir/pairs/.shortcut-cache.safetensors"
first=$(ls -i "$cache")
check "cached" quiet ./train "$dir/pairs" --steps 1 --batch 1 $run
check "latents and embeddings are used again" test "$first" = "$(ls -i "$cache")"
check "cached under another name of the folder" quiet ./train "$dir/../$(basename "$dir")/pairs/" --steps 1 --batch 1 $run
check "they are used again" test "$first" = "$(ls -i "$cache")"
touch "$(ls "$dir"/pairs/*.png | head -n 1)"
check "a changed picture" quiet ./train "$dir/pairs" --steps 1 --batch 1 $run
check "makes them anew" test "$first" != "$(ls -i "$cache")"
sed 's/"latents\.3"/"latents.x"/' "$cache" >"$dir/broken" && mv "$dir/broken" "$cache"
check "a damaged cache" quiet ./train "$dir/pairs" --steps 1 --batch 1 $run
check "is made anew" grep -q -a '"latents\.3"' "$cache"
mv "$dir/six.safetensors" "$dir/lora.safetensors"
check "dry run" quiet ./train "$dir/pairs" --dry-run $run
check "info of the model" quiet ./shortcut info data/tiny-flux
check "merge" quiet ./shortcut merge --lora "$dir/lora.safetensors" --out "$dir/merged"
cp -r data/tiny-flux "$dir/model" && mkdir "$dir/cwd" && cp "$dir/lora.safetensors" "$dir/cwd"
here=$PWD
check "lora.safetensors is for its own model" sh -c 'cd "$1" && ln -s "$0/data" data && "$0/sample" "a pig" 1 2>&1 | grep -q "applied 56/56"' \
    "$here" "$dir/cwd"
check "and for no other" sh -c 'cd "$1" && "$0/sample" "a pig" 1 --model "$2" 2>&1 | grep -q "is not used, it was made for data/tiny-flux"' \
    "$here" "$dir/cwd" "$dir/model"
check "nor, by itself, on top of what it is merged into" sh -c 'cd "$1" && "$0/sample" "a pig" 1 --transformer "$2" 2>&1 | grep -q "is not used"' \
    "$here" "$dir/cwd" "$dir/merged"
cp -r data/tiny-flux "$dir/with" && cp "$dir/merged"/* "$dir/with/transformer" && cp "$dir/lora.safetensors" "$dir/with.safetensors"
check "merged weights" quiet ./shortcut info "$dir/merged"
check "in the model's place" quiet ./train "$dir/pairs" --steps 1 --batch 1 --preview 0 --model "$dir/with" --run "$dir/run4" --out "$dir/cwd/lora.safetensors"
check "they have their LoRA once" sh -c 'cd "$1" && "$0/sample" "a pig" 1 --model "$2" 2>&1 | grep -q "is not used, the transformer has merged in: .*lora.safetensors"' \
    "$here" "$dir/cwd" "$dir/with"
fails 1 "lora.safetensors was made for .*/with: name another place with --out" \
    sh -c 'cd "$1" && "$0/train" "$2" --steps 1 --batch 1 --preview 0' "$here" "$dir/cwd" "$dir/pairs"
fails 2 "merge does not read --weights" ./shortcut merge --weights fp8 --lora "$dir/lora.safetensors"
fails 2 "info does not read --seed" ./shortcut info README.md --seed 1
fails 2 "kohya is for merge" ./shortcut --kohya
fails 2 "rank and --alpha are for a LoRA" ./train "$dir/pairs" --full --rank 3
for transformer in data/tiny-flux/transformer data/tiny-flux/transformer/diffusion_pytorch_model.safetensors; do
    ./sample "a pig" 1 --no-lora --transformer $transformer --latents "$dir/of" --out "$dir/h.png" >/dev/null && cksum <"$dir/of"
done >"$dir/sums"
check "a transformer's file has the config of its folder" test "$(uniq -d "$dir/sums" | wc -l)" = 1
weights=data/tiny-flux/transformer/diffusion_pytorch_model.safetensors
n=$(od -An -t d8 -N 8 $weights | tr -d ' ')
header="{\"ip.weight\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},$(tail -c +10 $weights | head -c $((n - 1)))"
{
    printf "\\$(printf %o $((${#header} % 256)))\\$(printf %o $((${#header} / 256 % 256)))\\$(printf %o $((${#header} / 65536)))\\0\\0\\0\\0\\0"
    printf %s "$header"
    tail -c +$((n + 9)) $weights
} >"$dir/adapted.safetensors"
check "merging says what it leaves out" sh -c './shortcut merge --transformer "$0/adapted.safetensors" --lora "$0/lora.safetensors:1" --out "$0/more" 2>&1 |
    grep -q "^warning: 1 tensors of .*adapted.safetensors are not used: ip.weight"' "$dir"
check "merge into another transformer" quiet ./shortcut merge --transformer data/pretrained --lora "$dir/lora.safetensors:0" --out "$dir/other"
for transformer in data/pretrained "$dir/other"; do
    ./sample "a pig" 1 --no-lora --transformer $transformer --latents "$dir/of" --out "$dir/h.png" >/dev/null && cksum <"$dir/of"
done >"$dir/sums"
check "which is that one" test "$(uniq -d "$dir/sums" | wc -l)" = 1
check "kohya's names" quiet ./shortcut merge --kohya --lora "$dir/lora.safetensors" --out "$dir/kohya.safetensors"
check "are read" quiet ./sample "a red apple" 3 --lora "$dir/kohya.safetensors:1" --out "$dir/h.png"
check "LoRAs stack" quiet ./sample "a red apple" 3 --lora "$dir/kohya.safetensors:-1" --lora "$dir/lora.safetensors:1" \
    --latents "$dir/l2" --out "$dir/h.png"
check "several sizes" quiet ./sample "a red apple" 1 --no-lora --size 144x80 --shift auto --out "$dir/i.png"
printf 'a pig\na lemon\n' >"$dir/prompts"
check "prompts" quiet ./sample --prompts "$dir/prompts" 2 --no-lora --out-dir "$dir/set"
rm "$dir/set/000000.png"
check "prompts again" quiet ./sample --prompts "$dir/prompts" 2 --no-lora --out-dir "$dir/set"
check "draw what is missing" test -s "$dir/set/000000.png"
mv "$dir/set/000000.png" "$dir/bare.png"
check "with a LoRA" quiet ./sample --prompts "$dir/prompts" 2 --lora "$dir/lora.safetensors" --out-dir "$dir/set"
touch -d "1 minute" "$dir/lora.safetensors"
touch -d "2 minutes ago" "$dir/set/000000.png"
check "which is newer" quiet ./sample --prompts "$dir/prompts" 2 --lora "$dir/lora.safetensors" --out-dir "$dir/set"
check "draws them anew" test -z "$(find "$dir/set" -name 000000.png -mmin +1)"
check "the LoRA's" differ "$dir/set/000000.png" "$dir/bare.png"
cp "$dir/set/000000.png" "$dir/lora.png"
mv "$dir/lora.safetensors" "$dir/moved" && touch -d "1 hour ago" "$dir/moved" && sleep 0.01 && mv "$dir/moved" "$dir/lora.safetensors"
inode=$(ls -i "$dir/set/000000.png")
check "with one that is older, but came later" quiet ./sample --prompts "$dir/prompts" 2 --lora "$dir/lora.safetensors" --out-dir "$dir/set"
check "anew, too" test "$inode" != "$(ls -i "$dir/set/000000.png")"
inode=$(ls -i "$dir/set/000000.png")
check "and once more" quiet ./sample --prompts "$dir/prompts" 2 --lora "$dir/lora.safetensors" --out-dir "$dir/set"
check "not again" test "$inode" = "$(ls -i "$dir/set/000000.png")"
check "and without" quiet ./sample --prompts "$dir/prompts" 2 --no-lora --out-dir "$dir/set"
check "are drawn anew" differ "$dir/set/000000.png" "$dir/lora.png"
check "as they were" same "$dir/set/000000.png" "$dir/bare.png"
printf 'a pig\n  \n' >"$dir/fewer"
check "a shorter list says what it leaves, and no blank line is a prompt" sh -c './sample --prompts "$0/fewer" 2 --no-lora --out-dir "$0/set" 2>&1 |
    grep -q "^warning: 1 older pictures stay"' "$dir"
quiet ./sample --prompts "$dir/prompts" 2 --no-lora --out-dir "$dir/set"
truncate -s -20 "$dir/set/metadata.jsonl"
check "a list whose last line was cut off" quiet ./sample --prompts "$dir/prompts" 2 --no-lora --out-dir "$dir/set"
check "is whole again" grep -q '"a lemon"}$' "$dir/set/metadata.jsonl"
quiet ./sample --prompts "$dir/prompts" 2 --no-lora --model "$dir/model" --out-dir "$dir/set2"
inode=$(ls -i "$dir/set2/000000.png")
sleep 0.01 && touch "$dir/model/vae/config.json"
check "a config that changed" quiet ./sample --prompts "$dir/prompts" 2 --no-lora --model "$dir/model" --out-dir "$dir/set2"
check "changes the pictures" test "$inode" != "$(ls -i "$dir/set2/000000.png")"
mkdir "$dir/a.b"
check "several of a name without an ending" quiet ./sample x 1 --no-lora --count 2 --out "$dir/a.b/x"
check "are numbered" test -s "$dir/a.b/x" -a -s "$dir/a.b/x-2"
check "the experiment, at a size that is not the evaluator's" quiet ./shortcut --count 2 --resolution 64 \
    --lora "$dir/lora.safetensors:0.5" --shift 3 --out "$dir/sheet.png"
check "draws its sheet" test -s "$dir/sheet.png"
check "make a data set" test -s "$dir/set/metadata.jsonl" -a -s "$dir/set/000001.png"

fails 2 "unknown option" ./train --nonsense
fails 2 "needs a value" ./sample "x" 3 --size
fails 2 "takes" ./train "$dir/pairs" --lr fast
fails 1 "No such file" ./train "$dir/none"
fails 1 "No such file" ./sample "x" 1 --model "$dir/none"
fails 1 "cannot write" ./sample "x" 1 --no-lora --out "$dir/none/a.png"
fails 2 "positive number or auto" ./sample "x" 1 --no-lora --shift fast
fails 2 "multiples of 16" ./sample "x" 1 --no-lora --size 100x100
fails 2 "has no teacher" ./train "$dir/pairs" --pretrain --teacher-ratio 0.4 $run
fails 2 "is for a LoRA" ./train "$dir/pairs" --full --start "$dir/lora.safetensors" $run
fails 2 "is for a LoRA" ./train "$dir/pairs" --full --teacher "$dir/lora.safetensors" $run
# A teacher with a LoRA, from which the student starts.
taught() { ./train "$dir/pairs" --steps 1 --batch 1 --lr 1e-30 --preview 0 --run "$dir/taught" --out "$dir/taught.safetensors" "$@"; }
check "a teacher with a LoRA" quiet taught --teacher "$dir/lora.safetensors:2"
check "what the student starts from" quiet ./sample "a red apple" 2 --lora "$dir/taught.safetensors:1" --latents "$dir/l0" --out "$dir/f.png"
check "and its teacher" quiet ./sample "a red apple" 2 --lora "$dir/lora.safetensors:2" --latents "$dir/l1" --out "$dir/f.png"
check "are the same" same "$dir/l0" "$dir/l1"
check "its teacher has it" quiet taught --teacher "$dir/lora.safetensors:1" --teacher-ratio 1
mv "$dir/taught/loss.csv" "$dir/x"
check "another start has not" quiet taught --start "$dir/lora.safetensors" --teacher-ratio 1
check "as the loss tells" differ "$dir/taught/loss.csv" "$dir/x"
fails 1 "rank 64; this run has rank 2" taught --teacher "$dir/lora.safetensors" --rank 2
fails 1 "which is read" taught --teacher "$dir/taught.safetensors:1"
header='{"transformer.proj_out.diff_b":{"dtype":"F32","shape":[64],"data_offsets":[0,256]}}'
{ printf "\\$(printf %o ${#header})\\0\\0\\0\\0\\0\\0\\0%s" "$header" && head -c 256 /dev/zero; } >"$dir/bias.safetensors"
cp "$dir/bias.safetensors" "$dir/cwd/lora.safetensors"
check "a LoRA that names no model is none's own" sh -c 'cd "$1" && "$0/sample" "a pig" 1 2>&1 | grep -q "is not used, it was made for a model that it does not name"' \
    "$here" "$dir/cwd"
check "a bias alone" quiet ./sample x 1 --lora "$dir/bias.safetensors" --out "$dir/f.png"
fails 1 "changes 'proj_out.bias', which the student's" taught --start "$dir/lora.safetensors" --teacher "$dir/bias.safetensors:1"
# A state says what its numbers mean.
check "a run of alpha 32" quiet taught --alpha 32 --steps 2 --stop-after 1
fails 1 "the run of a LoRA of alpha 32, not of a LoRA of alpha 64" taught --steps 2 --resume --alpha 64
check "goes on with it" quiet taught --steps 2 --resume
check "a run with a teacher" quiet taught --teacher "$dir/lora.safetensors:3" --steps 2 --stop-after 1
fails 1 "of the teacher .*lora.safetensors:3, not of a LoRA of alpha 64, of the teacher .*:1" taught --steps 2 --resume \
    --teacher "$dir/lora.safetensors:1"
check "goes on with it" quiet taught --steps 2 --resume
check "a run without a cache" quiet ./train data/10pairs --no-cache --steps 2 --batch 1 --stop-after 1 --preview 0 --run "$dir/run5" --out "$dir/taught.safetensors"
check "goes on" quiet ./train --resume --run "$dir/run5"
check "without one" grep -q -a -e '--no-cache yes' "$dir/run5/state.safetensors"
check "a new run after one that ended" sh -c '! "$@" 2>/dev/null' sh timeout -s KILL 2 ./train "$dir/pairs" --steps 100000 --batch 1 \
    --run "$dir/taught" --out "$dir/taught.safetensors"
fails 2 "nothing to resume" ./train --resume --run "$dir/taught"
fails 1 "nothing to resume" ./train "$dir/pairs" --resume --run "$dir/taught"
check "and its loss.csv is ours" quiet taught --steps 1
cp -r data/tiny-flux/transformer "$dir/unguided"
sed 's/"guidance_embeds": true/"guidance_embeds": false/' data/tiny-flux/transformer/config.json >"$dir/unguided/config.json"
check "guidance is no input there" sh -c './sample x 1 --no-lora --transformer "$0/unguided" --guidance 9 --out "$0/h.png" 2>&1 |
    grep -q "^note: .*--guidance changes nothing"' "$dir"
fails 1 "takes no guidance" ./train "$dir/pairs" --distill-guidance --transformer "$dir/unguided" $run --out "$dir/whole"
# Parts that do not belong together.
cp -r data/tiny-flux "$dir/odd"
config=transformer/config.json
sed 's/"in_channels": 64/"in_channels": 16/' data/tiny-flux/$config >"$dir/odd/$config"
fails 1 "tokens of 16 channels" ./train "$dir/pairs" --no-cache --model "$dir/odd" --pretrain $run --out "$dir/whole"
sed 's/"joint_attention_dim": 128/"joint_attention_dim": 32/' data/tiny-flux/$config >"$dir/odd/$config"
fails 1 "the transformer takes 32" ./train "$dir/pairs" --no-cache --model "$dir/odd" --pretrain $run --out "$dir/whole"
fails 1 "this is a folder" ./train "$dir/pairs" --steps 1 --batch 1 --run "$dir/run" --out "$dir/odd"
check "a LoRA for another transformer" quiet ./train "$dir/pairs" --steps 1 --batch 1 --rank 1 --preview 0 --run "$dir/run3" \
    --transformer data/tiny-flux/transformer --out "$dir/other.safetensors"
check "says so" sh -c './shortcut info "$0" | grep -q "base_model: data/tiny-flux/transformer"' "$dir/other.safetensors"
cp -r data/evaluator "$dir/judge"
sed 's/"norm_num_groups": *[0-9]*/"norm_num_groups": 64/' data/evaluator/config.json >"$dir/judge/config.json"
fails 1 "not an evaluator" ./shortcut --evaluator "$dir/judge" --count 2 --out "$dir/sheet.png"
sed 's/"feature_dim": *[0-9]*/"feature_dim": 26755/' data/evaluator/config.json >"$dir/judge/config.json"
fails 1 "not an evaluator" ./shortcut --evaluator "$dir/judge" --count 2 --out "$dir/sheet.png"
fails 2 "cannot be negative" ./train "$dir/pairs" --save -1 $run
mkdir "$dir/many" && cp "$dir/pairs/banana_0000.png" "$dir/many/a.png"
for i in $(seq 3000); do echo "{\"file_name\": \"a.png\", \"text\": \"banana $i\"}"; done >"$dir/many/metadata.jsonl"
fails 1 "stopped" timeout --foreground --preserve-status -k 9 -s TERM 1 ./train "$dir/many" --no-cache $run
head -c 1000 "$dir/lora.safetensors" >"$dir/cut.safetensors"
fails 1 "truncated" ./sample "x" 1 --lora "$dir/cut.safetensors"
fails 1 "not understood: decoder.conv_in" ./sample "x" 1 --lora data/tiny-flux/vae/diffusion_pytorch_model.safetensors
mkdir "$dir/odd-sizes"
./sample "a pig" 1 --no-lora --size 256x16 --out "$dir/odd-sizes/a.png" >/dev/null
./sample "a pig" 1 --no-lora --size 16x16 --out "$dir/odd-sizes/b.png" >/dev/null
printf '{"file_name": "a.png", "prompt": "", "text": "a pig"}\n{"file_name": "b.png", "text": "a pig"}\n' >"$dir/odd-sizes/metadata.jsonl"
./train "$dir/odd-sizes" --no-cache --steps 1 --batch 1 $run >"$dir/output" 2>&1
check "a picture that is cut is told" grep -q "^warning: half or more is cut off .*: 1 of 2 pictures, such as .*/a.png" "$dir/output"
check "one that is enlarged, too" grep -q "^warning: enlarged more than twofold: 2 of 2 pictures" "$dir/output"
check "an empty caption beside another is none" grep -q ": 2 pairs, 1 captions" "$dir/output"
printf 'not a picture' >"$dir/pairs/banana_0000.png"
fails 1 "banana_0000.png" ./train "$dir/pairs" $run
check "before anything is encoded" sh -c '! ./train "$0/pairs" --run "$0/run" 2>&1 | grep caption' "$dir"
fails 1 "lower --lr" ./train data/10pairs --no-cache --steps 20 --lr 1e30 $run

# What is read is never replaced, and what is written is whole.
tiny="--no-cache --batch 1 --rank 1 --preview 0"
check "a LoRA" quiet ./train data/10pairs $tiny --steps 1 --out "$dir/p-2" --run "$dir/r"
fails 1 "choose another place" ./sample "a pig" 1 --lora "$dir/p-2" --out "$dir/p" --count 2
mkdir "$dir/folder" && cp "$dir/p-2" "$dir/folder/diffusion_pytorch_model.safetensors"
fails 1 "choose another place" ./shortcut merge --lora "$dir/folder" --out "$dir/folder"
fails 1 "choose another place" ./train "$dir/odd-sizes" --steps 1 --run "$dir/odd-sizes"
check "without stdout and stderr" sh -c './train data/10pairs $1 --steps 30 --out "$0/closed" --run "$0/r" >&- 2>&-' "$dir" "$tiny"
check "loss.csv is what it should be" sh -c 'test $(wc -l <"$0") = 31 && ! grep -q "^step [0-9]" "$0"' "$dir/r/loss.csv"
fails 1 "would hold NaN or infinity" ./train data/10pairs $tiny --steps 1 --lr 3e38 --out "$dir/nan" --run "$dir/r"
check "so it is not there" test ! -e "$dir/nan"
fails 1 "not all could be written" sh -c './shortcut info data/tiny-flux >/dev/full'
check "a run with a teacher" quiet ./train data/10pairs $tiny --steps 2 --stop-after 1 --teacher "$dir/p-2" --out "$dir/t" --run "$dir/rt"
fails 1 "goes on with its own, 1" ./train --resume --seed 9 --run "$dir/rt"
cp "$dir/closed" "$dir/p-2"
check "another teacher is told" sh -c './train --resume --run "$0" 2>&1 | grep -q "^warning: the files of the transformer or the teacher"' "$dir/rt"
check "a run with a start" quiet ./train data/10pairs $tiny --steps 2 --stop-after 1 --start "$dir/closed" --out "$dir/t" --run "$dir/rs"
rm "$dir/closed"
check "goes on without it" quiet ./train --resume --run "$dir/rs"
fails 2 "cannot be kept for --resume" ./train data/10pairs $tiny --steps 1 --out "$(printf "$dir/caf\351")" --run "$dir/r"
./train data/10pairs $tiny --steps 100000 --out "$dir/both" --run "$dir/r1" >"$dir/output" 2>&1 &
for i in $(seq 300); do [ -s "$dir/r1/loss.csv" ] || sleep 0.1; done
check "a second run to the same file" quiet ./train data/10pairs $tiny --steps 1 --out "$dir/both" --run "$dir/r2"
cp "$dir/both" "$dir/x"
kill $!
wait $!
check "which the first does not replace" same "$dir/both" "$dir/x"
check "but says so" grep -q "^error: .*another program wrote it during this run" "$dir/output"
check "and keeps what it learned" quiet ./train --resume --run "$dir/r1" --out "$dir/first" --stop-after 1
check "a prompt with settings in it" quiet ./sample "$(printf 'a pig\nSteps: one')" 1 --no-lora --out "$dir/numbers-2.png"
check "and an empty prompt" quiet ./sample "" 1 --no-lora --out "$dir/numbers-3.png"
check "are this program's pictures" quiet ./sample "x" 1 --no-lora --out "$dir/numbers.png" --count 3
check "info to a reader that went away" sh -c '{ ./shortcut info data/tiny-flux; echo $? >"$0"; } | true; grep -q "^0$" "$0"' "$dir/output"
echo "a pig" >"$dir/prompts"
check "a folder of pictures" quiet ./sample --prompts "$dir/prompts" 1 --no-lora --out-dir "$dir/cut"
cp "$dir/cut/000000.png" "$dir/x"
head -c 3000 "$dir/x" >"$dir/cut/000000.png"
printf '{"file_na' >"$dir/cut/metadata.jsonl"
check "a cut one" quiet ./sample --prompts "$dir/prompts" 1 --no-lora --out-dir "$dir/cut"
check "is drawn again" same "$dir/x" "$dir/cut/000000.png"

# The scripts behind the README's tables run, in small: what is given last counts.
small="$dir/small" here=$PWD
mkdir -p "$small/data" && ln -s "$here"/data/* "$small/data"
ln -s "$here/data/10pairs" "$small/data/emoji-301"
[ -e "$small/data/emoji-test" ] || ln -s "$here/data/10pairs" "$small/data/emoji-test"
echo "a banana" >"$small/prompts"
echo "'$here/train' \"\$@\" --no-cache --steps 2 --batch 2" >"$small/train"
echo "'$here/sample' \"\$@\" --prompts prompts --count 2" >"$small/sample"
echo "case \$1 in merge) '$here/shortcut' \"\$@\" ;; *) '$here/shortcut' \"\$@\" --prompts prompts --count 2 --steps 2 ;; esac" \
    >"$small/shortcut"
chmod +x "$small/train" "$small/sample" "$small/shortcut"
for script in true_cfg scfm_pretraining; do
    check "data/$script.sh" sh -c 'cd "$0" && sh "data/$1.sh" >output 2>&1 || { tail -n 5 output; false; }' "$small" $script
done

report
