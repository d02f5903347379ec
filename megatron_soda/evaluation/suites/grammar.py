"""How well generations follow the grammar when it is enforced, and how much of it the model has learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...registry import SUITES
from ..suite import Row, Suite

if TYPE_CHECKING:
    from ...hf.load import LoadedModel
    from ...inference.decoder import Decoder
    from ...inference.sample import Constraint, Sampled
    from ...inference.task import Prompt
    from ..bench import Bench
    from ..kept import Kept

ROWS_AT_ONCE = 50
VERSION = 1  # of the generations in a run's evaluate/grammar.jsonl
KEPT = ("ids", "ended", "forced", "valid", "legal_mass")
MEANINGS = {
    "valid": "follow the token grammar from start to end",
    "duration_exact": "every audio span decodes to exactly its number of frames",
    "audio_spans": "audio spans in all these generations",
    "ended_by_itself": "were ended by the model, not by the length limit",
    "legal_mass_mean": "mean probability the model puts on legal tokens before the grammar removes the others",
    "free_valid": "follow the grammar although it is not enforced",
    "free_legal_mass_mean": "mean probability the model itself puts on tokens the grammar allows",
}
SHARES = ("legal_mass_mean", "free_legal_mass_mean")


@SUITES.register
class TokenGrammar(Suite):
    name = "grammar"
    title = "Token grammar"
    about = (
        "Generated sound is only playable if its tokens come in the right order, frame by frame. These are counts over "
        "sampled generations; “free” means that the grammar was not enforced."
    )
    needs = ("data",)
    absent = "The token grammar has not been tested yet: eval.json is missing or has no “grammar” part."

    def measure(self, bench: "Bench") -> dict[str, Any]:
        test, settings = bench.data[0], bench.recipe.evaluate
        # Text alone, or one code per frame, cannot be decoded to sound.
        codec = bench.codec if bench.has_codec and test.slots == test.space.codebooks else None
        count, most, seed = settings.generations, settings.max_tokens, bench.recipe.seed
        kept = Path(bench.recipe.run) / "evaluate" / "grammar.jsonl"
        return evaluate_grammar(bench.model, codec, count, most, seed, test.slots, kept=kept)

    def rows(self, result: Mapping[str, Any]) -> list[Row]:
        counts = {"audio_spans": None, **dict.fromkeys(SHARES, 1.0)}
        return [
            Row(key, result[key], of=counts.get(key, result.get("generations")), meaning=meaning)
            for key, meaning in MEANINGS.items()
            if key in result
        ]

    def rest(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in result.items() if key not in MEANINGS}


def evaluate_grammar(
    model: "LoadedModel", codec: Any, count: int, max_tokens: int, seed: int, slots: int = 0, *, kept: Path
) -> dict[str, Any]:
    """`count` documents sampled from BOS at temperature 1 under the grammar, and `count` without.

    valid: whole documents by TokenSpace.check. duration_exact: every audio span decodes to frames x samples per frame.
    ended_by_itself: the token budget never had to force the end. legal_mass: the probability that the model gives to
    legal tokens, averaged over all steps. Without a codec (text alone, or semantic codes only: see `slots`), durations
    are not measured. kept: a file for the generations, from which an interrupted evaluation goes on.
    """
    from ...console import console
    from ...inference.decoder import Decoder
    from ...inference.sample import Constraint
    from ...inference.task import Prompt
    from ..kept import Kept

    constraint, decoder = Constraint(model.space, model.device, slots), Decoder(model.model)
    prompt = Prompt([model.space.bos], set(), max_tokens)
    with Kept(kept, [VERSION, model.key, slots, max_tokens], _sampled) as before:
        with console.status(f"{count} generations with the grammar"):
            held = _generations(decoder, constraint, prompt, count, seed, before, constrained=True)
        with console.status(f"{count} generations without the grammar"):
            free = _generations(decoder, constraint, prompt, count, seed + count, before, constrained=False)
    return {
        "generations": count,
        "valid": sum(model.space.check(np.array(row.ids), slots) is None for row in held),
        **({} if codec is None else _durations(held, model, codec)),
        "ended_by_itself": sum(row.ended_by_itself for row in held),
        "legal_mass_mean": _mean_mass(held),
        "free_valid": sum(row.ended and row.valid for row in free),
        "free_legal_mass_mean": _mean_mass(free),
    }


def _generations(
    decoder: "Decoder",
    constraint: "Constraint",
    prompt: "Prompt",
    count: int,
    seed: int,
    kept: "Kept",
    *,
    constrained: bool,
) -> list["Sampled"]:
    """Documents sampled from BOS on, ROWS_AT_ONCE at a time, or those kept."""
    from ...inference.sample import sample

    found: list[Sampled] = []
    for start in range(0, count, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, count - start)
        name = f"{rows} from {seed + start}, {'' if constrained else 'not '}constrained"
        if name not in kept.values:
            drawn = sample(
                *(decoder, constraint, [prompt]),
                count=rows,
                seed=seed + start,
                constrained=constrained,
                statistics=True,
            )
            kept.add(name, [{key: getattr(row, key) for key in KEPT} for row in drawn])
            kept.values[name] = drawn
        found += kept.values[name]
    return found


def _sampled(rows: Any) -> list["Sampled"]:
    from ...inference.sample import Sampled

    return [Sampled(**row) for row in rows]


def _durations(rows: list["Sampled"], model: "LoadedModel", codec: Any) -> dict[str, int]:
    exact = spans = 0
    for row in rows:
        codes = audio_spans(row.ids, model)
        waves = codec.decode(codes)
        spans += len(codes)
        exact += all(len(w) == len(c) * codec.samples_per_frame for w, c in zip(waves, codes, strict=True))
    return {"duration_exact": exact, "audio_spans": spans}


def _mean_mass(rows: list["Sampled"]) -> float:
    return float(np.mean([mass for row in rows for mass in row.legal_mass]))


def audio_spans(ids: list[int], model: "LoadedModel") -> list[np.ndarray]:
    """Codes (frames, codebooks) of every audio span in a complete document."""
    array = np.array(ids)
    starts, ends = np.flatnonzero(array == model.space.audio_start), np.flatnonzero(array == model.space.audio_end)
    return [model.space.codes(array[a + 1 : b]) for a, b in zip(starts, ends, strict=True)]
