"""The file that describes an ablation: one recipe, and the values of what is varied."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..config.fields import SECTION, CountOrZero, near
from ..config.yaml_files import read_yaml
from ..errors import SodaError
from ..registry import SUITES

Parts = dict[str, Any]  # of a recipe: {data: {mix: ..}}
Name = Annotated[str, Field(pattern=r"^[\w.%+ -]+$")]


@dataclass(config=SECTION)
class Ablation:
    recipe: str
    """The recipe that all runs build on. A relative path starts at the study's folder."""
    values: Annotated[dict[Name, Parts | None], Field(min_length=1)]
    """What each value changes in the recipe, in the order of the tables and plots."""
    seeds: list[CountOrZero] = field(default_factory=list)
    """Every value is trained with each. Empty: the recipe's seed."""
    stores: dict[Name, Parts | None] = field(default_factory=dict)
    """Data to prepare, each with what it changes in the recipe. Elsewhere in this file, `store:NAME` stands for the
    folder of its stores."""
    evaluate: list[str] = field(default_factory=list)
    """Evaluation suites to measure every trained model with, besides the NLL vector of its validation data."""
    name: str = "ablation"
    folder: str = "runs/ablation"
    """Where stores, runs and results go."""
    source: str = ""  # the file; set by load_ablation

    @property
    def recipe_path(self) -> Path:
        return Path(self.source).parent / Path(self.recipe).expanduser()


_ABLATION: TypeAdapter[Ablation] = TypeAdapter(Ablation)


def load_ablation(path: str | Path) -> Ablation:
    """Reads an ablation (YAML). Raises SodaError that names every wrong key."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise SodaError(f"{path}: not a study (.yaml); examples/ablations holds some")
    values = read_yaml(path)
    if not isinstance(values, dict) or not {"recipe", "values"} <= values.keys():
        raise SodaError(f"{path}: an ablation is a mapping with the keys recipe and values")
    try:
        study = _ABLATION.validate_python({**_named(values), "source": str(path)})
    except ValidationError as error:
        lines = [f"{path}: {_message(problem)}" for problem in error.errors(include_url=False)]
        raise SodaError("\n".join(dict.fromkeys(lines))) from None
    for suite in study.evaluate:
        if suite not in SUITES:
            raise SodaError(f"{path}: evaluate: no suite {suite}.{near(suite, SUITES.names())}")
    return study


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """With names as text: the value 2.5 of a text ratio is a key in YAML, too."""
    made = dict(values)
    for key in ("values", "stores"):
        if isinstance(made.get(key), dict):
            made[key] = {str(name): parts for name, parts in made[key].items()}
    return made


def _message(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    if problem["type"] == "unexpected_keyword_argument":
        known = [name for name in Ablation.__dataclass_fields__ if name != "source"]
        return f"unknown key {key}.{near(key, known)}"
    return f"{key}: {problem['msg']}"
