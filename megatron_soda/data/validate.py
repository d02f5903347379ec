"""`soda validate`: whether stores are whole, and every document of theirs is legal and stands there once."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import ops
from ..errors import SodaError
from ..files import read_json
from ..vocab import FIRST_CODE, Grammar
from .files import checksum, store_file
from .store import Store

SIDES = ("train", "valid", "test")
SHOWN = 10  # problems of a kind that are told one by one
_BUCKETS = 64
_PROVENANCE = ("codec", "tokenizer")

console = Console(stderr=True)


def validate(folder: Path, names: Sequence[str] = SIDES) -> bool:
    """Checks the stores `names` of a data folder and prints what is wrong, where. True if nothing is.

    Of each: files of the size and the checksum that were written, pointers that rise, ids of the token space, and the
    grammar of vocab.py (BOS and EOS, markers in pairs, whole audio frames with codebook k at slot k). Of all: one token
    space, one codec and one tokenizer (which must be the folder's), and no document twice, in one store or in two.
    Memory does not grow with the stores.
    """
    wrong = 0

    def problem(text: str) -> None:
        nonlocal wrong
        wrong += 1
        print(text)

    stores: dict[str, Store] = {}
    for name in names:
        try:
            store = Store(folder / name)
            store.check_index()
            stores[name] = store
        except SodaError as error:
            problem(f"{name}: {error}")
    _same_provenance(folder, stores, problem)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar, _Hashes() as hashes:
        for name, store in stores.items():
            _check_sums(store, problem)
            task = bar.add_task(f"validate {name}", total=store.size)
            bad = 0
            for first, ids, offsets in store.parts():
                for number, token in _illegal(store, ids, offsets):
                    bad += 1
                    if bad <= SHOWN:
                        problem(f"{store.path}: document {first + number}, {_why(store, first + number, token)}")
                hashes.add(name, first, ids, offsets)
                bar.advance(task, len(ids))
            if bad > SHOWN:
                problem(f"{store.path}: {bad - SHOWN} more documents that are not legal")
            print(f"{name}: {store.size:,} tokens, {len(store):,} documents, {bad} bad")
        _check_twice(stores, hashes, problem)
    return not wrong


def find_problems(store: Store) -> Iterator[str]:
    """Yields "document i, token j: what is wrong" for every document that is not legal."""
    for first, ids, offsets in store.parts():
        for number, token in _illegal(store, ids, offsets):
            yield f"document {first + number}, {_why(store, first + number, token)}"


def _illegal(store: Store, ids: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Which documents are not legal, and from which token on."""
    grammar = Grammar(store.space, store.slots)
    step = np.full((grammar.states, FIRST_CODE + store.space.codebooks), -1, np.int8)
    for (state, kind), following in grammar.step.items():
        step[state, kind] = following
    kinds = torch.from_numpy(store.space.kind_table())
    found = ops.first_illegal(
        torch.from_numpy(ids), torch.from_numpy(offsets), kinds, torch.from_numpy(step), Grammar.START, Grammar.END
    ).numpy()
    for number in np.flatnonzero(found >= 0).tolist():
        yield number, int(found[number])


def _why(store: Store, document: int, token: int) -> str:
    return store.space.check(store.document(document), store.slots) or f"token {token}: not legal"


def _check_sums(store: Store, problem: Callable[[str], None]) -> None:
    sums = store.meta.get("files")
    if not isinstance(sums, dict) or set(sums) != set(store.files):
        problem(f"{store_file(store.path, 'json')}: no checksums in it: it was not written by this version")
        return
    for suffix, path in store.files.items():
        found, wanted = checksum(path), sums[suffix].get("crc32") if isinstance(sums[suffix], dict) else None
        if found != wanted:
            problem(f"{path}: its checksum is {found}, {wanted} was written: bytes of it have changed")


def _same_provenance(folder: Path, stores: dict[str, Store], problem: Callable[[str], None]) -> None:
    spaces = {name: (store.space, store.slots) for name, store in stores.items()}
    if len(set(spaces.values())) > 1:
        problem(f"{folder}: the stores are of different vocabularies: {spaces}")
    for kind in _PROVENANCE:
        made_by: dict[str, Any] = {name: store.meta.get(kind) for name, store in stores.items()}
        path = folder / f"{kind}.json"  # codec.json; a tokenizer's fingerprint is in prepare.json
        if kind == "codec" and path.is_file():
            made_by[path.name] = read_json(path).get("fingerprint")
        known = {value for value in made_by.values() if value}
        if len(known) > 1:
            problem(f"{folder}: made by more than one {kind}: {made_by}")


# ---- documents that are there twice


class _Hashes:
    """The hashes of all documents, in files by their first bits, so that those of one file fit in memory."""

    _ROW = np.dtype([("hash", "<i8"), ("document", "<i8"), ("store", "<i4")])

    def __enter__(self) -> "_Hashes":
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(tempfile.TemporaryFile()) for _ in range(_BUCKETS)]  # noqa: SIM115
        self._names: list[str] = []
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, name: str, first: int, ids: np.ndarray, offsets: np.ndarray) -> None:
        if name not in self._names:
            self._names.append(name)
        rows = np.zeros(len(offsets) - 1, self._ROW)
        rows["hash"] = ops.hash_documents(torch.from_numpy(ids), torch.from_numpy(offsets)).numpy()
        rows["document"] = np.arange(first, first + len(rows))
        rows["store"] = self._names.index(name)
        bucket = rows["hash"].view(np.uint64) % np.uint64(_BUCKETS)
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket.astype(np.int64), minlength=_BUCKETS))[:-1]
        for file, some in zip(self._files, np.split(rows[order], ends), strict=True):
            file.write(some.tobytes())

    def twice(self) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
        """Pairs of documents (store, number) with one hash: each with the first that has it."""
        for file in self._files:
            file.seek(0)
            rows = np.frombuffer(file.read(), self._ROW)
            order = np.argsort(rows["hash"], kind="stable")
            hashes = rows["hash"][order]
            same = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
            firsts = np.searchsorted(hashes, hashes[same])
            for one, other in zip(rows[order[firsts]], rows[order[same]], strict=True):
                yield (
                    (self._names[one["store"]], int(one["document"])),
                    (self._names[other["store"]], int(other["document"])),
                )


def _check_twice(stores: dict[str, Store], hashes: _Hashes, problem: Callable[[str], None]) -> None:
    counts: dict[tuple[str, str], int] = {}
    for (name, number), (other, again) in hashes.twice():
        if not np.array_equal(stores[name].document(number), stores[other].document(again)):
            continue  # two hashes that are the same by chance
        pair = (name, other)
        counts[pair] = counts.get(pair, 0) + 1
        if counts[pair] <= SHOWN:
            where = "stands there twice" if name == other else f"stands in another store too, a leak of {name}"
            problem(f"{stores[other].path}: document {again} {where}: it is document {number} of {name}")
    for (name, other), count in counts.items():
        if count > SHOWN:
            problem(f"{stores[other].path}: {count - SHOWN} more documents that stand in {name}")
