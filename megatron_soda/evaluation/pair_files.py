"""The pairs of likelihood benchmarks, in every layout in which their authors and users keep them.

A folder in more than one layout, in none, or with a part missing is refused by name: an accuracy over half of a
benchmark, or over pairs whose sides were guessed, looks like any other.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ..audio.sound import Sound
from ..errors import SodaError
from ..files import reading

Kind = Literal["words", "sentences"]
GOLD = {  # columns of gold.csv that are read
    "words": ("id", "filename", "voice", "frequency", "word", "correct"),
    "sentences": ("id", "filename", "voice", "type", "subtype", "transcription", "correct"),
}
TEXT = {"words": "word", "sentences": "transcription"}
BANDS = ((0, "out of vocabulary"), (5, "1 to 5"), (20, "6 to 20"), (100, "21 to 100"))
LABELS = (("correct", "incorrect"), ("positive", "negative"))  # in file names, of the two sides of a pair
SALMON = (
    *("bg_alignment", "bg_all_consistency", "bg_domain_consistency", "gender_consistency", "rir_consistency"),
    *("sentiment_alignment", "sentiment_consistency", "speaker_consistency"),
)
SHOWN = 3  # items that a message names


@dataclass(frozen=True)
class Side:
    sound: Sound
    text: str = ""  # the transcript, where the layout has one


@dataclass(frozen=True)
class Pair:
    name: str
    positive: Side
    negative: Side
    task: str = ""
    group: str = ""  # pairs of one group, such as one sentence in several voices, weigh as one item; empty: the name


def language_pairs(folder: Path, kind: Kind) -> list[Pair]:
    """sWUGGY (words) and sBLIMP (sentences): ZeroSpeech's gold.csv, the authors' Parquet files, or flat wav files."""
    found = _layouts(folder)
    if "gold.csv" in found:
        return _checked(folder, _gold(folder, kind))
    if "Parquet files" in found:
        return _checked(folder, _hub(folder, kind))
    return _checked(folder, _flat(folder))


def story_pairs(folder: Path) -> list[Pair]:
    """sStoryCloze and tStoryCloze: wav files `NUMBER_….wav`, neighbours by number; transcripts beside them in .txt."""
    _layouts(folder, ("wav files",))
    return _checked(folder, _flat(folder))


def salmon_pairs(folder: Path) -> list[Pair]:
    """SALMon: TASK/sample_I_0.wav (positive) and sample_I_1.wav, or the Parquet files of slprl/salmon.

    Folders of other names are pairs of one's own in the same layout; but part of the eight official ones is refused.
    """
    if any(folder.glob("*.parquet")) and any(folder.glob("*/*.wav")):
        raise SodaError(f"{folder}: holds both Parquet files and folders of wav files; keep one of the two")
    if any(folder.glob("*.parquet")):
        columns = ("ind", "task", "positive_audio", "negative_audio")
        pairs = [
            Pair(f"{row['task']} {row['ind']}", *sides, task=str(row["task"]))
            for row, sides in _rows(folder, columns, ("positive_audio", "negative_audio"))
        ]
    else:
        pairs = _sample_folders(folder)
    tasks = {pair.task for pair in pairs}
    missing = [task for task in SALMON if task not in tasks]
    if tasks & set(SALMON) and missing:
        raise SodaError(
            f"{folder}: SALMon has {len(SALMON)} tasks, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Add them, or name pairs of your own differently."
        )
    return _checked(folder, pairs)


# ---- which layout


def _layouts(folder: Path, possible: Sequence[str] = ("gold.csv", "Parquet files", "wav files")) -> list[str]:
    """The one layout of the folder. wav files beside a gold.csv are its own."""
    there = {
        "gold.csv": any(folder.rglob("gold.csv")),
        "Parquet files": any(folder.glob("*.parquet")),
        "wav files": any(folder.glob("*.wav")),
    }
    found = [name for name in possible if there[name]]
    if "gold.csv" in found and "wav files" in found:
        found.remove("wav files")
    if len(found) > 1:
        raise SodaError(
            f"{folder}: holds both {' and '.join(found)}, so it is not clear which to use; keep one of them"
        )
    if not found:
        hint = ""
        if "gold.csv" in possible and any(folder.rglob("*.wav")):
            hint = " Its wav files lie deeper, and no gold.csv says which are right (ZeroSpeech's test sets have none)."
        raise SodaError(f"{folder}: no pairs in it: neither {' nor '.join(possible)}.{hint}")
    return found


def _checked(folder: Path, pairs: list[Pair]) -> list[Pair]:
    """The pairs, sorted by name. SodaError for two of one name, or for files that are not there."""
    pairs = sorted(pairs, key=lambda pair: pair.name)
    names = [pair.name for pair in pairs]
    if twice := sorted({a for a, b in pairwise(names) if a == b}):
        raise SodaError(f"{folder}: holds several pairs named {some(twice)}")
    listed: dict[str, set[str]] = {}
    missing = []
    for pair in pairs:
        for path in (Path(side.sound.path) for side in (pair.positive, pair.negative)):
            parent = str(path.parent)
            if parent not in listed:
                listed[parent] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
            if path.name not in listed[parent]:
                missing.append(str(path))
    if missing:
        raise SodaError(f"{folder}: incomplete: {len(missing)} recordings are missing: {some(missing)}")
    return pairs


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


# ---- ZeroSpeech's sLM21


def _gold(folder: Path, kind: Kind) -> list[Pair]:
    files = [path for path in sorted(folder.rglob("gold.csv")) if set(GOLD[kind]) <= set(_header(path))]
    if not files:
        raise SodaError(f"{folder}: no gold.csv in it has the columns {', '.join(GOLD[kind])}")
    if len(files) > 1:
        raise SodaError(
            f"{folder}: holds several: {some([str(path) for path in files])}. Link the folder of one of them."
        )
    sides: dict[tuple[str, ...], dict[str, tuple[Side, dict[str, str]]]] = defaultdict(dict)
    keys = ("id", "voice") if kind == "words" else ("subtype", "id", "voice")
    for line, row in _csv(files[0], GOLD[kind]):
        key, correct = tuple(row[name] for name in keys), row["correct"]
        if correct not in ("0", "1"):
            raise SodaError(f"{files[0]}: line {line}: correct is {correct!r}, not 0 or 1")
        if correct in sides[key]:
            raise SodaError(f"{files[0]}: line {line}: pair {' '.join(key)} has two rows with correct={correct}")
        sound = Sound(str(files[0].with_name(f"{row['filename']}.wav")))
        sides[key][correct] = Side(sound, row[TEXT[kind]]), row
    if half := [" ".join(key) for key, both in sides.items() if len(both) < 2]:
        raise SodaError(f"{files[0]}: incomplete: only one side of {len(half)} pairs: {some(half)}")
    pairs = []
    for key, both in sides.items():
        (positive, row), (negative, _) = both["1"], both["0"]
        task = _band(row["frequency"], files[0]) if kind == "words" else row["type"]
        pairs.append(Pair(" ".join(key), positive, negative, task, " ".join(key[:-1])))
    return pairs


def _header(path: Path) -> list[str]:
    with reading(path, "not a CSV file"), path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _csv(path: Path, columns: Iterable[str]) -> list[tuple[int, dict[str, str]]]:
    """Rows with the number of their line. SodaError for one without some of the columns."""
    with reading(path, "not a CSV file"), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows = [(reader.line_num, row) for row in reader]
    for line, row in rows:
        if short := [name for name in columns if row[name] is None]:
            raise SodaError(f"{path}: line {line}: nothing in column {short[0]}")
    return rows


def _band(frequency: str, path: Path) -> str:
    """sLM21's bands of how often a word occurs in its training set."""
    if frequency == "oov":
        return BANDS[0][1]
    with reading(path, f"frequency {frequency!r} is neither a number nor oov"):
        number = float(frequency)
    return next((name for most, name in BANDS if number <= most), "over 100")


# ---- Parquet files


def _hub(folder: Path, kind: Kind) -> list[Pair]:
    texts = [f"{side}_{TEXT[kind]}" for side in ("positive", "negative")]
    pairs = []
    for row, sides in _rows(folder, ("id", "positive", "negative", *texts), ("positive", "negative")):
        positive, negative = (Side(side.sound, str(row[text] or "")) for side, text in zip(sides, texts, strict=True))
        pairs.append(Pair(str(row["id"]), positive, negative))
    return pairs


def _rows(
    folder: Path, columns: Sequence[str], sounds: tuple[str, str]
) -> list[tuple[dict[str, Any], tuple[Side, Side]]]:
    """The values of all rows but their sound, and where that is: positive and negative."""
    import pyarrow.parquet as pq

    found = []
    for path in sorted(folder.glob("*.parquet")):
        with reading(path, "not a Parquet file"):
            there = pq.read_schema(path).names
        if missing := [name for name in columns if name not in there]:
            raise SodaError(f"{path}: no column {missing[0]}; it has {', '.join(there)}")
        with reading(path, "not a Parquet file"):
            table = pq.read_table(path, columns=[name for name in columns if name not in sounds]).to_pylist()
        for number, row in enumerate(table):
            positive, negative = (Side(Sound(str(path), row=number, column=name)) for name in sounds)
            found.append((row, (positive, negative)))
    return found


# ---- wav files


def _flat(folder: Path) -> list[Pair]:
    """Neighbours by the number that their names begin with, up to `_` or `+`: the positive one first. Where both have
    one number, names must say which is which; the order that a file system lists them in is none."""
    numbered: dict[int, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.wav")):
        if not (number := re.match(r"(\d+)[_+]", path.name)):
            raise SodaError(
                f"{path}: the name does not begin with a number and _ or +, which pairs it with another file"
            )
        numbered[int(number[1])].append(path)
    counts = {len(paths) for paths in numbered.values()}
    if counts == {1}:
        files = [numbered[number][0] for number in sorted(numbered)]
        if len(files) % 2:
            raise SodaError(f"{folder}: incomplete: {len(files)} wav files, so one has no partner")
        sides = list(zip(files[::2], files[1::2], strict=True))
    elif counts == {2}:
        sides = [_labelled(*numbered[number]) for number in sorted(numbered)]
    else:
        odd = [f"{number} ({len(paths)})" for number, paths in sorted(numbered.items()) if len(paths) != 2]
        raise SodaError(f"{folder}: incomplete: numbers whose files are not two: {some(odd)}")
    return [Pair(positive.stem, _beside(positive), _beside(negative)) for positive, negative in sides]


def _labelled(first: Path, second: Path) -> tuple[Path, Path]:
    """The positive one of two files with the same number first."""
    words = [set(re.split(r"[^a-z]+", path.stem.lower())) for path in (first, second)]
    for positive, negative in LABELS:
        if positive in words[0] and negative in words[1]:
            return first, second
        if positive in words[1] and negative in words[0]:
            return second, first
    raise SodaError(
        f"{first}: ambiguous: {second.name} has the same number, and neither name says which of them is right. Put "
        "`correct` and `incorrect` into the names, or number all files, the right one of each pair first."
    )


def _beside(sound: Path) -> Side:
    text = sound.with_suffix(".txt")
    if not text.is_file():
        return Side(Sound(str(sound)))
    with reading(text, "not text"):
        return Side(Sound(str(sound)), text.read_text(encoding="utf-8").strip())


def _sample_folders(folder: Path) -> list[Pair]:
    pairs = []
    for task in sorted(path for path in folder.iterdir() if path.is_dir()):
        samples: dict[int, dict[str, Path]] = defaultdict(dict)
        for path in sorted(task.glob("*.wav")):
            if not (name := re.fullmatch(r"sample_(\d+)_([01])", path.stem)):
                raise SodaError(f"{path}: not named sample_NUMBER_0.wav (right) or sample_NUMBER_1.wav (wrong)")
            samples[int(name[1])][name[2]] = path
        if half := [f"{task.name}/sample_{number}" for number, both in samples.items() if len(both) < 2]:
            raise SodaError(f"{folder}: incomplete: only one side of {len(half)} pairs: {some(half)}")
        for number, both in sorted(samples.items()):
            positive, negative = (Side(Sound(str(both[label]))) for label in "01")
            pairs.append(Pair(f"{task.name} {number}", positive, negative, task.name))
    if not pairs:
        raise SodaError(f"{folder}: no pairs in it: neither Parquet files nor TASK/sample_NUMBER_0.wav")
    return pairs
