"""The recipe: typed sections, read from a YAML file and key=value overrides. Unknown keys are errors.

recipe = load_recipe("examples/quickstart/recipe.yaml", ["training.steps=20", "model.preset=135m"])
"""

from .fields import choice
from .loading import load_recipe, save_recipe
from .model import Model
from .parallel import Parallel
from .recipe import Recipe

__all__ = ["Model", "Parallel", "Recipe", "choice", "load_recipe", "save_recipe"]
