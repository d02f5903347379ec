"""Damaged sounds, recipes, tokenizers, codecs, units and reports: each is read, or refused in one sentence."""

import contextlib
import io
import json
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import soundfile
import torch

from megatron_soda import run_folder
from megatron_soda.audio.reading import read_pieces
from megatron_soda.audio.sound import BadAudio
from megatron_soda.codecs import load_codec
from megatron_soda.codecs.description import CodecDescription, load_data_codec
from megatron_soda.config import load_recipe
from megatron_soda.data.units import read_shard, read_units, unit_codec, unit_key, write_units
from megatron_soda.errors import SodaError
from megatron_soda.hf.qwen3 import from_config, hf_config, shapes
from megatron_soda.hf.weights import ShardWriter, Weights
from megatron_soda.report.evaluation import by_suite
from megatron_soda.report.reading import as_dict, load, read_metrics
from megatron_soda.tokenizer import TextTokenizer, train_sentencepiece
from megatron_soda.vocab import TokenSpace
from tests.fuzz import damaged, edited
from tests.test_tokenizer import SENTENCES

RATE = 24_000
SOUNDS = {  # suffix: soundfile's format and subtype; none: PyAV's encoder
    "wav": ("WAV", "PCM_16"), "float.wav": ("WAV", "FLOAT"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III"), "aiff": ("AIFF", "PCM_16"), "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"), "w64": ("W64", "PCM_16"), "rf64": ("RF64", "PCM_16"), "g722": None, "m4a": None,
}  # fmt: skip


def write_sound(path: Path, kind: str) -> None:
    time = np.arange(RATE) / RATE
    wave = 0.3 * np.sin(2 * np.pi * (200 + 100 * time) * time) + 0.05 * np.random.default_rng(0).normal(size=RATE)
    if (known := SOUNDS[kind]) is not None:
        soundfile.write(path, wave.astype(np.float32), RATE, format=known[0], subtype=known[1])
        return
    codec, rate = ("g722", 16_000) if kind == "g722" else ("aac", RATE)
    with av.open(str(path), "w", format="g722" if kind == "g722" else "ipod") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "mono"  # pyright: ignore[reportAttributeAccessIssue]
        frame = av.AudioFrame.from_ndarray((wave[None, :rate] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.format, layout="mono", rate=rate)  # pyright: ignore
        for some in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(some))  # pyright: ignore
        container.mux(stream.encode(None))  # pyright: ignore


def fuzz_sounds(folder: Path, count: int, seed: int) -> Counter[str]:
    """No crash, no hang (20 s each), at most a minute more of sound than there was, and memory that does not grow."""
    draw, found = random.Random(seed), Counter[str]()
    whole = {}
    for kind in SOUNDS:
        path = folder / f"a.{kind}"
        write_sound(path, kind)
        assert sum(map(len, read_pieces(path, RATE, 1920))) > 0.9 * RATE, kind
        whole[kind] = path.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        kind = draw.choice(list(SOUNDS))
        what, content = damaged(whole[kind], draw)
        if draw.random() < 0.5:  # headers are where the odd things are
            what, head = damaged(whole[kind][:200], draw)
            content = head + whole[kind][200:]
        path = folder / f"a.{kind}"
        path.write_bytes(content)
        where = f"seed {seed}, mutant {number}: {kind}, {what}"
        try:
            with at_most(20, where):
                samples = sum(map(len, read_pieces(path, RATE, 1920)))
            assert samples < 61 * RATE, where
            found[f"{kind}: read"] += 1
        except BadAudio:
            found[f"{kind}: refused"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 300, f"{grown:.0f} MB more memory than at the start"
    found["MB more memory"] = round(grown)
    return found


@contextlib.contextmanager
def at_most(seconds: int, where: str):
    def late(*_: object) -> None:
        raise TimeoutError(where)

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- what commands read besides


def fuzz_readers(folder: Path, count: int, seed: int) -> Counter[str]:
    """Every reader returns or raises SodaError with one line."""
    draw, found = random.Random(seed), Counter[str]()
    readers = _readers(folder)
    whole = {name: path.read_bytes() for name, (path, _) in readers.items()}
    for number in range(count):
        name = draw.choice(list(readers))
        path, read = readers[name]
        if path.suffix == ".json" and draw.random() < 0.7:
            what, content = edited(json.loads(whole[name]), draw)
        else:
            what, content = damaged(whole[name], draw)
        path.write_bytes(content)
        try:
            with contextlib.redirect_stdout(io.StringIO()), at_most(60, what):
                read(path)
            found[f"{name}: read"] += 1
        except SodaError as error:
            found[f"{name}: refused"] += 1
            message = str(error)
            if "\n" in message.strip() and name != "recipe":
                raise AssertionError(f"seed {seed}, mutant {number} of {name}, {what}: {message}") from error
        except BaseException as error:
            raise AssertionError(f"seed {seed}, mutant {number} of {name}, {what}: {error!r}") from error
        path.write_bytes(whole[name])
    return found


def _readers(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    recipe = folder / "recipe.yaml"
    shutil.copy(Path(__file__).parent.parent / "examples/quickstart/recipe.yaml", recipe)
    model, spec = folder / "t.model", folder / "t.json"
    train_sentencepiece(model, SENTENCES, 310)
    spec.write_text(json.dumps(TextTokenizer(model).spec()))
    data = folder / "data"
    data.mkdir()
    codec = data / "codec.json"
    described = CodecDescription.of(load_codec("embedded"), {"spec": "embedded", "path": None})
    codec.write_text(json.dumps(described.to_dict()))
    units = folder / "part-000000.parquet"
    rows = [{"id": f"u{i}", "codes": np.full((5, 8), i), "text": "a", "seconds": 0.4} for i in range(20)]
    write_units(units, rows, codec=described, key="k")
    run = folder / "run"
    run.mkdir()
    run_folder.record_timing(run, "train", {"seconds": 1.0})
    (run / "eval.json").write_text(json.dumps({"model": "m", "step": 3, "nll": {"classes": {"text": {"tokens": 3}}}}))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5, "nll": {"text": 1.0}}\n')

    def use(path: Path) -> None:
        text = TextTokenizer(path)
        text.decode(text.encode("Good morning"))

    def use_units(path: Path) -> None:
        unit_key(path), unit_codec(path)
        read_shard(path)
        list(read_units([path]))

    def use_timings(path: Path) -> None:
        run_folder.record_timing(path.parent, "train", {"seconds": 1.0}, add=True)

    model_folder = folder / "qwen3"
    model_folder.mkdir()
    sizes = load_recipe(None, ["model.num_layers=1", "model.hidden_size=8", "model.ffn_hidden_size=8"]).model
    config, weights = model_folder / "config.json", ShardWriter(model_folder, shapes(sizes, 20), torch.float32)
    config.write_text(json.dumps(hf_config(sizes, TokenSpace(10, 1, 2, 2, 3), 64).to_dict()))
    for name, shape in weights.shapes.items():
        weights.write(name, torch.ones(shape))
    weights.finish()

    def use_weights(path: Path) -> None:
        found = Weights(path.parent)
        found.check(weights.shapes)
        for name in found.shapes:
            found.read(name)

    return {
        "config.json": (config, from_config),
        "safetensors": (model_folder / "model.safetensors", use_weights),
        "recipe": (recipe, load_recipe),
        "sentencepiece": (model, use),
        "tokenizer.json": (spec, use),
        "codec.json": (codec, lambda path: load_data_codec(path.parent)),
        "units": (units, use_units),
        "timings.json": (run / "timings.json", use_timings),
        "eval.json": (
            run / "eval.json",
            lambda path: by_suite(path.parent, as_dict(load(path.parent, path.name, [])), []),
        ),
        "metrics.jsonl": (run / "metrics.jsonl", lambda path: read_metrics(path, [])),
    }
