"""`soda validate`: checks that stores are intact and every document is legal and unique."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import ops
from ..console import console
from ..errors import SodaError, printable, user_message
from ..files import read_json
from ..tokenizer import NAMES, data_tokenizer
from ..vocab import FIRST_CODE, Grammar
from .store import Store

SIDES = ("train", "valid", "test")
SHOWN = 10  # problems of a kind that are listed individually


def validate(folder: Path, names: Sequence[str] = SIDES, corpora: Mapping[str, str | Path] | None = None) -> bool:
    """Checks the stores `names` of a data folder and those in `corpora` (paths by name), and prints problems with their
    location. Returns True if there are none.

    Checks each store for the sizes and checksums recorded when it was written, increasing pointers, ids within the
    token space, and the grammar of vocab.py (BOS and EOS, paired markers, whole audio frames with codebook k at slot
    k). Across all of them, there must be one token space, one codec and one tokenizer, namely those beside the stores,
    and no duplicate document, whether within a store or between two. Memory stays bounded: what grows, 20 bytes per
    document, goes to temporary files.
    """
    wrong = 0

    def problem(text: str) -> None:
        nonlocal wrong
        wrong += 1
        print(printable(text))

    stores: dict[str, Store] = {}
    for name, path in {**{name: folder / name for name in names}, **(corpora or {})}.items():
        try:
            stores[name] = Store(path)
        except (SodaError, OSError) as error:
            problem(f"{name}: {user_message(error)}")
    _same_provenance(stores, problem)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar, _Hashes(sum(map(len, stores.values()))) as hashes:
        for name, store in stores.items():
            task = bar.add_task(f"validate {name}", total=store.size)
            try:
                bad = _check_store(name, store, problem, hashes, lambda n, task=task: bar.advance(task, n))
                print(printable(f"{name}: {store.size:,} tokens, {len(store):,} documents, {bad} bad"))
            except (SodaError, OSError) as error:
                problem(f"{name}: {user_message(error)}")
        _check_twice(stores, hashes, problem)
    return not wrong


def _check_store(
    name: str, store: Store, problem: Callable[[str], None], hashes: "_Hashes", advance: Callable[[int], None]
) -> int:
    """Returns the number of illegal documents. Raises SodaError if the index is damaged, since documents cannot be read
    then."""
    store.check_index()
    for text in store.damage():
        problem(text)
    bad = 0
    for first, ids, offsets in store.parts():
        for number, token in illegal(store, ids, offsets):
            bad += 1
            if bad <= SHOWN:
                problem(f"{store.path}: document {first + number}, {why(store, first + number, token)}")
        hashes.add(name, first, ids, offsets)
        advance(len(ids))
    if bad > SHOWN:
        problem(f"{store.path}: {bad - SHOWN} more illegal documents")
    return bad


def illegal(store: Store, ids: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Which of the given documents (see Store.parts) are illegal, and from which token on."""
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


def why(store: Store, document: int, token: int) -> str:
    """What is wrong with an illegal document."""
    return store.space.check(store.document(document), store.slots) or f"token {token}: not legal"


def _same_provenance(stores: dict[str, Store], problem: Callable[[str], None]) -> None:
    spaces = {name: str((store.space, store.slots)) for name, store in stores.items()}
    if len(set(spaces.values())) > 1:
        problem(f"the stores are of different vocabularies: {spaces}")
    made_by: dict[str, dict[str, str]] = {kind: {} for kind in ("codec", "tokenizer")}
    for name, store in stores.items():
        for kind, known in made_by.items():
            if store.meta.get(kind):  # a text-only store has no codec
                known[name] = str(store.meta[kind])
    for folder in {store.path.parent for store in stores.values()}:
        try:
            if (folder / "codec.json").is_file():
                made_by["codec"][str(folder / "codec.json")] = str(read_json(folder / "codec.json")["fingerprint"])
            if any((folder / name).is_file() for name in NAMES):
                tokenizer = data_tokenizer(folder)
                made_by["tokenizer"][str(tokenizer.path)] = tokenizer.fingerprint
        except (KeyError, TypeError):
            problem(f"{folder / 'codec.json'}: no fingerprint in it")
        except (SodaError, OSError) as error:
            problem(user_message(error))
    for kind, known in made_by.items():
        if len(set(known.values())) > 1:
            problem(f"made by more than one {kind}: {known}")


# ---- duplicate documents


class _Hashes:
    """The hashes of all documents, in files by their first bits, so that one file's hashes fit in memory."""

    _ROW = np.dtype([("hash", "<i8"), ("document", "<i8"), ("store", "<i4")])

    def __init__(self, documents: int) -> None:
        self._buckets = max(1, min(256, documents >> 20))  # a million documents in memory, and 256 open files

    def __enter__(self) -> "_Hashes":
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(tempfile.TemporaryFile()) for _ in range(self._buckets)]  # noqa: SIM115
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
        bucket = rows["hash"].view(np.uint64) % np.uint64(self._buckets)
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket.astype(np.int64), minlength=self._buckets))[:-1]
        for file, some in zip(self._files, np.split(rows[order], ends), strict=True):
            file.write(some.tobytes())

    def twice(self) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
        """Pairs of documents (store, number) with the same hash: each one with the first that has it."""
        for file in self._files:
            file.seek(0)
            rows = np.frombuffer(file.read(), self._ROW)
            order = np.argsort(rows["hash"], kind="stable")
            hashes = rows["hash"][order]
            same = np.flatnonzero(hashes[1:] == hashes[:-1]) + 1
            same = same[np.argsort(order[same])]  # in the order of the documents
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
            continue  # two hashes that are equal by chance
        pair = (name, other)
        counts[pair] = counts.get(pair, 0) + 1
        if counts[pair] <= SHOWN:
            where = "is duplicated" if name == other else f"is in two stores, a leak between {name} and {other}"
            problem(f"{stores[other].path}: document {again} {where}: it is document {number} of {name}")
    for (name, other), count in counts.items():
        if count > SHOWN:
            problem(f"{stores[other].path}: {count - SHOWN} more documents that are also in {name}")
