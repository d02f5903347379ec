"""Rounds of kernels, random and adversarial, against torch code: `python -m tests.fuzz_kernels ROUNDS SEED`."""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_soda import ops
from megatron_soda.ops import library

Round = tuple[str, Callable[[], Any]]


def outcome(function: Callable[[], Any]) -> list[Tensor] | str:
    """What it returns, or that it refuses."""
    try:
        found = function()
    except ValueError:
        return "refused"
    return [found] if isinstance(found, Tensor) else [one for one in found if isinstance(one, Tensor)]


def fuzz_kernels(rounds: int, seed: int) -> Counter[str]:
    """Every round gives the same with SIMD, without, and in torch code: the same values, or a refusal by all."""
    found, rng = Counter[str](), np.random.default_rng(seed)
    find = library.find
    for number in range(rounds):
        name, function = ROUNDS[number % len(ROUNDS)](rng)
        library.find = lambda *_: None
        wanted = outcome(function)
        library.find = find
        for simd in (True, False):
            library.set_simd(simd)
            got = outcome(function)
            where = f"seed {seed}, round {number}, {name}, simd {simd}"
            assert isinstance(got, str) == isinstance(wanted, str), f"{where}: {got} and {wanted}"
            if not isinstance(got, str):
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), where  # pyright: ignore
        library.set_simd(True)
        found[f"{name}: {'refused' if isinstance(wanted, str) else 'the same'}"] += 1
    return found


def _spoil(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Half of the time some numbers are replaced by extreme ones."""
    if array.size and rng.random() < 0.5:
        info = np.iinfo(array.dtype)
        extremes = [info.min, info.max, 0, 1, info.max // 2] + ([-1, -2] if info.min < 0 else [])
        for _ in range(rng.integers(1, 4)):
            array.reshape(-1)[rng.integers(array.size)] = rng.choice(extremes)
    return array


def _pack(rng: np.random.Generator) -> Round:
    bits, slots = int(rng.integers(1, 25)), int(rng.integers(1, 20))
    codes = rng.integers(0, 2**bits, (rng.integers(0, 40), slots)).astype(np.int32)
    codes = torch.from_numpy(_spoil(codes, rng))
    return "pack", lambda: ops.pack_frames(codes, bits)


def _unpack(rng: np.random.Generator) -> Round:
    bits, slots = int(rng.integers(1, 25)), int(rng.integers(1, 20))
    width = (bits * slots + 7) // 8 + int(rng.choice([0, 0, 0, 1, -1]))
    packed = torch.from_numpy(rng.integers(0, 256, (rng.integers(0, 40), max(0, width))).astype(np.uint8))
    return "unpack", lambda: ops.unpack_frames(packed, slots, bits)


def _windows(rng: np.random.Generator) -> Round:
    slots, bits, text_bits = int(rng.integers(1, 10)), int(rng.integers(1, 14)), int(rng.integers(9, 20))
    spans = int(rng.integers(0, 6))
    gaps, frames = rng.integers(0, 20, spans + 1), rng.integers(1, 6, spans)
    starts = np.cumsum(gaps[:-1]) + slots * (np.cumsum(frames) - frames)
    tokens = int(gaps.sum() + slots * frames.sum())
    starts = np.append(starts, tokens).astype(np.int64)
    firsts = np.append(0, np.cumsum(frames)).astype(np.int64)
    text = rng.integers(0, 256, (-(-int(gaps.sum()) // 8), text_bits)).astype(np.uint8)
    packed = rng.integers(0, 256, (int(frames.sum()), (slots * bits + 7) // 8)).astype(np.uint8)
    tables = [text, packed, _spoil(starts.copy(), rng), _spoil(firsts.copy(), rng)]
    how = {"slots": slots, "bits": bits, "text_bits": text_bits, "audio_base": 1 << text_bits, "entries": 1 << bits}
    first = torch.from_numpy(_spoil(rng.integers(0, tokens + 1, rng.integers(1, 4)).astype(np.int64), rng))
    count = int(rng.integers(1, 30))
    # Of damaged tables the kernels need not find what the torch code finds: here only that they never read outside.
    damaged = not np.array_equal(starts, tables[2]) or not np.array_equal(firsts, tables[3])

    def run() -> Any:
        with contextlib.suppress(*[ValueError] * damaged):
            found = ops.Stream(*map(torch.from_numpy, tables), **how).windows(first, count)
            return torch.zeros(0) if damaged else found
        return torch.zeros(0)

    return ("windows of damaged tables" if damaged else "windows"), run


def _fit(rng: np.random.Generator) -> Round:
    capacity = int(rng.integers(1, 60))
    lengths = rng.integers(1, capacity + 1, rng.integers(0, 80)).astype(rng.choice([np.int32, np.int64]))
    lengths = torch.from_numpy(_spoil(lengths, rng))
    return "fit", lambda: ops.best_fit(lengths, capacity)


def _hashes(rng: np.random.Generator) -> Round:
    sizes = rng.integers(0, 12, rng.integers(0, 12))
    offsets = _spoil(np.append(0, np.cumsum(sizes)).astype(np.int64), rng)
    ids = torch.from_numpy(_spoil(rng.integers(0, 999, sizes.sum()).astype(np.int32), rng))
    return "hashes", lambda: ops.hash_documents(ids, torch.from_numpy(offsets))


def _grammar(rng: np.random.Generator) -> Round:
    kinds_count, states, size = int(rng.integers(1, 8)), int(rng.integers(1, 12)), int(rng.integers(1, 60))
    kinds = torch.from_numpy(rng.integers(0, kinds_count, size).astype(np.int8))
    step = torch.from_numpy(rng.integers(-1, states, (states, kinds_count)).astype(np.int8))
    sizes = rng.integers(0, 12, rng.integers(0, 12))
    offsets = torch.from_numpy(_spoil(np.append(0, np.cumsum(sizes)).astype(np.int64), rng))
    ids = torch.from_numpy(_spoil(rng.integers(0, size, sizes.sum()).astype(np.int32), rng))
    return "grammar", lambda: ops.first_illegal(ids, offsets, kinds, step, 0, states - 1)


ROUNDS = (_pack, _unpack, _windows, _fit, _hashes, _grammar)


if __name__ == "__main__":
    assert library.why_absent is None, library.why_absent
    torch.set_num_threads(1)
    print(dict(sorted(fuzz_kernels(int(sys.argv[1]), int(sys.argv[2])).items())))
