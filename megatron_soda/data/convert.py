"""`soda convert-store`: converts stores from one format to the other."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.progress import Progress

from ..console import console
from ..errors import SodaError
from ..files import atomic_path, locked, read_json, reading, sha256, sync_folder, write_json
from ..tokenizer import NAMES
from .files import store_file
from .store import FORMATS, Store, convert, files_of_others, remove_others
from .validate import SIDES

BESIDE = (*NAMES, "codec.json", "codec.safetensors")  # these define the meaning of a data folder's ids
STAMPS = ("text_tokenizer.key", "codec.key")  # what those were made from, for `soda prepare`


def convert_stores(folder: Path, names: Sequence[str], format: str, out: Path | None) -> None:
    """Converts the stores `names` of a folder (empty: train, valid and test) in place, or one of them to the store
    `out`, or all of them to the folder `out`, which appears once it is complete. The tokenizer, the codec and the
    held-out utterances are copied along. Raises SodaError, before anything is written, if something else already exists
    at the destination."""
    if format not in FORMATS:
        raise SodaError(f"{format}: not a store format; use {' or '.join(FORMATS)}")
    if out is None:
        for name in names or SIDES:
            store = Store(folder / name)
            if store.format != format:
                _convert(store, store.path, format)
                continue
            if files_of_others(store.path, format):
                with locked(folder):
                    Store(store.path).verify()  # before removing what may be the only intact copy
                    remove_others(store.path, format)
            console.print(f"{store.path}: is already {format}", soft_wrap=True)
        _copy_summary(folder, folder)
    elif names:
        (name,) = names
        store_file(out, "json")  # SodaError if that is not a store's name
        beside = {folder / one: out.with_name(one) for one in BESIDE}
        beside[store_file(folder / name, "parquet")] = store_file(out, "parquet")
        for path, copy in beside.items():
            if copy.exists() and not (path.is_file() and sha256(copy) == sha256(path)):
                raise SodaError(
                    f"{copy}: does not belong to {folder / name}; give a new folder, as in --out NEW/{name}"
                )
        _convert(Store(folder / name), out, format)
        for path, copy in beside.items():
            if path.is_file() and not copy.exists():
                _copy(path, copy)
    else:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise SodaError(f"{out}: already exists; remove it, or give another folder")
        made = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            for name in SIDES:
                _convert(Store(folder / name), made / name, format, out / name)
            for name in (*BESIDE, *STAMPS, *(f"{side}.parquet" for side in SIDES)):
                if (folder / name).is_file():
                    _copy(folder / name, made / name)
            _copy_summary(folder, made)
            os.replace(made, out)
            sync_folder(out.parent)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _convert(store: Store, path: Path, format: str, shown: Path | None = None) -> None:
    before = _bytes(store)
    with Progress(console=console) as bar:
        what = escape(f"{store.path.name} to {format}")
        task = bar.add_task(what, total=2 * store.size)  # once to write, once to compare
        convert(store, path, format, lambda n: bar.advance(task, n))
    after = _bytes(Store(path))
    console.print(
        f"{shown or path}: {before:,} -> {after:,} bytes, {after / store.size:.2f} per token, read back and compared",
        highlight=False,
        soft_wrap=True,
    )


def _copy(path: Path, copy: Path) -> None:
    with atomic_path(copy) as temporary, reading(path):
        shutil.copyfile(path, temporary)


def _copy_summary(folder: Path, to: Path) -> None:
    """prepare.json. A conversion changes nothing in it but the stores' sizes."""
    path = folder / "prepare.json"
    if not (path.is_file() and all(store_file(to / name, "json").is_file() for name in SIDES)):
        return
    summary = read_json(path, dict)
    if isinstance(summary.get("bytes"), dict):
        summary["bytes"]["stores"] = sum(_bytes(Store(to / name)) for name in SIDES)
    with locked(to):
        write_json(to / "prepare.json", summary)


def _bytes(store: Store) -> int:
    return sum(path.stat().st_size for path in store.files.values())
