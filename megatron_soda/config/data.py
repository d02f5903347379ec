"""`data`: the stores a run trains on, and how they are cut into windows."""

from dataclasses import field
from typing import Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from .fields import SECTION, Count, CountOrZero, need


@dataclass(config=SECTION)
class MixStage:
    """How samples are divided among the corpora from a step on. The shares of a stage sum to 1."""

    from_step: CountOrZero = 0
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(config=SECTION)
class Data:
    path: str = ""
    """Folder that holds the stores train, valid and test. Empty: RUN/data."""
    corpora: dict[str, str] = field(default_factory=dict)
    """Stores (paths without suffix) by name. Empty: only the store `train`."""
    mix: list[MixStage] = field(default_factory=list)
    """The shares of the corpora. Required if there are several."""
    sequence_length: Count = 4096
    """Tokens per window."""
    reset_positions: bool = False
    """Positions count from the start of the document, not of the window (SODA). Attention never leaves a document and
    rotary positions are relative, so the two differ only by rounding. Transformer Engine always resets."""
    align_windows: bool = False
    """No window begins inside an audio frame. Costs codebooks - 1 tokens per window."""
    pack: bool = False
    """Windows hold whole documents, packed by best fit, not consecutive tokens. For fine-tuning."""
    prompt_spans: CountOrZero = 0
    """With pack, how many leading spans (text or audio) of a document are its prompt, which has no loss. 0: none."""
    accept: list[Literal["codec", "tokenizer", "validation"]] = field(default_factory=list)
    """What may deliberately differ from what the model was trained with."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        need(
            len(self.corpora) < 2 or bool(self.mix),
            f"data.corpora has {len(self.corpora)} corpora; data.mix must give their shares",
        )
        need(
            self.pack or not self.prompt_spans,
            f"data.prompt_spans={self.prompt_spans} needs data.pack=true: a prompt's end shows in whole documents only",
        )
        need(
            not (self.pack and self.align_windows),
            "data.pack=true packs whole documents, so data.align_windows has nothing to align: set one of them",
        )
        need(bool(self.corpora) or not self.mix, "data.mix has shares, but data.corpora has no corpora")
        return self
