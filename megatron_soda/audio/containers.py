"""What a recording's container reveals about its end: that it is truncated, or that its declared length is wrong.

libsndfile silently trusts the declared length: it returns less if that is too small, and whatever exists if it is too
large. So the container is examined first. Sources: the formats' own specifications (RIFF and EBU 3306, AIFF-C, Sun AU,
CAF, Sony W64, ISO 14496-12, ASF, RFC 3533, RFC 9639, RFC 8794, the LAME tag).
"""

import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np

from .sound import BadAudio

SLACK = 512  # bytes that may be missing or left over: less than 0.1 s in any format, and the size of an ID3v1 tag
CUT = "cut off: the file is shorter than its header says"
UNKNOWN = 0x7FFF_0000  # programs that write into a pipe declare a size from here on


@dataclass(frozen=True)
class Container:
    """`trusted`: libsndfile finds the right length once `patch` ({position: bytes}) has corrected the header."""

    trusted: bool = True
    patch: dict[int, bytes] = field(default_factory=dict)


def examine(file: BinaryIO) -> Container:
    """Examines a recording. Raises BadAudio if its container reveals that something is missing."""
    size = file.seek(0, os.SEEK_END)
    start = _after_id3(file)
    head = _read(file, start, 16)
    if head[:4] == b"OggS":
        return _ogg(file, size)
    if head[:4] == b"fLaC":
        return _flac(file, start, size)
    if head[:4] == b".snd":
        return _au(file, size)
    if head[:4] == EBML:
        return _ebml(file, size)
    if head[:1] == b"\xff" and head[1:2] >= b"\xe0" and head[1] & 6:
        return _mp3(file, start, size)
    for form in FORMS:
        if head[form.at : form.at + len(form.magic)] == form.magic:
            return _chunked(file, size, form)
    return Container()


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _after_id3(file: BinaryIO) -> int:
    """Where the tags before the sound end. There may be several."""
    at = 0
    while (head := _read(file, at, 10))[:3] == b"ID3" and len(head) == 10:
        length = 0
        for byte in head[6:]:
            length = length << 7 | byte & 0x7F
        at += 10 + length + (10 if head[5] & 0x10 else 0)  # a footer
    return at


# ---- chunks: a name, a length, content


class Form(NamedTuple):
    magic: bytes
    at: int  # of the magic number
    first: int  # chunk
    head: struct.Struct
    data: bytes = b""  # the name of the chunk with the samples; empty: every chunk counts
    align: int = 1
    whole: bool = False  # the length includes the chunk's header


W64 = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
RIFF = Form(b"WAVE", 8, 12, struct.Struct("<4sI"), b"data", align=2)
FORMS = [
    RIFF,
    Form(b"AIFF", 8, 12, struct.Struct(">4sI"), b"SSND", align=2),
    Form(b"AIFC", 8, 12, struct.Struct(">4sI"), b"SSND", align=2),
    Form(b"caff", 0, 8, struct.Struct(">4sQ"), b"data"),
    Form(b"riff\x2e\x91", 0, 40, struct.Struct("<16sQ"), b"data" + W64, align=8, whole=True),
    Form(ASF, 0, 0, struct.Struct("<16sQ"), whole=True),
    *(Form(name, 4, 0, struct.Struct(">I4s"), whole=True) for name in (b"ftyp", b"moov", b"mdat", b"wide", b"free")),
]


class Chunk(NamedTuple):
    name: bytes
    at: int
    start: int  # of its content
    end: int
    unknown: bool  # its length is unknown, or it lasts to the end


def _chunks(file: BinaryIO, size: int, form: Form, at: int) -> Iterator[Chunk]:
    while at + form.head.size <= size:
        one, two = form.head.unpack(_read(file, at, form.head.size))
        name, length = (one, two) if isinstance(one, bytes) else (two, one)
        start = at + form.head.size
        unknown = length >= (UNKNOWN if form.head.size == 8 else 1 << 62)
        if form.whole and not form.data:  # MP4 and ASF
            if length == 1 and form.head.size == 8:
                length = int.from_bytes(_read(file, start, 8), "big")
            unknown = length == 0 or (name == ASF_DATA and length <= 50)  # 50: from a pipe
        if form is RIFF and name == b"data" and length == 0xFFFF_FFFF and _read(file, 0, 4) in (b"RF64", b"BW64"):
            length, unknown = int.from_bytes(_read(file, 28, 8), "little"), False  # of ds64, which is the first chunk
        end = (at if form.whole else start) + length
        yield Chunk(name, at, start, size if unknown else end, unknown)
        if unknown or end <= at:
            return
        at = end + -end % form.align


def _chunked(file: BinaryIO, size: int, form: Form) -> Container:
    for chunk in _chunks(file, size, form, form.first):
        if form.data and chunk.name != form.data:
            continue
        if chunk.end > size + SLACK:
            raise BadAudio(CUT)
        if not form.data or (chunk.unknown and not form.whole):
            continue
        if not chunk.unknown and (size - chunk.end <= SLACK or _followed(file, size, form, chunk)):
            return Container()
        return Container(patch=_to_the_end(file, form, chunk, size))
    return Container()


def _followed(file: BinaryIO, size: int, form: Form, chunk: Chunk) -> bool:
    """Whether other chunks follow up to the end of the file, which means that this one's length is right."""
    if chunk.end == chunk.start:
        return False
    at = chunk.end + -chunk.end % form.align
    for after in _chunks(file, size, form, at):
        if after.end > size + SLACK or not all(32 <= letter < 127 for letter in after.name[:4]):
            return False
        at = after.end
    return size - at <= SLACK


def _to_the_end(file: BinaryIO, form: Form, chunk: Chunk, size: int) -> dict[int, bytes]:
    """The patch that makes the samples last to the end of the file."""
    count = size - (chunk.at if form.whole else chunk.start)
    if form is RIFF and _read(file, 0, 4) in (b"RF64", b"BW64"):
        return {28: count.to_bytes(8, "little")}
    little = form.head.format.startswith("<")
    width = form.head.size - len(chunk.name)
    length = min(count, (1 << 8 * width) - 1)  # the largest value means to the end
    return {chunk.at + len(chunk.name): length.to_bytes(width, "little" if little else "big")}


def _au(file: BinaryIO, size: int) -> Container:
    start, length = struct.unpack(">II", _read(file, 4, 8).ljust(8, b"\0"))
    if length < UNKNOWN and start + length > size + SLACK:
        raise BadAudio(CUT)
    return Container(patch={8: b"\xff" * 4} if start + length < size - SLACK else {})


# ---- Matroska, WebM

EBML = b"\x1a\x45\xdf\xa3"
SEGMENT = 0x18538067


def _ebml(file: BinaryIO, size: int) -> Container:
    """The elements of the first two levels. One of unknown length contains those that follow."""
    at = 0
    while at < size:
        name, at = _vint(file, at, keep_marker=True)
        length, at = _vint(file, at)
        if name == 0:  # no further elements
            break
        if length == -1 or name == SEGMENT:
            if length != -1 and at + length > size + SLACK:
                raise BadAudio(CUT)
            continue
        at += length
        if at > size:
            raise BadAudio(CUT)
    return Container()


def _vint(file: BinaryIO, at: int, keep_marker: bool = False) -> tuple[int, int]:
    """A variable-length number and the position after it; -1 if all its bits are set, which means unknown."""
    first = _read(file, at, 1)
    if not first or not first[0]:
        return 0, at + 1
    width = 9 - first[0].bit_length()
    value = int.from_bytes(_read(file, at, width), "big")
    if keep_marker:
        return value, at + width
    value &= (1 << 7 * width) - 1
    return (-1 if value == (1 << 7 * width) - 1 else value), at + width


# ---- MPEG audio


def _mp3(file: BinaryIO, start: int, size: int) -> Container:
    """The first frame of most files gives the number of frames; without it, libsndfile guesses from the first frame's
    rate."""
    head = _read(file, start, 200)
    one, mono = head[1] & 8, head[3] & 0xC0 == 0xC0
    at = 4 + ((17 if mono else 32) if one else (9 if mono else 17))
    if head[at : at + 4] in (b"Xing", b"Info"):
        flags, frames, length = struct.unpack(">III", head[at + 4 : at + 16].ljust(12, b"\0"))
        known = flags & 3 == 3
    elif head[36:40] == b"VBRI":
        length, frames = struct.unpack(">II", head[46:54].ljust(8, b"\0"))
        known = True
    else:
        return Container(trusted=False)
    if not known or not frames or not length:
        return Container(trusted=False)
    if start + length > size + SLACK:
        raise BadAudio(CUT)
    return Container(trusted=start + length >= _before_tags(file, size) - SLACK)


def _before_tags(file: BinaryIO, size: int) -> int:
    """Where the audio ends, before any ID3v1 and APE tags."""
    if _read(file, size - 128, 3) == b"TAG":
        size -= 128
    tail = _read(file, max(0, size - 32), 32)
    if tail[:8] == b"APETAGEX":
        length, _, flags = struct.unpack("<III", tail[12:24])
        size -= length + (32 if flags >> 31 else 0)
    return size


# ---- FLAC

FLAC = int.from_bytes(b"fLaC", "little")
STREAMINFO = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")


def _flac(file: BinaryIO, start: int, size: int) -> Container:
    info = _read(file, start, 42)
    if len(info) < 42 or not STREAMINFO.match(info):
        return Container()
    total = int.from_bytes(info[21:26], "big") & 0xF_FFFF_FFFF
    if _another_stream(file, start + 8):  # after this one, which libsndfile knows nothing about
        return Container(trusted=False)
    shortest, longest = struct.unpack(">HH", info[8:12])
    tail = _read(file, max(start + 42, size - (1 << 16)), 1 << 16)
    return Container(trusted=total > 0 and _last_sample(tail, shortest if shortest == longest else 0) <= total)


def _another_stream(file: BinaryIO, at: int) -> bool:
    file.seek(at)
    end = b""
    while block := file.read(1 << 19):
        block = end + block
        # Much faster than a byte search: four letters are one number, at each of the four alignments.
        words = (np.frombuffer(block, "<u4", (len(block) - k) // 4, k) for k in range(4))
        if any((word == FLAC).any() for word in words) and STREAMINFO.search(block):
            return True
        end = block[-7:]
    return False


def _last_sample(tail: bytes, block_size: int) -> int:
    """The first sample of the last FLAC frame near the end of a file; `block_size` is 0 if frames count samples."""
    at = len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        head = tail[at : at + 16]
        if len(head) < 7 or head[1] not in (0xF8, 0xF9):
            continue
        width = max(1, 8 - (head[4] ^ 0xFF).bit_length())  # as in UTF-8
        if width > 7 or head[2] >> 4 == 0 or head[2] & 15 == 15:
            continue
        number = head[4] & (0x7F if width == 1 else (1 << max(0, 7 - width)) - 1)
        for byte in head[5 : 4 + width]:
            number = number << 6 | byte & 0x3F
        more = {6: 1, 7: 2}.get(head[2] >> 4, 0) + {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
        if len(head) > 4 + width + more and _crc8(head[: 4 + width + more]) == head[4 + width + more]:
            return number * (block_size if head[1] == 0xF8 else 1)
    return 0


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ (0x07 if crc & 0x80 else 0)) & 0xFF
    return crc


# ---- Ogg

REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg(file: BinaryIO, size: int) -> Container:
    """Checks all pages: each complete, with the right checksum, in sequence, and the last of every stream marked as
    such."""
    at, streams = 0, 0
    following: dict[bytes, int] = {}  # the next page number of each unfinished stream
    file.seek(0)
    while head := file.read(27):
        if head[:4] != b"OggS":
            if size - at <= SLACK:  # a tag
                break
            raise BadAudio("damaged: bytes between its pages" if len(head) == 27 else CUT)
        lengths = file.read(head[-1])
        body = file.read(sum(lengths))
        at += 27 + head[-1] + sum(lengths)
        if at > size:
            raise BadAudio(CUT)
        if _ogg_crc(b"".join((head[:22], bytes(4), head[26:], lengths, body))) != head[22:26]:
            raise BadAudio("damaged: a page with a wrong checksum")
        serial, number = head[14:18], int.from_bytes(head[18:22], "little")
        if head[5] & 2:
            streams += 1
        elif following.get(serial, number) != number:
            raise BadAudio("damaged: pages are missing")
        following[serial] = number + 1
        if head[5] & 4:
            following.pop(serial)
    if following:
        raise BadAudio(CUT)
    return Container(trusted=streams == 1)


def _ogg_crc(page: bytes) -> bytes:
    """Ogg's CRC-32 uses zlib's polynomial with reversed bits and without inversions."""
    crc = zlib.crc32(page.translate(REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return crc.to_bytes(4, "big").translate(REVERSED)
