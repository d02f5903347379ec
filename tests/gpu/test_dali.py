"""DALI's resampler on a GPU, which decodes sound for a codec there (prepare.decoder=dali_gpu)."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from megatron_soda.audio.dali import DaliDecoder, Resampler
from megatron_soda.audio.reading import read_pieces
from megatron_soda.audio.sound import BadAudio, Sound
from tests.voices import voice

RATE, FRAME = 24_000, 1920

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not (importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")),
        reason="needs the package nvidia-dali-cuda130",
    ),
]


def device() -> str:
    return f"cuda:{torch.cuda.device_count() - 1}"


def test_as_on_the_cpu():
    rates = [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000, 192_000]
    for seconds in (0.001, 0.08, 3.0, 60.0):
        waves = [voice(i, seconds, rate) for i, rate in enumerate(rates)]
        expected = Resampler(RATE, "cpu")(waves, rates)
        for rate, found, wanted in zip(rates, Resampler(RATE, device())(waves, rates), expected, strict=True):
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0, err_msg=f"{seconds} s at {rate} Hz")


def test_files(tmp_path: Path):
    """A bad one harms no other, and is rejected for the same reason."""
    for i, rate in enumerate((8000, 16000, 24000, 44100, 48000) * 4):
        soundfile.write(tmp_path / f"{i:02}.flac", voice(i, 1.0 + i, rate), rate)
    nan = np.ones(RATE, np.float32)
    nan[7] = np.nan
    soundfile.write(tmp_path / "03a.wav", nan, 16000, subtype="FLOAT")
    (tmp_path / "04a.wav").write_bytes((tmp_path / "04.flac").read_bytes()[:999])
    sounds = [Sound(str(path)) for path in sorted(tmp_path.iterdir())]
    near = dict(zip(sounds, DaliDecoder(RATE, FRAME, resample_on="cpu").decode(sounds), strict=True))
    bad = 0
    for sound, pieces in zip(
        sounds, DaliDecoder(RATE, FRAME, threads=4, resample_on=device()).decode(sounds), strict=True
    ):
        try:
            wanted = np.concatenate(list(read_pieces(sound, RATE, FRAME)))
        except BadAudio as error:
            with pytest.raises(BadAudio, match=f"^{re.escape(str(error))}$"):
                list(pieces)
            bad += 1
        else:
            samples = np.concatenate(list(pieces))
            assert samples.shape == wanted.shape
            np.testing.assert_allclose(samples, np.concatenate(list(near[sound])), atol=1e-4, rtol=0)
    assert bad == 2
