"""csrc's CUDA kernels on the CPU (emulated/cuda_runtime.h), against the reference: their results in any order of the
threads, no access outside a buffer, and what a mistake in them would look like."""

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_soda.ops import reference

ROOT = Path(__file__).resolve().parents[2]
EMULATED = Path(__file__).parent / "emulated"
COMPILER = shutil.which("g++")
CHECKS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=soda_shared"]
NONE_BAD = 2**64 - 1


def build(program: Path, kernels: Path = ROOT / "csrc/cuda") -> Path:
    """Compiles the kernels in a folder, with their checks, into a program."""
    flags = ["-std=c++20", "-O1", "-g1", "-Wno-unknown-pragmas", *CHECKS]
    command = [str(COMPILER), *flags, "-I", str(EMULATED), "-I", str(kernels)]
    done = subprocess.run([*command, str(EMULATED / "kernels.cpp"), "-o", str(program)], capture_output=True, text=True)
    if "sanitize" in done.stderr and "cannot find" in done.stderr:
        pytest.skip("needs the sanitizers' libraries of g++")
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    if COMPILER is None:
        pytest.skip("needs g++")
    return build(tmp_path_factory.mktemp("emulated") / "kernels")


class Requests:
    """Calls of kernels, made all at once: starting the program takes longer than most kernels do."""

    def __init__(self, program: Path) -> None:
        self.program, self.written = program, b""

    def add(self, name: str, numbers: list[int], arrays: list[Tensor]) -> None:
        self.written += name.encode().ljust(8, b"\0") + struct.pack(f"<q{len(numbers)}q", len(numbers), *numbers)
        self.written += struct.pack("<q", len(arrays))
        for array in arrays:
            content = array.contiguous().numpy().tobytes()
            self.written += struct.pack("<q", len(content)) + content

    def process(self) -> Any:
        environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
        return subprocess.run([str(self.program)], input=self.written, capture_output=True, env=environment)

    def answers(self) -> Iterator[list[bytes]]:
        done = self.process()
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
        at, content = 0, done.stdout
        while at < len(content):
            (count,) = struct.unpack_from("<q", content, at)
            at += 8
            arrays = []
            for _ in range(count):
                (size,) = struct.unpack_from("<q", content, at)
                arrays.append(content[at + 8 : at + 8 + size])
                at += 8 + size
            yield arrays


def same(found: bytes, wanted: Tensor) -> None:
    assert found == wanted.contiguous().numpy().tobytes()


def first_bad(found: bytes) -> int:
    return int.from_bytes(found, "little")


# ---- against the reference


def few(first: Any, *more: Any) -> Any:
    """Parameters, of which the first alone runs without --full."""
    return [first, *(pytest.param(one, marks=pytest.mark.full) for one in more)]


@pytest.mark.parametrize("slots", few(9, 1, 3, 8, 32))
def test_packing(program, slots):
    requests, wanted = Requests(program), []
    for bits in range(1, 25):
        generator = torch.Generator().manual_seed(bits)
        for frames in (1, 2, 5, 131):
            codes = torch.randint(2**bits, (frames, slots), generator=generator, dtype=torch.int32)
            short = (codes % min(2**bits, 2**15)).short()
            packed = reference.pack_frames(codes, bits)
            numbers = [bits, frames, slots, bits]
            requests.add("pack32", numbers, [codes])
            requests.add("pack16", numbers, [short])
            requests.add("unpack", numbers, [packed])
            wanted += [packed, reference.pack_frames(short, bits), codes]
    for found, right in zip(requests.answers(), wanted, strict=True):
        same(found[0], right)
        assert len(found) == 1 or first_bad(found[1]) == NONE_BAD


@pytest.mark.parametrize("value", few(-1, 2048, 32767, -32768))
def test_the_first_code_out_of_range(program, value):
    codes = torch.zeros(500, 9, dtype=torch.int16)
    codes[400, 3] = codes[499, 0] = value
    requests = Requests(program)
    for seed in range(4):
        requests.add("pack16", [seed, 500, 9, 11], [codes])
        requests.add("pack32", [seed, 500, 9, 11], [codes.int()])
    for _, bad in requests.answers():
        assert first_bad(bad) == 400 * 9 + 3


def batches(length: int, sequences: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(50, (sequences, length + 1), generator=generator, dtype=torch.int32)
    ids[0] = 2  # a row of EOS alone
    ids[-1] = ids[-1].clamp(min=3)  # and one without
    counts = torch.randint(-1, length + 2, (sequences,), generator=generator)
    classes = torch.randint(5, (50,), generator=generator, dtype=torch.uint8)
    return ids, counts, classes, torch.rand(5, generator=generator)


def add_batch(requests: Requests, seed: int, tables: tuple[Tensor, ...], reset: bool) -> None:
    sequences, length = tables[0].shape
    requests.add("batch", [seed, sequences, length - 1, 2, int(reset)], list(tables))


@pytest.mark.parametrize("length", few(2049, 1, 2, 3, 64, 2047, 2048, 4101))
def test_batches(program, length):
    requests, wanted = Requests(program), []
    sequences = 5 if length < 2000 else 2
    tables = batches(length, sequences)
    own = torch.rand(sequences, length, generator=torch.Generator().manual_seed(1))
    for seed, (labels, reset) in enumerate([((), False), ((own,), True)]):
        add_batch(requests, seed, (*tables, *labels), reset)
        wanted.append(reference.build_batch(*tables, 2, reset, *labels))
    for found, right in zip(requests.answers(), wanted, strict=True):
        *tensors, facts, cu_seqlens = found
        for one, other in zip([*tensors, cu_seqlens], right, strict=True):
            same(one, other)
        rows = np.frombuffer(facts, np.int32).reshape(-1, 4)
        assert rows[:, 1].tolist() == tables[0].amin(1).tolist()
        assert rows[:, 2].tolist() == tables[0].amax(1).tolist()


@pytest.mark.parametrize("bad", few(2**31 - 1, -1, 50, -(2**31)))
@pytest.mark.parametrize("place", few(999, 0, 1, 1000))
def test_an_id_outside_the_vocabulary(program, bad, place):
    """It leads nowhere, and is found: ops.cu refuses the batch for it."""
    ids, *tables = batches(1000, 3)
    ids[1, place] = bad
    requests = Requests(program)
    add_batch(requests, place, (ids, *tables), False)
    ((*_, facts, _),) = requests.answers()
    rows = np.frombuffer(facts, np.int32).reshape(-1, 4)
    assert bad in (rows[1, 1], rows[1, 2])


# ---- that mistakes are found

BITS, BATCH = "bits.cuh", "batch.cuh"
MISTAKES = {  # file, what is right, what is wrong
    "a store past the end": (BITS, "if (j < count) out[index + j]", "out[index + j]"),
    "a vector at the end": (BITS, "count == 4) {\n    *reinterpret_cast<int4", "1) {\n    *reinterpret_cast<int4"),
    "too many bytes read": (BITS, "if (i < count) word", "if (i < count + 1) word"),
    "no barrier before a read": (BATCH, "= inclusive;\n    __syncthreads();", "= inclusive;"),
    "no barrier before the next tile": (BATCH, "__syncthreads();  // all", "// all"),
    "an exchange that some skip": (BATCH, "if (lane >= step) value =", "if (lane == 5) return value;\n    value ="),
    "a barrier that some skip": (BATCH, "if (lane == 0) found", "if (warp == 7) return;\n  if (lane == 0) found"),
    "shared memory taken for zero": (BATCH, "if (lane == 31) of_warp", "if (lane == 31 && warp) of_warp"),
    "a vector that is not aligned": (BATCH, "int tile = -static_cast<int>(base & 1);", "int tile = 0;"),
    "a class without a bound": (BATCH, "label >= 0 && label < in.vocabulary;", "true;"),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(program, tmp_path, mistake):
    name, right, wrong = MISTAKES[mistake]
    kernels = Path(shutil.copytree(ROOT / "csrc/cuda", tmp_path / "cuda"))
    content = (kernels / name).read_text()
    assert content.count(right) == 1
    (kernels / name).write_text(content.replace(right, wrong))
    broken = build(tmp_path / "kernels", kernels)
    with pytest.raises(AssertionError):
        check(broken, name)


def check(program: Path, name: str) -> None:
    """Tests of the kernels in a file."""
    if name == BITS:
        test_packing(program, 3)
        test_packing(program, 9)
    if name == BATCH:
        test_batches(program, 3)
        test_batches(program, 4101)
        test_an_id_outside_the_vocabulary(program, 2**31 - 1, 999)
