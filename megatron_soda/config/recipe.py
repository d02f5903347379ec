"""The recipe: its sections, and checks across them."""

from dataclasses import field, replace
from pathlib import Path
from typing import Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from .data import Data
from .fields import SECTION, need
from .model import Model
from .parallel import Parallel
from .prepare import Prepare
from .training import Checkpoint, Logging, Optimizer, Precision, Schedule, Training, rule_learning_rate
from .use import Evaluate, Export, Generate


@dataclass(config=SECTION)
class Recipe:
    name: str = "soda"
    run: str = "runs/soda"
    """The run folder, where everything is written."""
    seed: int = 1234
    prepare: Prepare = field(default_factory=Prepare)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = field(default_factory=Precision)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    export: Export = field(default_factory=Export)
    evaluate: Evaluate = field(default_factory=Evaluate)
    generate: Generate = field(default_factory=Generate)

    @property
    def data_folder(self) -> Path:
        return Path(self.data.path) if self.data.path else Path(self.run) / "data"

    def on_one_rank(self) -> "Recipe":
        """A copy for one process of any machine. An FP8 model runs in bf16, the type of its weights: documents have any
        length."""
        dtype = "fp32" if self.precision.dtype == "fp32" else "bf16"
        chosen = replace(self.training, fuse_swiglu=None, fuse_rope=None, fuse_gradients=None, cuda_graphs=None)
        return replace(self, parallel=Parallel(), precision=Precision(dtype=dtype), training=chosen)

    @model_validator(mode="after")
    def _check(self) -> Self:
        t, precision = self.training, self.precision
        need(
            not (t.branch_from and t.init_from),
            "training.branch_from goes on with a run and training.init_from takes weights alone: set one of them",
        )
        need(
            bool(t.branch_from) or self.schedule.name != "decay",
            "schedule.name=decay continues another run: set training.branch_from to one of that run's checkpoints",
        )
        need(
            t.backend != "local" or precision.dtype != "fp8",
            "precision.dtype=fp8 needs Transformer Engine; training.backend=local has no FP8",
        )
        need(
            2 * precision.bf16_layers < self.model.num_layers,
            f"precision.bf16_layers={precision.bf16_layers} at either end leaves none of "
            f"model.num_layers={self.model.num_layers} in FP8",
        )
        every, saves = self.evaluate.every, self.checkpoint.save_every
        need(
            every % saves == 0,
            f"evaluate.every={every}: checkpoints are evaluated, so it must be a multiple of "
            f"checkpoint.save_every={saves}",
        )
        if self.optimizer.learning_rate == 0:
            rate = rule_learning_rate(t.global_batch_size, self.model.hidden_size)
            self.optimizer = replace(self.optimizer, learning_rate=rate)
        return self
