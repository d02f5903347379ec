"""`soda generate`."""

from ..registry import TASKS
from .arguments import ModelTarget, Overrides
from .resolve import model_folder, resolve

EXAMPLES = (
    "soda generate runs/quickstart",
    'soda generate runs/quickstart tasks=[speak] generate.text="good morning"',
)


def command(model: ModelTarget, overrides: Overrides = None) -> None:
    from ..inference.run import generate

    recipe = resolve(model, overrides or [])
    generate(recipe, model_folder(model, recipe))


# The help text: names every task without a list here.
command.__doc__ = f"""Prompt an exported model with held-out utterances; wav files go to RUN/samples.

Tasks: {", ".join(TASKS.names())}."""
