"""The file that describes an IsoFLOP study: its budgets, its widths, and the rules that turn them into runs."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..config.fields import SECTION, Above0, AtLeast0, Count, CountOrZero, near
from ..config.yaml_files import read_yaml
from ..errors import SodaError

Accounting = Literal["forward", "total", "6nd"]


@dataclass(config=SECTION)
class Budget:
    """Runs of one budget: every width with every seed. A budget may be listed several times."""

    flops: Above0
    """Of a run, forward and backward pass, counted as the paper's authors do (model/size.py: study_flops)."""
    widths: list[Count]
    seeds: list[CountOrZero] = field(default_factory=list)
    """Empty: the recipe's seed."""


@dataclass(config=SECTION)
class Rules:
    """How a width and a budget become a run. The defaults are the paper's (section 6)."""

    head_dim: Count = 128
    ffn_factor: Count = 4
    """Width of the feed-forward layer, as a multiple of the model's."""
    width_per_layer: AtLeast0 = 0
    """Layers = width / this, at least 1. 0: the paper's rule, width / (57 + 4 log2 width)."""
    most_steps: Count = 65536
    """The batch is the smallest power of two (in sequences) that needs at most this many steps."""
    any_batch: bool = False
    """The batch is the smallest whole number instead: then all runs take nearly the same number of steps."""
    rate_constant: Above0 = 0.33
    """Peak learning rate = this x sqrt(batch) / width, with the batch in units of 4,096 tokens."""
    learning_rate: AtLeast0 = 0
    """One peak learning rate for all runs. 0: by `rate_constant`."""
    rate_limit: AtLeast0 = 0.01
    """The batch is halved while the rate is above this. 0: no limit."""
    smallest_batch: Count = 8
    """Runs with fewer sequences are dropped."""
    steps_limit: CountOrZero = 400_000
    """Runs of this many steps or more are dropped. 0: no limit."""
    tolerance: Above0 = 0.01
    """Runs that miss their budget by more than this share are dropped."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.98
    beta2_tokens: AtLeast0 = 128 * 4096
    """Adam's beta2 is `beta2` at this many tokens a step, and has the same half-life in tokens at any other number.
    0: always `beta2`."""


@dataclass(config=SECTION)
class Prune:
    """Leaves out runs that are far from an optimum that is already known: params x (flops of the budget /
    flops)^exponent parameters."""

    params: Above0
    flops: Above0
    exponent: float
    factor: Annotated[float, Field(gt=1)] = 4.0
    """Models smaller or larger than the optimum by more than this factor are left out."""


@dataclass(config=SECTION)
class Study:
    recipe: str
    """The recipe that all runs build on. A relative path starts at the study's folder."""
    budgets: list[Budget]
    targets: list[Budget] = field(default_factory=list)
    """Runs after the sweep: to bracket a minimum, or to test a prediction."""
    name: str = "isoflop"
    folder: str = "runs/isoflop"
    """Where runs and results go."""
    accounting: Accounting = "total"
    """What the column `flops` of a plan counts; the runs are the same. forward: the forward pass, as in the authors'
    code. total: forward and backward, as the paper labels its budgets. 6nd: 6 x all parameters x tokens."""
    head_rows: CountOrZero = 0
    """Rows of the head that cost something at a position, the mean. 0: all. With training.head_rows=legal in the recipe
    it is one codebook's entries in SODA's data, more with training.head_other_share."""
    rules: Rules = field(default_factory=Rules)
    prune: Prune | None = None
    mfu: Above0 = 0.4
    """Model FLOPs utilisation, for the GPU-hours."""
    device_tflops: Above0 = 989.0
    """Peak of one device, for the GPU-hours."""
    source: str = ""  # the file; set by load_study

    @property
    def recipe_path(self) -> Path:
        return Path(self.source).parent / Path(self.recipe).expanduser()


_STUDY: TypeAdapter[Study] = TypeAdapter(Study)


def load_study(path: str | Path) -> Study:
    """Reads a study (YAML). Raises SodaError that names every wrong key."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml"):
        raise SodaError(f"{path}: not a study (.yaml); examples/isoflop holds some")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise SodaError(f"{path}: a study is a mapping with the keys recipe and budgets")
    try:
        return _STUDY.validate_python({**values, "source": str(path)})
    except ValidationError as error:
        lines = [f"{path}: {_message(problem)}" for problem in error.errors(include_url=False)]
        raise SodaError("\n".join(dict.fromkeys(lines))) from None


def _message(problem: Any) -> str:
    location = problem["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if problem["type"] == "unexpected_keyword_argument":
        sections = (Study, Budget, Rules, Prune)
        known = [name for section in sections for name in section.__dataclass_fields__ if name != "source"]
        return f"unknown key {key}.{near(str(location[-1]), known)}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"the key {key} is missing"
    if problem["type"] == "dataclass_type":
        return f"{key}: must be a mapping of keys, not {problem['input']!r}"
    message = problem["msg"].removeprefix("Input should be ")
    return f"{key}={problem['input']!r}: must be {message}"
