"""Chooses the held-out utterances for the tasks."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Recipe
from ..data.store import Store
from ..data.units import translations
from ..errors import SodaError
from ..hf.load import LoadedModel
from .task import Task


@dataclass
class HeldOut:
    """Rows of unit shards that are short enough, in order of use."""

    usable: list[dict[str, Any]]
    spoken: list[dict[str, Any]]  # those with a transcript
    translated: list[dict[str, Any]]  # sources, with the row of their translation as `translation`

    def rows(self, task: Task) -> list[dict[str, Any]]:
        return self.translated if task.translates else self.spoken if task.needs_text else self.usable


def choose(rows: list[dict[str, Any]], longest: int, frame_rate: float, seed: int) -> HeldOut:
    """Utterances of 2 to `longest` frames, shuffled; those under 1.5 seconds, mostly single letters, come last."""
    order = np.random.default_rng(seed)

    def ordered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        shuffled = [rows[i] for i in order.permutation(len(rows))]
        return sorted(shuffled, key=lambda row: len(row["codes"]) < 1.5 * frame_rate)

    usable = [row for row in rows if 2 <= len(row["codes"]) <= longest]
    pairs = [{**source, "translation": target} for source, target in translations(rows)]
    fitting = [row for row in pairs if len(row["codes"]) + len(row["translation"]["codes"]) <= longest]
    return HeldOut(ordered(usable), ordered([row for row in usable if row["text"]]), ordered(fitting))


def held_out_rows(folder: Path, split: str, model: LoadedModel, accept: Collection[str] = ()) -> list[dict[str, Any]]:
    """Utterances of a data folder's split, made with the model's codec and for its token space."""
    from ..data.units import read_units

    store = Store(folder / split)
    store.check_space(model.space, str(model.folder))
    if not (folder / "codec.json").is_file() or model.codec is None:
        raise SodaError(f"{folder}: there is no speech in these data, so there is nothing to continue or to speak like")
    if store.slots < store.space.codebooks:
        raise SodaError(
            f"{store.path}: semantic-only documents have one code per frame, from which no sound can be made"
        )
    store.check_made_by(model.made_by, f"the model {model.folder}", accept)
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise SodaError(f"{path}: no such file; was the data prepared by `soda prepare`?")
    return [row for row in read_units([path]) if len(row["codes"])]  # a translation may have no sound


def knows_text(recipe: Recipe, tokens: int = 1 << 22) -> bool:
    """Whether the first documents of the held-out store contain a transcript."""
    store = Store(recipe.data_folder / recipe.generate.split)
    return bool(np.any(store.read(0, min(tokens, store.size)) == store.space.text_start))
