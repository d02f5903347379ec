"""The tasks as prompts (paper, section 8): continue, speak, transcribe."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rich.console import Console
from rich.progress import track

from ..audio.judge import Verdict, best_and_median, judge, level_of
from ..config import Recipe
from ..data.store import Store
from ..errors import SodaError
from ..files import atomic_path, write_json
from ..hf.load import LoadedModel
from ..vocab import TokenSpace
from .earlier import earlier_models
from .sample import Constraint, Sampled, sample

PROGRESS_SECONDS = 3.0  # of a sample of an earlier checkpoint
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


NEEDS_TEXT = ("speak", "transcribe")


@dataclass
class Studio:
    """What all samples of a run share."""

    model: LoadedModel
    recipe: Recipe
    codec: Any
    constraint: Constraint
    longest: int  # frames of an utterance
    seconds_a_letter: float | None  # in the held-out utterances; None without transcripts
    out: Path

    def draw(self, network: Any, job: Job, count: int, seed: int) -> list[Sampled]:
        g = self.recipe.generate
        settings: dict[str, Any] = {
            "max_tokens": job.max_tokens,
            "stop": job.stop,
            "temperature": g.temperature,
            "top_p": g.top_p,
        }
        return sample(network, self.constraint, job.prompt, count=count, seed=seed, **settings)

    def hear(self, result: Sampled) -> np.ndarray:
        """The sound of the last audio span, the prompt's frames included."""
        codes = generated_codes(result.ids, self.model.space)
        return self.codec.decode([codes])[0] if len(codes) else np.zeros(0, np.float32)

    def wav(self, name: str, wave: np.ndarray) -> str:
        with atomic_path(self.out / name) as temporary:
            soundfile.write(temporary, np.clip(wave, -1, 1), self.codec.sample_rate, format="WAV", subtype="PCM_16")
        return name


def generate(model: LoadedModel, recipe: Recipe, held_out: list[dict], codec: Any, out: Path) -> list[dict]:
    """Runs the tasks on held-out utterances (rows of unit shards) and writes wav files and samples.json to `out`.

    Of each sample generate.candidates are drawn, and the best and the median of them kept (judge.py). Continuations and
    speech of earlier checkpoints follow, as the task `progress`. Returns what samples.json holds: per sample the task,
    the texts, the verdicts, and the names of its wav files. SodaError if no utterance is short enough for
    generate.max_seconds or the model's context, or no task can be done without text.
    """
    g, space = recipe.generate, model.space
    frame_rate = codec.sample_rate / codec.samples_per_frame
    context = model.model.config.max_position_embeddings
    longest = max(1, min(round(g.max_seconds * frame_rate), (context - 64) // space.codebooks))  # 64: text, markers
    usable = [row for row in held_out if 2 <= len(row["codes"]) <= longest]
    if not usable:
        raise SodaError(
            f"no {g.split} utterance is under {longest / frame_rate:.1f} seconds; raise generate.max_seconds "
            f"(now {g.max_seconds:g}; the model's context is {context} tokens)"
        )
    spoken = [row for row in usable if row["text"]]
    tasks = list(g.tasks)
    if not spoken or not has_text_spans(Store(recipe.data_folder / g.split)):
        tasks = [task for task in g.tasks if task not in NEEDS_TEXT]
        left_out = [task for task in g.tasks if task in NEEDS_TEXT]
        if left_out:
            said = f"{' and '.join(left_out)}: the data have no transcripts, so the model knows no text beside speech"
            if not tasks:
                raise SodaError(f"generate.tasks={g.tasks}: {said}")
            console.print(f"[yellow]left out[/] {said}", soft_wrap=True)
    order = np.random.default_rng(recipe.seed)
    usable, spoken = ([rows[i] for i in order.permutation(len(rows))] for rows in (usable, spoken))
    for rows in (usable, spoken):  # single letters last: there is little to hear
        rows.sort(key=lambda row: len(row["codes"]) < 1.5 * frame_rate)
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples.json").unlink(missing_ok=True)  # stopped half-way, its captions would stand beside other sounds
    letters = sum(len(row["text"]) for row in spoken)
    pace = sum(len(row["codes"]) for row in spoken) / frame_rate / letters if letters else None
    studio = Studio(model, recipe, codec, Constraint(space, model.device), longest, pace, out)
    samples = []
    jobs = [(task, i) for task in tasks for i in range(g.samples)]
    for number, (task, i) in enumerate(track(jobs, "generate", console=console)):
        rows = spoken if task in NEEDS_TEXT else usable
        samples.append(_sample(studio, task, f"{task}_{i}", rows[number % len(rows)], recipe.seed + number))
    samples += _progress(studio, [task for task in tasks if task != "transcribe"], spoken, usable)
    for entry in samples:
        entry["export"] = model.key  # the report tells samples of an earlier one
    write_json(out / "samples.json", samples)
    kept = {name for entry in samples for name in entry["audio"].values()}
    for old in out.glob("*.wav"):  # of a run with other settings
        if old.name not in kept:
            old.unlink()
    return samples


def has_text_spans(store: Store, tokens: int = 1 << 22) -> bool:
    """Whether a transcript stands in the first documents of a store."""
    return bool(np.any(store.read(0, min(tokens, store.size)) == store.space.text_start))


def _prompt(studio: Studio, task: str, row: dict, longest: int) -> tuple[Job, str, int]:
    """The job, the text that is spoken or transcribed, and the frames of a prompt."""
    g, text = studio.recipe.generate, row["text"]
    frames = max(1, min(round(g.prompt_seconds * _frame_rate(studio.codec)), len(row["codes"]) // 2))
    if task == "speak" and g.text:
        text = g.text
    ids = studio.model.text.encode(text)
    return make_job(task, ids, row["codes"], studio.model.space, longest, frames), text, frames


def _sample(studio: Studio, task: str, name: str, row: dict, seed: int) -> dict[str, Any]:
    g, codec = studio.recipe.generate, studio.codec
    job, text, prompt_frames = _prompt(studio, task, row, studio.longest)
    own_text = task == "speak" and bool(g.text)
    candidates = studio.draw(studio.model.model, job, g.candidates, seed)
    again = codec.decode([row["codes"]])[0]
    audio: dict[str, str] = {}
    if not own_text:
        audio["original"] = studio.wav(f"{name}_original.wav", _original(row, codec))
        audio["codec"] = studio.wav(f"{name}_codec.wav", again)
    if task == "continue":
        audio["prompt"] = studio.wav(f"{name}_prompt.wav", codec.decode([row["codes"][:prompt_frames]])[0])
    found: dict[str, Any] = {"output_text": None, "median_text": None}
    if task == "transcribe":
        verdicts = [_of_text(result) for result in candidates]
        best, median = best_and_median(verdicts)
        for key, number in (("output_text", best), ("median_text", median)):
            ids = candidates[number].ids[len(job.prompt) :]
            found[key] = studio.model.text.decode(t for t in ids if t < studio.model.space.text_size)
    else:
        waves = [studio.hear(result) for result in candidates]
        skip = prompt_frames * codec.samples_per_frame if task == "continue" else 0
        pace = studio.seconds_a_letter if task == "speak" else None
        verdicts = [
            judge(
                wave[skip:],
                codec.sample_rate,
                level=level_of(again),
                expected=pace and pace * len(text),
                ended=_ended(result),
                nats=float(np.mean(result.nats)),
            )
            for wave, result in zip(waves, candidates, strict=True)
        ]
        best, median = best_and_median(verdicts)
        audio["model"] = studio.wav(f"{name}_model.wav", waves[best])
        if median != best:
            audio["median"] = studio.wav(f"{name}_median.wav", waves[median])
    return {
        "task": task,
        "id": "" if own_text else row["id"],
        "language": row["language"],
        "prompt_text": text if task == "speak" else None,
        "reference_text": row["text"] or None if task != "speak" else None,
        **found,
        "note": "" if verdicts[best].problems else "ended by itself",
        "candidates": len(candidates),
        "verdicts": {"model": verdicts[best].to_dict(), "median": verdicts[median].to_dict()},
        "good": sum(not verdict.problems for verdict in verdicts),
        "audio": audio,
    }


def _progress(studio: Studio, tasks: list[str], spoken: list[dict], usable: list[dict]) -> list[dict[str, Any]]:
    """One short sample of each task from earlier checkpoints and from this one: the same prompt, the same draw."""
    entries: list[tuple[dict[str, Any], Job, str]] = []
    longest = min(studio.longest, round(PROGRESS_SECONDS * _frame_rate(studio.codec)))
    for task in tasks:
        row = next((r for r in (spoken if task in NEEDS_TEXT else usable) if len(r["codes"]) <= longest), None)
        if row is None:
            continue
        job, text, _ = _prompt(studio, task, row, longest)
        prompt = text if task == "speak" else None
        entry = {"task": "progress", "id": f"{task}: {row['id']}", "language": row["language"], "prompt_text": prompt}
        entries.append(({**entry, "reference_text": None, "output_text": None, "note": "", "audio": {}}, job, task))
    ours = (studio.model.step, studio.model.model)
    # One by one: the earlier models are one network that is loaded again and again.
    for step, network in itertools.chain(earlier_models(studio.recipe, studio.model), [ours]) if entries else []:
        for entry, job, task in entries:
            wave = studio.hear(studio.draw(network, job, 1, studio.recipe.seed)[0])
            if len(wave):
                entry["audio"][f"step_{step}"] = studio.wav(f"progress_{task}_{step}.wav", wave)
    return [entry for entry, _, _ in entries if len(entry["audio"]) > 1]


def _ended(result: Sampled) -> bool:
    return result.ended and not result.forced


def _of_text(result: Sampled) -> Verdict:
    problems = [] if _ended(result) else ["cut off at the length limit"]
    return Verdict(0.0, 0.0, 0.0, float(np.mean(result.nats)), problems)


def _frame_rate(codec: Any) -> float:
    return codec.sample_rate / codec.samples_per_frame


def held_out_rows(folder: Path, split: str, model: LoadedModel, accept: Collection[str] = ()) -> list[dict]:
    """Utterances of a split of a data folder, made with the codec and for the token space of the model."""
    from ..data.units import read_units

    store = Store(folder / split)
    store.check_space(model.space, str(model.folder))
    if not (folder / "codec.json").is_file() or not (model.folder / "codec.json").is_file():
        raise SodaError(f"{folder}: there is no speech in these data, so there is nothing to continue or to speak like")
    if store.slots < store.space.codebooks:
        raise SodaError(f"{store.path}: semantic-only documents have one code a frame, of which no sound can be made")
    store.check_made_by(model.made_by, f"the model {model.folder}", accept)
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise SodaError(f"{path}: no such file; was the data prepared by `soda prepare`?")
    return list(read_units([path]))


def _original(row: dict, codec: Any) -> np.ndarray:
    from ..audio.reading import read_audio
    from ..audio.sound import BadAudio

    try:
        return read_audio(Path(row["audio"]), codec.sample_rate)
    except (BadAudio, OSError):  # the source may have moved since; its codes are all we have
        return codec.decode([row["codes"]])[0]
