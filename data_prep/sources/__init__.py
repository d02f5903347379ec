"""Sources of speech: manifests, folders, tars and datasets as they are distributed, read as a stream.

files.py: the files that a pattern names, and their lines. rows.py: the checks that all share. The layouts: manifest.py,
folders.py, tars.py, saved.py, translations.py.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from megatron_soda.errors import SodaError

from ..utterance import Reject, Utterance
from . import files, folders, manifest, saved, tars, translations
from .rows import SOUND_SUFFIXES, Wanted, both_forms

EXAMPLES = {
    "manifest": "a .jsonl, .csv, .tsv or .parquet file (also .gz), or NeMo's .json with one object per line, or a "
    "folder with manifest.jsonl, manifest.csv, manifest.tsv, manifest.parquet or manifest.json",
    "audio": "a folder of sound files only; prepare.orders=[audio-only] needs no transcripts",
    "pairs": "a folder of sound files with X.txt beside X.wav",
    "librispeech": "84/121123/84-121123.trans.txt beside 84/121123/84-121123-0000.flac (or .wav, ..)",
    "ljspeech": "metadata.csv with lines `LJ001-0001|The text.|The text.` beside wavs/LJ001-0001.wav",
    "commonvoice": "validated.tsv or train.tsv beside clips/",
    "emilia": "EN_B00000_S00000_W000000.json beside EN_B00000_S00000_W000000.mp3, in folders or in tars",
    "webdataset": "tars (also .tar.gz) with X.flac and X.txt or X.json",
    "hf": "the output of datasets' save_to_disk, or a folder of Parquet shards like data/train-00000-of-00002.parquet",
    "parallel": "a manifest with audio, text, language, translation, translation_language, translation_audio",
    "cvss": "CVSS-T's train.tsv beside train/; prepare.audio_root is Common Voice, with validated.tsv beside clips/",
    "covost": "CoVoST 2's covost_v2.es_en.tsv; prepare.audio_root is Common Voice, with validated.tsv beside clips/",
}
LAYOUTS = ("auto", *EXAMPLES)


def read(
    pattern: str,
    layout: str,
    scratch: Path,
    needs_text: bool = True,
    columns: Mapping[str, str | None] | None = None,
    audio_root: str = "",
) -> Iterator[Utterance | Reject]:
    """The utterances in what `pattern` names: a folder, a file or a glob (`**`: any number of folders).

    The order is fixed: by file, and within a file by line. An unusable line or file becomes a Reject; if `needs_text`,
    that includes one without a transcript. Memory does not grow with the number of utterances. Ids are not checked for
    uniqueness here. Files that must be unpacked go to `scratch`. For `columns` and `audio_root` see rows.Wanted.

    Layout "auto" goes by names, from the top folder down. The output of save_to_disk is "hf", manifest.* a manifest (a
    .json only if its first line is an object with a sound), metadata.csv beside wavs/ "ljspeech", validated.tsv or
    train.tsv beside clips/ "commonvoice", a .trans.txt "librispeech". Tars are "emilia" if the first sound is named
    like RECORDING_W000000, otherwise "webdataset". A .parquet or .arrow in a folder is "hf", a sound with X.json beside
    it "emilia", with X.txt "pairs". The first folder that matches decides for the whole; if none does, but there are
    sounds, it is "audio". A named file is classified by its suffix and its neighbours.

    Raises SodaError, partly before the first utterance: the pattern names nothing, no known layout fits, a table has
    the wrong columns, or `columns` names a column that does not exist.
    """
    if layout not in LAYOUTS:
        raise SodaError(f"layout {layout!r}: there is no such layout. There are:\n{_listing()}")
    wanted = Wanted(needs_text, columns or {}, Path(audio_root).expanduser() if audio_root else None)
    root, places = files.expand(pattern)
    known: dict[tuple[Path, str], str] = {}
    layouts: dict[str, list[Path]] = {}
    for place in places:
        # Each .json is examined individually.
        key = (place, "") if place.is_dir() or _suffix(place) == ".json" else (place.parent, _suffix(place))
        if key not in known:
            known[key] = layout if layout != "auto" else _detect(place, wanted)
        layouts.setdefault(known[key], []).append(place)
    unknown = layouts.pop("", [])
    if not layouts:
        raise SodaError(f"{pattern}: nothing here has a known layout. The layouts:\n{_listing()}\n{manifest.EXAMPLE}")
    return _read(root, layouts, unknown, Path(scratch), wanted)


def _read(
    root: Path, layouts: dict[str, list[Path]], unknown: list[Path], scratch: Path, wanted: Wanted
) -> Iterator[Utterance | Reject]:
    for layout, places in layouts.items():
        yield from _reader(layout)(root, places, scratch, wanted)
    yield from (Reject(files.relative(place, root), "not a known layout") for place in unknown)
    wanted.check_found()


def _reader(layout: str) -> Callable[[Path, list[Path], Path, Wanted], Iterator[Utterance | Reject]]:
    def emilia(root: Path, places: list[Path], scratch: Path, wanted: Wanted) -> Iterator[Utterance | Reject]:
        packed = [place for place in places if place.is_dir() or tars.is_tar(place)]
        loose = [place for place in places if place.is_dir() or not tars.is_tar(place)]
        yield from tars.read(root, packed, scratch, wanted, emilia=True)
        yield from folders.read("emilia", root, loose, wanted)

    special = {"manifest": manifest.read, "webdataset": tars.read, "hf": saved.read, "emilia": emilia}
    special |= {"parallel": translations.parallel, "cvss": translations.cvss, "covost": translations.covost}
    return special.get(layout) or (lambda root, places, _, wanted: folders.read(layout, root, places, wanted))


def _suffix(place: Path) -> str:
    return ".tar" if tars.is_tar(place) else files.kind(place)


def _listing() -> str:
    return "\n".join(f"  {layout}: {example}" for layout, example in EXAMPLES.items())


def _detect(place: Path, wanted: Wanted) -> str:
    """The layout of a folder or a file; empty where none fits."""
    if place.is_dir():
        found, sounds = "", False
        for folder, subfolders, names in files.walk(place, []):
            if found := _of_folder(folder, subfolders, names, wanted):
                break
            sounds = sounds or any(map(folders.is_sound, names))
        return found or ("audio" if sounds else "")
    suffix = _suffix(place)
    if suffix == ".tar":
        return "emilia" if tars.looks_like_emilia(place) else "webdataset"
    if suffix == ".csv" and place.name == "metadata.csv" and (place.parent / "wavs").is_dir():
        return "ljspeech"
    if suffix == ".tsv" and (place.parent / "clips").is_dir():
        return "commonvoice"
    if suffix != ".json" and suffix in manifest.KINDS:
        return "manifest"
    if suffix == ".arrow":
        return "hf"
    if place.name.endswith(".trans.txt"):
        return "librispeech"
    if suffix in folders.BESIDE:  # the text of a sound that is also named
        sounds = (
            (place.parent / name).is_file() for sound in SOUND_SUFFIXES for name in both_forms(f"{place.stem}{sound}")
        )
        if any(sounds):
            return folders.BESIDE[suffix]
        return "manifest" if suffix == ".json" and manifest.is_manifest(place, wanted) else ""
    if folders.is_sound(place.name):
        return _of_sound(place.name, lambda name: (place.parent / name).is_file()) or "audio"
    return ""


def _of_folder(folder: Path, subfolders: list[str], names: list[str], wanted: Wanted) -> str:
    present = set(names)
    if saved.is_dataset(names):
        return "hf"
    if manifest.of_folder(folder, names, wanted):
        return "manifest"
    if "metadata.csv" in present and "wavs" in subfolders:
        return "ljspeech"
    if "clips" in subfolders and present & set(folders.COMMON_VOICE):
        return "commonvoice"
    for name in names:
        if name.endswith(".trans.txt"):
            return "librispeech"
        if tars.is_tar(name):
            return "emilia" if tars.looks_like_emilia(folder / name) else "webdataset"
        if files.kind(name) in (".parquet", ".arrow"):
            return "hf"
    sounds = (name for name in names if folders.is_sound(name))
    return next((found for name in sounds if (found := _of_sound(name, present.__contains__))), "")


def _of_sound(name: str, is_there: Callable[[str], bool]) -> str:
    return next(
        (
            layout
            for suffix, layout in folders.BESIDE.items()
            if any(map(is_there, both_forms(files.stem(name) + suffix)))
        ),
        "",
    )
