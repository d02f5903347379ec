"""Sound for a codec on a GPU is decoded ahead, in threads: what is written is the same."""

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
from tests.exported import RATE, FakeCodec

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


def written(utterances: list[Utterance], folder: Path) -> list[bytes]:
    index = make_index(iter(utterances), folder / "index", shard_size=99, reject=lambda one: pytest.fail(str(one)))
    codec = CodecDescription.of(FakeCodec(), {"spec": "embedded", "path": "."})
    (job,) = encode.encode_jobs(index.shards, folder, codec, decoder="soundfile", trim=False)
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
