#!/usr/bin/env bash
# Trains a recipe on one node or on several, with torchrun.
#
#   bash examples/pretrain/launch.sh examples/pretrain/135m.yaml            one node, all its GPUs
#   bash examples/pretrain/launch.sh --smoke examples/pretrain/135m.yaml    a tiny model on made-up data, to see it run
#   bash examples/pretrain/launch.sh examples/pretrain/4b.yaml parallel.tensor=2 parallel.sequence=true
#
# Several nodes: the same command on each, and each with a NODE_RANK of its own.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a bash examples/pretrain/launch.sh examples/pretrain/4b.yaml
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a bash examples/pretrain/launch.sh examples/pretrain/4b.yaml
#
# From the environment:
#   NNODES          how many nodes (1)
#   NODE_RANK       which one this is (0)
#   MASTER_ADDR     name or address of node 0; needed if there are several
#   MASTER_PORT     a free port of node 0, if there are several (29500)
#   NPROC_PER_NODE  processes of a node (one a GPU; without GPUs 2)
#   MAX_RESTARTS    how often torchrun restarts the processes of a node after one has failed (0)
#   SODA_PYTHON     an interpreter that has the package, a container's for one (that of .venv, which is made if needed)
#   OMP_NUM_THREADS threads of a process (on CPUs its share of the cores)
#   GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME   the network interface between the nodes
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
smoke=0
recipe=
overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,22s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --smoke) smoke=1 ;;
    *=*) overrides+=("$1") ;;
    *)
      [ -z "$recipe" ] || { echo "error: $1: a second recipe, after $recipe (see --help)" >&2; exit 2; }
      [ -f "$1" ] || { echo "error: $1: no such recipe; there are" "$root"/examples/pretrain/*.yaml >&2; exit 2; }
      recipe=$(realpath "$1") ;;
  esac
  shift
done
[ -n "$recipe" ] || { echo "error: which recipe? (see --help)" >&2; exit 2; }
cd "$root"   # paths in a recipe are from here

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_PORT=${MASTER_PORT:-29500}
if [ "$NNODES" != 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
  echo "error: NNODES=$NNODES: set MASTER_ADDR to the name or address of node 0, on every node" >&2
  exit 2
fi
if [ "$smoke" = 1 ] && [ "$NNODES" != 1 ]; then
  echo "error: --smoke is for one node" >&2
  exit 2
fi

python=${SODA_PYTHON:-.venv/bin/python}
if [ -n "${SODA_PYTHON:-}" ]; then
  command -v "$python" >/dev/null || { echo "error: SODA_PYTHON=$python: there is no such program" >&2; exit 2; }
elif [ "$NNODES" = 1 ]; then
  bash tools/venv.sh
elif [ ! -x "$python" ]; then   # nodes that share a disk would make it at the same time
  echo "error: no .venv in $root; make it once, before the job: bash tools/venv.sh" >&2
  exit 2
fi
if [ "$NNODES" = 1 ]; then   # over loopback: nothing listens beyond this machine
  torchrun=(-m megatron_soda.parallel.one_node)
else
  bind=()
  if [ "$NODE_RANK" = 0 ]; then bind=(--bind); fi
  "$python" -m megatron_soda.parallel.preflight \
    --address "$MASTER_ADDR" --port "$MASTER_PORT" --nodes "$NNODES" "${bind[@]}"
  torchrun=(
    -m torch.distributed.run --nnodes "$NNODES" --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
  )
fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
processes=${NPROC_PER_NODE:-$gpus}
if [ "$processes" = 0 ]; then processes=2; fi

if [ "$smoke" = 1 ]; then
  folder=runs/smoke/$(basename "$recipe" .yaml)
  rm -rf "$folder"
  made=$("$python" examples/pretrain/synthetic.py "$recipe" "$folder/data")
  mapfile -t stores <<<"$made"
  small=(
    "run=$folder" "${stores[@]}" data.sequence_length=256 model.preset=tiny training.steps=4
    schedule.name=wsd "training.branch_from=''" "training.global_batch_size=$((2 * processes))"
    training.micro_batch_size=1 logging.log_every=1 checkpoint.save_every=4 training.valid_every=4
    training.valid_windows=2 evaluate.every=0
  )
  if [ "$gpus" = 0 ]; then small+=(precision.dtype=fp32); fi
  overrides=("${small[@]}" "${overrides[@]}")
fi

if [ -z "${OMP_NUM_THREADS:-}" ]; then   # torchrun would say 1
  OMP_NUM_THREADS=1
  if [ "$gpus" = 0 ] && [ "$(nproc)" -gt "$processes" ]; then OMP_NUM_THREADS=$(($(nproc) / processes)); fi
fi
export OMP_NUM_THREADS
# torchrun passes SIGTERM on to the trainers, which save, and kills them after so many seconds; its own 30 are too few.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
command=(
  "$python" "${torchrun[@]}" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}"
  -m megatron_soda.train "$recipe" "${overrides[@]}"
)
printf 'node %s of %s:' "$NODE_RANK" "$NNODES"
printf ' %q' "${command[@]}"
echo
exec "${command[@]}"
