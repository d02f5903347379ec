"""Recognition: the words that a model writes down for recordings, against what is said in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import SodaError
from ...registry import SUITES, TASKS
from ..spoken import SYSTEMS, Figures, Heard, SpokenSuite, chosen, digest, error_figures, keep_items

if TYPE_CHECKING:
    from ..bench import Bench
    from ..speech_files import Recording

SHOTS = "asr_shots"  # the folder of examples
VERSION = 1  # of how it is measured


@SUITES.register
class Recognition(SpokenSuite):
    name = "asr"
    title = "Recognition: word error rate"
    about = (
        "The share of words that the model gets wrong when it writes down a recording. The columns beside it are a "
        "recogniser's, given the recordings and what the codec makes of them: the tokens cannot tell more than that."
    )

    def check(self, bench: "Bench") -> None:
        from ..words import check_whisper

        super().check(bench)
        check_whisper()
        self._examples(bench)
        self._items(bench)

    def _items(self, bench: "Bench") -> tuple[str, list["Recording"]]:
        from ..speech_files import speech

        source, every = speech(bench, self.name, needs_text=True)
        return source, chosen(every, bench.recipe.evaluate.documents)

    def _examples(self, bench: "Bench") -> list["Recording"]:
        """evaluate.shots of them, drawn by the seed, the same for all items. A text without words is no example."""
        import numpy as np

        from ...inference.held_out import held_out_rows
        from ..speech_files import held_out, listed, of_folder
        from ..words import authors_recognition

        settings = bench.recipe.evaluate
        if not settings.shots:
            return []
        folder = Path(settings.benchmarks) / SHOTS
        lot = np.random.default_rng(bench.recipe.seed)

        def drawn(every: Sequence[Any]) -> list[Any]:
            said = [one for one in every if authors_recognition(one.text, "")]
            if len(said) < settings.shots:
                raise SodaError(
                    f"evaluate.shots={settings.shots}: there are only {len(said)} recordings to draw from (of "
                    f"{len(every)}, the others have no words in their texts)"
                )
            return [said[i] for i in lot.permutation(len(said))[: settings.shots]]

        if settings.benchmarks and (Path(settings.benchmarks) / self.name).is_dir():
            if not folder.is_dir():
                raise SodaError(f"evaluate.shots={settings.shots}: {folder}, which has the examples, is not there")
            return of_folder(bench, drawn(listed(folder)))
        other = "test" if settings.split == "valid" else "valid"
        rows = held_out_rows(bench.recipe.data_folder, other, bench.model, bench.recipe.data.accept)
        return drawn(held_out(bench, rows, needs_text=True))

    def measure(self, bench: "Bench") -> dict[str, Any]:
        from .. import words
        from ..answers import answered, settings
        from ..sounds import LONG, again

        studio, task = bench.studio, TASKS["transcribe"]
        source, items = self._items(bench)
        examples: tuple[int, ...] = ()
        shots = self._examples(bench)
        for shot in shots:  # the authors normalise them
            said = " ".join(words.authors_recognition(shot.text, shot.language))
            examples += tuple(task.example(studio.material(text=said, codes=shot.codes)))
        materials = [studio.material(codes=item.codes, examples=examples) for item in items]
        answers = answered(bench, self.name, task, materials)
        texts = ["" if one is None else one.texts[0] for one in answers]
        heard = self._heard(bench, items)
        said = [item.text for item in items]
        figures = Figures([item.name for item in items])
        ended = [one is not None and one.ended_by_itself for one in answers]
        figures.count("ended by itself", sum(ended), "the model ended its text")
        without = [item.name for item, one in zip(items, answers, strict=True) if one is None]
        figures.count(LONG, len(without), "nothing could be asked: every word counts as wrong")
        normalisers = {"authors": words.authors_recognition, "whisper": words.whisper}
        columns = {system: Heard(said, of_it) for system, of_it in heard.items()} | {"model": Heard(said, texts)}
        languages = [item.language for item in items]
        rank = error_figures(figures, normalisers, languages, columns)
        rows = [
            {"name": item.name, "said": item.text, **{s: columns[s].heard[i] for s in columns}, "ended": ended[i]}
            for i, item in enumerate(items)
        ]
        sounds = {"original": lambda i: items[i].wave(), "codec": lambda i: again(bench, items[i])}
        return {
            **figures.result(),
            "source": source,
            "utterances": len(items),
            "shots": [shot.name for shot in shots],
            LONG.replace(" ", "_"): without,
            "normalisers": {
                "authors": "lower case, punctuation removed (version 1)",
                "whisper": words.check_whisper(),
            },
            "judges": bench.panel.identities,
            "drawn": settings(bench, task),
            "shown": keep_items(bench, self.name, rows, rank, sounds),
            "must_match": {
                "version": VERSION,
                "data": digest([part for item in items for part in (item.name, item.text, item.digest)]),
                "shots": digest([shot.digest for shot in shots]),
                "normalisers": words.check_whisper(),
            },
        }

    def _heard(self, bench: "Bench", items: Sequence["Recording"]) -> dict[str, list[str | None]]:
        """What the recogniser hears in the recordings and in what the codec makes of them."""
        from ..sounds import again

        judges = bench.panel.that("words")
        if not judges:
            return {}
        rate, languages = bench.codec.sample_rate, [item.language for item in items]
        originals = [item.wave for item in items]
        resynthesis = [lambda item=item: again(bench, item) for item in items]
        found = {}
        for system, sounds in zip(SYSTEMS, (originals, resynthesis), strict=False):
            verdicts = bench.panel.judged(sounds, rate, languages, f"{self.name}: {system}", ["words"])
            found[system] = verdicts[judges[0].name]
        found["codec"] = [text or "" for text in found["codec"]]
        return found
