"""The tasks as prompts (paper, section 8): continue, speak, transcribe."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rich.console import Console
from rich.progress import track

from ..config import Recipe
from ..data.store import Store
from ..errors import SodaError
from ..files import atomic_path, read_json, write_json
from ..hf.load import Model
from ..vocab import TokenSpace
from .sample import Constraint, Sampled, sample

console = Console(stderr=True)


def generated_codes(ids: list[int], space: TokenSpace) -> np.ndarray:
    """int16 (frames, codebooks): the whole frames of the last audio span of `ids`."""
    ids_array = np.array(ids)
    start = int(np.flatnonzero(ids_array == space.audio_start)[-1]) + 1
    span = ids_array[start:]
    span = span[span >= space.audio_base]
    return space.codes(span[: len(span) // space.codebooks * space.codebooks])


def generate(model: Model, recipe: Recipe, held_out: list[dict], codec: Any, out: Path) -> list[dict]:
    """Runs the tasks on held-out utterances (rows of unit shards) and writes wav files and samples.json to `out`.

    Returns what samples.json holds: per sample the task, the texts, and the names of its wav files.
    """
    g, space = recipe.generate, model.space
    constraint = Constraint(space, model.device)
    frame_rate = codec.sample_rate / codec.samples_per_frame
    longest = round(g.max_seconds * frame_rate)
    usable = [r for r in held_out if 1.5 * g.prompt_seconds * frame_rate < len(r["codes"]) <= longest and r["text"]]
    if not usable:
        raise SodaError(
            f"no {g.split} utterance lasts between {1.5 * g.prompt_seconds:g} and {g.max_seconds:g} seconds; "
            "set generate.max_seconds or generate.prompt_seconds"
        )
    usable = [usable[i] for i in np.random.default_rng(recipe.seed).permutation(len(usable))]
    out.mkdir(parents=True, exist_ok=True)
    budget: dict[str, Any] = {"temperature": g.temperature, "top_p": g.top_p}
    samples = []

    def wav(name: str, wave: np.ndarray) -> str:
        with atomic_path(out / name) as temporary:
            soundfile.write(temporary, np.clip(wave, -1, 1), codec.sample_rate, format="WAV", subtype="PCM_16")
        return name

    def speech(result: Sampled, name: str, skip: int = 0) -> dict[str, str]:
        codes = generated_codes(result.ids, space)
        return {"model": wav(name, codec.decode([codes])[0])} if len(codes) > skip else {}

    jobs = [(task, i) for task in g.tasks for i in range(g.samples)]
    for number, (task, i) in enumerate(track(jobs, "generate", console=console)):
        row = usable[(number if len(usable) >= len(jobs) else i) % len(usable)]
        text = g.text if g.text and task == "speak" else row["text"]
        text_ids, audio_ids = model.text.encode(text), space.audio_ids(row["codes"]).tolist()
        name = f"{task}_{i}"
        audio: dict[str, str] = {}
        output_text, note = None, ""
        if not (g.text and task == "speak"):
            audio["original"] = wav(f"{name}_original.wav", _original(row, codec))
            audio["codec"] = wav(f"{name}_codec.wav", codec.decode([row["codes"]])[0])
        if task == "transcribe":
            prompt = [space.bos, space.audio_start, *audio_ids, space.audio_end, space.text_start]
            stop, tokens = {space.text_end}, 200
        elif task == "speak":
            prompt = [space.bos, space.text_start, *text_ids, space.text_end, space.audio_start]
            stop, tokens = {space.audio_end}, longest * space.codebooks + 2
        else:
            frames = round(g.prompt_seconds * frame_rate)
            prompt = [space.bos, space.audio_start, *audio_ids[: frames * space.codebooks]]
            stop, tokens = {space.audio_end}, (longest - frames) * space.codebooks + 2
            audio["prompt"] = wav(f"{name}_prompt.wav", codec.decode([row["codes"][:frames]])[0])
        result = sample(
            model.model, constraint, prompt, max_tokens=tokens, stop=stop, seed=recipe.seed + number, **budget
        )[0]
        if task == "transcribe":
            output_text = model.text.decode(t for t in result.ids[len(prompt) :] if t < space.text_size)
        else:
            audio |= speech(result, f"{name}_model.wav")
        note = "cut off at the length limit" if result.forced or not result.ended else "ended by itself"
        samples.append(
            {
                "task": task,
                "id": row["id"] if not (g.text and task == "speak") else "",
                "language": row["language"],
                "prompt_text": text if task == "speak" else None,
                "reference_text": row["text"] if task != "speak" else None,
                "output_text": output_text,
                "note": note,
                "audio": audio,
            }
        )
    write_json(out / "samples.json", samples)
    return samples


def held_out_rows(folder: Path, split: str, model: Model) -> list[dict]:
    """Utterances of a split of a data folder, made with the codec and for the token space of the model."""
    from data_prep.units import read_units

    Store(folder / split).check_space(model.space, str(model.folder))
    made_with, wanted = (
        read_json(folder / "codec.json")["fingerprint"],
        read_json(model.folder / "codec.json")["fingerprint"],
    )
    if made_with != wanted:
        raise SodaError(
            f"{folder}: its codes are of codec {made_with}, the model {model.folder} was trained on {wanted}"
        )
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise SodaError(f"{path}: no such file; generate.split and evaluate.split are valid or test")
    return list(read_units([path]))


def _original(row: dict, codec: Any) -> np.ndarray:
    from data_prep.audio import BadAudio, read_audio

    try:
        return read_audio(Path(row["audio"]), codec.sample_rate)
    except (BadAudio, OSError):  # the source may have moved since; its codes are all we have
        return codec.decode([row["codes"]])[0]
