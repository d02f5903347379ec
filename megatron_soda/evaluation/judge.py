"""Defines judges of sound: recognisers, and models that compare voices or rate quality. Each is one class in one file
in judges/, marked `@JUDGES.register`, and is named in `evaluate.judges`.

A judge's file imports the package that it is made of only inside its methods.
"""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from ..errors import SodaError
from ..files import sha256

if TYPE_CHECKING:
    import numpy as np

EXTRA = "pip install 'megatron-soda[judges]'"
# Sounds, float32 (samples,) at `Judge.rate`, and their languages ("" where unknown) -> a verdict on each.
Verdicts: TypeAlias = "Callable[[Sequence[np.ndarray], Sequence[str]], list[Any]]"


class Judge(ABC):
    """A verdict, a JSON value, on every sound. None of the sounds is empty."""

    name: ClassVar[str]  # used in evaluate.judges; also the file name
    # The verdict: the words that are heard (str), the voice (list of floats, to compare by the cosine), or how good it
    # sounds (float, more is better).
    measures: ClassVar[Literal["words", "voice", "quality"]]
    about: ClassVar[str]
    package: ClassVar[str]  # its distribution, whose version is part of the result
    module: ClassVar[str]
    install: ClassVar[str] = EXTRA
    model: ClassVar[str] = ""  # the one that is used unless evaluate.judges names another, as NAME:MODEL
    rate: ClassVar[int] = 16_000  # Hz
    worst: ClassVar[float] = 0.0  # what a generation without sound counts as: of a cosine, or of a rating

    def check(self) -> None:
        """SodaError if the package is not installed."""
        if importlib.util.find_spec(self.module) is None:
            raise SodaError(
                f"evaluate.judges: {self.name} needs {self.package}, which is not installed: {self.install}. Without "
                "judges, evaluate.judges=[] still measures what needs none."
            )

    @abstractmethod
    def load(self, model: str) -> Verdicts:
        """model: a name or a folder. SodaError if it cannot be loaded."""

    def identity(self, model: str) -> dict[str, Any]:
        """What the verdicts depend on: it is stated in the result, and verdicts are kept by it."""
        found: dict[str, Any] = {"package": f"{self.package} {metadata.version(self.package)}"}
        if model:
            found["model"] = Path(model).name if Path(model).is_dir() else model
        if model and Path(model).is_dir():
            files = sorted(path for path in Path(model).iterdir() if path.is_file())
            found["files"] = {path.name: sha256(path)[:16] for path in files}
        return found
