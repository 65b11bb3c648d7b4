#!/usr/bin/env bash
# `verify` and the reproduction on a card, without the patches and with them, in 8 minutes; results land in $OUT.
#   verify_session.sh SITE [MINUTES] [OPTIONS of verify...]
# SITE: the folder with vLLM, as /tmp/site101 or /tmp/site26. /tmp/ours: our wheel, as session_0101.sh setup installs it.
# MINUTES: for each of the two runs of verify, 3 by default. Exit code 0: everything as verify_expected.py knows it.
set -u
here=$(cd "$(dirname "$0")" && pwd)
site=$1 minutes=${2:-3}
shift $(($# < 2 ? $# : 2))
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 CPATH=/usr/local/cuda/include PYTHONUNBUFFERED=1
export PYTHONPATH=/tmp/ours:$site VLLM_GLM_PATCH_MOE=auto
cd /tmp # so that the tree's package, which has no native parts, does not come before the wheel's
run="import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
echo "== reproduction without the patch"
timeout 60 python3 "$here/../../docs/reproduce_8192.py" 2>&1 | tee "$OUT/reproduce-unpatched.txt" | tail -12
echo "== reproduction with the patch"
timeout 60 python3 -c "import vllm_glm_patch; print(vllm_glm_patch.install().table()); $run" "$here/../../docs/reproduce_8192.py" 2>&1 |
    tee "$OUT/reproduce-patched.txt" | tail -12
for state in unpatched patched; do
    sides=
    [ $state = unpatched ] && sides="--upstream-only --unpatched"
    echo "== verify, $state"
    python3 -m vllm_glm_patch verify $sides --minutes "$minutes" --json "$OUT/verify-$state.json" "$@" \
        >"$OUT/verify-$state.txt" 2>"$OUT/verify-$state.err"
    echo "exit code $?"
    cut -c1-220 "$OUT/verify-$state.txt"
    tail -5 "$OUT/verify-$state.err"
done
python3 "$here/verify_expected.py" "$OUT"
