"""The codecs: shapes, independence of the batch, determinism, quality on synthetic voices, and refusals."""

import functools
import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

from megatron_soda.codecs import NAMES, load_codec
from megatron_soda.codecs.embedded import EmbeddedCodec
from megatron_soda.codecs.embedded_decoder import SHIPPED_WEIGHTS, pulse_train
from megatron_soda.codecs.embedded_quantiser import FRAMES_PER_ENTRY, nearest, stage_kinds
from megatron_soda.codecs.features import SAMPLE_RATE, analyse, mel_filterbank, smooth_spectrum
from megatron_soda.errors import SodaError

FRAME = 1920


def voice(seconds: float, seed: int) -> np.ndarray:
    return _voice(seconds, seed).copy()


@functools.lru_cache(256)
def _voice(seconds: float, seed: int) -> np.ndarray:
    """Synthetic speech: pulses with a moving F0 through two moving resonances, with hissing and silent stretches."""
    rng = np.random.default_rng(seed)
    n = int(seconds * SAMPLE_RATE)
    syllables = max(1, int(seconds * 4))
    places = np.linspace(0, n, syllables + 1)

    def contour(low: float, high: float) -> np.ndarray:
        return np.interp(np.arange(n), places, rng.uniform(low, high, syllables + 1))

    f0 = contour(90, 240)
    phase = np.cumsum(f0) / SAMPLE_RATE
    formants = contour(300, 900), contour(1000, 2400)
    wave = np.zeros(n)
    for k in range(1, 30):
        gain = sum(np.exp(-(((k * f0 - f) / 150) ** 2)) for f in formants) + 0.02
        wave += gain * np.sin(2 * np.pi * k * phase) * (k * f0 < 5000)
    kind = np.repeat(rng.choice(3, syllables, p=[0.6, 0.25, 0.15]), math.ceil(n / syllables))[:n]
    wave = np.where(kind == 0, wave, np.where(kind == 1, 0.4 * rng.standard_normal(n), 0.0))
    wave = np.convolve(wave, np.hanning(9) / 4, mode="same") + 1e-4 * rng.standard_normal(n)
    return (0.2 * wave).clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are small: where other work shares the cores, threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shipped() -> EmbeddedCodec:
    codec = load_codec("embedded")
    assert isinstance(codec, EmbeddedCodec)
    return codec


@pytest.fixture(scope="module")
def voices() -> list[np.ndarray]:
    return [voice(5.0, seed) for seed in range(16)]


@pytest.fixture(scope="module")
def fitted(voices: list[np.ndarray]) -> EmbeddedCodec:
    return EmbeddedCodec.fit(voices, codebooks=4, entries=256)


def tiny_mimi(**changes: Any) -> MimiModel:
    """A Mimi of Mimi's frame rate, with random weights and codebooks."""
    small = dict(hidden_size=32, num_filters=4, num_hidden_layers=1, intermediate_size=32, upsample_groups=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    books = dict(codebook_size=64, codebook_dim=16, vector_quantization_hidden_dimension=16, num_quantizers=10)
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(**{**small, **heads, **books, **changes}))
    spread_codes(model)
    return model


def tiny_encodec(**changes: Any) -> EncodecModel:
    """An EnCodec of the 24 kHz model's frame rate and codebooks, but for their 64 entries."""
    books = dict(codebook_size=64, target_bandwidths=[1.0, 2.0, 4.0, 7.5, 14.5])  # kbps of 2, 4, 8, 16 and 32 codebooks
    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig(**{**books, "num_filters": 4, "hidden_size": 16, **changes}))
    spread_codes(model)
    return model


def tiny_dac(**changes: Any) -> DacModel:
    """A DAC of the 24 kHz model's frame rate, with 8 codebooks."""
    small = dict(encoder_hidden_size=4, decoder_hidden_size=32, n_codebooks=8, codebook_size=64, codebook_dim=4)
    torch.manual_seed(0)
    return DacModel(DacConfig(**{**small, "downsampling_ratios": [2, 4, 5, 8], "sampling_rate": 24_000, **changes}))


@torch.inference_mode()
def spread_codes(model: MimiModel | EncodecModel) -> None:
    """Makes the codebooks, zero in a new model, such that speech-like sound uses many of their entries.

    Each has vectors as they reach it, with noise. EnCodec's own last layer is set to give vectors of mean 0 and
    variance 1, as a trained one does about: a new one gives a large constant, and float32 loses what is left.
    """
    wave = torch.from_numpy(voice(4.0, 77))[None, None]
    model.eval()
    if isinstance(model, EncodecModel):
        conv = cast(Any, model.encoder.layers[-1]).conv
        for _ in range(2):  # once for the scale, once for what is left of the mean
            found = model.encoder(wave)[0]
            conv.parametrizations.weight.original0.div_(found.std(1)[:, None, None])
            conv.bias.sub_(found.mean(1)).div_(found.std(1))
        stages = [(model.encoder(wave)[0].T, model.quantizer.layers)]
    else:
        latents, split = cast(Any, model.encoder)(wave).latents, model.quantizer
        halves: list[Any] = [split.semantic_residual_vector_quantizer, split.acoustic_residual_vector_quantizer]
        stages = [((q.input_proj(latents) if q.input_proj else latents)[0].T, q.layers) for q in halves]
    for residual, layers in stages:
        for layer in layers:
            book = cast(Any, layer).codebook
            drawn = residual[torch.randint(len(residual), (book.codebook_size,))]
            entries = drawn + 0.3 * residual.std(0) * torch.randn_like(drawn)
            (book.embed if isinstance(model, EncodecModel) else book.embed_sum).copy_(entries)
            residual = residual - entries[torch.cdist(residual, entries).argmin(1)]


@pytest.fixture(scope="module")
def mimi_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Mimi with random weights and codebooks, in a local folder."""
    folder = tmp_path_factory.mktemp("mimi")
    tiny_mimi().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encodec_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encodec")
    tiny_encodec().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dac_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dac")
    tiny_dac().save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=NAMES)
def codec(request: pytest.FixtureRequest):
    if request.param == "embedded":
        return request.getfixturevalue("shipped")
    return load_codec(request.param, request.getfixturevalue(f"{request.param}_folder"))


# ---- every codec


def test_token_shape(codec):
    frame = FRAME if codec.name in ("embedded", "mimi") else 320
    assert (codec.sample_rate, codec.samples_per_frame, codec.codebooks) == (24_000, frame, 8)
    assert codec.entries == (2048 if codec.name == "embedded" else 64)
    assert len(codec.fingerprint) == 16
    assert int(codec.fingerprint, 16) >= 0


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("frames", [0, 1, 2, 12])
def test_frames_are_rounded_up(codec, frames, extra):
    samples = max(0, frames * codec.samples_per_frame + extra)
    (codes,) = codec.encode([voice(1.0, 3)[:samples]])
    assert codes.shape == (math.ceil(samples / codec.samples_per_frame), 8)
    assert codes.dtype == np.int16
    (wave,) = codec.decode([codes])
    assert wave.shape == (len(codes) * codec.samples_per_frame,)
    assert wave.dtype == np.float32
    assert np.isfinite(wave).all()


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seconds=st.lists(st.floats(0, 1.5), max_size=4), seed=st.integers(0, 99))
@example(seconds=[1.3, 0.01, 2.9, 0.5, 2.9, 0.0], seed=0)
@example(seconds=[], seed=0)
def test_a_list_gives_what_its_members_give(codec, seconds, seed):
    waves = [voice(3.0, (seed + i) % 8)[: int(s * SAMPLE_RATE)] for i, s in enumerate(seconds)]
    together = codec.encode(waves)
    for one, wave in zip(together, waves, strict=True):
        np.testing.assert_array_equal(one, codec.encode([wave])[0])
    for one, codes in zip(codec.decode(together), together, strict=True):
        np.testing.assert_array_equal(one, codec.decode([codes])[0])


def test_embedded_codec_gives_the_same_with_more_threads(shipped):
    wave = voice(2.0, 6)
    one = shipped.encode([wave])[0]
    decoded = shipped.decode([one])[0]
    torch.set_num_threads(2)
    try:
        np.testing.assert_array_equal(shipped.encode([wave])[0], one)
        np.testing.assert_array_equal(shipped.decode([one])[0], decoded)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_codes_tell_waves_apart(codec):
    first, second = codec.encode([voice(2.0, 1), voice(2.0, 2)])
    assert (first != second).mean() > 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(codec, bad):
    wave = voice(0.5, 0)
    wave[777] = bad
    with pytest.raises(SodaError, match="finite"):
        codec.encode([voice(0.5, 1), wave])


def test_wrong_shapes_and_ranges_are_refused(codec):
    with pytest.raises(SodaError, match="mono"):
        codec.encode([np.zeros((2, 100), dtype=np.float32)])
    with pytest.raises(SodaError, match="float32"):
        codec.encode([np.zeros(100, dtype=np.int16)])
    with pytest.raises(SodaError, match="frames, 8"):
        codec.decode([np.zeros((3, 7), dtype=np.int16)])
    with pytest.raises(SodaError, match=f"{codec.entries - 1}"):
        codec.decode([np.full((3, 8), codec.entries, dtype=np.int64)])
    with pytest.raises(SodaError):
        codec.decode([np.full((3, 8), -1, dtype=np.int16)])


def test_unknown_codec_names_the_nearest():
    with pytest.raises(SodaError, match="'embedded'"):
        load_codec("embeded")
    with pytest.raises(SodaError, match="'mimi'"):
        load_codec("Mimi2")
    with pytest.raises(SodaError, match="'encodec'"):
        load_codec("encodec_24khz")


# ---- the embedded codec


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(0, 9000),
    kind=st.sampled_from(["silence", "noise", "loud", "impulse", "constant", "tone"]),
    seed=st.integers(0, 99),
)
def test_any_finite_wave_survives(shipped, samples, kind, seed):
    rng = np.random.default_rng(seed)
    wave = {
        "silence": np.zeros(samples),
        "noise": rng.standard_normal(samples),
        "loud": 1e30 * rng.standard_normal(samples),
        "impulse": np.eye(1, samples, samples // 2)[0] if samples else np.zeros(0),
        "constant": np.full(samples, 0.7),
        "tone": np.sin(np.arange(samples) * rng.uniform(0, np.pi)),
    }[kind].astype(np.float32)
    (codes,) = shipped.encode([wave])
    assert codes.shape == (math.ceil(samples / FRAME), 8)
    assert codes.size == 0 or (codes.min() >= 0 and codes.max() < 2048)
    (decoded,) = shipped.decode([codes])
    assert np.isfinite(decoded).all()
    assert decoded.size == 0 or np.abs(decoded).max() <= 1


def test_silence_stays_quiet_and_loudness_is_kept(shipped):
    speech = voice(3.0, 5)
    originals = [np.zeros(24_000, dtype=np.float32), 0.1 * speech, 0.4 * speech]  # rms of 35 and 23 dB below full scale
    silent, quiet, loud = shipped.decode(shipped.encode(originals))
    assert np.abs(silent).max() < 0.01
    for wave, original in ((quiet, originals[1]), (loud, originals[2])):
        assert abs(20 * np.log10(wave.std() / original.std())) < 3  # dB


def log_mel(wave: np.ndarray) -> np.ndarray:
    spectrum = torch.stft(torch.from_numpy(wave), 1024, 480, window=torch.hann_window(1024), return_complex=True).abs()
    return torch.log(mel_filterbank(1024, 40)[:28] @ spectrum + 1e-2).numpy()  # up to about 6 kHz


def envelope_correlation(codec: EmbeddedCodec, codes: list[np.ndarray], waves: list[np.ndarray]) -> float:
    decoded = codec.decode(codes)
    pairs = [(log_mel(d[: len(w)]).ravel(), log_mel(w).ravel()) for d, w in zip(decoded, waves, strict=True)]
    a, b = (np.concatenate(x) for x in zip(*pairs, strict=True))
    return float(np.corrcoef(a, b)[0, 1])


def test_decoded_sound_resembles_the_original(fitted):
    unseen = [voice(4.0, seed) for seed in (101, 102)]
    codes = fitted.encode(unseen)
    good = envelope_correlation(fitted, codes, unseen)
    rng = np.random.default_rng(0)
    shuffled = envelope_correlation(fitted, [rng.permutation(c) for c in codes], unseen)
    without_residual = [np.where(np.arange(4) == 3, rng.integers(0, 256, c.shape), c).astype(np.int16) for c in codes]
    assert good > 0.9
    assert shuffled < good - 0.2
    assert envelope_correlation(fitted, without_residual, unseen) < good - 0.01


def test_shipped_quantiser_resembles_an_unseen_synthetic_voice(shipped):
    unseen = [voice(4.0, 103)]
    assert envelope_correlation(shipped, shipped.encode(unseen), unseen) > 0.8


def test_decoding_depends_on_nothing_but_the_codes(shipped):
    codes = shipped.encode([voice(1.0, 8)])
    first = shipped.decode(codes)[0]
    torch.manual_seed(99)
    np.testing.assert_array_equal(first, EmbeddedCodec.load().decode(codes)[0])


def test_fit_save_load(fitted, shipped, voices, tmp_path):
    assert (fitted.codebooks, fitted.entries) == (4, 256)
    path = tmp_path / "run" / "codec.safetensors"
    fitted.save(path)
    unseen = [voice(2.0, 50), voice(1.1, 51)]
    codes = fitted.encode(unseen)
    for where in (path, path.parent, str(path)):
        loaded = load_codec("embedded", where)
        assert loaded.fingerprint == fitted.fingerprint
        for a, b in zip(loaded.encode(unseen), codes, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(loaded.decode(codes)[0], fitted.decode(codes)[0])
    assert set(np.unique(np.concatenate(codes))) <= set(range(256))
    assert fitted.fingerprint != shipped.fingerprint
    again = EmbeddedCodec.fit(voices, codebooks=4, entries=256)
    assert again.fingerprint == fitted.fingerprint
    other = EmbeddedCodec.fit(voices, codebooks=4, entries=256, seed=1)
    assert other.fingerprint != fitted.fingerprint


@pytest.mark.parametrize(("codebooks", "entries"), [(1, 32), (2, 32), (3, 64), (12, 16)])
def test_other_shapes(voices, codebooks, entries):
    shares: list[float] = []
    codec = EmbeddedCodec.fit(
        voices[:6], codebooks=codebooks, entries=entries, progress=lambda share, text: shares.append(share)
    )
    (codes,) = codec.encode([voices[7]])
    assert codes.shape == (math.ceil(len(voices[7]) / FRAME), codebooks)
    assert codes.max() < entries
    assert len(np.unique(codes[:, 0])) > 4
    assert len(codec.decode([codes])[0]) == len(codes) * FRAME
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_stage_kinds():
    assert stage_kinds(1) == ["envelope"]
    assert stage_kinds(2) == ["envelope", "prosody"]
    assert stage_kinds(8) == ["envelope", "prosody", "prosody"] + ["envelope"] * 5


def test_too_little_audio_says_how_much_is_needed():
    needed = FRAMES_PER_ENTRY * 2048 * 0.08
    with pytest.raises(SodaError, match=f"10 s of audio .* {needed:.0f} s are needed"):
        EmbeddedCodec.fit([voice(10.0, 0)])
    with pytest.raises(SodaError, match="entries"):
        EmbeddedCodec.fit([voice(10.0, 0)], entries=40_000)


def test_weights_file_is_small_and_float16():
    assert SHIPPED_WEIGHTS.stat().st_size < 10e6
    assert {t.dtype for t in load_file(SHIPPED_WEIGHTS).values()} == {torch.float16}


def test_files_that_are_no_quantiser_are_refused(tmp_path):
    with pytest.raises(SodaError, match="no such file"):
        load_codec("embedded", tmp_path / "missing.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    with pytest.raises(SodaError, match="not a readable"):
        load_codec("embedded", text)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(SodaError, match="not a quantiser"):
        load_codec("embedded", other)
    with pytest.raises(SodaError, match="8 codebooks, not 4"):
        load_codec("embedded", codebooks=4)


# ---- parts


def test_f0_and_voicing_of_a_known_sound():
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for f0 in (80.0, 150.0, 330.0):
        tone = sum(np.sin(2 * np.pi * k * f0 * time) / k for k in range(1, 20) if k * f0 < 11_000)
        (analysed,) = analyse([torch.tensor(0.1 * tone, dtype=torch.float32)])
        np.testing.assert_allclose(analysed.f0[5:-7].numpy(), f0, rtol=0.02)
        assert analysed.voicing[5:-7, 0].min() > 0.8
    noise = 0.1 * torch.randn(SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    assert analyse([noise])[0].voicing.mean() < 0.15


def test_smoothing_removes_the_harmonics():
    """A line spectrum of equal harmonics, averaged over exactly one F0, is flat."""
    power = torch.zeros(1, 1025)
    power[0, ::20] = 1.0
    smooth = smooth_spectrum(power, torch.tensor([20 * SAMPLE_RATE / 2048]))
    torch.testing.assert_close(smooth[0, 20:-20], torch.full((985,), 1 / 20))


def test_pulses_have_power_one_and_the_right_period():
    pulses = pulse_train(torch.full((1, 50), 200.0), 24_000)[0]
    assert pulses.square().mean() == pytest.approx(1.0, abs=0.05)
    torch.testing.assert_close(pulses[1000:2000], pulses[1120:2120], atol=0.05, rtol=0)


def test_nearest_is_the_brute_force_answer():
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(500, 7, generator=generator), torch.randn(40, 7, generator=generator)
    assert torch.equal(nearest(x, codebook, chunk=64), torch.cdist(x, codebook).argmin(1))
