"""`soda prepare --dry-run`: what would be made, by the index and a few decoded utterances. The run is not touched."""

import math
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_soda.config import Recipe
from megatron_soda.errors import SodaError

from .audio import read_audio
from .codecs import load_codec
from .index import sample
from .inputs import read_inputs
from .interleave import WITHOUT_TEXT
from .show import Rejects, console
from .utterance import BadAudio

SAMPLE = 64  # utterances that are decoded
TEXTS = 1000


def estimate(recipe: Recipe) -> dict[str, Any]:
    """Counts, hours, tokens and bytes, which are also printed. SodaError as `prepare`."""
    with tempfile.TemporaryDirectory(prefix="soda-") as scratch:
        return _estimate(recipe, Path(scratch))


def _estimate(recipe: Recipe, scratch: Path) -> dict[str, Any]:
    """What `prepare` would make, from the index and a few decoded utterances; nothing is written to the run folder."""
    p = recipe.prepare
    if p.units or p.released:
        raise SodaError("--dry-run is for speech and text: prepare.units and prepare.released are encoded already")
    letters_a_token = math.log2(p.text_pieces) / 4 if not p.tokenizer else 4.0  # a rule of thumb
    rejects = Rejects(scratch / "rejects.jsonl")
    inputs = read_inputs(recipe, scratch, rejects)
    index = inputs.speech
    seconds, bad, letters = [], 0, 0
    for utterance, _ in sample(index.shards, SAMPLE, lambda u: True):
        try:
            seconds.append(len(read_audio(utterance.audio, 8000, max_seconds=36_000)) / 8000)
            letters += len(utterance.text)
        except BadAudio:
            bad += 1
    usable = len(seconds) / max(1, len(seconds) + bad)
    hours = index.utterances * usable * (sum(seconds) / max(1, len(seconds))) / 3600
    codec = load_codec(
        p.codec, p.codec_path or None, codebooks=(p.codebooks or None) if p.codec != "embedded" else None
    )
    codebooks = p.codebooks or codec.codebooks
    frames = hours * 3600 * codec.sample_rate / codec.samples_per_frame
    of_frame = sum(1 if order == "semantic-only" else 0 if order == "text-only" else codebooks for order in p.orders)
    of_text = letters / max(1, len(seconds)) / letters_a_token
    with_text = sum(order not in WITHOUT_TEXT for order in p.orders)
    spoken = frames * of_frame + index.utterances * usable * (4 * len(p.orders) + (2 + of_text) * with_text)
    texts = [len(text.text) for text, _ in sample(inputs.texts.shards, TEXTS, lambda u: True)]
    written = inputs.texts.utterances * (2 + sum(texts) / max(1, len(texts)) / letters_a_token)
    tokens = spoken + min(written, spoken * p.text_share / (1 - p.text_share)) if spoken else written
    audio = frames * codebooks
    found = {
        "utterances": index.utterances,
        "texts": inputs.texts.utterances,
        "repeated_texts": inputs.repeated_texts,
        "released_files": len(inputs.released),
        "rejects": rejects.count,
        "unreadable_share": 1 - usable,
        "hours": hours,
        "tokens": round(tokens),
    }
    of_token = {"megatron": 4.0, "compact": 1.5}[p.store]
    bytes_of = {"units": round(1.5 * audio), "parts": round(4 * tokens), "stores": round(of_token * tokens)}
    rejects.close()
    title = f"{len(seconds) + bad} utterances decoded, {letters_a_token:.1f} letters a token"
    table = Table("expected", "", title=title)
    sizes = {f"GB of {name}": size / 1e9 for name, size in bytes_of.items()}
    for name, value in {**found, **sizes}.items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    return {**found, "bytes": bytes_of}
