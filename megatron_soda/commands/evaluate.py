"""`soda evaluate`."""

from ..registry import SUITES
from .arguments import ModelTarget, Overrides
from .resolve import model_folder, resolve

EXAMPLES = (
    "soda evaluate runs/quickstart",
    "soda evaluate runs/quickstart suite=[nll] split=valid",
    "soda evaluate some/hf/folder data.path=runs/quickstart/data run=runs/measured",
)


def command(model: ModelTarget, overrides: Overrides = None) -> None:
    from ..evaluation.run import evaluate

    recipe = resolve(model, overrides or [])
    evaluate(recipe, model_folder(model, recipe))


# The help text: names every suite without a list here.
command.__doc__ = f"""Evaluate an exported model; results go to RUN/eval.json.

Suites: {", ".join(SUITES.names())}."""
