"""Small stores and recipes for tests, and the programs of tools/."""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np

from data_prep import interleave
from megatron_soda.config import Recipe, load_recipe
from megatron_soda.data.store import Store, write_store
from megatron_soda.data.validate import illegal, why
from megatron_soda.vocab import TokenSpace

TOOLS = Path(__file__).resolve().parent.parent / "tools"
SPACE = TokenSpace(text_size=64, bos=1, eos=2, codebooks=4, entries=16)


def dealt(space: TokenSpace, ranks: int, rank: int) -> np.ndarray:
    """The ids of a tensor-parallel rank's rows, in order: of the text with its markers, and of each codebook, the
    ranks have consecutive parts, and rank r's are as many as there are ids n with n % ranks == ranks - 1 - r."""
    mine = []
    for section in np.split(np.arange(space.size), np.arange(space.codebooks) * space.entries + space.audio_base):
        counts = np.bincount(ranks - 1 - section % ranks, minlength=ranks)
        mine.append(np.split(section, np.cumsum(counts)[:-1])[rank])
    return np.concatenate(mine)


def deal(table: np.ndarray, local: int, space: TokenSpace, ranks: int, rank: int) -> np.ndarray:
    """A rank's part of a table in the order of ids: (local, width), padded with zeros."""
    mine = table[dealt(space, ranks, rank)]
    return np.concatenate([mine, np.zeros((local - len(mine), mine.shape[1]), mine.dtype)])


def documents(count: int, seed: int = 0, space: TokenSpace = SPACE) -> list[np.ndarray]:
    """Documents with some structure to learn: codes depend on the codes before and on the text."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        text = [int(t) for t in rng.integers(3, space.text_size, rng.integers(4, 10))]
        frames = int(rng.integers(1, 8))
        codes = (np.cumsum(rng.integers(0, 3, (frames, space.codebooks)), 0) + text[0]) % space.entries
        kind = rng.integers(0, 3)
        if kind == 0:
            made.append(interleave.text_first([(text, codes)], space))
        elif kind == 1:
            made.append(interleave.audio_first([(text, codes)] * 2, space))
        else:
            made.append(interleave.text_only(text, space))
    return made


def find_problems(store: Store) -> list[str]:
    """ "document i, token j: what is wrong" of every document that is not legal."""
    return [
        f"document {first + number}, {why(store, first + number, token)}"
        for first, ids, offsets in store.parts()
        for number, token in illegal(store, ids, offsets)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


def write_data(folder: Path, count: int = 200, space: TokenSpace = SPACE) -> Path:
    for side, (n, seed) in {"train": (count, 0), "valid": (40, 1), "test": (40, 2)}.items():
        write_store(folder / side, documents(n, seed, space), space, codec="none", tokenizer="none")
    return folder


def small_recipe(run: Path, data: Path, *overrides: str) -> Recipe:
    """4 layers of 32, windows of 32 tokens, 6 steps of 8 sequences, a checkpoint every 3, in float32."""
    return load_recipe(
        None,
        [
            f"run={run}",
            f"data.path={data}",
            "data.sequence_length=32",
            "model.num_layers=4",
            "model.hidden_size=32",
            "model.ffn_hidden_size=64",
            "model.num_attention_heads=4",
            "model.num_query_groups=2",
            "model.head_dim=16",
            "model.embedding_class_std=0.02",
            "model.head_class_std=0.02",
            "training.steps=6",
            "training.global_batch_size=8",
            "training.micro_batch_size=4",
            "checkpoint.save_every=3",
            "training.valid_every=6",
            "training.valid_windows=4",
            "logging.log_every=1",
            "optimizer.epsilon=1e-8",
            *overrides,
        ],
    )


def run_tool(name: str, *arguments: object) -> tuple[int, str, str]:
    """Runs a program of tools/ in this process, which has imported what takes a new one seconds to import. Returns its
    exit status and what it wrote to standard output and standard error."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    path = TOOLS / name
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [str(path), *map(str, arguments)]))
        stack.enter_context(mock.patch.object(sys, "path", [str(path.parent), *sys.path]))
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()
