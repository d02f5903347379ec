"""`soda inspect`: shows documents of a store and writes their audio."""

from pathlib import Path

import numpy as np
from rich.text import Text

from ..console import SafeConsole
from ..errors import SodaError
from ..files import atomic_path
from ..tokenizer import NAMES, data_tokenizer
from ..vocab import BOS, BOS_KIND, EOS, EOS_KIND, FIRST_CODE, MARKERS, TEXT, TEXT_START, TokenSpace
from .store import Store

SHOWN_FRAMES = 3


def inspect(path: Path, first: int, count: int, audio: Path | None) -> None:
    """Prints documents of the store `path`, and writes their audio spans to the folder `audio`. Raises SodaError for a
    document that does not exist, and for audio from a damaged store or a folder without the codec."""
    store = Store(path)
    if first >= len(store):
        raise SodaError(f"{path}: there is no document {first}; the store has {len(store):,}, counted from 0")
    # Without a tokenizer, ids are shown; a broken tokenizer is an error.
    tokenizer = data_tokenizer(path.parent) if any((path.parent / name).is_file() for name in NAMES) else None
    codec = None
    if audio:
        store.verify()
        from ..codecs.description import load_data_codec

        codec = load_data_codec(path.parent)
        if codec.codebooks != store.slots:
            raise SodaError(f"{path}: frames of {store.slots} codes; the codec needs {codec.codebooks} to make sound")
    rate = codec.sample_rate / codec.samples_per_frame if codec else 0
    console = SafeConsole(highlight=False, soft_wrap=True)
    space = store.space
    console.print(
        f"{path}: {store.size:,} tokens, {len(store):,} documents, {store.format} format; "
        f"{space.codebooks} codebooks of {space.entries:,}, {space.size:,} ids"
    )
    for number in range(first, min(first + count, len(store))):
        ids = store.document(number)
        console.print(f"\ndocument {number} · {len(ids):,} tokens", style="bold")
        for n, (kind, some) in enumerate(spans(ids, space)):
            if kind == "audio":
                frames = len(some) // store.slots
                shown = _frames(some, space, store.slots)
                seconds = f", {frames / rate:.2f} s" if codec else ""
                line = Text(f"  {frames:,} frames{seconds}: {shown}", style="cyan")
                if codec and audio and frames:
                    name = audio / f"{path.name}_{number}_{n}.wav"
                    _write(name, codec.decode([_codes(some, space, store.slots)])[0], codec.sample_rate)
                    line.append(f"  -> {name}")
                console.print(line)
            elif kind == "text":
                shown = tokenizer.decode(some.tolist()) if tokenizer else " ".join(map(str, some.tolist()))
                console.print(f"  {shown}")
            else:
                console.print(kind, style="dim")
        wrong = space.check(ids, store.slots)
        if wrong:
            console.print(f"not legal: {wrong}", style="red")


def spans(ids: np.ndarray, space: TokenSpace) -> list[tuple[str, np.ndarray]]:
    """A document as runs: ("text", ids), ("audio", ids), each marker by its name, and ("id 7?", ids) out of range."""
    kinds = np.full(len(ids), -1)
    inside = (ids >= 0) & (ids < space.size)
    kinds[inside] = space.kind_table()[ids[inside]]
    group = np.where(kinds >= FIRST_CODE, FIRST_CODE, kinds)
    alone = (group != TEXT) & (group != FIRST_CODE)
    cuts = np.flatnonzero((group[1:] != group[:-1]) | alone[1:]) + 1
    found = []
    for some, kind in zip(np.split(ids, cuts), np.split(group, cuts), strict=True):
        if len(some):
            found.append((_name(int(kind[0]), int(some[0])), some))
    return found


def _name(kind: int, token: int) -> str:
    names = {TEXT: "text", FIRST_CODE: "audio", BOS_KIND: BOS, EOS_KIND: EOS}
    names |= {TEXT_START + i: marker for i, marker in enumerate(MARKERS)}
    return names.get(kind, f"id {token}?")


def _codes(ids: np.ndarray, space: TokenSpace, slots: int) -> np.ndarray:
    bases = space.audio_base + space.entries * np.arange(slots)
    return (ids[: len(ids) // slots * slots].reshape(-1, slots) - bases).clip(0, space.entries - 1).astype(np.int16)


def _frames(ids: np.ndarray, space: TokenSpace, slots: int) -> str:
    """The codes of the first frames, as numbers."""
    codes = _codes(ids, space, slots)
    shown = " | ".join(" ".join(map(str, frame)) for frame in codes[:SHOWN_FRAMES].tolist())
    return shown + (" | .." if len(codes) > SHOWN_FRAMES else "")


def _write(path: Path, wave: np.ndarray, sample_rate: int) -> None:
    import soundfile

    with atomic_path(path) as temporary:
        soundfile.write(temporary, np.clip(wave, -1, 1), sample_rate, format="WAV", subtype="PCM_16")
