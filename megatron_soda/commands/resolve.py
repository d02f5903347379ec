"""Finds the recipe, stores or model that a command was given."""

from pathlib import Path

from ..config import Recipe, load_recipe
from ..errors import SodaError


def resolve(target: str | Path, overrides: list[str]) -> Recipe:
    """The recipe behind a YAML file, a run folder or an exported folder, with overrides applied. Raises SodaError for
    an exported folder outside a run unless the overrides name a run folder."""
    target = Path(target)
    if target.is_dir():
        if not (target / "recipe.yaml").is_file():
            raise SodaError(
                f"{target}: no recipe.yaml in it; give a recipe, a run folder or a model that soda exported"
            )
        # Folders move, so a run's contents are looked up where the run is now.
        run = target.parent if (target / "soda.json").is_file() else target
        if (run / "recipe.yaml").is_file():
            return load_recipe(target / "recipe.yaml", overrides, {"run": str(run)})
        # The recipe in a model came with it: it does not decide where files are written here.
        if not any(override.startswith("run=") for override in overrides):
            raise SodaError(f"{target}: a model outside its run: say where to write the results: run=FOLDER")
        return load_recipe(target / "recipe.yaml", overrides)
    if target.suffix not in (".yaml", ".yml"):
        raise SodaError(f"{target}: not a folder, and not a recipe (.yaml)")
    return load_recipe(target, overrides)


def model_folder(target: str | Path, recipe: Recipe) -> Path:
    """The exported folder of `target`. If it is a run whose newest checkpoint has not been exported, exports it
    first."""
    target = Path(target)
    if (target / "soda.json").is_file():
        return target
    from ..hf.export import export

    return export(recipe)


def find_model(target: str | Path) -> Path:
    """The exported folder of a run or of itself. Raises SodaError for anything else."""
    target = Path(target)
    if (target / "soda.json").is_file():
        return target
    if not (target / "recipe.yaml").is_file() and (target / "config.json").is_file():
        raise SodaError(
            f"{target}: a Hugging Face model that soda did not export. First: soda import {target} run=runs/NAME; then "
            "give runs/NAME."
        )
    if not target.is_dir():
        raise SodaError(f"{target}: no such folder; give a run or a model that soda exported")
    return model_folder(target, resolve(target, []))


def find_stores(target: str) -> tuple[Path, list[str]] | None:
    """The folder and name of a store. The name is empty for a data folder and for a run that was prepared but not
    trained (training writes recipe.yaml). None for a recipe or any other run."""
    path = Path(target)
    if path.name and not path.is_dir() and path.with_name(f"{path.name}.json").is_file():
        return path.parent, [path.name]
    if (path / "train.json").is_file():
        return path, []
    is_prepared = (path / "data" / "train.json").is_file() and not (path / "recipe.yaml").is_file()
    return (path / "data", []) if is_prepared else None
