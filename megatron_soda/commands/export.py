"""`soda export`."""

from .arguments import Overrides, Target
from .resolve import resolve

EXAMPLES = ("soda export runs/quickstart",)


def command(recipe: Target, overrides: Overrides = None) -> None:
    """Export the newest checkpoint to RUN/hf as a stock Qwen3ForCausalLM, and compare its logits with ours."""
    from ..hf.export import export

    export(resolve(recipe, overrides or []))
