"""The compact format: a frame of 8 codes of 2,048 takes 11 bytes, an id out of 128,256 takes 17 bits.

NAME.frames  the audio codes: of every frame ceil(slots * bits / 8) bytes, code k at bits [k * bits, (k + 1) * bits)
NAME.text    all other ids, `width` bits each, filled up with zeros to a multiple of 8 ids
NAME.spans   header, then int64: where every audio span begins (token), which frame it begins with, and where every
             document begins (token); each of the three has one entry more, the end

Windows are found by searching the spans, at the same cost anywhere in the store (csrc's expand_windows).
"""

import shutil
import struct
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..errors import SodaError
from ..vocab import TokenSpace
from .files import MappedFile, Output, Parts, outputs, store_file

SUFFIXES = ("spans", "text", "frames")
MAGIC = b"SODASPAN"
HEADER = struct.Struct("<8sIHBBQQQQ")  # magic, version, slots, bits, width, tokens, documents, spans, frames
_VERSION = 1
_ENTRIES_AT_ONCE = 1 << 20


def frame_bits(space: TokenSpace) -> int:
    """Bits per code."""
    return max(1, (space.entries - 1).bit_length())


def text_bits(space: TokenSpace) -> int:
    """Bits per text or marker id."""
    return (space.audio_base - 1).bit_length()


def text_bytes(space: TokenSpace, count: int) -> int:
    """Bytes in NAME.text for that many ids."""
    return (count + 7) // 8 * text_bits(space)


def write_compact(path: Path, parts: Parts, space: TokenSpace, slots: int) -> dict[str, Output]:
    """Writes the three files; memory is bounded by one part. Raises SodaError for incomplete audio frames."""
    bits, width = frame_bits(space), text_bits(space)
    bases = (space.audio_base + space.entries * np.arange(slots)).astype(np.int32)
    tokens = documents = spans = frames = 0
    left = np.zeros(0, np.int32)  # text that does not yet fill a group of 8
    with (
        outputs(path, SUFFIXES) as files,
        tempfile.TemporaryFile(dir=path.parent) as starts,
        tempfile.TemporaryFile(dir=path.parent) as firsts,
        tempfile.TemporaryFile(dir=path.parent) as begins,
    ):
        for ids, lengths in parts:
            ids, ends = np.ascontiguousarray(ids, dtype=np.int32), np.cumsum(lengths, dtype=np.int64)
            audio = ids >= space.audio_base
            edges = np.flatnonzero(audio[1:] != audio[:-1]) + 1
            if len(ids) and audio[0]:
                edges = np.append(0, edges)
            if len(edges) % 2:
                edges = np.append(edges, len(ids))
            starts_here, sizes = edges[::2], edges[1::2] - edges[::2]
            broken = np.flatnonzero(sizes % slots)
            if len(broken):
                raise _no_frames(path, int(starts_here[broken[0]]), documents, ends, slots)
            codes = ids[audio].reshape(-1, slots) - bases
            if codes.size and (codes.min() < 0 or codes.max() >= space.entries):
                frame = np.flatnonzero(((codes < 0) | (codes >= space.entries)).any(1))[0]
                raise _no_frames(path, int(np.flatnonzero(audio)[frame * slots]), documents, ends, slots)
            text = ids[~audio]
            if len(text) and text.min() < 0:
                raise _no_frames(path, int(np.flatnonzero(ids < 0)[0]), documents, ends, slots)
            files["frames"].write(ops.pack_frames(torch.from_numpy(codes), bits).numpy().data)
            text = np.concatenate([left, text])
            whole = len(text) // 8 * 8
            files["text"].write(_packed(text[:whole], width))
            left = text[whole:]
            starts.write((starts_here + tokens).astype("<i8").data)
            firsts.write((frames + (np.cumsum(sizes) - sizes) // slots).astype("<i8").data)
            begins.write((tokens + ends - lengths).astype("<i8").data)
            tokens, documents = tokens + len(ids), documents + len(lengths)
            spans, frames = spans + len(sizes), frames + len(codes)
        files["text"].write(_packed(np.pad(left, (0, -len(left) % 8)), width))
        index = files["spans"]
        index.write(HEADER.pack(MAGIC, _VERSION, slots, bits, width, tokens, documents, spans, frames))
        for table, end in ((starts, tokens), (firsts, frames), (begins, tokens)):
            table.seek(0)
            shutil.copyfileobj(table, index, 1 << 20)
            index.write(np.array([end], "<i8").data)
    return files


def _packed(text: np.ndarray, width: int) -> memoryview:
    return ops.pack_frames(torch.from_numpy(text.reshape(-1, 8)), width).numpy().data


def _no_frames(path: Path, token: int, documents: int, ends: np.ndarray, slots: int) -> SodaError:
    document = int(np.searchsorted(ends, token, side="right"))
    start = int(ends[document - 1]) if document else 0
    return SodaError(
        f"{path}: document {documents + document}, token {token - start}: neither text nor a whole frame of {slots} "
        "codes, and the compact format holds nothing else. `soda validate` shows what is wrong with the documents."
    )


class CompactTokens:
    """Reads the three files. Raises SodaError if one is truncated, in another format, or from another token space."""

    def __init__(self, path: Path, space: TokenSpace, slots: int) -> None:
        self.path, self._slots = path, slots
        header = store_file(path, "spans")
        index, text_file, frames_file = (MappedFile(store_file(path, suffix), "u1") for suffix in SUFFIXES)
        self.mapped = (index, text_file, frames_file)
        data = index.array
        if len(data) < HEADER.size:
            raise SodaError(f"{header}: {len(data)} bytes are too few for a header")
        magic, version, *shape, tokens, documents, spans, frames = HEADER.unpack(bytes(data[: HEADER.size]))
        if magic != MAGIC or version != _VERSION:
            raise SodaError(f"{header}: not the spans of a compact store (version {_VERSION})")
        wanted = slots, frame_bits(space), text_bits(space)
        if tuple(shape) != wanted:
            raise SodaError(
                f"{header}: frames of {shape[0]} codes of {shape[1]} bits and text of {shape[2]} bits, but "
                f"{path.name}.json says {wanted[0]}, {wanted[1]} and {wanted[2]}: they belong to two different stores"
            )
        self.size, self.documents = tokens, documents
        frame = (slots * shape[1] + 7) // 8
        self._text, self._frames = text_file.array, frames_file.array
        for name, found, expected in (
            ("spans", len(data), HEADER.size + 8 * (2 * spans + documents + 3)),
            ("frames", len(self._frames), frames * frame),
            ("text", len(self._text), text_bytes(space, tokens - slots * frames)),
        ):
            if found != expected:
                raise SodaError(
                    f"{store_file(path, name)}: {found} bytes, but the header of {header.name} says {expected}. "
                    "The file was truncated or belongs to another store; run `soda prepare` again."
                )
        self._starts = np.frombuffer(data, "<i8", spans + 1, HEADER.size)
        self._firsts = np.frombuffer(data, "<i8", spans + 1, HEADER.size + 8 * (spans + 1))
        self._begins = np.frombuffer(data, "<i8", documents + 1, HEADER.size + 16 * (spans + 1))
        if (self._starts[-1], self._firsts[-1], self._begins[-1]) != (tokens, frames, tokens):
            raise SodaError(f"{header}: its tables do not end where its header says. Run `soda prepare` again.")
        self._stream = ops.Stream(
            _tensor(self._text.reshape(-1, shape[2])),
            _tensor(self._frames.reshape(frames, frame)),
            _tensor(self._starts),
            _tensor(self._firsts),
            slots=slots,
            bits=shape[1],
            text_bits=shape[2],
            audio_base=space.audio_base,
            entries=space.entries,
        )

    def read(self, start: int, count: int) -> np.ndarray:
        if not count:
            return np.zeros(0, np.int32)
        try:
            return self._stream.windows(torch.from_numpy(np.array([start])), count)[0].numpy()
        except ValueError as error:
            raise SodaError(
                f"{store_file(self.path, 'spans')}: damaged near token {start} ({error}). see `soda validate`; "
                "run `soda prepare` again."
            ) from None

    def span(self, index: int) -> tuple[int, int]:
        """A document's first token and number of tokens."""
        begin, end = self._begins[index : index + 2].tolist()
        return begin, end - begin

    def offsets(self, first: int, last: int) -> np.ndarray:
        return np.array(self._begins[first : last + 1])

    def check_index(self) -> None:
        path = store_file(self.path, "spans")
        if self._begins[0] != 0:
            raise SodaError(f"{path}: the first document begins at token {self._begins[0]}. Run `soda prepare` again.")
        for first in range(0, self.documents, _ENTRIES_AT_ONCE):
            begins = self._begins[first : first + _ENTRIES_AT_ONCE + 1]
            bad = np.flatnonzero(np.diff(begins) < 1)
            if len(bad):
                i = int(bad[0])
                raise SodaError(
                    f"{path}: document {first + i} goes from token {begins[i]} to {begins[i + 1]}. "
                    "Run `soda prepare` again."
                )
        for first in range(0, len(self._starts) - 1, _ENTRIES_AT_ONCE):
            starts, firsts = (t[first : first + _ENTRIES_AT_ONCE + 1] for t in (self._starts, self._firsts))
            frames = np.diff(firsts)
            bad = np.flatnonzero((frames < 1) | (np.diff(starts) < self._slots * frames))
            if len(bad) or (first == 0 and (starts[0] < 0 or firsts[0] != 0)):
                i = int(bad[0]) if len(bad) else 0
                raise SodaError(
                    f"{path}: audio span {first + i} has frames {firsts[i]} to {firsts[i + 1]} from token {starts[i]} "
                    f"on, and the next one begins at {starts[i + 1]}. Run `soda prepare` again."
                )


def _tensor(plane: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # nothing writes to it
        return torch.from_numpy(np.asarray(plane))
