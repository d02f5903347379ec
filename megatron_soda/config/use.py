"""`export`, `evaluate` and `generate`: what is done with a trained model."""

from dataclasses import field
from typing import Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from ..registry import JUDGES, SUITES, TASKS
from .fields import SECTION, Above0, Count, CountOrZero, choice, need


@dataclass(config=SECTION)
class Export:
    weights: Literal["", "fp32", "bf16"] = ""
    """Format of the exported weights. Empty: as they are in the checkpoint."""


@dataclass(config=SECTION)
class Evaluate:
    suite: list[str] = field(default_factory=lambda: ["nll", "grammar"])
    every: CountOrZero = 0
    """Also evaluate while training, every so many steps: a multiple of checkpoint.save_every. 0: not."""
    during_training: list[str] = field(default_factory=lambda: ["nll"])
    """The suites that are measured then."""
    split: Literal["train", "valid", "test"] = "test"
    documents: CountOrZero = 0
    """Documents to score. 0: all."""
    benchmarks: str = ""
    """Folder of the benchmarks: each in a subfolder of its name (docs/evaluation.md)."""
    judges: list[str] = field(default_factory=lambda: ["whisper", "resemblyzer"])
    """Who judges sounds, in asr, tts, continuation and translation: NAME or NAME:MODEL, as in whisper:some/folder."""
    shots: CountOrZero = 0
    """Examples that precede each recording in the suite asr."""
    generations: CountOrZero = 100
    """Generations for the grammar suite."""
    max_tokens: CountOrZero = 400
    """Maximum length of a generation."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, names in (("suite", self.suite), ("during_training", self.during_training)):
            for name in names:
                choice(f"evaluate.{key}", name, SUITES.names())
        need(
            not self.every or bool(self.during_training),
            f"evaluate.every={self.every}, and evaluate.during_training names no suite",
        )
        for name in self.judges:
            choice("evaluate.judges", name.partition(":")[0], JUDGES.names())
        judges = [name.partition(":")[0] for name in self.judges]
        need(len(set(judges)) == len(judges), f"evaluate.judges={self.judges} has a judge twice")
        return self


@dataclass(config=SECTION)
class Generate:
    tasks: list[str] = field(default_factory=lambda: ["continue", "speak", "transcribe"])
    samples: CountOrZero = 2
    """Samples per task."""
    candidates: Count = 5
    """Candidates drawn per sample; the best and the median one are kept."""
    split: Literal["valid", "test"] = "test"
    text: str = ""
    """Speak this instead of held-out sentences."""
    temperature: Above0 = 0.9
    top_p: Above0 = 0.95
    max_seconds: Above0 = 6.0
    """Longest utterance that is used, and longest sound; a text of your own may take as long as its letters need."""
    prompt_seconds: Above0 = 1.0
    """Length of the prompt for a continuation."""
    weights: Literal["", "bf16", "int8"] = ""
    """Format of the weights on a CPU: bf16 and int8 make large models faster. Empty: as exported."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.tasks:
            choice("generate.tasks", name, TASKS.names())
        return self
