"""Continuation: whether the model goes on in the voice that it heard, and sounds like speech."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...registry import SUITES, TASKS
from ..spoken import SYSTEMS, SpokenSuite, chosen, digest

if TYPE_CHECKING:
    from ..bench import Bench
    from ..sounds import Sounds
    from ..speech_files import Recording
    from ..spoken import Figures

PROMPT = 3.0  # seconds that the model hears, at most half of the recording (the authors')
LONGEST = 12.0  # seconds that it may go on (the authors')
VERSION = 1  # of how it is measured


@SUITES.register
class Continuation(SpokenSuite):
    name = "continuation"
    title = "Continuation: voice and sound"
    about = (
        "The model hears the beginning of a recording, at most three seconds, and goes on. How often it stops by "
        "itself, whether it sounds like speech, and how near the voice is to that of the beginning. The columns beside "
        "it are the rest of the recording and what the codec makes of that."
    )

    def check(self, bench: "Bench") -> None:
        super().check(bench)
        self._items(bench)

    def _items(self, bench: "Bench") -> tuple[str, list["Recording"]]:
        from ..speech_files import speech

        source, every = speech(bench, self.name, needs_text=False)
        return source, chosen([one for one in every if len(one.codes) >= 2], bench.recipe.evaluate.documents)

    def measure(self, bench: "Bench") -> dict[str, Any]:
        from ..answers import answered, settings
        from ..sounds import LONG, Sounds, again, endings, of_answer, own_or_again, state_of
        from ..spoken import Figures, keep_items

        source, items = self._items(bench)
        rate = bench.studio.frame_rate
        given = [max(1, min(round(PROMPT * rate), len(item.codes) // 2)) for item in items]
        materials = [
            bench.studio.material(frames + round(LONGEST * rate), codes=item.codes, given=frames)
            for item, frames in zip(items, given, strict=True)
        ]
        answers = answered(bench, self.name, TASKS["continue"], materials)
        state = [state_of(one, frames) for one, frames in zip(answers, given, strict=True)]
        figures = Figures([item.name for item in items])
        endings(figures, state)
        skips = [frames * bench.codec.samples_per_frame for frames in given]
        each = list(enumerate(items))
        columns = {
            "original": [lambda i=i, item=item: item.wave()[skips[i] :] for i, item in each],
            "codec": [lambda i=i, item=item: again(bench, item)[skips[i] :] for i, item in each],
            "model": [lambda i=i: of_answer(bench, answers[i])[skips[i] :] for i, _ in each],
        }
        sounds = Sounds(bench, self.name, columns, [item.language for item in items])
        wrong = _plausible(bench, figures, sounds, items)
        begun = [lambda i=i, item=item: own_or_again(bench, item)[: skips[i]] for i, item in each]
        sounds.figures(figures, begun, "the beginning")
        heard = _words(bench, figures, sounds)
        rows = [
            {"name": item.name, "said": item.text, **{s: texts[i] for s, texts in heard.items()}, "state": state[i]}
            for i, item in each
        ]
        return {
            **figures.result(),
            "source": source,
            "utterances": len(items),
            LONG.replace(" ", "_"): [item.name for item, one in zip(items, state, strict=True) if one == LONG],
            "judges": bench.panel.identities,
            "drawn": {**settings(bench, TASKS["continue"]), "prompt_seconds": PROMPT, "most_seconds": LONGEST},
            "shown": keep_items(bench, self.name, rows, wrong, sounds.players()),
            "must_match": {
                "version": VERSION,
                "data": digest([part for item in items for part in (item.name, item.digest)]),
                "judges": bench.panel.identities,
            },
        }


def _plausible(bench: "Bench", figures: "Figures", sounds: "Sounds", items: Sequence["Recording"]) -> Any:
    """Adds how many sound like speech at all (audio/judge.py). Returns 1 for each of the model's that does not."""
    import numpy as np

    from ...audio.judge import judge, level_of
    from ..sounds import again

    levels = [level_of(again(bench, item)) for item in items]
    found = {}
    for system in SYSTEMS:
        values = np.zeros((2, len(items)))
        for i, sound in enumerate(sounds.columns[system]):
            wave = sound()
            if len(wave) or system == "model":
                told = judge(wave, bench.codec.sample_rate, level=levels[i], expected=None, ended=True, nats=0.0)
                values[:, i] = not told.problems, 1
        found[system] = values[0], values[1]
    figures.mean("plausible", "neither too short, too quiet nor mostly silent", found, of=1.0)
    return 1 - found["model"][0]


def _words(bench: "Bench", figures: "Figures", sounds: "Sounds") -> dict[str, list[str | None]]:
    """Adds how many words a second are heard: babble has few. Returns what is heard."""
    import numpy as np

    from ..words import authors_synthesis

    heard = sounds.heard()
    columns = {}
    for system, texts in heard.items():
        seconds = np.array([len(sound()) for sound in sounds.columns[system]]) / bench.codec.sample_rate
        spoken = zip(texts, sounds.languages, strict=True)
        counts = np.array([float(len(authors_synthesis(text or "", language))) for text, language in spoken])
        columns[system] = counts, seconds
    if columns:
        figures.mean("words a second", "that the recogniser hears", columns)
    return heard
