#!/usr/bin/env bash
# Measures what only a machine with a GPU can show. Needs PyTorch for CUDA and Python 3.12; no network.
#
#   bash tools/bench/gpu.sh                      all parts: 25 to 30 minutes on an H100 (an estimate)
#   bash tools/bench/gpu.sh setup versions       these parts, in this order
#   bash tools/bench/gpu.sh --rehearse [PART..]  on a CPU at toy size; what needs a GPU is skipped
#   PARTS: setup versions tests sanitizer kernels head train settings fp8 codecs generate report
#
# A part ends within 9 minutes. The same command again goes on where the last one stopped: only what did not finish is
# run. `report` prints the tables of docs/gpu_results.md and, as its last line, everything in JSON.
#
# From the environment:
#   PACK   the folder that gpu_pack.sh filled (default .gpu)
#   OUT    where logs and results go (default runs/gpu, or runs/gpu_rehearsal)
#   DATA   a prepared folder of tokens, for `fp8` (default: the one in PACK)
set -uo pipefail
case ${1:-} in -h | --help) sed -n '2,17s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/../.."
rehearse=''
if [ "${1:-}" = --rehearse ]; then rehearse=1; shift; fi
PACK=${PACK:-.gpu} OUT=$(realpath -m "${OUT:-runs/gpu${rehearse:+_rehearsal}}") python=${PYTHON:-python3}
DATA=${DATA:-$PACK/data} site=$(realpath -m "$PACK/site")
export PYTHONPATH=$PWD:$site:${PYTHONPATH:-} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
marks=$OUT running=''
trap '[ -z "$running" ] || kill "$running" 2>/dev/null; exit 130' INT TERM
unset LD_BIND_NOW  # with it Transformer Engine's library does not load
unset PYTHONDONTWRITEBYTECODE  # or each of a hundred processes compiles megatron-core again
device=cuda slow=1 presets='135m 1.7b'
if [ $rehearse ]; then device=cpu slow=6 presets=135m CUDA_VISIBLE_DEVICES=''; export CUDA_VISIBLE_DEVICES; fi
mkdir -p "$OUT"
card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -e "$OUT/card" ] || echo "$card" >"$OUT/card"
if [ "$card" != "$(cat "$OUT/card")" ]; then echo "error: $OUT is of another card: $(cat "$OUT/card")" >&2; exit 2; fi

step() { # NAME SECONDS COMMAND...: its output in OUT/NAME.log, its last line in results.jsonl if that is JSON
  local name=$1 limit=$(($2 * slow)) began=$SECONDS left=$((part_end - SECONDS)) status last
  shift 2
  if [ -e "$marks/$name.done" ]; then return; fi
  if [ $left -lt 20 ]; then
    echo "== $name: no time left in this part; run it again"
    echo "{\"step\": \"$name\", \"exit\": null, \"result\": null}" >>"$OUT/results.jsonl"
    return
  fi
  [ "$limit" -le $left ] || limit=$left
  timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1 &  # which Ctrl-C alone would not reach
  running=$!
  wait $running
  status=$?
  echo "== $name: exit $status, $((SECONDS - began)) s"
  tail -n "${SHOW:-12}" "$OUT/$name.log" | cut -c 1-400
  last=$(tail -n 1 "$OUT/$name.log")
  case $last in '{'*'}') ;; *) last=null ;; esac
  echo "{\"step\": \"$name\", \"exit\": $status, \"result\": $last}" >>"$OUT/results.jsonl"
  [ $status != 0 ] || touch "$marks/$name.done"
}

gpu_step() { # the same, for what a CPU cannot do
  if [ -z $rehearse ]; then step "$@"; else echo "== $1: skipped: needs a GPU"; fi
}

toy() { # OPTION...: these, in a rehearsal; the last one counts where an option is given twice
  [ -z $rehearse ] || printf '%s\n' "$@"
}

bench() { # NAME SECONDS FILE OPTION...
  local name=$1 limit=$2 file=$3
  shift 3
  step "$name" "$limit" "$python" "tools/bench/bench_$file.py" "$@"
}

facts='
import importlib.metadata as metadata, json, platform, torch
found = {"python": platform.python_version(), "cudnn": torch.backends.cudnn.version(), "nccl": torch.cuda.nccl.version()}
for name in ("torch", "triton", "transformer-engine", "megatron-core", "transformers", "numpy"):
    try:
        found[name] = torch.__version__ if name == "torch" else metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
found["device"] = "CPU"
if torch.cuda.is_available():
    found |= {"device": torch.cuda.get_device_name(), "gib": torch.cuda.get_device_properties(0).total_memory / 2**30}
print(json.dumps(found))
'

part_setup() { # may be run for each folder of the pack as it comes; a file that has changed is unpacked again
  local folder archive marks=$site/.done
  mkdir -p "$marks"
  for folder in "$PACK"/[0-9]*/; do
    for archive in "$folder"*.tar.xz; do
      [ ! -e "$archive" ] || step "unpack-$(basename "$archive")-$(digest "$archive")" 120 tar -xJf "$archive" -C "$site"
    done
    [ ! -e "${folder}data.tar" ] || step "unpack-data-$(digest "${folder}data.tar")" 60 tar -xf "${folder}data.tar" -C "$PACK"
    compgen -G "$folder*.whl" >/dev/null || continue
    step "install-$(basename "$folder")-$(digest "$folder"*.whl)" 120 "$python" -m pip install -q --no-index --no-deps \
      --no-compile --upgrade --target "$site" "$folder"*.whl
  done
}

digest() { cat "$@" | cksum | cut -d ' ' -f 1; }

part_versions() {
  local built
  built=$(compgen -G "$PACK/[0-9]*/_csrc.abi3.so")
  [ -z "$built" ] || step csrc 20 cp "$built" megatron_soda/  # and then the next line does nothing
  SODA_CSRC=$device step csrc 300 "$python" setup.py build_ext --inplace
  step versions 60 "$python" -c "$facts"
  SHOW=40 step doctor 60 "$python" -m megatron_soda.cli doctor
}

part_tests() {
  SHOW=${SHOW:-30} step tests-kernels 200 "$python" -m pytest -x tests/gpu/test_kernels.py --durations 5
  local together=()  # they wait for imports most of the time
  if [ -z $rehearse ] && "$python" -c "import xdist" 2>/dev/null; then together=(-n 8); fi
  OMP_NUM_THREADS=2 SHOW=${SHOW:-80} step tests-cuda 320 "$python" -m pytest tests/gpu/test_cuda.py tests/gpu/test_dali.py \
    --durations 25 --tb short "${together[@]}"
}

part_sanitizer() {
  gpu_step sanitizer 240 compute-sanitizer --error-exitcode 9 "$python" -m pytest -x tests/gpu/test_kernels.py \
    -k "test_damage_is_found or test_an_id_outside or test_windows_of_a_long_stream or (test_packing and (3-11 or 8-11)) or (test_batches and 2049)"
}

part_kernels() { SHOW=40 bench kernels 240 kernels $(toy --scale 0.001 --repeats 1); }

part_head() {
  local preset
  for preset in $presets; do
    bench "head-$preset" 120 head --preset $preset --precision bf16 --tokens 16384 --memory-tokens 16384 \
      $(toy --preset tiny --precision fp32 --tokens 64 --memory-tokens 64 --repeats 1)  # a CPU's BF16 may take minutes
  done
}

size() { # NAME SEQUENCES OPTION...: in BF16 and FP8
  local name=$1 batch=$2 precision run
  shift 2
  for precision in ${PRECISIONS:-bf16 fp8}; do
    run=step
    [ $precision = bf16 ] || run=gpu_step
    $run "$name-$precision" 300 "$python" tools/bench/bench_train.py --apart --sequence-length 4096 --micro-batch "$batch" \
      --micro-batches 2 --documents 4 --steps 8 --warmup 4 --rounds 1 --precision $precision "$@" \
      $(toy --preset tiny --layers 2 --precision fp32 --sequence-length 64 --micro-batch 1 --steps 1 --warmup 1)
  done
}

part_train() {
  size train-135m 16 --preset 135m --sides ours
  size train-135m-8 8 --preset 135m --sides ours,megatron-core  # theirs has no memory for 16
  size train-600m 8 --preset 600m --sides ours
  size train-1.7b 4 --preset 1.7b --sides ours
  size train-4b-18 2 --preset 4b --layers 18 --sides ours
}

part_settings() { # one at a time, against the defaults; what overlaps needs more devices
  local each=ours,training.fuse_swiglu=false,training.fuse_rope=false,training.fuse_gradients=false
  each+=,training.head_rows=legal,training.recompute=true,parallel.distributed_optimizer=true,optimizer.name=cautious
  [ -n "$rehearse" ] || each+=,training.cuda_graphs=true  # refused without a device
  local recipes=ours,precision.fp8_recipe=delayed,precision.fp8_recipe=blockwise,precision.bf16_layers=1 name batch=16
  for name in $presets; do
    size "settings-$name" $batch --one-process --preset $name --steps 4 --sides $each
    PRECISIONS=fp8 size "recipes-$name" $batch --one-process --preset $name --steps 4 --sides $recipes
    batch=4
  done
}

part_fp8() {
  local common=(examples/pretrain/base.yaml model.preset=135m "data.path=$DATA" data.sequence_length=2048 training.steps=200
    training.global_batch_size=32 training.micro_batch_size=16 training.valid_every=200 checkpoint.save_every=200 logging.log_every=1)
  common+=($(toy model.preset=tiny data.sequence_length=64 training.steps=4 training.global_batch_size=2 \
    training.micro_batch_size=1 training.valid_windows=4))
  local kind precision
  for kind in bf16 fp8-tensorwise fp8-delayed fp8-blockwise; do
    precision=(precision.dtype=fp8 "precision.fp8_recipe=${kind#fp8-}")
    [ $kind != bf16 ] && [ -z $rehearse ] || precision=(precision.dtype=bf16)  # a rehearsal compares BF16 with itself
    step "run-$kind" 200 "$python" -m megatron_soda.train "${common[@]}" "${precision[@]}" "run=$OUT/runs/$kind"
    rm -rf "$OUT/runs/$kind/checkpoints"
    [ $kind = bf16 ] || step "gap-$kind" 60 "$python" tools/compare_runs.py "$OUT/runs/bf16" "$OUT/runs/$kind"
  done
}

part_codecs() {
  local codec
  for codec in mimi encodec dac; do
    bench "codec-$codec" 150 codecs --codec $codec --device $device --seconds 600 --repeats 3 --decoders 8 \
      $(toy --seconds 4 --repeats 1 --decoders 2)
  done
}

part_generate() {
  bench generate 200 generate --models 135m,1.7b --batches 1,16,64 --tokens 266 --device $device \
    $(toy --models tiny --batches 1,2 --tokens 16 --repeats 1)
}

part_report() { "$python" tools/bench/gpu_report.py "$OUT"; }

[ $# -gt 0 ] || set -- setup versions tests sanitizer kernels head train settings fp8 codecs generate report
for part; do
  case $part in
    setup | versions | tests | sanitizer | kernels | head | train | settings | fp8 | codecs | generate | report) ;;
    *) echo "error: no part $part (see --help)" >&2; exit 2 ;;
  esac
done
for part; do
  part_end=$((SECONDS + 520 * slow))
  "part_$part"
done
