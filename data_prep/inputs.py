"""What a recipe names as its input: speech, text and released corpora, indexed."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from megatron_soda.audio.sound import Sound
from megatron_soda.config import Recipe
from megatron_soda.errors import SodaError
from megatron_soda.tokenizer import TextTokenizer, check_pieces

from . import asterisk, choose, sources
from .index import Index, make_index, read_index
from .interleave import needs_text
from .show import Rejects, console, progress
from .split import Groups, keys_of
from .texts import read_texts
from .utterance import Reject, Utterance

TEXTS_A_SHARD = 4  # times the utterances of one: a text is a sentence or a page


@dataclass(frozen=True)
class Inputs:
    speech: Index
    speech_rejects: int
    texts: Index
    repeated_texts: int  # left out: they were there already
    released: list[Path]
    groups: Groups  # of the utterances, or of the texts if there are none


def read_inputs(recipe: Recipe, work: Path, rejects: Rejects) -> Inputs:
    """Makes the indices in WORK. SodaError if there is nothing to prepare, if more is rejected than
    prepare.max_rejects, or if what is there cannot be split. A dry run reads its inputs here too, so it finds the same.
    """
    p = recipe.prepare
    if p.tokenizer:
        TextTokenizer(p.tokenizer)  # it is needed at the end; that it is missing can be said now
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
        raise SodaError(f"{p.speech}: there is no utterance in it")
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
        console.print(
            f"[yellow]{index.cut_recordings} recordings[/] become more than one document: they are very long, or their "
            "utterances do not follow one another in the source"
        )
    found = Inputs(index, speech_rejects, text_index, repeats, corpora, groups)
    if not corpora and not p.units:
        check_sides(groups, rejects)
        largest, total = groups.largest()
        if largest > max(2, total / 2):
            console.print(
                f"[yellow]{largest:,} of {total:,}[/] hang together by what they share (prepare.split_by): they are "
                "all on one side of the split"
            )
    if not p.tokenizer and not p.units:  # it is trained after encoding; that it cannot be can be said now
        check_pieces(training_sentences(recipe, found), p.text_pieces)
    return found


def training_sentences(recipe: Recipe, found: Inputs, count: int = choose.TOKENIZER_SENTENCES) -> list[str]:
    """Much like what the tokenizer will be trained on: of all sides, because the split is made after encoding."""
    p = recipe.prepare
    spoken, written = (((one.id, one.text) for one in items(index)) for index in (found.speech, found.texts))
    return choose.sentences(spoken, written, (p.codebooks or 8, p.entries or 2048), count)


def check_rejects(recipe: Recipe, bad: int, total: int, rejects: Rejects, stopped_early: bool = False) -> None:
    """SodaError if more of `total` utterances cannot be used than prepare.max_rejects allows, or none can."""
    p = recipe.prepare
    if bad <= p.max_rejects * total and (bad < total or not total):
        return
    more = ", and there may be more" if stopped_early else ""
    advice = ""
    if rejects.reasons["no transcript"] and needs_text(p.orders):
        advice = (
            f" The documents of prepare.orders=[{', '.join(p.orders)}] need a transcript of every recording: give a "
            "manifest.jsonl, or X.txt beside X.wav; or train on the sound alone, with prepare.orders=[audio-only]."
        )
    if rejects.reasons["duplicate id"]:
        advice += " Where `id` names something else than the utterance, leave it out: prepare.columns={id: null}."
    raise SodaError(
        f"stopped: {bad} of {total} utterances cannot be used{more} ({rejects.in_words()}); the limit is "
        f"prepare.max_rejects={p.max_rejects:g}.{rejects.keep()}{advice}"
    )


def too_little(side: str, rejects: Rejects) -> str:
    """What to say of a store that would be empty."""
    why = f" Left out: {rejects.in_words()}." if rejects.count else ""
    return (
        f"no document is left for the {side} store: what is usable is too little to split. Give more, or change "
        f"prepare.valid_share and prepare.test_share.{why}{rejects.keep()}"
    )


def check_sides(groups: Groups, rejects: Rejects) -> None:
    """SodaError if a side is empty, as where a few sentences hold everything together."""
    largest, total = groups.largest()
    counts = groups.counts()
    empty = next((side for side in ("test", "valid", "train") if not counts[side]), "")
    if not empty:
        return
    why = ""
    if largest > max(2, total / 2):
        why = (
            f" {largest:,} of {total:,} hang together, by recordings, prompts, texts or sounds that they share: a "
            "short sentence that many say is enough. Take `text` out of prepare.split_by if it may stand on both sides."
        )
    raise SodaError(too_little(empty, rejects) + why)


def _source(recipe: Recipe, work: Path) -> Iterator[Utterance | Reject]:
    p = recipe.prepare
    if p.speech != "asterisk":
        scratch = work / "scratch"
        return sources.read(p.speech, p.layout, scratch, needs_text(p.orders), p.columns, p.audio_root)
    if p.columns or p.audio_root:
        raise SodaError("prepare.columns and prepare.audio_root are for corpora of your own, not for speech=asterisk")
    folder = Path(p.downloads) / "asterisk"
    with console.status("fetching the Asterisk prompts"):
        asterisk.fetch(folder, p.languages)
    utterances, rejects = asterisk.read(folder, p.languages)
    return iter([*sorted(utterances, key=lambda u: u.id), *rejects])


def _text_patterns(recipe: Recipe) -> tuple[list[str], list[Reject]]:
    """The globs of texts. WordNet's that cannot be fetched is a Reject: speech can do without."""
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
            console.print(f"[yellow]without WordNet's text[/]: {escape(str(error))}", highlight=False)
            rejects.append(Reject("prepare.text: wordnet", "text not fetched, so the speech is without it"))
    return patterns, rejects


def _as_item(text: str | Reject) -> Utterance | Reject:
    if isinstance(text, Reject):
        return text
    id = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return Utterance(id, Sound(""), text)


def items(index: Index) -> Iterator[Utterance]:
    return (utterance for shard in index.shards for utterance, _ in read_index(shard))


def files(patterns: list[str], setting: str) -> list[Path]:
    """The files that globs match."""
    found: list[Path] = []
    for pattern in patterns:
        some = [path for path in sources.files.matches(Path(pattern).expanduser())[1] if path.is_file()]
        if not some:
            raise SodaError(f"{setting}: no file matches {pattern}")
        found += some
    return list(dict.fromkeys(found))
