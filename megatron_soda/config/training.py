"""`training`, `optimizer`, `schedule`, `precision`, `checkpoint` and `logging`: how a model is trained."""

import math
from dataclasses import field
from typing import Annotated, Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from .fields import SECTION, Above0, AtLeast0, Count, CountOrZero, OrNone, Share, need


@dataclass(config=SECTION)
class Training:
    steps: Count = 1000
    global_batch_size: Count = 512
    """Sequences per step."""
    micro_batch_size: Count = 1
    """Sequences that a rank processes at once."""
    branch_from: str = ""
    """A checkpoint of another run to continue from in a new run. Step count and data continue too."""
    init_from: str = ""
    """A checkpoint whose weights a new run starts with. Steps, optimizer and data start afresh."""
    loss_weights: dict[str, AtLeast0] = field(default_factory=dict)
    """Loss weights by token class (text, marker, semantic, ..). Default: 1."""
    z_loss: AtLeast0 = 1e-4
    head_rows: Literal["all", "legal"] = "all"
    """legal: the softmax of a position is over the tokens that the grammar allows there, a fraction of the work. all:
    over all tokens, as in the paper."""
    head_other_share: Share = 0.0
    """With head_rows=legal, the share of the other tokens that compete too, in turns, for decoders without the grammar.
    """
    recompute: bool = False
    """Recompute the activations inside layers in the backward pass instead of keeping them."""
    backend: Literal["auto", "transformer_engine", "local"] = "auto"
    """Whose layers to use. auto: Transformer Engine's where possible."""
    fuse_swiglu: Annotated[bool | None, OrNone] = None
    """SwiGLU as one function that keeps only its input: a Triton kernel on CUDA, torch elsewhere. Empty: yes."""
    fuse_rope: Annotated[bool | None, OrNone] = None
    """Rotary positions as one function: Transformer Engine's kernel on CUDA, torch on a CPU. Empty: where it is there.
    """
    fuse_gradients: Annotated[bool | None, OrNone] = None
    """Transformer Engine's matrix products add gradients of weights to their sum. Empty: with its layers."""
    cuda_graphs: Annotated[bool | None, OrNone] = None
    """Launch the feed-forward parts of Transformer Engine's layers as CUDA graphs. Empty: no."""
    valid_every: Count = 250
    valid_windows: Count = 16


@dataclass(config=SECTION)
class Optimizer:
    name: Literal["adamw", "cautious"] = "adamw"
    """adamw: as the paper says. cautious: as its code does, Cautious AdamW with decay scaled by rate / peak."""
    cautious_mask: Literal["stacked", "layer"] = "stacked"
    """What the mean of the cautious mask covers: a matrix in all layers (stacked, as in the paper's code) or in one."""
    learning_rate: AtLeast0 = 0.0
    """Peak rate. 0: the paper's rule, 0.003 sqrt(global batch / 256) sqrt(1024 / max(hidden, 1024))."""
    weight_decay: AtLeast0 = 0.033
    beta1: Share = 0.98
    beta2: Share = 0.98
    epsilon: Above0 = 1e-16
    clip_grad: AtLeast0 = 1.0
    """Maximum gradient norm. 0: no clipping."""


@dataclass(config=SECTION)
class Schedule:
    name: Literal["wsd", "cosine", "decay"] = "wsd"
    """wsd: warm-up, stable, linear decay. decay: from the peak to 0, starting at training.branch_from."""
    warmup_share: Share = 0.1
    """Share of the steps."""
    decay_share: Share = 0.2
    """Share of the steps; wsd only."""
    final_share: Share = 0.0
    """The rate that a cosine ends at, as a share of the peak."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        need(
            self.warmup_share + self.decay_share <= 1,
            "schedule.warmup_share and schedule.decay_share add up to more than 1",
        )
        need(
            not self.final_share or self.name == "cosine",
            f"schedule.final_share={self.final_share:g} is for schedule.name=cosine; {self.name} ends at 0",
        )
        return self


@dataclass(config=SECTION)
class Precision:
    dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    """fp8: Transformer Engine's FP8 matrix products, everything else in bf16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "tensorwise"
    bf16_layers: CountOrZero = 0
    """With fp8, the number of layers at either end that stay in bf16 (the head always does)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        n = self.bf16_layers
        need(
            n == 0 or self.dtype == "fp8",
            f"precision.bf16_layers={n} keeps layers out of FP8, so it needs precision.dtype=fp8",
        )
        need(
            n == 0 or self.fp8_recipe != "delayed",
            "precision.bf16_layers cannot be combined with precision.fp8_recipe=delayed; use tensorwise or blockwise",
        )
        return self


@dataclass(config=SECTION)
class Checkpoint:
    save_every: Count = 250
    async_save: bool = False
    """Write checkpoints while training continues."""
    keep_last: CountOrZero = 0
    """How many of the newest checkpoints to keep. 0: all."""
    keep_every: CountOrZero = 0
    """Also keep the checkpoints at multiples of this many steps. 0: none."""


@dataclass(config=SECTION)
class Logging:
    log_every: Count = 10
    peak_tflops: AtLeast0 = 0.0
    """Peak of one device, for MFU. 0: from the table in training/metrics.py."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project."""


def rule_learning_rate(global_batch_size: int, hidden_size: int) -> float:
    """The paper's peak rate (section 4). It treats widths under 1024 as 1024: SODA-135M has 512 and takes 600M's."""
    return 0.003 * math.sqrt(global_batch_size / 256) * math.sqrt(1024 / max(hidden_size, 1024))
