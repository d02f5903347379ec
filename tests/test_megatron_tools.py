"""The tools by Megatron-LM's flags: stores are byte for byte what megatron-core writes, mistakes are said."""

import gzip
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_soda.data.store import Store
from megatron_soda.errors import SodaError
from megatron_soda.tokenizer import write_byte_tokenizer
from megatron_soda.vocab import BOS, EOS
from tests.forked import forked
from tests.helpers import TOOLS, run_tool
from tests.test_tokenizer import SENTENCES

SENTENCEPIECE = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "text.model"]
HUGGING_FACE = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tokenizer.json"]
ROWS = [{"text": text, "title": f"no. {i}"} for i, text in enumerate(SENTENCES * 110)]  # several batches


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with a tokenizer of either kind."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(tmp_path / "text"), vocab_size=310, byte_fallback=True,
        bos_piece=BOS, eos_piece=EOS, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: Path, rows: list[dict]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


def preprocess(*flags: str) -> str:
    status, _, said = forked(run_tool, "preprocess_data.py", *flags)
    assert status == 0, said
    return said


def written_by_megatron(path: Path, documents: list[list[int]]) -> tuple[bytes, bytes]:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.int32)
    for ids in documents:
        builder.add_document(torch.tensor(ids, dtype=torch.int32), [len(ids)])
    builder.finalize(f"{path}.idx")
    return Path(f"{path}.bin").read_bytes(), Path(f"{path}.idx").read_bytes()


@pytest.mark.parametrize("workers", ["1", "3"])
def test_sentencepiece(folder, workers):
    import sentencepiece

    write_rows(folder / "text.jsonl", ROWS)
    said = preprocess(
        *("--input", "text.jsonl", "--output-prefix", "out/wiki", "--json-keys", "title", "text", "--append-eod"),
        *("--workers", workers, "--log-interval", "1000", *SENTENCEPIECE),
    )
    assert "documents/s" in said
    model = sentencepiece.SentencePieceProcessor(model_file="text.model")
    for key in ("title", "text"):
        expected = [[*model.encode(row[key]), model.eos_id()] for row in ROWS]
        found = tuple(Path(f"out/wiki_{key}_document.{suffix}").read_bytes() for suffix in ("bin", "idx"))
        assert found == written_by_megatron(folder / "theirs", expected)
    store = Store("out/wiki_text_document")
    store.verify()
    assert store.space.eos == model.eos_id()
    assert store.made_by["tokenizer"]


def test_hugging_face(folder):
    from tokenizers import Tokenizer

    write_rows(folder / "a.jsonl.gz", ROWS[:7])
    write_rows(folder / "b.jsonl.gz", [{"text": ""}, *ROWS[7:12]])
    said = preprocess("--input", "*.jsonl.gz", "--output-prefix", "wiki", "--workers", "2", *HUGGING_FACE)
    assert "left out: 1 without text" in said
    model = Tokenizer.from_file("tokenizer.json")
    expected = [model.encode(row["text"], add_special_tokens=False).ids for row in ROWS[:12]]
    found = tuple(Path(f"wiki_text_document.{suffix}").read_bytes() for suffix in ("bin", "idx"))
    assert found == written_by_megatron(folder / "theirs", expected)


def load(name: str, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> ModuleType:
    for variable in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setattr(sys, "argv", [name, *flags])
    return importlib.import_module(name)


INPUT = ["--input", "text.jsonl", "--output-prefix", "wiki"]


@pytest.mark.parametrize(
    ("line", "flags", "words"),
    [
        ("{", [*INPUT, *SENTENCEPIECE], r"text\.jsonl:3: not JSON"),
        (
            '{"txt": "a"}',
            [*INPUT, *SENTENCEPIECE],
            r"text\.jsonl:3: .*'text', which is missing; it has txt",
        ),
        ('{"text": ["a"]}', [*INPUT, *SENTENCEPIECE], r"text\.jsonl:3: .*which is a list"),
        ('{"text": "\\ud800"}', [*INPUT, *SENTENCEPIECE], r"text\.jsonl:3: not valid Unicode"),
        ('{"text": "a"}', [*INPUT, *SENTENCEPIECE, "--json-keys", "text", "title"], r"text\.jsonl:3: .*'title'"),
        ("", [*INPUT, *SENTENCEPIECE, "--apend-eod"], "Did you mean --append-eod"),
        ("", [*INPUT, *SENTENCEPIECE, "--partitions", "4"], "--workers alone"),
        ("", [*INPUT, *SENTENCEPIECE[2:], "--tokenizer-type", "SentencePiece"], "Did you mean SentencePieceTokenizer"),
        ("", [*INPUT, *HUGGING_FACE[:3], "text.model"], r"is not a \.json file"),
        ("", [*INPUT, *SENTENCEPIECE, "--input", "nothing.jsonl"], "--input: no file matches"),
        ("", [*INPUT, *SENTENCEPIECE, "--workers", "0"], "at least one"),
    ],
)
def test_what_cannot_be_read(folder, monkeypatch, line, flags, words):
    (folder / "text.jsonl").write_text('{"text": "a b", "title": "t"}\n' * 2 + line + "\n")
    tool = load("preprocess_data", monkeypatch, flags)
    before = set(folder.iterdir())
    with pytest.raises(SodaError, match=words):
        tool.main()
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--loader", "llama_mistral", "--saver", "core"], "run: no config.json in it"),
        (
            ["--loader", "hf", "--saver", "mcore", "--checkpoint-type", "meta"],
            "--checkpoint-type=meta: must be one of hf",
        ),
        (["--loader", "hf", "--saver", "core", "--model-size", "qwen3-8B"], "config.json has the sizes"),
        (["--loader", "hf", "--saver", "hf"], "nothing to convert"),
        (["--loader", "core", "--saver", "core"], "at any layout"),
        (["--loader", "core", "--saver", "huggingface"], "--saver=huggingface: must be one of hf"),
        (["--loader", "mixtral_hf", "--saver", "core"], "--loader=mixtral_hf: must be one of"),
        (["--saver", "hf", "--target-tensor-parallel-size", "2"], "Leave it out"),
        (["--saver", "hf", "--save-dir", "."], "something else"),
        (["--saver", "hf", "--load-dir", "nothing"], "no such folder"),
    ],
)
def test_conversions_that_there_are_not(folder, monkeypatch, flags, words):
    (folder / "run").mkdir()
    common = ["--model-type", "GPT", "--load-dir", "run", "--save-dir", "model"]
    tool = load("convert_checkpoint", monkeypatch, [*common, *flags])
    with pytest.raises(SodaError, match=words):
        tool.main()
