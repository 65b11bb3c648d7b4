#!/usr/bin/env bash
# One session on a card that has nothing but CUDA and PyTorch: vLLM 0.26.0 and 0.10.1.1 with and without the patch.
# The archives are made as ../shared/gpu/bundle_*.py make them (tests/gpu/README.md); results land in /tmp/r.
#   session_a.sh setup ARCHIVE WHEEL     unpack 0.26.0, install the wheel, make a 4-layer model, start `first`
#   session_a.sh unpack 'PARTS'          unpack 0.10.1.1, start `second`
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 CPATH=/usr/local/cuda/include PYTHONUNBUFFERED=1
on26() { PYTHONPATH=/tmp/ours:/tmp/site26 "$@" || echo "exit $?"; }
on101() { PYTHONPATH=/tmp/ours:/tmp/site101 "$@" || echo "exit $?"; }
small="--enable-chunked-prefill --max-num-batched-tokens 8192 --max-model-len 20000 --gpu-memory-utilization 0.15"
case $1 in
setup)
    mkdir -p /tmp/site26 /tmp/ours /tmp/r
    xz -dc -T0 "$2" | tar -C /tmp/site26 -x
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/ours "$3"
    PYTHONPATH=/tmp/ours python3 -m vllm_glm_patch model /tmp/model --preset tp8-rank --layers 4 --format fp8
    cp -r "$here" /tmp/gpu
    setsid bash /tmp/gpu/session_a.sh first >/tmp/r/first.txt 2>&1 </dev/null &
    ;;
first)
    cd /tmp/gpu
    on26 python3 layer_with_patch.py /tmp/r/layer-0.26.0.json
    PYTHONPATH=/tmp/ours python3 fence_checks.py /tmp/r/fence_checks.json || echo "exit $?"
    touch /tmp/r/first.done
    ;;
unpack)
    mkdir -p /tmp/site101
    cat $2 | xz -dc -T0 | tar -C /tmp/site101 -x
    setsid bash /tmp/gpu/session_a.sh second >/tmp/r/second.txt 2>&1 </dev/null &
    ;;
second)
    cd /tmp/gpu
    while [ ! -e /tmp/r/first.done ]; do sleep 1; done
    mkdir -p /tmp/r/guarded /tmp/r/fenced101 /tmp/r/fenced26
    on101 python3 natural_fault.py /tmp/r/natural_fault.json
    on101 python3 layer_with_patch.py /tmp/r/layer-0.10.1.1.json checks &
    on101 python3 guarded_serve.py /tmp/model /tmp/r/guarded/guarded_serve.json --stagger 30
    wait
    on101 python3 fenced_serve.py /tmp/model /tmp/r/fenced101/fenced-0.10.1.1.json upstream:VLLM_GLM_PATCH=0 patched \
        plain-patched --stagger 40 --flags "$small" &
    sleep 20
    on26 python3 fenced_serve.py /tmp/model /tmp/r/fenced26/fenced-0.26.0.json patched plain-patched --stagger 40 --flags "$small"
    wait
    on101 python3 layer_with_patch.py /tmp/r/cost-0.10.1.1.json cost
    touch /tmp/r/second.done
    ;;
esac
