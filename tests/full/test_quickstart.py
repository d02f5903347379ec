"""The whole quickstart, as its users run it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_soda.data.store import Store, convert
from tests.voices import write_speech

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]


def quickstart(*arguments: str, timeout: int = 2400) -> subprocess.CompletedProcess:
    command = ["bash", "examples/quickstart/run.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    result = quickstart(f"run={folder}")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder


def test_everything_is_there(run):
    for path in ("data/train.bin", "data/valid.idx", "data/test.json", "metrics.jsonl", "eval.json", "report.html"):
        assert (run / path).is_file()
    assert (run / "hf" / "model.safetensors").is_file()
    assert len(list((run / "samples").glob("*.wav"))) >= 6
    assert list((run / "checkpoints").glob("step_*/checkpoint.json"))


def test_it_learned(run):
    """The bars of the quickstart, in nats against the per-slot unigram; and the grammar."""
    result = json.loads((run / "eval.json").read_text())
    rows = {**result["nll"]["classes"], "acoustic": result["nll"]["acoustic_mean"]}
    for name, bar in {"text": -0.5, "semantic": -0.2, "acoustic": -0.3}.items():
        assert rows[name]["model_nats"] - rows[name]["unigram_nats"] <= bar, rows[name]
    grammar = result["grammar"]
    assert grammar["valid"] == grammar["duration_exact"] == grammar["generations"] == 100
    assert grammar["legal_mass_mean"] >= 0.99
    assert grammar["free_legal_mass_mean"] >= 0.99
    gain = result["gain"]
    assert gain["utterances"] >= 150
    assert min(gain[what]["gain_low"] for what in ("text", "semantic", "acoustic")) > 0  # against a wrong partner
    assert gain["text"]["gain_over_alone_low"] > 0
    assert json.loads((run / "hf" / "soda.json").read_text())["max_logit_difference"] < 1e-4


def test_a_second_run_skips_what_is_done(run):
    def times() -> dict[Path, int]:
        """Of the files that are kept; what is there is indexed anew every time."""
        changing = {".lock", "README.md"}  # the model card has the results of the evaluation, which differ
        found = (p for folder in ("data", "checkpoints", "hf") for p in (run / folder).rglob("*") if p.is_file())
        return {p: p.stat().st_mtime_ns for p in found if "work" not in p.parts and p.name not in changing}

    before = times()
    result = quickstart(f"run={run}", "evaluate.suite=[nll]", "evaluate.documents=10", "generate.samples=1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert times() == before


def test_the_compact_stores_are_small(run, tmp_path):
    """At most 1.5 bytes a token, and the same tokens."""
    for name in ("train", "valid", "test"):
        store = Store(run / "data" / name)
        convert(store, tmp_path / name, "compact")
        small = Store(tmp_path / name)
        assert sum(path.stat().st_size for path in small.files.values()) <= 1.5 * small.size
        assert np.array_equal(small.read(0, small.size), store.read(0, store.size))


@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_own_speech_at_every_layout(tmp_path, layout):
    """The user's own folder, a few steps."""
    speech = write_speech(tmp_path / "speech", 40)
    result = quickstart(
        "--speech", str(speech), "--layout", layout, f"run={tmp_path}/run", "training.steps=6",
        "data.sequence_length=512", "text_pieces=300", "evaluate.generations=4", "generate.samples=1",
        "generate.prompt_seconds=0.4",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "tp3"], "must be tp2, pp2 or dp2"),
        (["--speech"], "--speech needs a folder"),
        (["--speech", "/nowhere"], "no such folder"),
        (["--quick"], "unknown argument"),
    ],
)
def test_wrong_arguments(arguments, message):
    result = quickstart(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_without_apt_it_names_speech(tmp_path):
    """A machine without apt-get: PATH has all else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for directory in os.environ["PATH"].split(":"):
        if not Path(directory).is_dir():
            continue
        for tool in Path(directory).iterdir():
            if tool.name not in ("apt-get", "dpkg-deb") and not (folder / tool.name).exists():
                (folder / tool.name).symlink_to(tool)
    command = ["bash", "examples/quickstart/run.sh", f"run={tmp_path}/run", f"prepare.downloads={tmp_path}/downloads"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": str(folder)}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert "--speech" in result.stderr
    assert "Traceback" not in result.stderr
