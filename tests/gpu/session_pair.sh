#!/usr/bin/env bash
# One session on two cards of a host that has nothing but CUDA and PyTorch 2.11: the layer is checked, tuned and timed on card 0 while
# card 1 compiles what the servers will need; then both sides of an A/B at once, a card each. archives.sh makes what calls carry.
# As run on 2026-11-28 (1300 s with 0.26.0; 0.10.1.1 needs 380 s to start and another machine).
#   session_pair.sh begin WHEEL ARCHIVE   session_quick.sh's setup, then `lane` and `warm` in the background
#   session_pair.sh part NAME [SITE]      session_quick.sh's, meanwhile
#   session_pair.sh lane | warm           what begin starts: new kernels checked (NEW), tune and layer with all shapes and counts; and
#                                         both servers of 0.26.0 once, with few cache blocks, so that their compiled graphs are kept
#   session_pair.sh await SECONDS         until both have ended; all of /tmp/o in $OUT/o.tgz
#   session_pair.sh serve RELEASE SITE MINUTES   A/B in the background; RELEASE names the result, CASES as for session_serve.sh
#   session_pair.sh wait RELEASE SECONDS  until it has ended
#   session_pair.sh steps RELEASE SITE    both servers once more with steps_plugin.py, loads of `decode` only: what each step of many
#                                         tokens took and what the allocator did (200 s, `wait RELEASE-steps` ends it)
#   session_pair.sh verify                `verify` of 0.26.0 on the first card and of 0.10.1.1 on the second, in the background (4 minutes)
#   session_pair.sh last                  rows of 0.10.1.1 on the first card; on the second greedy answers, checks of both backends,
#                                         memcheck and racecheck, all at once (200 s)
# On four cards CARDS=2,3 before serve, steps, verify, last and wait gives another pair work of its own meanwhile; begin is 0 and 1's.
# TABLES='' before serve or steps: with the tables that the wheel has, else with those that `lane` made.
# On a machine of four cards, in this order (25 minutes): begin; part 101 … with /tmp/site101 at the last; CARDS=2,3 TABLES='' serve
# 0.10.1.1; await; serve 0.26.0; CARDS=2,3 wait 0.10.1.1 and last; wait 0.26.0; steps; verify; several_cards.sh serve 4 once all is done.
# Both sides must have the same tuned tables as in `warm`: vLLM keys its compiled graphs by settings.
set -u
here=$(cd "$(dirname "$0")" && pwd)
tree=/tmp/tree
case ${1:-} in
part | lane | warm | await | serve | steps | verify | wait | last) [ -e $tree ] || { echo "This machine is not set up: it is another one." >&2; exit 1; } ;;
esac
quick=$here/session_quick.sh serve=$here/../../benchmarks/session_serve.sh
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 CPATH=/usr/local/cuda/include PYTHONUNBUFFERED=1
export VLLM_GLM_PATCH_TUNED_DIR=/tmp/tuned-0
site26=/tmp/ours:/tmp/site26 site101=/tmp/ours:/tmp/site101
counts=8192,64,1,1024,256,16,4096,2048,16384,4,128,512,32,8,2
first=${CARDS:-0,1} second=${first#*,} first=${first%%,*}
started() { grep -qs '^finished' "/tmp/o/$1.log"; }
keep() { [ -n "${OUT:-}" ] && tar -C /tmp/o --exclude='core-*' --exclude='blocks-*' -czf "$OUT/o.tgz" .; }
case ${1:-} in
serve | steps)
    [ -n "${TABLES-any}" ] || unset VLLM_GLM_PATCH_TUNED_DIR
    for _ in {1..120}; do [ "$3" = /tmp/site26 ] || [ -e "$3/unpacked" ] && break; sleep 1; done
    ;;
esac
case ${1:-} in
begin)
    "$quick" setup "$2" "$3"
    mkdir -p /tmp/o
    for what in lane warm; do setsid nohup $tree/tests/gpu/session_pair.sh $what >/tmp/o/$what.log 2>&1 </dev/null & done
    sleep 1
    ;;
part) "$quick" "$@" ;;
lane)
    export CUDA_VISIBLE_DEVICES=0 TUNED=/tmp/tuned-0 OUT='' PYTHONPATH=$site26
    for only in ${NEW:-early}; do
        (cd $tree && timeout 60 python3 benchmarks/hopper.py --check --only "$only" --out /tmp/o/new --seconds 50)
    done
    # shellcheck disable=SC2086
    (cd $tree && timeout 80 python3 benchmarks/hopper.py --out /tmp/o/sweep --seconds 70 \
        ${SWEEP:---gemm2 turns_lanes_n256:256x8 --early 0x0,4x0,0x2,4x2,8x4 --tokens 1024,512,2048})
    SHAPES=TP8,EP8 COUNTS=$counts TRIED=hopper MINUTES=2 LINES_SHOWN=4 "$quick" tune
    SHAPES=TP4,TP2,TP1 COUNTS=8192,1024,256,4096,2048,16384,512,128 TRIED=hopper MINUTES=2 LINES_SHOWN=4 "$quick" tune
    cp -r /tmp/tuned-0 /tmp/o/
    SHAPES=TP8,EP8,TP4,TP2,TP1 COUNTS=$counts BACKENDS=auto MINUTES=4 LINES_SHOWN=80 "$quick" layer
    echo finished
    ;;
warm)
    for _ in {1..60}; do grep -qs finished /tmp/o/compile/log && break; sleep 1; done
    export CUDA_VISIBLE_DEVICES=1 PYTHONPATH=$site26
    mkdir -p /tmp/serve && cd /tmp/serve || exit
    [ -d model ] || python3 -m vllm_glm_patch model model --preset tp8-rank --config-only
    mapfile -t flags < <("$serve" flags)
    flags+=(--gpu-memory-utilization 0.33 --kv-cache-memory-bytes 3000000000)  # both on one card
    servers=()
    for side in 0 1; do
        VLLM_GLM_PATCH=$side setsid python3 -m vllm.entrypoints.cli.main serve /tmp/serve/model "${flags[@]}" \
            --host 127.0.0.1 --port 810$side >/tmp/o/warm-$side.log 2>&1 &
        servers+=($!)
    done
    for side in 0 1; do
        for _ in {1..330}; do
            curl -sf http://127.0.0.1:810$side/health >/dev/null && { echo "$side is ready after $SECONDS s"; break; }
            kill -0 "${servers[$side]}" 2>/dev/null || { echo "$side died"; break; }
            sleep 1
        done
    done
    for server in "${servers[@]}"; do kill -INT -- "-$server"; done
    wait
    echo finished
    ;;
await)
    end=$((SECONDS + $2))
    while [ $SECONDS -lt $end ] && ! { started lane && started warm; }; do sleep 1; done
    tail -n 110 /tmp/o/lane.log | cut -c1-170
    tail -n 5 /tmp/o/warm.log
    keep
    ;;
serve) PYTHONPATH=$3 SERVE_FLAGS="--groups $first,$second ${SERVE_FLAGS:-}" ORDER=${ORDER:-AB} "$serve" start "$2" "$4" ;;
steps)
    mkdir -p /tmp/o/steps
    python3 $tree/tests/gpu/steps_plugin.py /tmp/steps-plugin
    VGP_STEPS=/tmp/o/steps/$2 CASES=decode PYTHONPATH=/tmp/steps-plugin:$3 SERVE_FLAGS="--groups $first,$second" ORDER=AB \
        "$serve" start "$2-steps" 4
    ;;
verify)
    "$quick" lane "$first" verify26
    "$quick" lane "$second" verify101
    ;;
wait)
    "$serve" wait "$2" "$3"
    tail -n 3 /tmp/o/lane-*/log 2>/dev/null | cut -c1-200
    keep
    ;;
last)
    one() { # CARD SITE SECONDS NAME COMMAND...
        local card=$1 site=$2 seconds=$3 name=$4
        shift 4
        mkdir -p "/tmp/o/$name"
        (cd $tree && CUDA_VISIBLE_DEVICES=$card PYTHONPATH=$site timeout "$seconds" "$@" >"/tmp/o/$name/log" 2>&1) &
    }
    sanitizer=(compute-sanitizer --report-api-errors no --print-limit 20 --target-processes all)
    checked=(python3 benchmarks/hopper.py --check --seconds 190 --patience 190)
    one "$first" $site101 200 layer101 python3 -m vllm_glm_patch bench kernel --no-check --tokens $counts --minutes 3 \
        --shapes TP8,EP8,TP4,TP2,TP1 --backends auto --out /tmp/o/layer101/kernel.json
    one "$second" $site26 200 moe python3 tests/gpu/serve_moe.py /tmp/o/moe/serve_moe.json --model /tmp/model --unprofiled --only upstream,patched
    for backend in hopper triton; do
        one "$second" $site26 150 check-$backend python3 -m vllm_glm_patch bench kernel --no-time --no-upstream --backends $backend --minutes 2 \
            --shapes TP8,TP4,EP8 --out /tmp/o/check-$backend/check.json
    done
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 one "$second" $site26 230 memcheck "${sanitizer[@]}" --tool memcheck "${checked[@]}" --only M=700 --out /tmp/o/memcheck
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 one "$second" $site26 230 racecheck "${sanitizer[@]}" --tool racecheck "${checked[@]}" --only 'TP8 M=16 ' \
        --out /tmp/o/racecheck
    wait
    tail -n 4 /tmp/o/{layer101,moe,check-hopper,check-triton,memcheck,racecheck}/log | cut -c1-200
    keep
    ;;
*)
    sed -n '2,/^set -u/{/^#/p}' "$0"
    exit 2
    ;;
esac
