"""What suites measure with: the model, and anything else they may need."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..codecs.base import Codec
from ..codecs.description import load_data_codec
from ..config import Recipe
from ..data.store import Store
from ..errors import SodaError
from ..hf.load import LoadedModel, load_model
from ..inference.held_out import held_out_rows
from ..inference.studio import Studio
from .panel import Panel, place_for_kept


class Bench:
    """An exported model under evaluation. Stores and codec are loaded once, on first use. model: instead of the one
    in the folder. training: the folder of the run, while it is trained. Then all ranks wait, so stores are not read
    through, and what does not depend on the checkpoint is kept in that folder."""

    def __init__(
        self, recipe: Recipe, folder: Path, model: LoadedModel | None = None, training: Path | None = None
    ) -> None:
        self.recipe, self.folder, self.training = recipe, folder, training
        self.run = training or Path(recipe.run)
        self.model = model or load_model(folder)
        self.model.model.float()  # as the paper measured; with bf16 activations a likelihood would depend on its batch

    @cached_property
    def data(self) -> tuple[Store, Store]:
        """The held-out store and the training store. Raises SodaError unless both are made for this model and, except
        while training, intact."""
        stores = Store(self.recipe.data_folder / self.recipe.evaluate.split), Store(self.recipe.data_folder / "train")
        for store in stores:
            store.check_space(self.model.space, str(self.folder))
            store.check_made_by(self.model.made_by, f"the model {self.folder}", self.recipe.data.accept)
            if self.training is None:
                store.verify()  # or the results would reflect the damage
        return stores

    @property
    def softmax(self) -> Literal["all", "legal"]:
        """Over which tokens the model was trained to choose: over those a likelihood is taken."""
        return self.recipe.training.head_rows

    @cached_property
    def utterances(self) -> list[dict[str, Any]]:
        """The held-out utterances (data/units.py SCHEMA). SodaError if there are none for this model."""
        chosen = self.recipe.evaluate
        return held_out_rows(self.recipe.data_folder, chosen.split, self.model, self.recipe.data.accept)

    @cached_property
    def slots(self) -> int:
        """Codes per frame in the documents that the model was trained on."""
        path = self.recipe.data_folder / self.recipe.evaluate.split
        if path.with_name(f"{path.name}.json").is_file():
            return Store(path).slots
        return 1 if self.recipe.prepare.orders == ["semantic-only"] else self.model.space.codebooks

    @property
    def has_codec(self) -> bool:
        return self.model.codec is not None

    @cached_property
    def codec(self) -> Codec:
        """The codec of the model's tokens, on the model's device. SodaError if it has none."""
        if self.model.codec is None:
            raise SodaError(
                f"{self.folder}: no codec in it: the model knows no sound, so it cannot be measured on sound. "
                f"Leave such suites out of evaluate.suite (now {self.recipe.evaluate.suite})."
            )
        return load_data_codec(self.model.codec, str(self.model.device))

    @cached_property
    def studio(self) -> Studio:
        """For generating. Sounds are saved in RUN/evaluate."""
        return Studio(self.model, self.recipe, self.codec, Path(self.recipe.run) / "evaluate")

    @cached_property
    def panel(self) -> Panel:
        """The recipe's judges of sounds."""
        chosen = self.recipe.evaluate
        return Panel(chosen.judges, place_for_kept(chosen.benchmarks, str(self.run)) / "judged")

    def header(self, *, with_data: bool) -> dict[str, Any]:
        """What eval.json says about the model, and about the data if they were used."""
        found: dict[str, Any] = {"model": self.model.name, "step": self.model.step}
        if with_data:
            test, chosen = self.data[0], self.recipe.evaluate
            found |= {"split": chosen.split, "documents": chosen.documents or len(test)}
        found["export"] = self.model.key
        if with_data:
            found["data"] = [store.fingerprint for store in self.data]
        return found
