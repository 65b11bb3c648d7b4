#!/usr/bin/env bash
# Much in little time on a card that has nothing but CUDA and PyTorch 2.11: what needs no card to itself runs side by side.
# archives.sh makes the archives and the wheel.
#   session_quick.sh setup WHEEL ARCHIVE  install wheel and vLLM 0.26.0, copy this tree to /tmp/tree with the wheel's native
#                                         parts, compile vLLM's Python beside (20 s)
#   session_quick.sh part NAME [SITE]     keep what a call carried as .carry/pNAME-00 …, a part of an archive each, in /tmp/pNAME; with
#                                         SITE, at the last one, `unpack` it in the background
#   session_quick.sh unpack FOLDER [SITE] a vLLM with its own PyTorch, from its parts in FOLDER, into SITE, /tmp/site101 (10 s)
#   session_quick.sh lane CARD STEP...    steps in the background on one card of several; what they say: /tmp/o/lane-CARD/log.
#                                         Each card has tables of its own, /tmp/tuned-CARD
#   session_quick.sh wait SECONDS CARD... until those lanes have ended, at most so long; all of it in $OUT/o.tgz
#   session_quick.sh STEP...              each step's output in /tmp/o/STEP, the end of it here, all of it in $OUT/o.tgz:
#     checks    native kernels, both backends and pytest's tests of the kernel against float64, side by side (80 s)
#     verify26, verify101                  `verify`, unpatched and patched (4 minutes; may run beside checks)
#     tune      tables for SHAPES at COUNTS in MINUTES, in /tmp/tuned and used by what follows
#     steps     every native kernel and configuration at TOKENS, step by step beside Triton's (20 s)
#     layer     the layer against vLLM's three backends, SHAPES at COUNTS, by the tables and by BACKENDS (25 s a shape)
#     patches   bad ids, equal bits, cost of the patches (60 s)
#     profile   Nsight Compute on the kernels named by KERNELS at TOKENS (30 s)
#     moe       `vllm serve` with vLLM's MoE kernel and the fused one, greedy answers compared (90 s; may run beside checks), with
#               MOE_FLAGS=--serial the size of the KV cache as well (5 minutes)
#     planted   an over-read whose core dump the driver does not write, named launch by launch (20 s)
#     fence101  the reported flags under the fence, unpatched, alone on the card, launch by launch (4 minutes)
#     epilogue  the grouped GEMM with upstream's and the corrected epilogue, scales before an unmapped page; EPILOGUE is the folder
#               that epilogue/build.sh made (1 minute)
#     fence26   the same release plain and under the fence, for the overhead (2 minutes)
#     sanitize  compute-sanitizer over the checks of both backends, PyTorch's caching off: memcheck, and racecheck for the native
#               kernels (SANITIZE seconds each; a check that has not begun by then is left out)
#     served    each VERSION:SITE of SERVED once it is unpacked: SERVERS under the fence (one named plain-… without it), all at once on
#               one card, each told the size of its KV cache, so none from 0.10.x (75 s; eight servers have run together)
# Calls that follow one another at once keep the machine; give it back rather than let it wait. A call sends 63 MB in 5 s, so the
# ten parts of 0.10.1.1 take 50 s, during which checks can run: start them with `setsid`, as `background` here does. A machine that
# is gone is replaced by a bare one without a word: let each call but the first begin with `test -e /tmp/tree || exit`.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
tree=/tmp/tree
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 CPATH=/usr/local/cuda/include PYTHONUNBUFFERED=1
export VLLM_GLM_PATCH_TUNED_DIR=${TUNED:-/tmp/tuned}
site26=/tmp/ours:/tmp/site26 site101=/tmp/ours:/tmp/site101
flags="--enable-chunked-prefill --max-num-batched-tokens 8192 --max-model-len 20000"
counts=${COUNTS:-8192,64,1,1024,256,16,4096,2048,16384,4,128,512}
mkdir -p /tmp/o "$VLLM_GLM_PATCH_TUNED_DIR"
background() { # NAME COMMAND: goes on when this script ends
    mkdir -p "/tmp/o/$1"
    setsid nohup bash -c "$2; echo finished" >"/tmp/o/$1/log" 2>&1 </dev/null &
}
step() { # NAME SECONDS COMMAND
    local begin=$SECONDS
    mkdir -p "/tmp/o/$1"
    timeout -k 5 "$2" bash -c "$3" >"/tmp/o/$1/log" 2>&1
    echo "== $1: exit code $? after $((SECONDS - begin)) s"
    tail -n "${LINES_SHOWN:-40}" "/tmp/o/$1/log" | cut -c1-240
    keep
}
keep() { [ -n "${OUT:-}" ] && tar -C /tmp/o --exclude='core-*' --exclude='blocks-*' -czf "$OUT/o.tgz" .; }
await() { # SECONDS NAME...
    local end=$((SECONDS + $1)) name
    shift
    for name; do
        while [ $SECONDS -lt "$end" ] && ! grep -qs '^finished' "/tmp/o/$name/log"; do sleep 1; done
        echo "== $name"
        tail -n 5 "/tmp/o/$name/log" | cut -c1-200
    done
    keep
}
fenced() { # NAME SITE SERVERS FLAGS SECONDS [OPTIONS]
    export PYTHONPATH=$2
    step "$1" "$5" "cd $tree/tests/gpu; python3 fenced_serve.py /tmp/model /tmp/o/$1/fenced.json $3 --stagger 0 --flags '$4' ${6:-}"
}
checks() {
    export PYTHONPATH=$site26
    # New kernels by themselves, so that a failure of one does not hide the others; `hop` goes through all of them.
    for only in ${CHECKED:-split ring turns prologue}; do
        background "hop-$only" "cd $tree; python3 benchmarks/hopper.py --check --out /tmp/o/hop-$only --only $only --seconds 150"
    done
    background hop "cd $tree; python3 benchmarks/hopper.py --check --out /tmp/o/hop --seconds 150"
    background load "python3 $tree/tests/gpu/hopper_load.py /tmp/o/load/hopper_load.json"
    for backend in triton hopper; do
        background "check-$backend" "cd /tmp; python3 -m vllm_glm_patch bench kernel --no-time --no-upstream \
            --shapes ${SHAPES:-TP8,TP4,EP8} --backends $backend --minutes 2 --out /tmp/o/check-$backend/check.json"
    done
    background tests "cd /tmp; python3 -m pytest -q -p no:cacheprovider $tree/tests/gpu/test_moe_kernel.py"
}
await_checks() {
    local names=(hop load check-triton check-hopper tests) only
    for only in ${CHECKED:-split ring turns prologue}; do names+=("hop-$only"); done
    await "${SECONDS_FOR_CHECKS:-150}" "${names[@]}"
}
case ${1:-} in
setup)
    mkdir -p $tree
    tar -C "$root" --exclude=./.carry --exclude=./.git -cf - . | tar -C $tree -xf -
    mkdir -p /tmp/ours /tmp/site26
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/ours "$2"
    xz -dc -T0 "$3" | tar -C /tmp/site26 -x
    PYTHONPATH=/tmp/ours python3 -m vllm_glm_patch model /tmp/model --preset tp8-rank --layers 4 --format fp8 | tail -3
    python3 -m zipfile -e "$2" /tmp/wheel
    cp -r /tmp/wheel/vllm_glm_patch/moe/hopper/{cubin,*.so} $tree/vllm_glm_patch/moe/hopper/
    background compile "python3 -m compileall -q -j 8 /tmp/site26"
    exit
    ;;
unpack)
    site=${3:-/tmp/site101}
    mkdir -p "$site"
    cat "$2"/part* | xz -dc -T0 | tar -C "$site" -x
    # What was left out because the machine's own PyTorch has it.
    for own in $(python3 -c 'import nvidia; print(*(f"{folder}/*" for folder in nvidia.__path__))'); do
        # Of a CUDA 12 PyTorch only NVSHMEM, whose name says no version and which only has to be there.
        [ -d "$site/nvidia/cublas" ] && [ "$(basename "$own")" != nvshmem ] && continue
        [ -e "$site/nvidia/$(basename "$own")" ] || ln -s "$own" "$site/nvidia/"
    done
    # The archive leaves out Triton's backend for AMD, and Triton imports every one that is named here.
    sed -i '/backends\.amd/d' "$site"/triton-*.dist-info/entry_points.txt
    timeout 60 python3 -m compileall -q -j 12 "$site" >/dev/null 2>&1
    touch "$site/unpacked"
    exit
    ;;
part)
    [ -e $tree ] || { echo "This machine is not set up: it is another one." >&2; exit 1; }
    mkdir -p "/tmp/p$2"
    mv "$root/.carry/p$2-"*/part* "/tmp/p$2/"
    [ -n "${3:-}" ] && background "unpack-$2" "'$0' unpack '/tmp/p$2' '$3'"
    find "/tmp/p$2" -name 'part*' | wc -l
    exit
    ;;
lane)
    card=$2
    shift 2
    mkdir -p "/tmp/o/lane-$card"
    rm -f "/tmp/o/lane-$card/ended"
    CUDA_VISIBLE_DEVICES=$card TUNED=/tmp/tuned-$card OUT='' setsid nohup bash -c '"$@"; touch "$0/ended"' \
        "/tmp/o/lane-$card" "$tree/tests/gpu/session_quick.sh" "$@" >>"/tmp/o/lane-$card/log" 2>&1 </dev/null &
    exit
    ;;
wait)
    end=$((SECONDS + $2))
    shift 2
    for card; do
        while [ $SECONDS -lt "$end" ] && [ ! -e "/tmp/o/lane-$card/ended" ]; do sleep 1; done
        [ -e "/tmp/o/lane-$card/ended" ] && echo "lane $card has ended" || echo "lane $card still runs"
        tail -n "${LINES_SHOWN:-40}" "/tmp/o/lane-$card/log"
    done
    keep
    exit
    ;;
'') sed -n '2,/^set -u/{/^#/p}' "$0"; exit 2 ;;
esac
for what; do
    case $what in
    checks) checks; await_checks ;;
    checks-beside) checks ;;
    await) await_checks ;;
    verify26) step verify26 560 "mkdir -p /tmp/o/verify26; OUT=/tmp/o/verify26 $tree/tests/gpu/verify_session.sh /tmp/site26 4" ;;
    verify101) step verify101 560 "mkdir -p /tmp/o/verify101; OUT=/tmp/o/verify101 $tree/tests/gpu/verify_session.sh /tmp/site101 4" ;;
    tune)
        shapes=$(printf -- '--shape %s ' $(echo "${SHAPES:-TP8}" | tr , ' '))
        export PYTHONPATH=$site26
        step tune $((${MINUTES:-3} * 60 + 60)) "cd /tmp; python3 -m vllm_glm_patch tune $shapes --tokens $counts \
            --minutes ${MINUTES:-3} --backends ${TRIED:-triton,hopper}; cp $VLLM_GLM_PATCH_TUNED_DIR/*.json /tmp/o/tune/"
        ;;
    steps)
        export PYTHONPATH=$site26
        step steps 130 "cd $tree; python3 benchmarks/hopper.py --out /tmp/o/steps --shapes ${SHAPES:-TP8} \
            --tokens ${TOKENS:-8192,64,1024,1,16,2048} --seconds 120 --only '${ONLY:-}'"
        ;;
    layer)
        export PYTHONPATH=$site26
        step layer 400 "cd /tmp; python3 -m vllm_glm_patch bench kernel --no-check --shapes ${SHAPES:-TP8} --tokens $counts \
            --backends ${BACKENDS:-auto,hopper} --minutes ${MINUTES:-6} --out /tmp/o/layer/kernel.json"
        ;;
    patches)
        export PYTHONPATH=$site26
        step patches 90 "python3 $tree/tests/gpu/layer_with_patch.py /tmp/o/patches/layer-0.26.0.json"
        ;;
    profile)
        export PYTHONPATH=$site26
        step profile 120 "cd $tree; ncu --set full --import-source no --clock-control none -k 'regex:${KERNELS:-glm_gemm}' \
            -s 2 -c ${LAUNCHES:-4} -f -o /tmp/o/profile/kernels --target-processes all python3 benchmarks/hopper.py --out /tmp/o/profile \
            --tokens ${TOKENS:-8192} --seconds 60 --only '${ONLY:-row_c1 gemm2_sum_n256 slice 512}'
            ncu --import /tmp/o/profile/kernels.ncu-rep --page details >/tmp/o/profile/details.txt
            ncu --import /tmp/o/profile/kernels.ncu-rep --page source --csv >/tmp/o/profile/source.csv"
        ;;
    moe)
        export PYTHONPATH=$site26
        step moe 480 "python3 $tree/tests/gpu/serve_moe.py /tmp/o/moe/serve_moe.json --model /tmp/model \
            ${MOE_FLAGS:---unprofiled --only upstream,patched}"
        ;;
    planted)
        export PYTHONPATH=$site26
        step planted 90 "cd $tree; python3 -c 'import sys; sys.path.insert(0, \"tests/gpu\"); import fence_checks as f
open(\"/tmp/planted.py\", \"w\").write(f.NO_DUMP)'
            cd /tmp; python3 -m vllm_glm_patch fence --launches --stacks --align 512 --directory /tmp/o/planted/fence -- \
                python3 /tmp/planted.py; echo exit code \$?; dmesg | grep -i xid | tail -3"
        ;;
    fence101)
        fenced fence101 $site101 "${FENCED:-upstream:VLLM_GLM_PATCH=0}" "$flags ${FLAGS:-}" "${SECONDS_FOR_SERVER:-300}" \
            "${FENCE_OPTIONS:---launches}"
        ;;
    epilogue)
        step epilogue 240 "python3 $tree/tests/gpu/epilogue/guard_epilogue.py ${EPILOGUE:-/tmp/epilogue} /tmp/o/epilogue/epilogue.json"
        ;;
    fence26)
        fenced plain26 $site26 plain-patched "$flags --enforce-eager" 120
        fenced fence26 $site26 patched "$flags --enforce-eager" 120
        ;;
    sanitize)
        export PYTHONPATH=$site26 PYTORCH_NO_CUDA_MEMORY_CACHING=1
        limit=${SANITIZE:-80}
        for tool in memcheck racecheck; do
            # The launcher asks how many arguments a kernel has until the driver says there is none: no error of a kernel.
            step "$tool-hopper" $((limit + 60)) "cd $tree; compute-sanitizer --tool $tool --report-api-errors no --print-limit 20 \
                --target-processes all python3 benchmarks/hopper.py --check --seconds $limit --patience $limit \
                --only '${ONLY:-M=700}' --out /tmp/o/$tool-hopper"
        done
        # No test with a graph: without the caching allocator nothing can be allocated in a capture.
        step memcheck-triton $((limit + 60)) "cd /tmp; compute-sanitizer --tool memcheck --report-api-errors no --print-limit 20 \
            --target-processes all python3 -m pytest -q -p no:cacheprovider $tree/tests/gpu/test_moe_kernel.py \
            -k 'boundary_counts or any_routing'"
        unset PYTORCH_NO_CUDA_MEMORY_CACHING
        ;;
    served)
        names=() told="--gpu-memory-utilization 0.1 --kv-cache-memory-bytes 4000000000"
        for one in $SERVED; do
            name=served-${one%%:*} site=${one#*:}
            names+=("$name")
            background "$name" "for i in {1..300}; do [ -e '$site/unpacked' ] && break; sleep 1; done; cd $tree/tests/gpu
                PYTHONPATH=/tmp/ours:$site timeout 300 python3 fenced_serve.py /tmp/model /tmp/o/$name/fenced.json \
                ${SERVERS:-patched upstream:VLLM_GLM_PATCH=0 plain-patched} --stagger 1 --flags '$flags --enforce-eager $told'"
        done
        await "${SECONDS_FOR_SERVED:-240}" "${names[@]}"
        ;;
    *) echo "no step is called $what" >&2; exit 2 ;;
    esac
done
