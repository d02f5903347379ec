"""What a study is to the code that trains it: a list of runs, each with a recipe. isoflop/ and ablations/ make them."""

from collections.abc import Sequence
from typing import Any, Protocol

from ..config import Recipe


class Run(Protocol):
    @property
    def id(self) -> str: ...  # also the name of its folder
    @property
    def steps(self) -> int: ...
    @property
    def params_total(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def cost(self) -> float: ...  # FLOPs, forward and backward


class Study(Protocol):
    name: str
    folder: str  # runs and results go there
    source: str  # its file


class Plan(Protocol):
    @property
    def study(self) -> Study: ...
    @property
    def runs(self) -> Sequence[Any]: ...  # of Run
    @property
    def suites(self) -> Sequence[str]: ...  # evaluation suites to measure every trained model with

    def recipe_of(self, run: Any) -> Recipe: ...
    def columns(self, run: Any) -> dict[str, Any]: ...  # what a result says of its run, besides what was measured
