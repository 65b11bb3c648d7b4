#!/usr/bin/env bash
# What a card without a package registry is sent, made on a machine that has one: .carry of this tree, which git ignores.
#   archives.sh FOLDER [RELEASE...]   0.26.0 0.10.1.1 0.17.1 0.14.1 0.33.0 unless named; each needs 10 GB in FOLDER for a while
# In .carry then: v26 (0.26.0, one file), p101-00 … (parts of 0.10.1.1), p171-…, p141-…, p330-…, and w, the wheel of this tree.
# A call of the device carries one part; `session_quick.sh part 171`, the last one with the folder for it: `part 171 /tmp/site171`.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
tools=$root/../shared/gpu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- 0.26.0 0.10.1.1 0.17.1 0.14.1 0.33.0
carry=$root/.carry
mkdir -p "$carry/w"

rm -f "$carry/w/"*
python3 -m pip wheel -q --no-deps --wheel-dir "$carry/w" "$root"

for release; do
    venv=$folder/v$release parts=$folder/parts
    extra=()
    case $release in 0.10.*) extra=("transformers<4.56") ;; esac
    rm -rf "$venv" "$parts"
    uv venv -q -p 3.12 "$venv"
    uv pip install -q -p "$venv" "vllm==$release" "${extra[@]}"
    case $release in
    0.26.0)
        mkdir -p "$carry/v26"
        python3 "$tools/bundle_vllm.py" "$venv" "$carry/v26/vllm-0.26.0.tar.xz" --present "$tools/present.txt"
        rm -rf "$venv"
        continue
        ;;
    0.33.0) python3 "$here/bundle_cuda13.py" "$venv" "$parts" --present "$tools/present.txt" --part-mb 60 ;;
    *) python3 "$tools/bundle_own_torch.py" "$venv" "$parts" --present "$tools/present.txt" --part-mb 60 ;;
    esac
    rm -rf "$venv"
    name=$(echo "$release" | sed -E 's/^0\.([0-9]+)\.([0-9]).*/\1\2/')  # 0.10.1.1: 101
    rm -rf "$carry/p$name-"*
    for part in "$parts"/part*; do
        mkdir -p "$carry/p$name-${part##*part}"
        mv "$part" "$carry/p$name-${part##*part}/"
    done
    rm -rf "$parts"
    echo "$release: .carry/p$name-*, $(ls -d "$carry/p$name-"* | wc -l) parts"
done
