"""The tasks with people's own sounds and texts: `soda transcribe`, `speak`, `continue`, `translate` and `serve`."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..audio.reading import read_audio
from ..audio.sound import BadAudio
from ..codecs import Codec, load_codec
from ..codecs.description import load_data_codec
from ..config import Recipe
from ..config.use import Generate
from ..errors import SodaError
from ..files import reading
from ..hf.load import LoadedModel, load_model
from ..registry import TASKS
from ..tokenizer import clean_text
from .decoder import Weights
from .sample import sample
from .studio import Studio, generated_codes
from .task import Material, Prompt, Task


@dataclass(frozen=True)
class Answer:
    texts: list[str]  # what was written, in order
    codes: np.ndarray | None  # int16 (frames, codebooks), with what was continued; None for a task that writes
    ended_by_itself: bool


@dataclass(frozen=True)
class Chance:
    """How tokens are drawn. None: as the paper does for the task. SodaError for what is no number or too large."""

    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (self.temperature or 0, self.top_p or 0)):
            raise SodaError("temperature and top-p must be finite numbers")
        if abs(self.seed) >= 1 << 62:  # torch takes 64 bits, and each document of a batch has its own seed
            raise SodaError(f"seed {self.seed}: must be below 2^62")


def open_studio(folder: Path, codec: str = "", weights: Weights = "", out: Path = Path()) -> Studio:
    """The exported model in `folder`. codec: NAME or NAME:FOLDER, for a model without one of its own. weights: see
    Decoder. out: where sounds are saved."""
    model = load_model(folder)
    if not codec and model.codec is None:
        raise SodaError(
            f"{folder}: there is no codec in this model. Name the one that made its audio tokens; for SODA's released "
            "models: --codec mimi"
        )
    if codec and model.codec is not None:
        raise SodaError(f"{folder}: has its own codec, which made its audio tokens; leave --codec out")
    found = load_data_codec(model.codec, str(model.device)) if model.codec else _named_codec(codec, model)
    return Studio(model, Recipe(generate=Generate(weights=weights)), found, out)


def _named_codec(codec: str, model: LoadedModel) -> Codec:
    name, _, path = codec.partition(":")
    codebooks = None if name == "embedded" else model.space.codebooks
    found = load_codec(name, path or None, codebooks=codebooks, device=str(model.device))
    theirs, ours = (found.codebooks, found.entries), (model.space.codebooks, model.space.entries)
    if theirs != ours:
        raise SodaError(
            f"--codec {codec}: has {theirs[0]} codebooks of {theirs[1]:,} entries; the model's tokens are of {ours[0]} "
            f"codebooks of {ours[1]:,}"
        )
    return found


def codes_of(studio: Studio, path: Path, name: str = "") -> np.ndarray:
    """int16 (frames, codebooks) of a recording. SodaError, with its name, if it cannot be used or is too long."""
    most = studio.fitting / studio.frame_rate
    try:
        wave = read_audio(path, studio.codec.sample_rate, most)
    except BadAudio as error:
        context = f"; the model's context of {studio.decoder.context:,} tokens has room for no more"
        raise SodaError(f"{name or path}: {error}{context if str(error).startswith('too long') else ''}") from None
    return studio.codec.encode([wave])[0]


def text_of(studio: Studio, text: str, name: str) -> str:
    """`text` as training data have it. SodaError if nothing is left."""
    if not (cleaned := clean_text(text, studio.model.space).strip()):
        raise SodaError(f"{name} is empty: there is nothing to say")
    return cleaned


def continuation(studio: Studio, codes: np.ndarray, seconds: float, name: str) -> Material:
    """Material to continue a sound for so many seconds. SodaError if the context has no room for them."""
    frames = max(1, round(min(studio.decoder.context, seconds * studio.frame_rate)))
    if len(codes) + frames > studio.fitting:
        left = max(0, studio.fitting - len(codes)) / studio.frame_rate
        raise SodaError(
            f"{name}: has {len(codes) / studio.frame_rate:.1f} s; the model's context of {studio.decoder.context:,} "
            f"tokens has room for {left:.1f} s more, not {seconds:g}"
        )
    return studio.material(len(codes) + frames, codes=codes, given=len(codes))


def voiced(
    studio: Studio, codes: np.ndarray, said: str = "", on_token: Callable[[int, int], None] | None = None
) -> tuple[str, np.ndarray]:
    """A recording as a voice to speak in. said: its transcript; empty: the model writes one."""
    said = clean_text(said, studio.model.space).strip()
    if not said:
        (heard,) = answer(studio, TASKS["transcribe"], [studio.material(codes=codes)], on_token=on_token)
        said = clean_text(heard.texts[0], studio.model.space).strip()
    if not said:
        raise SodaError("the model hears no words in the voice's recording: give its transcript")
    return said, codes


def answer(
    studio: Studio,
    task: Task,
    materials: Sequence[Material],
    chance: Chance = Chance(),
    on_token: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Does the task with each material, all in one batch. on_token: see `sample`. SodaError if a prompt does not fit
    into the model's context."""
    prompts = [task.prompt(material) for material in materials]
    temperature = task.temperature if chance.temperature is None else chance.temperature
    how: Any = {"temperature": temperature, "top_p": task.top_p if chance.top_p is None else chance.top_p}
    texts: list[list[str]] = [[] for _ in prompts]
    ended = [True for _ in prompts]
    while True:
        results = sample(studio.decoder, studio.constraint, prompts, seed=chance.seed, on_token=on_token, **how)
        following: list[Prompt] = []
        for i, (material, prompt, result) in enumerate(zip(materials, prompts, results, strict=True)):
            ended[i] &= result.ended_by_itself
            said = studio.read(result, prompt)
            if studio.model.space.text_end in prompt.stop:
                texts[i].append(said)
            if more := task.then(material, prompt, result.ids, said):
                following.append(more)
        if not following:
            break
        prompts = following
    codes = [None if task.writes else generated_codes(result.ids, studio.model.space) for result in results]
    return [Answer(*parts) for parts in zip(texts, codes, ended, strict=True)]


# ---- examples


def read_examples(studio: Studio, task: Task, path: Path, to: str = "") -> tuple[int, ...]:
    """The ids of the documents in a JSONL file: {"audio", "text"} a line, for translations also {"language",
    "translation", "translation_audio"}. Paths are relative to the file. SodaError names the line."""
    ids: list[int] = []
    with reading(path):
        lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            ids += task.example(_example(studio, task, path, f"{path}, line {number}", line, to))
    if not ids:
        raise SodaError(f"{path}: there are no examples in it")
    return tuple(ids)


def _example(studio: Studio, task: Task, path: Path, where: str, line: str, to: str) -> Material:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SodaError(f"{where}: is not JSON ({error})") from None
    needed = ["audio", *(["text"] if task.needs_text else [])]
    needed += ["language", "translation", "translation_audio"] if to else []
    for key in needed:
        if not isinstance(row, dict) or not isinstance(row.get(key), str) or not row[key].strip():
            raise SodaError(f"{where}: needs {', '.join(needed)}, each a text; {key} is missing")

    def sound(key: str) -> np.ndarray:
        return codes_of(studio, path.parent / row[key], f"{where}: {row[key]}")

    said = text_of(studio, row["text"], f"{where}: text") if task.needs_text else ""
    found = studio.material(text=said, codes=sound("audio"), to=to, language=row["language"] if to else "")
    if not to:
        return found
    translation = text_of(studio, row["translation"], f"{where}: translation"), sound("translation_audio")
    return replace(found, translation=translation)
