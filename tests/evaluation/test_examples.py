"""examples/evaluation: benchmarks made of held-out recordings, and the script for lm-eval, with a fake one."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_soda.codecs.description import CodecDescription
from megatron_soda.data.units import write_units
from megatron_soda.errors import SodaError
from megatron_soda.evaluation.pair_files import language_pairs, salmon_pairs
from megatron_soda.evaluation.speech_files import listed
from tests.exported import FakeCodec

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "evaluation"
RATE = 24_000


def held_out(run: Path) -> None:
    """Words and sentences of two speakers, all of two seconds."""
    codec = CodecDescription.of(FakeCodec(), {"spec": "embedded"})
    texts = ["yesterday", "November.", "nine", "press two", "lunes", "gracias"]
    for side in ("valid", "test"):
        rows = []
        for i, text in enumerate(texts):
            path = run / f"{side}{i}.wav"
            wave = np.random.default_rng([i, side == "test"]).uniform(-0.1, 0.1, 2 * RATE) * (1 + i)
            soundfile.write(path, wave, RATE, subtype="PCM_16")
            language, speaker = ("en", "ann") if i < 4 else ("es", "bob")
            names = {"prompt": "", "recording": "", "language": language, "speaker": speaker}
            codes = np.zeros((25, 4), np.int16)
            rows.append({"id": f"{side}{i}", "codes": codes, "text": text, "seconds": 2.0, "audio": str(path), **names})
        write_units(run / "data" / f"{side}.parquet", rows, codec=codec)


def read(path: str) -> np.ndarray:
    return soundfile.read(path)[0]


def test_pairs_of_held_out_recordings(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "pairs.py"))["main"]
    (tmp_path / "run" / "data").mkdir(parents=True)
    held_out(tmp_path / "run")
    out = tmp_path / "out"
    main(tmp_path / "run", out)
    said = capsys.readouterr().out.splitlines()
    assert said == [*(f"salmon/{n}: 12 pairs" for n in ("another_speaker", "reversed", "background")), *said[3:]]
    pairs = {pair.name: pair for pair in salmon_pairs(out / "salmon")}
    assert len(pairs) == 36
    for task in ("another_speaker", "reversed", "background"):
        right, wrong = (read(side.sound.path) for side in (pairs[f"{task} 0"].positive, pairs[f"{task} 0"].negative))
        assert len(right) == len(wrong) == 2 * RATE
        if task != "reversed":
            early, late = slice(RATE - 300), slice(RATE + 300, None)
            assert np.abs(right[early] - wrong[early]).max() < 1e-4
            assert np.abs(right[late] - wrong[late]).max() > 0.01
        else:
            assert wrong.tolist() == right[::-1].tolist()
    words = language_pairs(out / "swuggy", "words")
    assert len(words) == 8  # "nine" has one syllable, "press two" is two words
    assert all("_correct_" in pair.positive.sound.path for pair in words)
    recordings = listed(out / "asr")
    assert sorted({one.text for one in recordings}) == ["November.", "nine", "press two", "yesterday"]
    with pytest.raises(SodaError, match="is there already"):
        main(tmp_path / "run", out)


FAKE = """
import json, os, pathlib, sys
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "run" and os.environ["HF_HUB_OFFLINE"] == "1", sys.argv
out = pathlib.Path(options["--output_path"]) / "model"
out.mkdir()
shots = {options["--tasks"]: int(options["--num_fewshot"])}
found = {"results": {options["--tasks"]: {"acc,none": 0.5}}, "n-shot": shots, "model": options["--model_args"]}
(out / "results_1.json").write_text(json.dumps(found))
"""


def test_text_benchmarks(tmp_path):
    def script(*arguments: object, modules: Path | None = None) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(modules or tmp_path)}
        command = ["bash", str(EXAMPLES / "text.sh"), *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    model, folder, out = tmp_path / "hf", tmp_path / "folder", tmp_path / "out"
    model.mkdir()
    folder.mkdir()
    assert script().returncode == 2
    missing = script(model, folder, "mmlu", out)
    assert (missing.returncode, missing.stderr) == (2, f"error: {model}/config.json: is not there\n")
    (model / "config.json").write_text("{}")
    (tmp_path / "lm_eval.py").write_text("raise ImportError")
    assert "lm-eval is not installed: pip install 'megatron-soda[lm-eval]'" in script(model, folder, "mmlu", out).stderr
    package = tmp_path / "modules" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE)
    done = script(model, folder, "mmlu", out, "--num_fewshot", 5, modules=package.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "text.json").read_text())
    assert found["n-shot"] == {"mmlu": 5}
    assert found["results"]["mmlu"] == {"acc,none": 0.5}
    assert f"pretrained={model},dtype=float32,add_bos_token=True --tasks mmlu" in found["command"]
