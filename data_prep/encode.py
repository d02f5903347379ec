"""The second stage: encodes sound, shard by shard. A unit shard whose key has not changed is never redone."""

import functools
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_soda.audio import dali
from megatron_soda.audio.reading import read_pieces
from megatron_soda.audio.sound import BadAudio, Sound
from megatron_soda.codecs import load_codec
from megatron_soda.codecs.base import Codec
from megatron_soda.codecs.description import CodecDescription
from megatron_soda.data.units import unit_key, write_units
from megatron_soda.errors import SodaError
from megatron_soda.files import write_json

from . import executor
from .index import Shard, digest, read_index

SECONDS_AT_ONCE = 300.0  # of audio in memory, on top of what is being decoded
SECONDS_FOR_A_GPU = 600.0  # a part of a shard, so that the next is decoded meanwhile; enough to fill batches by length
MOST_DECODERS = 8  # threads beside a codec on a GPU
IN_FLIGHT = 32  # recordings that they decode at once, a piece of each ahead

Item = TypeVar("Item")


@dataclass(frozen=True)
class EncodeJob:
    """A shard of sound and everything its codes depend on. `key` is a hash of all that and is stored in the unit shard
    `out`."""

    shard: Shard
    codec: CodecDescription
    decoder: str  # prepare.decoder
    trim: bool
    out: Path
    key: str


def encode_jobs(
    shards: list[Shard], folder: Path, codec: CodecDescription, *, decoder: str, trim: bool
) -> list[EncodeJob]:
    """One job per shard: FOLDER/part-NUMBER.parquet."""

    def job(shard: Shard) -> EncodeJob:
        key = digest(shard.key, codec.fingerprint, {"decoder": decoder, "trim": trim})
        return EncodeJob(shard, codec, decoder, trim, folder / f"part-{shard.number:06d}.parquet", key)

    return [job(shard) for shard in shards]


def is_done(job: EncodeJob) -> bool:
    return unit_key(job.out) == job.key


def encode_shard(job: EncodeJob) -> int:
    """Writes part-NUMBER.rejects.json, then the unit shard. Returns how many of its utterances were rejected."""
    codec = _codec(json.dumps(job.codec.arguments, sort_keys=True), executor.device)
    utterances = [utterance for utterance, _ in read_index(job.shard)]
    encoder = _Encoder(codec, SECONDS_AT_ONCE if executor.device == "cpu" else SECONDS_FOR_A_GPU)
    rejects, seconds = [], dict[int, float]()
    numbers: dict[Sound, list[int]] = {}  # a pair of translations repeats the sounds of others
    for number, u in enumerate(utterances):
        numbers.setdefault(u.audio, []).append(number)
    sounds = [sound for sound in numbers if sound.path]
    for place, pieces in _decoded(sounds, codec, job):
        try:
            samples = 0
            for piece in pieces:
                samples += len(piece)
                encoder.add(place, piece)
            seconds |= dict.fromkeys(numbers[sounds[place]], samples / codec.sample_rate)
        except BadAudio as error:
            encoder.drop(place)
            rejects += [(str(sounds[place]), str(error))] * len(numbers[sounds[place]])
    found, silent = encoder.finish(), np.zeros((0, codec.codebooks), np.int16)
    codes = {number: found[place] for place, sound in enumerate(sounds) for number in numbers[sound] if place in found}
    seconds |= {number: 0.0 for number, u in enumerate(utterances) if not u.heard}
    rows = [
        {
            "id": u.id,
            "codes": codes.get(number, silent),
            "text": u.text,
            "language": u.language,
            "speaker": u.speaker,
            "prompt": u.prompt,
            "recording": u.recording,
            "seconds": seconds[number],
            "audio": str(u.audio).encode("utf-8", "backslashreplace").decode(),
        }
        for number, u in enumerate(utterances)
        if number in seconds
    ]
    write_json(rejects_path(job.out), rejects)
    write_units(job.out, rows, codec=job.codec, key=job.key)
    return len(rejects)


def _decoded(sounds: list[Sound], codec: Codec, job: EncodeJob) -> Iterator[tuple[int, Iterable[np.ndarray]]]:
    """The pieces of each recording, by number. Iterating over those of a bad recording raises BadAudio."""
    shape, threads = (codec.sample_rate, codec.samples_per_frame), _decoders()
    check_decoder(job.decoder, gpu=executor.device != "cpu")
    if job.decoder == "soundfile":
        streams = (read_pieces(sound, *shape, trim=job.trim) for sound in sounds)
    else:
        on = executor.device if job.decoder == "dali_gpu" else ""
        decoder = dali.DaliDecoder(*shape, trim=job.trim, threads=max(1, threads), resample_on=on)
        batches = (decoder.decode(sounds[i : i + dali.BATCH]) for i in range(0, len(sounds), dali.BATCH))
        batches = chain.from_iterable(ahead([batches], min(1, threads)))  # one batch ahead
        streams = chain.from_iterable(batches)
    yield from enumerate(ahead(streams, threads))


def check_decoder(decoder: str, *, gpu: bool) -> None:
    """Raises SodaError if this prepare.decoder cannot be used here."""
    if decoder != "soundfile":
        dali.package()
    if decoder == "dali_gpu" and not gpu:
        raise SodaError("prepare.decoder=dali_gpu: there is no GPU to resample on. On a CPU soundfile is as fast")


def _decoders() -> int:
    """Threads that decode while the codec encodes. None on a CPU, whose cores all encode."""
    if executor.device == "cpu":
        return 0
    import torch

    return min(MOST_DECODERS, max(1, len(os.sched_getaffinity(0)) // torch.cuda.device_count()))


def ahead(streams: Iterable[Iterator[Item]], threads: int) -> Iterator[Iterator[Item]]:
    """The same streams and items in the same order, with an item of each of IN_FLIGHT streams taken ahead by the
    threads. A stream must be read to its end, or given up, before the next. No threads: the streams as they are."""
    if not threads:
        yield from streams
        return
    end: object = object()
    pool, waiting = ThreadPoolExecutor(threads), iter(streams)
    started: deque[tuple[Iterator[Item], Future]] = deque()

    def start(count: int) -> None:
        for stream in islice(waiting, count):
            started.append((stream, pool.submit(next, stream, end)))

    def items(stream: Iterator[Item], future: Future) -> Iterator[Item]:
        while (item := future.result()) is not end:
            future = pool.submit(next, stream, end)
            yield item

    try:
        start(IN_FLIGHT)
        while started:
            first = started.popleft()
            start(1)
            yield items(*first)
    finally:
        pool.shutdown(cancel_futures=True)


class _Encoder:
    """Encodes many pieces at a time and joins the codes of an utterance's pieces."""

    def __init__(self, codec: Codec, seconds_at_once: float) -> None:
        self._codec = codec
        self._most = seconds_at_once * codec.sample_rate  # samples
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._samples = 0
        self._codes: dict[int, list[np.ndarray]] = {}

    def add(self, number: int, piece: np.ndarray) -> None:
        self._waiting.append((number, piece))
        self._samples += len(piece)
        if self._samples > self._most:
            self._encode()

    def drop(self, number: int) -> None:
        self._waiting = [(n, piece) for n, piece in self._waiting if n != number]
        self._samples = sum(len(piece) for _, piece in self._waiting)
        self._codes.pop(number, None)

    def finish(self) -> dict[int, np.ndarray]:
        self._encode()
        return {number: np.concatenate(parts) for number, parts in self._codes.items()}

    def _encode(self) -> None:
        numbers, pieces = [n for n, _ in self._waiting], [piece for _, piece in self._waiting]
        for number, codes in zip(numbers, self._codec.encode(pieces) if pieces else [], strict=True):
            self._codes.setdefault(number, []).append(codes)
        self._waiting, self._samples = [], 0


@functools.lru_cache(maxsize=1)
def _codec(arguments: str, device: str) -> Codec:
    return load_codec(**json.loads(arguments), device=device)


def rejects_path(shard: Path) -> Path:
    return shard.with_suffix(".rejects.json")
