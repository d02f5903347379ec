#!/usr/bin/env bash
# Gathers what tools/bench/gpu.sh needs on a machine with a GPU and no network: wheels for Python 3.12 on x86-64.
#
#   bash tools/bench/gpu_pack.sh .gpu              wheels into .gpu
#   bash tools/bench/gpu_pack.sh .gpu FILE ...     and these files: an archive (.tar.xz) of a built Transformer Engine,
#                                                  to be unpacked beside the packages, and wheels it needs
#
# Only what such a machine is likely to lack: it has PyTorch for CUDA with triton, numpy, transformers, pyarrow, pytest.
set -euo pipefail
case ${1:-} in '' | -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
folder=$1
shift
mkdir -p "$folder"
[ $# = 0 ] || cp "$@" "$folder"
python=${PYTHON:-python3}
download=("$python" -m pip download -q --only-binary=:all: --python-version 3.12 --implementation cp -d "$folder")
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  download+=(--platform "${tag}_x86_64")
done
"${download[@]}" --no-deps megatron-core==0.19.2 soundfile soxr cffi pycparser zstandard  # with theirs comes all of torch
ls "$folder"/pydantic-*.whl >/dev/null 2>&1 || "${download[@]}" "pydantic>=2.10"
echo "$folder: $(du -sm "$folder" | cut -f1) MB, $(ls "$folder" | wc -l) files"
