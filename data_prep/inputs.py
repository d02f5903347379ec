"""Indexes the input that a recipe names: speech, text and released corpora."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_soda.audio.sound import Sound
from megatron_soda.config import Recipe
from megatron_soda.errors import SodaError
from megatron_soda.tokenizer import TextTokenizer, check_pieces

from . import asterisk, choose, numbers, sources
from .index import Index, make_index, read_index
from .interleave import needs_text
from .show import Rejects, console, progress
from .split import Groups, keys_of
from .texts import read_texts
from .utterance import Reject, Utterance

TEXTS_A_SHARD = 4  # times as many as utterances: a text is a sentence or a page


@dataclass(frozen=True)
class Inputs:
    speech: Index
    speech_rejects: int
    texts: Index
    repeated_texts: int  # left out as duplicates
    released: list[Path]
    groups: Groups  # for the utterances, or the texts if there are none


def read_inputs(recipe: Recipe, work: Path, rejects: Rejects) -> Inputs:
    """Builds the indices in WORK. Raises SodaError if there is nothing to prepare, more than prepare.max_rejects is
    rejected, or the input cannot be split. A dry run reads its inputs here too, so it finds the same problems.
    """
    p = recipe.prepare
    if p.tokenizer:
        TextTokenizer(p.tokenizer)  # it is needed at the end; report now if it is missing
    groups = Groups(work / "groups.sqlite")
    texts, no_text = _text_patterns(recipe)
    with progress("utterances", None if p.speech and not p.units else 0) as advance:
        source = _source(recipe, work) if p.speech and not p.units else iter(())

        def take(u: Utterance) -> None:
            groups.add(keys_of(p.split_by, id=u.id, recording=u.recording, prompt=u.prompt, text=u.text))
            advance(1)

        index = make_index(source, work / "index", shard_size=p.shard_size, reject=rejects.add, take=take)
    speech_rejects, repeats = rejects.count, 0
    check_rejects(recipe, speech_rejects, index.utterances + speech_rejects, rejects)
    if p.speech and not p.units and not index.utterances:
        raise SodaError(f"{p.speech}: contains no utterance")
    for reject in no_text:
        rejects.add(reject)

    def reject_text(reject: Reject) -> None:
        nonlocal repeats
        if reject.reason.startswith("duplicate id"):
            repeats += 1
        else:
            rejects.add(reject)

    with progress("texts", None if texts else 0) as advance:

        def take_text(u: Utterance) -> None:
            if not index.utterances and not p.units:
                groups.add(keys_of(["text"], id=u.id, text=u.text))
            advance(1)

        text_index = make_index(
            (_as_item(text) for text in read_texts(texts)) if texts else iter(()),
            work / "texts",
            shard_size=TEXTS_A_SHARD * p.shard_size,
            reject=reject_text,
            take=take_text,
        )
    groups.divide(p.valid_share, p.test_share)
    corpora = files(p.released, "prepare.released")
    if not index.utterances and not text_index.utterances and not corpora and not p.units:
        raise SodaError(f"there is nothing to prepare: {rejects.count} inputs, all rejected.{rejects.keep()}")
    if index.cut_recordings:
        console.note(
            f"{index.cut_recordings} recordings",
            " become more than one document: they are very long, or their utterances are not consecutive in the source",
        )
    found = Inputs(index, speech_rejects, text_index, repeats, corpora, groups)
    if not corpora and not p.units:
        check_sides(groups, rejects)
        largest, total = groups.largest()
        if largest > max(2, total / 2):
            console.note(
                f"{largest:,} of {total:,}",
                " are linked by what they share (prepare.split_by): they are all on one side of the split",
            )
    if not p.tokenizer and not p.units:  # it is trained after encoding; report now if it cannot be
        check_pieces(training_sentences(recipe, found), p.text_pieces)
    return found


def training_sentences(recipe: Recipe, found: Inputs, count: int = choose.TOKENIZER_SENTENCES) -> list[str]:
    """Similar to what the tokenizer will be trained on, but from all sides, because the split is made after
    encoding."""
    p = recipe.prepare
    spoken, written = (((one.id, one.text) for one in items(index)) for index in (found.speech, found.texts))
    return choose.sentences(spoken, written, (p.codebooks or 8, p.entries or 2048), count)


def check_rejects(recipe: Recipe, bad: int, total: int, rejects: Rejects, stopped_early: bool = False) -> None:
    """Raises SodaError if more of the `total` utterances are unusable than prepare.max_rejects allows, or all are."""
    p = recipe.prepare
    if bad <= p.max_rejects * total and (bad < total or not total):
        return
    more = ", and there may be more" if stopped_early else ""
    advice = ""
    if rejects.reasons["no transcript"] and needs_text(p.orders):
        advice = (
            f" The documents of prepare.orders=[{', '.join(p.orders)}] need a transcript of every recording: provide a "
            "manifest.jsonl, or X.txt beside X.wav; or train on sound only, with prepare.orders=[audio-only]."
        )
    if rejects.reasons["duplicate id"]:
        advice += " If `id` does not identify the utterance, ignore it: prepare.columns={id: null}."
    raise SodaError(
        f"stopped: {bad} of {total} utterances cannot be used{more} ({rejects.in_words()}); the limit is "
        f"prepare.max_rejects={p.max_rejects:g}.{rejects.keep()}{advice}"
    )


def too_little(side: str, rejects: Rejects) -> str:
    """The error for a store that would be empty."""
    why = f" Left out: {rejects.in_words()}." if rejects.count else ""
    return (
        f"no document is left for the {side} store: there is too little usable input to split. Add more, or change "
        f"prepare.valid_share and prepare.test_share.{why}{rejects.keep()}"
    )


def check_sides(groups: Groups, rejects: Rejects) -> None:
    """Raises SodaError if a side is empty, for example because a few sentences link everything."""
    largest, total = groups.largest()
    counts = groups.counts()
    empty = next((side for side in ("test", "valid", "train") if not counts[side]), "")
    if not empty:
        return
    why = ""
    if largest > max(2, total / 2):
        why = (
            f" {largest:,} of {total:,} are linked by shared recordings, prompts, texts or sounds: one short "
            "sentence that many speakers say is enough. To allow it on both sides, take `text` out of prepare.split_by."
        )
    raise SodaError(too_little(empty, rejects) + why)


def _source(recipe: Recipe, work: Path) -> Iterator[Utterance | Reject]:
    p = recipe.prepare
    if p.speech != "asterisk":
        scratch = work / "scratch"
        return sources.read(p.speech, p.layout, scratch, needs_text(p.orders), p.columns, p.audio_root)
    if p.columns or p.audio_root:
        raise SodaError("prepare.columns and prepare.audio_root are for your own corpora, not for speech=asterisk")
    folder = Path(p.downloads) / "asterisk"
    with console.status("downloading the Asterisk prompts"):
        asterisk.fetch(folder, p.languages)
    utterances, rejects = asterisk.read(folder, p.languages)
    if p.numbers:
        with console.status("joining spoken numbers"):
            utterances = [*utterances, *numbers.strings(folder / "numbers", utterances, p.numbers)]
    utterances.sort(key=lambda u: u.id)
    return iter([*(asterisk.pairs(utterances) if p.orders == ["translation"] else utterances), *rejects])


def _text_patterns(recipe: Recipe) -> tuple[list[str], list[Reject]]:
    """The globs of texts. If WordNet cannot be fetched, that is a Reject, because speech can do without it."""
    patterns, rejects = [], []
    for name in recipe.prepare.text:
        if name != "wordnet":
            patterns.append(name)
            continue
        try:
            with console.status("fetching text"):
                patterns += map(str, asterisk.fetch_text(Path(recipe.prepare.downloads) / "wordnet"))
        except SodaError as error:
            if not recipe.prepare.speech and not recipe.prepare.units:
                raise
            console.note("without WordNet's text", f": {error}")
            rejects.append(Reject("prepare.text: wordnet", "text not downloaded, so the speech is prepared without it"))
    return patterns, rejects


def _as_item(text: str | Reject) -> Utterance | Reject:
    if isinstance(text, Reject):
        return text
    id = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return Utterance(id, Sound(""), text)


def items(index: Index) -> Iterator[Utterance]:
    return (utterance for shard in index.shards for utterance, _ in read_index(shard))


def files(patterns: list[str], setting: str) -> list[Path]:
    """The files that the globs match."""
    found: list[Path] = []
    for pattern in patterns:
        some = [path for path in sources.files.matches(Path(pattern).expanduser())[1] if path.is_file()]
        if not some:
            raise SodaError(f"{setting}: no file matches {pattern}")
        found += some
    return list(dict.fromkeys(found))
