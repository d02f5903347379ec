"""`training`, `optimizer`, `schedule`, `precision`, `checkpoint` and `logging`: how a model is trained."""

import math
from dataclasses import field
from typing import Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from .fields import SECTION, Above0, AtLeast0, Count, CountOrZero, Share, need


@dataclass(config=SECTION)
class Training:
    steps: Count = 1000
    global_batch_size: Count = 512
    """Sequences of a step."""
    micro_batch_size: Count = 1
    """Sequences that a rank computes at once."""
    branch_from: str = ""
    """A checkpoint of another run that a new run starts from, steps and data going on."""
    init_from: str = ""
    """A checkpoint whose weights a new run starts with; its steps, optimizer and data are its own."""
    loss_weights: dict[str, AtLeast0] = field(default_factory=dict)
    """By token class (text, marker, semantic, ..); the others have 1."""
    z_loss: AtLeast0 = 1e-4
    head_rows: Literal["all", "legal"] = "all"
    """legal: the softmax of a position is over the tokens that the grammar allows there, a fraction of the work. all:
    over all tokens, as in the paper."""
    head_full_share: Share = 0.0
    """With head_rows=legal, the share of positions whose softmax is over all rows, for decoders without the grammar."""
    recompute: bool = False
    """Activations of a layer are computed again in the backward pass, not kept."""
    backend: Literal["auto", "transformer_engine", "local"] = "auto"
    """Whose layers."""
    valid_every: Count = 250
    valid_windows: Count = 16


@dataclass(config=SECTION)
class Optimizer:
    name: Literal["adamw", "cautious"] = "adamw"
    """adamw: the paper's word. cautious: its code, which is Cautious AdamW with decay scaled by rate / peak."""
    cautious_mask: Literal["stacked", "layer"] = "stacked"
    """The mean of the cautious mask is over a matrix of all layers together (stacked, the paper's code), or of one."""
    learning_rate: AtLeast0 = 0.0
    """Peak. 0: the paper's rule, 0.003 sqrt(global batch / 256) sqrt(1024 / max(hidden, 1024))."""
    weight_decay: AtLeast0 = 0.033
    beta1: Share = 0.98
    beta2: Share = 0.98
    epsilon: Above0 = 1e-16
    clip_grad: AtLeast0 = 1.0
    """Largest gradient norm. 0: gradients are not clipped."""


@dataclass(config=SECTION)
class Schedule:
    name: Literal["wsd", "cosine", "decay"] = "wsd"
    """wsd: warm-up, stable, linear decay. decay: from the peak to 0 since training.branch_from."""
    warmup_share: Share = 0.1
    """Of the steps."""
    decay_share: Share = 0.2
    """Of the steps; wsd only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        need(
            self.warmup_share + self.decay_share <= 1,
            "schedule.warmup_share and schedule.decay_share are over 1 together",
        )
        return self


@dataclass(config=SECTION)
class Precision:
    dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    """fp8: Transformer Engine's FP8 matrix products, all else in bf16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "tensorwise"
    bf16_layers: CountOrZero = 0
    """Under fp8, so many layers at either end stay in bf16 (the head always does)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        n = self.bf16_layers
        need(
            n == 0 or self.dtype == "fp8",
            f"precision.bf16_layers={n} says which layers are not in FP8; it needs precision.dtype=fp8",
        )
        need(
            n == 0 or self.fp8_recipe != "delayed",
            "precision.bf16_layers cannot be combined with precision.fp8_recipe=delayed; take tensorwise or blockwise",
        )
        return self


@dataclass(config=SECTION)
class Checkpoint:
    save_every: Count = 250
    async_save: bool = False
    """Checkpoints are written while training goes on."""
    keep_last: CountOrZero = 0
    """Newest checkpoints that are kept. 0: all."""
    keep_every: CountOrZero = 0
    """Besides, those of every so many steps."""


@dataclass(config=SECTION)
class Logging:
    log_every: Count = 10
    peak_tflops: AtLeast0 = 0.0
    """Of one device, for the MFU. 0: from the table in training/metrics.py."""
    wandb_project: str = ""
    """Log to Weights & Biases too."""


def rule_learning_rate(global_batch_size: int, hidden_size: int) -> float:
    """The paper's peak rate (section 4). It treats widths under 1024 as 1024: SODA-135M has 512 and takes 600M's."""
    return 0.003 * math.sqrt(global_batch_size / 256) * math.sqrt(1024 / max(hidden_size, 1024))
