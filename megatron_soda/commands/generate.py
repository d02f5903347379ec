"""`soda generate`."""

from .arguments import ModelTarget, Overrides
from .resolve import model_folder, resolve

EXAMPLES = (
    "soda generate runs/quickstart",
    'soda generate runs/quickstart tasks=[speak] generate.text="good morning"',
)


def command(model: ModelTarget, overrides: Overrides = None) -> None:
    """Continue, speak and transcribe held-out utterances; wav files go to RUN/samples."""
    from ..inference.run import generate

    recipe = resolve(model, overrides or [])
    generate(recipe, model_folder(model, recipe))
