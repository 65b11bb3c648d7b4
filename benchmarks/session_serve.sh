#!/usr/bin/env bash
# bench serve of all 92 layers of one TP8 rank on one card, which has nothing but CUDA and PyTorch; nothing is downloaded.
#   session_serve.sh setup WHEEL         install the wheel into /tmp/ours
#   session_serve.sh start NAME MINUTES  begin in the background; the vLLM is that of PYTHONPATH
#   session_serve.sh wait NAME SECONDS   wait until it ends, at most so long, then put result and logs into $OUT
#   session_serve.sh flags               what both servers are told, a line each
# A command on that machine may take ten minutes and its results come back when it ends, so `wait` is called until it says
# that NAME has ended. What was measured is in $OUT after each. ORDER (AB), CASES and SERVE_FLAGS change the plan; KEEP is
# where everything stays between two commands.
set -u
keep=${KEEP:-/tmp/serve}
mkdir -p "$keep"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 PYTHONUNBUFFERED=1
export CPATH=${CPATH:-/usr/local/cuda/include} PYTHONPATH=${OURS:-/tmp/ours}:${PYTHONPATH:-}
# Prefix caching off, since the client sends its first prompt twice. Few graphs, since a start is dear; 256 is the most that runs.
flags=(--load-format glm_patch_synthetic --enable-chunked-prefill --max-num-batched-tokens 8192 --max-model-len 20000
    --max-num-seqs 256 --no-enable-prefix-caching --gpu-memory-utilization 0.9
    --compilation-config '{"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}')

case ${1:-} in
setup)
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "${OURS:-/tmp/ours}" "$2"
    ;;
start)
    name=$2 minutes=$3
    cd "$keep" || exit
    [ -d model ] || python3 -m vllm_glm_patch model model --preset tp8-rank --config-only || exit
    # Later releases can leave out the request that the client tries first: 512 tokens for nothing at each load of `decode`.
    client=$(python3 -c 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("vllm").origin).parent / "benchmarks" / "serve.py")' 2>/dev/null)
    quick=()
    grep -qs "Skipping endpoint ready check" "$client" && quick=(--ready-check-timeout-sec 0)
    rm -f "$name.exit"
    # shellcheck disable=SC2086,SC2016
    setsid nohup bash -c 'name=$1; shift; "$@"; echo $? >"$name.exit"' - "$name" \
        python3 -m vllm_glm_patch bench serve "$keep/model" "${flags[@]}" ${SERVE_FLAGS:-} --out "$keep/$name" \
        --cases "${CASES:-prefill,decode,mixed}" --order "${ORDER:-AB}" --minutes "$minutes" --warm-each case --deaths 1 \
        --start-limit 420 -- "${quick[@]}" >"$name.txt" 2>&1 </dev/null &
    echo $! >"$name.pid"
    ;;
flags) printf '%s\n' "${flags[@]}" ;;
wait)
    name=$2
    # The file, too: nobody may have buried the process.
    runs() { [ ! -e "$keep/$name.exit" ] && kill -0 "$(cat "$keep/$name.pid")" 2>/dev/null; }
    end=$((SECONDS + $3))
    while [ "$SECONDS" -lt "$end" ] && runs; do sleep 1; done
    mkdir -p "$OUT/$name"
    cp "$keep/$name/serve.json" "$OUT/$name/" 2>/dev/null
    cp "$keep/$name.txt" "$OUT/$name/"
    tar -C "$keep/$name" -czf "$OUT/$name/logs.tgz" . 2>/dev/null
    tail -n 30 "$keep/$name.txt"
    if runs; then echo "$name still runs"; else echo "$name has ended, exit code $(cat "$keep/$name.exit" 2>/dev/null)"; fi
    ;;
*)
    sed -n '2,/^set -u/{/^#/p}' "$0"
    exit 2
    ;;
esac
