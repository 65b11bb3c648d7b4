#!/usr/bin/env bash
# The reported command on several cards of one host: GLM-4.6-FP8 itself, its weights made on the cards, `-tp` as many as there are.
# After `session_quick.sh setup`, which it needs; not run on a card yet.
#   several_cards.sh serve CARDS [LAYERS]    8190 to 8193, 12000 and 16384 tokens asked of the patched server; in /tmp/o/cards-serve
#   several_cards.sh fence CARDS [LAYERS]    the same of the unpatched and the patched server under the fence, one after the other
#   several_cards.sh bench CARDS [LAYERS] [MINUTES]   A/B, prefill, decode and mixed, in /tmp/serve/cards
#   several_cards.sh wait SECONDS            until `bench` has ended; result and logs in $OUT
# LAYERS: 92 fit four cards of 139 GiB, some 60 fit two (3.9 GB a layer); FLAGS are added to those of `vllm serve`, such as
# --enable-expert-parallel, or -dp 2 with CARDS half as many. SITE is the folder with vLLM, /tmp/site26. All of it keeps off NVLink's
# multicast, which can put a host's cards out of service.
set -u
here=$(cd "$(dirname "$0")" && pwd)
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 CPATH=/usr/local/cuda/include PYTHONUNBUFFERED=1
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 VLLM_ALLREDUCE_USE_SYMM_MEM=0
export PYTHONPATH=/tmp/ours:${SITE:-/tmp/site26}
what=${1:-} cards=${2:-2} layers=${3:-92}
model=/tmp/model-full-$layers
flags="--load-format glm_patch_synthetic --enable-chunked-prefill --max-num-batched-tokens 8192 --max-model-len 20000 -tp $cards ${FLAGS:-}"
make_model() {
    [ -d "$model" ] || python3 -m vllm_glm_patch model "$model" --preset full --layers "$layers" --format fp8 --config-only
}
asked() { # FOLDER SERVER...
    local folder=/tmp/o/$1
    shift
    mkdir -p "$folder"
    for server; do
        (cd "$here" && python3 fenced_serve.py "$model" "$folder/${server%%:*}.json" "$server" --stagger 0 --flags "$flags" \
            --lengths 8190,8191,8192,8192,8193,12000,16384)
    done
    [ -n "${OUT:-}" ] && tar -C "$folder" --exclude='core-*' --exclude='stacks-*' -czf "$OUT/o.tgz" .
}
case $what in
serve) make_model && asked cards-serve plain-patched ;;
fence) make_model && asked cards-fence upstream:VLLM_GLM_PATCH=0 patched ;;
bench)
    make_model || exit
    mkdir -p /tmp/serve && rm -rf /tmp/serve/model && ln -s "$model" /tmp/serve/model
    SERVE_FLAGS="-tp $cards ${FLAGS:-}" ORDER=${ORDER:-AB} "$here/../../benchmarks/session_serve.sh" start cards "${4:-10}"
    ;;
wait) "$here/../../benchmarks/session_serve.sh" wait cards "${2:-500}" ;;
*)
    sed -n '2,/^set -u/{/^#/p}' "$0"
    exit 2
    ;;
esac
