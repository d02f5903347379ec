#!/usr/bin/env bash
# Text benchmarks, by lm-eval on an exported model, with the hub off (pip install 'megatron-soda[lm-eval]'):
#   bash examples/evaluation/text.sh runs/quickstart/hf FOLDER hellaswag,mmlu OUT [lm-eval's options: --num_fewshot 5 ..]
# FOLDER is the HF_HOME of a machine that has run the tasks with a network once, or holds tasks of your own in tasks/
# (docs/evaluation.md). OUT/text.json has the scores with their errors, the shots, the versions and the command.
set -euo pipefail
if [ $# -lt 4 ]; then sed -n '2,5s/^# //p' "$0" >&2; exit 2; fi
model=$(realpath "$1") folder=$(realpath "$2") tasks=$3 out=$(realpath -m "$4")
shift 4
for need in "$model/config.json" "$folder"; do
  [ -e "$need" ] || { echo "error: $need: is not there" >&2; exit 2; }
done
python=$(command -v "${PYTHON:-python}") || { echo "error: no python; source .venv/bin/activate first" >&2; exit 2; }
"$python" -c 'import lm_eval' 2>/dev/null || {
  echo "error: lm-eval is not installed: pip install 'megatron-soda[lm-eval]'" >&2; exit 2; }
mkdir -p "$out" "$folder/tasks"
cd "$folder/tasks"   # data files of own tasks are relative to it
export HF_HOME=$folder HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# add_bos_token: documents of training begin with it, and lm-eval would leave it out.
command=("$python" -m lm_eval run --model hf --model_args "pretrained=$model,dtype=float32,add_bos_token=True"
         --tasks "$tasks" --include_path . --output_path "$out" "$@")
"${command[@]}"
"$python" - "$out" "${command[*]}" <<'PY'
import json, pathlib, sys

out, command = pathlib.Path(sys.argv[1]), sys.argv[2]
newest = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
found = json.loads(newest.read_text())
kept = {key: found.get(key) for key in ("results", "groups", "n-shot", "n-samples", "versions", "lm_eval_version")}
(out / "text.json").write_text(json.dumps({"command": command, **kept}, indent=1) + "\n")
print(out / "text.json")
PY
