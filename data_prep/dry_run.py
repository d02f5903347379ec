"""`soda prepare --dry-run`: what would be made, by the index and a few decoded utterances. The run is not touched.

Inputs are read, rejected, planned and split by the functions that `prepare` itself uses, so what they find wrong is
found here too. Only the lengths are an estimate.
"""

import math
import tempfile
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_soda.config import Recipe
from megatron_soda.errors import SodaError
from megatron_soda.vocab import TokenSpace

from .audio import read_pieces
from .codecs import load_codec
from .codecs.base import Codec
from .documents import cleaned, plan_documents
from .index import Index, read_index, sample
from .inputs import Inputs, check_rejects, read_inputs, too_little
from .show import Rejects, console
from .split import ID, SIDES, sides_of_texts
from .utterance import BadAudio, Reject

SAMPLE = 64  # utterances that are decoded
LONGEST = 36_000  # seconds of one of them
TEXTS = 1000


def estimate(recipe: Recipe) -> dict[str, Any]:
    """Counts, hours, tokens and bytes, which are also printed. SodaError as `prepare`."""
    with tempfile.TemporaryDirectory(prefix="soda-") as scratch:
        rejects = Rejects(Path(scratch) / "rejects.jsonl")
        try:
            return _estimate(recipe, Path(scratch), rejects)
        finally:
            rejects.close()


def _estimate(recipe: Recipe, scratch: Path, rejects: Rejects) -> dict[str, Any]:
    p = recipe.prepare
    if p.units or p.released:
        raise SodaError("--dry-run is for speech and text: prepare.units and prepare.released are encoded already")
    inputs = read_inputs(recipe, scratch, rejects)
    index = inputs.speech
    codec = load_codec(
        p.codec, p.codec_path or None, codebooks=(p.codebooks or None) if p.codec != "embedded" else None
    )
    codebooks = p.codebooks or codec.codebooks
    lengths, bad = _listen(recipe, index, codec, rejects)
    decoded = len(lengths) + bad
    usable = 1 - bad / max(1, decoded)
    seconds = sum(lengths) / codec.sample_rate / max(1, len(lengths))
    if decoded == index.utterances:
        check_rejects(recipe, inputs.speech_rejects + bad, inputs.speech_rejects + index.utterances, rejects)
    elif inputs.speech_rejects + index.utterances * (1 - usable) > p.max_rejects * index.utterances:
        console.print(
            f"[yellow]{bad} of {decoded}[/] utterances could not be decoded: `soda prepare` is likely to stop at "
            f"prepare.max_rejects={p.max_rejects:g} ({rejects.in_words()})"
        )
    counts = _plan(recipe, inputs, TokenSpace(0, 0, 0, codebooks, p.entries or codec.entries), rejects)
    frames_each = sum(-(-length // codec.samples_per_frame) for length in lengths) / max(1, len(lengths))
    frames = usable * index.utterances * frames_each
    letters_a_token = math.log2(p.text_pieces) / 4 if not p.tokenizer else 4.0  # a rule of thumb
    codes = usable * frames_each * (codebooks * counts["frames"] + counts["semantic"])
    spoken = codes + usable * (counts["markers"] + counts["letters"] / letters_a_token)
    texts = [len(text.text) for text, _ in sample(inputs.texts.shards, TEXTS, lambda u: True)]
    written = inputs.texts.utterances * (2 + sum(texts) / max(1, len(texts)) / letters_a_token)
    tokens = spoken + min(written, spoken * p.text_share / (1 - p.text_share)) if spoken else written
    found = {
        "utterances": index.utterances,
        "texts": inputs.texts.utterances,
        "repeated_texts": inputs.repeated_texts,
        "released_files": len(inputs.released),
        "rejects": rejects.count,
        "unreadable_share": 1 - usable,
        "hours": usable * index.utterances * seconds / 3600,
        "tokens": round(tokens),
    }
    of_token = {"megatron": 4.0, "compact": 1.5}[p.store]
    bytes_of = {
        "units": round(1.5 * frames * codebooks),
        "parts": round(4 * tokens),
        "stores": round(of_token * tokens),
    }
    table = Table("expected", "", title=f"{decoded} utterances decoded, {letters_a_token:.1f} letters a token")
    sizes = {f"GB of {name}": size / 1e9 for name, size in bytes_of.items()}
    for name, value in {**found, **sizes}.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    return {**found, "bytes": bytes_of}


def _listen(recipe: Recipe, index: Index, codec: Codec, rejects: Rejects) -> tuple[list[int], int]:
    """Decodes some utterances, all of few -> their lengths in samples, and how many could not be decoded."""
    lengths: list[int] = []
    bad = 0
    for utterance, _ in sample(index.shards, SAMPLE, lambda u: True):
        samples = 0
        try:
            pieces = read_pieces(utterance.audio, codec.sample_rate, codec.samples_per_frame, trim=recipe.prepare.trim)
            for piece in pieces:
                samples += len(piece)
                if samples > LONGEST * codec.sample_rate:
                    break
            lengths.append(samples)
        except BadAudio as error:
            bad += 1
            rejects.add(Reject(str(utterance.audio), str(error)))
    return lengths, bad


def _plan(recipe: Recipe, inputs: Inputs, space: TokenSpace, rejects: Rejects) -> Counter:
    """Plans all documents. -> over all of them: utterances whose frames are in one (`frames`, and with codebook 0 alone
    `semantic`), letters of transcripts, and markers. SodaError if a store would be empty."""
    p, counts, sides = recipe.prepare, Counter(), Counter()
    for shard in inputs.speech.shards:
        utterances = [cleaned(utterance, space) for utterance, _ in read_index(shard)]
        for _, group in groupby(enumerate(utterances), key=lambda u: u[1].recording or u[0]):
            for planned in plan_documents([u for _, u in group], recipe.prepare.orders):
                if isinstance(planned, Reject):
                    rejects.add(planned)
                    continue
                sides[inputs.groups.side([f"{ID}\0{planned.spoken[0].id}"])] += 1
                counts["markers"] += 2 + 2 * sum(not isinstance(part, tuple) for part in planned.plan)
                counts["letters"] += sum(len(part) for part in planned.plan if isinstance(part, str))
                counts["letters"] += sum(len(part[0]) for part in planned.plan if isinstance(part, tuple))
                audio = "semantic" if planned.order == "semantic-only" else "frames"
                counts[audio] += sum(isinstance(part, int) for part in planned.plan)
    if not all(sides[name] for name in SIDES):
        for some in sides_of_texts(inputs.texts.shards, inputs.groups, p.valid_share, p.test_share):
            sides.update(SIDES[int(digit)] for digit in some)
    for name in SIDES:
        if not sides[name]:
            raise SodaError(too_little(name, rejects))
    return counts
