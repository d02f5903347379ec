"""`soda prepare --dry-run`: estimates the result from the index and a few hundred decoded utterances. Does not touch
the run.

Inputs are read, rejected, planned and split by the same functions as in `prepare`, so the same problems are found. Only
lengths are estimated: for sound from what is decoded and the sizes of the rest, for text with a tokenizer trained on a
sample.
"""

import heapq
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.table import Table

from megatron_soda.audio.reading import read_pieces
from megatron_soda.audio.sound import BadAudio
from megatron_soda.codecs import load_codec
from megatron_soda.codecs.base import Codec
from megatron_soda.config import Recipe
from megatron_soda.errors import SodaError
from megatron_soda.tokenizer import TextTokenizer, clean_text, train_sentencepiece, write_byte_tokenizer
from megatron_soda.vocab import TokenSpace

from .documents import cleaned, plan_documents
from .index import Index, digest, read_index
from .inputs import Inputs, check_rejects, items, read_inputs, too_little, training_sentences
from .interleave import texts_of
from .show import Rejects, console
from .split import ID, SIDES, sides_of_texts
from .utterance import Reject, Utterance

SAMPLE = 512  # utterances to decode, from each sort in proportion
FEWEST = 16  # from each sort
ENOUGH = 36_000  # seconds of a sort after which no more than FEWEST are decoded; and of one recording
TEXTS = 2000  # to encode
SENTENCES = 20_000  # to train the tokenizer on


@dataclass(frozen=True)
class Estimate:
    utterances: int
    texts: int
    repeated_texts: int
    released_files: int
    rejects: int
    unreadable_share: float
    hours: float
    tokens: int
    bytes: dict[str, int]  # of units, parts and stores


def estimate(recipe: Recipe) -> Estimate:
    """Also prints what it returns. Raises SodaError like `prepare`."""
    with tempfile.TemporaryDirectory(prefix="soda-") as scratch:
        rejects = Rejects(Path(scratch) / "rejects.jsonl")
        try:
            return _estimate(recipe, Path(scratch), rejects)
        finally:
            rejects.close()


def _estimate(recipe: Recipe, scratch: Path, rejects: Rejects) -> Estimate:
    p = recipe.prepare
    if p.units or p.released:
        raise SodaError("--dry-run is only for speech and text: prepare.units and prepare.released are encoded already")
    inputs = read_inputs(recipe, scratch, rejects)
    index = inputs.speech
    codec = load_codec(
        p.codec, p.codec_path or None, codebooks=(p.codebooks or None) if p.codec != "embedded" else None
    )
    codebooks = p.codebooks or codec.codebooks
    heard = _listen(recipe, index, codec, rejects)
    usable = 1 - heard.bad / max(1, heard.number)
    if heard.decoded == heard.number:
        bad = inputs.speech_rejects + round(heard.bad)
        check_rejects(recipe, bad, inputs.speech_rejects + index.utterances, rejects)
    elif inputs.speech_rejects + heard.bad > p.max_rejects * index.utterances:
        console.note(
            f"{1 - usable:.0%}",
            f" of {heard.decoded} utterances could not be decoded: `soda prepare` is likely "
            f"to stop at prepare.max_rejects={p.max_rejects:g} ({rejects.in_words()})",
        )
    space = TokenSpace(0, 0, 0, codebooks, p.entries or codec.entries)
    plan = _plan(recipe, inputs, space, rejects)
    texts = _Thinned()
    for text in items(inputs.texts):
        texts.add(text.text)
    tokenizer = _tokenizer(recipe, inputs, scratch)
    transcribed, written = plan.texts.tokens(tokenizer, space), texts.tokens(tokenizer, space)
    letters_a_token = (plan.texts.letters + texts.letters) / max(1.0, transcribed + written)
    codes = heard.frames / max(1, heard.number) * (codebooks * plan.whole + plan.semantic)
    spoken = codes + usable * (plan.markers + transcribed)
    written += 2 * inputs.texts.utterances
    tokens = spoken + min(written, spoken * p.text_share / (1 - p.text_share)) if spoken else written
    found = Estimate(
        utterances=index.utterances,
        texts=inputs.texts.utterances,
        repeated_texts=inputs.repeated_texts,
        released_files=len(inputs.released),
        rejects=rejects.count,
        unreadable_share=1 - usable,
        hours=heard.samples / codec.sample_rate / 3600,
        tokens=round(tokens),
        bytes={
            "units": round(1.5 * heard.frames * codebooks),
            "parts": round(4 * tokens),
            "stores": round({"megatron": 4.0, "compact": 1.5}[p.store] * tokens),
        },
    )
    _show(found, f"{heard.decoded} utterances decoded, {letters_a_token:.1f} letters a token")
    return found


def _show(found: Estimate, title: str) -> None:
    values = {name: value for name, value in vars(found).items() if name != "bytes"}
    values.update({f"GB of {name}": size / 1e9 for name, size in found.bytes.items()})
    table = Table("expected", "", title=title)
    for name, value in values.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)


@dataclass
class _Sort:
    """Recordings whose length is indicated by the same measure: the bytes of all .mp3, say, or the seconds of all
    segments."""

    sizes: list[float] = field(default_factory=lambda: [0.0, 0.0])  # number, sum
    some: list[tuple[str, float, Utterance]] = field(default_factory=list)  # those with the lowest hashes, as a heap


def _size(utterance: Utterance, stamp: str) -> tuple[str, float]:
    """A recording's sort, and the measure of its length: seconds, bytes, or letters of the transcript."""
    sound = utterance.audio
    if sound.end:
        return "segment", sound.end - sound.start
    if sound.row < 0 and not sound.start and (sound.size >= 0 or stamp[:1].isdigit()):
        return Path(sound.name or sound.path).suffix.lower(), sound.size if sound.size >= 0 else int(stamp.split()[0])
    return "spoken" if utterance.text else "sound", float(len(utterance.text))


@dataclass(frozen=True)
class _Heard:
    number: int  # utterances with sound: a translation may have none. Everything but `decoded` refers to all of them
    decoded: int
    bad: float  # cannot be decoded
    frames: float  # for the others
    samples: float


def _listen(recipe: Recipe, index: Index, codec: Codec, rejects: Rejects) -> _Heard:
    """Decodes a sample of the utterances, or all if there are few."""
    sorts: defaultdict[str, _Sort] = defaultdict(_Sort)
    for shard in index.shards:
        for utterance, stamp in read_index(shard):
            if not utterance.heard:
                continue
            name, size = _size(utterance, stamp)
            sorts[name].sizes[0] += 1
            sorts[name].sizes[1] += size
            lowest = digest(utterance.id).translate(_BACKWARDS)
            (heapq.heappush if len(sorts[name].some) < SAMPLE else heapq.heappushpop)(
                sorts[name].some, (lowest, size, utterance)
            )
    total = sum(int(sort.sizes[0]) for sort in sorts.values())
    decoded, bad, frames, samples = 0, 0.0, 0.0, 0.0
    for sort in sorts.values():
        number, size = sort.sizes
        wanted = max(FEWEST, round(SAMPLE * number / total))
        sizes, lengths, failed, heard = [], [], 0, 0
        for _, about, utterance in sorted(sort.some, key=lambda one: one[0], reverse=True)[:wanted]:
            if heard > ENOUGH * codec.sample_rate and len(lengths) >= FEWEST:
                break
            try:
                lengths.append(_length(recipe, utterance, codec))
                sizes.append(about)
                heard += lengths[-1]
            except BadAudio as error:
                failed += 1
                rejects.add(Reject(str(utterance.audio), str(error)))
        decoded += failed + len(lengths)
        good = number * len(lengths) / (failed + len(lengths))
        bad += number - good
        frames += good * _mean([-(-length // codec.samples_per_frame) for length in lengths], sizes, size / number)
        samples += good * _mean(lengths, sizes, size / number)
    return _Heard(total, decoded, bad, frames, samples)


_BACKWARDS = str.maketrans("0123456789abcdef", "fedcba9876543210")


def _length(recipe: Recipe, utterance: Utterance, codec: Codec) -> int:
    samples = 0
    for piece in read_pieces(utterance.audio, codec.sample_rate, codec.samples_per_frame, trim=recipe.prepare.trim):
        samples += len(piece)
        if samples > ENOUGH * codec.sample_rate:
            break
    return samples


def _mean(lengths: list[int], sizes: list[float], mean_size: float) -> float:
    """The mean length of recordings with mean size `mean_size`, from a line fitted to a sample."""
    if not lengths:
        return 0.0
    x, y = np.array(sizes), np.array(lengths, np.float64)
    slope = np.cov(x, y)[0, 1] / x.var(ddof=1) if len(x) >= FEWEST and x.std() > 0 else 0.0
    return max(0.0, float(y.mean() + slope * (mean_size - x.mean())))


class _Thinned:
    """Counts the letters of texts and keeps an even sample of them."""

    def __init__(self) -> None:
        self.letters, self._number, self._step, self._kept = 0, 0, 1, []

    def add(self, text: str) -> None:
        self.letters += len(text)
        if self._number % self._step == 0:
            self._kept.append(text)
        self._number += 1
        if len(self._kept) > 2 * TEXTS:
            self._kept, self._step = self._kept[::2], 2 * self._step

    def tokens(self, tokenizer: TextTokenizer, space: TokenSpace) -> float:
        """For all texts, from the sample."""
        ids = tokenizer.encode_batch([clean_text(text, space) for text in self._kept])
        return self.letters * sum(map(len, ids)) / max(1, sum(map(len, self._kept)))


def _tokenizer(recipe: Recipe, inputs: Inputs, scratch: Path) -> TextTokenizer:
    """Like the one `prepare` trains, but on fewer sentences."""
    p = recipe.prepare
    if p.tokenizer:
        return TextTokenizer(p.tokenizer)
    if some := training_sentences(recipe, inputs, SENTENCES):
        train_sentencepiece(path := scratch / "t.model", some, p.text_pieces)
    else:
        write_byte_tokenizer(path := scratch / "t.json")
    return TextTokenizer(path)


@dataclass
class _Plan:
    """Counts over all documents: utterances with audio, `whole` or codebook 0 only; markers; texts."""

    whole: int = 0
    semantic: int = 0
    markers: int = 0
    texts: _Thinned = field(default_factory=_Thinned)


def _plan(recipe: Recipe, inputs: Inputs, space: TokenSpace, rejects: Rejects) -> _Plan:
    """Plans all documents. Raises SodaError if a store would be empty."""
    p, plan, sides = recipe.prepare, _Plan(), Counter()
    for shard in inputs.speech.shards:
        utterances = [cleaned(utterance, space) for utterance, _ in read_index(shard)]
        for _, group in groupby(enumerate(utterances), key=lambda u: u[1].recording or u[0]):
            for planned in plan_documents([u for _, u in group], recipe.prepare.orders):
                if isinstance(planned, Reject):
                    rejects.add(planned)
                    continue
                sides[inputs.groups.side([f"{ID}\0{planned.spoken[0].id}"])] += 1
                plan.markers += 2 + 2 * sum(not isinstance(part, tuple) for part in planned.plan)
                for text in texts_of(planned.plan):
                    plan.texts.add(text)
                spoken = sum(isinstance(part, int) for part in planned.plan)
                if planned.order == "semantic-only":
                    plan.semantic += spoken
                else:
                    plan.whole += spoken
    if not all(sides[name] for name in SIDES):
        for some in sides_of_texts(inputs.texts.shards, inputs.groups, p.valid_share, p.test_share):
            sides.update(SIDES[int(digit)] for digit in some)
    for name in SIDES:
        if not sides[name]:
            raise SodaError(too_little(name, rejects))
    return plan
