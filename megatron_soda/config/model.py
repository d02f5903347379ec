"""`model`: a Qwen3-style decoder and presets for its sizes."""

import math
from typing import Annotated, Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from ..errors import SodaError
from .fields import SECTION, Above0, AtLeast0, Count, CountOrZero, OrNone, near, need

SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim")

# layers, hidden, ffn, heads, query groups, head_dim, tied embeddings. 135m to 4b: the paper's SODA-base, section 3.
# 150m: its ablations. 600m-prelim: its multilingual predecessor. `isoflop-WIDTH` follows its scaling study.
PRESETS = {
    "tiny": (3, 128, 384, 4, 2, 32, False),
    "135m": (15, 512, 1792, 8, 8, 64, False),
    "150m": (20, 512, 1792, 8, 8, 64, True),
    "600m": (28, 1024, 3072, 16, 8, 128, False),
    "600m-prelim": (28, 1024, 3072, 16, 8, 64, False),
    "1.7b": (28, 2048, 6144, 16, 8, 128, False),
    "4b": (36, 2560, 9728, 32, 8, 128, False),
}


def isoflop_preset(width: int) -> tuple[int, int, int, int, int, int, bool]:
    """The IsoFLOP study's model of a given width (paper, section 6): depth grows with width, ffn 4 x, heads of 128."""
    heads = max(1, width // 128)
    return (round(width / (64 + 4 * math.log2(width) - 7)), width, 4 * width, heads, heads, 128, False)


def preset(name: str) -> tuple[int, int, int, int, int, int, bool]:
    """The sizes of a preset. Raises SodaError for an unknown name and suggests the nearest."""
    if name in PRESETS:
        return PRESETS[name]
    family, _, width = name.partition("-")
    if family == "isoflop":
        if width.isdigit() and int(width) >= 128 and int(width) % 128 == 0:
            return isoflop_preset(int(width))
        raise SodaError(f"model.preset={name}: the width must be a multiple of 128, as in isoflop-1024")
    known = ", ".join([*PRESETS, "isoflop-WIDTH"])
    raise SodaError(f"model.preset={name}: no such preset.{near(name, list(PRESETS), 0)} Known: {known}")


@dataclass(config=SECTION)
class Model:
    preset: str = "tiny"
    """Fills in every size left at 0: tiny, 135m, 150m, 600m, 600m-prelim, 1.7b, 4b, isoflop-WIDTH."""
    num_layers: CountOrZero = 0
    hidden_size: CountOrZero = 0
    ffn_hidden_size: CountOrZero = 0
    num_attention_heads: CountOrZero = 0
    num_query_groups: CountOrZero = 0
    head_dim: CountOrZero = 0
    tie_embeddings: Annotated[bool | None, OrNone] = None
    """null: as in the preset."""
    norm_epsilon: Above0 = 1e-5
    init: Literal["", "normal", "levanter"] = ""
    """normal: uses init_std. levanter: by fan-in, like the paper's library (model/gpt.py). Empty: as in the preset."""
    init_std: Above0 = 0.02
    """For init=normal."""
    embedding_class_std: AtLeast0 = 0.0
    """Std of a vector that the embeddings of all ids of a class share at the start. SODA does not use one. It lets a
    model learn within a few steps which slot of a frame it is at, so small models learn several times faster."""
    head_class_std: AtLeast0 = 0.0
    """The same for the head."""
    rope_theta: Count = 500_000
    rope_scaling_factor: Above0 = 8.0
    """Llama-3's scaling, with its other constants. 1: no scaling."""

    @model_validator(mode="after")
    def _fill_and_check(self) -> Self:
        *sizes, tied = preset(self.preset)
        for name, size in zip(SIZES, sizes, strict=True):
            if getattr(self, name) == 0:
                setattr(self, name, size)
        if self.tie_embeddings is None:
            self.tie_embeddings = tied
        self.init = self.init or ("normal" if self.preset == "tiny" else "levanter")
        need(
            self.init == "normal" or self.init_std == Model.init_std,
            f"model.init_std={self.init_std}: model.init={self.init} draws by fan-in; init_std is for "
            "model.init=normal",
        )
        need(
            self.num_attention_heads % self.num_query_groups == 0,
            f"model.num_query_groups={self.num_query_groups} does not divide "
            f"model.num_attention_heads={self.num_attention_heads}",
        )
        need(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim}: rotary positions need an even number")
        return self
