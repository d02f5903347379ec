"""`soda report`."""

from pathlib import Path

from ..errors import printable
from .arguments import Overrides, Target
from .resolve import resolve

EXAMPLES = ("soda report runs/quickstart",)


def command(recipe: Target, overrides: Overrides = None) -> None:
    """Write RUN/report.html, a single page that shows and plays the run."""
    from ..report import build_report

    print(printable(str(build_report(Path(resolve(recipe, overrides or []).run)))))
