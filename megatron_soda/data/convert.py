"""`soda convert-store`: stores from one format to the other."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..errors import SodaError
from ..files import locked
from .store import FORMATS, Store, convert, files_of_others, remove_others
from .validate import SIDES

console = Console(stderr=True)


def convert_stores(folder: Path, names: Sequence[str], format: str, out: Path | None) -> None:
    """Converts the stores `names` of a folder (none: train, valid and test), in place or one of them to `out`."""
    if format not in FORMATS:
        raise SodaError(f"{format}: no format of a store; it is {' or '.join(FORMATS)}")
    if out and len(names) != 1:
        raise SodaError(f"--out takes one store, and {folder} has {', '.join(names or SIDES)}: name one of them")
    for name in names or SIDES:
        store = Store(folder / name)
        if store.format == format and out is None:
            if files_of_others(store.path, format):
                with locked(folder):
                    Store(store.path).verify()  # before anything goes that may be the only whole copy
                    remove_others(store.path, format)
            console.print(f"{store.path}: is {format} already", soft_wrap=True, markup=False)
            continue
        path = out or store.path
        before = _bytes(store)
        with Progress(console=console) as bar:
            task = bar.add_task(f"{name} to {format}", total=2 * store.size)  # once to write, once to compare
            convert(store, path, format, lambda n, task=task, bar=bar: bar.advance(task, n))
        after = _bytes(Store(path))
        console.print(
            f"{path}: {before:,} -> {after:,} bytes, {after / store.size:.2f} a token, read back and compared",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


def _bytes(store: Store) -> int:
    return sum(path.stat().st_size for path in store.files.values())
