#!/usr/bin/env bash
# One session on a card: the fence, then vLLM 0.26.0 and 0.10.1.1 with and without the patch.
# The archives come as ../shared/gpu/bundle_*.py made them (tests/gpu/README.md).
#   session_a.sh setup26 ARCHIVE WHEEL     unpack 0.26.0, install the wheel, make a 4-layer model, start its checks
#   session_a.sh unpack101 'PARTS'         unpack 0.10.1.1
#   session_a.sh run101                    its checks
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 CPATH=/usr/local/cuda/include PYTHONUNBUFFERED=1
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-INFO}
case $1 in
setup26)
    mkdir -p /tmp/site26 /tmp/ours /tmp/r26 /tmp/r101
    xz -dc -T0 "$2" | tar -C /tmp/site26 -x
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/ours "$3"
    PYTHONPATH=/tmp/ours python3 -m vllm_glm_patch model /tmp/model --preset tp8-rank --layers 4 --format fp8
    cp -r "$here" /tmp/gpu
    setsid bash /tmp/gpu/session_a.sh run26 >/tmp/r26/log 2>&1 </dev/null &
    ;;
run26)
    cd /tmp/gpu
    PYTHONPATH=/tmp/ours python3 fence_checks.py /tmp/r26/fence_checks.json || true
    export PYTHONPATH=/tmp/ours:/tmp/site26
    python3 layer_with_patch.py /tmp/r26/layer-0.26.0.json || true
    python3 fenced_serve.py /tmp/model /tmp/r26/fenced-0.26.0.json patched plain-patched --stagger 50 || true
    touch /tmp/r26/done
    ;;
unpack101)
    mkdir -p /tmp/site101
    cat $2 | xz -dc -T0 | tar -C /tmp/site101 -x
    ;;
run101)
    cp -r "$here"/. /tmp/gpu
    cd /tmp/gpu
    export PYTHONPATH=/tmp/ours:/tmp/site101
    python3 natural_fault.py /tmp/r101/natural_fault.json || true
    python3 layer_with_patch.py /tmp/r101/layer-0.10.1.1.json checks || true
    python3 guarded_serve.py /tmp/model /tmp/r101/guarded_serve.json || true
    ;;
fence101)
    cd /tmp/gpu
    export PYTHONPATH=/tmp/ours:/tmp/site101
    python3 fenced_serve.py /tmp/model /tmp/r101/fenced-0.10.1.1.json upstream:VLLM_GLM_PATCH=0 patched plain-patched || true
    ;;
cost101)
    cd /tmp/gpu
    export PYTHONPATH=/tmp/ours:/tmp/site101
    python3 layer_with_patch.py /tmp/r101/cost-0.10.1.1.json cost || true
    ;;
esac
