"""Where progress bars and coloured lines go."""

from rich.console import Console

console = Console(stderr=True)
