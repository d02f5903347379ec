"""The samples section: every sample with its sounds, spectrograms and texts, compared word by word."""

import difflib
import re
from pathlib import Path
from typing import Any

from ..audio.judge import judge, level_of
from ..registry import TASKS
from . import plots
from .plots import Clip
from .reading import as_dict
from .words import finite, plain, plural, span

MOST_CARDS = 60
PROGRESS = ("On the way", "The same prompt and random draw at each checkpoint that the run has kept.")
TRACKS = {
    "original": ("Original", "the recording"),
    "codec": ("Codec", "the recording turned into tokens and back: the best that the model could sound"),
    "prompt": ("Prompt", "what the model was given"),
    "model": ("Model", "what the model produced: the best candidate"),
    "median": ("Model, median", "the median candidate"),
}


def samples(run: Path, listed: list[Any], warnings: list[str]) -> list[dict[str, Any]]:
    """The samples by task, each with its sounds and its texts."""
    found: dict[str, list[dict]] = {task: [] for task in (*TASKS.names(), "progress")}
    if len(listed) > MOST_CARDS:
        warnings.append(f"The first {MOST_CARDS} of {len(listed):,} samples are shown.")
    for sample in listed[:MOST_CARDS]:
        if isinstance(sample, dict):
            found.setdefault(str(sample.get("task", "other")), []).append(card(run / "samples", sample))
    named = [(*words_of(task), cards) for task, cards in found.items() if cards]
    return [{"name": name, "meaning": meaning, "cards": cards} for name, meaning, cards in named]


def words_of(task: str) -> tuple[str, str]:
    """A task's heading and description; for a task that this version lacks, just its name."""
    if task == "progress":
        return PROGRESS
    return (TASKS[task].title, TASKS[task].meaning) if task in TASKS else (plain(task).capitalize(), "")


def card(folder: Path, sample: dict[str, Any]) -> dict[str, Any]:
    audio = {str(key): str(value) for key, value in as_dict(sample.get("audio")).items() if value}
    order = [key for key in TRACKS if key in audio] + [key for key in audio if key not in TRACKS]
    clips: dict[str, Clip | str] = {key: clip_or_reason(folder, audio[key]) for key in order}
    good = {key: clip for key, clip in clips.items() if isinstance(clip, Clip)}
    mels = {key: plots.log_mel(clip) for key, clip in good.items()}
    peak = max((float(mel.max()) for mel in mels.values()), default=0.0)
    longest = max((clip.seconds for clip in good.values()), default=0.0)
    tracks = []
    for key, clip in clips.items():
        name, meaning = TRACKS.get(key, (plain(key).capitalize(), ""))
        track: dict[str, Any] = {"key": key, "name": name, "meaning": meaning, "problem": "", "doubts": []}
        if isinstance(clip, Clip):
            track["doubts"] = doubts(sample, key, clip, good)
            if clip.whole:
                track["meaning"] += f"; cut to the first {span(clip.seconds)} of {span(clip.whole)}"
            track |= {
                "seconds": clip.seconds,
                "rate": clip.rate,
                "percent": 100 * clip.seconds / longest,
                "sound": plots.wav_uri(clip),
                "picture": plots.spectrogram_uri(mels[key], peak),
            }
        else:
            track["problem"] = clip
        tracks.append(track)
    return {
        "id": str(sample.get("id", "")),
        "language": str(sample.get("language") or ""),
        "note": note(sample),
        "tracks": tracks,
        "ticks": [{"label": f"{tick:g}", "percent": 100 * tick / longest} for tick in plots.time_ticks(longest)]
        if longest
        else [],
        **texts(sample),
    }


def doubts(sample: dict[str, Any], key: str, clip: Clip, clips: dict[str, Clip]) -> list[str]:
    """Why a generated sound is unlikely to be speech: the verdict from when it was drawn, or else from the sound
    itself."""
    if key not in ("model", "median"):
        return []
    judged = as_dict(as_dict(sample.get("verdicts")).get(key)).get("problems")
    if isinstance(judged, list):
        return [str(problem) for problem in judged]
    spoken = clips.get("codec") or clips.get("original")
    expected = spoken.seconds if spoken and sample.get("prompt_text") is not None else None
    level = level_of(spoken.samples) if spoken else -25.0
    verdict = judge(clip.samples, clip.rate, level=level, expected=expected, ended=True, nats=0.0)
    return verdict.problems


def note(sample: dict[str, Any]) -> str:
    count, good = finite(sample.get("candidates")), finite(sample.get("good"))
    drawn = f"{count:.0f} drawn, {good or 0:.0f} of them plausible" if count else ""
    return "; ".join(filter(None, [drawn, str(sample.get("note") or "")]))


def clip_or_reason(folder: Path, name: str) -> Clip | str:
    """The clip, or a message why there is none."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        return f"{name} is outside the samples folder and is not shown."
    if not path.is_file():
        return f"{name} is missing."
    try:
        clip = plots.read_clip(path)
    except (plots.soundfile.SoundFileError, OSError, ValueError):
        return f"{name} could not be read as a sound file."
    return clip if len(clip.samples) else f"{name} is empty."


def texts(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample's texts; reference and output compared word by word if they should agree."""
    prompt, reference, output = (sample.get(f"{key}_text") for key in ("prompt", "reference", "output"))
    median = sample.get("median_text")
    found = {"prompt": prompt, "reference": None, "output": None, "median": None, "agreement": ""}
    found["median"] = str(median) if median is not None and median != output else None
    if reference is not None and output is not None:
        found["reference"], found["output"], found["agreement"] = compared(str(reference), str(output))
    else:
        found["reference"] = None if reference is None else [("same", str(reference))]
        found["output"] = None if output is None else [("same", str(output))]
    return found


def compared(reference: str, output: str) -> tuple[list, list, str]:
    """Both texts in pieces marked "same" or "differs", and how much of the reference was matched."""
    words = " " in reference.strip()
    left, right = (re.findall(r"\S+\s*" if words else r"\S\s*", text) for text in (reference, output))
    bare = [[re.sub(r"[\W_]+", "", part.lower()) or part.strip() for part in parts] for parts in (left, right)]
    pieces: tuple[list, list] = ([], [])
    agreed = 0
    for kind, a, b, c, d in difflib.SequenceMatcher(None, *bare, autojunk=False).get_opcodes():
        mark = "same" if kind == "equal" else "differs"
        agreed += (b - a) if kind == "equal" else 0
        for into, part in zip(pieces, ("".join(left[a:b]), "".join(right[c:d])), strict=True):
            marked = part if mark == "same" else part.rstrip()  # the space after a marked word is not marked
            into += [(sort, text) for sort, text in ((mark, marked), ("same", part[len(marked) :])) if text]
    unit = "word" if words else "character"
    return *pieces, f"{agreed} of {plural(len(left), unit)} of the reference matched in order"
