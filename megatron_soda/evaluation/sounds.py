"""What the suites of generated sound share: how generations end, and what judges of voices and of quality say."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .spoken import SYSTEMS, Figures, Values, cosines, scores

if TYPE_CHECKING:
    from ..inference.own import Answer
    from .bench import Bench
    from .judge import Judge
    from .panel import Lazy
    from .speech_files import Recording

ENDED, CUT, EMPTY, LONG = "ended by itself", "cut off", "empty", "longer than the context"
STATES = {
    ENDED: "the model stopped by itself, after some sound",
    CUT: "the limit stopped it",
    EMPTY: "it stopped before any sound",
    LONG: "the prompt leaves no room in the model's context",
}


def state_of(one: "Answer | None", given: int = 0) -> str:
    """given: leading frames that are not the model's."""
    if one is None:
        return LONG
    if one.codes is None or len(one.codes) <= given:
        return EMPTY
    return ENDED if one.ended_by_itself else CUT


def endings(figures: Figures, state: Sequence[str]) -> None:
    """Adds how many ended in which way, first of all those that ended by themselves."""
    ended = np.array([float(one == ENDED) for one in state])
    figures.mean(ENDED, STATES[ENDED], {"model": (ended, np.ones(len(state)))}, of=1.0)
    for name in (CUT, EMPTY, LONG):
        figures.count(name, state.count(name), STATES[name])


def of_answer(bench: "Bench", one: "Answer | None") -> np.ndarray:
    """float32 (samples,): the sound of an answer, empty if there is none."""
    if one is None or one.codes is None or not len(one.codes):
        return np.zeros(0, np.float32)
    return bench.codec.decode([one.codes])[0]


def again(bench: "Bench", recording: "Recording") -> np.ndarray:
    """float32 (samples,): what the codec makes of a recording."""
    return bench.codec.decode([recording.codes])[0]


def own_or_again(bench: "Bench", recording: "Recording") -> np.ndarray:
    """The recording, or what the codec makes of it if there is none."""
    own = recording.wave()
    return own if len(own) else again(bench, recording)


class Sounds:
    """The sounds of all items in three columns, with the verdicts on them."""

    def __init__(self, bench: "Bench", suite: str, columns: dict[str, list["Lazy"]], languages: Sequence[str]) -> None:
        self.bench, self.suite, self.columns, self.languages = bench, suite, columns, languages
        self.verdicts = {system: self.judged(columns[system], system) for system in SYSTEMS}

    def judged(self, sounds: Sequence["Lazy"], what: str, measures: Sequence[str] = ()) -> dict[str, list[Any]]:
        rate = self.bench.codec.sample_rate
        return self.bench.panel.judged(sounds, rate, self.languages, f"{self.suite}: {what}", measures)

    def heard(self, state: Sequence[str] = ()) -> dict[str, list[str | None]]:
        """What the recogniser hears; None: there is no recording. Empty without a recogniser. state: of the model's
        generations; in one that did not end by itself nothing counts as heard."""
        judges = self.bench.panel.that("words")
        if not judges:
            return {}
        found = {system: list(verdicts[judges[0].name]) for system, verdicts in self.verdicts.items()}
        found |= {system: [text or "" for text in found[system]] for system in SYSTEMS[1:]}
        if state:
            found["model"] = [t if one == ENDED else "" for t, one in zip(found["model"], state, strict=True)]
        return found

    def figures(self, figures: Figures, references: Sequence["Lazy"], reference: str) -> None:
        """Adds how near the voices are to those of `references`, and how good everything sounds. A generation without
        sound counts as the worst."""
        self.voices(figures, references, reference, "similarity")
        for judge in self.bench.panel.that("quality"):
            columns = {system: scores(*self._of(judge, system)) for system in SYSTEMS}
            figures.mean(f"quality, {judge.name}", judge.about, columns)

    def voices(self, figures: Figures, references: Sequence["Lazy"], reference: str, name: str) -> None:
        """Adds rows NAME, JUDGE: how near the voices are to those of `references`."""
        given = self.judged(references, reference, ["voice"])
        for judge in self.bench.panel.that("voice"):
            columns: dict[str, Values | None] = {}
            for system in SYSTEMS:
                verdicts, worst = self._of(judge, system)
                columns[system] = cosines(verdicts, given[judge.name], worst)
            meaning = f"{judge.about} to {reference}; 0 without sound"
            figures.mean(f"{name}, {judge.name}", meaning, columns, of=1.0)

    def _of(self, judge: "Judge", system: str) -> tuple[list[Any], float | None]:
        """A column's verdicts, and what an item without sound counts as."""
        return self.verdicts[system][judge.name], None if system == "original" else judge.worst

    def players(self) -> dict[str, Callable[[int], np.ndarray]]:
        """By column, the sound of an item."""
        return {system: (lambda i, sounds=sounds: sounds[i]()) for system, sounds in self.columns.items()}
