"""WebDataset tars: X.mp3 and X.json or X.txt, in any order. The sound stays in the tar, as a range of its bytes.

A .tar.gz is unpacked once, to a plain tar in the scratch folder; nothing is ever extracted from a tar.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_soda.audio.sound import Sound

from ..utterance import Reject, Utterance
from . import files, rows
from .files import BadLine
from .folders import emilia_order, emilia_recording, is_sound
from .rows import Found, Row, Wanted

OTHER_ARCHIVES = (".zip", ".7z", ".rar", ".tar.zst", ".tar.xz", ".tar.bz2", ".txz", ".tbz", ".tbz2", ".tzst")


def read(root: Path, places: list[Path], scratch: Path, wanted: Wanted, emilia: bool = False) -> Found:
    """The named tars, and those in named folders. An id is TAR/MEMBER without suffixes.

    Text and speaker come from X.txt and X.json, under the names of a manifest's columns. A start and end say where a
    member was cut from and are ignored. Samples whose members are not consecutive come last, and all their names are
    held in memory. With `emilia`, a tar's samples are sorted so that those of a recording are consecutive, and one
    tar's samples are held in memory.
    """
    failed: list[Reject] = []
    for place in places:
        for tar in _of_folder(place, root, failed, emilia) if place.is_dir() else [place]:
            found = _utterances(tar, files.relative(tar, root), scratch, wanted, emilia)
            if not emilia:
                yield from found
                continue
            held: list[Utterance] = []
            for one in found:
                if isinstance(one, Utterance):
                    held.append(one)
                else:
                    yield one
            yield from sorted(held, key=lambda one: emilia_order(f"{one.id}.mp3"))
    yield from failed


def is_tar(path: Path | str) -> bool:
    return str(path).lower().endswith(files.TARS)


def looks_like_emilia(tar: Path) -> bool:
    """Whether its first sound or text is named like Emilia's."""
    try:
        with tarfile.open(files.regular(tar), "r|*") as stream:
            for _ in range(64):
                member = stream.next()
                if member is None:
                    break
                base = os.path.basename(member.name)
                if is_sound(base) or (base.endswith(".json") and not base.startswith(".")):
                    return bool(emilia_recording(_key(member.name)))
    except Exception:  # a damaged tar: its reader will report it
        pass
    return False


def _of_folder(folder: Path, root: Path, failed: list[Reject], emilia: bool) -> Iterator[Path]:
    for here, _, names in files.walk(folder, failed):
        yield from (here / name for name in names if is_tar(name))
        for name in names:
            if name.lower().endswith(OTHER_ARCHIVES) or (is_sound(name) and not emilia):  # Emilia's may be loose
                reason = f"not in a tar: only what is in {', '.join(files.TARS)} is read"
                failed.append(Reject(files.relative(here / name, root), reason))


def _utterances(tar: Path, name: str, scratch: Path, wanted: Wanted, emilia: bool) -> Found:
    try:
        plain = tar if tar.suffix.lower() == ".tar" else files.unpacked(tar, scratch)
        file = open(files.regular(plain), "rb")  # noqa: SIM115
    except BadLine as error:
        yield Reject(name, str(error))
        return
    except OSError as error:
        yield Reject(name, f"cannot be read: {error.strerror or error}")
        return
    stem = (
        name[: -len(next(suffix for suffix in files.TARS if name.lower().endswith(suffix)))] if is_tar(name) else name
    )

    def make(row: Row) -> Utterance:
        sound = row[SOUND]
        assert isinstance(sound, Member)
        key = _key(sound.name)
        if emilia:
            row = {**row, "recording": emilia_recording(key)}
        within = Sound(str(plain), offset=sound.offset, size=sound.size, name=os.path.basename(sound.name))
        return rows.utterance(row, within, f"{stem}/{key}", wanted.needs_text)

    with file:
        yield from rows.collect(((f"{name}{where}", row) for where, row in _samples(file)), make, wanted)


SOUND = "\0sound"  # in addition to a row's columns


class Member(NamedTuple):
    """A file in a tar: bytes [offset, offset + size) of it."""

    name: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1].lower()


def _samples(file: BinaryIO) -> Iterator[tuple[str, Row | BadLine]]:
    """Members whose names agree up to the first dot of the last part, as one row. Consecutive members are yielded at
    once if they include a sound and a text; others wait for further members until the end."""
    waiting: dict[str, list[Member]] = {}
    group: list[Member] = []
    for member in _members(file):
        if isinstance(member, CutShort):
            # The rest may have belonged to the last group: without it, only a group with a text is certain to be
            # complete.
            key = _key(member.name) if member.name else ""
            if group and any(one.suffix in TEXTS for one in group) and _key(group[0].name) != key:
                waiting.setdefault(_key(group[0].name), []).extend(group)
            waiting.pop(key, None)
            group = []
            cut = member
            break
        if member.isdir() or os.path.basename(member.name).startswith("."):
            continue
        unsafe = _unsafe(member)
        if unsafe:
            yield f":{member.name}", BadLine(f"unsafe member: {unsafe}")
            continue
        if group and _key(group[0].name) != _key(member.name):
            yield from _whole_or_waiting(file, group, waiting)
            group = []
        group.append(Member(member.name, member.offset_data, member.size))
    else:
        cut = None
    yield from _whole_or_waiting(file, group, waiting)
    for members in waiting.values():
        yield from _sample(file, members)
    if cut:
        yield "", cut


TEXTS = (".json", ".txt")  # if there are two, the .txt is used


def _whole_or_waiting(
    file: BinaryIO, group: list[Member], waiting: dict[str, list[Member]]
) -> Iterator[tuple[str, Row | BadLine]]:
    if not group:
        return
    key = _key(group[0].name)
    sounds = any(is_sound(os.path.basename(one.name)) for one in group)
    if key not in waiting and sounds and any(one.suffix in TEXTS for one in group):
        yield from _sample(file, group)
    else:
        waiting.setdefault(key, []).extend(group)


def _sample(file: BinaryIO, group: list[Member]) -> Iterator[tuple[str, Row | BadLine]]:
    sounds = [member for member in group if is_sound(os.path.basename(member.name))]
    for extra in sounds[1:]:
        yield f":{extra.name}", BadLine(f"a second sound: beside {sounds[0].name}")
    try:
        if not sounds:
            raise BadLine("no sound file: among the members of this name")
        row: dict[str, object] = {}
        for suffix in TEXTS:
            sides = [member for member in group if member.suffix == suffix]
            for extra in sides[1:]:
                yield f":{extra.name}", BadLine(f"a second text: beside {sides[0].name}")
            for side in sides[:1]:
                text = _text(file, side)
                row |= rows.parse_json(text) if suffix == ".json" else {"text": text}
        yield f":{sounds[0].name}", {**row, SOUND: sounds[0]}
    except BadLine as error:
        yield f":{(sounds or group)[0].name}", error


def _text(file: BinaryIO, member: Member) -> str:
    if member.size > files.LONGEST_LINE:
        raise BadLine(f"text too long: {os.path.basename(member.name)}")
    try:
        return os.pread(file.fileno(), member.size, member.offset).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadLine(f"not UTF-8: {os.path.basename(member.name)}") from None


class CutShort(BadLine):
    """The end of an incomplete tar; `name` is the truncated member, if known."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.name = name


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo | CutShort]:
    """The intact members one by one, then what is wrong with the tar."""
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # or it keeps them all
                if (
                    member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
                ) and member.offset_data + member.size > size:
                    yield CutShort("cut short: the tar ends in a member", member.name)
                    return
                yield member
            end = os.pread(file.fileno(), 512, tar.offset)
    except Exception as error:  # tarfile fails in many ways on damaged bytes
        yield CutShort(f"cut short: or not a tar ({error})")
        return
    if any(end):
        yield CutShort(
            "damaged: this is no tar from here on" if len(end) == 512 else "cut short: the tar ends in a header"
        )
    elif len(end) < 512:
        yield CutShort("cut short: the tar has no end")


def _unsafe(member: tarfile.TarInfo) -> str:
    if not member.isreg():
        return "a link" if member.issym() or member.islnk() else "a device or the like"
    if member.issparse():
        return "a sparse file"
    if member.name.startswith(("/", "\\")) or ".." in member.name.split("/"):
        return "its path leads out of the tar"
    return ""


def _key(name: str) -> str:
    folder, base = os.path.split(rows.one_form(name.removeprefix("./")))
    return os.path.join(folder, base.split(".", 1)[0])
