"""Generates with vLLM, in an environment that has it: `python vllm_side.py JOB.json`. bench_vllm.py and
tests/full/test_vllm.py start it; of this package it needs only `serving` and `vocab`.

The job: {"folder", "engine": settings of vllm.LLM, "turns": [{"prompts": ids of each, "params": settings of each}]}.
It prints one JSON line: for each turn the seconds that passed, CPU seconds, and the ids of each request.
"""

# pyright: reportMissingImports=false

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def generate(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    fixed = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "generation_config": "vllm"}
    llm = LLM(model=job["folder"], disable_log_stats=False, **fixed, **job["engine"])
    found = []
    for turn in job["turns"]:
        prompts = [{"prompt_token_ids": ids} for ids in turn["prompts"]]
        params = [SamplingParams(detokenize=False, **one) for one in turn["params"]]
        began, cpu = time.perf_counter(), time.process_time()
        outputs = [request.outputs[0] for request in llm.generate(prompts, params, use_tqdm=False)]
        times = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        found.append({**times, "ids": [list(output.token_ids) for output in outputs]})
    if preempted := [one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions"]:
        found[-1]["preemptions"] = preempted[0]
    return found


if __name__ == "__main__":
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    print(json.dumps(generate(json.loads(Path(sys.argv[1]).read_text()))))
