"""How well generations keep the grammar: with it enforced, and how much the model knows of it by itself."""

from typing import Any

import numpy as np
from rich.console import Console

from ..hf.load import LoadedModel
from ..inference.sample import Constraint, sample

console = Console(stderr=True)
ROWS_AT_ONCE = 50


def evaluate_grammar(
    model: LoadedModel, codec: Any, count: int, max_tokens: int, seed: int, slots: int = 0
) -> dict[str, Any]:
    """`count` documents sampled from BOS at temperature 1 under the grammar, and `count` without.

    valid: whole documents by TokenSpace.check. duration_exact: every audio span decodes to frames x samples per frame.
    ended_by_itself: the token budget never had to force the end. legal_mass: the probability that the model gives to
    the legal tokens, a mean over all steps. Without a codec (text only, or frames of the semantic code alone: `slots`)
    no duration is measured.
    """
    constraint = Constraint(model.space, model.device, slots)
    arguments: dict[str, Any] = {"max_tokens": max_tokens, "stop": set()}
    valid = exact = ended = spans = 0
    mass: list[float] = []
    with console.status(f"{count} generations under the grammar"):
        for start in range(0, count, ROWS_AT_ONCE):
            rows = sample(
                model.model,
                constraint,
                [model.space.bos],
                count=min(ROWS_AT_ONCE, count - start),
                seed=seed + start,
                **arguments,
            )
            for row in rows:
                valid += model.space.check(np.array(row.ids), slots) is None
                ended += row.ended and not row.forced
                mass += row.legal_mass
                if codec is None:
                    continue
                codes = audio_spans(row.ids, model)
                waves = codec.decode(codes)
                spans += len(codes)
                exact += all(len(w) == len(c) * codec.samples_per_frame for w, c in zip(waves, codes, strict=True))
    result = {
        "generations": count,
        "valid": valid,
        **({} if codec is None else {"duration_exact": exact, "audio_spans": spans}),
        "ended_by_itself": ended,
        "legal_mass_mean": float(np.mean(mass)),
    }
    free_valid, free_mass = 0, []
    with console.status(f"{count} generations without the grammar"):
        for start in range(0, count, ROWS_AT_ONCE):
            for row in sample(
                model.model,
                constraint,
                [model.space.bos],
                count=min(ROWS_AT_ONCE, count - start),
                seed=seed + count + start,
                constrained=False,
                **arguments,
            ):
                free_valid += row.ended and row.valid
                free_mass += row.legal_mass
    return result | {"free_valid": free_valid, "free_legal_mass_mean": float(np.mean(free_mass))}


def audio_spans(ids: list[int], model: LoadedModel) -> list[np.ndarray]:
    """Codes (frames, codebooks) of every audio span of a whole document."""
    array = np.array(ids)
    starts, ends = np.flatnonzero(array == model.space.audio_start), np.flatnonzero(array == model.space.audio_end)
    return [model.space.codes(array[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]
