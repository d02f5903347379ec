"""Sound for a codec on a GPU is decoded ahead, in threads: what is written is the same. Also with DALI's fake."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data_prep import encode, executor
from data_prep.index import make_index
from data_prep.utterance import Utterance
from megatron_soda.audio.sound import Sound
from megatron_soda.codecs.description import CodecDescription
from megatron_soda.data.units import read_units
from megatron_soda.errors import SodaError
from tests.exported import RATE, FakeCodec
from tests.fakes import dali_fake

LENGTHS = 0.5, 130.0, 1.5, 0.7, 65.0, 1.1, 0.9, 2.0  # seconds; the second is three pieces


@pytest.fixture(scope="module")
def utterances(tmp_path_factory) -> list[Utterance]:
    """In files of their own, except the last two: those of one recording. Two are bad, one of these at its end."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    sounds = []
    for i, seconds in enumerate(LENGTHS):
        path = folder / f"{i}.wav"
        soundfile.write(path, rng.uniform(-0.1 - 0.02 * i, 0.1 + 0.02 * i, round(seconds * RATE)), RATE)
        sounds.append(Sound(str(path), seconds=90.0 if i == 4 else 0.0))  # the manifest is wrong about it
    (folder / "3.wav").write_bytes(b"no sound")
    sounds += [Sound(sounds[1].path, start=float(i), end=i + 0.8) for i in range(2)]
    return [Utterance(str(i), sound, "text") for i, sound in enumerate(sounds)]


def made(utterances: list[Utterance], folder: Path, decoder: str) -> encode.EncodeJob:
    index = make_index(iter(utterances), folder / "index", shard_size=99, reject=lambda one: pytest.fail(str(one)))
    codec = CodecDescription.of(FakeCodec(), {"spec": "embedded", "path": "."})
    (job,) = encode.encode_jobs(index.shards, folder, codec, decoder=decoder, trim=False)
    return job


def written(utterances: list[Utterance], folder: Path) -> list[bytes]:
    job = made(utterances, folder, "soundfile")
    assert encode.encode_shard(job) == 2
    return [job.out.read_bytes(), encode.rejects_path(job.out).read_bytes()]


def test_decoding_ahead_changes_no_byte(utterances, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "load_codec", lambda **_: FakeCodec())
    monkeypatch.setattr(encode, "SECONDS_AT_ONCE", 100.0)
    encode._codec.cache_clear()
    alone = written(utterances, tmp_path / "alone")
    monkeypatch.setattr(encode, "_decoders", lambda: 3)
    monkeypatch.setattr(encode, "IN_FLIGHT", 4)
    assert written(utterances, tmp_path / "ahead") == alone
    encode._codec.cache_clear()


def test_several_streams_are_in_flight(monkeypatch):
    monkeypatch.setattr(encode, "IN_FLIGHT", 4)
    together, begun = threading.Barrier(3, timeout=20), []

    def stream(number: int) -> Iterator[tuple[int, int]]:
        begun.append(number)
        if number < 3:
            together.wait()  # breaks unless three streams are read at once
        for item in range(3):
            if (number, item) == (5, 1):
                raise ValueError("of this stream alone")
            yield number, item

    found = []
    for number, items in enumerate(encode.ahead((stream(n) for n in range(9)), 3)):
        assert len(begun) <= number + 5  # no more than there is room for
        try:
            for item in items:
                found.append(item)
        except ValueError:
            assert number == 5
    assert found == [(n, item) for n in range(9) for item in range(3) if n != 5 or item == 0]


def test_who_decodes(monkeypatch):
    assert encode._decoders() == 0
    monkeypatch.setattr(executor, "device", "cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for cores, threads in ((1, 1), (8, 4), (96, encode.MOST_DECODERS)):
        monkeypatch.setattr(encode.os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        assert encode._decoders() == threads


def test_dali_resamples_on_the_codecs_gpu(utterances, tmp_path, monkeypatch):
    """The second of two. As soundfile and soxr do: the same codes, rows and reasons."""
    rng = np.random.default_rng(1)
    for i, rate in enumerate((4000, RATE, 6000) * 8):  # three batches, with the others
        soundfile.write(tmp_path / f"{i}.flac", rng.uniform(-0.2, 0.2, rng.integers(rate // 2, 3 * rate)), rate)
    nan = np.ones(RATE, np.float32)
    nan[7] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, 2 * RATE, subtype="FLOAT")
    more = [Utterance(path.name, Sound(str(path)), "text") for path in sorted(tmp_path.glob("*.*"))]
    monkeypatch.setattr(encode, "load_codec", lambda **_: FakeCodec())
    encode._codec.cache_clear()
    wanted = made(utterances + more, tmp_path / "soundfile", "soundfile")
    assert encode.encode_shard(wanted) == 3

    pretended, pipelines = dali_fake.modules()
    for name, module in pretended.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(executor, "device", "cuda:1")
    monkeypatch.setattr(encode, "_decoders", lambda: 3)
    job = made(utterances + more, tmp_path / "dali", "dali_gpu")
    assert encode.encode_shard(job) == 3
    assert encode.rejects_path(job.out).read_bytes() == encode.rejects_path(wanted.out).read_bytes()
    for found, expected in zip(read_units([job.out]), read_units([wanted.out]), strict=True):
        assert found | {"codes": found["codes"].tolist()} == expected | {"codes": expected["codes"].tolist()}
    decoding = [one for one in pipelines if not one.resampled_on]
    (resampling,) = (one for one in pipelines if one.resampled_on)
    assert {(one.num_threads, one.device_id) for one in decoding} == {(3, None)}
    assert (resampling.resampled_on, resampling.device_id) == (["gpu"], 1)
    encode._codec.cache_clear()


def test_dali_needs_its_package_and_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(SodaError, match=r"megatron-soda\[dali\]"):
        encode.check_decoder("dali_gpu", gpu=True)
    encode.check_decoder("soundfile", gpu=False)
    for name, module in dali_fake.modules()[0].items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(SodaError, match="no GPU"):
        encode.check_decoder("dali_gpu", gpu=False)
    encode.check_decoder("dali", gpu=False)
