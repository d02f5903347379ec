#!/usr/bin/env bash
# The main job, end to end: real speech -> tokens -> a trained model -> evaluation, speech, Hugging Face, a page.
#
#   bash examples/quickstart/run.sh                      free telephone prompts, fetched
#   bash examples/quickstart/run.sh --speech DIR         your own audio: DIR has a manifest.jsonl (audio, text);
#                                                        sound files only: add prepare.orders=[audio-only]
#   bash examples/quickstart/run.sh --layout tp2         tp2 | pp2 | dp2 (default, the fastest on two cores); pp2 has 4 layers, not 3
#   bash examples/quickstart/run.sh training.steps=200   any setting of recipe.yaml, as key=value
#
# Everything lands in runs/quickstart. Run it again and it goes on where it was.
set -euo pipefail

layout=dp2
overrides=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --speech)
      [ $# -ge 2 ] || { echo "error: --speech needs a folder" >&2; exit 2; }
      [ -e "$2" ] || { echo "error: --speech $2: no such folder" >&2; exit 2; }
      # the gain suite needs transcripts, and enough held-out utterances of like length
      # with little speech, the codec is the shipped one, which has 8 codebooks of 2,048 entries; packing would leave out
      # whatever is longer than a window
      overrides+=("prepare.speech=$(realpath "$2")" prepare.numbers=0 prepare.codebooks=0 prepare.entries=0 "prepare.text=[]"
        data.pack=false "run=runs/quickstart-own" "evaluate.suite=[nll,grammar]")
      shift 2 ;;
    --layout) [ $# -ge 2 ] || { echo "error: --layout needs tp2, pp2 or dp2" >&2; exit 2; }; layout=$2; shift 2 ;;
    *=*) overrides+=("$1"); shift ;;
    *) echo "error: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
done
cd "$(dirname "$0")/../.."
case $layout in
  dp2) ;;
  tp2) overrides+=(parallel.tensor=2) ;;
  pp2) overrides+=(parallel.pipeline=2 model.num_layers=4) ;;
  *) echo "error: --layout $layout: must be tp2, pp2 or dp2" >&2; exit 2 ;;
esac

bash tools/venv.sh
soda=.venv/bin/soda
recipe=examples/quickstart/recipe.yaml
processes=2
if command -v nvidia-smi >/dev/null && [ "$(nvidia-smi -L 2>/dev/null | grep -c GPU)" = 1 ]; then
  [ "$layout" = dp2 ] || { echo "error: --layout $layout needs two GPUs, here is one" >&2; exit 2; }
  processes=1
fi

set -x
$soda prepare $recipe "${overrides[@]}"
$soda validate $recipe "${overrides[@]}"
NPROC_PER_NODE=$processes bash examples/pretrain/launch.sh $recipe "${overrides[@]}"
$soda export $recipe "${overrides[@]}"
$soda evaluate $recipe "${overrides[@]}"
$soda generate $recipe "${overrides[@]}"
$soda report $recipe "${overrides[@]}"
