"""`soda evaluate`."""

from .arguments import ModelTarget, Overrides
from .resolve import model_folder, resolve

EXAMPLES = (
    "soda evaluate runs/quickstart",
    "soda evaluate runs/quickstart suite=[nll] split=valid",
    "soda evaluate some/hf/folder data.path=runs/quickstart/data",
)


def command(model: ModelTarget, overrides: Overrides = None) -> None:
    """Measure the NLL vector on held-out documents, and how generations keep the grammar (RUN/eval.json)."""
    from ..evaluation.run import evaluate

    recipe = resolve(model, overrides or [])
    evaluate(recipe, model_folder(model, recipe))
