"""The tasks as prompts (paper, section 8): continue, speak, transcribe."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rich.console import Console
from rich.progress import track

from ..config import Recipe
from ..data.store import Store
from ..errors import SodaError
from ..files import atomic_path, write_json
from ..hf.load import Model
from ..vocab import TokenSpace
from .sample import Constraint, sample

console = Console(stderr=True)


def generated_codes(ids: list[int], space: TokenSpace) -> np.ndarray:
    """int16 (frames, codebooks): the whole frames of the last audio span of `ids`."""
    ids_array = np.array(ids)
    start = int(np.flatnonzero(ids_array == space.audio_start)[-1]) + 1
    span = ids_array[start:]
    span = span[span >= space.audio_base]
    return space.codes(span[: len(span) // space.codebooks * space.codebooks])


@dataclass
class Job:
    """One prompt, and when its continuation ends."""

    prompt: list[int]
    stop: set[int]
    max_tokens: int


def make_job(task: str, text: list[int], codes: np.ndarray, space: TokenSpace, longest: int, prompt_frames: int) -> Job:
    """`text` ids and `codes` (frames, codebooks) of an utterance -> the prompt of a task; `longest` in frames."""
    audio = space.audio_ids(codes).tolist()
    if task == "transcribe":
        return Job([space.bos, space.audio_start, *audio, space.audio_end, space.text_start], {space.text_end}, 200)
    if task == "speak":
        prompt = [space.bos, space.text_start, *text, space.text_end, space.audio_start]
        return Job(prompt, {space.audio_end}, longest * space.codebooks + 2)
    prompt = [space.bos, space.audio_start, *audio[: prompt_frames * space.codebooks]]
    return Job(prompt, {space.audio_end}, (longest - prompt_frames) * space.codebooks + 2)


def generate(model: Model, recipe: Recipe, held_out: list[dict], codec: Any, out: Path) -> list[dict]:
    """Runs the tasks on held-out utterances (rows of unit shards) and writes wav files and samples.json to `out`.

    Returns what samples.json holds: per sample the task, the texts, and the names of its wav files. SodaError if no
    utterance is short enough for generate.max_seconds or the model's context.
    """
    g, space = recipe.generate, model.space
    constraint = Constraint(space, model.device)
    frame_rate = codec.sample_rate / codec.samples_per_frame
    context = model.model.config.max_position_embeddings
    longest = max(1, min(round(g.max_seconds * frame_rate), (context - 64) // space.codebooks))  # 64: text, markers
    usable = [row for row in held_out if 2 <= len(row["codes"]) <= longest and row["text"]]
    if not usable:
        raise SodaError(
            f"no {g.split} utterance is under {longest / frame_rate:.1f} seconds; raise generate.max_seconds "
            f"(now {g.max_seconds:g}; the model's context is {context} tokens)"
        )
    usable = [usable[i] for i in np.random.default_rng(recipe.seed).permutation(len(usable))]
    usable.sort(key=lambda row: len(row["codes"]) < 1.5 * frame_rate)  # single letters last: there is little to hear
    out.mkdir(parents=True, exist_ok=True)

    def wav(name: str, wave: np.ndarray) -> str:
        with atomic_path(out / name) as temporary:
            soundfile.write(temporary, np.clip(wave, -1, 1), codec.sample_rate, format="WAV", subtype="PCM_16")
        return name

    samples = []
    jobs = [(task, i) for task in g.tasks for i in range(g.samples)]
    for number, (task, i) in enumerate(track(jobs, "generate", console=console)):
        row, name = usable[number % len(usable)], f"{task}_{i}"
        codes, prompt_frames = row["codes"], min(round(g.prompt_seconds * frame_rate), len(row["codes"]) // 2)
        own_text = g.text if task == "speak" else ""
        text = own_text or row["text"]
        job = make_job(task, model.text.encode(text), codes, space, longest, max(1, prompt_frames))
        result = sample(
            model.model,
            constraint,
            job.prompt,
            max_tokens=job.max_tokens,
            stop=job.stop,
            temperature=g.temperature,
            top_p=g.top_p,
            seed=recipe.seed + number,
        )[0]
        audio, output_text = {}, None
        if not own_text:
            audio["original"] = wav(f"{name}_original.wav", _original(row, codec))
            audio["codec"] = wav(f"{name}_codec.wav", codec.decode([codes])[0])
        if task == "continue":
            audio["prompt"] = wav(f"{name}_prompt.wav", codec.decode([codes[:prompt_frames]])[0])
        if task == "transcribe":
            output_text = model.text.decode(t for t in result.ids[len(job.prompt) :] if t < space.text_size)
        else:
            audio["model"] = wav(f"{name}_model.wav", codec.decode([generated_codes(result.ids, space)])[0])
        samples.append(
            {
                "task": task,
                "id": "" if own_text else row["id"],
                "language": row["language"],
                "prompt_text": text if task == "speak" else None,
                "reference_text": row["text"] if task != "speak" else None,
                "output_text": output_text,
                "note": "ended by itself" if result.ended and not result.forced else "cut off at the length limit",
                "audio": audio,
            }
        )
    write_json(out / "samples.json", samples)
    return samples


def held_out_rows(folder: Path, split: str, model: Model, accept: Collection[str] = ()) -> list[dict]:
    """Utterances of a split of a data folder, made with the codec and for the token space of the model."""
    from data_prep.units import read_units

    store = Store(folder / split)
    store.check_space(model.space, str(model.folder))
    store.check_made_by(model.made_by, f"the model {model.folder}", accept)
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise SodaError(f"{path}: no such file; was the data prepared by `soda prepare`?")
    return list(read_units([path]))


def _original(row: dict, codec: Any) -> np.ndarray:
    from data_prep.audio import read_audio
    from data_prep.utterance import BadAudio

    try:
        return read_audio(Path(row["audio"]), codec.sample_rate)
    except (BadAudio, OSError):  # the source may have moved since; its codes are all we have
        return codec.decode([row["codes"]])[0]
