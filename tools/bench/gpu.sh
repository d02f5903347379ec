#!/usr/bin/env bash
# Measures what only a machine with a GPU can show. Needs PyTorch for CUDA, Python 3.12, nvcc; no network.
#
#   bash tools/bench/gpu.sh setup tests         these parts, in this order; without names, all
#   PARTS: setup tests sanitizer kernels head train fp8
#
# From the environment:
#   PACK   the folder that gpu_pack.sh filled (default .gpu)
#   OUT    where logs and results.jsonl go (default runs/gpu); a step that finished there is not run again
#   DATA   a prepared folder of tokens, for `fp8`
set -uo pipefail
case ${1:-} in -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/../.."
PACK=${PACK:-.gpu} OUT=$(realpath -m "${OUT:-runs/gpu}") DATA=${DATA:-runs/quickstart/data} python=${PYTHON:-python3}
site=$(realpath -m "$PACK/site")
export PYTHONPATH=$PWD:$site:${PYTHONPATH:-} PYTHONUNBUFFERED=1
unset LD_BIND_NOW  # with it Transformer Engine's library does not load
mkdir -p "$OUT"

step() { # NAME SECONDS COMMAND...: its output in OUT/NAME.log, its last line in results.jsonl if that is JSON
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  if [ -e "$OUT/$name.done" ]; then return; fi
  timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  [ $status != 0 ] || touch "$OUT/$name.done"
  echo "== $name: exit $status, $((SECONDS - began)) s"
  tail -n "${SHOW:-12}" "$OUT/$name.log" | cut -c 1-400
  local last
  last=$(tail -n 1 "$OUT/$name.log")
  case $last in '{'*) echo "{\"step\": \"$name\", \"result\": $last}" >>"$OUT/results.jsonl" ;; esac
}

facts='
import importlib.metadata as metadata, platform, torch
print("python", platform.python_version())
for name in ("torch", "triton", "transformer-engine", "megatron-core", "transformers", "numpy"):
    try:
        print(name, torch.__version__ if name == "torch" else metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "absent")
print("cuDNN", torch.backends.cudnn.version(), "NCCL", torch.cuda.nccl.version())
print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30, "GiB")
'

part_setup() {
  mkdir -p "$site"
  for archive in "$PACK"/*.tar.xz; do [ ! -e "$archive" ] || step "unpack-$(basename "$archive")" 120 tar -xJf "$archive" -C "$site"; done
  step install 120 "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$PACK"/*.whl
  SODA_CSRC=cuda step csrc 300 "$python" setup.py build_ext --inplace
  step versions 60 "$python" -c "$facts"
  SHOW=40 step doctor 60 "$python" -m megatron_soda.cli doctor
}

part_tests() {
  SHOW=${SHOW:-30} step tests-kernels 200 "$python" -m pytest -q -x tests/gpu/test_kernels.py --durations 5
  local together=()  # they wait for imports most of the time
  "$python" -c "import xdist" 2>/dev/null && together=(-n 8)
  OMP_NUM_THREADS=2 SHOW=${SHOW:-80} step tests-cuda 400 "$python" -m pytest -q tests/gpu/test_cuda.py --durations 25 --tb short "${together[@]}"
}

part_sanitizer() {
  step sanitizer 240 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -x tests/gpu/test_kernels.py \
    -k "test_damage_is_found or test_an_id_outside or test_windows_of_a_long_stream or (test_packing and (3-11 or 8-11)) or (test_batches and 2049)"
}

part_kernels() { SHOW=40 step kernels 240 "$python" tools/bench/bench_kernels.py; }

part_head() {
  for preset in 135m 1.7b; do
    step "head-$preset" 120 "$python" tools/bench/bench_head.py --preset $preset --precision bf16 --tokens 16384 --memory-tokens 16384
  done
}

size() { # NAME SEQUENCES ARGUMENTS...: BF16 and FP8
  local name=$1 batch=$2
  shift 2
  for precision in ${PRECISIONS:-bf16 fp8}; do
    step "train-$name-$precision" 120 "$python" tools/bench/bench_train.py --sequence-length 4096 --micro-batch "$batch" \
      --micro-batches 2 --documents 4 --steps 8 --warmup 4 --rounds 1 --precision "$precision" "$@"
  done
}

part_train() {
  size 135m 16 --preset 135m --sides ours
  size 135m-8 8 --preset 135m --sides ours,megatron-core  # theirs has no memory for 16
  size 600m 8 --preset 600m --sides ours
  size 1.7b 4 --preset 1.7b --sides ours
  PRECISIONS=fp8 size 1.7b-delayed 4 --preset 1.7b --sides ours --fp8-recipe delayed
  size 4b-18 2 --preset 4b --layers 18 --sides ours
  for setting in fuse_swiglu=false fuse_rope=false fuse_gradients=false cuda_graphs=true; do  # the others need more devices
    PRECISIONS=bf16 size "135m-$setting" 16 --preset 135m --sides ours "training.$setting"
  done
}

part_fp8() {
  local common=(examples/pretrain/135m.yaml "data.path=$DATA" data.sequence_length=2048 training.steps=200
    training.global_batch_size=32 training.micro_batch_size=16 training.valid_every=200 checkpoint.save_every=200 logging.log_every=1)
  for kind in bf16 fp8-tensorwise fp8-delayed fp8-blockwise; do
    local precision=(precision.dtype=bf16)
    [ $kind = bf16 ] || precision=(precision.dtype=fp8 "precision.fp8_recipe=${kind#fp8-}")
    step "run-$kind" 240 "$python" -m megatron_soda.train "${common[@]}" "${precision[@]}" "run=$OUT/runs/$kind"
    [ $kind = bf16 ] || step "gap-$kind" 60 "$python" tools/compare_runs.py "$OUT/runs/bf16" "$OUT/runs/$kind"
  done
}

[ $# -gt 0 ] || set -- setup tests sanitizer kernels head train fp8
for part; do
  case $part in
    setup | tests | sanitizer | kernels | head | train | fp8) "part_$part" ;;
    *) echo "error: no part $part (see --help)" >&2; exit 2 ;;
  esac
done
