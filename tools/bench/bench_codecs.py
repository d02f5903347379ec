"""Measures `encode` of Mimi, EnCodec and DAC against transformers' models called by hand. Run by hand.

The models have random weights and the sizes of the released ones; the sound is noise, in lengths of 0.5 to 12 s. By
hand means: one wave at a time, padded with zeros to whole frames. On a CPU ours does the same, so the bar there is to
be no slower; on CUDA it makes batches, and the bar is five times as fast, which has not been measured. The two run in
turns. On a CPU two worker processes are also measured against one, each with --threads threads: the bar is 1.8. With
--decoders, the same waves as FLAC files at 16 kHz go through a job of `soda prepare`: decoded between batches, ahead
in so many threads, and, on CUDA where DALI is installed, by DALI (`prepare.decoder=dali_gpu`).

    python tools/bench/bench_codecs.py --codec encodec
    python tools/bench/bench_codecs.py --codec dac --seconds 60 --repeats 5
    python tools/bench/bench_codecs.py --codec mimi --device cuda --seconds 1800 --decoders 8
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import soundfile
import soxr
import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep import encode, executor
from data_prep.index import make_index
from data_prep.utterance import Utterance
from megatron_soda.audio.sound import Sound
from megatron_soda.codecs import Codec, load_codec
from megatron_soda.codecs.description import CodecDescription
from megatron_soda.config import choice
from megatron_soda.errors import SodaError, run_tool

NAMES = ("mimi", "encodec", "dac")
RATE = 24_000  # Hz, of all three

console = Console()
_codec: Codec | None = None  # of a worker process
_waves: list[np.ndarray] = []


def save_random(name: str, folder: str) -> None:
    """A model with random weights and the sizes of kyutai/mimi, facebook/encodec_24khz or descript/dac_24khz."""
    from transformers import DacConfig, DacModel, EncodecConfig, EncodecModel, MimiConfig, MimiModel

    torch.manual_seed(0)
    if name == "dac":
        model: Any = DacModel(DacConfig(downsampling_ratios=[2, 4, 5, 8], n_codebooks=32, sampling_rate=24_000))
    else:
        model = MimiModel(MimiConfig()) if name == "mimi" else EncodecModel(EncodecConfig())
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith(("embed", "embed_sum")):
                torch.nn.init.normal_(buffer, std=0.05)
    model.save_pretrained(folder)


def mixed_waves(seconds: float) -> list[np.ndarray]:
    """Noise of about so many seconds in all, in waves of 0.5 to 12 s."""
    rng = np.random.default_rng(0)
    lengths: list[float] = []
    while sum(lengths) < seconds:
        lengths.append(rng.uniform(0.5, min(12.0, max(1.0, seconds / 4))))
    return [(0.1 * rng.standard_normal(int(s * RATE))).astype(np.float32) for s in lengths]


def by_hand(codec: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A wave's codes (frames, codebooks) from the codec's own model, called as its documentation shows."""
    model, wanted = codec._model, codec.codebooks

    @torch.inference_mode()
    def encode(wave: np.ndarray) -> np.ndarray:
        padded = np.pad(wave, (0, -len(wave) % codec.samples_per_frame))
        sound = torch.from_numpy(padded)[None, None].to(model.device)
        if codec.name == "mimi":
            codes = model.encode(sound, num_quantizers=wanted).audio_codes[0]
        elif codec.name == "encodec":
            codes = model.encode(sound, bandwidth=6.0).audio_codes[0, 0]
        else:
            codes = model.encode(sound, n_quantizers=wanted).audio_codes[0]
        return codes.T.to(torch.int16).cpu().numpy()

    return encode


def seconds_of(run: Callable[[], Any]) -> float:
    """Both sides end with codes in main memory, so a GPU is done as well."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def start_worker(name: str, folder: str, threads: int, seconds: float) -> None:
    global _codec, _waves
    torch.set_num_threads(threads)
    _codec = load_codec(name, folder)
    _waves = mixed_waves(seconds)


def encode_wave(i: int) -> int:
    assert _codec is not None
    return len(_codec.encode([_waves[i]])[0])


def workers(name: str, folder: str, threads: int, seconds: float, repeats: int) -> list[float]:
    """How many times as fast two processes are as one, of each repeat."""
    how = get_context("spawn")
    arguments = name, folder, threads, seconds
    lengths = [len(wave) for wave in mixed_waves(seconds)]
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # so that both end at about the same time
    with (
        ProcessPoolExecutor(1, mp_context=how, initializer=start_worker, initargs=arguments) as one,
        ProcessPoolExecutor(2, mp_context=how, initializer=start_worker, initargs=arguments) as two,
    ):
        for pool in (one, two):
            list(pool.map(encode_wave, longest_first))  # the first pass starts the processes
        times = [
            [seconds_of(lambda pool=pool: list(pool.map(encode_wave, longest_first))) for pool in (one, two)]
            for _ in range(repeats)
        ]
    return [a / b for a, b in times]


def compare(name: str, folder: str, device: str, seconds: float, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each repeat, of ours and by hand in turns; and the share of codes that are equal."""
    codec = load_codec(name, folder, device=device)
    waves = mixed_waves(seconds)
    hand = by_hand(codec)
    sides = {"ours": lambda: codec.encode(waves), "by hand": lambda: [hand(wave) for wave in waves]}
    ours, theirs = (np.concatenate(run()) for run in sides.values())  # the first pass sets things up
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in sides.items():
            times[side].append(seconds_of(run))
    return times, float((ours == theirs).mean())


def write_files(folder: Path, seconds: float) -> list[Utterance]:
    utterances = []
    for i, wave in enumerate(mixed_waves(seconds)):
        path = folder / f"{i}.flac"
        soundfile.write(path, soxr.resample(wave, RATE, 16_000), 16_000)
        utterances.append(Utterance(str(i), Sound(str(path)), ""))
    return utterances


def from_files(
    name: str, folder: Path, device: str, seconds: float, repeats: int, decoders: int
) -> dict[str, list[float]]:
    """Seconds of each repeat from files to a shard of codes, in turns."""
    arguments = {"spec": name, "path": str(folder)}
    described = CodecDescription.of(load_codec(name, folder), arguments)
    made = make_index(
        iter(write_files(folder, seconds)), folder / "index", shard_size=10**6, reject=lambda one: print(one)
    )
    executor.device = device
    sides = {"files": ("soundfile", 0), "files, decoded ahead": ("soundfile", decoders)}
    try:
        encode.check_decoder("dali_gpu", gpu=device != "cpu")
        sides["files, DALI"] = "dali_gpu", decoders
    except SodaError as error:
        console.print(f"without DALI: {error}", style="dim", markup=False)
    times: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        for side, (decoder, threads) in sides.items():
            (job,) = encode.encode_jobs(made.shards, folder, described, decoder=decoder, trim=False)
            with mock.patch.object(encode, "_decoders", return_value=threads):
                taken = seconds_of(partial(encode.encode_shard, job))
            if turn:
                times.setdefault(side, []).append(taken)
    return times


def main(
    codec: Annotated[str, typer.Option(help="mimi | encodec | dac")] = "mimi",
    threads: Annotated[int, typer.Option(min=1, help="of each process")] = 1,
    seconds: Annotated[float, typer.Option(min=4.0, help="of sound in all")] = 60.0,
    device: Annotated[str, typer.Option(help="cpu | cuda")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    decoders: Annotated[int, typer.Option(min=0, help="threads that decode files ahead; 0: no files")] = 0,
) -> None:
    """Prints a table and one JSON line: our encode, the model by hand, and two processes against one."""
    choice("--codec", codec, NAMES)
    choice("--device", device, ("cpu", "cuda"))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        save_random(codec, folder)
        times, equal = compare(codec, folder, device, seconds, repeats)
        spread = workers(codec, folder, threads, seconds, repeats) if device == "cpu" else []
        if decoders:
            times |= from_files(codec, Path(folder), device, seconds, repeats, decoders)

    lengths = [len(wave) / RATE for wave in mixed_waves(seconds)]
    total = sum(lengths)
    medians = {side: statistics.median(found) for side, found in times.items()}
    faster = statistics.median(b / a for a, b in zip(times["ours"], times["by hand"], strict=True))
    two = statistics.median(spread) if spread else None
    ahead = medians["files"] / medians["files, decoded ahead"] if decoders else None
    table = Table(f"{codec}, {len(lengths)} waves, {total:.0f} s", "s", "times real time")
    for side, median in medians.items():
        table.add_row(side, f"{median:.2f}", f"{total / median:.1f}")
    table.add_row("by hand / ours", f"{faster:.3f}", "")
    if two:
        table.add_row("two processes, times one", f"{two:.2f}", "")
    console.print(table)
    facts = {"codec": codec, "device": device, "threads": threads, "repeats": repeats, "waves": len(lengths)}
    results = {"times_faster": faster, "two_processes": two, "decoded_ahead": ahead, "equal_codes": equal}
    print(json.dumps({**facts, "sound_seconds": total, "seconds": medians, **results}))


if __name__ == "__main__":
    run_tool(main)
