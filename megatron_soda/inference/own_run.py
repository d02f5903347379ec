"""Runs a task on people's own sounds and texts: progress, files, what is printed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..audio.judge import CUT
from ..console import console
from ..errors import SodaError, printable
from ..files import check_writable, write_json
from ..registry import TASKS
from .decoder import Weights
from .own import Answer, Chance, answer, open_studio, read_examples
from .studio import Studio
from .task import Material
from .tasks.translate import LANGUAGE

BATCH = 8  # documents generated at once
SHOW_EVERY = 0.2  # seconds


@dataclass(frozen=True)
class Ask:
    """What a task is asked to do, once."""

    name: str  # the file, or the text
    stem: str  # of the name of its sound
    material: Material
    about: dict[str, Any] = field(default_factory=dict)  # more for results.json


@dataclass(frozen=True)
class How:
    """What all these commands are told."""

    out: Path | None
    shots: Path | None
    chance: Chance
    codec: str = ""
    weights: Weights = ""


def run_task(folder: Path, name: str, how: How, ask: Callable[[Studio], list[Ask]], to: str = "") -> list[dict]:
    """Does a task with what `ask` makes of the user's arguments. Returns the entries of results.json. Sounds and
    results.json go to how.out; nothing is written without it. Raises SodaError before the first generation if an
    argument cannot be used."""
    task = TASKS[name]
    studio = open_studio(folder, how.codec, how.weights, how.out or Path())
    shots = read_examples(studio, task, how.shots, to) if how.shots else ()
    asks = [replace(one, material=replace(one.material, examples=shots)) for one in ask(studio)]
    for one in asks:
        try:
            task.prompt(one.material)
        except SodaError as error:
            raise SodaError(f"{one.name}: {error}") from None
    if how.out:
        check_writable(how.out)
    entries = []
    with _progress(len(asks)) as advance:
        for start in range(0, len(asks), BATCH):
            some = asks[start : start + BATCH]
            chance = replace(how.chance, seed=how.chance.seed + start)
            materials = [one.material for one in some]
            found = answer(studio, task, materials, chance, lambda row, token: advance(0))
            entries += [_entry(studio, name, one, result) for one, result in zip(some, found, strict=True)]
            if how.out:  # each time: an interruption leaves what is done
                write_json(how.out / "results.json", entries)
            advance(len(some))
    _print(entries, how.out)
    return entries


def _entry(studio: Studio, task: str, ask: Ask, found: Answer) -> dict[str, Any]:
    entry: dict[str, Any] = {"task": task, "input": ask.name, **ask.about}
    if len(found.texts) > 1:  # of a translation, the source comes first
        language = LANGUAGE.match(found.texts[0])
        entry |= {"language": language[1] if language else ask.material.language}
        entry |= {"source_text": LANGUAGE.sub("", found.texts[0], count=1)}
    if found.texts:
        entry |= {"text": found.texts[-1]}
    if found.codes is not None:
        (wave,) = studio.codec.decode([found.codes])
        entry |= {"audio": studio.save(ask.stem, wave), "seconds": len(wave) / studio.codec.sample_rate}
    return {**entry, "ended_by_itself": found.ended_by_itself}


@contextmanager
def _progress(count: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `count` answers and how many tokens are done. Call with the number of answers that became
    known, or with 0 for a token."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tokens, shown = 0, time.monotonic()
    with Progress(*columns, TextColumn("{task.fields[tokens]:,} tokens"), console=console, transient=True) as progress:
        job = progress.add_task("generating", total=count, tokens=0)

        def advance(answers: int) -> None:
            nonlocal tokens, shown
            tokens += not answers
            if answers or time.monotonic() - shown > SHOW_EVERY:
                shown = time.monotonic()
                progress.update(job, advance=answers, tokens=tokens)

        yield advance


def _print(entries: list[dict[str, Any]], out: Path | None) -> None:
    for entry in entries:
        name = f"{entry['input']}: " if len(entries) > 1 else ""
        if "source_text" in entry:
            print(printable(f"{name}{entry['source_text']} -> {entry['text']}"))
        elif "text" in entry:
            print(printable(f"{name}{entry['text']}"))
        if "audio" in entry:
            assert out
            print(printable(f"{out / entry['audio']}: {entry['seconds']:.2f} s"))
        if not entry["ended_by_itself"]:
            console.note("warning ", f"{entry['input']}: {CUT}; the model did not end it by itself")


def stems(names: list[str], task: str) -> list[str]:
    """A file name without suffix for the sound of each file: its own and the task, numbered if two are the same."""
    made: list[str] = []
    for name in names:
        plain = f"{Path(name).stem}_{task}"
        same = sum(other == plain or other.startswith(f"{plain}_") for other in made)
        made.append(f"{plain}_{same + 1}" if same else plain)
    return made
