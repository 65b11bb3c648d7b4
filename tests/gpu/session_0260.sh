#!/usr/bin/env bash
# vLLM 0.26.0 on a card that has nothing but CUDA and PyTorch 2.11: kernels, layer, servers, fence; results land in $OUT.
# The archive is made as ../shared/gpu/bundle_vllm.py makes it, the wheel by `python -m build`.
#   session_0260.sh setup WHEEL ARCHIVE   install both and make the 4-layer model, once a machine
#   session_0260.sh STEP[,STEP...]        in this order, each with a time limit of its own:
#     check    our layer against float64 at every count of the issue, and pytest's tests of the kernels (90 s)
#     hopper   the native kernels: launcher, then each step against float64 (150 s)
#     tune     a table for the shapes of SHAPES at the counts of COUNTS, MINUTES in all; put to use by the steps after it
#     kernel   the layer against upstream's backends, KERNEL_MINUTES; resumes with the file of the run before
#     layer    bad ids, equal bits, cost of the patches (60 s)
#     moe      vllm serve with vLLM's MoE kernel and ours (6 minutes)
#     fenced   vllm serve under the fence, one server after the other, and plain ones for the overhead (6 minutes)
# A command on that machine may take ten minutes; what a step has written by then comes back.
set -u
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
tuned=/tmp/tuned
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 CPATH=/usr/local/cuda/include PYTHONUNBUFFERED=1
export VLLM_GLM_PATCH_TUNED_DIR=$tuned
if [ "$1" = setup ]; then
    mkdir -p /tmp/ours /tmp/site26 "$tuned"
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/ours "$2"
    xz -dc -T0 "$3" | tar -C /tmp/site26 -x
    PYTHONPATH=/tmp/ours python3 -m vllm_glm_patch model /tmp/model --preset tp8-rank --layers 4 --format fp8 | tail -3
    exit
fi
export PYTHONPATH=/tmp/ours:/tmp/site26
wanted() { case ,$steps, in *,$1,*) true ;; *) false ;; esac; }
step() { # NAME SECONDS COMMAND...: its output in $OUT/NAME.txt, the last lines here
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    timeout -k 10 "$limit" "$@" >"$OUT/$name.txt" 2>&1
    echo "== $name: exit code $? after $((SECONDS - begin)) s"
    tail -n "${LINES_SHOWN:-25}" "$OUT/$name.txt" | cut -c1-200
}
steps=$1
cd /tmp # so that the tree's package, which has no native parts, does not come before the wheel's
if wanted check; then
    step check 120 python3 -m vllm_glm_patch bench kernel --no-time --no-upstream --shapes "${SHAPES:-TP8,EP8}" --out "$OUT/check.json"
    step kernel-tests 150 python3 -m pytest -q -x -p no:cacheprovider "$here/test_moe_kernel.py"
fi
if wanted hopper; then
    step hopper-load 150 python3 "$here/hopper_load.py" "$OUT/hopper_load.json"
    step hopper-steps 240 python3 "$root/benchmarks/hopper.py" --build --check --out "$OUT"
fi
if wanted tune; then
    shapes=()
    for shape in $(echo "${SHAPES:-TP8}" | tr , ' '); do shapes+=(--shape "$shape"); done
    step tune $((${MINUTES:-4} * 60 + 60)) python3 -m vllm_glm_patch tune "${shapes[@]}" \
        --tokens "${COUNTS:-1,4,16,64,256,1024,4096,8192,16384}" --minutes "${MINUTES:-4}"
    cp "$tuned"/*.json "$OUT"/ 2>/dev/null
fi
if wanted kernel; then
    [ -e /tmp/kernel.json ] && cp /tmp/kernel.json "$OUT/kernel.json"
    step kernel $((${KERNEL_MINUTES:-4} * 60 + 60)) python3 -m vllm_glm_patch bench kernel --shapes "${SHAPES:-TP8}" \
        --minutes "${KERNEL_MINUTES:-4}" --out "$OUT/kernel.json"
    cp "$OUT/kernel.json" /tmp/kernel.json
fi
if wanted layer; then step layer 90 python3 "$here/layer_with_patch.py" "$OUT/layer-0.26.0.json"; fi
if wanted moe; then
    mkdir -p "$OUT/moe"
    step serve-moe 420 python3 "$here/serve_moe.py" "$OUT/moe/serve_moe.json" --model /tmp/model ${MOE_FLAGS:-}
    cp "$OUT/moe/serve_moe.json" "$OUT"/ 2>/dev/null
fi
if wanted fenced; then
    mkdir -p "$OUT/fenced"
    for server in ${FENCED:-plain-patched patched upstream:VLLM_GLM_PATCH=0}; do
        step "fenced-${server%%:*}" 300 python3 "$here/fenced_serve.py" /tmp/model "$OUT/fenced/${server%%:*}.json" "$server" \
            --flags "--enable-chunked-prefill --max-num-batched-tokens 8192 --max-model-len 20000 --enforce-eager ${FLAGS:-}"
        cp "$OUT/fenced/${server%%:*}.json" "$OUT/fenced-${server%%:*}.json" 2>/dev/null
        rm -f "$OUT"/fenced/fence-*/core-*
    done
fi
# Few files come back, and no deep folders: logs travel as one.
tar -C "$OUT" -czf "$OUT/logs.tgz" $(cd "$OUT" && ls -d ./*.txt moe fenced 2>/dev/null) 2>/dev/null
rm -rf "$OUT/moe" "$OUT/fenced" "$OUT"/*.txt
