"""A token store: one long stream of int32 ids with document offsets, in one of two formats.

NAME.json             format, token space, the codes of a frame, checksums of the files and of itself, and the
                      fingerprints of the codec and the tokenizer that made the ids
NAME.bin, NAME.idx    `megatron`: what stock megatron-core reads (indexed.py)
NAME.frames, .text, .spans    `compact`: a third of the size (compact.py)
"""

import glob
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SodaError
from ..files import locked, read_sealed, reading, sync_folder, write_sealed
from ..vocab import TokenSpace
from . import compact, indexed
from .files import Parts, checksum, store_file

_DOCUMENTS_AT_ONCE = 1 << 16
_PREPARE_WITH = {
    "codec": "prepare.codec and prepare.codec_path",
    "tokenizer": "prepare.tokenizer=FILE, found beside the model's stores",
}
FORMATS = {
    "megatron": (indexed.SUFFIXES, indexed.IndexedTokens, indexed.write_indexed),
    "compact": (compact.SUFFIXES, compact.CompactTokens, compact.write_compact),
}


def write_store(
    path: str | Path, documents: Iterable[np.ndarray], space: TokenSpace, format: str = "megatron", **provenance: Any
) -> int:
    """Writes documents of ids as the store `path` (no suffix). Returns the number of tokens."""
    parts = ((document, np.array([len(document)])) for document in documents)
    return write_parts(path, parts, space, format, **provenance)


def write_parts(path: str | Path, parts: Parts, space: TokenSpace, format: str = "megatron", **provenance: Any) -> int:
    """Writes the store `path` (no suffix) from parts, each the concatenated ids of some documents and their lengths.
    Returns the number of tokens. `provenance` may include `slots`, the codes per frame, if fewer than the codebooks.

    `.json` appears last, so a store with a `.json` is complete. Memory is bounded by one part. Files in the other
    format are removed at the end.
    """
    path = Path(path)
    counts = {"tokens": 0, "documents": 0}
    ids_crc = 0

    def checked() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal ids_crc
        for ids, lengths in parts:
            if lengths.sum() != len(ids) or lengths.min(initial=1) < 1:
                raise ValueError("a document must have at least one token, and the lengths must sum to the ids")
            counts["tokens"] += len(ids)
            counts["documents"] += len(lengths)
            ids_crc = zlib.crc32(np.ascontiguousarray(ids, dtype="<i4").data, ids_crc)
            yield ids, lengths

    files = FORMATS[format][2](path, checked(), space, int(provenance.get("slots", space.codebooks)))
    sums = {suffix: {"bytes": file.bytes, "crc32": f"{file.crc:08x}"} for suffix, file in sorted(files.items())}
    write_sealed(
        store_file(path, "json"),
        {
            "format": format,
            **counts,
            "space": space.to_dict(),
            **provenance,
            "ids_crc32": f"{ids_crc:08x}",  # independent of the format
            "files": sums,
        },
    )
    remove_others(path, format)
    return counts["tokens"]


class Store:
    """Random access to a store. `size` is the number of tokens. `read` copies; nothing else touches the disk.

    Opening takes the same time for any number of documents: files are mapped, and only the header and end of the index
    are read. Raises SodaError if a file is missing, truncated, or in another format; `check_index` checks the rest of
    the index. If a file is truncated while the store is open, the next read raises SodaError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not store_file(self.path, "json").is_file():
            raise SodaError(f"{store_file(self.path, 'json')}: no such file. Run `soda prepare` to make the store.")
        self.meta = read_sealed(store_file(self.path, "json"))
        with reading(store_file(self.path, "json"), "no token space and format in it that could be"):
            self.space = _space(self.meta["space"])
            self.slots: int = self.meta.get("slots", self.space.codebooks)  # codes per frame: 1 if semantic-only
            if not (type(self.slots) is int and 1 <= self.slots <= self.space.codebooks):
                raise ValueError(f"slots={self.slots}")
            self.format: str = self.meta.get("format", "megatron")
            reader = FORMATS[self.format][1]
        self._tokens = reader(self.path, self.space, self.slots)
        self.size = self._tokens.size
        if self.size == 0:
            raise SodaError(f"{self.path}: the store has no tokens")

    @property
    def files(self) -> dict[str, Path]:
        """The files that hold the tokens, by suffix."""
        return {suffix: store_file(self.path, suffix) for suffix in FORMATS[self.format][0]}

    @property
    def made_by(self) -> dict[str, str]:
        """Fingerprints of the `codec` and the `tokenizer` that made the ids; text has no codec."""
        return {kind: str(self.meta[kind]) for kind in ("codec", "tokenizer") if self.meta.get(kind)}

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the ids and their meaning, from .json; converting the store to another format does not change
        it."""
        files = self.meta.get("files") or {}
        # Stores from earlier versions: .bin is the ids themselves.
        ids = self.meta.get("ids_crc32") or files.get("bin", {}).get("crc32") or files
        known = {key: self.meta.get(key) for key in ("space", "slots", "tokens", "documents", "codec", "tokenizer")}
        return hashlib.sha256(json.dumps({**known, "ids": ids}, sort_keys=True).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of documents."""
        return self._tokens.documents

    def read(self, start: int, count: int) -> np.ndarray:
        """int32 (count,): tokens [start, start + count) of the stream."""
        if start < 0 or count < 0 or start + count > self.size:
            raise IndexError(f"tokens {start} to {start + count} of {self.size}")
        self._check_files()
        return self._tokens.read(start, count)

    def document(self, index: int) -> np.ndarray:
        """int32: the tokens of one document."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        self._check_files()
        start, count = self._tokens.span(index)
        if start < 0 or count < 0 or start + count > self.size:
            raise SodaError(
                f"{self.path}: document {index} is not in the store: its index is damaged (`soda validate`)"
            )
        return self.read(start, count)

    def offsets(self, first: int, last: int) -> np.ndarray:
        """int64 (last - first + 1,): the tokens at which documents first to last - 1 begin, and where the last one
        ends."""
        self._check_files()
        return self._tokens.offsets(first, last)

    def check_index(self) -> None:
        """Raises SodaError if a document is empty or does not begin where the previous one ends. Reads the whole
        index."""
        self._check_files()
        self._tokens.check_index()

    def _check_files(self) -> None:
        """Raises SodaError if a file was truncated since it was opened. (It may still be truncated between this and a
        read.)"""
        for file in self._tokens.mapped:
            file.check()

    def damage(self) -> Iterator[str]:
        """What differs from when it was written: counts, sizes and checksums. Reads all files."""
        described = store_file(self.path, "json")
        for what, found in (("tokens", self.size), ("documents", len(self))):
            if self.meta.get(what) != found:
                yield f"{described}: says {self.meta.get(what)} {what}, found {found}"
        written = self.meta.get("files")
        if "crc32" not in self.meta or not isinstance(written, dict) or set(written) != set(self.files):
            yield f"{described}: has no checksums, so this version did not write it. Prepare the data again."
            return
        for suffix, path in self.files.items():
            with reading(path):
                found = {"bytes": path.stat().st_size, "crc32": checksum(path)}
            if found != written[suffix]:
                yield f"{path}: has changed since it was written: {found} instead of {written[suffix]}"

    def verify(self) -> None:
        """Raises SodaError, naming the file, if the store differs from when it was written. Must be called before
        writing anything derived from a store, because damage must not get a fresh checksum."""
        self.check_index()
        for problem in self.damage():
            raise SodaError(f"{problem}. Nothing was written; `soda prepare` makes the store again.")

    def parts(self, tokens: int = 1 << 22) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """All documents, about `tokens` tokens at a time: the first one's number, ids, and offsets like those of
        `offsets`, but starting at 0. `check_index` must have passed."""
        first = 0
        while first < len(self):
            offsets = self.offsets(first, min(first + _DOCUMENTS_AT_ONCE, len(self)))
            start = int(offsets[0])
            count = max(1, int(np.searchsorted(offsets, start + tokens, side="right")) - 1)
            offsets = offsets[: count + 1]
            yield first, self.read(start, int(offsets[-1]) - start), offsets - start
            first += count

    def check_space(self, space: TokenSpace, wanted_by: str) -> None:
        if self.space != space:
            raise SodaError(
                f"{self.path}: its ids are of another vocabulary ({self.space}) than {wanted_by} ({space}). "
                "Use the data folder that the model was trained on, or prepare the data again."
            )

    def check_made_by(self, known: dict[str, str], whose: str, accept: Collection[str] = ()) -> None:
        """Raises SodaError if the ids were made with a different codec or tokenizer than `known`, unless `accept` names
        that kind. What either side lacks is not compared."""
        for kind, fingerprint in self.made_by.items():
            if kind not in accept and known.get(kind, fingerprint) != fingerprint:
                raise SodaError(
                    f"{self.path}: its ids were made by {kind} {fingerprint}, {whose} has {kind} {known[kind]}: the "
                    f"same ids mean something else. Prepare the data with that {kind} ({_PREPARE_WITH[kind]}); if this "
                    f"is intended, set data.accept=[{kind}]"
                )


def _space(values: dict[str, Any]) -> TokenSpace:
    """The token space described in a file. Raises ValueError if it is impossible."""
    space = TokenSpace(**values)
    if not all(type(value) is int for value in values.values()):
        raise ValueError(f"{values}: not integers")
    if not (0 <= min(space.bos, space.eos) <= max(space.bos, space.eos) < space.text_size):
        raise ValueError(f"{values}: BOS and EOS must be ids of text")
    if not (1 <= space.codebooks <= 100 and space.entries >= 1 and space.size < 2**31):
        raise ValueError(f"{values}: 1 to 100 codebooks of 1 entry or more, and ids below 2**31")
    return space


def convert(store: Store, path: str | Path, format: str, advance: Callable[[int], None] = lambda n: None) -> None:
    """Writes a store's documents to `path` in another format, reads them back, and compares.

    `path` may be the store's own: it is complete in one format or the other at every moment, and the old files are
    removed once the new ones have proved equal. Raises SodaError if there is another store at `path`, another process
    is using its folder, the store is damaged, or the format cannot hold the documents.
    """
    path = Path(path)
    if path.is_dir():
        raise SodaError(f"{path}: is a folder; name a store in it, such as {path / store.path.name}")
    if path.resolve() != store.path.resolve() and store_file(path, "json").exists():
        raise SodaError(f"{path}: a store already exists there; remove it, or give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        _convert(store, path, format, advance)


def _convert(store: Store, path: Path, format: str, advance: Callable[[int], None]) -> None:
    store = Store(store.path)  # re-opened, now that nobody else can write
    store.verify()
    about_files = ("format", "tokens", "documents", "space", "ids_crc32", "files", "crc32")
    provenance = {key: value for key, value in store.meta.items() if key not in about_files}
    made = path.with_name(f".{path.name}.new")

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _, ids, offsets in store.parts():
            yield ids, np.diff(offsets)
            advance(len(ids))

    for left in path.parent.glob(f".{glob.escape(made.name)}.*.tmp"):
        left.unlink()  # left by a killed conversion
    try:
        write_parts(made, parts(), store.space, format, **provenance)
        for (_, ids, offsets), (_, again, offsets_again) in zip(store.parts(), Store(made).parts(), strict=True):
            if not (np.array_equal(ids, again) and np.array_equal(offsets, offsets_again)):
                raise SodaError(f"{path}: what was written is not what was read; the disk may be failing")
            advance(len(ids))
        for suffix in (*FORMATS[format][0], "json"):
            os.replace(store_file(made, suffix), store_file(path, suffix))
        sync_folder(path.parent)
    finally:
        for left in path.parent.glob(f"{glob.escape(made.name)}.*"):
            left.unlink()
    remove_others(path, format)


def files_of_others(path: Path, format: str) -> list[Path]:
    """The store's files in other formats, which remain if a conversion was killed at the last moment."""
    suffixes = {s for suffixes, _, _ in FORMATS.values() for s in suffixes} - set(FORMATS[format][0])
    return [file for file in (store_file(path, suffix) for suffix in sorted(suffixes)) if file.exists()]


def remove_others(path: Path, format: str) -> None:
    """Removes the store's files in other formats."""
    for file in files_of_others(path, format):
        file.unlink(missing_ok=True)
