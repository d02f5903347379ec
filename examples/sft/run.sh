#!/usr/bin/env bash
# Fine-tunes the quickstart's model to transcribe (bash examples/quickstart/run.sh makes that model first).
#
#   bash examples/sft/run.sh                             everything lands in runs/sft; run it again and it goes on
#   bash examples/sft/run.sh training.steps=20           any setting of recipe.yaml, as key=value
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/../.."
[ -d runs/quickstart/checkpoints ] || { echo "error: no runs/quickstart: bash examples/quickstart/run.sh makes it" >&2; exit 2; }
soda=.venv/bin/soda
recipe=examples/sft/recipe.yaml
set -x
$soda prepare $recipe "$@"
$soda validate $recipe "$@"
NPROC_PER_NODE=${NPROC_PER_NODE:-2} bash examples/pretrain/launch.sh $recipe "$@"
$soda export $recipe "$@"
$soda evaluate $recipe "$@"
$soda generate $recipe "$@"
