#!/bin/sh
# One run by many processes (build/mpi/*, which make test builds where mpicc and mpirun are): the same
# losses and pictures as one process has, and one end for all, whatever happens to one of them.
. test/check.sh

if [ ! -x build/mpi/train ] || ! command -v mpirun >/dev/null; then
    echo "skipped: no mpicc or no mpirun"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
here=$PWD bin=${MPI_PROGRAMS:-$PWD/build/mpi}
# Open MPI's (4 and 5) refusals: root, and more processes than cores. To MPICH they say nothing.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
export dir ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0" # MPI frees not everything

# Each process leaves its number there, and those of a folder each go to their own.
cat >"$dir/start" <<'END'
echo $$ >>"$dir/pids"
rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}
[ ! -d "$dir/host$rank" ] || cd "$dir/host$rank"
exec "$@"
END
many() { # processes, program, arguments...
    count=$1 program=$2
    shift 2
    rm -f "$dir/pids"
    timeout -k 5 900 mpirun -n "$count" sh "$dir/start" "$bin/$program" "$@"
}
run() { # processes (0: the program without MPI), name of the run, options...
    number=$1 name=$2
    shift 2
    case "$*" in *--full*) ;; *) set -- --rank 16 "$@" ;; esac
    set -- "$dir/pairs" --preview 0 --run "$dir/$name" --out "$dir/out-$name" "$@"
    if [ "$number" = 0 ]; then ./train "$@"; else many "$number" train "$@"; fi >"$dir/log" 2>&1
}
near() { # two runs, steps: are the losses within 1e-6 (or so much)?
    paste -d, "$dir/$1/loss.csv" "$dir/$2/loss.csv" | awk -F, -v n="$3" -v most="${4:-1e-6}" '
        NR > 1 { d = $2 / $6 - 1; if (!(d < most && d > -most)) bad = 1 } END { exit bad || NR != n + 1 }'
}
gone() { # soon none of the processes runs any more (one that is not yet waited for may be there)
    for i in $(seq 100); do
        left=0
        for pid in $(cat "$dir/pids"); do
            case $(ps -o stat= -p "$pid") in '' | Z*) ;; *) left=1 ;; esac
        done
        [ $left = 0 ] && return 0
        sleep 0.1
    done
    return 1
}
once() { # words: one line says error, with host and process, and these
    [ "$(grep -c '^error:' "$dir/log")" = 1 ] && grep -q "^error: $(uname -n)[^ ]*, process [0-9]*: .*$1" "$dir/log"
}
weights() { tail -c 1000000 "$dir/$1/state.safetensors" >"$dir/$1.weights"; }

cp -r data/10pairs "$dir/pairs"
# 16 pairs are 8 and 8; 5, 5 and 6; or 4 each.
steps="--steps 400 --stop-after 6"
check "one process" run 0 one $steps
for n in 1 2 3 4; do
    check "$n processes" run $n many$n $steps
    check "$n processes have the losses of one" near many$n one 6
done
check "two stop" run 2 stopped --steps 400 --stop-after 3
cp -r "$dir/stopped" "$dir/again"
check "two go on" run 2 stopped $steps --resume
weights stopped && weights many2
check "as if they had not stopped, bit for bit" same "$dir/stopped.weights" "$dir/many2.weights"
check "or four do" run 4 again $steps --resume
check "with the losses of one" near again one 6
# Small products take other ways through OpenBLAS, so that small batches are a little farther off.
for mode in "--cfg 2 --cfg-student --fm-ratio .5" "--full --fm-ratio .5 --ema-restart 2"; do
    rm -rf "$dir/a" "$dir/b" "$dir/out-a" "$dir/out-b"
    check "$mode" run 0 a --batch 5 --steps 3 $mode
    check "$mode, 3 processes" run 3 b --batch 5 --steps 3 $mode
    check "$mode: the losses of one" near a b 3 1e-5
done

# Ends.
alive() { # until the run that was started has done some steps
    for i in $(seq 300); do
        [ "$(cat "$dir/$1/loss.csv" 2>/dev/null | wc -l)" -lt 3 ] || return 0
        sleep 0.1
    done
    return 1
}
stop() { # signal, whom: mpirun or a process
    rm -rf "$dir/ended"
    run 2 ended --batch 2 --steps 100000 --save 2 &
    started=$!
    check "a run, for $1 to $2" alive ended
    if [ "$2" = mpirun ]; then kill -"$1" "$(ps -o ppid= -p "$(tail -n 1 "$dir/pids")")"
    else kill -"$1" "$(tail -n 1 "$dir/pids")"; fi
    wait $started
    ended=$?
    check "SIG$1 to $2: nobody is left" gone
}
stop KILL process
check "a run with one killed has failed" test $ended -ne 0
check "and leaves a whole state" run 2 ended --batch 2 --steps 100000 --stop-after 1 --resume
stop INT process
check "one that is interrupted stops all" grep -q "^stopped at step" "$dir/log"
check "which is no error" test $ended -eq 0
if mpirun --version | grep -q "Open MPI"; then # its SIGTERM; MPICH's does not outlive the second signal
    stop INT mpirun
    check "Ctrl-C saves" grep -q "^stopped at step" "$dir/log"
fi
mkdir "$dir/full" && ln -s /dev/full "$dir/full/loss.csv"
check "a full disk" not run 2 full --batch 2 --steps 2
check "is told once" once "is the disk full"
check "nobody is left" gone
check "a batch for fewer processes" not run 3 small --batch 2
check "is refused once" once "smaller than the number of processes"
check "a folder that is not there" not many 2 train "$dir/none" >"$dir/log" 2>&1
check "is told once" once "No such file"
for i in 0 1 2; do mkdir "$dir/host$i" && cp -r data/10pairs "$dir/host$i/pairs" && ln -s "$here/data" "$dir/host$i/data"; done
sed -i '1s/"prompt": "/&another /' "$dir/host1/pairs/metadata.jsonl"
check "data that differ in one process" not many 3 train pairs --steps 1 --batch 3 >"$dir/log" 2>&1
check "are refused once" once "pictures and captions in pairs.*differ from those of process 0"
check "before anything is written" test ! -e "$dir/host0/lora.safetensors"
check "by process 1" grep -q "process 1:" "$dir/log"
rm -r "$dir"/host?

# Pictures.
printf 'a pig\na lemon\na red apple\na banana\n' >"$dir/prompts"
check "a list" quiet ./sample --prompts "$dir/prompts" 1 --no-lora --out-dir "$dir/set"
check "of three processes" quiet many 3 sample --prompts "$dir/prompts" 1 --no-lora --out-dir "$dir/set3"
check "is the same" diff -r "$dir/set" "$dir/set3"
check "several of a prompt" quiet many 2 sample "a pig" 1 --no-lora --count 2 --out "$dir/pig.png"
check "by one" quiet ./sample "a pig" 1 --no-lora --count 2 --out "$dir/sow.png"
check "are the same" same "$dir/pig-2.png" "$dir/sow-2.png"
table() { "$@" --count 6 --batch 2 --resolution 64 --out "$dir/sheet.png" 2>/dev/null | cut -c1-103; }
table ./shortcut >"$dir/table" # without the seconds
table many 2 shortcut >"$dir/table2"
check "the experiment's table is the same" same "$dir/table" "$dir/table2"
check "and is there" grep -q "^6 pictures a row" "$dir/table"

# Two network namespaces as two hosts; Open MPI starts the second one's process as if by ssh.
a=sc$$a b=sc$$b
hosts() { ip netns exec $a unshare -u sh -c 'hostname hosta; "$@"' - timeout -k 5 60 mpirun --mca plm_rsh_agent "$dir/agent" \
    --mca btl tcp,self --host 10.24.0.1:1,10.24.0.2:1 -n 2 "$@"; }
if mpirun --version | grep -q "(Open MPI) 4" && ip netns add $a 2>/dev/null && ip netns add $b; then
    trap 'ip netns del $a; ip netns del $b; rm -rf "$dir"' EXIT
    ip link add ${a}0 netns $a type veth peer name ${b}0 netns $b
    ip -n $a addr add 10.24.0.1/24 dev ${a}0 && ip -n $b addr add 10.24.0.2/24 dev ${b}0
    for n in $a $b; do ip -n $n link set lo up && ip -n $n link set ${n}0 up; done
    printf '#!/bin/sh\nshift\nexec ip netns exec %s unshare -u sh -c "hostname hostb; $*"\n' $b >"$dir/agent"
    chmod +x "$dir/agent"
    check "two hosts" quiet hosts "$bin/train" "$dir/pairs" --rank 16 --preview 0 --run "$dir/hosts" --out "$dir/out-hosts" $steps
    weights hosts
    check "are as good as one, bit for bit" same "$dir/hosts.weights" "$dir/many2.weights"
    check "an error on the second" not hosts sh -c '[ $(hostname) = hosta ] || cd /; exec "$@"' - "$bin/train" data/10pairs --batch 2 \
        --run "$dir/other" --out "$dir/out-other" >"$dir/log" 2>&1
    check "says where" grep -q "^error: hostb, process 1: .*No such file" "$dir/log"
else
    skipped=1
    echo "skipped: two hosts: no network namespaces, or no Open MPI 4"
fi

if [ -x "$bin/train_emulated" ]; then # GPUs and NCCL, in imitation
    on="--batch 2 --rank 1 --steps 1 --device cuda"
    check "a GPU" many 1 train_emulated "$dir/pairs" $on --preview 0 --run "$dir/gpu1" --out "$dir/gpu1.safetensors" >"$dir/log" 2>&1
    check "two" many 2 train_emulated "$dir/pairs" $on --preview 0 --run "$dir/gpu2" --out "$dir/gpu2.safetensors" >"$dir/log" 2>&1
    check "have the loss of one" near gpu1 gpu2 1 1e-5
fi
echo "$passed passed, $failed failed, ${skipped:-0} skipped"
[ $failed -eq 0 ]
