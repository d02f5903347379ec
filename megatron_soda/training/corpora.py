"""The stores that a run trains and validates on, and whether they are those that its checkpoint was trained on."""

import zlib
from typing import Any

from ..config import Recipe
from ..data.mixture import Mixture, Stage
from ..data.store import Store
from ..data.windows import Windows
from ..errors import SodaError
from .origin import Origin


def first_store(recipe: Recipe) -> Store:
    """Any one of the training stores: they all have one token space."""
    return next(iter(_training_stores(recipe).values()))


def _training_stores(recipe: Recipe) -> dict[str, Store]:
    named = {name: Store(path) for name, path in recipe.data.corpora.items()}
    return named or {"train": Store(recipe.data_folder / "train")}


class Corpora:
    """`windows` is the stream of training samples, `valid` what is validated on, `description` what of this belongs in
    a checkpoint."""

    def __init__(self, recipe: Recipe, origin: Origin) -> None:
        d = recipe.data
        self.windows = _open_mixture(recipe, origin)
        self.valid = Windows(Store(recipe.data_folder / "valid"), d.sequence_length, recipe.seed)
        self.valid.store.check_space(self._any_store.space, "the training data")
        self.description: dict[str, Any] = {
            "seed": recipe.seed,
            "data.sequence_length": d.sequence_length,
            "data.align_windows": d.align_windows,
            "tokens": {name: corpus.store.size for name, corpus in self.windows.corpora.items()},
        }

    @property
    def _any_store(self) -> Store:
        return next(iter(self.windows.corpora.values())).store

    def check_same(self, recipe: Recipe, origin: Origin) -> None:
        """The steps behind us must have used up what the recipe says they have, or data would be lost or repeated."""
        saved, samples = origin.saved, origin.first_sample(origin.step)
        if saved["samples"] != samples:
            raise SodaError(
                f"the checkpoint of step {saved['step']} has seen {saved['samples']} samples, and by this recipe "
                f"it would be {samples}: training.global_batch_size={recipe.training.global_batch_size} is not what it "
                "was. Set it back, or branch a new run off: training.branch_from"
            )
        used = (saved["consumed"], self.windows.consumed(samples))
        before, now = ({name: count for name, count in of.items() if count} for of in used)
        if before != now:
            raise SodaError(
                f"the shares of steps that are done were changed: by data.mix, step {saved['step']} has used up "
                f"{now} samples, but the checkpoint says {before}. Leave the stages that are done as they were, and "
                f"add one with from_step: {saved['step']} or later"
            )
        was = saved.get("data", self.description)
        for key, value in self.description.items():
            pairs = [(key, was[key], value)]
            if key == "tokens":  # of corpora that are new, or were never used, nothing can be repeated
                pairs = [(f"corpus {n}: tokens", was[key][n], value[n]) for n in value if n in was[key] and n in before]
            for what, old, new in pairs:
                if old != new:
                    raise SodaError(
                        f"{what} was {old} when the checkpoint of step {saved['step']} was written, and is {new}: the "
                        "data would come in another order, and some again. Set it back, or start a new run."
                    )


def _open_mixture(recipe: Recipe, origin: Origin) -> Mixture:
    """The training data as a stream of samples, from the recipe's corpora in their shares."""
    d, branch = recipe.data, origin.branch
    corpora = {
        # Corpora of one size must not go through their windows in the same order: they may be of the same documents.
        name: Windows(store, d.sequence_length, recipe.seed + zlib.crc32(name.encode()), d.align_windows)
        for name, store in _training_stores(recipe).items()
    }
    # Stages are counted from step 0 of the run branched off, so that the same mix goes on with the same samples.
    stages = [Stage(origin.first_sample(stage.from_step), stage.shares) for stage in d.mix]
    if stages and d.mix[0].from_step > branch.step:
        raise SodaError(
            f"data.mix: the first stage is from_step {d.mix[0].from_step}, but training begins at step {branch.step}"
        )
    stages = stages or [Stage(branch.samples, {next(iter(corpora)): 1.0})]
    return Mixture(corpora, stages, branch.samples, branch.consumed)
