"""`prepare`: how speech and text become token stores."""

from dataclasses import field
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .fields import SECTION, Count, CountOrZero, OrNone, Share, need

Layout = Literal[
    "auto",
    "manifest",
    "audio",
    "pairs",
    "librispeech",
    "ljspeech",
    "commonvoice",
    "emilia",
    "webdataset",
    "hf",
    "parallel",
    "cvss",
    "covost",
]
SplitBy = Literal["recording", "prompt", "text", "audio"]
Order = Literal[
    "text-first",
    "audio-first",
    "audio-only",
    "semantic-only",
    "text-only",
    "asr",
    "tts",
    "conversational",
    "translation",
]


@dataclass(config=SECTION)
class Prepare:
    speech: str = "asterisk"
    """`asterisk` (free prompts, downloaded), or a folder, a manifest or a glob. Empty: no speech."""
    layout: Layout = "auto"
    """How the corpus is organised (docs/data.md). auto: detected."""
    columns: dict[str, Annotated[str | None, OrNone]] = field(default_factory=dict)
    """Maps our columns to the corpus's: {text: sentence}. {id: null}: ignore its ids."""
    audio_root: str = ""
    """The folder that paths in manifests are relative to and must stay inside. Empty: the manifest's own folder."""
    languages: list[str] = field(default_factory=lambda: ["en", "es", "fr"])
    """Languages of the free prompts."""
    numbers: CountOrZero = 0
    """For each language, strings of two to four of the free prompts' spoken numbers, besides the prompts."""
    downloads: str = "downloads"
    """Folder for downloads."""
    units: list[str] = field(default_factory=list)
    """Existing unit shards (globs) to use instead of speech."""
    released: list[str] = field(default_factory=list)
    """SODA's released corpora: Parquet files (globs) of marker strings."""
    corpus_codebooks: Count = 8
    """Codebooks in the strings of released corpora. If the token space has fewer, only the first ones are used."""
    text: list[str] = field(default_factory=list)
    """JSONL, Parquet or txt files (globs), or `wordnet`, which is downloaded."""
    text_share: Share = 0.05
    """Text's share of all training tokens (paper: 5 %)."""
    decoder: Literal["soundfile", "dali", "dali_gpu"] = "soundfile"
    """The decoder for sound files. dali_gpu: DALI also resamples, on the codec's GPU."""
    trim: bool = False
    """Cut non-speech from both ends. Needs the extra [vad]."""
    codec: Literal["embedded", "mimi", "encodec", "dac"] = "embedded"
    """The audio codec that turns sound into codes."""
    codec_path: str = ""
    """A fitted embedded codec, or a hub id or folder. Empty: fit the embedded codec | the codec's usual hub id."""
    codebooks: CountOrZero = 0
    """How many of the codec's codebooks to use, counted from the first. 0: the codec's default."""
    entries: CountOrZero = 0
    """Entries per codebook; can only be chosen for the embedded codec. 0: 2,048."""
    orders: list[Order] = field(default_factory=lambda: ["text-first", "audio-first"])
    """Which documents to make from the utterances (data_prep/interleave.py)."""
    tokenizer: str = ""
    """A sentencepiece .model or a tokenizer.json. Empty: train one on the transcripts."""
    text_pieces: Count = 512
    """Number of ids, if a tokenizer is trained."""
    split_by: list[SplitBy] = field(default_factory=lambda: ["recording", "prompt", "text", "audio"])
    """Utterances that share any of these go to the same side of the split. Sound is compared by its codes."""
    valid_share: Share = 0.05
    """Share of the groups of utterances (see split_by) that go to validation."""
    test_share: Share = 0.05
    """Share of the groups of utterances (see split_by) that go to test."""
    shard_size: Count = 256
    """Utterances per shard: they are encoded, stored and redone together."""
    store: Literal["megatron", "compact"] = "megatron"
    """megatron: .bin/.idx. compact: a third of the size."""
    executor: Literal["local", "ray"] = "local"
    """Where jobs run: processes on this machine, or a Ray cluster."""
    workers: CountOrZero = 0
    """Number of processes. 0: one per core, or one per GPU for a codec that runs there."""
    max_rejects: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Stop if more than this share of the utterances cannot be used."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        need(
            self.valid_share + self.test_share < 1,
            "prepare.valid_share and prepare.test_share leave nothing to train on",
        )
        need(
            not self.entries or self.codec == "embedded",
            f"prepare.entries={self.entries}: can only be chosen for the embedded codec; leave it at 0",
        )
        need(
            self.decoder != "dali_gpu" or self.codec != "embedded",
            "prepare.decoder=dali_gpu resamples on the codec's GPU, and the embedded codec runs on the CPU; use "
            "soundfile",
        )
        need(
            "recording" in self.split_by,
            f"prepare.split_by={self.split_by}: documents are whole recordings, so `recording` must be in it",
        )
        need(
            not self.numbers or self.speech == "asterisk",
            "prepare.numbers are strings of the free prompts' words, which need prepare.speech=asterisk. For your own "
            "speech set prepare.numbers=0; examples/quickstart/run.sh --speech DIR sets all that it takes",
        )
        need(
            not self.numbers or "translation" not in self.orders,
            "prepare.numbers are no translations of each other; for those see examples/s2st",
        )
        need(bool(self.orders), "prepare.orders is empty: name at least one kind of document to make")
        need(
            "semantic-only" not in self.orders or self.orders == ["semantic-only"],
            f"prepare.orders={self.orders}: semantic-only documents have one code per frame and need a store of "
            "their own",
        )
        need(
            bool(self.speech or self.units or self.released or self.text),
            "prepare.speech, prepare.units, prepare.released and prepare.text are all empty: nothing to prepare",
        )
        return self
