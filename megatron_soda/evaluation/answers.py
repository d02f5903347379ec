"""What a model answers to many prompts, kept as it comes."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from ..console import console
from ..errors import SodaError
from ..inference.own import Answer, Chance, answer
from ..inference.task import Material, Prompt, Task
from .kept import Kept

if TYPE_CHECKING:
    from .bench import Bench

BATCH = 16
VERSION = 2  # of the answers in a run's evaluate/*-answers.jsonl


def answered(bench: "Bench", name: str, task: Task, materials: Sequence[Material]) -> list[Answer | None]:
    """The answer to each material, drawn as the paper does for the task; None if the prompt leaves no room in the
    model's context. An item's random numbers depend on the seed and its place alone.

    RUN/evaluate/NAME-answers.jsonl keeps them, so that an interrupted suite goes on where it was.
    """
    prompts = [_prompt(task, material) for material in materials]
    fitting = [i for i, prompt in enumerate(prompts) if prompt]
    key = [VERSION, bench.model.key, task.name, task.temperature, task.top_p, bench.recipe.generate.weights]
    path = bench.studio.out / f"{name}-answers.jsonl"
    found: list[Answer | None] = [None] * len(materials)
    with Kept(path, key) as kept:
        for start in track(range(0, len(fitting), BATCH), f"{name}: generate", console=console):
            chosen, seed = fitting[start : start + BATCH], bench.recipe.seed + start
            digest = _digest([(prompts[i], materials[i].to) for i in chosen], seed)
            if digest not in kept.values:
                answers = answer(bench.studio, task, [materials[i] for i in chosen], Chance(seed))
                kept.add(digest, [_to_json(one) for one in answers])
            for i, value in zip(chosen, kept.values[digest], strict=True):
                found[i] = _from_json(value, bench.model.space.codebooks)
    return found


def settings(bench: "Bench", task: Task) -> dict[str, Any]:
    """How answers are drawn, for the result."""
    return {"temperature": task.temperature, "top_p": task.top_p, "seed": bench.recipe.seed}


def _prompt(task: Task, material: Material) -> Prompt | None:
    try:
        return task.prompt(material)
    except SodaError:  # no room
        return None


def _digest(asked: Sequence[tuple[Prompt | None, str]], seed: int) -> str:
    """asked: prompts, and the languages to translate to."""
    parts = [[prompt.ids, prompt.max_tokens, to] for prompt, to in asked if prompt]
    return hashlib.sha256(json.dumps([seed, parts]).encode()).hexdigest()[:32]


def _to_json(one: Answer) -> dict[str, Any]:
    codes = None if one.codes is None else one.codes.tolist()
    return {"texts": one.texts, "codes": codes, "ended_by_itself": one.ended_by_itself}


def _from_json(value: dict[str, Any], codebooks: int) -> Answer:
    codes = None if value["codes"] is None else np.array(value["codes"], np.int16).reshape(-1, codebooks)
    return Answer(value["texts"], codes, value["ended_by_itself"])
