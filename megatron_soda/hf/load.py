"""A model to use: an exported folder, with its token space, tokenizer and codec."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Recipe, load_recipe
from ..errors import SodaError
from ..files import read_json
from ..tokenizer import TextTokenizer, data_tokenizer
from ..vocab import TokenSpace


@dataclass
class Model:
    folder: Path
    name: str
    step: int
    model: Any  # transformers' Qwen3ForCausalLM, in eval mode
    space: TokenSpace
    made_by: dict[str, str]  # fingerprints of the codec and the tokenizer of its ids
    text: TextTokenizer
    device: torch.device


def resolve(target: str | Path, overrides: list[str]) -> Recipe:
    """The recipe behind a YAML file, a run folder or an exported folder, with overrides applied."""
    target = Path(target)
    if target.is_dir():
        if not (target / "recipe.yaml").is_file():
            raise SodaError(
                f"{target}: no recipe.yaml in it; give a recipe, a run folder or a model that soda exported"
            )
        # Folders move: what a run holds is looked for where it is now.
        run = target.parent if (target / "soda.json").is_file() else target
        here = [f"run={run}"] if (run / "recipe.yaml").is_file() else []
        return load_recipe(target / "recipe.yaml", [*here, *overrides])
    if target.suffix not in (".yaml", ".yml"):
        raise SodaError(f"{target}: not a folder, and not a recipe (.yaml)")
    return load_recipe(target, overrides)


def model_folder(target: str | Path, recipe: Recipe) -> Path:
    """The exported folder of `target`; a run is exported first if its newest checkpoint is not yet."""
    target = Path(target)
    if (target / "soda.json").is_file():
        return target
    from .export import export

    return export(recipe)


def quiet_transformers() -> None:
    """Errors only, and no progress bars of its own: it warns of a context shorter than Llama-3's, which is meant."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(folder: Path) -> Model:
    """Raises SodaError if `folder` is not a model that `soda export` wrote."""
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    described = read_json(folder / "soda.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
        model = model.to(device).eval()
    except (OSError, ValueError) as error:
        raise SodaError(f"{folder}: cannot load the model ({error})") from None
    if device.type == "cpu" and model.num_parameters() < 100e6:
        torch.set_num_threads(1)  # a token at a time, threads cost such a model more than they give
    space = TokenSpace(**described["space"])
    text = data_tokenizer(folder)
    made_by = described.get("made_by") or _made_by(folder, text)
    return Model(folder, described["name"], described["step"], model, space, made_by, text, device)


def _made_by(folder: Path, text: TextTokenizer) -> dict[str, str]:
    """Of an export of an earlier version, which did not say it: what lies in the folder."""
    codec = {"codec": read_json(folder / "codec.json")["fingerprint"]} if (folder / "codec.json").is_file() else {}
    return {**codec, "tokenizer": text.fingerprint}
