#!/usr/bin/env bash
# Gathers what tools/bench/gpu.sh needs on a machine with a GPU and no network: wheels for Python 3.12 on x86-64, csrc
# where nvcc can compile it, and tokens.
#
#   bash tools/bench/gpu_pack.sh .gpu              into .gpu/1, .gpu/2, ..
#   bash tools/bench/gpu_pack.sh .gpu FILE ...     and these files: an archive (.tar.xz) of a built Transformer Engine,
#                                                  to be unpacked beside the packages, and wheels it needs
#
# Only what such a machine is likely to lack: it has PyTorch for CUDA with triton, numpy, transformers, pyarrow, pytest.
# DALI is left out, so `codecs` measures without it: its wheel has 190 MiB, more than PART_MIB. Install it there instead.
# From the environment:
#   PYTHON     with PyTorch for CUDA, to compile csrc; without, the other machine has to
#   DATA       a prepared folder of tokens (default runs/quickstart/data)
#   PART_MIB   the most that a folder may hold (default 52, since the repository travels too). Where only one can be
#              brought at a time, run `gpu.sh setup` after each.
set -euo pipefail
case ${1:-} in '' | -h | --help) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
folder=$(realpath -m "$1")
shift
data=${DATA:-runs/quickstart/data} python=${PYTHON:-python3} limit=$((${PART_MIB:-52} * 1024 * 1024))
all=$folder/all
rm -rf "$all"
mkdir -p "$all"
[ $# = 0 ] || cp "$@" "$all"  # perhaps from the last pack
rm -rf "$folder"/[0-9]* "$folder/site" "$folder/data"  # gpu.sh unpacks into these
[ ! -d "$data" ] || data=$(realpath "$data")
cd "$(dirname "$0")/../.."

download=("$python" -m pip download -q --only-binary=:all: --python-version 3.12 --implementation cp -d "$all")
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  download+=(--platform "${tag}_x86_64")
done
"${download[@]}" --no-deps megatron-core==0.19.2 soundfile soxr av cffi pycparser zstandard liger-kernel  # with theirs comes all of torch
compgen -G "$all/pydantic-*.whl" >/dev/null || "${download[@]}" "pydantic>=2.10"

cudart=$("$python" -c '
import glob, sysconfig, torch
print(*(torch.version.cuda and glob.glob(sysconfig.get_path("purelib") + "/nvidia/*/lib/libcudart.so.*") or []))' 2>/dev/null || true)
if [ -n "$cudart" ] && command -v nvcc >/dev/null; then
  build=$(mktemp -d)
  ln -s "$cudart" "$build/libcudart.so"  # PyTorch's packages have it without this name
  LIBRARY_PATH=$build SODA_CSRC=cuda "$python" setup.py -q build_ext --build-lib "$build" --build-temp "$build/temp" \
    >"$build/log" 2>&1 || { tail -n 20 "$build/log" >&2; exit 1; }
  mv "$build"/megatron_soda/_csrc.abi3.so "$all"
  rm -r "$build"
else
  echo "csrc is not compiled: that takes nvcc and PyTorch for CUDA from PyPI (PYTHON=..)"
fi
if [ -e "$data/train.bin" ] || [ -e "$data/train.frames" ]; then
  tar -cf "$all/data.tar" --exclude work --exclude units -C "$(dirname "$data")" --transform "s,^$(basename "$data"),data," "$(basename "$data")"
else
  echo "no tokens in $data: set DATA, or gpu.sh fp8 has nothing to train on"
fi

declare -a room
while read -r size file; do  # the largest first, each into the first folder that has room
  if [ "$size" -gt $limit ]; then echo "error: $(basename "$file") alone has more than $((limit >> 20)) MiB" >&2; exit 1; fi
  part=1
  while [ "$size" -gt "${room[part]:-$limit}" ]; do part=$((part + 1)); done
  room[part]=$((${room[part]:-$limit} - size))
  mkdir -p "$folder/$part"
  mv "$file" "$folder/$part"
done < <(find "$all" -type f -printf '%s %p\n' | sort -rn)
rmdir "$all"
for part in "$folder"/[0-9]*; do echo "$part: $(du -sm "$part" | cut -f1) MB, $(ls "$part" | wc -l) files"; done
