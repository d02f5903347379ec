"""The real judges, where they are installed and their weights are at hand."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch

from megatron_soda.errors import SodaError
from megatron_soda.evaluation import words
from megatron_soda.evaluation.panel import Panel
from tests.evaluation.test_words import TEXT

pytestmark = pytest.mark.full
PROMPTS = Path("downloads/asterisk/en/usr/share/asterisk/sounds/en_US_f_Allison")
WHISPER = os.environ.get("SODA_WHISPER", "downloads/whisper-base")  # a folder in CTranslate2's format
RATE = 16_000


def need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed (docs/evaluation.md, judges)")


def prompt(name: str) -> np.ndarray:
    path = PROMPTS / f"{name}.g722"
    if not path.is_file():
        pytest.skip(f"{path} is not there (the quickstart downloads it)")
    from megatron_soda.audio.reading import read_audio

    return read_audio(path, RATE, 60.0)


def test_whisper_hears_the_same_alone_and_together(tmp_path):
    need("faster_whisper")
    if not (Path(WHISPER) / "model.bin").is_file():
        pytest.skip(f"{WHISPER}: no weights of Whisper (set SODA_WHISPER)")
    waves = [prompt(name) for name in ("conf-extended", "digits/20", "demo-echodone")]
    waves += [np.concatenate([prompt("conf-adminmenu-18"), prompt("basic-pbx-ivr-main")])]  # 47 s
    languages = ["en"] * len(waves)
    sounds = [lambda wave=wave: wave for wave in waves]
    together = Panel([f"whisper:{WHISPER}"], tmp_path / "a").judged(sounds, RATE, languages, "x")["whisper"]
    alone = Panel([f"whisper:{WHISPER}"], tmp_path / "b")
    assert together == [alone.judged([sound], RATE, ["en"], "x")["whisper"][0] for sound in sounds]
    heard = [words.authors_recognition(text, "en") for text in together]
    assert heard[0] == "the conference has been extended".split()
    assert heard[1] == ["20"]
    assert heard[2] == "the echo test has been completed".split()
    assert len(heard[3]) > 60
    with pytest.raises(SodaError, match=r"whisper: cannot load .*nothing.*evaluate\.judges=\[whisper:FOLDER\]"):
        Panel([f"whisper:{tmp_path}/nothing"], tmp_path)


def test_resemblyzer_tells_voices_apart(tmp_path):
    need("resemblyzer")
    mine = [prompt(name) for name in ("conf-extended", "demo-echodone")]
    higher = soxr.resample(mine[0], RATE, RATE * 0.7).astype(np.float32)  # another voice
    sounds = [lambda wave=wave: wave for wave in (*mine, higher, np.zeros(RATE, np.float32), mine[0][:100])]
    a, b, other, silent, short = Panel(["resemblyzer"], tmp_path).judged(sounds, RATE, [""] * 5, "x")["resemblyzer"]
    assert np.dot(a, b) > 0.7 > np.dot(a, other)
    assert silent is None
    assert short is None


def test_dnsmos_prefers_what_is_clean(tmp_path):
    need("speechmos")
    wave = prompt("demo-echodone")
    noisy = wave + 0.3 * np.std(wave) * np.random.default_rng(0).standard_normal(len(wave)).astype(np.float32)
    found = Panel(["dnsmos"], tmp_path).judged([lambda: wave, lambda: noisy], RATE, ["", ""], "x")["dnsmos"]
    assert 5 > found[0] > found[1] > 1


def test_wavlm_from_a_folder(tmp_path):
    """Of random weights: the embedding is the network's own, and a shorter batch changes nothing."""
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    convolutions = {
        "conv_dim": (16, 16),
        "conv_stride": (20, 16),
        "conv_kernel": (20, 16),
        "num_feat_extract_layers": 2,
    }
    tdnn = {"tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8}
    network = WavLMForXVector(WavLMConfig(**sizes, **convolutions, **tdnn, num_conv_pos_embeddings=16)).eval()
    network.save_pretrained(tmp_path / "m")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "m")
    waves = [np.random.default_rng(i).standard_normal(RATE + 999 * i).astype(np.float32) for i in range(3)]
    found = Panel([f"wavlm:{tmp_path / 'm'}"], tmp_path).judged([lambda w=w: w for w in waves], RATE, [""] * 3, "x")
    for wave, vector in zip(waves, found["wavlm"], strict=True):
        normal = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
        with torch.no_grad():
            expected = network(torch.tensor(normal[None])).embeddings[0].numpy()
        assert vector == pytest.approx(expected, rel=1e-4, abs=1e-5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SodaError, match="empty: not a WavLMForXVector"):
        Panel([f"wavlm:{tmp_path / 'empty'}"], tmp_path)


def test_whispers_normaliser(tmp_path):
    need("whisper_normalizer")
    assert words.whisper(TEXT, "en")[:2] == ["do", "not"]
    assert words.whisper("fifty-two colours", "en") == ["52", "colors"]
    assert words.whisper("¿Qué tal, niño?", "es") == ["qué", "tal", "niño"]


def test_word_errors_are_jiwers():
    jiwer = pytest.importorskip("jiwer", reason="jiwer is not installed")
    rng = np.random.default_rng(0)
    for _ in range(200):
        said, heard = ([str(n) for n in rng.integers(0, 5, rng.integers(1, 12))] for _ in range(2))
        measured = jiwer.process_words(" ".join(said), " ".join(heard))
        assert words.word_errors(said, heard) == measured.substitutions + measured.deletions + measured.insertions
