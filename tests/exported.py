"""A run with a tiny random model, exported, and its data: no training, no codec to load, a second in all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep import interleave
from megatron_soda.codecs.description import CodecDescription
from megatron_soda.config import Recipe, load_recipe
from megatron_soda.data.store import write_store
from megatron_soda.data.units import write_units
from megatron_soda.files import read_json, write_json, write_sealed
from megatron_soda.hf.load import CODEC, CONFIG, DESCRIPTION, file_hashes
from megatron_soda.hf.tokenizer import save_tokenizer
from megatron_soda.tokenizer import TextTokenizer, train_sentencepiece
from megatron_soda.vocab import TokenSpace
from tests.helpers import documents
from tests.test_tokenizer import SENTENCES

MADE_BY = {"codec": "fake", "tokenizer": "none"}
CONTEXT = 160  # tokens; two documents of the test store are longer
HEAD_DIM = 8
RATE, HOP = 8000, 640  # 12.5 frames a second


class FakeCodec:
    """Decodes a frame to a tone whose pitch is its first code; encodes a frame by its level."""

    name, fingerprint = "fake", "fake"
    sample_rate, samples_per_frame, codebooks, entries = RATE, HOP, 4, 16
    lookahead: int | None = 0

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        frames = [np.pad(wave, (0, -len(wave) % HOP)).reshape(-1, HOP) for wave in waves]
        levels = [(np.abs(one).mean(1) * 1000).astype(int) for one in frames]
        return [((one[:, None] + np.arange(4)) % 16).astype(np.int16) for one in levels]

    def decode(self, codes: list[np.ndarray]) -> list[np.ndarray]:
        pitches = [np.repeat(200.0 + 20.0 * one[:, 0], HOP) for one in codes]
        return [(0.3 * np.sin(2 * np.pi * np.cumsum(p) / RATE)).astype(np.float32) for p in pitches]

    def decode_part(self, codes: np.ndarray, first: int, end: int) -> np.ndarray:
        return self.decode([codes])[0][first * HOP : end * HOP]


@dataclass
class Exported:
    run: Path
    folder: Path  # the exported model
    space: TokenSpace
    rows: list[dict[str, Any]]  # held-out utterances

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.folder / "recipe.yaml", [f"run={self.run}", *overrides])


def write_exported(run: Path) -> Exported:
    data, folder = run / "data", run / "hf"
    data.mkdir(parents=True)
    folder.mkdir()
    train_sentencepiece(folder / "text_tokenizer.model", SENTENCES, 310)
    text = TextTokenizer(folder / "text_tokenizer.model")
    space = text.space(4, 16)
    rng = np.random.default_rng(3)
    long = [([7, 8, 9], rng.integers(0, 16, (6, 4))) for _ in range(8)]
    made = [
        *documents(20, 1, space),
        *[order(long, space) for order in (interleave.text_first, interleave.audio_first)],
    ]
    for side, some in {"train": documents(40, 0, space), "test": made}.items():
        write_store(data / side, some, space, **MADE_BY)
    rows = [utterance(i, rng) for i in range(6)]
    codec = CodecDescription.of(FakeCodec(), {"spec": "embedded"})
    write_units(data / "test.parquet", rows, codec=codec)
    for place in (data, folder / CODEC):
        write_json(place / "codec.json", codec.to_dict())
    write_model(folder, space, text)
    (run / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
    return Exported(run, folder, space, rows)


def utterance(number: int, rng: np.random.Generator) -> dict[str, Any]:
    """Of 5 to 10 frames, the last one too long for the model. Its recording is gone."""
    frames = 5 + number if number < 5 else 60
    names = {"language": "en", "speaker": "s", "prompt": f"p{number}", "recording": f"r{number}"}
    codes = rng.integers(0, 16, (frames, 4)).astype(np.int16)
    said = SENTENCES[number % 4][: 12 + number]
    return {"id": f"u{number}", "codes": codes, "text": said, "seconds": frames / 12.5, "audio": "/gone.wav", **names}


def write_model(folder: Path, space: TokenSpace, text: TextTokenizer) -> None:
    """What `soda export` leaves, of random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": HEAD_DIM}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    ends = {"bos_token_id": space.bos, "eos_token_id": space.eos}
    config = Qwen3Config(vocab_size=space.size, max_position_embeddings=CONTEXT, **sizes, **heads, **ends)
    config.dtype = torch.float32
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():  # about every second document begins with sound, or hardly any would
        first = model.model(torch.tensor([[space.bos]])).last_hidden_state[0, 0]
        model.lm_head.weight[space.audio_start] = 6 * first / first.square().sum()
    model.save_pretrained(folder)
    save_tokenizer(text, space, folder, CONTEXT)
    (folder / "recipe.yaml").write_text(f"name: tiny\ndata: {{sequence_length: {CONTEXT}}}\n")
    written = {name: value for name, value in read_json(folder / "config.json").items() if name in CONFIG}
    described = {"name": "tiny", "step": 7, "key": "k", "space": space.to_dict(), "made_by": MADE_BY, "config": written}
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    files = file_hashes(folder, names)
    write_sealed(folder / DESCRIPTION, {**described, "files": files})
