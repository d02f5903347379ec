"""Audio files to unit shards, in worker processes, a shard at a time: what is written is never done again."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from megatron_soda.errors import SodaError
from megatron_soda.files import write_json

from .audio import BadAudio, read_audio
from .codecs import load_codec
from .codecs.base import Codec
from .units import write_units
from .utterance import Reject, Utterance

SHARD = 64  # utterances

_codec: Codec | None = None  # of a worker process


def encode_all(
    utterances: list[Utterance], folder: Path, codec_arguments: dict, workers: int, advance: Callable[[int], None]
) -> tuple[list[Path], list[Reject]]:
    """Encodes to FOLDER/part-*.parquet and returns the shards and what could not be used.

    Shards that are there already are kept. `advance(n)` is called as n more utterances are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for start in range(0, len(utterances), SHARD):
        path = folder / f"part-{start // SHARD:05d}.parquet"
        chunk = utterances[start : start + SHARD]
        if _rejects_path(path).is_file():  # written last
            advance(len(chunk))
        else:
            jobs.append((path, chunk))
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        _start_worker(codec_arguments, None)
        for job in jobs:
            _encode_shard(*job)
            advance(len(job[1]))
    else:
        _encode_parallel(jobs, workers, codec_arguments, advance)
    shards = sorted(folder.glob("part-*.parquet"))
    rejects = [Reject(*row) for path in shards for row in json.loads(_rejects_path(path).read_text("utf-8"))]
    return shards, rejects


def _encode_parallel(
    jobs: list[tuple[Path, list[Utterance]]], workers: int, codec_arguments: dict, advance: Callable[[int], None]
) -> None:
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(codec_arguments, 1)
    )
    try:
        running = {pool.submit(_encode_shard, *job): len(job[1]) for job in jobs}
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                advance(running.pop(future))
    except BrokenProcessPool:
        raise SodaError(
            "an encoding process died (out of memory?). What was encoded is kept: run the same command again, "
            "with a lower prepare.workers if it happens twice."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(codec_arguments: dict[str, Any], threads: int | None) -> None:
    global _codec
    if threads is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        import torch

        torch.set_num_threads(threads)
    _codec = load_codec(**codec_arguments)


def _encode_shard(path: Path, utterances: list[Utterance]) -> None:
    assert _codec is not None
    kept, waves, rejects = [], [], []
    for utterance in utterances:
        try:
            waves.append(read_audio(utterance.audio, _codec.sample_rate))
            kept.append(utterance)
        except BadAudio as error:
            rejects.append((str(utterance.audio), str(error)))
    rows = [
        {
            "id": u.id,
            "codes": codes,
            "text": u.text,
            "language": u.language,
            "speaker": u.speaker,
            "prompt": u.prompt,
            "seconds": len(wave) / _codec.sample_rate,
            "audio": str(u.audio),
        }
        for u, wave, codes in zip(kept, waves, _codec.encode(waves) if waves else [], strict=True)
    ]
    write_units(path, rows, codebooks=_codec.codebooks, fingerprint=_codec.fingerprint)
    write_json(_rejects_path(path), rejects)


def _rejects_path(shard: Path) -> Path:
    return shard.with_suffix(".rejects.json")


def forget_others(folder: Path) -> None:
    """Removes the shards of other settings, FOLDER's siblings."""
    for other in folder.parent.glob("*"):
        if other != folder and other.is_dir():
            shutil.rmtree(other)
