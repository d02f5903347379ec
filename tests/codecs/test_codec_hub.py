"""Mimi, EnCodec and DAC: the same codes in any batch, chunk and number of codebooks, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DacConfig, DacModel, DynamicCache, EncodecConfig, EncodecModel, MimiConfig, MimiModel

from megatron_soda.codecs import load_codec
from megatron_soda.codecs.dac import DacCodec
from megatron_soda.codecs.encodec import EncodecCodec
from megatron_soda.codecs.hub import HubCodec, rounded_up
from megatron_soda.codecs.mimi import MimiCodec
from megatron_soda.errors import SodaError
from tests.codecs.test_codecs import (  # noqa: F401  fixtures
    dac_folder,
    encodec_folder,
    mimi_folder,
    one_thread,
    spread_codes,
    tiny_dac,
    tiny_encodec,
    tiny_mimi,
    voice,
)

CLASSES: dict[str, type[HubCodec]] = {"mimi": MimiCodec, "encodec": EncodecCodec, "dac": DacCodec}
RATE = 24_000
EQUAL = 0.999  # of the codes. Rounding differs with the shape of a batch, and now and then two entries are as near


@pytest.fixture(params=CLASSES)
def folder(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"{request.param}_folder")


def codec_of(folder: str | Path, codebooks: int | None = None, **settings: Any) -> HubCodec:
    model_type = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    return CLASSES[model_type](str(folder), codebooks, **settings)


def mixed_waves(seconds: tuple[float, ...] = (1.3, 0.01, 2.9, 0.08, 0.5, 2.2, 0.0, 2.9, 4.6)) -> list[np.ndarray]:
    return [voice(s + 0.001, i)[: int(s * RATE)] for i, s in enumerate(seconds)]


def equal_share(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    assert [x.shape for x in a] == [x.shape for x in b]
    return float(np.concatenate([(x == y).ravel() for x, y in zip(a, b, strict=True)]).mean())


def whole_frames(codec: HubCodec, wave: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.pad(wave, (0, -len(wave) % codec.samples_per_frame)))[None, None]


# ---- batches


def test_alone_is_the_model_called_by_hand(folder):
    codec = codec_of(folder)
    model = codec._model
    wave = voice(1.33, 5)
    with torch.inference_mode():
        sound = whole_frames(codec, wave)
        if codec.name == "mimi":
            codes = model.encode(sound, num_quantizers=8).audio_codes[0]
        elif codec.name == "encodec":
            codes = model.encode(sound, bandwidth=4.0).audio_codes[0, 0]
        else:
            codes = model.encode(sound).audio_codes[0]
    np.testing.assert_array_equal(codec.encode([wave])[0], codes.T.numpy())
    assert len(np.unique(codes)) > 30


def test_batches_give_the_codes_of_waves_alone(folder):
    waves = mixed_waves()
    alone, batched = codec_of(folder, batch_seconds=0).encode(waves), codec_of(folder, batch_seconds=240).encode(waves)
    assert equal_share(alone, batched) >= EQUAL
    assert equal_share(alone, codec_of(folder).encode(waves)) == 1.0  # a CPU uses no batches


def test_what_else_is_in_the_list_changes_nothing(folder):
    """Exactly, also in batches: their shapes do not tell how many waves there are."""
    codec = codec_of(folder, batch_seconds=240)
    waves = mixed_waves()
    together = codec.encode(waves)
    for some in ([0], [4], [8, 5], [2, 7, 0, 3], list(range(9))[::-1], [2] * 9):
        for one, i in zip(codec.encode([waves[i] for i in some]), some, strict=True):
            np.testing.assert_array_equal(one, together[i])


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(0, 5000), batch_seconds=st.sampled_from([0.0, 1.0, 30.0, 240.0]))
@example(frames=6, batch_seconds=240.0)
@example(frames=150, batch_seconds=240.0)
@example(frames=151, batch_seconds=240.0)
def test_pieces_cover_every_frame_once(hub_codecs, frames, batch_seconds):
    for codec in hub_codecs:
        codec._batch_seconds = batch_seconds
        pieces = codec._pieces(3, frames)
        kept = [p.start + i for p in pieces for i in range(p.keep.start, p.keep.stop)]
        assert kept == list(range(frames))
        for piece in pieces:
            assert piece.wave == 3
            assert piece.start >= 0
            assert 0 <= piece.keep.start < piece.keep.stop <= piece.frames
            seconds = piece.rows * piece.frames * codec.samples_per_frame / RATE
            assert piece.rows == 1 or (batch_seconds and seconds <= batch_seconds)
            if not batch_seconds or codec.name == "dac":
                assert piece.start + piece.frames <= frames  # no silence where it would be heard
            if codec.name == "dac":
                assert piece.keep.start >= 8 or piece.start == 0
                assert piece.frames - piece.keep.stop >= 8 or piece.start + piece.frames == frames


@pytest.fixture(scope="module")
def hub_codecs(mimi_folder, encodec_folder, dac_folder) -> list[HubCodec]:  # noqa: F811
    return [codec_of(folder) for folder in (mimi_folder, encodec_folder, dac_folder)]


def test_lengths_are_rounded_up_to_a_few():
    rounded = [rounded_up(n) for n in range(1, 4000)]
    assert all(n <= r <= 1.5 * n for n, r in enumerate(rounded, 1))
    assert rounded == sorted(rounded)
    assert len(set(rounded)) < 26


@torch.inference_mode()
def latents(codec: HubCodec, sound: torch.Tensor) -> torch.Tensor:
    """What is quantised: (dimensions, frames)."""
    found = codec._model.encoder(sound)
    return (found.latents if codec.name == "mimi" else found)[0]


def test_silence_after_a_wave_changes_nothing_before_it(mimi_folder, encodec_folder):  # noqa: F811
    for codec, shortest in ((codec_of(mimi_folder), 1), (codec_of(encodec_folder), 7)):
        assert codec._shortest_padded() == shortest
        for frames in (shortest, shortest + 1, 40):
            wave = torch.from_numpy(voice(5.0, 9)[20_000:][: frames * codec.samples_per_frame])[None, None]
            padded = torch.nn.functional.pad(wave, (0, 30 * codec.samples_per_frame))
            torch.testing.assert_close(latents(codec, padded)[:, :frames], latents(codec, wave), atol=2e-4, rtol=1e-3)
    # EnCodec's reflection on the left: with a frame fewer the library pads with zeros in place of the silence's states
    wave = torch.from_numpy(voice(5.0, 9)[20_000:][: 6 * 320])[None, None]
    padded = torch.nn.functional.pad(wave, (0, 30 * 320))
    assert (latents(codec, padded)[:, :6] - latents(codec, wave)).abs().max() > 1e-2


# ---- chunks


@pytest.fixture(scope="module")
def short_window(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mimi whose attention weighs much and sees 20 steps, 10 frames."""
    folder = tmp_path_factory.mktemp("window")
    tiny_mimi(sliding_window=20, layer_scale_initial_scale=1.0).save_pretrained(folder)
    return folder


def test_mimi_streaming_gives_the_codes_of_the_whole(short_window):
    codec = codec_of(short_window)
    sound = whole_frames(codec, voice(5.6, 11))
    (whole,) = codec.encode([sound[0, 0].numpy()])
    assert len(whole) == 70  # seven windows
    cache, padding, parts = DynamicCache(config=codec._model.config), None, []
    with torch.inference_mode():
        for chunk in sound.split(7 * codec.samples_per_frame, dim=-1):
            out = codec._model.encode(
                chunk, num_quantizers=8, encoder_cache=cache, padding_cache=padding, use_streaming=True
            )
            cache, padding = out.encoder_cache, out.padding_cache
            parts.append(out.audio_codes[0].T.numpy())
    assert equal_share([np.concatenate(parts)], [whole]) >= EQUAL


def test_mimi_sees_no_further_than_its_window(short_window, tmp_path):
    """One layer sees 20 steps; a step and the down-sampling see some frames of sound. The rest cannot matter."""
    sound = torch.from_numpy(voice(4.0, 12))[None, None]
    other = sound.clone()
    other[..., : 4 * 1920] = -sound[..., : 4 * 1920].roll(777)
    tiny_mimi(sliding_window=1000, layer_scale_initial_scale=1.0).save_pretrained(tmp_path)
    narrow, wide = (
        (latents(c, sound) - latents(c, other)).abs().amax(0) for c in map(codec_of, (short_window, tmp_path))
    )
    assert narrow[:4].min() > 0.01
    assert narrow[4 + 10 + 3 :].max() == 0
    assert wide[4 + 10 + 3 :].min() > 1e-5


def test_encodec_is_used_without_chunks(encodec_folder, tmp_path):  # noqa: F811
    shutil.copytree(encodec_folder, tmp_path / "chunks")
    path = tmp_path / "chunks" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunk_length_s": 1.0, "overlap": 0.01}))
    chunks, whole = codec_of(path.parent), codec_of(encodec_folder)
    wave = voice(2.5, 3)
    np.testing.assert_array_equal(chunks.encode([wave])[0], whole.encode([wave])[0])
    codes = whole.encode([wave])
    np.testing.assert_array_equal(chunks.decode(codes)[0], whole.decode(codes)[0])
    assert chunks.fingerprint == whole.fingerprint


def test_dac_cut_with_context_gives_the_codes_of_the_whole(dac_folder):  # noqa: F811
    codec = codec_of(dac_folder)
    assert isinstance(codec, DacCodec)
    context = codec._context()
    assert context == 8
    sound = whole_frames(codec, voice(2.0, 4))
    whole = codec.encode([sound[0, 0].numpy()])[0]
    cut = sound[0, 0, (50 - context) * 320 : (90 + context) * 320].numpy()
    assert equal_share([codec.encode([cut])[0][context:-context]], [whole[50:90]]) >= EQUAL
    for near, changed in ((context, False), (context - 3, True)):  # the outermost weights of all count for nothing
        for where in (slice(0, (70 - near) * 320), slice((71 + near) * 320, None)):
            other = sound.clone()
            other[..., where] *= -1
            difference = (latents(codec, other) - latents(codec, sound))[:, 70].abs().max()
            assert (difference > 0) == changed


@pytest.mark.parametrize(
    ("rate", "strides", "hop"), [(16_000, (2, 4, 5, 8), 320), (24_000, (2, 4, 5, 8), 320), (44_100, (2, 4, 8, 8), 512)]
)
def test_dac_of_every_rate(tmp_path, rate, strides, hop):
    tiny_dac(sampling_rate=rate, downsampling_ratios=list(strides), n_codebooks=9).save_pretrained(tmp_path)
    codec = codec_of(tmp_path)
    assert (codec.sample_rate, codec.samples_per_frame, codec.codebooks) == (rate, hop, 9)
    for samples in (1, hop - 1, hop, hop + 1, 10 * hop + 7):
        (codes,) = codec.encode([voice(1.0, 1)[:samples]])
        assert codes.shape == (math.ceil(samples / hop), 9)
        (wave,) = codec.decode([codes])
        assert wave.shape == (len(codes) * hop,)
    batched = codec_of(tmp_path, batch_seconds=240)
    waves = [voice(5.0, 1), voice(2.1, 2)]
    assert equal_share(codec.encode(waves), batched.encode(waves)) >= EQUAL


# ---- codebooks and settings


def test_fewer_codebooks_are_the_first_of_more(folder):
    most = {"mimi": 10, "encodec": 32, "dac": 8}[codec_of(folder).name]
    wave = voice(1.0, 4)
    (all_codes,) = codec_of(folder, most).encode([wave])
    assert all_codes.shape[1] == most
    seen = set()
    for n in (1, 2, 3, 5, 7, 8, most):
        codec = codec_of(folder, n)
        (codes,) = codec.encode([wave])
        np.testing.assert_array_equal(codes, all_codes[:, :n])
        assert len(codec.decode([codes])[0]) == len(codes) * codec.samples_per_frame
        seen.add(codec.fingerprint)
    assert len(seen) == len({1, 2, 3, 5, 7, 8, most})
    for n in (0, -1, most + 1):
        with pytest.raises(SodaError, match=f"has {most} codebooks, {n} were asked for"):
            codec_of(folder, n)


def test_samples_of_a_frame_are_the_product_of_the_strides(folder):
    codec = codec_of(folder)
    layers = [m for m in codec._model.encoder.modules() if isinstance(m, torch.nn.Conv1d)]
    assert math.prod(layer.stride[0] for layer in layers) == codec.samples_per_frame


def test_fingerprint(folder, tmp_path):
    codec = codec_of(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert codec.fingerprint == codec_of(tmp_path / "copy").fingerprint == load_codec(codec.name, folder).fingerprint
    assert codec.fingerprint != codec_of(folder, batch_seconds=240).fingerprint
    path = tmp_path / "copy" / "config.json"
    changes = {"mimi": {"sliding_window": 9}, "encodec": {"pad_mode": "constant"}, "dac": {"sampling_rate": 22_050}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes[codec.name]))
    assert codec_of(path.parent).fingerprint != codec.fingerprint
    with torch.no_grad():
        next(codec._model.parameters()).mul_(1.001)
    assert codec._fingerprint() != codec.fingerprint


# ---- refusals


def test_folders_that_are_no_model_are_refused(folder, tmp_path):
    name = codec_of(folder).name
    title = CLASSES[name].title
    with pytest.raises(SodaError, match="local folder with " + title):
        load_codec(name, tmp_path)
    with pytest.raises(SodaError, match="is not a local folder and"):
        load_codec(name, tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SodaError, match=f"'gpt2', not {title}"):
        load_codec(name, tmp_path)
    config = json.loads((Path(folder) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SodaError, match="codec: embedded"):
        load_codec(name, tmp_path)  # no weights
    torch.save(codec_of(folder)._model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SodaError, match="could not be loaded"):
        load_codec(name, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"hello, this is no such file")
    with pytest.raises(SodaError, match="could not be loaded"):
        load_codec(name, tmp_path)
    shutil.copy(Path(folder) / "model.safetensors", tmp_path)
    load_codec(name, tmp_path)
    deeper = {"mimi": {"num_hidden_layers": 2}, "encodec": {"num_lstm_layers": 3}, "dac": {"n_codebooks": 12}}[name]
    (tmp_path / "config.json").write_text(json.dumps(config | deeper))
    with pytest.raises(SodaError, match="lacks weights such as"):
        load_codec(name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"codebook_size": 32}))
    with pytest.raises(SodaError, match=r"has shape \(64,.* it is \(32,"):
        load_codec(name, tmp_path)


def test_encodec_of_stereo_or_normalised_sound_is_refused(tmp_path):
    small: dict[str, Any] = dict(num_filters=4, hidden_size=16)
    stereo = dict(audio_channels=2, norm_type="time_group_norm", use_causal_conv=False)
    for changes, what in ((stereo, "2 channels"), (dict(normalize=True), "normalises loudness")):
        EncodecModel(EncodecConfig(**small, **changes)).save_pretrained(tmp_path)
        with pytest.raises(SodaError, match=what):
            load_codec("encodec", tmp_path)


def test_encodec_that_looks_ahead_is_never_padded(tmp_path):
    tiny_encodec(use_causal_conv=False).save_pretrained(tmp_path)
    waves = mixed_waves()
    one, many = codec_of(tmp_path), codec_of(tmp_path, batch_seconds=240)
    assert many._shortest_padded() is None
    assert equal_share(one.encode(waves), many.encode(waves)) == 1.0


def test_devices_that_are_not_there_are_refused(folder):
    with pytest.raises(SodaError, match="device 'gpu' cannot be used"):
        codec_of(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(SodaError, match="Take device cpu"):
            load_codec(codec_of(folder).name, folder, device="cuda")


# ---- the real sizes


@pytest.mark.full
@pytest.mark.parametrize("name", CLASSES)
def test_the_sizes_of_the_released_models(name, tmp_path):
    """Random weights in the shape of kyutai/mimi, facebook/encodec_24khz and descript/dac_24khz."""
    torch.manual_seed(0)
    if name == "dac":
        config = DacConfig(downsampling_ratios=[2, 4, 5, 8], n_codebooks=32, hidden_size=1024, sampling_rate=RATE)
        model: Any = DacModel(config)
    else:
        model = MimiModel(MimiConfig()) if name == "mimi" else EncodecModel(EncodecConfig())
        spread_codes(cast(Any, model))
    model.save_pretrained(tmp_path)
    del model
    codec = codec_of(tmp_path)
    shape = {"mimi": (1920, 8, 2048), "encodec": (320, 8, 1024), "dac": (320, 32, 1024)}[name]
    assert (codec.samples_per_frame, codec.codebooks, codec.entries) == shape
    waves = mixed_waves((0.9, 0.3, 0.07))
    codes = codec.encode(waves)
    assert [len(c) for c in codes] == [math.ceil(len(w) / shape[0]) for w in waves]
    assert [len(w) for w in codec.decode(codes[1:])] == [len(c) * shape[0] for c in codes[1:]]
    codec._batch_seconds = 2.0
    assert equal_share(codes, codec.encode(waves)) >= EQUAL
