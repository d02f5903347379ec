"""Spoken translation: whether what the model says ends, is the translation, is what it wrote, and has the source's
voice (paper, section 9)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...registry import SUITES, TASKS
from ..spoken import SpokenSuite, chosen, digest

if TYPE_CHECKING:
    from ...inference.own import Answer
    from ..bench import Bench
    from ..speech_files import Recording
    from ..spoken import Heard

VERSION = 1  # of how it is measured


@dataclass(frozen=True)
class Item:
    source: "Recording"
    target: "Recording"
    other: "Recording | None"  # another speaker's


@SUITES.register
class SpokenTranslation(SpokenSuite):
    name = "translation"
    title = "Spoken translation: word error rate and voice"
    about = (
        "The model hears recordings, writes down what is said, translates that and speaks the translation. First, how "
        "often it stops by itself: what is missing, empty or cut off counts as all wrong. Then the share of words that "
        "a recogniser hears differently from the reference, and from the model's own text; and how near the voice is "
        "to the source's. The columns beside it are of the recorded translations and of what the codec makes of them."
    )
    needs = ("codec", "utterances")

    def check(self, bench: "Bench") -> None:
        super().check(bench)
        self.normalisers(bench)
        self._items(bench)

    def _items(self, bench: "Bench") -> list[Item]:
        from ..speech_files import held_out, translated

        pairs = chosen(translated(bench, self.name), bench.recipe.evaluate.documents)
        sources, targets = (held_out(bench, rows, needs_text=True) for rows in zip(*pairs, strict=True))
        every = held_out(bench, bench.utterances, needs_text=False)
        return [Item(*pair, _other(*pair, every)) for pair in zip(sources, targets, strict=True)]

    def measure(self, bench: "Bench") -> dict[str, Any]:
        import numpy as np

        from .. import words
        from ..answers import answered, settings
        from ..sounds import ENDED, LONG, Sounds, again, endings, of_answer, own_or_again, state_of
        from ..spoken import Figures, Heard, error_figures, keep_items

        items, task = self._items(bench), TASKS["translate"]
        materials = [bench.studio.material(codes=item.source.codes, to=item.target.language) for item in items]
        answers = answered(bench, self.name, task, materials)
        state = [state_of(one) for one in answers]
        written = [_written(one) for one in answers]
        said, languages = [item.target.text for item in items], [item.target.language for item in items]
        figures = Figures([item.source.name for item in items])
        endings(figures, state)
        columns = {
            "original": [item.target.wave for item in items],
            "codec": [lambda target=item.target: again(bench, target) for item in items],
            "model": [lambda one=one: of_answer(bench, one) for one in answers],
        }
        sounds = Sounds(bench, self.name, columns, languages)
        heard, rank = sounds.heard(state), np.array([float(one != ENDED) for one in state])
        if heard:
            normalisers, order = {"authors": words.authors_synthesis, "whisper": words.whisper}, ("utterance", "corpus")
            against = {system: Heard(said, texts) for system, texts in heard.items()}
            rank = error_figures(figures, normalisers, languages, against, order)
            own = _own(written, said, heard["model"])
            error_figures(figures, normalisers, languages, {"model": own}, order, "own text: WER")
        sources = [lambda source=item.source: own_or_again(bench, source) for item in items]
        sounds.figures(figures, sources, "the source's recording")
        if any(item.other for item in items):
            nothing = np.zeros(0, np.float32)
            others = [lambda other=item.other: own_or_again(bench, other) if other else nothing for item in items]
            sounds.voices(figures, others, "another speaker's recording", "similarity to another speaker")
        rows = [
            {
                "name": item.source.name,
                "source": item.source.text,
                "reference": item.target.text,
                "written_source": written[i][0],
                "written": written[i][1],
                **{system: texts[i] for system, texts in heard.items()},
                "state": state[i],
                "language": item.target.language,
                "prompt": item.target.prompt,
            }
            for i, item in enumerate(items)
        ]
        recordings = [one for item in items for one in (item.source, item.target, item.other) if one]
        fixed = {"judges": bench.panel.identities, "normalisers": self.normalisers(bench)}
        players = {"source": lambda i: sources[i](), **sounds.players()}
        return {
            **figures.result(),
            "source": f"held-out translations ({bench.recipe.evaluate.split})",
            "utterances": len(items),
            LONG.replace(" ", "_"): [row["name"] for row in rows if row["state"] == LONG],
            **fixed,
            "drawn": settings(bench, task),
            "shown": keep_items(bench, self.name, rows, rank, players),
            "must_match": {
                "version": VERSION,
                "data": digest([part for one in recordings for part in (one.name, one.text, one.digest)]),
                **fixed,
            },
        }


def _other(source: "Recording", target: "Recording", every: list["Recording"]) -> "Recording | None":
    """Another speaker's recording: neither side's speaker and in the source's language, if there is one; of those the
    closest in length."""
    others = [one for one in every if source.speaker and one.speaker and one.speaker != source.speaker]
    return min(
        others,
        key=lambda one: (
            one.speaker == target.speaker,
            one.language != source.language,
            abs(len(one.codes) - len(source.codes)),
            one.name,
        ),
        default=None,
    )


def _written(one: "Answer | None") -> tuple[str, str]:
    """Both texts, without the tag of the source's language, which the model writes itself."""
    from ...inference.tasks.translate import LANGUAGE

    return ("", "") if one is None else (LANGUAGE.sub("", one.texts[0], count=1), one.texts[1])


def _own(written: list[tuple[str, str]], said: list[str], heard: list[str | None]) -> "Heard":
    """What is heard against the model's own text. Without one, every word of the reference counts as wrong."""
    from ..spoken import Heard

    texts = [text if any(map(str.isalnum, text)) else "" for _, text in written]
    return Heard(
        [text or reference for text, reference in zip(texts, said, strict=True)],
        [one if text else "" for text, one in zip(texts, heard, strict=True)],
    )
