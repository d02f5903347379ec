"""The console for progress bars and coloured lines."""

from rich.console import Console

console = Console(stderr=True)
