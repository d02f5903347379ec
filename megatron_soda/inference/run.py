"""`soda generate`."""

import time
from pathlib import Path
from typing import Any

from rich.progress import track

from ..audio.judge import CUT
from ..config import Recipe
from ..console import console
from ..errors import SodaError, printable
from ..files import check_writable, write_json
from ..hf.load import load_model
from ..registry import TASKS
from ..run_folder import record_timing
from .held_out import HeldOut, choose, held_out_rows, knows_text
from .samples import progress, take_sample
from .studio import Studio


def generate(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Runs the recipe's tasks on the exported model in `folder`; wav files and samples.json go to RUN/samples.

    Draws generate.candidates for each sample and keeps the best and the median one (audio/judge.py). Continuations and
    speech from earlier checkpoints follow, as the task `progress`. Returns the content of samples.json: the task,
    texts, verdicts and wav file names of each sample. Raises SodaError if no utterance is short enough for
    generate.max_seconds or the model's context, or if every task needs text and there is none.
    """
    from ..codecs.description import load_data_codec

    began = time.monotonic()
    check_writable(Path(recipe.run))
    model = load_model(folder)
    rows = held_out_rows(recipe.data_folder, recipe.generate.split, model, recipe.data.accept)
    assert model.codec is not None  # held_out_rows refuses a model without
    codec = load_data_codec(model.codec, str(model.device))
    studio = Studio(model, recipe, codec, Path(recipe.run) / "samples")
    held_out = choose(rows, studio.longest, studio.frame_rate, recipe.seed)
    if not held_out.usable:
        raise SodaError(
            f"no {recipe.generate.split} utterance is under {studio.longest / studio.frame_rate:.1f} seconds; raise "
            f"generate.max_seconds (now {recipe.generate.max_seconds:g}; the model's context is "
            f"{studio.decoder.context} tokens)"
        )
    tasks = possible_tasks(recipe, bool(held_out.spoken) and knows_text(recipe))
    if not held_out.translated and any(TASKS[name].translates for name in tasks):
        raise SodaError(
            f"generate.tasks={tasks}: no {recipe.generate.split} recording of a source and its translation is under "
            f"{studio.longest / studio.frame_rate:.1f} seconds together; raise generate.max_seconds, or leave "
            "translate out"
        )
    studio.out.mkdir(parents=True, exist_ok=True)
    # If this is interrupted, old captions must not end up beside new sounds.
    (studio.out / "samples.json").unlink(missing_ok=True)
    samples = take_samples(studio, tasks, held_out)
    write_json(studio.out / "samples.json", samples)
    kept = {name for entry in samples for name in entry["audio"].values()}
    for old in studio.out.glob("*.wav"):  # from a run with other settings
        if old.name not in kept:
            old.unlink()
    record_timing(Path(recipe.run), "generate", {"seconds": time.monotonic() - began})
    _print(samples, studio.out)
    return samples


def possible_tasks(recipe: Recipe, has_text: bool) -> list[str]:
    """The recipe's tasks, without (and reporting) those that need text if there is none. Raises SodaError if none is
    left."""
    tasks = recipe.generate.tasks
    left_out = [] if has_text else [name for name in tasks if TASKS[name].needs_text]
    if not left_out:
        return tasks
    said = f"{' and '.join(left_out)}: the data have no transcripts, so the model knows no text beside speech"
    if len(left_out) == len(tasks):
        raise SodaError(f"generate.tasks={tasks}: {said}")
    console.note("left out", f" {said}")
    return [name for name in tasks if name not in left_out]


def take_samples(studio: Studio, tasks: list[str], held_out: HeldOut) -> list[dict[str, Any]]:
    """generate.samples entries per task, then the progress of the tasks that make sound."""
    recipe, letters = studio.recipe, sum(len(row["text"]) for row in held_out.spoken)
    pace = sum(len(row["codes"]) for row in held_out.spoken) / studio.frame_rate / letters if letters else None
    jobs = [(TASKS[task], i) for task in tasks for i in range(recipe.generate.samples)]
    samples = []
    for number, (task, i) in enumerate(track(jobs, "generate", console=console)):
        rows = held_out.rows(task)
        row, seed = rows[number % len(rows)], recipe.seed + number
        samples.append(take_sample(studio, task, f"{task.name}_{i}", row, seed, pace))
    sounding = [name for name in tasks if not (TASKS[name].writes or TASKS[name].translates)]
    samples += progress(studio, sounding, held_out)
    for entry in samples:
        entry["export"] = studio.model.key  # so that the page notices samples from an earlier export
    return samples


def _print(samples: list[dict[str, Any]], out: Path) -> None:
    for sample in samples:
        text = f": {sample['output_text']!r}" if sample["output_text"] is not None else ""
        print(printable(f"{sample['task']:<11}{sample['id']:<28}{sample['note']}{text}"))
    if cut := [f"{sample['task']} {sample['id']}".strip() for sample in samples if sample["note"] == CUT]:
        console.note(
            "warning ",
            f"{CUT}: {', '.join(cut)}. generate.max_seconds and the model's context set the limit; a model that has "
            "not learned to stop always reaches it.",
        )
    print(printable(f"{sum(len(sample['audio']) for sample in samples)} wav files in {out}"))
