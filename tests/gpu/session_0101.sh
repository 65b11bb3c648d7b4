#!/usr/bin/env bash
# vLLM 0.10.1.1 on a card that has nothing but CUDA and PyTorch, with and without the patch; results land in $OUT.
# The archive is made as ../shared/gpu/bundle_own_torch.py makes it, the wheel by `python -m build`.
#   session_0101.sh setup WHEEL            install the wheel, make the 4-layer model
#   session_0101.sh STEP[,STEP...] 'PARTS' unpack if need be, then: natural, layer, guarded, fenced
# SERVERS and FLAGS choose servers and flags of `guarded`; its servers share the card, so their KV cache is kept small.
set -u
here=$(cd "$(dirname "$0")" && pwd)
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 CPATH=/usr/local/cuda/include PYTHONUNBUFFERED=1
common="--enable-chunked-prefill --max-num-batched-tokens 8192 --max-model-len 20000 --gpu-memory-utilization 0.45"
common="$common --num-gpu-blocks-override 2000 ${FLAGS:-}"
if [ "$1" = setup ]; then
    mkdir -p /tmp/ours
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/ours "$2"
    PYTHONPATH=/tmp/ours python3 -m vllm_glm_patch model /tmp/model --preset tp8-rank --layers 4 --format fp8 | tail -3
    exit
fi
[ -d /tmp/site101 ] || { mkdir /tmp/site101; cat $2 | xz -dc -T0 | tar -C /tmp/site101 -x; }
cd "$here"
export PYTHONPATH=/tmp/ours:/tmp/site101
case ,$1, in *,natural,*) python3 natural_fault.py "$OUT/natural_fault.json" 2>>"$OUT/errors.txt" | grep -v "'outcome': 'ok'" ;; esac
case ,$1, in *,layer,*) python3 layer_with_patch.py "$OUT/layer-0.10.1.1.json" 2>>"$OUT/errors.txt" | cut -c1-160 ;; esac
case ,$1, in *,guarded,*)
    mkdir -p "$OUT/guarded"
    python3 guarded_serve.py /tmp/model "$OUT/guarded/guarded_serve.json" --stagger "${STAGGER:-30}" --flags "$common" \
        --only "${SERVERS:-}" >"$OUT/guarded/out.txt" 2>&1 &
    ;;
esac
case ,$1, in *,fenced,*)
    mkdir -p "$OUT/fenced"
    sleep "${DELAY:-0}"
    python3 fenced_serve.py /tmp/model "$OUT/fenced/fenced_serve.json" ${FENCED:-upstream:VLLM_GLM_PATCH=0 patched} \
        --stagger "${STAGGER:-30}" --flags "$common" >"$OUT/fenced/out.txt" 2>&1 &
    ;;
esac
wait
grep -ihs held "$OUT/guarded/out.txt"
for core in "$OUT"/fenced/fence-*/core-*; do
    [ -e "$core" ] || continue
    ls -la "$core"
    for commands in "bt 1" "x/i \$errorpc" "info registers"; do
        echo "== $commands"
        timeout 40 cuda-gdb --batch --nx -ex "set width 0" -ex "target cudacore $core" -ex "$commands" 2>&1 | cut -c1-700 | head -24
    done
    rm -f "$core"
done
[ -e "$OUT/guarded" ] && cp "$OUT"/guarded/guarded_serve.json "$OUT"
[ -e "$OUT/fenced" ] && cp "$OUT"/fenced/fenced_serve.json "$OUT"
tar -C "$OUT" -czf "$OUT/logs.tgz" $(cd "$OUT" && ls -d guarded fenced errors.txt 2>/dev/null)
rm -rf "$OUT/guarded" "$OUT/fenced" "$OUT/errors.txt"
