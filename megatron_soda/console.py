"""The console for progress bars and coloured lines."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from .errors import printable


class SafeConsole(Console):
    """Prints names and texts of files as they are: neither escape sequences nor Rich's [markup] in them have an
    effect."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, **settings)

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        for segment in super().render(*args, **kwargs):  # every text passes here; Rich's own codes are control segments
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def note(self, label: str, text: str) -> None:
        """A line that begins with a coloured label."""
        self.print(Text.assemble((label, "yellow"), text), soft_wrap=True)


console = SafeConsole(stderr=True)
