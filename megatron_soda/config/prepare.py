"""`prepare`: from speech and text to token stores."""

from dataclasses import field
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from .fields import SECTION, Count, CountOrZero, OrNone, Share, need

Layout = Literal[
    "auto", "manifest", "audio", "pairs", "librispeech", "ljspeech", "commonvoice", "emilia", "webdataset", "hf"
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
    """`asterisk`: the free prompts, fetched. Or a folder, a manifest or a glob. Empty: none."""
    layout: Layout = "auto"
    """How the speech is laid out (docs/data.md)."""
    columns: dict[str, Annotated[str | None, OrNone]] = field(default_factory=dict)
    """The corpus's column for one of ours: {text: sentence}. {id: null}: its ids are not used."""
    audio_root: str = ""
    """The folder that paths in manifests are relative to, and must be in. Empty: the manifest's own."""
    languages: list[str] = field(default_factory=lambda: ["en", "es", "fr"])
    """Of the free prompts."""
    downloads: str = "downloads"
    """Where fetched material is kept."""
    units: list[str] = field(default_factory=list)
    """Unit shards (globs) that were encoded before, in place of speech."""
    released: list[str] = field(default_factory=list)
    """SODA's released corpora: Parquet files (globs) of marker strings."""
    corpus_codebooks: Count = 8
    """Codebooks in the strings of released corpora. Of more than the token space has, the first are taken."""
    text: list[str] = field(default_factory=list)
    """JSONL, Parquet or txt files (globs). `wordnet`: fetched."""
    text_share: Share = 0.05
    """Of all training tokens (paper: 5 %)."""
    decoder: Literal["soundfile", "dali"] = "soundfile"
    """What decodes sound files."""
    trim: bool = False
    """Cuts off what is not speech at both ends. Needs the extra [vad]."""
    codec: Literal["embedded", "mimi", "encodec", "dac"] = "embedded"
    """What turns sound into codes."""
    codec_path: str = ""
    """A fitted embedded codec, or a hub id or folder. Empty: one is fitted | the usual hub id."""
    codebooks: CountOrZero = 0
    """The first so many of the codec. 0: as many as it usually has."""
    entries: CountOrZero = 0
    """Of every codebook; only the embedded codec lets one choose. 0: 2,048."""
    orders: list[Order] = field(default_factory=lambda: ["text-first", "audio-first"])
    """Which documents are made of an utterance (data_prep/interleave.py)."""
    tokenizer: str = ""
    """A sentencepiece .model or a tokenizer.json. Empty: one is trained on the transcripts."""
    text_pieces: Count = 512
    """Ids of a tokenizer that is trained."""
    split_by: list[SplitBy] = field(default_factory=lambda: ["recording", "prompt", "text", "audio"])
    """Utterances that share any of these stay on one side of the split. Sound is compared by its codes."""
    valid_share: Share = 0.05
    """Of the groups of utterances that share nothing with others."""
    test_share: Share = 0.05
    """Of the groups of utterances that share nothing with others."""
    shard_size: Count = 256
    """Utterances that are encoded, kept and made again together."""
    store: Literal["megatron", "compact"] = "megatron"
    """megatron: .bin/.idx. compact: a third of the size."""
    executor: Literal["local", "ray"] = "local"
    """Where the jobs run: processes of this machine, or a Ray cluster."""
    workers: CountOrZero = 0
    """Processes. 0: one a core, or one a GPU for a codec that runs there."""
    max_rejects: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Stops if more than this share of the utterances cannot be used."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        need(
            self.valid_share + self.test_share < 1,
            "prepare.valid_share and prepare.test_share leave nothing to train on",
        )
        need(
            "recording" in self.split_by,
            f"prepare.split_by={self.split_by}: documents are whole recordings, so `recording` must be in it",
        )
        need(bool(self.orders), "prepare.orders is empty: which documents are to be made of an utterance?")
        need(
            "semantic-only" not in self.orders or self.orders == ["semantic-only"],
            f"prepare.orders={self.orders}: semantic-only documents have frames of one code and need a store of their "
            "own",
        )
        need(
            bool(self.speech or self.units or self.released or self.text),
            "prepare.speech, prepare.units, prepare.released and prepare.text are all empty: nothing to prepare",
        )
        return self
