"""Stores of more than 2**31 tokens, written and read for real."""

import numpy as np
import pytest

from megatron_soda.data.convert import convert_stores
from megatron_soda.data.store import Store, write_parts
from megatron_soda.vocab import LLAMA3

pytestmark = pytest.mark.full


def test_beyond_two_to_the_31(tmp_path):
    """3 GB compact; then 8.6 GB as .bin/.idx."""
    rng = np.random.default_rng(0)
    frames = LLAMA3.audio_ids(rng.integers(0, LLAMA3.entries, (8190, 8)))
    words = rng.integers(0, 128_000, 64).astype(np.int32)
    head = [LLAMA3.bos, LLAMA3.text_start, *words, LLAMA3.text_end, LLAMA3.audio_start]
    document = np.concatenate([head, frames, [LLAMA3.audio_end, LLAMA3.eos]]).astype(np.int32)
    part = np.tile(document, 64), np.full(64, len(document))
    count = -(-(2**31 + 10**7) // len(part[0]))
    write_parts(tmp_path / "s", (part for _ in range(count)), LLAMA3, "compact")
    for format in ("compact", "megatron"):
        store = Store(tmp_path / "s")
        assert store.format == format
        assert store.size == count * len(part[0]) > 2**31
        store.check_index()
        last = len(store) - 1
        assert np.array_equal(store.document(last), document)
        for token in (2**31 - 4096, 2**31, store.size - 8192):
            wanted = np.concatenate([document, document])[token % len(document) :][:8192]
            assert np.array_equal(store.read(token, 8192)[: len(wanted)], wanted)
        if format == "compact":
            convert_stores(tmp_path, ["s"], "megatron", None)
