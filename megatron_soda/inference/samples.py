"""Samples: draws candidates for a prompt, judges them, and keeps the best and the median; also shows a run's
progress."""

import itertools
from typing import Any

import numpy as np

from ..audio.judge import CUT, Verdict, best_and_median, judge, level_of
from ..registry import TASKS
from .decoder import Decoder
from .earlier import earlier_models
from .held_out import HeldOut
from .sample import Sampled
from .studio import Studio
from .task import Prompt, Task
from .tasks.translate import LANGUAGE

PROGRESS_SECONDS = 3.0  # of a sample from an earlier checkpoint


def take_sample(studio: Studio, task: Task, name: str, row: dict[str, Any], seed: int, pace: float | None) -> dict:
    """Writes a sample's wav files and returns its entry for samples.json. `name`: prefix of their names. `pace`:
    seconds of speech per letter in these data, None if unknown."""
    codec, source = studio.codec, row
    prompt, chain = _last_prompt(studio, task, row, seed)
    row = row["translation"] if task.translates else row  # what the result is compared with
    own_text = not task.translates and prompt.text not in (None, row["text"])  # then the recording does not match
    candidates = studio.draw(studio.decoder, prompt, studio.recipe.generate.candidates, seed)
    again = codec.decode([row["codes"]])[0]
    audio: dict[str, str] = {}
    if not own_text:
        audio["original"] = studio.save(f"{name}_original", studio.original(row))
        audio["codec"] = studio.save(f"{name}_codec", again)
    if task.translates:
        audio["prompt"] = studio.save(f"{name}_prompt", codec.decode([source["codes"]])[0])
    if prompt.given:
        audio["prompt"] = studio.save(f"{name}_prompt", codec.decode([row["codes"][: prompt.given]])[0])
    written: tuple[str | None, str | None] = (" → ".join(chain) or None, None)
    if task.writes:
        verdicts = [_of_text(result) for result in candidates]
        best, median = best_and_median(verdicts)
        written = studio.read(candidates[best], prompt), studio.read(candidates[median], prompt)
    else:
        waves = [studio.hear(result) for result in candidates]
        verdicts = _of_sound(studio, prompt, candidates, waves, level_of(again), pace)
        best, median = best_and_median(verdicts)
        audio["model"] = studio.save(f"{name}_model", waves[best])
        if median != best:
            audio["median"] = studio.save(f"{name}_median", waves[median])
    reference = row["text"] if prompt.text is None else ""
    if task.translates:
        reference = f"{source['text']} → {row['text']}"
    return {
        "task": task.name,
        "id": "" if own_text else source["id"],
        "language": row["language"],
        "prompt_text": None if task.translates else prompt.text,
        "reference_text": reference or None,
        "output_text": written[0],
        "median_text": written[1],
        "note": "ended by itself" if candidates[best].ended_by_itself else CUT,
        "candidates": len(candidates),
        "verdicts": {"model": verdicts[best].to_dict(), "median": verdicts[median].to_dict()},
        "good": sum(not verdict.problems for verdict in verdicts),
        "audio": audio,
    }


def _last_prompt(studio: Studio, task: Task, row: dict[str, Any], seed: int) -> tuple[Prompt, list[str]]:
    """The prompt for the result, after the steps of a task before it, and the texts that these wrote."""
    material = studio.material_of(task, row, studio.longest)
    prompt, chain = task.prompt(material), list[str]()
    while task.translates and studio.model.space.audio_end not in prompt.stop:
        (result,) = studio.draw(studio.decoder, prompt, 1, seed)
        said = studio.read(result, prompt)
        chain.append(LANGUAGE.sub("", said, count=1))
        following = task.then(material, prompt, result.ids, said)
        assert following
        prompt = following
    return prompt, chain


def _of_sound(
    studio: Studio, prompt: Prompt, results: list[Sampled], waves: list[np.ndarray], level: float, pace: float | None
) -> list[Verdict]:
    skip = prompt.given * studio.codec.samples_per_frame
    expected = pace * len(prompt.text) if pace and prompt.text else None
    return [
        judge(
            wave[skip:],
            studio.codec.sample_rate,
            level=level,
            expected=expected,
            ended=result.ended_by_itself,
            nats=float(np.mean(result.nats)),
        )
        for wave, result in zip(waves, results, strict=True)
    ]


def _of_text(result: Sampled) -> Verdict:
    problems = [] if result.ended_by_itself else [CUT]
    return Verdict(0.0, 0.0, 0.0, float(np.mean(result.nats)), problems)


def progress(studio: Studio, tasks: list[str], held_out: HeldOut) -> list[dict[str, Any]]:
    """One short sample per task from earlier checkpoints and from this one, with the same prompt and random draw."""
    entries: list[tuple[dict[str, Any], Prompt, str]] = []
    longest = min(studio.longest, round(PROGRESS_SECONDS * studio.frame_rate))
    for name in tasks:
        task = TASKS[name]
        row = next((row for row in held_out.rows(task) if len(row["codes"]) <= longest), None)
        if row is None:
            continue
        prompt = task.prompt(studio.material_of(task, row, longest))
        entry = {"task": "progress", "id": f"{name}: {row['id']}", "language": row["language"]}
        entry |= {"prompt_text": prompt.text, "reference_text": None, "output_text": None, "note": "", "audio": {}}
        entries.append((entry, prompt, name))
    # One by one: the earlier models share one network that is reloaded each time.
    earlier = ((step, Decoder(network)) for step, network in earlier_models(studio.recipe, studio.model))
    for step, decoder in itertools.chain(earlier, [(studio.model.step, studio.decoder)]) if entries else []:
        for entry, prompt, name in entries:
            wave = studio.hear(studio.draw(decoder, prompt, 1, studio.recipe.seed)[0])
            if len(wave):
                entry["audio"][f"step_{step}"] = studio.save(f"progress_{name}_{step}", wave)
    return [entry for entry, _, _ in entries if len(entry["audio"]) > 1]
