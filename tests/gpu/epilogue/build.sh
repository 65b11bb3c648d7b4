#!/usr/bin/env bash
# Two libraries in OUT, of the grouped GEMM with the epilogue of a vLLM source tree (0.10.0 – 0.19.1) as released and corrected.
#   build.sh TREE CUTLASS_INCLUDE OUT
# TREE: an unpacked source release. CUTLASS_INCLUDE: the include folder of CUTLASS, as the package nvidia-cutlass 3.8.0 has it.
# Needs nvcc, and vllm-glm-patch on the Python path. Takes some two minutes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
tree=$1 cutlass=$2 out=$3
mkdir -p "$out/as-released" "$out/corrected"
cp -r "$tree/." "$out/as-released/"
cp -r "$tree/." "$out/corrected/"
"${PYTHON:-python3}" -m vllm_glm_patch apply-source "$out/corrected" >"$out/corrected.diff"
for state in as-released corrected; do
    "${NVCC:-nvcc}" -std=c++17 -arch=sm_90a -O2 -DNDEBUG --expt-relaxed-constexpr -Xcompiler -fPIC -shared --cudart shared \
        -I"$cutlass" -I"$out/$state/csrc" -o "$out/libepilogue-$state.so" "$here/grouped_gemm.cu"
done
